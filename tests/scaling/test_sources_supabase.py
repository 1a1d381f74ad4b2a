"""Supabase's management API: plan, disk and pooler."""

from collections.abc import Iterator
from datetime import timedelta

import pytest

from devstack.metrics_apis import PROJECT, MetricsApis, pooler, run
from scaling.samples import Status
from scaling.sources.supabase import SupabaseDisk, SupabasePlan, SupabasePooler
from tests.scaling.measuring import NOW, one, renewed


@pytest.fixture(scope="module")
def server() -> Iterator[MetricsApis]:
    with run() as served:
        yield served


@pytest.fixture
def apis(server: MetricsApis) -> MetricsApis:
    return renewed(server)


def disk(used: object, size: object = 8_000, at: str = "2026-11-18T13:00:00Z") -> dict[str, object]:
    return {"timestamp": at, "metrics": {"fs_size_bytes": size, "fs_avail_bytes": 1, "fs_used_bytes": used}}


@pytest.mark.parametrize(
    ("plan", "value"), [("free", 0.0), ("platform", 0.0), ("pro", 1.0), ("team", 1.0), ("enterprise", 1.0)]
)
def test_the_plan_is_one_when_it_may_have_replicas(plan: str, value: float, apis: MetricsApis) -> None:
    apis.figures.organization["plan"] = plan
    sample = one(SupabasePlan(), apis)
    assert (sample.value, sample.evidence["plan"]) == (value, plan)


@pytest.mark.parametrize("plan", ["ultra", "PRO", None, 1, ""])
def test_a_plan_that_nobody_knows_is_an_error_and_not_the_free_one(plan: object, apis: MetricsApis) -> None:
    apis.figures.organization["plan"] = plan
    assert one(SupabasePlan(), apis).status is Status.ERROR


def test_an_organization_that_is_not_there_is_an_error(apis: MetricsApis) -> None:
    assert "status 404" in one(SupabasePlan(), apis, supabase_organization="other").evidence["error"]


def test_the_disk_is_a_fraction(apis: MetricsApis) -> None:
    apis.figures.disk = disk(6_000)
    sample = one(SupabaseDisk(), apis)
    assert sample.value == 0.75
    assert sample.evidence["data_complete_until"] == "2026-11-18T13:00:00+00:00"
    assert apis.requests[0][1] == f"/v1/projects/{PROJECT}/config/disk/util"


def test_an_unused_disk_is_a_zero(apis: MetricsApis) -> None:
    apis.figures.disk = disk(0)
    assert one(SupabaseDisk(), apis).value == 0.0


@pytest.mark.parametrize(("used", "size"), [(0, 0), (9_000, 8_000), ("6000", 8_000), (6_000.5, 8_000), (-1, 8_000)])
def test_a_disk_that_cannot_be_is_an_error(used: object, size: object, apis: MetricsApis) -> None:
    apis.figures.disk = disk(used, size)
    assert one(SupabaseDisk(), apis).status is Status.ERROR


def test_an_old_figure_of_the_disk_is_stale(apis: MetricsApis) -> None:
    apis.figures.disk = disk(6_000)
    assert one(SupabaseDisk(), apis, NOW + timedelta(hours=6)).status is Status.STALE
    assert one(SupabaseDisk(), apis, NOW + timedelta(hours=5)).status is Status.OK


def test_a_moment_without_an_offset_is_an_error(apis: MetricsApis) -> None:
    apis.figures.disk = disk(6_000, at="2026-11-18T13:00:00")
    assert one(SupabaseDisk(), apis).status is Status.ERROR


def test_the_pooler_of_the_primary_counts_and_its_connection_string_stays_there(apis: MetricsApis) -> None:
    apis.figures.poolers = [pooler(database_type="READ_REPLICA", max_client_conn=9), pooler()]
    sample = one(SupabasePooler(), apis)
    assert sample.value == 200.0
    assert one(SupabasePooler("default_pool_size"), apis).value == 15.0
    assert sample.evidence["pool_mode"] == "transaction"
    assert "postgresql" not in str(sample.evidence)


def test_a_limit_that_is_not_set_is_empty(apis: MetricsApis) -> None:
    apis.figures.poolers = [pooler(max_client_conn=None)]
    assert one(SupabasePooler(), apis).status is Status.EMPTY
    apis.figures.poolers = []
    assert one(SupabasePooler(), apis).status is Status.EMPTY


def test_two_primaries_or_a_missing_key_are_an_error(apis: MetricsApis) -> None:
    apis.figures.poolers = [pooler(), pooler()]
    assert one(SupabasePooler(), apis).status is Status.ERROR
    lacking = pooler()
    del lacking["max_client_conn"]
    apis.figures.poolers = [lacking]
    assert one(SupabasePooler(), apis).evidence["problems"] == ["0.max_client_conn: missing"]
