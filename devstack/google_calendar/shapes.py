"""What seeded events look like: meetings, series with exceptions, all-day and typed events, and nasty values."""

import random
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta

from devstack.google_calendar.clock import stamp
from devstack.google_calendar.recurrence import occurrences
from devstack.google_calendar.resource import Resource
from devstack.google_calendar.state import DAY, Calendar
from devstack.google_calendar.times import render
from devstack.google_calendar.views import instance

_SUMMARIES = (
    "1:1", "Standup", "Sprint planning", "Retro", "Interview: backend", "Dentist", "Lunch with Ana", "Board call",
    "Quarterly review 📈", "買い物", "Zahnarzt – bitte pünktlich", "اجتماع الفريق", "פגישת צוות", "Déjeuner d'équipe",
    "👩‍👩‍👧‍👦 school pickup", "Встреча", "Focus", "Demo day", "Budget <draft> & plan", "Call \"Acme\", Inc.",
)  # fmt: skip
_PLACES = ("Room 4.12", "Zoom", "Café Central, Wien", "東京オフィス 3F", "https://meet.example.com/abc-defg-hij")
_PARAGRAPH = (
    "<p>Agenda: <b>status</b>, <i>risks</i> &amp; next — see <a href='https://example.com/doc'>the doc</a>.</p>"
)
_RULES = (
    ("RRULE:FREQ=WEEKLY;BYDAY={day}", 4),
    ("RRULE:FREQ=WEEKLY;INTERVAL=2;BYDAY={day}", 2),
    ("RRULE:FREQ=DAILY;COUNT=30", 1),
    ("RRULE:FREQ=WEEKLY;BYDAY=MO,TU,WE,TH,FR;UNTIL=20261231T235959Z", 1),
    ("RRULE:FREQ=MONTHLY;BYDAY=1{day}", 2),
)
_DAYS = ("MO", "TU", "WE", "TH", "FR", "SA", "SU")
_KINDS = (
    ("meeting", 62), ("all_day", 8), ("multi_day", 4), ("series", 12), ("all_day_series", 2), ("typed", 6),
    ("busy", 3), ("long", 3),
)  # fmt: skip


class Shapes:
    """Fills calendars with realistic events, repeatably for one source of randomness."""

    def __init__(self, rng: random.Random, new_id: Callable[[], str], anchor: float) -> None:
        """Place events from 18 months before to 12 months after `anchor` (epoch seconds)."""
        self._random = rng
        self._new_id = new_id
        self._anchor = datetime.fromtimestamp(anchor, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        self._kinds = [kind for kind, weight in _KINDS for _ in range(weight)]
        self._rules = [rule for rule, weight in _RULES for _ in range(weight)]

    def fill(self, calendar: Calendar, count: int, *, cancelled_instances: bool = True) -> None:
        """Add exactly `count` live events (series and exceptions each count), plus cancelled instances if wanted."""
        bodies: list[Resource] = []
        live = 0
        while live < count:
            for body in self._event(calendar, room=count - live, cancelled_instances=cancelled_instances):
                live += body["status"] != "cancelled"
                bodies.append(body)
        for body in bodies:
            changed = self._anchor.timestamp() - self._random.random() * 200 * DAY
            body["created"] = stamp(changed - 7 * DAY)
            calendar.commit(body, changed)

    def fill_holidays(self, calendar: Calendar) -> None:
        """Add a holiday calendar's all-day events, which nobody attends and Google organises."""
        for name, month, day in (("Neujahr", 1, 1), ("Tag der Arbeit", 5, 1), ("1. Weihnachtstag", 12, 25)):
            for year in range(2024, 2028):
                first = date(year, month, day)
                body = self._body(calendar, name) | {
                    "start": {"date": first.isoformat()},
                    "end": {"date": (first + timedelta(days=1)).isoformat()},
                    "transparency": "transparent",
                    "visibility": "public",
                    "created": stamp(self._anchor.timestamp()),
                }
                calendar.commit(body, self._anchor.timestamp())

    def _event(self, calendar: Calendar, room: int, *, cancelled_instances: bool) -> Iterator[Resource]:
        kind = self._random.choice(self._kinds)
        body = self._body(calendar, self._random.choice(_SUMMARIES))
        match kind:
            case "series" | "all_day_series":
                body |= self._days(1) if kind == "all_day_series" else self._hours(calendar)
                yield from self._series(calendar, body, room, cancelled_instances=cancelled_instances)
                return
            case "all_day":
                body |= self._days(1)
            case "multi_day":
                body |= self._days(self._random.randint(2, 14))
            case "typed":
                body |= self._typed(calendar)
            case "busy":
                del body["summary"]
                body |= self._hours(calendar) | {"visibility": "private"}
            case "long":
                body |= self._hours(calendar) | {"description": _PARAGRAPH * self._random.randint(20, 80)}
            case _:
                body |= self._hours(calendar) | self._people(calendar)
        yield body

    def _series(
        self, calendar: Calendar, body: Resource, room: int, *, cancelled_instances: bool
    ) -> Iterator[Resource]:
        """Yield a series that starts as `body` does, and moved and cancelled instances of it."""
        all_day = "date" in body["start"]
        first = date.fromisoformat((body["start"].get("date") or body["start"]["dateTime"])[:10])
        rule = "RRULE:FREQ=YEARLY" if all_day else self._random.choice(self._rules)
        body["recurrence"] = [rule.format(day=_DAYS[first.weekday()])]
        yield body
        chosen = list(occurrences(body, calendar.time_zone, limit=12))
        self._random.shuffle(chosen)
        for occurrence in chosen[: min(self._random.choice((0, 0, 1, 2, 3)), room - 1)]:
            exception = instance(body, occurrence) | {"sequence": 1}
            if cancelled_instances and self._random.random() < 0.5:
                yield exception | {"status": "cancelled"}
            elif all_day:
                yield exception | {"summary": "Moved: " + body["summary"]} | self._days(1)
            else:
                yield exception | self._hours(calendar)

    def _body(self, calendar: Calendar, summary: str) -> Resource:
        event_id = self._new_id()
        organizer: Resource = {"email": calendar.id, "self": True}
        return {
            "kind": "calendar#event",
            "etag": "",
            "id": event_id,
            "status": "confirmed" if self._random.random() < 0.95 else "tentative",
            "htmlLink": f"https://www.google.com/calendar/event?eid={event_id}",
            "created": "",
            "updated": "",
            "summary": summary,
            "creator": {"email": calendar.owner or calendar.id},
            "organizer": organizer if calendar.primary else organizer | {"displayName": calendar.summary},
            "iCalUID": f"{event_id}@google.com",
            "sequence": 0,
            "reminders": {"useDefault": True},
            "eventType": "default",
        }

    def _hours(self, calendar: Calendar) -> Resource:
        """Return start and end of a timed event, sometimes in another zone than the calendar's."""
        minutes = self._random.choice((15, 30, 30, 45, 60, 60, 90, 120, 0))
        days, quarters = self._random.randint(-540, 365), self._random.randint(24, 80)
        begins = self._anchor + timedelta(days=days, minutes=15 * quarters)
        zone_name = calendar.time_zone if self._random.random() < 0.9 else "America/Chicago"
        return {
            "start": {"dateTime": render(begins, calendar.time_zone), "timeZone": zone_name},
            "end": {"dateTime": render(begins + timedelta(minutes=minutes), calendar.time_zone), "timeZone": zone_name},
        }

    def _days(self, count: int) -> Resource:
        """Return start and (exclusive) end of an all-day event of `count` days."""
        first = (self._anchor + timedelta(days=self._random.randint(-540, 365))).date()
        return {"start": {"date": first.isoformat()}, "end": {"date": (first + timedelta(days=count)).isoformat()}}

    def _people(self, calendar: Calendar) -> Resource:
        extra: Resource = {}
        if self._random.random() < 0.4:
            extra["location"] = self._random.choice(_PLACES)
        if self._random.random() < 0.5:
            extra["description"] = "Notes: …"
        if self._random.random() < 0.5:
            guests = [
                {
                    "email": f"guest-{self._random.randint(1, 400):03d}@example.org",
                    "responseStatus": self._random.choice(("accepted", "needsAction", "declined", "tentative")),
                }
                for _ in range(self._random.randint(1, 6))
            ]
            own = {"email": calendar.owner, "organizer": True, "self": True, "responseStatus": "accepted"}
            extra["attendees"] = [own, *guests]
        return extra

    def _typed(self, calendar: Calendar) -> Resource:
        """Return an event of one of the special types; only primary calendars hold them."""
        kind = self._random.choice(("workingLocation", "outOfOffice", "focusTime", "birthday", "fromGmail"))
        if not calendar.primary or kind == "fromGmail":
            return self._hours(calendar) | ({"eventType": "fromGmail"} if calendar.primary else {})
        if kind == "workingLocation":
            extra: Resource = {"workingLocationProperties": {"type": "homeOffice", "homeOffice": {}}}
            extra |= {"transparency": "transparent", "visibility": "public"}
            return self._days(1) | {"eventType": kind, "summary": "Home"} | extra
        if kind == "birthday":
            extra = {"recurrence": ["RRULE:FREQ=YEARLY"], "birthdayProperties": {"type": "birthday"}}
            return self._days(1) | {"eventType": kind, "summary": "Birthday 🎂", "visibility": "private"} | extra
        properties = "outOfOfficeProperties" if kind == "outOfOffice" else "focusTimeProperties"
        return self._hours(calendar) | {"eventType": kind, properties: {"autoDeclineMode": "declineNone"}}


def nasty_events(new_id: Callable[[], str]) -> list[Resource]:
    """Return events with values that real calendars contain and that break unprepared readers."""
    at = {"start": {"dateTime": "2026-06-01T10:00:00Z"}, "end": {"dateTime": "2026-06-01T11:00:00Z"}}
    guests = [{"email": f"guest-{number}@example.org", "responseStatus": "needsAction"} for number in range(250)]
    nasty: list[Resource] = [
        {"summary": "NUL \u0000 inside", **at},
        {"summary": "lone surrogate \ud83d inside", **at},
        {"summary": "year one", "start": {"dateTime": "0001-01-01T00:00:00Z"}, "end": at["end"]},
        {"summary": "year zero", "start": {"date": "0000-12-30"}, "end": {"date": "0000-12-31"}},
        {"summary": "no end", "start": at["start"], "endTimeUnspecified": True},
        {"summary": "no times at all"},
        {"summary": "ends before it starts", "start": at["end"], "end": at["start"]},
        {"summary": "offset as zone", "start": at["start"] | {"timeZone": "GMT-07:00"}, "end": at["end"]},
        {"summary": "unknown zone", "start": at["start"] | {"timeZone": "Mars/Phobos"}, "end": at["end"]},
        {"summary": "unknown type", "eventType": "holographic", "holographicProperties": {"depth": 3}, **at},
        {"summary": "unreadable rule", "recurrence": ["RRULE:FREQ=SOMETIMES;WHEN=MAYBE"], **at},
        {"summary": "huge", "description": _PARAGRAPH * 1800, **at},
        {"summary": "crowd", "attendees": guests, "attendeesOmitted": True, **at},
        {"summary": "", "description": None, "location": "\u202e\u200f\u00a0", **at},
    ]
    return [{"kind": "calendar#event", "etag": "", "id": new_id(), "status": "confirmed", **body} for body in nasty]
