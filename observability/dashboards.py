"""Grafana's dashboards, written into a directory: ``python -m observability.dashboards [DIRECTORY]``.

Belongs here: which panels there are, what each asks and says; how they become Grafana's JSON. Does not: the figures
(`scaling.exported`), or alerts (`observability/rules`).

Every selector carries the job and the instance that are chosen above the panels, written `@` here. No data source has a
name: it is chosen there too. Figures of one tenant are in no label of Prometheus, on purpose; so the dashboard of a
tenant asks Postgres, which a login with the role `pipeline_operator` is enough for.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.variants import Dataquery
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import Dashboard as Built
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    VariableOption,
    VariableRefresh,
)

DIRECTORY = Path(__file__).parent / "grafana"
OF_INTERVALS = ("auto", "auto_count", "auto_min")
"""The builder library gives them to every variable; Grafana's types have them of intervals only."""
CHOSEN = 'job=~"$job",instance=~"$instance"'
PROMETHEUS = DataSourceRef(type_val="prometheus", uid="${datasource}")
POSTGRES = DataSourceRef(type_val="grafana-postgresql-datasource", uid="${postgres}")
KINDS: dict[str, Any] = {"lines": timeseries.Panel, "number": stat.Panel, "bars": bargauge.Panel, "table": table.Panel}


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel.

    Attributes:
        title: what it shows.
        description: what it means, and when to worry.
        unit: of Grafana.
        asks: expressions of PromQL with the legends of their series; or, of a panel of Postgres, one query of SQL.
        kind: lines, number, bars or table.
        of_postgres: it asks Postgres.
    """

    title: str
    description: str
    unit: str
    asks: Sequence[tuple[str, str]]
    kind: str = "lines"
    of_postgres: bool = False


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard.

    Attributes:
        uid: also the name of its file.
        title: for people.
        description: what it answers.
        rows: panels below headings.
        of_tenant: a tenant is chosen, and a data source of Postgres; also a class of tenants.
    """

    uid: str
    title: str
    description: str
    rows: Sequence[tuple[str, Sequence[Panel]]]
    of_tenant: bool = False


@dataclass(slots=True)
class _Sql(Dataquery):
    """A query of Grafana's Postgres data source, which the builder library does not have."""

    sql: str
    ref_id: str = "A"

    def to_json(self) -> dict[str, object]:
        """As Grafana has it."""
        return {
            "datasource": POSTGRES,
            "editorMode": "code",
            "format": "table",
            "rawQuery": True,
            "rawSql": self.sql,
            "refId": self.ref_id,
        }

    def build(self) -> Dataquery:
        """The builder's interface; it is built already."""
        return self


FLEET = Board(
    "pipeline-fleet",
    "Pipelines: fleet sync",
    "Is every calendar as fresh as it should be, at what cost in calls, and who waits for somebody?",
    (
        (
            "Freshness",
            (
                Panel(
                    "Age of changes",
                    "How old changes were when they became visible, half of them and 95 %. With push seconds, polled "
                    "up to SYNC_POLL_CEILING_SECONDS.",
                    "s",
                    tuple(
                        (
                            (
                                f"histogram_quantile({quantile}, sum by (le) "
                                "(rate(pipeline_sync_change_age_seconds_bucket{@}[$__rate_interval])))"
                            ),
                            f"p{quantile * 100:g}",
                        )
                        for quantile in (0.5, 0.95)
                    ),
                ),
                Panel(
                    "Calendars by state",
                    "waiting: for a grant, for quota, or behind an open breaker. overdue: due for 15 minutes, and "
                    "nothing holds it up.",
                    "short",
                    (("sum by (state) (pipeline_sync_calendars{@})", "{{state}}"),),
                ),
                Panel(
                    "Longest overdue",
                    "How long the calendar has been due that has been due for longest, of those nothing holds up.",
                    "s",
                    (("max(pipeline_sync_overdue_seconds{@})", "overdue"),),
                    "number",
                ),
                Panel(
                    "Workspaces by health",
                    "needs_human: somebody has to act; the red partition of calendar_events says who and what.",
                    "short",
                    (("sum by (health) (pipeline_sync_workspaces{@})", "{{health}}"),),
                ),
            ),
        ),
        (
            "Calls to Google",
            (
                Panel(
                    "Calls by outcome",
                    "Requests a second, token refreshes included. 410 costs a full read, 429 asks for fewer calls.",
                    "reqps",
                    (("sum by (outcome) (rate(pipeline_sync_api_calls_total{@}[$__rate_interval]))", "{{outcome}}"),),
                ),
                Panel(
                    "Calls by method",
                    "events.list reads changes, calendarList.list the list of calendars, events.watch asks for push.",
                    "reqps",
                    (("sum by (method) (rate(pipeline_sync_api_calls_total{@}[$__rate_interval]))", "{{method}}"),),
                ),
                Panel(
                    "Calls saved today",
                    "Against reading every calendar completely every two minutes, as the daily report reckons it.",
                    "percentunit",
                    (
                        (
                            "sum(pipeline_sync_calls_saved{@}) / sum(pipeline_sync_calls_of_complete_reads{@})",
                            "saved",
                        ),
                    ),
                    "number",
                ),
                Panel(
                    "Headroom of the day's quota",
                    "Left of SYNC_CALLS_PER_DAY; at 0 the sync pauses until midnight in California.",
                    "percentunit",
                    (("min(pipeline_quota_headroom_ratio{@})", "left"),),
                ),
                Panel(
                    "The minute's bucket, and the rate in force",
                    "Fill below 0: processes wait. Rate below 1: Google refused several tenants at once.",
                    "percentunit",
                    (
                        ("min(pipeline_quota_fill_ratio{@})", "fill"),
                        ("min(pipeline_quota_rate_ratio{@})", "rate"),
                    ),
                ),
                Panel(
                    "Time waited for quota",
                    "Seconds that workers waited, per second; much of it: fewer workers would do.",
                    "s",
                    (("sum(rate(pipeline_sync_quota_wait_seconds_total{@}[$__rate_interval]))", "waited"),),
                ),
            ),
        ),
        (
            "Work",
            (
                Panel(
                    "Events changed",
                    "Events written, and tombstones set, a second.",
                    "cps",
                    (("sum by (change) (rate(pipeline_sync_events_total{@}[$__rate_interval]))", "{{change}}"),),
                ),
                Panel(
                    "Leases and calls under way",
                    "Leases held now; calls are their bound, because only the process knows how many are under way.",
                    "short",
                    (
                        ("sum by (kind) (pipeline_sync_leases{@})", "leases on {{kind}}s"),
                        ("sum(pipeline_sync_calls_in_flight{@})", "calls at most"),
                    ),
                ),
                Panel(
                    "Open breakers",
                    "Of calendars that answer 410 every time, of connections Google does not answer for.",
                    "short",
                    (
                        (
                            'sum by (kind, state) (pipeline_sync_breakers{@,state!="closed"})',
                            "{{kind}} {{state}}",
                        ),
                    ),
                ),
                Panel(
                    "Notifications of Google",
                    "What the receiver got a second. wrong_token is refused and changes nothing.",
                    "cps",
                    (
                        (
                            "sum by (outcome) (rate(pipeline_sync_notifications_total{@}[$__rate_interval]))",
                            "{{outcome}}",
                        ),
                    ),
                ),
                Panel(
                    "Grants",
                    "refused: the user has to connect Google again. parked: Google asked for fewer calls.",
                    "short",
                    (("sum by (state) (pipeline_sync_connections{@})", "{{state}}"),),
                ),
                Panel(
                    "Events in quarantine",
                    "Events nobody can read; a later readable version releases them.",
                    "short",
                    (("sum(pipeline_sync_quarantined_events{@})", "events"),),
                    "number",
                ),
            ),
        ),
    ),
)

TENANT = Board(
    "pipeline-tenant",
    "Pipelines: one tenant",
    "How is this tenant's sync? From Postgres, because no label of Prometheus says whose a figure is; above it its "
    "class of tenants.",
    (
        (
            "Its class of tenants",
            (
                Panel(
                    "Calls of the class",
                    "Requests to Google a second of all tenants of the class; unknown, where tenants have no plan.",
                    "reqps",
                    (
                        (
                            'sum by (class) (rate(pipeline_sync_api_calls_total{@,class=~"$class"}[$__rate_interval]))',
                            "{{class}}",
                        ),
                    ),
                ),
                Panel(
                    "Workspaces of the class",
                    "By health.",
                    "short",
                    (('sum by (health) (pipeline_sync_workspaces{@,class=~"$class"})', "{{health}}"),),
                ),
                Panel(
                    "Calendars of the class",
                    "By state; see the dashboard of the fleet.",
                    "short",
                    (('sum by (state) (pipeline_sync_calendars{@,class=~"$class"})', "{{state}}"),),
                ),
            ),
        ),
        (
            "The tenant",
            (
                Panel(
                    "Its workspaces",
                    "Health of each, since when and why.",
                    "short",
                    (
                        (
                            (
                                "SELECT workspace_id, health, health_reason, health_since, last_served_at FROM "
                                "sync.workspace_state WHERE tenant_id::text = ${tenant:sqlstring} "
                                "ORDER BY health = 'healthy', workspace_id LIMIT 200"
                            ),
                            "",
                        ),
                    ),
                    "table",
                    of_postgres=True,
                ),
                Panel(
                    "Its calendars",
                    "When each was synced last, how that ended, when it is due; those that fail first. No names.",
                    "short",
                    (
                        (
                            (
                                "SELECT workspace_id, count(*) AS calendars, min(last_succeeded_at) AS oldest_sync, "
                                "min(due_at) AS next_due, sum((consecutive_failures > 0)::int) AS failing, "
                                "sum((breaker_until > now())::int) AS open_breakers FROM sync.calendar_status "
                                "WHERE tenant_id::text = ${tenant:sqlstring} "
                                "GROUP BY workspace_id ORDER BY failing DESC, oldest_sync LIMIT 200"
                            ),
                            "",
                        ),
                    ),
                    "table",
                    of_postgres=True,
                ),
                Panel(
                    "Its calls to Google, by day",
                    "Of the last 30 days, by method and outcome.",
                    "short",
                    (
                        (
                            (
                                "SELECT day, method, outcome, sum(calls) AS calls FROM sync.api_calls "
                                "WHERE tenant_id::text = ${tenant:sqlstring} AND day > current_date - 30 "
                                "GROUP BY 1, 2, 3 ORDER BY 1 DESC, 4 DESC"
                            ),
                            "",
                        ),
                    ),
                    "table",
                    of_postgres=True,
                ),
            ),
        ),
    ),
    of_tenant=True,
)

ARCHIVE = Board(
    "pipeline-archive",
    "Pipelines: archive",
    "Is every closed month in the archive, verified, and are there partitions for the months to come?",
    (
        (
            "Archive",
            (
                Panel(
                    "Months by state",
                    "failed: the run's error names the remedy. pruned: archived, and dropped from Postgres.",
                    "short",
                    (("sum by (state) (pipeline_archive_months{@})", "{{state}}"),),
                ),
                Panel(
                    "Rows archived",
                    "Rows in the archive, all months together.",
                    "short",
                    (("sum(pipeline_archive_rows{@})", "rows"),),
                ),
                Panel(
                    "Bytes archived",
                    "Parquet on S3, without manifests and links.",
                    "bytes",
                    (("sum(pipeline_archive_bytes{@})", "bytes"),),
                ),
                Panel(
                    "Since the last archived month",
                    "A month closes every month; over 40 days means that nothing asks.",
                    "s",
                    (("time() - max(pipeline_archive_last_timestamp_seconds{@})", "since"),),
                    "number",
                ),
                Panel(
                    "Verification failures and other errors",
                    "Months whose newest attempt failed. One that failed verification published nothing.",
                    "short",
                    (
                        ("sum(pipeline_archive_verification_failures{@})", "verification"),
                        ("sum(pipeline_archive_errors{@})", "any reason"),
                    ),
                ),
                Panel(
                    "Late rows",
                    "Rows that came after their month was archived: in the archive as a further part, or waiting.",
                    "short",
                    (("sum by (state) (pipeline_archive_late_rows{@})", "{{state}}"),),
                ),
                Panel(
                    "Erased rows, abandoned uploads",
                    "Rows removed on request; objects an attempt left, which the next run of their month removes.",
                    "short",
                    (
                        ("sum(pipeline_archive_erased_rows{@})", "erased rows"),
                        ("sum(pipeline_archive_abandoned_uploads{@})", "abandoned uploads"),
                    ),
                ),
            ),
        ),
        (
            "The table in Postgres",
            (
                Panel(
                    "Premade partitions",
                    "Empty partitions of coming months; Postgres refuses rows beyond the last.",
                    "short",
                    (
                        ("min(pipeline_archive_premade_partitions{@})", "there"),
                        ("max(pipeline_archive_premade_partitions_wanted{@})", "wanted"),
                    ),
                ),
                Panel(
                    "Until rows are refused",
                    "Until the last partition ends.",
                    "s",
                    (("min(pipeline_archive_partitions_end_seconds{@})", "left"),),
                    "number",
                ),
                Panel(
                    "Runs of the archive",
                    "95 % of the runs of the last six hours were shorter.",
                    "s",
                    (
                        (
                            (
                                "histogram_quantile(0.95, sum by (le) ("
                                'rate(pipeline_dagster_run_duration_seconds_bucket{@,location="archive_pipeline"}[6h])))'
                            ),
                            "p95",
                        ),
                    ),
                ),
            ),
        ),
    ),
)

SCALING = Board(
    "pipeline-scaling",
    "Pipelines: scaling headroom",
    "How far is each figure of the scaling plan from its threshold, what was crossed, and what is done about it?",
    (
        (
            "The plan's four",
            (
                Panel(
                    "Concurrent connections",
                    "Clients of Postgres and of its pooler, invocations of functions in flight.",
                    "short",
                    (("max by (of) (app_concurrent_connections{@})", "{{of}}"),),
                ),
                Panel(
                    "Hit rate of the cache",
                    "Below 20 % a person is told.",
                    "percentunit",
                    (("max(app_cache_hit_ratio{@})", "hits"),),
                ),
                Panel(
                    "Database pool in use",
                    "Over 80 % a person is told.",
                    "percentunit",
                    (("max by (pool) (app_database_pool_utilization_ratio{@})", "{{pool}}"),),
                ),
                Panel(
                    "API latency",
                    "p95 and p99 of the last hour, the slowest routes.",
                    "s",
                    (("max by (quantile, of) (app_api_latency_seconds{@})", "{{quantile}} {{of}}"),),
                ),
            ),
        ),
        (
            "Thresholds",
            (
                Panel(
                    "Used of the way to the threshold",
                    "100 % is there. A metric without figures is absent, never at 0.",
                    "percentunit",
                    (("sort_desc(max by (metric) (pipeline_scaling_used_ratio{@}))", "{{metric}}"),),
                    "bars",
                ),
                Panel(
                    "Used, over time",
                    "The same, as it came about.",
                    "percentunit",
                    (("max by (metric) (pipeline_scaling_used_ratio{@})", "{{metric}}"),),
                ),
                Panel(
                    "Figures and thresholds",
                    "Each in its metric's own unit; python -m scaling explain METRIC names it.",
                    "short",
                    (
                        ("max by (metric) (pipeline_scaling_value{@})", "value"),
                        ("max by (metric) (pipeline_scaling_threshold{@})", "threshold"),
                    ),
                    "table",
                ),
                Panel(
                    "Rules by phase",
                    "fired: the threshold is crossed. latched: it fired, and waits for a person to re-arm it.",
                    "short",
                    (("count by (phase) (pipeline_scaling_phase{@} == 1)", "{{phase}}"),),
                ),
                Panel(
                    "Measurements by outcome",
                    "What is not ok moves no rule. not_configured is no fault.",
                    "short",
                    (("count by (status) (pipeline_scaling_sample_status{@} == 1)", "{{status}}"),),
                ),
                Panel(
                    "Oldest measurement",
                    "Since each metric was measured last; the slowest are measured once a day.",
                    "s",
                    (("max by (metric) (pipeline_scaling_sample_age_seconds{@})", "{{metric}}"),),
                ),
            ),
        ),
        (
            "What is done",
            (
                Panel(
                    "Episodes by state",
                    "proposed waits for an approval, needs_human for a person.",
                    "short",
                    (("sum by (state) (pipeline_scaling_episodes{@})", "{{state}}"),),
                ),
                Panel(
                    "Episodes that wait",
                    "Since the oldest of each state fired that nobody acknowledged and that is not over.",
                    "s",
                    (("max by (state) (pipeline_scaling_episode_waits_seconds{@})", "{{state}}"),),
                ),
                Panel(
                    "Capabilities in force",
                    "What thresholds, or people, have switched on.",
                    "bool_on_off",
                    (("max by (capability) (pipeline_scaling_capability_in_force{@})", "{{capability}}"),),
                    "number",
                ),
            ),
        ),
    ),
)

HEALTH = Board(
    "pipeline-health",
    "Pipelines: health",
    "Do schedules, sensors, daemons and runs do their work, and can all figures be read?",
    (
        (
            "Runs",
            (
                Panel(
                    "Runs that wait or are at work",
                    "By Dagster's status. A killed run stays STARTED until run monitoring finds it.",
                    "short",
                    (("sum by (location, status) (pipeline_dagster_runs{@})", "{{location}} {{status}}"),),
                ),
                Panel(
                    "Oldest run",
                    "How long the oldest run of each status has waited, or been at work.",
                    "s",
                    (
                        (
                            "max by (location, status) (pipeline_dagster_oldest_run_age_seconds{@})",
                            "{{location}} {{status}}",
                        ),
                    ),
                ),
                Panel(
                    "Runs ended today",
                    "Since midnight UTC. A run of the sync fails when a workspace begins to need a human.",
                    "short",
                    (
                        (
                            "sum by (location, outcome) (increase(pipeline_dagster_runs_ended_total{@}[1h]))",
                            "{{location}} {{outcome}}",
                        ),
                    ),
                ),
                Panel(
                    "Runs that were killed",
                    "Killed, lost or never started, in the last hour. Nothing is lost; look at memory and deployments.",
                    "short",
                    (("sum by (location) (increase(pipeline_dagster_runs_killed_total{@}[1h]))", "{{location}}"),),
                ),
                Panel(
                    "Duration of runs",
                    "95 % of the runs of the last six hours were shorter; killed ones count.",
                    "s",
                    (
                        (
                            (
                                "histogram_quantile(0.95, sum by (location, le) "
                                "(rate(pipeline_dagster_run_duration_seconds_bucket{@}[6h])))"
                            ),
                            "{{location}}",
                        ),
                    ),
                ),
                Panel(
                    "Runs of the sync",
                    "In the last hour, by how they ended; died: no heartbeat for five minutes.",
                    "short",
                    (
                        ("sum by (outcome) (increase(pipeline_sync_runs_total{@}[1h]))", "{{outcome}}"),
                        ("sum(pipeline_sync_runs_at_work{@})", "at work"),
                    ),
                ),
                Panel(
                    "Since the last run of the sync began",
                    "A tick starts every two minutes.",
                    "s",
                    (("max(pipeline_sync_last_run_age_seconds{@})", "since"),),
                    "number",
                ),
            ),
        ),
        (
            "Schedules, sensors, daemons",
            (
                Panel(
                    "Ticks by outcome",
                    "A second. skipped is the ordinary outcome of a sensor that finds nothing to do.",
                    "cps",
                    (
                        (
                            "sum by (name, status) (rate(pipeline_dagster_ticks_total{@}[$__rate_interval]))",
                            "{{name}} {{status}}",
                        ),
                    ),
                ),
                Panel(
                    "Since the last tick",
                    "Of each schedule and sensor.",
                    "s",
                    (("max by (name) (pipeline_dagster_tick_age_seconds{@})", "{{name}}"),),
                ),
                Panel(
                    "Newest tick failed",
                    "Of each schedule and sensor that ever ticked.",
                    "bool_yes_no",
                    (("max by (name) (pipeline_dagster_tick_failed{@})", "{{name}}"),),
                    "number",
                ),
                Panel(
                    "Switched on",
                    "Schedules and sensors that somebody, or their default, switched on or off.",
                    "bool_on_off",
                    (("max by (name) (pipeline_dagster_automation_on{@})", "{{name}}"),),
                    "number",
                ),
                Panel(
                    "Silence of daemons",
                    "Since each daemon's last heartbeat, which comes every half minute.",
                    "s",
                    (("max by (daemon) (pipeline_dagster_daemon_age_seconds{@})", "{{daemon}}"),),
                ),
            ),
        ),
        (
            "This exporter",
            (
                Panel(
                    "Parts that could be read",
                    "A part that could not leaves out its own figures only.",
                    "bool_yes_no",
                    (("min by (part) (pipeline_scrape_part_ok{@})", "{{part}}"),),
                    "number",
                ),
                Panel(
                    "Time of a scrape",
                    "By part, and together; at EXPORTER_TIMEOUT_SECONDS figures go missing.",
                    "s",
                    (
                        ("max by (part) (pipeline_scrape_part_seconds{@})", "{{part}}"),
                        ("max(pipeline_scrape_seconds{@})", "together"),
                    ),
                ),
            ),
        ),
    ),
)

BOARDS = (FLEET, TENANT, ARCHIVE, SCALING, HEALTH)


def expression(ask: str) -> str:
    """PromQL as Grafana gets it.

    Args:
        ask: with `@` for the job and the instance that are chosen.
    """
    return ask.replace("{@", "{" + CHOSEN)


def built(board: Board) -> Built:
    """A dashboard as Grafana's model has it.

    Args:
        board: what it shows.
    """
    made = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags(["pipelines"])
        .readonly()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .refresh("1m")
        .time("now-24h", "now")
        .timezone("utc")
    )
    for variable in _variables(board):
        made = made.with_variable(variable)
    number = 0
    for heading, panels in board.rows:
        number += 1
        made = made.with_row(dashboard.Row(heading).id(number))
        for panel in panels:
            number += 1
            made = made.with_panel(_panel(panel, number))
    return made.build()


def _variables(board: Board) -> list[Any]:
    every = VariableOption(text="All", value="$__all")
    variables: list[Any] = [dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus")]
    for name, query in (
        ("job", "label_values(pipeline_scrape_seconds, job)"),
        ("instance", 'label_values(pipeline_scrape_seconds{job=~"$job"}, instance)'),
        *((("class", 'label_values(pipeline_sync_workspaces{job=~"$job"}, class)'),) if board.of_tenant else ()),
    ):
        variables.append(
            dashboard.QueryVariable(name)
            .label(name.capitalize())
            .datasource(PROMETHEUS)
            .query(query)
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(multi=True)
            .include_all(include_all=True)
            .all_value(".+")
            .current(every)
        )
    if board.of_tenant:
        variables += [
            dashboard.DatasourceVariable("postgres").label("Postgres").type("grafana-postgresql-datasource"),
            dashboard.QueryVariable("tenant")
            .label("Tenant")
            .datasource(POSTGRES)
            .query("SELECT DISTINCT tenant_id::text FROM sync.workspace_state ORDER BY 1 LIMIT 5000")
            .refresh(VariableRefresh.ON_DASHBOARD_LOAD),
        ]
    return variables


def _panel(panel: Panel, number: int) -> Any:  # noqa: ANN401 - the library's panels have no common type
    made = KINDS[panel.kind]().id(number).title(panel.title).description(panel.description).unit(panel.unit)
    made = made.span(24 if panel.kind == "table" else 12).height(8)
    if panel.of_postgres:
        return made.datasource(POSTGRES).with_target(_Sql(panel.asks[0][0]))
    if panel.kind == "lines":
        legend = common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
        made = made.legend(legend.show_legend(show_legend=True))
    for position, (ask, legend_format) in enumerate(panel.asks):
        target = (
            prometheus.Dataquery()
            .expr(expression(ask))
            .legend_format(legend_format)
            .ref_id(chr(ord("A") + position))
            .datasource(PROMETHEUS)
        )
        made = made.with_target(target.range() if panel.kind == "lines" else target.instant())
    return made.datasource(PROMETHEUS)


def as_json(board: Board) -> str:
    """A dashboard as a file that Grafana imports, or provisions.

    Args:
        board: what it shows.
    """
    document = json.loads(JSONEncoder(sort_keys=True).encode(built(board)))
    for variable in document["templating"]["list"]:
        for key in OF_INTERVALS:
            variable.pop(key, None)
    return json.dumps(document, sort_keys=True, indent=2) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write every dashboard.

    Args:
        arguments: without the program's name; None takes them from the process.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(prog="python -m observability.dashboards", description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=DIRECTORY, help="where to (default: %(default)s)")
    directory: Path = parser.parse_args(arguments).directory
    directory.mkdir(parents=True, exist_ok=True)
    for board in BOARDS:
        (directory / f"{board.uid}.json").write_text(as_json(board))
        sys.stdout.write(f"{directory / board.uid}.json\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
