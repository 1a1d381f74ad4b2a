"""Property: whatever is edited, a client that follows the protocol ends with exactly what is there."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from devstack.google_calendar import Simulator
from tests.google_calendar.conftest import ANA, Api

_START = datetime(2026, 6, 1, 9, tzinfo=UTC)
_RULES = ("RRULE:FREQ=DAILY;COUNT=4", "RRULE:FREQ=DAILY;COUNT=2", "RRULE:FREQ=WEEKLY;COUNT=3")
_hours = st.integers(0, 72)


def _times(hour: int, *, all_day: bool = False) -> dict[str, Any]:
    begins = _START + timedelta(hours=hour)
    if all_day:
        return {
            "start": {"date": begins.date().isoformat()},
            "end": {"date": (begins + timedelta(1)).date().isoformat()},
        }
    ends = begins + timedelta(minutes=30)
    return {
        "start": {"dateTime": begins.isoformat(), "timeZone": "Europe/Berlin"},
        "end": {"dateTime": ends.isoformat(), "timeZone": "Europe/Berlin"},
    }


class Mirror:
    """A client from scratch: keeps a copy of a calendar by full and incremental listings only."""

    def __init__(self, api: Api, **params: str) -> None:
        self._api = api
        self._params = params
        self._token: str | None = None
        self.events: dict[str, dict[str, Any]] = {}

    def sync(self, page_size: int, *, between: Iterator[None] | None = None) -> None:
        """Bring the copy up to date; `between` runs a step after each page."""
        params: dict[str, Any] = {
            **self._params,
            "maxResults": page_size,
            **({"syncToken": self._token} if self._token else {}),
        }
        page: dict[str, Any] = {}
        while "nextSyncToken" not in page:
            answer = self._api.call(
                "GET", self._api.events, **params, **({"pageToken": page["nextPageToken"]} if page else {})
            )
            if answer.status_code == 410:
                self._token, self.events = None, {}
                self.sync(page_size)
                return
            page = answer.raise_for_status().json()
            for item in page["items"]:
                self._apply(item)
            if between is not None:
                next(between, None)
        self._token = page["nextSyncToken"]

    def _apply(self, item: dict[str, Any]) -> None:
        if item["status"] == "cancelled":
            self.events.pop(item["id"], None)
            # A deleted series takes its exceptions along; an expanded listing names every instance by itself.
            if "recurringEventId" not in item and "singleEvents" not in self._params:
                self.events = {k: v for k, v in self.events.items() if v.get("recurringEventId") != item["id"]}
        else:
            self.events[item["id"]] = item


class Convergence(RuleBasedStateMachine):
    """Random edits, deletions, moves, invalidations and syncs of two mirrors: plain and expanded."""

    simulator: Simulator
    http: httpx.Client

    @initialize()
    def fresh_world(self) -> None:
        """Start from two empty calendars."""
        self.simulator.reset(clock="2026-06-01T00:00:00Z", frozen=True)
        self.api = Api(self.simulator, ANA, self.http)
        self.other = self.simulator.add_calendar(ANA, "Other")
        self.plain = Mirror(self.api, showDeleted="true")
        self.expanded = Mirror(self.api, singleEvents="true")
        self.ids: list[str] = []

    def _edit(self, calendar: str, **edit: Any) -> None:
        """Carry out one edit; those that meet a deleted or missing event are refused, which is fine."""
        answer = self.http.post(f"{self.simulator.url}/_sim/calendars/{calendar}/edits", json={"edits": [edit]})
        assert answer.status_code in (200, 403, 404, 409, 410), answer.text
        for result in answer.json().get("results", []):
            if result and result["id"] not in self.ids:
                self.ids.append(result["id"])

    def _some_id(self, data: st.DataObject) -> str:
        """Return a live event or series, or an instance of one."""
        shown = self.api.page(singleEvents="true", maxResults=2500)["items"]
        series = dict.fromkeys(item["recurringEventId"] for item in shown if "recurringEventId" in item)
        live = [*series, *(item["id"] for item in shown)]
        return str(data.draw(st.sampled_from(live or self.ids)))

    @rule(hour=_hours, recurrence=st.none() | st.sampled_from(_RULES), all_day=st.booleans())
    def insert(self, hour: int, recurrence: str | None, all_day: bool) -> None:
        """Create a single event or a series."""
        self._edit(
            ANA,
            op="insert",
            event={**_times(hour, all_day=all_day), **({"recurrence": [recurrence]} if recurrence else {})},
        )

    @precondition(lambda self: self.ids)
    @rule(data=st.data(), text=st.text(max_size=5))
    def rename(self, data: st.DataObject, text: str) -> None:
        """Change a summary."""
        self._edit(ANA, op="patch", id=self._some_id(data), event={"summary": text})

    @precondition(lambda self: self.ids)
    @rule(data=st.data(), hour=_hours)
    def reschedule(self, data: st.DataObject, hour: int) -> None:
        """Move an event, a series or one instance in time."""
        event = {name: {"date": None, **moment} for name, moment in _times(hour).items()}
        self._edit(ANA, op="patch", id=self._some_id(data), event=event)

    @precondition(lambda self: self.ids)
    @rule(data=st.data(), recurrence=st.none() | st.sampled_from(_RULES))
    def repeat(self, data: st.DataObject, recurrence: str | None) -> None:
        """Make a series of a single event, shorten a series, or end it."""
        self._edit(ANA, op="patch", id=self._some_id(data), event={"recurrence": [recurrence] if recurrence else None})

    @precondition(lambda self: self.ids)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        """Delete an event, a series or one instance."""
        self._edit(ANA, op="delete", id=self._some_id(data))

    @precondition(lambda self: self.ids)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        """Undelete."""
        self._edit(ANA, op="patch", id=data.draw(st.sampled_from(self.ids)), event={"status": "confirmed"})

    @precondition(lambda self: self.ids)
    @rule(data=st.data(), back=st.booleans())
    def move(self, data: st.DataObject, back: bool) -> None:
        """Move an event to the other calendar, or back."""
        source, target = (self.other, ANA) if back else (ANA, self.other)
        self._edit(source, op="move", id=data.draw(st.sampled_from(self.ids)), destination=target)

    @rule(days=st.sampled_from([1, 1, 1, 10, 40, None]))
    def pass_time(self, days: int | None) -> None:
        """Let a day pass, rarely so many that deletions are forgotten; now and then invalidate every sync token."""
        if days is None:
            self.simulator.expire_sync_tokens(ANA)
        else:
            self.simulator.advance(days * 86_400)

    @rule(size=st.integers(1, 5), hour=_hours)
    def sync_while_changing(self, size: int, hour: int) -> None:
        """Sync with an edit after each page."""

        def changes() -> Iterator[None]:
            for count in range(3):
                self._edit(ANA, op="insert", event=_times(hour + count))
                if self.ids:
                    self._edit(ANA, op="delete", id=self.ids[(hour + count) % len(self.ids)])
                yield

        self.plain.sync(size, between=changes())

    @rule(size=st.integers(1, 5))
    def sync_plain(self, size: int) -> None:
        """Sync one mirror; the other falls behind."""
        self.plain.sync(size)

    @rule(size=st.integers(1, 5))
    def sync_expanded(self, size: int) -> None:
        """Sync the other mirror."""
        self.expanded.sync(size)

    def teardown(self) -> None:
        """Compare both mirrors with the truth."""
        if not hasattr(self, "api"):
            return
        self.plain.sync(2)
        self.expanded.sync(3)
        assert self.plain.events == self.simulator.truth(ANA).events
        fresh, _ = self.api.sync(singleEvents="true", maxResults=2500)
        assert self.expanded.events == {item["id"]: item for item in fresh}
        assert self.simulator.counts().drift == {}


@pytest.mark.parametrize(
    ("examples", "steps", "phases"),
    [
        # Shrinking a failure takes minutes; the long variant does it.
        pytest.param(120, 30, [Phase.generate], id="short"),
        pytest.param(1500, 50, list(Phase), id="long", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_any_sequence_of_edits_converges(
    simulator_process: Simulator, examples: int, steps: int, phases: list[Phase]
) -> None:
    with httpx.Client(trust_env=False, timeout=30) as http:
        machine = type("Machine", (Convergence,), {"simulator": simulator_process, "http": http})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples,
                phases=phases,
                stateful_step_count=steps,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                database=None,
                derandomize=Phase.shrink not in phases,  # the short variant is the same on every machine
            ),
        )
