"""The digest that Postgres and DuckDB compute over the same rows and must agree on.

Belongs here: the row encoding, the two SQL texts, running DuckDB's, and what a disagreement is about.
Does not: deciding what happens then (`archive_pipeline.archive`).

A row becomes text: for each column ``<length in bytes>:<value>``, or ``-`` for NULL, so that no two different rows
read alike and NULL differs from the empty string. The digest is the number of rows and the sum of 60 bits of each
row's MD5. A sum does not depend on order, needs no sort on either side, and adds up over parts; a duplicated row
together with a lost one changes it. It catches accidents; malice is the business of the SHA-256 in the manifest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import duckdb
from psycopg import sql

from archive_pipeline.columns import ENCODINGS, FIRST_DAY, FIRST_US, LAST_DAY, LAST_US, Column

ALGORITHM = "sum60(md5(length-prefixed))/1"

# concat() passes over NULL, and unlike a chain of || it copies a 100 MB value once. Postgres allows 100 arguments.
COLUMNS_A_CALL = 50

# One thread holds one row group and its texts at a time, so a month of 100 MB documents passes in bounded memory;
# at about 0.5 million rows a second it is still several times faster than the extraction before it.
DUCKDB_THREADS = 1
DUCKDB_MEMORY = "1GB"


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
        text = sql.SQL(ENCODINGS[columns[number].kind].postgres_text).format(v=_value(number))
        texts.append(sql.SQL("coalesce(octet_length({t})::text || ':', '-'), {t}").format(t=text))
    chunks = [texts[start : start + COLUMNS_A_CALL] for start in range(0, len(texts), COLUMNS_A_CALL)]
    return sql.SQL("concat({})").format(
        sql.SQL(", ").join(sql.SQL("concat({})").format(sql.SQL(", ").join(chunk)) for chunk in chunks)
    )


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

    def digest(self, columns: Sequence[Column], file: Path) -> Digest:
        """Compute the digest of one file from its exact fields.

        Args:
            columns: of the table.
            file: Parquet.

        Returns:
            The digest.
        """
        us = _quoted(next(column.exact.name for column in columns if column.source == "created_at"))
        query = (
            f"SELECT count(*), coalesce(sum({_duckdb_bits(columns)}), 0)::VARCHAR, min({us}), max({us}) "  # noqa: S608
            "FROM read_parquet($file)"
        )
        row = self._duckdb.execute(query, {"file": str(file)}).fetchone()
        assert row is not None  # noqa: S101 - an aggregate has one row
        return Digest(row[0], int(row[1]), row[2], row[3])

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
        row = self._duckdb.execute(
            f"SELECT {sums} FROM read_parquet($files)",  # noqa: S608
            {"files": [str(file) for file in files]},
        ).fetchone()
        assert row is not None  # noqa: S101 - an aggregate has one row
        return [int(value) for value in row]

    def wrongly_rounded(self, columns: Sequence[Column], file: Path) -> list[str]:
        """Find readable fields that are not their exact field rounded down.

        Args:
            columns: of the table.
            file: Parquet.

        Returns:
            The names of such fields; the digest covers only the exact ones.
        """
        checked = [column for column in columns if column.readable is not None]
        tests = ", ".join(f"count(*) FILTER (WHERE {_is_wrong(column)})" for column in checked)
        row = self._duckdb.execute(f"SELECT {tests} FROM read_parquet($file)", {"file": str(file)}).fetchone()  # noqa: S608
        assert row is not None  # noqa: S101 - an aggregate has one row
        return [c.readable.name for c, wrong in zip(checked, row, strict=True) if wrong and c.readable is not None]


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _duckdb_bits(columns: Sequence[Column]) -> str:
    texts = []
    for column in columns:
        text = ENCODINGS[column.kind].duckdb_text.format(v=_quoted(column.exact.name))
        texts.append(f"coalesce(strlen({text})::VARCHAR || ':', '-'), {text}")
    return f"('0x' || substr(md5(concat({', '.join(texts)})), 1, 15))::BIGINT"


def _is_wrong(column: Column) -> str:
    assert column.readable is not None  # noqa: S101 - narrows the type
    exact, readable = _quoted(column.exact.name), _quoted(column.readable.name)
    if column.kind == "date":
        within = f"{exact} BETWEEN {FIRST_DAY} AND {LAST_DAY}"
        return f"datediff('day', DATE '1970-01-01', {readable}) IS DISTINCT FROM CASE WHEN {within} THEN {exact} END"
    within = f"{exact} BETWEEN {FIRST_US} AND {LAST_US}"
    floored = f"({exact} - ({exact} % 1000 + 1000) % 1000) // 1000"
    return f"epoch_ms({readable}) IS DISTINCT FROM CASE WHEN {within} THEN {floored} END"
