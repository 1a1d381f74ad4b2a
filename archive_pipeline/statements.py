"""One SELECT over the archive: what it may name, which instants it asks for, and how Athena spells it.

Belongs here: everything that is decided about a statement before an engine sees it.
Does not: running it (`archive_pipeline.query`, `archive_pipeline.athena`).

Neither engine derives the month from ``created_at``: a Hive table knows only its partition keys
(https://docs.aws.amazon.com/athena/latest/ug/partitions.html), and DuckDB would open the footer of every file. The
conditions on ``created_at`` and ``created_at_us`` are therefore read here, and every table that stands under them is
narrowed to the months they leave over. What cannot be read narrows nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache, reduce
from operator import or_
from typing import Self
from zoneinfo import ZoneInfo

import duckdb
import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError
from sqlglot.optimizer.annotate_types import annotate_types
from sqlglot.optimizer.qualify import qualify
from sqlglot.optimizer.scope import Scope, traverse_scope

from archive_pipeline.columns import PARTITION_COLUMNS, Field
from archive_pipeline.months import epoch_us
from scaling.errors import UserError

MS, HOUR_US = 1000, 3_600_000_000
FIRST_US, LAST_US = epoch_us(datetime(1, 1, 2, tzinfo=UTC)), epoch_us(datetime(9999, 12, 30, tzinfo=UTC))
ONE_SELECT = "the archive answers one SELECT at a time"
REFUSED = (exp.DML, exp.DDL, exp.Command, exp.Into, exp.Copy, exp.Set, exp.Pragma, exp.Attach, exp.Use)
FLIPPED = {exp.GT: exp.LT, exp.GTE: exp.LTE, exp.LT: exp.GT, exp.LTE: exp.GTE, exp.EQ: exp.EQ}
NOT_CONSTANT = (exp.Column, exp.Query, exp.Subquery, exp.Placeholder, exp.Parameter, exp.AggFunc, exp.Window)
# The clock goes on between reading a condition and running it.
CLOCKS = (exp.CurrentTimestamp, exp.CurrentDate, exp.CurrentDatetime, exp.CurrentTime, exp.Anonymous)
REF = "archive_ref"


@dataclass(frozen=True, slots=True)
class Span:
    """Instants that a condition leaves over, in microseconds since 1970, both included.

    Attributes:
        first: None is the beginning of time.
        last: None is its end.
    """

    first: int | None = None
    last: int | None = None

    def __and__(self, other: Self) -> "Span":
        firsts = [at for at in (self.first, other.first) if at is not None]
        lasts = [at for at in (self.last, other.last) if at is not None]
        return Span(max(firsts, default=None), min(lasts, default=None))

    def __or__(self, other: Self) -> "Span":
        return Span(
            None if self.first is None or other.first is None else min(self.first, other.first),
            None if self.last is None or other.last is None else max(self.last, other.last),
        )

    @property
    def is_open(self) -> bool:
        """Whether it leaves everything over."""
        return self.first is None and self.last is None

    def overlaps(self, first: int | None, last: int | None) -> bool:
        """Whether a part with these extremes of ``created_at_us`` can hold such an instant.

        Args:
            first: the part's lowest; None for a part without rows.
            last: its highest.
        """
        if first is None or last is None:
            return True
        return (self.first is None or last >= self.first) and (self.last is None or first <= self.last)

    def months(self, zone: str) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
        """The first and the last month it touches, as ``(year, month)``.

        Args:
            zone: IANA time zone whose midnight begins a month.
        """
        return _month_of(self.first, zone), _month_of(self.last, zone)


OPEN = Span()


def _month_of(us: int | None, zone: str) -> tuple[int, int] | None:
    if us is None:
        return None
    instant = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=min(max(us, FIRST_US), LAST_US))
    local = instant.astimezone(ZoneInfo(zone))
    return local.year, local.month


class Statement:
    """One SELECT, read.

    Args:
        text: DuckDB SQL.
        tables: the names it may read, each with the text columns it has beside the fields.
        fields: the columns of all those tables, the partition columns left out.

    Raises:
        UserError: it is not one SELECT, or reads something else than the archive.
    """

    def __init__(self, text: str, tables: Mapping[str, Sequence[str]], fields: Sequence[Field]) -> None:
        self.text = text
        types = {field.name: _duckdb_type(field) for field in fields} | dict.fromkeys(PARTITION_COLUMNS, "INT")
        self._tables = {name.lower(): types | dict.fromkeys(more, "VARCHAR") for name, more in tables.items()}
        try:
            parsed = [each for each in sqlglot.parse(text, dialect="duckdb") if each is not None]
        except SqlglotError as error:
            raise UserError(f"the query cannot be run: {_first_line(error)}") from None
        if len(parsed) != 1 or not isinstance(parsed[0], exp.Query) or parsed[0].find(*REFUSED) is not None:
            raise UserError(ONE_SELECT)
        self._parsed = parsed[0]
        for number, table in enumerate(self._read_tables()):
            table.meta[REF] = number
        self._qualified = self._qualify()

    def _read_tables(self) -> list[exp.Table]:
        """The places where the archive is read; a name that a WITH gives to something else is not one."""
        found: dict[int, exp.Table] = {}
        for scope in traverse_scope(self._parsed):
            for source in scope.sources.values():
                if not isinstance(source, exp.Table):
                    continue
                if isinstance(source.this, exp.GenerateSeries | exp.Unnest):
                    continue
                if not isinstance(source.this, exp.Identifier) or source.name.lower() not in self._tables:
                    raise UserError(f"the query cannot be run: it reads {source.sql('duckdb')}, which is no table here")
                found[id(source)] = source
        for table in self._parsed.find_all(exp.Table):
            if not isinstance(table.this, exp.Identifier | exp.GenerateSeries | exp.Unnest):
                raise UserError(f"the query cannot be run: it reads {table.sql('duckdb')}, which is no table here")
        return list(found.values())

    def _qualify(self) -> exp.Query | UserError:
        """Every column under its table and every star spelt out; what cannot be told stays as the user wrote it."""
        schema: dict[str, object] = {**self._tables}
        try:
            plain = self._parsed.copy()
            for table in plain.find_all(exp.Table):
                table.set("db", None)
                table.set("catalog", None)
            qualified = qualify(plain, schema=schema, dialect="duckdb", quote_identifiers=True)
            typed = annotate_types(qualified, schema=schema, dialect="duckdb")
        except SqlglotError as error:
            return UserError(f"the query cannot be run: {_first_line(error)}")
        return typed if isinstance(typed, exp.Query) else UserError(ONE_SELECT)

    def spans(self) -> list[Span]:
        """What each place that reads the archive asks for, in the order of `narrowed`'s numbers."""
        spans = [OPEN for _ in self._refs(self._parsed)]
        if isinstance(self._qualified, UserError):
            return spans
        with _constants() as constants:
            for scope in traverse_scope(self._qualified):
                for alias, source in scope.sources.items():
                    # A subquery's conditions say nothing about the tables of the query around it.
                    if not isinstance(source, exp.Table) or REF not in source.meta:
                        continue
                    if source.find_ancestor(exp.Select) is scope.expression:
                        spans[source.meta[REF]] = _span(_where(scope), alias, constants)
        return spans

    def narrowed(self, replacement: Callable[[int, str, str], exp.Expr | None]) -> str:
        """DuckDB SQL that reads other tables at some places.

        Args:
            replacement: given the place's number, its alias and the table's name, what to read there; None keeps it.

        Returns:
            The SQL; the user's own text when nothing is replaced.
        """
        changed, query = False, self._parsed.copy()
        for table in self._refs(query):
            other = replacement(table.meta[REF], table.alias_or_name, table.name)
            if other is not None:
                changed = True
                table.replace(other)
        return query.sql("duckdb") if changed else self.text

    def athena(self, relation: Callable[[str], exp.Table], conditions: Callable[[Span], Sequence[exp.Expr]]) -> str:
        """The same question in Athena's SQL.

        Args:
            relation: the table of a name.
            conditions: what to ask of the rows of a place, beside the statement's own conditions.

        Raises:
            UserError: a column is not there.
        """
        if isinstance(self._qualified, UserError):
            raise self._qualified
        spans, query = self.spans(), self._qualified.copy()
        with _constants() as constants:
            for each in list(query.find_all(exp.Binary, exp.Between, exp.In)):
                _spell_instants(each, constants)
        for select in query.find_all(exp.Select):
            _spell_all(select)
        for table in self._refs(query):
            alias, real = table.alias_or_name, relation(table.name.lower())
            asked = list(conditions(spans[table.meta[REF]]))
            if asked:
                inner = exp.select("*").from_(real).where(*asked)
                table.replace(
                    exp.Subquery(this=inner, alias=exp.TableAlias(this=exp.to_identifier(alias, quoted=True)))
                )
            else:
                table.replace(exp.alias_(real, alias, table=True, quoted=True))
        return query.sql("athena")

    @staticmethod
    def _refs(query: exp.Expr) -> list[exp.Table]:
        return sorted(
            (table for table in query.find_all(exp.Table) if REF in table.meta), key=lambda table: int(table.meta[REF])
        )


def month_conditions(span: Span, zone: str) -> list[exp.Expr]:
    """Conditions on ``year`` and ``month`` that keep every row of a span.

    Args:
        span: of ``created_at_us``.
        zone: IANA time zone whose midnight begins a month.
    """
    first, last = span.months(zone)
    if first is None and last is None:
        return []
    year, month = (exp.column(name, quoted=True) for name in ("year", "month"))
    if first is not None and first == last:
        return [year.eq(first[0]), month.eq(first[1])]
    if first is not None and last is not None and first[0] == last[0]:
        return [year.eq(first[0]), month.copy().between(first[1], last[1])]
    found: list[exp.Expr] = []
    for bound, beyond, within, whole in ((first, exp.GT, exp.GTE, 1), (last, exp.LT, exp.LTE, 12)):
        if bound is None:
            continue
        edge = exp.and_(year.eq(bound[0]), within(this=month.copy(), expression=exp.Literal.number(bound[1])))
        # The year by itself too: projection lists the partitions of a plain range without trying each.
        found.append(within(this=year.copy(), expression=exp.Literal.number(bound[0])))
        if bound[1] != whole:
            found.append(exp.or_(beyond(this=year.copy(), expression=exp.Literal.number(bound[0])), edge))
    return found


def equals(field: Field, value: str) -> exp.Expr:
    """Condition that a column has a value, the value as a literal of the column's type.

    Args:
        field: the column.
        value: as text.

    Raises:
        UserError: the column holds numbers, and the value is none.
    """
    literal: exp.Expr = exp.Literal.string(value)
    if field.athena in ("int", "bigint"):
        try:
            literal = exp.Literal.number(int(value))
        except ValueError:
            raise UserError(f"{field.name} is a number, which --tenant does not give") from None
    return exp.column(field.name, quoted=True).eq(literal)


class _constants:  # noqa: N801 - used as a function
    """DuckDB with nothing in it: what a constant expression of its SQL means, only DuckDB knows."""

    def __enter__(self) -> "_constants":
        self._duckdb = _empty_duckdb().cursor()
        self._duckdb.execute("SET TimeZone = 'UTC'")
        return self

    def __exit__(self, *_: object) -> None:
        self._duckdb.close()

    def us(self, value: exp.Expr, *, instant: bool = True, add: str = "") -> int | None:
        """Microseconds since 1970; None for what is no constant."""
        if value.find(*NOT_CONSTANT) is not None:
            return None
        text = value.sql("duckdb")
        text = f"epoch_us(({text})::TIMESTAMPTZ{add})" if instant else f"({text})::BIGINT"
        try:
            found = self._duckdb.execute(f"SELECT {text}").fetchone()
        except duckdb.Error:
            return None
        return None if found is None or found[0] is None else int(found[0])


@cache
def _empty_duckdb() -> duckdb.DuckDBPyConnection:
    return duckdb.connect(config={"enable_external_access": "false", "threads": "1"})


def _where(scope: Scope) -> exp.Expr | None:
    where = scope.expression.args.get("where")
    return None if where is None else where.this


def _span(condition: exp.Expr | None, alias: str, constants: _constants) -> Span:
    match condition:
        case exp.Paren():
            return _span(condition.this, alias, constants)
        case exp.And():
            return _span(condition.this, alias, constants) & _span(condition.expression, alias, constants)
        case exp.Or():
            return _span(condition.this, alias, constants) | _span(condition.expression, alias, constants)
        case exp.Between() if not condition.args.get("symmetric"):
            low = _compared(exp.GTE, condition.this, condition.args["low"], alias, constants)
            return low & _compared(exp.LTE, condition.this, condition.args["high"], alias, constants)
        case exp.In() if condition.expressions:
            spans = [_compared(exp.EQ, condition.this, each, alias, constants) for each in condition.expressions]
            return reduce(or_, spans)
        case exp.GT() | exp.GTE() | exp.LT() | exp.LTE() | exp.EQ():
            kind = type(condition)
            left = _compared(kind, condition.this, condition.expression, alias, constants)
            return left & _compared(FLIPPED[kind], condition.expression, condition.this, alias, constants)
        case _:
            return OPEN


def _compared(kind: type[exp.Expr], side: exp.Expr, value: exp.Expr, alias: str, constants: _constants) -> Span:
    """Exact microseconds that ``side kind value`` leaves over; `side` must be the time column or a rounding of it."""
    while isinstance(side, exp.Paren):
        side = side.this
    unit = None
    if isinstance(side, exp.Cast) and side.to.this == exp.DataType.Type.DATE:
        side, unit = side.this, "DAY"
    elif isinstance(side, exp.TimestampTrunc | exp.DateTrunc):
        side, unit = side.this, str(side.args["unit"].name).strip("'").upper()
    if not isinstance(side, exp.Column) or side.table.lower() != alias.lower():
        return OPEN
    pad = HOUR_US if value.find(*CLOCKS) is not None else 0
    name = side.name.lower()
    if name == "created_at_us" and unit is None:
        at = constants.us(value, instant=False)
        if at is None:
            return OPEN
        return _exact(kind, at - pad, at + pad)
    if name != "created_at":
        return OPEN
    at = constants.us(value)
    if at is None:
        return OPEN
    if unit is not None:
        end = constants.us(value, add=f" + INTERVAL 1 {unit}")
        if end is None:
            return OPEN
        return Span(
            at - pad if kind in (exp.GT, exp.GTE, exp.EQ) else None,
            -(-end // MS) * MS - 1 + pad if kind in (exp.LT, exp.LTE, exp.EQ) else None,
        )
    # created_at is floored to milliseconds: what it says of the exact microseconds.
    floor, ceiling = at // MS * MS, -(-at // MS) * MS
    match kind:
        case exp.GT:
            return Span(floor + MS - pad, None)
        case exp.GTE:
            return Span(ceiling - pad, None)
        case exp.LT:
            return Span(None, ceiling - 1 + pad)
        case exp.LTE:
            return Span(None, floor + MS - 1 + pad)
    return Span(floor - pad, floor + MS - 1 + pad)


def _exact(kind: type[exp.Expr], low: int, high: int) -> Span:
    match kind:
        case exp.GT | exp.GTE:
            return Span(low, None)
        case exp.LT | exp.LTE:
            return Span(None, high)
    return Span(low, high)


def _spell_instants(condition: exp.Expr, constants: _constants) -> None:
    """Athena compares no text with a timestamp, and its timestamps have no zone."""
    pairs: list[tuple[exp.Expr, exp.Expr]] = []
    match condition:
        case exp.Between():
            pairs = [(condition.this, condition.args["low"]), (condition.this, condition.args["high"])]
        case exp.In():
            pairs = [(condition.this, each) for each in condition.expressions]
        case exp.GT() | exp.GTE() | exp.LT() | exp.LTE() | exp.EQ() | exp.NEQ():
            pairs = [(condition.this, condition.expression), (condition.expression, condition.this)]
    for side, value in pairs:
        kind = side.type.this if side.type is not None else None
        if kind not in (exp.DataType.Type.TIMESTAMPTZ, exp.DataType.Type.TIMESTAMP, exp.DataType.Type.DATE):
            continue
        if value.find(*CLOCKS) is not None or (at := constants.us(value)) is None:
            continue
        instant = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=at)
        if kind == exp.DataType.Type.DATE:
            value.replace(exp.cast(exp.Literal.string(instant.strftime("%Y-%m-%d")), "DATE"))
        else:
            text = instant.strftime("%Y-%m-%d %H:%M:%S.") + (
                f"{instant.microsecond // MS:03}" if instant.microsecond % MS == 0 else f"{instant.microsecond:06}"
            )
            value.replace(exp.cast(exp.Literal.string(text), "TIMESTAMP"))


def _spell_all(select: exp.Select) -> None:
    """GROUP BY ALL and ORDER BY ALL are DuckDB's; every star is spelt out by now."""
    group, order = select.args.get("group"), select.args.get("order")
    if group is not None and group.args.get("all"):
        keys = [each.unalias().copy() for each in select.expressions if each.find(exp.AggFunc) is None]
        select.set("group", exp.Group(expressions=keys) if keys else None)
    if order is not None and len(order.expressions) == 1:
        (only,) = order.expressions
        if isinstance(only.this, exp.Var) and only.this.name.upper() == "ALL":
            positions = [exp.Literal.number(number) for number in range(1, len(select.expressions) + 1)]
            select.set(
                "order",
                exp.Order(expressions=[exp.Ordered(this=each, desc=only.args.get("desc")) for each in positions]),
            )


def _duckdb_type(field: Field) -> str:
    types: Mapping[str, str] = {"string": "VARCHAR", "int": "INT", "binary": "BLOB"}
    if field.athena == "timestamp":
        return "TIMESTAMPTZ" if field.utc else "TIMESTAMP"
    return types.get(field.athena, field.athena.upper())


def _first_line(error: Exception) -> str:
    return str(error).replace("\x1b[4m", "").replace("\x1b[0m", "").splitlines()[0].strip()
