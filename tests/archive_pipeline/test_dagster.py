"""The Dagster layer: what loads, what a run shows, when it turns red."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest

from archive_pipeline.columns import ENCODINGS, Encoding
from archive_pipeline.definitions import build_defs
from archive_pipeline.months import Month
from archive_pipeline.resources import ArchiveResource
from scaling.errors import UserError
from tests.archive_pipeline.conftest import JANUARY, Room

ARCHIVE = dg.AssetKey("audit_log_archive")
CHECKS = ["rows_equal", "digest_equal", "bounds_inside_month", "objects_present", "no_late_rows"]

LOAD = """
from archive_pipeline.columns import ENCODINGS, Encoding
from archive_pipeline.definitions import defs, dg
dg.Definitions.validate_loadable(defs)
"""


pytestmark = pytest.mark.usefixtures("definitions_load_alone")


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral(tempdir=str(tmp_path)) as ephemeral:
        yield ephemeral


def run(instance: dg.DagsterInstance, month: Month = JANUARY) -> dg.ExecuteInProcessResult:
    job = build_defs().resolve_job_def("audit_log_archive_job")
    return job.execute_in_process(instance=instance, partition_key=month.partition_key, raise_on_error=False)


def verdicts(result: dg.ExecuteInProcessResult) -> dict[str, bool]:
    return {each.check_name: each.passed for each in result.get_asset_check_evaluations()}


def metadata(result: dg.ExecuteInProcessResult, asset: str = "audit_log_archive") -> dict[str, object]:
    for event in result.get_asset_materialization_events():
        if event.asset_key == dg.AssetKey(asset):
            return {name: value.value for name, value in event.materialization.metadata.items()}
    raise AssertionError(f"{asset} was not materialized")


def sentence(result: dg.ExecuteInProcessResult) -> str:
    (failure,) = [event for event in result.all_events if event.is_step_failure]
    data = failure.step_failure_data
    assert data.user_failure_data is not None
    return str(data.user_failure_data.description)


# -- what loads -----------------------------------------------------------------------------------------------------


def test_the_definitions_load_in_a_fresh_interpreter_with_an_empty_environment() -> None:
    path = {"PATH": os.environ["PATH"]}
    loaded = subprocess.run([sys.executable, "-c", LOAD], env=path, capture_output=True, text=True, check=False)
    assert loaded.returncode == 0, loaded.stderr


def test_the_graph_reads_from_the_table_to_athena() -> None:
    graph = build_defs().resolve_asset_graph()
    chain = ["audit_logs", "audit_log_archive", "audit_log_catalog", "audit_logs_in_athena"]
    keys = [dg.AssetKey(name.split("/")) for name in chain]
    for upstream, downstream in itertools.pairwise(keys):
        assert graph.get(downstream).parent_keys == {upstream}
    for key in keys:
        node = graph.get(key)
        assert node.description
        assert node.kinds
        assert (node.group_name, list(node.owners)) == ("audit_logs", ["team:platform"])


def test_every_ended_month_is_a_partition_and_the_current_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHIVE_FIRST_MONTH", "2025-11")
    monkeypatch.setenv("ARCHIVE_TIME_ZONE", "Asia/Tokyo")
    partitions = build_defs().resolve_assets_def(ARCHIVE).partitions_def
    assert partitions is not None
    just_before, just_after = datetime(2026, 1, 31, 14, 59, tzinfo=UTC), datetime(2026, 1, 31, 15, 1, tzinfo=UTC)
    assert partitions.get_partition_keys(current_time=just_before) == ["2025-11-01", "2025-12-01"]
    assert partitions.get_partition_keys(current_time=just_after) == ["2025-11-01", "2025-12-01", "2026-01-01"]


@pytest.mark.parametrize(
    ("grace", "autostart", "cron", "status"),
    [("3600", "false", "0 4 1 * *", "STOPPED"), ("86400", "true", "0 3 2 * *", "RUNNING")],
)
def test_the_schedule_waits_for_the_grace_period_in_the_archives_zone(
    monkeypatch: pytest.MonkeyPatch, grace: str, autostart: str, cron: str, status: str
) -> None:
    monkeypatch.setenv("ARCHIVE_TIME_ZONE", "Asia/Tokyo")
    monkeypatch.setenv("ARCHIVE_GRACE_SECONDS", grace)
    monkeypatch.setenv("PIPELINE_AUTOSTART", autostart)
    schedule = build_defs().resolve_schedule_def("audit_log_archive_schedule")
    assert (schedule.cron_schedule, schedule.execution_timezone) == (cron, "Asia/Tokyo")
    assert schedule.default_status.name == status


def test_the_schedule_asks_for_the_month_that_just_ended(instance: dg.DagsterInstance) -> None:
    schedule = build_defs().resolve_schedule_def("audit_log_archive_schedule")
    context = dg.build_schedule_context(instance=instance, scheduled_execution_time=datetime(2025, 2, 1, 4, tzinfo=UTC))
    tick = schedule.evaluate_tick(context)
    assert tick.run_requests is not None
    assert [request.partition_key for request in tick.run_requests] == ["2025-01-01"]


def test_a_wrong_time_zone_is_named_when_the_definitions_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHIVE_TIME_ZONE", "Tokyo")
    with pytest.raises(UserError, match="ARCHIVE_TIME_ZONE must be an IANA time zone"):
        build_defs()


# -- what a run shows -----------------------------------------------------------------------------------------------


def test_a_run_archives_a_month_and_shows_what_an_operator_wants_to_know(
    room: Room, instance: dg.DagsterInstance
) -> None:
    room.fill(500)
    room.admin.execute("ANALYZE audit_logs")
    result = run(instance)

    assert result.success
    assert verdicts(result) == dict.fromkeys(CHECKS, True)
    shown = metadata(result)
    size = sum(part.size for part in room.manifests()[0].manifest.parts)
    numbers = ("rows_archived", "rows_verified", "dagster/partition_row_count", "late_rows", "parts", "parquet_bytes")
    assert [shown[name] for name in numbers] == [500, 500, 500, 0, 1, size]
    assert isinstance(shown["compression_ratio"], float)
    assert isinstance(shown["rows_per_second"], float)
    assert "CREATE EXTERNAL TABLE" in str(metadata(result, "audit_log_catalog")["ddl"])


def test_a_second_run_says_unchanged_and_passes_every_check(room: Room, instance: dg.DagsterInstance) -> None:
    room.fill(20)
    run(instance)
    again = run(instance)
    assert again.success
    assert metadata(again)["outcome"] == "unchanged"
    assert verdicts(again) == dict.fromkeys(CHECKS, True)


def test_an_empty_month_is_a_green_partition_of_no_rows(room: Room, instance: dg.DagsterInstance) -> None:
    result = run(instance)
    assert result.success
    assert metadata(result)["rows_archived"] == 0


def test_late_rows_are_a_warning_and_not_a_failure(room: Room, instance: dg.DagsterInstance) -> None:
    room.fill(20)
    run(instance)
    room.log("2025-01-20")
    result = run(instance)
    assert result.success
    (late,) = [each for each in result.get_asset_check_evaluations() if not each.passed]
    assert (late.check_name, late.severity) == ("no_late_rows", dg.AssetCheckSeverity.WARN)
    assert metadata(result)["late_rows"] == 1


# -- when it turns red ----------------------------------------------------------------------------------------------


def test_a_missing_object_fails_its_check_and_stops_what_follows(room: Room, instance: dg.DagsterInstance) -> None:
    room.fill(20)
    run(instance)
    room.target.bucket.delete(room.data_keys()[0])
    result = run(instance)
    assert not result.success
    assert verdicts(result)["objects_present"] is False
    materialized = [event.asset_key for event in result.get_asset_materialization_events()]
    assert dg.AssetKey("audit_log_catalog") not in materialized


def test_a_month_that_fails_verification_is_not_materialized_and_its_check_says_why(
    room: Room, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    room.fill(20)
    wrong = Encoding("upper({c}::text)", "lower({v})", "{v}")  # what a bug of the encoding would do
    monkeypatch.setitem(ENCODINGS, "text", wrong)
    result = run(instance)
    assert not result.success
    assert verdicts(result) == {"digest_equal": False}
    assert result.get_asset_materialization_events() == []
    assert sentence(result).startswith("month 2025-01 failed verification")
    assert room.data_keys() == []


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("ARCHIVE_BUCKET", None, "ARCHIVE_BUCKET is not set (S3 bucket of the archive.)"),
        ("DATABASE_URL", None, "DATABASE_URL is not set"),
        ("ARCHIVE_TABLE", "public.nothing", "table public.nothing does not exist; set ARCHIVE_TABLE"),
    ],
)
def test_a_wrong_setting_fails_the_run_with_one_sentence_and_no_stack_trace(
    room: Room,
    instance: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str | None,
    said: str,
) -> None:
    monkeypatch.delenv(variable, raising=False)
    if value is not None:
        monkeypatch.setenv(variable, value)
    result = run(instance)
    assert not result.success
    assert sentence(result).startswith(said)


def test_the_open_month_cannot_be_archived_by_asking_dagster_for_it(
    room: Room, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = ArchiveResource.target
    monkeypatch.setattr(ArchiveResource, "target", lambda self: replace(target(self), grace=timedelta(days=40000)))
    result = run(instance)
    assert not result.success
    assert sentence(result).startswith("month 2025-01 is still open")


def test_no_secret_and_no_row_content_shows_in_anything_dagster_stores(
    room: Room, instance: dg.DagsterInstance
) -> None:
    room.log("2025-01-05", details={"secret": "canary-in-a-row"}, user_agent="canary-in-a-row")
    run(instance)
    room.admin.execute("ALTER TABLE audit_logs RENAME TO gone")
    run(instance)
    stored = "\n".join(
        str(record.event_log_entry)
        for run_record in instance.get_run_records()
        for record in instance.get_records_for_run(run_record.dagster_run.run_id).records
    )
    assert "audit_log_archive" in stored
    for canary in ("canary-in-a-row", room.database.dsn, os.environ["AWS_SECRET_ACCESS_KEY"]):
        assert canary not in stored
