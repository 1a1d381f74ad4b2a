"""Ask the archive: one SELECT over exactly the objects that the manifests list, the answer as a pandas DataFrame.

Belongs here: the views in DuckDB, the choice of the engine, and ``python -m archive_pipeline.query``.
Does not: writing anything; reading a statement (`archive_pipeline.statements`); Athena (`archive_pipeline.athena`).

The same SQL, DuckDB's, runs here and in Athena. Here only months and parts that can hold an answer are opened, of
those only the row groups that can (by their statistics and bloom filters), and of those only the columns asked for.
"""

import argparse
import json
import secrets
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import duckdb
import pyarrow as pa
from sqlglot import exp

from archive_pipeline.athena import MB, Workgroup, usd
from archive_pipeline.catalog import DATABASE, MONTH_COLUMN, current, view_name
from archive_pipeline.columns import PARTITION_COLUMNS, Field, arrow_schema
from archive_pipeline.manifest import Layout, Manifest, Part
from archive_pipeline.months import Month, epoch_us
from archive_pipeline.objects import ArchiveBucket
from archive_pipeline.ranges import SCHEME, PartsFileSystem
from archive_pipeline.snapshot import SourceTable
from archive_pipeline.statements import ONE_SELECT, Span, Statement, equals, month_conditions
from scaling.errors import UserError, run_command
from scaling.settings import ArchiveSettings, load

if TYPE_CHECKING:
    import pandas as pd

QUERY_MEMORY = "1GB"
# Threads wait for S3 most of the time, so there are more of them than processors.
THREADS = 8
TABLE_FUNCTIONS = frozenset({"range", "generate_series", "unnest"})
TENANT = "tenant_id"

Engine = Literal["duckdb", "athena"]

DUCKDB_TYPES = {
    pa.string(): "VARCHAR",
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.bool_(): "BOOLEAN",
    pa.float32(): "FLOAT",
    pa.float64(): "DOUBLE",
    pa.binary(): "BLOB",
    pa.date32(): "DATE",
    pa.timestamp("ms", "UTC"): "TIMESTAMPTZ",
    pa.timestamp("ms"): "TIMESTAMP",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a statement brought, and what it took.

    Attributes:
        frame: its rows.
        bytes_scanned: read from the bucket; by Athena as it bills them.
        usd: what Athena charges for so many bytes, whichever engine read them.
        engine: that ran it.
        seconds: it took.
        archive_bytes: of all parts of the months that were asked; ``bytes_scanned`` is a part of it.
        sql: as the engine ran it.
    """

    frame: "pd.DataFrame"
    bytes_scanned: int
    usd: float
    engine: Engine
    seconds: float
    archive_bytes: int
    sql: str

    @property
    def summary(self) -> str:
        """One line for people."""
        share = f" of {self.archive_bytes / MB:,.1f} MB" if self.archive_bytes else ""
        price = "Athena charged" if self.engine == "athena" else "Athena would charge"
        return (
            f"{self.engine} read {self.bytes_scanned / MB:,.2f} MB{share} in {self.seconds:.1f} s; "
            f"{price} ${self.usd:.5f}"
        )


class Archive:
    """The archived table, open for queries in DuckDB.

    Args:
        bucket: of the archive.
        layout: where it lies.
        table: the source; the view has its name.
        first: ``YYYY-MM``, nothing earlier is read.
        last: ``YYYY-MM``, nothing later is read.
        tenant: only this tenant's rows are there to be read.
        database: name the table has in Athena, which a statement may write before the table's.

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
        tenant: str | None = None,
        database: str = DATABASE,
    ) -> None:
        self._manifests = _asked(bucket, layout, table, first, last)
        self._table = table
        self._schema = _schema(self._manifests)
        self._only = "" if tenant is None else f" WHERE {equals(_tenant(self._manifests), tenant).sql('duckdb')}"
        self._files = PartsFileSystem(bucket, (part for each in self._manifests for part in each.parts))
        self._spill = tempfile.TemporaryDirectory(prefix="archive-query-")
        self._duckdb = duckdb.connect(
            config={"memory_limit": QUERY_MEMORY, "temp_directory": self._spill.name, "threads": str(THREADS)}
        )
        # Statements cannot guess the names of the views they are narrowed to, which hold what the tables hold anyway.
        self._token = secrets.token_hex(8)
        self._views: dict[tuple[Span, bool], str] = {}
        self._duckdb.register_filesystem(self._files)
        # From here on a query can reach the archive's parts and nothing else: no files, no network, no settings.
        for setting in (
            "TimeZone = 'UTC'",
            "parquet_metadata_cache = true",
            "python_enable_replacements = false",
            f"allowed_directories = ['{SCHEME}://']",
            "enable_external_access = false",
            "lock_configuration = true",
        ):
            self._duckdb.execute(f"SET {setting}")
        for name, by_month in ((table.name, False), (view_name(table), True)):
            everything = self._view(Span(), by_month=by_month)
            for schema in dict.fromkeys(("main", table.schema, database)):
                self._duckdb.execute(f"CREATE SCHEMA IF NOT EXISTS {_quoted(schema)}")
                self._duckdb.execute(f"CREATE VIEW {_quoted(schema)}.{_quoted(name)} AS FROM {everything}")

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
            UserError: it is not one valid SELECT over the archive.
        """
        return self.ask(query).frame

    def ask(self, query: str) -> Answer:
        """Run one SELECT and count what it reads.

        Args:
            query: see `query`.

        Returns:
            The answer with its bytes and its price.

        Raises:
            UserError: it is not one valid SELECT over the archive.
        """
        began, before = time.monotonic(), self._files.bytes_read
        sql = self._narrow(query)
        try:
            self._refuse_all_but_the_archive(sql)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # DuckDB 2.0 calls pandas 3 with old arguments
                frame = self._duckdb.execute(sql).df()
        except duckdb.Error as error:
            raise self._sentence(error) from None
        read = self._files.bytes_read - before
        return Answer(
            frame,
            read,
            usd(read),
            "duckdb",
            time.monotonic() - began,
            sum(manifest.size for manifest in self._manifests),
            sql,
        )

    def _narrow(self, query: str) -> str:
        statement = Statement(query, _tables(self._table), _fields(self._manifests))
        spans = statement.spans()

        def replacement(number: int, alias: str, name: str) -> exp.Expr | None:
            if spans[number].is_open:
                return None
            view = self._view(spans[number], by_month=name.lower() == view_name(self._table))
            return exp.alias_(exp.to_table(view), alias, table=True, quoted=True)

        return statement.narrowed(replacement)

    def _view(self, span: Span, *, by_month: bool) -> str:
        """A view of the parts that can hold rows of a span."""
        key = (span, by_month)
        if key not in self._views:
            name = f"archive_{self._token}_{len(self._views)}"
            more = (MONTH_COLUMN,) if by_month else ()
            columns = ", ".join(map(_quoted, (*self._schema.names, *PARTITION_COLUMNS, *more)))
            # What only counts rows reads the first column, so the constants of a month come first inside.
            select = f"SELECT {columns} FROM ({self._parts(span)}){self._only}"  # noqa: S608 - quoted names of columns
            self._duckdb.execute(f"CREATE VIEW {name} AS {select}")
            self._views[key] = name
        return self._views[key]

    def _parts(self, span: Span) -> str:
        months = [
            branch
            for manifest in self._manifests
            if (branch := self._month(manifest, [p for p in manifest.parts if _may_hold(p, span)])) is not None
        ]
        if not months:
            columns = [(field.name, _duckdb_type(field.type)) for field in self._schema]
            columns += [(name, "INTEGER") for name in PARTITION_COLUMNS] + [(MONTH_COLUMN, "VARCHAR")]
            months = [f"SELECT {', '.join(f'NULL::{kind} AS {_quoted(name)}' for name, kind in columns)} WHERE false"]
        return " UNION ALL ".join(months)

    def _month(self, manifest: Manifest, parts: Sequence[Part]) -> str | None:
        if not parts:
            return None
        held = arrow_schema(manifest.columns)
        values = [
            f"{manifest.month.year}::INTEGER AS year",
            f"{manifest.month.month}::INTEGER AS month",
            f"'{manifest.month.name}' AS {MONTH_COLUMN}",
        ]
        for field in self._schema:
            value = _quoted(field.name) if field.name in held.names else "NULL"
            values.append(f"{value}::{_duckdb_type(field.type)} AS {_quoted(field.name)}")
        # With the columns given, no file is opened before it is read.
        given = ", ".join(
            f"{_literal(field.name)}: {{name: {_literal(field.name)}, type: '{_duckdb_type(field.type)}', "
            "default_value: NULL}"
            for field in held
        )
        files = ", ".join(_literal(f"{SCHEME}://{part.key}") for part in parts)
        return f"SELECT {', '.join(values)} FROM read_parquet([{files}], schema = MAP {{{given}}})"  # noqa: S608

    def _refuse_all_but_the_archive(self, sql: str) -> None:
        """What DuckDB itself reads in the statement must be the archive's views, whatever sqlglot made of it."""
        found = self._duckdb.execute("SELECT json_serialize_sql($sql)", {"sql": sql}).fetchone()
        tree: dict[str, Any] = json.loads(found[0]) if found else {"error": True}
        if tree["error"] or len(tree["statements"]) != 1:
            message = str(tree.get("error_message", ""))
            raise UserError(ONE_SELECT if "SELECT" in message or not message else f"the query cannot be run: {message}")
        nodes = list(_nodes(tree))
        views = {self._table.name.lower(), view_name(self._table), *self._views.values()}
        local = {str(entry["key"]).lower() for node in nodes for entry in _entries(node)}
        for node in nodes:
            match node.get("type"):
                case "BASE_TABLE":
                    name = str(node["table_name"])
                    # A name given by a WITH counts only where it cannot be taken for a file or another schema's table.
                    is_local = name.lower() in local and not node["schema_name"] and name.isidentifier()
                    if name.lower() not in views and not is_local:
                        raise UserError(f"the query cannot be run: it reads {name}, which is no table here")
                case "TABLE_FUNCTION" if str(node["function"]["function_name"]).lower() not in TABLE_FUNCTIONS:
                    name = node["function"]["function_name"]
                    raise UserError(f"the query cannot be run: it reads {name}(…), which is no table here")
                case "SHOW_REF":
                    raise UserError(ONE_SELECT)

    def _sentence(self, error: duckdb.Error) -> UserError:
        failure, self._files.failure = self._files.failure, None
        if isinstance(failure, FileNotFoundError):
            return UserError(
                f"the query cannot be run: {failure} is gone, though a manifest lists it; "
                "run python -m archive_pipeline.audit"
            )
        if failure is not None:
            return UserError(f"the query cannot be run: {failure}")
        return UserError(f"the query cannot be run: {error}")


def query(
    statement: str,
    *,
    settings: ArchiveSettings | None = None,
    first: str | None = None,
    last: str | None = None,
    tenant: str | None = None,
    engine: Engine | None = None,
) -> "pd.DataFrame":
    """Run one SELECT over the configured archive.

    Args:
        statement: DuckDB SQL over the view ``audit_logs`` (the name of ARCHIVE_TABLE).
        settings: of the archive; None reads the environment.
        first: ``YYYY-MM``, nothing earlier is read.
        last: ``YYYY-MM``, nothing later is read.
        tenant: only this tenant's rows are read.
        engine: that runs it; None is Athena where a workgroup is configured, and DuckDB elsewhere.

    Returns:
        The answer.

    Raises:
        UserError: a setting is missing, nothing is archived, or it is not one valid SELECT.
    """
    return ask(statement, settings=settings, first=first, last=last, tenant=tenant, engine=engine).frame


def ask(
    statement: str,
    *,
    settings: ArchiveSettings | None = None,
    first: str | None = None,
    last: str | None = None,
    tenant: str | None = None,
    engine: Engine | None = None,
) -> Answer:
    """Run one SELECT over the configured archive, and say what it read and costs.

    Args:
        statement: DuckDB SQL over the view ``audit_logs`` (the name of ARCHIVE_TABLE).
        settings: of the archive; None reads the environment.
        first: ``YYYY-MM``, nothing earlier is read.
        last: ``YYYY-MM``, nothing later is read.
        tenant: only this tenant's rows are read.
        engine: that runs it; None is Athena where a workgroup is configured, and DuckDB elsewhere.

    Returns:
        The answer with its bytes and its price.

    Raises:
        UserError: a setting is missing, nothing is archived, or it is not one valid SELECT.
    """
    settings = settings or load(ArchiveSettings)
    for month in (first, last):
        if month is not None:
            Month.parse(month)
    bucket, layout = ArchiveBucket.from_settings(settings), Layout(settings.archive_prefix)
    table, database = SourceTable.parse(settings.archive_table), settings.archive_athena_database
    if (engine or ("athena" if settings.archive_athena_workgroup else "duckdb")) == "duckdb":
        with Archive(bucket, layout, table, first=first, last=last, tenant=tenant, database=database) as archive:
            return archive.ask(statement)
    workgroup = Workgroup.from_settings(settings)
    if workgroup is None:
        raise UserError("ARCHIVE_ATHENA_WORKGROUP is not set, so there is no Athena to ask; use --engine duckdb")
    began = time.monotonic()
    asked = _asked(bucket, layout, table, first, last)
    sql = athena_sql(statement, asked, table, database, first=first, last=last, tenant=tenant)
    run = workgroup.run(sql, _fields(asked))
    return Answer(
        run.frame,
        run.bytes_scanned,
        usd(run.bytes_scanned),
        "athena",
        time.monotonic() - began,
        sum(manifest.size for manifest in asked),
        sql,
    )


def athena_sql(
    statement: str,
    asked: Sequence[Manifest],
    table: SourceTable,
    database: str,
    *,
    first: str | None = None,
    last: str | None = None,
    tenant: str | None = None,
) -> str:
    """A statement as Athena must be asked it.

    Args:
        statement: DuckDB SQL.
        asked: newest manifests of the months that may be read.
        table: the source.
        database: of the table in Athena.
        first: ``YYYY-MM``, nothing earlier is read.
        last: ``YYYY-MM``, nothing later is read.
        tenant: only this tenant's rows are read.

    Returns:
        Athena's SQL; every place that reads the table is narrowed to its months and to the tenant.

    Raises:
        UserError: it is not one valid SELECT over the archive.
    """
    zone = asked[0].month.zone
    limits = Span(
        epoch_us(Month.parse(first, zone).start) if first else None,
        epoch_us(Month.parse(last, zone).end) - 1 if last else None,
    )
    only = [] if tenant is None else [equals(_tenant(asked), tenant)]

    def relation(name: str) -> exp.Table:
        return exp.table_(name, db=database, quoted=True)

    def conditions(span: Span) -> list[exp.Expr]:
        return [*month_conditions(span & limits, zone), *(each.copy() for each in only)]

    return Statement(statement, _tables(table), _fields(asked)).athena(relation, conditions)


def _asked(
    bucket: ArchiveBucket, layout: Layout, table: SourceTable, first: str | None, last: str | None
) -> list[Manifest]:
    found = current(bucket, layout, first=first, last=last)
    if not found:
        months = f" from {first or 'the first month'} to {last or 'the last'}" if first or last else ""
        raise UserError(
            f"no month of {table} is archived in s3://{bucket.name}/{layout.data}{months}; "
            "materialize audit_log_archive first"
        )
    return found


def _fields(asked: Sequence[Manifest]) -> list[Field]:
    found = {field.name: field for each in asked for column in each.columns for field in column.fields}
    return list(found.values())


def _tables(table: SourceTable) -> dict[str, Sequence[str]]:
    return {table.name: (), view_name(table): (MONTH_COLUMN,)}


def _tenant(asked: Sequence[Manifest]) -> Field:
    for field in _fields(asked):
        if field.name == TENANT:
            return field
    raise UserError(f"the archived table has no column {TENANT}")


def _schema(asked: Sequence[Manifest]) -> pa.Schema:
    try:
        return pa.unify_schemas([arrow_schema(each.columns) for each in asked], promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(
            f"a column changed its type between two archived months ({error}); query fewer months with --from and --to"
        ) from None


def _duckdb_type(kind: pa.DataType) -> str:
    return f"DECIMAL({kind.precision},{kind.scale})" if pa.types.is_decimal(kind) else DUCKDB_TYPES[kind]


def _may_hold(part: Part, span: Span) -> bool:
    return span.overlaps(part.digest.min_us, part.digest.max_us)


def _quoted(name: str) -> str:
    return exp.to_identifier(name, quoted=True).sql("duckdb")


def _literal(text: str) -> str:
    return exp.Literal.string(text).sql("duckdb")


def _nodes(tree: object) -> Iterator[Mapping[str, Any]]:
    if isinstance(tree, dict):
        yield tree
        for child in tree.values():
            yield from _nodes(child)
    elif isinstance(tree, list):
        for child in tree:
            yield from _nodes(child)


def _entries(node: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    named = node.get("cte_map")
    return list(named["map"]) if isinstance(named, dict) else []


def _write(frame: "pd.DataFrame", form: str, output: Path | None) -> None:
    match form:
        case "csv":
            frame.to_csv(output or sys.stdout, index=False)
        case "json":
            frame.to_json(output or sys.stdout, orient="records", lines=True, date_format="iso", date_unit="us")
        case "parquet":
            frame.to_parquet(output, index=False)
        case _:
            _print(frame, output)


def _print(frame: "pd.DataFrame", output: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*map(str, frame.columns))
    for row in frame.itertuples(index=False):
        table.add_row(*map(_cell, row))
    count = f"{len(frame):,} row{'' if len(frame) == 1 else 's'}"
    if output is None:
        Console().print(table)
        print(count)
        return
    with output.open("w", encoding="utf-8") as file:
        Console(file=file).print(table)
        print(count, file=file)


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
        description="Ask the archived audit logs: one SELECT of DuckDB SQL over the view audit_logs, run by DuckDB "
        "here or by Athena. What it read and what Athena charges for that is told on standard error.",
        epilog="example: python -m archive_pipeline.query --tenant … --from 2025-01 --to 2025-03 "
        '"SELECT action, count(*) FROM audit_logs GROUP BY ALL ORDER BY 2 DESC"',
    )
    parser.add_argument("sql", help="one SELECT; columns year and month are the archive's months")
    parser.add_argument(
        "--engine", choices=("duckdb", "athena"), help="default: athena where ARCHIVE_ATHENA_WORKGROUP is set"
    )
    parser.add_argument("--tenant", metavar="ID", help="read only this tenant's rows")
    parser.add_argument("--from", dest="first", metavar="YYYY-MM", help="read nothing earlier than this month")
    parser.add_argument("--to", dest="last", metavar="YYYY-MM", help="read nothing later than this month")
    parser.add_argument(
        "--format", choices=("table", "csv", "json", "parquet"), default="table", help="json is one object a line"
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="write there; parquet needs it")
    options = parser.parse_args(list(arguments) if arguments is not None else None)
    if options.format == "parquet" and options.output is None:
        raise UserError("--format parquet writes a file; name it with --output FILE")
    answer = ask(options.sql, first=options.first, last=options.last, tenant=options.tenant, engine=options.engine)
    _write(answer.frame, options.format, options.output)
    print(answer.summary, file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_command(main)
