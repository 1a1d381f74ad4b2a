"""Jobs: what one schedule tick or one click runs.

Belongs here: selections, the purge, and their descriptions. Does not: when they run, what is purged
(`event_log_retention`, `history`). https://docs.dagster.io/guides/build/jobs
"""

import time
from datetime import timedelta

import dagster as dg
from pydantic import Field

from scaling.resources import failing_with_a_sentence
from sync_pipeline import call_buckets, event_log_retention, history
from sync_pipeline.assets import sync_report, sync_ticks
from sync_pipeline.checks import CALENDAR_EVENTS
from sync_pipeline.event_log_retention import Retention
from sync_pipeline.resources import SyncResource

calendar_sync = dg.define_asset_job(
    "calendar_sync",
    selection=dg.AssetSelection.assets(sync_ticks),
    description="Sync every calendar that is due, then judge the state of the whole sync.",
    # First out of the queue: a backfill of many months must not delay a tick (measured: by a minute).
    tags={"pipeline": "sync", "dagster/priority": "10"},
)

sync_report_job = dg.define_asset_job(
    "sync_report_job",
    selection=dg.AssetSelection.assets(sync_report),
    description="Report what a day of syncing cost, saved and missed.",
    tags={"pipeline": "sync"},
)


class PurgeConfig(dg.Config):
    """How long things are kept. Every default is safe; no value changes a status that the UI shows."""

    successful_run_days: int = Field(
        default=7, ge=1, le=3650, description="Successful runs of calendar_sync older than this are deleted."
    )
    failed_run_days: int = Field(
        default=30, ge=1, le=3650, description="Failed and cancelled runs of calendar_sync older than this are deleted."
    )
    superseded_event_days: int = Field(
        default=7,
        ge=1,
        le=3650,
        description="Materializations of a workspace older than this are deleted once there is a newer one.",
    )
    sync_runs_days: int = Field(
        default=history.RUNS_DAYS, ge=2, le=3650, description="Rows of sync.runs older than this are deleted."
    )
    counters_days: int = Field(
        default=history.COUNTERS_DAYS,
        ge=62,
        le=3650,
        description="Daily counters (calls, freshness, notifications) older than this are deleted. The threshold of "
        "calls per month needs two months.",
    )
    time_budget_seconds: float = Field(
        default=1200, gt=0, le=7200, description="Stop after this long; the next purge goes on. A run takes 30 ms."
    )
    dry_run: bool = Field(default=False, description="Count what would be deleted, and delete nothing.")


@dg.op(tags={"pipeline": "sync"})
def purge_old_events(context: dg.OpExecutionContext, config: PurgeConfig, sync: SyncResource) -> None:
    """Delete what nobody is shown any more, from Dagster's event log and from the sync's bookkeeping."""
    started = time.monotonic()
    with failing_with_a_sentence():
        purged = event_log_retention.purge(
            context.instance,
            job=calendar_sync.name,
            asset=CALENDAR_EVENTS,
            retention=Retention(
                successful_runs=timedelta(days=config.successful_run_days),
                failed_runs=timedelta(days=config.failed_run_days),
                superseded_events=timedelta(days=config.superseded_event_days),
            ),
            out_of_time=lambda: time.monotonic() - started > config.time_budget_seconds,
            dry_run=config.dry_run,
        )
        rows: dict[str, int] = {}
        with sync.databases() as router:
            for shard in router.shards():
                with shard.transaction() as connection:
                    trimmed = history.trim(
                        connection,
                        runs_days=config.sync_runs_days,
                        counters_days=config.counters_days,
                        dry_run=config.dry_run,
                    )
                    buckets = 0 if config.dry_run else call_buckets.purge(connection)
                for table, count in (*trimmed.rows.items(), ("call_buckets", buckets)):
                    rows[table] = rows.get(table, 0) + count
    context.add_output_metadata(
        {
            **purged.numbers(),
            **{f"sync_{table}_deleted": count for table, count in rows.items()},
            "dry_run": config.dry_run,
        }
    )


@dg.job(
    description="Keep Dagster's event log bounded, which Dagster does not do by itself: delete old runs of "
    "calendar_sync, and materializations of workspaces that newer ones supersede. What the UI shows of an asset, a "
    "partition or a check never changes. Also trims sync.runs and the daily counters. Safe to run at any time; dry_run "
    "only counts.",
    tags={"pipeline": "sync"},
)
def purge_event_log() -> None:
    """The purge."""
    purge_old_events()
