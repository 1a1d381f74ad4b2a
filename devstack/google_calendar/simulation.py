"""One simulation: a world and everything that acts on it, assembled from options."""

import random
import secrets
from dataclasses import dataclass, field, replace
from datetime import datetime

from devstack.google_calendar.clock import VirtualClock, stamp
from devstack.google_calendar.counters import Counters
from devstack.google_calendar.faults import Faults
from devstack.google_calendar.oauth import Grants
from devstack.google_calendar.push import Push
from devstack.google_calendar.quotas import Quotas
from devstack.google_calendar.resource import Resource
from devstack.google_calendar.routes import Routes
from devstack.google_calendar.settings import Settings
from devstack.google_calendar.state import User, World
from devstack.google_calendar.world import REVOKED, Profile, populate


@dataclass(frozen=True, slots=True)
class Options:
    """What a simulation is made from; the same options and clock make the same world."""

    seed: int = 1
    profile: Profile = Profile.SMALL
    users: int = 3  # ignored by the demo profile
    events: int = 100  # mean number of events in a calendar; ignored by the demo profile
    clock: datetime | None = None  # where virtual time starts; None: now
    frozen: bool = False
    settings: Settings = field(default_factory=Settings)


class Simulation:
    """A running world with its grants, limits, faults, counters and push channels."""

    def __init__(self, options: Options, url: str) -> None:
        """Build the world; `url` is the root the server is reached under."""
        rng = random.Random(options.seed)  # noqa: S311 - repeatable, not secret
        self.options = options
        self.url = url
        self.settings = replace(options.settings)  # may be changed while it runs
        self.clock = VirtualClock(options.clock, frozen=options.frozen)
        # Not seeded: a restarted server has forgotten its changes, so tokens of the old process must not fit.
        self.world = World(self.clock, self.settings, rng, incarnation=secrets.randbits(48))
        populate(self.world, options.profile, users=options.users, events=options.events)
        self.grants = Grants(self.clock, self.settings, random.Random(options.seed + 1))  # noqa: S311
        self.tokens: dict[str, tuple[str, str]] = {}
        for user in self.world.users.values():
            self.connect(user)
        self.quotas = Quotas(self.settings)
        self.faults = Faults(options.seed)
        self.counters = Counters()
        self.push = Push(self.world, self.faults, url, options.seed)
        self.routes = Routes(self.push)

    def connect(self, user: User) -> None:
        """Give a user a grant."""
        self.tokens[user.email] = self.grants.connect(user.email, revoked=user.note == REVOKED)

    def describe(self) -> Resource:
        """Return what a client needs to start: addresses, users and their tokens and calendars."""
        return {
            "url": self.url,
            "token_url": f"{self.url}/token",
            "users": [self.describe_user(user) for user in self.world.users.values()],
        }

    def describe_user(self, user: User) -> Resource:
        """Return one user with tokens and calendars, and notes on whatever is special about them."""
        refresh, access = self.tokens[user.email]
        entries = [entry.calendar for entry in user.entries.values() if not entry.deleted]
        described: Resource = {
            "email": user.email,
            "access_token": access,
            "refresh_token": refresh,
            "calendars": [calendar.id for calendar in entries],
        }
        if user.note:
            described["note"] = user.note
        if notes := {calendar.id: calendar.note for calendar in entries if calendar.note}:
            described["calendar_notes"] = notes
        return described

    def describe_clock(self) -> Resource:
        """Return the virtual time."""
        now = self.clock.now()
        return {"now": now, "rfc3339": stamp(now), "frozen": self.clock.frozen}
