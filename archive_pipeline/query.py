"""Ask the archive: SQL over exactly the objects that the manifests list, the answer as a pandas DataFrame.

Belongs here: the view ``audit_logs`` in DuckDB, its pruning, and ``python -m archive_pipeline.query``.
Does not: writing anything; in production Athena reads the same objects (`archive_pipeline.catalog`).

DuckDB's own S3 reader is an extension that is downloaded on first use, which a closed network does not allow.
The objects are therefore read by pyarrow, which DuckDB hands its projection and its filters: months and files are
left out by the bounds in the manifests, row groups by their statistics.
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

import boto3
import duckdb
import pyarrow as pa
import pyarrow.dataset as ds
from pyarrow import fs

from archive_pipeline.columns import PARTITION_COLUMNS, arrow_schema
from archive_pipeline.manifest import Layout, Manifest, Part, published
from archive_pipeline.months import Month
from archive_pipeline.objects import ArchiveBucket
from archive_pipeline.snapshot import SourceTable
from scaling.errors import UserError, run_command
from scaling.settings import ArchiveSettings, load

if TYPE_CHECKING:
    import pandas as pd

QUERY_MEMORY = "1GB"
READS = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)


class Archive:
    """The archived table, open for queries.

    Args:
        bucket: of the archive.
        layout: where it lies.
        table: the source; the view has its name.
        first: ``YYYY-MM``, nothing earlier is read.
        last: ``YYYY-MM``, nothing later is read.

    Raises:
        UserError: nothing is archived there, or the bucket cannot be read.
    """

    def __init__(
        self,
        bucket: ArchiveBucket,
        layout: Layout,
        table: SourceTable,
        *,
        first: str | None = None,
        last: str | None = None,
    ) -> None:
        manifests = [found.manifest for found in published(bucket, layout, first=first, last=last)]
        if not manifests:
            months = f" from {first or 'the first month'} to {last or 'the last'}" if first or last else ""
            raise UserError(
                f"no month of {table} is archived in s3://{bucket.name}/{layout.data}{months}; "
                "materialize audit_log_archive first"
            )
        self._spill = tempfile.TemporaryDirectory(prefix="archive-query-")
        self._duckdb = duckdb.connect(config={"memory_limit": QUERY_MEMORY, "temp_directory": self._spill.name})
        self._duckdb.register(table.name, _dataset(manifests, bucket))
        # From here on the query can reach the view and nothing else: no files, no network, no settings.
        for setting in ("TimeZone = 'UTC'", "enable_external_access = false", "lock_configuration = true"):
            self._duckdb.execute(f"SET {setting}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._duckdb.close()
        self._spill.cleanup()

    def query(self, query: str) -> "pd.DataFrame":
        """Run one SELECT.

        Args:
            query: DuckDB SQL over the view; ``created_at`` is exact to the millisecond, ``created_at_us`` fully,
                ``year`` and ``month`` are the archive's months.

        Returns:
            The answer.

        Raises:
            UserError: it is not one valid SELECT.
        """
        try:
            statements = self._duckdb.extract_statements(query)
            if len(statements) != 1 or statements[0].type not in READS:
                raise UserError("the archive answers one SELECT at a time")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # DuckDB 2.0 calls pandas 3 with old arguments
                return self._duckdb.execute(statements[0]).df()
        except duckdb.Error as error:
            raise UserError(f"the query cannot be run: {error}") from None


def query(
    statement: str, *, settings: ArchiveSettings | None = None, first: str | None = None, last: str | None = None
) -> "pd.DataFrame":
    """Run one SELECT over the configured archive.

    Args:
        statement: DuckDB SQL over the view ``audit_logs`` (the name of ARCHIVE_TABLE).
        settings: of the archive; None reads the environment.
        first: ``YYYY-MM``, nothing earlier is read.
        last: ``YYYY-MM``, nothing later is read.

    Returns:
        The answer.

    Raises:
        UserError: a setting is missing, nothing is archived, or it is not one valid SELECT.
    """
    settings = settings or load(ArchiveSettings)
    for month in (first, last):
        if month is not None:
            Month.parse(month)
    bucket, layout = ArchiveBucket.from_settings(settings), Layout(settings.archive_prefix)
    with Archive(bucket, layout, SourceTable.parse(settings.archive_table), first=first, last=last) as archive:
        return archive.query(statement)


def _dataset(manifests: Sequence[Manifest], bucket: ArchiveBucket) -> ds.Dataset:
    schemas = [arrow_schema(manifest.columns) for manifest in manifests]
    partitions = pa.schema([(name, pa.int32()) for name in PARTITION_COLUMNS])
    try:
        schema = pa.unify_schemas([*schemas, partitions], promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(
            f"a column changed its type between two archived months ({error}); query fewer months with --from and --to"
        ) from None
    filesystem, parquet = _filesystem(bucket), ds.ParquetFileFormat()
    fragments = [
        parquet.make_fragment(f"{bucket.name}/{part.key}", filesystem, _guarantee(manifest.month, part))
        for manifest in manifests
        for part in manifest.parts
    ]
    return ds.FileSystemDataset(fragments, schema, parquet, filesystem)


def _guarantee(month: Month, part: Part) -> ds.Expression:
    """What is true of every row of a part, so that a filter can leave the part out without opening it."""
    us = ds.field("created_at_us")
    known = (ds.field("year") == month.year) & (ds.field("month") == month.month)
    if part.digest.min_us is None or part.digest.max_us is None:
        return known
    created_at = ds.field("created_at")
    first, last = (pa.scalar(at // 1000, pa.timestamp("ms", "UTC")) for at in (part.digest.min_us, part.digest.max_us))
    return (
        known & (us >= part.digest.min_us) & (us <= part.digest.max_us) & (created_at >= first) & (created_at <= last)
    )


def _filesystem(bucket: ArchiveBucket) -> fs.S3FileSystem:
    # The AWS SDK inside pyarrow has a credential chain of its own; boto3's is the one the rest of the pipeline uses.
    found = boto3.Session().get_credentials()
    credentials = found.get_frozen_credentials() if found else None
    if credentials is None:
        raise UserError(
            "there are no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run with a role"
        )
    return fs.S3FileSystem(
        access_key=credentials.access_key,
        secret_key=credentials.secret_key,
        session_token=credentials.token,
        region=bucket.region,
        endpoint_override=bucket.endpoint,
    )


def _print(frame: "pd.DataFrame", form: str) -> None:
    match form:
        case "csv":
            frame.to_csv(sys.stdout, index=False)
        case "json":
            frame.to_json(sys.stdout, orient="records", lines=True, date_format="iso", date_unit="us")
        case _:
            from rich.console import Console
            from rich.table import Table

            table = Table(*map(str, frame.columns))
            for row in frame.itertuples(index=False):
                table.add_row(*map(_cell, row))
            Console().print(table)
            print(f"{len(frame):,} row{'' if len(frame) == 1 else 's'}")


def _cell(value: object) -> str:
    from rich.markup import escape

    return "" if value is None else escape(str(value))


def main(arguments: Iterable[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes them from the process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m archive_pipeline.query",
        description="Ask the archived audit logs: one SELECT of DuckDB SQL over the view audit_logs.",
        epilog="example: python -m archive_pipeline.query --from 2025-01 --to 2025-03 "
        "\"SELECT action, count(*) FROM audit_logs WHERE tenant_id = '…' GROUP BY ALL ORDER BY 2 DESC\"",
    )
    parser.add_argument("sql", help="one SELECT; columns year and month are the archive's months")
    parser.add_argument("--from", dest="first", metavar="YYYY-MM", help="read nothing earlier than this month")
    parser.add_argument("--to", dest="last", metavar="YYYY-MM", help="read nothing later than this month")
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table", help="json is one object a line")
    options = parser.parse_args(list(arguments) if arguments is not None else None)
    _print(query(options.sql, first=options.first, last=options.last), options.format)
    return 0


if __name__ == "__main__":
    run_command(main)
