"""The database's clock, moved by hand: schema `virtual` hides `now()` and `clock_timestamp()` behind a one-row table.

Belongs here: installing it in a database, connecting under it, moving it.
Does not: the simulator's clock (devstack.google_calendar), which tests move beside this one.

It stands still between two moves. Only sessions opened with `dsn(...)` see it. Column defaults and views are bound to a
function when they are made, so `install` binds those of schema `sync` again; `CURRENT_TIMESTAMP` and its like are
keywords, which nothing can hide.

    virtual_clock.install(database.admin_dsn, datetime(2026, 6, 1, tzinfo=UTC))
    shard = Shard("main", virtual_clock.dsn(database.dsn))
    virtual_clock.advance(database.admin_dsn, 60.0)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from urllib.parse import quote

import psycopg
from psycopg import sql
from psycopg.rows import TupleRow

Admin = str | psycopg.Connection[TupleRow]
"""The superuser's DSN, or, for thousands of moves, a connection of his that is open already, in autocommit."""

SEARCH_PATH = "virtual,pg_catalog,public"

_INSTALL = """
CREATE SCHEMA IF NOT EXISTS virtual;
CREATE TABLE IF NOT EXISTS virtual.clock (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row), at timestamptz NOT NULL
) WITH (fillfactor = 10);
CREATE OR REPLACE FUNCTION virtual.now() RETURNS timestamptz LANGUAGE sql STABLE PARALLEL SAFE
    RETURN (SELECT at FROM virtual.clock);
CREATE OR REPLACE FUNCTION virtual.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE PARALLEL SAFE
    RETURN (SELECT at FROM virtual.clock);
GRANT USAGE ON SCHEMA virtual TO pipeline;
GRANT SELECT ON virtual.clock TO pipeline;
"""
_DEFAULTS = """
SELECT d.adrelid::regclass::text, a.attname
FROM pg_attrdef d
JOIN pg_attribute a ON (a.attrelid, a.attnum) = (d.adrelid, d.adnum)
JOIN pg_class c ON c.oid = d.adrelid
WHERE c.relnamespace = 'sync'::regnamespace AND pg_get_expr(d.adbin, d.adrelid) = 'now()'
"""
_VIEWS = """
SELECT c.relname, pg_get_viewdef(c.oid) FROM pg_class c
WHERE c.relnamespace = 'sync'::regnamespace AND c.relkind = 'v' AND pg_get_viewdef(c.oid) LIKE '%now()%'
"""


def install(admin_dsn: str, at: datetime | None = None) -> None:
    """Put the clock into a database.

    Args:
        admin_dsn: the superuser's.
        at: where it begins; None is the present.
    """
    with psycopg.connect(admin_dsn, autocommit=True) as connection:
        connection.execute(_INSTALL)
        set(connection, at or datetime.now(UTC))
        defaults, views = connection.execute(_DEFAULTS).fetchall(), connection.execute(_VIEWS).fetchall()
        connection.execute(sql.SQL("SET search_path = {}").format(sql.SQL(SEARCH_PATH)))
        for table, column in defaults:
            statement = sql.SQL("ALTER TABLE {} ALTER COLUMN {} SET DEFAULT now()")
            connection.execute(statement.format(sql.SQL(table), sql.Identifier(column)))
        for view, definition in views:
            statement = sql.SQL("CREATE OR REPLACE VIEW {} WITH (security_invoker = true) AS {}")
            connection.execute(statement.format(sql.Identifier("sync", view), sql.SQL(definition)))


def dsn(plain: str) -> str:
    """The same database as seen by sessions that live in virtual time.

    Args:
        plain: a `postgresql://` URL without options of its own.

    Returns:
        A URL, good for `Shard`, for psycopg and as DATABASE_URL.
    """
    return f"{plain}{'&' if '?' in plain else '?'}options={quote(f'-c search_path={SEARCH_PATH}')}"


def set(admin: Admin, at: datetime) -> None:  # noqa: A001  # always read as virtual_clock.set
    """Move to a moment.

    Args:
        admin: who may.
        at: aware; going back is fine.
    """
    with _connected(admin) as connection:
        connection.execute(
            "INSERT INTO virtual.clock (at) VALUES (%s) ON CONFLICT (only_row) DO UPDATE SET at = excluded.at", [at]
        )


def advance(admin: Admin, seconds: float) -> datetime:
    """Move forward.

    Args:
        admin: who may.
        seconds: how far.

    Returns:
        The new present.
    """
    with _connected(admin) as connection:
        row = connection.execute(
            "UPDATE virtual.clock SET at = at + %s RETURNING at", [timedelta(seconds=seconds)]
        ).fetchone()
    return _moment(row)


def now(admin: Admin) -> datetime:
    """Read the clock.

    Args:
        admin: who may.

    Returns:
        The virtual present.
    """
    with _connected(admin) as connection:
        return _moment(connection.execute("SELECT at FROM virtual.clock").fetchone())


def _moment(row: TupleRow | None) -> datetime:
    if row is None:
        raise AssertionError("virtual_clock.install has not run in this database")
    moment: datetime = row[0]
    return moment


@contextmanager
def _connected(admin: Admin) -> Iterator[psycopg.Connection[TupleRow]]:
    if isinstance(admin, psycopg.Connection):
        yield admin
    else:
        with psycopg.connect(admin, autocommit=True) as connection:
            yield connection
