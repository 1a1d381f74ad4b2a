"""One process of a chaos trial of the thresholds: evaluates, requests runs or acts, until it is killed or time is up.

Belongs here: the roles, and dying or freezing at a commit. Does not: the judgement (`chaos`).
"""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import psycopg

from scaling import episodes, samples
from scaling.capabilities import Capability, Mode
from scaling.databases import Connection
from scaling.episodes import Episode, Watch
from scaling.samples import Sample
from scaling.thresholds import Compare, Rearm, Rule

START = datetime(2026, 9, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
LEASE = timedelta(milliseconds=120)
LOST = timedelta(milliseconds=250)
NO_WAIT = timedelta(milliseconds=5)
MANY = 10_000
CAPABILITY = Capability.PARALLEL_SYNC
POINTS = ("sample", "evaluated", "requested", "started", "claimed", "acted", "finished")
RULES = tuple(
    Rule(f"rule-{n}", f"metric-{n}", Compare.ABOVE, 10, 6 * HOUR, breaches=1 + n, of=1 + n, recovery=5,
         rearm=Rearm.REPEAT, flap_episodes=99)
    for n in range(2)
)  # fmt: skip
WATCHES = [Watch(rule, CAPABILITY, Mode.AUTO) for rule in RULES]
TABLES = """
CREATE SCHEMA IF NOT EXISTS chaos;
CREATE TABLE IF NOT EXISTS chaos.requests (
  run_key text PRIMARY KEY, episode_id bigint, attempts int, run_id text, started_at timestamptz, ended boolean);
CREATE TABLE IF NOT EXISTS chaos.effects (episode_id bigint, fence bigint, run_id text);
"""


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker does, and what befalls it.

    Attributes:
        role: evaluate, launch or act.
        plan: the samples, oldest first.
        together: the action's write and its end are one transaction.
        seconds: then it ends by itself.
        fate: kill or stop; None: nothing.
        point: at which commit.
        before: just before the commit, not just after it.
        number: at which of them.
    """

    dsn: str
    role: str
    plan: tuple[Sample, ...]
    together: bool
    seconds: float
    fate: str | None = None
    point: str = ""
    before: bool = False
    number: int = 1


class Hands:
    """The three roles over one connection."""

    def __init__(
        self, connection: Connection, plan: tuple[Sample, ...], together: bool, commit: Callable[[str], None]
    ) -> None:
        self._connection, self._plan, self._together, self._commit = connection, plan, together, commit
        self._next = 0

    def evaluate(self) -> None:
        """Store the next sample, then judge."""
        if self._next < len(self._plan):
            samples.record(self._connection, [self._plan[self._next]])
            self._commit("sample")
            self._next += 1
        now = max((each.newest.at for each in samples.series(self._connection)), default=START)
        episodes.evaluate(self._connection, WATCHES, now)
        self._commit("evaluated")

    def launch(self) -> None:
        """A sensor and the run monitor: a run key is used once for ever, as in Dagster."""
        episodes.reap(self._connection, max_attempts=MANY, first_retry=NO_WAIT)
        self._connection.commit()
        lost = self._connection.execute(
            "UPDATE chaos.requests SET ended = true WHERE NOT ended AND started_at < clock_timestamp() - %s::interval"
            " RETURNING episode_id, run_id, attempts",
            [LOST],
        ).fetchall()
        for episode_id, run_id, attempts in lost:
            episodes.run_ended(
                self._connection, episode_id, run_id=run_id, attempts=attempts, error="lost", max_attempts=MANY,
                first_retry=NO_WAIT,
            )  # fmt: skip
        self._connection.commit()
        wanted: list[Episode] = episodes.actionable(self._connection, CAPABILITY, mode=Mode.AUTO, max_attempts=MANY)
        for episode in wanted:
            inserted = self._connection.execute(
                "INSERT INTO chaos.requests VALUES (%s, %s, %s, NULL, NULL, false) ON CONFLICT DO NOTHING",
                [episodes.run_key(episode), episode.id, episode.attempts],
            ).rowcount
            if not inserted:
                self._record_end(episode)
        self._commit("requested")

    def _record_end(self, episode: Episode) -> None:
        """What the sensor does when the run of this attempt has ended, however, and its episode still waits.

        A run ends well without acting when the lease it was requested for was given up between request and claim.
        """
        ended = self._connection.execute(
            "SELECT run_id FROM chaos.requests WHERE run_key = %s AND ended", [episodes.run_key(episode)]
        ).fetchone()
        if ended:
            episodes.run_ended(
                self._connection, episode.id, run_id=ended[0], attempts=episode.attempts, error="ended unclaimed",
                max_attempts=MANY, first_retry=NO_WAIT,
            )  # fmt: skip

    def act(self) -> None:
        """A run: start, claim, act, finish."""
        run_id = f"{os.getpid()}-{time.monotonic_ns()}"
        found = self._connection.execute(
            "UPDATE chaos.requests SET run_id = %s, started_at = clock_timestamp() WHERE run_key = (SELECT run_key"
            " FROM chaos.requests WHERE run_id IS NULL ORDER BY run_key FOR UPDATE SKIP LOCKED LIMIT 1)"
            " RETURNING run_key, episode_id",
            [run_id],
        ).fetchone()
        if found is None:
            self._connection.rollback()
            return
        self._commit("started")
        claimed = episodes.claim(self._connection, found[1], run_id, LEASE, max_attempts=MANY)
        self._commit("claimed")
        if claimed is not None:
            try:
                episodes.hold(self._connection, claimed)
                done = self._connection.execute(
                    "SELECT FROM chaos.effects WHERE episode_id = %s", [claimed.episode.id]
                ).rowcount
                if not done:
                    self._connection.execute(
                        "INSERT INTO chaos.effects VALUES (%s, %s, %s)", [claimed.episode.id, claimed.fence, run_id]
                    )
                if not self._together:
                    self._commit("acted")
                episodes.finish(self._connection, claimed, {"run": run_id})
                self._commit("finished")
            except episodes.ClaimLostError:
                self._connection.rollback()
        self._connection.execute("UPDATE chaos.requests SET ended = true WHERE run_key = %s", [found[0]])
        self._connection.commit()


def work(job: Job) -> None:
    """Do the job until time is up, or fate strikes."""
    reached = 0

    def strike(point: str, *, before: bool) -> None:
        nonlocal reached
        if job.fate is None or (point, before) != (job.point, job.before):
            return
        reached += 1
        if reached == job.number:
            os.kill(os.getpid(), signal.SIGKILL if job.fate == "kill" else signal.SIGSTOP)

    with psycopg.connect(job.dsn) as connection:

        def commit(point: str) -> None:
            strike(point, before=True)
            connection.commit()
            strike(point, before=False)

        hands = Hands(connection, job.plan, job.together, commit)
        ends = time.monotonic() + job.seconds
        while time.monotonic() < ends:
            getattr(hands, job.role)()
            time.sleep(0.003)
