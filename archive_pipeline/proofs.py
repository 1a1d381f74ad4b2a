"""Proof of one row: everything that shows, without the bucket and without Postgres, that it was archived as it reads.

Belongs here: making such a file, and checking it. Does not: the trees (`archive_pipeline.merkle`), who signs
(`archive_pipeline.signing`).

The file leads from the row to a signature, each step by a hash: the row's text and its salt give a leaf; the leaf and
the hashes beside its way give the root of its part; the manifest lists that root; the link lists the manifest's
SHA-256; the signature is over the link and over the signature of the link before it. Nothing of other rows is in it.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain as joined
from pathlib import Path
from typing import Any

from archive_pipeline import chain, merkle, signing
from archive_pipeline import manifest as manifests
from archive_pipeline.chain import Link, Linked
from archive_pipeline.columns import ENCODINGS, Column
from archive_pipeline.digest import ParquetReader
from archive_pipeline.evidence import Key
from archive_pipeline.manifest import Layout, Manifest, Part, Published
from archive_pipeline.merkle import Seeds
from archive_pipeline.months import Month
from archive_pipeline.objects import ArchiveBucket
from archive_pipeline.snapshot import SourceTable
from scaling.errors import UserError

FORMAT = "audit-archive-proof/1"
AUDIT = "run python -m archive_pipeline.audit --deep"


@dataclass(frozen=True, slots=True)
class Checked:
    """What a proof was found to show.

    Attributes:
        problem: why it shows nothing; empty when it holds.
        table: ``schema.table`` of the source.
        month: ``YYYY-MM``.
        key_fingerprint: of the key that signed; None when nobody did.
        linked_at: when it was signed.
        row: the row's columns as text; None is NULL.
    """

    problem: str
    table: str = ""
    month: str = ""
    key_fingerprint: str | None = None
    linked_at: datetime | None = None
    row: Mapping[str, str | None] | None = None


def prove(
    bucket: ArchiveBucket,
    layout: Layout,
    table: SourceTable,
    shard: str,
    identifier: str,
    keys: Mapping[str, Key],
    *,
    month: Month | None = None,
    scratch: Path | None = None,
    on_progress: Callable[[int, int, str], None] = lambda *_: None,
) -> bytes:
    """Make the proof of one row.

    Args:
        bucket: of the archive.
        layout: where it lies.
        table: the source.
        shard: database the row came from.
        identifier: the row's ``id``.
        keys: that signed links, by fingerprint.
        month: of the row; None looks for it.
        scratch: directory for one part at a time; None is the system's.
        on_progress: told how many of how many objects are done, and which is next.

    Returns:
        JSON.

    Raises:
        UserError: there is no such row, or the archive is not sound.
    """
    found = _months(bucket, layout, table, shard, identifier, month)
    parts = [(each, number, part) for each in found for number, part in enumerate(each.manifest.parts)]
    with tempfile.TemporaryDirectory(prefix="archive-proof-", dir=scratch) as name, ParquetReader(Path(name)) as reader:
        path = Path(name) / "part.parquet"
        for done, (each, number, part) in enumerate(parts):
            on_progress(done, len(parts), part.key)
            if bucket.download(part.key, path) != part.sha256:
                raise UserError(f"s3://{bucket.name}/{part.key} holds other bytes than were published; {AUDIT}")
            columns = each.manifest.columns
            field = next(column.exact.name for column in columns if column.source == "id")
            rows = reader.rows_where(field, identifier, path)
            if rows:
                seeds = _seeds(bucket, layout, each)[number]
                return _proof(bucket, layout, each, part, rows[0], seeds, reader, path, keys)
    where = f"month {month.name} of the archive" if month is not None else "the archive"
    raise UserError(f"{where} has no row with this id")


def check(body: bytes, public_key: bytes | None = None) -> Checked:
    """Check a proof, with nothing but itself.

    Args:
        body: as `prove` made it.
        public_key: SPKI, DER, of whom is believed; None believes the key in the proof, so that its fingerprint must be
            compared with one known from elsewhere.

    Returns:
        What it shows, or why it shows nothing.
    """
    try:
        fields = json.loads(body)
        if fields["format"] != FORMAT:
            return Checked(f"the file is in format {fields['format']!r}, which this version does not read")
        manifest_bytes, link_bytes = fields["manifest"].encode(), fields["link"].encode()
        manifest = Manifest.from_bytes(manifest_bytes, "the proof's manifest")
        link = Link.from_bytes(link_bytes, "the proof's link")
        linked = Linked(link, hashlib.sha256(link_bytes).hexdigest(), fields["signature"])
        part = next((part for part in manifest.parts if part.key == fields["part"]), None)
        path = [bytes.fromhex(each) for each in fields["path"]]
        row, salt, index, size = str(fields["row"]), str(fields["salt"]), int(fields["index"]), int(fields["rows"])
        key = public_key
        if key is None and fields["public_key"] is not None:
            key = signing.public_from_pem(fields["public_key"], "the proof's key")
    except UserError as error:
        return Checked(str(error))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Checked("the file is not a proof; it was damaged")
    if part is None or part.digest.rows != size:
        return Checked("the manifest does not list the part that the row is said to be in")
    root = bytes.fromhex(part.merkle_root)
    if not merkle.verify_proof(merkle.leaf(salt, row), index, size, path, root):
        return Checked("the row is not in the part: it, its salt, its place or a hash on its way was changed")
    if (link.manifest_sha256, link.month, link.table) != (
        hashlib.sha256(manifest_bytes).hexdigest(), manifest.month.name, manifest.table,
    ):  # fmt: skip
        return Checked("the link does not list this manifest")
    columns = _read(manifest.columns, row)
    if columns is None:
        return Checked("the row's text does not have the manifest's columns")
    if link.key_fingerprint is None:
        return Checked(
            "the archive is not signed: set ARCHIVE_SIGNING_KEY, and rows archived from then on can be proven"
        )
    if key is None:
        return Checked(f"it carries no public key; name the one of {link.key_fingerprint} with --public-key")
    if signing.fingerprint(key) != link.key_fingerprint:
        return Checked(f"the link is signed with another key, {link.key_fingerprint}")
    if not linked.signed_by(key):
        return Checked("the signature is not by this key over this link")
    return Checked("", manifest.table, manifest.month.name, link.key_fingerprint, link.created_at, columns)


def _months(
    bucket: ArchiveBucket, layout: Layout, table: SourceTable, shard: str, identifier: str, month: Month | None
) -> list[Published]:
    """Newest generations of the months that may hold the row."""
    if month is None:
        from archive_pipeline.query import Archive  # 1 s to import, and whoever checks a proof needs none of it

        literal = identifier.replace("'", "''")
        with Archive(bucket, layout, table) as archive:
            frame = archive.query(
                f"SELECT DISTINCT year, month FROM {_quoted(table.name)} WHERE id::VARCHAR = '{literal}'"  # noqa: S608
            )
        names = {f"{year:04}-{number:02}" for year, number in frame.itertuples(index=False)}
    else:
        names = {month.name}
    found = [
        each
        for name in sorted(names)
        for each in manifests.newest(manifests.published(bucket, layout, first=name, last=name))
        if each.manifest.shard == shard
    ]
    if month is not None and not found:
        raise UserError(f"month {month.name} is not archived")
    return found


def _seeds(bucket: ArchiveBucket, layout: Layout, found: Published) -> list[Seeds]:
    manifest = found.manifest
    key = layout.salts(manifest.month, manifest.shard, manifest.generation)
    try:
        body = bucket.read(key)
    except FileNotFoundError:
        raise UserError(f"s3://{bucket.name}/{key}, which proofs need, is gone; {AUDIT}") from None
    if hashlib.sha256(body).hexdigest() != manifest.salts_sha256:
        raise UserError(f"s3://{bucket.name}/{key} holds other bytes than were published; {AUDIT}")
    return merkle.salts_from_bytes(body)


def _proof(
    bucket: ArchiveBucket,
    layout: Layout,
    found: Published,
    part: Part,
    row: int,
    seeds: Seeds,
    reader: ParquetReader,
    path: Path,
    keys: Mapping[str, Key],
) -> bytes:
    columns, manifest = found.manifest.columns, found.manifest
    linked = next((each for each in chain.walk(bucket, layout, manifest.shard) if each.lists(found)), None)
    if linked is None:
        raise UserError(
            f"no link of the chain lists s3://{bucket.name}/{found.key}; run month {manifest.month.name} again"
        )
    path_up = merkle.proof(joined.from_iterable(reader.leaves(columns, path, seeds)), row)
    text, salt = reader.row_text(columns, path, row), seeds.salt(row)
    root = bytes.fromhex(part.merkle_root)
    if not merkle.verify_proof(merkle.leaf(salt, text), row, part.digest.rows, path_up, root):
        raise UserError(f"s3://{bucket.name}/{part.key} has another Merkle root than was published; {AUDIT}")
    known = keys.get(linked.link.key_fingerprint or "")
    fields: dict[str, Any] = {
        "format": FORMAT,
        "row": text,
        "salt": salt,
        "index": row,
        "rows": part.digest.rows,
        "path": [each.hex() for each in path_up],
        "part": part.key,
        "manifest": manifest.to_bytes().decode(),
        "link": linked.link.to_bytes().decode(),
        "signature": linked.signature,
        "public_key": None if known is None else signing.public_pem(known.public_key),
    }
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


def _read(columns: Sequence[Column], text: str) -> dict[str, str | None] | None:
    """Take a row's text (`archive_pipeline.digest`) apart; None when it is not one of these columns."""
    rest, values = text.encode(), {}
    try:
        for column in columns:
            if ENCODINGS[column.kind].bounded:
                value, mark, rest = rest.partition(b"|")
                if not mark:
                    return None
                values[column.source] = value.decode() if value else None
                continue
            length, mark, rest = rest.partition(b":")
            if not mark or (length and not length.isdigit()):
                return None
            size = int(length) if length else 0
            if len(rest) < size:
                return None
            values[column.source] = rest[:size].decode() if length else None
            rest = rest[size:]
    except UnicodeDecodeError:
        return None
    return None if rest else values


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
