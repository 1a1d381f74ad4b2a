"""Baseline: the cron the SaaS runs today, five jobs every two minutes, one after another, each a full sync.

Belongs here: that job and that loop, written as a decent SaaS engineer writes them. Does not: anything of the pipeline.

Where the original says nothing, the job is given the better choice: every page is read, deleted events disappear, rows
are written in one batch and one transaction, and connections are kept. Its access token has always expired: at 1,000
workspaces a job comes round every 6.7 hours and a token lives for one, so google-auth refreshes it first.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httplib2
import psycopg
from cryptography.fernet import Fernet
from google.oauth2.credentials import Credentials
from google_auth_httplib2 import AuthorizedHttp
from googleapiclient.discovery import build

from bench.fleet import Fleet, Member

JOBS_PER_TICK = 5
SECONDS_BETWEEN_TICKS = 120.0
TABLE = """
CREATE SCHEMA IF NOT EXISTS baseline;
CREATE TABLE IF NOT EXISTS baseline.calendar_events (
    workspace_id uuid NOT NULL,
    event_id     text NOT NULL,
    summary      text,
    starts       text,
    ends         text,
    raw          jsonb NOT NULL,
    synced_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (workspace_id, event_id)
);
"""
UPSERT = """
INSERT INTO baseline.calendar_events (workspace_id, event_id, summary, starts, ends, raw)
VALUES (%s, %s, %s, %s, %s, %s)
ON CONFLICT (workspace_id, event_id) DO UPDATE
SET summary = excluded.summary, starts = excluded.starts, ends = excluded.ends, raw = excluded.raw, synced_at = now()
"""


@dataclass(frozen=True, slots=True)
class Worked:
    """What a baseline did."""

    workspaces: int
    calls: int
    seconds: float

    @property
    def per_second(self) -> float:
        """Workspaces a second, while it works."""
        return self.workspaces / self.seconds


class Worker:
    """Keeps one connection to Google and one to Postgres; for one thread."""

    def __init__(self, fleet: Fleet, connection: psycopg.Connection[Any]) -> None:
        self._fleet = fleet
        self._fernet = Fernet(fleet.key)
        self._http = httplib2.Http(timeout=30)
        self._connection = connection
        self.calls = 0
        self._service = build(
            "calendar",
            "v3",
            http=self._http,
            static_discovery=True,
            client_options={"api_endpoint": f"{fleet.google.url}/calendar/v3/"},
        )

    def sync(self, member: Member) -> None:
        """Read the account's calendar completely and store it."""
        with self._connection.transaction():
            row = self._connection.execute(
                "SELECT refresh_token_encrypted FROM public.google_connections WHERE id = %s", [member.connection_id]
            ).fetchone()
        assert row is not None
        credentials = Credentials(  # type: ignore[no-untyped-call]  # google-auth is typed in parts
            token=None,
            refresh_token=self._fernet.decrypt(row[0]).decode(),
            token_uri=self._fleet.google.token_url,
            client_id="client",
            client_secret="secret-of-the-client",
        )
        http = AuthorizedHttp(credentials, http=self._http)
        events: list[dict[str, Any]] = []
        request = self._service.events().list(calendarId=member.calendar, maxResults=2500)
        self.calls += 1  # the refresh
        while request is not None:
            page = request.execute(http=http)
            self.calls += 1
            events += page["items"]
            request = self._service.events().list_next(request, page)
        self._store(member, events)

    def _store(self, member: Member, events: Sequence[dict[str, Any]]) -> None:
        workspace = member.workspace.workspace_id
        rows = [
            (workspace, event["id"], event.get("summary"), _moment(event, "start"), _moment(event, "end"), _json(event))
            for event in events
        ]
        with self._connection.transaction(), self._connection.cursor() as cursor:
            cursor.executemany(UPSERT, rows)
            cursor.execute(
                "DELETE FROM baseline.calendar_events WHERE workspace_id = %s AND event_id <> ALL(%s)",
                [workspace, [event["id"] for event in events]],
            )


@contextmanager
def worker(fleet: Fleet) -> Iterator[Worker]:
    """Make a worker with its table."""
    with psycopg.connect(fleet.database.admin_dsn, autocommit=True) as connection:
        connection.execute(TABLE)
        yield Worker(fleet, connection)


def run(fleet: Fleet, members: Sequence[Member]) -> Worked:
    """Work through jobs one after another, without the cron's pauses."""
    with worker(fleet) as one:
        began = time.perf_counter()
        for member in members:
            one.sync(member)
        return Worked(len(members), one.calls, time.perf_counter() - began)


def _moment(event: dict[str, Any], name: str) -> str | None:
    value: dict[str, str] = event.get(name, {})
    return value.get("dateTime") or value.get("date")


def _json(event: dict[str, Any]) -> str:
    return json.dumps(event).replace("\\u0000", "")
