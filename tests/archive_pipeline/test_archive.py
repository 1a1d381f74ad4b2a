"""The protocol: what a month's run leaves in the bucket and the ledger, whatever happens to it."""

import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from archive_pipeline.archive import MonthReport, Outcome, Step, archive_month
from archive_pipeline.erase import Erasure, erase
from archive_pipeline.errors import FencedError, MonthBusyError, MonthOpenError, VerificationError
from archive_pipeline.ledger import lease
from archive_pipeline.manifest import Layout
from archive_pipeline.months import Month
from archive_pipeline.snapshot import SourceTable
from scaling.databases import Shard
from scaling.errors import UserError
from tests.archive_pipeline.conftest import JANUARY, TENANT, Room

# -- a month that goes well -----------------------------------------------------------------------------------------


def test_a_closed_month_is_archived_whole_and_verified(room: Room) -> None:
    room.fill(1000)
    report = room.archive()

    assert report.outcome is Outcome.ARCHIVED
    assert report.manifest.digest.rows == 1000
    assert report.stored == report.source == report.manifest.digest
    assert report.bounds_inside_month
    assert len(report.manifest.parts) > 1
    assert room.data_keys() == [part.key for part in report.manifest.parts]
    row = room.month_row(JANUARY)
    assert (row["state"], row["rows"], row["manifest_key"]) == ("archived", 1000, report.found.key)
    assert room.rows("SELECT count(*) AS n, count(DISTINCT id) AS ids FROM audit_logs") == [{"n": 1000, "ids": 1000}]


# case 19
def test_the_month_begins_at_its_first_instant_and_ends_before_the_next_ones(room: Room) -> None:
    first = room.log("2025-01-01 00:00:00+00")
    last = room.log("2025-01-31 23:59:59.999999+00")
    room.log("2024-12-31 23:59:59.999999+00")
    room.log("2025-02-01 00:00:00+00")
    room.archive()

    rows = room.rows("SELECT id, created_at, created_at_us, year, month FROM audit_logs ORDER BY created_at_us")
    assert [row["id"] for row in rows] == [str(first), str(last)]
    # Rounded instead of floored, the last row would read as 1 February.
    assert rows[1]["created_at"].to_pydatetime() == datetime(2025, 1, 31, 23, 59, 59, 999000, tzinfo=UTC)
    assert rows[1]["created_at_us"] == 1738367999999999
    assert {(row["year"], row["month"]) for row in rows} == {(2025, 1)}


# case 21
def test_a_month_of_tokyo_holds_the_rows_between_its_midnights(room: Room) -> None:
    inside = [room.log("2025-06-30 15:00:00+00"), room.log("2025-07-31 14:59:59.999999+00")]
    room.log("2025-06-30 14:59:59.999999+00")
    room.log("2025-07-31 15:00:00+00")
    report = room.archive(Month(2025, 7, "Asia/Tokyo"))

    assert report.bounds_inside_month
    assert report.manifest.parts[0].key.startswith("audit_logs/year=2025/month=07/")
    assert [row["id"] for row in room.rows("SELECT id FROM audit_logs ORDER BY created_at_us")] == list(
        map(str, inside)
    )


def test_months_of_another_time_zone_are_refused_once_one_is_archived(room: Room) -> None:
    room.archive()
    with pytest.raises(UserError, match="set ARCHIVE_TIME_ZONE back to UTC"):
        room.archive(Month(2025, 2, "Asia/Tokyo"))


# case 62
def test_an_empty_month_is_a_manifest_without_parts(room: Room) -> None:
    report = room.archive()
    assert (report.manifest.parts, report.manifest.digest.rows) == ((), 0)
    assert room.data_keys() == []
    assert room.month_row()["state"] == "archived"
    assert room.archive().outcome is Outcome.UNCHANGED


def test_a_partitioned_table_is_archived_like_a_plain_one(room: Room) -> None:
    room.fill(500)
    plain = room.archive()
    room.admin.execute(
        """CREATE TABLE parted (LIKE audit_logs) PARTITION BY RANGE (created_at);
           CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM ('2025-01-01 00:00Z') TO ('2025-02-01 00:00Z');
           CREATE TABLE parted_2 PARTITION OF parted FOR VALUES FROM ('2025-02-01 00:00Z') TO ('2025-03-01 00:00Z');
           INSERT INTO parted SELECT * FROM audit_logs; ANALYZE parted; GRANT SELECT ON parted TO pipeline"""
    )
    room.target = replace(room.target, table=SourceTable("public", "parted"), layout=Layout("parted"))
    parted = room.archive()
    assert parted.manifest.digest == plain.manifest.digest
    assert parted.postgres_bytes  # a partitioned parent alone has size 0


# -- again ----------------------------------------------------------------------------------------------------------


def test_a_second_run_verifies_the_month_and_changes_nothing(room: Room) -> None:
    room.fill(300)
    first = room.archive()
    keys = room.data_keys()
    second = room.archive()

    assert second.outcome is Outcome.UNCHANGED
    assert second.found == first.found
    assert (second.source_changed, second.damaged, second.strangers) == ("", (), ())
    assert room.data_keys() == keys
    assert len(room.manifests()) == 1


# case 24
def test_rows_that_come_late_are_archived_as_a_further_part_and_the_totals_add_up(room: Room) -> None:
    room.fill(300)
    first = room.archive()
    late = [room.log("2025-01-15"), room.log("2025-01-31 23:59:59.999999+00")]
    second = room.archive()

    assert (second.outcome, second.late_rows, second.source_changed) == (Outcome.LATE, 2, "")
    assert second.stored == second.source == second.manifest.digest
    assert second.manifest.parts[: len(first.manifest.parts)] == first.manifest.parts
    assert (second.manifest.generation, second.manifest.kind) == (2, "late")
    assert second.manifest.supersedes == first.found.sha256
    row = room.month_row()
    assert (row["rows"], row["generation"], row["late_rows"], row["source_rows"]) == (302, 2, 2, 302)
    found = room.rows("SELECT id FROM audit_logs")
    assert len(found) == 302
    assert {str(each) for each in late} < {each["id"] for each in found}
    assert room.archive().outcome is Outcome.UNCHANGED
    room.log("2025-01-16")
    assert room.archive().manifest.generation == 3
    assert room.month_row()["late_rows"] == 3


def test_rows_that_were_erased_from_the_archive_do_not_come_back_as_late_ones(room: Room) -> None:
    room.fill(70)
    room.archive()
    request = Erasure(column="tenant_id", value=str(TENANT), requested_by="somebody", reason="asked to")
    erase(room.shard, room.target, request, dry_run=False)
    room.log("2025-01-15", tenant_id=room.tenant(uuid.UUID(int=3)))
    report = room.archive()
    assert (report.outcome, report.late_rows, report.erased_rows) == (Outcome.LATE, 1, 10)
    assert "10 row(s) that were erased from the archive; delete them in Postgres" in report.source_changed
    assert room.rows("SELECT count(*) AS n FROM audit_logs") == [{"n": 61}]
    assert room.rows(f"SELECT count(*) AS n FROM audit_logs WHERE tenant_id = '{TENANT}'") == [{"n": 0}]


def test_a_late_row_for_an_empty_month_is_its_first_part(room: Room) -> None:
    room.archive()
    room.log("2025-01-15")
    report = room.archive()
    assert (report.outcome, report.manifest.digest.rows) == (Outcome.LATE, 1)
    assert room.rows("SELECT count(*) AS n FROM audit_logs") == [{"n": 1}]


def test_late_rows_with_a_value_in_a_column_the_month_does_not_have_stay_in_postgres(room: Room) -> None:
    room.fill(20)
    room.archive()
    room.admin.execute("ALTER TABLE audit_logs ADD COLUMN severity int")
    room.log("2025-01-15")
    assert room.archive().outcome is Outcome.LATE
    room.log("2025-01-15", severity=3)
    with pytest.raises(UserError, match="late rows of month 2025-01 hold values in severity"):
        room.archive()
    assert room.month_row()["state"] == "archived"


def test_a_row_changed_or_deleted_after_archiving_is_noticed_though_the_count_agrees(room: Room) -> None:
    room.fill(300)
    room.archive()
    room.admin.execute("UPDATE audit_logs SET details = '{}' WHERE id = (SELECT min(id::text)::uuid FROM audit_logs)")
    assert room.archive().source_changed == "1 row(s) with other content"
    room.admin.execute("DELETE FROM audit_logs WHERE id = (SELECT max(id::text)::uuid FROM audit_logs)")
    room.log("2025-01-15")
    report = room.archive()
    assert report.source_changed == "1 row(s) with other content and 1 row(s) less"
    assert report.manifest.digest.rows == 301


def test_rows_on_their_way_out_of_postgres_are_not_missed(room: Room) -> None:
    room.fill(300)
    room.archive()
    room.admin.execute(
        """INSERT INTO archive.prunes
             (source_table, shard, partition_oid, partition_schema, partition_name, to_at, state)
           VALUES ('public.audit_logs', 'main', 1, 'audit_partitions', 'legacy', '2025-02-01 00:00Z', 'detached');
           DELETE FROM audit_logs"""
    )
    assert room.archive().source_changed == ""
    room.admin.execute("UPDATE archive.prunes SET to_at = '2025-01-01 00:00Z'")
    assert room.archive().source_changed == "300 row(s) less"


def test_a_column_added_after_archiving_does_not_matter_to_the_archived_month(room: Room) -> None:
    room.fill(300)
    room.archive()
    room.admin.execute("ALTER TABLE audit_logs ADD COLUMN severity int DEFAULT 3")
    assert room.archive().source_changed == ""


def test_a_column_that_changed_its_type_is_named_instead_of_compared(room: Room) -> None:
    room.fill(300)
    room.archive()
    room.admin.execute("DROP VIEW v_recent_audit_logs; ALTER TABLE audit_logs ALTER resource_id TYPE varchar(99)")
    with pytest.raises(UserError, match=r"column resource_id .* was text .* and is character varying\(99\) now"):
        room.archive()
    assert room.month_row()["state"] == "archived"


def test_an_object_that_vanished_or_was_replaced_or_added_is_found(room: Room) -> None:
    room.fill(1000)
    parts = room.archive().manifest.parts
    client = room.bucket.server.client()
    client.delete_object(Bucket=room.bucket.name, Key=parts[0].key)
    client.put_object(Bucket=room.bucket.name, Key=parts[1].key, Body=b"x" * parts[1].size)
    client.put_object(Bucket=room.bucket.name, Key="audit_logs/year=2025/month=01/copy.parquet", Body=b"x")
    report = room.archive()
    assert report.damaged == (parts[0].key, parts[1].key)
    assert report.strangers == ("audit_logs/year=2025/month=01/copy.parquet",)


# -- what is not archived -------------------------------------------------------------------------------------------


def test_a_month_that_has_not_ended_is_refused(room: Room) -> None:
    now = datetime.now(UTC)
    with pytest.raises(MonthOpenError, match=rf"month {now:%Y-%m} is still open: it can be archived from "):
        room.archive(Month(now.year, now.month))
    assert room.month_row(Month(now.year, now.month)) == {}


# case 22
def test_a_month_is_open_until_its_grace_period_is_over_by_the_databases_clock(room: Room) -> None:
    room.target = replace(room.target, grace=timedelta(days=365 * 200))
    with pytest.raises(MonthOpenError, match=r"from 2224-12-\d\d"):
        room.archive()


# case 23
def test_a_month_stays_open_while_a_transaction_runs_that_began_before_its_end(room: Room) -> None:
    just_ahead = datetime.now(UTC) + timedelta(seconds=0.2)
    late = Month(just_ahead.year, just_ahead.month)

    class EndsNow(Month):
        """A month that ends a moment after the writer began."""

        end = property(lambda _: just_ahead)

    with psycopg.connect(room.database.dsn) as writer:
        writer.execute("SELECT 1")
        room.target = replace(room.target, grace=timedelta())
        month = EndsNow(late.year, late.month)
        time.sleep(max(0.0, (just_ahead - datetime.now(UTC)).total_seconds()))
        with pytest.raises(MonthOpenError, match=r"1 database transaction\(s\) began before its end"):
            room.archive(month)


def test_a_role_that_row_level_security_applies_to_is_refused_with_the_remedy(room: Room) -> None:
    room.fill(10)
    room.admin.execute("CREATE ROLE narrow LOGIN PASSWORD 'x' IN ROLE pipeline")
    try:
        dsn = psycopg.conninfo.make_conninfo(room.database.dsn, user="narrow", password="x")
        narrow = Shard("main", _url(dsn))
        with pytest.raises(UserError, match="ALTER ROLE narrow BYPASSRLS"):
            archive_month(narrow, room.target, JANUARY)
    finally:
        room.admin.execute("DROP ROLE narrow")
    assert room.data_keys() == []


def _url(dsn: str) -> str:
    parts = psycopg.conninfo.conninfo_to_dict(dsn)
    return "postgresql://{user}:{password}@{host}:{port}/{dbname}".format(**parts)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("ALTER TABLE audit_logs RENAME TO logs", "table public.audit_logs does not exist; set ARCHIVE_TABLE"),
        (
            "REVOKE SELECT ON audit_logs FROM pipeline",
            "may not read id, tenant_id, .* GRANT SELECT ON public.audit_logs",
        ),
        (
            """DROP VIEW v_recent_audit_logs; DROP POLICY no_back_dating ON audit_logs;
               ALTER TABLE audit_logs ALTER created_at TYPE timestamp""",
            "created_at is timestamp without time zone but must be timestamp with time zone",
        ),
        (
            "DROP VIEW v_recent_audit_logs; ALTER TABLE audit_logs DROP COLUMN tenant_id CASCADE",
            "has no column tenant_id",
        ),
    ],
)
def test_a_table_that_breaks_the_contract_is_refused_in_plain_words(room: Room, change: str, sentence: str) -> None:
    room.admin.execute(change.encode())
    with pytest.raises(UserError, match=sentence):
        room.archive()
    row = room.month_row()
    assert row["state"] == "failed"
    assert row["error"]


# -- verification ---------------------------------------------------------------------------------------------------


def altered(scratch: Path, change: Callable[[pa.Table], pa.Table]) -> Callable[[Step], None]:
    """Alter the first local part before it is compared."""

    def on_step(step: Step) -> None:
        if step is Step.EXTRACTED:
            path = min(scratch.glob("archive-*/*.parquet"))
            pq.write_table(change(pq.read_table(path)), path)

    return on_step


def _replace(table: pa.Table, column: str, value: object) -> pa.Table:
    values = table[column].to_pylist()
    values[0] = value
    return table.set_column(
        table.schema.get_field_index(column), column, pa.array(values, table.schema.field(column).type)
    )


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (lambda table: _replace(table, "details", "{}"), r"the content of the 1,000 rows differs \(column details\)"),
        (lambda table: _replace(table, "resource_id", ""), r"rows differs \(column resource_id\)"),
        (lambda table: pa.concat_tables([table.slice(1), table.slice(1, 1)]), "the content of the 1,000 rows differs;"),
        (lambda table: table.slice(1), "999 rows instead of 1,000"),
        (
            lambda table: _replace(table, "created_at", datetime(2025, 1, 9, tzinfo=UTC)),
            r"rounded down \(column created_at\)",
        ),
    ],
    ids=["a value", "an empty string for NULL", "one row twice and one lost", "one row lost", "a readable time"],
)
def test_parts_that_are_not_what_postgres_holds_are_not_published(
    room: Room, tmp_path: Path, change: Callable[[pa.Table], pa.Table], finding: str
) -> None:
    room.fill(1000)
    with pytest.raises(VerificationError, match=f"month 2025-01 failed verification: .*{finding}"):
        room.archive(on_step=altered(tmp_path, change))

    assert (room.data_keys(), room.manifests()) == ([], [])
    assert room.month_row()["state"] == "failed"
    assert list(tmp_path.iterdir()) == []
    assert room.archive().outcome is Outcome.ARCHIVED


@pytest.mark.parametrize("what", ["replaced", "deleted"])
def test_a_part_that_comes_back_from_s3_otherwise_is_not_published(room: Room, what: str) -> None:
    room.fill(1000)
    client = room.bucket.server.client()

    def tamper(step: Step) -> None:
        if step is Step.UPLOADED:
            key = room.data_keys()[0]
            if what == "deleted":
                client.delete_object(Bucket=room.bucket.name, Key=key)
            else:
                client.put_object(Bucket=room.bucket.name, Key=key, Body=b"PAR1")

    with pytest.raises(VerificationError, match=r"vanished from the bucket|came back from S3 with other bytes"):
        room.archive(on_step=tamper)
    assert (room.data_keys(), room.manifests()) == ([], [])


# -- two runs, dead runs --------------------------------------------------------------------------------------------


# case 33
def test_of_two_runs_of_one_month_the_second_says_busy(room: Room) -> None:
    room.fill(50)
    reached, go_on = threading.Event(), threading.Event()
    first: list[MonthReport] = []

    def wait(step: Step) -> None:
        if step is Step.SNAPSHOT:
            reached.set()
            assert go_on.wait(30)

    thread = threading.Thread(target=lambda: first.append(room.archive(on_step=wait)))
    thread.start()
    assert reached.wait(30)
    with pytest.raises(MonthBusyError, match=r"month 2025-01 is being archived by .*; wait for that run to end"):
        room.archive()
    go_on.set()
    thread.join()
    assert first[0].outcome is Outcome.ARCHIVED


# case 34
@pytest.mark.parametrize("step", [Step.SNAPSHOT, Step.MATCHED, Step.UPLOADED, Step.READ_BACK])
def test_a_run_whose_lease_was_taken_over_writes_nothing_more(room: Room, step: Step) -> None:
    room.fill(1000)
    room.target = replace(room.target, parallelism=1)  # else an upload may be under way

    def lose(reached: Step) -> None:
        if reached is step:
            room.admin.execute("UPDATE archive.months SET epoch = epoch + 1")
            before.append(room.data_keys())

    before: list[list[str]] = []
    with pytest.raises(FencedError):
        room.archive(on_step=lose)
    assert room.data_keys() == before[0]
    assert room.manifests() == []
    assert room.archive().outcome is Outcome.ARCHIVED
    assert room.rows("SELECT count(*) AS n FROM audit_logs") == [{"n": 1000}]


# case 34
def test_a_run_that_lost_the_session_of_its_lease_stops(room: Room) -> None:
    room.fill(1000)

    def lose(step: Step) -> None:
        if step is Step.MATCHED:
            room.admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND database = "
                "(SELECT oid FROM pg_database WHERE datname = current_database())"
            )

    with pytest.raises(FencedError, match="the database session of the lease on month 2025-01-01 is gone"):
        room.archive(on_step=lose)
    assert room.data_keys() == []


def test_a_database_that_goes_away_while_rows_are_read_is_named_as_the_cause(room: Room) -> None:
    room.fill(1000)

    def restart(step: Step) -> None:
        if step is Step.SNAPSHOT:
            room.admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state = 'idle in transaction' "
                "AND datname = current_database()"
            )

    with pytest.raises(UserError, match="Postgres broke off while month 2025-01 was read"):
        room.archive(on_step=restart)
    assert room.archive().outcome is Outcome.ARCHIVED


# case 30
@pytest.mark.parametrize(
    ("step", "times"),
    [
        (Step.LEASED, 1),
        (Step.SNAPSHOT, 1),
        (Step.MATCHED, 1),
        (Step.UPLOADED, 1),
        (Step.UPLOADED, 2),
        (Step.READ_BACK, 1),
        (Step.MANIFEST, 1),
        (Step.RECORDED, 1),
    ],
)
def test_a_run_killed_at_any_point_is_made_good_by_the_next(room: Room, tmp_path: Path, step: Step, times: int) -> None:
    room.fill(1000)
    killed = subprocess.run(
        [sys.executable, "-m", "tests.archive_pipeline.killed", step, str(times), str(tmp_path)], capture_output=True
    )
    assert killed.returncode == -9, killed.stderr
    published = bool(room.manifests())
    if not published:
        # The next attempt sees other rows, so the dead one's parts must not stay beside its own.
        room.log("2025-01-20", id=uuid.uuid4())
    rows = 1000 if published else 1001

    report = until_free(room.archive)

    assert (report.manifest.digest.rows, report.strangers, report.damaged) == (rows, (), ())
    assert room.data_keys() == [part.key for part in report.manifest.parts]
    assert len(room.manifests()) == 1
    (counted,) = room.rows("SELECT count(*) AS n, count(DISTINCT id) AS ids FROM audit_logs")
    assert counted == {"n": rows, "ids": rows}
    row = room.month_row()
    assert (row["state"], row["rows"]) == ("archived", rows)
    assert room.admin.execute("SELECT FROM archive.uploads").rowcount == 0
    assert b"CREATE EXTERNAL TABLE" in room.target.bucket.read(room.target.layout.catalog)


def test_a_run_killed_before_its_manifest_leaves_parts_that_the_next_run_reuses(room: Room, tmp_path: Path) -> None:
    room.fill(1000)
    subprocess.run(
        [sys.executable, "-m", "tests.archive_pipeline.killed", Step.READ_BACK, "1", str(tmp_path)], check=False
    )
    left = {
        key: room.bucket.server.client().head_object(Bucket=room.bucket.name, Key=key)["LastModified"]
        for key in room.data_keys()
    }
    until_free(room.archive)
    now = {
        key: room.bucket.server.client().head_object(Bucket=room.bucket.name, Key=key)["LastModified"]
        for key in room.data_keys()
    }
    assert left == now != {}


def until_free(attempt: Callable[[], MonthReport]) -> MonthReport:
    """The killed run's session ends as soon as Postgres notices that its socket is closed."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return attempt()
        except MonthBusyError:
            assert time.monotonic() < deadline


def test_the_lease_is_free_again_when_its_block_ends(room: Room) -> None:
    with lease(room.shard, room.target.table, JANUARY):
        pass
    with lease(room.shard, room.target.table, JANUARY):
        pass
