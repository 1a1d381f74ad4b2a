"""How fast the calendar simulator answers: `python -m bench.google_calendar [seconds]`.

Measures idle incremental `events.list` calls over many keep-alive connections from another process, the CPU they cost
the server, a full listing of the largest demo calendar, and the building of the demo world. Writes
var/bench/google_calendar.json.
"""

import json
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

import httpx
import psutil

from devstack.google_calendar import SimulatedUser, Simulator, run_simulator

RESULTS = Path("var/bench/google_calendar.json")
CONNECTIONS = 32
NO_QUOTAS = {"quota_user_per_minute": 0, "quota_project_per_minute": 0}
PARAMETERS = {"maxResults": "2500", "showDeleted": "true", "singleEvents": "false"}


@dataclass(frozen=True)
class Figure:
    """One measured number and the target it is held against."""

    name: str
    value: float
    target: str
    ok: bool
    how: str


def main() -> None:
    """Measure, print and write every figure."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 5.0
    with run_simulator(settings=NO_QUOTAS) as simulator:
        figures = [*idle_polls(simulator, seconds), *demo_world(simulator)]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"figures": [asdict(figure) for figure in figures]}, indent=2) + "\n")
    for figure in figures:
        sys.stdout.write(
            f"{'ok  ' if figure.ok else 'MISS'} {figure.name}: {figure.value:g} (target {figure.target})\n"
        )
    sys.exit(0 if all(figure.ok for figure in figures) else 1)


def idle_polls(simulator: Simulator, seconds: float) -> Iterator[Figure]:
    """Measure incremental listings of a calendar that does not change."""
    user = simulator.users[0]
    _, token = full_listing(simulator, user, user.email)
    query = urlencode(PARAMETERS | {"syncToken": token})
    address = urlsplit(simulator.url)
    request = (
        f"GET /calendar/v3/calendars/{quote(user.email)}/events?{query} HTTP/1.1\r\nHost: {address.netloc}\r\n"
        f"Authorization: Bearer {user.access_token}\r\nAccept-Encoding: gzip\r\nUser-Agent: bench (gzip)\r\n\r\n"
    )
    process = psutil.Process(simulator.pid)
    before = process.cpu_times()
    output = subprocess.run(
        [sys.executable, "-m", "bench.google_calendar", "--load", str(address.port), str(seconds)],
        input=request.encode(), stdout=subprocess.PIPE, check=True,
    ).stdout  # fmt: skip
    after = process.cpu_times()
    calls, elapsed = json.loads(output)
    cpu = after.user + after.system - before.user - before.system
    how = f"{CONNECTIONS} keep-alive connections from another process for {elapsed:.1f} s, {calls} calls"
    yield Figure("idle events.list, calls per CPU second", round(calls / cpu), ">= 1500", calls / cpu >= 1500, how)
    yield Figure("idle events.list, calls per second", round(calls / elapsed), ">= 1500", calls / elapsed >= 1500, how)
    yield Figure(
        "idle events.list, CPU seconds per 1000 calls",
        round(1000 * cpu / calls, 3),
        "<= 0.667",
        cpu / calls <= 1 / 1500,
        how,
    )


def demo_world(simulator: Simulator) -> Iterator[Figure]:
    """Measure building the demo world and listing its 10,000-event calendar."""
    process = psutil.Process(simulator.pid)
    before = process.cpu_times().user
    simulator.reset(profile="demo", settings=NO_QUOTAS)
    built = process.cpu_times().user - before
    yield Figure(
        "demo world, CPU seconds to build", round(built, 2), "< 3", built < 3, "POST /_sim/reset, 90 calendars"
    )
    user, calendar = next(
        (user, calendar)
        for user in simulator.users
        for calendar, note in user.calendar_notes.items()
        if note == "large"
    )
    full_listing(simulator, user, calendar)  # serialises each event once
    before = process.cpu_times().user
    events, _ = full_listing(simulator, user, calendar)
    spent = process.cpu_times().user - before
    how = f"{events} events in pages of 2500, warm"
    yield Figure("full listing of 10,000 events, server CPU seconds", round(spent, 3), "< 0.5", spent < 0.5, how)


def full_listing(simulator: Simulator, user: SimulatedUser, calendar: str) -> tuple[int, str]:
    """List a calendar in full; return the number of events and the sync token."""
    url = f"{simulator.url}/calendar/v3/calendars/{quote(calendar, safe='')}/events"
    headers = {"Authorization": f"Bearer {user.access_token}"}
    count = 0
    page: dict[str, str] = {}
    while True:
        token = {"pageToken": page["nextPageToken"]} if page else {}
        page = httpx.get(url, params=PARAMETERS | token, headers=headers, timeout=60, trust_env=False).json()
        count += len(page["items"])
        if "nextSyncToken" in page:
            return count, page["nextSyncToken"]


def load(port: int, seconds: float) -> None:
    """Send the request on stdin over and over; print calls and elapsed seconds as JSON."""
    request = sys.stdin.buffer.read()
    poller = select.epoll()
    connections: dict[int, socket.socket] = {}
    for _ in range(CONNECTIONS):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connections[connection.fileno()] = connection
        poller.register(connection, select.EPOLLIN)
        connection.sendall(request)
    calls, begin = 0, time.perf_counter()
    while (now := time.perf_counter()) - begin < seconds:
        for descriptor, _ in poller.poll(1.0):
            connection = connections[descriptor]
            answer = connection.recv(65536)
            while not answer.endswith(b"]}"):
                answer += connection.recv(65536)
            if not answer.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"Unexpected answer: {answer[:200]!r}")
            calls += 1
            connection.sendall(request)
    sys.stdout.write(json.dumps([calls, now - begin]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        load(int(sys.argv[2]), float(sys.argv[3]))
    else:
        main()
