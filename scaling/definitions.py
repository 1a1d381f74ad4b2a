"""The Dagster code location of the thresholds.

Belongs here: putting the pieces together. Does not: any piece; or the sensors of the capabilities, which stand in the
code location whose job they launch.
"""

from collections.abc import Mapping

import dagster as dg

from scaling.assets import scaling_data_health, scaling_episodes
from scaling.jobs import MANUAL, scaling_health_job
from scaling.resources import ScalingResource
from scaling.schedules import scaling_health_schedule
from scaling.settings import AutomationSettings, load


def build_defs(*, resources: Mapping[str, object] | None = None) -> dg.Definitions:
    """Make the definitions; no database, source or secret is needed for it.

    Args:
        resources: in place of the ones that read the environment.

    Raises:
        UserError: a setting that shapes the definitions is wrong.
    """
    return dg.Definitions(
        assets=[scaling_episodes, scaling_data_health],
        jobs=[scaling_health_job, *MANUAL],
        schedules=[scaling_health_schedule(load(AutomationSettings))],
        resources={"scaling": ScalingResource(), **(resources or {})},
        # A run is two short steps; a process for each would cost seconds and buys nothing.
        executor=dg.in_process_executor,
    )


defs = build_defs()
