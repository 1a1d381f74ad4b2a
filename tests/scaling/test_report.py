"""The page for people without Grafana: what it says, what it never does, and how it looks in a browser."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import dagster as dg
import psycopg
import pytest
from justhtml import JustHTML
from playwright.sync_api import Browser

from devstack.servers import Database
from scaling import report, report_charts, report_page
from scaling.assets import scaling_report
from scaling.databases import DatabaseRouter, Shard
from scaling.errors import UserError
from scaling.report import MonthState, Report, Severity
from scaling.resources import ScalingResource
from scaling.samples import Sample
from scaling.settings import ArchiveSourceSettings, ScalingSettings
from scaling.trend_chart import round_values
from scaling.units import Unit, shown
from tests.scaling import seeded

NOW = datetime(2026, 11, 18, 13, 7, 30, tzinfo=UTC)
HOSTILE = "<script>alert('x')</script>\"><img src=https://evil.example/a.png onerror=alert(1)> {{ 7 * 7 }} & ' ]]>"
MOST_BYTES = 3_000_000

pytestmark = pytest.mark.usefixtures("definitions_load_alone")


@pytest.fixture
def reading(database: Database, settings_environment: Callable[..., None]) -> Callable[..., Report]:
    settings_environment(database)

    def read_at(now: datetime = NOW, **archive: object) -> Report:
        source = ArchiveSourceSettings(**{"archive_first_month": "2026-06", **archive})  # type: ignore[arg-type]
        with DatabaseRouter(Shard("main", database.dsn)) as router:
            return report.read(router, seeded.known(), ScalingSettings(), source, now)

    return read_at


def execute(database: Database, statement: str, *arguments: object) -> None:
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        connection.execute(statement.encode(), arguments)


def parsed(page: str) -> JustHTML:
    return JustHTML(page, strict=True, sanitize=False)


def attributes(node: Any) -> dict[str, str]:
    return {name: value or "" for name, value in (node.attrs or {}).items()}


def text(page: str) -> str:
    return " ".join(parsed(page).query_one("body").to_text().split())  # type: ignore[union-attr]


def test_nothing_on_record_is_no_claim_that_all_is_well(reading: Callable[..., Report]) -> None:
    found = reading()
    assert report_page.verdict(found).kind == "unknown"
    said = text(report_page.render(found))
    assert "Nothing is recorded yet" in said
    assert "All is well" not in said
    assert "No run of the sync is on record" in said


def test_all_is_well_is_said_when_everything_was_measured_and_nothing_waits(
    database: Database, reading: Callable[..., Report]
) -> None:
    seeded.sync(database.admin_dsn, NOW, workspaces=20, days=3)
    execute(database, "UPDATE sync.workspace_state SET health = 'healthy'")
    seeded.months(database.admin_dsn, NOW, count=5, pruned=2)
    execute(
        database,
        "INSERT INTO scaling.samples (metric, at, status, value) VALUES ('users_total', %s, 'ok', 12)",
        NOW - timedelta(minutes=7),
    )
    found = reading()
    assert list(found.findings) == []
    assert report_page.verdict(found).title == "All is well"
    assert [month.state for month in found.months] == [
        *[MonthState.PRUNED] * 2,
        *[MonthState.ARCHIVED] * 3,
        MonthState.OPEN,
    ]
    page = report_page.render(found)
    assert "20 / 20" in text(page)
    assert "5 / 5" in text(page)


def test_what_needs_somebody_stands_first_with_what_to_do(database: Database, reading: Callable[..., Report]) -> None:
    seeded.everything(database.admin_dsn, NOW, workspaces=500, days=20)
    found = reading()
    severities = [each.severity for each in found.findings]
    assert severities == sorted(severities, key=lambda each: each is not Severity.ACT)
    titles = {each.title for each in found.findings}
    assert "1 workspace needs a human" in titles
    assert any("waits for approval" in title for title in titles)
    assert any("is over its threshold" in title for title in titles)
    assert "1 closed month is not in the archive" in titles
    page = parsed(report_page.render(found))
    first = page.query_one("#verdict")
    assert first is not None
    assert "need somebody now" in first.to_text()
    targets = {attributes(each)["id"] for each in page.query("[id]")}
    for link in page.query("a"):
        assert attributes(link)["href"].removeprefix("#") in targets
    said = text(report_page.render(found))
    assert "python -m scaling approve" in said
    assert "reauth_required" in said
    assert "2026-07" in said
    assert "What to do" in said


def test_the_figures_are_those_of_the_tables(database: Database, reading: Callable[..., Report]) -> None:
    execute(
        database,
        "INSERT INTO sync.runs (run_id, shard, of, started_at, calendars_live) "
        "SELECT n::text, 0, 1, %s::timestamptz - n * interval '20 minutes', 100 FROM generate_series(0, 8) n",
        NOW.replace(minute=50) - timedelta(hours=1),
    )
    for method, outcome, calls in (
        ("events.list", "200", 500),
        ("events.list", "429", 40),
        ("oauth.refresh", "200", 9),
    ):
        execute(
            database,
            "INSERT INTO sync.api_calls VALUES (gen_random_uuid(), %s, %s, %s, %s)",
            NOW.date(),
            method,
            outcome,
            calls,
        )
    for bound, changes in ((10, 50), (60, 45), (900, 5)):
        execute(database, "INSERT INTO sync.freshness VALUES (%s, %s, %s)", NOW.date(), bound, changes)
    (day,) = reading().days
    assert (day.calls, day.failed, day.polling) == (540, 40, 3 * 100 * 30)
    assert day.saved == 1 - 540 / 9000
    assert (day.p50, day.p95, day.changes) == (10, 60, 100)
    assert reading().saved(7) == day.saved


def test_a_standing_sync_is_something_to_act_on(database: Database, reading: Callable[..., Report]) -> None:
    seeded.sync(database.admin_dsn, NOW - timedelta(hours=1), workspaces=3, days=1)
    assert "The calendar sync stands still" in {each.title for each in reading().findings}


def test_months_are_open_until_their_grace_is_over_then_missing(reading: Callable[..., Report]) -> None:
    before = datetime(2026, 11, 1, 0, 30, tzinfo=UTC)
    assert [month.state for month in reading(before, archive_first_month="2026-10").months] == [MonthState.OPEN] * 2
    after = datetime(2026, 11, 1, 1, 30, tzinfo=UTC)
    states = [month.state for month in reading(after, archive_first_month="2026-10").months]
    assert states == [MonthState.MISSING, MonthState.OPEN]
    assert list(reading(after, archive_first_month="2026-10").findings) == []


def test_failed_months_and_an_unsigned_chain_are_found(database: Database, reading: Callable[..., Report]) -> None:
    seeded.month(database.admin_dsn, date(2026, 9, 1))
    seeded.month(database.admin_dsn, date(2026, 10, 1), state="failed", error="the disk is full")
    seeded.chain(database.admin_dsn, 1, NOW, signature=None)
    found = reading(archive_first_month="2026-09")
    assert {(each.severity, each.title) for each in found.findings} == {
        (Severity.ACT, "1 month was not archived"),
        (Severity.LOOK, "The chain is not signed"),
    }
    assert "the disk is full" in text(report_page.render(found))


def test_the_chain_is_what_its_newest_audit_found(database: Database, reading: Callable[..., Report]) -> None:
    seeded.chain(database.admin_dsn, 9, NOW - timedelta(days=1))
    (end,) = reading().chain
    assert end.audit is None
    assert "never audited" in text(report_page.render(reading()))
    seeded.audit(database.admin_dsn, 9, NOW - timedelta(days=30), deep=True)
    seeded.audit(database.admin_dsn, 9, NOW - timedelta(hours=3), worst=["part 1 was altered", "part 2 is missing"])
    found = reading()
    assert [(each.severity, each.title, each.detail) for each in found.findings] == [
        (Severity.ACT, "The archive is not what was published: 2 findings", "2026-05: part 1 was altered")
    ]
    said = text(report_page.render(found))
    assert "not sound The audit found 2 things 3 hours ago; every row was read 30 days ago." in said
    assert "part 2 is missing" in said
    seeded.audit(database.admin_dsn, 9, NOW - timedelta(hours=1))
    found = reading()
    assert list(found.findings) == []
    assert "sound 9 links, and all that they list, were as published 1 hour ago" in text(report_page.render(found))


def test_a_chain_that_nobody_audits_is_worth_a_look(database: Database, reading: Callable[..., Report]) -> None:
    seeded.chain(database.admin_dsn, 9, NOW - timedelta(days=100))
    assert [(each.title, each.detail) for each in reading().findings] == [
        ("The chain is not audited", "never, as far as is recorded")
    ]
    seeded.audit(database.admin_dsn, 9, NOW - timedelta(days=3))
    assert [each.detail for each in reading().findings] == ["the last audit was on 2026-11-15"]
    seeded.audit(database.admin_dsn, 9, NOW - timedelta(days=1))
    assert list(reading().findings) == []


def test_storage_is_estimated_now_and_in_a_year(database: Database, reading: Callable[..., Report]) -> None:
    for number in (7, 8, 9, 10):
        seeded.month(database.admin_dsn, date(2026, number, 1), size=10**9)
    costs = reading(archive_first_month="2026-07").costs
    assert (costs.stored_bytes, costs.storage, costs.storage_in_a_year) == (4 * 10**9, 0.092, 16 * 0.023)


def test_names_that_are_markup_are_shown_as_what_they_are(database: Database, reading: Callable[..., Report]) -> None:
    seeded.sync(database.admin_dsn, NOW, workspaces=2, days=1)
    execute(database, "UPDATE sync.workspace_state SET health = 'needs_human', health_reason = %s", HOSTILE)
    seeded.month(database.admin_dsn, date(2026, 9, 1))
    seeded.month(database.admin_dsn, date(2026, 10, 1), state="failed", error=HOSTILE)
    execute(
        database,
        "INSERT INTO scaling.samples (metric, dims, at, status, value)"
        " SELECT 'users_total', %s, %s::timestamptz - n * interval '1 day', 'ok', 900 - n"
        " FROM generate_series(0, 30) n",
        f"shard={HOSTILE}",
        NOW,
    )
    execute(
        database,
        "INSERT INTO scaling.episodes (rule, dims, episode_no, rule_version, capability, state, value, threshold,"
        " fired_at, acknowledged_by, acknowledged_at, error)"
        " VALUES ('users_total', %s, 1, 'v', NULL, 'needs_human', 2, 1, %s, %s, now(), %s)",
        f"shard={HOSTILE}",
        NOW,
        HOSTILE,
        HOSTILE,
    )
    execute(
        database,
        "INSERT INTO scaling.capability_changes (capability, active, changed_by, reason)"
        " VALUES ('parallel_sync', true, %s, %s)",
        HOSTILE,
        HOSTILE,
    )
    page = report_page.render(reading())
    document = parsed(page)
    assert document.query("script") == []
    assert document.query("img") == []
    assert not [each for each in document.query("*") if any(name.startswith("on") for name in attributes(each))]
    assert "<script>alert('x')</script>" in text(page)
    assert "{{ 7 * 7 }}" in text(page)


def test_the_page_is_valid_and_asks_nobody_for_anything(database: Database, reading: Callable[..., Report]) -> None:
    seeded.everything(database.admin_dsn, NOW, workspaces=50, days=30)
    page = report_page.render(reading())
    document = parsed(page)
    ids = [attributes(each)["id"] for each in document.query("[id]")]
    assert len(ids) == len(set(ids))
    assert document.query("script, iframe, object, embed, form, base, img") == []
    addresses = [
        str(value)
        for each in document.query("*")
        for name, value in attributes(each).items()
        if name in ("href", "src")
    ]
    assert all(address.startswith("#") or address == "data:," for address in addresses)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", page)
    assert len(page.encode()) < MOST_BYTES


def test_every_picture_has_a_name_and_a_table_or_a_sentence_beside_it(
    database: Database, reading: Callable[..., Report]
) -> None:
    seeded.everything(database.admin_dsn, NOW, workspaces=20, days=30)
    document = parsed(report_page.render(reading()))
    pictures = document.query("svg")
    assert len(pictures) > 10
    for picture in pictures:
        assert attributes(picture)["role"] == "img"
        named = document.query_one(f"#{attributes(picture)['aria-labelledby']}")
        assert named is not None
        assert named.to_text().strip()
    assert all("var(--" in picture.to_html() for picture in pictures)
    assert len([each for each in document.query("summary") if "The same as a table" in each.to_text()]) == 4


def test_pictures_of_one_page_share_no_ids_and_no_colour_of_their_own(
    database: Database, reading: Callable[..., Report]
) -> None:
    seeded.everything(database.admin_dsn, NOW, workspaces=5, days=20)
    found = reading()
    drawn = [report_charts.trend(row, number, NOW) for number, row in enumerate(found.thresholds[:5])]
    drawn += [report_charts.calls(found.days), report_charts.freshness(found.days)]
    ids = [name for picture in drawn for name in re.findall(r' id="([^"]+)"', picture)]
    assert len(ids) == len(set(ids))
    for picture in drawn:
        assert not re.findall(r"#[0-9a-f]{6}\b", picture)
        assert "font-family" not in picture
        used = set(re.findall(r"url\(#([^)]+)\)", picture))
        assert used <= set(ids)


def test_an_action_that_is_no_switch_is_said_to_have_acted(database: Database, reading: Callable[..., Report]) -> None:
    execute(
        database,
        "INSERT INTO scaling.episodes (rule, dims, episode_no, rule_version, capability, state, value, threshold,"
        " fired_at, approved_by, approved_at)"
        " VALUES ('audit_logs_bytes', '', 1, '1', 'audit_log_partitioning', 'acted', 2, 1, %s, 'Ada', now())",
        NOW,
    )
    said = text(report_page.render(reading()))
    assert "audit log partitioning has acted propose episode 1, approved by Ada" in said
    assert "audit log retention not in force propose never" in said


def test_sizes_on_an_axis_are_round_in_mebibytes() -> None:
    ticks = round_values(130 * 2**20, 230 * 2**20, lambda value: shown(value, Unit.BYTES), 4)
    assert [shown(tick, Unit.BYTES) for tick in ticks if tick >= 140 * 2**20][:2] == ["150.0 MiB", "200.0 MiB"]


def test_a_line_is_thinned_to_what_a_picture_shows_and_keeps_the_newest() -> None:
    taken = [Sample("m", NOW - timedelta(hours=n), float(n)) for n in range(2161)][::-1]
    thin = report_charts.thinned(taken)
    assert len(thin) <= report_charts.POINTS
    assert thin[-1] == taken[-1]


def test_the_command_writes_the_file_and_says_the_verdict(
    database: Database, settings_environment: Callable[..., None], tmp_path: Path
) -> None:
    settings_environment(database)
    seeded.everything(database.admin_dsn, datetime.now(UTC), workspaces=3, days=3)
    target = tmp_path / "made" / "page.html"
    done = subprocess.run(
        [sys.executable, "-m", "scaling", "report", "--out", str(target)],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert target.as_uri() in done.stdout
    assert "1 thing needs somebody now" in done.stdout or "things need somebody now" in done.stdout
    assert parsed(target.read_text())
    assert list(target.parent.iterdir()) == [target]


def test_a_file_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        report_page.write("page", tmp_path / "taken" / "page.html")


@pytest.mark.parametrize("address", ["https://pages.example/scaling", ""])
def test_the_asset_writes_the_page_and_links_it_where_it_is_served(
    address: str, database: Database, settings_environment: Callable[..., None], tmp_path: Path
) -> None:
    target = tmp_path / "page.html"
    settings_environment(database, SCALING_REPORT_FILE=str(target), SCALING_REPORT_URL=address)
    seeded.everything(database.admin_dsn, datetime.now(UTC), workspaces=3, days=3)
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([scaling_report], instance=instance, resources={"scaling": ScalingResource()})
    (materialization,) = result.asset_materializations_for_node("scaling_report")
    assert materialization.metadata["file"].value == str(target)
    assert materialization.metadata.get("page") == (dg.MetadataValue.url(address) if address else None)
    assert "somebody now" in str(materialization.metadata["verdict"].value)
    assert materialization.metadata["bytes"].value == target.stat().st_size


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_phone_scrolls_sideways_and_text_is_told_from_its_ground(
    scheme: Literal["light", "dark"],
    browser: Browser,
    database: Database,
    reading: Callable[..., Report],
    tmp_path: Path,
) -> None:
    seeded.everything(database.admin_dsn, NOW, workspaces=500, days=60)
    target = tmp_path / "page.html"
    report_page.write(report_page.render(reading()), target)
    asked: list[str] = []
    page = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(target.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    for width in (360, 768, 1280):
        page.set_viewport_size({"width": width, "height": 740})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    contrasts = page.evaluate(CONTRASTS)
    assert asked == [target.as_uri()]
    assert min(contrasts.values()) >= 4.5, contrasts


CONTRASTS = """() => {
  const parts = colour => (colour.match(/[\\d.]+/g) || []).map(Number);
  const light = colour => {
    const [r, g, b] = parts(colour).map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = node => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor, [, , , alpha] = parts(colour);
      if (alpha === undefined || alpha > 0) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  const found = {};
  document.querySelectorAll('body *').forEach(node => {
    const written = Array.from(node.childNodes).some(each => each.nodeType === 3 && each.data.trim());
    if (node.closest('svg') || !written) return;
    const [a, b] = [light(getComputedStyle(node).color), light(ground(node))].sort((x, y) => y - x);
    const name = node.tagName + '.' + node.className, ratio = (a + 0.05) / (b + 0.05);
    found[name] = Math.min(found[name] || 99, ratio);
  });
  return found;
}"""
