"""Schedules: when months are archived and pruned, and the archive looked after, without anybody asking.

Belongs here: the monthly and the two nightly schedules. Does not: whether a month is closed or may go, which the
database decides. https://docs.dagster.io/guides/automate/schedules
"""

import math
from typing import TYPE_CHECKING

import dagster as dg

from archive_pipeline.jobs import audit_log_archive_job, audit_log_upkeep_job, prune_audit_logs
from scaling.settings import ArchiveSourceSettings, AutomationSettings, load

if TYPE_CHECKING:
    # dagster exports the function but not the type it returns.
    from dagster._core.definitions.partitions.partitioned_schedule import UnresolvedPartitionedAssetScheduleDefinition

HOURS_AFTER_GRACE = 3
UPKEEP = "30 2 * * *"
PRUNE = "30 4 * * *"
"""After the hour in which a month is archived by default."""


def monthly_schedule(
    calendar: ArchiveSourceSettings, automation: AutomationSettings
) -> "dg.ScheduleDefinition | UnresolvedPartitionedAssetScheduleDefinition":
    """Archive the month that just ended, three hours after its grace period, in the archive's time zone.

    Args:
        calendar: how long the grace period is.
        automation: whether the schedule is on from the first start.
    """
    hours = math.ceil(calendar.archive_grace_seconds / 3600) + HOURS_AFTER_GRACE
    return dg.build_schedule_from_partitioned_job(
        audit_log_archive_job,
        name="audit_log_archive_schedule",
        description="Once a month: archive the month that just ended, and refresh what Athena sees. A missed tick is "
        "made up for.",
        hour_of_day=hours % 24,
        day_of_month=1 + hours // 24,
        default_status=_status(automation),
    )


def upkeep_schedule(calendar: ArchiveSourceSettings, automation: AutomationSettings) -> dg.ScheduleDefinition:
    """Look after the partitions and the chain, every night in the archive's time zone.

    Args:
        calendar: the time zone.
        automation: whether the schedule is on from the first start.
    """
    return dg.ScheduleDefinition(
        name="audit_log_upkeep_schedule",
        job=audit_log_upkeep_job,
        cron_schedule=UPKEEP,
        execution_timezone=calendar.archive_time_zone,
        description="Every night: make partitions for the months to come, and audit the chain of the archive.",
        default_status=_status(automation),
    )


def prune_schedule(calendar: ArchiveSourceSettings, automation: AutomationSettings) -> dg.ScheduleDefinition:
    """Prune what may go, every night in the archive's time zone; nothing while ARCHIVE_PRUNE is off.

    Args:
        calendar: the time zone.
        automation: whether the schedule is on from the first start.
    """

    @dg.schedule(
        name="audit_log_prune_schedule",
        job=prune_audit_logs,
        cron_schedule=PRUNE,
        execution_timezone=calendar.archive_time_zone,
        description="Every night, unless ARCHIVE_PRUNE is off: finish what a dead run left, record proposals, "
        "drop what was approved or, with auto, whatever may go.",
        default_status=_status(automation),
    )
    def schedule() -> dg.RunRequest | dg.SkipReason:
        if load(ArchiveSourceSettings).archive_prune == "off":
            return dg.SkipReason("ARCHIVE_PRUNE is off")
        return dg.RunRequest(run_config={"ops": {"prune_partitions": {"config": {"dry_run": False}}}})

    return schedule


def _status(automation: AutomationSettings) -> dg.DefaultScheduleStatus:
    return dg.DefaultScheduleStatus.RUNNING if automation.pipeline_autostart else dg.DefaultScheduleStatus.STOPPED
