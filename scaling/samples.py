"""What was measured of a metric, and what could not be.

Belongs here: the sample, and its table. Does not: how anything is measured (`scaling.sources`), or judged
(`scaling.thresholds`).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from scaling.databases import Connection


class Status(StrEnum):
    """How a measurement went. Only `OK` has a value, and only `OK` moves a rule."""

    OK = "ok"
    EMPTY = "empty"
    """The source answered, and there is nothing of it: no such table, no series. Never a zero."""
    ERROR = "error"
    """The source did not answer, or not in its documented shape."""
    STALE = "stale"
    """The newest figure the source has is older than the metric allows."""
    PARTIAL = "partial"
    """The source says itself that the figure is not complete yet."""
    NOT_CONFIGURED = "not_configured"
    """No credentials: nothing was asked."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of one metric.

    Attributes:
        metric: its name in the catalogue.
        at: the moment it is true of, timezone-aware.
        value: in the metric's unit, finite and not negative; None unless the status is `OK`.
        status: how the measurement went.
        dims: what it was measured of, like ``shard=main``; empty: of everything.
        period: ``YYYY-MM`` of a figure that begins anew every month; empty for others.
        evidence: what a person needs to believe it: query, window, rows, SHA-256 of the body. No secrets, nothing
            personal. JSON values only.
    """

    metric: str
    at: datetime
    value: float | None
    status: Status = Status.OK
    dims: str = ""
    period: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.value is not None) != (self.status is Status.OK):
            raise ValueError(f"a sample of {self.metric} has a value if and only if it is ok")
        if self.value is not None and not (math.isfinite(self.value) and self.value >= 0):
            raise ValueError(f"a sample of {self.metric} is finite and not negative, or it is an error")


@dataclass(frozen=True, slots=True)
class Series:
    """What is known of one metric and one thing it was measured of.

    Attributes:
        newest: sample, whatever its status.
        last_ok: when the newest sample that was ok was measured; None: none ever was.
        first: when it was measured first, of what is kept.
    """

    newest: Sample
    last_ok: datetime | None
    first: datetime


def measured(
    metric: str,
    at: datetime,
    value: float,
    *,
    dims: str = "",
    period: str = "",
    evidence: Mapping[str, Any] | None = None,
) -> Sample:
    """Make the sample of a figure: an error when the figure is none (NaN, infinite, negative).

    Args:
        metric: its name in the catalogue.
        at: the moment it is true of.
        value: in the metric's unit.
        dims: what it was measured of.
        period: the month of a figure that begins anew every month.
        evidence: what a person needs to believe it.
    """
    if math.isfinite(value) and value >= 0:
        return Sample(metric, at, value, Status.OK, dims, period, evidence or {})
    why = {**(evidence or {}), "error": f"{value} is no figure"}
    return Sample(metric, at, None, Status.ERROR, dims, period, why)


def record(connection: Connection, samples: Sequence[Sample]) -> None:
    """Store samples; one that is already stored (same metric, dims and moment) stays as it is.

    Args:
        connection: in a transaction.
        samples: to store.
    """
    if not samples:
        return
    connection.execute(
        "INSERT INTO scaling.samples (metric, dims, at, status, value, period, evidence)"
        " SELECT metric, dims, at, status, value, period, evidence FROM unnest("
        " %s::text[], %s::text[], %s::timestamptz[], %s::text[], %s::float8[], %s::text[], %s::jsonb[])"
        " AS new (metric, dims, at, status, value, period, evidence) ON CONFLICT DO NOTHING",
        [
            [sample.metric for sample in samples],
            [sample.dims for sample in samples],
            [sample.at for sample in samples],
            [sample.status.value for sample in samples],
            [None if sample.value is None else float(sample.value) for sample in samples],
            [sample.period for sample in samples],
            [json.dumps(sample.evidence, default=str) for sample in samples],
        ],
    )


def history(
    connection: Connection, metric: str, *, dims: str | None = None, since: datetime | None = None
) -> list[Sample]:
    """Read a metric's samples, oldest first.

    Args:
        connection: in a transaction.
        metric: its name in the catalogue.
        dims: only of this; None: of everything there is.
        since: nothing before it; None: all that is kept.
    """
    rows = connection.execute(
        "SELECT metric, at, value, status, dims, period, evidence FROM scaling.samples"
        " WHERE metric = %(metric)s AND (%(dims)s::text IS NULL OR dims = %(dims)s)"
        " AND (%(since)s::timestamptz IS NULL OR at >= %(since)s) ORDER BY at, dims",
        {"metric": metric, "dims": dims, "since": since},
    ).fetchall()
    return [_sample(row) for row in rows]


_SERIES = """
WITH RECURSIVE series AS (
    (SELECT metric, dims FROM scaling.samples ORDER BY metric, dims LIMIT 1)
    UNION ALL
    SELECT following.* FROM series, LATERAL (
        SELECT x.metric, x.dims FROM scaling.samples x WHERE (x.metric, x.dims) > (series.metric, series.dims)
        ORDER BY x.metric, x.dims LIMIT 1) following
)
SELECT n.*,
    (SELECT at FROM scaling.samples x WHERE x.metric = s.metric AND x.dims = s.dims AND x.status = 'ok'
     ORDER BY at DESC LIMIT 1),
    (SELECT at FROM scaling.samples x WHERE x.metric = s.metric AND x.dims = s.dims ORDER BY at LIMIT 1)
FROM series s, LATERAL (
    SELECT metric, at, value, status, dims, period, evidence FROM scaling.samples x
    WHERE x.metric = s.metric AND x.dims = s.dims ORDER BY at DESC LIMIT 1) n
ORDER BY s.metric, s.dims
"""


def series(connection: Connection) -> list[Series]:
    """Read what is known of every metric and what it was measured of.

    Args:
        connection: in a transaction.

    Returns:
        By metric and dims.
    """
    return [Series(_sample(row[:7]), row[7], row[8]) for row in connection.execute(_SERIES)]


def forget(connection: Connection, *, before: datetime) -> int:
    """Delete what is older than anybody asks for; the newest of each series stays, so that its age can be told.

    Args:
        connection: in a transaction.
        before: the moment before which samples go.

    Returns:
        How many went.
    """
    return connection.execute(
        "DELETE FROM scaling.samples s WHERE at < %(before)s AND EXISTS (SELECT FROM scaling.samples newer"
        " WHERE newer.metric = s.metric AND newer.dims = s.dims AND newer.at > s.at)",
        {"before": before},
    ).rowcount


def _sample(row: tuple[Any, ...]) -> Sample:
    metric, at, value, status, dims, period, evidence = row
    return Sample(metric, at, value, Status(status), dims, period, evidence)
