"""A workspace with a simulated Google account, and the sync wired to both."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from uuid import UUID, uuid4

import dagster as dg
import psycopg
import pytest
from cryptography.fernet import Fernet

from devstack.google_calendar import SimulatedUser, Simulator, Truth, run_simulator
from devstack.servers import Database, Servers
from scaling.databases import DatabaseRouter, Shard
from sync_pipeline import tick
from sync_pipeline.cadence import Cadence
from sync_pipeline.events import Json, read_event
from sync_pipeline.google_calendar import EVENT_PARAMETERS, GoogleCalendar
from sync_pipeline.grants import GrantCipher
from sync_pipeline.services import Services
from sync_pipeline.tick import TickResult
from sync_pipeline.workspaces import Workspace

KEY = Fernet.generate_key().decode()
COMPARED = (
    "status",
    "event_type",
    "summary",
    "description",
    "start_at",
    "start_date",
    "start_zone",
    "end_at",
    "end_date",
    "recurrence",
    "recurring_event_id",
    "original_start_at",
    "original_start_date",
    "sequence",
    "updated_at",
)
MASTER = COMPARED.index("recurring_event_id")


@pytest.fixture(scope="session")
def simulator() -> Iterator[Simulator]:
    with run_simulator(users=0) as running:
        yield running


@pytest.fixture
def google(simulator: Simulator) -> Simulator:
    """A Google without accounts, faults or quotas."""
    simulator.reset(users=0)
    simulator.clear_faults()
    simulator.configure(quota_project_per_minute=10_000_000, quota_user_per_minute=10_000_000)
    return simulator


@dataclass
class Saas:
    """The SaaS's side of the database, and what its users see."""

    dsn: str = field(repr=False)

    def execute(self, statement: str, *parameters: object) -> list[tuple[object, ...]]:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            cursor = connection.execute(statement.encode(), parameters)
            return cursor.fetchall() if cursor.description else []

    def one(self, statement: str, *parameters: object) -> tuple[object, ...]:
        (row,) = self.execute(statement, *parameters)
        return row

    def workspace(self, tenant_id: UUID | None = None) -> Workspace:
        tenant, workspace = tenant_id or uuid4(), uuid4()
        self.execute("INSERT INTO public.tenants (id, name) VALUES (%s, 'Tenant') ON CONFLICT DO NOTHING", tenant)
        self.execute("INSERT INTO public.workspaces (id, tenant_id, name) VALUES (%s, %s, 'W')", workspace, tenant)
        return Workspace(tenant, workspace)

    def connect(self, workspace: Workspace, user: SimulatedUser) -> UUID:
        person, connection = uuid4(), uuid4()
        self.execute(
            "INSERT INTO public.users (id, tenant_id, email, google_api_enabled) VALUES (%s, %s, %s, true)",
            person,
            workspace.tenant_id,
            f"{person}@saas.example",
        )
        self.execute(
            "INSERT INTO public.google_connections "
            "(id, tenant_id, workspace_id, user_id, google_account, refresh_token_encrypted) "
            "VALUES (%s, %s, %s, %s, %s, %s)",
            connection,
            workspace.tenant_id,
            workspace.workspace_id,
            person,
            user.email,
            GrantCipher([KEY]).encrypt(user.refresh_token),
        )
        return connection

    def regrant(self, connection: UUID, refresh_token: str) -> None:
        self.execute(
            "UPDATE public.google_connections SET refresh_token_encrypted = %s WHERE id = %s",
            GrantCipher([KEY]).encrypt(refresh_token),
            connection,
        )

    def events(self, workspace: Workspace, calendar_id: str) -> dict[str, tuple[object, ...]]:
        """Live events by id: what `COMPARED` names."""
        rows = self.execute(
            f"SELECT event_id, {', '.join(COMPARED)} FROM sync.calendar_events "
            "WHERE tenant_id = %s AND workspace_id = %s AND calendar_id = %s",
            workspace.tenant_id,
            workspace.workspace_id,
            calendar_id,
        )
        return {str(row[0]): row[1:] for row in rows}

    def calendar(self, calendar_id: str, columns: str) -> tuple[object, ...]:
        return self.one(f"SELECT {columns} FROM sync.calendar_state WHERE calendar_id = %s", calendar_id)


@pytest.fixture
def saas(database: Database) -> Saas:
    return Saas(database.admin_dsn)


class Sleeps(list[float]):
    """Stands in for sleeping: returns at once and remembers."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)
        threading.Event().wait(min(seconds, 0.005))


@pytest.fixture
def sleeps() -> Sleeps:
    return Sleeps()


MakeServices = Callable[..., Services]


def google_calendar(google: Simulator, sleeps: Callable[[float], None], **options: float) -> GoogleCalendar:
    return GoogleCalendar(
        endpoint=google.url,
        token_url=google.token_url,
        client_id="client",
        client_secret="secret",
        sleep=sleeps,
        rng=Random(1),
        **options,
    )


@pytest.fixture
def services(database: Database, google: Simulator, sleeps: Sleeps) -> Iterator[Services]:
    """The sync, with nothing ever waited for: every calendar is due at every tick."""
    with DatabaseRouter(Shard("main", database.dsn)) as router:
        yield Services(
            router=router,
            google=google_calendar(google, sleeps),
            cipher=GrantCipher([KEY]),
            cadence=Cadence(poll_seconds=0.0, list_seconds=0.0, rng=Random(1)),
            parallelism=4,
            time_budget_seconds=60.0,
            sleep=sleeps,
        )


@pytest.fixture
def tick_once(services: Services) -> Callable[[], TickResult]:
    return lambda: tick.run_tick(services, run_id=f"test-{uuid4()}")


@pytest.fixture
def pages_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let Google give pages of so many events: `pages_of(2)`."""

    def apply(size: int) -> None:
        monkeypatch.setattr("sync_pipeline.google_calendar.EVENT_PARAMETERS", {**EVENT_PARAMETERS, "maxResults": size})

    return apply


def differences(saas: Saas, workspace: Workspace, calendar_id: str, truth: Truth) -> dict[str, object]:
    """What Google has and Postgres shows, where they differ; empty when they agree.

    A cancelled instance of what is no series any more says nothing, wherever it is kept.
    """
    series = {event_id for event_id, event in truth.events.items() if event.get("recurrence")}
    wanted = {event_id: _row(event) for event_id, event in truth.events.items()}
    cancelled = {event_id: ("cancelled", event_id.rpartition("_")[0]) for event_id in truth.cancelled_instances}
    shown: dict[str, tuple[object, ...]] = saas.events(workspace, calendar_id)
    shown = {
        event_id: (row[0], row[MASTER]) if row[0] == "cancelled" else row
        for event_id, row in shown.items()
        if row[0] != "cancelled" or row[MASTER] in series
    }
    everything: dict[str, tuple[object, ...]] = {**wanted, **cancelled}
    return {
        event_id: (everything.get(event_id), shown.get(event_id))
        for event_id in everything.keys() | shown.keys()
        if everything.get(event_id) != shown.get(event_id)
    }


def _row(event: dict[str, Json]) -> tuple[object, ...]:
    row = read_event(event)
    return tuple(list(value) if isinstance(value := getattr(row, name), tuple) else value for name in COMPARED)


@pytest.fixture
def sync_environment(
    database: Database, google: Simulator, settings_environment: Callable[..., None]
) -> Callable[..., None]:
    """Set the variables a run reads: `sync_environment(SYNC_PARALLELISM="2")`."""

    def apply(**others: str) -> None:
        settings_environment(
            database,
            **{
                "GOOGLE_CLIENT_ID": "client",
                "GOOGLE_CLIENT_SECRET": "secret-of-the-client",
                "GRANT_ENCRYPTION_KEYS": KEY,
                "GOOGLE_API_ENDPOINT": google.url,
                "GOOGLE_TOKEN_URL": google.token_url,
                "SYNC_POLL_INTERVAL_SECONDS": "0",
                "SYNC_POLL_CEILING_SECONDS": "0",
                "SYNC_CALENDAR_LIST_INTERVAL_SECONDS": "0",
                "SCALING_INCREMENTAL_SYNC": "on",
                "SCALING_PARALLEL_SYNC": "on",
                **others,
            },
        )

    apply()
    return apply


@pytest.fixture(scope="module")
def instance(running_servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dg.DagsterInstance]:
    """A Dagster instance whose storage is Postgres, as in production."""
    name = f"dagster_{uuid4().hex[:12]}"
    server = running_servers.postgres
    server.create_database(name)
    storage = {
        "username": "postgres",
        "password": server.password,
        "hostname": "127.0.0.1",
        "port": server.port,
        "db_name": name,
        "scheme": "postgresql+psycopg2",
    }
    with dg.instance_for_test(
        overrides={"storage": {"postgres": {"postgres_db": storage}}},
        temp_dir=str(tmp_path_factory.mktemp("dagster")),
    ) as made:
        # As the webserver does: connections are kept. A run of a test writes its events in half the time so.
        made.optimize_for_webserver(statement_timeout=60_000, pool_recycle=3600, max_overflow=20)
        yield made
    server.drop_database(name)
