"""Sensors: crossed thresholds get their plan and their run.

Belongs here: which runs episodes of the audit logs get. Does not: what an action does
(`archive_pipeline.capabilities`), or who hears of a failed month (`scaling.sensors`).
https://docs.dagster.io/guides/automate/sensors
"""

import dagster as dg

from archive_pipeline.jobs import archive_and_prune, convert_audit_logs, partition_audit_logs
from archive_pipeline.resources import ArchiveResource
from scaling import episodes
from scaling.capabilities import Capability
from scaling.dagster_sensors import EPISODE_TAG, capability_sensor
from scaling.episodes import EpisodeState
from scaling.settings import AutomationSettings

SECONDS_BETWEEN_LOOKS = 30


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
