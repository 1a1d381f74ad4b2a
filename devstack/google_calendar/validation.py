"""What a valid event is: the types of its fields, its moments and its recurrence, with the real API's messages."""

from datetime import date, datetime
from typing import TypeAlias

from devstack.google_calendar import errors, recurrence
from devstack.google_calendar.resource import Resource
from devstack.google_calendar.state import Calendar
from devstack.google_calendar.times import in_zone, parse_rfc3339, resolve, zone

_STATUSES = frozenset({"confirmed", "tentative", "cancelled"})
_EVENT_TYPES = frozenset({"birthday", "default", "focusTime", "fromGmail", "outOfOffice", "workingLocation"})

# A type, a list of one shape, or an object whose named fields ("*": all fields) have shapes.
_Shape: TypeAlias = type | list["_Shape"] | dict[str, "_Shape"] | None
_PERSON: _Shape = {"email": str, "displayName": str, "self": bool}
# The fields of the discovery document's Event that this simulator reads; any others are stored as they come.
_SHAPES: dict[str, _Shape] = {
    "status": str,
    "eventType": str,
    "summary": str,
    "description": str,
    "location": str,
    "visibility": str,
    "transparency": str,
    "iCalUID": str,
    "sequence": int,
    "recurrence": [str],
    "attendees": [_PERSON],
    "organizer": _PERSON,
    "reminders": {"useDefault": bool, "overrides": [{"method": str, "minutes": int}]},
    "extendedProperties": {"private": {"*": str}, "shared": {"*": str}},
    "workingLocationProperties": {
        "officeLocation": {"buildingId": str, "deskId": str, "label": str},
        "customLocation": {"label": str},
    },
}


def validate(body: Resource, calendar: Calendar) -> None:
    """Check an event as the API does and express its moments at the calendar's offset.

    Raises:
        ApiError: 400 naming what is wrong.
    """
    for name, shape in _SHAPES.items():
        if name in body and not _fits(body[name], shape):
            raise errors.invalid(f"Invalid value for: {name}")
    if body["status"] not in _STATUSES:
        raise errors.invalid(f"Invalid value for: {body['status']} is not a valid value")
    if body.get("eventType", "default") not in _EVENT_TYPES:
        raise errors.invalid(f"Invalid value for: {body['eventType']} is not a valid value")
    for name in ("start", "end"):
        moment = body.get(name)
        if not isinstance(moment, dict) or not (moment.get("date") or moment.get("dateTime")):
            raise errors.required(f"Missing {name} time.")
        body[name] = _checked_moment(name, moment, calendar, recurring=bool(body.get("recurrence")))
    if ("date" in body["start"]) != ("date" in body["end"]):
        raise errors.invalid("Start and end times must either both be date or both be dateTime.")
    begins, ends = (resolve(body[name], calendar.time_zone) for name in ("start", "end"))
    if begins is not None and ends is not None and ends < begins:
        raise errors.time_range_empty()
    if body.get("recurrence"):
        try:
            recurrence.check(body, calendar.time_zone)
        except (ValueError, TypeError):
            raise errors.invalid("Invalid recurrence rule.") from None


def _fits(value: object, shape: _Shape) -> bool:
    """Whether a value has a shape."""
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(item, shape[0]) for item in value)
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return False
        every = shape.get("*")
        return all(_fits(part, shape.get(name, every)) for name, part in value.items() if name in shape or every)
    return shape is None or isinstance(value, shape)


def _checked_moment(name: str, moment: Resource, calendar: Calendar, *, recurring: bool) -> Resource:
    zone_name = moment.get("timeZone")
    if zone_name is not None and zone(zone_name) is None:
        raise errors.invalid(f"Invalid time zone definition for {name} time.")
    if moment.get("date") and moment.get("dateTime"):
        raise errors.invalid(f"Invalid {name} time.")
    try:
        if moment.get("date"):
            return {"date": date.fromisoformat(moment["date"]).isoformat()}
        if zone_name is None:
            parse_rfc3339(moment["dateTime"])
        else:
            datetime.fromisoformat(moment["dateTime"])
    except (ValueError, TypeError):
        raise errors.invalid(f"Invalid value for: {name} time") from None
    if recurring and zone_name is None:
        raise errors.required(f"Missing time zone definition for {name} time.")
    return in_zone({key: value for key, value in moment.items() if key != "date"}, calendar.time_zone)
