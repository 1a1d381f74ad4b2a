"""Metrics that are a query over the databases of the SaaS.

Belongs here: running one query read-only on every shard, within its time, and what its row means. Does not: the
queries, which are the catalogue's.

A query returns one row. Its columns:

- `value` in the metric's unit; NULL, or no row: there is nothing of it.
- `period`, optional: the month (YYYY-MM) of a figure that begins anew every month.
- `n`, optional: how many observations it rests on; fewer than the source asks for make it partial.
- every other column is evidence.

Row-level security is off while it runs: Postgres then refuses a query whose rows it would hide, instead of counting
those that are left.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any
from uuid import UUID

import psycopg
from psycopg.rows import dict_row

from scaling.databases import Shard
from scaling.errors import UserError
from scaling.samples import Sample, Status, measured
from scaling.sources import Reach

MISSING = (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn, psycopg.errors.InvalidSchemaName)


class Across(StrEnum):
    """How the figures of several shards become samples."""

    SUM = "sum"
    """One sample, the sum: counts."""
    MEAN = "mean"
    """One sample, the mean weighted by `n`."""
    EACH = "each"
    """One sample a shard: sizes, shares of a limit."""


@dataclass(frozen=True, slots=True)
class SqlSource:
    """One query over every shard.

    Attributes:
        query: see the module; `%(now)s`, `%(shard)s` and the names of `parameters` are its placeholders.
        across: what becomes of several shards.
        parameters: of the query; None: it has no placeholders at all, not even those.
        least: observations (`n`) it needs; fewer make the sample partial, none at all empty.
    """

    query: str
    across: Across = Across.SUM
    parameters: Mapping[str, Any] | None = field(default_factory=dict)
    least: int = 0

    def read(self, metric: str, reach: Reach) -> tuple[Sample, ...]:
        """Ask every shard.

        Args:
            metric: the name the samples carry.
            reach: its router, time limit and moment.

        Returns:
            One sample a shard, or one of all shards together.
        """
        answers = {shard.name: self._ask(metric, shard, reach) for shard in reach.router.shards()}
        if self.across is Across.EACH:
            return tuple(answers.values())
        return (self._together(metric, answers, reach.now),)

    def describe(self) -> str:
        """The query, and how shards are put together."""
        how = {Across.SUM: "sum of all shards", Across.MEAN: "mean of all shards", Across.EACH: "each shard"}
        return f"SQL, {how[self.across]}: {' '.join(self.query.split())}"

    def _ask(self, metric: str, shard: Shard, reach: Reach) -> Sample:
        dims = f"shard={shard.name}" if self.across is Across.EACH else ""
        evidence: dict[str, Any] = {"query_sha256": hashlib.sha256(self.query.encode()).hexdigest()}
        try:
            row = self._row(shard, reach)
        except MISSING as error:
            said = error.diag.message_primary or "something it names does not exist"
            return self._without(
                metric,
                dims,
                reach.now,
                Status.EMPTY,
                evidence,
                f"{said}; name your own table with sql = '…' of [{metric}] in SCALING_CATALOGUE_FILE",
            )
        except psycopg.errors.InsufficientPrivilege as error:
            return self._without(metric, dims, reach.now, Status.ERROR, evidence, _refused(error))
        except psycopg.errors.QueryCanceled:
            seconds = reach.settings.scaling_source_timeout_seconds
            said = f"the query took longer than {seconds:g} s (SCALING_SOURCE_TIMEOUT_SECONDS)"
            return self._without(metric, dims, reach.now, Status.ERROR, evidence, said)
        except UserError as error:
            return self._without(metric, dims, reach.now, Status.ERROR, evidence, str(error))
        except psycopg.Error as error:
            # Postgres quotes values in some messages; the condition's name tells enough.
            said = f"the query failed: {type(error).__name__} (SQLSTATE {error.sqlstate or 'none'})"
            return self._without(metric, dims, reach.now, Status.ERROR, evidence, said)
        return self._sample(metric, dims, reach.now, row, evidence)

    def _row(self, shard: Shard, reach: Reach) -> Mapping[str, Any] | None:
        with shard.transaction() as connection:
            connection.execute("SET TRANSACTION READ ONLY")
            connection.execute(
                "SELECT set_config('statement_timeout', %s, true), set_config('row_security', 'off', true),"
                " set_config('TimeZone', 'UTC', true), set_config('DateStyle', 'ISO, YMD', true)",
                [f"{round(reach.settings.scaling_source_timeout_seconds * 1000)}ms"],
            )
            values = None
            if self.parameters is not None:
                values = {**self.parameters, "now": reach.now, "shard": shard.name}
            with connection.cursor(row_factory=dict_row) as cursor:
                # Binary results need the extended protocol, in which a query is one statement: none can end the
                # read-only transaction.
                cursor.execute(self.query.encode(), values, binary=True)
                return cursor.fetchone() if cursor.description else None

    def _sample(
        self, metric: str, dims: str, at: datetime, row: Mapping[str, Any] | None, evidence: dict[str, Any]
    ) -> Sample:
        if row is None:
            return self._without(metric, dims, at, Status.EMPTY, evidence, "the query returned no row")
        if "value" not in row:
            return self._without(metric, dims, at, Status.ERROR, evidence, "the query has no column named value")
        evidence |= {name: _json(value) for name, value in row.items() if name not in ("value", "period")}
        count = row.get("n")
        if self.least and not count:
            return self._without(metric, dims, at, Status.EMPTY, evidence, "there was nothing to measure")
        if count is not None and count < self.least:
            said = f"rests on {count} observations; it takes {self.least}"
            return self._without(metric, dims, at, Status.PARTIAL, evidence, said)
        value = row["value"]
        if value is None:
            return self._without(metric, dims, at, Status.EMPTY, evidence, "the query returned NULL")
        if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
            said = f"the query's value is no number but {type(value).__name__}"
            return self._without(metric, dims, at, Status.ERROR, evidence, said)
        return measured(metric, at, float(value), dims=dims, period=str(row.get("period") or ""), evidence=evidence)

    def _without(
        self, metric: str, dims: str, at: datetime, status: Status, evidence: Mapping[str, Any], said: str
    ) -> Sample:
        key = "error" if status is Status.ERROR else "reason"
        return Sample(metric, at, None, status, dims, "", {**evidence, key: said})

    def _together(self, metric: str, answers: Mapping[str, Sample], at: datetime) -> Sample:
        if len(answers) == 1:
            (only,) = answers.values()
            return only
        evidence = {
            "shards": {
                name: {"status": each.status.value, "value": each.value, **each.evidence}
                for name, each in answers.items()
            }
        }
        statuses = {each.status for each in answers.values()}
        if Status.ERROR in statuses:
            return self._without(metric, "", at, Status.ERROR, evidence, "a shard did not answer")
        if statuses == {Status.EMPTY}:
            return self._without(metric, "", at, Status.EMPTY, evidence, "no shard has anything of it")
        counts = [float(each.evidence.get("n") or 0) for each in answers.values()]
        if self.across is Across.MEAN:
            known = [
                (each.value, n) for each, n in zip(answers.values(), counts, strict=True) if each.value is not None
            ]
            if not known or not sum(n for _, n in known):
                return self._without(metric, "", at, Status.PARTIAL, evidence, "no shard has enough of it")
            total = sum(value * n for value, n in known) / sum(n for _, n in known)
            return measured(metric, at, total, evidence=evidence)
        if statuses != {Status.OK}:
            return self._without(metric, "", at, Status.PARTIAL, evidence, "some shards have nothing of it")
        values = [each.value for each in answers.values() if each.value is not None]
        period = next(each.period for each in answers.values())
        return measured(metric, at, sum(values), period=period, evidence=evidence)


def _refused(error: psycopg.errors.InsufficientPrivilege) -> str:
    said = error.diag.message_primary or "permission denied"
    if "row-level security" in said:
        return f"{said}, so rows would be missing; ALTER ROLE … BYPASSRLS for the role of DATABASE_URL"
    return f"{said}; GRANT it (USAGE on the schema, SELECT on the table) to the role of DATABASE_URL"


def _json(value: object) -> object:
    match value:
        case Decimal():
            return float(value)
        case datetime() | date():
            return value.isoformat()
        case UUID():
            return str(value)
        case _:
            return value
