"""Dagster's figures: what a DagsterInstance writes is what is read from its tables."""

from collections.abc import Iterator

import dagster as dg
import pytest
from dagster._core.scheduler.instigation import TickStatus
from prometheus_client import generate_latest
from prometheus_client.core import CollectorRegistry, Metric
from prometheus_client.registry import Collector

from devstack.servers import Servers
from scaling import exported_dagster, exporter
from scaling.settings import DagsterStorageSettings
from tests.scaling import exported_fleet
from tests.scaling.test_exporter import Figures, figures, of, total

Storage = tuple[dg.DagsterInstance, DagsterStorageSettings]


@pytest.fixture(scope="module")
def storage(running_servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    with exported_fleet.dagster_storage(running_servers.postgres, tmp_path_factory.mktemp("dagster")) as made:
        yield made


def read(settings: DagsterStorageSettings) -> Figures:
    shard = exporter.storage(settings)
    assert shard is not None
    parts = exported_dagster.parts(shard, limit_seconds=5)

    class Once(Collector):
        def collect(self) -> Iterator[Metric]:
            for part in parts.values():
                yield from part()

    registry = CollectorRegistry()
    registry.register(Once())
    try:
        return figures(generate_latest(registry).decode())
    finally:
        shard.close()


def test_without_runs_and_ticks_there_are_zeros_of_the_three_locations(storage: Storage) -> None:
    found = read(storage[1])
    assert of(found, "pipeline_dagster_runs", location="sync_pipeline", status="QUEUED") == 0
    assert "pipeline_dagster_tick_age_seconds" not in found


def test_runs_ticks_and_daemons_are_told_by_location(storage: Storage) -> None:
    instance, settings = storage
    exported_fleet.dagster_history(instance)
    found = read(settings)
    assert of(found, "pipeline_dagster_runs", location="sync_pipeline", status="STARTED") == 1
    assert of(found, "pipeline_dagster_runs", location="archive_pipeline", status="QUEUED") == 1
    age = of(found, "pipeline_dagster_oldest_run_age_seconds", location="sync_pipeline", status="STARTED")
    assert 899 < age < 1000
    waits = of(found, "pipeline_dagster_oldest_run_age_seconds", location="archive_pipeline", status="QUEUED")
    assert 0 <= waits < 60
    ended = "pipeline_dagster_runs_ended_total"
    assert total(found, ended, location="sync_pipeline", outcome="failure") == 2
    assert of(found, ended, location="sync_pipeline", reason="UNEXPECTED_TERMINATION") == 1
    assert of(found, "pipeline_dagster_run_duration_seconds_count", location="sync_pipeline") == 3
    assert of(found, "pipeline_dagster_run_duration_seconds_bucket", location="sync_pipeline", le="20") == 1
    assert 480 <= of(found, "pipeline_dagster_run_duration_seconds_sum", location="sync_pipeline") <= 490
    assert of(found, "pipeline_dagster_ticks_total", name="workspaces_sensor", status="skipped") == 2
    assert of(found, "pipeline_dagster_ticks_total", name="scaling_metrics_schedule", kind="schedule") == 2
    assert of(found, "pipeline_dagster_tick_failed", name="audit_log_failure_sensor", location="archive_pipeline") == 1
    assert 1 <= of(found, "pipeline_dagster_tick_age_seconds", name="workspaces_sensor") < 60
    assert of(found, "pipeline_dagster_automation_on", name="workspaces_sensor", kind="sensor") == 1
    assert 6 < of(found, "pipeline_dagster_daemon_age_seconds", daemon="SENSOR") < 60


def test_a_run_that_dagster_itself_gives_up_counts_as_ended(storage: Storage) -> None:
    instance, settings = storage
    run_id = exported_fleet.run(instance, "scaling", dg.DagsterRunStatus.STARTED, seconds=33.0)
    before = read(settings)
    run = instance.get_run_by_id(run_id)
    assert run is not None
    instance.report_run_failed(run, "the run worker was killed")
    found = read(settings)
    for name, labels in (("runs_ended", {"outcome": "failure"}), ("runs_killed", {})):
        counted = f"pipeline_dagster_{name}_total"
        assert total(found, counted, location="scaling", **labels) == 1 + total(
            before, counted, location="scaling", **labels
        )
    assert of(found, "pipeline_dagster_runs", location="scaling", status="STARTED") == 0


def test_a_sensor_that_is_well_again_has_not_failed(storage: Storage) -> None:
    instance, settings = storage
    exported_fleet.ticks(instance, "scaling", "mended_sensor", [TickStatus.FAILURE, TickStatus.SUCCESS])
    assert of(read(settings), "pipeline_dagster_tick_failed", name="mended_sensor") == 0


def test_no_run_id_is_a_label(storage: Storage) -> None:
    instance, settings = storage
    ids = {exported_fleet.run(instance, "scaling", dg.DagsterRunStatus.SUCCESS, seconds=1.0)}
    values = {value for samples in read(settings).values() for key in samples for _, value in key}
    assert not ids & values
