"""How long the pipeline's own bookkeeping is kept.

Belongs here: trimming runs and counters of past days. Does not: calendars, events or any state a sync works with;
Dagster's event log (`event_log_retention`).
"""

from dataclasses import dataclass

from psycopg import sql

from scaling.databases import Connection

RUNS_DAYS = 90
COUNTERS_DAYS = 400
"""More than a year, so that a month can be held against the same month of the year before."""

COUNTERS = ("api_calls", "freshness", "webhook_messages", "call_days")


@dataclass(frozen=True, slots=True)
class Trimmed:
    """Rows removed from each table of schema `sync`, or in a dry run those that would have been."""

    rows: dict[str, int]

    @property
    def total(self) -> int:
        """Of all tables."""
        return sum(self.rows.values())


def trim(
    connection: Connection, *, runs_days: int = RUNS_DAYS, counters_days: int = COUNTERS_DAYS, dry_run: bool = False
) -> Trimmed:
    """Remove runs and counters that are older.

    Args:
        connection: within a transaction.
        runs_days: rows of `sync.runs` that started longer ago go.
        counters_days: counters of earlier UTC days go.
        dry_run: count only.

    Returns:
        How many rows of which table.
    """
    conditions = {"runs": sql.SQL("started_at < now() - make_interval(days => %s)")} | dict.fromkeys(
        COUNTERS, sql.SQL("day < (now() AT TIME ZONE 'UTC')::date - %s")
    )
    rows = {}
    for table, condition in conditions.items():
        verb = sql.SQL("SELECT FROM" if dry_run else "DELETE FROM")
        statement = sql.SQL("{} {} WHERE ").format(verb, sql.Identifier("sync", table)) + condition
        rows[table] = connection.execute(statement, [runs_days if table == "runs" else counters_days]).rowcount
    return Trimmed(rows)
