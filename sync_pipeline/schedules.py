"""Schedules: when a tick of the sync starts; when a day is reported; when old events are purged.

Belongs here: the schedules. Does not: finding the work, which the run does, so that the tick takes milliseconds.
https://docs.dagster.io/guides/automate/schedules
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import dagster as dg

from scaling.errors import UserError
from scaling.settings import AutomationSettings, SyncScheduleSettings
from sync_pipeline.assets import TickConfig
from sync_pipeline.jobs import calendar_sync, purge_event_log, sync_report_job

if TYPE_CHECKING:
    # dagster exports the function but not the type it returns.
    from dagster._core.definitions.partitions.partitioned_schedule import UnresolvedPartitionedAssetScheduleDefinition

SHARD_TAG = "sync/shard"
"""dagster.yaml allows one run of a shard at a time; the next one waits in the queue."""
WAITING = [dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED]
REPORT_MINUTE = 10
"""Past midnight: a tick that started the day before has ended."""
PURGE_CRON = "40 3 * * *"


def calendar_sync_schedule(settings: SyncScheduleSettings, automation: AutomationSettings) -> dg.ScheduleDefinition:
    """Make the schedule.

    Args:
        settings: when, and how many runs.
        automation: whether it is on from the first start.

    Raises:
        UserError: SYNC_CRON is not a cron expression.
    """
    runs = settings.sync_runs_per_tick
    # With push a run stays, so that notifications are followed within seconds though ticks come minutes apart.
    watch_seconds = settings.sync_time_budget_seconds if settings.sync_webhook_url else 0.0

    def tick(context: dg.ScheduleEvaluationContext) -> Iterator[dg.RunRequest | dg.SkipReason]:
        requested = 0
        for shard in range(runs):
            waiting = dg.RunsFilter(job_name=calendar_sync.name, statuses=WAITING, tags={SHARD_TAG: str(shard)})
            if context.instance.get_runs_count(waiting):
                continue
            requested += 1
            yield dg.RunRequest(
                run_key=f"{context.scheduled_execution_time.isoformat()}-{shard}",
                run_config=dg.RunConfig(
                    ops={"sync_ticks": TickConfig(shard=shard, of=runs, watch_seconds=watch_seconds)}
                ),
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
            default_status=_status(automation),
            description=f"Starts {runs} run{'s' if runs > 1 else ''} of calendar_sync per tick. A shard whose last run "
            "still waits in the queue is left out, so ticks never pile up."
            + (f" A run watches for notifications for {watch_seconds:.0f} s." if watch_seconds else ""),
        )
    except dg.DagsterInvalidDefinitionError:
        raise UserError("SYNC_CRON must be a cron expression of five fields, for example */2 * * * *") from None


def sync_report_schedule(
    automation: AutomationSettings,
) -> "dg.ScheduleDefinition | UnresolvedPartitionedAssetScheduleDefinition":
    """Report every day after its end, UTC.

    Args:
        automation: whether it is on from the first start.
    """
    return dg.build_schedule_from_partitioned_job(
        sync_report_job,
        name="sync_report_schedule",
        description="Shortly after midnight UTC: report the day that just ended. A missed tick is made up for.",
        hour_of_day=0,
        minute_of_hour=REPORT_MINUTE,
        default_status=_status(automation),
    )


def purge_event_log_schedule(automation: AutomationSettings) -> dg.ScheduleDefinition:
    """Purge every night.

    Args:
        automation: whether it is on from the first start.
    """
    return dg.ScheduleDefinition(
        name="purge_event_log_schedule",
        job=purge_event_log,
        cron_schedule=PURGE_CRON,
        execution_timezone="UTC",
        default_status=_status(automation),
        description="Every night: delete old runs and superseded events; without it Dagster's database grows for ever.",
    )


def _status(automation: AutomationSettings) -> dg.DefaultScheduleStatus:
    return dg.DefaultScheduleStatus.RUNNING if automation.pipeline_autostart else dg.DefaultScheduleStatus.STOPPED
