"""Asking Dagster's daemon for a backfill, as the UI does.

Belongs here: the private API of dagster 1.13 for it, which is pinned to the minor, and nothing else;
tests/archive_pipeline/test_capabilities.py watches it. Does not: which months are to be archived.
"""

import time
from collections.abc import Sequence

import dagster as dg
from dagster._core.definitions.assets.graph.asset_graph import AssetGraph
from dagster._core.execution.backfill import BulkActionsFilter, BulkActionStatus, PartitionBackfill

from archive_pipeline.assets import archive_assets
from archive_pipeline.checks import ARCHIVE
from archive_pipeline.months import Month
from archive_pipeline.partitions import monthly_partitions
from scaling.settings import ArchiveSourceSettings


def ask_for_archive(
    instance: dg.DagsterInstance, settings: ArchiveSourceSettings, months: Sequence[Month], episode: int
) -> tuple[str | None, list[str]]:
    """Ask for a backfill of the months that no backfill under way archives.

    Dagster keeps the ids of backfills unique, and an episode numbers its own. So of two runs that ask at once one
    fails, and a run that died after it asked is not repeated.

    Args:
        instance: where the daemon finds the backfill.
        settings: the calendar of the months.
        months: closed, and not archived.
        episode: that led to it.

    Returns:
        The backfill asked for, None when there is nothing to ask for; and those under way that archive such months.
    """
    graph = AssetGraph.from_assets(archive_assets(monthly_partitions(settings)))
    wanted = {month.partition_key for month in months}
    elsewhere: list[str] = []
    for backfill in instance.get_backfills(filters=BulkActionsFilter(statuses=[BulkActionStatus.REQUESTED])):
        if not backfill.is_asset_backfill or ARCHIVE not in (backfill.asset_selection or ()):
            continue
        subset = backfill.get_asset_backfill_data(graph).get_target_partitions_subset(ARCHIVE)
        if taken := wanted & set(subset.get_partition_keys()):
            wanted -= taken
            elsewhere.append(backfill.backfill_id)
    if not wanted:
        return None, elsewhere
    number = 1
    while instance.get_backfill(f"audit-logs-{episode}-{number}"):
        number += 1
    backfill_id = f"audit-logs-{episode}-{number}"
    instance.add_backfill(
        PartitionBackfill.from_asset_partitions(
            backfill_id=backfill_id,
            asset_graph=graph,
            partition_names=sorted(wanted),
            asset_selection=[ARCHIVE],
            backfill_timestamp=time.time(),
            tags={"pipeline": "archive", "scaling/episode": str(episode)},
            dynamic_partitions_store=instance,
            all_partitions=False,
            title=f"Archive of {len(wanted)} closed month(s) for episode {episode}",
            description="Asked for by partition_audit_logs, after the table was converted.",
            run_config=None,
        )
    )
    return backfill_id, elsewhere
