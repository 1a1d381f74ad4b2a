"""The Dagster code location of the thresholds.

Belongs here: putting the pieces together. Does not: any piece; or the sensors of the capabilities, which stand in the
code location whose job they launch.
"""

from collections.abc import Mapping

import dagster as dg

from scaling import logs
from scaling.assets import scaling_data_health, scaling_episodes, scaling_forecasts, scaling_metrics, scaling_report
from scaling.dagster_tracing import traced_in_process_executor
from scaling.jobs import MANUAL, scaling_forecasts_job, scaling_metrics_job, scaling_report_job
from scaling.resources import ScalingResource
from scaling.schedules import schedules
from scaling.sensors import failure_sensor, notifications_sensor
from scaling.settings import AutomationSettings, load

RUNBOOK = "docs/operations.md#a-run-died"


def build_defs(*, resources: Mapping[str, object] | None = None) -> dg.Definitions:
    """Make the definitions; no database, source or secret is needed for it.

    Args:
        resources: in place of the ones that read the environment.

    Raises:
        UserError: a setting that shapes the definitions is wrong.
    """
    logs.configure(in_dagster=True)
    automation = load(AutomationSettings)
    return dg.Definitions(
        assets=[scaling_metrics, scaling_forecasts, scaling_episodes, scaling_data_health, scaling_report],
        jobs=[scaling_metrics_job, scaling_forecasts_job, scaling_report_job, *MANUAL],
        schedules=schedules(automation),
        sensors=[
            notifications_sensor(automation),
            failure_sensor("scaling", automation, name="scaling_failure_sensor", runbook=RUNBOOK),
        ],
        resources={"scaling": ScalingResource(), **(resources or {})},
        # A run is a few short steps; a process for each would cost seconds and buys nothing.
        executor=traced_in_process_executor,
    )


defs = build_defs()
