"""The purge: what it removes, what must outlive it, against Dagster's Postgres storage."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from random import Random

import dagster as dg
import pytest
from dagster._core.storage.partition_status_cache import AssetPartitionStatus

from devstack.google_calendar import Simulator
from scaling.databases import DatabaseRouter, Shard
from scaling.errors import UserError
from sync_pipeline import dagster_events, event_log_retention, history
from sync_pipeline.definitions import build_defs
from sync_pipeline.event_log_retention import Purge, Retention
from tests.sync_pipeline.conftest import Saas
from tests.sync_pipeline.test_dagster import Environment, checks, run_tick, statuses

pytestmark = pytest.mark.usefixtures("definitions_load_alone")

ASSET = dg.AssetKey("calendar_events")
CHECK = dg.AssetCheckKey(ASSET, "nobody_is_needed")
OLD = Retention(timedelta(days=7), timedelta(days=30), timedelta(days=7))


class Config(dg.Config):
    well: list[str]
    sick: list[str]


@dg.asset
def sync_ticks(context: dg.AssetExecutionContext, config: Config) -> Iterator[object]:
    """Reports like the real one."""
    dagster_events.report_materializations(context, ASSET, [(key, {"n": 1}) for key in config.well])
    dagster_events.report_failures(context, ASSET, config.sick)
    yield dg.MaterializeResult()
    yield dg.AssetCheckEvaluation(ASSET, CHECK.name, passed=not config.sick)
    if config.sick:
        raise dg.Failure("somebody is needed")


JOB = dg.define_asset_job("calendar_sync", [sync_ticks]).resolve(
    asset_graph=dg.Definitions(assets=[sync_ticks]).resolve_asset_graph()
)


class Log:
    """The event log of an instance of its own, and what the UI would show of it."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self.instance = instance
        self.keys: list[str] = []

    def run(self, well: Sequence[str] = (), sick: Sequence[str] = (), *, days_ago: float) -> str:
        """One run of the job, that many days ago."""
        self.keys = sorted({*self.keys, *well, *sick})
        self.instance.add_dynamic_partitions("workspaces", self.keys)
        config = dg.RunConfig(ops={"sync_ticks": Config(well=list(well), sick=list(sick))})
        result = JOB.execute_in_process(run_config=config, instance=self.instance, raise_on_error=False)
        for statement in (
            "UPDATE runs SET create_timestamp = create_timestamp - %s * interval '1 day' WHERE run_id = %s",
            "UPDATE event_logs SET timestamp = timestamp - %s * interval '1 day' WHERE run_id = %s",
        ):
            self.execute(statement, (days_ago, result.run_id))
        return result.run_id

    def execute(self, statement: str, parameters: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
        with self.instance.event_log_storage.index_connection() as connection:  # type: ignore[attr-defined]
            result = connection.exec_driver_sql(statement, parameters)
            return [tuple(row) for row in result.fetchall()] if result.returns_rows else []

    def shown(self, *, cached: bool) -> dict[str, object]:
        """All that Dagster shows of assets, partitions and checks."""
        if not cached:
            self.instance.event_log_storage.wipe_asset_cached_status(ASSET)
        latest = self.instance.event_log_storage.get_latest_asset_check_execution_by_key([CHECK])[CHECK]
        return {
            "partitions": statuses(self.instance, self.keys),
            "materialized": self.instance.get_materialized_partitions(ASSET),
            "newest": {
                kind: self.instance.event_log_storage.get_latest_storage_id_by_partition(ASSET, kind)
                for kind in (
                    dg.DagsterEventType.ASSET_MATERIALIZATION,
                    dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED,
                )
            },
            "ticks": self.instance.get_latest_materialization_event(sync_ticks.key),
            "check": (latest.status, latest.run_id, self.instance.get_run_by_id(latest.run_id) is not None),
        }

    def purge(self, retention: Retention = OLD, *, dry_run: bool = False, batches: int = 10**6) -> Purge:
        left = iter([False] * batches)
        return event_log_retention.purge(
            self.instance,
            job="calendar_sync",
            asset=ASSET,
            retention=retention,
            out_of_time=lambda: next(left, True),
            dry_run=dry_run,
        )

    def runs(self) -> set[str]:
        return {run.run_id for run in self.instance.get_runs()}

    def rows(self, run_ids: Iterable[str]) -> list[int]:
        """Rows of these runs in each of Dagster's tables."""
        chosen = list(run_ids)
        return [
            int(str(self.execute(f"SELECT count(*) FROM {table} WHERE run_id = ANY(%s)", (chosen,))[0][0]))
            for table in ("runs", "run_tags", "event_logs", "asset_check_executions")
        ]


@pytest.fixture
def log(instance: dg.DagsterInstance) -> Log:
    instance.wipe()
    return Log(instance)


def test_old_runs_go_with_all_their_rows_and_recent_ones_stay(log: Log) -> None:
    old = [log.run(["a"], days_ago=9), log.run(["a", "b"], days_ago=8)]
    recent = [log.run(["a"], days_ago=6), log.run(["b"], days_ago=0)]
    purged = log.purge()
    assert log.runs() == set(recent)
    assert log.rows(old) == [0, 0, 0, 0]
    assert (purged.runs, purged.check_evaluations, purged.finished) == (2, 2, True)
    assert purged.events > 20


def test_a_run_that_a_partition_or_check_still_shows_stays_however_old_it_is(log: Log) -> None:
    only_materialization = log.run(["dormant"], days_ago=300)
    red = log.run(["other"], ["sick"], days_ago=200)
    superseded = log.run(["other"], days_ago=100)
    log.run(["other"], days_ago=1)
    before = log.shown(cached=False)
    log.purge()
    assert superseded not in log.runs()
    assert {only_materialization, red} < log.runs()
    assert log.shown(cached=True) == before
    assert log.shown(cached=False) == before
    assert statuses(log.instance, ["dormant", "sick", "other"]) == {
        "dormant": AssetPartitionStatus.MATERIALIZED,
        "sick": AssetPartitionStatus.FAILED,
        "other": AssetPartitionStatus.MATERIALIZED,
    }


def test_the_newest_evaluation_of_a_check_stays_even_when_no_recent_run_judged(log: Log) -> None:
    log.run(["a"], days_ago=60)
    judged = log.run([], days_ago=50)
    log.purge()
    assert judged in log.runs()
    latest = log.instance.event_log_storage.get_latest_asset_check_execution_by_key([CHECK])[CHECK]
    assert latest.run_id == judged


def test_failed_runs_are_kept_for_longer(log: Log) -> None:
    old_failure, failure = log.run(["a"], ["b"], days_ago=31), log.run(["a"], ["b"], days_ago=29)
    newer = log.run(["a"], ["b"], days_ago=8)
    log.run(["a", "b"], days_ago=0)
    log.purge()
    assert old_failure not in log.runs()
    assert {failure, newer} < log.runs()


def test_superseded_materializations_go_from_runs_that_stay(log: Log) -> None:
    stays = log.run(["dormant", "busy"], days_ago=20)
    newest = log.run(["busy"], days_ago=0)
    purged = log.purge()
    events = log.execute(
        "SELECT partition, run_id FROM event_logs WHERE asset_key = %s ORDER BY id", (ASSET.to_string(),)
    )
    assert [row for row in events if row[0]] == [("dormant", stays), ("busy", newest)]
    assert purged.superseded_events == 1


def test_runs_of_other_jobs_and_runs_at_work_stay(log: Log) -> None:
    other = dg.define_asset_job("another", [sync_ticks]).resolve(
        asset_graph=dg.Definitions(assets=[sync_ticks]).resolve_asset_graph()
    )
    config = dg.RunConfig(ops={"sync_ticks": Config(well=[], sick=[])})
    run_id = other.execute_in_process(run_config=config, instance=log.instance, raise_on_error=False).run_id
    at_work = log.instance.create_run_for_job(
        JOB,
        status=dg.DagsterRunStatus.STARTED,
        run_config=config.to_config_dict(),  # type: ignore[no-untyped-call]  # dagster's, typed in parts
    ).run_id
    log.execute("UPDATE runs SET create_timestamp = create_timestamp - interval '99 days'")
    log.run(["a"], days_ago=0)
    log.purge()
    assert {run_id, at_work} < log.runs()


def test_a_dry_run_counts_what_the_purge_then_removes(log: Log) -> None:
    for days in (40, 39, 10, 9):
        log.run(["a", "b"], days_ago=days)
    log.run(["a"], days_ago=0)
    everything = log.rows(log.runs())
    planned = log.purge(dry_run=True)
    assert log.rows(log.runs()) == everything
    done = log.purge()
    assert planned.runs == done.runs == 3
    assert planned.events == done.events
    assert planned.check_evaluations == done.check_evaluations


def test_a_purge_that_runs_out_of_time_leaves_the_rest_to_the_next_one(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_log_retention, "RUNS_PER_BATCH", 2)
    monkeypatch.setattr(event_log_retention, "EVENTS_PER_BATCH", 2)
    for days in range(16, 10, -1):
        log.run(["a"], days_ago=days)
    log.run(["a"], days_ago=0)
    before = log.shown(cached=False)
    first = log.purge(batches=2)
    assert (first.runs, first.finished) == (4, False)
    assert log.shown(cached=False) == before
    assert log.purge().finished
    assert len(log.runs()) == 1


def test_a_purge_killed_between_rows_and_runs_is_made_good_by_the_next_one(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = log.run(["a"], days_ago=9)
    log.run(["a"], days_ago=0)

    def killed(run_id: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(log.instance, "delete_run", killed)
        with pytest.raises(KeyboardInterrupt):
            log.purge()
    assert log.rows([old])[0] == 1
    log.purge()
    assert log.rows([old]) == [0, 0, 0, 0]


@pytest.mark.parametrize("seed", range(3))
def test_no_history_of_runs_loses_a_status_to_the_purge(log: Log, seed: int) -> None:
    rng = Random(seed)
    keys = ["a", "b", "c", "d"]
    for days in sorted(rng.sample(range(80), 8), reverse=True):
        sick = [key for key in keys if rng.random() < 0.2]
        well = [key for key in keys if key not in sick and rng.random() < 0.4]
        log.run(well, sick, days_ago=days)
    before = log.shown(cached=rng.random() < 0.5)
    log.purge()
    assert log.shown(cached=True) == before
    assert log.shown(cached=False) == before
    log.run(["a"], days_ago=0)
    assert statuses(log.instance, keys)["a"] == AssetPartitionStatus.MATERIALIZED


def test_an_event_log_that_is_not_in_postgres_is_refused() -> None:
    with dg.DagsterInstance.ephemeral() as instance, pytest.raises(UserError, match="only an event log in Postgres"):
        Log(instance).purge()


def test_the_job_says_what_it_removed_and_the_sync_goes_on(
    google: Simulator, saas: Saas, log: Log, sync_environment: Environment
) -> None:
    user = google.add_user("ann@example.com")
    workspace = saas.workspace()
    saas.connect(workspace, user)
    first = run_tick(log.instance)
    run_tick(log.instance)
    log.execute("UPDATE runs SET create_timestamp = create_timestamp - interval '20 days'")
    saas.execute("UPDATE sync.runs SET started_at = started_at - interval '100 days'")
    job = build_defs().resolve_job_def("purge_event_log")
    result = job.execute_in_process(instance=log.instance)
    [handled] = [event for event in result.all_node_events if event.is_successful_output]
    said = {name: value.value for name, value in handled.step_output_data.metadata.items()}
    assert (said["runs_deleted"], said["runs_kept_for_a_status"], said["sync_runs_deleted"]) == (0, 2, 2), said
    assert first.run_id in log.runs(), "the workspace was materialized in it"
    assert said["finished"]
    third = run_tick(log.instance)
    assert third.success
    assert checks(log.instance, third.run_id)["nobody_is_needed"].passed
    assert statuses(log.instance, [workspace.partition_key]) == {
        workspace.partition_key: AssetPartitionStatus.MATERIALIZED
    }


def test_bookkeeping_is_trimmed_by_its_age(saas: Saas) -> None:
    saas.execute(
        "INSERT INTO sync.runs (run_id, shard, of, started_at) "
        "SELECT 'run-' || days, 0, 1, now() - make_interval(days => days, mins => 1) "
        "FROM unnest('{0,89,90,500}'::int[]) AS days"
    )
    for table, columns, values in (
        ("freshness", "le_seconds, changes", "60, 1"),
        ("webhook_messages", "outcome, messages", "'accepted', 1"),
        ("call_days", "calls", "1"),
        ("api_calls", "tenant_id, method, outcome, calls", "gen_random_uuid(), 'events.list', '200', 1"),
    ):
        saas.execute(
            f"INSERT INTO sync.{table} (day, {columns}) SELECT (now() AT TIME ZONE 'UTC')::date - days, {values} "
            "FROM unnest('{0,400,401}'::int[]) AS days"
        )
    with DatabaseRouter(Shard("main", saas.dsn)) as router:
        [shard] = router.shards()
        expected = {"runs": 2, "freshness": 1, "webhook_messages": 1, "call_days": 1, "api_calls": 1}
        for dry_run in (True, False):
            with shard.transaction() as connection:
                assert history.trim(connection, dry_run=dry_run).rows == expected
        with shard.transaction() as connection:
            assert history.trim(connection).total == 0
