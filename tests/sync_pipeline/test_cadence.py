"""Calendars are polled as seldom as the freshness target allows, and never all at once."""

import math
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from time import perf_counter

import psycopg
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from devstack.servers import Database
from sync_pipeline.cadence import (
    DAY,
    FIRST_RATE,
    JITTER,
    Cadence,
    FleetRates,
    PollPlan,
    observe,
    rate_per_day,
    read_fleet,
)
from sync_pipeline.errors import TransientError
from tests.sync_pipeline.conftest import Saas

FLOOR, CEILING, TARGET = 120.0, 14400.0, 900.0
TICK = 120.0

rates = st.floats(min_value=1e-4, max_value=1e4)
fleets = st.lists(st.tuples(st.integers(1, 10_000), rates), max_size=12).map(
    lambda buckets: FleetRates(tuple(buckets), mean=buckets[0][1] if buckets else FIRST_RATE)
)
known = st.floats(min_value=0, max_value=1e6)


def plan_of(fleet: FleetRates) -> PollPlan:
    return PollPlan.of(fleet, floor_seconds=FLOOR, ceiling_seconds=CEILING, freshness_seconds=TARGET)


def cadence(*, seed: int = 1, fleet: FleetRates | None = None, target: float = TARGET) -> Cadence:
    fresh = Cadence(FLOOR, 3600.0, Random(seed), ceiling_seconds=CEILING, freshness_seconds=target)
    return fresh.for_fleet(fleet) if fleet else fresh


def mean_staleness(plan: PollPlan, fleet: FleetRates) -> float:
    weights = [(calendars * rate, plan.staleness(rate)) for calendars, rate in fleet.buckets or ((1, fleet.mean),)]
    return sum(weight * staleness for weight, staleness in weights) / sum(weight for weight, _ in weights)


# --- intervals


@given(fleets, rates, rates)
def test_a_calendar_that_changes_more_often_never_waits_longer(fleet: FleetRates, one: float, other: float) -> None:
    plan = plan_of(fleet)
    assert plan.interval(max(one, other)) <= plan.interval(min(one, other))


@given(fleets, st.floats(min_value=0, max_value=1e12), st.integers())
@example(FleetRates(), 0.0, 0)
@example(FleetRates(((1, 1e-300),), 1e-300), 1e-300, 0)
def test_every_interval_is_within_floor_and_ceiling_and_their_jitter(fleet: FleetRates, rate: float, seed: int) -> None:
    assert FLOOR <= plan_of(fleet).interval(rate) <= CEILING
    wait = cadence(seed=seed, fleet=fleet).next_poll(rate)
    assert FLOOR * (1 - JITTER) <= wait <= CEILING * (1 + JITTER)


@given(fleets)
def test_changes_of_the_fleet_are_as_fresh_as_the_target_asks_wherever_the_floor_allows_it(fleet: FleetRates) -> None:
    plan = plan_of(fleet)
    staleness = mean_staleness(plan, fleet)
    assert staleness <= TARGET * (1 + 1e-9)
    # and no fresher than needed, unless every calendar is polled as seldom as is allowed
    buckets = fleet.buckets or ((1, fleet.mean),)
    assert staleness >= TARGET * 0.999 or all(plan.interval(rate) == CEILING for _, rate in buckets)


def test_a_target_that_every_interval_meets_polls_at_the_ceiling() -> None:
    plan = PollPlan.of(
        FleetRates(((5, 3.0), (1, 70.0)), 9.0), floor_seconds=1, ceiling_seconds=60, freshness_seconds=90
    )
    assert plan.interval(3.0) == plan.interval(70.0) == 60


def test_between_floor_and_ceiling_the_time_between_polls_goes_with_the_inverse_root_of_the_rate() -> None:
    plan = plan_of(FleetRates(((1, 1.0), (1, 4.0)), 2.5))
    apart = [plan.interval(rate) + plan.late_seconds for rate in (1.0, 4.0)]
    assert apart[0] == pytest.approx(2 * apart[1])


def test_a_target_below_the_floor_polls_at_the_floor() -> None:
    plan = PollPlan.of(
        FleetRates(((5, 3.0),), 3.0), floor_seconds=FLOOR, ceiling_seconds=CEILING, freshness_seconds=1.0
    )
    assert plan.interval(3.0) == FLOOR


@given(st.lists(rates, min_size=2, max_size=40), st.floats(min_value=0.2, max_value=5.0))
def test_no_other_clamped_intervals_as_fresh_make_fewer_calls(fleet_rates: list[float], tilt: float) -> None:
    """Perturb the plan: intervals as any other power of the rate, rescaled to the same freshness, cost no less."""

    def clamped(scale: float, power: float) -> list[float]:
        return [min(max(scale / rate**power, FLOOR), CEILING) for rate in fleet_rates]

    def staleness(intervals: list[float]) -> float:
        return sum(rate * t / 2 for rate, t in zip(fleet_rates, intervals, strict=True)) / sum(fleet_rates)

    fleet = FleetRates(tuple((1, rate) for rate in fleet_rates), 1.0)
    plan = PollPlan.of(fleet, floor_seconds=FLOOR, ceiling_seconds=CEILING, freshness_seconds=TARGET, late_seconds=0.0)
    chosen = [plan.interval(rate) for rate in fleet_rates]
    low, high = 1e-9, 1e12
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if staleness(clamped(middle, tilt / 2)) <= staleness(chosen) else (low, middle)
    other = clamped(low, tilt / 2)
    assert sum(1 / t for t in chosen) <= sum(1 / t for t in other) * (1 + 1e-6)


def test_a_fleet_of_none_and_of_one_calendar_has_intervals() -> None:
    nobody = plan_of(FleetRates())
    alone = plan_of(FleetRates(((1, FIRST_RATE),), FIRST_RATE))
    assert nobody.interval(FIRST_RATE) == alone.interval(FIRST_RATE)
    assert alone.staleness(FIRST_RATE) == pytest.approx(TARGET)


def test_fleets_of_several_databases_are_tuned_as_one() -> None:
    here, there = FleetRates(((30, 1.0),), 1.0), FleetRates(((10, 9.0),), 9.0)
    assert FleetRates.together([here, there]) == FleetRates(((30, 1.0), (10, 9.0)), 3.0)
    assert FleetRates.together([FleetRates()]) == FleetRates()


def test_a_new_calendar_waits_as_long_as_an_average_one() -> None:
    fleet = FleetRates(((90, 0.5), (10, 20.0)), mean=2.45)
    assert cadence(fleet=fleet).next_poll() == cadence(fleet=fleet).next_poll(2.45)
    assert cadence(fleet=fleet).rate(0.0, 0.0) == pytest.approx(2.45)


def test_the_same_floor_and_ceiling_is_a_fixed_interval() -> None:
    fixed = Cadence(poll_seconds=600.0, list_seconds=0.0, rng=Random(1)).for_fleet(FleetRates(((9, 4.0),), 4.0))
    waits = [fixed.next_poll(rate) for rate in (1e-9, 0.2, 2.0, 1e9) for _ in range(50)]
    assert min(waits) >= 600 * (1 - JITTER)
    assert max(waits) <= 600 * (1 + JITTER)
    always_due = Cadence(poll_seconds=0.0, list_seconds=0.0, rng=Random(1))
    assert always_due.next_poll() == always_due.next_poll(5.0) == always_due.next_list() == 0.0


def test_staleness_is_what_a_simulated_calendar_shows() -> None:
    """Poll on a grid of ticks after jittered intervals, draw changes uniformly, measure their age."""
    rng = Random(7)
    plan = plan_of(FleetRates(((1, 4.0),), 4.0))
    schedule = Cadence(FLOOR, 0.0, rng, ceiling_seconds=CEILING, plan=plan)
    polls = [0.0]
    for _ in range(20_000):
        polls.append(math.ceil((polls[-1] + schedule.next_poll(4.0)) / TICK) * TICK)
    measured = sum((b - a) ** 2 for a, b in pairwise(polls)) / 2 / polls[-1]
    assert measured == pytest.approx(plan.staleness(4.0), rel=0.02)
    assert measured == pytest.approx(TARGET, rel=0.02)


def test_the_first_failure_is_tried_again_at_the_floor_however_seldom_the_calendar_is_polled() -> None:
    wait = cadence(fleet=FleetRates(((1, 1e-3),), 1e-3)).after(TransientError("x"), failures=0)
    assert wait <= FLOOR * (1 + JITTER)


# --- push


def test_safety_polls_never_exceed_the_setting_and_are_spread() -> None:
    schedule = cadence()
    waits = [schedule.next_safety_poll() for _ in range(1000)]
    assert max(waits) <= schedule.safety_seconds
    assert min(waits) < 0.8 * schedule.safety_seconds


def test_a_watched_list_is_read_daily_and_another_hourly() -> None:
    schedule = cadence()
    assert DAY * (1 - JITTER) <= schedule.next_list(watched=True) <= DAY
    assert 3600 * (1 - JITTER) <= schedule.next_list(watched=False) <= 3600 * (1 + JITTER)


# --- no peaks


@given(st.integers(), st.sampled_from(["poll", "safety", "list"]), rates)
def test_a_fleet_started_at_once_never_calls_in_step(seed: int, kind: str, rate: float) -> None:
    """Case 86: no minute has more than three times its share of the first interval, nor of later ones."""
    schedule = cadence(seed=seed, fleet=FleetRates(((1, rate),), rate))
    calendars = 3000
    wait = {"poll": lambda: schedule.next_poll(rate), "safety": schedule.next_safety_poll, "list": schedule.next_list}
    mean = {"poll": plan_of(FleetRates(((1, rate),), rate)).interval(rate), "safety": DAY * 0.875, "list": 3600.0}
    due = Counter(int(wait[kind]() // 60) for _ in range(calendars))
    share = max(calendars * 60 / mean[kind], 1.0)
    # 25 % each way is half an interval: twice the share; downwards only a quarter: 3.5 times. The rest is chance.
    spread = 3.5 if kind == "safety" else 2.0
    assert max(due.values()) <= spread * share + 6 * math.sqrt(spread * share)


# --- change rates


@given(known, known, st.one_of(st.none(), st.floats(-1e3, 1e12)), st.booleans(), st.booleans())
@example(0.0, 0.0, 0.0, True, False)
@example(5e-324, 5e-324, 1e12, False, False)
def test_what_is_learned_is_never_negative_and_always_a_number(
    change_count: float, observed_days: float, elapsed: float | None, changed: bool, notified: bool
) -> None:
    count, days = observe(change_count, observed_days, elapsed, changed, notified=notified)
    assert 0 <= count <= change_count + 1
    assert 0 <= days < math.inf
    assert 0 < rate_per_day(count, days, 2.0) < math.inf


@given(known, known, st.floats(1.0, 30 * DAY))
def test_a_change_raises_the_rate_and_silence_lowers_it(change_count: float, observed_days: float, t: float) -> None:
    before = rate_per_day(change_count, observed_days, FIRST_RATE)
    silent = observe(change_count, observed_days, t, changed=False)
    busy = observe(change_count, observed_days, t, changed=True)
    assert rate_per_day(*busy, FIRST_RATE) > rate_per_day(*silent, FIRST_RATE)
    assert rate_per_day(*silent, FIRST_RATE) <= max(before, FIRST_RATE) * (1 + 1e-9)


def mean_estimate(rate: float, wait: float, *, days: float, seed: int, push: bool = False) -> float:
    """Mean estimate over the second half of that many days."""
    rng = Random(seed)
    state, now, estimates = (0.0, 0.0), 0.0, []
    next_change = rng.expovariate(rate / DAY)
    while now < days * DAY:
        due = now + wait * rng.uniform(1 - JITTER, 1 + JITTER)
        notified = push and next_change <= due
        poll = next_change if notified else due
        changed = next_change <= poll
        state = observe(*state, poll - now, changed, notified=notified)
        now = poll
        while next_change <= now:
            next_change += rng.expovariate(rate / DAY)
        if now > days * DAY / 2:
            estimates.append(rate_per_day(*state, prior=rate))
    return sum(estimates) / len(estimates)


@pytest.mark.parametrize("push", [False, True])
@pytest.mark.parametrize(("rate", "wait"), [(0.2, 9000.0), (2.0, 14400.0), (10.0, 1500.0), (10.0, 14400.0)])
def test_the_estimate_converges_to_the_rate_however_many_changes_a_poll_hides(
    rate: float, wait: float, push: bool
) -> None:
    assert mean_estimate(rate, wait, days=1500, seed=3, push=push) == pytest.approx(rate, rel=0.2 if rate < 1 else 0.1)


def test_a_calendar_that_falls_silent_loses_half_its_rate_in_a_week() -> None:
    state = (0.0, 0.0)
    for _ in range(30):
        state = observe(*state, DAY, changed=True, notified=True)
    before = rate_per_day(*state, 1.0)
    for _ in range(7):
        state = observe(*state, DAY, changed=False)
    assert rate_per_day(*state, 1.0) == pytest.approx(before / 2, rel=0.1)


def test_a_learning_fleet_meets_the_target_with_a_twentieth_of_the_calls_of_two_minute_polls() -> None:
    """The whole loop without a database: three kinds of calendars, unknown at first, polled on ticks for five weeks."""
    result = simulate({0.2: 20, 2.0: 20, 10.0: 20}, warm_up_days=14, days=21, seed=5)
    assert result.calls_per_calendar_and_day < 720 * 0.05
    assert result.staleness == pytest.approx(TARGET, rel=0.08)


class Simulated:
    """A calendar of the simulation: its changes, and what the sync knows of it."""

    def __init__(self, rate: float, rng: Random) -> None:
        self.rate, self.rng = rate, rng
        self.known = (0.0, 0.0)
        self.polled_at, self.due_at = 0.0, 0.0
        self.next_change = rng.expovariate(rate / DAY)

    def poll(self, now: float) -> list[float]:
        """Ages of the changes found."""
        ages = []
        while self.next_change <= now:
            ages.append(now - self.next_change)
            self.next_change += self.rng.expovariate(self.rate / DAY)
        self.known = observe(*self.known, now - self.polled_at if self.polled_at else None, bool(ages))
        self.polled_at = now
        return ages


@dataclass(frozen=True)
class Outcome:
    calls_per_calendar_and_day: float
    staleness: float


def simulate(fleet: dict[float, int], *, warm_up_days: float, days: float, seed: int) -> Outcome:
    rng = Random(seed)
    calendars = [Simulated(rate, rng) for rate, number in fleet.items() for _ in range(number)]
    calls, ages = 0, [0.0]
    schedule = Cadence(FLOOR, 0.0, rng, ceiling_seconds=CEILING)
    for tick in range(1, int((warm_up_days + days) * DAY / TICK)):
        now = tick * TICK
        due = [calendar for calendar in calendars if calendar.due_at <= now]
        if not due:
            continue
        if tick % 120 == 0:
            counts, observed = zip(*(calendar.known for calendar in calendars), strict=True)
            mean = rate_per_day(sum(counts), sum(observed), FIRST_RATE)
            rates_known = tuple((1, rate_per_day(*calendar.known, mean)) for calendar in calendars)
            schedule = schedule.for_fleet(FleetRates(rates_known, mean))
        for calendar in due:
            found = calendar.poll(now)
            calendar.due_at = now + schedule.next_poll(schedule.rate(*calendar.known))
            if now > warm_up_days * DAY:
                calls += 1
                ages += found
    return Outcome(calls / len(calendars) / days, sum(ages) / len(ages))


# --- in the database


def a_calendar(saas: Saas) -> str:
    workspace = saas.workspace()
    name = f"calendar-{workspace.workspace_id}"
    saas.execute(
        "INSERT INTO sync.connection_state (tenant_id, workspace_id, connection_id) VALUES (%s, %s, %s)",
        workspace.tenant_id,
        workspace.workspace_id,
        workspace.workspace_id,
    )
    saas.execute(
        "INSERT INTO sync.calendar_state (tenant_id, workspace_id, connection_id, calendar_id) VALUES (%s, %s, %s, %s)",
        workspace.tenant_id,
        workspace.workspace_id,
        workspace.workspace_id,
        name,
    )
    return name


def test_the_fleet_is_read_from_calendars_without_a_channel_that_works(database: Database, saas: Saas) -> None:
    learned = [(4.0, 10.0), (4.0, 10.0), (100.0, 10.0), (7.0, 1.0)]
    watched, gone = a_calendar(saas), a_calendar(saas)
    names = [a_calendar(saas) for _ in learned]
    for name, (count, days) in zip(names, learned, strict=True):
        saas.execute(
            "UPDATE sync.calendar_state SET change_count = %s, observed_days = %s WHERE calendar_id = %s",
            count,
            days,
            name,
        )
    saas.execute("UPDATE sync.calendar_state SET deleted_at = now(), change_count = 99 WHERE calendar_id = %s", gone)
    for name, state, expires, confirmed in [
        (watched, "open", "1 day", True),
        (watched, "open", "2 days", True),
        (names[0], "closing", "1 day", True),
        (names[1], "open", "-1 day", True),
        (names[2], "open", "1 day", False),
    ]:
        saas.execute(
            "INSERT INTO sync.channels (channel_id, tenant_id, workspace_id, connection_id, calendar_id, token_hash, "
            "state, created_at, expires_at, last_message_at) "
            "SELECT gen_random_uuid(), tenant_id, workspace_id, connection_id, calendar_id, '', %s, now(), "
            "now() + %s::interval, CASE WHEN %s THEN now() END FROM sync.calendar_state WHERE calendar_id = %s",
            state,
            expires,
            confirmed,
            name,
        )

    with psycopg.connect(database.dsn) as connection:
        fleet = read_fleet(connection)

    assert fleet.calendars == 4
    assert fleet.mean == pytest.approx(115.5 / (31 + 0.25))
    expected = sorted(rate_per_day(count, days, fleet.mean) for count, days in learned)
    assert [calendars for calendars, _ in fleet.buckets] == [2, 1, 1]
    assert [rate for _, rate in fleet.buckets] == pytest.approx([expected[0], expected[2], expected[3]])


def test_a_database_without_calendars_has_an_empty_fleet(database: Database) -> None:
    with psycopg.connect(database.dsn) as connection:
        fleet = read_fleet(connection)
    assert fleet == FleetRates()
    assert fleet.calendars == 0
    assert cadence(fleet=fleet).next_poll() > 0


def test_reading_ten_thousand_calendars_is_cheap(database: Database, saas: Saas) -> None:
    saas.execute(
        "INSERT INTO sync.connection_state (tenant_id, workspace_id, connection_id) "
        "SELECT md5('t' || n)::uuid, md5('w' || n)::uuid, md5('c' || n)::uuid FROM generate_series(1, 10000) AS n"
    )
    saas.execute(
        "INSERT INTO sync.calendar_state (tenant_id, workspace_id, connection_id, calendar_id, change_count, "
        "observed_days) SELECT tenant_id, workspace_id, connection_id, 'calendar', random() * 50, random() * 10 "
        "FROM sync.connection_state"
    )
    saas.execute("VACUUM ANALYZE sync.calendar_state, sync.connection_state")
    with psycopg.connect(database.dsn) as connection:
        times = []
        for _ in range(5):
            began = perf_counter()
            fleet = read_fleet(connection)
            times.append(perf_counter() - began)
    assert fleet.calendars == 10_000
    assert len(fleet.buckets) < 40
    assert min(times) < 0.1  # 0.011 s when measured
