"""How far each metric is from its threshold, and when it will get there.

Belongs here: putting samples, rules, states, episodes and forecasts side by side, and the words for it. Does not: how
that is shown (`scaling.console`, `scaling.assets`), or any of the parts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial

from scaling import episodes, samples, thresholds
from scaling.capabilities import changes
from scaling.catalogue import Catalogue, Metric
from scaling.databases import Connection
from scaling.episodes import Episode
from scaling.forecast import Forecast, forecast
from scaling.samples import Sample, Status
from scaling.thresholds import Compare, Event, Fired, Recovered, Rule, State
from scaling.units import shown

LOOKED_BACK = timedelta(days=90)
"""What a forecast takes into account at most."""


@dataclass(frozen=True, slots=True)
class Headroom:
    """Where one metric stands, of one thing it is measured of.

    Attributes:
        metric: from the catalogue.
        dims: what it was measured of; empty: of everything.
        sample: the newest, whatever its status; None: it was never measured.
        state: of its rule; None: it has none, or was never judged.
        episode: the latest; None: there was none.
        forecast: None: it has no rule.
        history: samples the forecast rests on, oldest first.
    """

    metric: Metric
    dims: str
    sample: Sample | None
    state: State | None
    episode: Episode | None
    forecast: Forecast | None
    history: Sequence[Sample] = ()

    @property
    def name(self) -> str:
        """Of the metric, and of what it was measured."""
        return f"{self.metric.name} ({self.dims})" if self.dims else self.metric.name

    @property
    def used(self) -> float | None:
        """How much of the way to the threshold is gone: 1 is there; None: that cannot be told."""
        rule = self.metric.rule
        if rule is None or self.sample is None or self.sample.value is None:
            return None
        if rule.compare in (Compare.ABOVE, Compare.AT_LEAST):
            return self.sample.value / rule.threshold if rule.threshold > 0 else None
        return rule.threshold / self.sample.value if self.sample.value > 0 else None

    @property
    def crossed(self) -> bool:
        """Whether the newest figure is on the wrong side of its threshold."""
        rule = self.metric.rule
        value = self.sample.value if self.sample else None
        return rule is not None and value is not None and rule.breached(value)


def table(connection: Connection, catalogue: Catalogue, now: datetime, *, only: str | None = None) -> list[Headroom]:
    """Read where every metric stands.

    Args:
        connection: in a transaction of the first shard.
        catalogue: the metrics.
        now: the moment of the forecasts.
        only: of this metric; None: of all.

    Returns:
        By metric in the order of the catalogue, then by what it was measured of. A metric that was never measured has
        one row without a sample.
    """
    states = {(each.rule, each.dims): each.state for each in episodes.standings(connection)}
    latest = {(each.rule, each.dims): each for each in episodes.latest(connection)}
    switched: dict[str, list[datetime]] = {}
    for change in changes(connection):
        switched.setdefault(change.capability.value, []).append(change.changed_at)
    newest: dict[str, list[Sample]] = {}
    for series in samples.series(connection):
        newest.setdefault(series.newest.metric, []).append(series.newest)
    rows = []
    for metric in catalogue:
        if only is not None and metric.name != only:
            continue
        own = switched.get(metric.capability.value, []) if metric.capability else []
        taken: list[Sample | None] = [*newest.get(metric.name, ())]
        for sample in taken or [None]:
            dims = sample.dims if sample else ""
            history: Sequence[Sample] = ()
            foreseen = None
            if metric.rule is not None:
                history = samples.history(connection, metric.name, dims=dims, since=now - LOOKED_BACK)
                foreseen = forecast(
                    history,
                    metric.rule.threshold,
                    metric.rule.compare,
                    now,
                    change_points=own,
                    unit_label=partial(shown, unit=metric.unit),
                )
            key = (metric.name, dims)
            rows.append(Headroom(metric, dims, sample, states.get(key), latest.get(key), foreseen, history))
    return rows


def by_urgency(rows: Sequence[Headroom]) -> list[Headroom]:
    """Sort: what is crossed first, then what will cross soonest, then by how much of the way is gone.

    Args:
        rows: of `table`.
    """

    def urgency(row: Headroom) -> tuple[bool, float, float]:
        when = row.forecast.p50 if row.forecast else None
        return (not row.crossed, when.timestamp() if when else float("inf"), -(row.used or 0.0))

    return sorted(rows, key=urgency)


def value_in_words(row: Headroom) -> str:
    """The newest figure, or why there is none."""
    if row.sample is None:
        return "not measured yet"
    if row.sample.value is None:
        return row.sample.status.value.replace("_", " ")
    return shown(row.sample.value, row.metric.unit)


def eta_in_words(row: Headroom) -> str:
    """When the threshold will be crossed, as short as a table takes."""
    if row.crossed:
        return "crossed"
    foreseen = row.forecast
    if foreseen is None or not foreseen.trend or foreseen.p50 is None:
        return "-"
    last = f"{foreseen.p90:%d %b}" if foreseen.p90 else "never"
    first = f"{foreseen.p10:%d %b}" if foreseen.p10 else "?"
    return f"{foreseen.p50:%d %b %Y} ({first} to {last})"


def state_in_words(row: Headroom) -> str:
    """Where the rule and its latest episode stand."""
    if row.metric.rule is None:
        return "evidence"
    if row.sample is not None and row.sample.status is Status.NOT_CONFIGURED and row.state is None:
        return "not configured"
    if row.state is None:
        return "not judged yet"
    said = row.state.phase.value
    if row.episode is not None and row.state.phase.value in ("fired", "clearing", "latched"):
        said += f", episode {row.episode.id} {row.episode.state.value.replace('_', ' ')}"
    if row.state.flapping:
        said += ", flapping"
    if row.state.missing:
        said += ", no data"
    return said


def threshold_in_words(metric: Metric) -> str:
    """The side and the figure: ``> 10,000``."""
    rule = metric.rule
    return f"{rule.compare.value} {shown(rule.threshold, metric.unit)}" if rule else ""


def condition_in_words(metric: Metric) -> str:
    """When the rule of a metric fires, recovers and fires again, in a sentence.

    Args:
        metric: with a rule.
    """
    rule = metric.rule
    if rule is None:
        return "It is evidence for other metrics and has no threshold."
    votes = "one sample" if rule.of == 1 else f"{rule.breaches} of {rule.of} samples in a row"
    held = f" over at least {_span(rule.hold)}" if rule.hold else ""
    fires = f"Fires when {votes} {'is' if rule.of == 1 else 'are'} {threshold_in_words(metric)}{held}."
    if rule.recovery is None:
        recovers = "Never recovers by itself."
    else:
        side = "or less" if rule.compare in (Compare.ABOVE, Compare.AT_LEAST) else "or more"
        figure = shown(rule.recovery, metric.unit)
        again = "" if rule.recovery_of == 1 else f" in {rule.recoveries} of {rule.recovery_of} samples"
        recovers = f"Recovers at {figure} {side}{again}, confirmed by the next one."
    again = {
        thresholds.Rearm.ONE_SHOT: "Then stays quiet until a person re-arms it.",
        thresholds.Rearm.REPEAT: "Fires again after it has recovered.",
        thresholds.Rearm.PERIOD: "Fires once a month at most.",
    }[rule.rearm]
    return f"{fires} {recovers} {again} Measured every {_span(metric.every)}."


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a rule would have done, of one thing it is measured of.

    Attributes:
        dims: what it was measured of.
        samples: how many were fed.
        events: what happened, with the sample that led to it.
        state: at the end.
    """

    dims: str
    samples: int
    events: Sequence[tuple[Sample, Event]]
    state: State


def replay(connection: Connection, metric: Metric, changed: Mapping[str, object]) -> tuple[Rule, list[Replayed]]:
    """What the rule of a metric would have done on everything on record, if it were another one.

    Args:
        connection: in a transaction of the first shard.
        metric: with a rule.
        changed: attributes of the rule that are to differ; empty: as it is.

    Returns:
        The rule that was tried, and what it did, by dims.

    Raises:
        UserError: the changed rule cannot work.
    """
    rule = metric.rule
    if rule is None:
        raise ValueError(f"{metric.name} has no rule")
    tried = replace(rule, **changed)  # type: ignore[arg-type]  # checked by the rule itself
    found: dict[str, Replayed] = {}
    for sample, state, events in thresholds.replay(tried, samples.history(connection, metric.name)):
        before = found.get(sample.dims)
        said = [*(before.events if before else ()), *((sample, event) for event in events)]
        found[sample.dims] = Replayed(sample.dims, (before.samples if before else 0) + 1, said, state)
    return tried, [found[dims] for dims in sorted(found)]


def event_in_words(metric: Metric, event: Event) -> str:
    """What happened, for people.

    Args:
        metric: it happened to.
        event: of its rule.
    """
    match event:
        case Fired(episode_no, _, value, _, flapping):
            said = f"fires: episode {episode_no} at {shown(value, metric.unit)}"
            return f"{said}; it flaps, so nothing would act by itself" if flapping else said
        case Recovered(episode_no, _, value):
            return f"recovers: episode {episode_no} ends at {shown(value, metric.unit)}"
        case thresholds.DataMissing(since, status):
            why = f"; the newest sample is {status.value}" if status else ""
            return f"has no data since {since:%Y-%m-%d %H:%M}{why}"
        case thresholds.DataBack():
            return "has data again"
        case thresholds.Flapping(episode_no):
            return f"flaps: episode {episode_no} came too soon after others"
        case thresholds.Rearmed(episode_no):
            return f"is armed again after episode {episode_no}"
        case thresholds.FromFuture(at):
            return f"a sample claims to be of {at:%Y-%m-%d %H:%M}; a clock is wrong"


def _span(span: timedelta) -> str:
    minutes = span / timedelta(minutes=1)
    for length, name in ((24 * 60, "day"), (60, "hour"), (1, "minute")):
        if minutes >= length:
            count = minutes / length
            return name if count == 1 else f"{count:g} {name}s"
    return f"{span.total_seconds():g} seconds"
