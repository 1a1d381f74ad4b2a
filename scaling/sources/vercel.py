"""Vercel's metrics and bills.

Belongs here: one query of Vercel's metrics, and the cost of bandwidth against its own past. Does not: logs that Vercel
pushes, or what a request costs.

Shapes: vercel.com/docs/rest-api/billing/list-focus-billing-charges (FOCUS 1.3, JSON Lines). The metrics query is what
the command ``vercel metrics`` of Vercel's CLI 64 sends; it is not documented as REST and needs Observability Plus, so
whatever it answers beside the expected shape is an error.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from pydantic import AwareDatetime, TypeAdapter

from scaling.samples import Sample, Status, measured
from scaling.sources import Reach
from scaling.sources.http import (
    Answer,
    Body,
    Request,
    SourceError,
    ask,
    drifted,
    parse,
    parse_lines,
    sampled,
    secret,
    unmeasured,
)

DAY = timedelta(days=1)
RECENT_DAYS = 7
BASELINE_WEEKS = 4
BANDWIDTH = ("bandwidth", "data transfer", "origin transfer")
"""Parts of the names of services that carry bytes: Fast Data Transfer, Fast Origin Transfer, Blob Data Transfer, …"""
MOST_BILL_BYTES = 64 * 1024 * 1024
"""35 days of a team with 50 services, 20 projects and 5 regions are 175,000 lines at most."""


class _Point(Body):
    timestamp: AwareDatetime
    dimensions: dict[str, str | None]
    values: dict[Literal["value"], float | None]


class _Metrics(Body):
    series: list[_Point]


class _Charge(Body):
    BilledCost: float
    BillingCurrency: Literal["USD"]
    ChargeCategory: str
    ChargePeriodStart: AwareDatetime
    ChargePeriodEnd: AwareDatetime
    ServiceName: str


_METRICS = TypeAdapter(_Metrics)
_CHARGE = TypeAdapter(_Charge)


def _needs(reach: Reach) -> dict[str, str]:
    settings = reach.settings
    return {"VERCEL_TOKEN": secret(settings.vercel_token), "VERCEL_TEAM_ID": settings.vercel_team_id or ""}


@dataclass(frozen=True, slots=True)
class VercelMetrics:
    """A query of Vercel's metrics: one figure per group out of the buckets of a window.

    Attributes:
        name: the metric, like ``vercel.function_invocation.count``.
        aggregation: within a bucket and over what is grouped, like ``sum`` or ``p95``.
        reduce: makes one figure of the buckets; ``p99`` is the value that 99 % of them do not exceed.
        window: that long, up to the last whole bucket.
        bucket: length of one.
        group_by: dimensions that tell the samples apart, like ``route``.
        where: a filter in Vercel's language; empty: everything.
        empty_is: what a bucket without a value means; ``zero`` only for counters of events.
        coverage: with ``missing``, at least this share of the buckets must have values.
        max_age: a newest bucket that ended longer ago is stale.
        divide_by: brings Vercel's unit to the metric's.
    """

    name: str
    aggregation: str
    reduce: Literal["sum", "max", "mean", "p99"]
    window: timedelta = timedelta(hours=1)
    bucket: timedelta = timedelta(minutes=5)
    group_by: tuple[str, ...] = ()
    where: str = ""
    empty_is: Literal["missing", "zero"] = "missing"
    coverage: float = 0.5
    max_age: timedelta = timedelta(minutes=30)
    divide_by: float = 1.0

    def describe(self) -> str:
        """What is asked of whom, in words for people."""
        by = f" by {', '.join(self.group_by)}" if self.group_by else ""
        where = f" where {self.where}" if self.where else ""
        by_what = f" / {self.divide_by:g}" if self.divide_by != 1 else ""
        return f"Vercel: {self.reduce} of {self.aggregation} of {self.name}{by_what}{by}{where}, over {self.window}"

    def read(self, metric: str, reach: Reach) -> tuple[Sample, ...]:
        """Send the query once; see `scaling.sources.Source`."""
        needs = _needs(reach)
        private = (needs["VERCEL_TOKEN"],)
        return sampled(metric, reach, lambda: self._read(metric, reach), needs=needs, private=private)

    def _read(self, metric: str, reach: Reach) -> tuple[Sample, ...]:
        length = self.bucket.total_seconds()
        end = datetime.fromtimestamp(reach.now.timestamp() // length * length, UTC)
        start = end - self.window
        answer = ask(reach, self._request(reach, start, end))
        groups: dict[str, dict[datetime, float | None]] = defaultdict(dict)
        for point in parse(_METRICS, answer).series:
            if "value" not in point.values or any(name not in point.dimensions for name in self.group_by):
                raise drifted(answer, ["series: a point lacks what the query names"])
            dims = ",".join(f"{name}={point.dimensions[name] or ''}" for name in self.group_by)
            if point.timestamp in groups[dims]:
                raise drifted(answer, ["series: two points of one bucket"])
            if start <= point.timestamp < end:
                groups[dims][point.timestamp] = point.values["value"]
        if not groups:
            return (unmeasured(metric, reach, Status.EMPTY, "Vercel has no series for the query", answer.evidence),)
        return tuple(self._sample(metric, reach, answer, dims, groups[dims]) for dims in sorted(groups))

    def _sample(
        self, metric: str, reach: Reach, answer: Answer, dims: str, points: dict[datetime, float | None]
    ) -> Sample:
        buckets = max(1, round(self.window / self.bucket))
        known = {at: value for at, value in points.items() if value is not None}
        evidence: dict[str, Any] = {**answer.evidence, "buckets": buckets, "buckets_with_values": len(known)}
        if not points or (not known and self.empty_is == "missing"):
            return unmeasured(metric, reach, Status.EMPTY, "no bucket has a value", evidence, dims=dims)
        # A null of an event counter is as much an answer as a figure.
        newest = max(points if self.empty_is == "zero" else known) + self.bucket
        evidence["data_complete_until"] = newest.isoformat()
        if reach.now - newest > self.max_age:
            note = f"the newest bucket with a value ended {newest:%Y-%m-%d %H:%M}"
            return unmeasured(metric, reach, Status.STALE, note, evidence, dims=dims)
        # A sum without some of its parts is no sum.
        wanted = buckets if self.reduce == "sum" else self.coverage * buckets
        if self.empty_is == "missing" and len(known) < wanted:
            note = f"{len(known)} of {buckets} buckets have values"
            return unmeasured(metric, reach, Status.PARTIAL, note, evidence, dims=dims)
        values = list(known.values())
        if self.empty_is == "zero":
            values += [0.0] * max(0, buckets - len(values))
        return measured(metric, reach.now, self._reduced(values) / self.divide_by, dims=dims, evidence=evidence)

    def _reduced(self, values: Sequence[float]) -> float:
        match self.reduce:
            case "sum":
                return math.fsum(values)
            case "max":
                return max(values)
            case "mean":
                return math.fsum(values) / len(values)
            case "p99":
                return sorted(values)[math.ceil(0.99 * len(values)) - 1]

    def _request(self, reach: Reach, start: datetime, end: datetime) -> Request:
        settings = reach.settings
        scope: dict[str, Any] = {"ownerId": settings.vercel_team_id}
        if settings.vercel_project_id:
            scope["projectIds"] = [settings.vercel_project_id]
        query: dict[str, Any] = {
            "scope": scope,
            "timeRange": {"start": _iso(start), "end": _iso(end)},
            "bucketSeconds": int(self.bucket.total_seconds()),
            "metrics": {"value": {"metric": self.name, "aggregation": self.aggregation}},
            "outputs": ["value"],
        }
        if self.group_by:
            query["groupBy"] = list(self.group_by)
        if self.where:
            query["filter"] = self.where
        return Request(
            "Vercel",
            "POST",
            f"{settings.vercel_endpoint}/metrics/v1",
            "VERCEL_TOKEN",
            headers={"Authorization": f"Bearer {secret(settings.vercel_token)}"},
            body=query,
        )


@dataclass(frozen=True, slots=True)
class VercelBilling:
    """Cost of bandwidth in the last seven billed days, as a multiple of the median of the four weeks before.

    Attributes:
        services: parts of names of services that count, in lower case.
        floor_usd: a median below it counts as the floor, so that cents do not fire.
        max_age: a newest charge that ended longer ago is stale.
    """

    services: tuple[str, ...] = BANDWIDTH
    floor_usd: float = 10.0
    max_age: timedelta = timedelta(days=3)

    def describe(self) -> str:
        """What is asked of whom, in words for people."""
        return (
            f"Vercel: billed cost of services like {', '.join(self.services)}; the last {RECENT_DAYS} days"
            f" / the median of {BASELINE_WEEKS} weeks before, at least {self.floor_usd:g} USD"
        )

    def read(self, metric: str, reach: Reach) -> tuple[Sample, ...]:
        """Ask for the charges once; see `scaling.sources.Source`."""
        needs = _needs(reach)
        private = (needs["VERCEL_TOKEN"],)
        return sampled(metric, reach, lambda: self._read(metric, reach), needs=needs, private=private)

    def _read(self, metric: str, reach: Reach) -> tuple[Sample, ...]:
        settings = reach.settings
        today = reach.now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        days = RECENT_DAYS * (1 + BASELINE_WEEKS)
        asked_from = today - days * DAY - self.max_age
        answer = ask(
            reach,
            Request(
                "Vercel",
                "GET",
                f"{settings.vercel_endpoint}/v1/billing/charges",
                "VERCEL_TOKEN",
                headers={"Authorization": f"Bearer {secret(settings.vercel_token)}"},
                params=(
                    ("from", _iso(asked_from)),
                    ("to", _iso(today)),
                    ("teamId", settings.vercel_team_id or ""),
                ),
                most_bytes=MOST_BILL_BYTES,
            ),
        )
        charges = parse_lines(_CHARGE, answer)
        if not charges:
            return (unmeasured(metric, reach, Status.EMPTY, "Vercel has no charges of the team", answer.evidence),)
        if any(charge.ChargePeriodEnd <= charge.ChargePeriodStart for charge in charges):
            raise drifted(answer, ["a charge ends before it begins"])
        # The bill lags: its last day is the newest that any service was charged for.
        end = min(today, max(charge.ChargePeriodEnd for charge in charges).astimezone(UTC))
        begin = end - days * DAY
        oldest = min(charge.ChargePeriodStart for charge in charges)
        evidence: dict[str, Any] = {
            **answer.evidence,
            "charges": len(charges),
            "data_complete_until": end.isoformat(),
        }
        if today - end > self.max_age:
            note = f"the newest charge is of the day before {end:%Y-%m-%d}"
            return (unmeasured(metric, reach, Status.STALE, note, evidence),)
        if oldest > begin:
            note = f"charges begin {oldest:%Y-%m-%d}, and {days} days up to {end:%Y-%m-%d} are compared"
            return (unmeasured(metric, reach, Status.PARTIAL, note, evidence),)
        counted = [each for each in charges if begin <= each.ChargePeriodStart < end and self._counts(each)]
        if not counted:
            evidence["services"] = sorted({each.ServiceName for each in charges})[:50]
            note = f"no service is called like {', '.join(self.services)}"
            return (unmeasured(metric, reach, Status.EMPTY, note, evidence),)
        return (self._compared(metric, reach, counted, end, evidence),)

    def _counts(self, charge: _Charge) -> bool:
        name = charge.ServiceName.lower()
        return charge.ChargeCategory == "Usage" and any(part in name for part in self.services)

    def _compared(
        self, metric: str, reach: Reach, charges: Sequence[_Charge], end: datetime, evidence: dict[str, Any]
    ) -> Sample:
        weeks: list[list[float]] = [[] for _ in range(1 + BASELINE_WEEKS)]
        services: dict[str, float] = defaultdict(float)
        for charge in charges:
            week = math.ceil((end - charge.ChargePeriodStart) / (RECENT_DAYS * DAY)) - 1
            weeks[week].append(charge.BilledCost)
            if week == 0:
                services[charge.ServiceName] += charge.BilledCost
        recent, *before = (math.fsum(week) for week in weeks)
        median = statistics.median(before)
        if recent < 0 or median < 0:
            raise SourceError("Vercel's charges add up to less than nothing", evidence)
        evidence |= {
            "recent_usd": round(recent, 4),
            "recent_from": (end - RECENT_DAYS * DAY).isoformat(),
            "weeks_before_usd": [round(week, 4) for week in before],
            "median_usd": round(median, 4),
            "floor_usd": self.floor_usd,
            "recent_by_service_usd": {name: round(cost, 4) for name, cost in sorted(services.items())},
        }
        return measured(metric, reach.now, recent / max(median, self.floor_usd), evidence=evidence)


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
