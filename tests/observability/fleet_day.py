"""A day of a fleet that is made up, read by the real exporter every two minutes, as history for a real Prometheus.

Belongs here: what happens that day, in the tables; the exporter's answers as the history of a Prometheus.
Does not: a fleet on record (`tests.scaling.exported_fleet`), or drawing (`observability.preview`).

The database's clock is moved by hand, so an age is what it would have been. The day: few changes at night, most at 10
and at 15 h. A month that failed verification is archived at 3 h. From 10 to 10:30 h Google refuses calls, and some
calendars become overdue. At 13 h a calendar's breaker opens, a run is killed, and the sensor of archive failures fails
until 16 h. In the afternoon the pool of connections and the slowest route cross their thresholds.
"""

import json
import math
import os
import random
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TextIO
from uuid import UUID

import dagster as dg
import psycopg
from dagster._core.scheduler.instigation import InstigatorType, TickStatus
from dagster._daemon.types import DaemonHeartbeat
from prometheus_client import CollectorRegistry
from psycopg.rows import TupleRow

from devstack import prometheus, servers
from devstack.processes import Supervisor
from devstack.servers import Database
from scaling import episodes, exported_dagster, exporter, samples
from scaling.capabilities import modes
from scaling.catalogue import catalogue
from scaling.databases import DatabaseRouter, Shard
from scaling.samples import Sample, Status
from scaling.settings import (
    ArchiveSourceSettings,
    CapabilitySettings,
    ExporterSettings,
    SyncScheduleSettings,
)
from tests.scaling import exported_fleet
from tests.sync_pipeline import virtual_clock

STEP = 120
WORKSPACES, TENANTS = 400, 60
AGES = exported_fleet.AGES[:-1]
Connection = psycopg.Connection[TupleRow]
SENSORS = (
    ("sync_pipeline", "workspaces_sensor", InstigatorType.SENSOR, 4),
    ("archive_pipeline", "audit_log_failure_sensor", InstigatorType.SENSOR, 4),
    ("sync_pipeline", "calendar_sync_schedule", InstigatorType.SCHEDULE, 1),
    ("scaling", "scaling_metrics_schedule", InstigatorType.SCHEDULE, 0),
)
"""Location, name, kind, ticks a step; 0: one an hour."""

OF_MIDNIGHT = """
DELETE FROM sync.runs;
DELETE FROM sync.api_calls WHERE day >= now()::date;
UPDATE sync.api_calls SET calls = CASE WHEN outcome <> '200' THEN 1 + 40 * (extract(day FROM day)::int % 9 = 0)::int
    ELSE (CASE method WHEN 'events.list' THEN 560 ELSE 55 END * CASE WHEN extract(isodow FROM day) > 5 THEN 0.35
        ELSE 0.9 + extract(day FROM day)::int % 5 / 20.0 END)::int END;
DELETE FROM sync.freshness;
DELETE FROM sync.webhook_messages;
DELETE FROM sync.call_days;
UPDATE sync.calendar_state SET breaker_until = NULL;
UPDATE archive.months SET rows = 1400000 + 100000 * extract(month FROM month)::int,
    bytes = 48000000 + 3100000 * extract(month FROM month)::bigint, late_rows = late_rows * 40,
    source_rows = rows + CASE WHEN source_rows > rows THEN 7 ELSE 0 END WHERE rows IS NOT NULL;
UPDATE archive.audits SET findings = 0;
UPDATE archive.months SET source_rows = rows + CASE WHEN source_rows = 1007 THEN 320 ELSE 0 END;
INSERT INTO archive.uploads (key, source_table, shard, month, epoch, sha256, bytes, recorded_at)
SELECT 'part-' || n, source_table, shard, month, 1, 'sha', 1, now() - interval '1 day'
FROM archive.months, generate_series(1, 3) n WHERE state = 'failed';
INSERT INTO sync.call_days (day, calls) VALUES ((now() AT TIME ZONE 'America/Los_Angeles')::date, 118000);
INSERT INTO sync.quarantine (tenant_id, workspace_id, calendar_id, fingerprint, reason, raw, generation)
SELECT tenant_id, workspace_id, calendar_id, '\\x01', 'no start', '{}', 1 FROM sync.calendar_state ORDER BY 2 LIMIT 3;
ALTER TABLE public.audit_logs RENAME TO audit_logs_before;
CREATE TABLE public.audit_logs (id uuid, created_at timestamptz NOT NULL) PARTITION BY RANGE (created_at)
"""
OF_A_STEP = """
INSERT INTO sync.api_calls (tenant_id, day, method, outcome, calls)
SELECT id, now()::date, method, outcome, n FROM (
    SELECT t.id, method, outcome, floor(w.calls * 2.0 * random() / %(tenants)s + random())::bigint AS n
    FROM public.tenants t, unnest(%(methods)s::text[], %(outcomes)s::text[], %(calls)s::float8[])
        AS w (method, outcome, calls)) d
WHERE n > 0
ON CONFLICT (tenant_id, day, method, outcome) DO UPDATE SET calls = sync.api_calls.calls + excluded.calls;
INSERT INTO sync.call_days (day, calls) VALUES ((now() AT TIME ZONE 'America/Los_Angeles')::date, %(sent)s)
ON CONFLICT (day) DO UPDATE SET calls = sync.call_days.calls + excluded.calls;
INSERT INTO sync.freshness (day, le_seconds, changes)
SELECT now()::date, bound, floor(changes + random())::bigint
FROM unnest(%(bounds)s::int[], %(ages)s::float8[]) AS a (bound, changes)
ON CONFLICT (day, le_seconds) DO UPDATE SET changes = sync.freshness.changes + excluded.changes;
INSERT INTO sync.webhook_messages (day, outcome, messages)
SELECT now()::date, outcome, floor(messages + random())::bigint
FROM unnest(%(heard)s::text[], %(messages)s::float8[]) AS m (outcome, messages)
ON CONFLICT (day, outcome) DO UPDATE SET messages = sync.webhook_messages.messages + excluded.messages;
UPDATE sync.runs SET finished_at = now(), heartbeat_at = now(), duration_seconds = 110
WHERE finished_at IS NULL AND run_id <> 'killed';
INSERT INTO sync.runs (run_id, shard, of, started_at, heartbeat_at, workspaces_served, api_calls, events_upserted,
                       events_deleted, calendars_live, calendars_watched, waited_seconds, incremental, parallel)
VALUES (%(run)s, 0, 1, now() - interval '9 seconds', now(), 90, %(sent)s, %(changes)s, %(removed)s, %(workspaces)s,
        %(workspaces)s, %(waited)s, true, true);
UPDATE sync.calendar_state SET due_at = now() + interval '1 minute', last_finished_at = now() - interval '20 seconds',
    last_succeeded_at = CASE WHEN n.n %% 100 = 7 AND %(hour)s < 2 THEN NULL ELSE now() - interval '20 seconds' END,
    consecutive_failures = CASE WHEN n.n < %(failing)s THEN 3 ELSE 0 END,
    breaker_until = CASE WHEN n.n = 399 THEN %(breaker)s::timestamptz END,
    lease_owner = CASE WHEN (n.n * 7 + %(hour)s * 3000)::int %% 400 < %(leases)s THEN 'host:1' END,
    lease_until = now() + interval '60 seconds'
FROM (SELECT workspace_id, row_number() OVER (ORDER BY workspace_id) AS n FROM sync.calendar_state) n
WHERE n.workspace_id = sync.calendar_state.workspace_id AND (n.n NOT BETWEEN 200 AND 224 OR NOT %(refused)s);
UPDATE sync.connection_state SET
    status = CASE WHEN n.n <= %(reauth)s THEN 'reauth_required' ELSE 'active' END,
    parked_until = CASE WHEN n.n > 380 - %(parked)s AND n.n <= 380 THEN now() + interval '2 minutes' END,
    failed_visits = CASE WHEN n.n > 378 AND n.n <= 380 AND %(parked)s > 0 THEN 2 ELSE 0 END,
    lease_owner = CASE WHEN n.n = 100 THEN 'host:1' END, lease_until = now() + interval '60 seconds'
FROM (SELECT workspace_id, row_number() OVER (ORDER BY workspace_id) AS n FROM sync.connection_state) n
WHERE n.workspace_id = sync.connection_state.workspace_id;
UPDATE sync.workspace_state SET last_served_at = now() - interval '20 seconds',
    health = CASE WHEN n.n <= %(reauth)s THEN 'needs_human' WHEN n.n <= %(reauth)s + %(parked)s THEN 'degraded'
             ELSE 'healthy' END,
    health_reason = CASE WHEN n.n <= %(reauth)s THEN 'reauth_required' WHEN n.n <= %(reauth)s + %(parked)s
                    THEN 'rate_limited' END
FROM (SELECT workspace_id, row_number() OVER (ORDER BY workspace_id) AS n FROM sync.workspace_state) n
WHERE n.workspace_id = sync.workspace_state.workspace_id;
UPDATE sync.call_buckets SET tokens = %(tokens)s, refilled_at = now(), factor = CASE WHEN %(refused)s THEN 0.5
    ELSE factor END, factor_at = CASE WHEN %(refused)s THEN now() ELSE factor_at END WHERE scope = 'project'
"""
OF_THREE_O_CLOCK = """
UPDATE archive.months SET state = 'archived', error = NULL, generation = 1, rows = 2560000, row_digest = 1, parts = 1,
    bytes = 83000000, manifest_key = 'key1', manifest_sha256 = 'sha', archived_at = now(), source_rows = 2560000
WHERE state = 'failed';
UPDATE archive.months SET late_rows = late_rows + source_rows - rows, rows = source_rows WHERE source_rows > rows;
DELETE FROM archive.uploads
"""


@dataclass(frozen=True, slots=True)
class Day:
    """A day that passed.

    Attributes:
        prometheus: URL of a server that remembers it.
        dsn: of a superuser; the database's clock stands at the end of the day.
        end: its last second, since 1970.
        hours: that it has.
    """

    prometheus: str
    dsn: str
    end: int
    hours: float


def load(hour: float) -> float:
    """How busy the fleet is, about 0.15 at night and 1 at its height."""
    return 0.15 + 0.85 * math.exp(-(((hour - 10.3) / 2.4) ** 2)) + 0.7 * math.exp(-(((hour - 15.2) / 1.9) ** 2))


@contextmanager
def served(directory: Path, *, step: int = STEP) -> Iterator[Day]:
    """Let the day pass, and serve it.

    Args:
        directory: for data and logs.
        step: seconds between two scrapes.
    """
    with ExitStack() as stack:
        running = servers.join(directory / "servers", os.getpid())
        stack.callback(servers.leave, directory / "servers")
        database = stack.enter_context(running.database())
        instance, settings = stack.enter_context(exported_fleet.dagster_storage(running.postgres, directory))
        supervisor = stack.enter_context(Supervisor(directory / "prometheus"))
        history = directory / "history.txt"
        end = _pass(database, instance, running.postgres.dsn(settings.dagster_pg_db), history, step)
        subprocess.run(
            [
                *(prometheus.tool("promtool"), "tsdb", "create-blocks-from", "openmetrics"),
                *(history, supervisor.directory / "prometheus"),
            ],
            check=True,
            capture_output=True,
            timeout=300,
        )
        configuration = directory / "prometheus.yml"
        configuration.write_text("{}")
        started = prometheus.start(supervisor, configuration)
        yield Day(started.url, virtual_clock.dsn(database.admin_dsn), end, (86400 - step) / 3600)


def _pass(database: Database, instance: dg.DagsterInstance, dagster_dsn: str, history: Path, step: int) -> int:
    """Write the history; the last second of it."""
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=1)
    chance = random.Random(7)
    virtual_clock.install(database.admin_dsn, midnight)
    exported_fleet.seed(
        virtual_clock.dsn(database.admin_dsn),
        workspaces=WORKSPACES,
        tenants=TENANTS,
        days=29,
        runs=1,
        thresholds=False,
    )
    with psycopg.connect(dagster_dsn, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA sync")  # where the clock looks for what it has to bind again
    virtual_clock.install(dagster_dsn, midnight)
    with (
        psycopg.connect(virtual_clock.dsn(database.admin_dsn), autocommit=True) as admin,
        psycopg.connect(virtual_clock.dsn(dagster_dsn), autocommit=True) as of_dagster,
        DatabaseRouter(Shard("main", virtual_clock.dsn(database.dsn))) as router,
        closing(Shard("dagster", virtual_clock.dsn(dagster_dsn), pool_size=4)) as dagster,
        history.open("w") as lines,
    ):
        admin.execute("SELECT setseed(0.5)")
        of_dagster.execute("SELECT setseed(0.5)")
        _execute(admin, OF_MIDNIGHT, {})
        _partitions(admin, midnight)
        ticks = _instigators(instance, of_dagster)
        registry = exporter.registry(router, dagster, ExporterSettings())
        for seconds in range(0, 86400, step):
            at = midnight + timedelta(seconds=seconds)
            virtual_clock.set(admin, at)
            virtual_clock.set(of_dagster, at)
            _sync(admin, at, seconds / 3600, step, chance)
            _archive(admin, seconds, step)
            _thresholds(database.admin_dsn, at, seconds, step, chance)
            _dagster(of_dagster, ticks, at, seconds, step, chance)
            _scrape(registry, lines, at)
        lines.write("# EOF\n")
    return int(at.timestamp())


def _execute(connection: Connection, statements: str, values: Mapping[str, Any]) -> None:
    for statement in statements.split(";\n"):
        used = {name: value for name, value in values.items() if f"%({name})s" in statement}
        connection.execute(statement.encode(), used or None)


def _partitions(admin: Connection, midnight: datetime) -> None:
    month = midnight.replace(day=1)
    for _ in range(7):
        following = (month + timedelta(days=32)).replace(day=1)
        admin.execute(
            f"CREATE TABLE public.audit_logs_{month:%Y_%m} PARTITION OF public.audit_logs"
            f" FOR VALUES FROM ('{month.isoformat()}') TO ('{following.isoformat()}')".encode()
        )
        month = following


def _instigators(instance: dg.DagsterInstance, connection: Connection) -> Mapping[str, tuple[str, str, str]]:
    for location, name, kind, _ in SENSORS:
        exported_fleet.ticks(instance, location, name, [TickStatus.SUCCESS], kind)
    for daemon in ("SENSOR", "SCHEDULER", "QUEUED_RUN_COORDINATOR", "MONITORING", "ASSET"):
        instance.add_daemon_heartbeat(DaemonHeartbeat(0.0, daemon, "id"))
    found = connection.execute(
        "SELECT instigator_body, job_origin_id, selector_id, type FROM job_ticks JOIN instigators USING (selector_id)"
    ).fetchall()
    connection.execute("DELETE FROM job_ticks")
    return {
        exported_dagster._named(body, kind, "")[1]: (origin, selector, kind) for body, origin, selector, kind in found
    }


def _sync(admin: Connection, at: datetime, hour: float, step: int, chance: random.Random) -> None:
    busy = load(hour) * chance.uniform(0.85, 1.15)
    refused = 10 <= hour < 10.5
    listed = step * 1.1 * busy * (0.6 if refused else 1.0)
    calls = {
        ("events.list", "200"): listed,
        ("calendarList.list", "200"): listed * 0.09,
        ("oauth.refresh", "200"): listed * 0.14,
        ("events.watch", "200"): listed * 0.03,
        ("events.list", "410"): 0.25 if 13 <= hour < 16 else 0.03,
        ("events.list", "429"): listed * chance.uniform(0.15, 0.4) if refused else 0.02,
        ("events.list", "503"): 0.15,
    }
    changes = step * 0.45 * busy
    median = (
        3.5
        + 3 * busy
        + (60 * (hour - 10) / 0.5 if refused else max(0.0, 40 - 200 * (hour - 10.5)) if hour >= 10.5 else 0)
    )
    shares = [_share(bound, median) for bound in AGES]
    heard = {"accepted": changes * 1.3, "sync": listed * 0.03, "wrong_token": 0.02, "unknown_channel": 0.1}
    values = {
        "tenants": TENANTS,
        "methods": [method for method, _ in calls],
        "outcomes": [outcome for _, outcome in calls],
        "calls": list(calls.values()),
        "sent": round(sum(calls.values())),
        "bounds": list(AGES),
        "ages": [changes * (share - before) for share, before in zip(shares, [0.0, *shares], strict=False)],
        "heard": list(heard),
        "messages": list(heard.values()),
        "run": str(UUID(int=chance.getrandbits(128))),
        "changes": round(changes),
        "removed": round(changes * 0.12),
        "workspaces": WORKSPACES,
        "waited": step * (chance.uniform(0.5, 1.2) if refused else 0.01 * busy),
        "hour": hour,
        "failing": 12 if refused else 3,
        "breaker": at + timedelta(hours=1)
        if 13 <= hour < 15
        else at - timedelta(minutes=1)
        if 15 <= hour < 16
        else None,
        "leases": round(9 * busy),
        "refused": 10 <= hour < 10.8,
        "reauth": 10 if 14 <= hour < 17 else 8,
        "parked": round(25 * chance.uniform(0.7, 1)) if refused else 2,
        "tokens": -20.0 if refused else 1000.0 * (1 - 0.5 * busy * chance.uniform(0.6, 1.2)),
    }
    if int(hour * 3600) == 13 * 3600:
        admin.execute("UPDATE sync.runs SET run_id = 'killed' WHERE finished_at IS NULL")
    _execute(admin, OF_A_STEP, values)


def _share(bound: float, median: float) -> float:
    """Of changes that were younger, if ages are spread lognormally."""
    return 0.5 * (1 + math.erf(math.log(bound / median) / (0.7 * math.sqrt(2))))


def _archive(admin: Connection, seconds: int, step: int) -> None:
    if seconds // step == 3 * 3600 // step:
        _execute(admin, OF_THREE_O_CLOCK, {})
    if seconds // step == 4 * 3600 // step:
        admin.execute(
            "INSERT INTO archive.audits (source_table, shard, ended_at, deep, links, months, findings)"
            " VALUES ('public.audit_logs', 'main', now(), false, 12, 12, 0)"
        )
    if seconds // step == 11 * 3600 // step:
        admin.execute(
            "UPDATE archive.months SET erased_rows = 240, rows = rows - 240, source_rows = source_rows - 240"
            " WHERE month = (SELECT min(month) FROM archive.months)"
        )


def _thresholds(dsn: str, at: datetime, seconds: int, step: int, chance: random.Random) -> None:
    hour = seconds / 3600
    busy = load(hour)
    taken: list[Sample] = []
    if seconds % 86400 == 0:
        taken += [
            Sample("audit_logs_bytes", at, 0.71 * 2**30),
            Sample("google_tenants", at, 27.0),
            Sample("synced_events_day", at, 412.0),
            Sample("ai_tokens_month", at, 2_100_000.0),
            Sample("cache_hit_rate", at, 0.63),
            Sample("bandwidth_cost_7d", at, 1.05),
            Sample("pooler_limit", at, 200.0),
            Sample("supabase_plan", at, 0.0),
            Sample("users_total", at, 610.0),
            Sample("complex_incidents_30d", at, 1.0),
        ]
    if seconds % 3600 == 0:
        month = f"{at:%Y-%m}"
        taken += [
            Sample("google_calls_month", at, 9300 + 52 * hour, period=month),
            Sample("google_calls_gap", at, 0.02),
            Sample("sync_mean_s", at, 9 + 22 * busy),
            Sample("sync_timeouts_month", at, 1.0, period=month),
            Sample("ai_chats_month", at, 655 + 9 * hour, period=month),
            Sample("ai_cost_ratio", at, 0.21),
            Sample("concurrency_peak", at, 22 + 50 * busy * chance.uniform(0.9, 1.1)),
            Sample("pooler_connections", at, 30 + 90 * busy),
            Sample("pooler_utilization", at, 0.15 + 0.45 * busy),
            Sample("pooler_clients_waiting", at, 0.0),
            Sample("disk_used", at, 0.44 + hour / 2000),
            Sample("ai_cost_month", at, None, Status.NOT_CONFIGURED),
            Sample("source_health", at, 0.0, dims="source=postgres"),
        ]
        for route, base in (("/api/events", 240.0), ("/api/search", 420.0), ("/api/export", 560.0)):
            slow = base * (1 + 1.1 * busy * chance.uniform(0.8, 1.2))
            taken.append(Sample("api_p95_ms", at, slow, dims=f"route={route}"))
            taken.append(Sample("api_p99_ms", at, slow * 1.9, dims=f"route={route}"))
    if seconds % max(300, step) < step:
        share = 0.2 + 0.5 * busy * chance.uniform(0.9, 1.1) + (0.25 if 14.5 <= hour < 16 else 0)
        taken.append(Sample("db_conn_util", at, share, evidence={"connections": round(60 * share)}))
    if not taken:
        return
    known = catalogue(ArchiveSourceSettings(), SyncScheduleSettings())
    with psycopg.connect(dsn) as connection:
        samples.record(connection, taken)
        episodes.evaluate(connection, known.watches(modes(CapabilitySettings())), at)


def _dagster(
    connection: Connection,
    ticks: Mapping[str, tuple[str, str, str]],
    at: datetime,
    seconds: int,
    step: int,
    chance: random.Random,
) -> None:
    hour = seconds / 3600
    for _, name, _, each_step in SENSORS:
        origin, selector, kind = ticks[name]
        for number in range(each_step or int(seconds % 3600 < step)):
            status = "SUCCESS" if kind == "SCHEDULE" or chance.random() < 0.05 else "SKIPPED"
            if name == "audit_log_failure_sensor" and 13 <= hour < 16:
                status = "FAILURE"
            moment = at - timedelta(seconds=step - (number + 1) * step / max(each_step, 1) + 3)
            connection.execute(
                "INSERT INTO job_ticks (job_origin_id, selector_id, status, type, timestamp, tick_body)"
                " VALUES (%s, %s, %s, %s, %s, '{}')",
                [origin, selector, status, kind, moment.replace(tzinfo=None)],
            )
    connection.execute(
        "UPDATE daemon_heartbeats SET timestamp = (now() AT TIME ZONE 'UTC') - make_interval(secs => 30 * random())"
    )
    killed = seconds // step == 13 * 3600 // step
    _ended(
        connection,
        at,
        "sync_pipeline",
        "calendar_sync",
        100 + 12 * load(hour) * chance.uniform(0.7, 1.3),
        killed=killed,
    )
    if seconds % 3600 < step:
        _ended(connection, at, "scaling", "scaling_metrics_job", chance.uniform(6, 14))
    if seconds // step == 3 * 3600 // step:
        _ended(connection, at, "archive_pipeline", "audit_log_archive_job", 1140)
    if seconds // step in (0, 11 * 3600 // step):
        _ended(connection, at, "archive_pipeline", "audit_log_archive_job", 260)
    connection.execute("DELETE FROM runs WHERE status IN ('STARTED', 'QUEUED')")
    _put(connection, "sync_pipeline", "calendar_sync", "STARTED", at - timedelta(seconds=step / 2), None)
    if 2.7 <= hour < 3:
        _put(
            connection, "archive_pipeline", "audit_log_archive_job", "STARTED", at - timedelta(hours=hour - 2.68), None
        )
    for _ in range(int(chance.random() < 0.25 * load(hour)) + (2 if 3 <= hour < 3.2 else 0)):
        _put(connection, "archive_pipeline", "audit_log_archive_job", "QUEUED", at - timedelta(seconds=40), None)


def _ended(
    connection: Connection, at: datetime, location: str, job: str, seconds: float, *, killed: bool = False
) -> None:
    status = "FAILURE" if killed else "SUCCESS"
    run = _put(connection, location, job, status, at - timedelta(seconds=seconds), at)
    if killed:
        connection.execute(
            "INSERT INTO run_tags (run_id, key, value) VALUES (%s, 'dagster/failure_reason', 'UNEXPECTED_TERMINATION')",
            [run],
        )


def _put(connection: Connection, location: str, job: str, status: str, began: datetime, ended: datetime | None) -> str:
    row = connection.execute(
        "INSERT INTO runs (run_id, pipeline_name, mode, status, run_body, create_timestamp, update_timestamp,"
        " start_time, end_time) VALUES (gen_random_uuid()::text, %s, 'default', %s, '{}', %s, %s, %s, %s)"
        " RETURNING run_id",
        [
            job,
            status,
            began.replace(tzinfo=None),
            (ended or began).replace(tzinfo=None),
            None if status == "QUEUED" else began.timestamp(),
            ended.timestamp() if ended else None,
        ],
    ).fetchone()
    if row is None:
        raise AssertionError("an INSERT with RETURNING returns a row")
    connection.execute(
        "INSERT INTO run_tags (run_id, key, value) VALUES (%s, '.dagster/repository', %s)",
        [row[0], f"__repository__@{location}"],
    )
    return str(row[0])


def _scrape(registry: CollectorRegistry, lines: TextIO, at: datetime) -> None:
    drift = (datetime.now(UTC) - at).total_seconds()
    for family in registry.collect():
        for sample in family.samples:
            if sample.name.endswith("_created"):
                continue
            # The only figure that is an age by the exporter's clock, not by the database's.
            value = sample.value - (drift if family.name == "pipeline_scaling_sample_age_seconds" else 0.0)
            labels = ",".join(
                f"{name}={json.dumps(text)}"
                for name, text in {"job": "pipeline", "instance": "127.0.0.1:9200", **sample.labels}.items()
            )
            lines.write(f"{sample.name}{{{labels}}} {value} {at.timestamp():.0f}\n")
