"""Jobs: what one click or one schedule tick runs.

Belongs here: selections, the configuration of manual jobs, and the calls into the domain. Does not: when they run
(`archive_pipeline.schedules`), or how anything is done. https://docs.dagster.io/guides/build/jobs

Whatever changes the table or the archive by hand is a dry run unless it is told otherwise: it shows what it would do
and writes nothing anywhere.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg
from pydantic import Field

from archive_pipeline import capabilities, conversion, metadata, turns
from archive_pipeline.assets import POOL
from archive_pipeline.capabilities import Acted, Held
from archive_pipeline.checks import ARCHIVE, PARTITIONS, PRUNED
from archive_pipeline.conversion import Conversion
from archive_pipeline.dagster_backfills import ask_for_archive
from archive_pipeline.erase import Erasure, erase
from archive_pipeline.metadata import Metadata
from archive_pipeline.months import MONTH, Month
from archive_pipeline.prunable import Policy
from archive_pipeline.prune import Candidate, Outcome, Pruned, approve, examine
from archive_pipeline.prune import run as prune
from archive_pipeline.resources import ArchiveResource
from archive_pipeline.restore import months_between, restore
from archive_pipeline.snapshot import SourceTable
from scaling.capabilities import Capability
from scaling.dagster_tracing import traced_in_process_executor
from scaling.errors import UserError
from scaling.resources import failing_with_a_sentence
from scaling.settings import ArchiveSettings, ArchiveSourceSettings, load

TAGS = {"pipeline": "archive"}
OPAQUE = re.compile(r"[0-9a-fA-F-]{32,36}|\d{1,20}")
"""A UUID or a number: what may stand in a run's configuration, which Dagster keeps."""

audit_log_archive_job = dg.define_asset_job(
    "audit_log_archive_job",
    selection=dg.AssetSelection.assets("audit_log_archive", "audit_log_catalog"),
    description="Archive and verify one month of audit_logs, then refresh what Athena sees.",
    tags=TAGS,
)

audit_log_upkeep_job = dg.define_asset_job(
    "audit_log_upkeep_job",
    selection=dg.AssetSelection.assets("audit_logs_partitions", "audit_log_chain"),
    description="Make partitions for the months to come, and audit the chain of the archive.",
    tags=TAGS,
)


class DryRunConfig(dg.Config):
    """Whether something is done or only shown."""

    dry_run: bool = Field(default=True, description="true: show what would be done, and write nothing anywhere.")


class ConvertConfig(DryRunConfig):
    """Whether the table is converted, or the plan shown."""

    confirm: str = Field(
        default="",
        description="The table's name, schema.table, typed by whoever has read the plan; needed with dry_run: false.",
    )


class PruneConfig(DryRunConfig):
    """Which partitions leave Postgres."""

    month: str = Field(
        default="", description="YYYY-MM: only the partition of this month. Empty: all partitions that may go."
    )


class ApproveConfig(DryRunConfig):
    """Which proposal is approved, and by whom."""

    what: str = Field(description="A month, YYYY-MM, or the name of a partition that was proposed.")
    by: str = Field(min_length=1, description="Who approves, for the record in archive.prunes.")


class RestoreConfig(DryRunConfig):
    """Which months come back into Postgres, and where to."""

    first: str = Field(description="YYYY-MM: the month, or the first of several.")
    last: str = Field(default="", description="YYYY-MM: the last of several months. Empty: one month.")
    tenant: str = Field(default="", description="Only this tenant's rows, by its id. Empty: every tenant's.")
    into: str = Field(
        default="",
        description="schema.table for all rows. Empty: a private table for each month, which nobody else reads.",
    )
    attach: bool = Field(
        default=False, description="Make the restored table the month's partition again, in place of the late one."
    )


class EraseConfig(DryRunConfig):
    """Which rows are erased from every archived month, and on whose word."""

    column: str = Field(default="tenant_id", description="Column of the table by which the rows are chosen.")
    value: str = Field(
        description="A UUID or a number that the rows have in the column. Dagster keeps it in the run's configuration; "
        "what is personal by itself belongs to python -m archive_pipeline.erase, which keeps it nowhere.",
    )
    requested_by: str = Field(min_length=1, description="Who asked for it, for the record in archive.erasures.")
    reason: str = Field(min_length=1, description="Why, for the record; no personal data.")


class EpisodeConfig(dg.Config):
    """Which crossing of a threshold is acted on."""

    episode: int = Field(ge=1, description="Its number, as asset scaling_episodes and the sensor name it.")


@dg.op(pool=POOL, tags=TAGS)
def convert_to_partitions(context: dg.OpExecutionContext, config: ConvertConfig, archive: ArchiveResource) -> None:
    """Convert the table, or show how it would be done and what is in the way."""
    with failing_with_a_sentence():
        wanted = Conversion.from_settings(load(ArchiveSourceSettings))
        with archive.databases() as router:
            plans = [conversion.plan(shard, wanted) for shard in router.shards()]
            context.log.info("%s", "\n".join(metadata.sentences(plan) for plan in plans))
            shown = metadata.of_plans(plans)
            if config.dry_run:
                _show(context, shown, dry_run=True)
                return
            if config.confirm != str(wanted.table):
                raise UserError(
                    f"{wanted.table} was not touched; read the plan of a dry run, and confirm with its name: "
                    f"confirm: {wanted.table}"
                )
            reports = [
                conversion.convert(shard, wanted, on_step=lambda step: context.log.info("%s", step))
                for shard in router.shards()
            ]
        shown |= metadata.of_conversion(reports)
        context.log_event(dg.AssetMaterialization(PARTITIONS, metadata=metadata.of_conversion(reports)))
        _show(context, shown, dry_run=False)


@dg.op(pool=POOL, tags=TAGS)
def prune_partitions(context: dg.OpExecutionContext, config: PruneConfig, archive: ArchiveResource) -> None:
    """Drop what may go, or say what would be dropped."""
    with failing_with_a_sentence():
        policy = _policy()
        month = Month.parse(config.month, policy.zone) if config.month else None
        _prune(context, archive, policy, month, dry_run=config.dry_run)


@dg.op(pool=POOL, tags=TAGS)
def approve_and_prune(context: dg.OpExecutionContext, config: ApproveConfig, archive: ArchiveResource) -> None:
    """Approve a proposal and drop it, or say what would be dropped."""
    with failing_with_a_sentence():
        policy = _policy()
        month = Month.parse(config.what, policy.zone) if MONTH.fullmatch(config.what) else None
        if config.dry_run:
            _prune(context, archive, policy, month, dry_run=True)
            return
        table = SourceTable.parse(load(ArchiveSourceSettings).archive_table)
        with archive.databases() as router:
            approved = [
                name for shard in router.shards() for name in approve(shard, table, month or config.what, config.by)
            ]
        context.log.info("approved by %s: %s", config.by, ", ".join(approved))
        _prune(context, archive, policy, month, dry_run=False)


@dg.op(pool=POOL, tags=TAGS)
def restore_months(context: dg.OpExecutionContext, config: RestoreConfig, archive: ArchiveResource) -> None:
    """Put archived rows back into Postgres, or say what that would take."""
    with failing_with_a_sentence():
        settings, target = load(ArchiveSettings), archive.target()
        zone = settings.archive_time_zone
        months = months_between(Month.parse(config.first, zone), Month.parse(config.last or config.first, zone))
        with archive.databases() as router:
            restored = [
                each
                for shard in router.shards()
                for each in restore(
                    shard,
                    target,
                    months,
                    tenant=config.tenant or None,
                    into=SourceTable.parse(config.into) if config.into else None,
                    attach=config.attach,
                    dry_run=config.dry_run,
                    schema=settings.archive_partition_schema,
                )
            ]
        _show(context, metadata.of_restored(restored), dry_run=config.dry_run)


@dg.op(pool=POOL, tags=TAGS)
def erase_rows(context: dg.OpExecutionContext, config: EraseConfig, archive: ArchiveResource) -> None:
    """Erase rows from the archive, or say in which months there are any and what stands in the way."""
    with failing_with_a_sentence():
        if not OPAQUE.fullmatch(config.value):
            raise UserError(
                "the value is neither a UUID nor a number; for such a value use python -m archive_pipeline.erase, "
                "and delete this run, whose configuration holds it"
            )
        target = archive.protected_target(dry_run=config.dry_run)
        request = Erasure(config.column, config.value, config.requested_by, config.reason)
        with archive.databases() as router:
            reports = [erase(shard, target, request, dry_run=config.dry_run) for shard in router.shards()]
        _show(context, metadata.of_erased(reports), dry_run=config.dry_run)
        left = sum(report.would_return for report in reports)
        if left and not config.dry_run:
            raise UserError(
                f"{left} such row(s) of archived months are in Postgres still, and would be archived again as late "
                "ones; delete them there, and launch this job again"
            )


@dg.op(pool=POOL, tags=TAGS)
def partition_and_archive(context: dg.OpExecutionContext, config: EpisodeConfig, archive: ArchiveResource) -> None:
    """Convert the table for an approved episode, and have every closed month archived by a backfill."""
    with failing_with_a_sentence():
        settings = load(ArchiveSourceSettings)
        wanted, target = Conversion.from_settings(settings), archive.protected_target()
        shown: dict[str, Metadata] = {}
        with archive.databases() as router:

            def work(held: Held) -> Mapping[str, Any]:
                steps: list[str] = []

                def reached(step: conversion.Step) -> None:
                    steps.append(str(step))
                    if step not in capabilities.WHILE_ALL_WAIT:  # a line of the log is a write to another database
                        context.log.info("%s", step)

                plans, reports = capabilities.convert_all(router.shards(), wanted, held, on_step=reached)
                shown.update(metadata.of_plans(plans) | metadata.of_conversion(reports))
                context.log_event(dg.AssetMaterialization(PARTITIONS, metadata=metadata.of_conversion(reports)))
                first = Month.parse(settings.archive_first_month, settings.archive_time_zone)
                closed = capabilities.closed_months(router.shards(), wanted.table, first, target.grace)
                held.confirm()
                asked, elsewhere = ask_for_archive(context.instance, settings, closed.months, config.episode)
                outcome: dict[str, Any] = {
                    "conversion": ", ".join(sorted({str(report.outcome) for report in reports})),
                    "steps": steps,
                    "blocked_ms_max": max(report.blocked_seconds for report in reports) * 1000,
                    "months": [month.name for month in closed.months],
                    "backfill": asked,
                    "backfills_under_way": elsewhere,
                    "not_archived": closed.before,
                }
                shown.update(
                    {
                        "months": len(closed.months),
                        "months_asked_for": ", ".join(month.name for month in closed.months),
                        "backfill": asked or "none was needed",
                        "backfills_under_way": ", ".join(elsewhere),
                        **({"not_archived": closed.before} if closed.before else {}),
                    }
                )
                if asked:
                    context.log.info("backfill %s archives %d closed month(s)", asked, len(closed.months))
                return outcome

            acted = capabilities.act(
                router.shards()[0], Capability.AUDIT_LOG_PARTITIONING, config.episode, context.run_id, work
            )
        _show_acted(context, acted, shown)


@dg.op(pool=POOL, tags=TAGS)
def archive_past_retention(context: dg.OpExecutionContext, config: EpisodeConfig, archive: ArchiveResource) -> None:
    """Archive months past retention for an approved episode, and prune as ARCHIVE_PRUNE says."""
    with failing_with_a_sentence():
        policy, target = Policy.from_settings(load(ArchiveSourceSettings)), archive.protected_target()
        shown: dict[str, Metadata] = {}
        with archive.databases() as router:

            def work(held: Held) -> Mapping[str, Any]:
                done = capabilities.archive_and_prune(
                    router.shards(), target, policy, held, on_month=lambda month: context.log.info("%s", month.name)
                )
                for month, reports in done.archived.items():
                    context.log_event(
                        dg.AssetMaterialization(
                            ARCHIVE, partition=month.partition_key, metadata=metadata.of_month(reports)
                        )
                    )
                _log_dropped(context, policy, done.pruned)
                outcome = capabilities.retention_outcome(done, policy)
                shown.update(
                    {
                        "said": outcome["said"],
                        "months": len(done.archived),
                        "partitions_dropped": len(outcome["dropped"]),
                        "rows_dropped": outcome["rows_dropped"],
                        "bytes_freed": outcome["bytes_freed"],
                        "waiting_for_approval": len(outcome["waiting_for_approval"]),
                        "pruned": metadata.pruned_table(done.pruned),
                        "partitions": metadata.candidates_table(done.candidates),
                    }
                )
                return outcome

            acted = capabilities.act(
                router.shards()[0], Capability.AUDIT_LOG_RETENTION, config.episode, context.run_id, work
            )
        _show_acted(context, acted, shown)


@dg.job(executor_def=traced_in_process_executor, tags=TAGS)
def convert_audit_logs() -> None:
    """Convert the live, plain table of audit logs to monthly partitions, while everybody goes on reading and writing.

    A dry run by default: the metadata of its step is the plan, with steps, locks, estimated times, what is carried over
    and what is in the way. To do it, launch it with `dry_run: false` and the table's name as `confirm`. A converted
    table is left as it is; an attempt that died is cleaned up by the next.
    """
    convert_to_partitions()


@dg.job(executor_def=traced_in_process_executor, tags=TAGS)
def prune_audit_logs() -> None:
    """Drop the months from Postgres that may go: archived, verified, past retention, approved where that is asked.

    A dry run by default: the metadata of its step lists every partition, and why it stays. The job does what
    materializing `audit_log_pruned` does for a month, for all months at once.
    """
    prune_partitions()


@dg.job(executor_def=traced_in_process_executor, tags=TAGS)
def approve_prune() -> None:
    """Approve the prune of a month that was proposed (ARCHIVE_PRUNE=propose), and drop it.

    A dry run by default: it shows what would be dropped and records nothing.
    """
    approve_and_prune()


@dg.job(executor_def=traced_in_process_executor, tags=TAGS)
def restore_audit_logs() -> None:
    """Put archived months, or one tenant's rows of them, back into Postgres, proved equal before they are committed.

    A dry run by default: it shows rows, bytes and the tables they would go to. A second restore changes nothing.
    """
    restore_months()


@dg.job(executor_def=traced_in_process_executor, tags=TAGS)
def erase_from_archive() -> None:
    """Erase a tenant's or a user's rows from every archived month; the chain records that, and the counts reconcile.

    A dry run by default: it shows in which months there are such rows, and what stands in the way (legal holds, Object
    Lock). Rows that Postgres still holds are named and not touched.
    """
    erase_rows()


@dg.job(executor_def=traced_in_process_executor, tags=TAGS)
def partition_audit_logs() -> None:
    """Convert the table of audit logs because it crossed a threshold, then have every closed month archived.

    Acts on an approved episode once, however often it is launched; the plan is what a dry run of `convert_audit_logs`
    shows. What is in the way fails the attempt with its reasons. The months are archived by a backfill of
    `audit_log_archive`, which the metadata of the step names.
    """
    partition_and_archive()


@dg.job(executor_def=traced_in_process_executor, tags=TAGS)
def archive_and_prune() -> None:
    """Archive the months past retention because Postgres holds some, then prune them as ARCHIVE_PRUNE says.

    Acts on an approved episode once, however often it is launched. Rows that came late to archived months are archived
    too. ARCHIVE_PRUNE=off drops nothing, propose records proposals (job `approve_prune`), auto drops what may go.
    """
    archive_past_retention()


MANUAL = [convert_audit_logs, prune_audit_logs, approve_prune, restore_audit_logs, erase_from_archive]


def _policy() -> Policy:
    policy = Policy.from_settings(load(ArchiveSourceSettings))
    if policy.mode == "off":
        raise UserError("ARCHIVE_PRUNE is off; set it to propose or auto to have months pruned")
    return policy


def _prune(
    context: dg.OpExecutionContext, archive: ArchiveResource, policy: Policy, only: Month | None, *, dry_run: bool
) -> None:
    target = archive.protected_target(dry_run=dry_run)
    pruned: list[Pruned] = []
    candidates: list[Candidate] = []
    with archive.databases() as router:
        for shard in router.shards():
            if dry_run:
                pruned += prune(shard, target, policy, month=only, dry_run=True)
            else:
                with turns.pruning(shard, target.table):
                    pruned += prune(shard, target, policy, month=only)
            candidates += examine(shard, target, policy)
    shown: dict[str, Metadata] = {
        "partitions_dropped": sum(each.outcome is Outcome.DROPPED for each in pruned),
        "rows": sum(each.rows for each in pruned),
        "bytes": sum(each.bytes for each in pruned),
        "pruned": metadata.pruned_table(pruned),
        "partitions": metadata.candidates_table(candidates),
    }
    _show(context, shown, dry_run=dry_run)
    _log_dropped(context, policy, pruned if not dry_run else ())
    if unwell := [each for each in pruned if each.outcome not in (Outcome.DROPPED, Outcome.WOULD_DROP)]:
        raise UserError("; ".join(f"{each.partition} was {each.outcome}: {each.reason}" for each in unwell))


def _show(context: dg.OpExecutionContext, shown: Mapping[str, Metadata], *, dry_run: bool) -> None:
    did = "nothing was changed; launch it with dry_run: false to do it" if dry_run else "done"
    context.add_output_metadata({"did": did, **shown})
    context.log.info("%s", did)


def _log_dropped(context: dg.OpExecutionContext, policy: Policy, pruned: Sequence[Pruned]) -> None:
    for each in pruned:
        for name in each.months if each.outcome is Outcome.DROPPED else ():
            month = Month.parse(name, policy.zone)
            context.log_event(
                dg.AssetMaterialization(
                    PRUNED, partition=month.partition_key, metadata=metadata.of_pruned(month, [each], [])
                )
            )


def _show_acted(context: dg.OpExecutionContext, acted: Acted, shown: Mapping[str, Metadata]) -> None:
    episode = acted.episode
    if acted.lost:
        did = f"episode {episode.id} was given to another run meanwhile; this one stopped"
    elif acted.outcome is None:
        did = f"nothing: episode {episode.id} is {episode.state}, somebody else's or not approved"
    else:
        did = "done"
    context.add_output_metadata({"did": did, "episode": episode.id, **shown})
    context.log.info("%s", did)
