"""Google Calendar to Postgres: what is synced, by whom, how far, and the events themselves."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

UPGRADE = """
CREATE TABLE sync.workspace_state (
    tenant_id       uuid NOT NULL,
    workspace_id    uuid NOT NULL,
    last_served_at  timestamptz,
    health          text NOT NULL DEFAULT 'new' CHECK (health IN ('new', 'healthy', 'degraded', 'needs_human')),
    health_since    timestamptz NOT NULL DEFAULT now(),
    health_reason   text,
    reported_health text NOT NULL DEFAULT 'new',
    unreported_upserts bigint NOT NULL DEFAULT 0,
    unreported_deletes bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (tenant_id, workspace_id)
);
COMMENT ON TABLE sync.workspace_state IS
    'One row per workspace that was ever synced: its turn, its health, what Dagster has yet to be told.';
COMMENT ON COLUMN sync.workspace_state.last_served_at IS
    'When a run last took it; the least recently served tenant comes first.';
COMMENT ON COLUMN sync.workspace_state.health_reason IS
    'Kinds of trouble, for example reauth_required; never personal data.';
COMMENT ON COLUMN sync.workspace_state.reported_health IS
    'The health Dagster shows; differs from health until a run has reported it.';

CREATE TABLE sync.connection_state (
    tenant_id           uuid NOT NULL,
    workspace_id        uuid NOT NULL,
    connection_id       uuid NOT NULL,
    status              text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'reauth_required')),
    grant_fingerprint   bytea,
    access_token_encrypted bytea,
    access_token_expires_at timestamptz,
    parked_until        timestamptz,
    lease_epoch         bigint NOT NULL DEFAULT 0,
    lease_until         timestamptz,
    list_due_at         timestamptz NOT NULL DEFAULT 'epoch',
    list_started_at     timestamptz,
    list_finished_at    timestamptz,
    last_error          text,
    consecutive_failures integer NOT NULL DEFAULT 0,
    PRIMARY KEY (tenant_id, workspace_id, connection_id)
);
COMMENT ON TABLE sync.connection_state IS
    'One row per google_connections row: whether its grant works and when its list of calendars is read next.';
COMMENT ON COLUMN sync.connection_state.status IS
    'reauth_required: Google refuses the grant; nothing is called until the SaaS stores another one.';
COMMENT ON COLUMN sync.connection_state.grant_fingerprint IS
    'SHA-256 of the stored grant last used; after a refusal a different one makes the connection active again.';
COMMENT ON COLUMN sync.connection_state.access_token_encrypted IS
    'The access token last got with that grant, so that not every run asks for one.';
COMMENT ON COLUMN sync.connection_state.parked_until IS 'Google asked for fewer calls; nothing is called before.';
COMMENT ON COLUMN sync.connection_state.list_due_at IS 'When calendarList is read in full again.';
CREATE INDEX connection_state_due ON sync.connection_state (list_due_at) WHERE status = 'active';

CREATE TABLE sync.calendar_state (
    tenant_id           uuid NOT NULL,
    workspace_id        uuid NOT NULL,
    calendar_id         text NOT NULL,
    connection_id       uuid NOT NULL,
    summary             text,
    time_zone           text,
    access_role         text,
    is_primary          boolean NOT NULL DEFAULT false,
    discovered_at       timestamptz NOT NULL DEFAULT now(),
    missing_from_lists  integer NOT NULL DEFAULT 0,
    deleted_at          timestamptz,
    sync_token          text,
    token_fingerprint   bytea,
    live_generation     integer NOT NULL DEFAULT 0,
    next_generation     integer,
    lease_epoch         bigint NOT NULL DEFAULT 0,
    lease_owner         text,
    lease_until         timestamptz,
    due_at              timestamptz NOT NULL DEFAULT 'epoch',
    last_started_at     timestamptz,
    last_finished_at    timestamptz,
    last_succeeded_at   timestamptz,
    last_full_sync_at   timestamptz,
    last_outcome        text,
    last_error          text,
    consecutive_failures integer NOT NULL DEFAULT 0,
    gone_count          integer NOT NULL DEFAULT 0,
    breaker_until       timestamptz,
    PRIMARY KEY (tenant_id, workspace_id, calendar_id)
);
COMMENT ON TABLE sync.calendar_state IS
    'One row per Google calendar of a workspace: its sync token, its lease, its generations, its last outcome.';
COMMENT ON COLUMN sync.calendar_state.connection_id IS
    'The grant that reads it; another grant of the workspace takes over when this one stops working.';
COMMENT ON COLUMN sync.calendar_state.missing_from_lists IS
    'Complete calendar lists in a row that did not name it; the second retires it.';
COMMENT ON COLUMN sync.calendar_state.deleted_at IS 'Gone from the account; readers no longer see its events.';
COMMENT ON COLUMN sync.calendar_state.sync_token IS
    'Google''s cursor, committed in the same transaction as the last page it covers.';
COMMENT ON COLUMN sync.calendar_state.token_fingerprint IS
    'SHA-256 of the query parameters and the account the token was made with; any other one forces a full sync.';
COMMENT ON COLUMN sync.calendar_state.live_generation IS
    'The generation of sync.event_rows that readers see; 0 before the first complete sync.';
COMMENT ON COLUMN sync.calendar_state.next_generation IS 'The generation a full sync is writing, or left unfinished.';
COMMENT ON COLUMN sync.calendar_state.lease_epoch IS
    'Grows with every lease; a write that carries an older one is refused (fencing).';
COMMENT ON COLUMN sync.calendar_state.last_outcome IS 'incremental, full, or failed; last_error then says why.';
COMMENT ON COLUMN sync.calendar_state.gone_count IS 'Times in a row Google answered 410 to the stored token.';
COMMENT ON COLUMN sync.calendar_state.breaker_until IS
    'Open breaker: the token never lives, so the calendar is only fully synced now and then.';
CREATE INDEX calendar_state_due ON sync.calendar_state (due_at) WHERE deleted_at IS NULL;

CREATE TABLE sync.event_rows (
    tenant_id           uuid NOT NULL,
    workspace_id        uuid NOT NULL,
    calendar_id         text NOT NULL,
    generation          integer NOT NULL,
    event_id            text NOT NULL,
    status              text,
    event_type          text,
    summary             text,
    description         text,
    location            text,
    start_at            timestamptz,
    start_date          date,
    start_zone          text,
    end_at              timestamptz,
    end_date            date,
    end_zone            text,
    recurrence          text[],
    recurring_event_id  text,
    original_start_at   timestamptz,
    original_start_date date,
    ical_uid            text,
    organizer_email     text,
    visibility          text,
    transparency        text,
    attendees_omitted   boolean,
    sequence            bigint,
    created_at          timestamptz,
    updated_at          timestamptz,
    deleted_at          timestamptz,
    changed_at          timestamptz NOT NULL,
    flaws               text[],
    raw                 jsonb NOT NULL,
    lease_epoch         bigint NOT NULL,
    PRIMARY KEY (tenant_id, workspace_id, calendar_id, generation, event_id)
);
COMMENT ON TABLE sync.event_rows IS
    'Events of every generation; readers use the views sync.calendar_events and sync.calendar_event_changes.';
COMMENT ON COLUMN sync.event_rows.event_id IS 'Unique within its calendar only.';
COMMENT ON COLUMN sync.event_rows.start_at IS
    'Start instant of a timed event; NULL for all-day events and unreadable times.';
COMMENT ON COLUMN sync.event_rows.start_date IS 'First day of an all-day event.';
COMMENT ON COLUMN sync.event_rows.start_zone IS 'Time zone as Google names it; recurrences expand in it.';
COMMENT ON COLUMN sync.event_rows.end_date IS 'Day after the last day of an all-day event (exclusive).';
COMMENT ON COLUMN sync.event_rows.recurrence IS 'RRULE, RDATE and EXDATE lines; on the master of a series only.';
COMMENT ON COLUMN sync.event_rows.recurring_event_id IS
    'The master an exception belongs to; a cancelled exception (status) takes its instance out of the series.';
COMMENT ON COLUMN sync.event_rows.original_start_at IS 'Which instance of the series this exception replaces.';
COMMENT ON COLUMN sync.event_rows.attendees_omitted IS 'True: raw->attendees is not the complete list.';
COMMENT ON COLUMN sync.event_rows.deleted_at IS
    'Tombstone: when the sync learned that the event is gone; its details are removed.';
COMMENT ON COLUMN sync.event_rows.changed_at IS
    'When the content last changed here; a full sync keeps it for unchanged events.';
COMMENT ON COLUMN sync.event_rows.flaws IS
    'What could not be stored as Google sent it, for example start_unreadable or characters_replaced.';
COMMENT ON COLUMN sync.event_rows.raw IS
    'The event as Google sent it, with characters replaced that Postgres cannot hold.';
COMMENT ON COLUMN sync.event_rows.lease_epoch IS 'The lease under which the row was written.';
CREATE INDEX event_rows_exceptions
    ON sync.event_rows (tenant_id, workspace_id, calendar_id, generation, recurring_event_id)
    WHERE recurring_event_id IS NOT NULL;
CREATE INDEX event_rows_tombstones ON sync.event_rows (tenant_id, workspace_id, deleted_at)
    WHERE deleted_at IS NOT NULL;
CREATE INDEX event_rows_changes ON sync.event_rows (tenant_id, workspace_id, changed_at);

CREATE VIEW sync.calendar_event_changes WITH (security_invoker = true) AS
SELECT e.tenant_id, e.workspace_id, e.calendar_id, e.event_id, e.status, e.event_type, e.summary, e.description,
       e.location, e.start_at, e.start_date, e.start_zone, e.end_at, e.end_date, e.end_zone, e.recurrence,
       e.recurring_event_id, e.original_start_at, e.original_start_date, e.ical_uid, e.organizer_email, e.visibility,
       e.transparency, e.attendees_omitted, e.sequence, e.created_at, e.updated_at,
       coalesce(e.deleted_at, c.deleted_at) AS deleted_at, greatest(e.changed_at, c.deleted_at) AS changed_at,
       e.flaws, e.raw
FROM sync.event_rows e
JOIN sync.calendar_state c USING (tenant_id, workspace_id, calendar_id)
WHERE e.generation = c.live_generation;
COMMENT ON VIEW sync.calendar_event_changes IS
    'Events and tombstones of the live generation, for consumers that follow changed_at.';

CREATE VIEW sync.calendar_events WITH (security_invoker = true) AS
SELECT * FROM sync.calendar_event_changes WHERE deleted_at IS NULL;
COMMENT ON VIEW sync.calendar_events IS
    'What the SaaS reads: every event Google has, as masters and exceptions; never a half-written generation.';

CREATE TABLE sync.quarantine (
    tenant_id     uuid NOT NULL,
    workspace_id  uuid NOT NULL,
    calendar_id   text NOT NULL,
    fingerprint   bytea NOT NULL,
    event_id      text,
    reason        text NOT NULL,
    raw           text NOT NULL,
    generation    integer NOT NULL,
    first_seen_at timestamptz NOT NULL DEFAULT now(),
    last_seen_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, workspace_id, calendar_id, fingerprint)
);
COMMENT ON TABLE sync.quarantine IS
    'Events that could not be stored, as they came, with the reason; a later readable version releases them.';
COMMENT ON COLUMN sync.quarantine.fingerprint IS 'SHA-256 of the raw text.';

CREATE TABLE sync.runs (
    run_id            text PRIMARY KEY,
    shard             integer NOT NULL,
    of                integer NOT NULL,
    started_at        timestamptz NOT NULL DEFAULT now(),
    heartbeat_at      timestamptz NOT NULL DEFAULT now(),
    finished_at       timestamptz,
    workspaces_due    integer NOT NULL DEFAULT 0,
    workspaces_served integer NOT NULL DEFAULT 0,
    workspaces_failed integer NOT NULL DEFAULT 0,
    calendars_synced  integer NOT NULL DEFAULT 0,
    calendars_failed  integer NOT NULL DEFAULT 0,
    calendars_deferred integer NOT NULL DEFAULT 0,
    full_syncs        integer NOT NULL DEFAULT 0,
    incremental_syncs integer NOT NULL DEFAULT 0,
    api_calls         bigint NOT NULL DEFAULT 0,
    pages             bigint NOT NULL DEFAULT 0,
    events_seen       bigint NOT NULL DEFAULT 0,
    events_upserted   bigint NOT NULL DEFAULT 0,
    events_deleted    bigint NOT NULL DEFAULT 0,
    quarantined       bigint NOT NULL DEFAULT 0,
    p95_seconds       double precision,
    duration_seconds  double precision
);
COMMENT ON TABLE sync.runs IS
    'One row per run of the sync: what it did. heartbeat_at without finished_at is a run that died or is at work.';
COMMENT ON COLUMN sync.runs.p95_seconds IS '95th percentile of the time one workspace took.';
CREATE INDEX runs_started ON sync.runs (started_at);

CREATE TABLE sync.api_calls (
    tenant_id uuid NOT NULL,
    day       date NOT NULL,
    method    text NOT NULL,
    outcome   text NOT NULL,
    calls     bigint NOT NULL,
    PRIMARY KEY (tenant_id, day, method, outcome)
);
COMMENT ON TABLE sync.api_calls IS
    'Requests sent to Google, retries included, per tenant and UTC day; method oauth.refresh is not a Calendar call.';

ALTER TABLE sync.workspace_state ENABLE ROW LEVEL SECURITY;
ALTER TABLE sync.connection_state ENABLE ROW LEVEL SECURITY;
ALTER TABLE sync.calendar_state ENABLE ROW LEVEL SECURITY;
ALTER TABLE sync.event_rows ENABLE ROW LEVEL SECURITY;
ALTER TABLE sync.quarantine ENABLE ROW LEVEL SECURITY;
ALTER TABLE sync.runs ENABLE ROW LEVEL SECURITY;
ALTER TABLE sync.api_calls ENABLE ROW LEVEL SECURITY;
"""

DOWNGRADE = """
DROP VIEW sync.calendar_events;
DROP VIEW sync.calendar_event_changes;
DROP TABLE sync.api_calls, sync.runs, sync.quarantine, sync.event_rows, sync.calendar_state, sync.connection_state,
    sync.workspace_state;
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute(DOWNGRADE)
