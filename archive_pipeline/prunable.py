"""Which partitions may leave Postgres, and the sentence why another one may not.

Belongs here: the decision, from facts that others gathered. Does not: gathering them, the clock, or dropping anything
(`archive_pipeline.prune`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, Self
from zoneinfo import ZoneInfo

from archive_pipeline.months import Month
from scaling.settings import ArchiveSourceSettings

Mode = Literal["off", "propose", "auto"]


@dataclass(frozen=True, slots=True)
class Policy:
    """What may be dropped from Postgres.

    Attributes:
        mode: ``off`` drops nothing, ``propose`` what somebody approved, ``auto`` whatever may go.
        retention_months: closed months that stay in Postgres.
        partition_schema: private schema of the partitions.
        zone: IANA time zone of the months.
    """

    mode: Mode = "off"
    retention_months: int = 13
    partition_schema: str = "audit_partitions"
    zone: str = "UTC"

    @classmethod
    def from_settings(cls, settings: ArchiveSourceSettings) -> Self:
        """The configured policy.

        Args:
            settings: of the archive's source.
        """
        return cls(
            settings.archive_prune,
            settings.archive_retention_months,
            settings.archive_partition_schema,
            settings.archive_time_zone,
        )


@dataclass(frozen=True, slots=True)
class MonthFacts:
    """What is known of one month of a partition.

    Attributes:
        month: it is.
        has_rows: whether the partition holds rows of it.
        archived: whether a manifest of it is published.
        pruned: whether rows of it left Postgres before.
        problem: what is wrong with it in the bucket, in words; empty when nothing is.
        holds: legal holds that cover it, in words.
    """

    month: Month
    has_rows: bool
    archived: bool
    pruned: bool = False
    problem: str = ""
    holds: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PartitionFacts:
    """What is known of one partition.

    Attributes:
        name: ``schema.name``.
        from_at: first instant it takes; None takes everything earlier.
        to_at: first instant it does not take.
        months: that it covers; of one without a beginning those that it has rows of.
    """

    name: str
    from_at: datetime | None
    to_at: datetime
    months: tuple[MonthFacts, ...]

    @property
    def has_rows(self) -> bool:
        """Whether it holds any."""
        return any(month.has_rows for month in self.months)


def oldest_kept(now: datetime, policy: Policy, grace: timedelta) -> Month:
    """The oldest month that stays in Postgres.

    Args:
        now: by the database's clock.
        policy: how many closed months stay.
        grace: how long after its end a month is closed.
    """
    local = (now - grace).astimezone(ZoneInfo(policy.zone))
    # The month that is open by then, and before it the closed ones.
    year, month = divmod(local.year * 12 + local.month - 1 - policy.retention_months, 12)
    return Month(max(year, 1), month + 1, policy.zone)


def months_between(first: datetime, end: datetime, zone: str) -> Iterator[Month]:
    """The months that a range of instants touches.

    Args:
        first: the first instant.
        end: the first instant after it.
        zone: of the months.

    Yields:
        The months in order.
    """
    month = Month.containing(first, zone)
    while month.start < end:
        yield month
        month = month.following


def why_not(partition: PartitionFacts, oldest: Month) -> str:
    """Why a partition must stay; empty when it may go.

    Args:
        partition: with what is known of its months.
        oldest: month that stays in Postgres.
    """
    if partition.to_at > oldest.start:
        return (
            f"{partition.name} reaches to {partition.to_at:%Y-%m-%d %H:%M} UTC; months from {oldest.name} on stay in "
            "Postgres (ARCHIVE_RETENTION_MONTHS)"
        )
    if not partition.has_rows and (partition.from_at is None or all(month.pruned for month in partition.months)):
        return f"{partition.name} is empty and stays to take late rows"
    if missing := [month.month.name for month in partition.months if not month.archived]:
        return f"{partition.name} has months that are not archived: {_several(missing)}; archive them first"
    for month in partition.months:
        if month.problem:
            return f"month {month.month.name} is not sound in the bucket: {month.problem}"
        if month.holds:
            return f"month {month.month.name} must stay: {'; '.join(month.holds)}"
    return ""


def _several(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
