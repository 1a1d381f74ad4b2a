"""What every picture shares: a figure in one style, and a PNG small enough for Dagster.

Belongs here: size, colors, axes, the PNG. Does not: what is drawn (`scaling.trend_chart`, `sync_pipeline.charts`).

Dagster keeps a picture within the event of its materialization, so each stays below 20 kB. They are drawn on white,
with dark text, which reads the same on Dagster's dark and light pages. Nothing global is touched, neither
pyplot nor rcParams.
"""

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

WIDTH, HEIGHT, DPI = 6.4, 2.9, 100
TEXT, MUTED, GRID = "#23272f", "#667085", "#e4e7ec"
GOOD, BAD, ACCENT, OTHER = "#2e7d5b", "#c2410c", "#1d4ed8", "#b5bcc8"


def new_figure(title: str, *, columns: int = 1) -> tuple[Figure, Sequence[Axes]]:
    """Begin a picture.

    Args:
        title: one line, at the top left.
        columns: how many axes, side by side.
    """
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9.5, color=TEXT, x=0.012, ha="left", fontweight="bold")
    all_axes = [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
    for axes in all_axes:
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8, colors=TEXT, length=0)
        for name, spine in axes.spines.items():
            spine.set_visible(name == "bottom")
            spine.set_color(MUTED)
    return figure, all_axes


def nothing(axes: Axes, text: str) -> None:
    """Say in an empty picture why it is empty.

    Args:
        axes: without anything drawn.
        text: a few words.
    """
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=9, color=MUTED)
    axes.set_xticks([])
    axes.set_yticks([])


def png(figure: Figure) -> bytes:
    """Finish a picture.

    Args:
        figure: all drawn.
    """
    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white", metadata={"Software": None})
    with Image.open(buffer) as image:
        # A palette keeps a picture at a few kB; by coverage, since the median cut makes a short thin line gray.
        palette = image.convert("RGB").quantize(64, method=Image.Quantize.MAXCOVERAGE)
        palette.save(small, format="PNG", optimize=True)
    return small.getvalue()
