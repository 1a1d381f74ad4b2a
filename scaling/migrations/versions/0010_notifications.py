"""What people are told: the outbox of alerts, and who may write to it."""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

UPGRADE = """
CREATE TABLE scaling.notifications (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  subject text NOT NULL,
  happened text NOT NULL CHECK (happened IN
    ('fired', 'proposed', 'needs_human', 'acted', 'recovered', 'data_missing', 'run_failed')),
  channel text NOT NULL CHECK (channel IN ('slack', 'webhook', 'email', 'archive_alert')),
  episode_id bigint REFERENCES scaling.episodes ON DELETE CASCADE,
  key uuid NOT NULL UNIQUE DEFAULT gen_random_uuid(),
  message jsonb NOT NULL,
  written_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  attempts integer NOT NULL DEFAULT 0 CHECK (attempts >= 0),
  next_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  sent_at timestamptz,
  dropped_at timestamptz,
  error text,
  UNIQUE (subject, happened, channel)
);
CREATE INDEX notifications_due ON scaling.notifications (id) WHERE sent_at IS NULL AND dropped_at IS NULL;
CREATE INDEX notifications_of_episode ON scaling.notifications (episode_id) WHERE episode_id IS NOT NULL;
COMMENT ON TABLE scaling.notifications IS
    'What people are told, once per subject, what happened to it, and channel: written before it is sent.';
COMMENT ON COLUMN scaling.notifications.subject IS 'An episode, a gap in the data, or failed runs of a job in an hour.';
COMMENT ON COLUMN scaling.notifications.key IS
    'Sent along, the same at every attempt: a receiver that has seen it has had this message.';
COMMENT ON COLUMN scaling.notifications.next_at IS
    'Not tried before; moved ahead before each attempt, so one that died is tried again.';
COMMENT ON COLUMN scaling.notifications.dropped_at IS 'Given up, or no longer worth telling; error says why.';
ALTER TABLE scaling.notifications ENABLE ROW LEVEL SECURITY;

ALTER PROCEDURE sync.grant_roles() RENAME TO grant_roles_on_episodes;
COMMENT ON PROCEDURE sync.grant_roles_on_episodes() IS
    'The part of sync.grant_roles() that is about schema sync, and the tables of schema scaling it began with.';

CREATE PROCEDURE sync.grant_roles() LANGUAGE plpgsql SET search_path = '' AS $procedure$
BEGIN
    CALL sync.grant_roles_on_episodes();
    -- A run of the sync that failed is told by its own code location.
    IF EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'pipeline_worker') THEN
        GRANT SELECT, INSERT, UPDATE ON scaling.notifications TO pipeline_worker;
    END IF;
END
$procedure$;
COMMENT ON PROCEDURE sync.grant_roles() IS
    'Gives the roles pipeline_worker, pipeline_webhook, pipeline_reader and pipeline_operator, as far as they exist, '
    'exactly their rights in the schemas sync and scaling, and forces row-level security on every table of sync. Safe '
    'to call again.';
"""

DOWNGRADE = """
DROP PROCEDURE sync.grant_roles();
ALTER PROCEDURE sync.grant_roles_on_episodes() RENAME TO grant_roles;
DROP TABLE scaling.notifications;
"""


def upgrade() -> None:
    op.execute(UPGRADE)
    op.execute("CALL sync.grant_roles()")


def downgrade() -> None:
    op.execute(DOWNGRADE)
