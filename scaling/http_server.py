"""A small HTTP server of this project: the port it binds, when it says that it listens, how it ends.

Belongs here: what the receiver of notifications and the page's server have in common. Does not: what is answered
(`sync_pipeline.webhook`, `scaling.report_server`), or the exporter, which is prometheus_client's own server.
"""

import logging
import signal
import socket
import sys
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette

from scaling import logs
from scaling.errors import UserError
from scaling.logs import Event, event

log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """A server that says when it listens."""

    def __init__(
        self, app: Starlette, *, concurrent: int, graceful_seconds: float, started: Callable[[], None] | None = None
    ) -> None:
        """Make a server; `run(sockets=[listen(…)])` serves until SIGTERM.

        Args:
            app: what answers.
            concurrent: requests at once; more are answered 503 without a look.
            graceful_seconds: what is under way when it ends may take so long.
            started: called once it listens.
        """
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",  # bounds what it reads of a head at 16 kB; httptools does not
                ws="none",
                lifespan="on",
                access_log=False,
                log_level="warning",
                log_config=None if logs.is_json() else uvicorn.config.LOGGING_CONFIG,
                server_header=False,
                limit_concurrency=concurrent,
                timeout_graceful_shutdown=int(graceful_seconds),
            )
        )
        self._when_started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See `uvicorn.Server.startup`."""
        await super().startup(sockets)
        if self.started and self._when_started:
            self._when_started()


def listen(host: str, port: int, *, settings: str) -> socket.socket:
    """Bind a port.

    Args:
        host: address, IPv4 or IPv6.
        port: 0 picks a free one.
        settings: names of those that say where, for the sentence.

    Raises:
        UserError: it is taken, or the address is not this machine's.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(f"cannot listen on {host} port {port} ({error.strerror}); check {settings}") from None
    return listener


def serve(app: Starlette, listener: socket.socket, *, path: str, concurrent: int, graceful_seconds: float) -> None:
    """Serve until SIGTERM or Ctrl-C, and say on standard output where.

    Args:
        app: what answers.
        listener: of `listen`.
        path: that is worth naming.
        concurrent: see `Server`.
        graceful_seconds: see `Server`.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # what uvicorn raises once more when it has stopped
    host, port, *_ = listener.getsockname()
    name = f"[{host}]" if ":" in host else host

    def started() -> None:
        sys.stdout.write(f"listening at http://{name}:{port}{path}\n")
        sys.stdout.flush()
        log.info("listening", extra=event(Event.LISTENING, port=port))

    Server(app, concurrent=concurrent, graceful_seconds=graceful_seconds, started=started).run(sockets=[listener])
