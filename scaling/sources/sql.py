"""Metrics that are a query over the databases of the SaaS.

Belongs here: running one query read-only on every shard, within its time, and what its row means. Does not: the
queries, which are the catalogue's.

A query is one SELECT that returns one row. Its columns:

- `value` in the metric's unit, a number; NULL, or no row: there is nothing of it.
- `period`, optional: the month (YYYY-MM) of a figure that begins anew every month.
- `n`, optional: how many observations it rests on, which is its weight in a mean; fewer than the source asks for make
  it partial.
- every other column is evidence, as Postgres writes it in JSON.

Row-level security is off while it runs: Postgres then refuses a query whose rows it would hide, instead of counting
those that are left.
"""

import hashlib
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import psycopg

from scaling.databases import Shard
from scaling.errors import UserError
from scaling.samples import Sample, Status, measured
from scaling.sources import Reach
from scaling.sources.http import unmeasured

MONTH = re.compile(r"\d{4}-(0[1-9]|1[0-2])", re.ASCII)
MOST_CHARACTERS = 64 * 1024
"""Of a row as JSON; every measurement keeps its evidence."""
MOST_OBSERVATIONS = 2**53
"""A float holds every count below it."""
MISSING = (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn, psycopg.errors.InvalidSchemaName)


class Across(StrEnum):
    """How the figures of several shards become samples."""

    SUM = "sum"
    """One sample, the sum: counts."""
    MEAN = "mean"
    """One sample, the mean weighted by `n`."""
    EACH = "each"
    """One sample a shard: sizes, shares of a limit."""


class _UnmeasuredError(Exception):
    """A shard has no figure."""

    def __init__(self, status: Status, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True, slots=True)
class SqlSource:
    """One query over every shard.

    Attributes:
        query: see the module; `%(now)s`, `%(shard)s` and the names of `parameters` are its placeholders.
        across: what becomes of several shards.
        parameters: of the query; None: it has no placeholders at all, not even those, and a `%` is a `%`.
        least: observations (`n`) it needs, of all shards together unless each is a sample; fewer make the sample
            partial, none at all empty.
    """

    query: str
    across: Across = Across.SUM
    parameters: Mapping[str, Any] | None = field(default_factory=dict)
    least: int = 0

    def read(self, metric: str, reach: Reach) -> tuple[Sample, ...]:
        """Ask every shard; see `scaling.sources.Source`.

        Args:
            metric: the name the samples carry.
            reach: its router, time limit and moment.

        Returns:
            One sample a shard, or one of all shards together.
        """
        answers = [(shard.name, self._ask(metric, shard, reach)) for shard in reach.router.shards()]
        if self.across is Across.EACH:
            return tuple(self._enough(sample, reach) for _, sample in answers)
        together = answers[0][1] if len(answers) == 1 else self._together(metric, answers, reach)
        return (self._enough(together, reach),)

    def describe(self) -> str:
        """The query, and how shards are put together."""
        how = {
            Across.SUM: "sum of all shards",
            Across.MEAN: "mean of all shards, weighted by n",
            Across.EACH: "each shard",
        }
        least = f", at least {self.least} observations" if self.least else ""
        return f"SQL, {how[self.across]}{least}: {' '.join(self.query.split())}"

    def _ask(self, metric: str, shard: Shard, reach: Reach) -> Sample:
        dims = f"shard={shard.name}" if self.across is Across.EACH else ""
        evidence: dict[str, Any] = {"query_sha256": self._sha256()}
        try:
            row = _parsed(self._rows(metric, shard, reach))
            evidence = {**{name: each for name, each in row.items() if name not in ("value", "period")}, **evidence}
            value, period = _value(row), _period(row)
        except _UnmeasuredError as error:
            return _without(metric, reach, error.status, str(error), evidence, dims=dims)
        if value is None:
            return _without(metric, reach, Status.EMPTY, "the query returned NULL", evidence, dims=dims, period=period)
        return measured(metric, reach.now, value, dims=dims, period=period, evidence=evidence)

    def _sha256(self) -> str:
        return hashlib.sha256(self.query.encode()).hexdigest()

    def _rows(self, metric: str, shard: Shard, reach: Reach) -> Sequence[str]:
        limit, began = reach.settings.scaling_source_timeout_seconds, time.monotonic()
        try:
            return self._run(shard, reach)
        except MISSING as error:
            remedy = f"name your own table with sql = '…' of [{metric}] in SCALING_CATALOGUE_FILE"
            sentence = f"{_safe_words(error) or 'something the query names does not exist'}; {remedy}"
            raise _UnmeasuredError(Status.EMPTY, sentence) from None
        except psycopg.errors.InsufficientPrivilege as error:
            sentence = _refused(error)
        except psycopg.errors.QueryCanceled:
            if time.monotonic() - began < limit:
                sentence = "somebody cancelled the query"
            else:
                sentence = f"the query took longer than {limit:g} s (SCALING_SOURCE_TIMEOUT_SECONDS)"
        except UserError as error:
            sentence = str(error)
        except psycopg.Error as error:
            words = _safe_words(error)
            sentence = f"the query failed: {type(error).__name__} (SQLSTATE {error.sqlstate or 'none'})"
            sentence += f", {words}" if words else ""
        raise _UnmeasuredError(Status.ERROR, sentence)

    def _run(self, shard: Shard, reach: Reach) -> Sequence[str]:
        rows: list[str] = []
        with shard.transaction() as connection:
            connection.execute("SET TRANSACTION READ ONLY")
            milliseconds = math.ceil(reach.settings.scaling_source_timeout_seconds * 1000)  # 0 would be no limit
            connection.execute(
                "SELECT set_config('statement_timeout', %s, true), set_config('row_security', 'off', true),"
                " set_config('TimeZone', 'UTC', true), set_config('DateStyle', 'ISO, YMD', true)",
                [f"{milliseconds}ms"],
            )
            values = None
            if self.parameters is not None:
                values = {**self.parameters, "now": reach.now, "shard": shard.name}
            # Inside a FROM it can only be a query: not COMMIT, SET or COPY. Binary results need the extended protocol,
            # which takes one statement only: none can follow a parenthesis that closes early.
            text = (
                f"SELECT left(pg_catalog.to_jsonb(only_row.*)::text, {MOST_CHARACTERS + 1})"  # noqa: S608 - the catalogue's
                f" FROM (\n{self.query.strip().removesuffix(';')}\n) AS only_row LIMIT 2"
            )
            cursor = connection.execute(text.encode(), values, binary=True)
            rows = [row for (row,) in cursor.fetchall()]
            # Settings that functions of the query made for the session go with the transaction.
            raise psycopg.Rollback
        return rows

    def _enough(self, sample: Sample, reach: Reach) -> Sample:
        """The sample, unless it rests on too little."""
        if not self.least or sample.status not in (Status.OK, Status.EMPTY):
            return sample
        if "n" not in sample.evidence:
            if sample.status is Status.EMPTY:
                return sample
            sentence = f"the query has no column named n, and it takes {self.least} observations"
            return _instead(sample, reach, Status.ERROR, sentence)
        count = sample.evidence["n"] or 0
        if count == 0:
            return _instead(sample, reach, Status.EMPTY, "there was nothing to measure")
        if count < self.least:
            return _instead(sample, reach, Status.PARTIAL, f"rests on {count} observations; it takes {self.least}")
        return sample

    def _together(self, metric: str, answers: Sequence[tuple[str, Sample]], reach: Reach) -> Sample:
        evidence: dict[str, Any] = {
            "shards": {
                name: {
                    **{key: each for key, each in sample.evidence.items() if key != "query_sha256"},
                    "status": sample.status.value,
                    "value": sample.value,
                    "period": sample.period,
                }
                for name, sample in answers
            },
            "query_sha256": self._sha256(),
        }
        failed = [
            f"shard {name}: {sample.evidence['error']}" for name, sample in answers if sample.status is Status.ERROR
        ]
        if failed:
            return _without(metric, reach, Status.ERROR, "; ".join(failed), evidence)
        if all("n" in sample.evidence for _, sample in answers):
            evidence["n"] = sum(sample.evidence["n"] or 0 for _, sample in answers)
        if self.across is Across.MEAN:
            # Where nothing was observed there is nothing to weigh.
            answers = [(name, sample) for name, sample in answers if sample.evidence.get("n", 1)]
        figures = [(sample.value, sample) for _, sample in answers if sample.value is not None]
        if not figures:
            return _without(metric, reach, Status.EMPTY, "no shard has anything of it", evidence)
        if len(figures) < len(answers):
            lacking = ", ".join(name for name, sample in answers if sample.value is None)
            return _without(metric, reach, Status.PARTIAL, f"there is nothing of it on shard {lacking}", evidence)
        periods = sorted({sample.period for _, sample in figures})
        if len(periods) > 1:
            sentence = f"shards are of different periods ({', '.join(each or 'none' for each in periods)})"
            return _without(metric, reach, Status.PARTIAL, sentence, evidence)
        if self.across is Across.SUM:
            total = sum(value for value, _ in figures)
            return measured(metric, reach.now, total, period=periods[0], evidence=evidence)
        if "n" not in evidence:
            sentence = "a mean of several shards takes a column named n"
            return _without(metric, reach, Status.ERROR, sentence, evidence)
        mean = sum(value * (sample.evidence["n"] / evidence["n"]) for value, sample in figures)
        return measured(metric, reach.now, mean, period=periods[0], evidence=evidence)


def _without(
    metric: str,
    reach: Reach,
    status: Status,
    sentence: str,
    evidence: Mapping[str, Any],
    *,
    dims: str = "",
    period: str = "",
) -> Sample:
    key = "error" if status is Status.ERROR else "note"
    return unmeasured(metric, reach, status, sentence, evidence, dims=dims, period=period, key=key)


def _instead(sample: Sample, reach: Reach, status: Status, sentence: str) -> Sample:
    return _without(sample.metric, reach, status, sentence, sample.evidence, dims=sample.dims, period=sample.period)


def _parsed(rows: Sequence[str]) -> Mapping[str, Any]:
    if not rows:
        raise _UnmeasuredError(Status.EMPTY, "the query returned no row")
    if len(rows) > 1:
        raise _UnmeasuredError(Status.ERROR, "the query returned more than one row")
    if len(rows[0]) > MOST_CHARACTERS:
        raise _UnmeasuredError(Status.ERROR, f"the query's row is longer than {MOST_CHARACTERS} characters of JSON")
    try:
        row: Mapping[str, Any] = json.loads(rows[0], parse_int=_number, parse_float=_number)
    except (ValueError, RecursionError) as error:
        sentence = f"the query's row cannot be read as JSON ({type(error).__name__})"
        raise _UnmeasuredError(Status.ERROR, sentence) from None
    if "value" not in row:
        raise _UnmeasuredError(Status.ERROR, "the query has no column named value")
    return row


def _number(text: str) -> int | float | str:
    """Read a number of JSON; one that no float can hold stays text."""
    number = float(text)
    if not math.isfinite(number):
        return text
    return number if "." in text else int(text)


def _value(row: Mapping[str, Any]) -> float | None:
    count = row.get("n")
    if count is not None and not (_is_number(count) and 0 <= count < MOST_OBSERVATIONS):
        raise _UnmeasuredError(Status.ERROR, "the query's n is no number of observations")
    value = row["value"]
    if value is None:
        return None
    if not _is_number(value):
        kind = {bool: "a boolean", str: "text", list: "an array", dict: "an object"}.get(type(value), "something else")
        # Postgres has no JSON number for these.
        kind = value if value in ("NaN", "Infinity", "-Infinity") else kind
        raise _UnmeasuredError(Status.ERROR, f"the query's value is no number but {kind}")
    return float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _period(row: Mapping[str, Any]) -> str:
    period = row.get("period")
    if period is None:
        return ""
    if not isinstance(period, str) or MONTH.fullmatch(period) is None:
        raise _UnmeasuredError(Status.ERROR, "the query's period is no month (YYYY-MM)")
    return period


def _safe_words(error: psycopg.Error) -> str:
    """What an error says, where it can only quote the query; elsewhere messages quote values of rows."""
    if error.sqlstate is None:
        # Of psycopg itself: DataError quotes values, ProgrammingError names placeholders.
        return str(error) if isinstance(error, psycopg.ProgrammingError) else ""
    # Classes 42 and 3F are syntax and names; a position means that Postgres points at the query's own text.
    if error.sqlstate.startswith(("42", "3F")) and error.diag.statement_position:
        return error.diag.message_primary or ""
    return ""


def _refused(error: psycopg.errors.InsufficientPrivilege) -> str:
    # Functions can raise this condition with words of their own, and words are translated: the place in the source of
    # Postgres tells what it is.
    match error.diag.source_function:
        case "check_enable_rls":
            said = error.diag.message_primary
            return f"{said}, so rows would be missing; ALTER ROLE … BYPASSRLS for the role of DATABASE_URL"
        case "aclcheck_error":
            said = error.diag.message_primary
        case _:
            said = "the query lacks a privilege"
    return f"{said}; GRANT it (USAGE on the schema, SELECT on the table) to the role of DATABASE_URL"
