"""Each failure has one consequence, stays in its unit, and is written down."""

import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random

import pytest

from devstack.google_calendar import Simulator
from sync_pipeline.errors import TransientError
from sync_pipeline.google_calendar import GoogleCalendar
from sync_pipeline.workspaces import Workspace
from tests.sync_pipeline.conftest import Saas, Sleeps, differences
from tests.sync_pipeline.scenes import Tick, insert, kinds, meeting


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


def test_retry_after_on_a_first_page_parks_the_connection_for_that_long(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str], sleeps: Sleeps
) -> None:
    google.add_fault("rate_limited", method="events.list", status=429, reason="rateLimitExceeded", retry_after=900)
    assert (kinds(tick_once()), sleeps) == (["rate_limited"], []), "no worker sleeps through it"
    google.reset_counts()
    tick_once()
    assert google.counts().total == 0, "no call before the time is over"
    assert saas.one("SELECT parked_until > now() + interval '14 minutes' FROM sync.connection_state") == (True,)


def test_retry_after_within_a_listing_is_waited_for_because_its_pages_would_be_read_again(
    google: Simulator,
    saas: Saas,
    tick_once: Tick,
    ann: tuple[Workspace, str],
    sleeps: Sleeps,
    pages_of: Callable[[int], None],
) -> None:
    workspace, calendar = ann
    pages_of(1)
    insert(google, calendar, meeting(2))
    google.add_fault(
        "rate_limited", method="events.list", page=2, status=429, reason="rateLimitExceeded", retry_after=7, times=1
    )
    assert kinds(tick_once()) == []
    assert 7 <= sleeps[0] < 8
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


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
