"""Parquet parts on local disk, written from Arrow batches in bounded memory.

Belongs here: the writer's options, when a row group and a part end, and the parts' checksums.
Does not: where the batches come from or where the parts go.
"""

import base64
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from archive_pipeline.columns import KEY_COLUMNS, Column, arrow_schema, stored

# Readers split work by row group and fetch a column of it at once: https://parquet.apache.org/docs/file-format/configurations
ROW_GROUP_BYTES = 128 << 20
# Athena slows down over many small files and cannot parallelise one huge one; also well under S3's 5 GiB for one PUT.
PART_BYTES = 256 << 20
BLOOM_FALSE_POSITIVES = 0.01


@dataclass(frozen=True, slots=True)
class PartSize:
    """When a row group and a part end.

    Attributes:
        row_group_bytes: Arrow bytes gathered in memory before a row group is written; with the batch on its way
            this bounds the writer's memory.
        part_bytes: compressed bytes after which a further part is begun.
    """

    row_group_bytes: int = ROW_GROUP_BYTES
    part_bytes: int = PART_BYTES


@dataclass(frozen=True, slots=True)
class LocalPart:
    """One finished Parquet file.

    Attributes:
        path: where it lies.
        number: 0, 1, 2 … within the month.
        size: bytes.
        sha256: of its bytes, hex.
    """

    path: Path
    number: int
    size: int
    sha256: str


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hex.

    Args:
        path: of the file.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def base64_of(sha256: str) -> str:
    """The form S3 wants a SHA-256 in.

    Args:
        sha256: hex.
    """
    return base64.b64encode(bytes.fromhex(sha256)).decode()


def write_parts(
    batches: Iterable[pa.RecordBatch],
    columns: Sequence[Column],
    directory: Path,
    metadata: Mapping[str, str],
    size: PartSize,
) -> Iterator[LocalPart]:
    """Write batches to Parquet parts.

    The same batches give the same bytes, so a repeated attempt produces the same object names.

    Args:
        batches: as read from Postgres, clustered by (tenant_id, created_at, id).
        columns: of the table.
        directory: where the files go; it must exist.
        metadata: key-value metadata of every file, nothing that differs between two attempts.
        size: when row groups and parts end.

    Yields:
        Each part as soon as it is complete; none for no rows.
    """
    schema = arrow_schema(columns).with_metadata(dict(metadata))
    number = 0
    path = directory / f"{number:05}.parquet"
    writer: pq.ParquetWriter | None = None
    for group in _row_groups(batches, columns, schema, size.row_group_bytes):
        if writer is None:
            writer = _writer(path, schema, columns, group.num_rows)
        writer.write_table(group, row_group_size=group.num_rows)
        if path.stat().st_size >= size.part_bytes:
            writer.close()
            writer = None
            yield LocalPart(path, number, path.stat().st_size, sha256_of(path))
            number += 1
            path = directory / f"{number:05}.parquet"
    if writer is not None:
        writer.close()
        yield LocalPart(path, number, path.stat().st_size, sha256_of(path))


def _row_groups(
    batches: Iterable[pa.RecordBatch], columns: Sequence[Column], schema: pa.Schema, limit: int
) -> Iterator[pa.Table]:
    gathered: list[pa.RecordBatch] = []
    size = 0
    for batch in batches:
        if batch.num_rows == 0:
            continue
        if gathered and size + batch.nbytes > limit:
            yield pa.Table.from_batches(gathered).replace_schema_metadata(schema.metadata)
            gathered, size = [], 0
        gathered.append(stored(columns, batch))
        size += gathered[-1].nbytes
    if gathered:
        yield pa.Table.from_batches(gathered).replace_schema_metadata(schema.metadata)


def _writer(path: Path, schema: pa.Schema, columns: Sequence[Column], rows: int) -> pq.ParquetWriter:
    names = {column.source: column.exact.name for column in columns}
    never_repeat = {names["id"], names["created_at"]}
    return pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        compression_level=6,
        use_dictionary=[name for name in schema.names if name not in never_repeat],
        write_statistics=True,
        write_page_index=True,
        write_page_checksum=True,
        sorting_columns=[pq.SortingColumn(schema.get_field_index(names[key])) for key in (*KEY_COLUMNS[1:], "id")],
        bloom_filter_options={names["id"]: {"ndv": rows, "fpp": BLOOM_FALSE_POSITIVES}},
    )
