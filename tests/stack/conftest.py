"""One running stack for all tests of a module: real webserver, real daemon, schedules and sensors on.

A backfill is asked for before the daemon starts, which looks for backfills then and every 30 seconds; so the tests
wait for it together instead of one after another.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from devstack import stack
from devstack.dagster_ui import DagsterUi
from devstack.otlp import Collector, collector
from devstack.stack import Stack

TRACE_UI_URL = "http://127.0.0.1:16686/trace/{trace_id}"
SETTINGS = {
    "PIPELINE_AUTOSTART": "true",
    "SYNC_CRON": "* * * * *",  # cron's shortest period; the default's two minutes only take longer
    "SYNC_POLL_INTERVAL_SECONDS": "0",
    "SYNC_POLL_CEILING_SECONDS": "0",
    "SYNC_TIME_BUDGET_SECONDS": "20",  # with push a run watches for notifications until it is used up
    "LOG_FORMAT": "json",
    "TRACE_UI_URL": TRACE_UI_URL,
}
BACKFILLED_MONTHS = 3


@dataclass(frozen=True, slots=True)
class Instance:
    """The stack, its UI, the backfill that was asked for, and the collector that gets the traces."""

    stack: Stack
    ui: DagsterUi
    months: list[str]
    backfill: str
    traces: Collector


@pytest.fixture(scope="module")  # not of the session: the daemon would launch a tick a minute beside all other tests
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """Everything, with three Google accounts and 4,000 audit logs."""
    directory = tmp_path_factory.mktemp("stack")
    with (
        collector() as traces,
        stack.running(
            directory,
            disposable=True,
            profile="small",
            audit_rows=4000,
            settings={**SETTINGS, "OTEL_EXPORTER_OTLP_ENDPOINT": traces.endpoint},
        ) as running,
        stack.start_webserver(running) as ui,
    ):
        months = ui.partitions("audit_log_archive")[:BACKFILLED_MONTHS]
        backfill = ui.launch_backfill("audit_log_archive", months, title="past months")
        stack.start_daemon(running, ui)
        yield Instance(running, ui, months, backfill, traces)
