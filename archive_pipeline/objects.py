"""The bucket: objects that are written once, checked by SHA-256 and never overwritten.

Belongs here: the S3 calls, their retries, and S3's errors turned into sentences.
Does not: what the objects are or what they are called.

A part is one PUT: it is far below S3's 5 GiB limit, appears whole or not at all, and leaves no multipart upload
behind when the process dies. boto3 retries throttling, 5xx and broken connections; what it cannot retry is here.
"""

import base64
import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import stamina
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)

from archive_pipeline.errors import ObjectConflictError
from archive_pipeline.parts import base64_of
from scaling.errors import UserError
from scaling.settings import ArchiveSettings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

ATTEMPTS = 8
REPEATS = 4
CHUNK_BYTES = 1 << 20
# S3's names for bytes that arrived other than they were sent; boto3 does not repeat those.
DAMAGED_ON_THE_WAY = ("BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "IncompleteBody")
PARQUET = "application/vnd.apache.parquet"
BROKEN_STREAM = (IncompleteReadError, HTTPClientError, FlexibleChecksumError)


@dataclass(frozen=True, slots=True)
class StoredObject:
    """What the bucket says about an object.

    Attributes:
        key: its key.
        size: bytes.
        sha256: of its bytes, hex, as the server checked it on arrival; None when the server keeps none.
    """

    key: str
    size: int
    sha256: str | None


class ArchiveBucket:
    """One S3 bucket.

    Args:
        client: boto3 client.
        name: of the bucket.
        region: it lies in.
        endpoint: URL of another S3 server; None is AWS.
    """

    def __init__(self, client: "S3Client", name: str, *, region: str, endpoint: str | None = None) -> None:
        self._client = client
        self.name = name
        self.region = region
        self.endpoint = endpoint

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
                read_timeout=60,
                s3={"addressing_style": "path" if settings.aws_endpoint_url_s3 else "auto"},
            ),
        )
        return cls(client, settings.archive_bucket, region=settings.aws_region, endpoint=settings.aws_endpoint_url_s3)

    def put_file(self, key: str, path: Path, sha256: str) -> None:
        """Put a file where nothing is yet; the same bytes being there already is success.

        Args:
            key: of the object.
            path: the file.
            sha256: of its bytes, hex; the server refuses other bytes.

        Raises:
            ObjectConflictError: the key holds other bytes.
            UserError: the bucket cannot be written.
        """
        self._put(key, path, sha256)

    def put_bytes(self, key: str, body: bytes, *, content_type: str) -> None:
        """Put bytes where nothing is yet; the same bytes being there already is success.

        Args:
            key: of the object.
            body: its content.
            content_type: MIME type.

        Raises:
            ObjectConflictError: the key holds other bytes.
            UserError: the bucket cannot be written.
        """
        self._put(key, body, hashlib.sha256(body).hexdigest(), content_type)

    def replace_bytes(self, key: str, body: bytes, *, content_type: str) -> None:
        """Put bytes whatever was there; for what describes the archive, never for what is in it.

        Args:
            key: of the object.
            body: its content.
            content_type: MIME type.

        Raises:
            UserError: the bucket cannot be written.
        """
        checksum = base64_of(hashlib.sha256(body).hexdigest())
        with self._sentences(key):
            self._client.put_object(
                Bucket=self.name, Key=key, Body=body, ContentType=content_type, ChecksumSHA256=checksum
            )

    def head(self, key: str) -> StoredObject | None:
        """Ask for an object's size and checksum; None when there is no such object.

        Args:
            key: of the object.

        Raises:
            UserError: the bucket cannot be read.
        """
        with self._sentences(key):
            try:
                answer = self._client.head_object(Bucket=self.name, Key=key, ChecksumMode="ENABLED")
            except ClientError as error:
                if _status(error) == 404 and _code(error) != "NoSuchBucket":
                    return None
                raise
        # A composite checksum (of a multipart copy, "…-2") is not the SHA-256 of the bytes.
        checksum = answer.get("ChecksumSHA256")
        known = checksum if checksum and "-" not in checksum else None
        return StoredObject(key, answer["ContentLength"], _hex(known) if known else None)

    def holds(self, key: str, size: int, sha256: str) -> bool:
        """Whether an object exists with exactly these bytes; they are read when the server keeps no checksum.

        Args:
            key: of the object.
            size: bytes.
            sha256: hex.

        Raises:
            UserError: the bucket cannot be read.
        """
        found = self.head(key)
        if found is None or found.size != size:
            return False
        return (found.sha256 or hashlib.sha256(self.read(key)).hexdigest()) == sha256

    def read(self, key: str) -> bytes:
        """Read a small object.

        Args:
            key: of the object.

        Raises:
            UserError: the bucket cannot be read.
            FileNotFoundError: there is no such object.
        """
        with self._sentences(key):
            for attempt in stamina.retry_context(on=BROKEN_STREAM, attempts=ATTEMPTS, timeout=None):
                with attempt:
                    return self._client.get_object(Bucket=self.name, Key=key)["Body"].read()
        raise AssertionError  # retry_context returns or raises

    def download(self, key: str, path: Path) -> str:
        """Read an object back into a file, from the start again when the stream breaks.

        Args:
            key: of the object.
            path: the file, replaced.

        Returns:
            SHA-256 of the bytes as they arrived, hex.

        Raises:
            UserError: the bucket cannot be read.
            FileNotFoundError: there is no such object.
        """
        with self._sentences(key):
            for attempt in stamina.retry_context(on=BROKEN_STREAM, attempts=ATTEMPTS, timeout=None):
                with attempt:
                    digest = hashlib.sha256()
                    body = self._client.get_object(Bucket=self.name, Key=key)["Body"]
                    with path.open("wb") as file:
                        for chunk in body.iter_chunks(CHUNK_BYTES):
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
        with self._sentences(prefix):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix):
                for entry in page.get("Contents", []):
                    yield entry["Key"]

    def delete(self, key: str) -> None:
        """Remove an object that no manifest lists; nothing happens when it is not there.

        Args:
            key: of the object.

        Raises:
            UserError: the bucket cannot be written.
        """
        with self._sentences(key):
            self._client.delete_object(Bucket=self.name, Key=key)

    def _put(self, key: str, body: Path | bytes, sha256: str, content_type: str = PARQUET) -> None:
        # A PUT that succeeded but whose answer was lost comes back here as 412 on boto3's retry, and so does a part
        # of an earlier attempt: both are settled by what the key holds. 409 means that two conditional writes met.
        with self._sentences(key):
            for attempt in stamina.retry_context(on=_is_worth_repeating, attempts=REPEATS, timeout=None):
                with attempt, body.open("rb") if isinstance(body, Path) else io.BytesIO(body) as stream:
                    try:
                        self._client.put_object(
                            Bucket=self.name,
                            Key=key,
                            Body=stream,
                            ContentType=content_type,
                            ChecksumSHA256=base64_of(sha256),
                            IfNoneMatch="*",
                        )
                    except ClientError as error:
                        if _status(error) != 412:
                            raise
                        size = body.stat().st_size if isinstance(body, Path) else len(body)
                        if not self.holds(key, size, sha256):
                            raise ObjectConflictError(f"s3://{self.name}/{key} already holds other bytes") from None

    @contextmanager
    def _sentences(self, key: str) -> Iterator[None]:
        where = f"s3://{self.name}/{key}"
        try:
            yield
        except (NoCredentialsError, PartialCredentialsError):
            raise UserError(
                "there are no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run with a role"
            ) from None
        except ClientError as error:
            code = _code(error)
            if code in ("NoSuchKey", "404"):
                raise FileNotFoundError(where) from None
            if code == "NoSuchBucket":
                raise UserError(f"bucket {self.name} does not exist; create it or correct ARCHIVE_BUCKET") from None
            if _status(error) in (301, 307) or code in ("PermanentRedirect", "AuthorizationHeaderMalformed"):
                raise UserError(f"bucket {self.name} is in another region; correct AWS_REGION") from None
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


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _hex(base64_text: str) -> str:
    return base64.b64decode(base64_text).hex()
