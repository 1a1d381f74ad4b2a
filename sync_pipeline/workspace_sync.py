"""The unit of work: everything that is due in one workspace, whatever goes wrong in it.

Belongs here: the order of the work, and what each error means for calendar, connection and workspace.
Does not: choosing workspaces (`sync_pipeline.tick`), the protocol of one calendar (`sync_pipeline.engine`).
"""

import logging
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import psycopg

from scaling.errors import UserError
from sync_pipeline import connections, event_store, health, leases, runs
from sync_pipeline.connections import StoredGrant
from sync_pipeline.engine import CalendarSync
from sync_pipeline.errors import (
    AccessDeniedError,
    GrantRefusedError,
    InternalError,
    LeaseLostError,
    ProtocolError,
    QuotaExceededError,
    RateLimitedError,
    SyncError,
)
from sync_pipeline.google_calendar import CalendarEntry, GoogleConnection
from sync_pipeline.grants import UnreadableGrantError
from sync_pipeline.health import Health
from sync_pipeline.leases import CalendarLease, Claim, ListLease
from sync_pipeline.services import Services
from sync_pipeline.tally import Tally
from sync_pipeline.workspaces import Workspace

log = logging.getLogger("sync_pipeline")


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
    health: Health | None
    seconds: float


def serve(services: Services, claim: Claim, *, owner: str, since: datetime, deadline: float) -> WorkspaceResult:
    """Do what is due in one workspace.

    Args:
        services: to work with.
        claim: the leases.
        owner: names the run.
        since: the run's start, by the database's clock.
        deadline: no further calendar is started after this moment of the services' clock.

    Returns:
        What was done; errors of the workspace are in it, never raised.

    Raises:
        UserError: the database cannot be reached, which no other workspace would survive either.
    """
    started = services.clock()
    service = _Service(services, claim.workspace, owner, since, deadline)
    judged: Health | None = None
    try:
        service.work(claim)
        judged = service.close()
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  # one workspace's failure never touches another
        service.note(_internal(error))
    return WorkspaceResult(claim.workspace, service.tally, tuple(service.troubles), judged, services.clock() - started)


class _Service:
    """The state of serving one workspace, in one thread."""

    def __init__(self, services: Services, workspace: Workspace, owner: str, since: datetime, deadline: float) -> None:
        self._services = services
        self._workspace = workspace
        self._owner = owner
        self._since = since
        self._deadline = deadline
        self._stopped: set[UUID] = set()
        self._grants: dict[UUID, StoredGrant] = {}
        self._connected: dict[UUID, GoogleConnection] = {}
        self.tally = Tally()
        self.troubles: list[Trouble] = []

    def work(self, claim: Claim) -> None:
        """Read the due lists of calendars, then sync the due calendars, new ones included."""
        with self._services.router.writer(self._workspace.tenant_id) as connection:
            self._grants = connections.load_grants(connection, self._workspace)
        for lease in claim.lists:
            self._list(lease)
        calendars = list(claim.calendars)
        if claim.lists:
            with self._services.router.writer(self._workspace.tenant_id) as connection:
                found = leases.take(connection, [self._workspace], owner=self._owner, since=self._since)
            calendars += [lease for more in found for lease in more.calendars]
        for calendar in calendars:
            self._calendar(calendar)

    def close(self) -> Health:
        """Write down calls, access tokens and health."""
        with self._services.router.writer(self._workspace.tenant_id) as connection:
            runs.count_calls(connection, self._workspace.tenant_id, self.tally.calls)
            for connection_id, google in self._connected.items():
                token = google.access_token
                grant = self._grants[connection_id]
                if token is not None and token != grant.access_token(self._services.cipher):
                    connections.keep_access_token(connection, self._workspace, grant, token, self._services.cipher)
            return health.assess(connection, self._workspace, self.tally)

    def note(self, error: SyncError) -> None:
        """Remember what went wrong and log it, without anything personal."""
        self.troubles.append(Trouble(error.kind, str(error)))
        log.warning("workspace %s: %s (%s)", self._workspace.partition_key, error.kind, error)

    def _list(self, lease: ListLease) -> None:
        cadence = self._services.cadence
        try:
            entries = self._read_list(lease.connection_id)
            with self._services.router.writer(self._workspace.tenant_id) as connection:
                connections.record_list(connection, lease, entries, due_in_seconds=cadence.next_list())
                event_store.purge_tombstones(connection, self._workspace)
        except LeaseLostError as error:
            self.note(error)
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
            if page_token in asked:
                raise ProtocolError("a page token of the calendar list came twice")
            asked.add(page_token)

    def _list_failed(self, lease: ListLease, error: SyncError) -> None:
        self.note(error)
        seconds = self._services.cadence.after(error, failures=lease.consecutive_failures)
        with self._services.router.writer(self._workspace.tenant_id) as connection:
            connections.record_list_failure(connection, lease, error, due_in_seconds=seconds)
        self._stop_connection(lease.connection_id, error, seconds)

    def _calendar(self, lease: CalendarLease) -> None:
        services = self._services
        if lease.connection_id in self._stopped or services.clock() > self._deadline:
            self._defer(lease)
            return
        try:
            CalendarSync(
                api=self._connect(lease.connection_id),
                transaction=lambda: services.router.writer(self._workspace.tenant_id),
                token_fingerprint=self._grants[lease.connection_id].token_fingerprint,
                due_in_seconds=services.cadence.next_poll(),
            ).run(lease, self.tally)
        except LeaseLostError as error:
            self.tally.calendars_deferred += 1
            self.note(error)
        except SyncError as error:
            self._calendar_failed(lease, error)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001  # one calendar's failure never touches another
            self._calendar_failed(lease, _internal(error))
        else:
            self.tally.calendars_synced += 1

    def _calendar_failed(self, lease: CalendarLease, error: SyncError) -> None:
        self.note(error)
        self.tally.calendars_failed += 1
        seconds = self._services.cadence.after(error, failures=lease.consecutive_failures)
        if isinstance(error, GrantRefusedError):
            # The calendar itself is fine; it stays due until the grant is replaced.
            seconds = 0.0
        with self._services.router.writer(self._workspace.tenant_id) as connection:
            leases.record_failure(connection, lease, error, due_in_seconds=seconds)
        self._stop_connection(lease.connection_id, error, seconds)

    def _stop_connection(self, connection_id: UUID, error: SyncError, seconds: float) -> None:
        if not error.stops_connection:
            return
        self._stopped.add(connection_id)
        with self._services.router.writer(self._workspace.tenant_id) as connection:
            if isinstance(error, GrantRefusedError):
                connections.refuse(connection, self._workspace, self._grants[connection_id], error)
            elif isinstance(error, RateLimitedError | QuotaExceededError):
                connections.park(connection, self._workspace, connection_id, seconds=seconds)

    def _defer(self, lease: CalendarLease) -> None:
        self.tally.calendars_deferred += 1
        with self._services.router.writer(self._workspace.tenant_id) as connection:
            leases.give_back(connection, lease)

    def _connect(self, connection_id: UUID) -> GoogleConnection:
        if connection_id not in self._connected:
            grant = self._grants.get(connection_id)
            if grant is None:
                raise AccessDeniedError("the connection was switched off meanwhile")
            try:
                refresh_token = grant.refresh_token(self._services.cipher)
            except UnreadableGrantError as error:
                raise GrantRefusedError(str(error)) from None
            self._connected[connection_id] = self._services.google.connect(
                refresh_token, calls=self.tally.calls, access_token=grant.access_token(self._services.cipher)
            )
        return self._connected[connection_id]


def _internal(error: BaseException) -> InternalError:
    """Reduce an unforeseen error to its type and place: its text may hold rows or addresses."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].name}:{frames[-1].lineno}" if frames else "unknown"
    code = f" {error.sqlstate}" if isinstance(error, psycopg.Error) and error.sqlstate else ""
    return InternalError(f"{type(error).__name__}{code} in {place}")
