"""Calendars of a simulated Google arrive in Postgres and stay equal to it."""

from collections.abc import Callable

import pytest

from devstack.google_calendar import Simulator
from sync_pipeline import event_store
from sync_pipeline.events import Json, read_items
from sync_pipeline.leases import CalendarLease
from sync_pipeline.services import Services
from sync_pipeline.tick import TickResult
from sync_pipeline.workspaces import Workspace
from tests.sync_pipeline.conftest import Saas, differences

Tick = Callable[[], TickResult]


def meeting(number: int = 1, **fields: Json) -> dict[str, Json]:
    return {
        "summary": f"Meeting {number}",
        "start": {"dateTime": "2026-03-02T10:00:00+01:00", "timeZone": "Europe/Berlin"},
        "end": {"dateTime": "2026-03-02T11:00:00+01:00", "timeZone": "Europe/Berlin"},
        **fields,
    }


def test_a_new_connection_is_synced_completely_by_one_tick(google: Simulator, saas: Saas, tick_once: Tick) -> None:
    user = google.add_user("ann@example.com")
    (calendar,) = user.calendars
    google.edit(calendar, [{"op": "insert", "event": meeting(n)} for n in range(5)])
    workspace = saas.workspace()
    saas.connect(workspace, user)

    result = tick_once()

    assert result.failed == ()
    assert result.tally.full_syncs == 1
    assert result.tally.events_upserted == 5
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


def test_the_second_tick_asks_for_changes_only(google: Simulator, saas: Saas, tick_once: Tick) -> None:
    user = google.add_user("ann@example.com")
    (calendar,) = user.calendars
    first, second, _ = google.edit(calendar, [{"op": "insert", "event": meeting(n)} for n in range(3)])
    workspace = saas.workspace()
    saas.connect(workspace, user)
    tick_once()

    assert first is not None
    assert second is not None
    google.edit(
        calendar,
        [
            {"op": "patch", "id": first["id"], "event": {"summary": "Moved"}},
            {"op": "delete", "id": second["id"]},
            {"op": "insert", "event": meeting(4)},
        ],
    )
    google.reset_counts()
    result = tick_once()

    assert (result.tally.full_syncs, result.tally.incremental_syncs) == (0, 1)
    assert (result.tally.events_upserted, result.tally.events_deleted) == (2, 1)
    assert google.counts().count("events.list", incremental=True) == 1
    assert google.counts().drift == {}
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


@pytest.fixture
def series(google: Simulator, saas: Saas, tick_once: Tick) -> tuple[Workspace, str, str]:
    """A synced weekly series of four with one changed and one cancelled instance: workspace, calendar, master."""
    user = google.add_user("ann@example.com")
    (calendar,) = user.calendars
    (made,) = google.edit(calendar, [{"op": "insert", "event": meeting(1, recurrence=["RRULE:FREQ=WEEKLY;COUNT=4"])}])
    assert made is not None
    master = str(made["id"])
    google.edit(
        calendar,
        [
            {"op": "patch", "id": f"{master}_20260309T090000Z", "event": {"summary": "Changed"}},
            {"op": "delete", "id": f"{master}_20260316T090000Z"},
        ],
    )
    workspace = saas.workspace()
    saas.connect(workspace, user)
    tick_once()
    return workspace, calendar, master


def test_a_series_is_one_master_with_its_exceptions(
    google: Simulator, saas: Saas, series: tuple[Workspace, str, str]
) -> None:
    workspace, calendar, master = series
    shown = {event_id: row[0] for event_id, row in saas.events(workspace, calendar).items()}
    assert shown == {
        master: "confirmed",
        f"{master}_20260309T090000Z": "confirmed",
        f"{master}_20260316T090000Z": "cancelled",
    }
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


def test_deleting_a_series_buries_the_exceptions_google_does_not_mention(
    google: Simulator, saas: Saas, tick_once: Tick, series: tuple[Workspace, str, str]
) -> None:
    workspace, calendar, master = series
    google.edit(calendar, [{"op": "delete", "id": master}])
    assert tick_once().tally.events_deleted == 3
    assert saas.events(workspace, calendar) == {}
    tombstones = saas.one(
        "SELECT count(*), count(summary), count(start_at) FROM sync.calendar_event_changes WHERE deleted_at IS NOT NULL"
    )
    assert tombstones == (3, 0, 0), "tombstones hold no details"


def test_a_restored_series_comes_back_with_its_exceptions(
    google: Simulator, saas: Saas, tick_once: Tick, series: tuple[Workspace, str, str]
) -> None:
    workspace, calendar, master = series
    google.edit(calendar, [{"op": "delete", "id": master}])
    tick_once()
    google.edit(calendar, [{"op": "patch", "id": master, "event": {"status": "confirmed"}}])
    tick_once()
    assert len(saas.events(workspace, calendar)) == 3
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


def test_a_bare_cancelled_instance_is_taken_out_of_its_series(
    google: Simulator, saas: Saas, tick_once: Tick, series: tuple[Workspace, str, str]
) -> None:
    workspace, calendar, master = series
    google.configure(sparse_instances=True)
    google.edit(calendar, [{"op": "delete", "id": f"{master}_20260323T090000Z"}])
    tick_once()
    google.configure(sparse_instances=False)
    row = saas.one(
        "SELECT status, recurring_event_id, original_start_at = '2026-03-23T09:00Z' FROM sync.calendar_events "
        "WHERE event_id = %s",
        f"{master}_20260323T090000Z",
    )
    assert row == ("cancelled", master, True)
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


def changed_at(saas: Saas) -> dict[str, str]:
    rows = saas.execute("SELECT event_id, changed_at::text FROM sync.calendar_event_changes")
    return {str(event_id): str(changed) for event_id, changed in rows}


def test_events_absent_from_a_full_sync_become_tombstones_that_say_when(
    google: Simulator, saas: Saas, tick_once: Tick
) -> None:
    user = google.add_user("ann@example.com")
    (calendar,) = user.calendars
    gone, stays = google.edit(calendar, [{"op": "insert", "event": meeting(n)} for n in range(2)])
    assert gone is not None
    assert stays is not None
    saas.connect(saas.workspace(), user)
    tick_once()
    before = changed_at(saas)

    google.edit(calendar, [{"op": "delete", "id": gone["id"]}])
    google.advance(40 * 86400)  # Google has forgotten the deletion, and the sync token with it
    result = tick_once()

    assert (result.tally.full_syncs, result.tally.events_upserted, result.tally.events_deleted) == (1, 0, 1)
    assert saas.one(
        "SELECT deleted_at = changed_at FROM sync.calendar_event_changes WHERE event_id = %s", gone["id"]
    ) == (True,)
    after = changed_at(saas)
    assert after[stays["id"]] == before[stays["id"]], "a full sync does not change what has not changed"
    assert after[gone["id"]] > before[gone["id"]]
    assert saas.one("SELECT count(*) FROM sync.event_rows") == (2,), "the old generation is gone"


def test_an_older_version_never_replaces_a_newer_one_but_an_equally_old_one_does(
    google: Simulator, saas: Saas, services: Services, tick_once: Tick
) -> None:
    user = google.add_user("ann@example.com")
    (calendar,) = user.calendars
    workspace = saas.workspace()
    connection_id = saas.connect(workspace, user)
    tick_once()
    lease = CalendarLease(workspace, calendar, connection_id, 1, None, None, 1, 0)

    def write(summary: str, updated: str | None) -> str:
        item = meeting(1, id="event1", summary=summary) | ({"updated": updated} if updated else {})
        with services.router.writer(workspace.tenant_id) as connection:
            event_store.write_page(connection, lease, generation=1, batch=read_items([item]))
        return str(saas.one("SELECT summary FROM sync.calendar_events")[0])

    assert write("new", "2026-03-02T10:00:00.000Z") == "new"
    assert write("old", "2026-03-01T10:00:00.000Z") == "new"
    assert write("reminders changed", "2026-03-02T10:00:00.000Z") == "reminders changed"
    assert write("no stamp", None) == "no stamp"


def test_requests_are_counted_by_tenant(google: Simulator, saas: Saas, tick_once: Tick) -> None:
    user = google.add_user("ann@example.com")
    workspace = saas.workspace()
    saas.connect(workspace, user)
    results = [tick_once(), tick_once()]
    counted = saas.execute("SELECT tenant_id, method, outcome, calls::int FROM sync.api_calls ORDER BY method")
    assert counted == [
        (workspace.tenant_id, "calendarList.list", "200", 2),
        (workspace.tenant_id, "events.list", "200", 2),
        (workspace.tenant_id, "oauth.refresh", "200", 1),
    ]
    assert sum(result.tally.api_calls for result in results) == 4
    assert google.counts().count("events.list") == 2
    runs = saas.execute("SELECT workspaces_served, api_calls::int, finished_at IS NOT NULL FROM sync.runs")
    assert runs == [(1, 2, True), (1, 2, True)]
