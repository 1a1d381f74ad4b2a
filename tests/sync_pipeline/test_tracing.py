"""The trace of a tick: its shape, what it says, what it must not say, and that nothing waits for it."""

import json
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator

import dagster as dg
import pytest

from devstack.google_calendar import Simulator
from devstack.otlp import Collector, ReceivedSpan
from scaling import tracing
from sync_pipeline.definitions import build_defs
from tests.sync_pipeline.conftest import Saas
from tests.sync_pipeline.scenes import meeting
from tests.sync_pipeline.test_canaries import FAULTS, Planted, planted, secret_login, sync_with
from tests.traced import execute

__all__ = ["planted", "secret_login"]

Environment = Callable[..., None]

pytestmark = pytest.mark.usefixtures("definitions_load_alone", "sync_environment")

ABOVE = "run calendar_sync > sync_ticks"


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as ephemeral:
        yield ephemeral


def tick(instance: dg.DagsterInstance) -> dg.DagsterRun:
    return execute(build_defs().resolve_job_def("calendar_sync"), instance)


def named(spans: list[ReceivedSpan], name: str) -> list[ReceivedSpan]:
    return [span for span in spans if span.name == name]


def test_a_tick_is_one_tree_of_run_step_workspace_calendar_and_calls(
    google: Simulator, saas: Saas, traces: Collector, instance: dg.DagsterInstance
) -> None:
    workspaces = [saas.workspace() for _ in range(3)]
    for number, workspace in enumerate(workspaces):
        saas.connect(workspace, google.add_user(f"user-{number}@example.com"))
    run = tick(instance)
    assert run.is_success
    shape = Counter(traces.paths())
    assert {path for path in shape if path.startswith("?")} == set()
    assert {span.trace_id for span in traces.spans()} == {tracing.trace_id_of(run.run_id)}
    assert shape[f"{ABOVE} > workspace"] == 3
    assert shape[f"{ABOVE} > workspace > calendar_list > calendarList.list"] == 3
    assert shape[f"{ABOVE} > workspace > calendar > events.list"] == 3
    assert shape[f"{ABOVE} > workspace > calendar > UPDATE sync.calendar_state"] >= 3
    assert shape[f"{ABOVE} > INSERT sync.runs"] == 1
    assert {path.split(" > ")[0] for path in shape} == {"run calendar_sync"}


def test_spans_name_the_tenant_the_outcome_and_what_was_done(
    google: Simulator, saas: Saas, traces: Collector, instance: dg.DagsterInstance
) -> None:
    user = google.add_user("ann@example.com")
    google.edit(user.calendars[0], [{"op": "insert", "event": meeting(n)} for n in range(2)])
    workspace = saas.workspace()
    saas.connect(workspace, user)
    run = tick(instance)
    spans = traces.spans()
    [whole] = named(spans, "run calendar_sync")
    assert whole.attributes["dagster.run_id"] == run.run_id
    assert whole.attributes["outcome"] == "success"
    [step] = named(spans, "sync_ticks")
    assert (step.attributes["count.events_upserted"], step.attributes["outcome"]) == (2, "success")
    [served] = named(spans, "workspace")
    assert served.attributes["tenant.id"] == str(workspace.tenant_id)
    assert served.attributes["dagster.partition_key"] == workspace.partition_key
    assert (served.attributes["outcome"], served.attributes["count.full_syncs"]) == ("healthy", 1)
    [calendar] = named(spans, "calendar")
    assert (calendar.attributes["outcome"], calendar.attributes["count.events_upserted"]) == ("synced", 2)
    for call in named(spans, "events.list"):
        assert call.attributes == {"http.request.method": "GET", "http.response.status_code": 200}
    assert not any(span.is_error for span in spans)


def test_one_workspace_by_hand_has_its_partition_key_on_run_and_step(
    google: Simulator, saas: Saas, traces: Collector, instance: dg.DagsterInstance
) -> None:
    workspace = saas.workspace()
    saas.connect(workspace, google.add_user("ann@example.com"))
    instance.add_dynamic_partitions("workspaces", [workspace.partition_key])
    job = build_defs().resolve_implicit_global_asset_job_def()
    job = job.get_subset(asset_selection={dg.AssetKey("calendar_events")})
    execute(job, instance, dagster__partition=workspace.partition_key)
    found = [span for span in traces.spans() if span.name.startswith("run ") or span.name == "calendar_events"]
    assert [span.attributes["dagster.partition_key"] for span in found] == [workspace.partition_key] * 2


def test_a_refused_grant_marks_calendar_and_run_with_types_and_no_text(
    google: Simulator, saas: Saas, traces: Collector, instance: dg.DagsterInstance
) -> None:
    saas.connect(saas.workspace(), google.add_user("ann@example.com"))
    tick(instance)
    traces.clear()
    google.revoke("ann@example.com")
    assert not tick(instance).is_success
    spans = traces.spans()
    types = {span.name: span.attributes.get("error.type") for span in spans if span.is_error}
    assert types["calendar_list"] == "reauth_required"
    assert types["sync_ticks"] == "dagster.Failure"
    assert types["run calendar_sync"] == "a step failed"
    assert {span.status_message for span in spans} == {""}
    assert {span.events for span in spans} == {()}


def test_lines_about_a_workspace_name_its_trace(
    google: Simulator,
    saas: Saas,
    traces: Collector,
    instance: dg.DagsterInstance,
    caplog: pytest.LogCaptureFixture,
) -> None:
    saas.connect(saas.workspace(), google.add_user("ann@example.com"))
    google.revoke("ann@example.com")
    with caplog.at_level(logging.WARNING, logger="sync_pipeline"):
        run = tick(instance)
    lines = [record.getMessage() for record in caplog.records if record.name == "sync_pipeline"]
    assert lines
    assert all(line.endswith(f"trace_id={tracing.trace_id_of(run.run_id)}") for line in lines)


def test_no_span_tells_a_canary(
    google: Simulator,
    saas: Saas,
    planted: Planted,
    secret_login: None,
    traces: Collector,
    instance: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Row contents, event titles, mail addresses and tokens, in the bytes as they came over the wire."""
    monkeypatch.setattr("sync_pipeline.google_calendar.FIRST_WAIT_SECONDS", 0.001)
    tick(instance)
    for number, fault in enumerate(FAULTS):
        planted.learn_tokens(saas)
        sync_with(google, saas, planted, fault, number)
        tick(instance)
    planted.learn_tokens(saas)
    spans = traces.spans()
    assert {"transient", "protocol", "access_denied", "reauth_required"} <= {
        str(span.attributes.get("error.type")) for span in spans
    }
    assert planted.told_in("".join(body.decode("latin-1") for body in traces.bodies)) == set()


def test_the_runs_page_links_its_trace(
    google: Simulator,
    saas: Saas,
    traces: Collector,
    instance: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRACE_UI_URL", "https://traces.example.com/trace/{trace_id}")
    saas.connect(saas.workspace(), google.add_user("ann@example.com"))
    run = tick(instance)
    links = [
        record.get_dagster_event().engine_event_data.metadata["trace"]
        for record in instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ENGINE_EVENT)
        if "trace" in record.get_dagster_event().engine_event_data.metadata
    ]
    assert links == [dg.MetadataValue.url(f"https://traces.example.com/trace/{tracing.trace_id_of(run.run_id)}")]


PROGRAM = """
import json, sys
import dagster as dg
from sync_pipeline.definitions import defs
from tests.traced import execute
with dg.DagsterInstance.ephemeral() as instance:
    run = execute(defs.resolve_job_def("calendar_sync"), instance)
print(json.dumps({"ok": run.is_success, "sdk": [m for m in sys.modules if m.startswith(
    ("opentelemetry.sdk", "opentelemetry.exporter", "opentelemetry.instrumentation", "scaling.trace_export"))]}))
"""


def test_without_an_endpoint_the_sdk_is_never_imported(google: Simulator, saas: Saas) -> None:
    saas.connect(saas.workspace(), google.add_user("ann@example.com"))
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={name: value for name, value in os.environ.items() if not name.startswith("OTEL_")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(ran.stdout.splitlines()[-1]) == {"ok": True, "sdk": []}
