"""Jobs: the hourly look, and what a person decides about episodes and capabilities.

Belongs here: selections, the configuration of manual jobs, and the calls into the domain. Does not: when they run
(`scaling.schedules`), what a decision changes (`scaling.episodes`, `scaling.capabilities`), or acting on an episode,
which each pipeline's job does. https://docs.dagster.io/guides/build/jobs
"""

import dagster as dg
from pydantic import Field

from scaling import capabilities, episodes
from scaling.assets import MEASURED
from scaling.overrides import configured
from scaling.resources import ScalingResource, failing_with_a_sentence
from scaling.settings import ScalingSettings, load

TAGS = {"pipeline": "scaling"}

scaling_metrics_job = dg.define_asset_job(
    "scaling_metrics_job",
    selection=dg.AssetSelection.assets(*MEASURED),
    description="Measure what is due, judge every threshold, show episodes and the health of the data.",
    tags=TAGS,
)
scaling_forecasts_job = dg.define_asset_job(
    "scaling_forecasts_job",
    selection=dg.AssetSelection.assets("scaling_forecasts"),
    description="Tell when each threshold will be crossed, with pictures of the nearest.",
    tags=TAGS,
)


scaling_report_job = dg.define_asset_job(
    "scaling_report_job",
    selection=dg.AssetSelection.assets("scaling_report"),
    description="Write the page for people without Grafana: one HTML file, SCALING_REPORT_FILE.",
    tags=TAGS,
)


class EpisodeConfig(dg.Config):
    """Which episode, and who decides."""

    episode: int = Field(ge=1, description="Number of the episode, from the table of scaling_episodes.")
    by: str = Field(min_length=1, max_length=200, description="Who decides, for the record in scaling.episodes.")


class SwitchConfig(dg.Config):
    """Which capability, which way, who decides and why."""

    capability: str = Field(description="incremental_sync, parallel_sync, audit_log_partitioning, audit_log_retention.")
    on: bool = Field(description="Whether it is to be on. The modes off and on of the settings hold regardless.")
    by: str = Field(min_length=1, max_length=200, description="Who decides, for the record.")
    reason: str = Field(min_length=1, max_length=2000, description="Why, in a sentence, for the record.")


class RearmConfig(dg.Config):
    """Which rule, and who decides."""

    metric: str = Field(description="Name of the metric, as scaling_metrics shows it.")
    of: str = Field(default="", description="What it is measured of, like shard=main; empty where it shows nothing.")
    by: str = Field(min_length=1, max_length=200, description="Who decides, for the record.")


@dg.op(tags=TAGS)
def approve(context: dg.OpExecutionContext, config: EpisodeConfig, scaling: ScalingResource) -> None:
    """Approve an episode; the sensor of its capability starts the action within half a minute."""
    with failing_with_a_sentence(), scaling.first_shard() as connection:
        decision = episodes.approve(connection, config.episode, config.by)
    _show(context, decision)


@dg.op(tags=TAGS)
def acknowledge(context: dg.OpExecutionContext, config: EpisodeConfig, scaling: ScalingResource) -> None:
    """Record that somebody has seen an episode."""
    with failing_with_a_sentence(), scaling.first_shard() as connection:
        decision = episodes.acknowledge(connection, config.episode, config.by)
    _show(context, decision)


@dg.op(tags=TAGS)
def switch(context: dg.OpExecutionContext, config: SwitchConfig, scaling: ScalingResource) -> None:
    """Switch a capability, from the next run of its pipeline on."""
    with failing_with_a_sentence(), scaling.first_shard() as connection:
        changed = capabilities.switch(
            connection, capabilities.named(config.capability), on=config.on, by=config.by, reason=config.reason
        )
    context.log.info(
        "%s %s %s", config.capability, "is now" if changed else "already was", "on" if config.on else "off"
    )
    context.add_output_metadata({"capability": config.capability, "on": config.on, "changed": changed})


@dg.op(tags=TAGS)
def rearm(context: dg.OpExecutionContext, config: RearmConfig, scaling: ScalingResource) -> None:
    """Let a rule that fires once fire again."""
    with failing_with_a_sentence(), scaling.first_shard() as connection:
        _, rule = configured(load(ScalingSettings)).judged(config.metric)
        state = episodes.rearm(connection, rule, config.of, config.by)
    context.log.info("%s is armed again; the next sample that breaches begins a new episode", config.metric)
    context.add_output_metadata({"metric": config.metric, "of": config.of, "phase": state.phase.value})


@dg.job(
    description="Approve an episode that was proposed, observed, given up or has expired. One step: say which and who.",
    tags=TAGS,
)
def approve_episode() -> None:
    """One decision."""
    approve()


@dg.job(
    description="Say that you have seen an episode. Changes nothing else: its rule is judged and its action runs on.",
    tags=TAGS,
)
def acknowledge_episode() -> None:
    """One decision."""
    acknowledge()


@dg.job(
    description="Switch a capability on or off by hand, with who and why on record. Takes effect with the next run of "
    "its pipeline; a mode of off or on in the settings holds regardless.",
    tags=TAGS,
)
def switch_capability() -> None:
    """One decision."""
    switch()


@dg.job(
    description="Let a rule that fires once, and has, fire again: one step, say which metric and who. The episode it "
    "had ends with it.",
    tags=TAGS,
)
def rearm_rule() -> None:
    """One decision."""
    rearm()


MANUAL = [approve_episode, acknowledge_episode, switch_capability, rearm_rule]


def _show(context: dg.OpExecutionContext, decision: episodes.Decision) -> None:
    context.log.info("%s", decision.sentence)
    context.add_output_metadata(
        {
            "episode": decision.episode.id,
            "rule": decision.episode.rule,
            "state": decision.episode.state.value,
            "changed": decision.changed,
            "said": decision.sentence,
        }
    )
