"""One measurement of everything that is due: ask the sources, record what they say, judge the rules.

Belongs here: what is due, the order of it, and that one source's trouble is no other's. Does not: how a source is
asked (`scaling.sources`), or what a crossing leads to (`scaling.episodes`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import datetime, timedelta

from scaling import episodes, samples, tracing
from scaling.capabilities import Capability, Mode
from scaling.catalogue import Catalogue, Metric
from scaling.databases import Connection
from scaling.episodes import Happened
from scaling.samples import Sample, Series, Status
from scaling.sources import Reach, Source
from scaling.sources.derived import Derived, Known, Watched

AT_A_TIME = 4
"""Sources wait for others, not for this machine; more would only be more connections to the database."""
KEPT = timedelta(days=400)
"""Of samples: a year, and the same month of the year before to compare with."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one measurement did.

    Attributes:
        samples: that were taken, by metric and dims.
        happened: what they led to.
        not_due: names of the metrics whose time had not come.
        forgotten: samples that were older than is kept.
    """

    samples: tuple[Sample, ...]
    happened: tuple[Happened, ...]
    not_due: tuple[str, ...]
    forgotten: int


def due(metric: Metric, newest: Iterable[Sample], now: datetime) -> bool:
    """Whether a metric is to be measured: its interval has none that is ok yet.

    Intervals are counted from midnight UTC of 1970, so a daily metric is measured in the first run of each UTC day, and
    what failed is tried again by the next run.

    Args:
        metric: with its interval.
        newest: sample of each thing it was measured of.
        now: the moment of the measurement.
    """

    def interval(at: datetime) -> int:
        return int(at.timestamp() // metric.every.total_seconds())

    taken = list(newest)
    # A series that is gone (a route) would be due for ever: the newest moment of the metric is what counts.
    latest = max((sample.at for sample in taken), default=None)
    if latest is None or interval(latest) != interval(now):
        return True
    return any(sample.status is not Status.OK for sample in taken if sample.at == latest)


def measure(
    catalogue: Catalogue,
    modes: Mapping[Capability, Mode],
    reach: Reach,
    *,
    only: Sequence[str] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Measurement:
    """Measure what is due, record it, and judge every rule; recorded and judged in one transaction.

    Args:
        catalogue: what there is to measure.
        modes: of the capabilities.
        reach: databases, HTTP client, settings and the moment.
        only: names of the metrics to measure, due or not; None: whatever is due.
        progress: told the name of each metric that was measured.

    Returns:
        What was measured, and what it led to.

    Raises:
        UserError: the first shard does not answer, or `only` names what there is not.
    """
    first = reach.router.shards()[0]
    with first.transaction() as connection:
        before = _known(connection, catalogue)
    if only is not None:
        wanted = [catalogue.named(name) for name in only]
    else:
        wanted = [metric for metric in catalogue if due(metric, _newest(before, metric.name), reach.now)]
    taken: list[Sample] = []
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        asking = {
            pool.submit(tracing.carried(_read), metric.name, metric.source, reach): metric.name
            for metric in wanted
            if not isinstance(metric.source, Derived)
        }
        for done in as_completed(asking):
            taken += done.result()
            progress(asking[done])
    taken.sort(key=lambda sample: (sample.metric, sample.dims))
    with first.transaction() as connection:
        samples.record(connection, [sample for sample in taken if _is_news(sample, before)])
        for metric in wanted:
            if isinstance(metric.source, Derived):
                known = _known(connection, catalogue)
                made = metric.source.derive(metric.name, known, reach.settings, reach.now)
                samples.record(connection, [sample for sample in made if _is_news(sample, before)])
                taken += made
                progress(metric.name)
        happened = episodes.evaluate(connection, catalogue.watches(modes), reach.now)
        forgotten = samples.forget(connection, before=reach.now - KEPT)
    names = {metric.name for metric in wanted}
    return Measurement(
        tuple(taken),
        tuple(happened),
        tuple(metric.name for metric in catalogue if metric.name not in names),
        forgotten,
    )


def _read(metric: str, source: Source, reach: Reach) -> tuple[Sample, ...]:
    with tracing.span("metric", {"metric.name": metric}):
        try:
            taken = source.read(metric, reach)
        except Exception as error:  # noqa: BLE001 - a defect in one source must not keep the others from being judged
            tracing.failed(error)
            said = f"the source failed with {type(error).__name__}; this is a defect of the program"
            taken = (Sample(metric, reach.now, None, Status.ERROR, evidence={"error": said}),)
        tracing.ended(" ".join(sorted({sample.status for sample in taken})))
    return taken


def _is_news(sample: Sample, before: Known) -> bool:
    """What is not configured needs no record every hour; one a day says that it was looked at."""
    if sample.status is not Status.NOT_CONFIGURED:
        return True
    return not any(
        known.status is Status.NOT_CONFIGURED and known.dims == sample.dims and sample.at - known.at < timedelta(days=1)
        for known in _newest(before, sample.metric)
    )


def _newest(known: Known, metric: str) -> list[Sample]:
    return [series.newest for series in known[metric].series] if metric in known else []


def _known(connection: Connection, catalogue: Catalogue) -> Known:
    by_metric: dict[str, list[Series]] = {}
    for series in samples.series(connection):
        by_metric.setdefault(series.newest.metric, []).append(series)
    return {
        metric.name: Watched(metric.every, tuple(by_metric[metric.name]))
        for metric in catalogue
        if metric.name in by_metric
    }
