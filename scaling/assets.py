"""Assets: the episodes of crossed thresholds, and the health of what is measured.

Belongs here: what the UI shows of them. Does not: any judgement of a metric (`scaling.episodes`, `scaling.thresholds`).
https://docs.dagster.io/guides/build/assets
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import dagster as dg

from scaling import effects, episodes, samples
from scaling.episodes import Episode, EpisodeState
from scaling.resources import ScalingResource, failing_with_a_sentence
from scaling.samples import Sample, Status

GROUP = "scaling"
MEASURED = ("scaling_episodes", "scaling_data_health")
EPISODES_SHOWN = 100
TEXT_SHOWN = 300
SICK = (Status.ERROR, Status.STALE)
WAITING = (EpisodeState.NEEDS_HUMAN, EpisodeState.PROPOSED)


@dg.asset(
    group_name=GROUP,
    kinds={"postgres"},
    tags={"pipeline": "scaling"},
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
    shown = list({episode.id: episode for episode in (*waiting, *newest)}.values())[:EPISODES_SHOWN]
    stuck = [episode for episode in waiting if episode.state is EpisodeState.NEEDS_HUMAN]
    yield dg.MaterializeResult(
        metadata={
            "needs_human": len(stuck),
            "proposed": len(waiting) - len(stuck),
            **_table("episodes", [_row(episode) for episode in shown]),
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
    with failing_with_a_sentence(), scaling.first_shard() as connection:
        newest = [series.newest for series in samples.series(connection)]
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


def _row(episode: Episode) -> dict[str, str | int | float]:
    return {
        "episode": episode.id,
        "rule": episode.rule,
        "of": episode.dims,
        "state": episode.state.value,
        "capability": episode.capability.value if episode.capability else "",
        "value": episode.value,
        "threshold": episode.threshold,
        "fired": f"{episode.fired_at:%Y-%m-%d %H:%M}",
        "recovered": f"{episode.recovered_at:%Y-%m-%d %H:%M}" if episode.recovered_at else "",
        "approved by": episode.approved_by or "",
        "attempts": episode.attempts,
        "error": (episode.error or "")[:TEXT_SHOWN],
        "effect": str((episode.effect or {}).get("sentence", ""))[:TEXT_SHOWN],
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
