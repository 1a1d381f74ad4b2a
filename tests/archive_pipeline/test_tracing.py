"""The trace of an archived month: its shape, what it says, and what it must not say."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from archive_pipeline.definitions import build_defs
from devstack.otlp import Collector
from scaling import tracing
from tests.archive_pipeline.conftest import JANUARY, Room
from tests.archive_pipeline.test_prune import january
from tests.traced import execute

__all__ = ["january"]

pytestmark = pytest.mark.usefixtures("definitions_load_alone")

MARK = "c4n4ry"
ABOVE = "run audit_log_archive_job > audit_log_archive > month"


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral(tempdir=str(tmp_path)) as ephemeral:
        yield ephemeral


def archive(instance: dg.DagsterInstance) -> dg.DagsterRun:
    job = build_defs().resolve_job_def("audit_log_archive_job")
    return execute(job, instance, dagster__partition=JANUARY.partition_key)


def test_a_month_is_one_tree_of_run_step_month_and_the_steps_of_its_publication(
    room: Room, traces: Collector, instance: dg.DagsterInstance
) -> None:
    room.fill(500)
    run = archive(instance)
    assert run.is_success
    shape = Counter(traces.paths())
    assert {path for path in shape if path.startswith("?") or not path.startswith("run ")} == set()
    assert {span.trace_id for span in traces.spans()} == {tracing.trace_id_of(run.run_id)}
    for step in ("extract", "encode", "match", "upload", "verify", "publish"):
        assert shape[f"{ABOVE} > {step}"] == 1
    assert shape[f"{ABOVE} > extract > read"] >= 1
    # In threads of their own:
    assert shape[f"{ABOVE} > upload > S3.PutObject"] >= 1
    assert shape[f"{ABOVE} > upload > INSERT archive.uploads"] >= 1
    assert shape[f"{ABOVE} > verify > S3.GetObject"] >= 1
    assert shape[f"{ABOVE} > publish > S3.PutObject"] >= 1
    # S3 was asked for protections and objects that are not there, which is an answer.
    assert {span.attributes.get("http.status_code") for span in traces.spans()} >= {404}
    assert {span.name: span.attributes for span in traces.spans() if span.is_error} == {}


def test_a_months_span_has_its_partition_key_outcome_and_counts(
    room: Room, traces: Collector, instance: dg.DagsterInstance
) -> None:
    room.fill(500)
    archive(instance)
    archive(instance)
    months = [span for span in traces.spans() if span.name == "month"]
    assert [span.attributes["outcome"] for span in months] == ["archived", "unchanged"]
    assert {span.attributes["dagster.partition_key"] for span in months} == {JANUARY.partition_key}
    assert {span.attributes["count.rows"] for span in months} == {500}
    [extract] = [span for span in traces.spans() if span.name == "extract"]
    reads = [span.attributes["count.rows"] for span in traces.spans() if span.name == "read"]
    assert extract.attributes["count.rows"] == sum(int(str(rows)) for rows in reads) == 500


def test_a_month_that_fails_is_red_from_the_call_to_the_run_and_tells_no_row(
    room: Room, traces: Collector, instance: dg.DagsterInstance
) -> None:
    room.log("2025-01-05T12:00:00Z", action=f"{MARK} action", details={"mail": f"{MARK}@example.com"})
    room.admin.execute("ALTER TABLE audit_logs ADD COLUMN score numeric(5, 2)")
    room.admin.execute("UPDATE audit_logs SET score = 'NaN'")
    assert not archive(instance).is_success
    spans = traces.spans()
    failed = {span.name: span.attributes["error.type"] for span in spans if span.is_error}
    assert failed["month"] == "scaling.errors.UserError"
    assert failed["audit_log_archive"] == "dagster.Failure"
    assert "run audit_log_archive_job" in failed
    assert {(span.status_message, span.events) for span in spans} == {("", ())}
    assert MARK not in "".join(body.decode("latin-1") for body in traces.bodies)


def test_no_span_of_an_archived_month_tells_a_row_or_a_credential(
    room: Room, traces: Collector, instance: dg.DagsterInstance
) -> None:
    identifier = room.log("2025-01-05T12:00:00Z", action=f"{MARK} action", details={"mail": f"{MARK}@example.com"})
    assert archive(instance).is_success
    room.log("2025-01-06T12:00:00Z", action=f"{MARK} late")
    assert archive(instance).is_success
    [late] = [span for span in traces.spans() if span.attributes.get("outcome") == "late rows archived"]
    assert late.attributes["count.late_rows"] == 1
    told = "".join(body.decode("latin-1") for body in traces.bodies)
    environment = {**room.database.environment(), **room.bucket.environment()}
    hidden = {
        MARK,
        str(identifier),
        *(value for name, value in environment.items() if "SECRET" in name or "URL" in name),
    }
    assert {each for each in hidden if each in told} == set()


@pytest.mark.lockable_bucket
def test_a_prune_shows_its_detach_and_its_drop(
    january: Room, traces: Collector, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCHIVE_PRUNE", "auto")
    monkeypatch.setenv("ARCHIVE_RETENTION_MONTHS", "1")
    monkeypatch.setenv("DATABASE_OWNER_URL", january.database.owner_dsn)
    job = build_defs().resolve_implicit_global_asset_job_def()
    job = job.get_subset(asset_selection={dg.AssetKey("audit_log_pruned")})
    run = execute(job, instance, dagster__partition=JANUARY.partition_key)
    assert run.is_success
    above = f"run {run.job_name} > audit_log_pruned"
    shape = Counter(traces.paths())
    assert shape[f"{above} > detach > ALTER public.audit_logs"] >= 1
    assert shape[f"{above} > detach > month"] == 1, "compared once more before it"
    assert shape[f"{above} > drop"] == 1
