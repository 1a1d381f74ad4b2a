"""Quotas, scripted faults, counters and the control plane."""

import time

import httpx
import pytest

from devstack.google_calendar import SimulatorError
from tests.google_calendar.conftest import ANA, AT_TEN, Api, reason


def _fill(api: Api, count: int) -> None:
    api.simulator.edit(ANA, [{"op": "insert", "event": AT_TEN}] * count)


def test_a_user_over_the_limit_is_refused_until_the_window_slides_on(api: Api, ben: Api) -> None:
    api.simulator.configure(quota_user_per_minute=3)
    for _ in range(3):
        api.page()
    answer = api.call("GET", api.events)
    assert (answer.status_code, reason(answer)) == (403, "userRateLimitExceeded")
    assert answer.json()["error"]["errors"][0]["domain"] == "usageLimits"
    assert "retry-after" not in answer.headers
    assert ben.page()["items"] == []
    api.simulator.advance(60)
    api.page()


def test_the_project_limit_is_shared_by_all_users(api: Api, ben: Api) -> None:
    api.simulator.configure(quota_project_per_minute=2)
    api.page()
    ben.page()
    answer = api.call("GET", api.events)
    assert (answer.status_code, reason(answer)) == (403, "rateLimitExceeded")


def test_limits_can_answer_429_with_retry_after(api: Api) -> None:
    api.simulator.configure(quota_user_per_minute=1, quota_status=429, retry_after=30)
    api.page()
    answer = api.call("GET", api.events)
    assert (answer.status_code, reason(answer), answer.headers["retry-after"]) == (429, "rateLimitExceeded", "30")


def test_a_patch_costs_three_units_and_a_daily_cap_lasts_until_midnight(api: Api) -> None:
    event = api.insert()
    api.simulator.configure(quota_project_per_day=5)
    api.patch(event["id"], summary="x")
    api.page()
    answer = api.call("GET", api.events)
    assert (answer.status_code, reason(answer)) == (403, "dailyLimitExceeded"), "one insert, one patch, one listing"
    api.simulator.advance(86_400)
    api.page()


def test_the_default_limits_are_the_documented_ones(api: Api) -> None:
    for _ in range(600):
        api.call("GET", "colors")
    assert reason(api.call("GET", "colors")) == "userRateLimitExceeded"


@pytest.mark.parametrize(
    ("fault", "status", "wanted"),
    [
        ({"kind": "error"}, 500, "backendError"),
        ({"kind": "error", "status": 503}, 503, "backendError"),
        ({"kind": "gone"}, 410, "fullSyncRequired"),
        ({"kind": "unauthorized"}, 401, "authError"),
        ({"kind": "forbidden", "reason": "notACalendarUser"}, 403, "notACalendarUser"),
        ({"kind": "rate_limited", "reason": "quotaExceeded"}, 403, "quotaExceeded"),
        ({"kind": "rate_limited", "status": 429, "retry_after": 7}, 429, "rateLimitExceeded"),
        ({"kind": "not_found"}, 404, "notFound"),
    ],
)
def test_a_scripted_error_is_answered_and_counted(api: Api, fault: dict[str, object], status: int, wanted: str) -> None:
    api.simulator.add_fault(str(fault.pop("kind")), times=1, **fault)
    assert api.refused(status) == wanted
    assert api.page()["items"] == []
    assert api.simulator.counts().count("events.list", status=status) == 1


def test_a_fault_meets_only_the_calls_its_rule_names(api: Api, ben: Api) -> None:
    _fill(api, 4)
    _, token = api.sync()
    api.simulator.add_fault("error", method="events.list", user=ANA, calendar=ANA, page=2, incremental=False)
    assert ben.page()["items"] == []
    api.page(syncToken=token)
    first = api.page(maxResults=2)
    api.refused(500, maxResults=2, pageToken=first["nextPageToken"])
    api.call("GET", "users/me/calendarList").raise_for_status()
    (rule,) = api.simulator.faults()
    assert (rule["seen"], rule["fired"]) == (1, 1)
    api.simulator.clear_faults(rule["id"])
    assert api.page(maxResults=2, pageToken=first["nextPageToken"])["items"]


def test_a_fault_can_wait_for_the_nth_call_and_end_after_a_few(api: Api) -> None:
    api.simulator.add_fault("error", method="events.list", after=1, times=2)
    assert [api.call("GET", api.events).status_code for _ in range(4)] == [200, 500, 500, 200]


def test_a_fault_by_chance_is_the_same_for_the_same_seed(api: Api) -> None:
    def outcomes() -> list[int]:
        api.simulator.reset(seed=7)
        api.simulator.add_fault("error", probability=0.5)
        return [api.call("GET", api.events).status_code for _ in range(30)]

    first = outcomes()
    assert first == outcomes()
    assert {200, 500} == set(first)


def test_a_truncated_answer_is_no_json_and_an_html_answer_says_200(api: Api) -> None:
    _fill(api, 2)
    api.simulator.add_fault("truncate", times=1)
    with pytest.raises(ValueError, match=r"Unterminated|Expecting|delimiter"):
        api.call("GET", api.events).json()
    api.simulator.add_fault("html", times=1)
    answer = api.call("GET", api.events)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=UTF-8")


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"kind": "drop"}, httpx.RemoteProtocolError),
        ({"kind": "drop_body"}, httpx.RemoteProtocolError),
        ({"kind": "hang", "seconds": 0.2}, httpx.RemoteProtocolError),
    ],
)
def test_a_connection_can_break_before_or_within_an_answer(
    api: Api, fault: dict[str, object], error: type[Exception]
) -> None:
    _fill(api, 2)
    api.simulator.add_fault(str(fault.pop("kind")), times=1, **fault)
    with pytest.raises((error, httpx.ReadError)):
        api.call("GET", api.events)
    assert len(api.page()["items"]) == 2


def test_latency_delays_an_answer(api: Api) -> None:
    api.simulator.add_fault("latency", seconds=0.2, times=1)
    begin = time.monotonic()
    api.page()
    assert time.monotonic() - begin >= 0.2


def test_an_empty_page_leads_on_to_everything(api: Api) -> None:
    _fill(api, 5)
    api.simulator.add_fault("empty_page", method="events.list", page=2, times=1)
    pages = api.pages(maxResults=2)
    assert [len(page["items"]) for page in pages] == [2, 0, 2, 1]
    _, token = api.sync()
    api.simulator.add_fault("empty_page", method="events.list", times=1)
    pages = api.pages(syncToken=token)
    assert [len(page["items"]) for page in pages] == [0, 0]
    assert "nextSyncToken" in pages[-1]


def test_tokens_can_be_missing_doubled_or_repeated(api: Api) -> None:
    _fill(api, 4)
    api.simulator.add_fault("no_sync_token", times=1)
    assert not {"nextPageToken", "nextSyncToken"} & set(api.page())
    api.simulator.add_fault("both_tokens", times=1)
    first = api.page(maxResults=2)
    assert {"nextPageToken", "nextSyncToken"} < set(first)
    assert api.refused(400, syncToken=first["nextSyncToken"]) == "invalid"
    api.simulator.add_fault("repeat_page_token", times=1)
    second = api.page(maxResults=2, pageToken=first["nextPageToken"])
    assert second["nextPageToken"] == first["nextPageToken"]


def test_a_page_can_come_without_its_items_and_leads_on_all_the_same(api: Api) -> None:
    _fill(api, 3)
    api.simulator.add_fault("no_items", times=2)
    first = api.page(maxResults=2)
    assert first["items"] == []
    last = api.page(maxResults=2, pageToken=first["nextPageToken"])
    assert (last["items"], "nextSyncToken" in last) == ([], True)
    assert len(api.page()["items"]) == 3


def test_an_event_can_come_twice_and_a_sync_token_again(api: Api) -> None:
    _fill(api, 2)
    api.simulator.add_fault("duplicate_event", times=1)
    items = api.page()["items"]
    assert len(items) == 3
    assert items[0] == items[1]
    _, token = api.sync()
    api.simulator.advance(1)
    api.simulator.add_fault("same_sync_token", times=1)
    assert api.page(syncToken=token)["nextSyncToken"] == token


def test_calls_are_counted_by_method_user_calendar_status_page_and_kind(api: Api) -> None:
    _fill(api, 3)
    _, token = api.sync(maxResults=2)
    api.page(syncToken=token)
    api.refused(400, syncToken="nonsense")
    counts = api.simulator.counts()
    assert counts.total == 4
    assert counts.count("events.list", user=ANA, calendar=ANA) == 4
    assert counts.count("events.list", page=2) == 1
    assert counts.count("events.list", incremental=True) == 2
    assert counts.count(status=400) == 1
    assert counts.bytes > 0
    assert api.simulator.recent_calls()[-1]["query"] == "syncToken=nonsense"
    api.simulator.reset_counts()
    assert api.simulator.counts().total == 0


def test_edits_and_control_requests_are_not_counted(api: Api) -> None:
    _fill(api, 3)
    api.simulator.truth(ANA)
    assert api.simulator.counts().total == 0


def test_truth_is_every_live_event_as_its_owner_sees_it(api: Api) -> None:
    kept, doomed = api.insert(summary="kept"), api.insert()
    api.delete(doomed["id"])
    assert api.simulator.truth(ANA).events == {kept["id"]: kept}


@pytest.mark.parametrize(
    ("method", "path", "body", "message"),
    [
        ("POST", "faults", {"kind": "earthquake"}, "There is no fault kind 'earthquake'"),
        ("POST", "faults", {"kind": "error", "colour": 1}, "A fault has no field colour"),
        ("PATCH", "settings", {"speed": 1}, "There is no setting speed"),
        ("PATCH", "settings", {"quota_status": "x"}, "The setting quota_status takes a int"),
        ("PATCH", "settings", {"drift": "x"}, "The setting drift is one of count, reject, odd"),
        ("PATCH", "users/x@example.com", {}, "There is no user x@example.com"),
        ("GET", "calendars/x/truth", None, "There is no calendar x"),
        ("GET", "nothing", None, "There is no control GET /_sim/nothing"),
    ],
)
def test_a_control_request_that_cannot_be_carried_out_says_why(
    api: Api, method: str, path: str, body: object, message: str
) -> None:
    answer = api.http.request(method, f"{api.simulator.url}/_sim/{path}", json=body)
    assert answer.status_code in (400, 404)
    assert message in answer.json()["error"]


def test_the_control_client_raises_the_simulators_answer(api: Api) -> None:
    with pytest.raises(SimulatorError, match="There is no fault kind"):
        api.simulator.add_fault("earthquake")


def test_virtual_time_stands_still_runs_and_jumps(api: Api) -> None:
    begin = api.simulator.now()
    assert api.simulator.now() == begin
    assert api.simulator.advance(90) == begin + 90
    api.simulator.freeze(frozen=False)
    moment = api.simulator.now()
    while api.simulator.now() == moment:
        pass
    assert api.simulator.now() > moment
