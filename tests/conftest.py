"""What every test may use: real servers, a fresh database, a fresh bucket, a fresh Google.

One Postgres and one S3 server serve all workers of a session. The first test that needs them starts them;
they end with the session's controller, however it ends.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, cast
from uuid import uuid4

import botocore.loaders
import psycopg
import pytest
from playwright.sync_api import Browser
from psycopg import sql

from devstack import aws as aws_server
from devstack import otlp, servers
from devstack.aws import Aws
from devstack.browser import chromium
from devstack.otlp import Collector
from devstack.processes import Supervisor
from devstack.servers import Bucket, Database, Servers
from scaling import tracing
from scaling.errors import UserError
from scaling.settings import (
    AlertSettings,
    ArchiveSettings,
    AutomationSettings,
    DatabaseSettings,
    LogSettings,
    ScalingSettings,
    SyncSettings,
)
from tests import places

CONTROLLER = "devstack_controller"


def pytest_configure_node(node: object) -> None:
    """Tell each xdist worker which session it belongs to."""
    node.workerinput[CONTROLLER] = os.getpid()  # type: ignore[attr-defined]  # xdist's WorkerController


def _controller(config: pytest.Config) -> int:
    return int(getattr(config, "workerinput", {}).get(CONTROLLER, os.getpid()))


def pytest_configure(config: pytest.Config) -> None:
    """Let temporary files lie beside the servers."""
    if _controller(config) == os.getpid():
        places.remove_what_the_dead_left()
        places.of_session(os.getpid()).mkdir(parents=True, mode=0o700)
        temporary = places.of_temporary_files(os.getpid())
        temporary.mkdir()
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(temporary))


def pytest_unconfigure(config: pytest.Config) -> None:
    if _controller(config) == os.getpid():
        servers.leave(places.of_servers(os.getpid()))
        shutil.rmtree(places.of_session(os.getpid()), ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _aws_models_are_read_once() -> Iterator[None]:
    """Let all sessions of botocore share what they read from its own files: 0.1 s of CPU for each client otherwise."""
    make, read = botocore.loaders.Loader.__init__, dict[object, object]()

    def make_sharing(loader: object, *arguments: Any, **options: Any) -> None:
        make(cast("botocore.loaders.Loader", loader), *arguments, **options)
        vars(loader)["_cache"] = read

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.loaders.Loader, "__init__", make_sharing)
        yield


@pytest.fixture(scope="session")
def running_servers(pytestconfig: pytest.Config) -> Servers:
    """Postgres and S3 of this session."""
    controller = _controller(pytestconfig)
    return servers.join(places.of_servers(controller), controller)


@pytest.fixture(scope="session")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aws]:
    """KMS, Glue and Athena of this session; tests share them, so each names its own keys, databases and workgroups."""
    with Supervisor(tmp_path_factory.mktemp("aws")) as supervisor:
        yield aws_server.start(supervisor)


@pytest.fixture
def database(running_servers: Servers) -> Iterator[Database]:
    """A fresh database with the SaaS's and the pipeline's tables, empty."""
    with running_servers.database() as fresh:
        yield fresh


@pytest.fixture
def bucket(running_servers: Servers, request: pytest.FixtureRequest) -> Iterator[Bucket]:
    """A fresh bucket; `@pytest.mark.lockable_bucket` makes it one with versions and Object Lock."""
    with running_servers.bucket(lockable=request.node.get_closest_marker("lockable_bucket") is not None) as fresh:
        yield fresh


@pytest.fixture
def login(running_servers: Servers, database: Database) -> Iterator[Callable[..., str]]:
    """Make login roles of the fresh database: `login("pipeline_reader")` is the DSN of one that is a member of that."""
    names: list[str] = []

    def make(*member_of: str) -> str:
        names.append(f"test_{uuid4().hex[:12]}")
        with psycopg.connect(database.admin_dsn, autocommit=True) as admin:
            role = sql.Identifier(names[-1])
            admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(role, names[-1]))
            for group in member_of:
                admin.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(group), role))
        return running_servers.postgres.dsn(database.name, user=names[-1], password=names[-1])

    yield make
    with psycopg.connect(database.admin_dsn, autocommit=True) as admin:
        for name in names:
            admin.execute(sql.SQL("DROP OWNED BY {0} CASCADE; DROP ROLE {0}").format(sql.Identifier(name)))


@pytest.fixture
def settings_environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set exactly the pipelines' variables: `settings_environment(database, bucket, SYNC_PARALLELISM="2")`."""

    def apply(database: Database | None = None, bucket: Bucket | None = None, **others: str) -> None:
        for group in (
            DatabaseSettings,
            SyncSettings,
            ArchiveSettings,
            AutomationSettings,
            AlertSettings,
            ScalingSettings,
            LogSettings,
        ):
            for name in group.model_fields:
                monkeypatch.delenv(name.upper(), raising=False)
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        values: Mapping[str, str] = {
            **(database.environment() if database else {}),
            **(bucket.environment() if bucket else {}),
            **others,
        }
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return apply


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector that runs of this test send their traces to."""
    with otlp.collector() as running:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", running.endpoint)
        yield running
        tracing.stop()


@pytest.fixture
def definitions_load_alone() -> Iterator[None]:
    """Let definitions load without an instance, whichever tests ran before.

    Dagster keeps the state storage of an instance in a context variable and restores the one before when an instance
    is closed or collected, in whatever order that happens; a closed one then fails the next load.
    """
    from dagster._core.storage.defs_state.base import set_defs_state_storage  # 2 s to import, for those who need it

    with set_defs_state_storage(None):
        yield


@pytest.fixture
def browser() -> Iterator[Browser]:
    """The Chromium of this machine; the test is skipped where there is none."""
    with ExitStack() as stack:
        try:
            started = stack.enter_context(chromium())
        except UserError as missing:
            pytest.skip(str(missing))
        yield started
