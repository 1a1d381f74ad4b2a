"""The assets: a month of audit logs on S3, and the table Athena sees.

Belongs here: what the UI shows of the assets, and the calls into the domain. Does not: how a month is archived.
https://docs.dagster.io/guides/build/assets
"""

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import dagster as dg

from archive_pipeline import checks
from archive_pipeline.archive import MonthReport, Step, archive_month
from archive_pipeline.catalog import publish_catalog
from archive_pipeline.columns import Column, Field
from archive_pipeline.errors import VerificationError
from archive_pipeline.months import Month
from archive_pipeline.resources import ArchiveResource
from scaling.errors import UserError
from scaling.resources import failing_with_a_sentence

GROUP = "audit_logs"
OWNERS = ["team:platform"]

# List price of S3 Standard, first 50 TB, us-east-1: https://aws.amazon.com/s3/pricing/
USD_PER_GB_MONTH = 0.023

PARTS_SHOWN = 200
SECONDS_OF_SILENCE = 1.0

# A run is one process, of 3 CPU seconds before it does anything; a year of months shares them. Bounded, so that a
# backfill of many years still runs several at a time (`dagster.yaml`).
MONTHS_PER_RUN = 12

# Known to be beta in dagster 1.13, and pinned; the warning would show in every process that loads the definitions.
warnings.filterwarnings("ignore", message="Parameter `backfill_policy`", category=dg.BetaWarning)

Metadata = dg.MetadataValue[Any] | dg.TableSchema | str | int | float
MonthEvent = dg.AssetCheckEvaluation | dg.AssetMaterialization | dg.Output[None] | dg.MaterializeResult[None]

AUDIT_LOGS = dg.AssetSpec(
    "audit_logs",
    description="The SaaS's table of who did what in which tenant. The SaaS owns and appends to it; the archive only "
    "reads it, in one read-only snapshot for each month.",
    group_name=GROUP,
    owners=OWNERS,
    kinds={"postgres", "table"},
    metadata={"dagster/table_name": "public.audit_logs"},
)

ATHENA_TABLE = dg.AssetSpec(
    "audit_logs_in_athena",
    description="The archive as analysts see it: table `audit.audit_logs` in Athena over the same objects. Made with "
    "the DDL of `audit_log_catalog`; new months appear by partition projection. Filter by `year` and `month`.",
    group_name=GROUP,
    owners=OWNERS,
    kinds={"athena", "s3"},
    deps=["audit_log_catalog"],
    metadata={"dagster/table_name": "audit.audit_logs"},
)


def archive_assets(months: dg.MonthlyPartitionsDefinition) -> list[dg.AssetsDefinition]:
    """Make the assets.

    Args:
        months: the partitions.
    """

    @dg.asset(
        partitions_def=months,
        backfill_policy=dg.BackfillPolicy.multi_run(max_partitions_per_run=MONTHS_PER_RUN),
        group_name=GROUP,
        owners=OWNERS,
        kinds={"postgres", "parquet", "s3"},
        tags={"domain": "audit"},
        deps=[AUDIT_LOGS],
        check_specs=checks.of_months(months),
        description="""One closed month of `audit_logs` as Parquet on S3, a row for a row.

**Cadence:** every month, a few hours after it ends. Any past month can be materialized or backfilled; an archived one
is verified again, and rows that came late are added as a further part.

**How:** one snapshot, streamed to Parquet; count and digest of every column computed by Postgres must equal what
DuckDB computes over the parts, before they are uploaded and again after they are read back. Then the manifest is
written and signed. Nothing is deleted from Postgres, nothing in the bucket is overwritten.

**When it fails:** nothing of that month is published, the other months of the run are archived all the same, and the
run ends red with a sentence for each failed month. It says what to do; run the month again afterwards.""",
    )
    def audit_log_archive(context: dg.AssetExecutionContext, archive: ArchiveResource) -> Iterator[MonthEvent]:
        done: dict[Month, Mapping[str, Metadata]] = {}
        failed: dict[Month, Exception] = {}
        with failing_with_a_sentence():
            target = archive.protected_target()
            with archive.databases() as router:
                for key in context.partition_keys:
                    month = Month.parse(key, months.timezone)
                    watch = _Stopwatch(context, month)
                    try:
                        reports = [archive_month(shard, target, month, on_step=watch.step) for shard in router.shards()]
                        judged = list(checks.evaluations(month, reports))
                        yield from judged
                        if blockers := checks.blockers(judged):
                            raise UserError(f"month {month.name} is archived, but {blockers}")
                        done[month] = {**month_metadata(reports), **watch.seconds}
                    except Exception as error:  # noqa: BLE001 - whatever befalls a month, the others are archived
                        if isinstance(error, VerificationError):
                            yield checks.failed(month, error)
                        failed[month] = error
                        context.log.error("month %s: %s", month.name, _reason(error))
        if failed:
            # Without an output Dagster writes no materialization, so the run writes those of the good months itself.
            for month, metadata in done.items():
                yield dg.AssetMaterialization(checks.ARCHIVE, partition=month.partition_key, metadata=dict(metadata))
            raise _failure(failed, of=len(context.partition_keys))
        for month, metadata in done.items():
            context.add_asset_metadata(metadata, checks.ARCHIVE, month.partition_key)
        for spec in checks.of_months(months):
            yield dg.Output(None, spec.get_python_identifier())
        yield dg.MaterializeResult()

    @dg.asset(
        deps=[audit_log_archive],
        group_name=GROUP,
        owners=OWNERS,
        kinds={"athena", "s3"},
        tags={"domain": "audit"},
        description="""The archive as one table of Athena: DDL over every archived month, derived from the manifests.

Written beside the manifests as `catalog.sql` whenever a month adds a column or a year. Run it once in Athena; run its
last statement again when a year is added, or its months read as empty.

**When it fails:** a column changed its type between two months; the sentence names it.""",
    )
    def audit_log_catalog(archive: ArchiveResource) -> dg.MaterializeResult[None]:
        with failing_with_a_sentence():
            target = archive.target()
            catalog = publish_catalog(target.bucket, target.layout, target.table)
            if catalog is None:
                raise UserError("no month is archived yet; materialize audit_log_archive first")
            return dg.MaterializeResult(
                metadata={
                    "ddl": dg.MetadataValue.md(f"```sql\n{catalog.ddl}```"),
                    "months": catalog.months,
                    "dagster/row_count": catalog.rows,
                    "dagster/uri": f"s3://{target.bucket.name}/{target.layout.catalog}",
                    "dagster/column_schema": _schema(catalog.fields),
                    "years": f"{catalog.first_year}-{catalog.last_year}",
                }
            )

    return [audit_log_archive, audit_log_catalog]


def month_metadata(reports: Sequence[MonthReport]) -> Mapping[str, Metadata]:
    """What the UI shows and plots of a month.

    Args:
        reports: one for each database.
    """
    rows = sum(report.manifest.digest.rows for report in reports)
    size = sum(report.manifest.size for report in reports)
    seconds = sum(report.seconds for report in reports)
    parts = [part for report in reports for part in report.manifest.parts]
    estimates = [report.postgres_bytes for report in reports if report.postgres_bytes is not None]
    metadata: dict[str, Metadata] = {
        "outcome": ", ".join(sorted({report.outcome for report in reports})),
        "dagster/partition_row_count": rows,
        "dagster/uri": f"s3://{reports[0].bucket}/{reports[0].prefix}",
        "dagster/column_schema": _schema(
            [field for column in reports[0].manifest.columns for field in column.fields], reports[0].manifest.columns
        ),
        "rows_archived": rows,
        "rows_verified": sum(report.stored.rows for report in reports),
        "late_rows": sum(report.late_rows for report in reports),
        "parts": len(parts),
        "parquet_bytes": size,
        "storage_usd_per_month": size / 1e9 * USD_PER_GB_MONTH,
        "duration_seconds": seconds,
        "rows_per_second": rows / seconds if seconds else 0.0,
        "manifest": dg.MetadataValue.path(", ".join(f"s3://{r.bucket}/{r.found.key}" for r in reports)),
        "manifest_sha256": ", ".join(report.found.sha256 for report in reports),
        "parts_table": dg.MetadataValue.table(
            [
                dg.TableRecord(
                    {
                        "key": part.key.rsplit("/", 1)[-1],
                        "rows": part.digest.rows,
                        "bytes": part.size,
                        "sha256": part.sha256,
                    }
                )
                for part in parts[:PARTS_SHOWN]
            ],
            schema=dg.TableSchema(
                [
                    dg.TableColumn("key", "string"),
                    dg.TableColumn("rows", "int"),
                    dg.TableColumn("bytes", "int"),
                    dg.TableColumn("sha256", "string"),
                ]
            ),
        ),
    }
    if estimates:
        metadata["postgres_bytes_estimate"] = sum(estimates)
        metadata["compression_ratio"] = sum(estimates) / size if size else 0.0
    return metadata


class _Stopwatch:
    """How long each step of a month took; tells the run's log of long ones, where a line costs 9 ms."""

    def __init__(self, context: dg.AssetExecutionContext, month: Month) -> None:
        self.seconds: dict[str, float] = {}
        self._context = context
        self._month = month
        self._since = self._said = time.monotonic()

    def step(self, step: Step) -> None:
        """Take the time since the step before."""
        now = time.monotonic()
        name = f"seconds_{step.name.lower()}"
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now
        if now - self._said > SECONDS_OF_SILENCE:
            self._said = now
            self._context.log.info("%s: %s", self._month.name, step)


def _failure(failed: Mapping[Month, Exception], *, of: int) -> dg.Failure:
    reasons = {month: _reason(error) for month, error in failed.items()}
    if of == 1:
        [description] = reasons.values()
    else:
        lines = "\n".join(f"{month.name}: {reason}" for month, reason in reasons.items())
        description = f"{len(failed)} of {of} months failed, the others are archived:\n{lines}"
    failure = dg.Failure(description, metadata={"months_failed": len(failed)}, allow_retries=False)
    # A sentence stands for itself; what nobody foresaw keeps its stack trace.
    failure.__cause__ = next((error for error in failed.values() if not isinstance(error, UserError)), None)
    return failure


def _reason(error: Exception) -> str:
    return (
        str(error)
        if isinstance(error, UserError)
        else f"{type(error).__name__}, which nobody foresaw; the log has its trace"
    )


def _schema(fields: Sequence[Field], columns: Sequence[Column] = ()) -> dg.TableSchema:
    origins = {field.name: _origin(column, field) for column in columns for field in column.fields}
    return dg.TableSchema(
        [dg.TableColumn(field.name, field.athena, description=origins.get(field.name)) for field in fields]
    )


def _origin(column: Column, field: Field) -> str:
    if field is column.exact:
        return f"{column.source} ({column.postgres_type})"
    return f"{column.source} ({column.postgres_type}), rounded down for reading; {column.exact.name} is exact"
