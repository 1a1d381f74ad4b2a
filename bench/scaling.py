"""The figures of the scaling thresholds: `python -m bench.scaling [--only rules …]`.

Belongs here: the parts, the figures with their targets, var/bench/scaling.json and the table. Does not: the chaos
trials (`tests.scaling.chaos`).

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

import psycopg

from bench.sync import Figure, Measured, below, measure, told
from devstack import postgres, saas
from devstack.processes import CHECKOUT, VAR, Supervisor
from scaling import episodes, migrate
from scaling.capabilities import Capability, Mode
from scaling.episodes import Watch
from scaling.thresholds import Compare, Rule

RESULTS = Path("var/bench/scaling.json")
CHAOS_RESULTS = Path("var/bench/scaling_chaos.json")
RULES, SHARDS, EPISODES = 1_000, 100, 10_000
ROUNDS = 3
CHAOS_TRIALS = 500
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


PARTS: Mapping[str, Callable[[], Measured]] = {
    "rules": rules,
    "sensor": sensor,
    "chaos": chaos,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the parts asked for; 1 when a figure misses its target or a part failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description="Measure the scaling thresholds.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    options = parser.parse_args(arguments)
    return measure(PARTS, options.only, results=RESULTS, title="Scaling thresholds")


if __name__ == "__main__":
    sys.exit(main())
