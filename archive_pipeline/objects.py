"""The bucket: objects that are written once, checked by SHA-256 and never overwritten.

Belongs here: the S3 calls, their retries, how an object is encrypted and locked, and S3's errors turned into sentences.
Does not: what the objects are or what they are called; how the bucket must be set up
(`archive_pipeline.bucket_protection`).

A part is one PUT: it is far below S3's 5 GiB limit, appears whole or not at all, and leaves no multipart upload
behind when the process dies. boto3 retries throttling, 5xx and broken connections; what it cannot retry is here.

Every PUT carries the SHA-256 of its bytes, which Object Lock requires and which makes S3 refuse bytes that were damaged
on the way. Each object is locked by its own PUT, never by a default rule of the bucket, because salts must stay
removable: an erasure that could not remove them would leave the hashes of personal data guessable.
"""

import base64
import hashlib
import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import boto3
import stamina
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    TokenRetrievalError,
)

from archive_pipeline.errors import ObjectConflictError, ObjectLockedError
from scaling.errors import UserError
from scaling.settings import ArchiveSettings

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from mypy_boto3_s3 import S3Client

ATTEMPTS = 8
REPEATS = 4
READ_TIMEOUT_SECONDS = 60.0
CHUNK_BYTES = 1 << 20
# S3's names for bytes that arrived other than they were sent; boto3 does not repeat those.
DAMAGED_ON_THE_WAY = ("BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "IncompleteBody")
EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired", "InvalidToken")
RENEW = "renew them and run the month again, it goes on from what is in the bucket and nothing was dropped"
# One PUT may carry 5 GiB; parts end at a fraction of it.
PUT_LIMIT_BYTES = 5 << 30
PARQUET = "application/vnd.apache.parquet"
BROKEN_STREAM = (IncompleteReadError, HTTPClientError, FlexibleChecksumError)


@dataclass(frozen=True, slots=True)
class Protection:
    """How objects are stored.

    Attributes:
        kms_key: KMS key (id, alias or ARN) that encrypts every object; None leaves it to the bucket.
        lock: Object Lock mode of every object that is not put unlocked.
        days: how long it is locked.
        versioned: whether the bucket must keep versions: Object Lock needs them, and so does a prune, which asks for
            the very versions that were verified before it drops their rows from Postgres.
    """

    kms_key: str | None = None
    lock: Literal["off", "governance", "compliance"] = "off"
    days: int = 365
    versioned: bool = False

    @classmethod
    def from_settings(cls, settings: ArchiveSettings) -> "Protection":
        """Read what the settings ask for.

        Args:
            settings: of the archive.
        """
        return cls(
            settings.archive_sse_kms_key,
            settings.archive_object_lock,
            settings.archive_object_lock_days,
            versioned=settings.archive_object_lock != "off" or settings.archive_prune != "off",
        )

    def encryption(self) -> dict[str, Any]:
        """Arguments of a PUT that encrypt its object."""
        if self.kms_key is None:
            return {}
        # A bucket key saves a call to KMS for each object, and its price.
        return {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": self.kms_key, "BucketKeyEnabled": True}

    def retention(self, now: datetime) -> dict[str, Any]:
        """Arguments of a PUT that lock its object.

        Args:
            now: when the lock begins.
        """
        if self.lock == "off":
            return {}
        return {
            "ObjectLockMode": self.lock.upper(),
            "ObjectLockRetainUntilDate": (now + timedelta(days=self.days)).replace(microsecond=0),
        }


@dataclass(frozen=True, slots=True)
class StoredObject:
    """What the bucket says about an object.

    Attributes:
        key: its key.
        size: bytes.
        sha256: of its bytes, hex, as the server checked it on arrival; None when the server keeps none.
        version_id: of this version; None in a bucket without versioning.
        metadata: the names and values that its PUT carried.
        kms_key: KMS key that encrypted it, as the server names it; None for another encryption.
        lock: Object Lock mode, ``governance`` or ``compliance``; None when it is not locked.
        locked_until: when the lock ends.
        legal_hold: whether S3's own legal hold is on.
    """

    key: str
    size: int
    sha256: str | None
    version_id: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    kms_key: str | None = None
    lock: str | None = None
    locked_until: datetime | None = None
    legal_hold: bool = False


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a key, as the bucket lists it.

    Attributes:
        key: its key.
        version_id: ``null`` for an object that was put while the bucket kept no versions.
        is_latest: whether readers that name no version get this one.
        is_delete_marker: whether it only hides the versions before it.
        size: bytes; 0 for a delete marker.
    """

    key: str
    version_id: str
    is_latest: bool
    is_delete_marker: bool
    size: int


class ArchiveBucket:
    """One S3 bucket.

    Args:
        client: boto3 client.
        name: of the bucket.
        region: it lies in.
        endpoint: URL of another S3 server; None is AWS.
        protection: how objects are stored.
        now: the time from which an object is locked, aware; S3 takes a date, not a duration.
    """

    def __init__(
        self,
        client: "S3Client",
        name: str,
        *,
        region: str,
        endpoint: str | None = None,
        protection: Protection | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._client = client
        self.name = name
        self.region = region
        self.endpoint = endpoint
        self.protection = protection or Protection()
        self._now = now

    def __repr__(self) -> str:
        return f"ArchiveBucket({self.name!r})"

    @classmethod
    def from_settings(cls, settings: ArchiveSettings) -> "ArchiveBucket":
        """Make the configured bucket; credentials come from boto3's own chain.

        Args:
            settings: region, bucket and, outside AWS, the endpoint.
        """
        client = boto3.Session().client(
            "s3",
            region_name=settings.aws_region,
            endpoint_url=settings.aws_endpoint_url_s3,
            config=Config(
                retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
                connect_timeout=10,
                read_timeout=READ_TIMEOUT_SECONDS,
                max_pool_connections=max(10, settings.archive_parallelism),
                s3={"addressing_style": "path" if settings.aws_endpoint_url_s3 else "auto"},
            ),
        )
        return cls(
            client,
            settings.archive_bucket,
            region=settings.aws_region,
            endpoint=settings.aws_endpoint_url_s3,
            protection=Protection.from_settings(settings),
        )

    @property
    def client(self) -> "S3Client":
        """The boto3 client, for questions about the bucket itself."""
        return self._client

    def put_file(
        self, key: str, path: Path, sha256: str, *, metadata: Mapping[str, str] | None = None, locked: bool = True
    ) -> str | None:
        """Put a file where nothing is yet; the same bytes being there already is success.

        Args:
            key: of the object.
            path: the file.
            sha256: of its bytes, hex; the server refuses other bytes.
            metadata: names and values kept with the object.
            locked: whether Object Lock applies, where it is configured.

        Returns:
            The object's version id; None in a bucket without versioning.

        Raises:
            ObjectConflictError: the key holds other bytes.
            UserError: the bucket cannot be written.
        """
        if path.stat().st_size > PUT_LIMIT_BYTES:
            raise UserError(f"{path.name} is larger than the 5 GiB of one PUT; make parts smaller")
        return self._put(key, path, sha256, PARQUET, metadata or {}, locked=locked)

    def put_bytes(
        self,
        key: str,
        body: bytes,
        *,
        content_type: str,
        metadata: Mapping[str, str] | None = None,
        locked: bool = True,
    ) -> str | None:
        """Put bytes where nothing is yet; the same bytes being there already is success.

        Args:
            key: of the object.
            body: its content.
            content_type: MIME type.
            metadata: names and values kept with the object.
            locked: whether Object Lock applies, where it is configured.

        Returns:
            The object's version id; None in a bucket without versioning.

        Raises:
            ObjectConflictError: the key holds other bytes.
            UserError: the bucket cannot be written.
        """
        return self._put(key, body, hashlib.sha256(body).hexdigest(), content_type, metadata or {}, locked=locked)

    def replace_bytes(self, key: str, body: bytes, *, content_type: str) -> None:
        """Put bytes whatever was there, unlocked; for what describes the archive, never for what is in it.

        Args:
            key: of the object.
            body: its content.
            content_type: MIME type.

        Raises:
            UserError: the bucket cannot be written.
        """
        checksum = _base64(hashlib.sha256(body).hexdigest())
        with self.sentences(key):
            self._client.put_object(
                Bucket=self.name,
                Key=key,
                Body=body,
                ContentType=content_type,
                ChecksumSHA256=checksum,
                **self.protection.encryption(),
            )

    def head(self, key: str, version_id: str | None = None) -> StoredObject | None:
        """Ask for an object's size and checksum; None when there is no such object, or no such version of it.

        Args:
            key: of the object.
            version_id: of the version; None is the latest.

        Raises:
            UserError: the bucket cannot be read.
        """
        with self.sentences(key):
            try:
                answer = self._client.head_object(
                    Bucket=self.name, Key=key, ChecksumMode="ENABLED", **_version(version_id)
                )
            except ClientError as error:
                # A HEAD has no body to name the error; 405 is a delete marker.
                if _status(error) in (404, 405) and _code(error) != "NoSuchBucket":
                    return None
                raise
        # A composite checksum (of a multipart copy, "…-2") is not the SHA-256 of the bytes.
        checksum = answer.get("ChecksumSHA256")
        known = checksum if checksum and "-" not in checksum else None
        lock = answer.get("ObjectLockMode")
        return StoredObject(
            key,
            answer["ContentLength"],
            _hex(known) if known else None,
            version_id=_known(answer.get("VersionId")),
            metadata=dict(answer.get("Metadata", {})),
            kms_key=answer.get("SSEKMSKeyId"),
            lock=lock.lower() if lock else None,
            locked_until=answer.get("ObjectLockRetainUntilDate"),
            legal_hold=answer.get("ObjectLockLegalHoldStatus") == "ON",
        )

    def holds(self, key: str, size: int, sha256: str, version_id: str | None = None) -> bool:
        """Whether an object exists with exactly these bytes; they are read when the server keeps no checksum.

        Args:
            key: of the object.
            size: bytes.
            sha256: hex.
            version_id: of the version; None is the latest.

        Raises:
            UserError: the bucket cannot be read.
        """
        return self._holding(key, size, sha256, version_id) is not None

    def read(self, key: str, version_id: str | None = None) -> bytes:
        """Read a small object.

        Args:
            key: of the object.
            version_id: of the version; None is the latest.

        Raises:
            UserError: the bucket cannot be read.
            FileNotFoundError: there is no such object.
        """
        with self.sentences(key):
            for attempt in stamina.retry_context(on=BROKEN_STREAM, attempts=ATTEMPTS, timeout=None):
                with attempt:
                    return self._get(key, version_id).read()
        raise AssertionError  # retry_context returns or raises

    def read_range(self, key: str, start: int, length: int, version_id: str | None = None) -> bytes:
        """Read some bytes of an object.

        Args:
            key: of the object.
            start: first byte.
            length: how many, at least one; all of them must be there.
            version_id: of the version; None is the latest.

        Raises:
            UserError: the bucket cannot be read.
            FileNotFoundError: there is no such object, or no such version of it.
        """
        wanted = {"Range": f"bytes={start}-{start + length - 1}", **_version(version_id)}
        with self.sentences(key):
            for attempt in stamina.retry_context(on=BROKEN_STREAM, attempts=ATTEMPTS, timeout=None):
                with attempt:
                    return self._client.get_object(Bucket=self.name, Key=key, **wanted)["Body"].read()
        raise AssertionError  # retry_context returns or raises

    def sha256_of(self, key: str, version_id: str | None = None) -> str:
        """Read an object back and keep nothing of it but its SHA-256, hex.

        Args:
            key: of the object.
            version_id: of the version; None is the latest.

        Raises:
            UserError: the bucket cannot be read.
            FileNotFoundError: there is no such object.
        """
        with self.sentences(key):
            for attempt in stamina.retry_context(on=BROKEN_STREAM, attempts=ATTEMPTS, timeout=None):
                with attempt:
                    digest = hashlib.sha256()
                    for chunk in self._get(key, version_id).iter_chunks(CHUNK_BYTES):
                        digest.update(chunk)
                    return digest.hexdigest()
        raise AssertionError  # retry_context returns or raises

    def download(self, key: str, path: Path, version_id: str | None = None) -> str:
        """Read an object back into a file, from the start again when the stream breaks.

        Args:
            key: of the object.
            path: the file, replaced.
            version_id: of the version; None is the latest.

        Returns:
            SHA-256 of the bytes as they arrived, hex.

        Raises:
            UserError: the bucket cannot be read.
            FileNotFoundError: there is no such object.
        """
        with self.sentences(key):
            for attempt in stamina.retry_context(on=BROKEN_STREAM, attempts=ATTEMPTS, timeout=None):
                with attempt:
                    digest = hashlib.sha256()
                    with path.open("wb") as file:
                        for chunk in self._get(key, version_id).iter_chunks(CHUNK_BYTES):
                            digest.update(chunk)
                            file.write(chunk)
                    return digest.hexdigest()
        raise AssertionError  # retry_context returns or raises

    def keys(self, prefix: str) -> Iterator[str]:
        """List the keys under a prefix, in order.

        Args:
            prefix: of the keys.

        Raises:
            UserError: the bucket cannot be listed.
        """
        with self.sentences(prefix):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix):
                for entry in page.get("Contents", []):
                    yield entry["Key"]

    def versions(self, prefix: str) -> Iterator[Version]:
        """List every version and every delete marker under a prefix; the newest of a key first.

        Args:
            prefix: of the keys.

        Raises:
            UserError: the bucket cannot be listed.
        """
        with self.sentences(prefix):
            for page in self._client.get_paginator("list_object_versions").paginate(Bucket=self.name, Prefix=prefix):
                found = [
                    (
                        entry["LastModified"],
                        Version(entry["Key"], entry["VersionId"], entry["IsLatest"], False, entry["Size"]),
                    )
                    for entry in page.get("Versions", [])
                ]
                markers = [
                    (entry["LastModified"], Version(entry["Key"], entry["VersionId"], entry["IsLatest"], True, 0))
                    for entry in page.get("DeleteMarkers", [])
                ]
                # S3 lists the two kinds apart; their times have only whole seconds.
                newest_first = sorted(found + markers, key=lambda each: each[0], reverse=True)
                yield from sorted(
                    (version for _, version in newest_first), key=lambda version: (version.key, not version.is_latest)
                )

    def delete(self, key: str, version_id: str | None = None, *, bypass_governance: bool = False) -> None:
        """Remove an object, or one version for good; nothing happens when it is not there.

        Args:
            key: of the object, which no manifest lists.
            version_id: of the version; None hides a versioned object under a delete marker.
            bypass_governance: removes a version whose lock is in governance mode, given the permission.

        Raises:
            ObjectLockedError: Object Lock protects the version.
            UserError: the bucket cannot be written.
        """
        bypass = {"BypassGovernanceRetention": True} if bypass_governance else {}
        with self.sentences(key):
            try:
                self._client.delete_object(Bucket=self.name, Key=key, **_version(version_id), **bypass)  # type: ignore[arg-type]  # a dict of arguments
            except ClientError as error:
                if _status(error) == 403 and version_id is not None:
                    self._explain_lock(key, version_id)
                raise

    def _explain_lock(self, key: str, version_id: str) -> None:
        found = self.head(key, version_id)
        if found is None:
            return
        where = f"version {version_id} of s3://{self.name}/{key}"
        if found.legal_hold:
            raise ObjectLockedError(f"{where} is under a legal hold; it can be removed when the hold is lifted", None)
        if found.lock is not None and found.locked_until is not None and found.locked_until > self._now():
            until = found.locked_until.astimezone(UTC)
            remedy = (
                "nobody can remove it earlier"
                if found.lock == "compliance"
                else "until then it takes s3:BypassGovernanceRetention"
            )
            raise ObjectLockedError(f"{where} is locked until {until:%Y-%m-%d %H:%M} UTC; {remedy}", until)

    def _get(self, key: str, version_id: str | None) -> "StreamingBody":
        return self._client.get_object(Bucket=self.name, Key=key, **_version(version_id))["Body"]

    def _holding(self, key: str, size: int, sha256: str, version_id: str | None = None) -> StoredObject | None:
        found = self.head(key, version_id)
        if found is None or found.size != size:
            return None
        return found if (found.sha256 or self.sha256_of(key, version_id)) == sha256 else None

    def _put(
        self,
        key: str,
        body: Path | bytes,
        sha256: str,
        content_type: str,
        metadata: Mapping[str, str],
        *,
        locked: bool,
    ) -> str | None:
        # A PUT that succeeded but whose answer was lost comes back here as 412 on boto3's retry, and so does a part
        # of an earlier attempt: both are settled by what the key holds. 409 means that two conditional writes met.
        with self.sentences(key):
            for attempt in stamina.retry_context(on=_is_worth_repeating, attempts=REPEATS, timeout=None):
                with attempt, body.open("rb") if isinstance(body, Path) else io.BytesIO(body) as stream:
                    try:
                        answer = self._client.put_object(
                            Bucket=self.name,
                            Key=key,
                            Body=stream,
                            ContentType=content_type,
                            ChecksumAlgorithm="SHA256",
                            ChecksumSHA256=_base64(sha256),
                            Metadata=metadata,
                            IfNoneMatch="*",
                            **self.protection.encryption(),
                            **(self.protection.retention(self._now()) if locked else {}),
                        )
                    except ClientError as error:
                        if _status(error) != 412:
                            raise
                        size = body.stat().st_size if isinstance(body, Path) else len(body)
                        found = self._holding(key, size, sha256)
                        if found is None:
                            raise ObjectConflictError(f"s3://{self.name}/{key} already holds other bytes") from None
                        return found.version_id
                    return _known(answer.get("VersionId"))
        raise AssertionError  # retry_context returns or raises

    @contextmanager
    def sentences(self, key: str) -> Iterator[None]:
        """Turn S3's errors into sentences.

        Args:
            key: what the calls inside are about; empty for the bucket itself.

        Raises:
            UserError: a call inside failed.
            FileNotFoundError: there is no such object.
        """
        where = f"s3://{self.name}/{key}"
        try:
            yield
        except (NoCredentialsError, PartialCredentialsError):
            raise UserError(
                "there are no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run with a role"
            ) from None
        except (CredentialRetrievalError, TokenRetrievalError):
            raise UserError(f"the AWS credentials could not be renewed for {where}; {RENEW}") from None
        except ClientError as error:
            code = _code(error)
            # A HEAD has no body to name the error, and this is how S3 answers expired credentials.
            if code in EXPIRED or (code == "400" and error.operation_name.startswith("Head")):
                raise UserError(f"the AWS credentials expired at {error.operation_name} of {where}; {RENEW}") from None
            if code == "NoSuchBucket" or (code == "404" and error.operation_name == "HeadBucket"):
                raise UserError(f"bucket {self.name} does not exist; create it or correct ARCHIVE_BUCKET") from None
            # 405 is how S3 answers when the version asked for is a delete marker.
            if code in ("NoSuchKey", "NoSuchVersion", "404", "MethodNotAllowed"):
                raise FileNotFoundError(where) from None
            if _status(error) in (301, 307) or code in ("PermanentRedirect", "AuthorizationHeaderMalformed"):
                raise UserError(f"bucket {self.name} is in another region; correct AWS_REGION") from None
            if action := _kms_action(error):
                raise UserError(
                    f"KMS refuses {error.operation_name} of {where} ({code}); the credentials need {action} on the "
                    "bucket's key, and the key must be enabled"
                ) from None
            if _status(error) in (401, 403):
                raise UserError(
                    f"S3 refuses {error.operation_name} of {where} ({code}); the credentials need s3:ListBucket, "
                    "s3:GetObject, s3:PutObject and s3:DeleteObject there, and the bucket's KMS key"
                ) from None
            if _status(error) >= 500 or code in ("SlowDown", "RequestTimeout"):
                raise UserError(
                    f"S3 failed {error.operation_name} of {where} {ATTEMPTS} times ({code}); try again"
                ) from None
            raise UserError(f"S3 refuses {error.operation_name} of {where} ({code})") from None
        except FlexibleChecksumError:
            raise UserError(f"{where} came back with other bytes than its checksum says, {ATTEMPTS} times") from None
        except BotoCoreError as error:
            raise UserError(f"S3 does not answer for {where} ({type(error).__name__}); try again") from None


def _is_worth_repeating(error: Exception) -> bool:
    return isinstance(error, ClientError) and (_status(error) == 409 or _code(error) in DAMAGED_ON_THE_WAY)


def _kms_action(error: ClientError) -> str | None:
    """What KMS refused; S3 passes it on as a 403 whose message names the action, or as a code of KMS's own."""
    if _code(error).startswith("KMS."):
        return "kms:GenerateDataKey and kms:Decrypt"
    named = re.search(r"kms:\w+", str(error.response.get("Error", {}).get("Message", "")))
    return named[0] if named and _status(error) == 403 else None


def _version(version_id: str | None) -> dict[str, Any]:
    return {} if version_id is None else {"VersionId": version_id}


def _known(version_id: str | None) -> str | None:
    """A bucket that stopped keeping versions calls its objects ``null``."""
    return None if version_id == "null" else version_id


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _base64(hex_text: str) -> str:
    return base64.b64encode(bytes.fromhex(hex_text)).decode()


def _hex(base64_text: str) -> str:
    return base64.b64decode(base64_text).hex()
