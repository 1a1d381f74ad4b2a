"""What was done, counted."""

from collections import Counter
from dataclasses import dataclass, field

from sync_pipeline.event_store import Changes
from sync_pipeline.google_calendar import CallCounter

TOKEN_REFRESH = "oauth.refresh"  # noqa: S105  # a method's name


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

    @property
    def api_calls(self) -> int:
        """Calendar API requests; token refreshes are not counted against its quota."""
        return sum(count for (method, _), count in self.calls.items() if method != TOKEN_REFRESH)

    def add(self, changes: Changes) -> None:
        """Count changes readers see."""
        self.events_upserted += changes.upserted
        self.events_deleted += changes.deleted
        self.quarantined += changes.quarantined

    def merge(self, other: "Tally") -> None:
        """Add the counters of another tally."""
        for name in NUMBERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.calls.update(other.calls)

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
