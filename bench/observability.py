"""The figures of what watches the pipelines: `python -m bench.observability [--only exporter …]`.

Belongs here: the parts, the figures with their targets, var/bench/observability.json and the table. Does not: the fleet
on record (`tests.scaling.exported_fleet`).

A figure that could not be measured is absent. With `--only` the figures of the other parts stay as they were measured
last. The server is disposable (no fsync).
"""

import argparse
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psycopg
from prometheus_client import generate_latest

from bench.sync import Measured, below, measure, told
from devstack import postgres, saas
from devstack.processes import VAR, Supervisor
from scaling import exporter, migrate
from scaling.databases import DatabaseRouter, Shard
from scaling.settings import ExporterSettings
from tests.scaling import exported_fleet

RESULTS = Path("var/bench/observability.json")
WORKSPACES = 10_000
DAYS = 30
TICKS_A_DAY = 20_000
RUNS = 5_000
SCRAPES = 20

# Copies of what an instance wrote: a day of ticks, a week of runs.
MORE_OF_DAGSTER = f"""
INSERT INTO job_ticks (job_origin_id, selector_id, status, type, timestamp, tick_body)
SELECT k.job_origin_id, k.selector_id, k.status, k.type, k.timestamp - n * interval '17 seconds', k.tick_body
FROM job_ticks k, generate_series(1, {TICKS_A_DAY} / (SELECT count(*) FROM job_ticks)) n;
INSERT INTO runs (run_id, snapshot_id, pipeline_name, status, run_body, create_timestamp, update_timestamp, start_time,
                  end_time)
SELECT gen_random_uuid(), r.snapshot_id, r.pipeline_name, r.status, r.run_body,
    r.create_timestamp - n * interval '2 minutes', r.update_timestamp - n * interval '2 minutes',
    r.start_time - n * 120, r.end_time - n * 120
FROM (SELECT * FROM runs WHERE status = 'SUCCESS' LIMIT 1) r, generate_series(1, {RUNS}) n;
INSERT INTO run_tags (run_id, key, value)
SELECT run_id, '.dagster/repository', '__repository__@sync_pipeline' FROM runs r
WHERE NOT EXISTS (SELECT FROM run_tags t WHERE t.run_id = r.run_id);
"""


def exporting() -> Measured:
    """One scrape with a large fleet on record, every tenant with one workspace."""
    directory = VAR / "bench" / "observability"
    shutil.rmtree(directory, ignore_errors=True)
    milliseconds: list[float] = []
    parts: dict[str, float] = {}
    with Supervisor(directory / "servers") as supervisor:
        server = postgres.start(supervisor, disposable=True)
        admin_dsn = server.create_database("saas")
        saas.create(server, "saas")
        dsn = saas.pipeline_dsn(server, "saas")
        migrate.upgrade(dsn)
        exported_fleet.seed(admin_dsn, workspaces=WORKSPACES, tenants=WORKSPACES, days=DAYS)
        (directory / "dagster").mkdir(parents=True)
        with exported_fleet.dagster_storage(server, directory / "dagster") as (instance, storage):
            exported_fleet.dagster_history(instance)
            with psycopg.connect(server.dsn(storage.dagster_pg_db), autocommit=True) as admin:
                for statement in MORE_OF_DAGSTER.split(";\n"):
                    if statement.strip():
                        admin.execute(statement.encode())
                admin.execute("VACUUM ANALYZE")
            dagster = exporter.storage(storage)
            with DatabaseRouter(Shard("main", dsn, pool_size=exporter.CONNECTIONS)) as router:
                made = exporter.registry(router, dagster, ExporterSettings())
                for number in range(SCRAPES + 1):
                    began = time.perf_counter()
                    text = generate_latest(made).decode()
                    if number:
                        milliseconds.append((time.perf_counter() - began) * 1000)
                    told(f"scrape {number}/{SCRAPES}: {(time.perf_counter() - began) * 1000:.0f} ms")
            if dagster is not None:
                dagster.close()
    for line in text.splitlines():
        if line.startswith("pipeline_scrape_part_ok{") and not line.endswith(" 1.0"):
            raise AssertionError(f"a part could not be read: {line}")
        if line.startswith("pipeline_scrape_part_seconds{"):
            name, seconds = line.removeprefix('pipeline_scrape_part_seconds{part="').split('"} ')
            parts[name] = round(float(seconds) * 1000, 1)
    shutil.rmtree(directory, ignore_errors=True)
    series = sum(not line.startswith("#") for line in text.splitlines())
    how = (
        f"{WORKSPACES:,} workspaces of as many tenants, {DAYS} days of their calls, {TICKS_A_DAY:,} ticks and"
        f" {RUNS:,} runs of Dagster on record, {os.cpu_count()} cores shared with Postgres"
    )
    return Measured(
        [
            below(
                "scrape_ms",
                statistics.median(milliseconds),
                500,
                f"{how}; median of {SCRAPES} scrapes, the slowest {max(milliseconds):.0f} ms",
            ),
            below("series", series, 2_000, "of that scrape; none has a tenant, workspace, calendar or run as a label"),
        ],
        {"milliseconds": milliseconds, "milliseconds_by_part": parts},
    )


PARTS: Mapping[str, Callable[[], Measured]] = {
    "exporter": exporting,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the parts asked for; 1 when a figure misses its target or a part failed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.observability", description="Measure what watches the pipelines."
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    options = parser.parse_args(arguments)
    return measure(PARTS, options.only, results=RESULTS, title="Observability")


if __name__ == "__main__":
    sys.exit(main())
