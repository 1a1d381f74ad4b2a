"""Anthropic: month to date of cost and tokens."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from devstack.metrics_apis import DAY, Fault, MetricsApis, cost, run, usage
from scaling.samples import Status
from scaling.sources.anthropic import AnthropicCost, AnthropicUsage
from tests.scaling.measuring import NOW, one, renewed

FIRST = datetime(2026, 11, 1, tzinfo=UTC)
TODAY = datetime(2026, 11, 18, tzinfo=UTC)
HOUR = timedelta(hours=1)


@pytest.fixture(scope="module")
def server() -> Iterator[MetricsApis]:
    with run() as served:
        yield served


@pytest.fixture
def apis(server: MetricsApis) -> MetricsApis:
    return renewed(server)


def test_cents_become_dollars_and_only_this_month_counts(apis: MetricsApis) -> None:
    apis.figures.costs = {
        FIRST - DAY: [cost("99999")],
        FIRST: [cost("123.45"), cost("0.1")],
        FIRST + DAY: [],
        TODAY: [cost("1000.2")],
    }
    sample = one(AnthropicCost(), apis)
    # 123.45 + 0.1 + 1000.2 cents
    assert (sample.value, sample.period) == (11.2375, "2026-11")
    assert sample.evidence["cents"] == "1123.75"
    assert sample.evidence["data_complete_until"] == NOW.isoformat()
    assert "Priority Tier" in sample.evidence["caveat"]


def test_every_page_counts(apis: MetricsApis) -> None:
    apis.figures.costs = {FIRST + n * DAY: [cost("100")] for n in range(18)}
    apis.figures.most_buckets = 7
    sample = one(AnthropicCost(), apis)
    assert (sample.value, sample.evidence["buckets"], len(sample.evidence["sha256"])) == (18.0, 18, 3)
    pages = [dict(query).get("page") for _, _, query in apis.requests]
    assert pages[0] is None
    assert len(set(pages)) == 3
    apis.figures.usage_days = {FIRST + n * DAY: [usage("m", 10)] for n in range(17)}
    apis.figures.usage_hours = {TODAY + n * HOUR: [usage("m", 1)] for n in range(13)}
    assert one(AnthropicUsage(), apis).value == 183.0


def _page(apis: MetricsApis, days: range, following: str | None) -> bytes:
    data = [
        {
            "starting_at": (FIRST + n * DAY).isoformat(),
            "ending_at": (FIRST + (n + 1) * DAY).isoformat(),
            "results": apis.figures.costs[FIRST + n * DAY],
        }
        for n in days
    ]
    return json.dumps({"data": data, "has_more": following is not None, "next_page": following}).encode()


@pytest.mark.parametrize("following", ["page_2", None, ""])
def test_pages_that_lead_nowhere_or_in_a_circle_are_an_error(following: str | None, apis: MetricsApis) -> None:
    body = json.dumps({"data": [], "has_more": True, "next_page": following}).encode()
    apis.faults.append(Fault(body=body))
    assert "next_page" in one(AnthropicCost(), apis).evidence["error"]
    assert len(apis.requests) <= 2


def test_a_page_that_comes_twice_is_not_counted_twice(apis: MetricsApis) -> None:
    apis.figures.costs = {FIRST: [cost("100")], FIRST + DAY: [cost("100")]}
    apis.faults.append(Fault(body=_page(apis, range(2), "page_2"), times=1))
    apis.faults.append(Fault(body=_page(apis, range(2), None), times=1))
    assert "twice" in one(AnthropicCost(), apis).evidence["error"]


def test_a_second_page_that_fails_leaves_no_figure_of_the_first(apis: MetricsApis) -> None:
    apis.figures.costs = {FIRST + n * DAY: [cost("100")] for n in range(18)}
    apis.faults.append(Fault(body=_page(apis, range(7), "page_2"), times=1))
    apis.faults.append(Fault(status=403))
    assert one(AnthropicCost(), apis).status is Status.ERROR


def test_days_without_costs_are_a_zero_and_no_days_are_empty(apis: MetricsApis) -> None:
    assert one(AnthropicCost(), apis).status is Status.EMPTY
    apis.figures.costs = {FIRST + n * DAY: [] for n in range(18)}
    assert one(AnthropicCost(), apis).value == 0.0


def test_a_report_that_ended_long_ago_is_stale(apis: MetricsApis) -> None:
    apis.figures.costs = {FIRST + n * DAY: [cost("100")] for n in range(15)}
    sample = one(AnthropicCost(), apis)
    assert (sample.status, sample.period) == (Status.STALE, "2026-11")


def test_the_month_is_that_of_utc(apis: MetricsApis) -> None:
    apis.figures.costs = {datetime(2026, 10, 31, tzinfo=UTC): [cost("700")], FIRST: [cost("100")]}
    tokyo = datetime.fromisoformat("2026-11-01T08:00:00+09:00")
    assert (one(AnthropicCost(), apis, tokyo).value, one(AnthropicCost(), apis, tokyo).period) == (7.0, "2026-10")


@pytest.mark.parametrize("amount", [123.45, 12345, None, "", "1,234", "NaN", "Infinity", "1e3", "12.3.4", "٣"])
def test_an_amount_that_is_no_decimal_string_is_an_error(amount: object, apis: MetricsApis) -> None:
    apis.figures.costs = {TODAY: [{**cost("1"), "amount": amount}]}
    assert one(AnthropicCost(), apis).status is Status.ERROR


def test_another_currency_is_an_error(apis: MetricsApis) -> None:
    apis.figures.costs = {TODAY: [{**cost("1"), "currency": "EUR"}]}
    assert one(AnthropicCost(), apis).status is Status.ERROR


def test_less_than_nothing_is_an_error(apis: MetricsApis) -> None:
    apis.figures.costs = {TODAY: [cost("-5")]}
    assert one(AnthropicCost(), apis).status is Status.ERROR


def test_a_bucket_of_another_month_is_an_error(apis: MetricsApis) -> None:
    apis.figures.costs = {FIRST: [cost("1")]}
    body = json.loads(_page(apis, range(1), None))
    body["data"][0]["starting_at"] = "2026-10-31T00:00:00Z"
    apis.faults.append(Fault(body=json.dumps(body).encode()))
    assert one(AnthropicCost(), apis).status is Status.ERROR


def test_every_kind_of_token_counts_and_the_cache_is_nested(apis: MetricsApis) -> None:
    apis.figures.usage_days = {
        FIRST: [usage("claude-haiku-4-5", 1500, read=200, write_5m=500, write_1h=1000, out=500)],
        FIRST + DAY: [],
    }
    apis.figures.usage_hours = {
        TODAY: [usage("claude-haiku-4-5", 10), usage("claude-sonnet-5", 20, out=5)],
        TODAY + 13 * HOUR: [usage(None, 1)],
    }
    sample = one(AnthropicUsage(), apis)
    # 3,700 on the first, 36 today
    assert (sample.value, sample.period) == (3736.0, "2026-11")
    assert sample.evidence["by_model"] == {"claude-haiku-4-5": 3710, "claude-sonnet-5": 25, "unknown": 1}
    assert sample.evidence["by_kind"]["ephemeral_1h_input_tokens"] == 1000
    assert one(AnthropicUsage(("output_tokens",)), apis).value == 505.0
    assert one(AnthropicUsage(("ephemeral_5m_input_tokens", "ephemeral_1h_input_tokens")), apis).value == 1500.0
    widths = [dict(query)["bucket_width"] for _, _, query in apis.requests[:2]]
    assert sorted(widths) == ["1d", "1h"]


def test_on_the_first_only_hours_are_asked_for(apis: MetricsApis) -> None:
    apis.figures.usage_hours = {FIRST: [usage("m", 5)]}
    assert one(AnthropicUsage(), apis, FIRST + 2 * HOUR).value == 5.0
    assert [dict(query)["bucket_width"] for _, _, query in apis.requests] == ["1h"]


def test_no_buckets_are_empty_and_no_tokens_are_a_zero(apis: MetricsApis) -> None:
    assert one(AnthropicUsage(), apis).status is Status.EMPTY
    apis.figures.usage_hours = {TODAY: []}
    assert one(AnthropicUsage(), apis).value == 0.0


@pytest.mark.parametrize("missing", ["cache_creation", "output_tokens", "cache_read_input_tokens", "model"])
def test_a_missing_kind_of_token_is_an_error(missing: str, apis: MetricsApis) -> None:
    spoiled = usage("m", 5)
    del spoiled[missing]
    apis.figures.usage_hours = {TODAY: [spoiled]}
    assert any(missing in problem for problem in one(AnthropicUsage(), apis).evidence["problems"])


def test_a_flat_count_of_cache_writes_is_not_taken_for_the_nested_one(apis: MetricsApis) -> None:
    apis.figures.usage_hours = {TODAY: [{**usage("m", 5), "cache_creation": 7, "cache_creation_input_tokens": 7}]}
    assert one(AnthropicUsage(), apis).status is Status.ERROR
