"""Logs: lines for people, or one JSON object a line, with one vocabulary of events.

Belongs here: the vocabulary, the form of a line, which process logs how. Does not: what happens (whoever logs it), or
traces (`scaling.tracing`).

LOG_FORMAT=text leaves logging as Python has it: warnings and errors, as sentences on standard error. With json every
line of a process is an object there, and what a command prints for people stays on standard output.

Of an exception a line has its type and place, never its text: Postgres names keys and rows, Google names calendars.
"""

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from scaling.settings import LogSettings, load

PACKAGES = ("sync_pipeline", "archive_pipeline", "scaling")
HANDLER = "scaling-json"
MAIN = "__main__"
"""The name of a module of ours that was started as a program."""


class Event(StrEnum):
    """What a line is about; docs/operations.md says what each means."""

    COMMAND_ENDED = "command_ended"
    COMMAND_FAILED = "command_failed"
    COMMAND_CRASHED = "command_crashed"
    LISTENING = "listening"
    DATABASE_SILENT = "database_silent"
    DATABASE_BACK = "database_back"
    SCRAPE_PART_FAILED = "scrape_part_failed"
    NOT_TRACED = "not_traced"
    ALERT_RETRIED = "alert_retried"
    ALERT_NOT_SENT = "alert_not_sent"
    HEARTBEAT_MISSED = "heartbeat_missed"
    WORKSPACE_TROUBLE = "workspace_trouble"
    WORKSPACE_PASSED_OVER = "workspace_passed_over"
    REPLICA_SKIPPED = "replica_skipped"
    OBJECTS_DAMAGED = "objects_damaged"
    CATALOG_UNCHANGED = "catalog_unchanged"
    PARTITION_MADE = "partition_made"
    PARTITION_NOT_ATTACHED = "partition_not_attached"
    PUBLICATION_BY_PARTITION = "publication_by_partition"
    CONVERSION_UNRECORDED = "conversion_unrecorded"
    CONVERSION_LEFTOVERS = "conversion_leftovers"
    PRUNE_STOPPED = "prune_stopped"
    PRUNE_REFUSED = "prune_refused"
    DETACH_RESUMED = "detach_resumed"
    CLAIM_LOST = "claim_lost"
    LEASE_NOT_EXTENDED = "lease_not_extended"
    FAILURE_UNRECORDED = "failure_unrecorded"
    DAGSTER = "dagster"
    LIBRARY = "library"


def event(name: Event, **fields: str | float | None) -> dict[str, Any]:
    """What a log call passes as `extra`.

    Args:
        name: what happened.
        fields: ids, counts and names of tables; nothing secret, nothing personal.
    """
    return {"event": name.value, "fields": fields}


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        own = record.name.partition(".")[0] in PACKAGES or record.name == MAIN
        line: dict[str, Any] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", Event.LIBRARY.value),
            "logger": program() if record.name == MAIN else record.name,
            "message": record.getMessage(),
            "program": program(),
            "pid": record.process,
            **{name: value for name, value in (getattr(record, "fields", None) or {}).items() if value is not None},
            **_of_dagster(record),
        }
        if not own and line["event"] == Event.LIBRARY and record.exc_info:
            line["message"] = str(record.msg)  # its arguments may be the exception
        if trace_id := getattr(record, "otelTraceID", None) or getattr(record, "trace_id", None):
            line["trace_id"] = trace_id
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = record.exc_info[0].__name__
            line["where"] = _where(record.exc_info[2])
        return json.dumps(line, default=str, ensure_ascii=False)


class RunHandler(logging.StreamHandler[Any]):
    """What Dagster tells of a run, as JSON on standard error; silent unless LOG_FORMAT is json. See dagster.yaml."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(JsonFormatter())
        self._silent = load(LogSettings).log_format != "json"

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        if not self._silent:
            super().emit(record)


def configure(*, in_dagster: bool = False) -> bool:
    """Let this process log as LOG_FORMAT says; again changes nothing.

    Args:
        in_dagster: a process of Dagster, whose own loggers have handlers of their own (`RunHandler`).

    Returns:
        Whether it logs JSON.

    Raises:
        UserError: LOG_FORMAT is wrong.
    """
    if load(LogSettings).log_format != "json":
        return False
    root = logging.getLogger()
    if not any(handler.name == HANDLER for handler in root.handlers):
        handler = logging.StreamHandler(sys.stderr)
        handler.name = HANDLER
        handler.setFormatter(JsonFormatter())
        if in_dagster:
            handler.addFilter(lambda record: not record.name.startswith("dagster"))
        root.addHandler(handler)
        for package in (*PACKAGES, MAIN):
            logging.getLogger(package).setLevel(logging.INFO)
    return True


def is_json() -> bool:
    """Whether this process logs JSON."""
    return any(handler.name == HANDLER for handler in logging.getLogger().handlers)


def program() -> str:
    """The module that was started, or the script."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0] or "python").name


def _of_dagster(record: logging.LogRecord) -> Mapping[str, Any]:
    """The run and step of a line that Dagster made, and its own words without the frame it prints them in."""
    meta = getattr(record, "dagster_meta", None)
    if not meta:
        return {}
    kind = getattr(meta.get("dagster_event"), "event_type_value", None)
    told = {
        "event": getattr(record, "event", Event.DAGSTER.value),
        "message": meta.get("orig_message") or "",
        "run_id": meta.get("run_id"),
        "job": meta.get("job_name"),
        "step": meta.get("step_key"),
        "dagster_event": kind,
    }
    return {name: value for name, value in told.items() if value is not None}


def _where(traceback: Any) -> str:  # noqa: ANN401  # a traceback, which typing calls TracebackType or None
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return ""
    return f"{traceback.tb_frame.f_globals.get('__name__', '?')}:{traceback.tb_lineno}"
