"""The digest that Postgres and DuckDB compute over the same rows and must agree on.

Belongs here: the row's text, the SQL of both engines, running DuckDB's, and what a disagreement is about.
Does not: deciding what happens then (`archive_pipeline.archive`).

A row becomes text that no other row reads like: values that are never empty and hold no ``|`` (numbers, uuids,
addresses, times) are ended by one; others have their length in bytes before them. So NULL (nothing, or no length)
differs from the empty string. The digest is the number of rows and the sum of 60 bits of each row's MD5. A sum does not
depend on order, needs no sort on either side, and adds up over parts; a duplicated row together with a lost one changes
it. It catches accidents; malice is the business of the signed SHA-256 and the Merkle root, whose leaves hash the same
text.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from psycopg import sql

from archive_pipeline import merkle
from archive_pipeline.columns import ENCODINGS, FIRST_DAY, FIRST_US, LAST_DAY, LAST_US, Column
from archive_pipeline.merkle import Seeds

ALGORITHM = "sum60(md5(row text))/2"

# Postgres allows 100 arguments, a column takes up to three.
COLUMNS_A_CALL = 33

# One thread holds one row group and its texts at a time, so a month of 100 MB documents passes in bounded memory.
# Parts are verified side by side, each by a reader of its own.
DUCKDB_THREADS = 1
DUCKDB_MEMORY = "1GB"
LEAST_DUCKDB_BYTES = 64 << 20
# The largest value is held about this many times: its page, its text, the salted text, and what the engine sets aside.
ROW_GROUP_COPIES = 10

LEAVES_A_CHUNK = 1 << 14
MOST_ROWS_A_BATCH = 8192
BATCH_BYTES = 4 << 20
TEXTS_A_CHUNK = 2048

NIBBLES = np.zeros(256, dtype=np.uint8)
NIBBLES[np.frombuffer(b"0123456789abcdef", dtype=np.uint8)] = range(16)
POWERS = np.array([1 << (4 * place) for place in range(7, -1, -1)], dtype=np.uint64)


@dataclass(frozen=True, slots=True)
class Digest:
    """What a set of rows adds up to.

    Attributes:
        rows: how many.
        value: sum over the rows of the first 60 bits of their MD5.
        min_us: earliest ``created_at``, microseconds since 1970; None without rows.
        max_us: latest ``created_at``.
    """

    rows: int = 0
    value: int = 0
    min_us: int | None = None
    max_us: int | None = None

    def __add__(self, other: Self) -> Self:
        return type(self)(
            self.rows + other.rows,
            self.value + other.value,
            min((us for us in (self.min_us, other.min_us) if us is not None), default=None),
            max((us for us in (self.max_us, other.max_us) if us is not None), default=None),
        )

    def difference(self, other: Self) -> str:
        """Say how two digests of the same rows differ; empty when they agree.

        Args:
            other: what this one is compared with.
        """
        if self.rows != other.rows:
            return f"{self.rows:,} rows instead of {other.rows:,}"
        if self.value != other.value:
            return f"the content of the {self.rows:,} rows differs"
        if (self.min_us, self.max_us) != (other.min_us, other.max_us):
            return "the first or last created_at differs"
        return ""


@dataclass(frozen=True, slots=True)
class Verified:
    """What a Parquet file was found to hold.

    Attributes:
        digest: of its rows.
        merkle_root: over the leaf hashes of its rows in the order of the file.
        wrongly_rounded: readable fields that are not their exact field rounded down; the digest covers the exact ones.
    """

    digest: Digest
    merkle_root: bytes
    wrongly_rounded: tuple[str, ...]


def postgres_row_md5(columns: Sequence[Column]) -> sql.Composed:
    """SQL for Postgres: MD5 of one row's text, over values named ``v0``, ``v1`` … as `Column.read` gives them.

    Args:
        columns: of the table.
    """
    return sql.SQL("md5({})").format(_postgres_text(range(len(columns)), columns))


def digest_of_rows(md5: pa.StringArray, created_at_us: pa.Array) -> Digest:
    """Add up rows whose MD5 Postgres computed.

    Args:
        md5: 32 hexadecimal digits of each row.
        created_at_us: microseconds since 1970 of each row.

    Returns:
        The same digest as `postgres_digest` over these rows.
    """
    if not len(md5):
        return Digest()
    digits = np.frombuffer(md5.buffers()[2], dtype=np.uint8)[md5.offset * 32 :][: len(md5) * 32].reshape(-1, 32)
    # 60 bits are 15 digits; a sum of 28 or 32 bits cannot overflow 64 within a batch.
    nibbles = NIBBLES[digits[:, :15]].astype(np.uint64)
    high = nibbles[:, :7] @ POWERS[-7:]
    low = nibbles[:, 7:] @ POWERS
    value = (int(high.sum()) << 32) + int(low.sum())
    bounds = pc.min_max(created_at_us)
    return Digest(len(md5), value, bounds["min"].as_py(), bounds["max"].as_py())


def postgres_digest(columns: Sequence[Column], rows: sql.Composable) -> sql.Composed:
    """SQL for Postgres: one row of count, sum, first and last ``created_at_us``, and rows with NaN in a decimal.

    Args:
        columns: of the table.
        rows: relation of the rows, to be aliased ``r``.
    """
    created_at = next(number for number, column in enumerate(columns) if column.source == "created_at")
    decimals = [_value(number) for number, column in enumerate(columns) if column.kind == "decimal"]
    nan = sql.SQL(" OR ").join(sql.SQL("{} = 'NaN'").format(v) for v in decimals) if decimals else sql.SQL("false")
    # OFFSET 0 keeps the planner from writing each value's expression twice, which would detoast it twice.
    return sql.SQL(
        "SELECT count(*), coalesce(sum({bits}), 0), min({us}), max({us}), count(*) FILTER (WHERE {nan}) "
        "FROM (SELECT {reads} FROM {rows} r OFFSET 0) e"
    ).format(
        bits=_bits(_postgres_text(range(len(columns)), columns)),
        us=_value(created_at),
        nan=nan,
        reads=sql.SQL(", ").join(sql.SQL("{} AS {}").format(c.read(), _value(n)) for n, c in enumerate(columns)),
        rows=rows,
    )


def postgres_column_digests(columns: Sequence[Column], rows: sql.Composable) -> sql.Composed:
    """SQL for Postgres: one digest value for each column, over (id, column), to tell which column differs.

    Args:
        columns: of the table.
        rows: relation of the rows, to be aliased ``r``.
    """
    identity = _identity(columns)
    sums = [
        sql.SQL("coalesce(sum({}), 0)").format(_bits(_postgres_text((identity, number), columns)))
        for number in range(len(columns))
    ]
    return sql.SQL("SELECT {sums} FROM (SELECT {reads} FROM {rows} r OFFSET 0) e").format(
        sums=sql.SQL(", ").join(sums),
        reads=sql.SQL(", ").join(sql.SQL("{} AS {}").format(c.read(), _value(n)) for n, c in enumerate(columns)),
        rows=rows,
    )


def _value(number: int) -> sql.Identifier:
    return sql.Identifier(f"v{number}")


def _postgres_text(numbers: Sequence[int], columns: Sequence[Column]) -> sql.Composed:
    texts = []
    for number in numbers:
        encoding = ENCODINGS[columns[number].kind]
        text = sql.SQL(encoding.postgres_text).format(v=_value(number))
        # concat() passes over NULL, and unlike a chain of || it copies a 100 MB value once.
        form = "{t}, '|'" if encoding.bounded else "octet_length({t}), ':', {t}"
        texts.append(sql.SQL(form).format(t=text))
    chunks = [texts[start : start + COLUMNS_A_CALL] for start in range(0, len(texts), COLUMNS_A_CALL)]
    calls = [sql.SQL("concat({})").format(sql.SQL(", ").join(chunk)) for chunk in chunks]
    return calls[0] if len(calls) == 1 else sql.SQL("concat({})").format(sql.SQL(", ").join(calls))


def _bits(text: sql.Composable) -> sql.Composed:
    return sql.SQL("('x' || substr(md5({}), 1, 15))::bit(60)::bigint").format(text)


def _identity(columns: Sequence[Column]) -> int:
    return next(number for number, column in enumerate(columns) if column.source == "id")


class ParquetReader:
    """DuckDB over local Parquet files, the second opinion on what was written.

    Args:
        spill: directory for what does not fit in memory.
    """

    def __init__(self, spill: Path) -> None:
        self._duckdb = duckdb.connect(
            config={
                "threads": DUCKDB_THREADS,
                "memory_limit": DUCKDB_MEMORY,
                "temp_directory": str(spill),
                "preserve_insertion_order": "false",
            }
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._duckdb.close()

    def digest(self, columns: Sequence[Column], file: Path, where: tuple[str, str] | None = None) -> Digest:
        """Compute the digest of one file from its exact fields.

        Args:
            columns: of the table.
            file: Parquet.
            where: stored name and text of a field, of rows that alone are digested; None digests every row.

        Returns:
            The digest.
        """
        us = _quoted(next(column.exact.name for column in columns if column.source == "created_at"))
        query = (
            f"SELECT count(*), coalesce(sum({_duckdb_bits(columns)}), 0)::VARCHAR, min({us}), max({us}) "  # noqa: S608
            "FROM read_parquet($file)"
        )
        values = {"file": str(file)}
        if where is not None:
            query += f" WHERE {_quoted(where[0])}::VARCHAR = $value"
            values["value"] = where[1]
        row = self._duckdb.cursor().execute(query, values).fetchone()
        assert row is not None  # noqa: S101 - an aggregate has one row
        return Digest(row[0], int(row[1]), row[2], row[3])

    def verify(self, columns: Sequence[Column], file: Path, seeds: Seeds) -> Verified:
        """Compute in one pass everything that a manifest says of a file's rows.

        Args:
            columns: of the table.
            file: Parquet.
            seeds: of the salts of its leaves.

        Returns:
            What the file holds.
        """
        rounded = [column for column in columns if column.readable is not None]
        us = _quoted(next(column.exact.name for column in columns if column.source == "created_at"))
        fields = [f"md5({_duckdb_text(columns)})", us, *map(_is_wrong, rounded)]
        digest, wrong = Digest(), np.zeros(len(rounded), dtype=np.int64)
        leaves: list[bytes] = []
        roots: list[bytes] = []
        for batch in self._texts(columns, file, fields):
            digest += digest_of_rows(batch.column(1), batch.column(2))
            rows = len(roots) * LEAVES_A_CHUNK + len(leaves)
            leaves += _leaves(batch.column(0), seeds, rows)
            while len(leaves) >= LEAVES_A_CHUNK:
                roots.append(merkle.root(leaves[:LEAVES_A_CHUNK]))
                del leaves[:LEAVES_A_CHUNK]
            counts = [pc.sum(batch.column(3 + number)).as_py() or 0 for number in range(len(rounded))]
            wrong += np.array(counts, dtype=np.int64)
        names = tuple(c.readable.name for c, count in zip(rounded, wrong, strict=True) if count and c.readable)
        roots += [merkle.root(leaves)] if leaves else []
        return Verified(digest, merkle.root(roots), names)

    def leaves(self, columns: Sequence[Column], file: Path, seeds: Seeds) -> Iterator[list[bytes]]:
        """Compute the leaf hashes of a file's rows, in the order of the file.

        Args:
            columns: of the table.
            file: Parquet.
            seeds: of the salts.

        Yields:
            Some thousand hashes at a time.
        """
        rows = 0
        for batch in self._texts(columns, file, []):
            yield _leaves(batch.column(0), seeds, rows)
            rows += batch.num_rows

    def row_digests(self, columns: Sequence[Column], file: Path) -> Iterator[pa.RecordBatch]:
        """Read (id as text, MD5 of the row's text) of every row of a file.

        Args:
            columns: of the table.
            file: Parquet.

        Yields:
            Batches of two arrays.
        """
        identity = columns[_identity(columns)]
        text = ENCODINGS[identity.kind].duckdb_text.format(v=_quoted(identity.exact.name))
        query = self._duckdb.cursor().sql(
            f"SELECT {text}::VARCHAR, md5({_duckdb_text(columns)}) FROM read_parquet($file)",  # noqa: S608
            params={"file": str(file)},
        )
        yield from query.to_arrow_reader(LEAVES_A_CHUNK)

    def row_text(self, columns: Sequence[Column], file: Path, row: int) -> str:
        """The text of one row, as the digest and its leaf hash it.

        Args:
            columns: of the table.
            file: Parquet.
            row: 0, 1, 2 … in the order of the file.

        Raises:
            IndexError: the file has no such row.
        """
        found = (
            self._duckdb.cursor()
            .execute(
                f"SELECT {_duckdb_text(columns)} FROM read_parquet($file, file_row_number = true) "  # noqa: S608
                "WHERE file_row_number = $row",
                {"file": str(file), "row": row},
            )
            .fetchone()
        )
        if found is None:
            raise IndexError(row)
        return str(found[0])

    def texts(self, columns: Sequence[Column], file: Path) -> Iterator[str]:
        """The texts of all rows, as the digest and the leaves hash them, in the order of the file.

        Args:
            columns: of the table.
            file: Parquet.
        """
        query = self._duckdb.cursor().sql(
            f"SELECT {_duckdb_text(columns)} FROM read_parquet($file, file_row_number = true)",  # noqa: S608
            params={"file": str(file)},
        )
        for batch in query.to_arrow_reader(TEXTS_A_CHUNK):
            yield from batch.column(0).to_pylist()

    def rows_where(self, field: str, value: str, file: Path) -> list[int]:
        """Find rows by a stored field's text.

        Args:
            field: stored name.
            value: its text.
            file: Parquet.

        Returns:
            Row numbers, 0, 1, 2 … in the order of the file.
        """
        found = (
            self._duckdb.cursor()
            .execute(
                f"SELECT file_row_number FROM read_parquet($file, file_row_number = true) "  # noqa: S608
                f"WHERE {_quoted(field)}::VARCHAR = $value ORDER BY 1",
                {"file": str(file), "value": value},
            )
            .fetchall()
        )
        return [row for (row,) in found]

    def _texts(self, columns: Sequence[Column], file: Path, further: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Texts of the rows and further expressions, in the order of the file, a few megabytes at a time."""
        metadata = pq.read_metadata(file)
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        # The engine keeps what it has read, up to its limit (measured).
        needed = max(LEAST_DUCKDB_BYTES, ROW_GROUP_COPIES * max((group.total_byte_size for group in groups), default=0))
        self._duckdb.execute(f"SET memory_limit = '{needed}B'")
        widest = max((group.total_byte_size / group.num_rows for group in groups), default=1)
        rows = max(1, min(MOST_ROWS_A_BATCH, int(BATCH_BYTES / widest)))
        query = self._duckdb.cursor().sql(
            f"SELECT {', '.join([_duckdb_text(columns), *further])} "  # noqa: S608
            "FROM read_parquet($file)",
            params={"file": str(file)},
        )
        yield from query.to_arrow_reader(rows)

    def column_digests(self, columns: Sequence[Column], files: Sequence[Path]) -> list[int]:
        """Compute one digest value for each column over (id, column), to tell which column differs.

        Args:
            columns: of the table.
            files: Parquet.

        Returns:
            The values, in the order of the columns.
        """
        if not files:
            return [0] * len(columns)
        identity = columns[_identity(columns)]
        sums = ", ".join(f"coalesce(sum({_duckdb_bits((identity, column))}), 0)::VARCHAR" for column in columns)
        row = (
            self._duckdb.cursor()
            .execute(
                f"SELECT {sums} FROM read_parquet($files)",  # noqa: S608
                {"files": [str(file) for file in files]},
            )
            .fetchone()
        )
        assert row is not None  # noqa: S101 - an aggregate has one row
        return [int(value) for value in row]


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _leaves(texts: pa.StringArray, seeds: Seeds, first: int) -> list[bytes]:
    """Leaf hashes of neighbouring rows; hashlib takes half the time of the engine's own SHA-256."""
    sha256 = hashlib.sha256
    ends = np.frombuffer(texts.buffers()[1], dtype=np.int32)[texts.offset : texts.offset + len(texts) + 1].tolist()
    body = memoryview(texts.buffers()[2] or b"")
    salts = seeds.salts(first, len(texts))
    return [
        sha256(b"\x00" + salt + body[start:end]).digest()
        for salt, start, end in zip(salts, ends[:-1], ends[1:], strict=True)
    ]


def _duckdb_text(columns: Sequence[Column]) -> str:
    texts = []
    for column in columns:
        encoding = ENCODINGS[column.kind]
        text = encoding.duckdb_text.format(v=_quoted(column.exact.name))
        texts.append(f"{text}, '|'" if encoding.bounded else f"strlen({text}), ':', {text}")
    return f"concat({', '.join(texts)})"


def _duckdb_bits(columns: Sequence[Column]) -> str:
    return f"('0x' || substr(md5({_duckdb_text(columns)}), 1, 15))::BIGINT"


def _is_wrong(column: Column) -> str:
    assert column.readable is not None  # noqa: S101 - narrows the type
    exact, readable = _quoted(column.exact.name), _quoted(column.readable.name)
    if column.kind == "date":
        within = f"{exact} BETWEEN {FIRST_DAY} AND {LAST_DAY}"
        return f"datediff('day', DATE '1970-01-01', {readable}) IS DISTINCT FROM CASE WHEN {within} THEN {exact} END"
    within = f"{exact} BETWEEN {FIRST_US} AND {LAST_US}"
    floored = f"({exact} - ({exact} % 1000 + 1000) % 1000) // 1000"
    return f"epoch_ms({readable}) IS DISTINCT FROM CASE WHEN {within} THEN {floored} END"
