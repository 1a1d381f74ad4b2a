"""The only way to a database: every connection of both pipelines comes from the router.

Belongs here: which database serves a tenant, pools, dedicated and Arrow connections, read-only readers.
Does not: SQL of any pipeline.

One shard and no replica is one DSN. A further shard or a replica changes this module and nothing else,
because callers already say which tenant they mean and how fresh a read must be.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, NewType, Self
from uuid import UUID

import psycopg
from psycopg import conninfo
from psycopg.rows import TupleRow
from psycopg_pool import ConnectionPool, PoolTimeout

from scaling import tracing
from scaling.errors import UserError
from scaling.settings import DatabaseSettings

if TYPE_CHECKING:
    from adbc_driver_manager.dbapi import Connection as ArrowConnection

Connection = psycopg.Connection[TupleRow]

Lsn = NewType("Lsn", str)
"""A write-ahead log position as Postgres prints it, for example ``0/16B3748``."""

CONNECT_TIMEOUT_SECONDS = 10
IDLE_IN_TRANSACTION_SECONDS = 60
"""A process that freezes inside a transaction loses it, and with it the row locks others wait for."""


class Shard:
    """One Postgres database that holds the rows of some tenants, with its pool.

    The DSN never shows in a repr or an error.
    """

    def __init__(
        self,
        name: str,
        dsn: str,
        *,
        pool_size: int = 16,
        application_name: str = "pipeline",
        owner_dsn: str | None = None,
        replica_dsn: str | None = None,
    ) -> None:
        self.name = name
        self._dsn = conninfo.make_conninfo(
            dsn, application_name=application_name, connect_timeout=CONNECT_TIMEOUT_SECONDS
        )
        self._url = dsn
        self._owner_dsn = (
            conninfo.make_conninfo(
                owner_dsn, application_name=application_name, connect_timeout=CONNECT_TIMEOUT_SECONDS
            )
            if owner_dsn
            else None
        )
        self.replica: Shard | None = (
            Shard(name, replica_dsn, pool_size=pool_size, application_name=application_name) if replica_dsn else None
        )
        self._pool: ConnectionPool[Connection] = ConnectionPool(
            self._dsn,
            kwargs={"cursor_factory": tracing.cursor_factory()},
            min_size=0,
            max_size=pool_size,
            open=False,
            name=f"shard-{name}",
            check=ConnectionPool.check_connection,
            configure=_configure,
            timeout=2 * CONNECT_TIMEOUT_SECONDS,
            reconnect_timeout=CONNECT_TIMEOUT_SECONDS,
        )

    def __repr__(self) -> str:
        return f"Shard({self.name!r})"

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Lend a pooled connection for one transaction: committed at the end, rolled back on an exception.

        Raises:
            UserError: the database does not answer.
        """
        self._pool.open()
        try:
            with tracing.waiting("connection"):
                connection = self._pool.getconn()
        except PoolTimeout:
            raise self._unreachable() from None
        try:
            with tracing.committed(connection.transaction()):
                yield connection
        finally:
            self._pool.putconn(connection)

    @contextmanager
    def dedicated(self, *, autocommit: bool = True) -> Iterator[Connection]:
        """Open a connection of its own, for session state: advisory locks, exported snapshots, long exports.

        Args:
            autocommit: False starts a transaction with the first statement; it is committed at the end,
                rolled back on an exception.

        Raises:
            UserError: the database does not answer.
        """
        try:
            with tracing.waiting("connection"):
                connection = psycopg.connect(self._dsn, autocommit=autocommit, cursor_factory=tracing.cursor_factory())
        except psycopg.OperationalError:
            raise self._unreachable() from None
        with connection if autocommit else tracing.committed(connection):
            yield connection

    @contextmanager
    def owner(self, *, autocommit: bool = True) -> Iterator[Connection]:
        """Open a connection as the role that owns the audit logs, for what only an owner may do to a table.

        Args:
            autocommit: False starts a transaction with the first statement; it is committed at the end,
                rolled back on an exception.

        Raises:
            UserError: no such login is configured, or the database does not answer.
        """
        if self._owner_dsn is None:
            raise UserError(
                "DATABASE_OWNER_URL is not set, the login of the role that owns the audit logs; only the owner can "
                "partition, prune or restore the table"
            )
        try:
            with tracing.waiting("connection"):
                connection = psycopg.connect(
                    self._owner_dsn, autocommit=autocommit, cursor_factory=tracing.cursor_factory()
                )
        except psycopg.OperationalError:
            raise UserError(
                f"the database of shard {self.name!r} does not answer or refuses the login of DATABASE_OWNER_URL"
            ) from None
        with connection if autocommit else tracing.committed(connection):
            yield connection

    @contextmanager
    def arrow(self) -> Iterator["ArrowConnection"]:
        """Open an ADBC connection, which reads query results as Arrow record batches; autocommit is off."""
        from adbc_driver_postgresql import dbapi  # 0.1 s to import, needed by the archive only

        connection = dbapi.connect(self._url)
        try:
            yield connection
        finally:
            connection.close()

    def close(self) -> None:
        """Close the pool; connections still lent out are closed when they come back."""
        self._pool.close()
        if self.replica is not None:
            self.replica.close()

    def _unreachable(self) -> UserError:
        where = conninfo.conninfo_to_dict(self._dsn)
        return UserError(
            f"the database of shard {self.name!r} at {where.get('host', 'localhost')}:{where.get('port', 5432)} "
            "does not answer or refuses the login; check DATABASE_URL"
        )


def _configure(connection: Connection) -> None:
    connection.execute(f"SET idle_in_transaction_session_timeout = '{IDLE_IN_TRANSACTION_SECONDS}s'".encode())
    connection.commit()


class DatabaseRouter:
    """Which database serves a tenant.

    Today every tenant lives on the one shard given, which also serves the reads.
    """

    def __init__(self, shard: Shard) -> None:
        self._shard = shard

    @classmethod
    def from_settings(cls, settings: DatabaseSettings, *, application_name: str = "pipeline") -> Self:
        """Make the router of the configured database.

        Args:
            settings: where the database is.
            application_name: shown in ``pg_stat_activity``.
        """
        return cls(
            Shard(
                "main",
                settings.database_url.get_secret_value(),
                pool_size=settings.database_pool_size,
                application_name=application_name,
                owner_dsn=settings.database_owner_url.get_secret_value() if settings.database_owner_url else None,
                replica_dsn=settings.database_replica_url.get_secret_value() if settings.database_replica_url else None,
            )
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def shards(self) -> tuple[Shard, ...]:
        """All databases, for work that is not one tenant's: leasing, archiving, checking."""
        return (self._shard,)

    def shard(self, name: str) -> Shard:
        """The shard of that name.

        Raises:
            UserError: there is none.
        """
        for shard in self.shards():
            if shard.name == name:
                return shard
        raise UserError(f"there is no database shard {name!r}; known: {', '.join(s.name for s in self.shards())}")

    @contextmanager
    def writer(self, tenant: UUID) -> Iterator[Connection]:
        """Lend a connection to the tenant's primary for one transaction.

        Args:
            tenant: whose rows are written.
        """
        with self._shard_of(tenant).transaction() as connection:
            yield connection

    @contextmanager
    def reader(self, tenant: UUID, *, at_least: Lsn | None = None) -> Iterator[Connection]:
        """Lend a connection for one read-only transaction over the tenant's rows.

        Args:
            tenant: whose rows are read.
            at_least: the read must see everything up to this position; the primary always does.
        """
        del at_least  # the primary serves every read, so any position is met
        with self._shard_of(tenant).transaction() as connection:
            connection.execute("SET TRANSACTION READ ONLY")
            yield connection

    def close(self) -> None:
        """Close every pool."""
        for shard in self.shards():
            shard.close()

    def _shard_of(self, tenant: UUID) -> Shard:
        del tenant
        return self._shard
