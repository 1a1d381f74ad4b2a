"""events.list: pages, sync tokens, parameters, windows, order, partial responses (discovery document, guides/sync)."""

from datetime import UTC, datetime
from typing import Any

import pytest

from tests.google_calendar.conftest import ANA, AT_TEN, WEEKLY, Api

DAY = 86_400


def _fill(api: Api, count: int) -> list[str]:
    results = api.simulator.edit(ANA, [{"op": "insert", "event": {"summary": str(n), **AT_TEN}} for n in range(count)])
    return [result["id"] for result in results if result]


def _ids(items: list[dict[str, Any]]) -> list[str]:
    return [item["id"] for item in items]


def test_a_page_holds_250_events_by_default_and_never_more_than_2500(api: Api) -> None:
    _fill(api, 2600)
    assert len(api.page()["items"]) == 250
    assert len(api.page(maxResults=9999)["items"]) == 2500


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
def test_every_page_but_the_last_has_a_page_token_and_only_the_last_a_sync_token(api: Api, size: int) -> None:
    _fill(api, 7)
    pages = api.pages(maxResults=size)
    assert all("nextPageToken" in page and "nextSyncToken" not in page for page in pages[:-1])
    assert "nextSyncToken" in pages[-1]
    assert "nextPageToken" not in pages[-1]
    assert sum(len(page["items"]) for page in pages) == 7


def test_an_unchanged_calendar_answers_an_empty_page_with_a_sync_token(api: Api) -> None:
    _fill(api, 3)
    _, token = api.sync()
    assert api.page(syncToken=token)["items"] == []


def test_a_sync_token_brings_exactly_what_changed_since(api: Api) -> None:
    first, second, third = _fill(api, 3)
    _, token = api.sync()
    api.patch(second, summary="changed")
    api.delete(third)
    created = api.insert(summary="new")
    items, _ = api.sync(syncToken=token)
    assert [(item["id"], item["status"]) for item in items] == [
        (second, "confirmed"),
        (third, "cancelled"),
        (created["id"], "confirmed"),
    ]
    assert first not in _ids(items)


def test_changes_made_while_paging_are_in_the_next_incremental_listing(api: Api) -> None:
    ids = _fill(api, 6)
    page = api.page(maxResults=2)
    api.patch(ids[0], summary="changed behind the page")
    api.delete(ids[5])
    created = api.insert(summary="created while paging")
    seen = list(page["items"])
    while "nextPageToken" in page:
        page = api.page(maxResults=2, pageToken=page["nextPageToken"])
        seen += page["items"]
    assert _ids(seen) == ids[:5]
    items, _ = api.sync(syncToken=page["nextSyncToken"])
    assert sorted(_ids(items)) == sorted([ids[0], ids[5], created["id"]])


def test_an_event_that_changes_while_an_incremental_listing_is_paged_comes_in_the_next_one(api: Api) -> None:
    ids = _fill(api, 4)
    _, token = api.sync()
    for event_id in ids:
        api.patch(event_id, summary="once")
    page = api.page(maxResults=2, syncToken=token)
    api.patch(ids[3], summary="twice")
    rest = api.page(maxResults=2, syncToken=token, pageToken=page["nextPageToken"])
    items, _ = api.sync(syncToken=rest["nextSyncToken"])
    assert [item["summary"] for item in items] == ["twice"]


@pytest.mark.parametrize(
    "restriction",
    [
        {"iCalUID": "x@google.com"},
        {"orderBy": "updated"},
        {"privateExtendedProperty": "a=b"},
        {"q": "text"},
        {"sharedExtendedProperty": "a=b"},
        {"timeMin": "2026-01-01T00:00:00Z"},
        {"timeMax": "2026-01-01T00:00:00Z"},
        {"updatedMin": "2026-05-30T00:00:00Z"},
        {"showDeleted": "false"},
    ],
    ids=lambda restriction: next(iter(restriction)),
)
def test_a_sync_token_with_another_restriction_is_refused(api: Api, restriction: dict[str, str]) -> None:
    _, token = api.sync()
    assert api.refused(400, syncToken=token, **restriction) == "syncTokenWithRequestRestrictions"


def test_a_malformed_sync_token_answers_400_and_an_invalidated_one_410(api: Api) -> None:
    _, token = api.sync()
    assert api.refused(400, syncToken="nonsense") == "invalid"
    assert api.refused(400, syncToken="x" + token) == "invalid"
    api.simulator.expire_sync_tokens(ANA)
    assert api.refused(410, syncToken=token) == "fullSyncRequired"
    _, fresh = api.sync()
    assert api.page(syncToken=fresh)["items"] == []


def test_a_sync_token_of_another_calendar_is_refused(api: Api) -> None:
    _, token = api.sync()
    other = api.simulator.add_calendar(ANA, "Other")
    assert api.at(other).refused(400, syncToken=token) == "invalid"


def test_a_sync_token_dies_with_a_change_of_the_callers_access_role(api: Api, ben: Api) -> None:
    shared = api.simulator.add_calendar(ANA, "Shared")
    api.simulator.share(shared, ben.email, "reader")
    _, token = ben.at(shared).sync()
    api.simulator.share(shared, ben.email, "freeBusyReader")
    assert ben.at(shared).refused(410, syncToken=token) == "fullSyncRequired"


def test_a_sync_token_older_than_the_memory_of_deletions_answers_410(api: Api) -> None:
    (event_id,) = _fill(api, 1)
    _, token = api.sync()
    api.delete(event_id)
    api.simulator.advance(29 * DAY)
    assert _ids(api.page(syncToken=token)["items"]) == [event_id]
    api.simulator.advance(2 * DAY)
    assert api.refused(410, syncToken=token) == "fullSyncRequired"
    assert api.page(showDeleted="true")["items"] == []


def test_a_restarted_world_answers_410_to_tokens_of_its_predecessor(api: Api) -> None:
    _, token = api.sync()
    api.simulator.reset(clock="2026-06-01T00:00:00Z", frozen=True)
    assert api.refused(410, syncToken=token) == "fullSyncRequired"


def test_a_calendar_can_answer_410_to_every_sync_token_and_still_sync_in_full(api: Api) -> None:
    ids = _fill(api, 2)
    api.simulator.set_always_gone(ANA)
    for _ in range(2):
        items, token = api.sync()
        assert _ids(items) == ids
        assert api.refused(410, syncToken=token) == "fullSyncRequired"


def test_a_page_token_expires_and_belongs_to_its_own_calendar(api: Api) -> None:
    _fill(api, 3)
    token = api.page(maxResults=1)["nextPageToken"]
    other = api.simulator.add_calendar(ANA, "Other")
    assert api.at(other).refused(400, maxResults=1, pageToken=token) == "invalid"
    assert api.refused(400, maxResults=1, pageToken="nonsense") == "invalid"
    api.simulator.advance(3601)
    assert api.refused(400, maxResults=1, pageToken=token) == "invalid"


def test_invalidation_in_the_middle_of_an_incremental_listing_answers_410_on_the_next_page(api: Api) -> None:
    ids = _fill(api, 3)
    _, token = api.sync()
    for event_id in ids:
        api.patch(event_id, summary="changed")
    page = api.page(maxResults=1, syncToken=token)
    api.simulator.expire_sync_tokens(ANA)
    assert api.refused(410, maxResults=1, syncToken=token, pageToken=page["nextPageToken"]) == "fullSyncRequired"


def test_parameter_drift_is_counted_and_answered_by_default(api: Api) -> None:
    _, token = api.sync(singleEvents="false")
    api.page(syncToken=token)
    assert api.simulator.counts().drift == {}
    api.page(syncToken=token, singleEvents="true")
    assert api.simulator.counts().drift == {"sync_parameters": 1}


def test_parameter_drift_can_be_refused_or_hide_every_change(api: Api) -> None:
    _, token = api.sync()
    _fill(api, 1)
    api.simulator.configure(drift="reject")
    assert api.refused(400, syncToken=token, showDeleted="true") == "badRequest"
    api.simulator.configure(drift="odd")
    page = api.page(syncToken=token, showDeleted="true")
    assert (page["items"], page["nextSyncToken"]) == ([], token)
    assert api.simulator.counts().drift == {"sync_parameters": 2}


def test_a_page_token_without_its_sync_token_is_counted_as_drift(api: Api) -> None:
    ids = _fill(api, 2)
    _, token = api.sync()
    for event_id in ids:
        api.patch(event_id, summary="changed")
    page = api.page(maxResults=1, syncToken=token)
    api.page(maxResults=1, pageToken=page["nextPageToken"])
    assert api.simulator.counts().drift == {"page_sync_token": 1}


def test_page_size_and_fields_may_change_between_the_requests_of_a_sync(api: Api) -> None:
    _fill(api, 3)
    _, token = api.sync(maxResults=2)
    api.page(syncToken=token, maxResults=5, fields="items(id),nextSyncToken")
    assert api.simulator.counts().drift == {}


def test_time_min_bounds_the_end_and_time_max_the_start_both_exclusively(api: Api) -> None:
    (event_id,) = _fill(api, 1)  # from ten to eleven
    assert _ids(api.page(timeMin="2026-06-01T10:59:59Z", timeMax="2026-06-01T12:00:00Z")["items"]) == [event_id]
    assert api.page(timeMin="2026-06-01T11:00:00Z")["items"] == []
    assert api.page(timeMax="2026-06-01T10:00:00Z")["items"] == []
    assert _ids(api.page(timeMax="2026-06-01T10:00:01Z")["items"]) == [event_id]
    assert api.refused(400, timeMin="2026-06-02T00:00:00Z", timeMax="2026-06-01T00:00:00Z") == "timeRangeEmpty"
    assert api.refused(400, timeMin="2026-06-02T00:00:00") == "badRequest"


def test_the_window_of_the_initial_listing_is_frozen_into_the_sync_token(api: Api) -> None:
    (inside,) = _fill(api, 1)
    _, token = api.sync(timeMin="2026-06-01T00:00:00Z", timeMax="2026-07-01T00:00:00Z")
    api.insert(start={"date": "2027-01-01"}, end={"date": "2027-01-02"})
    moved = {"start": {"dateTime": "2026-12-01T10:00:00Z"}, "end": {"dateTime": "2026-12-01T11:00:00Z"}}
    api.patch(inside, **moved)
    items, _ = api.sync(syncToken=token)
    assert _ids(items) == [inside], "an event that leaves the window is reported, one that never was in it is not"


def test_updated_min_brings_deletions_too_and_is_refused_beyond_the_horizon(api: Api) -> None:
    old, gone = _fill(api, 2)
    api.simulator.advance(DAY)
    api.delete(gone)
    created = api.insert()
    assert _ids(api.page(updatedMin="2026-06-01T12:00:00Z")["items"]) == [gone, created["id"]]
    assert api.refused(410, updatedMin="2026-04-01T00:00:00Z") == "updatedMinTooLongAgo"
    assert old


def test_single_events_expands_series_and_can_order_by_start_time(api: Api) -> None:
    series = api.insert(**WEEKLY)
    api.insert(summary="early", start={"date": "2026-03-01"}, end={"date": "2026-03-02"})
    items = api.page(singleEvents="true", orderBy="startTime")["items"]
    assert [item["summary"] for item in items] == ["early", "weekly", "weekly", "weekly", "weekly"]
    assert all("recurrence" not in item for item in items)
    assert {item["recurringEventId"] for item in items[1:]} == {series["id"]}
    assert api.refused(400, orderBy="startTime") == "badRequest"


def test_an_expanded_listing_pages_like_any_other(api: Api) -> None:
    api.insert(**{**WEEKLY, "recurrence": ["RRULE:FREQ=DAILY"]})
    whole = _ids(api.page(singleEvents="true", maxResults=2500)["items"])
    paged = [item["id"] for page in api.pages(singleEvents="true", maxResults=100) for item in page["items"]]
    assert paged == whole
    assert len(whole) == 730, "an endless series is bounded"


def test_a_weekly_series_keeps_its_local_time_across_a_change_of_the_clocks(api: Api) -> None:
    api.insert(**WEEKLY)
    items = api.page(singleEvents="true", orderBy="startTime", timeZone="UTC")["items"]
    assert [item["start"]["dateTime"] for item in items] == [
        "2026-03-09T08:00:00Z",
        "2026-03-16T08:00:00Z",
        "2026-03-23T08:00:00Z",
        "2026-03-30T07:00:00Z",
    ]
    assert [item["id"].rpartition("_")[2] for item in items][-1] == "20260330T070000Z"


def test_order_by_updated_is_ascending(api: Api) -> None:
    first, second = _fill(api, 2)
    api.simulator.advance(60)
    api.patch(first, summary="later")
    assert _ids(api.page(orderBy="updated")["items"]) == [second, first]


def test_q_searches_summaries_and_people_regardless_of_case(api: Api) -> None:
    found = api.insert(summary="Quarterly REVIEW", attendees=[{"email": "guest@example.org"}])
    api.insert(summary="other")
    assert _ids(api.page(q="review guest@example")["items"]) == [found["id"]]


def test_events_are_found_by_icaluid_type_and_extended_property(api: Api) -> None:
    plain = api.insert(extendedProperties={"private": {"ticket": "42"}, "shared": {"team": "blue"}})
    focus = api.insert(eventType="focusTime")
    assert _ids(api.page(iCalUID=plain["iCalUID"])["items"]) == [plain["id"]]
    assert _ids(api.page(eventTypes="focusTime")["items"]) == [focus["id"]]
    assert _ids(api.page(eventTypes=["focusTime", "default"])["items"]) == [plain["id"], focus["id"]]
    assert _ids(api.page(privateExtendedProperty="ticket=42")["items"]) == [plain["id"]]
    assert api.page(sharedExtendedProperty="team=red")["items"] == []


def test_max_attendees_keeps_only_the_participant_and_says_so(api: Api) -> None:
    guests = [{"email": ANA, "self": True}, {"email": "a@example.org"}, {"email": "b@example.org"}]
    api.insert(attendees=guests)
    (item,) = api.page(maxAttendees=2)["items"]
    assert item["attendeesOmitted"] is True
    assert item["attendees"] == guests[:1]
    (item,) = api.page(maxAttendees=3)["items"]
    assert item["attendees"] == guests


def test_the_time_zone_parameter_expresses_times_in_that_zone(api: Api) -> None:
    _fill(api, 1)
    page = api.page(timeZone="Asia/Tokyo")
    assert page["timeZone"] == "Asia/Tokyo"
    assert page["items"][0]["start"]["dateTime"] == "2026-06-01T19:00:00+09:00"
    assert datetime.fromisoformat(page["items"][0]["start"]["dateTime"]) == datetime(2026, 6, 1, 10, tzinfo=UTC)
    assert api.refused(400, timeZone="Mars/Phobos") == "invalid"


def test_fields_reduces_an_answer_to_what_it_names(api: Api) -> None:
    (event_id,) = _fill(api, 1)
    page = api.page(fields="items(id,start/dateTime),nextSyncToken")
    assert set(page) == {"items", "nextSyncToken"}
    assert page["items"] == [{"id": event_id, "start": {"dateTime": api.get(event_id)["start"]["dateTime"]}}]
    assert set(api.page(fields="items/id")) == {"items"}, "a mask without the token loses it"
    assert set(api.page(fields="*")) == set(api.page())


@pytest.mark.parametrize("mask", ["items(id", "items)", "nextSyncTokn", "items(idd)", ","])
def test_a_mask_that_cannot_be_is_refused(api: Api, mask: str) -> None:
    assert api.refused(400, fields=mask) == "invalidParameter"


def test_an_unchanged_listing_answers_304_to_its_etag(api: Api) -> None:
    _fill(api, 1)
    etag = api.page()["etag"]
    answer = api.call("GET", api.events, headers={"If-None-Match": etag})
    assert (answer.status_code, answer.content) == (304, b"")
    _fill(api, 1)
    assert api.call("GET", api.events, headers={"If-None-Match": etag}).status_code == 200


def test_gzip_needs_the_word_in_the_user_agent_too(api: Api) -> None:
    _fill(api, 5)
    plain = api.call("GET", api.events, headers={"Accept-Encoding": "gzip", "User-Agent": "client"})
    packed = api.call("GET", api.events, headers={"Accept-Encoding": "gzip", "User-Agent": "client (gzip)"})
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.json() == plain.json()


@pytest.mark.parametrize(
    "params", [{"maxResults": "0"}, {"maxResults": "x"}, {"singleEvents": "yes"}, {"maxAttendees": "0"}]
)
def test_a_parameter_of_the_wrong_type_is_refused(api: Api, params: dict[str, str]) -> None:
    assert api.refused(400, **params) == "invalidParameter"


def test_a_calendar_id_may_contain_reserved_characters(api: Api) -> None:
    strange = api.simulator.add_calendar(ANA, "Strange", id="en.german#holiday/x@group.v.calendar.google.com")
    api.simulator.put_raw(strange, [{"summary": "there", **AT_TEN}])
    assert [item["summary"] for item in api.at(strange).page()["items"]] == ["there"]


def test_a_calendar_the_user_may_not_see_is_not_found(api: Api, ben: Api) -> None:
    assert ben.at(ANA).refused(404) == "notFound"
    assert ben.at("nobody@example.com").refused(404) == "notFound"
    assert api.at(ANA).page()["summary"] == ANA


def test_readers_see_private_events_as_nameless_blocks_and_free_busy_readers_only_times(api: Api, ben: Api) -> None:
    api.insert(summary="secret", visibility="private", description="details")
    api.insert(summary="open", description="details")
    api.simulator.share(ANA, ben.email, "reader")
    private, public = ben.at(ANA).page()["items"]
    assert "summary" not in private
    assert "description" not in private
    assert private["visibility"] == "private"
    assert public["summary"] == "open"
    api.simulator.share(ANA, ben.email, "freeBusyReader")
    page = ben.at(ANA).page()
    assert page["accessRole"] == "freeBusyReader"
    assert all(set(item) <= {"kind", "etag", "id", "status", "start", "end", "transparency"} for item in page["items"])


def test_the_same_event_id_may_exist_in_two_calendars(api: Api) -> None:
    other = api.simulator.add_calendar(ANA, "Other")
    api.insert(id="samesame", summary="one")
    api.at(other).insert(id="samesame", summary="two")
    assert (api.get("samesame")["summary"], api.at(other).get("samesame")["summary"]) == ("one", "two")


def test_values_that_break_readers_go_over_the_wire_as_they_are(api: Api) -> None:
    api.simulator.put_raw(
        ANA, [{"summary": "a\u0000b"}, {"summary": "lone \ud83d", **AT_TEN}, {"start": {"date": "0000-01-01"}}]
    )
    body = api.call("GET", api.events).content
    assert b"a\\u0000b" in body
    assert b"\\ud83d" in body
    assert len(api.page(timeMin="2026-01-01T00:00:00Z", singleEvents="true", orderBy="startTime")["items"]) == 3
