"""Prometheus and promtool as local processes, from Debian's package `prometheus`.

Belongs here: finding the two programs, fetching them without root where they are missing, starting a server that
scrapes. Does not: rules and dashboards (`observability`), or what is scraped.
"""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from filelock import FileLock

from devstack.processes import VAR, Child, ProcessFailedError, Supervisor, free_port
from scaling.errors import UserError

TOOLS = VAR / "tools"
FETCH_SECONDS = 120
START_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A running server."""

    url: str
    child: Child | None = field(default=None, repr=False)

    def ask(self, expression: str) -> list[dict[str, Any]]:
        """Ask for an instant vector.

        Args:
            expression: PromQL.

        Returns:
            Its series; a scalar is one.

        Raises:
            UserError: it is no PromQL, or the server refuses it.
        """
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=30).json()
        if answer["status"] != "success":
            raise UserError(f"Prometheus refuses {expression!r}: {answer['error']}")
        data = answer["data"]
        return [{"value": data["result"]}] if data["resultType"] == "scalar" else list(data["result"])


def tool(name: str) -> Path:
    """Find a program of the package, on the PATH or below var/tools; fetch the package there if it is nowhere.

    Args:
        name: prometheus or promtool.

    Raises:
        UserError: it is nowhere, and cannot be fetched.
    """
    if found := shutil.which(name):
        return Path(found)
    here = TOOLS / "usr" / "bin" / name
    TOOLS.mkdir(parents=True, exist_ok=True)
    with FileLock(TOOLS / "lock"):
        if not here.exists():
            _fetch()
    if not here.exists():
        raise UserError(f"{name} is not in Debian's package prometheus as it is here")
    return here


def _fetch() -> None:
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise UserError("prometheus is not on the PATH, and without apt-get and dpkg it cannot be fetched")
    package = TOOLS / "package"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir()
    try:
        subprocess.run(
            ["apt-get", "download", "prometheus"], cwd=package, check=True, capture_output=True, timeout=FETCH_SECONDS
        )
        [archive] = package.glob("*.deb")
        subprocess.run(["dpkg", "-x", archive, TOOLS], check=True, capture_output=True, timeout=FETCH_SECONDS)
    except (subprocess.SubprocessError, ValueError):
        raise UserError(
            "prometheus is not on the PATH and could not be fetched; install Debian's package prometheus"
        ) from None
    finally:
        shutil.rmtree(package, ignore_errors=True)


def start(supervisor: Supervisor, configuration: Path) -> Prometheus:
    """Start a server on 127.0.0.1.

    Args:
        supervisor: owns the process; data and log lie in its directory.
        configuration: what it scrapes, which rules it evaluates.

    Raises:
        UserError: there is no such program, or it does not start.
    """
    program = tool("prometheus")
    for attempt in range(1, START_ATTEMPTS + 1):
        url = f"http://127.0.0.1:{free_port()}"
        try:
            child = supervisor.start(
                "prometheus",
                _arguments(program, configuration, supervisor.directory, url),
                environment={"PATH": "/usr/bin:/bin"},
                working_directory=supervisor.directory,
                ready=partial(_answers, url),
            )
        except ProcessFailedError:
            if attempt == START_ATTEMPTS:
                raise
            continue
        return Prometheus(url, child)
    raise AssertionError("the last attempt returns or raises")


def _arguments(program: Path, configuration: Path, directory: Path, url: str) -> Sequence[str | Path]:
    return [
        program,
        f"--config.file={configuration}",
        f"--storage.tsdb.path={directory / 'prometheus'}",
        f"--web.listen-address={url.removeprefix('http://')}",
        "--log.level=warn",
    ]


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready", timeout=5).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False
