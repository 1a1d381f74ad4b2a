"""The simulated world: users, their calendar lists, calendars, and each calendar's event records and change order.

Records change only through `Calendar.commit`, `Calendar.forget` and `Calendar.purge`, which keep the version numbers
that sync tokens stand on. What a request may do to them is decided elsewhere.
"""

import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from devstack.google_calendar.clock import VirtualClock, stamp
from devstack.google_calendar.recurrence import occurrences
from devstack.google_calendar.resource import Resource, dumps
from devstack.google_calendar.settings import Settings
from devstack.google_calendar.times import resolve

DAY = 86_400.0
ROLES = ("none", "freeBusyReader", "reader", "writerWithoutPrivateAccess", "writer", "owner")
RANK = {role: rank for rank, role in enumerate(ROLES)}
_seq = attrgetter("seq")


@dataclass(slots=True)
class Extent:
    """The stretch of time an event covers; open ends are infinite."""

    begins: float
    ends: float


@dataclass(slots=True)
class Dropped:
    """An instance that expanded listings once showed and that its series no longer has."""

    version: int
    original_start: Resource | None


@dataclass(slots=True, eq=False)
class Record:
    """One stored event: a single event, a series, or an exception of a series; live or deleted."""

    body: Resource
    seq: int
    version: int = 0
    deleted_at: float | None = None
    bare: bool = False  # moved away: nothing but the id may be shown
    dropped: dict[str, Dropped] = field(default_factory=dict)
    past: list[Resource] = field(default_factory=list)
    _raw: bytes | None = None

    @property
    def id(self) -> str:
        """The event id, unique within its calendar only."""
        return str(self.body["id"])

    @property
    def series_id(self) -> str | None:
        """The id of the series this record is an exception of."""
        return self.body.get("recurringEventId")

    @property
    def recurring(self) -> bool:
        """Whether this is a series."""
        return bool(self.body.get("recurrence"))

    @property
    def cancelled(self) -> bool:
        """Whether this is a deleted event or a cancelled instance."""
        return bool(self.body["status"] == "cancelled")

    @property
    def raw(self) -> bytes:
        """The event as its owner sees it, serialised once per change."""
        if self._raw is None:
            self._raw = dumps(self.body)
        return self._raw

    def extent(self, calendar_zone: str, *, ever: bool = False) -> Extent:
        """Return the time covered now or, with `ever`, now or at any time before.

        A frozen timeMin/timeMax window must go on reporting an event that moves out of it, or the client would keep it.
        """
        if not ever:
            return _extent(self.body, calendar_zone)
        extents = [_extent(body, calendar_zone) for body in (self.body, *self.past)]
        if original := self.body.get("originalStartTime"):
            extents.append(_extent({"start": original, "end": original}, calendar_zone))
        return Extent(min(e.begins for e in extents), max(e.ends for e in extents))

    def replace(self, body: Resource, version: int) -> None:
        """Take over a new body under a new version; called by `Calendar.commit`."""
        if any(self.body.get(name) != body.get(name) for name in ("start", "end", "recurrence")):
            kept = ("id", "start", "end", "recurrence")
            self.past.append({name: self.body[name] for name in kept if name in self.body})
        self.body, self.version, self._raw = body, version, None


def _extent(body: Resource, calendar_zone: str) -> Extent:
    begins = resolve(body.get("start"), calendar_zone)
    ends = resolve(body.get("end"), calendar_zone)
    if begins is None:
        return Extent(float("-inf"), float("inf"))
    if body.get("recurrence"):
        text = " ".join(body["recurrence"]).upper()
        if "RRULE" in text and "UNTIL=" not in text and "COUNT=" not in text:
            return Extent(begins, float("inf"))
        last = max((o.ends for o in occurrences(body, calendar_zone)), default=begins)
        return Extent(begins, last)
    return Extent(begins, begins if ends is None else ends)


@dataclass(slots=True, eq=False)
class Calendar:
    """One calendar: its properties, who may see it, its records, and the order of their changes."""

    id: str
    number: int
    summary: str
    time_zone: str
    owner: str  # e-mail of the data owner; "" for calendars nobody owns, such as holidays
    created: float
    primary: bool = False
    push_supported: bool = True
    always_gone: bool = False  # answers 410 to every sync token
    description: str | None = None
    location: str | None = None
    note: str | None = None
    roles: dict[str, str] = field(default_factory=dict)  # user e-mail -> access role
    version: int = 0
    properties_version: int = 0
    epoch: int = 0
    updated: float = 0.0
    last_seq: int = 0
    next_purge: float = float("inf")
    records: dict[str, Record] = field(default_factory=dict)
    by_seq: list[Record] = field(default_factory=list)
    changes: dict[str, Record] = field(default_factory=dict)  # oldest change first
    exceptions: dict[str, dict[str, Record]] = field(default_factory=dict)  # series id -> its exceptions
    buried: dict[str, list[Resource]] = field(default_factory=dict)  # deleted series id -> the exceptions it had

    def commit(self, body: Resource, now: float, *, touch: bool = True, bare: bool = False) -> Record:
        """Store `body` (complete, with `id` and `status`) as the newest change of this calendar.

        Args:
            body: the event; `etag`, and `updated` if `touch`, are set here.
            now: virtual time of the change.
            touch: whether the change shows in `updated` (reminder changes do not).
            bare: whether nothing but the id may be shown from now on.
        """
        self.version += 1
        self.updated = now
        body["etag"] = f'"{self.number}{self.version * 2:015d}"'
        if touch:
            body["updated"] = stamp(now)
        record = self.records.get(body["id"])
        if record is None:
            self.last_seq += 1
            record = Record(body, self.last_seq, self.version)
            self.records[record.id] = record
            self.by_seq.append(record)
        else:
            self._note_dropped(record, body)
            record.replace(body, self.version)
        record.bare = bare
        if record.series_id:
            self.exceptions.setdefault(record.series_id, {})[record.id] = record
        self.changes.pop(record.id, None)
        self.changes[record.id] = record
        if record.cancelled:
            if record.deleted_at is None:
                record.deleted_at = now
                self.next_purge = min(self.next_purge, now)
        else:
            record.deleted_at = None
        return record

    def forget(self, record: Record) -> None:
        """Remove a record without a trace."""
        del self.records[record.id]
        del self.by_seq[bisect_left(self.by_seq, record.seq, key=_seq)]
        self.changes.pop(record.id, None)
        if record.series_id:
            self.exceptions.get(record.series_id, {}).pop(record.id, None)

    def purge(self, now: float, days: int) -> None:
        """Forget deletions older than `days`; sync tokens as old as that are no longer accepted either.

        Cancelled instances stay as long as their series lives.
        """
        if now - self.next_purge < days * DAY:
            return
        self.next_purge = float("inf")
        for record in list(self.by_seq):
            if record.deleted_at is None or self.of_live_series(record):
                continue
            if now - record.deleted_at >= days * DAY:
                self.buried.pop(record.id, None)
                self.forget(record)
            else:
                self.next_purge = min(self.next_purge, record.deleted_at)

    def of_live_series(self, record: Record) -> bool:
        """Whether the record is an exception of a series that still exists."""
        series = self.records.get(record.series_id or "")
        return series is not None and series.recurring and not series.cancelled

    def changed_since(self, version: int, upto: int) -> list[Record]:
        """Return the records whose last change lies in (version, upto], oldest change first."""
        found = []
        for record in reversed(self.changes.values()):
            if record.version <= version:
                break
            if record.version <= upto:
                found.append(record)
        found.reverse()
        return found

    def index_after(self, seq: int) -> int:
        """Return the index in `by_seq` of the first record created after number `seq`."""
        return bisect_right(self.by_seq, seq, key=_seq)

    def live(self) -> Iterator[Record]:
        """Yield every record that is not cancelled."""
        return (record for record in self.by_seq if not record.cancelled)

    def note_lost(self, series: Record, exceptions: list[Resource]) -> None:
        """Remember the exceptions a deleted series took along, for expanded listings, which name every instance.

        Those in a slot of the series are covered by its occurrences.
        """
        shown = self._shown(series.body) if exceptions else {}
        for exception in exceptions:
            if exception["id"] not in shown:
                series.dropped[exception["id"]] = Dropped(series.version, exception["originalStartTime"])

    def _note_dropped(self, record: Record, body: Resource) -> None:
        """Remember the instances an expanded listing has shown and will not show again."""
        if all(record.body.get(name) == body.get(name) for name in ("start", "recurrence")):
            return
        before, after = self._shown(record.body), self._shown(body)
        for shown in after:
            record.dropped.pop(shown, None)
        for shown, original in before.items():
            if shown not in after:
                record.dropped[shown] = Dropped(self.version, original)

    def _shown(self, body: Resource) -> dict[str, Resource | None]:
        """Return the ids (and original starts) an expanded listing shows for a record."""
        if not body.get("recurrence"):
            return {body["id"]: None}
        return {occurrence.id: occurrence.start for occurrence in occurrences(body, self.time_zone)}


@dataclass(slots=True)
class ListEntry:
    """A calendar on one user's list: what the user set about it, and when that last changed."""

    calendar: Calendar
    own: Resource = field(default_factory=dict)  # selected, hidden, colorId, summaryOverride, defaultReminders …
    role: str = "reader"  # the user's access role, kept for the entry's tombstone when access ends
    version: int = 0
    deleted: bool = False


@dataclass(slots=True, eq=False)
class User:
    """One Google account."""

    email: str
    number: int
    time_zone: str
    note: str | None = None
    entries: dict[str, ListEntry] = field(default_factory=dict)
    list_version: int = 0
    list_epoch: int = 0

    def commit_entry(self, entry: ListEntry) -> None:
        """Store an entry as the newest change of this user's calendar list."""
        self.list_version += 1
        entry.version = self.list_version
        self.entries.pop(entry.calendar.id, None)
        self.entries[entry.calendar.id] = entry


@dataclass(slots=True, eq=False)
class World:
    """Everything that exists, and the clock and randomness it lives by."""

    clock: VirtualClock
    settings: Settings
    random: random.Random
    incarnation: int  # tokens of another incarnation are answered with 410
    users: dict[str, User] = field(default_factory=dict)
    calendars: dict[str, Calendar] = field(default_factory=dict)
    calendar_numbers: dict[int, Calendar] = field(default_factory=dict)
    on_events_changed: Callable[[Calendar], None] = lambda _calendar: None
    on_list_changed: Callable[[User], None] = lambda _user: None

    def add_user(self, email: str, time_zone: str, note: str | None = None) -> User:
        """Create an account with its primary calendar, whose id is the e-mail address."""
        user = User(email, len(self.users) + 1, time_zone, note)
        self.users[email] = user
        self.add_calendar(email, email, time_zone, owner=user, primary=True)
        return user

    def add_calendar(
        self, calendar_id: str, summary: str, time_zone: str, *, owner: User | None, primary: bool = False
    ) -> Calendar:
        """Create a calendar and put it on its owner's list."""
        number = len(self.calendar_numbers) + 1
        now = self.clock.now()
        calendar = Calendar(
            calendar_id, number, summary, time_zone, owner.email if owner else "", now, primary, updated=now
        )
        self.calendars[calendar_id] = calendar
        self.calendar_numbers[number] = calendar
        if owner:
            self.share(calendar, owner, "owner")
        return calendar

    def share(self, calendar: Calendar, user: User, role: str) -> None:
        """Give `user` this role on the calendar ("none" takes access away) and keep the user's list in step.

        A role change is a read-only change of the list entry and so does not show in incremental list answers.
        """
        entry = user.entries.get(calendar.id)
        if role == "none":
            calendar.roles.pop(user.email, None)
            if entry and not entry.deleted:
                entry.deleted = True
                self.commit_entry(user, entry)
            return
        calendar.roles[user.email] = role
        if entry is None or entry.deleted:
            own = {"selected": True, "defaultReminders": [{"method": "popup", "minutes": 10}]}
            entry = ListEntry(calendar, own)
            self.commit_entry(user, entry)
        entry.role = role

    def commit_entry(self, user: User, entry: ListEntry) -> None:
        """Store a change of a user's calendar list and announce it."""
        user.commit_entry(entry)
        self.on_list_changed(user)

    def remove_calendar(self, calendar: Calendar) -> None:
        """Delete a calendar for everyone."""
        del self.calendars[calendar.id]
        for email in list(calendar.roles):
            self.share(calendar, self.users[email], "none")

    def commit(self, calendar: Calendar, body: Resource, *, touch: bool = True, bare: bool = False) -> Record:
        """Store an event change and announce it to the calendar's watchers."""
        record = calendar.commit(body, self.clock.now(), touch=touch, bare=bare)
        self.on_events_changed(calendar)
        return record

    def new_id(self) -> str:
        """Return a fresh event id: 26 characters of base32hex, as Google generates them."""
        return "".join(self.random.choices("0123456789abcdefghijklmnopqrstuv", k=26))
