"""Metrics that are exposed for Prometheus.

Belongs here: the instant query of a Prometheus server, and the direct scrape of one target such as a Supabase project.
Does not: PromQL itself, or which series matters (`scaling.catalogue`).

Shapes: prometheus.io/docs/prometheus/latest/querying/api (instant queries), the text exposition format 0.0.4, and
supabase.com/docs/guides/telemetry/metrics (basic authentication as ``service_role`` with the project's secret key).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from prometheus_client.parser import text_string_to_metric_families
from pydantic import Field, TypeAdapter

from scaling.samples import Sample, Status, measured
from scaling.sources import Reach
from scaling.sources.http import Body, Request, SourceError, ask, drifted, parse, sampled, secret, unmeasured

Point = tuple[float, str]
"""A moment in seconds, and a figure as text, since JSON has neither NaN nor infinity."""


class _Series(Body):
    metric: dict[str, str]
    value: Point


class _Vector(Body):
    resultType: Literal["vector"]  # noqa: N815 - as the API spells it
    result: list[_Series]


class _Scalar(Body):
    resultType: Literal["scalar"]  # noqa: N815 - as the API spells it
    result: Point


class _Success(Body):
    status: Literal["success"]
    data: Annotated[_Vector | _Scalar, Field(discriminator="resultType")]
    warnings: list[str] | None = None


class _Failure(Body):
    status: Literal["error"]
    errorType: str  # noqa: N815 - as the API spells it


_ANSWER: TypeAdapter[_Success | _Failure] = TypeAdapter(
    Annotated[_Success | _Failure, Field(discriminator="status")],
)


@dataclass(frozen=True, slots=True)
class PrometheusQuery:
    """A question to a Prometheus server.

    Attributes:
        promql: the expression; its value is the metric's.
        labels: tell the samples apart (``dims``); without any the expression must yield one series.
        max_age: an older figure is stale.
    """

    promql: str
    labels: tuple[str, ...] = ()
    max_age: timedelta = timedelta(minutes=10)

    def describe(self) -> str:
        """What is asked of whom, in words for people."""
        return f"Prometheus at SCALING_PROMETHEUS_URL: {self.promql}"

    def read(self, metric: str, reach: Reach) -> tuple[Sample, ...]:
        """Ask the server once; see `scaling.sources.Source`."""
        settings = reach.settings
        return sampled(
            metric,
            reach,
            lambda: self._read(metric, reach),
            needs={"SCALING_PROMETHEUS_URL": settings.scaling_prometheus_url or ""},
            private=(secret(settings.scaling_prometheus_password),),
        )

    def _read(self, metric: str, reach: Reach) -> tuple[Sample, ...]:
        settings = reach.settings
        user = settings.scaling_prometheus_user
        answer = ask(
            reach,
            Request(
                "Prometheus",
                "GET",
                f"{settings.scaling_prometheus_url}/api/v1/query",
                "SCALING_PROMETHEUS_USER and SCALING_PROMETHEUS_PASSWORD",
                auth=(user, secret(settings.scaling_prometheus_password)) if user else None,
                params=(("query", self.promql), ("time", f"{reach.now.timestamp():.3f}")),
            ),
        )
        body = parse(_ANSWER, answer)
        if isinstance(body, _Failure):
            raise SourceError(f"Prometheus cannot answer the query ({body.errorType[:40]})", answer.evidence)
        evidence = dict(answer.evidence)
        if body.warnings:
            note = f"Prometheus warns of its answer ({len(body.warnings)} warnings); it may lack series"
            return (unmeasured(metric, reach, Status.PARTIAL, note, evidence),)
        if isinstance(body.data, _Scalar):
            return (self._sample(metric, reach, "", body.data.result, evidence),)
        series = {_dims(each.metric, self.labels): each.value for each in body.data.result}
        if not series:
            return (unmeasured(metric, reach, Status.EMPTY, "no series matches the query", evidence),)
        if len(series) != len(body.data.result):
            told_apart = ", ".join(self.labels) or "nothing"
            raise SourceError(
                f"the query yields {len(body.data.result)} series, and {told_apart} tells them apart", evidence
            )
        return tuple(self._sample(metric, reach, dims, point, evidence) for dims, point in sorted(series.items()))

    def _sample(self, metric: str, reach: Reach, dims: str, point: Point, evidence: Mapping[str, Any]) -> Sample:
        seconds, text = point
        try:
            at, value = datetime.fromtimestamp(seconds, UTC), float(text)
        except (ValueError, OverflowError, OSError):
            raise SourceError("Prometheus answered with a figure, or a moment, that is none", evidence) from None
        known = {**evidence, "data_complete_until": at.isoformat()}
        if reach.now - at > self.max_age:
            return unmeasured(metric, reach, Status.STALE, f"the figure is of {at:%Y-%m-%d %H:%M}", known, dims=dims)
        return measured(metric, reach.now, value, dims=dims, evidence=known)


@dataclass(frozen=True, slots=True)
class PrometheusScrape:
    """One reading of a target that Prometheus would scrape.

    Attributes:
        series: name of the samples, with ``_total``, ``_sum`` and the like.
        match: labels they must have, and their values.
        aggregate: makes one figure of several samples.
        url: of the target, without authentication; None: the metrics of the Supabase project.
        max_age: a sample that carries an older moment is stale.
    """

    series: str
    match: tuple[tuple[str, str], ...] = ()
    aggregate: Literal["sum", "max", "min"] = "sum"
    url: str | None = None
    max_age: timedelta = timedelta(minutes=10)

    def describe(self) -> str:
        """What is asked of whom, in words for people."""
        labels = ",".join(f'{name}="{value}"' for name, value in self.match)
        target = self.url or "the metrics of the Supabase project"
        return f"{self.aggregate} of {self.series}{{{labels}}} in {target}"

    def read(self, metric: str, reach: Reach) -> tuple[Sample, ...]:
        """Scrape the target once; see `scaling.sources.Source`."""
        settings = reach.settings
        key = secret(settings.supabase_secret_key)
        if self.url:
            needs = {}
        else:
            # The project's address follows from its reference, unless it is given.
            where = settings.supabase_project_ref or settings.supabase_project_endpoint or ""
            needs = {"SUPABASE_PROJECT_REF": where, "SUPABASE_SECRET_KEY": key}
        return sampled(metric, reach, lambda: self._read(metric, reach), needs=needs, private=(key,))

    def _read(self, metric: str, reach: Reach) -> tuple[Sample, ...]:
        answer = ask(reach, self._request(reach))
        found, oldest, families = [], None, 0
        text = answer.content.decode("utf-8", errors="strict") if _is_utf8(answer.content) else ""
        if not text.endswith("\n"):
            raise drifted(answer, ["the last line does not end, or the text is not UTF-8"])
        try:
            for family in text_string_to_metric_families(text):
                families += 1
                for sample in family.samples:
                    if sample.name == self.series and all(sample.labels.get(k) == v for k, v in self.match):
                        found.append(float(sample.value))
                        if sample.timestamp is not None:
                            oldest = min(oldest or math.inf, float(sample.timestamp))
        except (ValueError, KeyError, IndexError):
            raise drifted(answer, ["no text exposition format"]) from None
        if not families:
            raise drifted(answer, ["no metric at all"])
        evidence = {**answer.evidence, "series": self.describe(), "samples": len(found), "families": families}
        if not found:
            return (unmeasured(metric, reach, Status.EMPTY, "the target has no such series", evidence),)
        if oldest is not None:
            at = datetime.fromtimestamp(oldest, UTC)
            evidence["data_complete_until"] = at.isoformat()
            if reach.now - at > self.max_age:
                return (unmeasured(metric, reach, Status.STALE, f"its figure is of {at:%Y-%m-%d %H:%M}", evidence),)
        if any(math.isnan(each) for each in found):  # max and min would hide it
            return (measured(metric, reach.now, math.nan, evidence=evidence),)
        figure = math.fsum(found) if self.aggregate == "sum" else max(found) if self.aggregate == "max" else min(found)
        return (measured(metric, reach.now, figure, evidence=evidence),)

    def _request(self, reach: Reach) -> Request:
        if self.url:
            return Request("the scraped target", "GET", self.url, "its address")
        settings = reach.settings
        base = settings.supabase_project_endpoint or f"https://{settings.supabase_project_ref}.supabase.co"
        return Request(
            "Supabase",
            "GET",
            f"{base}/customer/v1/privileged/metrics",
            "SUPABASE_SECRET_KEY",
            auth=("service_role", secret(settings.supabase_secret_key)),
        )


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _dims(labels: Mapping[str, str], names: tuple[str, ...]) -> str:
    return ",".join(f"{name}={labels.get(name, '')}" for name in names)
