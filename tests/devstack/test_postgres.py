"""The embedded Postgres starts whatever state its directory is in, and keeps what was committed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import psycopg
import pytest

from devstack import postgres
from devstack.processes import Supervisor
from scaling.errors import UserError


@pytest.fixture(scope="module")
def used_cluster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cluster that one server has run on; the tests start further ones, one after another."""
    directory = tmp_path_factory.mktemp("cluster")
    with Supervisor(directory) as supervisor:
        server = postgres.start(supervisor, disposable=True)
        with psycopg.connect(server.dsn()) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 1 AS number")
    return directory


def numbers(server: postgres.Postgres) -> list[int]:
    with psycopg.connect(server.dsn()) as connection:
        return [number for (number,) in connection.execute("SELECT number FROM kept")]


def test_what_was_committed_is_there_at_the_next_start(used_cluster: Path) -> None:
    with Supervisor(used_cluster) as supervisor:
        assert numbers(postgres.start(supervisor, disposable=True)) == [1]


def test_a_killed_server_recovers_at_the_next_start(used_cluster: Path) -> None:
    with Supervisor(used_cluster) as supervisor:
        server = postgres.start(supervisor, disposable=True)
        assert server.child is not None
        with psycopg.connect(server.dsn()) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS more (number int)")
        os.kill(server.child.process.pid, signal.SIGKILL)
        server.child.process.wait()
        assert (used_cluster / "postgres" / "data" / "postmaster.pid").exists()
        supervisor.stop(server.child)
        again = postgres.start(supervisor, disposable=True)
        with psycopg.connect(again.dsn()) as connection:
            assert connection.execute("SELECT count(*) FROM more").fetchone() == (0,)


def test_a_stale_pid_file_that_names_a_live_process_is_not_believed(used_cluster: Path) -> None:
    # A process of the server's own user, which Postgres itself would take for another server.
    prefix = postgres.unprivileged()
    bystander = subprocess.Popen([*prefix, sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        pid_file = used_cluster / "postgres" / "data" / "postmaster.pid"
        pid_file.write_text(f"{bystander.pid}\n{used_cluster}\n0\n5432\n\n127.0.0.1\n\nready\n")
        with Supervisor(used_cluster) as supervisor:
            assert numbers(postgres.start(supervisor, disposable=True)) == [1]
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_cluster_of_another_version_is_refused(used_cluster: Path) -> None:
    version = used_cluster / "postgres" / "data" / "PG_VERSION"
    version.write_text("17\n")
    try:
        with Supervisor(used_cluster) as supervisor, pytest.raises(UserError, match="made by PostgreSQL 17"):
            postgres.start(supervisor, disposable=True)
    finally:
        version.write_text("18\n")


def test_an_interrupted_creation_is_started_over(tmp_path: Path) -> None:
    unfinished = tmp_path / "postgres" / "data.unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / "PG_VERSION").write_text("18\n")
    with Supervisor(tmp_path) as supervisor:
        server = postgres.start(supervisor, disposable=True)
        with psycopg.connect(server.dsn()) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)


def test_two_clusters_run_side_by_side_and_in_a_private_folder(used_cluster: Path, tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    with Supervisor(used_cluster) as one, Supervisor(private / "checkout" / "var") as two:
        servers = [postgres.start(one, disposable=True), postgres.start(two, disposable=False)]
        assert servers[0].port != servers[1].port
        assert servers[0].password != servers[1].password
        with psycopg.connect(servers[1].dsn()) as connection:
            assert connection.execute("SHOW fsync").fetchone() == ("on",)
    assert private.stat().st_mode & 0o777 == 0o700


def test_the_server_listens_on_this_machine_only_and_wants_the_password(used_cluster: Path) -> None:
    with Supervisor(used_cluster) as supervisor:
        server = postgres.start(supervisor, disposable=True)
        assert server.child is not None
        listening = {
            connection.laddr.ip
            for connection in psutil.Process(server.child.process.pid).net_connections()
            if connection.status == psutil.CONN_LISTEN
        }
        assert listening == {"127.0.0.1"}
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(server.dsn(password="wrong"))
        assert server.password not in repr(server)


def test_a_dropped_database_disconnects_its_users(used_cluster: Path) -> None:
    with Supervisor(used_cluster) as supervisor:
        server = postgres.start(supervisor, disposable=True)
        with psycopg.connect(server.create_database("busy")) as connection:
            server.drop_database("busy")
            with pytest.raises(psycopg.OperationalError):
                connection.execute("SELECT 1")
