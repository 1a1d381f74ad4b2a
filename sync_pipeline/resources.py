"""What a run needs from outside: the databases and Google.

Belongs here: reading the settings when a run starts and opening what they name. Does not: asset logic.
https://docs.dagster.io/guides/build/external-resources
"""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg
import psycopg

from scaling.databases import DatabaseRouter
from scaling.errors import UserError
from scaling.resources import databases
from sync_pipeline.errors import InternalError, SyncError
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
        with _texts_kept_back(), open_services() as services:
            yield services

    @contextmanager
    def databases(self) -> Iterator[DatabaseRouter]:
        """Open the databases only.

        Raises:
            UserError: a setting is missing or wrong.
        """
        with _texts_kept_back(), databases("sync_pipeline") as router:
            yield router


@contextmanager
def _texts_kept_back() -> Iterator[None]:
    """Reduce an error nobody foresaw to its type and its place in the code.

    Dagster keeps the text of whatever ends a step, and of its causes; a text of Postgres names keys, which are mail
    addresses, and others may hold tokens.

    Raises:
        InternalError: in place of it, with its stack.
    """
    try:
        yield
    except (UserError, SyncError, dg.Failure, dg.DagsterError):
        raise
    except Exception as error:  # noqa: BLE001  # whatever it is, its text must not get out
        code = f" {error.sqlstate}" if isinstance(error, psycopg.Error) and error.sqlstate else ""
        raise InternalError(f"{type(error).__name__}{code}").with_traceback(error.__traceback__) from None
