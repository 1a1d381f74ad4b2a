"""Google Cloud Monitoring: the token of a service account, and month to date of the calls Google counted."""

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from devstack.metrics_apis import (
    CALENDAR_CALLS,
    DAY,
    GOOGLE_PROJECT,
    Fault,
    MetricsApis,
    google_key,
    plausible,
    run,
)
from devstack.otlp import Collector
from scaling import tracing
from scaling.samples import Sample, Status
from scaling.sources import Reach
from scaling.sources.google_monitoring import GoogleCalendarCalls
from tests import clients
from tests.scaling.measuring import NOW, one, reaching, renewed, settings

FIRST = datetime(2026, 11, 1, tzinfo=UTC)
MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
SERIES = "/v3/"
CALLS = GoogleCalendarCalls()


@pytest.fixture(scope="module")
def server() -> Iterator[MetricsApis]:
    with run() as served:
        yield served


@pytest.fixture
def apis(server: MetricsApis) -> MetricsApis:
    return renewed(server, plausible(NOW))


@pytest.fixture(scope="module")
def key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def error(apis: MetricsApis, **others: Any) -> str:
    sample = one(CALLS, apis, **others)
    assert (sample.status, sample.value) == (Status.ERROR, None)
    return str(sample.evidence["error"])


def point(
    end: datetime, count: object = "5", *, start: datetime | None = None, kind: str = "int64Value"
) -> dict[str, Any]:
    begin = {} if start is None else {"startTime": start.isoformat()}
    return {"interval": {**begin, "endTime": end.isoformat()}, "value": {kind: count}}


def series(*points: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {
        "metric": {"type": CALENDAR_CALLS["metric.type"], "labels": {"response_code_class": "2xx"}},
        "resource": {"type": "consumed_api", "labels": {"project_id": GOOGLE_PROJECT}},
        "metricKind": "DELTA",
        "valueType": "INT64",
        "points": list(points),
        **others,
    }


def answered(apis: MetricsApis, **page: Any) -> Sample:
    """What is made of a page, whatever was asked for."""
    apis.faults.append(Fault(body=json.dumps(page).encode(), path=SERIES))
    return one(CALLS, apis)


def test_calls_of_this_month_are_counted_by_class_of_response(apis: MetricsApis) -> None:
    apis.figures.google_calls = {
        FIRST - MINUTE: {"2xx": 1000},
        FIRST: {"2xx": 1000},  # the minute that ended with October
        FIRST + MINUTE: {"2xx": 10, "4xx": 1},
        FIRST + DAY: {"2xx": 20, "5xx": 2},
        NOW.replace(second=0) - 8 * MINUTE: {"2xx": 30},  # 12:59
        NOW.replace(second=0): {"2xx": 1000},  # 13:07, in a half hour that is not over
    }
    sample = one(CALLS, apis)
    assert (sample.value, sample.period) == (63.0, "2026-11")
    assert sample.evidence["by_class"] == {"2xx": 60, "4xx": 1, "5xx": 2}
    # What ended at 13:00 may still grow, what is older than Google's lag does not.
    assert sample.evidence["data_complete_until"] == (NOW - timedelta(minutes=30)).isoformat()
    (_, _, _), (_, path, query) = apis.requests
    asked = dict(query)
    assert path == f"/v3/projects/{GOOGLE_PROJECT}/timeSeries"
    assert (asked["interval.startTime"], asked["interval.endTime"]) == ("2026-11-01T00:00:00Z", "2026-11-18T13:00:00Z")


def test_every_page_counts(apis: MetricsApis) -> None:
    apis.figures.google_calls = {FIRST + n * HOUR: {"2xx": 3, "4xx": 1} for n in range(1, 422)}
    apis.figures.most_points = 100
    sample = one(CALLS, apis)
    assert (sample.value, sample.evidence["half_hours"], len(sample.evidence["sha256"])) == (1684.0, 421, 9)
    assert [dict(query).get("pageToken") for _, _, query in apis.requests[1:4]] == [None, "100", "200"]


def test_no_series_are_empty_and_no_calls_are_a_zero(apis: MetricsApis) -> None:
    apis.figures.google_calls = {}
    sample = one(CALLS, apis)
    assert (sample.status, sample.value, sample.period) == (Status.EMPTY, None, "2026-11")
    apis.figures.google_calls = {NOW - HOUR: {"2xx": 0}}
    assert one(CALLS, apis).value == 0.0


def test_the_month_is_that_of_utc_and_its_first_half_hour_asks_nothing(apis: MetricsApis) -> None:
    apis.figures.google_calls = {FIRST - HOUR: {"2xx": 7}, FIRST + MINUTE: {"2xx": 5}}
    tokyo = datetime.fromisoformat("2026-11-01T08:30:00+09:00")
    assert (one(CALLS, apis, tokyo).value, one(CALLS, apis, tokyo).period) == (7.0, "2026-10")
    apis.requests.clear()
    sample = one(CALLS, apis, FIRST + 29 * MINUTE)
    assert (sample.status, sample.period, apis.requests) == (Status.EMPTY, "2026-11", [])
    assert one(CALLS, apis, FIRST + 30 * MINUTE).value == 5.0


def test_a_count_that_stands_still_is_stale(apis: MetricsApis) -> None:
    apis.figures.google_calls = {NOW - 6 * HOUR: {"2xx": 5}}  # 07:07, in the half hour to 07:30
    sample = one(CALLS, apis)
    assert sample.status is Status.OK
    assert sample.evidence["data_complete_until"] == "2026-11-18T07:30:00+00:00"
    sample = one(CALLS, apis, NOW + 30 * MINUTE)
    assert (sample.status, sample.period) == (Status.STALE, "2026-11")
    assert sample.evidence["by_class"] == {"2xx": 5}


@pytest.mark.parametrize("trouble", [{"executionErrors": [{"code": 4, "message": "x"}]}, {"unreachable": ["eu"]}])
def test_a_count_that_google_calls_incomplete_is_partial(trouble: dict[str, Any], apis: MetricsApis) -> None:
    assert answered(apis, timeSeries=[series(point(NOW - HOUR))], **trouble).status is Status.PARTIAL


def test_an_aligned_gauge_without_start_counts_as_well(apis: MetricsApis) -> None:
    sample = answered(
        apis, timeSeries=[series(point(NOW - HOUR), metricKind="GAUGE", metric={"type": CALENDAR_CALLS["metric.type"]})]
    )
    assert (sample.value, sample.evidence["by_class"]) == (5.0, {"unknown": 5})


@pytest.mark.parametrize("count", [5, 5.0, None, "", "-5", "5.0", "1e3", "1,234", "NaN", "٣", "9" * 40])
def test_a_count_that_is_no_decimal_string_is_an_error(count: object, apis: MetricsApis) -> None:
    assert answered(apis, timeSeries=[series(point(NOW - HOUR, count))]).status is Status.ERROR


@pytest.mark.parametrize(
    "spoiled",
    [
        {"valueType": "DOUBLE"},
        {"metricKind": "CUMULATIVE"},
        {"resource": {"type": "produced_api"}},
        {"metric": {"type": "serviceruntime.googleapis.com/api/request_sizes"}},
        {"points": None},
        {"points": [point(NOW - HOUR, 5.0, kind="doubleValue")]},
        {"points": [point(FIRST)]},
        {"points": [point(NOW + HOUR)]},
        {"points": [point(FIRST + HOUR, start=FIRST - HOUR)]},
        {"points": [point(NOW - HOUR, start=NOW)]},
        {"points": [point(NOW - HOUR), point(NOW - HOUR)]},
        {"points": [{"interval": {"endTime": "2026-11-18T12:00:00"}, "value": {"int64Value": "5"}}]},
    ],
    ids=str,
)
def test_another_series_than_was_asked_for_is_an_error(spoiled: dict[str, Any], apis: MetricsApis) -> None:
    assert "not as documented" in answered(apis, timeSeries=[series(**spoiled)]).evidence["error"]


def test_a_page_that_comes_twice_is_not_counted_twice(apis: MetricsApis) -> None:
    page = {"timeSeries": [series(point(NOW - HOUR))]}
    apis.faults.append(Fault(body=json.dumps({**page, "nextPageToken": "2"}).encode(), path=SERIES, times=1))
    apis.faults.append(Fault(body=json.dumps(page).encode(), path=SERIES, times=1))
    assert "twice" in error(apis)


def test_pages_in_a_circle_are_an_error(apis: MetricsApis) -> None:
    apis.faults.append(Fault(body=b'{"nextPageToken": "2"}', path=SERIES))
    assert "nextPageToken" in error(apis)
    assert len(apis.requests) == 3


def test_a_second_page_that_fails_leaves_no_figure_of_the_first(apis: MetricsApis) -> None:
    body = json.dumps({"timeSeries": [series(point(NOW - HOUR))], "nextPageToken": "2"}).encode()
    apis.faults.append(Fault(body=body, path=SERIES, times=1))
    apis.faults.append(Fault(status=403, path=SERIES))
    assert "forbids this; GOOGLE_MONITORING_PROJECT and GOOGLE_MONITORING_CREDENTIALS_FILE" in error(apis)


@pytest.mark.parametrize("path", ["/token", SERIES])
@pytest.mark.parametrize(
    "body",
    [
        b"null",
        b"[[]]",
        b'{"error": {"message": "quota"}}',
        b'{"data": [], "has_more": false}',
        b'{"timeSeries": null}',
        b'{"access_token": "ya29 x", "expires_in": 3599, "token_type": "Bearer"}',
        b'{"access_token": "ya29", "expires_in": "3599", "token_type": "Bearer"}',
        b"<!doctype html><title>Sign in</title>",
        b"\xff\xfe\x00",
    ],
)
def test_a_drifted_body_with_status_200_is_an_error(body: bytes, path: str, apis: MetricsApis) -> None:
    apis.faults.append(Fault(body=body, path=path))
    assert "not as documented" in error(apis)


def test_the_hash_of_a_drifted_page_is_kept_and_none_of_a_token(apis: MetricsApis) -> None:
    body = b'{"timeSeries": {}}'
    apis.faults.append(Fault(body=body, path=SERIES))
    assert one(CALLS, apis).evidence["sha256"] == hashlib.sha256(body).hexdigest()
    apis.faults[:] = [Fault(body=body, path="/token")]
    assert "sha256" not in one(CALLS, apis).evidence


@pytest.mark.parametrize("missing", ["GOOGLE_MONITORING_PROJECT", "GOOGLE_MONITORING_CREDENTIALS_FILE"])
@pytest.mark.parametrize("value", [None, ""])
def test_without_project_or_file_nothing_is_asked(missing: str, value: str | None, apis: MetricsApis) -> None:
    sample = one(CALLS, apis, NOW, **{missing.lower(): value})
    assert (sample.status, sample.evidence["missing"]) == (Status.NOT_CONFIGURED, [missing])
    assert apis.requests == []


@pytest.mark.parametrize("name", ["google_monitoring_endpoint", "google_monitoring_token_url"])
def test_neither_token_nor_assertion_is_sent_over_plain_http(name: str) -> None:
    with pytest.raises(ValueError, match="must be https"):
        settings({name: "http://monitoring.example.com"})


def _spoiled(key: rsa.RSAPrivateKey, how: str) -> bytes:
    elliptic = ec.generate_private_key(ec.SECP256R1())
    pem = elliptic.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    whole = google_key(key)
    return {
        "empty": b"",
        "binary": b"\xff\xfe",
        "list": b"[]",
        "a user's": json.dumps({**whole, "type": "authorized_user"}).encode(),
        "no mail": json.dumps({name: each for name, each in whole.items() if name != "client_email"}).encode(),
        "no key": json.dumps({**whole, "private_key": ""}).encode(),
        "no PEM": json.dumps({**whole, "private_key": "hush"}).encode(),
        "half a key": json.dumps({**whole, "private_key": whole["private_key"][:600]}).encode(),
        "elliptic": json.dumps({**whole, "private_key": pem}).encode(),
    }[how]


@pytest.mark.parametrize(
    "how", ["empty", "binary", "list", "a user's", "no mail", "no key", "no PEM", "half a key", "elliptic"]
)
def test_a_bad_key_file_is_one_sentence_that_names_the_setting(
    how: str, apis: MetricsApis, key: rsa.RSAPrivateKey, tmp_path: Path
) -> None:
    (tmp_path / "key.json").write_bytes(_spoiled(key, how))
    said = error(apis, google_monitoring_credentials_file=tmp_path / "key.json")
    assert said.startswith("the file of GOOGLE_MONITORING_CREDENTIALS_FILE ")
    assert "hush" not in said
    assert apis.requests == []


@pytest.mark.parametrize("where", ["missing.json", "."])
def test_a_key_file_that_cannot_be_read_is_said_so(where: str, apis: MetricsApis, tmp_path: Path) -> None:
    said = error(apis, google_monitoring_credentials_file=tmp_path / where)
    assert "the file of GOOGLE_MONITORING_CREDENTIALS_FILE cannot be read" in said


@pytest.mark.parametrize("others", [{}, {"client_email": "other@example.com"}], ids=["another key", "another account"])
def test_a_key_that_google_does_not_know_gets_no_token(
    others: dict[str, str], apis: MetricsApis, key: rsa.RSAPrivateKey, tmp_path: Path
) -> None:
    known = json.loads(apis.key_file.read_text()) if others else google_key(key)
    (tmp_path / "key.json").write_text(json.dumps({**known, **others}))
    said = error(apis, google_monitoring_credentials_file=tmp_path / "key.json")
    assert "does not accept the key of GOOGLE_MONITORING_CREDENTIALS_FILE" in said
    assert len(apis.requests) == 1


def test_addresses_in_the_key_file_are_not_believed(apis: MetricsApis, tmp_path: Path) -> None:
    elsewhere = {"token_uri": "http://127.0.0.1:1/token", "universe_domain": "example.com"}
    (tmp_path / "key.json").write_text(json.dumps({**json.loads(apis.key_file.read_text()), **elsewhere}))
    assert one(CALLS, apis, google_monitoring_credentials_file=tmp_path / "key.json").status is Status.OK


@pytest.mark.parametrize("project", ["other", "other/timeSeries?filter=x&y="])
def test_another_project_is_refused_with_the_settings_that_say_so(project: str, apis: MetricsApis) -> None:
    assert "GOOGLE_MONITORING_PROJECT" in error(apis, google_monitoring_project=project)
    _, (_, _, query) = apis.requests
    assert [name for name, _ in query][:2] == ["filter", "interval.startTime"]
    assert dict(query)["filter"].startswith("metric.type=")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(status=429), "limits the rate"),
        (Fault(status=503), "failed (status 503)"),
        (Fault(status=307, headers={"Location": "/elsewhere"}), "redirects elsewhere"),
        (Fault(truncate=True), "broke off"),
        (Fault(drop=True), "broke off"),
        (Fault(flood_bytes=1024 * 1024), "longer than 65536 bytes"),
        (Fault(hang_seconds=1.5), "within 0.5 s"),
        (Fault(trickle_seconds=0.05), "within 0.5 s"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_token_that_does_not_come_is_an_error_within_the_time_limit(
    fault: Fault, words: str, apis: MetricsApis
) -> None:
    fault.path = "/token"
    apis.faults.append(fault)
    begun = time.monotonic()
    assert words in error(apis, scaling_source_timeout_seconds=0.5)
    assert time.monotonic() - begun < 1.4
    assert len(apis.requests) == 1


def test_a_token_endpoint_that_is_not_there_is_an_error(apis: MetricsApis) -> None:
    assert "could not be connected to" in error(apis, google_monitoring_token_url="http://127.0.0.1:1/token")


@pytest.mark.parametrize("path", ["/token", SERIES])
@pytest.mark.parametrize("trouble", ["none", "status", "echo", "break"])
def test_no_key_or_token_reaches_a_sample_or_a_log(
    trouble: str, path: str, apis: MetricsApis, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    token = f"ya29.c.{apis.secret}"
    named = {"type": CALENDAR_CALLS["metric.type"], "labels": {"response_code_class": token}}
    echo = {"timeSeries": [series(point(NOW - HOUR), metric=named)]} if path == SERIES else {token: token}
    faults = {
        "status": Fault(status=401, path=path),
        "echo": Fault(body=json.dumps(echo).encode(), path=path),
        "break": Fault(truncate=True, path=path),
    }
    if trouble in faults:
        apis.faults.append(faults[trouble])
    sample = one(CALLS, apis)
    written = json.dumps(dict(sample.evidence)) + repr(sample) + caplog.text + repr(CALLS)
    assert apis.secret not in written
    assert "assertion" not in written
    for line in json.loads(apis.key_file.read_text())["private_key"].splitlines()[1:-1]:
        assert line not in written


def test_redirects_are_not_followed_by_a_client_that_would(apis: MetricsApis) -> None:
    apis.faults.append(Fault(status=302, headers={"Location": f"{apis.url}/elsewhere"}))
    with reaching(apis) as reach, clients.client(follow_redirects=True) as eager:
        (sample,) = CALLS.read("a_metric", Reach(reach.router, eager, reach.settings, reach.now))
    assert sample.status is Status.ERROR
    assert len(apis.requests) == 1


def test_the_request_for_a_token_is_a_span_without_the_key(apis: MetricsApis, traces: Collector) -> None:
    assert tracing.start("test")
    apis.faults.append(Fault(status=403, times=1))
    with tracing.run("run-1", "run"):
        assert error(apis)
        one(CALLS, apis)
    told = [(span.name, span.attributes.get("http.response.status_code")) for span in traces.spans()]
    assert told[:3] == [("POST", 403), ("POST", 200), ("GET", 200)]
    sent = "".join(body.decode("latin-1") for body in traces.bodies)
    assert not any(each in sent for each in (apis.secret, apis.url, GOOGLE_PROJECT))
