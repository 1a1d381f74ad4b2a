"""What a SaaS has behind it that is about to outgrow its cron: calls to Google this month, figures of past weeks.

Belongs here: rows of the pipeline's own tables that the demo and the pictures start from. Does not: the SaaS's tables
(saas/seed.py). Every sample says in its evidence that it was made up.
"""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
from psycopg.rows import TupleRow

SETTINGS = {
    "SCALING_INCREMENTAL_SYNC": "auto",
    "SCALING_PARALLEL_SYNC": "auto",
    "SCALING_CATALOGUE_FILE": str(Path(__file__).with_name("demo_thresholds.toml")),
}
"""What lets thresholds act on it."""
CALLS_LEFT = 100
"""To the threshold of the scaling plan, 10,000 a month: one complete read of all calendars takes it over it."""
CALLS_OF_THE_PLAN = 10_000
DAYS = 60
MADE_UP = json.dumps({"made up": "history of the demo"})


def seed(connection: psycopg.Connection[TupleRow], now: datetime) -> None:
    """Write the history, in the caller's transaction; once.

    Args:
        connection: as a role that may write schemas sync and scaling.
        now: the end of the history.
    """
    if connection.execute("SELECT FROM scaling.samples LIMIT 1").rowcount:
        return
    month = now.astimezone(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    connection.execute(
        "INSERT INTO sync.api_calls (tenant_id, day, method, outcome, calls)"
        " SELECT id, %s, 'events.list', '2xx', %s / count(*) OVER () FROM public.tenants",
        [month.date(), CALLS_OF_THE_PLAN - CALLS_LEFT],
    )
    tenants, users, size = _now(connection)
    yesterday = now - timedelta(days=1)
    for metric, dims, last, pace in (
        # Over its threshold yesterday for the first time, as is the next one in a disposable stack; a durable one's
        # table is larger.
        ("google_tenants", "", min(tenants, 30), 0.35),
        ("audit_logs_bytes", "shard=main", 0.99 * size, 0.006 * size),
        ("users_total", "", users, 5.0),
    ):
        connection.execute(
            "INSERT INTO scaling.samples (metric, dims, at, status, value, evidence)"
            " SELECT %(metric)s, %(dims)s, %(yesterday)s::timestamptz - n * interval '1 day', 'ok',"
            "        floor(greatest(%(last)s - %(pace)s * (n + 0.2 * sin(n * 2.4)), 0)), %(made_up)s::jsonb"
            " FROM generate_series(0, %(days)s) n",
            {
                "metric": metric,
                "dims": dims,
                "yesterday": yesterday,
                "last": last,
                "pace": pace,
                "days": DAYS,
                "made_up": MADE_UP,
            },
        )


def _now(connection: psycopg.Connection[TupleRow]) -> tuple[float, float, float]:
    row = connection.execute(
        "SELECT (SELECT count(DISTINCT tenant_id) FROM public.users WHERE google_api_enabled)::float8,"
        " (SELECT count(*) FROM public.users)::float8, pg_total_relation_size('public.audit_logs')::float8"
    ).fetchone()
    if row is None:
        raise AssertionError("a SELECT without FROM has one row")
    return row[0], row[1], row[2]
