"""The data contract against a live database: every breach is named with its remedy."""

import subprocess
import sys
from collections.abc import Callable

import psycopg
import pytest
from cryptography.fernet import Fernet

from devstack.servers import Database
from scaling.contract import Breach, check, contract
from scaling.databases import Shard

COLUMNS = [(table, column) for table in contract() for column in table.columns]


def breaches(database: Database) -> list[Breach]:
    with Shard("main", database.dsn).dedicated() as connection:
        return check(connection, contract())


def change(database: Database, statement: str) -> None:
    with psycopg.connect(database.admin_dsn, autocommit=True) as admin:
        admin.execute(statement.encode())


def test_the_database_of_the_devstack_keeps_the_contract(database: Database) -> None:
    assert breaches(database) == []


@pytest.mark.parametrize("table", contract(), ids=lambda table: table.qualified)
def test_a_missing_table_is_named_with_the_columns_it_needs(database: Database, table: object) -> None:
    name = table.qualified  # type: ignore[attr-defined]
    change(database, f"DROP TABLE {name} CASCADE")
    (found,) = breaches(database)
    assert (found.table, found.column) == (name, None)
    assert f"table {name} does not exist" in found.sentence


@pytest.mark.parametrize(("table", "column"), COLUMNS, ids=lambda part: getattr(part, "name", str(part)))
def test_a_missing_column_is_named_and_nothing_else_is(database: Database, table: object, column: object) -> None:
    qualified, name = table.qualified, column.name  # type: ignore[attr-defined]
    change(database, f"ALTER TABLE {qualified} DROP COLUMN {name} CASCADE")
    assert [(found.table, found.column) for found in breaches(database)] == [(qualified, name)]


def test_a_column_of_the_wrong_type_is_named_with_both_types(database: Database) -> None:
    change(database, "DROP VIEW v_recent_audit_logs")
    change(database, "DROP POLICY no_back_dating ON audit_logs")
    change(database, "ALTER TABLE audit_logs ALTER created_at TYPE timestamp")
    (found,) = breaches(database)
    assert "public.audit_logs.created_at is timestamp without time zone but must be timestamp with" in found.sentence


def test_a_nullable_column_breaks_the_contract_only_once_it_holds_a_null(database: Database) -> None:
    change(database, "ALTER TABLE audit_logs ALTER created_at DROP NOT NULL")
    assert breaches(database) == []
    change(database, "INSERT INTO tenants (id, name) VALUES (gen_random_uuid(), 'one')")
    change(database, "INSERT INTO audit_logs (tenant_id, action, created_at) SELECT id, 'x', NULL FROM tenants")
    (found,) = breaches(database)
    assert "public.audit_logs.created_at holds NULLs but must not" in found.sentence


def test_a_missing_privilege_is_named_with_the_grant_that_mends_it(database: Database) -> None:
    change(database, "REVOKE SELECT ON google_connections FROM pipeline")
    sentences = [found.sentence for found in breaches(database)]
    assert sentences
    assert all("GRANT SELECT ON public.google_connections TO pipeline" in sentence for sentence in sentences)


def test_row_level_security_that_would_hide_rows_is_a_breach(database: Database) -> None:
    change(database, "DROP ROLE IF EXISTS contract_reader")
    change(database, "CREATE ROLE contract_reader LOGIN PASSWORD 'contract'")
    try:
        change(database, "GRANT USAGE ON SCHEMA public TO contract_reader")
        change(database, "GRANT SELECT ON ALL TABLES IN SCHEMA public TO contract_reader")
        with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
            connection.execute("SET ROLE contract_reader")
            sentences = [found.sentence for found in check(connection, contract())]
    finally:
        change(database, "DROP OWNED BY contract_reader")
        change(database, "DROP ROLE contract_reader")
    assert any("hides rows of public.audit_logs from role contract_reader" in sentence for sentence in sentences)


GOOGLE = {
    "GOOGLE_CLIENT_ID": "client",
    "GOOGLE_CLIENT_SECRET": "secret",
    "GRANT_ENCRYPTION_KEYS": Fernet.generate_key().decode(),
}


def run_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "scaling", "check", *arguments], capture_output=True, text=True, check=False
    )


def test_the_command_says_kept_and_exits_zero(database: Database, settings_environment: Callable[..., None]) -> None:
    settings_environment(database, **GOOGLE)
    done = run_check("--only", "sync")
    assert (done.returncode, done.stderr) == (0, "")
    assert "kept" in done.stdout


def test_the_command_names_what_is_broken_and_exits_one(
    database: Database, settings_environment: Callable[..., None]
) -> None:
    change(database, "ALTER TABLE google_connections DROP COLUMN status CASCADE")
    settings_environment(database, **GOOGLE)
    done = run_check("--only", "sync")
    assert done.returncode == 1
    assert "google_connections.status" in done.stdout.replace("\n", "")


def test_the_command_names_missing_settings_and_checks_the_tables_all_the_same(
    database: Database, settings_environment: Callable[..., None]
) -> None:
    settings_environment(database)
    done = run_check()
    assert done.returncode == 1
    assert "settings of archive: ARCHIVE_BUCKET is not set" in done.stdout
    assert "settings of sync: GOOGLE_CLIENT_ID is not set" in done.stdout
    assert "public.audit_logs" in done.stdout


def test_the_command_without_settings_says_which_one_and_exits_two(settings_environment: Callable[..., None]) -> None:
    settings_environment()
    done = run_check("--only", "sync")
    assert done.returncode == 2
    assert done.stderr.startswith("error: DATABASE_URL is not set")
