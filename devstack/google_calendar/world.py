"""Seeded worlds: who exists, which calendars they have, how full those are, and what is special about some of them.

The same seed gives the same world on any day: event dates lie around a fixed anchor, not around today. What single
events look like is in `shapes`.
"""

import math
from datetime import UTC, datetime
from enum import StrEnum

from devstack.google_calendar.shapes import Shapes, nasty_events
from devstack.google_calendar.state import Calendar, User, World

# Notes in the description of a world, so that tests and seeders find what is special.
REVOKED = "revoked_grant"
ALWAYS_GONE = "always_gone"
LARGE = "large"
NASTY = "nasty_values"
HOLIDAYS = "push_not_supported"

ANCHOR = datetime(2026, 6, 1, tzinfo=UTC)
LARGE_EVENTS = 10_000
_DEMO_USERS = 60
_DEMO_CALENDARS = 90
_DEMO_MEAN = 200
_HOLIDAY_ID = "en.german#holiday@group.v.calendar.google.com"
_ZONES = (
    "Europe/Berlin", "America/New_York", "Asia/Tokyo", "UTC", "Europe/London", "America/Los_Angeles", "Asia/Kolkata",
    "America/Sao_Paulo", "Australia/Lord_Howe", "America/St_Johns", "Pacific/Auckland", "Africa/Cairo",
)  # fmt: skip
_TEAMS = (
    "Team",
    "Launch plan",
    "On-call rota",
    "Rooms 3F",
    "営業チーム",
    "Équipe produit",
    "צוות פיתוח",
    "Side project",
)


class Profile(StrEnum):
    """Which world to build."""

    SMALL = "small"  # a few users and calendars, some hundred events
    DEMO = "demo"  # 60 users, 90 calendars, about 27,000 events, and one of everything that goes wrong


def populate(world: World, profile: Profile, *, users: int, events: int) -> None:
    """Fill an empty world.

    Args:
        world: its clock, randomness and settings are used.
        profile: which world to build.
        users: number of users of the small profile.
        events: mean number of events in a calendar of the small profile.
    """
    builder = _Builder(world)
    if profile is Profile.DEMO:
        builder.demo()
    else:
        builder.small(users, events)


class _Builder:
    def __init__(self, world: World) -> None:
        self._world = world
        self._random = world.random
        self._shapes = Shapes(world.random, world.new_id, min(ANCHOR.timestamp(), world.clock.now()))

    def small(self, users: int, events: int) -> None:
        """Build primary calendars, a team calendar of the first user shared with the second, and holidays."""
        people = self._people(users)
        if people:
            team = self._secondary(people[0], "Team")
            self._holidays(people[0])
            if len(people) > 1:
                self._world.share(team, people[1], "reader")
        for calendar in self._own_calendars():
            self._fill(calendar, self._size(events))

    def demo(self) -> None:
        """Build 60 users with 90 calendars between them; see the notes of users and calendars for the special ones."""
        people = self._people(_DEMO_USERS)
        people[12].note = REVOKED
        self._holidays(people[0])
        gone = self._secondary(people[20], "Conference rooms")
        gone.always_gone, gone.note = True, ALWAYS_GONE
        nasty = self._secondary(people[30], "Imported junk")
        nasty.note = NASTY
        large = self._secondary(people[4], "Company archive")
        large.note = LARGE
        while len(self._world.calendars) < _DEMO_CALENDARS:
            self._secondary(self._random.choice(people), self._random.choice(_TEAMS))
        # The same calendar mirrored for two accounts: tokens and rows must stay apart.
        self._world.share(gone, people[21], "reader")
        for calendar in self._own_calendars():
            if calendar is large:
                self._shapes.fill(large, LARGE_EVENTS, cancelled_instances=False)
            else:
                self._fill(calendar, self._size(_DEMO_MEAN))
        for body in nasty_events(self._world.new_id):
            nasty.commit(body, ANCHOR.timestamp())

    def _people(self, count: int) -> list[User]:
        return [
            self._world.add_user(f"user-{number:03d}@example.com", _ZONES[(number - 1) % len(_ZONES)])
            for number in range(1, count + 1)
        ]

    def _secondary(self, owner: User, summary: str) -> Calendar:
        calendar_id = f"c_{self._world.new_id()}@group.calendar.google.com"
        return self._world.add_calendar(calendar_id, summary, owner.time_zone, owner=owner)

    def _holidays(self, reader: User) -> None:
        calendar = self._world.add_calendar(_HOLIDAY_ID, "Holidays in Germany", "Europe/Berlin", owner=None)
        calendar.push_supported, calendar.note = False, HOLIDAYS
        self._world.share(calendar, reader, "reader")
        self._shapes.fill_holidays(calendar)

    def _own_calendars(self) -> list[Calendar]:
        return [calendar for calendar in self._world.calendars.values() if calendar.owner]

    def _size(self, mean: int) -> int:
        """Return a skewed number of events: most calendars are small, a few are several times the mean."""
        sigma = 0.8
        return max(1, round(self._random.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))) if mean else 0

    def _fill(self, calendar: Calendar, count: int) -> None:
        self._shapes.fill(calendar, count)
