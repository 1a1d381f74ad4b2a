"""Dagster's event log, written in batches: the one place that touches Dagster's private APIs.

Belongs here: materializations and planned materializations of single partitions, from within a run; which partitions
are shown as failed. Does not: deciding which should be; removing old events (`event_log_retention`).

Why: `context.log_event` costs 16 ms an event, because the storage opens a Postgres connection for each; a batch costs
0.5 ms (dagster 1.13.27, `DAGSTER_EVENT_BATCH_SIZE` in the run's environment; without it, every event is stored on its
own). A partition is shown as failed when an event planned it, nothing materialized it since, and its run failed.
tests/sync_pipeline/test_dagster_events.py holds both facts to be true against Postgres storage.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence

import dagster as dg
from dagster._core.events import (
    AssetMaterializationPlannedData,
    DagsterEvent,
    DagsterEventBatchMetadata,
    DagsterEventType,
    StepMaterializationData,
    generate_event_batch_id,
)
from dagster._core.storage.partition_status_cache import AssetPartitionStatus

Metadata = Mapping[str, str | int | float | dg.MetadataValue]


def report_materializations(
    context: dg.AssetExecutionContext, asset: dg.AssetKey, partitions: Iterable[tuple[str, Metadata]]
) -> None:
    """Write one materialization per partition.

    Args:
        context: of the running step.
        asset: which asset.
        partitions: partition keys and what to show of each.
    """
    _report(
        context,
        [
            DagsterEvent(
                event_type_value=DagsterEventType.ASSET_MATERIALIZATION.value,
                job_name=context.run.job_name,
                message=f"Materialized {key}.",
                event_specific_data=StepMaterializationData(
                    dg.AssetMaterialization(asset_key=asset, partition=key, metadata=dict(metadata))
                ),
                step_key=_step_key(context),
            )
            for key, metadata in partitions
        ],
    )


def report_failures(context: dg.AssetExecutionContext, asset: dg.AssetKey, partitions: Iterable[str]) -> None:
    """Show partitions as failed; they are once this run has failed, which the caller sees to.

    Args:
        context: of the running step.
        asset: which asset.
        partitions: partition keys.
    """
    _report(
        context,
        [
            DagsterEvent.build_asset_materialization_planned_event(
                context.run.job_name, _step_key(context), AssetMaterializationPlannedData(asset, partition=key)
            )
            for key in partitions
        ],
    )


def failed_partitions(
    instance: dg.DagsterInstance, asset: dg.AssetKey, partitions: dg.DynamicPartitionsDefinition
) -> list[str]:
    """List the partitions the UI shows as failed; 0.2 s for 10,000 partitions.

    Args:
        instance: whose status cache is read, and brought up to date.
        asset: which asset.
        partitions: its partitions.
    """
    keys = instance.get_dynamic_partitions(str(partitions.name))
    statuses = instance.get_status_by_partition(asset, keys, partitions) or {}
    return [key for key, status in statuses.items() if status == AssetPartitionStatus.FAILED]


def _step_key(context: dg.AssetExecutionContext) -> str:
    return context.op_execution_context.get_step_execution_context().step.key


def _report(context: dg.AssetExecutionContext, events: Sequence[DagsterEvent]) -> None:
    batch = str(generate_event_batch_id())  # type: ignore[no-untyped-call]  # private, untyped
    for position, event in enumerate(events, start=1):
        context.instance.report_dagster_event(
            event,
            context.run.run_id,
            logging.DEBUG,
            batch_metadata=DagsterEventBatchMetadata(batch, is_end=position == len(events)),
        )
