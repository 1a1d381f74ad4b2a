"""The database's virtual clock, which other tests stand on."""

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import psycopg

from devstack.servers import Database
from scaling.databases import Shard
from tests.sync_pipeline import virtual_clock

START = datetime(2026, 6, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)


def test_sessions_under_the_virtual_clock_read_it_from_every_time_function(database: Database) -> None:
    virtual_clock.install(database.admin_dsn, START)
    shard = Shard("main", virtual_clock.dsn(database.dsn))
    virtual_clock.advance(database.admin_dsn, 3600.0)

    with shard.transaction() as connection:
        row = connection.execute("SELECT now(), clock_timestamp(), session_user").fetchone()

    shard.close()
    assert row == (START + HOUR, START + HOUR, "pipeline")
    assert virtual_clock.now(database.admin_dsn) == START + HOUR


def test_column_defaults_and_views_of_the_sync_follow_the_virtual_clock(database: Database) -> None:
    virtual_clock.install(database.admin_dsn, START)
    tenant, workspace = uuid4(), uuid4()
    with psycopg.connect(virtual_clock.dsn(database.dsn), autocommit=True) as connection:
        connection.execute(
            "INSERT INTO sync.calendar_state (tenant_id, workspace_id, calendar_id, connection_id, lease_until) "
            "VALUES (%s, %s, 'c', %s, %s)",
            [tenant, workspace, uuid4(), START + HOUR],
        )
        discovered = connection.execute("SELECT discovered_at FROM sync.calendar_state").fetchall()
        before = connection.execute("SELECT in_progress FROM sync.calendar_status").fetchall()
        virtual_clock.set(database.admin_dsn, START + 2 * HOUR)
        after = connection.execute("SELECT in_progress FROM sync.calendar_status").fetchall()

    assert (discovered, before, after) == ([(START,)], [(True,)], [(False,)])


def test_other_sessions_keep_the_real_time(database: Database) -> None:
    virtual_clock.install(database.admin_dsn, START)

    with psycopg.connect(database.dsn) as connection:
        row = connection.execute("SELECT now() = CURRENT_TIMESTAMP").fetchone()

    assert row == (True,)
