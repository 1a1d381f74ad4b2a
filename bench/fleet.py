"""A SaaS of thousands of workspaces and the Google accounts behind them, built in seconds.

Belongs here: servers of one bench, tenants, workspaces, users and grants in bulk, and a sync state as if every calendar
had been synced once. The only place in bench/ that makes the sync's `Services`.
Does not: what is measured.

Every workspace has one connected account with one calendar of a few events. The sync state is written in bulk, because
10,000 first syncs would take minutes of every bench; `Fleet.prove_idle` shows with a real tick that it is right.
"""

import json
import os
import random
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, field
from typing import Any, LiteralString
from urllib.parse import quote

import httpx
import psutil
import psycopg
from cryptography.fernet import Fernet

from devstack import postgres, saas
from devstack.google_calendar import SimulatedUser, Simulator, run_simulator
from devstack.postgres import Postgres
from devstack.processes import VAR, Supervisor
from devstack.servers import Database
from scaling import migrate
from scaling.settings import ArchiveSettings, AutomationSettings, CapabilitySettings, DatabaseSettings, SyncSettings
from sync_pipeline import event_store
from sync_pipeline.events import Json, read_items
from sync_pipeline.google_calendar import EVENT_PARAMETERS
from sync_pipeline.google_calendar import token_fingerprint as fingerprint_of
from sync_pipeline.services import Services, open_services
from sync_pipeline.tick import TickResult, run_tick
from sync_pipeline.workspaces import Workspace

NAMESPACE = uuid.UUID("5a0c6f0e-9a43-4a0e-8f6f-3c1b9d0e7a51")
WORKSPACES_PER_TENANT = 4
EVENTS_PER_CALENDAR = 4
NO_QUOTAS = {"quota_user_per_minute": 0, "quota_project_per_minute": 0}
UNLIMITED = "1000000000"
# The limits are left on, so that their cost is measured, but out of reach: the figures are about the pool.
SETTINGS: Mapping[str, str] = {
    "GOOGLE_CLIENT_ID": "client",
    "GOOGLE_CLIENT_SECRET": "secret-of-the-client",
    "SYNC_POLL_INTERVAL_SECONDS": "3600",
    "SYNC_CALENDAR_LIST_INTERVAL_SECONDS": "86400",
    "SYNC_TIME_BUDGET_SECONDS": "3600",
    "SCALING_INCREMENTAL_SYNC": "on",
    "SCALING_PARALLEL_SYNC": "on",
    "SYNC_CALLS_PER_MINUTE": UNLIMITED,
    "SYNC_CALLS_PER_MINUTE_AND_USER": UNLIMITED,
    "SYNC_CALLS_PER_DAY": UNLIMITED,
}


@dataclass(frozen=True, slots=True)
class Member:
    """One workspace and the account connected to it."""

    workspace: Workspace
    connection_id: uuid.UUID
    user: SimulatedUser = field(repr=False)

    @property
    def calendar(self) -> str:
        """Its only calendar, named by the account's address."""
        return self.user.email


@dataclass(frozen=True, slots=True)
class Fleet:
    """A running bench: Postgres, Google, and who is in them."""

    supervisor: Supervisor
    server: Postgres
    database: Database
    google: Simulator
    members: Sequence[Member] = field(repr=False)
    key: str = field(repr=False)

    def environment(self, **others: str) -> dict[str, str]:
        """The variables the sync reads, over the bench's own settings."""
        return {
            **SETTINGS,
            **self.database.environment(),
            "GOOGLE_API_ENDPOINT": self.google.url,
            "GOOGLE_TOKEN_URL": self.google.token_url,
            "GRANT_ENCRYPTION_KEYS": self.key,
            **others,
        }

    @contextmanager
    def services(self, **settings: str) -> Iterator[Services]:
        """The sync as a run has it, made from the settings."""
        with environment(self.environment(**settings)), open_services() as services:
            yield services

    def tick(self, **settings: str) -> TickResult:
        """Run one tick with services of its own."""
        with self.services(**settings) as services:
            return run_tick(services, run_id=f"bench-{uuid.uuid4()}")

    def execute(self, statement: LiteralString, *parameters: object) -> list[tuple[Any, ...]]:
        """Run a statement as the database's owner."""
        with psycopg.connect(self.database.admin_dsn, autocommit=True) as connection:
            cursor = connection.execute(statement, parameters)
            return cursor.fetchall() if cursor.description else []

    def make_due(self) -> None:
        """Every calendar is due, no list is, and whatever an earlier tick punished is forgiven."""
        self.execute(
            "UPDATE sync.calendar_state SET due_at = 'epoch', last_error = NULL, consecutive_failures = 0, "
            "gone_count = 0, breaker_until = NULL, lease_until = NULL, lease_owner = NULL"
        )
        self.execute(
            "UPDATE sync.connection_state SET list_due_at = now() + interval '1 day', parked_until = NULL, "
            "status = 'active', last_error = NULL, consecutive_failures = 0, failed_visits = 0"
        )
        self.execute("VACUUM (ANALYZE) sync.calendar_state, sync.connection_state, sync.workspace_state")

    def change(self, share: float, *, seed: int) -> int:
        """Insert an event into the calendars of a share of the workspaces; return how many."""
        chosen = random.Random(seed).sample(self.members, round(share * len(self.members)))
        for member in chosen:
            self.google.edit(member.calendar, [{"op": "insert", "event": event(f"Change {seed}")}])
        return len(chosen)

    def prove_idle(self) -> None:
        """Tick once and refuse a sync state that is not what a first sync would have left."""
        self.make_due()
        check_idle(self, self.tick().numbers())

    def postgres_cpu_seconds(self) -> float:
        """CPU time of the whole server so far, ended backends included."""
        assert self.server.child is not None
        return cpu_of_postgres(self.server.child.process.pid)


def check_idle(fleet: Fleet, numbers: Mapping[str, float]) -> None:
    """Refuse a tick of an idle fleet that was not one incremental call for each workspace and no change at all."""
    wanted = {"full_syncs": 0, "events_upserted": 0, "events_deleted": 0, "workspaces_failed": 0}
    wanted |= dict.fromkeys(("incremental_syncs", "api_calls", "workspaces_served"), len(fleet.members))
    found = {name: numbers[name] for name in wanted}
    if found != wanted:
        raise AssertionError(f"the tick was not idle: {found}")


def cpu_of_postgres(postmaster: int) -> float:
    """CPU time of a Postgres server: postmaster, live backends, and those it has reaped."""
    process = psutil.Process(postmaster)
    own = process.cpu_times()
    total = own.user + own.system + own.children_user + own.children_system
    for child in process.children():
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:  # reaped meanwhile: in the postmaster's sum at the next reading
            continue
        total += times.user + times.system
    return total


def event(summary: str) -> dict[str, Any]:
    """An hour on a Monday."""
    zone = "Europe/Berlin"
    return {
        "summary": summary,
        "start": {"dateTime": "2026-06-01T10:00:00", "timeZone": zone},
        "end": {"dateTime": "2026-06-01T11:00:00", "timeZone": zone},
    }


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set exactly these of the pipelines' variables, and put back what was there."""
    names = {
        name.upper()
        for group in (DatabaseSettings, SyncSettings, ArchiveSettings, AutomationSettings, CapabilitySettings)
        for name in group.model_fields
    }
    before = {name: os.environ.pop(name) for name in names | values.keys() if name in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            os.environ.pop(name, None)
        os.environ.update(before)


@contextmanager
def running(workspaces: int, *, name: str = "fleet", seed: int = 1) -> Iterator[Fleet]:
    """Run Postgres and Google with a fleet of that many workspaces, all of them synced once and idle.

    Args:
        workspaces: how many.
        name: of the directory under var/bench/.
        seed: decides the calendars.

    Yields:
        The fleet; everything stops with the block.
    """
    with ExitStack() as stack:
        supervisor = stack.enter_context(Supervisor(VAR / "bench" / name))
        server = postgres.start(supervisor, disposable=True)
        google = stack.enter_context(
            run_simulator(seed=seed, users=workspaces, events=EVENTS_PER_CALENDAR, settings=NO_QUOTAS)
        )
        fleet = build(supervisor, server, google, name=f"fleet_{uuid.uuid4().hex[:12]}")
        try:
            yield fleet
        finally:
            server.drop_database(fleet.database.name)


def build(supervisor: Supervisor, server: Postgres, google: Simulator, *, name: str) -> Fleet:
    """Make a database whose workspaces have the simulator's accounts, one each, synced once."""
    admin_dsn = server.create_database(name)
    saas.create(server, name)
    database = Database(name, admin_dsn, saas.pipeline_dsn(server, name), saas.owner_dsn(server, name))
    migrate.upgrade(database.dsn)
    for calendar in google.calendars():
        if calendar.id != calendar.owner:  # the small world's team and holidays
            google.remove_calendar(calendar.id)
    google.refresh()
    key = Fernet.generate_key().decode()
    members = [_member(number, user) for number, user in enumerate(google.users)]
    fleet = Fleet(supervisor, server, database, google, members, key)
    with psycopg.connect(admin_dsn) as connection:
        _fill_saas(connection, fleet)
        _fill_sync(connection, fleet)
    fleet.execute("VACUUM (ANALYZE)")
    return fleet


def _member(number: int, user: SimulatedUser) -> Member:
    tenant = uuid.uuid5(NAMESPACE, f"tenant {number // WORKSPACES_PER_TENANT}")
    workspace = uuid.uuid5(NAMESPACE, f"workspace {number}")
    return Member(Workspace(tenant, workspace), uuid.uuid5(NAMESPACE, f"connection {number}"), user)


def _fill_saas(connection: psycopg.Connection[Any], fleet: Fleet) -> None:
    fernet = Fernet(fleet.key)
    tenants = {member.workspace.tenant_id for member in fleet.members}
    person = {member.connection_id: uuid.uuid5(NAMESPACE, f"person {member.connection_id}") for member in fleet.members}
    _copy(connection, "COPY public.tenants (id, name) FROM STDIN", [(tenant, "T") for tenant in sorted(tenants)])
    _copy(
        connection,
        "COPY public.workspaces (tenant_id, id, name) FROM STDIN",
        [(*astuple(member.workspace), "W") for member in fleet.members],
    )
    _copy(
        connection,
        "COPY public.users (id, tenant_id, email, google_api_enabled) FROM STDIN",
        [(person[m.connection_id], m.workspace.tenant_id, f"{m.user.email}.saas", True) for m in fleet.members],
    )
    _copy(
        connection,
        "COPY public.google_connections "
        "(id, tenant_id, workspace_id, user_id, google_account, refresh_token_encrypted) FROM STDIN",
        [
            (
                m.connection_id,
                *astuple(m.workspace),
                person[m.connection_id],
                m.user.email,
                fernet.encrypt(m.user.refresh_token.encode()),
            )
            for m in fleet.members
        ],
    )


def _fill_sync(connection: psycopg.Connection[Any], fleet: Fleet) -> None:
    """Write what a first sync would have left."""
    fernet = Fernet(fleet.key)
    _copy(
        connection,
        "COPY sync.connection_state (tenant_id, workspace_id, connection_id, access_token_encrypted, "
        "access_token_expires_at, list_due_at, list_started_at, list_finished_at) FROM STDIN",
        [
            (
                *astuple(m.workspace),
                m.connection_id,
                fernet.encrypt(m.user.access_token.encode()),
                "2099-01-01",
                "2099-01-01",
                "2026-01-01",
                "2026-01-01",
            )
            for m in fleet.members
        ],
    )
    connection.execute(
        "UPDATE sync.connection_state s SET "
        "grant_fingerprint = sha256(convert_to(g.refresh_token_encrypted::text, 'UTF8')), "
        "account_fingerprint = sha256(convert_to(g.google_account, 'UTF8')) "
        "FROM public.google_connections g WHERE g.id = s.connection_id"
    )
    states, rows = [], []
    for member, (items, sync_token) in zip(fleet.members, _listings(fleet), strict=True):
        made_with = fingerprint_of(f"{member.connection_id}:{member.user.email}")
        states.append((*astuple(member.workspace), member.calendar, member.connection_id, sync_token, made_with))
        rows += [
            {name: getattr(row, name) for name in event_store.TYPES}
            | {"t": str(member.workspace.tenant_id), "w": str(member.workspace.workspace_id), "c": member.calendar}
            for row in read_items(items).rows
        ]
    _copy(
        connection,
        "COPY sync.calendar_state (tenant_id, workspace_id, calendar_id, connection_id, sync_token, token_fingerprint, "
        "live_generation, lease_epoch, summary, time_zone, access_role, is_primary, last_outcome, last_started_at, "
        "last_finished_at, last_succeeded_at, last_full_sync_at) FROM STDIN",
        [(*state, 1, 1, state[2], "UTC", "owner", True, "full", *["2026-01-01"] * 4) for state in states],
    )
    names = psycopg.sql.SQL(", ").join(map(psycopg.sql.Identifier, event_store.TYPES))
    typed = psycopg.sql.SQL(", ").join(
        psycopg.sql.Identifier(name) + psycopg.sql.SQL(" ") + psycopg.sql.SQL(kind)
        for name, kind in event_store.TYPES.items()
    )
    for start in range(0, len(rows), 5000):
        connection.execute(
            psycopg.sql.SQL(
                "INSERT INTO sync.event_rows "
                "(tenant_id, workspace_id, calendar_id, generation, lease_epoch, changed_at, {names}) "
                "SELECT t, w, c, 1, 1, now(), {names} "
                "FROM json_to_recordset(%s::json) AS r (t uuid, w uuid, c text, {typed})"
            ).format(names=names, typed=typed),
            [json.dumps(rows[start : start + 5000], default=str)],
        )
    connection.execute(
        "INSERT INTO sync.workspace_state (tenant_id, workspace_id, health, reported_health, last_served_at) "
        "SELECT tenant_id, workspace_id, 'healthy', 'healthy', now() FROM sync.calendar_state"
    )


def _listings(fleet: Fleet) -> Iterator[tuple[list[Json], str]]:
    """List every calendar in full; they fit one page."""
    parameters = {
        name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in EVENT_PARAMETERS.items()
    }
    with httpx.Client(base_url=fleet.google.url, timeout=60, trust_env=False) as client, ThreadPoolExecutor(4) as pool:

        def listing(member: Member) -> tuple[list[Json], str]:
            answer = client.get(
                f"/calendar/v3/calendars/{quote(member.calendar, safe='')}/events",
                params=parameters,
                headers={"Authorization": f"Bearer {member.user.access_token}"},
            )
            page = answer.raise_for_status().json()
            return page["items"], page["nextSyncToken"]

        yield from pool.map(listing, fleet.members)


def _copy(connection: psycopg.Connection[Any], statement: LiteralString, rows: Sequence[Sequence[object]]) -> None:
    with connection.cursor() as cursor, cursor.copy(statement) as copy:
        for row in rows:
            copy.write_row(row)


def main() -> None:
    """Build a fleet, prove it idle, say how long that took: `python -m bench.fleet [workspaces]`."""
    import time

    began = time.perf_counter()
    with running(int(sys.argv[1]) if len(sys.argv) > 1 else 1000, name="fleet-alone") as fleet:
        built = time.perf_counter()
        fleet.prove_idle()
        proven = time.perf_counter()
    sys.stdout.write(f"{len(fleet.members)} workspaces: built in {built - began:.1f} s, ")
    sys.stdout.write(f"first tick {proven - built:.1f} s\n")


if __name__ == "__main__":
    main()
