"""Push notifications: channels, messages, retries, expiry."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.google_calendar.conftest import ANA, Api, reason


@dataclass
class Webhook:
    """A receiver of notifications that answers with the scripted statuses, then 204."""

    address: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)

    def states(self) -> list[str]:
        return [message["x-goog-resource-state"] for message in self.messages]


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    hook = Webhook()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers.get("Content-Length", "0") == "0"
            hook.messages.append({name.lower(): value for name, value in self.headers.items()})
            self.send_response(hook.statuses.pop(0) if hook.statuses else 204)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hook.address = f"http://127.0.0.1:{server.server_address[1]}/hook"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield hook
    server.shutdown()
    thread.join()
    server.server_close()


def _watch(
    api: Api, webhook: Webhook, channel: str = "channel-1", path: str | None = None, **body: object
) -> dict[str, Any]:
    answer = api.call(
        "POST", f"{path or api.events}/watch", {"id": channel, "type": "web_hook", "address": webhook.address, **body}
    )
    assert answer.status_code == 200, answer.text
    created: dict[str, Any] = answer.json()
    return created


def test_a_watch_is_confirmed_with_a_sync_message(api: Api, webhook: Webhook) -> None:
    channel = _watch(api, webhook, token="secret")
    api.simulator.settle_pushes()
    (message,) = webhook.messages
    assert message["x-goog-channel-id"] == channel["id"] == "channel-1"
    assert message["x-goog-resource-state"] == "sync"
    assert message["x-goog-message-number"] == "1"
    assert message["x-goog-resource-id"] == channel["resourceId"]
    assert message["x-goog-resource-uri"] == channel["resourceUri"]
    assert message["x-goog-channel-token"] == "secret"
    assert message["x-goog-channel-expiration"] == "Mon, 08 Jun 2026 00:00:00 GMT", "a week by default"
    assert channel["expiration"] == "1780876800000"


def test_changes_are_announced_with_growing_numbers(api: Api, webhook: Webhook) -> None:
    _watch(api, webhook)
    event = api.insert()
    api.patch(event["id"], summary="changed")
    api.delete(event["id"])
    api.simulator.settle_pushes()
    assert sorted(webhook.states()) == ["exists"] * 3 + ["sync"]
    numbers = sorted(int(message["x-goog-message-number"]) for message in webhook.messages)
    assert len(set(numbers)) == 4
    assert numbers != [1, 2, 3, 4], "increasing, not sequential"


def test_only_the_watched_resource_is_announced_and_a_rename_is_not(api: Api, webhook: Webhook) -> None:
    other = api.simulator.add_calendar(ANA, "Other")
    _watch(api, webhook)
    api.at(other).insert()
    api.simulator.rename(ANA, "Renamed")
    api.simulator.settle_pushes()
    assert webhook.states() == ["sync"]


def test_the_calendar_list_can_be_watched(api: Api, webhook: Webhook) -> None:
    _watch(api, webhook, path="users/me/calendarList")
    api.simulator.add_calendar(ANA, "New")
    api.simulator.settle_pushes()
    assert sorted(webhook.states()) == ["exists", "sync"]


def test_a_stopped_or_expired_channel_is_silent(api: Api, webhook: Webhook) -> None:
    stopped = _watch(api, webhook, "stopped")
    _watch(api, webhook, "expired", params={"ttl": "60"})
    wrong = api.call("POST", "channels/stop", {"id": "stopped", "resourceId": "wrong"})
    assert wrong.status_code == 404
    assert api.call("POST", "channels/stop", {k: stopped[k] for k in ("id", "resourceId")}).status_code == 204
    assert [channel["id"] for channel in api.simulator.channels()] == ["expired"]
    api.simulator.advance(61)
    api.insert()
    api.simulator.settle_pushes()
    assert webhook.states() == ["sync", "sync"]
    assert api.simulator.channels() == []


def test_only_answers_that_promise_recovery_are_retried(api: Api, webhook: Webhook) -> None:
    webhook.statuses = [503, 500, 204]
    _watch(api, webhook)
    assert api.simulator.settle_pushes()["delivered"] == 1
    assert len(webhook.messages) == 3
    webhook.statuses = [404]
    api.insert()
    assert api.simulator.settle_pushes()["refused"] == 1
    assert len(webhook.messages) == 4


def test_messages_can_be_dropped_doubled_and_delayed(api: Api, webhook: Webhook) -> None:
    _watch(api, webhook)
    api.simulator.settle_pushes()
    api.simulator.add_fault("drop", method="push", times=1)
    api.insert()
    assert api.simulator.settle_pushes()["dropped"] == 1
    api.simulator.add_fault("duplicate", method="push", times=1)
    api.simulator.add_fault("latency", method="push", seconds=0.05, times=1)
    api.insert()
    api.simulator.settle_pushes()
    assert webhook.states() == ["sync", "exists", "exists"]


def test_a_webhook_that_is_not_there_does_not_disturb(api: Api) -> None:
    _watch(api, Webhook("http://127.0.0.1:9/nobody"))
    assert api.simulator.settle_pushes()["unreachable"] == 1


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ({"id": ""}, "required"),
        ({"id": "x" * 65}, "invalid"),
        ({"token": "x" * 257}, "invalid"),
        ({"type": "pigeon"}, "invalid"),
        ({"address": "http://example.com/hook"}, "push.webhookUrlNotHttps"),
        ({"expiration": "1000"}, "invalid"),
        ({"id": "taken"}, "channelIdNotUnique"),
    ],
)
def test_an_impossible_channel_is_refused(api: Api, webhook: Webhook, body: dict[str, str], wanted: str) -> None:
    _watch(api, webhook, "taken")
    sent = {"id": "fresh", "type": "web_hook", "address": "https://example.com/hook", **body}
    answer = api.call("POST", f"{api.events}/watch", sent)
    assert (answer.status_code, reason(answer)) == (400, wanted)


def test_holiday_calendars_cannot_be_watched(api: Api, webhook: Webhook) -> None:
    holidays = api.simulator.add_calendar(ANA, "Holidays", push_supported=False)
    sent = {"id": "c", "type": "web_hook", "address": webhook.address}
    answer = api.call("POST", f"{api.at(holidays).events}/watch", sent)
    assert (answer.status_code, reason(answer)) == (400, "pushNotSupportedForRequestedResource")
