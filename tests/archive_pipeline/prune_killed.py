"""Prunes that die at a given step, as on a machine that loses its power.

``python -m tests.archive_pipeline.prune_killed`` imports everything once and forks a child for each line of its input,
``step<TAB>scratch<TAB>name=value<TAB>…``; it answers with the child's exit code.
"""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

from archive_pipeline.manifest import Layout
from archive_pipeline.objects import ArchiveBucket
from archive_pipeline.prunable import Policy
from archive_pipeline.prune import Step, run
from archive_pipeline.publication import Target
from archive_pipeline.snapshot import SourceTable
from scaling.databases import Shard
from scaling.settings import ArchiveSettings, DatabaseSettings, load


def prune_and_die(step: str, scratch: str) -> None:
    def die(reached: Step) -> None:
        if reached == Step(step):
            os.kill(os.getpid(), signal.SIGKILL)

    target = Target(
        table=SourceTable("public", "audit_logs"),
        bucket=ArchiveBucket.from_settings(load(ArchiveSettings)),
        layout=Layout("audit_logs"),
        grace=timedelta(hours=1),
        scratch=Path(scratch),
    )
    settings = load(DatabaseSettings)
    owner = settings.database_owner_url.get_secret_value() if settings.database_owner_url else None
    shard = Shard("main", settings.database_url.get_secret_value(), owner_dsn=owner)
    run(shard, target, Policy("auto", retention_months=1), on_step=die)


def main() -> None:
    for line in sys.stdin:
        step, scratch, *environment = line.rstrip("\n").split("\t")
        child = os.fork()
        if child == 0:
            os.environ.update(dict(variable.split("=", 1) for variable in environment))
            prune_and_die(step, scratch)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
