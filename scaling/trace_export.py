"""Sending spans: the OpenTelemetry SDK, kept from costing a run anything and from telling anything.

Belongs here: the provider, its ids, the sender and its limits, the list of what spans may say. Does not: spans
(`scaling.tracing`, which alone imports this, when a run is traced).

**A collector may be dead, slow or flapping.** Spans wait in a bounded queue and are sent by a thread each second. A
batch that is not taken within two seconds is lost, and for ten more nothing is tried and nothing recorded, because to
record what nobody takes costs as much as tracing does. The end of a run asks once more, so that a collector that came
back gets at least the run itself; it waits two seconds at most, and a moment for one that took nothing the last time.

**Why not `dagster-otel` 0.5.1**: it sends each span by itself and waits up to two seconds for it, records texts of
errors, writes a run tag for each step, has no span of the run, and knows neither partition keys nor further attributes.
Of it is the idea to derive the trace's id from the run's.
"""

import contextvars
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import requests
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.sdk.environment_variables import (
    OTEL_BSP_MAX_QUEUE_SIZE,
    OTEL_BSP_SCHEDULE_DELAY,
    OTEL_EXPORTER_OTLP_TIMEOUT,
    OTEL_EXPORTER_OTLP_TRACES_TIMEOUT,
    OTEL_SERVICE_NAME,
)
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import Status, StatusCode, Tracer

if TYPE_CHECKING:
    from opentelemetry.instrumentation.botocore import BotocoreInstrumentor

EXPORT_SECONDS = 2.0
SILENCE_SECONDS = 10.0
FLUSH_SECONDS = 2.0
FLUSH_DEAD_SECONDS = 0.05
FLUSH_LOOK_SECONDS = 0.01
SCHEDULE_SECONDS = 1.0
"""The SDK's five would let half a tick pass before a dead collector is found out, and a killed run lose as much."""
QUEUE_SPANS = 8192
"""A tick over 1,000 workspaces makes about as many in its ten seconds; 10 MB."""

TOLD = frozenset(
    {
        "dagster.run_id",
        "dagster.job_name",
        "dagster.step_key",
        "dagster.partition_key",
        "dagster.partition_range_start",
        "dagster.partition_range_end",
        "dagster.retry_number",
        "tenant.id",
        "workspace.id",
        "connection.id",
        "metric.name",
        "shard",
        "outcome",
        "error.type",
        "http.request.method",
        "http.response.status_code",
        "db.system.name",
        "db.response.status_code",
        "rpc.system",
        "rpc.service",
        "rpc.method",
        "http.status_code",
        "retry_attempts",
    }
)
"""Attributes that leave this process, and all that begin with `count.`; others are dropped, whoever set them."""

ANSWERS = (404, 412, 501)
"""Of S3, to the questions whether an object or a protection is there (501: no such protection in this S3), and to a PUT
that is to be the first."""

_chosen: contextvars.ContextVar[tuple[int, int] | None] = contextvars.ContextVar("chosen ids", default=None)


class Export:
    """The SDK of this process.

    Attributes:
        tracer: makes spans.
    """

    def __init__(self, service: str) -> None:
        self._sender = _Sender()
        self._processor = BatchSpanProcessor(
            self._sender,
            max_queue_size=None if OTEL_BSP_MAX_QUEUE_SIZE in os.environ else QUEUE_SPANS,
            schedule_delay_millis=None if OTEL_BSP_SCHEDULE_DELAY in os.environ else SCHEDULE_SECONDS * 1000,
        )
        named = {} if os.environ.get(OTEL_SERVICE_NAME) else {SERVICE_NAME: service}
        # Not at exit: the SDK would wait half a minute for a collector that hangs.
        self._provider = TracerProvider(
            resource=_HashedOnce(Resource.create(named)), id_generator=_Ids(), shutdown_on_exit=False
        )
        self._provider.add_span_processor(self._processor)
        self.tracer: Tracer = self._provider.get_tracer("pipelines")
        self._botocore = _botocore(self._provider)

    @property
    def is_silent(self) -> bool:
        """Whether whatever is recorded now would be lost: the collector has just taken nothing."""
        return self._sender.is_silent

    @contextmanager
    def identified(self, trace_id: int, span_id: int) -> Iterator[None]:
        """Give these ids to the first span that is made within the block; beneath another, its trace stays."""
        token = _chosen.set((trace_id, span_id))
        try:
            yield
        finally:
            _chosen.reset(token)

    def flush(self) -> None:
        """Send what waits, silence or not, for as long as that is worth waiting for."""
        self._sender.ask_again()
        self._waited_for(self._processor.force_flush)

    def close(self) -> None:
        """End the sending; what cannot be sent soon is lost."""
        self.flush()
        if self._botocore is not None:
            self._botocore.uninstrument()
        self._sender.close()
        self._waited_for(self._processor.shutdown)

    def _waited_for(self, work: Callable[[], Any]) -> None:
        # The SDK's own time limits of a flush are not implemented (opentelemetry-python issue 4568).
        thread = threading.Thread(target=work, name="trace-flush", daemon=True)
        thread.start()
        until = time.monotonic() + (FLUSH_DEAD_SECONDS if self._sender.is_dead else FLUSH_SECONDS)
        while thread.is_alive() and not self._sender.is_silent and time.monotonic() < until:
            thread.join(FLUSH_LOOK_SECONDS)


def _botocore(provider: TracerProvider) -> "BotocoreInstrumentor | None":
    """Make spans of what is asked of AWS, in a process that can ask: botocore takes 0.07 s to import."""
    if "botocore" not in sys.modules:
        return None
    from opentelemetry.instrumentation.botocore import BotocoreInstrumentor

    made = BotocoreInstrumentor()  # type: ignore[no-untyped-call]  # typed in parts
    # No propagator: what is asked of AWS stays as it is.
    made.instrument(tracer_provider=provider, propagator=CompositePropagator([]))
    return made


class _HashedOnce(Resource):
    """A resource for the exporter, which asks each span for the hash of its own: of JSON, a tenth of tracing's CPU."""

    def __init__(self, resource: Resource) -> None:
        super().__init__(resource.attributes, resource.schema_url)
        self._hash = super().__hash__()

    def __hash__(self) -> int:
        return self._hash


class _Ids(RandomIdGenerator):
    """Random ids, but those chosen for the spans of a run and its steps."""

    def generate_trace_id(self) -> int:
        chosen = _chosen.get()
        return chosen[0] if chosen else super().generate_trace_id()

    def generate_span_id(self) -> int:
        chosen = _chosen.get()
        if chosen is None:
            return super().generate_span_id()
        _chosen.set(None)
        return chosen[1]


class _Session(requests.Session):
    """Tells at once when nobody listens; the exporter itself tries again for as long as it may."""

    def __init__(self, unreachable: Callable[[], None]) -> None:
        super().__init__()
        self._unreachable = unreachable

    def request(self, *arguments: Any, **named: Any) -> requests.Response:  # noqa: ANN401  # as requests has it
        """See `requests.Session.request`."""
        try:
            return super().request(*arguments, **named)
        except requests.RequestException:
            self._unreachable()
            raise


class _Sender(SpanExporter):
    """The OTLP exporter with an allowlist before it, and silence after a failure."""

    def __init__(self) -> None:
        limited = any(os.environ.get(name) for name in (OTEL_EXPORTER_OTLP_TIMEOUT, OTEL_EXPORTER_OTLP_TRACES_TIMEOUT))
        self._exporter = OTLPSpanExporter(
            timeout=None if limited else EXPORT_SECONDS, session=_Session(self._unreachable)
        )  # fmt: skip
        self._silent_until = 0.0
        self.is_dead = False
        """The collector did not take what it was given last."""

    @property
    def is_silent(self) -> bool:
        """Nothing is tried for now."""
        return time.monotonic() < self._silent_until

    def ask_again(self) -> None:
        """End the silence."""
        self._silent_until = 0.0

    def _unreachable(self) -> None:
        self.is_dead = True
        self._silent_until = time.monotonic() + SILENCE_SECONDS

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """See `SpanExporter.export`."""
        if self.is_silent:
            return SpanExportResult.FAILURE
        told = [_told(span) for span in spans if _is_of_a_run(span)]
        result = self._exporter.export(told) if told else SpanExportResult.SUCCESS
        if result is SpanExportResult.SUCCESS:
            self.is_dead = False
        else:
            self._unreachable()
        return result

    def close(self) -> None:
        """Give up whatever is being tried."""
        self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def shutdown(self) -> None:
        """See `SpanExporter.shutdown`; `close` has done it."""

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """See `SpanExporter.force_flush`: nothing is kept here."""
        del timeout_millis
        return True


def _is_of_a_run(span: ReadableSpan) -> bool:
    """Whether it has its place: a call to AWS outside of any run would be a trace of its own."""
    return span.parent is not None or "dagster.run_id" in (span.attributes or {})


def _told(span: ReadableSpan) -> ReadableSpan:
    """The same without what must not leave: unknown attributes, texts of errors, events, which hold texts as well."""
    attributes = span.attributes or {}
    if not span.events and not span.status.description and all(map(_may_be_told, attributes)):
        return span
    kept = {name: value for name, value in attributes.items() if _may_be_told(name)}
    is_error = span.status.status_code is StatusCode.ERROR and not _is_an_answer(kept)
    for event in span.events:
        if is_error and event.name == "exception" and "error.type" not in kept and event.attributes:
            kept["error.type"] = event.attributes.get("exception.type", "unknown")
    return ReadableSpan(
        name=span.name,
        context=span.context,
        parent=span.parent,
        resource=span.resource,
        attributes=kept,
        kind=span.kind,
        status=Status(StatusCode.ERROR) if is_error else Status(),
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )


def _is_an_answer(attributes: Mapping[str, object]) -> bool:
    """Whether AWS only said that something is not there, or there already; whoever needed it has the error."""
    return attributes.get("rpc.system") == "aws-api" and attributes.get("http.status_code") in ANSWERS


def _may_be_told(name: str) -> bool:
    return name in TOLD or name.startswith("count.")
