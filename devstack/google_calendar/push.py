"""Push notifications: channels, their life time, and the POSTs that tell a watcher something changed.

Follows guides/push. Delivery is best effort: only 500, 502, 503 and 504 are retried, and rules for method "push" can
drop, delay or duplicate messages.
"""

import asyncio
import random
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime
from hashlib import sha256
from urllib.parse import quote, urlsplit

import httpx

from devstack.google_calendar import errors
from devstack.google_calendar.call import Call
from devstack.google_calendar.faults import Faults, Kind
from devstack.google_calendar.resource import Resource
from devstack.google_calendar.state import World

_RETRIED = frozenset({500, 502, 503, 504})
_ATTEMPTS = 5
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(slots=True)
class Channel:
    """One notification channel."""

    id: str
    resource: str  # "e<calendar number>" or "l<user number>"
    resource_id: str
    resource_uri: str
    address: str
    token: str | None
    expires: float  # virtual seconds
    email: str
    message_number: int = 0


class Push:
    """The channels in force and their deliveries."""

    def __init__(self, world: World, faults: Faults, url: str, seed: int) -> None:
        """Announce changes of `world`; `url` is the root that resource URIs are given under."""
        self._world = world
        self._faults = faults
        self._url = url
        self._random = random.Random(seed)  # noqa: S311 - repeatable, not secret
        self._channels: dict[str, Channel] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._client: httpx.AsyncClient | None = None
        self.outcomes: dict[str, int] = {"delivered": 0, "refused": 0, "unreachable": 0, "dropped": 0}
        world.on_events_changed = lambda calendar: self._notify(f"e{calendar.number}", calendar.id)
        world.on_list_changed = lambda user: self._notify(f"l{user.number}", "")

    def watch_events(self, call: Call) -> Resource:
        """Answer events.watch."""
        calendar, _ = call.calendar()
        if not calendar.push_supported:
            raise errors.ApiError(
                400,
                "pushNotSupportedForRequestedResource",
                "Push notifications are not supported by this resource.",
                domain="calendar",
            )
        path = f"calendar/v3/calendars/{quote(calendar.id, safe='@')}/events?alt=json"
        return self._watch(call, f"e{calendar.number}", path, calendar.id)

    def watch_list(self, call: Call) -> Resource:
        """Answer calendarList.watch."""
        return self._watch(call, f"l{call.user.number}", "calendar/v3/users/me/calendarList?alt=json", "")

    def stop(self, call: Call) -> None:
        """Answer channels.stop."""
        sent = call.resource()
        channel = self._channels.get(str(sent.get("id", "")))
        if channel is None or channel.resource_id != sent.get("resourceId") or channel.email != call.user.email:
            raise errors.ApiError(404, "notFound", f"Channel '{sent.get('id')}' not found")
        del self._channels[channel.id]

    def report(self) -> Resource:
        """Return channels in force and delivery outcomes as JSON."""
        now = self._world.clock.now()
        return {
            "channels": [
                {
                    "id": channel.id,
                    "resource_id": channel.resource_id,
                    "resource_uri": channel.resource_uri,
                    "address": channel.address,
                    "expires": channel.expires,
                    "user": channel.email,
                    "messages": channel.message_number,
                }
                for channel in self._channels.values()
                if channel.expires > now
            ],
            "outcomes": self.outcomes,
        }

    async def settle(self) -> None:
        """Wait until every message on its way has been delivered or given up."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def close(self) -> None:
        """Give up on messages on their way and close connections."""
        self._channels.clear()
        for task in list(self._tasks):
            task.cancel()
        await self.settle()
        if self._client is not None:
            await self._client.aclose()

    def _watch(self, call: Call, resource: str, path: str, calendar_id: str) -> Resource:
        sent = call.resource()
        channel_id, address = str(sent.get("id") or ""), str(sent.get("address") or "")
        if not channel_id:
            raise errors.required("Missing required field: id")
        if len(channel_id) > 64:
            raise errors.invalid("Invalid channel id: at most 64 characters are allowed.")
        if len(str(sent.get("token") or "")) > 256:
            raise errors.invalid("Invalid channel token: at most 256 characters are allowed.")
        if sent.get("type") not in ("web_hook", "webhook"):
            raise errors.invalid(f"Unknown channel type: {sent.get('type')}")
        parts = urlsplit(address)
        if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOOPBACK):
            raise errors.ApiError(400, "push.webhookUrlNotHttps", f"WebHook callback must be HTTPS: {address}")
        standing = self._channels.get(channel_id)
        if standing is not None and standing.expires > self._world.clock.now():
            raise errors.ApiError(400, "channelIdNotUnique", f"Channel id {channel_id} not unique")
        digest = sha256(f"{call.user.email} {path}".encode()).digest()
        channel = Channel(
            id=channel_id,
            resource=resource,
            resource_id=urlsafe_b64encode(digest[:18]).decode(),
            resource_uri=f"{self._url}/{path}",
            address=address,
            token=sent.get("token"),
            expires=self._expiry(sent),
            email=call.user.email,
        )
        self._channels[channel_id] = channel
        self._send(channel, "sync", calendar_id)
        answer: Resource = {
            "kind": "api#channel",
            "id": channel.id,
            "resourceId": channel.resource_id,
            "resourceUri": channel.resource_uri,
            "expiration": str(int(channel.expires * 1000)),
        }
        return answer | ({"token": channel.token} if channel.token else {})

    def _expiry(self, sent: Resource) -> float:
        """Return when a new channel ends: as asked for, within the longest life allowed."""
        now, settings = self._world.clock.now(), self._world.settings
        try:
            if sent.get("expiration"):
                asked = int(sent["expiration"]) / 1000
            else:
                asked = now + int((sent.get("params") or {}).get("ttl", settings.channel_seconds))
        except (ValueError, TypeError):
            raise errors.invalid("Invalid expiration.") from None
        if asked <= now:
            raise errors.invalid("The expiration of a channel must lie in the future.")
        return min(asked, now + settings.channel_max_seconds)

    def _notify(self, resource: str, calendar_id: str) -> None:
        if not self._channels:
            return
        now = self._world.clock.now()
        for channel in list(self._channels.values()):
            if channel.expires <= now:
                del self._channels[channel.id]
            elif channel.resource == resource:
                self._send(channel, "exists", calendar_id)

    def _send(self, channel: Channel, state: str, calendar_id: str) -> None:
        # Numbers increase but are not sequential (guides/push).
        channel.message_number += 1 if state == "sync" else self._random.randint(1, 1000)
        headers = {
            "X-Goog-Channel-ID": channel.id,
            "X-Goog-Message-Number": str(channel.message_number),
            "X-Goog-Resource-ID": channel.resource_id,
            "X-Goog-Resource-State": state,
            "X-Goog-Resource-URI": channel.resource_uri,
            "X-Goog-Channel-Expiration": format_datetime(datetime.fromtimestamp(channel.expires, UTC), usegmt=True),
        }
        if channel.token:
            headers["X-Goog-Channel-Token"] = channel.token
        delay, copies = 0.0, 1
        for rule in self._faults.firing("push", channel.email, calendar_id):
            if rule.kind is Kind.DROP:
                copies = 0
            elif rule.kind is Kind.DUPLICATE:
                copies += 1
            elif rule.kind is Kind.LATENCY:
                delay += rule.seconds
        if not copies:
            self.outcomes["dropped"] += 1
        for _ in range(copies):
            task = asyncio.get_running_loop().create_task(self._deliver(channel.address, headers, delay))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _deliver(self, address: str, headers: dict[str, str], delay: float) -> None:
        if self._client is None:
            self._client = httpx.AsyncClient(timeout=10.0, trust_env=False)
        await asyncio.sleep(delay)
        for attempt in range(_ATTEMPTS):
            try:
                answer = await self._client.post(address, headers=headers)
            except httpx.HTTPError:
                self.outcomes["unreachable"] += 1
                return
            if answer.status_code not in _RETRIED:
                accepted = answer.is_success or answer.status_code == httpx.codes.PROCESSING
                self.outcomes["delivered" if accepted else "refused"] += 1
                return
            await asyncio.sleep(self._world.settings.push_retry_base * 2**attempt)
        self.outcomes["refused"] += 1
