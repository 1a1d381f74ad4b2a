"""Jobs: what one schedule tick or one click runs.

Belongs here: selections, the purge, the switches of capabilities, and their descriptions. Does not: when they run,
what is purged (`event_log_retention`, `history`), what a capability does (`services`, `tick`). https://docs.dagster.io/guides/build/jobs
"""

import time
from datetime import timedelta

import dagster as dg
from pydantic import Field

from scaling import capabilities, episodes
from scaling.capabilities import Capability
from scaling.episodes import ClaimLostError
from scaling.errors import UserError
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


CLAIM_LEASE = timedelta(minutes=10)
"""The switch is one transaction of milliseconds; a run that is silent for so long is dead."""


class SwitchConfig(dg.Config):
    """Which crossing of a threshold asks for the switch."""

    episode: int = Field(ge=1, description="Its number, as asset scaling_episodes and the sensor name it.")


def _switch_on(
    capability: Capability, config: SwitchConfig, context: dg.OpExecutionContext, sync: SyncResource
) -> None:
    """Switch a capability on for an approved episode; somebody else's episode is left alone."""
    with failing_with_a_sentence(), sync.databases() as router:
        shard = router.shards()[0]
        with shard.transaction() as connection:
            asked = episodes.get(connection, config.episode)
            if asked.capability is not capability:
                raise UserError(f"episode {asked.id} is not about {capability}; launch the job of {asked.capability}")
            claimed = episodes.claim(connection, config.episode, context.run.run_id, CLAIM_LEASE)
        if claimed is None:
            context.log.info("Episode %s is %s: somebody else's, or not approved.", asked.id, asked.state)
            context.add_output_metadata({"outcome": "somebody else's, or not approved", "state": asked.state.value})
            return
        episode = claimed.episode
        reason = f"{episode.rule} is {episode.value:,.10g}, threshold {episode.threshold:,.10g}" + (
            f" ({episode.dims})" if episode.dims else ""
        )
        try:
            with shard.transaction() as connection:
                switched = capabilities.switch(
                    connection,
                    capability,
                    on=True,
                    by=f"{episode.rule}, approved by {episode.approved_by}",
                    reason=reason,
                    episode_id=episode.id,
                )
                episodes.finish(connection, claimed, {"capability": capability.value, "switched": switched})
        except ClaimLostError:
            context.log.info("Episode %s is somebody else's by now; nothing was switched.", episode.id)
            context.add_output_metadata({"outcome": "somebody else's"})
            return
        outcome = "switched on" if switched else "was on already"
        context.log.info("%s %s: %s. The next tick of the sync works with it.", capability, outcome, reason)
        context.add_output_metadata({"outcome": outcome, "reason": reason})


@dg.op(tags={"pipeline": "sync"})
def switch_incremental_sync_on(context: dg.OpExecutionContext, config: SwitchConfig, sync: SyncResource) -> None:
    """Switch incremental sync on for an approved episode."""
    _switch_on(Capability.INCREMENTAL_SYNC, config, context, sync)


@dg.op(tags={"pipeline": "sync"})
def switch_parallel_sync_on(context: dg.OpExecutionContext, config: SwitchConfig, sync: SyncResource) -> None:
    """Switch the parallel sync on for an approved episode."""
    _switch_on(Capability.PARALLEL_SYNC, config, context, sync)


@dg.job(
    description="Switch incremental sync on because a threshold was crossed: from the next tick on sync tokens, push "
    "and adaptive polling are used. Acts on an approved episode once, however often it is launched.",
    tags={"pipeline": "sync"},
)
def enable_incremental_sync() -> None:
    """The switch."""
    switch_incremental_sync_on()


@dg.job(
    description="Switch parallel sync on because a threshold was crossed: from the next tick on all that is due is "
    "served by the pool of workers. Acts on an approved episode once, however often it is launched.",
    tags={"pipeline": "sync"},
)
def enable_parallel_sync() -> None:
    """The switch."""
    switch_parallel_sync_on()
