"""Series, exceptions and deletions: what Google leaves unsaid, Postgres must know (cases 28 to 43)."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import psycopg
import pytest
from dateutil import rrule

from devstack.google_calendar import Simulator
from sync_pipeline import event_store
from sync_pipeline.events import Json, read_items
from sync_pipeline.leases import CalendarLease
from sync_pipeline.services import Services
from sync_pipeline.workspaces import Workspace
from tests.sync_pipeline.conftest import Saas, differences
from tests.sync_pipeline.scenes import Tick, connected, delete, insert, kinds, meeting, patch, row_versions

PagesOf = Callable[[int], None]
WEEKLY: Json = ["RRULE:FREQ=WEEKLY;COUNT=4"]


@pytest.fixture
def ann(google: Simulator, saas: Saas) -> tuple[Workspace, str]:
    """A workspace with one empty calendar, not yet synced."""
    return connected(google, saas)


@pytest.fixture
def series(google: Simulator, tick_once: Tick, ann: tuple[Workspace, str]) -> tuple[Workspace, str, str]:
    """A synced weekly series of four with one changed and one cancelled instance: workspace, calendar, master."""
    workspace, calendar = ann
    (master,) = insert(google, calendar, meeting(recurrence=WEEKLY))
    patch(google, calendar, f"{master}_20260309T090000Z", summary="Changed")
    delete(google, calendar, f"{master}_20260316T090000Z")
    tick_once()
    return workspace, calendar, master


def statuses(saas: Saas, workspace: Workspace, calendar: str) -> dict[str, object]:
    return {event_id: row[0] for event_id, row in saas.events(workspace, calendar).items()}


def test_a_cancelled_exception_is_stored_as_an_exception_and_not_deleted(
    google: Simulator, saas: Saas, series: tuple[Workspace, str, str]
) -> None:
    workspace, calendar, master = series
    assert statuses(saas, workspace, calendar) == {
        master: "confirmed",
        f"{master}_20260309T090000Z": "confirmed",
        f"{master}_20260316T090000Z": "cancelled",
    }
    assert saas.one(
        "SELECT recurring_event_id, original_start_at = '2026-03-16T09:00Z', deleted_at FROM sync.calendar_events "
        "WHERE status = 'cancelled'"
    ) == (master, True, None)
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


@pytest.mark.parametrize(
    ("event", "instance", "column", "original"),
    [
        (meeting(recurrence=WEEKLY), "20260323T090000Z", "original_start_at AT TIME ZONE 'UTC'", "2026-03-23 09:00:00"),
        (
            {"start": {"date": "2026-03-02"}, "end": {"date": "2026-03-03"}, "recurrence": WEEKLY},
            "20260323",
            "original_start_date",
            "2026-03-23",
        ),
    ],
)
def test_a_bare_cancelled_instance_is_linked_to_its_master_by_its_id(
    event: dict[str, Json],
    instance: str,
    column: str,
    original: str,
    google: Simulator,
    saas: Saas,
    tick_once: Tick,
    ann: tuple[Workspace, str],
) -> None:
    workspace, calendar = ann
    (master,) = insert(google, calendar, event)
    tick_once()
    google.configure(sparse_instances=True)
    delete(google, calendar, f"{master}_{instance}")
    tick_once()
    assert saas.one(
        f"SELECT status, recurring_event_id, ({column})::text FROM sync.calendar_events WHERE event_id = %s",
        f"{master}_{instance}",
    ) == ("cancelled", master, original)
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


@pytest.mark.parametrize(
    ("event_id", "kept"), [("neverseen", "tombstone"), ("neverseen_20260323T090000Z", "cancelled exception")]
)
def test_a_bare_cancelled_event_nobody_has_seen_before_does_no_harm(
    event_id: str, kept: str, google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, calendar = ann
    (other,) = insert(google, calendar, meeting())
    google.put_raw(calendar, [{"id": event_id, "status": "cancelled"}])
    google.configure(sparse_instances=True)
    result = tick_once()
    assert (kinds(result), result.tally.quarantined, result.tally.events_deleted) == ([], 0, 0)
    live = {event_id for event_id, status in statuses(saas, workspace, calendar).items() if status != "cancelled"}
    assert live == {other}
    assert (event_id in saas.events(workspace, calendar)) == (kept == "cancelled exception")


@pytest.mark.parametrize("incremental", [False, True])
def test_an_exception_a_page_before_its_master_is_there_at_the_end(
    incremental: bool, google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str], pages_of: PagesOf
) -> None:
    workspace, calendar = ann
    pages_of(1)
    if incremental:
        tick_once()
    exception = meeting(2, id="series_20260309T090000Z", recurringEventId="series")
    exception["originalStartTime"] = {"dateTime": "2026-03-09T09:00:00Z"}
    google.put_raw(calendar, [exception, meeting(1, id="series", recurrence=WEEKLY)])
    result = tick_once()
    assert (kinds(result), result.tally.pages) == ([], 2)
    assert statuses(saas, workspace, calendar) == {
        "series": "confirmed",
        "series_20260309T090000Z": "confirmed",
    }


def test_deleting_a_series_buries_the_exceptions_google_does_not_mention(
    google: Simulator, saas: Saas, tick_once: Tick, series: tuple[Workspace, str, str]
) -> None:
    workspace, calendar, master = series
    delete(google, calendar, master)
    google.reset_counts()
    result = tick_once()
    assert (result.tally.events_seen, result.tally.events_deleted) == (1, 3), "Google names the master only"
    assert saas.events(workspace, calendar) == {}
    assert saas.one(
        "SELECT count(*), count(summary), count(start_at) FROM sync.calendar_event_changes WHERE deleted_at IS NOT NULL"
    ) == (3, 0, 0), "tombstones hold no details"


def test_a_moved_instance_stays_one_row_that_knows_its_old_slot(
    google: Simulator, saas: Saas, tick_once: Tick, series: tuple[Workspace, str, str]
) -> None:
    workspace, calendar, master = series
    instance = f"{master}_20260323T090000Z"
    for day in ("2026-03-25", "2026-03-26"):
        patch(
            google,
            calendar,
            instance,
            start={"dateTime": f"{day}T15:00:00+01:00", "timeZone": "Europe/Berlin"},
            end={"dateTime": f"{day}T16:00:00+01:00", "timeZone": "Europe/Berlin"},
        )
        tick_once()
    assert saas.execute(
        "SELECT event_id, original_start_at = '2026-03-23T09:00Z', start_at = '2026-03-26T14:00Z' "
        "FROM sync.calendar_events WHERE recurring_event_id = %s AND original_start_at >= '2026-03-20'",
        master,
    ) == [(instance, True, True)]
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


def test_an_instance_dragged_to_another_calendar_leaves_a_hole_here_and_an_event_there(
    google: Simulator, saas: Saas, tick_once: Tick, series: tuple[Workspace, str, str]
) -> None:
    workspace, calendar, master = series
    second = google.add_calendar("ann@example.com", "Second")
    tick_once()
    # Google's own clients do it like this: events.move refuses instances.
    (standalone,) = insert(google, second, meeting(9))
    delete(google, calendar, f"{master}_20260323T090000Z")
    tick_once()
    assert statuses(saas, workspace, calendar)[f"{master}_20260323T090000Z"] == "cancelled"
    assert statuses(saas, workspace, second) == {standalone: "confirmed"}
    for one in (calendar, second):
        assert differences(saas, workspace, one, google.truth(one)) == {}


def test_a_single_event_that_becomes_a_series_is_one_master_and_back_again_one_event(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, calendar = ann
    (event_id,) = insert(google, calendar, meeting())
    tick_once()
    patch(google, calendar, event_id, recurrence=WEEKLY)
    tick_once()
    assert saas.execute("SELECT event_id, recurrence FROM sync.calendar_events") == [(event_id, WEEKLY)]

    patch(google, calendar, f"{event_id}_20260309T090000Z", summary="Changed")
    tick_once()
    patch(google, calendar, event_id, recurrence=None)
    tick_once()
    live = saas.execute("SELECT event_id, recurrence FROM sync.calendar_events WHERE status <> 'cancelled'")
    assert live == [(event_id, None)], "no stale instance stays"
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


def test_this_and_following_splits_a_series_in_two_that_do_not_overlap(
    google: Simulator, saas: Saas, tick_once: Tick, series: tuple[Workspace, str, str]
) -> None:
    workspace, calendar, master = series
    patch(google, calendar, master, recurrence=["RRULE:FREQ=WEEKLY;UNTIL=20260315T225959Z"])
    rest = f"{master}_R20260316T090000"  # how Google names what follows a split
    moved: dict[str, Json] = {
        "start": {"dateTime": "2026-03-16T14:00:00Z"},
        "end": {"dateTime": "2026-03-16T15:00:00Z"},
    }
    google.put_raw(calendar, [meeting(2, id=rest, recurrence=["RRULE:FREQ=WEEKLY;COUNT=2"], **moved)])
    tick_once()
    masters = saas.execute(
        "SELECT event_id, start_at, recurrence[1] FROM sync.calendar_events "
        "WHERE recurrence IS NOT NULL ORDER BY start_at"
    )
    assert [event_id for event_id, *_ in masters] == [master, rest]
    slots = [
        list(rrule.rrulestr(str(line), dtstart=start)) for _, start, line in masters if isinstance(start, datetime)
    ]
    assert [len(one) for one in slots] == [2, 2]
    assert max(slots[0]) < min(slots[1])
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}

    google.configure(sparse_instances=True)
    google.put_raw(calendar, [{"id": f"{rest}_20260323T140000Z", "status": "cancelled"}])
    tick_once()
    assert saas.one("SELECT recurring_event_id FROM sync.calendar_events WHERE event_id LIKE '%%\\_R%%\\_%%Z'") == (
        rest,
    ), "the instances of the second half belong to it"


def test_an_undeleted_event_is_live_again_with_its_details(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, calendar = ann
    (event_id,) = insert(google, calendar, meeting())
    tick_once()
    delete(google, calendar, event_id)
    assert tick_once().tally.events_deleted == 1
    assert saas.events(workspace, calendar) == {}
    patch(google, calendar, event_id, status="confirmed")
    assert tick_once().tally.events_upserted == 1
    assert saas.one("SELECT deleted_at, summary FROM sync.calendar_event_changes") == (None, "Meeting 1")
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


def test_a_restored_series_comes_back_with_its_exceptions(
    google: Simulator, saas: Saas, tick_once: Tick, series: tuple[Workspace, str, str]
) -> None:
    workspace, calendar, master = series
    delete(google, calendar, master)
    tick_once()
    patch(google, calendar, master, status="confirmed")
    tick_once()
    assert len(saas.events(workspace, calendar)) == 3
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


def test_a_cancelled_instance_a_page_before_its_restored_master_is_not_buried_with_it(
    google: Simulator, saas: Saas, tick_once: Tick, series: tuple[Workspace, str, str], pages_of: PagesOf
) -> None:
    workspace, calendar, master = series
    pages_of(1)
    tick_once()
    delete(google, calendar, master)
    tick_once()
    assert saas.events(workspace, calendar) == {}
    patch(google, calendar, master, status="confirmed")
    patch(google, calendar, master, summary="Changed after its exceptions, so listed after them")
    result = tick_once()
    assert (result.tally.full_syncs, result.tally.pages) == (0, 3)
    assert statuses(saas, workspace, calendar)[f"{master}_20260316T090000Z"] == "cancelled"
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


def test_a_cancelled_instance_that_comes_back_exactly_as_it_was_buried_is_live_again(
    saas: Saas, services: Services, series: tuple[Workspace, str, str]
) -> None:
    """Google's barest form and what a burial leaves are the same JSON."""
    workspace, calendar, master = series
    (connection_id,) = saas.one("SELECT id FROM public.google_connections")
    lease = CalendarLease(workspace, calendar, connection_id, 1, None, None, 1, 0)  # type: ignore[arg-type]  # a uuid
    instance: Json = {"id": f"{master}_20260316T090000Z", "status": "cancelled"}

    def write(*items: Json) -> dict[str, object]:
        with services.router.writer(workspace.tenant_id) as connection:
            event_store.write_page(connection, lease, generation=1, batch=read_items(items))
        return statuses(saas, workspace, calendar)

    assert write({"id": master, "status": "cancelled"}) == {}
    assert write(meeting(id=master, status="confirmed", recurrence=WEEKLY), instance) == {
        master: "confirmed",
        f"{master}_20260316T090000Z": "cancelled",
    }


def test_an_exception_that_arrives_after_its_master_was_deleted_is_buried_when_the_listing_ends(
    google: Simulator, saas: Saas, tick_once: Tick, series: tuple[Workspace, str, str]
) -> None:
    workspace, calendar, master = series
    delete(google, calendar, master)
    tick_once()
    late = meeting(5, id=f"{master}_20260323T090000Z", recurringEventId=master)
    late["originalStartTime"] = {"dateTime": "2026-03-23T09:00:00Z"}
    google.put_raw(calendar, [late])
    tick_once()
    assert saas.events(workspace, calendar) == {}


@contextlib.contextmanager
def events_locked(saas: Saas) -> Iterator[Callable[[], bool]]:
    """Let nobody read or write an event, for three seconds at most; tells whether it lasted."""
    with psycopg.connect(saas.dsn) as connection:
        connection.execute("LOCK TABLE sync.event_rows IN ACCESS EXCLUSIVE MODE")
        end = threading.Timer(3, connection.rollback)
        end.start()
        try:
            yield end.is_alive
        finally:
            end.cancel()
            end.join()


def test_a_poll_that_finds_nothing_does_not_touch_the_stored_events(
    google: Simulator, saas: Saas, tick_once: Tick, series: tuple[Workspace, str, str]
) -> None:
    before = row_versions(saas)
    saas.execute("UPDATE sync.connection_state SET list_due_at = 'infinity'")  # reading the list purges old tombstones
    with events_locked(saas) as still_locked:
        result = tick_once()
        assert still_locked()
    assert (kinds(result), result.tally.incremental_syncs, result.tally.events_seen) == ([], 1, 0)
    assert row_versions(saas) == before


def test_an_event_moved_to_another_organizer_leaves_a_tombstone_and_a_copy_of_its_own(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, calendar = ann
    second = google.add_calendar("ann@example.com", "Second")
    (event_id,) = insert(google, calendar, meeting())
    tick_once()
    google.edit(calendar, [{"op": "move", "id": event_id, "destination": second}])
    assert tick_once().tally.events_deleted == 1
    assert (saas.events(workspace, calendar), set(saas.events(workspace, second))) == ({}, {event_id})
    assert saas.execute(
        "SELECT calendar_id, deleted_at IS NULL, summary FROM sync.calendar_event_changes "
        "ORDER BY deleted_at NULLS FIRST"
    ) == [(second, True, "Meeting 1"), (calendar, False, None)]


def test_an_unreadable_or_endless_rule_is_kept_raw_and_disturbs_no_other_event(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    _, calendar = ann
    rules: dict[str, Json] = {
        "nonsense": ["RRULE:FREQ=FORTNIGHTLY;INTERVAL=-1"],
        "endless": ["RRULE:FREQ=SECONDLY"],
        "huge": [
            "RDATE:" + ",".join(f"2026{month:02}{day:02}T100000Z" for month in range(1, 13) for day in range(1, 29))
        ],
        "notarule": ["hello", ""],
    }
    google.put_raw(calendar, [meeting(id=event_id, recurrence=rule) for event_id, rule in rules.items()])
    (other,) = insert(google, calendar, meeting())
    result = tick_once()
    assert (kinds(result), result.tally.quarantined) == ([], 0)
    stored = saas.execute("SELECT event_id, recurrence FROM sync.calendar_events")
    assert {str(event_id): rule for event_id, rule in stored} == {**rules, other: None}


def test_a_series_across_the_change_to_summer_time_keeps_its_zone_and_its_wall_clock(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, calendar = ann
    (master,) = insert(
        google,
        calendar,
        meeting(
            start={"dateTime": "2026-03-22T02:30:00+01:00", "timeZone": "Europe/Berlin"},
            end={"dateTime": "2026-03-22T03:00:00+01:00", "timeZone": "Europe/Berlin"},
            recurrence=WEEKLY,
        ),
    )
    instances = ["20260322T013000Z", "20260329T013000Z", "20260405T003000Z"]
    for instance in instances:  # an exception is the only form in which Google spells an instance out
        patch(google, calendar, f"{master}_{instance}", summary="Changed")
    insert(
        google,
        calendar,
        *(
            meeting(
                start={"dateTime": f"2026-10-25T02:30:00{offset}", "timeZone": "Europe/Berlin"},
                end={"dateTime": f"2026-10-25T02:45:00{offset}", "timeZone": "Europe/Berlin"},
            )
            for offset in ("+02:00", "+01:00")
        ),
    )
    tick_once()
    rows = saas.execute(
        "SELECT (start_at AT TIME ZONE 'UTC')::text, (start_at AT TIME ZONE start_zone)::time::text "
        "FROM sync.calendar_events WHERE recurrence IS NULL ORDER BY start_at"
    )
    assert rows == [
        ("2026-03-22 01:30:00", "02:30:00"),
        ("2026-03-29 01:30:00", "03:30:00"),  # 02:30 did not exist that day
        ("2026-04-05 00:30:00", "02:30:00"),
        ("2026-10-25 00:30:00", "02:30:00"),  # 02:30 came twice that day
        ("2026-10-25 01:30:00", "02:30:00"),
    ]
    assert saas.one(
        "SELECT start_at, start_zone, recurrence FROM sync.calendar_events WHERE recurrence IS NOT NULL"
    ) == (datetime(2026, 3, 22, 1, 30, tzinfo=UTC), "Europe/Berlin", WEEKLY)
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


@pytest.mark.parametrize("zone", ["Pacific/Kiritimati", "Etc/GMT+12", "Europe/Berlin"])
def test_an_all_day_event_is_the_same_dates_in_every_session_time_zone(
    zone: str, google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    _, calendar = ann
    name = saas.one("SELECT current_database()")[0]
    saas.execute(f"ALTER DATABASE {name} SET timezone = '{zone}'")  # of the worker and of the reader
    (event_id,) = insert(google, calendar, {"start": {"date": "2026-07-01"}, "end": {"date": "2026-07-04"}})
    tick_once()
    assert saas.one(
        "SELECT current_setting('TimeZone'), start_date::text, end_date::text, end_date - start_date, start_at, end_at "
        "FROM sync.calendar_events WHERE event_id = %s",
        event_id,
    ) == (zone, "2026-07-01", "2026-07-04", 3, None, None)


@pytest.mark.parametrize(
    ("start", "instant"),
    [
        ({"dateTime": "2026-03-02T10:00:00-07:00", "timeZone": "GMT-07:00"}, "2026-03-02 17:00:00"),
        ({"dateTime": "2026-03-02T10:00:00", "timeZone": "GMT-07:00"}, "2026-03-02 17:00:00"),
        ({"dateTime": "2026-03-02T10:00:00", "timeZone": "UTC+05:30"}, "2026-03-02 04:30:00"),
        ({"dateTime": "2026-03-02T10:00:00+02:00", "timeZone": "Mars/Olympus"}, "2026-03-02 08:00:00"),
    ],
)
def test_a_zone_postgres_reads_the_other_way_round_or_does_not_know_does_not_move_the_event(
    start: dict[str, Json], instant: str, google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    _, calendar = ann
    google.put_raw(calendar, [meeting(id="event1", start=start)])
    tick_once()
    assert saas.one("SELECT (start_at AT TIME ZONE 'UTC')::text, start_zone, flaws FROM sync.calendar_events") == (
        instant,
        start["timeZone"],
        [],
    )


def test_an_endless_weekly_series_is_one_row_because_nothing_is_expanded(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    _, calendar = ann
    (master,) = insert(google, calendar, meeting(recurrence=["RRULE:FREQ=WEEKLY"]))
    tick_once()
    patch(google, calendar, master, summary="Touched")
    google.reset_counts()
    result = tick_once()
    assert (result.tally.pages, result.tally.events_seen, result.tally.events_upserted) == (1, 1, 1)
    assert saas.execute("SELECT event_id FROM sync.event_rows") == [(master,)]
    queries = [str(call["query"]) for call in google.recent_calls() if call["method"] == "events.list"]
    assert all("singleEvents=false" in query for query in queries)
