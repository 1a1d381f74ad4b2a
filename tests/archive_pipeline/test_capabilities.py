"""What episodes of the audit logs do: with real Postgres, S3 and a Dagster instance, and with runs that are killed."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.assets.graph.asset_graph import AssetGraph
from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill

from archive_pipeline import capabilities
from archive_pipeline.assets import archive_assets
from archive_pipeline.capabilities import Held, closed_months
from archive_pipeline.conversion import Conversion, Step, conversion_state
from archive_pipeline.definitions import build_defs
from archive_pipeline.months import Month
from archive_pipeline.partitions import monthly_partitions
from archive_pipeline.resources import ArchiveResource
from archive_pipeline.sensors import plan_sensor
from scaling import episodes
from scaling.capabilities import Capability
from scaling.episodes import ClaimLostError, Episode, EpisodeState
from scaling.settings import ArchiveSourceSettings, AutomationSettings
from tests.archive_pipeline import partitioned
from tests.archive_pipeline.conftest import JANUARY, Room
from tests.archive_pipeline.partitioned import SCHEMA, TABLE
from tests.archive_pipeline.test_dagster_jobs import launch, materialized, sentence, shown

pytestmark = pytest.mark.usefixtures("definitions_load_alone")

FEBRUARY = JANUARY.following
ARCHIVE = dg.AssetKey("audit_log_archive")
PARTITIONING = (Capability.AUDIT_LOG_PARTITIONING, "partition_audit_logs", "partition_and_archive")
RETENTION = (Capability.AUDIT_LOG_RETENTION, "archive_and_prune", "archive_past_retention")
WANTED = Conversion(TABLE, SCHEMA, "UTC", 3)
GRACE = timedelta(hours=1)


@pytest.fixture
def instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dg.DagsterInstance]:
    """One that a further process can open."""
    home = tmp_path / "dagster"
    home.mkdir()
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    with dg.DagsterInstance.get() as found:
        yield found


@pytest.fixture
def versioned(room: Room, monkeypatch: pytest.MonkeyPatch) -> Room:
    bucket = room.target.bucket
    bucket.client.put_bucket_versioning(Bucket=bucket.name, VersioningConfiguration={"Status": "Enabled"})
    monkeypatch.setenv("ARCHIVE_RETENTION_MONTHS", "1")
    return room


@pytest.fixture
def plain(versioned: Room) -> Room:
    """A plain table with rows of the last three closed months, and of the open one."""
    for month in last_closed(versioned, 3):
        versioned.fill(7, month)
    [(now,)] = versioned.admin.execute("SELECT now()").fetchall()
    versioned.log(now)
    return versioned


@pytest.fixture
def old(versioned: Room) -> Room:
    """Partitions of two months long past retention, the first of them archived."""
    partitioned.convert(versioned.admin, versioned.shard, JANUARY, FEBRUARY)
    versioned.fill(60)
    versioned.fill(20, FEBRUARY)
    versioned.archive()
    return versioned


def last_closed(room: Room, number: int) -> list[Month]:
    [(now,)] = room.admin.execute("SELECT now() - %s", (GRACE,)).fetchall()
    month = Month.containing(now)
    months: list[Month] = []
    for _ in range(number):
        month = Month.containing(month.start - timedelta(days=1))
        months.insert(0, month)
    return months


def crossed(room: Room, capability: Capability, state: str = "approved", number: int = 1) -> int:
    [(episode,)] = room.admin.execute(
        "INSERT INTO scaling.episodes (rule, episode_no, rule_version, capability, state, value, threshold, fired_at,"
        " approved_by, approved_at) SELECT 'audit', %s, 'v', %s, %s::text, 2, 1, now(),"
        " CASE WHEN %s = 'approved' THEN 'Ann' END, CASE WHEN %s = 'approved' THEN now() END RETURNING id",
        (number, capability.value, state, state, state),
    ).fetchall()
    assert isinstance(episode, int)
    return episode


def episode_of(room: Room, number: int) -> Episode:
    with room.shard.transaction() as connection:
        return episodes.get(connection, number)


def outcome_of(room: Room, number: int) -> dict[str, Any]:
    episode = episode_of(room, number)
    assert episode.state is EpisodeState.ACTED, episode.error
    return dict(episode.outcome or {})


def act(instance: dg.DagsterInstance, kind: tuple[Capability, str, str], episode: int) -> dg.ExecuteInProcessResult:
    return launch(instance, kind[1], {"episode": episode})


def lose(room: Room, number: int) -> None:
    """What the clock does when a run is silent."""
    room.admin.execute("UPDATE scaling.episodes SET acting_until = now() - interval '1 s' WHERE id = %s", (number,))


def killed(kind: tuple[Capability, str, str], point: str, episode: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.archive_pipeline.killed_action", kind[1], kind[2], point, str(episode)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]


def graph() -> AssetGraph:
    return AssetGraph.from_assets(archive_assets(monthly_partitions(ArchiveSourceSettings())))


def months_of(backfill: PartitionBackfill) -> list[str]:
    subset = backfill.get_asset_backfill_data(graph()).get_target_partitions_subset(ARCHIVE)
    return sorted(key.removesuffix("-01") for key in subset.get_partition_keys())


def do_backfill(instance: dg.DagsterInstance) -> None:
    """What Dagster's daemon does of the only backfill that is asked for."""
    [backfill] = [each for each in instance.get_backfills() if each.status is BulkActionStatus.REQUESTED]
    keys = months_of(backfill)
    tags = {
        "dagster/asset_partition_range_start": f"{keys[0]}-01",
        "dagster/asset_partition_range_end": f"{keys[-1]}-01",
    }
    job = build_defs().resolve_job_def("audit_log_archive_job")
    assert job.execute_in_process(instance=instance, tags=tags).success
    instance.update_backfill(backfill.with_status(BulkActionStatus.COMPLETED_SUCCESS))  # type: ignore[no-untyped-call]


# -- partitioning ---------------------------------------------------------------------------------------------------


def test_an_approved_episode_converts_the_table_and_asks_for_a_backfill_of_every_closed_month(
    plain: Room, instance: dg.DagsterInstance
) -> None:
    months = [month.name for month in last_closed(plain, 3)]
    number = crossed(plain, PARTITIONING[0])
    result = act(instance, PARTITIONING, number)
    assert result.success
    [backfill] = instance.get_backfills()
    assert months_of(backfill) == months
    metadata = shown(result)
    assert metadata["backfill"] == backfill.backfill_id
    assert "to monthly partitions" in str(metadata["plan"])
    outcome = outcome_of(plain, number)
    assert (outcome["conversion"], outcome["months"], outcome["backfill"]) == (
        "converted", months, backfill.backfill_id
    )  # fmt: skip
    assert str(Step.SWAPPED) in outcome["steps"]
    assert 0 < outcome["blocked_ms_max"] < 10_000
    assert conversion_state(plain.shard, TABLE).partitioned
    assert materialized(result, "audit_logs_partitions")[0][1]["outcome"] == "converted"

    do_backfill(instance)
    again = crossed(plain, PARTITIONING[0], number=2)
    assert act(instance, PARTITIONING, again).success
    assert len(instance.get_backfills()) == 1
    second = outcome_of(plain, again)
    assert (second["conversion"], second["months"], second["backfill"]) == ("unchanged", [], None)


def test_months_that_a_backfill_under_way_archives_are_not_asked_for_again(
    plain: Room, instance: dg.DagsterInstance
) -> None:
    months = last_closed(plain, 3)
    instance.add_backfill(
        PartitionBackfill.from_asset_partitions(
            backfill_id="somebodys",
            asset_graph=graph(),
            partition_names=[months[1].partition_key],
            asset_selection=[ARCHIVE],
            backfill_timestamp=time.time(),
            tags={},
            dynamic_partitions_store=instance,
            all_partitions=False,
            title=None,
            description=None,
            run_config=None,
        )
    )
    number = crossed(plain, PARTITIONING[0])
    assert act(instance, PARTITIONING, number).success
    outcome = outcome_of(plain, number)
    assert outcome["backfills_under_way"] == ["somebodys"]
    asked = instance.get_backfill(outcome["backfill"])
    assert asked is not None
    assert months_of(asked) == [months[0].name, months[2].name]


def test_what_is_not_approved_or_another_capabilitys_is_not_acted_on(plain: Room, instance: dg.DagsterInstance) -> None:
    proposed = crossed(plain, PARTITIONING[0], "proposed")
    result = act(instance, PARTITIONING, proposed)
    assert result.success
    assert shown(result)["did"].startswith(f"nothing: episode {proposed} is proposed")
    other = crossed(plain, RETENTION[0], number=2)
    assert "is not about audit_log_partitioning" in sentence(act(instance, PARTITIONING, other))
    assert episode_of(plain, other).attempts == 0
    assert not conversion_state(plain.shard, TABLE).partitioned
    assert not instance.get_backfills()


def test_what_is_in_the_way_of_a_conversion_is_a_failed_attempt_with_its_reasons_and_the_third_asks_a_human(
    plain: Room, instance: dg.DagsterInstance
) -> None:
    plain.admin.execute("CREATE TABLE notes (log uuid REFERENCES audit_logs (id))")
    number = crossed(plain, PARTITIONING[0])
    for attempt in (1, 2, 3):
        result = act(instance, PARTITIONING, number)
        episode = episode_of(plain, number)
        assert "cannot be converted as it is: (1) " in str(episode.error)
        assert sentence(result) == episode.error
        assert episode.attempts == attempt
        assert act(instance, PARTITIONING, number).success  # too early: nothing is done
        plain.admin.execute("UPDATE scaling.episodes SET retry_at = now() WHERE retry_at IS NOT NULL")
    assert episode.state is EpisodeState.NEEDS_HUMAN
    assert not instance.get_backfills()


def test_the_plan_of_a_proposed_conversion_is_written_once_and_the_sensor_says_where_it_is(
    plain: Room, instance: dg.DagsterInstance
) -> None:
    sensor = plan_sensor(AutomationSettings())

    def look() -> Any:
        with dg.build_sensor_context(
            instance=instance, resources={"archive": ArchiveResource()}, sensor_name=sensor.name
        ) as context:
            return sensor.evaluate_tick(context)

    assert look().skip_message == "No conversion is proposed."
    number = crossed(plain, PARTITIONING[0], "proposed")
    [request] = look().run_requests
    assert request.run_config == {}
    job = build_defs().resolve_job_def("convert_audit_logs")
    result = job.execute_in_process(instance=instance, run_config=request.run_config, tags=dict(request.tags))
    assert "### `public.audit_logs` to monthly partitions" in str(shown(result)["plan"])
    assert not conversion_state(plain.shard, TABLE).partitioned
    said = str(look().skip_message)
    assert f"The plan of episode {number} is the metadata of run {result.run_id} of convert_audit_logs" in said
    assert f"python -m scaling approve {number}" in said


def test_closed_months_are_those_from_the_first_with_rows_that_no_manifest_covers(plain: Room) -> None:
    months = last_closed(plain, 3)
    plain.archive(months[1])
    found = closed_months([plain.shard], TABLE, Month(2024, 1), GRACE)
    assert list(found.months) == [months[0], months[2]]
    assert not found.before
    late = closed_months([plain.shard], TABLE, months[2], GRACE)
    assert list(late.months) == [months[2]]
    assert f"set ARCHIVE_FIRST_MONTH to {months[0].name}" in late.before
    plain.admin.execute("DELETE FROM audit_logs")
    assert closed_months([plain.shard], TABLE, Month(2024, 1), GRACE).months == ()


# -- dying, and losing the claim ------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["claimed", "swapped", "converted", "asked", "finishing", "finished"])
def test_after_a_kill_there_is_one_conversion_one_backfill_and_one_copy_of_every_month(
    plain: Room, instance: dg.DagsterInstance, point: str
) -> None:
    months = last_closed(plain, 3)
    number = crossed(plain, PARTITIONING[0])
    killed(PARTITIONING, point, number)
    if point == "finished":
        assert outcome_of(plain, number)["months"] == [month.name for month in months]
    else:
        early = act(instance, PARTITIONING, number)
        assert shown(early)["did"].startswith("nothing: ")  # the dead run's lease has not run out
    lose(plain, number)
    deadline = time.monotonic() + 20
    while True:  # the killed session ends as soon as Postgres notices that its socket is closed
        result = act(instance, PARTITIONING, number)
        if result.success or time.monotonic() > deadline:
            break
        plain.admin.execute("UPDATE scaling.episodes SET retry_at = now(), attempts = 1 WHERE id = %s", (number,))
    assert result.success
    outcome_of(plain, number)
    conversions = plain.admin.execute("SELECT state FROM archive.conversions").fetchall()
    assert conversions == [("converted",)]
    assert plain.admin.execute("SELECT count(*) FROM audit_logs").fetchall() == [(22,)]
    [backfill] = instance.get_backfills()
    assert months_of(backfill) == [month.name for month in months]
    do_backfill(instance)
    manifests = [each.manifest for each in plain.manifests()]
    assert sorted((each.month.name, each.generation, each.digest.rows) for each in manifests) == [
        (month.name, 1, 7) for month in months
    ]


@pytest.mark.parametrize("point", ["archived", "pruned", "finishing"])
def test_after_a_kill_of_the_retention_every_month_is_archived_once_and_no_row_is_lost(
    old: Room, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    monkeypatch.setenv("ARCHIVE_PRUNE", "auto")
    number = crossed(old, RETENTION[0])
    killed(RETENTION, point, number)
    lose(old, number)
    deadline = time.monotonic() + 20
    while not (result := act(instance, RETENTION, number)).success and time.monotonic() < deadline:
        old.admin.execute("UPDATE scaling.episodes SET retry_at = now(), attempts = 1 WHERE id = %s", (number,))
    assert result.success
    outcome_of(old, number)
    assert old.admin.execute("SELECT count(*) FROM audit_logs").fetchall() == [(0,)]
    rows = {each.manifest.month.name: (each.manifest.generation, each.manifest.digest.rows) for each in old.manifests()}
    assert rows == {"2025-01": (1, 60), "2025-02": (1, 20)}


def test_a_run_whose_claim_was_taken_converts_nothing_asks_for_nothing_and_finishes_nothing(
    plain: Room, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = crossed(plain, PARTITIONING[0])
    confirm = Held.confirm

    def taken(self: Held) -> None:
        lose(plain, number)
        with plain.shard.transaction() as connection:
            assert episodes.claim(connection, number, "another", timedelta(minutes=1))
        monkeypatch.setattr(Held, "confirm", confirm)
        confirm(self)

    monkeypatch.setattr(Held, "confirm", taken)
    result = act(instance, PARTITIONING, number)
    assert "was given to another run" in shown(result)["did"]
    episode = episode_of(plain, number)
    assert (episode.state, episode.run_id, episode.outcome, episode.error) == (
        EpisodeState.ACTING, "another", None, None
    )  # fmt: skip
    assert not conversion_state(plain.shard, TABLE).partitioned
    assert not instance.get_backfills()


def test_a_claim_lost_in_the_midst_of_a_conversion_leaves_the_plain_table_and_nothing_beside_it(plain: Room) -> None:
    number = crossed(plain, PARTITIONING[0])

    def work(held: Held) -> dict[str, Any]:
        def reached(step: Step) -> None:
            if step is Step.CHECKED:
                lose(plain, number)
                with plain.shard.transaction() as connection:
                    assert episodes.claim(connection, number, "another", timedelta(minutes=1))

        capabilities.convert_all([plain.shard], WANTED, held, on_step=reached)
        raise AssertionError("the conversion went on")

    acted = capabilities.act(plain.shard, PARTITIONING[0], number, "first", work)
    assert acted.lost
    state = conversion_state(plain.shard, TABLE)
    assert (state.partitioned, state.leftovers) == (False, ())
    assert episode_of(plain, number).run_id == "another"


def test_a_lease_is_extended_while_the_work_goes_on_and_runs_out_by_the_clock_of_a_run_that_slept(plain: Room) -> None:
    number = crossed(plain, PARTITIONING[0])
    lease = timedelta(seconds=0.6)

    def long(held: Held) -> dict[str, Any]:
        time.sleep(1.5)
        held.require_fresh()
        with plain.shard.transaction() as connection:
            assert episodes.claim(connection, number, "another", lease) is None
        return {"slept": True}

    assert capabilities.act(plain.shard, PARTITIONING[0], number, "first", long, lease=lease).outcome == {"slept": True}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("episode-")]

    second = crossed(plain, PARTITIONING[0], number=2)
    with plain.shard.transaction() as connection:
        claimed = episodes.claim(connection, second, "first", lease)
    assert claimed is not None
    frozen = Held(plain.shard, claimed, lease, until=time.monotonic())
    with pytest.raises(ClaimLostError):
        frozen.require_fresh()
    frozen.confirm()  # nobody had taken it
    frozen.require_fresh()


def test_an_error_nobody_foresaw_is_a_failed_attempt_that_names_its_type_only(plain: Room) -> None:
    number = crossed(plain, PARTITIONING[0])

    def work(_: Held) -> dict[str, Any]:
        raise RuntimeError("a secret")

    with pytest.raises(RuntimeError):
        capabilities.act(plain.shard, PARTITIONING[0], number, "first", work)
    episode = episode_of(plain, number)
    assert episode.state is EpisodeState.ACTION_FAILED
    assert str(episode.error).startswith("RuntimeError, which nobody foresaw")


# -- retention ------------------------------------------------------------------------------------------------------


def test_with_pruning_off_months_past_retention_are_archived_and_the_outcome_says_that_nothing_is_dropped(
    old: Room, instance: dg.DagsterInstance
) -> None:
    old.log(datetime(2025, 1, 20, tzinfo=UTC))  # late
    number = crossed(old, RETENTION[0])
    result = act(instance, RETENTION, number)
    assert result.success
    outcome = outcome_of(old, number)
    assert outcome["said"] == ("nothing is dropped: ARCHIVE_PRUNE is off; set it to propose or auto to free the space")
    assert outcome["months"] == {"late rows archived": ["2025-01"], "archived": ["2025-02"]}
    assert [partition for partition, _ in materialized(result, "audit_log_archive")] == ["2025-01-01", "2025-02-01"]
    assert old.admin.execute("SELECT count(*) FROM audit_logs").fetchall() == [(81,)]


def test_with_pruning_proposed_the_partitions_wait_for_approval(
    old: Room, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCHIVE_PRUNE", "propose")
    number = crossed(old, RETENTION[0])
    assert act(instance, RETENTION, number).success
    outcome = outcome_of(old, number)
    assert outcome["waiting_for_approval"] == [f"{SCHEMA}.audit_logs_2025_01", f"{SCHEMA}.audit_logs_2025_02"]
    assert outcome["said"].startswith("2 partition(s) wait for approval: job approve_prune")
    assert old.admin.execute("SELECT DISTINCT state FROM archive.prunes").fetchall() == [("proposed",)]
    assert old.admin.execute("SELECT count(*) FROM audit_logs").fetchall() == [(80,)]


def test_with_pruning_automatic_what_is_archived_is_dropped(
    old: Room, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCHIVE_PRUNE", "auto")
    number = crossed(old, RETENTION[0])
    result = act(instance, RETENTION, number)
    assert result.success
    outcome = outcome_of(old, number)
    assert (outcome["rows_dropped"], len(outcome["dropped"])) == (80, 2)
    assert len(materialized(result, "audit_log_pruned")) == 2
    assert old.admin.execute("SELECT count(*) FROM audit_logs").fetchall() == [(0,)]
    again = crossed(old, RETENTION[0], number=2)
    assert act(instance, RETENTION, again).success
    assert outcome_of(old, again)["said"] == "0 partition(s) dropped"


def test_a_month_that_fails_keeps_its_rows_hinders_no_other_and_is_a_failed_attempt(
    old: Room, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCHIVE_PRUNE", "auto")
    old.admin.execute(
        "UPDATE audit_logs SET action = 'other' WHERE created_at = (SELECT min(created_at) FROM audit_logs)"
    )
    number = crossed(old, RETENTION[0])
    result = act(instance, RETENTION, number)
    assert not result.success
    episode = episode_of(old, number)
    assert episode.state is EpisodeState.ACTION_FAILED
    assert "month 2025-01: 1 row(s) were changed in Postgres after they were archived" in str(episode.error)
    assert old.admin.execute("SELECT count(*) FROM audit_logs").fetchall() == [(60,)]


def test_the_retention_of_a_run_that_lost_its_claim_archives_and_drops_nothing(old: Room) -> None:
    number = crossed(old, RETENTION[0])
    policy = partitioned.AUTO

    def work(held: Held) -> dict[str, Any]:
        lose(old, number)
        with old.shard.transaction() as connection:
            assert episodes.claim(connection, number, "another", timedelta(minutes=1))
        capabilities.archive_and_prune([old.shard], old.target, policy, held)
        raise AssertionError("it went on")

    assert capabilities.act(old.shard, RETENTION[0], number, "first", work).lost
    assert old.admin.execute("SELECT count(*) FROM audit_logs").fetchall() == [(80,)]
    assert [each.manifest.month.name for each in old.manifests()] == ["2025-01"]


def test_a_plain_table_has_nothing_that_can_be_pruned_and_the_sentence_says_so(
    plain: Room, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCHIVE_PRUNE", "auto")
    number = crossed(plain, RETENTION[0])
    assert "is a plain table, and only partitions can be pruned" in sentence(act(instance, RETENTION, number))
    assert episode_of(plain, number).state is EpisodeState.ACTION_FAILED


def test_the_sensors_of_both_capabilities_request_the_run_of_an_approved_episode(
    plain: Room, instance: dg.DagsterInstance
) -> None:
    definitions = build_defs()
    for number, (capability, job, op) in enumerate((PARTITIONING, RETENTION), start=1):
        episode = crossed(plain, capability, number=number)
        sensor = definitions.resolve_sensor_def(f"{capability.value}_sensor")
        with dg.build_sensor_context(
            instance=instance, resources={"archive": ArchiveResource()}, sensor_name=sensor.name
        ) as context:
            [request] = sensor.evaluate_tick(context).run_requests or []
        assert sensor.job_name == job
        assert request.run_config == {"ops": {op: {"config": {"episode": episode}}}}
