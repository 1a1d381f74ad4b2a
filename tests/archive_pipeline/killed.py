"""A run of January 2025 that dies at a given step, as a machine that loses its power would."""

import os
import signal
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


def main(step: str, times: int, scratch: str) -> None:
    def die(reached: Step, seen: list[Step] = []) -> None:  # noqa: B006 - counts over the calls
        seen.append(reached)
        if seen.count(Step(step)) == times:
            os.kill(os.getpid(), signal.SIGKILL)

    target = Target(
        table=SourceTable("public", "audit_logs"),
        bucket=ArchiveBucket.from_settings(load(ArchiveSettings)),
        layout=Layout("audit_logs"),
        grace=timedelta(hours=1),
        part_size=PartSize(row_group_bytes=100_000, part_bytes=200_000),
        batch_bytes=20_000,
        scratch=Path(scratch),
    )
    shard = Shard("main", load(DatabaseSettings).database_url.get_secret_value())
    archive_month(shard, target, Month(2025, 1), on_step=die)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
