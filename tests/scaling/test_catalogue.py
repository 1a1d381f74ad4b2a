"""The catalogue against a real database: what each query counts, and that no metric contradicts itself."""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest

from archive_pipeline.months import Month
from devstack.processes import CHECKOUT
from devstack.servers import Database
from scaling.capabilities import Capability, Mode
from scaling.catalogue import Catalogue, catalogue
from scaling.databases import Connection, DatabaseRouter, Shard
from scaling.errors import UserError
from scaling.samples import Sample, Status
from scaling.settings import ArchiveSourceSettings, SyncScheduleSettings
from scaling.sources import Reach
from scaling.sources.derived import Derived
from scaling.thresholds import Rearm
from tests import clients
from tests.archive_pipeline.partitioned import convert
from tests.scaling.measuring import settings

NOW = datetime(2026, 3, 18, 13, 7, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
TENANT = UUID(int=1)
PLAN = ("1.1", "1.2", "1.3", "2.1", "3.1", "3.2", "4.1", "4.2", "5.1", "5.2", "6.1", "6.2", "7.1")


def defaults(**archive: Any) -> Catalogue:
    return catalogue(ArchiveSourceSettings(**archive), SyncScheduleSettings())


@pytest.fixture
def admin(database: Database) -> Iterator[Connection]:
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        yield connection


@pytest.fixture
def reach(database: Database) -> Iterator[Reach]:
    shard = Shard("main", database.dsn, owner_dsn=database.owner_dsn)
    with clients.client() as client, DatabaseRouter(shard) as router:
        yield Reach(router, client, settings({}), NOW)


def measured(reach: Reach, name: str, metrics: Catalogue | None = None) -> Sample:
    """The only sample of a metric."""
    source = (metrics or defaults()).named(name).source
    assert not isinstance(source, Derived)
    (sample,) = source.read(name, reach)
    return sample


def figure(reach: Reach, name: str, metrics: Catalogue | None = None) -> tuple[float | None, Mapping[str, Any]]:
    sample = measured(reach, name, metrics)
    assert sample.status is Status.OK, sample
    return sample.value, sample.evidence


def tenants(admin: Connection, count: int) -> None:
    admin.execute(
        "INSERT INTO tenants (id, name) SELECT lpad(to_hex(n), 32, '0')::uuid, 'T' FROM generate_series(1, %s) n"
        " ON CONFLICT DO NOTHING",
        [count],
    )


def users(admin: Connection, *, tenant: int, count: int, google: bool) -> None:
    tenants(admin, tenant)
    admin.execute(
        "INSERT INTO users (tenant_id, email, google_api_enabled)"
        " SELECT lpad(to_hex(%(tenant)s::int), 32, '0')::uuid, gen_random_uuid() || '@example.com', %(google)s"
        " FROM generate_series(1, %(count)s)",
        {"tenant": tenant, "count": count, "google": google},
    )


def run(
    admin: Connection,
    at: datetime,
    seconds: float | None,
    *,
    due: int = 5,
    served: int = 5,
    events: int = 0,
    heartbeat: timedelta = timedelta(0),
) -> None:
    """A run of the sync; without seconds it did not finish."""
    admin.execute(
        "INSERT INTO sync.runs (run_id, shard, of, started_at, heartbeat_at, finished_at, duration_seconds,"
        " workspaces_due, workspaces_served, events_upserted, events_deleted)"
        " VALUES (gen_random_uuid(), 0, 1, %s, %s, %s, %s, %s, %s, %s, %s)",
        [
            at,
            at + heartbeat,
            at + timedelta(seconds=seconds) if seconds is not None else None,
            seconds,
            due,
            served,
            events,
            events,
        ],
    )


def test_every_row_of_the_scaling_plan_has_a_metric_with_a_threshold() -> None:
    judged = {row for metric in defaults() if metric.rule for row in metric.requirement.split(", ")}
    assert set(PLAN) <= judged


def test_every_threshold_tells_a_person_what_to_do_and_names_its_rule_like_its_metric() -> None:
    for metric in defaults():
        assert (metric.rule is None) == (metric.recommendation is None), metric.name
        if metric.rule and metric.recommendation:
            assert metric.rule.name == metric.rule.metric == metric.name
            assert all(len(text) > 10 for text in (metric.recommendation.do, metric.recommendation.cost))


def test_every_threshold_has_its_section_in_the_runbook() -> None:
    headings = {
        line.removeprefix("### ")
        for line in (CHECKOUT / "docs" / "operations.md").read_text().splitlines()
        if line.startswith("### ")
    }
    judged = [metric for metric in defaults() if metric.rule]
    assert {metric.name for metric in judged} <= headings
    assert [metric.runbook for metric in judged] == [f"docs/operations.md#{metric.name}" for metric in judged]


def test_every_capability_is_started_by_a_metric_and_the_mode_of_it_reaches_the_rule() -> None:
    modes = dict.fromkeys(Capability, Mode.PROPOSE) | {Capability.PARALLEL_SYNC: Mode.AUTO}
    watches = defaults().watches(modes)
    assert {watch.capability for watch in watches} == {None, *Capability}
    assert {watch.mode for watch in watches if watch.capability is Capability.PARALLEL_SYNC} == {Mode.AUTO}
    assert {watch.mode for watch in watches if watch.capability is None} == {Mode.OBSERVE}


def test_what_begins_anew_every_month_and_has_a_budget_fires_once_a_month() -> None:
    for name in ("ai_chats_month", "ai_cost_ratio"):
        _, rule = defaults().judged(name)
        assert rule.rearm is Rearm.PERIOD


def test_sources_say_in_words_what_they_ask() -> None:
    for metric in defaults():
        assert len(metric.source.describe()) > 20, metric.name


def test_an_unknown_metric_and_one_without_threshold_are_refused_with_a_sentence() -> None:
    with pytest.raises(UserError, match=r"there is no metric 'bytes'; known: audit_logs_bytes, "):
        defaults().named("bytes")
    with pytest.raises(UserError, match="ai_cost_month is evidence for others and has no threshold"):
        defaults().judged("ai_cost_month")


def test_audit_logs_are_as_large_before_as_after_partitioning(
    admin: Connection, reach: Reach, database: Database
) -> None:
    tenants(admin, 1)
    fill = "INSERT INTO audit_logs (tenant_id, action, created_at) SELECT %s, repeat('x', 400), %s + n * interval '1 s'"
    admin.execute(f"{fill} FROM generate_series(1, 20000) n", [TENANT, NOW - 60 * DAY])
    plain, evidence = figure(reach, "audit_logs_bytes")
    assert plain is not None
    assert plain > 8e6
    assert (evidence["partitioned"], evidence["tables"]) == (False, 1)
    assert plain > evidence["index_bytes"] > 0
    admin.execute("CREATE TABLE kept AS TABLE audit_logs")
    admin.execute("TRUNCATE audit_logs")
    january = Month(2026, 1)
    convert(admin, Shard("main", database.dsn, owner_dsn=database.owner_dsn), january, first=january)
    admin.execute("INSERT INTO audit_logs SELECT * FROM kept")
    partitioned, evidence = figure(reach, "audit_logs_bytes")
    assert partitioned is not None
    assert (evidence["partitioned"], evidence["tables"]) == (True, 3)
    assert 0.5 < partitioned / plain < 1.5  # other indexes


def test_a_partition_that_is_detached_and_not_dropped_yet_still_counts(
    admin: Connection, reach: Reach, database: Database
) -> None:
    tenants(admin, 1)
    january = Month(2026, 1)
    convert(admin, Shard("main", database.dsn, owner_dsn=database.owner_dsn), january)
    admin.execute(
        "INSERT INTO audit_logs (tenant_id, action, created_at) SELECT %s, repeat('x', 400), %s"
        " FROM generate_series(1, 5000)",
        [TENANT, january.start],
    )
    whole, _ = figure(reach, "audit_logs_bytes")
    name = "audit_partitions.audit_logs_2026_01"
    admin.execute(f"ALTER TABLE audit_logs DETACH PARTITION {name}")
    admin.execute(
        "INSERT INTO archive.prunes (source_table, shard, partition_oid, partition_schema, partition_name, to_at,"
        " state)"
        f" VALUES ('public.audit_logs', 'main', '{name}'::regclass, 'audit_partitions', 'audit_logs_2026_01', %s,"
        " 'detached')",
        [january.end],
    )
    detached, evidence = figure(reach, "audit_logs_bytes")
    assert (detached, evidence["tables"]) == (whole, 2)
    admin.execute(f"DROP TABLE {name}")
    dropped, _ = figure(reach, "audit_logs_bytes")
    assert dropped == 0


def test_a_missing_table_of_audit_logs_is_empty_and_not_zero(reach: Reach) -> None:
    sample = measured(reach, "audit_logs_bytes", defaults(archive_table="public.nothing"))
    assert (sample.status, sample.dims) == (Status.EMPTY, "shard=main")


def test_only_whole_months_past_retention_with_rows_and_without_hold_are_detachable(
    admin: Connection, reach: Reach, database: Database
) -> None:
    tenants(admin, 1)
    kept = defaults(archive_retention_months=2)  # now is in March: February and January stay
    assert measured(reach, "audit_detachable_bytes", kept).status is Status.EMPTY  # a plain table has no partitions
    months = [Month(2025, 10), Month(2025, 11), Month(2025, 12), Month(2026, 1)]
    convert(admin, Shard("main", database.dsn, owner_dsn=database.owner_dsn), *months, first=months[0])
    assert figure(reach, "audit_detachable_bytes", kept)[0] == 0
    for month in (months[0], months[2], months[3]):
        admin.execute(
            "INSERT INTO audit_logs (tenant_id, action, created_at) VALUES (%s, 'x', %s)", [TENANT, month.start]
        )
    value, evidence = figure(reach, "audit_detachable_bytes", kept)
    assert value is not None
    assert value > 0
    assert (evidence["partitions"], evidence["of_partitions"]) == (2, 5)  # November is empty, January is kept
    assert evidence["oldest_kept"].startswith("2026-01-01")
    hold = "INSERT INTO archive.legal_holds (source_table, month, reason, placed_by) VALUES (%s, %s, 'suit', 'me')"
    admin.execute(hold, ["public.audit_logs", "2025-12-01"])
    assert figure(reach, "audit_detachable_bytes", kept)[1]["partitions"] == 1
    admin.execute(hold, ["public.audit_logs", None])
    assert figure(reach, "audit_detachable_bytes", kept)[0] == 0


def test_calls_of_this_month_are_summed_without_token_refreshes_and_begin_anew_each_month(
    admin: Connection, reach: Reach
) -> None:
    tenants(admin, 2)
    rows = [
        (1, "2026-02-28", "events.list", "200", 1000),
        (1, "2026-03-01", "events.list", "200", 70),
        (2, "2026-03-18", "calendarList.list", "429", 5),
        (1, "2026-03-18", "oauth.refresh", "200", 900),
    ]
    for tenant, day, method, outcome, calls in rows:
        admin.execute(
            "INSERT INTO sync.api_calls (tenant_id, day, method, outcome, calls) VALUES (%s, %s, %s, %s, %s)",
            [UUID(int=tenant), day, method, outcome, calls],
        )
    sample = measured(reach, "google_calls_month")
    assert (sample.value, sample.period) == (75, "2026-03")
    assert (sample.evidence["tenants"], sample.evidence["not_answered_with_2xx"]) == (2, 5)


def test_a_month_without_calls_is_a_zero_of_that_month(reach: Reach) -> None:
    sample = measured(reach, "google_calls_month")
    assert (sample.value, sample.period) == (0, "2026-03")


def test_tenants_count_once_however_many_of_their_users_have_google_on(admin: Connection, reach: Reach) -> None:
    users(admin, tenant=1, count=3, google=True)
    users(admin, tenant=2, count=1, google=True)
    users(admin, tenant=3, count=5, google=False)
    assert figure(reach, "google_tenants") == (2, {**figure(reach, "google_tenants")[1], "users": 4})


def test_a_killed_run_counts_as_its_whole_budget_in_the_mean_and_one_at_work_does_not(
    admin: Connection, reach: Reach
) -> None:
    for minute in range(19):
        run(admin, NOW - timedelta(minutes=2 * minute + 1), 10.0)
    assert measured(reach, "sync_mean_s").status is Status.PARTIAL  # 19 runs say too little
    run(admin, NOW - timedelta(minutes=50), None)
    run(admin, NOW - timedelta(minutes=4), None, heartbeat=timedelta(minutes=3))  # at work
    run(admin, NOW - timedelta(hours=2), 99.0)
    value, evidence = figure(reach, "sync_mean_s")
    assert value == pytest.approx((19 * 10 + 100) / 20)  # SYNC_TIME_BUDGET_SECONDS
    assert (evidence["n"], evidence["killed"]) == (20, 1)


def test_runs_that_were_killed_or_ran_out_of_time_are_timeouts_for_thirty_days(admin: Connection, reach: Reach) -> None:
    run(admin, NOW - 29 * DAY, None)
    run(admin, NOW - 31 * DAY, None)
    run(admin, NOW - DAY, 100.0, due=9, served=5)
    run(admin, NOW - DAY, 100.0, due=5, served=5)
    run(admin, NOW - HOUR, 99.0, due=9, served=5)
    assert figure(reach, "sync_timeouts_month")[0] == 2


def test_events_are_those_of_the_last_whole_day_of_utc(admin: Connection, reach: Reach) -> None:
    assert measured(reach, "synced_events_day").status is Status.EMPTY
    run(admin, datetime(2026, 3, 17, 0, 0, tzinfo=UTC), 1.0, events=10)
    run(admin, datetime(2026, 3, 17, 23, 59, tzinfo=UTC), 1.0, events=5)
    run(admin, datetime(2026, 3, 18, 0, 0, tzinfo=UTC), 1.0, events=1000)
    run(admin, datetime(2026, 3, 16, 23, 59, tzinfo=UTC), 1.0, events=1000)
    value, evidence = figure(reach, "synced_events_day")
    assert (value, evidence["written"], evidence["deleted"]) == (30, 15, 15)


def test_chats_and_their_own_cost_are_of_this_month_and_of_today(admin: Connection, reach: Reach) -> None:
    tenants(admin, 2)
    for tenant, at, cost in [
        (1, NOW - 18 * DAY, 9.0),
        (1, NOW - 17 * DAY, 1.5),
        (2, NOW - HOUR, 0.25),
        (2, NOW + HOUR, 7.0),
    ]:
        admin.execute(
            "INSERT INTO ai_usage (tenant_id, model, feature, input_tokens, output_tokens, cost_usd, created_at)"
            " VALUES (%s, 'small', 'search', 100, 10, %s, %s)",
            [UUID(int=tenant), cost, at],
        )
    chats = measured(reach, "ai_chats_month")
    assert (chats.value, chats.period, chats.evidence["tenants"]) == (2, "2026-03", 2)
    own = measured(reach, "ai_cost_own_month")
    assert (own.value, own.period, own.evidence["today_usd"]) == (1.75, "2026-03", 0.25)


def test_connections_are_measured_against_what_clients_can_get(
    admin: Connection, reach: Reach, database: Database
) -> None:
    before, _ = figure(reach, "db_conn_util")
    with psycopg.connect(database.admin_dsn) as one, psycopg.connect(database.admin_dsn) as other:
        one.execute("SELECT 1")
        other.execute("SELECT 1")
        value, evidence = figure(reach, "db_conn_util")
    assert value is not None
    assert before is not None
    assert 0 < value < 1
    assert evidence["idle_in_transaction"] >= 2
    assert evidence["connections"] < evidence["max_connections"]


def test_users_are_counted_with_the_size_of_the_largest_tenant(admin: Connection, reach: Reach) -> None:
    users(admin, tenant=1, count=3, google=False)
    users(admin, tenant=2, count=7, google=True)
    value, evidence = figure(reach, "users_total")
    assert (value, evidence["tenants"], evidence["users_of_the_largest_tenant"]) == (10, 2, 7)


def test_incidents_are_complex_when_they_cross_services_or_last_an_hour(admin: Connection, reach: Reach) -> None:
    assert measured(reach, "complex_incidents_30d").status is Status.EMPTY  # the SaaS has no such table
    admin.execute(
        "CREATE TABLE incidents (started_at timestamptz, resolved_at timestamptz, services text[]);"
        "GRANT SELECT ON incidents TO pipeline"
    )
    for age, lasted, services in [
        (DAY, timedelta(minutes=5), ["app", "database"]),
        (DAY, timedelta(minutes=61), ["app"]),
        (DAY, timedelta(minutes=60), ["app"]),
        (31 * DAY, timedelta(hours=5), ["app", "database"]),
    ]:
        admin.execute("INSERT INTO incidents VALUES (%s, %s, %s)", [NOW - age, NOW - age + lasted, services])
    admin.execute("INSERT INTO incidents VALUES (%s, NULL, '{app}')", [NOW - 2 * HOUR])  # still going on
    assert figure(reach, "complex_incidents_30d")[0] == 3


def test_no_evidence_of_the_database_names_anybody(admin: Connection, reach: Reach) -> None:
    users(admin, tenant=1, count=1, google=True)
    admin.execute("UPDATE users SET email = 'canary@example.com', full_name = 'Canary'")
    admin.execute("UPDATE tenants SET name = 'Canary'")
    for metric in defaults():
        if not isinstance(metric.source, Derived):
            said = str(metric.source.read(metric.name, reach)).lower()
            assert "canary" not in said
            assert str(TENANT) not in said
