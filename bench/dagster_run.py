"""One real Dagster run of the sync in a process of its own, with a meter inside: `python -m bench.dagster_run METER`.

Belongs here: starting `dagster job execute` the way an operator does, counting its event rows, evaluating the schedule,
and the meter around the tick (CPU of the process and of Postgres). Does not: figures and targets.

Only the meter is added to the run; process start, definitions, Postgres storage and event log are the real ones.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import psycopg

from bench.fleet import Fleet, cpu_of_postgres
from devstack.processes import CHECKOUT, wait_until
from sync_pipeline.services import Services
from sync_pipeline.tick import TickResult, run_tick

JOB = "calendar_sync"
POSTMASTER = "BENCH_POSTMASTER"
SETTLED_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Run:
    """One finished run."""

    seconds: float
    """From before the process starts until it has ended."""
    max_rss_mb: float
    event_rows: int
    numbers: Mapping[str, float]
    """Totals of the tick."""
    tick_seconds: float
    client_cpu_seconds: float
    """Of the tick alone, without starting Python and Dagster."""
    postgres_cpu_seconds: float

    @property
    def cpu_ms_per_workspace(self) -> float:
        """CPU, here and in Postgres, for one workspace of the tick."""
        return 1000 * (self.client_cpu_seconds + self.postgres_cpu_seconds) / self.numbers["workspaces_served"]

    def raw(self) -> dict[str, Any]:
        """The run as JSON."""
        served = self.numbers["workspaces_served"]
        return {**asdict(self), "cpu_ms_per_workspace": round(self.cpu_ms_per_workspace, 3) if served else None}


@dataclass(frozen=True, slots=True)
class Installation:
    """A Dagster instance beside a fleet, its storage in the same Postgres."""

    fleet: Fleet
    home: Path
    database: str

    def environment(self, **settings: str) -> dict[str, str]:
        """The whole environment of a run's process."""
        server = self.fleet.server
        assert server.child is not None
        return {
            **{name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ},
            **self.fleet.environment(**settings),
            "DAGSTER_HOME": str(self.home),
            "DAGSTER_PG_HOST": "127.0.0.1",
            "DAGSTER_PG_PORT": str(server.port),
            "DAGSTER_PG_USER": "postgres",
            "DAGSTER_PG_PASSWORD": server.password,
            "DAGSTER_PG_DB": self.database,
            "DAGSTER_EVENT_BATCH_SIZE": "200",
            POSTMASTER: str(server.child.process.pid),
        }

    def run(self, **settings: str) -> Run:
        """Execute the job once.

        Raises:
            RuntimeError: the run failed; its output is the message.
        """
        before = self._runs()
        meter = self.home / f"{uuid.uuid4().hex}.json"
        log = meter.with_suffix(".log")
        began = time.perf_counter()
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "bench.dagster_run", str(meter)],
                env=self.environment(**settings),
                cwd=CHECKOUT,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            process.wait()
        seconds = time.perf_counter() - began
        if process.returncode != 0 or not meter.exists():
            raise RuntimeError(log.read_text(errors="replace")[-4000:])
        (new,) = self._runs() - before
        return Run(
            seconds=round(seconds, 2),
            event_rows=self._event_rows(new),
            **json.loads(meter.read_text()),
        )

    def launch(self, times: int, **settings: str) -> list[int]:
        """Let a daemon run the job as it runs scheduled ones, queue and launcher included; event rows of each run."""
        environment = self.environment(**settings)
        workspace = self.home / "workspace.yaml"
        workspace.write_text(
            "load_from:\n  - python_module: {module_name: sync_pipeline.definitions, location_name: sync_pipeline}\n"
        )
        programs = Path(sys.executable).parent
        daemon = self.fleet.supervisor.start(
            "dagster-daemon",
            [programs / "dagster-daemon", "run", "-w", workspace],
            environment=environment,
            working_directory=CHECKOUT,
            ready=lambda: True,
        )
        rows = []
        try:
            for _ in range(times):
                before = self._runs()
                subprocess.run(
                    [programs / "dagster", "job", "launch", "-w", workspace, "-l", "sync_pipeline", "-j", JOB],
                    env=environment,
                    cwd=CHECKOUT,
                    capture_output=True,
                    check=True,
                )
                (new,) = self._runs() - before
                wait_until(lambda new=new: self._has_ended(new), timeout_seconds=180, what="the launched run ends")  # type: ignore[misc]  # mypy does not infer a defaulted lambda
                rows.append(self._settled_event_rows(new))
        finally:
            self.fleet.supervisor.stop(daemon)
        return rows

    def evaluate(self, **settings: str) -> dict[str, Any]:
        """Evaluate the schedule (and the partitions sensor) in a fresh process; seconds of each repetition."""
        done = subprocess.run(
            [sys.executable, "-m", "bench.dagster_run", "--evaluate"],
            env=self.environment(**settings),
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(done.stderr[-4000:])
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    def _event_rows(self, run_id: str) -> int:
        with self._connect() as connection:
            row = connection.execute("SELECT count(*) FROM event_logs WHERE run_id = %s", [run_id]).fetchone()
        assert row is not None
        return int(row[0])

    def _settled_event_rows(self, run_id: str) -> int:
        """Count the rows once no more come: the process says goodbye after the run's last event."""
        before = -1
        while (now := self._event_rows(run_id)) != before:
            before = now
            time.sleep(SETTLED_SECONDS)
        return now

    def _has_ended(self, run_id: str) -> bool:
        with self._connect() as connection:
            row = connection.execute("SELECT status FROM runs WHERE run_id = %s", [run_id]).fetchone()
        if row is not None and row[0] in {"FAILURE", "CANCELED"}:
            raise RuntimeError(f"the launched run ended as {row[0]}")
        return row is not None and row[0] == "SUCCESS"

    def _runs(self) -> set[str]:
        with self._connect() as connection:
            if not connection.execute("SELECT WHERE to_regclass('public.runs') IS NOT NULL").rowcount:
                return set()
            return {run_id for (run_id,) in connection.execute("SELECT run_id FROM runs").fetchall()}

    def _connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.fleet.server.dsn(self.database), autocommit=True)


@contextmanager
def installation(fleet: Fleet) -> Iterator[Installation]:
    """Make a Dagster instance for a fleet, with every workspace known as a partition."""
    name = f"dagster_{uuid.uuid4().hex[:12]}"
    fleet.server.create_database(name)
    home = CHECKOUT / "var" / "bench" / name
    home.mkdir(parents=True)
    (home / "dagster.yaml").symlink_to(CHECKOUT / "dagster.yaml")
    try:
        yield Installation(fleet, home, name)
    finally:
        fleet.server.drop_database(name)
        for path in sorted(home.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        home.rmdir()


def execute(meter: Path) -> None:
    """Be the run's process: measure the tick and run Dagster's own command line."""
    from dagster._cli import create_dagster_cli  # as the real process does

    from sync_pipeline import assets

    def measured(services: Services, **options: Any) -> TickResult:  # noqa: ANN401  # passed through
        postmaster = int(os.environ[POSTMASTER])
        cpu, database, began = _own_cpu(), cpu_of_postgres(postmaster), time.perf_counter()
        result: TickResult = run_tick(services, **options)
        meter.write_text(
            json.dumps(
                {
                    "tick_seconds": round(time.perf_counter() - began, 3),
                    "client_cpu_seconds": round(_own_cpu() - cpu, 3),
                    "postgres_cpu_seconds": round(cpu_of_postgres(postmaster) - database, 3),
                    "numbers": result.numbers(),
                }
            )
        )
        return result

    try:
        with mock.patch.object(assets, "run_tick", measured):
            create_dagster_cli()(["job", "execute", "-m", "sync_pipeline.definitions", "-j", JOB])  # type: ignore[no-untyped-call]  # private, untyped
    finally:
        if meter.exists():
            meter.write_text(json.dumps({**json.loads(meter.read_text()), "max_rss_mb": _peak_rss_mb()}))


def evaluate(repetitions: int = 5) -> dict[str, Any]:
    """Evaluate schedule and sensor against the instance of the environment."""
    import dagster as dg

    from scaling import settings
    from scaling.databases import DatabaseRouter
    from scaling.settings import DatabaseSettings
    from sync_pipeline import connections
    from sync_pipeline.definitions import defs
    from sync_pipeline.partitions import workspaces

    schedule = defs.resolve_schedule_def("calendar_sync_schedule")
    seconds = []
    with dg.DagsterInstance.get() as instance:
        with (
            DatabaseRouter.from_settings(settings.load(DatabaseSettings)) as router,
            router.shards()[0].transaction() as connection,
        ):
            known = [workspace.partition_key for workspace in connections.connected_workspaces(connection)]
        instance.add_dynamic_partitions(str(workspaces.name), known)
        for _ in range(repetitions):
            began = time.perf_counter()
            with dg.build_schedule_context(
                instance=instance,
                repository_def=defs.get_repository_def(),
                scheduled_execution_time=datetime.now(UTC),
            ) as context:
                answer = schedule.evaluate_tick(context)
            seconds.append(round(time.perf_counter() - began, 4))
            assert answer.run_requests, "the schedule asks for a run"
    return {"seconds": seconds, "median": statistics.median(seconds), "partitions": len(known)}


def _peak_rss_mb() -> float:
    """Peak of this program; `ru_maxrss` would start with that of the process that forked it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return round(int(line.split()[1]) / 1024, 1)


def _own_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    if sys.argv[1:] == ["--evaluate"]:
        sys.stdout.write(json.dumps(evaluate()) + "\n")
    else:
        execute(Path(sys.argv[1]))
