"""Jobs: what one schedule tick or one click runs.

Belongs here: selections and their descriptions. Does not: when they run. https://docs.dagster.io/guides/build/jobs
"""

import dagster as dg

from sync_pipeline.assets import sync_ticks
from sync_pipeline.checks import calendar_events_checks

calendar_sync = dg.define_asset_job(
    "calendar_sync",
    selection=dg.AssetSelection.assets(sync_ticks) | dg.AssetSelection.checks(calendar_events_checks),
    description="Sync every calendar that is due, then judge the state of the whole sync.",
    # First out of the queue: a backfill of many months must not delay a tick (measured: by a minute).
    tags={"pipeline": "sync", "dagster/priority": "10"},
)
