"""What every HTTP source does when the other side misbehaves: an error, never a figure, never a secret."""

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from devstack.metrics_apis import Fault, MetricsApis, plausible, run
from devstack.otlp import Collector
from scaling import tracing
from scaling.samples import Status
from scaling.sources import Reach, Source
from scaling.sources.anthropic import AnthropicCost, AnthropicUsage
from scaling.sources.prometheus import PrometheusQuery, PrometheusScrape
from scaling.sources.supabase import SupabaseDisk, SupabasePlan, SupabasePooler
from scaling.sources.upstash import UpstashStats
from scaling.sources.vercel import VercelBilling, VercelMetrics
from tests import clients
from tests.scaling.measuring import NOW, one, reaching, renewed

SOURCES: dict[str, tuple[Source, set[str]]] = {
    "prometheus": (PrometheusQuery("up"), {"SCALING_PROMETHEUS_URL"}),
    "scrape": (
        PrometheusScrape("pg_stat_database_num_backends"),
        {"SUPABASE_PROJECT_REF", "SUPABASE_SECRET_KEY"},
    ),
    "vercel metrics": (
        VercelMetrics("vercel.request.count", "sum", "sum"),
        {"VERCEL_TOKEN", "VERCEL_TEAM_ID"},
    ),
    "vercel billing": (VercelBilling(), {"VERCEL_TOKEN", "VERCEL_TEAM_ID"}),
    "anthropic cost": (AnthropicCost(), {"ANTHROPIC_ADMIN_KEY"}),
    "anthropic usage": (AnthropicUsage(), {"ANTHROPIC_ADMIN_KEY"}),
    "upstash": (UpstashStats(), {"UPSTASH_EMAIL", "UPSTASH_API_KEY", "UPSTASH_DATABASE_ID"}),
    "supabase plan": (SupabasePlan(), {"SUPABASE_ACCESS_TOKEN", "SUPABASE_ORGANIZATION"}),
    "supabase disk": (SupabaseDisk(), {"SUPABASE_ACCESS_TOKEN", "SUPABASE_PROJECT_REF"}),
    "supabase pooler": (SupabasePooler(), {"SUPABASE_ACCESS_TOKEN", "SUPABASE_PROJECT_REF"}),
}
each_source = pytest.mark.parametrize("source", [source for source, _ in SOURCES.values()], ids=list(SOURCES))


@pytest.fixture(scope="module")
def server() -> Iterator[MetricsApis]:
    figures = plausible(NOW)
    figures.queries["up"] = {"resultType": "vector", "result": [{"metric": {}, "value": [NOW.timestamp(), "1"]}]}
    with run(figures) as served:
        yield served


@pytest.fixture
def apis(server: MetricsApis) -> MetricsApis:
    return renewed(server, server.figures)


def error(source: Source, apis: MetricsApis, **others: Any) -> str:
    sample = one(source, apis, **others)
    assert sample.status is Status.ERROR
    assert sample.value is None
    return str(sample.evidence["error"])


@each_source
def test_plausible_figures_are_measured_by_every_source(source: Source, apis: MetricsApis) -> None:
    sample = one(source, apis)
    assert sample.status is Status.OK, sample
    assert sample.value is not None
    json.dumps(sample.evidence)
    assert source.describe()


@pytest.mark.parametrize(("source", "needs"), list(SOURCES.values()), ids=list(SOURCES))
def test_without_credentials_nothing_is_asked_and_the_missing_settings_are_named(
    source: Source, needs: set[str], apis: MetricsApis
) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise AssertionError(f"{request.url} was asked")

    with reaching(None) as reach, httpx.Client(transport=httpx.MockTransport(refuse)) as closed:
        (sample,) = source.read("a_metric", Reach(reach.router, closed, reach.settings, reach.now))
    assert sample.status is Status.NOT_CONFIGURED
    assert set(sample.evidence["missing"]) == needs
    for name in needs:
        unset: dict[str, Any] = {name.lower(): None, **_no_endpoint(name)}
        without = one(source, apis, **unset)
        assert without.evidence["missing"] == [name]
    assert apis.requests == []


def _no_endpoint(name: str) -> dict[str, Any]:
    # The project's own address stands in for its reference when it is scraped.
    return {"supabase_project_endpoint": None} if name == "SUPABASE_PROJECT_REF" else {}


@each_source
@pytest.mark.parametrize(
    ("status", "words", "requests"),
    [
        (400, "refuses the request (status 400)", 1),
        (401, "does not accept the credentials", 1),
        (402, "wants a paid plan", 1),
        (403, "forbids this", 1),
        (404, "does not know", 1),
        (429, "limits the rate", 2),
        (500, "failed (status 500)", 2),
        (503, "failed (status 503)", 2),
    ],
)
def test_a_refusal_is_an_error_and_only_what_may_pass_is_asked_a_second_time(
    source: Source, status: int, words: str, requests: int, apis: MetricsApis
) -> None:
    apis.faults.append(Fault(status=status, headers={"Retry-After": "0"}))
    assert words in error(source, apis)
    assert len(apis.requests) == requests


@each_source
@pytest.mark.parametrize("status", [429, 502])
def test_one_failure_that_passes_costs_nothing_but_a_retry(source: Source, status: int, apis: MetricsApis) -> None:
    apis.faults.append(Fault(status=status, headers={"Retry-After": "0"}, times=1))
    assert one(source, apis).status is Status.OK


@pytest.mark.parametrize("pause", ["3600", "Wed, 18 Nov 2026 14:00:00 GMT", "soon"])
def test_who_asks_for_a_long_pause_is_left_alone_until_the_next_measurement(pause: str, apis: MetricsApis) -> None:
    apis.faults.append(Fault(status=429, headers={"Retry-After": pause}))
    assert "limits the rate" in error(SupabasePlan(), apis)
    assert len(apis.requests) == 1


@each_source
@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"{}", "application/json"),
        (b"null", "application/json"),
        (b"[[]]", "application/json"),
        (b'{"error": {"message": "quota"}}', "application/json"),
        (b'{"status": "success", "result": [], "items": []}', "application/json"),
        (b'{"data": [{"start": "2026-11-01", "rows": []}], "has_more": false, "next_page": null}', "application/json"),
        (b"<!doctype html><title>Sign in</title>", "text/html"),
        (b"\xff\xfe\x00", "application/octet-stream"),
    ],
)
def test_a_drifted_body_with_status_200_is_an_error_with_its_hash_and_never_a_zero(
    source: Source, body: bytes, content_type: str, apis: MetricsApis
) -> None:
    apis.faults.append(Fault(body=body, content_type=content_type))
    sample = one(source, apis)
    assert sample.status is Status.ERROR
    assert sample.evidence["sha256"] == hashlib.sha256(body).hexdigest()
    assert "not as documented" in sample.evidence["error"]
    assert sample.evidence["problems"]


@each_source
def test_a_body_that_breaks_off_is_an_error(source: Source, apis: MetricsApis) -> None:
    apis.faults.append(Fault(truncate=True))
    assert "broke off" in error(source, apis)


@each_source
def test_a_closed_connection_is_an_error(source: Source, apis: MetricsApis) -> None:
    apis.faults.append(Fault(drop=True))
    assert "broke off" in error(source, apis)


@each_source
def test_a_redirect_is_not_followed(source: Source, apis: MetricsApis) -> None:
    apis.faults.append(Fault(status=307, headers={"Location": f"{apis.url}/elsewhere"}))
    assert "redirects elsewhere" in error(source, apis)
    assert len(apis.requests) == 1


def test_a_redirect_is_not_followed_by_a_client_that_would(apis: MetricsApis) -> None:
    apis.faults.append(Fault(status=302, headers={"Location": f"{apis.url}/elsewhere"}))
    with reaching(apis) as reach, clients.client(follow_redirects=True) as eager:
        (sample,) = SupabasePlan().read("a_metric", Reach(reach.router, eager, reach.settings, reach.now))
    assert sample.status is Status.ERROR
    assert len(apis.requests) == 1


@pytest.mark.parametrize(
    "fault", [Fault(hang_seconds=1.5), Fault(trickle_seconds=0.05)], ids=["no answer", "a byte at a time"]
)
def test_an_answer_that_takes_too_long_is_given_up(fault: Fault, apis: MetricsApis) -> None:
    apis.faults.append(fault)
    begun = time.monotonic()
    assert "within 0.3 s" in error(AnthropicCost(), apis, scaling_source_timeout_seconds=0.3)
    assert time.monotonic() - begun < 1.2
    assert len(apis.requests) == 1


def test_an_answer_without_end_is_refused(apis: MetricsApis) -> None:
    apis.faults.append(Fault(flood_bytes=32 * 1024 * 1024))
    assert "longer than 8388608 bytes" in error(SupabasePlan(), apis)


def test_a_server_that_is_not_there_is_an_error(apis: MetricsApis) -> None:
    assert "could not be connected to" in error(SupabasePlan(), apis, supabase_endpoint="http://127.0.0.1:1")


@each_source
@pytest.mark.parametrize("trouble", ["none", "status", "shape", "echo", "break"])
def test_no_credential_reaches_a_sample_or_a_log(
    source: Source, trouble: str, apis: MetricsApis, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    echoed = ", ".join(apis.environment().values())
    faults = {
        "status": Fault(status=401, headers={"X-Echo": "plain"}),
        "shape": Fault(body=b"{}"),
        "echo": Fault(body=json.dumps({echoed: echoed, "status": echoed, "plan": echoed}).encode()),
        "break": Fault(truncate=True),
    }
    if trouble in faults:
        apis.faults.append(faults[trouble])
    sample = one(source, apis)
    written = json.dumps([sample.dims, dict(sample.evidence)]) + repr(sample) + caplog.text + repr(source)
    assert apis.secret not in written
    assert "ops@example.com" not in written


def test_a_request_is_a_span_of_method_and_status_and_names_no_address(apis: MetricsApis, traces: Collector) -> None:
    assert tracing.start("test")
    apis.faults.append(Fault(status=503, headers={"Retry-After": "0"}, times=1))
    with tracing.run("run-1", "run"):
        one(SupabasePlan(), apis)
        one(SupabasePlan(), apis, supabase_endpoint="http://127.0.0.1:1")
    said = [dict(span.attributes) for span in traces.spans() if span.name == "GET"]
    assert said == [
        {"http.request.method": "GET", "http.response.status_code": 503, "error.type": "503"},
        {"http.request.method": "GET", "http.response.status_code": 200},
        *[{"http.request.method": "GET", "error.type": "httpx.ConnectError"}] * 2,
    ]
    sent = "".join(body.decode("latin-1") for body in traces.bodies)
    assert {each for each in (apis.secret, apis.url, "127.0.0.1", "organizations") if each in sent} == set()


def test_an_echoed_credential_is_cut_out_of_what_the_server_names(apis: MetricsApis) -> None:
    name = f"vcp_{apis.secret}"
    point = {"timestamp": "2026-11-18T13:00:00Z", "dimensions": {"route": name}, "values": {"value": 5.0}}
    apis.faults.append(Fault(body=json.dumps({"series": [point], "summary": [], "meta": {}}).encode()))
    sample = one(VercelMetrics("vercel.request.count", "sum", "max", group_by=("route",), coverage=0.0), apis)
    assert (sample.dims, sample.value) == ("route=…", 5.0)


def test_a_password_in_the_address_is_used_and_not_shown(apis: MetricsApis, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    password = apis.environment()["SCALING_PROMETHEUS_PASSWORD"]
    address = apis.url.replace("http://", f"http://pipeline:{password}@")
    with reaching(apis, scaling_prometheus_user=None, scaling_prometheus_password=None) as reach:
        # A plain http address with a password passes no validation; an https one does.
        known = reach.settings.model_copy(update={"scaling_prometheus_url": address})
        (sample,) = PrometheusQuery("up").read("a_metric", Reach(reach.router, reach.http, known, reach.now))
    assert sample.value == 1.0
    assert apis.secret not in json.dumps(dict(sample.evidence)) + caplog.text
