"""Stored rows as the text that Postgres's COPY reads, made by Arrow column by column.

Belongs here: the way back of `archive_pipeline.columns`, for every kind of column. Does not: running COPY
(`archive_pipeline.restore`). https://www.postgresql.org/docs/current/sql-copy.html
"""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from archive_pipeline.columns import INT32_MAX, INT32_MIN, INT64_MAX, INT64_MIN, Column

US_A_DAY = 86_400_000_000
# Postgres reads a day as its Julian number, with any year and without a calendar of Python's in between.
JULIAN_EPOCH = 2_440_588
ESCAPES = (("\\", "\\\\"), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t"))


def copy_text(columns: Sequence[Column], batch: pa.RecordBatch, *, nulls: int = 0) -> bytes:
    """Rows as COPY reads them, made by Arrow column by column: no value passes through Python.

    Args:
        columns: in the order of COPY's list.
        batch: of the stored schema; a field that it does not have is NULL.
        nulls: columns at the end of COPY's list that are NULL.

    Returns:
        COPY's text format.
    """
    rows = batch.num_rows
    nothing = pa.array(["\\N"] * rows, pa.large_string())
    texts = [
        pc.coalesce(_text(column, batch.column(column.exact.name)), "\\N").cast(pa.large_string())
        if column.exact.name in batch.schema.names
        else nothing
        for column in columns
    ]
    lines = pc.binary_join_element_wise(*texts, *[nothing] * nulls, pa.scalar("\t", pa.large_string()))
    empty = pa.scalar("", pa.large_string())
    ended = pc.binary_join_element_wise(lines, empty, pa.scalar("\n", pa.large_string()))
    if isinstance(ended, pa.ChunkedArray):
        ended = ended.combine_chunks()
    # The lines lie one after the other in the array's buffer.
    _, offsets, values = ended.buffers()
    at = memoryview(offsets).cast("q")
    start, end = at[ended.offset], at[ended.offset + rows]
    return bytes(values.slice(start, end - start).to_pybytes())


def _text(column: Column, array: pa.Array) -> pa.Array:
    match column.kind:
        case "integer" | "bigint" | "boolean" | "float" | "double" | "decimal":
            return array.cast(pa.string())
        case "bytes":
            return pa.array(
                [None if value is None else f"\\\\x{value.hex()}" for value in array.to_pylist()], pa.string()
            )
        case "instant" | "wall":
            day, us = _divided(array, US_A_DAY)
            text = _joined("J", pc.add(day, JULIAN_EPOCH), " ", _clock(us), "+00" if column.kind == "instant" else "")
            return _or_infinity(array, text, INT64_MIN, INT64_MAX)
        case "date":
            days = pc.add(array.cast(pa.int64()), JULIAN_EPOCH)
            return _or_infinity(array, _joined("J", days), INT32_MIN, INT32_MAX)
        case _:
            for character, escaped in ESCAPES:
                array = pc.replace_substring(array, character, escaped)
            return array


def _divided(number: pa.Array, by: int) -> tuple[pa.Array, pa.Array]:
    """Quotient rounded down, and remainder."""
    quotient = pc.divide(number, by)
    rest = pc.subtract(number, pc.multiply(quotient, by))
    below = pc.less(rest, 0)
    return pc.if_else(below, pc.subtract(quotient, 1), quotient), pc.if_else(below, pc.add(rest, by), rest)


def _clock(us: pa.Array) -> pa.Array:
    seconds, fraction = _divided(us, 1_000_000)
    minutes, second = _divided(seconds, 60)
    hour, minute = _divided(minutes, 60)
    two = [pc.utf8_lpad(each.cast(pa.string()), 2, "0") for each in (hour, minute, second)]
    return _joined(two[0], ":", two[1], ":", two[2], ".", pc.utf8_lpad(fraction.cast(pa.string()), 6, "0"))


def _joined(*pieces: pa.Array | str) -> pa.Array:
    texts = [piece if isinstance(piece, str) else piece.cast(pa.string()) for piece in pieces]
    return pc.binary_join_element_wise(*texts, "")


def _or_infinity(array: pa.Array, text: pa.Array, least: int, most: int) -> pa.Array:
    past = pc.if_else(pc.equal(array, least), "-infinity", text)
    return pc.if_else(pc.equal(array, most), "infinity", past)
