"""Months are made ahead without hindering anybody, with the same bounds whoever makes them, closed to all others."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from archive_pipeline import premade_months
from archive_pipeline.errors import PartitionsError
from archive_pipeline.months import Month
from archive_pipeline.premade_months import (
    Gap,
    MonthPartition,
    database_now,
    findings,
    gaps,
    missing_months,
    months_left,
    partition_name,
    partitions_of,
    premake,
    published_by_leaf,
    shortage,
)
from archive_pipeline.snapshot import SourceTable
from devstack.servers import Database
from scaling.databases import Connection

TABLE = SourceTable("public", "audit_logs")
SCHEMA = "audit_partitions"
JULY = datetime(2026, 7, 10, tzinfo=UTC)

# An empty audit_logs of the devstack, partitioned; how a live one becomes so is the conversion's own test.
PARTITION = """
ALTER TABLE audit_logs RENAME TO plain;
CREATE TABLE audit_logs (LIKE plain INCLUDING ALL EXCLUDING INDEXES) PARTITION BY RANGE (created_at);
ALTER TABLE audit_logs ADD PRIMARY KEY (id, created_at), ADD FOREIGN KEY (tenant_id) REFERENCES tenants;
CREATE INDEX ON audit_logs (tenant_id, created_at);
CREATE TRIGGER audit_logs_stamp_actor BEFORE INSERT ON audit_logs FOR EACH ROW EXECUTE FUNCTION stamp_actor();
ALTER TABLE audit_logs ENABLE ROW LEVEL SECURITY;
ALTER TABLE audit_logs FORCE ROW LEVEL SECURITY;
CREATE POLICY own_tenant_reads ON audit_logs FOR SELECT TO authenticated USING (tenant_id = (SELECT auth.tenant_id()));
CREATE POLICY own_tenant_appends ON audit_logs FOR INSERT TO authenticated
    WITH CHECK (tenant_id = (SELECT auth.tenant_id()));
GRANT SELECT, INSERT ON audit_logs TO authenticated;
INSERT INTO tenants (id, name) VALUES ('00000000-0000-0000-0000-000000000001', 'T');
"""
INSERT = "INSERT INTO audit_logs (tenant_id, action, created_at) SELECT id, 'test', %s FROM tenants"


@pytest.fixture
def owner(database: Database) -> Iterator[Connection]:
    """The table's owner, beside an empty partitioned table without partitions."""
    with psycopg.connect(database.owner_dsn, autocommit=True) as connection:
        connection.execute(PARTITION)
        yield connection


def make(owner: Connection, *, ahead: int = 3, zone: str = "UTC", now: datetime = JULY) -> list[str]:
    return [str(each) for each in premake(owner, TABLE, SCHEMA, zone, ahead, now=now)]


def bounds(owner: Connection) -> list[tuple[datetime | None, datetime]]:
    return [(each.from_at, each.to_at) for each in partitions_of(owner, TABLE)]


def one(connection: Connection, query: str, *parameters: object) -> Any:
    row = connection.execute(query.encode(), parameters).fetchone()
    assert row is not None
    return row[0]


def test_the_present_month_and_those_ahead_are_made_and_a_second_run_makes_nothing(owner: Connection) -> None:
    names = [f"{SCHEMA}.audit_logs_2026_{month:02}" for month in (7, 8, 9, 10)]
    assert make(owner) == names
    assert [str(each) for each in partitions_of(owner, TABLE)] == names
    assert make(owner) == []
    assert make(owner, now=JULY + timedelta(days=31)) == [f"{SCHEMA}.audit_logs_2026_11"]


# case 20
@pytest.mark.parametrize("session_zone", ["Asia/Tokyo", "America/St_Johns", "Pacific/Kiritimati"])
def test_the_session_s_time_zone_and_date_style_change_no_bound(owner: Connection, session_zone: str) -> None:
    owner.execute(f"SET TimeZone = '{session_zone}'".encode())
    owner.execute("SET DateStyle = 'German'")
    make(owner, ahead=1)
    owner.execute("RESET TimeZone")
    owner.execute("RESET DateStyle")
    make(owner, ahead=2)
    months = [Month(2026, month) for month in (7, 8, 9)]
    assert bounds(owner) == [(month.start, month.end) for month in months]
    assert gaps(partitions_of(owner, TABLE)) == []
    text = one(owner, "SELECT pg_get_expr(relpartbound, oid) FROM pg_class WHERE relname = 'audit_logs_2026_07'")
    assert text == "FOR VALUES FROM ('2026-07-01 00:00:00+00') TO ('2026-08-01 00:00:00+00')"


def test_the_bounds_are_read_the_same_in_every_session_and_the_session_keeps_its_settings(owner: Connection) -> None:
    make(owner)
    before = bounds(owner)
    owner.execute("SET TimeZone = 'Asia/Tokyo'")
    owner.execute("SET DateStyle = 'SQL, DMY'")
    with owner.transaction():
        assert bounds(owner) == before
        assert {to_at.utcoffset() for _, to_at in bounds(owner)} == {timedelta()}
        assert one(owner, "SHOW TimeZone") == "Asia/Tokyo"
        assert one(owner, "SHOW DateStyle") == "SQL, DMY"


# case 21
def test_months_of_tokyo_begin_at_15_00_utc(owner: Connection) -> None:
    make(owner, ahead=1, zone="Asia/Tokyo", now=datetime(2026, 7, 31, 15, tzinfo=UTC))
    assert bounds(owner) == [
        (datetime(2026, 7, 31, 15, tzinfo=UTC), datetime(2026, 8, 31, 15, tzinfo=UTC)),
        (datetime(2026, 8, 31, 15, tzinfo=UTC), datetime(2026, 9, 30, 15, tzinfo=UTC)),
    ]
    assert [each.month("Asia/Tokyo") for each in partitions_of(owner, TABLE)] == [
        Month(2026, 8, "Asia/Tokyo"),
        Month(2026, 9, "Asia/Tokyo"),
    ]
    owner.execute(INSERT, ("2026-08-31 15:00:00+00",))
    owner.execute(INSERT, ("2026-08-31 14:59:59.999999+00",))
    counts = [one(owner, f"SELECT count(*) FROM {SCHEMA}.audit_logs_2026_{month}") for month in ("08", "09")]
    assert counts == [1, 1]


def test_the_first_instant_belongs_to_the_new_month_and_the_last_microsecond_to_the_old_one(owner: Connection) -> None:
    make(owner)
    owner.execute(INSERT, ("2026-08-01 00:00:00+00",))
    owner.execute(INSERT, ("2026-07-31 23:59:59.999999+00",))
    counts = [one(owner, f"SELECT count(*) FROM {SCHEMA}.audit_logs_2026_{month}") for month in ("07", "08")]
    assert counts == [1, 1]


def test_another_time_zone_than_the_table_s_is_refused_before_anything_is_made(owner: Connection) -> None:
    make(owner, ahead=1)
    before = bounds(owner)
    with pytest.raises(PartitionsError, match="ARCHIVE_TIME_ZONE"):
        make(owner, ahead=4, zone="Asia/Tokyo")
    assert bounds(owner) == before
    [sentence] = [each for each in findings(owner, TABLE, zone="Asia/Tokyo", ahead=0, now=JULY) if "2026_07" in each]
    assert "is not one calendar month of Asia/Tokyo" in sentence


# case 28
def test_inserts_go_on_while_the_scheduler_is_down_for_as_many_months_as_were_premade(owner: Connection) -> None:
    now = database_now(owner)
    ago = now
    for _ in range(3):
        ago = Month.containing(ago).start - timedelta(days=1)
    made = premake(owner, TABLE, SCHEMA, "UTC", 3, now=ago)
    owner.execute("INSERT INTO audit_logs (tenant_id, action) SELECT id, 'three months later' FROM tenants")
    assert one(owner, f"SELECT count(*) FROM {made[-1]}") == 1

    assert months_left(owner, TABLE) == 0
    alarm = shortage(0, TABLE, 3)
    assert alarm is not None
    assert "no month after the present one" in alarm
    assert alarm in findings(owner, TABLE, zone="UTC", ahead=3)
    premake(owner, TABLE, SCHEMA, "UTC", 3)
    assert months_left(owner, TABLE) == 3
    assert findings(owner, TABLE, zone="UTC", ahead=3) == []


def test_the_alarm_comes_months_before_the_first_refused_insert_and_not_when_the_month_has_just_turned() -> None:
    assert [left for left in range(-1, 5) if shortage(left, TABLE, 3)] == [-1, 0, 1]
    assert [left for left in range(-1, 5) if shortage(left, TABLE, 1)] == [-1, 0]
    refused = shortage(-1, TABLE, 3)
    assert refused is not None
    assert "refuses every insert" in refused


def test_the_months_that_a_long_outage_skipped_are_made_too(owner: Connection) -> None:
    make(owner, ahead=0)
    assert months_left(owner, TABLE, now=JULY + timedelta(days=92)) == -1
    late = make(owner, ahead=1, now=JULY + timedelta(days=92))
    assert late == [f"{SCHEMA}.audit_logs_2026_{month:02}" for month in (8, 9, 10, 11)]


# case 29
def test_a_row_of_the_year_2031_is_refused_and_no_default_partition_parks_it(owner: Connection) -> None:
    make(owner)
    with pytest.raises(psycopg.errors.CheckViolation, match="no partition of relation"):
        owner.execute(INSERT, ("2031-01-01 00:00:00+00",))
    make(owner, now=JULY + timedelta(days=31))
    assert one(owner, "SELECT count(*) FROM pg_partition_tree('audit_logs') WHERE isleaf") == 5
    # The reason for the policy: beside a DEFAULT partition no month can be detached without locking everybody out.
    owner.execute(f"ALTER TABLE audit_logs DETACH PARTITION {SCHEMA}.audit_logs_2026_07 CONCURRENTLY".encode())
    assert len(bounds(owner)) == 4


def test_a_default_partition_made_by_somebody_else_is_named(owner: Connection) -> None:
    make(owner, ahead=0)
    owner.execute("CREATE TABLE parked PARTITION OF audit_logs DEFAULT")
    with pytest.raises(PartitionsError, match=r"DEFAULT partition, public\.parked"):
        make(owner)
    with pytest.raises(PartitionsError, match="DEFAULT"):
        months_left(owner, TABLE)


@pytest.mark.parametrize("bound", ["FROM ('2026-08-01') TO ('infinity')", "FROM ('2026-08-01') TO (MAXVALUE)"])
def test_a_partition_without_an_end_is_named(owner: Connection, bound: str) -> None:
    owner.execute(f"CREATE TABLE endless PARTITION OF audit_logs FOR VALUES {bound}".encode())
    with pytest.raises(PartitionsError, match=r"public\.endless .* is not a range of created_at with an end"):
        partitions_of(owner, TABLE)


def test_a_plain_table_is_refused_with_the_command_that_converts_it(database: Database) -> None:
    with psycopg.connect(database.owner_dsn, autocommit=True) as owner:
        assert partitions_of(owner, TABLE) == ()
        for call in (lambda: make(owner), lambda: months_left(owner, TABLE)):
            with pytest.raises(PartitionsError, match="is a plain table"):
                call()
        with pytest.raises(PartitionsError, match=r"there is no table public\.nothing"):
            partitions_of(owner, SourceTable("public", "nothing"))


def test_only_locks_that_readers_and_writers_do_not_notice_are_taken(owner: Connection) -> None:
    with owner.transaction():
        make(owner, ahead=1)
        locks = owner.execute(
            "SELECT c.relname, array_agg(DISTINCT l.mode ORDER BY l.mode) FROM pg_locks l "
            "JOIN pg_class c ON c.oid = l.relation WHERE l.pid = pg_backend_pid() AND c.relname = ANY(%s) GROUP BY 1",
            (["audit_logs", "tenants"],),
        ).fetchall()
    taken: dict[str, list[str]] = dict(locks)
    assert set(taken["audit_logs"]) <= {"AccessShareLock", "RowShareLock", "ShareUpdateExclusiveLock"}
    # Readers of tenants go on; its writers wait for the few milliseconds of the transaction.
    assert "ShareRowExclusiveLock" in taken["tenants"]
    assert not {"ExclusiveLock", "AccessExclusiveLock"} & set(taken["tenants"])


def test_a_month_is_made_while_a_writer_and_a_reader_are_in_the_middle_of_a_transaction(
    owner: Connection, database: Database
) -> None:
    make(owner, ahead=0)
    with psycopg.connect(database.admin_dsn) as app:
        app.execute(INSERT, (JULY,))
        app.execute("SELECT count(*) FROM audit_logs").fetchall()
        assert make(owner, ahead=1) == [f"{SCHEMA}.audit_logs_2026_08"]
        app.execute(INSERT, (JULY + timedelta(days=31),))
    assert one(owner, "SELECT count(*) FROM audit_logs") == 2


def test_a_lock_that_is_not_to_be_had_is_waited_for_with_pauses_and_then_named(
    owner: Connection, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(premade_months, "LOCK_TIMEOUT", "20ms")
    waits: list[float] = []
    with psycopg.connect(database.admin_dsn) as other:
        other.execute("LOCK TABLE tenants IN EXCLUSIVE MODE")
        with pytest.raises(PartitionsError, match="another transaction has held a lock"):
            premake(owner, TABLE, SCHEMA, "UTC", 0, now=JULY, sleep=waits.append)
        assert len(waits) == premade_months.ATTEMPTS - 1
        assert one(owner, "SELECT count(*) FROM pg_class WHERE relname = 'audit_logs_2026_07'") == 0

        def let_go(_: float) -> None:
            if not other.closed:
                other.close()

        assert premake(owner, TABLE, SCHEMA, "UTC", 0, now=JULY, sleep=let_go)


def test_two_runs_at_a_time_make_each_month_once(owner: Connection, database: Database) -> None:
    barrier = threading.Barrier(4)

    def run() -> list[str]:
        with psycopg.connect(database.owner_dsn, autocommit=True) as connection:
            barrier.wait()
            return make(connection, ahead=5)

    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(run) for _ in range(4)]
    made = [name for each in runs for name in each.result()]
    assert sorted(made) == [str(each) for each in partitions_of(owner, TABLE)]
    assert len(made) == 6


def test_a_partition_has_what_the_table_has_once_and_its_trigger_fires_once(owner: Connection) -> None:
    make(owner, ahead=0)
    owner.execute("CREATE TABLE by_postgres PARTITION OF audit_logs FOR VALUES FROM ('2030-01-01') TO ('2030-02-01')")

    def described(name: str) -> list[list[Any]]:
        columns = (
            "SELECT attname, atttypid, attnotnull, attstorage FROM pg_attribute "
            "WHERE attrelid = %s::regclass AND attnum > 0 ORDER BY attnum"
        )
        constraints = (
            "SELECT contype::text, pg_get_constraintdef(oid), conparentid FROM pg_constraint "
            "WHERE conrelid = %s::regclass AND contype <> 'n' ORDER BY 1, 2"
        )
        indexes = (
            "SELECT indisunique, indkey::text, inhparent FROM pg_index JOIN pg_inherits ON inhrelid = indexrelid "
            "WHERE indrelid = %s::regclass ORDER BY 3"
        )
        queries = (
            columns,
            constraints,
            indexes,
            "SELECT pg_get_expr(adbin, adrelid) FROM pg_attrdef WHERE adrelid = %s::regclass ORDER BY 1",
            "SELECT tgname, tgparentid FROM pg_trigger WHERE tgrelid = %s::regclass AND NOT tgisinternal",
        )
        return [owner.execute(query, (name,)).fetchall() for query in queries]

    assert described(f"{SCHEMA}.audit_logs_2026_07") == described("public.by_postgres")


def test_an_identity_column_goes_on_counting_in_a_new_month(owner: Connection) -> None:
    owner.execute("ALTER TABLE audit_logs ADD COLUMN number bigint GENERATED ALWAYS AS IDENTITY")
    make(owner, ahead=0)
    owner.execute(INSERT, (JULY,))
    make(owner, ahead=1)
    owner.execute(INSERT, (JULY + timedelta(days=31),))
    assert owner.execute("SELECT number FROM audit_logs ORDER BY created_at").fetchall() == [(1,), (2,)]


# case 9
def test_default_privileges_that_grant_everything_give_nobody_a_new_month(
    owner: Connection, database: Database
) -> None:
    owner.execute("ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO anon, authenticated, PUBLIC")
    make(owner, ahead=0)
    owner.execute(INSERT, (JULY,))
    name = f"{SCHEMA}.audit_logs_2026_07"
    enabled, forced, acl = owner.execute(
        "SELECT relrowsecurity, relforcerowsecurity, relacl::text FROM pg_class WHERE oid = %s::regclass", (name,)
    ).fetchone() or (None, None, None)
    assert (enabled, forced) == (True, True)
    assert acl is None or acl.count("=") == 1  # the owner's own
    with psycopg.connect(database.admin_dsn, autocommit=True) as admin:
        for role in ("anon", "authenticated"):
            admin.execute(f"SET ROLE {role}".encode())
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                admin.execute(f"SELECT FROM {name}".encode())
            admin.execute("RESET ROLE")
            # Were the schema opened by mistake, the table itself still refuses.
            owner.execute(f"GRANT USAGE ON SCHEMA {SCHEMA} TO {role}".encode())
            admin.execute(f"SET ROLE {role}".encode())
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied for table"):
                admin.execute(f"SELECT FROM {name}".encode())
            admin.execute("RESET ROLE")
        with pytest.raises(PartitionsError, match="is open to anon"):
            make(owner, ahead=1)


def test_a_month_that_the_superuser_makes_belongs_to_the_table_s_owner(owner: Connection, database: Database) -> None:
    with psycopg.connect(database.admin_dsn, autocommit=True) as admin:
        [name] = make(admin, ahead=0)
    owners = "SELECT pg_get_userbyid(c.relowner), pg_get_userbyid(n.nspowner) FROM pg_class c "
    owners += "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = %s::regclass"
    assert owner.execute(owners.encode(), (name,)).fetchone() == ("saas_owner", "saas_owner")
    make(owner, ahead=1)


def test_somebody_who_does_not_own_the_table_is_told_who_does(owner: Connection, database: Database) -> None:
    with (
        psycopg.connect(database.dsn, autocommit=True) as pipeline,
        pytest.raises(PartitionsError, match="only saas_owner"),
    ):
        make(pipeline)


@pytest.mark.parametrize(("identity", "wanted"), [("FULL", "f"), ("NOTHING", "n"), ("DEFAULT", "d")])
def test_a_new_month_has_the_table_s_replica_identity(owner: Connection, identity: str, wanted: str) -> None:
    owner.execute(f"ALTER TABLE audit_logs REPLICA IDENTITY {identity}".encode())
    [name] = make(owner, ahead=0)
    assert one(owner, "SELECT relreplident::text FROM pg_class WHERE oid = %s::regclass", name) == wanted


def test_a_replica_identity_by_index_uses_the_month_s_own_index(owner: Connection) -> None:
    owner.execute("CREATE UNIQUE INDEX by_id ON audit_logs (id, created_at)")
    owner.execute("ALTER TABLE audit_logs REPLICA IDENTITY USING INDEX by_id")
    [name] = make(owner, ahead=0)
    assert one(owner, "SELECT relreplident::text FROM pg_class WHERE oid = %s::regclass", name) == "i"
    parent = "SELECT inhparent::regclass::text FROM pg_inherits JOIN pg_index ON indexrelid = inhrelid "
    parent += "WHERE indrelid = %s::regclass AND indisreplident"
    assert one(owner, parent, name) == "by_id"


def test_publications_that_send_partitions_by_their_own_names_are_noted(owner: Connection, database: Database) -> None:
    with psycopg.connect(database.admin_dsn, autocommit=True) as admin:
        admin.execute("CREATE PUBLICATION by_leaf FOR TABLE audit_logs")
        admin.execute("CREATE PUBLICATION everything FOR ALL TABLES")
        admin.execute("CREATE PUBLICATION by_root FOR TABLE audit_logs WITH (publish_via_partition_root = true)")
        admin.execute("CREATE PUBLICATION other FOR TABLE tenants")
        admin.execute("CREATE PUBLICATION whole_schema FOR TABLES IN SCHEMA public")
    assert published_by_leaf(owner, TABLE) == ["by_leaf", "everything", "whole_schema"]


def test_rows_size_and_a_pending_detach_show(owner: Connection, database: Database) -> None:
    make(owner, ahead=1)
    owner.execute(INSERT, (JULY,))
    owner.execute("ANALYZE audit_logs")
    before, _ = partitions_of(owner, TABLE)
    assert (before.rows_estimate, before.pending_detach) == (1, False)
    assert before.bytes > 0
    with psycopg.connect(database.admin_dsn) as reader:
        reader.execute("SELECT count(*) FROM audit_logs").fetchall()
        owner.execute("SET lock_timeout = '20ms'")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            owner.execute(f"ALTER TABLE audit_logs DETACH PARTITION {before} CONCURRENTLY".encode())
    owner.execute("RESET lock_timeout")
    after, _ = partitions_of(owner, TABLE)
    assert after.pending_detach
    assert months_left(owner, TABLE, now=JULY) == -1  # its rows are refused already
    assert any("was interrupted" in each for each in findings(owner, TABLE, zone="UTC", ahead=0, now=JULY))
    assert make(owner, ahead=1) == []
    owner.execute(f"ALTER TABLE audit_logs DETACH PARTITION {before} FINALIZE".encode())
    assert [str(each) for each in partitions_of(owner, TABLE)] == [f"{SCHEMA}.audit_logs_2026_08"]


def test_a_detached_table_under_the_month_s_name_is_neither_used_nor_replaced(owner: Connection) -> None:
    make(owner, ahead=1)
    owner.execute(INSERT, (JULY,))
    owner.execute(f"ALTER TABLE audit_logs DETACH PARTITION {SCHEMA}.audit_logs_2026_07".encode())
    with pytest.raises(PartitionsError, match=r"a table audit_partitions\.audit_logs_2026_07 exists"):
        make(owner, ahead=1)
    assert one(owner, f"SELECT count(*) FROM {SCHEMA}.audit_logs_2026_07") == 1


def test_a_past_month_on_its_way_out_does_not_keep_new_months_from_being_made(owner: Connection) -> None:
    make(owner, ahead=2)
    owner.execute(f"ALTER TABLE audit_logs DETACH PARTITION {SCHEMA}.audit_logs_2026_08".encode())
    assert make(owner, ahead=1, now=JULY + timedelta(days=62)) == [f"{SCHEMA}.audit_logs_2026_10"]
    [gap] = gaps(partitions_of(owner, TABLE))
    assert gap == Gap(Month(2026, 8).start, Month(2026, 8).end)
    sentences = findings(owner, TABLE, zone="UTC", ahead=1, now=JULY + timedelta(days=62))
    assert sentences == [
        "public.audit_logs has no partition for 2026-08-01 00:00 to 2026-09-01 00:00 UTC, and refuses its rows (23514)"
    ]


def test_months_behind_a_first_partition_without_a_beginning_are_made_from_its_end() -> None:
    legacy = MonthPartition("audit_partitions", "audit_logs_legacy", 1, None, Month(2026, 9).start)
    wanted = missing_months([legacy], TABLE, now=JULY, zone="UTC", ahead=3)
    assert wanted == [Month(2026, 9), Month(2026, 10)]
    assert legacy.month("UTC") is None


def test_a_long_table_name_is_cut_so_that_the_month_stays_in_the_partition_s_name() -> None:
    name = partition_name(SourceTable("public", "ä" * 31), Month(2026, 7))
    assert name.endswith("_2026_07")
    assert len(name.encode()) <= 63


def test_the_command_shows_what_is_there_makes_what_is_missing_and_fails_while_months_run_short(
    owner: Connection,
    database: Database,
    settings_environment: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings_environment(database)
    premake(owner, TABLE, SCHEMA, "UTC", 0)
    assert premade_months.main(["status"]) == 1
    assert "inserts fail (23514)" in capsys.readouterr().out
    assert premade_months.main(["premake"]) == 0
    assert capsys.readouterr().out.count("audit_partitions.audit_logs_") == 3
    assert premade_months.main(["status"]) == 0
    assert premade_months.main(["premake"]) == 0
    assert "made nothing" in capsys.readouterr().out
