"""A typed, synchronous client for the control plane, used by tests, seeders and demos."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from types import TracebackType
from typing import Self
from urllib.parse import quote

import httpx

from devstack.google_calendar.resource import Resource, dumps, loads_object


@dataclass(frozen=True, slots=True)
class SimulatedUser:
    """One account of the simulated world and the tokens to act for it."""

    email: str
    access_token: str = field(repr=False)
    refresh_token: str = field(repr=False)
    calendars: list[str]
    note: str | None = None
    calendar_notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SimulatedCalendar:
    """One calendar of the simulated world."""

    id: str
    owner: str  # e-mail, "" if nobody owns it
    time_zone: str
    events: int  # live events: single events, series and exceptions
    roles: dict[str, str]  # user e-mail -> access role
    note: str | None = None


@dataclass(frozen=True, slots=True)
class CountedCalls:
    """How often calls with these properties were answered."""

    method: str
    user: str
    calendar: str
    status: int
    page: int
    incremental: bool
    count: int


@dataclass(frozen=True, slots=True)
class Counts:
    """What the simulator has counted since the last reset."""

    total: int
    bytes: int
    calls: list[CountedCalls]
    drift: dict[str, int]  # kind of parameter drift -> how often

    def count(
        self,
        method: str | None = None,
        *,
        user: str | None = None,
        calendar: str | None = None,
        status: int | None = None,
        page: int | None = None,
        incremental: bool | None = None,
    ) -> int:
        """Return how many calls had all the given properties."""
        wanted = {
            "method": method, "user": user, "calendar": calendar, "status": status, "page": page,
            "incremental": incremental,
        }  # fmt: skip
        return sum(
            calls.count
            for calls in self.calls
            if all(value is None or getattr(calls, name) == value for name, value in wanted.items())
        )


@dataclass(frozen=True, slots=True)
class Truth:
    """What a calendar really contains."""

    version: int
    events: dict[str, Resource]  # every live event by id, as its owner sees it
    cancelled_instances: dict[str, Resource]  # cancelled instances of live series by id


class Simulator:
    """Controls one running simulator."""

    def __init__(self, description: Resource, *, pid: int | None = None) -> None:
        """Take over the JSON object a simulator prints when it starts, and its process id if known."""
        self.pid = pid
        self.url: str = description["url"]
        self.token_url: str = description["token_url"]
        self.users: list[SimulatedUser] = [SimulatedUser(**user) for user in description["users"]]
        self._http = httpx.Client(base_url=self.url, timeout=60.0, trust_env=False)

    @classmethod
    def at(cls, url: str) -> Self:
        """Connect to a simulator that runs already."""
        answer = httpx.get(f"{url}/_sim/world", timeout=60.0, trust_env=False)
        return cls(loads_object(answer.raise_for_status().content))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the simulator runs on."""
        self._http.close()

    def user(self, email: str) -> SimulatedUser:
        """Return a user by e-mail address."""
        return next(user for user in self.users if user.email == email)

    def reset(self, **options: object) -> None:
        """Build a new world: seed, profile, users, events, clock (RFC 3339), frozen, settings (a dict)."""
        description = self._call("POST", "reset", options)
        self.users = [SimulatedUser(**user) for user in description["users"]]

    def refresh(self) -> None:
        """Read users and their calendars again."""
        self.users = [SimulatedUser(**user) for user in self._call("GET", "world")["users"]]

    # Time

    def now(self) -> float:
        """Return virtual time in seconds since the epoch."""
        return float(self._call("GET", "clock")["now"])

    def advance(self, seconds: float) -> float:
        """Move virtual time on and return it."""
        return float(self._call("POST", "clock", {"advance": seconds})["now"])

    def set_clock(self, moment: datetime) -> float:
        """Jump to an aware datetime and return virtual time."""
        return float(self._call("POST", "clock", {"set": moment.isoformat()})["now"])

    def freeze(self, *, frozen: bool = True) -> None:
        """Let virtual time stand still, or run again."""
        self._call("POST", "clock", {"frozen": frozen})

    # Misbehaviour

    def configure(self, **settings: object) -> None:
        """Change fields of `Settings`."""
        self._call("PATCH", "settings", settings)

    def add_fault(self, kind: str, **rule: object) -> int:
        """Script a fault (fields of `faults.Rule`) and return its id."""
        return int(self._call("POST", "faults", {"kind": kind, **rule})["id"])

    def clear_faults(self, fault_id: int | None = None) -> None:
        """Lift one fault, or all."""
        self._call("DELETE", "faults" if fault_id is None else f"faults/{fault_id}")

    def faults(self) -> list[Resource]:
        """Return the rules in force with how often each matched (`seen`) and fired."""
        return list(self._call("GET", "faults")["rules"])

    def revoke(self, email: str) -> None:
        """Revoke a user's grant: refreshes answer invalid_grant, access tokens 401."""
        self._call("PATCH", f"users/{quote(email)}", {"revoked": True})

    def reinstate(self, email: str) -> None:
        """Make a revoked grant good again."""
        self._call("PATCH", f"users/{quote(email)}", {"revoked": False})

    def expire_access_tokens(self, email: str) -> None:
        """Expire a user's access tokens; the next refresh brings a new one."""
        self._call("PATCH", f"users/{quote(email)}", {"expire_access_tokens": True})

    def expire_list_tokens(self, email: str) -> None:
        """Invalidate the sync tokens of a user's calendar list."""
        self._call("PATCH", f"users/{quote(email)}", {"expire_sync_tokens": True})

    def expire_sync_tokens(self, calendar_id: str) -> None:
        """Invalidate every sync token of a calendar: the next use answers 410."""
        self._calendar("PATCH", calendar_id, {"expire_sync_tokens": True})

    def set_always_gone(self, calendar_id: str, *, gone: bool = True) -> None:
        """Let a calendar answer 410 to every sync token."""
        self._calendar("PATCH", calendar_id, {"always_gone": gone})

    # The world

    def add_user(self, email: str, time_zone: str = "UTC") -> SimulatedUser:
        """Create an account with an empty primary calendar."""
        user = SimulatedUser(**self._call("POST", "users", {"email": email, "time_zone": time_zone}))
        self.users.append(user)
        return user

    def add_calendar(self, owner: str | None, summary: str = "Calendar", **properties: object) -> str:
        """Create a calendar (properties: id, time_zone, push_supported, always_gone) and return its id."""
        body = {"owner": owner, "summary": summary, **properties}
        return str(self._call("POST", "calendars", body)["id"])

    def calendars(self) -> list[SimulatedCalendar]:
        """Return every calendar with its number of live events."""
        return [SimulatedCalendar(**calendar) for calendar in self._call("GET", "calendars")["calendars"]]

    def remove_calendar(self, calendar_id: str) -> None:
        """Delete a calendar for everyone."""
        self._calendar("DELETE", calendar_id)

    def rename(self, calendar_id: str, summary: str) -> None:
        """Rename a calendar; clients learn of it only from full listings."""
        self._calendar("PATCH", calendar_id, {"summary": summary})

    def share(self, calendar_id: str, email: str, role: str) -> None:
        """Give a user an access role on a calendar; "none" takes access away."""
        self._calendar("PATCH", calendar_id, {"share": {"email": email, "role": role}})

    def edit(self, calendar_id: str, edits: Iterable[Resource]) -> list[Resource | None]:
        """Edit events as the calendar's owner, uncounted: [{"op": "insert", "event": {…}}, {"op": "delete", "id": …}].

        Operations: insert, import, patch, update (with `event`), delete, move (with `destination`).
        """
        return list(self._calendar("POST", calendar_id, {"edits": list(edits)}, "/edits")["results"])

    def put_raw(self, calendar_id: str, events: Iterable[Resource]) -> list[str]:
        """Store events exactly as given, unchecked, and return their ids."""
        return list(self._calendar("POST", calendar_id, {"events": list(events)}, "/raw")["ids"])

    def truth(self, calendar_id: str) -> Truth:
        """Return what a calendar really contains."""
        answer = self._calendar("GET", calendar_id, None, "/truth")
        return Truth(
            answer["version"],
            {event["id"]: event for event in answer["events"]},
            {event["id"]: event for event in answer["cancelled_instances"]},
        )

    # Observation

    def counts(self) -> Counts:
        """Return what was counted since the last reset."""
        answer = self._call("GET", "counters")
        drift: dict[str, int] = {}
        for row in answer["drift"]:
            drift[row["kind"]] = drift.get(row["kind"], 0) + row["count"]
        return Counts(answer["total"], answer["bytes"], [CountedCalls(**row) for row in answer["calls"]], drift)

    def reset_counts(self) -> None:
        """Start counting anew."""
        self._call("DELETE", "counters")

    def recent_calls(self) -> list[Resource]:
        """Return the last 200 calls, newest last."""
        return list(self._call("GET", "calls")["calls"])

    def channels(self) -> list[Resource]:
        """Return the push channels in force."""
        return list(self._call("GET", "push")["channels"])

    def settle_pushes(self) -> dict[str, int]:
        """Wait until no push message is on its way; return the delivery outcomes so far."""
        return dict(self._call("POST", "settle")["outcomes"])

    def _calendar(self, method: str, calendar_id: str, body: Resource | None = None, rest: str = "") -> Resource:
        return self._call(method, f"calendars/{quote(calendar_id, safe='')}{rest}", body)

    def _call(self, method: str, path: str, body: Resource | None = None) -> Resource:
        content = None if body is None else dumps(body)
        answer = self._http.request(method, f"/_sim/{path}", content=content)
        if answer.is_error:
            raise SimulatorError(answer.text)
        return loads_object(answer.content)


class SimulatorError(RuntimeError):
    """The simulator refused a control request; the message is its answer."""
