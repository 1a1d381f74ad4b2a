"""The figures of the scaling thresholds: `python -m bench.scaling [--only rules …]`.

Belongs here: the parts, the figures with their targets, var/bench/scaling.json and the table. Does not: the chaos
trials (`tests.scaling.chaos`).

A figure that could not be measured is absent. With `--only` the figures of the other parts stay as they were measured
last. The server is disposable (no fsync).
"""

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import psycopg

from bench.sync import Figure, Measured, at_least, at_most, below, console, show, told, write
from devstack import postgres, saas
from devstack.processes import CHECKOUT, VAR, Supervisor
from scaling import episodes, migrate
from scaling.capabilities import Capability, Mode
from scaling.episodes import Watch
from scaling.samples import Sample
from scaling.thresholds import Compare, Fired, Rule, replay

RESULTS = Path("var/bench/scaling.json")
CHAOS_RESULTS = Path("var/bench/scaling_chaos.json")
RULES, SHARDS, EPISODES = 1_000, 100, 10_000
ROUNDS = 3
CHAOS_TRIALS = 500
START = datetime(2026, 9, 1, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
FLAT_SERIES, FLAT_SAMPLES, FLAT_LEVEL, FLAT_NOISE = 200, 60, 0.8, 0.06
TRENDS = 300


@contextmanager
def database() -> Iterator[str]:
    """A server of its own with a migrated database; its DSN as superuser."""
    directory = VAR / "bench" / "scaling"
    shutil.rmtree(directory, ignore_errors=True)
    with Supervisor(directory) as supervisor:
        server = postgres.start(supervisor, disposable=True)
        dsn = server.create_database("scaling")
        saas.create(server, "scaling")
        migrate.upgrade(saas.pipeline_dsn(server, "scaling"))
        yield dsn
    shutil.rmtree(directory, ignore_errors=True)


def rules() -> Measured:
    """Every state gets one new sample, and all are judged."""
    watches = [
        Watch(Rule(f"rule-{n:04}", f"metric-{n:04}", Compare.ABOVE, 10, 6 * HOUR, breaches=2, of=3, recovery=5))
        for n in range(RULES)
    ]
    seconds = []
    with database() as dsn:
        for number in range(ROUNDS + 1):
            at = START + number * HOUR
            with psycopg.connect(dsn, autocommit=True) as admin:
                admin.execute(
                    "INSERT INTO scaling.samples (metric, dims, at, status, value)"
                    " SELECT 'metric-' || lpad(m::text, 4, '0'), 'shard=' || s, %s, 'ok', 1"
                    " FROM generate_series(0, %s - 1) m, generate_series(1, %s) s",
                    [at, RULES, SHARDS],
                )
                admin.execute("VACUUM ANALYZE scaling.samples, scaling.rule_states")
            with psycopg.connect(dsn) as connection:
                began = time.perf_counter()
                episodes.evaluate(connection, watches, at)
                connection.commit()
                seconds.append(time.perf_counter() - began)
                told(f"rules {number}/{ROUNDS}: {seconds[-1]:.2f} s")
            [(judged,)] = counted(
                dsn, "SELECT count(*) FROM scaling.rule_states WHERE (state->>'last_at')::timestamptz = %s", at
            )
            if judged != RULES * SHARDS:
                raise AssertionError(f"only {judged} states were judged")
    how = f"{RULES:,} rules x {SHARDS} shards, one new sample each, SQL and commit included, median of {ROUNDS}"
    return Measured([below("rules_eval_s", statistics.median(seconds[1:]), 5, how)], {"seconds": seconds})


def counted(dsn: str, statement: str, *arguments: object) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn) as connection:
        return connection.execute(statement.encode(), arguments).fetchall()


def sensor() -> Measured:
    """What one tick of every capability's sensor asks for, with many episodes on record."""
    seconds = []
    with database() as dsn:
        with psycopg.connect(dsn, autocommit=True) as admin:
            admin.execute(
                "INSERT INTO scaling.episodes (rule, dims, episode_no, rule_version, capability, state, value,"
                " threshold, fired_at, approved_by, approved_at)"
                " SELECT 'rule', 'shard=' || i, 1, 'v', (%s::text[])[1 + i %% %s],"
                " CASE WHEN i %% 100 = 0 THEN 'approved'"
                " WHEN i %% 100 = 1 THEN 'proposed' ELSE 'acted' END, 2, 1, clock_timestamp(),"
                " CASE WHEN i %% 100 <> 1 THEN 'auto' END, CASE WHEN i %% 100 <> 1 THEN clock_timestamp() END"
                " FROM generate_series(1, %s) i",
                [[each.value for each in Capability], len(Capability), EPISODES],
            )
        requested = 0
        for _ in range(ROUNDS):
            with psycopg.connect(dsn) as connection:
                began = time.perf_counter()
                episodes.reap(connection)
                wanted = [
                    episodes.run_key(episode)
                    for each in Capability
                    for episode in episodes.actionable(connection, each, mode=Mode.AUTO)
                ]
                connection.commit()
                seconds.append(time.perf_counter() - began)
                requested = len(wanted)
        if requested != EPISODES // 50:
            raise AssertionError(f"{requested} runs would be requested")
    how = (
        f"reap, and what {len(Capability)} sensors in AUTO request ({requested} runs), {EPISODES:,} episodes on record;"
        f" the slowest of {ROUNDS}, without Dagster's own part"
    )
    return Measured([below("sensor_tick_s", max(seconds), 1, how)], {"seconds": seconds})


def chaos() -> Measured:
    """Killed and frozen daemons."""
    subprocess.run(
        [sys.executable, "-m", "tests.scaling.chaos", "--trials", str(CHAOS_TRIALS)], cwd=CHECKOUT, check=False
    )
    found = json.loads(CHAOS_RESULTS.read_text())
    return Measured([Figure(**figure) for figure in found.pop("figures")], found)


def false_fires() -> Measured:
    """Flat noisy series through the rules of the catalogue."""
    catalogue: Any = import_module("scaling.catalogue")
    rng = random.Random(1)
    fired: dict[str, int] = {}
    for metric in catalogue.CATALOGUE:
        rule: Rule | None = metric.rule
        if rule is None or rule.threshold <= 0:
            continue  # no level lies between nothing and such a threshold
        over = rule.compare in (Compare.ABOVE, Compare.AT_LEAST)
        level = rule.threshold * (FLAT_LEVEL if over else 1 / FLAT_LEVEL)
        fired[rule.name] = sum(
            any(
                isinstance(event, Fired)
                for _, _, events in replay(
                    rule,
                    [
                        Sample(rule.metric, START + n * metric.every, max(0.0, rng.gauss(level, FLAT_NOISE * level)))
                        for n in range(FLAT_SAMPLES)
                    ],
                )
                for event in events
            )
            for _ in range(FLAT_SERIES)
        )
    rate = sum(fired.values()) / (FLAT_SERIES * len(fired))
    how = (
        f"share of series that fire at all: {FLAT_SERIES} each of {len(fired)} rules with a threshold above 0, "
        f"{FLAT_SAMPLES} samples, Gaussian noise of {FLAT_NOISE:.0%} about {FLAT_LEVEL:.0%} of the threshold (a rule "
        f"on what is too low: the threshold / {FLAT_LEVEL})"
    )
    return Measured([at_most("false_fire_rate", rate, 0.01, how)], {"fired": fired})


def eta() -> Measured:
    """Lines with noise, and when they really cross."""
    forecasts: Any = import_module("scaling.forecast")
    rng = random.Random(1)
    covered = told_at_all = 0
    for seed in range(TRENDS):
        days, until, noise = rng.randint(21, 60), rng.uniform(5, 60), rng.uniform(0.01, 0.05)
        slope = rng.uniform(0.5, 3.0)
        now = START + (days - 1) * DAY
        line = [
            Sample("synthetic", START + n * DAY, max(0.0, (100 + slope * n) * (1 + rng.gauss(0, noise))))
            for n in range(days)
        ]
        crossing = now + until * DAY
        found = forecasts.forecast(line, 100 + slope * (days - 1 + until), Compare.ABOVE, now, seed=seed)
        told_at_all += found.trend
        covered += bool(
            found.trend
            and (found.p10 is not None and found.p10 <= crossing)
            and (found.p90 is None or crossing <= found.p90)
        )
    how = (
        f"{TRENDS} lines of 21 to 60 days, 0.5 to 3 % a day, noise of 1 to 5 %, that cross in 5 to 60 days: share whose"
        f" p10-p90 band holds the true crossing; the {TRENDS - told_at_all} in which no trend is seen count as missed"
    )
    return Measured([at_least("eta_coverage", covered / TRENDS, 0.8, how)], {"with_trend": told_at_all})


PARTS: Mapping[str, Callable[[], Measured]] = {
    "rules": rules,
    "sensor": sensor,
    "chaos": chaos,
    "false_fires": false_fires,
    "eta": eta,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the parts asked for; 1 when a figure misses its target or a part failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description="Measure the scaling thresholds.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    options = parser.parse_args(arguments)
    if list(options.only) == list(PARTS):
        RESULTS.unlink(missing_ok=True)
    figures: list[dict[str, Any]] = []
    failed = []
    for part in options.only:
        began = time.perf_counter()
        try:
            measured = PARTS[part]()
        except Exception:  # noqa: BLE001  # its figures are absent; the others are still worth having
            console.print_exception()
            failed.append(part)
            continue
        figures = write(part, measured, time.perf_counter() - began, results=RESULTS)
        told(f"{part}: {time.perf_counter() - began:.0f} s")
    show(figures, title="Scaling thresholds")
    if failed:
        console.print(f"[bold red]not measured: {', '.join(failed)}[/]")
    return 0 if not failed and all(figure["ok"] for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
