"""The machine of the thresholds: when an episode begins and ends, and that nothing else begins or ends one."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling.errors import UserError
from scaling.samples import Sample, Status
from scaling.thresholds import (
    FUTURE_TOLERANCE,
    Compare,
    DataBack,
    DataMissing,
    Event,
    Fired,
    Flapping,
    FromFuture,
    Phase,
    Rearm,
    Rearmed,
    Recovered,
    Rule,
    State,
    rearm,
    replay,
    silence,
    step,
)

START = datetime(2026, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
FAR = START + timedelta(days=10_000)
NOT_OK = [each for each in Status if each is not Status.OK]


def at(hours: float) -> datetime:
    return START + hours * HOUR


def ok(hours: float, value: float, period: str = "") -> Sample:
    return Sample("metric", at(hours), value, period=period)


def none(hours: float, status: Status = Status.ERROR) -> Sample:
    return Sample("metric", at(hours), None, status)


def hourly(*values: float | None) -> list[Sample]:
    return [none(hour) if value is None else ok(hour, value) for hour, value in enumerate(values)]


def a_rule(**changes: Any) -> Rule:
    given: dict[str, Any] = {
        "name": "rule",
        "metric": "metric",
        "compare": Compare.ABOVE,
        "threshold": 10.0,
        "no_data_after": 3 * HOUR,
        "recovery": 8.0,
        "rearm": Rearm.REPEAT,
        "flap_episodes": 1000,
    }
    return Rule(**{**given, **changes})


def run(rule: Rule, samples: Sequence[Sample], state: State | None = None) -> tuple[State, list[Event]]:
    state = state or State.initial()
    events: list[Event] = []
    for sample in samples:
        state, happened = step(rule, state, sample, FAR)
        events += happened
    return state, events


def phases(rule: Rule, samples: Sequence[Sample]) -> list[str]:
    return [state.phase.value for _, state, _ in replay(rule, samples)]


def episodes(events: Sequence[Event]) -> list[Event]:
    return [event for event in events if isinstance(event, Fired | Recovered | Rearmed | Flapping)]


# --- Properties -----------------------------------------------------------------------------------------------------

hours = st.integers(0, 400)
values = st.one_of(st.sampled_from([0.0, 7.9, 8.0, 9.0, 10.0, 10.1, 30.0]), st.floats(0, 1e300))


@st.composite
def rules(draw: st.DrawFn, /, **fixed: Any) -> Rule:
    """Rules of every kind over a metric whose values lie on both sides of 8 and 10."""
    compare = draw(st.sampled_from(list(Compare)))
    low, high = draw(st.sampled_from([(8.0, 10.0), (9.0, 10.1), (0.0, 30.0)]))
    above = compare in (Compare.ABOVE, Compare.AT_LEAST)
    of, recovery_of = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    kind = draw(st.sampled_from(list(Rearm)))
    recovery = low if above else high
    return a_rule(
        **{
            "compare": compare,
            "threshold": high if above else low,
            "recovery": recovery if kind is Rearm.REPEAT else draw(st.sampled_from([recovery, None])),
            "breaches": draw(st.integers(1, of)),
            "of": of,
            "hold": draw(st.integers(0, 4)) * HOUR,
            "recoveries": draw(st.integers(1, recovery_of)),
            "recovery_of": recovery_of,
            "min_fired": draw(st.integers(0, 4)) * HOUR,
            "rearm": kind,
            "no_data_after": draw(st.sampled_from([1, 3, 1000])) * HOUR,
            "flap_episodes": draw(st.sampled_from([2, 3, 1000])),
            "flap_window": draw(st.sampled_from([5, 100])) * HOUR,
            **fixed,
        }
    )


def moments(least: int = 0) -> st.SearchStrategy[list[int]]:
    return st.lists(hours, min_size=least, max_size=40, unique=True).map(sorted)


@st.composite
def streams(draw: st.DrawFn, *, only_ok: bool = False) -> list[Sample]:
    """Samples in the order of time, all or none of them with the month they belong to (of ten hours)."""
    monthly = draw(st.booleans())

    def sample(hour: int) -> Sample:
        if not only_ok and draw(st.integers(0, 3)) == 0:
            return none(hour, draw(st.sampled_from(NOT_OK)))
        return ok(hour, draw(values), f"{2026 + hour // 120}-{hour // 10 % 12 + 1:02}" if monthly else "")

    return [sample(hour) for hour in draw(moments())]


@given(rules(), streams(only_ok=True), st.lists(st.tuples(hours, st.sampled_from(NOT_OK)), max_size=20))
def test_what_is_not_ok_never_begins_nor_ends_an_episode(
    rule: Rule, stream: list[Sample], blanks: list[tuple[int, Status]]
) -> None:
    blank = [none(hour + 0.5, status) for hour, status in blanks]
    alone, with_blanks = replay(rule, stream), replay(rule, [*stream, *blank])
    assert episodes([e for *_, events in alone for e in events]) == episodes(
        [e for *_, events in with_blanks for e in events]
    )
    if alone:
        forgetful: dict[str, Any] = {"seen_at": None, "gap": 0, "gap_since": None, "missing": False}
        assert replace(alone[-1][1], **forgetful) == replace(with_blanks[-1][1], **forgetful)


@given(rules(), streams(), st.data())
def test_the_same_samples_lead_to_the_same_episodes_in_whatever_batches_and_how_often_they_come(
    rule: Rule, stream: list[Sample], data: st.DataObject
) -> None:
    once, events = run(rule, stream)
    state, again = State.initial(), []
    fed = 0
    while fed < len(stream):
        start, end = data.draw(st.integers(0, fed)), data.draw(st.integers(fed + 1, len(stream)))
        state = State.from_json(state.to_json())
        state, happened = run(rule, stream[start:end], state)
        again += happened
        fed = end
    assert (state, again) == (once, events)


@given(rules(), streams(), st.randoms(use_true_random=False))
def test_no_order_of_delivery_fires_twice_without_an_end_between(rule: Rule, stream: list[Sample], rng: Any) -> None:
    mixed = stream * 2
    rng.shuffle(mixed)
    state, events = run(rule, mixed)
    open_episode = None
    numbers = []
    for event in events:
        if isinstance(event, Fired):
            assert open_episode is None
            open_episode = event.episode_no
            numbers.append(event.episode_no)
        elif isinstance(event, Recovered):
            assert event.episode_no == open_episode
            open_episode = None
        elif isinstance(event, Rearmed):
            assert event.episode_no == state.episode_no or event.episode_no in numbers
            open_episode = None
    assert numbers == list(range(1, state.episode_no + 1))
    if rule.rearm is Rearm.ONE_SHOT:
        assert len(numbers) <= 1


@given(rules(), streams(), st.randoms(use_true_random=False))
def test_an_error_that_overtakes_the_figure_of_an_earlier_moment_does_not_hide_it(
    rule: Rule, stream: list[Sample], rng: Any
) -> None:
    """Bills are dated yesterday, errors now: the order among ok samples is all that counts."""
    figures = [sample for sample in stream if sample.status is Status.OK]
    blanks = [sample for sample in stream if sample.status is not Status.OK]
    mixed = list(figures)
    for blank in blanks:
        mixed.insert(rng.randint(0, len(mixed)), blank)
    assert episodes(run(rule, mixed)[1]) == episodes(run(rule, stream)[1])


@given(rules(recovery=None, rearm=Rearm.ONE_SHOT), streams(), st.floats(0, 50), st.floats(0, 50))
def test_a_threshold_further_away_never_fires_earlier(
    rule: Rule, stream: list[Sample], one: float, other: float
) -> None:
    near, far = sorted((one, other), reverse=rule.compare in (Compare.BELOW, Compare.AT_MOST))
    first_near = run(replace(rule, threshold=near), stream)[0].fired_at
    first_far = run(replace(rule, threshold=far), stream)[0].fired_at
    assert first_far is None or (first_near is not None and first_near <= first_far)


@given(st.integers(1, 6), st.data(), st.lists(values, max_size=40))
def test_the_first_fire_is_the_first_breach_with_m_in_the_last_n(
    n: int, data: st.DataObject, figures: list[float]
) -> None:
    m = data.draw(st.integers(1, n))
    breach = [value > 10 for value in figures]
    first = next((i for i in range(len(figures)) if breach[i] and sum(breach[max(0, i - n + 1) : i + 1]) >= m), None)
    fired_at = next((s.fired_at for _, s, _ in replay(a_rule(breaches=m, of=n), hourly(*figures)) if s.fired_at), None)
    assert fired_at == (None if first is None else at(first))


@given(st.lists(st.sampled_from([0.0, 11.0]), max_size=60))
def test_every_crossing_with_two_quiet_samples_behind_the_last_one_is_one_episode(figures: list[float]) -> None:
    expected, armed, quiet = 0, True, 0
    for value in figures:
        quiet = 0 if value else quiet + 1
        if value and armed:
            expected, armed = expected + 1, False
        armed = armed or quiet >= 2
    assert run(a_rule(), hourly(*figures))[0].episode_no == expected


@given(rules(), streams())
def test_a_state_survives_json_and_remembers_no_more_than_its_windows(rule: Rule, stream: list[Sample]) -> None:
    for _, state, _ in replay(rule, stream):
        assert State.from_json(state.to_json()) == state
        assert len(state.votes) <= max(rule.of, rule.recovery_of)
        assert len(state.fired) <= rule.flap_episodes
        hash(state)


@given(rules(), streams(), rules())
def test_an_edited_rule_goes_on_with_the_episodes_there_are(rule: Rule, stream: list[Sample], edited: Rule) -> None:
    before, _ = run(rule, stream)
    _, events = run(edited, [ok(1000, 9.5), ok(1001, 20.0), ok(1002, 0.0), ok(1003, 20.0)], before)
    numbers = [event.episode_no for event in events if isinstance(event, Fired)]
    assert numbers == list(range(before.episode_no + 1, before.episode_no + 1 + len(numbers)))


# --- M of N, hold, recovery -----------------------------------------------------------------------------------------

u, o, p, f, c, x = "unknown", "ok", "pending", "fired", "clearing", "latched"


@pytest.mark.parametrize(
    ("rule", "figures", "expected"),
    [
        pytest.param(a_rule(), [9, 11, 11], [o, f, f], id="1/1 fires at the first breach"),
        pytest.param(a_rule(), [10, 10.1], [o, f], id="> does not include its threshold"),
        pytest.param(a_rule(compare=Compare.AT_LEAST), [9.9, 10], [o, f], id=">= does"),
        pytest.param(
            a_rule(compare=Compare.BELOW, threshold=0.2, recovery=0.3), [0.2, 0.1, 0.3], [o, f, c], id="below"
        ),
        pytest.param(
            a_rule(compare=Compare.AT_MOST, threshold=0.2, recovery=0.3), [0.3, 0.2, 0.25], [o, f, f], id="at most"
        ),
        pytest.param(a_rule(breaches=2, of=3), [11, 9, 11], [p, p, f], id="2/3 forgives one"),
        pytest.param(a_rule(breaches=2, of=3), [11, 9, 9, 11], [p, p, p, p], id="2/3 forgives no two"),
        pytest.param(a_rule(breaches=2, of=3), [11, 9, 9, 9], [p, p, p, o], id="2/3 is over after three"),
        pytest.param(a_rule(breaches=2, of=3), [11, None, None, 11], [p, p, p, f], id="2/3 counts ok samples only"),
        pytest.param(a_rule(breaches=3, of=5), [11, 9, 11, 9, 11], [p, p, p, p, f], id="3/5"),
        pytest.param(a_rule(breaches=3, of=5), [11, 11, 9, 9, 9, 11], [p, p, p, p, p, p], id="3/5 looks back five"),
        pytest.param(a_rule(hold=2 * HOUR), [11, 11, 11], [p, p, f], id="hold"),
        pytest.param(a_rule(hold=2 * HOUR), [11, 11, 9, 11, 11, 11], [p, p, o, p, p, f], id="hold begins anew"),
        pytest.param(
            a_rule(breaches=2, of=3, hold=3 * HOUR), [11, 11, 11, 9, 11], [p, p, p, p, f], id="fires at a breach only"
        ),
        pytest.param(a_rule(), [11, 9, 9, 9], [f, f, f, f], id="between the thresholds nothing recovers"),
        pytest.param(a_rule(), [11, 8, 8], [f, c, o], id="at the recovery threshold it does, and is confirmed"),
        pytest.param(a_rule(), [11, 8, 9, 9, 7], [f, c, c, c, o], id="between the thresholds nothing is confirmed"),
        pytest.param(a_rule(), [11, 8, 11, 8, 8, 11], [f, c, f, c, o, f], id="crossing again while it clears"),
        pytest.param(a_rule(recovery=None, rearm=Rearm.ONE_SHOT), [11, 0, 0], [f, f, f], id="never recovers by value"),
        pytest.param(
            a_rule(recoveries=2, recovery_of=3), [11, 8, 9, 8, 8], [f, f, f, c, o], id="2/3 recoveries forgive one"
        ),
        pytest.param(a_rule(min_fired=3 * HOUR), [11, 8, 8, 8, 8], [f, f, f, c, o], id="fired at least so long"),
        pytest.param(
            a_rule(recoveries=2, recovery_of=5), [0, 0, 0, 11, 8], [o, o, o, f, f], id="what was low before is no vote"
        ),
        pytest.param(
            a_rule(breaches=2, of=5),
            [11, 11, 8, 8, 11, 11],
            [p, f, c, o, p, f],
            id="breaches of the last episode neither",
        ),
        pytest.param(a_rule(rearm=Rearm.ONE_SHOT), [11, 8, 8, 11, 11], [f, c, x, x, x], id="one shot"),
        pytest.param(a_rule(), [None, None, 11], [u, u, f], id="nothing is known before the first ok sample"),
        pytest.param(
            a_rule(), [11, None, None, None, None, None, 9], [f, f, f, f, f, f, f], id="no data is no recovery"
        ),
    ],
)
def test_phases_follow_the_table(rule: Rule, figures: list[float | None], expected: list[str]) -> None:
    assert phases(rule, hourly(*figures)) == expected


def test_an_episode_says_what_fired_it_and_what_ended_it() -> None:
    _, events = run(a_rule(breaches=2, of=3), hourly(11, 9, 12, 8, 7, 11, 11))
    assert events == [
        Fired(1, at(2), 12, ((at(0), 11), (at(1), 9), (at(2), 12))),
        Recovered(1, at(4), 7),
        Fired(2, at(6), 11, ((at(5), 11), (at(6), 11))),
    ]


def test_a_zero_is_a_figure_like_any_other() -> None:
    rule = a_rule(compare=Compare.BELOW, threshold=1, recovery=2)
    assert run(rule, hourly(0))[1] == [Fired(1, at(0), 0, ((at(0), 0),))]


@pytest.mark.parametrize("status", NOT_OK)
def test_nothing_counts_but_ok_samples(status: Status) -> None:
    pending, _ = run(a_rule(breaches=2, of=2), [ok(0, 11)])
    after, events = run(a_rule(breaches=2, of=2), [none(1, status), none(2, status)], pending)
    assert events == []
    assert replace(after, seen_at=at(0), gap=0, gap_since=None) == pending
    assert after.gap == 2


# --- No data --------------------------------------------------------------------------------------------------------


def test_missing_data_is_said_once_and_so_is_its_return() -> None:
    _, events = run(a_rule(), [*hourly(1, None, None, None, None, None, 1, None, None), none(9), none(10)])
    assert events == [DataMissing(at(0), Status.ERROR), DataBack(at(6)), DataMissing(at(6), Status.ERROR)]


def test_a_source_that_never_had_data_is_missing_since_it_was_asked_first() -> None:
    _, events = run(a_rule(), [none(hour, Status.NOT_CONFIGURED) for hour in range(8)])
    assert events == [DataMissing(at(0), Status.NOT_CONFIGURED)]


def test_a_metric_nobody_measures_any_more_is_missing_too() -> None:
    state, _ = run(a_rule(), [ok(0, 1)])
    assert silence(a_rule(), state, at(2))[1] == ()
    quiet, events = silence(a_rule(), state, at(3))
    assert events == (DataMissing(at(0), None),)
    assert silence(a_rule(), quiet, at(4))[1] == ()
    assert run(a_rule(), [ok(5, 1)], quiet)[1] == [DataBack(at(5))]
    assert silence(a_rule(), State.initial(), at(9)) == (State.initial(), ())


def test_silence_in_an_episode_does_not_end_it() -> None:
    state, _ = run(a_rule(), [ok(0, 11), ok(1, 8)])
    assert silence(a_rule(), state, at(99))[0].phase is Phase.CLEARING


def test_a_gap_longer_than_allowed_voids_what_is_pending() -> None:
    rule = a_rule(breaches=2, of=3)
    assert phases(rule, [ok(0, 11), ok(3, 11)]) == [p, f]
    assert phases(rule, [ok(0, 11), ok(3.1, 11), ok(4, 11)]) == [p, p, f]
    held = a_rule(hold=5 * HOUR)
    assert phases(held, [ok(0, 11), ok(2, 11), ok(5, 11)]) == [p, p, f]
    assert phases(held, [ok(0, 11), ok(3.1, 11), ok(5, 11), ok(8, 11), ok(9, 11)]) == [p, p, p, p, f]


def test_a_gap_longer_than_allowed_voids_what_speaks_for_recovery() -> None:
    assert phases(a_rule(), [ok(0, 11), ok(1, 8), ok(5, 8), ok(6, 8)]) == [f, c, c, o]
    rule = a_rule(recoveries=2, recovery_of=2)
    assert phases(rule, [ok(0, 11), ok(1, 8), ok(5, 8), ok(6, 8)]) == [f, f, f, c]


def test_data_is_back_with_a_figure_of_before_the_error() -> None:
    """A bill is dated by its day; the error that was met on the way to it is dated now."""
    state, _ = run(a_rule(), [ok(0, 1), none(30)])
    assert state.missing
    assert run(a_rule(), [ok(24, 11)], state)[1][0] == DataBack(at(24))


def test_an_error_that_comes_again_after_such_a_figure_counts_once() -> None:
    state, _ = run(a_rule(), [ok(0, 1), none(30), ok(24, 1), none(30)])
    assert state.gap == 0


# --- Clocks ---------------------------------------------------------------------------------------------------------


def test_a_sample_from_the_future_waits_for_its_time_and_is_spoken_of_once() -> None:
    rule, early = a_rule(), ok(5, 11)
    state, events = step(rule, State.initial(), early, at(1))
    assert events == (FromFuture(at(5), at(1)),)
    assert (state.phase, state.last_at, state.seen_at) == (Phase.UNKNOWN, None, None)
    assert step(rule, state, early, at(2)) == (state, ())
    state, _ = step(rule, state, ok(3, 1), at(3))
    assert step(rule, state, early, at(5))[1] == (Fired(1, at(5), 11, ((at(5), 11),)),)


def test_clocks_may_differ_a_little() -> None:
    assert step(a_rule(), State.initial(), ok(1, 11), at(1) - FUTURE_TOLERANCE)[1] != ()
    nearly = step(a_rule(), State.initial(), ok(1, 11), at(1) - FUTURE_TOLERANCE - timedelta(seconds=1))
    assert isinstance(nearly[1][0], FromFuture)


def test_an_error_from_the_future_hides_no_later_errors() -> None:
    state, _ = step(a_rule(), State.initial(), none(1000), at(0))
    state, _ = step(a_rule(), state, none(1), at(1))
    assert state.gap == 1


@pytest.mark.parametrize("late", [ok(1, 11), ok(0.5, 11), none(1), none(0.5)])
def test_what_is_not_newer_changes_nothing(late: Sample) -> None:
    state, _ = run(a_rule(), [ok(0, 1), ok(1, 1)])
    assert not state.wants(late)
    assert step(a_rule(), state, late, FAR) == (state, ())


# --- Months ---------------------------------------------------------------------------------------------------------

DAY = 24
CALLS = {"threshold": 10_000.0, "recovery": 8_000.0, "no_data_after": timedelta(days=3)}


def month(number: int, *figures: float, first_day: int = 0) -> list[Sample]:
    """A figure of the month to date a day, evenly spread over 28 days so that months follow each other."""
    every = 28 * DAY / len(figures)
    return [
        ok((28 * number + first_day) * DAY + n * every, value, f"2026-{number + 1:02}")
        for n, value in enumerate(figures)
    ]


def grown(number: int, total: float) -> list[Sample]:
    return month(number, *(total * (day + 1) / 28 for day in range(28)))


def test_the_first_days_of_a_month_are_no_recovery_from_the_last_one() -> None:
    state, events = run(a_rule(**CALLS, rearm=Rearm.ONE_SHOT), [*grown(0, 20_000), *grown(1, 20_000), *grown(2, 9_000)])
    assert [type(event) for event in events] == [Fired]
    assert state.phase is Phase.FIRED


def test_a_whole_month_under_the_recovery_threshold_is_one() -> None:
    samples = [*grown(0, 20_000), *grown(1, 7_000), *grown(2, 20_000)]
    state, events = run(a_rule(**CALLS, rearm=Rearm.ONE_SHOT), samples)
    assert events[1:] == [Recovered(1, at(56 * DAY), 7_000)]
    assert state.phase is Phase.LATCHED
    _, events = run(a_rule(**CALLS), samples)
    assert [type(event) for event in events] == [Fired, Recovered, Fired]


def test_two_of_three_months_can_be_asked_for() -> None:
    rule = a_rule(**CALLS, recoveries=2, recovery_of=3)
    totals = [20_000, 7_000, 9_000, 7_500, 100]
    samples = [sample for number, total in enumerate(totals) for sample in grown(number, total)]
    assert episodes(run(rule, samples)[1])[1:] == [Recovered(1, at(4 * 28 * DAY), 7_500)]


def test_a_gap_within_a_month_voids_no_month_that_has_closed() -> None:
    rule = a_rule(**CALLS, recoveries=2, recovery_of=2)
    last = grown(2, 7_500)
    samples = [*grown(0, 20_000), *grown(1, 7_000), *last[:8], *last[20:], *grown(3, 100)]
    assert episodes(run(rule, samples)[1])[1:] == [Recovered(1, at(3 * 28 * DAY), 7_500)]


def test_a_month_whose_end_was_not_seen_is_no_recovery() -> None:
    rule = a_rule(**CALLS)
    unseen = [*grown(0, 20_000), *grown(1, 7_000)[:20], *grown(2, 9_000)]
    assert [type(event) for event in episodes(run(rule, unseen)[1])] == [Fired]
    seen = [*grown(0, 20_000), *grown(1, 7_000)[:8], *grown(1, 7_000)[20:], *grown(2, 9_000)]
    assert [type(event) for event in episodes(run(rule, seen)[1])] == [Fired, Recovered]


def test_every_month_that_crosses_is_an_episode_of_a_rule_by_the_month() -> None:
    rule = a_rule(**CALLS, rearm=Rearm.PERIOD)
    samples = [*grown(0, 20_000), *grown(1, 20_000), *grown(2, 100), *grown(3, 20_000)]
    _, events = run(rule, samples)
    assert [(type(event), event.episode_no) for event in episodes(events)] == [  # type: ignore[union-attr]
        (Fired, 1),
        (Rearmed, 1),
        (Fired, 2),
        (Rearmed, 2),
        (Fired, 3),
    ]
    assert not any(isinstance(event, Recovered) for event in events)
    assert [event.at for event in events if isinstance(event, Rearmed)] == [at(28 * DAY), at(2 * 28 * DAY)]


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ([("01", 4), ("01", 11), ("01", 12), ("02", 1), ("02", 11)], [o, f, f, o, f]),
        ([("01", 11), ("01", 3), ("01", 11), ("02", 11)], [f, f, f, f]),
        ([("01", 11), ("02", 1), ("01", 12), ("02", 2)], [f, o, o, o]),
        ([("01", 11), ("03", 11)], [f, f]),
    ],
    ids=["again next month", "once a month", "a late figure of the last month", "a month is missing"],
)
def test_a_rule_by_the_month_follows_the_table(figures: list[tuple[str, float]], expected: list[str]) -> None:
    samples = [ok(hour, value, f"2026-{name}") for hour, (name, value) in enumerate(figures)]
    assert phases(a_rule(rearm=Rearm.PERIOD), samples) == expected
    fired = [e for e in run(a_rule(rearm=Rearm.PERIOD), samples)[1] if isinstance(e, Fired)]
    assert len({e.at for e in fired}) == len(fired) == len({figures[int((e.at - START) / HOUR)][0] for e in fired})


def test_a_gauge_is_judged_by_the_month_of_its_moment() -> None:
    rule = a_rule(rearm=Rearm.PERIOD, no_data_after=timedelta(days=99))
    samples = [ok(0, 11), ok(1, 8), ok(2, 8), ok(3, 11), ok(31 * DAY, 11)]
    assert phases(rule, samples) == [f, c, x, x, f]
    assert episodes(run(rule, samples)[1])[1:3] == [Recovered(1, at(2), 8), Rearmed(1, at(31 * DAY))]


def test_votes_of_a_month_end_with_it() -> None:
    rule = a_rule(breaches=2, of=3)
    samples = [ok(0, 11, "2026-01"), ok(1, 11, "2026-02"), ok(2, 11, "2026-02")]
    assert phases(rule, samples) == [p, p, f]


# --- Flapping, re-arming, editing -----------------------------------------------------------------------------------


def test_flapping_is_said_once_and_marks_its_episodes() -> None:
    rule = a_rule(flap_episodes=3, flap_window=24 * HOUR)
    once = [11, 0, 0]
    state, events = run(rule, hourly(*once * 5))
    fired = [event for event in events if isinstance(event, Fired)]
    assert [event.flapping for event in fired] == [False, False, True, True, True]
    assert [event for event in events if isinstance(event, Flapping)] == [Flapping(3)]
    assert state.flapping


def test_flapping_is_over_when_the_window_has_passed() -> None:
    rule = a_rule(flap_episodes=3, flap_window=24 * HOUR, no_data_after=99 * HOUR)
    state, _ = run(rule, hourly(*[11, 0, 0] * 3))
    assert run(rule, [ok(24, 0)], state)[0].flapping
    calm, _ = run(rule, [ok(25, 0)], state)
    assert not calm.flapping
    _, events = run(rule, [ok(28, 11)], calm)
    assert [event.flapping for event in events if isinstance(event, Fired)] == [False]
    _, events = run(rule, [replace(s, at=s.at + 28 * HOUR) for s in hourly(*[11, 0, 0] * 3)], calm)
    assert [event for event in events if isinstance(event, Flapping)] == [Flapping(6)]


def test_one_flapping_episode_less_is_none() -> None:
    _, events = run(a_rule(flap_episodes=3, flap_window=5 * HOUR), hourly(*[11, 0, 0] * 5))
    assert not any(isinstance(event, Flapping) for event in events)


@pytest.mark.parametrize("figures", [[11, 8, 8], [11, 11], [11, 8]], ids=[x, f, c])
def test_a_human_rearms_a_one_shot_and_it_fires_its_next_episode(figures: list[float]) -> None:
    rule = a_rule(rearm=Rearm.ONE_SHOT)
    state, _ = run(rule, hourly(*figures))
    armed = rearm(rule, state, at(5))
    assert (armed.phase, armed.since, armed.episode_no) == (Phase.OK, at(5), 1)
    assert run(rule, [ok(6, 11)], armed)[1][-1] == Fired(2, at(6), 11, ((at(6), 11),))


def test_a_one_shot_without_recovery_is_rearmed_while_it_fires() -> None:
    rule = a_rule(rearm=Rearm.ONE_SHOT, recovery=None)
    state, _ = run(rule, hourly(11, 0))
    assert phases_after(rule, rearm(rule, state, at(2)), [ok(3, 0), ok(4, 11)]) == [o, f]


def phases_after(rule: Rule, state: State, samples: Sequence[Sample]) -> list[str]:
    seen = []
    for sample in samples:
        state, _ = step(rule, state, sample, FAR)
        seen.append(state.phase.value)
    return seen


def test_rearming_forgets_the_flapping_somebody_has_looked_at() -> None:
    rule = a_rule(rearm=Rearm.ONE_SHOT, flap_episodes=2)
    state, _ = run(rule, hourly(11, 8, 8))
    state, events = run(rule, [ok(3, 11)], rearm(rule, state, at(2)))
    assert [event.flapping for event in events if isinstance(event, Fired)] == [False]


def test_there_is_nothing_to_rearm_where_nothing_is_held() -> None:
    rule = a_rule(rearm=Rearm.ONE_SHOT)
    with pytest.raises(UserError, match="rule is ok, so it is armed already"):
        rearm(rule, run(rule, hourly(1))[0], FAR)
    with pytest.raises(UserError, match=r"rule re-arms by itself \(repeat\)"):
        rearm(a_rule(), run(a_rule(), hourly(11))[0], FAR)


def test_a_latched_rule_that_is_edited_to_repeat_is_armed() -> None:
    latched, _ = run(a_rule(rearm=Rearm.ONE_SHOT), hourly(11, 8, 8))
    assert run(a_rule(), [ok(3, 11)], latched)[1] == [Rearmed(1, at(3)), Fired(2, at(3), 11, ((at(3), 11),))]


def test_an_edited_threshold_judges_what_is_remembered_anew() -> None:
    two_of_two = a_rule(breaches=2, of=2)
    pending, _ = run(two_of_two, hourly(11))
    higher, lower = replace(two_of_two, threshold=20.0), replace(two_of_two, threshold=9.0)
    assert run(higher, [ok(1, 21)], pending)[0].since == at(1)
    assert run(lower, [ok(1, 9.5)], pending)[0].phase is Phase.FIRED


def test_an_edited_rule_starts_no_second_episode_while_one_runs() -> None:
    fired, _ = run(a_rule(), hourly(11))
    state, events = run(a_rule(threshold=9.0), [ok(1, 12), ok(2, 9.5)], fired)
    assert (events, state.phase, state.episode_no) == ([], Phase.FIRED, 1)
    assert state.rule_version == a_rule(threshold=9.0).version != fired.rule_version


def test_the_version_changes_with_what_decides_and_with_nothing_else() -> None:
    version = a_rule().version
    assert len(version) == 12
    assert int(version, 16) >= 0
    assert version == a_rule(name="another").version == a_rule(threshold=10).version
    others = [
        a_rule(metric="other"),
        a_rule(compare=Compare.AT_LEAST),
        a_rule(threshold=11.0),
        a_rule(recovery=7.0),
        a_rule(of=2),
        a_rule(breaches=2, of=2),
        a_rule(hold=HOUR),
        a_rule(recovery_of=2),
        a_rule(recoveries=2, recovery_of=2),
        a_rule(min_fired=HOUR),
        a_rule(rearm=Rearm.PERIOD),
        a_rule(no_data_after=HOUR),
        a_rule(flap_episodes=3),
        a_rule(flap_window=HOUR),
    ]
    assert len({version, *(each.version for each in others)}) == len(others) + 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"threshold": float("nan")}, "threshold must be a finite number"),
        ({"recovery": float("inf")}, "recovery must be a finite number"),
        ({"recovery": 10.1}, "recovery must not itself be > 10"),
        ({"compare": Compare.AT_LEAST, "recovery": 10.0}, "recovery must not itself be >= 10"),
        ({"compare": Compare.BELOW, "recovery": 8.0}, "recovery must not itself be < 10"),
        ({"breaches": 3, "of": 2}, "breaches must be between 1 and of"),
        ({"breaches": 0}, "breaches must be between 1 and of"),
        ({"recoveries": 2}, "recoveries must be between 1 and recovery_of"),
        ({"of": 1001}, "of and recovery_of must be at most 1000"),
        ({"hold": -HOUR}, "hold and min_fired must not be negative"),
        ({"no_data_after": timedelta(0)}, "no_data_after must be longer than nothing"),
        ({"flap_episodes": 1}, "flap_episodes must be between 2 and 1000"),
        ({"flap_window": timedelta(0)}, "flap_window must be longer than nothing"),
        ({"recovery": None}, "recovery must be set when rearm is repeat"),
    ],
)
def test_a_rule_that_cannot_work_is_refused_in_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as raised:
        a_rule(**changes)
    assert str(raised.value) == f"rule rule: {sentence}"


def test_a_sample_of_another_metric_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="rule rule judges metric, not other"):
        step(a_rule(), State.initial(), Sample("other", START, 1.0), START)


# --- Replay ---------------------------------------------------------------------------------------------------------


def test_replay_tells_every_sample_in_the_order_of_time_with_a_state_per_dims() -> None:
    main = [replace(sample, dims="shard=main") for sample in hourly(11, 11)]
    other = [replace(sample, dims="shard=other") for sample in hourly(1, 11)]
    told = replay(a_rule(breaches=2, of=2), [*reversed(main), *other])
    assert [(s.at, s.dims, state.phase.value, len(events)) for s, state, events in told] == [
        (at(0), "shard=main", p, 0),
        (at(0), "shard=other", o, 0),
        (at(1), "shard=main", f, 1),
        (at(1), "shard=other", p, 0),
    ]
    assert replay(a_rule(), []) == []


@given(rules(), streams())
def test_replay_is_what_happened(rule: Rule, stream: list[Sample]) -> None:
    told = replay(rule, stream)
    state, events = run(rule, stream)
    assert [sample for sample, *_ in told] == stream
    assert [event for *_, happened in told for event in happened] == events
    assert not told or told[-1][1] == state
