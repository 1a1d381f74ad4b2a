"""Clients written by others, unchanged: google-api-python-client, gcal_sync and gcsa. Only the endpoint is theirs."""

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

import aiohttp
import google.auth.exceptions
import google_auth_httplib2
import httplib2
import pytest
from gcal_sync.api import GoogleCalendarService
from gcal_sync.auth import AbstractAuth
from gcal_sync.store import InMemoryCalendarStore
from gcal_sync.sync import CalendarEventSyncManager, CalendarListSyncManager
from gcsa.event import Event
from gcsa.google_calendar import GoogleCalendar
from google.oauth2.credentials import Credentials
from googleapiclient.discovery import build, build_from_document
from googleapiclient.errors import HttpError

from devstack.google_calendar import SimulatedUser, Simulator
from tests.google_calendar.conftest import ANA, AT_TEN, WEEKLY


@pytest.fixture
def world(simulator: Simulator) -> Simulator:
    """The default world, with its seeded events."""
    simulator.reset(events=60)
    return simulator


def _credentials(simulator: Simulator, user: SimulatedUser, access_token: str | None = None) -> Credentials:
    return Credentials(  # type: ignore[no-untyped-call]
        access_token,
        refresh_token=user.refresh_token,
        token_uri=simulator.token_url,
        client_id="id",
        client_secret="secret",
    )


def _service(simulator: Simulator) -> Any:
    return build(
        "calendar",
        "v3",
        credentials=_credentials(simulator, simulator.users[0]),
        client_options={"api_endpoint": simulator.url + "/calendar/v3/"},
        static_discovery=True,
    )


def _rooted_service(simulator: Simulator) -> Any:
    """A service from the discovery document with another root: also batches go there."""
    document = json.loads((files("googleapiclient") / "discovery_cache/documents/calendar.v3.json").read_text())
    document["rootUrl"] = simulator.url + "/"
    document["baseUrl"] = simulator.url + "/calendar/v3/"
    return build_from_document(document, credentials=_credentials(simulator, simulator.users[0]))


def _drain(request: Callable[..., Any], **params: Any) -> tuple[list[dict[str, Any]], str]:
    items: list[dict[str, Any]] = []
    page: dict[str, Any] = {}
    while "nextSyncToken" not in page:
        token = {"pageToken": page["nextPageToken"]} if page else {}
        page = request(**params, **token).execute()
        items += page["items"]
    return items, page["nextSyncToken"]


@pytest.mark.parametrize("make", [_service, _rooted_service])
def test_googles_client_refreshes_syncs_and_writes(world: Simulator, make: Callable[[Simulator], Any]) -> None:
    service = make(world)
    calendars, _ = _drain(service.calendarList().list)
    assert {calendar["id"] for calendar in calendars} == set(world.users[0].calendars)
    params = {"calendarId": "primary", "singleEvents": False, "showDeleted": True, "maxResults": 25}
    items, token = _drain(service.events().list, **params)
    truth = world.truth(ANA)
    assert {item["id"] for item in items} == {*truth.events, *truth.cancelled_instances}
    created = service.events().insert(calendarId="primary", body=WEEKLY).execute()
    first, second, *_ = service.events().instances(calendarId="primary", eventId=created["id"]).execute()["items"]
    service.events().delete(calendarId="primary", eventId=first["id"]).execute()
    service.events().patch(calendarId="primary", eventId=second["id"], body={"summary": "special"}).execute()
    changed, _ = _drain(service.events().list, **params, syncToken=token)
    assert [(item["id"], item["status"]) for item in changed] == [
        (created["id"], "confirmed"),
        (first["id"], "cancelled"),
        (second["id"], "confirmed"),
    ]


def test_googles_client_reaches_a_bare_root_as_its_api_endpoint(world: Simulator) -> None:
    service = build(
        "calendar",
        "v3",
        credentials=_credentials(world, world.users[0]),
        client_options={"api_endpoint": world.url},
        static_discovery=True,
    )
    assert service.calendars().get(calendarId="primary").execute()["id"] == ANA


def test_googles_client_reads_reasons_out_of_errors(world: Simulator) -> None:
    service = _service(world)
    with pytest.raises(HttpError) as missing:
        service.events().get(calendarId="primary", eventId="missing").execute()
    assert (missing.value.status_code, missing.value.error_details[0]["reason"]) == (404, "notFound")
    _, token = _drain(service.events().list, calendarId="primary")
    world.expire_sync_tokens(ANA)
    with pytest.raises(HttpError) as gone:
        service.events().list(calendarId="primary", syncToken=token).execute()
    assert (gone.value.status_code, gone.value.error_details[0]["reason"]) == (410, "fullSyncRequired")


def test_googles_client_refreshes_again_when_its_access_token_expires(world: Simulator) -> None:
    service = _service(world)
    service.calendarList().list().execute()
    world.expire_access_tokens(ANA)
    service.calendarList().list().execute()
    assert world.counts().count("oauth.token") == 2
    assert world.counts().count("calendarList.list", status=200) == 2


def test_googles_client_raises_refresh_error_for_a_revoked_grant(world: Simulator) -> None:
    world.revoke(ANA)
    with pytest.raises(google.auth.exceptions.RefreshError, match="invalid_grant"):
        _service(world).calendarList().list().execute()


def test_googles_client_retries_rate_limits_and_server_errors(world: Simulator) -> None:
    service = _service(world)
    world.add_fault("rate_limited", method="events.list", times=1)
    world.add_fault("error", method="events.list", status=503, after=1, times=1)
    request = service.events().list(calendarId="primary")
    request._sleep = lambda _seconds: None
    assert request.execute(num_retries=2)["kind"] == "calendar#events"


def test_googles_client_batches(world: Simulator) -> None:
    service = _rooted_service(world)
    answers: dict[str, Any] = {}
    batch = service.new_batch_http_request(callback=lambda key, answer, error: answers.update({key: error or answer}))
    batch.add(service.calendarList().list(), request_id="list")
    batch.add(service.events().insert(calendarId="primary", body={"summary": "é", **AT_TEN}), request_id="insert")
    batch.add(service.events().get(calendarId="primary", eventId="missing"), request_id="missing")
    batch.execute()
    assert answers["list"]["kind"] == "calendar#calendarList"
    assert world.truth(ANA).events[answers["insert"]["id"]]["summary"] == "é"
    assert answers["missing"].status_code == 404
    assert world.counts().count() == 4, "the refresh and each call inside"


def test_googles_client_sends_long_queries_as_post(world: Simulator) -> None:
    service = _service(world)
    answer = service.events().list(calendarId="primary", q="x" * 3000).execute()
    assert answer["items"] == []
    assert world.counts().count("events.list") == 1


def test_googles_client_uses_etags_and_gzip(world: Simulator) -> None:
    user = world.users[0]
    http = google_auth_httplib2.AuthorizedHttp(_credentials(world, user, user.access_token), http=httplib2.Http())
    service = build(
        "calendar", "v3", http=http, client_options={"api_endpoint": world.url + "/calendar/v3/"}, static_discovery=True
    )
    listed = service.events().list(calendarId="primary")
    etag = listed.execute()["etag"]
    again = service.events().list(calendarId="primary")
    again.headers["if-none-match"] = etag
    with pytest.raises(HttpError) as unchanged:
        again.execute()
    assert unchanged.value.status_code == 304


class _Auth(AbstractAuth):
    """gcal_sync's authentication, as its documentation has users write it."""

    def __init__(self, session: aiohttp.ClientSession, simulator: Simulator) -> None:
        super().__init__(session, host=simulator.url + "/calendar/v3")
        self._token = simulator.users[0].access_token

    async def async_get_access_token(self) -> str:
        return self._token


def test_gcal_sync_syncs_calendars_and_events_and_survives_410(world: Simulator) -> None:
    async def scenario() -> None:
        async with aiohttp.ClientSession() as session:
            service = GoogleCalendarService(_Auth(session, world))
            store = InMemoryCalendarStore()
            lists = CalendarListSyncManager(service, store)
            await lists.run()
            listed = await lists.store_service.async_list_calendars()
            assert {calendar.id for calendar in listed.calendars} == set(world.users[0].calendars)
            events = CalendarEventSyncManager(service, ANA, store)
            await events.run()
            assert await _stored(store) == set(world.truth(ANA).events)
            kept, doomed = sorted(world.truth(ANA).events)[:2]
            _edit(world, {"op": "delete", "id": doomed}, {"op": "patch", "id": kept, "event": {"summary": "changed"}})
            await events.run()
            assert await _stored(store) == set(world.truth(ANA).events)
            assert world.counts().count("events.list", incremental=True) == 1
            world.expire_sync_tokens(ANA)
            _edit(world, {"op": "insert", "event": {"summary": "new", **AT_TEN}})
            await events.run()
            assert world.counts().count("events.list", status=410) == 1
            assert await _stored(store) == set(world.truth(ANA).events)
            assert world.counts().drift == {}

    async def _stored(store: InMemoryCalendarStore) -> set[str]:
        items = (await store.async_load() or {})["event_sync"][ANA]["items"]
        return {event_id for event_id, item in items.items() if item["status"] != "cancelled"}

    def _edit(simulator: Simulator, *edits: dict[str, Any]) -> None:
        simulator.edit(ANA, edits)

    asyncio.run(scenario())


def test_gcsa_lists_adds_updates_and_deletes(world: Simulator) -> None:
    calendar = GoogleCalendar(credentials=_credentials(world, world.users[0], world.users[0].access_token))
    calendar.service = _service(world)
    params = {"time_min": _moment("2026-05-01"), "time_max": _moment("2026-07-01"), "single_events": True}
    listed = list(calendar.get_events(**params, order_by="startTime"))
    assert listed
    added = calendar.add_event(Event("Added", start=_moment("2026-06-01"), end=_moment("2026-06-02"), timezone="UTC"))
    added.summary = "Changed"
    calendar.update_event(added)
    assert world.truth(ANA).events[added.event_id]["summary"] == "Changed"
    assert len(list(calendar.get_events(**params))) == len(listed) + 1
    calendar.delete_event(added)
    assert added.event_id not in world.truth(ANA).events
    assert {entry.calendar_id for entry in calendar.get_calendar_list()} == set(world.users[0].calendars)


def _moment(day: str) -> datetime:
    return datetime.fromisoformat(day).replace(tzinfo=UTC)
