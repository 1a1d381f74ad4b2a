"""Push channels: Google tells the receiver (`sync_pipeline.webhook`) that a calendar changed, instead of being asked.

Belongs here: opening channels, renewing them with overlap, stopping them, and what is left after a crash.
Does not: taking notifications, pulling changes, when calendars are visited.

Google lists no channels, so each is written down before Google is asked for it; its sync message may arrive before the
answer, too. A crash at any point leaves at most a channel that nobody needs, until it expires; never a calendar that
looks watched and is not. In order, each step committed before the next:

1. the row: `opening`, with the hash of the secret its notifications have to carry;
2. events.watch, or calendarList.watch;
3. the row becomes `open`; older channels of the same calendar become `closing`; where none of them was in force, a pull
   is owed, because what changed between the last pull and the answer was announced to nobody;
4. channels.stop and the end of the row, for each that is closing. What is left undone here, the next visit of the
   connection's list does (`keep_list`).

Only step 1 needs the lease, which keeps two workers from opening a channel each. What Google answered is true whoever
holds the lease by then; step 3 is refused only when others took the channel for abandoned, and then it is stopped.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from uuid import UUID

from psycopg import sql

from scaling.databases import Connection
from sync_pipeline.errors import PushUnsupportedError, SyncError, ThrottledError, TransientError
from sync_pipeline.google_calendar import CalendarApi, ChannelAnswer, ChannelRequest
from sync_pipeline.leases import HAS_ADDRESS, TAG_BYTES, CalendarLease, ListLease, PushTerms

TTL_SECONDS = 7 * 86400.0
"""Google's default (guides/push); it may grant less."""
RENEW_BEFORE_SECONDS = 2 * 86400.0
"""Every calendar is visited daily, so one visit may fail before its channel ends."""
ABANDONED_SECONDS = 600.0
"""An `opening` row this old has no worker any more; asking Google takes two minutes at the very most."""
OVERLAP_SECONDS = 900.0
"""A channel with less time left may have ended by Google's clock already."""
RETRY_REFUSED_SECONDS = 6 * 3600.0
RETRY_UNANSWERED_SECONDS = 600.0
STOPS_PER_VISIT = 20

Transaction = Callable[[], AbstractContextManager[Connection]]

ITS_CHANNELS = sql.SQL("""tenant_id = %(tenant)s AND workspace_id = %(workspace)s AND connection_id = %(connection)s
    AND calendar_id IS NOT DISTINCT FROM %(calendar)s""")
IN_FORCE = sql.SQL("(state = 'open' AND {} AND expires_at > now() + make_interval(secs => {}))").format(
    HAS_ADDRESS, sql.Literal(OVERLAP_SECONDS)
)
ABANDONED = sql.SQL("(state = 'opening' AND created_at <= now() - make_interval(secs => {}))").format(
    sql.Literal(ABANDONED_SECONDS)
)


class _Statements:
    """The SQL about a calendar, or about a connection's list."""

    def __init__(self, *, of_calendar: bool) -> None:
        prefix = "" if of_calendar else "list_"
        names: dict[str, sql.Composable] = {
            "table": sql.Identifier("sync", "calendar_state" if of_calendar else "connection_state"),
            "row": sql.SQL("tenant_id = %(tenant)s AND workspace_id = %(workspace)s AND connection_id = %(connection)s")
            + sql.SQL(" AND calendar_id = %(calendar)s" if of_calendar else ""),
            "may_be_watched": sql.SQL("push_unsupported_at IS NULL" if of_calendar else "true"),
            "retry_at": sql.Identifier(f"{prefix}watch_retry_at"),
            "notified_at": sql.Identifier(f"{prefix}notified_at"),
            "due_at": sql.Identifier(f"{prefix}due_at"),
            "its_channels": ITS_CHANNELS,
            "in_force": IN_FORCE,
            "abandoned": ABANDONED,
        }
        self.hold = sql.SQL("""
            SELECT FROM {table}
            WHERE {row} AND lease_epoch = %(epoch)s AND {may_be_watched} AND coalesce({retry_at} <= now(), true)
            FOR NO KEY UPDATE
            """).format(**names)
        # Its own statement: it must see what a keeper did whose row lock `hold` waited for.
        self.reserve = sql.SQL("""
            INSERT INTO sync.channels
                (channel_id, tenant_id, workspace_id, connection_id, calendar_id, token_hash, created_at, expires_at)
            SELECT %(channel)s, %(tenant)s, %(workspace)s, %(connection)s, %(calendar)s, %(token_hash)s, now(),
                now() + make_interval(secs => %(ttl)s)
            WHERE NOT EXISTS (
                SELECT FROM sync.channels WHERE {its_channels} AND (
                    {in_force} AND expires_at - now() >
                        least(make_interval(secs => %(renew_before)s), (expires_at - created_at) / 2)
                    OR state = 'opening' AND NOT {abandoned}))
            """).format(**names)
        self.is_watched = sql.SQL("""
            SELECT EXISTS (
                SELECT FROM sync.channels WHERE {its_channels} AND channel_id <> %(channel)s AND {in_force})
            """).format(**names)
        self.close_others = sql.SQL("""
            UPDATE sync.channels SET state = 'closing'
            WHERE {its_channels} AND channel_id IS DISTINCT FROM %(channel)s AND (state = 'open' OR {abandoned})
            """).format(**names)
        # Whoever took the calendar meanwhile may have pulled before Google answered, so it has to pull once more.
        self.owe_pull = sql.SQL("""
            UPDATE {table} SET {due_at} = least({due_at}, clock_timestamp()),
                {notified_at} = CASE WHEN lease_epoch = %(epoch)s THEN {notified_at} ELSE clock_timestamp() END
            WHERE {row}
            """).format(**names)
        self.retry_later = sql.SQL("""
            UPDATE {table} SET {retry_at} = now() + make_interval(secs => %(seconds)s)
            WHERE {row} AND lease_epoch = %(epoch)s
            """).format(**names)


OF_CALENDAR = _Statements(of_calendar=True)
OF_LIST = _Statements(of_calendar=False)
NEVER_AGAIN = """
UPDATE sync.calendar_state SET push_unsupported_at = now()
WHERE tenant_id = %(tenant)s AND workspace_id = %(workspace)s AND calendar_id = %(calendar)s AND lease_epoch = %(epoch)s
"""
OPEN = """
UPDATE sync.channels SET state = 'open', resource_id = %(resource)s, expires_at = least(expires_at, %(expires)s)
WHERE channel_id = %(channel)s AND state = 'opening'
"""
FORGET = "DELETE FROM sync.channels WHERE channel_id = %(channel)s"
FORGET_EXPIRED = """
DELETE FROM sync.channels WHERE channel_id IN (
    SELECT channel_id FROM sync.channels WHERE expires_at < now() - interval '1 hour' LIMIT 100
    FOR UPDATE SKIP LOCKED)
"""
MAY_BE_OPEN = "UPDATE sync.channels SET state = 'closing' WHERE channel_id = %(channel)s"
# Of a whole connection: what a crash left, what leads to another address, what watches a calendar for nobody.
CLOSE_STRAYS = sql.SQL("""
UPDATE sync.channels SET state = 'closing' WHERE channel_id IN (
    SELECT channel_id FROM sync.channels h
    WHERE tenant_id = %(tenant)s AND workspace_id = %(workspace)s AND connection_id = %(connection)s
      AND ({abandoned} OR state = 'open' AND (
          NOT {has_address} OR calendar_id IS NOT NULL AND NOT EXISTS (
              SELECT FROM sync.calendar_state c
              WHERE (c.tenant_id, c.workspace_id, c.connection_id, c.calendar_id)
                  = (h.tenant_id, h.workspace_id, h.connection_id, h.calendar_id) AND c.deleted_at IS NULL)))
    FOR UPDATE SKIP LOCKED)
RETURNING calendar_id
""").format(abandoned=ABANDONED, has_address=HAS_ADDRESS)
# They looked watched until now.
VISIT_SOON = """
UPDATE sync.calendar_state SET due_at = least(due_at, now())
WHERE tenant_id = %(tenant)s AND workspace_id = %(workspace)s AND calendar_id = ANY(%(calendars)s)
  AND deleted_at IS NULL
"""
# A channel whose resource Google never named: other channels of the same calendar have the same.
CLOSING = """
SELECT channel_id, resource_id FROM (
    SELECT channel_id, state, coalesce(resource_id, max(resource_id) OVER (PARTITION BY calendar_id)) AS resource_id
    FROM sync.channels
    WHERE tenant_id = %(tenant)s AND workspace_id = %(workspace)s AND connection_id = %(connection)s
      AND (%(everything)s OR calendar_id IS NOT DISTINCT FROM %(calendar)s)
) AS channels
WHERE state = 'closing' AND resource_id IS NOT NULL LIMIT %(limit)s
"""


@dataclass(frozen=True, slots=True)
class ChannelKeeper:
    """Keeps one channel in force per calendar, and one per connection for its list.

    Attributes:
        address: https address of the receiver; None: push is off, and channels met are stopped.
        new_token: makes a secret of at most 256 characters.
        random_bytes: makes so many random bytes, for channel ids.
        ttl_seconds: life asked for.
        renew_before_seconds: a channel with less left is renewed, or one with less than half of its life.
    """

    address: str | None
    new_token: Callable[[], str] = field(repr=False)
    random_bytes: Callable[[int], bytes] = field(repr=False)
    ttl_seconds: float = TTL_SECONDS
    renew_before_seconds: float = RENEW_BEFORE_SECONDS

    @property
    def terms(self) -> PushTerms:
        """Which channels are good enough to be left alone."""
        tag = hashlib.sha256(self.address.encode()).digest()[:TAG_BYTES] if self.address else b""
        return PushTerms(tag, self.renew_before_seconds)

    def keep_calendar(self, api: CalendarApi, transaction: Transaction, lease: CalendarLease) -> bool:
        """Open or renew the channel of a calendar if it needs one; with push off, stop the ones it has.

        Args:
            api: of the calendar's connection.
            transaction: opens a transaction.
            lease: of the calendar, held still or just given back; somebody else's by now: nothing is done.

        Returns:
            True when a channel was opened where none was in force: what changed since the last pull was announced to
            nobody. The calendar is due then, so its pull is owed even if the caller dies now.

        Raises:
            SyncError: one that concerns more than this channel (grant, quota); the calendar is polled meanwhile.
        """
        subject = {
            "tenant": lease.workspace.tenant_id,
            "workspace": lease.workspace.workspace_id,
            "connection": lease.connection_id,
            "calendar": lease.calendar_id,
            "epoch": lease.epoch,
        }
        visit = _Visit(self, api, transaction, OF_CALENDAR, subject)
        return visit.keep(lambda request: api.watch_events(lease.calendar_id, request))

    def keep_list(self, api: CalendarApi, transaction: Transaction, lease: ListLease) -> bool:
        """Open or renew the channel of a connection's list of calendars, and stop what the connection left over.

        Left over are channels that a crash left, those of calendars that are gone or read through another connection
        now, and those with another address; without an address of its own the keeper leaves none.

        Args:
            api: of the connection.
            transaction: opens a transaction.
            lease: of the list, see `keep_calendar`.

        Returns:
            True when the list has to be read again, see `keep_calendar`.

        Raises:
            SyncError: see `keep_calendar`.
        """
        subject = {
            "tenant": lease.workspace.tenant_id,
            "workspace": lease.workspace.workspace_id,
            "connection": lease.connection_id,
            "calendar": None,
            "epoch": lease.epoch,
        }
        visit = _Visit(self, api, transaction, OF_LIST, subject)
        opened = visit.keep(api.watch_calendars)
        visit.sweep()
        return opened


class _Visit:
    """One visit of one calendar or list."""

    def __init__(
        self,
        keeper: ChannelKeeper,
        api: CalendarApi,
        transaction: Transaction,
        statements: _Statements,
        subject: Mapping[str, object],
    ) -> None:
        self._keeper = keeper
        self._api = api
        self._transaction = transaction
        self._sql = statements
        self._tag = keeper.terms.address_tag
        self._subject = {**subject, "tag": self._tag}

    def keep(self, watch: Callable[[ChannelRequest], ChannelAnswer]) -> bool:
        """Do the four steps; see `ChannelKeeper.keep_calendar`."""
        address = self._keeper.address
        if address is None:
            with self._transaction() as connection:
                connection.execute(self._sql.close_others, {**self._subject, "channel": None})
            self._stop_closing()
            return False
        request = self._reserve(address)
        if request is None:
            return False
        try:
            answer = watch(request)
        except SyncError as error:
            self._failed(request, error)
            if _concerns_more(error):
                raise
            return False
        was_watched = self._opened(request, answer)
        if was_watched is None:
            self._stop([(request.channel_id, answer.resource_id)])
            return False
        self._stop_closing()
        return not was_watched

    def sweep(self) -> None:
        """Stop what the connection left over."""
        with self._transaction() as connection:
            connection.execute(FORGET_EXPIRED)
            strays = connection.execute(CLOSE_STRAYS, self._subject).fetchall()
            if calendars := sorted({calendar for (calendar,) in strays if calendar is not None}):
                connection.execute(VISIT_SOON, {**self._subject, "calendars": calendars})
        self._stop_closing(everything=True)

    def _reserve(self, address: str) -> ChannelRequest | None:
        """Write down the channel that will be asked for; None: none is needed, or not now, or not by us."""
        keeper = self._keeper
        identifier = UUID(bytes=self._tag + keeper.random_bytes(16 - TAG_BYTES), version=4)
        request = ChannelRequest(identifier, keeper.new_token(), address, keeper.ttl_seconds)
        with self._transaction() as connection:
            if connection.execute(self._sql.hold, self._subject).fetchone() is None:
                return None
            reserved = connection.execute(
                self._sql.reserve,
                {
                    **self._subject,
                    "channel": request.channel_id,
                    "token_hash": hashlib.sha256(request.token.encode()).digest(),
                    "ttl": keeper.ttl_seconds,
                    "renew_before": keeper.renew_before_seconds,
                },
            )
        return request if reserved.rowcount == 1 else None

    def _opened(self, request: ChannelRequest, answer: ChannelAnswer) -> bool | None:
        """Write down Google's answer.

        Returns:
            Whether another channel was in force all the while; None when ours was taken for abandoned.
        """
        channel: dict[str, object] = {
            **self._subject,
            "channel": request.channel_id,
            "resource": answer.resource_id,
            "expires": answer.expires_at,
        }
        with self._transaction() as connection:
            if connection.execute(OPEN, channel).rowcount != 1:
                return None
            row = connection.execute(self._sql.is_watched, channel).fetchone()
            was_watched = row is not None and bool(row[0])
            connection.execute(self._sql.close_others, channel)
            if not was_watched:
                connection.execute(self._sql.owe_pull, self._subject)
        return was_watched

    def _failed(self, request: ChannelRequest, error: SyncError) -> None:
        channel = {"channel": request.channel_id}
        with self._transaction() as connection:
            # Without an answer it may be open: the sync message, or the next channel, will name its resource.
            connection.execute(MAY_BE_OPEN if isinstance(error, TransientError) else FORGET, channel)
            if isinstance(error, PushUnsupportedError) and self._subject["calendar"] is not None:
                connection.execute(NEVER_AGAIN, self._subject)
            elif not _concerns_more(error):
                seconds = RETRY_UNANSWERED_SECONDS if isinstance(error, TransientError) else RETRY_REFUSED_SECONDS
                connection.execute(self._sql.retry_later, {**self._subject, "seconds": seconds})

    def _stop_closing(self, *, everything: bool = False) -> None:
        with self._transaction() as connection:
            closing = connection.execute(
                CLOSING, {**self._subject, "everything": everything, "limit": STOPS_PER_VISIT}
            ).fetchall()
        self._stop([(channel_id, resource_id) for channel_id, resource_id in closing])

    def _stop(self, channels: Sequence[tuple[UUID, str]]) -> None:
        """Stop channels and forget them; one that Google does not know is as good as stopped."""
        for channel_id, resource_id in channels:
            try:
                self._api.stop_channel(channel_id, resource_id)
            except TransientError:
                return  # the next visit does it
            except SyncError as error:
                if _concerns_more(error):
                    raise
            with self._transaction() as connection:
                connection.execute(FORGET, {"channel": channel_id})


def _concerns_more(error: SyncError) -> bool:
    """The error is about the grant or a quota, not about one channel."""
    return error.stops_connection or isinstance(error, ThrottledError)
