"""The months as Dagster partitions.

Belongs here: the partitions definition. Does not: month arithmetic (`archive_pipeline.months`).
 https://docs.dagster.io/guides/build/partitions-and-backfills/partitioning-assets
"""

import dagster as dg

from scaling.settings import ArchiveSourceSettings


def monthly_partitions(settings: ArchiveSourceSettings) -> dg.MonthlyPartitionsDefinition:
    """One partition for each month that has ended, oldest first.

    Args:
        settings: first month and time zone.
    """
    return dg.MonthlyPartitionsDefinition(
        start_date=f"{settings.archive_first_month}-01", timezone=settings.archive_time_zone, end_offset=0
    )
