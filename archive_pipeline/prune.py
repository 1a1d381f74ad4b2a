"""Drop archived months from Postgres, without ever losing a row.

Belongs here: the protocol below, how far each partition has come, and
``python -m archive_pipeline.prune status|propose|approve|run``. Does not: deciding which partitions may go
(`archive_pipeline.prunable`), archiving the rows that come in between (`archive_pipeline.archive`).

::

    finish what a dead run left -> the month is archived, sound in the bucket, past retention, not on hold, approved
        -> Postgres holds what the archive holds            (rows that came late are archived first)
        -> DETACH CONCURRENTLY                              (lease confirmed; readers and writers of the table go on)
        -> an empty partition of the same range in its place, for late rows
        -> rows that came before the detach are archived as a further part
        -> foreign keys dropped one by one                  (a DROP with them locks the referenced tables)
        -> one transaction: LOCK, digest again, every object asked for again, lease confirmed, DROP

Each step is found in the catalog when the next run starts, so a run may die anywhere. ``archive.prunes`` says which
table was meant: it is pinned to its oid, and a table that was made later under its name is another one.

What is compared. Every row of the partition must be in the archive with the same content, and every row of the archive
must be in Postgres, but for those that earlier prunes account for. So a row that was changed or deleted in Postgres
keeps its partition there until somebody has looked at it. The archive may hold fewer rows than the earlier prunes
dropped, because they were erased from it since; a row that was erased from the archive must be gone from Postgres too.
A partition that is refused after its detach is put back, unless late rows came to the one in its place; then it stays
beside the table, whole and archived, and is named.

Measured on Postgres 18: while a detach waits for readers that were there before it, rows of its month are refused
(23514), and no partition can be attached in its place. So the detach waits until no long transaction has the table
open. A cancelled detach leaves the partition pending, and every other detach fails until it is finished.
"""

import argparse
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TypeVar

import psycopg
import tenacity
from psycopg import sql
from psycopg.rows import namedtuple_row

from archive_pipeline import chain
from archive_pipeline import manifest as manifests
from archive_pipeline.archive import MonthReport, archive_month
from archive_pipeline.chain import Linked
from archive_pipeline.columns import discover
from archive_pipeline.digest import Digest
from archive_pipeline.errors import FencedError, MonthBusyError, PartitionsError
from archive_pipeline.ledger import Lease, lease
from archive_pipeline.legal_holds import holds
from archive_pipeline.manifest import Layout, Published
from archive_pipeline.months import MONTH, Month
from archive_pipeline.objects import ArchiveBucket
from archive_pipeline.premade_months import MonthPartition, attach, database_now, make_range, partitions_of
from archive_pipeline.prunable import MonthFacts, PartitionFacts, Policy, months_between, oldest_kept, why_not
from archive_pipeline.publication import Target
from archive_pipeline.signing import signer_from
from archive_pipeline.snapshot import SourceTable, digest_of
from scaling.databases import Connection, DatabaseRouter, Shard
from scaling.errors import UserError, run_command
from scaling.settings import ArchiveSettings, DatabaseSettings, load

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Rows may come to the partition while it is archived a last time; then it is archived again, so many times in one run.
LOOKS = 3
IDENTIFIER_BYTES = 63

LOCK = "SELECT pg_try_advisory_lock(hashtextextended(%s, 0))"

OF_TABLE = "source_table = %(source_table)s AND shard = %(shard)s"
FIELDS = (
    "id, partition_oid, partition_schema, partition_name, from_at, to_at, state, reason, rows, bytes, "
    "approved_by, approved_at"
)

UNDER_WAY = f"SELECT {FIELDS} FROM archive.prunes WHERE {OF_TABLE} AND state <> 'dropped' ORDER BY to_at, id"  # noqa: S608 - constants only

PROPOSE = f"""
INSERT INTO archive.prunes AS p (source_table, shard, partition_oid, partition_schema, partition_name, from_at, to_at,
                                 state, reason, rows, bytes)
VALUES (%(source_table)s, %(shard)s, %(oid)s, %(schema)s, %(name)s, %(from_at)s, %(to_at)s, %(state)s, %(reason)s,
        %(rows)s, %(bytes)s)
ON CONFLICT (source_table, shard, partition_oid) WHERE state <> 'dropped' DO UPDATE
SET rows = excluded.rows, bytes = excluded.bytes
RETURNING {FIELDS}
"""  # noqa: S608 - constants only

APPROVE = f"""
UPDATE archive.prunes
SET state = 'approved', reason = NULL, approved_by = %(by)s, approved_at = clock_timestamp(),
    changed_at = clock_timestamp()
WHERE {OF_TABLE} AND state IN ('proposed', 'approved', 'refused')
  AND (partition_name = %(name)s OR partition_schema || '.' || partition_name = %(name)s
       OR (to_at > %(start)s AND (from_at IS NULL OR from_at < %(end)s)))
RETURNING partition_schema || '.' || partition_name
"""  # noqa: S608 - constants only

RECORD = """
UPDATE archive.prunes SET state = %(state)s, reason = %(reason)s, changed_at = clock_timestamp() WHERE id = %(id)s
"""

ARCHIVED = f"""
SELECT month, manifest_key, manifest_sha256, pruned_at IS NOT NULL, erased_rows FROM archive.months
WHERE {OF_TABLE} AND month = ANY(%(months)s) AND manifest_key IS NOT NULL AND time_zone = %(zone)s
"""  # noqa: S608 - constants only

# Only while the month counts as pruned: a restore clears that.
GONE = f"""
SELECT g.gone_rows, g.gone_digest, m.erased_rows - g.erased_rows
FROM archive.pruned_months g JOIN archive.prunes p ON p.id = g.prune_id
JOIN archive.months m USING (source_table, shard, month)
WHERE {OF_TABLE} AND g.month = %(month)s AND p.state = 'dropped' AND m.pruned_at IS NOT NULL
ORDER BY p.changed_at DESC LIMIT 1
"""  # noqa: S608 - constants only

COMPARED = f"""
INSERT INTO archive.pruned_months (prune_id, month, rows, row_digest, gone_rows, gone_digest, erased_rows, manifest_key,
                                   manifest_sha256)
SELECT %(id)s, month, %(rows)s, %(row_digest)s, %(gone_rows)s, %(gone_digest)s, erased_rows, %(manifest_key)s,
       %(manifest_sha256)s
FROM archive.months WHERE {OF_TABLE} AND month = %(month)s
ON CONFLICT (prune_id, month) DO UPDATE
SET rows = excluded.rows, row_digest = excluded.row_digest, gone_rows = excluded.gone_rows,
    gone_digest = excluded.gone_digest, erased_rows = excluded.erased_rows, manifest_key = excluded.manifest_key,
    manifest_sha256 = excluded.manifest_sha256
"""  # noqa: S608 - constants only

DROPPED = f"""
WITH dropped AS (
    UPDATE archive.prunes SET state = 'dropped', reason = NULL, changed_at = clock_timestamp(),
        rows = (SELECT sum(rows) FROM archive.pruned_months WHERE prune_id = %(id)s)
    WHERE id = %(id)s AND state = 'dropping' RETURNING id
)
UPDATE archive.months m SET pruned_at = clock_timestamp(), pruned_rows = coalesce(m.pruned_rows, 0) + g.rows
FROM archive.pruned_months g JOIN dropped ON dropped.id = g.prune_id
WHERE {OF_TABLE} AND m.month = g.month
"""  # noqa: S608 - constants only

PARENT = "SELECT oid, relkind::text FROM pg_class WHERE oid = to_regclass(%s)"

# Where a table is now, and which table has its old name.
WHEREABOUTS = """
SELECT n.nspname AS schema, c.relname AS name, i.inhparent AS parent, coalesce(i.inhdetachpending, false) AS pending,
       to_regclass(%(was)s)::oid AS at_its_name
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_inherits i ON i.inhrelid = c.oid
WHERE c.oid = %(oid)s
"""

LONG_TRANSACTIONS = """
SELECT count(DISTINCT a.pid) FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
WHERE l.locktype = 'relation' AND l.granted AND l.relation = %(parent)s AND a.pid <> pg_backend_pid()
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


class _StoppedError(UserError):
    """Not now; the next run goes on."""


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of ``archive.prunes``."""

    id: int
    oid: int
    schema: str
    name: str
    from_at: datetime | None
    to_at: datetime
    state: str
    reason: str | None
    rows: int | None
    bytes: int | None
    approved_by: str | None
    approved_at: datetime | None

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"

    @property
    def table(self) -> SourceTable:
        return SourceTable(self.schema, self.name)


@dataclass(frozen=True, slots=True)
class _Whereabouts:
    """Where the catalog has a table now."""

    schema: str
    name: str
    parent: int | None
    pending: bool
    at_its_name: int | None


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
    with _room(shard, target, policy) as room:
        return [room.propose(candidate) if not candidate.reason else candidate for candidate in room.candidates()]


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
    with _room(shard, target, policy) as room:
        return room.candidates()


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
        raise UserError("say who approves")
    month = what if isinstance(what, Month) else None
    values = {
        "source_table": str(table),
        "shard": shard.name,
        "by": by.strip(),
        "name": None if month else what,
        "start": month and month.start,
        "end": month and month.end,
    }
    with shard.transaction() as connection:
        approved = [name for (name,) in connection.execute(APPROVE.encode(), values)]
    if not approved:
        raise UserError(
            f"no partition of {table} is proposed for {month.name if month else what}; "
            "python -m archive_pipeline.prune propose shows which may go, and why others may not"
        )
    return sorted(approved)


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
    with _room(shard, target, policy, on_step, patience or Patience()) as room:
        if dry_run:
            return [*room.left_over(), *(room.forecast(each) for each in room.candidates(month) if room.is_due(each))]
        with _alone(shard, target.table):
            pruned = room.recover()
            if policy.mode != "off":
                for candidate in room.candidates(month):
                    if not candidate.reason:
                        proposed = room.propose(candidate)
                        if room.is_due(proposed):
                            pruned.append(room.prune(room.row_of(proposed)))
            return pruned


@contextmanager
def _room(
    shard: Shard,
    target: Target,
    policy: Policy,
    on_step: Callable[[Step], None] = lambda _: None,
    patience: Patience | None = None,
) -> Iterator["_Room"]:
    try:
        with shard.owner() as owner:
            # A detach waits for readers, however long they read; a shorter timeout would leave it pending.
            # With row_security off Postgres refuses to read where a policy would hide rows from the owner.
            settings = {"lock_timeout": "0", "statement_timeout": "0", "row_security": "off", "TimeZone": "UTC"}
            for name, value in settings.items():
                owner.execute(sql.SQL("SET {} = {}").format(sql.Identifier(name), sql.Literal(value)))
            found = owner.execute(PARENT, (target.table.identifier.as_string(owner),)).fetchone()
            if found is None:
                raise PartitionsError(f"there is no table {target.table} (ARCHIVE_TABLE)")
            if found[1] != "p":
                raise PartitionsError(
                    f"{target.table} is a plain table, and only partitions can be pruned; convert it with: "
                    "python -m archive_pipeline.conversion"
                )
            yield _Room(shard, target, policy, owner, found[0], on_step, patience or Patience())
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
        row = connection.execute(LOCK, (f"prune {table}",)).fetchone()
        if not (row and row[0]):
            raise MonthBusyError(f"{table} is being pruned by another run; wait for that run to end, or stop it")
        yield


@dataclass(slots=True)
class _Links:
    """The chain, read from its end as far as somebody asked."""

    target: Target
    shard: str
    keys: dict[str, bytes]
    read: list[Linked] = field(default_factory=list)
    rest: Iterator[Linked] | None = None

    def problem(self, found: Published) -> str:
        """What is wrong with a manifest's link; empty when nothing is."""
        link = next((link for link in self._all() if link.lists(found)), None)
        if link is None:
            return f"s3://{self.target.bucket.name}/{found.key} has no link in the chain"
        fingerprint, signer = link.link.key_fingerprint, self.target.signer
        keys = {**self.keys, **({signer.fingerprint: signer.public_key} if signer else {})}
        where = f"s3://{self.target.bucket.name}/{link.link.key}"
        if fingerprint is None:
            return f"{where} is not signed, though a signing key is configured" if signer else ""
        if fingerprint not in keys or not link.signed_by(keys[fingerprint]):
            return f"the signature of {where} is not by a key of this archive"
        return ""

    def _all(self) -> Iterator[Linked]:
        yield from self.read
        if self.rest is None:
            self.rest = chain.walk(self.target.bucket, self.target.layout, self.shard)
        for link in self.rest:
            self.read.append(link)
            yield link


@dataclass(frozen=True, slots=True)
class _Room:
    """What the steps of one run share."""

    shard: Shard
    target: Target
    policy: Policy
    owner: Connection
    parent: int
    on_step: Callable[[Step], None]
    patience: Patience

    # --- which partitions may go

    def candidates(self, month: Month | None = None) -> list[Candidate]:
        rows = {row.oid: row for row in self.under_way()}
        beside = [row for row in rows.values() if (at := self.whereabouts(row)) is not None and at.parent is None]
        links = self.links()
        found = []
        for partition in partitions_of(self.owner, self.target.table):
            if month is not None and not partition.overlaps(month):
                continue
            facts = self.facts(partition.table, partition.from_at, partition.to_at, links)
            reason = why_not(facts, oldest_kept(database_now(self.owner), self.policy, self.target.grace))
            if partition.pending_detach:
                reason = f"the detach of {partition} was interrupted; the next run finishes it"
            elif waiting := [row for row in beside if _overlap(row, partition)]:
                reason = f"{partition} stands in the place of {waiting[0]}, which is not dropped yet"
            row = rows.get(partition.oid)
            months = tuple(each.month.name for each in facts.months)
            state, approved_by = (row.state, row.approved_by) if row else (None, None)
            found.append(Candidate(partition, months, reason, state, approved_by))
        return found

    def facts(self, table: SourceTable, from_at: datetime | None, to_at: datetime, links: _Links) -> PartitionFacts:
        covered = self.covered(table, from_at, to_at)
        months = list(covered)
        known = self.archived(months)
        with self.shard.transaction() as connection:
            held = {month: tuple(map(str, holds(connection, self.target.table, month))) for month in months}
        oldest = oldest_kept(database_now(self.owner), self.policy, self.target.grace)
        facts = []
        for month in months:
            key, sha256, pruned = known.get(month, (None, None, False))
            # The bucket is asked about months that may go only: it is a request for each object.
            looked_at = key is not None and to_at <= oldest.start and not held[month]
            problem = self.problem_of(key, sha256, links) if key and sha256 and looked_at else ""
            facts.append(MonthFacts(month, covered[month], key is not None, pruned, problem, held[month]))
        return PartitionFacts(str(table), from_at, to_at, tuple(facts))

    def covered(self, table: SourceTable, from_at: datetime | None, to_at: datetime) -> dict[Month, bool]:
        """The months of a range and whether a table has rows of each; without a beginning only those it has."""
        start = from_at
        if start is None:
            (start,) = self.owner.execute(
                sql.SQL("SELECT min(created_at) FROM {}").format(table.identifier)
            ).fetchone() or (None,)
        months = list(months_between(start, to_at, self.policy.zone)) if start else []
        covered = {month: self.has_rows(table, month) for month in months}
        return covered if from_at else {month: True for month, has_rows in covered.items() if has_rows}

    def archived(self, months: Sequence[Month]) -> dict[Month, tuple[str, str, bool]]:
        values = {**self.identity(), "months": [month.partition_key for month in months], "zone": self.policy.zone}
        with self.shard.transaction() as connection:
            rows = connection.execute(ARCHIVED.encode(), values).fetchall()
        named = {month.partition_key: month for month in months}
        return {named[f"{first:%Y-%m-%d}"]: (key, sha256, pruned) for first, key, sha256, pruned, _ in rows}

    def has_rows(self, table: SourceTable, month: Month) -> bool:
        row = self.owner.execute(
            sql.SQL("SELECT EXISTS (SELECT FROM {} WHERE created_at >= {} AND created_at < {})").format(
                table.identifier, sql.Literal(month.start), sql.Literal(month.end)
            )
        ).fetchone()
        return bool(row and row[0])

    def links(self) -> _Links:
        with self.shard.transaction() as connection:
            keys = dict(connection.execute("SELECT fingerprint, public_key FROM archive.signing_keys").fetchall())
        return _Links(self.target, self.shard.name, keys)

    def problem_of(self, key: str, sha256: str, links: _Links) -> str:
        """What is wrong with a month in the bucket; empty when nothing is."""
        bucket = self.target.bucket
        try:
            found = manifests.load(bucket, key)
        except FileNotFoundError:
            return f"s3://{bucket.name}/{key} is missing"
        if found.sha256 != sha256:
            return f"s3://{bucket.name}/{key} is not the manifest that was recorded"
        return self.unsound(found) or links.problem(found)

    def unsound(self, found: Published) -> str:
        """Which object of a manifest is not the very one that was verified; empty when all are."""
        bucket = self.target.bucket
        for part in found.manifest.parts:
            where = f"s3://{bucket.name}/{part.key}"
            current = bucket.head(part.key)
            if current is None:
                return f"{where} is missing"
            # Whoever reads the key gets the newest version, whatever is locked beneath it.
            if part.version_id is not None and current.version_id != part.version_id:
                return f"{where} has another version in front of the one that was verified"
            if not bucket.holds(part.key, part.size, part.sha256, part.version_id):
                return f"{where} holds other bytes than were verified"
        return ""

    def is_due(self, candidate: Candidate) -> bool:
        """Whether this run drops it."""
        if candidate.reason:
            return False
        return self.policy.mode == "auto" or (self.policy.mode == "propose" and candidate.state == "approved")

    def forecast(self, candidate: Candidate) -> Pruned:
        partition = candidate.partition
        return Pruned(
            str(partition),
            candidate.months,
            Outcome.WOULD_DROP,
            rows=partition.rows_estimate,
            bytes=partition.bytes,
        )

    def left_over(self) -> list[Pruned]:
        """What `recover` would take up."""
        found = []
        pending = {p.oid for p in partitions_of(self.owner, self.target.table) if p.pending_detach}
        for row in self.under_way():
            at = self.whereabouts(row)
            if row.oid in pending or (
                at is not None and at.parent is None and row.state not in ("proposed", "approved")
            ):
                found.append(self.report(row, Outcome.WOULD_FINISH, row.reason or ""))
        return found

    # --- archive.prunes

    def identity(self) -> dict[str, object]:
        return {"source_table": str(self.target.table), "shard": self.shard.name}

    def under_way(self) -> list[_Row]:
        with self.shard.transaction() as connection:
            return [_Row(*row) for row in connection.execute(UNDER_WAY.encode(), self.identity())]

    def propose(self, candidate: Candidate) -> Candidate:
        row = self.insert(candidate.partition, "proposed")
        return Candidate(candidate.partition, candidate.months, "", row.state, row.approved_by)

    def insert(self, partition: MonthPartition, state: str, reason: str | None = None) -> _Row:
        values = {
            **self.identity(),
            "oid": partition.oid,
            "schema": partition.schema,
            "name": partition.name,
            "from_at": partition.from_at,
            "to_at": partition.to_at,
            "state": state,
            "reason": reason,
            "rows": partition.rows_estimate,
            "bytes": partition.bytes,
        }
        with self.shard.transaction() as connection:
            row = connection.execute(PROPOSE.encode(), values).fetchone()
        assert row is not None  # noqa: S101 - RETURNING of one row
        return _Row(*row)

    def row_of(self, candidate: Candidate) -> _Row:
        return next(row for row in self.under_way() if row.oid == candidate.partition.oid)

    def record(self, row: _Row, state: str, reason: str | None = None) -> None:
        with self.shard.transaction() as connection:
            connection.execute(RECORD, {"id": row.id, "state": state, "reason": reason})

    def record_dropped(self, row: _Row) -> None:
        with self.shard.transaction() as connection:
            connection.execute(DROPPED.encode(), {**self.identity(), "id": row.id})

    # --- what dead runs left

    def recover(self) -> list[Pruned]:
        self.finish_pending()
        found = []
        for row in self.under_way():
            at = self.whereabouts(row)
            if at is None:
                found.append(self.settle_absent(row))
            elif at.parent is None and row.state in ("proposed", "approved"):
                reason = f"{row} was detached by somebody else than this pipeline; attach it again, or drop it"
                found.append(self.report(row, Outcome.REFUSED, reason))
            elif at.parent is None:
                found.append(self.prune(row))
            elif row.state not in ("proposed", "approved", "refused"):
                # Died between the note and the detach. Approval stays.
                self.record(row, "approved" if row.approved_at else "proposed")
        return [each for each in found if each is not None]

    def finish_pending(self) -> None:
        """Finish every detach of the table that was interrupted: until then no other can begin, and inserts fail."""
        for partition in partitions_of(self.owner, self.target.table):
            if not partition.pending_detach:
                continue
            if partition.oid not in {row.oid for row in self.under_way()}:
                self.insert(partition, "detaching", "its detach was begun by somebody else, and interrupted")
            logger.warning("finishing the interrupted detach of %s", partition)
            try:
                self.owner.execute(
                    sql.SQL("ALTER TABLE {} DETACH PARTITION {} FINALIZE").format(
                        self.target.table.identifier, partition.table.identifier
                    )
                )
            except (psycopg.errors.ObjectNotInPrerequisiteState, psycopg.errors.UndefinedTable):
                # The server goes on with the statement of a client that died, and may have come first.
                if any(
                    p.pending_detach for p in partitions_of(self.owner, self.target.table) if p.oid == partition.oid
                ):
                    raise

    def settle_absent(self, row: _Row) -> Pruned | None:
        """A partition whose table is gone."""
        if row.state == "dropping":  # died after the drop
            self.record_dropped(row)
            return self.report(row, Outcome.DROPPED)
        if row.state == "refused":
            return None
        reason = f"{row} was dropped by somebody else than this pipeline"
        self.record(row, "refused", reason)
        return self.report(row, Outcome.REFUSED, reason)

    def whereabouts(self, row: _Row) -> _Whereabouts | None:
        with self.owner.cursor(row_factory=namedtuple_row) as cursor:
            was = row.table.identifier.as_string(self.owner)
            found = cursor.execute(WHEREABOUTS, {"oid": row.oid, "was": was}).fetchone()
        return _Whereabouts(*found) if found else None

    # --- the protocol

    def prune(self, row: _Row) -> Pruned:
        """Bring one partition as far as it may go, from wherever it is."""
        try:
            self.require_same(row)
            months = self.require_due(row)
            at = self.whereabouts(row)
            if at is not None and at.parent is not None:
                self.detach(row, months)
            self.replace(row)
            self.drop(row)
        except FencedError:
            raise
        except _RefusedError as error:
            return self.refuse(row, str(error))
        except UserError as error:
            logger.warning("the prune of %s stopped: %s", row, error)
            self.record(row, self.state_of(row), str(error))
            return self.report(row, Outcome.STOPPED, str(error))
        return self.report(row, Outcome.DROPPED)

    def report(self, row: _Row, outcome: Outcome, reason: str = "") -> Pruned:
        with self.shard.transaction() as connection:
            rows = connection.execute(
                "SELECT rows, ARRAY(SELECT to_char(month, 'YYYY-MM') FROM archive.pruned_months WHERE prune_id = p.id "
                "ORDER BY month) FROM archive.prunes p WHERE id = %s",
                (row.id,),
            ).fetchone()
        count, months = rows or (None, None)
        if not months and row.from_at is not None:
            months = [month.name for month in months_between(row.from_at, row.to_at, self.policy.zone)]
        return Pruned(str(row), tuple(months or ()), outcome, reason, count or 0, row.bytes or 0)

    def state_of(self, row: _Row) -> str:
        return next(each.state for each in self.under_way() if each.id == row.id)

    def require_same(self, row: _Row) -> None:
        at = self.whereabouts(row)
        if at is None or at.at_its_name != row.oid or (at.schema, at.name) != (row.schema, row.name):
            raise _RefusedError(
                f"{row} is not the table any more that was meant: it was renamed, or another one was made under its "
                f"name (its oid was {row.oid}); nothing was dropped"
            )

    def require_due(self, row: _Row) -> tuple[Month, ...]:
        """Decide again, for a partition wherever it is."""
        if self.policy.mode == "off":
            raise _RefusedError("ARCHIVE_PRUNE is off")
        if self.policy.mode == "propose" and row.approved_at is None:
            raise _RefusedError(f"nobody approved to drop {row}")
        facts = self.facts(row.table, row.from_at, row.to_at, self.links())
        if reason := why_not(facts, oldest_kept(database_now(self.owner), self.policy, self.target.grace)):
            raise _RefusedError(reason)
        return tuple(month.month for month in facts.months)

    def detach(self, row: _Row, months: Sequence[Month]) -> None:
        for month in months:
            self.require_match(month, archive_month(self.shard, self.target, month))
        self.on_step(Step.MATCHED)
        self.wait_for_readers(row)
        with self.leases(months) as held:
            _confirm(held)
            self.record(row, "detaching")
            self.on_step(Step.DETACHING)
            self.finish_pending()
            _confirm(held)
            try:
                self.owner.execute(
                    sql.SQL("ALTER TABLE {} DETACH PARTITION {} CONCURRENTLY").format(
                        self.target.table.identifier, row.table.identifier
                    )
                )
            except (psycopg.errors.ObjectNotInPrerequisiteState, psycopg.errors.UndefinedTable):
                raise _StoppedError(
                    f"{row} was not detached: somebody else detaches partitions of {self.target.table} at the same time"
                ) from None
            self.on_step(Step.DETACHED)
            self.record(row, "detached")

    def wait_for_readers(self, row: _Row) -> None:
        """Wait until nothing that would hold up the detach has the table open."""
        values = {"parent": self.parent, "seconds": self.patience.long_transaction}

        def long_ones() -> int:
            found = self.owner.execute(LONG_TRANSACTIONS, values).fetchone()
            return found[0] if found else 0

        try:
            self.retrying(tenacity.retry_if_result(bool))(long_ones)
        except tenacity.RetryError:
            raise _StoppedError(
                f"{row} was not detached: {long_ones()} transaction(s) have had {self.target.table} open for more than "
                f"{self.patience.long_transaction:.0f} s, and rows of the month would be refused until they end; end "
                "them (pg_stat_activity), or wait for the next run"
            ) from None

    def replace(self, row: _Row) -> None:
        """Attach an empty partition of the same range, so that late rows find a place."""
        if not self.in_its_place(row):
            partition = self.late_name(row)

            def make() -> None:
                make_range(self.owner, self.target.table, partition, row.from_at, row.to_at)

            self.patiently(f"a partition for late rows could not be attached in place of {row}", make)
        self.on_step(Step.REPLACED)
        self.record(row, "replaced")

    def in_its_place(self, row: _Row) -> list[MonthPartition]:
        return [each for each in partitions_of(self.owner, self.target.table) if _overlap(row, each)]

    def late_name(self, row: _Row) -> SourceTable:
        label = "first" if row.from_at is None else f"{Month.containing(row.from_at, self.policy.zone).name}"
        stem, number = f"_{label.replace('-', '_')}_late", 1
        private = self.policy.partition_schema
        there = self.owner.execute("SELECT FROM pg_namespace WHERE nspname = %s", (private,)).rowcount
        while True:
            suffix = stem if number == 1 else f"{stem}_{number}"
            name = self.target.table.name.encode()[: IDENTIFIER_BYTES - len(suffix)].decode(errors="ignore") + suffix
            partition = SourceTable(private if there else row.schema, name)
            found = self.owner.execute(
                "SELECT to_regclass(%s) IS NULL", (partition.identifier.as_string(self.owner),)
            ).fetchone()
            if found and found[0]:
                return partition
            number += 1

    def drop(self, row: _Row) -> None:
        self.let_read(row)
        for _ in range(LOOKS):
            reports = {month: self.look(row, month) for month in self.covered(row.table, row.from_at, row.to_at)}
            self.on_step(Step.ARCHIVED)
            self.require_no_new_columns(row, reports)
            self.drop_foreign_keys(row)
            if self.drop_when_equal(row, reports):
                return
        raise _StoppedError(f"rows keep coming to {row} though it is detached; whoever writes to it by name must stop")

    def let_read(self, row: _Row) -> None:
        """Let the pipeline's role read the detached table, as it read it through the archived one."""
        with self.shard.transaction() as connection:
            found = connection.execute("SELECT current_user").fetchone()
        name = found[0] if found else ""
        role = sql.Identifier(name)
        enters = self.owner.execute("SELECT has_schema_privilege(%s, %s, 'USAGE')", (name, row.schema)).fetchone()
        if not (enters and enters[0]):
            self.owner.execute(sql.SQL("GRANT USAGE ON SCHEMA {} TO {}").format(sql.Identifier(row.schema), role))
        self.owner.execute(sql.SQL("GRANT SELECT ON {} TO {}").format(row.table.identifier, role))

    def look(self, row: _Row, month: Month) -> tuple[MonthReport, Digest]:
        """Archive what came to a month since, and compare; the archive holds what both relations hold."""
        elsewhere = Digest()
        if self.has_rows(self.target.table, month):
            report = archive_month(self.shard, self.target, month)
            self.require_unchanged(month, report)
            elsewhere = report.source
        report = archive_month(self.shard, self.target, month, relation=row.table)
        self.require_match(month, report, elsewhere)
        gone = _minus(report.manifest.digest, elsewhere)
        return report, gone

    def require_unchanged(self, month: Month, report: MonthReport) -> None:
        if report.damaged:
            raise _RefusedError(
                f"month {month.name} is not sound in the bucket: {len(report.damaged)} object(s) are missing or altered"
            )
        if report.changed_rows:
            raise _RefusedError(
                f"{report.changed_rows:,} row(s) of month {month.name} have other content in Postgres than in the "
                "archive: they were changed after they were archived"
            )

    def require_match(self, month: Month, report: MonthReport, elsewhere: Digest | None = None) -> None:
        self.require_unchanged(month, report)
        archive, here = report.manifest.digest, report.source + (elsewhere or Digest())
        gone, erased = self.gone(month)
        missing = archive.rows - here.rows
        if missing > gone.rows:
            raise _RefusedError(
                f"Postgres holds {missing - gone.rows:,} row(s) of month {month.name} less than it should: they were "
                "deleted there after they were archived"
            )
        # Rows that were restored are here again, rows that were erased are not in the archive any more.
        if missing == gone.rows and not erased and archive.value != here.value + gone.value:
            raise _RefusedError(f"the content of month {month.name} differs between Postgres and the archive")

    def gone(self, month: Month) -> tuple[Digest, int]:
        """What earlier prunes dropped of a month, and how many rows were erased from its archive since."""
        with self.shard.transaction() as connection:
            row = connection.execute(GONE.encode(), {**self.identity(), "month": month.partition_key}).fetchone()
        rows, value, erased = row or (0, 0, 0)
        return Digest(rows, int(value)), erased

    def require_no_new_columns(self, row: _Row, reports: dict[Month, tuple[MonthReport, Digest]]) -> None:
        """Refuse when the table has values in a column that the archive has not."""
        present = [column.source for column in discover(self.owner, row.schema, row.name)]
        for month, (report, _) in reports.items():
            known = {column.source for column in report.manifest.columns}
            for name in (name for name in present if name not in known):
                found = self.owner.execute(
                    sql.SQL(
                        "SELECT EXISTS (SELECT FROM {} WHERE {} IS NOT NULL AND created_at >= {} AND created_at < {})"
                    ).format(
                        row.table.identifier, sql.Identifier(name), sql.Literal(month.start), sql.Literal(month.end)
                    )
                ).fetchone()
                if found and found[0]:
                    raise _RefusedError(
                        f"column {name} of {row} was added after month {month.name} was archived and has values that "
                        "the archive does not hold"
                    )

    def drop_foreign_keys(self, row: _Row) -> None:
        """One by one: dropping one locks the table it refers to, and so would dropping the partition."""
        for (name,) in self.owner.execute(FOREIGN_KEYS, (row.oid,)).fetchall():
            statement = sql.SQL("ALTER TABLE {} DROP CONSTRAINT {}").format(row.table.identifier, sql.Identifier(name))
            self.patiently(f"foreign key {name} of {row} could not be dropped", self.executing(statement))
            self.on_step(Step.UNREFERENCED)

    def drop_when_equal(self, row: _Row, reports: dict[Month, tuple[MonthReport, Digest]]) -> bool:
        """Compare under a lock that nobody writes beneath, and drop; False when rows came since they were archived."""
        with self.leases(list(reports)) as held:

            def compare_and_drop() -> bool:
                self.owner.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(row.table.identifier))
                self.require_same(row)
                at = self.whereabouts(row)
                if at is None or at.parent is not None:
                    raise _StoppedError(f"{row} was attached again by somebody")
                if self.owner.execute(FOREIGN_KEYS, (row.oid,)).fetchone():
                    return False
                if not self.equal(row, reports):
                    return False
                for month, (report, _) in reports.items():
                    if problem := self.unsound(report.found):
                        raise _RefusedError(f"month {month.name} is not sound in the bucket: {problem}")
                self.on_step(Step.COMPARED)
                _confirm(held)
                self.record_dropping(row, reports)
                self.on_step(Step.DROPPING)
                _confirm(held)
                try:
                    self.owner.execute(sql.SQL("DROP TABLE {}").format(row.table.identifier))
                except psycopg.errors.DependentObjectsStillExist:
                    raise _RefusedError(
                        f"something depends on {row} (a view, a function, a foreign key); remove it, or point it to "
                        f"{self.target.table}"
                    ) from None
                return True

            if not self.patiently(f"{row} could not be locked to be dropped", compare_and_drop):
                return False
            self.on_step(Step.DROPPED)
            self.record_dropped(row)
        self.on_step(Step.RECORDED)
        return True

    def equal(self, row: _Row, reports: dict[Month, tuple[MonthReport, Digest]]) -> bool:
        """Whether the locked table holds exactly what was compared with manifests that are the newest still."""
        known = self.archived(list(reports))
        if any(known.get(month, ("",))[0] != report.found.key for month, (report, _) in reports.items()):
            return False
        for month, (report, _) in reports.items():
            digest = digest_of(self.owner, row.table, report.manifest.columns, month)
            if digest.difference(report.source):
                return False
        found = self.owner.execute(sql.SQL("SELECT count(*) FROM {}").format(row.table.identifier)).fetchone()
        return found is not None and found[0] == sum(report.source.rows for report, _ in reports.values())

    def record_dropping(self, row: _Row, reports: dict[Month, tuple[MonthReport, Digest]]) -> None:
        with self.shard.transaction() as connection:
            connection.execute("DELETE FROM archive.pruned_months WHERE prune_id = %s", (row.id,))
            for month, (report, gone) in reports.items():
                connection.execute(
                    COMPARED.encode(),
                    {
                        **self.identity(),
                        "id": row.id,
                        "month": month.partition_key,
                        "rows": report.source.rows,
                        "row_digest": report.source.value,
                        "gone_rows": gone.rows,
                        "gone_digest": gone.value,
                        "manifest_key": report.found.key,
                        "manifest_sha256": report.found.sha256,
                    },
                )
            connection.execute(RECORD, {"id": row.id, "state": "dropping", "reason": None})

    # --- refusing

    def refuse(self, row: _Row, reason: str) -> Pruned:
        at = self.whereabouts(row)
        outcome = Outcome.REFUSED
        if at is not None and at.parent is None and at.at_its_name == row.oid:
            try:
                self.put_back(row)
                outcome, reason = Outcome.PUT_BACK, f"{reason}; {row} was attached again"
            except UserError as error:
                reason = f"{reason}; {error}"
        logger.warning("the prune of %s was refused: %s", row, reason)
        self.record(row, "refused", reason)
        return self.report(row, outcome, reason)

    def put_back(self, row: _Row) -> None:
        """Attach the partition where it was; the CHECK that a detach leaves spares reading it."""
        stays = f"{row} stays detached, whole and archived"
        self.restore_foreign_keys(row, stays)

        def swap() -> None:
            table = self.target.table.identifier
            # The table first, then its partitions, as readers do; the other way round they deadlock.
            self.owner.execute(sql.SQL("LOCK TABLE ONLY {} IN ACCESS EXCLUSIVE MODE").format(table))
            for late in self.in_its_place(row):
                child = late.table.identifier
                self.owner.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(child))
                if self.owner.execute(sql.SQL("SELECT FROM {} LIMIT 1").format(child)).rowcount:
                    raise _StoppedError(f"{stays}, because late rows came to {late} in its place")
                self.owner.execute(sql.SQL("ALTER TABLE {} DETACH PARTITION {}").format(table, child))
                self.owner.execute(sql.SQL("DROP TABLE {}").format(child))
            attach(self.owner, self.target.table, row.table, row.from_at, row.to_at)

        self.patiently(stays, swap)

    def restore_foreign_keys(self, row: _Row, stays: str) -> None:
        """Add what was dropped, validated before the ATTACH, which would read the table under a lock otherwise."""
        values = {"parent": self.parent, "child": row.oid}
        for name, definition in self.owner.execute(LOST_FOREIGN_KEYS, values).fetchall():
            table, constraint = row.table.identifier, sql.Identifier(name)
            add = sql.SQL("ALTER TABLE {} ADD CONSTRAINT {} {} NOT VALID").format(
                table, constraint, sql.SQL(definition)
            )
            self.patiently(stays, self.executing(add))
            try:
                self.owner.execute(sql.SQL("ALTER TABLE {} VALIDATE CONSTRAINT {}").format(table, constraint))
            except psycopg.errors.ForeignKeyViolation:
                raise _StoppedError(f"{stays}, because rows that {name} refers to were deleted meanwhile") from None

    # --- locks and leases

    @contextmanager
    def leases(self, months: Sequence[Month]) -> Iterator[list[Lease]]:
        """The leases on months, so that no export of theirs overlaps."""
        with ExitStack() as stack:
            yield [stack.enter_context(lease(self.shard, self.target.table, month)) for month in months]

    def executing(self, statement: sql.Composed) -> Callable[[], None]:
        def execute() -> None:
            self.owner.execute(statement)

        return execute

    def patiently(self, otherwise: str, work: Callable[[], T]) -> T:
        """Do something in one short transaction that never makes others wait longer than the lock timeout."""

        def attempt() -> T:
            with self.owner.transaction():
                self.owner.execute(
                    sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(self.patience.lock_timeout))
                )
                return work()

        busy = (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected)
        try:
            return self.retrying(tenacity.retry_if_exception_type(busy), reraise=True)(attempt)
        except busy:
            raise _StoppedError(
                f"{otherwise}: others held a lock through {self.patience.attempts} attempts; end them "
                "(pg_stat_activity), or wait for the next run"
            ) from None

    def retrying(self, when: tenacity.retry_base, *, reraise: bool = False) -> tenacity.Retrying:
        patience = self.patience
        return tenacity.Retrying(
            sleep=patience.sleep,
            wait=tenacity.wait_exponential_jitter(
                patience.first_wait, patience.longest_wait, jitter=patience.first_wait
            ),
            stop=tenacity.stop_after_attempt(patience.attempts),
            retry=when,
            reraise=reraise,
        )


def _confirm(held: Iterable[Lease]) -> None:
    for each in held:
        each.confirm()


def _minus(whole: Digest, part: Digest) -> Digest:
    """Rows and digest of what is left; the first and last instant are not known then."""
    return Digest(whole.rows - part.rows, whole.value - part.value)


def _overlap(row: _Row, partition: MonthPartition) -> bool:
    begins_before = partition.from_at is None or partition.from_at < row.to_at
    return begins_before and (row.from_at is None or row.from_at < partition.to_at) and partition.oid != row.oid


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
    target = Target(
        table=SourceTable.parse(settings.archive_table),
        bucket=ArchiveBucket.from_settings(settings),
        layout=Layout(settings.archive_prefix),
        grace=timedelta(seconds=settings.archive_grace_seconds),
        parallelism=settings.archive_parallelism,
        signer=signer_from(settings),
    )
    failed = False
    with DatabaseRouter.from_settings(load(DatabaseSettings), application_name="prune") as router:
        for shard in (router.shard(options.shard),) if options.shard else router.shards():
            match options.command:
                case "status":
                    _show(
                        examine(shard, target, policy), f"{target.table} in {shard.name}, ARCHIVE_PRUNE={policy.mode}"
                    )
                case "propose":
                    if policy.mode == "off":
                        raise UserError("ARCHIVE_PRUNE is off; set it to propose to have partitions proposed")
                    _show(
                        propose(shard, target, policy), f"{target.table} in {shard.name}, ARCHIVE_PRUNE={policy.mode}"
                    )
                case "approve":
                    is_month = MONTH.fullmatch(options.what) is not None
                    what = Month.parse(options.what, policy.zone) if is_month else options.what
                    for name in approve(shard, target.table, what, options.by):
                        print(f"approved: {name}")
                case _:
                    month = Month.parse(options.month, policy.zone) if options.month else None
                    pruned = run(shard, target, policy, month=month, dry_run=options.dry_run)
                    _print(pruned)
                    failed = failed or any(
                        each.outcome in (Outcome.REFUSED, Outcome.STOPPED, Outcome.PUT_BACK) for each in pruned
                    )
    return 1 if failed else 0


if __name__ == "__main__":
    run_command(main)
