"""Serves the page for people without Grafana: ``python -m scaling.report_server``, behind a proxy that asks who it is.

Belongs here: answering with the page as it is now, and keeping many readers from asking the database as often. Does
not: what the page says (`scaling.report`) or how it looks (`scaling.report_page`).

The page names workspaces and who approved what, and there is no login here: like Dagster's own UI it listens on
127.0.0.1 unless told otherwise, and whoever lets others in puts a proxy with a login before it.
"""

import argparse
import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psycopg
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from scaling import report, report_page
from scaling.databases import DatabaseRouter
from scaling.errors import UserError, run_command
from scaling.http_server import listen, serve
from scaling.settings import DatabaseSettings, ReportServerSettings, load

KEPT_SECONDS = 30.0
"""A page costs 0.5 to 3 s of CPU, by the size of the fleet; figures change every few minutes."""
CONCURRENT_REQUESTS = 50
GRACEFUL_SECONDS = 5.0
CONNECTIONS = 2
HEADERS = {
    "Cache-Control": "private, max-age=30",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""The page has no script and asks for nothing; a browser is to hold it to that, whatever a name in it says."""


@dataclass(frozen=True, slots=True)
class _Made:
    html: str
    at: float


class Page:
    """The newest page, made again when somebody asks and it is old; whoever asks meanwhile waits for the same one."""

    def __init__(self, make: Callable[[], str], *, clock: Callable[[], float] = time.monotonic) -> None:
        """Keep what is made.

        Args:
            make: the page; raises UserError when the database does not answer.
            clock: seconds.
        """
        self._make = make
        self._clock = clock
        self._lock = threading.Lock()
        self._made: _Made | None = None

    def html(self) -> str:
        """The page.

        Raises:
            UserError: the database does not answer.
        """
        with self._lock:
            if self._made is None or self._clock() - self._made.at >= KEPT_SECONDS:
                self._made = _Made(self._make(), self._clock())
            return self._made.html


def make_app(page: Page) -> Starlette:
    """Make the ASGI application: the page at `/`, `GET /healthz` for load balancers.

    Args:
        page: that is served.
    """

    async def show(request: Request) -> Response:
        del request
        try:
            return HTMLResponse(await asyncio.to_thread(page.html), headers=HEADERS)
        except UserError as error:
            return PlainTextResponse(f"There is no page now: {error}.\n", status_code=503)
        except psycopg.Error as error:
            return PlainTextResponse(f"There is no page now: {type(error).__name__}.\n", status_code=503)

    async def health(request: Request) -> Response:
        del request
        return PlainTextResponse("ok\n")

    return Starlette(
        routes=[
            Route("/", show, methods=["GET"]),
            Route("/healthz", health, methods=["GET"]),
        ]
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
        prog="python -m scaling.report_server",
        description="Serves the page of python -m scaling report, as it is now, until SIGTERM; needs DATABASE_URL.",
    ).parse_args(arguments)
    settings = load(ReportServerSettings)
    database = load(DatabaseSettings)
    small = database.model_copy(update={"database_pool_size": min(database.database_pool_size, CONNECTIONS)})
    report.configuration()  # what is wrong with it is said now, not to the first reader
    with (
        DatabaseRouter.from_settings(small, application_name="report_server") as router,
        listen(settings.report_host, settings.report_port, settings="REPORT_HOST and REPORT_PORT") as listener,
    ):
        page = Page(lambda: report_page.render(report.current(router)))
        serve(make_app(page), listener, path="/", concurrent=CONCURRENT_REQUESTS, graceful_seconds=GRACEFUL_SECONDS)
    return 0


if __name__ == "__main__":
    run_command(main)
