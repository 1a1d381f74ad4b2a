"""Chaos trials: `python -m tests.sync_pipeline.chaos [--trials N] [--seed S]`, which is `make chaos-sync`.

One trial: two accounts with three calendars, edited all the time; two workers at once that are killed (-9), frozen past
their lease and woken, or cut off from Postgres and Google at seeded moments, commit points among them; then one calm
tick. After it Postgres must show exactly what Google has, no calendar may be leased, no row of a dead generation may be
left, and a further tick must find nothing to do, which is what a token that fits the rows means.

A failing seed is run again with `--seed S --trials 1`. What befalls whom is decided by the seed; what a worker is
doing at that moment, and so the outcome, also by the machine's pace.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit, urlunsplit

import psycopg
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from devstack import postgres
from devstack import saas as devstack_saas
from devstack.google_calendar import Simulator, SimulatorError, run_simulator
from devstack.google_calendar.resource import Resource
from devstack.processes import CHECKOUT, VAR, Supervisor
from devstack.servers import Database
from scaling import migrate
from sync_pipeline.workspaces import Workspace
from tests.sync_pipeline.chaos_worker import LEASE_SECONDS, POINTS, Job
from tests.sync_pipeline.conftest import KEY, Saas, differences
from tests.sync_pipeline.test_convergence import INSTANCES, PAGE_FAULTS, SHAPES

RESULTS = Path("var/bench/chaos.json")
TRIALS = 200
WORKER_TIMEOUT_SECONDS = 30.0
LOCK_TIMEOUT_SECONDS = 15
"""Many times what a frozen worker's transaction may live."""
MOST_ROUNDS = 6
UNLIMITED = "1000000000"
OTHER_FAULTS: Sequence[Resource] = [
    {"kind": kind, "method": method, "seconds": 0.05}
    for method in ("calendarList.list", "oauth.token")
    for kind in ("drop", "drop_body", "error", "html", "truncate", "hang")
] + [{"kind": "hang", "method": "events.list", "seconds": 0.05}, {"kind": "latency", "seconds": 0.03}]
BLOWS = (
    "kill_at_point",
    "kill_at_point",
    "kill_at_point",
    "kill_at_time",
    "stop_at_point",
    "stop_at_point",
    "stop_at_point",
    "stop_at_point",
    "terminate_at_commit",
    "terminate_at_time",
    "cut_at_time",
    "cut_at_commit",
    "cut_after_commit",
    "none",
)
"""What may befall a worker. A cut after the commit is the treacherous one: it happened, and the worker never learns."""
EDITS = ("insert", "patch", "patch", "delete", "restore", "reshape", "move", "instance", "cancel")
FARTHEST = {"before_commit": 14, "after_commit": 14, "before_request": 12, "after_request": 12, "before_statement": 60}


class Proxy:
    """Stands between one worker and Postgres, and cuts the connection."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._loop = asyncio.new_event_loop()
        self._open: set[asyncio.StreamWriter] = set()
        self._commits_left = 0
        self._after = False
        self.cuts = 0
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        started.wait()

    def arm(self, commits: int, *, after: bool) -> None:
        """Cut at that commit from now: before Postgres sees it, or after it happened and before the worker hears."""
        self._commits_left, self._after = commits, after

    def disarm(self) -> None:
        self._commits_left = 0

    def cut(self) -> None:
        """Reset every open connection."""
        self._loop.call_soon_threadsafe(self._cut)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        self._loop.run_forever()
        server.close()
        self._cut()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    def _cut(self) -> None:
        self.cuts += bool(self._open)
        for writer in list(self._open):
            raw: socket.socket = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):  # closed meanwhile
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        self._open.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream, downstream = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._open |= {writer, downstream}
        swallow = [False]
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await asyncio.gather(
                self._pump(reader, downstream, swallow, from_worker=True),
                self._pump(upstream, writer, swallow, from_worker=False),
            )
        for one in (writer, downstream):
            self._open.discard(one)
            one.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, swallow: list[bool], *, from_worker: bool
    ) -> None:
        while chunk := await reader.read(65536):
            if from_worker and self._commits_left and b"COMMIT\x00" in chunk:
                self._commits_left -= 1
                if self._commits_left == 0:
                    if not self._after:
                        self._cut()
                        return
                    swallow[0] = True
            if not from_worker and swallow[0]:
                self._cut()
                return
            writer.write(chunk)
            await writer.drain()
        writer.write_eof()


class Workers:
    """The warm process and its children."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.sync_pipeline.chaos_worker"],
            cwd=CHECKOUT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._condition = threading.Condition()
        self._started: list[int] = []
        self._events: dict[int, dict[str, dict[str, Any]]] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def start(self, job: Job) -> int:
        """Fork a worker; its process id."""
        assert self._process.stdin is not None
        with self._condition:
            self._process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
            self._process.stdin.flush()
            if not self._condition.wait_for(lambda: self._started or self._process.poll() is not None, 30):
                raise AssertionError("no worker was forked")
            return self._started.pop()

    def is_over(self, pid: int) -> bool:
        """Whether it has ended or stands still."""
        with self._condition:
            return bool({"exited", "stopped"} & self._events.get(pid, {}).keys())

    def has_ended(self, pid: int) -> bool:
        with self._condition:
            return "exited" in self._events.get(pid, {})

    def is_stopped(self, pid: int) -> bool:
        with self._condition:
            known = self._events.get(pid, {})
            return "stopped" in known and "exited" not in known

    def wait(self, pid: int, what: str) -> dict[str, Any] | None:
        """Wait for an event of a worker; None when it does not come in time."""
        with self._condition:
            self._condition.wait_for(lambda: what in self._events.get(pid, {}), WORKER_TIMEOUT_SECONDS)
            return self._events.get(pid, {}).get(what)

    def result(self, pid: int) -> dict[str, Any] | None:
        """What it told before it ended; None when it was killed before."""
        with self._condition:
            return self._events.get(pid, {}).get("result")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event = json.loads(line)
            with self._condition:
                if event["event"] == "started":
                    self._started.append(event["pid"])
                    self._events.setdefault(event["pid"], {})
                else:
                    self._events.setdefault(event["pid"], {})[event["event"]] = event
                self._condition.notify_all()


class Owner(Saas):
    """The SaaS's side with one connection for all statements; connecting costs more than most of them."""

    def __init__(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        super().__init__("")
        self._connection = connection

    def execute(self, statement: str, *parameters: object) -> list[tuple[object, ...]]:
        cursor = self._connection.execute(statement.encode(), parameters)
        return cursor.fetchall() if cursor.description else []


@dataclass
class Arena:
    """What all trials share: a database, a Google, warm workers, and a proxy for each of two at once."""

    database: Database
    google: Simulator
    saas: Saas
    workers: Workers
    proxies: Sequence[Proxy]

    def environment(self, proxy: Proxy | None = None) -> dict[str, str]:
        """The settings of a worker: everything is due at once, and nothing is limited."""
        url = urlsplit(self.database.dsn)
        through = url._replace(netloc=f"{url.netloc.rpartition(':')[0]}:{proxy.port}") if proxy else url
        return {
            "DATABASE_URL": urlunsplit(through),
            "GOOGLE_CLIENT_ID": "client",
            "GOOGLE_CLIENT_SECRET": "secret",
            "GRANT_ENCRYPTION_KEYS": KEY,
            "GOOGLE_API_ENDPOINT": self.google.url,
            "GOOGLE_TOKEN_URL": self.google.token_url,
            "SYNC_PARALLELISM": "2",
            "SYNC_POLL_INTERVAL_SECONDS": "0",
            "SYNC_POLL_CEILING_SECONDS": "0",
            "SYNC_CALENDAR_LIST_INTERVAL_SECONDS": "0",
            "SCALING_INCREMENTAL_SYNC": "on",
            "SCALING_PARALLEL_SYNC": "on",
            "SYNC_CALLS_PER_MINUTE": UNLIMITED,
            "SYNC_CALLS_PER_MINUTE_AND_USER": UNLIMITED,
            "SYNC_CALLS_PER_DAY": UNLIMITED,
            "CHAOS_ADMIN_DSN": self.database.admin_dsn,
        }


@contextlib.contextmanager
def arena(database: Database, google: Simulator) -> Iterator[Arena]:
    """Warm up for trials.

    Args:
        database: emptied by every trial.
        google: reset by every trial.
    """
    port = urlsplit(database.dsn).port
    assert port is not None
    with contextlib.ExitStack() as stack:
        workers = Workers()
        stack.callback(workers.close)
        proxies = [Proxy(port) for _ in range(2)]
        for proxy in proxies:
            stack.callback(proxy.close)
        connection = stack.enter_context(psycopg.connect(database.admin_dsn, autocommit=True))
        connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT_SECONDS}s'".encode())
        yield Arena(database, google, Owner(connection), workers, proxies)


@dataclass
class Outcome:
    """How a trial ended."""

    seed: int
    lost: int = 0
    """Events Google has that Postgres does not show, or shows otherwise."""
    resurrected: int = 0
    """Events Postgres shows that Google does not have."""
    duplicated: int = 0
    """Rows of generations that nobody reads any more."""
    violations: list[str] = field(default_factory=list)
    strikes: Counter[str] = field(default_factory=Counter)
    troubles: Counter[str] = field(default_factory=Counter)
    """What the workers that lived said of it."""
    seconds: float = 0.0

    def raw(self) -> dict[str, Any]:
        """The outcome as JSON."""
        return {**vars(self), "strikes": dict(self.strikes), "troubles": dict(self.troubles)}

    @property
    def bad_rows(self) -> int:
        return self.lost + self.resurrected + self.duplicated

    @property
    def ok(self) -> bool:
        return not self.bad_rows and not self.violations


class Trial:
    """One storm and the calm after it."""

    def __init__(self, arena: Arena, seed: int) -> None:
        self._arena = arena
        self._google = arena.google
        self._saas = arena.saas
        self._rng = random.Random(seed)
        # What is drawn while workers work depends on their pace, and must not move what comes after.
        self._meanwhile = random.Random(-seed)
        self._outcome = Outcome(seed)
        self._calendars: list[tuple[Workspace, str]] = []
        self._events: list[tuple[str, str, int]] = []
        self._runs = 0

    def run(self) -> Outcome:
        """Run it."""
        began = time.perf_counter()
        self._begin()
        rounds = self._rng.randint(1, 3)
        for number in range(MOST_ROUNDS):
            if number >= rounds and self._outcome.strikes:
                break
            self._storm()
        self._calm()
        self._judge()
        self._outcome.seconds = round(time.perf_counter() - began, 2)
        return self._outcome

    def _begin(self) -> None:
        rng, google = self._rng, self._google
        google.reset(users=0)
        google.clear_faults()
        google.configure(
            quota_project_per_minute=0,
            quota_user_per_minute=0,
            sparse_instances=rng.random() < 0.5,
            tombstones=rng.choice(["auto", "full", "bare"]),
        )
        # Deleting a few rows is faster than truncating twenty tables.
        for (table,) in self._saas.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'sync'"):
            self._saas.execute(f"DELETE FROM sync.{table}")
        for table in ("google_connections", "users", "workspaces", "tenants"):
            self._saas.execute(f"DELETE FROM public.{table}")
        ann, bob = google.add_user("ann@example.com"), google.add_user("bob@example.com")
        second = google.add_calendar(ann.email, "Second")
        workspaces = [self._saas.workspace(), self._saas.workspace()]
        for workspace, user in zip(workspaces, (ann, bob), strict=True):
            self._saas.connect(workspace, user)
        self._calendars = [(workspaces[0], ann.email), (workspaces[0], second), (workspaces[1], bob.email)]
        if rng.random() < 0.3:  # one calendar seen through two accounts: rows and tokens stay apart
            google.share(second, bob.email, "reader")
            self._calendars.append((workspaces[1], second))
        for _ in range(rng.randint(5, 14)):
            self._insert(rng)
        if rng.random() < 0.75:
            self._tick()

    def _storm(self) -> None:
        rng = self._rng
        for _ in range(rng.randint(1, 6)):
            self._edit()
        for _, calendar in self._calendars:
            if rng.random() < 0.25:
                self._google.expire_sync_tokens(calendar)
        for _ in range(rng.choice([0, 0, 1, 2])):
            rule = {"method": "events.list", **rng.choice([*cast("list[Resource]", PAGE_FAULTS), *OTHER_FAULTS])}
            self._google.add_fault(**rule, times=rng.randint(1, 4), after=rng.randint(0, 5))
        self._forgive()
        started = [self._start_doomed(proxy) for proxy in self._arena.proxies]
        pids = [pid for pid, _ in started]
        timed = sorted(((at, blow) for _, blows in started for at, blow in blows), key=lambda one: one[0])
        self._watch(pids, timed)
        for pid in pids:
            if self._arena.workers.is_stopped(pid):
                self._outcome.strikes["stopped past its lease"] += 1
                self._outlive(pid)
            self._reap(pid)
        for proxy in self._arena.proxies:
            proxy.disarm()
            self._outcome.strikes["cut off from Postgres"] += proxy.cuts
            proxy.cuts = 0
        self._google.clear_faults()
        self._outcome.strikes = +self._outcome.strikes

    def _start_doomed(self, proxy: Proxy) -> tuple[int, list[tuple[float, Callable[[], None]]]]:
        """Start a worker with a fate; its process id, and the blows that fall at a time."""
        rng = self._rng
        blow = rng.choice(BLOWS)
        action = point = None
        number = 0
        at = rng.uniform(0.01, 0.35)
        timed: list[tuple[float, Callable[[], None]]] = []
        if blow in {"kill_at_point", "stop_at_point"}:
            action, point = blow.partition("_")[0], rng.choice([*POINTS, "after_request", "before_commit"])
            number = rng.randint(1, FARTHEST[point])
        elif blow == "terminate_at_commit":
            action, point, number = "terminate", "before_commit", rng.randint(1, FARTHEST["before_commit"])
        elif blow in {"cut_at_commit", "cut_after_commit"}:
            proxy.arm(rng.randint(1, FARTHEST["after_commit"]), after=blow == "cut_after_commit")
        elif blow == "cut_at_time":
            timed.append((at, proxy.cut))
        elif blow == "terminate_at_time":
            timed.append((at, self._terminate_sessions))
        pid = self._start(proxy, ticks=rng.randint(1, 3), action=action, point=point, number=number)
        if blow == "kill_at_time":
            timed.append((at, lambda: self._signal(pid, signal.SIGKILL)))
        return pid, timed

    def _watch(self, pids: Sequence[int], timed: list[tuple[float, Callable[[], None]]]) -> None:
        """Go on editing while the workers work, and let the timed blows fall."""
        began = time.monotonic()
        workers = self._arena.workers
        while not all(workers.is_over(pid) for pid in pids):
            elapsed = time.monotonic() - began
            if elapsed > WORKER_TIMEOUT_SECONDS:
                self._outcome.violations.append("a worker hangs")
                break
            while timed and timed[0][0] <= elapsed:
                timed.pop(0)[1]()
            if self._meanwhile.random() < 0.3:
                self._edit(rng=self._meanwhile)
            time.sleep(0.01)

    def _outlive(self, pid: int) -> None:
        """Let others take over what a frozen worker holds, then wake it; some die of that.

        What a stale worker writes heals itself when it also stores its stale token. It does harm when it flips a
        generation that others have replaced, or dies between its page and its token.
        """
        rng = self._rng
        time.sleep(LEASE_SECONDS * 1.2)
        for _ in range(rng.randint(1, 2)):
            for _ in range(rng.randint(1, 4)):
                self._edit(rng.choice(["delete", "delete", "patch", "insert", None]))
            self._forgive()
            self._tick(amid_faults=True)
        self._signal(pid, signal.SIGCONT)
        if rng.random() < 0.5:
            time.sleep(rng.uniform(0.0, 0.05))
            self._signal(pid, signal.SIGKILL)

    def _reap(self, pid: int) -> None:
        ended = self._arena.workers.wait(pid, "exited")
        if ended is None:
            self._outcome.violations.append("a worker does not end")
            self._signal(pid, signal.SIGKILL)
        elif ended["status"] == -signal.SIGKILL:
            self._outcome.strikes["killed"] += 1
        result = self._arena.workers.result(pid) or {}
        self._outcome.troubles.update(result.get("troubles", ()))

    def _calm(self) -> None:
        self._forgive()
        self._saas.execute(
            "UPDATE sync.calendar_state SET lease_until = now() - interval '1 s' WHERE lease_until > now()"
        )
        self._saas.execute(
            "UPDATE sync.connection_state SET lease_until = now() - interval '1 s' WHERE lease_until > now()"
        )
        self._tick()

    def _judge(self) -> None:
        outcome = self._outcome
        for workspace, calendar in self._calendars:
            truth = self._google.truth(calendar)
            for event_id in differences(self._saas, workspace, calendar, truth):
                if event_id in truth.events or event_id in truth.cancelled_instances:
                    outcome.lost += 1
                else:
                    outcome.resurrected += 1
        (outcome.duplicated,) = self._saas.one(  # type: ignore[assignment]  # a count
            "SELECT count(*) FROM sync.event_rows e LEFT JOIN sync.calendar_state c "
            "USING (tenant_id, workspace_id, calendar_id) WHERE e.generation IS DISTINCT FROM c.live_generation"
        )
        if self._saas.one("SELECT count(*) FROM sync.calendar_state WHERE deleted_at IS NULL") != (
            len(self._calendars),
        ):
            outcome.violations.append("calendars are missing or too many")
        if self._saas.one(
            "SELECT count(*) FROM sync.calendar_state WHERE lease_owner IS NOT NULL OR lease_until > now() "
            "OR next_generation IS NOT NULL OR sync_token IS NULL"
        ) != (0,):
            outcome.violations.append("a calendar is leased, or in the middle of a full sync, or has no token")
        self._forgive()
        again = self._tick()
        moved = {name: again[name] for name in ("events_upserted", "events_deleted", "full_syncs") if again[name]}
        if moved:
            outcome.violations.append(f"a token does not fit its rows: {moved}")

    def _tick(self, *, amid_faults: bool = False) -> dict[str, float]:
        """One tick of a worker that nothing befalls."""
        pid = self._start(None, ticks=1)
        self._arena.workers.wait(pid, "exited")
        result = self._arena.workers.result(pid)
        if not result or not result["numbers"]:
            if amid_faults:
                return defaultdict(float)
            self._outcome.violations.append(f"a calm worker fails: {result and result['troubles']}")
            return defaultdict(float)
        if result["troubles"] and not amid_faults:
            self._outcome.violations.append(f"a calm worker meets trouble: {result['troubles']}")
        numbers: dict[str, float] = result["numbers"][0]
        return numbers

    def _start(
        self, proxy: Proxy | None, *, ticks: int, action: str | None = None, point: str | None = None, number: int = 0
    ) -> int:
        self._runs += 1
        return self._arena.workers.start(
            Job(
                name=f"chaos-{self._outcome.seed}-{self._runs}",
                environment=self._arena.environment(proxy),
                ticks=ticks,
                seed=self._rng.randrange(2**32),
                action=action,
                point=point,
                number=number,
                patient=proxy is None,
            )
        )

    def _signal(self, pid: int, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            if not self._arena.workers.has_ended(pid):
                os.kill(pid, number)

    def _terminate_sessions(self) -> None:
        ended = self._saas.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name = 'sync_pipeline'"
        )
        self._outcome.strikes["sessions terminated"] += bool(ended)

    def _forgive(self) -> None:
        """Let backoff, breakers and parking pass."""
        for table, changes in {
            "calendar_state": "due_at = 'epoch', breaker_until = NULL",
            "connection_state": "list_due_at = 'epoch', parked_until = NULL, failed_visits = 0, status = 'active'",
        }.items():
            while True:  # a worker locks the rows in another order
                try:
                    self._saas.execute(f"UPDATE sync.{table} SET {changes}")
                    break
                except psycopg.errors.DeadlockDetected:
                    continue
                except psycopg.errors.LockNotAvailable:
                    self._outcome.violations.append("a frozen worker keeps its row locks")
                    self._terminate_sessions()

    def _insert(self, rng: random.Random) -> None:
        calendar, shape = rng.choice(self._calendars)[1], rng.randrange(len(SHAPES))
        body = {"summary": f"Event {rng.randrange(1000)}", **SHAPES[shape]}
        for made in self._google.edit(calendar, [{"op": "insert", "event": body}]):
            if made:
                self._events.append((calendar, str(made["id"]), shape))

    def _edit(self, kind: str | None = None, *, rng: random.Random | None = None) -> None:
        rng = rng or self._rng
        kind = kind or rng.choice(
            ["insert", "patch", "patch", "delete", "restore", "reshape", "move", "instance", "cancel"]
        )
        if kind == "insert" or not self._events:
            self._insert(rng)
            return
        position = rng.randrange(len(self._events))
        calendar, event_id, shape = self._events[position]
        edit: Resource = {"op": "patch", "id": event_id, "event": {"summary": f"Changed {rng.randrange(1000)}"}}
        if kind == "delete":
            edit = {"op": "delete", "id": event_id}
        elif kind == "restore":
            edit["event"] = {"status": "confirmed"}
        elif kind == "reshape":
            edit["event"] = {"recurrence": None, **rng.choice(SHAPES)}
        elif kind == "move":
            edit = {"op": "move", "id": event_id, "destination": rng.choice(self._calendars)[1]}
        elif kind in {"instance", "cancel"} and shape in INSTANCES:
            edit["id"] = f"{event_id}_{rng.choice(INSTANCES[shape])}"
            if kind == "cancel":
                edit = {"op": "delete", "id": edit["id"]}
        with contextlib.suppress(SimulatorError):  # for example patching what was deleted
            if self._google.edit(calendar, [edit]) and kind == "move":
                self._events[position] = (str(edit["destination"]), event_id, shape)


@contextlib.contextmanager
def own_arena() -> Iterator[Arena]:
    """An arena with servers of its own."""
    with Supervisor(VAR / "bench" / "chaos") as supervisor, run_simulator(users=0) as google:
        server = postgres.start(supervisor, disposable=True)
        admin_dsn = server.create_database("chaos")
        devstack_saas.create(server, "chaos")
        database = Database(
            "chaos", admin_dsn, devstack_saas.pipeline_dsn(server, "chaos"), devstack_saas.owner_dsn(server, "chaos")
        )
        migrate.upgrade(database.dsn)
        with arena(database, google) as ready:
            yield ready


def main(arguments: Sequence[str] | None = None) -> int:
    """Run trials and write var/bench/chaos.json; 1 when one of them fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.sync_pipeline.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--seed", type=int, default=1, help="of the first trial; the others count on")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    outcomes: list[Outcome] = []
    columns = (TextColumn("chaos"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with own_arena() as ready, Progress(*columns, console=console) as progress:
        task = progress.add_task("chaos", total=options.trials)
        for seed in range(options.seed, options.seed + options.trials):
            outcome = Trial(ready, seed).run()
            outcomes.append(outcome)
            if not outcome.ok:
                progress.console.print(f"[bold red]seed {seed}:[/] {outcome.raw()}")
            progress.advance(task)
            write(outcomes)
    strikes = sum((outcome.strikes for outcome in outcomes), Counter())
    failing = [outcome.seed for outcome in outcomes if not outcome.ok]
    console.print(f"{len(outcomes)} trials, {dict(strikes)}, failing seeds: {failing or 'none'}")
    return 1 if failing else 0


def write(outcomes: Sequence[Outcome]) -> None:
    """Write the figures so far."""
    strikes = sum((outcome.strikes for outcome in outcomes), Counter[str]())
    bad = sum(outcome.bad_rows for outcome in outcomes)
    failing = [outcome for outcome in outcomes if not outcome.ok]
    how = (
        "seeded trials: two workers killed, frozen past their lease or cut off while events change, then a calm tick; "
        + ", ".join(f"{count} {name}" for name, count in strikes.most_common())
    )
    results = {
        "figures": [
            {
                "name": "chaos_bad_rows",
                "value": bad,
                "target": "= 0",
                "ok": not failing,
                "how": "rows lost, duplicated or resurrected in all trials; leases, generations and tokens fit too",
            },
            {
                "name": "chaos_trials",
                "value": len(outcomes),
                "target": f">= {TRIALS}",
                "ok": len(outcomes) >= TRIALS,
                "how": how,
            },
        ],
        "strikes": dict(strikes),
        "troubles": dict(sum((outcome.troubles for outcome in outcomes), Counter[str]())),
        "first_seed": outcomes[0].seed,
        "seconds_per_trial": round(sum(outcome.seconds for outcome in outcomes) / len(outcomes), 2),
        "failing": [outcome.raw() for outcome in failing],
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
