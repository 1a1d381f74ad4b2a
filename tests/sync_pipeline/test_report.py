"""The report of a day: its figures, its pictures, and what it says when there is nothing to report."""

import base64
import io
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta

import dagster as dg
import pytest
from PIL import Image

from scaling.databases import DatabaseRouter, Shard
from sync_pipeline import charts, report
from sync_pipeline.assets import sync_report
from sync_pipeline.definitions import build_defs
from sync_pipeline.report import DayReport
from sync_pipeline.resources import SyncResource
from tests.sync_pipeline.conftest import Saas
from tests.sync_pipeline.test_dagster import Environment

pytestmark = pytest.mark.usefixtures("definitions_load_alone")

DAY = date(2026, 3, 5)


@pytest.fixture
def router(saas: Saas) -> Iterator[DatabaseRouter]:
    with DatabaseRouter(Shard("main", saas.dsn)) as made:
        yield made


def note_run(saas: Saas, hour: int, minute: int = 0, *, day: date = DAY, live: int = 10, **numbers: int) -> None:
    columns = ["calendars_live", *numbers]
    saas.execute(
        f"INSERT INTO sync.runs (run_id, shard, of, started_at, {', '.join(columns)}) "
        f"VALUES (gen_random_uuid()::text, 0, 1, %s, {', '.join(['%s'] * len(columns))})",
        datetime(day.year, day.month, day.day, hour, minute, tzinfo=UTC),
        live,
        *numbers.values(),
    )


def note_calls(saas: Saas, method: str, outcome: str, calls: int, *, day: date = DAY) -> None:
    saas.execute(
        "INSERT INTO sync.api_calls (tenant_id, day, method, outcome, calls) "
        "VALUES (gen_random_uuid(), %s, %s, %s, %s)",
        day,
        method,
        outcome,
        calls,
    )


def test_calls_are_held_against_two_minute_polling_of_every_live_calendar(saas: Saas, router: DatabaseRouter) -> None:
    for hour in range(24):
        for minute in range(0, 60, 20):
            note_run(saas, hour, minute, live=100 if hour < 12 else 200)
    note_calls(saas, "events.list", "200", 500)
    note_calls(saas, "calendarList.list", "429", 40)
    note_calls(saas, "oauth.refresh", "200", 9)
    figures = report.read(router, DAY).numbers()
    assert figures["calls_of_two_minute_polling"] == 150 * 720
    assert (figures["api_calls"], figures["token_refreshes"], figures["calls_failed"]) == (540, 9, 40)
    assert figures["calls_saved"] == 150 * 720 - 540
    assert figures["saved_share"] == 0.995
    assert figures["calendars_live"] == 150
    assert figures["calls_per_calendar"] == 3.6


def test_hours_without_a_run_save_nothing(saas: Saas, router: DatabaseRouter) -> None:
    note_run(saas, 23, 30, live=10)
    note_calls(saas, "events.list", "200", 20)
    figures = report.read(router, DAY).numbers()
    assert (figures["calls_of_two_minute_polling"], figures["calls_saved"]) == (300, 280)


def test_a_day_is_a_utc_day_and_holds_nothing_of_its_neighbours(saas: Saas, router: DatabaseRouter) -> None:
    for day in (DAY - timedelta(days=1), DAY, DAY + timedelta(days=1)):
        note_run(saas, 0, day=day, events_upserted=1, workspaces_served=4, workspaces_failed=1)
        note_run(saas, 23, 59, day=day, events_upserted=2, workspaces_served=4, workspaces_failed=0)
        note_calls(saas, "events.list", "200", 5, day=day)
        saas.execute("INSERT INTO sync.freshness (day, le_seconds, changes) VALUES (%s, 60, 7)", day)
    figures = report.read(router, DAY).numbers()
    assert (figures["runs"], figures["events_upserted"], figures["api_calls"]) == (2, 3, 5)
    assert (figures["workspaces_failed"], figures["workspaces_failed_share"]) == (1, 0.125)
    assert figures["changes_timed"] == 7


@pytest.mark.parametrize(
    ("histogram", "p50", "p95"),
    [
        ({}, None, None),
        ({30: 1}, 30, 30),
        ({1: 50, 60: 45, 900: 5}, 1, 60),
        ({1: 50, 60: 44, 900: 6}, 1, 900),
        ({1: 0, 60: 10}, 60, 60),
    ],
)
def test_quantiles_are_the_bound_the_share_stayed_within(
    histogram: dict[int, int], p50: int | None, p95: int | None
) -> None:
    day = DayReport(DAY, (), {}, histogram, {})
    assert (day.freshness_quantile(0.5), day.freshness_quantile(0.95)) == (p50, p95)


def test_what_could_not_be_measured_is_absent(router: DatabaseRouter) -> None:
    figures = report.read(router, DAY).numbers()
    assert not {"saved_share", "freshness_p50_s", "freshness_p95_s", "calendars_live"} & set(figures)
    assert figures["api_calls"] == 0


def test_pictures_are_small_and_drawn_on_white_even_of_an_empty_day(saas: Saas, router: DatabaseRouter) -> None:
    empty = charts.draw(report.read(router, DAY))
    for hour in range(24):
        note_run(saas, hour, live=1000, api_calls=50 * hour, workspaces_served=90, workspaces_failed=hour % 7)
    for position, outcome in enumerate(("200", "401", "403", "404", "410", "429", "500", "503", "no_answer")):
        for method in ("events.list", "calendarList.list", "events.watch", "channels.stop", "oauth.refresh"):
            note_calls(saas, method, outcome, 1000 >> position)
    for bound in (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400, 2**31 - 1):
        saas.execute("INSERT INTO sync.freshness (day, le_seconds, changes) VALUES (%s, %s, 100)", DAY, bound)
    full = charts.draw(report.read(router, DAY))
    for pictures in (empty, full):
        assert list(pictures) == ["calls", "savings", "freshness", "failures"]
        for png in pictures.values():
            image = Image.open(io.BytesIO(png)).convert("RGB")
            assert image.size == (640, 290)
            corners = [image.getpixel(at) for at in ((0, 0), (639, 0), (0, 289), (639, 289))]
            assert corners == [(255, 255, 255)] * 4
        assert sum(len(base64.b64encode(png)) for png in pictures.values()) < 80_000
    for name, png in full.items():
        assert png != empty[name], f"{name} shows something"


def materialize(instance: dg.DagsterInstance, day: date) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        [sync_report],
        selection=[sync_report],
        partition_key=str(day),
        instance=instance,
        resources={"sync": SyncResource()},
        raise_on_error=False,
    )


def test_materializing_a_past_day_reports_it_with_figures_and_pictures(
    saas: Saas, instance: dg.DagsterInstance, sync_environment: Environment
) -> None:
    note_run(saas, 12, live=50, events_upserted=8)
    note_calls(saas, "events.list", "200", 30)
    result = materialize(instance, DAY)
    [event] = result.asset_materializations_for_node("sync_report")
    assert event.partition == "2026-03-05"
    assert event.metadata["events_upserted"].value == 8
    assert event.metadata["calls_saved"].value == 50 * 30 - 30
    text = event.metadata["picture_savings"].value
    assert isinstance(text, str)
    head, _, encoded = text.partition("base64,")
    assert head == "![savings](data:image/png;"
    assert base64.b64decode(encoded.removesuffix(")")).startswith(b"\x89PNG")


def test_a_day_without_a_run_is_not_reported_and_says_since_when_there_are_runs(
    saas: Saas, instance: dg.DagsterInstance, sync_environment: Environment
) -> None:
    note_run(saas, 12, day=date(2026, 3, 9))
    result = materialize(instance, date(2026, 3, 8))
    failure = result.failure_data_for_node("sync_report")
    assert failure is not None
    assert failure.user_failure_data is not None
    assert failure.user_failure_data.description == (
        "No run of the sync started on 2026-03-08; the oldest known is of 2026-03-09."
    )


def test_the_schedule_reports_the_day_that_just_ended(sync_environment: Environment) -> None:
    schedule = build_defs().resolve_schedule_def("sync_report_schedule")
    with dg.instance_for_test() as instance:
        context = dg.build_schedule_context(
            instance=instance, scheduled_execution_time=datetime(2026, 3, 6, 0, 10, tzinfo=UTC)
        )
        [request] = schedule.evaluate_tick(context).run_requests or []
    assert request.partition_key == "2026-03-05"
