"""Damage between Postgres and the bucket: whatever happens to a part's bytes, the month is not published."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from archive_pipeline import archive
from archive_pipeline.columns import Column
from archive_pipeline.errors import VerificationError
from archive_pipeline.parts import LocalPart, write_part
from archive_pipeline.publication import Step
from tests.archive_pipeline.conftest import Room

Tables = list[pa.Table]


def written_wrong(monkeypatch: pytest.MonkeyPatch, change: Callable[[pa.Table], pa.Table]) -> None:
    """Let the writer put other rows into the first row group than Postgres sent."""

    def wrong(
        tables: Iterable[pa.Table], columns: Sequence[Column], path: Path, metadata: Mapping[str, str]
    ) -> LocalPart:
        first, *others = tables
        return write_part([change(first), *others], columns, path, metadata)

    monkeypatch.setattr(archive, "write_part", wrong)


def alter(table: pa.Table, name: str, row: int, value: object) -> pa.Table:
    values = table.column(name).to_pylist()
    values[row] = value
    return table.set_column(table.schema.get_field_index(name), name, pa.array(values, table.schema.field(name).type))


def nothing_is_published(room: Room, rows: int) -> None:
    assert room.data_keys() == []
    assert room.manifests() == []
    assert room.admin.execute("SELECT count(*) FROM audit_logs").fetchone() == (rows,)
    assert (room.month_row()["state"], room.month_row()["manifest_key"]) == ("failed", None)


# case 66
def test_one_altered_row_is_caught_and_the_month_and_the_column_are_named(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    room.fill(300)
    written_wrong(monkeypatch, lambda table: alter(table, "resource_id", 7, "0"))
    with pytest.raises(VerificationError, match="month 2025-01 failed verification") as caught:
        room.archive()
    assert (caught.value.month, caught.value.columns) == ("2025-01", ("resource_id",))
    nothing_is_published(room, 300)


# case 66
def test_one_row_doubled_and_one_removed_is_caught_though_the_counts_agree(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    room.fill(300)

    def double(table: pa.Table) -> pa.Table:
        return pa.concat_tables([table.slice(0, table.num_rows - 1), table.slice(0, 1)])

    written_wrong(monkeypatch, double)
    with pytest.raises(VerificationError, match=r"month 2025-01 .*the content of the 300 rows differs"):
        room.archive()
    nothing_is_published(room, 300)


# case 66
def test_a_readable_time_that_is_not_the_exact_one_is_caught_and_named(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datetime import UTC, datetime

    room.fill(300)
    written_wrong(monkeypatch, lambda table: alter(table, "created_at", 3, datetime(2025, 2, 1, tzinfo=UTC)))
    with pytest.raises(VerificationError, match="month 2025-01") as caught:
        room.archive()
    assert caught.value.columns == ("created_at",)
    nothing_is_published(room, 300)


def cut_off(body: bytes, path: Path) -> bytes:
    return body[:-8]


def flip_a_bit_in_a_page(body: bytes, path: Path) -> bytes:
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(0)
    at = (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size // 2
    return body[:at] + bytes([body[at] ^ 4]) + body[at + 1 :]


# case 67
@pytest.mark.parametrize("damage", [cut_off, flip_a_bit_in_a_page])
def test_a_part_with_a_truncated_footer_or_a_flipped_bit_is_caught_by_the_read_back(
    room: Room, damage: Callable[[bytes, Path], bytes], tmp_path: Path
) -> None:
    room.fill(300)
    client = room.bucket.server.client()
    damaged: list[str] = []

    def spoil(step: Step) -> None:
        if step is Step.UPLOADED and not damaged:
            key = room.data_keys()[0]
            body = room.target.bucket.read(key)
            path = tmp_path / "whole.parquet"
            path.write_bytes(body)
            client.put_object(Bucket=room.bucket.name, Key=key, Body=damage(body, path))
            damaged.append(key)

    with pytest.raises(VerificationError, match="came back from S3 with other bytes than were sent") as caught:
        room.archive(on_step=spoil)
    assert damaged[0] in str(caught.value)
    assert caught.value.month == "2025-01"
    nothing_is_published(room, 300)


# case 67
@pytest.mark.parametrize("damage", [cut_off, flip_a_bit_in_a_page])
def test_a_part_that_is_damaged_on_local_disk_never_reaches_the_bucket(
    room: Room, damage: Callable[[bytes, Path], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    room.fill(300)

    def spoiled(
        tables: Iterable[pa.Table], columns: Sequence[Column], path: Path, metadata: Mapping[str, str]
    ) -> LocalPart:
        part = write_part(tables, columns, path, metadata)
        path.write_bytes(damage(path.read_bytes(), path))
        return part

    monkeypatch.setattr(archive, "write_part", spoiled)
    with pytest.raises(VerificationError, match="month 2025-01 failed verification"):
        room.archive()
    nothing_is_published(room, 300)
