"""What of the archive is as it was published: the walk along its chain, from the pinned end to the first link.

Belongs here: the walk, what Postgres remembers of the chain, what a finding says. Does not: the command line
(`archive_pipeline.audit`), how links are made (`archive_pipeline.chain`), proofs of single rows
(`archive_pipeline.proofs`), or repairing anything.

What is believed, in this order: the chain's end as Postgres pins it; each link because the one after it names its
SHA-256 and because a recorded key signed it; each manifest and each part because a link lists its SHA-256. Nothing in
the bucket is believed for itself, so whoever can write to the bucket alone cannot change the archive unnoticed.
"""

import hashlib
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Self

from psycopg.errors import InsufficientPrivilege, ReadOnlySqlTransaction
from psycopg.types.json import Jsonb

from archive_pipeline import chain, merkle
from archive_pipeline import manifest as manifests
from archive_pipeline.chain import Head, Link, Linked, LinkedPart, Previous
from archive_pipeline.digest import ParquetReader
from archive_pipeline.errors import ChainError
from archive_pipeline.manifest import GENERATION, Layout, Part, Published
from archive_pipeline.merkle import Punctured
from archive_pipeline.months import Month
from archive_pipeline.objects import ArchiveBucket, Version
from archive_pipeline.signing import Signer
from archive_pipeline.snapshot import SourceTable
from scaling.databases import Shard
from scaling.errors import UserError

# A key's first use is recorded after the link that it signed.
VALIDITY_SLACK = timedelta(hours=1)
MAGIC = b"PAR1"
PEEK_BYTES = 1 << 20
PART_OF_SHARD = re.compile(r"part-(?P<shard>.+)-g\d{4}-\d{5}-[0-9a-f]{16}\.parquet")
MONTH_IN_KEY = re.compile(r"year=(\d{4})/month=(\d{2})/")
UNKNOWN = "unknown"

PINNED = """
SELECT sequence, link_key, link_sha256, signature FROM archive.chain_heads WHERE (source_table, shard) = (%s, %s)
"""
KEYS = "SELECT fingerprint, public_key, first_used_at, last_used_at FROM archive.signing_keys"
RECORDED = """
SELECT to_char(month, 'YYYY-MM'), manifest_key, manifest_sha256 FROM archive.months
WHERE (source_table, shard) = (%s, %s) AND manifest_key IS NOT NULL ORDER BY month
"""
PENDING = "SELECT key FROM archive.uploads WHERE (source_table, shard) = (%s, %s)"
PIN = """
INSERT INTO archive.chain_heads (source_table, shard, sequence, link_key, link_sha256, signature)
VALUES (%s, %s, %s, %s, %s, %s)
ON CONFLICT (source_table, shard) DO UPDATE
SET sequence = excluded.sequence, link_key = excluded.link_key, link_sha256 = excluded.link_sha256,
    signature = excluded.signature, pinned_at = clock_timestamp()
"""
RECORD_AUDIT = """
INSERT INTO archive.audits (source_table, shard, deep, links, months, findings, worst)
VALUES (%s, %s, %s, %s, %s, %s, %s)
"""
RECORDED_FINDINGS = 20
RECORD_KEY = """
INSERT INTO archive.signing_keys AS k (fingerprint, algorithm, public_key, source, first_used_at, last_used_at)
VALUES (%s, 'RSASSA_PKCS1_V1_5_SHA_256', %s, 'local', %s, %s)
ON CONFLICT (fingerprint) DO UPDATE SET first_used_at = least(k.first_used_at, excluded.first_used_at),
    last_used_at = greatest(k.last_used_at, excluded.last_used_at)
"""


class Kind(StrEnum):
    """What is wrong."""

    ALTERED = "altered"
    SUBSTITUTED = "substituted"
    MISSING = "missing"
    HIDDEN = "hidden"
    MOVED = "moved"
    REORDERED = "reordered"
    GAP = "chain gap"
    CUT_OFF = "chain cut off"
    WRONG_SIGNATURE = "wrong signature"
    WRONG_KEY = "wrong key"
    UNSIGNED = "unsigned"
    NO_LINK = "manifest without link"
    NO_MANIFEST = "link without manifest"
    STRAY = "stray"
    LEFTOVER = "leftover"
    OTHER_ROWS = "other rows"


@dataclass(frozen=True, slots=True)
class Key:
    """A public key that signed links.

    Attributes:
        public_key: SPKI, DER.
        first_used_at: when it first signed; None where that is not known.
        last_used_at: when it last signed; None where that is not known.
    """

    public_key: bytes
    first_used_at: datetime | None = None
    last_used_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Recorded:
    """A month that Postgres holds to be archived.

    Attributes:
        month: ``YYYY-MM``.
        manifest_key: of its newest manifest.
        manifest_sha256: of that manifest's bytes, hex.
    """

    month: str
    manifest_key: str
    manifest_sha256: str


@dataclass(frozen=True, slots=True)
class Remembered:
    """What Postgres knows of a chain, out of the bucket's reach.

    Attributes:
        pinned: the chain's end; None before the first link.
        keys: that signed, by fingerprint.
        recorded: months that are archived.
    """

    pinned: Head | None
    keys: Mapping[str, Key]
    recorded: tuple[Recorded, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it was published.

    Attributes:
        kind: what.
        month: ``YYYY-MM``, several with a comma when only one of them can be meant, ``unknown`` when none can be told.
        key: of the object.
        text: what was found, in words.
        remedy: what to do.
    """

    kind: Kind
    month: str
    key: str
    text: str
    remedy: str


@dataclass(frozen=True, slots=True)
class MonthAudit:
    """A month as the audit found it.

    Attributes:
        month: ``YYYY-MM``.
        generation: the newest.
        kind: why that generation exists.
        rows: it holds.
        parts: objects.
        bytes: of the objects.
        linked_at: when its link was made; None without one.
        key_fingerprint: of the key that signed the link; None for an unsigned one.
        findings: how many concern it.
    """

    month: str
    generation: int
    kind: str
    rows: int
    parts: int
    bytes: int
    linked_at: datetime | None
    key_fingerprint: str | None
    findings: int = 0


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What an audit found.

    Attributes:
        bucket: its name.
        table: ``schema.table`` of the source.
        shard: database the rows come from.
        pinned: number of the link that Postgres pins; None when nothing is pinned or Postgres was not asked.
        links: in the bucket.
        months: each with its newest generation, oldest first.
        findings: what is wrong, newest month last.
        notes: what is worth knowing and not wrong.
        deep: whether the rows themselves were read.
        end: the chain's end in the bucket; None for an empty chain.
    """

    bucket: str
    table: str
    shard: str
    pinned: int | None
    links: int
    months: tuple[MonthAudit, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    deep: bool
    end: Head | None

    @property
    def sound(self) -> bool:
        """Whether everything is as it was published."""
        return not self.findings

    def to_json(self) -> dict[str, object]:
        """The report for machines."""
        return {**asdict(self), "sound": self.sound}


@dataclass(slots=True)
class _Inventory:
    """Every version under a prefix, by key."""

    current: dict[str, Version] = field(default_factory=dict)
    hidden: dict[str, Version] = field(default_factory=dict)
    older: dict[str, list[Version]] = field(default_factory=dict)

    def read(self, bucket: ArchiveBucket, prefix: str) -> Self:
        for version in bucket.versions(prefix):
            if version.is_latest:
                (self.hidden if version.is_delete_marker else self.current)[version.key] = version
            elif not version.is_delete_marker:
                self.older.setdefault(version.key, []).append(version)
        return self

    def keys(self, prefix: str) -> list[str]:
        return sorted(key for key in self.current if key.startswith(prefix))


@dataclass(slots=True)
class _Newest:
    """A month's newest generation, and what is known of it."""

    month: str
    generation: int
    parts: Sequence[LinkedPart]
    link: Linked | None = None
    found: Published | None = None
    erasure: Published | None = None
    superseded: list[Link] = field(default_factory=list)


def audit(
    bucket: ArchiveBucket,
    layout: Layout,
    table: SourceTable,
    shard: str,
    pinned: Head | None,
    keys: Mapping[str, Key] | None,
    *,
    deep: bool = False,
    on_progress: Callable[[int, int, str], None] = lambda *_: None,
    recorded: Sequence[Recorded] = (),
    pending: Callable[[], Set[str]] = frozenset,
    scratch: Path | None = None,
) -> AuditReport:
    """Audit one chain and everything it lists.

    Args:
        bucket: of the archive.
        layout: where it lies.
        table: the source.
        shard: database the rows come from.
        pinned: the chain's end as Postgres pins it; None begins at the bucket's end, so a cut-off end goes unnoticed.
        keys: every key that signed, by fingerprint; None leaves signatures unchecked.
        deep: read every part, and compute its SHA-256, its digest and its Merkle root again.
        on_progress: told how many of how many objects are done, and which is next.
        recorded: months that Postgres holds to be archived.
        pending: asked for keys that unfinished runs may have put, after the bucket is listed.
        scratch: directory for the parts of a deep audit, one at a time; None is the system's.

    Returns:
        The report.

    Raises:
        UserError: the bucket cannot be read.
    """
    work = _Audit(bucket, layout, table, shard, pinned, keys, deep, on_progress)
    # In this order nothing that a run publishes meanwhile looks like a stray or like a manifest without a link.
    data = _Inventory().read(bucket, layout.data)
    unfinished = pending()
    work.inventory.read(bucket, f"{layout.manifests}year=")
    work.inventory.read(bucket, layout.chain(shard))
    work.inventory.current |= data.current
    work.inventory.hidden |= data.hidden
    work.inventory.older |= data.older
    work.walk()
    work.manifests(recorded)
    work.objects(scratch)
    work.strays(data.keys(layout.data), unfinished)
    return work.report()


def remembered(shard: Shard, table: SourceTable) -> Remembered:
    """Ask Postgres what it knows of a chain.

    Args:
        shard: the database.
        table: the source.

    Raises:
        UserError: the database does not answer.
    """
    of = (str(table), shard.name)
    with shard.transaction() as connection:
        head = connection.execute(PINNED, of).fetchone()
        keys = connection.execute(KEYS).fetchall()
        months = connection.execute(RECORDED, of).fetchall()
    return Remembered(
        Head(*head) if head else None,
        {fingerprint: Key(bytes(public_key), first, last) for fingerprint, public_key, first, last in keys},
        tuple(Recorded(*month) for month in months),
    )


def pending(shard: Shard, table: SourceTable) -> frozenset[str]:
    """Ask Postgres for the objects that unfinished runs may have put.

    Args:
        shard: the database.
        table: the source.

    Raises:
        UserError: the database does not answer.
    """
    with shard.transaction() as connection:
        return frozenset(key for (key,) in connection.execute(PENDING, (str(table), shard.name)))


def audit_shard(
    shard: Shard,
    bucket: ArchiveBucket,
    layout: Layout,
    table: SourceTable,
    *,
    deep: bool = False,
    on_progress: Callable[[int, int, str], None] = lambda *_: None,
    scratch: Path | None = None,
) -> AuditReport:
    """Audit one database's chain from the end that it pins, and record there what was found.

    A login that may only read audits too; then nothing is recorded, and a note says so.

    Args:
        shard: the database.
        bucket: of the archive.
        layout: where it lies.
        table: the source.
        deep: read every part.
        on_progress: told how many of how many objects are done, and which is next.
        scratch: directory for the parts of a deep audit.

    Returns:
        The report.

    Raises:
        UserError: the database or the bucket cannot be read.
    """
    # Before the bucket is listed: what is published meanwhile is in the bucket and not yet here, never the reverse.
    known = remembered(shard, table)
    report = audit(
        bucket,
        layout,
        table,
        shard.name,
        known.pinned,
        known.keys,
        deep=deep,
        on_progress=on_progress,
        recorded=known.recorded,
        pending=lambda: pending(shard, table),
        scratch=scratch,
    )
    try:
        record(shard, table, report)
    except (InsufficientPrivilege, ReadOnlySqlTransaction):
        return replace(report, notes=(*report.notes, "this audit is not on record: the login may only read"))
    return report


def record(shard: Shard, table: SourceTable, report: AuditReport) -> None:
    """Keep in Postgres what an audit found, for those who cannot read the bucket.

    Args:
        shard: the database.
        table: the source.
        report: of the audit of its chain.

    Raises:
        UserError: the database does not answer.
    """
    worst = [asdict(finding) for finding in report.findings[:RECORDED_FINDINGS]]
    with shard.transaction() as connection:
        connection.execute(
            RECORD_AUDIT,
            (
                str(table),
                shard.name,
                report.deep,
                report.links,
                len(report.months),
                len(report.findings),
                Jsonb(worst),
            ),
        )


def pin(shard: Shard, table: SourceTable, end: Head, links: Iterable[Link], keys: Mapping[str, Key]) -> None:
    """Pin a chain's end in Postgres, and record the keys that signed it; after a database was lost or restored.

    Args:
        shard: the database.
        table: the source.
        end: of the chain, verified.
        links: of the chain, verified.
        keys: that signed them, by fingerprint.
    """
    used: dict[str, list[datetime]] = {}
    for link in links:
        if link.key_fingerprint is not None:
            used.setdefault(link.key_fingerprint, []).append(link.created_at)
    with shard.transaction() as connection:
        for fingerprint, times in used.items():
            known = keys[fingerprint]
            connection.execute(RECORD_KEY, (fingerprint, known.public_key, min(times), max(times)))
        connection.execute(PIN, (str(table), shard.name, end.sequence, end.key, end.sha256, end.signature))


def key_of(signer: Signer | None) -> dict[str, Key]:
    """The configured signer's public key by fingerprint, valid at any time.

    Args:
        signer: None gives none.
    """
    return {} if signer is None else {signer.fingerprint: Key(signer.public_key)}


def audit_chain(
    bucket: ArchiveBucket,
    layout: Layout,
    table: SourceTable,
    shard: str,
    pinned: Head | None,
    keys: Mapping[str, Key] | None,
) -> AuditReport:
    """Audit the links of one chain alone, not what they list.

    Args:
        bucket: of the archive.
        layout: where it lies.
        table: the source.
        shard: database the rows come from.
        pinned: the chain's end as Postgres pins it, if it does.
        keys: every key that signed, by fingerprint; None leaves signatures unchecked.

    Returns:
        The report.

    Raises:
        UserError: the bucket cannot be read.
    """
    work = _Audit(bucket, layout, table, shard, pinned, keys, deep=False, on_progress=lambda *_: None)
    work.inventory.read(bucket, layout.chain(shard))
    work.walk()
    return work.report()


class _Audit:
    def __init__(
        self,
        bucket: ArchiveBucket,
        layout: Layout,
        table: SourceTable,
        shard: str,
        pinned: Head | None,
        keys: Mapping[str, Key] | None,
        deep: bool,
        on_progress: Callable[[int, int, str], None],
    ) -> None:
        self.bucket, self.layout, self.table, self.shard = bucket, layout, table, shard
        self.pinned, self.keys, self.deep, self.on_progress = pinned, keys, deep, on_progress
        self.inventory = _Inventory()
        self.links: dict[int, Linked] = {}
        self.newest: dict[str, _Newest] = {}
        self.findings: list[Finding] = []
        self.notes: list[str] = []
        # Links that cannot be believed: number -> (month, generation) where known, for findings that wait for a name.
        self.unnamed: dict[int, list[Finding]] = {}
        self.bad: dict[int, tuple[str, int] | None] = {}
        self.end: Head | None = None
        self.expected: set[str] = set()
        self.replaced: dict[str, str] = {}
        self.found: dict[str, dict[int, Published]] = {}
        self.unproven: list[Punctured] = []

    # -- the chain ----------------------------------------------------------------------------------------------------

    def walk(self) -> None:
        """From the newest link to the first: each must be what the one after it names."""
        prefix = self.layout.chain(self.shard)
        there = {}
        for key in self.inventory.keys(prefix):
            match = chain.NUMBERED.fullmatch(key.removeprefix(prefix))
            if match is None:
                self.find(Kind.STRAY, UNKNOWN, key, "is no link, and lies among them", "remove it")
            else:
                there[int(match[1])] = key
        newest = max(there, default=0)
        top = max(newest, self.pinned.sequence if self.pinned else 0)
        if self.pinned is not None and newest > self.pinned.sequence:
            self.notes.append(
                f"{newest - self.pinned.sequence} link(s) after the pinned number {self.pinned.sequence} are not "
                "pinned yet; the next run of a month continues after them"
            )
        expected: Previous | None = None
        for number in range(top, 0, -1):
            self.progress(top - number, top, self.layout.link(self.shard, number))
            if self.pinned is not None and number == self.pinned.sequence:
                if expected is None:
                    expected = Previous(self.pinned.key, self.pinned.sha256, self.pinned.signature, "", 0)
                elif expected.sha256 != self.pinned.sha256:
                    after = self.links[number + 1].link
                    self.find(
                        Kind.GAP,
                        after.month,
                        after.key,
                        f"does not follow the link that is pinned in Postgres, number {number}",
                        "find out who wrote it, and remove it",
                    )
                    expected = Previous(self.pinned.key, self.pinned.sha256, self.pinned.signature, "", 0)
            good = self.link(number, newest, expected, present=number in there)
            expected = None
            if good is not None:
                self.links[number] = good
                if self.end is None:
                    self.end = good.head
                expected = good.link.previous
                if (expected is None) != (number == 1) or (
                    expected is not None and expected.key != self.layout.link(self.shard, number - 1)
                ):
                    text = "names no link before it" if expected is None else f"follows {expected.key}"
                    self.find(
                        Kind.GAP,
                        good.link.month,
                        good.link.key,
                        f"is number {number} of the chain and {text}; the chain does not reach its beginning",
                        "look for the links before it in a replica or a backup of the bucket",
                    )
                    expected = None
        if self.pinned is None and top:
            self.notes.append("no end of the chain is pinned in Postgres, so links cut off its end would go unnoticed")
        if self.keys is None and any(linked.link.key_fingerprint for linked in self.links.values()):
            self.notes.append("signatures were not checked, no public key is known; name one with --public-key")

    def link(self, number: int, newest: int, expected: Previous | None, *, present: bool) -> Linked | None:
        """Check one link; give what is known to have been its content, from an older version if need be."""
        key = self.layout.link(self.shard, number)
        linked: Linked | None = None
        damaged = ""
        if present:
            try:
                linked = chain.load(self.bucket, key)
            except ChainError:
                damaged = "is not a link any more"
            except FileNotFoundError:
                present = False
        if linked is not None and expected is not None and linked.sha256 != expected.sha256:
            damaged = "holds other bytes than the link after it names"
            if self.pinned is not None and number == self.pinned.sequence:
                damaged = "holds other bytes than the link that is pinned in Postgres"
        place = linked is None or (linked.link.bucket, linked.link.key, linked.link.shard, linked.link.table) == (
            self.bucket.name, key, self.shard, str(self.table),
        )  # fmt: skip
        if present and linked is not None and place and not damaged:
            self.signature(linked, key)
            return linked
        good = self.recover(key, expected)
        month = self.name(good, expected, linked if place else None)
        self.bad[number] = month
        if not present:
            cut_off = number > newest
            text = (
                f"is gone: the chain ends at number {newest}, and Postgres pins number {number}"
                if cut_off and self.pinned is not None and number == self.pinned.sequence
                else "is gone from the chain's end"
                if cut_off
                else "is gone from the chain"
            )
            kind = Kind.CUT_OFF if cut_off else Kind.MISSING
        elif linked is not None and not place:
            kind, text = self.displaced(linked, key)
        else:
            kind, text = Kind.ALTERED, damaged
        finding = Finding(
            kind, month[0] if month else UNKNOWN, key, text, self.remedy(key, expected.sha256 if expected else None)
        )
        if month is None:
            self.unnamed.setdefault(number, []).append(finding)
        else:
            self.findings.append(finding)
        return good

    def displaced(self, linked: Linked, key: str) -> tuple[Kind, str]:
        """Say how a link came to lie where it was not written."""
        link = linked.link
        home = f"s3://{link.bucket}/{link.key}"
        if link.bucket == self.bucket.name and link.key.startswith(self.layout.chain(self.shard)):
            try:
                other = chain.load(self.bucket, link.key)
            except (FileNotFoundError, ChainError):
                other = None
            if other is not None and other.link.key == key:
                return Kind.REORDERED, f"changed places with {link.key}, the link of month {link.month}"
        return Kind.MOVED, f"holds a link that was written to {home}, of {link.table}, month {link.month}"

    def signature(self, linked: Linked, key: str) -> None:
        """Check who signed a link whose bytes are right."""
        link, keys = linked.link, self.keys
        if keys is None:
            return
        remedy = "find out who wrote it; the archive is only trustworthy up to the link before"
        if link.key_fingerprint is None:
            since = [known.first_used_at for known in keys.values() if known.first_used_at is not None]
            if keys and (not since or link.created_at > min(since)):
                self.find(Kind.UNSIGNED, link.month, key, "is not signed, though a signing key was in use", remedy)
            return
        known = keys.get(link.key_fingerprint)
        short = link.key_fingerprint[:16]
        if known is None:
            self.find(Kind.WRONG_KEY, link.month, key, f"is signed with key {short}…, which never was in use", remedy)
        elif (known.first_used_at and link.created_at < known.first_used_at - VALIDITY_SLACK) or (
            known.last_used_at and link.created_at > known.last_used_at + VALIDITY_SLACK
        ):
            self.find(
                Kind.WRONG_KEY,
                link.month,
                key,
                f"was made on {link.created_at:%Y-%m-%d %H:%M} UTC with key {short}…, which was not in use then",
                remedy,
            )
        elif not linked.signed_by(known.public_key):
            self.find(Kind.WRONG_SIGNATURE, link.month, key, f"has a signature that key {short}… did not make", remedy)

    def recover(self, key: str, expected: Previous | None) -> Linked | None:
        """The link that lay there, from a version that has the expected bytes."""
        if expected is None:
            return None
        version = self.version_with(key, expected.sha256)
        if version is None:
            return None
        body = self.bucket.read(key, version.version_id)
        return Linked(Link.from_bytes(body, key), expected.sha256, expected.signature)

    def name(self, good: Linked | None, expected: Previous | None, linked: Linked | None) -> tuple[str, int] | None:
        """Which month a link that cannot be believed was about."""
        if good is not None:
            return good.link.month, good.link.generation
        if expected is not None and expected.month:
            return expected.month, expected.generation
        return (linked.link.month, linked.link.generation) if linked is not None else None

    # -- manifests ----------------------------------------------------------------------------------------------------

    def manifests(self, recorded: Sequence[Recorded]) -> None:
        """Each link's manifest must be there unchanged, and each manifest must have a link."""
        linked: dict[str, Linked] = {}
        for number in sorted(self.links):
            each = self.links[number]
            linked[each.link.manifest_key] = each
            state = self.newest.get(each.link.month)
            if state is None or state.generation <= each.link.generation:
                superseded = [*state.superseded, state.link.link] if state and state.link else []
                self.newest[each.link.month] = _Newest(
                    each.link.month,
                    each.link.generation,
                    each.link.parts,
                    each,
                    superseded=[link for link in superseded if link.generation < each.link.generation],
                )
            else:
                state.superseded.append(each.link)
        for index, (key, each) in enumerate(linked.items()):
            self.progress(index, len(linked), key)
            found = self.manifest(key, each)
            state = self.newest[each.link.month]
            if found is None:
                continue
            self.found.setdefault(each.link.month, {})[each.link.generation] = found
            if state.generation == each.link.generation:
                state.found = found
        unlinked = []
        for key in self.inventory.keys(f"{self.layout.manifests}year="):
            match = GENERATION.fullmatch(key)
            if match is not None and match["shard"] == self.shard and key not in linked:
                try:
                    unlinked.append(manifests.load(self.bucket, key))
                except FileNotFoundError:
                    continue
                except UserError as error:
                    self.find(Kind.NO_LINK, _month_in(key), key, f"no link lists it, and {_rest(error)}", "remove it")
        self.unlinked(sorted(unlinked, key=lambda each: each.manifest.created_at), linked, recorded)

    def manifest(self, key: str, linked: Linked) -> Published | None:
        month, sha256 = linked.link.month, linked.link.manifest_sha256
        try:
            body = self.bucket.read(key)
        except FileNotFoundError:
            marker = self.inventory.hidden.get(key)
            text = "is gone" if marker is None else f"is hidden by delete marker {marker.version_id}"
            text = f"the manifest that link {linked.link.sequence} lists {text}"
            self.find(Kind.NO_MANIFEST, month, key, text, self.remedy(key, sha256))
            body = None
        if body is not None and hashlib.sha256(body).hexdigest() != sha256:
            text = f"holds other bytes than link {linked.link.sequence} lists"
            self.find(Kind.ALTERED, month, key, text, self.remedy(key, sha256))
            body = None
        if body is None:
            version = self.version_with(key, sha256)
            if version is None:
                return None
            body = self.bucket.read(key, version.version_id)
        return Published(key, sha256, manifests.Manifest.from_bytes(body, f"s3://{self.bucket.name}/{key}"))

    def unlinked(
        self, unlinked: Sequence[Published], linked: Mapping[str, Linked], recorded: Sequence[Recorded]
    ) -> None:
        """Manifests that no link lists: their link cannot be believed any more, or there never was one."""
        explained = {month for month in self.bad.values() if month is not None}
        rest = [each for each in unlinked if (each.manifest.month.name, each.manifest.generation) not in explained]
        known = {each.key for each in unlinked}
        lost = [
            each
            for each in recorded
            if each.manifest_key not in linked
            and each.manifest_key not in known
            and (each.month, _generation_in(each.manifest_key)) not in explained
        ]
        candidates = [*(each.manifest.month.name for each in rest), *(each.month for each in lost)]
        numbers = sorted(self.unnamed)
        for position, number in enumerate(numbers):
            month = candidates[position] if len(candidates) == len(numbers) else ", ".join(candidates) or UNKNOWN
            self.findings += [replace(finding, month=month) for finding in self.unnamed[number]]
        for each in unlinked:
            manifest = each.manifest
            state = self.newest.get(manifest.month.name)
            if state is None or state.generation < manifest.generation:
                parts = [LinkedPart(part.key, part.size, part.sha256, part.version_id) for part in manifest.parts]
                superseded = [*state.superseded, *([state.link.link] if state.link else [])] if state else []
                self.expected |= {part.key for part in state.parts} if state else set()
                self.newest[manifest.month.name] = _Newest(
                    manifest.month.name, manifest.generation, parts, None, each, superseded=superseded
                )
        if numbers:
            return
        for each in rest:
            self.find(
                Kind.NO_LINK,
                each.manifest.month.name,
                each.key,
                "no link of the chain lists it",
                "run the month again, which links what a run that died left behind; put there by hand, remove it",
            )
        for lost_month in lost:
            self.find(
                Kind.MISSING,
                lost_month.month,
                lost_month.manifest_key,
                "Postgres records it as the month's manifest, and neither it nor a link that lists it exists",
                self.remedy(lost_month.manifest_key, lost_month.manifest_sha256),
            )

    # -- what the manifests list --------------------------------------------------------------------------------------

    def objects(self, scratch: Path | None) -> None:
        """Each month's newest generation: parts, salts and hashes of erased rows must be there unchanged."""
        states = [self.newest[month] for month in sorted(self.newest)]
        total, at = sum(len(state.parts) for state in states), 0
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="archive-audit-", dir=scratch)))
            reader = stack.enter_context(ParquetReader(directory)) if self.deep else None
            for state in states:
                self.erased(state)
                seeds = self.salts(state)
                listed = {part.key: part for part in state.found.manifest.parts} if state.found else {}
                for number, part in enumerate(state.parts):
                    self.progress(at, total, part.key)
                    at += 1
                    self.expected.add(part.key)
                    sound = self.whole(state.month, part.key, part.sha256, part.version_id, "a part of the month")
                    if sound and reader is not None:
                        seed = seeds[number] if seeds is not None and number < len(seeds) else None
                        self.rows(state, part, listed.get(part.key), seed, reader, directory / "part.parquet")
                if self.unproven:
                    text = f"does not lead to the old root of {len(self.unproven)} part(s) that an erasure replaced"
                    remedy = "their erased rows cannot be told from rows that never were; compare with a backup"
                    self.find(Kind.OTHER_ROWS, state.month, self.erased_key(state), text, remedy)
                self.leftovers(state)
            self.progress(total, total, "")

    def erased(self, state: _Newest) -> None:
        """What keeps the roots of replaced parts provable; the month's last erasure has all of it."""
        self.unproven = []
        generations = self.found.get(state.month, {})
        found = [generations[number] for number in sorted(generations)]
        if state.link is None and state.found is not None:
            found.append(state.found)
        erasures = [each for each in found if each.manifest.erased_sha256 is not None]
        if not erasures or (sha256 := erasures[-1].manifest.erased_sha256) is None:
            return
        state.erasure = erasures[-1]
        key = self.erased_key(state)
        if not self.whole(state.month, key, sha256, None, "the object with hashes of erased rows") or not self.deep:
            return
        listed = {part.key for part in state.parts}
        roots = {part.merkle_root for each in found for part in each.manifest.parts if part.key not in listed}
        remedy = "the erasure was published wrong; the replaced parts cannot be proven any more"
        try:
            punctured = merkle.punctured_from_bytes(self.bucket.read(key))
        except ValueError:
            self.find(Kind.OTHER_ROWS, state.month, key, "does not hold hashes of erased rows", remedy)
            return
        if roots - {each.root.hex() for each in punctured}:
            self.find(Kind.OTHER_ROWS, state.month, key, "lacks hashes of a part that was replaced", remedy)
        nothing_left = [each for each in punctured if len(each.erased) == each.rows]
        self.unproven = [
            each for each in punctured if each not in nothing_left or merkle.root(each.leaves(())) != each.root
        ]

    def erased_key(self, state: _Newest) -> str:
        assert state.erasure is not None  # noqa: S101 - narrows the type
        manifest = state.erasure.manifest
        return self.layout.erased(manifest.month, self.shard, manifest.generation)

    def salts(self, state: _Newest) -> list[merkle.Seeds] | None:
        if state.found is None:
            return None
        manifest = state.found.manifest
        key = self.layout.salts(manifest.month, self.shard, manifest.generation)
        if manifest.salts_sha256 is None:
            return None
        if not self.whole(state.month, key, manifest.salts_sha256, None, "the object with the month's salts"):
            return None
        if not self.deep:
            return None
        try:
            return merkle.salts_from_bytes(self.bucket.read(key))
        except ValueError:
            remedy = "the month was published wrong; its rows cannot be proven one by one"
            self.find(Kind.OTHER_ROWS, state.month, key, "does not hold salts", remedy)
            return None

    def whole(self, month: str, key: str, sha256: str, version_id: str | None, what: str) -> bool:
        """Whether an object is there with the bytes that are listed."""
        stored = self.bucket.head(key)
        if stored is None:
            marker = self.inventory.hidden.get(key)
            if marker is None:
                self.find(Kind.MISSING, month, key, f"{what} is gone", self.remedy(key, sha256, version_id))
            else:
                text = f"{what} is hidden by delete marker {marker.version_id}: queries do not see it"
                self.find(Kind.HIDDEN, month, key, text, self.remedy(key, sha256, version_id))
            return False
        actual = stored.sha256 or self.bucket.sha256_of(key, stored.version_id)
        other_version = version_id is not None and stored.version_id != version_id
        if actual == sha256:
            if other_version:
                self.notes.append(
                    f"{key} (month {month}) is version {stored.version_id}, a copy of the published {version_id}"
                )
            return True
        if other_version:
            text = f"{what} was replaced: version {stored.version_id} is read in place of the published {version_id}"
            self.find(Kind.SUBSTITUTED, month, key, text, self.remedy(key, sha256, version_id))
        else:
            text = f"{what} holds other bytes than its link lists"
            self.find(Kind.ALTERED, month, key, text, self.remedy(key, sha256, version_id))
        return False

    def rows(
        self,
        state: _Newest,
        part: LinkedPart,
        listed: Part | None,
        seeds: merkle.Seeds | None,
        reader: ParquetReader,
        path: Path,
    ) -> None:
        """Read a part and compute everything that is said of it."""
        if self.bucket.download(part.key, path) != part.sha256:
            text = "came back with other bytes than the server's checksum promises"
            self.find(Kind.ALTERED, state.month, part.key, text, self.remedy(part.key, part.sha256, part.version_id))
            return
        if listed is None or state.found is None:
            return
        remedy = "the part was published wrong; compare it with Postgres before the month is pruned"
        columns = state.found.manifest.columns
        self.unproven = [
            each
            for each in self.unproven
            if each.rows - len(each.erased) != listed.digest.rows
            or merkle.root(each.leaves(reader.texts(columns, path))) != each.root
        ]
        if seeds is None:
            if difference := reader.digest(columns, path).difference(listed.digest):
                self.find(Kind.OTHER_ROWS, state.month, part.key, f"holds {difference}", remedy)
            return
        if seeds.rows != listed.digest.rows:
            self.find(Kind.OTHER_ROWS, state.month, part.key, "has salts for another number of rows", remedy)
            return
        verified = reader.verify(columns, path, seeds)
        if difference := verified.digest.difference(listed.digest):
            self.find(Kind.OTHER_ROWS, state.month, part.key, f"holds {difference}", remedy)
        elif verified.merkle_root.hex() != listed.merkle_root:
            text = "its rows and salts have another Merkle root than its manifest says"
            self.find(Kind.OTHER_ROWS, state.month, part.key, text, remedy)
        elif verified.wrongly_rounded:
            text = f"{', '.join(verified.wrongly_rounded)} is not the exact time rounded down"
            self.find(Kind.OTHER_ROWS, state.month, part.key, text, remedy)

    def leftovers(self, state: _Newest) -> None:
        """What an erasure had to remove must be gone: with old salts the erased rows could be guessed from hashes."""
        erasures = [link.generation for link in state.superseded if link.kind == "erasure"]
        if "erasure" in (state.link and state.link.link.kind, state.found and state.found.manifest.kind):
            erasures.append(state.generation)
        if not erasures:
            return
        month = _month(state)
        for generation in range(1, max(erasures)):
            for key in (
                self.layout.salts(month, self.shard, generation),
                self.layout.erased(month, self.shard, generation),
            ):
                versions = [*filter(None, [self.inventory.current.get(key)]), *self.inventory.older.get(key, [])]
                for version in versions:
                    self.find(
                        Kind.LEFTOVER,
                        state.month,
                        key,
                        f"version {version.version_id} still holds salts of rows that were erased since",
                        "remove that version: with it, whoever has a leaf hash can test guesses of an erased row",
                    )
        replaced = {part.key for link in state.superseded for part in link.parts} - {part.key for part in state.parts}
        self.replaced |= dict.fromkeys(replaced, state.month)
        kept = sum(len(self.inventory.older.get(key, ())) for key in replaced)
        if kept:
            self.notes.append(
                f"month {state.month}: {kept} old version(s) of parts that an erasure replaced still exist; "
                "remove them when their retention ends"
            )

    def strays(self, keys: Iterable[str], unfinished: Set[str]) -> None:
        """Everything under the data prefix is read by Athena, so nothing may lie there that no manifest lists."""
        pending = 0
        for key in keys:
            if key in self.expected:
                continue
            if key in unfinished:
                pending += 1
                continue
            if key in self.replaced:
                text = "an erasure replaced it, and it still holds the erased rows"
                self.find(Kind.LEFTOVER, self.replaced[key], key, text, "remove it")
                continue
            named = PART_OF_SHARD.fullmatch(key.rsplit("/", 1)[-1])
            if named is not None and named["shard"] != self.shard and self.is_shard(named["shard"]):
                continue
            size = self.inventory.current[key].size
            what = "an empty object" if size == 0 else "no Parquet" if not self.is_parquet(key, size) else "Parquet"
            self.find(
                Kind.STRAY,
                _month_in(key),
                key,
                f"no manifest lists it: {what}, which queries read as data or fail on",
                "find out who put it there, and remove it",
            )
        if pending:
            self.notes.append(f"{pending} object(s) of unfinished runs; the next run of their month removes them")

    def is_shard(self, shard: str) -> bool:
        return any(True for _ in self.bucket.keys(self.layout.chain(shard)))

    def is_parquet(self, key: str, size: int) -> bool:
        if size > PEEK_BYTES:
            return key.endswith(".parquet")
        try:
            body = self.bucket.read(key)
        except FileNotFoundError:
            return True
        return body.startswith(MAGIC) and body.endswith(MAGIC)

    # -- what is said -------------------------------------------------------------------------------------------------

    def report(self) -> AuditReport:
        """Put everything together."""
        if self.unnamed and not self.newest:  # the chain alone was audited
            self.findings += [finding for number in sorted(self.unnamed) for finding in self.unnamed[number]]
        months = []
        for name in sorted(self.newest):
            state = self.newest[name]
            link, manifest = state.link and state.link.link, state.found and state.found.manifest
            months.append(
                MonthAudit(
                    month=name,
                    generation=state.generation,
                    kind=link.kind if link else manifest.kind if manifest else UNKNOWN,
                    rows=link.rows if link else manifest.digest.rows if manifest else 0,
                    parts=len(state.parts),
                    bytes=sum(part.size for part in state.parts),
                    linked_at=link.created_at if link else None,
                    key_fingerprint=link.key_fingerprint if link else None,
                    findings=sum(name in finding.month.split(", ") for finding in self.findings),
                )
            )
        return AuditReport(
            bucket=self.bucket.name,
            table=str(self.table),
            shard=self.shard,
            pinned=self.pinned.sequence if self.pinned else None,
            links=len(self.links),
            months=tuple(months),
            findings=tuple(sorted(self.findings, key=lambda finding: (finding.month, finding.key))),
            notes=tuple(self.notes),
            deep=self.deep,
            end=self.end,
        )

    def find(self, kind: Kind, month: str, key: str, text: str, remedy: str) -> None:
        self.findings.append(Finding(kind, month, key, text, remedy))

    def version_with(self, key: str, sha256: str, version_id: str | None = None) -> Version | None:
        """An older version of a key that has the right bytes."""
        older = self.inventory.older.get(key, [])
        for version in sorted(older, key=lambda each: each.version_id != version_id):
            stored = self.bucket.head(key, version.version_id)
            if stored is None:
                continue
            if (stored.sha256 or self.bucket.sha256_of(key, version.version_id)) == sha256:
                return version
        return None

    def remedy(self, key: str, sha256: str | None, version_id: str | None = None) -> str:
        """How to get the right bytes back."""
        if sha256 is None:
            return "restore it from a replica or a backup of the bucket"
        version = self.version_with(key, sha256, version_id)
        if version is None:
            return f"restore it from a replica or a backup of the bucket; the right bytes have SHA-256 {sha256}"
        older = [each.version_id for each in self.inventory.older[key]]
        over = [self.inventory.hidden.get(key) or self.inventory.current.get(key)]
        newer = [*(each.version_id for each in over if each is not None), *older[: older.index(version.version_id)]]
        return f"restore version {version.version_id}, which holds the right bytes: " + "; ".join(
            f"aws s3api delete-object --bucket {self.bucket.name} --key '{key}' --version-id {each}" for each in newer
        )

    def progress(self, done: int, total: int, what: str) -> None:
        self.on_progress(done, total, what)


def _month(state: _Newest) -> Month:
    if state.found is not None:
        return state.found.manifest.month
    zone = state.link.link.time_zone if state.link is not None else "UTC"
    return Month.parse(state.month, zone)


def _month_in(key: str) -> str:
    match = MONTH_IN_KEY.search(key)
    return f"{match[1]}-{match[2]}" if match else UNKNOWN


def _generation_in(key: str) -> int:
    match = GENERATION.fullmatch(key)
    return int(match["generation"]) if match else 0


def _rest(error: UserError) -> str:
    return str(error).split(" ", 1)[-1]
