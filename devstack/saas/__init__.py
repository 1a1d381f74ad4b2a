"""The SaaS beside which the pipelines run: its roles and tables, empty or with demo data.

Belongs here: creating them (schema.sql) and filling them (seed.py).
Does not: the pipeline's own tables (scaling.migrate).
"""

from importlib.resources import files

import psycopg
from psycopg import sql
from psycopg.rows import TupleRow

from devstack.postgres import Postgres

PIPELINE = "pipeline"
OWNER = "saas_owner"
"""Owns the SaaS's tables, as `postgres` does in a Supabase project: no superuser, not bound by row-level security."""
# `pipeline` may not create roles, so its migrations find these; what they may do is the migrations' business.
SYNC_ROLES = ("pipeline_worker", "pipeline_webhook", "pipeline_reader", "pipeline_operator")


def create(server: Postgres, database: str) -> None:
    """Create the roles of a Supabase project, those of the pipelines, and the SaaS's tables.

    Args:
        server: where; roles are shared by its databases.
        database: an existing database; one that has the tables already is left as it is.
    """
    with psycopg.connect(server.dsn(database)) as connection:
        for role, attributes in {
            "anon": "NOLOGIN",
            "authenticated": "NOLOGIN",
            "service_role": "NOLOGIN BYPASSRLS",
            PIPELINE: "LOGIN BYPASSRLS",
            OWNER: "LOGIN BYPASSRLS",
            **dict.fromkeys(SYNC_ROLES, "NOLOGIN"),
        }.items():
            if not connection.execute("SELECT FROM pg_roles WHERE rolname = %s", [role]).rowcount:
                connection.execute(sql.SQL("CREATE ROLE {} {}").format(sql.Identifier(role), sql.SQL(attributes)))
        for role in (PIPELINE, OWNER):
            connection.execute(
                sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(role), server.role_password(role))
            )
            connection.execute(sql.SQL("GRANT pg_read_all_stats TO {}").format(sql.Identifier(role)))
        grant_create(connection, database)
        if connection.execute("SELECT WHERE to_regclass('public.audit_logs') IS NULL").rowcount:
            connection.execute(sql.SQL("ALTER SCHEMA public OWNER TO {}").format(sql.Identifier(OWNER)))
            connection.execute(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(OWNER)))
            connection.execute(files(__name__).joinpath("schema.sql").read_bytes())


def grant_create(connection: psycopg.Connection[TupleRow], database: str) -> None:
    """Let the pipelines and the SaaS's owner create schemas; a copy of a database does not take this over.

    Args:
        connection: the superuser's.
        database: its name.
    """
    connection.execute(
        sql.SQL("GRANT CREATE ON DATABASE {} TO {}, {}").format(*map(sql.Identifier, (database, PIPELINE, OWNER)))
    )


def pipeline_dsn(server: Postgres, database: str) -> str:
    """Build the connection URL with which the pipelines log in.

    Args:
        server: where.
        database: its name.

    Returns:
        The value of DATABASE_URL.
    """
    return server.dsn(database, user=PIPELINE, password=server.role_password(PIPELINE))


def owner_dsn(server: Postgres, database: str) -> str:
    """Build the connection URL of the role that owns the SaaS's tables.

    Args:
        server: where.
        database: its name.

    Returns:
        The value of DATABASE_OWNER_URL.
    """
    return server.dsn(database, user=OWNER, password=server.role_password(OWNER))
