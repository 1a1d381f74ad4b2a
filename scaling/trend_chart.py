"""The picture of a metric on its way to a threshold, as PNG.

Belongs here: drawing samples and their forecast. Does not: the forecast (`scaling.forecast`), the style of the
pictures (`scaling.pictures`), where they are shown.
"""

import textwrap
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from math import log
from statistics import median

from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from scaling.forecast import Forecast
from scaling.pictures import ACCENT, BAD, GRID, MUTED, OTHER, TEXT, new_figure, nothing, png
from scaling.samples import Sample
from scaling.thresholds import Compare

POINTS = 400
"""More are thinned to one an hour, and if those are more, to one a day; the picture is 640 pixels wide."""
GAP = 2.5
"""A line is broken where so many times the usual interval lies between two points."""
LINE_WIDTH = 1.5
SENTENCE_CHARACTERS = 104
TITLE_CHARACTERS = 84

Point = tuple[float, float, str]
"""The day, counted from 1970 as matplotlib does, the value then, and the month it belongs to."""


def draw(
    title: str,
    unit_label: Callable[[float], str],
    samples: Sequence[Sample],
    threshold: float,
    recovery: float | None,
    compare: Compare,
    forecast: Forecast,
    now: datetime,
) -> bytes:
    """Draw what was measured, the threshold, and when it is expected to be crossed.

    Args:
        title: what is measured, one line.
        unit_label: writes a value with its unit.
        samples: of one metric and one thing it was measured of, in any order; only the ok ones up to now are drawn.
        threshold: in the metric's unit.
        recovery: in the same unit; None: there is none.
        compare: the side on which a value breaches.
        forecast: of these samples and this threshold.
        now: the moment of the forecast.

    Returns:
        A PNG.
    """
    figure, (axes,) = new_figure(textwrap.shorten(title, TITLE_CHARACTERS, placeholder=" …"))
    _sentence(figure, forecast.reason)
    runs = _runs([each for each in samples if each.at <= now])
    if not runs:
        nothing(axes, f"no measurements; the threshold is {unit_label(threshold)}")
        return png(figure)
    _measured(axes, runs)
    _expected(axes, forecast)
    x = [at for run in runs for at, _, _ in run] + [_day(each.at) for each in forecast.projection]
    x += [_day(each) for each in (now, forecast.p10, forecast.p50, forecast.p90) if each is not None]
    margin = 0.03 * (max(x) - min(x)) or 0.5
    axes.set_xlim(min(x) - margin, max(x) + margin)
    _scale(axes, unit_label, runs, threshold, recovery, forecast)
    _levels(axes, unit_label, threshold, recovery, compare)
    _crossing(axes, forecast)
    axes.axvline(_day(now), color=MUTED, linewidth=0.8, linestyle=":")
    axes.annotate(
        "now",
        (_day(now), 1),
        xycoords=("data", "axes fraction"),
        xytext=(-3, -1),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=7.5,
        color=MUTED,
    )
    locator = AutoDateLocator(tz=UTC, minticks=3, maxticks=8)  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator, tz=UTC))  # type: ignore[no-untyped-call]
    axes.xaxis.get_offset_text().set(fontsize=8, color=MUTED)
    axes.grid(axis="y", color=GRID)
    figure.legend(loc="outside lower left", ncols=4, fontsize=7.5, frameon=False, labelcolor=TEXT, borderaxespad=0.1)
    return png(figure)


def _day(moment: datetime) -> float:
    return moment.timestamp() / 86400


def _sentence(figure: Figure, reason: str) -> None:
    lines = textwrap.wrap(reason[:1].upper() + reason[1:], SENTENCE_CHARACTERS, max_lines=2, placeholder=" …")
    figure.text(0.012, 0.9, "\n".join(lines), fontsize=8, color=MUTED, ha="left", va="top")
    engine = figure.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        engine.set(rect=(0, 0, 1, 0.985 - 0.055 * len(lines)))


def _runs(samples: Sequence[Sample]) -> list[list[Point]]:
    """The points to draw, by what was measured in a row: a gap in the data, or a new month, begins the next."""
    points = sorted((_day(each.at), each.value, each.period) for each in samples if each.value is not None)
    for parts_a_day in (24, 1):
        if len(points) > POINTS:
            points = _thinned(points, parts_a_day)
    usual = median([after[0] - before[0] for before, after in pairwise(points)] or [0.0])
    runs = [points[:1]] if points else []
    for before, after in pairwise(points):
        if after[0] - before[0] > GAP * usual or after[2] != before[2]:
            runs.append([])
        runs[-1].append(after)
    return runs


def _thinned(points: Sequence[Point], parts_a_day: int) -> list[Point]:
    """The middle one of each part of a day; of a figure that begins anew every month the last."""
    parts: dict[tuple[int, str], list[Point]] = {}
    for point in points:
        parts.setdefault((int(point[0] * parts_a_day), point[2]), []).append(point)
    return [
        part[-1] if period else sorted(part, key=lambda point: point[1])[len(part) // 2]
        for (_, period), part in sorted(parts.items())
    ]


def _measured(axes: Axes, runs: Sequence[list[Point]]) -> None:
    for number, run in enumerate(runs):
        axes.plot(
            [at for at, _, _ in run],
            [value for _, value, _ in run],
            color=TEXT,
            linewidth=LINE_WIDTH,
            marker="o" if len(run) < 3 else None,
            markersize=3,
            solid_capstyle="butt",
            label="measured" if not number else None,
        )


def _expected(axes: Axes, forecast: Forecast) -> None:
    if not forecast.projection:
        return
    x = [_day(each.at) for each in forecast.projection]
    axes.fill_between(
        x,
        [each.low for each in forecast.projection],
        [each.high for each in forecast.projection],
        color=ACCENT,
        alpha=0.18,
        linewidth=0,
        label="8 of 10 lie within",
    )
    middles = [each.middle for each in forecast.projection]
    axes.plot(x, middles, color=ACCENT, linewidth=LINE_WIDTH, linestyle="--", label="expected")


def _scale(
    axes: Axes,
    unit_label: Callable[[float], str],
    runs: Sequence[list[Point]],
    threshold: float,
    recovery: float | None,
    forecast: Forecast,
) -> None:
    seen = [value for run in runs for _, value, _ in run] + [each.middle for each in forecast.projection]
    seen += [threshold] if recovery is None else [threshold, recovery]
    low, high = min(seen), max(seen)
    room = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
    # From 0 an axis shows how large a rise is; a little below it, so that what lies at 0 is seen.
    high += room
    low = -0.03 * high if low < 0.4 * high else low - room
    axes.set_ylim(low, high)
    ticks = [tick for tick in round_values(low, high, unit_label, 5) if max(low, 0) <= tick <= high]
    axes.set_yticks(ticks, [unit_label(tick) for tick in ticks])


def round_values(low: float, high: float, label: Callable[[float], str], most: int) -> list[float]:
    """Values for an axis, round in thousands or in 1,024s: whichever is written with fewer digits other than 0.

    Args:
        low: end of the axis.
        high: the other, above 0.
        label: how a value is written.
        most: intervals.
    """
    choices: list[list[float]] = []
    for base in (1000, 1024):
        unit = float(base) ** int(log(high, base)) if high >= 1 else 1.0
        locator = MaxNLocator(most, steps=[1, 2, 5, 10])
        choices.append([unit * float(tick) for tick in locator.tick_values(low / unit, high / unit)])
    return min(choices, key=lambda ticks: sum(each in "123456789" for tick in ticks for each in label(tick)))


def _levels(
    axes: Axes, unit_label: Callable[[float], str], threshold: float, recovery: float | None, compare: Compare
) -> None:
    over = compare in (Compare.ABOVE, Compare.AT_LEAST)
    levels = [(threshold, f"threshold {compare} {unit_label(threshold)}", BAD, "-", over)]
    if recovery is not None:
        levels.append((recovery, f"recovered at {unit_label(recovery)}", OTHER, "--", not over))
    for level, text, color, style, upwards in levels:
        axes.axhline(level, color=color, linewidth=1.2, linestyle=style, zorder=1.5)
        axes.annotate(
            text,
            (0, level),
            xycoords=("axes fraction", "data"),
            xytext=(3, 2 if upwards else -2),
            textcoords="offset points",
            va="bottom" if upwards else "top",
            fontsize=7.5,
            color=BAD if color == BAD else MUTED,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )


def _crossing(axes: Axes, forecast: Forecast) -> None:
    if forecast.p10 is None or forecast.p50 is None:
        return
    end = axes.get_xlim()[1] if forecast.p90 is None else _day(forecast.p90)
    begin, middle = _day(forecast.p10), _day(forecast.p50)
    axes.plot(
        [begin, end],
        [0, 0],
        transform=axes.get_xaxis_transform(),
        color=BAD,
        linewidth=5,
        solid_capstyle="butt",
        clip_on=False,
        label="crossing, 8 of 10 times",
    )
    axes.plot([middle], [0], transform=axes.get_xaxis_transform(), color=BAD, marker="o", markersize=7, clip_on=False)
