"""Serves the figures of both pipelines to Prometheus: ``python -m scaling.exporter [--once]``.

Belongs here: one scrape and its time, the HTTP server, the command. Does not: the figures (`scaling.exported`,
`scaling.exported_dagster`), or how labels stay few (`scaling.exposition`).

A scrape has parts. Each reads in a short read-only transaction of its own, beside the others, and waits neither for
locks nor longer than EXPORTER_TIMEOUT_SECONDS. One that fails or is too late leaves out its own figures only, never a
zero in place of one, and `pipeline_scrape_part_ok` says which it was. Scrapes that come while one is under way get the
answer of the next, so however many ask, one at a time reads.
"""

import argparse
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import FrameType

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from psycopg import conninfo

from scaling import exported, exported_dagster
from scaling.databases import DatabaseRouter, Shard
from scaling.errors import UserError, run_command
from scaling.exposition import gauge, one
from scaling.logs import Event, event
from scaling.settings import DagsterStorageSettings, DatabaseSettings, ExporterSettings, load

logger = logging.getLogger(__name__)

CONNECTIONS = 4
"""Beside the pool of the runs; parts beyond it wait for each other, well within the time of a scrape."""


@dataclass(frozen=True, slots=True)
class Part:
    """Figures that are read together, and fail together.

    Attributes:
        name: label of `pipeline_scrape_part_ok`.
        read: them; raises when it cannot.
    """

    name: str
    read: Callable[[], Sequence[Metric]]


class _Reading:
    """One reading of a part, in a thread that nobody has to wait for."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self.families: Sequence[Metric] | None = None
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._run, name=f"scrape-{part.name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        began = time.monotonic()
        try:
            families = self._part.read()
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one part must not cost the others
            logger.warning(
                "part %s of the scrape failed: %s: %s",
                self._part.name,
                type(error).__name__,
                error,
                extra=event(Event.SCRAPE_PART_FAILED, part=self._part.name),
            )
            self.seconds = time.monotonic() - began
            return
        self.seconds = time.monotonic() - began
        self.families = families

    def wait(self, seconds: float) -> bool:
        """Whether it is over after so long."""
        self._thread.join(max(seconds, 0.0))
        return not self._thread.is_alive()

    @property
    def is_over(self) -> bool:
        """Whether its thread has ended."""
        return not self._thread.is_alive()


class PipelineCollector(Collector):
    """Reads every part at each scrape.

    Attributes:
        parts: in the order of their output.
    """

    def __init__(self, parts: Sequence[Part], *, limit_seconds: float) -> None:
        """Make the collector.

        Args:
            parts: what is read.
            limit_seconds: for all of them together.
        """
        self.parts = tuple(parts)
        self._limit_seconds = limit_seconds
        self._lock = threading.Lock()
        self._began = float("-inf")
        self._scraped: list[Metric] = []
        self._late: dict[str, _Reading] = {}

    def collect(self) -> Iterable[Metric]:
        """Read all parts, or share the answer of a scrape that began after this one was asked for."""
        asked = time.monotonic()
        with self._lock:
            if self._began < asked:
                self._began = time.monotonic()
                self._scraped = self._scrape()
            return list(self._scraped)

    def _scrape(self) -> list[Metric]:
        began = time.monotonic()
        # A part that is still stuck in an earlier scrape is not begun again: its connections would add up.
        self._late = {name: reading for name, reading in self._late.items() if not reading.is_over}
        readings = {part.name: _Reading(part) for part in self.parts if part.name not in self._late}
        families: list[Metric] = []
        ok: dict[str, bool] = {}
        seconds: dict[str, float] = {}
        for part in self.parts:
            reading = readings.get(part.name)
            over = reading is not None and reading.wait(began + self._limit_seconds - time.monotonic())
            ok[part.name] = bool(over and reading and reading.families is not None)
            seconds[part.name] = reading.seconds if over and reading else self._limit_seconds
            if reading is None or not over:
                if reading is not None:
                    self._late[part.name] = reading
                logger.warning(
                    "part %s of the scrape took longer than %g s",
                    part.name,
                    self._limit_seconds,
                    extra=event(Event.SCRAPE_PART_FAILED, part=part.name),
                )
            elif reading.families is not None:
                families += reading.families
        return [
            *families,
            gauge(
                "pipeline_scrape_part_ok",
                "Whether the figures of this part could be read in this scrape, 1 or 0.",
                [((name,), float(fine)) for name, fine in ok.items()],
                ["part"],
            ),
            gauge(
                "pipeline_scrape_part_seconds",
                "How long reading this part took.",
                [((name,), took) for name, took in seconds.items()],
                ["part"],
            ),
            one("pipeline_scrape_seconds", "How long reading all parts took.", time.monotonic() - began),
        ]


def registry(router: DatabaseRouter, dagster: Shard | None, settings: ExporterSettings) -> CollectorRegistry:
    """Everything that is exported.

    Args:
        router: to the databases.
        dagster: Dagster's own database; None: nothing of it is exported.
        settings: time limits.

    Returns:
        A registry of its own, with nothing of this process in it.

    Raises:
        UserError: a setting is missing or wrong.
    """
    limit = settings.exporter_timeout_seconds
    parts = [Part(name, read) for name, read in exported.parts(router, limit_seconds=limit).items()]
    if dagster is not None:
        parts += [Part(name, read) for name, read in exported_dagster.parts(dagster, limit_seconds=limit).items()]
    made = CollectorRegistry(auto_describe=False)
    made.register(PipelineCollector(parts, limit_seconds=limit))
    return made


def storage(settings: DagsterStorageSettings) -> Shard | None:
    """Dagster's own database; None when it is not named.

    Args:
        settings: where it is.
    """
    if settings.dagster_pg_host is None:
        return None
    password = settings.dagster_pg_password
    dsn = conninfo.make_conninfo(
        host=settings.dagster_pg_host,
        port=settings.dagster_pg_port,
        user=settings.dagster_pg_user,
        password=password.get_secret_value() if password else None,
        dbname=settings.dagster_pg_db,
    )
    return Shard("dagster", dsn, pool_size=CONNECTIONS, application_name="exporter")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes them from the process.

    Returns:
        The exit code; with --once 1 when a part could not be read.

    Raises:
        UserError: a setting is missing or wrong, or the port is taken.
    """
    parser = argparse.ArgumentParser(
        prog="python -m scaling.exporter",
        description="Serves the figures of both pipelines at /metrics until SIGTERM; needs DATABASE_URL, and "
        "DAGSTER_PG_HOST for the figures of Dagster.",
    )
    parser.add_argument("--once", action="store_true", help="print them once, and end")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    settings = load(ExporterSettings)
    database = load(DatabaseSettings)
    small = database.model_copy(update={"database_pool_size": min(database.database_pool_size, CONNECTIONS)})
    with ExitStack() as stack:
        router = stack.enter_context(DatabaseRouter.from_settings(small, application_name="exporter"))
        dagster = storage(load(DagsterStorageSettings))
        if dagster is not None:
            stack.callback(dagster.close)
        everything = registry(router, dagster, settings)
        if given.once:
            text = generate_latest(everything).decode()
            sys.stdout.write(text)
            return 1 if _broken(text) else 0
        _serve(everything, settings)
    return 0


def _broken(text: str) -> list[str]:
    """Parts that could not be read."""
    return [line for line in text.splitlines() if line.startswith("pipeline_scrape_part_ok{") and line.endswith(" 0.0")]


def _serve(everything: CollectorRegistry, settings: ExporterSettings) -> None:
    host, port = settings.exporter_host, settings.exporter_port
    try:
        server, thread = start_http_server(port, host, everything)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port} ({error.strerror}); check EXPORTER_HOST and EXPORTER_PORT"
        ) from None
    ended = threading.Event()

    def end(_signal: int, _frame: FrameType | None) -> None:
        ended.set()

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, end)
    name = f"[{host}]" if ":" in host else host
    sys.stdout.write(f"listening at http://{name}:{server.server_port}/metrics\n")
    sys.stdout.flush()
    logger.info("listening", extra=event(Event.LISTENING, port=server.server_port))
    ended.wait()
    server.shutdown()
    server.server_close()
    thread.join()


if __name__ == "__main__":
    run_command(main)
