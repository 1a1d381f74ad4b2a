"""Schedules: when the metrics are measured and reported, and when their thresholds are forecast.

Belongs here: the hourly and the daily schedules. Does not: what is measured (`scaling.catalogue`).
https://docs.dagster.io/guides/automate/schedules
"""

import dagster as dg

from scaling.jobs import scaling_forecasts_job, scaling_metrics_job, scaling_report_job
from scaling.settings import AutomationSettings

HOURLY = "7 * * * *"
REPORTED = "12 * * * *"
"""After the metrics of the hour."""
DAILY = "20 0 * * *"


def schedules(automation: AutomationSettings) -> list[dg.ScheduleDefinition]:
    """Measure and report every hour, forecast every day.

    Args:
        automation: whether they are on from the first start.
    """
    status = dg.DefaultScheduleStatus
    on = status.RUNNING if automation.pipeline_autostart else status.STOPPED
    return [
        dg.ScheduleDefinition(
            name="scaling_metrics_schedule",
            job=scaling_metrics_job,
            cron_schedule=HOURLY,
            execution_timezone="UTC",
            default_status=on,
            description="Every hour: measure what is due, judge every threshold, look after episodes.",
        ),
        dg.ScheduleDefinition(
            name="scaling_report_schedule",
            job=scaling_report_job,
            cron_schedule=REPORTED,
            execution_timezone="UTC",
            default_status=on,
            description="Every hour: the page for people without Grafana, from what was recorded.",
        ),
        dg.ScheduleDefinition(
            name="scaling_forecasts_schedule",
            job=scaling_forecasts_job,
            cron_schedule=DAILY,
            execution_timezone="UTC",
            default_status=on,
            description="Every day: when each threshold will be crossed, with pictures of the nearest.",
        ),
    ]
