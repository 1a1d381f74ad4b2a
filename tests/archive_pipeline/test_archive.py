"""The protocol: what a month's run leaves in the bucket and the ledger."""

from archive_pipeline.archive import Outcome
from tests.archive_pipeline.conftest import JANUARY, Room


def test_a_closed_month_is_archived_whole_and_verified(room: Room) -> None:
    room.fill(1000)
    report = room.archive()

    assert report.outcome is Outcome.ARCHIVED
    assert report.manifest.digest.rows == 1000
    assert report.stored == report.source == report.manifest.digest
    assert report.bounds_inside_month
    assert len(report.manifest.parts) > 1
    assert room.data_keys() == [part.key for part in report.manifest.parts]
    row = room.month_row(JANUARY)
    assert (row["state"], row["rows"], row["manifest_key"]) == ("archived", 1000, report.found.key)
    assert room.rows("SELECT count(*) AS n, count(DISTINCT id) AS ids FROM audit_logs") == [{"n": 1000, "ids": 1000}]
