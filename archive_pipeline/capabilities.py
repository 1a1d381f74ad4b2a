"""What episodes of the audit logs do to the table: convert it and name what is to be archived, or archive and prune.

Belongs here: holding an episode while long work goes on, the work of both capabilities, and the months it is about.
Does not: when an episode arises (`scaling.episodes`), how a table is converted, archived or pruned, or Dagster.

The work outlives its lease many times, so a thread extends it; whoever finds it lost stops before the next step. Where
everybody waits for a lock nothing is asked of the database: there the time of the last extension decides. All work may
be done again from its beginning: a converted table stays as it is, an archived month is verified.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psycopg
from psycopg import sql

from archive_pipeline import conversion, turns
from archive_pipeline.archive import MonthReport, archive_month
from archive_pipeline.conversion import Conversion, Report, Step
from archive_pipeline.conversion_plan import Plan
from archive_pipeline.months import Month
from archive_pipeline.premade_months import database_now
from archive_pipeline.prunable import Policy, months_between, oldest_kept
from archive_pipeline.prune import Candidate, Outcome, Pruned, examine
from archive_pipeline.prune import run as prune
from archive_pipeline.publication import Target
from archive_pipeline.snapshot import SourceTable
from scaling import episodes
from scaling.capabilities import Capability
from scaling.databases import Connection, Shard
from scaling.episodes import Claim, ClaimLostError, Episode
from scaling.errors import UserError
from scaling.logs import Event, event

logger = logging.getLogger(__name__)

LEASE = timedelta(minutes=5)
"""A run that is silent for so long is dead; a third of it passes between two signs of life."""

WHILE_ALL_WAIT = (Step.LOCKED, Step.SWAPPED)

ARCHIVED = """
SELECT to_char(month, 'YYYY-MM') FROM archive.months
WHERE source_table = %s AND shard = %s AND manifest_key IS NOT NULL
"""


class Held:
    """A claimed episode while its work goes on; made by `holding`."""

    def __init__(self, shard: Shard, claimed: Claim, lease: timedelta, until: float) -> None:
        self.claimed = claimed
        self._shard = shard
        self._lease = lease
        self._until = until
        self._lost = False

    def confirm(self) -> None:
        """Extend the lease; asked before every step that others would see.

        Raises:
            ClaimLostError: somebody else has the episode; stop.
        """
        asked = time.monotonic()
        if not self._lost:
            with self._shard.transaction() as connection:
                self._lost = not episodes.extend(connection, self.claimed, self._lease)
        if self._lost:
            raise self._error()
        self._until = asked + self._lease.total_seconds()

    def require_fresh(self) -> None:
        """Require that the lease has not run out by this process's clock; the database is not asked.

        Raises:
            ClaimLostError: it may be somebody else's; stop.
        """
        if self._lost or time.monotonic() >= self._until:
            raise self._error()

    def on_conversion(self, step: Step) -> None:
        """Stop a conversion whose episode is lost.

        Args:
            step: that was reached.

        Raises:
            ClaimLostError: it is lost.
        """
        if step in WHILE_ALL_WAIT:
            self.require_fresh()
        else:
            self.confirm()

    def _error(self) -> ClaimLostError:
        episode = self.claimed.episode
        return ClaimLostError(f"episode {episode.id} ({episode.rule}) is no longer claimed by run {episode.run_id}")


@dataclass(frozen=True, slots=True)
class Acted:
    """How a run fared with an episode.

    Attributes:
        episode: as it was before the run claimed it.
        outcome: what was done; None when the run had nothing to do.
        lost: the episode was given to another run meanwhile.
    """

    episode: Episode
    outcome: Mapping[str, Any] | None = None
    lost: bool = False


@dataclass(frozen=True, slots=True)
class Closed:
    """Closed months that are not archived.

    Attributes:
        months: oldest first.
        before: rows earlier than the first month that is archived at all, in a sentence; empty when there are none.
    """

    months: tuple[Month, ...]
    before: str = ""


@dataclass(frozen=True, slots=True)
class Retention:
    """What became of the months past retention.

    Attributes:
        archived: what became of each that had rows.
        failed: reasons, by month.
        pruned: partitions that were taken up.
        candidates: the partitions now; empty where nothing is pruned.
    """

    archived: Mapping[Month, Sequence[MonthReport]]
    failed: Mapping[Month, str]
    pruned: Sequence[Pruned]
    candidates: Sequence[Candidate]


def act(
    shard: Shard,
    capability: Capability,
    episode_id: int,
    run_id: str,
    work: Callable[[Held], Mapping[str, Any]],
    *,
    lease: timedelta = LEASE,
) -> Acted:
    """Claim an episode, do its work, and record how it went.

    Args:
        shard: the first, where the episodes are.
        capability: whose episode it must be.
        episode_id: of which episode.
        run_id: who acts.
        work: gives the outcome, JSON values only; an error is a failed attempt.
        lease: how long the run may be silent.

    Raises:
        UserError: there is no such episode, or it is another capability's; or the work failed so.
    """
    with shard.transaction() as connection:
        asked = episodes.get(connection, episode_id)
        if asked.capability is not capability:
            raise UserError(
                f"episode {episode_id} ({asked.rule}) is not about {capability}; launch the job of its capability"
            )
    since = time.monotonic()
    with shard.transaction() as connection:
        claimed = episodes.claim(connection, episode_id, run_id, lease)
    if claimed is None:
        return Acted(asked)
    try:
        with holding(shard, claimed, lease, since=since) as held:
            outcome = work(held)
            with shard.transaction() as connection:
                episodes.finish(connection, claimed, outcome)
    except ClaimLostError as error:
        logger.warning("%s", error, extra=event(Event.CLAIM_LOST, episode=asked.id))
        return Acted(asked, lost=True)
    except BaseException as error:
        _fail(shard, claimed, error)
        raise
    return Acted(asked, outcome)


@contextmanager
def holding(shard: Shard, claimed: Claim, lease: timedelta, *, since: float) -> Iterator[Held]:
    """Extend a claim's lease beside the work for as long as the block runs.

    Args:
        shard: the first.
        claimed: of this run.
        lease: how long the run may be silent.
        since: when the claim was asked for, by `time.monotonic`.
    """
    held = Held(shard, claimed, lease, since + lease.total_seconds())
    over = threading.Event()

    def beat() -> None:
        while not over.wait(lease.total_seconds() / 3):
            try:
                held.confirm()
            except ClaimLostError:
                return
            except (UserError, psycopg.Error) as error:  # the next beat may reach it; else the lease runs out
                logger.warning(
                    "the lease of episode %s was not extended: %s",
                    claimed.episode.id,
                    type(error).__name__,
                    extra=event(Event.LEASE_NOT_EXTENDED, episode=claimed.episode.id),
                )

    thread = threading.Thread(target=beat, name=f"episode-{claimed.episode.id}", daemon=True)
    thread.start()
    try:
        yield held
    finally:
        over.set()
        thread.join()


def convert_all(
    shards: Sequence[Shard], wanted: Conversion, held: Held, *, on_step: Callable[[Step], None] = lambda _: None
) -> tuple[list[Plan], list[Report]]:
    """Convert the table of every database; a converted one is left as it is.

    Args:
        shards: all databases.
        wanted: which table, and to what.
        held: the episode.
        on_step: hears of each step.

    Returns:
        The plans as they were before, and what was done.

    Raises:
        ConversionRefusedError: something is in the way; nothing was changed.
        ConversionError: the table is as it was; also when another run is at it.
        ClaimLostError: the episode is another run's by now.
    """

    def reached(step: Step) -> None:
        held.on_conversion(step)
        on_step(step)

    plans = [conversion.plan(shard, wanted) for shard in shards]
    held.confirm()
    return plans, [conversion.convert(shard, wanted, on_step=reached) for shard in shards]


def closed_months(shards: Sequence[Shard], table: SourceTable, first: Month, grace: timedelta) -> Closed:
    """Which closed months are to be archived, from the first with rows on.

    Args:
        shards: all databases.
        table: the source.
        first: month that is archived at all (ARCHIVE_FIRST_MONTH), in the archive's zone.
        grace: how long after its end a month is closed, by the database's clock.

    Raises:
        UserError: a database does not answer.
    """
    missing: set[Month] = set()
    before = ""
    for shard in shards:
        with _reading(shard) as connection:
            oldest = _oldest(connection, table, first.zone)
            if oldest is None:
                continue
            now = database_now(connection)
            done = {name for (name,) in connection.execute(ARCHIVED, (str(table), shard.name))}
        if oldest < first:
            before = f"rows before {first.name} are not archived; set ARCHIVE_FIRST_MONTH to {oldest.name} to have them"
        covered = months_between(max(oldest, first).start, now - grace, first.zone)
        missing |= {month for month in covered if month.end + grace <= now and month.name not in done}
    return Closed(tuple(sorted(missing)), before)


def months_past_retention(shard: Shard, table: SourceTable, policy: Policy, grace: timedelta) -> list[Month]:
    """Months past retention of which Postgres holds rows, oldest first.

    Args:
        shard: the database.
        table: the source.
        policy: how many closed months stay.
        grace: how long after its end a month is closed.
    """
    query = sql.SQL("SELECT EXISTS (SELECT FROM {} WHERE created_at >= %s AND created_at < %s)").format(
        table.identifier
    )
    with _reading(shard) as connection:
        oldest = _oldest(connection, table, policy.zone)
        end = oldest_kept(database_now(connection), policy, grace)
        if oldest is None or not oldest < end:
            return []
        return [
            month
            for month in months_between(oldest.start, end.start, policy.zone)
            if connection.execute(query, (month.start, month.end)).fetchone() == (True,)
        ]


def archive_and_prune(
    shards: Sequence[Shard],
    target: Target,
    policy: Policy,
    held: Held,
    *,
    on_month: Callable[[Month], None] = lambda _: None,
) -> Retention:
    """Archive what is past retention and still in Postgres, with rows that came late, then prune as the policy says.

    An archived month is compared row for row with what Postgres holds; nothing of it is written twice. A month that
    fails keeps its partition and hinders no other.

    Args:
        shards: all databases.
        target: what is archived, and where it goes.
        policy: ``off`` drops nothing, ``propose`` records proposals and drops what was approved, ``auto`` drops.
        held: the episode.
        on_month: hears of each month that is archived or verified.

    Raises:
        UserError: a database or the bucket cannot be reached, or the table is plain.
        ClaimLostError: the episode is another run's by now.
    """
    archived: dict[Month, list[MonthReport]] = {}
    failed: dict[Month, str] = {}
    for shard in shards:
        for month in months_past_retention(shard, target.table, policy, target.grace):
            held.confirm()
            try:
                with turns.exporting(shard, target.table):
                    report = archive_month(shard, target, month, on_step=lambda _: held.require_fresh())
            except UserError as error:
                failed[month] = str(error)
                continue
            archived.setdefault(month, []).append(report)
            if unsound := _unsound(report):
                failed[month] = unsound
            on_month(month)
    pruned: list[Pruned] = []
    candidates: list[Candidate] = []
    for shard in shards if policy.mode != "off" else ():
        held.confirm()
        with turns.pruning(shard, target.table):
            held.confirm()  # a turn may have been long in coming
            pruned += prune(shard, target, policy, on_step=lambda _: held.require_fresh())
        candidates += examine(shard, target, policy)
    return Retention(archived, failed, pruned, candidates)


def retention_outcome(done: Retention, policy: Policy) -> dict[str, Any]:
    """What an episode of retention keeps of its action; with a sentence on what is left to do.

    Args:
        done: by the action.
        policy: that it went by.

    Raises:
        UserError: a month was not archived or a partition refused; everything else is done.
    """
    unwell = [each for each in done.pruned if each.outcome is not Outcome.DROPPED]
    if done.failed or unwell:
        raise UserError(
            "; ".join(
                [
                    *(f"month {month.name}: {reason}" for month, reason in done.failed.items()),
                    *(f"{each.partition} was {each.outcome}: {each.reason}" for each in unwell),
                ]
            )
        )
    dropped = [each.partition for each in done.pruned]
    waiting = [str(each.partition) for each in done.candidates if not each.reason and each.state == "proposed"]
    match policy.mode:
        case "off":
            said = "nothing is dropped: ARCHIVE_PRUNE is off; set it to propose or auto to free the space"
        case "propose" if waiting:
            said = f"{len(waiting)} partition(s) wait for approval: job approve_prune, with dry_run: false"
        case _:
            said = f"{len(dropped)} partition(s) dropped"
    by_outcome: dict[str, list[str]] = {}
    for month, reports in done.archived.items():
        for outcome in sorted({str(report.outcome) for report in reports}):
            by_outcome.setdefault(outcome, []).append(month.name)
    return {
        "said": said,
        "prune": policy.mode,
        "months": by_outcome,
        "dropped": dropped,
        "rows_dropped": sum(each.rows for each in done.pruned),
        "bytes_freed": sum(each.bytes for each in done.pruned),
        "waiting_for_approval": waiting,
    }


@contextmanager
def _reading(shard: Shard) -> Iterator[Connection]:
    with shard.transaction() as connection:
        connection.execute("SET TRANSACTION READ ONLY")
        connection.execute("SET LOCAL row_security = off")  # Postgres then refuses instead of filtering rows away
        yield connection


def _oldest(connection: Connection, table: SourceTable, zone: str) -> Month | None:
    query = sql.SQL("SELECT min(created_at) FROM {} WHERE isfinite(created_at)").format(table.identifier)
    (oldest,) = connection.execute(query).fetchone() or (None,)
    return None if oldest is None else Month.containing(oldest, zone)


def _unsound(report: MonthReport) -> str:
    """What somebody has to look at, although the month is archived."""
    if report.damaged:
        return f"{len(report.damaged)} archived object(s) are missing or altered; materialize audit_log_archive of it"
    if report.changed_rows:
        return f"{report.changed_rows:,} row(s) were changed in Postgres after they were archived"
    return ""


def _fail(shard: Shard, claimed: Claim, error: BaseException) -> None:
    said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}, which nobody foresaw; see its run"
    try:
        with shard.transaction() as connection:
            episodes.fail(connection, claimed, said)
    except (UserError, psycopg.Error):  # its lease runs out, and it counts as failed then
        logger.exception(
            "the failure of episode %s was not recorded",
            claimed.episode.id,
            extra=event(Event.FAILURE_UNRECORDED, episode=claimed.episode.id),
        )
