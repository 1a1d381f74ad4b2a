"""The Dagster layer: what loads, what a run shows, when it turns red."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import NoReturn

import dagster as dg
import pytest

from archive_pipeline.columns import ENCODINGS, Encoding
from archive_pipeline.definitions import build_defs
from archive_pipeline.ledger import lease
from archive_pipeline.months import Month
from archive_pipeline.resources import ArchiveResource
from scaling.errors import UserError
from tests.archive_pipeline.conftest import JANUARY, Room

ARCHIVE = dg.AssetKey("audit_log_archive")
CHECKS = [
    "rows_equal",
    "digest_equal",
    "bounds_inside_month",
    "objects_present",
    "late_rows_archived",
    "rows_unchanged",
]

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


def run_range(instance: dg.DagsterInstance, first: Month, last: Month) -> dg.ExecuteInProcessResult:
    """As one run of a backfill does."""
    tags = {
        "dagster/asset_partition_range_start": first.partition_key,
        "dagster/asset_partition_range_end": last.partition_key,
    }
    job = build_defs().resolve_job_def("audit_log_archive_job")
    return job.execute_in_process(instance=instance, tags=tags, raise_on_error=False)


def statuses(instance: dg.DagsterInstance) -> dict[str, str]:
    """What the UI shows of each month that something happened to."""
    months = build_defs().resolve_assets_def(ARCHIVE).partitions_def
    assert months is not None
    found = instance.get_status_by_partition(ARCHIVE, months.get_partition_keys(), months) or {}
    return {key: status.name for key, status in found.items() if status}


def verdicts(result: dg.ExecuteInProcessResult, month: Month = JANUARY) -> dict[str, bool]:
    return {
        each.check_name: each.passed
        for each in result.get_asset_check_evaluations()
        if (each.asset_key, each.partition) == (ARCHIVE, month.partition_key)
    }


def current_verdicts(instance: dg.DagsterInstance, check: str) -> dict[str | None, str]:
    """What the UI shows of a check: it leaves out verdicts on anything but a partition's newest materialization."""
    found = instance.event_log_storage.get_asset_check_partition_info([dg.AssetCheckKey(ARCHIVE, check)])
    return {info.partition_key: info.latest_execution_status.name for info in found if info.is_current}


def materialized(result: dg.ExecuteInProcessResult) -> list[tuple[str, str | None]]:
    return [
        (event.asset_key.to_user_string(), event.partition)
        for event in result.get_asset_materialization_events()
        if event.asset_key is not None
    ]


def metadata(
    result: dg.ExecuteInProcessResult, asset: str = "audit_log_archive", month: Month | None = None
) -> dict[str, object]:
    for event in result.get_asset_materialization_events():
        if event.asset_key == dg.AssetKey(asset) and (month is None or event.partition == month.partition_key):
            return {name: value.value for name, value in event.materialization.metadata.items()}
    raise AssertionError(f"{asset} was not materialized")


def sentence(result: dg.ExecuteInProcessResult) -> str:
    (failure,) = [event for event in result.all_events if event.is_step_failure]
    data = failure.step_failure_data
    assert data.user_failure_data is not None
    return str(data.user_failure_data.description)


def raiser(error: Exception) -> Callable[..., NoReturn]:
    def fail(*arguments: object, **options: object) -> NoReturn:
        raise error

    return fail


@contextmanager
def alerts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A receiver of alerts."""
    posted: list[str] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("ARCHIVE_ALERT_URL", f"http://127.0.0.1:{server.server_port}/hook")
        yield posted
        server.shutdown()


def alert(instance: dg.DagsterInstance, failed: dg.ExecuteInProcessResult) -> object:
    """Let the sensor hear of a failed run."""
    sensor = build_defs().get_sensor_def("audit_log_failure_sensor")
    (failure,) = [event for event in failed.all_events if event.is_run_failure]
    context = dg.build_run_status_sensor_context(
        sensor_name=sensor.name, dagster_event=failure, dagster_instance=instance, dagster_run=failed.dagster_run
    ).for_run_failure()
    return sensor(context)


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


def test_late_rows_are_archived_and_their_check_passes(room: Room, instance: dg.DagsterInstance) -> None:
    room.fill(20)
    run(instance)
    room.log("2025-01-20")
    result = run(instance)
    assert result.success
    assert verdicts(result) == dict.fromkeys(CHECKS, True)
    shown = metadata(result)
    assert (shown["outcome"], shown["late_rows"], shown["rows_archived"]) == ("late rows archived", 1, 21)


def test_changed_rows_are_a_warning_and_not_a_failure(room: Room, instance: dg.DagsterInstance) -> None:
    room.fill(20)
    run(instance)
    room.admin.execute(
        "UPDATE audit_logs SET action = 'other' WHERE created_at = (SELECT min(created_at) FROM audit_logs)"
    )
    result = run(instance)
    assert result.success
    (changed,) = [each for each in result.get_asset_check_evaluations() if not each.passed]
    assert (changed.check_name, changed.severity) == ("rows_unchanged", dg.AssetCheckSeverity.WARN)
    assert changed.metadata["changed_rows"].value == 1


# -- several months in one run --------------------------------------------------------------------------------------


def test_a_run_over_several_months_gives_each_its_own_numbers_and_verdicts(
    room: Room, instance: dg.DagsterInstance
) -> None:
    months = [JANUARY, JANUARY.following, JANUARY.following.following]
    for rows, month in enumerate(months, start=1):
        room.fill(rows * 10, month)
    result = run_range(instance, months[0], months[-1])
    assert result.success
    assert materialized(result) == [
        *(("audit_log_archive", month.partition_key) for month in months), ("audit_log_catalog", None)
    ]  # fmt: skip
    assert [metadata(result, month=month)["rows_archived"] for month in months] == [10, 20, 30]
    for month in months:
        assert verdicts(result, month) == dict.fromkeys(CHECKS, True)
    assert statuses(instance) == {month.partition_key: "MATERIALIZED" for month in months}
    for check in CHECKS:
        assert current_verdicts(instance, check) == {month.partition_key: "SUCCEEDED" for month in months}


def test_a_run_of_one_month_looks_like_a_month_of_a_run_of_several(room: Room, instance: dg.DagsterInstance) -> None:
    room.fill(10)
    room.fill(10, JANUARY.following)
    alone = run(instance)
    together = run_range(instance, JANUARY.following, JANUARY.following.following)
    assert metadata(alone).keys() == metadata(together, month=JANUARY.following).keys()
    assert verdicts(alone) == verdicts(together, JANUARY.following)
    assert materialized(alone)[0] == ("audit_log_archive", JANUARY.partition_key)


# case 74
def test_a_failed_month_stops_no_other_and_the_run_ends_red_and_names_it(
    room: Room, instance: dg.DagsterInstance
) -> None:
    months = [JANUARY, JANUARY.following, JANUARY.following.following]
    for month in months:
        room.fill(20, month)
    run_range(instance, *months[1:])
    room.target.bucket.delete(next(key for key in room.data_keys() if months[1].path in key))
    result = run_range(instance, months[0], months[-1])
    assert not result.success
    assert sentence(result).startswith("1 of 3 months failed, the others are archived:\n2025-02: ")
    assert verdicts(result, months[1])["objects_present"] is False
    assert materialized(result) == [("audit_log_archive", month.partition_key) for month in (months[0], months[2])]
    assert statuses(instance)[months[1].partition_key] == "FAILED"
    shown = current_verdicts(instance, "objects_present")
    assert [shown[month.partition_key] for month in months] == ["SUCCEEDED", "FAILED", "SUCCEEDED"]


# case 74
def test_every_failed_month_is_a_red_partition_and_an_alert(
    room: Room, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    room.fill(5)
    monkeypatch.setattr("archive_pipeline.assets.archive_month", raiser(RuntimeError("what nobody foresaw")))
    result = run_range(instance, JANUARY, JANUARY.following)
    assert statuses(instance) == {month.partition_key: "FAILED" for month in (JANUARY, JANUARY.following)}
    with alerts(monkeypatch) as posted:
        alert(instance, result)
    (said,) = posted
    assert "2025-01: RuntimeError" in said
    assert "2025-02: RuntimeError" in said


# case 33
def test_of_two_runs_of_one_month_one_archives_it_and_the_other_says_that_it_is_busy(
    room: Room, instance: dg.DagsterInstance
) -> None:
    room.fill(20)
    with lease(room.shard, room.target.table, JANUARY):
        loser = run(instance)
    winner = run(instance)
    assert not loser.success
    assert sentence(loser).startswith("month 2025-01 is being archived by")
    assert winner.success
    assert metadata(winner)["rows_archived"] == 20
    assert statuses(instance) == {JANUARY.partition_key: "MATERIALIZED"}


# -- when it turns red ----------------------------------------------------------------------------------------------


def test_a_missing_object_fails_its_check_and_stops_what_follows(room: Room, instance: dg.DagsterInstance) -> None:
    room.fill(20)
    run(instance)
    room.target.bucket.delete(room.data_keys()[0])
    result = run(instance)
    assert not result.success
    assert verdicts(result)["objects_present"] is False
    assert materialized(result) == []
    assert sentence(result).startswith("month 2025-01 is archived, but objects_present failed: 1 object(s) are missing")


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
