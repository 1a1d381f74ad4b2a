"""Google Cloud Monitoring: the calls to the Calendar API that Google counted.

Belongs here: the access token of a service account, and the month to date of one count. Does not: the app's own count
of the same calls (`scaling.queries`), or what a difference means (`scaling.sources.derived`).

Shapes: cloud.google.com/monitoring/api/ref_v3/rest/v3/projects.timeSeries/list. Integers are decimal strings, points
come newest first, an interval does not include its start, and an answer without ``timeSeries`` has no data.
"""

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import quote

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from google.auth.exceptions import GoogleAuthError
from google.oauth2.service_account import Credentials
from pydantic import (
    AfterValidator,
    AwareDatetime,
    ConfigDict,
    Field,
    NonNegativeInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.alias_generators import to_camel

from scaling import tracing
from scaling.samples import Sample, Status, measured
from scaling.sources import Reach
from scaling.sources.http import Answer, Body, Request, SourceError, ask, drifted, parse, sampled, unmeasured

SCOPE = "https://www.googleapis.com/auth/monitoring.read"
FILTER = (
    'metric.type="serviceruntime.googleapis.com/api/request_count" AND resource.type="consumed_api"'
    ' AND resource.labels.service="calendar-json.googleapis.com"'
)
CLASS = "response_code_class"
PERIOD = timedelta(minutes=30)
"""Of the sums. The window is a whole number of them from midnight UTC of the first, so whichever end they are counted
from, none reaches into the month before."""
LAG = timedelta(minutes=30)
"""What was counted may stay invisible this long."""
POINTS_A_PAGE = 10_000
"""A month has 1,488 half hours for each class of response."""
MOST_PAGES = 40
MOST_TOKEN_BYTES = 64 * 1024

_FILE, _PROJECT = "GOOGLE_MONITORING_CREDENTIALS_FILE", "GOOGLE_MONITORING_PROJECT"
_TOKENS_FROM = "Google's token endpoint"


def _count(text: str) -> str:
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(2**63))):
        raise ValueError("no decimal integer")
    return text


class _KeyFile(Body):
    type: Literal["service_account"]
    client_email: Annotated[str, Field(min_length=1)]
    private_key: Annotated[str, Field(min_length=1)]
    private_key_id: str | None = None


class _Token(Body):
    access_token: Annotated[str, Field(pattern=r"^[\x21-\x7e]+$")]
    token_type: Literal["Bearer"]
    expires_in: NonNegativeInt


class _Camel(Body):
    model_config = ConfigDict(alias_generator=to_camel)


class _Interval(_Camel):
    start_time: AwareDatetime | None = None
    end_time: AwareDatetime


class _Value(_Camel):
    int64_value: Annotated[str, AfterValidator(_count)]


class _Point(_Camel):
    interval: _Interval
    value: _Value


class _Counted(_Camel):
    type: Literal["serviceruntime.googleapis.com/api/request_count"]
    labels: dict[str, str] = Field(default_factory=dict)


class _Resource(_Camel):
    type: Literal["consumed_api"]


class _Series(_Camel):
    metric: _Counted
    resource: _Resource
    metric_kind: Literal["DELTA", "GAUGE"]
    value_type: Literal["INT64"]
    points: list[_Point]


class _Trouble(_Camel):
    code: int = 0


class _Page(_Camel):
    time_series: list[_Series] = Field(default_factory=list)
    next_page_token: str = ""
    unit: str = ""
    execution_errors: list[_Trouble] = Field(default_factory=list)
    unreachable: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _is_a_page(self) -> Self:
        """No data is an answer without series, but so is any other object: that one has keys a page has not."""
        if not self.time_series and self.model_extra:
            raise ValueError("no page of series")
        return self


_KEY_FILE = TypeAdapter(_KeyFile)
_TOKEN = TypeAdapter(_Token)
_PAGE = TypeAdapter(_Page)


@dataclass(frozen=True, slots=True)
class _TokenAnswer:
    """What google-auth reads of an answer."""

    status: int
    headers: Mapping[str, str]
    data: bytes


@dataclass(frozen=True, slots=True)
class _TokenTransport:
    """google-auth's way to its endpoint, with the limits of every other request.

    It raises for whatever is no token, so that google-auth neither repeats it by its own clock nor quotes it.

    Attributes:
        reach: client and time limit.
    """

    reach: Reach

    def __call__(
        self,
        url: str,
        method: str = "POST",
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        **_: object,
    ) -> _TokenAnswer:
        """Send one request.

        Raises:
            SourceError: there is no token within the limits.
        """
        limit = self.reach.settings.scaling_source_timeout_seconds
        asked = {"asked": f"{method} {url}"}
        ends = time.monotonic() + limit
        late = SourceError(
            f"{_TOKENS_FROM} did not answer within {limit:g} s (SCALING_SOURCE_TIMEOUT_SECONDS)",
            {**asked, "failure": "timeout"},
        )
        content = b""
        try:
            sent = self.reach.http.stream(
                method, url, content=body, headers=dict(headers or {}), timeout=limit, follow_redirects=False
            )
            with tracing.requested(method, sent) as response:
                for chunk in response.iter_bytes() if response.status_code == httpx.codes.OK else ():
                    content += chunk
                    if len(content) > MOST_TOKEN_BYTES:
                        raise SourceError(
                            f"the answer of {_TOKENS_FROM} is longer than {MOST_TOKEN_BYTES} bytes",
                            {**asked, "failure": "size"},
                        )
                    if time.monotonic() > ends:  # httpx limits each read, not all of them together
                        raise late
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise SourceError(f"{_TOKENS_FROM} could not be connected to", {**asked, "failure": "connect"}) from None
        except httpx.TimeoutException:
            raise late from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            # Only its type: messages of httpx can quote headers.
            raise SourceError(
                f"the answer of {_TOKENS_FROM} broke off ({type(error).__name__})", {**asked, "failure": "incomplete"}
            ) from None
        if response.status_code != httpx.codes.OK:
            raise _no_token(response, asked)
        parse(_TOKEN, Answer(_TOKENS_FROM, content, asked))
        return _TokenAnswer(response.status_code, response.headers, content)


def _no_token(response: httpx.Response, asked: Mapping[str, Any]) -> SourceError:
    status = response.status_code
    if response.is_redirect:
        what = "redirects elsewhere, where nothing is sent"
    elif status == httpx.codes.TOO_MANY_REQUESTS:
        what = "limits the rate of requests"
    elif status >= httpx.codes.INTERNAL_SERVER_ERROR:
        what = "failed"
    else:
        what = f"does not accept the key of {_FILE}; it was deleted or disabled, or this machine's clock is wrong"
    return SourceError(f"{_TOKENS_FROM} {what} (status {status})", {**asked, "failure": "status", "status": status})


def _credentials(path: Path, token_url: str) -> Credentials:
    """Read the key file of a service account; of what it says, its addresses are not believed.

    Raises:
        SourceError: it is no such file.
    """
    try:
        key = _KEY_FILE.validate_json(path.read_bytes())
        if not isinstance(load_pem_private_key(key.private_key.encode(), password=None), RSAPrivateKey):
            raise TypeError("no RSA key")
        made: Credentials = Credentials.from_service_account_info(  # type: ignore[no-untyped-call]
            {**key.model_dump(include=set(_KeyFile.model_fields)), "token_uri": token_url}, scopes=[SCOPE]
        )
        return made
    except OSError as error:
        raise SourceError(f"the file of {_FILE} cannot be read ({type(error).__name__})") from None
    except ValidationError:
        what = "is not the JSON key of a service account"
    except (ValueError, TypeError, UnsupportedAlgorithm, GoogleAuthError):
        what = "has a private key that cannot be used"
    raise SourceError(f"the file of {_FILE} {what}; make a new key of the account, type JSON")


def _access_token(reach: Reach, path: Path) -> str:
    """Get a token for one measurement.

    Raises:
        SourceError: the key is not usable, or Google gives no token for it.
    """
    credentials = _credentials(path, reach.settings.google_monitoring_token_url)
    try:
        credentials.refresh(_TokenTransport(reach))  # type: ignore[no-untyped-call]
    except (GoogleAuthError, ValueError, TypeError) as error:
        raise SourceError(f"no token could be asked for with the key of {_FILE} ({type(error).__name__})") from None
    return str(credentials.token)


@dataclass(frozen=True, slots=True)
class GoogleCalendarCalls:
    """How many calls to the Calendar API Google has counted in a project since the first of the month, UTC.

    Attributes:
        max_age: a newest half hour with calls that ended longer ago is stale: every connection's list of calendars is
            read once an hour, so none at all for so long is a count that stands still, or a sync that does.
    """

    max_age: timedelta = timedelta(hours=6)

    def describe(self) -> str:
        """What is asked of whom, in words for people."""
        return "Google Cloud Monitoring: requests to calendar-json.googleapis.com, month to date, by response class"

    def read(self, metric: str, reach: Reach) -> tuple[Sample, ...]:
        """Ask for a token, then for the count; see `scaling.sources.Source`."""
        settings = reach.settings
        path = settings.google_monitoring_credentials_file
        # An empty variable is the path ".".
        needs = {_PROJECT: settings.google_monitoring_project or "", _FILE: str(path) if path and path.name else ""}
        private: list[str] = []
        return sampled(metric, reach, lambda: self._read(metric, reach, private), needs=needs, private=private)

    def _read(self, metric: str, reach: Reach, private: list[str]) -> tuple[Sample, ...]:
        now = reach.now.astimezone(UTC)
        first = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        end = first + (now - first) // PERIOD * PERIOD
        period = f"{first:%Y-%m}"
        if first == end:
            note = "nothing was asked: the month has no whole half hour yet"
            return (unmeasured(metric, reach, Status.EMPTY, note, {}, period=period),)
        token = _access_token(reach, reach.settings.google_monitoring_credentials_file or Path())
        private.append(token)
        pages, answers = _pages(reach, token, first, end)
        by_class, ends = _sums(pages, answers, first, end)
        evidence: dict[str, Any] = {
            **answers[0].evidence,
            "sha256": [answer.evidence["sha256"] for answer in answers],
            "bytes": sum(answer.evidence["bytes"] for answer in answers),
            "half_hours": len(ends),
            "by_class": by_class,
        }
        errors = sorted({trouble.code for page in pages for trouble in page.execution_errors})
        unreachable = sorted({region for page in pages for region in page.unreachable})
        if errors or unreachable:
            evidence |= {"execution_error_codes": errors, "unreachable": unreachable}
            note = "Google says that the count may be incomplete"
            return (unmeasured(metric, reach, Status.PARTIAL, note, evidence, period=period),)
        if not ends:
            note = "Google has no count of this month yet"
            return (unmeasured(metric, reach, Status.EMPTY, note, evidence, period=period),)
        newest = max(ends)
        evidence["data_complete_until"] = min(newest, now - LAG).isoformat()
        if now - newest > self.max_age:
            note = f"the newest half hour with calls ended {newest:%Y-%m-%d %H:%M}"
            return (unmeasured(metric, reach, Status.STALE, note, evidence, period=period),)
        return (measured(metric, reach.now, float(sum(by_class.values())), period=period, evidence=evidence),)


def _pages(reach: Reach, token: str, first: datetime, end: datetime) -> tuple[list[_Page], list[Answer]]:
    """Read the count page by page.

    Raises:
        SourceError: a page does not come, or not as documented, or the pages never end.
    """
    settings = reach.settings
    params = (
        ("filter", FILTER),
        ("interval.startTime", _iso(first)),
        ("interval.endTime", _iso(end)),
        ("aggregation.alignmentPeriod", f"{PERIOD.total_seconds():.0f}s"),
        ("aggregation.perSeriesAligner", "ALIGN_SUM"),
        ("aggregation.crossSeriesReducer", "REDUCE_SUM"),
        ("aggregation.groupByFields", f"metric.labels.{CLASS}"),
        ("view", "FULL"),
        ("pageSize", str(POINTS_A_PAGE)),
    )
    project = quote(settings.google_monitoring_project or "", safe=":")
    pages: list[_Page] = []
    answers: list[Answer] = []
    following = ""
    seen: set[str] = set()
    while True:
        answer = ask(
            reach,
            Request(
                "Google Cloud Monitoring",
                "GET",
                f"{settings.google_monitoring_endpoint}/v3/projects/{project}/timeSeries",
                f"{_PROJECT} and {_FILE} (a service account with the role Monitoring Viewer)",
                headers={"Authorization": f"Bearer {token}"},
                params=(*params, *([("pageToken", following)] if following else [])),
            ),
        )
        pages.append(parse(_PAGE, answer))
        answers.append(answer)
        following = pages[-1].next_page_token
        if not following:
            return pages, answers
        if following in seen or len(pages) >= MOST_PAGES:
            raise drifted(answer, ["nextPageToken: leads in a circle, or on for ever"])
        seen.add(following)


def _sums(
    pages: list[_Page], answers: list[Answer], first: datetime, end: datetime
) -> tuple[dict[str, int], set[datetime]]:
    """Add up the points by class of response.

    Raises:
        SourceError: a point comes twice, or is not of the window that was asked for.
    """
    by_class: dict[str, int] = defaultdict(int)
    seen: set[tuple[str, datetime]] = set()
    for page, answer in zip(pages, answers, strict=True):
        for series in page.time_series:
            kind = series.metric.labels.get(CLASS, "unknown")
            for point in series.points:
                at, since = point.interval.end_time.astimezone(UTC), point.interval.start_time
                if not first < at <= end or (since is not None and not first <= since <= at):
                    raise drifted(answer, ["points: one is not of the window that was asked for"])
                if (kind, at) in seen:
                    raise drifted(answer, ["points: one comes twice"])
                seen.add((kind, at))
                by_class[kind] += int(point.value.int64_value)
    return dict(by_class), {at for _, at in seen}


def _iso(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
