"""The sensor of a capability: whatever was crossed and approved gets a run, until one has acted.

Belongs here: which runs a pipeline's sensor requests, for every pipeline alike. Does not: the jobs (each pipeline's
own), or which episodes are to be acted on (`scaling.episodes`).

It is level-triggered: each look compares everything and nothing is remembered, so a lost cursor, a killed daemon or a
second one changes nothing. What keeps actions apart is the claim a run makes, not the sensor.

Two things of Dagster shape it (1.13.27). A run key is never used twice by a sensor, so a run that ended before it
claimed its episode would block that attempt for ever; it counts as a failed attempt. And a run that was killed tells
nobody; so each look asks how the runs ended that hold a claim, and gives up the claim of those that did.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import dagster as dg
from dagster import DagsterRunStatus as RunStatus

from scaling import episodes
from scaling.capabilities import Capability, Mode, modes
from scaling.databases import Shard
from scaling.episodes import Episode, EpisodeState
from scaling.settings import AutomationSettings, CapabilitySettings, load

if TYPE_CHECKING:
    # dagster exports the function that makes one but not its type.
    from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

# Dagster passes the parameter to itself when it binds a sensor to its job; pinned, and no process needs to be told.
warnings.filterwarnings("ignore", message="Parameter `owners` of initializer `Sensor", category=dg.BetaWarning)

REQUESTS_PER_LOOK = 10
EPISODES_NAMED = 5
EPISODE_TAG = "scaling/episode"
ATTEMPT_TAG = "scaling/attempt"


def capability_sensor(
    capability: Capability,
    job: "dg.JobDefinition | UnresolvedAssetJobDefinition",
    *,
    op: str,
    resource: str,
    automation: AutomationSettings,
) -> dg.SensorDefinition:
    """Make the sensor ``<capability>_sensor``, which launches a job for every episode that is to be acted on.

    Args:
        capability: whose episodes.
        job: what acts. Its op claims the episode (`episodes.claim`) before anything else.
        op: the one whose configuration has the field ``episode``, the id.
        resource: key of the resource whose method ``databases()`` opens the databases.
        automation: whether the sensor is on from the first start, and how often it looks.
    """
    status = dg.DefaultSensorStatus

    @dg.sensor(
        name=f"{capability.value}_sensor",
        job=job,
        minimum_interval_seconds=automation.scaling_sensor_seconds,
        required_resource_keys={resource},
        default_status=status.RUNNING if automation.pipeline_autostart else status.STOPPED,
        description=f"Starts {job.name} when a threshold of {capability.value} was crossed and SCALING_"
        f"{capability.value.upper()} is auto, or somebody approved it: job approve_episode, or python -m scaling "
        "approve. Tries again what failed or was lost, then asks for a human. Keeps no cursor.",
    )
    def sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        mode = modes(load(CapabilitySettings))[capability]
        with getattr(context.resources, resource).databases() as router:
            shard = router.shards()[0]
            _give_up_ended_runs(shard, capability, context.instance)
            with shard.transaction() as connection:
                episodes.reap(connection)
            with shard.transaction() as connection:
                wanted = episodes.actionable(connection, capability, mode=mode)
            requests, held_back = _requests(shard, context.instance, job.name, op, wanted)
            if requests:
                return dg.SensorResult(run_requests=requests[:REQUESTS_PER_LOOK])
            return dg.SkipReason(" ".join([*held_back, _waiting(shard, capability, mode)]))

    return sensor


def _requests(
    shard: Shard, instance: dg.DagsterInstance, job: str, op: str, wanted: Sequence[Episode]
) -> tuple[list[dg.RunRequest], list[str]]:
    """Runs to request; and of the episodes that get none, why."""
    keys = {episode.id: episodes.run_key(episode) for episode in wanted}
    tags = {ATTEMPT_TAG: sorted(keys.values())}
    requested = instance.get_runs(dg.RunsFilter(job_name=job, tags=tags)) if keys else []
    runs = {run.tags[ATTEMPT_TAG]: run for run in requested}
    requests, held_back = [], []
    for episode in wanted:
        run = runs.get(keys[episode.id])
        if run is None:
            requests.append(
                dg.RunRequest(
                    run_key=keys[episode.id],
                    run_config={"ops": {op: {"config": {"episode": episode.id}}}},
                    tags={EPISODE_TAG: str(episode.id), ATTEMPT_TAG: keys[episode.id]},
                )
            )
        elif run.is_finished:
            _record_end(shard, instance, episode, run, attempts=episode.attempts)
            held_back.append(f"Run {run.run_id} of episode {episode.id} ended before it began to act.")
        else:
            held_back.append(f"Run {run.run_id} of episode {episode.id} is on its way.")
    return requests, held_back


def _give_up_ended_runs(shard: Shard, capability: Capability, instance: dg.DagsterInstance) -> None:
    """Fail what a run had claimed that has ended without saying how it went."""
    with shard.transaction() as connection:
        acting = episodes.listing(connection, states=[EpisodeState.ACTING], capability=capability)
    for episode in acting:
        # Unknown runs may be somebody's command line; their deadline ends them.
        run = instance.get_run_by_id(str(episode.run_id))
        if run is not None and run.is_finished:
            _record_end(shard, instance, episode, run, attempts=episode.attempts - 1)


def _record_end(
    shard: Shard, instance: dg.DagsterInstance, episode: Episode, run: dg.DagsterRun, *, attempts: int
) -> None:
    why = _why(instance, run)
    with shard.transaction() as connection:
        episodes.run_ended(connection, episode.id, run_id=run.run_id, attempts=attempts, error=why)


def _why(instance: dg.DagsterInstance, run: dg.DagsterRun) -> str:
    """How a run ended: the sentence it failed with, which is the only text that is sure to hold no secret."""
    if run.status is RunStatus.CANCELED:
        return f"run {run.run_id} was cancelled"
    for record in instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE):
        data = record.dagster_event.step_failure_data if record.dagster_event else None
        if data and data.user_failure_data and data.user_failure_data.description:
            return data.user_failure_data.description
    return f"run {run.run_id} ended ({run.status.value.lower()}) before its action did; see its log"


def _waiting(shard: Shard, capability: Capability, mode: Mode) -> str:
    """What has to happen before there is something to do."""
    setting = f"SCALING_{capability.value.upper()}"
    with shard.transaction() as connection:

        def ids(*states: EpisodeState) -> str:
            found = episodes.listing(connection, states=states, capability=capability, limit=EPISODES_NAMED + 1)
            named = ", ".join(str(episode.id) for episode in found[:EPISODES_NAMED])
            return named + (" and others" if len(found) > EPISODES_NAMED else "")

        says: list[tuple[str, Callable[[str], str]]] = [
            (
                ids(EpisodeState.PROPOSED),
                lambda found: (
                    f"Proposed and waiting for approval: episode {found}. Approve in the Launchpad of job "
                    "approve_episode, or with python -m scaling approve N."
                ),
            ),
            (
                ids(EpisodeState.NEEDS_HUMAN),
                lambda found: (
                    f"Given up and waiting for a human: episode {found}; asset scaling_episodes says why. "
                    "Approving it tries again."
                ),
            ),
            (ids(EpisodeState.ACTING), lambda found: f"Being acted on: episode {found}."),
            (ids(EpisodeState.ACTION_FAILED), lambda found: f"Failed, and tried again later: episode {found}."),
            (
                ids(EpisodeState.OBSERVED),
                lambda found: (
                    f"Only recorded, because {setting} was not propose or auto: episode {found}. "
                    "Approving it acts on it."
                ),
            ),
        ]
    said = [sentence(found) for found, sentence in says if found]
    return " ".join(said) or f"Nothing was crossed ({setting} is {mode})."
