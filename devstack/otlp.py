"""A collector of traces on 127.0.0.1: takes spans over OTLP/HTTP and keeps them; `python -m devstack.otlp` runs one.

Belongs here: the server, its faults, the spans as a tree. Does not: who sends them, or how a trace looks
(`devstack.trace_page`). It stands in for a collector in tests and benches, where what arrived over the wire counts, not
what a run meant to send. In a browser it lists the traces, `/trace/ID` is one of them, and `/counts` says how many
spans of each kind came, by where they hang.
"""

import argparse
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue

from devstack import trace_page

TRACE = "/trace/"
Mood = Literal["well", "hangs", "refuses", "flaps"]
"""`flaps`: takes every other request."""
HANGS_SECONDS = 60.0
KEPT_BODIES = 1000
"""Of a collector that runs for long; each has up to 512 spans, 0.1 MB."""
ERROR = 2
"""STATUS_CODE_ERROR of the protocol."""

Value = str | int | float | bool | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ReceivedSpan:
    """One span as it came over the wire."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: Mapping[str, Value]
    is_error: bool
    status_message: str
    events: tuple[str, ...]
    seconds: float
    service: str
    began: float
    """Seconds since 1970."""


@dataclass(slots=True)
class Collector:
    """A running collector.

    Attributes:
        endpoint: for OTEL_EXPORTER_OTLP_ENDPOINT.
        mood: how it answers; may be changed at any time.
        requests: that came, answered or not.
        bodies: of the requests that were taken, as they came.
    """

    endpoint: str
    mood: Mood = "well"
    requests: int = 0
    bodies: deque[bytes] = field(default_factory=lambda: deque(maxlen=KEPT_BODIES), repr=False)
    released: threading.Event = field(default_factory=threading.Event, repr=False)

    def spans(self) -> list[ReceivedSpan]:
        """Everything that was taken."""
        return [span for body in list(self.bodies) for span in _spans(body)]

    def clear(self) -> None:
        """Forget what was taken."""
        self.bodies.clear()
        self.requests = 0

    def paths(self) -> list[str]:
        """Where each span hangs: its name behind those above it, `run calendar_sync > sync_ticks > workspace`.

        A span whose parent never came begins with `?`.
        """
        spans = self.spans()
        by_id = {span.span_id: span for span in spans}

        def path(span: ReceivedSpan) -> str:
            if not span.parent_id:
                return span.name
            above = by_id.get(span.parent_id)
            return f"{path(above) if above else '?'} > {span.name}"

        return [path(span) for span in spans]


@contextmanager
def collector(mood: Mood = "well", *, port: int = 0) -> Iterator[Collector]:
    """Run a collector for a block.

    Args:
        mood: how it answers at first.
        port: on 127.0.0.1; 0 picks one.
    """
    made = Collector("")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            made.requests += 1
            if made.mood == "hangs":
                made.released.wait(HANGS_SECONDS)
                return
            if made.mood == "refuses" or (made.mood == "flaps" and made.requests % 2):
                self.send_response(503)
                self.end_headers()
                return
            made.bodies.append(body)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self) -> None:
            kind, page = "text/html", ""
            if self.path == "/counts":
                counted = sorted(Counter(made.paths()).items())
                kind, page = "text/plain", "".join(f"{count:>7,}  {path}\n" for path, count in counted)
            elif self.path.startswith(TRACE):
                page = trace_page.trace(self.path.removeprefix(TRACE), made.spans())
            else:
                page = trace_page.index(made.spans())
            body = page.encode()
            self.send_response(200)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002  # its name in the base class
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    made.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    made.mood = mood
    thread = threading.Thread(target=server.serve_forever, name="collector", daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.released.set()
        server.shutdown()
        server.server_close()


def wait_for(made: Collector, spans: int, seconds: float = 10.0) -> list[ReceivedSpan]:
    """Wait until so many spans were taken, or the time is over.

    Args:
        made: the collector.
        spans: how many at least.
        seconds: at most.
    """
    until = time.monotonic() + seconds
    while len(found := made.spans()) < spans and time.monotonic() < until:
        time.sleep(0.05)
    return found


def _spans(body: bytes) -> Iterator[ReceivedSpan]:
    for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
        of_resource = {each.key: _value(each.value) for each in resource.resource.attributes}
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield ReceivedSpan(
                    name=span.name,
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    attributes={each.key: _value(each.value) for each in span.attributes},
                    is_error=span.status.code == ERROR,
                    status_message=span.status.message,
                    events=tuple(event.name for event in span.events),
                    seconds=(span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
                    service=str(of_resource.get("service.name", "")),
                    began=span.start_time_unix_nano / 1e9,
                )


def _value(value: AnyValue) -> Value:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return tuple(str(_value(each)) for each in value.array_value.values)
    found: Value = getattr(value, kind) if kind else ""
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a collector until it is interrupted.

    Args:
        arguments: without the program's name; None takes them from the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m devstack.otlp", description="Takes traces, and shows them in a browser at the printed address."
    )
    parser.add_argument("--port", type=int, default=0, help="on 127.0.0.1; by default a free one")
    with collector(port=parser.parse_args(arguments).port) as running:
        sys.stdout.write(f"{running.endpoint}\n")
        sys.stdout.flush()
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
