"""docs/sync-cases.md tells the truth: every case is there once, and every test it links to exists."""

import ast
import re
from pathlib import Path

import pytest

from devstack.processes import CHECKOUT

DOCUMENT = CHECKOUT / "docs" / "sync-cases.md"
CASES = 86
ROW = re.compile(r"^\| (?P<number>\d+) \| (?P<case>[^|]+) \| (?P<tests>[^|]+) \|(?P<decision>[^|]*)\|$", re.MULTILINE)
LINK = re.compile(r"\[`(?P<name>[^`\]]+)`\]\((?P<path>[^)#]+)\)")


def rows() -> list[re.Match[str]]:
    return list(ROW.finditer(DOCUMENT.read_text()))


def links() -> list[tuple[int, str, str]]:
    return [(int(row["number"]), link["name"], link["path"]) for row in rows() for link in LINK.finditer(row["tests"])]


def functions_of(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_case_is_in_the_document_once_and_in_order() -> None:
    assert [int(row["number"]) for row in rows()] == list(range(1, CASES + 1))


def test_every_line_of_a_table_is_read() -> None:
    lines = [line for line in DOCUMENT.read_text().splitlines() if re.match(r"\| *\d", line)]
    assert len(lines) == CASES


def test_every_case_links_to_a_test() -> None:
    assert {number for number, _, _ in links()} == set(range(1, CASES + 1))


@pytest.mark.parametrize("path", sorted({path for _, _, path in links()}))
def test_every_linked_test_exists(path: str) -> None:
    target = (DOCUMENT.parent / path).resolve()
    assert target.is_file()
    linked = {name for _, name, of in links() if of == path}
    assert {name for name in linked if not name.startswith("test_")} == set()
    assert linked - functions_of(target) == set()
