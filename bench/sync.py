"""The figures of the calendar sync: `python -m bench.sync [--only pool …]`, which is `make bench-sync`.

Belongs here: the parts, their order, the figures with their targets, var/bench/sync.json and the table.
Does not: how a fleet is built (fleet), the baselines (seed_loop, naive_pool), the poisons, a metered Dagster run.

Every part measures its own baseline in the same run, at least three times, and compares medians. A figure that could
not be measured is absent. With `--only` the figures of the other parts stay as they were measured last.
"""

import argparse
import contextlib
import json
import logging
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import dagster_run, fleet, naive_pool, poison, seed_loop, virtual_fleet
from bench.fleet import Fleet
from devstack.processes import CHECKOUT
from sync_pipeline.tick import run_tick

RESULTS = Path("var/bench/sync.json")
CHAOS_RESULTS = Path("var/bench/chaos.json")
SMALL, LARGE = 1_000, 10_000
LATENCY_SECONDS = 0.1
CHANGED = 0.05
ROUNDS = 3
LOOP_SAMPLE = 60
WIDE = 16
CALLS_MEASURED = 500
CHAOS_TRIALS = 200

console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number and the target it is held against; without a target it is told, not judged."""

    name: str
    value: float
    target: str | None
    ok: bool
    how: str


@dataclass(frozen=True, slots=True)
class Measured:
    """What a part found."""

    figures: Sequence[Figure]
    raw: Mapping[str, Any]


def at_most(name: str, value: float, limit: float, how: str) -> Figure:
    return Figure(name, _rounded(value), f"<= {limit:g}", value <= limit, how)


def at_least(name: str, value: float, limit: float, how: str) -> Figure:
    return Figure(name, _rounded(value), f">= {limit:g}", value >= limit, how)


def below(name: str, value: float, limit: float, how: str) -> Figure:
    return Figure(name, _rounded(value), f"< {limit:g}", value < limit, how)


def pool() -> Measured:
    """1,000 workspaces at 100 ms, 5 % changed since the last tick, against the ideal and both baselines."""
    with fleet.running(SMALL, name="sync-pool") as saas:
        saas.prove_idle()
        cpu = client_cpu_per_call(saas)
        saas.google.add_fault("latency", seconds=LATENCY_SECONDS)
        with saas.services() as services:
            in_flight = services.parallelism
        rounds = []
        for number in range(ROUNDS):
            saas.make_due()
            changed = saas.change(CHANGED, seed=number)
            began = time.perf_counter()
            result = saas.tick()
            seconds = time.perf_counter() - began
            calls = result.tally.api_calls
            if (len(result.results), result.tally.events_upserted, len(result.failed)) != (SMALL, changed, 0):
                raise AssertionError(f"the tick did not do its work: {result.numbers()}")
            ideal = max(calls * LATENCY_SECONDS / in_flight, calls * cpu / (os.cpu_count() or 1))
            loop = seed_loop.run(saas, saas.members[:LOOP_SAMPLE])
            naive = naive_pool.run(saas, saas.members)
            rounds.append(
                {
                    "seconds": round(seconds, 2),
                    "calls": calls,
                    "ideal_seconds": round(ideal, 2),
                    "vs_ideal": seconds / ideal,
                    "p95_workspace_seconds": round(result.p95_seconds, 3),
                    "loop_workspaces_per_second_while_working": round(loop.per_second, 2),
                    "vs_loop_while_working": SMALL / seconds / loop.per_second,
                    "naive_seconds": round(naive.seconds, 2),
                    "naive_calls": naive.calls,
                    "vs_naive": naive.seconds / seconds,
                }
            )
            saas.make_due()
            began = time.perf_counter()
            saas.tick(SYNC_PARALLELISM=str(WIDE))
            rounds[-1]["vs_loop_while_working_wide"] = SMALL / (time.perf_counter() - began) / loop.per_second
            told(f"pool {number + 1}/{ROUNDS}: {rounds[-1]}")
    ideal_ratio, working, wide, against_naive = (
        statistics.median(one[name] for one in rounds)
        for name in ("vs_ideal", "vs_loop_while_working", "vs_loop_while_working_wide", "vs_naive")
    )
    slowest = max(one["seconds"] for one in rounds)
    ticks = -(-slowest // seed_loop.SECONDS_BETWEEN_TICKS)
    cadence = SMALL / ticks / seed_loop.JOBS_PER_TICK
    what = f"{SMALL:,} workspaces, {LATENCY_SECONDS * 1000:.0f} ms, {CHANGED:.0%} changed"
    return Measured(
        [
            at_most("pool_vs_ideal", ideal_ratio, 1.3, f"{what}; wall time of a tick / ideal, median of {ROUNDS}"),
            at_least(
                "vs_seed_loop",
                cadence,
                25,
                f"{what}; workspaces served per two-minute tick against the cron's {seed_loop.JOBS_PER_TICK}; while "
                f"both work the ratio is {working:.1f} ({in_flight} calls in flight against 1, 1 call against 2), "
                f"and {wide:.1f} with SYNC_PARALLELISM={WIDE}",
            ),
            Figure(
                "vs_naive_pool",
                _rounded(against_naive),
                None,
                True,
                f"{what}; wall time of {naive_pool.THREADS} threads with full syncs / a tick, median of {ROUNDS}",
            ),
        ],
        {
            "rounds": rounds,
            "in_flight": in_flight,
            "client_cpu_ms_per_call": round(1000 * cpu, 3),
            "cores": os.cpu_count(),
            "vs_seed_loop_cadence": round(cadence, 1),
            "vs_seed_loop_while_working": round(working, 2),
        },
    )


def client_cpu_per_call(saas: Fleet) -> float:
    """CPU seconds of one idle `events.list` through the real client, in one thread and nothing else."""
    tokens = dict(saas.execute("SELECT calendar_id, sync_token FROM sync.calendar_state"))
    with saas.services() as services:
        member = saas.members[0]
        google = services.google.connect(member.user.refresh_token, calls=Counter())
        google.list_events(member.calendar, sync_token=tokens[member.calendar], page_token=None)
        before = own_cpu()
        for _ in range(CALLS_MEASURED):
            google.list_events(member.calendar, sync_token=tokens[member.calendar], page_token=None)
        return (own_cpu() - before) / CALLS_MEASURED


def dagster() -> Measured:
    """Whole Dagster runs of the same 1,000 workspaces, process start included."""
    with fleet.running(SMALL, name="sync-dagster") as saas, dagster_run.installation(saas) as installation:
        saas.google.add_fault("latency", seconds=LATENCY_SECONDS)
        runs = []
        for number in range(ROUNDS):
            saas.make_due()
            saas.change(CHANGED, seed=number)
            runs.append(installation.run())
            told(f"dagster {number + 1}/{ROUNDS}: {runs[-1].seconds} s")
            if runs[-1].numbers["workspaces_served"] != SMALL:
                raise AssertionError(f"the run did not do its work: {runs[-1]}")
    how = (
        f"dagster job execute of calendar_sync, {SMALL:,} workspaces, {LATENCY_SECONDS * 1000:.0f} ms, "
        f"{CHANGED:.0%} changed, Postgres storage, from process start to exit, median of {ROUNDS}"
    )
    return Measured(
        [at_most("dagster_run_s", statistics.median(run.seconds for run in runs), 30, how)],
        {"runs": [run.raw() for run in runs]},
    )


def idle() -> Measured:
    """10,000 workspaces in which nothing changed, against 1,000 of them."""
    with (
        fleet.running(SMALL, name="sync-idle-small") as small,
        fleet.running(LARGE, name="sync-idle-large") as large,
        dagster_run.installation(small) as small_installation,
        dagster_run.installation(large) as large_installation,
    ):
        costs: dict[int, list[dagster_run.Run]] = {SMALL: [], LARGE: []}
        for number in range(ROUNDS):
            for saas, installation in ((small, small_installation), (large, large_installation)):
                saas.make_due()
                run = installation.run()
                fleet.check_idle(saas, run.numbers)
                costs[len(saas.members)].append(run)
                told(
                    f"idle {number + 1}/{ROUNDS}, {len(saas.members):,}: {run.tick_seconds} s, "
                    f"{run.cpu_ms_per_workspace:.2f} ms CPU a workspace, {run.max_rss_mb} MB"
                )
        nothing_due = [tick_seconds(large) for _ in range(ROUNDS)]
        schedule = large_installation.evaluate()
        launched = large_installation.launch(ROUNDS)
        told(f"idle: schedule {schedule}, nothing due {nothing_due}, event rows {launched}")
    per_workspace = {size: statistics.median(run.cpu_ms_per_workspace for run in runs) for size, runs in costs.items()}
    rows = max([*launched, *(run.event_rows for run in costs[LARGE])])
    what = f"{LARGE:,} idle workspaces"
    return Measured(
        [
            at_most(
                "idle_event_rows",
                rows,
                25,
                f"{what}; rows of event_logs per run, the most of {ROUNDS} runs that polled all of them and {ROUNDS} "
                "launched by the daemon with nothing due",
            ),
            below("tick_s", schedule["median"], 1, f"evaluation of the schedule, {LARGE:,} partitions, median of 5"),
            below(
                "rss_mb",
                max(run.max_rss_mb for run in costs[LARGE]),
                400,
                f"{what}; peak of the Dagster run's process while it polls all, the highest of {ROUNDS}",
            ),
            at_most(
                "cost_growth",
                per_workspace[LARGE] / per_workspace[SMALL],
                1.3,
                f"CPU a workspace (run and Postgres) at {LARGE:,} / at {SMALL:,}, no latency, medians of {ROUNDS}",
            ),
        ],
        {
            "cpu_ms_per_workspace": {str(size): round(value, 3) for size, value in per_workspace.items()},
            "runs": {str(size): [run.raw() for run in runs] for size, runs in costs.items()},
            "nothing_due_seconds": nothing_due,
            "schedule": schedule,
            "event_rows_of_launched_runs": launched,
        },
    )


def tick_seconds(saas: Fleet) -> float:
    """How long a tick takes to find that nothing is due."""
    with saas.services() as services:
        began = time.perf_counter()
        result = run_tick(services, run_id=f"bench-{uuid.uuid4()}")
        seconds = round(time.perf_counter() - began, 3)
    if result.results:
        raise AssertionError(f"{len(result.results)} workspaces were due")
    return seconds


def poisons() -> Measured:
    """What one tenant's trouble costs the others."""
    with fleet.running(poison.FLEET_SIZE, name="sync-poison") as saas:
        found = poison.measure(saas, rounds=ROUNDS)
    told(f"poison: {found['ratios']}")
    worst = max(found["ratios"], key=found["ratios"].__getitem__)
    how = (
        f"the others' p95 (run start to workspace done) beside a tenant of {poison.POISONED} workspaces with 429s, "
        f"dead grants or 410 storms / in the calm run, {poison.FLEET_SIZE} workspaces, "
        f"{poison.LATENCY_SECONDS * 1000:.0f} ms, medians of {ROUNDS} alternating runs; worst: {worst}"
    )
    return Measured([at_most("poison_p95_ratio", found["ratios"][worst], 1.2, how)], found)


def virtual() -> Measured:
    """Calls a day and freshness on the virtual clock."""
    figures, raw = virtual_fleet.figures()
    return Measured([Figure(**figure) for figure in figures], raw)


def chaos(trials: int = CHAOS_TRIALS) -> Measured:
    """Killed, frozen and cut-off workers."""
    subprocess.run(
        [sys.executable, "-m", "tests.sync_pipeline.chaos", "--trials", str(trials)], cwd=CHECKOUT, check=False
    )
    found = json.loads(CHAOS_RESULTS.read_text())
    return Measured([Figure(**figure) for figure in found.pop("figures")], found)


PARTS: Mapping[str, Callable[[], Measured]] = {
    "pool": pool,
    "dagster": dagster,
    "idle": idle,
    "poison": poisons,
    "virtual": virtual,
    "chaos": chaos,
}


def own_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def told(line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)


def write(part: str, measured: Measured, seconds: float, *, results: Path = RESULTS) -> list[dict[str, Any]]:
    """Put a part's figures into the file; return all figures that are in it."""
    known: dict[str, Any] = {"figures": [], "parts": {}}
    with contextlib.suppress(FileNotFoundError):
        known = json.loads(results.read_text())
    old = set(known["parts"].get(part, {}).get("figures", ())) | {figure.name for figure in measured.figures}
    kept = [figure for figure in known["figures"] if figure["name"] not in old]
    known["figures"] = [*kept, *(asdict(figure) for figure in measured.figures)]
    known["parts"][part] = {
        "figures": [figure.name for figure in measured.figures],
        "measured_at": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "seconds": round(seconds, 1),
        "raw": measured.raw,
    }
    known["machine"] = {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()}
    results.parent.mkdir(parents=True, exist_ok=True)
    unfinished = results.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(known, indent=2) + "\n")
    unfinished.replace(results)
    figures: list[dict[str, Any]] = known["figures"]
    return figures


def show(figures: Sequence[Mapping[str, Any]], *, title: str) -> None:
    table = Table("figure", "measured", "target", "", "how", title=title)
    for one in figures:
        verdict = "" if one["target"] is None else "[green]ok[/]" if one["ok"] else "[bold red]MISS[/]"
        table.add_row(one["name"], f"{one['value']:,g}", one["target"] or "", verdict, one["how"])
    Console().print(table)


def measure(
    parts: Mapping[str, Callable[[], Measured]], only: Sequence[str], *, results: Path = RESULTS, title: str
) -> int:
    """Measure the parts asked for, into `results` and a table; 1 when a figure misses its target or a part failed."""
    if list(only) == list(parts):
        results.unlink(missing_ok=True)
    figures: list[dict[str, Any]] = []
    failed = []
    for part in only:
        began = time.perf_counter()
        try:
            measured = parts[part]()
        except Exception:  # noqa: BLE001  # its figures are absent; the others are still worth having
            console.print_exception()
            failed.append(part)
            continue
        figures = write(part, measured, time.perf_counter() - began, results=results)
        told(f"{part}: {time.perf_counter() - began:.0f} s")
    show(figures, title=title)
    if failed:
        console.print(f"[bold red]not measured: {', '.join(failed)}[/]")
    return 0 if not failed and all(figure["ok"] for figure in figures) else 1


def _rounded(value: float) -> float:
    return round(value, 3)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the parts asked for; 1 when a figure misses its target or a part failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.sync", description="Measure the calendar sync.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    options = parser.parse_args(arguments)
    logging.getLogger("sync_pipeline").setLevel(logging.CRITICAL)  # the poisons are on purpose
    return measure(PARTS, options.only, title="Calendar sync")


if __name__ == "__main__":
    sys.exit(main())
