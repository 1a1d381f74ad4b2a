"""The numbers behind the asset checks: how fresh, how stuck, how many events nobody can read.

Belongs here: reading the state tables of all workspaces.
Does not: whether a number is acceptable, quotas (`call_buckets`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from scaling.databases import Connection
from sync_pipeline.health import FAILING_TOO_LONG
from sync_pipeline.workspaces import Workspace

EXAMPLES = 20
PATIENCE_POLLS = 5
"""A calendar is stale when its last good sync is older than this many of its own intervals."""
STUCK_AFTER_HOURS = 24


@dataclass(frozen=True, slots=True)
class Stale:
    """A workspace with a calendar that is not as fresh as it should be."""

    workspace: str
    """Partition key."""
    calendars: int
    oldest_seconds: float
    """Since the last good sync of the worst of them."""


@dataclass(frozen=True, slots=True)
class Stuck:
    """A workspace that waits for somebody."""

    workspace: str
    """Partition key."""
    reasons: tuple[str, ...]
    """Kinds of `sync_pipeline.errors` and `parked`, `failing_too_long`, `breaker_open`."""
    hours: float
    """Since it has been so, or since something was last read of it."""


@dataclass(frozen=True, slots=True)
class VitalSigns:
    """The state of the whole sync at one moment."""

    workspaces: int
    """With at least one live calendar."""
    calendars: int
    never_synced_calendars: int
    stale_workspaces: int
    stale: tuple[Stale, ...]
    """The worst of them."""
    oldest_sync_seconds: float
    """Of the calendars that should be synced."""
    failing_workspaces: int
    """Something fails that may pass by itself."""
    failing: tuple[str, ...]
    failing_calendars: int
    open_breakers: int
    connections: int
    refused_connections: int
    stuck_workspaces: int
    stuck: tuple[Stuck, ...]
    """The ones that have been so for longest."""
    quarantined: int
    quarantined_in_calendars: int
    quarantine_reasons: tuple[str, ...]


def read(connection: Connection, *, stale_after_seconds: float) -> VitalSigns:
    """Read the vital signs.

    A calendar says itself when it is due, be it the next poll or, with a push channel, the safety poll. So it is stale
    when it has been due for too long, or when it fails and its last good sync is older than several of its intervals.
    Calendars whose grant was refused, which wait for quota, or whose breaker is open are counted as such and not as
    stale: that they are old is known.

    Args:
        connection: within a transaction.
        stale_after_seconds: nothing younger is stale.
    """
    freshness = connection.execute(
        """
        WITH usable AS MATERIALIZED (
            SELECT g.id, g.tenant_id FROM public.google_connections g LEFT JOIN public.users u ON u.id = g.user_id
            WHERE g.status = 'active' AND u.google_api_enabled IS NOT FALSE
        ), live AS MATERIALIZED (
            SELECT c.tenant_id, c.workspace_id, c.last_succeeded_at, c.consecutive_failures, c.breaker_until,
                now() - coalesce(c.last_succeeded_at, c.discovered_at) AS age,
                now() - greatest(c.due_at, c.last_finished_at, c.discovered_at) AS overdue,
                c.due_at - c.last_finished_at AS interval,
                s.status = 'active' AND (c.breaker_until IS NULL OR c.breaker_until <= now())
                    AND (s.parked_until IS NULL OR s.parked_until <= now())
                    AND (c.connection_id, c.tenant_id) IN (SELECT id, tenant_id FROM usable) AS expected
            FROM sync.calendar_state c JOIN sync.connection_state s USING (tenant_id, workspace_id, connection_id)
            WHERE c.deleted_at IS NULL
        ), judged AS (
            SELECT *, expected AND (overdue > %(limit)s * interval '1 second'
                OR (consecutive_failures > 0
                    AND age > greatest(%(patience)s * interval, %(limit)s * interval '1 second'))) AS stale
            FROM live
        ), ranked AS (
            SELECT tenant_id || ':' || workspace_id AS workspace, count(*) AS calendars,
                count(*) FILTER (WHERE last_succeeded_at IS NULL) AS never,
                count(*) FILTER (WHERE stale) AS stale,
                extract(epoch FROM max(age) FILTER (WHERE stale))::float8 AS worst,
                extract(epoch FROM max(age) FILTER (WHERE expected))::float8 AS oldest,
                count(*) FILTER (WHERE consecutive_failures > 0) AS failing,
                count(*) FILTER (WHERE breaker_until > now()) AS breakers
            FROM judged GROUP BY tenant_id, workspace_id
        )
        SELECT count(*), coalesce(sum(calendars), 0)::bigint, coalesce(sum(never), 0)::bigint,
            count(*) FILTER (WHERE stale > 0), coalesce(max(oldest), 0)::float8, coalesce(sum(failing), 0)::bigint,
            coalesce(sum(breakers), 0)::bigint,
            coalesce((SELECT array_agg(ARRAY[workspace, stale::text, worst::text] ORDER BY worst DESC, workspace)
                      FROM (SELECT * FROM ranked WHERE stale > 0 ORDER BY worst DESC, workspace LIMIT %(shown)s)
                           AS worst_ones), '{}')
        FROM ranked
        """,
        {"limit": stale_after_seconds, "patience": PATIENCE_POLLS, "shown": EXAMPLES},
    ).fetchone()
    stuck = connection.execute(
        """
        WITH connections AS MATERIALIZED (
            SELECT s.* FROM sync.connection_state s JOIN public.google_connections g
                ON g.id = s.connection_id AND g.tenant_id = s.tenant_id AND g.workspace_id = s.workspace_id
            WHERE g.status = 'active'
        ), reasons AS (
            SELECT tenant_id, workspace_id, unnest(string_to_array(coalesce(health_reason, 'unknown'), ', ')) AS reason,
                health_since AS since
            FROM sync.workspace_state WHERE health = 'needs_human'
            UNION ALL
            SELECT tenant_id, workspace_id, status, list_finished_at FROM connections WHERE status <> 'active'
            UNION ALL
            SELECT c.tenant_id, c.workspace_id, 'parked', newest.at
            FROM connections c CROSS JOIN LATERAL (
                SELECT greatest(c.list_finished_at, max(k.last_succeeded_at)) AS at FROM sync.calendar_state k
                WHERE (k.tenant_id, k.workspace_id, k.connection_id) = (c.tenant_id, c.workspace_id, c.connection_id)
                  AND k.deleted_at IS NULL) AS newest
            WHERE c.parked_until > now() AND newest.at < now() - make_interval(hours => %(hours)s)
            UNION ALL
            SELECT tenant_id, workspace_id, 'failing_too_long', list_finished_at FROM connections
            WHERE greatest(failed_visits, consecutive_failures) >= %(visits)s
            UNION ALL
            SELECT k.tenant_id, k.workspace_id, 'failing_too_long', coalesce(k.last_succeeded_at, k.discovered_at)
            FROM sync.calendar_state k
            WHERE k.deleted_at IS NULL AND k.consecutive_failures >= %(visits)s
              AND EXISTS (SELECT FROM public.google_connections g
                          WHERE g.id = k.connection_id AND g.tenant_id = k.tenant_id AND g.status = 'active')
        )
        SELECT tenant_id || ':' || workspace_id, array_agg(DISTINCT reason ORDER BY reason),
            coalesce(extract(epoch FROM now() - min(since)) / 3600, 0)::float8 AS hours,
            count(*) OVER ()
        FROM reasons GROUP BY tenant_id, workspace_id ORDER BY hours DESC, 1 LIMIT %(shown)s
        """,
        {"hours": STUCK_AFTER_HOURS, "visits": FAILING_TOO_LONG, "shown": EXAMPLES},
    ).fetchall()
    failing = connection.execute(
        """
        SELECT tenant_id || ':' || workspace_id || ' (' || coalesce(health_reason, '') || ')', count(*) OVER ()
        FROM sync.workspace_state WHERE health = 'degraded' ORDER BY health_since, 1 LIMIT %s
        """,
        [EXAMPLES],
    ).fetchall()
    grants = connection.execute(
        """
        SELECT count(*), count(*) FILTER (WHERE s.status <> 'active')
        FROM sync.connection_state s JOIN public.google_connections g
            ON g.id = s.connection_id AND g.tenant_id = s.tenant_id AND g.workspace_id = s.workspace_id
        WHERE g.status = 'active'
        """
    ).fetchone()
    poison = connection.execute(
        "SELECT count(*), count(DISTINCT (tenant_id, workspace_id, calendar_id)), "
        "coalesce(array_agg(DISTINCT reason), '{}') FROM sync.quarantine"
    ).fetchone()
    if freshness is None or grants is None or poison is None:
        raise AssertionError("aggregates without GROUP BY return a row")
    workspaces, calendars, never, stale, oldest, failing_calendars, breakers, worst = freshness
    return VitalSigns(
        workspaces=workspaces,
        calendars=calendars,
        never_synced_calendars=never,
        stale_workspaces=stale,
        stale=tuple(Stale(workspace, int(count), float(age)) for workspace, count, age in worst),
        oldest_sync_seconds=oldest,
        failing_workspaces=failing[0][1] if failing else 0,
        failing=tuple(text for text, _ in failing),
        failing_calendars=failing_calendars,
        open_breakers=breakers,
        connections=grants[0],
        refused_connections=grants[1],
        stuck_workspaces=stuck[0][3] if stuck else 0,
        stuck=tuple(Stuck(workspace, tuple(reasons), hours) for workspace, reasons, hours, _ in stuck),
        quarantined=poison[0],
        quarantined_in_calendars=poison[1],
        quarantine_reasons=tuple(poison[2][:EXAMPLES]),
    )


def healthy(connection: Connection, workspaces: Sequence[Workspace]) -> list[Workspace]:
    """Find those of the workspaces in which nothing fails.

    Args:
        connection: within a transaction.
        workspaces: to choose from.
    """
    rows = connection.execute(
        """
        SELECT tenant_id, workspace_id FROM sync.workspace_state
        WHERE health = 'healthy' AND (tenant_id, workspace_id) IN (SELECT * FROM unnest(%s::uuid[], %s::uuid[]))
        ORDER BY tenant_id, workspace_id
        """,
        [[one.tenant_id for one in workspaces], [one.workspace_id for one in workspaces]],
    ).fetchall()
    return [Workspace(*row) for row in rows]
