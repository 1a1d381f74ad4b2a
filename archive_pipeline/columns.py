"""How each Postgres column travels: read in SQL, held in Parquet, declared in Athena, digested on both sides.

Belongs here: the type table and the discovery of a table's columns from the catalog.
Does not: running the SQL over rows, or the digest itself.

Only `id`, `tenant_id` and `created_at` are assumed to exist. Athena rules the types: it has no uuid and no JSON
column, rounds timestamps to milliseconds (so 23:59:59.9996 on the 31st would surface in the next month) and reads
names in lower case. Therefore

- anything without an exact Athena type is stored as the text Postgres prints (uuid, json, inet, enum, interval,
  unbounded numeric, …), arrays as JSON text;
- a point in time is stored twice: floored to milliseconds for people, and exact as an integer beside it
  (``created_at`` and ``created_at_us``; dates as ``…_days``). Infinity has no timestamp but has an integer.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from psycopg import sql

from scaling.databases import Connection
from scaling.errors import UserError

Kind = Literal[
    "text",
    "uuid",
    "inet",
    "integer",
    "bigint",
    "boolean",
    "float",
    "double",
    "bytes",
    "decimal",
    "json",
    "instant",
    "wall",
    "date",
]
"""A row of the type table; ``instant`` is a timestamptz, ``wall`` a timestamp without zone."""

ARROW_TYPES = {
    "string": pa.string(),
    "int": pa.int32(),
    "bigint": pa.int64(),
    "boolean": pa.bool_(),
    "float": pa.float32(),
    "double": pa.float64(),
    "binary": pa.binary(),
    "date": pa.date32(),
}
DECIMAL = re.compile(r"decimal\((\d+),(\d+)\)")

KEY_COLUMNS = ("id", "tenant_id", "created_at")
PARTITION_COLUMNS = ("year", "month")

# Athena and Parquet readers agree on the years 0001-9999 only; outside, the readable column is NULL.
FIRST_US, LAST_US = -62_135_596_800_000_000, 253_402_300_799_999_999
FIRST_DAY, LAST_DAY = -719_162, 2_932_896
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1

EXACT_US = f"""CASE WHEN isfinite({{c}}) THEN (extract(epoch FROM {{c}}) * 1000000)::bigint
 WHEN {{c}} > '2000-01-01' THEN {INT64_MAX} WHEN {{c}} IS NOT NULL THEN '{INT64_MIN}'::bigint END"""
EXACT_DAYS = f"""CASE WHEN isfinite({{c}}) THEN {{c}} - DATE '1970-01-01'
 WHEN {{c}} > '2000-01-01' THEN {INT32_MAX} WHEN {{c}} IS NOT NULL THEN '{INT32_MIN}'::integer END"""


@dataclass(frozen=True, slots=True)
class Encoding:
    """How values of one kind are read from Postgres and written as text for the digest by both engines.

    The two texts must be equal, byte for byte, for equal values.

    Attributes:
        read: SQL that reads the column ``{c}``; NULL stays NULL.
        postgres_text: SQL text of a read value ``{v}`` in Postgres.
        duckdb_text: SQL text of the stored value ``{v}`` in DuckDB.
        bounded: the text is never empty and never holds ``|``, so it needs no length before it in the digest.
    """

    read: str
    postgres_text: str
    duckdb_text: str
    bounded: bool = True


ENCODINGS: dict[Kind, Encoding] = {
    "text": Encoding("{c}::text", "{v}", "{v}", bounded=False),
    # A uuid travels as its 16 bytes: Postgres prints four of them a row slower than it reads the row.
    "uuid": Encoding("{c}::uuid", "{v}", "{v}"),
    "inet": Encoding("{c}::text", "{v}", "{v}"),
    "integer": Encoding("{c}::integer", "{v}", "{v}"),
    "bigint": Encoding("{c}::bigint", "{v}", "{v}"),
    "boolean": Encoding("{c}", "{v}::text", "{v}"),
    # Engines print floats differently, so their bits are compared.
    "float": Encoding("{c}", "('x' || encode(float4send({v}), 'hex'))::bit(32)", "{v}::BIT"),
    "double": Encoding("{c}", "('x' || encode(float8send({v}), 'hex'))::bit(64)", "{v}::BIT"),
    "bytes": Encoding("{c}", "encode({v}, 'hex')", "lower(hex({v}))", bounded=False),
    # ADBC reads numerics as text; DuckDB prints numeric(2,2) zero as '.00' where Postgres prints '0.00'.
    "decimal": Encoding("{c}::text", "{v}", r"regexp_replace({v}::VARCHAR, '^(-?)\.', '\10.')"),
    # An array whose first index is not 1 prints it, as '[0:1]={a,b}', and JSON has no place for it: that text is kept.
    "json": Encoding(
        "CASE left({c}::text, 1) WHEN '[' THEN to_json({c}::text) ELSE to_json({c}) END::text",
        "{v}",
        "{v}",
        bounded=False,
    ),
    "instant": Encoding(EXACT_US, "{v}", "{v}"),
    "wall": Encoding(EXACT_US, "{v}", "{v}"),
    "date": Encoding(EXACT_DAYS, "{v}", "{v}"),
}


@dataclass(frozen=True, slots=True)
class Field:
    """One column as it is stored.

    Attributes:
        name: lower case, unique, never ``year`` or ``month``.
        athena: its type in Athena.
        utc: a timestamp that is an instant, not a wall clock's reading; Athena does not tell them apart.
    """

    name: str
    athena: str
    utc: bool = False

    @property
    def arrow(self) -> pa.DataType:
        """Its type in the Parquet file."""
        if self.athena == "timestamp":
            return pa.timestamp("ms", "UTC" if self.utc else None)
        if matched := DECIMAL.fullmatch(self.athena):
            return pa.decimal128(int(matched[1]), int(matched[2]))
        return ARROW_TYPES[self.athena]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the source table and the fields it is stored in.

    Attributes:
        source: its name in Postgres.
        postgres_type: as ``format_type`` prints it.
        kind: row of the type table.
        exact: the field that holds the value without loss; the digest covers it.
        readable: the rounded field for people beside it (times and dates only), computed from `exact`.
    """

    source: str
    postgres_type: str
    kind: Kind
    exact: Field
    readable: Field | None = None

    @property
    def fields(self) -> tuple[Field, ...]:
        """The stored fields, the readable one first."""
        return (self.exact,) if self.readable is None else (self.readable, self.exact)

    def read(self, relation: str = "r") -> sql.Composed:
        """SQL that reads the column in the form it travels in.

        Args:
            relation: alias of the table.
        """
        return sql.SQL(ENCODINGS[self.kind].read).format(c=sql.Identifier(relation, self.source))


def arrow_schema(columns: Sequence[Column]) -> pa.Schema:
    """The schema of the Parquet files.

    Args:
        columns: of the table, in order.
    """
    return pa.schema([pa.field(field.name, field.arrow) for column in columns for field in column.fields])


def stored(columns: Sequence[Column], batch: pa.RecordBatch) -> pa.RecordBatch:
    """Turn a batch as read from Postgres into the stored schema.

    Args:
        columns: of the table.
        batch: one array for each column, in their order, read with `Column.read`.

    Returns:
        The batch with every stored field.
    """
    arrays = []
    for column, array in zip(columns, batch.columns, strict=True):
        if column.readable is not None:
            arrays.append(_readable(column, array))
        arrays.append(_uuid_text(array) if column.kind == "uuid" else array.cast(column.exact.arrow))
    return pa.RecordBatch.from_arrays(arrays, schema=arrow_schema(columns))


UUID_BYTES = 16
# Where a byte's two digits go in the 36 characters, and the dashes between.
DIGIT_PAIRS = np.frombuffer(bytes(range(256)).hex().encode(), dtype=np.uint16)
PAIRS_BEFORE_DASH = (4, 6, 8, 10)


def _uuid_text(array: pa.Array) -> pa.Array:
    """Print uuids as Postgres does; as one table look-up, 30 times faster than a cast for each."""
    storage = array.storage if isinstance(array, pa.ExtensionArray) else array
    rows = len(storage)
    offset = storage.offset * UUID_BYTES
    raw = np.frombuffer(storage.buffers()[1] or b"", dtype=np.uint8, count=rows * UUID_BYTES, offset=offset)
    digits = DIGIT_PAIRS[raw].view(np.uint8).reshape(rows, 2 * UUID_BYTES)
    text = np.full((rows, 36), ord("-"), dtype=np.uint8)
    start = 0
    for number, end in enumerate((*PAIRS_BEFORE_DASH, UUID_BYTES)):
        text[:, 2 * start + number : 2 * end + number] = digits[:, 2 * start : 2 * end]
        start = end
    offsets = np.arange(rows + 1, dtype=np.int32) * 36
    valid = storage.is_valid()
    buffers = [valid.buffers()[1] if storage.null_count else None, pa.py_buffer(offsets), pa.py_buffer(text)]
    return pa.Array.from_buffers(pa.string(), rows, buffers, storage.null_count)


def _readable(column: Column, exact: pa.Array) -> pa.Array:
    assert column.readable is not None  # noqa: S101 - narrows the type
    first, last = (FIRST_DAY, LAST_DAY) if column.kind == "date" else (FIRST_US, LAST_US)
    within = pc.and_(pc.greater_equal(exact, first), pc.less_equal(exact, last))
    kept = pc.if_else(within, exact, pa.scalar(None, exact.type))
    if column.kind == "date":
        return kept.cast(pa.int32()).cast(column.readable.arrow)
    microseconds = kept.cast(pa.timestamp("us", column.readable.arrow.tz))
    return pc.floor_temporal(microseconds, unit="millisecond").cast(column.readable.arrow)


RELATION = """
SELECT c.oid, row_security_active(c.oid), current_user
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = %s AND c.relname = %s AND c.relkind IN ('r', 'p')
"""

# A domain is followed to its base type, which also carries the precision of a numeric.
COLUMNS = """
WITH RECURSIVE resolved AS (
  SELECT attnum, attname, format_type(atttypid, atttypmod) AS declared, atttypid AS type, atttypmod AS modifier
  FROM pg_attribute WHERE attrelid = %(table)s::oid AND attnum > 0 AND NOT attisdropped
  UNION ALL
  SELECT r.attnum, r.attname, r.declared, t.typbasetype, CASE WHEN r.modifier = -1 THEN t.typtypmod ELSE r.modifier END
  FROM resolved r JOIN pg_type t ON t.oid = r.type WHERE t.typtype = 'd'
)
SELECT r.attname, r.declared, CASE WHEN n.nspname = 'pg_catalog' THEN t.typname ELSE '' END, t.typcategory = 'A',
       r.modifier, has_column_privilege(%(table)s::oid, r.attnum, 'SELECT')
FROM resolved r JOIN pg_type t ON t.oid = r.type JOIN pg_namespace n ON n.oid = t.typnamespace
WHERE t.typtype <> 'd' ORDER BY r.attnum
"""


def discover(connection: Connection, schema: str, table: str) -> tuple[Column, ...]:
    """Read the table's columns from the catalog.

    Args:
        connection: as the role that will read the rows.
        schema: of the table.
        table: plain or partitioned.

    Returns:
        Every column, in the table's order.

    Raises:
        UserError: the table or a key column is missing, ``created_at`` is no timestamptz, or the role may not
            read all rows and columns; a filtered copy would look complete and not be.
    """
    qualified = f"{schema}.{table}"
    found = connection.execute(RELATION, (schema, table)).fetchone()
    if found is None:
        raise UserError(f"table {qualified} does not exist; set ARCHIVE_TABLE to the schema.table of the audit logs")
    oid, filtered, role = found
    if filtered:
        raise UserError(
            f"row-level security hides rows of {qualified} from role {role}, so an archive would look complete and "
            f"not be; ALTER ROLE {role} BYPASSRLS"
        )
    rows = connection.execute(COLUMNS, {"table": oid}).fetchall()
    if denied := [name for name, *_, readable in rows if not readable]:
        raise UserError(
            f"role {role} may not read {', '.join(denied)} of {qualified}; GRANT SELECT ON {qualified} TO {role}"
        )
    types = {name: (base, declared) for name, declared, base, *_ in rows}
    for key in KEY_COLUMNS:
        if key not in types:
            raise UserError(f"{qualified} has no column {key}, which every archived table must have")
    if types["created_at"][0] != "timestamptz":
        raise UserError(f"{qualified}.created_at is {types['created_at'][1]} but must be timestamp with time zone")

    names = _field_names([name for name, *_ in rows])
    taken = set(names.values())
    columns = []
    for name, declared, base, is_array, modifier, _ in rows:
        column = _column(name, names[name], declared, "array" if is_array else base, modifier, taken)
        taken.update(field.name for field in column.fields)
        columns.append(column)
    return tuple(columns)


def _field_names(sources: Sequence[str]) -> dict[str, str]:
    # The key columns keep their names whatever else the table holds.
    names: dict[str, str] = {}
    taken = {*PARTITION_COLUMNS, "created_at_us"}
    for source in sorted(sources, key=lambda name: name not in KEY_COLUMNS):
        names[source] = _free(re.sub(r"[^a-z0-9_]", "_", source.lower()), taken)
        taken.add(names[source])
    return names


def _free(name: str, taken: Collection[str]) -> str:
    while name in taken:
        name += "_"
    return name


def _column(source: str, name: str, declared: str, base: str, modifier: int, taken: Collection[str]) -> Column:
    def one(kind: Kind, athena: str) -> Column:
        return Column(source, declared, kind, Field(name, athena))

    match base:
        case "timestamptz" | "timestamp":
            exact = "created_at_us" if source == "created_at" else _free(f"{name}_us", taken)
            kind: Kind = "instant" if base == "timestamptz" else "wall"
            readable = Field(name, "timestamp", utc=kind == "instant")
            return Column(source, declared, kind, Field(exact, "bigint"), readable)
        case "date":
            return Column(source, declared, "date", Field(_free(f"{name}_days", taken), "int"), Field(name, "date"))
        case "int2" | "int4":
            return one("integer", "int")
        case "int8" | "oid":
            return one("bigint", "bigint")
        case "bool":
            return one("boolean", "boolean")
        case "float4":
            return one("float", "float")
        case "float8":
            return one("double", "double")
        case "bytea":
            return one("bytes", "binary")
        case "array":
            return one("json", "string")
        case "uuid":
            return one("uuid", "string")
        case "inet" | "cidr":
            return one("inet", "string")
        case "numeric" if modifier != -1:
            # src/backend/utils/adt/numeric.c: the typmod packs precision and an 11-bit signed scale.
            precision, scale = (modifier - 4) >> 16 & 0xFFFF, (((modifier - 4) & 0x7FF) ^ 1024) - 1024
            if precision <= 38 and 0 <= scale <= precision:
                return one("decimal", f"decimal({precision},{scale})")
    return one("text", "string")
