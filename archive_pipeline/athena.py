"""Athena: its workgroup with a cutoff, its saved queries, and one statement run to the end.

Belongs here: every call to Athena, what an answer costs there, and Athena's errors as sentences.
Does not: the table in Glue (`archive_pipeline.catalog`), or what a statement says (`archive_pipeline.statements`).

PyAthena polls, cancels on Ctrl-C and turns the pages of a result into Python values: https://pyathena.dev
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import boto3
import pyathena
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from pyathena.cursor import Cursor
from pyathena.error import DatabaseError

from archive_pipeline.columns import Field
from archive_pipeline.errors import CatalogError
from scaling.errors import UserError
from scaling.settings import ArchiveSettings

if TYPE_CHECKING:
    import pandas as pd
    from mypy_boto3_athena import AthenaClient

# List price, us-east-1: 5 USD a TB scanned, rounded up to the MB, 10 MB at least (https://aws.amazon.com/athena/pricing/).
USD_PER_TB = 5
MB, TB = 1 << 20, 1 << 40
CHARGED_MB_AT_LEAST = 10
ENGINE = "Athena engine version 3"
POLL_SECONDS = 0.5
RETRIES = Config(retries={"mode": "standard", "total_max_attempts": 8})

INTEGERS = frozenset({"tinyint", "smallint", "integer", "bigint"})


def usd(bytes_scanned: int) -> float:
    """What Athena charges for one statement.

    Args:
        bytes_scanned: by the statement.
    """
    return max(math.ceil(bytes_scanned / MB), CHARGED_MB_AT_LEAST) * MB * USD_PER_TB / TB


@dataclass(frozen=True, slots=True)
class SavedQuery:
    """A query that people find in Athena's console.

    Attributes:
        name: unique in the workgroup.
        description: one line.
        sql: Athena's SQL.
    """

    name: str
    description: str
    sql: str


@dataclass(frozen=True, slots=True)
class Execution:
    """What a statement that has ended brought.

    Attributes:
        frame: its rows.
        bytes_scanned: as Athena bills it.
        query_id: under which Athena keeps it.
    """

    frame: "pd.DataFrame"
    bytes_scanned: int
    query_id: str


class Workgroup:
    """A workgroup whose settings no client can override.

    Args:
        client: boto3 client of Athena.
        name: of the workgroup.
        database: in which statements look for tables.
        output: where results go, ``s3://bucket/prefix/``.
        cutoff_bytes: a statement that scans more is cancelled.
        region: it lies in.
        poll_seconds: between two looks at a running statement.
    """

    def __init__(
        self,
        client: "AthenaClient",
        name: str,
        *,
        database: str,
        output: str,
        cutoff_bytes: int,
        region: str,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self._client = client
        self.name = name
        self.database = database
        self.output = output
        self.cutoff_bytes = cutoff_bytes
        self.region = region
        self._poll_seconds = poll_seconds

    @classmethod
    def from_settings(cls, settings: ArchiveSettings) -> "Workgroup | None":
        """Make the configured workgroup; None when none is configured.

        Args:
            settings: ARCHIVE_ATHENA_WORKGROUP and what goes with it.
        """
        if not settings.archive_athena_workgroup:
            return None
        return cls(
            boto3.Session().client("athena", region_name=settings.aws_region, config=RETRIES),
            settings.archive_athena_workgroup,
            database=settings.archive_athena_database,
            output=settings.archive_athena_output or "",
            cutoff_bytes=settings.archive_athena_cutoff_bytes,
            region=settings.aws_region,
        )

    def keep(self) -> bool:
        """Create the workgroup, or correct what differs.

        Returns:
            Whether anything was changed.

        Raises:
            CatalogError: Athena refuses.
        """
        with sentences(f"workgroup {self.name}"):
            if (found := self._found()) is None:
                try:
                    self._client.create_work_group(
                        Name=self.name,
                        Configuration=self._wanted(),  # type: ignore[arg-type]  # a dict
                        Description="The archive of the audit logs",
                    )
                except ClientError as error:
                    # Another run made it in between; it is looked at once more below.
                    if "already" not in str(error):
                        raise
                else:
                    return True
                found = self._found() or {}
            if not self._differences(found):
                return False
            wanted = self._wanted()
            self._client.update_work_group(
                WorkGroup=self.name,
                ConfigurationUpdates={
                    "EnforceWorkGroupConfiguration": True,
                    "ResultConfigurationUpdates": {"OutputLocation": self.output},
                    "PublishCloudWatchMetricsEnabled": True,
                    "BytesScannedCutoffPerQuery": self.cutoff_bytes,
                    "EngineVersion": wanted["EngineVersion"],
                },
            )
            return True

    def differences(self) -> list[str]:
        """What of the workgroup is not as configured, one sentence each.

        Raises:
            CatalogError: Athena refuses.
        """
        with sentences(f"workgroup {self.name}"):
            found = self._found()
        return [f"workgroup {self.name} does not exist"] if found is None else self._differences(found)

    def _wanted(self) -> dict[str, Any]:
        return {
            "ResultConfiguration": {"OutputLocation": self.output},
            "EnforceWorkGroupConfiguration": True,
            "PublishCloudWatchMetricsEnabled": True,
            "BytesScannedCutoffPerQuery": self.cutoff_bytes,
            "EngineVersion": {"SelectedEngineVersion": ENGINE},
        }

    def _found(self) -> Mapping[str, Any] | None:
        # AWS answers InvalidRequestException for a workgroup that is not there, moto with an empty one.
        try:
            answer = self._client.get_work_group(WorkGroup=self.name)
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") == "InvalidRequestException" and "not found" in str(error):
                return None
            raise
        group = answer.get("WorkGroup")
        return group.get("Configuration", {}) if group else None

    def _differences(self, found: Mapping[str, Any]) -> list[str]:
        output = found.get("ResultConfiguration", {}).get("OutputLocation")
        cutoff = found.get("BytesScannedCutoffPerQuery")
        sentences_ = []
        if cutoff != self.cutoff_bytes:
            sentences_.append(f"workgroup {self.name} cuts off at {cutoff} bytes, not at {self.cutoff_bytes}")
        if output != self.output:
            sentences_.append(f"workgroup {self.name} writes results to {output}, not to {self.output}")
        if not found.get("EnforceWorkGroupConfiguration", True):
            sentences_.append(f"workgroup {self.name} lets clients override its cutoff")
        return sentences_

    def save(self, queries: Sequence[SavedQuery], *, database: str) -> int:
        """Keep the named queries current.

        Args:
            queries: all of them; others in the workgroup are left alone.
            database: they run in.

        Returns:
            How many were written.

        Raises:
            CatalogError: Athena refuses.
        """
        with sentences(f"workgroup {self.name}"):
            known: dict[str, tuple[str, str, str]] = {}
            for page in self._client.get_paginator("list_named_queries").paginate(WorkGroup=self.name):
                for identifier in page.get("NamedQueryIds", []):
                    found = self._client.get_named_query(NamedQueryId=identifier)["NamedQuery"]
                    known[found["Name"]] = (identifier, found["QueryString"], found.get("Description", ""))
            written = 0
            for query in queries:
                if query.name not in known:
                    self._client.create_named_query(
                        Name=query.name,
                        Description=query.description,
                        Database=database,
                        QueryString=query.sql,
                        WorkGroup=self.name,
                    )
                elif known[query.name][1:] != (query.sql, query.description):
                    self._client.update_named_query(
                        NamedQueryId=known[query.name][0],
                        Name=query.name,
                        Description=query.description,
                        QueryString=query.sql,
                    )
                else:
                    continue
                written += 1
            return written

    def run(self, statement: str, fields: Sequence[Field] = ()) -> Execution:
        """Run one statement and wait for it; Ctrl-C cancels it in Athena too.

        Args:
            statement: Athena's SQL.
            fields: of the table; a column of the answer that has the name of an instant becomes one.

        Returns:
            The answer.

        Raises:
            UserError: Athena refuses it, it failed, or it was cut off.
        """
        with sentences(f"the query in workgroup {self.name}"), self._cursor() as cursor:
            try:
                cursor.execute(statement)
            except DatabaseError as error:
                raise self._failed(cursor, error) from None
            return Execution(_frame(cursor, fields), cursor.data_scanned_in_bytes or 0, cursor.query_id or "")

    @contextmanager
    def _cursor(self) -> Iterator[Cursor]:
        connection = pyathena.connect(
            s3_staging_dir=self.output,
            region_name=self.region,
            schema_name=self.database,
            work_group=self.name,
            poll_interval=self._poll_seconds,
            kill_on_interrupt=True,
            config=RETRIES,
        )
        try:
            with connection.cursor(Cursor) as cursor:
                yield cursor
        finally:
            connection.close()

    def _failed(self, cursor: Cursor, error: DatabaseError) -> UserError:
        if isinstance(error.__cause__, ClientError | BotoCoreError):
            return UserError(f"Athena refuses the query: {error.__cause__}")
        reason = str(error)
        if "bytes scanned limit" in reason.lower() or "BYTES_SCANNED" in reason:
            return UserError(
                f"Athena cancelled query {cursor.query_id}: it scans more than the {self.cutoff_bytes:,} bytes of "
                "ARCHIVE_ATHENA_CUTOFF_BYTES; give --tenant, --from and --to, or conditions on created_at"
            )
        if "PERMISSION" in reason.upper() or "Access Denied" in reason:
            return UserError(
                f"Athena may not read the archive ({reason}); the caller needs glue:GetTable, s3:GetObject and "
                "s3:ListBucket on the data, s3:PutObject on ARCHIVE_ATHENA_OUTPUT, and the bucket's KMS key"
            )
        return UserError(f"Athena could not run query {cursor.query_id}: {reason}")


def _frame(cursor: Cursor, fields: Sequence[Field]) -> "pd.DataFrame":
    import pandas as pd

    described = cursor.description or []
    names, types = [str(column[0]) for column in described], [str(column[1]).lower() for column in described]
    rows: list[Any] = list(cursor.fetchall()) if cursor.has_result_set else []
    frame = pd.DataFrame.from_records(rows, columns=names)
    instants = {field.name for field in fields if field.utc}
    for position, (name, kind) in enumerate(zip(names, types, strict=True)):
        column = frame.iloc[:, position]
        if kind in INTEGERS:
            converted = pd.Series(column, dtype="Int64" if column.isna().any() else "int64")
        elif kind.startswith("timestamp"):
            utc = name in instants or "with time zone" in kind
            converted = pd.to_datetime(column, utc=utc).astype("datetime64[us, UTC]" if utc else "datetime64[us]")
        else:
            continue
        frame.isetitem(position, converted)  # type: ignore[arg-type]  # the stubs know no Series here
    return frame


@contextmanager
def sentences(what: str) -> Iterator[None]:
    """Turn errors of AWS into sentences.

    Args:
        what: was asked for, to begin the sentence with.

    Raises:
        CatalogError: AWS refused, or did not answer.
    """
    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code.startswith(("AccessDenied", "UnrecognizedClient", "ExpiredToken")):
            raise CatalogError(
                f"AWS refuses {error.operation_name} for {what} ({code}); the credentials need glue:GetDatabase, "
                "CreateDatabase, GetTable, CreateTable and UpdateTable, and athena:* on the workgroup"
            ) from None
        message = error.response.get("Error", {}).get("Message", "")
        raise CatalogError(f"AWS refuses {error.operation_name} for {what}: {message or code}") from None
    except BotoCoreError as error:
        raise CatalogError(f"AWS does not answer for {what} ({type(error).__name__}: {error})") from None
