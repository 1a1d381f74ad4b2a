"""Google connections: which exist, whether their grants work, which calendars they see.

Belongs here: `sync.connection_state`, the list of calendars in `sync.calendar_state`, stored grants.
Does not: leasing (`sync_pipeline.leases`), events, or calls to Google.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import LiteralString
from uuid import UUID

from psycopg import sql

from scaling.databases import Connection
from sync_pipeline.errors import LeaseLostError, SyncError
from sync_pipeline.google_calendar import CachedAccessToken, CalendarEntry, token_fingerprint
from sync_pipeline.grants import GrantCipher, UnreadableGrantError
from sync_pipeline.leases import ListLease
from sync_pipeline.workspaces import Workspace

RETIRED_AFTER_LISTS = 2
"""A calendar is retired when this many complete lists in a row do not name it: one odd answer removes nothing."""

FRAGMENTS = {
    # The column is bytea or text, whichever the SaaS chose.
    "grant_fingerprint": sql.SQL("sha256(convert_to(g.refresh_token_encrypted::text, 'UTF8'))"),
    "same_connection": sql.SQL(
        "g.id = s.connection_id AND g.tenant_id = s.tenant_id AND g.workspace_id = s.workspace_id"
    ),
    "of_workspace": sql.SQL("tenant_id = %(tenant)s AND workspace_id = %(workspace)s"),
}


def _sql(text: LiteralString) -> sql.Composed:
    return sql.SQL(text).format(**FRAGMENTS)


@dataclass(frozen=True, slots=True)
class StoredGrant:
    """A connection's grant as the database holds it."""

    connection_id: UUID
    fingerprint: bytes = field(repr=False)
    account: str = field(repr=False)
    _grant: bytes | str = field(repr=False)
    _access_token: bytes | None = field(repr=False)
    _access_token_expires_at: datetime | None

    @property
    def token_fingerprint(self) -> bytes:
        """What sync tokens made with this grant are bound to."""
        return token_fingerprint(f"{self.connection_id}:{self.account}")

    def refresh_token(self, cipher: GrantCipher) -> str:
        """Decrypt the refresh token.

        Raises:
            UnreadableGrantError: no key opens it.
        """
        return cipher.decrypt(self._grant)

    def access_token(self, cipher: GrantCipher) -> CachedAccessToken | None:
        """Decrypt the access token of an earlier run, if there is one and a key opens it."""
        if self._access_token is None or self._access_token_expires_at is None:
            return None
        try:
            return CachedAccessToken(cipher.decrypt(self._access_token), self._access_token_expires_at)
        except UnreadableGrantError:
            return None


def register(connection: Connection) -> None:
    """Take note of new connections, and let those work again whose grant the SaaS has replaced."""
    connection.execute(
        """
        INSERT INTO sync.connection_state (tenant_id, workspace_id, connection_id)
        SELECT g.tenant_id, g.workspace_id, g.id
        FROM public.google_connections g
        WHERE NOT EXISTS (
            SELECT FROM sync.connection_state s
            WHERE (s.tenant_id, s.workspace_id, s.connection_id) = (g.tenant_id, g.workspace_id, g.id))
        ON CONFLICT DO NOTHING
        """
    )
    connection.execute(
        _sql("""
        UPDATE sync.connection_state s
        SET status = 'active', last_error = NULL, consecutive_failures = 0, list_due_at = 'epoch',
            access_token_encrypted = NULL, parked_until = NULL
        FROM public.google_connections g
        WHERE {same_connection} AND s.status = 'reauth_required'
          AND s.grant_fingerprint IS DISTINCT FROM {grant_fingerprint}
        """)
    )


def give_another_chance(connection: Connection, workspaces: Sequence[Workspace]) -> None:
    """Let refused or parked grants of these workspaces be tried once more, because somebody asked for it."""
    connection.execute(
        """
        UPDATE sync.connection_state SET status = 'active', parked_until = NULL
        WHERE (tenant_id, workspace_id) IN (SELECT * FROM unnest(%s::uuid[], %s::uuid[]))
        """,
        [[one.tenant_id for one in workspaces], [one.workspace_id for one in workspaces]],
    )


def connected_workspaces(connection: Connection) -> list[Workspace]:
    """Read every workspace that has a Google connection, switched on or not."""
    rows = connection.execute(
        """
        SELECT DISTINCT w.tenant_id, w.id FROM public.workspaces w
        JOIN public.google_connections g ON g.workspace_id = w.id AND g.tenant_id = w.tenant_id
        """
    ).fetchall()
    return [Workspace(*row) for row in rows]


def load_grants(connection: Connection, workspace: Workspace) -> dict[UUID, StoredGrant]:
    """Read the usable grants of a workspace.

    Returns:
        Connection id to grant.
    """
    rows = connection.execute(
        _sql("""
        SELECT s.connection_id, {grant_fingerprint}, coalesce(g.google_account, ''), g.refresh_token_encrypted,
            CASE WHEN s.grant_fingerprint = {grant_fingerprint} THEN s.access_token_encrypted END,
            s.access_token_expires_at
        FROM sync.connection_state s JOIN public.google_connections g ON {same_connection}
        WHERE s.tenant_id = %(tenant)s AND s.workspace_id = %(workspace)s AND s.status = 'active'
          AND g.status = 'active'
        """),
        {"tenant": workspace.tenant_id, "workspace": workspace.workspace_id},
    ).fetchall()
    return {row[0]: StoredGrant(*row) for row in rows}


def keep_access_token(
    connection: Connection, workspace: Workspace, grant: StoredGrant, token: CachedAccessToken, cipher: GrantCipher
) -> None:
    """Store an access token for the next run, encrypted like the grant it came from."""
    connection.execute(
        _sql("""
        UPDATE sync.connection_state
        SET access_token_encrypted = %(token)s, access_token_expires_at = %(expires_at)s,
            grant_fingerprint = %(fingerprint)s
        WHERE {of_workspace} AND connection_id = %(connection)s AND status = 'active'
        """),
        {
            **_key(workspace, grant.connection_id),
            "token": cipher.encrypt(token.token),
            "expires_at": token.expires_at,
            "fingerprint": grant.fingerprint,
        },
    )


def refuse(connection: Connection, workspace: Workspace, grant: StoredGrant, error: SyncError) -> None:
    """Stop using a grant until the SaaS stores another one; everything synced so far stays."""
    connection.execute(
        _sql("""
        UPDATE sync.connection_state
        SET status = 'reauth_required', last_error = %(kind)s, grant_fingerprint = %(fingerprint)s,
            access_token_encrypted = NULL, lease_until = NULL, consecutive_failures = consecutive_failures + 1
        WHERE {of_workspace} AND connection_id = %(connection)s
        """),
        {**_key(workspace, grant.connection_id), "kind": error.kind, "fingerprint": grant.fingerprint},
    )


def park(connection: Connection, workspace: Workspace, connection_id: UUID, *, seconds: float) -> None:
    """Make no call for a connection for that many seconds."""
    connection.execute(
        _sql("""
        UPDATE sync.connection_state SET parked_until = now() + make_interval(secs => %(seconds)s)
        WHERE {of_workspace} AND connection_id = %(connection)s
        """),
        {**_key(workspace, connection_id), "seconds": seconds},
    )


def record_list(
    connection: Connection, lease: ListLease, entries: Sequence[CalendarEntry], *, due_in_seconds: float
) -> None:
    """Bring the calendars of a connection in step with its complete list.

    New calendars are due at once; renamed ones take their new name and role; those Google calls deleted are retired,
    those it does not mention only after the second list. An empty list is no answer and changes nothing.

    Args:
        connection: within a transaction.
        lease: of the list.
        entries: every entry of every page.
        due_in_seconds: when the list is read again.

    Raises:
        LeaseLostError: another worker reads the list now.
    """
    _close_list(connection, lease, error=None, due_in_seconds=due_in_seconds)
    present = {entry.calendar_id: entry for entry in entries if not entry.deleted}
    key = _key(lease.workspace, lease.connection_id)
    connection.execute(
        _sql("""
        UPDATE sync.calendar_state SET deleted_at = now()
        WHERE {of_workspace} AND connection_id = %(connection)s AND deleted_at IS NULL AND calendar_id = ANY(%(gone)s)
        """),
        {**key, "gone": [entry.calendar_id for entry in entries if entry.deleted]},
    )
    if not present:
        return
    connection.execute(
        """
        INSERT INTO sync.calendar_state AS mine
            (tenant_id, workspace_id, calendar_id, connection_id, summary, time_zone, access_role, is_primary)
        SELECT %(tenant)s, %(workspace)s, calendar_id, %(connection)s, summary, time_zone, access_role, is_primary
        FROM json_to_recordset(%(entries)s::json)
            AS r(calendar_id text, summary text, time_zone text, access_role text, is_primary boolean)
        ORDER BY calendar_id
        ON CONFLICT (tenant_id, workspace_id, calendar_id) DO UPDATE
        SET summary = excluded.summary, time_zone = excluded.time_zone, access_role = excluded.access_role,
            is_primary = excluded.is_primary, missing_from_lists = 0, deleted_at = NULL,
            connection_id = CASE
                WHEN EXISTS (
                    SELECT FROM sync.connection_state s JOIN public.google_connections g
                        ON g.id = s.connection_id AND g.tenant_id = s.tenant_id AND g.workspace_id = s.workspace_id
                    WHERE s.tenant_id = mine.tenant_id AND s.workspace_id = mine.workspace_id
                      AND s.connection_id = mine.connection_id AND s.status = 'active' AND g.status = 'active')
                THEN mine.connection_id ELSE excluded.connection_id END
        """,
        {**key, "entries": json.dumps([asdict(entry) for entry in present.values()])},
    )
    connection.execute(
        _sql("""
        UPDATE sync.calendar_state
        SET missing_from_lists = missing_from_lists + 1,
            deleted_at = CASE WHEN missing_from_lists + 1 >= %(lists)s THEN now() END
        WHERE {of_workspace} AND connection_id = %(connection)s AND deleted_at IS NULL
          AND calendar_id <> ALL(%(present)s)
        """),
        {**key, "present": list(present), "lists": RETIRED_AFTER_LISTS},
    )


def record_list_failure(connection: Connection, lease: ListLease, error: SyncError, *, due_in_seconds: float) -> None:
    """Write down why a list was not read; what is known of the calendars stays.

    Raises:
        LeaseLostError: another worker reads the list now.
    """
    _close_list(connection, lease, error=error, due_in_seconds=due_in_seconds)


def _close_list(connection: Connection, lease: ListLease, *, error: SyncError | None, due_in_seconds: float) -> None:
    closed = connection.execute(
        _sql("""
        UPDATE sync.connection_state
        SET lease_until = NULL, list_finished_at = now(), last_error = %(kind)s::text,
            consecutive_failures = CASE WHEN %(kind)s::text IS NULL THEN 0 ELSE consecutive_failures + 1 END,
            list_due_at = now() + make_interval(secs => %(seconds)s)
        WHERE {of_workspace} AND connection_id = %(connection)s AND lease_epoch = %(epoch)s
        """),
        {
            **_key(lease.workspace, lease.connection_id),
            "epoch": lease.epoch,
            "kind": error.kind if error else None,
            "seconds": due_in_seconds,
        },
    )
    if closed.rowcount != 1:
        raise LeaseLostError("another worker reads this list of calendars now")


def _key(workspace: Workspace, connection_id: UUID) -> dict[str, object]:
    return {"tenant": workspace.tenant_id, "workspace": workspace.workspace_id, "connection": connection_id}
