"""`python -m devstack.demo`: the main job from start to end, in front of your eyes, driven by Dagster.

Belongs here: the order of events. Does not: the numbers at the end and their check (`devstack.demo_summary`), anything
the pipelines do.
"""

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psycopg
from rich.console import Console

from devstack import edits, history, stack
from devstack.dagster_ui import DagsterUi, Run
from devstack.demo_summary import Seen, Summary, Tick, check, number, patients, show, summarise
from devstack.processes import CHECKOUT, VAR, Supervisor, wait_until
from devstack.stack import Stack
from scaling import capabilities, episodes
from scaling.capabilities import Capability
from scaling.catalogue import catalogue
from scaling.errors import UserError, run_command
from scaling.overrides import overridden
from scaling.settings import ArchiveSourceSettings, SyncScheduleSettings
from scaling.units import shown

DIRECTORY = VAR / "demo"
REPORT = "report.html"
CALENDARS_EDITED = 20
SECONDS_BETWEEN_WRITES = 0.005
PLAN_WIDTH = 130
SETTINGS = {
    **history.SETTINGS,
    # What Google sends no notifications for is due at every tick: the demo does not wait two minutes between them.
    "SYNC_POLL_INTERVAL_SECONDS": "0",
    "SYNC_POLL_CEILING_SECONDS": "0",
    "SCALING_AUDIT_LOG_PARTITIONING": "auto",
    "SCALING_SENSOR_SECONDS": "3",
}
# It was measured within this hour already, and would not be due.
CALLS_AGAIN = {"ops": {"scaling_metrics": {"config": {"metrics": ["google_calls_month"]}}}}
SENSORS = (
    ("sync_pipeline", "parallel_sync_sensor"),
    ("sync_pipeline", "incremental_sync_sensor"),
    ("archive_pipeline", "audit_log_partitioning_sensor"),
)
QUERY = (
    "SELECT action, count(*) AS rows, count(DISTINCT tenant_id) AS tenants, sum(count(*)) OVER ()::bigint AS total"
    " FROM audit_logs GROUP BY action ORDER BY rows DESC"
)


@dataclass(frozen=True, slots=True)
class Found:
    """What a step found out."""

    things: list[str]

    def add(self, *things: str) -> None:
        """Add to it."""
        self.things.extend(things)


class Writer:
    """The SaaS, writing an audit log every few milliseconds for as long as the block runs."""

    def __init__(self, dsn: str) -> None:
        self.written = 0
        self.failed = 0
        self.longest_seconds = 0.0
        self._dsn = dsn
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write, daemon=True)

    def __enter__(self) -> "Writer":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Write no more."""
        self._stop.set()
        self._thread.join()

    def _write(self) -> None:
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            while not self._stop.wait(SECONDS_BETWEEN_WRITES):
                began = time.monotonic()
                try:
                    connection.execute(
                        "INSERT INTO public.audit_logs (tenant_id, action) SELECT id, 'demo.write' FROM public.tenants"
                        " ORDER BY id LIMIT 1"
                    )
                    self.written += 1
                except psycopg.Error:
                    self.failed += 1
                self.longest_seconds = max(self.longest_seconds, time.monotonic() - began)


class Narrator:
    """Says what happens while it happens, on a terminal and in a log file alike."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._status = console.status("")

    @contextlib.contextmanager
    def step(self, doing: str) -> Iterator[Found]:
        """Show a step while it runs, and a line about it when it is done.

        Args:
            doing: what is being done.

        Yields:
            Takes what the step found out, to be printed behind the line.
        """
        started, found = time.monotonic(), Found([])
        if not self.console.is_terminal:
            self.console.print(f"  {doing} …")
        self._status.update(doing)
        self._status.start()
        try:
            yield found
        finally:
            self._status.stop()
        seconds = f"[dim]{time.monotonic() - started:5.1f} s[/dim]"
        self.console.print(
            f"[green]✓[/green] {seconds}  {doing}{': ' + ', '.join(found.things) if found.things else ''}",
            soft_wrap=True,
        )

    def progress(self, doing: str) -> None:
        """Change what the running step shows."""
        self._status.update(doing)


def run(directory: Path, console: Console) -> Summary:
    """Run the demo.

    Args:
        directory: of its stack.
        console: for a person.

    Returns:
        The numbers.

    Raises:
        UserError: a step failed, or a number is not what it must be.
    """
    started = time.monotonic()
    say = Narrator(console)
    with contextlib.ExitStack() as opened:
        with say.step("Start Postgres, S3 and Google Calendar, with a SaaS of 40 tenants") as found:
            running = opened.enter_context(
                stack.running(directory, disposable=True, push=True, past=True, settings=SETTINGS)
            )
            found.add(*_saas_in_numbers(running))
        pool = opened.enter_context(ThreadPoolExecutor(1))
        webserver = pool.submit(stack.start_webserver, running)  # 10 s of imports, beside the plan
        with say.step("Plan the conversion of audit_logs: python -m archive_pipeline.convert plan"):
            with psycopg.connect(running.database.admin_dsn, autocommit=True) as connection:
                # Autovacuum would within a minute; the plan counts by it.
                connection.execute("ANALYZE public.audit_logs")
            plan = _command(running, "archive_pipeline.convert", "plan")
        console.print(plan, markup=False, highlight=False, soft_wrap=True)
        with say.step("Start the Dagster webserver") as found:
            ui = opened.enter_context(webserver.result())
            found.add(ui.url)
        with say.step("Start the Dagster daemon; sensors wait for what crosses a threshold"):
            for location, sensor in SENSORS:
                ui.start_sensor(location, sensor)
            stack.start_daemon(running, ui)
        writer = opened.enter_context(Writer(running.database.admin_dsn))

        measuring = ui.launch_job("scaling", "scaling_metrics_job")
        with say.step("Sync tick 1, as the SaaS works today: five workspaces, one after the other") as found:
            found.add(*_told(_tick(running, ui)))
        with say.step("Measure the metrics of the scaling plan") as found:
            fired = _fired(running, ui, measuring)
            found.add(*fired)
        _wait_for_capability(say, running, Capability.PARALLEL_SYNC)
        with say.step("Sync tick 2: all workspaces at a time, still reading every calendar completely") as found:
            before = _tick(running, ui)
            found.add(*_told(before))
        with say.step("Measure again") as found:
            again = ui.launch_job("scaling", "scaling_metrics_job", run_config=CALLS_AGAIN)
            found.add(*_fired(running, ui, again, known_already=len(fired)))
        _wait_for_capability(say, running, Capability.INCREMENTAL_SYNC)
        with say.step("Sync tick 3: get sync tokens, and ask Google to call when something changes") as found:
            found.add(*_told(_tick(running, ui)), f"{len(running.google.channels())} push channels")
        with say.step("Sync tick 4: read once more what changed before Google began to call") as found:
            found.add(*_told(_tick(running, ui)))
        with say.step(f"Edit {CALENDARS_EDITED} calendars with Google's own client") as found:
            edited = edits.edit_calendars(running.google, CALENDARS_EDITED)
            running.google.settle_pushes()
            found.add(
                f"{sum(each.edits for each in edited)} edits", f"{_notified(running)} calendars known to have changed"
            )
        with say.step("Sync tick 5: read only what changed") as found:
            after = _tick(running, ui)
            equal = sum(edits.is_mirrored(running.google, each.calendar, running.database.dsn) for each in edited)
            found.add(
                *_told(after),
                f"{1 - after.api_calls / before.api_calls:.0%} fewer than tick 2",
                f"{equal} of {len(edited)} edited calendars equal Google",
            )

        with say.step("Convert audit_logs to monthly partitions while it is written to, for its episode") as found:
            acted = _wait_for_conversion(running)
            writer.stop()
            found.add(
                acted.conversion,
                f"{writer.written:,} rows written meanwhile, {writer.failed} failed",
                f"writers were blocked for {acted.blocked_ms:.0f} ms at most",
            )
        months, doing = acted.months, "Archive every closed month to S3, verified"
        with say.step(doing) as found:
            runs = _wait_for_months(running, ui, acted.backfill, months, lambda done: say.progress(f"{doing}: {done}"))
            found.add(f"{len(months)} months in {runs} runs, worked on beside the ticks")
        upkeep = ui.launch_job("archive_pipeline", "audit_log_upkeep_job")
        with say.step("Query the archive with DuckDB: python -m archive_pipeline.query") as found:
            answer = _query(running)
            found.add(f"{answer[0]['total']:,} rows of {len(answer)} actions")
        with say.step("Audit the chain of signed links over the archive") as found:
            links = _audit(ui, upkeep)
            found.add(f"{links} links, each signed, names the one before it and a manifest whose objects are all there")

        seen = Seen(
            before,
            after,
            len(edited),
            equal,
            writer.written,
            writer.failed,
            links,
            answer[0]["total"],
        )
        summary = summarise(running, ui, seen, seconds=time.monotonic() - started)
        waiting = patients(running)
        with say.step("Put everything on one page: python -m scaling report"):
            _command(running, "scaling", "report", "--out", str(directory / REPORT))
        with say.step("Stop everything"):
            opened.close()
    show(console, summary, waiting, answer)
    check(summary, waiting, months)
    return summary


def _saas_in_numbers(running: Stack) -> list[str]:
    with psycopg.connect(running.database.admin_dsn) as connection:
        rows = number(connection, "SELECT count(*) FROM public.audit_logs")
        workspaces = number(connection, "SELECT count(*) FROM public.workspaces")
    return [f"{workspaces} workspaces", f"{len(running.google.users)} Google accounts", f"{rows:,} audit logs"]


def _tick(running: Stack, ui: DagsterUi) -> Tick:
    """Launch one run of `calendar_sync`; what it did is its row in `sync.runs`."""
    run = ui.wait_for_run(ui.launch_job("sync_pipeline", "calendar_sync", tags={"sync/shard": "0"}))
    with psycopg.connect(running.database.dsn) as connection:
        row = connection.execute(
            "SELECT workspaces_served, full_syncs, incremental_syncs, events_upserted, events_deleted, api_calls,"
            " duration_seconds FROM sync.runs WHERE run_id = %s AND finished_at IS NOT NULL",
            [run.id],
        ).fetchone()
    if row is None:
        raise UserError(f"A sync run ended as {run.status} without finishing: {ui.failure(run.id)}")
    return Tick(*(*row, run.status == "FAILURE"))


def _told(tick: Tick) -> list[str]:
    return [
        f"{tick.workspaces} workspaces in {tick.seconds:.1f} s",
        f"{tick.full} complete and {tick.incremental} incremental reads",
        f"{tick.written:,} events written",
        f"{tick.deleted} deleted",
        f"{tick.api_calls} API calls",
        *(["red, because a workspace needs a human"] if tick.is_red else []),
    ]


def _fired(running: Stack, ui: DagsterUi, run_id: str, *, known_already: int = 0) -> list[str]:
    """Wait for a measurement; the thresholds of capabilities that were crossed since, in words."""
    run = ui.wait_for_run(run_id)
    if run.status != "SUCCESS":
        raise UserError(f"The measurement ended as {run.status}: {ui.failure(run.id)}")
    known = overridden(
        catalogue(ArchiveSourceSettings(), SyncScheduleSettings()), Path(SETTINGS["SCALING_CATALOGUE_FILE"])
    )
    with psycopg.connect(running.database.dsn) as connection:
        fired = [each for each in episodes.listing(connection) if each.capability]
    return [
        f"{each.rule} is {shown(each.value, known.named(each.rule).unit)},"
        f" threshold {shown(each.threshold, known.named(each.rule).unit)}"
        for each in sorted(fired, key=lambda each: each.id)[known_already:]
    ]


def _wait_for_capability(say: Narrator, running: Stack, capability: Capability) -> None:
    with say.step(f"A sensor switches {capability} on") as found:

        def is_on() -> bool:
            running.supervisor.check()
            with psycopg.connect(running.database.dsn) as connection:
                return capability in capabilities.switched(connection)

        wait_until(is_on, timeout_seconds=180, what=f"{capability} is switched on")
        with psycopg.connect(running.database.dsn) as connection:
            change = next(each for each in capabilities.changes(connection) if each.capability is capability)
        found.add(f"by {change.changed_by}")


@dataclass(frozen=True, slots=True)
class Acted:
    """What the action on the audit logs' episode did."""

    conversion: str
    blocked_ms: float
    months: list[str]
    """Partition keys."""
    backfill: str


def _wait_for_conversion(running: Stack) -> Acted:
    def outcome() -> Mapping[str, Any] | None:
        running.supervisor.check()
        with psycopg.connect(running.database.dsn) as connection:
            (episode,) = episodes.listing(connection, capability=Capability.AUDIT_LOG_PARTITIONING)
        if episode.error:
            raise UserError(f"The conversion failed: {episode.error}")
        return episode.outcome

    wait_until(lambda: outcome() is not None, timeout_seconds=300, what="audit_logs is converted")
    did = outcome() or {}
    months = [f"{month}-01" for month in did["months"]]
    return Acted(did["conversion"], did["blocked_ms_max"], months, str(did["backfill"]))


def _notified(running: Stack) -> int:
    with psycopg.connect(running.database.dsn) as connection:
        return number(connection, "SELECT count(*) FROM sync.calendar_state WHERE notified_at > last_started_at")


def _wait_for_months(
    running: Stack, ui: DagsterUi, backfill: str, months: Sequence[str], progress: Callable[[str], None]
) -> int:
    """Wait for the backfill's runs, and count them; the daemon closes the backfill itself up to 30 seconds later."""

    def runs() -> list[Run]:
        return ui.runs(tags={"dagster/backfill": backfill})

    def all_done() -> bool:
        running.supervisor.check()
        for run in (launched := runs()):
            if run.status in {"FAILURE", "CANCELED"}:
                raise UserError(f"Archiving past months ended as {run.status}: {ui.failure(run.id)}")
        with psycopg.connect(running.database.dsn) as connection:
            done = number(connection, "SELECT count(*) FROM archive.months WHERE state = 'archived'")
        progress(f"{done} of {len(months)}")
        return done == len(months) and all(run.status == "SUCCESS" for run in launched)

    wait_until(all_done, timeout_seconds=600, what="every month is archived")
    return len(runs())


def _audit(ui: DagsterUi, upkeep: str) -> int:
    """Wait for the run that makes partitions and audits the chain; how many links it found in order."""
    run = ui.wait_for_run(upkeep)
    if run.status != "SUCCESS":
        raise UserError(f"The upkeep of the archive ended as {run.status}: {ui.failure(run.id)}")
    return int(ui.numbers("audit_log_chain")[None]["links"])


def _command(running: Stack, module: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=CHECKOUT,
        env={**running.environment, "COLUMNS": str(PLAN_WIDTH)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise UserError(f"python -m {module} {arguments[0]} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout.rstrip()


def _query(running: Stack) -> list[dict[str, int]]:
    answer = _command(running, "archive_pipeline.query", QUERY, "--format", "json")
    return [json.loads(line) for line in answer.splitlines()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes them from the process.

    Returns:
        The exit code.

    Raises:
        UserError: a step failed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m devstack.demo",
        description="Outgrow thresholds with 60 workspaces and 13 months of audit logs; see what that switches on.",
    )
    parser.add_argument("--keep", action="store_true", help="go on with the data of the last demo, not from nothing")
    options = parser.parse_args(arguments)
    if not options.keep and DIRECTORY.exists():
        with Supervisor(DIRECTORY):  # nobody else runs there, and nothing is left running
            pass
        shutil.rmtree(DIRECTORY)
    console = Console(highlight=False)
    summary = run(DIRECTORY, console)
    report = DIRECTORY / "summary.json"
    report.write_text(json.dumps(asdict(summary), indent=2) + "\n")
    console.print(
        f"The numbers are in {report.relative_to(CHECKOUT)}, one page for a browser is"
        f" {(DIRECTORY / REPORT).relative_to(CHECKOUT)}. To look around in the UI: make up",
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    run_command(main)
