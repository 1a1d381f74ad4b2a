"""Starting and stopping a simulator: in this process for the command line, as a child process for tests and stacks."""

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from devstack.google_calendar.control import Simulator
from devstack.google_calendar.resource import Resource, dumps
from devstack.google_calendar.server import Server
from devstack.google_calendar.simulation import Options

_START_TIMEOUT = 30.0
_STOP_TIMEOUT = 5.0


class _Protocol(HttpToolsProtocol):
    """uvicorn's protocol, which also lets a fault break the connection."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["transport"] = self.transport  # type: ignore[typeddict-unknown-key]


def serve(options: Options, host: str, port: int, *, parent: int | None = None) -> None:
    """Serve until SIGTERM or SIGINT, after printing the world's description as one JSON line on stdout.

    Args:
        options: what to simulate.
        host: address to bind.
        port: port to bind; 0 picks a free one.
        parent: process id to live with: the server stops when it is no longer the parent.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
        name = f"[{host}]" if family == socket.AF_INET6 else host
        app = Server(options, f"http://{name}:{listener.getsockname()[1]}")
        config = uvicorn.Config(
            app,
            http=_Protocol,
            loop="uvloop",
            ws="none",
            lifespan="on",
            access_log=False,
            log_level="error",
            server_header=False,
            timeout_keep_alive=120,
            timeout_graceful_shutdown=1,
        )
        # A fault that breaks the connection is no mistake of the application.
        logging.getLogger("uvicorn.error").addFilter(
            lambda record: not record.getMessage().startswith("ASGI callable returned without")
        )
        server = uvicorn.Server(config)
        sys.stdout.buffer.write(dumps(app.simulation.describe()) + b"\n")
        sys.stdout.flush()
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(_run(server, listener, parent))


async def _run(server: uvicorn.Server, listener: socket.socket, parent: int | None) -> None:
    watcher = asyncio.create_task(_watch(server, parent)) if parent is not None else None
    await server.serve(sockets=[listener])
    if watcher is not None:
        watcher.cancel()


async def _watch(server: uvicorn.Server, parent: int) -> None:
    """Stop the server when its parent dies, however it dies."""
    while os.getppid() == parent:
        await asyncio.sleep(0.5)
    server.should_exit = True


@contextmanager
def run_simulator(
    *,
    seed: int = 1,
    profile: str = "small",
    users: int = 3,
    events: int = 100,
    clock: str | None = None,
    frozen: bool = False,
    port: int = 0,
    settings: Resource | None = None,
) -> Iterator[Simulator]:
    """Run a simulator in a child process that dies with this one.

    Args:
        seed: decides the world.
        profile: "small" or "demo".
        users: number of users (small profile).
        events: mean number of events in a calendar (small profile).
        clock: RFC 3339 moment virtual time starts at; None: now.
        frozen: whether virtual time stands still until a test moves it.
        port: port on 127.0.0.1; 0 picks a free one.
        settings: fields of `Settings` by name.

    Yields:
        A control client whose `url`, `token_url` and `users` are those of the new simulator.

    Raises:
        RuntimeError: if the simulator does not start.
    """
    arguments = [
        "--seed", str(seed), "--profile", profile, "--users", str(users), "--events", str(events), "--port", str(port),
        "--parent-pid", str(os.getpid()),
    ]  # fmt: skip
    if clock:
        arguments += ["--clock", clock]
    if frozen:
        arguments += ["--frozen"]
    for name, value in (settings or {}).items():
        arguments += [f"--{name.replace('_', '-')}", str(value).lower() if isinstance(value, bool) else str(value)]
    process = subprocess.Popen(
        [sys.executable, "-m", "devstack.google_calendar", *arguments], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    try:
        line = process.stdout.readline() if process.stdout else b""
        if not line:
            raise RuntimeError(f"The calendar simulator did not start (exit status {process.wait(_START_TIMEOUT)}).")
        with Simulator(json.loads(line), pid=process.pid) as simulator:
            yield simulator
    finally:
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()
