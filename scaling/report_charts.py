"""The pictures of the report, as SVG that takes its colours and its type from the page.

Belongs here: drawing, and making matplotlib's SVG part of a page. Does not: the figures (`scaling.report`), the page
(`scaling.report_page`), PNGs for Dagster (`scaling.pictures`).

Each picture is drawn 330 units wide, so that its text is read on a phone at about the size it was drawn.
Colours are placeholders that become CSS variables: the page decides what they are in light and dark.
"""

import io
import re
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from threading import Lock

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from scaling.forecast import Forecast
from scaling.headroom import Headroom
from scaling.report import Day
from scaling.samples import Sample
from scaling.trend_chart import round_values
from scaling.units import Unit, shown

WIDTH = 330
INCH = 72
"""Units of an SVG of matplotlib."""
INK, MUTED, LINE, GOOD, WARN, BAD, ACCENT = (f"#0{n}0{n}0{n}" for n in range(1, 8))
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", GOOD: "good", WARN: "warn", BAD: "bad", ACCENT: "accent"}
TEXT = 11
LETTER = 6.2
"""Width of a letter of that size, digits and points on average."""
POINTS = 180
"""Of a line; a picture has 330 units, and each point takes 20 bytes."""
GAP = timedelta(days=2)
DURATIONS = {1: "1 s", 10: "10 s", 60: "1 min", 600: "10 min", 3600: "1 h", 36_000: "10 h", 360_000: "4 days"}

# Fonts as text need a global parameter of matplotlib; two threads that drew at once would take turns at it.
_drawing = Lock()


def calls(days: Sequence[Day]) -> str:
    """Draw the calls of each day under those of two-minute polling.

    Args:
        days: oldest first, at least one.
    """
    figure, axes = _figure(190)
    x = [_number(day.day) for day in days]
    # From the floor of the axis, since a logarithm knows no 0.
    axes.bar(x, [max(day.calls, 1) for day in days], width=0.85, color=GOOD, linewidth=0, label="calls made")
    made = [(at, day.polling) for at, day in zip(x, days, strict=True) if day.polling]
    if made:
        axes.plot(
            [at for at, _ in made], [value for _, value in made], color=MUTED, linewidth=1.6, linestyle="--",
            label="two-minute polling",
        )  # fmt: skip
    axes.set_yscale("log")
    top = max([day.polling for day in days] + [float(day.calls) for day in days] + [10.0])
    axes.set_ylim(max(1.0, min([day.calls for day in days if day.calls] or [1]) / 4), top * 2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.yaxis.set_minor_locator(NullLocator())
    _dates(axes)
    _legend(figure)
    _place(figure, axes, legend=True)
    return _svg(figure, "calls", "Calls to Google a day, and what two-minute polling would have cost; logarithmic")


def freshness(days: Sequence[Day]) -> str:
    """Draw how old changes were when they became visible.

    Args:
        days: oldest first; those without a change are left out.
    """
    figure, axes = _figure(190)
    timed = [day for day in days if day.p50 is not None and day.p95 is not None]
    x = [_number(day.day) for day in timed]
    p50, p95 = [day.p50 or 0 for day in timed], [day.p95 or 0 for day in timed]
    axes.fill_between(x, p50, p95, color=ACCENT, alpha=0.16, linewidth=0)
    axes.plot(x, p95, color=ACCENT, linewidth=1.8, label="95 % within", marker="o" if len(x) < 3 else None)
    axes.plot(
        x, p50, color=ACCENT, linewidth=1.2, linestyle=":", label="half within", marker="o" if len(x) < 3 else None
    )
    axes.set_yscale("log")
    axes.set_ylim(min([*p50, 10]) / 1.5, max([*p95, 60]) * 2)
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(FixedLocator([each for each in DURATIONS if low <= each <= high]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: DURATIONS.get(round(value), "")))
    _dates(axes)
    _legend(figure)
    _place(figure, axes, legend=True)
    return _svg(figure, "freshness", "Age of changes when they became visible, by day; logarithmic")


def trend(row: Headroom, number: int, now: datetime) -> str:
    """Draw a metric on its way to its threshold.

    Args:
        row: with a rule and a history.
        number: of the picture, so that no two on a page have the same ids.
        now: the moment of the forecast.
    """
    rule = row.metric.rule
    if rule is None:
        raise ValueError(f"{row.metric.name} has no rule")
    figure, axes = _figure(150)
    points = [(each.at, each.value) for each in thinned(row.history) if each.value is not None]
    for run in _unbroken(points):
        axes.plot(
            [_moment(at) for at, _ in run],
            [value for _, value in run],
            color=INK,
            linewidth=1.6,
            marker="o" if len(run) < 3 else None,
            markersize=2.5,
        )
    foreseen = row.forecast
    if foreseen and foreseen.projection:
        _projection(axes, foreseen)
    axes.axhline(rule.threshold, color=BAD, linewidth=1.4, clip_on=False)
    values = [value for _, value in points] + [rule.threshold]
    values += [each.middle for each in foreseen.projection] if foreseen else []
    low, high = min(values), max(values)
    room = 0.14 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(0 if 0 <= low < 0.4 * high else low - room, high + room)
    label = _labels(row.metric.unit)
    axes.yaxis.set_major_locator(FixedLocator(round_values(*axes.get_ylim(), lambda value: label(value, None), 4)))
    axes.yaxis.set_major_formatter(FuncFormatter(label))
    _dates(axes, latest=max([now, *([foreseen.p90] if foreseen and foreseen.p90 else [])]))
    _place(figure, axes)
    said = f"{row.metric.title}: the last 90 days, the threshold {shown(rule.threshold, row.metric.unit)}"
    return _svg(figure, f"trend{number}", f"{said}{' and the forecast' if foreseen and foreseen.trend else ''}")


def thinned(samples: Sequence[Sample]) -> list[Sample]:
    """So many samples, evenly picked, that a line of a picture has use for, the newest among them.

    Args:
        samples: oldest first.
    """
    taken = [sample for sample in samples if sample.value is not None]
    step = max(1, -(-len(taken) // POINTS))
    return taken[::-1][::step][::-1]


def _projection(axes: Axes, foreseen: Forecast) -> None:
    x = [_moment(each.at) for each in foreseen.projection]
    axes.fill_between(
        x,
        [each.low for each in foreseen.projection],
        [each.high for each in foreseen.projection],
        color=ACCENT,
        alpha=0.16,
        linewidth=0,
    )
    axes.plot(x, [each.middle for each in foreseen.projection], color=ACCENT, linewidth=1.4, linestyle="--")
    if foreseen.p50 is not None:
        axes.axvline(_moment(foreseen.p50), color=ACCENT, linewidth=0.9, linestyle=":")


def _unbroken(points: Sequence[tuple[datetime, float]]) -> list[list[tuple[datetime, float]]]:
    """The points by what was measured in a row: a line through a gap would claim what nobody saw."""
    runs = [list(points[:1])] if points else []
    for before, after in pairwise(points):
        if after[0] - before[0] > GAP:
            runs.append([])
        runs[-1].append(after)
    return runs


def _labels(unit: Unit) -> Callable[[float, int | None], str]:
    def label(value: float, _: int | None) -> str:
        if unit in (Unit.BYTES, Unit.SHARE, Unit.TIMES, Unit.FLAG, Unit.SECONDS, Unit.MILLISECONDS):
            return shown(value, unit)
        return _short(value)

    return label


def _short(value: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g} {name}"
    return f"{value:g}"


def _figure(height: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH / INCH, height / INCH), dpi=INCH)
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=TEXT, colors=MUTED, length=0)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(LINE)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    return figure, axes


def _dates(axes: Axes, *, latest: datetime | None = None) -> None:
    if latest is not None:
        axes.set_xlim(right=max(axes.get_xlim()[1], _moment(latest)))
    locator = AutoDateLocator(tz=UTC, minticks=2, maxticks=5)  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator, tz=UTC, show_offset=False))  # type: ignore[no-untyped-call]


def _place(figure: Figure, axes: Axes, *, legend: bool = False) -> None:
    """Leave room for the labels; by their length, since matplotlib's own layout draws everything a second time."""
    low, high = axes.get_ylim()
    ticks = [each for each in axes.yaxis.get_major_locator().tick_values(low, high) if low <= each <= high]
    longest = max([len(axes.yaxis.get_major_formatter()(each, 0)) for each in ticks] or [0])
    height = figure.get_size_inches()[1] * INCH
    left, bottom, top = (longest * LETTER + 6) / WIDTH, 20 / height, (22 if legend else 8) / height
    axes.set_position((left, bottom, 1 - left - 6 / WIDTH, 1 - bottom - top))


def _legend(figure: Figure) -> None:
    figure.legend(
        loc="upper left",
        ncols=2,
        fontsize=TEXT,
        frameon=False,
        labelcolor=INK,
        borderaxespad=0,
        handlelength=1.6,
        bbox_to_anchor=(0, 1),
        borderpad=0,
    )


def _moment(at: datetime) -> float:
    return at.timestamp() / 86_400


def _number(day: date) -> float:
    return _moment(datetime(day.year, day.month, day.day, 12, tzinfo=UTC))


def _svg(figure: Figure, name: str, said: str) -> str:
    """Finish a picture: what is left is the drawing, in the page's colours and type, under ids of its own."""
    buffer = io.StringIO()
    with _drawing, mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "path.simplify_threshold": 0.4}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawn = buffer.getvalue()
    body = drawn[drawn.index("<svg") :]
    box = re.search(r'viewBox="([^"]+)"', body)
    body = body[body.index(">") + 1 : body.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<title>.*?</title>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL).replace("xlink:href", "href")
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", body)
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", body)
    body = re.sub(r"<defs>\s*</defs>|<g/>", "", re.sub(r"<g>\s*</g>", "", body))
    body = re.sub(r"font: (?:[a-z0-9]+ )*?(\d+(?:\.\d+)?)px [^;\"]+", r"font-size: \1px", body)
    body = re.sub(r"font-size: (\d+(?:\.\d+)?)px; font-family: [^;\"]+", r"font-size: \1px", body)
    body = re.sub(r"#0([1-7])(?:0\1){2}", lambda found: f"var(--{VARIABLES[found[0]]})", body)
    body = re.sub(r"\s*\n\s*", "\n", body).strip()
    return (
        f'<svg viewBox="{box[1] if box else ""}" role="img" aria-labelledby="{name}-said">'
        f'<title id="{name}-said">{_escaped(said)}</title>{body}</svg>'
    )


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
