"""The digest: Postgres and DuckDB agree over every type, and no two different tables look alike."""

import json
import math
import struct
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from archive_pipeline.columns import Column
from archive_pipeline.digest import Digest, ParquetReader
from archive_pipeline.merkle import Seeds, leaf, root
from archive_pipeline.parts import stored_table, write_part
from archive_pipeline.snapshot import SourceTable, take
from scaling.errors import UserError
from tests.archive_pipeline.conftest import JANUARY, Room

per_example = settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # an example takes 0.2 s; shrinking one takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40) | st.sampled_from(
    [
        "",
        "-",
        "1:a",
        "\\N",
        "NULL",
        "\n",
        "\t",
        "'\"",
        "😀",
        "\u202eabc",
        "a" * 5000,
        "\u00e9",
        "e\u0301",
        " ",
        "\ufeff",
    ]
)
documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
).map(json.dumps)


def numbers(precision: int, scale: int) -> st.SearchStrategy[str]:
    limit = 10**precision - 1
    return st.integers(-limit, limit).map(lambda unscaled: f"{unscaled}e-{scale}")


TYPES: dict[str, tuple[str, st.SearchStrategy[Any]]] = {
    "text": ("text", text),
    "varchar": ("varchar(60)", text.filter(lambda value: len(value) <= 60)),
    "char": ("char(5)", st.text(st.characters(codec="ascii", min_codepoint=32), max_size=5)),
    "mood": ("mood", st.sampled_from(["glad", "SAD", "so-so, really"])),
    "share": ("share", numbers(4, 3)),
    "uuid": ("uuid", st.uuids()),
    "small": ("smallint", st.integers(-(2**15), 2**15 - 1)),
    "int": ("integer", st.integers(-(2**31), 2**31 - 1)),
    "big": ("bigint", st.integers(-(2**63), 2**63 - 1)),
    "flag": ("boolean", st.booleans()),
    "real": ("real", st.floats(width=32)),
    "double": ("double precision", st.floats()),
    "money": ("money", st.sampled_from(["0", "-1234567.89", "0.01"])),
    "price": ("numeric(10,2)", numbers(10, 2)),
    "ratio": ("numeric(2,2)", numbers(2, 2)),
    "huge": ("numeric(38,3)", numbers(38, 3)),
    "whole": ("numeric(38)", numbers(38, 0)),
    "round": ("numeric(5,-2)", numbers(5, 0)),
    "wide": ("numeric(60,5)", numbers(60, 5)),
    "free": (
        "numeric",
        numbers(40, 20) | st.sampled_from(["NaN", "Infinity", "-Infinity", "1e131071", "1.10", "1.1", "-0"]),
    ),
    "at": (
        "timestamptz",
        st.datetimes(timezones=st.just(UTC)).map(datetime.isoformat)
        | st.sampled_from(
            ["infinity", "-infinity", "0044-03-15 12:00 BC", "294246-12-31", "1969-12-31 23:59:59.999999Z"]
        ),
    ),
    "wall": ("timestamp", st.datetimes().map(datetime.isoformat) | st.sampled_from(["infinity", "-infinity"])),
    "day": (
        "date",
        st.dates().map(date.isoformat) | st.sampled_from(["infinity", "-infinity", "0001-01-01 BC", "5874897-12-31"]),
    ),
    "time": ("time", st.sampled_from(["00:00", "24:00", "23:59:59.999999"])),
    "timetz": ("timetz", st.sampled_from(["00:00+00", "23:59:59.9+14", "12:00-03:30"])),
    "span": ("interval", st.sampled_from(["0", "-1 mon +2 days", "1 year 3 days 04:05:06.7", "-00:00:00.000001"])),
    "bytes": ("bytea", st.binary(max_size=30)),
    "json": ("json", documents | st.sampled_from(['{"b": 1,  "a":2}', '{"a":1,"a":2}', '"\\u0000"'])),
    "jsonb": ("jsonb", documents | st.sampled_from(["1e1000", "[" * 500 + "]" * 500, '{"b": 1,  "a":2}'])),
    "ip": ("inet", st.ip_addresses().map(str) | st.sampled_from(["10.0.0.1/24", "10.0.0.1", "::1/64", "0.0.0.0/0"])),
    "net": ("cidr", st.sampled_from(["10.0.0.0/8", "::/0"])),
    "mac": ("macaddr", st.just("08:00:2b:01:02:03")),
    "bits": ("bit(3)", st.sampled_from(["101", "000"])),
    "words": ("text[]", st.lists(st.none() | text, max_size=3)),
    "grid": ("integer[]", st.sampled_from(["{{1,2},{3,NULL}}", "{}", "{NULL}"])),
    "moments": ("timestamptz[]", st.just('{infinity,"2025-01-01 00:00:00.000001+00"}')),
    "reals": ("double precision[]", st.just("{NaN,-0,1e300,0.1}")),
    "range": ("tstzrange", st.sampled_from(["empty", "[2025-01-01,2025-02-01)", "(,)"])),
    "point": ("point", st.just("(0.30000000000000004,1e-300)")),
    "blobs": ("bytea[]", st.just(r'{"\\x01ff"}')),
    "search": ("tsvector", st.just("'a':1 'b':2")),
}

CREATE = f"""
CREATE TYPE mood AS ENUM ('glad', 'SAD', 'so-so, really');
CREATE DOMAIN share AS numeric(4, 3);
CREATE TABLE every_type (
  id uuid NOT NULL, tenant_id uuid, created_at timestamptz NOT NULL,
  {", ".join(f'"{name}" {kind}' for name, (kind, _) in TYPES.items())}
);
GRANT SELECT ON every_type TO pipeline;
"""

rows = st.fixed_dictionaries(
    {
        "id": st.uuids(),
        "tenant_id": st.none() | st.uuids(),
        "created_at": st.integers(0, 31 * 86_400_000_000 - 1).map(
            lambda us: datetime(2025, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)
        ),
        **{name: st.none() | values for name, (_, values) in TYPES.items()},
    }
)


@pytest.fixture
def every_type(room: Room) -> Room:
    room.admin.execute(CREATE.encode())
    room.target = room.target.__class__(
        SourceTable("public", "every_type"),
        room.target.bucket,
        room.target.layout,
        room.target.grace,
        room.target.part_size,
        room.target.batch_bytes,
        room.target.scratch,
    )
    return room


def insert(room: Room, table: list[dict[str, Any]]) -> None:
    room.admin.execute("TRUNCATE every_type")
    casts = {name: kind for name, (kind, _) in TYPES.items()}
    names = ["id", "tenant_id", "created_at", *casts]
    places = ["%(id)s", "%(tenant_id)s", "%(created_at)s", *(f"%({name})s::{kind}" for name, kind in casts.items())]
    room.admin.execute("SET TimeZone = 'UTC'")
    with room.admin.cursor() as cursor:
        cursor.executemany(
            f"INSERT INTO every_type ({', '.join(map(json.dumps, names))}) VALUES ({', '.join(places)})".encode(), table
        )


@contextmanager
def both_sides(room: Room, directory: Path) -> Iterator[tuple[tuple[Column, ...], Digest, Digest, list[Path]]]:
    with take(room.shard, room.target.table, JANUARY) as snapshot, ParquetReader(directory) as reader:
        columns = snapshot.columns()
        batches: list[pa.RecordBatch] = []
        sent = snapshot.extract(columns, snapshot.extent(columns), batches.append, parallelism=2, batch_bytes=2000)
        paths = [
            write_part([stored_table(columns, batch)], columns, directory / f"{number}.parquet", {}).path
            for number, batch in enumerate(batches)
        ]
        verified = [reader.verify(columns, path, Seeds.fresh(pq.read_metadata(path).num_rows)) for path in paths]
        assert not [name for each in verified for name in each.wrongly_rounded]
        assert sum((each.digest for each in verified), Digest()) == sent
        assert snapshot.column_digests(columns) == reader.column_digests(columns, paths)
        here = sum((reader.digest(columns, path) for path in paths), Digest())
        yield columns, snapshot.digest(columns), here, paths


@per_example
@given(st.lists(rows, max_size=6))
def test_both_engines_compute_the_same_digest_for_any_values_of_any_type(
    every_type: Room, tmp_path: Path, table: list[dict[str, Any]]
) -> None:
    insert(every_type, table)
    with both_sides(every_type, tmp_path) as (_, there, here, _):
        assert here == there
        assert here.rows == len(table)


def test_floats_are_stored_bit_for_bit(every_type: Room, tmp_path: Path) -> None:
    values = [0.1, -0.0, math.inf, 5e-324, 1e22, math.nan]
    blank = dict.fromkeys(["tenant_id", *TYPES])
    insert(
        every_type,
        [
            {**blank, "id": uuid.uuid4(), "created_at": datetime(2025, 1, 1 + n, tzinfo=UTC), "double": v}
            for n, v in enumerate(values)
        ],
    )
    with both_sides(every_type, tmp_path) as (_, _, _, paths):
        stored = [value for path in paths for value in pq.read_table(path)["double"].to_pylist()]
    assert [struct.pack(">d", value) for value in stored] == [struct.pack(">d", value) for value in values]


def test_the_merkle_root_of_a_file_is_that_of_its_rows_leaves_in_the_order_of_the_file(
    every_type: Room, tmp_path: Path
) -> None:
    insert(every_type, [{**BLANK, "id": uuid.UUID(int=n), "text": f"row {n}"} for n in range(9)])
    seeds = Seeds.fresh(9)
    with both_sides(every_type, tmp_path) as (columns, *_, paths), ParquetReader(tmp_path) as reader:
        whole = tmp_path / "whole.parquet"
        pq.write_table(pa.concat_tables([pq.read_table(path) for path in paths]), whole)
        verified = reader.verify(columns, whole, seeds)
        (leaves,) = reader.leaves(columns, whole, seeds)
        texts = [reader.row_text(columns, whole, row) for row in range(9)]
        assert [leaf(seeds.salt(row), text) for row, text in enumerate(texts)] == leaves
        assert root(leaves) == verified.merkle_root
        assert "5:row 3" in texts[3]
        assert reader.rows_where("id", str(uuid.UUID(int=3)), whole) == [3]
        with pytest.raises(IndexError):
            reader.row_text(columns, whole, 9)


BLANK = {"id": uuid.UUID(int=1), "created_at": datetime(2025, 1, 1, tzinfo=UTC), **dict.fromkeys(["tenant_id", *TYPES])}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([{"text": None}], [{"text": ""}]),
        ([{"text": None}], [{"text": "-"}]),
        ([{"text": "a", "varchar": "b"}], [{"text": "ab", "varchar": ""}]),
        ([{"text": "1:x"}], [{"text": "x"}]),
        ([{"text": "a|"}], [{"text": "a"}]),
        ([{"int": 1, "big": None}], [{"int": None, "big": 1}]),
        ([{"text": "\u00e9"}], [{"text": "e\u0301"}]),
        ([{"at": "2025-01-01 00:00:00.000001Z"}], [{"at": "2025-01-01 00:00:00.000002Z"}]),
        ([{"at": "infinity"}], [{"at": None}]),
        ([{"free": "1.10"}], [{"free": "1.1"}]),
        ([{"json": '{"a":1,"b":2}'}], [{"json": '{"b":2,"a":1}'}]),
        ([{"ip": "10.0.0.1/24"}], [{"ip": "10.0.0.1"}]),
        ([{"double": 0.0}], [{"double": -0.0}]),
        ([{"words": []}], [{"words": None}]),
        ([{"text": "a"}, {"text": "a"}, {"text": "b"}], [{"text": "a"}, {"text": "b"}, {"text": "b"}]),
        ([{"int": 1}, {"int": 4}], [{"int": 2}, {"int": 3}]),
    ],
)
def test_different_tables_have_different_digests(
    every_type: Room, one: list[dict[str, Any]], other: list[dict[str, Any]]
) -> None:
    values = []
    for table in (one, other):
        insert(every_type, [{**BLANK, **row} for row in table])
        with take(every_type.shard, every_type.target.table, JANUARY) as snapshot:
            values.append(snapshot.digest(snapshot.columns()).value)
    assert values[0] != values[1]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"price": "NaN"}, "hold NaN in price"),
        ({"at": "294276-12-31"}, "a timestamp after the year 294246"),
    ],
)
def test_a_value_that_cannot_be_stored_without_loss_is_refused_with_a_sentence(
    every_type: Room, row: dict[str, Any], sentence: str
) -> None:
    insert(every_type, [{**BLANK, **row}])
    with pytest.raises(UserError, match=sentence):
        every_type.archive()
    assert every_type.data_keys() == []
    assert sentence in every_type.month_row()["error"]


def test_a_month_of_every_type_is_archived_and_answers_queries(every_type: Room) -> None:
    insert(every_type, [{**BLANK, "price": "12.50", "at": "infinity", "day": "2025-02-03", "words": ["a", None]}])
    assert every_type.archive().source_changed == ""
    (row,) = every_type.rows("SELECT price + 1 AS price, at_us, day, day_days, words, created_at FROM every_type")
    assert row["price"] == 13.5
    assert row["at_us"] == 2**63 - 1
    assert str(row["day"])[:10] == "2025-02-03"
    assert row["words"] == '["a",null]'


def test_the_role_and_database_settings_of_the_session_do_not_change_the_digest(every_type: Room) -> None:
    printed = {"span": "1 day", "range": "[2025-01-01,)", "point": "(0.30000000000000004,0)", "blobs": r'{"\\xff"}'}
    insert(every_type, [{**BLANK, **printed}])

    def digest() -> Digest:
        with take(every_type.shard, every_type.target.table, JANUARY) as snapshot:
            return snapshot.digest(snapshot.columns())

    before = digest()
    session = ("TimeZone = 'Asia/Tokyo'", "DateStyle = German", "IntervalStyle = iso_8601", "bytea_output = escape")
    for setting in (*session, "extra_float_digits = 0"):
        change = f"ALTER ROLE pipeline IN DATABASE {every_type.database.name} SET {setting}"
        every_type.admin.execute(change.encode())
    assert digest() == before
