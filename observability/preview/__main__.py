"""The dashboards as pages: ``python -m observability.preview --prometheus URL --out DIR``.

Belongs here: the command. Does not: asking (`answers.py`), drawing (`app.tsx`), pages (`page.py`).
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import psycopg

from observability.dashboards import BOARDS, as_json
from observability.preview import page
from observability.preview.answers import Sources, Span
from scaling.errors import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Write every dashboard as a page.

    Args:
        arguments: without the program's name; None takes them from the process.

    Returns:
        0.

    Raises:
        UserError: a data source does not answer, or npm has not what the pages are drawn with.
    """
    parser = argparse.ArgumentParser(
        prog="python -m observability.preview",
        description="Writes every dashboard as an HTML page that needs no Grafana. The panels of one tenant ask "
        "DATABASE_URL, a login with the role pipeline_operator; without it they stay empty.",
    )
    parser.add_argument("--prometheus", required=True, metavar="URL", help="that scrapes scaling.exporter")
    parser.add_argument("--out", type=Path, required=True, help="directory of the pages")
    parser.add_argument("--hours", type=float, default=24, help="how much is shown (default: %(default)s)")
    parser.add_argument(
        "--end", type=int, default=int(time.time()), help="last second shown, since 1970 (default: now)"
    )
    parser.add_argument("--scrape-seconds", type=int, default=15, help="between scrapes (default: %(default)s)")
    parser.add_argument("--tenant", help="whose page it is (default: the first)")
    parser.add_argument("--note", default="", help="a line about where the data is from")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    span = Span(given.end - int(given.hours * 3600), given.end, given.scrape_seconds)
    with ExitStack() as stack:
        dsn = os.environ.get("DATABASE_URL")
        postgres = stack.enter_context(psycopg.connect(dsn, autocommit=True)) if dsn else None
        sources = stack.enter_context(closing(Sources(given.prometheus, span, postgres, given.tenant)))
        pages = {board.uid: sources.page(json.loads(as_json(board)), given.note) for board in BOARDS}
    script, css = page.bundle()
    for uid, each in pages.items():
        (given.out / f"{uid}.html").write_text(page.html(each, script, css))
    (given.out / "index.html").write_text(page.index(pages, given.note))
    sys.stdout.write(f"{given.out / 'index.html'}\n")
    return 0


if __name__ == "__main__":
    run_command(main)
