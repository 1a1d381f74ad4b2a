"""When a calendar is looked at again, and how often it changes.

Belongs here: intervals, jitter, backoff, change rates. Pure functions of the settings and the injected randomness,
and the one query that reads the rates of the fleet.
Does not: due times themselves; the database adds these seconds to its own clock.

**Change rate.** Changes are taken for a Poisson process with a rate of its own per calendar: a Gamma distribution of
which `change_count` is the shape and `observed_days` the inverse scale, both halved every `HALF_LIFE_DAYS`. A sync
sees whether anything changed, not how often. So a poll that finds a change counts as one change within the time that
the *first* change is expected to have taken, t(1/x - 1/(e^x - 1)) with x = rate * t, not within t: counting all of
t makes busy calendars look slow. The fixed point is the maximum likelihood estimate for irregular polls of Cho and
Garcia-Molina, "Estimating Frequency of Change", ACM TOIT 3(3), 2003 (this is its EM algorithm, one step per poll).
A pull that follows a notification came when the first change did: there all of t counts.

**Interval.** The fewest polls whose changes are `freshness_seconds` old on average when they are found: minimise
sum(1/t) subject to sum(rate * t)/sum(rate) = constant, hence t = scale / sqrt(rate) (Lagrange), with one scale for the
fleet, and by Kuhn and Tucker the same clamped to floor and ceiling.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from psycopg import sql

from scaling.databases import Connection
from sync_pipeline.errors import RateLimitedError, SyncError

JITTER = 0.25
"""Google asks for 25 % so that a fleet does not call in step (guides/quota)."""
FIRST_BACKOFF_SECONDS = 60.0
LONGEST_BACKOFF_SECONDS = 3600.0
FIRST_PARK_SECONDS = 30.0

HALF_LIFE_DAYS = 7.0
"""A week has working days and others; a calendar that falls silent loses half of its rate within one."""
FIRST_RATE = 2.0
"""Changes a day of a calendar as long as nothing is known of the whole fleet."""
PRIOR_CHANGES = 0.5
"""How many changes the fleet's mean counts for: little, because calendars differ by orders of magnitude."""
LONGEST_OBSERVATION_DAYS = 365.0
LATE_SECONDS = 60.0
"""Mean time from due to started: half of a schedule of two minutes."""

DAY = 86400.0
_SERIES_BELOW = 0.01
_NO_EXP_ABOVE = 500.0
_NOTHING_BELOW = 1e-9


def observe(
    change_count: float, observed_days: float, elapsed_seconds: float | None, changed: bool, *, notified: bool = False
) -> tuple[float, float]:
    """Learn from one sync how often a calendar changes.

    Args:
        change_count: what is known so far; 0 at first.
        observed_days: what is known so far; 0 at first.
        elapsed_seconds: since the last successful sync; None when this one is the first, which tells nothing.
        changed: it found a change.
        notified: it followed a notification, so the first change came at its end.

    Returns:
        The new `change_count` and `observed_days`.
    """
    if elapsed_seconds is None:
        return change_count, observed_days
    days = min(max(elapsed_seconds / DAY, 0.0), LONGEST_OBSERVATION_DAYS)
    kept = 0.5 ** (days / HALF_LIFE_DAYS)
    exposure = days
    if changed and not notified:
        x = rate_per_day(change_count, observed_days, FIRST_RATE) * days
        exposure *= 0.5 - x / 12 if x < _SERIES_BELOW else 1 / x - 1 / (math.exp(min(x, _NO_EXP_ABOVE)) - 1)
    return (
        (change_count * kept if change_count > _NOTHING_BELOW else 0.0) + changed,
        (observed_days * kept if observed_days > _NOTHING_BELOW else 0.0) + exposure,
    )


def rate_per_day(change_count: float, observed_days: float, prior: float) -> float:
    """Estimate how often a calendar changes.

    Args:
        change_count: see `observe`.
        observed_days: see `observe`.
        prior: mean of the fleet, changes a day; more than 0.

    Returns:
        Changes a day, more than 0.
    """
    return (change_count + PRIOR_CHANGES) / (observed_days + PRIOR_CHANGES / prior)


@dataclass(frozen=True, slots=True)
class FleetRates:
    """How often the calendars change that are polled.

    Attributes:
        buckets: (calendars, their mean rate in changes a day), calendars of similar rates together.
        mean: of all calendars, with push or without; the first guess for a new one.
    """

    buckets: tuple[tuple[int, float], ...] = ()
    mean: float = FIRST_RATE

    @property
    def calendars(self) -> int:
        """How many are polled."""
        return sum(calendars for calendars, _ in self.buckets)

    @classmethod
    def together(cls, fleets: "Sequence[FleetRates]") -> "FleetRates":
        """Put the fleets of several databases together."""
        buckets = tuple(bucket for fleet in fleets for bucket in fleet.buckets)
        polled = sum(fleet.calendars for fleet in fleets)
        if len(fleets) == 1 or not polled:
            return cls(buckets, fleets[0].mean if fleets else FIRST_RATE)
        return cls(buckets, sum(fleet.mean * fleet.calendars for fleet in fleets) / polled)


_FLEET = sql.SQL("""
WITH calendars AS MATERIALIZED (
    SELECT c.change_count, c.observed_days, w.calendar_id IS NOT NULL AS watched
    FROM sync.calendar_state c
    JOIN sync.connection_state s USING (tenant_id, workspace_id, connection_id)
    LEFT JOIN (
        SELECT DISTINCT tenant_id, workspace_id, connection_id, calendar_id FROM sync.channels
        WHERE state = 'open' AND last_message_at IS NOT NULL AND expires_at > now() AND calendar_id IS NOT NULL
    ) AS w USING (tenant_id, workspace_id, connection_id, calendar_id)
    WHERE c.deleted_at IS NULL AND s.status = 'active'
), fleet AS (
    SELECT (coalesce(sum(change_count), 0) + {changes}) / (coalesce(sum(observed_days), 0) + {changes} / {first_rate})
        AS mean
    FROM calendars
), polled AS (
    SELECT (change_count + {changes}) / (observed_days + {changes} / fleet.mean) AS rate
    FROM calendars CROSS JOIN fleet WHERE NOT watched
)
SELECT fleet.mean, count(polled.rate), avg(polled.rate)
FROM fleet LEFT JOIN polled ON true
GROUP BY fleet.mean, floor(ln(polled.rate) / ln(2::float8))
ORDER BY 3
""").format(
    changes=sql.SQL("{}::float8").format(sql.Literal(PRIOR_CHANGES)),
    first_rate=sql.SQL("{}::float8").format(sql.Literal(FIRST_RATE)),
)


def read_fleet(connection: Connection) -> FleetRates:
    """Read how often the calendars without push change, in powers of two; once per run.

    Args:
        connection: within a transaction.

    Returns:
        The rates of calendars that Google lets us read and sends no notifications for.
    """
    rows = connection.execute(_FLEET).fetchall()
    return FleetRates(
        tuple((int(calendars), float(rate)) for _, calendars, rate in rows if calendars),
        float(rows[0][0]) if rows else FIRST_RATE,
    )


@dataclass(frozen=True, slots=True)
class PollPlan:
    """How long each calendar of a fleet waits for its next poll, before jitter.

    Attributes:
        floor_seconds: never shorter.
        ceiling_seconds: never longer.
        scale: the interval of a calendar with one change a day, before clamping and `late_seconds`.
        mean: rate of a calendar nothing is known of.
        late_seconds: mean time from due to started.
    """

    floor_seconds: float
    ceiling_seconds: float
    scale: float
    mean: float
    late_seconds: float

    @classmethod
    def of(
        cls,
        fleet: FleetRates,
        *,
        floor_seconds: float,
        ceiling_seconds: float,
        freshness_seconds: float,
        late_seconds: float = LATE_SECONDS,
    ) -> "PollPlan":
        """Choose the longest intervals with which the fleet's changes are fresh enough on average.

        Args:
            fleet: its rates; an empty one is taken for one calendar of its mean rate.
            floor_seconds: shortest interval; where even that is too long for the target, it is used.
            ceiling_seconds: longest interval.
            freshness_seconds: mean age of a change when it is found.
            late_seconds: mean time from due to started.
        """
        buckets = fleet.buckets or ((1, fleet.mean),)
        weights = [(calendars * rate, rate) for calendars, rate in buckets if rate > 0]

        def plan(scale: float) -> "PollPlan":
            return cls(floor_seconds, ceiling_seconds, scale, fleet.mean, late_seconds)

        def is_fresh(candidate: "PollPlan") -> bool:
            staleness = sum(weight * candidate.staleness(rate) for weight, rate in weights)
            return staleness <= freshness_seconds * sum(weight for weight, _ in weights)

        fastest = max((rate for _, rate in weights), default=1.0)
        low, high = 0.0, 2 * (ceiling_seconds + late_seconds) * math.sqrt(fastest)  # beyond half of it all is clamped
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if is_fresh(plan(middle)) else (low, middle)
        return plan(low)

    def interval(self, rate: float) -> float:
        """Seconds from one poll of a calendar with that rate to when the next is due, on average."""
        wanted = self.scale / math.sqrt(rate) - self.late_seconds if rate > 0 else self.ceiling_seconds
        return min(max(wanted, self.floor_seconds), self.ceiling_seconds)

    def staleness(self, rate: float) -> float:
        """Mean age of its changes when a poll finds them: E[T^2] / 2E[T] of the interval T, jittered and late."""
        interval = self.interval(rate)
        mean = interval + self.late_seconds
        variance = (JITTER * interval) ** 2 / 3 + self.late_seconds**2 / 3
        return (mean**2 + variance) / (2 * mean) if mean else 0.0


@dataclass(frozen=True, slots=True)
class Cadence:
    """Intervals in seconds.

    Attributes:
        poll_seconds: shortest interval of a calendar's polls.
        list_seconds: interval of a connection's list of calendars.
        rng: source of the jitter.
        ceiling_seconds: longest interval of a calendar's polls; None: the shortest, nothing adapts.
        freshness_seconds: mean age of a change when a poll finds it.
        safety_seconds: longest time without a look at what Google sends notifications for.
        plan: of the fleet as last read, see `for_fleet`; None: nothing is known of it.
    """

    poll_seconds: float
    list_seconds: float
    rng: Random
    ceiling_seconds: float | None = None
    freshness_seconds: float = 900.0
    safety_seconds: float = DAY
    plan: PollPlan | None = None

    def for_fleet(self, fleet: FleetRates) -> "Cadence":
        """Tune the intervals to a fleet; once per run, with what `read_fleet` says."""
        return replace(self, plan=self._plan_for(fleet))

    def fixed(self) -> "Cadence":
        """The same without adaptation: every poll after the shortest interval."""
        return replace(self, ceiling_seconds=None, plan=None)

    def rate(self, change_count: float, observed_days: float) -> float:
        """Changes a day of a calendar of which that much is known, see `rate_per_day`."""
        return rate_per_day(change_count, observed_days, self._plan().mean)

    def next_poll(self, rate: float | None = None) -> float:
        """Seconds until a synced calendar without push is due again.

        Args:
            rate: its changes a day, see `rate`; None: nothing is known, it is taken for an average one.
        """
        plan = self._plan()
        return self._jittered(plan.interval(plan.mean if rate is None else rate))

    def next_safety_poll(self) -> float:
        """Seconds until a calendar with push is due if no notification comes; never more than `safety_seconds`."""
        return self._jittered_down(self.safety_seconds)

    def next_list(self, watched: bool = False) -> float:
        """Seconds until a connection's list of calendars is read again.

        Args:
            watched: Google sends notifications for the list.
        """
        return self._jittered_down(self.safety_seconds) if watched else self._jittered(self.list_seconds)

    def after(self, error: SyncError, *, failures: int) -> float:
        """Seconds until the next try after a failure.

        Args:
            error: what happened; some kinds know how long waiting makes sense.
            failures: how many tries in a row failed before this one.
        """
        if isinstance(error, RateLimitedError) and error.retry_after_seconds is not None:
            return error.retry_after_seconds * (1 + JITTER * self.rng.random())
        if error.backoff_seconds is not None:
            return self._jittered(error.backoff_seconds)
        if failures == 0:  # at the shortest interval, however seldom the calendar is polled
            return self._jittered(self.poll_seconds)
        return self._jittered(min(FIRST_BACKOFF_SECONDS * 2.0 ** min(failures, 20), LONGEST_BACKOFF_SECONDS))

    def park(self, error: SyncError, *, failed_visits: int) -> float:
        """Seconds for which no call is made for a connection that Google refuses, slows down, or does not answer for.

        Args:
            error: what happened; what Google asked for, and longer quotas, are waited for in full.
            failed_visits: visits in a row before this one that ended this way.
        """
        patience = min(FIRST_PARK_SECONDS * 2.0 ** min(failed_visits, 20), LONGEST_BACKOFF_SECONDS)
        asked = error.retry_after_seconds if isinstance(error, RateLimitedError) else error.backoff_seconds
        return max(patience, asked or 0.0) * (1 + self.rng.uniform(0, JITTER))

    def _plan(self) -> PollPlan:
        return self.plan or self._plan_for(FleetRates())

    def _plan_for(self, fleet: FleetRates) -> PollPlan:
        return PollPlan.of(
            fleet,
            floor_seconds=self.poll_seconds,
            ceiling_seconds=self.poll_seconds if self.ceiling_seconds is None else self.ceiling_seconds,
            freshness_seconds=self.freshness_seconds,
        )

    @property
    def longest_poll_seconds(self) -> float:
        """No poll without push is planned further ahead."""
        longest = self.poll_seconds if self.ceiling_seconds is None else self.ceiling_seconds
        return longest * (1 + JITTER)

    @property
    def longest_list_seconds(self) -> float:
        """No reading of a list without push is planned further ahead."""
        return self.list_seconds * (1 + JITTER)

    def _jittered(self, seconds: float) -> float:
        return seconds * self.rng.uniform(1 - JITTER, 1 + JITTER)

    def _jittered_down(self, seconds: float) -> float:
        return seconds * self.rng.uniform(1 - JITTER, 1)
