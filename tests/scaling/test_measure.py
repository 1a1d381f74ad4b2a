"""One measurement: what is due, that trouble of one source is no other's, and what is recorded and judged of it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from devstack import metrics_apis
from devstack.otlp import Collector
from devstack.servers import Database
from scaling import episodes, samples, tracing
from scaling.capabilities import Capability, Mode
from scaling.catalogue import Catalogue, Metric, catalogue
from scaling.databases import Connection, DatabaseRouter, Shard
from scaling.episodes import EpisodeState
from scaling.measure import KEPT, due, measure
from scaling.samples import Sample, Status
from scaling.settings import ArchiveSourceSettings, ScalingSettings, SyncScheduleSettings
from scaling.sources import Reach
from scaling.sources.derived import AiCostRatio, CallsGap, Known, Ratio, SourceHealth, Watched
from scaling.sources.sql import SqlSource
from scaling.thresholds import Compare, Fired, Rule
from scaling.units import Unit
from tests import clients
from tests.scaling.measuring import NOW, settings

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
AUTO = dict.fromkeys(Capability, Mode.AUTO)


@dataclass(frozen=True, slots=True)
class Fixed:
    """A source that says what it is told to."""

    values: tuple[float | None, ...] = (1.0,)
    fails: bool = False

    def read(self, metric: str, reach: Reach) -> tuple[Sample, ...]:
        if self.fails:
            raise KeyError("secret")
        return tuple(
            Sample(metric, reach.now, value, Status.ERROR if value is None else Status.OK, f"n={n}")
            for n, value in enumerate(self.values)
        )

    def describe(self) -> str:
        return "fixed"


def metric(name: str, source: object, *, every: timedelta = HOUR, threshold: float = 10) -> Metric:
    rule = Rule(name, name, Compare.ABOVE, threshold, 6 * DAY, recovery=threshold / 2)
    return Metric(name, name, Unit.CALLS, source, every, rule=rule, capability=Capability.PARALLEL_SYNC)  # type: ignore[arg-type]


@pytest.fixture
def reach(database: Database) -> Iterator[Reach]:
    with clients.client() as client, DatabaseRouter(Shard("main", database.dsn)) as router:
        yield Reach(router, client, settings({}), NOW)


@pytest.fixture
def connection(database: Database) -> Iterator[Connection]:
    with psycopg.connect(database.dsn, autocommit=True) as made:
        yield made


def defaults() -> Catalogue:
    return catalogue(ArchiveSourceSettings(), SyncScheduleSettings())


def test_asking_for_a_metric_is_a_span_that_names_it_and_how_it_went(reach: Reach, traces: Collector) -> None:
    known = Catalogue((metric("fine", Fixed()), metric("empty", Fixed((None,))), metric("broken", Fixed(fails=True))))
    tracing.start("test")
    with tracing.run("run-1", "run"):
        measure(known, AUTO, reach)
    told = {span.attributes["metric.name"]: span.attributes for span in traces.spans() if span.name == "metric"}
    assert {name: each["outcome"] for name, each in told.items()} == {"fine": "ok", "empty": "error", "broken": "error"}
    assert told["broken"]["error.type"] == "KeyError"
    assert set(traces.paths()) >= {"run > metric"}


def test_a_metric_is_due_once_in_each_interval_and_again_when_it_failed() -> None:
    daily = metric("a", Fixed(), every=DAY)
    ok = Sample("a", datetime(2026, 3, 4, 0, 7, tzinfo=UTC), 1.0)
    assert due(daily, [], ok.at)
    assert not due(daily, [ok], ok.at + 23 * HOUR)
    assert due(daily, [ok], datetime(2026, 3, 5, 0, 7, tzinfo=UTC))
    assert due(daily, [Sample("a", ok.at, None, Status.ERROR)], ok.at + HOUR)
    assert due(daily, [ok, Sample("a", ok.at, None, Status.ERROR, "n=2")], ok.at + HOUR)
    gone = Sample("a", ok.at - 9 * DAY, None, Status.ERROR, "n=3")
    assert not due(daily, [ok, gone], ok.at + HOUR)


def test_a_crossing_is_recorded_judged_and_proposed_in_one_measurement(reach: Reach, connection: Connection) -> None:
    done = measure(Catalogue((metric("a", Fixed((11.0, 3.0))),)), {**AUTO}, reach)
    assert [(sample.dims, sample.value) for sample in done.samples] == [("n=0", 11.0), ("n=1", 3.0)]
    assert [(each.dims, type(each.event)) for each in done.happened] == [("n=0", Fired)]
    (episode,) = episodes.listing(connection)
    assert (episode.rule, episode.state, episode.value) == ("a", EpisodeState.APPROVED, 11.0)
    again = measure(Catalogue((metric("a", Fixed((11.0, 3.0))),)), {**AUTO}, replace(reach, now=NOW + 5 * DAY / 1440))
    assert (again.samples, again.not_due, len(episodes.listing(connection))) == ((), ("a",), 1)


def test_a_defect_of_one_source_is_an_error_of_its_metric_and_the_others_are_judged(
    reach: Reach, connection: Connection
) -> None:
    done = measure(Catalogue((metric("a", Fixed(fails=True)), metric("b", Fixed((11.0,))))), AUTO, reach)
    failed, _ = done.samples
    assert (failed.status, len(episodes.listing(connection))) == (Status.ERROR, 1)
    assert "KeyError" in str(failed.evidence)
    assert "secret" not in str(failed.evidence)


def test_a_named_metric_is_measured_although_it_is_not_due(reach: Reach) -> None:
    metrics = Catalogue((metric("a", Fixed()), metric("b", Fixed())))
    measure(metrics, AUTO, reach)
    told: list[str] = []
    done = measure(metrics, AUTO, replace(reach, now=NOW + timedelta(minutes=1)), only=["b"], progress=told.append)
    assert ([sample.metric for sample in done.samples], done.not_due, told) == (["b"], ("a",), ["b"])


def test_what_is_not_configured_is_recorded_once_a_day(reach: Reach, connection: Connection) -> None:
    only = Catalogue((defaults().named("supabase_plan"),))
    for hour in range(26):
        measure(only, AUTO, replace(reach, now=NOW + hour * HOUR))
    assert [sample.at for sample in samples.history(connection, "supabase_plan")] == [NOW, NOW + DAY]


def test_old_samples_are_forgotten_but_the_newest_of_each_series_stays(reach: Reach, connection: Connection) -> None:
    old = NOW - KEPT - HOUR
    samples.record(connection, [Sample("a", old, 1.0, dims="n=0"), Sample("gone", old, 1.0), Sample("b", old, 1.0)])
    samples.record(connection, [Sample("gone", old - HOUR, 1.0)])
    done = measure(Catalogue((metric("a", Fixed()),)), AUTO, reach)
    assert done.forgotten == 2
    assert [each.newest.metric for each in samples.series(connection)] == ["a", "b", "gone"]


def test_series_tell_the_newest_sample_the_last_good_one_and_the_first(connection: Connection) -> None:
    samples.record(
        connection,
        [
            Sample("a", NOW - 2 * HOUR, None, Status.EMPTY),
            Sample("a", NOW - HOUR, 5.0),
            Sample("a", NOW, None, Status.ERROR),
            Sample("a", NOW, None, Status.STALE, "n=1"),
        ],
    )
    one, other = samples.series(connection)
    assert (one.newest.status, one.last_ok, one.first) == (Status.ERROR, NOW - HOUR, NOW - 2 * HOUR)
    assert (other.newest.dims, other.last_ok, other.first) == ("n=1", None, NOW)


def test_every_metric_of_the_catalogue_is_measured_from_its_documented_source(
    reach: Reach, connection: Connection
) -> None:
    with metrics_apis.run(metrics_apis.plausible(NOW)) as apis:
        given = settings(dict(apis.environment()), ai_monthly_budget_usd=1000.0)
        done = measure(defaults(), AUTO, replace(reach, settings=given))
    by_name = {sample.metric: sample.status for sample in done.samples}
    assert set(by_name) == {each.name for each in defaults()}
    assert [name for name, status in by_name.items() if status is Status.ERROR] == []
    assert {name for name, status in by_name.items() if status is not Status.OK} <= {
        "audit_detachable_bytes",  # not partitioned
        "synced_events_day",  # no run yet
        "sync_mean_s",
        "complex_incidents_30d",  # no such table
    }
    health = [series.newest for series in samples.series(connection) if series.newest.metric == "source_health"]
    assert {sample.value for sample in health} == {0.0}
    assert done.happened == () or {each.rule for each in done.happened} <= {"supabase_plan", "ai_cost_ratio"}


def known(**metrics: Sample) -> Known:
    return {
        name: Watched(HOUR, (samples.Series(sample, sample.at if sample.value is not None else None, sample.at),))
        for name, sample in metrics.items()
    }


def test_a_ratio_has_no_figure_while_a_part_has_none() -> None:
    ratio, given = Ratio("part", "whole"), settings({})
    part, whole = Sample("part", NOW, 30.0), Sample("whole", NOW, 40.0)
    (sample,) = ratio.derive("r", known(part=part, whole=whole), given, NOW)
    assert sample.value == 0.75
    missing = Sample("whole", NOW, None, Status.NOT_CONFIGURED)
    (sample,) = ratio.derive("r", known(part=part, whole=missing), given, NOW)
    assert (sample.status, sample.evidence["note"]) == (Status.NOT_CONFIGURED, "whole is not_configured")
    (sample,) = ratio.derive("r", known(part=part, whole=Sample("whole", NOW, 0.0)), given, NOW)
    assert sample.status is Status.ERROR
    assert ratio.derive("r", known(part=part), given, NOW) == ()


def cost(bill: Sample, own: Sample, budget: float | None = 100.0) -> Sample:
    given: ScalingSettings = settings({}, ai_monthly_budget_usd=budget)
    (sample,) = AiCostRatio("bill", "own").derive("ratio", known(bill=bill, own=own), given, NOW)
    return sample


def test_the_cost_of_ai_is_the_bill_of_whole_days_and_the_own_count_of_today() -> None:
    own = Sample("own", NOW, 44.0, period="2026-11", evidence={"today_usd": 5.0})
    assert cost(Sample("bill", NOW, 40.0, period="2026-11"), own).value == pytest.approx(0.45)
    without = cost(Sample("bill", NOW, None, Status.NOT_CONFIGURED), own)
    assert without.value == pytest.approx(0.44)
    assert without.period == "2026-11"
    assert "own count" in without.evidence["rests_on"]


def test_a_bill_that_failed_or_is_of_last_month_gives_no_figure_at_all() -> None:
    own = Sample("own", NOW, 44.0, period="2026-11", evidence={"today_usd": 5.0})
    assert cost(Sample("bill", NOW, None, Status.ERROR), own).status is Status.ERROR
    assert cost(Sample("bill", NOW, 90.0, period="2026-10"), own).status is Status.STALE
    no_own = Sample("own", NOW, None, Status.EMPTY)
    assert cost(Sample("bill", NOW, 40.0, period="2026-11"), no_own).value == pytest.approx(0.4)
    assert cost(Sample("bill", NOW, None, Status.NOT_CONFIGURED), no_own).status is Status.EMPTY


def test_without_a_budget_the_ratio_is_not_configured_and_says_which_setting_is_missing() -> None:
    own = Sample("own", NOW, 44.0, period="2026-11")
    sample = cost(Sample("bill", NOW, 40.0, period="2026-11"), own, budget=None)
    assert sample.status is Status.NOT_CONFIGURED
    assert "AI_MONTHLY_BUDGET_USD" in sample.evidence["note"]


def gap(
    billed: float | None, own: float | None, *, now: datetime = NOW, until: datetime = NOW, **others: str
) -> Sample:
    """Of Google's count, which ends at `until`, and the own one."""
    period = others.get("period", "2026-11")
    evidence = {"data_complete_until": until.isoformat()}
    status = Status(others.get("status", "error"))
    sides = {
        "billed": Sample("billed", now, billed, Status.OK if billed is not None else status, "", period, evidence),
        "own": Sample("own", now, own, Status.OK if own is not None else status, "", "2026-11"),
    }
    (sample,) = CallsGap("billed", "own").derive("gap", known(**sides), settings({}), now)
    return sample


def test_the_gap_is_what_the_own_count_is_off_in_either_direction() -> None:
    assert gap(100.0, 100.0).value == 0.0
    assert gap(100.0, 85.0).value == pytest.approx(0.15)
    assert gap(100.0, 115.0).value == pytest.approx(0.15)
    assert gap(100.0, 0.0).value == 1.0
    assert gap(0.0, 0.0).value == 0.0
    assert gap(0.0, 5.0).status is Status.ERROR


def test_what_was_called_after_googles_count_ends_is_no_gap() -> None:
    first = datetime(2026, 11, 1, tzinfo=UTC)
    early, until = first + HOUR, first + HOUR / 2
    assert gap(50.0, 100.0, now=early, until=until).value == 0.0
    assert gap(20.0, 100.0, now=early, until=until).value == pytest.approx(1.5)  # (100 - 20 - 50) / 20
    assert gap(100.0, 50.0, now=early, until=until).value == 0.5
    assert gap(50.0, 50.0, now=first, until=first).value == 0.0


@pytest.mark.parametrize("status", [Status.NOT_CONFIGURED, Status.ERROR, Status.STALE, Status.EMPTY, Status.PARTIAL])
def test_without_one_of_the_counts_there_is_no_gap_and_it_says_why(status: Status) -> None:
    for billed, own in ((None, 100.0), (100.0, None)):
        sample = gap(billed, own, status=status)
        assert (sample.status, sample.value) == (status, None)
        assert sample.evidence["note"].endswith(f"is {status}")
    assert gap(100.0, 100.0, period="2026-10").status is Status.STALE
    assert CallsGap("billed", "own").derive("gap", known(own=Sample("own", NOW, 1.0)), settings({}), NOW) == ()


def test_a_source_is_as_sick_as_its_time_without_a_figure_and_what_never_was_is_not_missed() -> None:
    of = {
        "alive": Watched(HOUR, (samples.Series(Sample("alive", NOW, 1.0), NOW, NOW - DAY),)),
        "sick": Watched(HOUR, (samples.Series(Sample("sick", NOW, None, Status.ERROR), NOW - 4 * HOUR, NOW - DAY),)),
        "never_well": Watched(
            DAY, (samples.Series(Sample("never_well", NOW, None, Status.STALE), None, NOW - 2 * DAY),)
        ),
        "table_gone": Watched(
            HOUR, (samples.Series(Sample("table_gone", NOW, None, Status.EMPTY), NOW - 9 * HOUR, NOW - DAY),)
        ),
        "no_table": Watched(HOUR, (samples.Series(Sample("no_table", NOW, None, Status.EMPTY), None, NOW - DAY),)),
        "unset": Watched(HOUR, (samples.Series(Sample("unset", NOW, None, Status.NOT_CONFIGURED), None, NOW),)),
        "one_route_gone": Watched(
            HOUR,
            (
                samples.Series(Sample("one_route_gone", NOW, 1.0, dims="route=a"), NOW, NOW - DAY),
                samples.Series(Sample("one_route_gone", NOW - DAY, 1.0, dims="route=b"), NOW - DAY, NOW - DAY),
            ),
        ),
    }
    found = SourceHealth().derive("source_health", of, settings({}), NOW)
    assert {sample.dims.removeprefix("metric="): sample.value for sample in found} == {
        "alive": 0.0,
        "sick": 4.0,
        "never_well": 2.0,
        "table_gone": 9.0,
        "one_route_gone": 0.0,
    }


def test_a_source_that_stays_silent_raises_an_episode_for_a_person_and_ends_it_when_it_is_back(
    reach: Reach, connection: Connection
) -> None:
    broken = "SELECT 1 / 0 AS value"
    health = defaults().named("source_health")

    def at(hour: int, query: str) -> None:
        metrics = Catalogue((metric("a", SqlSource(query, parameters=None)), health))
        measure(metrics, AUTO, replace(reach, now=NOW + hour * HOUR))

    at(0, "SELECT 1 AS value")
    for hour in range(1, 5):
        at(hour, broken)
    (episode,) = episodes.listing(connection)
    assert (episode.rule, episode.dims, episode.value) == ("source_health", "metric=a", 4.0)
    assert (episode.capability, episode.state) == (None, EpisodeState.OBSERVED)
    for hour in (5, 6, 7):
        at(hour, "SELECT 1 AS value")
    assert episodes.get(connection, episode.id).recovered_at is not None
