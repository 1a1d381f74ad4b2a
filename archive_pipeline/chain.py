"""The chain of signed links, one for each published manifest, whose newest is pinned in Postgres.

Belongs here: the link, appending one, verifying a link against the one before. Does not: walking the whole archive
(`archive_pipeline.audit`), keys (`archive_pipeline.signing`).

A link's key carries its number and is put with If-None-Match, so two runs that append at once cannot fork the chain:
the bucket gives the number to one, the other takes the next.

The shape is that of CloudTrail's digest files. What is signed is four lines: when the link was made, where it lies
(bucket and key), the SHA-256 of its bytes in hexadecimal, and the signature of the link before it in hexadecimal
(``null`` for the first). The signature is kept in the object's metadata as ``signature``, in hexadecimal, its algorithm
as ``signature-algorithm``. A link is thus bound to its place, to its bytes and to every link before it.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Self

from archive_pipeline import signing
from archive_pipeline.errors import ChainError, ObjectConflictError
from archive_pipeline.manifest import Layout, ManifestKind, Published
from archive_pipeline.objects import ArchiveBucket
from archive_pipeline.signing import Signer

FORMAT = "audit-archive-link/1"
HASH_ALGORITHM = "SHA-256"
SIGNATURE = "signature"
SIGNATURE_ALGORITHM = "signature-algorithm"
NUMBERED = re.compile(r"(\d{8})\.json")
NO_KEYS: Mapping[str, bytes] = MappingProxyType({})
AUDIT = "run python -m archive_pipeline.audit, which names what is wrong and what to do"

# A link is made after its manifest, by the same database's clock, so older links need not be asked whether they are a
# manifest's. The clock may have been set back meanwhile; one that was set back further costs a second link, no more.
CLOCK_SLACK = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class Head:
    """The newest link of a chain, as it is pinned outside the bucket.

    Attributes:
        sequence: 1, 2, 3 …
        key: of the link.
        sha256: of its bytes, hex.
        signature: hex; None where no signing key is configured.
    """

    sequence: int
    key: str
    sha256: str
    signature: str | None


@dataclass(frozen=True, slots=True)
class LinkedPart:
    """One object of the month, as the link lists it.

    Attributes:
        key: its key.
        size: bytes.
        sha256: of its bytes, hex.
        version_id: S3's; None in a bucket without versioning.
    """

    key: str
    size: int
    sha256: str
    version_id: str | None


@dataclass(frozen=True, slots=True)
class Previous:
    """The link before.

    Attributes:
        key: of the link.
        sha256: of its bytes, hex.
        signature: hex; None for an unsigned one.
        month: it is about, so that a link that is gone can be named.
        generation: of that month.
    """

    key: str
    sha256: str
    signature: str | None
    month: str
    generation: int


@dataclass(frozen=True, slots=True)
class Link:
    """What a link says.

    Attributes:
        sequence: 1, 2, 3 …
        table: ``schema.table`` of the source.
        shard: database the rows come from.
        month: ``YYYY-MM``.
        time_zone: of the month.
        generation: of the month.
        kind: of the manifest.
        manifest_key: its key.
        manifest_sha256: of its bytes, hex.
        rows: of the month.
        row_digest: of the month's rows, see `archive_pipeline.digest`.
        merkle_root: of the month, hex.
        parts: of the month.
        bucket: it was written to.
        key: it was written to.
        created_at: when, by the database's clock.
        key_fingerprint: of the key that signed it; None where none is configured.
        previous: the link before; None for the first.
    """

    sequence: int
    table: str
    shard: str
    month: str
    time_zone: str
    generation: int
    kind: ManifestKind
    manifest_key: str
    manifest_sha256: str
    rows: int
    row_digest: str
    merkle_root: str
    parts: tuple[LinkedPart, ...]
    bucket: str
    key: str
    created_at: datetime
    key_fingerprint: str | None
    previous: Previous | None

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, UTF-8, one final newline."""
        previous = self.previous
        fields = {
            "format": FORMAT,
            "sequence": self.sequence,
            "table": self.table,
            "shard": self.shard,
            "month": self.month,
            "time_zone": self.time_zone,
            "generation": self.generation,
            "kind": self.kind,
            "manifest_key": self.manifest_key,
            "manifest_sha256": self.manifest_sha256,
            "rows": self.rows,
            "row_digest": self.row_digest,
            "merkle_root": self.merkle_root,
            "parts": [
                {"key": part.key, "bytes": part.size, "sha256": part.sha256, "version_id": part.version_id}
                for part in self.parts
            ],
            "bucket": self.bucket,
            "key": self.key,
            "created_at": _instant(self.created_at),
            "hash_algorithm": HASH_ALGORITHM,
            "signature_algorithm": None if self.key_fingerprint is None else signing.ALGORITHM,
            "key_fingerprint": self.key_fingerprint,
            "previous_key": previous and previous.key,
            "previous_sha256": previous and previous.sha256,
            "previous_signature": previous and previous.signature,
            "previous_month": previous and previous.month,
            "previous_generation": previous and previous.generation,
        }
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return (text + "\n").encode()

    @classmethod
    def from_bytes(cls, body: bytes, where: str) -> Self:
        """Read a link back.

        Args:
            body: as `to_bytes` wrote it.
            where: its key, for the error.

        Raises:
            ChainError: it is not a link, or not in its canonical form.
        """
        try:
            fields = json.loads(body)
            if fields["format"] != FORMAT:
                raise ChainError(f"{where} is in format {fields['format']!r}, which this version does not read")
            previous = None
            if fields["previous_key"] is not None:
                previous = Previous(*(fields[f"previous_{name}"] for name in Previous.__slots__))
            link = cls(
                sequence=fields["sequence"],
                table=fields["table"],
                shard=fields["shard"],
                month=fields["month"],
                time_zone=fields["time_zone"],
                generation=fields["generation"],
                kind=fields["kind"],
                manifest_key=fields["manifest_key"],
                manifest_sha256=fields["manifest_sha256"],
                rows=fields["rows"],
                row_digest=fields["row_digest"],
                merkle_root=fields["merkle_root"],
                parts=tuple(
                    LinkedPart(part["key"], part["bytes"], part["sha256"], part["version_id"])
                    for part in fields["parts"]
                ),
                bucket=fields["bucket"],
                key=fields["key"],
                created_at=datetime.fromisoformat(fields["created_at"]),
                key_fingerprint=fields["key_fingerprint"],
                previous=previous,
            )
            canonical = link.to_bytes()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ChainError(f"{where} is not a link, it was damaged or put there by hand; {AUDIT}") from None
        if canonical != body:
            raise ChainError(f"{where} was altered, it is not in the form in which links are written; {AUDIT}")
        return link


@dataclass(frozen=True, slots=True)
class Linked:
    """A link as found in the bucket.

    Attributes:
        link: what it says.
        sha256: of its bytes, hex.
        signature: hex, from the object's metadata; None when there is none.
    """

    link: Link
    sha256: str
    signature: str | None

    @property
    def head(self) -> Head:
        """What is pinned of it."""
        return Head(self.link.sequence, self.link.key, self.sha256, self.signature)

    @property
    def message(self) -> bytes:
        """What is signed."""
        return string_to_sign(self.link, self.sha256)

    def signed_by(self, public_key_der: bytes) -> bool:
        """Whether the signature is this link's by this key.

        Args:
            public_key_der: SPKI, DER.
        """
        try:
            signature = bytes.fromhex(self.signature or "")
        except ValueError:
            return False
        return signing.verify(public_key_der, self.message, signature)

    def lists(self, found: Published) -> bool:
        """Whether it is this manifest's link.

        Args:
            found: the manifest.
        """
        return (self.link.manifest_key, self.link.manifest_sha256) == (found.key, found.sha256)


def string_to_sign(link: Link, sha256: str) -> bytes:
    """The four lines that are signed, see the module's description.

    Args:
        link: it says where it lies and which is before it.
        sha256: of its bytes, hex.
    """
    previous = link.previous.signature if link.previous is not None else None
    lines = (_instant(link.created_at), f"{link.bucket}/{link.key}", sha256, previous or "null")
    return "\n".join(lines).encode()


def load(bucket: ArchiveBucket, key: str) -> Linked:
    """Read one link.

    Args:
        bucket: of the archive.
        key: of the link.

    Raises:
        ChainError: it is not a link.
        FileNotFoundError: there is none.
        UserError: the bucket cannot be read.
    """
    where = f"s3://{bucket.name}/{key}"
    stored = bucket.head(key)
    if stored is None:
        raise FileNotFoundError(where)
    body = bucket.read(key, stored.version_id)
    return Linked(Link.from_bytes(body, where), hashlib.sha256(body).hexdigest(), stored.metadata.get(SIGNATURE))


def sequences(bucket: ArchiveBucket, layout: Layout, shard: str) -> list[int]:
    """List the numbers of a shard's links in the bucket, in order.

    Args:
        bucket: of the archive.
        layout: where the chain lies.
        shard: the rows come from.

    Raises:
        UserError: the bucket cannot be listed.
    """
    prefix = layout.chain(shard)
    found = (NUMBERED.fullmatch(key.removeprefix(prefix)) for key in bucket.keys(prefix))
    return [int(match[1]) for match in found if match is not None]


def walk(bucket: ArchiveBucket, layout: Layout, shard: str) -> Iterator[Linked]:
    """Read a shard's links, newest first; whether they follow on each other is not looked at.

    Args:
        bucket: of the archive.
        layout: where the chain lies.
        shard: the rows come from.

    Raises:
        ChainError: one is not a link.
        UserError: the bucket cannot be read.
    """
    for sequence in reversed(sequences(bucket, layout, shard)):
        yield load(bucket, layout.link(shard, sequence))


def append(
    bucket: ArchiveBucket,
    layout: Layout,
    signer: Signer | None,
    found: Published,
    *,
    pinned: Head | None,
    now: datetime,
    keys: Mapping[str, bytes] = NO_KEYS,
) -> Head:
    """Append the link of a manifest, unless it has one already.

    Links after the pinned one are those of runs that died before they could pin them, or that are about to; they are
    verified and continued.

    Args:
        bucket: of the archive.
        layout: where the chain lies.
        signer: None leaves the link unsigned.
        found: the manifest.
        pinned: the newest link known, from which the chain's end is looked for.
        now: by the database's clock.
        keys: public keys (SPKI, DER) in use before the signer's, by fingerprint.

    Returns:
        The chain's newest link; to be pinned unless a newer one is.

    Raises:
        ChainError: the chain's end is not what was pinned, or what follows it was not written by this archive.
        UserError: the bucket or the key does not work.
    """
    shard = found.manifest.shard
    known = {**keys, **({signer.fingerprint: signer.public_key} if signer is not None else {})}
    last = _pinned(bucket, pinned) if pinned is not None else None
    linked = last is not None and _is_linked(bucket, last, found)
    while True:
        sequence = last.link.sequence + 1 if last is not None else 1
        key = layout.link(shard, sequence)
        try:
            following = load(bucket, key)
        except FileNotFoundError:
            if linked and last is not None:
                return last.head
            link = _link(bucket, key, sequence, found, last, signer, now)
            try:
                return _put(bucket, link, signer)
            except ObjectConflictError:
                continue  # another run has this number; its link is verified and continued like a dead run's
        _require_follows(bucket, last, following, key, known, signed=signer is not None)
        last = following
        linked = linked or following.lists(found)


def _link(
    bucket: ArchiveBucket,
    key: str,
    sequence: int,
    found: Published,
    last: Linked | None,
    signer: Signer | None,
    now: datetime,
) -> Link:
    manifest, previous = found.manifest, None
    if last is not None:
        previous = Previous(last.link.key, last.sha256, last.signature, last.link.month, last.link.generation)
    return Link(
        sequence=sequence,
        table=manifest.table,
        shard=manifest.shard,
        month=manifest.month.name,
        time_zone=manifest.month.zone,
        generation=manifest.generation,
        kind=manifest.kind,
        manifest_key=found.key,
        manifest_sha256=found.sha256,
        rows=manifest.digest.rows,
        row_digest=str(manifest.digest.value),
        merkle_root=manifest.merkle_root,
        parts=tuple(LinkedPart(part.key, part.size, part.sha256, part.version_id) for part in manifest.parts),
        bucket=bucket.name,
        key=key,
        created_at=now,
        key_fingerprint=signer.fingerprint if signer is not None else None,
        previous=previous,
    )


def _put(bucket: ArchiveBucket, link: Link, signer: Signer | None) -> Head:
    body = link.to_bytes()
    sha256 = hashlib.sha256(body).hexdigest()
    signature = signer.sign(string_to_sign(link, sha256)).hex() if signer is not None else None
    metadata = {SIGNATURE: signature, SIGNATURE_ALGORITHM: signing.ALGORITHM} if signature is not None else {}
    bucket.put_bytes(link.key, body, content_type="application/json", metadata=metadata)
    return Head(link.sequence, link.key, sha256, signature)


def _pinned(bucket: ArchiveBucket, pinned: Head) -> Linked:
    where = f"s3://{bucket.name}/{pinned.key}"
    try:
        last = load(bucket, pinned.key)
    except FileNotFoundError:
        raise ChainError(f"{where}, the newest link of the chain, is gone; {AUDIT}") from None
    if last.sha256 != pinned.sha256:
        raise ChainError(f"{where}, the newest link of the chain, was altered; {AUDIT}")
    if last.signature != pinned.signature:
        raise ChainError(f"{where}, the newest link of the chain, has another signature than it was given; {AUDIT}")
    return last


def _is_linked(bucket: ArchiveBucket, last: Linked, found: Published) -> bool:
    """Whether a link up to this one is the manifest's."""
    at = last
    while not at.lists(found):
        previous = at.link.previous
        if previous is None or at.link.created_at < found.manifest.created_at - CLOCK_SLACK:
            return False
        where = f"s3://{bucket.name}/{previous.key}"
        try:
            at = load(bucket, previous.key)
        except FileNotFoundError:
            raise ChainError(f"{where}, a link of the chain, is gone; {AUDIT}") from None
        if at.sha256 != previous.sha256:
            raise ChainError(f"{where}, a link of the chain, was altered; {AUDIT}")
    return True


def _require_follows(
    bucket: ArchiveBucket, last: Linked | None, following: Linked, key: str, keys: Mapping[str, bytes], *, signed: bool
) -> None:
    link, where = following.link, f"s3://{bucket.name}/{key}"
    previous = link.previous
    expected = last and (last.link.key, last.sha256, last.signature)
    if (link.bucket, link.key) != (bucket.name, key):
        raise ChainError(f"{where} was not written there, it was moved or copied; {AUDIT}")
    if (previous and (previous.key, previous.sha256, previous.signature)) != expected:
        raise ChainError(f"{where} does not follow the link before it; {AUDIT}")
    if link.key_fingerprint is None:
        if signed:
            raise ChainError(f"{where} is not signed, though a signing key is configured; {AUDIT}")
        return
    public_key = keys.get(link.key_fingerprint)
    if public_key is None:
        raise ChainError(f"{where} is signed with a key that was never in use here; {AUDIT}")
    if not following.signed_by(public_key):
        raise ChainError(f"the signature of {where} is wrong; {AUDIT}")


def _instant(instant: datetime) -> str:
    return instant.isoformat().replace("+00:00", "Z")
