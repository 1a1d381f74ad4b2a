"""Sync of one calendar: which pages are asked for, what a 410 leads to, when it is done.

Belongs here: the protocol of guides/sync over `CalendarApi` and the event store.
Does not: HTTP, SQL, or what a failure means for the next run.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass

from scaling.databases import Connection
from sync_pipeline import event_store, leases
from sync_pipeline.errors import PageTokenRefusedError, ProtocolError, SyncTokenGoneError
from sync_pipeline.event_store import Changes
from sync_pipeline.events import read_items
from sync_pipeline.google_calendar import CalendarApi
from sync_pipeline.leases import CalendarLease
from sync_pipeline.tally import Tally

ATTEMPTS = 3
"""Starts of one listing within one sync; a calendar that loses its pages more often waits for the next run."""

EMPTY_PAGES = 50
"""Empty pages in a row within one listing; Google documents that they happen, not how many."""

Transaction = Callable[[], AbstractContextManager[Connection]]


@dataclass(frozen=True, slots=True)
class NextVisit:
    """What is stored about a calendar's cadence when it has been synced."""

    change_count: float
    observed_days: float
    due_in_seconds: float


@dataclass(frozen=True, slots=True)
class CalendarSync:
    """Syncs calendars read through one connection; every page is one transaction, the last one carries the token."""

    api: CalendarApi
    transaction: Transaction
    token_fingerprint: bytes
    next_visit: Callable[[bool], NextVisit]
    """Told whether anything changed."""
    also: Callable[[Connection], None]
    """Done in the transaction of the last page, so that it costs none of its own."""
    incremental: bool = True
    """False: reads everything whatever token is stored; the new token is stored all the same, for when it is True."""

    def run(self, lease: CalendarLease, tally: Tally) -> None:
        """Bring one calendar up to date.

        Args:
            lease: the right to do so.
            tally: counts what is done, and what was done before a failure.

        Raises:
            SyncError: the calendar is as readers saw it before, or some pages newer; the stored token still covers
                everything after it.
        """
        if not self.incremental or lease.sync_token is None or lease.token_fingerprint != self.token_fingerprint:
            self._full(lease, tally, token_is_gone=False)
            return
        try:
            self._incremental(lease, tally, lease.sync_token)
        except SyncTokenGoneError:
            self._full(lease, tally, token_is_gone=True)

    def _incremental(self, lease: CalendarLease, tally: Tally, sync_token: str) -> None:
        for _ in range(ATTEMPTS):
            # An expired page token: from the stored sync token again; pages seen already change nothing.
            with suppress(PageTokenRefusedError):
                self._pull(lease, tally, sync_token=sync_token, generation=lease.live_generation)
                tally.incremental_syncs += 1
                return
        raise ProtocolError("Google refuses its own page tokens")

    def _full(self, lease: CalendarLease, tally: Tally, *, token_is_gone: bool) -> None:
        for attempt in range(ATTEMPTS):
            with self.transaction() as connection:
                generation = event_store.begin_generation(
                    connection, lease, token_is_gone=token_is_gone and attempt == 0, token_is_used=self.incremental
                )
            with suppress(PageTokenRefusedError, SyncTokenGoneError):
                self._pull(lease, tally, sync_token=None, generation=generation)
                tally.full_syncs += 1
                return
        raise ProtocolError("Google does not let a full listing finish")

    def _pull(self, lease: CalendarLease, tally: Tally, *, sync_token: str | None, generation: int) -> None:
        unseen = Changes()
        page_token: str | None = None
        asked: set[str] = set()
        wrote = False
        empty = 0
        while True:
            page = self.api.list_events(lease.calendar_id, sync_token=sync_token, page_token=page_token)
            batch = read_items(page.items)
            tally.pages += 1
            tally.events_seen += batch.seen
            wrote = wrote or batch.seen > 0
            page_token = page.next_page_token  # with both tokens given, the listing is not over
            if page_token is None and page.next_sync_token is None:
                raise ProtocolError("the last page has no sync token")
            if page_token in asked:
                raise ProtocolError("a page token came twice")
            empty = 0 if page.items else empty + 1
            if empty > EMPTY_PAGES:
                raise ProtocolError("the listing goes on without any event")
            visit = self.next_visit(wrote) if page_token is None and self.incremental else None
            with self.transaction() as connection:
                if batch.seen or page_token is not None:  # completing proves the lease as well
                    leases.hold(connection, lease)
                    unseen += event_store.write_page(connection, lease, generation=generation, batch=batch)
                if page_token is None and page.next_sync_token is not None:
                    if visit is None:
                        # A complete listing names what did not change, too. What it lacks is known only afterwards.
                        visit = self.next_visit(bool(unseen.upserted or unseen.deleted))
                    unseen += event_store.complete(
                        connection,
                        lease,
                        generation=generation,
                        sync_token=page.next_sync_token,
                        token_fingerprint=self.token_fingerprint,
                        wrote=wrote,
                        change_count=visit.change_count,
                        observed_days=visit.observed_days,
                        due_in_seconds=visit.due_in_seconds,
                    )
                    self.also(connection)
            if sync_token is not None or page_token is None:  # readers see it now
                tally.add(unseen)
                unseen = Changes()
            if page_token is None:
                return
            asked.add(page_token)
