"""What was done, counted."""

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from scaling.google_calls import AGES, TOKEN_REFRESH
from sync_pipeline.event_store import Changes
from sync_pipeline.google_calendar import CallCounter


@dataclass(slots=True)
class Tally:
    """Counters of one workspace, or of a run; they grow while the work goes on."""

    calendars_synced: int = 0
    calendars_failed: int = 0
    calendars_deferred: int = 0
    full_syncs: int = 0
    incremental_syncs: int = 0
    pages: int = 0
    events_seen: int = 0
    events_upserted: int = 0
    events_deleted: int = 0
    quarantined: int = 0
    calls: CallCounter = field(default_factory=Counter)
    freshness: Counter[int] = field(default_factory=Counter)
    """Upper bound of a change's age in seconds, one of `AGES`, to changes."""

    @property
    def changed(self) -> bool:
        """Readers see anything else than before."""
        return bool(self.events_upserted or self.events_deleted or self.quarantined)

    @property
    def api_calls(self) -> int:
        """Calendar API requests; token refreshes are not counted against its quota."""
        return sum(count for (method, _), count in self.calls.items() if method != TOKEN_REFRESH)

    def add(self, changes: Changes) -> None:
        """Count changes readers see."""
        self.events_upserted += changes.upserted
        self.events_deleted += changes.deleted
        self.quarantined += changes.quarantined
        self.freshness.update(AGES[bisect_left(AGES, age)] for age in changes.ages)

    def merge(self, other: "Tally") -> None:
        """Add the counters of another tally."""
        for name in NUMBERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.calls.update(other.calls)
        self.freshness.update(other.freshness)

    def numbers(self) -> dict[str, int]:
        """The counters by name, `api_calls` among them."""
        return {name: getattr(self, name) for name in NUMBERS} | {"api_calls": self.api_calls}


NUMBERS = (
    "calendars_synced",
    "calendars_failed",
    "calendars_deferred",
    "full_syncs",
    "incremental_syncs",
    "pages",
    "events_seen",
    "events_upserted",
    "events_deleted",
    "quarantined",
)
