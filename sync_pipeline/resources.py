"""What a run needs from outside: the databases and Google.

Belongs here: reading the settings when a run starts and opening what they name. Does not: asset logic.
https://docs.dagster.io/guides/build/external-resources
"""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from scaling.databases import DatabaseRouter
from scaling.errors import UserError
from scaling.settings import DatabaseSettings, load
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
        with DatabaseRouter.from_settings(load(DatabaseSettings), application_name="sync_pipeline") as router:
            yield router


@contextmanager
def failing_with_a_sentence() -> Iterator[None]:
    """Show a `UserError` in the UI as the sentence it is, without a stack trace, and without retrying the step.

    Raises:
        dagster.Failure: in place of the error.
    """
    try:
        yield
    except UserError as error:
        raise dg.Failure(description=str(error), allow_retries=False) from None
