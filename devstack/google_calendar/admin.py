"""The control plane under /_sim/: what tests and demos do to the simulated world, as JSON over HTTP.

Nothing here exists at Google, is counted, or costs quota. `control.Simulator` is the typed client for it.
"""

from collections.abc import Awaitable, Callable
from dataclasses import fields, replace
from datetime import datetime
from enum import StrEnum
from typing import Protocol, TypeAlias
from urllib.parse import unquote

from devstack.google_calendar import errors, events_write
from devstack.google_calendar.call import Call
from devstack.google_calendar.faults import Kind, Rule
from devstack.google_calendar.http import Request, Response, json_response
from devstack.google_calendar.resource import Resource, loads_object
from devstack.google_calendar.routes import Handler
from devstack.google_calendar.settings import Settings
from devstack.google_calendar.simulation import Options, Simulation
from devstack.google_calendar.state import RANK, Calendar, User
from devstack.google_calendar.times import parse_rfc3339
from devstack.google_calendar.world import Profile


class Host(Protocol):
    """What the control plane needs of the server."""

    options: Options
    simulation: Simulation

    async def reset(self, options: Options) -> None:
        """Replace the simulation."""


class ControlError(Exception):
    """A control request that cannot be carried out; the message says why."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


_Action: TypeAlias = Callable[[Host, list[str], Resource], Awaitable[Resource]]
_EDITS: dict[str, Handler] = {
    "insert": events_write.insert_event,
    "import": events_write.import_event,
    "patch": events_write.patch_event,
    "update": events_write.update_event,
    "delete": events_write.delete_event,
    "move": events_write.move_event,
}


async def administer(host: Host, request: Request) -> Response:
    """Answer one control request."""
    segments = [unquote(segment) for segment in request.path.removeprefix("/_sim/").split("/")]
    shape = "/".join("*" if index == 1 else part for index, part in enumerate(segments))
    action = _ACTIONS.get((request.method, shape))
    if action is None:
        return json_response({"error": f"There is no control {request.method} {request.path}."}, 404)
    try:
        answer = await action(host, segments[1:2], loads_object(request.body))
    except ControlError as error:
        return json_response({"error": str(error)}, error.status)
    except errors.ApiError as error:
        return Response(error.status, error.body())
    except (ValueError, TypeError, KeyError) as error:
        return json_response({"error": f"The control request cannot be read: {error!r}"}, 400)
    return json_response(answer)


async def _world(host: Host, _path: list[str], _body: Resource) -> Resource:
    return host.simulation.describe()


async def _reset(host: Host, _path: list[str], body: Resource) -> Resource:
    """Build a new world from the options the server was started with, changed as the request says."""
    start = host.options
    settings = configured(start.settings, body.get("settings", {}))
    clock = body.get("clock")
    options = Options(
        seed=int(body.get("seed", start.seed)),
        profile=Profile(body.get("profile", start.profile)),
        users=int(body.get("users", start.users)),
        events=int(body.get("events", start.events)),
        clock=datetime.fromisoformat(clock) if clock else start.clock,
        frozen=bool(body.get("frozen", start.frozen)),
        settings=settings,
    )
    await host.reset(options)
    return host.simulation.describe()


async def _get_clock(host: Host, _path: list[str], _body: Resource) -> Resource:
    return host.simulation.describe_clock()


async def _set_clock(host: Host, _path: list[str], body: Resource) -> Resource:
    clock = host.simulation.clock
    if "set" in body:
        clock.set(parse_rfc3339(body["set"]))
    if "advance" in body:
        clock.advance(float(body["advance"]))
    if "frozen" in body:
        (clock.freeze if body["frozen"] else clock.run)()
    return host.simulation.describe_clock()


async def _settings(host: Host, _path: list[str], body: Resource) -> Resource:
    settings = host.simulation.settings
    changed = configured(settings, body)
    for item in fields(settings):
        setattr(settings, item.name, getattr(changed, item.name))
    return {item.name: getattr(settings, item.name) for item in fields(settings)}


async def _faults(host: Host, _path: list[str], _body: Resource) -> Resource:
    return {"rules": host.simulation.faults.rules}


async def _add_fault(host: Host, _path: list[str], body: Resource) -> Resource:
    known = {item.name for item in fields(Rule)} - {"id", "seen", "fired"}
    if unknown := set(body) - known:
        raise ControlError(f"A fault has no field {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}.")
    try:
        kind = Kind(body.get("kind", ""))
    except ValueError:
        raise ControlError(f"There is no fault kind {body.get('kind')!r}; there are {', '.join(Kind)}.") from None
    rule = Rule(**{**body, "kind": kind})
    return {"id": host.simulation.faults.add(rule)}


async def _clear_faults(host: Host, path: list[str], _body: Resource) -> Resource:
    host.simulation.faults.remove(int(path[0]) if path else None)
    return {}


async def _counters(host: Host, _path: list[str], _body: Resource) -> Resource:
    return host.simulation.counters.report()


async def _reset_counters(host: Host, _path: list[str], _body: Resource) -> Resource:
    host.simulation.counters.reset()
    return {}


async def _calls(host: Host, _path: list[str], _body: Resource) -> Resource:
    return {"calls": host.simulation.counters.recent()}


async def _push(host: Host, _path: list[str], _body: Resource) -> Resource:
    return host.simulation.push.report()


async def _settle(host: Host, _path: list[str], _body: Resource) -> Resource:
    await host.simulation.push.settle()
    return host.simulation.push.report()


async def _add_user(host: Host, _path: list[str], body: Resource) -> Resource:
    simulation = host.simulation
    email = str(body["email"])
    if email in simulation.world.users:
        raise ControlError(f"There already is a user {email}.", 409)
    user = simulation.world.add_user(email, body.get("time_zone", "UTC"))
    simulation.connect(user)
    return simulation.describe_user(user)


async def _user_action(host: Host, path: list[str], body: Resource) -> Resource:
    """Revoke or reinstate a user's grants, expire access tokens, invalidate the calendar list's sync tokens."""
    simulation = host.simulation
    user = _user(simulation, path[0])
    if "revoked" in body:
        simulation.grants.set_revoked(user.email, revoked=bool(body["revoked"]))
    if body.get("expire_access_tokens"):
        simulation.grants.expire_access(user.email)
    if body.get("expire_sync_tokens"):
        user.list_epoch += 1
    return simulation.describe_user(user)


async def _add_calendar(host: Host, _path: list[str], body: Resource) -> Resource:
    world = host.simulation.world
    owner = _user(host.simulation, str(body["owner"])) if body.get("owner") else None
    calendar_id = body.get("id") or f"c_{world.new_id()}@group.calendar.google.com"
    if calendar_id in world.calendars:
        raise ControlError(f"There already is a calendar {calendar_id}.", 409)
    calendar = world.add_calendar(
        calendar_id, body.get("summary", "Calendar"), body.get("time_zone", "UTC"), owner=owner
    )
    _configure(calendar, body)
    return {"id": calendar.id}


async def _calendar_action(host: Host, path: list[str], body: Resource) -> Resource:
    """Change a calendar behind its clients' backs: properties, role of a user, validity of its sync tokens."""
    simulation = host.simulation
    calendar = _calendar(simulation, path[0])
    if body.get("expire_sync_tokens"):
        calendar.epoch += 1
    if "share" in body:
        role = str(body["share"]["role"])
        if role not in RANK:
            raise ControlError(f"There is no access role {role}; there are {', '.join(RANK)}.")
        simulation.world.share(calendar, _user(simulation, body["share"]["email"]), role)
    _configure(calendar, body)
    return {"id": calendar.id}


async def _calendars(host: Host, _path: list[str], _body: Resource) -> Resource:
    return {
        "calendars": [
            {
                "id": calendar.id,
                "owner": calendar.owner,
                "time_zone": calendar.time_zone,
                "events": sum(1 for _ in calendar.live()),
                "roles": calendar.roles,
                "note": calendar.note,
            }
            for calendar in host.simulation.world.calendars.values()
        ]
    }


async def _remove_calendar(host: Host, path: list[str], _body: Resource) -> Resource:
    host.simulation.world.remove_calendar(_calendar(host.simulation, path[0]))
    return {}


async def _truth(host: Host, path: list[str], _body: Resource) -> Resource:
    """Return every live event of a calendar as its owner sees it, and the cancelled instances of live series."""
    calendar = _calendar(host.simulation, path[0])
    cancelled = [
        {name: record.body[name] for name in ("id", "recurringEventId", "originalStartTime")}
        for exceptions in calendar.exceptions.values()
        for record in exceptions.values()
        if record.cancelled and calendar.of_live_series(record)
    ]
    events = [record.body for record in calendar.live()]
    return {"version": calendar.version, "events": events, "cancelled_instances": cancelled}


async def _edit(host: Host, path: list[str], body: Resource) -> Resource:
    """Carry out event edits as the calendar's owner would, uncounted and free of quota."""
    simulation = host.simulation
    calendar = _calendar(simulation, path[0])
    if not calendar.owner:
        raise ControlError(f"Nobody owns {calendar.id}; use raw events to change it.")
    owner = simulation.world.users[calendar.owner]
    results: list[Resource | None] = []
    for edit in body["edits"]:
        handler = _EDITS.get(edit.get("op", ""))
        if handler is None:
            raise ControlError(f"There is no edit {edit.get('op')!r}; there are {', '.join(_EDITS)}.")
        call = Call(
            simulation.world,
            owner,
            f"events.{edit['op']}",
            {"calendarId": calendar.id, "eventId": edit.get("id", "")},
            {"destination": [edit["destination"]]} if "destination" in edit else {},
            {},
            sent=edit.get("event", {}),
        )
        result = handler(call)
        results.append(result if isinstance(result, dict) else None)
    return {"results": results}


async def _put_raw(host: Host, path: list[str], body: Resource) -> Resource:
    """Store events exactly as given, unchecked: how nasty values get into a calendar."""
    world = host.simulation.world
    calendar = _calendar(host.simulation, path[0])
    ids = []
    for event in body["events"]:
        given: Resource = {"kind": "calendar#event", "id": world.new_id(), "status": "confirmed"} | event
        ids.append(world.commit(calendar, given).id)
    return {"ids": ids}


def configured(settings: Settings, values: Resource) -> Settings:
    """Return a copy of `settings` with `values` (by field name) taken over.

    Raises:
        ControlError: if there is no such setting or the value is of the wrong type.
    """
    known = {item.name: type(getattr(settings, item.name)) for item in fields(settings)}
    converted: Resource = {}
    for name, value in values.items():
        if name not in known:
            raise ControlError(f"There is no setting {name}; there are {', '.join(known)}.")
        kind = known[name]
        if issubclass(kind, StrEnum):
            try:
                converted[name] = kind(value)
            except ValueError:
                raise ControlError(f"The setting {name} is one of {', '.join(kind)}.") from None
        elif isinstance(value, kind) or (kind is float and isinstance(value, int)):
            converted[name] = kind(value)
        else:
            raise ControlError(f"The setting {name} takes a {kind.__name__}.")
    return replace(settings, **converted)


def _configure(calendar: Calendar, body: Resource) -> None:
    if "always_gone" in body:
        calendar.always_gone = bool(body["always_gone"])
    if "push_supported" in body:
        calendar.push_supported = bool(body["push_supported"])
    if "summary" in body and body["summary"] != calendar.summary:
        calendar.summary = str(body["summary"])
        calendar.properties_version += 1


def _user(simulation: Simulation, email: str) -> User:
    if email not in simulation.world.users:
        raise ControlError(f"There is no user {email}.", 404)
    return simulation.world.users[email]


def _calendar(simulation: Simulation, calendar_id: str) -> Calendar:
    if calendar_id not in simulation.world.calendars:
        raise ControlError(f"There is no calendar {calendar_id}.", 404)
    return simulation.world.calendars[calendar_id]


_ACTIONS: dict[tuple[str, str], _Action] = {
    ("GET", "world"): _world,
    ("POST", "reset"): _reset,
    ("GET", "clock"): _get_clock,
    ("POST", "clock"): _set_clock,
    ("PATCH", "settings"): _settings,
    ("GET", "faults"): _faults,
    ("POST", "faults"): _add_fault,
    ("DELETE", "faults"): _clear_faults,
    ("DELETE", "faults/*"): _clear_faults,
    ("GET", "counters"): _counters,
    ("DELETE", "counters"): _reset_counters,
    ("GET", "calls"): _calls,
    ("GET", "push"): _push,
    ("POST", "settle"): _settle,
    ("POST", "users"): _add_user,
    ("PATCH", "users/*"): _user_action,
    ("GET", "calendars"): _calendars,
    ("POST", "calendars"): _add_calendar,
    ("PATCH", "calendars/*"): _calendar_action,
    ("DELETE", "calendars/*"): _remove_calendar,
    ("GET", "calendars/*/truth"): _truth,
    ("POST", "calendars/*/edits"): _edit,
    ("POST", "calendars/*/raw"): _put_raw,
}
