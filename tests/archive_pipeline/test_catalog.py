"""The table of Athena: in Glue, as a file, and compared with what is in the bucket."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from uuid import uuid4

import boto3
import pytest
from botocore.stub import Stubber

from archive_pipeline import catalog as module
from archive_pipeline.athena import Workgroup
from archive_pipeline.catalog import (
    Catalog,
    Glue,
    apply_catalog,
    catalog_of,
    check_catalog,
    expand_projection,
    prepare_catalog,
    publish_catalog,
    versioned,
)
from archive_pipeline.columns import Column, Field
from archive_pipeline.errors import CatalogError
from archive_pipeline.months import Month
from archive_pipeline.snapshot import SourceTable
from devstack.aws import Aws
from tests.archive_pipeline.conftest import Room

TABLE = SourceTable("public", "audit_logs")
LOCATION = "s3://bucket/audit_logs/"
CATALOG = Catalog(TABLE, LOCATION, (Field("id", "string"), Field("created_at_us", "bigint")), 2024, 2025, 3, 5)
ID = Column("id", "uuid", "uuid", Field("id", "string"))


def severity(kind: str, athena: str) -> Column:
    return Column("severity", kind, "integer" if athena == "int" else "text", Field("severity", athena))


@pytest.fixture
def glue(aws: Aws, settings_environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Glue:
    """The data catalog with a database of the test's own, which does not exist yet."""
    settings_environment()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    return kept_in(aws, monkeypatch)


def kept_in(aws: Aws, monkeypatch: pytest.MonkeyPatch) -> Glue:
    for name, value in aws.environment().items():
        monkeypatch.setenv(name, value)
    return Glue(boto3.Session().client("glue", region_name="us-east-1"), f"audit_{uuid4().hex[:8]}")


@pytest.fixture
def kept(room: Room, aws: Aws, monkeypatch: pytest.MonkeyPatch) -> tuple[Room, Glue]:
    """A table of audit logs, a bucket, and Glue."""
    return room, kept_in(aws, monkeypatch)


def place(room: Room) -> tuple[Any, Any, SourceTable]:
    return room.target.bucket, room.target.layout, room.target.table


def found(glue: Glue) -> dict[str, Any]:
    table = glue.table("audit_logs")
    assert table is not None
    return dict(table)


def test_the_table_in_glue_is_the_table_of_the_ddl(glue: Glue) -> None:
    assert glue.table("audit_logs") is None
    assert glue.keep(CATALOG)
    table = found(glue)
    assert table["TableType"] == "EXTERNAL_TABLE"
    assert table["PartitionKeys"] == [{"Name": "year", "Type": "int"}, {"Name": "month", "Type": "int"}]
    storage = table["StorageDescriptor"]
    assert storage["Columns"] == [{"Name": "id", "Type": "string"}, {"Name": "created_at_us", "Type": "bigint"}]
    assert storage["Location"] == LOCATION
    assert storage["SerdeInfo"]["SerializationLibrary"].endswith("ParquetHiveSerDe")
    for key, value in re.findall(r"'([\w.]+)'='([^']*)'", CATALOG.ddl):
        assert table["Parameters"][key] == value


# case 53
def test_keeping_the_table_again_writes_nothing(glue: Glue) -> None:
    assert [glue.keep(CATALOG) for _ in range(3)] == [True, False, False]


# case 53
def test_runs_that_keep_the_table_at_once_all_succeed_and_no_year_is_lost(glue: Glue) -> None:
    errors: list[Exception] = []

    def keep(year: int) -> None:
        try:
            glue.keep(replace(CATALOG, first_year=year, last_year=year))
        except CatalogError as error:
            errors.append(error)

    for _ in range(2):
        threads = [threading.Thread(target=keep, args=(year,)) for year in range(2020, 2026)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    # Nobody checks versions here, so an update may hide another's; the next run sees it and mends it.
    for year in range(2020, 2026):
        keep(year)
    assert errors == []
    assert found(glue)["Parameters"]["projection.year.range"] == "2020,2025"


# case 53
def test_what_another_run_made_or_changed_meanwhile_is_read_again_and_is_success(glue: Glue) -> None:
    client = glue._client
    before = {**CATALOG.table_input(), "VersionId": "1"}
    other = {**replace(CATALOG, first_year=2020).table_input(), "VersionId": "2"}
    wanted = replace(CATALOG, last_year=2026)
    with Stubber(client) as stub:
        for answer in (None, before):  # made by another run
            stub.add_response("get_database", {"Database": {"Name": "x"}}) if answer is None else None
            if answer is None:
                stub.add_client_error("get_table", "EntityNotFoundException")
                stub.add_client_error("create_table", "AlreadyExistsException")
            else:
                stub.add_response("get_table", {"Table": answer})
        assert not glue.keep(CATALOG)
        stub.add_response("get_database", {"Database": {"Name": "x"}})
        stub.add_response("get_table", {"Table": before})
        stub.add_client_error("update_table", "ConcurrentModificationException")
        stub.add_response("get_table", {"Table": other})
        stub.add_response(
            "update_table",
            {},
            {
                "DatabaseName": glue.database,
                "TableInput": replace(wanted, first_year=2020).table_input(),
                "VersionId": "2",
            },
        )
        assert glue.keep(wanted)
        stub.assert_no_pending_responses()


def test_years_are_never_taken_away_and_properties_of_others_are_kept(glue: Glue) -> None:
    glue.keep(CATALOG)
    table = CATALOG.table_input()
    table["Parameters"]["owner"] = "platform"
    glue._client.update_table(DatabaseName=glue.database, TableInput=table)  # type: ignore[arg-type]  # a dict
    glue.keep(replace(CATALOG, first_year=2025, last_year=2027, fields=(*CATALOG.fields, Field("x", "int"))))
    parameters = found(glue)["Parameters"]
    assert (parameters["projection.year.range"], parameters["owner"]) == ("2024,2027", "platform")


# case 53
def test_the_year_range_is_extended_before_the_first_month_of_a_year_is_published(kept: tuple[Room, Glue]) -> None:
    room, glue = kept
    room.archive()
    publish_catalog(*place(room), glue)
    columns = room.manifests()[0].manifest.columns
    assert found(glue)["Parameters"]["projection.year.range"] == "2025,2025"
    assert prepare_catalog(*place(room), Month(2026, 1), columns, glue)
    assert found(glue)["Parameters"]["projection.year.range"] == "2025,2026"
    # Another run that knows nothing of the month does not take its year away again.
    publish_catalog(*place(room), glue)
    assert found(glue)["Parameters"]["projection.year.range"] == "2025,2026"
    assert not prepare_catalog(*place(room), Month(2026, 2), columns, glue)


# case 53
def test_a_month_whose_year_glue_does_not_take_must_not_be_published(kept: tuple[Room, Glue]) -> None:
    room, glue = kept
    with Stubber(glue._client) as stub:
        stub.add_client_error("get_database", "AccessDeniedException", "no")
        with pytest.raises(CatalogError, match=r"AWS refuses GetDatabase .*glue:GetDatabase"):
            prepare_catalog(*place(room), Month(2026, 1), (ID,), glue)
    assert not prepare_catalog(*place(room), Month(2026, 1), (ID,), None)


# case 63
def test_columns_added_dropped_and_renamed_between_months_are_all_in_the_table(kept: tuple[Room, Glue]) -> None:
    room, glue = kept
    room.archive()
    room.admin.execute("ALTER TABLE audit_logs ADD COLUMN severity smallint")
    room.admin.execute("ALTER TABLE audit_logs DROP COLUMN user_agent CASCADE")
    room.admin.execute("ALTER TABLE audit_logs RENAME details TO particulars")
    room.archive(Month(2025, 2))
    publish_catalog(*place(room), glue)
    names = [column["Name"] for column in found(glue)["StorageDescriptor"]["Columns"]]
    assert {"severity", "user_agent", "details", "particulars"} < set(names)
    assert len(names) == len(set(names))


# case 63
def test_a_changed_type_is_refused_until_the_changed_column_has_a_version_of_its_own(
    kept: tuple[Room, Glue],
) -> None:
    room, glue = kept
    room.admin.execute("ALTER TABLE audit_logs ADD COLUMN severity smallint")
    room.archive()
    before = room.manifests()[0].manifest.columns
    changed = tuple(severity("text", "string") if column.source == "severity" else column for column in before)
    with pytest.raises(CatalogError, match=r"column severity of public.audit_logs is int in month before but string"):
        prepare_catalog(*place(room), Month(2025, 2), changed, glue)
    apart = versioned(changed, [before])
    assert [column.exact.name for column in apart if column.source == "severity"] == ["severity_v2"]
    assert prepare_catalog(*place(room), Month(2025, 2), apart, glue)
    types = {column["Name"]: column["Type"] for column in found(glue)["StorageDescriptor"]["Columns"]}
    assert (types["severity"], types["severity_v2"]) == ("int", "string")


# case 63
def test_a_column_that_changes_its_type_again_and_back_finds_the_name_of_that_type() -> None:
    first, second, third = (severity(*kind) for kind in (("int", "int"), ("text", "string"), ("float8", "double")))
    two = versioned([ID, second], [[ID, first]])
    three = versioned([ID, third], [[ID, first], two])
    assert [column.exact.name for column in (*two, *three)] == ["id", "severity_v2", "id", "severity_v3"]
    assert versioned([ID, second], [[ID, first], two, three]) == two
    assert versioned([ID, first], [[ID, first], two, three]) == (ID, first)


# case 64
def test_reserved_words_are_quoted_and_no_column_is_called_like_a_partition_key(room: Room) -> None:
    room.admin.execute('ALTER TABLE audit_logs ADD COLUMN "Year" text, ADD COLUMN month int, ADD COLUMN "select" text')
    room.archive()
    catalog = catalog_of([each.manifest for each in room.manifests()], TABLE, LOCATION)
    assert catalog is not None
    names = [field.name for field in catalog.fields]
    assert {"year_", "month_", "select"} < set(names)
    assert not {"year", "month"} & set(names)
    assert "`select` string" in catalog.ddl


def test_the_projection_is_expanded_as_athena_does_it() -> None:
    locations = list(expand_projection(replace(CATALOG, first_year=2024, last_year=2025).properties))
    assert len(locations) == 24
    assert locations[0] == f"{LOCATION}year=2024/month=01/"
    assert locations[-1] == f"{LOCATION}year=2025/month=12/"
    with pytest.raises(CatalogError, match="key month of the table has no projection"):
        list(expand_projection({**CATALOG.properties, "projection.month.range": "NOW"}))
    with pytest.raises(CatalogError, match="not projected"):
        list(expand_projection({}))


# case 62
def test_an_empty_month_is_inside_the_projection_and_has_no_object_to_read(kept: tuple[Room, Glue]) -> None:
    room, glue = kept
    room.archive(Month(2024, 12))
    publish_catalog(*place(room), glue)
    assert f"s3://{room.bucket.name}/audit_logs/year=2024/month=12/" in set(
        expand_projection(found(glue)["Parameters"])
    )
    assert room.data_keys() == []
    assert check_catalog(*place(room), glue) == []


def test_an_archive_that_athena_reads_as_it_is_has_no_finding(kept: tuple[Room, Glue]) -> None:
    room, glue = kept
    room.fill(50)
    room.archive()
    publish_catalog(*place(room), glue)
    looked: list[tuple[int, int]] = []
    assert check_catalog(*place(room), glue, on_progress=lambda done, total: looked.append((done, total))) == []
    total = len(room.data_keys())
    assert looked == [(number + 1, total) for number in range(total)]


# case 54
@pytest.mark.parametrize(
    ("name", "body", "sentence"),
    [
        ("stray.parquet", b"", "is empty; every query of its month fails"),
        ("stray.parquet", b"junk", "is not Parquet; every query"),
        ("stray.parquet", b"PAR1" + b"x" * 20, "is not Parquet; every query"),
        ("stray.parquet", b"PAR1" + b"x" * 20 + b"PAR1", "is read by Athena but listed by no manifest"),
        ("_hidden", b"PAR1" + b"x" * 20 + b"PAR1", "is skipped by Athena"),
        ("../../year=2031/month=01/stray.parquet", b"PAR1xxxxxxxxPAR1", "lies outside the projected months"),
    ],
)
def test_an_object_that_athena_would_choke_on_or_miss_is_found_before_a_query_meets_it(
    kept: tuple[Room, Glue], name: str, body: bytes, sentence: str
) -> None:
    room, glue = kept
    room.fill(10)
    room.archive()
    publish_catalog(*place(room), glue)
    key = f"audit_logs/year=2025/month=01/{name}" if ".." not in name else f"audit_logs/{name.removeprefix('../../')}"
    room.bucket.server.client().put_object(Bucket=room.bucket.name, Key=key, Body=body)
    findings = check_catalog(*place(room), glue)
    assert {finding.subject for finding in findings} == {key}
    assert any(finding.sentence.startswith(sentence) for finding in findings)


def test_every_difference_between_glue_and_the_manifests_is_named(kept: tuple[Room, Glue]) -> None:
    room, glue = kept
    room.fill(10)
    room.archive()
    catalog = publish_catalog(*place(room), glue)
    assert catalog is not None
    glue._client.delete_table(DatabaseName=glue.database, Name="audit_logs")

    def sentences() -> str:
        return "\n".join(finding.sentence for finding in check_catalog(*place(room), glue))

    assert "is missing in Glue" in sentences()
    glue.keep(replace(catalog, first_year=2020))
    assert "projects the years 2020 to 2025, but months are archived only of 2025 to 2025" in sentences()
    table = catalog.table_input()
    storage = table["StorageDescriptor"]
    storage["Columns"] = [{"Name": "id", "Type": "int"}, {"Name": "more", "Type": "int"}, *storage["Columns"][2:]]
    storage["Location"] = "s3://elsewhere/"
    table["Parameters"]["projection.year.range"] = "2026,2026"
    glue._client.update_table(DatabaseName=glue.database, TableInput=table)  # type: ignore[arg-type]  # a dict
    for difference in (
        "column id is int, not string in Glue",
        "column tenant_id is missing in Glue",
        "column more is in no manifest in Glue",
        "Location is s3://elsewhere/, not s3://",
        "property projection.year.range is '2026,2026', not '2025,2026' in Glue",
        "lies outside the projected months",
    ):
        assert difference in sentences()
    glue.keep(catalog)
    (finding,) = check_catalog(*place(room), glue)
    assert "projects the years 2025 to 2026" in finding.sentence


def test_a_part_that_is_gone_and_a_file_that_is_not_the_ddl_are_found(room: Room) -> None:
    room.fill(10)
    room.archive()
    bucket, layout, _ = place(room)
    gone = room.data_keys()[0]
    bucket.delete(gone)
    bucket.replace_bytes(layout.catalog, b"-- mine", content_type="application/sql")
    findings = {finding.subject: finding.sentence for finding in check_catalog(*place(room))}
    assert findings[gone].startswith("is listed by a manifest but is not in the bucket")
    assert findings[layout.catalog].startswith("is not the DDL of the manifests")


def test_everything_athena_needs_is_kept_in_one_go_and_stands_in_the_file(kept: tuple[Room, Glue]) -> None:
    room, glue = kept
    room.fill(10)
    room.archive()
    group = Workgroup(
        boto3.Session().client("athena", region_name="us-east-1"),
        glue.database,
        database=glue.database,
        output="s3://results/",
        cutoff_bytes=20_000_000,
        region="us-east-1",
        poll_seconds=0.01,
    )
    for _ in range(2):
        catalog = apply_catalog(*place(room), glue, group)
        assert check_catalog(*place(room), glue, group) == []
    assert catalog is not None
    client = boto3.Session().client("athena", region_name="us-east-1")
    assert len(client.list_named_queries(WorkGroup=group.name)["NamedQueryIds"]) == len(catalog.saved_queries) == 3
    started = client.list_query_executions(WorkGroup=group.name)["QueryExecutionIds"]
    texts = {client.get_query_execution(QueryExecutionId=each)["QueryExecution"]["Query"] for each in started}
    assert texts == {catalog.view_ddl}
    file = room.target.bucket.read(room.target.layout.catalog).decode()
    assert catalog.ddl in file
    assert catalog.view_ddl in file
    for query in catalog.saved_queries:
        assert f"-- {query.description}\n--   {query.sql.splitlines()[0]}" in file


def test_the_command_prints_applies_and_checks(
    kept: tuple[Room, Glue], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    room, glue = kept
    command = [sys.executable, "-m", "archive_pipeline.catalog", "ddl"]
    nothing = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert (nothing.returncode, nothing.stdout) == (2, "")
    assert "no month of public.audit_logs is archived" in nothing.stderr
    room.fill(10)
    room.archive()
    assert module.main(["apply"]) == 0
    assert "set ARCHIVE_ATHENA_WORKGROUP to keep it in Glue too" in capsys.readouterr().out
    monkeypatch.setenv("ARCHIVE_ATHENA_WORKGROUP", glue.database)
    monkeypatch.setenv("ARCHIVE_ATHENA_DATABASE", glue.database)
    monkeypatch.setenv("ARCHIVE_ATHENA_OUTPUT", "s3://results/")
    assert module.main(["check"]) == 1
    assert "is missing in Glue; run python -m archive_pipeline.catalog apply" in capsys.readouterr().out
    assert module.main(["apply"]) == 0
    assert f"1 months of 2025 to 2025: s3://{room.bucket.name}/" in capsys.readouterr().out
    assert module.main(["check"]) == 0
    assert "as the manifests list it" in capsys.readouterr().out
    assert module.main(["ddl"]) == 0
    assert f"CREATE EXTERNAL TABLE IF NOT EXISTS `{glue.database}`.`audit_logs`" in capsys.readouterr().out
