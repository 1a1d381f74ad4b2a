"""What the UI shows of the archive's reports: numbers that plot, tables, links.

Belongs here: a report in, metadata out; stable names, because the UI plots by name. Does not: anything that asks a
database or the bucket. https://docs.dagster.io/guides/build/assets/metadata-and-tags
"""

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from archive_pipeline.archive import MonthReport
from archive_pipeline.catalog import Catalog
from archive_pipeline.checks import PartitionsState
from archive_pipeline.columns import Column, Field
from archive_pipeline.conversion import Report as ConversionReport
from archive_pipeline.conversion_plan import Plan
from archive_pipeline.erase import ErasureReport
from archive_pipeline.evidence import AuditReport
from archive_pipeline.months import Month
from archive_pipeline.prune import Candidate, Pruned
from archive_pipeline.query import Answer
from archive_pipeline.restore import Restored
from scaling.prices import storage_usd

ROWS_SHOWN = 200
CELL_LENGTH = 200

Metadata = dg.MetadataValue[Any] | dg.TableSchema | str | int | float | bool


def of_month(reports: Sequence[MonthReport]) -> dict[str, Metadata]:
    """A month that was archived or verified.

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
        "generation": max(report.manifest.generation for report in reports),
        "parts": len(parts),
        "parquet_bytes": size,
        "storage_usd_per_month": storage_usd(size),
        "duration_seconds": seconds,
        "rows_per_second": rows / seconds if seconds else 0.0,
        "read_from": ", ".join(sorted({report.manifest.read_from for report in reports})),
        "manifest": dg.MetadataValue.path(", ".join(f"s3://{r.bucket}/{r.found.key}" for r in reports)),
        "manifest_sha256": ", ".join(report.found.sha256 for report in reports),
        "merkle_root": ", ".join(report.manifest.merkle_root for report in reports),
        "parts_table": table(
            {"key": "string", "rows": "int", "bytes": "int", "sha256": "string"},
            [(part.key.rsplit("/", 1)[-1], part.digest.rows, part.size, part.sha256) for part in parts],
        ),
    }
    if estimates:
        metadata["postgres_bytes_estimate"] = sum(estimates)
        metadata["compression_ratio"] = sum(estimates) / size if size else 0.0
    return metadata


def of_catalog(catalog: Catalog, uri: str) -> dict[str, Metadata]:
    """The archive as Athena sees it.

    Args:
        catalog: as written.
        uri: of the DDL.
    """
    return {
        "ddl": dg.MetadataValue.md(f"```sql\n{catalog.script}```"),
        "months": catalog.months,
        "dagster/row_count": catalog.rows,
        "dagster/uri": uri,
        "dagster/table_name": f"{catalog.database}.{catalog.name}",
        "dagster/column_schema": _schema(catalog.fields),
        "years": f"{catalog.first_year}-{catalog.last_year}",
    }


def of_partitions(states: Sequence[PartitionsState], zone: str) -> dict[str, Metadata]:
    """The partitions of the table.

    Args:
        states: one for each database.
        zone: whose calendar months they are.
    """
    if any(state.plain for state in states):
        return {"state": "a plain table; the job convert_audit_logs shows how it would be converted, and does so"}
    partitions = [partition for state in states for partition in state.partitions]
    return {
        "state": "partitioned by month",
        "partitions": len(partitions),
        "partitions_made": sum(len(state.made) for state in states),
        "months_left": min(state.months_left for state in states),
        "rows_estimate": sum(partition.rows_estimate for partition in partitions),
        "bytes": sum(partition.bytes for partition in partitions),
        "partitions_table": table(
            {"partition": "string", "month": "string", "from": "string", "to": "string", "rows": "int", "bytes": "int"},
            [
                (
                    str(each),
                    month.name if (month := each.month(zone)) else "",
                    each.from_at.isoformat() if each.from_at else "the beginning",
                    each.to_at.isoformat(),
                    each.rows_estimate,
                    each.bytes,
                )
                for each in partitions
            ],
        ),
    }


def of_chain(reports: Sequence[AuditReport]) -> dict[str, Metadata]:
    """The chain of signed links, and its head, which a copy of this keeps outside the bucket and the database.

    Args:
        reports: one for each database.
    """
    months = [month for report in reports for month in report.months]
    notes = [note for report in reports for note in report.notes]
    ends = [(report, report.end) for report in reports if report.end]
    return {
        "links": sum(report.links for report in reports),
        "months": len(months),
        "rows": sum(month.rows for month in months),
        "parquet_bytes": sum(month.bytes for month in months),
        "storage_usd_per_month": storage_usd(sum(month.bytes for month in months)),
        "findings": sum(len(report.findings) for report in reports),
        "depth": "every row read again" if any(report.deep for report in reports) else "objects compared",
        "head_sequence": max((end.sequence for _, end in ends), default=0),
        "head": table(
            {"shard": "string", "sequence": "int", "sha256": "string", "signature": "string", "pinned": "int"},
            [
                (report.shard, end.sequence, end.sha256, end.signature or "unsigned", report.pinned or 0)
                for report, end in ends
            ],
        ),
        "months_table": table(
            {
                "month": "string", "generation": "int", "kind": "string", "rows": "int", "bytes": "int",
                "findings": "int",
            },
            [(each.month, each.generation, each.kind, each.rows, each.bytes, each.findings) for each in months],
        ),
        **({"notes": dg.MetadataValue.md("\n".join(f"- {note}" for note in notes))} if notes else {}),
    }  # fmt: skip


def of_pruned(month: Month, pruned: Sequence[Pruned], candidates: Sequence[Candidate]) -> dict[str, Metadata]:
    """A month that was to leave Postgres.

    Args:
        month: it is.
        pruned: what became of partitions in this run.
        candidates: the partitions that cover the month now.
    """
    mine = [each for each in pruned if month.name in each.months]
    waiting = [each for each in candidates if not each.reason]
    kept = "; ".join(each.reason for each in candidates if each.reason)
    outcome = "dropped" if mine else "waits for approval" if waiting else "kept" if kept else "not in Postgres"
    return {
        "outcome": outcome,
        "reason": kept if outcome == "kept" else "",
        "rows_dropped": sum(each.rows for each in mine),
        "bytes_freed": sum(each.bytes for each in mine),
        "waiting_for_approval": len(waiting),
        "partitions_table": candidates_table(candidates),
    }


def candidates_table(candidates: Sequence[Candidate]) -> dg.MetadataValue[Any]:
    """The partitions, and why they stay or that they may go.

    Args:
        candidates: as examined.
    """
    return table(
        {"partition": "string", "months": "string", "rows": "int", "bytes": "int", "state": "string", "why": "string"},
        [
            (
                str(each.partition),
                _range(each.months),
                each.partition.rows_estimate,
                each.partition.bytes,
                f"approved by {each.approved_by}" if each.state == "approved" else each.state or "",
                each.reason or "may go",
            )
            for each in candidates
        ],
    )


def pruned_table(pruned: Sequence[Pruned]) -> dg.MetadataValue[Any]:
    """What became of partitions.

    Args:
        pruned: in one run.
    """
    return table(
        {
            "partition": "string",
            "months": "string",
            "outcome": "string",
            "rows": "int",
            "bytes": "int",
            "why": "string",
        },
        [(e.partition, _range(e.months), str(e.outcome), e.rows, e.bytes, e.reason) for e in pruned],
    )


def of_plans(plans: Sequence[Plan]) -> dict[str, Metadata]:
    """How the table would be converted; the ids of rows in the way are for a terminal, and left out.

    Args:
        plans: one for each database.
    """
    return {
        "plan": dg.MetadataValue.md("\n\n".join(map(sentences, plans))),
        "in_the_way": sum(len(plan.blockers) for plan in plans),
        "seconds_estimated": sum(plan.seconds for plan in plans),
        "rows_estimate": sum(plan.facts.rows_estimate for plan in plans),
        "bytes": sum(plan.facts.heap_bytes for plan in plans),
    }


def sentences(plan: Plan) -> str:
    """A plan as Markdown.

    Args:
        plan: of a conversion.
    """
    if plan.partitioned:
        return f"`{plan.names.table}` is partitioned already: {plan.before.partition_key}; there is nothing to do."
    steps = [
        f"| {number} | {step.name} | {step.lock} | {step.blocks} | {step.seconds:.0f} s |"
        for number, step in enumerate(plan.steps, start=1)
    ]
    lists = {"Carried over": plan.carried, "To know": plan.warnings, "In the way": plan.blockers}
    return "\n".join(
        [
            f"### `{plan.names.table}` to monthly partitions, {plan.zone}",
            f"{plan.facts.rows_estimate:,} rows; the first partition ends at {plan.bound:%Y-%m-%d %H:%M} UTC.\n",
            "| | step | lock | who waits | about |\n|---|---|---|---|---|",
            *steps,
            *(
                f"\n**{title}**\n" + "\n".join(f"- {each}" for each in entries)
                for title, entries in lists.items()
                if entries
            ),
        ]
    )


def of_conversion(reports: Sequence[ConversionReport]) -> dict[str, Metadata]:
    """What a conversion did.

    Args:
        reports: one for each database.
    """
    return {
        "outcome": ", ".join(sorted({report.outcome for report in reports})),
        "blocked_ms": max(report.blocked_seconds for report in reports) * 1000,
        "attempts": max(report.attempts for report in reports),
        "partitions_made": sum(len(report.made) for report in reports),
        "duration_seconds": sum(report.seconds for report in reports),
    }


def of_restored(restored: Sequence[Restored]) -> dict[str, Metadata]:
    """Months that were, or would be, put back into Postgres.

    Args:
        restored: one for each month.
    """
    return {
        "rows": sum(each.rows for each in restored),
        "bytes_read": sum(each.size for each in restored),
        "disk_bytes_estimate": sum(each.disk_bytes for each in restored),
        "months_table": table(
            {"month": "string", "outcome": "string", "table": "string", "rows": "int", "attached": "string"},
            [(e.month, str(e.outcome), str(e.table), e.rows, "yes" if e.attached else "no") for e in restored],
        ),
    }


def of_erased(reports: Sequence[ErasureReport]) -> dict[str, Metadata]:
    """Rows that were, or would be, erased; of whom is not said.

    Args:
        reports: one for each database.
    """
    months = [month for report in reports for month in report.months]
    return {
        "request": ", ".join(str(report.request) for report in reports if report.request) or "none",
        "rows": sum(month.rows for month in months),
        "months": len(months),
        "rows_left_in_postgres": sum(sum(report.remaining.values()) for report in reports),
        "removed_objects": sum(report.removed_objects for report in reports),
        "months_table": table(
            {"month": "string", "rows": "int", "parts": "int", "bytes": "int", "in the way": "string"},
            [(each.month, each.rows, each.parts, each.size, "; ".join(each.obstacles)) for each in months],
        ),
    }


def of_answer(answer: Answer) -> dict[str, Metadata]:
    """What the archive answered.

    Args:
        answer: of a query.
    """
    frame = answer.frame
    return {
        "rows": len(frame),
        "bytes_scanned": answer.bytes_scanned,
        "share_of_the_months": answer.bytes_scanned / answer.archive_bytes if answer.archive_bytes else 0.0,
        "usd": answer.usd,
        "duration_seconds": answer.seconds,
        "engine": answer.engine,
        "sql": dg.MetadataValue.md(f"```sql\n{answer.sql}\n```"),
        "preview": dg.MetadataValue.table(
            [
                dg.TableRecord({str(name): _cell(value) for name, value in record.items()})
                for record in frame.head(ROWS_SHOWN).to_dict("records")
            ],
            schema=dg.TableSchema([dg.TableColumn(str(name), str(kind)) for name, kind in frame.dtypes.items()]),
        ),
    }


def table(columns: Mapping[str, str], rows: Sequence[Sequence[str | int]]) -> dg.MetadataValue[Any]:
    """A table of at most 200 rows.

    Args:
        columns: name to type.
        rows: values in the order of the columns.
    """
    return dg.MetadataValue.table(
        [dg.TableRecord(dict(zip(columns, row, strict=True))) for row in rows[:ROWS_SHOWN]],
        schema=dg.TableSchema([dg.TableColumn(name, kind) for name, kind in columns.items()]),
    )


def _range(months: Sequence[str]) -> str:
    return " to ".join(dict.fromkeys((months[0], months[-1]))) if months else ""


def _cell(value: object) -> str | int | float | bool | None:
    if value is None or isinstance(value, bool | int | float):
        return value
    return str(value)[:CELL_LENGTH]


def _schema(fields: Sequence[Field], columns: Sequence[Column] = ()) -> dg.TableSchema:
    origins = {field.name: _origin(column, field) for column in columns for field in column.fields}
    return dg.TableSchema(
        [dg.TableColumn(field.name, field.athena, description=origins.get(field.name)) for field in fields]
    )


def _origin(column: Column, field: Field) -> str:
    if field is column.exact:
        return f"{column.source} ({column.postgres_type})"
    return f"{column.source} ({column.postgres_type}), rounded down for reading; {column.exact.name} is exact"
