"""KMS, Glue and Athena as a supervised process: moto's server from the `moto` wheel.

Belongs here: starting it on 127.0.0.1 and naming it to boto3. Does not: S3 (s3.py, a real server).

moto answers as AWS would about keys, tables and workgroups, signs with real RSA keys, and keeps everything in memory.
It runs no SQL, reads no Parquet, and its own S3 checks no checksums (measured with 5.2.5): what those would prove is
proved elsewhere.
"""

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from devstack.processes import ProcessFailedError, Supervisor, free_port

SERVICES = ("KMS", "GLUE", "ATHENA")
START_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Aws:
    """A running server.

    Attributes:
        endpoint: its URL; it takes any access key.
    """

    endpoint: str

    def environment(self) -> Mapping[str, str]:
        """Name the server in the variables from which boto3 takes a service's address by itself."""
        return {f"AWS_ENDPOINT_URL_{service}": self.endpoint for service in SERVICES}


def start(supervisor: Supervisor) -> Aws:
    """Start the server of a stack.

    Args:
        supervisor: owns the process.

    Returns:
        The server, ready for requests; it knows nothing of an earlier life.

    Raises:
        ProcessFailedError: it did not start.
    """
    for attempt in range(1, START_ATTEMPTS + 1):
        port = free_port()
        try:
            supervisor.start(
                "aws",
                [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
                environment={"PATH": os.environ.get("PATH", "")},
                working_directory=supervisor.directory,
                ready=lambda port=port: _listens(port),  # type: ignore[misc]  # mypy does not infer its default
                stop_signal=signal.SIGKILL,  # it has nothing to save
            )
        except ProcessFailedError:
            if attempt == START_ATTEMPTS:
                raise
        else:
            return Aws(f"http://127.0.0.1:{port}")
    raise AssertionError("unreachable: the last attempt returns or raises")


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
