"""Workers that die, pause, or meet: nothing is lost, nothing is written twice, nothing half done is seen."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psycopg
import pytest

from devstack.google_calendar import Simulator
from devstack.processes import CHECKOUT
from sync_pipeline import event_store, tick
from sync_pipeline.services import Services
from sync_pipeline.tick import TickResult
from sync_pipeline.workspaces import Workspace
from tests.sync_pipeline.conftest import Saas, differences
from tests.sync_pipeline.test_sync import meeting

Tick = Callable[[], TickResult]
BIG = 5100  # three pages


@contextmanager
def paused_worker(point: str, number: int) -> Iterator["subprocess.Popen[str]"]:
    """Run a tick in another process up to a point; it is killed at the end unless it has ended."""
    command = [sys.executable, "-m", "tests.sync_pipeline.crash", point, str(number)]
    with subprocess.Popen(
        command, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdout is not None
        line = worker.stdout.readline()
        if line != "reached\n":
            worker.kill()
            raise AssertionError(f"{line!r}: {worker.stderr.read() if worker.stderr else ''}")
        try:
            yield worker
        finally:
            worker.kill()


def end_leases(saas: Saas) -> None:
    """What happens five minutes after a worker died."""
    saas.execute("UPDATE sync.calendar_state SET lease_until = now() - interval '1 second' WHERE lease_until > now()")
    saas.execute("UPDATE sync.connection_state SET lease_until = now() - interval '1 second' WHERE lease_until > now()")


@pytest.fixture
def big(google: Simulator, saas: Saas) -> tuple[Workspace, str]:
    """A workspace whose calendar has three pages."""
    user = google.add_user("ann@example.com")
    google.put_raw(user.calendars[0], [meeting(n, id=f"event{n:06}") for n in range(BIG)])
    workspace = saas.workspace()
    saas.connect(workspace, user)
    return workspace, user.calendars[0]


@pytest.mark.parametrize(
    ("point", "number"),
    [
        ("generation_begun", 1),
        ("page_written", 1),
        ("before_request", 2),
        ("page_written", 3),
        ("completed_uncommitted", 1),
    ],
)
@pytest.mark.usefixtures("sync_environment")
def test_a_worker_killed_in_a_full_sync_leaves_nothing_half_visible_and_the_next_one_completes_it(
    point: str, number: int, google: Simulator, saas: Saas, big: tuple[Workspace, str], tick_once: Tick
) -> None:
    workspace, calendar = big
    with paused_worker(point, number) as worker:
        worker.kill()
    assert saas.events(workspace, calendar) == {}
    assert saas.calendar(calendar, "sync_token, live_generation") == (None, 0)
    assert tick_once().tally.calendars_synced == 0, "the dead worker's lease still stands"

    end_leases(saas)
    result = tick_once()
    assert result.failed == ()
    assert result.tally.events_upserted == BIG
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}
    assert saas.one("SELECT count(*) FROM sync.event_rows") == (BIG,), "no row of the dead generation stays"


@pytest.mark.usefixtures("sync_environment")
def test_a_worker_killed_before_the_commit_of_an_incremental_sync_moves_neither_events_nor_token(
    google: Simulator, saas: Saas, big: tuple[Workspace, str], tick_once: Tick
) -> None:
    workspace, calendar = big
    tick_once()
    before = saas.calendar(calendar, "sync_token")
    google.edit(calendar, [{"op": "delete", "id": "event000000"}])

    with paused_worker("completed_uncommitted", 1) as worker:
        worker.kill()
    assert saas.calendar(calendar, "sync_token") == before
    assert "event000000" in saas.events(workspace, calendar)

    end_leases(saas)
    assert tick_once().tally.events_deleted == 1
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


@pytest.mark.parametrize("page", [1, 2, 3])
@pytest.mark.usefixtures("sync_environment")
def test_a_worker_paused_past_its_lease_writes_nothing_when_it_wakes(
    page: int, google: Simulator, saas: Saas, big: tuple[Workspace, str], tick_once: Tick
) -> None:
    workspace, calendar = big
    with paused_worker("before_request", page) as zombie:
        end_leases(saas)
        tick_once()
        google.edit(calendar, [{"op": "delete", "id": "event000000"}])
        tick_once()
        state = saas.calendar(calendar, "sync_token, live_generation, next_generation, lease_epoch, last_outcome")
        rows = saas.execute("SELECT event_id, xmin::text FROM sync.event_rows ORDER BY 1")

        out, _ = zombie.communicate("\n")

    assert out.split() == ["lease_lost"]
    assert saas.calendar(calendar, "sync_token, live_generation, next_generation, lease_epoch, last_outcome") == state
    assert saas.execute("SELECT event_id, xmin::text FROM sync.event_rows ORDER BY 1") == rows
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


def test_two_runs_at_once_never_sync_one_calendar_twice(google: Simulator, saas: Saas, services: Services) -> None:
    tenant = saas.workspace().tenant_id
    calendars = []
    for n in range(12):
        user = google.add_user(f"user-{n}@example.com")
        calendars += user.calendars
        saas.connect(saas.workspace(tenant if n % 2 else None), user)
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda n: tick.run_tick(services, run_id=f"run-{n}", shard=n, of=3), range(3)))
    assert [result.failed for result in results] == [(), (), ()]
    counts = google.counts()
    assert [counts.count("events.list", calendar=calendar) for calendar in calendars] == [1] * 12


def test_events_and_token_roll_back_together(
    google: Simulator, saas: Saas, services: Services, tick_once: Tick, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = google.add_user("ann@example.com")
    (calendar,) = user.calendars
    workspace = saas.workspace()
    saas.connect(workspace, user)
    tick_once()
    before = saas.calendar(calendar, "sync_token")
    google.edit(calendar, [{"op": "insert", "event": meeting()}])

    frozen = f"ALTER TABLE sync.calendar_state ADD CONSTRAINT frozen CHECK (sync_token = '{before[0]}') NOT VALID"
    saas.execute(frozen)
    result = tick_once()
    assert [trouble.kind for failed in result.failed for trouble in failed.troubles] == ["internal"]
    assert saas.events(workspace, calendar) == {}

    saas.execute("ALTER TABLE sync.calendar_state DROP CONSTRAINT frozen")
    assert tick_once().tally.events_upserted == 1


@pytest.mark.usefixtures("sync_environment")
def test_readers_see_the_old_generation_until_the_new_one_is_complete(
    google: Simulator, saas: Saas, big: tuple[Workspace, str], tick_once: Tick
) -> None:
    _, calendar = big
    tick_once()
    google.edit(calendar, [{"op": "delete", "id": f"event{n:06}"} for n in range(100)])
    google.expire_sync_tokens(calendar)

    seen: set[int] = set()
    done = threading.Event()

    def read() -> None:
        with psycopg.connect(saas.dsn, autocommit=True) as connection:
            while not done.is_set():
                row = connection.execute(
                    "SELECT count(*) FROM sync.calendar_events WHERE calendar_id = %s", [calendar]
                ).fetchone()
                assert row is not None
                seen.add(row[0])

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read)
        try:
            result = tick_once()
        finally:
            done.set()
        reader.result()

    assert (result.tally.full_syncs, result.tally.events_deleted, result.tally.events_upserted) == (1, 100, 0)
    assert seen <= {BIG, BIG - 100}
    assert BIG in seen
    assert saas.one("SELECT count(*) FROM sync.calendar_event_changes WHERE deleted_at IS NOT NULL") == (100,)


@pytest.mark.usefixtures("sync_environment")
def test_a_full_sync_that_dies_on_the_way_buries_nothing(
    google: Simulator, saas: Saas, big: tuple[Workspace, str], tick_once: Tick
) -> None:
    workspace, calendar = big
    tick_once()
    google.edit(calendar, [{"op": "delete", "id": "event000000"}])
    google.expire_sync_tokens(calendar)
    with paused_worker("page_written", 2) as worker:
        worker.kill()
    assert len(saas.events(workspace, calendar)) == BIG
    end_leases(saas)
    tick_once()
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


def test_the_same_page_written_twice_changes_nothing(
    google: Simulator, saas: Saas, services: Services, tick_once: Tick, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = google.add_user("ann@example.com")
    (calendar,) = user.calendars
    google.edit(calendar, [{"op": "insert", "event": meeting(n)} for n in range(3)])
    saas.connect(saas.workspace(), user)
    tick_once()
    rows = saas.execute("SELECT event_id, xmin::text, changed_at FROM sync.event_rows ORDER BY 1")
    google.edit(calendar, [{"op": "insert", "event": meeting(9)}])
    original = event_store.write_page
    changes = []

    def twice(*arguments: object, **options: object) -> object:
        first = original(*arguments, **options)  # type: ignore[arg-type]  # passed through
        changes.append(original(*arguments, **options))  # type: ignore[arg-type]  # passed through
        return first

    monkeypatch.setattr(event_store, "write_page", twice)
    assert tick_once().tally.events_upserted == 1
    # The second write is in the same transaction, so `changed_at = now()` holds for it as well.
    assert [(change.deleted, change.quarantined) for change in changes] == [(0, 0)]
    again = saas.execute("SELECT event_id, xmin::text, changed_at FROM sync.event_rows ORDER BY 1")
    assert set(rows) <= set(again)
