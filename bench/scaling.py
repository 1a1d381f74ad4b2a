"""The figures of the scaling thresholds: `python -m bench.scaling [--only rules …]`.

Belongs here: the parts, the figures with their targets, var/bench/scaling.json and the table. Does not: the chaos
trials (`tests.scaling.chaos`), the series that forecasts are tried on (`tests.scaling.trends`).

A figure that could not be measured is absent. With `--only` the figures of the other parts stay as they were measured
last. The server is disposable (no fsync).
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psycopg

from bench.sync import Figure, Measured, at_least, at_most, below, measure, told
from devstack import postgres, saas
from devstack.processes import CHECKOUT, VAR, Supervisor
from scaling import episodes, migrate
from scaling.capabilities import Capability, Mode
from scaling.catalogue import Metric, catalogue
from scaling.episodes import Watch
from scaling.forecast import forecast
from scaling.samples import Sample
from scaling.settings import ArchiveSourceSettings, SyncScheduleSettings
from scaling.thresholds import Compare, Fired, Rule, replay
from scaling.units import Unit
from tests.scaling.trends import KINDS, NOW, trend

RESULTS = Path("var/bench/scaling.json")
CHAOS_RESULTS = Path("var/bench/scaling_chaos.json")
RULES, SHARDS, EPISODES = 1_000, 100, 10_000
ROUNDS = 3
CHAOS_TRIALS = 500
TRENDS = 200
FLAT_SERIES, FLAT_SAMPLES, FLAT_MONTHS = 200, 400, 12
FLAT_LEVEL = 0.8
FLAT_NOISE = (0.05, 0.1)
BY_MONTH = ("google_calls_month", "ai_chats_month", "ai_cost_ratio")
FEW = (Unit.RUNS, Unit.INCIDENTS, Unit.FLAG, Unit.PERIODS)
START = datetime(2026, 9, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)


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


def eta() -> Measured:
    """Forecasts of made-up series, against the dates on which their lines really cross."""
    random = np.random.default_rng(1)
    with_trend: dict[str, int] = {}
    covered: dict[str, int] = {}
    for name, kind in KINDS.items():
        trends = [trend(kind, random) for _ in range(TRENDS)]
        pairs = [
            (each, forecast(each.samples, each.threshold, Compare.ABOVE, NOW, seed=seed))
            for seed, each in enumerate(trends)
        ]
        with_trend[name] = sum(found.trend for _, found in pairs)
        covered[name] = sum(
            found.p10 is not None and found.p10 <= each.crossing and (found.p90 is None or each.crossing <= found.p90)
            for each, found in pairs
        )
        told(f"eta, {name}: {covered[name]} of {TRENDS}, {with_trend[name]} with a date")
    total = TRENDS * len(KINDS)
    worst = min(covered, key=lambda name: covered[name])
    how = (
        f"{total:,} lines of 14 to 120 days, {TRENDS} each of {', '.join(KINDS)}: share whose p10-p90 band holds the"
        f" true crossing; the {total - sum(with_trend.values())} without a date count as missed; the worst kind is"
        f" {worst}, {covered[worst] / TRENDS:.2f} ({covered[worst] / with_trend[worst]:.2f} of those with a date)"
    )
    return Measured(
        [at_least("eta_coverage", sum(covered.values()) / total, 0.8, how)],
        {
            "of_all": {name: covered[name] / TRENDS for name in KINDS},
            "of_those_with_a_date": {name: covered[name] / with_trend[name] for name in KINDS},
            "with_a_date": with_trend,
        },
    )


def false_fires() -> Measured:
    """Series without any trend through the rules of the catalogue: none of them should fire."""
    random = np.random.default_rng(1)
    judged = [
        (metric, metric.rule)
        for metric in catalogue(ArchiveSourceSettings(), SyncScheduleSettings())
        if metric.rule is not None and metric.unit not in FEW and metric.rule.threshold > 0
    ]
    rates = {}
    for noise in FLAT_NOISE:
        fired = {
            metric.name: sum(_fires(metric, rule, noise, random) for _ in range(FLAT_SERIES)) for metric, rule in judged
        }
        rates[noise] = sum(fired.values()) / (FLAT_SERIES * len(judged))
        told(f"false_fires, noise {noise:.0%}: {fired}")
    how = (
        f"share of series that fire at all: {FLAT_SERIES} each of {len(judged)} rules, {FLAT_SAMPLES} samples about"
        f" {FLAT_LEVEL:.0%} of the threshold with Gaussian noise of {FLAT_NOISE[0]:.0%} of it, half of them"
        f" autocorrelated (0.6); of a month's figure {FLAT_MONTHS} months of noisy days that close there; without the"
        f" rules on counts of a few. With noise of {FLAT_NOISE[1]:.0%}: {rates[FLAT_NOISE[1]]:.3f}"
    )
    return Measured([at_most("false_fire_rate", rates[FLAT_NOISE[0]], 0.01, how)], {"rates": rates})


def _fires(metric: Metric, rule: Rule, noise: float, random: np.random.Generator) -> bool:
    over = rule.compare in (Compare.ABOVE, Compare.AT_LEAST)
    level = rule.threshold * (FLAT_LEVEL if over else 1 / FLAT_LEVEL)
    if metric.name in BY_MONTH:
        samples = _months(metric.name, level, noise, random)
    else:
        resembles = 0.6 * random.integers(2)
        shocks = random.normal(0, noise * level * np.sqrt(1 - resembles**2), FLAT_SAMPLES)
        scatter = np.zeros(FLAT_SAMPLES)
        for n in range(FLAT_SAMPLES):
            scatter[n] = (resembles * scatter[n - 1] if n else 0.0) + shocks[n]
        samples = [
            Sample(metric.name, START + n * metric.every, max(0.0, float(level + scatter[n])))
            for n in range(FLAT_SAMPLES)
        ]
    return any(isinstance(event, Fired) for _, _, events in replay(rule, samples) for event in events)


def _months(name: str, closes_at: float, noise: float, random: np.random.Generator) -> list[Sample]:
    samples, total, period = [], 0.0, ""
    for day in range(30 * FLAT_MONTHS):
        at = START + day * timedelta(days=1)
        if f"{at:%Y-%m}" != period:
            total, period = 0.0, f"{at:%Y-%m}"
        # The noise of a month's sum is that of its days over the root of their number.
        total += max(0.0, float(random.normal(closes_at / 31, closes_at / 31 * noise * 31**0.5)))
        samples.append(Sample(name, at, total, period=period))
    return samples


PARTS: Mapping[str, Callable[[], Measured]] = {
    "rules": rules,
    "sensor": sensor,
    "chaos": chaos,
    "eta": eta,
    "false_fires": false_fires,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the parts asked for; 1 when a figure misses its target or a part failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description="Measure the scaling thresholds.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    options = parser.parse_args(arguments)
    return measure(PARTS, options.only, results=RESULTS, title="Scaling thresholds")


if __name__ == "__main__":
    sys.exit(main())
