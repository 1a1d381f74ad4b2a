"""Restore: archived rows come back into Postgres exactly, whole months, one tenant's, or as the month's partition."""

import json
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from psycopg import sql

from archive_pipeline import restore as restoring
from archive_pipeline.errors import MonthBusyError, RestoreError
from archive_pipeline.ledger import lease
from archive_pipeline.months import Month
from archive_pipeline.restore import Outcome, Restored, restore
from archive_pipeline.snapshot import SourceTable
from scaling.errors import UserError
from tests.archive_pipeline.conftest import JANUARY, TENANT, Room

FEBRUARY = Month(2025, 2)
RESTORED = SourceTable("audit_partitions", "audit_logs_restored_2025_01")


def back(room: Room, months: Sequence[Month] = (JANUARY,), **options: Any) -> list[Restored]:
    return restore(room.shard, room.target, months, **{"dry_run": False, **options})


def rows_of(room: Room, table: str, columns: str = "*", where: str = "true") -> list[tuple[Any, ...]]:
    room.admin.execute("SET TimeZone = 'UTC'")
    return room.admin.execute(f"SELECT {columns} FROM {table} WHERE {where} ORDER BY id").fetchall()


def prune(room: Room, month: Month = JANUARY) -> None:
    room.admin.execute("DELETE FROM audit_logs WHERE created_at >= %s AND created_at < %s", (month.start, month.end))


# -- a month ---------------------------------------------------------------------------------------------------------


# case 72
def test_a_restored_month_is_equal_by_digest_and_a_second_restore_is_a_no_op(room: Room) -> None:
    room.fill(1500)
    archived = room.archive().manifest
    assert len(archived.parts) > 1
    before = rows_of(room, "audit_logs")
    prune(room)

    [done] = back(room)
    assert (done.outcome, done.table, done.rows) == (Outcome.RESTORED, RESTORED, 1500)
    assert rows_of(room, str(RESTORED)) == before
    indexes = room.admin.execute(
        "SELECT count(*), bool_and(indisvalid) FROM pg_index WHERE indrelid = %s::regclass", (str(RESTORED),)
    ).fetchone()
    assert indexes == (4, True)
    assert room.admin.execute(
        "SELECT relrowsecurity FROM pg_class WHERE oid = %s::regclass", (str(RESTORED),)
    ).fetchone() == (True,)

    [again] = back(room)
    assert again.outcome is Outcome.UNCHANGED
    assert rows_of(room, str(RESTORED)) == before


def test_a_dry_run_is_the_default_and_changes_nothing(room: Room) -> None:
    room.fill(300)
    archived = room.archive().manifest
    room.admin.execute("ANALYZE audit_logs")
    before = room.admin.execute("SELECT count(*) FROM pg_class").fetchone()
    [planned] = restore(room.shard, room.target, [JANUARY])
    assert (planned.outcome, planned.rows, planned.size) == (Outcome.PLANNED, 300, archived.size)
    assert planned.objects == len(archived.parts)
    assert planned.disk_bytes > 0
    assert room.admin.execute("SELECT count(*) FROM pg_class").fetchone() == before


def test_nobody_but_the_owner_may_read_what_is_restored_whatever_default_privileges_say(room: Room) -> None:
    room.fill(30)
    room.archive()
    room.admin.execute(
        "ALTER DEFAULT PRIVILEGES FOR ROLE saas_owner GRANT ALL ON TABLES TO anon, authenticated, PUBLIC"
    )
    back(room)
    for role in ("anon", "authenticated", "pipeline"):
        assert room.admin.execute(
            "SELECT has_table_privilege(%s, %s::regclass, 'SELECT')", (role, str(RESTORED))
        ).fetchone() == (False,)


VALUES: dict[str, tuple[str, list[Any]]] = {
    "label": ("text", ["", "\\N", "NULL", "\\", "a\nb\r\n\t\\.\n\\.", "\\.", "😀 ' \" é", "x" * 5000]),
    "doc": ("json", ['{"b": 1,  "a":2}', '"\\u0000"', json.dumps("\n\t\\"), "1e400"]),
    "docb": ("jsonb", ["1e1000", "[" * 900 + "]" * 900, '{"a": "\\n\\\\ \\" "}']),
    "at": (
        "timestamptz",
        [
            "infinity",
            "-infinity",
            "0044-03-15 12:00 BC",
            "4713-01-01 BC",
            "294246-12-31 23:59:59.999999",
            "1969-12-31 23:59:59.999999Z",
            "1970-01-01Z",
            "9999-12-31 23:59:59.999999Z",
        ],
    ),
    "wall": ("timestamp", ["infinity", "-infinity", "0044-03-15 12:00:00.000001 BC", "2025-01-01 00:00:00.1"]),
    "day": ("date", ["infinity", "-infinity", "0001-01-01 BC", "5874897-12-31", "1970-01-01"]),
    "raw": ("bytea", [b"", b"\x00\xff\\\n\t"]),
    "small": ("smallint", [-32768]),
    "big": ("bigint", [2**63 - 1, -(2**63)]),
    "flag": ("boolean", [True, False]),
    "real": ("real", ["NaN", "Infinity", "-0", "1e-45", "3.4028235e38", "0.1"]),
    "double": ("double precision", ["NaN", "-Infinity", "-0", "5e-324", "1.7976931348623157e308", "0.1"]),
    "price": ("numeric(10,2)", ["99999999.99", "-0.01", "0"]),
    "tiny": ("numeric(20,12)", ["0.000000000001", "0", "-1e-12"]),
    "huge": ("numeric(38,3)", ["12345678901234567890123456789012345.678"]),
    "free": ("numeric", ["NaN", "-Infinity", "1e300", "1.10"]),
    "mood": ("mood", ["glad", "so-so, really"]),
    "net": ("inet", ["10.0.0.1/24", "::1/64", "10.0.0.1"]),
    "block": ("cidr", ["10.0.0.0/8"]),
    "span": ("interval", ["1 year 3 days 04:05:06.7", "-1 mon +2 days"]),
    "cash": ("money", ["-1234567.89"]),
    "fixed": ("char(5)", ["ab"]),
    "words": ("text[]", [["a", None, "", "NULL", '"\\{},\n'], []]),
    "grid": ("integer[]", ["{{1,2},{3,NULL}}"]),
    "moments": ("timestamptz[]", ['{infinity,"2025-01-01 00:00:00.000001+00"}']),
    "reals": ("double precision[]", ["{NaN,-0,1e300,0.1}"]),
    "blobs": ("bytea[]", [r'{"\\x01ff"}']),
    "docs": ("jsonb[]", [r'{"{\"a\": [1]}",null,"\"x\""}']),
    "period": ("tstzrange", ["empty", "[2025-01-01,2025-02-01)"]),
    "spot": ("point", ["(0.30000000000000004,1e-300)"]),
}


def every_type(room: Room) -> SourceTable:
    columns = ", ".join(f"{name} {kind}" for name, (kind, _) in VALUES.items())
    room.admin.execute(
        f"""CREATE TYPE mood AS ENUM ('glad', 'so-so, really');
            CREATE TABLE everything (
              id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, tenant_id uuid, created_at timestamptz NOT NULL,
              {columns}, doubled bigint GENERATED ALWAYS AS (small * 2) STORED, "Odd Name" text,
              "year" int, CHECK (small < 99)
            );
            ALTER TABLE everything OWNER TO saas_owner;
            GRANT SELECT ON everything TO pipeline"""
    )
    table = SourceTable("public", "everything")
    longest = max(len(values) for _, values in VALUES.values())
    for number in range(longest + 1):  # the last row has NULL everywhere
        row: dict[str, Any] = {"tenant_id": TENANT, "created_at": datetime(2025, 1, 2, tzinfo=UTC)}
        for name, (_, values) in VALUES.items():
            row[name] = values[number] if number < len(values) else None
        row["Odd Name"], row["year"] = f"%s {number}", number
        room.admin.execute(
            sql.SQL("INSERT INTO everything ({}) VALUES ({})").format(
                sql.SQL(", ").join(map(sql.Identifier, row)), sql.SQL(", ").join([sql.Placeholder()] * len(row))
            ),
            list(row.values()),
        )
    room.admin.execute(
        "INSERT INTO everything (tenant_id, created_at, small) OVERRIDING SYSTEM VALUE VALUES (NULL, '2025-01-31', 7)"
    )
    return table


def of_everything(room: Room) -> Room:
    from dataclasses import replace

    from archive_pipeline.manifest import Layout

    room.target = replace(room.target, table=every_type(room), layout=Layout("everything"))
    return room


def test_every_type_comes_back_exactly(room: Room) -> None:
    of_everything(room)
    room.archive()
    text = "e::text"
    before = room.admin.execute(f"SELECT id, {text} FROM everything e ORDER BY id").fetchall()
    [done] = back(room)
    after = room.admin.execute(f"SELECT id, {text} FROM {done.table} e ORDER BY id").fetchall()
    assert after == before
    assert len(before) == max(len(values) for _, values in VALUES.values()) + 2


# case 16
def test_columns_dropped_renamed_or_added_since_are_restored_by_name(room: Room) -> None:
    room.admin.execute("ALTER TABLE audit_logs DROP COLUMN workspace_id")
    room.fill(50)
    room.archive()
    before = rows_of(room, "audit_logs", "id, resource_type, resource_id, details, user_agent")
    prune(room)
    room.admin.execute(
        """DROP VIEW v_recent_audit_logs;
           ALTER TABLE audit_logs DROP COLUMN resource_type;
           ALTER TABLE audit_logs RENAME COLUMN resource_id TO subject;
           ALTER TABLE audit_logs DROP COLUMN user_agent;
           ALTER TABLE audit_logs ADD COLUMN user_agent text;
           ALTER TABLE audit_logs ADD COLUMN severity int DEFAULT 3;
           ALTER TABLE audit_logs ADD COLUMN origin text NOT NULL DEFAULT 'app'"""
    )
    [done] = back(room, renamed={"resource_id": "subject"})
    assert rows_of(room, str(done.table), "id, resource_type, subject, details, user_agent") == before
    assert set(rows_of(room, str(done.table), "severity, origin")) == {(None, "app")}


def test_a_column_that_must_not_be_null_and_was_not_archived_is_named(room: Room) -> None:
    room.fill(5)
    room.archive()
    prune(room)
    room.admin.execute("ALTER TABLE audit_logs ADD COLUMN severity int NOT NULL")
    with pytest.raises(RestoreError, match=r"severity of .* must not be NULL and was not archived") as refused:
        back(room)
    assert refused.value.columns == ("severity",)
    assert room.admin.execute("SELECT to_regclass(%s)", (str(RESTORED),)).fetchone() == (None,)


def test_rows_that_came_back_different_are_rolled_back_and_the_column_is_named(room: Room) -> None:
    room.fill(20)
    room.archive()
    room.admin.execute(
        """CREATE FUNCTION spoil() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.action := 'x'; RETURN NEW; END $$;
           CREATE TABLE elsewhere (LIKE audit_logs); ALTER TABLE elsewhere OWNER TO saas_owner;
           CREATE TRIGGER spoil BEFORE INSERT ON elsewhere FOR EACH ROW EXECUTE FUNCTION spoil()"""
    )
    with pytest.raises(RestoreError, match="would hold the content of the 20 rows differs") as refused:
        back(room, into=SourceTable("public", "elsewhere"))
    assert refused.value.columns == ("action",)
    assert rows_of(room, "elsewhere") == []


def test_an_object_with_other_bytes_is_never_restored(room: Room) -> None:
    room.fill(400)
    part = room.archive().manifest.parts[-1]
    room.bucket.server.client().put_object(Bucket=room.bucket.name, Key=part.key, Body=b"x" * part.size)
    with pytest.raises(RestoreError, match="holds other bytes than its manifest says"):
        back(room)
    assert room.admin.execute("SELECT to_regclass(%s)", (str(RESTORED),)).fetchone() == (None,)


def test_the_newest_generation_is_restored_late_rows_included(room: Room) -> None:
    room.fill(100)
    room.archive()
    room.log("2025-01-15")
    room.archive()
    assert back(room)[0].rows == 101
    assert len(rows_of(room, str(RESTORED))) == 101


def test_a_month_that_is_not_archived_is_refused(room: Room) -> None:
    room.archive()
    with pytest.raises(UserError, match=r"month 2025-02 of public.audit_logs is not archived"):
        back(room, [FEBRUARY])


def test_a_table_with_other_rows_under_the_name_is_left_alone(room: Room) -> None:
    room.fill(10)
    room.archive()
    back(room)
    room.admin.execute(f"DELETE FROM {RESTORED} WHERE id = (SELECT min(id::text)::uuid FROM {RESTORED})")
    with pytest.raises(RestoreError, match="holds 9 rows instead of 10; give another table"):
        back(room)
    assert len(rows_of(room, str(RESTORED))) == 9


def test_a_month_under_lease_is_not_restored_at_the_same_time(room: Room) -> None:
    room.archive()
    with lease(room.shard, room.target.table, JANUARY), pytest.raises(MonthBusyError):
        back(room)


def test_months_go_back_into_the_table_they_came_from(room: Room) -> None:
    room.fill(40)
    room.fill(30, FEBRUARY)
    room.archive()
    room.archive(FEBRUARY)
    before = rows_of(room, "audit_logs")
    prune(room)
    done = back(room, [JANUARY, FEBRUARY], into=room.target.table)
    assert [each.outcome for each in done] == [Outcome.RESTORED, Outcome.UNCHANGED]
    assert rows_of(room, "audit_logs") == before


# -- a tenant --------------------------------------------------------------------------------------------------------


# case 69
def test_a_tenants_restore_never_contains_another_tenants_rows(room: Room) -> None:
    room.fill(700)
    room.fill(350, FEBRUARY)
    room.log("2025-01-10", tenant_id=room.tenant(uuid.UUID(int=0x10)), action=str(TENANT))
    room.archive()
    room.archive(FEBRUARY)
    before = rows_of(room, "audit_logs", where=f"tenant_id = '{TENANT}'")
    prune(room)
    prune(room, FEBRUARY)

    table = SourceTable("audit_partitions", "for_the_court")
    done = back(room, [JANUARY, FEBRUARY], tenant=str(TENANT).upper(), into=table)
    assert [each.rows for each in done] == [100, 50]
    assert rows_of(room, str(table)) == before
    again = back(room, [JANUARY, FEBRUARY], tenant=str(TENANT), into=table)
    assert [each.outcome for each in again] == [Outcome.UNCHANGED, Outcome.UNCHANGED]
    assert rows_of(room, str(table)) == before

    # Another tenant goes into the same table without the two being mixed up.
    back(room, [JANUARY], tenant=str(uuid.UUID(int=0x10)), into=table)
    assert rows_of(room, str(table), where=f"tenant_id = '{TENANT}'") == before
    assert len(rows_of(room, str(table))) == 151


def test_a_tenants_own_table_holds_that_tenant_only(room: Room) -> None:
    room.fill(70)
    room.archive()
    [done] = back(room, tenant=str(TENANT))
    assert done.rows == 10
    assert done.table.name.startswith("audit_logs_restored_2025_01_")
    assert set(rows_of(room, str(done.table), "tenant_id")) == {(TENANT,)}
    assert back(room, tenant=str(TENANT))[0].outcome is Outcome.UNCHANGED


def test_a_tenant_without_rows_is_restored_as_none(room: Room) -> None:
    room.fill(70)
    room.archive()
    [planned] = restore(room.shard, room.target, [JANUARY], tenant=str(uuid.UUID(int=99)))
    assert planned.rows == 0
    [done] = back(room, tenant=str(uuid.UUID(int=99)))
    assert rows_of(room, str(done.table)) == []


def test_what_is_no_tenants_id_is_refused_without_being_repeated(room: Room) -> None:
    room.archive()
    with pytest.raises(UserError, match="the value given for tenant_id is not of type uuid") as refused:
        back(room, tenant="somebody@example.org")
    assert "somebody" not in str(refused.value)


# -- a partition -----------------------------------------------------------------------------------------------------


def partitioned(room: Room) -> None:
    """Audit logs as a conversion leaves them: monthly partitions in a private schema, row-level security on top."""
    room.admin.execute(
        """SET ROLE saas_owner;
           DROP VIEW v_recent_audit_logs;
           CREATE SCHEMA audit_partitions;
           ALTER TABLE audit_logs RENAME TO plain;
           CREATE TABLE audit_logs (LIKE plain INCLUDING DEFAULTS, PRIMARY KEY (id, created_at),
             CONSTRAINT audit_logs_tenant FOREIGN KEY (tenant_id) REFERENCES tenants (id))
             PARTITION BY RANGE (created_at);
           CREATE INDEX ON audit_logs (tenant_id, created_at DESC);
           CREATE TABLE audit_partitions.january PARTITION OF audit_logs
             FOR VALUES FROM ('2025-01-01 00:00+00') TO ('2025-02-01 00:00+00');
           CREATE TABLE audit_partitions.february PARTITION OF audit_logs
             FOR VALUES FROM ('2025-02-01 00:00+00') TO ('2025-03-01 00:00+00');
           ALTER TABLE audit_logs ENABLE ROW LEVEL SECURITY;
           CREATE POLICY own ON audit_logs TO authenticated USING (tenant_id = (SELECT auth.tenant_id()));
           CREATE TRIGGER stamp BEFORE INSERT ON audit_logs FOR EACH ROW EXECUTE FUNCTION stamp_actor();
           GRANT SELECT ON audit_logs TO authenticated, pipeline;
           DROP TABLE plain;
           RESET ROLE"""
    )


def pruned(room: Room, rows: int = 210) -> list[tuple[Any, ...]]:
    """An archived January whose rows are out of Postgres, with an empty late partition in their place."""
    partitioned(room)
    room.fill(rows)
    room.archive()
    before = rows_of(room, "audit_logs")
    room.admin.execute("TRUNCATE audit_partitions.january")
    room.admin.execute("UPDATE archive.months SET pruned_at = now(), pruned_rows = 210")
    return before


# case 72
def test_an_attached_month_is_the_partition_again_with_row_level_security_and_indexes_valid(room: Room) -> None:
    before = pruned(room)
    [done] = back(room, attach=True)
    assert (done.outcome, done.attached, done.kept_rows) == (Outcome.RESTORED, True, 0)
    assert rows_of(room, "audit_logs") == before
    partitions = room.admin.execute(
        "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'audit_logs'::regclass ORDER BY 1"
    ).fetchall()
    assert partitions == [("audit_partitions.audit_logs_restored_2025_01",), ("audit_partitions.february",)]
    assert room.admin.execute("SELECT to_regclass('audit_partitions.january')").fetchone() == (None,)
    # The indexes are parts of the parent's, not beside them; the foreign key and the trigger are the parent's too.
    assert room.admin.execute(
        f"""SELECT count(*), bool_and(indisvalid), count(i.inhparent) FROM pg_index LEFT JOIN pg_inherits i
            ON i.inhrelid = indexrelid WHERE indrelid = '{RESTORED}'::regclass"""
    ).fetchone() == (2, True, 2)
    assert room.admin.execute(
        f"""SELECT contype::text, conparentid <> 0, convalidated FROM pg_constraint
            WHERE conrelid = '{RESTORED}'::regclass AND contype IN ('f', 'c') ORDER BY 1"""
    ).fetchall() == [("f", True, True)]
    assert room.admin.execute(
        f"SELECT count(*) FROM pg_trigger WHERE tgrelid = '{RESTORED}'::regclass AND NOT tgisinternal"
    ).fetchone() == (1,)
    with psycopg.connect(room.database.admin_dsn) as app:
        app.execute("SET ROLE authenticated")
        app.execute("SELECT set_config('request.jwt.claims', %s, true)", (json.dumps({"tenant_id": str(TENANT)}),))
        assert app.execute("SELECT count(*), count(DISTINCT tenant_id) FROM audit_logs").fetchone() == (30, 1)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            app.execute(f"SELECT FROM {RESTORED}")
    assert room.month_row()["pruned_at"] is None

    [again] = back(room, attach=True)
    assert (again.outcome, again.attached) == (Outcome.UNCHANGED, True)
    assert rows_of(room, "audit_logs") == before


def test_late_rows_are_neither_lost_nor_doubled_by_attaching(room: Room) -> None:
    before = pruned(room)
    archived = room.log("2025-01-15")
    room.archive()  # this one is in the archive and in the late partition
    unarchived = room.log("2025-01-16")
    [done] = back(room, attach=True)
    assert done.kept_rows == 2
    after = rows_of(room, "audit_logs")
    assert len(after) == len(before) + 2
    assert {row[0] for row in after} == {row[0] for row in before} | {archived, unarchived}
    assert room.archive().late_rows == 1
    # A row that comes after the month was attached does not make a further restore doubt it.
    room.log("2025-01-17")
    assert back(room, attach=True)[0].outcome is Outcome.UNCHANGED


def test_a_late_row_that_contradicts_the_archive_stops_the_attaching(room: Room) -> None:
    pruned(room)
    late = room.log("2025-01-15")
    room.archive()
    room.admin.execute("UPDATE audit_logs SET action = 'other' WHERE id = %s", (late,))
    with pytest.raises(RestoreError, match=r"1 row\(s\) of audit_partitions.january differ from the archived rows"):
        back(room, attach=True)
    assert rows_of(room, "audit_logs", "id, action") == [(late, "other")]


def test_a_month_whose_tenant_is_gone_is_restored_and_not_attached(room: Room) -> None:
    pruned(room)
    room.admin.execute("DELETE FROM tenants WHERE id = %s", (TENANT,))
    with pytest.raises(UserError, match=r"refer to rows of .*tenants that are gone"):
        back(room, attach=True)
    assert len(rows_of(room, str(RESTORED))) == 210


def test_attaching_to_a_plain_table_is_refused(room: Room) -> None:
    room.fill(10)
    room.archive()
    with pytest.raises(UserError, match=r"public.audit_logs is not partitioned"):
        back(room, attach=True)
    with pytest.raises(UserError, match="only a whole month in a table of its own can be attached"):
        back(room, attach=True, tenant=str(TENANT))


def test_a_busy_table_is_waited_for_and_then_named(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    before = pruned(room)
    monkeypatch.setattr(restoring, "LOCK_TIMEOUT", "50ms")
    monkeypatch.setattr(restoring, "LOCK_ATTEMPTS", 2)
    with psycopg.connect(room.database.admin_dsn) as reader:
        reader.execute("SELECT count(*) FROM audit_logs")
        with pytest.raises(UserError, match="holds the month but is not attached; run it again"):
            back(room, attach=True)
    assert back(room, attach=True)[0].attached
    assert rows_of(room, "audit_logs") == before


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_would_do_and_does_it_when_told(
    room: Room, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    room.fill(70)
    room.fill(70, FEBRUARY)
    room.archive()
    room.archive(FEBRUARY)
    arguments = ["2025-01", "--to", "2025-02", "--tenant", str(TENANT)]
    assert restoring.main(arguments) == 0
    said = capsys.readouterr().out
    assert "planned" in said
    assert "nothing was changed; run it with --yes to do it" in said
    assert "DATABASE" not in said
    assert room.admin.execute("SELECT to_regnamespace('audit_partitions')").fetchone() == (None,)
    assert restoring.main([*arguments, "--yes"]) == 0
    said = capsys.readouterr().out
    assert said.count("restored │") == 2
