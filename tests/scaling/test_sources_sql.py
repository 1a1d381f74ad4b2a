"""Metrics in SQL: what one row means, what Postgres refuses, and how several shards become one figure."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest

from devstack.servers import Database, Servers
from scaling.databases import DatabaseRouter, Shard
from scaling.samples import Sample, Status, history, record
from scaling.sources import Reach
from scaling.sources.sql import MOST_CHARACTERS, Across, SqlSource
from tests import clients
from tests.scaling.measuring import NOW, settings

SECRET = "hunter2"


class Shards(DatabaseRouter):
    """A router of several databases."""

    def __init__(self, *several: Shard) -> None:
        super().__init__(several[0])
        self._several = several

    def shards(self) -> tuple[Shard, ...]:
        return self._several


INSERTION = "INSERT INTO sync.runs (run_id, shard, of) VALUES ('00000000-0000-0000-0000-000000000001', 0, 1)"


def do(database: Database, *statements: str) -> None:
    """Do something as superuser."""
    with psycopg.connect(database.admin_dsn, autocommit=True) as admin:
        for statement in statements:
            admin.execute(statement.encode())


@pytest.fixture(scope="module")
def unchanged(running_servers: Servers) -> Iterator[Database]:
    """A database that no test here changes, with a secret; making one for each of 150 tests would take 0.4 s of it."""
    with running_servers.database() as made:
        do(
            made,
            "GRANT ALL ON sync.runs TO pipeline",
            f"CREATE FUNCTION public.write() RETURNS int LANGUAGE sql AS $$ {INSERTION} RETURNING 1 $$",
            f"CREATE TABLE public.secrets AS SELECT '{SECRET}'::text AS word",
            "GRANT SELECT ON public.secrets TO pipeline",
            "CREATE FUNCTION public.say(word text, condition text) RETURNS int LANGUAGE plpgsql AS $$ BEGIN"
            " RAISE EXCEPTION '%', word USING ERRCODE = condition, HINT = word, DETAIL = word; END $$",
            "CREATE FUNCTION public.dynamic(word text) RETURNS int LANGUAGE plpgsql AS $$ BEGIN"
            " EXECUTE 'SELECT ' || word; RETURN 1; END $$",
        )
        yield made


@pytest.fixture
def shard(unchanged: Database) -> Iterator[Shard]:
    """With one connection: whoever comes next gets what the last one left."""
    made = Shard("main", unchanged.dsn, pool_size=1)
    yield made
    made.close()


@pytest.fixture
def fresh(database: Database) -> Iterator[Shard]:
    """Of a database that only this test uses."""
    made = Shard("main", database.dsn, pool_size=1)
    yield made
    made.close()


@pytest.fixture(scope="module")
def databases(running_servers: Servers) -> Iterator[tuple[Database, Database]]:
    """Two with a table `figures`."""
    with running_servers.database() as first, running_servers.database() as second:
        for each in (first, second):
            do(
                each,
                "CREATE TABLE public.figures (value float8, n bigint, period text)",
                "GRANT ALL ON public.figures TO pipeline",
            )
        yield first, second


@pytest.fixture
def two(databases: tuple[Database, Database]) -> Iterator[tuple[Shard, Shard]]:
    """Shards a and b, each with an empty table `figures`."""
    first, second = (Shard(name, each.dsn, pool_size=1) for name, each in zip("ab", databases, strict=True))
    for each in (first, second):
        with each.transaction() as connection:
            connection.execute("TRUNCATE public.figures")
    yield first, second
    first.close()
    second.close()


def ask(source: SqlSource, *shards: Shard, **others: Any) -> tuple[Sample, ...]:
    with clients.client() as client:
        samples = source.read("a_metric", Reach(Shards(*shards), client, settings({}, **others), NOW))
    for sample in samples:
        assert (sample.metric, sample.at) == ("a_metric", NOW)
        json.dumps(sample.evidence, allow_nan=False)
        assert sample.evidence["query_sha256"]
    return samples


def one(source: SqlSource | str, *shards: Shard, **others: Any) -> Sample:
    (sample,) = ask(SqlSource(source) if isinstance(source, str) else source, *shards, **others)
    return sample


def put(shard: Shard, *rows: tuple[float | None, int | None, str | None]) -> None:
    with shard.transaction() as connection:
        for row in rows:
            connection.execute("INSERT INTO public.figures VALUES (%s, %s, %s)", row)


def state(shard: Shard) -> tuple[Any, ...]:
    """The backend of the pool's connection, and its settings."""
    with shard.transaction() as connection:
        row = connection.execute(
            "SELECT pg_backend_pid(), (SELECT array_agg(name || '=' || setting ORDER BY name) FROM pg_settings"
            " WHERE name <> 'transaction_read_only')"
        ).fetchone()
    assert row is not None
    return row


FIGURES = "SELECT value, n, period FROM public.figures"


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7", 7.0),
        ("0", 0.0),
        ("7.25", 7.25),
        ("7.5::float8", 7.5),
        ("1e300::float8", 1e300),
        ("9223372036854775807", 9223372036854775807.0),
        ("count(*)", 1.0),
        ("7 %% 4", 3.0),
    ],
)
def test_a_number_is_the_value(expression: str, value: float, shard: Shard) -> None:
    sample = one(f"SELECT {expression} AS value", shard)
    assert (sample.status, sample.value, sample.dims, sample.period) == (Status.OK, value, "", "")


def test_other_columns_are_evidence_and_a_period_is_none(shard: Shard) -> None:
    sample = one("SELECT 3 AS value, '2026-11' AS period, 40 AS n, 'x' AS tenants, NULL AS nothing;\n", shard)
    assert (sample.status, sample.value, sample.period) == (Status.OK, 3.0, "2026-11")
    del (evidence := dict(sample.evidence))["query_sha256"]
    assert evidence == {"n": 40, "tenants": "x", "nothing": None}


@pytest.mark.parametrize(
    "text", ["WITH x AS (SELECT 4 AS value) SELECT * FROM x", "SELECT 4 AS value -- four", "(SELECT 4 AS value) ;  "]
)
def test_a_query_may_be_written_in_several_ways(text: str, shard: Shard) -> None:
    assert one(text, shard).value == 4.0


@pytest.mark.parametrize(
    ("query", "status", "said"),
    [
        ("SELECT NULL::int AS value", Status.EMPTY, "NULL"),
        ("SELECT sum(n)::float8 AS value FROM (SELECT 1 AS n WHERE false) AS x", Status.EMPTY, "NULL"),
        ("SELECT 1 AS value WHERE false", Status.EMPTY, "no row"),
        ("SELECT generate_series(1, 1000000) AS value", Status.ERROR, "more than one row"),
        ("SELECT 1 AS figure", Status.ERROR, "no column named value"),
        ("SELECT", Status.ERROR, "no column named value"),
        ('SELECT 1 AS "Value"', Status.ERROR, "no column named value"),
        ("SELECT '7' AS value", Status.ERROR, "text"),
        ("SELECT true AS value", Status.ERROR, "boolean"),
        ("SELECT now() AS value", Status.ERROR, "text"),
        ("SELECT ARRAY[1] AS value", Status.ERROR, "an array"),
        ("SELECT '{\"a\": 1}'::jsonb AS value", Status.ERROR, "an object"),
        ("SELECT 'NaN'::float8 AS value", Status.ERROR, "NaN"),
        ("SELECT 'NaN'::numeric AS value", Status.ERROR, "NaN"),
        ("SELECT 'Infinity'::float8 AS value", Status.ERROR, "Infinity"),
        ("SELECT '-Infinity'::numeric AS value", Status.ERROR, "-Infinity"),
        ("SELECT 10::numeric ^ 400 AS value", Status.ERROR, "no number"),
        ("SELECT -1 AS value", Status.ERROR, "-1"),
        ("SELECT -0.001 AS value", Status.ERROR, "-0.001"),
        ("SELECT 1 AS value, 'many' AS n", Status.ERROR, "n is no number"),
        ("SELECT 1 AS value, -1 AS n", Status.ERROR, "n is no number"),
        ("SELECT 1 AS value, 2::numeric ^ 53 AS n", Status.ERROR, "n is no number"),
        ("SELECT 1 AS value, true AS n", Status.ERROR, "n is no number"),
        ("SELECT 1 AS value, 'NaN'::float8 AS n", Status.ERROR, "n is no number"),
        ("SELECT 1 AS value, '2026-13' AS period", Status.ERROR, "no month"),
        ("SELECT 1 AS value, DATE '2026-11-01' AS period", Status.ERROR, "no month"),
        ("SELECT 1 AS value, 202611 AS period", Status.ERROR, "no month"),
        ("SELECT 1 AS value, '' AS period", Status.ERROR, "no month"),
        (f"SELECT 1 AS value, repeat('x', {MOST_CHARACTERS}) AS much", Status.ERROR, "longer than"),
        ("SELECT 1 AS value, (repeat('[', 3000) || repeat(']', 3000))::jsonb AS deep", Status.ERROR, "RecursionError"),
        ("SELECT 1 / 0 AS value", Status.ERROR, "DivisionByZero (SQLSTATE 22012)"),
        ("SELEC 1", Status.ERROR, 'SyntaxError (SQLSTATE 42601), syntax error at or near "1"'),
        ("", Status.ERROR, "SyntaxError"),
        ("SELECT no_such(1) AS value", Status.ERROR, "function no_such(integer) does not exist"),
        ("SELECT %(none)s::int AS value", Status.ERROR, "query parameter missing: none"),
        ("SELECT 7 % 4 AS value", Status.ERROR, "%%"),
    ],
)
def test_what_is_no_figure_says_so(query: str, status: Status, said: str, shard: Shard) -> None:
    sample = one(query, shard)
    assert (sample.status, sample.value) == (status, None)
    assert said in sample.evidence["error" if status is Status.ERROR else "note"]


def test_a_column_cannot_pose_as_what_the_source_says(shard: Shard) -> None:
    sample = one("SELECT NULL AS value, 'mine' AS query_sha256, 'mine' AS note", shard)
    assert sample.evidence["query_sha256"] != "mine"
    assert sample.evidence["note"] == "the query returned NULL"


def test_evidence_is_json_and_can_be_stored(fresh: Shard) -> None:
    sample = one(
        "SELECT 1 AS value, 1.50 AS \"decimal\", DATE '2026-11-18' AS day, TIMESTAMPTZ '2026-11-18 13:00+01' AS moment,"
        " '00000000-0000-0000-0000-000000000001'::uuid AS id, '{\"a\": [1, null]}'::jsonb AS object,"
        " ARRAY[1.5, 2] AS list, '\\x00ff'::bytea AS bytes, interval '90 minutes' AS took, 'NaN'::float8 AS nan,"
        " 'infinity'::timestamptz AS never, '[1,4)'::int4range AS span, 10::numeric ^ 5000 AS huge, true AS yes,"
        " ROW(1, 'x') AS pair, TIME '12:00' AS hour, '10.0.0.1'::inet AS address",
        fresh,
    )
    assert sample.status is Status.OK
    evidence = dict(sample.evidence)
    assert evidence.pop("huge").startswith("1000000")
    del evidence["query_sha256"]
    assert evidence == {
        "decimal": 1.5,
        "day": "2026-11-18",
        "moment": "2026-11-18T12:00:00+00:00",
        "id": "00000000-0000-0000-0000-000000000001",
        "object": {"a": [1, None]},
        "list": [1.5, 2],
        "bytes": "\\x00ff",
        "took": "01:30:00",
        "nan": "NaN",
        "never": "infinity",
        "span": "[1,4)",
        "yes": True,
        "pair": {"f1": 1, "f2": "x"},
        "hour": "12:00:00",
        "address": "10.0.0.1",
    }
    with fresh.transaction() as connection:
        record(connection, [sample])
    with fresh.transaction() as connection:
        (stored,) = history(connection, "a_metric")
    assert stored.evidence == sample.evidence


@pytest.mark.parametrize("text", ["'\"\\u0000\"'::json", '\'{"a": "\\ud800"}\'::json'])
def test_text_that_cannot_be_stored_is_an_error(text: str, shard: Shard) -> None:
    assert one(f"SELECT 1 AS value, {text} AS odd", shard).status is Status.ERROR


def test_placeholders_are_the_moment_the_shard_and_the_parameters(shard: Shard) -> None:
    query = (
        "SELECT %(most)s AS value, %(now)s AS now, %(shard)s::text AS shard, 'ab' LIKE 'a%%' AS matches,"
        " %(name)s = 'x''); DROP TABLE sync.runs; --' AS same"
    )
    parameters = {"most": 12.5, "name": "x'); DROP TABLE sync.runs; --"}
    sample = one(SqlSource(query, parameters=parameters), shard)
    assert (sample.status, sample.value) == (Status.OK, 12.5)
    assert sample.evidence["now"] == "2026-11-18T13:07:30+00:00"
    assert [sample.evidence[key] for key in ("shard", "matches", "same")] == ["main", True, True]


def test_without_parameters_a_percent_sign_is_one(shard: Shard) -> None:
    query = "SELECT 7 % 4 AS value, 'a%' AS text, '%(now)s' AS literal, '%%' AS two"
    sample = one(SqlSource(query, parameters=None), shard)
    assert (sample.value, sample.evidence["text"]) == (3.0, "a%")
    assert (sample.evidence["literal"], sample.evidence["two"]) == ("%(now)s", "%%")


def test_a_parameter_that_postgres_has_no_type_for_is_an_error(shard: Shard) -> None:
    assert one(SqlSource("SELECT %(x)s AS value", parameters={"x": object()}), shard).status is Status.ERROR


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("SELECT count(*) AS value FROM public.incidents", 'relation "public.incidents" does not exist'),
        ("SELECT no_such AS value FROM public.users", 'column "no_such" does not exist'),
        ("SELECT count(*) AS value FROM no_such.users", 'relation "no_such.users" does not exist'),
        ("SELECT no_such.f() AS value", 'schema "no_such" does not exist'),
        ("SELECT pg_relation_size('no_such') AS value", 'relation "no_such" does not exist'),
    ],
)
def test_what_does_not_exist_is_empty_and_says_how_to_name_another(query: str, name: str, shard: Shard) -> None:
    sample = one(query, shard)
    assert sample.status is Status.EMPTY
    assert sample.evidence["note"] == (
        f"{name}; name your own table with sql = '…' of [a_metric] in SCALING_CATALOGUE_FILE"
    )


@pytest.fixture
def stranger(login: Callable[..., str]) -> Iterator[Shard]:
    """A login without any privilege."""
    made = Shard("main", login(), pool_size=1)
    yield made
    made.close()


def test_a_missing_privilege_is_an_error_that_names_the_grant(stranger: Shard, database: Database) -> None:
    query = "SELECT count(*) AS value FROM private.figures"
    do(database, "CREATE SCHEMA private; CREATE TABLE private.figures (value int)")
    sample = one(query, stranger)
    assert sample.status is Status.ERROR
    assert sample.evidence["error"] == (
        "permission denied for schema private; GRANT it (USAGE on the schema, SELECT on the table) to the role of "
        "DATABASE_URL"
    )
    do(database, "GRANT USAGE ON SCHEMA private TO PUBLIC")
    assert "permission denied for table figures; GRANT" in one(query, stranger).evidence["error"]
    do(database, "GRANT SELECT ON private.figures TO PUBLIC")
    assert one(query, stranger).value == 0.0


def test_rows_that_row_level_security_would_hide_are_an_error_not_a_smaller_figure(
    stranger: Shard, database: Database
) -> None:
    do(
        database,
        "CREATE TABLE public.figures AS SELECT generate_series(1, 5) AS value",
        "GRANT SELECT ON public.figures TO PUBLIC",
    )
    query = "SELECT count(*) AS value FROM public.figures"
    assert one(query, stranger).value == 5.0
    do(database, "ALTER TABLE public.figures ENABLE ROW LEVEL SECURITY")
    do(database, "CREATE POLICY lowest ON public.figures USING (value < 3)")
    sample = one(query, stranger)
    assert sample.status is Status.ERROR
    assert 'security policy for table "figures"' in sample.evidence["error"]
    assert "BYPASSRLS" in sample.evidence["error"]
    assert "GRANT" not in sample.evidence["error"]


def test_a_role_with_bypassrls_counts_all_rows(fresh: Shard, database: Database) -> None:
    do(database, "CREATE TABLE public.figures AS SELECT 1 AS value; GRANT SELECT ON public.figures TO PUBLIC")
    do(database, "ALTER TABLE public.figures ENABLE ROW LEVEL SECURITY")
    assert one("SELECT count(*) AS value FROM public.figures", fresh).value == 1.0


def test_a_slow_query_ends_in_time_and_its_connection_serves_on(shard: Shard) -> None:
    before = state(shard)
    began = time.monotonic()
    sample = one("SELECT 1 AS value FROM pg_sleep(20)", shard, scaling_source_timeout_seconds=0.3)
    assert time.monotonic() - began < 5
    assert sample.status is Status.ERROR
    assert sample.evidence["error"] == "the query took longer than 0.3 s (SCALING_SOURCE_TIMEOUT_SECONDS)"
    assert state(shard) == before
    assert one("SELECT 1 AS value", shard).value == 1.0


def test_the_shortest_limit_is_not_none(shard: Shard) -> None:
    began = time.monotonic()
    sample = one("SELECT 1 AS value FROM pg_sleep(5)", shard, scaling_source_timeout_seconds=0.0001)
    assert time.monotonic() - began < 4
    assert sample.status is Status.ERROR


def test_waiting_for_a_lock_counts_against_the_time(fresh: Shard, database: Database) -> None:
    with psycopg.connect(database.admin_dsn) as admin:
        admin.execute("LOCK TABLE public.users IN ACCESS EXCLUSIVE MODE")
        began = time.monotonic()
        sample = one("SELECT count(*) AS value FROM public.users", fresh, scaling_source_timeout_seconds=0.3)
        assert time.monotonic() - began < 5
    assert "longer than 0.3 s" in sample.evidence["error"]


def test_a_cancelled_query_did_not_take_too_long(fresh: Shard, database: Database) -> None:
    backend = state(fresh)[0]
    cancel = threading.Timer(0.5, do, [database, f"SELECT pg_cancel_backend({backend})"])
    cancel.start()
    sample = one("SELECT 1 AS value FROM pg_sleep(8)", fresh, scaling_source_timeout_seconds=60)
    cancel.join()
    assert (sample.status, sample.evidence["error"]) == (Status.ERROR, "somebody cancelled the query")


@pytest.mark.parametrize("parameters", [{}, None], ids=["parameters", "none"])
@pytest.mark.parametrize(
    "query",
    [
        f"{INSERTION} RETURNING 1 AS value",
        f"WITH new AS ({INSERTION} RETURNING 1 AS value) SELECT value FROM new",
        f"COMMIT; {INSERTION}",
        "COMMIT",
        "ROLLBACK",
        f"SELECT 1 AS value; COMMIT; {INSERTION}",
        f"SELECT 1 AS value; {INSERTION}",
        "SELECT 1 AS value; SELECT 2 AS value",
        f"SELECT 1 AS value) AS x; COMMIT; {INSERTION}; SELECT (SELECT 1",
        "SET TRANSACTION READ WRITE",
        "BEGIN",
        "SELECT 1 AS value, set_config('transaction_read_only', 'off', true)",
        f"DO $$ BEGIN {INSERTION}; END $$",
        "SELECT public.write() AS value",
        "SELECT 1 AS value FROM sync.runs FOR UPDATE",
        "SELECT 1 AS value INTO public.other",
        "CREATE TEMP TABLE x (value int)",
        "COPY sync.runs TO STDOUT",
        "COPY sync.runs FROM STDIN",
        "EXPLAIN SELECT 1",
        "LOCK TABLE sync.runs",
    ],
)
def test_what_is_more_than_one_query_is_an_error_and_changes_nothing(
    query: str, parameters: dict[str, Any] | None, shard: Shard
) -> None:
    before = state(shard)
    sample = one(SqlSource(query, parameters=parameters), shard)
    assert (sample.status, sample.value) == (Status.ERROR, None)
    assert state(shard) == before
    with shard.transaction() as connection:
        assert connection.execute("SELECT count(*), to_regclass('public.other') FROM sync.runs").fetchone() == (0, None)


@pytest.mark.parametrize(
    "query",
    [
        "SELECT 1 AS value",
        "SELECT 1 / 0 AS value",
        "SELECT 1 AS value FROM no_such",
        "SELECT 1 AS value, set_config('search_path', 'elsewhere', false), set_config('timezone', 'Asia/Tokyo', false)",
        "SELECT 1 AS value, set_config('statement_timeout', '5ms', false), set_config('row_security', 'on', false)",
    ],
)
def test_no_setting_is_left_to_the_next_user_of_the_connection(query: str, shard: Shard) -> None:
    before = state(shard)
    for _ in range(7):  # psycopg prepares what it ran five times
        one(query, shard)
    assert state(shard) == before
    with shard.transaction() as connection:
        assert connection.execute("SELECT count(*) FROM pg_prepared_statements").fetchone() == (0,)
        connection.execute(INSERTION.encode())  # it may write again
        raise psycopg.Rollback


@pytest.mark.parametrize(
    ("expression", "status"),
    [
        ("word::int", Status.ERROR),
        (f"'{SECRET}'::int", Status.ERROR),
        ("word::timestamptz", Status.ERROR),
        ("word::regclass", Status.EMPTY),
        ("nextval(word)", Status.EMPTY),
        ("public.say(word, 'P0001')", Status.ERROR),
        ("public.say(word, '42501')", Status.ERROR),
        ("public.say(word, '42P01')", Status.EMPTY),
        ("public.say(word, '57014')", Status.ERROR),
        ("public.say(word, '42601')", Status.ERROR),
        ("public.dynamic(word)", Status.EMPTY),
        ("current_setting(word)", Status.ERROR),
        ("word", Status.ERROR),
    ],
)
def test_a_message_of_postgres_that_quotes_a_value_stays_out_of_the_sample(
    expression: str, status: Status, shard: Shard
) -> None:
    sample = one(f"SELECT {expression} AS value FROM public.secrets", shard)
    assert sample.status is status
    assert SECRET not in repr(sample)


@pytest.mark.parametrize("cast", ["int", "regclass", "timestamptz"])
def test_a_message_of_postgres_that_quotes_a_parameter_stays_out_of_the_sample(cast: str, shard: Shard) -> None:
    sample = one(SqlSource(f"SELECT %(word)s::{cast} AS value", parameters={"word": SECRET}), shard)
    assert sample.value is None
    assert SECRET not in repr(sample)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scaling.databases.CONNECT_TIMEOUT_SECONDS", 1)


@pytest.mark.usefixtures("impatient")
def test_a_server_that_is_down_is_an_error() -> None:
    down = Shard("main", f"postgresql://pipeline:{SECRET}@127.0.0.1:1/none")
    sample = one("SELECT 1 AS value", down)
    down.close()
    assert sample.status is Status.ERROR
    assert "does not answer or refuses the login; check DATABASE_URL" in sample.evidence["error"]
    assert SECRET not in repr(sample)


@pytest.mark.usefixtures("impatient")
def test_a_refused_login_is_an_error(running_servers: Servers, database: Database) -> None:
    refused = Shard("main", running_servers.postgres.dsn(database.name, user="pipeline", password=SECRET))
    sample = one("SELECT 1 AS value", refused)
    refused.close()
    assert sample.status is Status.ERROR
    assert "refuses the login" in sample.evidence["error"]
    assert SECRET not in repr(sample)


def test_a_connection_that_breaks_during_the_query_is_an_error_and_the_next_one_is_fine(shard: Shard) -> None:
    sample = one("SELECT pg_terminate_backend(pg_backend_pid())::int AS value", shard)
    assert sample.status is Status.ERROR
    assert "AdminShutdown" in sample.evidence["error"]
    assert one("SELECT 1 AS value", shard).value == 1.0


def test_a_closed_pool_is_an_error(shard: Shard) -> None:
    one("SELECT 1 AS value", shard)
    shard.close()
    assert one("SELECT 1 AS value", shard).status is Status.ERROR


@pytest.mark.parametrize(
    ("count", "status"),
    [("20", Status.OK), ("19", Status.PARTIAL), ("1", Status.PARTIAL), ("0", Status.EMPTY), ("NULL", Status.EMPTY)],
)
@pytest.mark.parametrize("across", list(Across))
def test_it_takes_at_least_so_many_observations(count: str, status: Status, across: Across, shard: Shard) -> None:
    sample = one(SqlSource(f"SELECT 5 AS value, {count}::bigint AS n, '2026-11' AS period", across, least=20), shard)
    assert (sample.status, sample.value) == (status, 5.0 if status is Status.OK else None)
    assert sample.period == "2026-11"
    assert sample.dims == ("shard=main" if across is Across.EACH else "")


def test_observations_that_nobody_counted_are_an_error_where_they_are_needed(shard: Shard) -> None:
    sample = one(SqlSource("SELECT 5 AS value", least=1), shard)
    assert (sample.status, "no column named n" in sample.evidence["error"]) == (Status.ERROR, True)
    assert one(SqlSource("SELECT 5 AS value WHERE false", least=1), shard).status is Status.EMPTY
    assert one(SqlSource("SELECT -5 AS value, 0 AS n", least=1), shard).status is Status.ERROR


def test_counts_of_shards_are_added(two: tuple[Shard, Shard]) -> None:
    put(two[0], (0.1, 3, "2026-11"))
    put(two[1], (0.2, 4, "2026-11"))
    sample = one(FIGURES, *two)
    assert (sample.status, sample.dims, sample.period) == (Status.OK, "", "2026-11")
    assert sample.value == pytest.approx(0.3)
    assert sample.evidence["n"] == 7
    assert sample.evidence["shards"] == {
        "a": {"n": 3, "status": "ok", "value": 0.1, "period": "2026-11"},
        "b": {"n": 4, "status": "ok", "value": 0.2, "period": "2026-11"},
    }


def test_a_mean_of_shards_is_weighted_by_their_observations(two: tuple[Shard, Shard]) -> None:
    put(two[0], (10.0, 30, "2026-11"))
    put(two[1], (50.0, 10, "2026-11"))
    sample = one(SqlSource(FIGURES, Across.MEAN), *two)
    assert (sample.status, sample.value, sample.period) == (Status.OK, 20.0, "2026-11")


def test_each_shard_can_be_a_sample_of_its_own(two: tuple[Shard, Shard]) -> None:
    put(two[0], (10.0, 30, None))
    samples = ask(SqlSource(FIGURES, Across.EACH), *two)
    assert [(sample.dims, sample.status, sample.value) for sample in samples] == [
        ("shard=a", Status.OK, 10.0),
        ("shard=b", Status.EMPTY, None),
    ]


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("across", [Across.SUM, Across.MEAN])
def test_one_shard_that_fails_makes_an_error_not_a_smaller_figure(
    bad: float, across: Across, two: tuple[Shard, Shard]
) -> None:
    put(two[0], (10.0, 30, None))
    put(two[1], (bad, 30, None))
    sample = one(SqlSource(FIGURES, across), *two)
    assert sample.status is Status.ERROR
    assert sample.evidence["error"].startswith("shard b: ")
    assert sample.evidence["shards"]["a"]["value"] == 10.0


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("across", [Across.SUM, Across.MEAN])
def test_one_shard_that_is_down_makes_an_error_not_a_smaller_figure(across: Across, two: tuple[Shard, Shard]) -> None:
    put(two[0], (10.0, 30, None))
    down = Shard("down", "postgresql://127.0.0.1:1/none")
    sample = one(SqlSource(FIGURES, across), two[0], down)
    down.close()
    assert (sample.status, sample.evidence["shards"]["down"]["status"]) == (Status.ERROR, "error")
    first, second = ask(SqlSource(FIGURES, Across.EACH), two[0], two[1])
    assert (first.status, second.status) == (Status.OK, Status.EMPTY)


@pytest.mark.parametrize("across", [Across.SUM, Across.MEAN])
def test_one_shard_without_the_table_or_a_row_makes_it_partial(
    across: Across, two: tuple[Shard, Shard], shard: Shard
) -> None:
    put(two[0], (10.0, 30, None))
    for other in (two[1], shard):
        sample = one(SqlSource(FIGURES, across), two[0], other)
        assert (sample.status, sample.value) == (Status.PARTIAL, None)
        assert sample.evidence["note"] == f"there is nothing of it on shard {other.name}"


@pytest.mark.parametrize("across", [Across.SUM, Across.MEAN])
def test_nothing_on_any_shard_is_empty(across: Across, two: tuple[Shard, Shard]) -> None:
    assert one(SqlSource(FIGURES, across), *two).status is Status.EMPTY
    put(two[0], (None, 0, None))
    put(two[1], (None, 0, None))
    assert one(SqlSource(FIGURES, across), *two).status is Status.EMPTY


def test_a_shard_that_observed_nothing_has_no_weight_in_a_mean(two: tuple[Shard, Shard]) -> None:
    put(two[0], (10.0, 30, None))
    put(two[1], (None, 0, None))
    assert one(SqlSource(FIGURES, Across.MEAN), *two).value == 10.0
    assert one(SqlSource(FIGURES, Across.SUM), *two).status is Status.PARTIAL


def test_a_mean_of_several_shards_takes_their_observations(two: tuple[Shard, Shard]) -> None:
    sample = one(SqlSource("SELECT 1 AS value", Across.MEAN), *two)
    assert (sample.status, "column named n" in sample.evidence["error"]) == (Status.ERROR, True)


@pytest.mark.parametrize("across", [Across.SUM, Across.MEAN])
@pytest.mark.parametrize(("second", "status"), [(12, Status.OK), (11, Status.PARTIAL), (0, Status.PARTIAL)])
def test_shards_have_their_observations_together(
    second: int, status: Status, across: Across, two: tuple[Shard, Shard]
) -> None:
    put(two[0], (10.0, 8, None))
    put(two[1], (10.0, second, None))
    sample = one(SqlSource(FIGURES, across, least=20), *two)
    assert sample.status is status
    each = ask(SqlSource(FIGURES, Across.EACH, least=20), *two)
    assert [one.status for one in each] == [Status.PARTIAL, Status.EMPTY if second == 0 else Status.PARTIAL]


@pytest.mark.parametrize("across", [Across.SUM, Across.MEAN])
@pytest.mark.parametrize("period", ["2026-12", None])
def test_figures_of_two_months_are_never_put_together(
    period: str | None, across: Across, two: tuple[Shard, Shard]
) -> None:
    put(two[0], (9000.0, 8, "2026-11"))
    put(two[1], (1.0, 8, period))
    sample = one(SqlSource(FIGURES, across, least=1), *two)
    assert (sample.status, sample.value, sample.period) == (Status.PARTIAL, None, "")
    assert "2026-11" in sample.evidence["note"]


def test_the_moment_of_the_measurement_decides_the_month_on_every_shard(two: tuple[Shard, Shard]) -> None:
    query = "SELECT 1 AS value, to_char(%(now)s::timestamptz, 'YYYY-MM') AS period"
    moment = datetime(2026, 11, 30, 23, 59, 59, 999999, UTC)
    with clients.client() as client:
        (sample,) = SqlSource(query).read("a_metric", Reach(Shards(*two), client, settings({}), moment))
    assert (sample.value, sample.period) == (2.0, "2026-11")


def test_what_it_asks_can_be_read() -> None:
    source = SqlSource("SELECT 1\n  AS value", Across.MEAN, least=20)
    assert source.describe() == "SQL, mean of all shards, weighted by n, at least 20 observations: SELECT 1 AS value"
