"""Google Calendar v3 as the sync sees it: listings, push channels, typed errors, retries, every request counted.

Belongs here: the adapter over google-api-python-client, its transport, and what each of Google's errors means.
Does not: what is done with a page, or where grants and counters are stored.

Measured with google-api-python-client 2.202: a call costs 0.3 ms of CPU (`make bench-sync`); building the service costs
60 ms, so it is built once. httplib2 is not thread-safe, so every thread has its own `Http`. The client's own retries
ignore Retry-After, so they stay off and `tenacity` does it.
"""

import hashlib
import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from random import Random
from typing import Final, Protocol
from urllib.parse import urlsplit
from uuid import UUID

import httplib2
import tenacity
from google.auth import exceptions as auth_errors
from google.oauth2.credentials import Credentials
from google_auth_httplib2 import AuthorizedHttp
from googleapiclient.discovery import build
from googleapiclient.errors import HttpError

from scaling import tracing
from scaling.google_calls import TOKEN_REFRESH
from sync_pipeline.errors import (
    AccessDeniedError,
    AccessTokenRefusedError,
    BadRequestError,
    ClientRefusedError,
    GrantRefusedError,
    NotFoundError,
    PageTokenRefusedError,
    PushUnsupportedError,
    QuotaExceededError,
    RateLimitedError,
    SyncError,
    SyncTokenGoneError,
    TransientError,
)
from sync_pipeline.events import Json
from sync_pipeline.quota import UNLIMITED, CallGate

EVENT_PARAMETERS: Final[Mapping[str, bool | int]] = {"maxResults": 2500, "singleEvents": False, "showDeleted": True}
"""The same for full and incremental syncs: a token is only valid with the parameters it was made with."""
CALENDAR_LIST_PARAMETERS: Final[Mapping[str, bool | int]] = {"maxResults": 250, "showDeleted": True, "showHidden": True}

CALL_TIMEOUT_SECONDS = 20.0
ATTEMPTS = 4
ATTEMPTS_WITHIN_SECONDS = 30.0
"""No further attempt is begun after this long, so that a silent server costs a worker less than a minute."""
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 30.0
"""A longer Retry-After is not slept through; the connection is parked for that long instead."""

METHODS: Final[Mapping[str, str]] = {
    "/users/me/calendarList": "calendarList.list",
    "/users/me/calendarList/watch": "calendarList.watch",
    "/events/watch": "events.watch",
    "/channels/stop": "channels.stop",
}
"""End of a request's path -> name of the method; every other request lists events."""

# The client's loggers repeat request addresses, which hold calendar ids (mail addresses) and sync tokens.
logging.getLogger("googleapiclient").setLevel(logging.ERROR)

CallCounter = Counter[tuple[str, str]]
"""(method, outcome) -> requests; an outcome is an HTTP status or `no_answer`."""


@dataclass(frozen=True, slots=True, repr=False)
class EventsPage:
    """One page of `events.list`."""

    items: Sequence[Json]
    next_page_token: str | None
    next_sync_token: str | None


@dataclass(frozen=True, slots=True, repr=False)
class CalendarEntry:
    """One entry of a `calendarList`."""

    calendar_id: str
    summary: str | None
    time_zone: str | None
    access_role: str | None
    is_primary: bool
    deleted: bool


@dataclass(frozen=True, slots=True, repr=False)
class CalendarListPage:
    """One page of `calendarList.list`."""

    entries: tuple[CalendarEntry, ...]
    next_page_token: str | None


@dataclass(frozen=True, slots=True)
class ChannelRequest:
    """A push channel as it is asked for."""

    channel_id: UUID
    token: str = field(repr=False)
    address: str
    ttl_seconds: float


@dataclass(frozen=True, slots=True)
class ChannelAnswer:
    """What Google says of a channel it opened."""

    resource_id: str
    expires_at: datetime | None
    """By Google's clock; None when it does not say."""


class CalendarApi(Protocol):
    """One connection's view of Google Calendar."""

    def list_events(self, calendar_id: str, *, sync_token: str | None, page_token: str | None) -> EventsPage:
        """Get one page of a calendar's events, all of them or the changes since the sync token.

        Raises:
            SyncError: after the retries that make sense.
        """

    def list_calendars(self, *, page_token: str | None) -> CalendarListPage:
        """Get one page of the account's calendars.

        Raises:
            SyncError: after the retries that make sense.
        """

    def watch_events(self, calendar_id: str, request: ChannelRequest) -> ChannelAnswer:
        """Ask for notifications of a calendar's changes; asked once, because a second try finds the id taken.

        Raises:
            PushUnsupportedError: Google has none for this calendar.
            TransientError: no answer; the channel may be open all the same.
            SyncError: refused.
        """

    def watch_calendars(self, request: ChannelRequest) -> ChannelAnswer:
        """Ask for notifications of changes of the account's list of calendars; see `watch_events`.

        Raises:
            SyncError: see `watch_events`.
        """

    def stop_channel(self, channel_id: UUID, resource_id: str) -> None:
        """End a channel.

        Raises:
            NotFoundError: there is none.
            SyncError: after the retries that make sense.
        """


@dataclass(frozen=True, slots=True)
class CachedAccessToken:
    """An access token and when it ends (UTC)."""

    token: str
    expires_at: datetime

    def __repr__(self) -> str:
        return f"CachedAccessToken(expires_at={self.expires_at.isoformat()})"


def token_fingerprint(account: str) -> bytes:
    """What a sync token is bound to: the query parameters and the account that asked.

    Args:
        account: names the connection and its Google account.

    Returns:
        SHA-256 over both.
    """
    return hashlib.sha256(json.dumps([account, dict(EVENT_PARAMETERS)], sort_keys=True).encode()).digest()


class AccessTokenShelf(Protocol):
    """Where the workers of one connection leave each other the access token."""

    def latest(self) -> CachedAccessToken | None:
        """The one that was left there last."""

    def leave(self, token: CachedAccessToken) -> None:
        """Leave a new one there."""


class _Credentials(Credentials):
    """Credentials that ask Google for a token only if no other worker has got one since.

    A refresh survives an answer that is no token, for example a proxy's 200 with a HTML page.
    """

    shelf: AccessTokenShelf | None = None

    def refresh(self, request: object) -> None:
        if self.shelf is not None and (latest := self.shelf.latest()) is not None and latest.token != self.token:
            self.token, self.expiry = latest.token, _naive(latest.expires_at)
            if self.valid:
                return
        try:
            super().refresh(request)  # type: ignore[no-untyped-call]  # google-auth is typed in parts
        except (TypeError, KeyError, ValueError):
            raise TransientError("the token endpoint's answer is no token") from None
        if self.shelf is not None and self.token and self.expiry:
            self.shelf.leave(CachedAccessToken(self.token, self.expiry.replace(tzinfo=UTC)))


def _naive(moment: datetime) -> datetime:
    """A moment as google-auth writes it: UTC without saying so."""
    return moment.astimezone(UTC).replace(tzinfo=None)


class _Request(Protocol):
    def execute(self, *, http: object, num_retries: int) -> object: ...


class _Collection(Protocol):
    def list(self, **parameters: object) -> _Request: ...

    def watch(self, **parameters: object) -> _Request: ...


class _Channels(Protocol):
    def stop(self, **parameters: object) -> _Request: ...


class _Service(Protocol):
    """The part of the client library's generated, untyped service that is used here."""

    def events(self) -> _Collection: ...

    def calendarList(self) -> _Collection: ...  # noqa: N802  # Google's name

    def channels(self) -> _Channels: ...


class _Collections:
    """The service's collections, each made once: making one writes a docstring for all its methods, 2 ms of CPU.

    They only make requests; whose `Http` sends one is said when it is executed, so threads may share them.
    """

    def __init__(self, service: _Service) -> None:
        self.events = service.events()
        self.calendar_list = service.calendarList()
        self.channels = service.channels()


class GoogleCalendar:
    """Google Calendar of one installation; makes a `GoogleConnection` per grant."""

    def __init__(
        self,
        *,
        endpoint: str,
        token_url: str,
        client_id: str,
        client_secret: str,
        sleep: Callable[[float], None],
        rng: Random,
        call_timeout_seconds: float = CALL_TIMEOUT_SECONDS,
    ) -> None:
        """Build the service from the discovery document inside the client library.

        Args:
            endpoint: root of the API, for example https://www.googleapis.com.
            token_url: OAuth token endpoint.
            client_id: OAuth client of this installation.
            client_secret: its secret.
            sleep: waits that many seconds between attempts.
            rng: source of the jitter.
            call_timeout_seconds: longest silence of the server within one request.
        """
        self._token_url = token_url
        self._client_id = client_id
        self._client_secret = client_secret
        self._sleep = sleep
        self._rng = rng
        self._timeout = call_timeout_seconds
        self._threads = threading.local()
        self._google = _Collections(
            build(
                "calendar",
                "v3",
                http=httplib2.Http(timeout=call_timeout_seconds),
                static_discovery=True,
                client_options={"api_endpoint": f"{endpoint}/calendar/v3/"},
            )
        )

    def connect(
        self,
        refresh_token: str,
        *,
        calls: CallCounter,
        access_token: CachedAccessToken | None = None,
        shelf: AccessTokenShelf | None = None,
        gate: CallGate = UNLIMITED,
    ) -> "GoogleConnection":
        """Use a grant; no request is made yet.

        Args:
            refresh_token: of the grant.
            calls: counts every request of this connection.
            access_token: one from an earlier run, used until it ends or Google refuses it.
            shelf: where to look for a newer one before Google is asked, and to leave what it gave; None: nowhere.
            gate: lets each request through when the quotas allow.

        Returns:
            The connection, for the calling thread only.
        """
        credentials = _Credentials(  # type: ignore[no-untyped-call]  # google-auth is typed in parts
            token=access_token and access_token.token,
            refresh_token=refresh_token,
            token_uri=self._token_url,
            client_id=self._client_id,
            client_secret=self._client_secret,
            expiry=access_token and _naive(access_token.expires_at),
        )
        credentials.shelf = shelf
        transport = _CountedHttp(self._http(), calls, gate, token_path=urlsplit(self._token_url).path)
        return GoogleConnection(self._google, credentials, transport, self._retrying)

    def _http(self) -> httplib2.Http:
        if not hasattr(self._threads, "http"):
            self._threads.http = httplib2.Http(timeout=self._timeout)
        http: httplib2.Http = self._threads.http
        return http

    def _retrying(self, *, has_page_token: bool) -> tenacity.Retrying:
        return tenacity.Retrying(
            sleep=self._sleep,
            wait=self._wait_seconds,
            stop=tenacity.stop_after_attempt(ATTEMPTS) | tenacity.stop_after_delay(ATTEMPTS_WITHIN_SECONDS),
            retry=tenacity.retry_if_exception(lambda error: _worth_another_attempt(error, has_page_token)),
            reraise=True,
        )

    def _wait_seconds(self, state: tenacity.RetryCallState) -> float:
        """Truncated exponential backoff with 25 % of jitter, never less than Retry-After."""
        error = state.outcome.exception() if state.outcome else None
        asked = error.retry_after_seconds if isinstance(error, RateLimitedError) else None
        backoff = min(FIRST_WAIT_SECONDS * 2.0 ** (state.attempt_number - 1), LONGEST_WAIT_SECONDS)
        return max(asked or 0.0, backoff) + backoff * self._rng.uniform(0.0, 0.25)


class GoogleConnection:
    """One grant at work; satisfies `CalendarApi`."""

    def __init__(
        self,
        google: _Collections,
        credentials: Credentials,
        transport: "_CountedHttp",
        retrying: Callable[..., tenacity.Retrying],
    ) -> None:
        self._google = google
        self._http = AuthorizedHttp(credentials, http=transport, max_refresh_attempts=1)
        self._retrying = retrying

    def list_events(self, calendar_id: str, *, sync_token: str | None, page_token: str | None) -> EventsPage:
        """See `CalendarApi.list_events`."""
        cursors = {"syncToken": sync_token, "pageToken": page_token}
        given = {name: value for name, value in cursors.items() if value is not None}
        body = self._execute(
            self._google.events.list(calendarId=calendar_id, **EVENT_PARAMETERS, **given),
            has_page_token=page_token is not None,
        )
        return EventsPage(_list(body, "items"), _token(body, "nextPageToken"), _token(body, "nextSyncToken"))

    def list_calendars(self, *, page_token: str | None) -> CalendarListPage:
        """See `CalendarApi.list_calendars`."""
        given = {} if page_token is None else {"pageToken": page_token}
        body = self._execute(
            self._google.calendar_list.list(**CALENDAR_LIST_PARAMETERS, **given),
            has_page_token=page_token is not None,
        )
        entries = tuple(entry for item in _list(body, "items") if (entry := _calendar_entry(item)) is not None)
        return CalendarListPage(entries, _token(body, "nextPageToken"))

    def watch_events(self, calendar_id: str, request: ChannelRequest) -> ChannelAnswer:
        """See `CalendarApi.watch_events`."""
        return self._watch(self._google.events.watch(calendarId=calendar_id, body=_channel(request)))

    def watch_calendars(self, request: ChannelRequest) -> ChannelAnswer:
        """See `CalendarApi.watch_calendars`."""
        return self._watch(self._google.calendar_list.watch(body=_channel(request)))

    def stop_channel(self, channel_id: UUID, resource_id: str) -> None:
        """See `CalendarApi.stop_channel`."""
        request = self._google.channels.stop(body={"id": str(channel_id), "resourceId": resource_id})

        self._retrying(has_page_token=False)(self._once, request, has_page_token=False)  # its answer has no body

    def _watch(self, request: _Request) -> ChannelAnswer:
        # No second attempt: the channel may be open although the answer was lost, and its id is taken then.
        body = _object(self._once(request, has_page_token=False))
        resource_id = _token(body, "resourceId")
        if resource_id is None:
            raise TransientError("Google's answer names no resource")
        return ChannelAnswer(resource_id, _moment(body.get("expiration")))

    def _execute(self, request: _Request, *, has_page_token: bool) -> Mapping[str, Json]:
        def attempt() -> Mapping[str, Json]:
            return _object(self._once(request, has_page_token=has_page_token))

        body: Mapping[str, Json] = self._retrying(has_page_token=has_page_token)(attempt)
        return body

    def _once(self, request: _Request, *, has_page_token: bool) -> object:
        with _typed_errors(has_page_token=has_page_token):
            return request.execute(http=self._http, num_retries=0)


class _CountedHttp:
    """An `httplib2.Http` that counts its requests, asks the gate before each, and tells it when Google limits one.

    AuthorizedHttp and the token refresh both go through it.
    """

    def __init__(self, http: httplib2.Http, calls: CallCounter, gate: CallGate, *, token_path: str) -> None:
        self._http = http
        self._calls = calls
        self._gate = gate
        self._token_path = token_path

    def request(self, uri: str, method: str = "GET", **options: object) -> tuple[httplib2.Response, bytes]:
        """See `httplib2.Http.request`."""
        name = self._name(uri)
        # A token refresh is no Calendar call; it has a quota of its own, which nobody reaches.
        if name == TOKEN_REFRESH:
            return self._send(name, uri, method, options)
        with self._gate.admit():
            response, content = self._send(name, uri, method, options)
            if _is_limited(response.status, content):
                self._gate.limited(_retry_after(response.get("retry-after")))
            return response, content

    def _send(self, name: str, uri: str, method: str, options: Mapping[str, object]) -> tuple[httplib2.Response, bytes]:
        outcome = "no_answer"
        # Not the address, which holds calendar ids (mail addresses) and sync tokens.
        with tracing.span(name, {"http.request.method": method}, remote=True) as span:
            try:
                response, content = self._http.request(uri, method=method, **options)
                outcome = str(response.status)
            finally:
                self._calls[name, outcome] += 1
            span.set_attribute("http.response.status_code", response.status)
            if response.status >= 400:
                tracing.failed(outcome)
        return response, content

    def _name(self, uri: str) -> str:
        path = urlsplit(uri).path
        if path == self._token_path:
            return TOKEN_REFRESH
        for end, name in METHODS.items():
            if path.endswith(end):
                return name
        return "events.list"


@contextmanager
def _typed_errors(*, has_page_token: bool) -> Iterator[None]:
    """Turn whatever the client library raises into a `SyncError`; causes are dropped, they hold addresses."""
    try:
        yield
    except SyncError:
        raise
    except HttpError as error:
        raise _http_error(error, has_page_token=has_page_token) from None
    except auth_errors.RefreshError as error:
        raise _refresh_error(error) from None
    except auth_errors.TransportError:
        raise TransientError("the token endpoint cannot be reached") from None
    except (OSError, HTTPException, httplib2.HttpLib2Error, EOFError) as error:
        raise TransientError(f"no answer from Google ({type(error).__name__})") from None
    except (ValueError, RecursionError):  # JSONDecodeError and UnicodeDecodeError: a truncated or HTML body
        raise TransientError("Google's answer is not JSON") from None


def _http_error(error: HttpError, *, has_page_token: bool) -> SyncError:
    status = int(error.resp.status)
    reason, message = _reason(error.content)
    told = f"{status} {reason}" if reason else str(status)
    if status == 400:
        if "sync token" in message.lower() and reason != "syncTokenWithRequestRestrictions":
            return SyncTokenGoneError(told)
        if reason == "pushNotSupportedForRequestedResource":
            return PushUnsupportedError(told)
        if reason == "channelIdNotUnique":  # httplib2 sends a request again whose connection broke
            return TransientError(told)
        return PageTokenRefusedError(told) if has_page_token else BadRequestError(told)
    if status == 401:
        return AccessTokenRefusedError(told)
    if _is_limited(status, error.content):
        return RateLimitedError(told, retry_after_seconds=_retry_after(error.resp.get("retry-after")))
    if status == 403:
        quota = reason in {"quotaExceeded", "dailyLimitExceeded", "dailyLimitExceededUnreg"}
        return QuotaExceededError(told) if quota else AccessDeniedError(told)
    if status == 404:
        return NotFoundError(told)
    if status == 410:
        return SyncTokenGoneError(told)
    return TransientError(told) if status >= 500 else BadRequestError(told)


def _is_limited(status: int, content: bytes) -> bool:
    """Tell whether Google says: too many calls a minute."""
    return status == 429 or (status == 403 and _reason(content)[0] in {"rateLimitExceeded", "userRateLimitExceeded"})


def _reason(content: bytes) -> tuple[str, str]:
    """Get (reason code, message) of an error body; the message never leaves this module."""
    try:
        error = json.loads(content)["error"]
        first = error["errors"][0] if error.get("errors") else {}
        reason, message = str(first.get("reason", "")), str(error.get("message", ""))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return "", ""
    return (reason if reason.isidentifier() and len(reason) < 80 else ""), message


def _refresh_error(error: auth_errors.RefreshError) -> SyncError:
    details = error.args[1] if len(error.args) > 1 and isinstance(error.args[1], dict) else {}
    code = details.get("error")
    if code == "invalid_grant":
        return GrantRefusedError("invalid_grant")
    if code in {"invalid_client", "unauthorized_client"}:
        return ClientRefusedError(f"{code}: check GOOGLE_CLIENT_ID and GOOGLE_CLIENT_SECRET")
    return TransientError("the token endpoint did not give an access token")


def _retry_after(value: str | None) -> float | None:
    """Read a Retry-After header: seconds or an HTTP date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def _worth_another_attempt(error: BaseException, has_page_token: bool) -> bool:
    """Tell whether waiting here is better than coming back later.

    Who is told to slow down leaves: a worker that slept through it would take its time from other tenants. Only
    within a listing, of which everything read so far would have to be read again, it waits.
    """
    if isinstance(error, RateLimitedError):
        return has_page_token and (error.retry_after_seconds or 0.0) <= LONGEST_WAIT_SECONDS
    return isinstance(error, SyncError) and error.retried_at_once


def _object(body: object) -> Mapping[str, Json]:
    if not isinstance(body, dict):
        raise TransientError("Google answered something that is not a JSON object")
    return body


def _channel(request: ChannelRequest) -> dict[str, object]:
    return {
        "id": str(request.channel_id),
        "type": "web_hook",
        "address": request.address,
        "token": request.token,
        "params": {"ttl": str(int(request.ttl_seconds))},  # a duration: no clock of ours is involved
    }


def _moment(milliseconds: Json) -> datetime | None:
    """Read a time in milliseconds since 1970, which Google sends as a string."""
    if not isinstance(milliseconds, str | int):
        return None
    try:
        return datetime.fromtimestamp(int(milliseconds) / 1000, UTC)
    except (ValueError, OverflowError, OSError):
        return None


def _list(body: Mapping[str, Json], key: str) -> Sequence[Json]:
    value = body.get(key, [])
    if not isinstance(value, list):
        raise TransientError(f"{key} of Google's answer is not a list")
    return value


def _token(body: Mapping[str, Json], key: str) -> str | None:
    value = body.get(key)
    return value if isinstance(value, str) and value else None


def _calendar_entry(item: Json) -> CalendarEntry | None:
    """Read an entry; one without an id cannot be synced and is left out."""
    if not isinstance(item, dict):
        return None
    calendar_id = item.get("id")
    if not isinstance(calendar_id, str) or not calendar_id:
        return None

    def text(key: str) -> str | None:
        value = item.get(key)
        return value.replace("\x00", "").encode(errors="replace").decode() if isinstance(value, str) else None

    return CalendarEntry(
        calendar_id=calendar_id,
        summary=text("summaryOverride") or text("summary"),
        time_zone=text("timeZone"),
        access_role=text("accessRole"),
        is_primary=item.get("primary") is True,
        deleted=item.get("deleted") is True,
    )
