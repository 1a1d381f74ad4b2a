"""The months as Dagster partitions.

Belongs here: the partitions definition and the settings it needs while definitions load. Does not: month arithmetic
(`archive_pipeline.months`). https://docs.dagster.io/guides/build/partitions-and-backfills/partitioning-assets
"""

import dagster as dg
from pydantic import Field

from scaling.settings import ArchiveSettings


class CalendarSettings(ArchiveSettings):
    """What must be known before a run starts; a bucket need not be configured to look at the asset graph."""

    archive_bucket: str = Field(default="", description="S3 bucket of the archive.")


def monthly_partitions(settings: CalendarSettings) -> dg.MonthlyPartitionsDefinition:
    """One partition for each month that has ended, oldest first.

    Args:
        settings: first month and time zone.
    """
    return dg.MonthlyPartitionsDefinition(
        start_date=f"{settings.archive_first_month}-01", timezone=settings.archive_time_zone, end_offset=0
    )
