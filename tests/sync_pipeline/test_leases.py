"""Who may take what, and for how long: shares of tenants across runs, heartbeats, and runs that keep watch."""

import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from uuid import uuid4

import psycopg
import pytest

from devstack.google_calendar import Simulator
from sync_pipeline import leases, runs, tick
from sync_pipeline.leases import PushTerms
from sync_pipeline.services import Services
from sync_pipeline.tick import TickResult
from sync_pipeline.workspaces import Workspace
from tests.sync_pipeline.conftest import Saas

Tick = Callable[[], TickResult]
NO_PUSH = PushTerms(b"", 0.0)


@pytest.fixture
def crowd(google: Simulator, saas: Saas, tick_once: Tick) -> list[Workspace]:
    """Six synced workspaces of one tenant."""
    tenant = saas.workspace().tenant_id
    made = []
    for n in range(6):
        workspace = saas.workspace(tenant)
        saas.connect(workspace, google.add_user(f"user-{n}@example.com"))
        made.append(workspace)
    tick_once()
    return made


def claim(services: Services, owner: str, workspaces: list[Workspace], *, limit: int) -> leases.Taken:
    with services.router.shards()[0].transaction() as connection:
        since = runs.now(connection)
    with services.router.shards()[0].transaction() as connection:
        return leases.claim(connection, workspaces, owner=owner, since=since, tenant_limit=limit, push=NO_PUSH)


def test_all_runs_together_work_on_no_more_of_a_tenant_than_its_share(
    services: Services, crowd: list[Workspace]
) -> None:
    first = claim(services, "one", crowd[:2], limit=3)
    second = claim(services, "two", crowd[2:], limit=3)
    assert [len(taken.claims) for taken in (first, second)] == [2, 1]
    assert second.busy == tuple(crowd[3:])


def test_the_share_of_a_dead_run_is_free_when_its_leases_have_ended(
    services: Services, saas: Saas, crowd: list[Workspace]
) -> None:
    claim(services, "dead", crowd[:3], limit=3)
    assert claim(services, "two", crowd[3:], limit=3).claims == ()
    saas.execute("UPDATE sync.calendar_state SET lease_until = now() - interval '1 second' WHERE lease_owner = 'dead'")
    saas.execute(
        "UPDATE sync.connection_state SET lease_until = now() - interval '1 second' WHERE lease_owner = 'dead'"
    )
    assert len(claim(services, "two", crowd[3:], limit=3).claims) == 3


def test_a_tenant_that_another_run_is_taking_from_right_now_is_busy_and_not_waited_for(
    services: Services, crowd: list[Workspace]
) -> None:
    (shard,) = services.router.shards()
    with shard.transaction() as other:
        other.execute("SELECT pg_advisory_xact_lock(hashtextextended('sync/' || %s::text, 0))", [crowd[0].tenant_id])
        taken = claim(services, "two", crowd, limit=8)
    assert (taken.claims, taken.busy) == ((), tuple(crowd))


def test_a_heartbeat_renews_what_the_run_holds_and_never_what_it_has_lost(
    services: Services, saas: Saas, crowd: list[Workspace]
) -> None:
    claim(services, "run", crowd[:2], limit=8)
    soon, ended = "now() + interval '5 seconds'", "now() - interval '5 seconds'"
    for workspace, until in zip(crowd[:2], (soon, ended), strict=True):
        for table in ("calendar_state", "connection_state"):
            saas.execute(
                f"UPDATE sync.{table} SET lease_until = {until} WHERE workspace_id = %s", workspace.workspace_id
            )
    with services.router.shards()[0].transaction() as connection:
        leases.renew_all(connection, owner="run")

    def is_held(workspace: Workspace) -> list[tuple[object, ...]]:
        return saas.execute(
            "SELECT lease_until > now() + interval '60 seconds' FROM sync.calendar_state WHERE workspace_id = %s "
            "UNION ALL SELECT lease_until > now() + interval '60 seconds' FROM sync.connection_state "
            "WHERE workspace_id = %s",
            workspace.workspace_id,
            workspace.workspace_id,
        )

    assert is_held(crowd[0]) == [(True,), (True,)]
    assert is_held(crowd[1]) == [(False,), (False,)]


def test_a_run_at_work_beats_for_the_leases_of_its_workers(
    google: Simulator, saas: Saas, services: Services, crowd: list[Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tick, "HEARTBEAT_SECONDS", 0.05)
    beaten = threading.Event()
    renew_all = leases.renew_all

    def renew(connection: object, *, owner: str) -> None:
        renew_all(connection, owner=owner)  # type: ignore[arg-type]  # passed through
        beaten.set()

    monkeypatch.setattr(leases, "renew_all", renew)
    google.add_fault("latency", method="events.list", seconds=0.3)
    before = saas.one("SELECT max(heartbeat_at) FROM sync.runs")
    tick.run_tick(services, run_id="beats")
    assert beaten.is_set()
    assert before < saas.one("SELECT heartbeat_at FROM sync.runs WHERE run_id = 'beats'")


def test_the_least_recently_served_tenant_comes_first(google: Simulator, saas: Saas, services: Services) -> None:
    made = [saas.workspace() for _ in range(3)]
    for n, workspace in enumerate(made):
        saas.connect(workspace, google.add_user(f"user-{n}@example.com"))
    tick.run_tick(services, run_id="all")
    for minutes, workspace in zip((1, 3, 2), made, strict=True):
        saas.execute(
            "UPDATE sync.workspace_state SET last_served_at = now() - make_interval(mins => %s) "
            "WHERE workspace_id = %s",
            minutes,
            workspace.workspace_id,
        )
    with services.router.shards()[0].transaction() as connection:
        due = leases.find_due(connection, since=runs.now(connection))
    assert due == [made[1], made[2], made[0]]


def test_a_run_that_keeps_watch_takes_what_becomes_due_meanwhile(
    google: Simulator, saas: Saas, services: Services
) -> None:
    workspace = saas.workspace()
    saas.connect(workspace, user := google.add_user("ann@example.com"))
    tick.run_tick(services, run_id="baseline")
    saas.execute("UPDATE sync.calendar_state SET due_at = now() + interval '1 hour'")
    saas.execute("UPDATE sync.connection_state SET list_due_at = now() + interval '1 hour'")
    moment = 0.0
    slept = 0

    def sleep(seconds: float) -> None:
        nonlocal moment, slept
        moment += seconds
        slept += 1
        if slept == 3:  # a notification
            google.edit(user.calendars[0], [{"op": "insert", "event": {"summary": "new", **NOON}}])
            saas.execute("UPDATE sync.calendar_state SET due_at = now(), notified_at = now()")
        elif slept > 3:
            saas.execute("UPDATE sync.calendar_state SET due_at = now() + interval '1 hour'")

    watching = replace(services, clock=lambda: moment, sleep=sleep)
    result = tick.run_tick(watching, run_id="watch", watch_seconds=30.0)
    assert (result.workspaces_due, result.tally.events_upserted) == (1, 1)
    assert slept >= 28, "it went on watching until the end"
    assert tick.run_tick(services, run_id=str(uuid4())).workspaces_due == 0


def test_a_run_serves_a_calendar_once_however_soon_it_is_due_again(
    google: Simulator, saas: Saas, services: Services
) -> None:
    saas.connect(saas.workspace(), google.add_user("ann@example.com"))
    tick.run_tick(services, run_id="baseline")
    google.reset_counts()
    tick.run_tick(services, run_id="once")
    assert google.counts().count("events.list") == 1


def test_a_process_frozen_before_its_commit_loses_its_locks_whatever_it_did_last(
    services: Services, saas: Saas
) -> None:
    (shard,) = services.router.shards()
    with suppress(psycopg.Error), shard.dedicated(autocommit=False) as frozen:
        frozen.execute("SET idle_in_transaction_session_timeout = '100ms'")
        frozen.commit()
        runs.count_freshness(frozen, {60: 1, 120: 2})
        runs.count_calls(frozen, uuid4(), Counter({("events.list", "200"): 1, ("oauth.refresh", "200"): 1}))
        for _ in range(100):
            if not saas.execute("SELECT pid FROM pg_stat_activity WHERE pid = %s", frozen.info.backend_pid):
                break
            threading.Event().wait(0.05)
        else:
            raise AssertionError("the transaction lives on")


NOON = {
    "start": {"dateTime": "2026-11-24T12:00:00Z"},
    "end": {"dateTime": "2026-11-24T13:00:00Z"},
}
