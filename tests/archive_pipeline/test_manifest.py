"""Manifests and the catalog derived from them, byte for byte."""

import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from archive_pipeline.catalog import catalog_of, publish_catalog
from archive_pipeline.columns import Column, Field
from archive_pipeline.digest import Digest
from archive_pipeline.errors import CatalogError
from archive_pipeline.manifest import Layout, Manifest, Part
from archive_pipeline.months import Month
from archive_pipeline.snapshot import SourceTable
from scaling.errors import UserError
from tests.archive_pipeline.conftest import Room

TABLE = SourceTable("public", "audit_logs")
COLUMNS = (
    Column("id", "uuid", "text", Field("id", "string")),
    Column("Price", "numeric(10,2)", "decimal", Field("price", "decimal(10,2)")),
    Column(
        "created_at",
        "timestamp with time zone",
        "instant",
        Field("created_at_us", "bigint"),
        Field("created_at", "timestamp", utc=True),
    ),
)
MANIFEST = Manifest(
    table="public.audit_logs",
    shard="main",
    month=Month(2025, 7, "Asia/Tokyo"),
    generation=2,
    snapshot_lsn="0/16B3748",
    created_at=datetime(2025, 8, 1, 3, tzinfo=UTC),
    created_by="test 1",
    columns=COLUMNS,
    parts=(
        Part("a/year=2025/month=07/x.parquet", 10, "ab" * 32, Digest(2, 2**70, 5, 9), "01" * 32, "v1"),
        Part("a/year=2025/month=07/y.parquet", 20, "cd" * 32, Digest(1, 7, 3, 4), "02" * 32),
    ),
    kind="late",
    read_from="replica",
    supersedes="ee" * 32,
    salts_sha256="ff" * 32,
)

GOLDEN = (
    '{"bytes":30,"created_at":"2025-08-01T03:00:00Z","created_by":"test 1","erased_rows":0,"erased_sha256":null,'
    '"format":"audit-archive-manifest/2",'
    '"from":"2025-06-30T15:00:00Z","generation":2,"kind":"late","max_created_at_us":9,"merkle_root":"ROOT",'
    '"min_created_at_us":3,"month":"2025-07",'
    '"parts":[{"bytes":10,"key":"a/year=2025/month=07/x.parquet","max_created_at_us":9,'
    f'"merkle_root":"{"01" * 32}","min_created_at_us":5,'
    f'"row_digest":"1180591620717411303424","rows":2,"sha256":"{"ab" * 32}","version_id":"v1"}},'
    '{"bytes":20,"key":"a/year=2025/month=07/y.parquet","max_created_at_us":4,'
    f'"merkle_root":"{"02" * 32}","min_created_at_us":3,'
    f'"row_digest":"7","rows":1,"sha256":"{"cd" * 32}","version_id":null}}],"read_from":"replica",'
    '"row_digest":"1180591620717411303431","row_digest_algorithm":"sum60(md5(row text))/2","rows":3,'
    f'"salts_sha256":"{"ff" * 32}",'
    '"schema":[{"exact":{"name":"id","type":"string"},"kind":"text","postgres_type":"uuid","readable":null,'
    '"source":"id"},{"exact":{"name":"price","type":"decimal(10,2)"},"kind":"decimal",'
    '"postgres_type":"numeric(10,2)","readable":null,"source":"Price"},'
    '{"exact":{"name":"created_at_us","type":"bigint"},"kind":"instant","postgres_type":"timestamp with time zone",'
    '"readable":{"name":"created_at","type":"timestamp"},"source":"created_at"}],'
    '"schema_sha256":"SCHEMA","shard":"main","snapshot_lsn":"0/16B3748",'
    f'"supersedes":"{"ee" * 32}","table":"public.audit_logs",'
    '"time_zone":"Asia/Tokyo","to":"2025-07-31T15:00:00Z"}\n'
)
# RFC 6962: SHA-256 of 0x01 and both roots.
ROOT = hashlib.sha256(b"\x01" + b"\x01" * 32 + b"\x02" * 32).hexdigest()


def test_a_manifest_is_canonical_json_with_totals_bounds_and_schema() -> None:
    assert MANIFEST.to_bytes().decode() == GOLDEN.replace("SCHEMA", MANIFEST.schema_sha256).replace("ROOT", ROOT)


def test_a_manifest_is_read_back_equal() -> None:
    assert Manifest.from_bytes(MANIFEST.to_bytes(), "here") == MANIFEST


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda body: body.replace(b'"rows":3', b'"rows":4'), "here was altered"),
        (lambda body: body.replace(b'"rows":2', b'"rows":1'), "here was altered"),
        (lambda body: body.replace(b'"Price"', b'"Prize"'), "here was altered"),
        (lambda body: body.replace(b"manifest/2", b"manifest/3"), "in format 'audit-archive-manifest/3'"),
        (lambda body: body.replace(b"01" * 32, b"03" * 32), "here was altered"),
        (lambda body: body[:-20], "here is not a manifest"),
        (lambda body: b"{}", "here is not a manifest"),
        (lambda body: b"[]", "here is not a manifest"),
        (lambda body: b"\xff", "here is not a manifest"),
    ],
)
def test_a_manifest_that_was_altered_or_damaged_is_refused(change, sentence: str) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    with pytest.raises(UserError, match=sentence):
        Manifest.from_bytes(change(MANIFEST.to_bytes()), "here")


def test_the_keys_of_parts_and_manifests_keep_data_and_description_apart() -> None:
    layout = Layout("audit_logs")
    month = Month(2025, 7)
    part = layout.part(month, "main", 1, 3, "0123456789abcdef" * 4)
    assert part == "audit_logs/year=2025/month=07/part-main-g0001-00003-0123456789abcdef.parquet"
    assert layout.manifest(month, "main", 1) == "audit_logs_manifests/year=2025/month=07/main-g0001.json"
    assert not layout.catalog.startswith(layout.data)


DDL = """CREATE DATABASE IF NOT EXISTS `audit`;

CREATE EXTERNAL TABLE IF NOT EXISTS `audit`.`audit_logs` (
  `id` string,
  `price` decimal(10,2),
  `created_at` timestamp,
  `created_at_us` bigint,
  `severity` int)
PARTITIONED BY (`year` int, `month` int)
STORED AS PARQUET LOCATION 's3://bucket/audit_logs/'
TBLPROPERTIES ('classification'='parquet','parquet.compression'='ZSTD',
 'projection.enabled'='true',
 'projection.year.type'='integer','projection.year.range'='2025,2026',
 'projection.month.type'='integer','projection.month.range'='1,12','projection.month.digits'='2',
 'storage.location.template'='s3://bucket/audit_logs/year=${year}/month=${month}/');

ALTER TABLE `audit`.`audit_logs` SET TBLPROPERTIES ('projection.year.range'='2025,2026');
"""


def test_the_ddl_declares_every_column_of_every_month_and_just_the_archived_years() -> None:
    severity = Column("severity", "smallint", "integer", Field("severity", "int"))
    later = replace(MANIFEST, month=Month(2026, 1), columns=(*COLUMNS, severity))
    catalog = catalog_of([MANIFEST, later], TABLE, "s3://bucket/audit_logs/")
    assert catalog is not None
    assert catalog.ddl == DDL
    assert (catalog.months, catalog.rows) == (2, 6)


def test_a_column_that_changed_its_type_between_months_is_named() -> None:
    changed = Column("Price", "text", "text", Field("price", "string"))
    later = replace(MANIFEST, month=Month(2026, 1), columns=(COLUMNS[0], changed, COLUMNS[2]))
    with pytest.raises(CatalogError, match=r"price of public.audit_logs is decimal\(10,2\) in month 2025-07 but str"):
        catalog_of([MANIFEST, later], TABLE, "s3://bucket/audit_logs/")


def test_the_catalog_in_the_bucket_follows_the_archive(room: Room) -> None:
    assert publish_catalog(room.target.bucket, room.target.layout, TABLE) is None
    room.archive()
    first = room.target.bucket.read("audit_logs_manifests/catalog.sql").decode()
    room.admin.execute("ALTER TABLE audit_logs ADD COLUMN severity smallint")
    room.archive(Month(2024, 12))
    second = room.target.bucket.read("audit_logs_manifests/catalog.sql").decode()
    assert "'projection.year.range'='2025,2025'" in first
    assert "'projection.year.range'='2024,2025'" in second
    assert "`severity` int" in second


def test_the_manifest_in_the_bucket_is_the_one_the_ledger_knows(room: Room) -> None:
    room.fill(100)
    room.archive()
    (found,) = room.manifests()
    row = room.month_row()
    assert (row["manifest_key"], row["manifest_sha256"]) == (found.key, found.sha256)
    assert row["row_digest"] == found.manifest.digest.value
    assert json.loads(room.target.bucket.read(found.key))["rows"] == 100
