"""A fleet on record, made inside Postgres: what the exporter's tests, dashboards and measurements read.

Belongs here: rows of every table that is exported. Does not: reading them.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import dagster as dg
import psycopg
from dagster._core.remote_origin import (
    ManagedGrpcPythonEnvCodeLocationOrigin,
    RemoteInstigatorOrigin,
    RemoteJobOrigin,
    RemoteRepositoryOrigin,
)
from dagster._core.scheduler.instigation import (
    InstigatorState,
    InstigatorStatus,
    InstigatorType,
    ScheduleInstigatorData,
    SensorInstigatorData,
    TickData,
    TickStatus,
)
from dagster._core.test_utils import create_run_for_test
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._daemon.types import DaemonHeartbeat
from dagster_shared.error import SerializableErrorInfo
from pydantic import SecretStr

from devstack.postgres import Postgres
from scaling import episodes, samples
from scaling.capabilities import modes
from scaling.catalogue import catalogue
from scaling.samples import Sample, Status
from scaling.settings import ArchiveSourceSettings, CapabilitySettings, DagsterStorageSettings, SyncScheduleSettings

AGES = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400, 2**31 - 1)
SECRET_ROUTE = "0f8fad5b-d9cb-469f-a165-70867728950e"

FLEET = """
INSERT INTO public.tenants (name, plan) SELECT 'tenant ' || n, (ARRAY['free', 'team', 'enterprise'])[1 + n %% 3]
FROM generate_series(1, %(tenants)s) n;
INSERT INTO public.workspaces (tenant_id, name)
SELECT t.id, 'workspace ' || g FROM generate_series(1, %(workspaces)s) g
JOIN (SELECT id, row_number() OVER (ORDER BY name) AS n FROM public.tenants) t ON t.n = 1 + g %% %(tenants)s;
INSERT INTO public.google_connections (tenant_id, workspace_id, google_account, refresh_token_encrypted)
SELECT tenant_id, id, 'user-' || id || '@example.com', '\\x00' FROM public.workspaces;
INSERT INTO sync.workspace_state (tenant_id, workspace_id, last_served_at, health, health_reason)
SELECT tenant_id, id, now(), CASE n %% 50 WHEN 0 THEN 'needs_human' WHEN 1 THEN 'degraded' ELSE 'healthy' END,
    CASE n %% 50 WHEN 0 THEN 'reauth_required' END
FROM (SELECT *, row_number() OVER (ORDER BY id) AS n FROM public.workspaces) w;
INSERT INTO sync.connection_state (tenant_id, workspace_id, connection_id, status, parked_until, failed_visits,
                                   lease_owner, lease_until)
SELECT tenant_id, workspace_id, id, CASE n %% 50 WHEN 0 THEN 'reauth_required' ELSE 'active' END,
    CASE n %% 50 WHEN 1 THEN now() + interval '1 hour' END, CASE n %% 50 WHEN 1 THEN 2 WHEN 2 THEN 1 ELSE 0 END,
    CASE n %% 1000 WHEN 3 THEN 'host:1' END, CASE n %% 1000 WHEN 3 THEN now() + interval '60 seconds' END
FROM (SELECT *, row_number() OVER (ORDER BY id) AS n FROM public.google_connections) c;
INSERT INTO sync.calendar_state (tenant_id, workspace_id, calendar_id, connection_id, due_at, last_started_at,
                                 last_finished_at, last_succeeded_at, last_outcome, consecutive_failures,
                                 breaker_until, lease_owner, lease_until)
SELECT tenant_id, workspace_id, google_account, id, now() + interval '1 minute', now() - interval '1 minute',
    now() - interval '1 minute', CASE WHEN n %% 100 <> 7 THEN now() - interval '1 minute' END, 'incremental',
    CASE n %% 100 WHEN 8 THEN 3 ELSE 0 END, CASE n %% 100 WHEN 9 THEN now() + interval '3 hours' END,
    CASE n %% 1000 WHEN 4 THEN 'host:1' END, CASE n %% 1000 WHEN 4 THEN now() + interval '60 seconds' END
FROM (SELECT *, row_number() OVER (ORDER BY id) AS n FROM public.google_connections) c;
INSERT INTO sync.api_calls (tenant_id, day, method, outcome, calls)
SELECT t.id, (now() AT TIME ZONE 'UTC')::date - day, method, outcome, 7
FROM public.tenants t, generate_series(0, %(days)s) day,
    (VALUES ('events.list', '200'), ('calendarList.list', '200'), ('oauth.refresh', '200'), ('events.list', '429'))
    AS done (method, outcome);
INSERT INTO sync.runs (run_id, shard, of, started_at, heartbeat_at, finished_at, workspaces_due, workspaces_served,
                       workspaces_failed, api_calls, events_upserted, events_deleted, calendars_live, waited_seconds,
                       duration_seconds, incremental, parallel)
SELECT gen_random_uuid(), 0, 1, at, CASE n WHEN 1 THEN at - interval '10 minutes' ELSE now() END,
    CASE WHEN n > 1 THEN at + interval '9 seconds' END, 100, 100, 1, 100, 50, 3, %(workspaces)s, 1.5, 9, true, true
FROM (SELECT g AS n, now() - make_interval(mins => 2 * g) AS at FROM generate_series(0, %(runs)s) g) r;
INSERT INTO sync.freshness (day, le_seconds, changes)
SELECT (now() AT TIME ZONE 'UTC')::date, unnest, 10 FROM unnest(%(ages)s::int[]);
INSERT INTO sync.webhook_messages (day, outcome, messages)
SELECT (now() AT TIME ZONE 'UTC')::date, unnest, 5 FROM unnest(ARRAY['accepted', 'wrong_token']);
INSERT INTO sync.call_days (day, calls) VALUES ((now() AT TIME ZONE 'America/Los_Angeles')::date, 250000);
INSERT INTO sync.call_buckets (scope, key, tokens, refilled_at, factor, factor_at)
VALUES ('project', '', 100, now(), 0.5, now());
INSERT INTO sync.call_buckets (scope, key, tokens, refilled_at)
SELECT 'user', sha256(id::text::bytea), 60, now() FROM public.google_connections;
INSERT INTO archive.months (source_table, shard, month, time_zone, from_at, to_at, state, epoch, owner, started_at,
                            error, generation, rows, row_digest, parts, bytes, manifest_key, manifest_sha256,
                            archived_at, source_rows, late_rows, pruned_at)
SELECT 'public.audit_logs', 'main', m, 'UTC', m, m + interval '1 month',
    CASE n WHEN 1 THEN 'failed' ELSE 'archived' END, 1, 'host:1', now(),
    CASE n WHEN 1 THEN 'month failed verification: other rows' END, CASE WHEN n > 1 THEN 1 END,
    CASE WHEN n > 1 THEN 1000 END, CASE WHEN n > 1 THEN 1 END, CASE WHEN n > 1 THEN 1 END,
    CASE WHEN n > 1 THEN 50000 END, CASE WHEN n > 1 THEN 'key' || n END, CASE WHEN n > 1 THEN 'sha' END,
    CASE WHEN n > 1 THEN now() - interval '2 days' END, CASE n WHEN 2 THEN 1007 ELSE 1000 END,
    CASE n WHEN 3 THEN 11 ELSE 0 END, CASE WHEN n > 10 THEN now() END
FROM (SELECT g AS n, (date_trunc('month', now(), 'UTC') - make_interval(months => g))::date AS m
      FROM generate_series(1, 12) g) months;
INSERT INTO archive.audits (source_table, shard, ended_at, deep, links, months, findings)
SELECT 'public.audit_logs', 'main', now() - make_interval(days => g), false, 11, 11, 4 - g FROM generate_series(1, 3) g;
"""


def seed(dsn: str, *, workspaces: int, tenants: int, days: int = 1, runs: int = 700, thresholds: bool = True) -> None:
    """Put a fleet on record.

    Args:
        dsn: of a superuser.
        workspaces: one calendar each.
        tenants: that have them, a third of each plan.
        days: of past calls.
        runs: of the sync, one every two minutes; the newest is at work, the one before it died.
        thresholds: with samples, and episodes of two that crossed.
    """
    with psycopg.connect(dsn, autocommit=True) as admin:
        values = {
            "workspaces": workspaces,
            "tenants": tenants,
            "days": days,
            "runs": runs,
            "ages": list(AGES),
        }
        for statement in FLEET.split(";\n"):
            if statement.strip():
                used = {name: value for name, value in values.items() if f"%({name})s" in statement}
                admin.execute(statement.encode(), used)
        admin.execute("VACUUM ANALYZE")
    if thresholds:
        _thresholds(dsn)


def _thresholds(dsn: str) -> None:
    """One sample of every metric, routes of an API, and two that crossed."""
    now = datetime.now(UTC)
    known = catalogue(ArchiveSourceSettings(), SyncScheduleSettings())
    taken: list[Sample] = []
    for metric in known:
        evidence = {"connections": 42} if metric.name == "db_conn_util" else {}
        figure = metric.rule.threshold / 2 if metric.rule else 3.0
        if metric.name.startswith("api_"):
            taken += [Sample(metric.name, now, 100.0 + n, dims=f"route=/api/{n}") for n in range(60)]
            taken.append(Sample(metric.name, now, 9000.0, dims=f"route=/tenants/{SECRET_ROUTE}"))
            continue
        taken.append(Sample(metric.name, now - timedelta(minutes=1), figure, evidence=evidence))
    taken.append(Sample("google_calls_month", now, 20_000.0, period=f"{now:%Y-%m}"))
    taken.append(Sample("users_total", now, None, Status.ERROR))
    with psycopg.connect(dsn) as connection:
        samples.record(connection, taken)
        episodes.evaluate(connection, known.watches(modes(CapabilitySettings())), now)


@contextmanager
def dagster_storage(server: Postgres, directory: Path) -> Iterator[tuple[dg.DagsterInstance, DagsterStorageSettings]]:
    """A Dagster instance in a database of its own, and the settings that name it."""
    name = f"dagster_{uuid4().hex[:12]}"
    server.create_database(name)
    storage = {
        "username": "postgres",
        "password": server.password,
        "hostname": "127.0.0.1",
        "port": server.port,
        "db_name": name,
        "scheme": "postgresql+psycopg2",
    }
    try:
        with dg.instance_for_test(
            overrides={"storage": {"postgres": {"postgres_db": storage}}}, temp_dir=str(directory)
        ) as instance:
            instance.optimize_for_webserver(statement_timeout=60_000, pool_recycle=3600, max_overflow=20)
            yield (
                instance,
                DagsterStorageSettings(
                    dagster_pg_host="127.0.0.1",
                    dagster_pg_port=server.port,
                    dagster_pg_user="postgres",
                    dagster_pg_password=SecretStr(server.password),
                    dagster_pg_db=name,
                ),
            )
    finally:
        server.drop_database(name)


def _repository(location: str) -> RemoteRepositoryOrigin:
    return RemoteRepositoryOrigin(
        code_location_origin=ManagedGrpcPythonEnvCodeLocationOrigin(
            loadable_target_origin=LoadableTargetOrigin(module_name=f"{location}.definitions"),
            location_name=location,
        ),
        repository_name="__repository__",
    )


def run(
    instance: dg.DagsterInstance,
    location: str,
    status: dg.DagsterRunStatus,
    *,
    seconds: float = 5.0,
    job: str = "calendar_sync",
    reason: str | None = None,
) -> str:
    """Put a run on record that has been at work, or was, for so long."""
    made = str(
        create_run_for_test(
            instance,
            job_name=job,
            status=status,
            tags={"dagster/failure_reason": reason} if reason else {},
            remote_job_origin=RemoteJobOrigin(repository_origin=_repository(location), job_name=job),
        ).run_id
    )
    now = time.time()
    ended = status.value in ("SUCCESS", "FAILURE", "CANCELED")
    with instance.run_storage.connect() as connection:  # type: ignore[attr-defined]
        connection.exec_driver_sql(
            "UPDATE runs SET start_time = %s, end_time = %s WHERE run_id = %s",
            (None if status.value == "QUEUED" else now - seconds, now if ended else None, made),
        )
    return made


def ticks(
    instance: dg.DagsterInstance,
    location: str,
    name: str,
    statuses: list[TickStatus],
    kind: InstigatorType = InstigatorType.SENSOR,
) -> None:
    """Put a sensor or schedule on record that is on, and its ticks, the newest last."""
    origin = RemoteInstigatorOrigin(repository_origin=_repository(location), instigator_name=name)
    data = SensorInstigatorData() if kind is InstigatorType.SENSOR else ScheduleInstigatorData("* * * * *")
    selector = origin.get_selector().get_id()
    instance.add_instigator_state(InstigatorState(origin, kind, InstigatorStatus.RUNNING, data))
    now = time.time()
    for age, status in enumerate(reversed(statuses)):
        instance.create_tick(
            TickData(
                instigator_origin_id=origin.get_id(),
                instigator_name=name,
                instigator_type=kind,
                status=status,
                timestamp=now - 2 - age,
                run_ids=[],
                run_keys=[],
                error=SerializableErrorInfo("wrong", [], None) if status is TickStatus.FAILURE else None,
                selector_id=selector,
            )
        )


def dagster_history(instance: dg.DagsterInstance) -> None:
    """Runs in every state, one killed and one that waits, ticks that went well and that did not, two daemons."""
    for location in ("sync_pipeline", "archive_pipeline", "scaling"):
        run(instance, location, dg.DagsterRunStatus.SUCCESS, seconds=12.0)
        run(instance, location, dg.DagsterRunStatus.FAILURE, seconds=70.0, reason="RUN_EXCEPTION")
    run(instance, "sync_pipeline", dg.DagsterRunStatus.FAILURE, seconds=400.0, reason="UNEXPECTED_TERMINATION")
    run(instance, "sync_pipeline", dg.DagsterRunStatus.STARTED, seconds=900.0)
    run(instance, "archive_pipeline", dg.DagsterRunStatus.QUEUED)
    ticks(instance, "sync_pipeline", "workspaces_sensor", [TickStatus.SUCCESS, TickStatus.SKIPPED, TickStatus.SKIPPED])
    ticks(instance, "archive_pipeline", "audit_log_failure_sensor", [TickStatus.SKIPPED, TickStatus.FAILURE])
    ticks(instance, "scaling", "scaling_metrics_schedule", [TickStatus.SUCCESS] * 2, InstigatorType.SCHEDULE)
    for kind in ("SENSOR", "SCHEDULER", "QUEUED_RUN_COORDINATOR", "MONITORING"):
        instance.add_daemon_heartbeat(DaemonHeartbeat(time.time() - 7, kind, "id"))
