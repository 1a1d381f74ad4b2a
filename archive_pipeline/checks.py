"""What is checked of every archived month, and what the checks say.

Belongs here: check specifications and their results from a month's report. Does not: the verification itself, which
happens before anything is published (`archive_pipeline.archive`).
https://docs.dagster.io/guides/test/asset-checks
"""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

import dagster as dg

from archive_pipeline.archive import MonthReport, Outcome
from archive_pipeline.errors import VerificationError

ASSET = dg.AssetKey("audit_log_archive")

ROWS_EQUAL = "rows_equal"
DIGEST_EQUAL = "digest_equal"
BOUNDS_INSIDE_MONTH = "bounds_inside_month"
OBJECTS_PRESENT = "objects_present"
NO_LATE_ROWS = "no_late_rows"


def specs() -> list[dg.AssetCheckSpec]:
    """The checks of `audit_log_archive`; all but the last stop whatever follows the month."""
    descriptions = {
        ROWS_EQUAL: "As many rows were read back from S3 as the Postgres snapshot held.",
        DIGEST_EQUAL: "Every column of every row, digested by DuckDB over the objects read back from S3, equals what "
        "Postgres computed in the snapshot the rows came from.",
        BOUNDS_INSIDE_MONTH: "The first and the last created_at belong to the month.",
        OBJECTS_PRESENT: "Every object of the manifest is in the bucket with its SHA-256, and nothing else lies "
        "under the month's prefix, where Athena would read it.",
    }
    blocking = [
        dg.AssetCheckSpec(name, asset=ASSET, description=text, blocking=True) for name, text in descriptions.items()
    ]
    late = dg.AssetCheckSpec(
        NO_LATE_ROWS,
        asset=ASSET,
        description="Postgres still holds for this month exactly what was archived. Rows that came later, or were "
        "changed or deleted, are reported and stay in Postgres; the archive is not overwritten.",
    )
    return [*blocking, late]


def results(reports: Sequence[MonthReport]) -> Iterator[dg.AssetCheckResult]:
    """The verdicts on one month.

    Args:
        reports: one for each database.

    Yields:
        One result for each check.
    """
    archived = [report for report in reports if report.outcome is Outcome.ARCHIVED]
    compared = "now" if archived else "when the month was archived"
    expected = [report.source if report in archived else report.manifest.digest for report in reports]
    yield dg.AssetCheckResult(
        check_name=ROWS_EQUAL,
        passed=all(report.stored.rows == digest.rows for report, digest in zip(reports, expected, strict=True)),
        metadata={
            "rows_in_postgres": sum(digest.rows for digest in expected),
            "rows_read_back": sum(report.stored.rows for report in reports),
            "compared": compared,
        },
    )
    yield dg.AssetCheckResult(
        check_name=DIGEST_EQUAL,
        passed=all(report.stored.value == digest.value for report, digest in zip(reports, expected, strict=True)),
        metadata={
            "digest_in_postgres": ", ".join(str(digest.value) for digest in expected),
            "digest_read_back": ", ".join(str(report.stored.value) for report in reports),
            "compared": compared,
        },
    )
    firsts = [report.stored.min_us for report in reports if report.stored.min_us is not None]
    lasts = [report.stored.max_us for report in reports if report.stored.max_us is not None]
    yield dg.AssetCheckResult(
        check_name=BOUNDS_INSIDE_MONTH,
        passed=all(report.bounds_inside_month for report in reports),
        metadata={
            "from": reports[0].manifest.month.start.isoformat(),
            "to": reports[0].manifest.month.end.isoformat(),
            "first_created_at": _instant(min(firsts, default=None)),
            "last_created_at": _instant(max(lasts, default=None)),
        },
    )
    damaged = [key for report in reports for key in report.damaged]
    strangers = sorted({key for report in reports for key in report.strangers})
    yield dg.AssetCheckResult(
        check_name=OBJECTS_PRESENT,
        passed=not damaged and not strangers,
        description=_objects(damaged, strangers),
        metadata={
            "objects": sum(len(report.manifest.parts) for report in reports),
            "missing_or_altered": damaged,
            "not_in_any_manifest": strangers,
        },
    )
    late = sum(report.late_rows for report in reports)
    changed = [report.source_changed for report in reports if report.source_changed]
    yield dg.AssetCheckResult(
        check_name=NO_LATE_ROWS,
        passed=not changed,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"Postgres now holds {'; '.join(changed)} that were archived; the archive was left as it is."
        if changed
        else None,
        metadata={"late_rows": late, "rows_in_postgres": sum(report.source.rows for report in reports)},
    )


def failed(error: VerificationError) -> Iterator[dg.AssetCheckResult]:
    """The verdict on a month that was not published.

    Args:
        error: what was found.

    Yields:
        The failed check.
    """
    yield dg.AssetCheckResult(
        check_name=DIGEST_EQUAL,
        passed=False,
        description=str(error),
        metadata={"month": error.month, "finding": error.finding, "columns": list(error.columns)},
    )


def _objects(damaged: Sequence[str], strangers: Sequence[str]) -> str | None:
    findings = []
    if damaged:
        findings.append(f"{len(damaged)} object(s) are missing or altered; restore them from the bucket's versions")
    if strangers:
        findings.append(f"{len(strangers)} object(s) are in no manifest but Athena reads them; move them away")
    return "; ".join(findings) or None


def _instant(us: int | None) -> str:
    """Microseconds since 1970 for a person; as text, which the UI does not plot."""
    if us is None:
        return "none"
    try:
        return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)).isoformat(timespec="microseconds")
    except OverflowError:  # a value outside the month may be any
        return f"{us} µs after 1970"
