"""Anthropic's reports of cost and usage.

Belongs here: month to date of the cost report, and of the tokens of the usage report. Does not: prices, budgets, or a
count of chats, which the reports do not have.

Shapes: platform.claude.com/docs/en/api/admin (cost_report, usage_report/messages). Amounts are decimal strings in
cents. What writes to the cache is nested in ``cache_creation``; a flat key of that name does not exist.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, AwareDatetime, NonNegativeInt, TypeAdapter

from scaling.samples import Sample, Status, measured
from scaling.sources import Reach
from scaling.sources.http import Answer, Body, Request, SourceError, ask, drifted, parse, sampled, secret, unmeasured

VERSION = "2023-06-01"
DAYS_A_PAGE = 31
HOURS_A_PAGE = 24
MOST_PAGES = 40

R = TypeVar("R", bound=Body)

Tokens = Literal[
    "uncached_input_tokens",
    "cache_read_input_tokens",
    "ephemeral_5m_input_tokens",
    "ephemeral_1h_input_tokens",
    "output_tokens",
]
EVERY_TOKEN: tuple[Tokens, ...] = (
    "uncached_input_tokens",
    "cache_read_input_tokens",
    "ephemeral_5m_input_tokens",
    "ephemeral_1h_input_tokens",
    "output_tokens",
)


def _cents(text: str) -> str:
    if not (text.isascii() and text.replace("-", "", 1).replace(".", "", 1).isdigit()):
        raise ValueError("no decimal number")
    return text


class _Cost(Body):
    amount: Annotated[str, AfterValidator(_cents)]
    currency: Literal["USD"]


class _CacheCreation(Body):
    ephemeral_5m_input_tokens: NonNegativeInt
    ephemeral_1h_input_tokens: NonNegativeInt


class _Usage(Body):
    uncached_input_tokens: NonNegativeInt
    cache_read_input_tokens: NonNegativeInt
    cache_creation: _CacheCreation
    output_tokens: NonNegativeInt
    model: str | None

    def tokens(self, kind: Tokens) -> int:
        """How many of one kind."""
        nested = kind in _CacheCreation.model_fields
        return int(getattr(self.cache_creation if nested else self, kind))


class _Bucket(Body, Generic[R]):
    starting_at: AwareDatetime
    ending_at: AwareDatetime
    results: list[R]


class _Report(Body, Generic[R]):
    data: list[_Bucket[R]]
    has_more: bool
    next_page: str | None


_COSTS = TypeAdapter(_Report[_Cost])
_USAGES = TypeAdapter(_Report[_Usage])


@dataclass(frozen=True, slots=True)
class _Read(Generic[R]):
    """Every page of one report."""

    buckets: list[_Bucket[R]]
    answers: list[Answer]

    def evidence(self) -> dict[str, Any]:
        """What was asked, and the SHA-256 of every page."""
        return {
            **self.answers[0].evidence,
            "sha256": [answer.evidence["sha256"] for answer in self.answers],
            "bytes": sum(answer.evidence["bytes"] for answer in self.answers),
            "buckets": len(self.buckets),
        }


def _pages(
    reach: Reach,
    path: str,
    shape: TypeAdapter[_Report[R]],
    start: datetime,
    end: datetime,
    width: Literal["1d", "1h"],
    more: Sequence[tuple[str, str]] = (),
) -> _Read[R]:
    """Read a report page by page.

    Raises:
        SourceError: a page does not come, or not as documented, or the pages never end.
    """
    settings = reach.settings
    limit = DAYS_A_PAGE if width == "1d" else HOURS_A_PAGE
    params = (
        ("starting_at", _iso(start)),
        ("ending_at", _iso(end)),
        ("bucket_width", width),
        ("limit", str(limit)),
        *more,
    )
    read: _Read[R] = _Read([], [])
    page: str | None = None
    seen: set[str] = set()
    while True:
        answer = ask(
            reach,
            Request(
                "Anthropic",
                "GET",
                f"{settings.anthropic_endpoint}{path}",
                "ANTHROPIC_ADMIN_KEY (an admin key of an organization, sk-ant-admin…)",
                headers={"X-Api-Key": secret(settings.anthropic_admin_key), "Anthropic-Version": VERSION},
                params=(*params, *([("page", page)] if page else [])),
            ),
        )
        report = parse(shape, answer)
        read.answers.append(answer)
        read.buckets.extend(report.data)
        if not report.has_more:
            break
        page = report.next_page
        if not page or page in seen or len(read.answers) >= MOST_PAGES:
            raise drifted(answer, ["next_page: leads nowhere, in a circle, or on for ever"])
        seen.add(page)
    starts = [bucket.starting_at for bucket in read.buckets]
    if len(set(starts)) != len(starts):
        raise drifted(read.answers[-1], ["data: a bucket comes twice"])
    if any(not start <= bucket.starting_at < bucket.ending_at for bucket in read.buckets):
        raise drifted(read.answers[-1], ["data: a bucket is not of the window that was asked for"])
    return read


def _midnight(moment: datetime) -> datetime:
    return moment.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _needs(reach: Reach) -> dict[str, str]:
    return {"ANTHROPIC_ADMIN_KEY": secret(reach.settings.anthropic_admin_key)}


@dataclass(frozen=True, slots=True)
class AnthropicCost:
    """What the organization has spent since the first of the month, in USD.

    Attributes:
        max_age: newest bucket that ended longer ago is stale; the report has whole days of UTC.
    """

    max_age: timedelta = timedelta(days=2)

    def describe(self) -> str:
        """What is asked of whom, in words for people."""
        return "Anthropic: cost report, month to date, USD; without Priority Tier, which the report does not have"

    def read(self, metric: str, reach: Reach) -> tuple[Sample, ...]:
        """Ask for the report once; see `scaling.sources.Source`."""
        needs = _needs(reach)
        return sampled(metric, reach, lambda: self._read(metric, reach), needs=needs, private=tuple(needs.values()))

    def _read(self, metric: str, reach: Reach) -> tuple[Sample, ...]:
        today = _midnight(reach.now)
        first = today.replace(day=1)
        period = f"{first:%Y-%m}"
        read = _pages(reach, "/v1/organizations/cost_report", _COSTS, first, today + timedelta(days=1), "1d")
        evidence = {**read.evidence(), "caveat": "the report has no costs of Priority Tier"}
        if not read.buckets:
            note = "the report has no day of this month yet"
            return (unmeasured(metric, reach, Status.EMPTY, note, evidence, period=period),)
        newest = min(reach.now, max(bucket.ending_at for bucket in read.buckets))
        evidence["data_complete_until"] = newest.isoformat()
        cents = sum((Decimal(cost.amount) for bucket in read.buckets for cost in bucket.results), Decimal(0))
        evidence["cents"] = str(cents)
        if reach.now - newest > self.max_age:
            note = f"the newest day of the report ended {newest:%Y-%m-%d %H:%M}"
            return (unmeasured(metric, reach, Status.STALE, note, evidence, period=period),)
        return (measured(metric, reach.now, float(cents / 100), period=period, evidence=evidence),)


@dataclass(frozen=True, slots=True)
class AnthropicUsage:
    """How many tokens the organization has used since the first of the month.

    Whole days are asked for by day and today by hour, since the report has days only when they are over.

    Attributes:
        tokens: kinds that are added up.
        max_age: a newest bucket that ended longer ago is stale.
    """

    tokens: tuple[Tokens, ...] = EVERY_TOKEN
    max_age: timedelta = timedelta(days=2)

    def describe(self) -> str:
        """What is asked of whom, in words for people."""
        return f"Anthropic: usage report, month to date, {' + '.join(self.tokens)}"

    def read(self, metric: str, reach: Reach) -> tuple[Sample, ...]:
        """Ask for the report of the days, and of today; see `scaling.sources.Source`."""
        needs = _needs(reach)
        return sampled(metric, reach, lambda: self._read(metric, reach), needs=needs, private=tuple(needs.values()))

    def _read(self, metric: str, reach: Reach) -> tuple[Sample, ...]:
        today = _midnight(reach.now)
        first = today.replace(day=1)
        period = f"{first:%Y-%m}"
        path, by = "/v1/organizations/usage_report/messages", (("group_by[]", "model"),)
        parts = [_pages(reach, path, _USAGES, today, today + timedelta(days=1), "1h", by)]
        if first < today:
            parts.insert(0, _pages(reach, path, _USAGES, first, today, "1d", by))
            if any(bucket.ending_at > today for bucket in parts[0].buckets):
                raise SourceError("Anthropic's days reach into today, whose hours are counted", parts[0].evidence())
        buckets = [bucket for part in parts for bucket in part.buckets]
        evidence: dict[str, Any] = {"reports": [part.evidence() for part in parts]}
        if not buckets:
            note = "the report has nothing of this month yet"
            return (unmeasured(metric, reach, Status.EMPTY, note, evidence, period=period),)
        newest = min(reach.now, max(bucket.ending_at for bucket in buckets))
        models: dict[str, int] = defaultdict(int)
        kinds: dict[str, int] = dict.fromkeys(self.tokens, 0)
        for usage in (usage for bucket in buckets for usage in bucket.results):
            for kind in self.tokens:
                kinds[kind] += usage.tokens(kind)
                models[usage.model or "unknown"] += usage.tokens(kind)
        evidence |= {"data_complete_until": newest.isoformat(), "by_kind": kinds, "by_model": dict(models)}
        if reach.now - newest > self.max_age:
            note = f"the newest bucket of the report ended {newest:%Y-%m-%d %H:%M}"
            return (unmeasured(metric, reach, Status.STALE, note, evidence, period=period),)
        return (measured(metric, reach.now, float(sum(kinds.values())), period=period, evidence=evidence),)
