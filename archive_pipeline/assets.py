"""The assets: the table's partitions, its months on S3, what Athena sees of them, the chain that proves them.

Belongs here: what the UI says of the assets, and the calls into the domain. Does not: how anything of it is done, or
which numbers are shown (`archive_pipeline.metadata`). https://docs.dagster.io/guides/build/assets
"""

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import dagster as dg
from pydantic import Field

from archive_pipeline import checks, metadata, turns
from archive_pipeline.archive import MonthReport, Step, Target, archive_month
from archive_pipeline.athena import Workgroup
from archive_pipeline.catalog import Glue, apply_catalog, check_catalog, publish_catalog
from archive_pipeline.checks import PartitionsState
from archive_pipeline.conversion import conversion_state
from archive_pipeline.errors import VerificationError
from archive_pipeline.evidence import audit_shard
from archive_pipeline.metadata import Metadata
from archive_pipeline.months import Month
from archive_pipeline.premade_months import findings, months_left, partitions_of, premake
from archive_pipeline.prunable import Policy
from archive_pipeline.prune import Candidate, Outcome, Pruned, examine
from archive_pipeline.prune import run as prune
from archive_pipeline.query import ask
from archive_pipeline.resources import ArchiveResource
from archive_pipeline.snapshot import SourceTable
from scaling.databases import Shard
from scaling.errors import UserError
from scaling.resources import failing_with_a_sentence
from scaling.settings import ArchiveSettings, ArchiveSourceSettings, load

GROUP = "audit_logs"
OWNERS = ["team:platform"]
TAGS = {"domain": "audit"}

SECONDS_OF_SILENCE = 1.0

# A run is one process, of 3 CPU seconds before it does anything; a year of months shares them. Bounded, so that a
# backfill of many years still runs several at a time (`dagster.yaml`).
MONTHS_PER_RUN = 12

POOL = "audit_logs_changes"
"""One at a time of everything that changes the table: premaking, converting, pruning, restoring, erasing."""

# Known to be beta in dagster 1.13, and pinned; the warning would show in every process that loads the definitions.
warnings.filterwarnings("ignore", message="Parameter `backfill_policy`", category=dg.BetaWarning)

MonthEvent = dg.AssetCheckEvaluation | dg.AssetMaterialization | dg.Output[None] | dg.MaterializeResult[None]

AUDIT_LOGS = dg.AssetSpec(
    "audit_logs",
    description="The SaaS's table of who did what in which tenant. The SaaS owns and appends to it; the archive reads "
    "it, in one read-only snapshot for each month.",
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


class AuditConfig(dg.Config):
    """How thoroughly the chain is audited."""

    deep: bool = Field(
        default=False,
        description="Also read every archived row, and compute its digest and its Merkle root again; takes as long as "
        "downloading the archive.",
    )


class QuestionConfig(dg.Config):
    """What the archive is asked."""

    sql: str = Field(
        default="SELECT action, count(*) AS rows FROM audit_logs GROUP BY action ORDER BY rows DESC LIMIT 20",
        description="One SELECT over the view `audit_logs`. The first 200 rows of the answer are stored in Dagster's "
        "event log: ask for sums, not for personal data.",
    )
    first: str = Field(default="", description="YYYY-MM; nothing earlier is read. Empty: from the first month.")
    last: str = Field(default="", description="YYYY-MM; nothing later is read. Empty: to the last month.")
    tenant: str = Field(default="", description="Only this tenant's rows are read. Empty: every tenant's.")
    engine: Literal["configured", "duckdb", "athena"] = Field(
        default="configured", description="Athena where ARCHIVE_ATHENA_WORKGROUP is set, and DuckDB elsewhere."
    )


@dg.asset(
    deps=[AUDIT_LOGS],
    group_name=GROUP,
    owners=OWNERS,
    kinds={"postgres"},
    tags=TAGS,
    check_specs=checks.of_partitions(),
    pool=POOL,
)
def audit_logs_partitions(archive: ArchiveResource) -> Iterator[dg.MaterializeResult[None]]:
    """The monthly partitions of `audit_logs`, and empty ones for the months to come.

    **Cadence:** every day. Months are made `ARCHIVE_PREMADE_MONTHS` ahead, because Postgres refuses rows for which
    there is no partition. Readers and writers of the table do not notice.

    **While the table is plain** nothing is made and everything is green: it is archived as it is. The job
    `convert_audit_logs` shows how it would be converted, online, and does so.

    **When it fails:** a check is red before inserts fail, and says what to do.
    """
    with failing_with_a_sentence():
        settings = load(ArchiveSourceSettings)
        table = SourceTable.parse(settings.archive_table)
        with archive.databases() as router:
            states = [_partitions(shard, table, settings) for shard in router.shards()]
        yield dg.MaterializeResult(
            metadata=metadata.of_partitions(states, settings.archive_time_zone),
            check_results=list(checks.partitions(states, settings.archive_premade_months)),
        )


@dg.asset(
    deps=["audit_log_archive"],
    group_name=GROUP,
    owners=OWNERS,
    kinds={"athena", "s3"},
    tags=TAGS,
    check_specs=checks.of_catalog(),
)
def audit_log_catalog(archive: ArchiveResource) -> Iterator[dg.MaterializeResult[None]]:
    """The archive as one table of Athena: DDL over every archived month, derived from the manifests.

    Written beside the manifests as `catalog.sql` whenever a month adds a column or a year. With
    `ARCHIVE_ATHENA_WORKGROUP` the workgroup, the table and its view in Glue and the saved queries are kept too;
    without, run the file in Athena.

    **When it fails:** a column changed its type between two months, or AWS refuses; the sentence says which.
    """
    with failing_with_a_sentence():
        settings, target = load(ArchiveSettings), archive.target()
        glue, workgroup = Glue.from_settings(settings), Workgroup.from_settings(settings)
        if glue is not None and workgroup is not None:
            catalog = apply_catalog(target.bucket, target.layout, target.table, glue, workgroup)
        else:
            catalog = publish_catalog(target.bucket, target.layout, target.table, target.glue)
        if catalog is None:
            raise UserError("no month is archived yet; materialize audit_log_archive first")
        found = check_catalog(target.bucket, target.layout, target.table, glue, workgroup)
        yield dg.MaterializeResult(
            metadata=metadata.of_catalog(catalog, f"s3://{target.bucket.name}/{target.layout.catalog}"),
            check_results=list(checks.catalog(found)),
        )


@dg.asset(
    deps=["audit_log_archive"],
    group_name=GROUP,
    owners=OWNERS,
    kinds={"s3", "postgres"},
    tags=TAGS,
    check_specs=checks.of_chain(),
)
def audit_log_chain(config: AuditConfig, archive: ArchiveResource) -> Iterator[dg.MaterializeResult[None]]:
    """The chain of signed links over every manifest, walked from the end that Postgres pins to the first link.

    **Cadence:** every day. Each link, manifest and object is compared with what was published: nothing may be altered,
    missing, hidden, moved, replaced or added.

    **Keep the head:** the metadata `head` names the newest link by number and SHA-256. A copy of it outside the bucket
    and the database proves what the archive held, whoever changes both.

    **When it fails:** the check lists what was found, month by month, and how to get the right bytes back.
    """
    with failing_with_a_sentence():
        target = archive.target()
        with archive.databases() as router:
            reports = [
                audit_shard(shard, target.bucket, target.layout, target.table, deep=config.deep)
                for shard in router.shards()
            ]
        yield dg.MaterializeResult(metadata=metadata.of_chain(reports), check_results=list(checks.chain(reports)))


@dg.asset(deps=[audit_log_catalog], group_name=GROUP, owners=OWNERS, kinds={"duckdb", "athena"}, tags=TAGS)
def audit_log_answer(config: QuestionConfig) -> dg.MaterializeResult[None]:
    """What the archive answered to the last question, with the bytes it read and what that costs.

    **Ask:** Materialize with config, and write a SELECT over `audit_logs`. Months and tenants that the question leaves
    out are not read.

    **Not for personal data:** the first 200 rows of the answer are stored in Dagster's event log. For more,
    `python -m archive_pipeline.query` brings it to your terminal or a file.

    **When it fails:** the sentence says what is wrong with the SELECT.
    """
    with failing_with_a_sentence():
        answer = ask(
            config.sql,
            first=config.first or None,
            last=config.last or None,
            tenant=config.tenant or None,
            engine=None if config.engine == "configured" else config.engine,
        )
        return dg.MaterializeResult(metadata=metadata.of_answer(answer))


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
        tags=TAGS,
        deps=[AUDIT_LOGS],
        check_specs=checks.of_months(months),
    )
    def audit_log_archive(context: dg.AssetExecutionContext, archive: ArchiveResource) -> Iterator[MonthEvent]:
        """One closed month of `audit_logs` as Parquet on S3, a row for a row.

        **Cadence:** every month, a few hours after it ends. Any past month can be materialized or backfilled; an
        archived one is verified again, and rows that came late are added as a further part.

        **How:** one snapshot, streamed to Parquet; count and digest of every column computed by Postgres must equal
        what DuckDB computes over the parts, and every byte is read back after the upload. Then the manifest is written
        and signed. Nothing is deleted from Postgres, nothing in the bucket is overwritten.

        **When it fails:** nothing of that month is published, the other months of the run are archived all the same,
        and the run ends red with a sentence for each failed month. It says what to do; run the month again afterwards.
        """
        done: dict[Month, Mapping[str, Metadata]] = {}
        failed: dict[Month, Exception] = {}
        found: dict[Month, list[MonthReport]] = {}
        with failing_with_a_sentence():
            target = archive.protected_target()
            with archive.databases() as router:
                for key in context.partition_keys:
                    month = Month.parse(key, months.timezone)
                    watch = _Stopwatch(context, month)
                    try:
                        found[month] = [_archive(shard, target, month, watch) for shard in router.shards()]
                        if blockers := checks.blockers(list(checks.evaluations(month, found[month]))):
                            raise UserError(f"month {month.name} is archived, but {blockers}")
                        done[month] = {**metadata.of_month(found[month]), **watch.seconds}
                    except Exception as error:  # noqa: BLE001 - whatever befalls a month, the others are archived
                        failed[month] = error
                        context.log.error("month %s: %s", month.name, _reason(error))
        yield from _materializations(context, done, failed)
        # A verdict is of a materialization, so the months have theirs by now.
        for month, reports in found.items():
            yield from checks.evaluations(month, reports, _newest(context, month))
        for month, reason in failed.items():
            if isinstance(reason, VerificationError):
                yield checks.failed(month, reason, _newest(context, month))
        if failed:
            raise _failure(failed, of=len(context.partition_keys), others="the others are archived")
        for spec in checks.of_months(months):
            yield dg.Output(None, spec.get_python_identifier())

    @dg.asset(
        partitions_def=months,
        backfill_policy=dg.BackfillPolicy.multi_run(max_partitions_per_run=MONTHS_PER_RUN),
        group_name=GROUP,
        owners=OWNERS,
        kinds={"postgres"},
        tags=TAGS,
        deps=[audit_log_archive, audit_logs_partitions],
        pool=POOL,
    )
    def audit_log_pruned(context: dg.AssetExecutionContext, archive: ArchiveResource) -> Iterator[MonthEvent]:
        """One archived month on its way out of Postgres.

        **What a materialization does** is set by `ARCHIVE_PRUNE`. `off`: nothing. `propose`: the month's partition is
        recorded as a proposal, and dropped once somebody approved it (job `approve_prune`). `auto`: it is dropped when
        it may go.

        **When a partition may go:** every month in it is archived, sound in the bucket and older than
        `ARCHIVE_RETENTION_MONTHS`, and no legal hold covers it. Rows and objects are compared once more under the lock
        in which it is dropped; rows that came late are archived first. An empty partition stays in its place, for
        further late rows.

        **When it fails:** the rows are whole in Postgres, and the sentence says what somebody has to look at.
        """
        done: dict[Month, Mapping[str, Metadata]] = {}
        failed: dict[Month, Exception] = {}
        with failing_with_a_sentence():
            policy = Policy.from_settings(load(ArchiveSourceSettings))
            chosen = [Month.parse(key, months.timezone) for key in context.partition_keys]
            if policy.mode == "off":
                done = {month: {"outcome": "off", "reason": "ARCHIVE_PRUNE is off"} for month in chosen}
            else:
                target = archive.protected_target()
                with archive.databases() as router:
                    for month in chosen:
                        try:
                            done[month] = _prune(router.shards(), target, policy, month)
                        except Exception as error:  # noqa: BLE001 - whatever befalls a month, the others are pruned
                            failed[month] = error
                            context.log.error("month %s: %s", month.name, _reason(error))
        yield from _materializations(context, done, failed)
        if failed:
            raise _failure(failed, of=len(chosen), others="the others are done")

    return [
        audit_logs_partitions,
        audit_log_archive,
        audit_log_catalog,
        audit_log_chain,
        audit_log_pruned,
        audit_log_answer,
    ]


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


def _archive(shard: Shard, target: Target, month: Month, watch: _Stopwatch) -> MonthReport:
    with turns.exporting(shard, target.table):
        return archive_month(shard, target, month, on_step=watch.step)


def _prune(shards: Sequence[Shard], target: Target, policy: Policy, month: Month) -> dict[str, Metadata]:
    pruned: list[Pruned] = []
    candidates: list[Candidate] = []
    for shard in shards:
        with turns.pruning(shard, target.table):
            pruned += prune(shard, target, policy, month=month)
        candidates += [each for each in examine(shard, target, policy) if each.partition.overlaps(month)]
    if unwell := [each for each in pruned if each.outcome is not Outcome.DROPPED]:
        raise UserError("; ".join(f"{each.partition} was {each.outcome}: {each.reason}" for each in unwell))
    return metadata.of_pruned(month, pruned, candidates)


def _partitions(shard: Shard, table: SourceTable, settings: ArchiveSourceSettings) -> PartitionsState:
    zone, ahead = settings.archive_time_zone, settings.archive_premade_months
    state = conversion_state(shard, table)
    if not state.partitioned:
        return PartitionsState(plain=True, conversion=state.finding or "")
    with shard.owner() as owner:
        made = premake(owner, table, settings.archive_partition_schema, zone, ahead)
    with shard.transaction() as connection:
        return PartitionsState(
            plain=False,
            conversion=state.finding or "",
            made=tuple(made),
            partitions=partitions_of(connection, table),
            months_left=months_left(connection, table, zone=zone),
            findings=tuple(findings(connection, table, zone=zone, ahead=ahead)),
        )


def _materializations(
    context: dg.AssetExecutionContext, done: Mapping[Month, Mapping[str, Metadata]], failed: Mapping[Month, Exception]
) -> Iterator[dg.AssetMaterialization | dg.MaterializeResult[None]]:
    """Give each month a materialization with its own numbers."""
    if failed:
        # With the step's output Dagster would write one of every month of the run, also of those that failed.
        for month, shown in done.items():
            yield dg.AssetMaterialization(context.asset_key, partition=month.partition_key, metadata=dict(shown))
        return
    for month, shown in done.items():
        context.add_asset_metadata(shown, context.asset_key, month.partition_key)
    yield dg.MaterializeResult()


def _newest(context: dg.AssetExecutionContext, month: Month) -> checks.Materialization | None:
    wanted = dg.AssetRecordsFilter(asset_key=context.asset_key, asset_partitions=[month.partition_key])
    for record in context.instance.fetch_materializations(wanted, limit=1).records:
        return checks.Materialization(record.storage_id, record.run_id, record.timestamp)
    return None


def _failure(failed: Mapping[Month, Exception], *, of: int, others: str) -> dg.Failure:
    reasons = {month: _reason(error) for month, error in failed.items()}
    if of == 1:
        [description] = reasons.values()
    else:
        lines = "\n".join(f"{month.name}: {reason}" for month, reason in reasons.items())
        description = f"{len(failed)} of {of} months failed, {others}:\n{lines}"
    failure = dg.Failure(description, metadata={"months_failed": len(failed)}, allow_retries=False)
    # A sentence stands for itself; what nobody foresaw keeps its stack trace.
    failure.__cause__ = next((error for error in failed.values() if not isinstance(error, UserError)), None)
    return failure


def _reason(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}, which nobody foresaw; the log has its trace"
