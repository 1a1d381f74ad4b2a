"""A calendar month as the half-open range of instants it covers.

Belongs here: month arithmetic in the configured time zone and the month's names (partition key, path, label).
Does not: the clock. Whether a month is closed is asked of the database (`archive_pipeline.snapshot`).
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import total_ordering
from typing import Self
from zoneinfo import ZoneInfo

from scaling.errors import UserError

MONTH = re.compile(r"(\d{4})-(0[1-9]|1[0-2])(-01)?")


@total_ordering
@dataclass(frozen=True, slots=True)
class Month:
    """One calendar month ``[start, end)`` of a time zone.

    Attributes:
        year: 1 to 9999.
        month: 1 to 12.
        zone: IANA time zone whose midnight begins the month.
    """

    year: int
    month: int
    zone: str = "UTC"

    @classmethod
    def parse(cls, text: str, zone: str = "UTC") -> Self:
        """Read a month.

        Args:
            text: ``YYYY-MM``, or the partition key ``YYYY-MM-01``.
            zone: IANA time zone.

        Raises:
            UserError: the text is not a month.
        """
        matched = MONTH.fullmatch(text)
        if not matched or matched[1] == "0000":
            raise UserError(f"{text!r} is not a month; write YYYY-MM, for example 2025-01")
        return cls(int(matched[1]), int(matched[2]), zone)

    @classmethod
    def containing(cls, instant: datetime, zone: str = "UTC") -> Self:
        """The month an instant belongs to.

        Args:
            instant: timezone-aware.
            zone: IANA time zone.
        """
        local = instant.astimezone(ZoneInfo(zone))
        return cls(local.year, local.month, zone)

    @property
    def start(self) -> datetime:
        """The first instant that belongs to the month, in UTC."""
        return datetime(self.year, self.month, 1, tzinfo=ZoneInfo(self.zone)).astimezone(UTC)

    @property
    def end(self) -> datetime:
        """The first instant of the following month, in UTC."""
        return self.following.start

    @property
    def following(self) -> Self:
        """The next month."""
        year, month = divmod(self.year * 12 + self.month, 12)
        return type(self)(year, month + 1, self.zone)

    @property
    def name(self) -> str:
        """``YYYY-MM``, as people and manifests write it."""
        return f"{self.year:04}-{self.month:02}"

    @property
    def partition_key(self) -> str:
        """``YYYY-MM-01``, the key of Dagster's monthly partitions."""
        return f"{self.name}-01"

    @property
    def path(self) -> str:
        """``year=YYYY/month=MM/``, the Hive layout of the bucket."""
        return f"year={self.year:04}/month={self.month:02}/"

    def __lt__(self, other: Self) -> bool:
        return (self.year, self.month) < (other.year, other.month)


def epoch_us(instant: datetime) -> int:
    """Microseconds since 1970-01-01T00:00:00Z, exact.

    Args:
        instant: timezone-aware.
    """
    elapsed = instant - datetime(1970, 1, 1, tzinfo=UTC)
    return (elapsed.days * 86_400 + elapsed.seconds) * 1_000_000 + elapsed.microseconds
