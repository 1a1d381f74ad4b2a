"""Where the metrics of the thresholds come from.

Belongs here: what every kind of source has in common. Does not: any kind (one module each beside this), which metric
asks which source (`scaling.catalogue`), or what a value leads to (`scaling.thresholds`).
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import httpx

from scaling.databases import DatabaseRouter
from scaling.samples import Sample
from scaling.settings import ScalingSettings


@dataclass(frozen=True, slots=True)
class Reach:
    """What a source may use to measure.

    Attributes:
        router: to the databases of the SaaS.
        http: shared client; it follows no redirects (a source refuses them anyhow) and keeps no cookies.
        settings: credentials, endpoints and the time limit of one request.
        now: the moment of the measurement, timezone-aware.
    """

    router: DatabaseRouter
    http: httpx.Client
    settings: ScalingSettings
    now: datetime


class Source(Protocol):
    """One way to measure; every kind is a frozen dataclass."""

    def read(self, metric: str, reach: Reach) -> tuple[Sample, ...]:
        """Measure, once.

        Trouble with the data is a sample too (its status says which, its evidence why): nothing is raised for it, and
        nothing that was not measured is ever a zero.

        Args:
            metric: the name the samples carry.
            reach: what may be used for it.

        Returns:
            At least one sample; several when the source tells dimensions apart.
        """

    def describe(self) -> str:
        """What is asked of whom, in words for people."""
