"""The machine and Prometheus agree wherever they mean the same: `for`, `keep_firing_for`, gaps, the first M of N.

They differ on purpose where Prometheus takes the absence of a series for a value under the threshold: a gap voids what
is pending there at once, and resolves what fires. So the series have gaps where both must come to the same: of any
length while nothing fires, and while something fires so short that `keep_firing_for` bridges them.
"""

import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from scaling.samples import Sample, Status
from scaling.thresholds import Compare, Fired, Phase, Rearm, Rule, State, step

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not on the PATH; Debian's package prometheus has it"
)

START = datetime(1970, 1, 1, tzinfo=UTC)
EVERY = timedelta(minutes=10)
"""Longer than the 5 minutes for which Prometheus takes a missing sample to be the last one."""
SLOTS = 60
THRESHOLD = 10.0
COMPARISONS = {
    Compare.ABOVE: ((11.0, 10.5), (10.0, 3.0)),
    Compare.AT_LEAST: ((10.0, 12.0), (9.9, 0.0)),
    Compare.BELOW: ((9.5, 0.0), (10.0, 40.0)),
    Compare.AT_MOST: ((10.0, 2.0), (10.1, 99.0)),
}
"""Of every comparison, values that breach the threshold and values that do not."""
RECOVERY = {Compare.ABOVE: 10.0, Compare.AT_LEAST: 9.9, Compare.BELOW: 10.0, Compare.AT_MOST: 10.1}
BREACH, QUIET, GAP = "breach", "quiet", "gap"


def minutes(slots: int) -> str:
    return f"{slots * int(EVERY.total_seconds()) // 60}m"


def series(rng: random.Random, keep: int, *, gaps: bool) -> list[str]:
    """Slots that breach, are quiet, or have no sample; gaps only where both sides must come to the same."""
    stay = rng.uniform(0.3, 0.9)
    slots = [rng.choice((BREACH, QUIET))]
    while len(slots) < SLOTS:
        slots.append(slots[-1] if rng.random() < stay else rng.choice((BREACH, QUIET)))
    if not gaps:
        return slots
    allowed: list[str] = []
    for breach, run in groupby(slots, key=lambda slot: slot == BREACH):
        length = len(list(run))
        if breach:
            allowed += [BREACH] * length
            continue
        # Prometheus resolves after keep + 1 slots without a breach; only behind them may a longer run have gaps.
        quiet = [QUIET] * min(length, keep + 1) if length > keep else []
        allowed += quiet + [rng.choice((QUIET, GAP)) for _ in range(length - len(quiet))]
    return allowed


def promtool(folder: Path, rules: list[dict[str, Any]], inputs: dict[str, str], expected: list[dict[str, Any]]) -> None:
    """Have Prometheus confirm what is expected of it; its own words where it does not."""
    (folder / "rules.yml").write_text(json.dumps({"groups": [{"name": "all", "rules": rules}]}))
    group = {
        "interval": minutes(1),
        "input_series": [{"series": name, "values": values} for name, values in inputs.items()],
        "promql_expr_test": expected,
    }
    test = {"rule_files": ["rules.yml"], "evaluation_interval": minutes(1), "tests": [group]}
    (folder / "test.yml").write_text(json.dumps(test))
    ran = subprocess.run(
        ["promtool", "test", "rules", "test.yml"], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[:4000]


def values_of(slots: list[str], compare: Compare, rng: random.Random) -> list[float | None]:
    breaching, quiet = COMPARISONS[compare]
    return [None if slot == GAP else rng.choice(breaching if slot == BREACH else quiet) for slot in slots]


def notation(values: list[float | None]) -> str:
    return " ".join("_" if value is None else f"{value:g}" for value in values)


def states(rule: Rule, values: list[float | None], rng: random.Random) -> Iterator[State]:
    """Of every slot the state after it; a slot without a value has a sample that is not ok, or none."""
    state = State.initial()
    for slot, value in enumerate(values):
        at = START + slot * EVERY
        status = Status.OK if value is not None else rng.choice([each for each in Status if each is not Status.OK])
        if value is not None or rng.random() < 0.5:
            state, _ = step(rule, state, Sample(rule.metric, at, value, status), at)
        yield state


def plain_rule(compare: Compare, hold: int, keep: int) -> Rule:
    """Prometheus's rule: one sample decides, any second without a breach voids what is pending."""
    return Rule(
        name="rule",
        metric="metric",
        compare=compare,
        threshold=THRESHOLD,
        no_data_after=EVERY,
        hold=hold * EVERY,
        recovery=RECOVERY[compare],
        recoveries=keep,
        recovery_of=keep,
        rearm=Rearm.REPEAT,
        flap_episodes=1000,
    )


@needs_promtool
@pytest.mark.parametrize("gaps", [False, True], ids=["without gaps", "with gaps"])
def test_prometheus_pends_fires_and_resolves_at_the_same_samples(tmp_path: Path, *, gaps: bool) -> None:
    rng = random.Random(f"for and keep_firing_for, gaps {gaps}")
    rules: list[dict[str, Any]] = []
    inputs: dict[str, str] = {}
    pending: list[list[str]] = [[] for _ in range(SLOTS)]
    firing: list[list[str]] = [[] for _ in range(SLOTS)]
    episodes = 0
    for compare in COMPARISONS:
        for hold in (0, 1, 3):
            for keep in (1, 2, 5):
                name = f"r{len(rules)}"
                rules.append(
                    {
                        "alert": name,
                        "expr": f"{name}_metric {compare.value} {THRESHOLD:g}",
                        "for": minutes(hold),
                        "keep_firing_for": minutes(keep),
                    }
                )
                for number in range(8):
                    values = values_of(series(rng, keep, gaps=gaps), compare, rng)
                    inputs[f'{name}_metric{{id="{number}"}}'] = notation(values)
                    labels = f'alertname="{name}",id="{number}"'
                    for slot, state in enumerate(states(plain_rule(compare, hold, keep), values, rng)):
                        if state.phase in (Phase.FIRED, Phase.CLEARING):
                            firing[slot].append(f'ALERTS{{alertstate="firing",{labels}}}')
                        # In a gap the machine holds what is pending until it sees the next sample.
                        elif state.phase is Phase.PENDING and values[slot] is not None:
                            pending[slot].append(f'ALERTS{{alertstate="pending",{labels}}}')
                    episodes += state.episode_no
    assert episodes > 500
    expected = [
        {
            "expr": f'ALERTS{{alertstate="{name}"}}',
            "eval_time": minutes(slot),
            "exp_samples": [{"labels": labels, "value": 1} for labels in sorted(alerts[slot])],
        }
        for name, alerts in (("pending", pending), ("firing", firing))
        for slot in range(SLOTS)
    ]
    promtool(tmp_path, rules, inputs, expected)


@needs_promtool
def test_prometheus_counts_the_same_first_m_of_n(tmp_path: Path) -> None:
    rng = random.Random("M of N")
    inputs: dict[str, str] = {}
    expected: list[dict[str, Any]] = []
    crossed = 0
    for breaches, of in ((1, 1), (1, 3), (2, 3), (3, 3), (3, 5), (5, 10), (10, 10)):
        for compare in COMPARISONS:
            rule = Rule(
                "rule",
                "metric",
                compare,
                THRESHOLD,
                no_data_after=EVERY,
                breaches=breaches,
                of=of,
                rearm=Rearm.ONE_SHOT,
            )
            for _ in range(6):
                name = f"m{len(inputs)}"
                values = values_of(series(rng, 0, gaps=False), compare, rng)
                inputs[name] = notation(values)
                # Slots of the last N, without the one at the far end that a closed range would add.
                window = f"{of * 10 - 1}m:{minutes(1)}"
                condition = (
                    f"sum_over_time(({name} {compare.value} bool {THRESHOLD:g})[{window}]) >= {breaches}"
                    f" and {name} {compare.value} {THRESHOLD:g}"
                )
                first = next((n for n, each in enumerate(states(rule, values, rng)) if each.episode_no), SLOTS)
                crossed += first < SLOTS
                expected += [
                    {"expr": f"count({condition})", "eval_time": minutes(slot), "exp_samples": []}
                    for slot in range(first)
                ]
                if first < SLOTS:
                    met = [{"labels": "{}", "value": 1}]
                    expected.append({"expr": f"count({condition})", "eval_time": minutes(first), "exp_samples": met})
    assert crossed > 100
    promtool(tmp_path, [], inputs, expected)


@needs_promtool
def test_prometheus_resolves_on_a_gap_where_the_machine_holds(tmp_path: Path) -> None:
    """What the agreement above leaves out, stated: no data is no recovery here."""
    values = [11.0, None, None, None]
    after = list(states(plain_rule(Compare.ABOVE, 0, 1), values, random.Random(0)))
    assert [each.phase for each in after] == [Phase.FIRED] * 4
    rules = [{"alert": "r", "expr": "metric > 10", "keep_firing_for": minutes(1)}]
    gone = {"expr": 'ALERTS{alertstate="firing"}', "eval_time": minutes(3), "exp_samples": []}
    promtool(tmp_path, rules, {"metric": notation(values)}, [gone])


def test_every_value_of_the_series_is_on_the_side_it_is_taken_for() -> None:
    for compare, (breaching, quiet) in COMPARISONS.items():
        rule = plain_rule(compare, 0, 1)
        assert all(rule.breached(value) and not rule.recovered(value) for value in breaching)
        assert all(rule.recovered(value) and not rule.breached(value) for value in quiet)
        _, events = step(rule, State.initial(), Sample("metric", START, breaching[0]), START)
        assert isinstance(events[0], Fired)
