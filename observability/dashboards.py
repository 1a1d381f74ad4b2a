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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.variants import Dataquery
from grafana_foundation_sdk.models.common import (
    BarAlignment,
    BarGaugeDisplayMode,
    BigValueColorMode,
    BigValueGraphMode,
    BigValueTextMode,
    GraphDrawStyle,
    GraphThresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.dashboard import Dashboard as Built
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    FieldColorModeId,
    Threshold,
    ThresholdsMode,
    VariableOption,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

DIRECTORY = Path(__file__).parent / "grafana"
OF_INTERVALS = ("auto", "auto_count", "auto_min")
"""The builder library gives them to every variable; Grafana's types have them of intervals only."""
CHOSEN = 'job=~"$job",instance=~"$instance"'
PROMETHEUS = DataSourceRef(type_val="prometheus", uid="${datasource}")
POSTGRES = DataSourceRef(type_val="grafana-postgresql-datasource", uid="${postgres}")
KINDS: dict[str, Any] = {
    "lines": timeseries.Panel,
    "days": timeseries.Panel,
    "number": stat.Panel,
    "bars": bargauge.Panel,
    "table": table.Panel,
}
HEIGHTS = {"lines": 8, "days": 8, "number": 5, "bars": 8, "table": 9}
BELOW_ALL = None
"""Where the lowest color begins."""

OF_BREAKERS = {
    "calendar open": "red",
    "connection open": "dark-red",
    "calendar half_open": "yellow",
    "connection half_open": "dark-yellow",
}
OF_FAILED_CALLS = {"410": "blue", "429": "orange", "/^5/": "red", "no_answer": "purple"}
OF_NOTIFICATIONS = {
    "accepted": "green",
    "sync": "blue",
    "unknown_channel": "yellow",
    "malformed": "orange",
    "wrong_token": "red",
}
OF_ENDED_RUNS = {
    "sync_pipeline success": "green",
    "archive_pipeline success": "blue",
    "scaling success": "purple",
    "/ failure$/": "red",
    "/ canceled$/": "orange",
}
OF_EPISODES = {
    "observed": "blue",
    "proposed": "orange",
    "approved": "purple",
    "acting": "yellow",
    "acted": "green",
    "action_failed": "dark-orange",
    "needs_human": "red",
    "expired": "text",
}
OF_HEALTH = {"healthy": "green", "degraded": "orange", "needs_human": "red", "new": "blue"}
OF_CALENDARS = {"fresh": "green", "waiting": "yellow", "failing": "orange", "overdue": "red", "never_synced": "blue"}
OF_GRANTS = {"active": "green", "parked": "yellow", "refused": "red"}
OF_MONTHS = {"archived": "green", "pruned": "blue", "archiving": "yellow", "failed": "red"}
OF_SYNC_RUNS = {"finished": "green", "at work": "blue", "died": "red"}
OF_TICKS = {"success": "green", "skipped": "blue", "started": "yellow", "failure": "red"}
OF_PHASES = {"ok": "green", "pending": "yellow", "fired": "red", "clearing": "blue", "latched": "purple"}
OF_SAMPLES = {
    "ok": "green",
    "empty": "blue",
    "partial": "yellow",
    "stale": "orange",
    "error": "red",
    "not_configured": "text",
}

Steps = Sequence[tuple[float | None, str]]
TELLS: Steps = ((BELOW_ALL, "blue"),)
"""A figure that is neither good nor bad."""


def worse_from(limit: float, color: str = "red") -> Steps:
    """Colors of a figure that should stay below a limit; where there is an alert, its limit.

    Args:
        limit: from which on it is bad.
        color: of what is bad.
    """
    return ((BELOW_ALL, "green"), (limit, color))


def worse_below(limit: float) -> Steps:
    """Colors of a figure that should stay above a limit.

    Args:
        limit: below which it is bad.
    """
    return ((BELOW_ALL, "red"), (limit, "green"))


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel.

    Attributes:
        title: what it shows.
        description: what it means, and when to worry.
        unit: of Grafana.
        asks: expressions of PromQL with the legends of their series; or, of a panel of Postgres, one query of SQL.
        kind: lines, days (bars, one a day), number, bars or table.
        width: columns, of 24.
        trend: a number has its last hours below it.
        steps: colors by value; behind lines, the zone of what is bad.
        colors: of series, by name or by /pattern/, where their names say what is good.
        bad: whatever there is of it is bad, so all of it is red.
        stacked: lines are areas, one upon the other.
        high: end of the scale, where 100 % is one; None leaves it to the data.
        many: lines are so many that the legend needs a table of its own, the largest first.
        columns: of a table or of several numbers, by name: unit, and colors by value.
        texts: of a table's columns, by name: colors of what they say.
        joined_by: the label that is a table's first column; its other columns are the asks, by their legends.
        height: of 30 pixels; 0 takes that of its kind.
        of_postgres: it asks Postgres.
    """

    title: str
    description: str
    unit: str
    asks: Sequence[tuple[str, str]]
    kind: str = "lines"
    width: int = 12
    trend: bool = True
    steps: Steps = ()
    colors: Mapping[str, str] = field(default_factory=dict)
    bad: bool = False
    stacked: bool = False
    high: float | None = None
    many: bool = False
    columns: Mapping[str, tuple[str, Steps]] = field(default_factory=dict)
    texts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    joined_by: str = ""
    height: int = 0
    of_postgres: bool = False


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard.

    Attributes:
        uid: also the name of its file.
        title: for people.
        description: what it answers.
        rows: panels below headings; the first has the answer in numbers.
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
    format: str
    ref_id: str = "A"

    def to_json(self) -> dict[str, object]:
        """As Grafana has it."""
        return {
            "datasource": POSTGRES,
            "editorMode": "code",
            "format": self.format,
            "rawQuery": True,
            "rawSql": self.sql,
            "refId": self.ref_id,
        }

    def build(self) -> Dataquery:
        """The builder's interface; it is built already."""
        return self


def _age(quantile: float) -> str:
    return (
        f"histogram_quantile({quantile}, sum by (le) "
        "(rate(pipeline_sync_change_age_seconds_bucket{@}[$__rate_interval])))"
    )


def _of_last_hour(labels: str, counter: str) -> str:
    """How much a counter grew, by labels, its first appearance included.

    A label that something rare brings with it (a reason, a failure) appears with the value 1 already, and `increase`
    takes what a series begins with for nothing.
    """
    return f"sum by ({labels}) (({counter} unless {counter} offset 1h) or increase({counter}[1h])) > 0"


NONE = "/^ ?none$/"
"""The series of `_or_none`, whose edge would otherwise lie on what is stacked below it."""


def _or_none(ask: str, label: str) -> str:
    """What finds nothing while all is well: a series `none` at 0 beside it, as long as figures are scraped at all."""
    return f'{ask} or label_replace(0 * max(pipeline_scrape_seconds{{@}}), "{label}", "none", "", "")'


FLEET = Board(
    "pipeline-fleet",
    "Pipelines: fleet sync",
    "Is every calendar as fresh as it should be, at what cost in calls, and who waits for somebody?",
    (
        (
            "At a glance",
            (
                Panel(
                    "Calendars overdue",
                    "Share of all calendars that have been due for 15 minutes though nothing holds them up. Over 1 % "
                    "somebody is told.",
                    "percentunit",
                    (
                        (
                            'sum(pipeline_sync_calendars{@,state="overdue"}) / sum(pipeline_sync_calendars{@})',
                            "of all calendars",
                        ),
                    ),
                    "number",
                    width=4,
                    steps=worse_from(0.01),
                ),
                Panel(
                    "Longest overdue",
                    "How long the calendar has been due that has been due for longest, of those nothing holds up.",
                    "s",
                    (("max(pipeline_sync_overdue_seconds{@})", "overdue by"),),
                    "number",
                    width=4,
                    steps=worse_from(900, "orange"),
                ),
                Panel(
                    "Age of 95 % of changes",
                    "95 % of changes were visible sooner than this. Over an hour somebody is told.",
                    "s",
                    ((_age(0.95), "p95"),),
                    "number",
                    width=4,
                    steps=worse_from(3600),
                ),
                Panel(
                    "Need a human",
                    "Workspaces for which somebody has to act; the red partition of calendar_events says who and what.",
                    "short",
                    (('sum(pipeline_sync_workspaces{@,health="needs_human"})', "workspaces"),),
                    "number",
                    width=4,
                    steps=worse_from(1),
                ),
                Panel(
                    "Left of the day's quota",
                    "Of SYNC_CALLS_PER_DAY; at 0 the sync pauses until midnight in California.",
                    "percentunit",
                    (("min(pipeline_quota_headroom_ratio{@})", "left"),),
                    "number",
                    width=4,
                    steps=worse_below(0.2),
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
                    width=4,
                    steps=TELLS,
                ),
            ),
        ),
        (
            "Freshness",
            (
                Panel(
                    "Age of changes",
                    "How old changes were when they became visible, half of them and 95 %. With push seconds, polled "
                    "up to SYNC_POLL_CEILING_SECONDS.",
                    "s",
                    tuple((_age(quantile), f"p{quantile * 100:g}") for quantile in (0.5, 0.95)),
                ),
                Panel(
                    "Calendars that are not fresh",
                    "waiting: for a grant, for quota, or behind an open breaker. overdue: due for 15 minutes, and "
                    "nothing holds it up.",
                    "short",
                    (('sum by (state) (pipeline_sync_calendars{@,state!="fresh"})', "{{state}}"),),
                    colors=OF_CALENDARS,
                    stacked=True,
                ),
                Panel(
                    "Workspaces that are not healthy",
                    "needs_human: somebody has to act; the red partition of calendar_events says who and what.",
                    "short",
                    (('sum by (health) (pipeline_sync_workspaces{@,health!="healthy"})', "{{health}}"),),
                    colors=OF_HEALTH,
                    stacked=True,
                ),
                Panel(
                    "Grants that wait",
                    "refused: the user has to connect Google again. parked: Google asked for fewer calls.",
                    "short",
                    (('sum by (state) (pipeline_sync_connections{@,state!="active"})', "{{state}}"),),
                    colors=OF_GRANTS,
                    stacked=True,
                ),
            ),
        ),
        (
            "Calls to Google",
            (
                Panel(
                    "Calls by method",
                    "Requests a second. events.list reads changes, calendarList.list the list of calendars, "
                    "events.watch asks for push, oauth.refresh for a new token.",
                    "reqps",
                    (("sum by (method) (rate(pipeline_sync_api_calls_total{@}[$__rate_interval]))", "{{method}}"),),
                    stacked=True,
                ),
                Panel(
                    "Calls that failed, by outcome",
                    "Requests a second whose answer was not 2xx. 410 costs a full read, 429 asks for fewer calls.",
                    "reqps",
                    (
                        (
                            _or_none(
                                'sum by (outcome) (rate(pipeline_sync_api_calls_total{@,outcome!~"2..|304"}'
                                "[$__rate_interval]))",
                                "outcome",
                            ),
                            "{{outcome}}",
                        ),
                    ),
                    colors=OF_FAILED_CALLS,
                    stacked=True,
                ),
                Panel(
                    "Headroom of the day's quota",
                    "Left of SYNC_CALLS_PER_DAY; at 0 the sync pauses until midnight in California.",
                    "percentunit",
                    (("min(pipeline_quota_headroom_ratio{@})", "left"),),
                    width=8,
                    steps=worse_below(0.2),
                    high=1,
                ),
                Panel(
                    "The minute's bucket, and the rate in force",
                    "Fill below 0: processes wait. Rate below 1: Google refused several tenants at once.",
                    "percentunit",
                    (
                        ("min(pipeline_quota_fill_ratio{@})", "fill"),
                        ("min(pipeline_quota_rate_ratio{@})", "rate"),
                    ),
                    width=8,
                    high=1,
                ),
                Panel(
                    "Workers that waited for quota",
                    "At a time, on average. Much of it: fewer workers would do.",
                    "short",
                    (("sum(rate(pipeline_sync_quota_wait_seconds_total{@}[$__rate_interval]))", "waiting"),),
                    width=8,
                ),
            ),
        ),
        (
            "Work",
            (
                Panel(
                    "Events changed",
                    "Events written, and tombstones set, a second.",
                    "eps",
                    (("sum by (change) (rate(pipeline_sync_events_total{@}[$__rate_interval]))", "{{change}}"),),
                    colors={"upserted": "blue", "tombstoned": "yellow", "quarantined": "red"},
                    stacked=True,
                ),
                Panel(
                    "Notifications of Google",
                    "What the receiver got a second. wrong_token is refused and changes nothing.",
                    "mps",
                    (
                        (
                            "sum by (outcome) (rate(pipeline_sync_notifications_total{@}[$__rate_interval]))",
                            "{{outcome}}",
                        ),
                    ),
                    colors=OF_NOTIFICATIONS,
                    stacked=True,
                ),
                Panel(
                    "Leases and calls under way",
                    "Leases held now; calls are their bound, because only the process knows how many are under way.",
                    "short",
                    (
                        ("sum by (kind) (pipeline_sync_leases{@})", "leases on {{kind}}s"),
                        ("sum(pipeline_sync_calls_in_flight{@})", "calls at most"),
                    ),
                    width=8,
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
                    width=8,
                    colors=OF_BREAKERS,
                    stacked=True,
                ),
                Panel(
                    "Events in quarantine",
                    "Events nobody can read; a later readable version releases them.",
                    "short",
                    (("sum(pipeline_sync_quarantined_events{@})", "events"),),
                    width=8,
                ),
            ),
        ),
    ),
)

TENANT = Board(
    "pipeline-tenant",
    "Pipelines: one tenant",
    "How is this tenant's sync? From Postgres, because no label of Prometheus says whose a figure is; below it its "
    "class of tenants.",
    (
        (
            "The tenant",
            (
                Panel(
                    "Workspaces that need a human",
                    "The table below says why.",
                    "short",
                    (
                        (
                            (
                                "SELECT count(*) FILTER (WHERE health = 'needs_human') AS workspaces "
                                "FROM sync.workspace_state "
                                "WHERE tenant_id::text = ${tenant:sqlstring} HAVING count(*) > 0"
                            ),
                            "",
                        ),
                    ),
                    "number",
                    width=6,
                    steps=worse_from(1),
                    of_postgres=True,
                ),
                Panel(
                    "Calendars that fail",
                    "Whose last look failed.",
                    "short",
                    (
                        (
                            (
                                "SELECT count(*) FILTER (WHERE consecutive_failures > 0) AS calendars "
                                "FROM sync.calendar_status "
                                "WHERE tenant_id::text = ${tenant:sqlstring} HAVING count(*) > 0"
                            ),
                            "",
                        ),
                    ),
                    "number",
                    width=6,
                    steps=worse_from(1, "orange"),
                    of_postgres=True,
                ),
                Panel(
                    "Oldest sync",
                    "Since the calendar was synced that was not for longest; with push it is read once a day.",
                    "s",
                    (
                        (
                            (
                                "SELECT extract(epoch FROM now() - min(last_succeeded_at))::float8 AS since "
                                "FROM sync.calendar_status "
                                "WHERE tenant_id::text = ${tenant:sqlstring} HAVING count(*) > 0"
                            ),
                            "",
                        ),
                    ),
                    "number",
                    width=6,
                    steps=worse_from(2 * 86400, "orange"),
                    of_postgres=True,
                ),
                Panel(
                    "Calls to Google today",
                    "Since midnight UTC, token refreshes included.",
                    "short",
                    (
                        (
                            (
                                "SELECT sum(calls) FILTER (WHERE day = (now() AT TIME ZONE 'UTC')::date)::float8 "
                                "AS calls FROM sync.api_calls "
                                "WHERE tenant_id::text = ${tenant:sqlstring} HAVING count(*) > 0"
                            ),
                            "",
                        ),
                    ),
                    "number",
                    width=6,
                    steps=TELLS,
                    of_postgres=True,
                ),
                Panel(
                    "Its workspaces",
                    "Health of each, since when and why.",
                    "string",
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
                    width=24,
                    columns={"health_since": ("dateTimeAsIso", ()), "last_served_at": ("dateTimeAsIso", ())},
                    texts={"health": OF_HEALTH},
                    height=8,
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
                                "min(due_at) AS next_due, count(*) FILTER (WHERE consecutive_failures > 0) AS failing, "
                                "count(*) FILTER (WHERE breaker_until > now()) AS open_breakers "
                                "FROM sync.calendar_status WHERE tenant_id::text = ${tenant:sqlstring} "
                                "GROUP BY workspace_id ORDER BY failing DESC, oldest_sync LIMIT 200"
                            ),
                            "",
                        ),
                    ),
                    "table",
                    width=24,
                    columns={
                        "oldest_sync": ("dateTimeAsIso", ()),
                        "next_due": ("dateTimeAsIso", ()),
                        "failing": ("short", worse_from(1, "orange")),
                        "open_breakers": ("short", worse_from(1, "orange")),
                    },
                    height=8,
                    of_postgres=True,
                ),
                Panel(
                    "Its calls to Google, by day",
                    "By method and outcome; all days that are kept and shown. Token refreshes included.",
                    "short",
                    (
                        (
                            (
                                "SELECT day::timestamp AT TIME ZONE 'UTC' AS time, method || ' ' || outcome AS metric, "
                                "sum(calls)::float8 AS calls FROM sync.api_calls "
                                "WHERE tenant_id::text = ${tenant:sqlstring} "
                                "AND day > current_date - 30 GROUP BY 1, 2 ORDER BY 1"
                            ),
                            "",
                        ),
                    ),
                    "days",
                    width=24,
                    stacked=True,
                    of_postgres=True,
                ),
            ),
        ),
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
                    width=8,
                    stacked=True,
                ),
                Panel(
                    "Workspaces that are not healthy",
                    "Of the class, by health.",
                    "short",
                    (
                        (
                            'sum by (health) (pipeline_sync_workspaces{@,class=~"$class",health!="healthy"})',
                            "{{health}}",
                        ),
                    ),
                    width=8,
                    colors=OF_HEALTH,
                    stacked=True,
                ),
                Panel(
                    "Calendars that are not fresh",
                    "Of the class, by state; see the dashboard of the fleet.",
                    "short",
                    (
                        (
                            'sum by (state) (pipeline_sync_calendars{@,class=~"$class",state!="fresh"})',
                            "{{state}}",
                        ),
                    ),
                    width=8,
                    colors=OF_CALENDARS,
                    stacked=True,
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
            "At a glance",
            (
                Panel(
                    "Months that failed",
                    "The run's error names the remedy.",
                    "short",
                    (('sum(pipeline_archive_months{@,state="failed"})', "months"),),
                    "number",
                    width=6,
                    steps=worse_from(1),
                ),
                Panel(
                    "Failed verification",
                    "Months whose newest attempt was not what Postgres holds; nothing of it was published.",
                    "short",
                    (("sum(pipeline_archive_verification_failures{@})", "months"),),
                    "number",
                    width=6,
                    steps=worse_from(1),
                ),
                Panel(
                    "Findings of the newest audit",
                    "What in the bucket is not as it was published; python -m archive_pipeline.audit verify names it.",
                    "short",
                    (("max(pipeline_archive_audit_findings{@})", "findings"),),
                    "number",
                    width=6,
                    steps=worse_from(1),
                ),
                Panel(
                    "Late rows that wait",
                    "Rows that came after their month was archived, and are not in the archive yet.",
                    "short",
                    (('sum(pipeline_archive_late_rows{@,state="waiting"})', "rows"),),
                    "number",
                    width=6,
                    steps=worse_from(1, "orange"),
                ),
                Panel(
                    "Since the last audit",
                    "The chain is audited every night; after two days somebody is told.",
                    "s",
                    (("time() - min(pipeline_archive_audited_timestamp_seconds{@})", "since"),),
                    "number",
                    width=6,
                    steps=worse_from(2 * 86400),
                ),
                Panel(
                    "Since the last archived month",
                    "A month closes every month; over 40 days means that nothing asks.",
                    "s",
                    (("time() - max(pipeline_archive_last_timestamp_seconds{@})", "since"),),
                    "number",
                    width=6,
                    steps=worse_from(40 * 86400),
                ),
                Panel(
                    "Until rows are refused",
                    "Until the last partition ends. Below a week somebody is told.",
                    "s",
                    (("min(pipeline_archive_partitions_end_seconds{@})", "left"),),
                    "number",
                    width=6,
                    steps=worse_below(7 * 86400),
                ),
                Panel(
                    "Rows archived",
                    "Rows in the archive, all months together.",
                    "short",
                    (("sum(pipeline_archive_rows{@})", "rows"),),
                    "number",
                    width=6,
                    steps=TELLS,
                ),
            ),
        ),
        (
            "Archive",
            (
                Panel(
                    "Months by state",
                    "failed: the run's error names the remedy. pruned: archived, and dropped from Postgres.",
                    "short",
                    (("sum by (state) (pipeline_archive_months{@})", "{{state}}"),),
                    colors=OF_MONTHS,
                    stacked=True,
                ),
                Panel(
                    "Verification failures and other errors",
                    "Months whose newest attempt failed. One that failed verification published nothing.",
                    "short",
                    (
                        ("sum(pipeline_archive_verification_failures{@})", "verification"),
                        (
                            "sum(pipeline_archive_errors{@}) - sum(pipeline_archive_verification_failures{@})",
                            "other",
                        ),
                    ),
                    colors={"verification": "red", "other": "orange"},
                    stacked=True,
                ),
                Panel(
                    "Late rows",
                    "Rows that came after their month was archived: in the archive as a further part, or waiting.",
                    "short",
                    (("sum by (state) (pipeline_archive_late_rows{@})", "{{state}}"),),
                    width=8,
                    colors={"archived": "green", "waiting": "orange"},
                    stacked=True,
                ),
                Panel(
                    "Erased rows",
                    "Rows removed on request.",
                    "short",
                    (("sum(pipeline_archive_erased_rows{@})", "erased"),),
                    width=8,
                ),
                Panel(
                    "Abandoned uploads",
                    "Objects an attempt left, which the next run of their month removes.",
                    "short",
                    (("sum(pipeline_archive_abandoned_uploads{@})", "objects"),),
                    width=8,
                ),
                Panel(
                    "Bytes archived",
                    "Parquet on S3, without manifests and links.",
                    "bytes",
                    (("sum(pipeline_archive_bytes{@})", "bytes"),),
                ),
                Panel(
                    "Duration of runs",
                    "95 % of the runs of the last six hours were shorter; a gap: there was none.",
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
                    "Time until rows are refused",
                    "Until the last partition ends.",
                    "s",
                    (("min(pipeline_archive_partitions_end_seconds{@})", "left"),),
                    steps=worse_below(7 * 86400),
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
            "At a glance",
            (
                Panel(
                    "Thresholds crossed",
                    "Metrics whose newest figure is on the wrong side of its threshold.",
                    "short",
                    (("sum(max by (metric) (pipeline_scaling_crossed{@}))", "metrics"),),
                    "number",
                    width=6,
                    steps=worse_from(1, "orange"),
                ),
                Panel(
                    "Closest of the others",
                    "Used of the way to the threshold that is crossed next, if all grow alike.",
                    "percentunit",
                    (("max(pipeline_scaling_used_ratio{@} < 1)", "used"),),
                    "number",
                    width=6,
                    steps=worse_from(0.8, "orange"),
                    high=1,
                ),
                Panel(
                    "Episodes that wait for a person",
                    "proposed waits for an approval, needs_human for somebody to act.",
                    "short",
                    (('sum(pipeline_scaling_episodes{@,state=~"proposed|needs_human"})', "episodes"),),
                    "number",
                    width=6,
                    steps=worse_from(1, "orange"),
                ),
                Panel(
                    "Metrics that are silent",
                    "Whose newest measurement failed or is stale: their rules stand still.",
                    "short",
                    (
                        (
                            (
                                'count(pipeline_scaling_sample_status{@,status=~"error|stale"} == 1) '
                                "or 0 * max(pipeline_scrape_seconds{@})"
                            ),
                            "metrics",
                        ),
                    ),
                    "number",
                    width=6,
                    steps=worse_from(1),
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
                    steps=((BELOW_ALL, "green"), (0.8, "orange"), (1, "red")),
                    high=1,
                    height=16,
                ),
                Panel(
                    "Figures and thresholds",
                    "Each in its metric's own unit; python -m scaling explain METRIC names it.",
                    "short",
                    (
                        ("max by (metric) (pipeline_scaling_value{@})", "value"),
                        ("max by (metric) (pipeline_scaling_threshold{@})", "threshold"),
                        ("max by (metric) (pipeline_scaling_used_ratio{@})", "used"),
                    ),
                    "table",
                    columns={"used": ("percentunit", ((BELOW_ALL, "green"), (0.8, "orange"), (1, "red")))},
                    joined_by="metric",
                    height=16,
                ),
                Panel(
                    "Used, over time",
                    "The same, as it came about.",
                    "percentunit",
                    (("max by (metric) (pipeline_scaling_used_ratio{@})", "{{metric}}"),),
                    width=24,
                    steps=worse_from(1),
                    many=True,
                    height=10,
                ),
            ),
        ),
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
                    steps=worse_below(0.2),
                    high=1,
                ),
                Panel(
                    "Database pool in use",
                    "Over 80 % a person is told.",
                    "percentunit",
                    (("max by (pool) (app_database_pool_utilization_ratio{@})", "{{pool}}"),),
                    steps=worse_from(0.8),
                    high=1,
                ),
                Panel(
                    "API latency",
                    "Of the slowest route, in the last hour. Over 1 s (p95) and 3 s (p99) a person is told; "
                    "python -m scaling explain api_p95_ms names the routes.",
                    "s",
                    (
                        ('max(app_api_latency_seconds{@,quantile="0.95"})', "p95"),
                        ('max(app_api_latency_seconds{@,quantile="0.99"})', "p99"),
                    ),
                ),
            ),
        ),
        (
            "What is done",
            (
                Panel(
                    "Rules that are not at rest",
                    "fired: the threshold is crossed. latched: it fired, and waits for a person to re-arm it.",
                    "short",
                    (
                        (
                            _or_none('count by (phase) (pipeline_scaling_phase{@,phase!="ok"} == 1)', "phase"),
                            "{{phase}}",
                        ),
                    ),
                    width=8,
                    colors=OF_PHASES,
                    stacked=True,
                ),
                Panel(
                    "Episodes by state",
                    "proposed waits for an approval, needs_human for a person.",
                    "short",
                    ((_or_none("sum by (state) (pipeline_scaling_episodes{@}) > 0", "state"), "{{state}}"),),
                    width=8,
                    colors=OF_EPISODES,
                    stacked=True,
                ),
                Panel(
                    "Episodes that wait",
                    "Since the oldest of each state fired that nobody acknowledged and that is not over.",
                    "s",
                    (
                        (
                            _or_none("max by (state) (pipeline_scaling_episode_waits_seconds{@}) > 0", "state"),
                            "{{state}}",
                        ),
                    ),
                    width=8,
                    colors=OF_EPISODES,
                ),
                Panel(
                    "Measurements that are not ok",
                    "By outcome. They move no rule; not_configured is no fault.",
                    "short",
                    (
                        (
                            _or_none(
                                'count by (status) (pipeline_scaling_sample_status{@,status!="ok"} == 1)', "status"
                            ),
                            "{{status}}",
                        ),
                    ),
                    width=8,
                    colors=OF_SAMPLES,
                    stacked=True,
                ),
                Panel(
                    "Age of measurements",
                    "Since the metric was measured that was not for longest, and that was last. The slowest are "
                    "measured once a day.",
                    "s",
                    (
                        ("max(pipeline_scaling_sample_age_seconds{@})", "oldest"),
                        ("min(pipeline_scaling_sample_age_seconds{@})", "newest"),
                    ),
                    width=8,
                ),
                Panel(
                    "Capabilities in force",
                    "What thresholds, or people, have switched on.",
                    "bool_on_off",
                    (("max by (capability) (pipeline_scaling_capability_in_force{@})", "in force"),),
                    "table",
                    width=8,
                    columns={"in force": ("bool_on_off", ((BELOW_ALL, "text"), (1, "blue")))},
                    joined_by="capability",
                    height=8,
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
            "At a glance",
            (
                Panel(
                    "Since the last sync began",
                    "A tick starts every two minutes. Over 15 minutes somebody is told.",
                    "s",
                    (("max(pipeline_sync_last_run_age_seconds{@})", "since"),),
                    "number",
                    width=4,
                    trend=False,
                    steps=worse_from(900),
                ),
                Panel(
                    "Newest tick failed",
                    "Schedules and sensors whose newest tick failed.",
                    "short",
                    (("sum(max by (name) (pipeline_dagster_tick_failed{@}))", "failing"),),
                    "number",
                    width=4,
                    steps=worse_from(1),
                ),
                Panel(
                    "Longest silence of a daemon",
                    "Of those the pipelines need; each says something every half minute.",
                    "s",
                    (
                        (
                            (
                                "max(min by (daemon) (pipeline_dagster_daemon_age_seconds{@,"
                                'daemon=~"SENSOR|SCHEDULER|QUEUED_RUN_COORDINATOR|MONITORING"}))'
                            ),
                            "silence",
                        ),
                    ),
                    "number",
                    width=4,
                    trend=False,
                    steps=worse_from(300),
                ),
                Panel(
                    "Longest wait of a run",
                    "That is queued, or starts.",
                    "s",
                    (
                        (
                            'max(pipeline_dagster_oldest_run_age_seconds{@,status=~"QUEUED|NOT_STARTED|STARTING"})',
                            "waits",
                        ),
                    ),
                    "number",
                    width=4,
                    trend=False,
                    steps=worse_from(1800),
                ),
                Panel(
                    "Runs killed in the last hour",
                    "Killed, lost or never started. Nothing is lost; look at memory and deployments.",
                    "short",
                    (("sum(increase(pipeline_dagster_runs_killed_total{@}[1h]))", "killed"),),
                    "number",
                    width=4,
                    steps=worse_from(0.5),
                ),
                Panel(
                    "Parts that cannot be read",
                    "A part of the scrape that cannot be read leaves out its own figures only.",
                    "short",
                    (("sum(1 - min by (part) (pipeline_scrape_part_ok{@}))", "parts"),),
                    "number",
                    width=4,
                    steps=worse_from(1),
                ),
            ),
        ),
        (
            "Runs",
            (
                Panel(
                    "Runs that wait or are at work",
                    "By Dagster's status. A killed run stays STARTED until run monitoring finds it.",
                    "short",
                    (
                        (
                            _or_none("sum by (location, status) (pipeline_dagster_runs{@}) > 0", "status"),
                            "{{location}} {{status}}",
                        ),
                    ),
                    stacked=True,
                ),
                Panel(
                    "Oldest run",
                    "How long the oldest run of each status has waited, or been at work.",
                    "s",
                    (
                        (
                            _or_none(
                                "max by (location, status) (pipeline_dagster_oldest_run_age_seconds{@}) > 0", "status"
                            ),
                            "{{location}} {{status}}",
                        ),
                    ),
                ),
                Panel(
                    "Runs that ended",
                    "In the last hour. A run of the sync fails when a workspace begins to need a human.",
                    "short",
                    (
                        (
                            _or_none(
                                _of_last_hour("location, outcome", "pipeline_dagster_runs_ended_total{@}"), "outcome"
                            ),
                            "{{location}} {{outcome}}",
                        ),
                    ),
                    colors=OF_ENDED_RUNS,
                    stacked=True,
                ),
                Panel(
                    "Runs that were killed",
                    "Killed, lost or never started, in the last hour. Nothing is lost; look at memory and deployments.",
                    "short",
                    (("sum by (location) (increase(pipeline_dagster_runs_killed_total{@}[1h]))", "{{location}}"),),
                    bad=True,
                    stacked=True,
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
                    colors=OF_SYNC_RUNS,
                ),
            ),
        ),
        (
            "Schedules, sensors, daemons",
            (
                Panel(
                    "Schedules and sensors",
                    "That ever ticked, or were switched: on or off, whether the newest tick failed, since when there "
                    "was none.",
                    "short",
                    (
                        ("max by (name) (pipeline_dagster_automation_on{@})", "switched on"),
                        ("max by (name) (pipeline_dagster_tick_failed{@})", "newest tick failed"),
                        ("max by (name) (pipeline_dagster_tick_age_seconds{@})", "since the last tick"),
                    ),
                    "table",
                    columns={
                        "switched on": ("bool_on_off", ((BELOW_ALL, "orange"), (1, "green"))),
                        "newest tick failed": ("bool_yes_no", worse_from(1)),
                        "since the last tick": ("s", ()),
                    },
                    joined_by="name",
                    height=10,
                ),
                Panel(
                    "Silence of daemons",
                    "Since each daemon's last heartbeat, which comes every half minute. Over five minutes somebody is "
                    "told.",
                    "s",
                    (("sort_desc(max by (daemon) (pipeline_dagster_daemon_age_seconds{@}))", "{{daemon}}"),),
                    "bars",
                    steps=worse_from(300),
                    high=300,
                    height=10,
                ),
                Panel(
                    "Ticks by outcome",
                    "A second. skipped is the ordinary outcome of a sensor that finds nothing to do.",
                    "cps",
                    (("sum by (status) (rate(pipeline_dagster_ticks_total{@}[$__rate_interval]))", "{{status}}"),),
                    colors=OF_TICKS,
                    stacked=True,
                ),
                Panel(
                    "Ticks that failed",
                    "In the last hour, by schedule and sensor.",
                    "short",
                    (
                        (
                            _or_none(_of_last_hour("name", 'pipeline_dagster_ticks_total{@,status="failure"}'), "name"),
                            "{{name}}",
                        ),
                    ),
                    bad=True,
                    stacked=True,
                ),
            ),
        ),
        (
            "This exporter",
            (
                Panel(
                    "Parts that could not be read",
                    "A part that could not leaves out its own figures only.",
                    "short",
                    (("1 - min by (part) (pipeline_scrape_part_ok{@})", "{{part}}"),),
                    bad=True,
                    many=True,
                    stacked=True,
                ),
                Panel(
                    "Time of a scrape",
                    "By part, and together; at EXPORTER_TIMEOUT_SECONDS figures go missing.",
                    "s",
                    (
                        ("max by (part) (pipeline_scrape_part_seconds{@})", "{{part}}"),
                        ("max(pipeline_scrape_seconds{@})", "together"),
                    ),
                    many=True,
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
    made = made.span(panel.width).height(panel.height or HEIGHTS[panel.kind])
    if panel.high is not None:
        made = made.max(panel.high)
    if panel.steps:
        lines = panel.kind == "lines"  # a zone of them is drawn where it is bad, and only there
        steps = [
            Threshold(value=value, color="transparent" if lines and color == "green" else color)
            for value, color in panel.steps
        ]
        made = made.thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
    if panel.bad:
        made = made.color_scheme(dashboard.FieldColor().mode(FieldColorModeId.SHADES).fixed_color("red"))
    for name, color in {**panel.colors, **({NONE: "transparent"} if '"none"' in panel.asks[0][0] else {})}.items():
        fixed = {"mode": "fixed", "fixedColor": color}
        override = made.override_by_regexp if name.startswith("/") else made.override_by_name
        made = override(name, [DynamicConfigValue(id_val="color", value=fixed)])
    made = {"lines": _lines, "days": _days, "number": _number, "bars": _bars, "table": _table}[panel.kind](made, panel)
    if panel.of_postgres:
        return made.datasource(POSTGRES).with_target(
            _Sql(panel.asks[0][0], "time_series" if panel.kind == "days" else "table")
        )
    for position, (ask, legend_format) in enumerate(panel.asks):
        target = (
            prometheus.Dataquery()
            .expr(expression(ask))
            .legend_format(legend_format)
            .ref_id(_letter(position))
            .datasource(PROMETHEUS)
        )
        target = target.range() if panel.kind in ("lines", "number") else target.instant()
        if panel.kind == "table":
            target = target.format(PromQueryFormat.TABLE)
        made = made.with_target(target)
    return made.datasource(PROMETHEUS)


def _letter(position: int) -> str:
    return chr(ord("A") + position)


def _lines(made: Any, panel: Panel) -> Any:  # noqa: ANN401
    legend = common.VizLegendOptions().show_legend(show_legend=True)
    if panel.many:
        legend = legend.display_mode(LegendDisplayMode.TABLE).placement(LegendPlacement.RIGHT)
        legend = legend.calcs(["lastNotNull"]).sort_by("Last *").sort_desc(sort_desc=True)
    else:
        legend = legend.display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    made = made.legend(legend)
    made = made.tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
    made = made.axis_soft_min(0).show_points(VisibilityMode.AUTO)
    if panel.unit == "short":  # counts; an axis from 0 to 0.2 of them, or to 100 where all are 0, says nothing
        made = made.axis_soft_max(1)
    if panel.steps:
        made = made.thresholds_style(common.GraphThresholdsStyleConfig().mode(GraphThresholdsStyleMode.AREA))
    if panel.stacked:
        return made.fill_opacity(40).stacking(common.StackingConfig().mode(StackingMode.NORMAL).group("A"))
    return made.fill_opacity(10 if len(panel.asks) == 1 and "{{" not in panel.asks[0][1] else 0)


def _days(made: Any, panel: Panel) -> Any:  # noqa: ANN401
    made = _lines(made, panel).time_from("30d")
    return made.draw_style(GraphDrawStyle.BARS).line_width(0).fill_opacity(80).bar_alignment(BarAlignment.AFTER)


def _number(made: Any, panel: Panel) -> Any:  # noqa: ANN401
    graph = BigValueGraphMode.AREA if panel.trend and not panel.of_postgres else BigValueGraphMode.NONE
    made = made.graph_mode(graph).color_mode(BigValueColorMode.VALUE).reduce_options(_newest())
    # With a name Grafana puts the trend below the number; without one, across it.
    made = made.text_mode(BigValueTextMode.VALUE_AND_NAME)
    return made.text(common.VizTextDisplayOptions().title_size(14))


def _bars(made: Any, _panel: Panel) -> Any:  # noqa: ANN401
    made = made.orientation(VizOrientation.HORIZONTAL).display_mode(BarGaugeDisplayMode.BASIC).min(0)
    return made.reduce_options(_newest())


def _newest() -> common.ReduceDataOptions:
    return common.ReduceDataOptions().calcs(["lastNotNull"]).values(values=False).fields("")


COLORED_TEXT = DynamicConfigValue(id_val="custom.cellOptions", value={"type": "color-text"})


def _table(made: Any, panel: Panel) -> Any:  # noqa: ANN401
    for name, (unit, steps) in panel.columns.items():
        colors = [
            COLORED_TEXT,
            DynamicConfigValue(
                id_val="thresholds",
                value={"mode": "absolute", "steps": [{"value": value, "color": color} for value, color in steps]},
            ),
        ]
        made = made.override_by_name(name, [DynamicConfigValue(id_val="unit", value=unit), *(colors if steps else ())])
    for name, colors_of in panel.texts.items():
        options = {text: {"color": color, "index": index} for index, (text, color) in enumerate(colors_of.items())}
        mapped = DynamicConfigValue(id_val="mappings", value=[{"type": "value", "options": options}])
        made = made.override_by_name(name, [mapped, COLORED_TEXT])
    if panel.of_postgres:
        return made.override_by_name("workspace_id", [DynamicConfigValue(id_val="custom.width", value=320)])
    one = len(panel.asks) == 1
    names = {
        f"Value #{_letter(position)}" if not one else "Value": name for position, (_, name) in enumerate(panel.asks)
    }
    times = {f"Time {position + 1}" if not one else "Time": True for position in range(len(panel.asks))}
    if not one:
        made = made.with_transformation(
            DataTransformerConfig(id_val="joinByField", options={"byField": panel.joined_by, "mode": "outer"})
        )
    if "used" in panel.columns:
        made = made.sort_by([common.TableSortByFieldState().display_name("used").desc(desc=True)])
    return made.with_transformation(
        DataTransformerConfig(id_val="organize", options={"excludeByName": times, "renameByName": names})
    )


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
