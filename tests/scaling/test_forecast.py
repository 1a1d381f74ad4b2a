"""The forecasts: a date only where there is one, as early and as late as the truth lies nine times in ten."""

import random as shuffling
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import scaling.forecast as forecasts
from scaling.forecast import MIN_DAYS, MIN_PERIOD_DAYS, Forecast, forecast, last_step
from scaling.samples import Sample, Status
from scaling.thresholds import Compare
from tests.scaling.trends import KINDS, NOW, Kind, Trend, series, trend

DAY = timedelta(days=1)
HOUR = timedelta(hours=1)
SEEDS = st.integers(0, 2**32 - 1)
QUIET = Kind(noise=2)


def daily(values: Sequence[float], until: datetime = NOW, period: str = "") -> list[Sample]:
    return [
        Sample("metric", until - (len(values) - 1 - day) * DAY, float(value), period=period)
        for day, value in enumerate(values)
    ]


def line(days: int, slope: float = 1.0, start: float = 100.0) -> list[Sample]:
    return daily([start + slope * day for day in range(days)])


def noisy(seed: int, *, slope: float = 1.0, days: int = 30, kind: Kind = QUIET) -> list[Sample]:
    return series(kind, slope, days, np.random.default_rng(seed))


def above(samples: Sequence[Sample], threshold: float, now: datetime = NOW, **others: object) -> Forecast:
    return forecast(samples, threshold, Compare.ABOVE, now, **others)  # type: ignore[arg-type]


def mapped(samples: Sequence[Sample], change: Callable[[float], float]) -> list[Sample]:
    return [replace(each, value=None if each.value is None else change(each.value)) for each in samples]


def days_ahead(found: Forecast, now: datetime = NOW) -> list[float]:
    return [(each - now) / DAY for each in (found.p10, found.p50, found.p90) if each is not None]


def holds(found: Forecast, truth: datetime) -> bool:
    return found.p10 is not None and found.p10 <= truth and (found.p90 is None or truth <= found.p90)


def predict_linear(samples: Sequence[Sample], threshold: float, now: datetime) -> float:
    """The days from now in which Prometheus' formula, simple linear regression, reaches a threshold."""
    x = np.array([(each.at - now) / DAY for each in samples])
    y = np.array([each.value for each in samples], dtype=np.float64)
    count = len(x)
    covariance = np.sum(x * y) - np.sum(x) * np.sum(y) / count
    slope = covariance / (np.sum(x * x) - np.sum(x) ** 2 / count)
    intercept = np.sum(y) / count - slope * np.sum(x) / count
    return float((threshold - intercept) / slope)


def dated(found: Forecast) -> bool:
    dates = (found.p10, found.p50, found.p90)
    assert found.trend or dates == (None, None, None)
    assert not found.trend or None not in dates[:2]
    return found.trend


@given(SEEDS, st.floats(0.5, 3), st.integers(MIN_DAYS, 60), st.floats(1, 50), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_the_dates_are_in_order_and_none_lies_before_now(
    seed: int, slope: float, days: int, ahead: float, deal: int
) -> None:
    found = above(noisy(seed, slope=slope, days=days), 100 + slope * (days - 1 + ahead), seed=deal)
    if dated(found):
        dates = [each for each in (found.p10, found.p50, found.p90) if each is not None]
        assert dates == sorted(dates)
        assert dates[0] >= NOW
        assert all(each.low <= each.middle <= each.high for each in found.projection)
        assert [each.at for each in found.projection] == sorted(each.at for each in found.projection)


@given(SEEDS, st.integers(0, 9), st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_the_same_seed_gives_the_same_forecast_whatever_the_order_of_the_samples(
    seed: int, deal: int, order: shuffling.Random
) -> None:
    samples = noisy(seed)
    mixed = list(samples)
    order.shuffle(mixed)
    assert above(samples, 150, seed=deal) == above(mixed, 150, seed=deal)


def test_another_seed_moves_the_dates_by_less_than_half_of_their_span() -> None:
    found = [above(noisy(1), 160, seed=seed) for seed in range(12)]
    assert len({each.p50 for each in found}) > 1
    spans = [days_ahead(each) for each in found]
    width = min(last - first for first, _, last in spans)
    for dates in zip(*spans, strict=True):
        assert max(dates) - min(dates) < width / 2


@given(
    SEEDS,
    st.integers(1, 12).map(lambda n: 2.0**n),
    st.integers(1, 1000).map(float),
    st.sampled_from([QUIET, *KINDS.values()]),
)
@settings(max_examples=30, deadline=None)
def test_shifting_and_scaling_the_values_and_the_threshold_moves_no_date(
    seed: int, factor: float, shift: float, kind: Kind
) -> None:
    samples = noisy(seed, days=40, kind=kind)
    found = above(samples, 170)
    changed = above(mapped(samples, lambda value: factor * value + shift), factor * 170 + shift)
    assert changed.trend == found.trend
    assert changed.since == found.since
    if found.slope_per_day is not None:
        assert changed.slope_per_day == pytest.approx(factor * found.slope_per_day)
    assert days_ahead(changed) == pytest.approx(days_ahead(found), abs=1e-3)


@given(SEEDS)
@settings(max_examples=15, deadline=None)
def test_falling_to_a_threshold_is_rising_to_it_in_the_mirror(seed: int) -> None:
    samples = noisy(seed)
    found = above(samples, 150)
    mirrored = forecast(mapped(samples, lambda value: 1000 - value), 850, Compare.BELOW, NOW)
    assert mirrored.trend == found.trend
    assert days_ahead(mirrored) == pytest.approx(days_ahead(found), abs=1e-3)


@given(SEEDS, st.integers(-200, 200))
@settings(max_examples=15, deadline=None)
def test_the_same_days_later_give_the_same_dates_that_much_later(seed: int, later: int) -> None:
    samples = noisy(seed)
    found = above(samples, 150)
    moved = above([replace(each, at=each.at + later * DAY) for each in samples], 150, NOW + later * DAY)
    assert days_ahead(moved, NOW + later * DAY) == pytest.approx(days_ahead(found), abs=1e-6)


@given(st.floats(0, 1e12), st.integers(1, 100), st.sampled_from(list(Compare)))
@settings(max_examples=40, deadline=None)
def test_a_constant_figure_gets_no_date(value: float, days: int, compare: Compare) -> None:
    threshold = value + 10 if compare in (Compare.ABOVE, Compare.AT_LEAST) else value - 10
    assert not dated(forecast(daily([value] * days), threshold, compare, NOW))


def test_a_figure_that_is_constant_but_for_one_outlier_gets_no_date() -> None:
    assert not dated(above(daily([100.0] * 20 + [160.0] + [100.0] * 9), 200))


@pytest.mark.parametrize(("resemblance", "count"), [(0.0, 100), (0.6, 100), (0.8, 500)])
def test_flat_series_whose_days_resemble_each_other_hardly_ever_get_a_date(resemblance: float, count: int) -> None:
    random = np.random.default_rng(815)
    kind = Kind(noise=3, outliers=0.05, resemblance=resemblance)
    found = [above(series(kind, 0, int(random.integers(12, 120)), random), 115) for _ in range(count)]
    assert sum(map(dated, found)) <= 0.01 * count


def test_a_walk_of_small_steps_is_not_cut_at_each_of_them() -> None:
    tenants = [10 + day // 4 for day in range(60)]
    found = above(daily(tenants), 40)
    assert dated(found)
    assert found.since == datetime(2026, 9, 27, tzinfo=UTC)
    assert days_ahead(found)[1] == pytest.approx(62, abs=6)


@pytest.mark.parametrize("days", range(MIN_DAYS))
def test_fewer_than_ten_daily_medians_give_no_date(days: int) -> None:
    found = above(line(days), 200)
    assert not dated(found)
    assert ("nothing was measured" if not days else f"only {days} day") in found.reason
    assert dated(above(line(MIN_DAYS), 120))


def test_many_measurements_of_few_days_are_still_few_days() -> None:
    hourly = [Sample("metric", NOW - hour * HOUR, 1000.0 - hour) for hour in range(24 * 8)]
    assert "only 9 days of measurements" in above(hourly, 1010).reason


def test_on_a_clean_line_the_date_is_that_of_prometheus_linear_regression() -> None:
    for slope, ahead in ((0.5, 10.0), (2.0, 45.0), (7.0, 150.0)):
        samples = line(30, slope)
        threshold = 100 + slope * (29 + ahead)
        assert predict_linear(samples, threshold, NOW) == pytest.approx(ahead)
        assert days_ahead(above(samples, threshold)) == pytest.approx([ahead] * 3, abs=1e-3)


def test_on_hourly_samples_up_to_the_middle_of_a_day_the_date_is_that_of_prometheus_linear_regression() -> None:
    samples = [Sample("metric", NOW - hour * HOUR, 500 - hour / 24) for hour in range(24 * 20 + 7)]
    assert days_ahead(above(samples, 530)) == pytest.approx([predict_linear(samples, 530, NOW)] * 3, abs=1e-3)


def test_with_noise_the_median_lies_near_prometheus_linear_regression() -> None:
    apart = []
    for seed in range(20):
        samples = noisy(seed, days=60)
        apart.append(days_ahead(above(samples, 190))[1] - predict_linear(samples, 190, NOW))
    assert np.mean(np.abs(apart)) < 2
    assert abs(np.mean(apart)) < 1


def test_one_outlier_moves_prometheus_linear_regression_and_not_the_forecast() -> None:
    samples = line(30)
    samples[27] = replace(samples[27], value=400.0)
    assert abs(predict_linear(samples, 160, NOW) - 31) > 5
    assert days_ahead(above(samples, 160))[1] == pytest.approx(31, abs=1)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_most_true_crossings_lie_between_p10_and_p90(kind: Kind) -> None:
    random = np.random.default_rng(1)
    trends = [trend(kind, random) for _ in range(60)]
    found = [(each, above(each.samples, each.threshold, seed=seed)) for seed, each in enumerate(trends)]
    told = [(each, ahead) for each, ahead in found if dated(ahead)]
    assert len(told) >= 0.8 * len(trends)
    assert sum(holds(ahead, each.crossing) for each, ahead in told) >= 0.75 * len(told)


def test_unstretched_scatter_covers_less(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    trends = [trend(KINDS["linear with noise"], random) for _ in range(60)]

    def covered() -> int:
        return sum(holds(above(each.samples, each.threshold), each.crossing) for each in trends)

    stretched = covered()
    monkeypatch.setattr(forecasts, "WIDEN", 1.0)
    assert covered() < 0.7 * len(trends) <= 0.8 * len(trends) <= stretched


def test_noise_widens_the_span() -> None:
    narrow, wide = (days_ahead(above(noisy(3, days=60, kind=Kind(noise=noise)), 190)) for noise in (0.5, 4))
    assert wide[2] - wide[0] > 2 * (narrow[2] - narrow[0])


@pytest.mark.parametrize("last", range(7))
def test_the_pattern_of_the_week_hides_no_trend_and_makes_none(last: int) -> None:
    week = [0.0, 1, 2, 1, 0, -20, -20]
    days = range(last, last + 42)
    found = above(daily([100 + 0.5 * day + week[day % 7] for day in days]), 150)
    assert found.slope_per_day == pytest.approx(0.5, abs=0.02)
    mean = float(np.mean(week))
    assert days_ahead(found)[1] == pytest.approx((50 - mean) / 0.5 - days[-1], abs=0.1)
    assert not dated(above(daily([100 + week[day % 7] for day in days]), 150))


@pytest.mark.parametrize("days", range(14, 28))
def test_a_quiet_weekend_is_no_step(days: int) -> None:
    week = np.array([0.0, 1, 2, 1, 0, -20, -20])
    assert last_step(np.arange(float(days)), 100 + week[np.arange(days) % 7]) < 7


def test_a_drop_by_an_archive_run_cuts_what_was_before_it() -> None:
    fallen = daily([300 + 2.0 * day for day in range(30)] + [120 + 2.0 * day for day in range(20)])
    found = above(fallen, 200)
    assert found.since == datetime(2026, 11, 6, tzinfo=UTC)
    assert days_ahead(found)[1] == pytest.approx(21, abs=0.1)


def test_shortly_after_a_drop_there_is_no_date_and_the_reason_names_the_drop() -> None:
    found = above(daily([300 + 2.0 * day for day in range(30)] + [120 + 2.0 * day for day in range(6)]), 200)
    assert not dated(found)
    assert found.reason == "only 6 days of measurements since the step on 20 Nov; a forecast needs 10"


def test_of_several_steps_the_last_counts() -> None:
    y = np.concatenate([np.arange(20.0) + 500, np.arange(20.0) + 100, np.arange(20.0) + 300])
    assert last_step(np.arange(60.0), y) == 40


def test_a_line_and_one_outlier_are_no_step() -> None:
    y = np.arange(30.0)
    assert last_step(np.arange(30.0), y) == 0
    y[12] = 500
    assert last_step(np.arange(30.0), y) == 0


def test_our_own_change_cuts_what_was_before_the_last_one() -> None:
    bent = daily([100 + 0.1 * day for day in range(30)] + [103 + 2.0 * day for day in range(15)])
    changes = [NOW - 40 * DAY, NOW - 14.5 * DAY, NOW + DAY]
    found = above(bent, 151, change_points=changes)
    assert found.since == datetime(2026, 11, 11, tzinfo=UTC)
    assert days_ahead(found)[1] == pytest.approx(10, abs=0.1)
    assert "since our own change on 20 Nov" in above(bent, 151, change_points=[NOW - 5 * DAY]).reason
    assert above(bent, 151, change_points=[NOW]).reason == "nothing was measured since our own change of the metric"


@given(
    SEEDS, st.lists(st.tuples(st.floats(-40, 0), st.sampled_from([each for each in Status if each is not Status.OK])))
)
@settings(max_examples=15, deadline=None)
def test_what_is_not_ok_moves_nothing(seed: int, gaps: list[tuple[float, Status]]) -> None:
    samples = noisy(seed)
    failed = [Sample("made_up", NOW + day * DAY, None, status) for day, status in gaps]
    assert above([*failed, *samples], 150) == above(samples, 150)


def test_what_claims_to_be_from_after_now_moves_nothing() -> None:
    assert above([*line(30), Sample("metric", NOW + HOUR, 1e6)], 200) == above(line(30), 200)


def test_days_without_measurements_move_no_date() -> None:
    samples = [each for day, each in enumerate(line(40)) if day not in (5, 6, 7, 20, 33)]
    assert days_ahead(above(samples, 159)) == pytest.approx([20] * 3, abs=1e-3)


def test_what_is_crossed_already_gets_no_date() -> None:
    assert above(line(30), 110).reason == "the threshold is crossed already"
    assert forecast(line(30), 129, Compare.AT_LEAST, NOW).reason == "the threshold is crossed already"


def test_what_moves_away_gets_no_date() -> None:
    found = above(line(30, -1), 200)
    assert not dated(found)
    assert found.reason == "moves away from the threshold, -1 a day"
    assert forecast(line(30), 50, Compare.BELOW, NOW).reason == "moves away from the threshold, +1 a day"


def test_what_lies_beyond_the_horizon_is_no_forecast() -> None:
    assert above(line(30), 400).reason == "at this pace, +1 a day, the threshold is more than 180 days away"
    assert dated(above(line(30), 400, horizon=300 * DAY))
    assert not dated(above(line(30), 149, horizon=10 * DAY))


def test_a_last_date_further_away_than_twice_the_horizon_is_none() -> None:
    samples = noisy(6, days=20, kind=Kind(noise=4, resemblance=0.9))
    _, middle, last = days_ahead(above(samples, 300, horizon=600 * DAY))
    assert last > 2.2 * middle
    found = above(samples, 300, horizon=1.1 * middle * DAY)
    assert dated(found)
    assert found.p90 is None
    assert "perhaps never" in found.reason


def test_a_stale_figure_gets_no_date() -> None:
    assert above(line(30), 200, NOW + 5 * DAY).reason == "the newest measurement is 5 days old"


def test_the_projection_begins_at_the_last_day_and_passes_the_threshold_at_the_median_date() -> None:
    found = above(line(30), 150)
    assert found.projection[0].at == NOW
    assert found.projection[0].middle == pytest.approx(129)
    x = [(each.at - NOW) / DAY for each in found.projection]
    assert np.interp(21, x, [each.middle for each in found.projection]) == pytest.approx(150)


def test_the_sentence_has_the_dates_and_the_pace_with_its_unit() -> None:
    found = above(line(30), 150, unit_label=lambda value: f"{value:.0f} tenants")
    assert found.reason == "crosses about 16 Dec 2026, between 16 Dec and 16 Dec 2026, at +1 tenants a day"


def test_samples_of_two_things_are_refused() -> None:
    two = [*line(20), Sample("metric", NOW - HOUR, 1.0, dims="shard=other")]
    with pytest.raises(ValueError, match="of one thing"):
        above(two, 200)


def test_leap_days_and_time_zones_move_no_date() -> None:
    leap = datetime(2028, 3, 5, 12, tzinfo=UTC)
    found = above(daily([100.0 + day for day in range(30)], leap), 139, leap)
    assert days_ahead(found, leap) == pytest.approx([10] * 3, abs=1e-3)
    india = timezone(timedelta(hours=5, minutes=30))
    there = [replace(each, at=each.at.astimezone(india)) for each in line(30)]
    assert above(there, 150, NOW.astimezone(india)) == above(line(30), 150)


def monthly(first: datetime, amounts: Sequence[float], until: datetime) -> list[Sample]:
    """What came in since its month began, at the end of each day and now; `amounts` of the days in turn."""
    samples, total, day = [], 0.0, first
    while day < until:
        if day.day == 1:
            total = 0.0
        amount = amounts[(day - first).days % len(amounts)]
        seen = min(day + 23 * HOUR, until)
        samples.append(Sample("metric", seen, total + amount * ((seen - day) / DAY), period=f"{day:%Y-%m}"))
        total += amount
        day += DAY
    return samples


def test_a_steady_month_closes_at_its_days_times_the_pace_and_crosses_on_the_day() -> None:
    found = above(monthly(datetime(2026, 10, 1, tzinfo=UTC), [10.0], NOW), 260)
    assert found.period_end is not None
    assert found.period_end.at == datetime(2026, 12, 1, tzinfo=UTC)
    assert [found.period_end.low, found.period_end.middle, found.period_end.high] == pytest.approx([300] * 3)
    assert days_ahead(found) == pytest.approx([1.5] * 3)
    assert found.slope_per_day == pytest.approx(10)
    assert found.projection[0].middle == pytest.approx(245)


@pytest.mark.parametrize(
    ("now", "ends", "days"),
    [
        (datetime(2028, 2, 20, 12, tzinfo=UTC), datetime(2028, 3, 1, tzinfo=UTC), 29),
        (datetime(2027, 2, 20, 12, tzinfo=UTC), datetime(2027, 3, 1, tzinfo=UTC), 28),
        (datetime(2026, 12, 31, 12, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC), 31),
        (datetime(2027, 1, 1, 12, tzinfo=UTC), datetime(2027, 2, 1, tzinfo=UTC), 31),
    ],
)
def test_months_have_their_own_ends(now: datetime, ends: datetime, days: int) -> None:
    begin = (now.replace(day=1, hour=0) - DAY).replace(day=1)
    found = above(monthly(begin, [10.0], now), 1000, now)
    assert found.period_end is not None
    assert found.period_end.at == ends
    assert found.period_end.middle == pytest.approx(10 * days)
    assert not dated(found)
    assert found.reason == f"the month closes at about {10 * days} ({10 * days} to {10 * days})"


def test_days_of_last_month_speak_for_the_first_days_of_this_one() -> None:
    now = datetime(2026, 11, 2, 12, tzinfo=UTC)
    found = above(monthly(datetime(2026, 10, 1, tzinfo=UTC), [10.0], now), 155, now)
    assert days_ahead(found, now) == pytest.approx([14] * 3)


def test_a_month_with_too_few_daily_amounts_gets_no_date() -> None:
    short = monthly(NOW.replace(hour=0) - 5 * DAY, [10.0], NOW)
    assert f"needs {MIN_PERIOD_DAYS}" in above(short, 290).reason
    assert not dated(above(short, 290))


def test_one_figure_in_the_middle_of_a_month_is_not_a_fortnight_of_daily_amounts() -> None:
    assert "only 1 day of amounts" in above(daily([230.0], period="2026-11"), 290).reason


def test_the_first_hours_of_a_day_do_not_speak_for_a_whole_one() -> None:
    samples = monthly(datetime(2026, 10, 1, tzinfo=UTC), [10.0], NOW.replace(hour=0))
    early = NOW.replace(hour=2)
    burst = Sample("metric", early, (samples[-1].value or 0) + 30, period="2026-11")
    assert above([*samples, burst], 1000, early).slope_per_day == pytest.approx(10)


def test_our_own_change_cuts_the_amounts_before_it() -> None:
    begin = datetime(2026, 11, 1, tzinfo=UTC)
    amounts = [100.0] * 12 + [10.0] * 18
    samples = monthly(begin, amounts, NOW)
    found = above(samples, 10_000, change_points=[begin + 12 * DAY])
    assert found.slope_per_day == pytest.approx(10)
    assert found.since is not None
    assert found.since >= begin + 12 * DAY
    assert found.period_end is not None
    assert found.period_end.middle == pytest.approx(1380)
    assert "since our own change on 22 Nov" in above(samples, 10_000, change_points=[NOW - 3 * DAY]).reason


def test_a_month_that_is_over_gets_no_date_and_none_lies_before_now() -> None:
    samples = monthly(datetime(2026, 10, 1, tzinfo=UTC), [10.0], datetime(2026, 11, 29, 12, tzinfo=UTC))
    over = above(samples, 290, datetime(2026, 12, 1, 6, tzinfo=UTC))
    assert over.reason == "2026-11 is over, and nothing of the next month is measured yet"
    late = datetime(2026, 11, 30, 20, tzinfo=UTC)
    assert above(samples, 290, late).p50 == late


def test_a_figure_of_the_month_cannot_be_told_to_stay_below() -> None:
    samples = monthly(datetime(2026, 10, 1, tzinfo=UTC), [10.0], NOW)
    assert not dated(forecast(samples, 100, Compare.BELOW, NOW))
    assert "only rises" in forecast(samples, 100, Compare.BELOW, NOW).reason


@given(SEEDS, st.integers(10, 27), st.floats(0.8, 1.2))
@settings(max_examples=25, deadline=None)
def test_a_months_dates_are_in_order_and_within_the_month(seed: int, day: int, share: float) -> None:
    now = datetime(2026, 11, day, 9, tzinfo=UTC)
    amounts = np.random.default_rng(seed).lognormal(3, 0.5, 61)
    samples = monthly(datetime(2026, 10, 1, tzinfo=UTC), [float(each) for each in amounts], now)
    found = above(samples, float(np.sum(amounts[31:])) * share, now)
    if dated(found):
        dates = [each for each in (found.p10, found.p50, found.p90) if each is not None]
        assert dates == sorted(dates)
        assert now <= dates[0] <= dates[-1] <= datetime(2026, 12, 1, tzinfo=UTC)
    middles = [each.middle for each in found.projection]
    assert middles == sorted(middles)


def test_most_months_close_between_low_and_high() -> None:
    random = np.random.default_rng(3)
    told = held = 0
    for _ in range(100):
        week = 1 - 0.6 * (np.arange(61) % 7 >= 5)
        amounts = [float(each) for each in random.uniform(50, 500) * week * random.lognormal(0, 0.25, 61)]
        now = datetime(2026, 11, int(random.integers(2, 25)), 23, tzinfo=UTC)
        found = above(monthly(datetime(2026, 10, 1, tzinfo=UTC), amounts, now), 1e9, now)
        if found.period_end is not None:
            told += 1
            held += found.period_end.low <= sum(amounts[31:]) <= found.period_end.high
    assert told == 100
    assert held >= 0.75 * told


def test_a_trend_of_the_made_up_ones_crosses_where_it_says() -> None:
    made: Trend = trend(Kind(noise=0.0), np.random.default_rng(5))
    assert predict_linear(made.samples, made.threshold, NOW) == pytest.approx((made.crossing - NOW) / DAY)
