"""How many calls Google may be sent: per minute, per user and minute, per day, and at a time.

Belongs here: the token buckets and the daily budget in Postgres, who waits for them and how long, what a 429 leads to.
Does not: sending calls, recognising a 429 (`sync_pipeline.google_calendar`), parking a connection (the caller).

The buckets are shared by every process and filled by the database's clock. A reservation may drive a bucket below
zero; whoever made it waits until it is back at zero. Two promises hold for each quota Q a minute:

- No 60 seconds see more than Q calls, wherever they begin. A bucket of capacity C that gains R a second lets at most
  C + R x t calls fall due in any t seconds, as long as nobody reserves more than C at once. A call is sent within s
  seconds of falling due, so calls sent within 60 seconds fell due within 60 + s, and C + R x (60 + s) = Q.
- Statements do not grow with calls. A process reserves about one second's worth of its own calls for the project and
  spends them by itself; what is older than `PROJECT_LOT_SECONDS` is not spent but given back. While the project's
  bucket is empty all processes reserve the same small number, so each gets an equal share.

When Google limits several tenants at the same time it means the project: then a call costs more tokens. A smaller
refill would do the same, but would move what has been promised; with prices the first promise holds all the time.
"""

import hashlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import date
from types import TracebackType
from typing import Final, Protocol, Self
from uuid import UUID

from psycopg import sql

from scaling.databases import Connection, Shard
from scaling.settings import SyncSettings
from sync_pipeline.errors import DailyBudgetError, ThrottledError

CAPACITY_SHARE = 0.1
"""How much of a minute's quota may be called at once after a rest."""
PROJECT_LOT_SECONDS = 2.0
USER_LOT_SECONDS = 15.0
"""A reserved call that falls due is spent within so many seconds or not at all. A worker reserves a user's calls
before it begins with a connection, so these live longer."""
TRANSPORT_SECONDS = 3.0
"""Between a process's decision to call and the request's arrival at Google."""
PROJECT_WAIT_SECONDS = 30.0
USER_WAIT_SECONDS = 2.0
"""Who would have to wait longer is refused instead. A user's worker has other connections to work on meanwhile."""

SCARCE_RESERVATIONS_PER_SECOND = 8
"""Of all processes together, while they wait for the project's bucket."""
USER_LOT = 16
"""Most calls a connection reserves at a time when it needs more than planned."""

LIMITED_TENANTS = 3
LIMITED_WITHIN_SECONDS = 10.0
"""Google limiting so many tenants within so many seconds means the project; fewer, these tenants' own affair."""
LOWEST_FACTOR = 1 / 16
FACTOR_RECOVERY_SECONDS = 300.0
"""From nothing to the full rate, linearly: additive increase, multiplicative decrease."""
FACTOR_PAUSE_SECONDS = 5.0
"""The answers to calls that were under way when the rate was halved do not halve it again."""
CONGESTION_PAUSE_SECONDS = 1.0

DAILY_WARNING_SHARE = 0.8
"""Of the daily budget: warn when so much is used."""
BUDGET_RECHECK_SECONDS = 60.0
SHORTEST_PROJECTION_SECONDS = 3600.0
IDLE_DAYS = 1

_ZONE: Final = "America/Los_Angeles"  # "daily quotas reset at midnight Pacific time"
_PROJECT: Final = b""


@dataclass(frozen=True, slots=True)
class Rate:
    """A token bucket's size and refill."""

    capacity: int
    per_second: float

    @classmethod
    def of_quota(cls, per_minute: int, *, spent_within_seconds: float) -> Self:
        """Fill a quota without ever exceeding it.

        Args:
            per_minute: the quota.
            spent_within_seconds: how long after falling due a call reaches Google, at most.

        Returns:
            The bucket for which capacity plus refill in 60 + `spent_within_seconds` seconds is the quota.
        """
        capacity = max(1, int(per_minute * CAPACITY_SHARE))
        # A quota of one call leaves nothing to refill, yet calls are whole: 1.98 of them are 1.
        return cls(capacity, max(per_minute - capacity, 0.98) / (60.0 + spent_within_seconds))


@dataclass(frozen=True, slots=True)
class QuotaLimits:
    """Google's quotas of this installation; the defaults are the documented ones."""

    per_minute: int = 10_000
    per_minute_and_user: int = 600
    per_day: int = 1_000_000

    @classmethod
    def from_settings(cls, settings: SyncSettings) -> Self:
        """Take the limits from the settings.

        Args:
            settings: SYNC_CALLS_PER_MINUTE, SYNC_CALLS_PER_MINUTE_AND_USER and SYNC_CALLS_PER_DAY.
        """
        return cls(settings.sync_calls_per_minute, settings.sync_calls_per_minute_and_user, settings.sync_calls_per_day)

    @property
    def project_rate(self) -> Rate:
        """The bucket all calls share."""
        return Rate.of_quota(self.per_minute, spent_within_seconds=PROJECT_LOT_SECONDS + TRANSPORT_SECONDS)

    @property
    def user_rate(self) -> Rate:
        """The bucket of each Google account."""
        return Rate.of_quota(self.per_minute_and_user, spent_within_seconds=USER_LOT_SECONDS + TRANSPORT_SECONDS)


@dataclass(frozen=True, slots=True)
class Headroom:
    """How much of the quotas is left."""

    calls_today: int
    calls_per_day: int
    projected_calls: int
    """By midnight, if the day goes on as it went so far; its first hour counts as a whole one."""
    seconds_to_midnight: float
    """Until Google counts from zero again."""
    project_factor: float
    """Share of the project's rate in force; below 1 Google lately refused several tenants at once."""
    project_fill: float
    """How full the project's bucket is; below 0 processes wait for it."""
    calls_per_minute: float | None
    """Mean over the last ten minutes, from the runs that finished in them; None when none did."""

    @property
    def share_used(self) -> float:
        """Calls of today, relative to the daily budget."""
        return self.calls_today / self.calls_per_day

    @property
    def is_short(self) -> bool:
        """Whether somebody should look: the budget is nearly used, or will be before midnight."""
        return self.share_used >= DAILY_WARNING_SHARE or self.projected_calls > self.calls_per_day

    @property
    def is_used_up(self) -> bool:
        """Whether the sync stands still until midnight."""
        return self.calls_today >= self.calls_per_day


class CallGate(Protocol):
    """What a transport asks before each call."""

    def admit(self) -> AbstractContextManager[None]:
        """Wait until a call may be sent, and hold its place while it is under way.

        Raises:
            ThrottledError: the wait would be too long.
        """

    def limited(self, retry_after_seconds: float | None = None) -> None:
        """Google answered that there were too many calls (429, rateLimitExceeded, userRateLimitExceeded)."""


class Unlimited:
    """A gate that is always open."""

    def admit(self) -> AbstractContextManager[None]:
        """See `CallGate.admit`."""
        return nullcontext()

    def limited(self, retry_after_seconds: float | None = None) -> None:
        """See `CallGate.limited`."""


UNLIMITED: Final = Unlimited()


def account_key(google_account: str | None, connection_id: UUID) -> bytes:
    """Name the bucket of a Google account.

    Args:
        google_account: its address; unknown accounts are told apart by their connection.
        connection_id: of the connection.

    Returns:
        SHA-256 of it.
    """
    return hashlib.sha256((google_account or str(connection_id)).encode()).digest()


# The moment a statement began is one value for all of it, read before it waits for the row's lock. Then another
# process's moment may be later; a bucket never goes back in time, unless the server's clock was set back. Then the next
# reservation is not refused, because a refusal writes nothing and the bucket would wait for the old time to come.
_LEVEL = sql.SQL(
    "least({capacity}, b.tokens + {rate} * greatest(0, extract(epoch FROM {at} - b.refilled_at)::double precision))"
)
_SET_BACK = sql.SQL("b.refilled_at > excluded.refilled_at + interval '1 second'")
_REFILLED_AT = sql.SQL(
    "CASE WHEN {} THEN excluded.refilled_at ELSE greatest(b.refilled_at, excluded.refilled_at) END"
).format(_SET_BACK)
_FACTOR = sql.SQL(
    "least(1, b.factor + coalesce(greatest(0, extract(epoch FROM {at} - b.factor_at)::double precision), 0) "
    "/ {recovery})"
)


_TAKE = sql.SQL("""
    WITH moment AS MATERIALIZED (SELECT clock_timestamp() AS at), taken AS (
        INSERT INTO sync.call_buckets AS b (scope, key, tokens, refilled_at)
        SELECT 'project', '', %(capacity)s::float8 - %(calls)s, at FROM moment
        ON CONFLICT (scope, key) DO UPDATE
        SET tokens = {level} - %(calls)s / {factor_before}, refilled_at = {refilled_at}
        WHERE {level} - %(calls)s / {factor_before} >= %(lowest)s::float8 OR {set_back}
        RETURNING tokens, {factor} AS factor
    ), today AS (
        INSERT INTO sync.call_days AS d (day, calls)
        SELECT (at AT TIME ZONE {zone})::date, %(calls)s FROM moment WHERE EXISTS (SELECT FROM taken)
        ON CONFLICT (day) DO UPDATE SET calls = d.calls + excluded.calls
        WHERE d.calls + excluded.calls <= %(per_day)s
        RETURNING day
    )
    SELECT tokens, factor, day FROM taken LEFT JOIN today ON true
    """)


def _level(rate: Rate, at: str) -> sql.Composed:
    return _LEVEL.format(capacity=float(rate.capacity), rate=rate.per_second, at=sql.SQL(at))


def _factor(at: str) -> sql.Composed:
    return _FACTOR.format(recovery=FACTOR_RECOVERY_SECONDS, at=sql.SQL(at))


def fit_plans(plans: Sequence[Mapping[bytes, int]], limits: QuotaLimits) -> list[dict[bytes, int]]:
    """Cut the plans of several workers so that together they ask no account for more than one reservation gives.

    Args:
        plans: account key to number of calls, of each worker; several may use one account.
        limits: the quotas.

    Returns:
        The plans in the same order. Their sums are what to reserve, each is what to grant to that worker's gates.
    """
    room: dict[bytes, int] = {}
    fitted = []
    for plan in plans:
        mine = {}
        for key, calls in plan.items():
            left = room.get(key, limits.user_rate.capacity)
            mine[key] = min(calls, left)
            room[key] = left - mine[key]
        fitted.append(mine)
    return fitted


def reserve_users(
    connection: Connection,
    planned: Mapping[bytes, int],
    limits: QuotaLimits,
    *,
    longest_wait_seconds: float = USER_WAIT_SECONDS,
) -> Mapping[bytes, float]:
    """Reserve calls of several users, in one statement.

    Hand each answer to `UserQuota.granted` soon, together with the calls that were planned. Where several workers use
    one account, `fit_plans` says how many calls are whose.

    Args:
        connection: within a transaction; short, because it holds the users' buckets until it ends.
        planned: account key to number of calls; no more than the bucket's capacity is reserved.
        limits: the quotas.
        longest_wait_seconds: a user who would have to wait longer gets nothing.

    Returns:
        Account key to seconds until the calls may be sent. More than `longest_wait_seconds`: nothing was reserved, ask
        again then.
    """
    rate = limits.user_rate
    wanted = {key: float(min(calls, rate.capacity)) for key, calls in planned.items() if calls > 0}
    if not wanted:
        return {}
    level = _level(rate, "excluded.refilled_at")
    values = {
        "keys": list(wanted),
        "calls": list(wanted.values()),
        "capacity": float(rate.capacity),
        "lowest": -longest_wait_seconds * rate.per_second,
    }
    rows = connection.execute(
        sql.SQL("""
            WITH moment AS MATERIALIZED (SELECT clock_timestamp() AS at)
            INSERT INTO sync.call_buckets AS b (scope, key, tokens, refilled_at)
            SELECT 'user', w.key, %(capacity)s::float8 - w.calls, moment.at
            FROM unnest(%(keys)s::bytea[], %(calls)s::float8[]) AS w (key, calls), moment
            ORDER BY w.key
            ON CONFLICT (scope, key) DO UPDATE
            SET tokens = {level} - (%(capacity)s::float8 - excluded.tokens), refilled_at = {refilled_at}
            WHERE {level} - (%(capacity)s::float8 - excluded.tokens) >= %(lowest)s::float8 OR {set_back}
            RETURNING key, tokens
            """).format(level=level, refilled_at=_REFILLED_AT, set_back=_SET_BACK),
        values,
    ).fetchall()
    waits = {bytes(key): max(0.0, -tokens / rate.per_second) for key, tokens in rows}
    refused = wanted.keys() - waits.keys()
    if refused:
        rows = connection.execute(
            sql.SQL("SELECT key, {} FROM sync.call_buckets b WHERE scope = 'user' AND key = ANY(%s)").format(
                _level(rate, "clock_timestamp()")
            ),
            [list(refused)],
        ).fetchall()
        for key, tokens in rows:
            wait = (wanted[bytes(key)] - tokens) / rate.per_second
            waits[bytes(key)] = max(wait, math.nextafter(longest_wait_seconds, math.inf))
    return waits


def headroom(connection: Connection, limits: QuotaLimits) -> Headroom:
    """Read how much of the quotas is left.

    Args:
        connection: within a transaction.
        limits: the quotas.

    Returns:
        The numbers of today, by the server's clock and Pacific time.
    """
    row = connection.execute(
        sql.SQL("""
            WITH moment AS MATERIALIZED (
                SELECT at, (at AT TIME ZONE {zone})::date AS day FROM (SELECT clock_timestamp() AS at) AS clock
            ), bucket AS (
                SELECT {level} AS level, {factor} AS factor
                FROM sync.call_buckets b, moment WHERE b.scope = 'project' AND b.key = ''
            )
            SELECT coalesce((SELECT calls FROM sync.call_days WHERE day = moment.day), 0),
                extract(epoch FROM at - (day::timestamp AT TIME ZONE {zone}))::float8,
                extract(epoch FROM ((day + 1)::timestamp AT TIME ZONE {zone}) - at)::float8,
                (SELECT factor FROM bucket), (SELECT level FROM bucket),
                (SELECT sum(api_calls) / 10.0 FROM sync.runs WHERE finished_at > at - interval '10 minutes')::float8
            FROM moment
            """).format(
            zone=_ZONE,
            level=_level(limits.project_rate, "moment.at"),
            factor=_factor("moment.at"),
        )
    ).fetchone()
    if row is None:
        raise AssertionError("a query over one moment returns one row")
    calls, elapsed, remaining, factor, level, per_minute = row
    per_second = calls / max(elapsed, SHORTEST_PROJECTION_SECONDS)
    return Headroom(
        calls_today=calls,
        calls_per_day=limits.per_day,
        projected_calls=round(calls + per_second * remaining),
        seconds_to_midnight=remaining,
        project_factor=1.0 if factor is None else factor,
        project_fill=1.0 if level is None else level / limits.project_rate.capacity,
        calls_per_minute=per_minute,
    )


def purge(connection: Connection) -> int:
    """Forget the users who made no call lately; their buckets are full, which an absent one is too.

    Args:
        connection: within a transaction.

    Returns:
        How many were forgotten.
    """
    return connection.execute(
        "DELETE FROM sync.call_buckets WHERE scope = 'user' AND refilled_at < now() - %s * interval '1 day'",
        [IDLE_DAYS],
    ).rowcount


class AdaptiveLimit:
    """How many calls may be under way at a time: one more for a limit's worth of successes, half on congestion.

    Thread-safe. It starts at the most it allows and never falls below 1.
    """

    def __init__(self, most: int, *, clock: Callable[[], float]) -> None:
        self._most = float(most)
        self._clock = clock
        self._limit = float(most)
        self._under_way = 0
        self._halved_at = -math.inf
        self._changed = threading.Condition()

    @property
    def limit(self) -> int:
        """Calls that may be under way now."""
        return int(self._limit)

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Wait for a place and hold it; others go on when it is left, however it is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._under_way < self.limit)
            self._under_way += 1
        try:
            yield
        finally:
            with self._changed:
                self._under_way -= 1
                self._changed.notify()

    def succeeded(self) -> None:
        """Google answered as it should."""
        with self._changed:
            self._limit = min(self._most, self._limit + 1.0 / self._limit)
            self._changed.notify()

    def congested(self) -> None:
        """Google asks the project for fewer calls; halves at most once a second."""
        with self._changed:
            now = self._clock()
            if now - self._halved_at >= CONGESTION_PAUSE_SECONDS:
                self._halved_at = now
                self._limit = max(1.0, self._limit / 2.0)


@dataclass(slots=True)
class _Lot:
    """Reserved calls: the last falls due after `wait_seconds`, each before it `spacing_seconds` earlier."""

    reserved_at: float
    calls: int
    wait_seconds: float
    spacing_seconds: float
    lifetime_seconds: float
    taken: int = 0
    expired: int = 0

    @property
    def left(self) -> int:
        return self.calls - self.taken - self.expired

    def take(self, now: float) -> float | None:
        """Take a call; return when it falls due, None when no call is left that may still be spent."""
        while self.left:
            later = (self.left - 1) * self.spacing_seconds
            due = self.reserved_at + max(0.0, self.wait_seconds - later)
            if now <= due + self.lifetime_seconds:
                self.taken += 1
                return due
            self.expired += 1
        return None


@dataclass(slots=True)
class _ProjectLot(_Lot):
    price: float = 1.0
    day: date = field(default=date.min)


class CallQuota:
    """The quotas as one process keeps them; makes a `UserQuota` for each connection. Thread-safe."""

    def __init__(
        self,
        shard: Shard,
        *,
        limits: QuotaLimits,
        max_in_flight: int,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        """Keep the quotas; nothing is asked yet.

        Args:
            shard: the database that holds the buckets, the same for all processes of the installation.
            limits: Google's quotas.
            max_in_flight: calls this process has under way at most.
            clock: seconds, monotonic.
            sleep: waits that many seconds.
        """
        self.limits = limits
        self._shard = shard
        self._in_flight = AdaptiveLimit(max_in_flight, clock=clock)
        self._clock = clock
        self._sleep = sleep
        self._rate = limits.project_rate
        self._project = threading.Lock()
        self._lot: _ProjectLot | None = None
        self._last_size = 1
        self._last_wait = 0.0
        self._spent = 0
        self._spent_since = clock()
        self._factor = 1.0
        self._asks_again_at = self._midnight = -math.inf
        self._statistics = threading.Lock()
        self._waited_seconds = 0.0
        self._limited: dict[UUID, float] = {}
        self._shrunk_at = -math.inf

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def waited_seconds(self) -> float:
        """Time all threads together have waited for quota."""
        return self._waited_seconds

    @property
    def in_flight(self) -> AdaptiveLimit:
        """The limit on calls under way."""
        return self._in_flight

    def for_user(self, account_key: bytes, tenant_id: UUID) -> "UserQuota":
        """Make the gate of one connection, for one thread.

        Args:
            account_key: see the function of that name.
            tenant_id: whose connection it is.
        """
        return UserQuota(self, account_key, tenant_id)

    def close(self) -> None:
        """Give back what was reserved for the project and not spent."""
        with self._project:
            self._return_unspent()

    def now(self) -> float:
        """Read the injected clock."""
        return self._clock()

    def wait(self, due: float) -> None:
        """Sleep until then and count it.

        Args:
            due: by the injected clock.
        """
        seconds = due - self._clock()
        if seconds > 0.0:
            with self._statistics:
                self._waited_seconds += seconds
            self._sleep(seconds)

    def take(self) -> float:
        """Take one call of the project, from what is reserved or from Postgres.

        Returns:
            When it falls due, by the injected clock.

        Raises:
            ThrottledError: that would be in more than `PROJECT_WAIT_SECONDS`.
            DailyBudgetError: there is none left today.
        """
        with self._project:
            due = self._lot.take(self._clock()) if self._lot else None
            if due is None:
                self._reserve()
                due = self._lot.take(self._clock()) if self._lot else None
            if due is None:
                raise AssertionError("a fresh lot has a call")
            self._spent += 1
            return due

    def note_limited(self, tenant_id: UUID) -> None:
        """Google limited a call of this tenant; when several are limited at the same time, the project slows down.

        Args:
            tenant_id: whose call.
        """
        now = self._clock()
        with self._statistics:
            self._limited[tenant_id] = now
            self._limited = {tenant: at for tenant, at in self._limited.items() if now - at <= LIMITED_WITHIN_SECONDS}
            if len(self._limited) < LIMITED_TENANTS:
                return
            shrinks = now - self._shrunk_at >= CONGESTION_PAUSE_SECONDS
            if shrinks:
                self._shrunk_at = now
        self._in_flight.congested()
        if shrinks:
            with self._shard.transaction() as connection:
                connection.execute(
                    sql.SQL("""
                        WITH moment AS MATERIALIZED (SELECT clock_timestamp() AS at)
                        UPDATE sync.call_buckets b
                        SET factor = greatest(%(lowest)s::float8, {factor} / 2), factor_at = moment.at
                        FROM moment
                        WHERE b.scope = 'project' AND b.key = ''
                          AND (b.factor_at IS NULL
                               OR abs(extract(epoch FROM moment.at - b.factor_at)) >= %(pause)s::float8)
                        """).format(factor=_factor("moment.at")),
                    {"lowest": LOWEST_FACTOR, "pause": FACTOR_PAUSE_SECONDS},
                )

    def reserve_user(self, key: bytes, calls: int) -> float:
        """Reserve calls of one user; see `reserve_users`.

        Args:
            key: of the account.
            calls: how many.

        Returns:
            Seconds until they may be sent.
        """
        with self._shard.transaction() as connection:
            return reserve_users(connection, {key: calls}, self.limits)[key]

    def push_back_user(self, key: bytes, seconds: float) -> None:
        """Let nobody call as this user before.

        Args:
            key: of the account.
            seconds: what Google asked for.
        """
        rate = self.limits.user_rate
        with self._shard.transaction() as connection:
            connection.execute(
                sql.SQL("""
                    INSERT INTO sync.call_buckets AS b (scope, key, tokens, refilled_at)
                    VALUES ('user', %(key)s, %(tokens)s, clock_timestamp())
                    ON CONFLICT (scope, key) DO UPDATE
                    SET tokens = least({level}, excluded.tokens), refilled_at = {refilled_at}
                    """).format(level=_level(rate, "excluded.refilled_at"), refilled_at=_REFILLED_AT),
                {"key": key, "tokens": -seconds * rate.per_second},
            )

    def _reserve(self) -> None:
        now = self._clock()
        if now < self._asks_again_at:
            raise _budget_error(self._midnight - now)
        size = self._next_size(now)
        self._return_unspent()
        lot = self._ask(size) or (self._ask(1) if size > 1 else None)
        if lot is None:
            raise ThrottledError(
                "the project's calls of this minute are taken", retry_after_seconds=self._seconds_until_next()
            )
        self._lot, self._last_size, self._last_wait = lot, lot.calls, lot.wait_seconds
        self._spent, self._spent_since = 0, now

    def _next_size(self, now: float) -> int:
        """One second's worth of this process's calls, at most double the last; an equal share while they are scarce."""
        elapsed = now - self._spent_since
        worth = math.ceil(self._spent / elapsed) if elapsed > 0.0 else self._rate.capacity
        size = min(worth, 2 * self._last_size, self._rate.capacity // 4, self.limits.per_day)
        if self._last_wait > 0.0:
            size = min(size, int(self._rate.per_second * self._factor / SCARCE_RESERVATIONS_PER_SECOND))
        return max(1, size)

    def _ask(self, size: int) -> _ProjectLot | None:
        """Reserve so many calls, or what is left of the day; None when the wait would be too long."""
        try:
            with self._shard.transaction() as connection:
                row = connection.execute(
                    _TAKE.format(
                        zone=_ZONE,
                        level=_level(self._rate, "excluded.refilled_at"),
                        factor_before=_factor("excluded.refilled_at"),
                        factor=_factor("(SELECT at FROM moment)"),
                        refilled_at=_REFILLED_AT,
                        set_back=_SET_BACK,
                    ),
                    {
                        "calls": size,
                        "capacity": float(self._rate.capacity),
                        "lowest": -PROJECT_WAIT_SECONDS * self._rate.per_second,
                        "per_day": self.limits.per_day,
                    },
                ).fetchone()
                if row is None:
                    return None
                tokens, self._factor, day = row
                if day is None:
                    raise _DayUsedUpError  # which rolls back what the bucket gave
        except _DayUsedUpError:
            return self._ask(min(size, self._left_today()))
        return _ProjectLot(
            reserved_at=self._clock(),
            calls=size,
            wait_seconds=max(0.0, -tokens / self._rate.per_second),
            spacing_seconds=1.0 / self._factor / self._rate.per_second,
            lifetime_seconds=PROJECT_LOT_SECONDS,
            price=1.0 / self._factor,
            day=day,
        )

    def _left_today(self) -> int:
        """Calls left of the daily budget.

        Raises:
            DailyBudgetError: none.
        """
        with self._shard.transaction() as connection:
            now = headroom(connection, self.limits)
        left = now.calls_per_day - now.calls_today
        if left < 1:
            self._midnight = self._clock() + now.seconds_to_midnight
            self._asks_again_at = min(self._midnight, self._clock() + BUDGET_RECHECK_SECONDS)
            raise _budget_error(now.seconds_to_midnight)
        return left

    def _seconds_until_next(self) -> float:
        """When a single call would be ready."""
        with self._shard.transaction() as connection:
            now = headroom(connection, self.limits)
        missing = 1.0 / now.project_factor - now.project_fill * self._rate.capacity
        return max(PROJECT_WAIT_SECONDS, missing / self._rate.per_second)

    def _return_unspent(self) -> None:
        """Give back what nobody sent; not to a bucket below zero, where later callers were promised their times."""
        lot, self._lot = self._lot, None
        if lot is None or lot.calls == lot.taken:
            return
        unspent = lot.calls - lot.taken
        with self._shard.transaction() as connection:
            connection.execute(
                sql.SQL("""
                    UPDATE sync.call_buckets b SET tokens = least(%(capacity)s::float8, b.tokens + %(tokens)s::float8)
                    WHERE b.scope = 'project' AND b.key = '' AND {level} >= 0
                    """).format(level=_level(self._rate, "clock_timestamp()")),
                {"capacity": float(self._rate.capacity), "tokens": unspent * lot.price},
            )
            connection.execute("UPDATE sync.call_days SET calls = calls - %s WHERE day = %s", [unspent, lot.day])


class UserQuota:
    """The gate of one connection; satisfies `CallGate`. For one thread at a time."""

    def __init__(self, quota: CallQuota, account_key: bytes, tenant_id: UUID) -> None:
        """See `CallQuota.for_user`."""
        self._quota = quota
        self._key = account_key
        self._tenant_id = tenant_id
        self._lot: _Lot | None = None
        self._lot_size = 1
        self._not_before = -math.inf
        self._was_limited = False

    def granted(self, calls: int, wait_seconds: float, *, reserved_at: float | None = None) -> None:
        """Take over what `reserve_users` gave; each reserved call to one gate only.

        Args:
            calls: that were planned.
            wait_seconds: its answer.
            reserved_at: when that was, by the injected clock; None is just now.
        """
        calls = min(calls, self._quota.limits.user_rate.capacity)
        self._hold(calls, wait_seconds, self._quota.now() if reserved_at is None else reserved_at)

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Wait for the user's, then the project's turn, and hold a place for the call; see `CallGate.admit`.

        The place is taken before the wait for the project: that wait is everybody's, and a call whose turn has come
        must not stand in another queue. A clean exit is a success and lets more calls be under way.

        Raises:
            ThrottledError: the user would wait more than `USER_WAIT_SECONDS`, the project `PROJECT_WAIT_SECONDS`.
            DailyBudgetError: no call is left today.
        """
        quota = self._quota
        lot, due = self._take()
        quota.wait(due)
        with quota.in_flight.slot():
            try:
                due = quota.take()
            except ThrottledError:
                lot.taken -= 1
                raise
            quota.wait(due)
            self._was_limited = False
            yield
            if not self._was_limited:
                quota.in_flight.succeeded()

    def limited(self, retry_after_seconds: float | None = None) -> None:
        """Google answered 429, rateLimitExceeded or userRateLimitExceeded to this user's call.

        Args:
            retry_after_seconds: what Google asked for; every other connection of the account keeps to it too.
        """
        self._was_limited = True
        if retry_after_seconds is not None and retry_after_seconds > 0.0:
            self._lot = None
            self._not_before = self._quota.now() + retry_after_seconds
            self._quota.push_back_user(self._key, retry_after_seconds)
        self._quota.note_limited(self._tenant_id)

    def _take(self) -> tuple[_Lot, float]:
        now = self._quota.now()
        due = self._lot.take(now) if self._lot else None
        if due is None and now >= self._not_before:
            rate = self._quota.limits.user_rate
            size = min(self._lot_size, USER_LOT, rate.capacity)
            self._lot_size = 2 * size
            wait = self._quota.reserve_user(self._key, size)
            if wait > USER_WAIT_SECONDS and size > 1:
                size, wait = 1, self._quota.reserve_user(self._key, 1)
            self._hold(size, wait, self._quota.now())
            due = self._lot.take(self._quota.now()) if self._lot else None
        if self._lot is None or due is None:
            raise ThrottledError(
                "this user's calls of this minute are taken", retry_after_seconds=self._not_before - now
            )
        return self._lot, due

    def _hold(self, calls: int, wait_seconds: float, at: float) -> None:
        if wait_seconds > USER_WAIT_SECONDS:
            self._lot, self._not_before = None, at + wait_seconds
        elif calls > 0:
            spacing = 1.0 / self._quota.limits.user_rate.per_second
            self._lot = _Lot(at, calls, wait_seconds, spacing, USER_LOT_SECONDS)


class _DayUsedUpError(Exception):
    """The bucket had calls, the day has not."""


def _budget_error(seconds: float) -> DailyBudgetError:
    return DailyBudgetError("SYNC_CALLS_PER_DAY is used up", retry_after_seconds=max(0.0, seconds))
