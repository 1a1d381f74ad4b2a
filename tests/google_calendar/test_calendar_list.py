"""calendarList.* and calendars.*: lists, their sync tokens, and what a list never reports."""

from typing import Any
from urllib.parse import quote

import pytest

from tests.google_calendar.conftest import ANA, Api, reason

LIST = "users/me/calendarList"


def _entries(api: Api, **params: Any) -> list[dict[str, Any]]:
    return list(api.call("GET", LIST, **params).json()["items"])


def _token(api: Api, **params: Any) -> str:
    return str(api.call("GET", LIST, **params).json()["nextSyncToken"])


def test_the_list_pages_and_ends_with_a_sync_token(api: Api) -> None:
    ids = [api.simulator.add_calendar(ANA, f"Calendar {number}") for number in range(4)]
    first = api.call("GET", LIST, maxResults=4).json()
    last = api.call("GET", LIST, maxResults=4, pageToken=first["nextPageToken"]).json()
    assert "nextSyncToken" not in first
    assert "nextSyncToken" in last
    listed = [entry["id"] for entry in first["items"] + last["items"]]
    assert set(ids) < set(listed)
    assert len(listed) == len(set(listed)) == len(_entries(api))


def test_new_and_removed_calendars_show_up_incrementally(api: Api) -> None:
    doomed = api.simulator.add_calendar(ANA, "Doomed")
    token = _token(api)
    added = api.simulator.add_calendar(ANA, "Added")
    api.simulator.remove_calendar(doomed)
    changed = {str(entry["id"]): entry.get("deleted", False) for entry in _entries(api, syncToken=token)}
    assert changed == {added: False, doomed: True}
    assert doomed not in [entry["id"] for entry in _entries(api)]
    assert doomed in [entry["id"] for entry in _entries(api, showDeleted="true")]
    assert api.call("GET", f"calendars/{quote(doomed)}/events").status_code == 404


def test_read_only_changes_are_not_reported_incrementally(api: Api, ben: Api) -> None:
    calendar = api.simulator.add_calendar(ANA, "Before")
    api.simulator.share(calendar, ben.email, "writer")
    token = _token(ben)
    api.simulator.rename(calendar, "After")
    api.simulator.share(calendar, ben.email, "reader")
    assert _entries(ben, syncToken=token) == []
    (entry,) = [entry for entry in _entries(ben) if entry["id"] == calendar]
    assert (entry["summary"], entry["accessRole"]) == ("After", "reader")


def test_what_a_user_sets_about_an_entry_is_reported(api: Api) -> None:
    calendar = api.simulator.add_calendar(ANA, "Mine")
    token = _token(api)
    api.call("PATCH", f"{LIST}/{quote(calendar)}", {"summaryOverride": "Renamed by me", "selected": False})
    (entry,) = _entries(api, syncToken=token)
    assert entry["summaryOverride"] == "Renamed by me"
    assert "selected" not in entry


def test_hidden_entries_are_left_out_except_incrementally(api: Api) -> None:
    calendar = api.simulator.add_calendar(ANA, "Hidden")
    token = _token(api)
    api.call("PATCH", f"{LIST}/{quote(calendar)}", {"hidden": True})
    assert calendar not in [entry["id"] for entry in _entries(api)]
    assert calendar in [entry["id"] for entry in _entries(api, showHidden="true")]
    assert [entry["hidden"] for entry in _entries(api, syncToken=token)] == [True]


@pytest.mark.parametrize(
    "restriction",
    [
        {"minAccessRole": "owner"},
        {"showOwnOrganizationOnly": "true"},
        {"showDeleted": "false"},
        {"showHidden": "false"},
    ],
)
def test_a_sync_token_with_a_restriction_is_refused(api: Api, restriction: dict[str, Any]) -> None:
    answer = api.call("GET", LIST, syncToken=_token(api), **restriction)
    assert (answer.status_code, reason(answer)) == (400, "syncTokenWithRequestRestrictions")


def test_an_invalidated_list_token_answers_410_and_one_of_another_user_400(api: Api, ben: Api) -> None:
    token = _token(api)
    assert ben.call("GET", LIST, syncToken=token).status_code == 400
    api.simulator.expire_list_tokens(ANA)
    answer = api.call("GET", LIST, syncToken=token)
    assert (answer.status_code, reason(answer)) == (410, "fullSyncRequired")


def test_the_least_access_role_filters_the_list(api: Api, ben: Api) -> None:
    calendar = api.simulator.add_calendar(ANA, "Shared")
    api.simulator.share(calendar, ben.email, "reader")
    assert [entry["id"] for entry in _entries(ben, minAccessRole="owner")] == [ben.email]


def test_a_calendar_leaves_the_list_and_comes_back_while_access_stays(api: Api) -> None:
    calendar = api.simulator.add_calendar(ANA, "Coming and going")
    path = f"{LIST}/{quote(calendar)}"
    assert api.call("DELETE", path).status_code == 204
    assert api.call("GET", path).status_code == 404
    assert api.at(calendar).page()["items"] == []
    assert api.call("POST", LIST, {"id": calendar}).json()["accessRole"] == "owner"
    assert api.call("GET", path).status_code == 200
    assert api.call("DELETE", f"{LIST}/primary").status_code == 403


def test_calendars_are_created_changed_and_deleted(api: Api) -> None:
    created = api.call("POST", "calendars", {"summary": "New", "timeZone": "Asia/Tokyo"}).json()
    path = f"calendars/{quote(created['id'])}"
    assert api.call("PATCH", path, {"summary": "Newer"}).json()["summary"] == "Newer"
    stale = api.call("PATCH", path, {"summary": "x"}, headers={"If-Match": created["etag"]})
    assert (stale.status_code, reason(stale)) == (412, "conditionNotMet")
    assert api.call("GET", path).json()["timeZone"] == "Asia/Tokyo"
    assert api.call("DELETE", path).status_code == 204
    assert api.call("GET", path).status_code == 404
    assert api.call("DELETE", "calendars/primary").status_code == 403


def test_a_method_the_simulator_lacks_says_so(api: Api) -> None:
    answer = api.call("GET", "calendars/primary/acl")
    assert (answer.status_code, reason(answer)) == (501, "notImplemented")
    assert "acl" in answer.json()["error"]["message"]
