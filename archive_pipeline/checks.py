"""What is checked of the archive, and what the checks say.

Belongs here: check specifications, and their results from the domain's reports. Does not: verifying a month
(`archive_pipeline.archive`) or walking along the chain (`archive_pipeline.audit`).
https://docs.dagster.io/guides/test/asset-checks

A run may archive several months, and Dagster takes the partition of an `AssetCheckResult` from the run. So every month
is judged by an `AssetCheckEvaluation`, which says itself which partition it is of.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import dagster as dg

# dagster exports the evaluation but not what it is about, without which the UI shows it of no partition.
from dagster._core.definitions.asset_checks.asset_check_evaluation import AssetCheckEvaluationTargetMaterializationData

from archive_pipeline.archive import MonthReport, Outcome
from archive_pipeline.catalog import Finding as CatalogFinding
from archive_pipeline.errors import VerificationError
from archive_pipeline.evidence import AuditReport
from archive_pipeline.months import Month
from archive_pipeline.premade_months import MonthPartition

# Known to be a preview in dagster 1.13, and pinned; the warning would show in every process that loads the definitions.
warnings.filterwarnings(
    "ignore", message="Specifying a partitions_def on an AssetCheckSpec", category=dg.PreviewWarning
)

ARCHIVE = dg.AssetKey("audit_log_archive")
CATALOG = dg.AssetKey("audit_log_catalog")
CHAIN = dg.AssetKey("audit_log_chain")
PARTITIONS = dg.AssetKey("audit_logs_partitions")
PRUNED = dg.AssetKey("audit_log_pruned")

Shown = str | int | float | list[str] | dg.MetadataValue

ROWS_EQUAL = "rows_equal"
DIGEST_EQUAL = "digest_equal"
BOUNDS_INSIDE_MONTH = "bounds_inside_month"
OBJECTS_PRESENT = "objects_present"
LATE_ROWS_ARCHIVED = "late_rows_archived"
ROWS_UNCHANGED = "rows_unchanged"

MONTHS_PREMADE = "months_premade"
NO_ABANDONED_CONVERSION = "no_abandoned_conversion"
READS_AS_LISTED = "reads_as_listed"
CHAIN_SOUND = "chain_sound"

FINDINGS_SHOWN = 100
PLAIN = "The table is plain, and takes rows of any month."

BLOCKING = {
    ROWS_EQUAL: "As many rows were read back from S3 as the Postgres snapshot held.",
    DIGEST_EQUAL: "Every column of every row, digested by DuckDB over the objects read back from S3, equals what "
    "Postgres computed in the snapshot the rows came from.",
    BOUNDS_INSIDE_MONTH: "The first and the last created_at belong to the month.",
    OBJECTS_PRESENT: "Every object of the manifest is in the bucket with its SHA-256, and nothing else lies "
    "under the month's prefix, where Athena would read it.",
}
WARNING = {
    LATE_ROWS_ARCHIVED: "Every row that Postgres holds of the month is in the archive; rows that came after the "
    "month was archived have been added as a further part.",
    ROWS_UNCHANGED: "No archived row was changed in Postgres since, or deleted there but for a prune. The archive "
    "keeps what it was first given, whichever is right.",
}


@dataclass(frozen=True, slots=True)
class Materialization:
    """An event of Dagster's log that a verdict is about."""

    storage_id: int
    run_id: str
    timestamp: float


@dataclass(frozen=True, slots=True)
class PartitionsState:
    """The partitions of one database.

    Attributes:
        plain: whether the table is not partitioned.
        conversion: what somebody should know of its conversion; empty when all is well.
        made: in this run.
        partitions: all of them.
        months_left: after the present one.
        findings: what somebody should act on.
    """

    plain: bool
    conversion: str = ""
    made: tuple[MonthPartition, ...] = ()
    partitions: tuple[MonthPartition, ...] = ()
    months_left: int = 0
    findings: tuple[str, ...] = ()


def of_months(months: dg.PartitionsDefinition) -> list[dg.AssetCheckSpec]:
    """The checks of each month of `audit_log_archive`; the first four stop whatever follows the month.

    Args:
        months: the partitions.
    """
    return [
        dg.AssetCheckSpec(name, asset=ARCHIVE, description=text, blocking=name in BLOCKING, partitions_def=months)
        for name, text in {**BLOCKING, **WARNING}.items()
    ]


def evaluations(
    month: Month, reports: Sequence[MonthReport], of: Materialization | None = None
) -> Iterator[dg.AssetCheckEvaluation]:
    """The verdicts on one month.

    Args:
        month: the partition.
        reports: one for each database.
        of: the month's newest materialization; the UI shows a verdict only of that one.

    Yields:
        One for each check.
    """
    archived = [report for report in reports if report.outcome is Outcome.ARCHIVED]
    compared = "now" if archived else "when the month was archived"
    expected = [report.source if report in archived else report.manifest.digest for report in reports]
    yield _evaluation(
        month,
        of,
        ROWS_EQUAL,
        passed=all(report.stored.rows == digest.rows for report, digest in zip(reports, expected, strict=True)),
        metadata={
            "rows_in_postgres": sum(digest.rows for digest in expected),
            "rows_read_back": sum(report.stored.rows for report in reports),
            "compared": compared,
        },
    )
    yield _evaluation(
        month,
        of,
        DIGEST_EQUAL,
        passed=all(report.stored.value == digest.value for report, digest in zip(reports, expected, strict=True)),
        metadata={
            "digest_in_postgres": ", ".join(str(digest.value) for digest in expected),
            "digest_read_back": ", ".join(str(report.stored.value) for report in reports),
            "compared": compared,
        },
    )
    firsts = [report.stored.min_us for report in reports if report.stored.min_us is not None]
    lasts = [report.stored.max_us for report in reports if report.stored.max_us is not None]
    yield _evaluation(
        month,
        of,
        BOUNDS_INSIDE_MONTH,
        passed=all(report.bounds_inside_month for report in reports),
        metadata={
            "from": month.start.isoformat(),
            "to": month.end.isoformat(),
            "first_created_at": _instant(min(firsts, default=None)),
            "last_created_at": _instant(max(lasts, default=None)),
        },
    )
    damaged = [key for report in reports for key in report.damaged]
    strangers = sorted({key for report in reports for key in report.strangers})
    yield _evaluation(
        month,
        of,
        OBJECTS_PRESENT,
        passed=not damaged and not strangers,
        description=_objects(damaged, strangers),
        metadata={
            "objects": sum(len(report.manifest.parts) for report in reports),
            "missing_or_altered": damaged,
            "not_in_any_manifest": strangers,
        },
    )
    changed = sum(report.changed_rows for report in reports)
    missing = sum(report.missing_rows for report in reports)
    unexplained = sum(report.missing_rows for report in reports if not report.pruned)
    present = sum(report.source.rows for report in reports)
    # What Postgres holds beyond the archived rows that it still holds.
    outside = present + missing - sum(report.manifest.digest.rows for report in reports)
    yield _evaluation(
        month,
        of,
        LATE_ROWS_ARCHIVED,
        passed=outside <= 0,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"{outside} row(s) of the month in Postgres are not in the archive." if outside > 0 else None,
        metadata={"late_rows": sum(report.late_rows for report in reports), "rows_in_postgres": present},
    )
    yield _evaluation(
        month,
        of,
        ROWS_UNCHANGED,
        passed=not changed and not unexplained,
        severity=dg.AssetCheckSeverity.WARN,
        description=_changes(changed, unexplained),
        metadata={"changed_rows": changed, "missing_rows": unexplained, "pruned": any(r.pruned for r in reports)},
    )


def failed(month: Month, error: VerificationError, of: Materialization | None = None) -> dg.AssetCheckEvaluation:
    """The verdict on a month that was not published.

    Args:
        month: the partition.
        error: what was found.
        of: the month's newest materialization.
    """
    return _evaluation(
        month,
        of,
        DIGEST_EQUAL,
        passed=False,
        description=str(error),
        metadata={"month": error.month, "finding": error.finding, "columns": list(error.columns)},
    )


def of_partitions() -> list[dg.AssetCheckSpec]:
    """The checks of `audit_logs_partitions`; a failed one makes the run red, so that somebody hears of it."""
    return [
        dg.AssetCheckSpec(
            MONTHS_PREMADE,
            asset=PARTITIONS,
            blocking=True,
            description="There are partitions for the months to come, and no gap between them; Postgres refuses rows "
            "for which there is none.",
        ),
        dg.AssetCheckSpec(
            NO_ABANDONED_CONVERSION,
            asset=PARTITIONS,
            blocking=True,
            description="No attempt to convert the table was left half done; what it adds refuses coming rows.",
        ),
    ]


def partitions(states: Sequence[PartitionsState], ahead: int) -> Iterator[dg.AssetCheckResult]:
    """The verdicts on the partitions.

    Args:
        states: one for each database.
        ahead: how many months are kept ready.

    Yields:
        One for each check.
    """
    found = [finding for state in states for finding in state.findings]
    yield dg.AssetCheckResult(
        check_name=MONTHS_PREMADE,
        passed=not found,
        description="; ".join(found) or (PLAIN if any(state.plain for state in states) else None),
        metadata={"months_left": min(state.months_left for state in states), "months_wanted": ahead},
    )
    abandoned = [state.conversion for state in states if state.conversion]
    yield dg.AssetCheckResult(
        check_name=NO_ABANDONED_CONVERSION,
        passed=not abandoned,
        description="; ".join(abandoned) or None,
        metadata={"abandoned": len(abandoned)},
    )


def of_catalog() -> list[dg.AssetCheckSpec]:
    """The check of `audit_log_catalog`."""
    return [
        dg.AssetCheckSpec(
            READS_AS_LISTED,
            asset=CATALOG,
            description="Athena reads every object that the manifests list, with the columns that they have, and no "
            "other object.",
        )
    ]


def catalog(found: Sequence[CatalogFinding]) -> Iterator[dg.AssetCheckResult]:
    """The verdict on what Athena reads.

    Args:
        found: what it would read wrongly, or not at all.

    Yields:
        One for each check.
    """
    yield dg.AssetCheckResult(
        check_name=READS_AS_LISTED,
        passed=not found,
        description="; ".join(f"{each.subject} {each.sentence}" for each in found[:FINDINGS_SHOWN]) or None,
        metadata={"findings": len(found)},
    )


def of_chain() -> list[dg.AssetCheckSpec]:
    """The check of `audit_log_chain`; failed it makes the run red, so that somebody hears of it."""
    return [
        dg.AssetCheckSpec(
            CHAIN_SOUND,
            asset=CHAIN,
            blocking=True,
            description="Every link, manifest and object of the archive is what was published and signed, from the end "
            "that Postgres pins to the first link; nothing was added.",
        )
    ]


def chain(reports: Sequence[AuditReport]) -> Iterator[dg.AssetCheckResult]:
    """The verdict on the chain.

    Args:
        reports: one for each database.

    Yields:
        One for each check.
    """
    found = [finding for report in reports for finding in report.findings]
    months = sorted({finding.month for finding in found})
    yield dg.AssetCheckResult(
        check_name=CHAIN_SOUND,
        passed=not found,
        description=f"{len(found)} finding(s) in month {', '.join(months)}" if found else None,
        metadata={
            "findings": len(found),
            "links": sum(report.links for report in reports),
            **(
                {
                    "findings_table": dg.MetadataValue.table(
                        [
                            dg.TableRecord(
                                {
                                    "month": each.month,
                                    "kind": str(each.kind),
                                    "key": each.key,
                                    "found": each.text,
                                    "remedy": each.remedy,
                                }
                            )
                            for each in found[:FINDINGS_SHOWN]
                        ]
                    )
                }
                if found
                else {}
            ),
        },
    )


def blockers(judged: Sequence[dg.AssetCheckEvaluation]) -> str:
    """What stops a month, in words; empty when nothing does.

    Args:
        judged: the month's evaluations.
    """
    return "; ".join(
        f"{each.check_name} failed" + (f": {each.description}" if each.description else "")
        for each in judged
        if each.blocking and not each.passed
    )


def _evaluation(
    month: Month,
    of: Materialization | None,
    name: str,
    *,
    passed: bool,
    metadata: Mapping[str, Shown],
    description: str | None = None,
    severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.ERROR,
) -> dg.AssetCheckEvaluation:
    return dg.AssetCheckEvaluation(
        asset_key=ARCHIVE,
        check_name=name,
        passed=passed,
        metadata=metadata,
        severity=severity,
        description=description,
        blocking=name in BLOCKING,
        partition=month.partition_key,
        target_materialization_data=AssetCheckEvaluationTargetMaterializationData(
            storage_id=of.storage_id, run_id=of.run_id, timestamp=of.timestamp
        )
        if of
        else None,
    )


def _objects(damaged: Sequence[str], strangers: Sequence[str]) -> str | None:
    findings = []
    if damaged:
        findings.append(f"{len(damaged)} object(s) are missing or altered; restore them from the bucket's versions")
    if strangers:
        findings.append(f"{len(strangers)} object(s) are in no manifest but Athena reads them; move them away")
    return "; ".join(findings) or None


def _changes(changed: int, missing: int) -> str | None:
    findings = []
    if changed:
        findings.append(f"{changed} archived row(s) have another content in Postgres now")
    if missing:
        findings.append(f"{missing} archived row(s) are gone from Postgres, which no prune did")
    return f"{' and '.join(findings)}; the archive was left as it is" if findings else None


def _instant(us: int | None) -> str:
    """Microseconds since 1970 for a person; as text, which the UI does not plot."""
    if us is None:
        return "none"
    try:
        return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)).isoformat(timespec="microseconds")
    except OverflowError:  # a value outside the month may be any
        return f"{us} µs after 1970"
