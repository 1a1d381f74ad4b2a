"""The sync inside Dagster: a real instance on Postgres storage, real runs, the statuses the UI shows."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime

import dagster as dg
import pytest
from dagster._core.storage.partition_status_cache import AssetPartitionStatus

from devstack.google_calendar import Simulator
from scaling.databases import DatabaseRouter, Shard
from scaling.errors import UserError
from sync_pipeline import error_budget, vital_signs
from sync_pipeline.assets import TickConfig, calendar_events
from sync_pipeline.call_buckets import Headroom
from sync_pipeline.checks import calendar_events_checks, judge_quota
from sync_pipeline.columns import CALENDAR_EVENTS
from sync_pipeline.definitions import build_defs
from sync_pipeline.partitions import workspaces as partitions
from sync_pipeline.resources import SyncResource
from sync_pipeline.vital_signs import VitalSigns
from tests.sync_pipeline.conftest import Saas
from tests.sync_pipeline.scenes import meeting

Environment = Callable[..., None]

pytestmark = pytest.mark.usefixtures("definitions_load_alone")


def run_tick(instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    return build_defs().resolve_job_def("calendar_sync").execute_in_process(instance=instance, raise_on_error=False)


def materialized(instance: dg.DagsterInstance, run_id: str) -> dict[str, dict[str, object]]:
    """Partitions of calendar_events a run materialized, with what it says of each."""
    records = instance.all_logs(run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION)
    found: dict[str, dict[str, object]] = {}
    for record in records:
        event = record.asset_materialization
        if event is not None and event.asset_key == calendar_events.key and event.partition is not None:
            found[event.partition] = {name: value.value for name, value in event.metadata.items()}
    return found


def statuses(instance: dg.DagsterInstance, keys: Iterable[str]) -> dict[str, AssetPartitionStatus | None]:
    found = instance.get_status_by_partition(calendar_events.key, list(keys), partitions) or {}
    return dict(found)


CHECKS = {
    "workspaces_are_fresh",
    "failures_are_within_budget",
    "quota_has_headroom",
    "nobody_is_needed",
    "every_event_is_readable",
}


def checks(instance: dg.DagsterInstance, run_id: str) -> dict[str, dg.AssetCheckEvaluation]:
    """What a run says of the checks, as the UI shows it."""
    found = {}
    for name in CHECKS:
        key = dg.AssetCheckKey(calendar_events.key, name)
        record = instance.event_log_storage.get_latest_asset_check_execution_by_key([key]).get(key)
        if record is not None and record.run_id == run_id:
            assert record.event is not None
            assert record.event.dagster_event is not None
            evaluation = record.event.dagster_event.asset_check_evaluation_data
            assert record.status.value == ("SUCCEEDED" if evaluation.passed else "FAILED")
            found[name] = evaluation
    return found


def numbers(result: dg.ExecuteInProcessResult) -> dict[str, object]:
    (event,) = result.asset_materializations_for_node("sync_ticks")
    return {name: value.value for name, value in event.metadata.items()}


def test_a_tick_materializes_only_the_workspaces_that_changed(
    google: Simulator, saas: Saas, instance: dg.DagsterInstance, sync_environment: Environment
) -> None:
    users = [google.add_user(f"user-{n}@example.com") for n in range(3)]
    for user in users:
        google.edit(user.calendars[0], [{"op": "insert", "event": meeting(n)} for n in range(2)])
    workspaces = [saas.workspace() for _ in users]
    for workspace, user in zip(workspaces, users, strict=True):
        saas.connect(workspace, user)
    keys = [workspace.partition_key for workspace in workspaces]

    first = run_tick(instance)
    assert first.success
    assert set(materialized(instance, first.run_id)) == set(keys)
    assert numbers(first)["events_upserted"] == 6

    idle = run_tick(instance)
    assert idle.success
    assert materialized(instance, idle.run_id) == {}
    assert numbers(idle)["incremental_syncs"] == 3

    google.edit(users[1].calendars[0], [{"op": "insert", "event": meeting(9)}])
    third = run_tick(instance)
    shown = materialized(instance, third.run_id)
    assert set(shown) == {keys[1]}
    assert shown[keys[1]]["events_upserted"] == 1
    assert shown[keys[1]]["dagster/partition_row_count"] == 3
    assert set(statuses(instance, keys).values()) == {AssetPartitionStatus.MATERIALIZED}


def test_a_workspace_that_needs_a_human_turns_red_once_and_green_when_it_is_well_again(
    google: Simulator, saas: Saas, instance: dg.DagsterInstance, sync_environment: Environment
) -> None:
    ann, bob = google.add_user("ann@example.com"), google.add_user("bob@example.com")
    well, sick = saas.workspace(), saas.workspace()
    saas.connect(well, ann)
    connection = saas.connect(sick, bob)
    run_tick(instance)

    google.revoke("bob@example.com")
    told = run_tick(instance)
    assert not told.success
    failure = told.failure_data_for_node("sync_ticks")
    assert failure is not None
    assert failure.user_failure_data is not None
    assert sick.partition_key in str(failure.user_failure_data.description)
    assert "connected again" in str(failure.user_failure_data.description)
    assert statuses(instance, [sick.partition_key, well.partition_key]) == {
        sick.partition_key: AssetPartitionStatus.FAILED,
        well.partition_key: AssetPartitionStatus.MATERIALIZED,
    }

    google.reset_counts()
    quiet = run_tick(instance)
    assert quiet.success, "it has been told already"
    assert google.counts().count(user="bob@example.com") == 0
    assert statuses(instance, [sick.partition_key])[sick.partition_key] == AssetPartitionStatus.FAILED

    google.reinstate("bob@example.com")
    saas.regrant(connection, bob.refresh_token)
    assert run_tick(instance).success
    assert statuses(instance, [sick.partition_key])[sick.partition_key] == AssetPartitionStatus.MATERIALIZED


def test_a_red_workspace_stays_red_while_its_other_calendars_change_and_turns_red_again_after_a_recovery(
    google: Simulator, saas: Saas, instance: dg.DagsterInstance, sync_environment: Environment
) -> None:
    ann, bob = google.add_user("ann@example.com"), google.add_user("bob@example.com")
    workspace = saas.workspace()
    key = workspace.partition_key
    saas.connect(workspace, ann)
    connection = saas.connect(workspace, bob)
    run_tick(instance)

    def status() -> AssetPartitionStatus | None:
        return statuses(instance, [key])[key]

    google.revoke("bob@example.com")
    run_tick(instance)
    assert status() == AssetPartitionStatus.FAILED
    google.edit(ann.calendars[0], [{"op": "insert", "event": meeting(n)} for n in range(2)])
    changed = run_tick(instance)
    assert changed.success
    assert numbers(changed)["events_upserted"] == 2
    assert status() == AssetPartitionStatus.FAILED, "the other calendar's events are no recovery"

    google.reinstate("bob@example.com")
    saas.regrant(connection, bob.refresh_token)
    recovered = run_tick(instance)
    assert status() == AssetPartitionStatus.MATERIALIZED
    assert materialized(instance, recovered.run_id)[key]["events_upserted"] == 2, "told when it is well again"

    google.revoke("bob@example.com")
    assert not run_tick(instance).success
    assert status() == AssetPartitionStatus.FAILED


def test_a_run_of_another_shard_turns_a_workspace_green(
    google: Simulator, saas: Saas, instance: dg.DagsterInstance, sync_environment: Environment
) -> None:
    bob = google.add_user("bob@example.com")
    workspace = saas.workspace()
    connection = saas.connect(workspace, bob)
    key = workspace.partition_key
    google.revoke("bob@example.com")
    job = build_defs().resolve_job_def("calendar_sync")

    def run(shard: int) -> dg.ExecuteInProcessResult:
        config = dg.RunConfig(ops={"sync_ticks": TickConfig(shard=shard, of=2)})
        return job.execute_in_process(run_config=config, instance=instance, raise_on_error=False)

    assert not run(0).success
    assert statuses(instance, [key])[key] == AssetPartitionStatus.FAILED
    google.reinstate("bob@example.com")
    saas.regrant(connection, bob.refresh_token)
    assert set(materialized(instance, run(1).run_id)) == {key}
    assert statuses(instance, [key])[key] == AssetPartitionStatus.MATERIALIZED


def test_a_manual_run_that_crashed_leaves_a_healthy_workspace_red_only_until_the_next_tick(
    google: Simulator,
    saas: Saas,
    instance: dg.DagsterInstance,
    sync_environment: Environment,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workspace = saas.workspace()
    key = workspace.partition_key
    saas.connect(workspace, google.add_user("ann@example.com"))
    run_tick(instance)
    monkeypatch.delenv("GOOGLE_CLIENT_ID")
    dg.materialize(
        [calendar_events],
        selection=[calendar_events],
        partition_key=key,
        instance=instance,
        resources={"sync": SyncResource()},
        raise_on_error=False,
    )
    assert statuses(instance, [key])[key] == AssetPartitionStatus.FAILED
    sync_environment()
    assert set(materialized(instance, run_tick(instance).run_id)) == {key}
    assert statuses(instance, [key])[key] == AssetPartitionStatus.MATERIALIZED
    assert materialized(instance, run_tick(instance).run_id) == {}


def test_a_tick_that_fails_still_judges_the_whole_sync_after_its_work(
    google: Simulator, saas: Saas, instance: dg.DagsterInstance, sync_environment: Environment
) -> None:
    saas.connect(saas.workspace(), google.add_user("ann@example.com"))
    sick = saas.workspace()
    saas.connect(sick, google.add_user("bob@example.com"))
    google.revoke("bob@example.com")
    result = run_tick(instance)
    assert not result.success
    found = checks(instance, result.run_id)
    assert {name for name, check in found.items() if not check.passed} == {"nobody_is_needed"}
    assert found["workspaces_are_fresh"].metadata["calendars"].value == 1, "they saw what this tick had done"
    assert f"1 workspaces wait for a human: {sick.partition_key} (reauth_required)" in str(
        found["nobody_is_needed"].description
    )


def test_a_tick_without_its_settings_still_judges_what_the_database_says(
    google: Simulator,
    saas: Saas,
    instance: dg.DagsterInstance,
    sync_environment: Environment,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saas.connect(saas.workspace(), google.add_user("ann@example.com"))
    run_tick(instance)
    saas.execute("UPDATE sync.calendar_state SET due_at = now() - interval '1 hour', last_finished_at = due_at")
    saas.execute("UPDATE sync.calendar_state SET last_finished_at = due_at, discovered_at = due_at")
    monkeypatch.delenv("GOOGLE_CLIENT_ID")
    found = checks(instance, run_tick(instance).run_id)
    assert set(found) == CHECKS - {"quota_has_headroom"}
    assert not found["workspaces_are_fresh"].passed


@pytest.mark.parametrize("chosen", [CHECKS, {"nobody_is_needed"}])
def test_the_checks_can_be_run_by_themselves_together_and_one_at_a_time(
    chosen: set[str], google: Simulator, saas: Saas, instance: dg.DagsterInstance, sync_environment: Environment
) -> None:
    result = dg.materialize(
        [calendar_events, calendar_events_checks],
        selection=dg.AssetSelection.checks(*(dg.AssetCheckKey(calendar_events.key, name) for name in chosen)),
        instance=instance,
        resources={"sync": SyncResource()},
    )
    assert {check.check_name for check in result.get_asset_check_evaluations()} == chosen


def test_an_idle_tick_writes_few_rows_whatever_the_number_of_workspaces(
    google: Simulator, saas: Saas, instance: dg.DagsterInstance, sync_environment: Environment
) -> None:
    def rows_of_an_idle_tick() -> int:
        run_tick(instance)
        idle = run_tick(instance)
        assert idle.success
        assert numbers(idle)["incremental_syncs"]
        with instance.event_log_storage.index_connection() as connection:  # type: ignore[attr-defined]
            count = connection.exec_driver_sql("SELECT count(*) FROM event_logs WHERE run_id = %s", (idle.run_id,))
            return int(count.scalar_one())

    saas.connect(saas.workspace(), google.add_user("user-0@example.com"))
    one = rows_of_an_idle_tick()
    for n in range(1, 6):
        saas.connect(saas.workspace(), google.add_user(f"user-{n}@example.com"))
    assert rows_of_an_idle_tick() == one <= 17, "queueing and launching add 8 (tests/stack): 25 in all"


def failing(google: Simulator, saas: Saas, *, well: int, broken: int) -> None:
    for n in range(well + broken):
        user = google.add_user(f"user-{n}@example.com")
        saas.connect(saas.workspace(), user)
        if n < broken:
            google.add_fault("forbidden", method="events.list", user=user.email, reason="quotaExceeded")


def test_failures_within_the_error_budget_leave_the_run_green_and_are_counted(
    google: Simulator, saas: Saas, instance: dg.DagsterInstance, sync_environment: Environment
) -> None:
    failing(google, saas, well=2, broken=2)
    result = run_tick(instance)
    assert result.success
    assert numbers(result)["workspaces_failed"] == 2
    (event,) = result.asset_materializations_for_node("sync_ticks")
    table = event.metadata["failures"].value
    assert isinstance(table, dg.TableMetadataValue)
    assert [record.data["kind"] for record in table.records] == ["quota_exceeded"] * 2
    assert checks(instance, result.run_id)["failures_are_within_budget"].passed


def test_more_failures_than_the_error_budget_fail_the_run_but_no_partition(
    google: Simulator, saas: Saas, instance: dg.DagsterInstance, sync_environment: Environment
) -> None:
    failing(google, saas, well=3, broken=3)
    result = run_tick(instance)
    assert not result.success
    failure = result.failure_data_for_node("sync_ticks")
    assert failure is not None
    assert failure.user_failure_data is not None
    assert "3 of 6 workspaces failed, more than the error budget of 5%: quota_exceeded" in str(
        failure.user_failure_data.description
    )
    keys = [str(row[0]) for row in saas.execute("SELECT tenant_id || ':' || id FROM public.workspaces")]
    assert set(statuses(instance, keys).values()) == {AssetPartitionStatus.MATERIALIZED}
    assert not checks(instance, result.run_id)["failures_are_within_budget"].passed


@pytest.mark.parametrize(
    ("failed", "workspaces", "exceeded"),
    [(0, 0, False), (2, 2, False), (3, 59, True), (3, 60, False), (50, 1000, False), (51, 1000, True)],
)
def test_the_error_budget_is_five_percent_and_three_workspaces(failed: int, workspaces: int, exceeded: bool) -> None:
    assert error_budget.is_exceeded(failed, workspaces) == exceeded


@pytest.mark.parametrize(
    ("state", "stale", "stuck"),
    [
        ("due_at = now() + interval '1 day', last_succeeded_at = now() - interval '20 hours'", 0, []),
        ("due_at = now() - interval '10 min', last_finished_at = now() - interval '1 day'", 0, []),
        ("due_at = now() - interval '20 min', last_finished_at = now() - interval '1 day'", 1, []),
        (
            (
                "due_at = now() + interval '10 min', last_finished_at = now(), consecutive_failures = 4, "
                "last_succeeded_at = now() - interval '1 hour'"
            ),
            1,
            [],
        ),
        (
            (
                "due_at = now() + interval '1 hour', last_finished_at = now(), consecutive_failures = 4, "
                "last_succeeded_at = now() - interval '2 hours'"
            ),
            0,
            [],
        ),
        ("consecutive_failures = 10, last_succeeded_at = now()", 0, [("failing_too_long",)]),
        ("deleted_at = now(), due_at = now() - interval '1 year', consecutive_failures = 99", 0, []),
    ],
    ids=[
        "with push, as old as the safety poll allows",
        "due for a short time",
        "due for too long",
        "failing, older than its intervals",
        "failing, as old as its intervals allow",
        "failing ten times in a row",
        "gone",
    ],
)
def test_a_calendar_is_judged_by_its_own_interval(
    state: str, stale: int, stuck: list[tuple[str, ...]], google: Simulator, saas: Saas, tick_once: Callable[[], object]
) -> None:
    workspace = saas.workspace()
    saas.connect(workspace, google.add_user("ann@example.com"))
    tick_once()
    saas.execute("UPDATE sync.calendar_state SET discovered_at = now() - interval '30 days'")
    saas.execute(f"UPDATE sync.calendar_state SET {state}")
    signs = vital_signs_of(saas)
    assert signs.stale_workspaces == stale
    assert [one.workspace for one in signs.stale] == [workspace.partition_key] * stale
    assert [one.reasons for one in signs.stuck] == stuck


def test_a_connection_that_is_parked_for_more_than_a_day_waits_for_a_human(
    google: Simulator, saas: Saas, tick_once: Callable[[], object]
) -> None:
    saas.connect(saas.workspace(), google.add_user("ann@example.com"))
    tick_once()
    saas.execute("UPDATE sync.connection_state SET parked_until = now() + interval '1 hour'")
    assert vital_signs_of(saas).stuck == ()
    saas.execute("UPDATE sync.connection_state SET list_finished_at = now() - interval '30 hours'")
    saas.execute("UPDATE sync.calendar_state SET last_succeeded_at = now() - interval '25 hours'")
    [stuck] = vital_signs_of(saas).stuck
    assert (stuck.reasons, round(stuck.hours)) == (("parked",), 25)


@pytest.mark.parametrize(
    ("calls", "projected", "passed", "severity"),
    [
        (700, 900, True, dg.AssetCheckSeverity.WARN),
        (800, 900, False, dg.AssetCheckSeverity.WARN),
        (100, 1001, False, dg.AssetCheckSeverity.WARN),
        (1000, 1000, False, dg.AssetCheckSeverity.ERROR),
    ],
)
def test_the_quota_warns_before_it_is_used_up(
    calls: int, projected: int, passed: bool, severity: dg.AssetCheckSeverity
) -> None:
    verdict = judge_quota(Headroom(calls, 1000, projected, 3600.0, 1.0, 1.0, None))
    assert (verdict.passed, verdict.severity) == (passed, severity)


def vital_signs_of(saas: Saas) -> VitalSigns:
    with DatabaseRouter(Shard("main", saas.dsn)) as router:
        [shard] = router.shards()
        with shard.transaction() as connection:
            return vital_signs.read(connection, stale_after_seconds=900)


def test_a_missing_setting_fails_the_run_with_one_clear_sentence(
    google: Simulator, instance: dg.DagsterInstance, sync_environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GOOGLE_CLIENT_ID")
    result = run_tick(instance)
    failure = result.failure_data_for_node("sync_ticks")
    assert failure is not None
    assert failure.user_failure_data is not None
    assert str(failure.user_failure_data.description).startswith("GOOGLE_CLIENT_ID is not set")


def test_a_wrong_client_secret_fails_the_run_and_names_the_setting(
    google: Simulator, saas: Saas, instance: dg.DagsterInstance, sync_environment: Environment
) -> None:
    saas.connect(saas.workspace(), google.add_user("ann@example.com"))
    google.configure(client_id="another", client_secret="another")
    try:
        result = run_tick(instance)
    finally:
        google.configure(client_id="", client_secret="")
    failure = result.failure_data_for_node("sync_ticks")
    assert failure is not None
    assert failure.user_failure_data is not None
    assert "GOOGLE_CLIENT_SECRET" in str(failure.user_failure_data.description)


def test_the_definitions_load_in_a_fresh_interpreter_without_any_environment() -> None:
    program = "import dagster as dg, sync_pipeline.definitions as d; dg.Definitions.validate_loadable(d.defs)"
    loaded = subprocess.run(
        [sys.executable, "-c", program],
        env={"HOME": os.environ.get("HOME", "/")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert loaded.returncode == 0, loaded.stderr
    assert "Warning" not in loaded.stderr.replace("RuntimeDirWarning", "")


def test_a_wrong_cron_expression_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNC_CRON", "every two minutes")
    with pytest.raises(UserError, match="SYNC_CRON must be a cron expression"):
        build_defs()


def test_materializing_a_workspace_syncs_it_at_once_and_can_read_it_completely(
    google: Simulator, saas: Saas, instance: dg.DagsterInstance, sync_environment: Environment
) -> None:
    hour = "3600"
    sync_environment(
        SYNC_POLL_INTERVAL_SECONDS=hour, SYNC_POLL_CEILING_SECONDS=hour, SYNC_CALENDAR_LIST_INTERVAL_SECONDS=hour
    )
    user = google.add_user("ann@example.com")
    google.edit(user.calendars[0], [{"op": "insert", "event": meeting()}])
    workspace = saas.workspace()
    saas.connect(workspace, user)
    key = workspace.partition_key
    instance.add_dynamic_partitions("workspaces", [key])

    def materialize(*, full_resync: bool) -> dg.ExecuteInProcessResult:
        return dg.materialize(
            [calendar_events],
            selection=[calendar_events],
            partition_key=key,
            instance=instance,
            resources={"sync": SyncResource()},
            run_config={"ops": {"calendar_events": {"config": {"full_resync": full_resync}}}},
        )

    assert materialized(instance, materialize(full_resync=False).run_id)[key]["events_upserted"] == 1
    google.reset_counts()
    assert set(materialized(instance, materialize(full_resync=False).run_id)) == {key}, "shown even when unchanged"
    assert google.counts().count("events.list", incremental=True) == 1
    materialize(full_resync=True)
    assert google.counts().count("events.list", incremental=False) == 1


def test_a_run_over_several_workspaces_materializes_the_well_ones_and_fails_the_others(
    google: Simulator, saas: Saas, instance: dg.DagsterInstance, sync_environment: Environment
) -> None:
    users = [google.add_user(f"user-{n}@example.com") for n in range(3)]
    workspaces = [saas.workspace() for _ in range(4)]
    for workspace, user in zip(workspaces, users, strict=False):
        saas.connect(workspace, user)
    keys = [workspace.partition_key for workspace in workspaces]
    instance.add_dynamic_partitions("workspaces", keys)
    google.revoke(users[1].email)

    result = dg.materialize(
        [calendar_events],
        selection=[calendar_events],
        instance=instance,
        resources={"sync": SyncResource()},
        tags={"dagster/asset_partition_range_start": keys[0], "dagster/asset_partition_range_end": keys[3]},
        raise_on_error=False,
    )

    assert not result.success
    assert set(materialized(instance, result.run_id)) == {keys[0], keys[2]}
    failure = result.failure_data_for_node("calendar_events")
    assert failure is not None
    assert failure.user_failure_data is not None
    told = str(failure.user_failure_data.description)
    assert f"{keys[1]}: its Google account has to be connected again" in told
    assert f"{keys[3]}: it has no Google connection" in told
    assert statuses(instance, keys) == {
        keys[0]: AssetPartitionStatus.MATERIALIZED,
        keys[1]: AssetPartitionStatus.FAILED,
        keys[2]: AssetPartitionStatus.MATERIALIZED,
        keys[3]: AssetPartitionStatus.FAILED,
    }


def test_the_sensor_keeps_partitions_in_step_and_an_empty_answer_removes_nothing(
    google: Simulator, saas: Saas, sync_environment: Environment
) -> None:
    sensor = build_defs().get_sensor_def("workspaces_sensor")

    def look(instance: dg.DagsterInstance) -> list[tuple[str, list[str]]]:
        with dg.build_sensor_context(instance=instance, resources={"sync": SyncResource()}) as context:
            result = sensor(context)
        if isinstance(result, dg.SkipReason):
            return []
        assert isinstance(result, dg.SensorResult)
        return [(type(r).__name__, sorted(r.partition_keys)) for r in result.dynamic_partitions_requests or []]

    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions("workspaces", ["gone"])
        assert look(instance) == [], "nothing in the database is no reason to remove anything"

        workspace = saas.workspace()
        saas.connect(workspace, google.add_user("ann@example.com"))
        assert look(instance) == [
            ("AddDynamicPartitionsRequest", [workspace.partition_key]),
            ("DeleteDynamicPartitionsRequest", ["gone"]),
        ]
        instance.add_dynamic_partitions("workspaces", [workspace.partition_key])
        run = instance.create_run_for_job(
            build_defs().resolve_job_def("calendar_sync"),
            status=dg.DagsterRunStatus.STARTED,
            tags={"dagster/partition": "gone"},
        )
        assert look(instance) == [], "a run is at work on it"
        instance.report_run_failed(run)
        assert look(instance) == [("DeleteDynamicPartitionsRequest", ["gone"])]


def test_the_schedule_starts_one_run_per_shard_and_leaves_out_shards_that_wait(
    sync_environment: Environment,
) -> None:
    sync_environment(SYNC_RUNS_PER_TICK="2")
    definitions = build_defs()
    schedule = definitions.get_schedule_def("calendar_sync_schedule")
    with dg.instance_for_test() as instance:
        moment = datetime(2026, 3, 1, 12, tzinfo=UTC)
        context = dg.build_schedule_context(instance=instance, scheduled_execution_time=moment)
        requests = schedule.evaluate_tick(context).run_requests or []
        assert [request.tags["sync/shard"] for request in requests] == ["0", "1"]
        assert [request.run_config["ops"]["sync_ticks"]["config"] for request in requests] == [
            {"shard": 0, "of": 2, "watch_seconds": 0.0},
            {"shard": 1, "of": 2, "watch_seconds": 0.0},
        ]
        instance.create_run_for_job(
            definitions.resolve_job_def("calendar_sync"),
            status=dg.DagsterRunStatus.NOT_STARTED,
            tags={"sync/shard": "0"},
        )
        requests = schedule.evaluate_tick(context).run_requests or []
        assert [request.tags["sync/shard"] for request in requests] == ["1"]


def test_with_push_scheduled_runs_watch_for_notifications_until_their_time_budget_ends(
    sync_environment: Environment,
) -> None:
    sync_environment(SYNC_WEBHOOK_URL="https://hooks.example.com/google", SYNC_TIME_BUDGET_SECONDS="90")
    schedule = build_defs().get_schedule_def("calendar_sync_schedule")
    with dg.instance_for_test() as instance:
        context = dg.build_schedule_context(
            instance=instance, scheduled_execution_time=datetime(2026, 3, 1, 12, tzinfo=UTC)
        )
        [request] = schedule.evaluate_tick(context).run_requests or []
    assert request.run_config["ops"]["sync_ticks"]["config"]["watch_seconds"] == 90
    assert TickConfig().watch_seconds == 0, "a run started by hand does not linger"


@pytest.mark.parametrize("autostart", [True, False])
def test_schedules_and_sensors_start_by_themselves_only_when_told(
    autostart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_AUTOSTART", str(autostart))
    definitions = build_defs()
    running = {
        *(
            definitions.get_schedule_def(name).default_status == dg.DefaultScheduleStatus.RUNNING
            for name in ("calendar_sync_schedule", "sync_report_schedule", "purge_event_log_schedule")
        ),
        definitions.get_sensor_def("workspaces_sensor").default_status == dg.DefaultSensorStatus.RUNNING,
    }
    assert running == {autostart}


def test_every_asset_says_what_it_is(google: Simulator) -> None:
    for spec in build_defs().resolve_all_asset_specs():
        assert spec.description, spec.key
        assert spec.group_name == "google_calendar"
        assert spec.owners == ["team:platform"]
        assert spec.kinds


def test_the_column_schema_is_the_views(saas: Saas) -> None:
    columns = saas.execute(
        "SELECT a.attname, format_type(a.atttypid, NULL) FROM pg_attribute a "
        "WHERE a.attrelid = 'sync.calendar_events'::regclass AND a.attnum > 0 ORDER BY a.attnum"
    )
    long_names = {"timestamptz": "timestamp with time zone"}
    assert [(name, long_names.get(kind, kind)) for name, kind, _ in CALENDAR_EVENTS] == columns
