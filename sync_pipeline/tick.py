"""One run of the sync: lease what is due, work on it in a bounded pool, stop in time, say what happened.

Belongs here: the pool, the time budget, the totals; the scheduled tick and the sync of chosen workspaces.
Does not: the work on one workspace, or anything of Dagster.
"""

import logging
import math
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from types import TracebackType
from typing import Self
from uuid import UUID

import psycopg

from scaling import tracing
from scaling.databases import Connection, Shard
from scaling.errors import UserError
from scaling.logs import Event, event
from sync_pipeline import connections, health, leases, runs
from sync_pipeline.cadence import FleetRates, read_fleet
from sync_pipeline.call_buckets import fit_plans, reserve_users
from sync_pipeline.errors import DailyBudgetError
from sync_pipeline.rotation import Rotation
from sync_pipeline.services import Services
from sync_pipeline.tally import Tally
from sync_pipeline.workspace_sync import Assignment, Reserved, WorkspaceResult, serve, unreadable
from sync_pipeline.workspaces import Workspace

log = logging.getLogger("sync_pipeline")

BUSY_WAIT_SECONDS = 0.05
BUSY_ATTEMPTS = 40
"""Others are claiming right now; claims take milliseconds, so after two seconds the work is theirs."""
HEARTBEAT_SECONDS = 20.0
"""A lease lasts 90 s, so that three heartbeats in a row may fail."""
WATCH_STEP_SECONDS = 1.0
WAIT_FOR_OTHERS_SECONDS = 60.0
WAIT_FOR_OTHERS_STEP_SECONDS = 0.5
DURATIONS_REMEMBERED = 200
SEQUENTIAL_WORKSPACES = 5
"""Workspaces a tick serves without the pool: what the SaaS's own cron does every two minutes (at most five jobs, in a
`for` loop)."""


@dataclass(frozen=True, slots=True)
class TickResult:
    """What one run did."""

    workspaces_due: int
    results: tuple[WorkspaceResult, ...]
    tally: Tally
    duration_seconds: float
    waited_seconds: float = 0.0

    @property
    def failed(self) -> tuple[WorkspaceResult, ...]:
        """Workspaces in which anything went wrong."""
        return tuple(result for result in self.results if result.troubles)

    @property
    def everything_failed(self) -> bool:
        """Work was tried and nothing at all succeeded: a bad client secret, or Google is down."""
        return bool(self.failed) and self.tally.calendars_synced == 0 and len(self.failed) == len(self.results)

    @property
    def p95_seconds(self) -> float:
        """95th percentile of the time a workspace took."""
        return quantile([result.seconds for result in self.results], 0.95)

    def numbers(self) -> dict[str, int | float]:
        """The totals by name, as `sync.runs` has them."""
        return {
            **self.tally.numbers(),
            "workspaces_due": self.workspaces_due,
            "workspaces_served": len(self.results),
            "workspaces_failed": len(self.failed),
            "p95_seconds": round(self.p95_seconds, 4),
            "duration_seconds": round(self.duration_seconds, 4),
            "waited_seconds": round(self.waited_seconds, 4),
        }


def run_tick(services: Services, *, run_id: str, shard: int = 0, of: int = 1, watch_seconds: float = 0.0) -> TickResult:
    """Sync what is due until nothing is, or the time budget is used up.

    Several ticks may run at once anywhere; leases keep them apart. So `shard` and `of` only name the run.

    Without the pool of workers (`Services.in_force`) the first run of a moment serves `SEQUENTIAL_WORKSPACES`, tenants
    least recently served first, one after the other, and further runs of that moment none. Without incremental sync
    everything is due at a fixed interval, and there is no watch.

    Args:
        services: to work with.
        run_id: names the run in `sync.runs` and in leases.
        shard: which of the runs of this moment.
        of: how many there are.
        watch_seconds: until this long after its start, the run also takes what becomes due meanwhile. With push, a
            change is read within seconds this way although ticks come minutes apart.

    Returns:
        The totals and every workspace's result; the duration is that of the work, without the watch.

    Raises:
        UserError: the database cannot be reached.
    """
    started = services.clock()
    in_force = services.in_force
    services = _tuned(services)
    for database in services.router.shards():
        with database.transaction() as connection:
            connections.register(connection)
            if not in_force.incremental:
                leases.bring_forward(
                    connection,
                    poll_seconds=services.cadence.longest_poll_seconds,
                    list_seconds=services.cadence.longest_list_seconds,
                )
    watch_seconds = watch_seconds if in_force.incremental else 0.0
    at_most = None if in_force.parallel else SEQUENTIAL_WORKSPACES if shard == 0 else 0
    book = services.router.shards()[0]
    due = _find_due(services)
    with book.transaction() as connection:
        runs.start(
            connection,
            run_id=run_id,
            shard=shard,
            of=of,
            workspaces_due=len(due),
            incremental=in_force.incremental,
            parallel=in_force.parallel,
        )
    waited_before = services.quota.waited_seconds if services.quota else 0.0
    deadline = started + services.time_budget_seconds
    with _Pool(services, run_id=run_id, deadline=deadline, book=book, at_most=at_most) as pool:
        pool.drain(due)
        worked = services.clock() - started
        found = len(due)
        while services.clock() + WATCH_STEP_SECONDS < started + watch_seconds and not (pool.halted or pool.is_full):
            services.sleep(WATCH_STEP_SECONDS)
            due = _find_due(services)
            pool.drain(due)
            found += len(due)
    waited = services.quota.waited_seconds - waited_before if services.quota else 0.0
    result = _result(found, pool.results, worked, waited)
    with book.transaction() as connection:
        runs.finish(connection, run_id, result.numbers())
        runs.count_freshness(connection, result.tally.freshness)
    tracing.counted(result.numbers())
    return result


def sync_now(
    services: Services, workspaces: Sequence[Workspace], *, run_id: str, full_resync: bool = False
) -> TickResult:
    """Sync chosen workspaces at once, whether anything is due in them or not.

    A grant that was refused is tried once more. Calendars another run is working on are waited for.

    Args:
        services: to work with.
        workspaces: which.
        run_id: names the run in leases.
        full_resync: read every calendar completely.

    Returns:
        One result per workspace in which there was anything to do.

    Raises:
        UserError: the database cannot be reached.
    """
    started = services.clock()
    chosen: dict[Workspace, _Source] = {}
    for database in services.router.shards():
        with database.transaction() as connection:
            connections.register(connection)
            connections.give_another_chance(connection, workspaces)
            leases.make_due(connection, workspaces, full_resync=full_resync)
        with database.transaction() as connection:
            source = _Source(database, runs.now(connection))
            # With several databases each knows its own workspaces only.
            chosen.update(dict.fromkeys(connections.known(connection, workspaces), source))
    book = services.router.shards()[0]
    with _Pool(_tuned(services), run_id=run_id, deadline=math.inf, book=book) as pool:
        patience = services.clock() + WAIT_FOR_OTHERS_SECONDS
        while True:
            busy = pool.drain(chosen)
            others = 0
            for database in services.router.shards():
                with database.transaction() as connection:
                    others += leases.leased_by_others(connection, workspaces, owner=run_id)
            if not (busy or others) or services.clock() > patience:
                break
            services.sleep(WAIT_FOR_OTHERS_STEP_SECONDS)
    result = _result(len(workspaces), pool.results, services.clock() - started, 0.0)
    with book.transaction() as connection:
        runs.count_freshness(connection, result.tally.freshness)
    tracing.counted(result.numbers())
    return result


def quantile(values: Sequence[float], fraction: float) -> float:
    """The smallest value that `fraction` of the values do not exceed; 0 without values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)] if ordered else 0.0


def _result(due: int, results: Sequence[WorkspaceResult], seconds: float, waited: float) -> TickResult:
    tally = Tally()
    for result in results:
        tally.merge(result.tally)
    return TickResult(due, tuple(results), tally, seconds, waited)


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a workspace's rows are, and what "due" means there: at this moment of that database's clock."""

    shard: Shard
    since: datetime


def _tuned(services: Services) -> Services:
    """Take out what is not in force, and tune the cadence to how often the calendars change now."""
    services = services.as_in_force()
    fleets = []
    for database in services.router.shards():
        with database.transaction() as connection:
            fleets.append(read_fleet(connection))
    return replace(services, cadence=services.cadence.for_fleet(FleetRates.together(fleets)))


def _find_due(services: Services) -> "dict[Workspace, _Source]":
    due: dict[Workspace, _Source] = {}
    for database in services.router.shards():
        with database.transaction() as connection:
            source = _Source(database, runs.now(connection))
            due.update(dict.fromkeys(leases.find_due(connection, since=source.since), source))
    return due


class _Pool:
    """Threads that each take the next workspace as soon as they are free, and a heartbeat for their leases.

    There are half as many more of them as calls may be under way, so that some write while others wait for Google.
    """

    def __init__(
        self, services: Services, *, run_id: str, deadline: float, book: Shard, at_most: int | None = None
    ) -> None:
        self._services = services
        self._left = math.inf if at_most is None else at_most
        self._run_id = run_id
        self._deadline = deadline
        self._book = book
        self._condition = threading.Condition()
        self._ready: deque[tuple[Assignment, _Source]] = deque()
        self._rotation = Rotation((), tenant_limit=services.tenant_parallelism)
        self._due: Mapping[Workspace, _Source] = {}
        self._refused: Counter[Workspace] = Counter()
        self._durations: deque[float] = deque(maxlen=DURATIONS_REMEMBERED)
        self._workers = services.parallelism + services.parallelism // 2
        self._threads = ThreadPoolExecutor(self._workers, thread_name_prefix="sync")
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="sync-heartbeat", daemon=True)
        self.results: list[WorkspaceResult] = []
        self.halted = False
        """The daily budget of calls is used up: nothing more can be done today."""

    @property
    def is_full(self) -> bool:
        """As many workspaces were taken as this run may take."""
        return self._left <= 0

    def __enter__(self) -> Self:
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._threads.shutdown()
        self._heart.join()

    def drain(self, due: Mapping[Workspace, _Source]) -> list[Workspace]:
        """Serve workspaces until none is left or the time is up; every one taken has a result.

        Args:
            due: whose turn it is first comes first.

        Returns:
            Those that other runs kept busy all the time.
        """
        self._due = due
        self._refused.clear()
        self._rotation = Rotation(due, tenant_limit=self._services.tenant_parallelism)
        work = tracing.carried(self._work)
        workers = [self._threads.submit(work) for _ in range(min(self._workers, len(due)))]
        for worker in workers:
            worker.result()
        return [workspace for workspace, attempts in self._refused.items() if attempts >= BUSY_ATTEMPTS]

    def _work(self) -> None:
        while (taken := self._next()) is not None:
            assignment, source = taken
            workspace = assignment.claim.workspace
            try:
                result = serve(
                    self._services, assignment, owner=self._run_id, since=source.since, deadline=self._deadline
                )
                with self._condition:
                    self.results.append(result)
                    self._durations.append(result.seconds)
                    self.halted = self.halted or any(t.kind == DailyBudgetError.kind for t in result.deferrals)
            finally:
                with self._condition:
                    self._rotation.done(workspace)
                    self._condition.notify_all()

    def _next(self) -> tuple[Assignment, _Source] | None:
        """Take the next workspace; claims are made for several threads at once, because that costs a fraction."""
        with self._condition:
            while True:
                if self._ready:
                    return self._ready.popleft()
                if self.halted or self.is_full or self._out_of_time():
                    self._rotation.clear()
                if not self._rotation:
                    return None
                chosen = self._rotation.take(int(min(self._services.parallelism, self._left)))
                if not chosen:  # every tenant that waits has its share in work
                    self._condition.wait()
                elif not self._claim(chosen):
                    self._condition.wait(BUSY_WAIT_SECONDS)

    def _claim(self, chosen: Sequence[Workspace]) -> bool:
        """Lease workspaces and get them ready; False when all of them are busy elsewhere."""
        claimed: set[Workspace] = set()
        busy: list[Workspace] = []
        try:
            for source in dict.fromkeys(self._due[workspace] for workspace in chosen):
                here = [workspace for workspace in chosen if self._due[workspace] is source]
                assignments, elsewhere = self._take(source, here)
                self._ready += [(assignment, source) for assignment in assignments]
                claimed |= {assignment.claim.workspace for assignment in assignments}
                self._left -= len(assignments)
                busy += elsewhere
        finally:
            for workspace in chosen:
                if workspace not in claimed:
                    self._rotation.done(workspace)
        for workspace in busy:
            self._refused[workspace] += 1
            if self._refused[workspace] < BUSY_ATTEMPTS:
                self._rotation.put_back(workspace)
        return len(busy) < len(chosen)

    def _take(self, source: _Source, workspaces: Sequence[Workspace]) -> tuple[list[Assignment], list[Workspace]]:
        """Lease workspaces of one database; one whose rows cannot be read is set aside, and told, by itself.

        One unreadable row froze a whole fleet for 23 hours elsewhere (compass issue 2527).
        """
        services = self._services
        try:
            with source.shard.transaction() as connection:
                taken = leases.claim(
                    connection,
                    workspaces,
                    owner=self._run_id,
                    since=source.since,
                    tenant_limit=services.tenant_parallelism,
                    push=services.push_terms,
                )
                return _assign(connection, services, taken.claims), list(taken.busy)
        except (psycopg.DataError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            if len(workspaces) > 1:
                parts = [self._take(source, [workspace]) for workspace in workspaces]
                return [one for taken, _ in parts for one in taken], [one for _, busy in parts for one in busy]
            (workspace,) = workspaces
            self.results.append(unreadable(workspace, error))
            with source.shard.transaction() as connection:
                health.set_aside(connection, workspace)
            return [], []

    def _out_of_time(self) -> bool:
        """True when a workspace as slow as the slowest percent would end after the budget."""
        return self._services.clock() + quantile(self._durations, 0.99) > self._deadline

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            try:
                with self._book.transaction() as connection:
                    runs.heartbeat(connection, self._run_id)
                for shard in self._services.router.shards():
                    with shard.transaction() as connection:
                        leases.renew_all(connection, owner=self._run_id)
            except (UserError, psycopg.Error) as error:  # the leases outlive a few missed beats
                log.warning(
                    "heartbeat of the run missed: %s", type(error).__name__, extra=event(Event.HEARTBEAT_MISSED)
                )


def _assign(connection: Connection, services: Services, claims: Sequence[leases.Claim]) -> list[Assignment]:
    """Add to each claim the grants it is worked with, and the calls their users' quotas allow."""
    grants = connections.load_grants(connection, [claim.workspace for claim in claims])
    if services.quota is None:
        return [Assignment(claim, grants[claim.workspace], {}) for claim in claims]
    plans: Sequence[Mapping[bytes, int]] = [Counter(_accounts(claim, grants[claim.workspace])) for claim in claims]
    plans = fit_plans(plans, services.quota.limits)
    planned: Counter[bytes] = Counter()
    for plan in plans:
        planned.update(plan)
    waits = reserve_users(connection, planned, services.quota.limits)
    now = services.clock()
    return [
        Assignment(
            claim,
            grants[claim.workspace],
            {account: Reserved(calls, waits[account], now) for account, calls in plan.items() if account in waits},
        )
        for claim, plan in zip(claims, plans, strict=True)
    ]


def _accounts(claim: leases.Claim, grants: Mapping[UUID, connections.StoredGrant]) -> Iterator[bytes]:
    """The Google account of each call that is planned: one for every list and every calendar."""
    for connection_id in (
        *(lease.connection_id for lease in claim.lists),
        *(lease.connection_id for lease in claim.calendars),
    ):
        if connection_id in grants:
            yield grants[connection_id].account_key
