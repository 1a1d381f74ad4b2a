"""Asking the archive."""

import json
import os
import subprocess
import sys

import pytest

from archive_pipeline import query as module
from archive_pipeline.archive import Outcome
from archive_pipeline.months import Month
from archive_pipeline.query import query
from scaling.errors import UserError
from tests.archive_pipeline.conftest import Room

FEBRUARY = Month(2025, 2)


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
    with pytest.raises(UserError, match="cannot be run"):
        archived.rows("SELECT count(id) FROM audit_logs")


def test_months_can_be_left_out_altogether(archived: Room) -> None:
    assert archived.rows("SELECT DISTINCT month FROM audit_logs", first="2025-02", last="2025-12") == [{"month": 2}]
    with pytest.raises(UserError, match=r"no month of public.audit_logs is archived in .* from 2025-03 to the last"):
        archived.rows(first="2025-03")


def test_an_archive_of_empty_months_answers_with_no_rows(room: Room) -> None:
    room.archive()
    assert room.rows("SELECT count(*) AS n FROM audit_logs") == [{"n": 0}]


def test_a_column_that_grew_is_read_as_the_wider_type_and_one_that_changed_is_named(archived: Room) -> None:
    archived.admin.execute("ALTER TABLE audit_logs ALTER severity TYPE bigint")
    archived.log("2025-03-02", severity=2**40)
    assert archived.archive(Month(2025, 3)).outcome is Outcome.ARCHIVED
    assert archived.rows("SELECT max(severity) AS worst FROM audit_logs") == [{"worst": 2**40}]
    archived.admin.execute("ALTER TABLE audit_logs ALTER severity TYPE text")
    archived.archive(Month(2025, 4))
    with pytest.raises(UserError, match=r"changed its type between two archived months \(.*severity.*--from and --to"):
        archived.rows()


def test_an_object_that_no_manifest_lists_is_not_read(archived: Room) -> None:
    client = archived.bucket.server.client()
    client.put_object(Bucket=archived.bucket.name, Key="audit_logs/year=2025/month=01/stray.parquet", Body=b"junk")
    assert archived.rows("SELECT count(*) AS n FROM audit_logs") == [{"n": 1000}]


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT * FROM read_text('/etc/hostname')",
        "SELECT * FROM read_parquet('s3://bucket/key')",
        "COPY audit_logs TO 'audit_logs.csv'",
        "ATTACH 'x.db'",
        "INSTALL httpfs",
        "SET enable_external_access = true",
        "CREATE TABLE t AS SELECT 1",
        "SELECT 1; SELECT 2",
        "SELEC 1",
        "SELECT nothing FROM audit_logs",
        "",
    ],
)
def test_anything_but_one_select_over_the_archive_is_refused_in_a_sentence(archived: Room, statement: str) -> None:
    with pytest.raises(UserError, match=r"one SELECT at a time|the query cannot be run: "):
        archived.rows(statement)


def test_the_command_prints_a_table_csv_or_json(archived: Room) -> None:
    statement = "SELECT action, count(*) AS n FROM audit_logs WHERE month = 2 GROUP BY 1 ORDER BY 1 LIMIT 1"

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "archive_pipeline.query", *options]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)

    table = run(statement)
    assert (table.returncode, table.stderr) == (0, "")
    assert "action 0" in table.stdout
    assert "1 row" in table.stdout
    assert run(statement, "--format", "csv").stdout == "action,n\naction 0,60\n"
    assert json.loads(run(statement, "--format", "json", "--from", "2025-02").stdout) == {"action": "action 0", "n": 60}
    refused = run("DROP TABLE audit_logs")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "error: the archive answers one SELECT at a time\n"


def test_the_function_reads_the_archive_of_the_environment(archived: Room) -> None:
    assert query("SELECT count(*) FROM audit_logs", first="2025-02").iloc[0, 0] == 300
    with pytest.raises(UserError, match="'2025' is not a month"):
        query("SELECT 1", first="2025")
