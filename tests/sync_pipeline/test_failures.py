"""Each failure has one consequence, stays in its unit, and is written down without anything personal."""

import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random

import pytest

from devstack.google_calendar import Simulator
from sync_pipeline.cadence import Cadence
from sync_pipeline.errors import GrantRefusedError, RateLimitedError, TransientError
from sync_pipeline.google_calendar import GoogleCalendar
from sync_pipeline.tick import TickResult
from sync_pipeline.workspaces import Workspace
from tests.sync_pipeline.conftest import Saas, Sleeps, differences
from tests.sync_pipeline.test_convergence import make_due
from tests.sync_pipeline.test_sync import meeting

Tick = Callable[[], TickResult]


def kinds(result: TickResult) -> list[str]:
    return [trouble.kind for failed in result.failed for trouble in failed.troubles]


@pytest.fixture
def ann(google: Simulator, saas: Saas, tick_once: Tick) -> tuple[Workspace, str]:
    """A synced workspace with one event in one calendar."""
    user = google.add_user("ann@example.com")
    google.edit(user.calendars[0], [{"op": "insert", "event": meeting()}])
    workspace = saas.workspace()
    saas.connect(workspace, user)
    tick_once()
    google.reset_counts()
    return workspace, user.calendars[0]


def test_a_calendar_that_answers_410_every_time_opens_its_breaker_and_disturbs_nobody(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, calendar = ann
    bob = google.add_user("bob@example.com")
    other = saas.workspace()
    saas.connect(other, bob)
    google.set_always_gone(calendar)

    full = [tick_once().tally.full_syncs for _ in range(6)]
    assert full == [2, 1, 1, 0, 0, 0], "bob's first, and three of ann's"
    (open_for,) = saas.calendar(calendar, "extract(epoch FROM breaker_until - now())::int / 60")
    assert open_for in {359, 360}
    assert saas.one(
        "SELECT health, health_reason FROM sync.workspace_state WHERE workspace_id = %s", workspace.workspace_id
    ) == (
        "needs_human",
        "breaker_open",
    )
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}
    assert google.counts().count("events.list", calendar=bob.calendars[0]) == 6

    google.set_always_gone(calendar, gone=False)
    make_due(saas, workspace)
    tick_once()
    assert saas.calendar(calendar, "gone_count, breaker_until") == (0, None)


def test_a_410_on_a_later_page_leads_to_a_full_sync_without_a_partial_token(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, calendar = ann
    monkeypatch.setattr(
        "sync_pipeline.google_calendar.EVENT_PARAMETERS", {"maxResults": 2, "singleEvents": False, "showDeleted": True}
    )
    tick_once()
    google.edit(calendar, [{"op": "insert", "event": meeting(n)} for n in range(5)])
    google.add_fault("gone", method="events.list", page=2, times=1)
    result = tick_once()
    assert (result.tally.full_syncs, kinds(result)) == (1, [])
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


def test_a_full_listing_that_never_finishes_is_given_up_after_three_starts(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, calendar = ann
    google.add_fault("gone", method="events.list")
    assert kinds(tick_once()) == ["protocol"]
    assert google.counts().count("events.list") == 4, "one incremental, three full"
    assert len(saas.events(workspace, calendar)) == 1


@pytest.mark.parametrize("fault", ["no_sync_token", "repeat_page_token"])
def test_an_answer_against_the_protocol_keeps_the_old_token(
    fault: str, google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    _, calendar = ann
    before = saas.calendar(calendar, "sync_token")
    google.edit(calendar, [{"op": "insert", "event": meeting(2)}])
    if fault == "repeat_page_token":
        google.add_fault("empty_page", method="events.list", page=1)
    google.add_fault(fault, method="events.list")
    assert kinds(tick_once()) == ["protocol"]
    assert saas.calendar(calendar, "sync_token") == before
    assert saas.calendar(calendar, "last_outcome, last_error, consecutive_failures") == ("failed", "protocol", 1)


def test_changed_query_parameters_never_meet_an_old_token(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sync_pipeline.google_calendar.EVENT_PARAMETERS",
        {"maxResults": 100, "singleEvents": False, "showDeleted": True},
    )
    assert tick_once().tally.full_syncs == 1
    assert google.counts().drift == {}


@pytest.mark.parametrize("kind", ["error", "drop", "drop_body", "truncate", "html"])
def test_a_passing_disturbance_is_retried_within_the_run(
    kind: str, google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str], sleeps: Sleeps
) -> None:
    google.add_fault(kind, method="events.list", times=2)
    assert kinds(tick_once()) == []
    assert sleeps, "httplib2 repeats a dropped request once by itself, all else is waited for here"
    assert sleeps == sorted(sleeps)


def test_a_disturbed_token_endpoint_is_no_refused_grant(
    google: Simulator, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    google.expire_access_tokens("ann@example.com")
    google.add_fault("drop", method="oauth.token")
    assert kinds(tick_once()) == ["transient", "transient"]
    google.clear_faults()
    assert kinds(tick_once()) == []


class _Page(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>Please log in to this network.</html>")

    def log_message(self, *arguments: object) -> None:
        pass


def test_a_page_in_place_of_a_token_is_a_passing_disturbance(google: Simulator) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Page) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            client = GoogleCalendar(
                endpoint=google.url,
                token_url=f"http://127.0.0.1:{server.server_port}/token",
                client_id="client",
                client_secret="secret",
                sleep=lambda seconds: None,
                rng=Random(1),
            )
            with pytest.raises(TransientError):
                client.connect("a refresh token", calls=Counter()).list_calendars(page_token=None)
        finally:
            server.shutdown()


def test_a_lasting_disturbance_ends_in_a_recorded_failure_and_keeps_everything(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, calendar = ann
    google.add_fault("error", method="events.list", status=503)
    assert kinds(tick_once()) == ["transient"]
    assert len(saas.events(workspace, calendar)) == 1
    assert saas.one("SELECT health FROM sync.workspace_state") == ("degraded",)


def test_retry_after_is_waited_for_within_reason_and_parks_the_connection_beyond(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str], sleeps: Sleeps
) -> None:
    google.add_fault(
        "rate_limited", method="events.list", status=429, reason="rateLimitExceeded", retry_after=7, times=1
    )
    assert kinds(tick_once()) == []
    assert 7 <= sleeps[0] < 8
    google.add_fault("rate_limited", method="events.list", status=403, reason="userRateLimitExceeded", retry_after=900)
    google.reset_counts()
    assert kinds(tick_once()) == ["rate_limited"]
    tick_once()
    assert google.counts().count("events.list") == 1, "no call before the time is over"
    assert saas.one("SELECT parked_until > now() + interval '14 minutes' FROM sync.connection_state") == (True,)


def test_a_used_up_quota_parks_one_connection_and_no_other(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    bob = google.add_user("bob@example.com")
    saas.connect(saas.workspace(), bob)
    google.add_fault("forbidden", method="events.list", user="ann@example.com", reason="quotaExceeded")
    assert kinds(tick_once()) == ["quota_exceeded"]
    google.reset_counts()
    tick_once()
    assert google.counts().count("events.list", user="ann@example.com") == 0
    assert google.counts().count("events.list", user="bob@example.com") == 1


def test_poison_events_are_quarantined_and_everything_else_goes_on(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, calendar = ann
    google.put_raw(
        calendar,
        [
            meeting(2, id="nul", summary="a\0b"),
            meeting(3, id="poison", summary={"not": "text"}),
            {"id": "year1", "summary": "busy", "start": {"date": "0001-01-01"}, "end": {"date": "0001-01-02"}},
            meeting(4, id="large", description="<p>" + "é" * 500_000),
            meeting(5, id="zone", start={"dateTime": "2026-03-02T10:00:00", "timeZone": "GMT-07:00"}),
        ],
    )
    result = tick_once()
    assert (kinds(result), result.tally.quarantined) == ([], 1)
    assert saas.one("SELECT event_id, reason FROM sync.quarantine") == ("poison", "summary is not text")
    assert set(saas.events(workspace, calendar)) >= {"nul", "year1", "large", "zone"}
    assert saas.one("SELECT summary, flaws FROM sync.calendar_events WHERE event_id = 'nul'") == (
        "a�b",
        ["characters_replaced"],
    )
    assert saas.one(
        "SELECT (start_at AT TIME ZONE 'UTC')::time::text FROM sync.calendar_events WHERE event_id = 'zone'"
    ) == ("17:00:00",)

    google.put_raw(calendar, [meeting(3, id="poison", summary="cured")])
    tick_once()
    assert saas.one("SELECT count(*) FROM sync.quarantine") == (0,)
    assert saas.events(workspace, calendar)["poison"][2] == "cured"


def test_an_event_only_postgres_refuses_is_found_and_quarantined(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    _, calendar = ann
    saas.execute(
        "CREATE FUNCTION sync.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF new.summary = 'Meeting 3' THEN RAISE SQLSTATE '22P02'; END IF; RETURN new; END $$"
    )
    saas.execute("CREATE TRIGGER refuse BEFORE INSERT ON sync.event_rows FOR EACH ROW EXECUTE FUNCTION sync.refuse()")
    google.edit(calendar, [{"op": "insert", "event": meeting(n)} for n in range(2, 6)])
    result = tick_once()
    assert (kinds(result), result.tally.quarantined, result.tally.events_upserted) == ([], 1, 3)
    assert saas.one("SELECT reason FROM sync.quarantine") == ("Postgres refuses it (SQLSTATE 22P02)",)


def test_one_failing_workspace_never_touches_another(google: Simulator, saas: Saas, tick_once: Tick) -> None:
    workspaces = []
    for n in range(9):
        user = google.add_user(f"user-{n}@example.com")
        google.edit(user.calendars[0], [{"op": "insert", "event": meeting()}])
        workspaces.append(saas.workspace())
        saas.connect(workspaces[-1], user)
    google.add_fault("error", method="events.list", user="user-0@example.com")
    google.add_fault("forbidden", method="events.list", user="user-1@example.com", reason="forbidden")
    google.add_fault("hang", method="events.list", user="user-2@example.com", seconds=0.1)
    result = tick_once()
    outcomes = {
        workspaces.index(one.workspace): (one.tally.calendars_synced, [trouble.kind for trouble in one.troubles])
        for one in result.results
    }
    assert outcomes == {
        0: (0, ["transient"]),
        1: (0, ["access_denied"]),
        2: (0, ["transient"]),
        **dict.fromkeys(range(3, 9), (1, [])),
    }
    assert not result.everything_failed


def test_the_least_recently_served_tenant_comes_first_and_tenants_take_turns(
    google: Simulator, saas: Saas, tick_once: Tick, caplog: pytest.LogCaptureFixture
) -> None:
    small = saas.workspace()
    big = [saas.workspace() for _ in range(1)]
    big += [saas.workspace(big[0].tenant_id) for _ in range(7)]
    for n, workspace in enumerate([*big, small]):
        saas.connect(workspace, google.add_user(f"user-{n}@example.com"))
    result = tick_once()
    order = [one.workspace for one in result.results]
    assert order.index(small) < 5, "it is in the first batch of four, beside the big tenant"


def test_backoff_doubles_up_to_an_hour_and_is_jittered() -> None:
    cadence = Cadence(poll_seconds=120, list_seconds=3600, rng=Random(1))
    waits = [cadence.after(TransientError("x"), failures=n) for n in range(12)]
    assert 90 <= waits[0] <= 150
    assert 90 <= waits[1] <= 150
    assert 180 <= waits[2] <= 300
    assert 2700 <= waits[11] <= 4500
    assert cadence.after(RateLimitedError("x", retry_after_seconds=600), failures=0) >= 600
    assert GrantRefusedError.needs_human
