"""The Parquet files: what readers rely on, and the memory they cost."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archive_pipeline.columns import INT64_MAX, INT64_MIN, KEY_COLUMNS, Column, Field, discover, stored
from scaling.databases import Connection
from tests.archive_pipeline.conftest import Room

AT = Column("at", "timestamptz", "instant", Field("at_us", "bigint"), Field("at", "timestamp", utc=True))


@settings(deadline=None)
@given(st.lists(st.none() | st.integers(INT64_MIN, INT64_MAX)))
def test_a_readable_time_is_the_exact_one_rounded_down_or_null_beyond_athenas_years(
    exact: list[int | None],
) -> None:
    batch = stored([AT], pa.record_batch([pa.array(exact, pa.int64())], ["at"]))
    readable = batch.column("at").cast(pa.int64()).to_pylist()
    assert batch.column("at_us").to_pylist() == exact
    assert readable == [
        None if us is None or not -62_135_596_800_000_000 <= us <= 253_402_300_799_999_999 else us // 1000
        for us in exact
    ]


def test_rows_are_clustered_by_tenant_and_files_carry_what_prunes_and_proves(room: Room, tmp_path: Path) -> None:
    room.fill(3000)
    report = room.archive()
    tenants: list[tuple[str, int]] = []
    for part in report.manifest.parts:
        path = tmp_path / "part.parquet"
        room.target.bucket.download(part.key, path)
        file = pq.ParquetFile(path, page_checksum_verification=True)
        tenants += [(r["tenant_id"], r["created_at_us"]) for r in file.read(["tenant_id", "created_at_us"]).to_pylist()]
        group = file.metadata.row_group(0)
        names = [group.column(i).path_in_schema for i in range(group.num_columns)]
        assert [names[column.column_index] for column in group.sorting_columns] == ["tenant_id", "created_at_us", "id"]
        assert group.column(0).compression == "ZSTD"
        assert all(group.column(i).statistics is not None for i in range(group.num_columns))
        assert all(group.column(i).has_offset_index for i in range(group.num_columns))
        assert [names[i] for i in range(group.num_columns) if group.column(i).bloom_filter_offset] == ["id"]
        metadata = file.schema_arrow.metadata
        assert metadata[b"archive.month"] == b"2025-01"
        assert metadata[b"archive.schema_sha256"].decode() == report.manifest.schema_sha256
    assert tenants == sorted(tenants)
    assert len(tenants) == 3000


def test_the_same_rows_give_the_same_bytes(room: Room) -> None:
    room.fill(500)
    first = room.archive().manifest.parts
    for key in (*room.data_keys(), room.month_row()["manifest_key"]):
        room.target.bucket.delete(key)
    again = room.archive().manifest.parts
    # Salts are random, and so are the roots over the salted leaves.
    assert [replace(part, merkle_root="") for part in again] == [replace(part, merkle_root="") for part in first]


def columns_of(admin: Connection, declaration: str) -> dict[str, Column]:
    keys = "id uuid, tenant_id uuid, created_at timestamptz"
    admin.execute(f"CREATE TABLE odd ({keys}, {declaration})".encode())
    return {column.source: column for column in discover(admin, "public", "odd")}


def test_names_that_athena_cannot_hold_or_that_clash_are_made_unique(room: Room) -> None:
    found = columns_of(
        room.admin,
        """"Year" int, year int, month int, "ID" int, created_at_us text, "Created_At" timestamptz, "größe" int,
           "a b" int, "a-b" int, "at" timestamptz, at_us int, "select" int, "naïve""quote" date""",
    )
    names = [field.name for column in found.values() for field in column.fields]
    assert len(names) == len(set(names))
    assert not {"year", "month"} & set(names)
    assert all(name.isascii() and name == name.lower() for name in names)
    assert [found[key].fields[0].name for key in KEY_COLUMNS] == list(KEY_COLUMNS)
    assert found["created_at"].exact.name == "created_at_us"


def test_a_dropped_column_leaves_no_trace(room: Room) -> None:
    columns_of(room.admin, "a int, b int")
    room.admin.execute("ALTER TABLE odd DROP COLUMN a")
    assert [column.source for column in discover(room.admin, "public", "odd")] == [*KEY_COLUMNS, "b"]


PEAK = """
import resource, sys
from tests.archive_pipeline.killed import main
main("month recorded", 99, sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def peak_megabytes(scratch: Path) -> int:
    ran = subprocess.run([sys.executable, "-c", PEAK, str(scratch)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout)


# case 61
@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_huge_rows(room: Room, tmp_path: Path) -> None:
    room.admin.execute("ALTER TABLE audit_logs ALTER details SET STORAGE EXTERNAL")
    for number in range(6):
        identifier = room.log("2025-01-15")
        room.admin.execute(
            "UPDATE audit_logs SET details = to_jsonb(repeat(md5(%s), 3200000)) WHERE id = %s",
            (str(number), identifier),
        )
    room.fill(1000)
    peak = peak_megabytes(tmp_path)
    (found,) = room.manifests()
    assert found.manifest.digest.rows == 1006
    assert peak < 1500, "six documents of 100 MB, one after the other"
