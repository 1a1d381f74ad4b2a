"""How each workspace is, and what Dagster has yet to be told about it.

Belongs here: judging a workspace from its state tables, the outbox of reports, the numbers of the checks.
Does not: Dagster events; whoever writes them reads the outbox here.

A report is owed while the health differs from the reported one, or while content changed since. It is read, reported,
and marked in one transaction, so a run that dies on the way leaves it owed and nothing is lost.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from scaling.databases import Connection, Shard
from sync_pipeline.tally import Tally
from sync_pipeline.workspaces import Workspace

Health = Literal["new", "healthy", "degraded", "needs_human"]

# Kinds of sync_pipeline.errors that waiting does not cure.
HUMAN_KINDS = ["reauth_required", "access_denied", "bad_request"]
FAILING_TOO_LONG = 10
"""Failures of one calendar in a row, with the waits between them half a day, after which somebody should look."""
REPORTS_PER_RUN = 5000


@dataclass(frozen=True, slots=True)
class WorkspaceReport:
    """What Dagster is owed about one workspace."""

    workspace: Workspace
    health: Health
    reported_health: Health
    reason: str | None
    events_upserted: int
    events_deleted: int
    calendars: int
    live_events: int

    @property
    def newly_needs_human(self) -> bool:
        """Somebody has to act, and nobody has been told yet."""
        return self.health == "needs_human" and self.reported_health != "needs_human"


def assess(connection: Connection, workspace: Workspace, tally: Tally) -> Health | None:
    """Judge a workspace after it was served and note what changed.

    Args:
        connection: within a transaction.
        workspace: just served.
        tally: of that service.

    Returns:
        `needs_human` when a connection or a calendar is stuck until somebody acts, `degraded` while something fails
        that may pass, else `healthy`; None when the SaaS deleted the workspace meanwhile.
    """
    row = connection.execute(
        """
        WITH troubles AS (
            SELECT coalesce(last_error, status) AS kind, true AS is_connection
            FROM sync.connection_state s
            WHERE tenant_id = %(tenant)s AND workspace_id = %(workspace)s
              AND (last_error IS NOT NULL OR status <> 'active')
              AND EXISTS (SELECT FROM public.google_connections g
                          WHERE g.id = s.connection_id AND g.tenant_id = s.tenant_id
                            AND g.workspace_id = s.workspace_id AND g.status = 'active')
            UNION ALL
            SELECT CASE WHEN breaker_until > now() THEN 'breaker_open'
                        WHEN consecutive_failures >= %(too_long)s THEN 'failing_too_long' ELSE last_error END, false
            FROM sync.calendar_state
            WHERE tenant_id = %(tenant)s AND workspace_id = %(workspace)s AND deleted_at IS NULL
              AND (last_error IS NOT NULL OR breaker_until > now())
        ), judged AS (
            SELECT CASE WHEN bool_or(kind = ANY(%(human)s)) THEN 'needs_human'
                        WHEN count(*) > 0 THEN 'degraded' ELSE 'healthy' END AS health,
                   string_agg(DISTINCT kind, ', ' ORDER BY kind) AS reason
            FROM troubles
        )
        INSERT INTO sync.workspace_state AS mine
            (tenant_id, workspace_id, health, health_reason, unreported_upserts, unreported_deletes)
        SELECT %(tenant)s, %(workspace)s, health, reason, %(upserts)s, %(deletes)s FROM judged
        WHERE EXISTS (SELECT FROM public.workspaces w WHERE (w.tenant_id, w.id) = (%(tenant)s, %(workspace)s))
        ON CONFLICT (tenant_id, workspace_id) DO UPDATE
        SET health = excluded.health, health_reason = excluded.health_reason,
            health_since = CASE WHEN mine.health = excluded.health THEN mine.health_since ELSE now() END,
            unreported_upserts = mine.unreported_upserts + excluded.unreported_upserts,
            unreported_deletes = mine.unreported_deletes + excluded.unreported_deletes
        RETURNING health
        """,
        {
            "tenant": workspace.tenant_id,
            "workspace": workspace.workspace_id,
            "human": [*HUMAN_KINDS, "breaker_open", "failing_too_long"],
            "too_long": FAILING_TOO_LONG,
            "upserts": tally.events_upserted,
            "deletes": tally.events_deleted,
        },
    ).fetchone()
    health: Health | None = row[0] if row else None
    return health


def set_aside(connection: Connection, workspace: Workspace) -> None:
    """Note that a workspace cannot be served until somebody mends its state.

    Args:
        connection: within a transaction.
        workspace: whose rows cannot be read.
    """
    connection.execute(
        """
        INSERT INTO sync.workspace_state AS mine (tenant_id, workspace_id, last_served_at, health, health_reason)
        VALUES (%s, %s, now(), 'needs_human', 'unreadable_state')
        ON CONFLICT (tenant_id, workspace_id) DO UPDATE
        SET last_served_at = now(), health = excluded.health, health_reason = excluded.health_reason,
            health_since = CASE WHEN mine.health = excluded.health THEN mine.health_since ELSE now() END
        """,
        [workspace.tenant_id, workspace.workspace_id],
    )


@contextmanager
def owed_reports(shard: Shard, *, only: Sequence[Workspace] | None = None) -> Iterator[tuple[WorkspaceReport, ...]]:
    """Lend the reports Dagster is owed; leaving without an exception marks them as made.

    A workspace that needs a human and has been reported so stays red until it does not: changes in its other
    calendars are reported when it is well again.

    Args:
        shard: whose workspaces.
        only: these workspaces, whether anything is owed or not; None means all to whom something is owed.
    """
    with shard.transaction() as connection:
        rows = connection.execute(
            """
            SELECT w.tenant_id, w.workspace_id, w.health, w.reported_health, w.health_reason,
                w.unreported_upserts, w.unreported_deletes,
                (SELECT count(*) FROM sync.calendar_state c
                 WHERE (c.tenant_id, c.workspace_id) = (w.tenant_id, w.workspace_id) AND c.deleted_at IS NULL),
                (SELECT count(*) FROM sync.calendar_events e
                 WHERE (e.tenant_id, e.workspace_id) = (w.tenant_id, w.workspace_id))
            FROM sync.workspace_state w
            WHERE CASE WHEN %(all)s
                THEN w.health <> w.reported_health
                    OR (w.unreported_upserts + w.unreported_deletes > 0 AND w.health <> 'needs_human')
                ELSE (w.tenant_id, w.workspace_id) IN (
                    SELECT * FROM unnest(%(tenants)s::uuid[], %(workspaces)s::uuid[]))
                END
            ORDER BY w.tenant_id, w.workspace_id
            LIMIT %(limit)s
            FOR UPDATE OF w SKIP LOCKED
            """,
            {
                "all": only is None,
                "tenants": [workspace.tenant_id for workspace in only or ()],
                "workspaces": [workspace.workspace_id for workspace in only or ()],
                "limit": REPORTS_PER_RUN,
            },
        ).fetchall()
        reports = tuple(WorkspaceReport(Workspace(tenant, workspace), *rest) for tenant, workspace, *rest in rows)
        yield reports
        connection.execute(
            """
            UPDATE sync.workspace_state
            SET reported_health = health, unreported_upserts = 0, unreported_deletes = 0
            WHERE (tenant_id, workspace_id) IN (SELECT * FROM unnest(%s::uuid[], %s::uuid[]))
            """,
            [[report.workspace.tenant_id for report in reports], [report.workspace.workspace_id for report in reports]],
        )
