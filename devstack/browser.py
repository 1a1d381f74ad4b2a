"""The Chromium of this machine, for tests and pictures of pages.

Belongs here: finding it, how it is started. Does not: what is looked at. Playwright drives it and brings none.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

from scaling.errors import UserError

NAMES = ("chromium", "chromium-browser", "google-chrome")
# --no-sandbox: Chromium refuses its sandbox to root, and only this machine's own pages are opened.
FLAGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run the browser.

    Raises:
        UserError: there is none.
    """
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if found is None:
        raise UserError("no Chromium is on the PATH; install the package chromium of your system")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()
