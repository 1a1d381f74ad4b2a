"""Figures as Prometheus takes them: families of samples whose labels stay few, whatever the tables hold.

Belongs here: making families, and keeping their labels bounded. Does not: which figures there are (`scaling.exported`,
`scaling.exported_dagster`), or how they are served (`scaling.exporter`).

Prometheus keeps a series for every combination of label values it ever saw. So no label says which tenant, workspace,
calendar or run: whatever looks like an id becomes `other`, and so does every value of a label beyond the first
`MOST_VALUES`. Samples that come to the same labels are put together.
"""

import re
from collections.abc import Callable, Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

MOST_VALUES = 40
"""Of one label in one family."""
LONGEST_VALUE = 80
OTHER = "other"
_ID = re.compile(
    r"[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}|[^\s@]+@[^\s@]+\.[^\s@]+|\d{6,}", re.IGNORECASE
)
"""A UUID with or without hyphens, a mail address (calendars are named so), a long number."""

Row = tuple[Sequence[object], float | int | None]
"""Values of the labels, and the figure; None: there is none, and no sample."""
Together = Callable[[float, float], float]


def label(value: object) -> str:
    """A value as it may stand in a label.

    Args:
        value: from a table; None is `unknown`.
    """
    text = "unknown" if value is None else str(value)
    return OTHER if len(text) > LONGEST_VALUE or _ID.search(text) else text


def _add(one: float, another: float) -> float:
    return one + another


def bounded(rows: Iterable[Row], together: Together = _add) -> dict[tuple[str, ...], float]:
    """Put samples of the same labels together, and values beyond the first `MOST_VALUES` of a label into `other`.

    Args:
        rows: the most important first, where there may be many.
        together: how two figures become one.
    """
    seen: dict[int, set[str]] = {}
    found: dict[tuple[str, ...], float] = {}
    for labels, figure in rows:
        if figure is None:
            continue
        key = []
        for position, value in enumerate(map(label, labels)):
            known = seen.setdefault(position, set())
            if value not in known and len(known) >= MOST_VALUES:
                key.append(OTHER)
                continue
            known.add(value)
            key.append(value)
        exact = tuple(key)
        found[exact] = together(found[exact], float(figure)) if exact in found else float(figure)
    return found


def gauge(
    name: str, documentation: str, rows: Iterable[Row], labels: Sequence[str] = (), *, together: Together = _add
) -> Metric:
    """What goes up and down.

    Args:
        name: with its unit.
        documentation: what it says.
        rows: see `bounded`.
        labels: their names.
        together: how two figures of the same labels become one; ages need `max`.
    """
    family = GaugeMetricFamily(name, documentation, labels=labels)
    for values, figure in bounded(rows, together).items():
        family.add_metric(values, figure)
    return family


def one(name: str, documentation: str, figure: float | None) -> Metric:
    """A gauge without labels; without a sample when there is no figure.

    Args:
        name: with its unit.
        documentation: what it says.
        figure: None: there is none.
    """
    return gauge(name, documentation, [((), figure)])


def counter(name: str, documentation: str, rows: Iterable[Row], labels: Sequence[str] = ()) -> Metric:
    """What only rises, and begins anew at midnight UTC, which Prometheus takes for the restart of a process.

    Args:
        name: without `_total`.
        documentation: what it says.
        rows: see `bounded`.
        labels: their names.
    """
    family = CounterMetricFamily(name, documentation, labels=labels)
    for values, figure in bounded(rows).items():
        family.add_metric(values, figure)
    return family


def histogram(
    name: str,
    documentation: str,
    rows: Iterable[tuple[Sequence[object], Sequence[float], float | None]],
    bounds: Sequence[float],
    labels: Sequence[str] = (),
) -> Metric:
    """How figures are distributed, since midnight UTC.

    Args:
        name: with its unit.
        documentation: what it says.
        rows: values of the labels; how many lie in each bucket, one more than there are bounds; their sum, if known.
        bounds: upper bounds of the buckets, without infinity.
        labels: their names.
    """
    family = HistogramMetricFamily(name, documentation, labels=labels)
    whole: dict[tuple[str, ...], tuple[list[float], float | None]] = {}
    for values, counts, total in rows:
        key = tuple(map(label, values))
        before, so_far = whole.get(key, ([0.0] * len(counts), 0.0))
        added = None if total is None or so_far is None else so_far + total
        whole[key] = ([a + b for a, b in zip(before, counts, strict=True)], added)
    for key, (counts, total) in whole.items():
        cumulative, buckets = 0.0, []
        for bound, count in zip([*(f"{bound:g}" for bound in bounds), "+Inf"], counts, strict=True):
            cumulative += count
            buckets.append((bound, cumulative))
        family.add_metric(key, buckets, total)
    return family
