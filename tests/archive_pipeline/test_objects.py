"""The bucket: written once, checked by SHA-256, and S3's bad days."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from archive_pipeline.archive import Outcome
from archive_pipeline.errors import ObjectConflictError
from archive_pipeline.objects import ArchiveBucket
from scaling.errors import UserError
from scaling.settings import ArchiveSettings, load
from tests.archive_pipeline.conftest import Room
from tests.archive_pipeline.s3_with_faults import Faults, Mistake, faulty_s3


def a_file(directory: Path, content: bytes) -> tuple[Path, str]:
    path = directory / "file"
    path.write_bytes(content)
    return path, hashlib.sha256(content).hexdigest()


def test_the_same_bytes_may_be_put_twice(room: Room, tmp_path: Path) -> None:
    path, sha256 = a_file(tmp_path, b"one")
    room.target.bucket.put_file("key", path, sha256)
    room.target.bucket.put_file("key", path, sha256)
    assert room.target.bucket.read("key") == b"one"


def test_other_bytes_are_never_put_over_an_object(room: Room, tmp_path: Path) -> None:
    room.target.bucket.put_bytes("key", b"one", content_type="text/plain")
    with pytest.raises(ObjectConflictError, match="key already holds other bytes"):
        room.target.bucket.put_file("key", *a_file(tmp_path, b"two"))
    assert room.target.bucket.read("key") == b"one"


def test_bytes_that_are_not_what_the_checksum_says_are_refused(room: Room, tmp_path: Path) -> None:
    path, _ = a_file(tmp_path, b"one")
    with pytest.raises(UserError, match="S3 refuses PutObject"):
        room.target.bucket.put_file("key", path, hashlib.sha256(b"two").hexdigest())
    assert room.target.bucket.head("key") is None


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("ARCHIVE_BUCKET", "no-such-bucket-here", "bucket no-such-bucket-here does not exist; create it or correct"),
        (
            "AWS_SECRET_ACCESS_KEY",
            "wrong",
            r"S3 refuses \w+ of s3://.* \(SignatureDoesNotMatch\); the credentials need",
        ),
        ("AWS_ACCESS_KEY_ID", "nobody", r"S3 refuses \w+ of s3://.* \(InvalidAccessKeyId\); the credentials need"),
        ("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9", r"S3 does not answer for s3://.* \(EndpointConnectionError\)"),
    ],
)
def test_a_bucket_that_cannot_be_used_is_explained_in_one_sentence(
    room: Room, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, sentence: str
) -> None:
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr("archive_pipeline.objects.ATTEMPTS", 1)
    room.target = replace(room.target, bucket=ArchiveBucket.from_settings(load(ArchiveSettings)))
    with pytest.raises(UserError, match=sentence):
        room.archive()


@pytest.fixture
def faults(room: Room, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """A room whose S3 server makes mistakes."""
    with faulty_s3(room.bucket.server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        room.target = replace(room.target, bucket=ArchiveBucket.from_settings(load(ArchiveSettings)))
        yield proxy


EVERYTHING: list[tuple[str, str, Mistake]] = [
    ("PUT", "part-", "503"),
    ("PUT", "part-", "500"),
    ("PUT", "part-", "reset"),
    ("PUT", "part-", "answer lost"),
    ("PUT", "part-", "damaged on the way"),
    ("GET", "part-", "503"),
    ("GET", "part-", "reset"),
    ("GET", "part-", "cut off"),
    ("GET", "part-", "damaged on the way back"),
    ("PUT", "g0001.json", "answer lost"),
    ("GET", "g0001.json", "cut off"),
    ("PUT", "catalog.sql", "500"),
    ("GET", "list-type", "503"),
]


def test_every_passing_fault_of_s3_is_ridden_out_and_leaves_no_trace(room: Room, faults: Faults) -> None:
    room.fill(1000)
    faults.script = list(EVERYTHING)
    report = room.archive()

    assert sorted(faults.made) == sorted(mistake for *_, mistake in EVERYTHING)
    assert (report.outcome, report.strangers) == (Outcome.ARCHIVED, ())
    assert room.data_keys() == [part.key for part in report.manifest.parts]
    assert room.archive().damaged == ()


def test_a_server_that_stays_down_fails_the_month_with_a_sentence_and_it_converges_later(
    room: Room, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("archive_pipeline.objects.ATTEMPTS", 2)
    room.target = replace(room.target, bucket=ArchiveBucket.from_settings(load(ArchiveSettings)))
    room.fill(1000)
    faults.script = [("PUT", "-00001-", "500"), ("PUT", "-00001-", "500")]
    with pytest.raises(UserError, match=r"S3 failed PutObject of .*-00001-.* 2 times \(InternalError\); try"):
        room.archive()
    assert (room.data_keys(), room.month_row()["state"]) == ([], "failed")
    assert room.archive().outcome is Outcome.ARCHIVED
