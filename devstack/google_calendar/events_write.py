"""events.get, insert, import, quickAdd, update, patch, delete and move: reading and changing one event.

What a valid event is, is in `validation`; listing in `events_list`, version keeping in `state`.
"""

import re
from base64 import urlsafe_b64encode
from datetime import UTC, datetime, timedelta
from typing import Final

from devstack.google_calendar import errors
from devstack.google_calendar.call import Call
from devstack.google_calendar.clock import stamp
from devstack.google_calendar.recurrence import Occurrence, occurrences
from devstack.google_calendar.resource import Resource, patched
from devstack.google_calendar.state import Calendar, Record, World
from devstack.google_calendar.times import render, zone
from devstack.google_calendar.validation import validate
from devstack.google_calendar.views import View, instance

_VALID_ID = re.compile(r"[a-v0-9]{5,1024}")
# Set by the server; what a client sends for them is ignored.
_READ_ONLY: Final = (
    "kind", "etag", "id", "created", "updated", "htmlLink", "creator", "organizer", "recurringEventId",
    "originalStartTime", "iCalUID", "hangoutLink", "locked", "privateCopy", "eventType",
)  # fmt: skip
_TIMES = ("start", "end", "recurrence")


def get_event(call: Call) -> Resource:
    """Answer events.get; deleted events are returned with status cancelled (discovery: Event.status)."""
    calendar, role = call.calendar()
    body, record = _find(calendar, call.path["eventId"])
    limit = call.text("maxAttendees")
    view = View(
        calendar, role, call.world.settings, call.user.email, show_deleted=True,
        max_attendees=int(limit) if limit and limit.isdecimal() else None, time_zone=call.text("timeZone"),
    )  # fmt: skip
    return view.resource(record) if record else view.shown(body)


def insert_event(call: Call) -> Resource:
    """Answer events.insert."""
    calendar, _ = call.calendar("writer")
    sent = call.resource()
    event_id = sent.get("id")
    if event_id is not None:
        if not isinstance(event_id, str) or not _VALID_ID.fullmatch(event_id):
            raise errors.invalid("Invalid resource id value.")
        if event_id in calendar.records:
            raise errors.duplicate()
    if sent.get("eventType") == "fromGmail":
        raise errors.bad_request("Events of type fromGmail cannot be created.")
    return _create(call, calendar, sent, event_id or call.world.new_id())


def import_event(call: Call) -> Resource:
    """Answer events.import: a private copy of an event organised elsewhere; the same iCalUID updates the copy."""
    calendar, _ = call.calendar("writer")
    sent = call.resource()
    uid = sent.get("iCalUID")
    if not uid:
        raise errors.required("Missing iCal UID.")
    for record in calendar.by_seq:
        if record.body.get("iCalUID") == uid and not record.series_id:
            organizer = sent.get("organizer", record.body["organizer"])
            return _store(call, calendar, record.body, _rewritten(record.body, sent) | {"organizer": organizer})
    organizer = sent.get("organizer")
    return _create(call, calendar, sent | {"eventType": "default"}, "_" + call.world.new_id(), organizer=organizer)


def quick_add(call: Call) -> Resource:
    """Answer events.quickAdd: an hour from now with the text as summary; no natural language is understood."""
    calendar, _ = call.calendar("writer")
    text = call.text("text")
    if text is None:
        raise errors.required("Required parameter: text", "text")
    begins = datetime.fromtimestamp(call.world.clock.now(), UTC)
    sent = {
        "summary": text,
        "start": {"dateTime": render(begins, calendar.time_zone)},
        "end": {"dateTime": render(begins + timedelta(hours=1), calendar.time_zone)},
    }
    return _create(call, calendar, sent, call.world.new_id())


def patch_event(call: Call) -> Resource:
    """Answer events.patch."""
    calendar, _ = call.calendar("writer")
    current, record = _find(calendar, call.path["eventId"])
    call.check_etag(current["etag"])
    change = {name: value for name, value in call.resource().items() if name not in _READ_ONLY}
    restored = change.get("status") in ("confirmed", "tentative") and not (record and record.bare)
    if current["status"] == "cancelled" and not restored:
        raise errors.deleted()
    return _change(call, calendar, record, current, patched(current, change))


def update_event(call: Call) -> Resource:
    """Answer events.update: the whole event is replaced, and restored if it was deleted."""
    calendar, _ = call.calendar("writer")
    current, record = _find(calendar, call.path["eventId"])
    call.check_etag(current["etag"])
    if record is not None and record.bare:
        raise errors.deleted()
    return _change(call, calendar, record, current, _rewritten(current, call.resource()))


def delete_event(call: Call) -> None:
    """Answer events.delete; deleting an instance leaves a cancelled exception."""
    calendar, _ = call.calendar("writer")
    current, _ = _find(calendar, call.path["eventId"])
    call.check_etag(current["etag"])
    if current["status"] == "cancelled":
        raise errors.deleted()
    _cancel(call.world, calendar, current)


def move_event(call: Call) -> Resource:
    """Answer events.move: the source keeps a cancelled event with nothing but its id."""
    source, _ = call.calendar("writer")
    destination = call.text("destination")
    if destination is None:
        raise errors.required("Required parameter: destination", "destination")
    target, _ = call.calendar("writer", destination)
    current, record = _find(source, call.path["eventId"])
    if current["status"] == "cancelled":
        raise errors.deleted()
    if record is None or record.series_id:
        raise errors.forbidden(
            "cannotChangeOrganizerOfInstance", "Cannot change the organizer of an instance.", "calendar"
        )
    if current.get("eventType", "default") != "default":
        raise errors.bad_request("Only events of type default can be moved.")
    if target is source:
        return current
    standing = target.records.get(record.id)
    if standing is not None and not standing.cancelled:
        raise errors.duplicate()
    moved = current | {"organizer": _organizer(target), "htmlLink": _link(record.id, target)}
    exceptions = list(source.exceptions.get(record.id, {}).values())
    _cancel(call.world, source, current, bare=True)
    stored = call.world.commit(target, moved).body
    for exception in exceptions:
        call.world.commit(target, exception.body | {"organizer": _organizer(target)})
    return stored


def clear_calendar(call: Call) -> None:
    """Answer calendars.clear: every event of a primary calendar is deleted."""
    calendar, _ = call.calendar("owner")
    if not calendar.primary:
        raise errors.bad_request("Only primary calendars can be cleared.")
    for record in [record for record in calendar.live() if not record.series_id]:
        _cancel(call.world, calendar, record.body)


def _find(calendar: Calendar, event_id: str) -> tuple[Resource, Record | None]:
    """Return an event and its record; an instance that is no exception yet has no record.

    Raises:
        ApiError: 404 if there is no such event.
    """
    record = calendar.records.get(event_id)
    if record is not None:
        return record.body, record
    series_id, _, suffix = event_id.rpartition("_")
    series = calendar.records.get(series_id)
    if series is None or not series.recurring or series.cancelled:
        raise errors.not_found()
    occurrence = _occurrence(series.body, suffix, calendar)
    if occurrence is None or occurrence.id != event_id:
        raise errors.not_found()
    return instance(series.body, occurrence), None


def _occurrence(series: Resource, suffix: str, calendar: Calendar) -> Occurrence | None:
    """Return the occurrence whose original start an instance id's suffix names."""
    try:
        if suffix.endswith("Z"):
            begins = datetime.strptime(suffix, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
        else:
            day = datetime.strptime(suffix, "%Y%m%d").replace(tzinfo=zone(calendar.time_zone) or UTC)
            begins = day.timestamp()
    except ValueError:
        return None
    window = occurrences(series, calendar.time_zone, after=begins - 1, before=begins + 1)
    return next((occurrence for occurrence in window if occurrence.begins == begins), None)


def _create(
    call: Call, calendar: Calendar, sent: Resource, event_id: str, *, organizer: Resource | None = None
) -> Resource:
    now = stamp(call.world.clock.now())
    own: Resource = {"email": call.user.email}
    if calendar.id == call.user.email:
        own["self"] = True
    body: Resource = {
        "kind": "calendar#event",
        "etag": "",
        "id": event_id,
        "status": "confirmed",
        "htmlLink": _link(event_id, calendar),
        "created": now,
        "updated": now,
    }
    body |= {name: value for name, value in patched({}, sent).items() if name not in _READ_ONLY}
    body |= {
        "creator": own,
        "organizer": organizer or _organizer(calendar),
        "iCalUID": sent.get("iCalUID") or f"{event_id}@google.com",
        "sequence": sent.get("sequence", 0),
        "eventType": sent.get("eventType", "default"),
    }
    body.setdefault("reminders", {"useDefault": True})
    validate(body, calendar)
    return call.world.commit(calendar, body).body


def _rewritten(current: Resource, sent: Resource) -> Resource:
    """Return the event as an update leaves it: what the client sent plus what the server owns."""
    defaults = {"status": "confirmed", "sequence": current.get("sequence", 0), "reminders": {"useDefault": True}}
    kept = {name: current[name] for name in _READ_ONLY if name in current}
    body = {name: value for name, value in patched({}, sent).items() if name not in _READ_ONLY}
    return defaults | body | kept


def _change(call: Call, calendar: Calendar, record: Record | None, current: Resource, body: Resource) -> Resource:
    if body["status"] == "cancelled":
        return _cancel(call.world, calendar, current)
    if record is None or record.series_id:
        body.pop("recurrence", None)
    return _store(call, calendar, current, body)


def _store(call: Call, calendar: Calendar, current: Resource, body: Resource) -> Resource:
    """Validate a changed event and commit it if anything differs; a restored series gets its exceptions back."""
    validate(body, calendar)
    changed = {name for name in {*current, *body} if current.get(name) != body.get(name)}
    if not changed and current["id"] in calendar.records:
        return current
    if changed.intersection(_TIMES):
        body["sequence"] = body.get("sequence", 0) + 1
    # Updating event reminders does not change `updated` (discovery: Event.updated).
    stored = call.world.commit(calendar, body, touch=changed != {"reminders"})
    for exception in calendar.buried.pop(stored.id, ()):
        call.world.commit(calendar, exception)
    if changed.intersection((*_TIMES, "status")):
        _cancel_orphans(call.world, calendar, stored)
    return stored.body


def _cancel(world: World, calendar: Calendar, current: Resource, *, bare: bool = False) -> Resource:
    """Mark an event deleted; a series takes its exceptions with it without mentioning them."""
    exceptions = list(calendar.exceptions.pop(current["id"], {}).values())
    for exception in exceptions:
        calendar.forget(exception)
    if exceptions and not bare:
        calendar.buried[current["id"]] = [exception.body for exception in exceptions]
    record = world.commit(calendar, current | {"status": "cancelled"}, bare=bare)
    calendar.note_lost(record, [exception.body for exception in exceptions])
    return record.body


def _cancel_orphans(world: World, calendar: Calendar, series: Record) -> None:
    """Cancel the exceptions whose original start the changed series no longer has."""
    exceptions = calendar.exceptions.get(series.id, {})
    for exception in list(exceptions.values()):
        suffix = exception.id.rpartition("_")[2]
        found = _occurrence(series.body, suffix, calendar) if series.recurring else None
        if not exception.cancelled and (found is None or found.id != exception.id):
            world.commit(calendar, exception.body | {"status": "cancelled"})


def _organizer(calendar: Calendar) -> Resource:
    organizer: Resource = {"email": calendar.id, "self": True}
    return organizer if calendar.primary else organizer | {"displayName": calendar.summary}


def _link(event_id: str, calendar: Calendar) -> str:
    key = urlsafe_b64encode(f"{event_id} {calendar.id}".encode()).decode().rstrip("=")
    return f"https://www.google.com/calendar/event?eid={key}"
