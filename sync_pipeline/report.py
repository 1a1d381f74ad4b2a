"""The numbers of one day of syncing.

Belongs here: reading what `sync.runs` and the daily counters say about a UTC day; quantiles of the histogram.
Does not: drawing (`sync_pipeline.charts`), Dagster.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date

from scaling.databases import Connection, DatabaseRouter
from scaling.google_calls import POLLS_PER_HOUR, TOKEN_REFRESH

NO_BOUND_SECONDS = 7 * 86400
"""Buckets of the histogram beyond it have no upper bound worth showing."""


@dataclass(frozen=True, slots=True)
class Hour:
    """The runs that started within one hour."""

    hour: int
    runs: int
    calendars_live: float
    """Mean over the runs."""
    calendars_watched: float
    api_calls: int
    workspaces_served: int
    workspaces_failed: int
    most_failed_in_a_run: int
    events_upserted: int
    events_deleted: int
    quarantined: int
    waited_seconds: float

    @property
    def polling_calls(self) -> float:
        """Calls that polling every live calendar every two minutes would have cost."""
        return self.calendars_live * POLLS_PER_HOUR


@dataclass(frozen=True, slots=True)
class DayReport:
    """One UTC day."""

    day: date
    hours: tuple[Hour, ...]
    """Only those in which a run started."""
    calls: Mapping[tuple[str, str], int]
    """(method, outcome) to requests."""
    freshness: Mapping[int, int]
    """Upper bound of the age in seconds to changes that became visible at most that old."""
    notifications: Mapping[str, int]
    """Outcome to messages the receiver of notifications got."""

    @property
    def api_calls(self) -> int:
        """Calendar API requests, retries included, token refreshes not."""
        return sum(calls for (method, _), calls in self.calls.items() if method != TOKEN_REFRESH)

    @property
    def failures(self) -> Mapping[str, int]:
        """Outcome to requests Google refused or did not answer, token refreshes included."""
        found: Counter[str] = Counter()
        for (_, outcome), calls in self.calls.items():
            if not outcome.startswith(("2", "3")):
                found[outcome] += calls
        return found

    @property
    def polling_calls(self) -> float:
        """Calls of two-minute polling in the hours in which the sync ran."""
        return sum(hour.polling_calls for hour in self.hours)

    def freshness_quantile(self, fraction: float) -> int | None:
        """The bound that this share of the changes stayed within; None without changes.

        Args:
            fraction: 0.95 for the 95th percentile.
        """
        wanted = math.ceil(fraction * sum(self.freshness.values()))
        for bound, changes in sorted(self.freshness.items()):
            wanted -= changes
            if wanted <= 0 and changes:
                return bound
        return None

    def numbers(self) -> dict[str, int | float]:
        """The figures by name; one that could not be measured is absent."""
        runs = sum(hour.runs for hour in self.hours)
        served = sum(hour.workspaces_served for hour in self.hours)
        failed = sum(hour.workspaces_failed for hour in self.hours)
        live = self._mean([hour.calendars_live for hour in self.hours])
        figures: dict[str, int | float | None] = {
            "runs": runs,
            "calendars_live": live,
            "calendars_watched": self._mean([hour.calendars_watched for hour in self.hours]),
            "api_calls": self.api_calls,
            "token_refreshes": sum(calls for (method, _), calls in self.calls.items() if method == TOKEN_REFRESH),
            "calls_failed": sum(self.failures.values()),
            "calls_of_two_minute_polling": round(self.polling_calls),
            "calls_saved": round(self.polling_calls - self.api_calls),
            "saved_share": _share(self.polling_calls - self.api_calls, self.polling_calls),
            "calls_per_calendar": _share(self.api_calls, live),
            "freshness_p50_s": self.freshness_quantile(0.5),
            "freshness_p95_s": self.freshness_quantile(0.95),
            "changes_timed": sum(self.freshness.values()),
            "notifications": self.notifications.get("accepted", 0),
            "workspaces_served": served,
            "workspaces_failed": failed,
            "workspaces_failed_share": _share(failed, served),
            "events_upserted": sum(hour.events_upserted for hour in self.hours),
            "events_deleted": sum(hour.events_deleted for hour in self.hours),
            "quarantined": sum(hour.quarantined for hour in self.hours),
            "waited_seconds": round(sum(hour.waited_seconds for hour in self.hours), 1),
        }
        return {name: figure for name, figure in figures.items() if figure is not None}

    def _mean(self, of_hours: Sequence[float]) -> float | None:
        runs = sum(hour.runs for hour in self.hours)
        weighted = sum(value * hour.runs for value, hour in zip(of_hours, self.hours, strict=True))
        return round(weighted / runs, 1) if runs else None


def read(router: DatabaseRouter, day: date) -> DayReport:
    """Read a day from all databases.

    Args:
        router: to them.
        day: in UTC.
    """
    calls: Counter[tuple[str, str]] = Counter()
    freshness: Counter[int] = Counter()
    notifications: Counter[str] = Counter()
    hours: list[Hour] = []
    for shard in router.shards():
        with shard.transaction() as connection:
            hours += _hours(connection, day)
            for method, outcome, count in connection.execute(
                "SELECT method, outcome, sum(calls)::bigint FROM sync.api_calls WHERE day = %s GROUP BY 1, 2", [day]
            ):
                calls[method, outcome] += count
            for bound, changes in connection.execute(
                "SELECT le_seconds, changes FROM sync.freshness WHERE day = %s", [day]
            ):
                freshness[bound] += changes
            for outcome, messages in connection.execute(
                "SELECT outcome, messages FROM sync.webhook_messages WHERE day = %s", [day]
            ):
                notifications[outcome] += messages
    return DayReport(day, tuple(hours), calls, freshness, notifications)


def first_day(router: DatabaseRouter) -> date | None:
    """The UTC day of the oldest run that is still known."""
    days = []
    for shard in router.shards():
        with shard.transaction() as connection:
            row = connection.execute("SELECT (min(started_at) AT TIME ZONE 'UTC')::date FROM sync.runs").fetchone()
            days += [row[0]] if row and row[0] else []
    return min(days, default=None)


def _hours(connection: Connection, day: date) -> list[Hour]:
    # The book of runs is in the first database only; in the others the table is empty.
    rows = connection.execute(
        """
        SELECT extract(hour FROM started_at AT TIME ZONE 'UTC')::int AS hour, count(*), avg(calendars_live)::float8,
            avg(calendars_watched)::float8, sum(api_calls)::bigint, sum(workspaces_served), sum(workspaces_failed),
            max(workspaces_failed), sum(events_upserted)::bigint, sum(events_deleted)::bigint,
            sum(quarantined)::bigint, sum(waited_seconds)
        FROM sync.runs
        WHERE started_at >= %(day)s::timestamp AT TIME ZONE 'UTC'
          AND started_at < (%(day)s::timestamp + interval '1 day') AT TIME ZONE 'UTC'
        GROUP BY hour ORDER BY hour
        """,
        {"day": day},
    ).fetchall()
    return [Hour(*row) for row in rows]


def _share(part: float, whole: float | None) -> float | None:
    return round(part / whole, 4) if whole else None
