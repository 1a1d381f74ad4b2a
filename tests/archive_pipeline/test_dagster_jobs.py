"""The manual jobs, the upkeep and the prune in Dagster: dry runs that write nothing, and what doing it does."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from psycopg import sql

from archive_pipeline.definitions import build_defs
from archive_pipeline.jobs import MANUAL
from archive_pipeline.months import Month
from archive_pipeline.premade_months import partition_name
from scaling.settings import ArchiveSettings, load
from tests.archive_pipeline.conftest import JANUARY, TENANT, Room
from tests.archive_pipeline.partitioned import SCHEMA, convert, partitions

pytestmark = pytest.mark.usefixtures("definitions_load_alone")

FEBRUARY = JANUARY.following
PRUNED = dg.AssetKey("audit_log_pruned")
DO = {"dry_run": False}


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral(tempdir=str(tmp_path)) as ephemeral:
        yield ephemeral


@pytest.fixture
def january(room: Room, monkeypatch: pytest.MonkeyPatch) -> Room:
    """January is archived and past retention, February has rows too; both are partitions; pruning is on."""
    bucket = room.target.bucket
    bucket.client.put_bucket_versioning(Bucket=bucket.name, VersioningConfiguration={"Status": "Enabled"})
    convert(room.admin, room.shard, JANUARY, FEBRUARY)
    room.fill(60)
    room.fill(20, FEBRUARY)
    room.archive()
    monkeypatch.setenv("ARCHIVE_PRUNE", "auto")
    monkeypatch.setenv("ARCHIVE_RETENTION_MONTHS", "1")
    return room


def launch(
    instance: dg.DagsterInstance, job: str, config: Mapping[str, object] | None = None
) -> dg.ExecuteInProcessResult:
    """Launch a job that has one step, with the configuration of that step."""
    definition = build_defs().resolve_job_def(job)
    [step] = definition.graph.node_dict
    run_config = {"ops": {step: {"config": dict(config)}}} if config else {}
    return definition.execute_in_process(instance=instance, run_config=run_config, raise_on_error=False)


def materialize(
    instance: dg.DagsterInstance, asset: str, *, month: Month | None = None, config: Mapping[str, object] | None = None
) -> dg.ExecuteInProcessResult:
    return (
        build_defs()
        .resolve_implicit_global_asset_job_def()
        .execute_in_process(
            instance=instance,
            asset_selection=[dg.AssetKey(asset)],
            partition_key=month.partition_key if month else None,
            run_config={"ops": {asset: {"config": dict(config)}}} if config else {},
            raise_on_error=False,
        )
    )


def shown(result: dg.ExecuteInProcessResult) -> dict[str, Any]:
    """Metadata of the job's only step."""
    [output] = [event for event in result.all_events if event.is_successful_output]
    return {name: value.value for name, value in output.step_output_data.metadata.items()}


def materialized(result: dg.ExecuteInProcessResult, asset: str) -> list[tuple[str | None, dict[str, Any]]]:
    return [
        (event.partition, {name: value.value for name, value in event.materialization.metadata.items()})
        for event in result.get_asset_materialization_events()
        if event.asset_key == dg.AssetKey(asset)
    ]


def sentence(result: dg.ExecuteInProcessResult) -> str:
    [failure] = [event for event in result.all_events if event.is_step_failure]
    data = failure.step_failure_data.user_failure_data
    assert data is not None
    return str(data.description)


def verdicts(result: dg.ExecuteInProcessResult) -> dict[str, bool]:
    return {each.check_name: each.passed for each in result.get_asset_check_evaluations()}


def everything(room: Room) -> dict[str, object]:
    """All rows and all objects of the database's catalog, and every version of every key of the bucket."""
    tables = room.admin.execute(
        "SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE c.relkind = 'r' AND n.nspname NOT IN ('pg_catalog', 'information_schema') ORDER BY 1, 2"
    ).fetchall()
    found: dict[str, object] = {}
    for name in tables:
        rows = room.admin.execute(
            sql.SQL("SELECT t::text FROM {} t ORDER BY 1").format(sql.Identifier(*name))
        ).fetchall()
        found[".".join(name)] = (len(rows), hashlib.sha256(repr(rows).encode()).hexdigest())
    for catalog in ("pg_class", "pg_inherits", "pg_constraint", "pg_trigger", "pg_policy", "pg_namespace"):
        columns = "oid, relname, relkind, relispartition, relacl::text" if catalog == "pg_class" else "*"
        rows = room.admin.execute(
            sql.SQL("SELECT {} FROM {} ORDER BY 1, 2").format(sql.SQL(columns), sql.Identifier(catalog))
        ).fetchall()
        found[catalog] = hashlib.sha256(repr(rows).encode()).hexdigest()
    found["bucket"] = sorted(
        (each.key, each.version_id, each.is_latest, each.size) for each in room.target.bucket.versions("")
    )
    return found


ERASE = {"value": str(TENANT), "requested_by": "Ann", "reason": "request 4711"}


# case 73
def test_every_manual_job_is_a_dry_run_unless_told_otherwise_and_writes_nothing_to_postgres_s3_or_glue(
    january: Room, instance: dg.DagsterInstance
) -> None:
    before = everything(january)
    for job, config in {
        "convert_audit_logs": {},
        "prune_audit_logs": {},
        "approve_prune": {"what": "2025-01", "by": "Ann"},
        "restore_audit_logs": {"first": "2025-01", "tenant": str(TENANT)},
        "erase_from_archive": ERASE,
    }.items():
        result = launch(instance, job, config)
        assert result.success, job
        assert shown(result)["did"] == "nothing was changed; launch it with dry_run: false to do it", job
        assert everything(january) == before, job
    assert {job.name for job in MANUAL} == {
        "convert_audit_logs", "prune_audit_logs", "approve_prune", "restore_audit_logs", "erase_from_archive"
    }  # fmt: skip


def test_the_comparison_of_the_dry_runs_sees_a_changed_row_a_new_table_and_a_new_object(room: Room) -> None:
    """Or the test above could not fail."""
    seen = [everything(room)]
    for change in ("INSERT INTO tenants (id, name) VALUES (gen_random_uuid(), 'T')", "CREATE TABLE further (a int)"):
        room.admin.execute(change)
        seen.append(everything(room))
    room.target.bucket.put_bytes("further", b"1", content_type="text/plain")
    seen.append(everything(room))
    assert all(seen.count(one) == 1 for one in seen)


# -- converting -----------------------------------------------------------------------------------------------------


def test_a_dry_run_of_the_conversion_shows_the_plan_and_doing_it_needs_the_tables_name(
    room: Room, instance: dg.DagsterInstance
) -> None:
    room.fill(30)
    planned = launch(instance, "convert_audit_logs")
    assert "### `public.audit_logs` to monthly partitions, UTC" in shown(planned)["plan"]
    assert shown(planned)["in_the_way"] == 0

    refused = launch(instance, "convert_audit_logs", DO)
    assert sentence(refused).startswith("public.audit_logs was not touched; read the plan of a dry run")

    done = launch(instance, "convert_audit_logs", {**DO, "confirm": "public.audit_logs"})
    assert done.success
    [(_, converted)] = materialized(done, "audit_logs_partitions")
    assert (converted["outcome"], converted["partitions_made"]) == ("converted", len(partitions(room.shard)) - 1)
    again = launch(instance, "convert_audit_logs", {**DO, "confirm": "public.audit_logs"})
    assert materialized(again, "audit_logs_partitions")[0][1]["outcome"] == "unchanged"


# -- partitions and chain -------------------------------------------------------------------------------------------


def test_the_partitions_of_a_plain_table_are_green_and_say_that_it_is_plain(
    room: Room, instance: dg.DagsterInstance
) -> None:
    before = everything(room)
    result = materialize(instance, "audit_logs_partitions")
    assert result.success
    assert verdicts(result) == {"months_premade": True, "no_abandoned_conversion": True}
    [(_, metadata)] = materialized(result, "audit_logs_partitions")
    assert str(metadata["state"]).startswith("a plain table; the job convert_audit_logs")
    assert everything(room) == before


# case 28
def test_months_that_nobody_premade_are_made_up_for_and_the_alarm_is_red_before_inserts_fail(
    january: Room, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    [(now,)] = january.admin.execute("SELECT now()").fetchall()
    made = materialize(instance, "audit_logs_partitions")
    assert made.success
    [(_, metadata)] = materialized(made, "audit_logs_partitions")
    assert metadata["months_left"] == 3
    assert metadata["partitions"] == len(partitions(january.shard)) == 2 + metadata["partitions_made"]
    january.log(now)  # 23514 while its month had no partition

    # Somebody takes the months ahead away again, and cannot make new ones: the alarm.
    last = Month.containing(now, "UTC").following
    for month in (last, last.following, last.following.following):
        name = sql.Identifier(SCHEMA, partition_name(january.target.table, month))
        january.admin.execute(sql.SQL("DROP TABLE {}").format(name))
    monkeypatch.setattr("archive_pipeline.assets.premake", lambda *_: [])
    alarm = materialize(instance, "audit_logs_partitions")
    assert not alarm.success
    assert verdicts(alarm) == {"months_premade": False, "no_abandoned_conversion": True}
    [late] = [each for each in alarm.get_asset_check_evaluations() if not each.passed]
    assert "has partitions for no month after the present one" in str(late.description)


def test_the_chain_is_sound_until_somebody_takes_an_object_away(room: Room, instance: dg.DagsterInstance) -> None:
    room.fill(20)
    room.archive()
    sound = materialize(instance, "audit_log_chain", config={"deep": True})
    assert sound.success
    [(_, metadata)] = materialized(sound, "audit_log_chain")
    assert [metadata[name] for name in ("links", "months", "rows", "findings")] == [1, 1, 20, 0]
    [head] = metadata["head"].records
    assert (head.data["sequence"], head.data["pinned"]) == (1, 1)

    room.target.bucket.delete(room.data_keys()[0])
    broken = materialize(instance, "audit_log_chain")
    assert not broken.success
    [verdict] = broken.get_asset_check_evaluations()
    assert (verdict.passed, verdict.description) == (False, "1 finding(s) in month 2025-01")


def test_the_nightly_upkeep_is_one_run_of_partitions_and_chain(room: Room, instance: dg.DagsterInstance) -> None:
    room.fill(5)
    room.archive()
    result = build_defs().resolve_job_def("audit_log_upkeep_job").execute_in_process(instance=instance)
    assert verdicts(result) == {"months_premade": True, "no_abandoned_conversion": True, "chain_sound": True}


# -- pruning --------------------------------------------------------------------------------------------------------


def test_a_month_is_not_pruned_while_pruning_is_off_and_that_is_green(
    january: Room, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ARCHIVE_PRUNE")
    before = everything(january)
    result = materialize(instance, "audit_log_pruned", month=JANUARY)
    assert result.success
    assert materialized(result, "audit_log_pruned")[0][1]["outcome"] == "off"
    assert everything(january) == before


def test_an_archived_month_is_dropped_by_itself_and_one_that_is_not_is_kept(
    january: Room, instance: dg.DagsterInstance
) -> None:
    tags = {
        "dagster/asset_partition_range_start": JANUARY.partition_key,
        "dagster/asset_partition_range_end": FEBRUARY.partition_key,
    }
    result = (
        build_defs()
        .resolve_implicit_global_asset_job_def()
        .execute_in_process(instance=instance, asset_selection=[PRUNED], tags=tags)
    )
    [(_, first), (_, second)] = materialized(result, "audit_log_pruned")
    assert (first["outcome"], first["rows_dropped"]) == ("dropped", 60)
    assert (second["outcome"], second["rows_dropped"]) == ("kept", 0)
    assert "not archived: 2025-02" in str(second["reason"])
    [(left,)] = january.admin.execute("SELECT count(*) FROM audit_logs").fetchall()
    assert left == 20


def test_a_proposed_month_waits_for_approval_and_goes_with_the_name_of_who_approved(
    january: Room, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCHIVE_PRUNE", "propose")
    proposed = materialize(instance, "audit_log_pruned", month=JANUARY)
    [(_, metadata)] = materialized(proposed, "audit_log_pruned")
    assert (metadata["outcome"], metadata["waiting_for_approval"]) == ("waits for approval", 1)

    approved = launch(instance, "approve_prune", {**DO, "what": "2025-01", "by": "Ann"})
    assert shown(approved)["partitions_dropped"] == 1
    assert [partition for partition, _ in materialized(approved, "audit_log_pruned")] == ["2025-01-01"]
    rows = january.admin.execute("SELECT state, approved_by, rows FROM archive.prunes WHERE rows > 0").fetchall()
    assert rows == [("dropped", "Ann", 60)]


def test_a_refused_prune_is_red_and_says_why(january: Room, instance: dg.DagsterInstance) -> None:
    january.admin.execute("DELETE FROM audit_logs WHERE created_at = (SELECT min(created_at) FROM audit_logs)")
    result = materialize(instance, "audit_log_pruned", month=JANUARY)
    assert not result.success
    assert "audit_logs_2025_01 was refused: " in sentence(result)


def test_the_nightly_prune_skips_while_pruning_is_off_and_else_does_it(
    january: Room, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = build_defs().resolve_schedule_def("audit_log_prune_schedule")
    with dg.build_schedule_context(instance=instance) as context:
        [request] = schedule.evaluate_tick(context).run_requests or []
        monkeypatch.setenv("ARCHIVE_PRUNE", "off")
        assert schedule.evaluate_tick(context).skip_message == "ARCHIVE_PRUNE is off"
    monkeypatch.setenv("ARCHIVE_PRUNE", "auto")
    job = build_defs().resolve_job_def("prune_audit_logs")
    result = job.execute_in_process(instance=instance, run_config=request.run_config)
    assert shown(result)["partitions_dropped"] == 1


# -- restoring, erasing, asking -------------------------------------------------------------------------------------


def test_a_month_is_restored_into_a_private_table(january: Room, instance: dg.DagsterInstance) -> None:
    result = launch(instance, "restore_audit_logs", {**DO, "first": "2025-01"})
    assert result.success
    assert (shown(result)["rows"], shown(result)["did"]) == (60, "done")
    [(rows,)] = january.admin.execute(
        sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(SCHEMA, "audit_logs_restored_2025_01"))
    ).fetchall()
    assert rows == 60


def test_a_tenant_is_erased_and_neither_metadata_nor_log_holds_its_id(
    january: Room, instance: dg.DagsterInstance
) -> None:
    early = launch(instance, "erase_from_archive", {**DO, **ERASE})
    assert "such row(s) of archived months are in Postgres still" in sentence(early)
    gone = 60 - january.manifests()[-1].manifest.digest.rows
    assert gone > 0

    january.admin.execute("DELETE FROM audit_logs WHERE tenant_id = %s", (TENANT,))
    result = launch(instance, "erase_from_archive", {**DO, **ERASE})
    assert result.success
    assert january.manifests()[-1].manifest.digest.rows == 60 - gone
    for run in (early, result):
        records = instance.get_records_for_run(run.run_id).records
        assert str(TENANT) not in "".join(str(record.event_log_entry) for record in records)


def test_what_is_personal_by_itself_is_not_erased_through_a_runs_configuration(
    january: Room, instance: dg.DagsterInstance
) -> None:
    result = launch(instance, "erase_from_archive", {**ERASE, "column": "user_agent", "value": "ann@example.com"})
    assert sentence(result).startswith("the value is neither a UUID nor a number")
    assert "ann@example.com" not in sentence(result)


def test_the_archive_answers_a_question_with_its_price(room: Room, instance: dg.DagsterInstance) -> None:
    room.fill(50)
    room.archive()
    question = {"sql": "SELECT action, count(*) AS rows FROM audit_logs GROUP BY action ORDER BY action"}
    result = materialize(instance, "audit_log_answer", config=question)
    assert result.success
    [(_, metadata)] = materialized(result, "audit_log_answer")
    assert [record.data for record in metadata["preview"].records] == [
        {"action": f"action {n}", "rows": 10} for n in range(5)
    ]
    assert metadata["bytes_scanned"] > 0
    assert metadata["usd"] > 0

    wrong = materialize(instance, "audit_log_answer", config={"sql": "DROP TABLE audit_logs"})
    assert not wrong.success


# -- what the bucket must be ----------------------------------------------------------------------------------------


def test_a_bucket_that_is_not_set_up_as_required_refuses_every_run_that_writes_to_it(
    january: Room, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCHIVE_OBJECT_LOCK", "governance")
    assert load(ArchiveSettings).archive_object_lock == "governance"
    attempts: list[Callable[[], dg.ExecuteInProcessResult]] = [
        lambda: materialize(instance, "audit_log_archive", month=JANUARY),
        lambda: materialize(instance, "audit_log_pruned", month=JANUARY),
        lambda: launch(instance, "erase_from_archive", {**DO, **ERASE}),
    ]
    before = everything(january)
    for attempt in attempts:
        assert "is not set up as required" in sentence(attempt())
    assert everything(january) == before
