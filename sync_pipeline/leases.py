"""The right to work on a calendar: who takes what next, and proof that the work is still theirs.

Belongs here: claiming due workspaces fairly, leases with epochs (fencing), giving leases back.
Does not: what is done under a lease.

A run reads once what is due (`find_due`), tenants in turn, and takes it bit by bit: the tenant's advisory lock, then
the due rows with SKIP LOCKED, with their epoch raised. Every later write repeats the epoch in its WHERE clause, so a
worker that was paused past its lease changes nothing. Any number of runs on any number of machines share the work this
way, without a broker. All times are the database's.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import LiteralString
from uuid import UUID

from psycopg import sql

from scaling.databases import Connection
from sync_pipeline.errors import LeaseLostError, SyncError
from sync_pipeline.workspaces import Workspace

LEASE_SECONDS = 90
"""A dead worker's calendars are taken over after this long. Longer than one request with its attempts (60 s); every
page renews the lease, and the run's heartbeat renews all of its leases."""

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
OF_LIST = sql.SQL("calendar_id IS NULL")
OF_CALENDAR = sql.SQL("calendar_id = t.calendar_id")
ITS_CHANNELS = sql.SQL("""FROM sync.channels h
    WHERE (h.tenant_id, h.workspace_id, h.connection_id) = (t.tenant_id, t.workspace_id, t.connection_id)
      AND h.{what}""")
TAG_BYTES = 4
"""The id of a channel begins with so much of a digest of its address; with another address it is of no use."""
HAS_ADDRESS = sql.SQL("substr(uuid_send(channel_id), 1, {}) = %(tag)s").format(sql.Literal(TAG_BYTES))
# Polled for safety only is what has an open channel to the present address through which a message has come, the one
# that Google sends when it opens the channel at least: a receiver that Google cannot reach is not relied upon.
WATCHED = sql.SQL("""EXISTS (SELECT {channels} AND h.state = 'open' AND h.last_message_at IS NOT NULL
    AND {has_address} AND h.expires_at > now())""")
# With push on: no channel of the present address will be in force for long enough. With push off: there is one to stop.
WANTS_CHANNEL = sql.SQL("""CASE WHEN %(push)s
    THEN NOT EXISTS (SELECT {channels} AND h.state = 'open' AND {has_address}
        AND h.expires_at > now() + least(make_interval(secs => %(renew_before)s), (h.expires_at - h.created_at) / 2))
    ELSE EXISTS (SELECT {channels}) END""")


def _sql(text: LiteralString) -> sql.Composed:
    of_list, of_calendar = ITS_CHANNELS.format(what=OF_LIST), ITS_CHANNELS.format(what=OF_CALENDAR)
    return sql.SQL(text).format(
        calendar_due=CALENDAR_DUE,
        list_due=LIST_DUE,
        chosen=CHOSEN,
        list_watched=WATCHED.format(channels=of_list, has_address=HAS_ADDRESS),
        calendar_watched=WATCHED.format(channels=of_calendar, has_address=HAS_ADDRESS),
        calendar_wants_channel=WANTS_CHANNEL.format(channels=of_calendar, has_address=HAS_ADDRESS),
    )


@dataclass(frozen=True, slots=True)
class PushTerms:
    """What makes a push channel good enough to be left alone."""

    address_tag: bytes
    """Begins the ids of channels to the present address; empty when push is off."""
    renew_before_seconds: float
    """With less time left, or with less than half of its life, it is renewed."""


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
    access_role: str | None = None
    change_count: float = 0.0
    observed_days: float = 0.0
    seconds_since_sync: float | None = None
    """Since the last good sync; None before the first."""
    is_watched: bool = False
    """Google sends notifications for it, and they arrive."""
    wants_channel: bool = False
    """A channel should be opened, renewed or, with push off, stopped before the calendar is read."""

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
    is_watched: bool

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
    is_healthy: bool
    """As judged after its last visit."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What came of trying to take workspaces."""

    claims: tuple[Claim, ...]
    busy: tuple[Workspace, ...]
    """Not tried: another run is taking from the tenant right now, or the tenant's share is in work already."""


def find_due(connection: Connection, *, since: datetime) -> list[Workspace]:
    """Read which workspaces have anything due.

    Args:
        connection: within a transaction.
        since: the run's start by the database's clock; what was due then and not taken since is due.

    Returns:
        Least recently served tenant first, and within a tenant the least recently served workspace.
    """
    rows = connection.execute(
        _sql("""
        WITH due AS (
            SELECT s.tenant_id, s.workspace_id
            FROM sync.calendar_state c JOIN sync.connection_state s USING (tenant_id, workspace_id, connection_id)
            WHERE {calendar_due}
            UNION
            SELECT s.tenant_id, s.workspace_id FROM sync.connection_state s WHERE {list_due}
        ), served AS (
            SELECT tenant_id, max(last_served_at) AS at FROM sync.workspace_state
            WHERE tenant_id IN (SELECT tenant_id FROM due) GROUP BY tenant_id
        )
        SELECT due.tenant_id, due.workspace_id
        FROM due LEFT JOIN served USING (tenant_id) LEFT JOIN sync.workspace_state w USING (tenant_id, workspace_id)
        ORDER BY served.at NULLS FIRST, due.tenant_id, w.last_served_at NULLS FIRST, due.workspace_id
        """),
        {"since": since},
    ).fetchall()
    return [Workspace(*row) for row in rows]


def claim(
    connection: Connection,
    workspaces: Sequence[Workspace],
    *,
    owner: str,
    since: datetime,
    tenant_limit: int,
    push: PushTerms,
) -> Taken:
    """Take due workspaces, of each tenant only as many as may be in work at a time in all runs together.

    Args:
        connection: within a transaction of its own.
        workspaces: that were found due, in the order wanted.
        owner: names the run.
        since: see `find_due`.
        tenant_limit: workspaces of one tenant that may be in work, whoever works on them.
        push: see `take`.

    Returns:
        The claims. Workspaces that are neither claimed nor busy have nothing due any more.
    """
    tenants = sorted({workspace.tenant_id for workspace in workspaces})
    # Its own statement: the rows below must be read in a snapshot younger than the lock.
    locked = connection.execute(
        "SELECT tenant FROM unnest(%s::uuid[]) AS tenant "
        "WHERE pg_try_advisory_xact_lock(hashtextextended('sync/' || tenant, 0))",
        [tenants],
    ).fetchall()
    elsewhere = connection.execute(
        """
        SELECT tenant_id, count(DISTINCT workspace_id) FROM (
            SELECT tenant_id, workspace_id FROM sync.calendar_state
            WHERE lease_owner IS NOT NULL AND lease_owner <> %(owner)s AND lease_until >= now()
            UNION ALL
            SELECT tenant_id, workspace_id FROM sync.connection_state
            WHERE lease_owner IS NOT NULL AND lease_owner <> %(owner)s AND lease_until >= now()
        ) AS leased
        WHERE tenant_id = ANY(%(tenants)s) GROUP BY tenant_id
        """,
        {"owner": owner, "tenants": tenants},
    ).fetchall()
    room = dict.fromkeys((tenant for (tenant,) in locked), tenant_limit)
    for tenant, in_work in elsewhere:
        if tenant in room:
            room[tenant] -= in_work
    mine: list[Workspace] = []
    busy: list[Workspace] = []
    for workspace in workspaces:
        if room.get(workspace.tenant_id, 0) > 0:
            room[workspace.tenant_id] -= 1
            mine.append(workspace)
        else:
            busy.append(workspace)
    claims = take(connection, mine, owner=owner, since=since, push=push) if mine else ()
    return Taken(claims, tuple(busy))


def take(
    connection: Connection,
    workspaces: Sequence[Workspace],
    *,
    owner: str,
    since: datetime,
    push: PushTerms,
) -> tuple[Claim, ...]:
    """Lease whatever is due in these workspaces and not leased by others.

    Args:
        connection: within a transaction.
        workspaces: in the order wanted.
        owner: names the run.
        since: see `find_due`.
        push: which channels are good enough.

    Returns:
        One claim per workspace in which there was something to lease.
    """
    chosen = {
        "tenants": [workspace.tenant_id for workspace in workspaces],
        "workspaces": [workspace.workspace_id for workspace in workspaces],
        "since": since,
        "owner": owner,
        "seconds": LEASE_SECONDS,
        "push": bool(push.address_tag),
        "tag": push.address_tag,
        "renew_before": push.renew_before_seconds,
    }
    lists = connection.execute(
        _sql("""
        UPDATE sync.connection_state t
        SET lease_epoch = t.lease_epoch + 1, lease_owner = %(owner)s,
            lease_until = now() + make_interval(secs => %(seconds)s), list_started_at = now()
        FROM (SELECT s.* FROM sync.connection_state s WHERE {list_due} AND {chosen} FOR UPDATE OF s SKIP LOCKED) s
        WHERE t.tenant_id = s.tenant_id AND t.workspace_id = s.workspace_id AND t.connection_id = s.connection_id
        RETURNING t.tenant_id, t.workspace_id, t.connection_id, t.lease_epoch, t.consecutive_failures,
            {list_watched}
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
            t.token_fingerprint, t.live_generation, t.consecutive_failures, t.access_role, t.change_count,
            t.observed_days, extract(epoch FROM now() - t.last_succeeded_at)::float8, {calendar_watched},
            t.sync_token IS NOT NULL AND t.push_unsupported_at IS NULL AND {calendar_wants_channel}
                AND coalesce(t.watch_retry_at <= now(), true)
        """),
        chosen,
    ).fetchall()
    list_leases: dict[Workspace, list[ListLease]] = defaultdict(list)
    for tenant, of, *rest in lists:
        list_leases[Workspace(tenant, of)].append(ListLease(Workspace(tenant, of), *rest))
    calendar_leases: dict[Workspace, list[CalendarLease]] = defaultdict(list)
    for tenant, of, *rest in calendars:
        calendar_leases[Workspace(tenant, of)].append(CalendarLease(Workspace(tenant, of), *rest))
    served = [one for one in workspaces if one in list_leases or one in calendar_leases]
    healthy = _serve(connection, served)
    return tuple(
        Claim(one, tuple(list_leases.get(one, ())), tuple(calendar_leases.get(one, ())), one in healthy)
        for one in served
    )


def is_watched(connection: Connection, lease: CalendarLease, *, push: PushTerms) -> bool:
    """Tell whether Google's notifications for a calendar arrive by now."""
    row = connection.execute(
        _sql("""
        SELECT {calendar_watched} FROM sync.calendar_state t
        WHERE (t.tenant_id, t.workspace_id, t.calendar_id) = (%(tenant)s, %(workspace)s, %(calendar)s)
        """),
        {**lease.key, "tag": push.address_tag},
    ).fetchone()
    return bool(row and row[0])


def renew_all(connection: Connection, *, owner: str) -> None:
    """Renew every lease a run still holds; one that has ended stays ended."""
    for table in ("calendar_state", "connection_state"):
        connection.execute(
            sql.SQL("""
            UPDATE sync.{} SET lease_until = now() + make_interval(secs => %(seconds)s)
            WHERE lease_owner = %(owner)s AND lease_until >= now()
            """).format(sql.Identifier(table)),
            {"owner": owner, "seconds": LEASE_SECONDS},
        )


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
    """Make everything in these workspaces due at once, whatever was planned, tries of opening a channel included.

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
    connection.execute(
        _sql("UPDATE sync.connection_state s SET list_due_at = 'epoch', list_watch_retry_at = NULL WHERE {chosen}"),
        chosen,
    )
    connection.execute(
        _sql("""
        UPDATE sync.calendar_state s
        SET due_at = 'epoch', watch_retry_at = NULL,
            token_fingerprint = CASE WHEN %(full)s THEN NULL ELSE s.token_fingerprint END
        WHERE {chosen}
        """),
        chosen,
    )


def bring_forward(connection: Connection, *, poll_seconds: float, list_seconds: float) -> None:
    """Let nothing that works wait longer than a fixed interval since its last visit, however it was planned.

    What was planned with push or adaptive polling may be a day ahead when those are switched off.

    Args:
        connection: within a transaction.
        poll_seconds: longest interval of calendars.
        list_seconds: longest interval of lists of calendars.
    """
    connection.execute(
        """
        UPDATE sync.calendar_state SET due_at = last_finished_at + make_interval(secs => %(seconds)s)
        WHERE (tenant_id, workspace_id, calendar_id) IN (
            SELECT tenant_id, workspace_id, calendar_id FROM sync.calendar_state
            WHERE deleted_at IS NULL AND consecutive_failures = 0
              AND due_at > last_finished_at + make_interval(secs => %(seconds)s)
            FOR UPDATE SKIP LOCKED)
        """,
        {"seconds": poll_seconds},
    )
    connection.execute(
        """
        UPDATE sync.connection_state SET list_due_at = list_finished_at + make_interval(secs => %(seconds)s)
        WHERE (tenant_id, workspace_id, connection_id) IN (
            SELECT tenant_id, workspace_id, connection_id FROM sync.connection_state
            WHERE consecutive_failures = 0
              AND list_due_at > list_finished_at + make_interval(secs => %(seconds)s)
            FOR UPDATE SKIP LOCKED)
        """,
        {"seconds": list_seconds},
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


def _serve(connection: Connection, workspaces: Sequence[Workspace]) -> set[Workspace]:
    """Note that it was their turn; return those that were healthy after their last visit."""
    rows = connection.execute(
        """
        INSERT INTO sync.workspace_state (tenant_id, workspace_id, last_served_at)
        SELECT *, now() FROM unnest(%s::uuid[], %s::uuid[]) ORDER BY 1, 2
        ON CONFLICT (tenant_id, workspace_id) DO UPDATE SET last_served_at = excluded.last_served_at
        RETURNING tenant_id, workspace_id, health
        """,
        [[one.tenant_id for one in workspaces], [one.workspace_id for one in workspaces]],
    ).fetchall()
    return {Workspace(tenant, workspace) for tenant, workspace, health in rows if health == "healthy"}
