"""A worker in a process of its own, which a test stops at a chosen moment.

`python -m tests.sync_pipeline.crash POINT NUMBER` runs one tick; at the NUMBER-th time it reaches POINT it prints
`reached` and waits for a line on standard input: killed there, it dies in the middle of its work; stopped and
continued later, it is a process that was paused past its lease. A third argument makes Google's pages that small.
"""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from devstack.processes import CHECKOUT
from sync_pipeline import event_store, google_calendar, leases, tick
from sync_pipeline.google_calendar import EVENT_PARAMETERS, GoogleConnection
from sync_pipeline.services import open_services

POINTS: dict[str, tuple[Any, str]] = {
    "before_request": (GoogleConnection, "list_events"),
    "lease_held": (leases, "hold"),
    "page_written": (event_store, "write_page"),
    "generation_begun": (event_store, "begin_generation"),
    "completed_uncommitted": (event_store, "complete"),
}


@contextmanager
def paused_worker(point: str, number: int, *, page_size: int | None = None) -> Iterator["subprocess.Popen[str]"]:
    """Run a tick in another process up to a point, where all its threads stand still; in the end it is killed."""
    command = [sys.executable, "-m", "tests.sync_pipeline.crash", point, str(number)]
    command += [] if page_size is None else [str(page_size)]
    with subprocess.Popen(
        command, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdout is not None
        line = worker.stdout.readline()
        if line != "reached\n":
            worker.kill()
            raise AssertionError(f"{line!r}: {worker.stderr.read() if worker.stderr else ''}")
        worker.send_signal(signal.SIGSTOP)  # its heartbeat too
        try:
            yield worker
        finally:
            worker.kill()


def resume(worker: "subprocess.Popen[str]") -> list[str]:
    """Let a paused worker go on to its end; the kinds of trouble it met."""
    worker.send_signal(signal.SIGCONT)
    out, _ = worker.communicate("\n")
    return out.split()


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
    if len(sys.argv) > 3:
        google_calendar.EVENT_PARAMETERS = {**EVENT_PARAMETERS, "maxResults": int(sys.argv[3])}  # type: ignore[misc]  # final
    with open_services() as services:
        result = tick.run_tick(services, run_id=f"crash-{sys.argv[1]}")
    sys.stdout.write(" ".join(trouble.kind for failed in result.failed for trouble in failed.troubles) + "\n")


if __name__ == "__main__":
    main()
