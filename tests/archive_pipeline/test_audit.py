"""The audit: every way of tampering is named with its month, and a single row can be proven to anybody."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import boto3
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from archive_pipeline import chain, evidence, manifest, merkle, proofs, signing
from archive_pipeline.archive import Target
from archive_pipeline.audit import main
from archive_pipeline.chain import Head, Linked, Previous, string_to_sign
from archive_pipeline.digest import ParquetReader
from archive_pipeline.erase import Erasure, erase
from archive_pipeline.errors import ChainError
from archive_pipeline.evidence import AuditReport, Kind, audit, audit_shard, remembered
from archive_pipeline.manifest import Layout, Published
from archive_pipeline.merkle import Punctured
from archive_pipeline.months import Month
from archive_pipeline.objects import ArchiveBucket
from archive_pipeline.parts import PartSize
from archive_pipeline.signing import LocalSigner, new_key
from archive_pipeline.snapshot import SourceTable
from devstack.aws import Aws
from devstack.servers import Servers
from scaling.databases import Shard
from scaling.errors import UserError
from scaling.settings import ArchiveSettings, load
from tests.archive_pipeline.conftest import Room

PEM = new_key(2048)
SIGNER = LocalSigner(PEM)
ATTACKER = LocalSigner(new_key(2048))
MONTHS = (Month(2025, 1), Month(2025, 2), Month(2025, 3), Month(2025, 4))
EMPTY = Month(2025, 2)
Content = dict[str, tuple[bytes, dict[str, str]]]


@dataclass
class Archived:
    """Four months, archived and signed; February is empty. Each test may spoil them, `restore` undoes it."""

    room: Room
    environment: dict[str, str]
    name: str
    content: Content
    versions: set[tuple[str, str]]
    links: list[Linked]
    touched: set[str]

    @property
    def versioned(self) -> bool:
        return self.name == "versioned"

    @property
    def bucket(self) -> ArchiveBucket:
        return self.room.target.bucket

    @property
    def layout(self) -> Layout:
        return self.room.target.layout

    def link_key(self, sequence: int) -> str:
        return self.layout.link("main", sequence)

    def link(self, sequence: int) -> Linked:
        return chain.load(self.bucket, self.link_key(sequence))

    def found(self, month: Month, generation: int = 1) -> Published:
        return manifest.load(self.bucket, self.layout.manifest(month, "main", generation))

    def part(self, month: Month) -> str:
        return self.found(month).manifest.parts[0].key

    def put(self, key: str, body: bytes, metadata: dict[str, str] | None = None) -> None:
        """Write whatever is there, as only somebody outside the archive does."""
        self.touched.add(key)
        self.bucket.client.put_object(Bucket=self.bucket.name, Key=key, Body=body, Metadata=metadata or {})

    def copy(self, source: str, key: str) -> None:
        stored = self.bucket.head(source)
        assert stored is not None
        self.put(key, self.bucket.read(source), dict(stored.metadata))

    def remove(self, *keys: str) -> None:
        self.touched |= set(keys)
        for key in keys:
            self.bucket.delete(key)

    def publish(self, made: manifest.Manifest, *, pinned: bool = True) -> Published:
        """Publish a manifest that the pipeline never would, signed by its key."""
        key = self.layout.manifest(made.month, made.shard, made.generation)
        self.bucket.put_bytes(key, made.to_bytes(), content_type="application/json")
        found = manifest.load(self.bucket, key)
        head = remembered(self.room.shard, self.room.target.table).pinned
        now = made.created_at + timedelta(minutes=1)
        head = chain.append(self.bucket, self.layout, SIGNER, found, pinned=head, now=now)
        if pinned:
            self.pin(head)
        return found

    def pin(self, head: Head) -> None:
        self.room.admin.execute(
            "UPDATE archive.chain_heads SET sequence = %s, link_key = %s, link_sha256 = %s, signature = %s",
            (head.sequence, head.key, head.sha256, head.signature),
        )

    def audit(self, **options: Any) -> AuditReport:
        return audit_shard(self.room.shard, self.bucket, self.layout, self.room.target.table, **options)

    def current(self) -> Content:
        found = {}
        for key in self.bucket.keys(""):
            stored = self.bucket.head(key)
            assert stored is not None
            found[key] = (self.bucket.read(key), dict(stored.metadata))
        return found

    def restore(self) -> None:
        if self.versioned:
            for version in self.bucket.versions(""):
                if (version.key, version.version_id) not in self.versions:
                    self.bucket.delete(version.key, version.version_id)
        else:
            self.remove(*(set(self.bucket.keys("")) - self.content.keys()))
            for key in self.touched & self.content.keys():
                self.put(key, *self.content[key])
        self.touched.clear()
        self.room.admin.execute(
            "DELETE FROM archive.chain_heads; DELETE FROM archive.signing_keys; DELETE FROM archive.uploads; "
            "DELETE FROM archive.months"
        )
        self.room.admin.execute(f"INSERT INTO archive.months SELECT * FROM months_of_{self.name}".encode())
        keys = {SIGNER.fingerprint: evidence.Key(SIGNER.public_key)}
        links = [linked.link for linked in self.links]
        evidence.pin(self.room.shard, self.room.target.table, self.links[-1].head, links, keys)


@pytest.fixture(scope="module")
def both(running_servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Archived]]:
    """One archive in a bucket that keeps versions, one in a bucket that does not."""
    with pytest.MonkeyPatch.context() as patch, running_servers.database() as database:
        shard = Shard("main", database.dsn, owner_dsn=database.owner_dsn)
        with (
            running_servers.bucket() as plain,
            running_servers.bucket() as versioned,
            psycopg.connect(database.admin_dsn, autocommit=True) as admin,
        ):
            plain.server.client().put_bucket_versioning(
                Bucket=versioned.name, VersioningConfiguration={"Status": "Enabled"}
            )
            made = {}
            for name, bucket in (("plain", plain), ("versioned", versioned)):
                environment = {**database.environment(), **bucket.environment(), "ARCHIVE_SIGNING_KEY": PEM}
                for variable, value in environment.items():
                    patch.setenv(variable, value)
                target = Target(
                    table=SourceTable("public", "audit_logs"),
                    bucket=ArchiveBucket.from_settings(load(ArchiveSettings)),
                    layout=Layout("audit_logs"),
                    grace=timedelta(hours=1),
                    part_size=PartSize(row_group_bytes=30_000, part_bytes=10_000_000),
                    batch_bytes=20_000,
                    scratch=tmp_path_factory.mktemp(name),
                    signer=SIGNER,
                )
                room = Room(shard, admin, target, database, bucket)
                for month in MONTHS:
                    if month != EMPTY and name == "plain":
                        room.fill(300, month)
                    room.archive(month)
                archived = Archived(room, environment, name, {}, set(), [], set())
                archived.content = archived.current()
                archived.links = [archived.link(number) for number in range(1, len(MONTHS) + 1)]
                archived.versions = {(each.key, each.version_id) for each in archived.bucket.versions("")}
                # Both archives are of the one table; each gets its pin from `restore`, before each test.
                admin.execute(f"CREATE TABLE months_of_{name} AS SELECT * FROM archive.months".encode())
                admin.execute("DELETE FROM archive.months; DELETE FROM archive.chain_heads")
                made[name] = archived
            yield made
        shard.close()


@pytest.fixture
def archived(
    both: dict[str, Archived],
    request: pytest.FixtureRequest,
    settings_environment: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> Archived:
    one = both[getattr(request, "param", "plain")]
    settings_environment(**one.environment)
    # A new client of S3 takes longer than the audit of four months.
    monkeypatch.setattr(ArchiveBucket, "from_settings", lambda _: one.bucket)
    one.restore()
    return one


in_both = pytest.mark.parametrize("archived", ["plain", "versioned"], indirect=True)
versioned = pytest.mark.parametrize("archived", ["versioned"], indirect=True)


def kinds(report: AuditReport) -> list[tuple[str, str]]:
    return sorted((finding.month, str(finding.kind)) for finding in report.findings)


# -- a sound archive ------------------------------------------------------------------------------------------------


@in_both
def test_an_untouched_archive_is_sound_to_the_last_row(archived: Archived, capsys: pytest.CaptureFixture[str]) -> None:
    report = archived.audit(deep=True)
    assert (report.findings, report.notes, report.links, report.pinned) == ((), (), 4, 4)
    assert [(month.month, month.rows) for month in report.months] == [
        ("2025-01", 300), ("2025-02", 0), ("2025-03", 300), ("2025-04", 300),
    ]  # fmt: skip
    assert {month.key_fingerprint for month in report.months} == {SIGNER.fingerprint}
    assert main([]) == 0
    assert main(["verify", "--deep", "--offline"]) == 0
    assert "4 month(s), 4 link(s), rows not read (--deep reads them): sound" in capsys.readouterr().out


def test_the_report_can_be_read_by_machines(archived: Archived, capsys: pytest.CaptureFixture[str]) -> None:
    archived.remove(archived.part(MONTHS[2]))
    assert main(["--json"]) == 1
    (report,) = json.loads(capsys.readouterr().out)
    assert report["sound"] is False
    assert [(finding["month"], finding["kind"]) for finding in report["findings"]] == [("2025-03", "missing")]
    assert [month["findings"] for month in report["months"]] == [0, 0, 1, 0]


# -- tampering ------------------------------------------------------------------------------------------------------


def parquet() -> bytes:
    body = io.BytesIO()
    pq.write_table(pa.table({"id": ["x"]}), body)
    return body.getvalue()


def alter(key: str, a: Archived) -> None:
    body = bytearray(a.bucket.read(key))
    body[len(body) // 2] ^= 1
    stored = a.bucket.head(key)
    assert stored is not None
    a.put(key, bytes(body), dict(stored.metadata))


def swap_links(a: Archived) -> None:
    second, third = a.content[a.link_key(2)], a.content[a.link_key(3)]
    a.put(a.link_key(2), *third)
    a.put(a.link_key(3), *second)


def move_a_part(a: Archived) -> None:
    key = a.part(MONTHS[0])
    a.copy(key, key.replace("month=01", "month=03"))
    a.remove(key)


def forge_a_link(a: Archived, signer: LocalSigner | None, **changes: Any) -> None:
    """Append a link as somebody who can write to the bucket, and has another key or none."""
    last, key = a.link(4), a.link_key(5)
    month = Month(2025, 5)
    made = replace(a.found(MONTHS[3]).manifest, month=month, parts=(), salts_sha256=None)
    a.put(a.layout.manifest(month, "main", 1), made.to_bytes())
    found = a.found(month)
    link = replace(
        last.link,
        sequence=5, key=key, month=month.name, manifest_key=found.key, manifest_sha256=found.sha256, parts=(), rows=0,
        key_fingerprint=signer.fingerprint if signer is not None else None,
        previous=Previous(last.link.key, last.sha256, last.signature, last.link.month, 1),
        **changes,
    )  # fmt: skip
    sha256 = hashlib.sha256(link.to_bytes()).hexdigest()
    signature = {} if signer is None else {"signature": signer.sign(string_to_sign(link, sha256)).hex()}
    a.put(key, link.to_bytes(), signature)


def forge_a_name(a: Archived) -> None:
    forge_a_link(a, ATTACKER)
    forged = a.link(5)
    link = replace(forged.link, key_fingerprint=SIGNER.fingerprint)
    a.put(link.key, link.to_bytes(), {"signature": forged.signature or ""})


def rewrite_the_end(a: Archived) -> None:
    """Replace the newest link by another of one's own, as if the month had been archived otherwise."""
    link = replace(a.link(4).link, rows=1, key_fingerprint=ATTACKER.fingerprint)
    sha256 = hashlib.sha256(link.to_bytes()).hexdigest()
    a.put(link.key, link.to_bytes(), {"signature": ATTACKER.sign(string_to_sign(link, sha256)).hex()})


def sign_again(a: Archived) -> None:
    key = a.link_key(3)
    a.put(key, a.bucket.read(key), {"signature": ATTACKER.sign(a.link(3).message).hex()})


def take_the_signature_off(a: Archived) -> None:
    a.put(a.link_key(3), a.bucket.read(a.link_key(3)))


def add_a_manifest(a: Archived) -> None:
    made = replace(a.found(MONTHS[3]).manifest, month=Month(2025, 5), parts=(), salts_sha256=None)
    a.put(a.layout.manifest(made.month, "main", 1), made.to_bytes())


def remove_a_month_without_a_trace(a: Archived) -> None:
    found = a.found(MONTHS[3])
    salts = a.layout.salts(MONTHS[3], "main", 1)
    a.remove(a.link_key(4), found.key, salts, *(part.key for part in found.manifest.parts))


def remove_the_end_and_the_pin(a: Archived) -> None:
    remove_a_month_without_a_trace(a)
    a.room.admin.execute("DELETE FROM archive.chain_heads")


JAN, FEB, MAR, APR, MAY = "2025-01", "2025-02", "2025-03", "2025-04", "2025-05"
TAMPERING: dict[str, tuple[Callable[[Archived], None], list[tuple[str, Kind]], list[tuple[str, Kind]] | None]] = {
    # what: (how, findings in a bucket without versions, findings in one with versions where they differ)
    "a part is altered": (
        lambda a: alter(a.part(MONTHS[2]), a), [(MAR, Kind.ALTERED)], [(MAR, Kind.SUBSTITUTED)],
    ),
    "a part is replaced by other valid Parquet": (
        lambda a: a.put(a.part(MONTHS[2]), parquet()), [(MAR, Kind.ALTERED)], [(MAR, Kind.SUBSTITUTED)],
    ),
    "a part is removed": (
        lambda a: a.remove(a.part(MONTHS[0])), [(JAN, Kind.MISSING)], [(JAN, Kind.HIDDEN)],
    ),
    "a part is moved to another month": (
        move_a_part, [(JAN, Kind.MISSING), (MAR, Kind.STRAY)], [(JAN, Kind.HIDDEN), (MAR, Kind.STRAY)],
    ),
    "a part is copied to another month": (
        lambda a: a.copy(a.part(MONTHS[0]), a.part(MONTHS[0]).replace("month=01", "month=02")),
        [(FEB, Kind.STRAY)], None,
    ),
    "a manifest is altered": (
        lambda a: alter(a.found(MONTHS[0]).key, a), [(JAN, Kind.ALTERED)], None,
    ),
    "a manifest is removed": (
        lambda a: a.remove(a.found(MONTHS[2]).key), [(MAR, Kind.NO_MANIFEST)], None,
    ),
    "the manifest of an empty month is removed": (
        lambda a: a.remove(a.found(EMPTY).key), [(FEB, Kind.NO_MANIFEST)], None,
    ),
    "a manifest lies in another's place": (
        lambda a: a.copy(a.found(MONTHS[0]).key, a.found(MONTHS[2]).key), [(MAR, Kind.ALTERED)], None,
    ),
    "a manifest is added": (add_a_manifest, [(MAY, Kind.NO_LINK)], None),
    "the salts are altered": (
        lambda a: alter(a.layout.salts(MONTHS[2], "main", 1), a), [(MAR, Kind.ALTERED)], None,
    ),
    "the salts are removed": (
        lambda a: a.remove(a.layout.salts(MONTHS[2], "main", 1)), [(MAR, Kind.MISSING)], [(MAR, Kind.HIDDEN)],
    ),
    "a link is altered": (lambda a: alter(a.link_key(2), a), [(FEB, Kind.ALTERED)], None),
    "a link is rewritten in its own form": (
        lambda a: a.put(a.link_key(3), replace(a.link(3).link, rows=1).to_bytes(), {"signature": "00"}),
        [(MAR, Kind.ALTERED)], None,
    ),
    "a link is replaced by other text": (lambda a: a.put(a.link_key(3), b"{}"), [(MAR, Kind.ALTERED)], None),
    "the first link is removed": (lambda a: a.remove(a.link_key(1)), [(JAN, Kind.MISSING)], None),
    "a link in the middle is removed": (lambda a: a.remove(a.link_key(3)), [(MAR, Kind.MISSING)], None),
    "two links in the middle are removed": (
        lambda a: a.remove(a.link_key(2), a.link_key(3)), [(FEB, Kind.MISSING), (MAR, Kind.MISSING)], None,
    ),
    "the newest link is removed": (lambda a: a.remove(a.link_key(4)), [(APR, Kind.CUT_OFF)], None),
    "the chain is cut off after its first link": (
        lambda a: a.remove(a.link_key(2), a.link_key(3), a.link_key(4)),
        [(FEB, Kind.CUT_OFF), (MAR, Kind.CUT_OFF), (APR, Kind.CUT_OFF)], None,
    ),
    "the whole chain is removed": (
        lambda a: a.remove(*(a.link_key(number) for number in range(1, 5))),
        [(JAN, Kind.CUT_OFF), (FEB, Kind.CUT_OFF), (MAR, Kind.CUT_OFF), (APR, Kind.CUT_OFF)], None,
    ),
    "a month is removed without a trace": (remove_a_month_without_a_trace, [(APR, Kind.CUT_OFF)], [
        (APR, Kind.CUT_OFF), (APR, Kind.NO_MANIFEST), (APR, Kind.HIDDEN), (APR, Kind.HIDDEN),
    ]),
    "a month is removed and the pin is lost too": (remove_the_end_and_the_pin, [(APR, Kind.MISSING)], None),
    "two links change places": (swap_links, [(FEB, Kind.REORDERED), (MAR, Kind.REORDERED)], None),
    "a link lies in another's place": (
        lambda a: a.copy(a.link_key(1), a.link_key(3)), [(MAR, Kind.MOVED)], None,
    ),
    "the newest link is rewritten with another key": (rewrite_the_end, [(APR, Kind.ALTERED)], None),
    "a link is signed again by somebody else": (sign_again, [(MAR, Kind.WRONG_SIGNATURE)], None),
    "a link loses its signature": (take_the_signature_off, [(MAR, Kind.WRONG_SIGNATURE)], None),
    "a link is appended with a strange key": (lambda a: forge_a_link(a, ATTACKER), [(MAY, Kind.WRONG_KEY)], None),
    "a link is appended under the name of the right key": (forge_a_name, [(MAY, Kind.WRONG_SIGNATURE)], None),
    "an unsigned link is appended": (
        lambda a: forge_a_link(a, None, created_at=a.link(4).link.created_at + timedelta(seconds=1)),
        [(MAY, Kind.UNSIGNED)], None,
    ),
    "an empty object lies among the data": (
        lambda a: a.put("audit_logs/year=2025/month=01/part.parquet", b""), [(JAN, Kind.STRAY)], None,
    ),
    "a folder was made by a console": (
        lambda a: a.put("audit_logs/year=2025/month=02/", b""), [(FEB, Kind.STRAY)], None,
    ),
    "a text file lies among the data": (
        lambda a: a.put("audit_logs/year=2025/month=03/README.txt", b"hello"), [(MAR, Kind.STRAY)], None,
    ),
    "Parquet that no manifest lists lies among the data": (
        lambda a: a.put("audit_logs/year=2025/month=01/more.parquet", parquet()), [(JAN, Kind.STRAY)], None,
    ),
}  # fmt: skip


# case 68
@pytest.mark.parametrize(
    ("archived", "what"),
    [("plain", what) for what in TAMPERING]
    + [("versioned", what) for what, (_, _, other) in TAMPERING.items() if other],
    indirect=["archived"],
)
def test_tampering_is_named_with_its_exact_month_and_exit_code_1(
    archived: Archived, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, without, other = TAMPERING[what]
    spoil(archived)
    capsys.readouterr()
    assert main([]) == 1
    said = [line.split(": ", 1)[0] for line in capsys.readouterr().out.splitlines() if line.startswith("2025-")]
    expected = other if archived.versioned and other is not None else without
    assert sorted(said) == sorted(f"{month}  {kind}" for month, kind in expected)


# case 54
@pytest.mark.parametrize(
    ("key", "body", "words"),
    [
        ("audit_logs/year=2025/month=01/x.parquet", b"", "an empty object"),
        ("audit_logs/year=2025/month=01/x.csv", b"id,action\n", "no Parquet"),
        ("audit_logs/year=2025/month=01/x.parquet", b"PAR1 cut off", "no Parquet"),
    ],
)
def test_an_object_that_is_no_parquet_or_empty_is_found_before_it_breaks_queries(
    archived: Archived, key: str, body: bytes, words: str
) -> None:
    archived.put(key, body)
    (finding,) = archived.audit().findings
    assert (finding.month, finding.key) == (JAN, key)
    assert words in finding.text
    assert "remove it" in finding.remedy


# case 48
@versioned
@pytest.mark.parametrize("removed", [True, False], ids=["deleted", "replaced"])
def test_an_archived_object_that_is_gone_or_replaced_is_named_and_comes_back_from_the_version_that_is_named(
    archived: Archived, removed: bool
) -> None:
    """Its rows were dropped from Postgres long ago, so the version is all there is."""
    part = archived.found(MONTHS[2]).manifest.parts[0]
    if removed:
        archived.remove(part.key)
    else:
        archived.put(part.key, parquet())
        archived.put(part.key, b"again")
    (finding,) = archived.audit().findings
    assert finding.month == MAR
    assert f"restore version {part.version_id}" in finding.remedy
    for command in finding.remedy.split(": ", 1)[1].split("; "):
        words = command.split()
        assert words[:3] == ["aws", "s3api", "delete-object"]
        named = dict(zip(words[3::2], words[4::2], strict=True))
        archived.bucket.delete(named["--key"].strip("'"), named["--version-id"])
    report = archived.audit(deep=True)
    assert (report.findings, report.notes) == ((), ())


def test_what_is_gone_from_a_bucket_without_versions_is_asked_back_by_its_hash(archived: Archived) -> None:
    part = archived.found(MONTHS[2]).manifest.parts[0]
    archived.remove(part.key)
    (finding,) = archived.audit().findings
    assert "replica or a backup" in finding.remedy
    assert part.sha256 in finding.remedy


@versioned
def test_a_copy_of_the_same_bytes_in_another_version_is_worth_a_note_and_no_finding(archived: Archived) -> None:
    key = archived.part(MONTHS[2])
    archived.copy(key, key)
    report = archived.audit(deep=True)
    assert report.sound
    assert any(key in note for note in report.notes)


def test_links_altered_in_every_version_still_leave_the_rest_of_the_audit_exact(archived: Archived) -> None:
    for number in (1, 3):
        alter(archived.link_key(number), archived)
    archived.remove(archived.part(MONTHS[3]))
    assert kinds(archived.audit()) == [(JAN, "altered"), (MAR, "altered"), (APR, "missing")]


def test_without_its_pin_a_cut_off_end_is_only_visible_in_what_postgres_recorded(archived: Archived) -> None:
    remove_a_month_without_a_trace(archived)
    assert kinds(audit(archived.bucket, archived.layout, archived.room.target.table, "main", None, None)) == []
    assert main(["--offline"]) == 0
    assert main([]) == 1


def test_a_chain_that_begins_in_the_middle_has_a_gap(archived: Archived) -> None:
    for number in (3, 4):
        archived.remove(archived.link_key(number))
    second = replace(archived.link(2).link, previous=None)
    archived.remove(archived.link_key(1))
    sha256 = hashlib.sha256(second.to_bytes()).hexdigest()
    signature = SIGNER.sign(string_to_sign(second, sha256)).hex()
    archived.put(second.key, second.to_bytes(), {"signature": signature})
    archived.pin(Head(2, second.key, sha256, signature))
    gap = next(finding for finding in archived.audit().findings if finding.kind is Kind.GAP)
    assert (gap.month, gap.key) == (FEB, second.key)


def test_a_link_after_the_pin_that_builds_on_another_end_is_named(archived: Archived) -> None:
    rewrite_the_end(archived)
    forge_a_link(archived, ATTACKER)
    found = kinds(archived.audit())
    assert (MAY, "chain gap") in found
    assert (APR, "altered") in found


# -- keys -------------------------------------------------------------------------------------------------------------


def test_links_of_a_former_key_stay_valid_after_a_change_of_keys(archived: Archived) -> None:
    other = LocalSigner(new_key(2048))
    made = replace(archived.found(EMPTY).manifest, month=Month(2025, 5))
    archived.put(archived.layout.manifest(made.month, "main", 1), made.to_bytes())
    known = remembered(archived.room.shard, archived.room.target.table)
    now = made.created_at + timedelta(days=1)
    head = chain.append(
        archived.bucket, archived.layout, other, archived.found(made.month), pinned=known.pinned, now=now
    )
    archived.pin(head)
    assert kinds(archived.audit()) == [(MAY, "wrong key")]
    archived.room.admin.execute(
        """INSERT INTO archive.signing_keys (fingerprint, algorithm, public_key, source, first_used_at, last_used_at)
           VALUES (%s, 'RSASSA_PKCS1_V1_5_SHA_256', %s, 'local', %s, %s)""",
        (other.fingerprint, other.public_key, now, now),
    )
    report = archived.audit()
    assert report.sound
    assert {month.key_fingerprint for month in report.months} == {SIGNER.fingerprint, other.fingerprint}


def test_a_key_is_not_valid_outside_the_time_of_its_use(archived: Archived) -> None:
    archived.room.admin.execute(
        "UPDATE archive.signing_keys SET first_used_at = first_used_at - interval '1 year', "
        "last_used_at = last_used_at - interval '1 year'"
    )
    assert {kind for _, kind in kinds(archived.audit())} == {"wrong key"}


def test_a_chain_signed_by_kms_is_sound_and_only_as_long_as_its_public_key_is_known(
    room: Room, aws: Aws, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in aws.environment().items():
        monkeypatch.setenv(name, value)
    kms = boto3.client("kms")
    key = kms.create_key(KeyUsage="SIGN_VERIFY", KeySpec="RSA_2048")["KeyMetadata"]["KeyId"]
    monkeypatch.setenv("ARCHIVE_SIGNING_KMS_KEY", key)
    signer = signing.signer_from(load(ArchiveSettings))
    assert signer is not None
    room.target = replace(room.target, signer=signer)
    room.log("2025-01-15")
    room.archive()
    assert main([]) == 0
    source = room.admin.execute("SELECT fingerprint, source FROM archive.signing_keys").fetchall()
    assert source == [(signer.fingerprint, "kms")]
    room.admin.execute("DELETE FROM archive.signing_keys")
    report = audit_shard(room.shard, room.target.bucket, room.target.layout, room.target.table)
    assert kinds(report) == [(JAN, "wrong key")]


def test_every_audit_is_on_record_with_what_it_found(room: Room) -> None:
    room.log("2025-01-15")
    room.archive()
    options = (room.shard, room.target.bucket, room.target.layout, room.target.table)
    audit_shard(*options, deep=True)
    [part] = [key for key in room.target.bucket.keys("") if key.endswith(".parquet")]
    room.target.bucket.delete(part)
    found = audit_shard(*options).findings
    recorded = room.admin.execute(
        "SELECT deep, links, months, findings, worst FROM archive.audits ORDER BY ended_at"
    ).fetchall()
    assert [row[:4] for row in recorded] == [(True, 1, 1, 0), (False, 1, 1, len(found))]
    assert [(each["kind"], each["month"], each["key"]) for each in recorded[1][4]] == [("missing", JAN, part)]


def test_a_login_that_may_only_read_audits_without_a_record(room: Room) -> None:
    room.log("2025-01-15")
    room.archive()
    room.admin.execute("REVOKE INSERT ON archive.audits FROM pipeline")
    options = (room.shard, room.target.bucket, room.target.layout, room.target.table)
    report = audit_shard(*options)
    assert report.sound
    assert "this audit is not on record: the login may only read" in report.notes
    assert room.admin.execute("SELECT count(*) FROM archive.audits").fetchone() == (0,)


def test_an_unsigned_archive_is_sound_until_a_key_was_in_use(room: Room) -> None:
    room.archive(MONTHS[0])
    room.archive(MONTHS[1])
    options = (room.shard, room.target.bucket, room.target.layout, room.target.table)
    assert audit_shard(*options).sound
    room.target = replace(room.target, signer=SIGNER)
    room.archive(MONTHS[2])
    assert audit_shard(*options).sound
    room.target = replace(room.target, signer=None)
    room.archive(MONTHS[3])
    assert kinds(audit_shard(*options)) == [(APR, "unsigned")]


def test_offline_the_keys_come_from_files_and_none_is_a_note(
    archived: Archived, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ARCHIVE_SIGNING_KEY")
    monkeypatch.delenv("DATABASE_URL")
    assert main(["--offline"]) == 0
    assert "signatures were not checked" in capsys.readouterr().out
    (tmp_path / "key.pem").write_text(signing.public_pem(SIGNER.public_key))
    sign_again(archived)
    assert main(["--offline"]) == 0
    assert main(["--offline", "--public-key", str(tmp_path / "key.pem")]) == 1
    with pytest.raises(UserError, match="cannot be read"):
        main(["--offline", "--public-key", str(tmp_path / "no.pem")])


# -- generations ------------------------------------------------------------------------------------------------------


def test_of_a_superseded_generation_only_its_manifest_must_still_exist(room: Room) -> None:
    room.target = replace(room.target, signer=SIGNER)
    room.fill(50)
    room.archive()
    room.log("2025-01-15")
    room.archive()
    report = audit_shard(room.shard, room.target.bucket, room.target.layout, room.target.table, deep=True)
    assert (report.findings, report.links) == ((), 2)
    assert [(month.generation, month.kind, month.rows) for month in report.months] == [(2, "late", 51)]
    room.target.bucket.delete(room.target.layout.salts(MONTHS[0], "main", 1))
    assert audit_shard(room.shard, room.target.bucket, room.target.layout, room.target.table).sound
    room.target.bucket.delete(room.target.layout.manifest(MONTHS[0], "main", 1))
    report = audit_shard(room.shard, room.target.bucket, room.target.layout, room.target.table)
    assert kinds(report) == [(JAN, "link without manifest")]


def erase_january(a: Archived, scratch: Path, leaves: list[bytes] | None = None) -> Published:
    """Publish a generation without any row of January, and leave everything of the one before where it is."""
    first = a.found(MONTHS[0])
    part = first.manifest.parts[0]
    seeds = merkle.salts_from_bytes(a.bucket.read(a.layout.salts(MONTHS[0], "main", 1)))[0]
    if leaves is None:
        a.bucket.download(part.key, scratch / "part")
        with ParquetReader(scratch) as reader:
            leaves = [each for some in reader.leaves(first.manifest.columns, scratch / "part", seeds) for each in some]
    body = merkle.punctured_to_bytes([Punctured.of(bytes.fromhex(part.merkle_root), seeds, dict(enumerate(leaves)))])
    a.put(a.layout.erased(MONTHS[0], "main", 2), body)
    a.publish(
        replace(
            first.manifest,
            generation=2,
            kind="erasure",
            read_from="archive",
            parts=(),
            supersedes=first.sha256,
            salts_sha256=None,
            erased_rows=300,
            erased_sha256=hashlib.sha256(body).hexdigest(),
        )
    )
    return first


def test_after_an_erasure_the_old_part_and_its_salts_must_be_gone(archived: Archived, tmp_path: Path) -> None:
    first = erase_january(archived, tmp_path)
    part, salts = first.manifest.parts[0], archived.layout.salts(MONTHS[0], "main", 1)
    report = archived.audit()
    assert kinds(report) == [(JAN, "leftover"), (JAN, "leftover")]
    assert {finding.key for finding in report.findings} == {part.key, salts}
    archived.remove(part.key, salts)
    assert archived.audit(deep=True).sound
    archived.remove(archived.layout.erased(MONTHS[0], "main", 2))
    assert kinds(archived.audit()) == [(JAN, "missing")]


@pytest.mark.parametrize("hashes", [300, 299], ids=["other hashes", "a row too few"])
def test_an_erasure_whose_hashes_do_not_lead_to_the_old_root_is_found(
    archived: Archived, tmp_path: Path, hashes: int
) -> None:
    first = erase_january(archived, tmp_path, [bytes(32)] * hashes)
    archived.remove(first.manifest.parts[0].key, archived.layout.salts(MONTHS[0], "main", 1))
    assert archived.audit().sound
    (finding,) = archived.audit(deep=True).findings
    assert (finding.month, finding.kind) == (JAN, Kind.OTHER_ROWS)
    assert "does not lead to the old root of 1 part(s)" in finding.text


def test_erasures_with_late_rows_between_leave_every_old_root_provable(room: Room) -> None:
    room.target = replace(room.target, signer=SIGNER)
    room.fill(200)
    room.archive()
    for number in (1, 2):
        room.admin.execute("DELETE FROM audit_logs")
        request = Erasure("tenant_id", str(UUID(int=number)), "ann", "request 4711")
        erase(room.shard, room.target, request, dry_run=False)
        room.log("2025-01-15", tenant_id=room.tenant(UUID(int=5)))
        room.archive()
    report = audit_shard(room.shard, room.target.bucket, room.target.layout, room.target.table, deep=True)
    assert (report.findings, report.notes, report.links) == ((), (), 5)


@versioned
def test_old_versions_of_salts_of_erased_rows_are_leftovers_too(archived: Archived) -> None:
    first = archived.found(MONTHS[0])
    archived.publish(
        replace(first.manifest, generation=2, kind="erasure", parts=(), supersedes=first.sha256, salts_sha256=None)
    )
    salts = archived.layout.salts(MONTHS[0], "main", 1)
    archived.remove(first.manifest.parts[0].key, salts)
    report = archived.audit()
    assert [(finding.kind, finding.key) for finding in report.findings] == [(Kind.LEFTOVER, salts)]
    assert any("parts that an erasure replaced" in note for note in report.notes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"merkle_root": "00" * 32}, "another Merkle root"),
        ({"digest": 1}, "the content of the 300 rows differs"),
    ],
    ids=["root", "digest"],
)
def test_a_month_that_was_published_with_other_rows_is_found_by_reading_them(
    archived: Archived, changes: dict[str, Any], words: str
) -> None:
    first = archived.found(MONTHS[0])
    part = first.manifest.parts[0]
    if "digest" in changes:
        changes = {"digest": replace(part.digest, value=part.digest.value + changes["digest"])}
    salts = archived.bucket.read(archived.layout.salts(MONTHS[0], "main", 1))
    archived.put(archived.layout.salts(MONTHS[0], "main", 2), salts)
    archived.publish(
        replace(first.manifest, generation=2, kind="late", supersedes=first.sha256, parts=(replace(part, **changes),))
    )
    assert archived.audit().sound
    (finding,) = archived.audit(deep=True).findings
    assert (finding.month, finding.kind) == (JAN, Kind.OTHER_ROWS)
    assert words in finding.text


def test_objects_of_unfinished_runs_and_links_not_yet_pinned_are_notes(archived: Archived) -> None:
    key = "audit_logs/year=2025/month=05/part-main-g0001-00000-0123456789abcdef.parquet"
    archived.put(key, parquet())
    archived.room.admin.execute(
        """INSERT INTO archive.uploads (key, source_table, shard, month, epoch, sha256, bytes)
           VALUES (%s, 'public.audit_logs', 'main', '2025-04-01', 1, '', 1)""",
        (key,),
    )
    archived.publish(replace(archived.found(EMPTY).manifest, month=Month(2025, 5)), pinned=False)
    report = archived.audit()
    assert report.sound
    assert [note.split(" ")[0] for note in report.notes] == ["1", "1"]
    assert {"not pinned yet" in note or "unfinished runs" in note for note in report.notes} == {True}


def test_parts_of_another_database_in_the_same_archive_are_no_strays(archived: Archived) -> None:
    key = "audit_logs/year=2025/month=01/part-second-shard-g0001-00000-0123456789abcdef.parquet"
    archived.put(key, parquet())
    assert kinds(archived.audit()) == [(JAN, "stray")]
    archived.put(archived.layout.link("second-shard", 1), b"{}")
    assert archived.audit().sound


# -- pinning anew -----------------------------------------------------------------------------------------------------


def test_after_postgres_was_lost_a_verified_chain_is_pinned_anew_with_its_keys(
    archived: Archived, capsys: pytest.CaptureFixture[str]
) -> None:
    before = remembered(archived.room.shard, archived.room.target.table)
    archived.room.admin.execute("DELETE FROM archive.chain_heads; DELETE FROM archive.signing_keys")
    assert main(["pin"]) == 0
    after = remembered(archived.room.shard, archived.room.target.table)
    assert (after.pinned, after.keys) == (before.pinned, before.keys)
    assert "link number 4 is pinned" in capsys.readouterr().out
    assert archived.audit().sound


def test_a_broken_or_cut_off_chain_is_not_pinned_unless_forced(
    archived: Archived, capsys: pytest.CaptureFixture[str]
) -> None:
    pinned = remembered(archived.room.shard, archived.room.target.table).pinned
    archived.remove(archived.link_key(4))
    assert main(["pin"]) == 1
    assert "Nothing was pinned." in capsys.readouterr().out
    assert remembered(archived.room.shard, archived.room.target.table).pinned == pinned
    assert main(["pin", "--force"]) == 0
    found = remembered(archived.room.shard, archived.room.target.table).pinned
    assert found is not None
    assert found.sequence == 3
    alter(archived.link_key(2), archived)
    assert main(["pin", "--force"]) == 1


# -- proofs of single rows --------------------------------------------------------------------------------------------


@pytest.fixture
def proof(archived: Archived, tmp_path: Path, made: list[bytes] = []) -> Path:  # noqa: B006 - made once
    path = tmp_path / "proof.json"
    if made:
        path.write_bytes(made[0])
        return path
    row = archived.room.admin.execute(
        "SELECT id FROM audit_logs WHERE created_at >= '2025-03-01Z' AND created_at < '2025-04-01Z' AND "
        "resource_id IS NULL ORDER BY id LIMIT 1"
    ).fetchone()
    assert row is not None
    assert main(["prove", str(row[0]), "--output", str(path)]) == 0
    made.append(path.read_bytes())
    return path


def test_a_row_is_proven_to_somebody_who_has_neither_the_bucket_nor_postgres(
    archived: Archived,
    proof: Path,
    tmp_path: Path,
    settings_environment: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings_environment()  # no bucket, no database, no credentials
    capsys.readouterr()
    assert main(["check-proof", str(proof)]) == 0
    said = capsys.readouterr().out
    assert "public.audit_logs in month 2025-03" in said
    assert SIGNER.fingerprint in said
    assert "NULL" in said
    (tmp_path / "key.pem").write_text(signing.public_pem(SIGNER.public_key))
    assert main(["check-proof", str(proof), "--public-key", str(tmp_path / "key.pem")]) == 0
    (tmp_path / "other.pem").write_text(signing.public_pem(ATTACKER.public_key))
    assert main(["check-proof", str(proof), "--public-key", str(tmp_path / "other.pem")]) == 1
    checked = proofs.check(proof.read_bytes())
    row = archived.room.admin.execute(
        "SELECT action, details::text, ip_address::text, resource_id FROM audit_logs WHERE id = %s",
        ((checked.row or {})["id"],),
    ).fetchone()
    assert checked.row is not None
    assert row == tuple(checked.row[name] for name in ("action", "details", "ip_address", "resource_id"))


def test_the_proof_holds_nothing_of_other_rows(archived: Archived, proof: Path) -> None:
    text = proof.read_text()
    own = json.loads(text)["row"]
    for (other,) in archived.room.admin.execute("SELECT id::text FROM audit_logs"):
        assert other not in text or other in own


def forge_the_key(fields: dict[str, Any]) -> None:
    """Sign the link with another key and give that key along; it then is a proof, but of somebody else."""
    link = replace(chain.Link.from_bytes(fields["link"].encode(), ""), key_fingerprint=ATTACKER.fingerprint)
    sha256 = hashlib.sha256(link.to_bytes()).hexdigest()
    fields["link"] = link.to_bytes().decode()
    fields["signature"] = ATTACKER.sign(string_to_sign(link, sha256)).hex()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.update(row=f["row"].replace("action", "action!")), "was changed"),
        (lambda f: f.update(salt="0" * 32), "was changed"),
        (lambda f: f.update(index=f["index"] ^ 1), "was changed"),
        (lambda f: f.update(path=f["path"][:-1]), "was changed"),
        (lambda f: f.update(rows=f["rows"] + 1), "does not list the part"),
        (lambda f: f.update(part="else"), "does not list the part"),
        (lambda f: f.update(manifest=f["manifest"].replace('"bytes":', '"bytes":1', 1)), "was altered"),
        (lambda f: f.update(manifest=f["manifest"].replace('_lsn":"', '_lsn":"1')), "does not list this"),
        (lambda f: f.update(link=f["link"].replace('"rows":300', '"rows":301')), "signature is not"),
        (lambda f: f.update(signature="00"), "signature is not"),
        (lambda f: f.update(signature=None), "signature is not"),
        (lambda f: f.update(public_key=signing.public_pem(ATTACKER.public_key)), "another key"),
        (lambda f: f.update(public_key=None), "no public key"),
        (forge_the_key, "another key"),
        (lambda f: f.update(format="else"), "format"),
        (lambda f: f.pop("salt"), "is not a proof"),
        (lambda f: f.update(path=7), "is not a proof"),
    ],
)  # fmt: skip
def test_a_proof_in_which_anything_was_changed_proves_nothing(
    archived: Archived,
    proof: Path,
    change: Callable[[dict[str, Any]], None],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fields = json.loads(proof.read_text())
    before = dict(fields)
    change(fields)
    assert fields != before
    proof.write_text(json.dumps(fields))
    capsys.readouterr()
    assert main(["check-proof", str(proof)]) == 1
    said = capsys.readouterr().out
    assert "proves nothing: " in said
    assert words in said


def test_a_file_that_is_no_proof_proves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for body in (b"", b"[]", b"\xff", b"[" * 100_000):
        (tmp_path / "file").write_bytes(body)
        assert main(["check-proof", str(tmp_path / "file")]) == 1
    with pytest.raises(UserError, match="cannot be read"):
        main(["check-proof", str(tmp_path / "none")])


@pytest.mark.parametrize("month", [None, "2025-02", "2025-03"])
def test_a_row_that_is_not_archived_has_no_proof(archived: Archived, month: str | None) -> None:
    identifier = "00000000-0000-0000-0000-000000000000"
    with pytest.raises(UserError, match="has no row with this id"):
        main(["prove", identifier, *(["--month", month] if month else [])])
    with pytest.raises(UserError, match="month 2020-01 is not archived"):
        main(["prove", identifier, "--month", "2020-01"])


def test_no_proof_is_made_from_a_part_that_was_tampered_with(archived: Archived) -> None:
    row = archived.room.admin.execute("SELECT id FROM audit_logs WHERE created_at < '2025-02-01Z' LIMIT 1").fetchone()
    assert row is not None
    alter(archived.part(MONTHS[0]), archived)
    with pytest.raises(UserError, match="other bytes than were published"):
        main(["prove", str(row[0]), "--month", "2025-01"])


def test_a_new_key_can_sign_and_its_public_key_is_told(
    archived: Archived, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["new-key"]) == 0
    pem, hint = capsys.readouterr()
    fingerprint = LocalSigner(pem).fingerprint
    assert fingerprint in hint
    assert "PRIVATE" not in hint
    monkeypatch.setenv("ARCHIVE_SIGNING_KEY", pem)
    assert main(["public-keys"]) == 0
    said = capsys.readouterr().out
    assert f"# {fingerprint} has signed nothing yet" in said
    assert f"# {SIGNER.fingerprint} signed from" in said
    assert said.count("BEGIN PUBLIC KEY") == 2


# -- crashes ----------------------------------------------------------------------------------------------------------


# case 31
@pytest.mark.parametrize("step", ["parts read back from S3", "link of the chain written"])
def test_after_a_crash_between_upload_and_catalog_the_objects_are_reused_and_no_row_is_there_twice(
    room: Room, tmp_path: Path, step: str
) -> None:
    room.fill(400)
    killed = subprocess.run(
        [sys.executable, "-m", "tests.archive_pipeline.killed", step, "1", str(tmp_path)],
        check=False,
        env=os.environ.copy(),
    )
    assert killed.returncode == -signal.SIGKILL
    left = {version.key: version.version_id for version in room.target.bucket.versions(room.target.layout.data)}
    report = room.archive()
    assert set(room.data_keys()) == set(left)
    assert report.manifest.digest.rows == 400
    assert room.rows("SELECT count(*) AS n, count(DISTINCT id) AS ids FROM audit_logs") == [{"n": 400, "ids": 400}]
    found = audit_shard(room.shard, room.target.bucket, room.target.layout, room.target.table, deep=True)
    assert (found.findings, found.notes, found.links) == ((), (), 1)


def test_a_run_refuses_to_continue_a_chain_whose_end_was_cut_off(archived: Archived) -> None:
    archived.remove(archived.link_key(4))
    with pytest.raises(ChainError, match=r"is gone; run python -m archive_pipeline\.audit"):
        archived.room.archive(Month(2025, 5))
