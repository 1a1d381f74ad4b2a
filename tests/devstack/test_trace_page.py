"""A trace as a page of the local collector: every span in its place, whatever its name is."""

from collections.abc import Iterator, Mapping

import httpx
import pytest
from justhtml import JustHTML

from devstack import trace_page
from devstack.otlp import Collector, ReceivedSpan, Value
from devstack.trace_page import Node
from scaling import tracing

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)> {{ 7 * 7 }}"


def span(
    name: str,
    began: float,
    seconds: float,
    *,
    parent: str = "",
    is_error: bool = False,
    attributes: Mapping[str, Value] | None = None,
) -> ReceivedSpan:
    return ReceivedSpan(name, "t", name, parent, attributes or {}, is_error, "", (), seconds, "sync_pipeline", began)


def lines(nodes: list[Node] | tuple[Node, ...]) -> Iterator[str]:
    for node in nodes:
        yield f"{'  ' * node.depth}{node.span.name}"
        yield from lines(node.children)


def test_spans_hang_beneath_their_parents_in_the_order_they_began() -> None:
    spans = [
        span("late", 8, 1, parent="step"),
        span("early", 2, 1, parent="step"),
        span("step", 1, 9, parent="run"),
        span("run", 0, 10),
    ]
    assert list(lines(trace_page.trees(spans))) == ["run", "  step", "    early", "    late"]


def test_bars_are_shares_of_the_whole_trace_and_never_too_narrow_to_be_seen() -> None:
    (run,) = trace_page.trees(
        [span("run", 100, 10), span("call", 105, 2.5, parent="run"), span("x", 109, 0, parent="run")]
    )
    assert (run.left, run.width) == (0, 100)
    assert [(each.left, each.width) for each in run.children] == [(50, 25), (90, trace_page.NARROWEST)]


def test_a_span_whose_parent_never_came_is_shown_as_a_root() -> None:
    found = trace_page.trees([span("run", 0, 10), span("orphan", 3, 1, parent="killed")])
    assert list(lines(found)) == ["run", "orphan"]


def test_the_way_to_an_error_is_open_and_other_depths_are_not() -> None:
    chain = [span("0", 0, 10), *(span(str(n), 0, 10, parent=str(n - 1)) for n in range(1, 5))]
    (run,) = trace_page.trees([*chain, span("well", 1, 1, parent="2"), span("bad", 2, 1, parent="4", is_error=True)])
    node, opened = run, []
    while node.children:
        opened.append(node.is_open)
        node = node.children[0]
    assert opened == [True] * 5
    (calm,) = trace_page.trees(chain)
    assert [calm.is_open, calm.children[0].is_open, calm.children[0].children[0].is_open] == [True, True, False]


def test_names_that_are_markup_are_shown_as_what_they_are() -> None:
    page = trace_page.trace("t", [span(HOSTILE, 0, 1, attributes={"outcome": HOSTILE, "tenant.id": HOSTILE})])
    parsed = JustHTML(page, strict=True, sanitize=False)
    assert not parsed.query("script, img")
    assert HOSTILE in parsed.to_text()


@pytest.mark.parametrize("address", ["/trace/0123", "/trace/", "/"])
def test_what_never_came_is_a_sentence(traces: Collector, address: str) -> None:
    answer = httpx.get(f"{traces.endpoint}{address}")
    assert answer.status_code == 200
    assert "No such trace" in answer.text or "0 spans of 0 runs" in answer.text


def test_a_run_is_listed_and_its_link_leads_to_its_spans(traces: Collector) -> None:
    assert tracing.start("sync_pipeline")
    with tracing.run("run-1", "run calendar_sync"), tracing.span("sync_ticks"):
        pass
    tracing.stop()
    listed = JustHTML(httpx.get(traces.endpoint).text, sanitize=False)
    [link] = [str((each.attrs or {})["href"]) for each in listed.query("td a")]
    assert link == f"/trace/{tracing.trace_id_of('run-1')}"
    shown = JustHTML(httpx.get(f"{traces.endpoint}{link}").text, strict=True, sanitize=False).to_text()
    assert "run calendar_sync" in shown
    assert "sync_ticks" in shown
