"""A worker in a process of its own, which a test stops at a chosen moment.

`python -m tests.sync_pipeline.crash POINT NUMBER` runs one tick; at the NUMBER-th time it reaches POINT it prints
`reached` and waits for a line on standard input: killed there, it dies in the middle of its work; given the line, it
goes on, like a process that was paused.
"""

import sys
from collections.abc import Callable
from typing import Any

from sync_pipeline import event_store, leases, tick
from sync_pipeline.google_calendar import GoogleConnection
from sync_pipeline.services import open_services

POINTS: dict[str, tuple[Any, str]] = {
    "before_request": (GoogleConnection, "list_events"),
    "lease_held": (leases, "hold"),
    "page_written": (event_store, "write_page"),
    "generation_begun": (event_store, "begin_generation"),
    "completed_uncommitted": (event_store, "complete"),
}


def stop_at(point: str, number: int) -> None:
    owner, name = POINTS[point]
    original: Callable[..., object] = getattr(owner, name)
    reached = 0

    def stopping(*arguments: object, **options: object) -> object:
        nonlocal reached
        if point == "before_request":
            pause_if_due()
            return original(*arguments, **options)
        result = original(*arguments, **options)
        pause_if_due()
        return result

    def pause_if_due() -> None:
        nonlocal reached
        reached += 1
        if reached == number:
            sys.stdout.write("reached\n")
            sys.stdout.flush()
            sys.stdin.readline()

    setattr(owner, name, stopping)


def main() -> None:
    stop_at(sys.argv[1], int(sys.argv[2]))
    with open_services() as services:
        result = tick.run_tick(services, run_id=f"crash-{sys.argv[1]}")
    sys.stdout.write(" ".join(trouble.kind for failed in result.failed for trouble in failed.troubles) + "\n")


if __name__ == "__main__":
    main()
