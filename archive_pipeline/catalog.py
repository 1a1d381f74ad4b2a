"""The archive as a table of Athena: its DDL, derived from the manifests.

Belongs here: the DDL text and keeping the copy beside the manifests current. Does not: talking to Athena or Glue.

Partition projection stands in for registered partitions, so a new month needs no call to Glue. Its year range must
be tight and yet cover every archived year: a year outside it reads as zero rows without an error
(https://docs.aws.amazon.com/athena/latest/ug/partition-projection-supported-types.html).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from archive_pipeline.columns import Field
from archive_pipeline.errors import CatalogError
from archive_pipeline.manifest import Layout, Manifest, published
from archive_pipeline.objects import ArchiveBucket
from archive_pipeline.snapshot import SourceTable

DATABASE = "audit"


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
    """

    table: SourceTable
    location: str
    fields: tuple[Field, ...]
    first_year: int
    last_year: int
    months: int
    rows: int

    @property
    def ddl(self) -> str:
        """Athena DDL: makes the database and the table, and extends the year range of a table made earlier."""
        name = f"`{DATABASE}`.`{self.table.name.lower()}`"
        columns = ",\n".join(f"  `{field.name}` {field.athena}" for field in self.fields)
        years = f"{self.first_year},{self.last_year}"
        return f"""CREATE DATABASE IF NOT EXISTS `{DATABASE}`;

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


def catalog_of(manifests: Sequence[Manifest], table: SourceTable, location: str) -> Catalog | None:
    """Derive the catalog; None while nothing is archived.

    Args:
        manifests: all published ones, oldest month first.
        table: the source.
        location: ``s3://bucket/prefix/``.

    Raises:
        CatalogError: a column has different types in different months, which one table cannot declare.
    """
    if not manifests:
        return None
    fields: dict[str, tuple[Field, str]] = {}
    for manifest in manifests:
        for field in (field for column in manifest.columns for field in column.fields):
            known, since = fields.setdefault(field.name, (field, manifest.month.name))
            if known.athena != field.athena:
                raise CatalogError(
                    f"column {field.name} of {table} is {known.athena} in month {since} but {field.athena} in month "
                    f"{manifest.month.name}; one table cannot read both, so give the changed column another name"
                )
    years = [manifest.month.year for manifest in manifests]
    return Catalog(
        table,
        location,
        tuple(field for field, _ in fields.values()),
        min(years),
        max(years),
        len({manifest.month for manifest in manifests}),
        sum(manifest.digest.rows for manifest in manifests),
    )


def publish_catalog(bucket: ArchiveBucket, layout: Layout, table: SourceTable) -> Catalog | None:
    """Write the DDL beside the manifests, where it is missing or no longer right.

    Months are archived concurrently. Whoever writes looks at the manifests once more afterwards, so the last writer
    has seen them all.

    Args:
        bucket: of the archive.
        layout: where it lies.
        table: the source.

    Returns:
        The catalog as written, None while nothing is archived.

    Raises:
        CatalogError: see `catalog_of`.
        UserError: a manifest is damaged, or S3 does not answer.
    """
    while True:
        manifests = [found.manifest for found in published(bucket, layout)]
        catalog = catalog_of(manifests, table, f"s3://{bucket.name}/{layout.data}")
        if catalog is None or _current(bucket, layout) == catalog.ddl.encode():
            return catalog
        bucket.replace_bytes(layout.catalog, catalog.ddl.encode(), content_type="application/sql")


def _current(bucket: ArchiveBucket, layout: Layout) -> bytes | None:
    try:
        return bucket.read(layout.catalog)
    except FileNotFoundError:
        return None
