"""One run of the sync: lease what is due, work on it in a bounded pool, stop in time, say what happened.

Belongs here: the pool, the time budget, the totals; the scheduled tick and the sync of chosen workspaces.
Does not: the work on one workspace, or anything of Dagster.
"""

import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime

from scaling.databases import Shard
from sync_pipeline import connections, leases, runs
from sync_pipeline.leases import Claim
from sync_pipeline.services import Services
from sync_pipeline.tally import Tally
from sync_pipeline.workspace_sync import WorkspaceResult, serve
from sync_pipeline.workspaces import Workspace

BUSY_WAIT_SECONDS = 0.05
BUSY_ATTEMPTS = 40
"""Others are claiming right now; claims take milliseconds, so after two seconds the work is theirs."""
HEARTBEAT_SECONDS = 5.0
WAIT_FOR_OTHERS_SECONDS = 60.0
WAIT_FOR_OTHERS_STEP_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class TickResult:
    """What one run did."""

    workspaces_due: int
    results: tuple[WorkspaceResult, ...]
    tally: Tally
    duration_seconds: float

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
        }


def run_tick(services: Services, *, run_id: str, shard: int = 0, of: int = 1) -> TickResult:
    """Sync what is due until nothing is, or the time budget is used up.

    Several ticks may run at once anywhere; leases keep them apart. So `shard` and `of` only name the run.

    Args:
        services: to work with.
        run_id: names the run in `sync.runs` and in leases.
        shard: which of the runs of this moment.
        of: how many there are.

    Returns:
        The totals and every workspace's result.

    Raises:
        UserError: the database cannot be reached.
    """
    started = services.clock()
    sources = []
    due = 0
    for database in services.router.shards():
        with database.transaction() as connection:
            connections.register(connection)
        with database.transaction() as connection:
            since = runs.now(connection)
            due += leases.count_due(connection, since=since)
        sources.append(_Source(database, since))
    book = services.router.shards()[0]
    with book.transaction() as connection:
        runs.start(connection, run_id=run_id, shard=shard, of=of, workspaces_due=due)
    pool = _Pool(services, run_id=run_id, deadline=started + services.time_budget_seconds, book=book)
    results = pool.drain(sources)
    result = _result(due, results, services.clock() - started)
    with book.transaction() as connection:
        runs.finish(connection, run_id, result.numbers())
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
    results: list[WorkspaceResult] = []
    for database in services.router.shards():
        with database.transaction() as connection:
            connections.register(connection)
            connections.give_another_chance(connection, workspaces)
            leases.make_due(connection, workspaces, full_resync=full_resync)
        with database.transaction() as connection:
            since = runs.now(connection)
        patience = services.clock() + WAIT_FOR_OTHERS_SECONDS
        while True:
            with database.transaction() as connection:
                claims = leases.take(connection, workspaces, owner=run_id, since=since)
                others = leases.leased_by_others(connection, workspaces, owner=run_id)
            with ThreadPoolExecutor(services.parallelism) as threads:
                results += threads.map(
                    lambda claim, since=since: serve(services, claim, owner=run_id, since=since, deadline=math.inf),
                    claims,
                )
            if not others or services.clock() > patience:
                break
            services.sleep(WAIT_FOR_OTHERS_STEP_SECONDS)
    return _result(len(workspaces), results, services.clock() - started)


def quantile(values: Sequence[float], fraction: float) -> float:
    """The smallest value that `fraction` of the values do not exceed; 0 without values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)] if ordered else 0.0


def _result(due: int, results: Sequence[WorkspaceResult], seconds: float) -> TickResult:
    tally = Tally()
    for result in results:
        tally.merge(result.tally)
    return TickResult(due, tuple(results), tally, seconds)


@dataclass(frozen=True, slots=True)
class _Source:
    shard: Shard
    since: datetime


class _Pool:
    """Threads that each take the next workspace as soon as they are free."""

    def __init__(self, services: Services, *, run_id: str, deadline: float, book: Shard) -> None:
        self._services = services
        self._run_id = run_id
        self._deadline = deadline
        self._book = book
        self._lock = threading.Lock()
        self._waiting: list[tuple[Claim, datetime]] = []
        self._results: list[WorkspaceResult] = []
        self._heartbeat_at = services.clock()

    def drain(self, sources: Sequence[_Source]) -> list[WorkspaceResult]:
        """Serve workspaces until none is due or the time is up; every one taken has a result."""
        left = list(sources)

        def work() -> None:
            while (taken := self._next(left)) is not None:
                claim, since = taken
                result = serve(self._services, claim, owner=self._run_id, since=since, deadline=self._deadline)
                with self._lock:
                    self._results.append(result)
                self._beat()

        with ThreadPoolExecutor(self._services.parallelism, thread_name_prefix="sync") as threads:
            for worker in [threads.submit(work) for _ in range(self._services.parallelism)]:
                worker.result()
        return self._results

    def _next(self, left: list[_Source]) -> tuple[Claim, datetime] | None:
        """Take the next workspace; claims are made for all threads at once, because finding what is due costs more."""
        with self._lock:
            if self._waiting:
                return self._waiting.pop(0)
            while left and not self._out_of_time():
                claims = self._claim(left[0])
                if claims:
                    self._waiting = [(claim, left[0].since) for claim in claims]
                    return self._waiting.pop(0)
                left.pop(0)
            return None

    def _claim(self, source: _Source) -> tuple[Claim, ...]:
        for _ in range(BUSY_ATTEMPTS):
            with source.shard.transaction() as connection:
                claims = leases.claim(
                    connection, owner=self._run_id, since=source.since, limit=self._services.parallelism
                )
            if claims is None:
                return ()
            if claims:
                return claims
            self._services.sleep(BUSY_WAIT_SECONDS)
        return ()

    def _out_of_time(self) -> bool:
        """True when a workspace as slow as the slowest percent would end after the budget."""
        p99 = quantile([result.seconds for result in self._results], 0.99)
        return self._services.clock() + p99 > self._deadline

    def _beat(self) -> None:
        with self._lock:
            now = self._services.clock()
            if now - self._heartbeat_at < HEARTBEAT_SECONDS:
                return
            self._heartbeat_at = now
        with self._book.transaction() as connection:
            runs.heartbeat(connection, self._run_id)
