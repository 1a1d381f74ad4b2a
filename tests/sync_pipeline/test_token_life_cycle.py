"""Sync tokens are born, used, refused and replaced, and no event is lost on the way (cases 11 to 27)."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import parse_qs

import psycopg
import pytest

from devstack.google_calendar import Simulator
from sync_pipeline.engine import EMPTY_PAGES
from sync_pipeline.google_calendar import GoogleConnection
from sync_pipeline.workspaces import Workspace
from tests.sync_pipeline.conftest import Saas, differences
from tests.sync_pipeline.crash import paused_worker
from tests.sync_pipeline.scenes import (
    Tick,
    connected,
    delete,
    end_leases,
    insert,
    kinds,
    make_due,
    meeting,
    patch,
    row_versions,
)

PagesOf = Callable[[int], None]


@pytest.fixture
def ann(google: Simulator, saas: Saas, tick_once: Tick, pages_of: PagesOf) -> tuple[Workspace, str]:
    """A synced workspace: one calendar with five events, which come in pages of two."""
    pages_of(2)
    workspace, calendar = connected(google, saas)
    google.put_raw(calendar, [meeting(n, id=f"event{n}") for n in range(5)])
    tick_once()
    google.reset_counts()
    return workspace, calendar


def token(saas: Saas, calendar: str) -> object:
    return saas.calendar(calendar, "sync_token")[0]


def sent(google: Simulator, name: str) -> list[str]:
    """What the listings of events said for this parameter, oldest first; only those that said anything."""
    calls = [parse_qs(str(call["query"])) for call in google.recent_calls() if call["method"] == "events.list"]
    return [value for call in calls for value in call.get(name, [])]


@pytest.mark.usefixtures("sync_environment")
def test_a_410_leads_to_one_full_sync_which_buries_what_is_absent_with_its_last_page(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, calendar = ann
    delete(google, calendar, "event0")
    google.advance(40 * 86_400)  # Google has forgotten the deletion, and the sync token with it
    with paused_worker("page_written", 2, page_size=2) as worker:
        assert "event0" in saas.events(workspace, calendar), "two of three pages are there, and nothing is buried"
        worker.kill()
    end_leases(saas)
    google.reset_counts()

    result = tick_once()

    assert (kinds(result), result.tally.full_syncs, result.tally.events_deleted) == ([], 1, 1)
    assert google.counts().count("events.list", page=1, incremental=False) == 1
    assert saas.one("SELECT deleted_at = changed_at FROM sync.calendar_event_changes WHERE event_id = 'event0'") == (
        True,
    )
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


def test_a_410_on_a_later_page_leads_to_a_full_sync_without_a_partial_token(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, calendar = ann
    insert(google, calendar, *(meeting(n) for n in range(5)))
    google.add_fault("gone", method="events.list", page=2, times=1)
    result = tick_once()
    assert (kinds(result), result.tally.full_syncs, result.tally.incremental_syncs) == ([], 1, 0)
    assert google.counts().count("events.list", status=410, incremental=True) == 1
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}
    google.reset_counts()
    assert tick_once().tally.incremental_syncs == 1, "the token of the full sync works"


def test_a_410_in_the_full_sync_itself_is_given_up_after_three_starts_and_waited_for(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, calendar = ann
    google.add_fault("gone", method="events.list")
    assert kinds(tick_once()) == ["protocol"]
    assert google.counts().count("events.list") == 4, "one incremental, three full"
    assert saas.calendar(calendar, "last_outcome, last_error, lease_until") == ("failed", "protocol", None)
    tick_once()
    assert saas.calendar(calendar, "due_at > now() + interval '85 seconds'") == (True,), "it cools down"
    google.reset_counts()
    tick_once()
    assert google.counts().count("events.list") == 0
    assert len(saas.events(workspace, calendar)) == 5, "readers keep what they had"


def test_a_calendar_that_answers_410_every_time_opens_its_breaker_and_disturbs_nobody(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, calendar = ann
    _, other = connected(google, saas, "bob")
    google.set_always_gone(calendar)

    full = [tick_once().tally.full_syncs for _ in range(6)]
    assert full == [2, 1, 1, 0, 0, 0], "bob's first, and three of ann's"
    (open_for,) = saas.calendar(calendar, "extract(epoch FROM breaker_until - now())::int / 60")
    assert open_for in {359, 360}, "four full syncs a day are left"
    assert saas.one(
        "SELECT health, health_reason FROM sync.workspace_state WHERE workspace_id = %s", workspace.workspace_id
    ) == ("needs_human", "breaker_open")
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}
    assert google.counts().count("events.list", calendar=other) == 6

    google.set_always_gone(calendar, gone=False)
    make_due(saas, workspace)
    tick_once()
    assert saas.calendar(calendar, "gone_count, breaker_until") == (0, None)


def test_a_400_invalid_sync_token_is_treated_as_a_410(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, calendar = ann
    saas.execute("UPDATE sync.calendar_state SET sync_token = 'x' || sync_token")
    delete(google, calendar, "event0")
    result = tick_once()
    assert (kinds(result), result.tally.full_syncs, result.tally.events_deleted) == ([], 1, 1)
    assert google.counts().count("events.list", status=400) == 1
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


@pytest.mark.parametrize("full", [False, True])
def test_an_expired_page_token_starts_the_listing_again_and_not_a_full_sync(
    full: bool,
    google: Simulator,
    saas: Saas,
    tick_once: Tick,
    ann: tuple[Workspace, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workspace, calendar = ann
    insert(google, calendar, *(meeting(n) for n in range(5)))
    if full:
        google.expire_sync_tokens(calendar)
    original = GoogleConnection.list_events
    waited: list[float] = []

    def late_once(
        self: GoogleConnection, calendar_id: str, *, page_token: str | None, sync_token: str | None
    ) -> object:
        if page_token is not None and not waited:
            waited.append(google.advance(2 * 3600))
        return original(self, calendar_id, page_token=page_token, sync_token=sync_token)

    monkeypatch.setattr(GoogleConnection, "list_events", late_once)
    result = tick_once()
    assert (kinds(result), result.tally.full_syncs, result.tally.incremental_syncs) == ([], int(full), int(not full))
    assert google.counts().count("events.list", status=400) == 1
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


def test_a_last_page_without_a_sync_token_is_an_error_that_keeps_the_old_token(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, calendar = ann
    before = token(saas, calendar)
    insert(google, calendar, meeting(9))
    google.add_fault("no_sync_token", method="events.list")
    assert kinds(tick_once()) == ["protocol"]
    assert token(saas, calendar) == before
    assert saas.calendar(calendar, "last_outcome, last_error, consecutive_failures") == ("failed", "protocol", 1)
    assert saas.one("SELECT health, health_reason FROM sync.workspace_state") == ("degraded", "protocol")
    google.clear_faults()
    assert tick_once().tally.incremental_syncs == 1
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


@pytest.mark.parametrize("incremental", [False, True])
def test_of_a_page_with_both_tokens_the_page_token_counts(
    incremental: bool, google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, calendar = ann
    insert(google, calendar, *(meeting(n) for n in range(5)))
    if not incremental:
        google.expire_sync_tokens(calendar)
    google.add_fault("both_tokens", method="events.list")
    result = tick_once()
    assert (kinds(result), result.tally.pages) == ([], 3 if incremental else 5)
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}
    google.reset_counts()
    assert tick_once().tally.incremental_syncs == 1, "the token in force is that of the last page"


@pytest.mark.parametrize("page", [1, 2])
def test_an_empty_page_with_a_page_token_is_not_the_end(
    page: int, google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, calendar = ann
    insert(google, calendar, *(meeting(n) for n in range(5)))
    google.add_fault("empty_page", method="events.list", page=page, times=1)
    result = tick_once()
    assert (kinds(result), result.tally.pages, result.tally.events_upserted) == ([], 4, 5)
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


def test_an_empty_page_with_a_sync_token_saves_the_new_token(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    _, calendar = ann
    before = token(saas, calendar)
    for _ in range(3):  # tokens die after thirty days without use; a quiet calendar must not run into that
        google.advance(20 * 86_400)
        assert tick_once().tally.full_syncs == 0
    assert token(saas, calendar) != before


def test_the_same_sync_token_again_is_accepted_and_ends_the_listing(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, calendar = ann
    before = token(saas, calendar)
    insert(google, calendar, meeting(9))
    google.advance(1)
    google.add_fault("same_sync_token", method="events.list")
    assert [kinds(tick_once()) for _ in range(2)] == [[], []]
    assert google.counts().count("events.list") == 2
    assert token(saas, calendar) == before
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


@pytest.mark.parametrize("incremental", [False, True])
def test_the_same_page_token_again_is_a_loop_that_is_left(
    incremental: bool, google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, calendar = ann
    insert(google, calendar, *(meeting(n) for n in range(5)))
    if not incremental:
        google.expire_sync_tokens(calendar)
    google.add_fault("repeat_page_token", method="events.list")
    google.reset_counts()
    assert kinds(tick_once()) == ["protocol"]
    assert google.counts().count("events.list", page=2) <= 2
    google.clear_faults()
    make_due(saas, workspace)
    tick_once()
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


def test_changed_query_parameters_never_meet_an_old_token(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, calendar = ann
    old = token(saas, calendar)
    monkeypatch.setattr(
        "sync_pipeline.google_calendar.EVENT_PARAMETERS",
        {"maxResults": 100, "singleEvents": False, "showDeleted": True, "maxAttendees": 50},
    )
    assert tick_once().tally.full_syncs == 1
    assert tick_once().tally.incremental_syncs == 1
    assert old not in sent(google, "syncToken")
    assert google.counts().drift == {}
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


def test_no_window_of_time_is_frozen_into_a_token_so_events_far_away_are_there_all_along(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, calendar = ann

    def at(year: int) -> dict[str, object]:
        return {"start": {"date": f"{year}-04-01"}, "end": {"date": f"{year}-04-02"}}

    google.put_raw(calendar, [meeting(n, id=f"year{n}", **at(n)) for n in (1999, 2027, 2099)])  # type: ignore[arg-type]  # JSON
    tick_once()
    google.advance(395 * 86_400)
    (event_id,) = insert(google, calendar, meeting(7, **at(2028)))  # type: ignore[arg-type]  # JSON
    tick_once()
    assert set(saas.events(workspace, calendar)) >= {"year1999", "year2027", "year2099", event_id}
    assert (sent(google, "timeMin"), sent(google, "timeMax"), sent(google, "updatedMin")) == ([], [], [])


def test_no_field_mask_is_sent_that_could_lose_a_token(
    google: Simulator, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    tick_once()
    queries = [parse_qs(str(call["query"])) for call in google.recent_calls()]
    assert queries
    assert [query for query in queries if "fields" in query] == []


def test_readers_see_the_old_generation_until_the_new_one_is_complete(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    _, calendar = ann
    google.put_raw(calendar, [meeting(n, id=f"event{n:03}") for n in range(95)])
    tick_once()
    delete(google, calendar, *(f"event{n:03}" for n in range(10)))
    google.expire_sync_tokens(calendar)

    seen: set[int] = set()
    reading, done = threading.Event(), threading.Event()

    def read() -> None:
        with psycopg.connect(saas.dsn, autocommit=True) as connection:
            while not done.is_set():
                row = connection.execute("SELECT count(*) FROM sync.calendar_events").fetchone()
                assert row is not None
                seen.add(row[0])
                reading.set()

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read)
        try:
            assert reading.wait(20)
            result = tick_once()
        finally:
            done.set()
        reader.result()

    assert (result.tally.full_syncs, result.tally.events_deleted, result.tally.events_upserted) == (1, 10, 0)
    assert seen <= {100, 90}, "never a count in between, never 0"
    assert 100 in seen
    assert saas.one("SELECT count(*) FROM sync.calendar_event_changes WHERE deleted_at IS NOT NULL") == (10,)


@pytest.mark.usefixtures("sync_environment")
def test_a_full_sync_that_dies_on_the_way_buries_nothing(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, calendar = ann
    google.put_raw(calendar, [meeting(n, id=f"event{n}") for n in range(10)])
    tick_once()
    delete(google, calendar, "event0")
    google.expire_sync_tokens(calendar)
    with paused_worker("page_written", 2, page_size=2) as worker:
        worker.kill()
    assert len(saas.events(workspace, calendar)) == 10
    assert saas.one("SELECT count(*) FROM sync.calendar_event_changes WHERE deleted_at IS NOT NULL") == (0,)
    end_leases(saas)
    tick_once()
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


def test_a_full_sync_touches_no_row_that_is_not_of_its_calendar(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, calendar = ann
    google.add_user("bob@example.com")
    google.share(calendar, "bob@example.com", "reader")
    other = saas.workspace()
    saas.connect(other, next(user for user in google.users if user.email == "bob@example.com"))
    saas.execute("CREATE TABLE public.event_notes (event_id text, note text)")
    saas.execute("INSERT INTO public.event_notes SELECT 'event' || n, 'of the SaaS' FROM generate_series(0, 9) n")
    tick_once()

    def others() -> list[tuple[object, ...]]:
        tables = ("event_notes", "tenants", "workspaces", "users", "google_connections")
        rows = [row for name in tables for row in saas.execute(f"SELECT '{name}', xmin::text, t FROM public.{name} t")]
        return sorted(rows, key=str) + [row for row in row_versions(saas) if row[0] == other.workspace_id]

    before = others()
    changed = saas.execute("SELECT event_id, changed_at FROM sync.calendar_event_changes ORDER BY 1, 2")
    saas.execute("UPDATE sync.calendar_state SET sync_token = NULL WHERE workspace_id = %s", workspace.workspace_id)
    assert tick_once().tally.full_syncs == 1
    assert others() == before
    assert saas.execute("SELECT event_id, changed_at FROM sync.calendar_event_changes ORDER BY 1, 2") == changed, (
        "what has not changed in Google has not changed here"
    )
    patch(google, calendar, "event1", summary="Changed")
    assert tick_once().tally.events_upserted == 2, "one for each of the two who see it"


def test_a_listing_of_ever_new_page_tokens_without_any_event_is_left(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, calendar = ann
    before = token(saas, calendar)
    google.add_fault("empty_page", method="events.list")
    assert kinds(tick_once()) == ["protocol"]
    assert google.counts().count("events.list") == EMPTY_PAGES + 1
    assert token(saas, calendar) == before
    assert len(saas.events(workspace, calendar)) == 5
