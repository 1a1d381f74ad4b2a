"""Traces: what a run did as OpenTelemetry spans, run -> step -> workspace or month -> calendar -> HTTP, SQL, S3.

Belongs here: switching it on for a run, the helpers that make spans, what a span may say. Does not: anything of Dagster
(`scaling.dagster_tracing`), the SDK (`scaling.trace_export`), or which work is worth a span.

Off without OTEL_EXPORTER_OTLP_ENDPOINT: the SDK is never imported, and every helper does nothing. Spans are made only
beneath a run's; a heartbeat, a web server or a command makes none.

**A run's ids are derived from its run id**, so that every process and the UI's link name the same trace without telling
each other.

**What a span may say** is a list, `trace_export.TOLD`: ids, names of methods, tables and steps, counts, outcomes, and
of an error its type. Never a text: Postgres' name keys and rows, Google's name calendars, which are mail addresses.

**Why SQL has a cursor of its own here** and not `opentelemetry-instrumentation-psycopg`: that records whole statements,
into which the archive composes values, and the texts of errors; its newest release also pins the SDK to an older one.
The one of httpx would send a `traceparent` to everybody who is asked, patch every client of the process, and end a span
before the body is read. There is none of httplib2; `sync_pipeline.google_calendar` makes that span. S3, Glue, Athena
and KMS are `opentelemetry-instrumentation-botocore`'s.
"""

import gc
import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar

import psycopg
from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.trace import INVALID_SPAN, NonRecordingSpan, Span, SpanKind, StatusCode, Tracer
from psycopg import sql
from psycopg.abc import Params, Query
from psycopg.rows import TupleRow

from scaling.errors import UserError
from scaling.logs import Event, event
from scaling.settings import TracingSettings, load

if TYPE_CHECKING:
    import httpx

    from scaling.trace_export import Export

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
Value = str | bool | int | float | Sequence[str]
Period = tuple[int, int]
"""Begin and end, in nanoseconds since 1970."""

RUN_ID = "dagster.run_id"
WAIT_SECONDS = 0.01
"""A shorter wait is not worth a span."""
LOGGERS = ("sync_pipeline", "archive_pipeline", "scaling")

_NOTHING: AbstractContextManager[Span] = nullcontext(INVALID_SPAN)
_TABLE = re.compile(
    r"\b(?:into|update|table|copy)\s+(?:only\s+)?([a-z_]\w*(?:\.\w+)?)"
    r"|\b(?:from|join)\s+(?:only\s+)?([a-z_]\w*(?:\.\w+)?)(?![\w.]|\s*\()",  # not a function
    re.IGNORECASE,
)
_WORD = re.compile(r"[a-z]+", re.IGNORECASE)


class _State:
    """What is switched on in this process; a run is one process, but tests and benches have several runs in one."""

    export: "Export | None" = None
    endpoint: str | None = None
    run: tuple[int, int] | None = None
    """Trace and span of the run that is at work, for lines of threads that no span was carried to."""


def trace_id_of(run_id: str) -> str:
    """The id of a run's trace, as trace UIs write it."""
    return f"{_ids(run_id)[0]:032x}"


def link_of(run_id: str) -> str | None:
    """Where a run's trace is shown; None when no trace UI is configured, or nothing is traced.

    Args:
        run_id: of the run.
    """
    if _State.export is None:
        return None
    try:
        address = load(TracingSettings).trace_ui_url
    except UserError as error:
        log.warning("runs do not link their trace: %s", error, extra=event(Event.NOT_TRACED))
        return None
    return address.replace("{trace_id}", trace_id_of(run_id)) if address else None


def start(service: str) -> bool:
    """Switch tracing on in this process as the settings say; what is on stays on.

    A wrong setting is logged and leaves it off: work is never lost to its trace.

    Args:
        service: name of the part that is traced, unless OTEL_SERVICE_NAME says otherwise.

    Returns:
        Whether it is on.
    """
    try:
        endpoint = load(TracingSettings).otel_exporter_otlp_endpoint
    except UserError as error:
        log.warning("runs are not traced: %s", error, extra=event(Event.NOT_TRACED))
        endpoint = None
    if endpoint != _State.endpoint:
        stop()
    if endpoint is not None and _State.export is None:
        _State.export = _export(service)
        _State.endpoint = endpoint
        logging.setLogRecordFactory(_with_trace_id)
    return _State.export is not None


def _export(service: str) -> "Export":
    """Load the SDK, for those who trace: 0.1 s and 12 MB; a collection of what Dagster imported would double that."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        from scaling.trace_export import Export
    finally:
        if collecting:
            gc.enable()
    return Export(service)


def stop() -> None:
    """Switch tracing off again; spans that were not sent yet are sent, as far as `Export.flush` waits for it."""
    if _State.export is None:
        return
    logging.setLogRecordFactory(logging.LogRecord)
    _State.export.close()
    _State.export = _State.endpoint = None


@contextmanager
def run(
    run_id: str, name: str, attributes: Mapping[str, Value] | None = None, *, at: Period | None = None
) -> Iterator[Span]:
    """Make the span of a whole run, beneath which all others are, and send everything at its end.

    Args:
        run_id: of the run; names the trace.
        name: of the span.
        attributes: of the span.
        at: when it was, if not now.
    """
    export = _State.export
    if export is None:
        yield INVALID_SPAN
        return
    ids = _State.run = _ids(run_id)
    try:
        with (
            export.identified(*ids),
            _recorded(export.tracer, name, {RUN_ID: run_id, **(attributes or {})}, at=at) as span,
        ):
            yield span
    finally:
        _State.run = None
        export.flush()


@contextmanager
def step(
    run_id: str, key: str, attributes: Mapping[str, Value] | None = None, *, at: Period | None = None
) -> Iterator[Span]:
    """Make the span of a step, with an id of its own as the run has, so that another process can end what was killed.

    Args:
        run_id: of the run, whose span is current.
        key: of the step, once in a run.
        attributes: of the span.
        at: when it was, if not now.
    """
    export = _State.export
    if export is None or not _is_worth_recording(export):
        with span(key) as unrecorded:
            yield unrecorded
        return
    with ExitStack() as work:
        with export.identified(*_ids(f"{run_id} {key}")):
            made = work.enter_context(_recorded(export.tracer, key, attributes, at=at))
        yield made


def span(
    name: str, attributes: Mapping[str, Value] | None = None, *, remote: bool = False
) -> AbstractContextManager[Span]:
    """Make a span beneath the current one; without one there is nothing to record it in.

    Args:
        name: of the kind of work, of which there are few.
        attributes: of `trace_export.TOLD`.
        remote: another server is asked.

    Returns:
        A context manager of the span. Whatever leaves it by exception is recorded by its type.
    """
    export = _State.export
    if export is None:
        return _NOTHING
    above = trace.get_current_span().get_span_context()
    if not above.trace_flags.sampled:
        return _NOTHING
    if export.is_silent:
        # Takes what is said of this work, which else would be said of the work above.
        return trace.use_span(NonRecordingSpan(above))
    return _recorded(export.tracer, name, attributes, SpanKind.CLIENT if remote else SpanKind.INTERNAL)


@contextmanager
def waiting(name: str) -> Iterator[None]:
    """Make a span of a wait beneath the current one, if it turns out to be long.

    Args:
        name: of what is waited for.
    """
    began = time.time_ns()
    try:
        yield
    finally:
        export = _State.export
        if export is not None and time.time_ns() - began >= WAIT_SECONDS * 1e9 and _is_worth_recording(export):
            export.tracer.start_span(name, start_time=began).end()


@contextmanager
def committed(transaction: AbstractContextManager[object]) -> Iterator[None]:
    """Make a span of the COMMIT at the end of a transaction; one that is rolled back has none.

    Args:
        transaction: of psycopg, or its connection, which is one transaction where autocommit is off.
    """
    with ExitStack() as until_committed:
        until_committed.enter_context(transaction)
        yield
        with _statement("COMMIT"):
            until_committed.close()


@contextmanager
def requested(method: str, sent: AbstractContextManager["httpx.Response"]) -> Iterator["httpx.Response"]:
    """Make a span of a request until its answer is read; not of its address, which may be secret.

    Args:
        method: of HTTP.
        sent: the answer as httpx streams it.
    """
    with span(method, {"http.request.method": method}, remote=True) as made, sent as response:
        made.set_attribute("http.response.status_code", response.status_code)
        if response.is_error:
            failed(str(response.status_code))
        yield response


def ended(outcome: str, counts: Mapping[str, int | float] | None = None) -> None:
    """Say how the work of the current span ended.

    Args:
        outcome: one of few words.
        counts: what was done, by name.
    """
    trace.get_current_span().set_attribute("outcome", str(outcome))
    counted(counts or {})


def counted(counts: Mapping[str, int | float]) -> None:
    """Say what was done in the current span.

    Args:
        counts: by name; zeros are not worth a place.
    """
    current = trace.get_current_span()
    if current.is_recording():
        current.set_attributes({f"count.{name}": value for name, value in counts.items() if value})


def failed(kind: str | BaseException) -> None:
    """Mark the current span as failed, by what is no exception that leaves it.

    Args:
        kind: of the error, or the error, of which only the type is told.
    """
    _fail(trace.get_current_span(), kind)


def carried(work: Callable[P, T]) -> Callable[P, T]:
    """The same work beneath the span that is current now, in whichever thread it is done.

    Args:
        work: for another thread.
    """
    if _State.export is None:
        return work
    here = contexts.get_current()

    def beneath(*arguments: P.args, **named: P.kwargs) -> T:
        token = contexts.attach(here)
        try:
            return work(*arguments, **named)
        finally:
            contexts.detach(token)

    return beneath


def cursor_factory() -> type[psycopg.Cursor[Any]]:
    """The class of cursors that new connections get: psycopg's own unless a run is traced."""
    return psycopg.Cursor if _State.export is None else TracedCursor


class TracedCursor(psycopg.Cursor[TupleRow]):
    """A cursor each of whose statements is a span, named by what it does to which table."""

    def execute(
        self, query: Query, params: Params | None = None, *, prepare: bool | None = None, binary: bool | None = None
    ) -> Self:
        """See `psycopg.Cursor.execute`."""
        with _statement(query) as made:
            super().execute(query, params, prepare=prepare, binary=binary)  # type: ignore[arg-type,misc]  # its overloads
            made.set_attribute("count.rows", self.rowcount)
        return self

    def executemany(self, query: Query, params_seq: Iterable[Params], *, returning: bool = False) -> None:
        """See `psycopg.Cursor.executemany`."""
        with _statement(query) as made:
            super().executemany(query, params_seq, returning=returning)
            made.set_attribute("count.rows", self.rowcount)


def _statement(query: Query) -> AbstractContextManager[Span]:
    # The pool looks at a connection it lends with an empty statement.
    export = _State.export
    if export is None or not query or not _is_worth_recording(export):
        return _NOTHING
    return _recorded(export.tracer, summary(query), {"db.system.name": "postgresql"}, SpanKind.CLIENT)


def _is_worth_recording(export: "Export") -> bool:
    return not export.is_silent and trace.get_current_span().get_span_context().trace_flags.sampled


def summary(query: Query) -> str:
    """What a statement does to which table, without any value.

    Args:
        query: as it is executed.
    """
    if isinstance(query, str | bytes):
        return _summary_of_text(query)
    # Literals, which are values, are left out.
    parts = query if isinstance(query, sql.Composed) else [query]
    return _summary_of_text("".join(_told_parts(parts)))


def _told_parts(parts: Iterable[object]) -> Iterator[str]:
    for part in parts:
        if isinstance(part, sql.Composed):
            yield from _told_parts(part)
        elif isinstance(part, sql.SQL | sql.Identifier):
            yield part.as_string(None).replace('"', "")


@lru_cache(maxsize=1024)
def _summary_of_text(text: str | bytes) -> str:
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    verb, table = _WORD.search(text), _TABLE.search(text)
    return " ".join([verb[0].upper() if verb else "SQL", *([table[1] or table[2]] if table else [])])


@contextmanager
def _recorded(
    tracer: Tracer,
    name: str,
    attributes: Mapping[str, Value] | None,
    kind: SpanKind = SpanKind.INTERNAL,
    at: Period | None = None,
) -> Iterator[Span]:
    began, ended = at or (None, None)
    made = tracer.start_span(
        name, kind=kind, attributes=attributes, start_time=began, record_exception=False, set_status_on_exception=False
    )
    token = contexts.attach(trace.set_span_in_context(made))
    try:
        yield made
    except GeneratorExit:
        raise
    except BaseException as error:
        _fail(made, error)
        raise
    finally:
        contexts.detach(token)
        made.end(ended)


def _fail(made: Span, kind: str | BaseException) -> None:
    if not made.is_recording():
        return
    made.set_status(StatusCode.ERROR)
    made.set_attribute("error.type", kind if isinstance(kind, str) else type_of(kind))
    if isinstance(kind, psycopg.Error) and kind.sqlstate:
        made.set_attribute("db.response.status_code", kind.sqlstate)


def type_of(error: BaseException) -> str:
    """The type of an error as spans name it; builtins without their module."""
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _ids(run_id: str) -> tuple[int, int]:
    """Trace and span of a run. Hashed, because samplers decide by bits that a UUID has fixed."""
    digest = hashlib.sha256(run_id.encode()).digest()
    return int.from_bytes(digest[:16]) or 1, int.from_bytes(digest[16:24]) or 1


def _with_trace_id(*arguments: Any, **named: Any) -> logging.LogRecord:  # noqa: ANN401  # as LogRecord takes them
    """Name the trace in a line of the pipelines' loggers, and for formatters in any record's attributes."""
    record = logging.LogRecord(*arguments, **named)
    made = trace.get_current_span().get_span_context()
    ids = (made.trace_id, made.span_id) if made.is_valid else _State.run
    if ids:
        trace_id = f"{ids[0]:032x}"
        record.__dict__.update(otelTraceID=trace_id, otelSpanID=f"{ids[1]:016x}")
        if isinstance(record.msg, str) and str(record.name).partition(".")[0] in LOGGERS:
            record.msg = f"{record.msg} trace_id={trace_id}"
    return record
