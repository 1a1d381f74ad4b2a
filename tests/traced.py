"""A run through the executor of the code locations, which `execute_in_process` replaces by one of its own."""

import dagster as dg
from dagster._core.definitions.job_base import InMemoryJob
from dagster._core.execution.api import execute_run


def execute(job: dg.JobDefinition, instance: dg.DagsterInstance, **tags: str) -> dg.DagsterRun:
    """Run a job as a run worker does, in this process.

    Args:
        job: resolved.
        instance: keeps the run.
        tags: of the run, `dagster__partition` for `dagster/partition`.

    Returns:
        The finished run.
    """
    named = {name.replace("__", "/"): value for name, value in tags.items()}
    run = instance.create_run_for_job(job, tags=named)
    execute_run(InMemoryJob(job), run, instance, raise_on_error=False)
    finished = instance.get_run_by_id(run.run_id)
    assert finished is not None
    return finished
