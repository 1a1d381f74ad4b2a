"""Prometheus: the query of a server, and the scrape of a target."""

import math
from collections.abc import Iterator
from datetime import timedelta

import pytest

from devstack.metrics_apis import Fault, Figures, MetricsApis, run
from scaling.samples import Status
from scaling.sources.prometheus import PrometheusQuery, PrometheusScrape
from tests.scaling.measuring import NOW, ask, one, renewed

SECONDS = NOW.timestamp()

EXPOSITION = """\
# HELP pg_stat_database_num_backends Backends
# TYPE pg_stat_database_num_backends gauge
pg_stat_database_num_backends{datname="postgres",supabase_identifier="a"} 14
pg_stat_database_num_backends{datname="other"} 3
# TYPE supavisor_connections_active gauge
supavisor_connections_active{mode="transaction"} 31
supavisor_connections_active{mode="session"} 0.5
# TYPE http_requests_total counter
http_requests_total{code="200"} 1027
# TYPE waiting gauge
waiting 0
# TYPE broken gauge
broken{a="2"} 4
broken{a="1"} NaN
broken{a="3"} 5
"""


@pytest.fixture(scope="module")
def server() -> Iterator[MetricsApis]:
    with run() as served:
        yield served


@pytest.fixture
def apis(server: MetricsApis) -> MetricsApis:
    return renewed(server, Figures(exposition=EXPOSITION))


def vector(*series: tuple[dict[str, str], str], at: float = SECONDS) -> dict[str, object]:
    return {"resultType": "vector", "result": [{"metric": labels, "value": [at, text]} for labels, text in series]}


def test_one_series_is_the_figure_and_the_moment_is_asked_for(apis: MetricsApis) -> None:
    apis.figures.queries["sum(up)"] = vector(({}, "42.5"))
    sample = one(PrometheusQuery("sum(up)"), apis)
    assert (sample.status, sample.value) == (Status.OK, 42.5)
    assert sample.evidence["data_complete_until"] == "2026-11-18T13:07:30+00:00"
    assert apis.requests == [("GET", "/api/v1/query", [("query", "sum(up)"), ("time", f"{SECONDS:.3f}")])]


def test_a_scalar_is_a_figure_too(apis: MetricsApis) -> None:
    apis.figures.queries["scalar(up)"] = {"resultType": "scalar", "result": [SECONDS, "7"]}
    assert one(PrometheusQuery("scalar(up)"), apis).value == 7.0


def test_no_series_is_empty_and_a_zero_stays_a_zero(apis: MetricsApis) -> None:
    apis.figures.queries["zero"] = vector(({}, "0"))
    assert one(PrometheusQuery("absent_metric"), apis).status is Status.EMPTY
    assert one(PrometheusQuery("zero"), apis).value == 0.0


@pytest.mark.parametrize("text", ["NaN", "+Inf", "-Inf", "-1", "nothing"])
def test_what_is_no_figure_is_an_error(text: str, apis: MetricsApis) -> None:
    apis.figures.queries["x"] = vector(({}, text))
    assert one(PrometheusQuery("x"), apis).status is Status.ERROR


def test_labels_tell_series_apart(apis: MetricsApis) -> None:
    apis.figures.queries["x"] = vector(({"mode": "transaction", "i": "1"}, "5"), ({"mode": "session"}, "NaN"))
    session, transaction = ask(PrometheusQuery("x", labels=("mode",)), apis)
    assert (session.dims, session.status) == ("mode=session", Status.ERROR)
    assert (transaction.dims, transaction.value) == ("mode=transaction", 5.0)


def test_series_that_nothing_tells_apart_are_an_error(apis: MetricsApis) -> None:
    apis.figures.queries["x"] = vector(({"i": "1"}, "5"), ({"i": "2"}, "6"))
    sample = one(PrometheusQuery("x"), apis)
    assert sample.evidence["error"] == "the query yields 2 series, and nothing tells them apart"


def test_a_query_that_is_none_is_an_error(apis: MetricsApis) -> None:
    assert one(PrometheusQuery("sum(up"), apis).status is Status.ERROR
    apis.faults.append(Fault(body=b'{"status":"error","errorType":"execution","error":"too many samples"}'))
    assert one(PrometheusQuery("up"), apis).evidence["error"] == "Prometheus cannot answer the query (execution)"


def test_a_warning_makes_the_answer_partial(apis: MetricsApis) -> None:
    apis.figures.queries["x"] = vector(({}, "5"))
    apis.figures.warnings.append("some stores did not answer")
    assert one(PrometheusQuery("x"), apis).status is Status.PARTIAL


def test_an_old_figure_is_stale(apis: MetricsApis) -> None:
    apis.figures.queries["x"] = vector(({}, "5"), at=SECONDS - 601)
    assert one(PrometheusQuery("x"), apis).status is Status.STALE
    assert one(PrometheusQuery("x", max_age=timedelta(minutes=11)), apis).value == 5.0


def test_a_wrong_password_is_refused(apis: MetricsApis) -> None:
    sample = one(PrometheusQuery("x"), apis, scaling_prometheus_password="wrong")
    assert "SCALING_PROMETHEUS_PASSWORD" in sample.evidence["error"]


@pytest.mark.parametrize(
    ("source", "value"),
    [
        (PrometheusScrape("pg_stat_database_num_backends"), 17.0),
        (PrometheusScrape("pg_stat_database_num_backends", aggregate="max"), 14.0),
        (PrometheusScrape("pg_stat_database_num_backends", aggregate="min"), 3.0),
        (PrometheusScrape("pg_stat_database_num_backends", match=(("datname", "other"),)), 3.0),
        (PrometheusScrape("supavisor_connections_active"), 31.5),
        (PrometheusScrape("http_requests_total"), 1027.0),
        (PrometheusScrape("waiting"), 0.0),
        (PrometheusScrape("broken", match=(("a", "2"),)), 4.0),
    ],
    ids=lambda value: value.describe() if isinstance(value, PrometheusScrape) else str(value),
)
def test_a_scrape_selects_by_name_and_labels_and_aggregates(
    source: PrometheusScrape, value: float, apis: MetricsApis
) -> None:
    sample = one(source, apis)
    assert sample.value is not None
    assert math.isclose(sample.value, value)


@pytest.mark.parametrize("aggregate", ["sum", "max", "min"])
def test_a_figure_that_is_none_spoils_every_aggregate(aggregate: str, apis: MetricsApis) -> None:
    source = PrometheusScrape("broken", aggregate=aggregate)  # type: ignore[arg-type]
    assert one(source, apis).status is Status.ERROR


def test_a_series_that_the_target_does_not_have_is_empty(apis: MetricsApis) -> None:
    assert one(PrometheusScrape("http_requests"), apis).status is Status.EMPTY
    assert one(PrometheusScrape("waiting", match=(("mode", "x"),)), apis).status is Status.EMPTY


@pytest.mark.parametrize("body", [b"", b"# nothing\n", b"up 1", b"<html>\n</html>\n", b"up one\n", b'up{a="1} 2\n'])
def test_text_that_is_no_exposition_is_an_error(body: bytes, apis: MetricsApis) -> None:
    apis.faults.append(Fault(body=body, content_type="text/plain"))
    sample = one(PrometheusScrape("up"), apis)
    assert sample.status is Status.ERROR
    assert "not as documented" in sample.evidence["error"]


def test_a_sample_that_carries_an_old_moment_is_stale(apis: MetricsApis) -> None:
    apis.figures.exposition = f"# TYPE up gauge\nup 1 {int((SECONDS - 3600) * 1000)}\n"
    sample = one(PrometheusScrape("up"), apis)
    assert sample.status is Status.STALE
    assert sample.evidence["data_complete_until"] == "2026-11-18T12:07:30+00:00"


def test_a_target_of_its_own_address_needs_no_credentials(apis: MetricsApis) -> None:
    apis.faults.append(Fault(body=b"# TYPE up gauge\nup 1\n", content_type="text/plain"))
    source = PrometheusScrape("up", url=f"{apis.url}/metrics")
    assert one(source, None).value == 1.0
