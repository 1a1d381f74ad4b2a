"""What can stop a month, typed.

Belongs here: every error of this pipeline, each a sentence for a person; none carries row content.
"""

from collections.abc import Sequence
from datetime import datetime

from scaling.errors import UserError


class MonthOpenError(UserError):
    """The month has not ended, or a transaction that may still write to it is running."""


class MonthBusyError(UserError):
    """Another run holds the month's lease."""


class SourceLostError(UserError):
    """Postgres broke off while the month was read."""

    def __init__(self, month: str) -> None:
        super().__init__(
            f"Postgres broke off while month {month} was read (a restart, a failover, or a cancelled query); "
            "nothing was published; run the month again"
        )


class VerificationError(UserError):
    """What would be published is not what Postgres holds; nothing of the attempt is left in the bucket.

    Attributes:
        month: ``YYYY-MM``.
        columns: columns whose content differs, where that could be told.
    """

    def __init__(self, month: str, finding: str, columns: Sequence[str] = ()) -> None:
        self.month = month
        self.finding = finding
        self.columns = tuple(columns)
        where = f" (column{'s' if len(self.columns) > 1 else ''} {', '.join(self.columns)})" if self.columns else ""
        super().__init__(
            f"month {month} failed verification: {finding}{where}; nothing was published and nothing was deleted "
            "from Postgres; run the month again, and look at disk and memory of this machine if it fails again"
        )


class FencedError(UserError):
    """This run's lease was taken over; it must not write another byte."""


class ObjectConflictError(UserError):
    """A key that must never be overwritten already holds other bytes."""


class CatalogError(UserError):
    """The archived months cannot be declared as one table; the months themselves are sound."""


class ObjectLockedError(UserError):
    """Object Lock keeps a version from being removed.

    Attributes:
        until: when the lock ends; None for a legal hold, which somebody must lift.
    """

    def __init__(self, sentence: str, until: datetime | None) -> None:
        self.until = until
        super().__init__(sentence)


class PartitionsError(UserError):
    """The table's partitions are not what the work needs; the sentence names the partition or the lock in the way."""


class LegalHoldError(UserError):
    """A legal hold forbids to erase or to prune."""


class RestoreError(UserError):
    """Rows cannot be put back, or came back other than they were archived; Postgres is as it was.

    Attributes:
        month: ``YYYY-MM``.
        columns: that are in the way, where that could be told.
    """

    def __init__(self, month: str, finding: str, columns: Sequence[str] = ()) -> None:
        self.month = month
        self.columns = tuple(columns)
        where = f" (column{'s' if len(self.columns) > 1 else ''} {', '.join(self.columns)})" if self.columns else ""
        super().__init__(f"month {month} was not restored: {finding}{where}; Postgres is as it was")


class ErasureError(UserError):
    """Rows could not be erased from the archive; the sentence says what is in the way and what was done so far."""


class ChainError(UserError):
    """The chain of signed links is not what was written; nothing is appended to it."""


class BucketUnprotectedError(UserError):
    """The bucket lacks what the settings require of it; nothing was written."""


class ConversionRefusedError(UserError):
    """The table cannot be partitioned as it is; nothing was changed.

    Attributes:
        blockers: one sentence each, with its remedy.
    """

    def __init__(self, table: str, blockers: Sequence[str]) -> None:
        self.blockers = tuple(blockers)
        listed = "; ".join(f"({number}) {each}" for number, each in enumerate(self.blockers, start=1))
        super().__init__(f"{table} was not changed, it cannot be converted as it is: {listed}")


class ConversionBusyError(UserError):
    """Another conversion of the table is under way."""


class ConversionError(UserError):
    """A conversion or its rollback did not come about; the table is what it was before."""
