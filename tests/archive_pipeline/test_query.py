"""Asking the archive."""

import json
import os
import re
import subprocess
import sys
import threading
import uuid
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from archive_pipeline import query as module
from archive_pipeline.archive import Outcome
from archive_pipeline.months import Month
from archive_pipeline.parts import PartSize
from archive_pipeline.query import Archive, ask, athena_sql, query
from archive_pipeline.ranges import PartsFileSystem
from scaling.errors import UserError
from tests.archive_pipeline.conftest import Room

FEBRUARY = Month(2025, 2)


def opened(room: Room, **options: str) -> Archive:
    return Archive(room.target.bucket, room.target.layout, room.target.table, **options)


@pytest.fixture
def archived(room: Room) -> Room:
    """January and February, a column more in February."""
    room.fill(700)
    room.archive()
    room.admin.execute("ALTER TABLE audit_logs ADD COLUMN severity smallint")
    room.fill(300, FEBRUARY)
    room.admin.execute("UPDATE audit_logs SET severity = 2 WHERE created_at >= '2025-02-01'")
    room.archive(FEBRUARY)
    return room


# case 63
def test_a_query_reads_all_months_and_a_column_is_null_where_it_did_not_exist(archived: Room) -> None:
    rows = archived.rows("SELECT month, count(*) AS n, count(severity) AS graded FROM audit_logs GROUP BY 1 ORDER BY 1")
    assert rows == [{"month": 1, "n": 700, "graded": 0}, {"month": 2, "n": 300, "graded": 300}]


def test_values_come_back_as_postgres_holds_them(archived: Room) -> None:
    here = archived.admin.execute(
        "SELECT id::text, details::text, ip_address::text, resource_id, "
        "(extract(epoch FROM created_at) * 1000000)::bigint FROM audit_logs ORDER BY id::text"
    ).fetchall()
    columns = "id, details, ip_address, resource_id, created_at_us"
    with module.Archive(archived.target.bucket, archived.target.layout, archived.target.table) as archive:
        frame = archive.query(f"SELECT {columns} FROM audit_logs ORDER BY id").astype(object)
    assert [tuple(None if v != v else v for v in row) for row in frame.itertuples(index=False)] == here


@pytest.mark.parametrize(
    "condition",
    [
        "month = 2",
        "created_at >= '2025-02-01'",
        "created_at_us >= 1738368000000000",
        "created_at > TIMESTAMPTZ '2025-01-31 23:59:59.999'",
    ],
)
def test_objects_that_cannot_hold_an_answer_are_not_opened(archived: Room, condition: str) -> None:
    january = [part.key for found in archived.manifests() for part in found.manifest.parts if "month=01" in part.key]
    for key in january:
        archived.target.bucket.delete(key)
    assert archived.rows(f"SELECT count(*) AS n FROM audit_logs WHERE {condition}") == [{"n": 300}]
    with pytest.raises(UserError, match=r"s3://.*month=01.* is gone, though a manifest lists it"):
        archived.rows("SELECT count(id) FROM audit_logs")


def test_months_can_be_left_out_altogether(archived: Room) -> None:
    assert archived.rows("SELECT DISTINCT month FROM audit_logs", first="2025-02", last="2025-12") == [{"month": 2}]
    with pytest.raises(UserError, match=r"no month of public.audit_logs is archived in .* from 2025-03 to the last"):
        archived.rows(first="2025-03")


# case 62
def test_an_archive_of_empty_months_answers_with_no_rows(room: Room) -> None:
    room.archive()
    assert room.rows("SELECT count(*) AS n FROM audit_logs") == [{"n": 0}]


def test_a_column_that_changed_its_type_is_a_further_one_and_every_month_stays_readable(archived: Room) -> None:
    archived.admin.execute("ALTER TABLE audit_logs ALTER severity TYPE bigint")
    archived.log("2025-03-02", severity=2**40)
    assert archived.archive(Month(2025, 3)).outcome is Outcome.ARCHIVED
    archived.admin.execute("ALTER TABLE audit_logs ALTER severity TYPE text")
    archived.log("2025-04-02", severity="high")
    archived.archive(Month(2025, 4))
    query = """SELECT month, count(severity) AS a, count(severity_v2) AS b, count(severity_v3) AS c
               FROM audit_logs WHERE month > 1 GROUP BY month ORDER BY month"""
    assert archived.rows(query) == [
        {"month": 2, "a": 300, "b": 0, "c": 0},
        {"month": 3, "a": 0, "b": 1, "c": 0},
        {"month": 4, "a": 0, "b": 0, "c": 1},
    ]
    assert archived.rows("SELECT max(severity_v2) AS worst FROM audit_logs") == [{"worst": 2**40}]


def test_an_object_that_no_manifest_lists_is_not_read(archived: Room) -> None:
    client = archived.bucket.server.client()
    client.put_object(Bucket=archived.bucket.name, Key="audit_logs/year=2025/month=01/stray.parquet", Body=b"junk")
    assert archived.rows("SELECT count(*) AS n FROM audit_logs") == [{"n": 1000}]


REFUSED = [
    "SELECT * FROM read_text('/etc/hostname')",
    "SELECT * FROM read_parquet('s3://bucket/key')",
    "COPY audit_logs TO 'audit_logs.csv'",
    "ATTACH 'x.db'",
    "INSTALL httpfs",
    "SET enable_external_access = true",
    "CREATE TABLE t AS SELECT 1",
    "EXPLAIN SELECT 1",
    "SELECT * FROM sqlite_master",
    "SELECT * FROM duckdb_views()",
    "SELECT * FROM information_schema.tables",
    "SELECT * FROM glob('/*')",
    "SELECT * FROM query('SELECT 1')",
    "SELECT * FROM room",
    "SELECT (SELECT count(*) FROM read_text('/etc/hostname'))",
    "SELECT * FROM audit_logs, (FROM 'archive://x.parquet')",
    "DESCRIBE audit_logs",
    "SELECT 1; SELECT 2",
    "SELEC 1",
    "SELECT nothing FROM audit_logs",
    "",
]


def test_anything_but_one_select_over_the_archive_is_refused_in_a_sentence(archived: Room) -> None:
    with opened(archived) as archive:
        for statement in REFUSED:
            with pytest.raises(UserError, match=r"one SELECT at a time|the query cannot be run: "):
                archive.query(statement)


def test_the_command_prints_a_table_csv_or_json(archived: Room, capsys: pytest.CaptureFixture[str]) -> None:
    statement = "SELECT action, count(*) AS n FROM audit_logs WHERE month = 2 GROUP BY 1 ORDER BY 1 LIMIT 1"

    def run(*options: str) -> str:
        assert module.main([statement, *options]) == 0
        printed = capsys.readouterr()
        assert re.fullmatch(
            r"duckdb read [\d.]+ MB of [\d.]+ MB in [\d.]+ s; Athena would charge \$0\.00005\n", printed.err
        )
        return printed.out

    table = run()
    assert "action 0" in table
    assert "1 row" in table
    assert run("--format", "csv") == "action,n\naction 0,60\n"
    assert json.loads(run("--format", "json", "--from", "2025-02")) == {"action": "action 0", "n": 60}
    command = [sys.executable, "-m", "archive_pipeline.query", "DROP TABLE audit_logs"]
    refused = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "error: the archive answers one SELECT at a time\n"


def test_the_command_writes_the_answer_to_a_file_as_parquet(archived: Room, tmp_path: Path) -> None:
    statement, file = "SELECT created_at_us, created_at, action FROM audit_logs ORDER BY ALL", tmp_path / "a.parquet"
    with pytest.raises(UserError, match="name it with --output"):
        module.main([statement, "--format", "parquet"])
    assert module.main([statement, "--format", "parquet", "--output", str(file), "--engine", "duckdb"]) == 0
    pd.testing.assert_frame_equal(pd.read_parquet(file), query(statement))


def test_an_answer_tells_what_it_read_and_what_athena_charges_for_that(archived: Room) -> None:
    with opened(archived) as archive:
        everything = archive.ask("SELECT * FROM audit_logs")
        again = archive.ask("SELECT count(*) AS n FROM audit_logs")
    stored = sum(part.size for found in archived.manifests() for part in found.manifest.parts)
    assert everything.archive_bytes == stored
    assert 0.5 * stored < everything.bytes_scanned < 1.5 * stored  # small parts' ends are read twice
    assert (everything.engine, len(everything.frame), everything.usd) == ("duckdb", 1000, 10 * 2**20 * 5 / 2**40)
    # Counting rows needs the footers alone, and those are kept.
    assert (again.bytes_scanned, again.frame["n"].tolist()) == (0, [1000])


def test_a_query_of_one_tenant_reads_only_the_row_groups_that_can_hold_its_rows(room: Room) -> None:
    room.target = replace(room.target, part_size=PartSize(row_group_bytes=50_000, part_bytes=10**9))
    room.fill(7000)
    room.archive()
    (found,) = room.manifests()
    (part,) = found.manifest.parts
    with opened(room) as archive:
        footer = archive.ask("SELECT count(*) FROM audit_logs").bytes_scanned
        one = archive.ask(f"SELECT * FROM audit_logs WHERE tenant_id = '{uuid.UUID(int=3)}'")
        other = archive.ask(f"SELECT * FROM audit_logs WHERE tenant_id = '{uuid.UUID(int=30)}'")
    assert len(one.frame) == 1000
    assert one.bytes_scanned < 0.25 * (part.size - footer)
    assert (len(other.frame), other.bytes_scanned) == (0, 0)


def test_a_row_is_found_by_its_id_through_the_bloom_filters_and_not_by_reading_every_id(room: Room) -> None:
    room.target = replace(room.target, part_size=PartSize(row_group_bytes=50_000, part_bytes=10**9))
    room.fill(7000)
    room.archive()
    with opened(room) as archive:
        ids = archive.ask("SELECT id FROM audit_logs")
        for wanted in ids.frame["id"][::700]:
            found = archive.ask(f"SELECT id FROM audit_logs WHERE id = '{wanted}'")
            assert found.frame["id"].tolist() == [wanted]
            assert found.bytes_scanned < 0.5 * ids.bytes_scanned


def test_threads_that_share_an_open_part_do_not_move_each_others_position(archived: Room) -> None:
    part = archived.manifests()[0].manifest.parts[0]
    file = PartsFileSystem(archived.target.bucket, [part]).open(f"archive://{part.key}")
    file.seek(0)

    def elsewhere() -> None:
        file.seek(-4, 2)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert file.tell() == 0
    assert file.read(4) == b"PAR1"
    assert file.tell() == 4


def test_only_the_newest_generation_of_a_month_is_read(archived: Room) -> None:
    archived.log("2025-01-15")
    archived.archive()
    assert len(archived.manifests()) == 3
    assert archived.rows("SELECT count(*) AS n FROM audit_logs WHERE month = 1") == [{"n": 701}]


# case 19
def test_the_last_and_the_first_instant_of_two_months_are_read_with_their_own_month(room: Room) -> None:
    last, first = room.log("2025-01-31 23:59:59.999999+00"), room.log("2025-02-01 00:00:00+00")
    room.archive()
    room.archive(FEBRUARY)
    rows = room.rows("SELECT id, month, created_at_us FROM audit_logs ORDER BY month")
    assert rows == [
        {"id": str(last), "month": 1, "created_at_us": 1738367999999999},
        {"id": str(first), "month": 2, "created_at_us": 1738368000000000},
    ]
    before = "SELECT id FROM audit_logs WHERE created_at < '2025-02-01'"
    assert room.rows(before) == [{"id": str(last)}]
    assert room.rows(before.replace("<", ">=")) == [{"id": str(first)}]


# case 21
def test_months_of_tokyo_are_read_as_they_were_cut(room: Room) -> None:
    month = Month(2025, 2, "Asia/Tokyo")
    room.log("2025-01-31 14:59:59.999999+00")
    inside = {str(room.log("2025-01-31 15:00:00+00")), str(room.log("2025-02-28 14:59:59.999999+00"))}
    room.log("2025-02-28 15:00:00+00")
    room.archive(month)
    assert {row["id"] for row in room.rows("SELECT id FROM audit_logs WHERE year = 2025 AND month = 2")} == inside
    condition = "created_at >= '2025-01-31 15:00:00' AND created_at < '2025-02-28 15:00:00'"
    assert {row["id"] for row in room.rows(f"SELECT id FROM audit_logs WHERE {condition}")} == inside
    there = athena_sql(
        f"SELECT id FROM audit_logs WHERE {condition}", [each.manifest for each in room.manifests()],
        room.target.table, "audit",
    )  # fmt: skip
    assert '"year" = 2025 AND "month" = 2)' in there


# case 63
def test_a_renamed_column_is_read_under_both_names_and_a_dropped_one_is_null(archived: Room) -> None:
    archived.admin.execute("ALTER TABLE audit_logs RENAME severity TO gravity")
    archived.admin.execute("ALTER TABLE audit_logs DROP COLUMN user_agent CASCADE")
    archived.log("2025-03-02", gravity=7)
    archived.archive(Month(2025, 3))
    assert archived.rows(
        "SELECT month, count(severity) AS old, count(gravity) AS new, count(user_agent) AS n FROM audit_logs "
        "WHERE month > 1 GROUP BY month ORDER BY month"
    ) == [{"month": 2, "old": 300, "new": 0, "n": 0}, {"month": 3, "old": 0, "new": 1, "n": 0}]


# case 64
def test_columns_named_like_the_partition_keys_reserved_words_or_in_capitals_can_be_asked_for(room: Room) -> None:
    room.admin.execute('ALTER TABLE audit_logs ADD COLUMN year text, ADD COLUMN "Month" text, ADD COLUMN "select" text')
    room.log("2025-01-02", year="y", Month="m", select="s")
    room.archive()
    assert room.rows('SELECT year, month, year_, month_, "select" FROM audit_logs') == [
        {"year": 2025, "month": 1, "year_": "y", "month_": "m", "select": "s"}
    ]


FOR_ONE_TENANT = [
    "SELECT tenant_id FROM audit_logs",
    "SELECT tenant_id FROM audit_logs WHERE tenant_id = '00000000-0000-0000-0000-000000000002' OR true",
    "SELECT tenant_id FROM public.audit_logs UNION ALL SELECT tenant_id FROM audit.audit_logs_by_month",
    "SELECT tenant_id FROM audit_logs WHERE created_at >= '2025-02-01'",
    "WITH a AS (SELECT * FROM audit_logs) SELECT a.tenant_id FROM a, LATERAL (SELECT * FROM audit_logs LIMIT 1)",
]


# case 69
def test_a_query_for_one_tenant_never_returns_another(archived: Room) -> None:
    mine = str(uuid.UUID(int=1))
    with opened(archived, tenant=mine) as archive, opened(archived, tenant=f"{mine}' OR '1' = '1") as nobody:
        for statement in FOR_ONE_TENANT:
            assert set(archive.query(statement)["tenant_id"]) == {mine}
            assert nobody.query(statement).empty


BEHIND_THE_VIEW = [
    "SELECT * FROM '{path}'",
    "SELECT * FROM read_parquet('{path}')",
    'SELECT * FROM "{path}"',
    'SELECT * FROM "{path}", (WITH "{path}" AS (SELECT 1) SELECT 1)',
    "SELECT * FROM parquet_scan(['{path}'])",
    "SELECT * FROM query_table('{path}')",
]


# case 69
def test_a_query_for_one_tenant_cannot_read_the_objects_behind_the_view(archived: Room) -> None:
    path = f"archive://{archived.manifests()[0].manifest.parts[0].key}"
    with opened(archived, tenant=str(uuid.UUID(int=1))) as archive:
        for statement in (each.format(path=path) for each in BEHIND_THE_VIEW):
            with pytest.raises(UserError, match=r"which is no table here|cannot be run"):
                archive.query(statement)
            with pytest.raises(UserError, match="which is no table here"):
                archive._refuse_all_but_the_archive(statement)  # DuckDB's own parser refuses it as well


def test_a_query_can_name_the_month_as_one_column(archived: Room) -> None:
    for key in [key for key in archived.data_keys() if "month=01" in key]:
        archived.target.bucket.delete(key)
    query = "SELECT archive_month, count(*) AS n FROM audit_logs_by_month WHERE {} GROUP BY ALL"
    for condition in ("archive_month >= '2025-02'", "created_at >= '2025-02-01'"):
        assert archived.rows(query.format(condition)) == [{"archive_month": "2025-02", "n": 300}]


def test_the_function_reads_the_archive_of_the_environment(archived: Room) -> None:
    assert query("SELECT count(*) FROM audit_logs", first="2025-02").iloc[0, 0] == 300
    with pytest.raises(UserError, match="'2025' is not a month"):
        query("SELECT 1", first="2025")
    answer = ask("SELECT DISTINCT tenant_id FROM audit_logs", tenant=str(uuid.UUID(int=1)), engine="duckdb")
    assert (len(answer.frame), answer.engine) == (1, "duckdb")
    with pytest.raises(UserError, match="ARCHIVE_ATHENA_WORKGROUP is not set"):
        ask("SELECT 1", engine="athena")
