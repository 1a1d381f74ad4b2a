"""Audit logs that are partitioned by month, as after a conversion, for the tests of pruning."""

from datetime import UTC, datetime

import psycopg
from psycopg import sql

from archive_pipeline.months import Month
from archive_pipeline.premade_months import MonthPartition, make_range, partitions_of
from archive_pipeline.prunable import Policy
from archive_pipeline.snapshot import SourceTable
from scaling.databases import Connection, Shard

SCHEMA = "audit_partitions"
TABLE = SourceTable("public", "audit_logs")
AUTO = Policy("auto", retention_months=1)
PROPOSE = Policy("propose", retention_months=1)
OFF = Policy("off", retention_months=1)

CONVERTED = """
DROP VIEW v_recent_audit_logs;
ALTER TABLE audit_logs RENAME TO audit_logs_plain;
CREATE TABLE audit_logs (LIKE audit_logs_plain INCLUDING DEFAULTS INCLUDING COMMENTS, PRIMARY KEY (id, created_at),
    FOREIGN KEY (tenant_id) REFERENCES tenants (id)) PARTITION BY RANGE (created_at);
CREATE INDEX ON audit_logs (created_at);
CREATE TRIGGER audit_logs_stamp_actor BEFORE INSERT ON audit_logs FOR EACH ROW EXECUTE FUNCTION stamp_actor();
ALTER TABLE audit_logs ENABLE ROW LEVEL SECURITY;
ALTER TABLE audit_logs FORCE ROW LEVEL SECURITY;
GRANT SELECT ON audit_logs TO pipeline;
DROP TABLE audit_logs_plain;
"""


def convert(admin: Connection, shard: Shard, *months: Month, first: Month | None = None) -> list[MonthPartition]:
    """Partition the empty table: one partition for each month, and one for everything before `first`."""
    admin.execute(sql.SQL("CREATE SCHEMA {} AUTHORIZATION saas_owner").format(sql.Identifier(SCHEMA)))
    with shard.owner() as owner:
        with owner.transaction():
            owner.execute(CONVERTED)
        made = []
        if first is not None:
            made.append(make_range(owner, TABLE, SourceTable(SCHEMA, "audit_logs_before"), None, first.start))
        for month in months:
            name = f"audit_logs_{month.year:04}_{month.month:02}"
            made.append(make_range(owner, TABLE, SourceTable(SCHEMA, name), month.start, month.end))
        return made


def partitions(shard: Shard) -> dict[str, MonthPartition]:
    with shard.owner() as owner:
        return {each.name: each for each in partitions_of(owner, TABLE)}


def detached(admin: Connection) -> list[str]:
    """Tables of the private schema that are no partitions."""
    rows = admin.execute(
        "SELECT relname FROM pg_class WHERE relnamespace = %s::regnamespace AND relkind = 'r' AND NOT relispartition "
        "ORDER BY 1",
        (SCHEMA,),
    )
    return [name for (name,) in rows]


def leave_detach_pending(shard: Shard, name: str) -> None:
    """Cancel a detach while it waits for a reader, as a timeout or an operator does."""
    with shard.owner(autocommit=False) as reader, shard.owner() as owner:
        reader.execute("SELECT count(*) FROM audit_logs")
        owner.execute("SET lock_timeout = '100ms'")
        try:
            owner.execute(
                sql.SQL("ALTER TABLE audit_logs DETACH PARTITION {} CONCURRENTLY").format(sql.Identifier(SCHEMA, name))
            )
        except psycopg.errors.LockNotAvailable:
            return
    raise AssertionError("the detach was not cancelled")


def instant(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)
