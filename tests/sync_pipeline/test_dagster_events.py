"""What `dagster_events` relies on in Dagster's private APIs, held against Postgres storage."""

from collections.abc import Iterator

import dagster as dg
import pytest
from dagster._core.storage.partition_status_cache import AssetPartitionStatus

from sync_pipeline import dagster_events
from tests.sync_pipeline.test_dagster import statuses

ASSET = dg.AssetKey("calendar_events")
KEYS = [f"key-{n:03}" for n in range(25)]


@pytest.fixture
def stored_batches(instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that reach the storage."""
    sizes: list[int] = []
    storage = instance.event_log_storage
    original = storage.store_event_batch

    def storing(events: list[dg.EventLogEntry]) -> None:
        sizes.append(len(events))
        original(events)

    monkeypatch.setattr(storage, "store_event_batch", storing)
    return sizes


def run(instance: dg.DagsterInstance, *, fail: bool) -> dg.ExecuteInProcessResult:
    instance.add_dynamic_partitions("workspaces", KEYS)

    @dg.asset
    def reporter(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult[None]]:
        well = [(key, {"events_upserted": n}) for n, key in enumerate(KEYS[:20])]
        dagster_events.report_materializations(context, ASSET, well)
        dagster_events.report_failures(context, ASSET, KEYS[20:])
        yield dg.MaterializeResult()
        if fail:
            raise dg.Failure("some need a human")

    return dg.materialize([reporter], instance=instance, raise_on_error=False)


def test_partitions_are_materialized_in_batches_of_the_configured_size(
    instance: dg.DagsterInstance, stored_batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_EVENT_BATCH_SIZE", "8")
    result = run(instance, fail=True)
    assert stored_batches == [8, 8, 4, 5], "20 materializations, then 5 planned ones"
    events = instance.fetch_materializations(
        dg.AssetRecordsFilter(asset_key=ASSET, asset_partitions=["key-003"]), limit=1
    ).records
    assert events[0].run_id == result.run_id
    materialization = events[0].asset_materialization
    assert materialization is not None
    assert materialization.metadata["events_upserted"].value == 3


def test_planned_partitions_of_a_failed_run_are_red_and_all_others_are_not(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_EVENT_BATCH_SIZE", "200")
    run(instance, fail=True)
    found = statuses(instance, KEYS)
    assert {found[key] for key in KEYS[:20]} == {AssetPartitionStatus.MATERIALIZED}
    assert {found[key] for key in KEYS[20:]} == {AssetPartitionStatus.FAILED}


def test_without_the_batch_size_every_event_is_stored_all_the_same(
    instance: dg.DagsterInstance, stored_batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DAGSTER_EVENT_BATCH_SIZE", raising=False)
    result = run(instance, fail=False)
    assert stored_batches == []
    stored = instance.all_logs(result.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION)
    assert len([event for event in stored if event.asset_materialization]) == 21
