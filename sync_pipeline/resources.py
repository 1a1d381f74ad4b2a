"""What a run needs from outside: the databases and Google.

Belongs here: reading the settings when a run starts and opening what they name. Does not: asset logic.
https://docs.dagster.io/guides/build/external-resources
"""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from scaling.databases import DatabaseRouter
from scaling.resources import databases
from sync_pipeline.services import Services, open_services


class SyncResource(dg.ConfigurableResource[None]):
    """Databases, Google and keys, from environment variables read when a run starts.

    Nothing of it is configured in Dagster, so no secret can show in the UI.
    """

    @contextmanager
    def services(self) -> Iterator[Services]:
        """Open everything a sync works with.

        Raises:
            UserError: a setting is missing or wrong.
        """
        with open_services() as services:
            yield services

    @contextmanager
    def databases(self) -> Iterator[DatabaseRouter]:
        """Open the databases only.

        Raises:
            UserError: a setting is missing or wrong.
        """
        with databases("sync_pipeline") as router:
            yield router
