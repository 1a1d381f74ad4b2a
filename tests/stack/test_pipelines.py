"""Both pipelines through a real webserver and a real daemon, as an operator uses them."""

import json
import re
import subprocess
import sys

import psycopg
import pytest

from devstack.dagster_ui import FINISHED_RUN, Run
from devstack.edits import edit_calendars, is_mirrored
from devstack.processes import CHECKOUT, wait_until
from devstack.stack import DAGSTER_DATABASE
from scaling import tracing
from scaling.errors import UserError
from tests.stack.conftest import TRACE_UI_URL, Instance

pytestmark = [pytest.mark.xdist_group("stack"), pytest.mark.timeout(400)]


def scheduled_ticks(instance: Instance) -> list[Run]:
    runs = instance.ui.runs(tags={"dagster/schedule_name": "calendar_sync_schedule"})
    return [run for run in runs if run.status in FINISHED_RUN]


def rows(instance: Instance, query: str) -> list[tuple[object, ...]]:
    with psycopg.connect(instance.stack.database.dsn) as connection:
        return connection.execute(query.encode()).fetchall()


def dagster_rows(instance: Instance, query: str) -> list[tuple[object, ...]]:
    with psycopg.connect(instance.stack.servers.postgres.dsn(DAGSTER_DATABASE)) as connection:
        return connection.execute(query.encode()).fetchall()


def complete_reads(instance: Instance, calendar: str) -> int:
    return instance.stack.google.counts().count("events.list", calendar=calendar, incremental=False)


def test_the_sensor_gives_every_connected_workspace_its_partition(instance: Instance) -> None:
    wanted = rows(instance, "SELECT DISTINCT tenant_id || ':' || workspace_id FROM public.google_connections")
    wait_until(
        lambda: {(key,) for key in instance.ui.partitions("calendar_events")} == set(wanted),
        timeout_seconds=120,
        what="the sensor has added the partitions",
    )


def test_the_schedule_launches_ticks_that_mirror_every_calendar(instance: Instance) -> None:
    wait_until(lambda: bool(scheduled_ticks(instance)), timeout_seconds=200, what="a scheduled tick has ended")
    first = scheduled_ticks(instance)[-1]
    assert first.status == "SUCCESS", instance.ui.failure(first.id)
    [(calendars, api_calls)] = rows(
        instance, f"SELECT calendars_synced, api_calls FROM sync.runs WHERE run_id = '{first.id}'"
    )
    google = instance.stack.google
    mirrored = {calendar for user in google.users for calendar in user.calendars}
    assert calendars == sum(len(user.calendars) for user in google.users)
    assert isinstance(api_calls, int)
    assert api_calls > 0
    for calendar in mirrored:
        assert is_mirrored(google, calendar, instance.stack.database.dsn), calendar


def test_a_launched_run_logs_objects_that_name_it_its_job_and_its_step(instance: Instance) -> None:
    wait_until(lambda: bool(scheduled_ticks(instance)), timeout_seconds=200, what="a scheduled tick has ended")
    run = scheduled_ticks(instance)[-1]
    log = (instance.stack.directory / "log" / "dagster-daemon.log").read_text()
    said = [
        line for line in map(json.loads, re.findall(r"^\{.*\}$", log, re.MULTILINE)) if line.get("run_id") == run.id
    ]
    assert {line["event"] for line in said} == {"dagster"}
    assert {line["job"] for line in said} == {"calendar_sync"}
    assert {"PIPELINE_START", "PIPELINE_SUCCESS"} <= {line.get("dagster_event") for line in said}
    # The UI shows what the worker wrote while its step ran.
    home = instance.stack.directory / "dagster"
    captured = "".join(path.read_text() for path in (home / "storage" / run.id / "compute_logs").glob("*.err"))
    steps = [json.loads(line) for line in captured.splitlines() if line.startswith("{")]
    assert "STEP_SUCCESS" in {line.get("dagster_event") for line in steps if line.get("step") == "sync_ticks"}


def test_a_launched_run_is_one_trace_that_its_page_links(instance: Instance) -> None:
    wait_until(lambda: bool(scheduled_ticks(instance)), timeout_seconds=200, what="a scheduled tick has ended")
    run = scheduled_ticks(instance)[-1]
    spans = [span for span in instance.traces.spans() if span.trace_id == tracing.trace_id_of(run.id)]
    assert {span.service for span in spans} == {"sync_pipeline"}
    [root] = [span for span in spans if not span.parent_id]
    assert root.name == "run calendar_sync"
    assert [span.name for span in spans if span.parent_id == root.span_id] == ["sync_ticks"]
    [(link,)] = dagster_rows(
        instance,
        "SELECT event FROM event_logs WHERE dagster_event_type = 'ENGINE_EVENT'"
        f" AND run_id = '{run.id}' AND event LIKE '%This run is traced.%'",
    )
    assert TRACE_UI_URL.replace("{trace_id}", tracing.trace_id_of(run.id)) in str(link)


def test_an_operator_brings_an_edit_over_by_syncing_the_workspace(instance: Instance) -> None:
    google, dsn = instance.stack.google, instance.stack.database.dsn
    [edited] = edit_calendars(google, 1)
    complete_before = complete_reads(instance, edited.calendar)
    [(key,)] = rows(
        instance,
        "SELECT tenant_id || ':' || workspace_id FROM public.google_connections"
        f" WHERE google_account = '{edited.calendar}'",
    )
    run = instance.ui.wait_for_run(
        instance.ui.materialize(
            "sync_pipeline",
            "calendar_events",
            partition=str(key),
            run_config={"ops": {"calendar_events": {"config": {"full_resync": True}}}},
        )
    )
    assert run.status == "SUCCESS", instance.ui.failure(run.id)
    assert run.tags["dagster/partition"] == key
    assert complete_reads(instance, edited.calendar) == complete_before + 1, "ticks read changes only"
    assert is_mirrored(google, edited.calendar, dsn)
    assert instance.ui.numbers("calendar_events")[str(key)]["calendars"] >= 1


def test_a_backfill_of_all_workspaces_is_one_run_for_a_hundred_of_them(instance: Instance) -> None:
    keys = instance.ui.partitions("calendar_events")
    backfill = instance.ui.wait_for_backfill(instance.ui.launch_backfill("calendar_events", keys), timeout_seconds=200)
    [run] = instance.ui.runs(tags={"dagster/backfill": backfill.id})
    assert run.status == "SUCCESS", instance.ui.failure(run.id)
    assert (backfill.status, backfill.materialized, backfill.failed) == ("COMPLETED_SUCCESS", len(keys), 0)


def test_a_scheduled_idle_tick_writes_at_most_25_rows_from_the_queue_to_its_end(instance: Instance) -> None:
    before = len(scheduled_ticks(instance))
    wait_until(lambda: len(scheduled_ticks(instance)) > before, timeout_seconds=200, what="a further tick has ended")
    idle = [
        run_id
        for (run_id,) in rows(
            instance,
            "SELECT run_id FROM sync.runs WHERE events_upserted + events_deleted = 0 AND finished_at IS NOT NULL",
        )
    ]
    ended = {run.id for run in scheduled_ticks(instance) if run.status == "SUCCESS"}
    counts = [
        int(str(count))
        for run_id, count in dagster_rows(instance, "SELECT run_id, count(*) FROM event_logs GROUP BY run_id")
        if run_id in idle and run_id in ended
    ]
    assert counts, "no tick was idle"
    assert max(counts) <= 25


def test_an_operator_reports_a_past_day_and_purges_the_event_log(instance: Instance) -> None:
    yesterday = instance.ui.partitions("sync_report")[-1]
    with psycopg.connect(instance.stack.database.dsn) as connection:
        connection.execute(
            "INSERT INTO sync.runs (run_id, shard, of, started_at, finished_at, calendars_live) "
            "VALUES ('of yesterday', 0, 1, %s::date + interval '12 hours', now(), 3)",
            [yesterday],
        )
    report = instance.ui.materialize("sync_pipeline", "sync_report", partition=yesterday)
    purge = instance.ui.launch_job("sync_pipeline", "purge_event_log")
    for run_id in (report, purge):
        run = instance.ui.wait_for_run(run_id)
        assert run.status == "SUCCESS", instance.ui.failure(run.id)
    assert instance.ui.numbers("sync_report")[yesterday]["calls_of_two_minute_polling"] == 90


def test_a_backfill_of_a_workspace_that_does_not_exist_is_refused(instance: Instance) -> None:
    with pytest.raises(UserError, match="could not be found"):
        instance.ui.launch_backfill("calendar_events", ["nobody"])


def test_a_backfill_archives_past_months_in_one_run_with_every_row(instance: Instance) -> None:
    backfill = instance.ui.wait_for_backfill(instance.backfill, timeout_seconds=300)
    [run] = instance.ui.runs(tags={"dagster/backfill": instance.backfill})
    assert run.status == "SUCCESS", instance.ui.failure(run.id)
    assert (backfill.status, backfill.materialized, backfill.failed) == ("COMPLETED_SUCCESS", len(instance.months), 0)
    archived = rows(
        instance, "SELECT month::text, rows FROM archive.months WHERE state = 'archived' AND rows > 0 ORDER BY month"
    )
    assert archived == rows(
        instance,
        "SELECT date_trunc('month', created_at, 'UTC')::date::text AS month, count(*) FROM public.audit_logs"
        f" GROUP BY month ORDER BY month LIMIT {len(instance.months)}",
    )
    numbers = instance.ui.numbers("audit_log_archive")
    assert [(month, numbers[month]["rows_verified"]) for month in instance.months] == archived
    verdicts = instance.ui.check_ranges("audit_log_archive", "digest_equal")
    assert verdicts == [("SUCCEEDED", instance.months[0], instance.months[-1])], "every month has its verdict"


def test_an_operator_converts_the_table_and_the_upkeep_finds_partitions_and_chain_in_order(instance: Instance) -> None:
    instance.ui.wait_for_backfill(instance.backfill, timeout_seconds=300)
    confirmed = {"dry_run": False, "confirm": "public.audit_logs"}
    convert = instance.ui.launch_job(
        "archive_pipeline",
        "convert_audit_logs",
        run_config={"ops": {"convert_to_partitions": {"config": confirmed}}},
    )
    run = instance.ui.wait_for_run(convert)
    assert run.status == "SUCCESS", instance.ui.failure(run.id)
    run = instance.ui.wait_for_run(instance.ui.launch_job("archive_pipeline", "audit_log_upkeep_job"))
    assert run.status == "SUCCESS", instance.ui.failure(run.id)
    assert instance.ui.numbers("audit_logs_partitions")[None]["months_left"] >= 3
    assert instance.ui.numbers("audit_log_chain")[None]["links"] == len(instance.months)


def test_the_archive_answers_a_query_from_the_command_line(instance: Instance) -> None:
    instance.ui.wait_for_backfill(instance.backfill, timeout_seconds=300)
    question = "SELECT year, month, count(*) AS rows FROM audit_logs GROUP BY ALL ORDER BY ALL"
    done = subprocess.run(
        [sys.executable, "-m", "archive_pipeline.query", question, "--format", "json"],
        cwd=CHECKOUT,
        env=dict(instance.stack.environment),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = [json.loads(line) for line in done.stdout.splitlines()]
    assert [f"{row['year']}-{row['month']:02}-01" for row in answer] == instance.months
