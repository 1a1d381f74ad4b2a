"""`make up` and `make demo`: what they say, what they leave behind, what makes them fail."""

import io
import json
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from devstack import demo, demo_summary, up
from devstack.demo_summary import Patient, Summary
from devstack.processes import CHECKOUT, processes_of, wait_until
from scaling.errors import UserError

SUMMARY = Summary(
    thresholds_fired=3,
    capabilities_active=2,
    api_calls_before=150,
    api_calls_after=20,
    workspaces=60,
    calendars=90,
    events_synced=28_000,
    events_quarantined=0,
    api_calls=400,
    calendars_edited=20,
    calendars_equal_to_google=20,
    partitions=5,
    rows_written_during_conversion=100,
    writes_failed_during_conversion=0,
    months_archived=2,
    rows_archived=1000,
    rows_verified=1000,
    postgres_rows=1000,
    parquet_bytes=1_000_000,
    chain_links_verified=2,
    query_rows=1000,
    dagster_runs=6,
    dagster_runs_failed=2,
    duration_s=90.0,
)
PATIENTS = [Patient("t:w", "user@example.com", "reauth_required")]
MONTHS = ["2026-01-01", "2026-02-01"]


def test_consistent_numbers_pass() -> None:
    demo_summary.check(SUMMARY, PATIENTS, MONTHS)


@pytest.mark.parametrize(
    ("summary", "patients", "complaint"),
    [
        (replace(SUMMARY, rows_archived=999), PATIENTS, "disagree about the rows"),
        (replace(SUMMARY, rows_verified=0), PATIENTS, "disagree about the rows"),
        (replace(SUMMARY, query_rows=2000), PATIENTS, "disagree about the rows"),
        (replace(SUMMARY, months_archived=1), PATIENTS, "1 of 2 months"),
        (replace(SUMMARY, chain_links_verified=1), PATIENTS, "1 links vouch for 2 months"),
        (replace(SUMMARY, writes_failed_during_conversion=1), PATIENTS, "1 of the SaaS's writes failed"),
        (replace(SUMMARY, rows_written_during_conversion=0), PATIENTS, "0 did not"),
        (replace(SUMMARY, calendars_equal_to_google=19), PATIENTS, "differs from Google"),
        (replace(SUMMARY, thresholds_fired=2), PATIENTS, "2 thresholds fired"),
        (replace(SUMMARY, capabilities_active=1), PATIENTS, "1 capabilities are on"),
        (replace(SUMMARY, api_calls_after=150), PATIENTS, "took 150 calls, complete reads 150"),
        (SUMMARY, [], "went unnoticed"),
    ],
)
def test_a_demo_whose_numbers_do_not_agree_fails(summary: Summary, patients: list[Patient], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        demo_summary.check(summary, patients, MONTHS)


def test_a_taken_port_is_named_when_it_was_asked_for() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"Port {port} of 127.0.0.1 is taken"):
            up.choose_port(port)
    assert up.choose_port(port) == port


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_runs_to_its_end(tmp_path: Path) -> None:
    said = io.StringIO()
    summary = demo.run(tmp_path, Console(file=said, width=120))
    assert summary.months_archived == summary.chain_links_verified == 13
    assert summary.partitions >= 3
    assert summary.workspaces == 60
    assert (summary.thresholds_fired, summary.capabilities_active) >= (3, 2)
    assert summary.api_calls_after < 0.3 * summary.api_calls_before  # the plan expects 70 to 90 % fewer
    assert summary.postgres_rows == summary.rows_archived == summary.rows_verified == summary.query_rows > 400_000
    assert "1 workspace needs a human" in said.getvalue()
    assert "13 / 13" in (tmp_path / demo.REPORT).read_text()
    assert processes_of(tmp_path) == []
    secrets = json.loads((tmp_path / "secrets.json").read_text()).values()
    logs = "".join(log.read_text(errors="replace") for log in tmp_path.rglob("log/*"))
    assert not [secret for secret in secrets if secret in logs + said.getvalue()]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_up_serves_until_ctrl_c_and_leaves_no_process(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from devstack import up; up.DIRECTORY = Path({str(tmp_path)!r}); up.main([])"
    said = tmp_path / "said"
    with said.open("w") as output:
        process = subprocess.Popen([sys.executable, "-c", code], cwd=CHECKOUT, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: "Everything runs" in said.read_text(), timeout_seconds=300, what="everything runs")
        [url] = re.findall(r"http://127\.0\.0\.1:30\d\d", said.read_text())
        assert httpx.get(f"{url}/server_info").json()["dagster_webserver_version"]
        [page] = re.findall(r"Report +(http://127\.0\.0\.1:\d+/)", said.read_text())
        assert "Tenant calendars and audit logs" in httpx.get(page, timeout=60).text
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert "Stopped." in said.read_text()
        assert processes_of(tmp_path) == []
    finally:
        process.kill()
        process.wait()
