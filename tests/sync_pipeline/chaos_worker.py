"""Sync workers that die, freeze or are cut off at a chosen moment, forked from a process that is warm already.

`python -m tests.sync_pipeline.chaos_worker` reads one job a line and forks a child for each; starting Python would take
longer than the trial. What children do is told a line each: `exited`, `stopped`, and the child's own `result`.
"""

import contextlib
import json
import logging
import os
import random
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httplib2
import psycopg
from googleapiclient.discovery import build

from scaling import databases
from scaling.databases import Connection, Shard
from sync_pipeline import google_calendar, leases, tick
from sync_pipeline.services import open_services

PAGE_SIZE = 2
LEASE_SECONDS = 0.3
HEARTBEAT_SECONDS = 0.1
IDLE_IN_TRANSACTION_SECONDS = 0.5
LONGEST_SLEEP_SECONDS = 0.005
MOST_TROUBLES = 20
SERVICES: dict[str, Any] = {}
CHILDREN: set[int] = set()
POINTS = ("before_commit", "after_commit", "before_request", "after_request", "before_statement")


@dataclass(frozen=True, slots=True)
class Job:
    """One worker: the environment of its settings, how many ticks, and what befalls it where."""

    name: str
    environment: dict[str, str]
    ticks: int
    seed: int
    action: str | None = None
    """kill, stop, or terminate (its database session)."""
    point: str | None = None
    number: int = 0
    patient: bool = False
    """With the leases of production: nothing befalls it, so a slow machine must not make it lose them."""


class Fate:
    """Strikes once, the number-th time the worker reaches the point, in whichever thread that is."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._reached = 0
        self._lock = threading.Lock()

    def at(self, point: str) -> None:
        """Note that a point is reached."""
        if point != self._job.point:
            return
        with self._lock:
            self._reached += 1
            if self._reached != self._job.number:
                return
        if self._job.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self._job.action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.002)  # the signal may be delivered to another thread a moment later


def intercept(fate: Fate, job: Job) -> None:
    """Let the worker pass its fate at every commit, every request and every statement."""
    transaction, request, execute = Shard.transaction, httplib2.Http.request, psycopg.Cursor.execute

    @contextlib.contextmanager
    def watched(shard: Shard) -> Iterator[Connection]:
        with transaction(shard) as connection:
            yield connection
            fate.at("before_commit")
            if job.action == "terminate" and job.point == "before_commit":
                terminate_once(connection)
        fate.at("after_commit")

    terminated: list[int] = []

    def terminate_once(connection: Connection) -> None:
        terminated.append(1)
        if len(terminated) == job.number:
            with psycopg.connect(job.environment["CHAOS_ADMIN_DSN"], autocommit=True) as admin:
                admin.execute("SELECT pg_terminate_backend(%s, 1000)", [connection.info.backend_pid])

    def requesting(*arguments: Any, **options: Any) -> Any:
        fate.at("before_request")
        answer = request(*arguments, **options)
        fate.at("after_request")
        return answer

    def executing(*arguments: Any, **options: Any) -> Any:
        fate.at("before_statement")
        return execute(*arguments, **options)

    Shard.transaction = watched  # type: ignore[method-assign, assignment]
    httplib2.Http.request = requesting
    psycopg.Cursor.execute = executing  # type: ignore[method-assign]


def shorten() -> None:
    """Leases so short that a trial outlives them."""
    replace(leases, "LEASE_SECONDS", LEASE_SECONDS)
    replace(tick, "HEARTBEAT_SECONDS", HEARTBEAT_SECONDS)
    replace(databases, "IDLE_IN_TRANSACTION_SECONDS", IDLE_IN_TRANSACTION_SECONDS)


def build_once(*arguments: Any, client_options: dict[str, str], **options: Any) -> Any:
    """Build the client's service once, before forking: 60 ms of CPU for each worker otherwise."""
    address = client_options["api_endpoint"]
    if address not in SERVICES:
        SERVICES[address] = build(*arguments, client_options=client_options, **options)
    return SERVICES[address]


def replace(module: object, name: str, value: object) -> None:
    getattr(module, name)  # a constant that was renamed must not go unnoticed
    setattr(module, name, value)


def work(job: Job) -> None:
    """Tick; an error that ends a run is what Dagster would report, the next tick comes all the same."""
    os.environ.update(job.environment)
    if not job.patient:
        shorten()
    intercept(Fate(job), job)
    numbers: list[dict[str, float]] = []
    troubles: list[str] = []
    while len(numbers) < job.ticks and len(troubles) < MOST_TROUBLES:
        try:
            with open_services(rng=random.Random(job.seed), sleep=nap) as services:
                while len(numbers) < job.ticks:
                    result = tick.run_tick(services, run_id=f"{job.name}-{len(numbers)}-{len(troubles)}")
                    numbers.append(dict(result.numbers()))
                    troubles += [trouble.kind for failed in result.failed for trouble in failed.troubles]
        except Exception as error:
            troubles.append(type(error).__name__)
    tell("result", os.getpid(), numbers=numbers, troubles=troubles)


def nap(seconds: float) -> None:
    time.sleep(min(seconds, LONGEST_SLEEP_SECONDS))


def tell(what: str, pid: int, **more: object) -> None:
    """Write one line at once; lines shorter than a pipe's buffer never mix."""
    os.write(1, (json.dumps({"event": what, "pid": pid, **more}) + "\n").encode())


def serve() -> None:
    """Fork a child per line until standard input ends."""
    logging.getLogger("sync_pipeline").setLevel(logging.CRITICAL)
    logging.getLogger("psycopg.pool").setLevel(logging.CRITICAL)
    # Small pages, so that few events make many.
    replace(google_calendar, "EVENT_PARAMETERS", {**google_calendar.EVENT_PARAMETERS, "maxResults": PAGE_SIZE})
    replace(google_calendar, "build", build_once)
    wake, waker = os.pipe()
    for end in (wake, waker):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker)
    lines = b""
    while True:
        ready, _, _ = select.select([0, wake], [], [])
        if wake in ready:
            os.read(wake, 4096)
            report_children()
        if 0 in ready:
            chunk = os.read(0, 65536)
            if not chunk:
                for pid in CHILDREN:
                    os.kill(pid, signal.SIGKILL)
                return
            *complete, lines = (lines + chunk).split(b"\n")
            for line in complete:
                job = Job(**json.loads(line))
                warm(job)
                pid = os.fork()
                if pid == 0:
                    child(job)
                CHILDREN.add(pid)
                tell("started", pid)


def warm(job: Job) -> None:
    """Build what every child would."""
    if not SERVICES:
        os.environ.update(job.environment)
        with open_services():
            pass


def child(job: Job) -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    ending: Callable[[int], None] = os._exit
    try:
        work(job)
    except BaseException as error:
        tell("result", os.getpid(), numbers=[], troubles=[f"{type(error).__name__}: {error}"])
        ending(1)
    ending(0)


def report_children() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if os.WIFSTOPPED(status):
            tell("stopped", pid)
        else:
            CHILDREN.discard(pid)
            tell("exited", pid, status=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    if sys.stdin.isatty():
        raise SystemExit("This is a part of tests/sync_pipeline/chaos.py.")
    serve()
