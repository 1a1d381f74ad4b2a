"""The manifest: what was published of one month, and where everything lies in the bucket.

Belongs here: the manifest's fields, its canonical bytes, object keys, reading the published manifests.
Does not: deciding to publish (`archive_pipeline.publication`), or signing (`archive_pipeline.chain`).

A month's newest generation is the truth. Each generation lists *all* of the month's parts: a late one those before it
and a further part, an erasure the parts that replace others.

::

    audit_logs/year=2025/month=01/part-main-g0001-00000-<16 hex of SHA-256>.parquet    Athena's LOCATION, data only
    audit_logs_manifests/year=2025/month=01/main-g0001.json      one per month, shard, generation
    audit_logs_manifests/year=2025/month=01/main-g0001.salts     salts of its Merkle leaves; removed by an erasure
    audit_logs_manifests/year=2025/month=01/main-g0002.erased    what an erasure took out, as leaf hashes
    audit_logs_manifests/chain/main/00000001.json                signed links, one for each manifest
    audit_logs_manifests/catalog.sql                             derived, rewritten
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, Self

from archive_pipeline import merkle
from archive_pipeline.columns import Column, Field, Kind
from archive_pipeline.digest import ALGORITHM, Digest
from archive_pipeline.months import Month
from archive_pipeline.objects import ArchiveBucket
from scaling.errors import UserError

FORMAT = "audit-archive-manifest/2"
ManifestKind = Literal["archive", "late", "erasure"]
Source = Literal["primary", "replica", "archive"]
GENERATION = re.compile(r".*/(?P<shard>[^/]+)-g(?P<generation>\d{4})\.json")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a table's archive lies in its bucket.

    Attributes:
        prefix: of the data, without the final slash.
    """

    prefix: str

    @property
    def data(self) -> str:
        """Prefix of every part, Athena's LOCATION."""
        return f"{self.prefix}/"

    @property
    def manifests(self) -> str:
        """Prefix of every manifest; outside the LOCATION, where everything is read as Parquet."""
        return f"{self.prefix}_manifests/"

    @property
    def catalog(self) -> str:
        """Key of the table's DDL."""
        return f"{self.manifests}catalog.sql"

    def part(self, month: Month, shard: str, generation: int, number: int, sha256: str) -> str:
        """Key of a part; its content's hash in the name keeps two attempts with different rows apart.

        Args:
            month: of the rows.
            shard: they come from.
            generation: of the month.
            number: of the part.
            sha256: of its bytes, hex.
        """
        return f"{self.data}{month.path}part-{shard}-g{generation:04}-{number:05}-{sha256[:16]}.parquet"

    def manifest(self, month: Month, shard: str, generation: int) -> str:
        """Key of a manifest.

        Args:
            month: it lists.
            shard: the rows come from.
            generation: of the month.
        """
        return f"{self.manifests}{month.path}{shard}-g{generation:04}.json"

    def salts(self, month: Month, shard: str, generation: int) -> str:
        """Key of the salts of a manifest's parts.

        Args:
            month: it lists.
            shard: the rows come from.
            generation: of the month.
        """
        return f"{self.manifests}{month.path}{shard}-g{generation:04}.salts"

    def erased(self, month: Month, shard: str, generation: int) -> str:
        """Key of the leaf hashes of what a generation erased.

        Args:
            month: it lists.
            shard: the rows come from.
            generation: of the month.
        """
        return f"{self.manifests}{month.path}{shard}-g{generation:04}.erased"

    def chain(self, shard: str) -> str:
        """Prefix of a shard's links.

        Args:
            shard: the rows come from.
        """
        return f"{self.manifests}chain/{shard}/"

    def link(self, shard: str, sequence: int) -> str:
        """Key of a link of the chain.

        Args:
            shard: the rows come from.
            sequence: 1, 2, 3 …
        """
        return f"{self.chain(shard)}{sequence:08}.json"


@dataclass(frozen=True, slots=True)
class Part:
    """One published object.

    Attributes:
        key: its key.
        size: bytes.
        sha256: of its bytes, hex.
        digest: of its rows.
        merkle_root: of its rows, hex (`archive_pipeline.merkle`).
        version_id: S3's, of the object that was verified; None in a bucket without versioning.
    """

    key: str
    size: int
    sha256: str
    digest: Digest
    merkle_root: str
    version_id: str | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """The list of a month's parts, with what they add up to.

    Attributes:
        table: ``schema.table`` of the source.
        shard: database the rows come from.
        month: they belong to.
        generation: 1, and one more for each further publication of the month.
        snapshot_lsn: write-ahead log position of the snapshot they were read from.
        created_at: when, by the database's clock.
        created_by: program and version.
        columns: what was archived of each row.
        parts: in order; none for an empty month.
        kind: why the generation exists: ``archive`` the first, ``late`` rows that came later, ``erasure`` on request.
        read_from: ``primary``, ``replica``, or ``archive`` for an erasure, which reads no database.
        supersedes: SHA-256 of the manifest of the generation before; None for the first.
        salts_sha256: of the object with the salts, hex; None for an empty month.
        erased_rows: that this generation left out; 0 but for an erasure.
        erased_sha256: of the object with their leaf hashes, hex; None but for an erasure.
    """

    table: str
    shard: str
    month: Month
    generation: int
    snapshot_lsn: str
    created_at: datetime
    created_by: str
    columns: tuple[Column, ...]
    parts: tuple[Part, ...]
    kind: ManifestKind = "archive"
    read_from: Source = "primary"
    supersedes: str | None = None
    salts_sha256: str | None = None
    erased_rows: int = 0
    erased_sha256: str | None = None

    @property
    def digest(self) -> Digest:
        """What all parts add up to."""
        return sum((part.digest for part in self.parts), Digest())

    @property
    def merkle_root(self) -> str:
        """Root over the roots of the parts, hex; of the empty tree for an empty month."""
        return merkle.root(bytes.fromhex(part.merkle_root) for part in self.parts).hex()

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(part.size for part in self.parts)

    @property
    def schema_sha256(self) -> str:
        """Fingerprint of the columns."""
        return schema_sha256(self.columns)

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, UTF-8, one final newline."""
        digest = self.digest
        return _canonical(
            {
                "format": FORMAT,
                "table": self.table,
                "shard": self.shard,
                "month": self.month.name,
                "time_zone": self.month.zone,
                "from": _instant(self.month.start),
                "to": _instant(self.month.end),
                "generation": self.generation,
                "snapshot_lsn": self.snapshot_lsn,
                "created_at": _instant(self.created_at),
                "created_by": self.created_by,
                "schema": [_column_json(column) for column in self.columns],
                "schema_sha256": self.schema_sha256,
                "row_digest_algorithm": ALGORITHM,
                **_digest_json(digest),
                "bytes": self.size,
                "merkle_root": self.merkle_root,
                "kind": self.kind,
                "read_from": self.read_from,
                "supersedes": self.supersedes,
                "salts_sha256": self.salts_sha256,
                "erased_rows": self.erased_rows,
                "erased_sha256": self.erased_sha256,
                "parts": [
                    {
                        "key": part.key,
                        "bytes": part.size,
                        "sha256": part.sha256,
                        "version_id": part.version_id,
                        "merkle_root": part.merkle_root,
                        **_digest_json(part.digest),
                    }
                    for part in self.parts
                ],
            }
        )

    @classmethod
    def from_bytes(cls, body: bytes, where: str) -> Self:
        """Read a manifest back.

        Args:
            body: as `to_bytes` wrote it.
            where: its key, for the error.

        Raises:
            UserError: it is not a manifest, or its totals are not those of its parts.
        """
        try:
            fields = json.loads(body)
            if fields["format"] != FORMAT or fields["row_digest_algorithm"] != ALGORITHM:
                raise UserError(f"{where} is in format {fields['format']!r}, which this version does not read")
            manifest = cls(
                table=fields["table"],
                shard=fields["shard"],
                month=Month.parse(fields["month"], fields["time_zone"]),
                generation=fields["generation"],
                snapshot_lsn=fields["snapshot_lsn"],
                created_at=datetime.fromisoformat(fields["created_at"]),
                created_by=fields["created_by"],
                columns=tuple(_column_from(column) for column in fields["schema"]),
                parts=tuple(
                    Part(
                        part["key"],
                        part["bytes"],
                        part["sha256"],
                        _digest_from(part),
                        part["merkle_root"],
                        part["version_id"],
                    )
                    for part in fields["parts"]
                ),
                kind=fields["kind"],
                read_from=fields["read_from"],
                supersedes=fields["supersedes"],
                salts_sha256=fields["salts_sha256"],
                erased_rows=fields["erased_rows"],
                erased_sha256=fields["erased_sha256"],
            )
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{where} is not a manifest of this archive; it was damaged or put there by hand") from None
        if manifest.to_bytes() != body:
            raise UserError(f"{where} was altered: its totals are not those of its parts")
        return manifest


@dataclass(frozen=True, slots=True)
class Published:
    """A manifest as found in the bucket.

    Attributes:
        key: its key.
        sha256: of its bytes, hex.
        manifest: what it says.
    """

    key: str
    sha256: str
    manifest: Manifest


def load(bucket: ArchiveBucket, key: str) -> Published:
    """Read one manifest.

    Args:
        bucket: of the archive.
        key: of the manifest.

    Raises:
        UserError: it is not a manifest, or the bucket cannot be read.
        FileNotFoundError: there is none.
    """
    body = bucket.read(key)
    return Published(key, hashlib.sha256(body).hexdigest(), Manifest.from_bytes(body, f"s3://{bucket.name}/{key}"))


def published(
    bucket: ArchiveBucket,
    layout: Layout,
    *,
    month: Month | None = None,
    first: str | None = None,
    last: str | None = None,
) -> Iterator[Published]:
    """Read the published manifests, oldest month first.

    Args:
        bucket: of the archive.
        layout: where the manifests lie.
        month: only this one.
        first: ``YYYY-MM``, none earlier is read.
        last: ``YYYY-MM``, none later is read.

    Raises:
        UserError: one is damaged, or the bucket cannot be read.
    """
    for key in bucket.keys(layout.manifests + (month.path if month else "year=")):
        if GENERATION.fullmatch(key) is None:
            continue
        name = "-".join(re.findall(r"=(\d+)/", key))
        if (first is None or first <= name) and (last is None or name <= last):
            yield load(bucket, key)


def newest(found: Iterable[Published]) -> list[Published]:
    """Of each month and shard the newest generation, which lists all of its parts.

    Args:
        found: manifests in any order.

    Returns:
        One for each month and shard, in the order in which these first appear.
    """
    latest: dict[tuple[Month, str], Published] = {}
    for each in found:
        key = (each.manifest.month, each.manifest.shard)
        if key not in latest or latest[key].manifest.generation < each.manifest.generation:
            latest[key] = each
    return list(latest.values())


def schema_sha256(columns: Sequence[Column]) -> str:
    """Fingerprint of a table's columns: equal schemas, equal text.

    Args:
        columns: of the table.
    """
    return hashlib.sha256(_canonical([_column_json(column) for column in columns])).hexdigest()


def _canonical(value: object) -> bytes:
    return (json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n").encode()


def _instant(instant: datetime) -> str:
    return instant.isoformat().replace("+00:00", "Z")


def _digest_json(digest: Digest) -> dict[str, object]:
    # The sum exceeds what JSON readers hold as a number without loss.
    return {
        "rows": digest.rows,
        "row_digest": str(digest.value),
        "min_created_at_us": digest.min_us,
        "max_created_at_us": digest.max_us,
    }


def _digest_from(fields: dict[str, object]) -> Digest:
    return Digest(
        _integer(fields["rows"]),
        int(str(fields["row_digest"])),
        None if fields["min_created_at_us"] is None else _integer(fields["min_created_at_us"]),
        None if fields["max_created_at_us"] is None else _integer(fields["max_created_at_us"]),
    )


def _integer(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError
    return value


def _column_json(column: Column) -> dict[str, object]:
    return {
        "source": column.source,
        "postgres_type": column.postgres_type,
        "kind": column.kind,
        "exact": {"name": column.exact.name, "type": column.exact.athena},
        "readable": column.readable and {"name": column.readable.name, "type": column.readable.athena},
    }


def _column_from(fields: dict[str, Any]) -> Column:
    kind: Kind = fields["kind"]
    readable = fields["readable"]
    return Column(
        fields["source"],
        fields["postgres_type"],
        kind,
        Field(fields["exact"]["name"], fields["exact"]["type"]),
        readable and Field(readable["name"], readable["type"], utc=kind == "instant"),
    )
