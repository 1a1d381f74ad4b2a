"""Which runs are traced, and that one that was killed ends in its trace all the same."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from devstack.otlp import Collector
from devstack.processes import CHECKOUT
from scaling.dagster_tracing import traced_in_process_executor
from scaling.definitions import build_defs
from tests.traced import execute

pytestmark = pytest.mark.usefixtures("definitions_load_alone")

KILLED = """
import os, signal, time
import dagster as dg
from scaling import tracing
from scaling.dagster_tracing import traced_in_process_executor
from tests.traced import execute

@dg.op
def done():
    pass

@dg.op(ins={"after": dg.In(dg.Nothing)})
def works():
    with tracing.span("piece"):
        pass
    time.sleep(1)  # sent meanwhile
    os.kill(os.getpid(), signal.SIGKILL)

@dg.job(executor_def=traced_in_process_executor)
def some_job():
    works(after=done())

with dg.DagsterInstance.get() as instance:
    execute(some_job, instance)
"""


def look(instance: dg.DagsterInstance, run: dg.DagsterRun, failure: dg.DagsterEvent) -> None:
    sensor = build_defs().get_sensor_def("scaling_failure_sensor")
    sensor(
        dg.build_run_status_sensor_context(
            sensor_name=sensor.name, dagster_event=failure, dagster_instance=instance, dagster_run=run
        ).for_run_failure()
    )


@pytest.mark.parametrize("location", ["sync_pipeline", "archive_pipeline", "scaling"])
def test_every_job_of_every_location_is_traced(location: str) -> None:
    defs: dg.Definitions = importlib.import_module(f"{location}.definitions").build_defs()
    jobs = defs.get_repository_def().get_all_jobs()
    assert len(jobs) >= 3
    assert [job.name for job in jobs if job.executor_def is not traced_in_process_executor] == []


def test_the_sensor_of_failed_runs_ends_the_run_and_the_step_that_were_killed(
    settings_environment: Callable[..., None], traces: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings_environment()
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    subprocess.run([sys.executable, "-c", KILLED], cwd=CHECKOUT, env=dict(os.environ), check=False)
    assert sorted(traces.paths()) == ["? > done", "? > piece"]
    with dg.DagsterInstance.get() as instance:
        [run] = instance.get_runs()
        look(instance, run, instance.report_run_failed(run))  # as run monitoring does
    assert sorted(traces.paths()) == [
        "run some_job",
        "run some_job > done",
        "run some_job > works",
        "run some_job > works > piece",
    ]
    ended = {span.name: span for span in traces.spans()}
    for name in ("run some_job", "works"):
        assert ended[name].is_error
        assert (ended[name].attributes["outcome"], ended[name].attributes["error.type"]) == ("failure", "killed")
    assert 1 <= ended["works"].seconds <= ended["run some_job"].seconds
    assert ended["run some_job"].attributes["dagster.run_id"] == run.run_id


@pytest.mark.parametrize("ends", ["by itself", "terminated"])
def test_a_run_whose_executor_ended_it_is_not_ended_twice(
    ends: str, settings_environment: Callable[..., None], traces: Collector
) -> None:
    settings_environment()

    @dg.op
    def fails(context: dg.OpExecutionContext) -> None:
        if ends == "terminated":
            context.instance.report_run_canceling(context.run)
        raise dg.Failure("no")

    @dg.job(executor_def=traced_in_process_executor)
    def some_job() -> None:
        fails()

    with dg.DagsterInstance.ephemeral() as instance:
        run = execute(some_job, instance)
        if ends == "terminated":
            failure = instance.report_run_failed(run)
        else:
            [record] = instance.get_records_for_run(run.run_id, of_type=dg.DagsterEventType.RUN_FAILURE).records
            failure = record.event_log_entry.get_dagster_event()
        look(instance, run, failure)
    assert sorted(traces.paths()) == ["run some_job", "run some_job > fails"]
