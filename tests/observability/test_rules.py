"""Rules that record and alert: Prometheus checks them, and runs each alert on what is to fire and what is not."""

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from devstack import prometheus
from devstack.processes import CHECKOUT
from scaling.catalogue import catalogue
from scaling.errors import UserError
from scaling.settings import ArchiveSourceSettings, SyncScheduleSettings

RULES = CHECKOUT / "observability" / "rules"
OPERATIONS = CHECKOUT / "docs" / "operations.md"


def rules_of(path: Path) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    return [rule for path in sorted(RULES.glob("*.yml")) for rule in rules_of(path) if "alert" in rule]


@pytest.fixture(scope="module")
def promtool() -> Path:
    try:
        return prometheus.tool("promtool")
    except UserError as missing:
        pytest.skip(str(missing))


def ran(promtool: Path, *arguments: str | Path, cwd: Path = CHECKOUT) -> str:
    done = subprocess.run([promtool, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[:6000]
    return done.stdout


@dataclass(frozen=True, slots=True)
class Case:
    """Series of an alert: with which it fires at that time, and with which it does not.

    Values are in the notation of promtool, one a minute: `5x60` is 5 and stays so for an hour.
    """

    firing: Mapping[str, str]
    quiet: Mapping[str, str]
    at: str = "3h"
    labels: Mapping[str, str] = field(default_factory=dict)


def held(series: str, value: float, minutes: int = 1_600) -> dict[str, str]:
    return {series: f"{value:g}x{minutes}"}


ROUTE = 'metric="google_calls_month",of="all"'
CALLS = 'pipeline_sync_api_calls_total{class="free",method="events.list",outcome="%s"}'
AGE = 'pipeline_sync_change_age_seconds_bucket{le="%s"}'
DIED, FINISHED = (f'pipeline_sync_runs_total{{outcome="{outcome}"}}' for outcome in ("died", "finished"))
LATE = 'pipeline_archive_late_rows{state="%s"}'
CASES: Mapping[str, Case] = {
    "SyncStandsStill": Case(
        held("pipeline_sync_last_run_age_seconds", 1000), held("pipeline_sync_last_run_age_seconds", 899)
    ),
    "WorkspacesNeedAHuman": Case(
        held('pipeline_sync_workspaces{class="free",health="needs_human"}', 1),
        held('pipeline_sync_workspaces{class="free",health="degraded"}', 9),
    ),
    "CalendarsOverdue": Case(
        held('pipeline_sync_calendars{class="free",state="overdue"}', 2)
        | held('pipeline_sync_calendars{class="team",state="fresh"}', 98),
        held('pipeline_sync_calendars{class="free",state="overdue"}', 1)
        | held('pipeline_sync_calendars{class="team",state="fresh"}', 199),
    ),
    "ChangesArriveLate": Case(
        {AGE % "3600": "0+1x600", AGE % "7200": "0+2x600", AGE % "+Inf": "0+2x600"},
        {AGE % "1800": "0+98x600", AGE % "3600": "0+98x600", AGE % "7200": "0+100x600", AGE % "+Inf": "0+100x600"},
    ),
    "CallsToGoogleFail": Case(
        {CALLS % "200": "0+90x600", CALLS % "429": "0+10x600"}, {CALLS % "200": "0+97x600", CALLS % "500": "0+3x600"}
    ),
    "BreakersOpen": Case(
        held('pipeline_sync_breakers{kind="connection",state="open"}', 20)
        | held('pipeline_sync_breakers{kind="connection",state="closed"}', 80),
        held('pipeline_sync_breakers{kind="connection",state="open"}', 5)
        | held('pipeline_sync_breakers{kind="connection",state="closed"}', 95),
        labels={"kind": "connection"},
    ),
    "QuotaRunsOut": Case(
        held("pipeline_quota_headroom_ratio", 0.9)
        | held("pipeline_quota_projected_calls", 1001)
        | held('pipeline_quota_calls_limit{window="day"}', 1000)
        | held('pipeline_quota_calls_limit{window="minute"}', 10),
        held("pipeline_quota_headroom_ratio", 0.3)
        | held("pipeline_quota_projected_calls", 999)
        | held('pipeline_quota_calls_limit{window="day"}', 1000),
    ),
    "QuotaUsedUp": Case(held("pipeline_quota_headroom_ratio", 0), held("pipeline_quota_headroom_ratio", 0.01)),
    "GoogleSlowsTheProject": Case(held("pipeline_quota_rate_ratio", 0.25), held("pipeline_quota_rate_ratio", 0.5)),
    "EventsInQuarantine": Case(
        held("pipeline_sync_quarantined_events", 1), held("pipeline_sync_quarantined_events", 0)
    ),
    "SyncRunDied": Case(
        {
            'pipeline_sync_runs_total{outcome="died"}': "0x150 1x60",
            'pipeline_sync_runs_total{outcome="finished"}': "0+1x300",
        },
        {
            'pipeline_sync_runs_total{outcome="died"}': "0x20 1x400",
            'pipeline_sync_runs_total{outcome="finished"}': "0+1x300",
        },
    ),
    "NotificationsAreForged": Case(
        {'pipeline_sync_notifications_total{outcome="wrong_token"}': "0+1x300"},
        {
            'pipeline_sync_notifications_total{outcome="wrong_token"}': "0x150 5x60",
            'pipeline_sync_notifications_total{outcome="accepted"}': "0+50x300",
        },
    ),
    "MonthFailed": Case(
        held('pipeline_archive_months{state="failed"}', 1),
        held('pipeline_archive_months{state="failed"}', 0) | held('pipeline_archive_months{state="archived"}', 9),
    ),
    "VerificationFailed": Case(
        held("pipeline_archive_verification_failures", 1), held("pipeline_archive_verification_failures", 0)
    ),
    "ArchiveNotSound": Case(held("pipeline_archive_audit_findings", 2), held("pipeline_archive_audit_findings", 0)),
    # promtool's clock begins at 0.
    "ArchiveNotAudited": Case(
        held("pipeline_archive_audited_timestamp_seconds", -2 * 86400),
        held("pipeline_archive_audited_timestamp_seconds", -40 * 3600),
    ),
    "NoMonthArchived": Case(
        held("pipeline_archive_last_timestamp_seconds", -41 * 86400),
        held("pipeline_archive_last_timestamp_seconds", -39 * 86400),
    ),
    "PartitionsRunShort": Case(
        held("pipeline_archive_premade_partitions", 1) | held("pipeline_archive_premade_partitions_wanted", 3),
        held("pipeline_archive_premade_partitions", 2) | held("pipeline_archive_premade_partitions_wanted", 3),
    ),
    "PartitionsEnd": Case(
        held("pipeline_archive_partitions_end_seconds", 6 * 86400),
        held("pipeline_archive_partitions_end_seconds", 8 * 86400),
    ),
    "LateRowsWait": Case(
        held('pipeline_archive_late_rows{state="waiting"}', 7),
        held('pipeline_archive_late_rows{state="archived"}', 7)
        | held('pipeline_archive_late_rows{state="waiting"}', 0),
        at="25h",
    ),
    "ThresholdCrossed": Case(
        held(f'pipeline_scaling_phase{{{ROUTE},phase="fired"}}', 1),
        held(f'pipeline_scaling_phase{{{ROUTE},phase="latched"}}', 1),
        labels={"metric": "google_calls_month", "of": "all"},
    ),
    "EpisodeWaits": Case(
        held('pipeline_scaling_episode_waits_seconds{state="proposed"}', 200_000),
        held('pipeline_scaling_episode_waits_seconds{state="acted"}', 900_000)
        | held('pipeline_scaling_episode_waits_seconds{state="proposed"}', 100_000),
        labels={"state": "proposed"},
    ),
    "MetricIsSilent": Case(
        held(f'pipeline_scaling_sample_status{{{ROUTE},status="error"}}', 1),
        held(f'pipeline_scaling_sample_status{{{ROUTE},status="not_configured"}}', 1),
        at="7h",
        labels={"metric": "google_calls_month", "of": "all"},
    ),
    "NothingIsMeasured": Case(
        held(f"pipeline_scaling_sample_age_seconds{{{ROUTE}}}", 11_000),
        held(f"pipeline_scaling_sample_age_seconds{{{ROUTE}}}", 11_000)
        | held('pipeline_scaling_sample_age_seconds{metric="disk_used",of="all"}', 60),
    ),
    "ExporterDown": Case({"nothing_else": "1x300"}, held('up{job="pipeline",instance="a"}', 1)),
    "ScrapePartBroken": Case(
        held('pipeline_scrape_part_ok{part="archive"}', 0),
        held('pipeline_scrape_part_ok{part="archive"}', 1),
        labels={"part": "archive"},
    ),
    "ScrapeIsSlow": Case(held("pipeline_scrape_seconds", 3), held("pipeline_scrape_seconds", 0.1)),
    "DagsterDaemonSilent": Case(
        held('pipeline_dagster_daemon_age_seconds{daemon="SENSOR"}', 400),
        held('pipeline_dagster_daemon_age_seconds{daemon="SENSOR"}', 60)
        | held('pipeline_dagster_daemon_age_seconds{daemon="BACKFILL"}', 9000),
        labels={"daemon": "SENSOR"},
    ),
    "TickFails": Case(
        held('pipeline_dagster_tick_failed{location="scaling",name="s",kind="sensor"}', 1),
        {'pipeline_dagster_tick_failed{location="scaling",name="s",kind="sensor"}': "0x175 1x3 0x60"},
        labels={"location": "scaling", "name": "s"},
    ),
    "RunsWait": Case(
        held('pipeline_dagster_oldest_run_age_seconds{location="scaling",status="QUEUED"}', 2000),
        held('pipeline_dagster_oldest_run_age_seconds{location="scaling",status="STARTED"}', 2000),
        labels={"location": "scaling"},
    ),
    "SyncRunHangs": Case(
        held('pipeline_dagster_oldest_run_age_seconds{location="sync_pipeline",status="STARTED"}', 2000),
        held('pipeline_dagster_oldest_run_age_seconds{location="archive_pipeline",status="STARTED"}', 2000),
    ),
    "RunsAreKilled": Case(
        {'pipeline_dagster_runs_killed_total{location="scaling"}': "0x150 1x60"},
        {'pipeline_dagster_runs_killed_total{location="scaling"}': "0x20 1x400"},
        labels={"location": "scaling"},
    ),
}


def test_promtool_accepts_the_rules_and_the_configuration(promtool: Path) -> None:
    assert "SUCCESS" in ran(promtool, "check", "rules", "--lint=all", "--lint-fatal", *sorted(RULES.glob("*.yml")))
    ran(promtool, "check", "config", "prometheus.yml", cwd=RULES.parent)


def test_every_alert_has_a_case() -> None:
    assert [rule["alert"] for rule in alerts() if rule["alert"] not in CASES] == []
    assert sorted(CASES) == sorted({rule["alert"] for rule in alerts()})


def test_every_alert_fires_on_what_it_is_about_and_on_nothing_else(promtool: Path, tmp_path: Path) -> None:
    """Each with its own file of rules and the recorded figures: to evaluate all of them takes twice as long."""
    files = {rule["alert"]: path for path in sorted(RULES.glob("*.yml")) for rule in rules_of(path) if "alert" in rule}
    tests: dict[Path, list[dict[str, Any]]] = {path: [] for path in files.values()}
    for name, case in CASES.items():
        for series, fires in ((case.firing, True), (case.quiet, False)):
            [severity] = [rule["labels"]["severity"] for rule in alerts() if rule["alert"] == name]
            labels = {
                "__name__": "ALERTS",
                "alertname": name,
                "alertstate": "firing",
                "owner": "platform",
                "severity": severity,
                **case.labels,
            }
            if name == "ExporterDown":
                labels["job"] = "pipeline"
            shown = ",".join(f'{key}="{value}"' for key, value in labels.items() if key != "__name__")
            tests[files[name]].append(
                {
                    "name": f"{name} {'fires' if fires else 'is quiet'}",
                    "interval": "1m",
                    "input_series": [{"series": each, "values": values} for each, values in series.items()],
                    "promql_expr_test": [
                        {
                            "expr": f'ALERTS{{alertname="{name}",alertstate="firing"}}',
                            "eval_time": case.at,
                            "exp_samples": [{"labels": f"ALERTS{{{shown}}}", "value": 1}] if fires else [],
                        }
                    ],
                }
            )
    for path, groups in tests.items():
        document = {
            "rule_files": [str(path), str(RULES / "recording.yml")],
            "evaluation_interval": "1m",
            "tests": groups,
        }
        (tmp_path / path.name).write_text(json.dumps(document))
    ran(promtool, "test", "rules", *(path.name for path in tests), cwd=tmp_path)


def test_what_an_alert_says_names_the_thing_and_leads_to_its_section(promtool: Path, tmp_path: Path) -> None:
    test = {
        "rule_files": [str(RULES / "scaling.yml")],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    {"series": f'pipeline_scaling_phase{{{ROUTE},phase="fired"}}', "values": "1x60"},
                ],
                "alert_rule_test": [
                    {
                        "eval_time": "30m",
                        "alertname": "ThresholdCrossed",
                        "exp_alerts": [
                            {
                                "exp_labels": {
                                    "metric": "google_calls_month",
                                    "of": "all",
                                    "severity": "warning",
                                    "owner": "platform",
                                },
                                "exp_annotations": {
                                    "summary": "google_calls_month (all) has crossed its threshold.",
                                    "runbook_url": "docs/operations.md#google_calls_month",
                                },
                            }
                        ],
                    }
                ],
            }
        ],
    }
    (tmp_path / "test.yml").write_text(json.dumps(test))
    ran(promtool, "test", "rules", "test.yml", cwd=tmp_path)


def test_recorded_figures_are_what_their_names_say(promtool: Path, tmp_path: Path) -> None:
    test = {
        "rule_files": [str(RULES / "recording.yml")],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    {"series": CALLS % "200", "values": "0+90x300"},
                    {"series": CALLS % "429", "values": "0+10x300"},
                    {"series": 'pipeline_sync_calls_saved{instance="a"}', "values": "75x300"},
                    {"series": 'pipeline_sync_calls_of_complete_reads{instance="a"}', "values": "100x300"},
                    {"series": AGE % "60", "values": "0+50x300"},
                    {"series": AGE % "120", "values": "0+100x300"},
                    {"series": AGE % "+Inf", "values": "0+100x300"},
                ],
                "promql_expr_test": [
                    {"expr": expression, "eval_time": "2h", "exp_samples": [{"labels": labels, "value": value}]}
                    for expression, labels, value in (
                        ("round(pipeline:sync_api_calls_failed:ratio1h, 0.001)", "{}", 0.1),
                        ("pipeline:sync_calls_saved:ratio", "pipeline:sync_calls_saved:ratio", 0.75),
                        ("round(class:sync_api_calls:rate5m * 60)", '{class="free"}', 100),
                        ("round(pipeline:sync_change_age_seconds:p50_1h)", "{}", 60),
                        ("round(pipeline:sync_change_age_seconds:p95_1h)", "{}", 114),
                    )
                ],
            }
        ],
    }
    (tmp_path / "test.yml").write_text(json.dumps(test))
    ran(promtool, "test", "rules", "test.yml", cwd=tmp_path)


def anchors() -> set[str]:
    """Of the sections of docs/operations.md, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", OPERATIONS.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def leads_to(alert: Mapping[str, Any]) -> Sequence[str]:
    """Every address its runbook may come to."""
    address = alert["annotations"]["runbook_url"]
    if "{{ $labels.metric }}" not in address:
        return [address]
    known = catalogue(ArchiveSourceSettings(), SyncScheduleSettings())
    return [address.replace("{{ $labels.metric }}", metric.name) for metric in known if metric.rule]


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_every_alert_has_a_severity_an_owner_a_summary_and_a_runbook_that_is_there(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    assert alert["labels"]["owner"] == "platform"
    assert alert["annotations"]["summary"]
    for address in leads_to(alert):
        page, _, anchor = address.partition("#")
        assert page == "docs/operations.md"
        assert anchor in anchors()


def test_rules_ask_for_nothing_that_the_exporter_does_not_know() -> None:
    source = "".join(
        (CHECKOUT / "scaling" / name).read_text() for name in ("exported.py", "exported_dagster.py", "exporter.py")
    )
    known = set(re.findall(r'"((?:app|pipeline)_[a-z0-9_]+)"', source))
    for path in sorted(RULES.glob("*.yml")):
        for rule in rules_of(path):
            for name in re.findall(r"\b(?:app|pipeline)_[a-z0-9_]+", rule["expr"]):
                assert re.sub(r"_(total|bucket|sum|count)$", "", name) in known | {name} & known, (rule, name)
