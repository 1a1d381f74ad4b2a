"""Pictures of the Dagster UI and of the report for the README: ``make screenshots`` while ``make up`` runs.

Belongs here: which pages, and waiting until a page is drawn. Does not: anything a test asserts.
Needs a Chromium on the PATH.
"""

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from playwright.sync_api import Browser, Page, ViewportSize, expect

from devstack.browser import chromium
from devstack.dagster_ui import DagsterUi
from devstack.processes import VAR
from scaling import tracing
from scaling.errors import UserError, run_command

IMAGES = Path(__file__).parent / "images"
QUIET_MILLISECONDS = 3000
"""The UI keeps a socket open, so no page is ever idle; its drawing ends about a second after the last answer."""

LOADED_MILLISECONDS = 30_000
REPORTS: Sequence[tuple[str, Literal["light", "dark"], ViewportSize]] = (
    ("report", "light", {"width": 1280, "height": 1180}),
    ("report-phone", "dark", {"width": 390, "height": 844}),
)


def pages(ui: DagsterUi) -> dict[str, str]:
    """Choose the pages: name of the picture to path of the UI.

    Raises:
        UserError: nothing has run yet that could be shown.
    """
    ticks = [run for run in ui.runs() if run.job == "calendar_sync" and run.status == "SUCCESS"]
    months = sorted(month for month in ui.numbers("audit_log_archive") if month)
    workspaces = sorted(workspace for workspace in ui.numbers("calendar_events") if workspace)
    if not ticks or not months or not workspaces:
        raise UserError("there is nothing to show yet: wait for a sync tick and archive a month first")
    return {
        "lineage-sync": "/locations/__repository__@sync_pipeline/asset-groups/google_calendar/lineage",
        "lineage-archive": "/locations/__repository__@archive_pipeline/asset-groups/audit_logs/lineage",
        "archive-partition": f"/assets/audit_log_archive?view=partitions&partition={months[-1]}",
        "archive-checks": "/assets/audit_log_archive?view=checks&checkDetail=digest_equal",
        "archive-chain": "/assets/audit_log_chain?view=overview",
        "sync-partitions": f"/assets/calendar_events?view=partitions&partition={quote(workspaces[0])}",
        "sync-run": f"/runs/{ticks[0].id}",
        "sync-ticks": "/assets/sync_ticks?view=overview",
        "lineage-scaling": "/locations/__repository__@scaling/asset-groups/scaling/lineage",
        "scaling-metrics": "/assets/scaling_metrics?view=overview",
        "scaling-forecasts": "/assets/scaling_forecasts?view=overview",
        "scaling-episodes": "/assets/scaling_episodes?view=overview",
        "sync-checks": "/assets/calendar_events?view=checks&checkDetail=nobody_is_needed",
    }


def take(page: Page, url: str, path: str, target: Path) -> None:
    """Open a page, wait until it is drawn, and save the picture.

    Args:
        page: of the browser.
        url: of the UI.
        path: of the page.
        target: PNG file.
    """
    # Dagster cuts tables off that are wider than a page's middle column.
    page.set_viewport_size({"width": 1920 if path.startswith("/assets/scaling") else 1440, "height": 900})
    page.goto(url + path, wait_until="domcontentloaded")
    page.wait_for_timeout(QUIET_MILLISECONDS)
    expect(page.get_by_text(re.compile("^Loading"))).to_have_count(0, timeout=LOADED_MILLISECONDS)
    if path.startswith("/assets/scaling"):  # what there is to see begins below the description
        page.get_by_text("Metadata", exact=True).first.scroll_into_view_if_needed()
        page.mouse.move(700, 700)
        page.mouse.wheel(0, 450)
        if "forecasts" in path:
            page.get_by_text("[Show Markdown]").first.click()
        page.wait_for_timeout(1000)
    page.screenshot(path=target)


def served(setting: str) -> str:
    """Find where the running stack serves something beside the UI.

    Args:
        setting: that says so.

    Raises:
        UserError: no stack of this checkout runs.
    """
    environment = VAR / "up" / "environment"
    lines = environment.read_text().splitlines() if environment.exists() else []
    for line in lines:
        name, _, value = line.partition("=")
        if name == setting:
            return shlex.split(value)[0]
    raise UserError(f"{setting} is nowhere in {environment}; start: make up")


def take_trace(page: Page, ui: DagsterUi, into: Path) -> None:
    """Save the trace of a tick that had work.

    Args:
        page: of the browser.
        ui: of the running Dagster.
        into: directory of the pictures.
    """
    ticks = [run.id for run in ui.runs() if run.job == "calendar_sync" and run.status in ("SUCCESS", "FAILURE")]
    page.set_viewport_size({"width": 1440, "height": 1080})
    page.goto(served("TRACE_UI_URL").replace("{trace_id}", tracing.trace_id_of(ticks[-1])))
    page.screenshot(path=into / "trace.png")


def take_report(browser: Browser, address: str, into: Path) -> None:
    """Save the page as it is on a desk and, in dark, on a phone.

    Args:
        browser: that is running.
        address: of the page.
        into: directory of the pictures.
    """
    for name, scheme, size in REPORTS:
        page = browser.new_page(viewport=size, color_scheme=scheme, device_scale_factor=2 if name != "report" else 1)
        page.goto(address)
        page.screenshot(path=into / f"{name}.png")
        page.close()


def main() -> int:
    """Take every picture.

    Returns:
        0.

    Raises:
        UserError: no browser, or nothing to show.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:3000", help="of the running Dagster UI")
    parser.add_argument("--into", type=Path, default=IMAGES, help="directory of the pictures")
    arguments = parser.parse_args()
    arguments.into.mkdir(parents=True, exist_ok=True)
    with DagsterUi(arguments.url) as ui, chromium() as browser:
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        for name, path in pages(ui).items():
            take(page, arguments.url, path, arguments.into / f"{name}.png")
        take_trace(page, ui, arguments.into)
        take_report(browser, served("SCALING_REPORT_URL"), arguments.into)
    return 0


if __name__ == "__main__":
    run_command(main)
