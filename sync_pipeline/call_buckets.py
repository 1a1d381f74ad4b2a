"""Google's quotas as all processes share them: token buckets and the daily budget, in Postgres.

Belongs here: how a quota becomes a bucket, and every statement over `sync.call_buckets` and `sync.call_days`.
Does not: what one process keeps, who waits, what a 429 leads to (`sync_pipeline.quota`).

The buckets are filled by the database's clock. A reservation may drive a bucket below zero; whoever made it waits until
it is back at zero. For each quota Q a minute this holds: no 60 seconds see more than Q calls, wherever they begin. A
bucket of capacity C that gains R a second lets at most C + R x t calls fall due in any t seconds, as long as nobody
reserves more than C at once. A call is sent within s seconds of falling due, so calls sent within 60 seconds fell due
within 60 + s, and C + R x (60 + s) = Q.

The project can be slowed down by a factor: then a call costs more tokens. A smaller refill would do the same, but would
move what has been promised; with prices the promise holds all the time.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Final, Self
from uuid import UUID

from psycopg import sql

from scaling.databases import Connection
from scaling.settings import SyncSettings

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

LOWEST_FACTOR = 1 / 16
FACTOR_RECOVERY_SECONDS = 300.0
"""From nothing to the full rate, linearly: additive increase, multiplicative decrease."""
FACTOR_PAUSE_SECONDS = 5.0
"""The answers to calls that were under way when the rate was halved do not halve it again."""

DAILY_WARNING_SHARE = 0.8
"""Of the daily budget: warn when so much is used."""
SHORTEST_PROJECTION_SECONDS = 3600.0
IDLE_DAYS = 1

_ZONE: Final = "America/Los_Angeles"  # "daily quotas reset at midnight Pacific time"


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


@dataclass(frozen=True, slots=True)
class ProjectReservation:
    """Calls of the project that one process may send."""

    calls: int
    wait_seconds: float
    """Until the last of them may be sent."""
    factor: float
    """Share of the project's rate in force; each call cost 1 / factor tokens."""
    day: date
    """Whose budget they are of."""


class DayUsedUpError(Exception):
    """The bucket had calls, the day has not; the transaction is to be rolled back, and with it what the bucket gave."""


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


def reserve_users(connection: Connection, planned: Mapping[bytes, int], limits: QuotaLimits) -> Mapping[bytes, float]:
    """Reserve calls of several users, in one statement.

    Hand each answer to `quota.UserQuota.granted` soon, together with the calls that were planned. Where several workers
    use one account, `fit_plans` says how many calls are whose.

    Args:
        connection: within a transaction; short, because it holds the users' buckets until it ends.
        planned: account key to number of calls; no more than the bucket's capacity is reserved.
        limits: the quotas.

    Returns:
        Account key to seconds until the calls may be sent. More than `USER_WAIT_SECONDS`: nothing was reserved, ask
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
        "lowest": -USER_WAIT_SECONDS * rate.per_second,
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
            waits[bytes(key)] = max(wait, math.nextafter(USER_WAIT_SECONDS, math.inf))
    return waits


def push_back_user(connection: Connection, key: bytes, seconds: float, limits: QuotaLimits) -> None:
    """Let nobody call as this user before.

    Args:
        connection: within a transaction.
        key: of the account.
        seconds: what Google asked for.
        limits: the quotas.
    """
    rate = limits.user_rate
    connection.execute(
        sql.SQL("""
            INSERT INTO sync.call_buckets AS b (scope, key, tokens, refilled_at)
            VALUES ('user', %(key)s, %(tokens)s, clock_timestamp())
            ON CONFLICT (scope, key) DO UPDATE
            SET tokens = least({level}, excluded.tokens), refilled_at = {refilled_at}
            """).format(level=_level(rate, "excluded.refilled_at"), refilled_at=_REFILLED_AT),
        {"key": key, "tokens": -seconds * rate.per_second},
    )


def reserve_project(connection: Connection, calls: int, limits: QuotaLimits) -> ProjectReservation | None:
    """Reserve calls of the project and of the day, in one statement.

    Args:
        connection: within a transaction; short, because it holds everybody's bucket until it ends.
        calls: how many; no more than the bucket's capacity.
        limits: the quotas.

    Returns:
        The reservation; None when the last call would have to wait more than `PROJECT_WAIT_SECONDS`.

    Raises:
        DayUsedUpError: the day has not so many calls left.
    """
    rate = limits.project_rate
    row = connection.execute(
        sql.SQL("""
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
            """).format(
            zone=_ZONE,
            level=_level(rate, "excluded.refilled_at"),
            factor_before=_factor("excluded.refilled_at"),
            factor=_factor("(SELECT at FROM moment)"),
            refilled_at=_REFILLED_AT,
            set_back=_SET_BACK,
        ),
        {
            "calls": calls,
            "capacity": float(rate.capacity),
            "lowest": -PROJECT_WAIT_SECONDS * rate.per_second,
            "per_day": limits.per_day,
        },
    ).fetchone()
    if row is None:
        return None
    tokens, factor, day = row
    if day is None:
        raise DayUsedUpError
    return ProjectReservation(calls, max(0.0, -tokens / rate.per_second), factor, day)


def return_project(connection: Connection, reserved: ProjectReservation, unspent: int, limits: QuotaLimits) -> None:
    """Give back what nobody sent; not to a bucket below zero, where later callers were promised their times.

    Args:
        connection: within a transaction.
        reserved: the reservation.
        unspent: how many of its calls.
        limits: the quotas.
    """
    rate = limits.project_rate
    connection.execute(
        sql.SQL("""
            UPDATE sync.call_buckets b SET tokens = least(%(capacity)s::float8, b.tokens + %(tokens)s::float8)
            WHERE b.scope = 'project' AND b.key = '' AND {level} >= 0
            """).format(level=_level(rate, "clock_timestamp()")),
        {"capacity": float(rate.capacity), "tokens": unspent / reserved.factor},
    )
    connection.execute("UPDATE sync.call_days SET calls = calls - %s WHERE day = %s", [unspent, reserved.day])


def slow_project(connection: Connection) -> None:
    """Halve the project's rate, down to `LOWEST_FACTOR`; not again within `FACTOR_PAUSE_SECONDS`.

    Args:
        connection: within a transaction.
    """
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
