"""The exporter's SQL over schema sync against the sync's own reckoning."""

from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from devstack.servers import Database
from scaling import exported
from scaling.databases import DatabaseRouter, Shard
from scaling.settings import SyncLimitSettings
from sync_pipeline import call_buckets, report
from sync_pipeline.call_buckets import QuotaLimits
from tests.scaling import exported_fleet


def test_saved_calls_and_headroom_are_those_of_the_report_and_of_the_checks(
    database: Database, settings_environment: Callable[..., None]
) -> None:
    settings_environment(database)
    exported_fleet.seed(database.admin_dsn, workspaces=50, tenants=10)
    limits = SyncLimitSettings(sync_calls_per_day=500_000)
    with DatabaseRouter(Shard("main", database.dsn)) as router:
        numbers = report.read(router, datetime.now(UTC).date()).numbers()
        [shard] = router.shards()
        with exported.reading(shard, 5) as connection:
            families = [*exported.calls(connection), *exported.quota(connection, limits)]
            headroom = call_buckets.headroom(connection, QuotaLimits(10_000, 600, 500_000))
    found = {family.name: family.samples[0].value for family in families if len(family.samples) == 1}
    assert round(found["pipeline_sync_calls_of_complete_reads"]) == numbers["calls_of_two_minute_polling"]
    assert round(found["pipeline_sync_calls_saved"]) == numbers["calls_saved"]
    assert found["pipeline_quota_calls_today"] == headroom.calls_today
    assert found["pipeline_quota_headroom_ratio"] == pytest.approx(1 - headroom.share_used)
    assert found["pipeline_quota_projected_calls"] == pytest.approx(headroom.projected_calls, abs=20)
    assert found["pipeline_quota_fill_ratio"] == pytest.approx(headroom.project_fill, abs=0.05)
    assert found["pipeline_quota_rate_ratio"] == pytest.approx(headroom.project_factor, abs=0.01)
