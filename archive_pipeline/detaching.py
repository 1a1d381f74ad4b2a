"""A partition's way out of its table, and back: the statements of the table's owner.

Belongs here: where a table is, detaching it, the partition for late rows in its place, its foreign keys, attaching it
again, patience with locks. Does not: whether any of it may be done (`archive_pipeline.prune`).

Measured on Postgres 18:

- While ``DETACH … CONCURRENTLY`` waits for readers that were there before it, rows of its range are refused (23514),
  and no partition can be attached in its place. So it is not begun while a long transaction has the table open.
- A cancelled detach leaves the partition pending: invisible, and every other detach fails (55000) until it is finished.
  The server goes on with the statement of a client that died.
- Dropping a foreign key, or a table that has one, takes ACCESS EXCLUSIVE on the table it refers to. So each is dropped
  by itself, with a lock timeout, before the table is.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import TypeVar

import psycopg
import tenacity
from psycopg import sql

from archive_pipeline.errors import PartitionsError
from archive_pipeline.months import Month
from archive_pipeline.premade_months import MonthPartition, attach, make_range, partitions_of
from archive_pipeline.prunable import months_between
from archive_pipeline.prune_ledger import Prune
from archive_pipeline.snapshot import SourceTable
from scaling.databases import Connection
from scaling.errors import UserError
from scaling.logs import Event, event

logger = logging.getLogger(__name__)

T = TypeVar("T")

IDENTIFIER_BYTES = 63

# A detach waits for readers, however long they read; a shorter timeout would leave it pending. With row_security off
# Postgres refuses to read where a policy would hide rows from the owner.
SESSION = {
    "lock_timeout": "0",
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "row_security": "off",
    "TimeZone": "UTC",
}

PARENT = "SELECT oid, relkind::text FROM pg_class WHERE oid = to_regclass(%s)"

# Where a table is now, and which table has the name it had.
WHEREABOUTS = """
SELECT n.nspname, c.relname, i.inhparent IS NOT NULL, to_regclass(%(was)s)::oid
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_inherits i ON i.inhrelid = c.oid
WHERE c.oid = %(oid)s
"""

LONG_TRANSACTIONS = """
SELECT count(DISTINCT a.pid) FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
WHERE l.locktype = 'relation' AND l.granted AND l.relation = ANY(%(relations)s) AND a.pid <> pg_backend_pid()
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND a.xact_start < clock_timestamp() - make_interval(secs => %(seconds)s)
"""

FOREIGN_KEYS = "SELECT conname FROM pg_constraint WHERE conrelid = %s AND contype = 'f' ORDER BY conname"

# Foreign keys of the table that the partition has lost.
LOST_FOREIGN_KEYS = """
SELECT p.conname, pg_get_constraintdef(p.oid) FROM pg_constraint p
WHERE p.conrelid = %(parent)s AND p.contype = 'f' AND p.conparentid = 0 AND p.convalidated
  AND NOT EXISTS (SELECT FROM pg_constraint c WHERE c.conrelid = %(child)s AND c.contype = 'f'
                  AND c.confrelid = p.confrelid AND pg_get_constraintdef(c.oid) = pg_get_constraintdef(p.oid))
ORDER BY p.conname
"""


class BusyError(UserError):
    """Somebody was in the way all the time; the next run goes on."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a statement waits for a lock, and how often it is tried.

    Attributes:
        lock_timeout: whoever wants the same lock waits behind the statement for this long at most.
        attempts: of one statement.
        first_wait: seconds before the second attempt; doubled each time, and jittered.
        longest_wait: seconds.
        long_transaction: seconds after which a transaction that has the table open keeps a detach from starting.
        sleep: waits.
    """

    lock_timeout: str = "1s"
    attempts: int = 10
    first_wait: float = 0.25
    longest_wait: float = 8.0
    long_transaction: float = 5.0
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where the catalog has a table now.

    Attributes:
        table: its name.
        attached: to any table, a pending detach included.
        at_its_name: oid of the table that has the name it had; None when there is none.
    """

    table: SourceTable
    attached: bool
    at_its_name: int | None


class Detaching:
    """The table, as its owner.

    Args:
        owner: connection of the table's owner, autocommit.
        table: partitioned by range of `created_at`.
        patience: with locks.

    Raises:
        PartitionsError: the table is plain, or there is none.
    """

    def __init__(self, owner: Connection, table: SourceTable, patience: Patience) -> None:
        self.owner = owner
        self._table = table
        self._patience = patience
        for name, value in SESSION.items():
            owner.execute(sql.SQL("SET {} = {}").format(sql.Identifier(name), sql.Literal(value)))
        found = owner.execute(PARENT, (table.identifier.as_string(owner),)).fetchone()
        if found is None:
            raise PartitionsError(f"there is no table {table} (ARCHIVE_TABLE)")
        self._oid, kind = found
        if kind != "p":
            raise PartitionsError(
                f"{table} is a plain table, and only partitions can be pruned; convert it with: "
                "python -m archive_pipeline.convert"
            )

    def partitions(self) -> tuple[MonthPartition, ...]:
        """The table's partitions, those whose detach is pending included."""
        return partitions_of(self.owner, self._table)

    def where(self, row: Prune) -> Whereabouts | None:
        """Where a partition is now; None when the table is gone.

        Args:
            row: of the partition.
        """
        was = row.table.identifier.as_string(self.owner)
        found = self.owner.execute(WHEREABOUTS, {"oid": row.oid, "was": was}).fetchone()
        return Whereabouts(SourceTable(found[0], found[1]), found[2], found[3]) if found else None

    def covered(self, table: SourceTable, from_at: datetime | None, to_at: datetime, zone: str) -> dict[Month, bool]:
        """The months of a range and whether a table has rows of each.

        Args:
            table: a partition, attached or not.
            from_at: the first instant of the range; None is the beginning of time, and only months with rows count.
            to_at: the first instant after it.
            zone: of the months.
        """
        start = from_at
        if start is None:
            (start,) = self.owner.execute(
                sql.SQL("SELECT min(created_at) FROM {}").format(table.identifier)
            ).fetchone() or (None,)
        months = list(months_between(start, to_at, zone)) if start else []
        covered = {month: self.has_rows(table, month) for month in months}
        return covered if from_at else {month: True for month, has_rows in covered.items() if has_rows}

    def has_rows(self, table: SourceTable, month: Month, column: str = "created_at") -> bool:
        """Whether a table has rows of a month.

        Args:
            table: the archived one, or a partition.
            month: of the rows.
            column: that is not NULL in them.
        """
        row = self.owner.execute(
            sql.SQL(
                "SELECT EXISTS (SELECT FROM {} WHERE created_at >= {} AND created_at < {} AND {} IS NOT NULL)"
            ).format(table.identifier, sql.Literal(month.start), sql.Literal(month.end), sql.Identifier(column))
        ).fetchone()
        return row == (True,)

    def detach(self, row: Prune) -> None:
        """Detach a partition; readers and writers of the table go on.

        Args:
            row: of the partition.

        Raises:
            BusyError: somebody else detaches at the same time.
        """
        try:
            self._execute("ALTER TABLE {} DETACH PARTITION {} CONCURRENTLY", row.table)
        except (psycopg.errors.ObjectNotInPrerequisiteState, psycopg.errors.UndefinedTable):
            raise BusyError(
                f"{row} was not detached: somebody else detaches partitions of {self._table} at the same time"
            ) from None

    def wait_for_readers(self, row: Prune) -> None:
        """Wait until nothing has the table open that would hold up a detach for long.

        Args:
            row: of the partition to be detached.

        Raises:
            BusyError: a long transaction did not end.
        """
        seconds = self._patience.long_transaction

        def long_ones() -> int:
            values = {"relations": [self._oid, row.oid], "seconds": seconds}
            found = self.owner.execute(LONG_TRANSACTIONS, values).fetchone()
            return found[0] if found else 0

        try:
            self._retrying(tenacity.retry_if_result(bool))(long_ones)
        except tenacity.RetryError:
            raise BusyError(
                f"{row} was not detached: {long_ones()} transaction(s) have had {self._table} open for more than "
                f"{seconds:.0f} s, and rows of the month would be refused until they end; end them "
                "(pg_stat_activity), or wait for the next run"
            ) from None

    def finish(self, partition: MonthPartition) -> None:
        """Finish an interrupted detach; it waits for readers as the detach did.

        Args:
            partition: whose detach is pending.
        """
        logger.warning(
            "finishing the interrupted detach of %s",
            partition,
            extra=event(Event.DETACH_RESUMED, partition=str(partition)),
        )
        try:
            self._execute("ALTER TABLE {} DETACH PARTITION {} FINALIZE", partition.table)
        except (psycopg.errors.ObjectNotInPrerequisiteState, psycopg.errors.UndefinedTable):
            # The dead client's statement may have come first.
            if any(each.pending_detach for each in self.partitions() if each.oid == partition.oid):
                raise

    def in_its_place(self, row: Prune) -> list[MonthPartition]:
        """Partitions that take rows of a detached one's range.

        Args:
            row: of the detached partition.
        """
        return [each for each in self.partitions() if row.overlaps(each)]

    def replace(self, row: Prune, schema: str, zone: str) -> None:
        """Attach an empty partition of the same range, so that late rows find a place; nothing if there is one.

        Args:
            row: of the detached partition.
            schema: private; the detached partition's where there is no such schema.
            zone: of the months.

        Raises:
            BusyError: a lock was not to be had.
        """
        there = self.owner.execute("SELECT FROM pg_namespace WHERE nspname = %s", (schema,)).rowcount
        partition = self._late(row, schema if there else row.schema, zone)

        def make() -> None:
            if not self.in_its_place(row):
                make_range(self.owner, self._table, partition, row.from_at, row.to_at)

        self.patiently(f"a partition for late rows could not be attached in place of {row}", make)

    def _late(self, row: Prune, schema: str, zone: str) -> SourceTable:
        label = "first" if row.from_at is None else Month.containing(row.from_at, zone).name.replace("-", "_")
        number = 1
        while True:
            suffix = f"_{label}_late" if number == 1 else f"_{label}_late_{number}"
            name = self._table.name.encode()[: IDENTIFIER_BYTES - len(suffix)].decode(errors="ignore") + suffix
            partition = SourceTable(schema, name)
            taken = self.owner.execute(PARENT, (partition.identifier.as_string(self.owner),)).rowcount
            if not taken:
                return partition
            number += 1

    def let_read(self, row: Prune, role: str) -> None:
        """Let a role read a detached partition, which it read through the table before.

        Args:
            row: of the partition.
            role: its name.
        """
        if self.owner.execute("SELECT has_schema_privilege(%s, %s, 'USAGE')", (role, row.schema)).fetchone() != (True,):
            grant = sql.SQL("GRANT USAGE ON SCHEMA {} TO {}")
            self.owner.execute(grant.format(sql.Identifier(row.schema), sql.Identifier(role)))
        self.owner.execute(sql.SQL("GRANT SELECT ON {} TO {}").format(row.table.identifier, sql.Identifier(role)))

    def foreign_keys(self, row: Prune) -> list[str]:
        """Names of a partition's foreign keys.

        Args:
            row: of the partition.
        """
        return [name for (name,) in self.owner.execute(FOREIGN_KEYS, (row.oid,))]

    def drop_foreign_key(self, row: Prune, name: str) -> None:
        """Drop a foreign key of a detached partition.

        Args:
            row: of the partition.
            name: of the key.

        Raises:
            BusyError: a lock was not to be had.
        """
        statement = sql.SQL("ALTER TABLE {} DROP CONSTRAINT {}").format(row.table.identifier, sql.Identifier(name))
        self.patiently(f"foreign key {name} of {row} could not be dropped", lambda: self.owner.execute(statement))

    def put_back(self, row: Prune) -> None:
        """Attach a detached partition where it was; the CHECK that a detach leaves spares reading it.

        Args:
            row: of the partition.

        Raises:
            BusyError: it stays detached, because late rows came to the one in its place, rows it refers to are gone,
                or a lock was not to be had.
        """
        stays = f"{row} stays detached, with all its rows"
        self._restore_foreign_keys(row, stays)
        table = self._table.identifier

        def swap() -> None:
            # The table first, then its partitions, as readers do; the other way round they deadlock.
            self.owner.execute(sql.SQL("LOCK TABLE ONLY {} IN ACCESS EXCLUSIVE MODE").format(table))
            for late in self.in_its_place(row):
                child = late.table.identifier
                self.owner.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(child))
                if self.owner.execute(sql.SQL("SELECT FROM {} LIMIT 1").format(child)).rowcount:
                    raise BusyError(f"{stays}, because late rows came to {late} in its place")
                self.owner.execute(sql.SQL("ALTER TABLE {} DETACH PARTITION {}").format(table, child))
                self.owner.execute(sql.SQL("DROP TABLE {}").format(child))
            attach(self.owner, self._table, row.table, row.from_at, row.to_at)

        self.patiently(stays, swap)

    def _restore_foreign_keys(self, row: Prune, stays: str) -> None:
        """Add what was dropped, validated before the ATTACH, which would read the table under locks otherwise."""
        values = {"parent": self._oid, "child": row.oid}
        for name, definition in self.owner.execute(LOST_FOREIGN_KEYS, values).fetchall():
            table, key = row.table.identifier, sql.Identifier(name)
            add = sql.SQL("ALTER TABLE {} ADD CONSTRAINT {} {} NOT VALID").format(table, key, sql.SQL(definition))
            self.patiently(stays, partial(self.owner.execute, add))
            try:
                self.owner.execute(sql.SQL("ALTER TABLE {} VALIDATE CONSTRAINT {}").format(table, key))
            except psycopg.errors.ForeignKeyViolation:
                raise BusyError(f"{stays}, because rows that {name} refers to were deleted meanwhile") from None

    def patiently(self, otherwise: str, work: Callable[[], T]) -> T:
        """Do something in one short transaction that never makes others wait longer than the lock timeout.

        Args:
            otherwise: what did not happen, for the sentence.
            work: repeated when a lock is not to be had.

        Returns:
            What the work returned.

        Raises:
            BusyError: a lock was not to be had.
        """

        def attempt() -> T:
            with self.owner.transaction():
                limit = sql.Literal(self._patience.lock_timeout)
                self.owner.execute(sql.SQL("SET LOCAL lock_timeout = {}").format(limit))
                return work()

        busy = (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected)
        try:
            return self._retrying(tenacity.retry_if_exception_type(busy), reraise=True)(attempt)
        except busy:
            raise BusyError(
                f"{otherwise}: others held a lock through {self._patience.attempts} attempts; end them "
                "(pg_stat_activity), or wait for the next run"
            ) from None

    def _execute(self, statement: str, partition: SourceTable) -> None:
        self.owner.execute(sql.SQL(statement).format(self._table.identifier, partition.identifier))

    def _retrying(self, when: tenacity.retry_base, *, reraise: bool = False) -> tenacity.Retrying:
        patience = self._patience
        return tenacity.Retrying(
            sleep=patience.sleep,
            wait=tenacity.wait_random_exponential(patience.first_wait, patience.longest_wait),
            stop=tenacity.stop_after_attempt(patience.attempts),
            retry=when,
            reraise=reraise,
        )
