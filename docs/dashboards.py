"""Pictures of Grafana's dashboards for the README: ``make dashboards``.

Belongs here: a made-up day as data, the pages of `observability.preview` over it, a picture of each. Does not: anything
a test asserts. Needs npm and a Chromium on the PATH.
"""

import argparse
import io
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import psycopg
from PIL import Image

from devstack.browser import chromium
from devstack.processes import VAR
from docs.screenshots import IMAGES
from observability.dashboards import BOARDS
from observability.preview.__main__ import main as write_pages
from scaling.errors import UserError, run_command
from tests.observability import fleet_day

NOTE = "Demo data: a fleet and its day are made up; the figures were read by the real exporter."
WIDTH = 1600
COLORS = 200
"""Of a palette: with 64 a line and its legend differed."""


def pages(out: Path) -> None:
    """Let a day pass and write the pages of it.

    Args:
        out: directory of the pages.
    """
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=VAR)))
        day = stack.enter_context(fleet_day.served(directory))
        with psycopg.connect(day.dsn) as connection:
            tenants = "SELECT tenant_id::text FROM sync.workspace_state WHERE health = 'needs_human' ORDER BY 1"
            [tenant, *_] = [name for (name,) in connection.execute(tenants)]
        os.environ["DATABASE_URL"] = day.dsn
        write_pages(
            [
                *("--prometheus", day.prometheus, "--out", str(out), "--note", NOTE, "--tenant", tenant),
                *("--end", str(day.end), "--hours", str(day.hours), "--scrape-seconds", str(fleet_day.STEP)),
            ]
        )


def pictures(out: Path, into: Path, theme: str) -> None:
    """Take a picture of every page.

    Args:
        out: directory of the pages.
        into: directory of the pictures.
        theme: dark or light.

    Raises:
        UserError: there is no Chromium, or a page has an error.
    """
    into.mkdir(parents=True, exist_ok=True)
    errors: list[str] = []
    with chromium() as browser:
        page = browser.new_page(viewport={"width": WIDTH, "height": 1000})
        page.on("pageerror", lambda error: errors.append(str(error)))
        for board in BOARDS:
            page.goto(f"{(out / board.uid).resolve().as_uri()}.html?theme={theme}")
            page.wait_for_selector("body[data-drawn]", state="attached")
            page.wait_for_timeout(1000)  # lines are drawn in a frame of their own
            picture = Image.open(io.BytesIO(page.screenshot(full_page=True)))
            target = into / f"grafana-{board.uid.removeprefix('pipeline-')}.png"
            picture.quantize(COLORS, dither=Image.Dither.NONE).save(target, optimize=True)
    if errors:
        raise UserError(f"a page has an error: {errors[0]}")


def main() -> int:
    """Write the pages, and take the pictures.

    Returns:
        0.

    Raises:
        UserError: a server, npm or Chromium is missing.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=VAR / "preview", help="directory of the pages")
    parser.add_argument("--into", type=Path, default=IMAGES, help="directory of the pictures")
    parser.add_argument("--theme", choices=["dark", "light"], default="dark", help="of the pictures")
    parser.add_argument("--drawn", action="store_true", help="the pages are there already")
    given = parser.parse_args()
    if not given.drawn:
        pages(given.out)
    pictures(given.out, given.into, given.theme)
    return 0


if __name__ == "__main__":
    run_command(main)
