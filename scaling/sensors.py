"""Sensors: what thresholds and failed runs have to tell reaches people.

Belongs here: when the outbox is looked at, what is said of a failed run of any code location. Does not: what is worth
telling (`scaling.notifications`), the channels (`scaling.notifier`).
https://docs.dagster.io/guides/automate/run-status-sensors
"""

import logging
from collections.abc import Sequence, Set
from datetime import UTC, datetime

import dagster as dg

from scaling import notifications
from scaling.dagster_tracing import end_killed
from scaling.errors import UserError
from scaling.logs import Event, event
from scaling.notifier import Channel, Message, Sender, senders
from scaling.overrides import configured
from scaling.resources import ScalingResource, databases, failing_with_a_sentence
from scaling.settings import AlertSettings, AutomationSettings, ScalingSettings, load

logger = logging.getLogger(__name__)

SENTENCE_LENGTH = 2500
UNSET = "no channel is configured: ALERT_SLACK_URL, ALERT_WEBHOOK_URL, ALERT_SMTP_HOST"


def notifications_sensor(automation: AutomationSettings) -> dg.SensorDefinition:
    """Make the sensor that tells people of episodes and gaps, and tries again what a receiver did not take.

    Args:
        automation: whether it is on from the first start, and how often it looks.
    """
    status = dg.DefaultSensorStatus

    @dg.sensor(
        name="scaling_notifications_sensor",
        minimum_interval_seconds=automation.scaling_sensor_seconds,
        default_status=status.RUNNING if automation.pipeline_autostart else status.STOPPED,
        description="Tells people, once, what crossed thresholds lead to, by Slack, webhook or e-mail (ALERT_…): "
        "fired, proposed and how to approve it, needs a human, acted with its effect, recovered, data missing. Tries "
        "again what a receiver did not take. Launches nothing.",
    )
    def sensor(scaling: ScalingResource) -> dg.SkipReason:
        with failing_with_a_sentence():
            channels = senders(load(AlertSettings), load(AutomationSettings))
            with scaling.databases() as router:
                known = configured(load(ScalingSettings))
                done = notifications.look(router.shards()[0], known, channels, datetime.now(UTC))
        for channel, why in done.failed.items():
            logger.warning(
                "an alert by %s is tried again: %s", channel, why, extra=event(Event.ALERT_RETRIED, channel=channel)
            )
        return dg.SkipReason(done.sentence if channels else f"{UNSET}.")

    return sensor


def failure_sensor(
    location: str, automation: AutomationSettings, *, name: str, runbook: str, also: Sequence[Channel] = ()
) -> dg.SensorDefinition:
    """Make the sensor that tells people of the failed runs of a code location.

    Args:
        location: its name.
        automation: whether it is on from the first start.
        name: of the sensor.
        runbook: where it says what to do.
        also: channels of this location alone.
    """
    status = dg.DefaultSensorStatus

    @dg.run_failure_sensor(
        name=name,
        monitor_all_code_locations=False,
        default_status=status.RUNNING if automation.pipeline_autostart else status.STOPPED,
        description="Tells people the sentence of every failed run by the channels of ALERT_…, the same one of a job "
        "once an hour; without a channel it writes it to the daemon's log.",
    )
    def sensor(context: dg.RunFailureSensorContext) -> dg.SkipReason | None:
        skipped = _alert(failed_run(location, context, runbook), {*notifications.FOR_EPISODES, *also})
        end_killed(location, context)  # last: whatever is wrong with a trace costs no alert
        return skipped

    return sensor


def _alert(message: Message, wanted: Set[Channel]) -> dg.SkipReason | None:
    """Tell people by the channels that are set up; why not, if it could not be."""
    with failing_with_a_sentence():
        alerts, set_up = load(AlertSettings), load(AutomationSettings)
    channels = {each: sender for each, sender in senders(alerts, set_up).items() if each in wanted}
    if not channels:
        logger.error("%s: %s", message.title, message.text, extra=event(Event.ALERT_NOT_SENT, subject=message.subject))
        return dg.SkipReason(f"{UNSET}; the failure is in the daemon's log")
    failed = _tell(message, channels)
    if failed:
        return dg.SkipReason(f"tried again by scaling_notifications_sensor: {', '.join(failed)}")
    return None


def failed_run(location: str, context: dg.RunFailureSensorContext, runbook: str) -> Message:
    """Say what failed: the sentence of the run, which is the only text of it that is sure to hold no secret.

    Args:
        location: its code location.
        context: of the failed run.
        runbook: where it says what to do.
    """
    run = context.dagster_run
    reasons = [
        (data.user_failure_data.description if data.user_failure_data else None) or "see the run's log"
        for data in (event.step_failure_data for event in context.get_step_failure_events())
    ]
    job = location if run.job_name.startswith("__") else run.job_name
    partition = run.tags.get("dagster/partition") or " to ".join(
        run.tags[tag]
        for tag in ("dagster/asset_partition_range_start", "dagster/asset_partition_range_end")
        if tag in run.tags
    )
    sentence = "\n".join(dict.fromkeys(reasons)) or context.failure_event.message or "see the run's log"
    return notifications.of_failed_run(
        location, job, run.run_id, partition, sentence[:SENTENCE_LENGTH], runbook, datetime.now(UTC)
    )


def _tell(message: Message, channels: dict[Channel, Sender]) -> dict[Channel, str]:
    """Write and send; without the database, which may be why the run failed, send all the same.

    Returns:
        Channel to why it did not take it; it is tried again.
    """
    try:
        with databases("alerts") as router:
            shard = router.shards()[0]
            with shard.transaction() as connection:
                notifications.note(connection, message, channels)
            return notifications.deliver(shard, channels)[1]
    except UserError:
        unsent = {}
        key, at = notifications.key_of(message), datetime.now(UTC)
        for channel, sender in channels.items():
            if (problem := sender.send(message, key, at)) is not None:
                unsent[channel] = problem.sentence
        if unsent:
            logger.error(
                "%s: %s", message.title, message.text, extra=event(Event.ALERT_NOT_SENT, subject=message.subject)
            )
            said = ", ".join(f"{channel}: {why}" for channel, why in unsent.items())
            raise dg.Failure(f"an alert was not taken ({said}); the failure itself: {message.title}") from None
        return {}
