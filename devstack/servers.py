"""Postgres and S3 together: what a stack and a test session both stand on.

Belongs here: starting the two side by side, databases and buckets for one test, and
`python -m devstack.servers DIRECTORY --owner PID`, which serves them until that process ends.
Does not: the simulator, Dagster, demo data (stack.py).
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import psycopg

from devstack import postgres, s3, saas
from devstack.processes import CHECKOUT, Supervisor, wait_until
from scaling import migrate
from scaling.errors import UserError, run_command

RECORD = "servers.json"
TEMPLATE = "template_saas"


@dataclass(frozen=True, slots=True)
class Database:
    """A database with the SaaS's tables and the pipeline's own, all empty."""

    name: str
    admin_dsn: str = field(repr=False)
    """Superuser: what the SaaS's owner may do."""
    dsn: str = field(repr=False)
    """Role `pipeline`."""
    owner_dsn: str = field(repr=False)
    """Role `saas_owner`."""

    def environment(self) -> Mapping[str, str]:
        """Name the database in the variables that the pipelines read."""
        return {"DATABASE_URL": self.dsn, "DATABASE_OWNER_URL": self.owner_dsn}


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket of its own on the S3 server."""

    name: str
    server: s3.S3

    def environment(self) -> Mapping[str, str]:
        """Name the bucket in the variables that the pipelines and boto3 read."""
        return {"ARCHIVE_BUCKET": self.name, **self.server.environment()}


@dataclass(frozen=True, slots=True)
class Servers:
    """The two running servers."""

    postgres: postgres.Postgres
    s3: s3.S3

    @contextlib.contextmanager
    def database(self) -> Iterator[Database]:
        """Lend a fresh database, a copy of one that was migrated once; it is dropped at the end."""
        name = f"test_{uuid.uuid4().hex[:12]}"
        admin_dsn = self.postgres.create_database(name, template=TEMPLATE)
        try:
            with psycopg.connect(admin_dsn) as connection:
                saas.grant_create(connection, name)
            yield Database(name, admin_dsn, saas.pipeline_dsn(self.postgres, name), saas.owner_dsn(self.postgres, name))
        finally:
            self.postgres.drop_database(name)

    @contextlib.contextmanager
    def bucket(self, *, lockable: bool = False) -> Iterator[Bucket]:
        """Lend a fresh bucket; it is removed with its content at the end, unless something in it is locked."""
        name = f"test-{uuid.uuid4().hex[:12]}"
        self.s3.create_bucket(name, lockable=lockable)
        try:
            yield Bucket(name, self.s3)
        finally:
            self.s3.remove_bucket(name)


def start(supervisor: Supervisor, *, disposable: bool) -> Servers:
    """Start Postgres and S3 at the same time.

    Args:
        supervisor: owns the processes.
        disposable: true trades durability across machine crashes for speed.

    Returns:
        The servers, ready.

    Raises:
        UserError: one of them cannot start.
    """
    with ThreadPoolExecutor(2) as pool:
        database = pool.submit(postgres.start, supervisor, disposable=disposable)
        objects = pool.submit(s3.start, supervisor)
        return Servers(database.result(), objects.result())


def serve(directory: Path, owner: psutil.Process) -> None:
    """Serve both until a process ends, then remove the directory.

    Args:
        directory: for data and logs; `servers.json` appears in it when everything is ready.
        owner: whose end ends the servers, however it comes.
    """
    try:
        with Supervisor(directory) as supervisor:
            servers = start(supervisor, disposable=True)
            servers.postgres.create_database(TEMPLATE)
            saas.create(servers.postgres, TEMPLATE)
            migrate.upgrade(saas.pipeline_dsn(servers.postgres, TEMPLATE))
            _publish(servers, directory)
            while owner.is_running() and owner.status() != psutil.STATUS_ZOMBIE:
                supervisor.check()
                with contextlib.suppress(psutil.TimeoutExpired):
                    owner.wait(1.0)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _publish(servers: Servers, directory: Path) -> None:
    record = {
        "pid": os.getpid(),
        "postgres": {"port": servers.postgres.port, "password": servers.postgres.password},
        "s3": {
            "endpoint": servers.s3.endpoint,
            "access_key_id": servers.s3.access_key_id,
            "secret_access_key": servers.s3.secret_access_key,
        },
    }
    unfinished = directory / f"{RECORD}.unfinished"
    unfinished.touch(mode=0o600)
    unfinished.write_text(json.dumps(record))
    unfinished.rename(directory / RECORD)


def join(directory: Path, owner_pid: int) -> Servers:
    """Get the servers of a directory, starting them if nobody has.

    Args:
        directory: shared by everyone who means the same servers.
        owner_pid: the process whose end ends the servers.

    Returns:
        The servers, with a migrated template database.

    Raises:
        UserError: they did not start.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "join.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / RECORD).exists():
            log = directory / "servers.log"
            with log.open("ab") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", "devstack.servers", str(directory), "--owner", str(owner_pid)],
                    cwd=CHECKOUT,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            wait_until(
                lambda: (directory / RECORD).exists() or process.poll() is not None,
                timeout_seconds=120,
                what="Postgres and S3 serve",
            )
            if process.poll() is not None:
                raise UserError(f"Postgres and S3 did not start; see {log}.")
    record = json.loads((directory / RECORD).read_text())
    return Servers(postgres.Postgres(**record["postgres"]), s3.S3(**record["s3"]))


def leave(directory: Path) -> None:
    """Stop the servers of a directory and wait until they are gone.

    Args:
        directory: that was given to `join`; servers that do not run are fine.
    """
    if (directory / RECORD).exists():
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(json.loads((directory / RECORD).read_text())["pid"])
            process.terminate()
            process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes them from the process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m devstack.servers", description="Postgres and S3 for an owner.")
    parser.add_argument("directory", type=Path, help="for data and logs; removed at the end")
    parser.add_argument("--owner", type=int, required=True, help="process id; the servers end when it does")
    options = parser.parse_args(arguments)
    serve(options.directory, psutil.Process(options.owner))
    return 0


if __name__ == "__main__":
    run_command(main)
