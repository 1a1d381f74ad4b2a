"""What is read of a table, and how a difference is told."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from archive_pipeline.snapshot import SourceTable
from archive_pipeline.table_objects import (
    Constraint,
    Grant,
    TableObjects,
    as_json,
    capture,
    differences,
    from_json,
)
from archive_pipeline.table_statements import IDENTIFIER_BYTES, Names, key_columns, partitioned, script, swap
from devstack.servers import Database
from scaling.databases import Connection
from scaling.errors import UserError

TABLE = SourceTable("public", "audit_logs")


@pytest.fixture
def owner(database: Database) -> Iterator[Connection]:
    with psycopg.connect(database.owner_dsn, autocommit=True) as connection:
        yield connection


@pytest.fixture
def objects(owner: Connection) -> TableObjects:
    return capture(owner, TABLE)


def test_the_objects_survive_being_written_as_json(objects: TableObjects) -> None:
    assert from_json(json.loads(json.dumps(as_json(objects)))) == objects


def test_the_look_depends_neither_on_the_search_path_nor_on_the_time_zone(
    owner: Connection, objects: TableObjects
) -> None:
    owner.execute("SET search_path = pg_catalog; SET TimeZone = 'Asia/Tokyo'; SET DateStyle = 'SQL, DMY'")
    assert capture(owner, TABLE) == objects
    owner.execute("SET search_path = public, auth")
    assert capture(owner, TABLE) == objects


def test_a_table_that_does_not_exist_is_named(owner: Connection) -> None:
    with pytest.raises(UserError, match=r"no table public\.gone"):
        capture(owner, SourceTable("public", "gone"))


CHANGES: dict[str, list[str]] = {
    "DROP POLICY no_back_dating ON audit_logs": ["policy no_back_dating is gone"],
    "ALTER TABLE audit_logs NO FORCE ROW LEVEL SECURITY": ["force row security was True, is False"],
    "GRANT SELECT ON audit_logs TO anon": ["grant of SELECT to anon is new"],
    "REVOKE SELECT (id) ON audit_logs FROM authenticated": ["grant of SELECT (id) to authenticated is gone"],
    "GRANT SELECT (id) ON audit_logs TO authenticated WITH GRANT OPTION": [
        "grant of SELECT (id) to authenticated: grantable was False, is True"
    ],
    "ALTER TABLE audit_logs DISABLE TRIGGER audit_logs_stamp_actor": [
        "trigger audit_logs_stamp_actor: enabled was O, is D"
    ],
    "COMMENT ON COLUMN audit_logs.action IS 'verb'": ["column action: comment was nothing, is verb"],
    "COMMENT ON TABLE audit_logs IS NULL": [
        "comment was Who did what in which tenant. Appended to by the application, never changed., is nothing"
    ],
    "ALTER TABLE audit_logs REPLICA IDENTITY FULL": ["replica identity was d, is f"],
    "DROP INDEX audit_logs_created_at_idx": ["index audit_logs_created_at_idx is gone"],
    "DROP VIEW v_recent_audit_logs": ["view public.v_recent_audit_logs is gone"],
    "ALTER TABLE audit_logs ALTER action SET DEFAULT 'x'": ["column action: default was nothing, is 'x'::text"],
    "CREATE PUBLICATION p FOR TABLE audit_logs": ["publication p is new"],
    "CREATE STATISTICS s ON action, tenant_id FROM audit_logs": ["statistics object public.s is new"],
    "ALTER TABLE audit_logs SET (fillfactor = 70)": ["option fillfactor=70 is new"],
    "ALTER TABLE audit_logs DROP CONSTRAINT audit_logs_tenant_id_fkey": [
        "constraint audit_logs_tenant_id_fkey is gone",
        "referenced table public.tenants is gone",
    ],
    "CREATE TABLE notes (log_id uuid CONSTRAINT notes_log REFERENCES audit_logs)": [
        "referenced by notes_log on public.notes is new"
    ],
}


def test_every_change_of_an_object_is_told_in_words(owner: Connection, objects: TableObjects) -> None:
    for change, told in CHANGES.items():
        with owner.transaction(force_rollback=True):
            owner.execute(change.encode())
            assert differences(objects, capture(owner, TABLE)) == told, change
    assert differences(objects, capture(owner, TABLE)) == []


def test_another_order_of_the_columns_is_a_difference(objects: TableObjects) -> None:
    turned = replace(objects, columns=objects.columns[::-1])
    (told,) = differences(objects, turned)
    assert told.startswith("the order of columns was column id, ")


def test_every_field_of_the_objects_is_compared(objects: TableObjects) -> None:
    other: dict[type, Any] = {bool: True, str: "other", tuple: ("other",), type(None): "other"}
    for name in TableObjects.__slots__:
        value = getattr(objects, name)
        different: dict[str, Any] = {name: not value if isinstance(value, bool) else other[type(value)]}
        changed = replace(objects, **different)
        assert differences(objects, changed), name


def test_the_key_of_the_partitioned_table_is_the_old_one_and_the_time(objects: TableObjects) -> None:
    assert key_columns(objects) == ("id", "created_at")
    key = Constraint("pk", "p", "PRIMARY KEY (created_at, id)", ("created_at", "id"), True, False, True, None)
    both = replace(objects, constraints=(key,))
    assert key_columns(both) == ("created_at", "id")
    assert partitioned(objects).partition_key == "RANGE (created_at)"


def test_the_names_of_the_conversion_of_a_table_with_the_longest_name_are_not_cut_off_by_postgres() -> None:
    names = Names(SourceTable("public", "ä" * 31), "audit_partitions")
    for name in (names.legacy.name, names.check, names.index):
        assert len(name.encode()) <= IDENTIFIER_BYTES
    assert len({names.legacy.name, names.check, names.index}) == 3


def test_names_with_quotes_and_percent_signs_are_quoted_everywhere(objects: TableObjects) -> None:
    from datetime import UTC, datetime

    odd = replace(objects, grants=(*objects.grants, Grant('o"dd; DROP ROLE x', "SELECT", 'c"%s', False)))
    written = script(swap(odd, Names(TABLE, 'p"x'), datetime(2027, 1, 1, tzinfo=UTC)))
    assert 'GRANT SELECT ("c""%s") ON TABLE "public"."audit_logs" TO "o""dd; DROP ROLE x"' in written
    assert '"p""x"."audit_logs_legacy"' in written
