"""The picture of a trend: small enough for Dagster, and drawn without a warning, whatever was measured."""

import io
import warnings
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from PIL import Image

from scaling.forecast import Forecast, forecast
from scaling.samples import Sample, Status
from scaling.thresholds import Compare
from scaling.trend_chart import GAP, POINTS, _runs, draw, round_values
from scaling.units import Unit, shown
from tests.scaling.trends import KINDS, NOW, Kind, series

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


def plain(value: float) -> str:
    return f"{value:,.4g}"


def in_bytes(value: float) -> str:
    return shown(value, Unit.BYTES)


def every_hour(days: int, start: float, slope: float, noise: float) -> list[Sample]:
    random = np.random.default_rng(1)
    hours = range(days * 24)
    values = [max(0.0, start + slope * hour / 24 + noise * random.normal()) for hour in hours]
    return [Sample("metric", NOW - (hours[-1] - hour) * HOUR, value) for hour, value in zip(hours, values, strict=True)]


def of_the_month() -> list[Sample]:
    begin = datetime(2026, 10, 1, 23, tzinfo=UTC)
    days = [begin + day * DAY for day in range(55)]
    return [Sample("metric", day, 150.0 * day.day, period=f"{day:%Y-%m}") for day in days]


def with_a_gap() -> list[Sample]:
    samples = every_hour(14, 100, 2, 1)
    return [each for each in samples if not NOW - 8 * DAY < each.at < NOW - 5 * DAY]


def picture(
    samples: Sequence[Sample],
    threshold: float,
    recovery: float | None = None,
    *,
    title: str = "Tenants",
    compare: Compare = Compare.ABOVE,
    in_unit: bool = False,
) -> Image.Image:
    label = in_bytes if in_unit else plain
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = forecast(samples, threshold, compare, NOW, unit_label=label)
        png = draw(title, label, samples, threshold, recovery, compare, found, NOW)
    assert len(png) < 20_000
    image = Image.open(io.BytesIO(png))
    assert (image.format, image.size) == ("PNG", (640, 290))
    return image.convert("RGB")


def threshold_row(image: Image.Image) -> int | None:
    """The row that is red from side to side."""
    pixels = np.asarray(image, dtype=int)
    red = (pixels[..., 0] - pixels[..., 2] > 60).sum(axis=1)
    return int(np.argmax(red)) if np.max(red) > 400 else None


def is_expected(image: Image.Image) -> bool:
    """Whether there is a blue line."""
    pixels = np.asarray(image, dtype=int)
    return bool((pixels[..., 2] - pixels[..., 0] > 90).sum() > 50)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_trend_is_drawn_with_what_is_expected(kind: Kind) -> None:
    assert is_expected(picture(series(kind, 2, 60, np.random.default_rng(1)), 300, 250))


def test_one_sample_is_a_picture() -> None:
    image = picture([Sample("metric", NOW, 100.0)], 190)
    assert threshold_row(image) is not None
    assert not is_expected(image)


def test_no_sample_and_only_failed_ones_are_a_picture() -> None:
    picture([], 10, 5)
    picture([Sample("metric", NOW - hour * HOUR, None, Status.ERROR) for hour in range(30)], 10)


def test_ninety_days_of_hours_in_bytes_are_a_picture() -> None:
    assert is_expected(picture(every_hour(90, 1e10, 1e8, 3e8), 2.5e10, 2e10, in_unit=True))


def test_a_threshold_far_above_what_is_measured_is_seen() -> None:
    image = picture(every_hour(30, 1e7, 0, 1e5), 1e13, 8e12, in_unit=True)
    row = threshold_row(image)
    assert row is not None
    assert row < 100


def test_a_threshold_below_what_falls_to_it_is_seen() -> None:
    image = picture(every_hour(40, 9e10, -1e9, 2e9), 2e10, 2.3e10, compare=Compare.BELOW, in_unit=True)
    assert threshold_row(image) is not None
    assert is_expected(image)


@pytest.mark.parametrize("value", [0.0, 1e-9, 0.5, 1e15])
def test_a_constant_figure_is_a_picture_and_so_is_one_on_its_threshold(value: float) -> None:
    constant = [Sample("metric", NOW - hour * HOUR, value) for hour in range(50)]
    picture(constant, value)
    picture(constant, value + 1)
    picture(constant, value, compare=Compare.AT_LEAST)


def test_what_is_crossed_already_is_a_picture() -> None:
    assert threshold_row(picture(every_hour(20, 100, 5, 1), 150)) is not None


def test_a_date_that_may_never_come_is_a_picture() -> None:
    uncertain = series(Kind(noise=4, resemblance=0.9), 1, 20, np.random.default_rng(6))
    found = forecast(uncertain, 300, Compare.ABOVE, NOW, horizon=150 * DAY)
    assert found.trend
    assert found.p90 is None
    assert len(draw("Tenants", plain, uncertain, 300, None, Compare.ABOVE, found, NOW)) < 20_000


def test_a_figure_of_the_month_is_a_picture_and_its_line_begins_anew() -> None:
    assert is_expected(picture(of_the_month(), 4_200, 4_000))
    assert [len(run) for run in _runs(of_the_month())] == [31, 24]


def test_a_long_title_and_a_long_sentence_stay_a_picture() -> None:
    title = "The calls to the calendar of Google that were counted against the quota " * 3
    assert threshold_row(picture(of_the_month(), 5_500, title=title)) is not None
    wordy = Forecast(None, None, None, None, trend=False, reason="nobody can tell " * 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        png = draw(title, plain, of_the_month(), 5_500, None, Compare.ABOVE, wordy, NOW)
    assert threshold_row(Image.open(io.BytesIO(png)).convert("RGB")) is not None


def test_a_gap_in_the_data_breaks_the_line() -> None:
    runs = _runs(with_a_gap())
    assert len(runs) == 2
    assert runs[1][0][0] - runs[0][-1][0] > GAP / 24
    picture(with_a_gap(), 200)


def test_lone_measurements_between_gaps_are_kept() -> None:
    days = [0, 1, 2, 3, 20, 40, 41, 42]
    assert [len(run) for run in _runs([Sample("metric", NOW + day * DAY, 1.0) for day in days])] == [4, 1, 3]


def test_many_points_are_thinned_and_keep_the_level() -> None:
    (run,) = _runs(every_hour(90, 100, 1, 0))
    assert 89 <= len(run) <= 91 <= POINTS
    assert [value for _, value, _ in run] == sorted(value for _, value, _ in run)
    assert run[-1][1] == pytest.approx(190, abs=1)


def test_one_odd_hour_of_each_day_is_not_what_is_left_of_it() -> None:
    odd = [replace(each, value=0.0) if each.at.hour == 3 else each for each in every_hour(90, 100, 0, 0)]
    (run,) = _runs(odd)
    assert {value for _, value, _ in run} == {100.0}


def test_the_ticks_of_bytes_are_round_in_bytes_and_those_of_others_in_tens() -> None:
    assert [in_bytes(tick) for tick in round_values(0, 2.5e10, in_bytes, 5)][:3] == ["0 B", "5.0 GiB", "10.0 GiB"]
    assert [plain(tick) for tick in round_values(0, 5_000, plain, 5)][:3] == ["0", "1,000", "2,000"]
