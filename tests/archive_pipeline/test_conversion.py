"""The conversion of a live table: nothing is lost, nobody waits for long, an attempt that fails leaves nothing."""

import random
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql

from archive_pipeline import conversion, table_statements
from archive_pipeline.conversion import Conversion, ConversionState, LockPolicy, Outcome, Report, Step, conversion_state
from archive_pipeline.conversion_plan import Plan, bound_of, preflight
from archive_pipeline.convert import main
from archive_pipeline.errors import ConversionBusyError, ConversionError, ConversionRefusedError
from archive_pipeline.snapshot import SourceTable
from archive_pipeline.table_objects import TableObjects, capture, differences
from archive_pipeline.table_statements import Names, comparable, partitioned
from devstack.servers import Database, Servers
from scaling.databases import Connection, Shard

TABLE = SourceTable("public", "audit_logs")
PRIVATE = "audit_partitions"
LEGACY = f"{PRIVATE}.audit_logs_legacy"
TENANT = uuid.UUID(int=1)
QUICK = LockPolicy(first_seconds=0.05, longest_seconds=0.2, attempts=4, pause_seconds=0.05)


@dataclass
class Live:
    """The SaaS's table and what a test does with it."""

    database: Database
    shard: Shard
    admin: Connection
    wanted: Conversion
    slept: list[float] = field(default_factory=list)

    def run(self, statements: str) -> None:
        """As the owner of the SaaS's tables."""
        self.admin.execute("SET ROLE saas_owner")
        self.admin.execute(statements.encode())
        self.admin.execute("RESET ROLE")

    def fill(self, rows: int = 200) -> None:
        self.admin.execute(
            "INSERT INTO audit_logs (tenant_id, action, created_at) "
            "SELECT %s, 'a' || g, now() - g * interval '3 hours' FROM generate_series(1, %s) g",
            (TENANT, rows),
        )

    def convert(self, **options: Any) -> Report:
        return conversion.convert(self.shard, self.wanted, **{"sleep": self.slept.append, **options})

    def rollback(self, **options: Any) -> Report:
        return conversion.rollback(self.shard, self.wanted, **{"sleep": self.slept.append, **options})

    def plan(self) -> Plan:
        return conversion.plan(self.shard, self.wanted)

    def state(self) -> ConversionState:
        return conversion_state(self.shard, TABLE)

    def objects(self) -> TableObjects:
        with self.shard.owner() as connection:
            return capture(connection, TABLE)

    def one(self, query: str, *parameters: object) -> Any:
        row = self.admin.execute(query.encode(), parameters).fetchone()
        return None if row is None else row[0]

    def count(self) -> int:
        return int(self.one("SELECT count(*) FROM public.audit_logs"))

    def record(self) -> str | None:
        state = self.one("SELECT state FROM archive.conversions WHERE source_table = 'public.audit_logs'")
        return None if state is None else str(state)

    def partitions(self) -> list[str]:
        return [
            str(name)
            for (name,) in self.admin.execute(
                "SELECT inhrelid::regclass FROM pg_inherits WHERE inhparent = 'public.audit_logs'::regclass ORDER BY 1"
            )
        ]

    @contextmanager
    def acting_as(self, role: str, tenant: uuid.UUID | None = TENANT) -> Iterator[Connection]:
        """A request of the application, as PostgREST would run it."""
        with psycopg.connect(self.database.admin_dsn) as connection:
            claims = f'{{"tenant_id": "{tenant}", "sub": "{uuid.UUID(int=9)}"}}'
            connection.execute("SELECT set_config('request.jwt.claims', %s, true)", (claims,))
            connection.execute(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(role)))
            yield connection

    def refusals(self) -> list[str]:
        with pytest.raises(ConversionRefusedError) as refused:
            self.convert()
        return list(refused.value.blockers)


@pytest.fixture
def live(database: Database, settings_environment: Callable[..., None]) -> Iterator[Live]:
    settings_environment(database)
    with opened(database) as live:
        yield live


@contextmanager
def opened(database: Database) -> Iterator[Live]:
    shard = Shard("main", database.dsn, owner_dsn=database.owner_dsn)
    with psycopg.connect(database.admin_dsn, autocommit=True) as admin:
        admin.execute("SET TimeZone = 'UTC'")
        admin.execute("INSERT INTO tenants (id, name) VALUES (%s, 'T')", (TENANT,))
        yield Live(database, shard, admin, Conversion(TABLE, PRIVATE, "UTC", 3))
    shard.close()


def same_but_partitioned(before: TableObjects, after: TableObjects) -> list[str]:
    return differences(comparable(partitioned(before)), comparable(after))


class Writers:
    """Several sessions of the application that insert without a pause, and how each insert went."""

    def __init__(self, live: Live, number: int = 3, *, role: str = "service_role") -> None:
        self.live = live
        self.role = role
        self.inserted: list[uuid.UUID] = []
        self.failed: list[str] = []
        self.longest = 0.0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._write) for _ in range(number)]

    def _write(self) -> None:
        with psycopg.connect(self.live.database.admin_dsn, autocommit=True) as connection:
            connection.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(self.role)))
            while not self._stop.is_set():
                identifier, started = uuid.uuid4(), time.monotonic()
                try:
                    connection.execute(
                        "INSERT INTO public.audit_logs (id, tenant_id, action) VALUES (%s, %s, 'written')",
                        (identifier, TENANT),
                    )
                except psycopg.Error as error:
                    self.failed.append(f"{error.sqlstate} {error}")
                else:
                    self.inserted.append(identifier)
                self.longest = max(self.longest, time.monotonic() - started)
                time.sleep(0.001)

    def __enter__(self) -> "Writers":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, rows: int) -> None:
        wanted = len(self.inserted) + rows
        while len(self.inserted) < wanted and not self.failed:
            time.sleep(0.002)


def test_a_live_table_is_converted_under_writers_with_no_failed_and_no_lost_insert(live: Live) -> None:
    live.fill(2_000)
    before = live.objects()
    with Writers(live) as writers:
        writers.wait_for(20)
        report = live.convert()
        writers.wait_for(20)
    assert report.outcome is Outcome.CONVERTED
    assert writers.failed == []
    stored = {row[0] for row in live.admin.execute("SELECT id FROM audit_logs WHERE action = 'written'")}
    assert stored == set(writers.inserted)
    assert live.count() == 2_000 + len(writers.inserted)
    assert same_but_partitioned(before, live.objects()) == []
    assert live.record() == "converted"
    assert live.state() == ConversionState(True, False, None, None, (), None)


def test_the_legacy_partition_ends_at_the_month_after_the_next_and_months_follow_it_without_a_gap(live: Live) -> None:
    live.fill()
    report = live.convert()
    assert report.bound is not None
    now = live.one("SELECT now()")
    assert report.bound == bound_of(now, "UTC")
    assert report.bound - now > timedelta(days=7)
    bounds = live.admin.execute(
        "SELECT c.oid::regclass::text, pg_get_expr(c.relpartbound, c.oid) FROM pg_inherits i "
        "JOIN pg_class c ON c.oid = i.inhrelid WHERE inhparent = 'audit_logs'::regclass ORDER BY 2 DESC"
    ).fetchall()
    assert bounds[0] == (LEGACY, f"FOR VALUES FROM (MINVALUE) TO ('{report.bound:%Y-%m-%d} 00:00:00+00')")
    assert report.made[0].from_at == report.bound
    live.admin.execute(
        "INSERT INTO audit_logs (tenant_id, action, created_at) VALUES (%s, 'x', %s)", (TENANT, report.bound)
    )
    assert live.one("SELECT tableoid::regclass::text FROM audit_logs WHERE action = 'x'") == str(report.made[0])


def test_the_bound_is_a_month_start_of_the_configured_zone_written_in_utc(live: Live) -> None:
    live.fill()
    live.admin.execute(sql.SQL("ALTER DATABASE {} SET TimeZone = 'America/New_York'").format(
        sql.Identifier(live.database.name)))  # fmt: skip
    live.wanted = Conversion(TABLE, PRIVATE, "Asia/Tokyo", 3)
    report = live.convert()
    assert report.bound is not None
    assert report.bound.strftime("%H:%M:%S %z") == "15:00:00 +0000"
    assert f"TO ('{report.bound:%Y-%m-%d %H:%M:%S}+00')" in live.one(
        "SELECT pg_get_expr(relpartbound, oid) FROM pg_class WHERE relname = 'audit_logs_legacy'"
    )


# case 1
def test_rows_with_an_infinite_or_no_time_are_refused_with_their_count_and_ids_and_nothing_is_changed(
    live: Live,
) -> None:
    live.run("ALTER TABLE audit_logs ALTER created_at DROP NOT NULL")
    before = live.objects()
    for at in ("infinity", "-infinity", None):
        live.admin.execute("INSERT INTO audit_logs (tenant_id, action, created_at) VALUES (%s, 'x', %s)", (TENANT, at))
        identifier = live.one("SELECT id::text FROM audit_logs")
        reasons = live.refusals()
        assert any("1 rows" in reason for reason in reasons)
        assert not any(identifier in reason for reason in reasons)  # errors go to logs
        assert live.plan().facts.rows == (identifier,)
        assert live.objects() == before
        assert live.record() is None
        live.admin.execute("DELETE FROM audit_logs")


# case 2
def test_a_row_at_or_after_the_bound_is_refused_before_the_check_is_added(live: Live) -> None:
    bound = bound_of(live.one("SELECT now()"), "UTC")
    live.admin.execute("INSERT INTO audit_logs (tenant_id, action, created_at) VALUES (%s, 'x', %s)", (TENANT, bound))
    steps: list[Step] = []
    with pytest.raises(ConversionRefusedError, match="1 rows lie at or after the bound"):
        live.convert(on_step=steps.append)
    assert steps == [Step.CLEANED]
    live.admin.execute("UPDATE audit_logs SET created_at = %s", (bound - timedelta(microseconds=1),))
    assert live.convert().outcome is Outcome.CONVERTED


CRASHES = [Step.INDEXED, Step.VALIDATED, Step.SWAPPED, Step.COMMITTED]


def killed_at(live: Live, step: Step) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "tests.archive_pipeline.killed_conversion", step.name],
        check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert process.returncode == -9, process.stderr
    wait_until_alone(live)


def wait_until_alone(live: Live) -> None:
    """The server notices the end of a client at its next look at the socket."""
    while live.one(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
        "AND application_name = 'killed'"
    ):
        time.sleep(0.01)


@pytest.mark.parametrize("step", CRASHES, ids=lambda step: step.name)
def test_a_run_that_is_killed_at_any_step_converges_when_it_is_started_again(live: Live, step: Step) -> None:
    live.fill()
    before = live.objects()
    killed_at(live, step)
    assert live.count() == 200
    assert live.convert().outcome is (Outcome.UNCHANGED if step is Step.COMMITTED else Outcome.CONVERTED)
    assert live.count() == 200
    assert same_but_partitioned(before, live.objects()) == []
    assert live.record() == "converted"
    assert len(live.partitions()) == 1 + 2
    assert live.state().leftovers == ()


# case 3
def test_the_check_of_a_killed_run_raises_an_alarm_and_the_next_start_removes_it(live: Live) -> None:
    live.fill()
    before = live.objects()
    killed_at(live, Step.CHECKED)
    state = live.state()
    assert (state.partitioned, state.running) == (False, False)
    assert state.check_bound == bound_of(live.one("SELECT now()"), "UTC")
    assert state.days_left is not None
    assert state.days_left > 28
    assert "refuses rows from" in (state.finding or "")
    assert main(["status"]) == 1
    live.run("ALTER TABLE audit_logs ALTER created_at DROP NOT NULL")  # so that the next start is refused
    live.refusals()
    assert live.state() == ConversionState(False, False, None, None, (), None)
    assert main(["status"]) == 0
    live.run("ALTER TABLE audit_logs ALTER created_at SET NOT NULL")
    assert live.objects() == before
    live.admin.execute(
        "INSERT INTO audit_logs (tenant_id, action, created_at) VALUES (%s, 'x', now() + interval '1 year')", (TENANT,)
    )


# case 3
def test_a_run_that_fails_at_any_step_takes_its_check_and_its_index_back(live: Live) -> None:
    live.fill()
    before = live.objects()
    for step in (Step.RECORDED, Step.INDEXED, Step.CHECKED, Step.VALIDATED, Step.LOCKED, Step.SWAPPED):

        def fail(reached: Step, step: Step = step) -> None:
            if reached is step:
                raise RuntimeError("the machine is tired")

        with pytest.raises(RuntimeError):
            live.convert(on_step=fail)
        assert live.objects() == before
        assert live.record() == "aborted"
        assert live.state() == ConversionState(False, False, None, None, (), None)


def test_the_alarm_for_a_check_is_silent_while_its_run_is_at_work_until_the_bound_is_near(live: Live) -> None:
    seen: list[ConversionState] = []
    live.convert(on_step=lambda step: seen.append(live.state()) if step is Step.CHECKED else None)
    (state,) = seen
    assert state.running
    assert state.check_bound is not None
    assert state.finding is None
    live.rollback()
    live.run(
        "ALTER TABLE audit_logs ADD CONSTRAINT audit_logs_archive_bound "
        f"CHECK (created_at < '{live.one('SELECT now() + interval $$3 days$$')}') NOT VALID"
    )  # fmt: skip
    state = live.state()
    assert "in 3.0 days" in (state.finding or "")


# case 4
def test_a_long_reader_makes_the_swap_wait_in_short_turns_with_jitter_while_writers_go_on(live: Live) -> None:
    live.fill()
    turns = LockPolicy(first_seconds=0.05, longest_seconds=0.1, attempts=60, pause_seconds=0.2)
    with psycopg.connect(live.database.admin_dsn) as reader, Writers(live) as writers:
        reader.execute("SELECT count(*) FROM audit_logs")

        def pause(seconds: float) -> None:
            live.slept.append(seconds)
            if len(live.slept) == 8:
                reader.rollback()
            time.sleep(seconds)

        # A concurrent index waits for the reader as well; it is about the swap here.
        def begin_late(step: Step) -> None:
            if step is Step.RECORDED:
                reader.rollback()
            if step is Step.VALIDATED:
                reader.execute("SELECT count(*) FROM audit_logs")

        report = live.convert(policy=turns, sleep=pause, on_step=begin_late, rng=random.Random(1))
        writers.wait_for(10)
    assert report.attempts == 9
    assert len(set(live.slept)) == len(live.slept)
    assert all(0 < seconds <= 0.2 for seconds in live.slept)
    assert writers.failed == []
    assert live.count() == 200 + len(writers.inserted)


# case 4
def test_a_swap_that_never_gets_its_lock_gives_up_names_who_holds_it_and_leaves_the_plain_table(live: Live) -> None:
    live.fill()
    before = live.objects()
    with psycopg.connect(live.database.admin_dsn) as reader:

        def begin_late(step: Step) -> None:
            if step is Step.VALIDATED:
                reader.execute("SELECT count(*) FROM audit_logs")

        def pause(seconds: float) -> None:
            live.slept.append(seconds)
            if len(live.slept) == 2 * QUICK.attempts - 1:
                reader.rollback()  # the attempts are over, it is the CHECK's removal that waits now

        with pytest.raises(ConversionError, match=r"not to be locked in 4 attempts.*session") as gave_up:
            live.convert(policy=QUICK, on_step=begin_late, sleep=lambda seconds: pause(seconds))
        assert str(reader.info.backend_pid) in str(gave_up.value)
    if live.state().leftovers:
        live.rollback()
    assert live.objects() == before
    assert live.record() == "aborted"


def test_no_request_for_the_lock_waits_as_long_as_postgres_waits_before_it_looks_for_deadlocks(live: Live) -> None:
    policy = LockPolicy()
    milliseconds = int(live.one("SELECT setting FROM pg_settings WHERE name = 'deadlock_timeout'"))
    assert max(policy.timeout(attempt) for attempt in range(1, policy.attempts + 1)) < milliseconds / 1000


@pytest.mark.parametrize("order", ["tenants first", "audit logs first"])
def test_transactions_that_lock_both_tables_in_either_order_do_not_keep_the_swap_from_its_lock(
    live: Live, order: str
) -> None:
    live.fill()
    stop, failed = threading.Event(), list[str]()
    statements = [
        "UPDATE tenants SET name = 'U' WHERE id = %s",
        "INSERT INTO audit_logs (tenant_id, action) VALUES (%s, 'written')",
    ]
    if order == "audit logs first":
        statements.reverse()

    def work() -> None:
        with psycopg.connect(live.database.admin_dsn, autocommit=True) as connection:
            while not stop.is_set():
                try:
                    with connection.transaction():
                        for statement in statements:
                            connection.execute(statement.encode(), (TENANT,))
                            time.sleep(0.005)
                except psycopg.Error as error:
                    failed.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        assert live.convert(sleep=time.sleep).outcome is Outcome.CONVERTED
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failed == []


def test_busy_readers_of_a_view_do_not_keep_the_swap_from_its_lock(live: Live) -> None:
    live.fill()
    stop, failed = threading.Event(), list[str]()

    def read() -> None:
        with psycopg.connect(live.database.admin_dsn, autocommit=True) as connection:
            while not stop.is_set():
                try:
                    connection.execute("SELECT count(*) FROM v_recent_audit_logs")
                except psycopg.Error as error:
                    failed.append(str(error))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        report = live.convert(policy=LockPolicy(attempts=6, pause_seconds=0.2), sleep=time.sleep)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert report.outcome is Outcome.CONVERTED
    assert failed == []


def test_a_swap_that_takes_too_long_is_rolled_back_and_not_tried_again(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    live.fill()
    before = live.objects()
    monkeypatch.setattr(conversion, "SWAP_LIMIT_SECONDS", 1.0)
    monkeypatch.setattr(table_statements, "swap", lambda *_: ["SELECT pg_sleep(60)"])
    with pytest.raises(ConversionError, match="was not done in 1 s"):
        live.convert()
    assert live.slept == []
    assert live.objects() == before


# case 5
def test_an_index_whose_building_was_interrupted_is_invalid_and_dropped_on_resume(live: Live) -> None:
    live.fill()
    with psycopg.connect(live.database.admin_dsn) as holder:
        holder.execute("INSERT INTO audit_logs (tenant_id, action) VALUES (%s, 'open')", (TENANT,))
        process = subprocess.Popen([sys.executable, "-m", "tests.archive_pipeline.killed_conversion", "none"])
        while not live.one("SELECT count(*) FROM pg_index WHERE NOT indisvalid"):
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
        process.wait()
        # A statement under way outlives its client: the server is told to end it, as an operator would.
        live.admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'killed'")
        wait_until_alone(live)
    assert live.state().leftovers == ("index public.audit_logs_archive_key",)
    assert "left index" in (live.state().finding or "")
    assert live.convert().outcome is Outcome.CONVERTED
    assert live.one("SELECT count(*) FROM pg_index WHERE NOT indisvalid") == 0


# case 6
def test_the_primary_key_is_widened_by_the_partition_key_in_the_swap_and_never_clashes(live: Live) -> None:
    live.fill()
    live.convert()
    for table in (TABLE, SourceTable(PRIVATE, "audit_logs_legacy")):
        with live.shard.owner() as connection:
            key = capture(connection, table).primary_key
        assert key is not None
        assert (key.name, key.columns) == ("audit_logs_pkey", ("id", "created_at"))


def test_a_primary_key_that_has_the_partition_key_already_needs_no_further_index(live: Live) -> None:
    live.run("ALTER TABLE audit_logs DROP CONSTRAINT audit_logs_pkey, ADD PRIMARY KEY (created_at, id)")
    live.fill()
    assert not any("unique index" in step.name for step in live.plan().steps)
    live.convert()
    key = live.objects().primary_key
    assert key is not None
    assert key.columns == ("created_at", "id")
    live.rollback()
    assert live.objects().primary_key == key


# case 7
def test_row_level_security_policies_and_grants_are_identical_and_anon_sees_nothing_anywhere(live: Live) -> None:
    live.run(
        "CREATE POLICY third ON audit_logs FOR DELETE TO anon, PUBLIC USING (false);"
        "COMMENT ON POLICY third ON audit_logs IS 'nobody deletes';"
        "GRANT UPDATE (details), REFERENCES (id) ON audit_logs TO authenticated WITH GRANT OPTION;"
        "GRANT SELECT ON audit_logs TO anon"
    )
    live.fill()
    catalog = """
        SELECT relrowsecurity, relforcerowsecurity,
               (SELECT array_agg((polname, polcmd, polpermissive, polroles, pg_get_expr(polqual, polrelid),
                                  pg_get_expr(polwithcheck, polrelid))::text ORDER BY polname)
                FROM pg_policy WHERE polrelid = c.oid),
               (SELECT array_agg(x::text ORDER BY x::text) FROM unnest(relacl) x),
               (SELECT array_agg((attname, attacl)::text ORDER BY attname) FROM pg_attribute
                WHERE attrelid = c.oid AND attacl IS NOT NULL)
        FROM pg_class c WHERE oid = 'public.audit_logs'::regclass"""
    before = live.admin.execute(catalog).fetchone()
    assert before is not None
    assert before[:2] == (True, True)
    live.convert()
    assert live.admin.execute(catalog).fetchone() == before
    with live.acting_as("anon") as connection:
        assert connection.execute("SELECT count(*) FROM audit_logs").fetchone() == (0,)
    for partition in live.partitions():
        with live.acting_as("anon") as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(f"SELECT count(*) FROM {partition}".encode())
    with live.acting_as("authenticated") as connection:
        assert connection.execute("SELECT count(id) FROM audit_logs").fetchone() == (200,)
    with live.acting_as("authenticated", uuid.UUID(int=2)) as connection:
        assert connection.execute("SELECT count(id) FROM audit_logs").fetchone() == (0,)


# case 8
def test_with_no_default_grants_the_application_still_inserts_and_selects(live: Live) -> None:
    live.run("ALTER DEFAULT PRIVILEGES REVOKE ALL ON TABLES FROM anon, authenticated, service_role")
    live.fill()
    live.convert()
    with live.acting_as("authenticated") as connection:
        connection.execute("INSERT INTO audit_logs (tenant_id, action) VALUES (%s, 'x')", (TENANT,))
        assert connection.execute("SELECT count(id) FROM audit_logs").fetchone() == (201,)


# case 9
def test_default_privileges_that_give_anon_everything_give_it_nothing_of_the_partitions(live: Live) -> None:
    live.run(
        "ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO anon, PUBLIC;"
        "ALTER DEFAULT PRIVILEGES GRANT ALL ON SEQUENCES TO anon;"
        "ALTER DEFAULT PRIVILEGES GRANT USAGE, CREATE ON SCHEMAS TO anon"
    )
    live.fill()
    before = live.objects()
    live.convert()
    assert same_but_partitioned(before, live.objects()) == []
    for partition in live.partitions():
        with live.acting_as("anon") as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(f"SELECT FROM {partition}".encode())
        # Even one who may enter the schema reads nothing.
        with psycopg.connect(live.database.admin_dsn) as connection:
            connection.execute(f"GRANT USAGE ON SCHEMA {PRIVATE} TO anon; SET LOCAL ROLE anon".encode())
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(f"SELECT FROM {partition}".encode())
            connection.rollback()


def test_a_partition_schema_that_others_may_enter_is_refused(live: Live) -> None:
    live.run(f"CREATE SCHEMA {PRIVATE}; GRANT USAGE ON SCHEMA {PRIVATE} TO authenticated")
    assert any("is open to authenticated" in reason for reason in live.refusals())
    live.wanted = Conversion(TABLE, "public", "UTC", 3)
    assert any("ARCHIVE_PARTITION_SCHEMA is public" in reason for reason in live.refusals())


def test_the_pipeline_reads_the_partitions_themselves(live: Live) -> None:
    live.fill()
    live.convert()
    with live.shard.transaction() as connection:
        assert connection.execute(f"SELECT count(*) FROM {LEGACY}".encode()).fetchone() == (200,)


# case 10
def test_a_trigger_fires_exactly_once_for_an_insert_after_the_swap(live: Live) -> None:
    live.run(
        "CREATE TABLE fired (id uuid); GRANT ALL ON fired TO PUBLIC;"
        "CREATE FUNCTION fire() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS "
        "$$ BEGIN INSERT INTO public.fired VALUES (NEW.id); RETURN NEW; END $$;"
        "CREATE TRIGGER fires AFTER INSERT ON audit_logs FOR EACH ROW EXECUTE FUNCTION fire();"
        "CREATE TRIGGER silent AFTER INSERT ON audit_logs FOR EACH ROW EXECUTE FUNCTION fire();"
        "ALTER TABLE audit_logs DISABLE TRIGGER silent;"
        "CREATE TRIGGER always AFTER UPDATE ON audit_logs FOR EACH STATEMENT EXECUTE FUNCTION fire();"
        "ALTER TABLE audit_logs ENABLE ALWAYS TRIGGER always; COMMENT ON TRIGGER fires ON audit_logs IS 'counts'"
    )
    before = live.objects()
    with Writers(live) as writers:
        writers.wait_for(10)
        report = live.convert()
        writers.wait_for(10)
    live.admin.execute(
        "INSERT INTO audit_logs (tenant_id, action, created_at) VALUES (%s, 'later', %s)", (TENANT, report.bound)
    )
    assert same_but_partitioned(before, live.objects()) == []
    assert live.one("SELECT count(*) FROM fired") == live.one("SELECT count(DISTINCT id) FROM fired") == live.count()
    assert live.count() == len(writers.inserted) + 1


# case 11
def test_views_rules_functions_and_policies_of_others_follow_the_table_and_show_the_same_rows(live: Live) -> None:
    live.run(
        "CREATE VIEW plain AS SELECT * FROM audit_logs;"
        "CREATE VIEW barrier WITH (security_barrier, check_option = local) AS SELECT id, action FROM audit_logs "
        "WHERE action > 'a';"
        "COMMENT ON VIEW plain IS 'all'; GRANT SELECT ON plain TO anon;"
        "CREATE VIEW on_top AS SELECT count(*) AS n FROM plain;"
        "CREATE MATERIALIZED VIEW beneath AS SELECT * FROM on_top;"
        "CREATE VIEW as_json AS SELECT to_jsonb(a) AS j FROM audit_logs a;"
        "CREATE FUNCTION counted() RETURNS bigint LANGUAGE sql BEGIN ATOMIC SELECT count(*) FROM audit_logs; END;"
        "CREATE RULE noted AS ON DELETE TO workspaces DO ALSO "
        "INSERT INTO audit_logs (tenant_id, action) VALUES (old.tenant_id, 'rule');"
        "CREATE POLICY active ON users TO authenticated USING (id IN (SELECT user_id FROM audit_logs))"
    )
    live.fill()
    before = live.objects()
    assert {each.kind for each in before.dependants} == {"view", "function", "rule", "policy"}
    report = live.convert()
    assert same_but_partitioned(before, live.objects()) == []
    live.admin.execute(
        "INSERT INTO audit_logs (tenant_id, action, created_at) VALUES (%s, 'z', %s)", (TENANT, report.bound)
    )
    assert live.one("SELECT count(*) FROM plain") == live.one("SELECT counted()") == live.count() == 201
    assert live.one("SELECT n FROM on_top") == live.one("SELECT count(*) FROM as_json") == 201
    live.admin.execute("REFRESH MATERIALIZED VIEW beneath")
    assert live.one("SELECT n FROM beneath") == 201
    assert live.one("SELECT has_table_privilege('anon', 'plain', 'SELECT')")
    assert live.one("SELECT obj_description('plain'::regclass)") == "all"
    assert live.one("SELECT reloptions FROM pg_class WHERE oid = 'barrier'::regclass") == [
        "security_barrier=true", "check_option=local",
    ]  # fmt: skip


# case 11
def test_what_cannot_follow_the_table_is_refused_with_its_list(live: Live) -> None:
    live.run(
        "CREATE MATERIALIZED VIEW per_day AS SELECT created_at::date AS day, count(*) FROM audit_logs GROUP BY 1;"
        "CREATE VIEW by_key AS SELECT id, action, count(*) FROM audit_logs GROUP BY id;"
        "CREATE FUNCTION latest() RETURNS SETOF audit_logs LANGUAGE sql AS 'SELECT * FROM audit_logs';"
        "CREATE TABLE copies (one audit_logs);"
        "CREATE VIEW whole AS SELECT a FROM audit_logs a"
    )
    before = live.objects()
    reasons = "\n".join(live.refusals())
    for name in ("per_day", "by_key", "latest()", "copies", "whole"):
        assert name in reasons
    assert live.objects() == before


# case 12
def test_an_identity_column_goes_on_with_the_next_number(live: Live) -> None:
    live.run(
        "ALTER TABLE audit_logs ADD number bigint GENERATED ALWAYS AS IDENTITY (INCREMENT 3 CACHE 5 MAXVALUE 90000);"
        "COMMENT ON SEQUENCE audit_logs_number_seq IS 'numbers'; GRANT USAGE ON SEQUENCE audit_logs_number_seq TO anon"
    )
    live.fill(10)
    before = live.objects()
    assert live.one("SELECT max(number) FROM audit_logs") == 28
    with psycopg.connect(live.database.admin_dsn, autocommit=True) as session:
        session.execute("SELECT nextval('audit_logs_number_seq')")
        report = live.convert()
        session.execute("INSERT INTO audit_logs (tenant_id, action) VALUES (%s, 'next')", (TENANT,))
    live.admin.execute(
        "INSERT INTO audit_logs (tenant_id, action, created_at) VALUES (%s, 'later', %s)", (TENANT, report.bound)
    )
    assert same_but_partitioned(before, live.objects()) == []
    numbers = [row[0] for row in live.admin.execute("SELECT number FROM audit_logs ORDER BY number")]
    assert len(set(numbers)) == 12
    assert numbers[-2:] == [46, 61]  # the cache of a session: 5 numbers of step 3 each
    live.rollback()
    live.fill(1)
    assert live.one("SELECT max(number) FROM audit_logs") == 76
    assert differences(before, live.objects()) == []


# case 13
def test_a_serial_sequence_belongs_to_the_parent_and_the_legacy_can_be_dropped(live: Live) -> None:
    live.run("ALTER TABLE audit_logs ADD number bigserial")
    live.fill(10)
    before = live.objects()
    live.convert()
    assert same_but_partitioned(before, live.objects()) == []
    assert live.one("SELECT pg_get_serial_sequence('audit_logs', 'number')") == "public.audit_logs_number_seq"
    live.run(f"ALTER TABLE audit_logs DETACH PARTITION {LEGACY}; DROP TABLE {LEGACY}")
    live.admin.execute(
        "INSERT INTO audit_logs (tenant_id, action, created_at) VALUES (%s, 'x', %s)",
        (TENANT, bound_of(live.one("SELECT now()"), "UTC")),
    )
    assert live.one("SELECT number FROM audit_logs") == 11


# case 14
@pytest.mark.parametrize(
    "tables", ["TABLE audit_logs, tenants", "TABLE audit_logs (id, created_at, action) WHERE (action <> 'x')"]
)
def test_a_publication_by_table_sends_the_parent_under_its_old_name(live: Live, tables: str) -> None:
    live.run(f"CREATE PUBLICATION changes FOR {tables}")
    if "WHERE" in tables:
        live.run("ALTER TABLE audit_logs REPLICA IDENTITY DEFAULT")
    before = live.objects()
    live.fill()
    live.convert()
    assert same_but_partitioned(before, live.objects()) == []
    published = {tuple(row) for row in live.admin.execute("SELECT schemaname, tablename FROM pg_publication_tables")}
    assert ("public", "audit_logs") in published
    assert not any(schema == PRIVATE for schema, _ in published)
    live.rollback()
    assert differences(before, live.objects()) == []


# case 14
def test_a_publication_of_all_tables_is_left_to_its_owner_and_goes_on_when_it_sends_by_the_parent(live: Live) -> None:
    live.admin.execute("CREATE PUBLICATION everything FOR ALL TABLES")
    assert any("everything" in reason and "publish_via_partition_root" in reason for reason in live.refusals())
    live.admin.execute("ALTER PUBLICATION everything SET (publish_via_partition_root = true)")
    before = live.objects()
    live.convert()
    assert same_but_partitioned(before, live.objects()) == []
    assert live.one("SELECT count(*) FROM pg_publication_tables WHERE schemaname = %s", PRIVATE) == 0


# case 14
@pytest.mark.parametrize("identity", ["FULL", "NOTHING", "USING INDEX audit_logs_pkey"])
def test_the_replica_identity_is_kept_and_new_months_have_it(live: Live, identity: str) -> None:
    live.run(f"ALTER TABLE audit_logs REPLICA IDENTITY {identity}")
    before = live.objects()
    live.fill()
    live.convert()
    assert same_but_partitioned(before, live.objects()) == []
    kinds = {
        row[0] for row in live.admin.execute(
            "SELECT relreplident::text FROM pg_partition_tree('audit_logs') JOIN pg_class ON oid = relid")
    }  # fmt: skip
    assert kinds == {before.replica_identity}
    live.rollback()
    assert differences(before, live.objects()) == []


# case 15
def test_a_foreign_key_that_refers_to_the_table_is_refused_with_instructions(live: Live) -> None:
    live.run("CREATE TABLE notes (log_id uuid CONSTRAINT notes_log REFERENCES audit_logs (id))")
    (reason,) = live.refusals()
    assert "foreign key notes_log on public.notes refers to public.audit_logs" in reason
    assert "drop it" in reason


# case 16
def test_dropped_columns_do_not_confuse_the_parent_its_months_or_the_way_back(live: Live) -> None:
    live.run(
        "ALTER TABLE audit_logs DROP user_agent, ADD note text DEFAULT 'none', DROP workspace_id, "
        'ADD size int GENERATED ALWAYS AS (length(action)) STORED, ADD tags text[] COLLATE "C"'
    )
    live.fill()
    live.admin.execute("UPDATE audit_logs SET tags = '{a,NULL}' WHERE action = 'a7'")
    before, rows = live.objects(), "SELECT array_agg(to_jsonb(a) ORDER BY id) FROM audit_logs a"
    was = live.one(rows)
    report = live.convert()
    assert same_but_partitioned(before, live.objects()) == []
    assert live.one(rows) == was
    live.admin.execute(
        "INSERT INTO audit_logs (tenant_id, action, created_at) VALUES (%s, 'abc', %s)", (TENANT, report.bound)
    )
    row = live.one("SELECT to_jsonb(a) FROM audit_logs a WHERE action = 'abc'")
    assert {name: value for name, value in row.items() if name not in ("id", "tenant_id", "created_at")} == {
        "action": "abc", "user_id": None, "resource_type": None, "resource_id": None, "details": None,
        "ip_address": None, "note": "none", "size": 3, "tags": None,
    }  # fmt: skip
    live.rollback()
    assert differences(before, live.objects()) == []
    assert live.one("SELECT size FROM audit_logs WHERE action = 'abc'") == 3


# case 17
def test_a_second_conversion_changes_nothing_and_exits_with_0(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    live.fill()
    live.convert()
    before, partitions = live.objects(), live.partitions()
    assert live.convert().outcome is Outcome.UNCHANGED
    assert main(["apply", "--yes"]) == 0
    assert "left as it is" in capsys.readouterr().out
    assert main(["plan"]) == 0
    assert live.objects() == before
    assert live.partitions() == partitions
    assert live.plan().partitioned


# case 18
def test_a_rollback_gives_the_plain_table_back_with_the_rows_of_all_months_and_its_checks(live: Live) -> None:
    live.run("ALTER TABLE audit_logs ADD CONSTRAINT named CHECK (action <> '')")
    live.fill()
    before = live.objects()
    report = live.convert()
    for month in report.made:
        live.admin.execute(
            "INSERT INTO audit_logs (tenant_id, action, created_at) VALUES (%s, 'later', %s)", (TENANT, month.from_at)
        )
    rows = live.one("SELECT array_agg(to_jsonb(a) ORDER BY id) FROM audit_logs a")
    with Writers(live) as writers:
        writers.wait_for(10)
        assert live.rollback().outcome is Outcome.ROLLED_BACK
        writers.wait_for(10)
    assert writers.failed == []
    live.admin.execute("DELETE FROM audit_logs WHERE action = 'written'")
    assert live.one("SELECT array_agg(to_jsonb(a) ORDER BY id) FROM audit_logs a") == rows
    assert differences(before, live.objects()) == []
    assert live.one("SELECT count(*) FROM pg_class WHERE relnamespace = to_regnamespace(%s)", PRIVATE) == 0
    assert live.record() == "rolled back"
    assert live.rollback().outcome is Outcome.UNCHANGED
    with pytest.raises(psycopg.errors.CheckViolation):
        live.admin.execute("INSERT INTO audit_logs (tenant_id, action) VALUES (%s, '')", (TENANT,))
    live.admin.execute("DELETE FROM audit_logs WHERE action = 'later'")
    assert live.convert().outcome is Outcome.CONVERTED


def test_what_was_added_after_the_conversion_survives_the_rollback_under_its_name(live: Live) -> None:
    live.fill()
    live.convert()
    live.run(
        "CREATE INDEX added ON audit_logs (user_id); ALTER TABLE audit_logs ADD extra int DEFAULT 7;"
        "CREATE POLICY added ON audit_logs FOR DELETE TO authenticated USING (false);"
        "ALTER TABLE audit_logs ADD CONSTRAINT added_fk FOREIGN KEY (user_id) REFERENCES users (id);"
        "ALTER TABLE audit_logs ADD CONSTRAINT also CHECK (extra > 0);"
        "CREATE VIEW added_view AS SELECT extra FROM audit_logs; GRANT SELECT ON audit_logs TO anon;"
        "COMMENT ON COLUMN audit_logs.extra IS 'new'; COMMENT ON COLUMN audit_logs.ip_address IS NULL"
    )
    converted = live.objects()
    live.rollback()
    back = live.objects()
    assert {index.name for index in back.indexes} == {index.name for index in converted.indexes}
    assert {each.name for each in back.constraints} == {each.name for each in converted.constraints}
    assert (back.policies, back.grants, back.columns, back.dependants) == (
        converted.policies, converted.grants, converted.columns, converted.dependants,
    )  # fmt: skip
    assert live.one("SELECT sum(extra) FROM added_view") == 7 * 200


def test_a_rollback_is_refused_when_the_old_table_is_gone(live: Live) -> None:
    live.fill()
    live.convert()
    live.run(f"ALTER TABLE audit_logs DETACH PARTITION {LEGACY}")
    with pytest.raises(ConversionRefusedError, match="is not its partition any more"):
        live.rollback()


def test_a_rollback_with_an_id_in_two_months_is_refused_without_telling_the_id(live: Live) -> None:
    live.fill(1)
    report = live.convert()
    live.admin.execute(
        "INSERT INTO audit_logs (id, tenant_id, action, created_at) SELECT id, tenant_id, action, %s FROM audit_logs",
        (report.bound,),
    )
    converted = live.objects()
    with pytest.raises(ConversionError, match="same primary key of old") as refused:
        live.rollback()
    assert live.one("SELECT id::text FROM audit_logs LIMIT 1") not in str(refused.value)
    assert live.objects() == converted
    assert live.state().leftovers == ()


def test_two_runs_do_not_work_on_one_table(live: Live) -> None:
    def second(step: Step) -> None:
        if step is Step.INDEXED:
            with pytest.raises(ConversionBusyError):
                live.convert()
            with pytest.raises(ConversionBusyError):
                live.rollback()

    assert live.convert(on_step=second).outcome is Outcome.CONVERTED


def test_a_difference_in_the_result_rolls_the_swap_back(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    live.fill()
    before = live.objects()
    true_swap = table_statements.swap

    def forgetful(*arguments: Any) -> list[str]:
        return [each for each in true_swap(*arguments) if "no_back_dating" not in each or "CREATE" not in each]

    monkeypatch.setattr(table_statements, "swap", forgetful)
    with pytest.raises(ConversionError, match="policy no_back_dating is gone"):
        live.convert()
    assert live.objects() == before
    assert live.record() == "aborted"


def test_a_grant_that_comes_just_before_the_lock_is_not_lost(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    true_lock, granted = conversion._Worker._lock, list[bool]()

    def lock(worker: Any, connection: Connection, tables: Sequence[SourceTable], timeout: float, **first: Any) -> None:
        if len(tables) > 1 and not granted:
            granted.append(True)
            live.run("GRANT UPDATE ON audit_logs TO authenticated")
        true_lock(worker, connection, tables, timeout, **first)

    monkeypatch.setattr(conversion._Worker, "_lock", lock)
    assert live.convert().attempts == 2
    assert live.one("SELECT has_table_privilege('authenticated', 'audit_logs', 'UPDATE')")


def test_what_others_change_while_the_index_is_built_is_carried_over_too(live: Live) -> None:
    def meddle(step: Step) -> None:
        if step is Step.INDEXED:
            live.run("ALTER TABLE audit_logs ADD extra int; CREATE INDEX extra ON audit_logs (extra)")

    live.convert(on_step=meddle)
    assert live.objects().column("extra")
    assert "extra" in {index.name for index in live.objects().indexes}


def test_the_owner_role_of_a_login_owns_what_is_made(live: Live, login: Callable[..., str]) -> None:
    live.fill()
    live.shard = Shard("main", live.database.dsn, owner_dsn=login("saas_owner"))
    before = live.objects()
    live.convert()
    assert same_but_partitioned(before, live.objects()) == []
    owners = {
        row[0] for row in live.admin.execute(
            "SELECT pg_get_userbyid(relowner) FROM pg_partition_tree('audit_logs') JOIN pg_class ON oid = relid")
    }  # fmt: skip
    assert owners == {"saas_owner"}


def test_an_owner_from_whom_forced_row_level_security_hides_rows_is_refused(
    live: Live, login: Callable[..., str]
) -> None:
    owner = login()
    live.shard = Shard("main", live.database.dsn, owner_dsn=owner)
    role = psycopg.conninfo.conninfo_to_dict(owner)["user"]
    live.admin.execute(
        sql.SQL("GRANT CREATE ON SCHEMA public TO {0}; ALTER TABLE audit_logs OWNER TO {0}").format(
            sql.Identifier(str(role))
        )
    )
    live.fill()
    assert any("is forced and hides rows" in reason and "BYPASSRLS" in reason for reason in live.refusals())


def test_a_login_that_does_not_own_the_table_is_refused(live: Live, login: Callable[..., str]) -> None:
    live.shard = Shard("main", live.database.dsn, owner_dsn=login())
    assert any("does not own public.audit_logs, saas_owner does" in reason for reason in live.refusals())


BLOCKED = {
    "a unique index without the partition key": "CREATE UNIQUE INDEX u ON audit_logs (resource_id)",
    "a unique constraint without the partition key": "ALTER TABLE audit_logs ADD UNIQUE (resource_id)",
    "a CHECK that is not validated": "ALTER TABLE audit_logs ADD CONSTRAINT n CHECK (action <> 'n') NOT VALID",
    "a CHECK that is not inherited": "ALTER TABLE audit_logs ADD CONSTRAINT n CHECK (action <> 'n') NO INHERIT",
    "a foreign key that is not validated":
        "ALTER TABLE audit_logs ADD FOREIGN KEY (user_id) REFERENCES users (id) NOT VALID",
    "no primary key": "ALTER TABLE audit_logs DROP CONSTRAINT audit_logs_pkey",
    "a time without a zone": "DROP VIEW v_recent_audit_logs; DROP POLICY no_back_dating ON audit_logs;"
        "ALTER TABLE audit_logs ALTER created_at TYPE timestamp",
    "a table that inherits": "CREATE TABLE child () INHERITS (audit_logs)",
    "an unlogged table": "ALTER TABLE audit_logs SET UNLOGGED",
    "a row trigger with transition tables":
        "CREATE TRIGGER t AFTER INSERT ON audit_logs REFERENCING NEW TABLE AS n FOR EACH ROW "
        "EXECUTE FUNCTION stamp_actor()",
    "a name that is taken": f"CREATE SCHEMA {PRIVATE}; CREATE TABLE {LEGACY} ()",
}  # fmt: skip


def test_every_obstacle_is_refused_with_its_remedy(live: Live) -> None:
    live.fill()
    names = Names(TABLE, PRIVATE)
    live.admin.execute("SET ROLE saas_owner")
    assert preflight(live.admin, names, "UTC").blockers == ()
    for obstacle, statements in BLOCKED.items():
        with live.admin.transaction(force_rollback=True):
            live.admin.execute(statements.encode())
            planned = preflight(live.admin, names, "UTC")
        assert planned.blockers, obstacle
        assert all(blocker.reason and blocker.remedy for blocker in planned.blockers)


def test_the_plan_changes_nothing_and_shows_steps_locks_and_what_is_carried_over(
    live: Live, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    live.fill()
    before = live.objects()
    assert main([]) == 0
    assert main(["plan", "--sql"]) == 0
    shown = capsys.readouterr().out
    for words in ("ACCESS EXCLUSIVE, also on public.tenants", "policies: 3", "ATTACH PARTITION", "nothing was changed"):
        assert words in shown
    assert live.objects() == before
    assert live.record() is None
    live.run("CREATE TABLE notes (log_id uuid REFERENCES audit_logs (id))")
    assert main(["plan"]) == 1
    assert "in the way" in capsys.readouterr().out


def test_apply_and_rollback_ask_for_yes(live: Live) -> None:
    from scaling.errors import UserError

    with pytest.raises(UserError, match="--yes"):
        main(["apply"])
    with pytest.raises(UserError, match="--yes"):
        main(["rollback"])
    assert main(["apply", "--yes"]) == 0
    assert main(["status"]) == 0
    assert main(["rollback", "--yes"]) == 0
    assert live.objects().kind == "r"


PIECES = (
    "COMMENT ON TABLE audit_logs IS 'it''s'",
    "ALTER TABLE audit_logs DROP COLUMN user_agent",
    'ALTER TABLE audit_logs ADD "Odd ""Name" text DEFAULT \'a%b\' NOT NULL',
    "ALTER TABLE audit_logs ADD g text GENERATED ALWAYS AS (upper(action)) STORED",
    "ALTER TABLE audit_logs ADD n bigint GENERATED BY DEFAULT AS IDENTITY (START 5)",
    "ALTER TABLE audit_logs ADD s serial; COMMENT ON COLUMN audit_logs.s IS 'serial'",
    "ALTER TABLE audit_logs ALTER action SET STATISTICS 50, ALTER details SET STORAGE EXTERNAL",
    "ALTER TABLE audit_logs ALTER action SET (n_distinct = 7), ALTER details SET COMPRESSION pglz",
    ("ALTER TABLE audit_logs ADD CONSTRAINT short CHECK (length(action) < 1000);"
     "COMMENT ON CONSTRAINT short ON audit_logs IS 'short'"),
    "ALTER TABLE audit_logs ADD CONSTRAINT twice UNIQUE NULLS NOT DISTINCT (created_at, resource_id, id)",
    "ALTER TABLE audit_logs ADD FOREIGN KEY (user_id) REFERENCES users (id) ON DELETE SET NULL DEFERRABLE",
    ("CREATE INDEX on_lower ON audit_logs (lower(action) text_pattern_ops) WITH (fillfactor = 80);"
     "ALTER INDEX on_lower ALTER COLUMN 1 SET STATISTICS 99; COMMENT ON INDEX on_lower IS 'lower'"),
    "CREATE INDEX on_details ON audit_logs USING gin (details jsonb_path_ops)",
    "CREATE INDEX on_brin ON audit_logs USING brin (created_at)",
    "ALTER TABLE audit_logs CLUSTER ON audit_logs_created_at_idx",
    "ALTER TABLE audit_logs SET (autovacuum_vacuum_scale_factor = 0.01, fillfactor = 90)",
    ("CREATE STATISTICS related (dependencies, ndistinct) ON tenant_id, action FROM audit_logs;"
     "ALTER STATISTICS related SET STATISTICS 40; COMMENT ON STATISTICS related IS 'related'"),
    "ALTER TABLE audit_logs NO FORCE ROW LEVEL SECURITY",
    "ALTER TABLE audit_logs DISABLE ROW LEVEL SECURITY",
    'CREATE POLICY "odd policy" ON audit_logs AS RESTRICTIVE FOR UPDATE USING (action IN (SELECT name FROM tenants))',
    "GRANT SELECT, TRUNCATE ON audit_logs TO anon WITH GRANT OPTION; GRANT UPDATE (action) ON audit_logs TO PUBLIC",
    "REVOKE TRUNCATE ON audit_logs FROM saas_owner",
    ("CREATE TRIGGER each BEFORE UPDATE OF action ON audit_logs FOR EACH ROW WHEN (NEW.action <> OLD.action) "
     "EXECUTE FUNCTION stamp_actor(); ALTER TABLE audit_logs ENABLE REPLICA TRIGGER each"),
    ("CREATE TRIGGER whole AFTER DELETE ON audit_logs REFERENCING OLD TABLE AS gone FOR EACH STATEMENT "
     "EXECUTE FUNCTION stamp_actor()"),
    ("CREATE CONSTRAINT TRIGGER later AFTER INSERT ON audit_logs DEFERRABLE INITIALLY DEFERRED FOR EACH ROW "
     "EXECUTE FUNCTION stamp_actor()"),
    "CREATE RULE kept AS ON DELETE TO audit_logs DO INSTEAD NOTHING; COMMENT ON RULE kept ON audit_logs IS 'kept'",
    "ALTER TABLE audit_logs REPLICA IDENTITY FULL",
    "CREATE PUBLICATION p FOR TABLE audit_logs, users",
    "CREATE VIEW v AS SELECT * FROM audit_logs; CREATE VIEW vv AS SELECT count(*) FROM v",
    ("CREATE FUNCTION f(uuid) RETURNS bigint LANGUAGE sql "
     "BEGIN ATOMIC SELECT count(*) FROM audit_logs WHERE tenant_id = $1; END"),
)  # fmt: skip


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.sets(st.sampled_from(range(len(PIECES))), min_size=4))
def test_any_set_of_objects_is_the_same_after_the_conversion_and_after_its_rollback(
    running_servers: Servers, pieces: set[int]
) -> None:
    with running_servers.database() as database, opened(database) as live:
        for number in sorted(pieces):
            live.run(PIECES[number])
        live.admin.execute("SET session_replication_role = replica")
        live.fill(20)
        before = live.objects()
        live.convert()
        assert same_but_partitioned(before, live.objects()) == []
        assert live.count() == 20
        live.rollback()
        assert differences(before, live.objects()) == []
        assert live.count() == 20
        live.shard.close()


def test_every_piece_at_once_is_the_same_after_the_conversion_and_after_its_rollback(live: Live) -> None:
    for piece in PIECES:
        live.run(piece)
    live.admin.execute("SET session_replication_role = replica")
    live.fill(20)
    before = live.objects()
    live.convert()
    assert same_but_partitioned(before, live.objects()) == []
    live.rollback()
    assert differences(before, live.objects()) == []


def test_the_lock_is_asked_for_in_growing_turns_and_the_pauses_between_them_jitter() -> None:
    policy, rng = LockPolicy(), random.Random(7)
    waits = [policy.timeout(attempt) for attempt in range(1, 40)]
    assert waits[0] == 0.05
    assert waits == sorted(waits)
    assert max(waits) == policy.longest_seconds
    pauses = [policy.pause(attempt, rng) for attempt in range(1, 40)]
    assert all(0 < pause <= policy.pause_seconds for pause in pauses)
    assert len(set(pauses)) == len(pauses)


def test_the_bound_lies_four_weeks_ahead_at_every_time_of_the_year() -> None:
    day = datetime.fromisoformat("2026-01-01T00:00:00+00:00")
    for number in range(730):
        now = day + timedelta(days=number)
        assert bound_of(now, "Asia/Tokyo") - now >= timedelta(days=28)
