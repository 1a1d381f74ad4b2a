"""The preview: asks as Grafana asks, and its pages draw every panel with data and without an error."""

import subprocess
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from observability.dashboards import BOARDS
from observability.preview import page
from observability.preview.__main__ import main
from observability.preview.answers import Sources, Span, _columns
from scaling.errors import UserError
from tests.observability import fleet_day

DAY = Span(1_800_000_000 - 86_400, 1_800_000_000, 15)


def test_a_day_has_a_point_every_two_minutes_and_rates_look_back_over_a_scrape_more() -> None:
    assert DAY.step == 120
    assert DAY.rate_interval == 135
    assert DAY.moments[0] % 120 == 0
    assert DAY.moments[-1] == 1_800_000_000


def test_an_hour_has_a_point_a_scrape_and_rates_look_back_over_four() -> None:
    hour = Span(1_800_000_000 - 3_600, 1_800_000_000, 15)
    assert hour.step == 15
    assert hour.rate_interval == 60


def test_a_series_has_its_legend_and_nothing_where_there_was_nothing() -> None:
    target = {"refId": "A", "legendFormat": "{{kind}} {{ state }}"}
    found = {"metric": {"kind": "calendar", "state": "open"}}
    frame = Sources._series(target, found, [(120, "1"), (360, "NaN"), (480, "+Inf")], [120, 240, 360, 480])
    moments, values = frame["fields"]
    assert moments["values"] == [120_000, 240_000, 360_000, 480_000]
    assert values["values"] == [1.0, None, None, None]
    assert values["config"]["displayNameFromDS"] == "calendar open"


def test_an_instant_as_a_table_has_a_column_a_label() -> None:
    found = [{"metric": {"name": "a"}, "value": [7, "1"]}, {"metric": {"name": "b"}, "value": [7, "2"]}]
    [frame] = _columns({"refId": "B"}, found, several=True)
    assert [(each["name"], each["values"]) for each in frame["fields"]] == [
        ("Time", [7000, 7000]),
        ("name", ["a", "b"]),
        ("Value #B", [1.0, 2.0]),
    ]


def test_nothing_that_is_shown_ends_the_script_it_stands_in() -> None:
    made = page.html({"dashboard": {"title": "</script><b>"}}, "s = '</script>'", "b {}")
    assert made.count("</script>") == 2
    assert "<title>&lt;/script&gt;&lt;b&gt;</title>" in made


def test_a_prometheus_that_does_not_answer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Prometheus at http://127\.0\.0\.1:9 does not answer"):
        main(["--prometheus", "http://127.0.0.1:9", "--out", str(tmp_path)])


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["dark", "light"])
def test_every_panel_is_drawn_with_data_and_without_an_error(theme: str, drawn: Path, browser: Browser) -> None:
    errors: list[str] = []
    tab = browser.new_page(viewport={"width": 1600, "height": 900})
    tab.on("pageerror", lambda error: errors.append(str(error)))
    for board in BOARDS:
        tab.goto(f"{(drawn / board.uid).as_uri()}.html?theme={theme}")
        tab.wait_for_selector("body[data-drawn]", state="attached")
        assert tab.locator("h1").inner_text() == board.title
        titles = [panel.title for _, panels in board.rows for panel in panels]
        assert [tab.get_by_text(title, exact=True).count() for title in titles] == [1] * len(titles)
        assert tab.locator("[data-empty]").all_inner_texts() == []
        assert tab.locator("canvas").count() > 0
    assert errors == []


@pytest.mark.slow
def test_grafanas_types_take_the_application(drawn: Path) -> None:
    done = subprocess.run(
        [
            *(page.TOOLS / "node_modules" / ".bin" / "tsc", "--noEmit", "--strict", "--skipLibCheck", "--jsx"),
            *("react-jsx", "--module", "esnext", "--moduleResolution", "bundler", "--target", "es2022"),
            *("--noUncheckedIndexedAccess", "app.tsx", "assets.d.ts", "scrollbars.ts"),
        ],
        cwd=page.TOOLS,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.stdout + done.stderr, done.returncode) == ("", 0)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages of a day that was scraped every half hour."""
    directory = tmp_path_factory.mktemp("preview")
    with fleet_day.served(directory, step=1800) as day, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATABASE_URL", day.dsn)
        main(
            [
                *("--prometheus", day.prometheus, "--out", str(directory / "pages"), "--end", str(day.end)),
                *("--hours", str(day.hours), "--scrape-seconds", "1800"),
            ]
        )
    return directory / "pages"
