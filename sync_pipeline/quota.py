"""How one process spends the calls that Google's quotas allow: who waits and how long, what a 429 leads to.

Belongs here: the gate before each call, what a process has reserved, how many of its calls are under way.
Does not: the buckets that all processes share (`sync_pipeline.call_buckets`), sending calls, recognising a 429
(`sync_pipeline.google_calendar`), parking a connection (the caller).

Statements do not grow with calls. A process reserves about one second's worth of its own calls for the project and
spends them by itself; what is older than `PROJECT_LOT_SECONDS` is not spent but given back. While the project's bucket
is empty all processes reserve the same small number, so each gets an equal share.

When Google limits several tenants at the same time it means the project: then all processes slow down.
"""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import date
from types import TracebackType
from typing import Final, Protocol, Self
from uuid import UUID

from scaling.databases import Shard
from sync_pipeline.call_buckets import (
    PROJECT_LOT_SECONDS,
    PROJECT_WAIT_SECONDS,
    USER_LOT_SECONDS,
    USER_WAIT_SECONDS,
    DayUsedUpError,
    ProjectReservation,
    QuotaLimits,
    headroom,
    push_back_user,
    reserve_project,
    reserve_users,
    return_project,
    slow_project,
)
from sync_pipeline.errors import DailyBudgetError, ThrottledError

SCARCE_RESERVATIONS_PER_SECOND = 8
"""Of all processes together, while they wait for the project's bucket."""
USER_LOT = 16
"""Most calls a connection reserves at a time when it needs more than planned."""

LIMITED_TENANTS = 3
LIMITED_WITHIN_SECONDS = 10.0
"""Google limiting so many tenants within so many seconds means the project; fewer, these tenants' own affair."""
CONGESTION_PAUSE_SECONDS = 1.0
BUDGET_RECHECK_SECONDS = 60.0


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

    def congested(self) -> bool:
        """Google asks the project for fewer calls; halves at most once a second.

        Returns:
            Whether it did.
        """
        with self._changed:
            now = self._clock()
            halves = now - self._halved_at >= CONGESTION_PAUSE_SECONDS
            if halves:
                self._halved_at = now
                self._limit = max(1.0, self._limit / 2.0)
            return halves


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
        self._reserved = ProjectReservation(calls=1, wait_seconds=0.0, factor=1.0, day=date.min)
        self._lot: _Lot | None = None
        self._spent = 0
        self._spent_since = clock()
        self._asks_again_at = self._midnight = -math.inf
        self._statistics = threading.Lock()
        self._waited_seconds = 0.0
        self._limited: dict[UUID, float] = {}

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
            account_key: see `call_buckets.account_key`.
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
            while self._lot is None or (due := self._lot.take(self._clock())) is None:
                self._lot = self._reserve()
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
        if self._in_flight.congested():
            with self._shard.transaction() as connection:
                slow_project(connection)

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
        with self._shard.transaction() as connection:
            push_back_user(connection, key, seconds, self.limits)

    def _reserve(self) -> _Lot:
        now = self._clock()
        if now < self._asks_again_at:
            raise _budget_error(self._midnight - now)
        size = self._next_size(now)
        self._return_unspent()
        reserved = self._ask(size) or (self._ask(1) if size > 1 else None)
        if reserved is None:
            raise ThrottledError(
                "the project's calls of this minute are taken", retry_after_seconds=self._seconds_until_next()
            )
        self._reserved, self._spent, self._spent_since = reserved, 0, now
        spacing = 1.0 / reserved.factor / self._rate.per_second
        return _Lot(self._clock(), reserved.calls, reserved.wait_seconds, spacing, PROJECT_LOT_SECONDS)

    def _next_size(self, now: float) -> int:
        """One second's worth of this process's calls, at most double the last; an equal share while they are scarce."""
        elapsed = now - self._spent_since
        worth = math.ceil(self._spent / elapsed) if elapsed > 0.0 else self._rate.capacity
        last = self._reserved
        size = min(worth, 2 * last.calls, self._rate.capacity // 4, self.limits.per_day)
        if last.wait_seconds > 0.0:
            size = min(size, int(self._rate.per_second * last.factor / SCARCE_RESERVATIONS_PER_SECOND))
        return max(1, size)

    def _ask(self, size: int) -> ProjectReservation | None:
        """Reserve so many calls, or what is left of the day; None when the wait would be too long."""
        try:
            with self._shard.transaction() as connection:
                return reserve_project(connection, size, self.limits)
        except DayUsedUpError:
            return self._ask(min(size, self._left_today()))

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
        lot, self._lot = self._lot, None
        if lot is None or lot.calls == lot.taken:
            return
        with self._shard.transaction() as connection:
            return_project(connection, self._reserved, lot.calls - lot.taken, self.limits)


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
        """Take over what `call_buckets.reserve_users` gave; each reserved call to one gate only.

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
        while self._lot is None or (due := self._lot.take(self._quota.now())) is None:
            now = self._quota.now()
            if now < self._not_before:
                raise ThrottledError(
                    "this user's calls of this minute are taken", retry_after_seconds=self._not_before - now
                )
            self._reserve()
        return self._lot, due

    def _reserve(self) -> None:
        size = min(self._lot_size, USER_LOT, self._quota.limits.user_rate.capacity)
        self._lot_size = 2 * size
        wait = self._quota.reserve_user(self._key, size)
        if wait > USER_WAIT_SECONDS and size > 1:
            size, wait = 1, self._quota.reserve_user(self._key, 1)
        self._hold(size, wait, self._quota.now())

    def _hold(self, calls: int, wait_seconds: float, at: float) -> None:
        if wait_seconds > USER_WAIT_SECONDS:
            self._lot, self._not_before = None, at + wait_seconds
        elif calls > 0:
            spacing = 1.0 / self._quota.limits.user_rate.per_second
            self._lot = _Lot(at, calls, wait_seconds, spacing, USER_LOT_SECONDS)


def _budget_error(seconds: float) -> DailyBudgetError:
    return DailyBudgetError("SYNC_CALLS_PER_DAY is used up", retry_after_seconds=max(0.0, seconds))
