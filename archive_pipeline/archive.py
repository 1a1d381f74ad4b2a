"""Archive one month: from the rows in Postgres to a published, verified manifest.

Belongs here: the order of the steps and what a failure between two of them leaves behind, the rows that come late. Does
not: the steps themselves, each has its own module; nothing here ever writes to the source table.

::

    lease -> snapshot -> rows over parallel connections, each with the MD5 that Postgres computed of it
          -> clusters on local disk -> sorted parts -> DuckDB's digest of the parts must be Postgres'
          -> PUT each part (If-None-Match, SHA-256) -> read every byte back
          -> salts, manifest, signed link of the chain -> ledger -> catalog

The manifest is the commit. A run can be repeated at any time, and the bucket ends with one copy of every row. A month
that is archived already is compared with Postgres; rows that came since are archived as a further generation.
"""

import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path

import duckdb
import pyarrow as pa

from archive_pipeline import manifest as manifests
from archive_pipeline import merkle, publication
from archive_pipeline.catalog import prepare_catalog, publish_catalog, versioned
from archive_pipeline.clustering import Cluster, Clusters, boundaries_of, sorted_groups
from archive_pipeline.columns import Column, discover
from archive_pipeline.digest import Digest, ParquetReader
from archive_pipeline.errors import CatalogError, FencedError, SourceLostError, VerificationError
from archive_pipeline.late import Comparison, compare
from archive_pipeline.ledger import Lease, lease
from archive_pipeline.manifest import Manifest, ManifestKind, Published, Source
from archive_pipeline.merkle import Seeds
from archive_pipeline.months import Month, epoch_us
from archive_pipeline.parts import LocalPart, stored_table, write_part
from archive_pipeline.publication import Encoded, Step, Target
from archive_pipeline.snapshot import Snapshot, SourceTable, caught_up_replica, require_closed, take
from scaling import tracing
from scaling.databases import Lsn, Shard
from scaling.errors import UserError
from scaling.logs import Event, event

logger = logging.getLogger(__name__)

__all__ = ["MonthReport", "Outcome", "Step", "Target", "archive_month"]


class Outcome(StrEnum):
    """What an attempt did."""

    ARCHIVED = "archived"
    LATE = "late rows archived"
    UNCHANGED = "unchanged"


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
        late_rows: that were archived this time because they came after the month was archived.
        changed_rows: that have other content in Postgres than in the archive, which keeps what it has.
        missing_rows: that the archive holds and Postgres does not.
        erased_rows: that were erased from the archive and are still in Postgres; they do not come back.
        pruned: whether the month's rows were dropped from Postgres, so that missing ones are no finding.
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
    late_rows: int = 0
    changed_rows: int = 0
    missing_rows: int = 0
    erased_rows: int = 0
    pruned: bool = False
    seconds: float = 0.0

    @property
    def manifest(self) -> Manifest:
        """What is published."""
        return self.found.manifest

    def counts(self) -> dict[str, int]:
        """The figures of a trace."""
        return {"rows": self.stored.rows, "parts": len(self.manifest.parts), "late_rows": self.late_rows}

    @property
    def source_changed(self) -> str:
        """How Postgres contradicts the archive, in words; empty when it does not."""
        findings = []
        if self.changed_rows:
            findings.append(f"{self.changed_rows:,} row(s) with other content")
        if self.missing_rows and not self.pruned:
            findings.append(f"{self.missing_rows:,} row(s) less")
        if self.erased_rows:
            findings.append(f"{self.erased_rows:,} row(s) that were erased from the archive; delete them in Postgres")
        return " and ".join(findings)

    @property
    def bounds_inside_month(self) -> bool:
        """Whether the first and last archived instant belong to the month."""
        first, last = self.stored.min_us, self.stored.max_us
        month = self.manifest.month
        return (first is None or first >= epoch_us(month.start)) and (last is None or last < epoch_us(month.end))


@dataclass(frozen=True, slots=True)
class _Work:
    """What the steps of one attempt share."""

    shard: Shard
    target: Target
    month: Month
    relation: SourceTable
    held: Lease
    on_step: Callable[[Step], None]


def archive_month(
    shard: Shard,
    target: Target,
    month: Month,
    *,
    relation: SourceTable | None = None,
    on_step: Callable[[Step], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> MonthReport:
    """Archive one month of one database; an archived one is verified, and rows that came since are archived too.

    Args:
        shard: the database.
        target: what is archived and where it goes.
        month: to be archived.
        relation: the table the month's rows are in, where it is not the archived table itself: a detached partition. It
            need not hold the rows that are archived already.
        on_step: told after each step.
        clock: seconds, for the duration.

    Returns:
        The report. Rows that were changed or deleted in Postgres after they were archived are left as they are in the
        archive; the report says so.

    Raises:
        MonthBusyError: another run is at it.
        MonthOpenError: it may still receive rows.
        VerificationError: the parts are not what Postgres holds; nothing is published.
        FencedError: this run lost its lease to another one.
        UserError: a setting, privilege, value or server is in the way; the sentence says which.
    """
    began = clock()
    with tracing.span("month", {"dagster.partition_key": month.partition_key, "shard": shard.name}):
        with shard.transaction() as connection:
            written = require_closed(connection, target.table, month, target.grace)
        with lease(shard, target.table, month) as held:
            on_step(Step.LEASED)
            work = _Work(shard, target, month, relation or target.table, held, on_step)
            try:
                found = _published(target, month, shard)
                report = _archive(work, written) if found is None else _compare(work, found)
                on_step(Step.RECORDED)
                _publish_catalog(target)
            except FencedError:
                raise
            except Exception as error:
                with suppress(FencedError):
                    held.record_failed(str(error) if isinstance(error, UserError) else type(error).__name__)
                raise
        tracing.ended(report.outcome, report.counts())
    return replace(report, seconds=clock() - began)


def _archive(work: _Work, written: Lsn) -> MonthReport:
    replica = caught_up_replica(work.shard, written)
    if replica is not None:
        try:
            return _first_generation(work, replica, "replica")
        except SourceLostError:
            # A replica cancels queries that stand in the way of replay; the primary does not.
            logger.warning(
                "the replica broke off while month %s was read; the primary is read",
                work.month.name,
                extra=event(Event.REPLICA_SKIPPED, month=work.month.name),
            )
    return _first_generation(work, work.shard, "primary")


def _first_generation(work: _Work, source: Shard, read_from: Source) -> MonthReport:
    target = work.target
    with publication.scratch(target) as directory:
        with take(source, work.relation, work.month) as snapshot:
            earlier = manifests.published(target.bucket, target.layout)
            columns = versioned(snapshot.columns(), (each.manifest.columns for each in earlier))
            work.on_step(Step.SNAPSHOT)
            encoded, digest, size = _encode(work, snapshot, columns, directory, generation=1)
        work.on_step(Step.MATCHED)
        found, stored = _publish(work, columns, encoded, snapshot.lsn, digest.rows, read_from=read_from)
    return _report(work, Outcome.ARCHIVED, found, digest, stored, size)


def _compare(work: _Work, found: Published) -> MonthReport:
    """Compare an archived month with Postgres, and archive what came since."""
    target, manifest = work.target, found.manifest
    _require_comparable(work, manifest)
    pruned = work.held.pruned()
    damaged = tuple(p.key for p in manifest.parts if not target.bucket.holds(p.key, p.size, p.sha256, p.version_id))
    if damaged:
        logger.error(
            "month %s: %d archived object(s) are missing or altered",
            work.month.name,
            len(damaged),
            extra=event(Event.OBJECTS_DAMAGED, month=work.month.name, objects=len(damaged)),
        )
    publication.link(target, work.held, found)
    late = Comparison()
    outcome, stored = Outcome.UNCHANGED, manifest.digest
    with publication.scratch(target) as directory, take(work.shard, work.relation, work.month) as snapshot:
        source = snapshot.digest(manifest.columns)
        size = snapshot.extent(manifest.columns).size
        work.held.record_published(found, source.rows)
        if source.difference(manifest.digest) and not (pruned and source.rows == 0) and not damaged:
            late = compare(snapshot, manifest, target.bucket, directory)
            erased = snapshot.erased(work.held.erasures()) if late.ids else frozenset()
            late = replace(late, ids=tuple(each for each in late.ids if each not in erased), erased=len(erased))
        if late.ids:
            _require_no_new_columns(work, snapshot, manifest, late.ids)
            encoded, _, _ = _encode(
                work, snapshot, manifest.columns, directory, generation=manifest.generation + 1, ids=late.ids
            )
            work.on_step(Step.MATCHED)
            found, new = _publish(
                work, manifest.columns, encoded, snapshot.lsn, source.rows, read_from="primary", before=found
            )
            outcome, stored = Outcome.LATE, manifest.digest + new
        else:
            publication.remove_leftovers(target, work.held, work.month, forget=True)
    report = _report(work, outcome, found, source, stored, size)
    return replace(
        report,
        damaged=damaged,
        late_rows=len(late.ids),
        changed_rows=late.changed,
        missing_rows=late.missing,
        erased_rows=late.erased,
        pruned=pruned or work.relation != target.table,
    )


def _encode(
    work: _Work,
    snapshot: Snapshot,
    columns: Sequence[Column],
    directory: Path,
    *,
    generation: int,
    ids: Sequence[str] | None = None,
) -> tuple[list[Encoded], Digest, int]:
    """Bring rows from the snapshot into verified local parts.

    Returns:
        The parts, what Postgres says they hold, and an estimate of what the month occupies in Postgres.
    """
    target = work.target
    extent = snapshot.extent(columns)
    limit = target.part_size.row_group_bytes
    spill = directory / "clusters"
    spill.mkdir()
    clusters = Clusters(
        spill, columns, boundaries_of(extent.sample, -(-extent.row_bytes // limit)) if ids is None else ()
    )
    with tracing.span("extract"):
        source = snapshot.extract(
            columns, extent, clusters.add, parallelism=target.parallelism, batch_bytes=target.batch_bytes, ids=ids
        )
        tracing.counted({"rows": source.rows})
    _release_memory()
    divided = _divide(clusters.close(), target)
    metadata = {
        "archive.table": str(target.table),
        "archive.shard": work.shard.name,
        "archive.month": work.month.name,
        "archive.time_zone": work.month.zone,
        "archive.generation": str(generation),
        "archive.schema_sha256": manifests.schema_sha256(columns),
    }

    def write(number: int) -> LocalPart:
        def tables() -> Iterator[pa.Table]:
            for cluster in divided[number]:
                yield from map(partial(stored_table, columns), sorted_groups(cluster, columns, limit))
                _release_memory()

        return write_part(tables(), columns, directory / f"{number:05}.parquet", metadata)

    def verify(file: LocalPart) -> Encoded:
        seeds = Seeds.fresh(file.rows)
        try:
            with ParquetReader(directory) as reader:
                found = reader.verify(columns, file.path, seeds)
        except (duckdb.OutOfMemoryException, duckdb.IOException):
            raise
        except (duckdb.Error, pa.ArrowInvalid):
            raise VerificationError(work.month.name, "a part on local disk is no readable Parquet") from None
        if found.wrongly_rounded:
            finding = "a readable time is not its exact time rounded down"
            raise VerificationError(work.month.name, finding, sorted(found.wrongly_rounded))
        return Encoded(file, found.digest, found.merkle_root, seeds)

    with ThreadPoolExecutor(target.parallelism, thread_name_prefix="encode") as pool:
        with tracing.span("encode"):
            files = list(pool.map(tracing.carried(write), range(len(divided))))
            tracing.counted({"parts": len(files), "bytes": sum(each.size for each in files)})
        _release_memory()
        work.on_step(Step.EXTRACTED)
        with tracing.span("match"):
            encoded = list(pool.map(tracing.carried(verify), files))
    if finding := sum((each.digest for each in encoded), Digest()).difference(source):
        raise VerificationError(
            work.month.name, f"Parquet holds {finding}", _differing(snapshot, columns, encoded, directory, ids)
        )
    return encoded, source, extent.size


def _release_memory() -> None:
    """Give back what is no longer needed: 30 MB after the extraction, 25 MB between two row groups (measured)."""
    pa.default_memory_pool().release_unused()
    pa.system_memory_pool().release_unused()  # ADBC allocates with malloc


def _divide(clusters: Sequence[Cluster], target: Target) -> list[list[Cluster]]:
    """Clusters in order, a part's worth each."""
    total = sum(cluster.size for cluster in clusters)
    wanted = -(-total // target.part_size.parts(total, target.parallelism)) if total else 1
    parts: list[list[Cluster]] = []
    size = wanted
    for cluster in clusters:
        if size >= wanted:
            parts.append([])
            size = 0
        parts[-1].append(cluster)
        size += cluster.size
    return parts


def _differing(
    snapshot: Snapshot, columns: Sequence[Column], encoded: Sequence[Encoded], directory: Path, ids: object
) -> list[str]:
    """The columns to blame; none when even the ids differ, because then rows do, or when only late rows were read."""
    if ids is not None:
        return []
    with ParquetReader(directory) as reader:
        here = reader.column_digests(columns, [each.file.path for each in encoded])
    there = snapshot.column_digests(columns)
    differing = [column.source for column, a, b in zip(columns, here, there, strict=True) if a != b]
    return [] if "id" in differing else differing


def _publish(
    work: _Work,
    columns: Sequence[Column],
    encoded: Sequence[Encoded],
    lsn: Lsn,
    source_rows: int,
    *,
    read_from: Source,
    before: Published | None = None,
) -> tuple[Published, Digest]:
    target, held = work.target, work.held
    generation = before.manifest.generation + 1 if before else 1
    first = len(before.manifest.parts) if before else 0
    kind: ManifestKind = "late" if before else "archive"
    keys = {
        target.layout.part(work.month, work.shard.name, generation, first + number, each.file.sha256)
        for number, each in enumerate(encoded)
    }
    # Before anything is in the bucket: Athena would answer as if a month outside its table's years were not there.
    prepare_catalog(target.bucket, target.layout, target.table, work.month, columns, target.glue)
    publication.remove_leftovers(target, held, work.month, keep=keys)
    with publication.undone(target, held, work.month):
        with tracing.span("upload"):
            parts = publication.upload(
                target,
                held,
                work.month,
                work.shard.name,
                encoded,
                generation=generation,
                first_number=first,
                on_step=work.on_step,
            )
        with tracing.span("verify"):
            stored = publication.read_back(target, work.month, parts)
    work.on_step(Step.READ_BACK)
    seeds = [each.seeds for each in encoded]
    if before and before.manifest.parts:
        key = target.layout.salts(work.month, work.shard.name, before.manifest.generation)
        seeds = [*merkle.salts_from_bytes(target.bucket.read(key)), *seeds]
    salts = merkle.salts_to_bytes(seeds) if seeds else None
    manifest = Manifest(
        table=str(target.table),
        shard=work.shard.name,
        month=work.month,
        generation=generation,
        snapshot_lsn=lsn,
        created_at=held.clock(),
        created_by=publication.created_by(),
        columns=tuple(columns),
        parts=(*(before.manifest.parts if before else ()), *parts),
        kind=kind,
        read_from=read_from,
        supersedes=before.sha256 if before else None,
        salts_sha256=hashlib.sha256(salts).hexdigest() if salts is not None else None,
    )
    with tracing.span("publish"):
        found = publication.publish(target, held, manifest, salts=salts, source_rows=source_rows, on_step=work.on_step)
    return found, stored


def _report(work: _Work, outcome: Outcome, found: Published, source: Digest, stored: Digest, size: int) -> MonthReport:
    return MonthReport(
        outcome=outcome,
        bucket=work.target.bucket.name,
        prefix=f"{work.target.layout.data}{work.month.path}",
        found=found,
        source=source,
        stored=stored,
        strangers=_strangers(work.target, work.month, work.shard),
        damaged=(),
        postgres_bytes=size or None,
    )


def _require_comparable(work: _Work, manifest: Manifest) -> None:
    with work.shard.transaction() as connection:
        present = {c.source: c.postgres_type for c in discover(connection, work.relation.schema, work.relation.name)}
    for column in manifest.columns:
        if present.get(column.source) != column.postgres_type:
            raise UserError(
                f"column {column.source} of {work.target.table} was {column.postgres_type} when month "
                f"{work.month.name} was archived and is {present.get(column.source, 'gone')} now, so the two cannot be "
                "compared; the archive is untouched"
            )


def _require_no_new_columns(work: _Work, snapshot: Snapshot, manifest: Manifest, ids: Sequence[str]) -> None:
    known = {column.source for column in manifest.columns}
    new = [column for column in snapshot.columns() if column.source not in known]
    filled = snapshot.filled(new, ids)
    if filled:
        raise UserError(
            f"late rows of month {work.month.name} hold values in {', '.join(filled)}, which the archived month does "
            "not have; they stay in Postgres; set these values to NULL there, or keep the rows"
        )


def _publish_catalog(target: Target) -> None:
    # The month is archived and sound, so it does not fail; the asset of the catalog does, with this sentence.
    try:
        publish_catalog(target.bucket, target.layout, target.table, target.glue)
    except CatalogError as error:
        logger.warning("the catalog was left as it is: %s", error, extra=event(Event.CATALOG_UNCHANGED))


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


def _strangers(target: Target, month: Month, shard: Shard) -> tuple[str, ...]:
    listed = {
        part.key
        for each in manifests.newest(manifests.published(target.bucket, target.layout, month=month))
        for part in each.manifest.parts
    }
    prefix = f"{target.layout.data}{month.path}"
    # Another shard's run may be between its parts and its manifest.
    of_others = re.compile(re.escape(f"{prefix}part-") + rf"(?!{re.escape(shard.name)}-g\d{{4}}-\d{{5}}-).*\.parquet")
    return tuple(key for key in target.bucket.keys(prefix) if key not in listed and not of_others.fullmatch(key))
