"""Schedules: when episodes and data are looked at.

Belongs here: the hourly schedule. Does not: what is looked at (`scaling.assets`).
https://docs.dagster.io/guides/automate/schedules
"""

import dagster as dg

from scaling.jobs import scaling_health_job
from scaling.settings import AutomationSettings

CRON = "7 * * * *"


def scaling_health_schedule(automation: AutomationSettings) -> dg.ScheduleDefinition:
    """Look every hour.

    Args:
        automation: whether it is on from the first start.
    """
    status = dg.DefaultScheduleStatus
    return dg.ScheduleDefinition(
        name="scaling_health_schedule",
        job=scaling_health_job,
        cron_schedule=CRON,
        execution_timezone="UTC",
        default_status=status.RUNNING if automation.pipeline_autostart else status.STOPPED,
        description="Every hour: show episodes and the health of the data, give up actions that are silent.",
    )
