"""Sensors: the partitions follow the database, and capabilities the thresholds.

Belongs here: comparing workspaces with partitions, which job serves which capability. Does not: syncing, thresholds.
https://docs.dagster.io/guides/automate/sensors
"""

import dagster as dg

from scaling.capabilities import Capability
from scaling.dagster_sensors import capability_sensor
from scaling.databases import DatabaseRouter
from scaling.settings import AutomationSettings
from sync_pipeline import connections
from sync_pipeline.assets import calendar_events
from sync_pipeline.jobs import enable_incremental_sync, enable_parallel_sync
from sync_pipeline.partitions import workspaces
from sync_pipeline.resources import SyncResource

SECONDS_BETWEEN_LOOKS = 60
CHANGES_PER_LOOK = 5000
"""Dagster asks for at most 25,000 changes a tick; 5,000 take half a second."""
IN_FLIGHT = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


def workspaces_sensor(automation: AutomationSettings) -> dg.SensorDefinition:
    """Make the sensor.

    Args:
        automation: whether it is on from the first start.
    """
    status = dg.DefaultSensorStatus

    @dg.sensor(
        name="workspaces_sensor",
        target=[calendar_events],
        minimum_interval_seconds=SECONDS_BETWEEN_LOOKS,
        default_status=status.RUNNING if automation.pipeline_autostart else status.STOPPED,
        description="Adds a partition for every workspace that has a Google connection and removes those whose "
        "workspace is gone. Keeps no cursor: each look compares everything.",
    )
    def sensor(context: dg.SensorEvaluationContext, sync: SyncResource) -> dg.SensorResult | dg.SkipReason:
        with sync.databases() as router:
            wanted = workspace_keys(router)
        if not wanted:
            return dg.SkipReason("no workspace has a Google connection; an empty answer removes nothing")
        present = set(context.instance.get_dynamic_partitions(str(workspaces.name)))
        added = sorted(wanted - present)[:CHANGES_PER_LOOK]
        gone = sorted(present - wanted)[: CHANGES_PER_LOOK - len(added)]
        # Deleting the partition of a run at work would fail that run at its end.
        removed = [key for key in gone if not _in_flight(context.instance, key)]
        if not added and not removed:
            return dg.SkipReason(f"all {len(wanted)} workspaces have their partition")
        return dg.SensorResult(
            dynamic_partitions_requests=[
                *([workspaces.build_add_request(added)] if added else []),
                *([workspaces.build_delete_request(removed)] if removed else []),
            ]
        )

    return sensor


def capability_sensors(automation: AutomationSettings) -> list[dg.SensorDefinition]:
    """Make the sensors that switch on what a crossed threshold asks for.

    Args:
        automation: whether they are on from the first start.
    """
    return [
        capability_sensor(
            Capability.INCREMENTAL_SYNC,
            enable_incremental_sync,
            op="switch_incremental_sync_on",
            resource="sync",
            automation=automation,
        ),
        capability_sensor(
            Capability.PARALLEL_SYNC,
            enable_parallel_sync,
            op="switch_parallel_sync_on",
            resource="sync",
            automation=automation,
        ),
    ]


def workspace_keys(router: DatabaseRouter) -> set[str]:
    """Read the partition key of every workspace that has a Google connection."""
    keys: set[str] = set()
    for shard in router.shards():
        with shard.transaction() as connection:
            keys |= {workspace.partition_key for workspace in connections.connected_workspaces(connection)}
    return keys


def _in_flight(instance: dg.DagsterInstance, key: str) -> bool:
    return instance.get_runs_count(dg.RunsFilter(statuses=IN_FLIGHT, tags={"dagster/partition": key})) > 0
