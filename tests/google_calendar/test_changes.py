"""Writing events: validation, tombstones, series and their exceptions, undelete, move, conditions."""

import pytest

from tests.google_calendar.conftest import ANA, AT_TEN, WEEKLY, Api, reason

SECOND = "20260316T080000Z"  # the second occurrence of WEEKLY
THIRD = "20260323T080000Z"


def test_an_inserted_event_has_the_fields_google_gives_it(api: Api) -> None:
    event = api.insert(summary="hello", location=None)
    assert event["kind"] == "calendar#event"
    assert event["status"] == "confirmed"
    assert event["iCalUID"] == f"{event['id']}@google.com"
    assert event["created"] == event["updated"] == "2026-06-01T00:00:00.000Z"
    assert event["organizer"] == {"email": ANA, "self": True}
    assert (event["sequence"], event["eventType"], event["reminders"]) == (0, "default", {"useDefault": True})
    assert "location" not in event
    assert api.get(event["id"]) == event


@pytest.mark.parametrize(
    ("event", "wanted"),
    [
        ({"end": None}, "required"),
        ({"start": None}, "required"),
        ({"end": {"date": "2026-06-02"}}, "invalid"),
        ({"end": {"dateTime": "2026-06-01T09:00:00Z"}}, "timeRangeEmpty"),
        ({"start": {"dateTime": "2026-06-01T10:00:00"}}, "invalid"),
        ({"start": {"dateTime": "soon", "timeZone": "UTC"}}, "invalid"),
        ({"start": {"dateTime": "2026-06-01T10:00:00", "timeZone": "Mars/Phobos"}}, "invalid"),
        ({"recurrence": ["RRULE:FREQ=DAILY"]}, "required"),
        ({**WEEKLY, "recurrence": ["RRULE:FREQ=SOMETIMES"]}, "invalid"),
        ({"id": "Not-Base32"}, "invalid"),
        ({"status": "maybe"}, "invalid"),
        ({"eventType": "fromGmail"}, "badRequest"),
    ],
)
def test_an_impossible_event_is_refused(api: Api, event: dict[str, object], wanted: str) -> None:
    answer = api.call("POST", api.events, {**AT_TEN, **event})
    assert (answer.status_code, reason(answer)) == (400, wanted)


def test_an_id_is_taken_even_by_a_deleted_event(api: Api) -> None:
    api.insert(id="taken0")
    api.delete("taken0")
    answer = api.call("POST", api.events, {**AT_TEN, "id": "taken0"})
    assert (answer.status_code, reason(answer)) == (409, "duplicate")


def test_a_deleted_event_is_a_bare_id_unless_deleted_events_were_asked_for(api: Api) -> None:
    event = api.insert(summary="doomed")
    _, plain = api.sync()
    _, asked = api.sync(showDeleted="true")
    api.delete(event["id"])
    (item,) = api.page(syncToken=plain)["items"]
    assert set(item) == {"kind", "etag", "id", "status"}
    (item,) = api.page(syncToken=asked, showDeleted="true")["items"]
    assert (item["status"], item["summary"]) == ("cancelled", "doomed")
    assert api.page()["items"] == []
    assert [item["id"] for item in api.page(showDeleted="true")["items"]] == [event["id"]]


def test_tombstones_can_be_made_bare_always(api: Api) -> None:
    event = api.insert(summary="doomed")
    api.delete(event["id"])
    api.simulator.configure(tombstones="bare")
    (item,) = api.page(showDeleted="true")["items"]
    assert set(item) == {"kind", "etag", "id", "status"}


def test_a_deleted_event_can_be_read_but_not_written_until_it_is_restored(api: Api) -> None:
    event = api.insert(summary="back soon")
    api.delete(event["id"])
    assert api.get(event["id"])["status"] == "cancelled"
    for verb, body in (("DELETE", None), ("PATCH", {"summary": "x"})):
        answer = api.call(verb, f"{api.events}/{event['id']}", body)
        assert (answer.status_code, reason(answer)) == (410, "deleted")
    _, token = api.sync()
    api.patch(event["id"], status="confirmed")
    (item,) = api.page(syncToken=token)["items"]
    assert (item["status"], item["summary"]) == ("confirmed", "back soon")


def test_deleting_an_instance_leaves_a_cancelled_exception_of_a_living_series(api: Api) -> None:
    series = api.insert(**WEEKLY)
    _, token = api.sync()
    api.delete(f"{series['id']}_{SECOND}")
    (item,) = api.page(syncToken=token)["items"]
    assert set(item) == {"kind", "etag", "id", "status", "recurringEventId", "originalStartTime"}
    assert item["id"] == f"{series['id']}_{SECOND}"
    assert item["recurringEventId"] == series["id"]
    assert [e["status"] for e in api.page()["items"]] == ["confirmed", "cancelled"], "listed without showDeleted too"
    api.simulator.advance(40 * 86_400)
    assert len(api.page()["items"]) == 2, "it lives as long as its series"


def test_cancelled_instances_can_be_as_sparse_as_clients_have_met_them(api: Api) -> None:
    series = api.insert(**WEEKLY)
    api.delete(f"{series['id']}_{SECOND}")
    api.simulator.configure(sparse_instances=True)
    assert set(api.page()["items"][1]) == {"kind", "etag", "id", "status"}


def test_a_moved_instance_keeps_its_id_and_original_start(api: Api) -> None:
    series = api.insert(**WEEKLY)
    moved = {"dateTime": "2026-03-20T15:00:00+01:00"}
    api.patch(f"{series['id']}_{SECOND}", start=moved, end={"dateTime": "2026-03-20T16:00:00+01:00"})
    items = api.page(singleEvents="true", orderBy="startTime")["items"]
    assert [item["id"].rpartition("_")[2] for item in items] == [
        "20260309T080000Z", SECOND, THIRD, "20260330T070000Z",
    ]  # fmt: skip
    assert items[1]["start"]["dateTime"] == "2026-03-20T15:00:00+01:00"
    assert items[1]["originalStartTime"]["dateTime"] == "2026-03-16T09:00:00+01:00"


def test_all_day_instances_are_named_by_their_date(api: Api) -> None:
    series = api.insert(
        start={"date": "2026-06-01"}, end={"date": "2026-06-02"}, recurrence=["RRULE:FREQ=DAILY;COUNT=3"]
    )
    instances = api.call("GET", f"{api.events}/{series['id']}/instances").json()["items"]
    assert [item["id"] for item in instances] == [f"{series['id']}_2026060{day}" for day in (1, 2, 3)]
    assert instances[1]["end"] == {"date": "2026-06-03"}


def test_instances_show_exceptions_in_place_and_cancelled_ones_on_request(api: Api) -> None:
    series = api.insert(**WEEKLY)
    path = f"{api.events}/{series['id']}/instances"
    api.delete(f"{series['id']}_{SECOND}")
    api.patch(f"{series['id']}_{THIRD}", summary="special")
    shown = api.call("GET", path).json()["items"]
    assert [item["summary"] for item in shown] == ["weekly", "special", "weekly"]
    assert len(api.call("GET", path, showDeleted="true").json()["items"]) == 4
    one = api.call("GET", path, originalStart="2026-03-23T09:00:00+01:00").json()["items"]
    assert [item["summary"] for item in one] == ["special"]
    paged = api.call("GET", path, maxResults=2).json()
    assert len(paged["items"]) == 2
    assert len(api.call("GET", path, maxResults=2, pageToken=paged["nextPageToken"]).json()["items"]) == 1


def test_an_instance_that_the_series_does_not_have_is_not_found(api: Api) -> None:
    series = api.insert(**WEEKLY)
    for suffix in ("20260317T080000Z", "20260316", "nonsense"):
        assert api.call("GET", f"{api.events}/{series['id']}_{suffix}").status_code == 404


def test_deleting_a_series_removes_its_exceptions_without_mentioning_them(api: Api) -> None:
    series = api.insert(**WEEKLY)
    api.delete(f"{series['id']}_{SECOND}")
    api.patch(f"{series['id']}_{THIRD}", summary="special")
    _, token = api.sync()
    api.delete(series["id"])
    assert [item["id"] for item in api.page(syncToken=token)["items"]] == [series["id"]]
    assert [item["id"] for item in api.page(showDeleted="true")["items"]] == [series["id"]]


def test_restoring_a_series_brings_its_exceptions_back(api: Api) -> None:
    series = api.insert(**WEEKLY)
    api.patch(f"{series['id']}_{THIRD}", summary="special")
    api.delete(series["id"])
    _, token = api.sync()
    api.patch(series["id"], status="confirmed")
    assert [item["summary"] for item in api.page(syncToken=token)["items"]] == ["weekly", "special"]


def test_an_exception_whose_slot_the_series_loses_is_cancelled(api: Api) -> None:
    series = api.insert(**WEEKLY)
    api.patch(f"{series['id']}_{THIRD}", summary="special")
    _, token = api.sync()
    api.patch(series["id"], recurrence=["RRULE:FREQ=WEEKLY;COUNT=2"])
    changed = {item["id"]: item["status"] for item in api.page(syncToken=token)["items"]}
    assert changed == {series["id"]: "confirmed", f"{series['id']}_{THIRD}": "cancelled"}


def test_an_expanded_sync_learns_which_instances_a_shortened_series_lost(api: Api) -> None:
    series = api.insert(**WEEKLY)
    _, token = api.sync(singleEvents="true")
    api.patch(series["id"], recurrence=["RRULE:FREQ=WEEKLY;COUNT=2"])
    statuses = {item["id"]: item["status"] for item in api.page(singleEvents="true", syncToken=token)["items"]}
    assert statuses[f"{series['id']}_{THIRD}"] == "cancelled"
    assert sorted(statuses.values()) == ["cancelled", "cancelled", "confirmed", "confirmed"]


def test_an_expanded_sync_learns_of_a_deleted_exception_outside_the_slots_of_its_series(api: Api) -> None:
    series = api.insert(**WEEKLY)
    moved = api.patch(f"{series['id']}_{THIRD}", summary="special")["id"]
    api.patch(series["id"], recurrence=["RRULE:FREQ=WEEKLY;COUNT=2"])
    api.patch(moved, status="confirmed")
    items, token = api.sync(singleEvents="true")
    assert moved in [item["id"] for item in items]
    api.delete(series["id"])
    statuses = {item["id"]: item["status"] for item in api.page(singleEvents="true", syncToken=token)["items"]}
    assert statuses == dict.fromkeys([item["id"] for item in items], "cancelled")


def test_an_exdate_takes_an_occurrence_out(api: Api) -> None:
    series = api.insert(
        **{**WEEKLY, "recurrence": [*WEEKLY["recurrence"], "EXDATE;TZID=Europe/Berlin:20260316T090000"]}
    )
    items = api.page(singleEvents="true")["items"]
    assert f"{series['id']}_{SECOND}" not in [item["id"] for item in items]
    assert len(items) == 3


def test_moving_an_event_leaves_nothing_but_its_id_behind(api: Api) -> None:
    other = api.simulator.add_calendar(ANA, "Other")
    event = api.insert(summary="travels")
    _, token = api.sync(showDeleted="true")
    answer = api.call("POST", f"{api.events}/{event['id']}/move", destination=other)
    assert answer.json()["organizer"]["email"] == other
    (item,) = api.page(syncToken=token, showDeleted="true")["items"]
    assert set(item) == {"kind", "etag", "id", "status"}
    assert api.at(other).get(event["id"])["summary"] == "travels"


def test_a_series_moves_with_its_exceptions_and_an_instance_not_at_all(api: Api) -> None:
    other = api.simulator.add_calendar(ANA, "Other")
    series = api.insert(**WEEKLY)
    api.patch(f"{series['id']}_{THIRD}", summary="special")
    answer = api.call("POST", f"{api.events}/{series['id']}_{THIRD}/move", destination=other)
    assert (answer.status_code, reason(answer)) == (403, "cannotChangeOrganizerOfInstance")
    api.call("POST", f"{api.events}/{series['id']}/move", destination=other)
    assert [item["summary"] for item in api.at(other).page()["items"]] == ["weekly", "special"]
    assert api.page()["items"] == []


def test_an_update_replaces_the_whole_event_and_counts_a_sequence_for_new_times(api: Api) -> None:
    event = api.insert(summary="old", location="somewhere")
    later = {"start": {"dateTime": "2026-06-01T12:00:00Z"}, "end": {"dateTime": "2026-06-01T13:00:00Z"}}
    updated = api.call("PUT", f"{api.events}/{event['id']}", {"summary": "new", **later}).json()
    assert (updated["summary"], updated["sequence"]) == ("new", 1)
    assert "location" not in updated
    assert updated["iCalUID"] == event["iCalUID"]


def test_a_patch_merges_objects_and_removes_nulls(api: Api) -> None:
    event = api.insert(location="here", extendedProperties={"private": {"a": "1", "b": "2"}})
    patched = api.patch(event["id"], location=None, extendedProperties={"private": {"b": None, "c": "3"}})
    assert "location" not in patched
    assert patched["extendedProperties"] == {"private": {"a": "1", "c": "3"}}


def test_a_change_of_reminders_is_reported_but_does_not_touch_updated(api: Api) -> None:
    event = api.insert()
    _, token = api.sync()
    api.simulator.advance(60)
    patched = api.patch(event["id"], reminders={"useDefault": False})
    assert patched["updated"] == event["updated"]
    assert patched["etag"] != event["etag"]
    assert [item["id"] for item in api.page(syncToken=token)["items"]] == [event["id"]]


def test_a_patch_that_changes_nothing_is_no_change(api: Api) -> None:
    event = api.insert(summary="same")
    _, token = api.sync()
    api.patch(event["id"], summary="same")
    assert api.page(syncToken=token)["items"] == []


def test_a_write_with_the_etag_of_another_version_is_refused(api: Api) -> None:
    event = api.insert()
    api.patch(event["id"], summary="newer")
    for verb, body in (("PATCH", {"summary": "x"}), ("PUT", AT_TEN), ("DELETE", None)):
        answer = api.call(verb, f"{api.events}/{event['id']}", body, headers={"If-Match": event["etag"]})
        assert (answer.status_code, reason(answer)) == (412, "conditionNotMet")
    etag = api.get(event["id"])["etag"]
    answer = api.call("PATCH", f"{api.events}/{event['id']}", {"summary": "x"}, headers={"If-Match": etag})
    assert answer.status_code == 200


def test_an_import_of_a_known_uid_updates_the_copy(api: Api) -> None:
    body = {**AT_TEN, "iCalUID": "uid@example.org", "summary": "one", "organizer": {"email": "boss@example.org"}}
    first = api.call("POST", f"{api.events}/import", body).json()
    second = api.call("POST", f"{api.events}/import", {**body, "summary": "two"}).json()
    assert first["organizer"] == {"email": "boss@example.org"}
    assert (second["id"], second["summary"]) == (first["id"], "two")
    assert len(api.page()["items"]) == 1


def test_quick_add_creates_an_event_with_the_text_as_summary(api: Api) -> None:
    event = api.call("POST", f"{api.events}/quickAdd", text="Lunch with Ben").json()
    assert api.get(event["id"])["summary"] == "Lunch with Ben"


def test_readers_may_not_write(api: Api, ben: Api) -> None:
    api.simulator.share(ANA, ben.email, "reader")
    answer = ben.call("POST", f"calendars/{ANA}/events", AT_TEN)
    assert (answer.status_code, reason(answer)) == (403, "requiredAccessLevel")


def test_a_body_that_is_no_json_object_is_refused(api: Api) -> None:
    for body in ([1], "text"):
        answer = api.call("POST", api.events, body)
        assert (answer.status_code, reason(answer)) == (400, "parseError")


def test_clearing_a_primary_calendar_deletes_every_event(api: Api) -> None:
    series = api.insert(**WEEKLY)
    api.patch(f"{series['id']}_{THIRD}", summary="special")
    api.insert()
    _, token = api.sync()
    assert api.call("POST", f"calendars/{ANA}/clear").status_code == 204
    assert {item["status"] for item in api.page(syncToken=token)["items"]} == {"cancelled"}
    assert api.page()["items"] == []
