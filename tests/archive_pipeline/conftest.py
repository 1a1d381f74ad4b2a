"""A table of audit logs and a bucket to archive it to."""

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.types.json import Jsonb

from archive_pipeline.archive import MonthReport, Target, archive_month
from archive_pipeline.manifest import Layout, Published, published
from archive_pipeline.months import Month
from archive_pipeline.objects import ArchiveBucket
from archive_pipeline.parts import PartSize
from archive_pipeline.query import Archive
from archive_pipeline.snapshot import SourceTable
from devstack.servers import Bucket, Database
from scaling.databases import Connection, Shard
from scaling.settings import ArchiveSettings, load

JANUARY = Month(2025, 1)
TENANT = uuid.UUID(int=1)


@dataclass
class Room:
    """One database, one bucket, and shorthands."""

    shard: Shard
    admin: Connection
    target: Target
    database: Database
    bucket: Bucket

    def tenant(self, tenant: uuid.UUID = TENANT) -> uuid.UUID:
        self.admin.execute("INSERT INTO tenants (id, name) VALUES (%s, 'T') ON CONFLICT DO NOTHING", (tenant,))
        return tenant

    def log(self, at: datetime | str, **columns: object) -> uuid.UUID:
        """Insert one row into the month."""
        row: dict[str, object] = {
            "id": uuid.uuid4(), "tenant_id": self.tenant(), "action": "test", "created_at": at, **columns
        }  # fmt: skip
        values = [Jsonb(value) if isinstance(value, dict | list) else value for value in row.values()]
        self.admin.execute(
            sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
                self.target.table.identifier,
                sql.SQL(", ").join(map(sql.Identifier, row)),
                sql.SQL(", ").join([sql.Placeholder()] * len(row)),
            ),
            values,
        )
        identifier = row["id"]
        assert isinstance(identifier, uuid.UUID)
        return identifier

    def fill(self, rows: int, month: Month = JANUARY) -> None:
        """Insert rows spread over the month and over 7 tenants."""
        for number in range(7):
            self.tenant(uuid.UUID(int=number + 1))
        self.admin.execute(
            """INSERT INTO audit_logs (tenant_id, action, resource_id, details, ip_address, created_at)
               SELECT lpad(to_hex(g %% 7 + 1), 32, '0')::uuid, 'action ' || g %% 5, nullif(g %% 3, 0)::text,
                      jsonb_build_object('number', g, 'text', repeat(md5(g::text), 4)), '10.0.0.1/24',
                      %(start)s::timestamptz + g * (%(end)s::timestamptz - %(start)s::timestamptz) / %(rows)s
               FROM generate_series(0, %(rows)s - 1) g""",
            {"start": month.start, "end": month.end, "rows": rows},
        )

    def archive(self, month: Month = JANUARY, **options: Any) -> MonthReport:
        return archive_month(self.shard, self.target, month, **options)

    def manifests(self) -> list[Published]:
        return list(published(self.target.bucket, self.target.layout))

    def data_keys(self) -> list[str]:
        return list(self.target.bucket.keys(self.target.layout.data))

    def rows(self, query: str = "SELECT * FROM audit_logs", **months: str) -> list[dict[str, Any]]:
        """Query the archive."""
        with Archive(self.target.bucket, self.target.layout, self.target.table, **months) as archive:
            records = archive.query(query).to_dict("records")
        return [{str(name): value for name, value in record.items()} for record in records]

    def month_row(self, month: Month = JANUARY) -> dict[str, Any]:
        cursor = self.admin.execute("SELECT * FROM archive.months WHERE month = %s", (month.partition_key,))
        row = cursor.fetchone()
        assert cursor.description is not None
        return dict(zip([column.name for column in cursor.description], row or (), strict=False))


@pytest.fixture
def room(
    database: Database, bucket: Bucket, settings_environment: Callable[..., None], tmp_path: Path
) -> Iterator[Room]:
    """An empty table of audit logs and an empty bucket; parts are small, so that a month has several."""
    settings_environment(database, bucket)
    shard = Shard("main", database.dsn, owner_dsn=database.owner_dsn)
    target = Target(
        table=SourceTable("public", "audit_logs"),
        bucket=ArchiveBucket.from_settings(load(ArchiveSettings)),
        layout=Layout("audit_logs"),
        grace=timedelta(hours=1),
        part_size=PartSize(row_group_bytes=100_000, part_bytes=200_000),
        batch_bytes=20_000,
        scratch=tmp_path,
    )
    with psycopg.connect(database.admin_dsn, autocommit=True) as admin:
        yield Room(shard, admin, target, database, bucket)
    shard.close()
