"""Months as ranges of instants."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archive_pipeline.months import Month, epoch_us
from scaling.errors import UserError

months = st.builds(
    Month,
    st.integers(2, 9998),
    st.integers(1, 12),
    st.sampled_from(["UTC", "Asia/Tokyo", "America/New_York", "Asia/Kathmandu", "America/Sao_Paulo", "Pacific/Apia"]),
)


def test_a_month_of_tokyo_begins_at_fifteen_oclock_utc() -> None:
    month = Month.parse("2025-07", "Asia/Tokyo")
    assert month.start == datetime(2025, 6, 30, 15, tzinfo=UTC)
    assert month.end == datetime(2025, 7, 31, 15, tzinfo=UTC)


@given(months)
def test_months_follow_each_other_without_gap_or_overlap(month: Month) -> None:
    assert month.end == month.following.start
    assert month.start < month.end
    assert month < month.following


@given(months)
def test_a_month_is_read_back_from_its_partition_key_and_its_name(month: Month) -> None:
    assert Month.parse(month.partition_key, month.zone) == month
    assert Month.parse(month.name, month.zone) == month


@pytest.mark.parametrize("text", ["2025", "2025-13", "2025-00", "25-01", "2025-01-02", "0000-01", "2025-01 ", ""])
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError, match="write YYYY-MM, for example 2025-01"):
        Month.parse(text)


@given(st.datetimes(timezones=st.just(UTC)))
def test_microseconds_since_the_epoch_are_exact_for_any_instant(instant: datetime) -> None:
    whole = round(instant.replace(microsecond=0).timestamp())
    assert epoch_us(instant) == whole * 1_000_000 + instant.microsecond
