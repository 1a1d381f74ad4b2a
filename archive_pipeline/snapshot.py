"""One consistent look at the month in Postgres: its columns, its digest and its rows as Arrow batches.

Belongs here: the exported snapshot, the session it needs, where it is taken (primary or replica), and the SQL over the
source table. Does not: Parquet, S3, or any write; the transaction is read-only.

Several connections share one exported snapshot, so they cannot differ by a row that was committed in between. Postgres
computes each row's MD5 in the query that reads it, which saves a second look at every value. The same SQL serves
the plain table and its partitioned successor.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import psycopg
import pyarrow as pa
import pyarrow.compute as pc
from psycopg import sql

from archive_pipeline.clustering import Key
from archive_pipeline.columns import Column, discover
from archive_pipeline.digest import (
    Digest,
    digest_of_rows,
    postgres_column_digests,
    postgres_digest,
    postgres_row_md5,
)
from archive_pipeline.errors import MonthOpenError, SourceLostError
from archive_pipeline.months import Month
from scaling import tracing
from scaling.databases import Connection, Lsn, Shard
from scaling.errors import UserError
from scaling.logs import Event, event

if TYPE_CHECKING:
    from adbc_driver_manager.dbapi import Cursor as ArrowCursor

logger = logging.getLogger(__name__)

# Bytes of rows in one Arrow batch; a single row may exceed it, so a 100 MB jsonb travels in a batch of its own.
BATCH_BYTES = 4 << 20

# Blocks one connection reads with one statement: 32 MiB, so that connections finish at about the same time.
BLOCKS_A_RANGE = 4096
# A month that is a smaller share of its table than this is looked for first, so that not every block is read.
SMALL_SHARE = 0.5
SAMPLE_ROWS = 20_000
IDS_A_STATEMENT = 50_000

# What identifies the cluster that a standby replays; NULL for a server that is none.
CLUSTER = "SELECT system_identifier FROM pg_control_system() WHERE pg_is_in_recovery()"
REPLICA_PATIENCE_SECONDS = 120.0
REPLICA_LOOK_SECONDS = 0.5

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
     + (SELECT count(DISTINCT virtualtransaction) FROM pg_locks l JOIN pg_database d ON d.oid = l.database
        WHERE d.datname = current_database() AND pid IS NULL AND mode NOT IN ('AccessShareLock', 'RowShareLock')
          AND relation IN (SELECT to_regclass(%(table)s) UNION
                           SELECT relid FROM pg_partition_tree(to_regclass(%(table)s))))
"""

LEAVES = """
(SELECT %(table)s::regclass AS relid WHERE NOT EXISTS (SELECT 1 FROM pg_partition_tree(%(table)s::regclass))
 UNION ALL SELECT relid FROM pg_partition_tree(%(table)s::regclass) WHERE isleaf)
"""

# What the table occupies, indexes and TOAST included. A partitioned parent itself has size 0, so the whole tree is
# added up. The blocks are those of the largest leaf: a range of blocks means those of every leaf.
SIZE = f"""
SELECT coalesce(sum(pg_total_relation_size(relid)), 0)::bigint, coalesce(sum(pg_table_size(relid)), 0)::bigint,
       coalesce(sum(greatest(c.reltuples, 0)), 0)::bigint,
       coalesce(max(pg_relation_size(relid)) / current_setting('block_size')::bigint, 0)::bigint
FROM {LEAVES} t JOIN pg_class c ON c.oid = t.relid
"""  # noqa: S608 - constants only


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


def require_closed(connection: Connection, table: SourceTable, month: Month, grace: timedelta) -> Lsn:
    """Refuse a month that may still receive rows, by the database's clock; a worker's clock decides nothing.

    ``created_at`` defaults to the start of the transaction, so one that began before the month's end and still runs
    may commit a row into it later. Of other roles' transactions only those are seen that the role may look at
    (``GRANT pg_read_all_stats``); `grace` covers the rest. When a prepared one began, Postgres does not say
    (``prepared`` is later), so each that has written to the table counts, by its locks.

    Args:
        connection: to the database the rows are in.
        table: the source.
        month: to be archived.
        grace: how long after its end a month is closed.

    Returns:
        The write-ahead log position by which every row of the month had been written.

    Raises:
        MonthOpenError: with the instant from which the month can be archived, or what is in the way.
    """
    closes_at = month.end + grace
    now, still_running = connection.execute(
        f"SELECT clock_timestamp() >= %(closes_at)s, ({OPEN_TRANSACTIONS})",
        {"closes_at": closes_at, "end": month.end, "table": table.identifier.as_string(connection)},
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
    # Of the last insertion, not of the last write: rows committed with synchronous_commit = off are seen before that.
    row = connection.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
    return Lsn(row[0] if row else "")


@dataclass(frozen=True, slots=True)
class Extent:
    """How much there is to read of a month, estimated from Postgres' statistics.

    Attributes:
        rows: of the month.
        size: bytes the month occupies, indexes and TOAST included.
        row_bytes: the same without indexes.
        blocks: the ranges of blocks that hold every row of the month, one after the other; the last is open.
        sample: keys of some of its rows.
    """

    rows: int
    size: int
    row_bytes: int
    blocks: tuple[tuple[int, int | None], ...]
    sample: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class ErasedValue:
    """A value whose rows were erased from the archive, as far as that is still known.

    Attributes:
        request: id of the request, which keys the hash.
        column: of the table.
        value_sha256: of ``<request>:<value as text>``, hex.
        requested_at: rows made later are none that somebody asked to erase.
    """

    request: str
    column: str
    value_sha256: str
    requested_at: datetime


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
        """Count and digest the month's rows without reading them out.

        Args:
            columns: what the digest covers.

        Raises:
            UserError: a value cannot be archived without loss.
        """
        with self._whole():
            return _digest(self._connection, columns, self._rows(), f"{self._table} in month {self._month.name}")

    def column_digests(self, columns: Sequence[Column]) -> list[int]:
        """One digest value for each column, see `archive_pipeline.digest.postgres_column_digests`.

        Args:
            columns: of the table.
        """
        row = self._connection.execute(postgres_column_digests(columns, self._rows())).fetchone()
        return [int(value) for value in row or ()]

    def extent(self, columns: Sequence[Column]) -> Extent:
        """Estimate what there is to read, and where it lies.

        Args:
            columns: of the table.
        """
        table = self._table.identifier.as_string(self._connection)
        measured = self._connection.execute(SIZE.encode(), {"table": table}).fetchone()
        size, row_bytes, tuples, blocks = measured or (0, 0, 0, 0)
        explain = sql.SQL("EXPLAIN (FORMAT JSON) SELECT FROM {} r").format(self._rows())
        (plan,) = self._connection.execute(explain).fetchone() or ([],)
        rows = int(plan[0]["Plan"]["Plan Rows"])
        share = min(rows / tuples, 1.0) if tuples else 1.0
        first, last = 0, int(blocks)
        if share < SMALL_SHARE and blocks > BLOCKS_A_RANGE:
            first, last = self._where()
        starts = list(range(first, max(last, first + 1), BLOCKS_A_RANGE))
        ranges = tuple(zip(starts, [*starts[1:], None], strict=True))
        return Extent(rows, round(size * share), round(row_bytes * share), ranges, self._sample(columns, rows))

    def extract(
        self,
        columns: Sequence[Column],
        extent: Extent,
        take: Callable[[pa.RecordBatch], None],
        *,
        parallelism: int = 1,
        batch_bytes: int = BATCH_BYTES,
        ids: Sequence[str] | None = None,
    ) -> Digest:
        """Read the month's rows over several connections, in no order, with the digest that Postgres computes of them.

        Args:
            columns: to read.
            extent: of the month.
            take: is given batches of one array for each column, to be passed through `archive_pipeline.columns.stored`;
                called by several threads.
            parallelism: connections.
            batch_bytes: about how many bytes a batch holds; a single larger row comes alone.
            ids: only rows with these ids, as text; None reads all.

        Returns:
            Count and digest of the rows, from the MD5 that Postgres sent with each.

        Raises:
            UserError: a value cannot be archived without loss, or Postgres broke off.
        """
        if ids is None:
            statements = [self._statement(columns, blocks) for blocks in extent.blocks]
        else:
            chunks = [ids[start : start + IDS_A_STATEMENT] for start in range(0, len(ids), IDS_A_STATEMENT)]
            statements = [self._statement(columns, None, chunk) for chunk in chunks]
        todo, lock, stopped = iter(statements), threading.Lock(), threading.Event()

        def work() -> Digest:
            total = Digest()
            try:
                with tracing.span("read"), self._arrow(batch_bytes) as cursor:
                    while not stopped.is_set():
                        with lock:
                            statement = next(todo, None)
                        if statement is None:
                            break
                        cursor.execute(statement)
                        for batch in cursor.fetch_record_batch():
                            total += self._taken(columns, batch, take)
                            if stopped.is_set():
                                break
                    tracing.counted({"rows": total.rows})
            except BaseException:
                stopped.set()
                raise
            return total

        workers = max(1, min(parallelism, len(statements)))
        with self._whole(), ThreadPoolExecutor(workers, thread_name_prefix="extract") as pool:
            carried = tracing.carried(work)
            started = [pool.submit(carried) for _ in range(workers)]
            return sum((each.result() for each in started), Digest())

    def row_digests(self, columns: Sequence[Column], take: Callable[[pa.RecordBatch], None]) -> None:
        """Read (id as text, MD5 of the row's text) of every row of the month, to find those that are not archived.

        Args:
            columns: what the MD5 covers.
            take: is given batches of two arrays.

        Raises:
            UserError: Postgres broke off.
        """
        identity = next(number for number, column in enumerate(columns) if column.source == "id")
        query = sql.SQL("SELECT {id}::text, {md5} FROM (SELECT {reads} FROM {rows} r OFFSET 0) e").format(
            id=sql.Identifier(f"v{identity}"),
            md5=postgres_row_md5(columns),
            reads=_reads(columns),
            rows=self._rows(),
        )
        with self._whole(), self._arrow(BATCH_BYTES) as cursor:
            cursor.execute(self._text(query))
            for batch in cursor.fetch_record_batch():
                take(batch)

    def erased(self, values: Sequence[ErasedValue]) -> frozenset[str]:
        """Find rows of the month that were erased from the archive and are still here.

        Args:
            values: that were erased.

        Returns:
            Their ids as text.
        """
        present = {column.source for column in self.columns()}
        ids: set[str] = set()
        for value in values:
            if value.column not in present:
                continue
            hashed = sql.SQL("encode(sha256(convert_to({} || ':' || {}::text, 'UTF8')), 'hex')").format(
                sql.Literal(value.request), sql.Identifier(value.column)
            )
            found = self._connection.execute(
                sql.SQL("SELECT id::text FROM {} r WHERE created_at < {} AND {} = {}").format(
                    self._rows(), sql.Literal(value.requested_at), hashed, sql.Literal(value.value_sha256)
                )
            )
            ids.update(identifier for (identifier,) in found)
        return frozenset(ids)

    def filled(self, columns: Sequence[Column], ids: Sequence[str]) -> list[str]:
        """Find columns in which any of some rows holds a value.

        Args:
            columns: to look at.
            ids: of the rows, as text.

        Returns:
            The names of such columns.
        """
        if not columns:
            return []
        counts = sql.SQL(", ").join(sql.SQL("count({})").format(sql.Identifier(column.source)) for column in columns)
        row = self._connection.execute(
            sql.SQL("SELECT {} FROM {} r WHERE id::text = ANY (%s)").format(counts, self._rows()), (list(ids),)
        ).fetchone()
        return [column.source for column, count in zip(columns, row or (), strict=True) if count]

    def _taken(
        self, columns: Sequence[Column], batch: pa.RecordBatch, take: Callable[[pa.RecordBatch], None]
    ) -> Digest:
        if not batch.num_rows:
            return Digest()
        for number, column in enumerate(columns):
            if column.kind == "decimal" and (bad := pc.sum(pc.equal(batch.column(number), "NaN")).as_py()):
                raise _not_a_number(bad, f"{self._table} in month {self._month.name}", [column])
        created_at = next(number for number, column in enumerate(columns) if column.source == "created_at")
        digest = digest_of_rows(batch.column(len(columns)), batch.column(created_at))
        take(pa.RecordBatch.from_arrays(batch.columns[:-1], names=[f"v{number}" for number in range(len(columns))]))
        return digest

    def _statement(
        self, columns: Sequence[Column], blocks: tuple[int, int | None] | None, ids: Sequence[str] | None = None
    ) -> str:
        within: list[sql.Composable] = [sql.SQL("true")]
        if blocks is not None:
            first, end = blocks
            within = [sql.SQL("ctid >= {}::tid").format(sql.Literal(f"({first},0)"))]
            within += [sql.SQL("ctid < {}::tid").format(sql.Literal(f"({end},0)"))] if end is not None else []
        if ids is not None:
            within.append(sql.SQL("id::text = ANY ({})").format(sql.Literal(list(ids))))
        return self._text(
            sql.SQL("SELECT {values}, {md5} AS row_md5 FROM (SELECT {reads} FROM {rows} r OFFSET 0) e").format(
                values=sql.SQL(", ").join(sql.Identifier(f"v{number}") for number in range(len(columns))),
                md5=postgres_row_md5(columns),
                reads=_reads(columns),
                rows=self._rows(sql.SQL(" AND ").join(within)),
            )
        )

    def _where(self) -> tuple[int, int]:
        """First and last block with a row of the month; an index on created_at makes it cheap."""
        row = self._connection.execute(
            sql.SQL("SELECT min(ctid)::text, max(ctid)::text FROM {} r").format(self._rows(columns=sql.SQL("ctid")))
        ).fetchone()
        first, last = (int(each[1:].split(",")[0]) if each else 0 for each in row or (None, None))
        return first, last + 1

    def _sample(self, columns: Sequence[Column], rows: int) -> tuple[Key, ...]:
        tenant = next(column for column in columns if column.source == "tenant_id")
        time_ = next(column for column in columns if column.source == "created_at")
        percent = min(100.0, 100.0 * SAMPLE_ROWS / rows) if rows else 100.0
        sampled = self._connection.execute(
            sql.SQL(
                "SELECT {tenant}, {time} FROM {table} r TABLESAMPLE SYSTEM ({percent}) REPEATABLE (1) WHERE {month}"
            ).format(
                tenant=tenant.read(),
                time=time_.read(),
                table=self._table.identifier,
                percent=sql.Literal(percent),
                month=self._within_month(),
            )
        )  # fmt: skip
        return tuple((getattr(key, "bytes", key), us) for key, us in sampled)

    @contextmanager
    def _arrow(self, batch_bytes: int) -> Iterator["ArrowCursor"]:
        with self._shard.arrow() as arrow, arrow.cursor() as cursor:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            cursor.execute(self._text(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(self._identifier)))
            for name, value in SESSION.items():
                cursor.execute(self._text(_set_local(name, value)))
            cursor.adbc_statement.set_options(**{"adbc.postgresql.batch_size_hint_bytes": str(batch_bytes)})
            yield cursor

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Turn what goes wrong in the middle of reading into a sentence."""
        from adbc_driver_manager import Error as AdbcError  # 0.1 s to import

        try:
            yield
        except psycopg.errors.NumericValueOutOfRange:
            raise self._too_late() from None
        except (AdbcError, pa.ArrowException, OSError) as error:  # the latter two in the middle of the stream
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of this machine's disk
            if isinstance(error, MemoryError) or (isinstance(error, OSError) and "memory" in str(error)):  # libpq's
                raise MemoryError from None
            if self._has_unreachable_time():
                raise self._too_late() from None
            raise SourceLostError(self._month.name) from error

    def _has_unreachable_time(self) -> bool:
        """Whether a time is the reason: the stream's errors carry no code."""
        times = [column.source for column in self.columns() if column.kind in ("instant", "wall")]
        late = sql.SQL(" OR ").join(
            sql.SQL("(isfinite({0}) AND {0} > '294246-12-31')").format(sql.Identifier(each)) for each in times
        )
        found = self._connection.execute(sql.SQL("SELECT FROM {} r WHERE {} LIMIT 1").format(self._rows(), late))
        return bool(found.rowcount)

    def _too_late(self) -> UserError:
        return UserError(
            f"{self._table} holds a timestamp after the year 294246 in month {self._month.name}, which has no "
            "exact number of microseconds; correct the row"
        )

    def _rows(self, further: sql.Composable | None = None, columns: sql.Composable | None = None) -> sql.Composed:
        return sql.SQL("(SELECT {} FROM {} WHERE {} AND {})").format(
            columns or sql.SQL("*"), self._table.identifier, self._within_month(), further or sql.SQL("true")
        )

    def _within_month(self) -> sql.Composed:
        return _within(self._month)

    def _text(self, query: sql.Composable) -> str:
        return query.as_string(self._connection)


def digest_of(
    connection: Connection, relation: SourceTable, columns: Sequence[Column], month: Month | None = None
) -> Digest:
    """Count and digest the rows of a relation in the caller's transaction, for instance under a lock.

    Args:
        connection: in a transaction; the settings that values print by are set for the rest of it.
        relation: the table.
        columns: what the digest covers.
        month: only its rows; None takes all.

    Returns:
        The digest, as Postgres computes it.

    Raises:
        UserError: a value has no exact form in the archive.
    """
    for name, value in SESSION.items():
        connection.execute(_set_local(name, value))
    rows = sql.SQL("(SELECT * FROM {} WHERE {})").format(
        relation.identifier, _within(month) if month else sql.SQL("true")
    )
    return _digest(connection, columns, rows, str(relation))


def _digest(connection: Connection, columns: Sequence[Column], rows: sql.Composable, where: str) -> Digest:
    found = connection.execute(postgres_digest(columns, rows)).fetchone()
    count, value, first, last, not_numbers = found or (0, 0, None, None, 0)
    if not_numbers:
        raise _not_a_number(not_numbers, where, [column for column in columns if column.kind == "decimal"])
    return Digest(count, int(value), first, last)


def _not_a_number(rows: int, where: str, columns: Sequence[Column]) -> UserError:
    return UserError(
        f"{rows} row(s) of {where} hold NaN in {', '.join(column.source for column in columns)}, "
        "which a decimal column of Athena cannot; set them to NULL, or make the column numeric without precision"
    )


def _reads(columns: Sequence[Column]) -> sql.Composed:
    return sql.SQL(", ").join(
        sql.SQL("{} AS {}").format(column.read(), sql.Identifier(f"v{number}")) for number, column in enumerate(columns)
    )


def _within(month: Month) -> sql.Composed:
    return sql.SQL("created_at >= {} AND created_at < {}").format(sql.Literal(month.start), sql.Literal(month.end))


def caught_up_replica(
    shard: Shard,
    at_least: Lsn,
    *,
    patience: float = REPLICA_PATIENCE_SECONDS,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Shard | None:
    """Find the replica to read from, once it shows everything up to a position.

    Args:
        shard: the database.
        at_least: position of the primary that the replica must have replayed.
        patience: seconds to wait for it.
        clock: seconds.
        sleep: waits.

    Returns:
        The replica; None when there is none, it does not answer, it is none of this database, or it stays behind: then
        the primary is read.
    """
    if shard.replica is None:
        return None
    with shard.transaction() as primary:
        [(mine,)] = primary.execute("SELECT system_identifier FROM pg_control_system()").fetchall()
    began = clock()
    while True:
        try:
            with shard.replica.dedicated() as connection:
                [(cluster, shows)] = connection.execute(
                    f"SELECT ({CLUSTER}), pg_last_wal_replay_lsn() >= %s::pg_lsn", (at_least,)
                ).fetchall()
        except UserError:
            logger.warning(
                "the replica of shard %s does not answer; the primary is read",
                shard.name,
                extra=event(Event.REPLICA_SKIPPED, shard=shard.name),
            )
            return None
        if cluster != mine:
            # Promoted, or the replica of another database: its positions say nothing about this one's rows.
            logger.warning(
                "DATABASE_REPLICA_URL of shard %s is no replica of it; the primary is read",
                shard.name,
                extra=event(Event.REPLICA_SKIPPED, shard=shard.name),
            )
            return None
        if shows:
            return shard.replica
        if clock() - began > patience:
            logger.warning(
                "the replica of shard %s is behind by more than %.0f s; the primary is read",
                shard.name,
                patience,
                extra=event(Event.REPLICA_SKIPPED, shard=shard.name),
            )
            return None
        sleep(REPLICA_LOOK_SECONDS)


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
    try:  # around the connection: its COMMIT is the last statement that a lost server can fail
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
            yield Snapshot(shard, connection, identifier, Lsn(lsn), table, month)
    except psycopg.OperationalError:
        raise SourceLostError(month.name) from None


def _set_local(name: str, value: str) -> sql.Composed:
    return sql.SQL("SET LOCAL {} = {}").format(sql.Identifier(name), sql.Literal(value))
