"""The ASGI application: authenticates calls, applies quotas and faults, dispatches, counts, and writes the answers."""

import asyncio
from urllib.parse import parse_qsl, unquote

from devstack.google_calendar import batch, errors
from devstack.google_calendar.admin import administer
from devstack.google_calendar.call import Call, ListPage
from devstack.google_calendar.counters import CallKey
from devstack.google_calendar.faults import PAGE_KINDS, Kind, Rule, refuse, spoil
from devstack.google_calendar.http import Message, Receive, Request, Response, Send, json_response, read, write
from devstack.google_calendar.oauth import OAuthError, revoked
from devstack.google_calendar.partial import masked
from devstack.google_calendar.partial import parse as parse_mask
from devstack.google_calendar.resource import Resource, dumps
from devstack.google_calendar.routes import NOT_IMPLEMENTED
from devstack.google_calendar.simulation import Options, Simulation

_API = "/calendar/v3"
# google-api-python-client replaces the whole base, service path included, by client_options.api_endpoint; a client that
# was given the bare root asks for these.
_ROOTED = ("/calendars", "/users/me/", "/channels/", "/colors")
_HTML = b"<!DOCTYPE html><html><head><title>Sorry</title></head><body>Something went wrong.</body></html>"
_FOREVER = 3600.0


class Server:
    """The simulator as an ASGI application."""

    def __init__(self, options: Options, url: str) -> None:
        """Serve the world made from `options` under the root `url`."""
        self.options = options
        self.simulation = Simulation(options, url)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI entry point)."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        request = await read(scope, receive)
        response = await self._respond(request)
        await write(response, request, scope, send, self.simulation.settings.gzip_from_bytes)

    async def reset(self, options: Options) -> None:
        """Throw the world away and build another one."""
        await self.simulation.push.close()
        self.simulation = Simulation(options, self.simulation.url)

    async def answer(self, request: Request) -> Response:
        """Answer one call of the Calendar API (also the calls inside a batch)."""
        if override := request.headers.get(b"x-http-method-override"):
            # The client moves an over-long query into the body (googleapiclient.http.MAX_URI_LENGTH).
            request = Request(override.decode(), request.path, request.body.decode("latin-1"), request.headers)
        simulation = self.simulation
        try:
            response, key, drift = await self._dispatch(request)
        except _CountedError as error:
            key, drift = error.key, error.drift
            response = _error_response(error.cause)
        simulation.counters.record(key, len(response.body), request.query)
        for kind in drift:
            simulation.counters.record_drift(kind, key.calendar)
        return response

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                await self.simulation.push.close()
                await send({"type": "lifespan.shutdown.complete"})
                return
            await send({"type": "lifespan.startup.complete"})

    async def _respond(self, request: Request) -> Response:
        path = request.path
        if path.startswith(_API):
            return await self.answer(request)
        if path == "/token":
            return await self._token(request)
        if path.startswith("/_sim/"):
            return await administer(self, request)
        if path.startswith("/batch"):
            return await batch.respond(request, self.answer)
        if path == "/revoke":
            return self._revoke(request)
        if path.startswith(_ROOTED):
            return await self.answer(request)
        return _error_response(errors.not_found())

    async def _dispatch(self, request: Request) -> tuple[Response, CallKey, list[str]]:
        simulation = self.simulation
        segments = [unquote(segment) for segment in request.path.removeprefix(_API)[1:].split("/")]
        found = simulation.routes.match(request.method, segments)
        if found is None:
            missing = next((segment for segment in segments if segment in NOT_IMPLEMENTED), None)
            error = errors.not_implemented(missing) if missing else errors.not_found()
            raise _CountedError(error, CallKey("unknown", "", "", error.status, 1, incremental=False))
        route, path = found
        email = calendar = ""
        call: Call | None = None
        try:
            query = request.parameters()
            email = simulation.grants.user_of(_authorization(request, query))
            user = simulation.world.users[email]
            calendar = path.get("calendarId", "")
            if calendar == "primary":
                calendar = email
            call = Call(simulation.world, user, route.method, path, query, request.headers, request.body)
            simulation.quotas.admit(call.text("quotaUser") or email, route.method, simulation.clock.now())
            rules = simulation.faults.firing_on(call, calendar) if simulation.faults.rules else []
            for rule in rules:
                await _before(rule, call)
            result = route.handler(call)
            response = _success(result, call, rules)
        except errors.ApiError as error:
            raise _CountedError(error, _key(route.method, email, calendar, error.status, call), call) from error
        return response, _key(route.method, email, calendar, response.status, call), call.drift

    async def _token(self, request: Request) -> Response:
        simulation = self.simulation
        form = dict(parse_qsl(request.body.decode("utf-8", "replace")))
        email, close = simulation.grants.applicant(form), ""
        try:
            for rule in simulation.faults.firing("oauth.token", email) if simulation.faults.rules else ():
                close = close or await _delay(rule)
                refuse(rule)
                if rule.kind is Kind.INVALID_GRANT:
                    raise revoked()
            response = json_response(simulation.grants.token(form))
        except OAuthError as error:
            response = json_response(error.body, error.status)
        except errors.ApiError as error:
            response = _error_response(error)
        response.close = close
        key = CallKey("oauth.token", email, "", response.status, 1, incremental=False)
        simulation.counters.record(key, len(response.body), "")
        return response

    def _revoke(self, request: Request) -> Response:
        form = dict(parse_qsl(f"{request.query}&{request.body.decode('latin-1')}"))
        try:
            self.simulation.grants.revoke_token(form.get("token", ""))
        except OAuthError as error:
            return json_response(error.body, error.status)
        return json_response({})


class _CountedError(Exception):
    """An error answer together with what it is counted by."""

    def __init__(self, cause: errors.ApiError, key: CallKey, call: Call | None = None) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.key = key
        self.drift = call.drift if call else []


def _key(method: str, email: str, calendar: str, status: int, call: Call | None) -> CallKey:
    if call is None:
        return CallKey(method, email, calendar, status, 1, incremental=False)
    return CallKey(method, email, calendar, status, call.page, incremental="syncToken" in call.query)


def _authorization(request: Request, query: dict[str, list[str]]) -> str | None:
    header = request.headers.get(b"authorization")
    if header is not None:
        return header.decode("latin-1")
    tokens = query.get("access_token") or query.get("oauth_token")
    return tokens[-1] if tokens else None


async def _delay(rule: Rule) -> str:
    """Wait as a rule scripts it; return how the connection is to be broken, if it is."""
    if rule.kind is Kind.LATENCY:
        await asyncio.sleep(rule.seconds)
    elif rule.kind is Kind.HANG:
        await asyncio.sleep(rule.seconds or _FOREVER)
        return "before"
    elif rule.kind is Kind.DROP:
        return "before"
    elif rule.kind is Kind.DROP_BODY:
        return "within"
    return ""


async def _before(rule: Rule, call: Call) -> None:
    """Apply what a rule does before the call is answered."""
    if rule.kind in (Kind.LATENCY, Kind.HANG):
        await _delay(rule)
    elif rule.kind is Kind.EMPTY_PAGE:
        call.page_limit = 0
    refuse(rule)


def _success(result: Resource | ListPage | None, call: Call, rules: list[Rule]) -> Response:
    """Turn a handler's result into a response, then break it as the rules say."""
    if result is None:
        response = Response(204)
    else:
        etag = result.etag if isinstance(result, ListPage) else result.get("etag")
        if etag and call.headers.get(b"if-none-match") in (etag.encode(), b"*"):
            response = Response(304, headers=[(b"etag", etag.encode())])
        else:
            fields = call.text("fields")
            head = result.head if isinstance(result, ListPage) else result
            mask = parse_mask(fields, str(head.get("kind"))) if fields else None
            if isinstance(result, ListPage):
                for rule in rules:
                    if rule.kind in PAGE_KINDS:
                        spoil(rule, call, result)
                body = result.render(mask)
            else:
                body = dumps(result if mask is None else masked(result, mask))
            response = Response(200, body, headers=[(b"etag", etag.encode())] if etag else [])
    for rule in rules:
        if rule.kind is Kind.TRUNCATE:
            response.body = response.body[: len(response.body) // 2]
        elif rule.kind is Kind.HTML:
            response.body, response.content_type = _HTML, b"text/html; charset=UTF-8"
        elif rule.kind in (Kind.DROP, Kind.HANG):
            response.close = "before"
        elif rule.kind is Kind.DROP_BODY:
            response.close = "within"
    return response


def _error_response(error: errors.ApiError) -> Response:
    headers = []
    if error.retry_after is not None:
        headers.append((b"retry-after", str(error.retry_after).encode()))
    if error.status == 401:
        headers.append((b"www-authenticate", b'Bearer realm="https://accounts.google.com/", error="invalid_token"'))
    return Response(error.status, error.body(), headers=headers)
