"""Chaos trials of the thresholds: `python -m tests.scaling.chaos --trials 500 --seed 1`.

Belongs here: trials of two daemons that evaluate, request runs and act, killed or frozen at their commits, and the
judgement. Does not: the worker (`chaos_worker`).

What a trial measures, and who is struck where, is drawn from its seed; how the processes interleave is the machine's.
After the storm a calm pass does what is left. Then every crossing that the pure machine finds in the samples must have
one episode, and one effect.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import psycopg
from rich.console import Console
from rich.progress import track

from devstack import postgres, saas
from devstack.processes import VAR, Supervisor
from scaling import migrate
from scaling.samples import Sample
from scaling.thresholds import Fired, replay
from tests.scaling.chaos_worker import HOUR, POINTS, RULES, START, TABLES, Hands, Job, work

RESULTS = Path("var/bench/scaling_chaos.json")
TRIALS = 500
WORKER_SECONDS = 0.5
CALM_SECONDS = 20.0
FROZEN_SECONDS = 0.3
ROLE_OF = {"sample": "evaluate", "evaluated": "evaluate", "requested": "launch"}
ROLES = ("evaluate", "launch", "act")


@dataclass
class Outcome:
    """What a trial did and found."""

    seed: int
    crossings: int = 0
    missed: int = 0
    duplicates: int = 0
    violations: list[str] = field(default_factory=list)
    strikes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.missed and not self.duplicates and not self.violations

    def raw(self) -> dict[str, Any]:
        return {
            "seed": self.seed, "crossings": self.crossings, "missed": self.missed, "duplicates": self.duplicates,
            "violations": self.violations, "strikes": dict(self.strikes), "seconds": round(self.seconds, 2),
        }  # fmt: skip


@dataclass(frozen=True)
class Arena:
    """A database, and a process that forks workers."""

    dsn: str
    context: Any


@contextmanager
def arena(dsn: str) -> Iterator[Arena]:
    """Make the tables of the trials in a migrated database."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    with psycopg.connect(dsn) as connection:
        connection.execute(TABLES.encode())
    yield Arena(dsn, context)


class Trial:
    """One seed."""

    def __init__(self, ready: Arena, seed: int) -> None:
        self._arena, self._rng, self._outcome = ready, random.Random(seed), Outcome(seed)

    def run(self) -> Outcome:
        began = time.monotonic()
        try:
            self._run()
        except Exception as error:
            self._outcome.violations.append(f"{type(error).__name__}: {error}"[:300])
        self._outcome.seconds = time.monotonic() - began
        return self._outcome

    def _run(self) -> None:
        rng = self._rng
        with psycopg.connect(self._arena.dsn) as connection:
            connection.execute(
                "TRUNCATE scaling.samples, scaling.rule_states, scaling.episodes, scaling.notifications,"
                " scaling.capability_changes, chaos.requests, chaos.effects"
            )
        plan = tuple(
            Sample(rule.metric, START + hour * HOUR, rng.choice([1.0, 1.0, 8.0, 20.0, 20.0]), dims=dims)
            for hour in range(rng.randint(4, 9))
            for rule in RULES
            for dims in ("shard=a", "shard=b")[: rng.randint(1, 2)]
        )
        together = rng.random() < 0.5
        jobs = [Job(self._arena.dsn, role, plan, together, WORKER_SECONDS) for role in ROLES * 2]
        for number in rng.sample(range(len(jobs)), rng.randint(1, 4)):
            role = jobs[number].role
            points = [point for point in POINTS if ROLE_OF.get(point, "act") == role]
            if together and "acted" in points:
                points.remove("acted")
            jobs[number] = Job(
                self._arena.dsn, role, plan, together, WORKER_SECONDS, rng.choice(["kill", "kill", "stop"]),
                rng.choice(points), rng.random() < 0.5, 1 if role == "act" else rng.randint(1, 3),
            )  # fmt: skip
        rng.shuffle(jobs)
        self._storm(jobs)
        self._calm(plan, together)

    def _storm(self, jobs: Sequence[Job]) -> None:
        workers = [self._arena.context.Process(target=work, args=(job,), daemon=True) for job in jobs]
        for worker in workers:
            worker.start()
        frozen: dict[int, float] = {}
        ends = time.monotonic() + CALM_SECONDS
        while any(worker.is_alive() for worker in workers):
            for worker, job in zip(workers, jobs, strict=True):
                if job.fate != "stop":
                    continue
                with suppress(psutil.NoSuchProcess, ProcessLookupError):
                    if psutil.Process(worker.pid).status() != psutil.STATUS_STOPPED:
                        continue
                    since = frozen.setdefault(worker.pid, time.monotonic())
                    if time.monotonic() - since > FROZEN_SECONDS:
                        self._outcome.strikes[f"frozen {'before' if job.before else 'after'} {job.point}"] += 1
                        os.kill(worker.pid, signal.SIGCONT)
            if time.monotonic() > ends:
                self._outcome.violations.append("a worker hangs")
                for worker in workers:
                    worker.kill()
            time.sleep(0.01)
        for worker, job in zip(workers, jobs, strict=True):
            worker.join()
            if worker.exitcode == -signal.SIGKILL:
                self._outcome.strikes[f"killed {'before' if job.before else 'after'} {job.point}"] += 1
            elif worker.exitcode:
                self._outcome.violations.append(f"a worker that should {job.role} ended with {worker.exitcode}")

    def _calm(self, plan: tuple[Sample, ...], together: bool) -> None:
        expected = {
            (rule.name, sample.dims, event.episode_no)
            for rule in RULES
            for sample, _, events in replay(rule, [each for each in plan if each.metric == rule.metric])
            for event in events
            if isinstance(event, Fired)
        }
        self._outcome.crossings = len(expected)
        with psycopg.connect(self._arena.dsn) as connection:
            hands = Hands(connection, plan, together, lambda _: connection.commit())
            for _ in plan:
                hands.evaluate()
            ends = time.monotonic() + CALM_SECONDS
            while time.monotonic() < ends:
                hands.launch()
                hands.act()
                [(left,)] = connection.execute(
                    "SELECT count(*) FROM scaling.episodes WHERE state <> 'acted'"
                ).fetchall()
                connection.commit()
                if not left:
                    break
                time.sleep(0.005)
            found = connection.execute("SELECT rule, dims, episode_no, state, id FROM scaling.episodes").fetchall()
            effects = Counter(
                episode for (episode,) in connection.execute("SELECT episode_id FROM chaos.effects").fetchall()
            )
        recorded = {tuple(row[:3]) for row in found}
        if recorded - expected:
            self._outcome.violations.append(f"episodes nobody crossed: {sorted(recorded - expected)}")
        self._outcome.violations += [f"episode {row[:3]} is {row[3]}" for row in found if row[3] != "acted"]
        acted = {tuple(row[:3]) for row in found if row[4] in effects}
        self._outcome.missed = len(expected - acted)
        self._outcome.duplicates = sum(effects.values()) - len(effects)


@contextmanager
def own_arena() -> Iterator[Arena]:
    """An arena with a server of its own."""
    with Supervisor(VAR / "bench" / "scaling-chaos") as supervisor:
        server = postgres.start(supervisor, disposable=True)
        server.create_database("chaos")
        saas.create(server, "chaos")
        dsn = saas.pipeline_dsn(server, "chaos")
        migrate.upgrade(dsn)
        with arena(dsn) as ready:
            yield ready


def main(arguments: Sequence[str] | None = None) -> int:
    """Run trials and write var/bench/scaling_chaos.json; 1 when one of them fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.scaling.chaos", description="Chaos of the thresholds.")
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--seed", type=int, default=1, help="of the first trial; the others count on")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    outcomes: list[Outcome] = []
    with own_arena() as ready:
        for seed in track(range(options.seed, options.seed + options.trials), "chaos", console=console):
            outcomes.append(Trial(ready, seed).run())
            if not outcomes[-1].ok:
                console.print(f"seed {seed}: {outcomes[-1].raw()}", markup=False)
            write(outcomes)
    failing = [outcome.seed for outcome in outcomes if not outcome.ok]
    console.print(f"{len(outcomes)} trials, failing seeds: {failing or 'none'}", markup=False)
    return 1 if failing else 0


def write(outcomes: Sequence[Outcome]) -> None:
    """Write the figures so far."""
    strikes: Counter[str] = sum((outcome.strikes for outcome in outcomes), Counter())
    crossings = sum(outcome.crossings for outcome in outcomes)
    failing = [outcome for outcome in outcomes if not outcome.ok]
    duplicates = sum(outcome.duplicates for outcome in outcomes)
    missed = sum(outcome.missed for outcome in outcomes)
    what = f"of {crossings:,} crossings the pure machine finds in the samples"
    results = {
        "figures": [
            {
                "name": "duplicate_actions", "value": duplicates, "target": "= 0", "ok": not duplicates,
                "how": f"{what}: effects beyond the first, written in transactions that prove the fence",
            },
            {
                "name": "missed_actions", "value": missed, "target": "= 0", "ok": not missed,
                "how": f"{what}: without an effect after a calm pass",
            },
            {
                "name": "interleavings", "value": len(outcomes), "target": f">= {TRIALS}",
                "ok": len(outcomes) >= TRIALS and not failing,
                "how": "seeded trials of two daemons; "
                + ", ".join(f"{count} {name}" for name, count in strikes.most_common()),
            },
        ],
        "strikes": dict(strikes),
        "seconds_per_trial": round(sum(outcome.seconds for outcome in outcomes) / len(outcomes), 2),
        "failing": [outcome.raw() for outcome in failing],
    }  # fmt: skip
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
