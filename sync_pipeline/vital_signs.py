"""The numbers behind the asset checks: how fresh, how stuck, how many events nobody can read.

Belongs here: reading the state tables of all workspaces. Does not: whether a number is acceptable.
"""

from dataclasses import dataclass

from scaling.databases import Connection

EXAMPLES = 20


@dataclass(frozen=True, slots=True)
class VitalSigns:
    """The state of the whole sync at one moment. Ages are in seconds; examples are partition keys."""

    calendars: int
    stale_calendars: int
    never_synced_calendars: int
    oldest_sync_seconds: float
    failing_calendars: int
    open_breakers: int
    connections: int
    refused_connections: int
    workspaces_needing_human: tuple[str, ...]
    workspaces_failing: tuple[str, ...]
    quarantined: int
    quarantined_in_calendars: int
    quarantine_reasons: tuple[str, ...]


def read(connection: Connection, *, stale_after_seconds: float) -> VitalSigns:
    """Read the vital signs.

    Calendars whose grant was refused, and calendars with an open breaker, are counted as such and not as stale:
    that they are old is known and somebody has been told.

    Args:
        connection: within a transaction.
        stale_after_seconds: a calendar whose last good sync is older is stale.
    """
    calendars = connection.execute(
        """
        WITH live AS (
            SELECT c.*, s.status = 'active' AND (c.breaker_until IS NULL OR c.breaker_until <= now())
                AND EXISTS (SELECT FROM public.google_connections g
                            WHERE g.id = c.connection_id AND g.tenant_id = c.tenant_id AND g.status = 'active'
                              AND NOT EXISTS (SELECT FROM public.users u
                                              WHERE u.id = g.user_id AND NOT u.google_api_enabled)) AS expected
            FROM sync.calendar_state c JOIN sync.connection_state s USING (tenant_id, workspace_id, connection_id)
            WHERE c.deleted_at IS NULL
        )
        SELECT count(*),
            count(*) FILTER (WHERE expected AND coalesce(last_succeeded_at, discovered_at)
                                                < now() - make_interval(secs => %(stale)s)),
            count(*) FILTER (WHERE last_succeeded_at IS NULL),
            coalesce(extract(epoch FROM max(now() - coalesce(last_succeeded_at, discovered_at))
                                            FILTER (WHERE expected)), 0)::float8,
            count(*) FILTER (WHERE consecutive_failures > 0),
            count(*) FILTER (WHERE breaker_until > now())
        FROM live
        """,
        {"stale": stale_after_seconds},
    ).fetchone()
    grants = connection.execute(
        """
        SELECT count(*), count(*) FILTER (WHERE s.status <> 'active')
        FROM sync.connection_state s JOIN public.google_connections g
            ON g.id = s.connection_id AND g.tenant_id = s.tenant_id AND g.workspace_id = s.workspace_id
        WHERE g.status = 'active'
        """
    ).fetchone()
    sick = connection.execute(
        """
        SELECT health, array_agg(tenant_id || ':' || workspace_id || ' (' || coalesce(health_reason, '') || ')'
                                 ORDER BY health_since)
        FROM sync.workspace_state WHERE health IN ('needs_human', 'degraded') GROUP BY health
        """
    ).fetchall()
    poison = connection.execute(
        "SELECT count(*), count(DISTINCT (tenant_id, workspace_id, calendar_id)), "
        "coalesce(array_agg(DISTINCT reason), '{}') FROM sync.quarantine"
    ).fetchone()
    if calendars is None or grants is None or poison is None:
        raise AssertionError("aggregates without GROUP BY return a row")
    by_health: dict[str, list[str]] = dict(sick)
    return VitalSigns(
        calendars=calendars[0],
        stale_calendars=calendars[1],
        never_synced_calendars=calendars[2],
        oldest_sync_seconds=calendars[3],
        failing_calendars=calendars[4],
        open_breakers=calendars[5],
        connections=grants[0],
        refused_connections=grants[1],
        workspaces_needing_human=tuple(by_health.get("needs_human", ())[:EXAMPLES]),
        workspaces_failing=tuple(by_health.get("degraded", ())[:EXAMPLES]),
        quarantined=poison[0],
        quarantined_in_calendars=poison[1],
        quarantine_reasons=tuple(poison[2][:EXAMPLES]),
    )
