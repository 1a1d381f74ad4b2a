"""The sensor of a capability against a real database and a Dagster instance."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import psycopg
import pytest

from devstack.servers import Database
from scaling import episodes, samples
from scaling.capabilities import Capability
from scaling.catalogue import catalogue
from scaling.dagster_sensors import capability_sensor
from scaling.databases import DatabaseRouter, Shard
from scaling.definitions import build_defs
from scaling.episodes import EpisodeState, Watch
from scaling.samples import Sample
from scaling.settings import ArchiveSourceSettings, AutomationSettings, SyncScheduleSettings, load
from scaling.thresholds import Phase

pytestmark = pytest.mark.usefixtures("definitions_load_alone")


class Databases(dg.ConfigurableResource[None]):
    dsn: str

    @contextmanager
    def databases(self) -> Iterator[DatabaseRouter]:
        with DatabaseRouter(Shard("main", self.dsn)) as router:
            yield router


class Acted(dg.Config):
    episode: int


@dg.op
def act(config: Acted) -> None:
    raise dg.Failure(f"the table is locked, episode {config.episode}")


@dg.job
def acting_job() -> None:
    act()


SENSOR = capability_sensor(
    Capability.PARALLEL_SYNC, acting_job, op="act", resource="sync", automation=AutomationSettings()
)


def crossed(database: Database, state: str = "proposed", *, first: int = 1, number: int = 1) -> None:
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO scaling.episodes (rule, episode_no, rule_version, capability, state, value, threshold,"
            " fired_at) SELECT 'google_tenants', n, 'v', 'parallel_sync', %s, 31, 30, now()"
            " FROM generate_series(%s::int, %s::int) n",
            [state, first, first + number - 1],
        )


def look(database: Database, instance: dg.DagsterInstance) -> tuple[list[dg.RunRequest], str]:
    with dg.build_sensor_context(
        instance=instance, resources={"sync": Databases(dsn=database.dsn)}, sensor_name=SENSOR.name
    ) as context:
        found = SENSOR.evaluate_tick(context)
    return list(found.run_requests or []), found.skip_message or ""


def run(instance: dg.DagsterInstance, request: dg.RunRequest) -> dg.ExecuteInProcessResult:
    return acting_job.execute_in_process(
        instance=instance, run_config=request.run_config, tags=dict(request.tags), raise_on_error=False
    )


def only(database: Database) -> episodes.Episode:
    with psycopg.connect(database.dsn) as connection:
        (episode,) = episodes.listing(connection)
    return episode


def decide(database: Database, by: str = "ann") -> None:
    with psycopg.connect(database.dsn) as connection:
        (episode,) = episodes.listing(connection)
        episodes.approve(connection, episode.id, by)


def test_a_proposal_waits_and_says_how_to_approve_it(
    database: Database, settings_environment: Callable[..., None]
) -> None:
    settings_environment(database, SCALING_PARALLEL_SYNC="propose")
    with dg.DagsterInstance.ephemeral() as instance:
        assert "Nothing was crossed" in look(database, instance)[1]
        crossed(database)
        requests, said = look(database, instance)
        assert requests == []
        assert "approve_episode" in said
        assert "python -m scaling approve" in said
        decide(database)
        (request,), _ = look(database, instance)
    assert request.run_config == {"ops": {"act": {"config": {"episode": only(database).id}}}}
    assert request.run_key == episodes.run_key(only(database))


def test_every_look_asks_for_the_same_run_until_it_claims(
    database: Database, settings_environment: Callable[..., None]
) -> None:
    settings_environment(database, SCALING_PARALLEL_SYNC="auto")
    crossed(database)
    with dg.DagsterInstance.ephemeral() as instance:
        (first,), _ = look(database, instance)
        (again,), _ = look(database, instance)
        assert first.run_key == again.run_key


def test_a_run_that_ends_before_it_claims_is_an_attempt_and_the_third_asks_for_a_human(
    database: Database, settings_environment: Callable[..., None]
) -> None:
    settings_environment(database, SCALING_PARALLEL_SYNC="auto")
    crossed(database)
    keys = set()
    with dg.DagsterInstance.ephemeral() as instance:
        for _ in range(3):
            (request,), _ = look(database, instance)
            keys.add(request.run_key)
            assert not run(instance, request).success
            assert look(database, instance)[0] == []
            assert only(database).error == f"the table is locked, episode {only(database).id}"
            with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
                connection.execute("UPDATE scaling.episodes SET retry_at = now() WHERE retry_at IS NOT NULL")
        assert len(keys) == 3
        assert only(database).state is EpisodeState.NEEDS_HUMAN
        assert "waiting for a human" in look(database, instance)[1]


def test_a_claim_whose_run_has_ended_is_given_up_before_its_deadline(
    database: Database, settings_environment: Callable[..., None]
) -> None:
    settings_environment(database, SCALING_PARALLEL_SYNC="auto")
    crossed(database)
    with dg.DagsterInstance.ephemeral() as instance:
        (request,), _ = look(database, instance)
        ended = run(instance, request)
        with psycopg.connect(database.dsn) as connection:
            assert episodes.claim(connection, only(database).id, ended.run_id, timedelta(hours=1))
        requests, said = look(database, instance)
    assert requests == []
    assert "tried again later" in said
    assert only(database).state is EpisodeState.ACTION_FAILED
    assert only(database).retry_at is not None
    assert only(database).attempts == 1


def test_off_acts_on_nothing(database: Database, settings_environment: Callable[..., None]) -> None:
    settings_environment(database, SCALING_PARALLEL_SYNC="off")
    crossed(database, "proposed")
    with dg.DagsterInstance.ephemeral() as instance:
        assert look(database, instance)[0] == []


def test_the_one_episode_to_act_on_is_found_among_ten_thousand(
    database: Database, settings_environment: Callable[..., None]
) -> None:
    settings_environment(database, SCALING_PARALLEL_SYNC="auto")
    crossed(database, "acted", number=10_000)
    with dg.DagsterInstance.ephemeral() as instance:
        crossed(database, first=10_001)
        (request,), _ = look(database, instance)
    assert request.run_key == "google_tenants::10001:0"


def test_approving_in_the_launchpad_is_one_step_and_leads_to_one_request(
    database: Database, settings_environment: Callable[..., None]
) -> None:
    settings_environment(database, SCALING_PARALLEL_SYNC="propose")
    crossed(database)
    config = {"ops": {"approve": {"config": {"episode": only(database).id, "by": "ann"}}}}
    with dg.DagsterInstance.ephemeral() as instance:
        job = build_defs().resolve_job_def("approve_episode")
        assert job.execute_in_process(instance=instance, run_config=config).success
        assert len(look(database, instance)[0]) == 1
    assert only(database).approved_by == "ann"


def test_a_sick_source_is_a_warning_and_a_given_up_episode_an_error(
    database: Database, settings_environment: Callable[..., None], tmp_path: Path
) -> None:
    thresholds = tmp_path / "thresholds.toml"
    thresholds.write_text("[users_total]\nsql = 'SELECT 1 / 0 AS value'\n")
    settings_environment(database, VERCEL_TOKEN="canary-token", SCALING_CATALOGUE_FILE=str(thresholds))
    crossed(database, "needs_human")
    with dg.DagsterInstance.ephemeral() as instance:
        result = build_defs().resolve_job_def("scaling_metrics_job").execute_in_process(instance=instance)
        assert "canary-token" not in str(instance.all_logs(result.run_id))
    found = {each.check_name: each for each in result.get_asset_check_evaluations()}
    assert {name: (each.passed, each.severity) for name, each in found.items()} == {
        "below_thresholds": (True, dg.AssetCheckSeverity.WARN),
        "nobody_is_needed": (False, dg.AssetCheckSeverity.ERROR),
        "sources_answer": (False, dg.AssetCheckSeverity.WARN),
    }
    assert found["sources_answer"].description == "users_total is error"


def test_the_hourly_run_measures_judges_and_shows_what_nobody_has_taken_up(
    database: Database, settings_environment: Callable[..., None], tmp_path: Path
) -> None:
    thresholds = tmp_path / "thresholds.toml"
    thresholds.write_text("[users_total]\nthreshold = 0\nrecovery = 0\nbreaches = 1\nof = 1\n")
    settings_environment(database, SCALING_CATALOGUE_FILE=str(thresholds))
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        connection.execute("INSERT INTO tenants (id, name) VALUES (gen_random_uuid(), 'T')")
        connection.execute("INSERT INTO users (tenant_id, email) SELECT id, 'someone@example.com' FROM tenants")
    job = build_defs().resolve_job_def("scaling_metrics_job")
    with dg.DagsterInstance.ephemeral() as instance:
        result = job.execute_in_process(instance=instance)
        event = instance.get_latest_materialization_event(dg.AssetKey("scaling_metrics"))
        assert "someone@example.com" not in str(instance.all_logs(result.run_id))
        found = {each.check_name: each for each in result.get_asset_check_evaluations()}
        assert not found["below_thresholds"].passed
        assert "Users is 1, threshold > 0; owner platform, docs/operations.md#users_total" in str(
            found["below_thresholds"].description
        )
        with psycopg.connect(database.dsn) as connection:
            (episode,) = episodes.listing(connection)
            episodes.acknowledge(connection, episode.id, "ann")
        again = job.execute_in_process(instance=instance)
        assert {each.check_name: each.passed for each in again.get_asset_check_evaluations()}["below_thresholds"]
    assert event is not None
    assert event.asset_materialization is not None
    shown = event.asset_materialization.metadata
    assert shown["users_total"].value == 1
    assert "fired, episode" in str(shown["headroom"])
    assert (episode.rule, episode.state, episode.capability) == ("users_total", EpisodeState.OBSERVED, None)


def test_forecasts_show_a_date_and_a_light_picture_of_what_is_nearest(
    database: Database, settings_environment: Callable[..., None]
) -> None:
    settings_environment(database)
    now = datetime.now(UTC)
    with psycopg.connect(database.dsn) as connection:
        rising = [Sample("users_total", now - timedelta(days=n), 900.0 - 5 * n + n % 3) for n in range(30, -1, -1)]
        samples.record(connection, rising)
    job = build_defs().resolve_job_def("scaling_forecasts_job")
    with dg.DagsterInstance.ephemeral() as instance:
        assert job.execute_in_process(instance=instance).success
        event = instance.get_latest_materialization_event(dg.AssetKey("scaling_forecasts"))
    assert event is not None
    assert event.asset_materialization is not None
    shown = event.asset_materialization.metadata
    assert (shown["metrics"].value, shown["with_a_date"].value, shown["crossed"].value) == (1, 1, 0)
    assert "crosses about" in str(shown["forecasts"])
    assert "data:image/png;base64," in str(shown["trend of users_total"].value)
    assert len(str(shown["trend of users_total"].value)) < 30_000


def test_a_rule_is_re_armed_in_the_launchpad(database: Database, settings_environment: Callable[..., None]) -> None:
    settings_environment(database)
    now = datetime.now(UTC)
    watch = catalogue(load(ArchiveSourceSettings), load(SyncScheduleSettings)).named("users_total")
    assert watch.rule is not None
    with psycopg.connect(database.dsn) as connection:
        samples.record(connection, [Sample("users_total", now - timedelta(days=n), 2000.0) for n in (2, 1, 0)])
        episodes.evaluate(connection, [Watch(watch.rule)], now)
    config = {"ops": {"rearm": {"config": {"metric": "users_total", "by": "ann"}}}}
    with dg.DagsterInstance.ephemeral() as instance:
        job = build_defs().resolve_job_def("rearm_rule")
        assert job.execute_in_process(instance=instance, run_config=config).success
        refused = job.execute_in_process(instance=instance, run_config=config, raise_on_error=False)
    assert not refused.success
    assert only(database).recovered_at is not None
    with psycopg.connect(database.dsn) as connection:
        (standing,) = episodes.standings(connection)
    assert standing.state.phase is Phase.OK


def test_what_an_action_changed_is_measured_and_shown_with_its_episode(
    database: Database, settings_environment: Callable[..., None]
) -> None:
    settings_environment(database)
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO scaling.episodes (rule, episode_no, rule_version, capability, state, value, threshold,"
            " fired_at, acted_at) VALUES ('audit_logs_bytes', 1, 'v', 'audit_log_partitioning', 'acted', 2e9, 1e9,"
            " now() - interval '2 hours', now() - interval '1 hour')"
        )
        connection.execute(
            "INSERT INTO scaling.samples (metric, at, status, value) VALUES"
            " ('audit_logs_bytes', now() - interval '2 hours', 'ok', 4194304),"
            " ('audit_logs_bytes', now() - interval '1 minute', 'ok', 1048576)"
        )
    with dg.DagsterInstance.ephemeral() as instance:
        assert build_defs().resolve_job_def("scaling_metrics_job").execute_in_process(instance=instance).success
        event = instance.get_latest_materialization_event(dg.AssetKey("scaling_episodes"))
    effect = only(database).effect
    assert effect is not None
    assert "1.0 MiB, before 4.0 MiB (-75%)" in effect["sentence"]
    assert event is not None
    assert event.asset_materialization is not None
    assert effect["sentence"] in str(event.asset_materialization.metadata["episodes"])
