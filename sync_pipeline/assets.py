"""The assets: calendar events by workspace, the ticks that keep them fresh, a report of each day.

Belongs here: what the UI shows of the assets, and the calls into the domain. Does not: how a calendar is synced.
https://docs.dagster.io/guides/build/assets
"""

import base64
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import dagster as dg
from pydantic import Field

from scaling.errors import UserError
from scaling.resources import failing_with_a_sentence
from sync_pipeline import columns, dagster_events, error_budget, report, vital_signs
from sync_pipeline.checks import CALENDAR_EVENTS, evaluations_of_tick
from sync_pipeline.health import WorkspaceReport, owed_reports
from sync_pipeline.partitions import days, workspaces
from sync_pipeline.resources import SyncResource
from sync_pipeline.services import Services
from sync_pipeline.tick import TickResult, run_tick, sync_now
from sync_pipeline.workspaces import Workspace

GROUP = "google_calendar"
OWNERS = ["team:platform"]
FAILURES_SHOWN = 20
# A run over several workspaces is one process of 7 CPU seconds instead of one each. Bounded, because Dagster writes
# one event of 16 to 25 ms per partition while it creates the run.
PARTITIONS_PER_RUN = 100

# Known to be beta in dagster 1.13, and pinned; the warning would show in every process that loads the definitions.
warnings.filterwarnings("ignore", message="Parameter `backfill_policy`", category=dg.BetaWarning)

GOOGLE_CALENDARS = dg.AssetSpec(
    "google_calendars",
    description="Calendars of the tenants' Google accounts, read through Google Calendar API v3 with the grants "
    "in `google_connections`. Google owns them; the sync only reads.",
    group_name=GROUP,
    owners=OWNERS,
    kinds={"google"},
    metadata={"dagster/uri": "https://www.googleapis.com/calendar/v3"},
)

GOOGLE_CONNECTIONS = dg.AssetSpec(
    "google_connections",
    description="The SaaS's table of Google accounts its users connected, with encrypted refresh tokens. The SaaS owns "
    "it; the sync only reads.",
    group_name=GROUP,
    owners=OWNERS,
    kinds={"postgres", "table"},
    metadata={"dagster/table_name": "public.google_connections"},
)


class SyncNowConfig(dg.Config):
    """What a manual sync does."""

    full_resync: bool = Field(
        default=False,
        description="Read every calendar of the workspace completely instead of its changes. Readers keep seeing the "
        "present rows until the new ones are complete. Costs one request per 2,500 events.",
    )


class TickConfig(dg.Config):
    """Which of the runs of one moment this is. They share the work through leases; the numbers only name them."""

    shard: int = Field(default=0, ge=0, description="Number of this run, from 0.")
    of: int = Field(default=1, ge=1, le=64, description="How many runs share the tick.")
    watch_seconds: float = Field(
        default=0,
        ge=0,
        le=3600,
        description="Until this long after its start the run also takes what becomes due meanwhile, which is how a "
        "notification of Google is followed within seconds. The schedule sets it when there is push.",
    )


@dg.asset(
    deps=[GOOGLE_CALENDARS, GOOGLE_CONNECTIONS],
    partitions_def=workspaces,
    backfill_policy=dg.BackfillPolicy.multi_run(max_partitions_per_run=PARTITIONS_PER_RUN),
    output_required=False,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"google", "postgres", "table"},
    tags={"pipeline": "sync"},
    metadata={
        "dagster/table_name": "sync.calendar_events",
        "dagster/column_schema": dg.TableSchema(
            columns=[dg.TableColumn(name, kind, description=meaning) for name, kind, meaning in columns.CALENDAR_EVENTS]
        ),
    },
)
def calendar_events(
    context: dg.AssetExecutionContext, config: SyncNowConfig, sync: SyncResource
) -> Iterator[dg.MaterializeResult[None]]:
    """Every event of every Google calendar of a tenant's workspace, in the view `sync.calendar_events`.

    **A row** is one event as Google stores it: a single event, the master of a series, or an exception of one.

    **Cadence**: `sync_ticks` syncs what is due, every two minutes. A workspace is materialized here when its events
    or its state changed, so an old materialization of a healthy workspace means that nothing changed. Materializing a
    workspace by hand syncs it at once; `full_resync` reads it completely.

    **Failure**: a red workspace needs a human, for example to connect a Google account again. What Google or the
    network will get over by itself is retried by the next tick and shown by the checks. Rows synced before always stay.
    """
    with failing_with_a_sentence(), sync.services() as services:
        chosen = [_workspace(key) for key in context.partition_keys]
        result = sync_now(services, chosen, run_id=context.run.run_id, full_resync=config.full_resync)
        troubled = {failed.workspace for failed in result.failed}
        known: set[Workspace] = set()
        sick: list[WorkspaceReport] = []
        for shard in services.router.shards():
            with owed_reports(shard, only=chosen) as reports:
                known |= {report.workspace for report in reports}
                sick += [r for r in reports if r.workspace in troubled or r.health == "needs_human"]
                dagster_events.report_materializations(
                    context, context.asset_key, [_shown(report) for report in reports if report not in sick]
                )
    unknown = [workspace for workspace in chosen if workspace not in known]
    if sick or unknown:
        raise dg.Failure(
            description=_sentence(sick, unknown, of=len(chosen)),
            metadata={**result.numbers(), "failures": _failures(result, sick)},
            allow_retries=False,
        )
    yield from ()  # every materialization is written above, one per workspace, each with its own numbers


@dg.asset(
    deps=[calendar_events],
    group_name=GROUP,
    owners=OWNERS,
    kinds={"postgres"},
    tags={"pipeline": "sync"},
    metadata={"dagster/table_name": "sync.runs"},
)
def sync_ticks(
    context: dg.AssetExecutionContext, config: TickConfig, sync: SyncResource
) -> Iterator[dg.MaterializeResult[None] | dg.AssetCheckEvaluation]:
    """One tick of the sync: every calendar that is due, of every tenant, in one bounded run.

    **A materialization** is one run, with its numbers; `sync.runs` has a row for each.

    **Cadence**: every two minutes. A run takes due workspaces under leases, least recently served tenant first, until
    nothing is due or its time budget is used up. Any number of runs may work at once.

    **In force**: without `incremental_sync` a visit reads a calendar completely, at a fixed interval and without push;
    without `parallel_sync` a tick serves five workspaces, one after the other. Both are read when a run starts.

    **Failure**: one workspace's failure never touches another. The run fails only when a workspace newly needs a
    human, when more than the error budget failed (5 % of the served workspaces, and at least 3), or when nothing at all
    succeeded; then the failure lists what happened. Every tick judges the checks of `calendar_events`, also then.
    """
    trouble: dg.Failure | None = None
    try:
        with sync.services() as services:
            result = run_tick(
                services,
                run_id=context.run.run_id,
                shard=config.shard,
                of=config.of,
                watch_seconds=config.watch_seconds,
            )
            newly_sick = _report_changes(context, services)
        shown = {"failures": _failures(result, newly_sick)} if newly_sick or result.failed else {}
        yield dg.MaterializeResult(metadata={**result.numbers(), "in_force": str(services.in_force), **shown})
        if complaint := _complaint(result, newly_sick):
            trouble = dg.Failure(description=complaint, metadata=shown, allow_retries=False)
    except UserError as error:
        trouble = dg.Failure(description=str(error), allow_retries=False)
    yield from evaluations_of_tick(sync)
    if trouble:
        raise trouble


@dg.asset(
    deps=[sync_ticks],
    partitions_def=days,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"postgres"},
    tags={"pipeline": "sync"},
)
def sync_report(context: dg.AssetExecutionContext, sync: SyncResource) -> dg.MaterializeResult[None]:
    """What a day of syncing cost, saved and missed, in figures and pictures.

    **A materialization** is one day in UTC. Its figures plot over the days under "Plots"; its pictures show the day:
    calls to Google by method and answer; calls saved against polling every live calendar every two minutes (720 calls
    a calendar and day, counted for the hours in which the sync ran); how old changes were when they became visible;
    what failed.

    **Cadence**: every day shortly after midnight UTC. A past day can be materialized again as long as `sync.runs` knows
    it, 90 days.

    **Failure**: no run of the sync started on that day; a report made earlier stays.
    """
    day = context.partition_time_window.start.date()
    with failing_with_a_sentence(), sync.databases() as router:
        found = report.read(router, day)
        if not found.hours:
            first = report.first_day(router)
            raise UserError(
                f"No run of the sync started on {day}; "
                + (f"the oldest known is of {first}." if first else "none has.")
            )
    from sync_pipeline import charts  # 0.6 s to import, and only a report draws

    pictures = {
        f"picture_{name}": dg.MetadataValue.md(f"![{name}](data:image/png;base64,{base64.b64encode(png).decode()})")
        for name, png in charts.draw(found).items()
    }
    return dg.MaterializeResult(metadata={**found.numbers(), **pictures})


def _report_changes(context: dg.AssetExecutionContext, services: Services) -> list[WorkspaceReport]:
    """Tell Dagster what it is owed; return the workspaces that newly need a human."""
    newly_sick: list[WorkspaceReport] = []
    red = _left_red(context)
    for shard in services.router.shards():
        with owed_reports(shard) as reports:
            # A workspace may be younger than the sensor's last look; adding a known partition changes nothing.
            if reports:
                context.instance.add_dynamic_partitions(
                    str(workspaces.name), [report.workspace.partition_key for report in reports]
                )
            sick = [report for report in reports if report.newly_needs_human]
            dagster_events.report_materializations(
                context, CALENDAR_EVENTS, [_shown(report) for report in reports if report not in sick]
            )
            dagster_events.report_failures(
                context, CALENDAR_EVENTS, [report.workspace.partition_key for report in sick]
            )
            newly_sick += sick
        settled = {report.workspace for report in reports}
        with shard.transaction() as connection:
            well = [one for one in vital_signs.healthy(connection, red) if one not in settled]
        if well:
            with owed_reports(shard, only=well) as reports:
                dagster_events.report_materializations(
                    context, CALENDAR_EVENTS, [_shown(report) for report in reports if report.health == "healthy"]
                )
    return newly_sick


def _left_red(context: dg.AssetExecutionContext) -> list[Workspace]:
    """Workspaces that are shown as failed; a manual run that crashed leaves healthy ones so, and owes no report."""
    keys = dagster_events.failed_partitions(context.instance, CALENDAR_EVENTS, workspaces)
    return [workspace for key in keys if (workspace := _parsed(key))]


def _complaint(result: TickResult, newly_sick: Sequence[WorkspaceReport]) -> str | None:
    """Why the run counts as failed; None when it does not."""
    if newly_sick:
        return _sentence(newly_sick, [], of=len(result.results))
    if result.everything_failed:
        return f"Nothing succeeded in {len(result.results)} workspaces: {_kinds(result)}."
    if error_budget.is_exceeded(len(result.failed), len(result.results)):
        return (
            f"{len(result.failed)} of {len(result.results)} workspaces failed, more than the error budget of "
            f"{error_budget.SHARE:.0%}: {_kinds(result)}."
        )
    return None


def _workspace(partition_key: str) -> Workspace:
    try:
        return Workspace.from_partition_key(partition_key)
    except ValueError as error:
        raise dg.Failure(description=str(error), allow_retries=False) from None


def _parsed(partition_key: str) -> Workspace | None:
    try:
        return Workspace.from_partition_key(partition_key)
    except ValueError:  # added by hand; the sensor removes it
        return None


def _shown(report: WorkspaceReport) -> tuple[str, dagster_events.Metadata]:
    return report.workspace.partition_key, {
        "dagster/partition_row_count": report.live_events,
        "calendars": report.calendars,
        "events_upserted": report.events_upserted,
        "events_deleted": report.events_deleted,
        "health": report.health,
        **({"reason": report.reason} if report.reason else {}),
    }


def _failures(result: TickResult, sick: Sequence[WorkspaceReport]) -> dg.MetadataValue[Any]:
    rows = [
        dg.TableRecord(
            {"workspace": report.workspace.partition_key, "kind": "needs_human", "detail": report.reason or ""}
        )
        for report in sick
    ] + [
        dg.TableRecord({"workspace": failed.workspace.partition_key, "kind": trouble.kind, "detail": trouble.detail})
        for failed in result.failed
        for trouble in failed.troubles
    ]
    return dg.MetadataValue.table(
        rows[:FAILURES_SHOWN],
        schema=dg.TableSchema(columns=[dg.TableColumn(name, "text") for name in ("workspace", "kind", "detail")]),
    )


def _kinds(result: TickResult) -> str:
    return ", ".join(sorted({f"{t.kind} ({t.detail})" for failed in result.failed for t in failed.troubles})[:5])


REMEDIES = {
    "reauth_required": "its Google account has to be connected again in the SaaS",
    "client_refused": "Google refuses the OAuth client: check GOOGLE_CLIENT_ID and GOOGLE_CLIENT_SECRET",
    "access_denied": "Google denies access: check the granted scopes and that the Calendar API is enabled",
    "bad_request": "Google calls a request malformed: report this as a bug",
    "unreadable_state": "a row of its state cannot be read; docs/operations.md says how to start it anew",
    "failing_too_long": "one of its calendars has failed ten times in a row; sync.calendar_status says how",
    "daily_budget": "the calls of the day are used up; it goes on at midnight, Pacific time (SYNC_CALLS_PER_DAY)",
    "throttled": "the call quota has no room left for it right now; it goes on by itself",
    "breaker_open": "Google invalidates every sync token of one of its calendars; it is read in full four times a day",
}


def _sentence(sick: Sequence[WorkspaceReport], unknown: Sequence[Workspace], *, of: int) -> str:
    lines = [
        f"{report.workspace.partition_key}: "
        + "; ".join(REMEDIES.get(kind, kind) for kind in (report.reason or "failed, see the failures").split(", "))
        for report in sick
    ] + [f"{workspace.partition_key}: it has no Google connection that is switched on" for workspace in unknown]
    shown = "\n".join(lines[:FAILURES_SHOWN])
    more = f"\n… and {len(lines) - FAILURES_SHOWN} more" if len(lines) > FAILURES_SHOWN else ""
    return f"{len(lines)} of {of} workspaces need somebody:\n{shown}{more}"
