"""Schedules: when a month is archived without anybody asking.

Belongs here: the monthly schedule. Does not: whether the month is closed, which the database decides.
https://docs.dagster.io/guides/automate/schedules
"""

import math
from typing import TYPE_CHECKING

import dagster as dg

from archive_pipeline.jobs import audit_log_archive_job
from scaling.settings import ArchiveSourceSettings, AutomationSettings

if TYPE_CHECKING:
    # dagster exports the function but not the type it returns.
    from dagster._core.definitions.partitions.partitioned_schedule import UnresolvedPartitionedAssetScheduleDefinition

HOURS_AFTER_GRACE = 3


def monthly_schedule(
    calendar: ArchiveSourceSettings, automation: AutomationSettings
) -> "dg.ScheduleDefinition | UnresolvedPartitionedAssetScheduleDefinition":
    """Archive the month that just ended, three hours after its grace period, in the archive's time zone.

    Args:
        calendar: how long the grace period is.
        automation: whether the schedule is on from the first start.
    """
    hours = math.ceil(calendar.archive_grace_seconds / 3600) + HOURS_AFTER_GRACE
    status = dg.DefaultScheduleStatus
    return dg.build_schedule_from_partitioned_job(
        audit_log_archive_job,
        name="audit_log_archive_schedule",
        description="Once a month: archive the month that just ended. A missed tick is made up for.",
        hour_of_day=hours % 24,
        day_of_month=1 + hours // 24,
        default_status=status.RUNNING if automation.pipeline_autostart else status.STOPPED,
    )
