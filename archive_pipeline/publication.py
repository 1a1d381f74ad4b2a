"""Publishing a generation of a month: parts, then the manifest, then its link in the chain, in this order.

Belongs here: uploading and reading back, the order of a publication, removing what dead attempts left. Does not: what
the parts hold (`archive_pipeline.archive`, `archive_pipeline.erase`), or S3's calls (`archive_pipeline.objects`).

The manifest is the commit. Whatever a dead run left before it is noted in ``archive.uploads`` and removed by the next
run; whatever is missing after it is derived from it.
"""

import errno
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from archive_pipeline import chain
from archive_pipeline import manifest as manifests
from archive_pipeline.catalog import Glue
from archive_pipeline.digest import Digest
from archive_pipeline.errors import FencedError, ObjectConflictError, VerificationError
from archive_pipeline.ledger import Lease
from archive_pipeline.manifest import Layout, Manifest, Part, Published
from archive_pipeline.merkle import Seeds
from archive_pipeline.months import Month
from archive_pipeline.objects import ArchiveBucket
from archive_pipeline.parts import LocalPart, PartSize
from archive_pipeline.scratch import scratch_directory
from archive_pipeline.signing import Signer, signer_from
from archive_pipeline.snapshot import BATCH_BYTES, SourceTable
from scaling import tracing
from scaling.errors import UserError
from scaling.settings import ArchiveSettings

T = TypeVar("T")

DISTRIBUTION = "tenant-calendar-and-audit-pipeline"
OCTETS = "application/octet-stream"


class Step(StrEnum):
    """How far an attempt has come."""

    LEASED = "lease taken"
    SNAPSHOT = "snapshot taken"
    EXTRACTED = "rows written to local parts"
    MATCHED = "local parts match Postgres"
    UPLOADED = "part uploaded"
    READ_BACK = "parts read back from S3"
    SALTS = "salts written"
    MANIFEST = "manifest written"
    LINKED = "link of the chain written"
    RECORDED = "month recorded"


@dataclass(frozen=True, slots=True)
class Target:
    """What is archived and where it goes.

    Attributes:
        table: the source.
        bucket: the destination.
        layout: where the archive lies in it.
        grace: how long after its end a month is closed.
        part_size: how large row groups and parts are.
        batch_bytes: of rows read at once by one connection.
        scratch: directory for the rows on their way, which needs about the month's size; None is the system's.
        parallelism: connections that read a month, and threads that encode, verify and upload it.
        signer: of the chain; None leaves it unsigned.
        glue: the data catalog that Athena reads; None when none is configured.
    """

    table: SourceTable
    bucket: ArchiveBucket
    layout: Layout
    grace: timedelta
    part_size: PartSize = field(default_factory=PartSize)
    batch_bytes: int = BATCH_BYTES
    scratch: Path | None = None
    parallelism: int = 2
    signer: Signer | None = None
    glue: Glue | None = None

    @classmethod
    def from_settings(cls, settings: ArchiveSettings) -> "Target":
        """The archive that the environment names; nothing is asked of the bucket yet.

        Args:
            settings: of the archive.

        Raises:
            UserError: the signing key cannot be used.
        """
        return cls(
            table=SourceTable.parse(settings.archive_table),
            bucket=ArchiveBucket.from_settings(settings),
            layout=Layout(settings.archive_prefix),
            grace=timedelta(seconds=settings.archive_grace_seconds),
            parallelism=settings.archive_parallelism,
            signer=signer_from(settings),
            glue=Glue.from_settings(settings),
        )


@dataclass(frozen=True, slots=True)
class Encoded:
    """A local part and what was found in it.

    Attributes:
        file: the part.
        digest: of its rows.
        merkle_root: of its rows.
        seeds: of the salts of its leaves.
    """

    file: LocalPart
    digest: Digest
    merkle_root: bytes
    seeds: Seeds


def upload(
    target: Target,
    held: Lease,
    month: Month,
    shard: str,
    files: Sequence[Encoded],
    *,
    generation: int,
    first_number: int = 0,
    on_step: Callable[[Step], None] = lambda _: None,
) -> list[Part]:
    """Put local parts where they belong, side by side; each local file is removed when it is up.

    Args:
        target: the destination.
        held: the lease on the month.
        month: of the rows.
        shard: the rows come from.
        files: verified ones.
        generation: of the month, into the objects' names.
        first_number: of the first part.
        on_step: told after each part.

    Returns:
        The parts, in the order of the files.

    Raises:
        FencedError: another run took the month.
        UserError: the bucket cannot be written.
    """

    def put(number: int, encoded: Encoded) -> Part:
        file = encoded.file
        key = target.layout.part(month, shard, generation, number, file.sha256)
        held.record_upload(key, file.sha256, file.size)
        version_id = target.bucket.put_file(key, file.path, file.sha256)
        file.path.unlink()
        on_step(Step.UPLOADED)
        return Part(key, file.size, file.sha256, encoded.digest, encoded.merkle_root.hex(), version_id)

    numbers = range(first_number, first_number + len(files))
    return _side_by_side(target.parallelism, put, numbers, files)


def read_back(target: Target, month: Month, parts: Sequence[Part]) -> Digest:
    """Read every byte of uploaded parts back.

    The same bytes hold the same rows, so the digest that DuckDB computed over the local file is that of the object.

    Args:
        target: the destination.
        month: of the rows.
        parts: uploaded.

    Returns:
        The digest of what is in the bucket.

    Raises:
        VerificationError: an object is missing, or holds other bytes than were sent.
    """

    def read(part: Part) -> Digest:
        try:
            sha256 = target.bucket.sha256_of(part.key, part.version_id)
        except FileNotFoundError:
            raise VerificationError(month.name, f"{part.key} vanished from the bucket") from None
        if sha256 != part.sha256:
            raise VerificationError(month.name, f"{part.key} came back from S3 with other bytes than were sent")
        return part.digest

    return sum(_side_by_side(target.parallelism, read, parts), Digest())


def publish(
    target: Target,
    held: Lease,
    manifest: Manifest,
    *,
    salts: bytes | None,
    source_rows: int,
    erased: bytes | None = None,
    on_step: Callable[[Step], None] = lambda _: None,
) -> Published:
    """Publish a generation whose parts are in the bucket: salts, manifest, link, ledger.

    Args:
        target: the destination.
        held: the lease on the month.
        manifest: of the generation.
        salts: what the manifest's ``salts_sha256`` is of; None without rows.
        source_rows: rows of the month in Postgres.
        erased: what the manifest's ``erased_sha256`` is of; None but for an erasure.
        on_step: told after each step.

    Returns:
        The manifest as found in the bucket.

    Raises:
        FencedError: another run took or published the month.
        UserError: the bucket cannot be written, or the signing key does not work.
    """
    month, shard, generation = manifest.month, manifest.shard, manifest.generation
    layout, bucket = target.layout, target.bucket
    for place, body in ((layout.salts, salts), (layout.erased, erased)):
        if body is not None:
            # Not locked: an erasure must be able to remove them. A dead attempt may have left its own.
            held.confirm()
            bucket.replace_bytes(place(month, shard, generation), body, content_type=OCTETS)
    on_step(Step.SALTS)
    held.confirm()
    key = layout.manifest(month, shard, generation)
    try:
        bucket.put_bytes(key, manifest.to_bytes(), content_type="application/json")
    except ObjectConflictError:
        raise FencedError(f"another run published month {month.name}") from None
    on_step(Step.MANIFEST)
    found = manifests.load(bucket, key)
    link(target, held, found, on_step=on_step)
    held.record_published(found, source_rows)
    remove_leftovers(target, held, month, forget=True)
    return found


def link(
    target: Target, held: Lease, found: Published, *, on_step: Callable[[Step], None] = lambda _: None
) -> chain.Head:
    """Give a manifest its link in the chain, unless it has one, and pin the chain's end in Postgres.

    Args:
        target: where the chain lies.
        held: the lease on the month.
        found: the manifest.
        on_step: told when it is done.

    Returns:
        The chain's newest link.
    """
    if target.signer is not None:
        held.record_signing_key(target.signer)  # before the link: none may be by an unknown key
    head = chain.append(
        target.bucket,
        target.layout,
        target.signer,
        found,
        pinned=held.chain_head(),
        now=held.clock(),
        keys=held.signing_keys(),
    )
    on_step(Step.LINKED)
    held.pin(head)
    return head


def remove_leftovers(
    target: Target, held: Lease, month: Month, *, keep: Set[str] = frozenset(), forget: bool = False
) -> None:
    """Remove what unfinished attempts put under the data prefix; their notes say which objects that can be.

    A run that died between its manifest and the ledger left notes of objects that are listed: those stay. An upload
    that was under way when its run was killed may appear in the bucket a moment after it was removed, so notes are
    kept, and all of this is done again, until a publication is complete (`forget`).

    Args:
        target: the bucket.
        held: the lease on the month.
        month: whose manifests are looked at.
        keep: keys that are about to be listed.
        forget: the notes too.
    """
    noted = held.uploads()
    if not noted:
        return
    found = manifests.published(target.bucket, target.layout, month=month)
    listed = {part.key for each in found for part in each.manifest.parts}
    for key in noted:
        if key not in keep and key not in listed:
            held.confirm()
            target.bucket.delete(key)
    if forget:
        held.forget_uploads(noted)


@contextmanager
def undone(target: Target, held: Lease, month: Month) -> Iterator[None]:
    """Remove what an attempt uploaded when it fails before its manifest; a run that was fenced touches nothing.

    Args:
        target: the bucket.
        held: the lease on the month.
        month: that is attempted.
    """
    try:
        yield
    except FencedError:
        raise  # the objects may be the other run's by now
    except Exception:
        with suppress(FencedError, UserError):
            remove_leftovers(target, held, month)
        raise


@contextmanager
def scratch(target: Target) -> Iterator[Path]:
    """A directory for one attempt, removed at the end.

    Args:
        target: where it may be.

    Raises:
        UserError: the disk is full, or there is no memory left.
    """
    with scratch_directory(target.scratch) as directory:
        try:
            yield directory
        except MemoryError:
            raise UserError(
                "there is not enough memory for the month; lower ARCHIVE_PARALLELISM, or give the run more"
            ) from None
        except OSError as error:
            if not is_disk_full(error):
                raise
            raise UserError(
                f"the disk of {directory.parent} is full; a month needs about its size in Postgres there; "
                "set TMPDIR to a larger disk"
            ) from None


def is_disk_full(error: OSError) -> bool:
    """Whether an error says that there is no room to write.

    Args:
        error: of a write.
    """
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def created_by() -> str:
    """Program and version, for the manifest."""
    try:
        return f"{DISTRIBUTION} {version(DISTRIBUTION)}"
    except PackageNotFoundError:
        return DISTRIBUTION


def _side_by_side(threads: int, work: Callable[..., T], *arguments: Sequence[Any]) -> list[T]:
    with ThreadPoolExecutor(threads, thread_name_prefix="parts") as pool:
        return list(pool.map(tracing.carried(work), *arguments))
