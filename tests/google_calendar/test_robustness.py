"""Whatever a client sends, the answer is one the API documents: never a failure of the simulator itself."""

from typing import Any

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devstack.google_calendar import Simulator
from tests import clients
from tests.google_calendar.conftest import AT_TEN, WEEKLY, Api

_scalars = st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=8)
_json = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_moments = st.fixed_dictionaries(
    {}, optional={"date": _scalars | st.just("2026-06-01"), "dateTime": _scalars, "timeZone": _scalars | st.just("UTC")}
)
_FIELDS = (
    "id", "status", "summary", "sequence", "attendees", "organizer", "eventType", "reminders", "extendedProperties",
    "visibility", "iCalUID", "workingLocationProperties",
)  # fmt: skip
_PARAMETERS = (
    "singleEvents", "showDeleted", "maxResults", "maxAttendees", "timeMin", "timeMax", "updatedMin", "orderBy", "q",
    "iCalUID", "eventTypes", "privateExtendedProperty", "timeZone", "fields", "pageToken", "syncToken",
)  # fmt: skip
_events = st.fixed_dictionaries(
    {},
    optional={
        "start": _json | _moments | st.sampled_from([AT_TEN["start"], WEEKLY["start"]]),
        "end": _json | _moments | st.sampled_from([AT_TEN["end"], WEEKLY["end"]]),
        "recurrence": _json
        | st.lists(st.sampled_from(["RRULE:FREQ=DAILY;COUNT=0", "RDATE:x", "EXDATE:20260601T000000Z"])),
        **dict.fromkeys(_FIELDS, _json),
    },
)
_texts = st.text(max_size=10) | st.sampled_from(["true", "0", "99999999999", "2026-06-01T00:00:00Z", "2026-06-01"])
_params = st.dictionaries(st.sampled_from(_PARAMETERS), _texts, max_size=4)
_quick = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def _documented(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code < 500, answer.text
    body: dict[str, Any] = answer.json()
    assert answer.status_code == 200 or body["error"]["code"] == answer.status_code
    return body


@_quick
@given(event=_events, change=_events)
def test_no_event_makes_the_server_fail(api: Api, event: dict[str, Any], change: dict[str, Any]) -> None:
    api.simulator.configure(quota_user_per_minute=0, quota_project_per_minute=0)
    created = _documented(api.call("POST", api.events, event))
    if "id" in created:
        _documented(api.call("PATCH", f"{api.events}/{created['id']}", change))
        _documented(api.call("PUT", f"{api.events}/{created['id']}", change))
    for params in ({"singleEvents": "true", "orderBy": "startTime"}, {"q": "x", "maxAttendees": 1, "timeZone": "UTC"}):
        _documented(api.call("GET", api.events, **params, maxResults=2500))
    _documented(api.call("GET", api.events, timeMin="2026-01-01T00:00:00Z", privateExtendedProperty="a=b"))


@_quick
@given(params=_params)
def test_no_query_makes_the_server_fail(api: Api, params: dict[str, Any]) -> None:
    api.simulator.configure(quota_user_per_minute=0, quota_project_per_minute=0)
    _documented(api.call("GET", api.events, **params))
    _documented(api.call("GET", "users/me/calendarList", **params))


def test_every_event_of_the_demo_world_can_be_listed_in_every_way(simulator_process: Simulator) -> None:
    simulator_process.reset(profile="demo", settings={"quota_user_per_minute": 0, "quota_project_per_minute": 0})
    nasty = next(c for c in simulator_process.calendars() if c.note == "nasty_values")
    with clients.client(trust_env=False, timeout=30) as http:
        api = Api(simulator_process, nasty.owner, http, nasty.id)
        plain, _ = api.sync(showDeleted="true")
        assert len([item for item in plain if item["status"] != "cancelled"]) == nasty.events
        for params in (
            {"singleEvents": "true", "orderBy": "startTime"},
            {"timeZone": "Asia/Tokyo", "maxAttendees": "1"},
            {"timeMin": "2020-01-01T00:00:00Z", "timeMax": "2030-01-01T00:00:00Z", "q": "agenda"},
            {"orderBy": "updated", "fields": "items(id,summary,start),nextSyncToken,nextPageToken"},
        ):
            assert api.sync(**params)[0]
