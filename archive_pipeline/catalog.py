"""The archive as a table of Athena: its DDL, derived from the manifests, and the same kept in Glue.

Belongs here: the table's columns and years, the DDL, the Glue table, the view and the saved queries, and
``python -m archive_pipeline.catalog``. Does not: running statements (`archive_pipeline.athena`).

Partition projection stands in for registered partitions, so a new month needs no call to Glue. Its year range must
be tight and yet cover every archived year: a year outside it reads as zero rows without an error
(https://docs.aws.amazon.com/athena/latest/ug/partition-projection-supported-types.html). So the range is widened
before a year's first month is published (`prepare_catalog`), and never narrowed.
"""

import argparse
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import boto3
import stamina
from botocore.exceptions import ClientError

from archive_pipeline import manifest as manifests
from archive_pipeline.athena import RETRIES, SavedQuery, Workgroup, sentences
from archive_pipeline.columns import PARTITION_COLUMNS, Column, Field
from archive_pipeline.errors import CatalogError
from archive_pipeline.manifest import Layout, Manifest, published
from archive_pipeline.months import Month
from archive_pipeline.objects import ArchiveBucket
from archive_pipeline.snapshot import SourceTable
from scaling.errors import UserError, run_command
from scaling.settings import ArchiveSettings, load

if TYPE_CHECKING:
    from mypy_boto3_glue import GlueClient

DATABASE = "audit"
MONTH_COLUMN = "archive_month"
PARQUET_INPUT = "org.apache.hadoop.hive.ql.io.parquet.MapredParquetInputFormat"
PARQUET_OUTPUT = "org.apache.hadoop.hive.ql.io.parquet.MapredParquetOutputFormat"
PARQUET_SERDE = "org.apache.hadoop.hive.ql.io.parquet.serde.ParquetHiveSerDe"
MAGIC = b"PAR1"
SMALLEST_PARQUET = 12
YEARS = "projection.year.range"
WRITES = 8
LOOKS_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Catalog:
    """What Athena must be told about the archive.

    Attributes:
        table: the source; the table in Athena has its name.
        location: ``s3://bucket/prefix/``.
        fields: of all months together, in the order in which they appeared.
        first_year: of the archive.
        last_year: of the archive.
        months: archived.
        rows: archived.
        database: of the table in Athena.
    """

    table: SourceTable
    location: str
    fields: tuple[Field, ...]
    first_year: int
    last_year: int
    months: int
    rows: int
    database: str = DATABASE

    @property
    def name(self) -> str:
        """The table's name in Athena."""
        return self.table.name.lower()

    @property
    def view(self) -> str:
        """Name of the view that has the month as one column."""
        return view_name(self.table)

    @property
    def properties(self) -> dict[str, str]:
        """The table's properties, which make the projection."""
        return {
            "classification": "parquet",
            "parquet.compression": "ZSTD",
            "projection.enabled": "true",
            "projection.year.type": "integer",
            YEARS: f"{self.first_year},{self.last_year}",
            "projection.month.type": "integer",
            "projection.month.range": "1,12",
            "projection.month.digits": "2",
            "storage.location.template": f"{self.location}year=${{year}}/month=${{month}}/",
        }

    @property
    def ddl(self) -> str:
        """Athena DDL: makes the database and the table, and extends the year range of a table made earlier."""
        name = f"`{self.database}`.`{self.name}`"
        columns = ",\n".join(f"  `{field.name}` {field.athena}" for field in self.fields)
        years = f"{self.first_year},{self.last_year}"
        return f"""CREATE DATABASE IF NOT EXISTS `{self.database}`;

CREATE EXTERNAL TABLE IF NOT EXISTS {name} (
{columns})
PARTITIONED BY (`year` int, `month` int)
STORED AS PARQUET LOCATION '{self.location}'
TBLPROPERTIES ('classification'='parquet','parquet.compression'='ZSTD',
 'projection.enabled'='true',
 'projection.year.type'='integer','projection.year.range'='{years}',
 'projection.month.type'='integer','projection.month.range'='1,12','projection.month.digits'='2',
 'storage.location.template'='{self.location}year=${{year}}/month=${{month}}/');

ALTER TABLE {name} SET TBLPROPERTIES ('projection.year.range'='{years}');
"""

    @property
    def view_ddl(self) -> str:
        """Athena DDL of the view.

        No view can derive the month from a condition on ``created_at``: Athena looks at partition keys only. The view
        spells the keys as one text, ``2025-03``, so that one condition reads a range of months across years.
        """
        return (
            f'CREATE OR REPLACE VIEW "{self.database}"."{self.view}" AS\n'
            f"SELECT *, format('%04d-%02d', year, month) AS {MONTH_COLUMN}\n"
            f'FROM "{self.database}"."{self.name}"'
        )

    @property
    def script(self) -> str:
        """Everything as one file, the statements apart by semicolons."""
        saved = "".join(
            f"\n-- {query.description}\n" + "\n".join(f"--   {line}" for line in query.sql.splitlines()) + "\n"
            for query in self.saved_queries
        )
        return f"{self.ddl}\n{self.view_ddl};\n{saved}"

    @property
    def saved_queries(self) -> tuple[SavedQuery, ...]:
        """The questions people ask an audit log, ready in Athena's console."""
        table, year = f'"{self.database}"."{self.name}"', self.last_year
        names = {field.name for field in self.fields}
        order = "created_at_us" if "created_at_us" in names else "created_at"
        found = [
            SavedQuery(
                f"{self.name}: rows of each tenant and month",
                "Rows of each tenant and month of a year; change the year.",
                f'SELECT tenant_id, year, month, count(*) AS "rows"\nFROM {table}\nWHERE year = {year}\n'
                "GROUP BY tenant_id, year, month\nORDER BY tenant_id, year, month",
            ),
            SavedQuery(
                f"{self.name}: a time range",
                "Rows between two instants; year and month must say the same, Athena does not derive them.",
                f"SELECT *\nFROM {table}\nWHERE year = {year} AND month BETWEEN 1 AND 2\n"
                f"  AND created_at >= TIMESTAMP '{year}-01-15 00:00:00'\n"
                f"  AND created_at < TIMESTAMP '{year}-02-01 00:00:00'\nORDER BY {order}\nLIMIT 1000",
            ),
        ]
        if "user_id" in names:
            found.append(
                SavedQuery(
                    f"{self.name}: the trail of one actor",
                    "Everything one user did in one tenant, in order; fill in both ids (?).",
                    f"SELECT *\nFROM {table}\nWHERE year = {year}\n  AND tenant_id = ?\n  AND user_id = ?\n"
                    f"ORDER BY {order}",
                )
            )
        return tuple(found)

    def table_input(self, found: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The table as Glue takes it.

        Args:
            found: the table as Glue has it; its years and the properties others gave it are kept.
        """
        properties = dict(found.get("Parameters", {})) if found else {}
        years = _years_of(properties)
        wanted = self
        if years is not None:
            wanted = replace(self, first_year=min(self.first_year, years[0]), last_year=max(self.last_year, years[1]))
        return {
            "Name": self.name,
            "Description": f"Archive of {self.table}, kept by archive_pipeline",
            "TableType": "EXTERNAL_TABLE",
            "Parameters": {**properties, "EXTERNAL": "TRUE", **wanted.properties},
            "PartitionKeys": [{"Name": name, "Type": "int"} for name in PARTITION_COLUMNS],
            "StorageDescriptor": {
                "Columns": [{"Name": field.name, "Type": field.athena} for field in self.fields],
                "Location": self.location,
                "InputFormat": PARQUET_INPUT,
                "OutputFormat": PARQUET_OUTPUT,
                "SerdeInfo": {"SerializationLibrary": PARQUET_SERDE, "Parameters": {"serialization.format": "1"}},
                "NumberOfBuckets": -1,
            },
        }


def view_name(table: SourceTable) -> str:
    """Name of the view that has the month as one column.

    Args:
        table: the source.
    """
    return f"{table.name.lower()}_by_month"


class Glue:
    """The table in the Glue data catalog.

    Args:
        client: boto3 client of Glue.
        database: of the table.
    """

    def __init__(self, client: "GlueClient", database: str) -> None:
        self._client = client
        self.database = database

    @classmethod
    def from_settings(cls, settings: ArchiveSettings) -> "Glue | None":
        """Make the configured catalog; None when no workgroup is configured.

        Args:
            settings: ARCHIVE_ATHENA_WORKGROUP and what goes with it.
        """
        if not settings.archive_athena_workgroup:
            return None
        client = boto3.Session().client("glue", region_name=settings.aws_region, config=RETRIES)
        return cls(client, settings.archive_athena_database)

    def table(self, name: str) -> Mapping[str, Any] | None:
        """The table as Glue has it; None when there is none.

        Args:
            name: of the table.

        Raises:
            CatalogError: Glue refuses.
        """
        with sentences(f"table {self.database}.{name}"):
            return self._table(name)

    def keep(self, catalog: Catalog) -> bool:
        """Create the database and the table, or correct what differs.

        Runs that do the same at once are no error: what another run has written meanwhile is read, and only what is
        still missing is written.

        Args:
            catalog: what it must be.

        Returns:
            Whether anything was written.

        Raises:
            CatalogError: Glue refuses, or other runs keep writing.
        """
        with sentences(f"table {self.database}.{catalog.name}"):
            self._keep_database()
            for attempt in stamina.retry_context(on=_is_concurrent, attempts=WRITES, timeout=None, wait_initial=0.05):
                with attempt:
                    return self._keep_table(catalog)
        raise AssertionError  # retry_context returns or raises

    def _keep_database(self) -> None:
        try:
            self._client.get_database(Name=self.database)
        except ClientError as error:
            if _code(error) != "EntityNotFoundException":
                raise
            try:
                self._client.create_database(
                    DatabaseInput={"Name": self.database, "Description": "Archives, kept by archive_pipeline"}
                )
            except ClientError as created:
                if _code(created) != "AlreadyExistsException":
                    raise

    def _keep_table(self, catalog: Catalog) -> bool:
        found = self._table(catalog.name)
        wanted = catalog.table_input(found)
        if found is None:
            self._client.create_table(DatabaseName=self.database, TableInput=wanted)  # type: ignore[arg-type]  # a dict
            return True
        if not _differs(found, wanted):
            return False
        # Glue refuses an update of a version that another run has replaced.
        version = {"VersionId": found["VersionId"]} if found.get("VersionId") else {}
        self._client.update_table(DatabaseName=self.database, TableInput=wanted, **version)  # type: ignore[arg-type]  # a dict
        return True

    def _table(self, name: str) -> Mapping[str, Any] | None:
        try:
            return self._client.get_table(DatabaseName=self.database, Name=name)["Table"]
        except ClientError as error:
            if _code(error) == "EntityNotFoundException":
                return None
            raise


def _is_concurrent(error: Exception) -> bool:
    return isinstance(error, ClientError) and _code(error) in (
        "AlreadyExistsException",
        "ConcurrentModificationException",
    )


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _differs(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return bool(_glue_differences(found, wanted))


def _glue_differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What of a table in Glue is not as wanted, in words."""
    different = []
    has, needs = _columns(found), _columns(wanted)
    for name, kind in needs.items():
        if name not in has:
            different.append(f"column {name} is missing")
        elif has[name] != kind:
            different.append(f"column {name} is {has[name]}, not {kind}")
    different += [f"column {name} is in no manifest" for name in has if name not in needs]
    if list(has) != list(needs) and not different:
        different.append("the columns are in another order")
    for key, value in wanted["Parameters"].items():
        if found.get("Parameters", {}).get(key) != value:
            different.append(f"property {key} is {found.get('Parameters', {}).get(key)!r}, not {value!r}")
    partitions = [(key["Name"], key["Type"]) for key in found.get("PartitionKeys", [])]
    if partitions != [(key["Name"], key["Type"]) for key in wanted["PartitionKeys"]]:
        different.append("the partition keys are not year and month")
    storage, desired = found.get("StorageDescriptor", {}), wanted["StorageDescriptor"]
    different += [
        f"{key} is {storage.get(key)}, not {desired[key]}"
        for key in ("Location", "InputFormat", "OutputFormat")
        if storage.get(key) != desired[key]
    ]
    if storage.get("SerdeInfo", {}).get("SerializationLibrary") != PARQUET_SERDE:
        different.append("it is not read as Parquet")
    return different


def _columns(table: Mapping[str, Any]) -> dict[str, str]:
    return {column["Name"]: column["Type"] for column in table.get("StorageDescriptor", {}).get("Columns", [])}


def _years_of(properties: Mapping[str, str]) -> tuple[int, int] | None:
    matched = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", properties.get(YEARS, ""))
    return (int(matched[1]), int(matched[2])) if matched else None


def catalog_of(
    manifests: Sequence[Manifest], table: SourceTable, location: str, *, database: str = DATABASE
) -> Catalog | None:
    """Derive the catalog; None while nothing is archived.

    A column that was added or dropped between two months reads as NULL where it is missing; a renamed one is two.

    Args:
        manifests: the newest of each month and shard, oldest month first.
        table: the source.
        location: ``s3://bucket/prefix/``.
        database: of the table in Athena.

    Raises:
        CatalogError: a column has different types in different months, which one table cannot declare.
    """
    if not manifests:
        return None
    fields: dict[str, tuple[Field, str]] = {}
    for manifest in manifests:
        _add(fields, manifest.columns, manifest.month.name, table)
    years = [manifest.month.year for manifest in manifests]
    return Catalog(
        table,
        location,
        tuple(field for field, _ in fields.values()),
        min(years),
        max(years),
        len({manifest.month for manifest in manifests}),
        sum(manifest.digest.rows for manifest in manifests),
        database,
    )


def _add(fields: dict[str, tuple[Field, str]], columns: Sequence[Column], month: str, table: SourceTable) -> None:
    for field in (field for column in columns for field in column.fields):
        known, since = fields.setdefault(field.name, (field, month))
        if known.athena != field.athena:
            raise CatalogError(
                f"column {field.name} of {table} is {known.athena} in month {since} but {field.athena} in month "
                f"{month}; one table cannot read both, so give the changed column another name"
            )


def versioned(columns: Sequence[Column], earlier: Iterable[Sequence[Column]]) -> tuple[Column, ...]:
    """Give a column whose type has changed since an earlier month a name of its own, ``severity_v2``.

    One table reads a name with one type only, so the changed column is a further one: months before the change have
    NULL there, months after it in the old one. The key columns never change their names.

    Args:
        columns: of the month to be archived.
        earlier: those of every month archived before.

    Returns:
        The columns, with the stored names under which no other type is known.
    """
    known: dict[str, str] = {}
    for before in earlier:
        for field in (field for column in before for field in column.fields):
            known.setdefault(field.name, field.athena)
    taken = {field.name for column in columns for field in column.fields} | set(known)

    def renamed(field: Field) -> Field:
        version, name = 1, field.name
        while known.get(name, field.athena) != field.athena or (name != field.name and name in taken - set(known)):
            version += 1
            name = f"{field.name}_v{version}"
        return replace(field, name=name)

    return tuple(
        replace(column, exact=renamed(column.exact), readable=column.readable and renamed(column.readable))
        for column in columns
    )


def current(
    bucket: ArchiveBucket, layout: Layout, *, first: str | None = None, last: str | None = None
) -> list[Manifest]:
    """The newest manifest of each month and shard, oldest month first.

    Args:
        bucket: of the archive.
        layout: where it lies.
        first: ``YYYY-MM``, none earlier is read.
        last: ``YYYY-MM``, none later is read.

    Raises:
        UserError: one is damaged, or the bucket cannot be read.
    """
    return [found.manifest for found in manifests.newest(published(bucket, layout, first=first, last=last))]


def prepare_catalog(
    bucket: ArchiveBucket,
    layout: Layout,
    table: SourceTable,
    month: Month,
    columns: Sequence[Column],
    glue: Glue | None,
) -> bool:
    """Make the table in Glue ready for a month that is about to be published; without Glue, nothing.

    Without it the month's rows would be in the bucket and Athena would answer as if they were not.

    Args:
        bucket: of the archive.
        layout: where it lies.
        table: the source.
        month: about to be published.
        columns: its columns.
        glue: the data catalog; None when none is configured.

    Returns:
        Whether anything was written.

    Raises:
        CatalogError: the month must not be published: its columns contradict another month's, or Glue refuses.
        UserError: a manifest is damaged, or the bucket cannot be read.
    """
    if glue is None:
        return False
    location = f"s3://{bucket.name}/{layout.data}"
    known = catalog_of(current(bucket, layout), table, location, database=glue.database)
    fields = {field.name: (field, "before") for field in known.fields} if known else {}
    _add(fields, columns, month.name, table)
    years = (month.year, *((known.first_year, known.last_year) if known else ()))
    return glue.keep(
        Catalog(
            table, location, tuple(field for field, _ in fields.values()), min(years), max(years), 0, 0, glue.database
        )
    )


def publish_catalog(
    bucket: ArchiveBucket, layout: Layout, table: SourceTable, glue: Glue | None = None
) -> Catalog | None:
    """Write the DDL beside the manifests and the table in Glue, where they are missing or no longer right.

    Months are archived concurrently. Whoever writes looks at the manifests once more afterwards, so the last writer
    has seen them all.

    Args:
        bucket: of the archive.
        layout: where it lies.
        table: the source.
        glue: the data catalog; None when none is configured.

    Returns:
        The catalog as written, None while nothing is archived.

    Raises:
        CatalogError: see `catalog_of`; or Glue refuses.
        UserError: a manifest is damaged, or S3 does not answer.
    """
    database = glue.database if glue else DATABASE
    while True:
        catalog = catalog_of(current(bucket, layout), table, f"s3://{bucket.name}/{layout.data}", database=database)
        if catalog is None or _script(bucket, layout) == catalog.script.encode():
            if catalog is not None and glue is not None:
                glue.keep(catalog)
            return catalog
        bucket.replace_bytes(layout.catalog, catalog.script.encode(), content_type="application/sql")


def apply_catalog(
    bucket: ArchiveBucket, layout: Layout, table: SourceTable, glue: Glue, workgroup: Workgroup
) -> Catalog | None:
    """Keep everything Athena needs: workgroup, database, table, view and saved queries, and the DDL as a file.

    Args:
        bucket: of the archive.
        layout: where it lies.
        table: the source.
        glue: the data catalog.
        workgroup: of Athena.

    Returns:
        The catalog as written, None while nothing is archived.

    Raises:
        CatalogError: see `publish_catalog`; or Athena refuses.
        UserError: a manifest is damaged, or S3 does not answer.
    """
    workgroup.keep()
    catalog = publish_catalog(bucket, layout, table, glue)
    if catalog is not None:
        workgroup.run(catalog.view_ddl)
        workgroup.save(catalog.saved_queries, database=catalog.database)
    return catalog


def _script(bucket: ArchiveBucket, layout: Layout) -> bytes | None:
    try:
        return bucket.read(layout.catalog)
    except FileNotFoundError:
        return None


def expand_projection(properties: Mapping[str, str]) -> Iterator[str]:
    """The locations Athena reads, computed as Athena does from a table's properties.

    https://docs.aws.amazon.com/athena/latest/ug/partition-projection-supported-types.html

    Args:
        properties: of the table; both keys projected as integers.

    Raises:
        CatalogError: a key has no projection, or the template lacks a key: Athena refuses such a table.
    """
    if properties.get("projection.enabled") != "true":
        raise CatalogError("the table's partitions are not projected, so Athena sees no month of it")
    template = properties.get("storage.location.template", "")
    values: list[list[str]] = []
    for key in PARTITION_COLUMNS:
        matched = re.fullmatch(r"(\d+),(\d+)", properties.get(f"projection.{key}.range", ""))
        if matched is None or properties.get(f"projection.{key}.type") != "integer" or f"${{{key}}}" not in template:
            raise CatalogError(f"key {key} of the table has no projection that Athena accepts")
        digits = int(properties.get(f"projection.{key}.digits", "1"))
        step = int(properties.get(f"projection.{key}.interval", "1"))
        values.append([f"{value:0{digits}}" for value in range(int(matched[1]), int(matched[2]) + 1, step)])
    for year in values[0]:
        for month in values[1]:
            yield template.replace("${year}", year).replace("${month}", month)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something Athena would read wrongly, or not at all.

    Attributes:
        subject: key, column or setting.
        sentence: what is wrong with it and what to do.
    """

    subject: str
    sentence: str


def check_catalog(
    bucket: ArchiveBucket,
    layout: Layout,
    table: SourceTable,
    glue: Glue | None = None,
    workgroup: Workgroup | None = None,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[Finding]:
    """Compare what Athena reads with what the manifests list.

    Args:
        bucket: of the archive.
        layout: where it lies.
        table: the source.
        glue: the data catalog; None compares with the DDL alone.
        workgroup: of Athena; None leaves it out.
        on_progress: told after each object how many of how many were looked at.

    Returns:
        What is wrong; nothing when Athena reads the archive as it is.

    Raises:
        CatalogError: see `catalog_of`; or AWS refuses.
        UserError: a manifest is damaged, or the bucket cannot be read.
    """
    held = current(bucket, layout)
    catalog = catalog_of(held, table, f"s3://{bucket.name}/{layout.data}", database=glue.database if glue else DATABASE)
    findings: list[Finding] = []
    properties: Mapping[str, str] | None = catalog.properties if catalog else None
    if catalog is not None and _script(bucket, layout) != catalog.script.encode():
        findings.append(
            Finding(layout.catalog, "is not the DDL of the manifests; run python -m archive_pipeline.catalog apply")
        )
    if catalog is not None and glue is not None:
        found = glue.table(catalog.name)
        subject = f"{glue.database}.{catalog.name}"
        if found is None:
            findings.append(Finding(subject, "is missing in Glue; run python -m archive_pipeline.catalog apply"))
        else:
            properties = found.get("Parameters", {})
            findings += [
                Finding(subject, f"{difference} in Glue; run python -m archive_pipeline.catalog apply")
                for difference in _glue_differences(found, catalog.table_input(found))
            ]
            years = _years_of(properties)
            if years is not None and (years[0] < catalog.first_year or years[1] > catalog.last_year):
                findings.append(
                    Finding(
                        subject,
                        f"projects the years {years[0]} to {years[1]}, but months are archived only of "
                        f"{catalog.first_year} to {catalog.last_year}; Athena lists empty months for every query, "
                        f"so set {YEARS} if no month of the others is about to be published",
                    )
                )
    if workgroup is not None:
        findings += [Finding(workgroup.name, sentence) for sentence in workgroup.differences()]
    return findings + _check_objects(bucket, layout, held, properties, on_progress)


def _check_objects(
    bucket: ArchiveBucket,
    layout: Layout,
    held: Sequence[Manifest],
    properties: Mapping[str, str] | None,
    on_progress: Callable[[int, int], None],
) -> list[Finding]:
    findings: list[Finding] = []
    projected: set[str] = set()
    if properties is not None:
        try:
            projected = {location.removeprefix(f"s3://{bucket.name}/") for location in expand_projection(properties)}
        except CatalogError as error:
            findings.append(Finding(layout.data, f"cannot be read by Athena: {error}"))
    listed = {part.key: part for manifest in held for part in manifest.parts}
    keys = list(bucket.keys(layout.data))
    findings += [
        Finding(missing, "is listed by a manifest but is not in the bucket; restore its version")
        for missing in sorted(set(listed) - set(keys))
    ]
    with ThreadPoolExecutor(LOOKS_AT_ONCE) as threads:
        damages = threads.map(lambda key: _damage(bucket, key), keys)
        for number, (key, damage) in enumerate(zip(keys, damages, strict=True), 1):
            on_progress(number, len(keys))
            prefix, _, name = key.rpartition("/")
            if damage is not None:
                findings.append(Finding(key, f"{damage}; every query of its month fails in Athena until it is removed"))
            if key not in listed:
                findings.append(
                    Finding(
                        key,
                        "is read by Athena but listed by no manifest; unless a run is publishing it right now, "
                        "remove it",
                    )
                )
            if name.startswith(("_", ".")):
                findings.append(Finding(key, "is skipped by Athena, which ignores names that begin so"))
            if properties is not None and f"{prefix}/" not in projected:
                findings.append(
                    Finding(
                        key,
                        "lies outside the projected months, so Athena answers as if it were not there; "
                        "run python -m archive_pipeline.catalog apply",
                    )
                )
    return findings


def _damage(bucket: ArchiveBucket, key: str) -> str | None:
    """Why an object is no Parquet file; its ends tell, the rest is what the archive verifies."""
    found = bucket.head(key)
    if found is None:
        return None
    if found.size == 0:
        return "is empty"
    if found.size < SMALLEST_PARQUET:
        return "is not Parquet"
    ends = bucket.read_range(key, 0, len(MAGIC)), bucket.read_range(key, found.size - len(MAGIC), len(MAGIC))
    return None if ends == (MAGIC, MAGIC) else "is not Parquet"


def main(arguments: Iterable[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes them from the process.

    Returns:
        The exit code: 1 when `check` finds something.

    Raises:
        UserError: a setting is missing, or AWS refuses.
    """
    parser = argparse.ArgumentParser(
        prog="python -m archive_pipeline.catalog",
        description="The archive as a table of Athena, derived from the manifests.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ddl", help="print the DDL")
    commands.add_parser("apply", help="keep the file catalog.sql and, in Glue and Athena, whatever is configured")
    commands.add_parser("check", help="compare what Athena reads with what the manifests list; exit 1 on findings")
    command = parser.parse_args(list(arguments) if arguments is not None else None).command

    settings = load(ArchiveSettings)
    bucket, layout = ArchiveBucket.from_settings(settings), Layout(settings.archive_prefix)
    table = SourceTable.parse(settings.archive_table)
    glue, workgroup = Glue.from_settings(settings), Workgroup.from_settings(settings)
    nothing = UserError(f"no month of {table} is archived in s3://{bucket.name}/{layout.data}; archive one first")
    match command:
        case "ddl":
            catalog = catalog_of(
                current(bucket, layout),
                table,
                f"s3://{bucket.name}/{layout.data}",
                database=settings.archive_athena_database,
            )
            if catalog is None:
                raise nothing
            print(catalog.script, end="")
        case "apply":
            if glue is None or workgroup is None:
                catalog = publish_catalog(bucket, layout, table)
                where = f"s3://{bucket.name}/{layout.catalog}; set ARCHIVE_ATHENA_WORKGROUP to keep it in Glue too"
            else:
                catalog = apply_catalog(bucket, layout, table, glue, workgroup)
                where = f"s3://{bucket.name}/{layout.catalog} and {glue.database}.{table.name.lower()} in Glue"
            if catalog is None:
                raise nothing
            print(f"{catalog.months} months of {catalog.first_year} to {catalog.last_year}: {where}")
        case _:
            return _print_check(bucket, layout, table, glue, workgroup)
    return 0


def _print_check(
    bucket: ArchiveBucket, layout: Layout, table: SourceTable, glue: Glue | None, workgroup: Workgroup | None
) -> int:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("objects", total=None)
        findings = check_catalog(
            bucket,
            layout,
            table,
            glue,
            workgroup,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    for finding in findings:
        print(f"{finding.subject} {finding.sentence}")
    if not findings:
        print(f"Athena reads s3://{bucket.name}/{layout.data} as the manifests list it")
    return 1 if findings else 0


if __name__ == "__main__":
    run_command(main)
