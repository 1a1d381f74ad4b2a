"""Logs as JSON: every line an object, every call of ours an event that is documented, and nothing personal."""

import ast
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dagster as dg
import pytest

from devstack.otlp import Collector
from devstack.processes import CHECKOUT, free_port
from devstack.servers import Database
from scaling import logs, tracing
from scaling.dagster_tracing import traced_in_process_executor
from scaling.errors import UserError
from scaling.logs import Event, JsonFormatter, event
from tests.traced import execute

MARK = "c4n4ry"
RUN_HANDLER = {"python_logs": {"dagster_handler_config": {"handlers": {"json": {"class": "scaling.logs.RunHandler"}}}}}


def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=CHECKOUT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def unconfigured() -> Iterator[None]:
    """Leave the logging of the tests as it was."""
    root = logging.getLogger()
    before = list(root.handlers), {name: logging.getLogger(name).level for name in logs.PACKAGES}
    yield
    root.handlers[:] = before[0]
    for name, level in before[1].items():
        logging.getLogger(name).setLevel(level)


def formatted(message: str, *arguments: object, name: str = "scaling.some", **more: object) -> dict[str, object]:
    record = logging.LogRecord(name, logging.WARNING, "file.py", 1, message, arguments, None)
    record.__dict__.update(more)
    made = json.loads(JsonFormatter().format(record))
    assert isinstance(made, dict)
    return made


def calls(package: str) -> Iterator[tuple[str, ast.Call]]:
    for path in sorted((CHECKOUT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id in ("log", "logger")
                and node.func.attr in ("debug", "info", "warning", "error", "exception", "critical")
            ):
                yield f"{path.relative_to(CHECKOUT)}:{node.lineno}", node


def test_every_line_of_ours_has_an_event() -> None:
    found = [each for package in logs.PACKAGES for each in calls(package)]
    assert len(found) > 25
    without = [where for where, call in found if "extra" not in {keyword.arg for keyword in call.keywords}]
    assert without == []


def test_every_event_is_documented_once_and_used() -> None:
    document = (CHECKOUT / "docs" / "operations.md").read_text()
    table = document.split("| event | meaning | further fields |")[1].split("\n\n")[0]
    documented = [name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(documented) == sorted(each.value for each in Event)
    sources = "\n".join(path.read_text() for package in logs.PACKAGES for path in (CHECKOUT / package).rglob("*.py"))
    assert [each for each in Event if f"Event.{each.name}" not in sources] == []


def test_a_line_has_its_event_and_its_fields() -> None:
    line = formatted("part %s failed", "x", **event(Event.SCRAPE_PART_FAILED, part="x", absent=None))
    assert line["event"] == "scrape_part_failed"
    assert line["part"] == "x"
    assert line["message"] == "part x failed"
    assert line["level"] == "warning"
    assert "absent" not in line
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", str(line["at"]))


def test_an_exception_is_its_type_and_place_and_not_its_text() -> None:
    try:
        raise LookupError(f"no such calendar: {MARK}@example.com")
    except LookupError:
        info = sys.exc_info()
    for name in ("scaling.some", "library.some"):
        record = logging.LogRecord(name, logging.ERROR, "file.py", 1, "it failed", (), info)
        line = json.loads(JsonFormatter().format(record))
        assert line["exception"] == "LookupError"
        assert line["where"].startswith("tests.scaling.test_logs:") or line["where"].startswith("test_logs:")
        assert MARK not in json.dumps(line)


def test_a_line_break_makes_no_second_line() -> None:
    record = logging.LogRecord("scaling.x", logging.INFO, "f", 1, 'two\nlines "quoted" ü', (), None)
    text = JsonFormatter().format(record)
    assert len(text.splitlines()) == 1
    assert json.loads(text)["message"] == 'two\nlines "quoted" ü'


def test_a_command_that_fails_is_one_object_with_the_sentence(settings_environment: Callable[..., None]) -> None:
    settings_environment(LOG_FORMAT="json")
    done = command("scaling", "status")
    assert done.returncode == 2
    failed, ended = lines(done.stderr)
    assert (failed["event"], failed["level"], failed["program"]) == ("command_failed", "error", "scaling")
    assert str(failed["message"]).startswith("DATABASE_URL is not set")
    assert (ended["event"], ended["exit_code"]) == ("command_ended", 2)


def test_text_is_what_it_was(settings_environment: Callable[..., None]) -> None:
    settings_environment()
    done = command("scaling", "status")
    assert done.stderr.startswith("error: DATABASE_URL is not set")
    assert len(done.stderr.splitlines()) == 1


def test_a_wrong_format_is_a_sentence(settings_environment: Callable[..., None]) -> None:
    settings_environment(LOG_FORMAT="xml")
    done = command("scaling", "settings")
    assert done.returncode == 2
    assert done.stderr.startswith("error: LOG_FORMAT")
    with pytest.raises(UserError):
        logs.configure()


def test_an_error_nobody_foresaw_ends_a_command_without_its_text(settings_environment: Callable[..., None]) -> None:
    settings_environment(LOG_FORMAT="json")
    code = (
        "from scaling.errors import run_command\n"
        f"def main():\n    raise RuntimeError('{MARK} of somebody')\n"
        "run_command(main)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    crashed, _ = lines(done.stderr)
    assert (crashed["event"], crashed["exception"]) == ("command_crashed", "RuntimeError")
    assert MARK not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "settings", "path"),
    [
        (["sync_pipeline.webhook"], {"SYNC_WEBHOOK_URL": "https://example.com/hook"}, "/healthz"),
        (["scaling.exporter"], {}, "/metrics"),
    ],
    ids=["webhook", "exporter"],
)
def test_a_server_logs_objects_only(
    arguments: list[str],
    settings: dict[str, str],
    path: str,
    database: Database,
    settings_environment: Callable[..., None],
) -> None:
    port = free_port()
    ports = {"SYNC_WEBHOOK_PORT": str(port), "EXPORTER_PORT": str(port)}
    settings_environment(database, LOG_FORMAT="json", **ports, **settings)
    for name, value in ports.items():
        os.environ[name] = value
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments], cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert "listening at" in process.stdout.readline()
    time.sleep(0.2)
    urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30).close()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    for name in ports:
        del os.environ[name]
    said = lines(errors)
    assert "listening" in {line["event"] for line in said}
    assert {line["program"] for line in said} == {arguments[0]}


def test_what_dagster_tells_of_a_run_is_json_with_run_and_step(
    settings_environment: Callable[..., None], unconfigured: None, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings_environment(LOG_FORMAT="json")
    logs.configure(in_dagster=True)

    @dg.op
    def works(context: dg.OpExecutionContext) -> None:
        context.log.info("so far %d", 3)
        logging.getLogger("scaling.some").warning("a line", extra=event(Event.CLAIM_LOST, episode=4))

    @dg.job
    def some_job() -> None:
        works()

    with dg.instance_for_test(temp_dir=str(tmp_path), overrides=RUN_HANDLER) as instance:
        result = some_job.execute_in_process(instance=instance)
    said = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    (own,) = [line for line in said if line.get("message") == "so far 3"]
    assert (own["event"], own["run_id"], own["job"], own["step"]) == ("dagster", result.run_id, "some_job", "works")
    assert [line for line in said if line.get("dagster_event") == "STEP_SUCCESS"]
    assert [line["episode"] for line in said if line["event"] == "claim_lost"] == [4]


def test_what_a_step_tells_dagster_in_a_traced_run_names_the_trace(
    settings_environment: Callable[..., None],
    traces: Collector,
    unconfigured: None,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    settings_environment(LOG_FORMAT="json")
    logs.configure(in_dagster=True)

    @dg.op
    def works(context: dg.OpExecutionContext) -> None:
        context.log.info("so far %d", 3)
        with ThreadPoolExecutor() as pool:
            pool.submit(context.log.info, "beside").result()

    @dg.job(executor_def=traced_in_process_executor)
    def some_job() -> None:
        works()

    with dg.instance_for_test(temp_dir=str(tmp_path), overrides=RUN_HANDLER) as instance:
        run = execute(some_job, instance)
    said = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    told = {line["message"]: line.get("trace_id") for line in said}
    assert told["so far 3"] == told["beside"] == tracing.trace_id_of(run.run_id)


def test_run_workers_are_silent_beside_dagster_unless_asked(
    settings_environment: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    settings_environment()
    handler = logs.RunHandler()
    handler.handle(logging.LogRecord("dagster", logging.INFO, "f", 1, "a line", (), None))
    assert capfd.readouterr().err == ""
