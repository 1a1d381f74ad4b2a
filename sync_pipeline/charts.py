"""The pictures of a day of syncing, as PNG.

Belongs here: drawing a `DayReport`. Does not: its numbers (`sync_pipeline.report`), the style of the pictures
(`scaling.pictures`), where they are shown.
"""

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from scaling.google_calls import TOKEN_REFRESH
from scaling.pictures import ACCENT, BAD, GOOD, GRID, MUTED, OTHER, new_figure, nothing, png
from sync_pipeline.report import NO_BOUND_SECONDS, DayReport

OUTCOMES_SHOWN = 6
ANSWERS = {
    "2xx": GOOD,
    "401": "#7c3aed",
    "403": "#b45309",
    "404": "#64748b",
    "410": "#0891b2",
    "429": BAD,
    "no_answer": "#111827",
}


def draw(report: DayReport) -> dict[str, bytes]:
    """Draw a day.

    Args:
        report: of the day.

    Returns:
        Name to PNG: `calls`, `savings`, `freshness`, `failures`.
    """
    return {
        "calls": _calls(report),
        "savings": _savings(report),
        "freshness": _freshness(report),
        "failures": _failures(report),
    }


def _calls(report: DayReport) -> bytes:
    figure, (axes,) = new_figure(f"Calls to Google on {report.day}: {report.api_calls:,} counted against the quota")
    methods = sorted({method for method, _ in report.calls}, key=lambda method: _calls_of(report, method))
    outcomes: dict[str, dict[str, int]] = {}
    for (method, outcome), calls in report.calls.items():
        row = outcomes.setdefault("2xx" if outcome.startswith("2") else outcome, {})
        row[method] = row.get(method, 0) + calls
    start = dict.fromkeys(methods, 0)
    for outcome in sorted(outcomes, key=lambda name: (name != "2xx", name)):
        widths = [outcomes[outcome].get(method, 0) for method in methods]
        axes.barh(
            methods,
            widths,
            left=[start[method] for method in methods],
            color=ANSWERS.get(outcome, OTHER),
            label={"2xx": "answered", "no_answer": "no answer"}.get(outcome, outcome),
            height=0.62,
        )
        for method, width in zip(methods, widths, strict=True):
            start[method] += width
    for method in methods:
        note = " (no Calendar call)" if method == TOKEN_REFRESH else ""
        axes.annotate(
            f" {start[method]:,}{note}", (start[method], method), va="center", fontsize=8, color=MUTED, clip_on=False
        )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlim(0, max([*start.values(), 1]) * 1.25)
    axes.grid(axis="x", color=GRID)
    if methods:
        _legend(axes)
    else:
        nothing(axes, "no call was made")
    return png(figure)


def _calls_of(report: DayReport, method: str) -> int:
    return sum(calls for (name, _), calls in report.calls.items() if name == method)


def _savings(report: DayReport) -> bytes:
    saved = report.numbers().get("saved_share")
    title = f"{saved:.1%} fewer calls than polling every 2 minutes" if saved is not None else "Calls by hour"
    figure, (axes,) = new_figure(title)
    hours = [hour.hour for hour in report.hours]
    axes.bar(hours, [hour.api_calls for hour in report.hours], color=GOOD, width=0.7, label="calls made")
    axes.hlines(
        [hour.polling_calls for hour in report.hours],
        [hour - 0.5 for hour in hours],
        [hour + 0.5 for hour in hours],
        color=BAD,
        linewidth=1.8,
        label="2-minute polling",
    )
    axes.set_yscale("symlog", linthresh=10)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(axis="y", color=GRID)
    _by_hour(axes)
    if hours:
        _legend(axes)
    else:
        nothing(axes, "no run started")
    return png(figure)


def _freshness(report: DayReport) -> bytes:
    p50, p95 = report.freshness_quantile(0.5), report.freshness_quantile(0.95)
    title = (
        f"Age of changes when they became visible: half within {_duration(p50)}, 95 % within {_duration(p95)}"
        if p50 is not None and p95 is not None
        else "Age of changes when they became visible"
    )
    figure, (axes,) = new_figure(title)
    bounds = sorted(report.freshness)
    labels = [_duration(bound).replace(" min", "m").replace(" ", "") for bound in bounds]
    colors = [GOOD if p95 is None or bound <= p95 else OTHER for bound in bounds]
    axes.bar(labels, [report.freshness[bound] for bound in bounds], color=colors, width=0.8)
    for position, bound in enumerate(bounds):
        for quantile, name in ((p50, "p50"), (p95, "p95")):
            if bound == quantile:
                axes.axvline(position + 0.4, color=ACCENT, linewidth=1.4, linestyle="--")
                axes.annotate(
                    name,
                    (position + 0.4, 0.97 if name == "p50" else 0.86),
                    xycoords=("data", "axes fraction"),
                    xytext=(3, 0),
                    textcoords="offset points",
                    va="top",
                    fontsize=8,
                    color=ACCENT,
                )
    axes.set_ylabel("changes", fontsize=8, color=MUTED)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(axis="y", color=GRID)
    if not bounds:
        nothing(axes, "no change was timed")
    return png(figure)


def _failures(report: DayReport) -> bytes:
    failed = sum(hour.workspaces_failed for hour in report.hours)
    served = sum(hour.workspaces_served for hour in report.hours)
    figure, (left, right) = new_figure(
        f"{sum(report.failures.values()):,} requests refused or unanswered; {failed:,} of {served:,} visits failed",
        columns=2,
    )
    kinds = sorted(report.failures.items(), key=lambda item: item[1])[-OUTCOMES_SHOWN:]
    left.set_title("requests by answer", fontsize=8, color=MUTED, loc="left")
    left.barh(
        [{"no_answer": "no answer"}.get(kind, kind) for kind, _ in kinds],
        [count for _, count in kinds],
        color=[ANSWERS.get(kind, OTHER) for kind, _ in kinds],
        height=0.62,
    )
    left.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    left.grid(axis="x", color=GRID)
    if not kinds:
        nothing(left, "none")
    right.set_title("failed workspaces, worst run of the hour", fontsize=8, color=MUTED, loc="left")
    right.bar(
        [hour.hour for hour in report.hours],
        [hour.most_failed_in_a_run for hour in report.hours],
        color=BAD,
        width=0.7,
    )
    right.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    right.set_ylim(0, max([hour.most_failed_in_a_run for hour in report.hours] + [1]) * 1.1)
    right.grid(axis="y", color=GRID)
    _by_hour(right)
    return png(figure)


def _by_hour(axes: Axes) -> None:
    axes.set_xlim(-0.6, 24)
    axes.set_xticks(range(0, 25, 4), [f"{hour:02}" for hour in range(0, 25, 4)])
    axes.set_xlabel("hour, UTC", fontsize=8, color=MUTED)


def _legend(axes: Axes) -> None:
    axes.legend(fontsize=8, frameon=False, ncols=4, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)


def _duration(seconds: int) -> str:
    if seconds > NO_BOUND_SECONDS:
        return "longer"
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:g} {name}"
    return f"{seconds} s"
