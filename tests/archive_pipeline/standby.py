"""A primary and a streaming replica of it, for the tests of archiving from a replica."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg

from devstack import postgres
from devstack.postgres import Postgres
from devstack.processes import Supervisor, wait_until

COPIED = ("--write-recovery-conf", "--checkpoint=fast", "--no-sync")


@dataclass(frozen=True, slots=True)
class Pair:
    """The two running servers."""

    primary: Postgres
    replica: Postgres

    def pause_replay(self) -> None:
        """Let the replica fall behind."""
        self._ask("SELECT pg_wal_replay_pause()")
        wait_until(
            lambda: self._ask("SELECT pg_get_wal_replay_pause_state()") == "paused",
            timeout_seconds=30,
            what="replay pauses",
        )

    def resume_replay(self) -> None:
        """Let it catch up."""
        self._ask("SELECT pg_wal_replay_resume()")

    def wait_for_replay(self) -> None:
        """Wait until the replica shows everything that the primary has committed."""
        with psycopg.connect(self.primary.dsn(), autocommit=True) as connection:
            [(position,)] = connection.execute("SELECT pg_current_wal_flush_lsn()::text").fetchall()
        wait_until(
            lambda: bool(self._ask(f"SELECT pg_last_wal_replay_lsn() >= '{position}'::pg_lsn")),
            timeout_seconds=30,
            what="the replica has caught up",
        )

    def conflicts(self) -> int:
        """How many statements of the replica were cancelled because replay needed their rows gone."""
        return int(str(self._ask("SELECT sum(confl_snapshot) FROM pg_stat_database_conflicts")))

    @contextmanager
    def cancelling_at_once(self) -> Iterator[None]:
        """Let replay cancel readers in its way at once; usually it waits 30 seconds for them."""
        self._ask("ALTER SYSTEM SET max_standby_streaming_delay = 0")
        self._ask("SELECT pg_reload_conf()")
        try:
            yield
        finally:
            self._ask("ALTER SYSTEM RESET max_standby_streaming_delay")
            self._ask("SELECT pg_reload_conf()")

    def _ask(self, query: str) -> object:
        with psycopg.connect(self.replica.dsn(), autocommit=True) as connection:
            cursor = connection.execute(query.encode())
            row = cursor.fetchone() if cursor.description else None
            return row[0] if row else None


@contextmanager
def running(directory: Path) -> Iterator[Pair]:
    """Run both until the end of the block; a paused replica would keep its files, so the directory is removed."""
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        first = stack.enter_context(Supervisor(directory / "primary"))
        primary = postgres.start(first, disposable=True)
        _copy(primary, first.directory, directory / "replica")
        second = stack.enter_context(Supervisor(directory / "replica"))
        yield Pair(primary, postgres.start(second, disposable=True))


def _copy(primary: Postgres, source: Path, directory: Path) -> None:
    data = directory / "postgres" / "data"
    data.mkdir(parents=True, mode=0o700)
    prefix = postgres.unprivileged()
    owner = (source / "postgres" / "data").stat()
    os.chown(data, owner.st_uid, owner.st_gid)
    shutil.copy(source / "postgres" / "password", directory / "postgres" / "password")
    program = str(postgres.wheel_binaries() / "pg_basebackup")
    subprocess.run(
        [*prefix, program, f"--pgdata={data}", f"--dbname={primary.dsn()}", *COPIED],
        check=True,
        env={"PATH": os.environ.get("PATH", "")},
    )
