"""The data contract: which tables and columns of the SaaS the pipelines rely on, and whether a database keeps it.

Belongs here: the contract as data and its check, and the check of the roles in schema sync. Does not: what a pipeline
does with the rows, and no column that no pipeline reads (`docs/data-contract.md` is written from this module).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from psycopg import sql

from scaling.databases import Connection

Need = Literal["sync", "archive", "scaling"]

UUID = ("uuid",)
TEXT = ("text", "character varying", "citext", "USER-DEFINED")  # an enum is read as its text
FLAG = ("boolean",)
INSTANT = ("timestamp with time zone",)
CIPHERTEXT = ("bytea", "text", "character varying")


@dataclass(frozen=True, slots=True)
class Column:
    """A column a pipeline reads.

    Attributes:
        name: its name.
        types: acceptable types, as ``information_schema.columns.data_type`` names them; empty accepts any.
        not_null: whether a NULL would break the pipeline.
        why: what it is read for, for the person who has to add it.
    """

    name: str
    types: tuple[str, ...]
    not_null: bool
    why: str


@dataclass(frozen=True, slots=True)
class Table:
    """A table a pipeline reads, and which of them need it."""

    schema: str
    name: str
    needed_by: tuple[Need, ...]
    columns: tuple[Column, ...]
    sees_all_rows: bool = False
    """Row-level security must not hide rows from the pipeline's role: a filtered read would look complete."""
    read_without_row_security: bool = False
    """It is read with row_security = off, which a policy that shows every row does not satisfy; BYPASSRLS does."""

    @property
    def qualified(self) -> str:
        """``schema.name``."""
        return f"{self.schema}.{self.name}"


@dataclass(frozen=True, slots=True)
class Breach:
    """One way in which a database does not keep the contract."""

    table: str
    column: str | None
    needed_by: tuple[Need, ...]
    sentence: str
    """What is wrong and the remedy, for a person."""
    blocking: bool = True
    """The pipelines cannot do their work, or a secret is open; else it is advice."""


def contract(audit_table: str = "public.audit_logs") -> tuple[Table, ...]:
    """The contract.

    Args:
        audit_table: ``schema.table`` of the audit logs (``ARCHIVE_TABLE``).

    Returns:
        Every table with the columns that are read; others may exist and are left alone.
    """
    audit_schema, audit_name = audit_table.split(".", 1)
    return (
        Table(
            "public",
            "tenants",
            ("sync", "archive"),
            (Column("id", UUID, True, "identifies the tenant"),),
            sees_all_rows=True,
        ),
        Table(
            "public",
            "workspaces",
            ("sync",),
            (
                Column("id", UUID, True, "identifies the workspace, the unit of sync"),
                Column("tenant_id", UUID, True, "whose workspace it is"),
            ),
            sees_all_rows=True,
        ),
        Table(
            "public",
            "users",
            ("sync", "scaling"),
            (
                Column("id", UUID, True, "identifies the user"),
                Column("tenant_id", UUID, True, "whose user it is"),
                Column(
                    "google_api_enabled",
                    FLAG,
                    False,
                    "switches the sync of a user's connections off, and counts the tenants with Google on",
                ),
            ),
            sees_all_rows=True,
        ),
        Table(
            "public",
            "google_connections",
            ("sync",),
            (
                Column("id", UUID, True, "identifies the grant"),
                Column("tenant_id", UUID, True, "whose grant it is"),
                Column("workspace_id", UUID, True, "which workspace its calendars belong to"),
                Column("user_id", UUID, False, "who granted it"),
                Column("google_account", TEXT, False, "tells one Google account from another after a reconnect"),
                Column("refresh_token_encrypted", CIPHERTEXT, False, "the grant, encrypted with GRANT_ENCRYPTION_KEYS"),
                Column("status", TEXT, True, "only connections with status 'active' are synced"),
            ),
            sees_all_rows=True,
        ),
        Table(
            audit_schema,
            audit_name,
            ("archive",),
            (
                Column("id", (), True, "identifies the row in the archive"),
                Column("tenant_id", (), False, "clusters the archive, so that one tenant's rows lie together"),
                Column("created_at", INSTANT, True, "decides the month a row belongs to"),
            ),
            sees_all_rows=True,
            read_without_row_security=True,
        ),
    )


# The catalog tells absence from denial; to_regclass() answers NULL for both.
RELATION = """
SELECT c.oid, has_schema_privilege(n.oid, 'USAGE')
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = %s AND c.relname = %s AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
"""

COLUMNS = """
SELECT a.attname,
       CASE WHEN t.typtype IN ('e', 'd') OR n.nspname <> 'pg_catalog' AND t.typname <> 'citext' THEN 'USER-DEFINED'
            WHEN t.typname = 'citext' THEN 'citext'
            ELSE format_type(a.atttypid, NULL) END,
       a.attnotnull
FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid JOIN pg_namespace n ON n.oid = t.typnamespace
WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped
"""

# Policies of other commands do not matter; a restrictive one may hide rows whatever the others show.
SHOWS_EVERY_ROW = """
SELECT coalesce(bool_or(p.polpermissive AND coalesce(pg_get_expr(p.polqual, p.polrelid), 'true') = 'true'), false)
   AND coalesce(bool_and(p.polpermissive), false)
FROM pg_policy p
WHERE p.polrelid = %s AND p.polcmd IN ('r', '*')
  AND EXISTS (SELECT FROM unnest(p.polroles) AS role WHERE role = 0 OR pg_has_role(role, 'USAGE'))
"""

SYNC_ROLES = ("pipeline_worker", "pipeline_webhook", "pipeline_reader", "pipeline_operator")
"""What migration 0005 gives rights to in schema sync."""

SYNC_TABLES = """
SELECT c.oid, c.relname, c.relforcerowsecurity
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = 'sync' AND c.relkind IN ('r', 'p')
ORDER BY c.relname
"""

ROLES = """
SELECT rolname, rolsuper OR rolbypassrls, has_schema_privilege(oid, 'sync', 'USAGE')
FROM pg_roles WHERE rolname = ANY(%s) ORDER BY rolname
"""


def check(connection: Connection, tables: Sequence[Table]) -> list[Breach]:
    """Compare a live database with the contract; reads the catalog only, never a row's content.

    Args:
        connection: as the role the pipelines log in with.
        tables: the contract.

    Returns:
        Every breach, in the contract's order; an empty list means the contract is kept.
    """
    role = _one(connection, "SELECT current_user")
    return [breach for table in tables for breach in _check_table(connection, table, str(role))]


def check_roles(connection: Connection) -> list[Breach]:
    """Check who may do what in schema sync: the roles, their rights, and whether the login role sees every row.

    Args:
        connection: as the role the pipelines log in with.

    Returns:
        Every finding; an empty list also where the schema has not been made yet.
    """
    tables = connection.execute(SYNC_TABLES).fetchall()
    if not tables:
        return []

    def finding(sentence: str, *, blocking: bool = False) -> Breach:
        return Breach("schema sync", None, ("sync",), sentence, blocking)

    role = str(_one(connection, "SELECT current_user"))
    findings = []
    if not _one(connection, "SELECT has_schema_privilege('sync', 'USAGE')"):
        return [finding(f"role {role} may not use schema sync; GRANT pipeline_worker TO {role}", blocking=True)]
    if _one(connection, "SELECT to_regprocedure('sync.grant_roles()') IS NULL"):
        return [finding("schema sync is older than this program; python -m scaling migrate", blocking=True)]
    present = {name: (sees_all, usable) for name, sees_all, usable in connection.execute(ROLES, (list(SYNC_ROLES),))}
    missing = [name for name in SYNC_ROLES if name not in present]
    if missing:
        findings.append(
            finding(
                f"there is no role {', '.join(missing)}, because the role that migrated may not create roles; to let "
                "others in with less than everything, as one that may: "
                + "; ".join(f"CREATE ROLE {name} NOLOGIN" for name in missing)
                + "; then, as the owner of schema sync: CALL sync.grant_roles()"
            )
        )
    without_rights = [name for name, (_, usable) in present.items() if not usable]
    unforced = [name for _, name, forced in tables if not forced]
    if without_rights or unforced:
        what = f"role {', '.join(without_rights)} has no rights in schema sync" if without_rights else ""
        open_tables = f"row-level security does not bind the owner of {', '.join(unforced)}" if unforced else ""
        findings.append(
            finding(f"{' and '.join(filter(None, [what, open_tables]))}; as the owner: CALL sync.grant_roles()")
        )
    findings += [
        finding(
            f"row-level security does not bind role {name}; ALTER ROLE {name} NOSUPERUSER NOBYPASSRLS", blocking=True
        )
        for name, (sees_all, _) in present.items()
        if sees_all
    ]
    if not all(_one(connection, "SELECT has_table_privilege(%s::oid, 'SELECT')", oid) for oid, _, _ in tables):
        findings.append(
            finding(
                f"role {role} may not read every table of schema sync; GRANT pipeline_worker TO {role}", blocking=True
            )
        )
    elif any(
        _one(connection, "SELECT row_security_active(%s::oid)", oid) and not _one(connection, SHOWS_EVERY_ROW, oid)
        for oid, _, _ in tables
    ):
        findings.append(
            finding(
                f"row-level security hides rows of schema sync from role {role}, so nothing would ever be due; "
                f"GRANT pipeline_worker TO {role}, or ALTER ROLE {role} BYPASSRLS",
                blocking=True,
            )
        )
    return findings


def sees_every_row(connection: Connection, table: str) -> bool:
    """Tell whether row-level security hides no row of a table from the current role.

    Args:
        connection: within a transaction.
        table: `schema.table`.
    """
    oid = _one(connection, "SELECT %s::regclass::oid", table)
    return not _one(connection, "SELECT row_security_active(%s::oid)", oid) or bool(
        _one(connection, SHOWS_EVERY_ROW, oid)
    )


def _check_table(connection: Connection, table: Table, role: str) -> list[Breach]:
    def breach(sentence: str, column: str | None = None) -> Breach:
        return Breach(table.qualified, column, table.needed_by, sentence)

    found = connection.execute(RELATION, (table.schema, table.name)).fetchone()
    if found is None:
        names = ", ".join(column.name for column in table.columns)
        return [breach(f"table {table.qualified} does not exist; create it with the columns {names}")]
    oid, usable = found
    if not usable:
        return [
            breach(f"role {role} may not use schema {table.schema}; GRANT USAGE ON SCHEMA {table.schema} TO {role}")
        ]

    actual = {name: (kind, not_null) for name, kind, not_null in connection.execute(COLUMNS, (oid,))}
    breaches = []
    for column in table.columns:
        name = f"{table.qualified}.{column.name}"
        if column.name not in actual:
            breaches.append(breach(f"column {name} does not exist; it {column.why}", column.name))
            continue
        kind, not_null = actual[column.name]
        if column.types and kind not in column.types:
            wanted = " or ".join(t for t in column.types if t != "USER-DEFINED")
            breaches.append(breach(f"column {name} is {kind} but must be {wanted}; it {column.why}", column.name))
        elif column.not_null and not not_null and _has_null(connection, table, oid, column.name):
            breaches.append(
                breach(
                    f"column {name} holds NULLs but must not; it {column.why}; fill them, then SET NOT NULL",
                    column.name,
                )
            )
        if not _may_read(connection, oid, column.name):
            breaches.append(
                breach(f"role {role} may not read {name}; GRANT SELECT ON {table.qualified} TO {role}", column.name)
            )
    if (
        table.sees_all_rows
        and _one(connection, "SELECT row_security_active(%s::oid)", oid)
        and (table.read_without_row_security or not _one(connection, SHOWS_EVERY_ROW, oid))
    ):
        breaches.append(
            breach(
                f"row-level security hides rows of {table.qualified} from role {role}, so a copy would look complete "
                f"and not be; ALTER ROLE {role} BYPASSRLS"
            )
        )
    return breaches


def _has_null(connection: Connection, table: Table, oid: int, column: str) -> bool:
    # A nullable column is fine while it holds no NULL. Without the right to read it the privilege check speaks.
    if not _may_read(connection, oid, column):
        return False
    query = sql.SQL("SELECT EXISTS (SELECT 1 FROM {} WHERE {} IS NULL)").format(
        sql.Identifier(table.schema, table.name), sql.Identifier(column)
    )
    row = connection.execute(query).fetchone()
    return bool(row and row[0])


def _may_read(connection: Connection, oid: int, column: str) -> bool:
    return bool(_one(connection, "SELECT has_column_privilege(%s::oid, %s, 'SELECT')", oid, column))


def _one(connection: Connection, query: str, *parameters: object) -> object:
    row = connection.execute(query.encode(), parameters).fetchone()
    return row[0] if row else None
