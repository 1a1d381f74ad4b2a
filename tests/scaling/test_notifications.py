"""Alerts: what is worth one, once, by every channel, whatever the receivers and the process do meanwhile."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import psycopg
import pytest

from devstack.servers import Database
from scaling import episodes, notifications, notifier, samples
from scaling.capabilities import Mode
from scaling.catalogue import Catalogue
from scaling.databases import DatabaseRouter, Shard
from scaling.definitions import build_defs
from scaling.episodes import Watch
from scaling.errors import UserError
from scaling.notifier import Channel, Happened, Message, Sender, senders
from scaling.resources import ScalingResource
from scaling.samples import Sample
from scaling.settings import AlertSettings, AutomationSettings, load
from tests.scaling import receivers, seeded
from tests.scaling.receivers import Mailbox, Receiver

NOW = datetime.now(UTC)
MARK = "c4n4ry"
PASSWORD = f"{MARK}-password"

pytestmark = pytest.mark.usefixtures("definitions_load_alone")


@pytest.fixture
def webhook() -> Iterator[Receiver]:
    with receivers.web() as received:
        yield received


@pytest.fixture
def slack() -> Iterator[Receiver]:
    with receivers.web() as received:
        yield received


@pytest.fixture
def shard(database: Database) -> Iterator[Shard]:
    with DatabaseRouter(Shard("main", database.dsn)) as router:
        yield router.shards()[0]


@pytest.fixture
def alerting(
    database: Database, settings_environment: Callable[..., None], webhook: Receiver
) -> Callable[..., dict[Channel, Sender]]:
    def channels(**others: str) -> dict[Channel, Sender]:
        settings_environment(database, ALERT_WEBHOOK_URL=webhook.url, **others)
        return senders(load(AlertSettings), load(AutomationSettings))

    return channels


def execute(database: Database, statement: str, *arguments: object) -> list[tuple[Any, ...]]:
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        cursor = connection.execute(statement.encode(), arguments)
        return cursor.fetchall() if cursor.description else []


def episode(database: Database, state: str, rule: str = "google_tenants", number: int = 1, **columns: object) -> int:
    values = {"capability": "parallel_sync", "fired_at": NOW - timedelta(hours=1), **columns}
    ((made,),) = execute(
        database,
        f"INSERT INTO scaling.episodes (rule, episode_no, rule_version, state, value, threshold, {', '.join(values)})"
        f" VALUES (%s, %s, 'v', %s, 31, 30, {', '.join(['%s'] * len(values))}) RETURNING id",
        rule,
        number,
        state,
        *[json.dumps(each) if isinstance(each, dict) else each for each in values.values()],
    )
    return int(made)


def change(database: Database, number: int, **columns: object) -> None:
    sets = ", ".join(f"{name} = %s" for name in columns)
    values = [json.dumps(each) if isinstance(each, dict) else each for each in columns.values()]
    execute(database, f"UPDATE scaling.episodes SET {sets} WHERE id = %s", *values, number)


def look(shard: Shard, channels: dict[Channel, Sender], known: Catalogue | None = None) -> notifications.Sent:
    return notifications.look(shard, known or seeded.known(), channels, datetime.now(UTC))


def told(webhook: Receiver) -> list[str]:
    return [body["happened"] for body in webhook.bodies]


def due_now(database: Database) -> None:
    execute(database, "UPDATE scaling.notifications SET next_at = now()")


# -- what is told ---------------------------------------------------------------------------------------------------


def test_a_proposal_is_told_once_with_owner_runbook_recommendation_and_how_to_approve_it(
    database: Database, shard: Shard, alerting: Callable[..., dict[Channel, Sender]], webhook: Receiver
) -> None:
    number = episode(database, "proposed")
    channels = alerting()
    assert [look(shard, channels).sent for _ in range(3)] == [1, 0, 0]
    (body,) = webhook.bodies
    assert body["happened"] == "proposed"
    assert body["episode"] == number
    assert body["approve"] == f"python -m scaling approve {number} --by NAME"
    assert body["owner"] == "platform"
    assert body["runbook"] == "docs/operations.md#google_tenants"
    assert "parallel_sync" in body["recommendation"]["What to do"]
    assert set(body["recommendation"]) == {"What to do", "What it changes", "What it costs"}
    assert "31" in body["text"]
    assert webhook.headers[0]["Idempotency-Key"] == body["key"]


def test_the_life_of_an_episode_is_told_step_by_step(
    database: Database, shard: Shard, alerting: Callable[..., dict[Channel, Sender]], webhook: Receiver
) -> None:
    channels = alerting()
    number = episode(database, "proposed")
    look(shard, channels)
    change(database, number, state="approved", approved_by="Ada", approved_at=NOW)
    look(shard, channels)
    change(database, number, state="needs_human", attempts=3, error="the table is locked")
    look(shard, channels)
    change(database, number, state="acted", acted_at=NOW, error=None)
    look(shard, channels)
    assert told(webhook) == ["proposed", "needs_human"]
    change(database, number, effect={"sentence": "A tick takes 9 s, before 80 s."})
    look(shard, channels)
    change(database, number, recovered_at=NOW)
    look(shard, channels)
    look(shard, channels)
    assert told(webhook) == ["proposed", "needs_human", "acted", "recovered"]
    assert "the table is locked" in webhook.bodies[1]["text"]
    assert webhook.bodies[2]["text"] == "A tick takes 9 s, before 80 s."
    assert "Ada" not in json.dumps(webhook.bodies)


def test_what_only_tells_a_person_fires_and_recovers(
    database: Database, shard: Shard, alerting: Callable[..., dict[Channel, Sender]], webhook: Receiver
) -> None:
    number = episode(database, "observed", "users_total", capability=None)
    channels = alerting()
    look(shard, channels)
    change(database, number, recovered_at=NOW)
    look(shard, channels)
    assert told(webhook) == ["fired", "recovered"]
    assert webhook.bodies[0]["approve"] == ""


def test_the_next_episode_of_a_rule_is_told_anew(
    database: Database, shard: Shard, alerting: Callable[..., dict[Channel, Sender]], webhook: Receiver
) -> None:
    channels = alerting()
    change(database, episode(database, "observed"), recovered_at=NOW)
    look(shard, channels)
    assert told(webhook) == []  # it began and ended before anybody was told
    episode(database, "observed", number=2)
    look(shard, channels)
    assert told(webhook) == ["fired"]


def test_what_somebody_has_acknowledged_is_not_repeated_but_its_end_is_told(
    database: Database, shard: Shard, alerting: Callable[..., dict[Channel, Sender]], webhook: Receiver
) -> None:
    channels = alerting()
    known = episode(database, "observed", acknowledged_by="Ada", acknowledged_at=NOW)
    look(shard, channels)
    assert told(webhook) == []
    webhook.answers = [500]
    other = episode(database, "proposed", number=2)
    look(shard, channels)
    change(database, other, acknowledged_by="Ada", acknowledged_at=NOW)
    due_now(database)
    look(shard, channels)
    assert told(webhook) == ["proposed"]  # the refused attempt, and none after
    assert execute(database, "SELECT error FROM scaling.notifications WHERE dropped_at IS NOT NULL") == [
        ("somebody has acknowledged it",)
    ]
    change(database, other, recovered_at=NOW)
    change(database, known, state="needs_human", attempts=3, error="it failed")
    look(shard, channels)
    assert sorted(told(webhook)[1:]) == ["needs_human", "recovered"]


def test_a_gap_in_the_data_is_told_once_and_the_next_one_again(
    database: Database, shard: Shard, alerting: Callable[..., dict[Channel, Sender]], webhook: Receiver
) -> None:
    channels = alerting()
    rule = seeded.known().named("users_total").rule
    assert rule is not None

    def judge(at: datetime, *values: datetime) -> None:
        with psycopg.connect(database.dsn) as connection:
            samples.record(connection, [Sample("users_total", each, 1.0) for each in values])
            episodes.evaluate(connection, [Watch(rule, None, Mode.OBSERVE)], at)

    judge(NOW - timedelta(days=40), NOW - timedelta(days=40))
    look(shard, channels)
    judge(NOW - timedelta(days=30))
    look(shard, channels)
    look(shard, channels)
    assert told(webhook) == ["data_missing"]
    assert "explain users_total" in webhook.bodies[0]["text"]
    judge(NOW - timedelta(days=20), NOW - timedelta(days=20))
    look(shard, channels)
    judge(NOW)
    look(shard, channels)
    assert told(webhook) == ["data_missing", "data_missing"]


def test_a_rule_that_left_the_catalogue_is_told_all_the_same(
    database: Database, shard: Shard, alerting: Callable[..., dict[Channel, Sender]], webhook: Receiver
) -> None:
    episode(database, "needs_human", "gone_from_the_catalogue", attempts=3, error="it failed")
    look(shard, alerting())
    assert webhook.bodies[0]["title"].startswith("gone_from_the_catalogue: episode")


def test_without_a_channel_nothing_is_written_and_a_channel_added_later_is_told_what_is_open(
    database: Database,
    shard: Shard,
    settings_environment: Callable[..., None],
    alerting: Callable[..., dict[Channel, Sender]],
    webhook: Receiver,
    slack: Receiver,
) -> None:
    settings_environment(database)
    episode(database, "proposed")
    assert look(shard, senders(load(AlertSettings), load(AutomationSettings))).written == 0
    look(shard, alerting())
    look(shard, alerting(ALERT_SLACK_URL=slack.url))
    assert told(webhook) == ["proposed"]
    assert len(slack.bodies) == 1


# -- how it leaves --------------------------------------------------------------------------------------------------


def test_slack_gets_text_that_is_no_markup(
    database: Database, shard: Shard, alerting: Callable[..., dict[Channel, Sender]], slack: Receiver
) -> None:
    hostile = "<!channel> <https://evil.example|click> & more"
    episode(database, "needs_human", attempts=3, error=hostile, dims="shard=<!here>")
    look(shard, alerting(ALERT_SLACK_URL=slack.url))
    (body,) = slack.bodies
    assert "<" not in body["text"]
    assert "&lt;!channel&gt;" in body["text"]
    assert set(body) == {"text"}


def test_a_webhook_gets_its_token(
    database: Database, shard: Shard, alerting: Callable[..., dict[Channel, Sender]], webhook: Receiver
) -> None:
    episode(database, "proposed")
    look(shard, alerting(ALERT_WEBHOOK_TOKEN="shh"))
    assert webhook.headers[0]["Authorization"] == "Bearer shh"


def mail_settings(box: Mailbox, **others: str) -> dict[str, str]:
    return {
        "ALERT_SMTP_HOST": "127.0.0.1",
        "ALERT_SMTP_PORT": str(box.port),
        "ALERT_SMTP_USER": "alerts",
        "ALERT_SMTP_PASSWORD": PASSWORD,
        "ALERT_SMTP_FROM": "alerts@example.com",
        "ALERT_SMTP_TO": "ops@example.com, lead@example.com",
        **others,
    }


@pytest.fixture
def mailing(
    database: Database, settings_environment: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[Channel, Sender]]:
    def channels(box: Mailbox, *, trusted: bool = True, **others: str) -> dict[Channel, Sender]:
        settings_environment(database, **mail_settings(box, **others))
        monkeypatch.delenv("SSL_CERT_FILE", raising=False)
        if trusted:
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
        return senders(load(AlertSettings), load(AutomationSettings))

    return channels


@pytest.mark.parametrize("tls", ["starttls", "implicit"])
def test_mail_is_sent_under_tls_with_a_login_and_the_key_as_its_id(
    tls: str, database: Database, shard: Shard, mailing: Callable[..., dict[Channel, Sender]], tmp_path: Path
) -> None:
    number = episode(database, "proposed")
    with receivers.mail(tmp_path, implicit=tls == "implicit") as box:
        assert look(shard, mailing(box, ALERT_SMTP_TLS=tls)).failed == {}
    (mail,) = box.mails
    assert box.logins == [b"alerts"]
    assert mail["To"] == "ops@example.com, lead@example.com"
    ((key,),) = execute(database, "SELECT key FROM scaling.notifications")
    assert str(key) in mail["Message-ID"]
    assert f"python -m scaling approve {number}" in mail.get_content()


def test_no_mail_leaves_without_tls_or_to_a_server_nobody_vouches_for(
    database: Database, shard: Shard, mailing: Callable[..., dict[Channel, Sender]], tmp_path: Path
) -> None:
    episode(database, "proposed")
    with receivers.mail(tmp_path, tls=False) as box:
        assert "SMTPNotSupportedError" in look(shard, mailing(box)).failed[Channel.EMAIL]
    assert (box.mails, box.logins) == ([], [])
    due_now(database)
    with receivers.mail(tmp_path) as box:
        assert "SSLCertVerificationError" in look(shard, mailing(box, trusted=False)).failed[Channel.EMAIL]
    assert (box.mails, box.logins) == ([], [])


def test_one_unknown_recipient_costs_the_others_nothing_and_no_second_mail(
    database: Database, shard: Shard, mailing: Callable[..., dict[Channel, Sender]], tmp_path: Path
) -> None:
    episode(database, "proposed")
    with receivers.mail(tmp_path) as box:
        box.refused = {"lead@example.com"}
        channels = mailing(box)
        assert look(shard, channels).failed == {}
        due_now(database)
        assert look(shard, channels).sent == 0
        assert len(box.mails) == 1
        box.refused |= {"ops@example.com"}
        episode(database, "proposed", number=2)
        assert "SMTPRecipientsRefused" in look(shard, channels).failed[Channel.EMAIL]


def test_a_title_with_a_line_break_adds_no_header(
    database: Database, shard: Shard, mailing: Callable[..., dict[Channel, Sender]], tmp_path: Path
) -> None:
    episode(database, "observed", "a rule\nBcc: evil@example.com")
    with receivers.mail(tmp_path) as box:
        assert look(shard, mailing(box)).sent == 1
    assert box.mails[0]["Bcc"] is None
    assert "Bcc: evil" in box.mails[0]["Subject"]


# -- what goes wrong ------------------------------------------------------------------------------------------------


def test_an_error_and_then_a_success_is_one_message_with_one_key(
    database: Database, shard: Shard, alerting: Callable[..., dict[Channel, Sender]], webhook: Receiver
) -> None:
    webhook.answers = [500, 200]
    episode(database, "proposed")
    channels = alerting()
    first = look(shard, channels)
    assert (first.sent, first.failed) == (0, {Channel.WEBHOOK: "it answered 500"})
    assert look(shard, channels).sent == 0  # not before its time
    due_now(database)
    assert look(shard, channels).sent == 1
    assert len({body["key"] for body in webhook.bodies}) == 1
    assert execute(database, "SELECT attempts, sent_at IS NOT NULL, error FROM scaling.notifications") == [
        (2, True, None)
    ]


def test_attempts_lie_further_and_further_apart_up_to_an_hour(
    database: Database, shard: Shard, alerting: Callable[..., dict[Channel, Sender]], webhook: Receiver
) -> None:
    channels = alerting()
    episode(database, "proposed")
    waits = []
    for _ in range(9):
        webhook.answers = [503]
        look(shard, channels)
        ((wait,),) = execute(
            database, "SELECT extract(epoch FROM next_at - clock_timestamp())::float8 FROM scaling.notifications"
        )
        waits.append(round(wait / 60))
        due_now(database)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_who_is_asked_to_wait_waits(
    database: Database, shard: Shard, alerting: Callable[..., dict[Channel, Sender]], webhook: Receiver
) -> None:
    webhook.answers, webhook.headers_sent = [429], {"Retry-After": "1800"}
    episode(database, "proposed")
    look(shard, alerting())
    ((wait,),) = execute(database, "SELECT extract(epoch FROM next_at - now())::int FROM scaling.notifications")
    assert 1700 < wait <= 1800


def test_a_receiver_that_is_down_or_slow_holds_nobody_else_up(
    database: Database,
    shard: Shard,
    alerting: Callable[..., dict[Channel, Sender]],
    webhook: Receiver,
    slack: Receiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(notifier, "TIMEOUT_SECONDS", 0.3)
    for number in range(1, 6):
        episode(database, "proposed", number=number)
    slack.delay = 1.0
    began = time.monotonic()
    done = look(shard, alerting(ALERT_SLACK_URL=slack.url))
    assert time.monotonic() - began < 3
    assert done.failed == {Channel.SLACK: "no answer in 0.3 s"}
    assert len(webhook.bodies) == 5
    assert len(slack.bodies) == 1
    due_now(database)
    done = look(shard, alerting(ALERT_SLACK_URL="http://127.0.0.1:1/c4n4ry"))
    assert done.failed == {Channel.SLACK: "it did not take it (ConnectError)"}


def test_what_nobody_takes_for_three_days_is_dropped_and_shown(
    database: Database, shard: Shard, alerting: Callable[..., dict[Channel, Sender]], webhook: Receiver
) -> None:
    webhook.answers = [500] * 9
    episode(database, "proposed")
    channels = alerting()
    look(shard, channels)
    execute(database, "UPDATE scaling.notifications SET written_at = now() - interval '2 hours', next_at = now()")
    with shard.transaction() as connection:
        assert notifications.waiting(connection) == notifications.Waiting(late=1, dropped=0)
    execute(database, "UPDATE scaling.notifications SET written_at = now() - interval '73 hours'")
    look(shard, channels)
    with shard.transaction() as connection:
        assert notifications.waiting(connection) == notifications.Waiting(late=0, dropped=1)
    assert len(webhook.bodies) == 1


LOOK = """
import sys
from datetime import UTC, datetime
from scaling import notifications
from scaling.databases import DatabaseRouter, Shard
from scaling.notifier import senders
from scaling.settings import AlertSettings, AutomationSettings, load
from tests.scaling import seeded
with DatabaseRouter(Shard("main", sys.argv[1])) as router:
    channels = senders(load(AlertSettings), load(AutomationSettings))
    if sys.argv[2] == "write":
        notifications.deliver = lambda *_: sys.exit(9)
    notifications.look(router.shards()[0], seeded.known(), channels, datetime.now(UTC))
"""


def look_elsewhere(database: Database, what: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", LOOK, database.dsn, what], env=dict(os.environ))


def test_what_a_killed_process_has_written_the_next_one_sends(
    database: Database, shard: Shard, alerting: Callable[..., dict[Channel, Sender]], webhook: Receiver
) -> None:
    channels = alerting()
    episode(database, "proposed")
    assert look_elsewhere(database, "write").wait(60) == 9
    assert webhook.bodies == []
    assert look(shard, channels).sent == 1


def test_a_process_killed_while_it_sends_leads_to_a_second_message_with_the_same_key(
    database: Database, shard: Shard, alerting: Callable[..., dict[Channel, Sender]], webhook: Receiver
) -> None:
    channels = alerting()
    episode(database, "proposed")
    dying: list[subprocess.Popen[bytes]] = []
    webhook.before = lambda: dying[0].send_signal(signal.SIGKILL) if dying and dying[0].poll() is None else None
    dying.append(look_elsewhere(database, "send"))
    assert dying[0].wait(60) == -signal.SIGKILL
    assert execute(database, "SELECT sent_at FROM scaling.notifications") == [(None,)]
    assert look(shard, channels).sent == 0  # perhaps it is still being sent
    due_now(database)
    assert look(shard, channels).sent == 1
    assert [body["key"] for body in webhook.bodies] == [webhook.bodies[0]["key"]] * 2


def test_two_that_look_at_once_send_each_message_once(
    database: Database, alerting: Callable[..., dict[Channel, Sender]], webhook: Receiver
) -> None:
    alerting()
    for number in range(1, 21):
        episode(database, "proposed", number=number)
    assert [each.wait(60) for each in [look_elsewhere(database, "send") for _ in range(3)]] == [0, 0, 0]
    assert len(webhook.bodies) == len({body["key"] for body in webhook.bodies}) == 20


def test_no_error_tells_an_address_a_password_or_what_a_receiver_said(
    database: Database,
    shard: Shard,
    alerting: Callable[..., dict[Channel, Sender]],
    mailing: Callable[..., dict[Channel, Sender]],
    webhook: Receiver,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG")
    episode(database, "proposed")
    webhook.answers = [404]
    channels = alerting(ALERT_WEBHOOK_TOKEN=f"{MARK}-token", ALERT_SLACK_URL=f"http://127.0.0.1:1/{MARK}")
    told_of = [look(shard, channels).sentence]
    with receivers.mail(tmp_path) as box:
        box.answer = f"554 {MARK} refused"
        told_of += [look(shard, mailing(box)).sentence]
        due_now(database)
        wrong = mailing(box, ALERT_SMTP_PASSWORD=f"{MARK}-wrong")
        told_of += [look(shard, wrong).sentence]
    assert "SMTPAuthenticationError, 535" in told_of[2]
    stored = execute(database, "SELECT error, message::text FROM scaling.notifications")
    everything = [*told_of, str(stored), repr(channels), repr(wrong)]
    everything += [each.getMessage() for each in caplog.records if not each.name.startswith("mail.")]
    assert not [text for text in everything if MARK in text]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"ALERT_SLACK_URL": "http://hooks.example.com/hush"}, "ALERT_SLACK_URL must be https"),
        ({"ALERT_SMTP_HOST": "mail.example.com"}, "ALERT_SMTP_FROM and ALERT_SMTP_TO must be set"),
        ({"ALERT_SMTP_TO": "hush\nBcc: a@b"}, "ALERT_SMTP_TO must be plain e-mail addresses"),
        ({"ALERT_SMTP_USER": "hush"}, "set both ALERT_SMTP_USER and ALERT_SMTP_PASSWORD"),
        ({"ALERT_SMTP_TLS": "hush"}, "ALERT_SMTP_TLS"),
    ],
)
def test_a_wrong_setting_is_named_and_not_shown(
    settings_environment: Callable[..., None], values: dict[str, str], sentence: str
) -> None:
    settings_environment(**values)
    with pytest.raises(UserError) as raised:
        load(AlertSettings)
    assert sentence in str(raised.value)
    assert "hush" not in str(raised.value)


# -- in Dagster -----------------------------------------------------------------------------------------------------


def test_the_sensor_tells_and_says_how_it_went(
    database: Database, alerting: Callable[..., dict[Channel, Sender]], webhook: Receiver
) -> None:
    alerting()
    episode(database, "proposed")
    webhook.answers = [500]
    sensor = build_defs().get_sensor_def("scaling_notifications_sensor")
    with dg.DagsterInstance.ephemeral() as instance:

        def evaluate() -> str:
            with dg.build_sensor_context(instance=instance, resources={"scaling": ScalingResource()}) as context:
                return str(sensor.evaluate_tick(context).skip_message)

        assert evaluate() == "1 new, 0 sent; webhook is tried again: it answered 500."
        due_now(database)
        assert evaluate() == "0 new, 1 sent."


def test_the_sensor_says_that_no_channel_is_configured(
    database: Database, settings_environment: Callable[..., None]
) -> None:
    settings_environment(database)
    sensor = build_defs().get_sensor_def("scaling_notifications_sensor")
    with dg.build_sensor_context(resources={"scaling": ScalingResource()}) as context:
        assert "ALERT_SLACK_URL" in str(sensor.evaluate_tick(context).skip_message)


def failing_run(instance: dg.DagsterInstance, sentence: str) -> dg.ExecuteInProcessResult:
    @dg.op
    def fails() -> None:
        raise dg.Failure(sentence)

    @dg.job
    def some_job() -> None:
        fails()

    return some_job.execute_in_process(instance=instance, raise_on_error=False)


def alert(instance: dg.DagsterInstance, name: str, failed: dg.ExecuteInProcessResult, defs: dg.Definitions) -> object:
    sensor = defs.get_sensor_def(name)
    (failure,) = [event for event in failed.all_events if event.is_run_failure]
    return sensor(
        dg.build_run_status_sensor_context(
            sensor_name=sensor.name, dagster_event=failure, dagster_instance=instance, dagster_run=failed.dagster_run
        ).for_run_failure()
    )


def test_a_failed_run_of_every_code_location_is_told_once_an_hour_per_sentence(
    database: Database, alerting: Callable[..., dict[Channel, Sender]], webhook: Receiver, slack: Receiver
) -> None:
    from archive_pipeline import definitions as of_archive
    from sync_pipeline import definitions as of_sync

    alerting(ARCHIVE_ALERT_URL=slack.url)
    with dg.DagsterInstance.ephemeral() as instance:
        failed = failing_run(instance, "the disk is full")
        for name, defs in (
            ("scaling_failure_sensor", build_defs()),
            ("calendar_sync_failure_sensor", of_sync.build_defs()),
            ("audit_log_failure_sensor", of_archive.build_defs()),
        ):
            assert alert(instance, name, failed, defs) is None
            alert(instance, name, failing_run(instance, "the disk is full"), defs)
        alert(instance, "scaling_failure_sensor", failing_run(instance, "another one"), build_defs())
    assert [(body["facts"]["location"], body["text"]) for body in webhook.bodies] == [
        ("scaling", "the disk is full"),
        ("sync_pipeline", "the disk is full"),
        ("archive_pipeline", "the disk is full"),
        ("scaling", "another one"),
    ]
    assert len(slack.bodies) == 1  # ARCHIVE_ALERT_URL hears of the archive only
    assert "docs/operations.md#a-month-failed" in slack.bodies[0]["text"]


def test_a_failed_run_that_no_receiver_took_is_sent_by_the_next_look(
    database: Database, shard: Shard, alerting: Callable[..., dict[Channel, Sender]], webhook: Receiver
) -> None:
    channels = alerting()
    webhook.answers = [503]
    with dg.DagsterInstance.ephemeral() as instance:
        said = alert(instance, "scaling_failure_sensor", failing_run(instance, "it failed"), build_defs())
    assert "tried again" in str(said)
    due_now(database)
    assert look(shard, channels).sent == 1


def test_a_failed_run_is_told_even_when_the_database_is_what_failed(
    settings_environment: Callable[..., None], webhook: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scaling.databases.CONNECT_TIMEOUT_SECONDS", 0.2)
    settings_environment(DATABASE_URL="postgresql://nobody@127.0.0.1:1/none", ALERT_WEBHOOK_URL=webhook.url)
    with dg.DagsterInstance.ephemeral() as instance:
        failed = failing_run(instance, "the database does not answer")
        assert alert(instance, "scaling_failure_sensor", failed, build_defs()) is None
        webhook.answers = [500]
        with pytest.raises(dg.Failure, match="an alert was not taken"):
            alert(instance, "scaling_failure_sensor", failed, build_defs())
    assert webhook.bodies[0]["text"] == "the database does not answer"


def test_a_failed_run_without_a_channel_is_in_the_log(
    database: Database, settings_environment: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    settings_environment(database)
    with dg.DagsterInstance.ephemeral() as instance:
        said = alert(instance, "scaling_failure_sensor", failing_run(instance, "the disk is full"), build_defs())
    assert "no channel is configured" in str(said)
    assert "the disk is full" in caplog.text


def test_a_message_is_read_back_as_it_was_written() -> None:
    message = Message(Happened.ACTED, "s", "t", "x", "o", "r", {"a": "b"}, "c", {"v": 1.5}, 3)
    assert Message.from_json(json.loads(json.dumps(message.to_json()))) == message
    assert dataclasses.is_dataclass(message)


def test_a_run_of_the_sync_may_write_what_it_has_to_tell(
    database: Database, login: Callable[..., str], alerting: Callable[..., dict[Channel, Sender]], webhook: Receiver
) -> None:
    channels = alerting()
    message = Message(Happened.RUN_FAILED, "s", "t", "x", "o", "r")
    with DatabaseRouter(Shard("main", login("pipeline_worker"))) as router:
        shard = router.shards()[0]
        with shard.transaction() as connection:
            assert notifications.note(connection, message, channels) == 1
            assert notifications.note(connection, message, channels) == 0
        assert notifications.deliver(shard, channels) == (1, {})
    assert told(webhook) == ["run_failed"]
