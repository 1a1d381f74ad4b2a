"""The Dagster code location of the sync.

Belongs here: putting the pieces together. Does not: any piece.
"""

from collections.abc import Mapping

import dagster as dg

from scaling import logs
from scaling.dagster_tracing import traced_in_process_executor
from scaling.sensors import failure_sensor
from scaling.settings import AutomationSettings, SyncScheduleSettings, load
from sync_pipeline.assets import GOOGLE_CALENDARS, GOOGLE_CONNECTIONS, calendar_events, sync_report, sync_ticks
from sync_pipeline.checks import calendar_events_checks
from sync_pipeline.jobs import (
    calendar_sync,
    enable_incremental_sync,
    enable_parallel_sync,
    purge_event_log,
    sync_report_job,
)
from sync_pipeline.resources import SyncResource
from sync_pipeline.schedules import calendar_sync_schedule, purge_event_log_schedule, sync_report_schedule
from sync_pipeline.sensors import capability_sensors, workspaces_sensor

RUNBOOK = "docs/operations.md#a-workspace-is-red"


def build_defs(*, resources: Mapping[str, object] | None = None) -> dg.Definitions:
    """Make the definitions; no database, Google or secret is needed for it.

    Args:
        resources: in place of the ones that read the environment.

    Raises:
        UserError: a setting that shapes the definitions is wrong.
    """
    logs.configure(in_dagster=True)
    automation = load(AutomationSettings)
    return dg.Definitions(
        assets=[GOOGLE_CALENDARS, GOOGLE_CONNECTIONS, calendar_events, sync_ticks, sync_report],
        asset_checks=[calendar_events_checks],
        jobs=[calendar_sync, sync_report_job, purge_event_log, enable_incremental_sync, enable_parallel_sync],
        schedules=[
            calendar_sync_schedule(load(SyncScheduleSettings), automation),
            sync_report_schedule(automation),
            purge_event_log_schedule(automation),
        ],
        sensors=[
            workspaces_sensor(automation),
            *capability_sensors(automation),
            failure_sensor("sync_pipeline", automation, name="calendar_sync_failure_sensor", runbook=RUNBOOK),
        ],
        resources={"sync": SyncResource(), **(resources or {})},
        # A run is one step that does its own concurrency; a process a step would cost seconds and buys nothing.
        executor=traced_in_process_executor,
    )


defs = build_defs()
