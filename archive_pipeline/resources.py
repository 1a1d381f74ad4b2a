"""What a run needs from outside: the databases and the bucket.

Belongs here: reading the settings at the start of a run and opening what they name. Does not: asset logic.
https://docs.dagster.io/guides/build/external-resources
"""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from archive_pipeline.archive import Target
from archive_pipeline.bucket_protection import require
from scaling.databases import DatabaseRouter
from scaling.resources import databases
from scaling.settings import ArchiveSettings, load


class ArchiveResource(dg.ConfigurableResource[None]):
    """Databases and bucket of the archive, from environment variables read when a run starts.

    Nothing of it is configured in Dagster, so no secret can show in the UI.
    """

    @contextmanager
    def databases(self) -> Iterator[DatabaseRouter]:
        """Open the databases for one run.

        Raises:
            UserError: a setting is missing or wrong.
        """
        with databases("archive_pipeline") as router:
            yield router

    def target(self) -> Target:
        """What is archived and where it goes; nothing is asked of the bucket yet.

        Raises:
            UserError: a setting is missing or wrong.
        """
        return Target.from_settings(load(ArchiveSettings))

    def protected_target(self, *, dry_run: bool = False) -> Target:
        """The same for a run that writes: the bucket is asked first whether it is set up as the settings require.

        Args:
            dry_run: leaves out the last question, which writes an object.

        Raises:
            UserError: a setting is missing or wrong.
            BucketUnprotectedError: the bucket lacks what the settings require.
        """
        target = self.target()
        require(target.bucket, target.layout, write=not dry_run)
        return target
