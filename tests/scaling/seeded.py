"""A database as an installation leaves it that has run for a while: syncs, counters, months, samples, episodes.

Belongs here: rows in bulk, for the report's tests and its benchmark. Does not: looking at what is made of them.
"""

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta

import psycopg
from psycopg.types.json import Jsonb

from scaling import episodes, samples
from scaling.capabilities import Capability, Mode, switch
from scaling.catalogue import Catalogue, catalogue
from scaling.samples import Sample
from scaling.settings import ArchiveSourceSettings, SyncScheduleSettings
from scaling.units import Unit

TABLE = "public.audit_logs"
POLLED_UNTIL_DAYS_AGO = 60
"""Before that every calendar was polled."""

_RUNS = """
INSERT INTO sync.runs (run_id, shard, of, started_at, heartbeat_at, finished_at, workspaces_served, workspaces_failed,
    calendars_synced, api_calls, events_upserted, calendars_live, calendars_watched, duration_seconds, incremental,
    parallel)
SELECT 'run-' || extract(epoch FROM at)::bigint, 0, 1, at, at, at, %(workspaces)s, 1, 80, 100, 40,
    %(workspaces)s, %(workspaces)s * 9 / 10, 20, at > %(incremental)s, true
FROM generate_series(%(now)s::timestamptz - make_interval(days => %(days)s), %(now)s, interval '2 minutes') at
"""
_CALLS = """
INSERT INTO sync.api_calls (tenant_id, day, method, outcome, calls)
SELECT md5('tenant ' || n)::uuid, day::date, method, outcome,
    greatest(1, least_calls * CASE WHEN day > %(incremental)s THEN 1 ELSE 40 END
        + (n + extract(day FROM day)::int) %% 5)
FROM generate_series(1, %(workspaces)s) n,
    generate_series(%(now)s::timestamptz - make_interval(days => %(days)s), %(now)s, interval '1 day') day,
    (VALUES ('events.list', '200', 6), ('calendarList.list', '200', 1), ('events.watch', '200', 1),
        ('events.list', '429', 0), ('oauth.refresh', '200', 3)) kinds (method, outcome, least_calls)
"""
_FRESHNESS = """
INSERT INTO sync.freshness (day, le_seconds, changes)
SELECT day::date, bound, 1 + 900 * exp(-abs(ln(bound) - CASE WHEN day > %(incremental)s THEN 2 ELSE 6 END))::int
FROM generate_series(%(now)s::timestamptz - make_interval(days => %(days)s), %(now)s, interval '1 day') day,
    unnest(ARRAY[1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400]) bound
"""
_WORKSPACES = """
INSERT INTO sync.workspace_state (tenant_id, workspace_id, last_served_at, health, health_reason)
SELECT md5('tenant ' || n)::uuid, md5('workspace ' || n)::uuid, %(now)s,
    CASE n %% 500 WHEN 1 THEN 'needs_human' WHEN 2 THEN 'degraded' ELSE 'healthy' END,
    CASE n %% 500 WHEN 1 THEN 'reauth_required' WHEN 2 THEN 'transient' END
FROM generate_series(1, %(workspaces)s) n
"""


def sync(dsn: str, now: datetime, *, workspaces: int, days: int) -> None:
    """Runs every two minutes, and their counters; polling in the beginning, push later.

    Args:
        dsn: of a superuser.
        now: when the last run started.
        workspaces: each with one calendar.
        days: of history.
    """
    arguments = {
        "now": now,
        "workspaces": workspaces,
        "days": days,
        "incremental": now - timedelta(days=min(POLLED_UNTIL_DAYS_AGO, days * 2 // 3)),
    }
    with psycopg.connect(dsn) as connection:
        for statement in (_RUNS, _CALLS, _FRESHNESS, _WORKSPACES):
            connection.execute(statement.encode(), arguments)


def month(
    dsn: str, first: date, *, state: str = "archived", pruned: bool = False, size: int = 30_000_000, error: str = ""
) -> None:
    """One month of the ledger.

    Args:
        dsn: of a superuser.
        first: its first day.
        state: as `archive.months` has it.
        pruned: whether its rows have left Postgres.
        size: bytes of Parquet.
        error: why it failed.
    """
    begin = datetime(first.year, first.month, 1, tzinfo=UTC)
    end = (begin + timedelta(days=32)).replace(day=1)
    with psycopg.connect(dsn) as connection:
        connection.execute(
            "INSERT INTO archive.months (source_table, shard, month, time_zone, from_at, to_at, state, epoch, owner,"
            " started_at, error, generation, rows, row_digest, parts, bytes, manifest_key, manifest_sha256,"
            " archived_at, verified_at, pruned_at)"
            " VALUES (%(table)s, 'main', %(month)s, 'UTC', %(begin)s, %(end)s, %(state)s, 1, 'run', %(end)s, %(error)s,"
            " 1, 1000000, 1, 4, %(bytes)s, 'manifest', 'sha', %(end)s, %(end)s, %(pruned)s)",
            {
                "table": TABLE,
                "month": first,
                "begin": begin,
                "end": end,
                "state": state,
                "error": error or None,
                "bytes": size,
                "pruned": end + timedelta(days=400) if pruned else None,
            },
        )


def chain(dsn: str, links: int, now: datetime, *, signature: str | None = "signed") -> None:
    """The pinned end of the chain.

    Args:
        dsn: of a superuser.
        links: the number of the newest.
        now: when it was pinned.
        signature: None: unsigned.
    """
    with psycopg.connect(dsn) as connection:
        connection.execute(
            "INSERT INTO archive.chain_heads (source_table, shard, sequence, link_key, link_sha256, signature,"
            " pinned_at) VALUES (%s, 'main', %s, 'links/1', %s, %s, %s)",
            [TABLE, links, "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08", signature, now],
        )


def audit(dsn: str, links: int, at: datetime, *, worst: Sequence[str] = (), deep: bool = False) -> None:
    """An audit of the chain.

    Args:
        dsn: of a superuser.
        links: of the chain.
        at: when it ended.
        worst: what it found in the month 2026-05, a sentence each.
        deep: every row was read.
    """
    findings = [{"month": "2026-05", "kind": "altered", "key": "k", "text": text, "remedy": ""} for text in worst]
    with psycopg.connect(dsn) as connection:
        connection.execute(
            "INSERT INTO archive.audits (source_table, shard, ended_at, deep, links, months, findings, worst)"
            " VALUES (%s, 'main', %s, %s, %s, %s, %s, %s)",
            [TABLE, at, deep, links, links, len(findings), Jsonb(findings)],
        )


def months(dsn: str, now: datetime, *, count: int, missing: Sequence[int] = (), pruned: int = 6) -> None:
    """Closed months up to the last one, archived; the oldest are pruned.

    Args:
        dsn: of a superuser.
        now: the month of it is open.
        count: how many.
        missing: how many months ago those are that were not archived.
        pruned: how many of the oldest have left Postgres.
    """
    first = now.date().replace(day=1)
    for ago in range(1, count + 1):
        first = (first - timedelta(days=1)).replace(day=1)
        if ago not in missing:
            month(dsn, first, pruned=ago > count - pruned, size=30_000_000 + 1_000_000 * (count - ago))
    chain(dsn, count - len(missing), now - timedelta(hours=6))
    audit(dsn, count - len(missing), now - timedelta(days=20), deep=True)
    audit(dsn, count - len(missing), now - timedelta(hours=5))


def known() -> Catalogue:
    """The catalogue with every default."""
    return catalogue(ArchiveSourceSettings(), SyncScheduleSettings())


def metrics(dsn: str, now: datetime, *, days: int) -> None:
    """Hourly samples of every metric that has a rule: some quiet, some growing, one past its threshold; their episodes.

    Args:
        dsn: of a superuser.
        now: of the newest.
        days: of history.
    """
    everything = known()
    taken: list[Sample] = []
    for number, metric in enumerate(everything):
        if metric.rule is None or number % 9 == 8:
            status = samples.Status.NOT_CONFIGURED if number % 9 == 8 else samples.Status.OK
            value = None if number % 9 == 8 else 12.5
            note = {"note": "its credentials are not set"} if number % 9 == 8 else {}
            taken.append(Sample(metric.name, now, value, status, evidence=note))
            continue
        grows = number % 3
        top = 0.55 + 0.13 * (number % 4) + (0.1 if number == 0 else 0.0)
        threshold = metric.rule.threshold or 100.0
        for hour in range(days * 24 + 1):
            at = now - timedelta(hours=days * 24 - hour)
            share = top * (0.4 + 0.6 * hour / (days * 24)) if grows else top * 0.6
            noise = 1 + 0.01 * ((hour * 7919 + number) % 7 - 3)
            value = threshold * share * noise
            if metric.rule.recovery is not None and metric.rule.compare.value.startswith("<"):
                value = threshold * (2.2 - share)
            if metric.unit is Unit.FLAG:
                value = 0.0
            taken.append(Sample(metric.name, at, value))
    with psycopg.connect(dsn) as connection:
        samples.record(connection, taken)
        connection.commit()
        episodes.evaluate(connection, everything.watches(dict.fromkeys(Capability, Mode.PROPOSE)), now)
        connection.commit()
        switch(
            connection, Capability.INCREMENTAL_SYNC, on=True, by="google_calls_month", reason="episode 1 was approved"
        )


def everything(dsn: str, now: datetime, *, workspaces: int, days: int) -> None:
    """All of it.

    Args:
        dsn: of a superuser.
        now: the present.
        workspaces: each with one calendar.
        days: of history.
    """
    sync(dsn, now, workspaces=workspaces, days=days)
    months(dsn, now, count=22, missing=(4,))
    metrics(dsn, now, days=days)
