"""calendars.* and colors.get: calendars themselves rather than their events."""

from devstack.google_calendar import errors
from devstack.google_calendar.call import Call
from devstack.google_calendar.resource import Resource, patched
from devstack.google_calendar.state import Calendar
from devstack.google_calendar.times import zone

# The first entries of the real palette; clients only look ids up in it.
_COLORS: Resource = {
    "kind": "calendar#colors",
    "updated": "2012-02-14T00:00:00.000Z",
    "calendar": {
        "1": {"background": "#ac725e", "foreground": "#1d1d1d"},
        "14": {"background": "#9fe1e7", "foreground": "#1d1d1d"},
    },
    "event": {
        "1": {"background": "#a4bdfc", "foreground": "#1d1d1d"},
        "11": {"background": "#dc2127", "foreground": "#1d1d1d"},
    },
}


def get_calendar(call: Call) -> Resource:
    """Answer calendars.get."""
    calendar, _ = call.calendar()
    return _shown(calendar)


def insert_calendar(call: Call) -> Resource:
    """Answer calendars.insert: a new secondary calendar owned by the caller."""
    sent = call.resource()
    if not sent.get("summary"):
        raise errors.required("Missing summary.")
    calendar_id = f"c_{call.world.new_id()}@group.calendar.google.com"
    calendar = call.world.add_calendar(
        calendar_id, sent["summary"], _zone_name(sent.get("timeZone", "UTC")), owner=call.user
    )
    calendar.description, calendar.location = sent.get("description"), sent.get("location")
    return _shown(calendar)


def patch_calendar(call: Call) -> Resource:
    """Answer calendars.patch; neither watchers nor sync tokens learn of it."""
    calendar, _ = call.calendar("owner")
    call.check_etag(_etag(calendar))
    return _store(calendar, patched(_shown(calendar), call.resource()))


def update_calendar(call: Call) -> Resource:
    """Answer calendars.update."""
    calendar, _ = call.calendar("owner")
    call.check_etag(_etag(calendar))
    return _store(calendar, {"summary": calendar.summary, "timeZone": calendar.time_zone} | call.resource())


def delete_calendar(call: Call) -> None:
    """Answer calendars.delete: the calendar and its events are gone for everyone."""
    calendar, _ = call.calendar("owner")
    if calendar.primary:
        raise errors.forbidden("cannotDeletePrimaryCalendar", "A primary calendar cannot be deleted.", "calendar")
    call.world.remove_calendar(calendar)


def get_colors(_call: Call) -> Resource:
    """Answer colors.get."""
    return _COLORS


def _store(calendar: Calendar, body: Resource) -> Resource:
    calendar.summary = str(body.get("summary", ""))
    calendar.description, calendar.location = body.get("description"), body.get("location")
    calendar.time_zone = _zone_name(body.get("timeZone", calendar.time_zone))
    calendar.properties_version += 1
    return _shown(calendar)


def _zone_name(name: str) -> str:
    if zone(name) is None:
        raise errors.invalid("Invalid time zone definition.")
    return name


def _etag(calendar: Calendar) -> str:
    return f'"c{calendar.number}p{calendar.properties_version}"'


def _shown(calendar: Calendar) -> Resource:
    body: Resource = {
        "kind": "calendar#calendar",
        "etag": _etag(calendar),
        "id": calendar.id,
        "summary": calendar.summary,
        "timeZone": calendar.time_zone,
        "conferenceProperties": {"allowedConferenceSolutionTypes": ["hangoutsMeet"]},
    }
    optional = {"description": calendar.description, "location": calendar.location}
    if not calendar.primary and calendar.owner:
        optional["dataOwner"] = calendar.owner
    return body | {name: value for name, value in optional.items() if value is not None}
