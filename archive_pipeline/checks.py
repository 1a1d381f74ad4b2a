"""What is checked of the archive, and what the checks say.

Belongs here: check specifications, and their results from the domain's reports. Does not: verifying a month
(`archive_pipeline.archive`) or walking along the chain (`archive_pipeline.audit`).
https://docs.dagster.io/guides/test/asset-checks

A run may archive several months, and Dagster takes the partition of an `AssetCheckResult` from the run. So every month
is judged by an `AssetCheckEvaluation`, which says itself which partition it is of.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta

import dagster as dg

from archive_pipeline.archive import MonthReport, Outcome
from archive_pipeline.errors import VerificationError
from archive_pipeline.months import Month

# Known to be a preview in dagster 1.13, and pinned; the warning would show in every process that loads the definitions.
warnings.filterwarnings(
    "ignore", message="Specifying a partitions_def on an AssetCheckSpec", category=dg.PreviewWarning
)

ARCHIVE = dg.AssetKey("audit_log_archive")

Shown = str | int | float | list[str] | dg.MetadataValue

ROWS_EQUAL = "rows_equal"
DIGEST_EQUAL = "digest_equal"
BOUNDS_INSIDE_MONTH = "bounds_inside_month"
OBJECTS_PRESENT = "objects_present"
LATE_ROWS_ARCHIVED = "late_rows_archived"
ROWS_UNCHANGED = "rows_unchanged"

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


def of_months(months: dg.PartitionsDefinition) -> list[dg.AssetCheckSpec]:
    """The checks of each month of `audit_log_archive`; the first four stop whatever follows the month.

    Args:
        months: the partitions.
    """
    return [
        dg.AssetCheckSpec(name, asset=ARCHIVE, description=text, blocking=name in BLOCKING, partitions_def=months)
        for name, text in {**BLOCKING, **WARNING}.items()
    ]


def evaluations(month: Month, reports: Sequence[MonthReport]) -> Iterator[dg.AssetCheckEvaluation]:
    """The verdicts on one month.

    Args:
        month: the partition.
        reports: one for each database.

    Yields:
        One for each check.
    """
    archived = [report for report in reports if report.outcome is Outcome.ARCHIVED]
    compared = "now" if archived else "when the month was archived"
    expected = [report.source if report in archived else report.manifest.digest for report in reports]
    yield _evaluation(
        month,
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
        LATE_ROWS_ARCHIVED,
        passed=outside <= 0,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"{outside} row(s) of the month in Postgres are not in the archive." if outside > 0 else None,
        metadata={"late_rows": sum(report.late_rows for report in reports), "rows_in_postgres": present},
    )
    yield _evaluation(
        month,
        ROWS_UNCHANGED,
        passed=not changed and not unexplained,
        severity=dg.AssetCheckSeverity.WARN,
        description=_changes(changed, unexplained),
        metadata={"changed_rows": changed, "missing_rows": unexplained, "pruned": any(r.pruned for r in reports)},
    )


def failed(month: Month, error: VerificationError) -> dg.AssetCheckEvaluation:
    """The verdict on a month that was not published.

    Args:
        month: the partition.
        error: what was found.
    """
    return _evaluation(
        month,
        DIGEST_EQUAL,
        passed=False,
        description=str(error),
        metadata={"month": error.month, "finding": error.finding, "columns": list(error.columns)},
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
