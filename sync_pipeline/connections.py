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

from scaling import contract
from scaling.databases import Connection
from sync_pipeline.call_buckets import account_key
from sync_pipeline.errors import LeaseLostError, SyncError
from sync_pipeline.google_calendar import CachedAccessToken, CalendarEntry, token_fingerprint
from sync_pipeline.grants import GrantCipher, UnreadableGrantError
from sync_pipeline.leases import ListLease
from sync_pipeline.workspaces import Workspace

RETIRED_AFTER_LISTS = 2
"""A calendar is retired when this many complete lists in a row do not name it: one odd answer removes nothing."""

WORKSPACE_TABLES = ("calendar_state", "connection_state", "channels", "event_rows", "quarantine", "workspace_state")
"""Tables with rows of a workspace, in the order in which they are emptied when it is gone."""

FRAGMENTS = {
    "account_fingerprint": sql.SQL("sha256(convert_to(coalesce(g.google_account, ''), 'UTF8'))"),
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
    failed_visits: int
    """Visits in a row that Google refused or did not answer; more than none: the connection is on probation."""
    _grant: bytes | str = field(repr=False)
    _access_token: bytes | None = field(repr=False)
    _access_token_expires_at: datetime | None

    @property
    def token_fingerprint(self) -> bytes:
        """What sync tokens made with this grant are bound to."""
        return token_fingerprint(f"{self.connection_id}:{self.account}")

    @property
    def account_key(self) -> bytes:
        """Name of the Google account's call bucket; its connections share it."""
        return account_key(self.account, self.connection_id)

    def refresh_token(self, cipher: GrantCipher) -> str:
        """Decrypt the refresh token.

        Raises:
            UnreadableGrantError: no key opens it.
        """
        return cipher.decrypt(self._grant)

    def access_token(self, cipher: GrantCipher) -> CachedAccessToken | None:
        """Decrypt the access token of an earlier run, if there is one and a key opens it."""
        return _opened(self._access_token, self._access_token_expires_at, cipher)


def _opened(encrypted: bytes | None, expires_at: datetime | None, cipher: GrantCipher) -> CachedAccessToken | None:
    if encrypted is None or expires_at is None:
        return None
    try:
        return CachedAccessToken(cipher.decrypt(encrypted), expires_at)
    except UnreadableGrantError:
        return None


def register(connection: Connection) -> None:
    """Bring the connections in step with the SaaS's tables.

    New ones are taken note of; those whose grant the SaaS has replaced work again; the calendars of another Google
    account than before are retired at once, so that nobody reads them as the new account's; and of workspaces that are
    gone every row is removed.

    Args:
        connection: within a transaction.
    """
    connection.execute(
        _sql("""
        INSERT INTO sync.connection_state (tenant_id, workspace_id, connection_id, account_fingerprint)
        SELECT g.tenant_id, g.workspace_id, g.id, {account_fingerprint}
        FROM public.google_connections g
        WHERE NOT EXISTS (
            SELECT FROM sync.connection_state s
            WHERE (s.tenant_id, s.workspace_id, s.connection_id) = (g.tenant_id, g.workspace_id, g.id))
        ON CONFLICT DO NOTHING
        """)
    )
    connection.execute(
        _sql("""
        UPDATE sync.connection_state s
        SET status = 'active', last_error = NULL, consecutive_failures = 0, failed_visits = 0, list_due_at = 'epoch',
            access_token_encrypted = NULL, parked_until = NULL
        FROM public.google_connections g
        WHERE {same_connection} AND s.status = 'reauth_required'
          AND s.grant_fingerprint IS DISTINCT FROM {grant_fingerprint}
        """)
    )
    # Of a connection from before accounts were noted, the account is taken to be the one it had.
    connection.execute(
        _sql("""
        UPDATE sync.connection_state s SET account_fingerprint = {account_fingerprint}
        FROM public.google_connections g WHERE {same_connection} AND s.account_fingerprint IS NULL
        """)
    )
    connection.execute(
        _sql("""
        WITH other_account AS (
            UPDATE sync.connection_state s
            SET account_fingerprint = {account_fingerprint}, list_due_at = 'epoch', access_token_encrypted = NULL,
                parked_until = NULL, failed_visits = 0, lease_epoch = s.lease_epoch + 1, lease_until = NULL
            FROM public.google_connections g
            WHERE {same_connection} AND s.account_fingerprint IS DISTINCT FROM {account_fingerprint}
            RETURNING s.tenant_id, s.workspace_id, s.connection_id
        )
        UPDATE sync.calendar_state c
        SET deleted_at = now(), sync_token = NULL, lease_epoch = c.lease_epoch + 1, lease_owner = NULL,
            lease_until = NULL
        FROM other_account o
        WHERE (c.tenant_id, c.workspace_id, c.connection_id) = (o.tenant_id, o.workspace_id, o.connection_id)
          AND c.deleted_at IS NULL
        """)
    )
    _forget_what_is_gone(connection)


def _forget_what_is_gone(connection: Connection) -> None:
    """Remove every row of workspaces the SaaS has deleted.

    A table of workspaces without any is no answer, nor is one whose rows a policy may hide from this role.
    The calendars go first: that fences a worker that is writing right now, and once it has ended nothing can follow.
    """
    gone = connection.execute(
        """
        SELECT tenant_id, workspace_id FROM (
            SELECT tenant_id, workspace_id FROM sync.workspace_state
            UNION SELECT tenant_id, workspace_id FROM sync.connection_state) AS known
        WHERE EXISTS (SELECT FROM public.workspaces)
          AND NOT EXISTS (
              SELECT FROM public.workspaces w WHERE (w.tenant_id, w.id) = (known.tenant_id, known.workspace_id))
        """
    ).fetchall()
    if not gone or not contract.sees_every_row(connection, "public.workspaces"):
        return
    rows = [[tenant for tenant, _ in gone], [workspace for _, workspace in gone]]
    for table in WORKSPACE_TABLES:
        connection.execute(
            sql.SQL(
                "DELETE FROM sync.{} WHERE (tenant_id, workspace_id) IN (SELECT * FROM unnest(%s::uuid[], %s::uuid[]))"
            ).format(sql.Identifier(table)),
            rows,
        )


def known(connection: Connection, workspaces: Sequence[Workspace]) -> list[Workspace]:
    """Find those of the workspaces that this database has connections of."""
    rows = connection.execute(
        """
        SELECT DISTINCT tenant_id, workspace_id FROM sync.connection_state
        WHERE (tenant_id, workspace_id) IN (SELECT * FROM unnest(%s::uuid[], %s::uuid[]))
        """,
        [[one.tenant_id for one in workspaces], [one.workspace_id for one in workspaces]],
    ).fetchall()
    here = {Workspace(*row) for row in rows}
    return [workspace for workspace in workspaces if workspace in here]


def give_another_chance(connection: Connection, workspaces: Sequence[Workspace]) -> None:
    """Let refused or parked grants of these workspaces be tried once more, because somebody asked for it."""
    connection.execute(
        """
        UPDATE sync.connection_state SET status = 'active', parked_until = NULL, failed_visits = 0
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


def load_grants(connection: Connection, workspaces: Sequence[Workspace]) -> dict[Workspace, dict[UUID, StoredGrant]]:
    """Read the usable grants of workspaces.

    Returns:
        For each of the workspaces, connection id to grant.
    """
    rows = connection.execute(
        _sql("""
        SELECT s.tenant_id, s.workspace_id, s.connection_id, {grant_fingerprint}, coalesce(g.google_account, ''),
            s.failed_visits, g.refresh_token_encrypted,
            CASE WHEN s.grant_fingerprint = {grant_fingerprint} THEN s.access_token_encrypted END,
            s.access_token_expires_at
        FROM sync.connection_state s JOIN public.google_connections g ON {same_connection}
        WHERE (s.tenant_id, s.workspace_id) IN (SELECT * FROM unnest(%(tenants)s::uuid[], %(workspaces)s::uuid[]))
          AND s.status = 'active' AND g.status = 'active'
        """),
        {
            "tenants": [workspace.tenant_id for workspace in workspaces],
            "workspaces": [workspace.workspace_id for workspace in workspaces],
        },
    ).fetchall()
    grants: dict[Workspace, dict[UUID, StoredGrant]] = {workspace: {} for workspace in workspaces}
    for tenant, workspace, connection_id, *rest in rows:
        grants[Workspace(tenant, workspace)][connection_id] = StoredGrant(connection_id, *rest)
    return grants


def kept_access_token(
    connection: Connection, workspace: Workspace, grant: StoredGrant, cipher: GrantCipher
) -> CachedAccessToken | None:
    """Read the access token that is stored by now, if it is of the same grant and a key opens it."""
    row = connection.execute(
        _sql("""
        SELECT access_token_encrypted, access_token_expires_at FROM sync.connection_state
        WHERE {of_workspace} AND connection_id = %(connection)s AND grant_fingerprint = %(fingerprint)s
        """),
        {**_key(workspace, grant.connection_id), "fingerprint": grant.fingerprint},
    ).fetchone()
    if row is None:
        return None
    encrypted, expires_at = row
    return _opened(encrypted, expires_at, cipher)


def keep_access_token(
    connection: Connection, workspace: Workspace, grant: StoredGrant, token: CachedAccessToken, cipher: GrantCipher
) -> None:
    """Store an access token for whoever needs it next, encrypted like the grant it came from."""
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
            access_token_encrypted = NULL, lease_owner = NULL, lease_until = NULL,
            consecutive_failures = consecutive_failures + 1
        WHERE {of_workspace} AND connection_id = %(connection)s
          AND NOT EXISTS (  -- a worker that slept must not refuse the grant that has come since
            SELECT FROM public.google_connections g
            WHERE g.id = %(connection)s AND g.tenant_id = %(tenant)s AND g.workspace_id = %(workspace)s
              AND {grant_fingerprint} <> %(fingerprint)s)
        """),
        {**_key(workspace, grant.connection_id), "kind": error.kind, "fingerprint": grant.fingerprint},
    )


def park(connection: Connection, workspace: Workspace, connection_id: UUID, *, seconds: float) -> None:
    """Make no call for a connection for that many seconds; the visit after that is on probation."""
    connection.execute(
        _sql("""
        UPDATE sync.connection_state
        SET parked_until = now() + make_interval(secs => %(seconds)s), failed_visits = failed_visits + 1
        WHERE {of_workspace} AND connection_id = %(connection)s
        """),
        {**_key(workspace, connection_id), "seconds": seconds},
    )


def end_probation(connection: Connection, workspace: Workspace, connection_id: UUID) -> None:
    """Note that Google answers for a connection again."""
    connection.execute(
        _sql("""
        UPDATE sync.connection_state SET failed_visits = 0 WHERE {of_workspace} AND connection_id = %(connection)s
        """),
        _key(workspace, connection_id),
    )


def give_back_list(connection: Connection, lease: ListLease) -> None:
    """Return the lease of a list unused; the list stays due."""
    connection.execute(
        _sql("""
        UPDATE sync.connection_state SET lease_owner = NULL, lease_until = NULL
        WHERE {of_workspace} AND connection_id = %(connection)s AND lease_epoch = %(epoch)s
        """),
        {**_key(lease.workspace, lease.connection_id), "epoch": lease.epoch},
    )


def record_list(
    connection: Connection,
    lease: ListLease,
    entries: Sequence[CalendarEntry],
    *,
    token_fingerprint: bytes,
    due_in_seconds: float,
) -> None:
    """Bring the calendars of a connection in step with its complete list.

    New calendars are due at once, and so are returning ones and those with another role, which are read completely:
    Google does not list again what a role newly shows. Renamed ones take their new name; those Google calls deleted are
    retired, those it does not mention only after the second list. An empty list is no answer and changes nothing.

    Args:
        connection: within a transaction.
        lease: of the list.
        entries: every entry of every page.
        token_fingerprint: of the grant; a retired calendar that returns under another one shows nothing of the old.
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
            due_at = CASE WHEN mine.deleted_at IS NULL AND mine.access_role IS NOT DISTINCT FROM excluded.access_role
                          THEN mine.due_at ELSE 'epoch' END,
            sync_token = CASE
                WHEN mine.deleted_at IS NULL AND mine.access_role IS NOT DISTINCT FROM excluded.access_role
                THEN mine.sync_token END,
            live_generation = CASE
                WHEN mine.deleted_at IS NOT NULL AND mine.token_fingerprint IS DISTINCT FROM %(fingerprint)s
                THEN 0 ELSE mine.live_generation END,
            connection_id = CASE
                WHEN EXISTS (
                    SELECT FROM sync.connection_state s JOIN public.google_connections g
                        ON g.id = s.connection_id AND g.tenant_id = s.tenant_id AND g.workspace_id = s.workspace_id
                    WHERE s.tenant_id = mine.tenant_id AND s.workspace_id = mine.workspace_id
                      AND s.connection_id = mine.connection_id AND s.status = 'active' AND g.status = 'active')
                THEN mine.connection_id ELSE excluded.connection_id END
        """,
        {
            **key,
            "entries": json.dumps([asdict(entry) for entry in present.values()]),
            "fingerprint": token_fingerprint,
        },
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
        SET lease_owner = NULL, lease_until = NULL, list_finished_at = now(), last_error = %(kind)s::text,
            consecutive_failures = CASE WHEN %(kind)s::text IS NULL THEN 0 ELSE consecutive_failures + 1 END,
            list_due_at = CASE WHEN %(kind)s::text IS NULL AND list_notified_at >= list_started_at THEN now()
                               ELSE now() + make_interval(secs => %(seconds)s) END
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
