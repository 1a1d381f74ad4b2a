"""Migrations: idempotent, reversible, the same as plain SQL, safe when two processes start at once."""

import re
import subprocess
import sys
from collections.abc import Callable
from typing import LiteralString

import psycopg
import pytest
from psycopg import sql
from rich.console import Console

from devstack.servers import Database
from scaling import migrate
from scaling.__main__ import migrations
from scaling.capabilities import Capability, changes, switched
from scaling.contract import SYNC_ROLES
from scaling.errors import UserError

SCHEMAS = ("archive", "scaling", "sync")
SYNC = frozenset({Capability.INCREMENTAL_SYNC, Capability.PARALLEL_SYNC})

# What a schema is made of, comparable between two ways of making it.
SHAPE = """
SELECT n.nspname, c.relname, c.relkind::text, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
       col_description(c.oid, a.attnum), obj_description(c.oid), c.relrowsecurity, c.relforcerowsecurity,
       c.relacl::text, a.attacl::text,
       (SELECT array_agg(concat(polname, polcmd, polroles::regrole[], pg_get_expr(polqual, polrelid)) ORDER BY polname)
        FROM pg_policy WHERE polrelid = c.oid)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
WHERE n.nspname = ANY(%s)
ORDER BY 1, 2, a.attnum
"""


def shape(database: Database) -> list[tuple[object, ...]]:
    with psycopg.connect(database.admin_dsn) as connection:
        return connection.execute(SHAPE, (list(SCHEMAS),)).fetchall()


def empty(database: Database) -> None:
    with psycopg.connect(database.admin_dsn, autocommit=True) as admin:
        for schema in SCHEMAS:
            admin.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE".encode())


@pytest.fixture
def bare(database: Database) -> Database:
    """The database without the pipeline's schemas, and the right to create them."""
    empty(database)
    change_right(database, "GRANT CREATE ON DATABASE {} TO pipeline")
    return database


def change_right(database: Database, statement: LiteralString) -> None:
    with psycopg.connect(database.admin_dsn, autocommit=True) as admin:
        admin.execute(sql.SQL(statement).format(sql.Identifier(database.name)))


def sync_roles(database: Database) -> set[str]:
    with psycopg.connect(database.admin_dsn) as connection:
        found = connection.execute("SELECT rolname FROM pg_roles WHERE rolname = ANY(%s)", [list(SYNC_ROLES)])
        return {name for (name,) in found}


def test_taking_the_roles_back_leaves_the_schema_as_it_was_without_them(bare: Database) -> None:
    migrate.upgrade(bare.dsn, revision="0004")
    without = shape(bare)
    migrate.upgrade(bare.dsn, revision="0005")
    assert shape(bare) != without
    migrate.downgrade(bare.dsn, revision="0004")
    granted = re.compile(r"pipeline_\w+=")
    assert [str(row) for row in shape(bare) if granted.search(str(row))] == []
    # An access list that was written out once stays so; it then says what no list means: the owner may do everything.
    assert [row[:-3] + row[-1:] for row in shape(bare)] == [row[:-3] + row[-1:] for row in without]
    migrate.upgrade(bare.dsn)


def test_giving_the_roles_their_rights_again_changes_nothing(bare: Database) -> None:
    migrate.upgrade(bare.dsn)
    once = shape(bare)
    with psycopg.connect(bare.dsn) as connection:
        connection.execute("CALL sync.grant_roles()")
    assert shape(bare) == once


def test_migrating_twice_changes_nothing(bare: Database) -> None:
    migrate.upgrade(bare.dsn)
    first = shape(bare)
    migrate.upgrade(bare.dsn)
    assert shape(bare) == first != []


def test_downgrading_removes_everything_but_the_version_table(bare: Database) -> None:
    migrate.upgrade(bare.dsn)
    migrate.downgrade(bare.dsn)
    assert {row[0] for row in shape(bare)} == {"scaling"}
    assert sync_roles(bare) == set(SYNC_ROLES), "roles belong to the server and may be in use elsewhere"
    migrate.upgrade(bare.dsn)
    assert {row[0] for row in shape(bare)} == set(SCHEMAS)


def test_the_plain_sql_makes_the_same_schemas(bare: Database) -> None:
    migrate.upgrade(bare.dsn)
    by_alembic = shape(bare)
    empty(bare)
    with psycopg.connect(bare.dsn, autocommit=True) as connection:
        connection.execute(migrate.as_sql().encode())
    assert shape(bare) == by_alembic


def test_processes_that_start_at_once_migrate_once(bare: Database, settings_environment: Callable[..., None]) -> None:
    settings_environment(bare)
    command = [sys.executable, "-m", "scaling", "migrate"]
    started = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert {row[0] for row in shape(bare)} == set(SCHEMAS)


def test_every_table_and_view_says_what_it_is(bare: Database) -> None:
    migrate.upgrade(bare.dsn)
    undescribed = {f"{row[0]}.{row[1]}" for row in shape(bare) if row[2] in ("r", "p", "v") and row[7] is None} - {
        "scaling.alembic_version"
    }
    assert undescribed == set()


def test_a_role_that_may_not_create_schemas_gets_a_sentence(
    bare: Database, settings_environment: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:

    change_right(bare, "REVOKE CREATE ON DATABASE {} FROM pipeline")
    settings_environment(bare)
    with pytest.raises(UserError, match="GRANT CREATE ON DATABASE"):
        migrations(Console(), as_sql=False)


@pytest.mark.parametrize(("recorded", "kept"), [("true", True), ("NULL", True), ("false", False)])
def test_a_sync_that_was_in_force_stays_so_when_thresholds_begin_to_decide_it(
    bare: Database, recorded: LiteralString, kept: bool
) -> None:
    migrate.upgrade(bare.dsn, revision="0008")
    with psycopg.connect(bare.admin_dsn, autocommit=True) as admin:
        admin.execute(
            sql.SQL(
                "INSERT INTO sync.runs (run_id, shard, of, incremental, parallel) VALUES ('r', 0, 1, {0}, {0})"
            ).format(sql.SQL(recorded))
        )
    migrate.upgrade(bare.dsn)
    with psycopg.connect(bare.dsn) as connection:
        assert switched(connection) == (SYNC if kept else frozenset())
        assert len(changes(connection)) == 2 * kept


def test_a_new_installation_has_nothing_switched_on(bare: Database) -> None:
    migrate.upgrade(bare.dsn)
    with psycopg.connect(bare.dsn) as connection:
        assert switched(connection) == frozenset()
