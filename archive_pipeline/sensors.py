"""Sensors: somebody hears of a failed month; crossed thresholds get their plan and their run.

Belongs here: what is said of a failed run, and posting it; which runs episodes of the audit logs get. Does not:
deciding what fails (`archive_pipeline.assets`), or what an action does (`archive_pipeline.capabilities`).
https://docs.dagster.io/guides/automate/run-status-sensors
"""

import json
import logging
import urllib.error
import urllib.request

import dagster as dg

from archive_pipeline.jobs import archive_and_prune, convert_audit_logs, partition_audit_logs
from archive_pipeline.resources import ArchiveResource
from scaling import episodes
from scaling.capabilities import Capability
from scaling.dagster_sensors import EPISODE_TAG, capability_sensor
from scaling.episodes import EpisodeState
from scaling.settings import AutomationSettings, load

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 10
SECONDS_BETWEEN_LOOKS = 30
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


def capability_sensors(automation: AutomationSettings) -> list[dg.SensorDefinition]:
    """Make the sensors that act on the episodes of the audit logs, and the one that shows the plan of a conversion.

    Args:
        automation: whether they are on from the first start.
    """
    return [
        capability_sensor(
            Capability.AUDIT_LOG_PARTITIONING,
            partition_audit_logs,
            op="partition_and_archive",
            resource="archive",
            automation=automation,
        ),
        capability_sensor(
            Capability.AUDIT_LOG_RETENTION,
            archive_and_prune,
            op="archive_past_retention",
            resource="archive",
            automation=automation,
        ),
        plan_sensor(automation),
    ]


def plan_sensor(automation: AutomationSettings) -> dg.SensorDefinition:
    """Make the sensor that has the plan written of every conversion that is proposed, once.

    Args:
        automation: whether it is on from the first start.
    """
    status = dg.DefaultSensorStatus

    @dg.sensor(
        name="audit_log_plan_sensor",
        job=convert_audit_logs,
        minimum_interval_seconds=SECONDS_BETWEEN_LOOKS,
        default_status=status.RUNNING if automation.pipeline_autostart else status.STOPPED,
        description="Launches a dry run of convert_audit_logs for every proposed episode of audit_log_partitioning: "
        "the metadata of its step is the plan that somebody approves. Nothing is changed by it.",
    )
    def sensor(context: dg.SensorEvaluationContext, archive: ArchiveResource) -> dg.SensorResult | dg.SkipReason:
        with archive.databases() as router, router.shards()[0].transaction() as connection:
            proposed = episodes.listing(
                connection, states=[EpisodeState.PROPOSED], capability=Capability.AUDIT_LOG_PARTITIONING
            )
        requests, said = [], []
        for episode in proposed:
            tags = {EPISODE_TAG: str(episode.id)}
            runs = context.instance.get_runs(dg.RunsFilter(job_name=convert_audit_logs.name, tags=tags), limit=1)
            if not runs:
                requests.append(dg.RunRequest(run_key=f"plan of episode {episode.id}", tags=tags))
                continue
            said.append(
                f"The plan of episode {episode.id} is the metadata of run {runs[0].run_id} of "
                f"{convert_audit_logs.name} ({runs[0].status.value.lower()}); approve it in the Launchpad of job "
                f"approve_episode, or with python -m scaling approve {episode.id}."
            )
        if requests:
            return dg.SensorResult(run_requests=requests)
        return dg.SkipReason(" ".join(said) or "No conversion is proposed.")

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
