"""The right to work on a calendar: who takes what next, and proof that the work is still theirs.

Belongs here: claiming due workspaces fairly, leases with epochs (fencing), giving leases back.
Does not: what is done under a lease.

A worker takes the tenant's advisory lock, then the due rows with SKIP LOCKED, and raises their epoch. Every later
write repeats the epoch in its WHERE clause, so a worker that was paused past its lease changes nothing. Any number
of runs on any number of machines share the work this way, without a broker. All times are the database's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import LiteralString
from uuid import UUID

from psycopg import sql

from scaling.databases import Connection
from sync_pipeline.errors import LeaseLostError, SyncError
from sync_pipeline.workspaces import Workspace

LEASE_SECONDS = 300
"""Longer than one page can take (4 attempts of 30 s and the waits between); every page renews it."""

# The SaaS has the connection switched on, its user has not switched Google off, and Google has not refused it.
USABLE = sql.SQL("""s.status = 'active' AND (s.parked_until IS NULL OR s.parked_until <= now()) AND EXISTS (
    SELECT FROM public.google_connections g
    WHERE g.id = s.connection_id AND g.tenant_id = s.tenant_id AND g.workspace_id = s.workspace_id
      AND g.status = 'active'
      AND NOT EXISTS (SELECT FROM public.users u WHERE u.id = g.user_id AND NOT u.google_api_enabled))""")
# `last_started_at < since`: one run serves a calendar once, however short the poll interval.
CALENDAR_DUE = sql.SQL("""c.deleted_at IS NULL AND c.due_at <= %(since)s
    AND (c.last_started_at IS NULL OR c.last_started_at < %(since)s)
    AND (c.lease_until IS NULL OR c.lease_until < now()) AND {usable}""").format(usable=USABLE)
LIST_DUE = sql.SQL("""s.list_due_at <= %(since)s
    AND (s.list_started_at IS NULL OR s.list_started_at < %(since)s)
    AND (s.lease_until IS NULL OR s.lease_until < now()) AND {usable}""").format(usable=USABLE)
CHOSEN = sql.SQL("""(s.tenant_id, s.workspace_id) IN (
    SELECT * FROM unnest(%(tenants)s::uuid[], %(workspaces)s::uuid[]))""")
DUE_WORKSPACES = sql.SQL("""
    SELECT s.tenant_id, s.workspace_id
    FROM sync.calendar_state c JOIN sync.connection_state s USING (tenant_id, workspace_id, connection_id)
    WHERE {calendar_due}
    UNION
    SELECT s.tenant_id, s.workspace_id FROM sync.connection_state s WHERE {list_due}""").format(
    calendar_due=CALENDAR_DUE, list_due=LIST_DUE
)


def _sql(text: LiteralString) -> sql.Composed:
    return sql.SQL(text).format(
        due_workspaces=DUE_WORKSPACES, calendar_due=CALENDAR_DUE, list_due=LIST_DUE, chosen=CHOSEN
    )


@dataclass(frozen=True, slots=True)
class CalendarLease:
    """The right to sync one calendar, with the state it had when the lease was taken."""

    workspace: Workspace
    calendar_id: str = field(repr=False)
    connection_id: UUID
    epoch: int
    sync_token: str | None = field(repr=False)
    token_fingerprint: bytes | None = field(repr=False)
    live_generation: int
    consecutive_failures: int

    @property
    def key(self) -> dict[str, object]:
        """Parameters that name the row and the epoch."""
        return {
            "tenant": self.workspace.tenant_id,
            "workspace": self.workspace.workspace_id,
            "calendar": self.calendar_id,
            "epoch": self.epoch,
        }


@dataclass(frozen=True, slots=True)
class ListLease:
    """The right to read the calendar list of one connection."""

    workspace: Workspace
    connection_id: UUID
    epoch: int
    consecutive_failures: int

    @property
    def key(self) -> dict[str, object]:
        """Parameters that name the row and the epoch."""
        return {
            "tenant": self.workspace.tenant_id,
            "workspace": self.workspace.workspace_id,
            "connection": self.connection_id,
            "epoch": self.epoch,
        }


@dataclass(frozen=True, slots=True)
class Claim:
    """What one worker does next: everything that is due in one workspace."""

    workspace: Workspace
    lists: tuple[ListLease, ...]
    calendars: tuple[CalendarLease, ...]


def count_due(connection: Connection, *, since: datetime) -> int:
    """Count the workspaces with anything due."""
    row = connection.execute(_sql("SELECT count(*) FROM ({due_workspaces}) AS due"), {"since": since}).fetchone()
    return int(row[0]) if row else 0


def claim(connection: Connection, *, owner: str, since: datetime, limit: int) -> tuple[Claim, ...] | None:
    """Take the next due workspaces: least recently served tenant first, tenants in turn.

    Args:
        connection: within a transaction of its own.
        owner: names the run.
        since: the run's start by the database's clock; what was due then and not taken since is due.
        limit: how many workspaces at most.

    Returns:
        The claims; empty when all that is due is being taken by others right now; None when nothing is due.
    """
    candidates = connection.execute(
        _sql("""
        WITH due AS ({due_workspaces}),
        served AS (SELECT tenant_id, max(last_served_at) AS at FROM sync.workspace_state GROUP BY tenant_id)
        SELECT due.tenant_id, due.workspace_id
        FROM due LEFT JOIN served USING (tenant_id) LEFT JOIN sync.workspace_state w USING (tenant_id, workspace_id)
        ORDER BY row_number() OVER (PARTITION BY due.tenant_id ORDER BY w.last_served_at NULLS FIRST),
            served.at NULLS FIRST, due.tenant_id
        LIMIT %(limit)s
        """),
        {"since": since, "limit": limit},
    ).fetchall()
    if not candidates:
        return None
    # Its own statement: the rows below must be read in a snapshot younger than the lock.
    locked = connection.execute(
        "SELECT tenant FROM unnest(%s::uuid[]) AS tenant "
        "WHERE pg_try_advisory_xact_lock(hashtextextended('sync/' || tenant, 0))",
        [sorted({tenant for tenant, _ in candidates})],
    ).fetchall()
    mine = {tenant for (tenant,) in locked}
    return take(
        connection,
        [Workspace(tenant, workspace) for tenant, workspace in candidates if tenant in mine],
        owner=owner,
        since=since,
    )


def take(connection: Connection, workspaces: Sequence[Workspace], *, owner: str, since: datetime) -> tuple[Claim, ...]:
    """Lease whatever is due in these workspaces and not leased by others.

    Args:
        connection: within a transaction.
        workspaces: in the order wanted.
        owner: names the run.
        since: see `claim`.

    Returns:
        One claim per workspace in which there was something to lease.
    """
    chosen = {
        "tenants": [workspace.tenant_id for workspace in workspaces],
        "workspaces": [workspace.workspace_id for workspace in workspaces],
        "since": since,
        "owner": owner,
        "seconds": LEASE_SECONDS,
    }
    lists = connection.execute(
        _sql("""
        UPDATE sync.connection_state t
        SET lease_epoch = t.lease_epoch + 1, lease_until = now() + make_interval(secs => %(seconds)s),
            list_started_at = now()
        FROM (SELECT s.* FROM sync.connection_state s WHERE {list_due} AND {chosen} FOR UPDATE OF s SKIP LOCKED) s
        WHERE t.tenant_id = s.tenant_id AND t.workspace_id = s.workspace_id AND t.connection_id = s.connection_id
        RETURNING t.tenant_id, t.workspace_id, t.connection_id, t.lease_epoch, t.consecutive_failures
        """),
        chosen,
    ).fetchall()
    calendars = connection.execute(
        _sql("""
        UPDATE sync.calendar_state t
        SET lease_epoch = t.lease_epoch + 1, lease_owner = %(owner)s,
            lease_until = now() + make_interval(secs => %(seconds)s), last_started_at = now()
        FROM (
            SELECT c.* FROM sync.calendar_state c
            JOIN sync.connection_state s USING (tenant_id, workspace_id, connection_id)
            WHERE {calendar_due} AND {chosen}
            FOR UPDATE OF c SKIP LOCKED
        ) c
        WHERE t.tenant_id = c.tenant_id AND t.workspace_id = c.workspace_id AND t.calendar_id = c.calendar_id
        RETURNING t.tenant_id, t.workspace_id, t.calendar_id, t.connection_id, t.lease_epoch, t.sync_token,
            t.token_fingerprint, t.live_generation, t.consecutive_failures
        """),
        chosen,
    ).fetchall()
    claims = [
        Claim(
            workspace,
            tuple(ListLease(workspace, *rest) for tenant, of, *rest in lists if Workspace(tenant, of) == workspace),
            tuple(
                CalendarLease(workspace, *rest) for tenant, of, *rest in calendars if Workspace(tenant, of) == workspace
            ),
        )
        for workspace in workspaces
    ]
    taken = tuple(claim for claim in claims if claim.lists or claim.calendars)
    _serve(connection, [claim.workspace for claim in taken])
    return taken


def hold(connection: Connection, lease: CalendarLease) -> None:
    """Prove and renew a lease; what the transaction writes after this is fenced.

    Raises:
        LeaseLostError: somebody else took the calendar, or it no longer exists.
    """
    held = connection.execute(
        """
        UPDATE sync.calendar_state SET lease_until = now() + make_interval(secs => %(seconds)s)
        WHERE tenant_id = %(tenant)s AND workspace_id = %(workspace)s AND calendar_id = %(calendar)s
          AND lease_epoch = %(epoch)s
        """,
        {**lease.key, "seconds": LEASE_SECONDS},
    )
    if held.rowcount != 1:
        raise LeaseLostError("another worker holds the calendar now")


def give_back(connection: Connection, lease: CalendarLease) -> None:
    """Return a lease unused; the calendar stays due."""
    connection.execute(
        """
        UPDATE sync.calendar_state SET lease_owner = NULL, lease_until = NULL
        WHERE tenant_id = %(tenant)s AND workspace_id = %(workspace)s AND calendar_id = %(calendar)s
          AND lease_epoch = %(epoch)s
        """,
        lease.key,
    )


def record_failure(connection: Connection, lease: CalendarLease, error: SyncError, *, due_in_seconds: float) -> None:
    """Write down why a calendar was not synced and give the lease back; a lost lease changes nothing.

    Args:
        connection: within a transaction.
        lease: of the calendar.
        error: its kind is stored.
        due_in_seconds: when it is tried again.
    """
    connection.execute(
        """
        UPDATE sync.calendar_state
        SET lease_owner = NULL, lease_until = NULL, last_finished_at = now(), last_outcome = 'failed',
            last_error = %(kind)s, consecutive_failures = consecutive_failures + 1,
            due_at = now() + make_interval(secs => %(seconds)s)
        WHERE tenant_id = %(tenant)s AND workspace_id = %(workspace)s AND calendar_id = %(calendar)s
          AND lease_epoch = %(epoch)s
        """,
        {**lease.key, "kind": error.kind, "seconds": due_in_seconds},
    )


def make_due(connection: Connection, workspaces: Sequence[Workspace], *, full_resync: bool) -> None:
    """Make everything in these workspaces due at once, whatever was planned.

    Args:
        connection: within a transaction.
        workspaces: whose calendars and calendar lists.
        full_resync: forget how far each calendar is, so that its next sync reads it completely.
    """
    chosen = {
        "tenants": [workspace.tenant_id for workspace in workspaces],
        "workspaces": [workspace.workspace_id for workspace in workspaces],
        "full": full_resync,
    }
    connection.execute(_sql("UPDATE sync.connection_state s SET list_due_at = 'epoch' WHERE {chosen}"), chosen)
    connection.execute(
        _sql("""
        UPDATE sync.calendar_state s
        SET due_at = 'epoch', token_fingerprint = CASE WHEN %(full)s THEN NULL ELSE s.token_fingerprint END
        WHERE {chosen}
        """),
        chosen,
    )


def leased_by_others(connection: Connection, workspaces: Sequence[Workspace], *, owner: str) -> int:
    """Count the calendars of these workspaces that another run is working on right now."""
    row = connection.execute(
        _sql("""
        SELECT count(*) FROM sync.calendar_state s
        WHERE {chosen} AND s.lease_until >= now() AND s.lease_owner <> %(owner)s
        """),
        {
            "tenants": [workspace.tenant_id for workspace in workspaces],
            "workspaces": [workspace.workspace_id for workspace in workspaces],
            "owner": owner,
        },
    ).fetchone()
    return int(row[0]) if row else 0


def _serve(connection: Connection, workspaces: Sequence[Workspace]) -> None:
    connection.execute(
        """
        INSERT INTO sync.workspace_state (tenant_id, workspace_id, last_served_at)
        SELECT *, now() FROM unnest(%s::uuid[], %s::uuid[])
        ON CONFLICT (tenant_id, workspace_id) DO UPDATE SET last_served_at = excluded.last_served_at
        """,
        [[one.tenant_id for one in workspaces], [one.workspace_id for one in workspaces]],
    )
