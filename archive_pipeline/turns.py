"""Whose turn it is on a table: exports of several months at once, or one prune, never both.

Belongs here: the lock that both take, and waiting for it. Does not: the months they work on (`archive_pipeline.ledger`
leases each).

A prune waits for whoever reads the table, and an export reads it for as long as a month takes: at the same time, one
would stop the other again and again, and a replica would cancel the export. Dagster's pools count slots and know no
"many of these or one of those", so the database says it: exports share the lock, a prune has it alone. It ends with the
session, however the process ends.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psycopg

from archive_pipeline.errors import MonthBusyError
from archive_pipeline.snapshot import SourceTable
from scaling.databases import Shard

SHARED = "SELECT pg_try_advisory_lock_shared(hashtextextended(%s, 0))"
ALONE = "SELECT pg_try_advisory_lock(hashtextextended(%s, 0))"

PATIENCE_SECONDS = 1800.0
SECONDS_BETWEEN_TRIES = 0.5


@contextmanager
def exporting(
    shard: Shard,
    table: SourceTable,
    *,
    patience: float = PATIENCE_SECONDS,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[None]:
    """Export months for as long as the block runs; beside other exports, not beside a prune.

    Args:
        shard: the database.
        table: the source.
        patience: seconds to wait for a prune to end.
        sleep: waits between two tries.

    Raises:
        MonthBusyError: a prune has been at it all the time.
    """
    with _turn(shard, table, SHARED, "a prune is at work on it", patience, sleep):
        yield


@contextmanager
def pruning(
    shard: Shard,
    table: SourceTable,
    *,
    patience: float = PATIENCE_SECONDS,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[None]:
    """Prune for as long as the block runs; neither beside exports nor beside another prune.

    Args:
        shard: the database.
        table: the source.
        patience: seconds to wait for exports to end.
        sleep: waits between two tries.

    Raises:
        MonthBusyError: exports have been at it all the time.
    """
    with _turn(shard, table, ALONE, "months of it are being exported", patience, sleep):
        yield


@contextmanager
def _turn(
    shard: Shard, table: SourceTable, lock: str, reason: str, patience: float, sleep: Callable[[float], None]
) -> Iterator[None]:
    waited = 0.0
    with shard.dedicated() as connection:
        # Tried again and again: a session that waits inside the statement would keep a snapshot open all the time.
        while connection.execute(lock.encode(), (f"turn {table}",)).fetchone() != (True,):
            if waited >= patience:
                raise MonthBusyError(f"{table} is busy: {reason}; wait for that run to end, or stop it")
            sleep(SECONDS_BETWEEN_TRIES)
            waited += SECONDS_BETWEEN_TRIES
        try:
            yield
        finally:
            with suppress(psycopg.OperationalError):  # the session is gone, and the lock with it
                connection.execute("SELECT pg_advisory_unlock_all()")
