"""Tenants never meet, and a grant is used as long as it works and not a call longer.

Group E of the documented cases, without quotas (`test_quota`), row-level security (`test_security`) and what must not
be told (`test_canaries`).
"""

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from random import Random

import pytest

from devstack.google_calendar import Simulator
from scaling.databases import DatabaseRouter, Shard
from sync_pipeline import tick
from sync_pipeline.errors import TransientError
from sync_pipeline.google_calendar import CALL_TIMEOUT_SECONDS, CalendarListPage, GoogleCalendar, GoogleConnection
from sync_pipeline.services import Services
from sync_pipeline.tick import TickResult
from sync_pipeline.workspaces import Workspace
from tests.sync_pipeline.conftest import Saas, Sleeps, differences
from tests.sync_pipeline.scenes import Tick, connected, insert, kinds, make_due, meeting


def list_again(saas: Saas) -> None:
    """Let the time until the next list of calendars pass."""
    saas.execute("UPDATE sync.connection_state SET list_due_at = 'epoch', parked_until = NULL")


class Between:
    """A clock by whose side another run happens, as a whole, once the moment for it has come."""

    def __init__(self, moment: Callable[[], bool], services: Services, run: Tick) -> None:
        self._moment = moment
        self._clock = services.clock
        self._run = run
        self._asked = threading.Lock()
        self.results: list[TickResult] = []

    def __call__(self) -> float:
        with self._asked:
            if not self.results and self._moment():
                self.results.append(self._run())
        return self._clock()


@pytest.fixture
def ann(google: Simulator, saas: Saas, tick_once: Tick) -> tuple[Workspace, str]:
    """A synced workspace with one event in one calendar."""
    workspace, calendar = connected(google, saas)
    insert(google, calendar, meeting())
    tick_once()
    google.reset_counts()
    return workspace, calendar


# --- tenants --------------------------------------------------------------------------------------------------------


def test_one_event_id_in_two_calendars_and_two_tenants_is_a_row_in_each(
    google: Simulator, saas: Saas, tick_once: Tick
) -> None:
    """Case 56."""
    ours, work = connected(google, saas, "ann")
    home = google.add_calendar("ann@example.com", "Home")
    theirs, bobs = connected(google, saas, "bob")
    for name, calendar in (("work", work), ("home", home), ("bob's", bobs)):
        google.put_raw(calendar, [meeting(1, id="sameid", summary=name)])
    assert kinds(tick_once()) == []
    found = saas.execute("SELECT tenant_id, summary FROM sync.calendar_events WHERE event_id = 'sameid' ORDER BY 2")
    assert found == [(theirs.tenant_id, "bob's"), (ours.tenant_id, "home"), (ours.tenant_id, "work")]

    google.put_raw(home, [meeting(1, id="sameid", summary="home, changed")])
    tick_once()
    assert saas.events(ours, work)["sameid"][2] == "work"
    assert saas.events(theirs, bobs)["sameid"][2] == "bob's"


def test_a_calendar_shared_to_two_tenants_has_two_tokens_and_two_sets_of_rows(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    """Case 57."""
    workspace, calendar = ann
    bob = google.add_user("bob@example.com")
    google.share(calendar, "bob@example.com", "reader")
    other = saas.workspace()
    connection = saas.connect(other, bob)
    tick_once()
    assert set(saas.events(other, calendar)) == set(saas.events(workspace, calendar))
    tokens = saas.one("SELECT count(DISTINCT sync_token) FROM sync.calendar_state WHERE calendar_id = %s", calendar)
    assert tokens == (2,)

    # One tenant stands still, the other goes on; later the first catches up from its own token.
    saas.execute("UPDATE public.google_connections SET status = 'disconnected' WHERE id = %s", connection)
    insert(google, calendar, meeting(2))
    tick_once()
    assert (len(saas.events(workspace, calendar)), len(saas.events(other, calendar))) == (2, 1)
    saas.execute("UPDATE public.google_connections SET status = 'active' WHERE id = %s", connection)
    result = tick_once()
    assert result.tally.full_syncs == 0
    assert len(saas.events(other, calendar)) == 2


# --- grants ---------------------------------------------------------------------------------------------------------


def test_workspaces_that_a_policy_hides_from_the_sync_are_not_taken_for_deleted(
    login: Callable[..., str], saas: Saas, services: Services, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, calendar = ann
    other = saas.workspace()
    tables = "public.tenants, public.workspaces, public.users, public.google_connections"
    saas.execute(f"GRANT SELECT ON {tables} TO pipeline_worker")
    saas.execute(
        "CREATE POLICY one_only ON public.workspaces AS RESTRICTIVE FOR SELECT TO pipeline_worker "
        f"USING (id = '{other.workspace_id}')"
    )
    with DatabaseRouter(Shard("main", login("pipeline_worker"))) as router:
        tick.run_tick(replace(services, router=router), run_id="half-blind")
    assert len(saas.events(workspace, calendar)) == 1

    saas.execute("DROP POLICY one_only ON public.workspaces")
    saas.execute("DELETE FROM public.google_connections WHERE workspace_id = %s", workspace.workspace_id)
    saas.execute("DELETE FROM public.workspaces WHERE id = %s", workspace.workspace_id)
    tick_once()
    assert saas.one("SELECT count(*) FROM sync.event_rows") == (0,)


def test_a_revoked_grant_is_asked_once_then_never_until_it_is_replaced(
    google: Simulator, saas: Saas, tick_once: Tick
) -> None:
    """Cases 59 and 60, the same account."""
    user = google.add_user("ann@example.com")
    calendars = [*user.calendars, *(google.add_calendar("ann@example.com", f"C{n}") for n in range(3))]
    workspace = saas.workspace()
    connection = saas.connect(workspace, user)
    insert(google, calendars[0], meeting())
    other, bobs = connected(google, saas, "bob")
    tick_once()
    google.revoke("ann@example.com")
    google.reset_counts()

    assert kinds(tick_once()) == ["reauth_required"], "one of four calendars told it; the list told the others"
    assert google.counts().count("oauth.token") == 1
    assert saas.one("SELECT status FROM sync.connection_state WHERE connection_id = %s", connection) == (
        "reauth_required",
    )
    google.reset_counts()
    insert(google, bobs, meeting(2))
    assert [kinds(tick_once()) for _ in range(2)] == [[], []]
    assert google.counts().count(user="ann@example.com") == 0
    assert google.counts().count("oauth.token") == 0
    assert len(saas.events(workspace, calendars[0])) == 1, "data stays"
    assert len(saas.events(other, bobs)) == 1, "others go on"

    google.reinstate("ann@example.com")
    saas.regrant(connection, user.refresh_token)
    google.reset_counts()
    result = tick_once()
    assert kinds(result) == []
    assert result.tally.full_syncs == 0, "old tokens still work"
    assert google.counts().count("events.list", user="ann@example.com", incremental=True) == 4


def test_a_reconnect_as_another_account_fences_off_the_data_of_the_old_one_at_once(
    google: Simulator, saas: Saas, services: Services, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    """Case 60, a different account. The calendar both accounts see is read anew, as what the new one may see."""
    workspace, calendar = ann
    bob = google.add_user("bob@example.com")
    shared = google.add_calendar("ann@example.com", "Shared")
    insert(google, shared, meeting(1), meeting(2))
    google.share(shared, "bob@example.com", "reader")
    insert(google, bob.calendars[0], meeting(3))
    list_again(saas)
    tick_once()
    assert (len(saas.events(workspace, calendar)), len(saas.events(workspace, shared))) == (1, 2)

    (connection,) = saas.one("SELECT id FROM public.google_connections")
    saas.execute("UPDATE public.google_connections SET google_account = %s WHERE id = %s", bob.email, connection)
    saas.regrant(connection, bob.refresh_token)  # type: ignore[arg-type]  # a uuid
    google.add_fault("error", method="calendarList.list", status=503)
    tick_once()
    assert saas.events(workspace, calendar) == {}, "before the new account's calendars are even known"
    assert saas.events(workspace, shared) == {}

    google.clear_faults()
    make_due(saas, workspace)
    google.reset_counts()
    assert kinds(tick_once()) == []
    assert google.counts().count("events.list", incremental=True) == 0, "no token of the old account is used"
    assert google.counts().count(user="ann@example.com") == 0
    assert saas.events(workspace, calendar) == {}
    assert differences(saas, workspace, shared, google.truth(shared)) == {}
    assert differences(saas, workspace, bob.calendars[0], google.truth(bob.calendars[0])) == {}
    buried = saas.one(
        "SELECT count(*) FROM sync.calendar_event_changes WHERE calendar_id = %s AND deleted_at IS NOT NULL", calendar
    )
    assert buried == (1,), "followers of changes learn of it"


def test_a_worker_that_is_writing_for_the_old_account_when_another_is_connected_writes_nothing_more(
    google: Simulator, saas: Saas, services: Services, tick_once: Tick, pages_of: Callable[[int], None]
) -> None:
    """Case 60, in the middle of a sync."""
    pages_of(1)
    workspace, calendar = connected(google, saas)
    insert(google, calendar, meeting(1), meeting(2), meeting(3))
    bob = google.add_user("bob@example.com")
    (connection,) = saas.one("SELECT id FROM public.google_connections")
    google.add_fault("latency", method="events.list", page=2, seconds=1.5)
    with ThreadPoolExecutor(1) as thread:
        old = thread.submit(tick.run_tick, services, run_id="old")
        while google.counts().count("events.list") < 1:
            threading.Event().wait(0.02)
        saas.execute("UPDATE public.google_connections SET google_account = %s WHERE id = %s", bob.email, connection)
        saas.regrant(connection, bob.refresh_token)  # type: ignore[arg-type]  # a uuid
        tick_once()
        result = old.result()
    assert kinds(result) == ["lease_lost"]
    assert saas.events(workspace, calendar) == {}
    assert saas.calendar(calendar, "sync_token, deleted_at IS NOT NULL") == (None, True)


def test_a_connection_of_before_accounts_were_noted_keeps_its_calendars(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, calendar = ann
    saas.execute("UPDATE sync.connection_state SET account_fingerprint = NULL")
    assert tick_once().tally.full_syncs == 0
    assert len(saas.events(workspace, calendar)) == 1
    assert saas.one("SELECT account_fingerprint IS NOT NULL FROM sync.connection_state") == (True,)


def test_a_grant_no_key_opens_is_a_grant_that_is_refused(google: Simulator, saas: Saas, tick_once: Tick) -> None:
    workspace = saas.workspace()
    connection = saas.connect(workspace, google.add_user("ann@example.com"))
    saas.execute(
        "UPDATE public.google_connections SET refresh_token_encrypted = 'not a grant' WHERE id = %s", connection
    )
    assert kinds(tick_once()) == ["reauth_required"]
    assert google.counts().total == 0


def test_access_tokens_are_kept_encrypted_and_used_by_the_next_run(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    tick_once()
    assert google.counts().count("oauth.token") == 0
    (kept,) = saas.one("SELECT access_token_encrypted FROM sync.connection_state")
    assert isinstance(kept, bytes)
    assert kept.startswith(b"gAAAA")
    google.expire_access_tokens("ann@example.com")
    result = tick_once()
    assert kinds(result) == []
    assert google.counts().count("oauth.token") == 1, "one refresh after the 401"


def test_a_401_on_the_third_page_leads_to_one_refresh_and_the_same_page_again(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str], pages_of: Callable[[int], None]
) -> None:
    """Case 61."""
    workspace, calendar = ann
    pages_of(2)
    tick_once()  # other parameters: a full sync
    insert(google, calendar, *(meeting(n) for n in range(2, 10)))
    google.reset_counts()
    google.add_fault("unauthorized", method="events.list", page=3, times=1)
    result = tick_once()
    assert (kinds(result), result.tally.incremental_syncs) == ([], 1)
    counts = google.counts()
    assert counts.count("oauth.token") == 1
    assert counts.count("events.list", status=401) == 1
    by_page = {page: counts.count("events.list", page=page, status=200) for page in range(1, 5)}
    assert by_page == {1: 1, 2: 1, 3: 1, 4: 1}, "no restart"
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


def test_a_token_that_is_refused_right_after_its_refresh_is_no_loop(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    google.add_fault("unauthorized", method="events.list")
    assert kinds(tick_once()) == ["access_token_refused"]
    assert google.counts().count("oauth.token") == 1


def test_many_calendars_and_many_workers_that_find_an_expired_access_token_refresh_it_once(
    google: Simulator, saas: Saas, services: Services, tick_once: Tick
) -> None:
    """Case 62. Lists and calendars go to several runs: whatever is done is free for the next, and due."""
    connected(google, saas)
    for n in range(19):
        google.add_calendar("ann@example.com", f"C{n}")
    tick_once()
    google.expire_access_tokens("ann@example.com")
    google.reset_counts()
    with ThreadPoolExecutor(20) as threads:
        results = list(threads.map(lambda n: tick.run_tick(services, run_id=f"run-{n}"), range(20)))
    assert [kind for result in results for kind in kinds(result)] == []
    # Whether one run or several got work: those after the first find the token the first one kept.
    assert google.counts().count("oauth.token") == 1


def test_a_run_that_takes_a_list_while_another_works_on_its_calendars_uses_the_token_that_one_got(
    google: Simulator, saas: Saas, services: Services, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    """Case 62, in the order in which two runs do it: the list is free again and due before the first visit ends."""
    google.expire_access_tokens("ann@example.com")
    second = Between(lambda: google.counts().count("oauth.token") == 1, services, tick_once)
    assert kinds(tick.run_tick(replace(services, clock=second), run_id="first")) == []
    (result,) = second.results
    assert (kinds(result), result.tally.calls["calendarList.list", "200"]) == ([], 1), "the list was read twice"
    assert google.counts().count("oauth.token") == 1


@pytest.mark.parametrize(("lasts", "refreshes"), [("1 hour", 1), ("1 second", 2)], ids=["lasting", "about to end"])
def test_a_run_that_read_its_grant_before_another_got_a_new_token_takes_that_one_while_it_lasts(
    google: Simulator,
    saas: Saas,
    services: Services,
    tick_once: Tick,
    ann: tuple[Workspace, str],
    lasts: str,
    refreshes: int,
) -> None:
    """Case 62, with two calendars of a connection in two runs when its access token ends."""
    _, calendar = ann
    home = google.add_calendar("ann@example.com", "Home")
    tick_once()
    saas.execute("UPDATE sync.connection_state SET list_due_at = 'infinity'")
    saas.execute("UPDATE sync.calendar_state SET due_at = 'infinity' WHERE calendar_id = %s", home)
    google.expire_access_tokens("ann@example.com")
    google.reset_counts()

    def is_taken() -> bool:
        if saas.calendar(calendar, "lease_until IS NULL") == (True,):
            return False
        saas.execute("UPDATE sync.calendar_state SET due_at = 'epoch' WHERE calendar_id = %s", home)
        return True

    def run_whole() -> TickResult:
        result = tick_once()
        saas.execute("UPDATE sync.connection_state SET access_token_expires_at = now() + %s::interval", lasts)
        return result

    second = Between(is_taken, services, run_whole)
    result = tick.run_tick(replace(services, clock=second), run_id="first")
    assert [(kinds(one), one.tally.calendars_synced) for one in (result, *second.results)] == [([], 1), ([], 1)]
    counts = google.counts()
    assert counts.count("events.list", status=401) == 2, "both found it expired"
    assert counts.count("oauth.token") == refreshes


def test_missing_permission_waits_for_a_human_and_too_many_calls_only_for_time(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str], sleeps: Sleeps
) -> None:
    """Case 63."""
    workspace, calendar = ann
    health = "SELECT health FROM sync.workspace_state"
    google.add_fault("forbidden", method="events.list", reason="rateLimitExceeded", times=1)
    assert kinds(tick_once()) == ["rate_limited"]
    assert saas.one(health) == ("degraded",)
    google.reset_counts()
    assert kinds(tick_once()) == []
    assert google.counts().count("events.list") == 0, "backs off"
    make_due(saas, workspace)
    assert kinds(tick_once()) == []
    assert saas.one(health) == ("healthy",), "and is well again by itself"

    google.add_fault("forbidden", method="events.list", reason="insufficientPermissions")
    google.reset_counts()
    sleeps.clear()
    assert kinds(tick_once()) == ["access_denied"]
    assert google.counts().count("events.list") == 1, "terminal: not tried again"
    assert sleeps == []
    assert saas.one(health) == ("needs_human",)
    assert saas.calendar(calendar, "due_at > now() + interval '4 hours'") == (True,)


def test_dead_connections_never_keep_live_ones_from_their_turn(google: Simulator, saas: Saas, tick_once: Tick) -> None:
    """Case 67: the dead ones are the stalest, and more than a run takes at a time."""
    graves = [connected(google, saas, f"dead-{n}") for n in range(12)]
    tick_once()
    for n in range(len(graves)):
        google.revoke(f"dead-{n}@example.com")
    living = [connected(google, saas, f"live-{n}") for n in range(3)]
    result = tick_once()
    assert Counter(kinds(result)) == {"reauth_required": len(graves)}
    google.reset_counts()
    for _, calendar in living:
        insert(google, calendar, meeting(2))
    assert kinds(tick_once()) == []
    assert all(len(saas.events(workspace, calendar)) == 1 for workspace, calendar in living)
    assert google.counts().count("oauth.token") == 0, "the dead are not asked again"


def test_a_state_row_nobody_can_use_is_passed_over_and_told(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    """Case 68."""
    workspace, calendar = ann
    other, bobs = connected(google, saas, "bob")
    tick_once()
    saas.execute(
        "UPDATE sync.calendar_state SET calendar_id = E'\\u0001 of nobody', live_generation = 2147483647, "
        "sync_token = NULL WHERE calendar_id = %s",
        calendar,
    )
    insert(google, bobs, meeting(2))
    google.add_fault("error", method="calendarList.list", user="ann@example.com")
    result = tick_once()
    assert "internal" in kinds(result), "told"
    assert len(saas.events(other, bobs)) == 1, "and everybody else is served"
    assert saas.one("SELECT health FROM sync.workspace_state WHERE workspace_id = %s", workspace.workspace_id) != (
        "healthy",
    )


def test_a_row_that_cannot_even_be_read_sets_aside_its_workspace_alone(
    saas: Saas, google: Simulator, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, calendar = ann
    other, bobs = connected(google, saas, "bob")
    tick_once()
    poison = "UPDATE sync.connection_state SET access_token_expires_at = {} WHERE workspace_id = %s"
    saas.execute(poison.format("'infinity'"), workspace.workspace_id)
    insert(google, bobs, meeting(2))
    insert(google, calendar, meeting(3))
    assert kinds(tick_once()) == ["internal"]
    assert len(saas.events(other, bobs)) == 1
    assert saas.one(
        "SELECT health, health_reason FROM sync.workspace_state WHERE workspace_id = %s", workspace.workspace_id
    ) == ("needs_human", "unreadable_state")

    saas.execute(poison.format("now()"), workspace.workspace_id)
    assert kinds(tick_once()) == []
    assert len(saas.events(workspace, calendar)) == 2
    assert saas.one("SELECT health FROM sync.workspace_state WHERE workspace_id = %s", workspace.workspace_id) == (
        "healthy",
    )


# --- the list of calendars ------------------------------------------------------------------------------------------


def test_a_404_of_a_calendar_that_is_still_listed_backs_off_and_keeps_everything(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    """Case 69, first half."""
    workspace, calendar = ann
    google.add_fault("not_found", method="events.list")
    for _ in range(3):
        make_due(saas, workspace)
        assert kinds(tick_once()) == ["not_found"]
    assert saas.calendar(calendar, "consecutive_failures, deleted_at, missing_from_lists") == (3, None, 0)
    assert len(saas.events(workspace, calendar)) == 1
    google.clear_faults()
    make_due(saas, workspace)
    assert kinds(tick_once()) == []


def test_a_calendar_is_retired_only_when_two_complete_lists_do_not_name_it(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 69, second half."""
    workspace, _ = ann
    google.add_user("bob@example.com")
    shared = google.add_calendar("bob@example.com", "Shared")
    insert(google, shared, meeting())
    google.share(shared, "ann@example.com", "reader")
    tick_once()
    assert len(saas.events(workspace, shared)) == 1
    google.add_fault("error", method="calendarList.list")
    for _ in range(3):
        list_again(saas)
        tick_once()
    assert len(saas.events(workspace, shared)) == 1, "a list that fails counts for nothing"
    google.clear_faults()
    whole = GoogleConnection.list_calendars

    def without_shared(self: GoogleConnection, *, page_token: str | None) -> CalendarListPage:
        page = whole(self, page_token=page_token)
        return replace(page, entries=tuple(entry for entry in page.entries if entry.calendar_id != shared))

    monkeypatch.setattr(GoogleConnection, "list_calendars", without_shared)
    list_again(saas)
    tick_once()
    assert len(saas.events(workspace, shared)) == 1, "one odd answer removes nothing"
    list_again(saas)
    tick_once()
    assert saas.events(workspace, shared) == {}
    assert saas.one(
        "SELECT count(*) FROM sync.calendar_event_changes WHERE calendar_id = %s AND deleted_at IS NOT NULL", shared
    ) == (1,)


def test_an_empty_list_is_no_answer_and_removes_nothing(
    saas: Saas, tick_once: Tick, ann: tuple[Workspace, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 70."""
    workspace, calendar = ann
    monkeypatch.setattr(GoogleConnection, "list_calendars", lambda self, *, page_token: CalendarListPage((), None))
    for _ in range(4):
        list_again(saas)
        tick_once()
    assert saas.calendar(calendar, "deleted_at, missing_from_lists") == (None, 0)
    assert len(saas.events(workspace, calendar)) == 1


def test_a_410_of_the_list_keeps_the_calendars_and_the_next_full_list_brings_them_in_step(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    """Case 71. The list is always read in full, so there is no token of it that could be gone."""
    workspace, calendar = ann
    google.add_fault("gone", method="calendarList.list", times=1)
    list_again(saas)
    tick_once()
    assert len(saas.events(workspace, calendar)) == 1
    added = google.add_calendar("ann@example.com", "New")
    make_due(saas, workspace)
    assert kinds(tick_once()) == []
    known = saas.execute("SELECT calendar_id FROM sync.calendar_state WHERE deleted_at IS NULL")
    assert {found for (found,) in known} == {calendar, added}


def test_a_renamed_calendar_and_a_changed_role_are_seen_with_the_next_list(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    """Case 72."""
    google.add_user("bob@example.com")
    shared = google.add_calendar("bob@example.com", "Shared")
    google.share(shared, "ann@example.com", "writer")
    list_again(saas)
    tick_once()
    assert saas.calendar(shared, "summary, access_role") == ("Shared", "writer")
    google.rename(shared, "Travels")
    google.share(shared, "ann@example.com", "reader")
    list_again(saas)
    tick_once()
    assert saas.calendar(shared, "summary, access_role") == ("Travels", "reader")


def test_a_calendar_id_with_special_characters_is_encoded_once(google: Simulator, saas: Saas, tick_once: Tick) -> None:
    """Case 73."""
    google.add_user("ann@example.com")
    calendar = google.add_calendar("ann@example.com", "Odd", id="en.odd#holiday/a%20b+c@group.v.calendar.google.com")
    assert calendar.startswith("en.odd#holiday/"), "the simulator takes the id as it is given"
    insert(google, calendar, meeting())
    workspace = saas.workspace()
    saas.connect(workspace, google.user("ann@example.com"))
    assert kinds(tick_once()) == []
    assert len(saas.events(workspace, calendar)) == 1
    assert google.counts().count("events.list", calendar=calendar, status=200) == 1


def test_a_server_that_never_answers_costs_a_bounded_time_is_counted_and_frees_the_lease(
    google: Simulator, saas: Saas, services: Services, sleeps: Sleeps, ann: tuple[Workspace, str]
) -> None:
    """Case 75, with a timeout of a tenth of a second in place of thirty."""
    _, calendar = ann
    google.add_fault("hang", method="events.list", seconds=5)
    impatient = GoogleCalendar(
        endpoint=google.url,
        token_url=google.token_url,
        client_id="client",
        client_secret="secret",
        sleep=sleeps,
        rng=Random(1),
        call_timeout_seconds=0.1,
    )
    result = tick.run_tick(replace(services, google=impatient), run_id="hangs")
    assert kinds(result) == ["transient"]
    assert result.duration_seconds < 4
    assert saas.calendar(calendar, "lease_owner, lease_until, last_outcome, last_error") == (
        None,
        None,
        "failed",
        "transient",
    )
    assert saas.one("SELECT sum(calls) > 0 FROM sync.api_calls WHERE outcome = 'no_answer'") == (True,)


def test_the_longest_silence_that_is_waited_for_is_under_a_minute() -> None:
    assert CALL_TIMEOUT_SECONDS <= 60
    assert TransientError.retried_at_once
