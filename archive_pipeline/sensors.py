"""Sensors: somebody hears of a failed month.

Belongs here: what is said of a failed run, and posting it. Does not: deciding what fails (`archive_pipeline.assets`).
https://docs.dagster.io/guides/automate/run-status-sensors
"""

import json
import logging
import urllib.error
import urllib.request

import dagster as dg

from scaling.settings import AutomationSettings, load

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 10
TEXT_LENGTH = 3000
"""Slack cuts a block off after so many characters."""


def failure_sensor(automation: AutomationSettings) -> dg.SensorDefinition:
    """Make the sensor.

    Args:
        automation: whether it is on from the first start.
    """
    status = dg.DefaultSensorStatus

    @dg.run_failure_sensor(
        name="audit_log_failure_sensor",
        monitor_all_code_locations=False,
        default_status=status.RUNNING if automation.pipeline_autostart else status.STOPPED,
        description="Posts the sentence of every failed run of the archive to ARCHIVE_ALERT_URL; without one it writes "
        "it to the daemon's log.",
    )
    def sensor(context: dg.RunFailureSensorContext) -> dg.SkipReason | None:
        said = text(context)
        url = load(AutomationSettings).archive_alert_url
        if url is None:
            logger.error("%s", said)
            return dg.SkipReason("ARCHIVE_ALERT_URL is not set; the failure is in the daemon's log")
        _post(url.get_secret_value(), said)
        return None

    return sensor


def text(context: dg.RunFailureSensorContext) -> str:
    """Say what failed.

    Args:
        context: of the failed run.
    """
    run = context.dagster_run
    reasons = [
        (data.user_failure_data.description if data.user_failure_data else None) or "see the run's log"
        for data in (event.step_failure_data for event in context.get_step_failure_events())
    ]
    name = "the archive" if run.job_name.startswith("__") else run.job_name
    months = run.tags.get("dagster/partition") or " to ".join(
        run.tags[tag]
        for tag in ("dagster/asset_partition_range_start", "dagster/asset_partition_range_end")
        if tag in run.tags
    )
    said = f"Run {run.run_id} of {name}{f' ({months})' if months else ''} failed: "
    return (said + ("\n".join(reasons) or context.failure_event.message or "see the run's log"))[:TEXT_LENGTH]


def _post(url: str, said: str) -> None:
    request = urllib.request.Request(  # noqa: S310 - the setting admits https only
        url, json.dumps({"text": said}).encode(), {"Content-Type": "application/json"}
    )
    try:
        urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS).close()  # noqa: S310
    except urllib.error.URLError as error:  # the address is a secret, and may stand in the error
        raise dg.Failure(
            f"ARCHIVE_ALERT_URL did not take an alert ({type(error).__name__}); the failure itself: {said}"
        ) from None
