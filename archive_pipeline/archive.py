"""Archive one month: from the rows in Postgres to a published, verified manifest.

Belongs here: the order of the steps and what a failure between two of them leaves behind. Does not: the steps
themselves, each has its own module; nothing here ever writes to the source table.

::

    lease -> snapshot -> digest in Postgres -> parts on local disk -> digest of the parts must be equal
          -> PUT each part (If-None-Match, SHA-256) -> read every part back, digest again
          -> manifest -> ledger -> catalog

The manifest is the commit. Whatever a dead run left before it is noted in ``archive.uploads`` and removed by the next
run; whatever is missing after it is derived from the manifest. So a run can be repeated at any time, and the bucket
ends with one copy of every row.
"""

import errno
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from archive_pipeline import manifest as manifests
from archive_pipeline.catalog import publish_catalog
from archive_pipeline.columns import Column
from archive_pipeline.digest import Digest, ParquetReader
from archive_pipeline.errors import CatalogError, FencedError, ObjectConflictError, VerificationError
from archive_pipeline.ledger import Lease, lease
from archive_pipeline.manifest import Layout, Manifest, Part, Published
from archive_pipeline.months import Month, epoch_us
from archive_pipeline.objects import ArchiveBucket
from archive_pipeline.parts import LocalPart, PartSize, write_parts
from archive_pipeline.snapshot import BATCH_BYTES, Snapshot, SourceTable, require_closed, take
from scaling.databases import Shard
from scaling.errors import UserError

logger = logging.getLogger(__name__)

DISTRIBUTION = "tenant-calendar-and-audit-pipeline"


class Step(StrEnum):
    """How far an attempt has come."""

    LEASED = "lease taken"
    SNAPSHOT = "snapshot taken and digested"
    EXTRACTED = "rows written to local parts"
    MATCHED = "local parts match Postgres"
    UPLOADED = "part uploaded"
    READ_BACK = "parts read back from S3"
    MANIFEST = "manifest written"
    RECORDED = "month recorded"


class Outcome(StrEnum):
    """What an attempt did."""

    ARCHIVED = "archived"
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True)
class Target:
    """What is archived and where it goes.

    Attributes:
        table: the source.
        bucket: the destination.
        layout: where the archive lies in it.
        grace: how long after its end a month is closed.
        part_size: when row groups and parts end.
        batch_bytes: of rows read at once.
        scratch: directory for the local parts, which need the month's compressed size; None is the system's.
    """

    table: SourceTable
    bucket: ArchiveBucket
    layout: Layout
    grace: timedelta
    part_size: PartSize = field(default_factory=PartSize)
    batch_bytes: int = BATCH_BYTES
    scratch: Path | None = None


@dataclass(frozen=True, slots=True)
class MonthReport:
    """What became of a month, with everything the asset's checks and metadata say.

    Attributes:
        outcome: what was done.
        bucket: the archive's.
        prefix: of the month's data in it.
        found: the manifest.
        source: the month's rows in Postgres now, over the manifest's columns.
        stored: the archived rows, as computed from the objects this time; for an unchanged month the manifest's.
        strangers: keys under the month's prefix that no manifest lists; Athena reads them as data.
        damaged: listed keys whose object is missing or holds other bytes.
        postgres_bytes: estimate of what the month occupies in Postgres, None without statistics.
        seconds: the attempt took.
    """

    outcome: Outcome
    bucket: str
    prefix: str
    found: Published
    source: Digest
    stored: Digest
    strangers: tuple[str, ...]
    damaged: tuple[str, ...]
    postgres_bytes: int | None
    seconds: float = 0.0

    @property
    def manifest(self) -> Manifest:
        """What is published."""
        return self.found.manifest

    @property
    def late_rows(self) -> int:
        """Rows that came to Postgres after the month was archived; negative when rows were deleted there."""
        return self.source.rows - self.manifest.digest.rows

    @property
    def source_changed(self) -> str:
        """How Postgres differs from the archive, in words; empty when it does not."""
        return self.source.difference(self.manifest.digest)

    @property
    def bounds_inside_month(self) -> bool:
        """Whether the first and last archived instant belong to the month."""
        first, last = self.stored.min_us, self.stored.max_us
        month = self.manifest.month
        return (first is None or first >= epoch_us(month.start)) and (last is None or last < epoch_us(month.end))


def archive_month(
    shard: Shard,
    target: Target,
    month: Month,
    *,
    on_step: Callable[[Step], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> MonthReport:
    """Archive one month of one database, or verify it when it is archived already.

    Args:
        shard: the database.
        target: what is archived and where it goes.
        month: to be archived.
        on_step: told after each step.
        clock: seconds, for the duration.

    Returns:
        The report. An archived month whose rows have changed in Postgres since is left as it is; the report says so.

    Raises:
        MonthBusyError: another run is at it.
        MonthOpenError: it may still receive rows.
        VerificationError: the parts are not what Postgres holds; nothing is published.
        FencedError: this run lost its lease to another one.
        UserError: a setting, privilege, value or server is in the way; the sentence says which.
    """
    began = clock()
    with shard.transaction() as connection:
        require_closed(connection, month, target.grace)
    with lease(shard, target.table, month) as held:
        on_step(Step.LEASED)
        try:
            found = _published(target, month, shard)
            if found is None:
                report = _archive(shard, target, month, held, on_step)
            else:
                report = _verify(shard, target, month, held, found)
            on_step(Step.RECORDED)
            _publish_catalog(target)
        except FencedError:
            raise
        except Exception as error:
            with suppress(FencedError):
                held.record_failed(str(error) if isinstance(error, UserError) else type(error).__name__)
            raise
    return replace(report, seconds=clock() - began)


def _archive(shard: Shard, target: Target, month: Month, held: Lease, on_step: Callable[[Step], None]) -> MonthReport:
    with _scratch(target) as directory, ParquetReader(directory) as reader:
        with take(shard, target.table, month) as snapshot:
            columns = snapshot.columns()
            source = snapshot.digest(columns)
            postgres_bytes = snapshot.bytes_estimate(source.rows)
            on_step(Step.SNAPSHOT)
            files = _extract(snapshot, columns, target, month, shard, source, directory)
            on_step(Step.EXTRACTED)
            digests = _require_equal(snapshot, reader, columns, files, source, month)
            on_step(Step.MATCHED)
        parts = [
            Part(target.layout.part(month, shard.name, 1, file.number, file.sha256), file.size, file.sha256, digest)
            for file, digest in zip(files, digests, strict=True)
        ]
        _remove_leftovers(target, held, keep={part.key for part in parts})
        try:
            for part, file in zip(parts, files, strict=True):
                held.record_upload(part.key, part.sha256, part.size)
                target.bucket.put_file(part.key, file.path, part.sha256)
                file.path.unlink()
                on_step(Step.UPLOADED)
            stored = _read_back(parts, columns, target, month, directory, reader)
        except FencedError:
            raise  # the objects may be the other run's by now
        except Exception:
            with suppress(FencedError, UserError):
                _remove_leftovers(target, held)
            raise
    on_step(Step.READ_BACK)

    manifest = Manifest(
        table=str(target.table),
        shard=shard.name,
        month=month,
        generation=1,
        snapshot_lsn=snapshot.lsn,
        created_at=held.clock(),
        created_by=_created_by(),
        columns=columns,
        parts=tuple(parts),
    )
    found = _publish(target, manifest, held)
    on_step(Step.MANIFEST)
    held.record_published(found, source.rows)
    return MonthReport(
        outcome=Outcome.ARCHIVED,
        bucket=target.bucket.name,
        prefix=f"{target.layout.data}{month.path}",
        found=found,
        source=source,
        stored=stored,
        strangers=_strangers(target, month, shard),
        damaged=(),
        postgres_bytes=postgres_bytes,
    )


def _verify(shard: Shard, target: Target, month: Month, held: Lease, found: Published) -> MonthReport:
    manifest = found.manifest
    with take(shard, target.table, month) as snapshot:
        present = {column.source: column.postgres_type for column in snapshot.columns()}
        for column in manifest.columns:
            if present.get(column.source) != column.postgres_type:
                raise UserError(
                    f"column {column.source} of {target.table} was {column.postgres_type} when month {month.name} was "
                    f"archived and is {present.get(column.source, 'gone')} now, so the two cannot be compared; "
                    "the archive is untouched"
                )
        source = snapshot.digest(manifest.columns)
        postgres_bytes = snapshot.bytes_estimate(source.rows)
    damaged = tuple(part.key for part in manifest.parts if not target.bucket.holds(part.key, part.size, part.sha256))
    held.record_published(found, source.rows)
    if damaged:
        logger.error("month %s: %d archived object(s) are missing or altered", month.name, len(damaged))
    _remove_leftovers(target, held)
    return MonthReport(
        outcome=Outcome.UNCHANGED,
        bucket=target.bucket.name,
        prefix=f"{target.layout.data}{month.path}",
        found=found,
        source=source,
        stored=manifest.digest,
        strangers=_strangers(target, month, shard),
        damaged=damaged,
        postgres_bytes=postgres_bytes,
    )


def _extract(
    snapshot: Snapshot,
    columns: Sequence[Column],
    target: Target,
    month: Month,
    shard: Shard,
    source: Digest,
    directory: Path,
) -> list[LocalPart]:
    if source.rows == 0:
        return []
    metadata = {
        "archive.table": str(target.table),
        "archive.shard": shard.name,
        "archive.month": month.name,
        "archive.time_zone": month.zone,
        "archive.generation": "1",
        "archive.schema_sha256": manifests.schema_sha256(columns),
    }
    batches = snapshot.batches(columns, batch_bytes=target.batch_bytes)
    return list(write_parts(batches, columns, directory, metadata, target.part_size))


def _require_equal(
    snapshot: Snapshot,
    reader: ParquetReader,
    columns: Sequence[Column],
    parts: Sequence[LocalPart],
    source: Digest,
    month: Month,
) -> list[Digest]:
    digests = [reader.digest(columns, part.path) for part in parts]
    if finding := sum(digests, Digest()).difference(source):
        here = reader.column_digests(columns, [part.path for part in parts])
        there = snapshot.column_digests(columns)
        differing = [column.source for column, a, b in zip(columns, here, there, strict=True) if a != b]
        # When even the ids differ, rows differ, and no column is to blame.
        raise VerificationError(month.name, f"Parquet holds {finding}", [] if "id" in differing else differing)
    rounded = sorted({name for part in parts for name in reader.wrongly_rounded(columns, part.path)})
    if rounded:
        raise VerificationError(month.name, "a readable time is not its exact time rounded down", rounded)
    return digests


def _read_back(
    parts: Sequence[Part],
    columns: Sequence[Column],
    target: Target,
    month: Month,
    directory: Path,
    reader: ParquetReader,
) -> Digest:
    total = Digest()
    path = directory / "read-back.parquet"
    for part in parts:
        try:
            sha256 = target.bucket.download(part.key, path)
        except FileNotFoundError:
            raise VerificationError(month.name, f"{part.key} vanished from the bucket") from None
        if sha256 != part.sha256:
            raise VerificationError(month.name, f"{part.key} came back from S3 with other bytes than were sent")
        digest = reader.digest(columns, path)
        if finding := digest.difference(part.digest):
            raise VerificationError(month.name, f"{part.key} came back from S3 with {finding}")
        total += digest
    path.unlink(missing_ok=True)
    return total


def _publish(target: Target, manifest: Manifest, held: Lease) -> Published:
    key = target.layout.manifest(manifest.month, manifest.shard, manifest.generation)
    held.confirm()
    try:
        target.bucket.put_bytes(key, manifest.to_bytes(), content_type="application/json")
    except ObjectConflictError:
        raise FencedError(f"another run published month {manifest.month.name}") from None
    return manifests.load(target.bucket, key)


def _publish_catalog(target: Target) -> None:
    # The month is archived and sound, so it does not fail; the asset of the catalog does, with this sentence.
    try:
        publish_catalog(target.bucket, target.layout, target.table)
    except CatalogError as error:
        logger.warning("the catalog was left as it is: %s", error)


def _published(target: Target, month: Month, shard: Shard) -> Published | None:
    """The month's manifest; the bucket is asked, because a run may die between manifest and ledger."""
    found = manifests.published(target.bucket, target.layout, month=month)
    mine = [each for each in found if each.manifest.shard == shard.name]
    for each in mine:
        if (each.manifest.table, each.manifest.month) != (str(target.table), month):
            raise UserError(
                f"s3://{target.bucket.name}/{each.key} lists {each.manifest.table} in time zone "
                f"{each.manifest.month.zone}; archive {target.table} under an ARCHIVE_PREFIX of its own"
            )
    return max(mine, key=lambda each: each.manifest.generation, default=None)


def _remove_leftovers(target: Target, held: Lease, keep: Set[str] = frozenset()) -> None:
    """Remove what unfinished attempts put under the prefix; their notes say which objects that can be."""
    for key in held.uploads():
        if key not in keep:
            held.confirm()
            target.bucket.delete(key)
            held.forget_uploads([key])


def _strangers(target: Target, month: Month, shard: Shard) -> tuple[str, ...]:
    listed = {
        part.key
        for each in manifests.published(target.bucket, target.layout, month=month)
        for part in each.manifest.parts
    }
    prefix = f"{target.layout.data}{month.path}"
    others = f"{prefix}part-"
    mine = f"{others}{shard.name}-g"
    # Another shard's run may be between its parts and its manifest.
    return tuple(
        key
        for key in target.bucket.keys(prefix)
        if key not in listed and (key.startswith(mine) or not key.startswith(others))
    )


@contextmanager
def _scratch(target: Target) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="archive-", dir=target.scratch))
    try:
        yield directory
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(
            f"the disk of {directory.parent} is full; a month needs its compressed size there; "
            "set TMPDIR to a larger disk"
        ) from None
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _created_by() -> str:
    try:
        return f"{DISTRIBUTION} {version(DISTRIBUTION)}"
    except PackageNotFoundError:
        return DISTRIBUTION
