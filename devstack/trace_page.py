"""A trace as a page: what a run was busy with, span beneath span, on one axis of time.

Belongs here: which span hangs where, how long its bar is, the two pages. Does not: receiving spans (`devstack.otlp`).
It stands in for the trace UI of an installation (Jaeger, Tempo), which TRACE_UI_URL names; no script is in it.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined

if TYPE_CHECKING:
    from devstack.otlp import ReceivedSpan

OPEN_DEPTH = 2
"""Run, step and what hangs beneath it are open; deeper, only the way to an error."""
NARROWEST = 0.15
"""Percent; a bar that is narrower is not seen."""
KINDS = (("db.system.name", "sql"), ("http.request.method", "http"), ("rpc.system", "aws"))
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)


@dataclass(frozen=True, slots=True)
class Node:
    """A span in its place.

    Attributes:
        span: which.
        kind: sql, http, aws or work.
        left: where its bar begins, percent of the trace.
        width: of its bar, percent of the trace.
        children: beneath it, by their begin.
        failed: it is an error, or one beneath it is.
        depth: below the root.
    """

    span: "ReceivedSpan"
    kind: str
    left: float
    width: float
    children: tuple["Node", ...]
    failed: bool
    depth: int

    @property
    def is_open(self) -> bool:
        """Whether its children are shown at first."""
        return self.depth < OPEN_DEPTH or self.failed


def trees(spans: Sequence["ReceivedSpan"]) -> list[Node]:
    """Hang every span of one trace where it belongs; one whose parent never came is a root.

    Args:
        spans: of the trace.
    """
    began = min(span.began for span in spans)
    whole = max(span.began + span.seconds for span in spans) - began or 1e-9
    known = {span.span_id for span in spans}
    beneath: dict[str, list[ReceivedSpan]] = defaultdict(list)
    for span in sorted(spans, key=lambda span: span.began):
        beneath[span.parent_id if span.parent_id in known else ""].append(span)

    def nodes(parent: str, depth: int) -> Iterator[Node]:
        for span in beneath[parent]:
            children = tuple(nodes(span.span_id, depth + 1))
            yield Node(
                span,
                next((kind for attribute, kind in KINDS if attribute in span.attributes), "work"),
                100 * (span.began - began) / whole,
                max(100 * span.seconds / whole, NARROWEST),
                children,
                span.is_error or any(child.failed for child in children),
                depth,
            )

    return list(nodes("", 0))


def trace(trace_id: str, spans: Sequence["ReceivedSpan"]) -> str:
    """Make the page of one trace.

    Args:
        trace_id: as the link has it.
        spans: all that came, of whichever trace.
    """
    own = [span for span in spans if span.trace_id == trace_id]
    return TEMPLATES.get_template("trace_page.html.j2").render(
        trace_id=trace_id, roots=trees(own) if own else [], count=len(own), listed=[]
    )


def index(spans: Sequence["ReceivedSpan"]) -> str:
    """Make the page that lists the traces, the newest first.

    Args:
        spans: all that came.
    """
    counts: dict[str, int] = defaultdict(int)
    steps: dict[str, list[str]] = defaultdict(list)
    for span in spans:
        counts[span.trace_id] += 1
        if step := span.attributes.get("dagster.step_key"):
            steps[span.trace_id].append(str(step))
    roots = sorted((span for span in spans if not span.parent_id), key=lambda span: -span.began)
    listed = [
        (root, ", ".join(steps[root.trace_id]), counts[root.trace_id], datetime.fromtimestamp(root.began, UTC))
        for root in roots
    ]
    return TEMPLATES.get_template("trace_page.html.j2").render(trace_id="", roots=[], count=len(spans), listed=listed)
