"""Both pipelines through a real webserver and a real daemon, as an operator uses them."""

import json
import subprocess
import sys

import psycopg
import pytest

from devstack.dagster_ui import FINISHED_RUN, Run
from devstack.edits import edit_calendars, is_mirrored
from devstack.processes import CHECKOUT, wait_until
from scaling.errors import UserError
from tests.stack.conftest import Instance

pytestmark = [pytest.mark.xdist_group("stack"), pytest.mark.timeout(400)]


def scheduled_ticks(instance: Instance) -> list[Run]:
    runs = instance.ui.runs(tags={"dagster/schedule_name": "calendar_sync_schedule"})
    return [run for run in runs if run.status in FINISHED_RUN]


def rows(instance: Instance, query: str) -> list[tuple[object, ...]]:
    with psycopg.connect(instance.stack.database.dsn) as connection:
        return connection.execute(query.encode()).fetchall()


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


def test_an_operator_brings_an_edit_over_by_syncing_the_workspace(instance: Instance) -> None:
    google, dsn = instance.stack.google, instance.stack.database.dsn
    [edited] = edit_calendars(google, 1)
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
    assert is_mirrored(google, edited.calendar, dsn)
    assert instance.ui.numbers("calendar_events")[str(key)]["calendars"] >= 1


def test_a_backfill_of_a_workspace_that_does_not_exist_is_refused(instance: Instance) -> None:
    with pytest.raises(UserError, match="could not be found"):
        instance.ui.launch_backfill("calendar_events", ["nobody"])


def test_a_backfill_archives_past_months_with_every_row(instance: Instance) -> None:
    backfill = instance.ui.wait_for_backfill(instance.backfill, timeout_seconds=300)
    for run in instance.ui.runs(tags={"dagster/backfill": instance.backfill}):
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
