"""When a metric will cross its threshold, as a span of dates, or why nobody can tell.

Belongs here: daily medians, steps, the slope and its doubt, dates; pure. Does not: what is crossed
(`scaling.thresholds`), how it is drawn (`scaling.trend_chart`).

A figure that stands for itself (bytes, tenants, seconds) is taken as a line: daily medians, cut at the last step, the
pattern of the week removed once there are four of them, the slope by Theil and Sen, which no outlier moves. What the
line does not explain is dealt out anew, in blocks of a week since one day resembles the next, and the line is fitted
again: from the dates of `DRAWS` such crossings come p10, p50 and p90. There is a trend only if the interval of the
slope leaves out zero, widened for days that resemble each other, and the rise stands out of the scatter.

A figure that begins anew every month (`Sample.period`) is carried on to the end of its month by the daily amounts of
the last four weeks, again dealt out in blocks of a week. It has a date only if that lies within the month.

How often the true date lies between p10 and p90 is measured by `python -m bench.scaling --only eta`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta

import numpy as np
import numpy.typing as npt

from scaling.samples import Sample
from scaling.thresholds import Compare

Floats = npt.NDArray[np.float64]
Figure = tuple[datetime, float, str]
"""When, the value then, and the month it belongs to."""

MIN_DAYS = 10
"""Daily medians a line needs; more than a week, so that it has seen each weekday."""
MIN_PERIOD_DAYS = 7
"""Daily amounts the projection of a month needs, of this month and the last."""
LONGEST_DAYS = 90
"""Daily medians a line looks back on; the pairs of days, and so the time it takes, grow with the square."""
PERIOD_DAYS = 28
WEEK = 7
DAY = timedelta(days=1)
HORIZON = timedelta(days=180)
STALE_AFTER = timedelta(days=3)
DRAWS = 300
CONFIDENCE = 0.998
"""Of the interval of the slope that must leave out zero. A false date is as bad as none, so it is near 1; with
`RISE_SCATTERS` it is held against `test_flat_series_whose_days_resemble_each_other_hardly_ever_get_a_date`."""
WIDEN = 1.8
"""By which dealt-out scatter is stretched: few days show less scatter than there is. Without, the band is too narrow
(`test_unstretched_scatter_covers_less`)."""
RISE_SCATTERS = 4
"""A trend rises or falls by more than so many scatters about it."""
STEP_SCATTERS = 4
"""A step is larger than so many scatters from one day to the next …"""
STEP_SHARE = 0.2
"""… and than this share of the whole range, or each new tenant is one."""


@dataclass(frozen=True, slots=True)
class Projected:
    """What is expected of a moment: nine of ten times more than `low`, nine of ten times less than `high`."""

    at: datetime
    low: float
    middle: float
    high: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """When a threshold will be crossed.

    Attributes:
        p10: no sooner than this, nine of ten times.
        p50: as likely before as after.
        p90: no later than this, nine of ten times; None with a trend: it may never be.
        slope_per_day: the metric's units a day; None: it could not be told.
        trend: whether there is a date; without, all three are None.
        reason: the forecast, or why there is none, in words.
        since: from when on measurements were looked at; None: none were.
        projection: for a picture, in order of time.
        period_end: what the month will close at, of a figure that begins anew every month.
    """

    p10: datetime | None
    p50: datetime | None
    p90: datetime | None
    slope_per_day: float | None
    trend: bool
    reason: str
    since: datetime | None = None
    projection: tuple[Projected, ...] = ()
    period_end: Projected | None = None


def forecast(
    samples: Sequence[Sample],
    threshold: float,
    compare: Compare,
    now: datetime,
    *,
    horizon: timedelta = HORIZON,
    change_points: Iterable[datetime] = (),
    seed: int = 0,
    unit_label: Callable[[float], str] = "{:.4g}".format,
) -> Forecast:
    """Tell when a metric will cross its threshold.

    Args:
        samples: of one metric and one thing it was measured of, in any order; only the ok ones up to now count.
        threshold: in the metric's unit.
        compare: the side on which a value breaches.
        now: the moment of the forecast, timezone-aware.
        horizon: what lies further ahead is no forecast. A figure that begins anew every month looks no further than
            the end of the month.
        change_points: when we changed the metric ourselves (an archive run, a capability switched); what was before
            the last of them is not looked at.
        seed: of the dealing; the same seed, the same dates.
        unit_label: writes a value with its unit, for the sentence.

    Returns:
        The dates, or the reason why there are none.

    Raises:
        ValueError: the samples are of several metrics or things.
    """
    if len({(each.metric, each.dims) for each in samples}) > 1:
        raise ValueError("a forecast is of one metric, and of one thing it was measured of")
    figures = sorted(
        (each.at.astimezone(UTC), each.value, each.period)
        for each in samples
        if each.value is not None and each.at <= now
    )
    if not figures:
        return _none("nothing was measured yet")
    at, value, period = figures[-1]
    if compare.holds(value, threshold):
        return _none("the threshold is crossed already")
    if now - at > STALE_AFTER:
        return _none(f"the newest measurement is {_days((now - at).days)} old")
    changed = max((each.astimezone(UTC) for each in change_points if each <= now), default=None)
    if changed is not None:
        figures = [figure for figure in figures if figure[0] > changed]
        if not figures:
            return _none("nothing was measured since our own change of the metric")
    task = _Task(threshold, compare, now.astimezone(UTC), horizon, changed, np.random.default_rng(seed), unit_label)
    return _month(figures, task) if period else _line(figures, task)


@dataclass(frozen=True, slots=True)
class _Task:
    threshold: float
    compare: Compare
    now: datetime
    horizon: timedelta
    changed: datetime | None
    random: np.random.Generator
    label: Callable[[float], str]

    @property
    def rising(self) -> bool:
        return self.compare in (Compare.ABOVE, Compare.AT_LEAST)

    def pace(self, slope: float) -> str:
        return f"{'-' if slope < 0 else '+'}{self.label(abs(slope))} a day"

    def since_change(self) -> str:
        return "" if self.changed is None else f" since our own change on {self.changed:%d %b}"


def _none(reason: str) -> Forecast:
    return Forecast(None, None, None, None, trend=False, reason=reason)


def _days(count: int) -> str:
    return "1 day" if count == 1 else f"{count} days"


def _line(figures: Sequence[Figure], task: _Task) -> Forecast:
    by_day: dict[date, list[tuple[float, float]]] = {}
    for at, value, _ in figures:
        by_day.setdefault(at.date(), []).append(((at - task.now) / DAY, value))
    days = sorted(by_day)[-LONGEST_DAYS:]
    # x counts the days from now on, so a level is a value now, and a crossing's x is how far ahead it lies.
    x, y = np.array([np.median(by_day[day], axis=0) for day in days], dtype=np.float64).T
    step = last_step(x, y)
    since = datetime.combine(days[step], time(), UTC)
    days, x, y = days[step:], x[step:], y[step:]
    if len(days) < MIN_DAYS:
        after = f" since the step on {since:%d %b}" if step else task.since_change()
        reason = f"only {_days(len(days))} of measurements{after}; a forecast needs {MIN_DAYS}"
        return replace(_none(reason), since=since)
    y = y - _weekdays(np.array([day.weekday() for day in days]), x, y)

    slope, _, low, high = _theil_sen(x, y)
    level = float(np.median(y - slope * x))
    rest = y - level - slope * x
    doubt = _resemblance(rest)
    low, high = slope - (slope - low) * doubt, slope + (high - slope) * doubt
    rise = abs(slope) * float(x[-1] - x[0])
    answer = replace(_none(""), slope_per_day=slope, since=since)
    if low <= 0 <= high or rise <= 1e-9 * abs(level):
        return replace(answer, reason=f"no trend: between {task.pace(low)} and {task.pace(high)}, which may be none")
    if rise < RISE_SCATTERS * _scatter(rest):
        return replace(answer, reason=f"no trend: {task.pace(slope)} does not stand out of the scatter")
    if (slope > 0) != task.rising:
        return replace(answer, reason=f"moves away from the threshold, {task.pace(slope)}")

    slopes, levels = _refitted(x, slope, level, rest * doubt * WIDEN, task.random)
    with np.errstate(divide="ignore", invalid="ignore"):
        ahead = np.where(slopes * slope > 0, np.maximum((task.threshold - levels) / slopes, 0), np.inf)
    # An order statistic in place of the mean of two: half a date is none when one of them is never.
    p10, p50, p90 = (float(each) for each in np.quantile(ahead, [0.1, 0.5, 0.9], method="inverted_cdf"))
    if p50 > task.horizon / DAY:
        far = f"the threshold is more than {_days(task.horizon.days)} away"
        return replace(answer, reason=f"at this pace, {task.pace(slope)}, {far}")
    first, middle = task.now + p10 * DAY, task.now + p50 * DAY
    # None for what is further away than twice the horizon: nobody plans by it.
    last = task.now + p90 * DAY if p90 <= 2 * task.horizon / DAY else None
    span = (
        f"not before {first:%d %b %Y}, perhaps never" if last is None else f"between {first:%d %b} and {last:%d %b %Y}"
    )
    ticks = np.linspace(x[-1], min(max(p90, p50 + 1), max(2 * p50, p50 + WEEK)), 12)
    return replace(
        answer,
        p10=first,
        p50=middle,
        p90=last,
        trend=True,
        reason=f"crosses about {middle:%d %b %Y}, {span}, at {task.pace(slope)}",
        projection=_projection(task.now, ticks, levels[:, None] + slopes[:, None] * ticks),
    )


def _projection(origin: datetime, ticks: Floats, paths: Floats) -> tuple[Projected, ...]:
    bands = np.quantile(paths, [0.1, 0.5, 0.9], axis=0).T
    return tuple(
        Projected(origin + float(tick) * DAY, float(low), float(middle), float(high))
        for tick, (low, middle, high) in zip(ticks, bands, strict=True)
    )


def last_step(x: Floats, y: Floats) -> int:
    """Find where the last lasting step of a series ends.

    What follows a step stays there, so one outlier is none.

    Args:
        x: days, ascending.
        y: the value of each.

    Returns:
        The position of the first day after it; 0: there is no step.
    """
    start = 0
    while (found := _largest_step(x[start:], y[start:])) is not None:
        start += found
    return start


def _largest_step(x: Floats, y: Floats) -> int | None:
    count = len(x)
    if count < 6:
        return None
    lag = min(WEEK, count // 3)
    pace = float(np.median((y[lag:] - y[:-lag]) / (x[lag:] - x[:-lag])))
    level = y - pace * x
    least = max(STEP_SCATTERS * _scatter(np.diff(level)), STEP_SHARE * float(np.ptp(y)))
    best: tuple[float, int] | None = None
    for here in range(2, count - 1):
        after = level[here : here + WEEK]
        lasting = float(np.median(after) - np.median(level[max(0, here - WEEK) : here]))
        sudden = float(level[here] - level[here - 1])
        # A weekend at the end is as sudden as a step, but the days a week before were as low.
        weekly = float(np.median(after - level[here - WEEK :][: len(after)])) if here >= WEEK else lasting
        if abs(lasting) > least and min(sudden / lasting, weekly / lasting) > 0.5:
            best = max(best or (0.0, 0), (abs(lasting) + abs(sudden), here))
    return None if best is None else best[1]


def _theil_sen(x: Floats, y: Floats) -> tuple[float, float, float, float]:
    """Slope and intercept, and between which slopes the true one lies."""
    from scipy.stats import theilslopes  # 0.5 s to import, and most commands forecast nothing

    slope, intercept, low, high = theilslopes(y, x, CONFIDENCE)
    return float(slope), float(intercept), float(low), float(high)


def _scatter(values: Floats) -> float:
    """The standard deviation, by a median that outliers do not move."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))


def _weekdays(weekday: npt.NDArray[np.int64], x: Floats, y: Floats) -> Floats:
    """What the weekday of each adds, by the median of its distance to the line; nothing before there are four weeks."""
    if len(x) < 4 * WEEK:
        return np.zeros_like(y)
    rest = y - _theil_sen(x, y)[0] * x
    rest = rest - np.median(rest)
    adds = np.array([np.median(rest[weekday == day]) if np.any(weekday == day) else 0.0 for day in range(WEEK)])
    picked: Floats = (adds - np.mean(adds))[weekday]
    return picked


def _resemblance(rest: Floats) -> float:
    """By how much an interval is too narrow because each day resembles the one before it."""
    rest = rest - np.median(rest)
    if limit := 3 * _scatter(rest):
        rest = np.clip(rest, -limit, limit)
    whole = float(np.sum(rest**2))
    if not whole:
        return 1.0
    # Detrending makes the estimate too small by about (1 + 4 r) / n, Kendall 1954.
    r = float(np.sum(rest[1:] * rest[:-1])) / whole
    r = min(max(r + (1 + 4 * r) / len(rest), 0.0), 0.9)
    return float(np.sqrt((1 + r) / (1 - r)))


def _refitted(
    x: Floats, slope: float, level: float, rest: Floats, random: np.random.Generator
) -> tuple[Floats, Floats]:
    """The slopes and levels of `DRAWS` lines with their rest dealt out anew."""
    count = len(x)
    y = level + slope * x + _dealt(rest - np.median(rest), count, min(WEEK, count // 3), random)
    one, other = np.triu_indices(count, 1)
    slopes = np.median((y[:, other] - y[:, one]) / (x[other] - x[one]), axis=1)
    levels = np.median(y - slopes[:, None] * x, axis=1)
    return slopes, levels


def _dealt(values: Floats, length: int, block: int, random: np.random.Generator) -> Floats:
    """`DRAWS` rows of that length, put together of blocks of neighbours; the end joins the beginning."""
    pieces = -(-length // block)
    starts = random.integers(0, len(values), size=(DRAWS, pieces))
    positions = (starts[:, :, None] + np.arange(block)) % len(values)
    rows: Floats = values[positions.reshape(DRAWS, pieces * block)[:, :length]]
    return rows


def _month(figures: Sequence[Figure], task: _Task) -> Forecast:
    if not task.rising:
        return _none("a figure of the month only rises; whether it stays below is known when the month is over")
    at, value, period = figures[-1]
    end = _month_begin(period, months=1)
    if end <= task.now:
        return _none(f"{period} is over, and nothing of the next month is measured yet")
    intervals = _amounts(figures, task.changed)
    if len(intervals) < MIN_PERIOD_DAYS:
        reason = f"only {_days(len(intervals))} of amounts{task.since_change()}"
        return _none(f"{reason}; a month's projection needs {MIN_PERIOD_DAYS}")
    # An interval of several days counts as often; what was not measured by the day is taken as even.
    amounts = np.concatenate([[pace] * max(round(length), 1) for _, length, pace in intervals])
    pace = float(np.mean(amounts))
    left = (end - at) / DAY
    edges = np.minimum(np.arange(np.ceil(left) + 1), left)
    rates = pace + (_dealt(amounts, len(edges) - 1, WEEK, task.random) - pace) * WIDEN
    # How far the mean of so few days is from the true pace is the same for all days left.
    rates += np.mean(_dealt(amounts, len(amounts), WEEK, task.random), axis=1)[:, None] - pace
    added = np.cumsum(np.maximum(rates, 0.0) * np.diff(edges), axis=1)
    paths = value + np.hstack([np.zeros((DRAWS, 1)), added])
    projection = _projection(at, edges, paths)
    closing = projection[-1]
    answer = replace(_none(""), slope_per_day=pace, since=intervals[0][0], projection=projection, period_end=closing)
    span = f"{task.label(closing.low)} to {task.label(closing.high)}"
    closes = f"the month closes at about {task.label(closing.middle)} ({span})"
    ahead = np.array([_reached(path, edges, task.threshold) for path in paths])
    p10, p50, p90 = (
        max(at + float(each) * DAY, task.now) if np.isfinite(each) else None
        for each in np.quantile(ahead, [0.1, 0.5, 0.9], method="inverted_cdf")
    )
    if p50 is None:
        share = float(np.mean(np.isfinite(ahead)))
        chance = f", over the threshold in {share:.0%} of the projections" if share else ""
        return replace(answer, reason=closes + chance)
    return replace(answer, p10=p10, p50=p50, p90=p90, trend=True, reason=f"crosses about {p50:%d %b}; {closes}")


def _reached(path: Floats, edges: Floats, threshold: float) -> float:
    """The day on which a rising path reaches the threshold; infinite: it does not."""
    return float("inf") if path[-1] < threshold else float(np.interp(threshold, path, edges))


def _amounts(figures: Sequence[Figure], changed: datetime | None) -> list[tuple[datetime, float, float]]:
    """What came in per day: begin, length in days and pace of each interval of the last four weeks.

    The first figure of a month is what came in since the month began.
    """
    closing = {(period, at.date()): (at, value) for at, value, period in figures if period}
    intervals: list[tuple[datetime, float, float]] = []
    before: tuple[str, datetime, float] | None = None
    for (period, _), (at, value) in sorted(closing.items()):
        same = before is not None and before[0] == period
        start, already = (before[1], before[2]) if before is not None and same else (_month_begin(period), 0.0)
        length = (at - start) / DAY
        if length < 0.4:  # too short to speak for a day; counted with the next one
            continue
        before = (period, at, value)
        if (changed is None or start >= changed) and figures[-1][0] - at < PERIOD_DAYS * DAY:
            intervals.append((start, length, max(value - already, 0.0) / length))
    return intervals


def _month_begin(period: str, *, months: int = 0) -> datetime:
    year, month = (int(part) for part in period.split("-"))
    month += months
    return datetime(year + (month - 1) // 12, (month - 1) % 12 + 1, 1, tzinfo=UTC)
