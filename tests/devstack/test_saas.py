"""The SaaS's tables keep the data contract, guard their tenants, and hold awkward rows."""

import itertools
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from cryptography.fernet import Fernet
from psycopg import sql

from devstack.saas import seed
from devstack.servers import Database
from scaling.contract import check, contract
from sync_pipeline.grants import GrantCipher

NOW = datetime(2026, 3, 9, 12, 0, tzinfo=UTC)
KEY = Fernet.generate_key().decode()
ACCOUNTS = [seed.Account(f"user-{number:03}@example.com", f"token-{number}") for number in range(60)]


def sow(connection: psycopg.Connection, *, number: int = 1) -> seed.Seeded:
    return seed.seed(connection, now=NOW, accounts=ACCOUNTS, grant_keys=[KEY], audit_rows=3000, seed=number)


@pytest.fixture
def seeded(database: Database) -> Database:
    with psycopg.connect(database.admin_dsn) as connection:
        sow(connection)
    return database


def scalar(connection: psycopg.Connection, query: str) -> object:
    row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return row[0]


def test_the_tables_keep_the_data_contract(seeded: Database) -> None:
    with psycopg.connect(seeded.dsn) as connection:
        assert check(connection, contract()) == []


def test_the_pipeline_cannot_write_the_saas_tables(seeded: Database) -> None:
    with psycopg.connect(seeded.dsn) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute("DELETE FROM public.audit_logs")


def test_a_tenant_sees_its_own_audit_logs_only_and_no_addresses(seeded: Database) -> None:
    with psycopg.connect(seeded.admin_dsn) as connection:
        tenant = scalar(connection, "SELECT tenant_id FROM public.audit_logs GROUP BY 1 ORDER BY count(*) DESC LIMIT 1")
        own = scalar(connection, f"SELECT count(*) FROM public.audit_logs WHERE tenant_id = '{tenant}'")
        connection.execute("SET ROLE authenticated")
        connection.execute("SELECT set_config('request.jwt.claims', %s, false)", [f'{{"tenant_id": "{tenant}"}}'])
        assert scalar(connection, "SELECT count(id) FROM public.audit_logs") == own
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("SELECT ip_address FROM public.audit_logs")


def test_a_visitor_without_an_account_may_not_read_audit_logs(seeded: Database) -> None:
    with psycopg.connect(seeded.admin_dsn) as connection:
        connection.execute("SET ROLE anon")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("SELECT FROM public.audit_logs")


def test_every_table_of_the_saas_has_row_level_security(database: Database) -> None:
    with psycopg.connect(database.admin_dsn) as connection:
        unguarded = connection.execute(
            "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'"
            " AND NOT relrowsecurity"
        ).fetchall()
    assert unguarded == []


def test_an_appended_row_is_stamped_with_the_acting_user(seeded: Database) -> None:
    with psycopg.connect(seeded.admin_dsn) as connection:
        user, tenant = connection.execute("SELECT id, tenant_id FROM public.users LIMIT 1").fetchone() or ("", "")
        claims = f'{{"sub": "{user}", "tenant_id": "{tenant}"}}'
        connection.execute("SELECT set_config('request.jwt.claims', %s, false)", [claims])
        connection.execute("SET ROLE authenticated")
        row = connection.execute(
            "INSERT INTO public.audit_logs (tenant_id, action) VALUES (%s, 'document.viewed') RETURNING user_id",
            [tenant],
        ).fetchone()
        assert row == (user,)


# -- seed ------------------------------------------------------------------------------------------


def test_the_seed_covers_thirteen_closed_months_and_the_open_one(seeded: Database) -> None:
    with psycopg.connect(seeded.admin_dsn) as connection:
        months = connection.execute(
            "SELECT date_trunc('month', created_at, 'UTC') AS month, min(created_at), max(created_at)"
            " FROM public.audit_logs GROUP BY month ORDER BY month"
        ).fetchall()
    assert len(months) == seed.CLOSED_MONTHS + 1
    assert months[0][0] == datetime(2025, 2, 1, tzinfo=UTC)
    for (month, first, last), (following, _, _) in itertools.pairwise(months):
        assert first == month, "a row at exactly the start"
        assert last == following - timedelta(microseconds=1), "a row at the last microsecond"
    assert months[-1][2] < NOW


def test_every_workspace_has_a_connection_of_its_own_tenant_that_opens_with_the_key(seeded: Database) -> None:
    with psycopg.connect(seeded.dsn) as connection:
        rows = connection.execute(
            "SELECT c.google_account, c.refresh_token_encrypted FROM public.google_connections c"
            " JOIN public.workspaces w ON w.id = c.workspace_id AND w.tenant_id = c.tenant_id"
            " JOIN public.users u ON u.id = c.user_id AND u.tenant_id = c.tenant_id AND u.google_api_enabled"
        ).fetchall()
        assert scalar(connection, "SELECT count(DISTINCT workspace_id) FROM public.google_connections") == 60
        assert scalar(connection, "SELECT count(DISTINCT tenant_id) FROM public.google_connections") == 40
    cipher = GrantCipher([KEY])
    assert {account: cipher.decrypt(bytes(grant)) for account, grant in rows} == {
        account.email: account.refresh_token for account in ACCOUNTS
    }


def test_a_few_tenants_own_most_of_the_audit_logs(seeded: Database) -> None:
    with psycopg.connect(seeded.dsn) as connection:
        counts = [
            count
            for (count,) in connection.execute(
                "SELECT count(*) FROM public.audit_logs GROUP BY tenant_id ORDER BY 1 DESC"
            )
        ]
    assert len(counts) > 30
    assert sum(counts[:4]) > sum(counts) * 0.35


@pytest.mark.parametrize(
    "condition",
    [
        "resource_id = ''",
        "resource_id IS NULL",
        r"resource_id = '\N'",
        "user_agent LIKE E'%\n%'",
        "user_agent LIKE '%🦊%'",
        "details IS NULL",
        "details = 'null'",
        "details = '{}'",
        "details #>> '{1,2,3,4,5,6,7,8}' = 'deep'",
        "length(details ->> 'big') > 400",
        "family(ip_address) = 6 AND masklen(ip_address) < 128",
        "ip_address IS NULL",
        "workspace_id IS NULL",
        "user_id IS NULL",
    ],
)
def test_the_audit_logs_hold_awkward_values(seeded: Database, condition: str) -> None:
    with psycopg.connect(seeded.dsn) as connection:
        assert scalar(connection, f"SELECT count(*) FROM public.audit_logs WHERE {condition}") != 0


def test_the_same_seed_makes_the_same_rows_and_another_does_not(database: Database) -> None:
    digests = []
    with psycopg.connect(database.admin_dsn) as connection:
        for number in (1, 1, 2):
            with connection.transaction(force_rollback=True):
                sow(connection, number=number)
                tables = ("tenants", "workspaces", "users", "audit_logs", "ai_usage")
                digests.append(
                    [
                        connection.execute(
                            sql.SQL(
                                "SELECT md5(string_agg((to_jsonb(t) - %s)::text, ',' ORDER BY id)) FROM public.{} t"
                            ).format(sql.Identifier(table)),
                            ["" if table in {"audit_logs", "ai_usage"} else "created_at"],
                        ).fetchone()
                        for table in tables
                    ]
                )
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]
