"""The S3 server enforces what the archive relies on, and keeps objects through a kill."""

import base64
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError

from devstack import s3
from devstack.processes import Supervisor
from devstack.servers import Bucket


def status(error: ClientError) -> int:
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])


def test_only_one_of_many_concurrent_writers_creates_a_key(bucket: Bucket) -> None:
    client = bucket.server.client()

    def put(number: int) -> int:
        try:
            client.put_object(Bucket=bucket.name, Key="month/part", Body=str(number), IfNoneMatch="*")
        except ClientError as error:
            return status(error)
        return 200

    with ThreadPoolExecutor(8) as pool:
        answers = sorted(pool.map(put, range(24)))
    assert answers == [200] + [412] * 23


def test_a_wrong_checksum_is_refused(bucket: Bucket) -> None:
    with pytest.raises(ClientError, match="BadDigest"):
        bucket.server.client().put_object(
            Bucket=bucket.name, Key="key", Body=b"body", ChecksumSHA256=base64.b64encode(b"\0" * 32).decode()
        )


def test_strangers_are_refused(bucket: Bucket) -> None:
    anonymous = boto3.client(
        "s3", endpoint_url=bucket.server.endpoint, region_name="us-east-1", config=Config(signature_version=UNSIGNED)
    )
    with pytest.raises(ClientError) as refusal:
        anonymous.list_objects_v2(Bucket=bucket.name)
    assert status(refusal.value) == 403


def test_a_removed_bucket_takes_its_objects_with_it(bucket: Bucket) -> None:
    client = bucket.server.client()
    client.put_object(Bucket=bucket.name, Key="a/b", Body=b"body")
    bucket.server.remove_bucket(bucket.name)
    assert bucket.name not in {each["Name"] for each in client.list_buckets()["Buckets"]}


def test_a_stopped_server_leaves_no_socket_behind(tmp_path: Path) -> None:
    before = set(Path("/tmp").glob("seaweedfs-*.sock"))
    with Supervisor(tmp_path) as supervisor:
        server = s3.start(supervisor)
        port = server.endpoint.rsplit(":", 1)[1]
        ports = json.loads((tmp_path / "s3" / "ports.json").read_text())
        assert str(ports["s3"]) == port
        own = {path for path in Path("/tmp").glob("seaweedfs-*.sock") if str(ports["s3.grpc"]) in path.name}
        assert own - before
    assert not [path for path in own if path.exists()]


def test_objects_survive_a_kill_of_the_server(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        server = s3.start(supervisor)
        server.create_bucket("kept")
        bodies = {f"part-{number}": os.urandom(200_000 * number + 1) for number in range(8)}
        for key, body in bodies.items():
            server.client().put_object(Bucket="kept", Key=key, Body=body)
        assert server.child is not None
        os.kill(server.child.process.pid, signal.SIGKILL)
        server.child.process.wait()
        supervisor.stop(server.child)

        again = s3.start(supervisor)
        again.create_bucket("kept")
        client = again.client()
        assert {key: client.get_object(Bucket="kept", Key=key)["Body"].read() for key in bodies} == bodies
        client.put_object(Bucket="kept", Key="part-1", Body=b"new")
        assert client.get_object(Bucket="kept", Key="part-2")["Body"].read() == bodies["part-2"]
        assert again.secret_access_key == server.secret_access_key
        assert again.secret_access_key not in repr(again)
