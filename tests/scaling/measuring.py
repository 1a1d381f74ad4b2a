"""What the tests of HTTP sources share: a reach to the devstack's APIs at a fixed moment."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from devstack.metrics_apis import Figures, MetricsApis
from scaling.databases import DatabaseRouter, Shard
from scaling.samples import Sample
from scaling.settings import ScalingSettings
from scaling.sources import Reach, Source
from tests import clients

NOW = datetime(2026, 11, 18, 13, 7, 30, tzinfo=UTC)
"""A Wednesday afternoon in the middle of a month."""


def renewed(served: MetricsApis, figures: Figures | None = None) -> MetricsApis:
    """A server that has seen nothing yet; starting one for each test would take 0.2 s of it."""
    served.figures = figures or Figures()
    served.faults.clear()
    served.requests.clear()
    served.bodies.clear()
    return served


def settings(environment: dict[str, str], **others: Any) -> ScalingSettings:
    """Settings of exactly these variables: whatever the machine has set of them counts as unset."""
    unset = {name: None for name, each in ScalingSettings.model_fields.items() if each.default is None}
    given = {name.lower(): value for name, value in environment.items()}
    return ScalingSettings(**{**unset, **given, **others})


@contextmanager
def reaching(served: MetricsApis | None, now: datetime = NOW, **others: Any) -> Iterator[Reach]:
    """A reach whose databases are nowhere: a source of HTTP has no business with them."""
    with clients.client() as client, DatabaseRouter(Shard("main", "postgresql://127.0.0.1:1/none")) as router:
        yield Reach(router, client, settings(served.environment() if served else {}, **others), now)


def ask(source: Source, served: MetricsApis | None, now: datetime = NOW, **others: Any) -> tuple[Sample, ...]:
    with reaching(served, now, **others) as reach:
        return source.read("a_metric", reach)


def one(source: Source, served: MetricsApis | None, now: datetime = NOW, **others: Any) -> Sample:
    """The only sample of a source."""
    (sample,) = ask(source, served, now, **others)
    assert sample.metric == "a_metric"
    assert sample.at == now
    return sample
