"""Drop archived months from Postgres, without ever losing a row.

Belongs here: the order of the steps, what is compared, what a dead run leaves behind, and
``python -m archive_pipeline.prune status|propose|approve|run``. Does not: deciding which partitions may go
(`archive_pipeline.prunable`), the owner's statements (`archive_pipeline.detaching`), or archiving the rows that come in
between (`archive_pipeline.archive`).

::

    finish what a dead run left -> the month is archived, sound in the bucket, past retention, not on hold, approved
        -> Postgres holds what the archive holds            (rows that came late are archived first)
        -> DETACH CONCURRENTLY                              (lease confirmed; readers and writers of the table go on)
        -> an empty partition of the same range in its place, for late rows
        -> rows that came before the detach are archived as a further part
        -> foreign keys dropped one by one                  (a DROP with them locks the referenced tables)
        -> one transaction: LOCK, digest again, every object asked for again, lease confirmed, DROP

The catalog shows how far a run came, so it may die anywhere. ``archive.prunes`` says which table was meant, by its oid:
one that was made later under its name is another one.

Every row of the partition must be in the archive with the same content, and every row of the archive must be in
Postgres, but for those that earlier prunes account for. So a row that was changed or deleted in Postgres keeps its
partition there until somebody has looked at it. The archive may hold fewer rows than earlier prunes dropped, because
they were erased from it since; but a row that was erased from the archive must be gone from Postgres too, or it is a
late one. A partition that is refused after its detach is put back, unless late rows came to the one in its place; then
it stays beside the table, whole and archived, and the reason says so.
"""

import argparse
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum

import psycopg
from psycopg import sql

from archive_pipeline import turns
from archive_pipeline.archive import MonthReport, archive_month
from archive_pipeline.columns import discover
from archive_pipeline.detaching import Detaching, Patience
from archive_pipeline.digest import Digest
from archive_pipeline.errors import FencedError, MonthBusyError
from archive_pipeline.ledger import Lease, lease
from archive_pipeline.legal_holds import holds
from archive_pipeline.months import MONTH, Month
from archive_pipeline.premade_months import MonthPartition, database_now
from archive_pipeline.prunable import MonthFacts, PartitionFacts, Policy, months_between, oldest_kept, why_not
from archive_pipeline.prune_ledger import Compared, Prune, Prunes
from archive_pipeline.publication import Target
from archive_pipeline.snapshot import SourceTable, digest_of
from archive_pipeline.soundness import Soundness
from scaling import tracing
from scaling.databases import DatabaseRouter, Shard
from scaling.errors import UserError, run_command
from scaling.logs import Event, event
from scaling.settings import ArchiveSettings, DatabaseSettings, load

logger = logging.getLogger(__name__)

# Rows may come to the partition while it is archived a last time; then it is archived again, so many times in one run.
LOOKS = 3

NO_ROWS = Digest()

LOCK = "SELECT pg_try_advisory_lock(hashtextextended(%s, 0))"


class Step(StrEnum):
    """How far a partition has come on its way out."""

    MATCHED = "rows match the archive"
    DETACHING = "detach recorded"
    DETACHED = "partition detached"
    REPLACED = "late partition attached"
    ARCHIVED = "detached rows match the archive"
    UNREFERENCED = "foreign key dropped"
    COMPARED = "compared under lock"
    DROPPING = "drop recorded"
    DROPPED = "table dropped"
    RECORDED = "prune recorded"


class Outcome(StrEnum):
    """What became of a partition."""

    DROPPED = "dropped"
    WOULD_DROP = "would be dropped"
    WOULD_FINISH = "would be finished"
    REFUSED = "refused"
    STOPPED = "stopped"
    PUT_BACK = "put back"

    @property
    def is_finding(self) -> bool:
        """Whether somebody should look at it."""
        return self in (Outcome.REFUSED, Outcome.STOPPED, Outcome.PUT_BACK)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A partition, and whether it may go.

    Attributes:
        partition: it is.
        months: ``YYYY-MM``, that it covers; of one without a beginning those that it has rows of.
        reason: why it must stay; empty when it may go.
        state: in ``archive.prunes``; None when it was never proposed.
        approved_by: who approved it.
    """

    partition: MonthPartition
    months: tuple[str, ...]
    reason: str
    state: str | None = None
    approved_by: str | None = None


@dataclass(frozen=True, slots=True)
class Pruned:
    """What became of a partition in a run.

    Attributes:
        partition: ``schema.name``.
        months: ``YYYY-MM``, that it covers.
        outcome: what was done.
        reason: why it was not dropped, in words; empty when it was.
        rows: dropped, or an estimate.
        bytes: it occupied with its indexes.
    """

    partition: str
    months: tuple[str, ...]
    outcome: Outcome
    reason: str = ""
    rows: int = 0
    bytes: int = 0


class _RefusedError(UserError):
    """The partition must stay; somebody has to look at it."""


def examine(shard: Shard, target: Target, policy: Policy) -> list[Candidate]:
    """Look at every partition, and write nothing.

    Args:
        shard: the database.
        target: what is archived and where it goes.
        policy: what may be dropped.

    Returns:
        Every partition, oldest first, with the sentence why it must stay or none.

    Raises:
        PartitionsError: the table is plain, or its partitions are not ranges of time.
        UserError: a login or privilege is missing, or the bucket cannot be read.
    """
    with _work(shard, target, policy) as work:
        return work.candidates()


def propose(shard: Shard, target: Target, policy: Policy) -> list[Candidate]:
    """Look at every partition, and record those that may go as proposals.

    Args:
        shard: the database.
        target: what is archived and where it goes.
        policy: what may be dropped; ``off`` proposes nothing.

    Returns:
        Every partition, oldest first, with the sentence why it must stay or none.

    Raises:
        PartitionsError: the table is plain, or its partitions are not ranges of time.
        UserError: a login or privilege is missing, or the bucket cannot be read.
    """
    if policy.mode == "off":
        return []
    with _work(shard, target, policy) as work:
        return [candidate if candidate.reason else work.proposed(candidate) for candidate in work.candidates()]


def approve(shard: Shard, table: SourceTable, what: Month | str, by: str) -> list[str]:
    """Approve proposed partitions; the next run drops them.

    Args:
        shard: the database.
        table: the source.
        what: a month, every proposed partition of which is meant, or a partition's name.
        by: who approves.

    Returns:
        The partitions, ``schema.name``.

    Raises:
        UserError: nothing of it is proposed.
    """
    if not by.strip():
        raise UserError("a prune needs a name that approves it")
    approved = Prunes(shard, table).approve(what, by.strip())
    if not approved:
        raise UserError(
            f"no partition of {table} is proposed for {what.name if isinstance(what, Month) else what}; "
            "python -m archive_pipeline.prune propose shows which may go, and why others may not"
        )
    return approved


def run(
    shard: Shard,
    target: Target,
    policy: Policy,
    *,
    month: Month | None = None,
    dry_run: bool = False,
    on_step: Callable[[Step], None] = lambda _: None,
    patience: Patience | None = None,
) -> list[Pruned]:
    """Finish what earlier runs left, and drop the partitions that may go.

    Args:
        shard: the database.
        target: what is archived and where it goes.
        policy: ``propose`` records proposals and drops what was approved, ``auto`` drops whatever may go, ``off`` drops
            nothing: what a dead run left half done is put back.
        month: only partitions that cover it; what is half done is finished all the same.
        dry_run: says what would be dropped, and writes nothing.
        on_step: told after each step.
        patience: with locks; None is the usual.

    Returns:
        What became of each partition that was taken up. One that failed does not hinder the others.

    Raises:
        MonthBusyError: another prune of the table is running.
        FencedError: the lease on a month was lost; the next run goes on.
        PartitionsError: the table is plain, or its partitions are not ranges of time.
        UserError: a login or privilege is missing, or a server broke off.
    """
    with _work(shard, target, policy, on_step, patience) as work:
        if dry_run:
            return [*work.left_over(), *(_forecast(each) for each in work.candidates(month) if work.is_due(each))]
        with _alone(shard, target.table):
            pruned = work.recover()
            for candidate in work.candidates(month) if policy.mode != "off" else ():
                if candidate.reason or not work.is_attached(candidate):
                    continue
                proposed = work.proposed(candidate)
                if work.is_due(proposed):
                    pruned.append(work.prune(work.row_of(proposed)))
            return pruned + work.adopted


@contextmanager
def _work(
    shard: Shard,
    target: Target,
    policy: Policy,
    on_step: Callable[[Step], None] = lambda _: None,
    patience: Patience | None = None,
) -> Iterator["_Work"]:
    try:
        with shard.owner() as owner:
            detaching = Detaching(owner, target.table, patience or Patience())
            yield _Work(shard, target, policy, detaching, Prunes(shard, target.table), on_step)
    except psycopg.errors.InsufficientPrivilege:
        raise UserError(
            f"the role of DATABASE_OWNER_URL may not do what a prune of {target.table} needs; it must own the table "
            "and its partitions"
        ) from None
    except psycopg.OperationalError as error:
        raise UserError(
            f"Postgres broke off while {target.table} was pruned ({type(error).__name__}); nothing was lost, "
            "the next run goes on where this one stopped"
        ) from None


@contextmanager
def _alone(shard: Shard, table: SourceTable) -> Iterator[None]:
    with shard.dedicated() as connection:
        if connection.execute(LOCK, (f"prune {table}",)).fetchone() != (True,):
            raise MonthBusyError(f"{table} is being pruned by another run; wait for that run to end, or stop it")
        yield


@dataclass(frozen=True, slots=True)
class _Work:
    """What the steps of one run share."""

    shard: Shard
    target: Target
    policy: Policy
    detaching: Detaching
    prunes: Prunes
    on_step: Callable[[Step], None]
    adopted: list[Pruned] = field(default_factory=list)

    # Which partitions may go.

    def candidates(self, month: Month | None = None) -> list[Candidate]:
        rows = {row.oid: row for row in self.prunes.under_way()}
        beside = [row for row in rows.values() if (at := self.detaching.where(row)) is not None and not at.attached]
        soundness = self.soundness()
        found = []
        for partition in self.detaching.partitions():
            if month is not None and not partition.overlaps(month):
                continue
            facts = self.facts(partition.table, partition.from_at, partition.to_at, soundness)
            reason = why_not(facts, self.oldest_kept())
            if partition.pending_detach:
                reason = f"the detach of {partition} was interrupted; the next run finishes it"
            elif waiting := [row for row in beside if row.overlaps(partition)]:
                reason = f"{partition} stands in the place of {waiting[0]}, which is not dropped yet"
            candidate = Candidate(partition, tuple(each.month.name for each in facts.months), reason)
            row = rows.get(partition.oid)
            found.append(replace(candidate, state=row.state, approved_by=row.approved_by) if row else candidate)
        return found

    def proposed(self, candidate: Candidate) -> Candidate:
        row = self.prunes.propose(candidate.partition)
        return replace(candidate, state=row.state, approved_by=row.approved_by)

    def is_due(self, candidate: Candidate) -> bool:
        """Whether this run drops it."""
        approved = self.policy.mode == "propose" and candidate.state == "approved"
        return not candidate.reason and (self.policy.mode == "auto" or approved)

    def row_of(self, candidate: Candidate) -> Prune:
        return next(row for row in self.prunes.under_way() if row.oid == candidate.partition.oid)

    def is_attached(self, candidate: Candidate) -> bool:
        return candidate.partition.oid in {each.oid for each in self.detaching.partitions()}

    def oldest_kept(self) -> Month:
        return oldest_kept(database_now(self.detaching.owner), self.policy, self.target.grace)

    def soundness(self) -> Soundness:
        return Soundness(self.target, self.shard.name, self.prunes.keys())

    def facts(
        self, table: SourceTable, from_at: datetime | None, to_at: datetime, soundness: Soundness
    ) -> PartitionFacts:
        covered = self.detaching.covered(table, from_at, to_at, self.policy.zone)
        known = self.prunes.archived(list(covered))
        held = {month: self.holds(month) for month in covered}
        past_retention = to_at <= self.oldest_kept().start
        facts = []
        for month, has_rows in covered.items():
            archived = known.get(month)
            # The bucket is asked about months that may go only: it is a request for each object.
            asked = archived is not None and past_retention and not held[month]
            problem = soundness.problem(archived.key, archived.sha256) if archived and asked else ""
            pruned = archived is not None and archived.pruned
            facts.append(MonthFacts(month, has_rows, archived is not None, pruned, problem, held[month]))
        return PartitionFacts(str(table), from_at, to_at, tuple(facts))

    def holds(self, month: Month) -> tuple[str, ...]:
        with self.shard.transaction() as connection:
            return tuple(map(str, holds(connection, self.target.table, month)))

    # What dead runs left.

    def left_over(self) -> list[Pruned]:
        """What `recover` would take up."""
        pending = {each.oid for each in self.detaching.partitions() if each.pending_detach}
        found = []
        for row in self.prunes.under_way():
            at = self.detaching.where(row)
            if row.oid in pending or (at is not None and not at.attached and row.is_begun):
                found.append(self.report(row, Outcome.WOULD_FINISH, row.reason or ""))
        return found

    def recover(self) -> list[Pruned]:
        self.finish_pending()
        found = []
        for row in self.prunes.under_way():
            at = self.detaching.where(row)
            if at is None:
                found += self.settle_absent(row)
            elif not at.attached and not row.is_begun:
                reason = f"{row} was detached by somebody else than this pipeline; attach it again, or drop it"
                found.append(self.report(row, Outcome.REFUSED, reason))
            elif not at.attached:
                found.append(self.prune(row))
            elif row.is_begun and row.state != "refused":
                # Died between the note and the detach; an approval stays.
                self.prunes.record(row, "approved" if row.approved_at else "proposed")
        return found

    def finish_pending(self) -> set[int]:
        """Finish every interrupted detach, whoever began it: until then no other can begin, and inserts fail."""
        pending = [each for each in self.detaching.partitions() if each.pending_detach]
        for partition in pending:
            row = self.prunes.propose(partition)
            if not row.is_begun:
                self.prunes.record(row, "detaching")
            self.detaching.finish(partition)
        return {each.oid for each in pending}

    def settle_absent(self, row: Prune) -> list[Pruned]:
        """A partition whose table is gone."""
        if row.state == "refused":
            return []
        if not row.is_begun:  # a proposal that has nothing left to propose
            self.prunes.forget(row)
            return []
        if row.state == "dropping":  # died after the drop
            self.prunes.record_dropped(row)
            return [self.report(row, Outcome.DROPPED)]
        reason = f"{row} was dropped by somebody else than this pipeline"
        self.prunes.record(row, "refused", reason)
        return [self.report(row, Outcome.REFUSED, reason)]

    # The way out.

    def prune(self, row: Prune) -> Pruned:
        """Bring one partition as far as it may go, from wherever it is."""
        try:
            self.require_same(row)
            months = self.require_due(row)
            at = self.detaching.where(row)
            if at is not None and at.attached:
                with tracing.span("detach"):
                    self.detach(row, months)
            self.detaching.replace(row, self.policy.partition_schema, self.policy.zone)
            self.on_step(Step.REPLACED)
            self.prunes.record(row, "replaced")
            with tracing.span("drop"):
                self.drop(row)
        except FencedError:
            raise
        except _RefusedError as error:
            return self.refuse(row, str(error))
        except UserError as error:
            logger.warning(
                "the prune of %s stopped: %s", row, error, extra=event(Event.PRUNE_STOPPED, partition=str(row))
            )
            self.prunes.record_reason(row, str(error))
            return self.report(row, Outcome.STOPPED, str(error))
        except (psycopg.OperationalError, psycopg.errors.InsufficientPrivilege):
            raise  # concerns every partition
        except psycopg.Error as error:
            # Its text may hold a value.
            reason = f"Postgres refused a statement for {row} ({type(error).__name__}, {error.sqlstate})"
            logger.warning("the prune stopped: %s", reason, extra=event(Event.PRUNE_STOPPED, partition=str(row)))
            self.prunes.record_reason(row, reason)
            return self.report(row, Outcome.STOPPED, reason)
        return self.report(row, Outcome.DROPPED)

    def report(self, row: Prune, outcome: Outcome, reason: str = "") -> Pruned:
        rows, months = self.prunes.outcome(row)
        if not months and row.from_at is not None:
            months = [month.name for month in months_between(row.from_at, row.to_at, self.policy.zone)]
        return Pruned(str(row), tuple(months), outcome, reason, rows, row.bytes or 0)

    def require_same(self, row: Prune) -> None:
        at = self.detaching.where(row)
        if at is None or (at.table, at.at_its_name) != (row.table, row.oid):
            raise _RefusedError(
                f"{row} is not the table any more that was meant (oid {row.oid}): it was renamed, or another one was "
                "made under its name; nothing was dropped"
            )

    def require_detached(self, row: Prune) -> None:
        self.require_same(row)
        at = self.detaching.where(row)
        if at is None or at.attached:
            raise UserError(f"{row} was attached again by somebody else than this pipeline; the next run decides anew")

    def require_due(self, row: Prune) -> list[Month]:
        """Decide again, for a partition wherever it is."""
        if self.policy.mode == "off":
            raise _RefusedError("ARCHIVE_PRUNE is off")
        if self.policy.mode == "propose" and row.approved_at is None:
            raise _RefusedError(f"nobody approved to drop {row}")
        facts = self.facts(row.table, row.from_at, row.to_at, self.soundness())
        if reason := why_not(facts, self.oldest_kept()):
            raise _RefusedError(reason)
        return [month.month for month in facts.months]

    def detach(self, row: Prune, months: Sequence[Month]) -> None:
        for month in months:
            self.require_match(month, archive_month(self.shard, self.target, month))
        self.on_step(Step.MATCHED)
        self.detaching.wait_for_readers(row)
        if pending := self.finish_pending():
            # Until one of them is back or replaced, rows of its range are refused.
            self.adopted.extend(self.prune(each) for each in self.prunes.under_way() if each.oid in pending)
        with self.leases(months) as held:
            _confirm(held)
            self.prunes.record(row, "detaching")
            self.on_step(Step.DETACHING)
            _confirm(held)
            self.detaching.detach(row)
            self.on_step(Step.DETACHED)
            self.prunes.record(row, "detached")

    def drop(self, row: Prune) -> None:
        with self.shard.transaction() as connection:
            role = connection.execute("SELECT current_user").fetchone()
        self.detaching.let_read(row, role[0] if role else "")
        for _ in range(LOOKS):
            covered = self.detaching.covered(row.table, row.from_at, row.to_at, self.policy.zone)
            compared = [self.look(row, month) for month in covered]
            self.on_step(Step.ARCHIVED)
            self.require_detached(row)
            self.require_no_new_columns(row, compared)
            for name in self.detaching.foreign_keys(row):
                self.detaching.drop_foreign_key(row, name)
                self.on_step(Step.UNREFERENCED)
            if self.drop_when_equal(row, compared):
                return
        raise UserError(f"rows keep coming to {row} though it is detached; whoever writes to it by name must stop")

    def look(self, row: Prune, month: Month) -> Compared:
        """Archive what came to a month since, and compare: the archive holds what both relations hold."""
        elsewhere = NO_ROWS
        if self.detaching.has_rows(self.target.table, month):
            report = archive_month(self.shard, self.target, month)
            _require_unchanged(month, report)
            elsewhere = report.source
        report = archive_month(self.shard, self.target, month, relation=row.table)
        self.require_match(month, report, elsewhere)
        archive = report.manifest.digest
        gone = Digest(archive.rows - elsewhere.rows, archive.value - elsewhere.value)
        return Compared(month, report.found, report.source, gone)

    def require_match(self, month: Month, report: MonthReport, elsewhere: Digest = NO_ROWS) -> None:
        """Require that nothing was changed or deleted in Postgres after it was archived."""
        _require_unchanged(month, report)
        archive, here = report.manifest.digest, report.source + elsewhere
        gone, erased = self.prunes.gone(month)
        missing = archive.rows - here.rows
        if missing > gone.rows:
            raise _RefusedError(
                f"Postgres holds {missing - gone.rows:,} row(s) of month {month.name} less than it should: they were "
                "deleted there after they were archived"
            )
        # Rows that were restored are here again; rows that were erased are not in the archive any more.
        if missing == gone.rows and not erased and archive.value != here.value + gone.value:
            raise _RefusedError(f"the content of month {month.name} differs between Postgres and the archive")

    def require_no_new_columns(self, row: Prune, compared: Iterable[Compared]) -> None:
        """Require that the table has no values in a column that the archive has not."""
        present = [column.source for column in discover(self.detaching.owner, row.schema, row.name)]
        for each in compared:
            known = {column.source for column in each.found.manifest.columns}
            for name in present:
                if name not in known and self.detaching.has_rows(row.table, each.month, name):
                    raise _RefusedError(
                        f"column {name} of {row} was added after month {each.month.name} was archived, and has values "
                        "that the archive does not hold"
                    )

    def drop_when_equal(self, row: Prune, compared: Sequence[Compared]) -> bool:
        """Compare under a lock that nobody writes beneath, and drop; False when rows came since they were archived."""
        owner, table = self.detaching.owner, row.table.identifier
        with self.leases([each.month for each in compared]) as held:

            def compare_and_drop() -> bool:
                owner.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(table))
                self.require_detached(row)
                if self.detaching.foreign_keys(row) or not self.is_equal(row, compared):
                    return False
                soundness = self.soundness()
                for each in compared:
                    if held_back := self.holds(each.month):
                        raise _RefusedError(f"month {each.month.name} must stay: {'; '.join(held_back)}")
                    if problem := soundness.missing_object(each.found):
                        raise _RefusedError(f"month {each.month.name} is not sound in the bucket: {problem}")
                self.on_step(Step.COMPARED)
                _confirm(held)
                self.prunes.record_dropping(row, compared)
                self.on_step(Step.DROPPING)
                _confirm(held)
                try:
                    owner.execute(sql.SQL("DROP TABLE {}").format(table))
                except psycopg.errors.DependentObjectsStillExist:
                    raise _RefusedError(
                        f"something depends on {row} (a view, a function, a foreign key); remove it, or point it to "
                        f"{self.target.table}"
                    ) from None
                return True

            if not self.detaching.patiently(f"{row} could not be locked to be dropped", compare_and_drop):
                return False
            self.on_step(Step.DROPPED)
            self.prunes.record_dropped(row)
        self.on_step(Step.RECORDED)
        return True

    def is_equal(self, row: Prune, compared: Sequence[Compared]) -> bool:
        """Whether the locked table holds exactly what was compared, with manifests that are the newest still."""
        known = self.prunes.archived([each.month for each in compared])
        for each in compared:
            newest = known.get(each.month)
            if newest is None or newest.sha256 != each.found.sha256:
                return False
            columns = each.found.manifest.columns
            if digest_of(self.detaching.owner, row.table, columns, each.month).difference(each.rows):
                return False
        # Rows of no month that was compared would be lost.
        count = self.detaching.owner.execute(sql.SQL("SELECT count(*) FROM {}").format(row.table.identifier)).fetchone()
        return count == (sum(each.rows.rows for each in compared),)

    def refuse(self, row: Prune, reason: str) -> Pruned:
        """Leave a partition as it was found; one that is detached is put back."""
        at = self.detaching.where(row)
        outcome = Outcome.REFUSED
        if at is not None and not at.attached and (at.table, at.at_its_name) == (row.table, row.oid):
            try:
                self.detaching.put_back(row)
                outcome, reason = Outcome.PUT_BACK, f"{reason}; {row} was attached again"
            except UserError as error:
                reason = f"{reason}; {error}"
        logger.warning(
            "the prune of %s was refused: %s", row, reason, extra=event(Event.PRUNE_REFUSED, partition=str(row))
        )
        self.prunes.record(row, "refused", reason)
        return self.report(row, outcome, reason)

    @contextmanager
    def leases(self, months: Sequence[Month]) -> Iterator[list[Lease]]:
        """The leases on months, so that no export of theirs overlaps; all of one session, a partition may have 100."""
        with self.shard.dedicated() as session, ExitStack() as stack:
            taken = [lease(self.shard, self.target.table, month, session=session) for month in months]
            yield [stack.enter_context(each) for each in taken]


def _confirm(held: Iterable[Lease]) -> None:
    for each in held:
        each.confirm()


def _require_unchanged(month: Month, report: MonthReport) -> None:
    if report.damaged:
        raise _RefusedError(
            f"month {month.name} is not sound in the bucket: {len(report.damaged)} object(s) are missing or altered"
        )
    if report.changed_rows:
        raise _RefusedError(
            f"{report.changed_rows:,} row(s) of month {month.name} have other content in Postgres than in the archive: "
            "they were changed after they were archived"
        )


def _forecast(candidate: Candidate) -> Pruned:
    partition = candidate.partition
    return Pruned(
        str(partition), candidate.months, Outcome.WOULD_DROP, rows=partition.rows_estimate, bytes=partition.bytes
    )


def _show(candidates: Sequence[Candidate], title: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("partition", "months", "rows, estimated", "MB", "state", "why it stays", title=title)
    for each in candidates:
        months = f"{each.months[0]} … {each.months[-1]}" if len(each.months) > 1 else "".join(each.months)
        state = f"approved by {each.approved_by}" if each.state == "approved" and each.approved_by else each.state
        size = f"{each.partition.bytes / 1e6:,.1f}"
        name, rows = str(each.partition), f"{each.partition.rows_estimate:,}"
        table.add_row(escape(name), months, rows, size, escape(state or ""), escape(each.reason))
    Console().print(table)


def _print(pruned: Sequence[Pruned]) -> None:
    for each in pruned:
        months = f" ({each.months[0]}{f' to {each.months[-1]}' if len(each.months) > 1 else ''})" if each.months else ""
        print(f"{each.partition}{months}: {each.outcome}{f', {each.reason}' if each.reason else ''}; "
              f"{each.rows:,} rows, {each.bytes / 1e6:,.1f} MB")  # fmt: skip
    if not pruned:
        print("nothing to drop")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes them from the process.

    Returns:
        The exit code: 1 when a partition was refused or a prune stopped.
    """
    parser = argparse.ArgumentParser(
        prog="python -m archive_pipeline.prune",
        description="Drop archived, verified months from Postgres (ARCHIVE_PRUNE, ARCHIVE_RETENTION_MONTHS).",
    )
    parser.add_argument("--shard", help="database; all of them by default")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("status", help="show the partitions and why they stay; writes nothing")
    commands.add_parser("propose", help="record the partitions that may go, for somebody to approve")
    approving = commands.add_parser("approve", help="approve what was proposed; the next run drops it")
    approving.add_argument("what", metavar="MONTH", help="YYYY-MM, or the name of a partition")
    approving.add_argument("--by", required=True, metavar="NAME", help="who approves")
    running = commands.add_parser("run", help="finish what is half done, and drop what may go")
    running.add_argument("--month", metavar="YYYY-MM", help="only partitions that cover it")
    running.add_argument("--dry-run", action="store_true", help="say what would be dropped; writes nothing")
    options = parser.parse_args(arguments)

    settings = load(ArchiveSettings)
    policy = Policy.from_settings(settings)
    target = Target.from_settings(settings)
    title = f"{target.table} in {{}}, ARCHIVE_PRUNE={policy.mode}, ARCHIVE_RETENTION_MONTHS={policy.retention_months}"
    failed = False
    with DatabaseRouter.from_settings(load(DatabaseSettings), application_name="prune") as router:
        for shard in (router.shard(options.shard),) if options.shard else router.shards():
            match options.command:
                case "status":
                    _show(examine(shard, target, policy), title.format(shard.name))
                case "propose":
                    if policy.mode == "off":
                        raise UserError("ARCHIVE_PRUNE is off; set it to propose to have partitions proposed")
                    _show(propose(shard, target, policy), title.format(shard.name))
                case "approve":
                    is_month = MONTH.fullmatch(options.what) is not None
                    what = Month.parse(options.what, policy.zone) if is_month else options.what
                    for name in approve(shard, target.table, what, options.by):
                        print(f"approved: {name}")
                case _:
                    month = Month.parse(options.month, policy.zone) if options.month else None
                    # A dry run takes no turn: it writes nothing.
                    with nullcontext() if options.dry_run else turns.pruning(shard, target.table):
                        pruned = run(shard, target, policy, month=month, dry_run=options.dry_run)
                    _print(pruned)
                    failed = failed or any(each.outcome.is_finding for each in pruned)
    return 1 if failed else 0


if __name__ == "__main__":
    run_command(main)
