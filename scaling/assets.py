"""Assets: the metrics and how far they are from their thresholds, forecasts, episodes, the health of what is measured.

Belongs here: what the UI shows of them. Does not: measuring (`scaling.measure`), or any judgement
(`scaling.thresholds`, `scaling.episodes`, `scaling.forecast`). https://docs.dagster.io/guides/build/assets
"""

import base64
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import dagster as dg
from pydantic import Field

from scaling import effects, episodes, headroom, samples
from scaling.capabilities import modes
from scaling.episodes import Episode, EpisodeState
from scaling.headroom import Headroom
from scaling.measure import Measurement, measure
from scaling.overrides import configured
from scaling.resources import ScalingResource, failing_with_a_sentence
from scaling.samples import Sample, Status
from scaling.settings import ScalingSettings, load
from scaling.thresholds import Phase
from scaling.units import Unit, shown

GROUP = "scaling"
MEASURED = ("scaling_metrics", "scaling_episodes", "scaling_data_health")
CHARTS_SHOWN = 5
"""Of the metrics that are nearest to their thresholds; each picture is below 20 kB of the event log."""
EPISODES_SHOWN = 100
TEXT_SHOWN = 300
SICK = (Status.ERROR, Status.STALE)
WAITING = (EpisodeState.NEEDS_HUMAN, EpisodeState.PROPOSED)


class MetricsConfig(dg.Config):
    """What is measured."""

    metrics: list[str] = Field(
        default_factory=list, description="Names of metrics to measure now, due or not; none: whatever is due."
    )


@dg.asset(
    group_name=GROUP,
    kinds={"postgres", "python"},
    tags={"pipeline": "scaling"},
    check_specs=[
        dg.AssetCheckSpec(
            "below_thresholds",
            asset="scaling_metrics",
            description="No metric is over its threshold without somebody, or an action, having taken it up. What to "
            "do stands in the metric's recommendation: python -m scaling explain METRIC.",
        )
    ],
)
def scaling_metrics(
    context: dg.AssetExecutionContext, config: MetricsConfig, scaling: ScalingResource
) -> Iterator[dg.MaterializeResult[None]]:
    """Every figure of the scaling plan, measured where it arises, beside its threshold.

    **A materialization** measures what is due (most metrics hourly, some daily), records it, and judges every rule: a
    crossing becomes an episode in the same transaction. It shows the headroom of every metric, the nearest first, and
    each figure as a number of its own that plots over time.

    **Cadence**: every hour. What cannot be measured is an error, stale or not configured, never a zero, and fires
    nothing; see `scaling_data_health`. Thresholds are changed in the file of SCALING_CATALOGUE_FILE.
    """
    with failing_with_a_sentence():
        settings = load(ScalingSettings)
        known = configured(settings)
        with scaling.reach(settings, datetime.now(UTC)) as reach:
            done = measure(
                known,
                modes(settings),
                reach,
                only=config.metrics or None,
                progress=lambda name: context.log.debug("%s asked", name),
            )
            with reach.router.shards()[0].transaction() as connection:
                rows = headroom.table(connection, known, reach.now)
    for each in done.happened:
        of = f" ({each.dims})" if each.dims else ""
        context.log.info("%s%s %s", each.rule, of, headroom.event_in_words(known.named(each.rule), each.event))
    over = [row for row in rows if row.crossed and _nobody_took_it_up(row)]
    yield dg.MaterializeResult(
        metadata={
            **_table("headroom", [_headroom_row(row) for row in headroom.by_urgency(rows) if _is_shown(row)]),
            **_numbers(rows, done),
        },
        check_results=[
            dg.AssetCheckResult(
                check_name="below_thresholds",
                passed=not over,
                severity=dg.AssetCheckSeverity.WARN,
                metadata={row.name: row.metric.recommendation.do for row in over[:10] if row.metric.recommendation},
                description="\n".join(
                    f"{row.metric.title} is {headroom.value_in_words(row)}, threshold "
                    f"{headroom.threshold_in_words(row.metric)}; owner {row.metric.owner}, {row.metric.runbook}"
                    for row in over[:10]
                )
                or "Every metric that was measured is below its threshold, or somebody has taken it up.",
            )
        ],
    )


@dg.asset(group_name=GROUP, kinds={"postgres", "python"}, tags={"pipeline": "scaling"}, deps=[scaling_metrics])
def scaling_forecasts(scaling: ScalingResource) -> dg.MaterializeResult[None]:
    """When each threshold will be crossed: a span of dates, or why nobody can tell.

    **A materialization** lists every metric with its pace, and shows the trend of the five nearest: the figures, the
    threshold, the projection with the band in which it lies eight of ten times, and the span of the crossing.

    **Cadence**: every day. A forecast needs ten days of figures since the last step, or seven days of a figure that
    begins anew every month.
    """
    from scaling import trend_chart  # 0.6 s to import, and only forecasts draw

    with failing_with_a_sentence():
        now = datetime.now(UTC)
        known = configured(load(ScalingSettings))
        with scaling.first_shard() as connection:
            rows = headroom.by_urgency(headroom.table(connection, known, now))
    rows = [row for row in rows if row.forecast and row.history and _is_shown(row)]
    pictures = {}
    for row in sorted(rows, key=lambda row: not (row.forecast and row.forecast.trend))[:CHARTS_SHOWN]:
        rule, foreseen = row.metric.rule, row.forecast
        if rule is None or foreseen is None:
            continue
        png = trend_chart.draw(
            f"{row.metric.title} ({row.dims})" if row.dims else row.metric.title,
            partial(shown, unit=row.metric.unit),
            row.history,
            rule.threshold,
            rule.recovery,
            rule.compare,
            foreseen,
            now,
        )
        pictures[f"trend of {row.name}"] = dg.MetadataValue.md(
            f"![{row.name}](data:image/png;base64,{base64.b64encode(png).decode()})"
        )
    return dg.MaterializeResult(
        metadata={
            **pictures,
            **_table("forecasts", [_forecast_row(row) for row in rows]),
            "metrics": len(rows),
            "with_a_date": sum(bool(row.forecast and row.forecast.trend) for row in rows),
            "crossed": sum(row.crossed for row in rows),
        }
    )


@dg.asset(
    group_name=GROUP,
    kinds={"postgres", "html"},
    tags={"pipeline": "scaling"},
    deps=[scaling_metrics],
)
def scaling_report(scaling: ScalingResource) -> dg.MaterializeResult[None]:
    """One page for people without Grafana: is anything wrong, how far is each threshold, how do sync and archive go.

    **A materialization** writes one HTML file that needs no network, SCALING_REPORT_FILE, from what the runs recorded:
    no source, Google or bucket is asked. Its metadata is the verdict, and a link to the page where SCALING_REPORT_URL
    says that it is served (`python -m scaling.report_server`, always as of now). On a terminal: `python -m scaling
    report`.

    **Cadence**: every hour, after the metrics.
    """
    from scaling import report, report_page  # 0.6 s to import, and only the report draws

    with failing_with_a_sentence():
        settings = load(ScalingSettings)
        with scaling.databases() as router:
            found = report.current(router)
        page, said = report_page.render(found), report_page.verdict(found)
        path = settings.scaling_report_file.absolute()
        report_page.write(page, path)
    acts = sum(each.severity is report.Severity.ACT for each in found.findings)
    return dg.MaterializeResult(
        metadata={
            "verdict": f"{said.title}. {said.detail}",
            **({"page": dg.MetadataValue.url(address)} if (address := settings.scaling_report_url) else {}),
            "file": dg.MetadataValue.path(path),
            **_table(
                "findings",
                [
                    {
                        "level": each.severity.value,
                        "what": each.title,
                        "detail": each.detail[:TEXT_SHOWN],
                        "do": each.do,
                    }
                    for each in found.findings
                ],
            ),
            "needs_somebody": acts,
            "to_look_at": len(found.findings) - acts,
            "bytes": len(page.encode()),
        }
    )


@dg.asset(
    group_name=GROUP,
    kinds={"postgres"},
    tags={"pipeline": "scaling"},
    deps=[scaling_metrics],
    check_specs=[
        dg.AssetCheckSpec(
            "nobody_is_needed",
            asset="scaling_episodes",
            description="No action was given up after its last attempt. Approving the episode tries again.",
        )
    ],
)
def scaling_episodes(scaling: ScalingResource) -> Iterator[dg.MaterializeResult[None]]:
    """Crossed thresholds: what was measured, what was decided, what an action did and changed.

    **A materialization** lists the newest 100 episodes, those that wait for somebody first. One that is proposed is
    approved in the Launchpad of the job `approve_episode`, by its number.

    **Cadence**: every hour. Actions that were silent for their lease are given up here too, so that they are even while
    a sensor is off, and the effect of those that acted is measured.
    """
    with failing_with_a_sentence(), scaling.first_shard() as connection:
        episodes.reap(connection)
        effects.update(connection, datetime.now(UTC))
        waiting = episodes.listing(connection, states=WAITING, limit=EPISODES_SHOWN)
        newest = episodes.listing(connection, limit=EPISODES_SHOWN)
    listed = list({episode.id: episode for episode in (*waiting, *newest)}.values())[:EPISODES_SHOWN]
    stuck = [episode for episode in waiting if episode.state is EpisodeState.NEEDS_HUMAN]
    yield dg.MaterializeResult(
        metadata={
            **_table("episodes", [_row(episode) for episode in listed]),
            "needs_human": len(stuck),
            "proposed": len(waiting) - len(stuck),
        },
        check_results=[
            dg.AssetCheckResult(
                check_name="nobody_is_needed",
                passed=not stuck,
                severity=dg.AssetCheckSeverity.ERROR,
                description="\n".join(
                    f"Episode {episode.id} ({episode.rule}) was given up after {episode.attempts} attempts: "
                    f"{(episode.error or 'its rule flaps')[:TEXT_SHOWN]}"
                    for episode in stuck[:10]
                )
                or "No episode waits for a human.",
            )
        ],
    )


@dg.asset(
    group_name=GROUP,
    kinds={"postgres"},
    tags={"pipeline": "scaling"},
    deps=[scaling_metrics],
    check_specs=[
        dg.AssetCheckSpec(
            "sources_answer",
            asset="scaling_data_health",
            description="The newest sample of every metric is neither an error nor stale. A source that is not "
            "configured is counted and is no fault.",
        )
    ],
)
def scaling_data_health(scaling: ScalingResource) -> Iterator[dg.MaterializeResult[None]]:
    """Whether the newest sample of each metric is to be believed, and how old it is.

    **A materialization** counts the statuses and lists every metric. Only a sample that is ok moves a rule, so a sick
    source fires nothing and ends nothing; the check turns yellow instead.
    """
    with failing_with_a_sentence():
        known = configured(load(ScalingSettings))
        with scaling.first_shard() as connection:
            newest = [series.newest for series in samples.series(connection) if known.get(series.newest.metric)]
    now = datetime.now(UTC)
    sick = [sample for sample in newest if sample.status in SICK]
    counted = Counter(sample.status for sample in newest)
    yield dg.MaterializeResult(
        metadata={
            **{status.value: counted[status] for status in Status},
            **_table("metrics", [_health(sample, now) for sample in newest]),
        },
        check_results=[
            dg.AssetCheckResult(
                check_name="sources_answer",
                passed=not sick,
                severity=dg.AssetCheckSeverity.WARN,
                description=", ".join(_name(sample) + f" is {sample.status}" for sample in sick[:10])
                or f"{counted[Status.OK]} figures are good, {counted[Status.NOT_CONFIGURED]} are not configured.",
            )
        ],
    )


def _is_shown(row: Headroom) -> bool:
    """Whether a row of the tables is worth its place: one that is judged, and no source that is well."""
    return row.metric.rule is not None and (row.metric.unit is not Unit.PERIODS or row.crossed)


def _nobody_took_it_up(row: Headroom) -> bool:
    """Whether a crossed metric waits for somebody: its episode neither acts, has acted, nor was acknowledged."""
    if row.state is None or row.state.phase not in (Phase.FIRED, Phase.CLEARING, Phase.LATCHED) or row.episode is None:
        return False
    taken_up = (EpisodeState.APPROVED, EpisodeState.ACTING, EpisodeState.ACTED, EpisodeState.ACTION_FAILED)
    return row.episode.acknowledged_by is None and row.episode.state not in taken_up


def _numbers(rows: Sequence[Headroom], done: Measurement) -> dict[str, float | int]:
    """What plots: every figure that was taken, by its name."""
    figures = {
        row.name: row.sample.value
        for row in rows
        if row.sample is not None and row.sample.value is not None and row.metric.unit is not Unit.PERIODS
    }
    counts = {
        "figures_taken": len(done.samples),
        "metrics_crossed": sum(row.crossed for row in rows),
        "events": len(done.happened),
    }
    return {**figures, **counts}


# Four columns are what Dagster shows of a table beside a page's sidebar without cutting it off.
def _headroom_row(row: Headroom) -> dict[str, str | int | float]:
    used = "" if row.used is None else f" ({row.used:.0%})"
    crosses = "" if row.crossed or headroom.eta_in_words(row) == "-" else f"; crosses {headroom.eta_in_words(row)}"
    return {
        "metric": row.name,
        "value": headroom.value_in_words(row) + used,
        "threshold": headroom.threshold_in_words(row.metric),
        "state": headroom.state_in_words(row) + crosses,
    }


def _forecast_row(row: Headroom) -> dict[str, str | int | float]:
    return {
        "metric": row.name,
        "value": headroom.value_in_words(row),
        "threshold": headroom.threshold_in_words(row.metric),
        "forecast": row.forecast.reason[:TEXT_SHOWN] if row.forecast else "",
    }


def _row(episode: Episode) -> dict[str, str | int | float]:
    said = str((episode.effect or {}).get("sentence", "")) or episode.error or ""
    happened = [
        f"{episode.value:,.10g}, threshold {episode.threshold:,.10g}, {episode.fired_at:%Y-%m-%d %H:%M}",
        *([f"recovered {episode.recovered_at:%Y-%m-%d %H:%M}"] if episode.recovered_at else []),
        *([said[:TEXT_SHOWN]] if said else []),
    ]
    return {
        "episode": episode.id,
        "rule": f"{episode.rule} ({episode.dims})" if episode.dims else episode.rule,
        "state": episode.state.value.replace("_", " ") + (f" by {episode.approved_by}" if episode.approved_by else ""),
        "what happened": ". ".join(happened),
    }


def _name(sample: Sample) -> str:
    return f"{sample.metric} ({sample.dims})" if sample.dims else sample.metric


def _health(sample: Sample, now: datetime) -> dict[str, str | int | float]:
    return {
        "metric": sample.metric,
        "of": sample.dims,
        "status": sample.status.value,
        "value": "" if sample.value is None else f"{sample.value:g}",
        "age in hours": round((now - sample.at).total_seconds() / 3600, 1),
    }


def _table(name: str, rows: Sequence[Mapping[str, str | int | float]]) -> dict[str, dg.MetadataValue[Any]]:
    return {name: dg.MetadataValue.table([dg.TableRecord(dict(row)) for row in rows])} if rows else {}
