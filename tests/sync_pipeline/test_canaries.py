"""Nothing secret and nothing personal is told: canaries in every such place, and then everything that can be read.

Case 74. Postgres holds the data, Google gets the tokens; logs, Dagster, errors, the process's output, the database's
own views and the reprs of what carries secrets must show none of it.
"""

import dataclasses
import importlib
import json
import logging
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import uuid4

import dagster as dg
import psycopg
import pytest
from psycopg import sql
from pydantic import SecretStr

import sync_pipeline
from devstack.google_calendar import SimulatedUser, Simulator
from devstack.servers import Database
from scaling import report, report_page
from scaling.databases import DatabaseRouter, Shard
from scaling.logs import JsonFormatter
from scaling.settings import ArchiveSourceSettings, ScalingSettings
from sync_pipeline import connections, engine, leases, tick
from sync_pipeline.definitions import build_defs
from sync_pipeline.google_calendar import CachedAccessToken
from sync_pipeline.grants import GrantCipher
from sync_pipeline.services import Services
from tests.scaling.seeded import known as catalogue_of_defaults
from tests.sync_pipeline.conftest import KEY, Saas
from tests.sync_pipeline.scenes import kinds, meeting

MARK = "c4n4ry"
"""In every text planted here; the tokens Google makes itself are looked for as they are."""
MAIL = f"{MARK}-person@example.com"
SECRET = f"{MARK}-client-secret"
PASSWORD = f"{MARK}-database-password"

pytestmark = pytest.mark.usefixtures("definitions_load_alone")


@dataclass
class Planted:
    """A workspace full of canaries."""

    user: SimulatedUser
    calendar: str
    secrets: set[str] = field(default_factory=set)

    def told_in(self, text: str) -> set[str]:
        """Canaries in a text; empty is well."""
        return {secret for secret in self.secrets if secret.lower() in text.lower()}

    def learn_tokens(self, saas: Saas) -> None:
        """Look for what Google made meanwhile too: access tokens and sync tokens."""
        for encrypted, _ in saas.execute("SELECT access_token_encrypted, 0 FROM sync.connection_state"):
            if isinstance(encrypted, bytes):
                self.secrets |= {GrantCipher([KEY]).decrypt(encrypted), encrypted.decode()}
        self.secrets |= {str(token) for (token,) in saas.execute("SELECT sync_token FROM sync.calendar_state") if token}


@pytest.fixture
def planted(google: Simulator, saas: Saas) -> Planted:
    user = google.add_user(MAIL)
    calendar = google.add_calendar(MAIL, f"{MARK} calendar", id=f"{MARK}-calendar@group.calendar.google.com")
    google.put_raw(
        calendar,
        [
            meeting(
                1,
                id="readable1",
                summary=f"{MARK} summary",
                description=f"{MARK} description",
                location=f"{MARK} location",
                attendees=[{"email": f"{MARK}-guest@example.com", "displayName": f"{MARK} guest"}],
            ),
            meeting(2, id="poison22", summary=[f"{MARK} poison"], description=f"{MARK} of the poison"),
        ],
    )
    saas.connect(saas.workspace(), user)
    (grant,) = saas.one("SELECT refresh_token_encrypted FROM public.google_connections")
    assert isinstance(grant, bytes)
    secrets = {MARK, user.refresh_token, user.access_token, grant.decode(), KEY}
    return Planted(user, calendar, secrets)


@pytest.fixture
def everything_logged(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    """All that is logged, down to DEBUG, by whatever logger, except by the test's own client of the simulator."""
    names = ["sync_pipeline", "scaling", "google", "google.auth", "google_auth_httplib2", "googleapiclient", "httplib2"]
    names += ["urllib3", "requests", "psycopg", "psycopg.pool", "dagster", "alembic", "oauthlib"]
    levels = {name: logging.getLogger(name).level for name in names}
    caplog.set_level(logging.DEBUG)
    # The client libraries' levels are left as the program sets them: that is the defence that is tested.
    for name in names:
        if logging.getLogger(name).level == logging.NOTSET:
            logging.getLogger(name).setLevel(logging.DEBUG)

    def text() -> str:
        formatter = logging.Formatter("%(name)s %(message)s")
        return "\n".join(
            f"{formatter.format(record)}\n{JsonFormatter().format(record)}"
            for record in caplog.records
            if not record.name.startswith(("httpx", "httpcore"))
        )

    yield text
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def secret_login(database: Database, saas: Saas, sync_environment: Callable[..., None]) -> Iterator[None]:
    """A run's environment in which client secret and database password are canaries too."""
    name = f"test_{uuid4().hex[:12]}"
    with psycopg.connect(database.admin_dsn, autocommit=True) as admin:
        role = sql.Identifier(name)
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN BYPASSRLS PASSWORD {}").format(role, PASSWORD))
        admin.execute(sql.SQL("GRANT pipeline_worker, pipeline TO {}").format(role))
    where = psycopg.conninfo.conninfo_to_dict(database.dsn)
    sync_environment(
        DATABASE_URL=f"postgresql://{name}:{PASSWORD}@{where['host']}:{where['port']}/{where['dbname']}",
        GOOGLE_CLIENT_SECRET=SECRET,
    )
    yield
    with psycopg.connect(database.admin_dsn, autocommit=True) as admin:
        admin.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(name)))


Fault = dict[str, object]


def run(instance: dg.DagsterInstance) -> str:
    """A tick with its checks inside Dagster; everything Dagster keeps of it."""
    result = build_defs().resolve_job_def("calendar_sync").execute_in_process(instance=instance, raise_on_error=False)
    kept = [dg.serialize_value(entry) for entry in instance.all_logs(result.run_id)]
    stored = instance.get_run_by_id(result.run_id)
    assert stored is not None
    return "\n".join([*kept, dg.serialize_value(stored), json.dumps(stored.tags), json.dumps(stored.run_config)])


def make_everything_due(saas: Saas) -> None:
    saas.execute("UPDATE sync.calendar_state SET due_at = 'epoch', breaker_until = NULL, lease_until = NULL")
    saas.execute("UPDATE sync.connection_state SET list_due_at = 'epoch', parked_until = NULL, status = 'active'")


def sessions(saas: Saas) -> str:
    found = saas.execute("SELECT query, application_name FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    return "\n".join(str(row) for row in found)


FAULTS: list[Fault] = [
    {"kind": "drop"},
    {"kind": "drop_body"},
    {"kind": "truncate"},
    {"kind": "html"},
    {"kind": "gone"},
    {"kind": "unauthorized"},
    {"kind": "not_found"},
    {"kind": "no_sync_token"},
    {"kind": "duplicate_event"},
    {"kind": "both_tokens"},
    {"kind": "same_sync_token"},
    {"kind": "error", "status": 503},
    {"kind": "error", "status": 400},
    {"kind": "forbidden", "reason": "forbidden"},
    {"kind": "forbidden", "reason": "quotaExceeded"},
    {"kind": "rate_limited", "status": 429, "reason": "rateLimitExceeded", "retry_after": 900},
    {"kind": "invalid_grant", "method": "oauth.token"},
    {"kind": "html", "method": "oauth.token"},
    {"kind": "error", "status": 500, "method": "calendarList.list"},
    {"kind": "html", "method": "calendarList.list"},
]


def sync_with(google: Simulator, saas: Saas, planted: Planted, fault: dict[str, object], number: int) -> None:
    """Let the next run meet a fault with everything due and something new in the calendar."""
    google.clear_faults()
    google.add_fault(**{"method": "events.list", **fault})  # type: ignore[arg-type]  # a rule's fields
    if fault.get("method") == "oauth.token":
        saas.execute("UPDATE sync.connection_state SET access_token_encrypted = NULL")
    google.put_raw(planted.calendar, [meeting(3, id=f"later{number}", summary=f"{MARK} later")])
    make_everything_due(saas)


def test_no_outcome_of_a_sync_tells_a_canary(
    google: Simulator,
    saas: Saas,
    services: Services,
    planted: Planted,
    secret_login: None,
    everything_logged: Callable[[], str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    results = [tick.run_tick(services, run_id="well")]
    for number, fault in enumerate(FAULTS):
        planted.learn_tokens(saas)
        sync_with(google, saas, planted, fault, number)
        results.append(tick.run_tick(services, run_id=f"fault-{number}"))
    planted.learn_tokens(saas)
    found = {kind for result in results for kind in kinds(result)}
    assert found >= {"transient", "protocol", "access_denied", "rate_limited", "quota_exceeded", "reauth_required"}
    assert saas.one("SELECT count(*) FROM sync.quarantine WHERE event_id = 'poison22'") == (1,)
    assert planted.told_in(everything_logged()) == set(), "logs"
    assert planted.told_in("".join(capfd.readouterr())) == set(), "output"
    assert planted.told_in("\n".join(map(repr, results))) == set(), "what Dagster shows is made of it"
    assert planted.told_in(sessions(saas)) == set(), "sessions"
    told = saas.execute(
        "SELECT concat(last_error, last_outcome) FROM sync.calendar_state UNION ALL "
        "SELECT last_error FROM sync.connection_state UNION ALL SELECT health_reason FROM sync.workspace_state "
        "UNION ALL SELECT reason FROM sync.quarantine UNION ALL SELECT concat(method, outcome) FROM sync.api_calls"
    )
    assert planted.told_in(str(told)) == set(), "what operators read"
    with DatabaseRouter(Shard("main", saas.dsn)) as router:
        found_by_page = report.read(
            router, catalogue_of_defaults(), ScalingSettings(), ArchiveSourceSettings(), datetime.now(UTC)
        )
    page = report_page.render(found_by_page)
    assert planted.told_in(page) == set(), "the page of all figures"


@pytest.mark.parametrize(
    "fault",
    [{"kind": "duplicate_event"}, {"kind": "html"}, {"kind": "invalid_grant", "method": "oauth.token"}],
    ids=["well", "nothing_succeeds", "needs_a_human"],
)
def test_no_run_inside_dagster_keeps_a_canary(
    fault: dict[str, object],
    google: Simulator,
    saas: Saas,
    planted: Planted,
    instance: dg.DagsterInstance,
    secret_login: None,
    everything_logged: Callable[[], str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sync_pipeline.google_calendar.FIRST_WAIT_SECONDS", 0.001)
    kept = run(instance)
    assert "AssetMaterialization" in kept
    planted.learn_tokens(saas)
    sync_with(google, saas, planted, fault, 0)
    kept += run(instance)
    assert ("StepFailureData" in kept) == (fault["kind"] != "duplicate_event")
    assert planted.told_in(kept) == set(), "Dagster"
    assert planted.told_in(everything_logged()) == set(), "logs"
    assert planted.told_in("".join(capfd.readouterr())) == set(), "output"
    assert planted.told_in(sessions(saas)) == set(), "sessions"


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (engine, "read_items"),  # within a calendar
        (connections, "record_list"),  # within a list
        (leases, "take"),  # within a workspace, and within the run
        (connections, "register"),  # before any workspace
    ],
    ids=["calendar", "list", "claim", "run"],
)
def test_an_error_nobody_foresaw_tells_its_type_and_place_and_not_its_text(
    where: object,
    name: str,
    google: Simulator,
    saas: Saas,
    planted: Planted,
    instance: dg.DagsterInstance,
    secret_login: None,
    everything_logged: Callable[[], str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object, **__: object) -> object:
        try:
            raise LookupError(f"no such key: {MARK} in the cause")
        except LookupError as error:
            raise RuntimeError(f"{MARK}: {planted.user.refresh_token}") from error

    monkeypatch.setattr(where, name, broken)
    kept = run(instance)
    assert "RuntimeError" in kept + everything_logged(), "somebody has to be able to find it"
    out = "".join(capfd.readouterr())
    assert planted.told_in(kept) == set(), "Dagster"
    assert planted.told_in(everything_logged()) == set(), "logs"
    assert planted.told_in(out) == set(), "output"


def test_a_database_that_refuses_the_login_is_named_without_its_password(
    google: Simulator,
    planted: Planted,
    instance: dg.DagsterInstance,
    sync_environment: Callable[..., None],
    everything_logged: Callable[[], str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("scaling.databases.CONNECT_TIMEOUT_SECONDS", 1)
    sync_environment(DATABASE_URL=f"postgresql://pipeline:{PASSWORD}@127.0.0.1:1/nothing", GOOGLE_CLIENT_SECRET=SECRET)
    kept = run(instance)
    assert "does not answer" in kept
    assert planted.told_in("\n".join([kept, everything_logged(), *capfd.readouterr()])) == set()


# --- what carries secrets does not show them ------------------------------------------------------------------------


def dataclasses_of_the_package() -> Iterator[type]:
    for module in pkgutil.iter_modules(sync_pipeline.__path__, "sync_pipeline."):
        loaded = importlib.import_module(module.name)
        for value in vars(loaded).values():
            if isinstance(value, type) and dataclasses.is_dataclass(value) and value.__module__ == loaded.__name__:
                yield value


SECRET_FIELDS = {
    "account",
    "account_key",
    "access_token",
    "calendar_id",
    "channel_token",
    "client_secret",
    "description",
    "email",
    "entries",
    "fingerprint",
    "grant",
    "items",
    "next_page_token",
    "next_sync_token",
    "raw",
    "refresh_token",
    "rows",
    "summary",
    "sync_token",
    "token",
    "token_fingerprint",
    "token_hash",
    "unreadable",
    "_access_token",
    "_grant",
}
NUMBERS_AND_HASHES = {"CalendarSync.token_fingerprint", "Rotated.unreadable", "Trimmed.rows"}


def test_no_dataclass_shows_a_secret_or_personal_field_in_its_repr() -> None:
    """By the fields' names, over the whole package, so that a new class is in it."""
    shown = []
    for kind in dataclasses_of_the_package():
        if not hasattr(kind.__repr__, "__wrapped__"):
            continue  # none at all, or one written by hand: the next test
        shown += [f"{kind.__name__}.{f.name}" for f in dataclasses.fields(kind) if f.repr and f.name in SECRET_FIELDS]
    assert set(shown) - NUMBERS_AND_HASHES == set()


def test_what_is_written_by_hand_hides_its_secrets_too(services: object, database: Database) -> None:
    assert MARK not in repr(CachedAccessToken(f"{MARK}-token", datetime.now(UTC)))
    assert MARK not in repr(SecretStr(MARK))
    with DatabaseRouter(Shard("main", f"postgresql://pipeline:{PASSWORD}@127.0.0.1:1/x")) as router:
        assert MARK not in repr(router.shards()) + repr(router)
    assert KEY not in repr(GrantCipher([KEY])) + repr(vars(GrantCipher([KEY])))
    assert database.dsn not in repr(services)
