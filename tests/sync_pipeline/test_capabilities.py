"""What the sync does while a capability is not in force, and that a switch takes effect on the next tick."""

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any
from uuid import uuid4

import dagster as dg
import psycopg
import pytest

from devstack.google_calendar import Simulator
from devstack.servers import Database
from scaling import capabilities
from scaling.capabilities import Capability
from sync_pipeline import tick
from sync_pipeline.cadence import Cadence
from sync_pipeline.channels import ChannelKeeper
from sync_pipeline.jobs import enable_incremental_sync, enable_parallel_sync
from sync_pipeline.resources import SyncResource
from sync_pipeline.services import InForce, Services, open_services
from sync_pipeline.tick import SEQUENTIAL_WORKSPACES, TickResult
from sync_pipeline.workspaces import Workspace
from tests.sync_pipeline.conftest import Saas, differences
from tests.sync_pipeline.scenes import connected, delete, insert, meeting

COMPLETE = InForce(incremental=False)
SEQUENTIAL = InForce(parallel=False)
LONG = 36000.0


def run(services: Services, *, shard: int = 0, watch_seconds: float = 0.0) -> TickResult:
    return tick.run_tick(services, run_id=f"test-{uuid4()}", shard=shard, watch_seconds=watch_seconds)


def served(result: TickResult) -> set[Workspace]:
    return {one.workspace for one in result.results}


def test_without_incremental_sync_every_visit_reads_everything_and_changes_nothing_that_did_not_change(
    google: Simulator, saas: Saas, services: Services
) -> None:
    workspace, calendar = connected(google, saas)
    _, gone = insert(google, calendar, meeting(1), meeting(2))
    services = replace(services, in_force=COMPLETE)
    first = run(services)
    changed_at = saas.execute("SELECT event_id, changed_at FROM sync.calendar_events ORDER BY 1")
    second = run(services)
    assert (first.tally.full_syncs, second.tally.full_syncs, second.tally.incremental_syncs) == (1, 1, 0)
    assert second.tally.events_seen == 2
    assert (second.tally.events_upserted, second.tally.events_deleted) == (0, 0)
    assert saas.execute("SELECT event_id, changed_at FROM sync.calendar_events ORDER BY 1") == changed_at
    delete(google, calendar, gone)
    insert(google, calendar, meeting(3))
    third = run(services)
    assert (third.tally.events_upserted, third.tally.events_deleted) == (1, 1)
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


def test_a_token_got_while_it_was_off_is_used_at_once_after_the_switch(
    google: Simulator, saas: Saas, services: Services
) -> None:
    _, calendar = connected(google, saas)
    insert(google, calendar, meeting(1), meeting(2))
    run(replace(services, in_force=COMPLETE))
    insert(google, calendar, meeting(3))
    result = run(services)
    assert (result.tally.full_syncs, result.tally.incremental_syncs, result.tally.events_seen) == (0, 1, 1)


def test_complete_readings_of_a_quiet_calendar_do_not_make_it_look_busy(
    google: Simulator, saas: Saas, services: Services
) -> None:
    _, calendar = connected(google, saas)
    insert(google, calendar, meeting(1))
    services = replace(services, in_force=COMPLETE)
    for _ in range(3):
        run(services)
    assert saas.calendar(calendar, "change_count") == (0,)
    insert(google, calendar, meeting(2))
    run(services)
    ((count,),) = saas.execute("SELECT change_count FROM sync.calendar_state")
    assert isinstance(count, float)
    assert 0.9 < count <= 1


def test_without_incremental_sync_the_interval_is_fixed_whatever_was_planned(
    google: Simulator, saas: Saas, services: Services
) -> None:
    connected(google, saas)
    adaptive = replace(
        services,
        cadence=Cadence(
            poll_seconds=60.0, list_seconds=60.0, rng=Random(1), ceiling_seconds=LONG, freshness_seconds=LONG
        ),
    )
    run(adaptive)
    planned = "extract(epoch FROM due_at - last_finished_at)::float8"
    ((before,),) = saas.execute(f"SELECT {planned} FROM sync.calendar_state")
    assert isinstance(before, float)
    assert before > 1000
    saas.execute("UPDATE sync.connection_state SET list_due_at = now() + interval '1 day'")
    fixed = replace(adaptive, in_force=COMPLETE)
    run(fixed)
    ((after, listed),) = saas.execute(
        f"SELECT {planned}, extract(epoch FROM s.list_due_at - s.list_finished_at)::float8 "
        "FROM sync.calendar_state c JOIN sync.connection_state s USING (connection_id)"
    )
    assert (after, listed) == (75.0, 75.0)  # a quarter of jitter at most
    saas.execute("UPDATE sync.calendar_state SET due_at = 'epoch', last_started_at = NULL")
    assert run(fixed).tally.full_syncs == 1
    assert saas.one(f"SELECT {planned} BETWEEN 45 AND 75 FROM sync.calendar_state") == (True,)


def test_without_incremental_sync_no_channel_is_opened_and_open_ones_are_stopped(
    google: Simulator, saas: Saas, services: Services
) -> None:
    connected(google, saas)
    keeper = ChannelKeeper("https://hooks.example/google", new_token=lambda: "secret", random_bytes=Random(1).randbytes)
    pushed = replace(services, keeper=keeper)
    run(replace(pushed, in_force=COMPLETE))
    assert saas.one("SELECT count(*) FROM sync.channels") == (0,)
    run(pushed)
    assert saas.one("SELECT count(*) FROM sync.channels WHERE state = 'open'") == (2,)
    result = run(replace(pushed, in_force=COMPLETE), watch_seconds=30.0)
    assert result.failed == ()
    assert saas.one("SELECT count(*) FROM sync.channels") == (0,)


def test_without_parallel_sync_a_tick_serves_five_workspaces_and_the_next_tick_others(
    google: Simulator, saas: Saas, services: Services
) -> None:
    everyone = {connected(google, saas, f"user{number}")[0] for number in range(12)}
    services = replace(services, in_force=SEQUENTIAL)
    rounds = [run(services) for _ in range(3)]
    assert [len(served(result)) for result in rounds] == [SEQUENTIAL_WORKSPACES] * 3
    assert [result.workspaces_due for result in rounds] == [12, 12, 12]
    assert served(rounds[0]) | served(rounds[1]) | served(rounds[2]) == everyone
    assert not served(rounds[0]) & served(rounds[1])
    assert len(run(services, shard=1).results) == 0  # a second run of the same moment adds nothing
    assert len(run(replace(services, in_force=InForce())).results) == 12


def test_without_parallel_sync_a_tenant_of_many_workspaces_starves_nobody(
    google: Simulator, saas: Saas, services: Services
) -> None:
    big = uuid4()
    for number in range(8):
        saas.connect(saas.workspace(big), google.add_user(f"big{number}@example.com"))
    small = {connected(google, saas, f"small{number}")[0] for number in range(6)}
    services = replace(services, in_force=SEQUENTIAL)
    met: set[Workspace] = set()
    for _ in range(2):
        met |= served(run(services))
    assert small <= met
    for _ in range(10):  # seven tenants, one workspace of each in turn
        met |= served(run(services))
    assert len(met) == 6 + 8


def test_without_parallel_sync_one_workspace_is_worked_on_at_a_time(
    google: Simulator, saas: Saas, services: Services
) -> None:
    for number in range(4):
        connected(google, saas, f"user{number}")
    assert services.as_in_force() is services
    assert replace(services, in_force=SEQUENTIAL).as_in_force().parallelism == 1
    result = run(replace(services, in_force=SEQUENTIAL))
    assert result.duration_seconds >= sum(one.seconds for one in result.results)


def test_a_human_who_syncs_chosen_workspaces_gets_all_of_them(
    google: Simulator, saas: Saas, services: Services
) -> None:
    chosen = [connected(google, saas, f"user{number}")[0] for number in range(7)]
    result = tick.sync_now(replace(services, in_force=InForce(False, False)), chosen, run_id="by-hand")
    assert served(result) == set(chosen)


def test_a_run_records_what_was_in_force(google: Simulator, saas: Saas, services: Services) -> None:
    connected(google, saas)
    for in_force in (InForce(), COMPLETE, SEQUENTIAL):
        run(replace(services, in_force=in_force))
    recorded = saas.execute("SELECT incremental, parallel FROM sync.runs ORDER BY started_at")
    assert recorded == [(True, True), (False, True), (True, False)]


def test_a_switch_takes_effect_on_the_next_tick(
    database: Database, google: Simulator, saas: Saas, sync_environment: Callable[..., None]
) -> None:
    _, calendar = connected(google, saas)
    insert(google, calendar, meeting(1))
    sync_environment(SCALING_INCREMENTAL_SYNC="auto", SCALING_PARALLEL_SYNC="propose")
    seen = []
    for turn in range(3):
        with open_services(rng=Random(1)) as services:
            result = run(services)
            seen.append((str(services.in_force), result.tally.full_syncs, result.tally.incremental_syncs))
        with psycopg.connect(database.dsn) as connection:
            wanted = (Capability.INCREMENTAL_SYNC, Capability.PARALLEL_SYNC)[min(turn, 1)]
            capabilities.switch(connection, wanted, on=True, by="test", reason="it is time")
    assert seen == [("none", 1, 0), ("incremental_sync", 0, 1), ("incremental_sync, parallel_sync", 0, 1)]
    sync_environment(SCALING_INCREMENTAL_SYNC="off", SCALING_PARALLEL_SYNC="on")  # the modes decide over the switch
    with open_services(rng=Random(1)) as services:
        assert services.in_force == InForce(incremental=False, parallel=True)


def episode(saas: Saas, capability: Capability, state: str = "approved") -> int:
    """An episode of a crossed threshold, approved by Ann."""
    ((number,),) = saas.execute(
        "INSERT INTO scaling.episodes (rule, episode_no, rule_version, capability, state, value, threshold, fired_at, "
        "approved_by, approved_at) VALUES ('google_calls_month', 1, 'v', %s, %s, 12000, 10000, now(), 'ann', now()) "
        "RETURNING id",
        capability.value,
        state,
    )
    assert isinstance(number, int)
    return number


def launch(job: dg.JobDefinition, op: str, number: int) -> dg.ExecuteInProcessResult:
    return job.execute_in_process(
        run_config={"ops": {op: {"config": {"episode": number}}}},
        resources={"sync": SyncResource()},
        raise_on_error=False,
    )


JOBS = [
    (Capability.INCREMENTAL_SYNC, enable_incremental_sync, "switch_incremental_sync_on"),
    (Capability.PARALLEL_SYNC, enable_parallel_sync, "switch_parallel_sync_on"),
]


@pytest.mark.parametrize(("capability", "job", "op"), JOBS)
def test_the_job_switches_once_for_an_approved_episode_and_says_why(
    capability: Capability,
    job: dg.JobDefinition,
    op: str,
    saas: Saas,
    sync_environment: Callable[..., None],
) -> None:
    number = episode(saas, capability)
    assert launch(job, op, number).success
    again = launch(job, op, number)  # somebody else's by now: green, and nothing happens
    assert again.success
    assert saas.execute("SELECT name, active FROM scaling.capabilities") == [(capability.value, True)]
    assert saas.execute("SELECT changed_by, reason, episode_id FROM scaling.capability_changes") == [
        (
            "google_calls_month, approved by ann",
            "google_calls_month is 12,000, threshold 10,000",
            number,
        )
    ]
    assert saas.one("SELECT state, outcome, attempts FROM scaling.episodes") == (
        "acted",
        {"capability": capability.value, "switched": True},
        1,
    )


def test_an_episode_nobody_approved_switches_nothing(saas: Saas, sync_environment: Callable[..., None]) -> None:
    number = episode(saas, Capability.PARALLEL_SYNC, "observed")
    assert launch(enable_parallel_sync, "switch_parallel_sync_on", number).success
    assert saas.one("SELECT count(*) FROM scaling.capabilities") == (0,)


def test_the_job_of_another_capability_refuses_an_episode_and_leaves_it_as_it_is(
    saas: Saas, sync_environment: Callable[..., None]
) -> None:
    number = episode(saas, Capability.PARALLEL_SYNC)
    result = launch(enable_incremental_sync, "switch_incremental_sync_on", number)
    assert not result.success
    assert saas.one("SELECT state, attempts FROM scaling.episodes") == ("approved", 0)


def test_a_switch_whose_episode_was_given_to_another_run_is_rolled_back(
    saas: Saas, sync_environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    number = episode(saas, Capability.INCREMENTAL_SYNC)
    switch = capabilities.switch

    def switch_late(*arguments: Any, **options: Any) -> bool:
        saas.execute("UPDATE scaling.episodes SET fence = fence + 1, run_id = 'another'")
        return switch(*arguments, **options)

    monkeypatch.setattr(capabilities, "switch", switch_late)
    assert launch(enable_incremental_sync, "switch_incremental_sync_on", number).success
    assert saas.one("SELECT count(*) FROM scaling.capabilities") == (0,)
    assert saas.one("SELECT state, run_id FROM scaling.episodes") == ("acting", "another")


def test_a_login_that_is_only_a_worker_reads_what_is_in_force_and_switches_it(
    google: Simulator, saas: Saas, login: Callable[..., str], sync_environment: Callable[..., None]
) -> None:
    connected(google, saas)
    sync_environment(
        DATABASE_URL=login("pipeline_worker"), SCALING_INCREMENTAL_SYNC="auto", SCALING_PARALLEL_SYNC="auto"
    )
    assert launch(enable_parallel_sync, "switch_parallel_sync_on", episode(saas, Capability.PARALLEL_SYNC)).success
    with open_services(rng=Random(1)) as services:
        assert services.in_force == InForce(incremental=False, parallel=True)
        assert run(services).tally.full_syncs == 1
