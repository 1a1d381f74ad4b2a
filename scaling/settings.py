"""Every setting of the pipelines, read from the environment once and checked before anything starts.

Belongs here: one frozen model per concern, its environment variables, defaults and bounds.
Does not: connections or clients built from the settings.
"""

import re
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cryptography.fernet import Fernet
from pydantic import AfterValidator, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from scaling.errors import UserError

MONTH = re.compile(r"\d{4}-(0[1-9]|1[0-2])")
ADDRESS = re.compile(r"[^@\s,;<>\"]+@[^@\s,;<>\"]+")
TABLE = re.compile(r"[^.\s]+\.[^.\s]+")

S = TypeVar("S", bound=BaseSettings)


def _keeps_private(address: str) -> bool:
    """Whether nobody on the way reads what is sent there: https, or plain http to this machine.

    By the host as it is parsed: http://localhost.example.com and http://127.0.0.1@example.com are elsewhere.
    """
    try:
        parts = urlsplit(address)
    except ValueError:
        return False
    return bool(parts.hostname) and (
        parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost", "::1"))
    )


def _kept_private(value: SecretStr | None) -> SecretStr | None:
    if not value or not value.get_secret_value():
        return None
    if not _keeps_private(value.get_secret_value()):
        raise ValueError("must be https (plain http only on this machine)")
    return value


def _web_address(value: str | None) -> str | None:
    if not value:
        return None
    if not value.startswith(("https://", "http://")):
        raise ValueError("must be an http(s) address")
    return value


WebAddress = Annotated[str | None, AfterValidator(_web_address)]
"""Where something is reached, or shown to people; none when empty."""
SecretAddress = Annotated[SecretStr | None, AfterValidator(_kept_private)]
"""A web address that is itself a secret, like an incoming webhook's."""


class DatabaseSettings(BaseSettings):
    """Where the SaaS database is."""

    model_config = SettingsConfigDict(frozen=True)

    database_url: SecretStr = Field(
        description="Postgres of the SaaS, direct or session mode (port 5432, never Supavisor's 6543): "
        "postgresql://pipeline:…@host:5432/postgres"
    )
    database_pool_size: int = Field(default=16, ge=1, le=200, description="Connections one process keeps at most.")
    database_replica_url: SecretStr | None = Field(
        default=None, description="A read replica; exports of the archive read there once it has caught up."
    )
    database_owner_url: SecretStr | None = Field(
        default=None,
        description="Login of the role that owns the audit logs; used only to partition, prune and restore them.",
    )

    @field_validator("database_url", "database_replica_url", "database_owner_url")
    @classmethod
    def _is_postgres(cls, value: SecretStr | None) -> SecretStr | None:
        if not value or not value.get_secret_value():
            return None
        if not value.get_secret_value().startswith(("postgresql://", "postgres://")):
            raise ValueError("must be a postgresql:// URL")
        return value


class AutomationSettings(BaseSettings):
    """Whether schedules and sensors run without being switched on in the UI."""

    model_config = SettingsConfigDict(frozen=True)

    pipeline_autostart: bool = Field(
        default=False, description="true: schedules and sensors are on from the first start."
    )
    scaling_sensor_seconds: int = Field(
        default=30, ge=1, le=3600, description="Seconds between two looks of a capability's sensor."
    )
    archive_alert_url: SecretAddress = Field(
        default=None,
        description='Only failed runs of the archive, JSON {"text": "…"}; ALERT_SLACK_URL is for all alerts.',
    )


class TracingSettings(BaseSettings):
    """Where traces of runs go; the other OTEL_… variables of the OpenTelemetry SDK hold as well."""

    model_config = SettingsConfigDict(frozen=True)

    otel_exporter_otlp_endpoint: WebAddress = Field(
        default=None, description="OTLP/HTTP collector that gets the traces of runs; unset: no traces."
    )
    trace_ui_url: WebAddress = Field(
        default=None, description="Address of a trace with {trace_id} in it; each run's page in Dagster links its own."
    )

    @field_validator("trace_ui_url")
    @classmethod
    def _has_a_place_for_the_trace(cls, value: str | None) -> str | None:
        if value and "{trace_id}" not in value:
            raise ValueError("must hold {trace_id}, for example https://jaeger.example.com/trace/{trace_id}")
        return value


class AlertSettings(BaseSettings):
    """Where alerts go; none of it is needed, and every channel that is set gets all of them."""

    model_config = SettingsConfigDict(frozen=True)

    alert_slack_url: SecretAddress = Field(
        default=None, description="Incoming webhook of Slack or Mattermost that alerts are posted to."
    )
    alert_webhook_url: SecretAddress = Field(
        default=None, description="Alerts are posted here as JSON, with an Idempotency-Key."
    )
    alert_webhook_token: SecretStr | None = Field(default=None, description="Sent there as a bearer token.")
    alert_smtp_host: str | None = Field(default=None, description="Mail server that takes alerts by e-mail.")
    alert_smtp_port: int = Field(default=587, ge=1, le=65535, description="Its port.")
    alert_smtp_tls: Literal["starttls", "implicit"] = Field(
        default="starttls", description="implicit: TLS from the first byte, port 465. Never without."
    )
    alert_smtp_user: str | None = Field(default=None, description="Login of the mail server.")
    alert_smtp_password: SecretStr | None = Field(default=None, description="Its password.")
    alert_smtp_from: str | None = Field(default=None, description="Sender of the e-mails.")
    alert_smtp_to: Annotated[tuple[str, ...], NoDecode] = Field(default=(), description="Recipients, comma separated.")

    @field_validator("alert_smtp_to", mode="before")
    @classmethod
    def _split_recipients(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(each.strip() for each in value.split(",") if each.strip())
        return value

    @field_validator("alert_smtp_from", "alert_smtp_to")
    @classmethod
    def _are_addresses(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        for each in (value,) if isinstance(value, str) else value or ():
            if not ADDRESS.fullmatch(each):
                raise ValueError("must be plain e-mail addresses, name@example.com")
        return value

    @model_validator(mode="after")
    def _mail_is_whole(self) -> Self:
        if self.alert_smtp_host and not (self.alert_smtp_from and self.alert_smtp_to):
            raise ValueError("ALERT_SMTP_HOST is set, so ALERT_SMTP_FROM and ALERT_SMTP_TO must be set too")
        if bool(self.alert_smtp_user) != bool(self.alert_smtp_password):
            raise ValueError("set both ALERT_SMTP_USER and ALERT_SMTP_PASSWORD, or neither")
        return self


class LogSettings(BaseSettings):
    """How processes log."""

    model_config = SettingsConfigDict(frozen=True)

    log_format: Literal["text", "json"] = Field(
        default="text", description="json: every log line is one JSON object, with an event from docs/operations.md."
    )


class CapabilitySettings(BaseSettings):
    """What a crossed threshold leads to, by capability; all of it has defaults."""

    model_config = SettingsConfigDict(frozen=True)

    scaling_incremental_sync: Literal["off", "observe", "propose", "auto", "on"] = Field(
        default="auto",
        description="Sync tokens, push and adaptive polling: never, recorded only, after approval, by itself, always.",
    )
    scaling_parallel_sync: Literal["off", "observe", "propose", "auto", "on"] = Field(
        default="auto", description="The pool of workers in place of five workspaces a tick, one after the other."
    )
    scaling_audit_log_partitioning: Literal["off", "observe", "propose", "auto"] = Field(
        default="propose", description="Conversion of the audit logs to partitions, then archive of closed months."
    )
    scaling_audit_log_retention: Literal["off", "observe", "propose", "auto"] = Field(
        default="propose", description="Archive of months past retention, then their prune as ARCHIVE_PRUNE says."
    )


class ScalingSettings(CapabilitySettings):
    """Where the metrics of the thresholds come from. What has no credentials is not asked, and fires nothing."""

    scaling_catalogue_file: Path | None = Field(
        default=None, description="TOML that overrides thresholds of the catalogue."
    )
    scaling_report_file: Path = Field(
        default=Path("var/report/scaling.html"),
        description="Where asset scaling_report and python -m scaling report write the page of all figures.",
    )
    scaling_report_url: WebAddress = Field(
        default=None,
        description="Where people reach the page (python -m scaling.report_server, or your proxy); linked in Dagster.",
    )
    scaling_source_timeout_seconds: float = Field(
        default=10.0, gt=0, le=120, description="One query, or one request, of a metric may take this long."
    )
    scaling_prometheus_url: str | None = Field(default=None, description="A Prometheus server that is asked in PromQL.")
    scaling_prometheus_user: str | None = Field(default=None, description="Its user, where it asks for one.")
    scaling_prometheus_password: SecretStr | None = Field(default=None, description="Its password.")
    vercel_token: SecretStr | None = Field(default=None, description="Vercel access token (metrics and billing).")
    vercel_team_id: str | None = Field(default=None, description="Vercel team, team_…")
    vercel_project_id: str | None = Field(default=None, description="Vercel project, prj_…; unset: the whole team.")
    vercel_endpoint: str = Field(default="https://api.vercel.com", description="Vercel's API; other only in tests.")
    anthropic_admin_key: SecretStr | None = Field(default=None, description="Anthropic admin key, sk-ant-admin…")
    anthropic_endpoint: str = Field(
        default="https://api.anthropic.com", description="Anthropic's API; other only in tests."
    )
    upstash_email: str | None = Field(default=None, description="Upstash account.")
    upstash_api_key: SecretStr | None = Field(default=None, description="Upstash management API key.")
    upstash_database_id: str | None = Field(default=None, description="Upstash Redis database.")
    upstash_endpoint: str = Field(default="https://api.upstash.com", description="Upstash's API; other only in tests.")
    supabase_access_token: SecretStr | None = Field(default=None, description="Supabase management token, sbp_…")
    supabase_project_ref: str | None = Field(default=None, description="Supabase project.")
    supabase_organization: str | None = Field(default=None, description="Slug of the Supabase organization.")
    supabase_secret_key: SecretStr | None = Field(
        default=None, description="Secret key of the project, sb_secret_…; scrapes its metrics."
    )
    supabase_endpoint: str = Field(default="https://api.supabase.com", description="Supabase's API; other in tests.")
    supabase_project_endpoint: str | None = Field(
        default=None, description="The project's own address; unset: https://SUPABASE_PROJECT_REF.supabase.co"
    )
    google_monitoring_project: str | None = Field(
        default=None, description="Google Cloud project of the OAuth client; its count of Calendar calls is read."
    )
    google_monitoring_credentials_file: Path | None = Field(
        default=None, description="JSON key of a service account with the role Monitoring Viewer there."
    )
    google_monitoring_endpoint: str = Field(
        default="https://monitoring.googleapis.com", description="Cloud Monitoring's API; other only in tests."
    )
    google_monitoring_token_url: str = Field(
        default="https://oauth2.googleapis.com/token", description="Its OAuth token endpoint; other only in tests."
    )
    ai_monthly_budget_usd: float | None = Field(default=None, gt=0, description="Budget of the AI chat a month, USD.")

    @field_validator(
        "scaling_prometheus_url",
        "vercel_endpoint",
        "anthropic_endpoint",
        "upstash_endpoint",
        "supabase_endpoint",
        "supabase_project_endpoint",
        "google_monitoring_endpoint",
        "google_monitoring_token_url",
    )
    @classmethod
    def _keeps_secrets_secret(cls, value: str | None) -> str | None:
        if not value:
            return None
        if not _keeps_private(value):
            raise ValueError("must be https, credentials are sent there (plain http only on this machine)")
        return value.rstrip("/")


class ExporterSettings(BaseSettings):
    """Where the figures for Prometheus are served; all of it has defaults."""

    model_config = SettingsConfigDict(frozen=True)

    exporter_host: str = Field(default="127.0.0.1", description="Address `python -m scaling.exporter` binds.")
    exporter_port: int = Field(default=9464, ge=0, le=65535, description="Port it binds; 0 picks one.")
    exporter_timeout_seconds: float = Field(
        default=5.0, gt=0, le=60, description="One scrape may take this long; shorter than Prometheus's scrape_timeout."
    )


class ReportServerSettings(BaseSettings):
    """Where the page for people without Grafana is served; all of it has defaults."""

    model_config = SettingsConfigDict(frozen=True)

    report_host: str = Field(default="127.0.0.1", description="Address `python -m scaling.report_server` binds.")
    report_port: int = Field(default=9465, ge=0, le=65535, description="Port it binds; 0 picks one.")


class DagsterStorageSettings(BaseSettings):
    """Where Dagster keeps its runs and ticks: the variables that dagster.yaml reads."""

    model_config = SettingsConfigDict(frozen=True)

    dagster_pg_host: str | None = Field(default=None, description="Its host; unset: nothing of it is exported.")
    dagster_pg_port: int = Field(default=5432, ge=1, le=65535, description="Its port.")
    dagster_pg_user: str | None = Field(default=None, description="Its login.")
    dagster_pg_password: SecretStr | None = Field(default=None, description="The login's password.")
    dagster_pg_db: str = Field(default="dagster", description="Its database.")


class SyncScheduleSettings(BaseSettings):
    """When the sync runs; all of it has defaults, so that definitions load without any environment."""

    model_config = SettingsConfigDict(frozen=True)

    sync_cron: str = Field(default="*/2 * * * *", description="When a sync tick starts (cron, UTC).")
    sync_runs_per_tick: int = Field(default=1, ge=1, le=64, description="Dagster runs that share one tick's work.")
    sync_poll_interval_seconds: float = Field(
        default=120.0, ge=0, description="Shortest time between two polls of a calendar; jittered by 25 %."
    )
    sync_poll_ceiling_seconds: float = Field(
        default=14400.0, ge=0, description="Longest time between two polls; equal to the shortest: no adapting."
    )
    sync_freshness_target_seconds: float = Field(
        default=900.0, gt=0, description="Mean age a change may have before polling finds it; fewer calls if longer."
    )
    sync_webhook_url: str | None = Field(
        default=None,
        description="Public https address of `python -m sync_pipeline.webhook`; unset: no push, calendars are polled.",
    )
    sync_time_budget_seconds: float = Field(
        default=100.0, gt=0, le=3600, description="A run claims no new calendar after this long."
    )

    @field_validator("sync_webhook_url")
    @classmethod
    def _is_public_https(cls, value: str | None) -> str | None:
        if not value:
            return None
        if not _keeps_private(value):
            raise ValueError("must be https, Google sends notifications nowhere else (plain http only on this machine)")
        return value

    @model_validator(mode="after")
    def _ceiling_is_above_the_floor(self) -> Self:
        if self.sync_poll_ceiling_seconds < self.sync_poll_interval_seconds:
            raise ValueError(
                "SYNC_POLL_CEILING_SECONDS must not be shorter than SYNC_POLL_INTERVAL_SECONDS; "
                "set both to the same value for a fixed interval"
            )
        return self


class SyncLimitSettings(SyncScheduleSettings):
    """How many calls to Google there may be; all of it has defaults, so whoever watches the sync needs no secrets."""

    sync_parallelism: int = Field(
        default=8, ge=1, le=64, description="Calls to Google one run has under way at a time."
    )
    sync_calls_per_minute: int = Field(
        default=10_000, ge=1, description="Google's quota of the project: Calendar API requests a minute."
    )
    sync_calls_per_minute_and_user: int = Field(
        default=600, ge=1, description="Google's quota of one user of the project: requests a minute."
    )
    sync_calls_per_day: int = Field(
        default=1_000_000, ge=1, description="Requests a day (Pacific time); then the sync pauses until midnight."
    )


class SyncSettings(SyncLimitSettings):
    """Google Calendar to Postgres."""

    google_client_id: str = Field(min_length=1, description="OAuth client the tenants granted access to.")
    google_client_secret: SecretStr = Field(description="Its secret.")
    grant_encryption_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        description="Fernet keys of the refresh tokens at rest, comma separated, newest first."
    )
    google_api_endpoint: str = Field(
        default="https://www.googleapis.com", description="Root of the Calendar API; other only in the devstack."
    )
    google_token_url: str = Field(
        default="https://oauth2.googleapis.com/token", description="OAuth token endpoint; other only in the devstack."
    )
    sync_tenant_parallelism: int = Field(
        default=4, ge=1, le=64, description="Workspaces of one tenant worked on at a time, in all runs together."
    )
    sync_calendar_list_interval_seconds: float = Field(
        default=3600.0, ge=0, description="How often a connection's full list of calendars is read."
    )
    sync_safety_poll_seconds: float = Field(
        default=86400.0, gt=0, description="A calendar with push is polled all the same after this long without a sync."
    )

    @field_validator("grant_encryption_keys", mode="before")
    @classmethod
    def _split_keys(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(key.strip() for key in value.split(",") if key.strip())
        return value

    @field_validator("grant_encryption_keys")
    @classmethod
    def _are_fernet_keys(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if not value:
            raise ValueError("needs at least one key; make one with: python -m sync_pipeline.grants new-key")
        for position, key in enumerate(value, start=1):
            try:
                Fernet(key.get_secret_value())
            except ValueError:
                raise ValueError(
                    f"key {position} is not a Fernet key (32 url-safe base64 bytes); "
                    "make one with: python -m sync_pipeline.grants new-key"
                ) from None
        return value

    @field_validator("google_api_endpoint", "google_token_url")
    @classmethod
    def _is_http(cls, value: str) -> str:
        if not _keeps_private(value):
            raise ValueError("must be https (plain http only on this machine)")
        return value.rstrip("/")


class WebhookSettings(BaseSettings):
    """Where the receiver of Google's notifications listens."""

    model_config = SettingsConfigDict(frozen=True)

    sync_webhook_host: str = Field(
        default="127.0.0.1", description="Address the receiver binds; a proxy with TLS stands in front of it."
    )
    sync_webhook_port: int = Field(default=8788, ge=0, le=65535, description="Port the receiver binds; 0 picks one.")


class ArchiveSourceSettings(BaseSettings):
    """Which table is archived, and which months there are; all of it has defaults, so definitions load without any."""

    model_config = SettingsConfigDict(frozen=True)

    archive_table: str = Field(default="public.audit_logs", description="schema.table that is archived.")
    archive_time_zone: str = Field(default="UTC", description="Zone whose calendar months are archived.")
    archive_first_month: str = Field(default="2024-01", description="First month that exists, YYYY-MM.")
    archive_grace_seconds: float = Field(
        default=3600.0,
        ge=0,
        le=14 * 86400,
        description="A month is closed this long after its end, by the database's clock; two weeks at most.",
    )
    archive_partition_schema: str = Field(
        default="audit_partitions", pattern=r"^[a-z_][a-z0-9_]*$", description="Private schema of the partitions."
    )
    archive_premade_months: int = Field(
        default=3, ge=1, le=24, description="Empty monthly partitions kept ready beyond the present month."
    )
    archive_prune: Literal["off", "propose", "auto"] = Field(
        default="off",
        description="Dropping archived months from Postgres: never, after somebody approved it, or by itself.",
    )
    archive_retention_months: int = Field(
        default=13, ge=1, le=1200, description="Closed months that stay in Postgres when older ones are pruned."
    )

    @field_validator("archive_table")
    @classmethod
    def _is_table(cls, value: str) -> str:
        if not TABLE.fullmatch(value):
            raise ValueError("must be schema.table, for example public.audit_logs")
        return value

    @field_validator("archive_first_month")
    @classmethod
    def _is_month(cls, value: str) -> str:
        if not MONTH.fullmatch(value):
            raise ValueError("must be a month as YYYY-MM, for example 2024-01")
        return value

    @field_validator("archive_time_zone")
    @classmethod
    def _is_zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError):
            raise ValueError("must be an IANA time zone, for example UTC or Asia/Tokyo") from None
        return value


class ArchiveSettings(ArchiveSourceSettings):
    """Audit logs to Parquet on S3."""

    archive_bucket: str = Field(min_length=3, description="S3 bucket of the archive.")
    archive_prefix: str = Field(
        default="audit_logs", pattern=r"^[A-Za-z0-9_.\-]+(/[A-Za-z0-9_.\-]+)*$", description="Key prefix of the data."
    )
    aws_region: str = Field(default="us-east-1", description="Region of the bucket.")
    aws_endpoint_url_s3: str | None = Field(default=None, description="Other S3 server; only in the devstack.")
    archive_parallelism: int = Field(
        default=2, ge=1, le=16, description="Connections that read one month at a time, and threads that encode it."
    )
    archive_sse_kms_key: str | None = Field(
        default=None, description="KMS key that encrypts every object; the bucket must use it by default too."
    )
    archive_object_lock: Literal["off", "governance", "compliance"] = Field(
        default="off", description="Object Lock of every part and manifest; the bucket must have it enabled."
    )
    archive_object_lock_days: int = Field(
        default=365, ge=1, le=36500, description="How long an object is locked, when ARCHIVE_OBJECT_LOCK is on."
    )
    archive_signing_key: SecretStr | None = Field(
        default=None, description="RSA private key (PEM) that signs the chain; python -m archive_pipeline.audit new-key"
    )
    archive_signing_kms_key: str | None = Field(
        default=None,
        description="KMS key (RSA_2048 or larger, SIGN_VERIFY) that signs the chain in place of a local key.",
    )
    archive_athena_workgroup: str | None = Field(
        default=None, description="Athena workgroup; set: the table is kept in Glue, and queries may run in Athena."
    )
    archive_athena_database: str = Field(
        default="audit", pattern=r"^[a-z0-9_]+$", description="Glue database of the archive's table."
    )
    archive_athena_output: str | None = Field(
        default=None, pattern=r"^s3://.+", description="Where Athena puts results, s3://bucket/prefix/."
    )
    archive_athena_cutoff_bytes: int = Field(
        default=100_000_000_000, ge=10_000_000, description="Bytes one Athena query may scan before it is cancelled."
    )

    @model_validator(mode="after")
    def _one_signing_key(self) -> Self:
        if self.archive_signing_key and self.archive_signing_kms_key:
            raise ValueError("set either ARCHIVE_SIGNING_KEY or ARCHIVE_SIGNING_KMS_KEY, not both")
        if self.archive_athena_workgroup and not self.archive_athena_output:
            raise ValueError(
                "ARCHIVE_ATHENA_OUTPUT is not set (where Athena puts results), but ARCHIVE_ATHENA_WORKGROUP is"
            )
        return self


def load(model: type[S]) -> S:
    """Read one group of settings from the environment.

    Args:
        model: the settings class.

    Returns:
        The checked, frozen settings.

    Raises:
        UserError: one sentence that names each missing or wrong variable, never its value.
    """
    try:
        return model()
    except ValidationError as error:
        problems = []
        for problem in error.errors(include_input=False, include_url=False):
            if not problem["loc"]:  # a rule over several settings names them itself
                problems.append(problem["msg"].removeprefix("Value error, "))
                continue
            name = str(problem["loc"][0]).upper()
            if problem["type"] == "missing":
                described = model.model_fields[name.lower()].description
                problems.append(f"{name} is not set ({described})")
            else:
                problems.append(f"{name} {problem['msg'].removeprefix('Value error, ')}")
        raise UserError("; ".join(problems)) from None
