"""Parquet parts on local disk, written in bounded memory.

Belongs here: the writer's options, how large row groups and parts are, and the parts' checksums.
Does not: where the rows come from, their order (`archive_pipeline.clustering`), or where the parts go.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from archive_pipeline.columns import KEY_COLUMNS, Column, arrow_schema, stored

# Bytes of rows in memory, about a fifth of it on disk. A query for one tenant reads the row groups that hold it, so
# small ones keep its share small; the writer holds one at a time.
ROW_GROUP_BYTES = 16 << 20
# About 128 MB on disk. Athena slows down over many small files and cannot parallelise one huge one; also well under
# S3's 5 GiB for one PUT. https://docs.aws.amazon.com/athena/latest/ug/performance-tuning.html
PART_BYTES = 768 << 20
# A month is divided among parts that are written side by side, unless they would be smaller than this.
LEAST_PART_BYTES = 64 << 20
# Level 1 made this data as small as 3 and 6 do (190, 198 and 197 MB of 1 GiB) in 2.6 s of CPU instead of 3.8 and 7.4.
ZSTD_LEVEL = 1
# A dictionary of documents fills up and is given up, after it cost as much as it saved.
DOCUMENTS = ("json", "jsonb", "bytea")
BLOOM_FALSE_POSITIVES = 0.01


@dataclass(frozen=True, slots=True)
class PartSize:
    """When a row group and a part end.

    Attributes:
        row_group_bytes: of rows in memory; this bounds the writer's memory.
        part_bytes: of rows in memory after which a further part is begun.
        least_part_bytes: of rows in memory below which a month is not divided for the sake of parallelism.
    """

    row_group_bytes: int = ROW_GROUP_BYTES
    part_bytes: int = PART_BYTES
    least_part_bytes: int = LEAST_PART_BYTES

    def parts(self, size: int, parallelism: int) -> int:
        """Into how many parts a month is divided.

        Args:
            size: bytes of its rows in memory.
            parallelism: parts that are written side by side.
        """
        return max(1, -(-size // self.part_bytes), min(parallelism, size // self.least_part_bytes))


@dataclass(frozen=True, slots=True)
class LocalPart:
    """One finished Parquet file.

    Attributes:
        path: where it lies.
        rows: in it.
        size: bytes.
        sha256: of its bytes, hex.
    """

    path: Path
    rows: int
    size: int
    sha256: str


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hex.

    Args:
        path: of the file.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_part(
    tables: Iterable[pa.Table], columns: Sequence[Column], path: Path, metadata: Mapping[str, str]
) -> LocalPart:
    """Write a Parquet file, a row group for each table.

    The same tables give the same bytes, so a repeated attempt produces the same object names.

    Args:
        tables: of the stored schema, in the order (tenant_id, created_at, id); empty ones are passed over.
        columns: of the table.
        path: of the file.
        metadata: key-value metadata, nothing that differs between two attempts.

    Returns:
        The complete file; without rows a Parquet file without row groups.
    """
    schema = arrow_schema(columns).with_metadata(dict(metadata))
    rows = 0
    writer: pq.ParquetWriter | None = None
    for table in tables:
        if not table.num_rows:
            continue
        writer = writer or _writer(path, schema, columns, table.num_rows)
        writer.write_table(table.replace_schema_metadata(schema.metadata), row_group_size=table.num_rows)
        rows += table.num_rows
        del table  # before the next one is made
    (writer or _writer(path, schema, columns, 1)).close()
    return LocalPart(path, rows, path.stat().st_size, sha256_of(path))


def stored_table(columns: Sequence[Column], batch: pa.RecordBatch) -> pa.Table:
    """Turn rows as read from Postgres into a table of the stored schema.

    Args:
        columns: of the table.
        batch: one array for each column.
    """
    return pa.Table.from_batches([stored(columns, batch)])


def _writer(path: Path, schema: pa.Schema, columns: Sequence[Column], rows: int) -> pq.ParquetWriter:
    names = {column.source: column.exact.name for column in columns}
    never_repeat = {names["id"], names["created_at"]}
    never_repeat |= {column.exact.name for column in columns if column.postgres_type in DOCUMENTS}
    return pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        compression_level=ZSTD_LEVEL,
        use_dictionary=[name for name in schema.names if name not in never_repeat],
        write_statistics=True,
        write_page_index=True,
        write_page_checksum=True,
        sorting_columns=[pq.SortingColumn(schema.get_field_index(names[key])) for key in (*KEY_COLUMNS[1:], "id")],
        bloom_filter_options={names["id"]: {"ndv": rows, "fpp": BLOOM_FALSE_POSITIVES}},
    )
