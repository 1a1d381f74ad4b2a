"""What a switch changed, measured from real rows of runs and samples."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from devstack.servers import Database
from scaling import effects, episodes
from scaling.capabilities import Capability, switch
from scaling.databases import Connection
from scaling.effects import measure_effect
from scaling.samples import measured, record

SWITCHED = datetime(2026, 3, 10, 14, 30, tzinfo=UTC)
TICK = timedelta(minutes=2)
INCREMENTAL, PARALLEL = Capability.INCREMENTAL_SYNC, Capability.PARALLEL_SYNC


@pytest.fixture
def connection(database: Database) -> Iterator[Connection]:
    with psycopg.connect(database.dsn) as made:
        yield made


def run(
    connection: Connection,
    since: datetime,
    until: datetime,
    *,
    incremental: bool | None = True,
    parallel: bool | None = True,
    calls: int = 10,
    workspaces: int = 5,
    seconds: float = 4.0,
    calendars: int = 10,
    finished: bool = True,
) -> None:
    """A run every two minutes."""
    connection.execute(
        "INSERT INTO sync.runs (run_id, shard, of, started_at, heartbeat_at, finished_at, workspaces_served,"
        " calendars_synced, calendars_live, api_calls, duration_seconds, incremental, parallel)"
        " SELECT gen_random_uuid(), 0, 1, at, at + make_interval(secs => %(seconds)s), CASE WHEN %(finished)s"
        " THEN at + make_interval(secs => %(seconds)s) END, %(workspaces)s, %(workspaces)s, %(calendars)s, %(calls)s,"
        " CASE WHEN %(finished)s THEN %(seconds)s END, %(incremental)s, %(parallel)s"
        " FROM generate_series(%(since)s::timestamptz, %(until)s::timestamptz - interval '1 s', interval '2 min') at",
        {
            "since": since,
            "until": until,
            "incremental": incremental,
            "parallel": parallel,
            "calls": calls,
            "workspaces": workspaces,
            "seconds": seconds,
            "calendars": calendars,
            "finished": finished,
        },
    )


def test_calls_before_and_after_are_compared_over_whole_days(connection: Connection) -> None:
    now = SWITCHED + timedelta(days=3)
    run(connection, SWITCHED - timedelta(days=3), SWITCHED, incremental=False, calls=100)
    run(connection, SWITCHED, now, calls=20)
    effect = measure_effect(connection, INCREMENTAL, SWITCHED, now)
    assert effect is not None
    assert effect.basis == "whole days"
    assert (effect.before["days"], effect.after["days"]) == (2, 2)  # the day of the switch is none of them
    assert (effect.before["calls_per_day"], effect.after["calls_per_day"]) == (72_000, 14_400)
    assert (effect.before["calls_per_calendar_and_day"], effect.change) == (7200, -0.8)
    assert (effect.verdict, effect.is_final) == ("as planned", False)
    assert "14,400, before 72,000" in effect.sentence
    assert "the plan expects 70% to 90% fewer" in effect.sentence


@pytest.mark.parametrize(
    ("calls", "verdict"),
    [(31, "less than planned"), (30, "as planned"), (10, "as planned"), (9, "better than planned")],
)
def test_the_verdict_holds_the_calls_against_the_plan(connection: Connection, calls: int, verdict: str) -> None:
    run(connection, SWITCHED - timedelta(hours=2), SWITCHED, incremental=False, calls=100)
    run(connection, SWITCHED, SWITCHED + timedelta(hours=2), calls=calls)
    effect = measure_effect(connection, INCREMENTAL, SWITCHED, SWITCHED + timedelta(hours=2))
    assert effect is not None
    assert (effect.basis, effect.verdict) == ("hours", verdict)


def test_a_fleet_that_grew_is_compared_calendar_by_calendar(connection: Connection) -> None:
    run(connection, SWITCHED - timedelta(hours=2), SWITCHED, incremental=False, calls=100, calendars=10)
    run(connection, SWITCHED, SWITCHED + timedelta(hours=2), calls=100, calendars=50)
    effect = measure_effect(connection, INCREMENTAL, SWITCHED, SWITCHED + timedelta(hours=2))
    assert effect is not None
    assert effect.change == -0.8
    assert effect.before["calls_per_day"] == effect.after["calls_per_day"]


def test_a_pause_of_the_sync_is_not_taken_for_fewer_calls(connection: Connection) -> None:
    run(connection, SWITCHED - timedelta(hours=2), SWITCHED, incremental=False, calls=60)
    run(connection, SWITCHED, SWITCHED + timedelta(hours=1), calls=60)
    now = SWITCHED + timedelta(hours=12)
    run(connection, SWITCHED + timedelta(hours=11), now, calls=60)
    effect = measure_effect(connection, INCREMENTAL, SWITCHED, now)
    assert effect is not None
    assert effect.after["hours"] == pytest.approx(3.0, abs=0.1)  # the last run before the pause stands for one hour
    assert effect.change > -0.4


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (timedelta(minutes=10), timedelta(hours=1)),
        (timedelta(hours=1), timedelta(minutes=10)),
        (timedelta(), TICK * 99),
    ],
)
def test_too_little_on_one_side_says_nothing(connection: Connection, before: timedelta, after: timedelta) -> None:
    run(connection, SWITCHED - before, SWITCHED, incremental=False)
    run(connection, SWITCHED, SWITCHED + after)
    assert measure_effect(connection, INCREMENTAL, SWITCHED, SWITCHED + after) is None


def test_runs_that_do_not_say_what_was_in_force_are_left_out(connection: Connection) -> None:
    run(connection, SWITCHED - timedelta(days=1), SWITCHED, incremental=None)
    run(connection, SWITCHED, SWITCHED + timedelta(days=1))
    assert measure_effect(connection, INCREMENTAL, SWITCHED, SWITCHED + timedelta(days=1)) is None


def test_the_parallel_sync_is_judged_by_the_time_a_workspace_takes(connection: Connection) -> None:
    run(connection, SWITCHED - timedelta(hours=2), SWITCHED, parallel=False, workspaces=5, seconds=50.0)
    run(connection, SWITCHED, SWITCHED + timedelta(hours=2), workspaces=40, seconds=40.0)
    effect = measure_effect(connection, PARALLEL, SWITCHED, SWITCHED + timedelta(hours=2))
    assert effect is not None
    assert (effect.before["seconds_per_workspace"], effect.after["seconds_per_workspace"]) == (10.0, 1.0)
    assert (effect.figure, effect.change, effect.verdict) == ("seconds_per_workspace", -0.9, "as planned")
    assert "A tick takes 40.0 s for 40.0 workspaces, before 50.0 s for 5.0" in effect.sentence


def test_a_killed_run_counts_with_the_time_it_took_and_not_with_its_calls(connection: Connection) -> None:
    run(connection, SWITCHED - timedelta(hours=2), SWITCHED - timedelta(hours=1), parallel=False, seconds=10.0)
    run(connection, SWITCHED - timedelta(hours=1), SWITCHED, parallel=False, seconds=60, calls=0, finished=False)
    run(connection, SWITCHED, SWITCHED + timedelta(hours=2), seconds=10.0)
    effect = measure_effect(connection, PARALLEL, SWITCHED, SWITCHED + timedelta(hours=2))
    assert effect is not None
    assert (effect.before["runs_lost"], effect.before["mean_tick_seconds"]) == (30, 35.0)
    assert effect.before["calls_per_visit"] == 1.0
    assert effect.before["calls_per_day"] == effect.after["calls_per_day"]


def test_two_switches_at_once_are_said_to_share_the_effect(connection: Connection) -> None:
    run(connection, SWITCHED - timedelta(hours=2), SWITCHED, incremental=False, parallel=False, calls=100)
    run(connection, SWITCHED, SWITCHED + timedelta(hours=2), calls=20)
    for capability, other in ((INCREMENTAL, PARALLEL), (PARALLEL, INCREMENTAL)):
        effect = measure_effect(connection, capability, SWITCHED, SWITCHED + timedelta(hours=2))
        assert effect is not None
        assert f"{other} changed in the same time" in effect.sentence


def test_the_audit_logs_are_compared_by_their_size(connection: Connection) -> None:
    capability = Capability.AUDIT_LOG_RETENTION
    name = effects.TABLE_METRIC
    record(connection, [measured(name, SWITCHED - timedelta(hours=5), 4 * 2**30)])
    assert measure_effect(connection, capability, SWITCHED, SWITCHED + timedelta(days=1)) is None
    record(connection, [measured(name, SWITCHED + timedelta(hours=5), 2**30)])
    effect = measure_effect(connection, capability, SWITCHED, SWITCHED + timedelta(days=1))
    assert effect is not None
    assert (effect.change, effect.sentence) == (-0.75, "The audit logs take 1,024.0 MiB, before 4,096.0 MiB (-75%).")


def acted(connection: Connection, capability: Capability) -> int:
    """An episode that somebody acted on at `SWITCHED`, and its switch."""
    row = connection.execute(
        "INSERT INTO scaling.episodes (rule, episode_no, rule_version, capability, state, value, threshold, fired_at,"
        " acted_at) VALUES ('rule', 1, 'v', %s, 'acted', 2, 1, %s, %s) RETURNING id",
        [capability.value, SWITCHED - timedelta(hours=1), SWITCHED + timedelta(minutes=1)],
    ).fetchone()
    assert row is not None
    switch(connection, capability, on=True, by="rule", reason="crossed", episode_id=row[0])
    connection.execute("UPDATE scaling.capability_changes SET changed_at = %s", [SWITCHED])
    return int(row[0])


def test_the_effect_of_an_episode_is_stored_and_measured_until_it_is_final(connection: Connection) -> None:
    episode = acted(connection, INCREMENTAL)
    run(connection, SWITCHED - timedelta(hours=3), SWITCHED, incremental=False, calls=100)
    assert effects.update(connection, SWITCHED + timedelta(minutes=4)) == []
    run(connection, SWITCHED, SWITCHED + timedelta(days=8), calls=20)
    (updated,) = effects.update(connection, SWITCHED + timedelta(hours=1))
    assert updated.id == episode
    assert updated.effect is not None
    assert (updated.effect["change"], updated.effect["is_final"]) == (-0.8, False)
    assert updated.effect["switched_at"] == SWITCHED.isoformat()
    (final,) = effects.update(connection, SWITCHED + timedelta(days=8))
    assert final.effect is not None
    assert (final.effect["is_final"], final.effect["after"]["hours"]) == (True, pytest.approx(168, abs=0.1))
    assert effects.update(connection, SWITCHED + timedelta(days=9)) == []
    assert episodes.get(connection, episode).effect == final.effect
