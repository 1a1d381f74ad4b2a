"""The book of runs: what each did, how many requests each tenant cost.

Belongs here: `sync.runs` and `sync.api_calls`.
Does not: the state of workspaces and calendars.
"""

from collections.abc import Mapping
from datetime import datetime
from uuid import UUID

from psycopg import sql

from scaling.databases import Connection
from sync_pipeline.google_calendar import CallCounter


def start(connection: Connection, *, run_id: str, shard: int, of: int, workspaces_due: int) -> None:
    """Open the entry of a run; a retried run starts its entry again."""
    connection.execute(
        """
        INSERT INTO sync.runs
            (run_id, shard, of, workspaces_due, started_at, heartbeat_at, calendars_live, calendars_watched)
        SELECT %s, %s, %s, %s, now(), now(),
            (SELECT count(*) FROM sync.calendar_state WHERE deleted_at IS NULL),
            (SELECT count(DISTINCT (tenant_id, workspace_id, calendar_id)) FROM sync.channels
             WHERE calendar_id IS NOT NULL AND state = 'open' AND last_message_at IS NOT NULL AND expires_at > now())
        ON CONFLICT (run_id) DO UPDATE
        SET started_at = now(), heartbeat_at = now(), finished_at = NULL, workspaces_due = excluded.workspaces_due
        """,
        [run_id, shard, of, workspaces_due],
    )


def heartbeat(connection: Connection, run_id: str) -> None:
    """Say that the run is still at work."""
    connection.execute("UPDATE sync.runs SET heartbeat_at = now() WHERE run_id = %s", [run_id])


def finish(connection: Connection, run_id: str, numbers: Mapping[str, int | float]) -> None:
    """Close the entry of a run.

    Args:
        connection: within a transaction.
        run_id: of the run.
        numbers: by column name.
    """
    assignments = sql.SQL(", ").join(sql.Identifier(name) + sql.SQL(" = ") + sql.Placeholder(name) for name in numbers)
    connection.execute(
        sql.SQL("UPDATE sync.runs SET finished_at = now(), heartbeat_at = now(), {} WHERE run_id = %(run_id)s").format(
            assignments
        ),
        {**numbers, "run_id": run_id},
    )


def count_calls(connection: Connection, tenant_id: UUID, calls: CallCounter) -> None:
    """Add requests to a tenant's counters of today."""
    if not calls:
        return
    with connection.cursor() as cursor:
        cursor.executemany(
            """
            INSERT INTO sync.api_calls AS mine (tenant_id, day, method, outcome, calls)
            VALUES (%s, (now() AT TIME ZONE 'UTC')::date, %s, %s, %s)
            ON CONFLICT (tenant_id, day, method, outcome) DO UPDATE SET calls = mine.calls + excluded.calls
            """,
            [(tenant_id, method, outcome, count) for (method, outcome), count in sorted(calls.items())],
        )


def count_freshness(connection: Connection, freshness: Mapping[int, int]) -> None:
    """Add changes that became visible to today's histogram.

    Args:
        connection: within a transaction.
        freshness: upper bound of their age in seconds to how many.
    """
    with connection.cursor() as cursor:
        cursor.executemany(
            """
            INSERT INTO sync.freshness AS mine (day, le_seconds, changes)
            VALUES ((now() AT TIME ZONE 'UTC')::date, %s, %s)
            ON CONFLICT (day, le_seconds) DO UPDATE SET changes = mine.changes + excluded.changes
            """,
            sorted(freshness.items()),
        )


def now(connection: Connection) -> datetime:
    """The database's clock, the only one leases and due times know."""
    row = connection.execute("SELECT clock_timestamp()").fetchone()
    if row is None:
        raise AssertionError("SELECT without FROM returns a row")
    moment: datetime = row[0]
    return moment
