"""The APIs that metrics of the thresholds come from, on 127.0.0.1 and in their documented shapes.

Belongs here: a Prometheus server's query, a Supabase project's metrics, the management APIs of Supabase and Upstash,
Vercel's metrics and bills, Anthropic's reports, Google's tokens and count of calls; their authentication and paging;
scripted misbehaviour.
Does not: what any of it means (`scaling.sources`).

`python -m devstack.metrics_apis` serves plausible figures and prints the environment that points the pipelines at them.
"""

import argparse
import asyncio
import base64
import contextlib
import json
import logging
import re
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import uvicorn
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from google.auth import jwt
from google.auth.exceptions import GoogleAuthError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

Json = dict[str, Any]

PROJECT = "abcdefghijklmnopqrst"
ORGANIZATION = "acme"
TEAM = "team_acme"
REDIS = "11111111-2222-3333-4444-555555555555"
GOOGLE_PROJECT = "acme-calendar"
GOOGLE_ACCOUNT = f"metrics@{GOOGLE_PROJECT}.iam.gserviceaccount.com"
GOOGLE_AUDIENCE = "https://oauth2.googleapis.com/token"
GOOGLE_SCOPE = "https://www.googleapis.com/auth/monitoring.read"
CALENDAR_CALLS = {
    "metric.type": "serviceruntime.googleapis.com/api/request_count",
    "resource.type": "consumed_api",
    "resource.labels.service": "calendar-json.googleapis.com",
}
START_TIMEOUT_SECONDS = 20.0
DAY = timedelta(days=1)


@dataclass(slots=True)
class Figures:
    """What the APIs know; a test writes into it.

    Attributes:
        queries: of Prometheus, the ``data`` of an expression's answer; any other expression has no series.
        warnings: that Prometheus adds to every answer.
        exposition: metrics of the Supabase project, text format.
        organization: of Supabase.
        disk: use of the project's disk.
        poolers: of the project.
        vercel: points of the metrics query, whatever the metric; those within the asked range that begin one of the
            asked buckets are answered.
        charges: of the team, FOCUS rows; those of the asked range are answered.
        costs: results of the cost report by day.
        usage_days: results of the usage report by day.
        usage_hours: the same by hour.
        redis: statistics of the database.
        most_buckets: on one page of a report, however many were asked for.
        google_calls: that Google counted, by class of response (``2xx``), by the end of the minute they were made in.
        most_points: on one page of Google's, however many were asked for.
    """

    queries: dict[str, Json] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    exposition: str = "# TYPE up gauge\nup 1\n"
    organization: Json = field(default_factory=lambda: {"id": ORGANIZATION, "name": "Acme", "plan": "free"})
    disk: Json = field(default_factory=dict)
    poolers: list[Json] = field(default_factory=list)
    vercel: list[Json] = field(default_factory=list)
    charges: list[Json] = field(default_factory=list)
    costs: dict[datetime, list[Json]] = field(default_factory=dict)
    usage_days: dict[datetime, list[Json]] = field(default_factory=dict)
    usage_hours: dict[datetime, list[Json]] = field(default_factory=dict)
    redis: Json = field(default_factory=dict)
    most_buckets: int = 168
    google_calls: dict[datetime, dict[str, int]] = field(default_factory=dict)
    most_points: int = 100_000


@dataclass(slots=True)
class Fault:
    """One scripted misbehaviour; of several fields the first one that is set counts.

    Attributes:
        status: answered with the service's usual error body.
        headers: of that answer.
        body: answered with status 200, whatever was asked.
        content_type: of that body.
        truncate: the connection closes before the announced end of the answer.
        hang_seconds: nothing is answered for that long.
        trickle_seconds: one byte is sent each time that passes.
        flood_bytes: the answer is that long.
        drop: the connection closes before a byte is sent.
        times: how often; None: always.
        path: only requests that begin so.
    """

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    content_type: str = "application/json"
    truncate: bool = False
    hang_seconds: float | None = None
    trickle_seconds: float | None = None
    flood_bytes: int | None = None
    drop: bool = False
    times: int | None = None
    path: str = "/"


@dataclass(slots=True)
class MetricsApis:
    """The running server.

    Attributes:
        url: where it listens.
        figures: what it knows.
        secret: part of every credential it accepts, but of Google's key.
        key_file: of the service account that gets tokens; gone when the server is.
        public_key: that its assertions are checked against.
        faults: what goes wrong; the first that is for a request and not used up.
        requests: method, path and query of everything that was asked.
        bodies: what was sent with a POST.
    """

    url: str
    figures: Figures
    secret: str = field(repr=False)
    key_file: Path
    public_key: bytes
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str, list[tuple[str, str]]]] = field(default_factory=list)
    bodies: list[Json] = field(default_factory=list)

    def environment(self) -> dict[str, str]:
        """Point the pipelines at the server, by the variables that they read."""
        return {
            "SCALING_PROMETHEUS_URL": self.url,
            "SCALING_PROMETHEUS_USER": "pipeline",
            "SCALING_PROMETHEUS_PASSWORD": f"prometheus-{self.secret}",
            "VERCEL_ENDPOINT": self.url,
            "VERCEL_TOKEN": f"vcp_{self.secret}",
            "VERCEL_TEAM_ID": TEAM,
            "ANTHROPIC_ENDPOINT": self.url,
            "ANTHROPIC_ADMIN_KEY": f"sk-ant-admin-{self.secret}",
            "UPSTASH_ENDPOINT": self.url,
            "UPSTASH_EMAIL": "ops@example.com",
            "UPSTASH_API_KEY": f"upstash-{self.secret}",
            "UPSTASH_DATABASE_ID": REDIS,
            "SUPABASE_ENDPOINT": self.url,
            "SUPABASE_PROJECT_ENDPOINT": self.url,
            "SUPABASE_PROJECT_REF": PROJECT,
            "SUPABASE_ORGANIZATION": ORGANIZATION,
            "SUPABASE_ACCESS_TOKEN": f"sbp_{self.secret}",
            "SUPABASE_SECRET_KEY": f"sb_secret_{self.secret}",
            "GOOGLE_MONITORING_ENDPOINT": self.url,
            "GOOGLE_MONITORING_TOKEN_URL": f"{self.url}/token",
            "GOOGLE_MONITORING_PROJECT": GOOGLE_PROJECT,
            "GOOGLE_MONITORING_CREDENTIALS_FILE": str(self.key_file),
        }

    def fault(self, path: str) -> Fault | None:
        """Take the fault of a request."""
        for each in self.faults:
            if path.startswith(each.path) and (each.times is None or each.times > 0):
                each.times = None if each.times is None else each.times - 1
                return each
        return None


class _Protocol(HttpToolsProtocol):
    """uvicorn's protocol, which also lets a fault close the connection before an answer."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["transport"] = self.transport  # type: ignore[typeddict-unknown-key]


class _Api:
    """The endpoints, behind the faults."""

    def __init__(self, served: MetricsApis) -> None:
        self.served = served
        self.app = Starlette(
            routes=[
                Route("/api/v1/query", self.prometheus),
                Route("/customer/v1/privileged/metrics", self.exposition),
                Route("/v1/organizations/cost_report", self.costs),
                Route("/v1/organizations/usage_report/messages", self.usage),
                Route("/v1/organizations/{slug}", self.organization),
                Route("/v1/projects/{ref}/config/disk/util", self.disk),
                Route("/v1/projects/{ref}/config/database/pooler", self.poolers),
                Route("/metrics/v1", self.vercel, methods=["POST"]),
                Route("/v1/billing/charges", self.charges),
                Route("/v2/redis/stats/{database}", self.redis),
                Route("/token", self.google_token, methods=["POST"]),
                Route("/v3/projects/{project}/timeSeries", self.google_series),
            ]
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope)
        self.served.requests.append((request.method, request.url.path, request.query_params.multi_items()))
        fault = self.served.fault(request.url.path)
        if fault is None:
            await self.app(scope, receive, send)
        else:
            await self._misbehave(fault, scope, receive, send)

    async def _misbehave(self, fault: Fault, scope: Scope, receive: Receive, send: Send) -> None:
        if fault.status is not None:
            await JSONResponse(
                {"error": {"code": "scripted", "message": "scripted"}}, fault.status, dict(fault.headers)
            )(scope, receive, send)
        elif fault.body is not None:
            await Response(fault.body, media_type=fault.content_type)(scope, receive, send)
        elif fault.truncate:
            answer = _Kept()
            await self.app(scope, receive, answer)
            await send(answer.start)
            await send({"type": "http.response.body", "body": answer.body[: len(answer.body) // 2], "more_body": True})
            raise _BrokenOffError
        elif fault.hang_seconds is not None:
            await asyncio.sleep(fault.hang_seconds)
        elif fault.trickle_seconds is not None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(1000):
                await send({"type": "http.response.body", "body": b" ", "more_body": True})
                await asyncio.sleep(fault.trickle_seconds)
        elif fault.flood_bytes is not None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(fault.flood_bytes // 65536 + 1):
                await send({"type": "http.response.body", "body": b" " * 65536, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        else:
            scope["transport"].abort()

    async def prometheus(self, request: Request) -> Response:
        environment = self.served.environment()
        wanted = (environment["SCALING_PROMETHEUS_USER"], environment["SCALING_PROMETHEUS_PASSWORD"])
        if _basic(request) != wanted:
            return PlainTextResponse("Unauthorized\n", 401)
        query = request.query_params.get("query", "")
        if not query or query.count("(") != query.count(")"):
            return JSONResponse({"status": "error", "errorType": "bad_data", "error": "parse error"}, 400)
        data = self.served.figures.queries.get(query, {"resultType": "vector", "result": []})
        warnings = self.served.figures.warnings
        return JSONResponse({"status": "success", "data": data, **({"warnings": warnings} if warnings else {})})

    async def exposition(self, request: Request) -> Response:
        if _basic(request) != ("service_role", self.served.environment()["SUPABASE_SECRET_KEY"]):
            return JSONResponse({"message": "Unauthorized"}, 401)
        return Response(self.served.figures.exposition, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def organization(self, request: Request) -> Response:
        if not self._bearer(request, "SUPABASE_ACCESS_TOKEN"):
            return JSONResponse({"message": "Unauthorized"}, 401)
        if request.path_params["slug"] != ORGANIZATION:
            return JSONResponse({"message": "Organization not found"}, 404)
        return JSONResponse(self.served.figures.organization)

    async def disk(self, request: Request) -> Response:
        return self._project(request, self.served.figures.disk)

    async def poolers(self, request: Request) -> Response:
        return self._project(request, self.served.figures.poolers)

    def _project(self, request: Request, content: object) -> Response:
        if not self._bearer(request, "SUPABASE_ACCESS_TOKEN"):
            return JSONResponse({"message": "Unauthorized"}, 401)
        if request.path_params["ref"] != PROJECT:
            return JSONResponse({"message": "Project not found"}, 404)
        return JSONResponse(content)

    async def vercel(self, request: Request) -> Response:
        if not self._bearer(request, "VERCEL_TOKEN"):
            return _vercel_error(403, "forbidden", "Not authorized")
        body = await request.json()
        self.served.bodies.append(body)
        if body["scope"]["ownerId"] != TEAM:
            return _vercel_error(403, "forbidden", "Not authorized")
        start, end = (datetime.fromisoformat(body["timeRange"][key]) for key in ("start", "end"))
        series = [
            each
            for each in self.served.figures.vercel
            if start <= (at := _moment(each["timestamp"])) < end and at.timestamp() % body["bucketSeconds"] == 0
        ]
        return JSONResponse({"series": series, "summary": [], "meta": {"statistics": {}, "sources": []}})

    async def charges(self, request: Request) -> Response:
        if not self._bearer(request, "VERCEL_TOKEN"):
            return _vercel_error(403, "forbidden", "Not authorized")
        start, end = (datetime.fromisoformat(request.query_params[key]) for key in ("from", "to"))
        lines = [
            json.dumps(each) + "\n"
            for each in self.served.figures.charges
            if start <= _moment(each["ChargePeriodStart"]) < end
        ]
        return Response("".join(lines), media_type="application/jsonl")

    async def costs(self, request: Request) -> Response:
        return self._report(request, self.served.figures.costs, DAY)

    async def usage(self, request: Request) -> Response:
        if request.query_params.get("bucket_width") == "1h":
            return self._report(request, self.served.figures.usage_hours, timedelta(hours=1))
        return self._report(request, self.served.figures.usage_days, DAY)

    def _report(self, request: Request, results: Mapping[datetime, Sequence[Json]], width: timedelta) -> Response:
        asked = request.query_params
        if request.headers.get("x-api-key") != self.served.environment()["ANTHROPIC_ADMIN_KEY"]:
            return _anthropic_error(401, "authentication_error", "invalid x-api-key")
        if not request.headers.get("anthropic-version"):
            return _anthropic_error(400, "invalid_request_error", "anthropic-version: header is required")
        most = 31 if width == DAY else 168
        limit = int(asked.get("limit", "7" if width == DAY else "24"))
        if not 1 <= limit <= most:
            return _anthropic_error(400, "invalid_request_error", f"limit: must be 1 to {most}")
        start, end = datetime.fromisoformat(asked["starting_at"]), datetime.fromisoformat(asked["ending_at"])
        if page := asked.get("page"):
            start = datetime.fromisoformat(base64.urlsafe_b64decode(page.removeprefix("page_")).decode())
        limit = min(limit, self.served.figures.most_buckets)
        known = sorted(at for at in results if start <= at and at + width <= end)
        data = [
            {"starting_at": _rfc(at), "ending_at": _rfc(at + width), "results": list(results[at])}
            for at in known[:limit]
        ]
        rest = known[limit:]
        following = f"page_{base64.urlsafe_b64encode(rest[0].isoformat().encode()).decode()}" if rest else None
        return JSONResponse({"data": data, "has_more": bool(rest), "next_page": following})

    async def redis(self, request: Request) -> Response:
        environment = self.served.environment()
        if _basic(request) != (environment["UPSTASH_EMAIL"], environment["UPSTASH_API_KEY"]):
            return PlainTextResponse("Unauthorized", 401)
        if request.path_params["database"] != REDIS:
            return PlainTextResponse("database not found", 404)
        return JSONResponse(self.served.figures.redis)

    async def google_token(self, request: Request) -> Response:
        form = dict(parse_qsl((await request.body()).decode()))
        if form.get("grant_type") != "urn:ietf:params:oauth:grant-type:jwt-bearer":
            return JSONResponse({"error": "unsupported_grant_type", "error_description": "Invalid grant_type"}, 400)
        try:
            claims = jwt.decode(  # type: ignore[no-untyped-call]
                form.get("assertion", ""), certs=self.served.public_key, audience=GOOGLE_AUDIENCE
            )
        except (ValueError, GoogleAuthError):
            return JSONResponse({"error": "invalid_grant", "error_description": "Invalid JWT Signature."}, 400)
        if claims["iss"] != GOOGLE_ACCOUNT:
            return JSONResponse(
                {"error": "invalid_grant", "error_description": "Invalid grant: account not found"}, 400
            )
        if claims["scope"] != GOOGLE_SCOPE:
            return JSONResponse({"error": "invalid_scope", "error_description": "Invalid OAuth scope."}, 400)
        return JSONResponse(
            {"access_token": f"ya29.c.{self.served.secret}", "expires_in": 3599, "token_type": "Bearer"}
        )

    async def google_series(self, request: Request) -> Response:
        asked = request.query_params
        if request.headers.get("authorization") != f"Bearer ya29.c.{self.served.secret}":
            return _google_error(401, "UNAUTHENTICATED", "Request had invalid authentication credentials.")
        if request.path_params["project"] != GOOGLE_PROJECT:
            return _google_error(403, "PERMISSION_DENIED", "Permission monitoring.timeSeries.list denied.")
        wanted = dict(re.findall(r'([\w.]+)\s*=\s*"([^"]*)"', asked.get("filter", "")))
        seconds = re.fullmatch(r"(\d+)s", asked.get("aggregation.alignmentPeriod", ""))
        start, end = (
            _moment(asked.get(f"interval.{key}", _rfc(datetime.now(UTC)))) for key in ("startTime", "endTime")
        )
        if (
            "metric.type" not in wanted
            or seconds is None
            or int(seconds[1]) < 60
            or asked.get("aggregation.perSeriesAligner") != "ALIGN_SUM"
            or asked.get("aggregation.crossSeriesReducer") != "REDUCE_SUM"
            or not start < end
        ):
            return _google_error(400, "INVALID_ARGUMENT", "Request contains an invalid argument.")
        group = asked.get("aggregation.groupByFields") == "metric.labels.response_code_class"
        width = timedelta(seconds=int(seconds[1]))
        sums: dict[tuple[str, datetime], int] = {}
        for at, classes in self.served.figures.google_calls.items() if wanted == CALENDAR_CALLS else ():
            for kind, count in classes.items() if start < at <= end else ():
                key = (kind if group else "", end - (end - at) // width * width)
                sums[key] = sums.get(key, 0) + count
        points = sorted(sums.items(), key=lambda point: (point[0][0], -point[0][1].timestamp()))
        begin = int(asked.get("pageToken", "0"))
        limit = min(int(asked.get("pageSize", "100000")), self.served.figures.most_points)
        return JSONResponse(
            {
                **({"timeSeries": _series(points[begin : begin + limit], width), "unit": "1"} if points else {}),
                **({"nextPageToken": str(begin + limit)} if begin + limit < len(points) else {}),
            }
        )

    def _bearer(self, request: Request, name: str) -> bool:
        return request.headers.get("authorization") == f"Bearer {self.served.environment()[name]}"


class _BrokenOffError(Exception):
    """Makes the server close the connection where it is."""


class _Kept:
    """Keeps an answer in place of sending it."""

    def __init__(self) -> None:
        self.start: Json = {}
        self.body = b""

    async def __call__(self, message: Any) -> None:  # noqa: ANN401 - ASGI's messages are dictionaries
        if message["type"] == "http.response.start":
            self.start = dict(message)
        else:
            self.body += message.get("body", b"")


def _basic(request: Request) -> tuple[str, str] | None:
    kind, _, encoded = request.headers.get("authorization", "").partition(" ")
    if kind != "Basic":
        return None
    user, _, password = base64.b64decode(encoded).decode().partition(":")
    return user, password


def _vercel_error(status: int, code: str, message: str) -> Response:
    return JSONResponse({"error": {"code": code, "message": message}}, status)


def _anthropic_error(status: int, kind: str, message: str) -> Response:
    return JSONResponse({"type": "error", "error": {"type": kind, "message": message}}, status)


def _google_error(status: int, kind: str, message: str) -> Response:
    return JSONResponse({"error": {"code": status, "message": message, "status": kind}}, status)


def _series(points: Sequence[tuple[tuple[str, datetime], int]], width: timedelta) -> list[Json]:
    return [
        {
            "metric": {
                "type": CALENDAR_CALLS["metric.type"],
                **({"labels": {"response_code_class": kind}} if kind else {}),
            },
            "resource": {"type": CALENDAR_CALLS["resource.type"], "labels": {"project_id": GOOGLE_PROJECT}},
            "metricKind": "DELTA",
            "valueType": "INT64",
            "points": [
                {
                    "interval": {"startTime": _rfc(end - width), "endTime": _rfc(end)},
                    "value": {"int64Value": str(count)},
                }
                for (each, end), count in points
                if each == kind
            ],
        }
        for kind in sorted({kind for (kind, _), _ in points})
    ]


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _rfc(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def go_time(moment: datetime) -> str:
    """Write a moment as Upstash does.

    Args:
        moment: timezone-aware.
    """
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f").rstrip("0").rstrip(".") + " +0000 UTC"


def charge(day: datetime, cost: float, service: str = "Fast Data Transfer", category: str = "Usage") -> Json:
    """Make one row of a bill with every required column.

    Args:
        day: when it begins; it lasts a day.
        cost: billed, USD.
        service: its name.
        category: FOCUS's ChargeCategory.
    """
    return {
        "BilledCost": cost,
        "BillingCurrency": "USD",
        "ChargeCategory": category,
        "ChargePeriodStart": _rfc(day),
        "ChargePeriodEnd": _rfc(day + DAY),
        "ConsumedQuantity": cost * 6,
        "ConsumedUnit": "GB",
        "EffectiveCost": cost,
        "PricingCategory": "Standard",
        "PricingCurrency": "USD",
        "PricingQuantity": cost * 6,
        "PricingUnit": "GB",
        "RegionId": "iad1",
        "ServiceName": service,
        "ServiceProviderName": "Vercel",
        "Tags": {},
    }


def usage(
    model: str | None, uncached: int, *, read: int = 0, write_5m: int = 0, write_1h: int = 0, out: int = 0
) -> Json:
    """Make one result of the usage report with every documented key.

    Args:
        model: its name.
        uncached: tokens that came from no cache.
        read: tokens read from the cache.
        write_5m: tokens written to it for five minutes.
        write_1h: tokens written to it for an hour.
        out: tokens of the answers.
    """
    return {
        "api_key_id": None,
        "cache_creation": {"ephemeral_1h_input_tokens": write_1h, "ephemeral_5m_input_tokens": write_5m},
        "cache_read_input_tokens": read,
        "context_window": None,
        "inference_geo": None,
        "model": model,
        "output_tokens": out,
        "server_tool_use": {"web_search_requests": 0},
        "service_tier": None,
        "uncached_input_tokens": uncached,
        "workspace_id": None,
    }


def cost(cents: str) -> Json:
    """Make one result of the cost report with every documented key.

    Args:
        cents: decimal.
    """
    nothing = dict.fromkeys(
        ("context_window", "cost_type", "description", "inference_geo", "model", "service_tier", "token_type")
    )
    return {"amount": cents, "currency": "USD", "workspace_id": None, **nothing}


def plausible(now: datetime) -> Figures:
    """Figures of a team in good health that has just moved to Supabase's Pro plan.

    Args:
        now: the moment they end.
    """
    today = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    first = today.replace(day=1)
    month = [first + offset * DAY for offset in range((today - first).days + 1)]
    hours = [today + timedelta(hours=hour) for hour in range(24) if today + timedelta(hours=hour) <= now]
    spent = usage("claude-haiku-4-5", 120_000, read=800_000, write_5m=40_000, write_1h=5_000, out=60_000)
    five = timedelta(minutes=5)
    minutes = [now.replace(second=0, microsecond=0) - timedelta(minutes=n) for n in range(180, 0, -1)]
    return Figures(
        exposition=(
            "# TYPE pg_stat_database_num_backends gauge\n"
            'pg_stat_database_num_backends{datname="postgres"} 14\n'
            "# TYPE supavisor_connections_active gauge\n"
            'supavisor_connections_active{mode="transaction"} 31\n'
            'supavisor_connections_active{mode="session"} 4\n'
            "# TYPE pgbouncer_pools_client_waiting_connections gauge\n"
            "pgbouncer_pools_client_waiting_connections 0\n"
        ),
        organization={"id": ORGANIZATION, "name": "Acme", "plan": "pro", "opt_in_tags": []},
        disk={
            "timestamp": _rfc(now),
            "metrics": {
                "fs_size_bytes": 8_000_000_000,
                "fs_avail_bytes": 5_000_000_000,
                "fs_used_bytes": 3_000_000_000,
            },
        },
        poolers=[pooler()],
        vercel=[
            {"timestamp": _rfc(at), "dimensions": {"route": "/api/tasks"}, "values": {"value": 40.0 + at.minute}}
            for at in minutes
        ],
        charges=[charge(today - n * DAY, 4.0) for n in range(1, 40)],
        costs={day: [cost("1234.5")] for day in month},
        usage_days={day: [spent] for day in month if day < today},
        usage_hours={hour: [usage("claude-haiku-4-5", 5_000, out=2_500)] for hour in hours},
        redis={
            "hits": [{"x": go_time(now - n * five), "y": 10_000 - 60 * n} for n in range(12, -1, -1)],
            "misses": [{"x": go_time(now - n * five), "y": 9_000 - 40 * n} for n in range(12, -1, -1)],
            "daily_net_commands": 1_200,
        },
        google_calls={
            at: {"2xx": 96, "4xx": 4}
            for n in range(1, 31 * 48)
            if (at := first + n * timedelta(minutes=30)) <= now - timedelta(minutes=20)
        },
    )


def pooler(**others: Any) -> Json:  # noqa: ANN401 - JSON
    """Make the configuration of one pooler.

    Args:
        others: keys with other values.
    """
    return {
        "identifier": PROJECT,
        "database_type": "PRIMARY",
        "is_using_scram_auth": True,
        "db_user": "postgres",
        "db_host": "db.internal",
        "db_port": 6543,
        "db_name": "postgres",
        "connection_string": "postgresql://postgres:[YOUR-PASSWORD]@db.internal:6543/postgres",
        "default_pool_size": 15,
        "max_client_conn": 200,
        "pool_mode": "transaction",
        **others,
    }


def google_key(key: rsa.RSAPrivateKey, **others: Any) -> Json:  # noqa: ANN401 - JSON
    """Make the key file of the service account.

    Args:
        key: that signs for it.
        others: keys with other values.
    """
    return {
        "type": "service_account",
        "project_id": GOOGLE_PROJECT,
        "private_key_id": secrets.token_hex(20),
        "private_key": key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
        "client_email": GOOGLE_ACCOUNT,
        "client_id": "100000000000000000001",
        "auth_uri": "https://accounts.google.com/o/oauth2/auth",
        "token_uri": GOOGLE_AUDIENCE,
        "universe_domain": "googleapis.com",
        **others,
    }


@contextmanager
def run(figures: Figures | None = None, *, port: int = 0) -> Iterator[MetricsApis]:
    """Serve from a thread of this process.

    Args:
        figures: what is known; None: `plausible` ones of now.
        port: on 127.0.0.1; 0 picks a free one.

    Raises:
        RuntimeError: the server does not start.
    """
    with socket.socket() as listener, tempfile.TemporaryDirectory(prefix="metrics-apis-") as kept:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(128)
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        served = MetricsApis(
            f"http://127.0.0.1:{listener.getsockname()[1]}",
            figures or plausible(datetime.now(UTC)),
            secrets.token_hex(12),
            Path(kept) / "service-account.json",
            key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        )
        served.key_file.write_text(json.dumps(google_key(key)))
        config = uvicorn.Config(
            _Api(served),
            http=_Protocol,
            lifespan="off",
            access_log=False,
            log_level="critical",
            timeout_graceful_shutdown=1,
        )
        # A scripted break of the connection is no mistake of the application.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True, name="metrics-apis")
        thread.start()
        try:
            ends = time.monotonic() + START_TIMEOUT_SECONDS
            while not server.started:
                if not thread.is_alive() or time.monotonic() > ends:
                    raise RuntimeError("The metrics APIs did not start.")
                time.sleep(0.01)
            yield served
        finally:
            server.should_exit = True
            thread.join(START_TIMEOUT_SECONDS)


def main() -> None:
    """Serve plausible figures until Ctrl-C, after one JSON line with the environment that leads to them."""
    parser = argparse.ArgumentParser(prog="python -m devstack.metrics_apis", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1; 0 picks a free one (default)")
    arguments = parser.parse_args()
    with run(port=arguments.port) as served, contextlib.suppress(KeyboardInterrupt):
        sys.stdout.write(json.dumps(served.environment()) + "\n")
        sys.stdout.flush()
        threading.Event().wait()


if __name__ == "__main__":
    main()
