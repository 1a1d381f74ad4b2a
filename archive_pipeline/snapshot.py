"""One consistent look at the month in Postgres: its columns, its digest and its rows as Arrow batches.

Belongs here: the exported snapshot, the session it needs, and the SQL over the source table.
Does not: Parquet, S3, or any write; the transaction is read-only.

Digest and rows are read by two connections that share one exported snapshot, so they cannot differ by a row that
was committed in between. The same SQL serves the plain table and, later, its partitioned successor.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import psycopg
import pyarrow as pa
from psycopg import sql

from archive_pipeline.columns import Column, discover
from archive_pipeline.digest import Digest, postgres_column_digests, postgres_digest
from archive_pipeline.errors import MonthOpenError
from archive_pipeline.months import Month
from scaling.databases import Connection, Lsn, Shard
from scaling.errors import UserError

# Bytes of rows in one Arrow batch; a single row may exceed it, so a 100 MB jsonb travels in a batch of its own.
BATCH_BYTES = 16 << 20

# How values print must not depend on the role or the database: it is part of the digest.
SESSION: Mapping[str, str] = {
    "row_security": "off",  # Postgres then refuses instead of filtering rows away
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "TimeZone": "UTC",
    "DateStyle": "ISO, YMD",
    "IntervalStyle": "postgres",
    "extra_float_digits": "1",
    "bytea_output": "hex",
    "lc_monetary": "C",
    "xmlbinary": "base64",
}

OPEN_TRANSACTIONS = """
SELECT (SELECT count(*) FROM pg_stat_activity WHERE xact_start < %(end)s AND datname = current_database()
          AND backend_type = 'client backend' AND pid <> pg_backend_pid())
     + (SELECT count(*) FROM pg_prepared_xacts WHERE prepared < %(end)s AND database = current_database())
"""

# What the month occupies, indexes and TOAST included, as its share of the table. A partitioned parent itself has
# size 0, so the sizes of the whole tree are added up.
BYTES_ESTIMATE = """
SELECT coalesce(sum(pg_total_relation_size(relid)), 0)::bigint, coalesce(sum(greatest(c.reltuples, 0)), 0)::bigint
FROM (SELECT %(table)s::regclass AS relid WHERE NOT EXISTS (SELECT 1 FROM pg_partition_tree(%(table)s::regclass))
      UNION ALL SELECT relid FROM pg_partition_tree(%(table)s::regclass) WHERE isleaf) t
JOIN pg_class c ON c.oid = t.relid
"""


@dataclass(frozen=True, slots=True)
class SourceTable:
    """The table that is archived."""

    schema: str
    name: str

    @classmethod
    def parse(cls, qualified: str) -> "SourceTable":
        """Read ``schema.table``, the form of ARCHIVE_TABLE.

        Args:
            qualified: checked by the settings.
        """
        schema, name = qualified.split(".", 1)
        return cls(schema, name)

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"

    @property
    def identifier(self) -> sql.Identifier:
        """Quoted for SQL."""
        return sql.Identifier(self.schema, self.name)


def require_closed(connection: Connection, month: Month, grace: timedelta) -> None:
    """Refuse a month that may still receive rows, by the database's clock; a worker's clock decides nothing.

    ``created_at`` defaults to the start of the transaction, so one that began before the month's end and still runs
    may commit a row into it later. Of other roles' transactions only those are seen that the role may look at
    (``GRANT pg_read_all_stats``); `grace` covers the rest.

    Args:
        connection: to the database the rows are in.
        month: to be archived.
        grace: how long after its end a month is closed.

    Raises:
        MonthOpenError: with the instant from which the month can be archived, or what is in the way.
    """
    closes_at = month.end + grace
    now, still_running = connection.execute(
        f"SELECT clock_timestamp() >= %(closes_at)s, ({OPEN_TRANSACTIONS})",
        {"closes_at": closes_at, "end": month.end},
    ).fetchone() or (False, 0)
    if not now:
        raise MonthOpenError(
            f"month {month.name} is still open: it can be archived from {closes_at:%Y-%m-%d %H:%M} UTC "
            f"({grace.total_seconds():.0f} s after its end, ARCHIVE_GRACE_SECONDS), by the database's clock"
        )
    if still_running:
        raise MonthOpenError(
            f"month {month.name} is still open: {still_running} database transaction(s) began before its end and may "
            "yet write to it; end them (pg_stat_activity, pg_prepared_xacts) and run the month again"
        )


class Snapshot:
    """What one exported snapshot shows of a month; made by `take`."""

    def __init__(
        self, shard: Shard, connection: Connection, identifier: str, lsn: Lsn, table: SourceTable, month: Month
    ) -> None:
        self._shard = shard
        self._connection = connection
        self._identifier = identifier
        self._table = table
        self._month = month
        self.lsn = lsn

    def columns(self) -> tuple[Column, ...]:
        """The table's columns.

        Raises:
            UserError: see `archive_pipeline.columns.discover`.
        """
        return discover(self._connection, self._table.schema, self._table.name)

    def digest(self, columns: Sequence[Column]) -> Digest:
        """Count and digest the month's rows.

        Args:
            columns: what the digest covers.

        Raises:
            UserError: a value cannot be archived without loss.
        """
        try:
            row = self._connection.execute(postgres_digest(columns, self._rows())).fetchone()
        except psycopg.errors.NumericValueOutOfRange:
            raise UserError(
                f"{self._table} holds a timestamp after the year 294246 in month {self._month.name}, which has no "
                "exact number of microseconds; correct the row"
            ) from None
        rows, value, first, last, not_numbers = row or (0, 0, None, None, 0)
        if not_numbers:
            decimals = ", ".join(column.source for column in columns if column.kind == "decimal")
            raise UserError(
                f"{not_numbers} row(s) of {self._table} in month {self._month.name} hold NaN in {decimals}, "
                "which a decimal column of Athena cannot; set them to NULL, or make the column numeric without "
                "precision"
            )
        return Digest(rows, int(value), first, last)

    def column_digests(self, columns: Sequence[Column]) -> list[int]:
        """One digest value for each column, see `archive_pipeline.digest.postgres_column_digests`.

        Args:
            columns: of the table.
        """
        row = self._connection.execute(postgres_column_digests(columns, self._rows())).fetchone()
        return [int(value) for value in row or ()]

    def bytes_estimate(self, rows: int) -> int | None:
        """Estimate what the month occupies in Postgres, indexes included; None when the table has no statistics.

        Args:
            rows: of the month.
        """
        row = self._connection.execute(
            BYTES_ESTIMATE, {"table": self._table.identifier.as_string(self._connection)}
        ).fetchone()
        size, tuples = row or (0, 0)
        return round(size * min(rows / tuples, 1)) if tuples else None

    def batches(self, columns: Sequence[Column], *, batch_bytes: int = BATCH_BYTES) -> Iterator[pa.RecordBatch]:
        """Stream the month's rows, clustered by (tenant_id, created_at, id) so that row groups prune by tenant.

        The sort runs on the rows as stored, before values are cast: large ones stay behind their TOAST pointers.

        Args:
            columns: to read.
            batch_bytes: about how many bytes a batch holds; a single larger row comes alone.

        Yields:
            Batches of one array for each column, to be passed through `archive_pipeline.columns.stored`.
        """
        from adbc_driver_manager import Error as AdbcError  # 0.1 s to import

        query = sql.SQL(
            "SELECT {reads} FROM (SELECT * FROM {rows} s ORDER BY tenant_id, created_at, id OFFSET 0) r"
        ).format(reads=sql.SQL(", ").join(column.read() for column in columns), rows=self._rows())
        try:
            yield from self._stream(query, batch_bytes)
        except (AdbcError, pa.ArrowException, OSError) as error:  # the latter two in the middle of the stream
            raise _broken_off(self._month) from error

    def _stream(self, query: sql.Composable, batch_bytes: int) -> Iterator[pa.RecordBatch]:
        with self._shard.arrow() as arrow, arrow.cursor() as cursor:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            cursor.execute(self._text(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(self._identifier)))
            for name, value in SESSION.items():
                cursor.execute(self._text(_set_local(name, value)))
            cursor.adbc_statement.set_options(**{"adbc.postgresql.batch_size_hint_bytes": str(batch_bytes)})
            cursor.execute(self._text(query))
            yield from cursor.fetch_record_batch()

    def _rows(self) -> sql.Composed:
        return sql.SQL("(SELECT * FROM {} WHERE created_at >= {} AND created_at < {})").format(
            self._table.identifier, sql.Literal(self._month.start), sql.Literal(self._month.end)
        )

    def _text(self, query: sql.Composable) -> str:
        return query.as_string(self._connection)


@contextmanager
def take(shard: Shard, table: SourceTable, month: Month) -> Iterator[Snapshot]:
    """Take a snapshot of the month and hold it open.

    Args:
        shard: the database.
        table: the source.
        month: whose rows are looked at.

    Raises:
        UserError: the database is not encoded in UTF-8.
    """
    with shard.dedicated(autocommit=False) as connection:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        for name, value in SESSION.items():
            connection.execute(_set_local(name, value))
        row = connection.execute(
            "SELECT pg_export_snapshot(), current_setting('server_encoding'), "
            "CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END::text"
        ).fetchone()
        identifier, encoding, lsn = row or ("", "", "")
        if encoding != "UTF8":
            raise UserError(f"the database is encoded in {encoding} but must be UTF8 to be archived byte for byte")
        try:
            yield Snapshot(shard, connection, identifier, Lsn(lsn), table, month)
        except psycopg.OperationalError:
            raise _broken_off(month) from None


def _broken_off(month: Month) -> UserError:
    return UserError(
        f"Postgres broke off while month {month.name} was read (a restart, a failover, or a cancelled query); "
        "nothing was published; run the month again"
    )


def _set_local(name: str, value: str) -> sql.Composed:
    return sql.SQL("SET LOCAL {} = {}").format(sql.Identifier(name), sql.Literal(value))
