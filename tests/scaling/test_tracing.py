"""What a span says, and that no collector, however ill, costs a run its work or its time."""

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psycopg
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from psycopg import sql

from devstack.otlp import Collector, ReceivedSpan, collector, wait_for
from devstack.servers import Database
from scaling import trace_export, tracing
from scaling.databases import DatabaseRouter, Shard
from scaling.errors import UserError
from scaling.settings import TracingSettings, load

SECRET = "c4n4ry@example.com"  # stands for a row's content


@pytest.fixture
def started(traces: Collector) -> Collector:
    assert tracing.start("test")
    return traces


def only(spans: list[ReceivedSpan], name: str) -> ReceivedSpan:
    [span] = [span for span in spans if span.name == name]
    return span


def work(run_id: str = "run-1", spans: int = 3) -> float:
    """A run of so many spans; how many seconds its end took."""
    with tracing.run(run_id, "run"):
        for _ in range(spans):
            with tracing.span("piece"):
                pass
        ended = time.monotonic()
    return time.monotonic() - ended


def test_every_process_names_the_same_trace_of_a_run(started: Collector) -> None:
    work("run-1")
    assert {span.trace_id for span in started.spans()} == {tracing.trace_id_of("run-1")}
    assert tracing.trace_id_of("run-1") != tracing.trace_id_of("run-2")


def test_the_service_is_named_by_the_code_location_or_by_the_environment(
    traces: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracing.start("sync_pipeline")
    work()
    tracing.stop()
    monkeypatch.setenv("OTEL_SERVICE_NAME", "calendars")
    tracing.start("sync_pipeline")
    work()
    assert {span.service for span in traces.spans()} == {"sync_pipeline", "calendars"}


def test_threads_keep_their_parent(started: Collector) -> None:
    def piece(number: int) -> None:
        with tracing.span(f"piece {number}"):
            pass

    with tracing.run("run-1", "run"), tracing.span("step"), ThreadPoolExecutor(2) as pool:
        list(pool.map(tracing.carried(piece), range(4)))
    assert sorted(started.paths()) == ["run", "run > step", *(f"run > step > piece {n}" for n in range(4))]


def test_what_runs_beside_a_run_makes_no_trace_of_its_own(started: Collector, database: Database) -> None:
    def beat() -> None:
        with router.shards()[0].transaction() as connection:
            connection.execute("SELECT 1")

    with tracing.span("alone"), DatabaseRouter(Shard("main", database.dsn)) as router, tracing.run("run-1", "run"):
        beside = threading.Thread(target=beat)
        beside.start()
        beside.join()
    assert started.paths() == ["run"]


def test_an_error_is_told_by_its_type_and_sqlstate_and_never_by_its_text(
    started: Collector, database: Database
) -> None:
    with (
        DatabaseRouter(Shard("main", database.dsn)) as router,
        tracing.run("run-1", "run"),
        pytest.raises(psycopg.Error),
        tracing.span("work"),
        router.shards()[0].transaction() as connection,
    ):
        connection.execute("SELECT %s::int", (SECRET,))
    statement, work = only(started.spans(), "SELECT"), only(started.spans(), "work")
    assert statement.is_error
    assert statement.attributes["error.type"] == "psycopg.errors.InvalidTextRepresentation"
    assert statement.attributes["db.response.status_code"] == "22P02"
    assert (work.is_error, work.status_message, work.events) == (True, "", ())
    assert not only(started.spans(), "run").is_error
    assert SECRET not in "".join(body.decode("latin-1") for body in started.bodies)


def test_a_commit_is_a_span_and_a_rollback_is_none(started: Collector, database: Database) -> None:
    with DatabaseRouter(Shard("main", database.dsn)) as router, tracing.run("run-1", "run"):
        [shard] = router.shards()
        with tracing.span("pooled"), shard.transaction() as connection:
            connection.execute("SELECT 1")
        with tracing.span("alone"), shard.dedicated(autocommit=False) as connection:
            connection.execute("SELECT 1")
        with tracing.span("by itself"), shard.dedicated() as connection:
            connection.execute("SELECT 1")
        with tracing.span("undone"), suppress(KeyError), shard.transaction():
            raise KeyError
    commits = [path for path in started.paths() if path.endswith("COMMIT")]
    assert sorted(commits) == ["run > alone > COMMIT", "run > pooled > COMMIT"]


def test_a_commit_that_is_refused_says_so(started: Collector, database: Database) -> None:
    with (
        DatabaseRouter(Shard("main", database.dsn)) as router,
        tracing.run("run-1", "run"),
        pytest.raises(psycopg.errors.UniqueViolation),
        router.shards()[0].transaction() as connection,
    ):
        connection.execute(
            "CREATE TEMP TABLE late (id int UNIQUE DEFERRABLE INITIALLY DEFERRED); INSERT INTO late VALUES (1), (1)"
        )
    commit = only(started.spans(), "COMMIT")
    assert commit.attributes["error.type"] == "psycopg.errors.UniqueViolation"
    assert commit.attributes["db.response.status_code"] == "23505"


def test_a_long_wait_for_a_connection_is_a_span(started: Collector, database: Database) -> None:
    with DatabaseRouter(Shard("main", database.dsn, pool_size=1)) as router, tracing.run("run-1", "run"):
        [shard] = router.shards()
        taken, wanted = threading.Event(), threading.Event()

        def hold() -> None:
            with shard.transaction():
                taken.set()
                wanted.wait(10)
                time.sleep(0.1)

        holding = threading.Thread(target=hold)
        holding.start()
        taken.wait(10)
        with tracing.span("waits"):
            wanted.set()
            with shard.transaction():
                pass
        holding.join()
    assert "run > waits > connection" in started.paths()
    assert 0.05 < only(started.spans(), "connection").seconds < 10


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("INSERT INTO sync.runs (run_id) VALUES (%s)", "INSERT sync.runs"),
        (b"UPDATE sync.calendar_state SET due_at = now()", "UPDATE sync.calendar_state"),
        ("SELECT * FROM unnest(%s) AS t JOIN sync.runs r USING (id)", "SELECT sync.runs"),
        ("SELECT count(*) FROM sync.fresh(1)", "SELECT"),
        (
            sql.SQL("DELETE FROM {} WHERE mail = {}").format(sql.Identifier("public", "users"), sql.Literal(SECRET)),
            "DELETE public.users",
        ),
        (sql.SQL("{}").format(sql.Literal(f"x from {SECRET}")), "SQL"),
    ],
)
def test_a_statement_is_named_by_what_it_does_to_which_table(query: str | bytes | sql.Composed, name: str) -> None:
    assert tracing.summary(query) == name


def test_what_is_not_on_the_list_stays_here_whoever_says_it(started: Collector) -> None:
    """As instrumentations of others do: attributes, texts of errors, events with stacks."""
    with tracing.run("run-1", "run"), tracing.span("work", {"tenant.id": "t", "url.full": SECRET}) as span:
        span.record_exception(ValueError(SECRET))
        span.set_status(trace.StatusCode.ERROR, SECRET)
        span.set_attribute("count.rows", 3)
    told = only(started.spans(), "work")
    assert told.attributes == {"tenant.id": "t", "count.rows": 3, "error.type": "ValueError"}
    assert (told.is_error, told.status_message, told.events) == (True, "", ())


def test_lines_of_the_pipelines_name_the_trace_and_others_carry_it(
    started: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    trace_id = tracing.trace_id_of("run-1")
    with tracing.run("run-1", "run"):
        logging.getLogger("sync_pipeline").warning("within %s", "the run")
        logging.getLogger("others").warning("within")
    logging.getLogger("sync_pipeline").warning("after")
    assert caplog.messages == [f"within the run trace_id={trace_id}", "within", "after"]
    assert [getattr(record, "otelTraceID", None) for record in caplog.records] == [trace_id, trace_id, None]


def test_the_link_needs_a_trace_ui(started: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracing.link_of("run-1") is None
    monkeypatch.setenv("TRACE_UI_URL", "https://t.example.com/{trace_id}?tab=1")
    assert tracing.link_of("run-1") == f"https://t.example.com/{tracing.trace_id_of('run-1')}?tab=1"
    monkeypatch.setenv("TRACE_UI_URL", "https://t.example.com/")
    assert tracing.link_of("run-1") is None, "a wrong setting costs the link, not the run"


def test_a_wrong_setting_is_told_and_leaves_tracing_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318")
    with pytest.raises(UserError, match="OTEL_EXPORTER_OTLP_ENDPOINT must be"):
        load(TracingSettings)
    assert not tracing.start("test")
    assert "runs are not traced: OTEL_EXPORTER_OTLP_ENDPOINT" in caplog.text
    assert work() < 0.1


def test_off_nothing_is_recorded_and_nothing_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert not tracing.start("test")
    with tracing.run("run-1", "run") as run, tracing.span("work") as span:
        tracing.ended("done", {"rows": 1})
        tracing.failed("kind")
        assert (run.is_recording(), span.is_recording()) == (False, False)
    assert tracing.carried(work) is work
    assert tracing.cursor_factory() is psycopg.Cursor


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_export, "EXPORT_SECONDS", 0.3)
    monkeypatch.setattr(trace_export, "FLUSH_SECONDS", 0.5)
    monkeypatch.setattr(trace_export, "SILENCE_SECONDS", 0.3)


@pytest.fixture
def deaf(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody listens at the endpoint."""
    with collector() as gone:
        pass
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", gone.endpoint)
    yield
    tracing.stop()


def test_a_dead_collector_is_not_waited_for(deaf: None) -> None:
    assert tracing.start("test")
    assert work() < 0.2
    assert work("run-2") < 0.1


def test_a_collector_that_hangs_is_waited_for_once_and_briefly(started: Collector, impatient: None) -> None:
    tracing.stop()
    assert tracing.start("test")
    started.mood = "hangs"
    assert work() < 0.8
    time.sleep(0.4)
    assert work("run-2") < 0.1, "it took nothing the last time"


def test_a_collector_that_came_back_gets_what_is_new(started: Collector, impatient: None) -> None:
    tracing.stop()
    assert tracing.start("test")
    started.mood = "refuses"
    work("run-1")
    time.sleep(0.8)
    started.mood = "well"
    work("run-2")
    deadline = time.monotonic() + 10
    while not started.bodies and time.monotonic() < deadline:
        work("run-3")
        time.sleep(0.2)
    assert {span.trace_id for span in started.spans()} <= {tracing.trace_id_of(f"run-{n}") for n in (2, 3)}
    assert started.spans()


def is_recorded() -> bool:
    with tracing.span("piece") as span:
        return span.is_recording()


@pytest.fixture
def prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans are sent at once."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")


def wait_for_silence() -> None:
    deadline = time.monotonic() + 5
    while is_recorded():
        assert time.monotonic() < deadline, "spans are recorded that nobody takes"
        time.sleep(0.02)


def test_nothing_is_recorded_that_nobody_takes(prompt: None, deaf: None) -> None:
    assert tracing.start("test")
    with tracing.run("run-1", "run") as run:
        wait_for_silence()
        assert isinstance(run, ReadableSpan)
        with tracing.span("work"):
            tracing.ended("failed", {"rows": 1})
            tracing.failed("kind")
        assert set(run.attributes or {}) == {tracing.RUN_ID}, "what is said of the work is not said of the run"
        assert run.status.is_unset


def test_what_is_new_hangs_beneath_what_was_recorded_once_the_collector_is_back(
    started: Collector, impatient: None, prompt: None
) -> None:
    tracing.stop()
    assert tracing.start("test")
    started.mood = "refuses"
    with tracing.run("run-1", "run"):
        wait_for_silence()
        with tracing.span("unrecorded"):
            started.mood = "well"
            time.sleep(0.4)
            with tracing.span("late"):
                pass
    assert {"run", "run > late"} <= set(started.paths()) <= {"run", "run > late", "run > piece"}


def test_a_collector_that_is_back_at_the_end_gets_the_run_itself(
    started: Collector, prompt: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_export, "EXPORT_SECONDS", 0.3)
    tracing.stop()
    assert tracing.start("test")
    started.mood = "refuses"
    with tracing.run("run-1", "run"):
        wait_for_silence()
        started.mood = "well"
    assert "run" in {span.name for span in wait_for(started, 1)}


def test_a_flapping_collector_loses_spans_and_no_work(started: Collector, impatient: None) -> None:
    tracing.stop()
    assert tracing.start("test")
    started.mood = "flaps"
    began = time.monotonic()
    done = [work(f"run-{number}") for number in range(20)]
    assert len(done) == 20
    assert time.monotonic() - began < 5


def test_the_queue_is_bounded_while_nobody_takes_anything(
    started: Collector, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracing.stop()
    monkeypatch.setattr(trace_export, "QUEUE_SPANS", 600)
    assert tracing.start("test")
    started.mood = "hangs"
    assert work(spans=5_000) < 0.8
    started.mood = "well"
    deadline = time.monotonic() + 10
    while not started.bodies and time.monotonic() < deadline:
        work("run-2")
        time.sleep(0.2)
    first = tracing.trace_id_of("run-1")
    assert started.spans()
    assert sum(span.trace_id == first for span in started.spans()) <= 600
