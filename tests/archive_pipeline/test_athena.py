"""Athena: the workgroup, the saved queries, and statements run to their end."""

import _thread
import json
import os
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import uuid4

import boto3
import pandas as pd
import pytest
from botocore.stub import Stubber

from archive_pipeline.athena import ENGINE, SavedQuery, Workgroup, usd
from archive_pipeline.columns import Field
from archive_pipeline.errors import CatalogError
from devstack.aws import Aws
from scaling.errors import UserError

OUTPUT = "s3://results/athena/"
QUERIES = (SavedQuery("one", "The first.", "SELECT 1"), SavedQuery("two", "The second.", "SELECT 2"))


@pytest.fixture
def credentials(settings_environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    settings_environment()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")


def workgroup(name: str | None = None, *, client: Any = None, cutoff: int = 50_000_000) -> Workgroup:
    return Workgroup(
        client or boto3.Session().client("athena", region_name="us-east-1"),
        name or f"archive-{uuid4().hex[:8]}",
        database="audit",
        output=OUTPUT,
        cutoff_bytes=cutoff,
        region="us-east-1",
        poll_seconds=0.01,
    )


@pytest.fixture
def moto(aws: Aws, credentials: None, monkeypatch: pytest.MonkeyPatch) -> Aws:
    for name, value in aws.environment().items():
        monkeypatch.setenv(name, value)
    return aws


@pytest.mark.parametrize(
    ("scanned", "price"),
    [(0, 10), (1, 10), (10 * 2**20, 10), (10 * 2**20 + 1, 11), (2**40, 2**20)],
)
def test_athena_charges_every_begun_megabyte_and_ten_at_least(scanned: int, price: int) -> None:
    assert usd(scanned) == pytest.approx(price * 5 / 2**20)


def test_the_workgroup_has_a_cutoff_that_no_client_overrides_and_keeping_it_again_changes_nothing(moto: Aws) -> None:
    group = workgroup()
    assert group.differences() == [f"workgroup {group.name} does not exist"]
    assert group.keep()
    made = boto3.Session().client("athena", region_name="us-east-1").get_work_group(WorkGroup=group.name)
    configuration = made["WorkGroup"]["Configuration"]
    assert configuration["BytesScannedCutoffPerQuery"] == 50_000_000
    assert configuration["EnforceWorkGroupConfiguration"] is True
    assert configuration["ResultConfiguration"] == {"OutputLocation": OUTPUT}
    assert configuration["EngineVersion"]["SelectedEngineVersion"] == ENGINE
    assert group.differences() == []
    assert not group.keep()
    assert workgroup(group.name, cutoff=60_000_000).differences() == [
        f"workgroup {group.name} cuts off at 50000000 bytes, not at 60000000"
    ]


def test_a_workgroup_that_differs_is_corrected(credentials: None) -> None:
    client = boto3.Session().client("athena", region_name="us-east-1")
    group = workgroup("archive", client=client)
    loose = {"EnforceWorkGroupConfiguration": False, "ResultConfiguration": {"OutputLocation": "s3://elsewhere/"}}
    with Stubber(client) as stub:
        found = {"WorkGroup": {"Name": "archive", "Configuration": loose}}
        stub.add_response("get_work_group", found, {"WorkGroup": "archive"})
        stub.add_response(
            "update_work_group",
            {},
            {
                "WorkGroup": "archive",
                "ConfigurationUpdates": {
                    "EnforceWorkGroupConfiguration": True,
                    "ResultConfigurationUpdates": {"OutputLocation": OUTPUT},
                    "PublishCloudWatchMetricsEnabled": True,
                    "BytesScannedCutoffPerQuery": 50_000_000,
                    "EngineVersion": {"SelectedEngineVersion": ENGINE},
                },
            },
        )
        assert group.keep()
        stub.assert_no_pending_responses()


def test_a_workgroup_that_another_run_makes_meanwhile_is_success(credentials: None) -> None:
    client = boto3.Session().client("athena", region_name="us-east-1")
    group = workgroup("archive", client=client)
    right = {
        "EnforceWorkGroupConfiguration": True,
        "ResultConfiguration": {"OutputLocation": OUTPUT},
        "BytesScannedCutoffPerQuery": 50_000_000,
    }
    with Stubber(client) as stub:
        stub.add_client_error("get_work_group", "InvalidRequestException", "WorkGroup archive is not found.")
        stub.add_client_error("create_work_group", "InvalidRequestException", "WorkGroup is already created")
        stub.add_response("get_work_group", {"WorkGroup": {"Name": "archive", "Configuration": right}})
        assert not group.keep()
        stub.add_client_error("get_work_group", "AccessDeniedException", "not authorized")
        with pytest.raises(CatalogError, match=r"AWS refuses GetWorkGroup for workgroup archive \(AccessDenied"):
            group.keep()


def test_saved_queries_are_written_once(moto: Aws) -> None:
    group = workgroup()
    group.keep()
    assert group.save(QUERIES, database="audit") == 2
    assert group.save(QUERIES, database="audit") == 0
    client = boto3.Session().client("athena", region_name="us-east-1")
    ids = client.list_named_queries(WorkGroup=group.name)["NamedQueryIds"]
    saved = [client.get_named_query(NamedQueryId=identifier)["NamedQuery"] for identifier in ids]
    assert {(each["Name"], each["QueryString"], each["Database"]) for each in saved} == {
        ("one", "SELECT 1", "audit"),
        ("two", "SELECT 2", "audit"),
    }


def test_a_saved_query_that_changed_is_updated_and_others_are_left_alone(credentials: None) -> None:
    client = boto3.Session().client("athena", region_name="us-east-1")
    with Stubber(client) as stub:
        stub.add_response("list_named_queries", {"NamedQueryIds": ["a", "b"]})
        for identifier, name, text in (("a", "one", "SELECT 0"), ("b", "somebody's", "SELECT 9")):
            found = {"Name": name, "Database": "audit", "QueryString": text, "NamedQueryId": identifier}
            stub.add_response("get_named_query", {"NamedQuery": found}, {"NamedQueryId": identifier})
        stub.add_response(
            "update_named_query",
            {},
            {"NamedQueryId": "a", "Name": "one", "Description": "The first.", "QueryString": "SELECT 1"},
        )
        assert workgroup("archive", client=client).save(QUERIES[:1], database="audit") == 1
        stub.assert_no_pending_responses()


def queue(moto: Aws, rows: list[list[str | None]], columns: list[tuple[str, str]]) -> None:
    """Let moto answer the next statement so."""
    names: list[str | None] = [name for name, _ in columns]
    body: dict[str, list[Any]] = {
        "results": [
            {
                "rows": [
                    {"Data": [{} if value is None else {"VarCharValue": value} for value in row]}
                    for row in [names, *rows]
                ],
                "column_info": [
                    {"CatalogName": "hive", "SchemaName": "", "TableName": "", "Name": name, "Label": name,
                     "Type": kind, "Precision": 0, "Scale": 0, "Nullable": "UNKNOWN", "CaseSensitive": False}
                    for name, kind in columns
                ],
            }
        ]
    }  # fmt: skip
    request = urllib.request.Request(
        f"{moto.endpoint}/moto-api/static/athena/query-results",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 201


def test_an_answer_of_athena_has_the_types_that_the_answer_of_duckdb_has(moto: Aws) -> None:
    group = workgroup()
    group.keep()
    queue(
        moto,
        [
            ["5", "7", "2025-01-31 23:59:59.999", "2025-01-01 00:00:00.000", "a, b", "1.50", "true", "0.5"],
            ["6", None, None, None, None, None, None, None],
        ],
        [("n", "bigint"), ("severity", "integer"), ("created_at", "timestamp"), ("wall", "timestamp"),
         ("action", "varchar"), ("price", "decimal"), ("flag", "boolean"), ("share", "double")],
    )  # fmt: skip
    fields = [Field("created_at", "timestamp", utc=True), Field("wall", "timestamp")]
    run = group.run("SELECT …", fields)
    assert {name: str(kind) for name, kind in run.frame.dtypes.items()} == {
        "n": "int64",
        "severity": "Int64",
        "created_at": "datetime64[us, UTC]",
        "wall": "datetime64[us]",
        "action": run.frame["action"].dtype.name,
        "price": "object",
        "flag": "object",
        "share": "float64",
    }
    assert run.frame["created_at"][0] == pd.Timestamp("2025-01-31T23:59:59.999Z")
    assert run.frame["action"].tolist()[0] == "a, b"
    assert run.frame["severity"].isna().tolist() == [False, True]
    assert run.query_id


@dataclass
class FakeAthena:
    """Answers as Athena does about one statement: moto's always succeed."""

    endpoint: str = ""
    states: list[dict[str, Any]] = field(default_factory=list)
    scanned: int = 0
    calls: list[str] = field(default_factory=list)
    on_poll: Callable[[], None] = lambda: None

    def answer(self, action: str) -> dict[str, Any]:
        self.calls.append(action)
        match action:
            case "StartQueryExecution":
                return {"QueryExecutionId": "11111111-2222-3333-4444-555555555555"}
            case "GetQueryExecution":
                self.on_poll()
                status = self.states.pop(0) if len(self.states) > 1 else self.states[0]
                return {
                    "QueryExecution": {
                        "QueryExecutionId": "11111111-2222-3333-4444-555555555555",
                        "Query": "SELECT 1",
                        "StatementType": "DML",
                        "Status": status,
                        "Statistics": {"DataScannedInBytes": self.scanned},
                        "ResultConfiguration": {"OutputLocation": OUTPUT + "1.csv"},
                    }
                }
            case "GetQueryResults":
                return {"ResultSet": {"Rows": [], "ResultSetMetadata": {"ColumnInfo": []}}}
        return {}


@pytest.fixture
def fake(credentials: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAthena]:
    athena = FakeAthena()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps(athena.answer(self.headers["X-Amz-Target"].rsplit(".", 1)[-1])).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-amz-json-1.1")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Tests are quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_ATHENA", f"http://127.0.0.1:{server.server_port}")
    yield athena
    server.shutdown()
    server.server_close()


def test_a_statement_is_waited_for_and_its_scanned_bytes_are_told(fake: FakeAthena) -> None:
    fake.states = [{"State": "QUEUED"}, {"State": "RUNNING"}, {"State": "SUCCEEDED"}]
    fake.scanned = 12_345_678
    assert workgroup("archive").run("SELECT 1").bytes_scanned == 12_345_678
    assert fake.calls[:4] == ["StartQueryExecution", *["GetQueryExecution"] * 3]


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (
            {"State": "CANCELLED", "StateChangeReason": "Query cancelled! : Bytes scanned limit was exceeded"},
            "scans more than the 50,000,000 bytes of ARCHIVE_ATHENA_CUTOFF_BYTES; give --tenant",
        ),
        (
            {"State": "FAILED", "StateChangeReason": "SYNTAX_ERROR: line 1:8: Column 'x' cannot be resolved"},
            "could not run query 11111111-2222-3333-4444-555555555555: SYNTAX_ERROR: line 1:8: Column 'x'",
        ),
        (
            {"State": "FAILED", "StateChangeReason": "PERMISSION_DENIED: Access Denied (Service: Amazon S3)"},
            "may not read the archive .* s3:PutObject on ARCHIVE_ATHENA_OUTPUT",
        ),
    ],
)
def test_a_statement_that_failed_or_was_cut_off_is_told_in_a_sentence(
    fake: FakeAthena, status: dict[str, Any], sentence: str
) -> None:
    fake.states = [{"State": "RUNNING"}, status]
    with pytest.raises(UserError, match=rf"Athena .*{sentence}"):
        workgroup("archive").run("SELECT 1")


def test_an_interrupted_statement_is_cancelled_in_athena_too(fake: FakeAthena) -> None:
    polls: list[int] = []

    def interrupt() -> None:
        polls.append(1)
        if len(polls) == 2:
            _thread.interrupt_main()
        if "StopQueryExecution" in fake.calls:
            fake.states = [{"State": "CANCELLED"}]

    fake.states, fake.on_poll = [{"State": "RUNNING"}], interrupt
    with pytest.raises(KeyboardInterrupt):
        workgroup("archive").run("SELECT 1")
    assert "StopQueryExecution" in fake.calls


def test_athena_that_cannot_be_reached_is_told_in_a_sentence(
    credentials: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_ATHENA", "http://127.0.0.1:9")
    monkeypatch.setattr("archive_pipeline.athena.RETRIES", None)
    with pytest.raises(UserError, match=r"Athena refuses the query|AWS does not answer"):
        workgroup("archive").run("SELECT 1")


@pytest.mark.skipif("ARCHIVE_LIVE_ATHENA" not in os.environ, reason="needs an AWS account: ARCHIVE_LIVE_ATHENA=1")
def test_athena_itself_reads_the_archive_as_duckdb_does() -> None:
    from archive_pipeline.query import ask

    for statement in (
        "SELECT count(*) AS n, min(created_at_us) AS first, max(created_at_us) AS last FROM audit_logs",
        "SELECT year, month, count(*) AS n FROM audit_logs GROUP BY ALL ORDER BY ALL",
        "SELECT id, created_at, created_at_us FROM audit_logs ORDER BY created_at_us, id LIMIT 100",
    ):
        there, here = (ask(statement, engine=engine).frame for engine in ("athena", "duckdb"))
        pd.testing.assert_frame_equal(there, here, check_dtype=False)
