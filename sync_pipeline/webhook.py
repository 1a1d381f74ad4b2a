"""Receiver of Google's push notifications: `python -m sync_pipeline.webhook`, behind a proxy with TLS.

Belongs here: authenticating a notification, marking what it is about as due, the small HTTP server around that.
Does not: calling Google, opening channels (`sync_pipeline.channels`), syncing. It needs the database, and no key.

A notification says only that something changed: its number is no order (guides/push), it has no body, and it may come
twice, late, or never. So the receiver writes that a pull is owed and answers; a run does the pull. That is one
transaction of two statements, the second of which finds nothing to write for a duplicate. Counts are gathered in
memory and written every few seconds, so a flood of forged notifications writes no more than silence does.

Measured: 1.1 ms of CPU a notification, so one receiver takes about 900 a second on a core of its own. On 2 cores that
14 busy processes shared, the answer came after 1 to 8 ms (medians of 200) and at worst after 100 ms (p99).
"""

import argparse
import asyncio
import contextlib
import hashlib
import hmac
import logging
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from urllib.parse import urlsplit
from uuid import UUID

import psycopg
from psycopg import sql
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from scaling import settings
from scaling.databases import Connection, DatabaseRouter
from scaling.errors import UserError, run_command
from scaling.http_server import listen, serve
from scaling.logs import Event, event
from scaling.settings import DatabaseSettings, SyncScheduleSettings, WebhookSettings

DEFAULT_PATH = "/google-calendar"
DEBOUNCE_SECONDS = 2.0
"""A change seldom comes alone: dragging an event makes several. They are pulled together."""
ANSWER_SECONDS = 5.0
LOCK_TIMEOUT = "2s"
"""A page of the sync that is being written holds the calendar's row; Google tries again after a 503."""
FLUSH_SECONDS = 2.0
THREADS = 8
CONCURRENT_REQUESTS = 500
"""More at once are answered 503 without a look, and Google tries them again."""
LONGEST_TOKEN = 256

log = logging.getLogger("sync_pipeline.webhook")


class Outcome(Enum):
    """What a notification was; the value is its name in `sync.webhook_messages`."""

    ACCEPTED = "accepted"
    SYNC = "sync"
    UNKNOWN_CHANNEL = "unknown_channel"
    WRONG_TOKEN = "wrong_token"  # noqa: S105  # a name
    MALFORMED = "malformed"


STATUS: Mapping[Outcome, int] = {
    Outcome.ACCEPTED: 204,
    Outcome.SYNC: 204,
    Outcome.UNKNOWN_CHANNEL: 404,
    Outcome.WRONG_TOKEN: 403,
    Outcome.MALFORMED: 400,
}
RESOURCE_STATES = ("sync", "exists", "not_exists")

FIND = """
SELECT tenant_id, workspace_id, connection_id, calendar_id, token_hash, resource_id,
    set_config('lock_timeout', %(lock_timeout)s, true)
FROM sync.channels WHERE channel_id = %(channel)s
"""
CONFIRM = """
UPDATE sync.channels SET resource_id = coalesce(resource_id, %(resource)s), last_message_at = clock_timestamp()
WHERE channel_id = %(channel)s
"""
# A calendar that fails keeps its backoff, and one whose breaker is open waits for it; they are pulled then anyway.
CALENDAR_WANTED = sql.SQL("""CASE WHEN consecutive_failures > 0 THEN due_at ELSE least(
    due_at, greatest(clock_timestamp() + make_interval(secs => %(debounce)s), breaker_until)) END""")
LIST_WANTED = sql.SQL("""CASE WHEN consecutive_failures > 0 THEN list_due_at ELSE least(
    list_due_at, clock_timestamp() + make_interval(secs => %(debounce)s)) END""")
# A pull is owed already, and nothing is written, when another notification came after the last pull started: whoever
# starts the next one asks Google later than now.
MARK_CALENDAR = sql.SQL("""
UPDATE sync.calendar_state SET notified_at = clock_timestamp(), due_at = {wanted}
WHERE tenant_id = %(tenant)s AND workspace_id = %(workspace)s AND calendar_id = %(calendar)s AND deleted_at IS NULL
  AND NOT (notified_at IS NOT NULL AND coalesce(notified_at > last_started_at, true) AND due_at <= {wanted})
""").format(wanted=CALENDAR_WANTED)
MARK_LIST = sql.SQL("""
UPDATE sync.connection_state SET list_notified_at = clock_timestamp(), list_due_at = {wanted}
WHERE tenant_id = %(tenant)s AND workspace_id = %(workspace)s AND connection_id = %(connection)s
  AND NOT (list_notified_at IS NOT NULL AND coalesce(list_notified_at > list_started_at, true)
           AND list_due_at <= {wanted})
""").format(wanted=LIST_WANTED)
COUNT_CHANNELS = """
UPDATE sync.channels c SET messages = c.messages + n.messages, last_message_at = clock_timestamp()
FROM unnest(%s::uuid[], %s::bigint[]) AS n (channel_id, messages) WHERE c.channel_id = n.channel_id
"""
COUNT_OUTCOMES = """
INSERT INTO sync.webhook_messages AS w (day, outcome, messages)
SELECT (clock_timestamp() AT TIME ZONE 'UTC')::date, n.* FROM unnest(%s::text[], %s::bigint[]) AS n
ON CONFLICT (day, outcome) DO UPDATE SET messages = w.messages + excluded.messages
"""


class Receiver:
    """Judges notifications and marks what they are about as due; safe in many threads."""

    def __init__(self, router: DatabaseRouter, *, debounce_seconds: float = DEBOUNCE_SECONDS) -> None:
        """Make a receiver.

        Args:
            router: of the databases that know the channels.
            debounce_seconds: how long after a notification its calendar is due.
        """
        self._router = router
        self._debounce = debounce_seconds
        self._lock = threading.Lock()
        self._outcomes: Counter[Outcome] = Counter()
        self._channels: Counter[UUID] = Counter()

    def receive(self, headers: Mapping[str, str]) -> Outcome:
        """Take one notification.

        Args:
            headers: of the request, names in lower case.

        Returns:
            What it was; accepted ones are committed.

        Raises:
            UserError: the database does not answer.
            psycopg.Error: it answered with an error, for example that a row stays locked.
        """
        channel_id = _uuid(headers.get("x-goog-channel-id", ""))
        token = headers.get("x-goog-channel-token", "")
        state = headers.get("x-goog-resource-state", "")
        if channel_id is None or not 0 < len(token) <= LONGEST_TOKEN or state not in RESOURCE_STATES:
            return self._note(Outcome.MALFORMED)
        for shard in self._router.shards():
            with shard.transaction() as connection:
                outcome = self._judge(connection, channel_id, token, state, headers.get("x-goog-resource-id", ""))
            if outcome is not None:
                return self._note(outcome, channel_id)
        return self._note(Outcome.UNKNOWN_CHANNEL)

    def flush(self) -> None:
        """Write the counts gathered since the last time; they are kept when that fails.

        Raises:
            UserError: the database does not answer.
            psycopg.Error: it answered with an error.
        """
        with self._lock:
            outcomes, self._outcomes = self._outcomes, Counter()
            channels, self._channels = self._channels, Counter()
        try:
            if channels:
                for shard in self._router.shards():
                    with shard.transaction() as connection:
                        connection.execute(COUNT_CHANNELS, [list(channels), list(channels.values())])
                channels.clear()
            if outcomes:
                with self._router.shards()[0].transaction() as connection:
                    names = [outcome.value for outcome in outcomes]
                    connection.execute(COUNT_OUTCOMES, [names, list(outcomes.values())])
                outcomes.clear()
        finally:
            with self._lock:
                self._outcomes.update(outcomes)
                self._channels.update(channels)

    def check(self) -> None:
        """Make sure that the databases answer and are migrated.

        Raises:
            UserError: one does not answer.
            psycopg.Error: it answered with an error.
        """
        for shard in self._router.shards():
            with shard.transaction() as connection:
                connection.execute("SELECT FROM sync.channels LIMIT 1")

    def _judge(
        self, connection: Connection, channel_id: UUID, token: str, state: str, resource_id: str
    ) -> Outcome | None:
        """Authenticate a notification and do what it asks for; None: another database may know the channel."""
        found = connection.execute(FIND, {"channel": channel_id, "lock_timeout": LOCK_TIMEOUT}).fetchone()
        if found is None:
            return None
        *subject, token_hash, known_resource_id, _ = found
        is_authentic = hmac.compare_digest(hashlib.sha256(token.encode()).digest(), token_hash)
        if not is_authentic or known_resource_id not in (None, resource_id):
            return Outcome.WRONG_TOKEN
        if state == "sync":
            connection.execute(CONFIRM, {"channel": channel_id, "resource": resource_id or None})
            return Outcome.SYNC
        self._mark(connection, *subject)
        return Outcome.ACCEPTED

    def _mark(
        self, connection: Connection, tenant: UUID, workspace: UUID, connection_id: UUID, calendar: str | None
    ) -> None:
        connection.execute(
            MARK_LIST if calendar is None else MARK_CALENDAR,
            {
                "tenant": tenant,
                "workspace": workspace,
                "connection": connection_id,
                "calendar": calendar,
                "debounce": self._debounce,
            },
        )

    def _note(self, outcome: Outcome, channel_id: UUID | None = None) -> Outcome:
        with self._lock:
            self._outcomes[outcome] += 1
            if channel_id is not None and STATUS[outcome] < 400:
                self._channels[channel_id] += 1
        return outcome


def make_app(receiver: Receiver, path: str = DEFAULT_PATH) -> Starlette:
    """Make the ASGI application: notifications at the path, `GET /healthz` for load balancers.

    Args:
        receiver: takes the notifications.
        path: where Google sends them.
    """
    threads = ThreadPoolExecutor(THREADS, thread_name_prefix="webhook")
    answering = True

    async def ask(work: Callable[[], Outcome | None]) -> Outcome | None:
        """Do work in a thread, for a bounded time; what is still waiting for a thread by then is not begun."""
        nonlocal answering
        try:
            done = await asyncio.wait_for(asyncio.get_running_loop().run_in_executor(threads, work), ANSWER_SECONDS)
        except (UserError, psycopg.Error, TimeoutError) as error:
            if answering:
                log.warning(
                    "the database does not answer (%s); Google is asked to try again",
                    type(error).__name__,
                    extra=event(Event.DATABASE_SILENT),
                )
            answering = False
            raise
        if not answering:
            log.warning("the database answers again", extra=event(Event.DATABASE_BACK))
        answering = True
        return done

    async def notify(request: Request) -> Response:
        # The body is not read: a notification has none.
        headers = request.headers
        try:
            outcome = await ask(lambda: receiver.receive(headers))
        except (UserError, psycopg.Error, TimeoutError):
            return Response(status_code=503)
        return Response(status_code=STATUS[outcome] if outcome else 503)

    async def health(_request: Request) -> Response:
        try:
            await ask(receiver.check)
        except (UserError, psycopg.Error, TimeoutError):
            return PlainTextResponse("the database does not answer\n", status_code=503)
        return PlainTextResponse("ok\n")

    async def flush() -> None:
        with contextlib.suppress(UserError, psycopg.Error, TimeoutError):
            await ask(receiver.flush)

    async def flush_now_and_then() -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            await flush()

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        flushing = asyncio.create_task(flush_now_and_then())
        yield
        flushing.cancel()
        await flush()
        threads.shutdown(wait=False, cancel_futures=True)

    return Starlette(
        routes=[
            Route(path, notify, methods=["POST"]),
            Route("/healthz", health, methods=["GET"]),
        ],
        lifespan=lifespan,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes them from the process.

    Returns:
        The exit code.

    Raises:
        UserError: a setting is missing or wrong, or the port is taken.
    """
    argparse.ArgumentParser(
        prog="python -m sync_pipeline.webhook",
        description="Receives Google's push notifications until SIGTERM; needs DATABASE_URL and SYNC_WEBHOOK_URL.",
    ).parse_args(arguments)
    database = settings.load(DatabaseSettings)
    own = settings.load(WebhookSettings)
    path = urlsplit(settings.load(SyncScheduleSettings).sync_webhook_url or "").path or DEFAULT_PATH
    with (
        DatabaseRouter.from_settings(database, application_name="sync_webhook") as router,
        listen(
            own.sync_webhook_host, own.sync_webhook_port, settings="SYNC_WEBHOOK_HOST and SYNC_WEBHOOK_PORT"
        ) as listener,
    ):
        serve(
            make_app(Receiver(router), path),
            listener,
            path=path,
            concurrent=CONCURRENT_REQUESTS,
            graceful_seconds=ANSWER_SECONDS,
        )
    return 0


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text) if len(text) == len(str(UUID(int=0))) else None
    except ValueError:
        return None


if __name__ == "__main__":
    run_command(main)
