"""Counters of everything the API answered, and the last calls for a person who is debugging a client."""

from collections import Counter, deque
from dataclasses import asdict, dataclass

from devstack.google_calendar.resource import Resource


@dataclass(frozen=True, slots=True)
class CallKey:
    """What calls are counted by."""

    method: str  # "events.list", "oauth.token", …
    user: str  # e-mail, "" if the caller is unknown
    calendar: str  # calendar id, "" for methods without one
    status: int
    page: int  # 1-based page of a listing, 1 elsewhere
    incremental: bool  # whether a sync token was sent


class Counters:
    """Counts of calls and bytes since the last reset."""

    def __init__(self) -> None:
        self._calls: Counter[CallKey] = Counter()
        self._drift: Counter[tuple[str, str]] = Counter()
        self._bytes = 0
        self._recent: deque[Resource] = deque(maxlen=200)

    def record(self, key: CallKey, size: int, query: str) -> None:
        """Count one answer of `size` body bytes; `query` is kept for the list of recent calls."""
        self._calls[key] += 1
        self._bytes += size
        self._recent.append({"key": key, "bytes": size, "query": query})

    def record_drift(self, kind: str, calendar: str) -> None:
        """Count a token that came back with other parameters than it was issued for."""
        self._drift[kind, calendar] += 1

    def reset(self) -> None:
        """Forget everything counted."""
        self._calls.clear()
        self._drift.clear()
        self._recent.clear()
        self._bytes = 0

    def report(self) -> Resource:
        """Return the counts as JSON: `calls` and `drift` rows, `total` and `bytes`."""
        return {
            "total": self._calls.total(),
            "bytes": self._bytes,
            "calls": [{**asdict(key), "count": count} for key, count in self._calls.items()],
            "drift": [
                {"kind": kind, "calendar": calendar, "count": count} for (kind, calendar), count in self._drift.items()
            ],
        }

    def recent(self) -> list[Resource]:
        """Return the last calls, newest last."""
        return [{**asdict(call["key"]), "bytes": call["bytes"], "query": call["query"]} for call in self._recent]
