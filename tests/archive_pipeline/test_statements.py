"""What a statement may read, which instants it asks for, and its translation for Athena."""

from collections.abc import Iterator
from datetime import UTC, datetime

import duckdb
import pytest
import sqlglot
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlglot import exp

from archive_pipeline.columns import Field
from archive_pipeline.months import epoch_us
from archive_pipeline.statements import Span, Statement, equals, month_conditions
from scaling.errors import UserError

TENANT = Field("tenant_id", "string")
FIELDS = (
    Field("id", "string"),
    TENANT,
    Field("action", "string"),
    Field("details", "string"),
    Field("severity", "int"),
    Field("order", "string"),
    Field("created_at", "timestamp", utc=True),
    Field("created_at_us", "bigint"),
)
TABLES = {"audit_logs": (), "audit_logs_by_month": ("archive_month",)}
# Around the ends of months in UTC, and around one in Tokyo.
INSTANTS = [
    "2024-12-31 23:59:59.999999+00",
    "2025-01-01 00:00:00+00",
    "2025-01-31 14:59:59.999999+00",
    "2025-01-31 15:00:00+00",
    "2025-01-31 23:59:59.999+00",
    "2025-01-31 23:59:59.999500+00",
    "2025-01-31 23:59:59.999999+00",
    "2025-02-01 00:00:00+00",
    "2025-02-01 00:00:00.000001+00",
    "2025-12-31 23:59:59.999999+00",
    "2026-01-01 00:00:00+00",
]


def us(text: str) -> int:
    return epoch_us(datetime.fromisoformat(text))


def spans(text: str) -> list[Span]:
    return Statement(text, TABLES, FIELDS).spans()


def athena(text: str, zone: str = "UTC", tenant: str | None = None) -> str:
    def conditions(span: Span) -> list[exp.Expr]:
        return month_conditions(span, zone) + ([] if tenant is None else [equals(TENANT, tenant)])

    return Statement(text, TABLES, FIELDS).athena(lambda name: exp.table_(name, db="audit", quoted=True), conditions)


@pytest.fixture(scope="module")
def rows() -> Iterator[duckdb.DuckDBPyConnection]:
    """Rows at every instant for two tenants, as the archive's view has them; months of UTC."""
    with duckdb.connect(config={"threads": "1"}) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute("CREATE SCHEMA audit")
        connection.execute(
            """CREATE TABLE audit.audit_logs AS
               SELECT t || n AS id, t AS tenant_id, 'action ' || n % 3 AS action,
                      '{"n": {"m": ' || n || '}}' AS details,
                      n::INTEGER AS severity, 'o' AS "order",
                      date_trunc('milliseconds', i) AS created_at, epoch_us(i) AS created_at_us,
                      year(i)::INTEGER AS year, month(i)::INTEGER AS month
               FROM (SELECT unnest($instants)::TIMESTAMPTZ AS i, generate_subscripts($instants, 1) AS n),
                    (SELECT unnest(['a', 'b']) AS t)""",
            {"instants": INSTANTS},
        )
        connection.execute("CREATE VIEW audit_logs AS FROM audit.audit_logs")
        yield connection


@pytest.mark.parametrize(
    ("condition", "first", "last"),
    [
        ("created_at >= '2025-02-01'", "2025-02-01 00:00:00+00", None),
        ("created_at > TIMESTAMPTZ '2025-01-31 23:59:59.999'", "2025-02-01 00:00:00+00", None),
        ("created_at < '2025-02-01'", None, "2025-01-31 23:59:59.999999+00"),
        ("created_at <= '2025-01-31 23:59:59.999'", None, "2025-01-31 23:59:59.999999+00"),
        ("'2025-02-01' <= created_at", "2025-02-01 00:00:00+00", None),
        ("(created_at_us >= 1738368000000000)", "2025-02-01 00:00:00+00", None),
        ("created_at::DATE = '2025-01-31'", "2025-01-31 00:00:00+00", "2025-01-31 23:59:59.999999+00"),
        (
            "date_trunc('month', created_at) = '2025-01-01'",
            "2025-01-01 00:00:00+00",
            "2025-01-31 23:59:59.999999+00",
        ),
        (
            "created_at BETWEEN '2025-01-01' AND '2025-01-02 09:00:00+09'",
            "2025-01-01 00:00:00+00",
            "2025-01-02 00:00:00.000999+00",
        ),
        (
            "(created_at < '2024-01-01' AND created_at >= '2023-01-01' OR created_at = '2025-01-01') AND action = 'x'",
            "2023-01-01 00:00:00+00",
            "2025-01-01 00:00:00.000999+00",
        ),
        ("created_at >= '2025-01-01'::DATE + INTERVAL 1 MONTH", "2025-02-01 00:00:00+00", None),
        ("created_at >= '2025-01-01' OR action = 'x'", None, None),
        ("NOT created_at >= '2025-01-01'", None, None),
        ("created_at <> '2025-01-01'", None, None),
        ("created_at >= (SELECT max(created_at) FROM audit_logs)", None, None),
        ("created_at >= details::TIMESTAMPTZ", None, None),
        ("created_at >= 'no date'", None, None),
        ("severity > 20250101", None, None),
    ],
)
def test_a_condition_on_the_time_says_which_instants_are_asked_for(
    condition: str, first: str | None, last: str | None
) -> None:
    wanted = Span(first and us(first), last and us(last))  # type: ignore[arg-type]
    assert spans(f"SELECT id FROM audit_logs WHERE {condition}")[0] == wanted


def test_a_condition_on_the_clock_leaves_an_hour_for_the_time_between_reading_and_running() -> None:
    (span,) = spans("SELECT id FROM audit_logs WHERE created_at < now() - INTERVAL 1 DAY")
    now = epoch_us(datetime.now(UTC))
    assert span.last is not None
    assert now - 24 * 3600 * 10**6 < span.last < now - 22 * 3600 * 10**6


def test_each_place_that_reads_the_table_has_instants_of_its_own() -> None:
    a, b = "o.created_at >= '2025-01-01'", "i.created_at < '2024-01-01'"
    one, two = Span(us("2025-01-01 00:00:00+00")), Span(None, us("2023-12-31 23:59:59.999999+00"))
    inner = f"SELECT 1 FROM audit_logs i WHERE {a} AND i.id = o.id AND {b}"
    assert set(spans(f"SELECT o.id FROM audit_logs o WHERE EXISTS ({inner})")) == {Span(), two}
    assert spans(f"SELECT o.id FROM audit_logs o JOIN audit_logs i USING (id) WHERE {a} AND {b}") == [one, two]
    lateral = f"SELECT o.id FROM audit_logs o LEFT JOIN LATERAL (SELECT 1 FROM audit_logs i WHERE {a}) x ON true"
    assert spans(lateral) == [Span(), Span()]
    # Which table an unqualified name belongs to cannot be told here, so nothing is narrowed.
    assert spans("SELECT 1 FROM audit_logs o, audit_logs i WHERE created_at >= '2025-01-01'") == [Span(), Span()]


COMPARISON = st.builds(
    lambda side, operator, at: f"{side.format(c='created_at')} {operator} TIMESTAMPTZ '{at}'",
    st.sampled_from(["{c}", "{c}", "date_trunc('month', {c})", "date_trunc('day', {c})"]),
    st.sampled_from(["<", "<=", "=", ">=", ">"]),
    st.sampled_from(INSTANTS),
) | st.builds(
    lambda operator, at: f"created_at_us {operator} {us(at)}",
    st.sampled_from(["<", "<=", "=", ">=", ">"]),
    st.sampled_from(INSTANTS),
)
CONDITION = st.recursive(
    COMPARISON | st.just("severity > 4"),
    lambda inner: st.builds("({} {} {})".format, inner, st.sampled_from(["AND", "OR"]), inner),
    max_leaves=5,
)


@settings(deadline=None, max_examples=60)
@given(condition=CONDITION)
def test_narrowing_a_statement_to_months_never_changes_its_answer(
    rows: duckdb.DuckDBPyConnection, condition: str
) -> None:
    query = f"SELECT id FROM audit_logs WHERE {condition} ORDER BY id"
    answer = rows.execute(query).fetchall()
    (span,) = spans(query)
    assert all(
        span.overlaps(at, at)
        for (at,) in rows.execute(f"SELECT created_at_us FROM audit_logs WHERE {condition}").fetchall()
    )
    there = sqlglot.transpile(athena(query), read="athena", write="duckdb")[0]
    assert rows.execute(there).fetchall() == answer


@pytest.mark.parametrize(
    ("condition", "months"),
    [
        ("created_at >= '2024-11-05'", '"year" >= 2024 AND ("year" > 2024 OR ("year" = 2024 AND "month" >= 11))'),
        ("created_at < '2025-03-01'", '"year" <= 2025 AND ("year" < 2025 OR ("year" = 2025 AND "month" <= 2))'),
        ("created_at >= '2024-01-01' AND created_at < '2026-01-01'", '"year" >= 2024 AND "year" <= 2025'),
        ("created_at::DATE = '2025-01-31'", '"year" = 2025 AND "month" = 1'),
        ("created_at BETWEEN '2025-01-31' AND '2025-03-01'", '"year" = 2025 AND "month" BETWEEN 1 AND 3'),
    ],
)
def test_athena_is_told_the_months_of_a_time_range(condition: str, months: str) -> None:
    assert f'(SELECT * FROM "audit"."audit_logs" WHERE {months}) AS "audit_logs"' in athena(
        f"SELECT id FROM audit_logs WHERE {condition}"
    )


# case 21
def test_a_query_of_an_archive_in_tokyo_months_reads_the_months_of_tokyo() -> None:
    query = "SELECT id FROM audit_logs WHERE created_at >= '2025-01-31 15:00:00' AND created_at < '2025-02-28 15:00:00'"
    assert 'WHERE "year" = 2025 AND "month" = 2)' in athena(query, "Asia/Tokyo")
    assert 'WHERE "year" = 2025 AND "month" BETWEEN 1 AND 2)' in athena(query, "UTC")


@pytest.mark.parametrize(
    "query",
    [
        "SELECT action, count(*) AS n FROM audit_logs GROUP BY ALL ORDER BY ALL",
        "SELECT * EXCLUDE (details) FROM audit_logs WHERE tenant_id = 'a' ORDER BY id",
        "FROM audit_logs SELECT id ORDER BY id LIMIT 3",
        "SELECT details->'n'->>'m' AS m, sum(severity) / count(*) AS mean FROM audit_logs GROUP BY m ORDER BY m",
        'SELECT "order", year, month FROM audit.audit_logs l WHERE l.month = 2 ORDER BY id',
        "SELECT id, row_number() OVER (PARTITION BY tenant_id ORDER BY id) r FROM audit_logs QUALIFY r < 3 ORDER BY id",
        "WITH audit_logs AS (SELECT 1 AS x) SELECT x FROM audit_logs",
        "SELECT count(*) FILTER (WHERE severity > 3) AS n FROM audit_logs",
        "SELECT id FROM audit_logs WHERE created_at::DATE = '2025-02-01' ORDER BY id",
        "SELECT id FROM audit_logs WHERE created_at IN ('2025-01-01', '2025-02-01') ORDER BY id",
        "SELECT a.id FROM audit_logs a LEFT JOIN audit_logs b USING (id, severity) WHERE b.id IS NULL",
        "SELECT id FROM audit_logs WHERE severity < 2 UNION SELECT id FROM audit_logs WHERE severity > 9 ORDER BY 1",
    ],
)
def test_the_same_sql_means_the_same_in_athena(rows: duckdb.DuckDBPyConnection, query: str) -> None:
    there = athena(query)
    assert "ALL ORDER" not in there
    back = sqlglot.transpile(there, read="athena", write="duckdb")[0]
    assert rows.execute(back).fetchall() == rows.execute(query).fetchall()


# case 19
def test_athena_compares_instants_with_timestamps_of_utc_and_never_with_text() -> None:
    there = athena(
        "SELECT id FROM audit_logs WHERE created_at > '2025-01-31 23:59:59.999999+00' AND created_at < now()"
    )
    assert "> CAST('2025-01-31 23:59:59.999999' AS TIMESTAMP)" in there
    assert "CAST('2025-01-01 00:00:00.000' AS TIMESTAMP)" in athena(
        "SELECT id FROM audit_logs WHERE created_at = '2025-01-01 09:00:00+09'"
    )
    assert "NOW()" in there


# case 64
def test_columns_named_like_reserved_words_are_quoted_for_athena() -> None:
    assert '"audit_logs"."order" AS "order"' in athena('SELECT "order" FROM audit_logs')


# case 69
@pytest.mark.parametrize("tenant", ["a", "b", "c", "a' OR '1' = '1", "a'; SELECT 1", "%"])
def test_every_place_that_reads_the_table_in_athena_is_bound_to_the_tenant(
    rows: duckdb.DuckDBPyConnection, tenant: str
) -> None:
    query = """WITH x AS (SELECT * FROM audit_logs WHERE tenant_id = 'a' OR true)
               SELECT tenant_id FROM x UNION ALL SELECT (SELECT max(tenant_id) FROM audit.audit_logs)
               UNION ALL SELECT l.tenant_id FROM audit_logs l, LATERAL (SELECT * FROM audit_logs) r"""
    back = sqlglot.transpile(athena(query, tenant=tenant), read="athena", write="duckdb")[0]
    found = {value for (value,) in rows.execute(back).fetchall()} - {None}
    assert found == ({tenant} if tenant in ("a", "b") else set())


@pytest.mark.parametrize(
    "text",
    [
        "SELECT * FROM other",
        "SELECT * FROM information_schema.tables",
        "SELECT * FROM 's3://bucket/key.parquet'",
        "SELECT * FROM read_parquet('x')",
        "SELECT * FROM (SELECT * FROM TABLE(system.query('SELECT 1')))",
        "WITH other AS (SELECT 1) SELECT * FROM other, LATERAL (SELECT * FROM secrets)",
        "SELECT (WITH a AS (SELECT 1) SELECT 1) FROM a",
    ],
)
def test_a_statement_that_reads_anything_else_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"the query cannot be run: .*"):
        Statement(text, TABLES, FIELDS)


@pytest.mark.parametrize(
    "text",
    ["", "SELECT 1; SELECT 2", "DROP TABLE audit_logs", "EXPLAIN SELECT 1", "INSERT INTO audit_logs SELECT 1",
     "COPY audit_logs TO 'x'", "WITH x AS (DELETE FROM audit_logs) SELECT 1", "SET x = 1"],
)  # fmt: skip
def test_only_one_select_is_answered(text: str) -> None:
    with pytest.raises(UserError, match=r"one SELECT at a time|the query cannot be run"):
        Statement(text, TABLES, FIELDS)


def test_a_column_that_is_not_there_is_named_before_athena_is_asked() -> None:
    with pytest.raises(UserError, match=r"the query cannot be run: .*'nothing'"):
        athena("SELECT nothing FROM audit_logs")
