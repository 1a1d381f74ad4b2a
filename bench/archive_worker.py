"""One archiving process of the bench: `python -m bench.archive_worker month|extract`, its answer is a line of JSON.

Belongs here: what runs in a process of its own, so that its memory and time are those of the archive alone: the whole
`archive_month`, or only its extraction and encoding. Does not: the contenders, medians, figures (`bench.archive`).

The extraction alone is what DuckDB's COPY does, rows from Postgres into sorted Parquet files on local disk, without
the MD5 that Postgres computes of each row and without the verification. The product has no such mode, so its two calls
are replaced here; everything else is the code that `archive_month` runs.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
from psycopg import sql

from archive_pipeline import archive, snapshot
from archive_pipeline.clustering import Clusters, boundaries_of, sorted_groups
from archive_pipeline.digest import Digest
from archive_pipeline.manifest import Layout
from archive_pipeline.months import Month
from archive_pipeline.objects import ArchiveBucket
from archive_pipeline.parts import LocalPart, stored_table, write_part
from archive_pipeline.publication import Step, Target
from archive_pipeline.signing import signer_from
from archive_pipeline.snapshot import SourceTable
from scaling.databases import Shard
from scaling.settings import ArchiveSettings, DatabaseSettings, load


def peak_mb() -> float:
    """Peak memory of this process; unlike `ru_maxrss` it begins anew with the program, not with the fork."""
    (line,) = (each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def target() -> Target:
    """What a run of the asset would use, from the same settings."""
    settings = load(ArchiveSettings)
    return Target(
        table=SourceTable.parse(settings.archive_table),
        bucket=ArchiveBucket.from_settings(settings),
        layout=Layout(settings.archive_prefix),
        grace=timedelta(seconds=settings.archive_grace_seconds),
        parallelism=settings.archive_parallelism,
        signer=signer_from(settings),
    )


def whole_month(shard: Shard, month: Month) -> dict[str, Any]:
    """Archive the month: verified, uploaded, read back, signed, recorded."""
    reached: list[tuple[str, float]] = []
    began = time.perf_counter()
    report = archive.archive_month(
        shard, target(), month, on_step=lambda step: reached.append((str(step), time.perf_counter()))
    )
    seconds = time.perf_counter() - began
    if report.outcome is not archive.Outcome.ARCHIVED or report.source_changed or report.damaged:
        raise AssertionError(f"the month was not archived: {report.outcome}")
    return {
        "seconds": seconds,
        "rows": report.manifest.digest.rows,
        "bytes": sum(part.size for part in report.manifest.parts),
        "parts": len(report.manifest.parts),
        "signed": target().signer is not None,
        "steps": _durations(began, reached),
    }


def _durations(began: float, reached: list[tuple[str, float]]) -> dict[str, float]:
    """Seconds that led to each step; those of a step reached several times are added up."""
    found: dict[str, float] = {}
    for name, at in reached:
        found[name] = round(found.get(name, 0.0) + at - began, 3)
        began = at
    return found


def extraction(shard: Shard, month: Month) -> dict[str, Any]:
    """Bring the month into local Parquet files, unverified."""
    wanted = target()
    limit = wanted.part_size.row_group_bytes
    with (
        tempfile.TemporaryDirectory(prefix="bench-extract-") as name,
        mock.patch.object(snapshot, "postgres_row_md5", return_value=sql.SQL("NULL::text")),
        mock.patch.object(snapshot, "digest_of_rows", return_value=Digest()),
    ):
        directory = Path(name)
        began = time.perf_counter()
        with snapshot.take(shard, wanted.table, month) as taken:
            columns = taken.columns()
            extent = taken.extent(columns)
            clusters = Clusters(directory, columns, boundaries_of(extent.sample, -(-extent.row_bytes // limit)))
            taken.extract(columns, extent, clusters.add, parallelism=wanted.parallelism, batch_bytes=wanted.batch_bytes)
        archive._release_memory()  # noqa: SLF001 - as the product does
        extracted = time.perf_counter()
        divided = archive._divide(clusters.close(), wanted)  # noqa: SLF001 - the same parts as the product makes

        def write(number: int) -> LocalPart:
            def tables() -> Iterator[pa.Table]:
                for cluster in divided[number]:
                    yield from map(partial(stored_table, columns), sorted_groups(cluster, columns, limit))

            return write_part(tables(), columns, directory / f"{number:05}.parquet", {})

        with ThreadPoolExecutor(wanted.parallelism) as pool:
            files = list(pool.map(write, range(len(divided))))
        ended = time.perf_counter()
    return {
        "seconds": ended - began,
        "rows": sum(file.rows for file in files),
        "bytes": sum(file.size for file in files),
        "steps": {str(Step.EXTRACTED): round(extracted - began, 3), "encoded": round(ended - extracted, 3)},
    }


def main() -> int:
    """Run once; settings come from the environment."""
    parser = argparse.ArgumentParser(prog="python -m bench.archive_worker")
    parser.add_argument("mode", choices=["month", "extract"])
    parser.add_argument("month")
    options = parser.parse_args()
    shard = Shard("main", load(DatabaseSettings).database_url.get_secret_value())
    month = Month.parse(options.month)
    found = (whole_month if options.mode == "month" else extraction)(shard, month)
    sys.stdout.write(json.dumps({**found, "rss_mb": round(peak_mb(), 1)}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
