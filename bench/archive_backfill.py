"""Past months backfilled through a real Dagster webserver and daemon, and where the seconds go.

Belongs here: the stack, the backfill, and its time taken apart with what Dagster itself stored. Does not: the other
figures of the archive (`bench.archive`).

The clock runs from the request that "Materialize" in the UI sends until the last run has ended. Dagster's runs give
when each was asked for, queued and started; the materializations give the seconds of every step of each month.
"""

import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import psycopg

from archive_pipeline.months import Month
from devstack import stack
from devstack.dagster_ui import FINISHED_RUN, DagsterUi
from devstack.processes import VAR, wait_until

ASSET = "audit_log_archive"
TIMEOUT_SECONDS = 1200
TENANTS = 1_000

FILL = """
INSERT INTO audit_logs (id, tenant_id, workspace_id, user_id, action, resource_type, resource_id, details, ip_address,
                        user_agent, created_at)
SELECT gen_random_uuid(), md5('t' || k)::uuid, md5('w' || k)::uuid, md5('u' || k || ':' || i %% 20)::uuid,
       'document.edited', 'document', 'res_' || substr(md5((random() * 100000)::int::text), 1, 10),
       jsonb_build_object('request_id', md5(i::text), 'duration_ms', round((random() * 900)::numeric, 3)),
       '10.0.0.0'::inet + (random() * 16000000)::bigint, 'Mozilla/5.0 (X11; Linux x86_64) Firefox/128.0',
       %(start)s::timestamptz + i * (%(end)s::timestamptz - %(start)s::timestamptz) / %(rows)s
FROM (SELECT i, floor(1001 ^ random())::int AS k FROM generate_series(0, %(rows)s - 1) i) x
"""

RUN_TIMES = """
query ($filter: RunsFilter) { runsOrError(filter: $filter, limit: 1000) { __typename
  ... on Error { message }
  ... on Runs { results { runId status creationTime startTime endTime
    stepStats { stepKey startTime endTime } } } } }
"""


def backfilled(months: int, rows: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Backfill months of rows.

    Args:
        months: past ones.
        rows: of each.

    Returns:
        The figure, and what it is made of.
    """
    directory = VAR / "bench" / "archive-backfill"
    shutil.rmtree(directory, ignore_errors=True)
    now = datetime.now(UTC)
    index = now.year * 12 + now.month - 1
    past = [Month((index - back) // 12, (index - back) % 12 + 1) for back in range(months, 0, -1)]
    settings = {"ARCHIVE_FIRST_MONTH": past[0].name}
    with stack.running(directory, disposable=True, settings=settings, audit_rows=0) as running:
        _fill(running.database.admin_dsn, past, rows)
        with stack.start_webserver(running) as ui:
            stack.start_daemon(running, ui)
            known = set(ui.partitions(ASSET))
            wanted = [month.partition_key for month in past]
            if not known.issuperset(wanted):
                raise AssertionError("Dagster does not know the months")
            asked = time.time()
            backfill = ui.launch_backfill(ASSET, wanted, title="bench")

            def ended() -> bool:
                running.supervisor.check()
                runs = ui.runs(tags={"dagster/backfill": backfill})
                with psycopg.connect(running.database.dsn) as connection:
                    [(done,)] = connection.execute("SELECT count(*) FROM archive.months WHERE state = 'archived'")
                if failed := [run.id for run in runs if run.status in ("FAILURE", "CANCELED")]:
                    raise AssertionError(f"a run failed: {ui.failure(failed[0])}")
                return bool(done == months and runs and all(run.status in FINISHED_RUN for run in runs))

            wait_until(ended, timeout_seconds=TIMEOUT_SECONDS, what="every month is archived")
            times = _runs(ui, backfill)
            numbers = {key: found for key, found in ui.numbers(ASSET).items() if key is not None}
    shutil.rmtree(directory, ignore_errors=True)
    return _figure(months, rows, asked, times, numbers)


def _fill(dsn: str, months: Sequence[Month], rows: int) -> None:
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute("TRUNCATE audit_logs")
        admin.execute(
            "INSERT INTO tenants (id, name) SELECT md5('t' || k)::uuid, 'T' FROM generate_series(1, %s) k",
            (TENANTS + 1,),
        )
        admin.execute("SET session_replication_role = replica")  # every tenant exists; no trigger a row
        admin.execute("SET synchronous_commit = off")
        for month in months:
            admin.execute(FILL, {"start": month.start, "end": month.end, "rows": rows})
        admin.execute("VACUUM (ANALYZE) audit_logs")
        admin.execute("CHECKPOINT")


def _runs(ui: DagsterUi, backfill: str) -> list[dict[str, Any]]:
    """When each run was made, started its process' work, and ended; seconds since 1970."""
    answer = ui.query(RUN_TIMES, {"filter": {"tags": [{"key": "dagster/backfill", "value": backfill}]}})["runsOrError"]
    runs: list[dict[str, Any]] = answer["results"]
    return sorted(runs, key=lambda run: run["creationTime"])


def _figure(
    months: int,
    rows: int,
    asked: float,
    times: Sequence[Mapping[str, Any]],
    numbers: Mapping[str, Mapping[str, float]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    last = max(run["endTime"] for run in times)
    wall = last - asked
    waits = [run["creationTime"] - asked for run in times]
    queued = [run["startTime"] - run["creationTime"] for run in times]
    until_step = [min(step["startTime"] for step in run["stepStats"]) - run["startTime"] for run in times]
    steps = [sum(step["endTime"] - step["startTime"] for step in run["stepStats"]) for run in times]
    per_step: Counter[str] = Counter()
    for found in numbers.values():
        per_step.update({name: value for name, value in found.items() if name.startswith("seconds_")})
    each = {name.removeprefix("seconds_"): round(total / months, 3) for name, total in per_step.items()}
    value = wall / months
    slowest = ", ".join(f"{name} {seconds:.2f}" for name, seconds in sorted(each.items(), key=lambda one: -one[1])[:5])
    start = max(queued[number] + until_step[number] for number in range(len(times)))
    raw = {
        "months": months,
        "rows_a_month": rows,
        "wall_seconds": round(wall, 2),
        "runs": [
            {
                "made_after": round(waits[number], 2),
                "queued_and_started": round(queued[number], 2),
                "until_first_step": round(until_step[number], 2),
                "in_steps": round(steps[number], 2),
                "ended_after": round(run["endTime"] - asked, 2),
            }
            for number, run in enumerate(times)
        ],
        "mean_seconds_a_month": each,
        "materializations": {key: dict(found) for key, found in sorted(numbers.items())},
        "process_start_share": round(sum(until_step) / sum(steps), 3),
    }
    how = (
        f"{months} past months of {rows:,} rows through webserver and daemon, from the request until the last run "
        f"ended, {wall:.0f} s / {months}: the daemon, which looks every 30 s, made {len(times)} runs after "
        f"{min(waits):.1f} to {max(waits):.1f} s; queue and process start until the first step at most {start:.1f} s, "
        f"once for twelve months; the steps, side by side, at most {max(steps):.0f} s; of a month's own "
        f"{sum(each.values()):.2f} s: {slowest}"
    )
    return {"name": "backfill_s_per_month", "value": round(value, 3), "target": None, "ok": True, "how": how}, raw
