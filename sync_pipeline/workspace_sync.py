"""The unit of work: everything that is due in one workspace, whatever goes wrong in it.

Belongs here: the order of the work, and what each error means for calendar, connection and workspace.
Does not: choosing workspaces (`sync_pipeline.tick`), the protocol of one calendar (`sync_pipeline.engine`).
"""

import logging
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

import psycopg

from scaling import tracing
from scaling.databases import Connection
from scaling.errors import UserError
from scaling.logs import Event, event
from sync_pipeline import connections, event_store, health, leases, runs
from sync_pipeline.cadence import observe
from sync_pipeline.connections import StoredGrant
from sync_pipeline.engine import CalendarSync, NextVisit
from sync_pipeline.errors import (
    AccessDeniedError,
    GrantRefusedError,
    InternalError,
    LeaseLostError,
    ProtocolError,
    SyncError,
    ThrottledError,
    TransientError,
)
from sync_pipeline.google_calendar import CachedAccessToken, CalendarEntry, CallCounter, GoogleConnection
from sync_pipeline.grants import UnreadableGrantError
from sync_pipeline.health import Health
from sync_pipeline.leases import CalendarLease, Claim, ListLease
from sync_pipeline.quota import UNLIMITED, CallGate
from sync_pipeline.services import Services
from sync_pipeline.tally import Tally
from sync_pipeline.workspaces import Workspace

log = logging.getLogger("sync_pipeline")

BREAKER_AFTER = 2
"""Calendars in a row that Google does not answer for, before the others of the connection are left for later; one is
enough while the connection is on probation (its last visit ended that way)."""


LIST_PAGES = 200
"""50,000 calendars; a longer list is one that does not end."""


@dataclass(frozen=True, slots=True)
class Reserved:
    """Calls that a user's quota has set aside for an assignment."""

    calls: int
    wait_seconds: float
    """Until they may be sent; see `sync_pipeline.call_buckets.reserve_users`."""
    at: float
    """When they were reserved, by the services' clock."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """What one worker does next: leases, and what it may use for them."""

    claim: Claim
    grants: Mapping[UUID, StoredGrant] = field(repr=False)
    """By connection."""
    reserved: Mapping[bytes, Reserved] = field(repr=False)
    """By Google account."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """One thing that went wrong; safe to show."""

    kind: str
    detail: str


@dataclass(frozen=True, slots=True)
class WorkspaceResult:
    """How serving a workspace ended. There is always one, however it ended."""

    workspace: Workspace
    tally: Tally
    troubles: tuple[Trouble, ...]
    deferrals: tuple[Trouble, ...]
    """Why calendars were left for later although nothing failed."""
    health: Health | None
    seconds: float


def serve(
    services: Services, assignment: Assignment, *, owner: str, since: datetime, deadline: float
) -> WorkspaceResult:
    """Do what is due in one workspace.

    Args:
        services: to work with.
        assignment: the leases and the grants.
        owner: names the run.
        since: what "due" means, by the database's clock.
        deadline: no further calendar is started after this moment of the services' clock.

    Returns:
        What was done; errors of the workspace are in it, never raised.

    Raises:
        UserError: the database cannot be reached, which no other workspace would survive either.
    """
    started = services.clock()
    service = _Service(services, assignment, owner, since, deadline)
    judged: Health | None = None
    with tracing.span("workspace", assignment.claim.workspace.named()):
        try:
            service.work()
            judged = service.close()
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001  # one workspace's failure never touches another
            service.note(_internal(error))
        tracing.ended(judged or "unknown", {"troubles": len(service.troubles), **service.tally.numbers()})
    return WorkspaceResult(
        assignment.claim.workspace,
        service.tally,
        tuple(service.troubles),
        tuple(service.deferrals),
        judged,
        services.clock() - started,
    )


def unreadable(workspace: Workspace, error: Exception) -> WorkspaceResult:
    """What came of a workspace whose state cannot be read: nothing but one trouble, which is logged.

    Args:
        workspace: which.
        error: what happened; its text is told to nobody.
    """
    trouble = _internal(error)
    log.error(
        "workspace %s is passed over, a row of its state cannot be read: %s",
        workspace.partition_key,
        trouble,
        extra=event(Event.WORKSPACE_PASSED_OVER, workspace=workspace.partition_key, kind=trouble.kind),
    )
    return WorkspaceResult(workspace, Tally(), (Trouble(trouble.kind, str(trouble)),), (), None, 0.0)


@dataclass(frozen=True, slots=True)
class _Shelf:
    """A connection's access token in the database, read and written in a transaction each.

    Not in those of the visit: calendars of one connection may be in work in several runs at once, and a visit may take
    minutes.
    """

    services: Services
    workspace: Workspace
    grant: StoredGrant = field(repr=False)

    def latest(self) -> CachedAccessToken | None:
        """See `AccessTokenShelf.latest`."""
        with self.services.router.writer(self.workspace.tenant_id) as connection:
            return connections.kept_access_token(connection, self.workspace, self.grant, self.services.cipher)

    def leave(self, token: CachedAccessToken) -> None:
        """See `AccessTokenShelf.leave`."""
        with self.services.router.writer(self.workspace.tenant_id) as connection:
            connections.keep_access_token(connection, self.workspace, self.grant, token, self.services.cipher)


class _Service:
    """The state of serving one workspace, in one thread."""

    def __init__(
        self, services: Services, assignment: Assignment, owner: str, since: datetime, deadline: float
    ) -> None:
        self._services = services
        self._claim = assignment.claim
        self._workspace = assignment.claim.workspace
        self._owner = owner
        self._since = since
        self._deadline = deadline
        self._stopped: set[UUID] = set()
        self._silent: Counter[UUID] = Counter()
        self._grants = assignment.grants
        self._reserved = assignment.reserved
        self._connected: dict[UUID, GoogleConnection] = {}
        self._counted: CallCounter = Counter()
        self.tally = Tally()
        self.troubles: list[Trouble] = []
        self.deferrals: list[Trouble] = []

    def work(self) -> None:
        """Read the due lists of calendars, then sync the due calendars, new ones included."""
        for lease in self._claim.lists:
            with tracing.span("calendar_list", {"connection.id": str(lease.connection_id)}):
                self._list(lease)
        calendars = list(self._claim.calendars)
        if self._claim.lists:
            with self._services.router.writer(self._workspace.tenant_id) as connection:
                found = leases.take(
                    connection,
                    [self._workspace],
                    owner=self._owner,
                    since=self._since,
                    push=self._services.push_terms,
                )
            calendars += [lease for more in found for lease in more.calendars]
        for calendar in calendars:
            # Not its id, which is a mail address.
            with tracing.span("calendar", {"connection.id": str(calendar.connection_id)}):
                before = Counter(self.tally.numbers())
                self._calendar(calendar)
                tracing.counted(Counter(self.tally.numbers()) - before)

    def close(self) -> Health | None:
        """Write down calls and health; an idle visit has nothing of it to write."""
        well = [
            connection_id
            for connection_id in self._connected
            if self._grants[connection_id].failed_visits and connection_id not in self._stopped
        ]
        # Full syncs may have opened a breaker.
        unremarkable = not (self.troubles or self.tally.changed or self.tally.full_syncs or not self._claim.is_healthy)
        if unremarkable and not well and self._counted == self.tally.calls:
            return "healthy"
        with self._services.router.writer(self._workspace.tenant_id) as connection:
            self._count_calls(connection)
            for connection_id in well:
                connections.end_probation(connection, self._workspace, connection_id)
            return "healthy" if unremarkable else health.assess(connection, self._workspace, self.tally)

    def note(self, error: SyncError) -> None:
        """Remember what went wrong and log it, without anything personal."""
        self.troubles.append(Trouble(error.kind, str(error)))
        tracing.failed(error.kind)
        log.warning(
            "workspace %s: %s (%s)",
            self._workspace.partition_key,
            error.kind,
            error,
            extra=event(Event.WORKSPACE_TROUBLE, workspace=self._workspace.partition_key, kind=error.kind),
        )

    def _count_calls(self, connection: Connection) -> None:
        """Write down the requests made since the last time, within whatever transaction is open anyway."""
        calls = Counter(self.tally.calls)
        runs.count_calls(connection, self._workspace.tenant_id, calls - self._counted)
        self._counted = calls

    def _list(self, lease: ListLease) -> None:
        keeper = self._services.keeper
        try:
            if keeper is not None:
                keeper.keep_list(self._connect(lease.connection_id), self._transaction, lease)
            entries = self._read_list(lease.connection_id)
            with self._transaction() as connection:
                connections.record_list(
                    connection,
                    lease,
                    entries,
                    token_fingerprint=self._grants[lease.connection_id].token_fingerprint,
                    due_in_seconds=self._services.cadence.next_list(lease.is_watched),
                )
                event_store.purge_tombstones(connection, self._workspace)
        except LeaseLostError as error:
            self.note(error)
        except ThrottledError as error:
            self._postpone(error, lease.connection_id)
            with self._transaction() as connection:
                connections.give_back_list(connection, lease)
        except SyncError as error:
            self._list_failed(lease, error)
        except (psycopg.Error, ArithmeticError, LookupError, TypeError, ValueError) as error:
            self._list_failed(lease, _internal(error))

    def _read_list(self, connection_id: UUID) -> Sequence[CalendarEntry]:
        google = self._connect(connection_id)
        entries: list[CalendarEntry] = []
        asked: set[str] = set()
        page_token: str | None = None
        while True:
            page = google.list_calendars(page_token=page_token)
            entries += page.entries
            page_token = page.next_page_token
            if page_token is None:
                return entries
            if page_token in asked or len(asked) >= LIST_PAGES:
                raise ProtocolError("the list of calendars does not end")
            asked.add(page_token)

    def _list_failed(self, lease: ListLease, error: SyncError) -> None:
        self.note(error)
        seconds = self._services.cadence.after(error, failures=lease.consecutive_failures)
        with self._transaction() as connection:
            connections.record_list_failure(connection, lease, error, due_in_seconds=seconds)
        self._judge_connection(lease.connection_id, error)

    def _calendar(self, lease: CalendarLease) -> None:
        services = self._services
        if lease.connection_id in self._stopped or services.clock() > self._deadline:
            self._defer(lease)
            return
        counted = self._counted
        try:
            api = self._connect(lease.connection_id)
            opened = False
            if services.keeper is not None and lease.wants_channel:
                # Before the pull, which so catches up with what changed until the channel was in force.
                opened = services.keeper.keep_calendar(api, self._transaction, lease)
            CalendarSync(
                api=api,
                transaction=self._transaction,
                token_fingerprint=self._grants[lease.connection_id].token_fingerprint,
                next_visit=lambda changed: self._next_visit(lease, changed=changed, opened=opened),
                also=self._count_calls,
                incremental=services.in_force.incremental,
            ).run(lease, self.tally)
        except LeaseLostError as error:
            self.tally.calendars_deferred += 1
            self.note(error)
        except ThrottledError as error:
            self._postpone(error, lease.connection_id)
            self._defer(lease)
        except SyncError as error:
            self._calendar_failed(lease, error)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001  # one calendar's failure never touches another
            self._calendar_failed(lease, _internal(error))
        else:
            tracing.ended("synced")
            self.tally.calendars_synced += 1
            self._silent[lease.connection_id] = 0
            counted = self._counted
        finally:
            self._counted = counted  # what was counted in a transaction that rolled back is counted again

    def _next_visit(self, lease: CalendarLease, *, changed: bool, opened: bool) -> NextVisit:
        cadence = self._services.cadence
        watched = lease.is_watched
        if opened:
            with self._transaction() as connection:
                watched = leases.is_watched(connection, lease, push=self._services.push_terms)
        count, days = observe(
            lease.change_count, lease.observed_days, lease.seconds_since_sync, changed, notified=watched
        )
        if lease.sync_token is None and self._services.push_terms.address_tag:
            # After the baseline the next visit opens a channel and catches up.
            return NextVisit(count, days, due_in_seconds=0.0)
        seconds = cadence.next_safety_poll() if watched else cadence.next_poll(cadence.rate(count, days))
        return NextVisit(count, days, due_in_seconds=seconds)

    def _calendar_failed(self, lease: CalendarLease, error: SyncError) -> None:
        self.note(error)
        tracing.ended("failed")
        self.tally.calendars_failed += 1
        seconds = self._services.cadence.after(error, failures=lease.consecutive_failures)
        if isinstance(error, GrantRefusedError):
            # The calendar itself is fine; it stays due until the grant is replaced.
            seconds = 0.0
        with self._transaction() as connection:
            leases.record_failure(connection, lease, error, due_in_seconds=seconds)
        self._judge_connection(lease.connection_id, error)

    def _judge_connection(self, connection_id: UUID, error: SyncError) -> None:
        """Leave a connection alone that Google refuses, slows down, or does not answer for (breaker)."""
        grant = self._grants.get(connection_id)
        if grant is None:  # switched off meanwhile
            self._stopped.add(connection_id)
            return
        if isinstance(error, TransientError):
            self._silent[connection_id] += 1
            if self._silent[connection_id] < (1 if grant.failed_visits else BREAKER_AFTER):
                return
        elif not error.stops_connection:
            return
        self._stopped.add(connection_id)
        with self._transaction() as connection:
            if isinstance(error, GrantRefusedError):
                connections.refuse(connection, self._workspace, grant, error)
                return
            seconds = self._services.cadence.park(error, failed_visits=grant.failed_visits)
            connections.park(connection, self._workspace, connection_id, seconds=seconds)

    def _postpone(self, error: ThrottledError, connection_id: UUID) -> None:
        """Stop for now because of our own quota keeping, which is nobody's failure."""
        self._stopped.add(connection_id)
        self.deferrals.append(Trouble(error.kind, str(error)))

    def _defer(self, lease: CalendarLease) -> None:
        tracing.ended("deferred")
        self.tally.calendars_deferred += 1
        with self._transaction() as connection:
            leases.give_back(connection, lease)

    def _transaction(self) -> AbstractContextManager[Connection]:
        return self._services.router.writer(self._workspace.tenant_id)

    def _connect(self, connection_id: UUID) -> GoogleConnection:
        if connection_id not in self._connected:
            grant = self._grants.get(connection_id)
            if grant is None:
                raise AccessDeniedError("the connection was switched off meanwhile")
            try:
                refresh_token = grant.refresh_token(self._services.cipher)
            except UnreadableGrantError as error:
                raise GrantRefusedError(str(error)) from None
            gate: CallGate = UNLIMITED
            if self._services.quota is not None:
                user = self._services.quota.for_user(grant.account_key, self._workspace.tenant_id)
                if reserved := self._reserved.get(grant.account_key):
                    user.granted(reserved.calls, reserved.wait_seconds, reserved_at=reserved.at)
                gate = user
            self._connected[connection_id] = self._services.google.connect(
                refresh_token,
                calls=self.tally.calls,
                access_token=grant.access_token(self._services.cipher),
                shelf=_Shelf(self._services, self._workspace, grant),
                gate=gate,
            )
        return self._connected[connection_id]


def _internal(error: BaseException) -> InternalError:
    """Reduce an unforeseen error to its type and place: its text may hold rows or addresses."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].name}:{frames[-1].lineno}" if frames else "unknown"
    code = f" {error.sqlstate}" if isinstance(error, psycopg.Error) and error.sqlstate else ""
    return InternalError(f"{type(error).__name__}{code} in {place}")
