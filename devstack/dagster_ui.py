"""What a person clicks in the Dagster UI, as a client of the same GraphQL API.

Belongs here: launching jobs and backfills, waiting for them, asking what is loaded and alive.
Does not: what is launched (demo.py, tests).
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

import httpx

from scaling.errors import UserError

T = TypeVar("T")

REPOSITORY = "__repository__"  # the name Dagster gives to what a Definitions object holds
IMPLICIT_ASSET_JOB = "__ASSET_JOB"
POLL_SECONDS = 0.5
FINISHED_RUN = frozenset({"SUCCESS", "FAILURE", "CANCELED"})
FINISHED_BACKFILL = frozenset({"COMPLETED", "COMPLETED_SUCCESS", "COMPLETED_FAILED", "FAILED", "CANCELED"})

LOCATIONS = """
query { workspaceOrError { __typename
  ... on PythonError { message }
  ... on Workspace { locationEntries { name loadStatus locationOrLoadError {
    __typename ... on PythonError { message } } } } } }
"""
DAEMONS = "query { instance { daemonHealth { allDaemonStatuses { required healthy lastHeartbeatTime } } } }"
LAUNCH_RUN = """
mutation ($params: ExecutionParams!) { launchRun(executionParams: $params) { __typename
  ... on LaunchRunSuccess { run { runId } }
  ... on RunConfigValidationInvalid { errors { message } }
  ... on Error { message } } }
"""
LAUNCH_BACKFILL = """
mutation ($params: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $params) { __typename
  ... on LaunchBackfillSuccess { backfillId }
  ... on Error { message } } }
"""
START_SENSOR = """
mutation ($sensor: SensorSelector!) { startSensor(sensorSelector: $sensor) { __typename
  ... on Sensor { name }
  ... on Error { message } } }
"""
RUNS = """
query ($filter: RunsFilter, $limit: Int) { runsOrError(filter: $filter, limit: $limit) { __typename
  ... on Error { message }
  ... on Runs { results { runId jobName status tags { key value } } } } }
"""
FAILURES = """
query ($runId: ID!) { logsForRun(runId: $runId, limit: 1000) { __typename
  ... on EventConnection { events { __typename
    ... on ExecutionStepFailureEvent { stepKey error { message causes { message } } failureMetadata { description } }
    ... on RunFailureEvent { message } } } } }
"""
BACKFILL = """
query ($id: String!) { partitionBackfillOrError(backfillId: $id) { __typename
  ... on Error { message }
  ... on PartitionBackfill { status error { message } assetBackfillData { assetBackfillStatuses {
    ... on AssetPartitionsStatusCounts { numPartitionsMaterialized numPartitionsFailed numPartitionsTargeted } } } } } }
"""
PARTITIONS = """
query ($key: AssetKeyInput!) { assetNodeOrError(assetKey: $key) { __typename
  ... on AssetNode { partitionKeys } } }
"""
NUMBERS = """
query ($key: AssetKeyInput!) { assetOrError(assetKey: $key) { __typename
  ... on Error { message }
  ... on Asset { assetMaterializations(limit: 10000) { partition metadataEntries { label
    ... on IntMetadataEntry { intValue } ... on FloatMetadataEntry { floatValue } } } } } }
"""
CHECK_PARTITIONS = """
query ($key: AssetKeyInput!) { assetNodeOrError(assetKey: $key) { __typename
  ... on AssetNode { assetChecksOrError { __typename ... on AssetChecks { checks { name partitionStatuses { __typename
    ... on AssetCheckTimePartitionStatuses { ranges { status startKey endKey } } } } } } } } }
"""


@dataclass(frozen=True, slots=True)
class Run:
    """A run of a job, as Dagster stores it."""

    id: str
    job: str
    status: str
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Backfill:
    """A backfill over partitions of an asset, as Dagster stores it."""

    id: str
    status: str
    targeted: int
    materialized: int
    failed: int
    error: str | None


class DagsterUi:
    """Client of a running `dagster-webserver`; a context manager that closes its connections."""

    def __init__(self, url: str) -> None:
        """Take the address into use; nothing is sent yet.

        Args:
            url: of the webserver, for example `http://127.0.0.1:3000`.
        """
        self.url = url
        self._client = httpx.Client(base_url=url, timeout=60)

    def __enter__(self) -> "DagsterUi":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._client.close()

    def query(self, document: str, variables: Mapping[str, object] | None = None) -> dict[str, Any]:
        """Send one GraphQL document.

        Args:
            document: query or mutation.
            variables: its variables.

        Returns:
            The `data` of the answer; its shape follows the document.

        Raises:
            UserError: the webserver refused it or does not answer.
        """
        try:
            response = self._client.post("/graphql", json={"query": document, "variables": variables or {}})
            body = response.json()
        except (httpx.HTTPError, ValueError) as error:
            reason = str(error) or type(error).__name__
            raise UserError(f"The Dagster webserver at {self.url} does not answer: {reason}") from None
        if "errors" in body:
            raise UserError(f"Dagster refused a query: {body['errors'][0]['message']}")
        data: dict[str, Any] = body["data"]
        return data

    def is_serving(self) -> bool:
        """Tell whether the webserver answers."""
        try:
            return self._client.get("/server_info").is_success
        except httpx.HTTPError:
            return False

    def load_errors(self) -> dict[str, str] | None:
        """Ask how the code locations loaded.

        Returns:
            Location to error message, empty when all are well, None while one still loads.
        """
        workspace = _expect(self.query(LOCATIONS)["workspaceOrError"], "Workspace")
        errors = {}
        for entry in workspace["locationEntries"]:
            if entry["loadStatus"] == "LOADING":
                return None
            if entry["locationOrLoadError"]["__typename"] == "PythonError":
                errors[entry["name"]] = entry["locationOrLoadError"]["message"].strip()
        return errors

    def daemons_are_healthy(self, *, since: float = 0.0) -> bool:
        """Tell whether every daemon that the instance needs is healthy.

        Args:
            since: Unix time; heartbeats before it are of an earlier process and do not count.
        """
        statuses = self.query(DAEMONS)["instance"]["daemonHealth"]["allDaemonStatuses"]
        return all(
            status["healthy"] and (status["lastHeartbeatTime"] or 0.0) >= since
            for status in statuses
            if status["required"]
        )

    def launch_job(
        self,
        location: str,
        job: str,
        *,
        partition: str | None = None,
        run_config: Mapping[str, object] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """Launch a run of a job, like "Launch run".

        Args:
            location: code location.
            job: its job.
            partition: partition key of a partitioned job.
            run_config: as in the Launchpad.
            tags: of the run.

        Returns:
            The run's id.

        Raises:
            UserError: Dagster refused, with its reason.
        """
        return self._launch({"repositoryLocationName": location, "jobName": job}, partition, run_config, tags)

    def materialize(
        self,
        location: str,
        asset: str,
        *,
        partition: str | None = None,
        run_config: Mapping[str, object] | None = None,
    ) -> str:
        """Materialize one asset, like "Materialize" on its page.

        Args:
            location: code location.
            asset: its key.
            partition: partition key of a partitioned asset.
            run_config: as in the Launchpad.

        Returns:
            The run's id.

        Raises:
            UserError: Dagster refused, with its reason.
        """
        selector = {
            "repositoryLocationName": location,
            "jobName": IMPLICIT_ASSET_JOB,
            "assetSelection": [{"path": [asset]}],
        }
        return self._launch(selector, partition, run_config, None)

    def _launch(
        self,
        selector: Mapping[str, object],
        partition: str | None,
        run_config: Mapping[str, object] | None,
        tags: Mapping[str, str] | None,
    ) -> str:
        all_tags = {**(tags or {}), **({"dagster/partition": partition} if partition else {})}
        params = {
            "selector": {"repositoryName": REPOSITORY, **selector},
            "runConfigData": run_config or {},
            "executionMetadata": {"tags": _tags(all_tags)},
        }
        answer = self.query(LAUNCH_RUN, {"params": params})["launchRun"]
        return str(_expect(answer, "LaunchRunSuccess")["run"]["runId"])

    def launch_backfill(self, asset: str, partitions: Sequence[str], *, title: str | None = None) -> str:
        """Launch a backfill of one asset, like "Materialize" over selected partitions.

        Args:
            asset: key of the partitioned asset.
            partitions: partition keys.
            title: shown in the UI's list of backfills.

        Returns:
            The backfill's id.

        Raises:
            UserError: Dagster refused, with its reason.
        """
        answer = self.query(
            LAUNCH_BACKFILL,
            {"params": {"assetSelection": [{"path": [asset]}], "partitionNames": list(partitions), "title": title}},
        )["launchPartitionBackfill"]
        return str(_expect(answer, "LaunchBackfillSuccess")["backfillId"])

    def start_sensor(self, location: str, sensor: str) -> None:
        """Switch a sensor on, like the switch on its page.

        Args:
            location: code location.
            sensor: its name.

        Raises:
            UserError: Dagster refused, with its reason.
        """
        selector = {"repositoryLocationName": location, "repositoryName": REPOSITORY, "sensorName": sensor}
        _expect(self.query(START_SENSOR, {"sensor": selector})["startSensor"], "Sensor")

    def partitions(self, asset: str) -> list[str]:
        """List the partition keys of an asset, oldest first.

        Args:
            asset: its key.
        """
        answer = _expect(self.query(PARTITIONS, {"key": {"path": [asset]}})["assetNodeOrError"], "AssetNode")
        return [str(key) for key in answer["partitionKeys"]]

    def numbers(self, asset: str) -> dict[str | None, dict[str, float]]:
        """Read the numeric metadata of each partition's latest materialization.

        Args:
            asset: its key.

        Returns:
            Partition key (None without partitions) to label to number; partitions never materialized are left out.
        """
        answer = _expect(self.query(NUMBERS, {"key": {"path": [asset]}})["assetOrError"], "Asset")
        latest: dict[str | None, dict[str, float]] = {}
        for materialization in answer["assetMaterializations"]:  # newest first
            latest.setdefault(
                materialization["partition"],
                {
                    entry["label"]: next(entry[name] for name in ("intValue", "floatValue") if name in entry)
                    for entry in materialization["metadataEntries"]
                    if "intValue" in entry or "floatValue" in entry
                },
            )
        return latest

    def check_ranges(self, asset: str, check: str) -> list[tuple[str, str, str]]:
        """Read the latest verdicts of a check on a time-partitioned asset.

        Args:
            asset: its key.
            check: of the asset.

        Returns:
            Status, first and last partition key of each range of partitions that have the same one.
        """
        answer = _expect(self.query(CHECK_PARTITIONS, {"key": {"path": [asset]}})["assetNodeOrError"], "AssetNode")
        [found] = [
            each for each in _expect(answer["assetChecksOrError"], "AssetChecks")["checks"] if each["name"] == check
        ]
        ranges = _expect(found["partitionStatuses"], "AssetCheckTimePartitionStatuses")["ranges"]
        return [(each["status"], each["startKey"], each["endKey"]) for each in ranges]

    def runs(
        self,
        *,
        ids: Sequence[str] | None = None,
        job: str | None = None,
        tags: Mapping[str, str] | None = None,
        limit: int = 1000,
    ) -> list[Run]:
        """List runs, newest first.

        Args:
            ids: only these.
            job: only of this job.
            tags: only those that carry them all.
            limit: at most so many.
        """
        wanted: dict[str, object] = {}
        if ids is not None:
            wanted["runIds"] = list(ids)
        if job is not None:
            wanted["pipelineName"] = job
        if tags:
            wanted["tags"] = _tags(tags)
        answer = _expect(self.query(RUNS, {"filter": wanted, "limit": limit})["runsOrError"], "Runs")
        return [
            Run(run["runId"], run["jobName"], run["status"], {tag["key"]: tag["value"] for tag in run["tags"]})
            for run in answer["results"]
        ]

    def run_counts(self) -> Counter[str]:
        """Count all runs by status."""
        return Counter(run.status for run in self.runs(limit=100_000))

    def failure(self, run_id: str) -> str:
        """Say why a run failed.

        Args:
            run_id: of a failed run.

        Returns:
            The innermost message of its first failed step, or of the run.
        """
        events = self.query(FAILURES, {"runId": run_id})["logsForRun"].get("events", [])
        for event in events:
            if event["__typename"] == "ExecutionStepFailureEvent" and event["error"]:
                description = (event["failureMetadata"] or {}).get("description")
                causes = [cause["message"] for cause in event["error"]["causes"]]
                return str(description or (causes or [event["error"]["message"]])[-1]).strip()
        return next((str(e["message"]) for e in events if e["__typename"] == "RunFailureEvent"), "no reason was stored")

    def wait_for_run(self, run_id: str, *, timeout_seconds: float = 300) -> Run:
        """Wait until a run has ended.

        Args:
            run_id: of a launched run.
            timeout_seconds: how long at most.

        Returns:
            The run, successful or not.

        Raises:
            UserError: it has not ended in time.
        """

        def ended() -> Run | None:
            return next((run for run in self.runs(ids=[run_id]) if run.status in FINISHED_RUN), None)

        return _poll(ended, timeout_seconds, f"run {run_id}")

    def backfill(self, backfill_id: str) -> Backfill:
        """Ask how far a backfill is.

        Args:
            backfill_id: of a launched backfill.
        """
        answer = _expect(self.query(BACKFILL, {"id": backfill_id})["partitionBackfillOrError"], "PartitionBackfill")
        counts = [each for each in (answer["assetBackfillData"] or {}).get("assetBackfillStatuses", []) if each]
        return Backfill(
            backfill_id,
            answer["status"],
            sum(each["numPartitionsTargeted"] for each in counts),
            sum(each["numPartitionsMaterialized"] for each in counts),
            sum(each["numPartitionsFailed"] for each in counts),
            answer["error"]["message"].strip() if answer["error"] else None,
        )

    def wait_for_backfill(
        self,
        backfill_id: str,
        *,
        timeout_seconds: float = 600,
        progress: Callable[[Backfill], None] | None = None,
    ) -> Backfill:
        """Wait until a backfill has ended.

        Args:
            backfill_id: of a launched backfill.
            timeout_seconds: how long at most.
            progress: told how far it is, twice a second.

        Returns:
            The backfill, successful or not.

        Raises:
            UserError: it has not ended in time.
        """

        def ended() -> Backfill | None:
            backfill = self.backfill(backfill_id)
            if progress is not None:
                progress(backfill)
            return backfill if backfill.status in FINISHED_BACKFILL else None

        return _poll(ended, timeout_seconds, f"backfill {backfill_id}")


def _tags(tags: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in tags.items()]


def _expect(answer: dict[str, Any], kind: str) -> dict[str, Any]:
    if answer["__typename"] != kind:
        reasons = [answer.get("message"), *(error["message"] for error in answer.get("errors", []))]
        raise UserError(f"Dagster answered {answer['__typename']}: {'; '.join(str(r) for r in reasons if r)}")
    return answer


def _poll(ask: Callable[[], T | None], timeout_seconds: float, what: str) -> T:
    deadline = time.monotonic() + timeout_seconds
    while (answer := ask()) is None:
        if time.monotonic() > deadline:
            raise UserError(f"{what} has not ended after {timeout_seconds:.0f} seconds.")
        time.sleep(POLL_SECONDS)
    return answer
