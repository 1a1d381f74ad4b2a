"""A conversion that dies at a given step, as a machine that loses its power would."""

import os
import signal
import sys

from archive_pipeline.conversion import Conversion, Step, convert
from archive_pipeline.snapshot import SourceTable
from scaling.databases import Shard
from scaling.settings import DatabaseSettings, load


def main(step: str) -> None:
    def die(reached: Step) -> None:
        if reached.name == step:
            os.kill(os.getpid(), signal.SIGKILL)

    urls = load(DatabaseSettings)
    assert urls.database_owner_url is not None
    shard = Shard(
        "main",
        urls.database_url.get_secret_value(),
        owner_dsn=urls.database_owner_url.get_secret_value(),
        application_name="killed",
    )
    convert(shard, Conversion(SourceTable("public", "audit_logs"), "audit_partitions", "UTC", 3), on_step=die)


if __name__ == "__main__":
    main(sys.argv[1])
