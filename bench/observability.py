"""The figures of what watches the pipelines: `python -m bench.observability [--only exporter tracing report]`.

Belongs here: the parts, the figures with their targets, var/bench/observability.json and the table. Does not: the fleet
on record (`tests.scaling.exported_fleet`, `tests.scaling.seeded`), the fleet that ticks (fleet).

A figure that could not be measured is absent. With `--only` the figures of the other parts stay as they were measured
last. The server is disposable (no fsync).
"""

import argparse
import logging
import os
import shutil
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx
import psycopg
from prometheus_client import generate_latest

from bench import fleet
from bench.fleet import Fleet
from bench.sync import LATENCY_SECONDS, Figure, Measured, at_most, below, measure, told
from devstack import postgres, saas
from devstack.otlp import collector
from devstack.processes import CHECKOUT, VAR, Supervisor
from scaling import exporter, migrate, tracing
from scaling.databases import DatabaseRouter, Shard
from scaling.settings import ExporterSettings
from sync_pipeline.tick import run_tick
from tests.scaling import exported_fleet, seeded

RESULTS = Path("var/bench/observability.json")
WORKSPACES = 10_000
DAYS = 30
TICKS_A_DAY = 20_000
RUNS = 5_000
SCRAPES = 20
REPORT_WORKSPACES, REPORT_DAYS, REPORTS = 1_000, 90, 5
TICKED = 1_000
PAIRS, PAIRS_DEAD = 7, 15
"""A pair's ratio is off by some percent on a shared machine, and a dead collector may cost one."""
CHANGED = 0.05
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"

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


@dataclass(frozen=True, slots=True)
class Spent:
    """What one tick took, from before tracing is switched on until it has ended and everything is sent or given up."""

    seconds: float
    cpu_seconds: float


@contextmanager
def beside() -> Iterator[str]:
    """A collector in a process of its own; its endpoint."""
    with subprocess.Popen([sys.executable, "-m", "devstack.otlp"], cwd=CHECKOUT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().decode().strip()
        finally:
            process.kill()


def arrived(address: str) -> int:
    """How many spans a collector got."""
    page = httpx.get(f"{address}/counts", timeout=60, trust_env=False).raise_for_status().text
    return sum(int(line.split()[0].replace(",", "")) for line in page.splitlines())


@contextmanager
def endpoint(address: str | None) -> Iterator[None]:
    os.environ.pop(ENDPOINT, None)
    if address:
        os.environ[ENDPOINT] = address
    try:
        yield
    finally:
        os.environ.pop(ENDPOINT, None)


def tick(saas: Fleet, address: str | None, *, seed: int) -> Spent:
    """One tick as a run has it, traced to that address or not at all."""
    saas.make_due()
    changed = saas.change(CHANGED, seed=seed)
    run_id = f"bench-{uuid.uuid4()}"
    with endpoint(address), saas.services():
        pass  # imports and compiled statements are no tick's
    with endpoint(address):
        began, cpu = time.perf_counter(), time.process_time()
        on = tracing.start("bench")
        with tracing.run(run_id, "run"), tracing.span("step"), saas.services() as services:
            result = run_tick(services, run_id=run_id)
        spent = Spent(time.perf_counter() - began, time.process_time() - cpu)
        tracing.stop()
    if on != bool(address) or (len(result.results), result.tally.events_upserted, len(result.failed)) != (
        len(saas.members),
        changed,
        0,
    ):
        raise AssertionError(f"the tick did not do its work: {result.numbers()}")
    return spent


def pairs(saas: Fleet, address: str, name: str, count: int = PAIRS) -> list[dict[str, float]]:
    """Ticks with and without, one after the other; which is first alternates."""
    rounds = []
    for number in range(count + 1):
        order = (address, None) if number % 2 else (None, address)
        spent = {each: tick(saas, each, seed=number) for each in order}
        plain, traced = spent[None], spent[address]
        rounds.append(
            {
                "plain_seconds": round(plain.seconds, 3),
                "traced_seconds": round(traced.seconds, 3),
                "ratio": traced.seconds / plain.seconds,
                "plain_cpu_seconds": round(plain.cpu_seconds, 3),
                "traced_cpu_seconds": round(traced.cpu_seconds, 3),
                "cpu_ratio": traced.cpu_seconds / plain.cpu_seconds,
            }
        )
        told(f"{name} {number}/{count}: {rounds[-1]}")
    return rounds[1:]  # the first warms up


def overhead(rounds: Sequence[Mapping[str, float]], ratio: str = "ratio") -> float:
    return statistics.median(one[ratio] for one in rounds) - 1


def traced() -> Measured:
    """Ticks over 1,000 workspaces at 100 ms, traced to a collector that is well, dead, and one that hangs."""
    with fleet.running(TICKED, name="observability") as saas:
        saas.prove_idle()
        saas.google.add_fault("latency", seconds=LATENCY_SECONDS)
        with beside() as well:
            healthy = pairs(saas, well, "well")
            spans = arrived(well) // (PAIRS + 1)
        with collector() as gone:
            pass
        dead = pairs(saas, gone.endpoint, "dead", PAIRS_DEAD)
        with collector("hangs") as hung:
            hangs = pairs(saas, hung.endpoint, "hangs")
    what = f"{TICKED:,} workspaces, {LATENCY_SECONDS * 1000:.0f} ms, {CHANGED:.0%} changed"
    how = f"{what}; wall time of a traced tick / an untraced one - 1, median of alternating pairs"
    return Measured(
        [
            at_most(
                "tracing_overhead",
                overhead(healthy),
                0.03,
                f"{how}, {PAIRS} of them; {spans:,} spans a tick, end of the run included; of CPU"
                f" {overhead(healthy, 'cpu_ratio'):+.1%}",
            ),
            below(
                "tracing_dead_collector",
                overhead(dead),
                0.01,
                f"{how}, {PAIRS_DEAD} of them; nobody listens at the endpoint; of CPU"
                f" {overhead(dead, 'cpu_ratio'):+.1%}",
            ),
            Figure(
                "tracing_hanging_collector",
                round(overhead(hangs), 3),
                None,
                True,
                f"{how}, {PAIRS} of them; the collector accepts and never answers",
            ),
        ],
        {"spans_a_tick": spans, "well": healthy, "dead": dead, "hangs": hangs},
    )


def report() -> Measured:
    """The page, by its command, from process start to exit."""
    directory = VAR / "bench" / "report"
    shutil.rmtree(directory, ignore_errors=True)
    seconds, cpu = [], []
    with Supervisor(directory) as supervisor:
        server = postgres.start(supervisor, disposable=True)
        dsn = server.create_database("report")
        saas.create(server, "report")
        pipeline = saas.pipeline_dsn(server, "report")
        migrate.upgrade(pipeline)
        seeded.everything(dsn, datetime.now(UTC), workspaces=REPORT_WORKSPACES, days=REPORT_DAYS)
        with psycopg.connect(dsn, autocommit=True) as admin:
            admin.execute("VACUUM ANALYZE")
        page = directory / "page.html"
        for number in range(REPORTS):
            used = os.times().children_user + os.times().children_system
            began = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "scaling", "report", "--out", str(page)],
                cwd=CHECKOUT,
                env={**os.environ, "DATABASE_URL": pipeline},
                stdout=subprocess.DEVNULL,
                check=True,
            )
            seconds.append(time.perf_counter() - began)
            busy = os.times()
            cpu.append(busy.children_user + busy.children_system - used)
            told(f"report {number + 1}/{REPORTS}: {seconds[-1]:.2f} s")
        size = page.stat().st_size
    shutil.rmtree(directory, ignore_errors=True)
    how = f"python -m scaling report, {REPORT_DAYS} days of {REPORT_WORKSPACES:,} workspaces"
    return Measured(
        [
            below("report_mb", size / 1e6, 3, f"{how}; one file, pictures and all"),
            below(
                "report_s",
                statistics.median(seconds),
                5,
                f"{how}, process start to exit, median of {REPORTS}; {statistics.median(cpu):.1f} s of CPU",
            ),
        ],
        {"seconds": seconds, "cpu_seconds": cpu, "bytes": size},
    )


PARTS: Mapping[str, Callable[[], Measured]] = {
    "exporter": exporting,
    "tracing": traced,
    "report": report,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the parts asked for; 1 when a figure misses its target or a part failed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.observability", description="Measure what watches the pipelines."
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    options = parser.parse_args(arguments)
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # the dead collectors are on purpose
    return measure(PARTS, options.only, results=RESULTS, title="Observability")


if __name__ == "__main__":
    sys.exit(main())
