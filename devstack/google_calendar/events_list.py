"""events.list and events.instances: parameters, sync and page tokens, selection, order, pages.

The rules are those of the discovery document's events.list and of guides/sync. How a single event is rendered is in
`views`, how a series is expanded in `recurrence`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import TypeAlias

from devstack.google_calendar import errors
from devstack.google_calendar.call import Call, ListPage, boolean
from devstack.google_calendar.clock import stamp
from devstack.google_calendar.cursors import Cursor, begin, next_page_token, next_sync_token
from devstack.google_calendar.recurrence import Occurrence, occurrences
from devstack.google_calendar.resource import Resource, dumps
from devstack.google_calendar.state import DAY, Calendar, Dropped, Record
from devstack.google_calendar.times import parse_rfc3339, resolve, zone
from devstack.google_calendar.tokens import Params
from devstack.google_calendar.views import View, dropped_instance

DEFAULT_PAGE, MAX_PAGE = 250, 2500  # discovery: events.list.maxResults

# Must be the same in every request of a sync (discovery: events.list.syncToken); page size and `fields` may differ.
_FINGERPRINT = frozenset(
    {"singleEvents", "showDeleted", "eventTypes", "maxAttendees", "timeZone", "showHiddenInvitations"}
)
# Must not accompany a sync token.
_RESTRICTIONS = frozenset(
    {"iCalUID", "orderBy", "privateExtendedProperty", "q", "sharedExtendedProperty", "timeMin", "timeMax", "updatedMin"}
)
_FROZEN = _RESTRICTIONS - {"orderBy", "updatedMin"}
_BOOLEANS = frozenset({"singleEvents", "showDeleted", "showHiddenInvitations"})

# What a page is made of: the position after it, the record, and for expanded series the occurrence or lost instance.
Entry: TypeAlias = tuple[int | str, Record, Occurrence | tuple[str, Dropped] | None]


@dataclass(frozen=True, slots=True)
class Query:
    """The parameters that decide which events are listed, parsed."""

    single_events: bool = False
    show_deleted: bool = False
    event_types: frozenset[str] = frozenset()
    max_attendees: int | None = None
    time_zone: str | None = None
    time_min: float | None = None
    time_max: float | None = None
    updated_min: float | None = None
    order_by: str | None = None
    text: str | None = None
    ical_uid: str | None = None
    private: tuple[tuple[str, str], ...] = ()
    shared: tuple[tuple[str, str], ...] = ()

    @property
    def filters(self) -> bool:
        """Whether anything but deletedness decides about an event."""
        return bool(
            self.event_types
            or self.time_min is not None
            or self.time_max is not None
            or self.updated_min is not None
            or self.text
            or self.ical_uid
            or self.private
            or self.shared
        )


def list_events(call: Call) -> ListPage:
    """Answer events.list."""
    calendar, role = call.calendar()
    world = call.world
    calendar.purge(world.clock.now(), world.settings.tombstone_days)
    params = _params(call)
    if call.text("syncToken") and (any(map(call.text, _RESTRICTIONS)) or call.flag("showDeleted") is False):
        raise errors.sync_token_restrictions()
    cursor = begin(
        call,
        collection=f"e{calendar.number}",
        role=role,
        epoch=calendar.epoch,
        version=calendar.version,
        last_seq=calendar.last_seq,
        params=params,
        fingerprint=_FINGERPRINT,
        always_gone=calendar.always_gone,
    )
    query = parse(_effective(cursor, params))
    if query.updated_min is not None and query.updated_min < world.clock.now() - world.settings.updated_min_days * DAY:
        raise errors.updated_min_too_long_ago()
    view = _view(call, calendar, role, query)
    page = _head(call, calendar, role, query)
    if cursor.stuck:
        page.next_sync_token = call.text("syncToken")
        return page
    entries = _select(calendar, query, cursor)
    _fill(call, page, entries, view, cursor)
    return page


def list_instances(call: Call) -> ListPage:
    """Answer events.instances: the occurrences of one series with its exceptions laid over them."""
    calendar, role = call.calendar()
    series = calendar.records.get(call.path["eventId"])
    if series is None:
        raise errors.not_found()
    query = parse(_params(call))
    view = _view(call, calendar, role, query)
    page = _head(call, calendar, role, query)
    cursor = begin(
        call,
        collection=f"i{calendar.number}",
        role=role,
        epoch=calendar.epoch,
        version=calendar.version,
        last_seq=calendar.last_seq,
        params=(*_params(call), ("eventId", series.id)),
        fingerprint=_FINGERPRINT,
    )
    records = [series, *calendar.exceptions.get(series.id, {}).values()] if series.recurring else []
    entries = _ordered(_expanded(calendar, records, query, cursor), query, cursor)
    if original := call.text("originalStart"):
        wanted = resolve({"dateTime": original} if "T" in original else {"date": original}, calendar.time_zone)
        entries = [entry for entry in entries if _original_start(entry, calendar.time_zone) == wanted]
    _fill(call, page, entries, view, cursor)
    page.next_sync_token = None
    return page


@lru_cache(maxsize=4096)
def parse(params: Params) -> Query:
    """Parse the selecting parameters of a listing.

    Raises:
        ApiError: 400 if one cannot be read or contradicts another.
    """
    values: dict[str, list[str]] = {}
    for name, value in params:
        values.setdefault(name, []).append(value)
    last = {name: texts[-1] for name, texts in values.items()}
    max_attendees = last.get("maxAttendees")
    if max_attendees is not None and (not max_attendees.isdecimal() or int(max_attendees) < 1):
        raise errors.invalid_parameter("maxAttendees", max_attendees, "integer")
    time_zone = last.get("timeZone")
    if time_zone is not None and zone(time_zone) is None:
        raise errors.invalid(f"Invalid time zone definition: {time_zone}", "timeZone")
    query = Query(
        single_events="singleEvents" in last,
        show_deleted="showDeleted" in last,
        event_types=frozenset(values.get("eventTypes", ())),
        max_attendees=int(max_attendees) if max_attendees else None,
        time_zone=time_zone,
        time_min=_moment("timeMin", last),
        time_max=_moment("timeMax", last),
        updated_min=_moment("updatedMin", last),
        order_by=last.get("orderBy"),
        text=last.get("q", "").casefold() or None,
        ical_uid=last.get("iCalUID"),
        private=tuple(_property("privateExtendedProperty", text) for text in values.get("privateExtendedProperty", ())),
        shared=tuple(_property("sharedExtendedProperty", text) for text in values.get("sharedExtendedProperty", ())),
    )
    if query.time_min is not None and query.time_max is not None and query.time_min >= query.time_max:
        raise errors.time_range_empty()
    if query.order_by not in (None, "startTime", "updated"):
        raise errors.invalid_parameter("orderBy", str(query.order_by), "string")
    if query.order_by == "startTime" and not query.single_events:
        raise errors.bad_request("The requested ordering is not available for the particular query.")
    return query


def _params(call: Call) -> Params:
    """Return the selecting parameters in one canonical form; false is the default and drops out."""
    found = []
    for name, values in call.query.items():
        if name in _BOOLEANS:
            if boolean(name, values[-1]):
                found.append((name, "true"))
        elif name in _FINGERPRINT or name in _RESTRICTIONS:
            found.extend((name, value) for value in values if value)
    found.sort()
    return tuple(found)


def _effective(cursor: Cursor, params: Params) -> Params:
    """Return the parameters that select: an incremental listing keeps the filters of its initial one."""
    if cursor.base_version < 0:
        return params
    return tuple(sorted({*params, *((name, value) for name, value in cursor.frozen if name in _FROZEN)}))


def _moment(name: str, values: dict[str, str]) -> float | None:
    if name not in values:
        return None
    try:
        # Milliseconds may be provided but are ignored (discovery).
        return float(int(parse_rfc3339(values[name])))
    except ValueError:
        raise errors.bad_request(f"Bad Request: {name} must be an RFC3339 timestamp with a time zone offset.") from None


def _property(parameter: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise errors.invalid(f"Invalid extended property constraint: {text}", parameter)
    return name, value


def _view(call: Call, calendar: Calendar, role: str, query: Query) -> View:
    return View(
        calendar,
        role,
        call.world.settings,
        call.user.email,
        show_deleted=query.show_deleted,
        max_attendees=query.max_attendees,
        time_zone=query.time_zone,
    )


def _head(call: Call, calendar: Calendar, role: str, query: Query) -> ListPage:
    entry = call.user.entries.get(calendar.id)
    head: Resource = {
        "kind": "calendar#events",
        "etag": f'"p{calendar.number}v{calendar.version}c{calendar.properties_version}"',
        "summary": calendar.summary,
        "updated": stamp(calendar.updated),
        "timeZone": query.time_zone or calendar.time_zone,
        "accessRole": role,
        "defaultReminders": entry.own.get("defaultReminders", []) if entry else [],
    }
    if calendar.description is not None:
        head["description"] = calendar.description
    return ListPage(head, [])


def _fill(call: Call, page: ListPage, entries: Iterable[Entry], view: View, cursor: Cursor) -> None:
    """Take one page from the entries and set the token that leads on."""
    limit = call.limit(DEFAULT_PAGE, MAX_PAGE)
    position = cursor.position
    more = limit == 0  # a fault's empty page leads on even when nothing is left
    for entry in islice(entries, limit + 1):
        if len(page.items) == limit:
            more = True
            break
        position = entry[0]
        page.items.append(_render(entry, view))
    if more:
        page.next_page_token = next_page_token(call, cursor, position)
    else:
        page.next_sync_token = next_sync_token(call, cursor)


def _render(entry: Entry, view: View) -> bytes:
    _, record, part = entry
    if isinstance(part, tuple):
        instance_id, dropped = part
        return dumps(dropped_instance(record, instance_id, dropped.original_start))
    return view.raw(record, part)


def _select(calendar: Calendar, query: Query, cursor: Cursor) -> Iterable[Entry]:
    """Return the entries after the cursor's position, in listing order."""
    incremental = cursor.base_version >= 0
    if query.single_events or query.order_by:
        if incremental:
            records = calendar.changed_since(cursor.base_version, cursor.snapshot_version)
        else:
            records = [record for record in calendar.by_seq if record.seq <= cursor.snapshot_seq]
        listed = _expanded if query.single_events else _plain
        return _ordered(listed(calendar, records, query, cursor), query, cursor)
    position = cursor.position if isinstance(cursor.position, int) else 0
    if incremental:
        records = calendar.changed_since(max(cursor.base_version, position), cursor.snapshot_version)
        return ((record.version, record, None) for _, record, _ in _plain(calendar, records, query, cursor))
    return _plain(calendar, _created_after(calendar, position, cursor.snapshot_seq), query, cursor)


def _created_after(calendar: Calendar, position: int, snapshot_seq: int) -> Iterator[Record]:
    for index in range(calendar.index_after(position), len(calendar.by_seq)):
        record = calendar.by_seq[index]
        if record.seq > snapshot_seq:
            return
        yield record


def _plain(calendar: Calendar, records: Iterable[Record], query: Query, cursor: Cursor) -> Iterator[Entry]:
    """Yield the records that a listing without expansion shows."""
    incremental = cursor.base_version >= 0
    for record in records:
        # Cancelled instances belong to the description of their series and are always listed (discovery).
        told = incremental or query.show_deleted or _deleted_since(record, query) or calendar.of_live_series(record)
        if record.cancelled and not told:
            continue
        if not query.filters or _matches(record, query, calendar, ever=incremental):
            yield record.seq, record, None


def _expanded(calendar: Calendar, records: Iterable[Record], query: Query, cursor: Cursor) -> Iterator[Entry]:
    """Yield single events, exceptions and the other occurrences of series, unordered."""
    incremental = cursor.base_version >= 0
    timeless = replace(query, time_min=None, time_max=None)  # each occurrence is held against the window by itself
    for record in records:
        deleted_too = incremental or query.show_deleted or _deleted_since(record, query)
        if incremental:
            yield from _lost(calendar, record, cursor)
        if record.cancelled and not deleted_too:
            continue
        if not record.recurring:
            if not query.filters or _matches(record, query, calendar, ever=incremental):
                yield 0, record, None
            continue
        if query.filters and not _matches(record, timeless, calendar, ever=False):
            continue
        exceptions = calendar.exceptions.get(record.id, {})
        for occurrence in occurrences(record.body, calendar.time_zone, after=query.time_min, before=query.time_max):
            if occurrence.id not in exceptions:
                yield 0, record, occurrence


def _lost(calendar: Calendar, record: Record, cursor: Cursor) -> Iterator[Entry]:
    """Yield the instances a changed series had at the sync token and has no longer."""
    for instance_id, dropped in record.dropped.items():
        lost = cursor.base_version < dropped.version <= cursor.snapshot_version
        if lost and instance_id not in calendar.exceptions.get(record.id, {}):
            yield 0, record, (instance_id, dropped)


def _ordered(entries: Iterable[Entry], query: Query, cursor: Cursor) -> list[Entry]:
    """Sort entries by start time or modification time and cut off what was served before."""
    keyed = sorted(((_sort_key(entry, query), entry[1], entry[2]) for entry in entries), key=lambda entry: entry[0])
    after = cursor.position if isinstance(cursor.position, str) else ""
    return [entry for entry in keyed if entry[0] > after]


def _sort_key(entry: Entry, query: Query) -> str:
    _, record, part = entry
    if isinstance(part, tuple):
        return f"0|{part[0]}"
    event_id = part.id if part else record.id
    if query.order_by == "updated":
        return f"{record.body['updated']}|{event_id}"
    begins = part.begins if part else record.extent("UTC").begins
    # Shifted so that text order is time order from the year 1 on.
    return f"{max(begins, -6.3e10) + 6.3e10:017.3f}|{event_id}"


def _deleted_since(record: Record, query: Query) -> bool:
    """Whether updatedMin brings this deletion in regardless of showDeleted (discovery)."""
    return query.updated_min is not None and record.deleted_at is not None and record.deleted_at >= query.updated_min


def _original_start(entry: Entry, calendar_zone: str) -> float | None:
    _, record, part = entry
    if isinstance(part, Occurrence):
        return part.begins
    return resolve(record.body.get("originalStartTime"), calendar_zone)


def _matches(record: Record, query: Query, calendar: Calendar, *, ever: bool) -> bool:
    """Whether an event passes the filters; `ever`: its former times count too."""
    body = record.body
    if query.event_types and body.get("eventType", "default") not in query.event_types:
        return False
    if query.ical_uid and body.get("iCalUID") != query.ical_uid:
        return False
    if query.updated_min is not None and parse_rfc3339(body["updated"]) < query.updated_min:
        return False
    if query.time_min is not None or query.time_max is not None:
        extent = record.extent(calendar.time_zone, ever=ever)
        if query.time_min is not None and extent.ends <= query.time_min:
            return False
        if query.time_max is not None and extent.begins >= query.time_max:
            return False
    extended = body.get("extendedProperties", {})
    if any(extended.get("private", {}).get(name) != value for name, value in query.private):
        return False
    if any(extended.get("shared", {}).get(name) != value for name, value in query.shared):
        return False
    return query.text is None or all(term in _searchable(body) for term in query.text.split())


def _searchable(body: Resource) -> str:
    """Return the text `q` searches (discovery: events.list.q)."""
    people = [*body.get("attendees", ()), body.get("organizer", {})]
    place = body.get("workingLocationProperties", {})
    office = place.get("officeLocation", {})
    words = [
        *(body.get(name) for name in ("summary", "description", "location")),
        *(person.get(name) for person in people for name in ("displayName", "email")),
        *(office.get(name) for name in ("buildingId", "deskId", "label")),
        place.get("customLocation", {}).get("label"),
    ]
    return " ".join(word for word in words if word).casefold()
