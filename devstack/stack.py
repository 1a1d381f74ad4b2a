"""The whole stack of one directory: Postgres, S3, Google Calendar, the SaaS's data, push, and Dagster on top.

Belongs here: composing them, the environment that the pipelines' processes get, generated secrets.
Does not: how each server runs (postgres.py, s3.py, google_calendar/), what is done with the stack (up.py, demo.py).

Everything lives in the directory: data, logs, secrets (readable by the owner only), and `environment`, a
file that a shell can source to talk to the running stack.
"""

import contextlib
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import httpx
import psycopg
from cryptography.fernet import Fernet

from archive_pipeline.signing import new_key
from devstack import history, saas, servers
from devstack.dagster_ui import DagsterUi
from devstack.google_calendar import Simulator
from devstack.processes import CHECKOUT, Supervisor, free_port, free_ports
from devstack.saas import seed
from devstack.servers import Bucket, Database
from scaling import migrate
from scaling.errors import UserError

SAAS_DATABASE = "saas"
DAGSTER_DATABASE = "dagster"
BUCKET = "audit-archive"
CLIENT_ID = "devstack.apps.googleusercontent.com"
# What a process needs to run at all. Nothing else of the caller's environment reaches the pipelines: an
# AWS_PROFILE or a DATABASE_URL of a real system must not end up in a demo.
INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TERM")


@dataclass(frozen=True, slots=True)
class Stack:
    """A running stack, as those see it who use it."""

    directory: Path
    supervisor: Supervisor
    servers: servers.Servers
    database: Database
    bucket: Bucket
    google: Simulator
    first_month: datetime
    """Start of the oldest month of audit logs, UTC."""
    environment: Mapping[str, str] = field(repr=False)
    """The whole environment of the pipelines' processes."""


@contextlib.contextmanager
def running(
    directory: Path,
    *,
    disposable: bool,
    profile: str = "demo",
    audit_rows: int = seed.AUDIT_ROWS,
    push: bool = False,
    past: bool = False,
    watched: bool = False,
    settings: Mapping[str, str] | None = None,
) -> Iterator[Stack]:
    """Run a stack: servers, tables, migrations, demo data.

    Dagster comes on top with `start_webserver` and `start_daemon`.

    Args:
        directory: for everything; what an earlier run left in it is used again.
        disposable: true trades durability across machine crashes for speed.
        profile: the simulator's world.
        audit_rows: rows of `audit_logs` when they are seeded.
        past: also write what a SaaS has behind it that is about to outgrow its thresholds.
        push: also start the receiver of push notifications, and let the sync open channels to it.
        watched: also serve the figures for Prometheus, the page of all figures, and the traces of runs.
        settings: further environment variables of the pipelines, over the stack's own.

    Yields:
        The stack; it stops when the block ends, however it ends.

    Raises:
        UserError: another process runs it, or a part cannot start.
    """
    with Supervisor(directory) as supervisor, ThreadPoolExecutor(2) as pool:
        secrets = _secrets(supervisor.directory / "secrets.json")
        google_started = pool.submit(start_google, supervisor, profile=profile, secret=secrets["client_secret"])
        both = servers.start(supervisor, disposable=disposable)
        google = google_started.result()
        admin_dsn = both.postgres.create_database(SAAS_DATABASE)
        both.postgres.create_database(DAGSTER_DATABASE)
        saas.create(both.postgres, SAAS_DATABASE)
        database = Database(
            SAAS_DATABASE,
            admin_dsn,
            saas.pipeline_dsn(both.postgres, SAAS_DATABASE),
            saas.owner_dsn(both.postgres, SAAS_DATABASE),
        )
        migrate.upgrade(database.dsn)
        first_month = _seed(database, google, secrets["grant_key"], audit_rows)
        if past:
            with psycopg.connect(database.admin_dsn) as connection:
                history.seed(connection, datetime.now(UTC))
        both.s3.create_bucket(BUCKET)
        bucket = Bucket(BUCKET, both.s3)
        environment = {
            **{name: os.environ[name] for name in INHERITED if name in os.environ},
            **database.environment(),
            **bucket.environment(),
            **_google_environment(google, secrets),
            **_dagster_environment(supervisor.directory, both),
            **(start_webhook(supervisor, database) if push else {}),
            "ARCHIVE_FIRST_MONTH": f"{first_month:%Y-%m}",
            "ARCHIVE_SIGNING_KEY": secrets["signing_key"],
            "PYTHONUNBUFFERED": "1",
            # The stack shows the sync at its best; what the thresholds switch on is shown with other settings.
            "SCALING_INCREMENTAL_SYNC": "on",
            "SCALING_PARALLEL_SYNC": "on",
            **(settings or {}),
        }
        if watched:
            environment |= start_watchers(supervisor, environment)
        _write_environment(supervisor.directory / "environment", environment)
        with google:
            yield Stack(supervisor.directory, supervisor, both, database, bucket, google, first_month, environment)


def start_google(supervisor: Supervisor, *, profile: str, secret: str, arguments: Sequence[str] = ()) -> Simulator:
    """Start the Google Calendar simulator of a stack.

    Args:
        supervisor: owns the process.
        profile: the world it is born with.
        secret: the only client secret it accepts, for client id `CLIENT_ID`.
        arguments: further command line arguments.

    Returns:
        A client of its control plane, which knows where it is and who its users are.

    Raises:
        ProcessFailedError: it did not start.
    """
    greeting = supervisor.directory / "google.json"
    options = ["--port", "0", "--seed", "1", "--profile", profile, "--client-id", CLIENT_ID, "--client-secret", secret]
    supervisor.start(
        "google_calendar",
        [sys.executable, "-m", "devstack.google_calendar", *options, *arguments],
        environment={name: os.environ[name] for name in INHERITED if name in os.environ},
        working_directory=CHECKOUT,
        ready=lambda: greeting.exists() and greeting.read_bytes().endswith(b"\n"),
        output=greeting,
    )
    return Simulator(json.loads(greeting.read_bytes()))


def start_webhook(supervisor: Supervisor, database: Database) -> dict[str, str]:
    """Start the receiver of push notifications.

    Args:
        supervisor: owns the process.
        database: that knows the channels.

    Returns:
        What tells the sync where it is, as environment variables.

    Raises:
        ProcessFailedError: it did not start.
    """
    # Another port, that is another address, at every start: the sync opens its channels anew, which the simulator
    # forgets when it stops.
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    environment = {"SYNC_WEBHOOK_URL": f"{address}/google-calendar", "SYNC_WEBHOOK_PORT": str(port)}
    needed = {
        **{name: os.environ[name] for name in INHERITED if name in os.environ},
        **database.environment(),
        **environment,
    }
    _start_server(supervisor, "webhook", _module("sync_pipeline.webhook"), needed, f"{address}/healthz")
    return environment


def start_watchers(supervisor: Supervisor, environment: Mapping[str, str]) -> dict[str, str]:
    """Start what shows how the pipelines are: the exporter, the server of the page, a collector that shows traces.

    Args:
        supervisor: owns the processes.
        environment: of the pipelines.

    Returns:
        Where they are, as environment variables.

    Raises:
        ProcessFailedError: one did not start.
    """
    exporter, page, traces = free_ports(("exporter", "page", "traces")).values()
    told = {
        "EXPORTER_PORT": str(exporter),
        "REPORT_PORT": str(page),
        "SCALING_REPORT_URL": f"http://127.0.0.1:{page}/",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{traces}",
        "TRACE_UI_URL": f"http://127.0.0.1:{traces}/trace/{{trace_id}}",
    }
    needed = {**environment, **told}
    _start_server(
        supervisor,
        "traces",
        [*_module("devstack.otlp"), "--port", str(traces)],
        environment,
        f"http://127.0.0.1:{traces}/counts",
    )
    _start_server(supervisor, "exporter", _module("scaling.exporter"), needed, f"http://127.0.0.1:{exporter}/metrics")
    _start_server(supervisor, "report", _module("scaling.report_server"), needed, f"http://127.0.0.1:{page}/healthz")
    return told


def _module(name: str) -> list[str]:
    return [sys.executable, "-m", name]


def _start_server(
    supervisor: Supervisor, name: str, command: Sequence[str], environment: Mapping[str, str], healthy: str
) -> None:
    """Start a server of ours, and wait until it answers at that address."""

    def is_healthy() -> bool:
        try:
            return httpx.get(healthy, trust_env=False).is_success
        except httpx.TransportError:
            return False

    supervisor.start(
        name,
        command,
        environment=environment,
        working_directory=CHECKOUT,
        ready=is_healthy,
    )


def start_webserver(stack: Stack, *, port: int | None = None) -> DagsterUi:
    """Start `dagster-webserver` and wait until it has loaded both code locations.

    Args:
        stack: whose environment it gets.
        port: on 127.0.0.1; picked when None.

    Returns:
        A client of it.

    Raises:
        UserError: it did not start, or a code location did not load (named, with the reason).
    """
    port = port or free_port()
    ui = DagsterUi(f"http://127.0.0.1:{port}")
    _start_dagster(
        stack,
        "dagster-webserver",
        ["-h", "127.0.0.1", "-p", str(port)],
        lambda: ui.is_serving() and ui.load_errors() is not None,
        stop_signal=signal.SIGKILL,  # it holds nothing, and asked to stop it waits for every open page
    )
    for location, reason in (ui.load_errors() or {}).items():
        raise UserError(f"Code location {location} does not load: {reason.splitlines()[-1]}")
    return ui


def start_daemon(stack: Stack, ui: DagsterUi) -> None:
    """Start `dagster-daemon`, which launches what is queued and what is due, and wait until it is healthy.

    Args:
        stack: whose environment it gets.
        ui: of the running webserver.

    Raises:
        ProcessFailedError: it did not start.
    """
    started = time.time()
    _start_dagster(stack, "dagster-daemon", ["run"], lambda: ui.daemons_are_healthy(since=started))


def _start_dagster(
    stack: Stack,
    program: str,
    arguments: Sequence[str],
    ready: Callable[[], bool],
    *,
    stop_signal: signal.Signals = signal.SIGTERM,
) -> None:
    # Dagster's own processes do not know LOG_FORMAT.
    form = ["--log-format", "json"] if stack.environment.get("LOG_FORMAT") == "json" else []
    stack.supervisor.start(
        program,
        [Path(sys.executable).parent / program, *arguments, *form, "-w", CHECKOUT / "workspace.yaml"],
        environment=stack.environment,
        working_directory=CHECKOUT,
        ready=ready,
        ready_timeout_seconds=180,
        stop_signal=stop_signal,
    )


def _seed(database: Database, google: Simulator, grant_key: str, audit_rows: int) -> datetime:
    """Fill the SaaS's tables once; return the first month of audit logs."""
    with psycopg.connect(database.admin_dsn) as connection:
        if not seed.is_seeded(connection):
            seed.seed(
                connection,
                now=datetime.now(UTC),
                accounts=[seed.Account(user.email, user.refresh_token) for user in google.users],
                grant_keys=[grant_key],
                audit_rows=audit_rows,
            )
        row = connection.execute("SELECT date_trunc('month', min(created_at), 'UTC') FROM public.audit_logs").fetchone()
        first: datetime = row[0] if row else datetime.now(UTC)
        return first.astimezone(UTC)


def _google_environment(google: Simulator, secrets: Mapping[str, str]) -> dict[str, str]:
    return {
        "GOOGLE_API_ENDPOINT": google.url,
        "GOOGLE_TOKEN_URL": google.token_url,
        "GOOGLE_CLIENT_ID": CLIENT_ID,
        "GOOGLE_CLIENT_SECRET": secrets["client_secret"],
        "GRANT_ENCRYPTION_KEYS": secrets["grant_key"],
    }


def _dagster_environment(directory: Path, both: servers.Servers) -> dict[str, str]:
    home = directory / "dagster"
    home.mkdir(exist_ok=True)
    link = home / "dagster.yaml"
    link.unlink(missing_ok=True)
    link.symlink_to(CHECKOUT / "dagster.yaml")
    return {
        "DAGSTER_HOME": str(home),
        "DAGSTER_PG_HOST": "127.0.0.1",
        "DAGSTER_PG_PORT": str(both.postgres.port),
        "DAGSTER_PG_USER": "postgres",
        "DAGSTER_PG_PASSWORD": both.postgres.password,
        "DAGSTER_PG_DB": DAGSTER_DATABASE,
        "DAGSTER_EVENT_BATCH_SIZE": "200",
    }


def _secrets(path: Path) -> dict[str, str]:
    """Read the stack's secrets, generating those that it lacks."""
    secrets: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    generated = {name: make() for name, make in SECRETS.items() if name not in secrets}
    if generated:
        secrets |= generated
        unfinished = path.with_suffix(".unfinished")
        unfinished.touch(mode=0o600)
        unfinished.write_text(json.dumps(secrets))
        unfinished.rename(path)
    return secrets


SECRETS: Mapping[str, Callable[[], str]] = {
    "grant_key": lambda: Fernet.generate_key().decode(),
    "client_secret": lambda: os.urandom(16).hex(),
    "signing_key": new_key,
}


def _write_environment(path: Path, environment: Mapping[str, str]) -> None:
    own = {name: value for name, value in environment.items() if name not in INHERITED}
    path.touch(mode=0o600)
    path.write_text(
        "# To work with the running stack from a shell: set -a; . this-file; set +a\n"
        + "".join(f"{name}={shlex.quote(value)}\n" for name, value in sorted(own.items()))
    )
