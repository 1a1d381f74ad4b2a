"""Sync at scale: push channels, call buckets, change rates, account fences, a status view."""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

UPGRADE = """
ALTER TABLE sync.connection_state
    ADD COLUMN account_fingerprint bytea,
    ADD COLUMN lease_owner text,
    ADD COLUMN list_notified_at timestamptz,
    ADD COLUMN list_watch_retry_at timestamptz,
    ADD COLUMN failed_visits integer NOT NULL DEFAULT 0;
COMMENT ON COLUMN sync.connection_state.account_fingerprint IS
    'SHA-256 of the Google account last seen; with another one the calendars of the old account are retired.';
COMMENT ON COLUMN sync.connection_state.list_notified_at IS 'When Google last said that the list of calendars changed.';
COMMENT ON COLUMN sync.connection_state.list_watch_retry_at IS
    'Opening a channel for the list failed; not tried again before.';
COMMENT ON COLUMN sync.connection_state.failed_visits IS
    'Visits in a row that Google refused or did not answer; each doubles how long the connection is parked (breaker).';
CREATE INDEX connection_state_owner ON sync.connection_state (lease_owner) WHERE lease_owner IS NOT NULL;

ALTER TABLE sync.calendar_state
    ADD COLUMN notified_at timestamptz,
    ADD COLUMN push_unsupported_at timestamptz,
    ADD COLUMN watch_retry_at timestamptz,
    ADD COLUMN change_count double precision NOT NULL DEFAULT 0,
    ADD COLUMN observed_days double precision NOT NULL DEFAULT 0;
COMMENT ON COLUMN sync.calendar_state.notified_at IS
    'When Google last said that the calendar changed; younger than last_started_at means that a pull is owed.';
COMMENT ON COLUMN sync.calendar_state.push_unsupported_at IS
    'Google sends no notifications for this calendar (holidays, birthdays); it is polled.';
COMMENT ON COLUMN sync.calendar_state.watch_retry_at IS 'Opening a channel failed; not tried again before.';
COMMENT ON COLUMN sync.calendar_state.change_count IS
    'Syncs that found a change, older ones count less; with observed_days the change rate that polling adapts to.';
COMMENT ON COLUMN sync.calendar_state.observed_days IS 'Days these syncs looked at, older ones count less.';
CREATE INDEX calendar_state_owner ON sync.calendar_state (lease_owner) WHERE lease_owner IS NOT NULL;

CREATE VIEW sync.calendar_status WITH (security_invoker = true) AS
SELECT c.tenant_id, c.workspace_id, c.calendar_id,
       c.lease_until IS NOT NULL AND c.lease_until >= now() AS in_progress,
       c.last_started_at, c.last_finished_at, c.last_succeeded_at, c.last_outcome, c.last_error, c.due_at,
       c.consecutive_failures, s.status AS connection_status, s.parked_until, c.breaker_until
FROM sync.calendar_state c
LEFT JOIN sync.connection_state s USING (tenant_id, workspace_id, connection_id)
WHERE c.deleted_at IS NULL;
COMMENT ON VIEW sync.calendar_status IS
    'For people: is it being synced now, when was it last, how did that end, when is it due again.';

CREATE TABLE sync.channels (
    channel_id      uuid PRIMARY KEY,
    tenant_id       uuid NOT NULL,
    workspace_id    uuid NOT NULL,
    connection_id   uuid NOT NULL,
    calendar_id     text,
    token_hash      bytea NOT NULL,
    resource_id     text,
    state           text NOT NULL DEFAULT 'opening' CHECK (state IN ('opening', 'open', 'closing')),
    created_at      timestamptz NOT NULL,
    expires_at      timestamptz NOT NULL,
    messages        bigint NOT NULL DEFAULT 0,
    last_message_at timestamptz
);
COMMENT ON TABLE sync.channels IS
    'Push channels Google was asked for, noted before the request, because no API lists them.';
COMMENT ON COLUMN sync.channels.calendar_id IS 'NULL: the channel is for the connection''s list of calendars.';
COMMENT ON COLUMN sync.channels.token_hash IS 'SHA-256 of the secret every notification has to carry.';
COMMENT ON COLUMN sync.channels.resource_id IS 'Google''s name of what is watched; needed to stop the channel.';
COMMENT ON COLUMN sync.channels.state IS
    'opening: asked for, no answer yet. open: in force. closing: another took its place, it is to be stopped.';
CREATE INDEX channels_of_calendar ON sync.channels (tenant_id, workspace_id, connection_id, calendar_id);
CREATE INDEX channels_expiry ON sync.channels (expires_at);

CREATE TABLE sync.webhook_messages (
    day      date NOT NULL,
    outcome  text NOT NULL,
    messages bigint NOT NULL,
    PRIMARY KEY (day, outcome)
);
COMMENT ON TABLE sync.webhook_messages IS
    'Notifications received per UTC day: accepted, sync, unknown_channel, wrong_token, malformed.';

CREATE TABLE sync.call_buckets (
    scope       text NOT NULL CHECK (scope IN ('project', 'user')),
    key         bytea NOT NULL,
    tokens      double precision NOT NULL,
    refilled_at timestamptz NOT NULL,
    factor      double precision NOT NULL DEFAULT 1 CHECK (factor > 0 AND factor <= 1),
    factor_at   timestamptz,
    PRIMARY KEY (scope, key)
);
COMMENT ON TABLE sync.call_buckets IS
    'Token buckets of Google''s quotas, filled by this server''s clock; below zero the next caller waits.';
COMMENT ON COLUMN sync.call_buckets.key IS 'Of a user: SHA-256 of the Google account. Of the project: empty.';
COMMENT ON COLUMN sync.call_buckets.factor IS
    'Share of the configured rate in force; halved when Google says the whole project calls too often.';

CREATE TABLE sync.call_days (
    day   date PRIMARY KEY,
    calls bigint NOT NULL
);
COMMENT ON TABLE sync.call_days IS 'Calls taken from the daily budget, per day in Pacific time, as Google counts.';

CREATE TABLE sync.freshness (
    day        date NOT NULL,
    le_seconds integer NOT NULL,
    changes    bigint NOT NULL,
    PRIMARY KEY (day, le_seconds)
);
COMMENT ON TABLE sync.freshness IS
    'How old changes were when they became visible here: changes per UTC day, by upper bound of their age in seconds.';

ALTER TABLE sync.runs
    ADD COLUMN calendars_live integer NOT NULL DEFAULT 0,
    ADD COLUMN calendars_watched integer NOT NULL DEFAULT 0,
    ADD COLUMN waited_seconds double precision NOT NULL DEFAULT 0;
COMMENT ON COLUMN sync.runs.calendars_live IS 'Calendars that are synced at all, when the run began.';
COMMENT ON COLUMN sync.runs.calendars_watched IS 'How many of them Google sends notifications for.';
COMMENT ON COLUMN sync.runs.waited_seconds IS 'Time its workers waited for quota, summed up.';

ALTER TABLE sync.channels ENABLE ROW LEVEL SECURITY;
ALTER TABLE sync.webhook_messages ENABLE ROW LEVEL SECURITY;
ALTER TABLE sync.call_buckets ENABLE ROW LEVEL SECURITY;
ALTER TABLE sync.call_days ENABLE ROW LEVEL SECURITY;
ALTER TABLE sync.freshness ENABLE ROW LEVEL SECURITY;
"""

DOWNGRADE = """
ALTER TABLE sync.runs DROP COLUMN calendars_live, DROP COLUMN calendars_watched, DROP COLUMN waited_seconds;
DROP TABLE sync.freshness, sync.call_days, sync.call_buckets, sync.webhook_messages, sync.channels;
DROP VIEW sync.calendar_status;
ALTER TABLE sync.calendar_state
    DROP COLUMN notified_at, DROP COLUMN push_unsupported_at, DROP COLUMN watch_retry_at, DROP COLUMN change_count,
    DROP COLUMN observed_days;
ALTER TABLE sync.connection_state
    DROP COLUMN account_fingerprint, DROP COLUMN lease_owner, DROP COLUMN list_notified_at,
    DROP COLUMN list_watch_retry_at, DROP COLUMN failed_visits;
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute(DOWNGRADE)
