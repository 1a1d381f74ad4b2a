"""Workers that die, pause, or meet: nothing is lost, nothing half done is seen (cases 1 to 10)."""

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import pytest
from psycopg import conninfo

from devstack.google_calendar import Simulator
from devstack.servers import Database
from scaling.databases import DatabaseRouter, Shard
from sync_pipeline import event_store, tick
from sync_pipeline.events import read_items
from sync_pipeline.leases import CalendarLease
from sync_pipeline.services import Services
from sync_pipeline.workspaces import Workspace
from tests.sync_pipeline.conftest import Saas, differences
from tests.sync_pipeline.crash import paused_worker, resume
from tests.sync_pipeline.scenes import Tick, connected, delete, end_leases, insert, kinds, meeting, patch, row_versions

PagesOf = Callable[[int], None]
EVENTS = 9  # five pages of two


@pytest.fixture
def ann(google: Simulator, saas: Saas, pages_of: PagesOf) -> tuple[Workspace, str]:
    """A workspace whose calendar has five pages, not yet synced."""
    pages_of(2)
    workspace, calendar = connected(google, saas)
    google.put_raw(calendar, [meeting(n, id=f"event{n}") for n in range(EVENTS)])
    return workspace, calendar


def rows_written(saas: Saas) -> tuple[object, ...]:
    return saas.one("SELECT count(*)::int, count(DISTINCT (calendar_id, event_id))::int FROM sync.event_rows")


@pytest.mark.parametrize(
    ("point", "number"),
    [
        ("generation_begun", 1),
        ("page_written", 1),
        ("before_request", 2),
        ("before_request", 4),  # between page 3 and page 4
        ("page_written", 5),
        ("completed_uncommitted", 1),
    ],
)
@pytest.mark.usefixtures("sync_environment")
def test_a_worker_killed_in_a_full_sync_leaves_nothing_half_visible_and_the_next_one_completes_it(
    point: str, number: int, google: Simulator, saas: Saas, ann: tuple[Workspace, str], tick_once: Tick
) -> None:
    workspace, calendar = ann
    with paused_worker(point, number, page_size=2) as worker:
        worker.kill()
    assert saas.events(workspace, calendar) == {}
    assert saas.calendar(calendar, "sync_token, live_generation") == (None, 0)
    assert tick_once().tally.calendars_synced == 0, "the dead worker's lease still stands"

    end_leases(saas)
    result = tick_once()
    assert (kinds(result), result.tally.events_upserted) == ([], EVENTS)
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}
    assert rows_written(saas) == (EVENTS, EVENTS), "no row of the dead generation stays"


@pytest.mark.parametrize(
    ("point", "number", "visible"),
    [
        ("page_written", 1, 0),
        ("before_request", 4, 6),  # between page 3 and page 4
        ("completed_uncommitted", 1, 8),
    ],
)
@pytest.mark.usefixtures("sync_environment")
def test_a_worker_killed_in_an_incremental_sync_leaves_whole_pages_and_the_old_token_and_a_replay_ends_the_same(
    point: str, number: int, visible: int, google: Simulator, saas: Saas, ann: tuple[Workspace, str], tick_once: Tick
) -> None:
    workspace, calendar = ann
    tick_once()
    before = saas.calendar(calendar, "sync_token")
    google.advance(1)
    for n in range(EVENTS):
        patch(google, calendar, f"event{n}", summary="Changed")

    with paused_worker(point, number, page_size=2) as worker:
        worker.kill()
    assert saas.calendar(calendar, "sync_token") == before
    changed = [row for row in saas.events(workspace, calendar).values() if row[2] == "Changed"]
    assert len(changed) == visible

    end_leases(saas)
    result = tick_once()
    assert (kinds(result), result.tally.full_syncs, result.tally.events_upserted) == ([], 0, EVENTS - visible)
    assert saas.calendar(calendar, "sync_token") != before
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


def test_events_and_token_roll_back_together(
    google: Simulator, saas: Saas, ann: tuple[Workspace, str], tick_once: Tick
) -> None:
    workspace, calendar = ann
    tick_once()
    before = saas.calendar(calendar, "sync_token")
    google.advance(1)
    insert(google, calendar, meeting())

    for table, check in (("calendar_state", f"sync_token = '{before[0]}'"), ("event_rows", "summary <> 'Meeting 1'")):
        saas.execute(f"ALTER TABLE sync.{table} ADD CONSTRAINT refused CHECK ({check}) NOT VALID")
        assert kinds(tick_once()) == ["internal"]
        assert len(saas.events(workspace, calendar)) == EVENTS
        assert saas.calendar(calendar, "sync_token") == before
        saas.execute(f"ALTER TABLE sync.{table} DROP CONSTRAINT refused")
        saas.execute("UPDATE sync.calendar_state SET due_at = 'epoch'")

    assert tick_once().tally.events_upserted == 1
    assert saas.calendar(calendar, "sync_token") != before


@pytest.mark.usefixtures("sync_environment")
def test_a_second_worker_makes_no_call_for_a_calendar_the_first_one_holds(
    google: Simulator, saas: Saas, ann: tuple[Workspace, str], tick_once: Tick
) -> None:
    workspace, calendar = ann
    with paused_worker("before_request", 2, page_size=2) as first:
        google.reset_counts()
        result = tick_once()
        assert (kinds(result), result.tally.calendars_synced) == ([], 0)
        assert google.counts().count("events.list") == 0
        assert saas.one("SELECT in_progress FROM sync.calendar_status") == (True,)
        assert resume(first) == []
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


def test_runs_that_start_at_once_never_sync_one_calendar_twice(
    google: Simulator, saas: Saas, services: Services
) -> None:
    tenant = saas.workspace().tenant_id
    calendars = []
    for n in range(12):
        user = google.add_user(f"user-{n}@example.com")
        calendars += user.calendars
        saas.connect(saas.workspace(tenant if n % 2 else None), user)
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda n: tick.run_tick(services, run_id=f"run-{n}", shard=n, of=3), range(3)))
    assert [kinds(result) for result in results] == [[], [], []]
    counts = google.counts()
    assert [counts.count("events.list", calendar=calendar) for calendar in calendars] == [1] * 12


@pytest.mark.parametrize("page", [1, 2, 5])
@pytest.mark.usefixtures("sync_environment")
def test_a_worker_paused_past_its_lease_writes_nothing_when_it_wakes(
    page: int, google: Simulator, saas: Saas, ann: tuple[Workspace, str], tick_once: Tick
) -> None:
    workspace, calendar = ann
    with paused_worker("before_request", page, page_size=2) as zombie:
        end_leases(saas)
        tick_once()
        delete(google, calendar, "event0")
        tick_once()
        state = "sync_token, live_generation, next_generation, lease_epoch, last_outcome"
        before = saas.calendar(calendar, state)
        rows = row_versions(saas)
        assert resume(zombie) == ["lease_lost"]

    assert saas.calendar(calendar, state) == before
    assert row_versions(saas) == rows
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


class UnreliableServer:
    """A TCP proxy before Postgres that breaks one connection at the commit of a calendar's sync token."""

    def __init__(self, dsn: str) -> None:
        self._target = conninfo.conninfo_to_dict(dsn)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.dsn = conninfo.make_conninfo(
            dsn, host="127.0.0.1", port=self._listener.getsockname()[1], sslmode="disable"
        )
        self.break_commit: str | None = None  # "before" it reaches the server, or "after" the server has done it
        self.broken = 0
        self.served = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection((str(self._target["host"]), int(str(self._target["port"]))))
                for work in (self._to_server, self._to_client):
                    threading.Thread(target=work, args=(client, server), daemon=True).start()

    def _to_server(self, client: socket.socket, server: socket.socket) -> None:
        cursor_moved = False
        with suppress(OSError):
            while data := client.recv(65536):
                cursor_moved = cursor_moved or b"SET sync_token" in data
                if cursor_moved and b"COMMIT" in data and self.break_commit is not None:
                    mode, self.break_commit = self.break_commit, None
                    self.broken += 1
                    if mode == "after":
                        client.shutdown(socket.SHUT_RDWR)  # the client sees the end, the server goes on
                        server.sendall(data)
                        server.shutdown(socket.SHUT_WR)
                        self.served.wait(10)
                    break
                if b"COMMIT" in data:
                    cursor_moved = False
                server.sendall(data)
        for end in (client, server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _to_client(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(65536):
                with suppress(OSError):
                    client.sendall(data)
        if self.broken:
            self.served.set()
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def unreliable(database: Database) -> Iterator[UnreliableServer]:
    server = UnreliableServer(database.dsn)
    yield server
    server.close()


@pytest.mark.parametrize("lost", ["before", "after"])
@pytest.mark.parametrize("full", [True, False])
def test_a_commit_whose_outcome_is_unknown_is_replayed_without_duplicates(
    lost: str,
    full: bool,
    google: Simulator,
    saas: Saas,
    services: Services,
    unreliable: UnreliableServer,
    ann: tuple[Workspace, str],
    tick_once: Tick,
) -> None:
    workspace, calendar = ann
    if not full:
        tick_once()
        google.advance(1)
        delete(google, calendar, "event0")
        patch(google, calendar, "event1", summary="Changed")
    before = saas.calendar(calendar, "sync_token") if not full else (None,)
    with DatabaseRouter(Shard("main", unreliable.dsn)) as router:
        unreliable.break_commit = lost
        result = tick.run_tick(replace(services, router=router), run_id="unlucky")
    assert (kinds(result), unreliable.broken) == (["internal"], 1)
    assert (saas.calendar(calendar, "sync_token") != before) == (lost == "after")

    saas.execute("UPDATE sync.calendar_state SET due_at = 'epoch'")
    assert kinds(tick_once()) == []
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}
    assert rows_written(saas) == (EVENTS, EVENTS)


@pytest.mark.parametrize("full", [False, True])
def test_pages_that_are_replayed_change_no_row(
    full: bool, google: Simulator, saas: Saas, ann: tuple[Workspace, str], tick_once: Tick
) -> None:
    _, calendar = ann
    tick_once()
    before = saas.calendar(calendar, "sync_token")
    google.advance(1)
    for n in range(1, EVENTS):
        patch(google, calendar, f"event{n}", summary="Changed")
    delete(google, calendar, "event0")
    tick_once()
    rows = row_versions(saas)
    changes = saas.execute("SELECT event_id, changed_at, deleted_at FROM sync.calendar_event_changes ORDER BY 1")

    saas.execute("UPDATE sync.calendar_state SET sync_token = %s", None if full else before[0])
    result = tick_once()
    assert (result.tally.pages, result.tally.events_seen) == (5, EVENTS)
    assert (result.tally.events_upserted, result.tally.events_deleted) == (0, 0)
    assert changes == saas.execute(
        "SELECT event_id, changed_at, deleted_at FROM sync.calendar_event_changes ORDER BY 1"
    ), "no reader of the changes hears of it"
    if not full:
        assert row_versions(saas) == rows


def test_an_older_version_never_replaces_a_newer_one_but_an_equally_old_one_does(
    google: Simulator, saas: Saas, services: Services, ann: tuple[Workspace, str], tick_once: Tick
) -> None:
    workspace, calendar = ann
    connection_id = saas.one("SELECT id FROM public.google_connections")[0]
    tick_once()
    lease = CalendarLease(workspace, calendar, connection_id, 1, None, None, 1, 0)  # type: ignore[arg-type]  # a uuid

    def write(summary: str, updated: str | None) -> object:
        item = meeting(1, id="event1", summary=summary) | ({"updated": updated} if updated else {})
        with services.router.writer(workspace.tenant_id) as connection:
            event_store.write_page(connection, lease, generation=1, batch=read_items([item]))
        return saas.one("SELECT summary FROM sync.calendar_events WHERE event_id = 'event1'")[0]

    assert write("new", "2099-03-02T10:00:00.000Z") == "new"
    assert write("old", "2099-03-01T10:00:00.000Z") == "new"
    assert write("as old", "2099-03-02T10:00:00.000Z") == "as old"
    assert write("no stamp", None) == "no stamp"


def test_changed_reminders_arrive_although_google_does_not_move_the_stamp(
    google: Simulator, saas: Saas, ann: tuple[Workspace, str], tick_once: Tick
) -> None:
    _, calendar = ann
    (event_id,) = insert(google, calendar, meeting(99))
    tick_once()
    stored = (
        "SELECT updated_at, raw #>> '{reminders,overrides,0,minutes}' FROM sync.calendar_events "
        "WHERE summary = 'Meeting 99'"
    )
    stamp, _ = saas.one(stored)
    google.advance(60)
    patch(google, calendar, event_id, reminders={"useDefault": False, "overrides": [{"method": "popup", "minutes": 5}]})
    assert tick_once().tally.events_upserted == 1
    assert saas.one(stored) == (stamp, "5")


@pytest.mark.parametrize("incremental", [False, True])
def test_an_event_that_comes_twice_in_a_page_is_one_row(
    incremental: bool, google: Simulator, saas: Saas, ann: tuple[Workspace, str], tick_once: Tick
) -> None:
    workspace, calendar = ann
    if incremental:
        tick_once()
        for n in range(3):
            patch(google, calendar, f"event{n}", summary="Changed")
    google.add_fault("duplicate_event", method="events.list")
    result = tick_once()
    assert (kinds(result), result.tally.events_upserted) == ([], 3 if incremental else EVENTS)
    assert rows_written(saas) == (EVENTS, EVENTS)
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


def remove_tenant(saas: Saas, workspace: Workspace) -> None:
    for table in ("google_connections", "users", "workspaces"):
        saas.execute(f"DELETE FROM public.{table} WHERE tenant_id = %s", workspace.tenant_id)
    saas.execute("DELETE FROM public.tenants WHERE id = %s", workspace.tenant_id)


@pytest.mark.parametrize("incremental", [False, True])
@pytest.mark.parametrize("page", [1, 3])
@pytest.mark.usefixtures("sync_environment")
def test_no_row_of_a_tenant_reappears_that_was_deleted_while_its_sync_ran(
    page: int, incremental: bool, google: Simulator, saas: Saas, ann: tuple[Workspace, str], tick_once: Tick
) -> None:
    workspace, calendar = ann
    if incremental:
        tick_once()
        for n in range(EVENTS):
            patch(google, calendar, f"event{n}", summary="Changed")
    tables = ("connection_state", "calendar_state", "event_rows", "workspace_state", "quarantine")

    def rows() -> dict[str, object]:
        return {
            table: saas.one(f"SELECT count(*)::int FROM sync.{table} WHERE tenant_id = %s", workspace.tenant_id)[0]
            for table in tables
        }

    with paused_worker("before_request", page, page_size=2) as worker:
        remove_tenant(saas, workspace)
        other, _ = connected(google, saas, "bob")
        tick_once()
        assert resume(worker) == ["lease_lost"]
    assert rows() == dict.fromkeys(tables, 0)
    assert saas.one("SELECT count(*) FROM sync.calendar_state WHERE tenant_id = %s", other.tenant_id) == (1,)
