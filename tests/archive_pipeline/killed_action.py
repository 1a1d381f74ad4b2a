"""A run of an action that dies at a given point, as a machine that loses its power would."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import dagster as dg

from archive_pipeline import capabilities, conversion
from archive_pipeline.conversion import Step
from archive_pipeline.definitions import build_defs
from scaling import episodes


def main(job: str, op: str, point: str, episode: int) -> None:
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def after(function: Callable[..., Any]) -> Callable[..., Any]:
        def dying(*arguments: Any, **options: Any) -> None:
            function(*arguments, **options)
            die()

        return dying

    def before(*_: Any, **__: Any) -> None:
        die()

    def swapped(step: Step) -> None:
        if step is Step.SWAPPED:
            die()

    match point:
        case "claimed":  # the claim's transaction has ended by then
            capabilities.holding = before  # type: ignore[assignment]
        case "swapped":
            setattr(capabilities.Held, "on_conversion", lambda _, step: swapped(step))  # noqa: B010 - mypy
        case "converted":
            conversion.convert = after(conversion.convert)
        case "asked":
            dg.DagsterInstance.add_backfill = after(dg.DagsterInstance.add_backfill)  # type: ignore[method-assign]
        case "archived":
            setattr(capabilities, "archive_month", after(getattr(capabilities, "archive_month")))  # noqa: B009, B010 - mypy
        case "pruned":
            setattr(capabilities, "prune", after(getattr(capabilities, "prune")))  # noqa: B009, B010 - mypy
        case "finishing":
            episodes.finish = before
        case "finished":
            setattr(capabilities.Acted, "__init__", before)  # noqa: B010 - mypy
    with dg.DagsterInstance.get() as instance:
        build_defs().resolve_job_def(job).execute_in_process(
            instance=instance, run_config={"ops": {op: {"config": {"episode": episode}}}}
        )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
