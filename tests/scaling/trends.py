"""Made-up series whose true crossing is known, for the tests and the benchmark of the forecasts."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np

from scaling.samples import Sample

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
"""A Wednesday."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What lies upon a line that begins at 100.

    Attributes:
        noise: standard deviation of a day.
        season: the most a weekday adds.
        outliers: share of the days that are 5 to 15 deviations off.
        drop: whether once, more than two weeks ago, 50 to 100 fell away, as by an archive run.
        resemblance: correlation of a day with the one before it.
    """

    noise: float
    season: float = 0.0
    outliers: float = 0.0
    drop: bool = False
    resemblance: float = 0.0


KINDS: Mapping[str, Kind] = {
    "linear with noise": Kind(noise=3),
    "weekly season": Kind(noise=1, season=5),
    "outliers": Kind(noise=2, outliers=0.08),
    "drop": Kind(noise=2, season=2, outliers=0.05, drop=True),
    "autocorrelated": Kind(noise=2, resemblance=0.6),
}


@dataclass(frozen=True, slots=True)
class Trend:
    """A series, and where its line leads."""

    samples: list[Sample]
    threshold: float
    crossing: datetime


def series(kind: Kind, slope: float, days: int, random: np.random.Generator) -> list[Sample]:
    """One sample a day, the last of them now.

    Args:
        kind: what lies upon the line.
        slope: of the line, a day.
        days: how many.
        random: deals the noise.
    """
    noise = np.zeros(days)
    for day in range(days):
        own = random.normal() * kind.noise * np.sqrt(1 - kind.resemblance**2)
        noise[day] = own + (kind.resemblance * noise[day - 1] if day else 0.0)
    x = np.arange(days)
    y = 100 + slope * x + noise + kind.season * np.sin(2 * np.pi * (x + random.integers(7)) / 7)
    off = random.random(days) < kind.outliers
    y[off] += random.choice([-1, 1], off.sum()) * random.uniform(5, 15, off.sum()) * kind.noise
    if kind.drop:
        y[: random.integers(0, max(1, days - 16))] += random.uniform(50, 100)
    return [
        Sample("made_up", NOW - timedelta(days=days - 1 - day), float(max(value, 0.0))) for day, value in enumerate(y)
    ]


def trend(kind: Kind, random: np.random.Generator) -> Trend:
    """A series of 14 to 120 days, 0.3 to 3 a day, and a threshold it reaches in 3 days to twice its own length.

    Args:
        kind: what lies upon the line.
        random: deals all of it.
    """
    days, slope = int(random.integers(14, 121)), float(random.uniform(0.3, 3))
    samples = series(kind, slope, days, random)
    ahead = float(random.uniform(3, min(120, 2 * days)))
    return Trend(samples, 100 + slope * (days - 1 + ahead), NOW + timedelta(days=ahead))
