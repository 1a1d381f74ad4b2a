"""A run of January 2025 that may not have more than some memory beyond what it has when it begins to read."""

import resource
import sys
from datetime import timedelta
from pathlib import Path

from archive_pipeline.archive import Step, Target, archive_month
from archive_pipeline.manifest import Layout
from archive_pipeline.months import Month
from archive_pipeline.objects import ArchiveBucket
from archive_pipeline.parts import PartSize
from archive_pipeline.snapshot import SourceTable
from scaling.databases import Shard
from scaling.settings import ArchiveSettings, DatabaseSettings, load


def main(more_bytes: int, scratch: str) -> None:
    def limit(reached: Step) -> None:
        if reached is Step.SNAPSHOT:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            ceiling = pages * resource.getpagesize() + more_bytes
            resource.setrlimit(resource.RLIMIT_AS, (ceiling, ceiling))

    target = Target(
        table=SourceTable("public", "audit_logs"),
        bucket=ArchiveBucket.from_settings(load(ArchiveSettings)),
        layout=Layout("audit_logs"),
        grace=timedelta(hours=1),
        part_size=PartSize(row_group_bytes=100_000, part_bytes=50_000),
        batch_bytes=20_000,
        scratch=Path(scratch),
    )
    shard = Shard("main", load(DatabaseSettings).database_url.get_secret_value())
    with shard.arrow():
        pass  # its driver is loaded now: the ceiling is for the rows
    archive_month(shard, target, Month(2025, 1), on_step=limit)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
