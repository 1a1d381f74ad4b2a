"""The Dagster layer: what loads, what a run shows, when it turns red."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from archive_pipeline.definitions import build_defs
from archive_pipeline.months import Month
from tests.archive_pipeline.conftest import JANUARY, Room

KEY = dg.AssetKey("audit_log_archive")


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
    (event,) = [e for e in result.get_asset_materialization_events() if e.asset_key == dg.AssetKey(asset)]
    return {name: value.value for name, value in event.materialization.metadata.items()}


def sentence(result: dg.ExecuteInProcessResult) -> str:
    (failure,) = [event for event in result.all_events if event.is_step_failure]
    data = failure.step_failure_data
    assert data.user_failure_data is not None
    return str(data.user_failure_data.description)


def test_the_definitions_load_in_a_fresh_interpreter_with_an_empty_environment() -> None:
    loaded = subprocess.run(
        [
            sys.executable,
            "-c",
            "import archive_pipeline.definitions as d; dg = d.dg; dg.Definitions.validate_loadable(d.defs)",
        ],
        env={"PATH": os.environ["PATH"], "PYTHONWARNINGS": "error::DeprecationWarning:archive_pipeline"},
        capture_output=True,
        text=True,
    )
    assert loaded.returncode == 0, loaded.stderr


def test_a_run_archives_a_month_and_shows_what_an_operator_wants_to_know(
    room: Room, instance: dg.DagsterInstance
) -> None:
    room.fill(500)
    result = run(instance)

    assert result.success
    assert verdicts(result) == dict.fromkeys(
        ["rows_equal", "digest_equal", "bounds_inside_month", "objects_present", "no_late_rows"], True
    )
    shown = metadata(result)
    assert (shown["rows_archived"], shown["rows_verified"], shown["dagster/partition_row_count"]) == (500, 500, 500)
    assert shown["parquet_bytes"] == sum(part.size for part in room.manifests()[0].manifest.parts)
    assert "CREATE EXTERNAL TABLE" in str(metadata(result, "audit_log_catalog")["ddl"])


def test_a_run_with_missing_settings_fails_with_the_sentence_that_names_them(
    room: Room, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ARCHIVE_BUCKET")
    result = run(instance)
    assert not result.success
    assert sentence(result).startswith("ARCHIVE_BUCKET is not set")
