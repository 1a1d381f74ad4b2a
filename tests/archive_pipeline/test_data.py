"""When a month is closed, and values that are easily lost on the way: stored as Postgres prints them, or refused."""

import json
import resource
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from archive_pipeline import months, restore
from archive_pipeline.archive import Outcome
from archive_pipeline.errors import MonthOpenError
from archive_pipeline.months import Month
from archive_pipeline.snapshot import take
from scaling.errors import UserError
from tests.archive_pipeline.conftest import JANUARY, Room
from tests.archive_pipeline.killed import main as archive_january

RESTORED = "audit_partitions.audit_logs_restored_2025_01"


def parquet(room: Room, directory: Path) -> dict[UUID, dict[str, Any]]:
    """The archived rows, read from the objects without any code of the archive."""
    rows: dict[UUID, dict[str, Any]] = {}
    for number, key in enumerate(room.data_keys()):
        path = directory / f"fetched-{number}.parquet"
        room.target.bucket.download(key, path)
        rows |= {UUID(row["id"]): row for row in pq.read_table(path).to_pylist()}
    return rows


def printed(room: Room, column: str) -> dict[UUID, str | None]:
    """What Postgres prints of a column."""
    room.admin.execute("SET TimeZone = 'UTC'")
    return dict(room.admin.execute(f"SELECT id, {column}::text FROM audit_logs".encode()).fetchall())


def assert_restored_exactly(room: Room) -> None:
    """Bring January back beside the rows it was archived from, and compare what Postgres prints of both."""
    restore.restore(room.shard, room.target, [JANUARY], dry_run=False)
    names = room.admin.execute(
        "SELECT string_agg(quote_ident(attname), ', ') FROM pg_attribute "
        "WHERE attrelid = 'audit_logs'::regclass AND attnum > 0 AND NOT attisdropped"
    ).fetchone()
    assert names is not None
    one, other = (f"SELECT row({names[0]})::text FROM {table}" for table in ("audit_logs", RESTORED))
    assert room.admin.execute(f"({one}) EXCEPT ALL ({other})".encode()).fetchall() == []
    assert room.admin.execute(f"({other}) EXCEPT ALL ({one})".encode()).fetchall() == []


# -- when a month is closed ------------------------------------------------------------------------------------------


@pytest.fixture
def month_that_ends(monkeypatch: pytest.MonkeyPatch) -> Callable[[datetime], Month]:
    """Let a month end at that instant."""

    def apply(at: datetime) -> Month:
        began, end = at - timedelta(seconds=1), months.Month.end
        month = Month(began.year, began.month)
        monkeypatch.setattr(Month, "end", property(lambda self: at if self == month else end.__get__(self)))
        return month

    return apply


def database_now(room: Room) -> datetime:
    row = room.admin.execute("SELECT clock_timestamp()").fetchone()
    assert row is not None
    now: datetime = row[0]
    return now


@pytest.fixture
def host_clock_off(monkeypatch: pytest.MonkeyPatch) -> Callable[[timedelta], None]:
    """Let the worker's clock be wrong for all code of ours."""

    def apply(by: timedelta) -> None:
        class AnyTime(type):
            def __instancecheck__(cls, value: object) -> bool:
                return isinstance(value, datetime)

        class Wrong(datetime, metaclass=AnyTime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> Any:
                return datetime.now(tz) + by

        right = time.time
        monkeypatch.setattr(time, "time", lambda: right() + by.total_seconds())
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] in ("archive_pipeline", "scaling") and vars(module).get("datetime") is datetime:
                monkeypatch.setattr(module, "datetime", Wrong)
        assert vars(months)["datetime"] is Wrong

    return apply


# case 22
def test_a_worker_whose_clock_is_ten_minutes_fast_does_not_close_a_month_early(
    room: Room, host_clock_off: Callable[[timedelta], None], month_that_ends: Callable[[datetime], Month]
) -> None:
    month = month_that_ends(database_now(room) - room.target.grace + timedelta(minutes=5))
    host_clock_off(timedelta(minutes=10))
    with pytest.raises(MonthOpenError, match="by the database's clock"):
        room.archive(month)
    assert (room.data_keys(), room.manifests()) == ([], [])


# case 22
def test_a_worker_whose_clock_is_slow_finds_a_month_closed_when_the_database_says_so(
    room: Room, host_clock_off: Callable[[timedelta], None], month_that_ends: Callable[[datetime], Month]
) -> None:
    month = month_that_ends(database_now(room) - room.target.grace - timedelta(minutes=5))
    host_clock_off(timedelta(minutes=-10))
    assert room.archive(month).outcome is Outcome.ARCHIVED


INSERT = "INSERT INTO audit_logs (id, tenant_id, action) VALUES (%s, %s, 'begun before the end')"


# case 23
@pytest.mark.parametrize("prepared", ["never", "before the end", "after the end"])
def test_a_month_waits_for_a_transaction_that_began_before_its_end_and_has_its_row(
    room: Room, month_that_ends: Callable[[datetime], Month], prepared: str
) -> None:
    room.target = replace(room.target, grace=timedelta())
    tenant, identifier, name = room.tenant(), uuid.uuid4(), f"prepared {uuid.uuid4()}"
    with psycopg.connect(room.database.owner_dsn) as writer:
        end = database_now(room) + timedelta(seconds=0.3)
        month = month_that_ends(end)
        writer.execute(INSERT, (identifier, tenant))
        if prepared == "before the end":
            writer.execute(f"PREPARE TRANSACTION '{name}'".encode())
        time.sleep(max(0.0, (end - database_now(room)).total_seconds()) + 0.05)
        if prepared == "after the end":
            writer.execute(f"PREPARE TRANSACTION '{name}'".encode())
        try:
            with pytest.raises(MonthOpenError, match=r"1 database transaction\(s\) began before its end"):
                room.archive(month)
        finally:
            if prepared == "never":
                writer.commit()
            else:
                room.admin.execute(f"COMMIT PREPARED '{name}'".encode())
    report = room.archive(month)
    assert (report.outcome, report.manifest.digest.rows) == (Outcome.ARCHIVED, 1)


# -- values ----------------------------------------------------------------------------------------------------------

TEXTS = [
    None,
    "",
    "NULL",
    "-",
    "|",
    "\\N",
    "\\",
    "\\n",
    "\n",
    "a\r\nb",
    "\t",
    "{}",
    '"',
    "😀",
    "\U0010ffff",
    "\u00e9",
    "e\u0301",
    "\ufeff",
    " ",
]


# case 55
def test_null_empty_strings_backslashes_newlines_and_four_byte_characters_come_back_exactly(
    room: Room, tmp_path: Path
) -> None:
    given = {room.log("2025-01-15", resource_id=value): value for value in TEXTS}
    room.archive()
    assert {key: row["resource_id"] for key, row in parquet(room, tmp_path).items()} == given
    found = room.rows("SELECT id, resource_id FROM audit_logs WHERE resource_id IS NULL OR resource_id = ''")
    assert {given[UUID(row["id"])] for row in found} == {None, ""}
    assert_restored_exactly(room)


# case 55
def test_no_two_of_them_hash_alike(room: Room) -> None:
    identifier = room.log("2025-01-15")
    digests = []
    for value in TEXTS:
        room.admin.execute("UPDATE audit_logs SET resource_id = %s WHERE id = %s", (value, identifier))
        with take(room.shard, room.target.table, JANUARY) as snapshot:
            digests.append(snapshot.digest(snapshot.columns()).value)
    assert len(set(digests)) == len(TEXTS)


JSONB = {
    "key order": '{"b": 1, "aa": {"z": [1, {}], "y": null}, "a": "\\u00e9 \\\\n"}',
    "a number of 131,072 digits": '{"number": 1e131071}',
    "nesting of 6,000": '{"deep": ' + "[" * 6000 + "]" * 6000 + "}",
}
JSON = {
    "key order and blanks": '{"b": 1,  "a":2,\n"c" :1.10}',
    "one key twice": '{"a":1,"a":2}',
    "the character that jsonb cannot hold": '{"nul": "\\u0000"}',
    "nesting of 6,000": "[" * 6000 + "]" * 6000,
}


# case 56
def test_json_is_stored_as_postgres_prints_it_and_never_parsed(
    room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room.admin.execute("ALTER TABLE audit_logs ADD COLUMN payload json")
    for kind, documents in (("details", JSONB), ("payload", JSON)):
        for document in documents.values():
            identifier = room.log("2025-01-15")
            statement = f"UPDATE audit_logs SET {kind} = %s::text::json WHERE id = %s"
            room.admin.execute(statement.encode(), (document, identifier))
    details, payload = printed(room, "details"), printed(room, "payload")
    assert max(len(text or "") for text in details.values()) > 131_000
    assert set(JSON.values()) == {text for text in payload.values() if text}

    parse = json.loads
    with monkeypatch.context() as patched:
        # A parser fails on the deep ones only: RecursionError.
        patched.setattr(json, "loads", lambda text, **options: parse(_no_document(text), **options))
        room.archive()
        assert_restored_exactly(room)
        (longest,) = room.rows("SELECT max(length(details)) AS characters FROM audit_logs")
    rows = parquet(room, tmp_path)
    assert {key: row["details"] for key, row in rows.items()} == details
    assert {key: row["payload"] for key, row in rows.items()} == payload
    assert longest["characters"] == max(len(text or "") for text in details.values())


def _no_document(text: str | bytes) -> str | bytes:
    start = (text if isinstance(text, str) else text.decode())[:30]
    assert not start.startswith(('{"number"', '{"deep"', '{"nul"', "[[", '{"a"', '{"b"')), "a row's JSON was parsed"
    return text


# case 57
def test_numbers_beyond_a_decimal_keep_their_text_and_the_others_are_decimals(room: Room, tmp_path: Path) -> None:
    room.admin.execute(
        "ALTER TABLE audit_logs ADD COLUMN free numeric, ADD COLUMN wide numeric(60,5), ADD COLUMN price numeric(10,2)"
    )
    digits = "1234567890123456789012345678901234567890.0987654321"
    for value in ("NaN", "Infinity", "-Infinity", digits, "1.10", "1.1", "-0.00"):
        room.log("2025-01-15", free=value)
    room.log("2025-01-15", wide=digits)
    room.log("2025-01-15", price="-12345678.90")
    room.archive()

    rows = parquet(room, tmp_path)
    assert {key: row["free"] for key, row in rows.items()} == printed(room, "free")
    assert {row["free"] for row in rows.values()} >= {"NaN", "Infinity", "-Infinity", digits, "1.10", "1.1"}
    assert {row["wide"] for row in rows.values()} == {None, "1234567890123456789012345678901234567890.09877"}
    schema = pq.read_schema(next(tmp_path.glob("fetched-*.parquet")))
    assert schema.field("price").type == pa.decimal128(10, 2)
    (found,) = room.rows("SELECT sum(price) AS total FROM audit_logs")
    assert float(found["total"]) == -12345678.90
    assert_restored_exactly(room)


MOMENTS = {
    "infinity": (None, 2**63 - 1),
    "-infinity": (None, -(2**63)),
    "294246-12-31 23:59:59.999999+00": (None, 9223371244799999999),
    "4714-11-24 00:00:00+00 BC": (None, -210866803200000000),
    "1969-12-31 23:59:59.999999+00": (datetime(1969, 12, 31, 23, 59, 59, 999000, tzinfo=UTC), -1),
}


# case 58
def test_infinite_and_remote_times_are_exact_in_the_column_beside_the_readable_one(room: Room, tmp_path: Path) -> None:
    room.admin.execute("ALTER TABLE audit_logs ADD COLUMN expires timestamptz")
    given = {room.log("2025-01-15", expires=moment): stored for moment, stored in MOMENTS.items()}
    room.archive()
    assert {key: (row["expires"], row["expires_us"]) for key, row in parquet(room, tmp_path).items()} == given
    assert_restored_exactly(room)


# case 58
def test_a_time_that_a_driver_would_wrap_around_is_refused(room: Room) -> None:
    room.admin.execute("ALTER TABLE audit_logs ADD COLUMN expires timestamptz")
    identifier = room.log("2025-01-15", expires="294276-12-31 23:59:59+00")
    room.fill(50)
    with pytest.raises(UserError, match="a timestamp after the year 294246 in month 2025-01"):
        room.archive()
    assert (room.data_keys(), room.manifests()) == ([], [])
    room.admin.execute("UPDATE audit_logs SET expires = 'infinity' WHERE id = %s", (identifier,))
    assert room.archive().manifest.digest.rows == 51


# case 59
def test_addresses_read_as_postgres_prints_them_with_their_mask(room: Room, tmp_path: Path) -> None:
    room.admin.execute("ALTER TABLE audit_logs ADD COLUMN net cidr")
    for address in ("10.0.0.1", "10.0.0.1/24", "0.0.0.0/0", "::1", "::1/64", "2001:db8::A/128", "::ffff:10.1.2.3"):
        room.log("2025-01-15", ip_address=address)
    for network in ("10.0.0.0/8", "192.168.1.1/32", "2001:db8::/32", "::/0"):
        room.log("2025-01-15", net=network)
    room.archive()
    rows = parquet(room, tmp_path)
    assert {key: row["ip_address"] for key, row in rows.items()} == printed(room, "ip_address")
    assert {key: row["net"] for key, row in rows.items()} == printed(room, "net")
    assert {"10.0.0.1/24", "::1/64", "::1/128"} <= {row["ip_address"] for row in rows.values()}
    assert_restored_exactly(room)


# case 60
def test_arrays_keep_their_nulls_and_dimensions_and_an_enum_may_grow_in_the_middle_of_a_month(
    room: Room, tmp_path: Path
) -> None:
    room.admin.execute("CREATE TYPE severity AS ENUM ('low', 'so-so, really')")
    room.admin.execute(
        "ALTER TABLE audit_logs ADD words text[], ADD grid integer[], ADD level severity, ADD levels severity[]"
    )
    words = {'{a,NULL,"","NULL","é,{}"}': '["a",null,"","NULL","é,{}"]', "{}": "[]", "{NULL}": "[null]"}
    given = {room.log("2025-01-10", words=array): stored for array, stored in words.items()}
    flat = room.log("2025-01-10", grid="{1,2,3,NULL}", level="low")
    square = room.log("2025-01-10", grid="{{1,2},{3,NULL}}")
    cube = room.log("2025-01-10", grid="{{{1},{2}},{{3},{4}}}", levels="{low,NULL}")
    moved = room.log("2025-01-10", grid="[0:1]={1,2}", words='[-1:0]={a,"]"}')
    room.admin.execute("ALTER TYPE severity ADD VALUE 'none' BEFORE 'low'")
    grown = room.log("2025-01-20", level="none", levels='{{none,low},{NULL,"so-so, really"}}')
    room.archive()

    rows = parquet(room, tmp_path)
    assert {key: rows[key]["words"] for key in given} == given
    assert [rows[key]["grid"] for key in (flat, square, cube)] == [
        "[1,2,3,null]",
        "[[1,2],[3,null]]",
        "[[[1],[2]],[[3],[4]]]",
    ]
    assert (rows[moved]["grid"], rows[moved]["words"]) == ('"[0:1]={1,2}"', '"[-1:0]={a,]}"')
    assert [rows[key]["level"] for key in (flat, grown, cube)] == ["low", "none", None]
    assert rows[grown]["levels"] == '[["none","low"],[null,"so-so, really"]]'
    assert_restored_exactly(room)


# -- one value larger than all others -------------------------------------------------------------------------------

PEAK = """
import sys
from tests.archive_pipeline.test_data import peak_of_january
print(peak_of_january(sys.argv[1]))
"""


def peak_of_january(scratch: str) -> int:
    archive_january("month recorded", 99, scratch)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def peak_megabytes(scratch: Path) -> int:
    ran = subprocess.run([sys.executable, "-c", PEAK, str(scratch)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout)


# case 61
def test_the_memory_a_month_needs_depends_on_its_largest_row_and_not_on_how_many_are_large(
    room: Room, tmp_path: Path
) -> None:
    room.admin.execute("ALTER TABLE audit_logs ALTER details SET STORAGE EXTERNAL")
    room.fill(500)
    room.admin.execute(
        """INSERT INTO audit_logs (tenant_id, action, details, created_at)
           SELECT %s, 'large', to_jsonb(repeat(md5(g::text), 8 << 15)), '2025-01-15Z'::timestamptz + g * interval '1 s'
           FROM generate_series(1, 20) g""",
        (room.tenant(),),
    )
    room.fill(500)
    peak = peak_megabytes(tmp_path)
    assert [found.manifest.digest.rows for found in room.manifests()] == [1020]
    assert peak < 650, "twenty of 8 MB: 440 MB, and 830 when batches and row groups end by rows"
