"""The settings file of the thresholds: what it changes, and the sentence about each mistake."""

from datetime import timedelta
from pathlib import Path

import pytest

from scaling.catalogue import Catalogue, catalogue
from scaling.errors import UserError
from scaling.overrides import configured, overridden
from scaling.settings import ArchiveSourceSettings, SyncScheduleSettings
from scaling.sources.prometheus import PrometheusQuery
from scaling.sources.sql import Across, SqlSource
from scaling.thresholds import Compare, Rearm
from tests.scaling.measuring import settings


def plain() -> Catalogue:
    return catalogue(ArchiveSourceSettings(), SyncScheduleSettings())


def apply(tmp_path: Path, text: str) -> Catalogue:
    path = tmp_path / "thresholds.toml"
    path.write_text(text)
    return overridden(plain(), path)


def test_without_a_file_every_default_holds() -> None:
    assert configured(settings({})) == plain()


def test_the_file_of_the_settings_is_applied(tmp_path: Path) -> None:
    path = tmp_path / "thresholds.toml"
    path.write_text("[users_total]\nthreshold = 5000\n")
    _, rule = configured(settings({"SCALING_CATALOGUE_FILE": str(path)})).judged("users_total")
    assert (rule.threshold, rule.recovery) == (5000, 900)


def test_every_key_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    changed = apply(
        tmp_path,
        """
        [audit_logs_bytes]
        threshold = "5 GiB"
        recovery = "512 MiB"
        rearm = "repeat"
        breaches = 4
        of = 6
        recoveries = 1
        recovery_of = 2
        hold_minutes = 90
        min_fired_minutes = 30
        no_data_after_hours = 100
        flap_episodes = 5
        flap_window_hours = 48
        every_minutes = 720
        owner = "data team"
        runbook = "https://wiki.example.com/audit"
        compare = ">="
        """,
    )
    metric, rule = changed.judged("audit_logs_bytes")
    assert (rule.threshold, rule.recovery, rule.compare) == (5 * 2**30, 2**29, Compare.AT_LEAST)
    assert (rule.breaches, rule.of, rule.recoveries, rule.recovery_of) == (4, 6, 1, 2)
    assert (rule.hold, rule.min_fired) == (timedelta(minutes=90), timedelta(minutes=30))
    assert (rule.no_data_after, rule.flap_window) == (timedelta(hours=100), timedelta(hours=48))
    assert (rule.rearm, rule.flap_episodes) == (Rearm.REPEAT, 5)
    assert (metric.every, metric.owner) == (timedelta(hours=12), "data team")
    assert metric.runbook == "https://wiki.example.com/audit"
    others = [each for each in changed if each.name != "audit_logs_bytes"]
    assert others == [each for each in plain() if each.name != "audit_logs_bytes"]


def test_a_changed_threshold_is_another_version_of_the_rule(tmp_path: Path) -> None:
    changed = apply(tmp_path, "[users_total]\nthreshold = 1001\n")
    assert changed.judged("users_total")[1].version != plain().judged("users_total")[1].version


def test_a_metric_can_be_asked_in_own_sql_or_promql(tmp_path: Path) -> None:
    changed = apply(
        tmp_path,
        """
        [users_total]
        sql = "SELECT count(*) AS value FROM auth.users WHERE email LIKE '%@%'"
        [db_conn_util]
        promql = "sum by (role) (pg_stat_activity_count) / 90"
        labels = ["role"]
        """,
    )
    assert changed.named("users_total").source == SqlSource(
        "SELECT count(*) AS value FROM auth.users WHERE email LIKE '%@%'", Across.SUM, parameters=None
    )
    assert changed.named("db_conn_util").source == PrometheusQuery(
        "sum by (role) (pg_stat_activity_count) / 90", ("role",)
    )


def test_a_metric_that_is_not_enabled_is_not_there(tmp_path: Path) -> None:
    changed = apply(tmp_path, "[bandwidth_cost_7d]\nenabled = false\n")
    assert changed.get("bandwidth_cost_7d") is None
    assert len(list(changed)) == len(list(plain())) - 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[nothing]\nthreshold = 1\n", "names the metric 'nothing', which there is not; known: audit_logs_bytes, "),
        ("threshold = 1\n", "names the metric 'threshold', which there is not"),
        ("users_total = 5\n", "has the key 'users_total' outside of a table; write [users_total]"),
        ("[users_total]\ntreshold = 1\n", "has treshold in [users_total], which is no key; known: enabled, threshold"),
        ("[users_total]\nthreshold = true\n", "threshold of [users_total]"),
        ("[users_total]\nthreshold = 'many'\n", "must be a number, or a size like '5 GiB'"),
        ("[users_total]\nthreshold = nan\n", "threshold of [users_total]"),
        ("[users_total]\nrearm = 'sometimes'\n", "rearm of [users_total]"),
        ("[users_total]\nrecovery = 2000\n", "recovery must not itself be > 1000"),
        ("[users_total]\nbreaches = 9\n", "breaches must be between 1 and of"),
        ("[users_total]\nrearm = 'repeat'\nrecovery = 1000.5\n", "recovery must not itself be"),
        ("[users_total]\nno_data_after_hours = 1\n", "make that longer"),
        ("[users_total]\nevery_minutes = 0.1\n", "every_minutes of [users_total]"),
        ("[ai_cost_month]\nthreshold = 5\n", "ai_cost_month has no threshold, so threshold changes nothing"),
        ("[users_total]\nsql = 'a'\npromql = 'b'\n", "has both sql and promql in [users_total]; keep one"),
        ("[users_total]\nlabels = ['a']\n", "has labels without promql"),
        ("[users_total\n", "is no TOML"),
    ],
)
def test_a_mistake_is_refused_with_a_sentence_that_names_file_table_and_key(
    tmp_path: Path, text: str, sentence: str
) -> None:
    with pytest.raises(UserError) as refused:
        apply(tmp_path, text)
    assert sentence in str(refused.value)
    assert str(refused.value).startswith(f"SCALING_CATALOGUE_FILE ({tmp_path}/thresholds.toml)")


def test_a_file_that_is_not_there_is_refused_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.toml\) cannot be read: No such file or directory"):
        overridden(plain(), tmp_path / "nowhere.toml")
