"""Upstash's developer API: statistics of a Redis database.

Belongs here: the hit rate of the cache. Does not: counters of the app's own namespaces, which SQL reads.

Shape: upstash.com/docs/devops/developer-api/redis/get_database_stats. Moments are as Go prints them, not ISO.
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter

from scaling.samples import Sample, Status, measured
from scaling.sources import Reach
from scaling.sources.http import Body, Request, ask, parse, sampled, secret, unmeasured

GO_TIME = re.compile(
    r"(?P<until_second>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?:\.(?P<fraction>\d{1,9}))? (?P<offset>[+-]\d{4}) \S+(?: m=\S+)?"
)


def go_time(text: object) -> datetime:
    """Read a moment as Go prints it, ``2025-08-31 15:12:52.799480932 +0000 UTC``.

    Args:
        text: with up to nine digits of a second; microseconds are kept.

    Raises:
        ValueError: it is none.
    """
    found = GO_TIME.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise ValueError("no moment as Go prints it")
    fraction = (found["fraction"] or "0")[:6].ljust(6, "0")
    return datetime.strptime(f"{found['until_second']}.{fraction} {found['offset']}", "%Y-%m-%d %H:%M:%S.%f %z")


class _Point(Body):
    x: Annotated[datetime, BeforeValidator(go_time)]
    y: Annotated[float, Field(ge=0)]


class _Stats(Body):
    # Go writes a list without elements as null.
    hits: list[_Point] | None
    misses: list[_Point] | None


_STATS = TypeAdapter(_Stats)


@dataclass(frozen=True, slots=True)
class UpstashStats:
    """Share of reads that found their key, from the growth of two counters.

    Attributes:
        least_reads: fewer tell nothing (the catalogue's n >= 200).
        max_age: an older newest point is stale.
    """

    least_reads: int = 200
    max_age: timedelta = timedelta(hours=3)

    def describe(self) -> str:
        """What is asked of whom, in words for people."""
        return f"Upstash: growth of hits / (hits + misses) of UPSTASH_DATABASE_ID, at least {self.least_reads} reads"

    def read(self, metric: str, reach: Reach) -> tuple[Sample, ...]:
        """Ask for the statistics once; see `scaling.sources.Source`."""
        settings = reach.settings
        needs = {
            "UPSTASH_EMAIL": settings.upstash_email or "",
            "UPSTASH_API_KEY": secret(settings.upstash_api_key),
            "UPSTASH_DATABASE_ID": settings.upstash_database_id or "",
        }
        private = (needs["UPSTASH_API_KEY"], needs["UPSTASH_EMAIL"])
        return sampled(metric, reach, lambda: self._read(metric, reach), needs=needs, private=private)

    def _read(self, metric: str, reach: Reach) -> tuple[Sample, ...]:
        settings = reach.settings
        answer = ask(
            reach,
            Request(
                "Upstash",
                "GET",
                f"{settings.upstash_endpoint}/v2/redis/stats/{settings.upstash_database_id}",
                "UPSTASH_EMAIL and UPSTASH_API_KEY",
                auth=(settings.upstash_email or "", secret(settings.upstash_api_key)),
            ),
        )
        stats = parse(_STATS, answer)
        hits, misses = (sorted(each or [], key=lambda point: point.x) for each in (stats.hits, stats.misses))
        evidence: dict[str, Any] = {
            **answer.evidence,
            "points": {"hits": len(hits), "misses": len(misses)},
            "caveat": "all keys of the database count, not only the cache's",
        }
        if not hits or not misses:
            return (unmeasured(metric, reach, Status.EMPTY, "Upstash has no points of hits and misses", evidence),)
        start, end = max(hits[0].x, misses[0].x), min(hits[-1].x, misses[-1].x)
        evidence |= {"window": [start.isoformat(), end.isoformat()], "data_complete_until": end.isoformat()}
        if reach.now - end > self.max_age:
            note = f"the newest point is of {end:%Y-%m-%d %H:%M}"
            return (unmeasured(metric, reach, Status.STALE, note, evidence),)
        found, lost = (_growth([point.y for point in each if start <= point.x <= end]) for each in (hits, misses))
        reads = found + lost
        evidence |= {"hits": found, "misses": lost}
        if reads <= 0 or reads < self.least_reads:
            note = f"{reads:g} reads in the window are fewer than {self.least_reads}"
            return (unmeasured(metric, reach, Status.PARTIAL, note, evidence),)
        return (measured(metric, reach.now, found / reads, evidence=evidence),)


def _growth(counter: Sequence[float]) -> float:
    """How much a counter grew; where it fell it began anew at zero."""
    steps = itertools.pairwise(counter)
    return math.fsum(after - before if after >= before else after for before, after in steps)
