"""The numbers of the demo: where each is read, how they are shown, what must agree.

Belongs here: `summary.json`, the tables at the end, the check. Does not: what happens in the demo (`devstack.demo`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psycopg
from rich.console import Console
from rich.table import Table

from devstack.dagster_ui import DagsterUi
from devstack.stack import Stack
from scaling import capabilities
from scaling.errors import UserError

THRESHOLDS = 3
"""That the demo's capabilities are waiting for; others may be crossed besides."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What the demo did, in numbers."""

    thresholds_fired: int
    capabilities_active: int
    api_calls_before: int
    """Of a tick that reads every calendar, before incremental sync."""
    api_calls_after: int
    """Of the tick that reads what was edited since, in all calendars."""
    workspaces: int
    calendars: int
    events_synced: int
    events_quarantined: int
    api_calls: int
    calendars_edited: int
    calendars_equal_to_google: int
    partitions: int
    rows_written_during_conversion: int
    writes_failed_during_conversion: int
    months_archived: int
    rows_archived: int
    rows_verified: int
    postgres_rows: int
    parquet_bytes: int
    chain_links_verified: int
    query_rows: int
    dagster_runs: int
    dagster_runs_failed: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class Patient:
    """A workspace that needs a human."""

    workspace: str
    accounts: str
    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """What one run of the sync did."""

    workspaces: int
    full: int
    incremental: int
    written: int
    deleted: int
    api_calls: int
    seconds: float
    is_red: bool


@dataclass(frozen=True, slots=True)
class Seen:
    """What the demo saw and nobody stored."""

    before: Tick
    """Reads every calendar."""
    after: Tick
    """Reads what was edited since."""
    edited: int
    equal_to_google: int
    written: int
    failed_writes: int
    links: int
    query_rows: int


def summarise(running: Stack, ui: DagsterUi, seen: Seen, *, seconds: float) -> Summary:
    """Read every other number from where it is stored.

    Args:
        running: the stack.
        ui: of its Dagster.
        seen: what is stored nowhere.
        seconds: that the demo took.
    """
    verified = ui.numbers("audit_log_archive").values()
    counts = ui.run_counts()
    objects = running.bucket.server.client().get_paginator("list_objects_v2")
    with psycopg.connect(running.database.dsn) as connection:
        return Summary(
            thresholds_fired=number(connection, "SELECT count(*) FROM scaling.episodes"),
            capabilities_active=len(capabilities.switched(connection)),
            api_calls_before=seen.before.api_calls,
            api_calls_after=seen.after.api_calls,
            workspaces=number(connection, "SELECT count(*) FROM sync.workspace_state WHERE last_served_at IS NOT NULL"),
            calendars=number(connection, "SELECT count(*) FROM sync.calendar_state WHERE deleted_at IS NULL"),
            events_synced=number(connection, "SELECT count(*) FROM sync.calendar_events"),
            events_quarantined=number(connection, "SELECT count(*) FROM sync.quarantine"),
            api_calls=number(connection, "SELECT sum(api_calls) FROM sync.runs"),
            calendars_edited=seen.edited,
            calendars_equal_to_google=seen.equal_to_google,
            partitions=number(
                connection, "SELECT count(*) FROM pg_inherits WHERE inhparent = 'public.audit_logs'::regclass"
            ),
            rows_written_during_conversion=seen.written,
            writes_failed_during_conversion=seen.failed_writes,
            months_archived=number(connection, "SELECT count(*) FROM archive.months WHERE state = 'archived'"),
            rows_archived=number(connection, "SELECT sum(rows) FROM archive.months WHERE state = 'archived'"),
            rows_verified=int(sum(numbers["rows_verified"] for numbers in verified)),
            postgres_rows=number(
                connection,
                "SELECT count(*) FROM public.audit_logs WHERE created_at < (SELECT max(to_at) FROM archive.months)",
            ),
            parquet_bytes=sum(
                content["Size"]
                for page in objects.paginate(Bucket=running.bucket.name)
                for content in page.get("Contents", [])
                if content["Key"].endswith(".parquet")
            ),
            chain_links_verified=seen.links,
            query_rows=seen.query_rows,
            dagster_runs=counts.total(),
            dagster_runs_failed=counts["FAILURE"],
            duration_s=round(seconds, 1),
        )


def patients(running: Stack) -> list[Patient]:
    """Read which workspaces need a human, and why.

    Args:
        running: the stack.
    """
    with psycopg.connect(running.database.dsn) as connection:
        return [
            Patient(f"{tenant}:{workspace}", accounts, reason)
            for tenant, workspace, accounts, reason in connection.execute(
                "SELECT s.tenant_id, s.workspace_id, string_agg(c.google_account, ', '), s.health_reason"
                " FROM sync.workspace_state s JOIN public.google_connections c USING (tenant_id, workspace_id)"
                " WHERE s.health = 'needs_human' GROUP BY s.tenant_id, s.workspace_id ORDER BY 4 DESC, 3"
            )
        ]


IN_PLAIN_WORDS = {
    "reauth_required": "Google refuses the grant. Somebody has to connect the account again in the SaaS.",
    "breaker_open": "Google invalidates every sync token of a calendar. It is read in full four times a day until"
    " somebody looks at it; its events stay complete.",
}


def show(console: Console, summary: Summary, waiting: Sequence[Patient], answer: Sequence[Mapping[str, int]]) -> None:
    """Print the numbers.

    Args:
        console: for a person.
        summary: the numbers.
        waiting: the workspaces that need a human.
        answer: of the archive, by action.
    """
    numbers = Table("what happened", "", title="The main job, end to end", title_justify="left")
    numbers.columns[1].justify = "right"
    numbers.add_row("thresholds crossed", f"{summary.thresholds_fired}")
    numbers.add_row("capabilities switched on by them", f"{summary.capabilities_active}")
    numbers.add_row("API calls of a tick, before and after", f"{summary.api_calls_before}, {summary.api_calls_after}")
    numbers.add_row("workspaces synced", f"{summary.workspaces}")
    numbers.add_row("their calendars", f"{summary.calendars}")
    numbers.add_row("events in Postgres", f"{summary.events_synced:,}")
    numbers.add_row("unreadable events set aside", f"{summary.events_quarantined}")
    numbers.add_row("requests to Google", f"{summary.api_calls:,}")
    numbers.add_row(
        "edited calendars equal to Google", f"{summary.calendars_equal_to_google}/{summary.calendars_edited}"
    )
    numbers.add_row("partitions of audit_logs, converted online", f"{summary.partitions}")
    numbers.add_row(
        "rows written meanwhile, and failed",
        f"{summary.rows_written_during_conversion:,}, {summary.writes_failed_during_conversion}",
    )
    numbers.add_row("months archived", f"{summary.months_archived}")
    numbers.add_row("rows of these months in Postgres", f"{summary.postgres_rows:,}")
    numbers.add_row("rows archived", f"{summary.rows_archived:,}")
    numbers.add_row("rows read back and verified", f"{summary.rows_verified:,}")
    numbers.add_row("signed links of the chain, verified", f"{summary.chain_links_verified}")
    numbers.add_row("rows the query saw", f"{summary.query_rows:,}")
    numbers.add_row("Parquet on S3", f"{summary.parquet_bytes / 1e6:,.1f} MB")
    numbers.add_row("Dagster runs", f"{summary.dagster_runs}, {summary.dagster_runs_failed} red")
    numbers.add_row("duration", f"{summary.duration_s:.0f} s")
    console.print(numbers)
    actions = Table("action", "rows", "tenants", title="Most frequent actions in the archive", title_justify="left")
    for row in answer[:5]:
        actions.add_row(str(row["action"]), f"{row['rows']:,}", f"{row['tenants']}")
    console.print(actions)
    count = "1 workspace needs" if len(waiting) == 1 else f"{len(waiting)} workspaces need"
    console.print(f"[bold]{count} a human[/bold], all others went on without noticing:")
    for patient in waiting:
        words = " ".join(IN_PLAIN_WORDS.get(reason, reason) for reason in patient.reason.split(", "))
        console.print(f"  {patient.accounts}: {words}", soft_wrap=True)


def check(summary: Summary, waiting: Sequence[Patient], months: Sequence[str]) -> None:
    """Hold the numbers against each other: a demo that prints nonsense must not exit 0.

    Args:
        summary: the numbers.
        waiting: the workspaces that need a human.
        months: partition keys of the closed months.

    Raises:
        UserError: they do not agree.
    """
    rows = {summary.postgres_rows, summary.rows_archived, summary.rows_verified, summary.query_rows}
    if len(rows) != 1:
        raise UserError(
            f"Postgres, the archive, its verification and the query disagree about the rows: {sorted(rows)}."
        )
    if summary.months_archived != len(months):
        raise UserError(f"{summary.months_archived} of {len(months)} months are archived.")
    if summary.chain_links_verified != len(months):
        raise UserError(f"{summary.chain_links_verified} links vouch for {len(months)} months.")
    if summary.writes_failed_during_conversion or not summary.rows_written_during_conversion:
        raise UserError(
            f"{summary.writes_failed_during_conversion} of the SaaS's writes failed while the table was converted, "
            f"{summary.rows_written_during_conversion} did not."
        )
    if summary.calendars_equal_to_google != summary.calendars_edited:
        raise UserError("An edited calendar in Postgres differs from Google.")
    if summary.thresholds_fired < THRESHOLDS or summary.capabilities_active != 2:
        raise UserError(
            f"{summary.thresholds_fired} thresholds fired and {summary.capabilities_active} capabilities are on."
        )
    if summary.api_calls_after >= summary.api_calls_before:
        raise UserError(
            f"Incremental sync took {summary.api_calls_after} calls, complete reads {summary.api_calls_before}."
        )
    if not waiting:
        raise UserError("The revoked grant went unnoticed.")


def number(connection: "psycopg.Connection[tuple[int, ...]]", query: str) -> int:
    """Ask for one number.

    Args:
        connection: to the database.
        query: of one row of one column.
    """
    row = connection.execute(query.encode()).fetchone()
    return int(row[0]) if row else 0
