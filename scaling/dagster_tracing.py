"""Runs and their steps as spans, and the link from a run's page to its trace.

Belongs here: what of Dagster a trace shows. Does not: spans of the work (`scaling.tracing` and whoever does it).

Made in the executor, because it alone sees a run from its first step to its last; no asset or op has to know. What the
executor of a killed run could not end, the sensor of failed runs does (`end_killed`): ids follow from the run's.
`Executor` is public in dagster 1.13; `DagsterEvent.engine_event`, which writes the link, is not, and a test watches it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import cast

import dagster as dg
from dagster._core.events import EngineEventData
from dagster._core.execution.context.system import PlanOrchestrationContext
from dagster._core.execution.plan.plan import ExecutionPlan
from dagster._core.execution.retries import RetryMode
from opentelemetry.trace import Span

from scaling import tracing

PARTITION_TAGS = {
    "dagster/partition": "dagster.partition_key",
    "dagster/asset_partition_range_start": "dagster.partition_range_start",
    "dagster/asset_partition_range_end": "dagster.partition_range_end",
}
STARTS = (dg.DagsterEventType.STEP_START, dg.DagsterEventType.STEP_RESTARTED)
ENDS = {
    dg.DagsterEventType.STEP_SUCCESS: "success",
    dg.DagsterEventType.STEP_FAILURE: "failure",
    dg.DagsterEventType.STEP_UP_FOR_RETRY: "retry",
    dg.DagsterEventType.STEP_SKIPPED: "skipped",
}


class _TracedExecutor(dg.Executor):
    """An executor within the process of the run, whose run and steps are spans."""

    def __init__(self, executor: dg.Executor) -> None:
        self._executor = executor

    @property
    def retries(self) -> RetryMode:
        return self._executor.retries

    def execute(
        self, plan_context: PlanOrchestrationContext, execution_plan: ExecutionPlan
    ) -> Iterator[dg.DagsterEvent]:
        """See `dagster.Executor.execute`."""
        events = self._executor.execute(plan_context, execution_plan)
        run = plan_context.dagster_run
        origin = run.remote_job_origin
        if not tracing.start(origin.location_name if origin else "pipelines"):
            yield from events
            return
        if link := tracing.link_of(run.run_id):
            shown = EngineEventData(metadata={"trace": dg.MetadataValue.url(link)})
            yield dg.DagsterEvent.engine_event(plan_context, "This run is traced.", event_specific_data=shown)
        with _run(run):
            yield from _traced(events, run)


def end_killed(location: str, context: dg.RunFailureSensorContext) -> None:
    """Send the spans that a killed run could not: its own, and that of the step it was at.

    Whoever asked for the end of a run gave its executor time to end them, and so did every failure within it, which
    says its reason.

    Args:
        location: code location of the run.
        context: of the failed run.
    """
    run, instance = context.dagster_run, context.instance
    record = instance.get_run_record_by_id(run.run_id)
    if context.failure_event.event_specific_data is not None or record is None or not record.start_time:
        return
    seen = instance.get_records_for_run(run.run_id, of_type={*STARTS, *ENDS, dg.DagsterEventType.RUN_CANCELING}).records
    open_steps: dict[str, float] = {}
    for each in seen:
        event = each.event_log_entry.get_dagster_event()
        if event.event_type is dg.DagsterEventType.RUN_CANCELING:
            return
        if event.event_type in STARTS:
            open_steps[str(event.step_key)] = each.event_log_entry.timestamp
        else:
            open_steps.pop(str(event.step_key), None)
    if not tracing.start(location):
        return
    ended = record.end_time or time.time()
    with _run(run, at=_period(record.start_time, ended)):
        _say_killed()
        for key, began in open_steps.items():
            with _step(run, key, at=_period(began, ended)):
                _say_killed()
    tracing.stop()


def _say_killed() -> None:
    tracing.ended("failure")
    tracing.failed("killed")


def _period(began: float, ended: float) -> tracing.Period:
    return int(began * 1e9), int(ended * 1e9)


def _run(run: dg.DagsterRun, *, at: tracing.Period | None = None) -> AbstractContextManager[Span]:
    told = {"dagster.job_name": run.job_name, **_partition(run)}
    return tracing.run(run.run_id, f"run {run.job_name}", told, at=at)


def _step(run: dg.DagsterRun, key: str, *, at: tracing.Period | None = None) -> AbstractContextManager[Span]:
    return tracing.step(run.run_id, key, {"dagster.step_key": key, **_partition(run)}, at=at)


def _partition(run: dg.DagsterRun) -> dict[str, str]:
    return {name: run.tags[tag] for tag, name in PARTITION_TAGS.items() if tag in run.tags}


def _traced(events: Iterator[dg.DagsterEvent], run: dg.DagsterRun) -> Iterator[dg.DagsterEvent]:
    """Make a span of what happens between the first and the last event of each step."""
    outcome = "success"
    with ExitStack() as step:
        span: Span | None = None
        for event in events:
            kind = event.event_type
            if kind in STARTS and event.step_key:
                span = step.enter_context(_step(run, event.step_key))
            elif kind in ENDS:
                if kind is dg.DagsterEventType.STEP_FAILURE:
                    outcome = "failure"
                    tracing.failed(_type_of(event))
                if span is not None:
                    span.set_attribute("outcome", ENDS[kind])
                step.close()
                span = None
            yield event
    tracing.ended(outcome)
    if outcome == "failure":
        tracing.failed("a step failed")


def _type_of(event: dg.DagsterEvent) -> str:
    """The type of what ended a step; Dagster wraps it in an error of its own."""
    failure = event.step_failure_data
    if failure.user_failure_data is not None:
        return "dagster.Failure"
    error = failure.error
    while error is not None and error.cause is not None:
        error = error.cause
    return (error.cls_name if error else None) or "unknown"


_CREATE = cast("Callable[[dg.InitExecutorContext], dg.Executor]", dg.in_process_executor.executor_creation_fn)

traced_in_process_executor = dg.ExecutorDefinition(
    name="in_process",
    config_schema=dg.in_process_executor.config_schema,  # type: ignore[arg-type]  # takes what it gives
    description="Dagster's in-process executor; a run is traced where OTEL_EXPORTER_OTLP_ENDPOINT says where to.",
    executor_creation_fn=lambda context: _TracedExecutor(_CREATE(context)),
)
