"""Whatever happens in Google and on the way, Postgres ends up equal to Google."""

import contextlib
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    multiple,
    rule,
    run_state_machine_as_test,
)

from devstack.google_calendar import Simulator, SimulatorError
from devstack.google_calendar.resource import Resource
from sync_pipeline import tick
from sync_pipeline.services import Services
from tests.sync_pipeline.conftest import Saas, differences
from tests.sync_pipeline.scenes import make_due

PAGE_FAULTS = [
    {"kind": "error", "status": 500},
    {"kind": "error", "status": 503},
    {"kind": "gone"},
    {"kind": "unauthorized"},
    {"kind": "not_found"},
    {"kind": "forbidden", "reason": "forbidden"},
    {"kind": "rate_limited", "reason": "userRateLimitExceeded", "status": 403},
    {"kind": "rate_limited", "reason": "rateLimitExceeded", "status": 429, "retry_after": 2},
    {"kind": "drop"},
    {"kind": "drop_body"},
    {"kind": "truncate"},
    {"kind": "html"},
    {"kind": "empty_page"},
    {"kind": "no_sync_token"},
    {"kind": "both_tokens"},
    {"kind": "repeat_page_token"},
    {"kind": "duplicate_event"},
    {"kind": "same_sync_token"},
]
TEXTS = st.sampled_from(["Stand-up", "Réunion 🎉", "פגישה", "", "x" * 3000, "NULL", "a\\u0000b", "tab\tand\nline"])
SHAPES: list[Resource] = [
    {
        "start": {"dateTime": "2026-03-02T10:00:00+01:00", "timeZone": "Europe/Berlin"},
        "end": {"dateTime": "2026-03-02T11:00:00+01:00", "timeZone": "Europe/Berlin"},
    },
    {"start": {"date": "2026-07-01"}, "end": {"date": "2026-07-04"}},
    {
        "start": {"dateTime": "2026-03-23T02:30:00+01:00", "timeZone": "Europe/Berlin"},
        "end": {"dateTime": "2026-03-23T03:00:00+01:00", "timeZone": "Europe/Berlin"},
        "recurrence": ["RRULE:FREQ=WEEKLY;COUNT=4"],
    },
    {"start": {"date": "2026-03-02"}, "end": {"date": "2026-03-03"}, "recurrence": ["RRULE:FREQ=DAILY;COUNT=3"]},
]
INSTANCES = {
    2: ["20260323T013000Z", "20260330T003000Z", "20260406T003000Z", "20260413T003000Z"],
    3: ["20260302", "20260303", "20260304"],
}


def machine(saas: Saas, google: Simulator, services: Services) -> type[RuleBasedStateMachine]:
    class Calendars(RuleBasedStateMachine):
        """Two calendars of one account, edited, broken and synced in any order."""

        events = Bundle("events")

        def __init__(self) -> None:
            super().__init__()
            self.number = 0

        @initialize(sparse=st.booleans(), tombstones=st.sampled_from(["auto", "full", "bare"]))
        def start(self, sparse: bool, tombstones: str) -> None:
            google.reset(users=0)
            google.clear_faults()
            google.configure(
                quota_project_per_minute=0, quota_user_per_minute=0, sparse_instances=sparse, tombstones=tombstones
            )
            user = google.add_user("ann@example.com")
            self.calendars = [*user.calendars, google.add_calendar("ann@example.com", "Second")]
            self.workspace = saas.workspace()
            saas.execute("UPDATE public.google_connections SET status = 'disconnected'")
            saas.connect(self.workspace, user)

        def edit(self, calendar: int, *edits: Resource) -> list[Resource | None]:
            with contextlib.suppress(SimulatorError):  # for example patching what was deleted
                return google.edit(self.calendars[calendar], edits)
            return []

        @rule(target=events, calendar=st.integers(0, 1), shape=st.integers(0, len(SHAPES) - 1), summary=TEXTS)
        def insert(self, calendar: int, shape: int, summary: str) -> object:
            made = self.edit(calendar, {"op": "insert", "event": {"summary": summary, **SHAPES[shape]}})
            return multiple(*((calendar, str(event["id"]), shape) for event in made if event))

        @rule(event=events, summary=TEXTS)
        def patch(self, event: tuple[int, str, int], summary: str) -> None:
            self.edit(event[0], {"op": "patch", "id": event[1], "event": {"summary": summary}})

        @rule(event=events, shape=st.integers(0, len(SHAPES) - 1))
        def reshape(self, event: tuple[int, str, int], shape: int) -> None:
            body = {"recurrence": None, **SHAPES[shape]}
            self.edit(event[0], {"op": "patch", "id": event[1], "event": body})

        @rule(event=events)
        def delete(self, event: tuple[int, str, int]) -> None:
            self.edit(event[0], {"op": "delete", "id": event[1]})

        @rule(event=events)
        def restore(self, event: tuple[int, str, int]) -> None:
            self.edit(event[0], {"op": "patch", "id": event[1], "event": {"status": "confirmed"}})

        @rule(target=events, event=consumes(events))
        def move(self, event: tuple[int, str, int]) -> tuple[int, str, int]:
            calendar, event_id, shape = event
            moved = self.edit(calendar, {"op": "move", "id": event_id, "destination": self.calendars[1 - calendar]})
            return (1 - calendar, event_id, shape) if moved else event

        @rule(event=events.filter(lambda event: event[2] in INSTANCES), which=st.integers(0, 3), summary=TEXTS)
        def change_instance(self, event: tuple[int, str, int], which: int, summary: str) -> None:
            body = {"summary": summary, **SHAPES[0]} if event[2] == 2 else {"summary": summary}
            self.edit(event[0], {"op": "patch", "id": instance(event, which), "event": body})

        @rule(event=events.filter(lambda event: event[2] in INSTANCES), which=st.integers(0, 3))
        def cancel_instance(self, event: tuple[int, str, int], which: int) -> None:
            self.edit(event[0], {"op": "delete", "id": instance(event, which)})

        @rule(event=events.filter(lambda event: event[2] in INSTANCES), which=st.integers(0, 3))
        def restore_instance(self, event: tuple[int, str, int], which: int) -> None:
            self.edit(event[0], {"op": "patch", "id": instance(event, which), "event": {"status": "confirmed"}})

        @rule(calendar=st.integers(0, 1))
        def invalidate_tokens(self, calendar: int) -> None:
            google.expire_sync_tokens(self.calendars[calendar])

        @rule()
        def expire_access_tokens(self) -> None:
            google.expire_access_tokens("ann@example.com")

        @rule(days=st.sampled_from([1, 31]))
        def time_passes(self, days: int) -> None:
            google.advance(days * 86400)

        @rule(
            fault=st.sampled_from(PAGE_FAULTS),
            page=st.sampled_from([None, 1, 2, 3]),
            times=st.integers(1, 5),
            after=st.integers(0, 3),
        )
        def break_something(self, fault: Resource, page: int | None, times: int, after: int) -> None:
            rule = {**fault, "method": "events.list", "times": times, "after": after}
            google.add_fault(**(rule if page is None else {**rule, "page": page}))

        @rule()
        def sync(self) -> None:
            self.number += 1
            tick.run_tick(services, run_id=f"{self.workspace.workspace_id}-{self.number}")

        def teardown(self) -> None:
            if not hasattr(self, "workspace"):
                return
            google.clear_faults()
            for _ in range(2):
                make_due(saas, self.workspace)
                self.sync()
            for calendar in self.calendars:
                assert differences(saas, self.workspace, calendar, google.truth(calendar)) == {}

    return Calendars


def instance(event: tuple[int, str, int], which: int) -> str:
    suffixes = INSTANCES[event[2]]
    return f"{event[1]}_{suffixes[which % len(suffixes)]}"


def run(examples: int, steps: int, saas: Saas, google: Simulator, services: Services) -> None:
    run_state_machine_as_test(
        machine(saas, google, services),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )


def test_after_any_edits_and_faults_two_good_ticks_make_postgres_equal_to_google(
    saas: Saas, google: Simulator, services: Services, pages_of: Callable[[int], None]
) -> None:
    pages_of(2)
    run(25, 25, saas, google, services)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_after_very_many_edits_and_faults_two_good_ticks_make_postgres_equal_to_google(
    saas: Saas, google: Simulator, services: Services, pages_of: Callable[[int], None]
) -> None:
    pages_of(2)
    run(400, 60, saas, google, services)
