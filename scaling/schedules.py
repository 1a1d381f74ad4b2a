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
    return [
        dg.ScheduleDefinition(
            name=name,
            job=job,
            cron_schedule=cron,
            execution_timezone="UTC",
            default_status=status.RUNNING if automation.pipeline_autostart else status.STOPPED,
            description=description,
        )
        for name, job, cron, description in (
            (
                "scaling_metrics_schedule",
                scaling_metrics_job,
                HOURLY,
                "Every hour: measure what is due, judge every threshold, look after episodes.",
            ),
            (
                "scaling_report_schedule",
                scaling_report_job,
                REPORTED,
                "Every hour: the page for people without Grafana, from what was recorded.",
            ),
            (
                "scaling_forecasts_schedule",
                scaling_forecasts_job,
                DAILY,
                "Every day: when each threshold will be crossed, with pictures of the nearest.",
            ),
        )
    ]
