"""Schedules: when a tick of the sync starts.

Belongs here: the schedule. Does not: finding the work, which the run does, so that the tick takes milliseconds.
https://docs.dagster.io/guides/automate/schedules
"""

from collections.abc import Iterator

import dagster as dg

from scaling.errors import UserError
from scaling.settings import AutomationSettings, SyncScheduleSettings
from sync_pipeline.assets import TickConfig
from sync_pipeline.jobs import calendar_sync

SHARD_TAG = "sync/shard"
"""dagster.yaml allows one run of a shard at a time; the next one waits in the queue."""
WAITING = [dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED]


def calendar_sync_schedule(settings: SyncScheduleSettings, automation: AutomationSettings) -> dg.ScheduleDefinition:
    """Make the schedule.

    Args:
        settings: when, and how many runs.
        automation: whether it is on from the first start.

    Raises:
        UserError: SYNC_CRON is not a cron expression.
    """
    status = dg.DefaultScheduleStatus
    runs = settings.sync_runs_per_tick

    def tick(context: dg.ScheduleEvaluationContext) -> Iterator[dg.RunRequest | dg.SkipReason]:
        requested = 0
        for shard in range(runs):
            waiting = dg.RunsFilter(job_name=calendar_sync.name, statuses=WAITING, tags={SHARD_TAG: str(shard)})
            if context.instance.get_runs_count(waiting):
                continue
            requested += 1
            yield dg.RunRequest(
                run_key=f"{context.scheduled_execution_time.isoformat()}-{shard}",
                run_config=dg.RunConfig(ops={"sync_ticks": TickConfig(shard=shard, of=runs)}),
                tags={SHARD_TAG: str(shard)},
            )
        if not requested:
            yield dg.SkipReason("the runs of earlier ticks still wait in the queue")

    try:
        return dg.ScheduleDefinition(
            name="calendar_sync_schedule",
            job=calendar_sync,
            execution_fn=tick,
            cron_schedule=settings.sync_cron,
            execution_timezone="UTC",
            default_status=status.RUNNING if automation.pipeline_autostart else status.STOPPED,
            description=f"Starts {runs} run{'s' if runs > 1 else ''} of calendar_sync per tick. A shard whose last run "
            "still waits in the queue is left out, so ticks never pile up.",
        )
    except dg.DagsterInvalidDefinitionError:
        raise UserError("SYNC_CRON must be a cron expression of five fields, for example */2 * * * *") from None
