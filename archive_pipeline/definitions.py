"""The Dagster code location of the archive.

Belongs here: putting the pieces together. Does not: any piece.
"""

from collections.abc import Mapping

import dagster as dg

from archive_pipeline.assets import ATHENA_TABLE, AUDIT_LOGS, archive_assets
from archive_pipeline.jobs import (
    MANUAL,
    archive_and_prune,
    audit_log_archive_job,
    audit_log_upkeep_job,
    partition_audit_logs,
)
from archive_pipeline.partitions import monthly_partitions
from archive_pipeline.resources import ArchiveResource
from archive_pipeline.schedules import monthly_schedule, prune_schedule, upkeep_schedule
from archive_pipeline.sensors import capability_sensors
from scaling import logs
from scaling.dagster_tracing import traced_in_process_executor
from scaling.notifier import Channel
from scaling.sensors import failure_sensor
from scaling.settings import ArchiveSourceSettings, AutomationSettings, load

RUNBOOK = "docs/operations.md#a-month-failed"


def build_defs(*, resources: Mapping[str, object] | None = None) -> dg.Definitions:
    """Make the definitions; no database, bucket or secret is needed for it.

    Args:
        resources: in place of the ones that read the environment.

    Raises:
        UserError: a setting that shapes the definitions is wrong.
    """
    logs.configure(in_dagster=True)
    calendar, automation = load(ArchiveSourceSettings), load(AutomationSettings)
    return dg.Definitions(
        assets=[AUDIT_LOGS, *archive_assets(monthly_partitions(calendar)), ATHENA_TABLE],
        jobs=[audit_log_archive_job, audit_log_upkeep_job, partition_audit_logs, archive_and_prune, *MANUAL],
        schedules=[
            monthly_schedule(calendar, automation),
            upkeep_schedule(calendar, automation),
            prune_schedule(calendar, automation),
        ],
        sensors=[
            failure_sensor(
                "archive_pipeline",
                automation,
                name="audit_log_failure_sensor",
                runbook=RUNBOOK,
                also=[Channel.ARCHIVE_ALERT],
            ),
            *capability_sensors(automation),
        ],
        resources={"archive": ArchiveResource(), **(resources or {})},
        # A run works in one process; a process for each of its steps would cost seconds and buys nothing.
        executor=traced_in_process_executor,
    )


defs = build_defs()
