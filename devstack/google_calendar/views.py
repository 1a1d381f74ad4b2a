"""What of a stored event a caller gets to see: tombstones, roles, attendee limits, instances, time zones."""

from dataclasses import dataclass

from devstack.google_calendar.recurrence import Occurrence
from devstack.google_calendar.resource import Resource, dumps
from devstack.google_calendar.settings import Settings, Tombstones
from devstack.google_calendar.state import RANK, Calendar, Record
from devstack.google_calendar.times import in_zone

_BARE = ("kind", "etag", "id", "status")
_INSTANCE = (*_BARE, "recurringEventId", "originalStartTime")
# A reader meets a private event as a nameless block of time.
_PRIVATE = (
    *_INSTANCE, "created", "updated", "start", "end", "endTimeUnspecified", "recurrence", "iCalUID", "sequence",
    "transparency", "visibility", "eventType",
)  # fmt: skip
_FREE_BUSY = (*_INSTANCE, "start", "end", "recurrence", "transparency")
_MOMENTS = ("start", "end", "originalStartTime")


@dataclass(frozen=True, slots=True)
class View:
    """How one request looks at one calendar's events."""

    calendar: Calendar
    role: str
    settings: Settings
    email: str
    show_deleted: bool = False
    max_attendees: int | None = None
    time_zone: str | None = None

    def raw(self, record: Record, occurrence: Occurrence | None = None) -> bytes:
        """Return the serialised event, or the given occurrence of a series."""
        if occurrence is None and self._plain and not record.cancelled:
            return record.raw
        return dumps(self.resource(record, occurrence))

    def resource(self, record: Record, occurrence: Occurrence | None = None) -> Resource:
        """Return the event, or the given occurrence of a series, as a listing shows it."""
        body = record.body if occurrence is None else instance(record.body, occurrence)
        if record.cancelled:
            body = self._tombstone(record, body)
        return self.shown(body)

    def shown(self, body: Resource) -> Resource:
        """Apply role, attendee limit and time zone to an event."""
        rank = RANK[self.role]
        if rank == RANK["freeBusyReader"]:
            body = _only(body, _FREE_BUSY)
        elif rank < RANK["writer"] and body.get("visibility") in ("private", "confidential"):
            body = _only(body, _PRIVATE)
        attendees = body.get("attendees")
        if self.max_attendees is not None and attendees and len(attendees) > self.max_attendees:
            own = [attendee for attendee in attendees if attendee.get("self") or attendee.get("email") == self.email]
            body = body | {"attendees": own, "attendeesOmitted": True}
        if self.time_zone:
            body = body | {name: in_zone(body[name], self.time_zone) for name in _MOMENTS if name in body}
        return body

    @property
    def _plain(self) -> bool:
        """Whether live events are shown exactly as stored."""
        return self.max_attendees is None and self.time_zone is None and RANK[self.role] >= RANK["writer"]

    def _tombstone(self, record: Record, body: Resource) -> Resource:
        mode = self.settings.tombstones
        if "recurringEventId" in body:
            if mode is Tombstones.FULL:
                return body
            return _only(body, _BARE if self.settings.sparse_instances else _INSTANCE)
        if record.bare or mode is Tombstones.BARE:
            return _only(body, _BARE)
        on_organizers_calendar = body.get("organizer", {}).get("self", False)
        if mode is Tombstones.FULL or (self.show_deleted and on_organizers_calendar):
            return body
        return _only(body, _BARE)


def instance(series: Resource, occurrence: Occurrence) -> Resource:
    """Return an occurrence as the event resource it is shown as."""
    body = {name: value for name, value in series.items() if name != "recurrence"}
    return body | {
        "id": occurrence.id,
        "recurringEventId": series["id"],
        "originalStartTime": occurrence.start,
        "start": occurrence.start,
        "end": occurrence.end,
    }


def dropped_instance(series: Record, instance_id: str, original_start: Resource | None) -> Resource:
    """Return the cancelled resource for an instance its series no longer has."""
    body: Resource = {"kind": "calendar#event", "etag": series.body["etag"], "id": instance_id, "status": "cancelled"}
    if original_start is not None:
        body |= {"recurringEventId": series.id, "originalStartTime": original_start}
    return body


def _only(body: Resource, names: tuple[str, ...]) -> Resource:
    return {name: body[name] for name in names if name in body}
