"""One simulator process for each test worker, given a fresh world for each test, and a bare client for it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from devstack.google_calendar import Simulator, run_simulator
from tests import clients

ANA, BEN = "user-001@example.com", "user-002@example.com"
AT_TEN = {
    "start": {"dateTime": "2026-06-01T10:00:00+00:00"},
    "end": {"dateTime": "2026-06-01T11:00:00+00:00"},
}
WEEKLY = {
    "summary": "weekly",
    "start": {"dateTime": "2026-03-09T09:00:00", "timeZone": "Europe/Berlin"},
    "end": {"dateTime": "2026-03-09T10:00:00", "timeZone": "Europe/Berlin"},
    "recurrence": ["RRULE:FREQ=WEEKLY;COUNT=4"],
}


@dataclass
class Api:
    """The Calendar API as one user meets it, without a client library in between."""

    simulator: Simulator
    email: str
    http: httpx.Client
    calendar: str = "primary"

    def call(
        self, verb: str, path: str, body: object = None, headers: dict[str, str] | None = None, **params: Any
    ) -> httpx.Response:
        """Send one request."""
        token = self.simulator.user(self.email).access_token
        return self.http.request(
            verb,
            f"{self.simulator.url}/calendar/v3/{path}",
            json=body,
            params=params,
            headers={"Authorization": f"Bearer {token}", **(headers or {})},
        )

    def at(self, calendar: str) -> "Api":
        """The same user at another calendar."""
        return Api(self.simulator, self.email, self.http, calendar)

    @property
    def events(self) -> str:
        """Path of the calendar's events."""
        return f"calendars/{quote(self.calendar, safe='')}/events"

    def page(self, **params: Any) -> dict[str, Any]:
        """Return one page of events."""
        answer = self.call("GET", self.events, **params)
        assert answer.status_code == 200, answer.text
        page: dict[str, Any] = answer.json()
        return page

    def pages(self, **params: Any) -> list[dict[str, Any]]:
        """Return every page of a listing."""
        pages = [self.page(**params)]
        while "nextPageToken" in pages[-1]:
            pages.append(self.page(**params, pageToken=pages[-1]["nextPageToken"]))
        return pages

    def sync(self, **params: Any) -> tuple[list[dict[str, Any]], str]:
        """Return all items of a listing and its sync token."""
        pages = self.pages(**params)
        return [item for page in pages for item in page["items"]], pages[-1]["nextSyncToken"]

    def refused(self, status: int, **params: Any) -> str:
        """List events, expecting an error; return its reason."""
        answer = self.call("GET", self.events, **params)
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["code"] == status
        return reason(answer)

    def insert(self, **event: Any) -> dict[str, Any]:
        """Create an event at ten o'clock, or as given."""
        answer = self.call("POST", self.events, {**AT_TEN, **event})
        assert answer.status_code == 200, answer.text
        created: dict[str, Any] = answer.json()
        return created

    def patch(self, event_id: str, **change: Any) -> dict[str, Any]:
        """Change an event."""
        answer = self.call("PATCH", f"{self.events}/{event_id}", change)
        assert answer.status_code == 200, answer.text
        changed: dict[str, Any] = answer.json()
        return changed

    def delete(self, event_id: str) -> None:
        """Delete an event."""
        answer = self.call("DELETE", f"{self.events}/{event_id}")
        assert answer.status_code == 204, answer.text

    def get(self, event_id: str) -> dict[str, Any]:
        """Read an event."""
        answer = self.call("GET", f"{self.events}/{event_id}")
        assert answer.status_code == 200, answer.text
        event: dict[str, Any] = answer.json()
        return event


def reason(answer: httpx.Response) -> str:
    """Return the reason of an error answer."""
    return str(answer.json()["error"]["errors"][0]["reason"])


@pytest.fixture(scope="session")
def simulator_process() -> Iterator[Simulator]:
    """A simulator that lives as long as the worker."""
    with run_simulator(users=2, events=0) as simulator:
        yield simulator


@pytest.fixture
def simulator(simulator_process: Simulator) -> Simulator:
    """A world of two users with empty calendars, on a clock that stands still at 2026-06-01T00:00Z."""
    simulator_process.reset(clock="2026-06-01T00:00:00Z", frozen=True)
    return simulator_process


@pytest.fixture
def api(simulator: Simulator) -> Iterator[Api]:
    """The first user at her empty primary calendar."""
    with clients.client(trust_env=False, timeout=30) as http:
        yield Api(simulator, ANA, http)


@pytest.fixture
def ben(api: Api) -> Api:
    """The second user."""
    return Api(api.simulator, BEN, api.http)
