"""An erasure of one tenant that dies at a given step, as a machine that loses its power would."""

import os
import signal
import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path

from archive_pipeline.erase import Erasure, erase
from archive_pipeline.parts import PartSize
from archive_pipeline.publication import Target
from scaling.databases import Shard
from scaling.settings import ArchiveSettings, DatabaseSettings, load


def main(tenant: str, step: str, times: int, scratch: str) -> None:
    seen: list[str] = []

    def die(reached: StrEnum) -> None:
        seen.append(str(reached))
        if seen.count(step) == times:
            os.kill(os.getpid(), signal.SIGKILL)

    target = replace(
        Target.from_settings(load(ArchiveSettings)),
        part_size=PartSize(row_group_bytes=100_000, part_bytes=50_000),
        scratch=Path(scratch),
    )
    shard = Shard("main", load(DatabaseSettings).database_url.get_secret_value())
    erase(shard, target, Erasure("tenant_id", tenant, "ann", "killed"), dry_run=False, on_step=die)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
