"""The router: pools, transactions, read-only readers, and errors that never show a DSN."""

import uuid
from collections.abc import Iterator

import psycopg
import pytest

from devstack.servers import Database
from scaling.databases import DatabaseRouter, Shard
from scaling.errors import UserError

TENANT = uuid.UUID(int=1)


@pytest.fixture
def router(database: Database) -> Iterator[DatabaseRouter]:
    with DatabaseRouter(Shard("main", database.dsn, pool_size=2, application_name="router test")) as router:
        yield router


def tenants(router: DatabaseRouter) -> int:
    with router.reader(TENANT) as connection:
        row = connection.execute("SELECT count(*) FROM sync.runs").fetchone()
    assert row is not None
    return int(row[0])


def insert(connection: psycopg.Connection[tuple[object, ...]]) -> None:
    connection.execute("INSERT INTO sync.runs (run_id, shard, of) VALUES (%s, 0, 1)", (str(uuid.uuid4()),))


def insert_and_fail(router: DatabaseRouter) -> None:
    with router.writer(TENANT) as connection:
        insert(connection)
        raise RuntimeError("on purpose")


def test_a_writer_commits_at_the_end(router: DatabaseRouter) -> None:
    with router.writer(TENANT) as connection:
        insert(connection)
    assert tenants(router) == 1


def test_a_writer_rolls_back_on_an_exception_and_its_connection_is_used_again(router: DatabaseRouter) -> None:
    for _ in range(5):  # more often than the pool has connections
        with pytest.raises(RuntimeError, match="on purpose"):
            insert_and_fail(router)
    assert tenants(router) == 0


def test_a_reader_cannot_write(router: DatabaseRouter) -> None:
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction), router.reader(TENANT) as connection:
        insert(connection)


def test_a_writer_after_a_reader_on_the_same_connection_can_write(router: DatabaseRouter) -> None:
    for _ in range(3):
        tenants(router)
        with router.writer(TENANT) as connection:
            insert(connection)
    assert tenants(router) == 3


def test_a_connection_the_server_dropped_is_replaced(router: DatabaseRouter, database: Database) -> None:
    tenants(router)
    with psycopg.connect(database.admin_dsn, autocommit=True) as admin:
        admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = 'router test' AND datname = current_database()"
        )
    assert tenants(router) == 0


def test_a_process_that_freezes_inside_a_transaction_loses_it(router: DatabaseRouter) -> None:
    with router.reader(TENANT) as connection:
        assert connection.execute("SHOW idle_in_transaction_session_timeout").fetchone() == ("1min",)


def test_an_arrow_connection_reads_what_a_dedicated_one_wrote(router: DatabaseRouter) -> None:
    (shard,) = router.shards()
    with shard.dedicated() as connection:
        insert(connection)
    with shard.arrow() as arrow, arrow.cursor() as cursor:
        cursor.execute("SELECT of FROM sync.runs")
        assert cursor.fetch_arrow_table().to_pylist() == [{"of": 1}]


def test_an_unreachable_database_is_named_without_its_password() -> None:
    shard = Shard("main", "postgresql://pipeline:hush@127.0.0.1:1/saas")
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1 does not answer.*DATABASE_URL") as raised, shard.dedicated():
        pass
    assert "hush" not in str(raised.value)
    assert "hush" not in repr(shard)


def test_an_unknown_shard_is_named(router: DatabaseRouter) -> None:
    assert router.shard("main") in router.shards()
    with pytest.raises(UserError, match="no database shard 'tokyo'; known: main"):
        router.shard("tokyo")
