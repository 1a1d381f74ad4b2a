"""Moments as events carry them: `{date}` or `{dateTime, timeZone}`, in both directions between text and instants.

Instants are seconds since the Unix epoch as float. Recurrence does not belong here.
"""

import re
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from functools import lru_cache
from zoneinfo import ZoneInfo

from devstack.google_calendar.resource import Resource

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_OFFSET_NAME = re.compile(r"(?:GMT|UTC)([+-])(\d{1,2}):?(\d{2})?")


@lru_cache(maxsize=1024)
def zone(name: str) -> tzinfo | None:
    """Return the zone called `name`: an IANA name or Google's "GMT-07:00"; None if there is no such zone."""
    if match := _OFFSET_NAME.fullmatch(name):
        offset = timedelta(hours=int(match[2]), minutes=int(match[3] or 0))
        return timezone(-offset if match[1] == "-" else offset)
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        return None


def instant(moment: datetime) -> float:
    """Return seconds since the epoch; unlike `datetime.timestamp` this also works for the year 1."""
    return (moment - _EPOCH).total_seconds()


def parse_rfc3339(text: str) -> float:
    """Return the instant of an RFC 3339 time stamp with a mandatory offset.

    Raises:
        ValueError: if the text is not a time stamp or has no offset.
    """
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError("Missing time zone offset.")
    return instant(moment)


def resolve(moment: Resource | None, calendar_zone: str) -> float | None:
    """Return the instant of an event's start or end, or None if it has none that can be computed.

    An all-day date begins at midnight in the calendar's zone.
    """
    if not moment:
        return None
    try:
        if "date" in moment:
            midnight = datetime.combine(date.fromisoformat(moment["date"]), datetime.min.time())
            return instant(midnight.replace(tzinfo=zone(calendar_zone) or UTC))
        when = datetime.fromisoformat(moment["dateTime"])
        if when.tzinfo is None:
            when = when.replace(tzinfo=zone(moment.get("timeZone", calendar_zone)) or UTC)
        return instant(when)
    except (KeyError, ValueError, TypeError, OverflowError):
        return None


def render(moment: datetime, zone_name: str) -> str:
    """Return an aware datetime as RFC 3339 in the named zone, seconds precision, `Z` for UTC."""
    local = moment.astimezone(zone(zone_name) or UTC)
    return local.isoformat(timespec="seconds").replace("+00:00", "Z")


def in_zone(moment: Resource, zone_name: str) -> Resource:
    """Return the same moment with `dateTime` expressed at the named zone's offset; dates are unchanged."""
    if "dateTime" not in moment:
        return moment
    try:
        when = datetime.fromisoformat(moment["dateTime"])
        if when.tzinfo is None:
            when = when.replace(tzinfo=zone(moment.get("timeZone", zone_name)) or UTC)
        return moment | {"dateTime": render(when, zone_name)}
    except (ValueError, TypeError, OverflowError):
        return moment
