"""What the Dagster layers of both pipelines share: opening the databases, and failing with a sentence.

Belongs here: Dagster code that is the same in every pipeline. Does not: anything a domain module needs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

import dagster as dg
import httpx

from scaling.databases import Connection, DatabaseRouter
from scaling.errors import UserError
from scaling.settings import DatabaseSettings, ScalingSettings, load
from scaling.sources import Reach


@contextmanager
def databases(application_name: str) -> Iterator[DatabaseRouter]:
    """Open the databases for one run, from the environment as it is when the run starts.

    Args:
        application_name: shown in ``pg_stat_activity``.

    Raises:
        UserError: a setting is missing or wrong.
    """
    with DatabaseRouter.from_settings(load(DatabaseSettings), application_name=application_name) as router:
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


class ScalingResource(dg.ConfigurableResource[None]):
    """The databases of the thresholds, from environment variables read when a run starts.

    Nothing of it is configured in Dagster, so no secret can show in the UI.
    """

    @contextmanager
    def databases(self) -> Iterator[DatabaseRouter]:
        """Open every database.

        Raises:
            UserError: a setting is missing or wrong.
        """
        with databases("scaling") as router:
            yield router

    @contextmanager
    def first_shard(self) -> Iterator[Connection]:
        """Begin a transaction where the thresholds keep their tables.

        Raises:
            UserError: a setting is missing or wrong, or the database does not answer.
        """
        with databases("scaling") as router, router.shards()[0].transaction() as connection:
            yield connection

    @contextmanager
    def reach(self, settings: ScalingSettings, now: datetime) -> Iterator[Reach]:
        """Open what a measurement needs.

        Args:
            settings: credentials, endpoints and time limits.
            now: the moment of the measurement.

        Raises:
            UserError: a setting of the database is missing or wrong.
        """
        with databases("scaling") as router, httpx.Client() as client:
            yield Reach(router, client, settings, now)
