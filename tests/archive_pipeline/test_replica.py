"""A replica is read only when it shows everything, and whatever befalls it or the primary, no month comes out short."""

import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import psycopg
import pytest
from psycopg.rows import TupleRow

from archive_pipeline import archive
from archive_pipeline.archive import MonthReport, Outcome, Step
from archive_pipeline.months import Month
from archive_pipeline.snapshot import caught_up_replica, require_closed
from devstack import saas, servers
from devstack.postgres import Postgres
from devstack.servers import Database, Servers
from scaling import migrate
from scaling.databases import Lsn, Shard
from scaling.errors import UserError
from tests import places
from tests.archive_pipeline import standby
from tests.archive_pipeline.conftest import JANUARY, Room
from tests.archive_pipeline.standby import Pair

pytestmark = pytest.mark.xdist_group("replica")
ROWS = 300


@pytest.fixture(scope="session")
def shared_pair() -> Iterator[Pair]:
    with standby.running(places.directory() / f"{os.getpid()}-replica") as pair:
        prepare(pair.primary)
        yield pair


def prepare(server: Postgres) -> None:
    server.create_database(servers.TEMPLATE)
    saas.create(server, servers.TEMPLATE)
    migrate.upgrade(saas.pipeline_dsn(server, servers.TEMPLATE))


@pytest.fixture
def pair(shared_pair: Pair) -> Iterator[Pair]:
    yield shared_pair
    shared_pair.resume_replay()


@pytest.fixture
def other_pair() -> Iterator[Pair]:
    """Two servers that the test may ruin."""
    with standby.running(places.directory() / f"{os.getpid()}-other-replica") as pair:
        prepare(pair.primary)
        pair.wait_for_replay()
        yield pair


@pytest.fixture
def database(pair: Pair, running_servers: Servers) -> Iterator[Database]:
    """A fresh database of the primary; the bucket and the room are the usual ones."""
    with Servers(pair.primary, running_servers.s3).database() as fresh:
        yield fresh


@pytest.fixture
def january(room: Room, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Iterator[Room]:
    """A month of rows, a shard that has a replica which shows them, and patience of a second with it."""
    monkeypatch.setattr(archive, "caught_up_replica", functools.partial(caught_up_replica, patience=1.0))
    room.fill(ROWS)
    room.admin.execute("VACUUM ANALYZE audit_logs")
    room.shard.close()
    room.shard = shard_of(room.database, pair)
    pair.wait_for_replay()
    yield room
    pair.resume_replay()


def shard_of(database: Database, pair: Pair) -> Shard:
    return Shard(
        "main",
        database.dsn,
        owner_dsn=database.owner_dsn,
        replica_dsn=saas.pipeline_dsn(pair.replica, database.name),
    )


def at(step: Step, action: Callable[[], object], *, times: int = 1) -> Callable[[Step], None]:
    """Do something the first time (or times) that a step is reached."""
    left = [times]

    def on_step(reached: Step) -> None:
        if reached is step and left[0]:
            left[0] -= 1
            action()

    return on_step


def assert_complete(room: Room, report: MonthReport, rows: int) -> None:
    assert report.outcome is Outcome.ARCHIVED
    assert report.manifest.digest.rows == rows
    [found] = room.manifests()
    assert found.manifest == report.manifest
    assert sorted(room.data_keys()) == sorted(part.key for part in report.manifest.parts)
    assert len({row["id"] for row in room.rows("SELECT id FROM audit_logs")}) == rows


def test_a_replica_that_shows_everything_is_read(january: Room) -> None:
    report = january.archive()
    assert report.manifest.read_from == "replica"
    assert_complete(january, report, ROWS)
    assert january.archive().outcome is Outcome.UNCHANGED


# case 40
def test_a_replica_that_catches_up_in_time_is_waited_for_and_read_in_full(january: Room, pair: Pair) -> None:
    pair.pause_replay()
    for number in range(5):
        january.log("2025-01-20 00:00+00", resource_id=f"not replayed yet {number}")
    threading.Timer(0.2, pair.resume_replay).start()
    report = january.archive()
    assert report.manifest.read_from == "replica"
    assert_complete(january, report, ROWS + 5)


# case 40
def test_a_replica_that_stays_behind_is_not_read_and_the_month_is_not_short(january: Room, pair: Pair) -> None:
    pair.pause_replay()
    for number in range(5):
        january.log("2025-01-20 00:00+00", resource_id=f"never replayed {number}")
    report = january.archive()
    assert report.manifest.read_from == "primary"
    assert_complete(january, report, ROWS + 5)


# case 40
def test_a_replica_must_show_rows_that_were_committed_and_not_yet_written_to_disk(january: Room) -> None:
    january.admin.execute("SET synchronous_commit = off")
    short = 0
    for _ in range(5):
        january.log("2025-01-20 00:00+00")
        position = require_closed(january.admin, january.target.table, JANUARY, january.target.grace)
        [(enough,)] = january.admin.execute("SELECT %s::pg_lsn >= pg_current_wal_insert_lsn()", (position,)).fetchall()
        short += not enough
    # The server's own processes write now and then; a position before the commit would be short every time.
    assert short <= 2


# case 40
def test_a_replica_that_does_not_answer_is_not_read(january: Room) -> None:
    january.shard.close()
    january.shard = Shard("main", january.database.dsn, replica_dsn="postgresql://pipeline:x@127.0.0.1:1/postgres")
    report = january.archive()
    assert report.manifest.read_from == "primary"
    assert_complete(january, report, ROWS)


# case 40
def test_a_server_that_is_no_replica_of_the_primary_is_not_read(
    january: Room, running_servers: Servers, other_pair: Pair
) -> None:
    with running_servers.database() as unrelated:
        standbys = [unrelated.dsn, saas.pipeline_dsn(other_pair.replica, servers.TEMPLATE)]
        for replica_dsn in standbys:
            with closing(Shard("main", january.database.dsn, replica_dsn=replica_dsn)) as shard:
                assert caught_up_replica(shard, Lsn("0/0"), patience=0) is None
        january.shard.close()
        january.shard = Shard("main", january.database.dsn, replica_dsn=unrelated.dsn)
        assert_complete(january, january.archive(), ROWS)


# case 41
@pytest.mark.parametrize("step", [Step.SNAPSHOT, Step.EXTRACTED])
def test_a_month_whose_reading_the_replica_cancels_begins_again_and_no_part_of_it_stays(
    january: Room, pair: Pair, step: Step
) -> None:
    january.fill(200, month=Month(2024, 6))
    pair.wait_for_replay()
    seen: list[Step] = []

    def vacuum() -> None:
        january.admin.execute("DELETE FROM audit_logs WHERE created_at < '2025-01-01+00'")
        january.admin.execute("VACUUM audit_logs")
        pair.wait_for_replay()

    interrupt = at(step, vacuum)

    def on_step(reached: Step) -> None:
        seen.append(reached)
        interrupt(reached)

    before = pair.conflicts()
    with pair.cancelling_at_once():
        report = january.archive(on_step=on_step)
    assert pair.conflicts() > before
    assert seen.count(Step.SNAPSHOT) == 2
    assert report.manifest.read_from == "primary"
    assert_complete(january, report, ROWS)


def crash(server: Postgres) -> None:
    """Kill one of a server's processes: the server ends all others, and recovers on the same port."""
    with closing(psycopg.connect(server.dsn(), autocommit=True)) as witness:
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            [(pid,)] = connection.execute("SELECT pg_backend_pid()").fetchall()
            os.kill(pid, signal.SIGKILL)
        # Until it ends the others, the server still takes connections, whose commits it may lose.
        with pytest.raises(psycopg.OperationalError):
            ask_for_ever(witness)
    wait_for(server)


def ask_for_ever(connection: psycopg.Connection[TupleRow]) -> None:
    for _ in range(2000):
        connection.execute("SELECT 1")
        time.sleep(0.005)


def wait_for(server: Postgres) -> None:
    for _ in range(200):
        try:
            psycopg.connect(server.dsn(), connect_timeout=2).close()
        except psycopg.OperationalError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError("the server did not come back")


# case 42
def test_a_replica_that_restarts_in_the_middle_is_left_for_the_primary(january: Room, pair: Pair) -> None:
    report = january.archive(on_step=at(Step.SNAPSHOT, lambda: crash(pair.replica)))
    assert report.manifest.read_from == "primary"
    assert_complete(january, report, ROWS)


# case 42
@pytest.mark.parametrize("step", [Step.SNAPSHOT, Step.EXTRACTED, Step.UPLOADED, Step.READ_BACK])
def test_a_primary_that_restarts_in_the_middle_loses_the_attempt_and_the_next_reads_one_snapshot(
    january: Room, pair: Pair, step: Step
) -> None:
    january.shard.close()
    january.shard = Shard("main", january.database.dsn)
    january.admin.close()

    def restart() -> None:
        crash(pair.primary)
        with psycopg.connect(january.database.admin_dsn, autocommit=True) as connection:
            connection.execute(
                "INSERT INTO audit_logs (tenant_id, action, created_at) "
                "SELECT tenant_id, 'in between', created_at FROM audit_logs LIMIT 3"
            )

    with pytest.raises(UserError):
        january.archive(on_step=at(step, restart))
    assert january.manifests() == []
    report = january.archive()
    assert_complete(january, report, ROWS + 3)


# case 42
def test_a_failover_in_the_middle_loses_the_attempt_and_the_promoted_replica_is_archived_whole(
    room: Room, other_pair: Pair
) -> None:
    name = servers.TEMPLATE
    database = Database(
        name,
        other_pair.primary.dsn(name),
        saas.pipeline_dsn(other_pair.primary, name),
        saas.owner_dsn(other_pair.primary, name),
    )
    with psycopg.connect(database.admin_dsn, autocommit=True) as admin:
        here = Room(shard_of(database, other_pair), admin, room.target, database, room.bucket)
        here.fill(ROWS)
    other_pair.wait_for_replay()

    def fail_over() -> None:
        assert other_pair.primary.child is not None
        os.kill(other_pair.primary.child.process.pid, signal.SIGQUIT)
        other_pair.primary.child.process.wait()
        with psycopg.connect(other_pair.replica.dsn(), autocommit=True) as connection:
            assert connection.execute("SELECT pg_promote()").fetchall() == [(True,)]

    with pytest.raises(UserError):
        here.archive(on_step=at(Step.SNAPSHOT, fail_over))
    assert here.manifests() == []
    here.shard.close()
    here.shard = Shard("main", saas.pipeline_dsn(other_pair.replica, name))
    assert_complete(here, here.archive(), ROWS)
    here.shard.close()
