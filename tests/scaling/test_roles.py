"""The roles of schema sync on a server that does not have them yet: who may create them, and what if nobody may.

Roles belong to the whole server, so these tests have one of their own.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count

import psycopg
import pytest
from cryptography.fernet import Fernet

from devstack import postgres
from devstack.postgres import Postgres
from devstack.processes import Supervisor
from scaling import migrate
from scaling.contract import SYNC_ROLES, check_roles

SETTINGS = {
    "GOOGLE_CLIENT_ID": "client",
    "GOOGLE_CLIENT_SECRET": "secret",
    "GRANT_ENCRYPTION_KEYS": Fernet.generate_key().decode(),
}

UPGRADE = [sys.executable, "-c", "import sys; from scaling import migrate; migrate.upgrade(sys.argv[1])"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    with Supervisor(tmp_path_factory.mktemp("roles")) as supervisor:
        yield postgres.start(supervisor, disposable=True)


@pytest.fixture
def make_database(server: Postgres) -> Iterator[Callable[[str], str]]:
    """Databases on a server without the roles: `make_database("CREATEROLE")` is the DSN of the owner of one."""
    made: list[tuple[str, str]] = []
    numbers = count(1)

    def make(attributes: str) -> str:
        number = next(numbers)
        role, name = f"owner_{number}", f"database_{number}"
        with psycopg.connect(server.dsn(), autocommit=True) as admin:
            admin.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'owner' {attributes}".encode())
            admin.execute(f"CREATE DATABASE {name} OWNER {role}".encode())
        made.append((role, name))
        return server.dsn(name, user=role, password="owner")

    yield make
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        for _, name in made:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())
        for role in SYNC_ROLES:
            admin.execute(f"DROP ROLE IF EXISTS {role}".encode())
        for role, _ in made:
            admin.execute(f"DROP OWNED BY {role}; DROP ROLE {role}".encode())


def roles(server: Postgres) -> set[str]:
    with psycopg.connect(server.dsn()) as admin:
        found = admin.execute("SELECT rolname FROM pg_roles WHERE rolname = ANY(%s)", [list(SYNC_ROLES)])
        return {name for (name,) in found}


def findings(dsn: str) -> list[str]:
    with psycopg.connect(dsn) as connection:
        return [finding.sentence for finding in check_roles(connection)]


def test_a_role_that_may_not_create_roles_migrates_all_the_same_and_is_told_what_is_missing(
    server: Postgres,
    make_database: Callable[[str], str],
    settings_environment: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dsn = make_database("BYPASSRLS")
    settings_environment(DATABASE_URL=dsn, **SETTINGS)
    migrated = subprocess.run([sys.executable, "-m", "scaling", "migrate"], capture_output=True, text=True, check=False)
    assert (migrated.returncode, migrated.stderr) == (0, "")
    assert "up to date" in migrated.stdout
    assert "note: there is no role pipeline_worker, pipeline_webhook" in migrated.stdout
    assert roles(server) == set()
    (told,) = findings(dsn)
    checked = subprocess.run(
        [sys.executable, "-m", "scaling", "check", "--only", "sync"], capture_output=True, text=True, check=False
    )
    assert "there is no role" in checked.stdout

    # The remedy, word for word.
    creations, call = told.split("as one that may: ")[1].split("; then, as the owner of schema sync: ")
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(creations.encode())
    assert "has no rights in schema sync" in findings(dsn)[0]
    with psycopg.connect(dsn) as owner:
        owner.execute(call.encode())
    assert findings(dsn) == []


def test_databases_of_one_server_migrated_at_the_same_moment_all_get_the_roles(
    server: Postgres, make_database: Callable[[str], str]
) -> None:
    dsns = [make_database("CREATEROLE BYPASSRLS") for _ in range(4)]
    for dsn in dsns:
        migrate.upgrade(dsn, revision="0004")
    started = [subprocess.Popen([*UPGRADE, dsn], stderr=subprocess.PIPE, text=True) for dsn in dsns]
    assert [(process.communicate()[1], process.returncode) for process in started] == [("", 0)] * len(dsns)
    assert roles(server) == set(SYNC_ROLES)
    with psycopg.connect(server.dsn("database_1")) as admin:
        (count_of_policies,) = admin.execute("SELECT count(*) FROM pg_policy").fetchone() or (0,)
    assert count_of_policies > 20


def test_a_role_created_by_another_while_it_is_created_here_is_taken(
    server: Postgres, make_database: Callable[[str], str]
) -> None:
    dsn = make_database("CREATEROLE BYPASSRLS")
    migrate.upgrade(dsn, revision="0004")
    with psycopg.connect(server.dsn()) as admin:  # uncommitted: the migration does not see it, and waits for it
        admin.execute("CREATE ROLE pipeline_worker NOLOGIN")
        migrating = subprocess.Popen([*UPGRADE, dsn], stderr=subprocess.PIPE, text=True)
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'owner_1' AND wait_event_type = 'Lock'"
        with psycopg.connect(server.dsn(), autocommit=True) as watching:
            while watching.execute(waiting).fetchone() != (1,):
                assert migrating.poll() is None, migrating.communicate()
    assert (migrating.communicate()[1], migrating.returncode) == ("", 0)
    assert findings(dsn) == []


def test_the_plain_script_of_a_supabase_project_makes_the_roles_and_lends_them(
    server: Postgres, make_database: Callable[[str], str]
) -> None:
    """There the role `postgres` owns everything, creates roles and bypasses policies, and is no superuser."""
    dsn = make_database("CREATEROLE BYPASSRLS NOSUPERUSER")
    with psycopg.connect(dsn, autocommit=True) as editor:
        editor.execute(migrate.as_sql().encode())
        editor.execute("CREATE ROLE sync_login LOGIN PASSWORD 'sync'")
        try:
            editor.execute("GRANT pipeline_worker TO sync_login")
            with psycopg.connect(server.dsn("database_1", user="sync_login", password="sync")) as worker:
                assert check_roles(worker) == []
                worker.execute("INSERT INTO sync.runs (run_id, shard, of) VALUES ('one', 0, 1)")
                assert worker.execute("SELECT count(*) FROM sync.runs").fetchone() == (1,)
        finally:
            editor.execute("DROP ROLE sync_login")


def test_a_role_that_row_level_security_does_not_bind_is_named(
    server: Postgres, make_database: Callable[[str], str]
) -> None:
    dsn = make_database("CREATEROLE BYPASSRLS")
    migrate.upgrade(dsn)
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute("ALTER ROLE pipeline_reader BYPASSRLS")
    assert "does not bind role pipeline_reader; ALTER ROLE pipeline_reader NOSUPERUSER NOBYPASSRLS" in findings(dsn)[0]
