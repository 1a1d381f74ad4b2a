"""Upstash: the hit rate from the growth of two counters."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devstack.metrics_apis import MetricsApis, go_time, run
from scaling.samples import Status
from scaling.sources.upstash import UpstashStats
from scaling.sources.upstash import go_time as read_go_time
from tests.scaling.measuring import NOW, one, renewed

STEP = timedelta(minutes=5)


@pytest.fixture(scope="module")
def server() -> Iterator[MetricsApis]:
    with run() as served:
        yield served


@pytest.fixture
def apis(server: MetricsApis) -> MetricsApis:
    return renewed(server)


def points(values: Sequence[object], end: datetime = NOW) -> list[dict[str, object]]:
    return [{"x": go_time(end - (len(values) - 1 - n) * STEP), "y": value} for n, value in enumerate(values)]


@pytest.mark.parametrize(
    ("hits", "misses", "rate"),
    [
        ([1000, 1030, 1060], [50, 100, 190], 60 / 200),
        ([1000, 1000], [0, 400], 0.0),
        ([0, 300], [7, 7], 1.0),
        # the counters began anew: 40 + 20 and 20 + 220 grew
        ([1000, 1040, 20], [500, 520, 220], 60 / 300),
    ],
)
def test_the_rate_is_of_what_the_counters_grew(
    hits: list[object], misses: list[object], rate: float, apis: MetricsApis
) -> None:
    apis.figures.redis = {"hits": points(hits), "misses": points(misses)}
    sample = one(UpstashStats(), apis)
    assert sample.status is Status.OK
    assert sample.value == pytest.approx(rate)
    assert "not only the cache's" in sample.evidence["caveat"]


def test_points_come_in_any_order(apis: MetricsApis) -> None:
    apis.figures.redis = {"hits": points([0, 50, 100])[::-1], "misses": points([0, 50, 100])}
    assert one(UpstashStats(), apis).value == 0.5


def test_only_the_window_that_both_counters_have_counts(apis: MetricsApis) -> None:
    apis.figures.redis = {"hits": points([0, 9000, 9100, 9200]), "misses": points([100, 300, 500])}
    assert one(UpstashStats(), apis).value == pytest.approx(200 / 600)


def test_few_reads_are_partial_and_none_are_no_rate(apis: MetricsApis) -> None:
    apis.figures.redis = {"hits": points([0, 100]), "misses": points([0, 99])}
    sample = one(UpstashStats(), apis)
    assert (sample.status, sample.evidence["hits"], sample.evidence["misses"]) == (Status.PARTIAL, 100, 99)
    apis.figures.redis = {"hits": points([5, 5]), "misses": points([7, 7])}
    assert one(UpstashStats(least_reads=0), apis).status is Status.PARTIAL


@pytest.mark.parametrize(("hits", "misses"), [([], []), (None, None), ([], [1, 2])])
def test_no_points_are_empty(hits: list[object] | None, misses: list[object] | None, apis: MetricsApis) -> None:
    apis.figures.redis = {
        "hits": None if hits is None else points(hits),
        "misses": None if misses is None else points(misses),
    }
    assert one(UpstashStats(), apis).status is Status.EMPTY


def test_an_old_newest_point_is_stale(apis: MetricsApis) -> None:
    apis.figures.redis = {"hits": points([0, 500]), "misses": points([0, 500])}
    sample = one(UpstashStats(), apis, NOW + timedelta(hours=4))
    assert sample.status is Status.STALE
    assert sample.evidence["data_complete_until"] == "2026-11-18T13:07:30+00:00"


@pytest.mark.parametrize(
    "x", ["2026-11-18T13:00:00Z", "yesterday", None, 1_795_000_000, "2026-13-18 13:00:00 +0000 UTC"]
)
def test_a_moment_that_go_does_not_print_is_an_error(x: object, apis: MetricsApis) -> None:
    apis.figures.redis = {"hits": [{"x": x, "y": 1}], "misses": points([0, 500])}
    assert one(UpstashStats(), apis).status is Status.ERROR


@pytest.mark.parametrize("y", ["5", None, -1, True])
def test_a_count_that_is_none_is_an_error(y: object, apis: MetricsApis) -> None:
    apis.figures.redis = {"hits": points([0, y]), "misses": points([0, 500])}
    assert one(UpstashStats(), apis).status is Status.ERROR


def test_a_database_that_is_not_there_is_an_error(apis: MetricsApis) -> None:
    assert "status 404" in one(UpstashStats(), apis, upstash_database_id="other").evidence["error"]


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2025-08-31 15:12:52.799480932 +0000 UTC", datetime(2025, 8, 31, 15, 12, 52, 799480, UTC)),
        ("2025-08-31 15:12:52.79 +0000 UTC", datetime(2025, 8, 31, 15, 12, 52, 790000, UTC)),
        ("2025-08-31 15:12:52 +0000 UTC", datetime(2025, 8, 31, 15, 12, 52, 0, UTC)),
        ("2025-08-31 17:12:52.5 +0200 CEST m=+0.000012", datetime(2025, 8, 31, 15, 12, 52, 500000, UTC)),
    ],
)
def test_go_prints_moments_in_several_ways(text: str, moment: datetime) -> None:
    assert read_go_time(text) == moment


@given(st.datetimes(min_value=datetime(1970, 1, 1), max_value=datetime(2200, 1, 1), timezones=st.just(UTC)))  # noqa: DTZ001
def test_every_moment_survives_the_way_through_gos_format(moment: datetime) -> None:
    assert read_go_time(go_time(moment)) == moment
