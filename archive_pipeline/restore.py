"""Restore: archived rows back into Postgres, whole months or one tenant's, proved equal before they are committed.

Belongs here: the plan, the table the rows go to, proving them, attaching a month, and
``python -m archive_pipeline.restore``. Does not: how stored fields read as Postgres's values
(`archive_pipeline.copy_text`), or the archive for queries (`archive_pipeline.query`).

::

    lease -> table of its own in the private schema (no grants, row-level security on) -> each part: download, SHA-256
          -> COPY, columns by name -> digest by Postgres over what it holds now = digest of the archive -> commit
          -> with attach: one short transaction puts the table in the place of the month's late partition

A month is one transaction: it is there whole and proved, or not at all. What was restored before is recognised by its
digest and left alone.
"""

import argparse
import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TypeVar
from uuid import UUID

import psycopg
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tenacity
from psycopg import sql

from archive_pipeline import manifest as manifests
from archive_pipeline.columns import Column
from archive_pipeline.copy_text import copy_text
from archive_pipeline.digest import Digest, ParquetReader, postgres_column_digests
from archive_pipeline.errors import RestoreError
from archive_pipeline.ledger import lease
from archive_pipeline.manifest import Part, Published
from archive_pipeline.months import Month
from archive_pipeline.premade_months import attach as attach_partition
from archive_pipeline.premade_months import partitions_of
from archive_pipeline.publication import Target, scratch
from archive_pipeline.snapshot import SESSION, SourceTable, digest_of
from scaling.databases import Connection, DatabaseRouter, Shard
from scaling.errors import UserError, run_command
from scaling.settings import ArchiveSettings, DatabaseSettings, load

T = TypeVar("T")

PRIVATE_SCHEMA = "audit_partitions"
# In the name of every table that a restore makes of its own accord.
RESTORED = "_restored_"
BATCH_BYTES = 8 << 20
# Compressed Parquet to a table with its indexes, where there are no statistics to go by; measured 6 to 11.
EXPANSION = 10
LOCK_TIMEOUT = "2s"
LOCK_ATTEMPTS = 10
LONGEST_WAIT_SECONDS = 8.0
LOCKED = (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected)

# A partitioned parent itself has size 0, so the sizes of the whole tree are added up.
BYTES_AND_ROWS = """
SELECT coalesce(sum(pg_total_relation_size(c.oid)), 0)::bigint, coalesce(sum(greatest(c.reltuples, 0)), 0)::bigint
FROM pg_class c
WHERE c.oid = %(table)s::regclass OR c.oid IN (SELECT relid FROM pg_partition_tree(%(table)s::regclass) WHERE isleaf)
"""

ATTRIBUTES = """
SELECT attname, attnotnull AND NOT atthasdef, attnotnull, attgenerated <> ''
FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum
"""

GRANTEES = """
SELECT DISTINCT coalesce(r.rolname, '')
FROM pg_class c, aclexplode(c.relacl) a LEFT JOIN pg_roles r ON r.oid = a.grantee
WHERE c.oid = %s::regclass AND a.grantee <> c.relowner
"""

KIND = "SELECT relkind::text, relreplident::text FROM pg_class WHERE oid = %s::regclass"

FOREIGN_KEYS = """
SELECT conname, pg_get_constraintdef(oid), confrelid::regclass::text FROM pg_constraint
WHERE conrelid = %s::regclass AND contype = 'f' ORDER BY conname
"""


class Outcome(StrEnum):
    """What became of a month."""

    PLANNED = "planned"
    RESTORED = "restored"
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True)
class Restored:
    """One month, as it would be or was restored.

    Attributes:
        month: ``YYYY-MM``.
        outcome: what was done; nothing when it was only planned.
        table: that the rows go to.
        rows: of the archive; of the tenant, where one was asked for.
        objects: to be read.
        size: bytes of these objects.
        disk_bytes: estimate of what the rows take in Postgres, indexes included.
        attached: whether the table is the month's partition.
        kept_rows: of the late partition, that are in the restored one now.
    """

    month: str
    outcome: Outcome
    table: SourceTable
    rows: int
    objects: int
    size: int
    disk_bytes: int
    attached: bool = False
    kept_rows: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a month has come.

    Attributes:
        month: ``YYYY-MM``.
        rows: sent to Postgres.
        of: to be sent.
    """

    month: str
    rows: int
    of: int


@dataclass(frozen=True, slots=True)
class _Job:
    """One month on its way."""

    target: Target
    month: Month
    found: Published
    tenant: tuple[str, str] | None
    into: SourceTable
    renamed: Mapping[str, str]
    on_progress: Callable[[Progress], None]
    sleep: Callable[[float], None]

    @property
    def columns(self) -> tuple[Column, ...]:
        """The archived columns under the names that they have in Postgres now."""
        columns = self.found.manifest.columns
        return tuple(replace(column, source=self.renamed.get(column.source, column.source)) for column in columns)

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is to be read."""
        return self.found.manifest.parts

    def error(self, finding: str, columns: Sequence[str] = ()) -> RestoreError:
        """What stopped it."""
        return RestoreError(self.month.name, finding, columns)


def restore(
    shard: Shard,
    target: Target,
    months: Sequence[Month],
    *,
    tenant: str | None = None,
    into: SourceTable | None = None,
    attach: bool = False,
    dry_run: bool = True,
    renamed: Mapping[str, str] | None = None,
    schema: str = PRIVATE_SCHEMA,
    on_progress: Callable[[Progress], None] = lambda _: None,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Restored]:
    """Put archived months, or one tenant's rows of them, back into Postgres.

    Args:
        shard: whose rows they are and where they go.
        target: the archive.
        months: one or more.
        tenant: only this tenant's rows; None is every tenant's.
        into: table for all months, created where it is missing; None makes one of each month in `schema`.
        attach: whether the table becomes the month's partition, in place of its late one.
        dry_run: whether to say only what would be done.
        renamed: present names of archived columns that were renamed since, by their archived names.
        schema: private schema of the tables that are made.
        on_progress: told after each batch.
        sleep: waits for locks.

    Returns:
        One entry for each month.

    Raises:
        RestoreError: the rows cannot be put there or are not what was archived; the month's transaction is undone.
        UserError: a month is not archived, or a setting, privilege or server is in the way.
    """
    if attach and (tenant is not None or into is not None):
        raise UserError("only a whole month in a table of its own can be attached; leave out the tenant and --into")
    done = []
    for month in months:
        found = _newest(target, shard, month)
        chosen = _tenant(found, tenant)
        table = into or SourceTable(schema, _name(target.table, month, tenant))
        job = _Job(target, month, found, chosen, table, renamed or {}, on_progress, sleep)
        planned = _plan(shard, job)
        if dry_run:
            done.append(planned)
            continue
        with lease(shard, target.table, month):
            report = _restore(shard, job, planned, attach=attach)
            done.append(_attach(shard, job, report) if attach else report)
    return done


def _newest(target: Target, shard: Shard, month: Month) -> Published:
    found = manifests.newest(manifests.published(target.bucket, target.layout, month=month))
    newest = next((each for each in found if each.manifest.shard == shard.name), None)
    if newest is None:
        raise UserError(f"month {month.name} of {target.table} is not archived in s3://{target.bucket.name}")
    if (newest.manifest.table, newest.manifest.month) != (str(target.table), month):
        raise UserError(
            f"s3://{target.bucket.name}/{newest.key} lists {newest.manifest.table} in time zone "
            f"{newest.manifest.month.zone}, not {target.table} in {month.zone}"
        )
    return newest


def canonical(column: Column, value: str) -> str:
    """A value as it is stored, so that two spellings of one id do not differ.

    Args:
        column: it is of.
        value: as somebody wrote it.

    Raises:
        UserError: it is not a value of the column, or rows cannot be chosen by such a column.
    """
    try:
        match column.kind:
            case "uuid":
                return str(UUID(value))
            case "integer" | "bigint":
                return str(int(value))
            case "text" | "inet":
                return value
    except ValueError:
        raise UserError(f"the value given for {column.source} is not of type {column.postgres_type}") from None
    raise UserError(f"rows cannot be chosen by {column.source}, whose type is {column.postgres_type}")


def _tenant(found: Published, tenant: str | None) -> tuple[str, str] | None:
    if tenant is None:
        return None
    column = next(column for column in found.manifest.columns if column.source == "tenant_id")
    return column.exact.name, canonical(column, tenant)


def _name(table: SourceTable, month: Month, tenant: str | None) -> str:
    suffix = f"{RESTORED}{month.name.replace('-', '_')}"
    if tenant is not None:
        suffix += f"_{hashlib.sha256(tenant.lower().encode()).hexdigest()[:8]}"
    return f"{table.name.encode()[: 63 - len(suffix)].decode(errors='ignore')}{suffix}"


def _plan(shard: Shard, job: _Job) -> Restored:
    manifest = job.found.manifest
    rows = manifest.digest.rows
    if job.tenant is not None:
        with scratch(job.target) as directory, ParquetReader(directory) as reader:
            rows = sum(
                (reader.digest(manifest.columns, file, job.tenant) for _, file in _downloaded(job, directory)),
                Digest(),
            ).rows
    share = rows / manifest.digest.rows if manifest.digest.rows else 0
    with shard.transaction() as connection:
        row = connection.execute(BYTES_AND_ROWS, {"table": _regclass(connection, job.target.table)}).fetchone()
    size, tuples = row or (0, 0)
    disk = size / tuples * rows if tuples else manifest.size * EXPANSION * share
    return Restored(
        job.month.name, Outcome.PLANNED, job.into, rows, len(manifest.parts), manifest.size, disk_bytes=round(disk)
    )


def _downloaded(job: _Job, directory: Path) -> Iterator[tuple[Part, Path]]:
    """Each part as a local file that holds the bytes that were signed, one at a time."""
    file = directory / "part.parquet"
    for part in job.parts:
        try:
            sha256 = job.target.bucket.download(part.key, file, part.version_id)
        except FileNotFoundError:
            raise job.error(f"{part.key} is missing from the bucket") from None
        if sha256 != part.sha256:
            raise job.error(f"{part.key} holds other bytes than its manifest says")
        yield part, file
        file.unlink()


# -- into a table ----------------------------------------------------------------------------------------------------


def _restore(shard: Shard, job: _Job, planned: Restored, *, attach: bool) -> Restored:
    with (
        scratch(job.target) as directory,
        ParquetReader(directory) as reader,
        shard.owner(autocommit=False) as connection,
        _sentences(job),
    ):
        _set_session(connection)
        if not _row(connection, "SELECT pg_try_advisory_xact_lock(hashtextextended(%s, 0))", f"restore {job.into}")[0]:
            raise UserError(f"another restore into {job.into} is running; wait for it to end")
        created = _prepare(connection, job, attach=attach)
        before = _held(connection, job)
        expected = job.found.manifest.digest if job.tenant is None else None
        attached = attach and not created and _is_partition(connection, job)
        if not created and before.rows and expected is not None and not before.difference(expected):
            return replace(planned, outcome=Outcome.UNCHANGED, attached=attached)
        if attached:
            # Rows that came after the month was attached are welcome in its partition.
            if before.rows > planned.rows:
                return replace(planned, outcome=Outcome.UNCHANGED, attached=True)
            finding = before.difference(job.found.manifest.digest)
            raise job.error(f"{job.into} is the month's partition and holds {finding}")
        selected = _load(connection, job, reader, directory, planned.rows, dry=bool(before.rows))
        expected = expected or selected
        after = before if before.rows else _held(connection, job)
        if finding := after.difference(expected):
            if before.rows:
                raise job.error(
                    f"{job.into} holds {finding}; give another table, or drop this one if nothing else is in it"
                )
            raise job.error(f"{job.into} would hold {finding}", _differing(connection, job, reader, directory))
        if before.rows:
            return replace(planned, outcome=Outcome.UNCHANGED)
        if created and job.tenant is not None:
            _require_no_other_tenant(connection, job)
        if created:
            connection.execute(sql.SQL("ANALYZE {}").format(job.into.identifier))
    return replace(planned, outcome=Outcome.RESTORED)


def _set_session(connection: Connection) -> None:
    for name, value in SESSION.items():
        connection.execute(sql.SQL("SET LOCAL {} = {}").format(sql.Identifier(name), sql.Literal(value)))


def _row(connection: Connection, query: str, *values: object) -> tuple[object, ...]:
    row = connection.execute(query.encode(), values).fetchone()
    assert row is not None  # noqa: S101 - these queries have one row
    return row


def _regclass(connection: Connection, table: SourceTable) -> str:
    return table.identifier.as_string(connection)


def _exists(connection: Connection, table: SourceTable) -> bool:
    return _row(connection, "SELECT to_regclass(%s) IS NOT NULL", _regclass(connection, table))[0] is True


def _prepare(connection: Connection, job: _Job, *, attach: bool) -> bool:
    """Make the table, unless it is there.

    Returns:
        Whether it was made.
    """
    if _exists(connection, job.into):
        return False
    into, source = job.into.identifier, job.target.table.identifier
    if not _row(connection, "SELECT to_regnamespace(%s) IS NOT NULL", f'"{job.into.schema}"')[0]:
        connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(job.into.schema)))
    # An identity would keep the table from being attached.
    connection.execute(sql.SQL("CREATE TABLE {} (LIKE {} INCLUDING ALL EXCLUDING IDENTITY)").format(into, source))
    connection.execute(sql.SQL("ALTER TABLE {} ENABLE ROW LEVEL SECURITY").format(into))
    # Default privileges, as old Supabase projects have them, would let everybody read it.
    for (grantee,) in connection.execute(GRANTEES, (_regclass(connection, job.into),)).fetchall():
        role = sql.Identifier(grantee) if grantee else sql.SQL("PUBLIC")
        connection.execute(sql.SQL("REVOKE ALL ON {} FROM {}").format(into, role))
    present = {name for name, *_ in connection.execute(ATTRIBUTES, (_regclass(connection, job.into),))}
    gone = [column for column in job.columns if column.source not in present]
    if gone and attach:
        names = [column.source for column in gone]
        raise job.error(
            f"{job.target.table} no longer has {', '.join(names)}, so a table that has cannot be its partition; "
            "restore without --attach, or say what the column is called now with --rename",
            names,
        )
    for column in gone:
        kind = _type(connection, column)
        connection.execute(
            sql.SQL("ALTER TABLE {} ADD COLUMN {} {}").format(into, sql.Identifier(column.source), sql.SQL(kind))
        )
    if attach:
        # Attaching then need not look at every row.
        connection.execute(
            sql.SQL("ALTER TABLE {} ADD CONSTRAINT {} CHECK (created_at >= {} AND created_at < {})").format(
                into, _bounds_check(job), sql.Literal(job.month.start), sql.Literal(job.month.end)
            )
        )
    return True


def _bounds_check(job: _Job) -> sql.Identifier:
    return sql.Identifier(f"restored_{job.month.name.replace('-', '_')}")


def _type(connection: Connection, column: Column) -> str:
    # What to_regtype accepts is the name of one type and nothing else, though it comes from an object in a bucket.
    try:
        with connection.transaction():
            known = _row(connection, "SELECT to_regtype(%s) IS NOT NULL", column.postgres_type)[0]
    except psycopg.Error:
        known = False
    return column.postgres_type if known else "text"


@contextmanager
def _rows_of(connection: Connection, job: _Job) -> Iterator[SourceTable]:
    """The restored rows: of the month in the table, and of the tenant where one was asked for."""
    if job.tenant is None:
        yield job.into
        return
    view = SourceTable("pg_temp", "restored_rows")
    connection.execute(
        sql.SQL("CREATE OR REPLACE TEMP VIEW restored_rows AS SELECT * FROM {} WHERE tenant_id::text = {}").format(
            job.into.identifier, sql.Literal(job.tenant[1])
        )
    )
    yield view
    connection.execute("DROP VIEW pg_temp.restored_rows")


def _held(connection: Connection, job: _Job) -> Digest:
    present = {name for name, *_ in connection.execute(ATTRIBUTES, (_regclass(connection, job.into),))}
    if missing := [column.source for column in job.columns if column.source not in present]:
        raise job.error(
            f"{job.into} has no {', '.join(missing)}; add the column, or say what it is called now with --rename",
            missing,
        )
    with _rows_of(connection, job) as rows:
        return digest_of(connection, rows, job.columns, job.month)


def _load(connection: Connection, job: _Job, reader: ParquetReader, directory: Path, rows: int, *, dry: bool) -> Digest:
    """Send the rows to Postgres, unless dry, and let DuckDB say what they add up to."""
    columns = job.found.manifest.columns
    attributes = connection.execute(ATTRIBUTES, (_regclass(connection, job.into),)).fetchall()
    sources = {column.source for column in job.columns}
    if missing := [name for name, required, *_ in attributes if required and name not in sources]:
        raise job.error(
            f"{', '.join(missing)} of {job.into} must not be NULL and was not archived; give it a default, or restore "
            "into a table of its own",
            missing,
        )
    generated = {name for name, *_, generated in attributes if generated}
    written = [(mine, its) for mine, its in zip(columns, job.columns, strict=True) if its.source not in generated]
    # A column that was added since is NULL where it may be: its default need not be what these rows would have had.
    added = [name for name, _, not_null, made in attributes if name not in sources and not not_null and not made]
    expected, sent = Digest(), 0
    with _copying(connection, job, [its for _, its in written], added) as write:
        for _, file in _downloaded(job, directory):
            expected += reader.digest(columns, file, job.tenant) if job.tenant else reader.digest(columns, file)
            if dry:
                continue
            for batch in _batches(file, columns, job.tenant):
                write(copy_text([mine for mine, _ in written], batch, nulls=len(added)))
                sent += batch.num_rows
                job.on_progress(Progress(job.month.name, sent, rows))
    return expected


def _batches(file: Path, columns: Sequence[Column], tenant: tuple[str, str] | None) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(file, memory_map=True) as parquet:
        names = [column.exact.name for column in columns if column.exact.name in parquet.schema_arrow.names]
        for number in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(number)
            if tenant is not None and not _may_hold(group, tenant):
                continue
            rows = max(1, group.num_rows * BATCH_BYTES // max(group.total_byte_size, 1))
            for batch in parquet.iter_batches(rows, row_groups=[number], columns=names, use_threads=False):
                if tenant is not None:
                    text = batch.column(tenant[0]).cast(pa.string())
                    batch = batch.filter(pc.equal(text, tenant[1]))  # noqa: PLW2901 - the same rows, fewer
                if batch.num_rows:
                    yield batch


def _may_hold(group: pq.RowGroupMetaData, tenant: tuple[str, str]) -> bool:
    for number in range(group.num_columns):
        column = group.column(number)
        if column.path_in_schema == tenant[0] and column.is_stats_set and column.statistics.has_min_max:
            first, last = column.statistics.min, column.statistics.max
            return not isinstance(first, str) or first <= tenant[1] <= last
    return True


@contextmanager
def _copying(
    connection: Connection, job: _Job, columns: Sequence[Column], added: Sequence[str]
) -> Iterator[Callable[[bytes], None]]:
    """A COPY into the table; where there are arrays, batch by batch through one that holds them as JSON text."""
    names = [*(column.source for column in columns), *added]
    listed = sql.SQL(", ").join(map(sql.Identifier, names))
    copying = sql.SQL("COPY {} ({}) FROM STDIN")
    arrays = {column.source for column in columns if column.kind == "json"}
    into = job.into.identifier
    with connection.cursor() as cursor:
        if not arrays:
            with cursor.copy(copying.format(into, listed)) as copy:
                yield copy.write
            return

        def cast(name: str) -> sql.Composed:
            return sql.SQL("{0}::text AS {0}" if name in arrays else "{0}").format(sql.Identifier(name))

        def value(name: str) -> sql.Composed:
            form = (
                "(json_populate_record(NULL::{t}, json_build_object({n}, {c}::json))).{c}" if name in arrays else "{c}"
            )
            return sql.SQL(form).format(t=into, n=sql.Literal(name), c=sql.Identifier(name))

        cursor.execute(
            sql.SQL("CREATE TEMP TABLE restored_batch ON COMMIT DROP AS SELECT {} FROM {} WITH NO DATA").format(
                sql.SQL(", ").join(map(cast, names)), into
            )
        )
        move = sql.SQL("INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM restored_batch").format(
            into, listed, sql.SQL(", ").join(map(value, names))
        )

        def write(text: bytes) -> None:
            with cursor.copy(copying.format(sql.Identifier("pg_temp", "restored_batch"), listed)) as copy:
                copy.write(text)
            cursor.execute(move)
            cursor.execute("TRUNCATE restored_batch")

        yield write
        cursor.execute("DROP TABLE restored_batch")


def _require_no_other_tenant(connection: Connection, job: _Job) -> None:
    assert job.tenant is not None  # noqa: S101 - narrows the type
    query = sql.SQL("SELECT count(*) FROM {} WHERE tenant_id::text IS DISTINCT FROM {}").format(
        job.into.identifier, sql.Literal(job.tenant[1])
    )
    row = connection.execute(query).fetchone()
    if row is None or row[0]:
        raise job.error("rows of other tenants came with those of the one that was asked for")


def _differing(connection: Connection, job: _Job, reader: ParquetReader, directory: Path) -> list[str]:
    """The columns in which restored rows differ from the archived; none where it cannot be told."""
    if job.tenant is not None:
        return []
    archived = [0] * len(job.columns)
    for _, file in _downloaded(job, directory):
        found = reader.column_digests(job.found.manifest.columns, [file])
        archived = [before + here for before, here in zip(archived, found, strict=True)]
    rows = sql.SQL("(SELECT * FROM {} WHERE created_at >= {} AND created_at < {})").format(
        job.into.identifier, sql.Literal(job.month.start), sql.Literal(job.month.end)
    )
    restored = connection.execute(postgres_column_digests(job.columns, rows)).fetchone() or ()
    return [c.source for c, a, b in zip(job.columns, archived, restored, strict=True) if a != int(b)]


@contextmanager
def _sentences(job: _Job) -> Iterator[None]:
    """Postgres's refusals without the rows that they quote."""
    try:
        yield
    except LOCKED:
        raise
    except psycopg.errors.InsufficientPrivilege as error:
        raise UserError(
            f"the role of DATABASE_OWNER_URL may not do this ({error.diag.message_primary}); it must own "
            f"{job.target.table}, and may need CREATE on the database and on schema {job.into.schema}"
        ) from None
    except psycopg.errors.IntegrityError as error:
        raise job.error(
            f"constraint {error.diag.constraint_name or error.diag.column_name} of {job.into} refuses archived rows; "
            "restore into a table without it (--into)",
            [error.diag.column_name] if error.diag.column_name else (),
        ) from None
    except (psycopg.DataError, psycopg.ProgrammingError, psycopg.NotSupportedError) as error:
        at = re.search(r"column ([^:]+):", error.diag.context or "")
        raise job.error(
            f"Postgres refuses archived values ({error.sqlstate}, {type(error).__name__}) in {job.into}; restore "
            "into a table whose columns have the archived types (--into)",
            [at[1]] if at else (),
        ) from None
    except psycopg.errors.DiskFull:
        raise job.error("the disk of Postgres is full") from None
    except psycopg.OperationalError:
        raise job.error("Postgres broke off (a restart, a failover, or a cancelled query); run it again") from None


# -- as a partition --------------------------------------------------------------------------------------------------


def _is_partition(connection: Connection, job: _Job) -> bool:
    return any(each.table == job.into for each in partitions_of(connection, job.target.table))


def _attach(shard: Shard, job: _Job, report: Restored) -> Restored:
    if not report.attached:
        _take_over_foreign_keys(shard, job)
        kept = _patiently(job, str(job.target.table), lambda: _swap(shard, job))
        report = replace(report, outcome=Outcome.RESTORED, attached=True, kept_rows=kept)
    # Asked for again when a run died before it.
    with shard.transaction() as connection:
        connection.execute(
            "UPDATE archive.months SET pruned_at = NULL, pruned_rows = NULL "
            "WHERE source_table = %s AND shard = %s AND month = %s AND pruned_at IS NOT NULL",
            (str(job.target.table), shard.name, job.month.partition_key),
        )
    return report


def _patiently(job: _Job, table: str, work: Callable[[], T]) -> T:
    """Repeat what needs a lock for a moment, so that nobody queues behind it for longer than LOCK_TIMEOUT."""
    retrying = tenacity.Retrying(
        sleep=job.sleep,
        wait=tenacity.wait_random_exponential(multiplier=0.25, max=LONGEST_WAIT_SECONDS),
        stop=tenacity.stop_after_attempt(LOCK_ATTEMPTS),
        retry=tenacity.retry_if_exception_type(LOCKED),
        reraise=True,
    )
    try:
        return retrying(work)
    except LOCKED:
        raise UserError(
            f"{table} was in use {LOCK_ATTEMPTS} times, so {job.into} holds the month but is not attached; run it "
            "again when no long query reads the table"
        ) from None


def _take_over_foreign_keys(shard: Shard, job: _Job) -> None:
    """Give the table the parent's foreign keys, checked, so that attaching finds them and scans nothing."""
    with shard.owner() as connection, _sentences(job):
        connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT}'".encode())
        present = {name for name, *_ in connection.execute(FOREIGN_KEYS, (_regclass(connection, job.into),))}
        wanted = connection.execute(FOREIGN_KEYS, (_regclass(connection, job.target.table),)).fetchall()
        for name, definition, referenced in wanted:
            key, into = sql.Identifier(name), job.into.identifier
            add = sql.SQL("ALTER TABLE {} ADD CONSTRAINT {} {} NOT VALID").format(into, key, sql.SQL(definition))
            validate = sql.SQL("ALTER TABLE {} VALIDATE CONSTRAINT {}").format(into, key)
            if name not in present:
                _patiently(job, referenced, partial(connection.execute, add))
            try:
                _patiently(job, referenced, partial(connection.execute, validate))
            except psycopg.errors.ForeignKeyViolation:
                raise UserError(
                    f"month {job.month.name} is in {job.into} but cannot be attached: some of its rows refer to "
                    f"rows of {referenced} that are gone ({name})"
                ) from None


def _swap(shard: Shard, job: _Job) -> int:
    """Put the restored table in the place of the month's partition, in one transaction.

    Returns:
        How many rows of the partition before are in the table now.
    """
    into, parent = job.into.identifier, job.target.table.identifier
    with shard.owner(autocommit=False) as connection, _sentences(job):
        _set_session(connection)
        connection.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'".encode())
        kind, identity = _row(connection, KIND, _regclass(connection, job.target.table))
        if kind != "p":
            raise UserError(f"{job.target.table} is not partitioned; {job.into} holds the month, query it there")
        connection.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(parent))
        before = None
        for each in partitions_of(connection, job.target.table):
            if not each.overlaps(job.month):
                continue
            if each.pending_detach or (each.from_at, each.to_at) != (job.month.start, job.month.end):
                why = "it and is half detached; run the prune again" if each.pending_detach else "more than this month"
                raise UserError(f"month {job.month.name} is in {job.into} but cannot be attached: {each} holds {why}")
            before = each.table
        kept = 0
        if before is not None:
            connection.execute(sql.SQL("ALTER TABLE {} DETACH PARTITION {}").format(parent, before.identifier))
            kept = _keep(connection, job, before)
        if identity in ("f", "n"):
            form = "FULL" if identity == "f" else "NOTHING"
            connection.execute(sql.SQL("ALTER TABLE {} REPLICA IDENTITY {}").format(into, sql.SQL(form)))
        attach_partition(connection, job.target.table, job.into, job.month.start, job.month.end)
        connection.execute(sql.SQL("ALTER TABLE {} DROP CONSTRAINT IF EXISTS {}").format(into, _bounds_check(job)))
        if before is not None:
            connection.execute(sql.SQL("DROP TABLE {}").format(before.identifier))
    return kept


def _keep(connection: Connection, job: _Job, before: SourceTable) -> int:
    """Take the rows of the partition before over; of those that the archive has as well, Postgres's copy stays."""
    into, late = job.into.identifier, before.identifier
    archived = sql.SQL(", ").join(sql.Identifier("r", column.source) for column in job.columns)
    present = sql.SQL(", ").join(sql.Identifier("l", column.source) for column in job.columns)
    row = connection.execute(
        sql.SQL(
            "SELECT count(*) FROM {} l JOIN {} r ON r.id = l.id AND r.created_at = l.created_at "
            "WHERE ROW({})::text IS DISTINCT FROM ROW({})::text"
        ).format(late, into, archived, present)
    ).fetchone()
    if row is None or row[0]:
        raise job.error(f"{row[0] if row else 0:,} row(s) of {before} differ from the archived rows of the same id")
    attributes = connection.execute(ATTRIBUTES, (_regclass(connection, before),)).fetchall()
    names = sql.SQL(", ").join(sql.Identifier(name) for name, *_, generated in attributes if not generated)
    connection.execute(
        sql.SQL("DELETE FROM {} r USING {} l WHERE r.id = l.id AND r.created_at = l.created_at").format(into, late)
    )
    return connection.execute(
        sql.SQL("INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM {}").format(into, names, names, late)
    ).rowcount


# -- the command -----------------------------------------------------------------------------------------------------


def _show(found: Sequence[Restored]) -> None:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    table = Table("month", "outcome", "table", "rows", "objects", "to read", "disk needed", "partition")
    for each in found:
        table.add_row(
            each.month,
            each.outcome.value,
            str(each.table),
            f"{each.rows:,}",
            str(each.objects),
            decimal(each.size),
            f"about {decimal(each.disk_bytes)}",
            f"yes, with {each.kept_rows:,} late rows" if each.attached else "no",
        )
    Console().print(table)


def months_between(first: Month, last: Month) -> list[Month]:
    """Every month from one to another, both included.

    Args:
        first: the earliest.
        last: the latest.

    Raises:
        UserError: they are in the wrong order.
    """
    if last < first:
        raise UserError(f"{last.name} is before {first.name}")
    months = [first]
    while months[-1] != last:
        months.append(months[-1].following)
    return months


def main(arguments: Iterable[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes them from the process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m archive_pipeline.restore",
        description="Put archived audit logs back into Postgres. Without --yes it only says what it would do.",
        epilog="example: python -m archive_pipeline.restore 2025-01 --to 2025-03 --tenant … --yes",
    )
    parser.add_argument("month", help="YYYY-MM")
    parser.add_argument("--to", metavar="YYYY-MM", help="last month of a range")
    parser.add_argument("--tenant", metavar="ID", help="only this tenant's rows")
    parser.add_argument("--into", metavar="SCHEMA.TABLE", help="default: a new private table of each month")
    parser.add_argument("--attach", action="store_true", help="make the table the month's partition again")
    parser.add_argument("--rename", metavar="OLD=NEW", action="append", default=[], help="a column renamed since")
    parser.add_argument("--shard", default="main", help="database; only of interest when there are several")
    parser.add_argument("--yes", action="store_true", help="do it")
    options = parser.parse_args(list(arguments) if arguments is not None else None)
    renamed = dict(pair.partition("=")[::2] for pair in options.rename)
    if options.into and "." not in options.into:
        raise UserError("--into must be schema.table")

    settings = load(ArchiveSettings)
    first = Month.parse(options.month, settings.archive_time_zone)
    last = Month.parse(options.to, settings.archive_time_zone) if options.to else first
    from rich.progress import Progress as Bar

    with DatabaseRouter.from_settings(load(DatabaseSettings), application_name="restore") as router, Bar() as bar:
        task = bar.add_task("", total=None)
        found = restore(
            router.shard(options.shard),
            Target.from_settings(settings),
            months_between(first, last),
            tenant=options.tenant,
            into=SourceTable.parse(options.into) if options.into else None,
            attach=options.attach,
            dry_run=not options.yes,
            renamed=renamed,
            schema=settings.archive_partition_schema,
            on_progress=lambda at: bar.update(task, description=at.month, completed=at.rows, total=at.of),
        )
    _show(found)
    if not options.yes:
        print("nothing was changed; run it with --yes to do it")
    elif options.attach and settings.archive_prune == "auto":
        print("ARCHIVE_PRUNE=auto takes old months out again; a legal hold keeps them")
    return 0


if __name__ == "__main__":
    run_command(main)
