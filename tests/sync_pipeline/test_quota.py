"""Gates: how many calls a minute, a user, a day and at a time, whatever several processes and threads do."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from devstack.google_calendar import Simulator
from devstack.servers import Database
from scaling.databases import Connection, Shard
from sync_pipeline import call_buckets
from sync_pipeline import quota as quotas
from sync_pipeline.call_buckets import QuotaLimits, Rate, account_key, fit_plans, headroom, reserve_users
from sync_pipeline.errors import DailyBudgetError, RateLimitedError, ThrottledError
from sync_pipeline.quota import UNLIMITED, AdaptiveLimit, CallGate, CallQuota, UserQuota
from tests.sync_pipeline import virtual_clock
from tests.sync_pipeline.conftest import google_calendar

START = datetime(2026, 6, 1, 12, tzinfo=UTC)  # 05:00 in California
WIDE = 10_000_000
KEY = account_key("somebody@example.com", uuid4())


class VirtualTime:
    """One time for Postgres, the processes and, if given, the simulator; it passes when everybody sleeps."""

    def __init__(self, admin_dsn: str, at: datetime = START, simulator: Simulator | None = None) -> None:
        virtual_clock.install(admin_dsn, at)
        self.admin = psycopg.connect(admin_dsn, autocommit=True)
        self.started = at
        self.simulator = simulator
        self.sleepers = 1
        self._now = 0.0
        self._wakes: list[float] = []
        self._changed = threading.Condition()

    def clock(self) -> float:
        return self._now

    def pass_by(self, seconds: float) -> None:
        self._move(self._now + seconds)

    def restart(self) -> None:
        self._move(0.0)

    def sleep(self, seconds: float) -> None:
        with self._changed:
            wake = self._now + seconds
            self._wakes.append(wake)
            self._wake_the_first()
            self._changed.wait_for(lambda: self._now >= wake)

    def leave(self) -> None:
        with self._changed:
            self.sleepers -= 1
            self._wake_the_first()

    def _wake_the_first(self) -> None:
        if self._wakes and len(self._wakes) >= self.sleepers:
            self._move(max(self._now, min(self._wakes)))
            self._wakes = [wake for wake in self._wakes if wake > self._now]
            self._changed.notify_all()

    def _move(self, now: float) -> None:
        self._now = now
        moment = self.started + timedelta(seconds=now)
        virtual_clock.set(self.admin, moment)
        if self.simulator:
            self.simulator.set_clock(moment)


class CountingShard(Shard):
    transactions = 0

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        self.transactions += 1
        with super().transaction() as connection:
            yield connection


@pytest.fixture
def time(database: Database) -> Iterator[VirtualTime]:
    made = VirtualTime(database.admin_dsn)
    yield made
    made.admin.close()


@pytest.fixture
def shard(database: Database, time: VirtualTime) -> Iterator[CountingShard]:
    made = CountingShard("main", virtual_clock.dsn(database.dsn))
    yield made
    made.close()


MakeQuota = Callable[..., CallQuota]


@pytest.fixture
def make(shard: Shard, time: VirtualTime) -> MakeQuota:
    """A process: `make(per_minute=…, per_minute_and_user=…, per_day=…)`, unlimited where nothing is said."""

    def made(max_in_flight: int = 8, **limits: int) -> CallQuota:
        wide = {"per_minute": WIDE, "per_minute_and_user": WIDE, "per_day": WIDE, **limits}
        return CallQuota(
            shard, limits=QuotaLimits(**wide), max_in_flight=max_in_flight, clock=time.clock, sleep=time.sleep
        )

    return made


def gate(quota: CallQuota, tenant: UUID | None = None, key: bytes = KEY) -> UserQuota:
    return quota.for_user(key, tenant or uuid4())


def call(gate: CallGate) -> None:
    with gate.admit():
        pass


def most_in_a_minute(calls: list[float]) -> int:
    """The fullest window of 60 seconds, wherever it begins; a millisecond is lent for rounding."""
    calls = sorted(calls)
    most, first = 0, 0
    for last, at in enumerate(calls):
        while calls[first] <= at - 59.999:
            first += 1
        most = max(most, last - first + 1)
    return most


def one(connection: psycopg.Connection[tuple[object, ...]], statement: str) -> object:
    row = connection.execute(statement.encode()).fetchone()
    return row[0] if row else None


# -- never more than the quota ---------------------------------------------------------------------------------------


@given(
    quota=st.integers(1, 300),
    steps=st.lists(
        st.tuples(st.floats(0, 40), st.integers(1, 40), st.sampled_from([1.0, 1.5, 2.0, 16.0]), st.floats(0, 5)),
        max_size=200,
    ),
)
@example(quota=100, steps=[(0.0, 10, 1.0, 5.0)] + [(0.65, 1, 1.0, max(0.0, 5 - call / 1.5)) for call in range(1, 120)])
@example(quota=1, steps=[(1.0, 1, 1.0, 0.0)] * 200)
@settings(deadline=None)
def test_no_minute_sees_more_calls_than_the_quota_however_late_each_is_spent(
    quota: int, steps: list[tuple[float, int, float, float]]
) -> None:
    rate = Rate.of_quota(quota, spent_within_seconds=5.0)
    now, tokens, sent = 0.0, float(rate.capacity), []
    for pause, wanted, price, delay in steps:
        now += pause
        level = min(rate.capacity, tokens + pause * rate.per_second)
        calls = min(wanted, rate.capacity)
        tokens = level
        if level - calls * price < -30.0 * rate.per_second:
            continue
        tokens = level - calls * price
        lot = quotas._Lot(now, calls, max(0.0, -tokens / rate.per_second), price / rate.per_second, 2.0)
        while (due := lot.take(now)) is not None:
            sent.append(max(now, due) + delay)

    assert most_in_a_minute(sent) <= quota


@given(
    steps=st.lists(
        st.tuples(st.integers(0, 1), st.one_of(st.just(0.0), st.floats(0, 30)), st.integers(1, 40)), max_size=25
    )
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_two_processes_on_one_postgres_never_exceed_the_project_quota(
    make: MakeQuota, time: VirtualTime, steps: list[tuple[int, float, int]]
) -> None:
    time.admin.execute("TRUNCATE sync.call_buckets")
    time.restart()
    processes = [gate(make(per_minute=120)) for _ in range(2)]
    sent = []
    for process, pause, burst in steps:
        time.pass_by(pause)
        for _ in range(burst):
            with processes[process].admit():
                sent.append(time.clock())

    assert most_in_a_minute(sent) <= 120


@given(
    steps=st.lists(
        st.tuples(st.integers(0, 1), st.floats(0, 20), st.integers(0, 20), st.integers(1, 20), st.floats(0, 15)),
        max_size=25,
    )
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_two_connections_of_one_account_never_exceed_the_users_quota(
    make: MakeQuota, shard: Shard, time: VirtualTime, steps: list[tuple[int, float, int, int, float]]
) -> None:
    time.admin.execute("TRUNCATE sync.call_buckets")
    time.restart()
    quota = make(per_minute_and_user=60)
    connections = [gate(quota), gate(quota)]
    sent = []
    for which, pause, planned, burst, delay in steps:
        time.pass_by(pause)
        with shard.transaction() as connection:
            waits = reserve_users(connection, {KEY: planned}, quota.limits)
        for key in waits:
            assert key == KEY
            connections[which].granted(planned, waits[key])
        time.pass_by(delay)
        for _ in range(burst):
            try:
                with connections[which].admit():
                    sent.append(time.clock())
            except ThrottledError as error:
                time.pass_by(error.retry_after_seconds)

    assert most_in_a_minute(sent) <= 60


def test_google_never_refuses_two_processes_that_call_as_fast_as_they_may(
    database: Database, google: Simulator
) -> None:
    user = google.add_user("two@example.com")
    time = VirtualTime(database.admin_dsn, START, google)
    google.freeze()
    time.restart()
    google.configure(quota_project_per_minute=200)
    google.reset_counts()
    time.sleepers = 2

    def process() -> int:
        shard = Shard("main", virtual_clock.dsn(database.dsn))
        limits = QuotaLimits(200, WIDE, WIDE)
        made = 0
        with (
            CallQuota(shard, limits=limits, max_in_flight=4, clock=time.clock, sleep=time.sleep) as quota,
            httpx.Client(
                base_url=google.url, headers={"Authorization": f"Bearer {user.access_token}"}, trust_env=False
            ) as client,
        ):
            mine = gate(quota)
            while time.clock() < 120.0:
                with mine.admit():
                    client.get("/calendar/v3/users/me/calendarList")
                    made += 1
        time.leave()
        shard.close()
        return made

    try:
        with ThreadPoolExecutor(2) as pool:
            first, second = (future.result() for future in [pool.submit(process), pool.submit(process)])
    finally:
        google.freeze(frozen=False)
        time.admin.close()

    assert google.counts().count(status=200) == first + second
    assert google.counts().count() == first + second, "an answer other than 200"
    assert first + second >= 2 * 200 * 0.8
    assert abs(first - second) <= 0.1 * (first + second), "an even share each"


# -- cost and fairness -----------------------------------------------------------------------------------------------


def test_a_busy_process_asks_postgres_about_once_a_second_not_once_a_call(
    make: MakeQuota, shard: CountingShard, time: VirtualTime
) -> None:
    quota = make(per_minute=10_000)
    for _ in range(2000):
        time.pass_by(0.02)
        planned = gate(quota)
        planned.granted(1, 0.0)
        call(planned)

    assert shard.transactions <= 50, "2,000 calls in 40 seconds"


def test_while_calls_are_scarce_a_process_that_starts_late_gets_its_share_at_once(
    make: MakeQuota, time: VirtualTime
) -> None:
    made: Counter[str] = Counter()
    time.sleepers = 2

    def process(name: str, begins: float) -> None:
        mine = gate(make(per_minute=6000))
        time.sleep(begins)
        while time.clock() < 45.0:
            call(mine)
            if time.clock() > 30.0:
                made[name] += 1
        time.leave()

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(process, "early", 0.001), pool.submit(process, "late", 29.0)]:
            future.result()

    assert made["late"] >= 0.8 * made["early"]
    assert made["early"] + made["late"] >= 0.9 * 15 * QuotaLimits(per_minute=6000).project_rate.per_second


def test_many_threads_of_a_process_spend_each_reserved_call_once(
    make: MakeQuota, shard: Shard, time: VirtualTime
) -> None:
    quota = make()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: call(gate(quota, key=uuid4().bytes)), range(300)))
    quota.close()

    assert one(time.admin, "SELECT sum(calls) FROM sync.call_days") == 300


def test_calls_that_were_reserved_and_not_made_are_given_back(make: MakeQuota, time: VirtualTime) -> None:
    with make(per_minute=6000) as quota:
        mine = gate(quota)
        for _ in range(100):
            call(mine)
        reserved = one(time.admin, "SELECT calls FROM sync.call_days")

    assert isinstance(reserved, int)
    assert reserved > 100
    assert one(time.admin, "SELECT calls FROM sync.call_days") == 100
    assert one(time.admin, "SELECT tokens FROM sync.call_buckets WHERE scope = 'project'") == 500


def test_what_a_process_reserved_and_left_lying_is_given_back_not_spent_in_a_later_burst(
    make: MakeQuota, shard: CountingShard, time: VirtualTime
) -> None:
    quota = make(per_minute=6000)

    def burst(calls: int) -> None:
        for _ in range(calls):
            planned = gate(quota)
            planned.granted(1, 0.0)
            call(planned)

    burst(100)
    before = shard.transactions
    time.pass_by(call_buckets.PROJECT_LOT_SECONDS)
    burst(1)
    assert shard.transactions == before, "still good"
    time.pass_by(1.0)
    burst(1)
    assert shard.transactions == before + 2, "given back and reserved anew"
    quota.close()
    assert one(time.admin, "SELECT calls FROM sync.call_days") == 102


# -- waiting and being refused ---------------------------------------------------------------------------------------


def test_a_user_who_would_wait_long_is_refused_and_loses_nothing(
    make: MakeQuota, shard: Shard, time: VirtualTime
) -> None:
    quota = make(per_minute_and_user=60)
    with shard.transaction() as connection:
        for _ in range(9):
            reserve_users(connection, {KEY: 1}, quota.limits)
    before = one(time.admin, "SELECT tokens FROM sync.call_buckets WHERE scope = 'user'")
    with pytest.raises(ThrottledError) as refused:
        call(gate(quota))

    per_call = 1 / quota.limits.user_rate.per_second
    assert one(time.admin, "SELECT tokens FROM sync.call_buckets WHERE scope = 'user'") == before == -1.0
    assert refused.value.retry_after_seconds == pytest.approx(2 * per_call)
    time.pass_by(refused.value.retry_after_seconds)
    call(gate(quota))
    assert quota.waited_seconds == 0.0


def test_a_refused_user_is_refused_again_without_asking_postgres(make: MakeQuota, shard: CountingShard) -> None:
    mine = gate(make(per_minute_and_user=60))
    mine.granted(4, 7.0)
    before = shard.transactions
    with pytest.raises(ThrottledError) as refused:
        call(mine)

    assert (refused.value.retry_after_seconds, shard.transactions) == (7.0, before)


def test_who_would_wait_long_for_the_project_is_refused_and_the_users_call_is_kept(
    make: MakeQuota, time: VirtualTime
) -> None:
    quota = make(per_minute=6000)
    call(gate(quota))
    quota.close()
    rate = quota.limits.project_rate
    time.admin.execute("UPDATE sync.call_buckets SET tokens = %s WHERE scope = 'project'", [-29.995 * rate.per_second])
    mine = gate(quota)
    mine.granted(1, 0.0)
    for _ in range(2):
        with pytest.raises(ThrottledError) as refused:
            call(mine)
    assert 30.0 <= refused.value.retry_after_seconds < 31.0
    assert mine._lot is not None
    assert mine._lot.left == 1
    assert time.clock() == 0.0

    time.pass_by(1.0)
    call(mine)
    assert quota.waited_seconds == pytest.approx(time.clock() - 1.0) == pytest.approx(29.0, abs=0.1)


def test_calls_that_were_reserved_for_a_user_are_made_without_asking_again(
    make: MakeQuota, shard: CountingShard
) -> None:
    mine = gate(make(per_minute_and_user=600))
    mine.granted(4, 0.0)
    call(mine)
    before = shard.transactions
    for _ in range(3):
        call(mine)
    assert shard.transactions - before <= 2, "the project's calls only"


def test_a_reservation_that_was_left_lying_is_not_spent(make: MakeQuota, time: VirtualTime) -> None:
    quota = make(per_minute_and_user=600)
    mine = gate(quota)
    mine.granted(4, 0.0)
    time.pass_by(call_buckets.USER_LOT_SECONDS + 1)
    call(mine)

    assert one(time.admin, "SELECT tokens FROM sync.call_buckets WHERE scope = 'user'") == 59


def test_workers_that_use_one_account_share_what_was_reserved_for_it_and_spend_it_once(
    make: MakeQuota, shard: Shard, time: VirtualTime
) -> None:
    quota = make(per_minute_and_user=600)
    plans = fit_plans([{KEY: 40, b"other": 1}, {KEY: 40}, {KEY: 5}], quota.limits)
    with shard.transaction() as connection:
        waits = reserve_users(connection, {KEY: 60, b"other": 1}, quota.limits)

    assert plans == [{KEY: 40, b"other": 1}, {KEY: 20}, {KEY: 0}]
    assert waits == {KEY: 0.0, b"other": 0.0}
    for plan in plans:
        mine = gate(quota)
        mine.granted(plan[KEY], waits[KEY])
        for _ in range(plan[KEY]):
            call(mine)
    assert one(time.admin, "SELECT tokens FROM sync.call_buckets WHERE scope = 'user' AND key <> 'other'") == 0


def test_what_was_reserved_long_before_it_is_granted_is_not_spent(make: MakeQuota, time: VirtualTime) -> None:
    mine = gate(make(per_minute_and_user=600))
    time.pass_by(call_buckets.USER_LOT_SECONDS + 1)
    mine.granted(4, 0.0, reserved_at=0.0)
    call(mine)

    assert one(time.admin, "SELECT tokens FROM sync.call_buckets WHERE scope = 'user'") == 59


def test_a_process_that_is_frozen_at_any_moment_goes_on(shard: Shard, time: VirtualTime) -> None:
    for moment in range(30):
        readings = 0

        def clock(frozen_at: int = moment) -> float:
            nonlocal readings
            readings += 1
            if readings == frozen_at:
                time.pass_by(60.0)
            return time.clock()

        with CallQuota(shard, limits=QuotaLimits(), max_in_flight=1, clock=clock, sleep=time.sleep) as quota:
            call(gate(quota))


def test_after_retry_after_no_connection_of_the_account_calls_before(make: MakeQuota, time: VirtualTime) -> None:
    """Case 64."""
    quota = make(per_minute_and_user=600)
    mine, other, stranger = gate(quota), gate(quota), gate(quota, key=uuid4().bytes)
    with mine.admit():
        mine.limited(30.0)

    for limited in (mine, other):
        with pytest.raises(ThrottledError) as refused:
            call(limited)
        assert refused.value.retry_after_seconds == pytest.approx(30.0, abs=0.5)
    call(stranger)
    time.pass_by(30.0)
    call(mine)
    call(other)
    assert time.clock() <= 31.0


def test_a_server_clock_that_is_set_back_does_not_stop_the_calls(make: MakeQuota, time: VirtualTime) -> None:
    quota = make(per_minute=60, per_minute_and_user=60)
    mine = gate(quota)
    for _ in range(5):
        call(mine)
    virtual_clock.set(time.admin, START - timedelta(minutes=10))
    time.started -= timedelta(minutes=10)
    made = 0
    for _ in range(20):
        try:
            call(mine)
        except ThrottledError as error:
            time.pass_by(error.retry_after_seconds)
        else:
            made += 1

    assert made >= 8
    assert time.clock() < 60.0


# -- the day ---------------------------------------------------------------------------------------------------------


def test_when_the_day_is_used_up_every_call_waits_for_midnight_in_california(
    make: MakeQuota, shard: CountingShard, time: VirtualTime
) -> None:
    quota = make(per_day=37)
    mine = gate(quota)
    for _ in range(37):
        call(mine)
    with pytest.raises(DailyBudgetError) as used_up:
        call(mine)
    asked = shard.transactions
    with pytest.raises(DailyBudgetError):
        call(mine)

    assert used_up.value.retry_after_seconds == 19 * 3600.0
    assert shard.transactions == asked, "known without asking again"
    time.pass_by(19 * 3600.0)
    call(mine)
    assert one(time.admin, "SELECT array_agg(day::text ORDER BY day) FROM sync.call_days") == [
        "2026-06-01",
        "2026-06-02",
    ]


def test_two_processes_share_the_days_last_calls_exactly(make: MakeQuota, time: VirtualTime) -> None:
    gates = [gate(make(per_day=50)) for _ in range(2)]
    made = 0
    for turn in range(200):
        try:
            call(gates[turn % 2])
        except DailyBudgetError:
            time.pass_by(1.0)
        else:
            made += 1

    assert made == 50


# -- what a 429 leads to ---------------------------------------------------------------------------------------------


def test_one_tenant_that_is_limited_at_every_call_slows_nobody_else(
    make: MakeQuota, shard: Shard, time: VirtualTime
) -> None:
    quota = make(per_minute=6000)
    poison = gate(quota, key=uuid4().bytes)
    for _ in range(200):
        time.pass_by(0.1)
        with poison.admit():
            poison.limited()
    with shard.transaction() as connection:
        assert headroom(connection, quota.limits).project_factor == 1.0
    assert quota.in_flight.limit == 8
    call(gate(quota))
    assert quota.waited_seconds == 0.0


def test_several_tenants_limited_at_once_slow_the_whole_project_which_recovers_by_itself(
    make: MakeQuota, shard: Shard, time: VirtualTime
) -> None:
    """Case 66."""
    quota = make(per_minute=6000)
    mine = gate(quota)
    call(mine)

    def factor() -> float:
        with shard.transaction() as connection:
            return headroom(connection, quota.limits).project_factor

    tenants = [gate(quota, key=uuid4().bytes) for _ in range(3)]
    factors = []
    for tenant in tenants:
        tenant.limited()
        factors.append(factor())
    assert factors == [1.0, 1.0, 0.5]
    assert quota.in_flight.limit == 4

    tenants[0].limited()
    other_process = make(per_minute=6000)
    for _ in range(3):
        gate(other_process).limited()
    assert (factor(), quota.in_flight.limit) == (0.5, 4), "answers to calls that were under way"
    assert other_process.in_flight.limit == 4
    for _ in range(20):
        time.pass_by(call_buckets.FACTOR_PAUSE_SECONDS)
        for tenant in tenants:
            tenant.limited()
    assert factor() == call_buckets.LOWEST_FACTOR
    assert quota.in_flight.limit == 1

    quota.close()
    rate = quota.limits.project_rate.per_second
    time.admin.execute("UPDATE sync.call_buckets SET tokens = 0, refilled_at = virtual.now() WHERE scope = 'project'")
    others = gate(make(per_minute=6000))
    began, made = time.clock(), 0
    while time.clock() < began + 10.0:
        call(others)
        made += 1
    assert made <= 10.0 * rate * (call_buckets.LOWEST_FACTOR + 10.0 / call_buckets.FACTOR_RECOVERY_SECONDS) + 1
    time.pass_by(call_buckets.FACTOR_RECOVERY_SECONDS)
    assert factor() == 1.0


def test_tenants_limited_at_different_times_are_their_own_affair(
    make: MakeQuota, shard: Shard, time: VirtualTime
) -> None:
    quota = make(per_minute=6000)
    call(gate(quota))
    for _ in range(6):
        gate(quota).limited()
        time.pass_by(quotas.LIMITED_WITHIN_SECONDS / 2 + 0.1)

    with shard.transaction() as connection:
        assert headroom(connection, quota.limits).project_factor == 1.0


def test_calls_under_way_halve_at_most_once_a_second_and_grow_back_one_by_one() -> None:
    now = 0.0
    limit = AdaptiveLimit(16, clock=lambda: now)
    limit.congested()
    limit.congested()
    assert limit.limit == 8
    for now in (1.0, 2.0, 3.0, 4.0, 5.0):  # noqa: B007  # the clock reads it
        limit.congested()
    assert limit.limit == 1
    grown = []
    for _ in range(4):
        limit.succeeded()
        grown.append(limit.limit)
    assert grown == [2, 2, 2, 3]
    for _ in range(1000):
        limit.succeeded()
    assert limit.limit == 16


def test_no_more_calls_are_under_way_than_the_limit_and_a_failed_call_leaves_its_place() -> None:
    limit = AdaptiveLimit(2, clock=lambda: 0.0)
    under_way: list[int] = []
    peak = 0

    def work(number: int) -> None:
        nonlocal peak
        try:
            with limit.slot():
                under_way.append(number)
                peak = max(peak, len(under_way))
                threading.Event().wait(0.002)
                under_way.remove(number)
                raise ValueError(number)
        except ValueError:
            pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(40)))

    assert peak == 2
    with limit.slot(), limit.slot():
        pass


def test_a_clean_call_is_a_success_and_a_limited_or_failed_one_is_not(make: MakeQuota, time: VirtualTime) -> None:
    quota = make(max_in_flight=4)
    mine = gate(quota)
    for _ in range(3):
        time.pass_by(2.0)
        quota.in_flight.congested()
    assert quota.in_flight.limit == 1
    with mine.admit():
        mine.limited()
    with pytest.raises(RuntimeError), mine.admit():
        raise RuntimeError
    assert quota.in_flight.limit == 1
    call(mine)
    assert quota.in_flight.limit == 2


@pytest.mark.parametrize("status", [429, 403])
def test_an_answer_that_there_were_too_many_calls_is_no_success_and_is_heeded(
    google: Simulator, make: MakeQuota, time: VirtualTime, status: int
) -> None:
    quota = make(max_in_flight=4)
    for _ in range(3):
        time.pass_by(2.0)
        quota.in_flight.congested()
    user = google.add_user("ann@example.com")
    api = google_calendar(google, time.sleep).connect(user.refresh_token, calls=Counter(), gate=gate(quota))
    limits = {"status": status, "reason": "userRateLimitExceeded", "retry_after": 30}
    google.add_fault("rate_limited", method="calendarList.list", times=1, **limits)

    with pytest.raises(RateLimitedError):
        api.list_calendars(page_token=None)
    assert quota.in_flight.limit == 1
    with pytest.raises(ThrottledError) as refused:
        api.list_calendars(page_token=None)
    assert refused.value.retry_after_seconds == pytest.approx(30.0, abs=0.5)
    time.pass_by(30.0)
    api.list_calendars(page_token=None)
    assert quota.in_flight.limit == 2


def test_tools_that_need_no_quota_are_never_held_up() -> None:
    open_gate: CallGate = UNLIMITED
    for _ in range(3):
        with open_gate.admit():
            open_gate.limited(30.0)
