"""One process of a chaos trial: does what it is told with the archive, until it is killed.

Belongs here: the operations, and dying at a step. Does not: what befalls it from outside, or the judgement (`chaos`).
"""

import json
import logging
import os
import signal
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import stamina

from archive_pipeline import turns
from archive_pipeline.archive import MonthReport, archive_month
from archive_pipeline.conversion import Conversion, convert
from archive_pipeline.errors import MonthBusyError
from archive_pipeline.manifest import Layout
from archive_pipeline.months import Month
from archive_pipeline.objects import ArchiveBucket
from archive_pipeline.parts import PartSize
from archive_pipeline.premade_months import premake
from archive_pipeline.prunable import Policy
from archive_pipeline.prune import Pruned, run
from archive_pipeline.publication import Target
from archive_pipeline.signing import signer_from
from archive_pipeline.snapshot import SourceTable
from scaling.databases import Shard
from scaling.errors import UserError
from scaling.settings import ArchiveSettings, DatabaseSettings, load

TABLE = SourceTable("public", "audit_logs")
SCHEMA = "audit_partitions"
POLICY = Policy("auto", retention_months=1)
PREMADE = 2


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker does.

    Attributes:
        environment: variables that name database, bucket and key.
        scratch: directory of its own.
        months: closed ones, oldest first.
        operations: of `OPERATIONS`, in order.
        die_at: kills itself after so many steps; 0 never.
        result: file it leaves behind when it ends by itself.
    """

    environment: Mapping[str, str]
    scratch: Path
    months: Sequence[Month]
    operations: Sequence[str]
    die_at: int
    result: Path


class Hands:
    """The archive's operations on one database and bucket, with settings from the environment."""

    def __init__(self, scratch: Path, months: Sequence[Month], on_step: Callable[[object], None]) -> None:
        settings, urls = load(ArchiveSettings), load(DatabaseSettings)
        assert urls.database_owner_url is not None
        self.shard = Shard(
            "main",
            urls.database_url.get_secret_value(),
            owner_dsn=urls.database_owner_url.get_secret_value(),
            application_name="chaos",
        )
        self.target = Target(
            table=TABLE,
            bucket=ArchiveBucket.from_settings(settings),
            layout=Layout("audit_logs"),
            grace=timedelta(hours=1),
            part_size=PartSize(row_group_bytes=8_000, part_bytes=20_000, least_part_bytes=10_000),
            batch_bytes=4_000,
            scratch=scratch,
            signer=signer_from(settings),
        )
        self._months = months
        self._on_step = on_step

    def archive(self) -> list[MonthReport]:
        reports = []
        for month in self._months:
            with turns.exporting(self.shard, TABLE, patience=5):
                reports.append(archive_month(self.shard, self.target, month, on_step=self._on_step))
        return reports

    def prune(self) -> list[Pruned]:
        with turns.pruning(self.shard, TABLE, patience=5):
            return run(self.shard, self.target, POLICY, on_step=self._on_step)

    def convert(self) -> None:
        convert(self.shard, Conversion(TABLE, SCHEMA, "UTC", PREMADE), on_step=self._on_step)

    def premake(self) -> None:
        with self.shard.owner() as owner:
            premake(owner, TABLE, SCHEMA, "UTC", PREMADE)


OPERATIONS = ("archive", "prune", "convert", "premake")


def work(job: Job) -> None:
    """Do the job; its troubles are sentences, whatever happens to the servers."""
    os.environ.update(job.environment)
    logging.disable(logging.CRITICAL)  # what fails is the point
    stamina.instrumentation.set_on_retry_hooks([])
    steps = 0

    def step(_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == job.die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    troubles: Counter[str] = Counter()
    unforeseen: list[str] = []
    hands = Hands(job.scratch, job.months, step)
    for name in job.operations:
        try:
            getattr(hands, name)()
        except MonthBusyError:
            troubles["busy"] += 1
        except UserError as error:
            troubles[type(error).__name__] += 1
        except Exception as error:
            unforeseen.append(f"{name}: {type(error).__name__}: {error}"[:300])
    job.result.write_text(json.dumps({"troubles": troubles, "unforeseen": unforeseen, "steps": steps}))
