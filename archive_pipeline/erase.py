"""Erase: a tenant's or a user's rows out of all archived months, so that the rest stays provable.

Belongs here: finding the rows, what is in the way, rewriting the parts that hold them, removing what held them before,
the record of the request, and ``python -m archive_pipeline.erase``. Does not: rows in Postgres, which are the SaaS's.

::

    rows by month, holds, Object Lock, what remains in Postgres -> refuse, or
    each month: lease -> affected parts rewritten without the rows -> digest(new) + digest(erased) = digest(old)
          -> upload, read back -> hashes of erased rows, manifest of a further generation, signed link
          -> old parts hidden, then every version of them and of the old salts removed

The manifest is the commit. Whatever a dead run left before it is removed by the next run; what it left after it, the
old parts, is derived from the manifests and removed then. So a request can be repeated until nothing of it is left.

What Athena sees meanwhile: an object is live as soon as it lies under the prefix, so between the upload of a month's
new parts and the moment its old ones are hidden it counts the rows that stay twice. What can be done outside of that
window is: rows are rewritten and verified on local disk before it opens, and old objects are hidden (one request each)
before their versions are removed. In it are the upload of the new parts, reading them back, and four small objects.
Removing first would show none of the rows instead, and a crash would lose them. Whoever reads through manifests
(`archive_pipeline.query`, `archive_pipeline.restore`) never sees either.

The old root stays provable: of an erased row the ``.erased`` object keeps the leaf hash, and the salt, without which a
leaf hash is nobody's personal data, is gone with the old seeds (`archive_pipeline.merkle.Punctured`).
"""

import argparse
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from itertools import islice
from pathlib import Path
from uuid import UUID, uuid4

import duckdb
import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
from psycopg import sql

from archive_pipeline import legal_holds, merkle, publication
from archive_pipeline import manifest as manifests
from archive_pipeline.columns import Column, discover
from archive_pipeline.digest import Digest, ParquetReader
from archive_pipeline.errors import ErasureError, ObjectLockedError
from archive_pipeline.ledger import Lease, lease
from archive_pipeline.legal_holds import Hold
from archive_pipeline.manifest import Manifest, Part, Published
from archive_pipeline.merkle import Punctured, Seeds
from archive_pipeline.months import Month
from archive_pipeline.objects import Version
from archive_pipeline.parts import write_part
from archive_pipeline.publication import Encoded, Target
from archive_pipeline.ranges import SCHEME, PartsFileSystem
from archive_pipeline.restore import RESTORED, canonical
from scaling.databases import Connection, DatabaseRouter, Shard
from scaling.errors import UserError, run_command
from scaling.settings import ArchiveSettings, DatabaseSettings, load

MEMORY = "1GB"
PART = re.compile(r"\d{4}-\d{5}-[0-9a-f]{16}\.parquet")

OPEN_REQUESTS = """
SELECT id, value_sha256 FROM archive.erasures
WHERE source_table = %s AND shard = %s AND column_name = %s AND finished_at IS NULL ORDER BY requested_at
"""

RECORD = """
INSERT INTO archive.erasures (id, source_table, shard, column_name, value_sha256, requested_by, reason)
VALUES (%s, %s, %s, %s, %s, %s, %s)
"""

NOTE = "UPDATE archive.erasures SET generations = generations || %s::jsonb WHERE id = %s"
NOTED = "SELECT generations FROM archive.erasures WHERE id = %s"
FINISH = "UPDATE archive.erasures SET finished_at = clock_timestamp(), months = %s, rows = %s WHERE id = %s"

# What is attached is seen through the table itself.
COPIES = """
SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'r' AND NOT c.relispartition AND position(%s IN c.relname) > 0
  AND starts_with(%s, split_part(c.relname, '_restored_', 1)) ORDER BY 1
"""

REMAINING = """
SELECT to_char(date_trunc('month', created_at AT TIME ZONE {zone}), 'YYYY-MM'), count(*)
FROM {table} WHERE {column} = {value} GROUP BY 1 ORDER BY 1
"""


class Step(StrEnum):
    """How far a month's erasure has come, beside the steps of `archive_pipeline.publication`."""

    REWRITTEN = "parts rewritten and verified on local disk"
    NOTED = "generation noted"
    HIDDEN = "old parts hidden from queries"
    REMOVED = "an old version removed"
    DONE = "nothing of the erased rows left in the month"


@dataclass(frozen=True, slots=True)
class Erasure:
    """What is to be erased.

    Attributes:
        column: of the table, ``tenant_id`` for a tenant.
        value: that its rows have there; kept nowhere.
        requested_by: who asked for it, for the record.
        reason: why, for the record; no personal data.
    """

    column: str
    value: str = field(repr=False)
    requested_by: str
    reason: str


@dataclass(frozen=True, slots=True)
class ErasedMonth:
    """One month that holds such rows.

    Attributes:
        month: ``YYYY-MM``.
        rows: to be erased, or erased.
        parts: that hold them and are rewritten.
        of_parts: that the month has.
        size: bytes of the parts to rewrite.
        obstacles: sentences that say why it cannot be erased now.
        generation: that was published without them; None when nothing was done.
        locked_until: when Object Lock lets its objects go, where it is what stands in the way.
    """

    month: str
    rows: int
    parts: int
    of_parts: int
    size: int
    obstacles: tuple[str, ...] = ()
    generation: int | None = None
    locked_until: datetime | None = None


@dataclass(frozen=True, slots=True)
class ErasureReport:
    """What a request came to, or would.

    Attributes:
        request: under which it is recorded; None for a dry run.
        months: that hold or held such rows.
        remaining: rows that Postgres still holds, by month.
        archived_months: names of all archived months of the table.
        removed_objects: versions that were removed from the bucket.
        copies: tables that restores made and that may hold the rows; only their owner can look.
    """

    request: UUID | None
    months: tuple[ErasedMonth, ...]
    remaining: Mapping[str, int]
    archived_months: frozenset[str]
    removed_objects: int = 0
    copies: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of all months."""
        return sum(month.rows for month in self.months)

    @property
    def obstacles(self) -> tuple[str, ...]:
        """Everything that is in the way."""
        return tuple(f"month {month.month}: {each}" for month in self.months for each in month.obstacles)

    @property
    def would_return(self) -> int:
        """Rows in Postgres of archived months: the next look at such a month takes them for late ones."""
        return sum(rows for month, rows in self.remaining.items() if month in self.archived_months)


@dataclass(frozen=True, slots=True)
class _Affected:
    """A month and the rows in it.

    Attributes:
        found: its newest manifest.
        rows: by number of the part.
        tenants: that these rows belong to.
        where: stored name and text of the field they are chosen by.
    """

    found: Published
    rows: Mapping[int, int]
    tenants: frozenset[str | None]
    where: tuple[str, str] | None


@dataclass(frozen=True, slots=True)
class _Rewritten:
    """A part without the rows.

    Attributes:
        encoded: what is left of it; None when nothing is.
        erased: what was taken out.
        punctured: what keeps its old root provable.
        ancestors: the same of parts that it took the place of before, by their number in the object read.
    """

    encoded: Encoded | None
    erased: Digest
    punctured: Punctured
    ancestors: Mapping[int, Punctured]


def erase(
    shard: Shard,
    target: Target,
    request: Erasure,
    *,
    dry_run: bool = True,
    on_progress: Callable[[str, int, int], None] = lambda *_: None,
    on_step: Callable[[StrEnum], None] = lambda _: None,
    new_id: Callable[[], UUID] = uuid4,
) -> ErasureReport:
    """Erase rows from every archived month of a table, or say what that would take.

    Args:
        shard: whose rows they are.
        target: the archive.
        request: which rows.
        dry_run: whether to say only what would be done.
        on_progress: told which month is next, and how many of how many are done.
        on_step: told after each step.
        new_id: makes the id of the request.

    Returns:
        The report. Rows in Postgres are left there and counted.

    Raises:
        LegalHoldError: rows are held; nothing was erased.
        ObjectLockedError: Object Lock keeps old objects; for ``compliance`` nothing was erased.
        ErasureError: an object is damaged or missing, or the numbers do not add up; that month is untouched.
        MonthBusyError: a month is being archived.
        UserError: the column cannot be used, or a server is in the way.
    """
    # Refused before anything is read: without it, an unknown column would look like no rows at all.
    published = _published(target, shard)
    _require_column(shard, target, published, request)
    months = [each.manifest.month for each in manifests.newest(published)]
    affected = [_affected(target, each, request) for each in manifests.newest(published)]
    with shard.transaction() as connection:
        now = _now(connection)
        plans = tuple(
            _plan(connection, target, each, _of_month(published, each.found), now) for each in affected if each.rows
        )
        remaining = _remaining(connection, target, months, request)
        held = _holds(connection, target, affected)
        copies = tuple(name for (name,) in connection.execute(COPIES, (RESTORED, target.table.name)))
    report = ErasureReport(None, plans, remaining, frozenset(month.name for month in months), copies=copies)
    if dry_run:
        return report
    legal_holds.refuse(held, "erased")
    if report.obstacles:
        until = max((plan.locked_until for plan in plans if plan.locked_until is not None), default=None)
        raise ObjectLockedError(f"nothing was erased: {'; '.join(report.obstacles)}", until)

    identifier = _begin(shard, target, request, new_id)
    removed, done = 0, {plan.month: plan for plan in plans}
    for number, month in enumerate(months):
        on_progress(month.name, number, len(months))
        was = _of_month(published, affected[number].found)
        if not affected[number].rows and not _superseded(target, was):
            continue
        with lease(shard, target.table, month) as mine:
            erased, objects = _erase_month(shard, target, month, mine, request, identifier, on_step)
        removed += objects
        done.pop(month.name, None)
        if erased is not None:
            done[month.name] = erased
    on_progress("", len(months), len(months))
    _finish(shard, target, identifier, months)
    return replace(report, request=identifier, months=tuple(done.values()), removed_objects=removed)


def value_hash(request: UUID, value: str) -> str:
    """What is kept of an erased value: keyed, so that equal values of two requests do not look alike.

    Args:
        request: its id.
        value: in its stored form.
    """
    return hashlib.sha256(f"{request}:{value}".encode()).hexdigest()


# -- what there is ---------------------------------------------------------------------------------------------------


def _published(target: Target, shard: Shard, month: Month | None = None) -> list[Published]:
    found = manifests.published(target.bucket, target.layout, month=month)
    mine = [each for each in found if each.manifest.shard == shard.name]
    for each in mine:
        if each.manifest.table != str(target.table):
            raise UserError(
                f"s3://{target.bucket.name}/{each.key} lists {each.manifest.table}, not {target.table}; correct "
                "ARCHIVE_TABLE or ARCHIVE_PREFIX"
            )
    return sorted(mine, key=lambda each: (each.manifest.month, each.manifest.generation))


def _of_month(published: Sequence[Published], found: Published) -> list[Published]:
    return [each for each in published if each.manifest.month == found.manifest.month]


def _column(manifest: Manifest, name: str) -> Column | None:
    return next((column for column in manifest.columns if column.source == name), None)


def _require_column(shard: Shard, target: Target, published: Sequence[Published], request: Erasure) -> None:
    known = [column for each in published if (column := _column(each.manifest, request.column)) is not None]
    if not known:
        with shard.transaction() as connection:
            known = [
                column
                for column in discover(connection, target.table.schema, target.table.name)
                if column.source == request.column
            ]
    if not known:
        raise UserError(f"{target.table} has no column {request.column}, and no archived month of it has")
    for column in known:
        canonical(column, request.value)


def _affected(target: Target, found: Published, request: Erasure) -> _Affected:
    """Count the rows in each part, reading no more of it than DuckDB asks for."""
    manifest = found.manifest
    column = _column(manifest, request.column)
    if column is None or not manifest.parts:
        return _Affected(found, {}, frozenset(), None)
    value = canonical(column, request.value)
    where = column.exact.name, value
    tenant = next(each.exact.name for each in manifest.columns if each.source == "tenant_id")
    keys = [f"{SCHEME}://{part.key}" for part in manifest.parts]
    # A text compared as it is lets DuckDB leave row groups out by their statistics.
    match = f"{_quoted(where[0])} = $value{'::BIGINT' if column.kind in ('integer', 'bigint') else ''}"
    files = PartsFileSystem(target.bucket, manifest.parts)
    with duckdb.connect(config={"memory_limit": MEMORY}) as database:
        database.register_filesystem(files)
        try:
            rows = database.execute(
                f"SELECT filename, count(*), list(DISTINCT {_quoted(tenant)}::VARCHAR) "  # noqa: S608 - names are quoted
                f"FROM read_parquet($keys, filename = true) WHERE {match} GROUP BY filename",
                {"keys": keys, "value": value},
            ).fetchall()
        except duckdb.Error:
            raise files.failure or ErasureError(
                f"a part of month {manifest.month.name} cannot be read; python -m archive_pipeline.audit says which"
            ) from None
    counts = {keys.index(name): count for name, count, _ in rows}
    tenants = frozenset(each for *_, listed in rows for each in [*listed, *([] if listed else [None])])
    return _Affected(found, counts, tenants, where)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _now(connection: Connection) -> datetime:
    row = connection.execute("SELECT clock_timestamp()").fetchone()
    assert row is not None  # noqa: S101 - it has one row
    now: datetime = row[0]
    return now


def _plan(
    connection: Connection, target: Target, affected: _Affected, published: Sequence[Published], now: datetime
) -> ErasedMonth:
    manifest = affected.found.manifest
    obstacles = [f"{hold} forbids it" for hold in _holds(connection, target, [affected])]
    until, locked = _locks(target, affected, published, now)
    return ErasedMonth(
        manifest.month.name,
        sum(affected.rows.values()),
        len(affected.rows),
        len(manifest.parts),
        sum(manifest.parts[number].size for number in affected.rows),
        (*obstacles, *locked),
        locked_until=until,
    )


def _holds(connection: Connection, target: Target, affected: Iterable[_Affected]) -> list[Hold]:
    found = {
        hold.number: hold
        for each in affected
        if each.rows
        for tenant in each.tenants
        for hold in legal_holds.holds(connection, target.table, each.found.manifest.month, tenant or "")
    }
    return [found[number] for number in sorted(found)]


def _locks(
    target: Target, affected: _Affected, published: Sequence[Published], now: datetime
) -> tuple[datetime | None, list[str]]:
    """What Object Lock keeps of the objects that would have to go, whoever asks."""
    manifest = affected.found.manifest
    keys = {manifest.parts[number].key for number in affected.rows}
    until: datetime | None = None
    held = 0
    for version in _versions(target, manifest, published, keys):
        if version.is_delete_marker:
            continue
        stored = target.bucket.head(version.key, version.version_id)
        if stored is None:
            continue
        held += stored.legal_hold
        if stored.lock == "compliance" and stored.locked_until is not None and stored.locked_until > now:
            until = max(until or stored.locked_until, stored.locked_until)
    found = []
    if until is not None:
        found.append(
            f"Object Lock in compliance mode keeps its objects until {until.astimezone(UTC):%Y-%m-%d %H:%M} UTC, and "
            "nobody can remove them earlier; ask again then, or destroy the bucket's KMS key if every archived row "
            "may go; months to come can be locked with ARCHIVE_OBJECT_LOCK=governance"
        )
    if held:
        found.append(f"{held} object version(s) are under S3's own legal hold; lift it first")
    return until, found


def _remaining(connection: Connection, target: Target, months: Sequence[Month], request: Erasure) -> Mapping[str, int]:
    present = discover(connection, target.table.schema, target.table.name)
    if all(column.source != request.column for column in present):
        return {}
    query = sql.SQL(REMAINING).format(
        zone=sql.Literal(months[0].zone if months else "UTC"),
        table=target.table.identifier,
        column=sql.Identifier(request.column),
        value=sql.Literal(request.value),
    )
    try:
        return dict(connection.execute(query).fetchall())
    except psycopg.DataError:
        raise UserError(f"the value given for {request.column} is not of the column's type") from None


# -- the record ------------------------------------------------------------------------------------------------------


def _begin(shard: Shard, target: Target, request: Erasure, new_id: Callable[[], UUID]) -> UUID:
    """Record the request, or go on with the same one that was not finished."""
    value = _stored_value(shard, target, request)
    with shard.transaction() as connection:
        connection.execute("LOCK TABLE archive.erasures IN SHARE ROW EXCLUSIVE MODE")
        scope = (str(target.table), shard.name, request.column)
        for identifier, hashed in connection.execute(OPEN_REQUESTS, scope).fetchall():
            if value_hash(identifier, value) == hashed:
                return UUID(str(identifier))
        identifier = new_id()
        connection.execute(
            RECORD, (identifier, *scope, value_hash(identifier, value), request.requested_by, request.reason)
        )
    return identifier


def _stored_value(shard: Shard, target: Target, request: Erasure) -> str:
    columns = [_column(each.manifest, request.column) for each in _published(target, shard)]
    if not any(columns):
        with shard.transaction() as connection:
            columns = [
                column
                for column in discover(connection, target.table.schema, target.table.name)
                if column.source == request.column
            ]
    return next(canonical(column, request.value) for column in columns if column is not None)


def _finish(shard: Shard, target: Target, identifier: UUID, months: Sequence[Month]) -> None:
    """Count what was published for the request, by this run and by those that died before it."""
    by_name = {month.name: month for month in months}
    with shard.transaction() as connection:
        row = connection.execute(NOTED, (identifier,)).fetchone()
        noted: dict[str, tuple[int, int]] = row[0] if row else {}
        counted = []
        for name, (generation, rows) in noted.items():
            key = target.layout.manifest(by_name[name], shard.name, generation)
            try:
                manifest = manifests.load(target.bucket, key).manifest
            except FileNotFoundError:
                continue
            if (manifest.kind, manifest.erased_rows) == ("erasure", rows):
                counted.append(rows)
        connection.execute(FINISH, (len(counted), sum(counted), identifier))


# -- one month -------------------------------------------------------------------------------------------------------


def _erase_month(
    shard: Shard,
    target: Target,
    month: Month,
    held: Lease,
    request: Erasure,
    identifier: UUID,
    on_step: Callable[[StrEnum], None],
) -> tuple[ErasedMonth | None, int]:
    """Bring one month to the state without the rows, from whatever state a run before left it in."""
    published = _published(target, shard, month)
    found = published[-1]
    affected = _affected(target, found, request)
    with shard.transaction() as connection:
        legal_holds.refuse(_holds(connection, target, [affected]), "erased from this month")
        source_rows = _source_rows(connection, target, month)
    # A run may have died between its manifest and what follows from it.
    publication.link(target, held, found)
    held.record_published(found, source_rows)
    erased = None
    if affected.rows:
        with publication.scratch(target) as directory, ParquetReader(directory) as reader:
            found = _publish(
                shard, target, held, published, affected, identifier, source_rows, directory, reader, on_step
            )
        rows = found.manifest.erased_rows
        before = affected.found.manifest
        size = sum(before.parts[number].size for number in affected.rows)
        erased = ErasedMonth(
            month.name, rows, len(affected.rows), len(before.parts), size, generation=found.manifest.generation
        )
        published = [*published, found]
    removed = _remove(target, month, held, published, on_step)
    on_step(Step.DONE)
    return erased, removed


def _publish(
    shard: Shard,
    target: Target,
    held: Lease,
    published: Sequence[Published],
    affected: _Affected,
    identifier: UUID,
    source_rows: int,
    directory: Path,
    reader: ParquetReader,
    on_step: Callable[[StrEnum], None],
) -> Published:
    found = affected.found
    manifest, month = found.manifest, found.manifest.month
    generation = manifest.generation + 1
    seeds = _seeds(target, manifest)
    before = _punctured_before(target, published)
    rewritten: dict[int, _Rewritten] = {}
    for number in sorted(affected.rows):
        rewritten[number] = _rewrite(target, affected, number, seeds[number], before, generation, directory, reader)
    erased = sum((each.erased for each in rewritten.values()), Digest())
    on_step(Step.REWRITTEN)

    with shard.transaction() as connection:
        connection.execute(NOTE, (json.dumps({month.name: [generation, erased.rows]}), identifier))
    on_step(Step.NOTED)
    files = [each.encoded for each in rewritten.values() if each.encoded is not None]
    keys = {
        target.layout.part(month, shard.name, generation, number, each.file.sha256) for number, each in enumerate(files)
    }
    publication.remove_leftovers(target, held, month, keep=keys)
    with publication.undone(target, held, month):
        uploaded = publication.upload(target, held, month, shard.name, files, generation=generation, on_step=on_step)
        publication.read_back(target, month, uploaded)
    on_step(publication.Step.READ_BACK)

    replacing = iter(uploaded)
    parts: list[Part] = []
    salts: list[Seeds] = []
    for number, part in enumerate(manifest.parts):
        new = rewritten.get(number)
        if new is None:
            parts.append(part)
            salts.append(seeds[number])
        elif new.encoded is not None:
            parts.append(next(replacing))
            salts.append(new.encoded.seeds)
    _require_sum(month, sum((part.digest for part in parts), Digest()) + erased, manifest.digest)
    for each in rewritten.values():
        before = [each.ancestors.get(at, punctured) for at, punctured in enumerate(before)]
    hashes = merkle.punctured_to_bytes([*before, *(each.punctured for each in rewritten.values())])
    body = merkle.salts_to_bytes(salts) if salts else None
    return publication.publish(
        target,
        held,
        replace(
            manifest,
            generation=generation,
            created_at=held.clock(),
            created_by=publication.created_by(),
            parts=tuple(parts),
            kind="erasure",
            read_from="archive",
            supersedes=found.sha256,
            salts_sha256=hashlib.sha256(body).hexdigest() if body is not None else None,
            erased_rows=erased.rows,
            erased_sha256=hashlib.sha256(hashes).hexdigest(),
        ),
        salts=body,
        erased=hashes,
        source_rows=source_rows,
        on_step=on_step,
    )


def _source_rows(connection: Connection, target: Target, month: Month) -> int:
    row = connection.execute(
        sql.SQL("SELECT count(*) FROM {} WHERE created_at >= {} AND created_at < {}").format(
            target.table.identifier, sql.Literal(month.start), sql.Literal(month.end)
        )
    ).fetchone()
    return int(row[0]) if row else 0


def _require_sum(month: Month, here: Digest, there: Digest) -> None:
    if finding := here.difference(there):
        raise ErasureError(
            f"month {month.name} is untouched: rows that stay and rows that go add up to {finding}; "
            "run python -m archive_pipeline.audit --deep"
        )


def _object(target: Target, key: str, sha256: str | None) -> bytes:
    try:
        body = target.bucket.read(key)
    except FileNotFoundError:
        body = b""
    if hashlib.sha256(body).hexdigest() != sha256:
        raise ErasureError(
            f"s3://{target.bucket.name}/{key} is missing or damaged, so what it keeps provable would be lost; restore "
            "its version (python -m archive_pipeline.audit) and run the erasure again"
        )
    return body


def _seeds(target: Target, manifest: Manifest) -> list[Seeds]:
    key = target.layout.salts(manifest.month, manifest.shard, manifest.generation)
    return merkle.salts_from_bytes(_object(target, key, manifest.salts_sha256))


def _punctured_before(target: Target, published: Sequence[Published]) -> list[Punctured]:
    """What earlier erasures of the month keep provable; the last of them has all of it."""
    for each in reversed(published):
        manifest = each.manifest
        if manifest.kind == "erasure":
            key = target.layout.erased(manifest.month, manifest.shard, manifest.generation)
            return merkle.punctured_from_bytes(_object(target, key, manifest.erased_sha256))
    return []


def _rewrite(
    target: Target,
    affected: _Affected,
    number: int,
    seeds: Seeds,
    before: Sequence[Punctured],
    generation: int,
    directory: Path,
    reader: ParquetReader,
) -> _Rewritten:
    """Write a part anew without the rows, and prove by DuckDB that nothing else went with them."""
    assert affected.where is not None  # noqa: S101 - only a month with such rows comes here
    manifest = affected.found.manifest
    month, columns, part = manifest.month, manifest.columns, manifest.parts[number]
    old, new = directory / "old.parquet", directory / f"{number:05}.parquet"
    try:
        sha256 = target.bucket.download(part.key, old, part.version_id)
    except FileNotFoundError:
        sha256 = ""
    known = reader.verify(columns, old, seeds) if sha256 == part.sha256 else None
    if known is None or known.digest.difference(part.digest) or known.merkle_root.hex() != part.merkle_root:
        raise ErasureError(
            f"month {month.name} is untouched: {part.key} is missing or not what its manifest says; "
            "run python -m archive_pipeline.audit --deep"
        )
    gone = reader.rows_where(*affected.where, old)
    erased = reader.digest(columns, old, affected.where)

    with pq.ParquetFile(old) as parquet:
        kept = parquet.schema_arrow.metadata or {}
        metadata = {name.decode(): value.decode() for name, value in kept.items() if name.startswith(b"archive.")}
        metadata["archive.generation"] = str(generation)
        file = write_part(_without(parquet, gone), columns, new, metadata)
    encoded, left = None, Digest()
    if file.rows:
        fresh = Seeds.fresh(file.rows)
        found = reader.verify(columns, new, fresh)
        left = found.digest
        encoded = Encoded(file, found.digest, found.merkle_root, fresh)
        if found.wrongly_rounded or reader.rows_where(*affected.where, new):
            raise ErasureError(f"month {month.name} is untouched: {part.key} could not be rewritten without the rows")
    _require_sum(month, left + erased, part.digest)

    texts = _texts(reader, columns, old, gone)
    leaves = {row: merkle.leaf(seeds.salt(row), text) for row, text in texts.items()}
    ancestors = dict(_ancestors(reader, columns, old, part, before, texts))
    old.unlink()
    return _Rewritten(encoded, erased, Punctured.of(bytes.fromhex(part.merkle_root), seeds, leaves), ancestors)


def _without(parquet: pq.ParquetFile, rows: Sequence[int]) -> Iterator[pa.Table]:
    """The row groups without these rows, one in memory at a time."""
    numbers = np.asarray(rows, dtype=np.int64)
    first = 0
    for group in range(parquet.num_row_groups):
        table = parquet.read_row_group(group, use_threads=False)
        here = numbers[(numbers >= first) & (numbers < first + table.num_rows)] - first
        keep = np.ones(table.num_rows, dtype=bool)
        keep[here] = False
        first += table.num_rows
        yield table.filter(pa.array(keep)) if len(here) else table


def _texts(reader: ParquetReader, columns: Sequence[Column], file: Path, rows: Sequence[int]) -> dict[int, str]:
    wanted = set(rows)
    found = islice(enumerate(reader.texts(columns, file)), max(wanted) + 1 if wanted else 0)
    return {row: text for row, text in found if row in wanted}


def _ancestors(
    reader: ParquetReader,
    columns: Sequence[Column],
    file: Path,
    part: Part,
    before: Sequence[Punctured],
    texts: Mapping[int, str],
) -> Iterator[tuple[int, Punctured]]:
    """Take the rows out of what keeps the roots of earlier parts provable.

    An earlier part is known by its root: the rows that are left of it are this part's, in the same order.
    """
    for at, punctured in enumerate(before):
        gone = punctured.erased
        if punctured.rows - len(gone) != part.digest.rows:
            continue
        if merkle.root(punctured.leaves(reader.texts(columns, file))) != punctured.root:
            continue
        rows = [row for row in range(punctured.rows) if row not in gone]
        leaves = {}
        for row, text in texts.items():
            salt = punctured.salt(rows[row])
            assert salt is not None  # noqa: S101 - the row was not erased
            leaves[rows[row]] = merkle.leaf(salt, text)
        yield at, punctured.without(leaves)


# -- what held the rows before ---------------------------------------------------------------------------------------


def _superseded(target: Target, published: Sequence[Published]) -> list[Version]:
    """Versions of a month that an erasure must have removed and that are still there."""
    if not any(each.manifest.kind == "erasure" for each in published):
        return []
    newest = published[-1].manifest
    return list(_versions(target, newest, published, frozenset(), erased=True))


def _versions(
    target: Target, newest: Manifest, published: Sequence[Published], replaced: Set[str], *, erased: bool = False
) -> Iterator[Version]:
    """Every version that must go: of parts that are replaced or that nothing lists, and of all older salts.

    Args:
        target: the bucket.
        newest: the month's newest manifest.
        published: all of its manifests.
        replaced: keys of parts that are about to be replaced.
        erased: whether the newest erasure is among those published, rather than about to be.
    """
    month, shard, layout = newest.month, newest.shard, target.layout
    listed = {part.key for part in newest.parts} - replaced
    # A dead attempt's part is listed nowhere, and its versions may hold the rows.
    prefix = f"{layout.data}{month.path}part-{shard}-g"
    for version in target.bucket.versions(prefix):
        # Of a shard called main-gold, the prefix is that of main, too.
        if version.key not in listed and PART.fullmatch(version.key.removeprefix(prefix)):
            yield version
    last = max((each.manifest.generation for each in published if each.manifest.kind == "erasure"), default=0)
    below = last if erased else newest.generation + 1
    for generation in range(1, below):
        for key in (layout.salts(month, shard, generation), layout.erased(month, shard, generation)):
            yield from (version for version in target.bucket.versions(key) if version.key == key)


def _remove(
    target: Target,
    month: Month,
    held: Lease,
    published: Sequence[Published],
    on_step: Callable[[StrEnum], None],
) -> int:
    """Remove for good what held the erased rows, and the salts by which their hashes could be guessed.

    Returns:
        How many versions were removed.
    """
    bucket = target.bucket
    versions = _superseded(target, published)
    # A deleted key is a delete marker in a versioned bucket: queries stop seeing it before its versions go one by one.
    for version in versions:
        if version.is_latest and not version.is_delete_marker:
            held.confirm()
            bucket.delete(version.key)
    on_step(Step.HIDDEN)
    # Delete markers go last: what they hide must not come back meanwhile.
    left = _superseded(target, published)
    for version in sorted(left, key=lambda each: each.is_delete_marker):
        held.confirm()
        try:
            bucket.delete(version.key, version.version_id, bypass_governance=bucket.protection.lock != "off")
        except ObjectLockedError as error:
            raise ObjectLockedError(
                f"month {month.name} no longer shows the rows, but old versions still hold them: {error}; run the "
                "erasure again with credentials that may, or then",
                error.until,
            ) from None
        on_step(Step.REMOVED)
    return sum(not version.is_delete_marker for version in versions)


# -- the command -----------------------------------------------------------------------------------------------------


def _show(report: ErasureReport) -> None:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    table = Table("month", "rows", "parts", "to rewrite", "in the way", "generation")
    for each in report.months:
        table.add_row(
            each.month,
            f"{each.rows:,}",
            f"{each.parts} of {each.of_parts}",
            decimal(each.size),
            "; ".join(each.obstacles),
            "" if each.generation is None else str(each.generation),
        )
    console = Console()
    console.print(table)
    if report.remaining:
        months = ", ".join(f"{month}: {rows:,}" for month, rows in report.remaining.items())
        console.print(f"Postgres still holds {sum(report.remaining.values()):,} such row(s) ({months})", soft_wrap=True)
    if report.copies:
        console.print(f"restored copies may hold such rows: {', '.join(report.copies)}; drop them", soft_wrap=True)
    if report.would_return:
        console.print(
            f"{report.would_return:,} of them are in archived months: delete them in Postgres first, "
            "or the next run of these months archives them again as late rows",
            soft_wrap=True,
        )


def main(arguments: Iterable[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes them from the process.

    Returns:
        The exit code: 1 when something is in the way, or rows remain in Postgres.
    """
    parser = argparse.ArgumentParser(
        prog="python -m archive_pipeline.erase",
        description="Erase a tenant's or a user's rows from all archived months. "
        "Without --yes it only says what it would do.",
        epilog="example: python -m archive_pipeline.erase --where user_id=… --reason 'request 4711' --by ann --yes",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--tenant", metavar="ID", help="this tenant's rows")
    which.add_argument("--where", metavar="COLUMN=VALUE", help="rows with this value, for example user_id=…")
    parser.add_argument("--reason", required=True, help="for the record; no personal data")
    parser.add_argument("--by", required=True, metavar="NAME", help="who asks for it, for the record")
    parser.add_argument("--shard", default="main", help="database; only of interest when there are several")
    parser.add_argument("--yes", action="store_true", help="do it")
    options = parser.parse_args(list(arguments) if arguments is not None else None)
    column, given, value = (
        ("tenant_id", "=", options.tenant) if options.tenant is not None else options.where.partition("=")
    )
    if not (column and given):
        raise UserError("--where must be COLUMN=VALUE")

    settings = load(ArchiveSettings)
    with ExitStack() as stack:
        router = stack.enter_context(DatabaseRouter.from_settings(load(DatabaseSettings), application_name="erase"))
        from rich.progress import Progress as Bar

        bar = stack.enter_context(Bar())
        task = bar.add_task("", total=None)
        report = erase(
            router.shard(options.shard),
            Target.from_settings(settings),
            Erasure(column, value, options.by, options.reason),
            dry_run=not options.yes,
            on_progress=lambda month, done, of: bar.update(task, description=month, completed=done, total=of),
        )
    _show(report)
    if options.yes:
        print(f"erased {report.rows:,} row(s); recorded as request {report.request}")
    else:
        print("nothing was changed; run it with --yes to do it")
    return 1 if report.remaining or report.obstacles else 0


if __name__ == "__main__":
    run_command(main)
