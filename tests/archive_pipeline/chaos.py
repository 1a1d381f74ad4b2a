"""Chaos trials of the archive: `python -m tests.archive_pipeline.chaos --trials 200 --seed 1`, `make chaos-archive`.

Belongs here: trials of workers that convert, archive, prune and make months while rows come to old and new months, and
that are killed, lose Postgres or get wrong answers of S3; the judgement over every row. Does not: the worker
(`chaos_worker`), the faults of S3 (`s3_with_faults`).

Each trial has a fresh database and bucket, and everything in it is drawn from its seed, except where the machine's
timing decides: when a blow falls between two statements, how many rows a writer gets in. After the storm a calm pass
runs everything once more. Then every row whose insert was acknowledged must be in Postgres or in the archive, once in
each at most and with its content; what closed months hold must all be archived; the chain must be sound.
"""

import argparse
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import psutil
import psycopg
import stamina
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from archive_pipeline.archive import Outcome as Archived
from archive_pipeline.conversion import conversion_state
from archive_pipeline.errors import ConversionBusyError, MonthBusyError
from archive_pipeline.evidence import audit_shard
from archive_pipeline.months import Month
from archive_pipeline.prune import Outcome as PruneOutcome
from archive_pipeline.query import Archive
from archive_pipeline.signing import new_key
from devstack import saas, servers
from devstack.processes import VAR, Supervisor
from devstack.servers import TEMPLATE, Bucket, Database, Servers
from scaling import migrate
from scaling.databases import Shard
from tests.archive_pipeline import partitioned
from tests.archive_pipeline.chaos_worker import TABLE, Hands, Job, work
from tests.archive_pipeline.s3_with_faults import Faults, Mistake, faulty_s3

RESULTS = Path("var/bench/archive_chaos.json")
TRIALS = 200
WORKER_SECONDS = 60.0
TRIAL_SECONDS = 600.0
TENANTS = 5
BLOWS = ("kill at step", "kill at step", "kill at time", "end sessions", "crash server", "spare")
MISTAKES: tuple[Mistake, ...] = (
    "503", "500", "reset", "reset mid-part", "answer lost", "damaged on the way", "cut off", "damaged on the way back",
)  # fmt: skip
PIECES = ("", "part-", "manifest", "chain", "salts")
assert set(MISTAKES) <= set(get_args(Mistake))

Row = tuple[str, str, datetime]
"""Tenant, payload, time."""


@dataclass
class Outcome:
    """What a trial did and found."""

    seed: int
    scenario: str = ""
    rows: int = 0
    lost: int = 0
    doubled: int = 0
    altered: int = 0
    unknown: int = 0
    violations: list[str] = field(default_factory=list)
    unforeseen: list[str] = field(default_factory=list)
    strikes: Counter[str] = field(default_factory=Counter)
    troubles: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def bad_rows(self) -> int:
        return self.lost + self.doubled + self.altered + self.unknown

    @property
    def ok(self) -> bool:
        return not self.bad_rows and not self.violations

    def raw(self) -> dict[str, Any]:
        return {
            "seed": self.seed, "scenario": self.scenario, "rows": self.rows, "lost": self.lost,
            "doubled": self.doubled, "altered": self.altered, "unknown": self.unknown, "violations": self.violations,
            "unforeseen": self.unforeseen, "strikes": dict(self.strikes), "troubles": dict(self.troubles),
            "seconds": round(self.seconds, 2),
        }  # fmt: skip


@dataclass(frozen=True)
class Arena:
    """Servers of its own, a proxy that makes S3's mistakes, and a process that forks workers."""

    servers: Servers
    faults: Faults
    context: Any
    directory: Path
    key: str

    def connect(self, dsn: str) -> psycopg.Connection[tuple[Any, ...]]:
        """Connect, also to a server that is just starting again."""
        ends = time.monotonic() + 30
        while True:
            try:
                return psycopg.connect(dsn, autocommit=True)
            except psycopg.OperationalError:
                if time.monotonic() > ends:
                    raise
                time.sleep(0.02)


class Writer:
    """The SaaS: inserts rows into old and new months, and remembers what was acknowledged."""

    def __init__(self, arena: Arena, dsn: str, months: Sequence[Month], seed: int) -> None:
        self.acknowledged: dict[uuid.UUID, Row] = {}
        self.in_doubt: dict[uuid.UUID, Row] = {}
        self.refused = 0
        self._arena, self._dsn, self._months = arena, dsn, months
        self._rng = random.Random(seed)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def insert(self, count: int, month: Month | None = None) -> None:
        """Insert a batch in one statement."""
        rows = dict(self._row(month or self._rng.choice(self._months)) for _ in range(count))
        with self._arena.connect(self._dsn) as connection:
            self._insert(connection, rows)

    def _row(self, month: Month) -> tuple[uuid.UUID, Row]:
        rng = self._rng
        inside = month.end - month.start - timedelta(microseconds=1)
        at = month.start + rng.choice([timedelta(0), inside, inside * rng.random()])
        tenant = uuid.UUID(int=rng.randint(1, TENANTS))
        payload = rng.choice(["", "x\ny", "\\N", "🦊"]) + f"{rng.randrange(10**9)}" + "p" * rng.choice([0, 0, 300])
        return uuid.UUID(int=rng.getrandbits(128), version=4), (str(tenant), payload, at)

    def _insert(self, connection: psycopg.Connection[tuple[Any, ...]], rows: dict[uuid.UUID, Row]) -> None:
        try:
            connection.execute(
                "INSERT INTO audit_logs (id, tenant_id, action, resource_id, created_at, details) "
                "SELECT i, t, 'chaos', p, a, jsonb_build_object('n', p) "
                "FROM unnest(%s::uuid[], %s::uuid[], %s::text[], %s::timestamptz[]) AS r (i, t, p, a)",
                (list(rows), *([row[column] for row in rows.values()] for column in range(3))),
            )
        except psycopg.OperationalError as error:
            if error.sqlstate in ("55P03", "40P01"):
                self.refused += len(rows)
            else:
                self.in_doubt |= rows
        except psycopg.Error:
            self.refused += len(rows)
        else:
            self.acknowledged |= rows

    def __enter__(self) -> "Writer":
        self._stop.clear()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        assert self._thread is not None
        self._thread.join()

    def _write(self) -> None:
        while not self._stop.is_set():
            with suppress(psycopg.Error), self._arena.connect(self._dsn) as connection:
                while not connection.closed and not self._stop.wait(0.02):
                    # The open month more often than the others, as it is.
                    month = self._months[-1] if self._rng.random() < 0.5 else self._rng.choice(self._months)
                    self._insert(connection, dict([self._row(month)]))


class Trial:
    """One seed."""

    def __init__(self, arena: Arena, seed: int) -> None:
        self._arena = arena
        self._rng = random.Random(seed)
        self._outcome = Outcome(seed)

    def run(self) -> Outcome:
        began = time.monotonic()
        with ExitStack() as opened:
            database = opened.enter_context(self._arena.servers.database())
            bucket = opened.enter_context(self._arena.servers.bucket())
            scratch = Path(opened.enter_context(tempfile.TemporaryDirectory(dir=self._arena.directory)))
            try:
                self._run(database, bucket, scratch)
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                self._outcome.violations.append(
                    f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"[:500]
                )
        self._outcome.seconds = time.monotonic() - began
        return self._outcome

    def _run(self, database: Database, bucket: Bucket, scratch: Path) -> None:
        rng, arena = self._rng, self._arena
        now = datetime.now(UTC)
        index = now.year * 12 + now.month - 1
        months = [Month((index - back) // 12, (index - back) % 12 + 1) for back in (3, 2, 1, 0)]
        if rng.random() < 0.8:
            months = months[1:]
        closed = months[:-1]
        is_partitioned = rng.random() < 0.55
        environment = {
            **database.environment(),
            **bucket.environment(),
            "ARCHIVE_SIGNING_KEY": arena.key,
            "AWS_MAX_ATTEMPTS": "8",
        }
        with arena.connect(database.admin_dsn) as admin:
            admin.cursor().executemany(
                "INSERT INTO tenants (id, name) VALUES (%s, 'T')", [(uuid.UUID(int=n),) for n in range(1, TENANTS + 1)]
            )
            if is_partitioned:
                shard = Shard("main", database.dsn, owner_dsn=database.owner_dsn)
                partitioned.convert(admin, shard, *months, months[-1].following)
                shard.close()
        writer = Writer(arena, database.admin_dsn, months, rng.randrange(2**32))
        for month in months:
            writer.insert(rng.randint(10, 70), month)
        menus: list[tuple[str, ...]] = (
            [("archive",), ("archive", "prune"), ("prune",), ("archive", "prune", "archive"), ("premake", "archive")]
            if is_partitioned
            else [("archive",), ("convert",), ("convert", "archive"), ("archive", "convert"), ("convert", "premake")]
        )
        # Something is archived or pruned before the storm, so that it also meets what comes late.
        if is_partitioned and rng.random() < 0.5:
            self._calm(environment, scratch, closed, ("archive", "prune") if rng.random() < 0.5 else ("archive",))
        chosen = [rng.choice(menus) for _ in range(rng.choice([1, 1, 2, 2, 3]))]
        self._outcome.scenario = f"{'partitioned' if is_partitioned else 'plain'}, {len(closed)} months, " + " | ".join(
            "+".join(operations) for operations in chosen
        )
        together = rng.random() < 0.25
        with writer:
            for started in [chosen] if together else [[operations] for operations in chosen]:
                self._storm(database, bucket, environment, scratch, closed, started)
                if rng.random() < 0.5:
                    writer.insert(rng.randint(1, 5), rng.choice(closed))
        self._outcome.strikes["inserts refused"] += writer.refused
        self._outcome.strikes["inserts in doubt"] += len(writer.in_doubt)
        everything: tuple[str, ...] = ("archive", "archive")
        if is_partitioned:
            everything = ("archive", "prune", "archive")
        elif any("convert" in operations for operations in chosen):
            everything = ("convert", *everything)
        with self._hands(environment, scratch, closed) as hands:
            self._judge_runs(hands, everything)
            self._judge_rows(hands, writer, database, closed, pruned=is_partitioned)
        self._outcome.strikes = +self._outcome.strikes

    # The storm.

    def _storm(
        self,
        database: Database,
        bucket: Bucket,
        environment: dict[str, str],
        scratch: Path,
        closed: Sequence[Month],
        started: Sequence[tuple[str, ...]],
    ) -> None:
        rng, arena = self._rng, self._arena
        if rng.random() < 0.4:
            arena.faults.script += [
                (rng.choice(["PUT", "PUT", "GET", "HEAD"]), rng.choice(PIECES), rng.choice(MISTAKES))
                for _ in range(rng.randint(1, 3))
            ]
        workers: list[tuple[Any, Job]] = []
        blows: list[tuple[float, Callable[[], None]]] = []
        for number, operations in enumerate(started):
            blow = rng.choice(BLOWS)
            at = rng.uniform(0.02, 1.2)
            job = Job(
                environment={**environment, "AWS_ENDPOINT_URL_S3": arena.faults.url},
                scratch=scratch / f"worker-{time.monotonic_ns()}-{number}",
                months=closed,
                operations=operations,
                die_at=rng.randint(1, 16 * len(operations)) if blow == "kill at step" else 0,
                result=scratch / f"result-{time.monotonic_ns()}-{number}.json",
            )
            job.scratch.mkdir()
            process = arena.context.Process(target=work, args=(job,), daemon=True)
            process.start()
            workers.append((process, job))
            actions: dict[str, Callable[[], None]] = {
                "kill at time": partial(self._kill, process),
                "end sessions": partial(self._end_sessions, database),
                "crash server": self._crash_server,
            }
            if blow in actions:
                blows.append((time.monotonic() + at, actions[blow]))
        ends = time.monotonic() + WORKER_SECONDS
        blows.sort(key=lambda each: each[0])
        while any(process.is_alive() for process, _ in workers) and time.monotonic() < ends:
            if blows and time.monotonic() >= blows[0][0]:
                blows.pop(0)[1]()
            time.sleep(0.01)
        for process, job in workers:
            if process.is_alive():
                self._outcome.violations.append(f"a worker hangs in {job.operations}")
                process.kill()
            process.join()
            self._outcome.strikes["killed"] += process.exitcode == -signal.SIGKILL
            if job.result.exists():
                result = json.loads(job.result.read_text())
                self._outcome.troubles.update(result["troubles"])
                self._outcome.unforeseen += result["unforeseen"]
        self._outcome.strikes.update(f"S3: {mistake}" for mistake in arena.faults.made)
        for each in (arena.faults.script, arena.faults.made, arena.faults.requests):
            each.clear()

    def _kill(self, process: Any) -> None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)

    def _end_sessions(self, database: Database) -> None:
        with suppress(psycopg.Error), self._arena.connect(self._arena.servers.postgres.dsn()) as admin:
            ended = admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND usename <> 'postgres'",
                (database.name,),
            )
            self._outcome.strikes["sessions ended"] += bool(ended.rowcount)

    def _crash_server(self) -> None:
        """Kill a backend, upon which the server ends all others and starts again from its log."""
        with suppress(psycopg.Error), self._arena.connect(self._arena.servers.postgres.dsn()) as admin:
            [(pid,)] = admin.execute("SELECT pg_backend_pid()").fetchall()
            psutil.Process(pid).kill()
            self._outcome.strikes["server crashed"] += 1

    # Calm.

    @contextmanager
    def _hands(self, environment: dict[str, str], scratch: Path, closed: Sequence[Month]) -> Iterator[Hands]:
        directory = scratch / f"calm-{time.monotonic_ns()}"
        directory.mkdir()
        with mock.patch.dict(os.environ, environment):
            hands = Hands(directory, closed, lambda _: None)
            try:
                yield hands
            finally:
                hands.shard.close()

    def _calm(
        self, environment: dict[str, str], scratch: Path, closed: Sequence[Month], operations: Sequence[str]
    ) -> None:
        with self._hands(environment, scratch, closed) as hands:
            self._judge_runs(hands, operations)

    def _judge_runs(self, hands: Hands, operations: Sequence[str]) -> None:
        """Run everything when nothing is in its way: it must do its work."""
        found: list[Any] = []
        for number, name in enumerate(operations):
            found = patiently(getattr(hands, name)) or []
            if name == "prune":
                for each in found:
                    if each.outcome is not PruneOutcome.DROPPED:
                        self._outcome.violations.append(f"{each.partition} {each.outcome}: {each.reason}")
            if name == "archive":
                for report in found:
                    month = report.manifest.month.name
                    # A prune that died after its detach hides the rows until the next one has finished it.
                    changed = "" if "prune" in operations[number:] else report.source_changed
                    for what in (report.strangers, report.damaged, changed):
                        if what:
                            self._outcome.violations.append(f"month {month}: {what}")
                    if report.stored != report.manifest.digest:
                        self._outcome.violations.append(f"month {month}: the manifest has another digest")
        if operations.count("archive") > 1 and {report.outcome for report in found} != {Archived.UNCHANGED}:
            self._outcome.violations.append("a further run does something")

    def _judge_rows(
        self, hands: Hands, writer: Writer, database: Database, closed: Sequence[Month], *, pruned: bool
    ) -> None:
        outcome = self._outcome
        columns = "SELECT CAST(id AS text) AS id, CAST(tenant_id AS text) AS tenant_id, resource_id, created_at"
        with self._arena.connect(database.admin_dsn) as admin:
            there = admin.execute(f"{columns} FROM audit_logs".encode()).fetchall()
            if pruned and (left := partitioned.detached(admin)):
                outcome.violations.append(f"tables are left detached: {left}")
        with Archive(hands.target.bucket, hands.target.layout, TABLE) as archive:
            stored = archive.query(f"{columns} FROM audit_logs").to_dict("records")
        # The archive's readable time is rounded down to milliseconds.
        archived = [(each["id"], each["tenant_id"], each["resource_id"], each["created_at"]) for each in stored]
        kept = [(identifier, tenant, payload, at) for identifier, tenant, payload, at in there]
        known = {str(identifier): row for identifier, row in (writer.in_doubt | writer.acknowledged).items()}
        outcome.rows = len(writer.acknowledged)
        for rows, tolerance in ((kept, timedelta(0)), (archived, timedelta(milliseconds=1))):
            counts = Counter(row[0] for row in rows)
            outcome.doubled += sum(count - 1 for count in counts.values())
            outcome.unknown += len(counts.keys() - known.keys())
            for identifier, tenant, payload, at in rows:
                if identifier in known:
                    wanted = known[identifier]
                    moved = wanted[2] - at.astimezone(UTC)
                    outcome.altered += (tenant, payload) != wanted[:2] or not timedelta(0) <= moved <= tolerance
        in_postgres, in_archive = ({row[0] for row in rows} for rows in (kept, archived))
        everywhere = in_postgres | in_archive
        outcome.lost += sum(str(identifier) not in everywhere for identifier in writer.acknowledged)
        closes = closed[-1].end
        late = [one for one in everywhere if one in known and known[one][2] < closes and one not in in_archive]
        if late:
            outcome.violations.append(f"{len(late)} rows of closed months are not archived")
        early = [one for one in in_archive if one in known and known[one][2] >= closes]
        if early:
            outcome.violations.append(f"{len(early)} rows of the open month are archived")
        if pruned:
            keeps = closed[-1].start
            left_over = sum(known[one][2] < keeps for one in in_postgres if one in known)
            if left_over:
                outcome.violations.append(f"{left_over} rows of prunable months are in Postgres")
        finding = conversion_state(hands.shard, TABLE).finding
        if finding:
            outcome.violations.append(finding)
        report = audit_shard(hands.shard, hands.target.bucket, hands.target.layout, TABLE, deep=True)
        outcome.violations += [f"audit: {found.kind} {found.month}: {found.text}" for found in report.findings]
        if sum(month.rows for month in report.months) != len(archived):
            outcome.violations.append("the manifests count other rows than the query finds")


def patiently(action: Callable[[], Any]) -> Any:
    """Run it; wait for sessions of dead workers to end, and for a server to come back."""
    ends = time.monotonic() + 20
    while True:
        try:
            return action()
        except (MonthBusyError, ConversionBusyError):
            if time.monotonic() > ends:
                raise
            time.sleep(0.1)


@contextmanager
def own_arena(directory: Path) -> Iterator[Arena]:
    """An arena with servers of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__, "adbc_driver_postgresql.dbapi"])
    shutil.rmtree(directory, ignore_errors=True)
    with Supervisor(directory) as supervisor:
        both = servers.start(supervisor, disposable=True)
        both.postgres.create_database(TEMPLATE)
        saas.create(both.postgres, TEMPLATE)
        migrate.upgrade(saas.pipeline_dsn(both.postgres, TEMPLATE))
        with faulty_s3(both.s3.endpoint) as faults:
            yield Arena(both, faults, context, directory, new_key())


def try_seeds(number: int, seeds: Sequence[int], done: Any) -> None:
    """Run trials one after the other in an arena of its own, and hand over each outcome."""
    logging.disable(logging.CRITICAL)  # what fails is the point
    stamina.instrumentation.set_on_retry_hooks([])
    with own_arena(VAR / "bench" / f"archive-chaos-{number}") as arena:
        for seed in seeds:
            parent = multiprocessing.parent_process()
            if parent is None or not parent.is_alive():
                break  # nobody waits for the rest
            done.put(Trial(arena, seed).run())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run trials and write var/bench/archive_chaos.json; 1 when one of them fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.archive_pipeline.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--seed", type=int, default=1, help="of the first trial; the others count on")
    parser.add_argument("--jobs", type=int, default=2, help="trials side by side, each with servers of its own")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    outcomes: list[Outcome] = []
    columns = (TextColumn("chaos"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    context = multiprocessing.get_context("spawn")
    done: Any = context.Queue()
    seeds = range(options.seed, options.seed + options.trials)
    jobs = [
        context.Process(target=try_seeds, args=(number, seeds[number :: options.jobs], done))
        for number in range(min(options.jobs, options.trials))
    ]
    for job in jobs:
        job.start()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("chaos", total=options.trials)
        for _ in seeds:
            outcome = done.get(timeout=TRIAL_SECONDS)
            outcomes.append(outcome)
            if not outcome.ok or outcome.unforeseen:
                progress.console.print(f"seed {outcome.seed}: {outcome.raw()}", markup=False, soft_wrap=True)
            progress.advance(task)
            write(outcomes)
    for job in jobs:
        job.join()
    strikes: Counter[str] = sum((outcome.strikes for outcome in outcomes), Counter())
    failing = [outcome.seed for outcome in outcomes if not outcome.ok]
    console.print(f"{len(outcomes)} trials, {dict(strikes)}, failing seeds: {failing or 'none'}", markup=False)
    return 1 if failing else 0


def write(outcomes: Sequence[Outcome]) -> None:
    """Write the figures so far."""
    strikes: Counter[str] = sum((outcome.strikes for outcome in outcomes), Counter())
    failing = [outcome for outcome in outcomes if not outcome.ok]
    results = {
        "figures": [
            {
                "name": "chaos_bad_rows",
                "value": sum(outcome.bad_rows for outcome in outcomes),
                "target": "= 0",
                "ok": not failing,
                "how": f"of {sum(outcome.rows for outcome in outcomes):,} acknowledged rows: lost, doubled, altered or "
                "of unknown origin in Postgres or the archive; digests, chain and objects are sound too",
            },
            {
                "name": "chaos_trials",
                "value": len(outcomes),
                "target": f">= {TRIALS}",
                "ok": len(outcomes) >= TRIALS,
                "how": "seeded trials of convert, archive, late rows, publish and prune beside a writer, then a calm "
                "run; " + ", ".join(f"{count} {name}" for name, count in strikes.most_common()),
            },
        ],
        "strikes": dict(strikes),
        "troubles": dict(sum((outcome.troubles for outcome in outcomes), Counter[str]())),
        "unforeseen": [one for outcome in outcomes for one in outcome.unforeseen],
        "first_seed": min(outcome.seed for outcome in outcomes),
        "seconds_per_trial": round(sum(outcome.seconds for outcome in outcomes) / len(outcomes), 2),
        "failing": [outcome.raw() for outcome in failing],
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
