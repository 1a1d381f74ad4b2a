"""Writes the measured figures into the README: ``python -m bench.readme``.

Belongs here: turning var/bench/*.json into tables between the README's markers. Does not: measuring.
"""

import json
import re
import sys
from pathlib import Path

README = Path("README.md")
RESULTS = Path("var/bench")
MARKED = re.compile(r"(<!-- bench:(?P<name>\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def table(name: str) -> str | None:
    """The figures of one benchmark as Markdown, None when it was not run here."""
    results = RESULTS / f"{name}.json"
    if not results.exists():
        return None
    figures = json.loads(results.read_text())["figures"]
    rows = [f"| {f['name']} | {f['value']:,g} | {_target(f['target'])} | {f['how']} |" for f in figures]
    return "\n".join(["| figure | measured | target | how |", "|---|---|---|---|", *rows, ""])


def _target(target: str | float | None) -> str:
    """A target as it is shown: some figures have none, some only a number."""
    return f"{target:,g}" if isinstance(target, int | float) else target or ""


def main() -> int:
    """Replace the tables of all benchmarks that were run here."""
    written = []

    def replace(found: re.Match[str]) -> str:
        new = table(found["name"])
        if new is None:
            return found[0]
        written.append(found["name"])
        return found[1] + new + found[3]

    README.write_text(MARKED.sub(replace, README.read_text()))
    sys.stdout.write(f"README.md: {', '.join(written) or 'no'} figures written\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
