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


def start(
    connection: Connection, *, run_id: str, shard: int, of: int, workspaces_due: int, incremental: bool, parallel: bool
) -> None:
    """Open the entry of a run; a retried run starts its entry again.

    Args:
        connection: within a transaction.
        run_id: of the run.
        shard: which of the runs of this moment.
        of: how many there are.
        workspaces_due: when it began.
        incremental: sync tokens, push and adaptive polling are in force.
        parallel: the pool of workers is in force.
    """
    connection.execute(
        """
        INSERT INTO sync.runs
            (run_id, shard, of, workspaces_due, incremental, parallel, started_at, heartbeat_at, calendars_live,
             calendars_watched)
        SELECT %s, %s, %s, %s, %s, %s, now(), now(),
            (SELECT count(*) FROM sync.calendar_state WHERE deleted_at IS NULL),
            (SELECT count(DISTINCT (tenant_id, workspace_id, calendar_id)) FROM sync.channels
             WHERE calendar_id IS NOT NULL AND state = 'open' AND last_message_at IS NOT NULL AND expires_at > now())
        ON CONFLICT (run_id) DO UPDATE
        SET started_at = now(), heartbeat_at = now(), finished_at = NULL, workspaces_due = excluded.workspaces_due,
            incremental = excluded.incremental, parallel = excluded.parallel
        """,
        [run_id, shard, of, workspaces_due, incremental, parallel],
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
    # Not executemany: psycopg sends it as a pipeline, whose last message leaves Postgres without
    # idle_in_transaction_session_timeout, so a process frozen before its commit would keep its locks for ever.
    names = sorted(calls)
    connection.execute(
        """
        INSERT INTO sync.api_calls AS mine (tenant_id, day, method, outcome, calls)
        SELECT %s, (now() AT TIME ZONE 'UTC')::date, * FROM unnest(%s::text[], %s::text[], %s::bigint[])
        ON CONFLICT (tenant_id, day, method, outcome) DO UPDATE SET calls = mine.calls + excluded.calls
        """,
        [tenant_id, [method for method, _ in names], [outcome for _, outcome in names], [calls[n] for n in names]],
    )


def count_freshness(connection: Connection, freshness: Mapping[int, int]) -> None:
    """Add changes that became visible to today's histogram.

    Args:
        connection: within a transaction.
        freshness: upper bound of their age in seconds to how many.
    """
    connection.execute(
        """
        INSERT INTO sync.freshness AS mine (day, le_seconds, changes)
        SELECT (now() AT TIME ZONE 'UTC')::date, * FROM unnest(%s::int[], %s::bigint[])
        ON CONFLICT (day, le_seconds) DO UPDATE SET changes = mine.changes + excluded.changes
        """,
        [sorted(freshness), [freshness[bound] for bound in sorted(freshness)]],
    )


def now(connection: Connection) -> datetime:
    """The database's clock, the only one leases and due times know."""
    row = connection.execute("SELECT clock_timestamp()").fetchone()
    if row is None:
        raise AssertionError("SELECT without FROM returns a row")
    moment: datetime = row[0]
    return moment
