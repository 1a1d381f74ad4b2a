"""Push channels and schedules: cases 76 to 86 of docs/sync-cases.md, and what else may happen to a channel.

The receiver is the real one, on uvicorn; the notifications are the simulator's, or hand-made where it sends no such
thing.
"""

import os
import secrets
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest

from devstack.google_calendar import Simulator
from devstack.processes import CHECKOUT, free_port, wait_until
from devstack.servers import Database
from scaling.databases import Connection, DatabaseRouter, Shard
from scaling.http_server import Server, listen
from sync_pipeline import leases, tick, webhook
from sync_pipeline.cadence import Cadence
from sync_pipeline.channels import ChannelKeeper
from sync_pipeline.errors import AccessTokenRefusedError, QuotaExceededError, RateLimitedError, SyncError
from sync_pipeline.google_calendar import CallCounter, ChannelRequest, GoogleConnection
from sync_pipeline.leases import CalendarLease, ListLease
from sync_pipeline.services import Services
from sync_pipeline.tick import TickResult
from sync_pipeline.webhook import Outcome, Receiver
from sync_pipeline.workspaces import Workspace
from tests.sync_pipeline import virtual_clock
from tests.sync_pipeline.conftest import Saas, differences
from tests.sync_pipeline.scenes import connected, end_leases, insert, meeting

DAY = 86400.0
Tick = Callable[[], TickResult]


@dataclass
class Hook:
    """A running receiver."""

    url: str
    receiver: Receiver
    saas: Saas

    def post(self, **headers: str) -> int:
        """Send a notification: `post(channel_id=…, channel_token=…, resource_state=…)`; its status."""
        named = {f"X-Goog-{name.replace('_', '-').title()}": value for name, value in headers.items()}
        return httpx.post(self.url, headers=httpx.Headers(named, encoding="latin-1")).status_code

    def counts(self) -> dict[str, int]:
        self.receiver.flush()
        rows = self.saas.execute("SELECT outcome, sum(messages)::bigint FROM sync.webhook_messages GROUP BY 1")
        return {str(outcome): int(str(messages)) for outcome, messages in rows}


@contextmanager
def receiving(dsn: str, saas: Saas, *, debounce_seconds: float = webhook.DEBOUNCE_SECONDS) -> Iterator[Hook]:
    with DatabaseRouter(Shard("main", dsn)) as router, listen("127.0.0.1", 0, settings="the test") as listener:
        receiver = Receiver(router, debounce_seconds=debounce_seconds)
        listening = threading.Event()
        server = Server(
            webhook.make_app(receiver),
            concurrent=webhook.CONCURRENT_REQUESTS,
            graceful_seconds=webhook.ANSWER_SECONDS,
            started=listening.set,
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        assert listening.wait(10)
        try:
            yield Hook(f"http://127.0.0.1:{listener.getsockname()[1]}{webhook.DEFAULT_PATH}", receiver, saas)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def hook(database: Database, saas: Saas) -> Iterator[Hook]:
    with receiving(database.dsn, saas) as running:
        yield running


@dataclass
class Scene:
    """A workspace whose one calendar is synced, its connection to Google, and a keeper of channels."""

    google: Simulator
    saas: Saas
    services: Services
    keeper: ChannelKeeper
    api: GoogleConnection
    workspace: Workspace
    connection_id: UUID
    calendar: str
    calls: CallCounter = field(default_factory=Counter)

    def transaction(self) -> AbstractContextManager[Connection]:
        return self.services.router.writer(self.workspace.tenant_id)

    def lease(self) -> CalendarLease:
        """Take the calendar, as a run does; whoever had it loses it."""
        self.saas.execute(
            "UPDATE sync.calendar_state SET due_at = 'epoch', lease_until = NULL, last_started_at = NULL "
            "WHERE calendar_id = %s",
            self.calendar,
        )
        return self._take().calendars[0]

    def list_lease(self) -> ListLease:
        self.saas.execute(
            "UPDATE sync.connection_state SET list_due_at = 'epoch', lease_until = NULL, list_started_at = NULL"
        )
        return self._take().lists[0]

    def _take(self) -> leases.Claim:
        with self.transaction() as connection:
            row = connection.execute("SELECT clock_timestamp()").fetchone()
            assert row is not None
            (claim,) = leases.take(connection, [self.workspace], owner="test", since=row[0], push=self.keeper.terms)
        return claim

    def keep(self, api: Any = None, keeper: ChannelKeeper | None = None) -> bool:
        """Visit the calendar and leave it settled: pulled, not due for a day."""
        opened = (keeper or self.keeper).keep_calendar(api or self.api, self.transaction, self.lease())
        self.google.settle_pushes()
        return opened

    def keep_list(self, keeper: ChannelKeeper | None = None) -> bool:
        opened = (keeper or self.keeper).keep_list(self.api, self.transaction, self.list_lease())
        self.google.settle_pushes()
        return opened

    def settle(self) -> None:
        """Leave the calendar as after a pull: nothing owed, the next visit in a day."""
        self.google.settle_pushes()
        for table, prefix, started in (
            ("calendar_state", "", "last_started_at"),
            ("connection_state", "list_", "list_started_at"),
        ):
            self.saas.execute(
                f"UPDATE sync.{table} SET {started} = clock_timestamp(), lease_until = NULL, lease_owner = NULL, "
                f"{prefix}due_at = now() + interval '1 day'"
            )

    def seconds_until_due(self) -> float:
        (seconds,) = self.saas.calendar(self.calendar, "extract(epoch FROM due_at - clock_timestamp())::float8")
        return float(str(seconds))

    def is_owed(self) -> bool:
        """A notification came after the last pull started, and the next pull is due within seconds."""
        (owed,) = self.saas.calendar(
            self.calendar,
            "coalesce(notified_at > last_started_at, false) AND due_at <= clock_timestamp() + interval '3 seconds'",
        )
        return bool(owed)

    def rows(self) -> list[tuple[object, ...]]:
        return self.saas.execute("SELECT channel_id::text, state FROM sync.channels ORDER BY created_at")

    def states(self) -> list[str]:
        return [str(state) for _, state in self.rows()]

    def open_at_google(self) -> set[str]:
        return {str(channel["id"]) for channel in self.google.channels()}

    def age(self, seconds: float) -> None:
        """Let that much of every channel's life pass, for us."""
        self.saas.execute(
            "UPDATE sync.channels SET created_at = created_at - make_interval(secs => %s::float8), "
            "expires_at = expires_at - make_interval(secs => %s::float8)",
            seconds,
            seconds,
        )

    def change(self) -> None:
        insert(self.google, self.calendar, meeting())
        self.google.settle_pushes()


def make_keeper(address: str | None) -> ChannelKeeper:
    return ChannelKeeper(address, new_token=lambda: secrets.token_urlsafe(32), random_bytes=secrets.token_bytes)


@pytest.fixture
def scene(google: Simulator, saas: Saas, services: Services, hook: Hook) -> Scene:
    user = google.add_user("ann@example.com")
    workspace = saas.workspace()
    connection = saas.connect(workspace, user)
    assert tick.run_tick(replace(services, keeper=None), run_id="baseline").failed == ()
    calls: CallCounter = Counter()
    api = services.google.connect(user.refresh_token, calls=calls)
    made = Scene(google, saas, services, make_keeper(hook.url), api, workspace, connection, user.calendars[0], calls)
    made.settle()
    return made


@pytest.fixture
def channel(scene: Scene) -> dict[str, str]:
    """A channel in force, and the headers of its notifications."""
    tokens: list[str] = []
    keeper = replace(scene.keeper, new_token=lambda: tokens.append(secrets.token_urlsafe(32)) or tokens[-1])  # type: ignore[func-returns-value]
    assert scene.keep(keeper=keeper)
    scene.settle()
    ((identifier, resource),) = scene.saas.execute("SELECT channel_id::text, resource_id FROM sync.channels")
    return {
        "channel_id": str(identifier),
        "channel_token": tokens[-1],
        "resource_id": str(resource),
        "resource_state": "exists",
        "message_number": "7",
    }


# 76 to 80: the receiver


def test_a_sync_message_is_answered_204_and_owes_no_pull(scene: Scene, hook: Hook, channel: dict[str, str]) -> None:
    assert hook.post(**{**channel, "resource_state": "sync", "message_number": "1"}) == 204

    assert not scene.is_owed()
    assert scene.seconds_until_due() > DAY / 2
    assert hook.counts() == {"sync": 2}, "Google's own and this one"


def test_a_notification_that_comes_fifty_times_within_a_second_owes_one_pull_and_is_written_once(
    scene: Scene, hook: Hook, channel: dict[str, str]
) -> None:
    assert hook.post(**channel) == 204
    written = scene.saas.calendar(scene.calendar, "xmin::text, notified_at, due_at")

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(lambda _: hook.post(**channel), range(50))) == {204}

    assert scene.is_owed()
    assert scene.saas.calendar(scene.calendar, "xmin::text, notified_at, due_at") == written
    assert hook.counts() == {"sync": 1, "accepted": 51}


def test_message_numbers_out_of_order_are_no_order_and_owe_one_pull(
    scene: Scene, hook: Hook, channel: dict[str, str]
) -> None:
    numbers = ("900", "3", "3", "17", "-1", "soon")

    assert [hook.post(**{**channel, "message_number": number}) for number in numbers] == [204] * len(numbers)

    assert scene.is_owed()
    assert hook.counts() == {"sync": 1, "accepted": len(numbers)}


def test_unknown_channels_wrong_tokens_and_nonsense_owe_no_pull_and_are_counted(
    scene: Scene, hook: Hook, channel: dict[str, str]
) -> None:
    before = scene.saas.calendar(scene.calendar, "xmin::text")

    assert hook.post(**{**channel, "channel_id": str(uuid4())}) == 404
    assert hook.post(**{**channel, "channel_token": "guessed"}) == 403
    assert hook.post(**{**channel, "channel_token": channel["channel_token"] + "x"}) == 403
    assert hook.post(**{**channel, "resource_id": "another"}) == 403
    for nonsense in (
        {"channel_id": "1; DROP TABLE sync.channels"},
        {"channel_id": "\u00b9" * 36},
        {"channel_id": ""},
        {"channel_token": ""},
        {"channel_token": "x" * 257},
        {"resource_state": "gone fishing"},
    ):
        assert hook.post(**{**channel, **nonsense}) == 400
    assert hook.post() == 400
    assert httpx.get(hook.url).status_code == 405

    assert scene.saas.calendar(scene.calendar, "xmin::text") == before
    assert hook.counts() == {"sync": 1, "unknown_channel": 1, "wrong_token": 3, "malformed": 7}


# What else the receiver promises


def test_a_later_notification_never_postpones_the_pull(scene: Scene, hook: Hook, channel: dict[str, str]) -> None:
    hook.post(**channel)
    (first,) = scene.saas.calendar(scene.calendar, "due_at")
    scene.saas.execute("UPDATE sync.calendar_state SET due_at = due_at - interval '1 hour', last_started_at = now()")

    hook.post(**channel)

    assert first is not None
    assert scene.seconds_until_due() < -3000


def test_a_notification_during_a_pull_is_written_down_although_the_calendar_is_still_due(
    scene: Scene, hook: Hook, channel: dict[str, str]
) -> None:
    hook.post(**channel)
    lease = scene.lease()
    assert scene.saas.calendar(scene.calendar, "last_started_at > notified_at") == (True,)

    hook.post(**channel)

    assert scene.saas.calendar(scene.calendar, "last_started_at < notified_at, lease_epoch") == (True, lease.epoch)


def test_a_failing_calendar_keeps_its_backoff_and_one_with_an_open_breaker_waits_for_it(
    scene: Scene, hook: Hook, channel: dict[str, str]
) -> None:
    scene.saas.execute("UPDATE sync.calendar_state SET consecutive_failures = 2")
    assert hook.post(**channel) == 204
    assert scene.seconds_until_due() > DAY / 2

    scene.saas.execute(
        "UPDATE sync.calendar_state SET consecutive_failures = 0, breaker_until = now() + interval '1 hour'"
    )
    assert hook.post(**channel) == 204
    assert 3000 < scene.seconds_until_due() < 4000


def test_a_notification_for_a_retired_calendar_changes_nothing(
    scene: Scene, hook: Hook, channel: dict[str, str]
) -> None:
    scene.saas.execute("UPDATE sync.calendar_state SET deleted_at = now()")
    before = scene.saas.calendar(scene.calendar, "xmin::text")

    assert hook.post(**channel) == 204

    assert scene.saas.calendar(scene.calendar, "xmin::text") == before


def test_a_notification_of_the_list_makes_the_list_due_once(scene: Scene, hook: Hook) -> None:
    scene.keep_list()
    scene.settle()
    columns = "list_notified_at > list_started_at, list_due_at < now() + interval '1 minute', xmin::text"
    assert scene.saas.one(f"SELECT {columns} FROM sync.connection_state")[:2] == (None, False)

    scene.google.add_calendar("ann@example.com", "New")
    scene.google.settle_pushes()
    first = scene.saas.one(f"SELECT {columns} FROM sync.connection_state")
    scene.google.add_calendar("ann@example.com", "Newer")
    scene.google.settle_pushes()

    assert first[:2] == (True, True)
    assert scene.saas.one(f"SELECT {columns} FROM sync.connection_state") == first
    assert scene.seconds_until_due() > DAY / 2, "the calendars have not changed"
    assert hook.counts() == {"sync": 1, "accepted": 2}


def test_a_calendar_whose_row_is_locked_is_answered_503_and_marked_when_google_tries_again(
    scene: Scene, hook: Hook, channel: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "LOCK_TIMEOUT", "20ms")
    receive, failed = hook.receiver.receive, threading.Event()

    def failing(headers: Mapping[str, str]) -> Outcome:
        try:
            return receive(headers)
        except psycopg.errors.LockNotAvailable:
            failed.set()
            raise

    with psycopg.connect(scene.saas.dsn) as holder:
        holder.execute("UPDATE sync.calendar_state SET summary = summary")
        assert hook.post(**channel) == 503
        monkeypatch.setattr(hook.receiver, "receive", failing)
        insert(scene.google, scene.calendar, meeting())
        assert failed.wait(5), "Google's first try"
    scene.google.settle_pushes()

    assert scene.is_owed()
    assert hook.counts() == {"sync": 1, "accepted": 1}


def test_a_database_that_is_away_is_answered_503_and_healthz_says_so(
    scene: Scene, channel: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "ANSWER_SECONDS", 0.2)
    away = f"postgresql://pipeline:secret@127.0.0.1:{free_port()}/saas"
    with receiving(away, scene.saas) as broken:
        assert broken.post(**channel) == 503
        assert broken.post(channel_id="nonsense") == 400, "needs no database"
        assert httpx.get(broken.url.replace(webhook.DEFAULT_PATH, "/healthz")).status_code == 503


def test_a_running_receiver_is_healthy(hook: Hook) -> None:
    answer = httpx.get(hook.url.replace(webhook.DEFAULT_PATH, "/healthz"))
    assert (answer.status_code, answer.text) == (200, "ok\n")


def test_the_rights_of_the_role_pipeline_webhook_are_enough(
    scene: Scene, database: Database, channel: dict[str, str]
) -> None:
    limited = f"{database.admin_dsn}{'&' if '?' in database.admin_dsn else '?'}options=-c%20role%3Dpipeline_webhook"
    with psycopg.connect(limited) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute("SELECT FROM sync.event_rows")
    scene.keep_list()
    scene.settle()
    with receiving(limited, scene.saas) as hook:
        assert httpx.get(hook.url.replace(webhook.DEFAULT_PATH, "/healthz")).status_code == 200
        assert hook.post(**channel) == 204
        assert hook.post(**{**channel, "resource_state": "sync"}) == 204
        scene.saas.execute("UPDATE sync.channels SET calendar_id = NULL")
        assert hook.post(**channel) == 204
        hook.receiver.flush()
    assert scene.is_owed()
    assert scene.saas.one("SELECT list_notified_at IS NOT NULL FROM sync.connection_state") == (True,)


def test_a_body_is_not_read(scene: Scene, hook: Hook, channel: dict[str, str]) -> None:
    headers = {f"X-Goog-{name.replace('_', '-').title()}": value for name, value in channel.items()}

    def endless() -> Iterator[bytes]:
        for _ in range(10_000):
            yield b"x" * 65536

    with suppress(httpx.TransportError):  # the connection is closed on what nobody reads
        assert httpx.post(hook.url, headers=headers, content=endless()).status_code == 204
    assert scene.is_owed()


@contextmanager
def receiver_process(database: Database, **environment: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """`python -m sync_pipeline.webhook`, and where it says that it listens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sync_pipeline.webhook"],
        cwd=CHECKOUT,
        env={"PATH": os.environ["PATH"], "DATABASE_URL": database.dsn, "SYNC_WEBHOOK_PORT": "0", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening at http://127.0.0.1:"), line
        yield process, line.removeprefix("listening at ").strip()
    finally:
        process.kill()
        process.communicate()


def test_the_receiver_needs_only_the_database_takes_its_path_from_the_address_and_ends_on_sigterm(
    scene: Scene, database: Database, hook: Hook, channel: dict[str, str]
) -> None:
    with receiver_process(database, SYNC_WEBHOOK_URL="https://hooks.example.com/a/b") as (process, url):
        assert url.endswith("/a/b")
        assert replace(hook, url=url).post(**channel) == 204
        assert replace(hook, url=url.replace("/a/b", webhook.DEFAULT_PATH)).post(**channel) == 404
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=10)
        assert (process.returncode, output, errors) == (0, "", "")
    assert scene.is_owed()
    assert hook.counts()["accepted"] == 1, "counts are written at the end"


def test_a_receiver_killed_while_it_takes_a_notification_leaves_nothing_half_done_and_the_next_one_takes_it(
    scene: Scene, database: Database, hook: Hook, channel: dict[str, str]
) -> None:
    before = scene.saas.calendar(scene.calendar, "xmin::text")
    with receiver_process(database) as (process, url), psycopg.connect(scene.saas.dsn) as holder:
        holder.execute("UPDATE sync.calendar_state SET summary = summary")
        with ThreadPoolExecutor(1) as threads:
            answer = threads.submit(replace(hook, url=url).post, **channel)
            waiting = (
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            wait_until(lambda: scene.saas.one(waiting) == (1,), timeout_seconds=5, what="the receiver waits")
            process.kill()
            assert isinstance(answer.exception(10), httpx.TransportError)
        holder.rollback()
    assert scene.saas.calendar(scene.calendar, "notified_at, xmin::text") == (None, *before)

    assert hook.post(**channel) == 204
    assert scene.is_owed()


def test_neither_secrets_nor_calendars_are_in_what_is_logged_or_stored_about_a_channel(
    scene: Scene, hook: Hook, channel: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    hook.post(**channel)
    hook.post(**{**channel, "channel_token": "guessed"})

    stored = scene.saas.execute("SELECT c::text FROM sync.channels c") + scene.saas.execute(
        "SELECT m::text FROM sync.webhook_messages m"
    )
    assert channel["channel_token"] not in str(stored)
    assert channel["channel_token"] not in caplog.text
    assert scene.calendar not in caplog.text
    assert "token" not in repr(ChannelRequest(uuid4(), channel["channel_token"], hook.url, 60.0))


# 82 and 83: opening, renewing, stopping


class Dies(BaseException):
    """Stands for the end of the process: nobody handles it."""


@dataclass
class Api:
    """Google, with something happening before or after a call."""

    google: GoogleConnection
    before: dict[str, Callable[[], None]] = field(default_factory=dict)
    after: dict[str, Callable[[], None]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.google, name)

        def call(*arguments: object) -> object:
            self.calls.append(name)
            self.before.get(name, lambda: None)()
            result = method(*arguments)
            self.after.get(name, lambda: None)()
            return result

        return call


def die() -> None:
    raise Dies


def assert_no_gap(scene: Scene) -> None:
    """Whatever we take for open is open at Google and tells us of changes, or a pull is owed all the same."""
    believed = {str(channel) for channel, state in scene.rows() if state == "open"}
    assert believed <= scene.open_at_google()


def test_a_new_channel_is_noted_before_google_is_asked_and_owes_a_pull_once(scene: Scene) -> None:
    seen: list[list[str]] = []
    api = Api(scene.api, before={"watch_events": lambda: seen.append(scene.states())})
    lease = scene.lease()
    scene.settle()

    assert scene.keeper.keep_calendar(api, scene.transaction, lease) is True
    scene.google.settle_pushes()

    assert seen == [["opening"]]
    ((channel, state, resource, confirmed, life),) = scene.saas.execute(
        "SELECT channel_id::text, state, resource_id IS NOT NULL, last_message_at IS NOT NULL, "
        "extract(epoch FROM expires_at - created_at)::float8 FROM sync.channels"
    )
    assert (state, resource, confirmed) == ("open", True, True)
    assert abs(float(str(life)) - 7 * DAY) < 60
    assert scene.open_at_google() == {channel}
    assert scene.seconds_until_due() <= 0
    scene.settle()
    assert scene.keep() is False, "it is in force"
    assert scene.calls["events.watch", "200"] == 1


def test_a_channel_is_renewed_with_overlap_the_new_one_before_the_old_one_stops(scene: Scene, hook: Hook) -> None:
    scene.keep()
    ((old, _),) = scene.rows()
    scene.age(5.1 * DAY)
    scene.settle()
    open_at_stop: list[set[str]] = []
    api = Api(scene.api, before={"stop_channel": lambda: open_at_stop.append(scene.open_at_google())})
    changed = Api(api, after={"watch_events": scene.change})  # type: ignore[arg-type]

    assert scene.keep(changed) is False, "one was in force all the while"

    ((new, state),) = scene.rows()
    assert state == "open"
    assert open_at_stop == [{old, new}]
    assert scene.open_at_google() == {new}
    assert api.calls == ["watch_events", "stop_channel"]
    assert hook.counts()["accepted"] == 2, "both told of the change meanwhile"


def test_a_channel_with_hardly_any_time_left_is_no_overlap(scene: Scene) -> None:
    scene.keep()
    scene.age(7 * DAY - 600)
    scene.settle()

    assert scene.keep() is True, "it may have ended by Google's clock"
    assert scene.states() == ["open"]


def test_a_channel_of_a_short_life_is_renewed_after_half_of_it_not_at_every_visit(scene: Scene) -> None:
    short = replace(scene.keeper, ttl_seconds=DAY)
    scene.keep(keeper=short)
    scene.age(0.4 * DAY)
    scene.keep(keeper=short)
    assert scene.calls["events.watch", "200"] == 1

    scene.age(0.2 * DAY)
    scene.keep(keeper=short)
    assert scene.calls["events.watch", "200"] == 2


CRASHES = {
    "before Google is asked": Api(None, before={"watch_events": die}),  # type: ignore[arg-type]
    "after Google answered": Api(None, after={"watch_events": die}),  # type: ignore[arg-type]
    "before the old one stops": Api(None, before={"stop_channel": die}),  # type: ignore[arg-type]
    "after the old one stopped": Api(None, after={"stop_channel": die}),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "sync message lost"])
@pytest.mark.parametrize(
    ("moment", "renewing"),
    [
        ("before Google is asked", False),
        ("after Google answered", False),
        ("before Google is asked", True),
        ("after Google answered", True),
        ("before the old one stops", True),
        ("after the old one stopped", True),
    ],
)
def test_a_crash_leaves_at_most_one_channel_too_many_and_no_gap(
    scene: Scene, moment: str, renewing: bool, announced: bool
) -> None:
    if renewing:
        scene.keep()
        scene.age(5.1 * DAY)
        scene.settle()
    if not announced:
        scene.google.add_fault("drop", method="push")
    with pytest.raises(Dies):
        scene.keep(replace(CRASHES[moment], google=scene.api))
    scene.google.settle_pushes()
    scene.google.clear_faults()

    assert_no_gap(scene)
    assert len(scene.open_at_google()) <= 2
    assert ("open" in scene.states()) == renewing, "the old one or the new one"

    scene.age(601)
    assert scene.keep() is (not renewing), "who finds none in force pulls"
    scene.keep_list()
    assert_no_gap(scene)
    assert [state for _, state in scene.rows()].count("open") == 2, "the calendar's and the list's"
    assert len(scene.open_at_google()) == 2, "what was left over is stopped"


def test_a_young_channel_being_opened_elsewhere_is_left_alone(scene: Scene) -> None:
    with pytest.raises(Dies):
        scene.keep(Api(scene.api, after={"watch_events": die}))

    assert scene.keep() is False
    assert scene.calls["events.watch", "200"] == 1


@pytest.mark.parametrize("stopped", [True, False], ids=["stopped by them", "their stop failed"])
def test_a_keeper_that_was_paused_until_others_took_its_channel_for_abandoned_stops_it(
    scene: Scene, stopped: bool
) -> None:
    theirs: list[str] = []

    def others_work() -> None:
        scene.age(601)
        if not stopped:
            scene.google.add_fault("error", status=503, method="channels.stop")
        assert scene.keep() is True
        scene.google.clear_faults()
        theirs.extend(str(channel) for channel, state in scene.rows() if state == "open")

    lease = scene.lease()
    paused = Api(scene.api, after={"watch_events": others_work})
    assert scene.keeper.keep_calendar(paused, scene.transaction, lease) is False

    assert scene.rows() == [(theirs[0], "open")]
    assert scene.open_at_google() == set(theirs)


def test_a_channel_whose_answer_was_lost_is_stopped_by_what_its_sync_message_named(scene: Scene) -> None:
    with pytest.raises(Dies):
        scene.keep(Api(scene.api, after={"watch_events": die}))
    scene.google.settle_pushes()
    scene.saas.execute("UPDATE sync.calendar_state SET deleted_at = now()")
    scene.age(601)

    scene.keep_list()

    assert len(scene.rows()) == len(scene.open_at_google()) == 1, "the list's own"


def test_a_keeper_whose_lease_moved_on_before_it_asked_opens_nothing(scene: Scene) -> None:
    stale = scene.lease()
    scene.lease()

    assert scene.keeper.keep_calendar(scene.api, scene.transaction, stale) is False
    assert scene.rows() == []
    assert scene.calls["events.watch", "200"] == 0


def test_whoever_took_the_calendar_while_google_was_asked_has_to_pull_once_more(scene: Scene) -> None:
    lease = scene.lease()

    def another_takes_it() -> None:
        scene.lease()

    overtaken = Api(scene.api, after={"watch_events": another_takes_it})

    assert scene.keeper.keep_calendar(overtaken, scene.transaction, lease) is True

    assert scene.states() == ["open"]
    assert scene.saas.calendar(scene.calendar, "notified_at > last_started_at") == (True,)


@pytest.mark.parametrize("same_lease", [True, False], ids=["one lease twice", "a lease and its successor"])
def test_two_keepers_at_once_open_one_channel(scene: Scene, same_lease: bool) -> None:
    lease = scene.lease()
    others: list[Future[bool]] = []
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"

    def keep_too() -> bool:
        api = scene.services.google.connect(scene.google.users[0].refresh_token, calls=Counter())
        return scene.keeper.keep_calendar(api, scene.transaction, lease if same_lease else scene.lease())

    with ThreadPoolExecutor(1) as threads:

        @contextmanager
        def met_before_commit() -> Iterator[Connection]:
            with scene.transaction() as connection:
                yield connection
                if not others:
                    others.append(threads.submit(keep_too))
                    wait_until(
                        lambda: others[0].done() or scene.saas.one(waiting) == (1,),
                        timeout_seconds=10,
                        what="the other keeper has done what it can",
                    )

        opened = scene.keeper.keep_calendar(scene.api, met_before_commit, lease)
        assert [opened, others[0].result()] == [True, False]

    assert scene.states() == ["open"]
    assert len(scene.open_at_google()) == 1


def test_a_calendar_without_push_is_flagged_once_and_not_tried_again(scene: Scene) -> None:
    holidays = scene.google.add_calendar("ann@example.com", "Holidays", push_supported=False)
    scene.saas.execute("UPDATE sync.calendar_state SET calendar_id = %s", holidays)
    scene = replace(scene, calendar=holidays)

    assert [scene.keep() for _ in range(3)] == [False] * 3

    assert scene.calls["events.watch", "400"] == 1
    assert scene.saas.calendar(holidays, "push_unsupported_at IS NOT NULL, last_error") == (True, None)
    assert scene.rows() == []


@pytest.mark.parametrize(
    ("fault", "seconds", "left"),
    [
        ({"kind": "error", "status": 503}, 600, ["closing"]),
        ({"kind": "drop"}, 600, ["closing"]),
        ({"kind": "html"}, 600, ["closing"]),
        ({"kind": "forbidden", "reason": "forbidden"}, 6 * 3600, []),
        ({"kind": "not_found"}, 6 * 3600, []),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_a_channel_google_did_not_open_is_tried_again_later_not_at_once(
    scene: Scene, fault: dict[str, Any], seconds: int, left: list[str]
) -> None:
    scene.google.add_fault(**fault, method="events.watch")
    assert scene.keep() is False
    asked = scene.google.counts().count("events.watch")
    assert scene.keep() is False
    assert scene.google.counts().count("events.watch") == asked
    wait = "round(extract(epoch FROM watch_retry_at - now())::float8 / 60) * 60"
    assert scene.saas.calendar(scene.calendar, wait) == (seconds,)
    assert scene.states() == left, "without an answer it may be open"

    scene.google.clear_faults()
    scene.saas.execute("UPDATE sync.calendar_state SET watch_retry_at = now()")
    assert scene.keep() is True
    assert scene.states() == ["open"]
    assert len(scene.open_at_google()) == 1


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"kind": "rate_limited", "status": 403, "reason": "rateLimitExceeded", "retry_after": 60}, RateLimitedError),
        ({"kind": "forbidden", "reason": "quotaExceeded"}, QuotaExceededError),
        ({"kind": "unauthorized"}, AccessTokenRefusedError),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_what_concerns_more_than_a_channel_is_left_to_the_caller(
    scene: Scene, fault: dict[str, Any], error: type[SyncError]
) -> None:
    scene.google.add_fault(**fault, method="events.watch")

    with pytest.raises(error):
        scene.keep()

    assert scene.rows() == []
    assert scene.saas.calendar(scene.calendar, "watch_retry_at") == (None,)


def test_a_stop_that_fails_is_done_by_the_next_visit_of_the_list(scene: Scene) -> None:
    scene.keep()
    scene.age(5.1 * DAY)
    scene.google.add_fault("error", status=503, method="channels.stop")
    scene.keep()
    assert scene.states() == ["closing", "open"]
    assert len(scene.open_at_google()) == 2

    scene.google.clear_faults()
    scene.keep_list()
    assert scene.states() == ["open", "open"], "the calendar's and the list's"
    assert len(scene.open_at_google()) == 2


def test_with_another_address_channels_are_opened_anew_and_with_none_they_are_stopped(scene: Scene, hook: Hook) -> None:
    scene.keep()
    scene.keep_list()
    scene.settle()
    moved = make_keeper(hook.url.replace("127.0.0.1", "localhost"))
    scene.keep_list(moved)
    assert scene.seconds_until_due() <= 0, "its calendars are visited"
    assert scene.keep(keeper=moved) is True
    assert {channel["address"] for channel in scene.google.channels()} == {moved.address}

    off = make_keeper(None)
    scene.settle()
    assert scene.keep_list(off) is False
    assert scene.seconds_until_due() <= 0, "it is polled from now on"
    assert scene.keep(keeper=off) is False
    assert scene.rows() == []
    assert scene.open_at_google() == set()


def test_with_push_off_a_visit_of_the_calendar_stops_its_channel(scene: Scene) -> None:
    scene.keep()

    assert scene.keep(keeper=make_keeper(None)) is False
    assert (scene.rows(), scene.open_at_google()) == ([], set())


def test_channels_of_retired_calendars_are_stopped_by_the_visit_of_the_list(scene: Scene) -> None:
    scene.keep()
    scene.saas.execute("UPDATE sync.calendar_state SET deleted_at = now()")

    scene.keep_list()

    assert len(scene.rows()) == len(scene.open_at_google()) == 1, "the list's own"


def test_a_channel_of_another_connection_neither_counts_nor_is_touched(scene: Scene) -> None:
    scene.keep()
    scene.saas.execute("UPDATE sync.channels SET connection_id = gen_random_uuid()")

    assert scene.keep() is True
    assert scene.states() == ["open", "open"]


def test_expired_channels_are_forgotten_whoever_had_them(scene: Scene) -> None:
    scene.keep()
    scene.saas.execute("UPDATE sync.channels SET tenant_id = gen_random_uuid(), connection_id = gen_random_uuid()")
    scene.age(7.2 * DAY)

    scene.keep_list()

    assert len(scene.rows()) == 1


# The whole sync with push: 77 and 78 once more, 81, 83 to 86


@dataclass
class Fleet:
    """A sync with push, of which every calendar without push is due at every tick and every other one in a day."""

    google: Simulator
    saas: Saas
    services: Services
    keeper: ChannelKeeper

    def tick(self) -> TickResult:
        result = tick.run_tick(self.services, run_id=f"test-{uuid4()}")
        self.google.settle_pushes()
        return result

    def settle(self) -> None:
        """Baseline, channels, catch-up."""
        for _ in range(3):
            assert self.tick().failed == ()

    def pulls(self) -> int:
        return self.google.counts().count("events.list", status=200)


@pytest.fixture
def fleet(google: Simulator, saas: Saas, services: Services, database: Database) -> Iterator[Fleet]:
    with receiving(database.dsn, saas, debounce_seconds=0.0) as hook:
        keeper = make_keeper(hook.url)
        yield Fleet(google, saas, replace(services, keeper=keeper), keeper)


def test_with_push_an_idle_calendar_costs_no_call_and_a_change_is_there_with_the_next_tick(fleet: Fleet) -> None:
    workspace, calendar = connected(fleet.google, fleet.saas)
    fleet.settle()
    before = fleet.google.counts().count()

    fleet.tick()
    assert fleet.google.counts().count() == before

    insert(fleet.google, calendar, meeting())
    fleet.google.settle_pushes()
    fleet.tick()
    assert differences(fleet.saas, workspace, calendar, fleet.google.truth(calendar)) == {}


def test_fifty_changes_within_a_second_cost_one_pull_and_at_most_one_more(fleet: Fleet) -> None:
    workspace, calendar = connected(fleet.google, fleet.saas)
    fleet.settle()
    before = fleet.pulls()

    insert(fleet.google, calendar, *(meeting(number) for number in range(50)))
    fleet.google.settle_pushes()
    fleet.tick()
    fleet.tick()

    assert 1 <= fleet.pulls() - before <= 2
    assert differences(fleet.saas, workspace, calendar, fleet.google.truth(calendar)) == {}


def test_a_notification_while_the_calendar_is_being_pulled_leads_to_one_more_pull(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, calendar = connected(fleet.google, fleet.saas)
    fleet.settle()
    insert(fleet.google, calendar, meeting(1))
    fleet.google.settle_pushes()
    listed, late = GoogleConnection.list_events, [meeting(2)]

    def and_then_it_changes(api: GoogleConnection, *arguments: Any, **options: Any) -> object:
        page = listed(api, *arguments, **options)
        while late:
            insert(fleet.google, calendar, late.pop())
            fleet.google.settle_pushes()
        return page

    before = fleet.pulls()
    monkeypatch.setattr(GoogleConnection, "list_events", and_then_it_changes)
    fleet.tick()
    assert len(differences(fleet.saas, workspace, calendar, fleet.google.truth(calendar))) == 1

    fleet.tick()
    fleet.tick()
    assert differences(fleet.saas, workspace, calendar, fleet.google.truth(calendar)) == {}
    assert fleet.pulls() - before == 2


def test_a_change_between_the_last_pull_and_the_watch_is_caught_by_the_pull_after_it(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, calendar = connected(fleet.google, fleet.saas)
    watch, early = GoogleConnection.watch_events, [meeting()]

    def it_changes_and_then(api: GoogleConnection, *arguments: Any) -> object:
        while early:
            insert(fleet.google, calendar, early.pop())
        return watch(api, *arguments)

    monkeypatch.setattr(GoogleConnection, "watch_events", it_changes_and_then)
    fleet.settle()

    assert early == []
    assert fleet.saas.calendar(calendar, "notified_at") == (None,), "nobody told us"
    assert differences(fleet.saas, workspace, calendar, fleet.google.truth(calendar)) == {}


def test_a_worker_that_dies_between_the_watch_and_the_pull_still_owes_the_pull(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, calendar = connected(fleet.google, fleet.saas)
    fleet.tick()
    insert(fleet.google, calendar, meeting())
    with monkeypatch.context() as dying:
        dying.setattr(GoogleConnection, "list_events", lambda *_, **__: die())
        with pytest.raises(Dies):
            fleet.tick()
    end_leases(fleet.saas)
    assert fleet.saas.execute("SELECT state FROM sync.channels WHERE calendar_id IS NOT NULL") == [("open",)]

    fleet.saas.execute(
        "UPDATE sync.calendar_state SET due_at = least(due_at, now() + interval '1 hour') - interval '1 hour'"
    )
    fleet.tick()
    assert differences(fleet.saas, workspace, calendar, fleet.google.truth(calendar)) == {}


def test_push_not_supported_is_flagged_once_and_the_calendar_is_polled_instead(fleet: Fleet) -> None:
    workspace, _ = connected(fleet.google, fleet.saas)
    holidays = fleet.google.add_calendar("ann@example.com", "Holidays", push_supported=False)
    fleet.settle()
    fleet.settle()

    refused = fleet.google.counts().count("events.watch", status=400)
    insert(fleet.google, holidays, meeting())
    fleet.tick()

    assert refused == 1
    assert fleet.saas.calendar(holidays, "push_unsupported_at IS NOT NULL, last_error") == (True, None)
    assert differences(fleet.saas, workspace, holidays, fleet.google.truth(holidays)) == {}


def test_a_new_calendar_is_announced_by_the_list_and_synced_with_the_next_tick(fleet: Fleet) -> None:
    workspace, _ = connected(fleet.google, fleet.saas)
    fleet.settle()
    lists = fleet.google.counts().count("calendarList.list")
    fleet.tick()
    assert fleet.google.counts().count("calendarList.list") == lists, "watched, so it is read once a day"

    added = fleet.google.add_calendar("ann@example.com", "New")
    insert(fleet.google, added, meeting())
    fleet.google.settle_pushes()
    fleet.tick()

    assert differences(fleet.saas, workspace, added, fleet.google.truth(added)) == {}


@dataclass
class Days:
    """A fleet in virtual time, Google's and the database's side by side."""

    fleet: Fleet
    admin_dsn: str
    offset: float = 0.0

    def pass_(self, seconds: float) -> None:
        moment = virtual_clock.advance(self.admin_dsn, seconds)
        self.fleet.google.set_clock(moment + timedelta(seconds=self.offset))


@contextmanager
def days(google: Simulator, saas: Saas, services: Services, database: Database, offset: float = 0.0) -> Iterator[Days]:
    start = datetime.now(UTC)
    virtual_clock.install(database.admin_dsn, start)
    google.freeze()
    google.set_clock(start + timedelta(seconds=offset))
    dsn = virtual_clock.dsn(database.dsn)
    with receiving(dsn, saas, debounce_seconds=0.0) as hook, DatabaseRouter(Shard("main", dsn)) as router:
        keeper = make_keeper(hook.url)
        polls = Cadence(poll_seconds=120.0, list_seconds=3600.0, rng=Random(1), ceiling_seconds=14400.0)
        yield Days(
            Fleet(google, saas, replace(services, router=router, keeper=keeper, cadence=polls), keeper),
            database.admin_dsn,
            offset,
        )


def test_when_every_push_is_lost_the_safety_poll_finds_the_change_within_a_day(
    google: Simulator, saas: Saas, services: Services, database: Database
) -> None:
    with days(google, saas, services, database) as time:
        workspace, calendar = connected(google, saas)
        for _ in range(4):
            time.fleet.tick()
            time.pass_(120)
        time.pass_(5 * 3600)  # a poll later the channel is relied upon, if its first message came too late for that
        time.fleet.tick()
        google.add_fault("drop", method="push")
        insert(google, calendar, meeting())
        pulls, hours = time.fleet.pulls(), 0

        while differences(saas, workspace, calendar, google.truth(calendar)):
            time.pass_(3600)
            time.fleet.tick()
            hours += 1
            assert hours <= 24

        assert hours > 4, "longer than the longest interval of polling: the channel was relied upon"
        assert time.fleet.pulls() - pulls == 1


def test_channels_are_in_force_for_weeks_with_a_renewal_every_few_days_and_without_a_gap(
    google: Simulator, saas: Saas, services: Services, database: Database
) -> None:
    with days(google, saas, services, database) as time:
        connected(google, saas)
        for _ in range(4):
            time.fleet.tick()
            time.pass_(120)
        in_force = []
        for _ in range(15 * 4):
            time.pass_(6 * 3600)
            time.fleet.tick()
            in_force.append(len(google.channels()))

        assert set(in_force) == {2}, "one for the calendar, one for the list"
        for method in ("events.watch", "calendarList.watch"):
            assert 3 <= google.counts().count(method, status=200) <= 4, "every 4 to 6 days"
        assert saas.one("SELECT count(*) FROM sync.channels") == (2,)


@pytest.mark.parametrize("minutes", [-10, 10])
def test_no_event_is_lost_when_our_clocks_are_ten_minutes_wrong(
    google: Simulator,
    saas: Saas,
    services: Services,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    minutes: int,
) -> None:
    wrong = timedelta(minutes=minutes)
    monkeypatch.setattr("google.auth._helpers.utcnow", lambda: datetime.now(UTC).replace(tzinfo=None) + wrong)
    with days(google, saas, services, database, offset=-wrong.total_seconds()) as time:
        workspace, calendar = connected(google, saas)
        for number in range(8):
            insert(google, calendar, meeting(number))
            google.settle_pushes()
            time.fleet.tick()
            insert(google, calendar, meeting(100 + number))
            google.settle_pushes()
            time.pass_(130)
        time.fleet.tick()

        assert differences(saas, workspace, calendar, google.truth(calendar)) == {}
        assert len(google.channels()) == 2


def test_a_fleet_that_starts_at_once_spreads_its_due_times_by_a_quarter_and_knows_no_midnight(
    google: Simulator, saas: Saas, services: Services
) -> None:
    connected(google, saas)
    for number in range(79):
        google.add_calendar("ann@example.com", f"Calendar {number}")
    hourly = Cadence(poll_seconds=3600.0, list_seconds=3600.0, rng=Random(1))
    assert tick.run_tick(replace(services, cadence=hourly), run_id="first").failed == ()

    waits = [
        float(str(seconds))
        for (seconds,) in saas.execute(
            "SELECT extract(epoch FROM due_at - last_finished_at)::float8 FROM sync.calendar_state"
        )
    ]
    assert len(waits) == 80
    assert 2700 <= min(waits) < 2900
    assert 4300 < max(waits) <= 4500
    tenths = Counter(int((wait - 2700) // 180) for wait in waits)
    assert max(tenths.values()) < 80 / 4, "no tenth of the time takes a quarter of the calendars"


def test_a_receiver_that_google_cannot_reach_leaves_the_calendars_polled(fleet: Fleet) -> None:
    workspace, calendar = connected(fleet.google, fleet.saas)
    nobody = make_keeper(f"http://127.0.0.1:{free_port()}/google-calendar")
    fleet = replace(fleet, services=replace(fleet.services, keeper=nobody))
    fleet.settle()
    fleet.tick()
    asked = fleet.google.counts().count("events.watch")

    insert(fleet.google, calendar, meeting())
    fleet.tick()

    assert differences(fleet.saas, workspace, calendar, fleet.google.truth(calendar)) == {}
    assert fleet.google.counts().count("events.watch") == asked == 1, "it is not opened again at every poll"


def test_with_push_switched_off_calendars_are_polled_again(fleet: Fleet) -> None:
    workspace, calendar = connected(fleet.google, fleet.saas)
    fleet.settle()
    off = replace(fleet, services=replace(fleet.services, keeper=make_keeper(None)))
    fleet.saas.execute("UPDATE sync.calendar_state SET due_at = now()")
    off.tick()
    insert(fleet.google, calendar, meeting())
    off.tick()
    assert differences(fleet.saas, workspace, calendar, fleet.google.truth(calendar)) == {}
