"""Google's events as rows: what is kept, what is replaced, what goes to quarantine."""

from datetime import UTC, date, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sync_pipeline.events import Json, UnreadableEventError, read_event, read_items

TIMED: dict[str, Json] = {
    "id": "abc",
    "status": "confirmed",
    "start": {"dateTime": "2026-03-02T10:00:00+01:00", "timeZone": "Europe/Berlin"},
    "end": {"dateTime": "2026-03-02T11:00:00+01:00", "timeZone": "Europe/Berlin"},
}

json_values: st.SearchStrategy[Json] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from(
    ["id", "status", "summary", "start", "end", "recurrence", "recurringEventId", "originalStartTime", "updated",
     "sequence", "organizer", "attendeesOmitted", "iCalUID"]
)  # fmt: skip


def test_a_timed_event_is_an_instant_and_keeps_its_zone() -> None:
    row = read_event(TIMED)
    assert row.start_at == datetime(2026, 3, 2, 9, tzinfo=UTC)
    assert (row.start_date, row.start_zone, row.flaws) == (None, "Europe/Berlin", ())


@pytest.mark.parametrize(
    ("start", "instant"),
    [
        ({"dateTime": "2026-03-29T02:30:00", "timeZone": "Europe/Berlin"}, datetime(2026, 3, 29, 1, 30, tzinfo=UTC)),
        ({"dateTime": "2026-03-02T10:00:00", "timeZone": "GMT-07:00"}, datetime(2026, 3, 2, 17, tzinfo=UTC)),
        ({"dateTime": "2026-03-02T10:00:00-07:00", "timeZone": "GMT-07:00"}, datetime(2026, 3, 2, 17, tzinfo=UTC)),
        ({"dateTime": "2026-03-02T10:00:00Z", "timeZone": "Mars/Olympus"}, datetime(2026, 3, 2, 10, tzinfo=UTC)),
        ({"dateTime": "2026-03-02T10:00:00.123Z"}, datetime(2026, 3, 2, 10, 0, 0, 123000, tzinfo=UTC)),
    ],
)
def test_a_start_is_one_instant_whatever_the_zone_is_called(start: Json, instant: datetime) -> None:
    row = read_event({**TIMED, "start": start})
    assert (row.start_at, row.flaws) == (instant, ())


@pytest.mark.parametrize(
    "start",
    [
        {"dateTime": "2026-03-02T10:00:00", "timeZone": "Mars/Olympus"},
        {"dateTime": "2026-03-02T10:00:00"},
        {"dateTime": "0001-01-01T00:00:00+14:00"},
        {"dateTime": "0001-01-01T00:00:00Z"},
        {"dateTime": "0000-12-31T00:00:00Z"},
        {"dateTime": "9999-12-31T23:59:59-08:00"},
        {"dateTime": "tomorrow"},
        {"date": "0000-00-00"},
        {"date": "0001-01-01"},
        {"dateTime": "2026-03-02T10:00:00", "timeZone": "../etc/passwd"},
    ],
)
def test_a_start_nobody_can_read_is_null_and_named(start: Json) -> None:
    row = read_event({**TIMED, "start": start})
    assert (row.start_at, row.start_date, row.flaws) == (None, None, ("start_unreadable",))


def test_a_deleted_event_keeps_no_details() -> None:
    row = read_event({**TIMED, "status": "cancelled", "summary": "Secret", "iCalUID": "u", "flavour": "x"})
    assert row.is_tombstone
    assert (row.summary, row.start_at) == (None, None)
    assert row.raw == {"id": "abc", "status": "cancelled", "iCalUID": "u"}


@pytest.mark.parametrize(
    ("event_id", "instant", "day"),
    [
        ("abc_20260302T090000Z", datetime(2026, 3, 2, 9, tzinfo=UTC), None),
        ("abc_20260302", None, date(2026, 3, 2)),
    ],
)
def test_a_bare_cancelled_instance_is_linked_to_its_master_by_its_id(
    event_id: str, instant: datetime | None, day: date | None
) -> None:
    row = read_event({"id": event_id, "status": "cancelled"})
    assert (row.is_tombstone, row.recurring_event_id) == (False, "abc")
    assert (row.original_start_at, row.original_start_date) == (instant, day)


@pytest.mark.parametrize("event_id", ["abc", "abc_R20260302T090000", "_60q30c1g60o30", "abc_99999999"])
def test_a_bare_cancelled_event_whose_id_names_no_instance_is_a_tombstone(event_id: str) -> None:
    assert read_event({"id": event_id, "status": "cancelled"}).is_tombstone


@pytest.mark.parametrize(
    "item",
    [
        None,
        [],
        "text",
        {},
        {"id": ""},
        {"id": 7},
        {"id": "x" * 1025},
        {"id": "é" * 513},
        {**TIMED, "recurringEventId": "x" * 1025},
        {**TIMED, "summary": 7},
        {**TIMED, "start": "2026-03-02"},
        {**TIMED, "recurrence": "RRULE:FREQ=DAILY"},
        {**TIMED, "recurrence": [7]},
        {**TIMED, "sequence": 2**63},
        {**TIMED, "sequence": True},
        {**TIMED, "reminders": float("nan")},
    ],
)
def test_an_item_of_another_shape_is_unreadable_and_its_values_are_not_told(item: Json) -> None:
    with pytest.raises(UnreadableEventError) as caught:
        read_event(item)
    assert "2026" not in str(caught.value)


@given(st.lists(json_values | st.dictionaries(fields, json_values, max_size=8).map(lambda d: {"id": "abc", **d})))
def test_no_page_whatever_is_in_it_stops_the_reading(items: list[Json]) -> None:
    batch = read_items(items)
    assert batch.seen == len(items)
    for event in batch.unreadable:
        event.raw.encode()
    for row in batch.rows:
        str(row.raw).encode()
