"""Episodes against a real Postgres: what fires is recorded once, claimed by one, and finished by whoever holds it."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from devstack.servers import Database
from scaling import episodes, samples
from scaling.capabilities import Capability, Mode
from scaling.databases import Connection
from scaling.episodes import Claim, ClaimLostError, Episode, EpisodeState, Watch
from scaling.errors import UserError
from scaling.samples import Sample, Status
from scaling.thresholds import Compare, DataMissing, Fired, Phase, Rearm, Rearmed, Recovered, Rule

START = datetime(2026, 9, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
LEASE = timedelta(minutes=5)
NO_WAIT = timedelta(0)
SYNC = Capability.PARALLEL_SYNC
RULE = Rule("slow", "mean", Compare.ABOVE, 10, timedelta(hours=6), recovery=5, rearm=Rearm.REPEAT, flap_episodes=99)
ONCE = Rule("once", "mean", Compare.ABOVE, 10, timedelta(hours=6), recovery=5)
MONTHLY = replace(ONCE, name="monthly", rearm=Rearm.PERIOD)
OCTOBER = 30 * 24
"""Hours after START."""


@contextmanager
def transaction(database: Database) -> Iterator[Connection]:
    with psycopg.connect(database.dsn) as connection:
        yield connection


def feed(database: Database, *values: float | None, first: int = 0, metric: str = "mean", dims: str = "") -> None:
    with transaction(database) as connection:
        samples.record(
            connection,
            [
                Sample(metric, START + (first + n) * HOUR, v, Status.OK if v is not None else Status.ERROR, dims)
                for n, v in enumerate(values)
            ],
        )


def judge(
    database: Database, *watches: Watch, mode: Mode = Mode.AUTO, at: datetime | None = None
) -> list[episodes.Happened]:
    with transaction(database) as connection:
        now = at or max((each.newest.at for each in samples.series(connection)), default=START)
        return episodes.evaluate(connection, watches or [Watch(RULE, SYNC, mode)], now)


def all_of(database: Database) -> list[Episode]:
    with transaction(database) as connection:
        return episodes.listing(connection)


def only(database: Database) -> Episode:
    [episode] = all_of(database)
    return episode


def taken(database: Database, episode_id: int, run: str = "run", lease: timedelta = LEASE) -> Claim | None:
    with transaction(database) as connection:
        return episodes.claim(connection, episode_id, run, lease)


def crossed(database: Database, mode: Mode = Mode.AUTO) -> Episode:
    feed(database, 20)
    judge(database, mode=mode)
    return only(database)


def actionable(database: Database, mode: Mode = Mode.AUTO) -> list[str]:
    with transaction(database) as connection:
        return [episodes.run_key(each) for each in episodes.actionable(connection, SYNC, mode=mode)]


@pytest.mark.parametrize(
    ("mode", "state"),
    [
        (Mode.OFF, "observed"),
        (Mode.OBSERVE, "observed"),
        (Mode.PROPOSE, "proposed"),
        (Mode.AUTO, "approved"),
        (Mode.ON, "observed"),
    ],
)
def test_the_mode_decides_how_an_episode_begins(database: Database, mode: Mode, state: str) -> None:
    episode = crossed(database, mode)
    assert (episode.state, episode.value, episode.threshold, episode.fired_at) == (state, 20, 10, START)
    assert episode.approved_by == ("auto" if mode is Mode.AUTO else None)
    assert episode.evidence["recent"] == [[START.isoformat(), 20]]


def test_a_rule_without_a_capability_is_only_observed_and_cannot_be_approved(database: Database) -> None:
    feed(database, 20)
    judge(database, Watch(RULE, None, Mode.AUTO))
    episode = only(database)
    assert episode.state is EpisodeState.OBSERVED
    with transaction(database) as connection, pytest.raises(UserError, match="acknowledge it instead"):
        episodes.approve(connection, episode.id, "Ann")


def test_whole_and_broken_thresholds_fire_in_one_evaluation(database: Database) -> None:
    feed(database, 20)
    broken = replace(RULE, name="broken", threshold=10.5)
    judge(database, Watch(RULE, SYNC), Watch(broken, SYNC))
    assert {each.rule: each.threshold for each in all_of(database)} == {"slow": 10, "broken": 10.5}


def test_a_flapping_rule_asks_a_human_in_place_of_acting(database: Database) -> None:
    rule = Rule("slow", "mean", Compare.ABOVE, 10, timedelta(hours=6), recovery=5, rearm=Rearm.REPEAT, flap_episodes=2)
    feed(database, 20, 1, 1, 20)
    judge(database, Watch(rule, SYNC, Mode.AUTO))
    second, first = all_of(database)
    assert (first.state, second.state) == (EpisodeState.APPROVED, EpisodeState.NEEDS_HUMAN)
    assert "nothing acts by itself" in (second.error or "")
    assert actionable(database) == ["slow::1:0"]


def test_the_same_samples_lead_to_the_same_episodes_one_by_one_or_at_once(database: Database) -> None:
    values = [20, 1, 1, None, 20, 1, 1, 8, 20]
    by_one = []
    for number, value in enumerate(values):
        feed(database, value, first=number, dims="one")
        by_one += judge(database)
        assert judge(database) == []
    feed(database, *values, dims="other")
    at_once = judge(database)
    assert [each.event for each in by_one] == [each.event for each in at_once]
    assert sorted((each.dims, each.episode_no) for each in all_of(database)) == [
        (dims, number) for dims in ("one", "other") for number in (1, 2, 3)
    ]


def test_what_is_not_news_is_not_written(database: Database) -> None:
    feed(database, 1, dims="a")
    feed(database, 1, dims="b")
    judge(database)
    feed(database, 2, first=1, dims="b")
    versions = "SELECT dims, xmin::text FROM scaling.rule_states ORDER BY dims"
    with transaction(database) as connection:
        before = dict(connection.execute(versions).fetchall())
    judge(database)
    with transaction(database) as connection:
        after = dict(connection.execute(versions).fetchall())
    assert (before["a"] == after["a"], before["b"] == after["b"]) == (True, False)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_rules_are_judged_once_in_however_many_parts(
    database: Database, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(episodes, "RULES_AT_ONCE", 2)
    watches = [Watch(replace(RULE, name=f"rule-{number}")) for number in range(count)]
    for dims in ("a", "b"):
        feed(database, 20, 1, 30, dims=dims)
    with transaction(database) as connection:
        happened = episodes.evaluate(connection, watches[::-1], START + 3 * HOUR)
        judged = [(each.rule, each.dims, each.state.last_value) for each in episodes.standings(connection)]
    expected = [(watch.rule.name, dims) for watch in watches for dims in ("a", "b")]
    assert [(each.rule, each.dims) for each in happened] == expected
    assert judged == [(rule, dims, 30) for rule, dims in expected]
    assert len(all_of(database)) == 2 * count


def test_a_state_that_cannot_be_written_is_an_error_and_nothing_is(database: Database) -> None:
    feed(database, 20)
    with transaction(database) as connection:
        connection.execute("ALTER TABLE scaling.rule_states ADD CHECK (phase <> 'fired')")
    with pytest.raises(psycopg.errors.CheckViolation):
        judge(database)
    with transaction(database) as connection:
        assert (episodes.standings(connection), episodes.listing(connection)) == ([], [])


def test_figures_and_moments_come_back_from_the_database_as_they_were(database: Database) -> None:
    figures = [20.1, 1e300, 1.7976931348623157e308, 12_345_678_901_234_567.0, 2.0**64, 5e-324]
    feed(database, *figures)
    with transaction(database) as connection:
        connection.execute("SET TIME ZONE 'America/St_Johns'")
        episodes.evaluate(connection, [Watch(replace(RULE, breaches=9, of=9))], START + 5 * HOUR)
        [standing] = episodes.standings(connection)
    assert standing.state.votes == tuple((START + n * HOUR, value) for n, value in enumerate(figures))
    assert (standing.state.last_at, standing.state.last_value) == (START + 5 * HOUR, 5e-324)


def test_who_waited_for_another_evaluator_finds_nothing_left_to_judge(database: Database) -> None:
    feed(database, 1)
    judge(database)
    feed(database, 20, None, first=1)
    found: list[list[episodes.Happened]] = []
    with transaction(database) as first:
        fired = episodes.evaluate(first, [Watch(RULE, SYNC, Mode.AUTO)], START + 2 * HOUR)
        second = threading.Thread(target=lambda: found.append(judge(database)))
        second.start()
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        with psycopg.connect(database.dsn, autocommit=True) as watcher:
            while watcher.execute(waiting).fetchone() == (0,):
                time.sleep(0.01)
    second.join()
    assert ([type(each.event) for each in fired], found) == ([Fired], [[]])
    assert only(database).episode_no == 1


def test_silence_is_said_once_and_acts_on_nothing(database: Database) -> None:
    feed(database, 1)
    assert judge(database, at=START + 5 * HOUR) == []
    [said] = judge(database, at=START + 7 * HOUR)
    assert isinstance(said.event, DataMissing)
    assert judge(database, at=START + 8 * HOUR) == []
    assert all_of(database) == []


def test_an_episode_without_its_state_is_not_numbered_again(database: Database) -> None:
    crossed(database)
    with transaction(database) as connection:
        connection.execute("DELETE FROM scaling.rule_states")
    judge(database)
    assert [each.episode_no for each in all_of(database)] == [2, 1]


def test_two_evaluators_at_once_fire_every_first_crossing_once_and_never_deadlock(database: Database) -> None:
    watches = [
        Watch(
            Rule(f"rule-{n}", f"m{n % 3}", Compare.ABOVE, 10, timedelta(hours=6), recovery=5, rearm=Rearm.REPEAT,
                 flap_episodes=99),
            SYNC, Mode.AUTO,
        )
        for n in range(12)
    ]  # fmt: skip
    troubles: list[BaseException] = []
    start = threading.Barrier(3)

    def evaluator(backwards: bool) -> None:
        try:
            for _ in range(8):
                start.wait()
                judge(database, *(reversed(watches) if backwards else watches))
        except BaseException as error:
            troubles.append(error)
            start.abort()

    threads = [threading.Thread(target=evaluator, args=(backwards,)) for backwards in (False, True)]
    for thread in threads:
        thread.start()
    for number in range(8):
        for metric in range(3):
            feed(database, 20 if number % 2 == 0 else 1, 1, first=2 * number, metric=f"m{metric}", dims=f"d{number}")
        start.wait()
    for thread in threads:
        thread.join()
    judge(database, *watches)
    assert troubles == []
    with transaction(database) as connection:
        found = episodes.listing(connection, limit=1000)
    assert len(found) == 12 * 4
    assert {each.episode_no for each in found} == {1}


def test_a_crossing_has_its_episode_or_neither(database: Database) -> None:
    feed(database, 20)
    with transaction(database) as connection:
        episodes.evaluate(connection, [Watch(RULE, SYNC, Mode.AUTO)], START)
        connection.rollback()
    assert all_of(database) == []
    [fired] = judge(database)
    assert isinstance(fired.event, Fired)
    assert only(database).state is EpisodeState.APPROVED


def test_a_proposal_that_recovers_expires_and_an_approved_one_is_acted_on(database: Database) -> None:
    crossed(database, Mode.PROPOSE)
    feed(database, 1, 1, 20, first=1)
    judge(database, mode=Mode.PROPOSE)
    second, first = all_of(database)
    assert (first.state, first.recovered_at) == (EpisodeState.EXPIRED, START + 2 * HOUR)
    with transaction(database) as connection:
        episodes.approve(connection, second.id, "Ann")
    feed(database, 1, 1, first=4)
    assert [type(each.event) for each in judge(database, mode=Mode.PROPOSE)] == [Recovered]
    assert actionable(database, Mode.PROPOSE) == ["slow::2:0"]


def test_approving_twice_changes_nothing_and_says_so(database: Database) -> None:
    episode = crossed(database, Mode.PROPOSE)
    assert actionable(database, Mode.PROPOSE) == []
    with transaction(database) as connection:
        assert episodes.approve(connection, episode.id, "Ann").changed
        again = episodes.approve(connection, episode.id, "Bob")
    assert (again.changed, again.episode.approved_by) == (False, "Ann")
    assert "approved already, by Ann" in again.sentence
    assert actionable(database, Mode.PROPOSE) == ["slow::1:0"]
    assert actionable(database, Mode.OFF) == []


def test_a_wrong_id_is_answered_with_what_there_is(database: Database) -> None:
    with transaction(database) as connection, pytest.raises(UserError, match="no threshold has been crossed yet"):
        episodes.get(connection, 7)
    episode = crossed(database)
    with transaction(database) as connection, pytest.raises(UserError, match=rf"{episode.id} \(slow, approved\)"):
        episodes.approve(connection, episode.id + 1, "Ann")
    with transaction(database) as connection, pytest.raises(UserError, match="who decides"):
        episodes.approve(connection, episode.id, " ")


def test_acknowledging_stops_nothing(database: Database) -> None:
    episode = crossed(database)
    with transaction(database) as connection:
        assert episodes.acknowledge(connection, episode.id, "Ann").changed
        assert not episodes.acknowledge(connection, episode.id, "Bob").changed
    assert only(database).acknowledged_by == "Ann"
    assert actionable(database) == ["slow::1:0"]


def test_a_rearmed_one_shot_fires_again_and_its_episode_tells_who_did_it(database: Database) -> None:
    watch = Watch(ONCE, SYNC, Mode.AUTO)
    feed(database, 20, 1, 1, 20)
    judge(database, watch)
    with transaction(database) as connection:
        assert episodes.rearm(connection, ONCE, "", "Ann").phase is Phase.OK
        assert episodes.standings(connection)[0].state.phase is Phase.OK
        with pytest.raises(UserError, match="evaluated of: ''"):
            episodes.rearm(connection, ONCE, "shard=x", "Ann")
    assert only(database).evidence["rearmed"]["by"] == "Ann"
    assert only(database).recovered_at == START + 2 * HOUR
    feed(database, 20, first=5)
    judge(database, watch)
    assert len(all_of(database)) == 2


@pytest.mark.parametrize("acted", [False, True], ids=["waits", "acted on"])
@pytest.mark.parametrize(
    ("mode", "then"),
    [
        (Mode.OBSERVE, EpisodeState.OBSERVED),
        (Mode.PROPOSE, EpisodeState.EXPIRED),
        (Mode.AUTO, EpisodeState.APPROVED),
    ],
)
def test_a_new_month_closes_the_episode_of_the_last_one(
    database: Database, mode: Mode, then: EpisodeState, acted: bool
) -> None:
    watch = Watch(MONTHLY, SYNC, mode)
    feed(database, 20)
    judge(database, watch)
    if acted:
        with transaction(database) as connection:
            episodes.approve(connection, only(database).id, "Ann")
        assert taken(database, only(database).id) is not None
        then = EpisodeState.ACTING
    feed(database, 1, first=OCTOBER)
    october = START + OCTOBER * HOUR
    assert [each.event for each in judge(database, watch)] == [Rearmed(1, october)]
    assert (only(database).state, only(database).recovered_at) == (then, october)


def test_of_a_month_that_recovered_the_end_of_the_month_changes_nothing(database: Database) -> None:
    watch = Watch(MONTHLY, SYNC, Mode.PROPOSE)
    feed(database, 20, 1, 1)
    feed(database, 20, first=OCTOBER)
    judged = [each.event for each in judge(database, watch)]
    assert [type(event) for event in judged] == [Fired, Recovered, Rearmed, Fired]
    second, first = all_of(database)
    assert (first.state, first.recovered_at) == (EpisodeState.EXPIRED, START + 2 * HOUR)
    assert (second.state, second.recovered_at) == (EpisodeState.PROPOSED, None)
    feed(database, 1, first=OCTOBER + 31 * 24)
    judge(database, watch)
    assert all_of(database)[0].recovered_at == START + (OCTOBER + 31 * 24) * HOUR
    assert all_of(database)[1] == first


def test_a_proposal_of_last_month_is_not_acted_on_in_auto(database: Database) -> None:
    feed(database, 20)
    judge(database, Watch(MONTHLY, SYNC, Mode.PROPOSE))
    feed(database, 20, first=OCTOBER)
    judge(database, Watch(MONTHLY, SYNC, Mode.AUTO))
    assert actionable(database, Mode.AUTO) == ["monthly::2:0"]


def test_a_one_shot_rearmed_while_it_fires_leaves_no_episode_that_looks_current(database: Database) -> None:
    watch = Watch(ONCE, SYNC, Mode.PROPOSE)
    feed(database, 20)
    judge(database, watch)
    with transaction(database) as connection:
        state = episodes.rearm(connection, ONCE, "", "Ann")
    assert (only(database).state, only(database).recovered_at) == (EpisodeState.EXPIRED, state.since)
    assert only(database).evidence["rearmed"]["by"] == "Ann"
    feed(database, 20, first=1)
    judge(database, watch)
    assert actionable(database, Mode.AUTO) == ["once::2:0"]


def test_auto_takes_over_proposals_and_propose_takes_back_what_nobody_approved(database: Database) -> None:
    crossed(database, Mode.PROPOSE)
    assert actionable(database, Mode.OBSERVE) == []
    assert actionable(database, Mode.AUTO) == ["slow::1:0"]
    assert actionable(database, Mode.ON) == []
    assert actionable(database, Mode.PROPOSE) == []
    assert only(database).state is EpisodeState.PROPOSED


def test_of_many_claimers_at_a_barrier_one_gets_it(database: Database) -> None:
    episode = crossed(database)
    barrier, won = threading.Barrier(6), []

    def claimer(number: int) -> None:
        with transaction(database) as connection:
            barrier.wait()
            if episodes.claim(connection, episode.id, f"run-{number}", LEASE):
                won.append(number)

    threads = [threading.Thread(target=claimer, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert (only(database).attempts, only(database).fence) == (1, 1)
    assert actionable(database) == []


def test_a_zombie_changes_nothing(database: Database) -> None:
    episode = crossed(database)
    zombie = taken(database, episode.id, "zombie", lease=NO_WAIT)
    time.sleep(0.01)
    owner = taken(database, episode.id, "owner")
    assert zombie is not None
    assert owner is not None
    for attempt in (episodes.hold, lambda c, claim: episodes.finish(c, claim, {"by": "zombie"})):
        with pytest.raises(ClaimLostError), transaction(database) as connection:
            attempt(connection, zombie)
    with transaction(database) as connection:
        assert not episodes.extend(connection, zombie, LEASE)
        assert not episodes.fail(connection, zombie, "late")
        assert episodes.extend(connection, owner, LEASE)
        episodes.hold(connection, owner)
        episodes.finish(connection, owner, {"by": "owner"})
    with pytest.raises(ClaimLostError), transaction(database) as connection:
        episodes.finish(connection, owner, {"by": "owner again"})
    assert (only(database).outcome, only(database).state) == ({"by": "owner"}, EpisodeState.ACTED)


def test_a_failing_action_is_retried_ever_later_then_a_human_is_asked_and_may_try_again(database: Database) -> None:
    episode = crossed(database)
    waits = []
    for number in range(1, 4):
        claim = taken(database, episode.id)
        assert claim is not None
        with transaction(database) as connection:
            assert episodes.fail(connection, claim, f"trouble {number}")
            [(wait,)] = connection.execute(
                "SELECT extract(epoch FROM retry_at - clock_timestamp()) FROM scaling.episodes"
            ).fetchall()
            waits.append(wait and round(float(wait) / 60))
        assert taken(database, episode.id) is None
        assert actionable(database) == []
        with transaction(database) as connection:
            connection.execute("UPDATE scaling.episodes SET retry_at = clock_timestamp() WHERE retry_at IS NOT NULL")
        assert actionable(database) == ([f"slow::1:{number}"] if number < 3 else [])
    assert waits == [1, 2, None]
    assert (only(database).state, only(database).error) == (EpisodeState.NEEDS_HUMAN, "trouble 3")
    with transaction(database) as connection:
        assert episodes.approve(connection, episode.id, "Ann").changed
    assert actionable(database) == ["slow::1:3"]
    claim = taken(database, episode.id)
    assert claim is not None
    with transaction(database) as connection:
        episodes.fail(connection, claim, "again")
    assert only(database).state is EpisodeState.NEEDS_HUMAN


def test_a_silent_action_is_reaped_by_the_databases_clock(database: Database) -> None:
    episode = crossed(database)
    for number in range(1, 4):
        assert taken(database, episode.id) is not None
        with transaction(database) as connection:
            assert episodes.reap(connection) == []
            connection.execute("UPDATE scaling.episodes SET acting_until = clock_timestamp()")
            [reaped] = episodes.reap(connection, first_retry=NO_WAIT)
        assert reaped.state is (EpisodeState.ACTION_FAILED if number < 3 else EpisodeState.NEEDS_HUMAN)


def test_a_run_that_ends_before_its_claim_is_requested_again_under_another_key(database: Database) -> None:
    episode = crossed(database)

    def ended(attempts: int, run_id: str = "run") -> bool:
        with transaction(database) as connection:
            return episodes.run_ended(
                connection, episode.id, run_id=run_id, attempts=attempts, error="killed", first_retry=NO_WAIT
            )

    assert ended(0)
    assert not ended(0)
    assert actionable(database) == ["slow::1:1"]
    assert taken(database, episode.id) is not None
    assert not ended(1, "another")
    assert ended(1)
    assert actionable(database) == ["slow::1:2"]


def test_the_effect_is_kept_on_the_episode(database: Database) -> None:
    episode = crossed(database)
    with transaction(database) as connection:
        episodes.set_effect(connection, episode.id, {"calls": 0.2})
        assert episodes.get(connection, episode.id).effect == {"calls": 0.2}
        with pytest.raises(UserError, match="no episode"):
            episodes.set_effect(connection, 999, {})


def test_two_rules_of_one_name_are_refused(database: Database) -> None:
    with pytest.raises(UserError, match="two rules are named slow"):
        judge(database, Watch(RULE), Watch(RULE))
