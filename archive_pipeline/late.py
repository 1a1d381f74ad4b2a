"""How an archived month differs from what Postgres holds of it now: rows that came late, were changed, or are gone.

Belongs here: the comparison, row by row, of ids and digests. Does not: what is done about it
(`archive_pipeline.archive`).
"""

from dataclasses import dataclass, field
from pathlib import Path

import duckdb
import pyarrow as pa

from archive_pipeline.digest import DUCKDB_MEMORY, ParquetReader
from archive_pipeline.manifest import Manifest
from archive_pipeline.objects import ArchiveBucket
from archive_pipeline.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Comparison:
    """What differs.

    Attributes:
        ids: of rows that are in Postgres and not in the archive, as text.
        changed: rows of the same id with other content.
        missing: rows that are in the archive and not in Postgres.
        erased: rows that are in Postgres and were erased from the archive; not among `ids`.
    """

    ids: tuple[str, ...] = field(default=(), repr=False)
    changed: int = 0
    missing: int = 0
    erased: int = 0


def compare(snapshot: Snapshot, manifest: Manifest, bucket: ArchiveBucket, directory: Path) -> Comparison:
    """Compare a month in Postgres with its archive, row by row.

    Args:
        snapshot: of the month.
        manifest: its newest generation.
        bucket: where the parts are; each is read once.
        directory: for the parts and for what does not fit in memory.

    Returns:
        What differs.

    Raises:
        UserError: Postgres or the bucket cannot be read.
    """
    settings = f"SET memory_limit = '{DUCKDB_MEMORY}'; SET threads = 1"
    with duckdb.connect(directory / "comparison.duckdb") as tables, ParquetReader(directory) as reader:
        tables.execute(settings)
        tables.execute("CREATE TABLE here (id VARCHAR, md5 VARCHAR); CREATE TABLE there (id VARCHAR, md5 VARCHAR)")

        def put(table: str, batch: pa.RecordBatch) -> None:
            tables.register("batch", batch.rename_columns(["id", "md5"]))
            tables.execute(f"INSERT INTO {table} SELECT * FROM batch")  # noqa: S608 - one of the two above

        snapshot.row_digests(manifest.columns, lambda batch: put("here", batch))
        path = directory / "compared.parquet"
        for part in manifest.parts:
            bucket.download(part.key, path, part.version_id)
            for batch in reader.row_digests(manifest.columns, path):
                put("there", batch)
            path.unlink()
        late = tables.execute("SELECT id FROM here ANTI JOIN there USING (id) ORDER BY id").fetchall()
        counts = tables.execute(
            "SELECT count(*) FILTER (WHERE here.md5 <> there.md5), count(*) FILTER (WHERE here.id IS NULL) "
            "FROM there LEFT JOIN here USING (id)"
        ).fetchone()
        changed, missing = counts or (0, 0)
        return Comparison(tuple(identifier for (identifier,) in late), changed, missing)
