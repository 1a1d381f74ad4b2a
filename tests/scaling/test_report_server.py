"""The page as it is served: always as of now, however many ask, and nothing of it told when the database is silent."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from devstack.servers import Database
from scaling.errors import UserError
from scaling.report_server import KEPT_SECONDS, Page, make_app


def made(*answers: str | Exception, clock: Callable[[], float] = lambda: 0.0) -> tuple[Page, list[None]]:
    """A page whose making gives these answers in turn, and what counts how often it was made."""
    calls: list[None] = []
    waiting = iter(answers)

    def make() -> str:
        calls.append(None)
        answer = next(waiting)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return Page(make, clock=clock), calls


def answers(page: Page, count: int = 1) -> list[httpx.Response]:
    """What the application answers to so many requests, one after the other."""

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(make_app(page))
        async with httpx.AsyncClient(transport=transport, base_url="http://page") as client:
            return [await client.get("/") for _ in range(count)]

    return asyncio.run(ask())


@contextmanager
def serving(**environment: str) -> Iterator[str]:
    """The command on a free port; its address."""
    command = [sys.executable, "-m", "scaling.report_server"]
    with subprocess.Popen(
        command, env={**os.environ, "REPORT_PORT": "0", **environment}, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line.startswith("listening at http://127.0.0.1:")
            yield line.removeprefix("listening at ").strip()
        finally:
            process.terminate()
            assert process.wait(20) == 0


def test_many_who_ask_at_once_read_the_database_once() -> None:
    page, calls = made("first")
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: page.html(), range(40))) == {"first"}
    assert len(calls) == 1


def test_a_page_that_is_old_is_made_again() -> None:
    now = [0.0]
    page, _ = made("first", "second", clock=lambda: now[0])
    assert page.html() == "first"
    now[0] = KEPT_SECONDS - 0.1
    assert page.html() == "first"
    now[0] = KEPT_SECONDS
    assert page.html() == "second"


def test_a_silent_database_is_a_sentence_and_the_next_reader_gets_the_page() -> None:
    page, _ = made(UserError("the database does not answer"), "well again")
    silent, well = answers(page, 2)
    assert (silent.status_code, silent.text) == (503, "There is no page now: the database does not answer.\n")
    assert well.text == "well again"


def test_a_browser_is_told_that_the_page_has_no_script_and_asks_for_nothing() -> None:
    (answer,) = answers(made("page")[0])
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "script-src" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_it_serves_this_machine_only_and_ends_with_sigterm(
    database: Database, settings_environment: Callable[..., None]
) -> None:
    settings_environment(database)
    with serving() as address, httpx.Client(trust_env=False) as client:
        page = client.get(address)
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "Nothing is recorded yet" in page.text
        assert client.get(f"{address}healthz").text == "ok\n"
        assert client.post(address).status_code == 405


@pytest.mark.parametrize("name", ["SCALING_CATALOGUE_FILE", "REPORT_PORT"])
def test_a_wrong_setting_is_a_sentence_before_anybody_asks(
    name: str, database: Database, settings_environment: Callable[..., None]
) -> None:
    settings_environment(database)
    done = subprocess.run(
        [sys.executable, "-m", "scaling.report_server"],
        env={**os.environ, "REPORT_PORT": "0", name: "/nowhere"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert name in done.stderr or "/nowhere" in done.stderr
    assert "Traceback" not in done.stderr
