"""How a message leaves: Slack, a JSON webhook, e-mail.

Belongs here: what a message is, its form on each channel, one attempt to send it. Does not: what is worth telling, or
when it is tried again (`scaling.notifications`).

Addresses of channels are secrets, and so is what a receiver answers: an error names the kind of failure and nothing
else. Nobody waits for a receiver longer than `TIMEOUT_SECONDS` per step, and no answer is read beyond its head.
"""

import logging
import smtplib
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from email.message import EmailMessage
from email.utils import format_datetime
from enum import StrEnum
from typing import Any, Protocol, Self
from uuid import UUID

import httpx
from pydantic import SecretStr

from scaling.settings import AlertSettings, AutomationSettings

# They log the address of every request.
logging.getLogger("httpx").setLevel(logging.WARNING)
logging.getLogger("httpcore").setLevel(logging.WARNING)

TIMEOUT_SECONDS = 10.0
TEXT_LENGTH = 3000
"""Slack cuts a block off after so many characters."""
LONGEST_RETRY_AFTER = 3600
MAIL_DOMAIN = "scaling.invalid"
"""Of message ids; no host is named in a mail."""


class Happened(StrEnum):
    """What people are told of."""

    FIRED = "fired"
    PROPOSED = "proposed"
    NEEDS_HUMAN = "needs_human"
    ACTED = "acted"
    RECOVERED = "recovered"
    DATA_MISSING = "data_missing"
    RUN_FAILED = "run_failed"


MARKS = {
    Happened.FIRED: "🔴",
    Happened.PROPOSED: "🟡",
    Happened.NEEDS_HUMAN: "🔴",
    Happened.ACTED: "🟢",
    Happened.RECOVERED: "🟢",
    Happened.DATA_MISSING: "🟡",
    Happened.RUN_FAILED: "🔴",
}


class Channel(StrEnum):
    """Where it goes."""

    SLACK = "slack"
    WEBHOOK = "webhook"
    EMAIL = "email"
    ARCHIVE_ALERT = "archive_alert"
    """ARCHIVE_ALERT_URL: failed runs of the archive, in Slack's form."""


@dataclass(frozen=True, slots=True)
class Message:
    """What people are told. Neither secrets nor people stand in it.

    Attributes:
        happened: what.
        subject: to what; with `happened` and the channel it is told once.
        title: one line.
        text: sentences.
        owner: who looks after it.
        runbook: where it says what to do.
        recommendation: what to do, what that changes and costs, by these names.
        approve: the command that lets the action run; empty: there is nothing to approve.
        facts: figures by name.
        episode: its number.
    """

    happened: Happened
    subject: str
    title: str
    text: str
    owner: str
    runbook: str
    recommendation: Mapping[str, str] = field(default_factory=dict)
    approve: str = ""
    facts: Mapping[str, str | float] = field(default_factory=dict)
    episode: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As `scaling.notifications.message` holds it, and as a webhook gets it."""
        return {**asdict(self), "happened": self.happened.value}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """The message that was stored.

        Args:
            stored: of `to_json`.
        """
        return cls(**{**stored, "happened": Happened(stored["happened"])})

    def lines(self) -> list[str]:
        """All of it, for people, the most important first."""
        return [
            *([self.text] if self.text else []),
            *(f"{name}: {said}" for name, said in self.recommendation.items()),
            *([f"To approve: {self.approve}"] if self.approve else []),
            f"Owner: {self.owner}. Runbook: {self.runbook}",
        ]


@dataclass(frozen=True, slots=True)
class Failed:
    """Why an attempt did not succeed.

    Attributes:
        sentence: without the address and without what the receiver said.
        retry_after: seconds the receiver asked to be left alone for.
    """

    sentence: str
    retry_after: int | None = None


class Sender(Protocol):
    """One configured channel."""

    def send(self, message: Message, key: UUID, at: datetime) -> Failed | None:
        """Try once.

        Args:
            message: to send.
            key: of the notification, the same at every attempt.
            at: when it was written.

        Returns:
            None when the receiver has taken it.
        """


@dataclass(frozen=True, slots=True)
class Slack:
    """An incoming webhook of Slack or Mattermost."""

    url: SecretStr

    def send(self, message: Message, key: UUID, at: datetime) -> Failed | None:  # noqa: ARG002 - Slack knows no keys
        """See `Sender`."""
        title = f"{MARKS[message.happened]} *{_slack(message.title)}*"
        text = "\n".join([title, *map(_slack, message.lines())])[:TEXT_LENGTH]
        return _post(self.url, {"text": text}, {})


@dataclass(frozen=True, slots=True)
class Webhook:
    """Any receiver of JSON."""

    url: SecretStr
    token: SecretStr | None = None

    def send(self, message: Message, key: UUID, at: datetime) -> Failed | None:
        """See `Sender`."""
        headers = {"Idempotency-Key": str(key)}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token.get_secret_value()}"
        return _post(self.url, {"key": str(key), "at": at.isoformat(), **message.to_json()}, headers)


@dataclass(frozen=True, slots=True)
class Email:
    """An SMTP server, never without TLS and its certificate checked."""

    host: str
    port: int
    implicit_tls: bool
    user: str | None
    password: SecretStr | None
    sender: str
    recipients: Sequence[str]

    def send(self, message: Message, key: UUID, at: datetime) -> Failed | None:
        """See `Sender`."""
        try:
            with self._connected() as server:
                if self.user and self.password:
                    server.login(self.user, self.password.get_secret_value())
                refused = server.send_message(self._mail(message, key, at), self.sender, list(self.recipients))
        except smtplib.SMTPResponseException as error:
            return Failed(f"the mail server refused it ({type(error).__name__}, {error.smtp_code})")
        except (smtplib.SMTPException, OSError) as error:
            return Failed(f"the mail server did not take it ({type(error).__name__})")
        except ValueError as error:  # a name that no mail may hold, or a password that is not ASCII
            return Failed(f"the mail could not be written ({type(error).__name__})")
        if refused:
            # Sending it again would give the others a second one.
            return None if len(refused) < len(self.recipients) else Failed("the mail server refused every recipient")
        return None

    def _connected(self) -> smtplib.SMTP:
        checked = ssl.create_default_context()
        if self.implicit_tls:
            return smtplib.SMTP_SSL(self.host, self.port, timeout=TIMEOUT_SECONDS, context=checked)
        server = smtplib.SMTP(self.host, self.port, timeout=TIMEOUT_SECONDS)
        try:
            server.starttls(context=checked)
        except BaseException:
            server.close()
            raise
        return server

    def _mail(self, message: Message, key: UUID, at: datetime) -> EmailMessage:
        mail = EmailMessage()
        mail["Subject"] = " ".join(f"[{message.happened.value.replace('_', ' ')}] {message.title}".split())
        mail["From"] = self.sender
        mail["To"] = ", ".join(self.recipients)
        mail["Date"] = format_datetime(at)
        mail["Message-ID"] = f"<{key}@{MAIL_DOMAIN}>"
        mail["Auto-Submitted"] = "auto-generated"
        mail.set_content("\n\n".join([message.title, *message.lines()]))
        return mail


def senders(settings: AlertSettings, automation: AutomationSettings) -> dict[Channel, Sender]:
    """The channels that are configured.

    Args:
        settings: of the channels.
        automation: ARCHIVE_ALERT_URL.
    """
    found: dict[Channel, Sender] = {}
    if settings.alert_slack_url:
        found[Channel.SLACK] = Slack(settings.alert_slack_url)
    if settings.alert_webhook_url:
        found[Channel.WEBHOOK] = Webhook(settings.alert_webhook_url, settings.alert_webhook_token)
    if settings.alert_smtp_host and settings.alert_smtp_from:
        found[Channel.EMAIL] = Email(
            settings.alert_smtp_host,
            settings.alert_smtp_port,
            settings.alert_smtp_tls == "implicit",
            settings.alert_smtp_user,
            settings.alert_smtp_password,
            settings.alert_smtp_from,
            settings.alert_smtp_to,
        )
    if automation.archive_alert_url:
        found[Channel.ARCHIVE_ALERT] = Slack(automation.archive_alert_url)
    return found


def _post(url: SecretStr, body: Mapping[str, Any], headers: Mapping[str, str]) -> Failed | None:
    try:
        with httpx.stream(
            "POST", url.get_secret_value(), json=body, headers=headers, timeout=TIMEOUT_SECONDS, trust_env=False
        ) as answer:
            if answer.is_success:
                return None
            return Failed(f"it answered {answer.status_code}", _retry_after(answer.headers.get("Retry-After", "")))
    except httpx.TimeoutException:
        return Failed(f"no answer in {TIMEOUT_SECONDS:g} s")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        return Failed(f"it did not take it ({type(error).__name__})")


def _retry_after(said: str) -> int | None:
    return min(int(said), LONGEST_RETRY_AFTER) if said.isascii() and said.isdigit() else None


def _slack(text: str) -> str:
    """Text that is no markup, no link and no mention."""
    # https://docs.slack.dev/messaging/formatting-message-text
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
