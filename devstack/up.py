"""`python -m devstack.up`: the whole stack with the Dagster UI, schedules and sensors on, until Ctrl-C.

Belongs here: the command line and what it tells the person. Does not: how the stack starts (stack.py).
"""

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from devstack import history, stack
from devstack.processes import VAR, free_port
from devstack.stack import Stack
from scaling.errors import UserError, run_command

DIRECTORY = VAR / "up"
PORT = 3000
PORTS_TRIED = 20


def choose_port(wanted: int | None) -> int:
    """Choose the port of the Dagster UI.

    Args:
        wanted: by the user; None prefers 3000 and takes the next free one.

    Returns:
        A free port.

    Raises:
        UserError: the wanted one is taken.
    """
    for port in range(PORT, PORT + PORTS_TRIED) if wanted is None else [wanted]:
        if free_port(port) == port:
            return port
    if wanted is not None:
        raise UserError(f"Port {wanted} of 127.0.0.1 is taken; stop what listens there, or choose another --port.")
    return free_port()


def greeting(running: Stack, url: str) -> Panel:
    """Say where everything is.

    Args:
        running: the stack.
        url: of the Dagster UI.
    """
    places = Table.grid(padding=(0, 2))
    places.add_column(style="bold")
    places.add_column(overflow="fold")
    places.add_row("Dagster", url)
    if page := running.environment.get("SCALING_REPORT_URL"):
        places.add_row("Report", f"{page} (is anything wrong? one page)")
    if traces := running.environment.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        places.add_row("Traces", f"{traces} (of runs; each run's page links its own)")
    if port := running.environment.get("EXPORTER_PORT"):
        places.add_row("Metrics", f"http://127.0.0.1:{port}/metrics (for Prometheus)")
    places.add_row("Postgres", f"127.0.0.1:{running.servers.postgres.port}, database {running.database.name}")
    places.add_row("S3", f"{running.servers.s3.endpoint}, bucket {running.bucket.name}")
    places.add_row("Google Calendar", f"{running.google.url} (simulated; control API under /_sim)")
    if address := running.environment.get("SYNC_WEBHOOK_URL"):
        places.add_row("Push", f"{address} (where Google Calendar says that something changed)")
    places.add_row("Logs", str(running.directory / "log"))
    places.add_row("In a shell", f"set -a; . {running.directory / 'environment'}; set +a")
    return Panel(
        places, title="Everything runs, Ctrl-C stops it", subtitle="schedules and sensors are on", expand=False
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes them from the process.

    Returns:
        The exit code.

    Raises:
        UserError: a part did not start, or died.
    """
    parser = argparse.ArgumentParser(
        prog="python -m devstack.up",
        description="Postgres, S3, a simulated Google Calendar and Dagster on this machine, with demo data.",
    )
    parser.add_argument("--port", type=int, help=f"of the Dagster UI; by default {PORT}, or the next free one")
    parser.add_argument("--no-push", action="store_true", help="poll every calendar, without push notifications")
    options = parser.parse_args(arguments)
    port = choose_port(options.port)
    console = Console()
    if options.port is None and port != PORT:
        console.print(f"Port {PORT} is taken, so the UI is on {port}.")
    with (
        console.status("Starting Postgres, S3, Google Calendar and Dagster") as status,
        stack.running(
            DIRECTORY,
            disposable=False,
            push=not options.no_push,
            past=True,
            watched=True,
            settings={**history.SETTINGS, "PIPELINE_AUTOSTART": "true"},
        ) as running,
    ):
        ui = stack.start_webserver(running, port=port)
        for job in ("scaling_metrics_job", "scaling_forecasts_job"):  # their schedules would be hours away
            ui.launch_job("scaling", job)
        stack.start_daemon(running, ui)
        status.stop()
        console.print(greeting(running, ui.url))
        try:
            running.supervisor.wait()
        except KeyboardInterrupt:
            status.update("Stopping")
            status.start()
    console.print("Stopped. The data stays in var/up; make clean removes it.")
    return 0


if __name__ == "__main__":
    run_command(main)
