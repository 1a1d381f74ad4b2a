"""A Google event as a row of Postgres.

Belongs here: reading one item of an `events.list` page, whatever is wrong with it, into typed columns.
Does not: SQL, paging, or any decision about what is already stored.

The rule: what Postgres cannot hold is replaced or left NULL and named in `flaws`; an item without a usable id,
or with a value of another JSON type than Google documents, is unreadable and goes to quarantine.
Source of the shapes: https://developers.google.com/workspace/calendar/api/v3/reference/events.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from typing import TypeVar
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

# Google documents 5 to 1024 characters of base32hex; ids made by other products before 2012 are shorter or use others.
# Counted in bytes: Postgres refuses rows of an index beyond 2704 (SQLSTATE 54000), and with them the whole page.
MAX_ID_BYTES = 1024
# Year 1 is how free/busy shares say "no date" (home-assistant/core issue 81721); datetime ends with year 9999.
FIRST_YEAR, LAST_YEAR = 2, 9998
MAX_BIGINT = 2**63 - 1
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
INSTANCE_ID = re.compile(r"(?P<master>.+)_(?P<date>\d{8})(?:T(?P<time>\d{6})Z)?")
FIXED_OFFSET = re.compile(r"(?:GMT|UTC)(?P<sign>[+-])(?P<hours>\d{1,2})(?::?(?P<minutes>\d{2}))?")

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
T = TypeVar("T")


class UnreadableEventError(Exception):
    """An item of a page cannot become a row; the text names the field, never its value."""


@dataclass(frozen=True, slots=True, repr=False)
class EventRow:
    """One event, as `sync.event_rows` holds it; times are instants in UTC, dates are zone-free."""

    event_id: str
    status: str | None
    is_tombstone: bool
    event_type: str | None
    summary: str | None
    description: str | None
    location: str | None
    start_at: datetime | None
    start_date: date | None
    start_zone: str | None
    end_at: datetime | None
    end_date: date | None
    end_zone: str | None
    recurrence: tuple[str, ...] | None
    recurring_event_id: str | None
    original_start_at: datetime | None
    original_start_date: date | None
    ical_uid: str | None
    organizer_email: str | None
    visibility: str | None
    transparency: str | None
    attendees_omitted: bool | None
    sequence: int | None
    created_at: datetime | None
    updated_at: datetime | None
    flaws: tuple[str, ...]
    raw: Mapping[str, Json]


@dataclass(frozen=True, slots=True, repr=False)
class UnreadableEvent:
    """An item for the quarantine."""

    event_id: str | None
    reason: str
    raw: str

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the raw text, which makes the same poison one row."""
        return hashlib.sha256(self.raw.encode()).digest()


@dataclass(frozen=True, slots=True, repr=False)
class EventBatch:
    """The items of one page, sorted out: at most one row per event id."""

    rows: tuple[EventRow, ...]
    unreadable: tuple[UnreadableEvent, ...]
    seen: int


def read_items(items: Iterable[Json]) -> EventBatch:
    """Sort the items of a page out.

    Args:
        items: what the page holds; nothing is assumed about them.

    Returns:
        Rows and quarantine. Of an id that appears twice the last item counts, because Google lists changes in order.
    """
    rows: dict[str, EventRow] = {}
    unreadable: list[UnreadableEvent] = []
    seen = 0
    for item in items:
        seen += 1
        try:
            row = read_event(item)
        except UnreadableEventError as error:
            event_id = item.get("id") if isinstance(item, dict) else None
            named = _replace(event_id)[:MAX_ID_BYTES] if isinstance(event_id, str) else None
            unreadable.append(UnreadableEvent(named, str(error), _replace(json.dumps(item, sort_keys=True))))
        else:
            rows[row.event_id] = row
    return EventBatch(tuple(rows.values()), tuple(unreadable), seen)


def read_event(item: Json) -> EventRow:
    """Read one item.

    Args:
        item: an event, a cancelled exception, or a tombstone, as parsed JSON.

    Returns:
        The row. A cancelled item that belongs to no series is a tombstone and keeps no details, as Google asks:
        "clients should remove the local copy".

    Raises:
        UnreadableEventError: it has no usable id, or a field is not of its documented type.
    """
    if not isinstance(item, dict):
        raise UnreadableEventError("the item is not an object")
    flaws: list[str] = []
    event = _storable(item, flaws)
    event_id = _id(event, "id")
    if not event_id:
        raise UnreadableEventError("id is missing")
    status = _text(event, "status")
    cancelled = status == "cancelled"
    recurring_event_id = _id(event, "recurringEventId")
    original_start = _time(event, "originalStartTime", "original_start", flaws)
    if cancelled and recurring_event_id is None:
        # Cancelled instances also come as bare {id, status} (compass pull request 2808); the id says the rest.
        recurring_event_id, original_start = _instance_of(event_id) or (None, original_start)
    is_tombstone = cancelled and recurring_event_id is None
    updated_at = _instant(_text(event, "updated"))
    if is_tombstone:
        event = {key: event[key] for key in ("id", "status", "iCalUID", "updated", "sequence") if key in event}
        flaws = []
    start = _time(event, "start", "start", flaws, required=not cancelled)
    end = _time(event, "end", "end", flaws, required=not cancelled)
    organizer = _object(event, "organizer")
    return EventRow(
        event_id=event_id,
        status=status,
        is_tombstone=is_tombstone,
        event_type=_text(event, "eventType"),
        summary=_text(event, "summary"),
        description=_text(event, "description"),
        location=_text(event, "location"),
        start_at=start.instant,
        start_date=start.day,
        start_zone=start.zone,
        end_at=end.instant,
        end_date=end.day,
        end_zone=end.zone,
        recurrence=_lines(event, "recurrence"),
        recurring_event_id=recurring_event_id,
        original_start_at=original_start.instant,
        original_start_date=original_start.day,
        ical_uid=_text(event, "iCalUID"),
        organizer_email=_text(organizer, "email"),
        visibility=_text(event, "visibility"),
        transparency=_text(event, "transparency"),
        attendees_omitted=_flag(event, "attendeesOmitted"),
        sequence=_count(event, "sequence"),
        created_at=_instant(_text(event, "created")),
        updated_at=updated_at,
        flaws=tuple(flaws),
        raw=event,
    )


@dataclass(frozen=True, slots=True)
class _Time:
    instant: datetime | None = None
    day: date | None = None
    zone: str | None = None


def _instance_of(event_id: str) -> tuple[str, _Time] | None:
    """Read master and original start from the id of an instance: `<master>_<YYYYMMDD>[T<HHMMSS>Z]`."""
    match = INSTANCE_ID.fullmatch(event_id)
    if match is None:
        return None
    try:
        if match["time"] is None:
            return match["master"], _Time(day=datetime.strptime(match["date"], "%Y%m%d").replace(tzinfo=UTC).date())
        instant = datetime.strptime(match["date"] + match["time"], "%Y%m%d%H%M%S").replace(tzinfo=UTC)
    except ValueError:
        return None
    return match["master"], _Time(instant=instant)


def _time(event: Mapping[str, Json], key: str, column: str, flaws: list[str], *, required: bool = False) -> _Time:
    given = _object(event, key)
    text, day, zone = _text(given, "dateTime"), _text(given, "date"), _text(given, "timeZone")
    if day is not None:
        parsed_day = _day(day)
        if parsed_day is None:
            flaws.append(f"{column}_unreadable")
        return _Time(day=parsed_day, zone=zone)
    if text is not None:
        instant = _instant(text, zone)
        if instant is None:
            flaws.append(f"{column}_unreadable")
        return _Time(instant=instant, zone=zone)
    if required:
        flaws.append(f"{column}_missing")
    return _Time(zone=zone)


def _day(text: str) -> date | None:
    try:
        day = date.fromisoformat(text)
    except ValueError:
        return None
    return day if FIRST_YEAR <= day.year <= LAST_YEAR else None


def _instant(text: str | None, zone: str | None = None) -> datetime | None:
    """Read an RFC 3339 time; without an offset it is a wall clock time of the zone."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            place = _zone(zone) if zone else None
            if place is None:
                return None
            moment = moment.replace(tzinfo=place)
        instant = moment.astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    return instant if FIRST_YEAR <= instant.year <= LAST_YEAR else None


def _zone(name: str) -> tzinfo | None:
    """Find a zone; "GMT-07:00" means seven hours behind, while Postgres would read that name the other way round."""
    match = FIXED_OFFSET.fullmatch(name)
    if match is not None:
        offset = timedelta(hours=int(match["hours"]), minutes=int(match["minutes"] or 0))
        return timezone(-offset if match["sign"] == "-" else offset) if offset < timedelta(hours=24) else None
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return None


def _storable(item: dict[str, Json], flaws: list[str]) -> dict[str, Json]:
    """Replace what a Postgres text cannot hold: NUL (SQLSTATE 22P05) and lone surrogates (22P02)."""
    try:
        text = json.dumps(item, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:
        pass
    except (ValueError, RecursionError):
        raise UnreadableEventError("the item holds NaN, Infinity or too deep nesting") from None
    else:
        if "\\u0000" not in text:
            return item
    clean = _map_texts(item, _replace)
    if clean != item:
        flaws.append("characters_replaced")
    return clean if isinstance(clean, dict) else item


def _replace(text: str) -> str:
    return UNSTORABLE.sub(REPLACEMENT, text)


def _map_texts(value: Json, change: Callable[[str], str]) -> Json:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_map_texts(element, change) for element in value]
    if isinstance(value, dict):
        return {change(key): _map_texts(element, change) for key, element in value.items()}
    return value


def _typed(source: Mapping[str, Json], key: str, kind: type[T], name: str) -> T | None:
    value = source.get(key)
    if value is None or isinstance(value, kind):
        return value
    raise UnreadableEventError(f"{key} is not {name}")


def _text(source: Mapping[str, Json], key: str) -> str | None:
    return _typed(source, key, str, "text")


def _id(source: Mapping[str, Json], key: str) -> str | None:
    value = _text(source, key)
    if value is not None and len(value.encode()) > MAX_ID_BYTES:
        raise UnreadableEventError(f"{key} is longer than {MAX_ID_BYTES} bytes")
    return value


def _flag(source: Mapping[str, Json], key: str) -> bool | None:
    return _typed(source, key, bool, "a boolean")


def _object(source: Mapping[str, Json], key: str) -> Mapping[str, Json]:
    return _typed(source, key, dict, "an object") or {}


def _count(source: Mapping[str, Json], key: str) -> int | None:
    value = _typed(source, key, int, "a whole number")
    if value is not None and (isinstance(value, bool) or abs(value) > MAX_BIGINT):
        raise UnreadableEventError(f"{key} is not a 64-bit number")
    return value


def _lines(source: Mapping[str, Json], key: str) -> tuple[str, ...] | None:
    value = _typed(source, key, list, "a list")
    if value is None:
        return None
    lines = tuple(line for line in value if isinstance(line, str))
    if len(lines) != len(value):
        raise UnreadableEventError(f"{key} is not a list of texts")
    return lines
