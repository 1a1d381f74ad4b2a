"""The exporter: every figure it serves, that no label is somebody's, that a broken part costs only itself."""

import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psycopg
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from devstack.processes import CHECKOUT
from devstack.servers import Database, Servers
from scaling import exported, exporter
from scaling.databases import DatabaseRouter, Shard
from scaling.exporter import Part, PipelineCollector
from scaling.exposition import MOST_VALUES, OTHER, bounded, label, one
from scaling.settings import ExporterSettings
from tests.scaling import exported_fleet

Figures = Mapping[str, Mapping[frozenset[tuple[str, str]], float]]


def figures(text: str) -> Figures:
    """Samples by name and labels, as Prometheus's own parser reads them."""
    found: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return found


def of(found: Figures, name: str, /, **labels: str) -> float:
    [value] = [value for key, value in found[name].items() if frozenset(labels.items()) <= key]
    return value


def total(found: Figures, name: str, /, **labels: str) -> float:
    return sum(value for key, value in found[name].items() if frozenset(labels.items()) <= key)


@pytest.fixture
def router(database: Database) -> Iterator[DatabaseRouter]:
    with DatabaseRouter(Shard("main", database.dsn)) as made:
        yield made


@pytest.fixture
def scrape(
    database: Database, router: DatabaseRouter, settings_environment: Callable[..., None]
) -> Callable[..., Figures]:
    """One scrape of the database, without Dagster's."""
    settings_environment(database)

    def once(**settings: float) -> Figures:
        made = exporter.registry(router, None, ExporterSettings(**settings))  # type: ignore[arg-type]
        return figures(generate_latest(made).decode())

    return once


def test_an_empty_database_is_exported_without_a_broken_part(scrape: Callable[..., Figures]) -> None:
    found = scrape()
    assert set(found["pipeline_scrape_part_ok"].values()) == {1.0}
    assert "app_cache_hit_ratio" not in found  # nothing was measured, which is not a rate of zero
    assert of(found, "pipeline_sync_leases", kind="calendar") == 0
    assert of(found, "pipeline_archive_months", state="failed") == 0


def test_what_is_on_record_is_what_is_exported(database: Database, scrape: Callable[..., Figures]) -> None:
    exported_fleet.seed(database.admin_dsn, workspaces=2000, tenants=300)
    found = scrape()
    assert set(found["pipeline_scrape_part_ok"].values()) == {1.0}
    assert of(found, "app_concurrent_connections", of="postgres") == 42
    assert of(found, "app_database_pool_utilization_ratio", pool="postgres") == 0.4
    assert of(found, "app_cache_hit_ratio") == 0.1
    assert of(found, "app_api_latency_seconds", quantile="0.99", of=OTHER) == 9.0
    calls = "pipeline_sync_api_calls_total"
    assert of(found, calls, **{"class": "team"}, method="events.list", outcome="429") == 700
    assert total(found, calls) == 300 * 4 * 7
    assert of(found, "pipeline_sync_leases", kind="calendar") == 2
    assert of(found, "pipeline_sync_leases", kind="connection") == 2
    assert of(found, "pipeline_sync_runs_at_work") == 1
    assert of(found, "pipeline_sync_calls_in_flight") == 4
    assert of(found, "pipeline_sync_breakers", kind="calendar", state="open") == 20
    assert of(found, "pipeline_sync_breakers", kind="connection", state="open") == 40
    assert of(found, "pipeline_sync_breakers", kind="connection", state="half_open") == 40
    assert total(found, "pipeline_sync_workspaces", health="needs_human") == 40
    assert total(found, "pipeline_sync_calendars") == 2000
    assert total(found, "pipeline_sync_calendars", state="never_synced") == 20
    assert of(found, "pipeline_sync_connections", state="refused") == 40
    assert of(found, "pipeline_archive_months", state="failed") == 1
    assert of(found, "pipeline_archive_months", state="pruned") == 2
    assert of(found, "pipeline_archive_rows") == 11_000
    assert of(found, "pipeline_archive_bytes") == 550_000
    assert of(found, "pipeline_archive_verification_failures") == 1
    assert of(found, "pipeline_archive_late_rows", state="waiting") == 7
    assert of(found, "pipeline_archive_late_rows", state="archived") == 11
    assert of(found, "pipeline_archive_audit_findings") == 3
    assert of(found, "pipeline_quota_calls_today") == 250_000
    assert of(found, "pipeline_quota_headroom_ratio") == 0.75
    assert of(found, "pipeline_scaling_value", metric="google_calls_month") == 20_000
    assert of(found, "pipeline_scaling_threshold", metric="google_calls_month") == 10_000
    assert of(found, "pipeline_scaling_used_ratio", metric="google_calls_month") == 2
    assert of(found, "pipeline_scaling_crossed", metric="google_calls_month") == 1
    assert of(found, "pipeline_scaling_phase", metric="google_calls_month", phase="fired") == 1
    assert of(found, "pipeline_scaling_sample_status", metric="users_total", status="error") == 1
    assert not [key for key in found["pipeline_scaling_value"] if ("metric", "users_total") in key]
    assert of(found, "pipeline_scaling_episodes", capability="incremental_sync", state="approved") == 1


def test_the_buckets_of_freshness_rise_and_end_with_everything(
    database: Database, scrape: Callable[..., Figures]
) -> None:
    exported_fleet.seed(database.admin_dsn, workspaces=10, tenants=5)
    buckets = {
        float(dict(key)["le"]): value for key, value in scrape()["pipeline_sync_change_age_seconds_bucket"].items()
    }
    assert [buckets[bound] for bound in sorted(buckets)] == [10.0 * (n + 1) for n in range(18)]


def test_premade_partitions_are_counted_and_a_plain_table_has_none(
    database: Database, scrape: Callable[..., Figures]
) -> None:
    found = scrape()
    assert of(found, "pipeline_archive_partitioned") == 0
    assert "pipeline_archive_premade_partitions" not in found or not found["pipeline_archive_premade_partitions"]
    with psycopg.connect(database.admin_dsn, autocommit=True) as admin:
        admin.execute("ALTER TABLE public.audit_logs RENAME TO audit_logs_before")
        admin.execute(
            "CREATE TABLE public.audit_logs (id uuid, created_at timestamptz NOT NULL) PARTITION BY RANGE (created_at)"
        )
        for n in range(-1, 4):
            admin.execute(
                f"DO $$ BEGIN EXECUTE format('CREATE TABLE public.p{n + 1} PARTITION OF public.audit_logs FOR VALUES"
                " FROM (%L) TO (%L)',"
                f" date_trunc('month', now(), 'UTC') + make_interval(months => {n}),"
                f" date_trunc('month', now(), 'UTC') + make_interval(months => {n + 1})); END $$"
            )
    found = scrape()
    assert of(found, "pipeline_archive_partitioned") == 1
    assert of(found, "pipeline_archive_premade_partitions") == 3
    assert 80 * 86400 < of(found, "pipeline_archive_partitions_end_seconds") < 125 * 86400


def test_tenants_without_a_plan_are_of_one_class(database: Database, scrape: Callable[..., Figures]) -> None:
    exported_fleet.seed(database.admin_dsn, workspaces=10, tenants=5)
    with psycopg.connect(database.admin_dsn, autocommit=True) as admin:
        admin.execute("ALTER TABLE public.tenants DROP COLUMN plan")
    found = scrape()
    assert set(found["pipeline_scrape_part_ok"].values()) == {1.0}
    assert total(found, "pipeline_sync_api_calls_total", **{"class": "unknown"}) == 5 * 4 * 7
    assert total(found, "pipeline_sync_workspaces", **{"class": "unknown"}) == 10


def test_no_label_names_a_tenant_a_workspace_a_calendar_or_a_run(
    database: Database, scrape: Callable[..., Figures]
) -> None:
    exported_fleet.seed(database.admin_dsn, workspaces=500, tenants=100)
    with psycopg.connect(database.admin_dsn) as admin:
        known = {
            str(value)
            for statement in (
                "SELECT id::text FROM public.tenants",
                "SELECT name FROM public.tenants",
                "SELECT id::text FROM public.workspaces",
                "SELECT google_account FROM public.google_connections",
                "SELECT run_id FROM sync.runs",
            )
            for (value,) in admin.execute(statement.encode())
        }
    values = {value for samples in scrape().values() for key in samples for _, value in key}
    assert known
    assert not known & values
    assert not [value for value in values if re.search(r"[0-9a-f]{8}-[0-9a-f]{4}|@", value)]


def test_more_tenants_and_workspaces_make_no_more_series(database: Database, scrape: Callable[..., Figures]) -> None:
    exported_fleet.seed(database.admin_dsn, workspaces=60, tenants=10)
    few = {(name, key) for name, samples in scrape().items() for key in samples}
    with psycopg.connect(database.admin_dsn, autocommit=True) as admin:
        tables = admin.execute(
            "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables"
            " WHERE schemaname IN ('sync', 'archive', 'scaling') AND tablename NOT IN ('alembic_version')"
        ).fetchall()
        names = ", ".join(name for (name,) in tables if "version" not in name)
        admin.execute(f"TRUNCATE {names}, public.tenants CASCADE".encode())
    exported_fleet.seed(database.admin_dsn, workspaces=3000, tenants=1000)
    many = {(name, key) for name, samples in scrape().items() for key in samples}
    assert {name for name, _ in many} == {name for name, _ in few}
    assert many == few


@pytest.mark.parametrize(
    "value", ["0f8fad5b-d9cb-469f-a165-70867728950e", "0f8fad5bd9cb469fa16570867728950e", "a@b.example", "x" * 200]
)
def test_what_looks_like_an_id_is_no_label(value: str) -> None:
    assert label(f"route=/x/{value}") == OTHER


def test_a_label_has_few_values_and_the_rest_is_put_together() -> None:
    found = bounded([((f"value {n:03}",), 1) for n in range(1000)])
    assert len(found) == MOST_VALUES + 1
    assert found[OTHER,] == 1000 - MOST_VALUES


def part(name: str, work: Callable[[], object]) -> Part:
    def read() -> Sequence[Metric]:
        work()
        return [one(f"figure_of_{name}", "A figure.", 1.0)]

    return Part(name, read)


def scraped(collector: PipelineCollector) -> Figures:
    made = CollectorRegistry(auto_describe=False)
    made.register(collector)
    return figures(generate_latest(made).decode())


def test_a_part_that_fails_costs_only_its_own_figures() -> None:
    def fail() -> None:
        raise psycopg.OperationalError("gone")

    found = scraped(PipelineCollector([part("well", lambda: None), part("broken", fail)], limit_seconds=5))
    assert of(found, "figure_of_well") == 1
    assert "figure_of_broken" not in found
    assert of(found, "pipeline_scrape_part_ok", part="well") == 1
    assert of(found, "pipeline_scrape_part_ok", part="broken") == 0


def test_a_part_that_is_too_late_is_left_out_and_not_begun_again_while_it_is_stuck() -> None:
    release, begun = threading.Event(), []

    def stick() -> None:
        begun.append(1)
        release.wait(30)

    collector = PipelineCollector([part("stuck", stick), part("well", lambda: None)], limit_seconds=0.2)
    for _ in range(3):
        started = time.monotonic()
        found = scraped(collector)
        assert time.monotonic() - started < 2
        assert of(found, "pipeline_scrape_part_ok", part="stuck") == 0
        assert of(found, "figure_of_well") == 1
    assert len(begun) == 1
    release.set()
    time.sleep(0.1)
    assert of(scraped(collector), "pipeline_scrape_part_ok", part="stuck") == 1


def test_scrapes_at_the_same_time_read_once_and_then_once_for_all_who_waited() -> None:
    begun: list[float] = []

    def slow() -> None:
        begun.append(time.monotonic())
        time.sleep(0.3)

    collector = PipelineCollector([part("slow", slow)], limit_seconds=5)
    threads = [threading.Thread(target=lambda: list(collector.collect())) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(begun) == 2


def test_a_table_that_somebody_locks_breaks_its_part_and_no_other(
    database: Database, scrape: Callable[..., Figures]
) -> None:
    with psycopg.connect(database.admin_dsn) as admin:
        admin.execute("LOCK TABLE sync.freshness IN ACCESS EXCLUSIVE MODE")
        began = time.monotonic()
        found = scrape()
        assert time.monotonic() - began < 2
    broken = {dict(key)["part"] for key, value in found["pipeline_scrape_part_ok"].items() if not value}
    assert broken == {"freshness"}


def test_a_scrape_writes_nothing_takes_no_lock_that_hinders_and_leaves_none(
    database: Database, router: DatabaseRouter, settings_environment: Callable[..., None]
) -> None:
    settings_environment(database)
    [shard] = router.shards()
    seen: set[str] = set()
    for name, read in exported.parts(router, limit_seconds=5).items():
        read()
        with psycopg.connect(database.admin_dsn) as admin:
            left = admin.execute(
                "SELECT a.state, count(l.*) FROM pg_stat_activity a LEFT JOIN pg_locks l ON l.pid = a.pid"
                " WHERE a.datname = current_database() AND a.pid <> pg_backend_pid()"
                " AND a.backend_type = 'client backend' GROUP BY 1"
            ).fetchall()
        assert left == [("idle", 0)], name
    with exported.reading(shard, 5) as connection:
        exported.sync_state(connection)
        seen |= {mode for (mode,) in connection.execute("SELECT mode FROM pg_locks WHERE pid = pg_backend_pid()")}
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction), connection.transaction():
            connection.execute("DELETE FROM sync.freshness")
    assert seen <= {"AccessShareLock", "ExclusiveLock"}  # the second one is on its own transaction's number


def test_a_statement_that_takes_too_long_is_given_up(router: DatabaseRouter) -> None:
    [shard] = router.shards()
    with pytest.raises(psycopg.errors.QueryCanceled), exported.reading(shard, 0.1) as connection:
        connection.execute("SELECT pg_sleep(5)")


def test_figures_are_printed_once_and_the_exit_code_tells_whether_all_are_there(
    database: Database, settings_environment: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    settings_environment(database)
    assert exporter.main(["--once"]) == 0
    assert "pipeline_scrape_seconds" in capsys.readouterr().out
    with psycopg.connect(database.admin_dsn, autocommit=True) as admin:
        admin.execute("DROP TABLE sync.freshness")
    assert exporter.main(["--once"]) == 1
    assert 'pipeline_scrape_part_ok{part="freshness"} 0.0' in capsys.readouterr().out


def test_it_listens_on_this_machine_only_and_ends_with_sigterm(
    running_servers: Servers, database: Database, tmp_path: Path
) -> None:
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "scaling.exporter"],
            cwd=CHECKOUT,
            env={"PATH": "/usr/bin:/bin", "EXPORTER_PORT": "0", **database.environment()},
            stdout=said,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 30
        while "listening" not in (tmp_path / "said").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        [address] = re.findall(r"http://127\.0\.0\.1:\d+/metrics", (tmp_path / "said").read_text())
        with urllib.request.urlopen(address, timeout=10) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain")
            found = figures(answer.read().decode())
        assert set(found["pipeline_scrape_part_ok"].values()) == {1.0}
        assert "python_info" not in found
    finally:
        process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
