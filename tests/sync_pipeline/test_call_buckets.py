"""The buckets in Postgres: what is reserved, given back, slowed down and told, in the caller's transaction."""

from collections.abc import Iterator
from datetime import UTC, datetime
from uuid import uuid4

import psycopg
import pytest

from devstack.servers import Database
from scaling.databases import Shard
from sync_pipeline import call_buckets
from sync_pipeline.call_buckets import (
    DayUsedUpError,
    ProjectReservation,
    QuotaLimits,
    fit_plans,
    headroom,
    reserve_project,
    reserve_users,
    return_project,
    slow_project,
)
from tests.sync_pipeline import virtual_clock

START = datetime(2026, 6, 1, 12, tzinfo=UTC)  # 05:00 in California
KEY = b"somebody"

Admin = psycopg.Connection[tuple[object, ...]]


@pytest.fixture
def admin(database: Database) -> Iterator[Admin]:
    virtual_clock.install(database.admin_dsn, START)
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        yield connection


@pytest.fixture
def shard(database: Database, admin: Admin) -> Iterator[Shard]:
    made = Shard("main", virtual_clock.dsn(database.dsn))
    yield made
    made.close()


def one(admin: Admin, statement: str) -> object:
    row = admin.execute(statement.encode()).fetchone()
    return row[0] if row else None


def reserved(shard: Shard, calls: int, limits: QuotaLimits) -> ProjectReservation:
    with shard.transaction() as connection:
        made = reserve_project(connection, calls, limits)
    assert made is not None
    return made


# -- users -----------------------------------------------------------------------------------------------------------


def test_users_reserve_within_the_callers_transaction_and_what_it_rolls_back_is_not_taken(shard: Shard) -> None:
    limits = QuotaLimits(per_minute_and_user=600)
    keys = [uuid4().bytes for _ in range(3)]
    planned = {keys[0]: 4, keys[1]: 10_000, keys[2]: 0}
    with shard.transaction() as connection:
        waits = reserve_users(connection, planned, limits)
        connection.execute("ROLLBACK AND CHAIN")
        again = reserve_users(connection, planned, limits)
        third = reserve_users(connection, planned, limits)

    assert waits == again == {keys[0]: 0.0, keys[1]: 0.0}
    assert third[keys[0]] == 0.0
    assert third[keys[1]] == pytest.approx(60 / limits.user_rate.per_second)


def test_a_user_reserves_the_capacity_at_once_then_one_call_in_its_turn_then_nothing(
    shard: Shard, admin: Admin
) -> None:
    limits = QuotaLimits(per_minute_and_user=60)
    with shard.transaction() as connection:
        waits = [reserve_users(connection, {KEY: 1}, limits)[KEY] for _ in range(9)]

    per_call = 1 / limits.user_rate.per_second
    assert waits == pytest.approx([0.0] * 6 + [per_call] + [2 * per_call] * 2)
    assert one(admin, "SELECT tokens FROM sync.call_buckets") == -1.0, "who is refused loses nothing"


def test_workers_that_use_one_account_plan_together_what_one_reservation_gives() -> None:
    plans = fit_plans([{KEY: 40, b"other": 1}, {KEY: 40}, {KEY: 5}], QuotaLimits(per_minute_and_user=600))

    assert plans == [{KEY: 40, b"other": 1}, {KEY: 20}, {KEY: 0}]


def test_users_who_left_are_forgotten_and_busy_ones_are_not(shard: Shard, admin: Admin) -> None:
    limits = QuotaLimits()
    with shard.transaction() as connection:
        reserve_users(connection, {b"gone": 1}, limits)
    virtual_clock.advance(admin, 2 * 86400.0)
    with shard.transaction() as connection:
        reserve_users(connection, {b"here": 1}, limits)
        assert reserve_project(connection, 1, limits)
    virtual_clock.advance(admin, 3600.0)
    with shard.transaction() as connection:
        assert call_buckets.purge(connection) == 1

    assert one(admin, "SELECT array_agg(key) FROM sync.call_buckets WHERE scope = 'user'") == [b"here"]


# -- the project -----------------------------------------------------------------------------------------------------


def test_calls_nobody_sent_go_back_to_the_bucket_and_the_day(shard: Shard, admin: Admin) -> None:
    limits = QuotaLimits(per_minute=6000)
    made = reserved(shard, 150, limits)
    with shard.transaction() as connection:
        return_project(connection, made, 50, limits)

    assert one(admin, "SELECT tokens FROM sync.call_buckets") == 500
    assert one(admin, "SELECT calls FROM sync.call_days") == 100


def test_nothing_is_given_back_to_a_bucket_whose_next_calls_are_promised_already(shard: Shard, admin: Admin) -> None:
    limits = QuotaLimits(per_minute=6000)
    made = reserved(shard, 150, limits)
    admin.execute("UPDATE sync.call_buckets SET tokens = -50")
    with shard.transaction() as connection:
        return_project(connection, made, 50, limits)

    assert one(admin, "SELECT tokens FROM sync.call_buckets") == -50
    assert one(admin, "SELECT calls FROM sync.call_days") == 100, "the day has them back all the same"


def test_the_project_is_halved_once_at_a_time_down_to_a_floor_and_recovers_by_itself(
    shard: Shard, admin: Admin
) -> None:
    limits = QuotaLimits(per_minute=6000)
    reserved(shard, 1, limits)

    def factor() -> float:
        with shard.transaction() as connection:
            return headroom(connection, limits).project_factor

    for _ in range(3):
        with shard.transaction() as connection:
            slow_project(connection)
    assert factor() == 0.5, "answers to calls that were under way"
    before = one(admin, "SELECT tokens FROM sync.call_buckets")
    made = reserved(shard, 10, limits)
    assert isinstance(before, float)
    assert made.factor == 0.5
    assert one(admin, "SELECT tokens FROM sync.call_buckets") == before - 20, "each call costs two"
    for _ in range(20):
        virtual_clock.advance(admin, call_buckets.FACTOR_PAUSE_SECONDS)
        with shard.transaction() as connection:
            slow_project(connection)
    assert factor() == call_buckets.LOWEST_FACTOR
    virtual_clock.advance(admin, call_buckets.FACTOR_RECOVERY_SECONDS / 2)
    assert factor() == pytest.approx(call_buckets.LOWEST_FACTOR + 0.5)
    virtual_clock.advance(admin, call_buckets.FACTOR_RECOVERY_SECONDS / 2)
    assert factor() == 1.0


# -- the day ---------------------------------------------------------------------------------------------------------


def test_what_the_day_has_not_left_is_not_taken_from_the_bucket(shard: Shard, admin: Admin) -> None:
    limits = QuotaLimits(per_minute=6000, per_day=50)
    reserved(shard, 40, limits)
    with pytest.raises(DayUsedUpError), shard.transaction() as connection:
        reserve_project(connection, 11, limits)
    assert one(admin, "SELECT tokens FROM sync.call_buckets") == 560
    reserved(shard, 10, limits)

    assert one(admin, "SELECT calls FROM sync.call_days") == 50


def test_headroom_tells_what_is_used_and_what_will_be(shard: Shard, admin: Admin) -> None:
    limits = QuotaLimits(per_minute=6000, per_day=1000)
    with shard.transaction() as connection:
        untouched = headroom(connection, limits)
    reserved(shard, 300, limits)
    with shard.transaction() as connection:
        now = headroom(connection, limits)
    virtual_clock.advance(admin, 10 * 3600.0)
    with shard.transaction() as connection:
        later = headroom(connection, limits)

    assert (untouched.calls_today, untouched.is_short, untouched.project_fill) == (0, False, 1.0)
    assert (now.calls_today, now.share_used, now.project_factor, now.calls_per_minute) == (300, 0.3, 1.0, None)
    assert now.project_fill == 0.5
    assert now.projected_calls == 300 + round(300 * 19 / 5)
    assert now.is_short
    assert not now.is_used_up
    assert later.projected_calls == 300 + round(300 * 9 / 15)
    assert not later.is_short


def test_the_night_the_clocks_change_is_an_hour_longer(shard: Shard, admin: Admin) -> None:
    virtual_clock.set(admin, datetime(2026, 11, 1, 8, tzinfo=UTC))  # 01:00 PDT; at 02:00 it is 01:00 PST
    with shard.transaction() as connection:
        assert headroom(connection, QuotaLimits()).seconds_to_midnight == 24 * 3600.0
