"""Vercel: a query of its metrics, and the cost of bandwidth against its own past."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from devstack.metrics_apis import DAY, Fault, MetricsApis, charge, run
from scaling.samples import Status
from scaling.sources.vercel import VercelBilling, VercelMetrics
from tests.scaling.measuring import ask, one, renewed

TODAY = datetime(2026, 11, 18, tzinfo=UTC)
FIVE = timedelta(minutes=5)
END = datetime(2026, 11, 18, 13, 5, tzinfo=UTC)
"""Of the last whole bucket before 13:07:30."""
COUNT = VercelMetrics("vercel.function_invocation.count", "sum", "sum", window=timedelta(minutes=20))
GAUGE = VercelMetrics("vercel.function_duration_ms", "p95", "max", window=timedelta(minutes=20))


@pytest.fixture(scope="module")
def server() -> Iterator[MetricsApis]:
    with run() as served:
        yield served


@pytest.fixture
def apis(server: MetricsApis) -> MetricsApis:
    return renewed(server)


def point(nth: int, value: object, **dimensions: str | None) -> dict[str, object]:
    """The nth bucket before the end, from 1."""
    at = (END - nth * FIVE).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"timestamp": at, "dimensions": dimensions, "values": {"value": value}}


def test_the_query_has_the_documented_body(apis: MetricsApis) -> None:
    apis.figures.vercel = [point(n, 1) for n in (1, 2, 3, 4)]
    source = VercelMetrics(
        COUNT.name, "sum", "sum", window=timedelta(minutes=20), group_by=("route",), where="httpStatus ge 500"
    )
    one(source, apis, vercel_project_id="prj_1")
    assert apis.bodies == [
        {
            "scope": {"ownerId": "team_acme", "projectIds": ["prj_1"]},
            "timeRange": {"start": "2026-11-18T12:45:00.000Z", "end": "2026-11-18T13:05:00.000Z"},
            "bucketSeconds": 300,
            "metrics": {"value": {"metric": "vercel.function_invocation.count", "aggregation": "sum"}},
            "outputs": ["value"],
            "groupBy": ["route"],
            "filter": "httpStatus ge 500",
        }
    ]


def test_the_sum_of_the_buckets_is_the_figure(apis: MetricsApis) -> None:
    apis.figures.vercel = [point(1, 10), point(2, 20.5), point(3, 0), point(4, 5), point(5, 1000)]
    sample = one(COUNT, apis)
    assert sample.value == 35.5
    assert sample.evidence["data_complete_until"] == "2026-11-18T13:05:00+00:00"


def test_zeros_stay_zeros(apis: MetricsApis) -> None:
    apis.figures.vercel = [point(n, 0) for n in (1, 2, 3, 4)]
    assert one(COUNT, apis).value == 0.0


def test_a_null_bucket_is_missing_and_a_sum_without_it_is_partial(apis: MetricsApis) -> None:
    apis.figures.vercel = [point(1, 10), point(2, None), point(3, 10), point(4, 10)]
    sample = one(COUNT, apis)
    assert (sample.status, sample.evidence["note"]) == (Status.PARTIAL, "3 of 4 buckets have values")


def test_a_counter_of_events_may_say_that_null_is_zero(apis: MetricsApis) -> None:
    counter = VercelMetrics(COUNT.name, "sum", "sum", window=timedelta(minutes=20), empty_is="zero")
    apis.figures.vercel = [point(1, None), point(2, 7), point(3, None), point(4, None)]
    assert one(counter, apis).value == 7.0
    apis.figures.vercel = [point(n, None) for n in (1, 2, 3, 4)]
    assert one(counter, apis).value == 0.0
    apis.figures.vercel = []
    assert one(counter, apis).status is Status.EMPTY


def test_a_maximum_and_a_mean_are_of_the_buckets_that_have_values(apis: MetricsApis) -> None:
    apis.figures.vercel = [point(1, 120), point(2, None), point(3, 300), point(4, None)]
    assert one(GAUGE, apis).value == 300.0
    mean = VercelMetrics(GAUGE.name, "p95", "mean", window=timedelta(minutes=20))
    assert one(mean, apis).value == 210.0
    apis.figures.vercel = [point(1, 120)]
    assert one(GAUGE, apis).status is Status.PARTIAL


def test_nothing_but_nulls_or_no_series_is_empty(apis: MetricsApis) -> None:
    assert one(GAUGE, apis).status is Status.EMPTY
    apis.figures.vercel = [point(1, None), point(2, None)]
    assert one(GAUGE, apis).status is Status.EMPTY


def test_a_newest_value_that_is_old_is_stale(apis: MetricsApis) -> None:
    hour = VercelMetrics(GAUGE.name, "p95", "max", window=timedelta(hours=2))
    apis.figures.vercel = [point(n, 5) for n in range(7, 25)]
    sample = one(hour, apis)
    assert sample.status is Status.STALE
    assert sample.evidence["data_complete_until"] == "2026-11-18T12:35:00+00:00"


def test_dimensions_tell_samples_apart(apis: MetricsApis) -> None:
    source = VercelMetrics(GAUGE.name, "p95", "max", window=timedelta(minutes=10), group_by=("route",))
    apis.figures.vercel = [
        point(1, 5, route="/b"),
        point(1, 9, route="/a"),
        point(2, 8, route="/a"),
        point(2, None, route="/c"),
    ]
    assert [(each.dims, each.value, each.status.value) for each in ask(source, apis)] == [
        ("route=/a", 9.0, "ok"),
        ("route=/b", 5.0, "ok"),
        ("route=/c", None, "empty"),
    ]


@pytest.mark.parametrize(
    "series",
    [
        [point(1, "5")],
        [point(1, True)],
        [{"timestamp": "2026-11-18T13:00:00Z", "dimensions": {}, "values": {}}],
        [{"timestamp": "2026-11-18T13:00:00Z", "values": {"value": 1}}],
        [point(1, 5), point(1, 6)],
        None,
    ],
)
def test_another_shape_is_an_error(series: object, apis: MetricsApis) -> None:
    apis.faults.append(Fault(body=json.dumps({"series": series, "summary": [], "meta": {}}).encode()))
    assert one(GAUGE, apis).status is Status.ERROR


def test_a_dimension_that_was_asked_for_and_does_not_come_is_an_error(apis: MetricsApis) -> None:
    apis.figures.vercel = [point(1, 5)]
    assert one(VercelMetrics(GAUGE.name, "p95", "max", group_by=("route",)), apis).status is Status.ERROR


# -- the bill


def days(costs: dict[range, float], service: str = "Fast Data Transfer") -> list[dict[str, object]]:
    """Charges of the nth days before today."""
    return [charge(TODAY - n * DAY, cost, service) for span, cost in costs.items() for n in span]


def test_seven_days_are_compared_with_the_median_of_the_four_weeks_before(apis: MetricsApis) -> None:
    weeks = {range(1, 8): 6.0, range(8, 15): 3.0, range(15, 22): 4.0, range(22, 29): 2.0, range(29, 39): 100.0}
    apis.figures.charges = days(weeks)
    sample = one(VercelBilling(), apis)
    # 42 now; 21, 28, 14 and 700 before: the median is 24.5
    assert sample.value == pytest.approx(42 / 24.5)
    assert sample.evidence["recent_usd"] == 42.0
    assert sample.evidence["weeks_before_usd"] == [21.0, 28.0, 14.0, 700.0]
    assert sample.evidence["median_usd"] == 24.5
    assert sample.evidence["recent_by_service_usd"] == {"Fast Data Transfer": 42.0}
    assert sample.evidence["data_complete_until"] == "2026-11-18T00:00:00+00:00"
    assert dict(apis.requests[0][2])["teamId"] == "team_acme"


def test_a_median_below_the_floor_counts_as_the_floor(apis: MetricsApis) -> None:
    apis.figures.charges = days({range(1, 8): 1.0, range(8, 39): 0.01})
    assert one(VercelBilling(), apis).value == pytest.approx(0.7)
    assert one(VercelBilling(floor_usd=1.0), apis).value == pytest.approx(7.0)


def test_only_usage_of_services_that_carry_bytes_counts(apis: MetricsApis) -> None:
    apis.figures.charges = [
        *days({range(1, 39): 2.0}),
        *days({range(1, 39): 1.0}, "Fast Origin Transfer"),
        *days({range(1, 8): 500.0}, "Function Duration"),
        charge(TODAY - DAY, -20.0, category="Credit"),
    ]
    sample = one(VercelBilling(), apis)
    assert sample.value == pytest.approx(1.0)
    assert sample.evidence["recent_by_service_usd"] == {"Fast Data Transfer": 14.0, "Fast Origin Transfer": 7.0}


def test_a_week_without_bandwidth_is_a_zero(apis: MetricsApis) -> None:
    apis.figures.charges = [*days({range(8, 39): 5.0}), *days({range(1, 39): 5.0}, "Function Duration")]
    assert one(VercelBilling(), apis).value == 0.0


def test_a_bill_in_which_nothing_is_called_bandwidth_is_empty_and_names_what_there_is(apis: MetricsApis) -> None:
    apis.figures.charges = days({range(1, 39): 5.0}, "Egress")
    sample = one(VercelBilling(), apis)
    assert (sample.status, sample.evidence["services"]) == (Status.EMPTY, ["Egress"])


def test_the_weeks_end_where_the_bill_ends(apis: MetricsApis) -> None:
    apis.figures.charges = days({range(3, 10): 30.0, range(10, 39): 10.0})
    sample = one(VercelBilling(), apis)
    assert sample.value == pytest.approx(3.0)
    assert sample.evidence["data_complete_until"] == "2026-11-16T00:00:00+00:00"


def test_a_bill_that_ended_long_ago_is_stale(apis: MetricsApis) -> None:
    apis.figures.charges = days({range(5, 39): 5.0})
    assert one(VercelBilling(), apis).status is Status.STALE


def test_a_young_team_is_partial_and_no_charges_are_empty(apis: MetricsApis) -> None:
    assert one(VercelBilling(), apis).status is Status.EMPTY
    apis.figures.charges = days({range(1, 20): 5.0})
    assert one(VercelBilling(), apis).status is Status.PARTIAL


@pytest.mark.parametrize(
    "spoil",
    [
        {"BilledCost": "5"},
        {"BilledCost": None},
        {"BilledCost": float("nan")},
        {"BillingCurrency": "EUR"},
        {"ServiceName": None},
        {"ChargePeriodStart": "2026-11-17"},
        {"ChargePeriodEnd": "2026-11-01T00:00:00Z"},
    ],
    ids=str,
)
def test_a_row_of_another_shape_spoils_the_bill(spoil: dict[str, object], apis: MetricsApis) -> None:
    rows = [*days({range(1, 39): 5.0}), {**charge(TODAY - DAY, 5.0), **spoil}]
    apis.faults.append(Fault(body="\n".join(json.dumps(row) for row in rows).encode()))
    assert one(VercelBilling(), apis).status is Status.ERROR


def test_a_line_that_breaks_off_is_an_error_that_names_it(apis: MetricsApis) -> None:
    whole = "\n".join(json.dumps(row) for row in days({range(1, 39): 5.0}))
    apis.faults.append(Fault(body=whole[:-9].encode(), content_type="application/jsonl"))
    assert "line 38" in one(VercelBilling(), apis).evidence["error"]


def test_more_credit_than_cost_is_an_error(apis: MetricsApis) -> None:
    apis.figures.charges = days({range(1, 8): -5.0, range(8, 39): 5.0})
    assert one(VercelBilling(), apis).status is Status.ERROR
