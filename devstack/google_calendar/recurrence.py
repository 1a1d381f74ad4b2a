"""Expansion of recurring events: RRULE, RDATE, EXRULE and EXDATE lines into occurrences with instance ids.

Occurrences are computed in the series' own zone, so that a weekly 09:00 stays 09:00 across DST changes. Exceptions
(moved or cancelled instances) are records of their own and are laid over the occurrences by the caller.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, tzinfo
from functools import lru_cache

from dateutil import rrule

from devstack.google_calendar.resource import Resource
from devstack.google_calendar.times import instant, render, resolve, zone

# Unbounded singleEvents listings were observed to hold about 700 instances a series; the horizon is not documented.
MAX_INSTANCES = 730
# Bounds the work a hostile or long-past rule can cause; 20,000 daily steps are 54 years.
_MAX_STEPS = 20_000


@dataclass(frozen=True, slots=True)
class Occurrence:
    """One occurrence of a series: its instance id and instants; its moments are rendered only when it is shown."""

    id: str
    begins: float
    ends: float
    _series: Resource
    _calendar_zone: str
    _moment: datetime  # in UTC; naive midnight of an all-day occurrence
    _length: timedelta

    @property
    def start(self) -> Resource:
        """Start as an event carries it; also the original start, for an instance that was not moved."""
        if self._moment.tzinfo is None:
            return {"date": self._moment.date().isoformat()}
        return self._timed("start", self._moment)

    @property
    def end(self) -> Resource:
        """End as an event carries it."""
        if self._moment.tzinfo is None:
            return {"date": (self._moment.date() + self._length).isoformat()}
        return self._timed("end", self._moment + self._length)

    def _timed(self, name: str, moment: datetime) -> Resource:
        zone_name = self._series["start"].get("timeZone", self._calendar_zone)
        zone_name = self._series.get(name, {}).get("timeZone", zone_name)
        return {"dateTime": render(moment, self._calendar_zone), "timeZone": zone_name}


def check(series: Resource, calendar_zone: str) -> None:
    """Verify that the series can be expanded.

    Raises:
        ValueError: if a recurrence line cannot be read.
    """
    local, tz, all_day = _first(series, calendar_zone)
    _rules(tuple(series["recurrence"]), local, tz, all_day=all_day)


def occurrences(
    series: Resource,
    calendar_zone: str,
    *,
    after: float | None = None,
    before: float | None = None,
    limit: int = MAX_INSTANCES,
) -> Iterator[Occurrence]:
    """Yield the occurrences of a recurring event in order.

    Args:
        series: the recurring master with `start`, `end` and `recurrence`.
        calendar_zone: IANA name; all-day dates and rendered offsets refer to it.
        after: only occurrences that end after this instant.
        before: only occurrences that start before this instant.
        limit: at most this many.
    """
    try:
        local, tz, all_day = _first(series, calendar_zone)
        rules = _rules(tuple(series["recurrence"]), local, tz, all_day=all_day)
    except (KeyError, ValueError, TypeError):
        return
    length = _length(series, calendar_zone, all_day=all_day)
    found = 0
    for step, start in enumerate(rules):
        occurrence = _occurrence(series, start, length, calendar_zone, tz, all_day=all_day)
        if step >= _MAX_STEPS or found >= limit or (before is not None and occurrence.begins >= before):
            return
        if after is None or occurrence.ends > after:
            found += 1
            yield occurrence


def _first(series: Resource, calendar_zone: str) -> tuple[datetime, tzinfo, bool]:
    """Return the naive local start of the series, its zone and whether it is all-day."""
    start = series["start"]
    if "date" in start:
        return datetime.combine(date.fromisoformat(start["date"]), datetime.min.time()), UTC, True
    tz = zone(start.get("timeZone", calendar_zone)) or UTC
    moment = datetime.fromisoformat(start["dateTime"])
    return (moment.astimezone(tz) if moment.tzinfo else moment).replace(tzinfo=None), tz, False


def _length(series: Resource, calendar_zone: str, *, all_day: bool) -> timedelta:
    end = series.get("end") or series["start"]
    if all_day and "date" in end:
        return date.fromisoformat(end["date"]) - date.fromisoformat(series["start"]["date"])
    begins, ends = resolve(series["start"], calendar_zone), resolve(end, calendar_zone)
    return timedelta(seconds=(ends or 0.0) - (begins or 0.0)) if ends and begins else timedelta(0)


def _occurrence(
    series: Resource, local: datetime, length: timedelta, calendar_zone: str, tz: tzinfo, *, all_day: bool
) -> Occurrence:
    if all_day:
        midnight = local.replace(tzinfo=zone(calendar_zone) or UTC)
        begins, ends = instant(midnight), instant(midnight + length)
        return Occurrence(f"{series['id']}_{local:%Y%m%d}", begins, ends, series, calendar_zone, local, length)
    moment = local.replace(tzinfo=tz).astimezone(UTC)
    begins = instant(moment)
    ends = begins + length.total_seconds()
    return Occurrence(f"{series['id']}_{moment:%Y%m%dT%H%M%SZ}", begins, ends, series, calendar_zone, moment, length)


@lru_cache(maxsize=512)
def _rules(lines: tuple[str, ...], start: datetime, tz: tzinfo, *, all_day: bool) -> rrule.rruleset:
    """Build the rule set of a series over naive local time."""
    rules = rrule.rruleset(cache=False)
    for line in lines:
        head, _, value = line.partition(":")
        match head.split(";")[0].upper():
            case "RRULE":
                rules.rrule(_rule(value, start, tz, all_day=all_day))
            case "EXRULE":
                rules.exrule(_rule(value, start, tz, all_day=all_day))
            case "RDATE":
                for text in value.split(","):
                    rules.rdate(_local(text, head, tz))
            case "EXDATE":
                for text in value.split(","):
                    rules.exdate(_local(text, head, tz))
            case _:
                raise ValueError(f"Invalid recurrence line: {line}")
    if not any(line.upper().startswith("RRULE") for line in lines):
        rules.rdate(start)
    return rules


def _rule(text: str, start: datetime, tz: tzinfo, *, all_day: bool) -> rrule.rrule:
    """Parse one rule; UNTIL, given in UTC or as a date, becomes naive local time as the expansion needs it."""
    parts = []
    for part in text.split(";"):
        name, _, value = part.partition("=")
        if name.upper() == "UNTIL":
            if len(value) == len("YYYYMMDD") and not all_day:
                until = datetime.strptime(value + "T235959", "%Y%m%dT%H%M%S")  # noqa: DTZ007 - local by design
            else:
                until = _local(value, "", tz)
            parts.append(f"UNTIL={until:%Y%m%dT%H%M%S}")
        elif part:
            parts.append(part)
    rule = rrule.rrulestr(";".join(parts), dtstart=start)
    if not isinstance(rule, rrule.rrule):
        raise ValueError(f"Invalid recurrence rule: {text}")  # noqa: TRY004 - callers treat every bad rule alike
    return rule


def _local(text: str, head: str, tz: tzinfo) -> datetime:
    """Parse `YYYYMMDD`, `YYYYMMDDTHHMMSS` or `…Z`, honouring a TZID of the line's head, into naive local time."""
    if len(text) == len("YYYYMMDD"):
        return datetime.strptime(text, "%Y%m%d")  # noqa: DTZ007 - local by design
    if text.endswith("Z"):
        moment = datetime.strptime(text, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        return moment.astimezone(tz).replace(tzinfo=None)
    moment = datetime.strptime(text, "%Y%m%dT%H%M%S")  # noqa: DTZ007 - its zone, if any, is in the head
    for parameter in head.split(";")[1:]:
        name, _, value = parameter.partition("=")
        if name.upper() == "TZID" and (named := zone(value)):
            return moment.replace(tzinfo=named).astimezone(tz).replace(tzinfo=None)
    return moment
