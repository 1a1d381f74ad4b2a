"""Who may see and do what in schema sync: roles, row-level security, one tenant at a time.

That nothing secret or personal is told anywhere is in `test_canaries`.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
import pytest

import sync_pipeline
from devstack.google_calendar import Simulator
from devstack.servers import Database
from scaling.contract import SYNC_ROLES, check_roles
from scaling.databases import DatabaseRouter, Shard
from sync_pipeline import connections, history, tick
from sync_pipeline.services import Services
from sync_pipeline.webhook import Outcome, Receiver
from sync_pipeline.workspaces import Workspace
from tests.sync_pipeline.conftest import Saas
from tests.sync_pipeline.scenes import Tick, connected, insert, kinds, meeting

Login = Callable[..., str]

RELATIONS = """
SELECT c.relname, c.relkind::text FROM pg_class c
WHERE c.relnamespace = 'sync'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S') ORDER BY 1
"""
SECRET_COLUMNS = {
    ("calendar_state", "sync_token"),
    ("connection_state", "access_token_encrypted"),
    ("connection_state", "grant_fingerprint"),
    ("channels", "token_hash"),
}
"""Of no use to anybody but a worker, and the receiver of notifications for the last."""
CONTENT_RELATIONS = {"event_rows", "calendar_events", "calendar_event_changes"}


@dataclass(frozen=True)
class Tenants:
    """Two tenants with one synced event each, and rows in every other table too."""

    a: Workspace
    b: Workspace


@pytest.fixture
def tenants(google: Simulator, saas: Saas, tick_once: Tick) -> Tenants:
    workspaces = []
    for name in ("ann", "bob"):
        workspace, calendar = connected(google, saas, name)
        insert(google, calendar, meeting(1, summary=f"Of {name}"))
        workspaces.append(workspace)
    assert kinds(tick_once()) == []
    for workspace in workspaces:
        fill_the_rest(saas, workspace)
    for relation, _ in saas.execute(RELATIONS):
        assert saas.one(f"SELECT count(*) > 0 FROM sync.{relation}") == (True,), f"sync.{relation} would prove nothing"
    return Tenants(*workspaces)


def fill_the_rest(saas: Saas, workspace: Workspace) -> None:
    """A row in whatever table of the schema the tick wrote none to; columns are found in the catalog."""
    for name, kind in saas.execute(RELATIONS):
        columns = saas.execute(
            "SELECT column_name::text, udt_name::text FROM information_schema.columns "
            "WHERE table_schema = 'sync' AND table_name = %s AND is_nullable = 'NO' AND column_default IS NULL",
            name,
        )
        names = {str(column) for column, _ in columns}
        tenant = "WHERE tenant_id = %s" if "tenant_id" in names else "WHERE %s IS NOT NULL"
        if kind != "r" or saas.execute(f"SELECT 1 FROM sync.{name} {tenant} LIMIT 1", workspace.tenant_id):
            continue
        values = {
            "uuid": uuid4(),
            "text": "project",
            "bytea": b"x",
            "date": "2026-03-02",
            "timestamptz": "2026-03-02T10:00Z",
            "jsonb": "{}",
        }
        row: dict[object, object] = {column: values.get(str(of), 1) for column, of in columns} | (
            {"tenant_id": workspace.tenant_id, "workspace_id": workspace.workspace_id} if "tenant_id" in names else {}
        )
        row = {column: value for column, value in row.items() if column in names}
        saas.execute(
            f"INSERT INTO sync.{name} ({', '.join(map(str, row))}) VALUES ({', '.join(['%s'] * len(row))})",
            *row.values(),
        )


@pytest.fixture
def as_tenant(login: Login) -> Callable[[UUID | None], psycopg.Connection]:
    """A reader's connection that acts for a tenant, the way a backend does it."""
    dsn = login("pipeline_reader")

    def connect(tenant: UUID | None) -> psycopg.Connection:
        connection = psycopg.connect(dsn, autocommit=True)
        if tenant is not None:
            connection.execute("SELECT set_config('app.tenant_id', %s, false)", [str(tenant)])
        return connection

    return connect


def rows(connection: psycopg.Connection, relation: object, columns: str = "*") -> list[tuple[object, ...]]:
    return connection.execute(f"SELECT {columns} FROM sync.{relation}".encode()).fetchall()


def tenants_in(connection: psycopg.Connection, relation: object) -> set[object]:
    return {tenant for (tenant,) in rows(connection, relation, "tenant_id")}


# --- one tenant at a time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["calendar_events", "calendar_event_changes", "calendar_status"])
def test_a_query_without_a_where_sees_no_row_of_another_tenant(
    view: str, tenants: Tenants, as_tenant: Callable[[UUID | None], psycopg.Connection]
) -> None:
    with as_tenant(tenants.b.tenant_id) as connection:
        assert tenants_in(connection, view) == {tenants.b.tenant_id}
        assert len(rows(connection, view)) == 1, "every column of the view is readable"
    with as_tenant(uuid4()) as connection:
        assert rows(connection, view) == []
    with as_tenant(None) as connection:
        assert rows(connection, view) == [], "who does not say for whom sees nothing"


def test_every_relation_with_tenants_shows_a_reader_its_own_rows_or_nothing(
    tenants: Tenants, saas: Saas, as_tenant: Callable[[UUID | None], psycopg.Connection]
) -> None:
    """Introspected, so that a new table or view is in it."""
    refused = []
    with as_tenant(tenants.b.tenant_id) as connection:
        for name, _ in saas.execute(RELATIONS):
            has_tenant = connection.execute(
                "SELECT EXISTS (SELECT FROM pg_attribute WHERE attrelid = %s::regclass AND attname = 'tenant_id')",
                [f"sync.{name}"],
            ).fetchone()
            try:
                seen = tenants_in(connection, name) if has_tenant == (True,) else {None, *rows(connection, name)}
            except psycopg.errors.InsufficientPrivilege:
                refused.append(name)
            else:
                assert seen == {tenants.b.tenant_id}, name
    assert "event_rows" not in refused
    assert {"channels", "quarantine", "runs", "workspace_state", "call_buckets"} <= set(refused)


def test_every_table_forces_row_level_security_and_has_the_workers_policy(saas: Saas) -> None:
    """A table that a migration adds without `CALL sync.grant_roles()` fails here."""
    loose = saas.execute(
        "SELECT relname FROM pg_class c WHERE relnamespace = 'sync'::regnamespace AND relkind IN ('r', 'p') "
        "AND NOT (relrowsecurity AND relforcerowsecurity AND EXISTS ("
        "  SELECT FROM pg_policy p WHERE p.polrelid = c.oid AND p.polroles = ARRAY['pipeline_worker'::regrole::oid]))"
    )
    assert loose == []


def test_every_view_runs_with_its_readers_rights(saas: Saas) -> None:
    owners = saas.execute(
        "SELECT relname FROM pg_class WHERE relnamespace = 'sync'::regnamespace AND relkind IN ('v', 'm') "
        "AND NOT coalesce(reloptions @> ARRAY['security_invoker=true'], false)"
    )
    assert owners == []


def test_everybody_else_has_no_right_to_anything_in_the_schema(saas: Saas, login: Login) -> None:
    public = saas.execute(
        "SELECT name, privilege_type FROM ("
        "  SELECT nspname::text AS name, nspacl AS acl FROM pg_namespace WHERE nspname = 'sync'"
        "  UNION ALL SELECT relname, relacl FROM pg_class WHERE relnamespace = 'sync'::regnamespace"
        "  UNION ALL SELECT proname, coalesce(proacl, acldefault('f', proowner)) FROM pg_proc"
        "    WHERE pronamespace = 'sync'::regnamespace"
        ") AS o, aclexplode(acl) WHERE grantee = 0"
    )
    assert public == []
    with psycopg.connect(login()) as stranger, pytest.raises(psycopg.errors.InsufficientPrivilege):
        stranger.execute("SELECT FROM sync.calendar_events")


def test_the_owner_of_the_tables_without_bypassrls_sees_nothing(
    tenants: Tenants, saas: Saas, login: Login, database: Database
) -> None:
    dsn = login()
    owner = psycopg.conninfo.conninfo_to_dict(dsn)["user"]
    for name, kind in saas.execute(RELATIONS):
        saas.execute(f"ALTER {'VIEW' if kind == 'v' else 'TABLE'} sync.{name} OWNER TO {owner}")
    saas.execute(f"GRANT USAGE ON SCHEMA sync TO {owner}")
    with psycopg.connect(dsn, autocommit=True) as connection:
        seen = {name: rows(connection, name) for name, _ in saas.execute(RELATIONS)}
    assert {name for name, found in seen.items() if found} == set()
    # What the fixture's database does not keep: the tables go back before the role goes.
    saas.execute(f"REASSIGN OWNED BY {owner} TO pipeline")


def test_the_jwt_of_a_request_says_whose_rows_are_seen_and_a_setting_cannot_overrule_it(
    tenants: Tenants, as_tenant: Callable[[UUID | None], psycopg.Connection]
) -> None:
    with as_tenant(tenants.a.tenant_id) as connection:
        claims = f'{{"sub": "somebody", "tenant_id": "{tenants.b.tenant_id}"}}'
        connection.execute("SELECT set_config('request.jwt.claims', %s, false)", [claims])
        assert tenants_in(connection, "calendar_events") == {tenants.b.tenant_id}
        connection.execute("SELECT set_config('request.jwt.claims', '{\"sub\": \"somebody\"}', false)")
        assert rows(connection, "calendar_events") == [], "a token of no tenant is nobody's"


def test_a_search_path_of_the_caller_does_not_change_whose_rows_are_seen(
    tenants: Tenants, saas: Saas, as_tenant: Callable[[UUID | None], psycopg.Connection]
) -> None:
    with as_tenant(tenants.b.tenant_id) as connection:
        connection.execute("CREATE TEMP TABLE mine (tenant_id uuid)")
        connection.execute(
            "CREATE FUNCTION pg_temp.current_setting(text, boolean) RETURNS text LANGUAGE sql "
            f"RETURN '{tenants.a.tenant_id}'"
        )
        connection.execute("SET search_path = pg_temp, pg_catalog")
        assert tenants_in(connection, "calendar_events") == {tenants.b.tenant_id}


# --- each role does its job and nothing else ------------------------------------------------------------------------


@dataclass(frozen=True)
class Right:
    """A privilege on a relation or one of its columns."""

    relation: str
    column: str
    verb: str


def rights(saas: Saas, role: str) -> set[Right]:
    """What a role may do, column by column; DELETE and TRUNCATE concern no column."""
    found = saas.execute(
        "SELECT c.relname, a.attname, verb FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 "
        "CROSS JOIN unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'REFERENCES']) AS verb "
        "WHERE c.relnamespace = 'sync'::regnamespace AND c.relkind IN ('r', 'v') AND NOT a.attisdropped "
        "AND has_column_privilege(%s, c.oid, a.attnum, verb) "
        "UNION ALL SELECT c.relname, '', verb FROM pg_class c "
        "CROSS JOIN unnest(ARRAY['DELETE', 'TRUNCATE', 'TRIGGER', 'MAINTAIN']) AS verb "
        "WHERE c.relnamespace = 'sync'::regnamespace AND c.relkind IN ('r', 'v') "
        "AND has_table_privilege(%s, c.oid, verb)",
        role,
        role,
    )
    return {Right(*map(str, row)) for row in found}


VERB = re.compile(
    r"(?P<insert>INSERT INTO)\s+sync\.(?P<t1>\w+)|(?<!DO )(?P<update>UPDATE)\s+sync\.(?P<t2>\w+)"
    r"|(?P<delete>DELETE FROM)\s+sync\.(?P<t3>\w+)|(?P<select>FROM|JOIN|USING)\s+sync\.(?P<t4>\w+)"
    r"|(?P<upsert>DO UPDATE)"
)


def verbs_in_code() -> dict[str, set[str]]:
    """Table -> verbs, of every SQL text in the package but the receiver's, which has a role of its own."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted(Path(str(sync_pipeline.__file__)).parent.glob("*.py")):
        if path.name == "webhook.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for table, verb in verbs_in(node.value):
                    found[table].add(verb)
    for table in (*connections.WORKSPACE_TABLES, "runs", *history.COUNTERS):  # whose names are parameters
        found[table] |= {"SELECT", "DELETE"}
    return found


def verbs_in(text: str) -> Iterator[tuple[str, str]]:
    inserted = ""
    for match in VERB.finditer(text):
        table = next((match[name] for name in ("t1", "t2", "t3", "t4") if match[name]), inserted)
        if match["insert"]:
            inserted = table
            yield table, "INSERT"
        elif match["delete"]:
            yield table, "DELETE"
        elif match["update"] or match["upsert"]:
            yield table, "UPDATE"
        yield table, "SELECT"  # a WHERE, a RETURNING, an ON CONFLICT


def test_the_verbs_of_a_statement_are_recognised() -> None:
    text = "WITH x AS (SELECT FROM sync.a) INSERT INTO sync.b AS mine SELECT 1 ON CONFLICT DO UPDATE SET y = 1"
    assert set(verbs_in(text)) == {("a", "SELECT"), ("b", "INSERT"), ("b", "UPDATE"), ("b", "SELECT")}
    assert set(verbs_in("DELETE FROM sync.a; UPDATE sync.c SET x = 1")) >= {("a", "DELETE"), ("c", "UPDATE")}


def test_the_worker_may_use_exactly_the_verbs_the_code_uses(saas: Saas) -> None:
    granted: dict[str, set[str]] = defaultdict(set)
    for right in rights(saas, "pipeline_worker"):
        granted[right.relation].add(right.verb)
    used = verbs_in_code()
    views = {name for name, kind in saas.execute(RELATIONS) if kind == "v"}
    assert {table: verbs for table, verbs in granted.items() if table not in views} == {
        table: verbs for table, verbs in used.items() if table not in views
    }


def test_a_whole_tick_runs_as_a_login_that_is_only_a_worker(
    google: Simulator, saas: Saas, services: Services, login: Login
) -> None:
    workspace, calendar = connected(google, saas)
    insert(google, calendar, meeting(1), meeting(2))
    dsn = login("pipeline_worker")
    with DatabaseRouter(Shard("main", dsn)) as router:
        worker = replace(services, router=router)
        first = tick.run_tick(worker, run_id="worker-1")
        insert(google, calendar, meeting(3))
        google.set_always_gone(calendar)
        second = tick.run_tick(worker, run_id="worker-2")
    assert (kinds(first), first.tally.events_upserted) == ([], 2)
    assert (kinds(second), second.tally.full_syncs, second.tally.events_upserted) == ([], 1, 1)
    assert len(saas.events(workspace, calendar)) == 3
    assert saas.one("SELECT count(*) FROM sync.runs WHERE finished_at IS NOT NULL") == (2,)


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO sync.webhook_messages VALUES (now(), 'accepted', 1)",
        "TRUNCATE sync.event_rows",
        "ALTER TABLE sync.event_rows DISABLE ROW LEVEL SECURITY",
        "UPDATE public.google_connections SET status = 'x'",
        "SELECT email FROM public.users",
        "SELECT FROM public.audit_logs",
        "SELECT FROM scaling.alembic_version",
        "DELETE FROM scaling.episodes",
        "SELECT FROM scaling.samples",
        "UPDATE scaling.capability_changes SET reason = 'x'",
        "CALL sync.grant_roles()",
    ],
)
def test_a_worker_can_do_nothing_else(statement: str, login: Login) -> None:
    with psycopg.connect(login("pipeline_worker")) as worker, pytest.raises(psycopg.errors.InsufficientPrivilege):
        worker.execute(statement.encode())


@pytest.fixture
def channel(saas: Saas, tenants: Tenants) -> UUID:
    """An open channel for the calendar of tenant A; its secret is `secret`."""
    channel = uuid4()
    saas.execute(
        "INSERT INTO sync.channels (channel_id, tenant_id, workspace_id, connection_id, calendar_id, token_hash, "
        "state, created_at, expires_at) SELECT %s, tenant_id, workspace_id, connection_id, calendar_id, "
        "sha256('secret'), 'open', now(), now() + interval '1 day' FROM sync.calendar_state WHERE tenant_id = %s",
        channel,
        tenants.a.tenant_id,
    )
    saas.execute("UPDATE sync.calendar_state SET due_at = now() + interval '1 day'")
    saas.execute("UPDATE sync.connection_state SET list_due_at = now() + interval '1 day'")
    return channel


def notification(channel: UUID, **changes: str) -> dict[str, str]:
    return {
        "x-goog-channel-id": str(channel),
        "x-goog-channel-token": "secret",
        "x-goog-resource-state": "exists",
        "x-goog-resource-id": "what",
        **{f"x-goog-{name.replace('_', '-')}": value for name, value in changes.items()},
    }


def test_the_receiver_does_all_its_work_as_a_login_that_is_only_a_webhook(
    saas: Saas, tenants: Tenants, channel: UUID, login: Login
) -> None:
    with DatabaseRouter(Shard("main", login("pipeline_webhook"))) as router:
        receiver = Receiver(router)
        receiver.check()
        said = [
            receiver.receive(notification(channel, resource_state="sync")),
            receiver.receive(notification(channel)),
            receiver.receive(notification(channel, channel_token="wrong")),
            receiver.receive(notification(uuid4())),
        ]
        saas.execute("UPDATE sync.channels SET calendar_id = NULL WHERE channel_id = %s", channel)
        said.append(receiver.receive(notification(channel)))
        for _ in range(2):
            receiver.flush()
    assert said == [
        Outcome.SYNC,
        Outcome.ACCEPTED,
        Outcome.WRONG_TOKEN,
        Outcome.UNKNOWN_CHANNEL,
        Outcome.ACCEPTED,
    ]
    due = "SELECT tenant_id FROM sync.{} WHERE {} < now() + interval '1 minute'"
    assert saas.execute(due.format("calendar_state", "due_at")) == [(tenants.a.tenant_id,)]
    assert saas.execute(due.format("connection_state", "list_due_at")) == [(tenants.a.tenant_id,)]
    assert saas.one("SELECT messages FROM sync.channels WHERE channel_id = %s", channel) == (3,)


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT FROM sync.event_rows",
        "SELECT FROM sync.calendar_events",
        "SELECT sync_token FROM sync.calendar_state",
        "SELECT summary FROM sync.calendar_state",
        "SELECT access_token_encrypted FROM sync.connection_state",
        "SELECT raw FROM sync.quarantine",
        "UPDATE sync.calendar_state SET sync_token = NULL",
        "UPDATE sync.calendar_state SET deleted_at = now()",
        "UPDATE sync.connection_state SET status = 'active'",
        "UPDATE sync.channels SET token_hash = 'x'",
        "DELETE FROM sync.channels",
        "INSERT INTO sync.channels (channel_id) VALUES (gen_random_uuid())",
        "SELECT FROM public.google_connections",
        "SELECT refresh_token_encrypted FROM public.google_connections",
    ],
)
def test_a_webhook_can_do_nothing_else(statement: str, login: Login) -> None:
    with psycopg.connect(login("pipeline_webhook")) as webhook, pytest.raises(psycopg.errors.InsufficientPrivilege):
        webhook.execute(statement.encode())


@pytest.mark.parametrize("role", ["pipeline_reader", "pipeline_operator"])
def test_readers_and_operators_only_read_and_see_no_secret(role: str, saas: Saas) -> None:
    granted = rights(saas, role)
    assert {right.verb for right in granted} == {"SELECT"}
    assert {(right.relation, right.column) for right in granted} & SECRET_COLUMNS == set()


def test_only_the_worker_and_a_tenant_read_events_and_names(saas: Saas) -> None:
    for role in ("pipeline_webhook", "pipeline_operator"):
        granted = rights(saas, role)
        assert {right.relation for right in granted} & CONTENT_RELATIONS == set()
        assert {(right.relation, right.column) for right in granted} & {
            ("calendar_state", "summary"),
            ("quarantine", "raw"),
        } == set()


def test_an_operator_sees_how_every_tenant_fares(tenants: Tenants, login: Login) -> None:
    both = {tenants.a.tenant_id, tenants.b.tenant_id}
    with psycopg.connect(login("pipeline_operator"), autocommit=True) as operator:
        for relation in ("workspace_state", "calendar_state", "connection_state", "calendar_status", "api_calls"):
            assert tenants_in(operator, relation) == both, relation
        assert tenants_in(operator, "quarantine") == both
        for relation in ("runs", "webhook_messages", "call_days", "freshness", "calendar_status"):
            assert rows(operator, relation), relation
        assert rows(operator, "call_buckets", "scope, tokens, factor")


def test_the_roles_lend_nobody_more_than_their_rights(saas: Saas) -> None:
    attributes = saas.execute(
        "SELECT rolname FROM pg_roles WHERE rolname = ANY(%s) AND NOT (rolsuper OR rolbypassrls OR rolcreaterole "
        "OR rolcreatedb OR rolcanlogin OR rolreplication)",
        list(SYNC_ROLES),
    )
    assert {name for (name,) in attributes} == set(SYNC_ROLES)


def test_the_check_finds_nothing_amiss_for_the_owner_and_for_a_worker(database: Database, login: Login) -> None:
    for dsn in (database.dsn, login("pipeline_worker")):
        with psycopg.connect(dsn) as connection:
            assert check_roles(connection) == []


@pytest.mark.parametrize(
    ("member_of", "sentence"),
    [((), "may not use schema sync; GRANT pipeline_worker TO"), (("pipeline_operator",), "GRANT pipeline_worker TO")],
)
def test_the_check_tells_a_login_that_cannot_sync_what_it_lacks(
    member_of: tuple[str, ...], sentence: str, login: Login
) -> None:
    with psycopg.connect(login(*member_of)) as connection:
        (finding,) = check_roles(connection)
    assert sentence in finding.sentence
    assert finding.blocking


def test_the_check_tells_an_owner_without_bypassrls_that_rows_are_hidden(saas: Saas, login: Login) -> None:
    dsn = login()
    name = psycopg.conninfo.conninfo_to_dict(dsn)["user"]
    saas.execute(f"GRANT USAGE ON SCHEMA sync TO {name}")
    saas.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA sync TO {name}")
    with psycopg.connect(dsn) as connection:
        (finding,) = check_roles(connection)
    assert "hides rows of schema sync" in finding.sentence
    saas.execute("ALTER TABLE sync.runs NO FORCE ROW LEVEL SECURITY")
    with psycopg.connect(dsn) as connection:
        assert "does not bind the owner of runs" in check_roles(connection)[0].sentence
