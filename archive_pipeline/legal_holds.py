"""Legal holds: which months and tenants must neither be erased nor pruned, and who said so.

Belongs here: placing, releasing and asking for holds, the sentence of a refusal, and
``python -m archive_pipeline.legal_holds``. Does not: erasing or pruning, which ask here first.

A hold names a month, a tenant, or both; what it leaves open it covers whole. Released ones stay on record.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from archive_pipeline.errors import LegalHoldError
from archive_pipeline.months import Month
from archive_pipeline.snapshot import SourceTable
from scaling.databases import Connection, DatabaseRouter
from scaling.errors import UserError, run_command
from scaling.settings import ArchiveSourceSettings, DatabaseSettings, load

FIELDS = "id, month, tenant_id, reason, placed_by, placed_at, released_by, released_at"

# A hold that leaves month or tenant open covers every one; a question that does asks about any.
ACTIVE = f"""
SELECT {FIELDS} FROM archive.legal_holds
WHERE source_table = %(table)s AND released_at IS NULL
  AND (month IS NULL OR %(month)s::date IS NULL OR month = %(month)s::date)
  AND (tenant_id IS NULL OR %(tenant)s::text IS NULL OR tenant_id = %(tenant)s::text)
ORDER BY id
"""  # noqa: S608 - constants only

ALL = f"SELECT {FIELDS} FROM archive.legal_holds WHERE source_table = %(table)s ORDER BY id"  # noqa: S608 - constants only

PLACE = f"""
INSERT INTO archive.legal_holds (source_table, month, tenant_id, reason, placed_by)
VALUES (%(table)s, %(month)s, %(tenant)s, %(reason)s, %(by)s)
RETURNING {FIELDS}
"""  # noqa: S608 - constants only

RELEASE = f"""
UPDATE archive.legal_holds SET released_by = %(by)s, released_at = clock_timestamp()
WHERE id = %(number)s AND source_table = %(table)s AND released_at IS NULL
RETURNING {FIELDS}
"""  # noqa: S608 - constants only


@dataclass(frozen=True, slots=True)
class Hold:
    """One hold.

    Attributes:
        number: by which it is released.
        month: ``YYYY-MM``; None is every month.
        tenant: its id; None is every tenant.
        reason: for people, as it was given.
        placed_by: who did.
        placed_at: when, by the database's clock.
        released_by: who did; None while it holds.
        released_at: when.
    """

    number: int
    month: str | None
    tenant: str | None
    reason: str
    placed_by: str
    placed_at: datetime
    released_by: str | None = None
    released_at: datetime | None = None

    def __str__(self) -> str:
        # A tenant's id stays out of sentences, which end in logs; `list` shows it.
        month = f"month {self.month}" if self.month else "every month"
        tenant = "one tenant's rows of " if self.tenant else ""
        return f"legal hold {self.number} on {tenant}{month}, placed {self.placed_at:%Y-%m-%d} by {self.placed_by}"


def holds(
    connection: Connection, table: SourceTable, month: Month | None = None, tenant: str | None = None
) -> list[Hold]:
    """Ask which holds cover something.

    Args:
        connection: to the shard's database.
        table: the source.
        month: to be erased or pruned; None is any.
        tenant: whose rows; None is any, so that a hold on one tenant counts as well.

    Returns:
        The holds that are not released.
    """
    values = {"table": str(table), "month": month and month.partition_key, "tenant": tenant}
    return [_hold(row) for row in connection.execute(ACTIVE.encode(), values)]


def require_none(
    connection: Connection, table: SourceTable, what: str, month: Month | None = None, tenant: str | None = None
) -> None:
    """Refuse what a hold covers.

    Args:
        connection: to the shard's database.
        table: the source.
        what: is refused, for the sentence: ``erased``, ``pruned``.
        month: to be erased or pruned; None is any.
        tenant: whose rows; None is any.

    Raises:
        LegalHoldError: there is a hold.
    """
    refuse(holds(connection, table, month, tenant), what)


def refuse(found: Sequence[Hold], what: str) -> None:
    """Raise the refusal of holds, if there are any.

    Args:
        found: the holds in the way.
        what: is refused, for the sentence: ``erased``, ``pruned``.

    Raises:
        LegalHoldError: there is one.
    """
    if found:
        numbers = " ".join(str(hold.number) for hold in found)
        raise LegalHoldError(
            f"nothing was {what}: {'; '.join(map(str, found))}; once it may go, "
            f"python -m archive_pipeline.legal_holds release {numbers} --by NAME"
        )


def place(
    connection: Connection,
    table: SourceTable,
    *,
    month: Month | None = None,
    tenant: str | None = None,
    reason: str,
    by: str,
) -> Hold:
    """Place a hold.

    Args:
        connection: to the shard's database.
        table: the source.
        month: that is held; None is every one, those to come included.
        tenant: that is held, its id as the table prints it; None is every one.
        reason: for people.
        by: who places it.
    """
    values = {
        "table": str(table),
        "month": month and month.partition_key,
        "tenant": tenant,
        "reason": reason,
        "by": by,
    }
    row = connection.execute(PLACE.encode(), values).fetchone()
    assert row is not None  # noqa: S101 - RETURNING of one row
    return _hold(row)


def release(connection: Connection, table: SourceTable, number: int, *, by: str) -> Hold:
    """Release a hold.

    Args:
        connection: to the shard's database.
        table: the source.
        number: of the hold.
        by: who releases it.

    Raises:
        UserError: there is no such hold, or it is released already.
    """
    row = connection.execute(RELEASE.encode(), {"table": str(table), "number": number, "by": by}).fetchone()
    if row is None:
        raise UserError(f"there is no legal hold {number} on {table} that still holds; see the list command")
    return _hold(row)


def _hold(row: tuple[object, ...]) -> Hold:
    number, month, *others = row
    return Hold(number, f"{month:%Y-%m}" if month else None, *others)  # type: ignore[arg-type]  # as FIELDS says


def _show(found: Sequence[Hold]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("hold", "month", "tenant", "reason", "placed by", "placed at (UTC)", "released by")
    for hold in found:
        cells = (hold.month or "every month", hold.tenant or "every tenant", hold.reason, hold.placed_by)
        placed_at = f"{hold.placed_at:%Y-%m-%d %H:%M}"
        table.add_row(str(hold.number), *map(escape, cells), placed_at, escape(hold.released_by or ""))
    Console().print(table)


def main(arguments: Iterable[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes them from the process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m archive_pipeline.legal_holds",
        description="Keep months or tenants from being erased or pruned.",
    )
    parser.add_argument("--shard", default="main", help="database; only of interest when there are several")
    commands = parser.add_subparsers(dest="command", required=True)
    placing = commands.add_parser("place", help="place a hold on a month, a tenant, or a tenant's rows of a month")
    placing.add_argument("--month", metavar="YYYY-MM", help="default: every month")
    placing.add_argument("--tenant", metavar="ID", help="default: every tenant")
    placing.add_argument("--everything", action="store_true", help="hold every month of every tenant")
    placing.add_argument("--reason", required=True, help="kept with the hold; no personal data")
    placing.add_argument("--by", required=True, metavar="NAME", help="who places it")
    releasing = commands.add_parser("release", help="release holds")
    releasing.add_argument("number", type=int, nargs="+")
    releasing.add_argument("--by", required=True, metavar="NAME", help="who releases it")
    listing = commands.add_parser("list", help="show the holds")
    listing.add_argument("--all", action="store_true", help="those released as well")
    options = parser.parse_args(list(arguments) if arguments is not None else None)

    settings = load(ArchiveSourceSettings)
    table = SourceTable.parse(settings.archive_table)
    with (
        DatabaseRouter.from_settings(load(DatabaseSettings), application_name="legal_holds") as router,
        router.shard(options.shard).transaction() as connection,
    ):
        match options.command:
            case "place":
                if not (options.month or options.tenant or options.everything):
                    raise UserError("say what is held: --month, --tenant, both, or --everything")
                month = Month.parse(options.month, settings.archive_time_zone) if options.month else None
                placed = place(
                    connection, table, month=month, tenant=options.tenant, reason=options.reason, by=options.by
                )
                print(f"placed: {placed}")
            case "release":
                for number in options.number:
                    print(f"released: {release(connection, table, number, by=options.by)}")
            case _:
                rows = connection.execute(ALL.encode(), {"table": str(table)}).fetchall() if options.all else ()
                _show([_hold(row) for row in rows] if options.all else holds(connection, table))
    return 0


if __name__ == "__main__":
    run_command(main)
