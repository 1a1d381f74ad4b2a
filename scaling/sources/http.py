"""One request to somebody else's API, and what may be believed of its answer.

Belongs here: limits of time and size, the one retry, refusal of redirects, strict reading of bodies, and that no
credential reaches a sample. Does not: any API's addresses or shapes (one module each beside this).
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import httpx
import tenacity
from pydantic import BaseModel, ConfigDict, SecretStr, TypeAdapter, ValidationError

from scaling import tracing
from scaling.samples import Sample, Status
from scaling.sources import Reach

MOST_BYTES = 8 * 1024 * 1024
"""Of a decoded body; ~200 series of a Supabase project are 60 kB, a month of grouped usage is below 1 MB."""
ATTEMPTS = 2
"""One retry: what still fails is asked again with the next measurement."""
RETRY_WAIT_SECONDS = 0.5
LONGEST_RETRY_AFTER_SECONDS = 5.0
"""Who asks for a longer pause gets it: nothing is retried before the next measurement."""
MOST_PROBLEMS = 5

T = TypeVar("T")


class Body(BaseModel):
    """Base of every documented body: further keys are fine, missing ones and other types are not."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of whom.

    Attributes:
        who: the service, as a sentence names it.
        method: GET, or POST where the API wants its query so.
        url: without credentials.
        credentials: settings that hold them, as a sentence names them.
        headers: further ones; their values stay out of samples.
        auth: user and password of basic authentication.
        params: query string.
        body: sent as JSON.
        most_bytes: a longer body is refused.
    """

    who: str
    method: str
    url: str
    credentials: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    auth: tuple[str, str] | None = field(default=None, repr=False)
    params: Sequence[tuple[str, str]] = ()
    body: Mapping[str, Any] | None = None
    most_bytes: int = MOST_BYTES


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer with status 200.

    Attributes:
        who: the service, as a sentence names it.
        content: the decoded body.
        evidence: what was asked, and the body's length, type and SHA-256.
    """

    who: str
    content: bytes = field(repr=False)
    evidence: Mapping[str, Any]


class SourceError(Exception):
    """A source did not answer, or not in its documented shape."""

    def __init__(self, sentence: str, evidence: Mapping[str, Any] | None = None) -> None:
        super().__init__(sentence)
        self.evidence = dict(evidence or {})


class _AgainError(Exception):
    """One attempt that is worth another."""

    def __init__(self, error: SourceError, wait_seconds: float) -> None:
        super().__init__(str(error))
        self.error = error
        self.wait_seconds = wait_seconds


def ask(reach: Reach, request: Request) -> Answer:
    """Send a request, at most twice, and read its whole answer.

    Args:
        reach: client and time limit.
        request: what to ask.

    Raises:
        SourceError: there is no complete answer with status 200 within the limits.
    """
    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        retry=tenacity.retry_if_exception_type(_AgainError),
        wait=_wait_seconds,
        reraise=True,
    )
    try:
        return retrying(_attempt, reach, request)
    except _AgainError as again:
        raise again.error from None


def _wait_seconds(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    return error.wait_seconds if isinstance(error, _AgainError) else RETRY_WAIT_SECONDS


def _attempt(reach: Reach, request: Request) -> Answer:
    who = request.who
    limit = reach.settings.scaling_source_timeout_seconds
    url = httpx.URL(request.url)
    auth = request.auth or ((url.username, url.password) if url.username else None)
    # httpx logs the address: a password inside it must not be there.
    url = url.copy_with(userinfo=b"")
    asked: dict[str, Any] = {"asked": f"{request.method} {url.copy_with(query=None)}"}
    if request.params:
        asked["params"] = [list(pair) for pair in request.params]
    if request.body is not None:
        asked["body"] = dict(request.body)
    ends = time.monotonic() + limit
    try:
        sent = reach.http.stream(
            request.method,
            url,
            params=list(request.params) or None,
            headers={"Accept-Encoding": "gzip", **request.headers},
            json=request.body,
            auth=httpx.BasicAuth(*auth) if auth else None,
            timeout=limit,
            follow_redirects=False,
        )
        with tracing.requested(request.method, sent) as response:
            is_ok = response.status_code == httpx.codes.OK
            content = _whole(request, response, ends, limit, asked) if is_ok else b""
    except (httpx.ConnectError, httpx.ConnectTimeout):
        raise _AgainError(
            SourceError(f"{who} could not be connected to", {**asked, "failure": "connect"}), RETRY_WAIT_SECONDS
        ) from None
    except httpx.TimeoutException:
        raise SourceError(
            f"{who} did not answer within {limit:g} s (SCALING_SOURCE_TIMEOUT_SECONDS)", {**asked, "failure": "timeout"}
        ) from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        # Only its type: messages of httpx can quote headers.
        raise SourceError(
            f"the answer of {who} broke off ({type(error).__name__})", {**asked, "failure": "incomplete"}
        ) from None
    if not is_ok:
        _refuse(request, response, asked)
    return Answer(
        who,
        content,
        {
            **asked,
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
            "content_type": response.headers.get("content-type", ""),
        },
    )


def _whole(request: Request, response: httpx.Response, ends: float, limit: float, asked: Mapping[str, Any]) -> bytes:
    chunks, size = [], 0
    for chunk in response.iter_bytes():
        size += len(chunk)
        if size > request.most_bytes:
            raise SourceError(
                f"the answer of {request.who} is longer than {request.most_bytes} bytes", {**asked, "failure": "size"}
            )
        if time.monotonic() > ends:  # httpx limits each read, not all of them together
            raise SourceError(
                f"{request.who} did not finish its answer within {limit:g} s (SCALING_SOURCE_TIMEOUT_SECONDS)",
                {**asked, "failure": "timeout"},
            )
        chunks.append(chunk)
    return b"".join(chunks)


def _refuse(request: Request, response: httpx.Response, asked: Mapping[str, Any]) -> None:
    status = response.status_code
    if response.is_redirect:
        what = "redirects elsewhere, where its credentials are not sent"
    else:
        what = {
            401: f"does not accept the credentials; check {request.credentials}",
            402: "wants a paid plan for this",
            403: f"forbids this; {request.credentials} lacks the role, or the plan lacks the feature",
            404: f"does not know what was asked for; check {request.credentials}",
            429: "limits the rate of requests",
        }.get(status, "failed" if status >= httpx.codes.INTERNAL_SERVER_ERROR else "refuses the request")
    error = SourceError(f"{request.who} {what} (status {status})", {**asked, "failure": "status", "status": status})
    if status == httpx.codes.TOO_MANY_REQUESTS or status >= httpx.codes.INTERNAL_SERVER_ERROR:
        wait = _retry_after(response)
        if wait <= LONGEST_RETRY_AFTER_SECONDS:
            raise _AgainError(error, wait)
    raise error


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the answer asks to wait; a date, or nonsense, counts as longer than anybody waits here."""
    text = response.headers.get("retry-after")
    if text is None:
        return RETRY_WAIT_SECONDS
    return float(text) if text.isascii() and text.isdigit() else LONGEST_RETRY_AFTER_SECONDS + 1


def parse(shape: TypeAdapter[T], answer: Answer) -> T:
    """Read a body as JSON of the documented shape.

    Args:
        shape: strict.
        answer: of the API.

    Raises:
        SourceError: it has another shape; the evidence says where, and has the body's SHA-256.
    """
    try:
        return shape.validate_json(answer.content)
    except ValidationError as error:
        raise drifted(answer, _problems(error)) from None


def parse_lines(shape: TypeAdapter[T], answer: Answer) -> list[T]:
    """Read a body as JSON Lines of the documented shape; an empty one has no lines.

    Args:
        shape: of each line, strict.
        answer: of the API.

    Raises:
        SourceError: a line has another shape, or breaks off.
    """
    read = []
    for number, line in enumerate(answer.content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            read.append(shape.validate_json(line))
        except ValidationError as error:
            raise drifted(answer, [f"line {number}: {problem}" for problem in _problems(error)]) from None
    return read


def drifted(answer: Answer, problems: Sequence[str]) -> SourceError:
    """The error of a body that is not as documented.

    Args:
        answer: with the body.
        problems: what is wrong with it, without its content.
    """
    return SourceError(
        f"the answer of {answer.who} is not as documented: {problems[0]}",
        {**answer.evidence, "failure": "shape", "problems": list(problems)},
    )


def _problems(error: ValidationError) -> list[str]:
    found = error.errors(include_input=False, include_url=False, include_context=False)
    listed = [
        f"{'.'.join(str(part) for part in problem['loc']) or 'body'}: {problem['type']}"
        for problem in found[:MOST_PROBLEMS]
    ]
    return listed + ([f"and {len(found) - MOST_PROBLEMS} more"] if len(found) > MOST_PROBLEMS else [])


def secret(value: SecretStr | None) -> str:
    """The text of a secret setting; empty when it is not set.

    Args:
        value: as the settings have it.
    """
    return value.get_secret_value() if value else ""


def sampled(
    metric: str,
    reach: Reach,
    read: Callable[[], tuple[Sample, ...]],
    *,
    needs: Mapping[str, str],
    private: Sequence[str] = (),
) -> tuple[Sample, ...]:
    """Measure, and turn every trouble into a sample without credentials.

    Args:
        metric: the name the samples carry.
        reach: what may be used for it.
        read: asks and reads; may raise `SourceError`.
        needs: settings without which nothing is asked, with their values.
        private: further values that must not appear in a sample.

    Returns:
        What was read; one `NOT_CONFIGURED` or `ERROR` sample otherwise.
    """
    missing = sorted(name for name, value in needs.items() if not value)
    if missing:
        evidence: dict[str, Any] = {"missing": missing, "note": f"nothing was asked: {', '.join(missing)} not set"}
        return (Sample(metric, reach.now, None, Status.NOT_CONFIGURED, evidence=evidence),)
    try:
        samples = read()
    except SourceError as error:
        samples = (unmeasured(metric, reach, Status.ERROR, str(error), error.evidence, key="error"),)
    hidden = [value for value in private if value]
    return tuple(
        replace(sample, dims=_scrubbed(sample.dims, hidden), evidence=_scrubbed(sample.evidence, hidden))
        for sample in samples
    )


def unmeasured(
    metric: str,
    reach: Reach,
    status: Status,
    sentence: str,
    evidence: Mapping[str, Any],
    *,
    dims: str = "",
    period: str = "",
    key: str = "note",
) -> Sample:
    """Make a sample without a value.

    Args:
        metric: the name it carries.
        reach: has the moment.
        status: why there is none.
        sentence: why there is none, for people.
        evidence: what else there is to know.
        dims: what was to be measured.
        period: the month of a figure that begins anew every month.
        key: of the sentence in the evidence.
    """
    return Sample(metric, reach.now, None, status, dims, period, {**evidence, key: sentence})


def _scrubbed(value: Any, hidden: Sequence[str]) -> Any:  # noqa: ANN401 - JSON
    """A server may echo what it was sent; its text is not trusted to keep it."""
    match value:
        case str():
            for each in hidden:
                value = value.replace(each, "…")
            return value
        case Mapping():
            return {_scrubbed(key, hidden): _scrubbed(each, hidden) for key, each in value.items()}
        case list() | tuple():
            return [_scrubbed(each, hidden) for each in value]
        case _:
            return value
