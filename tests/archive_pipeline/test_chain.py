"""The chain: what a link says, that two runs never fork it, and which ends are not continued."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest

from archive_pipeline import chain, manifest
from archive_pipeline.chain import Head, Link, Linked, Previous, append, load, sequences, string_to_sign, walk
from archive_pipeline.digest import Digest
from archive_pipeline.errors import ChainError
from archive_pipeline.manifest import Layout, Manifest, Part, Published
from archive_pipeline.months import Month
from archive_pipeline.objects import ArchiveBucket
from archive_pipeline.signing import LocalSigner, new_key
from devstack.servers import Bucket
from scaling.settings import ArchiveSettings
from scaling.settings import load as load_settings

LAYOUT = Layout("audit_logs")
NOW = datetime(2025, 8, 1, 3, tzinfo=UTC)
SIGNER = LocalSigner(new_key(2048))
PART = Part("audit_logs/year=2025/month=01/x.parquet", 10, "ab" * 32, Digest(2, 2**70, 5, 9), "cd" * 32, "version 1")


@dataclass
class Chain:
    """A bucket with a chain in it."""

    bucket: ArchiveBucket
    signer: LocalSigner | None = SIGNER
    pinned: Head | None = None

    def publish(self, number: int, **changes: object) -> Published:
        """Put the manifest of the `number`-th month."""
        month = Month(2024 + (number - 1) // 12, (number - 1) % 12 + 1)
        made = Manifest(
            table="public.audit_logs",
            shard="main",
            month=month,
            generation=1,
            snapshot_lsn="0/16B3748",
            created_at=NOW + timedelta(hours=number),
            created_by="test 1",
            columns=(),
            parts=(PART,),
        )
        made = replace(made, **changes)  # type: ignore[arg-type]  # any field
        key = LAYOUT.manifest(month, "main", made.generation)
        self.bucket.put_bytes(key, made.to_bytes(), content_type="application/json")
        return manifest.load(self.bucket, key)

    def append(self, found: Published, **options: object) -> Head:
        arguments: dict[str, object] = {
            "pinned": self.pinned,
            "now": found.manifest.created_at + timedelta(seconds=1),
            **options,
        }
        return append(self.bucket, LAYOUT, self.signer, found, **arguments)  # type: ignore[arg-type]

    def add(self, number: int) -> Head:
        """Publish a month, link it and pin the link."""
        self.pinned = self.append(self.publish(number))
        return self.pinned

    def links(self) -> list[Linked]:
        return list(walk(self.bucket, LAYOUT, "main"))[::-1]

    def replace(self, key: str, body: bytes, metadata: dict[str, str] | None = None) -> None:
        """Overwrite an object, as nothing in the archive can."""
        self.bucket.client.put_object(Bucket=self.bucket.name, Key=key, Body=body, Metadata=metadata or {})

    def require_whole(self, months: int) -> None:
        """Every month once, each link on the one before, all signatures good."""
        links = self.links()
        assert [linked.link.sequence for linked in links] == list(range(1, months + 1))
        assert len({linked.link.manifest_key for linked in links}) == months
        assert links[0].link.previous is None
        for before, after in pairwise(links):
            previous = after.link.previous
            assert previous is not None
            assert (previous.key, previous.sha256, previous.signature) == (
                before.link.key, before.sha256, before.signature,
            )  # fmt: skip
        assert all(linked.signed_by(SIGNER.public_key) for linked in links)


@pytest.fixture
def empty(bucket: Bucket, settings_environment: Callable[..., None]) -> Chain:
    settings_environment(bucket=bucket)
    return Chain(ArchiveBucket.from_settings(load_settings(ArchiveSettings)))


# -- what a link says -------------------------------------------------------------------------------------------------

LINK = Link(
    sequence=2,
    table="public.audit_logs",
    shard="main",
    month="2025-01",
    time_zone="UTC",
    generation=1,
    kind="archive",
    manifest_key="audit_logs_manifests/year=2025/month=01/main-g0001.json",
    manifest_sha256="ab" * 32,
    rows=2,
    row_digest="1180591620717411303424",
    merkle_root="cd" * 32,
    parts=(chain.LinkedPart("a.parquet", 10, "ef" * 32, "v1"),),
    bucket="archive",
    key="audit_logs_manifests/chain/main/00000002.json",
    created_at=NOW,
    key_fingerprint="12" * 32,
    previous=Previous("audit_logs_manifests/chain/main/00000001.json", "34" * 32, "5678", "2024-12", 1),
)
GOLDEN = (
    '{"bucket":"archive","created_at":"2025-08-01T03:00:00Z","format":"audit-archive-link/1","generation":1,'
    '"hash_algorithm":"SHA-256","key":"audit_logs_manifests/chain/main/00000002.json",'
    f'"key_fingerprint":"{"12" * 32}","kind":"archive",'
    '"manifest_key":"audit_logs_manifests/year=2025/month=01/main-g0001.json",'
    f'"manifest_sha256":"{"ab" * 32}","merkle_root":"{"cd" * 32}","month":"2025-01",'
    f'"parts":[{{"bytes":10,"key":"a.parquet","sha256":"{"ef" * 32}","version_id":"v1"}}],"previous_generation":1,'
    f'"previous_key":"audit_logs_manifests/chain/main/00000001.json","previous_month":"2024-12",'
    f'"previous_sha256":"{"34" * 32}","previous_signature":"5678","row_digest":"1180591620717411303424","rows":2,'
    '"sequence":2,"shard":"main","signature_algorithm":"SHA256withRSA","table":"public.audit_logs",'
    '"time_zone":"UTC"}\n'
)


def test_a_link_is_canonical_json_to_the_byte() -> None:
    assert LINK.to_bytes().decode() == GOLDEN
    assert Link.from_bytes(GOLDEN.encode(), "here") == LINK
    first = replace(LINK, sequence=1, previous=None, key_fingerprint=None)
    assert Link.from_bytes(first.to_bytes(), "here") == first


def test_the_string_to_sign_is_that_of_cloudtrail() -> None:
    text = f"2025-08-01T03:00:00Z\narchive/audit_logs_manifests/chain/main/00000002.json\n{'99' * 32}\n"
    assert string_to_sign(LINK, "99" * 32).decode() == text + "5678"
    assert string_to_sign(replace(LINK, previous=None), "99" * 32).decode() == text + "null"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        GOLDEN.replace("link/1", "link/2").encode(),
        GOLDEN.replace(",", ", ", 1).encode(),
        GOLDEN.replace('"rows":2', '"rows":2,"also":1').encode(),
        GOLDEN.replace('"parts":[{', '"parts":[7,{').encode(),
        b"[" * 100_000,
    ],
    ids=["nothing", "empty", "list", "not text", "other format", "spaces", "further field", "other part", "nested"],
)
def test_what_is_not_a_link_is_refused(body: bytes) -> None:
    with pytest.raises(ChainError, match=r"^here "):
        Link.from_bytes(body, "here")


# -- appending --------------------------------------------------------------------------------------------------------


# case 62
def test_an_empty_month_has_a_signed_link_in_the_chain_too(empty: Chain) -> None:
    empty.add(1)
    empty.pinned = empty.append(empty.publish(2, parts=()))
    empty.add(3)
    empty.require_whole(3)
    link = empty.links()[1].link
    assert (link.rows, link.parts, link.month) == (0, (), "2024-02")


def test_a_link_binds_its_place_its_manifest_every_part_and_the_link_before(empty: Chain) -> None:
    first, second = empty.add(1), empty.add(2)
    found = load(empty.bucket, second.key)
    assert found.head == second
    link = found.link
    assert (link.bucket, link.key) == (empty.bucket.name, "audit_logs_manifests/chain/main/00000002.json")
    assert link.parts == (chain.LinkedPart(PART.key, PART.size, PART.sha256, PART.version_id),)
    assert link.manifest_sha256 == manifest.load(empty.bucket, link.manifest_key).sha256
    assert link.previous == Previous(first.key, first.sha256, first.signature, "2024-01", 1)
    stored = empty.bucket.head(second.key)
    assert stored is not None
    assert stored.metadata == {"signature": second.signature, "signature-algorithm": "SHA256withRSA"}


def test_a_manifest_that_is_linked_is_not_linked_again(empty: Chain) -> None:
    found = [empty.publish(number) for number in (1, 2, 3)]
    for each in found:
        empty.pinned = empty.append(each)
    for each in found:
        assert empty.append(each) == empty.pinned
        assert empty.append(each, pinned=None) == empty.pinned
    empty.require_whole(3)


def test_a_late_generation_has_a_link_of_its_own(empty: Chain) -> None:
    first = empty.publish(1)
    empty.pinned = empty.append(first)
    empty.pinned = empty.append(empty.publish(1, generation=2, kind="late", supersedes=first.sha256))
    empty.require_whole(2)
    assert [(linked.link.generation, linked.link.kind) for linked in empty.links()] == [(1, "archive"), (2, "late")]


def test_links_of_runs_that_died_before_pinning_are_verified_and_continued(empty: Chain) -> None:
    pinned = empty.add(1)
    empty.add(2)
    lost = empty.publish(3)
    empty.append(lost)
    empty.pinned = pinned  # two links never reached Postgres

    assert empty.append(lost).sequence == 3  # the dead run's month again: its link is there
    empty.pinned = pinned
    assert empty.add(4).sequence == 4
    empty.require_whole(4)


def test_without_a_key_links_are_chained_and_unsigned_and_a_key_may_come_later(empty: Chain) -> None:
    empty.signer = None
    empty.add(1)
    empty.add(2)
    assert [linked.signature for linked in empty.links()] == [None, None]
    empty.signer = SIGNER
    empty.add(3)
    last = empty.links()[-1]
    assert last.signed_by(SIGNER.public_key)
    assert last.message.endswith(b"\nnull")


def test_after_a_change_of_keys_the_link_of_a_dead_run_is_continued_when_its_key_is_known(empty: Chain) -> None:
    old = LocalSigner(new_key(2048))
    pinned = empty.add(1)
    empty.signer = old
    empty.add(2)
    empty.signer, empty.pinned = SIGNER, pinned
    found = empty.publish(3)
    with pytest.raises(ChainError, match="a key that was never in use here"):
        empty.append(found)
    assert empty.append(found, keys={old.fingerprint: old.public_key}).sequence == 3


# -- broken ends ------------------------------------------------------------------------------------------------------


def forged(chained: Chain, **changes: object) -> None:
    """Put a link after the newest, in place of a run of the archive."""
    last = chained.links()[-1]
    key = LAYOUT.link("main", last.link.sequence + 1)
    previous = Previous(last.link.key, last.sha256, last.signature, last.link.month, last.link.generation)
    link = replace(last.link, sequence=last.link.sequence + 1, key=key, previous=previous)
    link = replace(link, **changes)  # type: ignore[arg-type]  # any field
    chained.replace(key, link.to_bytes(), {"signature": last.signature or ""})


def remove_the_end(chained: Chain) -> None:
    assert chained.pinned is not None
    chained.bucket.delete(chained.pinned.key)


def alter_the_end(chained: Chain) -> None:
    last = chained.links()[-1]
    chained.replace(last.link.key, replace(last.link, rows=1).to_bytes(), {"signature": last.signature or ""})


def sign_the_end_otherwise(chained: Chain) -> None:
    last = chained.links()[-1]
    chained.replace(last.link.key, last.link.to_bytes(), {"signature": "00"})


def damage_the_end(chained: Chain) -> None:
    chained.replace(chained.links()[-1].link.key, b"{}")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (remove_the_end, "the newest link of the chain, is gone"),
        (alter_the_end, "the newest link of the chain, was altered"),
        (sign_the_end_otherwise, "has another signature"),
        (damage_the_end, "is not a link, it was damaged"),
        (forged, "the signature of .* is wrong"),
        (lambda chained: forged(chained, key_fingerprint=None), "is not signed, though"),
        (lambda chained: forged(chained, key_fingerprint="00" * 32), "a key that was never in use"),
        (lambda chained: forged(chained, previous=None), "does not follow the link before it"),
        (lambda chained: forged(chained, key="elsewhere"), "was moved or copied"),
    ],
    ids=["removed", "altered", "signature", "damaged", "forged", "unsigned", "foreign key", "gap", "moved"],
)
def test_a_broken_end_is_not_continued(empty: Chain, spoil: Callable[[Chain], None], sentence: str) -> None:
    empty.add(1)
    empty.add(2)
    spoil(empty)
    found = empty.publish(3)
    with pytest.raises(ChainError, match=sentence) as refused:
        empty.append(found)
    assert "python -m archive_pipeline.audit" in str(refused.value)
    assert len(sequences(empty.bucket, LAYOUT, "main")) <= 3
    assert all(key.endswith(("1.json", "2.json", "3.json")) for key in empty.bucket.keys(LAYOUT.chain("main")))


def test_a_broken_link_just_before_the_end_is_not_passed_over(empty: Chain) -> None:
    first = empty.publish(1)
    empty.pinned = empty.append(first)
    empty.add(2)
    empty.bucket.delete(LAYOUT.link("main", 1))
    with pytest.raises(ChainError, match="a link of the chain, is gone"):
        empty.append(first)


# -- at once, and killed ----------------------------------------------------------------------------------------------


def test_runs_that_append_at_once_never_fork_the_chain(empty: Chain) -> None:
    months = 12
    found = [empty.publish(number, created_at=NOW) for number in range(1, months + 1)]
    start, heads, errors = threading.Barrier(months), [], []

    def work(each: Published) -> None:
        start.wait()
        try:
            heads.append(empty.append(each))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(each,)) for each in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(head.sequence for head in heads) == list(range(1, months + 1))
    empty.require_whole(months)


KILLED = """
import os, signal, sys
from tests.archive_pipeline.test_chain import Chain
from archive_pipeline import chain
from archive_pipeline.objects import ArchiveBucket
from archive_pipeline.signing import LocalSigner
from scaling.settings import ArchiveSettings, load

chained = Chain(ArchiveBucket.from_settings(load(ArchiveSettings)), LocalSigner(os.environ["KEY"]))
found = chained.publish(1)
if sys.argv[1] == "after the manifest":
    os.kill(os.getpid(), signal.SIGKILL)
chained.append(found)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["after the manifest", "after the link"])
def test_a_run_killed_between_manifest_link_and_pin_converges_to_one_link(
    empty: Chain, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pem = new_key(2048)
    monkeypatch.setenv("KEY", pem)
    killed = subprocess.run([sys.executable, "-c", KILLED, moment], check=False, env=os.environ.copy())
    assert killed.returncode == -signal.SIGKILL
    empty.signer = LocalSigner(pem)
    empty.pinned = empty.append(empty.publish(1))
    assert empty.append(empty.publish(1)) == empty.pinned
    assert [linked.link.sequence for linked in empty.links()] == [1]
    assert empty.add(2).sequence == 2
