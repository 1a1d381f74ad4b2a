"""docs/archive-cases.md tells the truth: every case is there once, its tests exist and say which case."""

import ast
import re
from pathlib import Path

import pytest

from devstack.processes import CHECKOUT

DOCUMENT = CHECKOUT / "docs" / "archive-cases.md"
LABELLED = (CHECKOUT / "tests" / "archive_pipeline", CHECKOUT / "tests" / "stack")
CASES = 74
ROW = re.compile(r"^\| (?P<number>\d+) \| (?P<case>[^|]+) \| (?P<tests>[^|]+) \|(?P<decision>[^|]*)\|$", re.MULTILINE)
LINK = re.compile(r"\[`(?P<name>[^`\]]+)`\]\((?P<path>[^)#]+)\)")
LABEL = re.compile(r" *# case (?P<numbers>\d+(?:, \d+)*)")
DEFINITION = re.compile(r"(?:async )?def (?P<name>test_\w+)")


def rows() -> list[re.Match[str]]:
    return list(ROW.finditer(DOCUMENT.read_text()))


def links() -> list[tuple[int, str, str]]:
    return [(int(row["number"]), link["name"], link["path"]) for row in rows() for link in LINK.finditer(row["tests"])]


def labels() -> set[tuple[int, str, str]]:
    """What the comments above the tests say."""
    found = set()
    for path in (path for directory in LABELLED for path in sorted(directory.glob("test_*.py"))):
        numbers: list[int] = []
        for line in path.read_text().splitlines():
            if label := LABEL.fullmatch(line):
                numbers += [int(number) for number in label["numbers"].split(", ")]
            elif definition := DEFINITION.match(line):
                found |= {(number, definition["name"], f"../{path.relative_to(CHECKOUT)}") for number in numbers}
                numbers = []
    return found


def collected_of(path: Path) -> set[str]:
    """The test functions that pytest finds in a file: those of the module itself, none that another one hides."""
    names = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    return {name for name in names if names.count(name) == 1}


def test_every_case_is_in_the_document_once_and_in_order() -> None:
    assert [int(row["number"]) for row in rows()] == list(range(1, CASES + 1))


def test_every_line_of_a_table_is_read() -> None:
    lines = [line for line in DOCUMENT.read_text().splitlines() if re.match(r"\| *\d", line)]
    assert len(lines) == CASES


def test_every_case_links_to_a_test() -> None:
    assert {number for number, _, _ in links()} == set(range(1, CASES + 1))


def test_the_comments_above_the_tests_say_the_same() -> None:
    assert set(links()) == labels()


@pytest.mark.parametrize("path", sorted({path for _, _, path in links()}))
def test_every_linked_test_exists(path: str) -> None:
    target = (DOCUMENT.parent / path).resolve()
    assert target.is_file()
    assert target.match("test_*.py")
    linked = {name for _, name, of in links() if of == path}
    assert {name for name in linked if not name.startswith("test_")} == set()
    assert linked - collected_of(target) == set()


def test_the_document_names_nothing_outside_of_the_repository() -> None:
    for path in re.findall(r"\]\(([^)]+)\)", DOCUMENT.read_text()):
        assert (DOCUMENT.parent / path).resolve().is_relative_to(CHECKOUT)
