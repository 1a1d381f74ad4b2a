"""The bucket: written once, checked by SHA-256, encrypted, locked, by version."""

import hashlib
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import boto3
import pytest

from archive_pipeline.errors import ObjectConflictError, ObjectLockedError
from archive_pipeline.objects import ArchiveBucket, Protection
from devstack.aws import Aws
from scaling.errors import UserError
from scaling.settings import ArchiveSettings, load
from tests.archive_pipeline.conftest import Room


def a_file(directory: Path, content: bytes) -> tuple[Path, str]:
    path = directory / "file"
    path.write_bytes(content)
    return path, hashlib.sha256(content).hexdigest()


# case 33
def test_the_same_bytes_may_be_put_twice(room: Room, tmp_path: Path) -> None:
    path, sha256 = a_file(tmp_path, b"one")
    room.target.bucket.put_file("key", path, sha256)
    room.target.bucket.put_file("key", path, sha256)
    assert room.target.bucket.read("key") == b"one"


# case 52
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


LOCKED = Protection(lock="governance", days=30)
NOW = datetime.now(UTC).replace(microsecond=0)


@pytest.fixture
def protected(room: Room) -> ArchiveBucket:
    """A bucket with versions, whose objects are locked for 30 days."""
    bucket = room.target.bucket
    return ArchiveBucket(
        bucket.client, bucket.name, region=bucket.region, endpoint=bucket.endpoint, protection=LOCKED, now=lambda: NOW
    )


def test_metadata_is_kept_with_an_object(room: Room, tmp_path: Path) -> None:
    room.target.bucket.put_file("key", *a_file(tmp_path, b"one"), metadata={"month": "2025-01"})
    found = room.target.bucket.head("key")
    assert found is not None
    assert (found.metadata, found.version_id, found.lock) == ({"month": "2025-01"}, None, None)


# case 51
@pytest.mark.lockable_bucket
def test_a_bucket_with_object_lock_takes_every_object_because_its_checksum_is_always_sent(
    protected: ArchiveBucket, tmp_path: Path
) -> None:
    sent: list[dict[str, object]] = []
    protected.client.meta.events.register(
        "before-call.s3.PutObject", lambda params, **_: sent.append({**params["headers"]})
    )
    path, sha256 = a_file(tmp_path, b"one")
    version = protected.put_file("part", path, sha256)
    protected.put_bytes("salts", b"two", content_type="text/plain", locked=False)
    protected.replace_bytes("catalog", b"three", content_type="text/plain")

    assert [headers.get("x-amz-checksum-sha256") is not None for headers in sent] == [True, True, True]
    found = protected.head("part", version)
    assert found is not None
    assert (found.sha256, found.lock, found.locked_until) == (sha256, "governance", NOW + timedelta(days=30))
    assert [getattr(protected.head(key), "lock", "") for key in ("salts", "catalog")] == [None, None]


@pytest.mark.lockable_bucket
def test_a_put_tells_the_version_of_its_object_also_when_it_was_there_already(protected: ArchiveBucket) -> None:
    first = protected.put_bytes("key", b"one", content_type="text/plain")
    assert first is not None
    assert protected.put_bytes("key", b"one", content_type="text/plain") == first
    found = protected.head("key")
    assert found is not None
    assert found.version_id == first


@pytest.mark.lockable_bucket
def test_a_version_can_be_read_after_another_one_took_its_place_and_after_it_was_hidden(
    protected: ArchiveBucket, tmp_path: Path
) -> None:
    first = protected.put_bytes("key", b"one", content_type="text/plain")
    assert first is not None
    protected.replace_bytes("key", b"other", content_type="text/plain")
    assert protected.read("key") == b"other"
    protected.delete("key")
    assert protected.head("key") is None

    sha256 = hashlib.sha256(b"one").hexdigest()
    assert protected.read("key", first) == b"one"
    assert protected.sha256_of("key", first) == sha256
    assert protected.download("key", tmp_path / "back", first) == sha256
    assert protected.holds("key", 3, sha256, first)
    assert not protected.holds("key", 3, sha256)
    listed = list(protected.versions("key"))
    assert [(each.is_latest, each.is_delete_marker, each.size) for each in listed if each.is_latest] == [
        (True, True, 0)
    ]
    assert sorted(each.size for each in listed) == [0, 3, 5]
    assert first in [each.version_id for each in listed]
    [marker] = [each for each in listed if each.is_delete_marker]
    assert protected.head("key", marker.version_id) is None
    with pytest.raises(FileNotFoundError):
        protected.read("key", marker.version_id)


@pytest.mark.lockable_bucket
def test_a_version_that_never_was_is_not_there(protected: ArchiveBucket) -> None:
    protected.put_bytes("key", b"one", content_type="text/plain")
    assert protected.head("key", "0" * 32) is None
    assert not protected.holds("key", 3, hashlib.sha256(b"one").hexdigest(), "0" * 32)
    with pytest.raises(FileNotFoundError):
        protected.read("key", "0" * 32)


@pytest.mark.lockable_bucket
def test_a_locked_version_says_until_when_and_goes_only_by_the_governance_bypass(protected: ArchiveBucket) -> None:
    version = protected.put_bytes("key", b"one", content_type="text/plain")
    with pytest.raises(ObjectLockedError, match=r"key is locked until .* UTC; until then it takes s3:Bypass") as caught:
        protected.delete("key", version)
    assert caught.value.until == NOW + timedelta(days=30)
    protected.delete("key", version, bypass_governance=True)
    assert list(protected.versions("key")) == []


@pytest.mark.lockable_bucket
def test_nobody_removes_a_version_that_is_locked_in_compliance_mode(protected: ArchiveBucket) -> None:
    protected.protection = Protection(lock="compliance", days=1)
    version = protected.put_bytes("key", b"one", content_type="text/plain")
    with pytest.raises(ObjectLockedError, match="nobody can remove it earlier"):
        protected.delete("key", version, bypass_governance=True)
    assert protected.read("key", version) == b"one"


@pytest.mark.lockable_bucket
def test_a_version_under_a_legal_hold_says_that_somebody_must_lift_it(protected: ArchiveBucket) -> None:
    version = protected.put_bytes("key", b"one", content_type="text/plain", locked=False)
    assert version is not None
    protected.client.put_object_legal_hold(
        Bucket=protected.name, Key="key", VersionId=version, LegalHold={"Status": "ON"}
    )
    with pytest.raises(ObjectLockedError, match="is under a legal hold") as caught:
        protected.delete("key", version, bypass_governance=True)
    assert caught.value.until is None


@pytest.mark.lockable_bucket
def test_what_must_be_removable_is_put_unlocked_and_is_gone_for_good(protected: ArchiveBucket) -> None:
    version = protected.put_bytes("salts", b"one", content_type="text/plain", locked=False)
    protected.delete("salts", version)
    assert list(protected.versions("salts")) == []


def test_versions_of_a_bucket_without_versioning_are_called_null_and_are_not_told_as_ids(room: Room) -> None:
    assert room.target.bucket.put_bytes("key", b"one", content_type="text/plain") is None
    [only] = room.target.bucket.versions("key")
    assert (only.version_id, only.is_latest, only.is_delete_marker, only.size) == ("null", True, False, 3)


def test_a_file_too_large_for_one_put_is_refused_before_it_is_read(room: Room, tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate((5 << 30) + 1)
    with pytest.raises(UserError, match="sparse is larger than the 5 GiB of one PUT"):
        room.target.bucket.put_file("key", path, "00" * 32)


def test_settings_say_how_objects_are_stored(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    assert room.target.bucket.protection == Protection()
    monkeypatch.setenv("ARCHIVE_SSE_KMS_KEY", "alias/archive")
    monkeypatch.setenv("ARCHIVE_OBJECT_LOCK", "compliance")
    monkeypatch.setenv("ARCHIVE_OBJECT_LOCK_DAYS", "7")
    protection = ArchiveBucket.from_settings(load(ArchiveSettings)).protection
    assert protection == Protection("alias/archive", "compliance", 7, versioned=True)


def test_every_object_is_encrypted_with_the_configured_key(aws: Aws, tmp_path: Path) -> None:
    # The key is KMS's business: the S3 server of these tests has none, so this one bucket is moto's.
    client = boto3.client(
        "s3", endpoint_url=aws.endpoint, region_name="us-east-1", aws_access_key_id="any", aws_secret_access_key="any"
    )
    client.create_bucket(Bucket="encrypted")
    bucket = ArchiveBucket(client, "encrypted", region="us-east-1", protection=Protection("arn:aws:kms:the-key"))
    bucket.put_file("part", *a_file(tmp_path, b"one"))
    bucket.put_bytes("manifest", b"two", content_type="application/json")
    bucket.replace_bytes("catalog", b"three", content_type="text/plain")
    found = [bucket.head(key) for key in ("part", "manifest", "catalog")]
    assert [each and each.kms_key for each in found] == ["arn:aws:kms:the-key"] * 3
