"""Scaling thresholds: samples, what each rule knows, episodes, capabilities and who switched them."""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

UPGRADE = """
CREATE TABLE scaling.samples (
  metric text NOT NULL,
  dims text NOT NULL DEFAULT '',
  at timestamptz NOT NULL,
  status text NOT NULL CHECK (status IN ('ok', 'empty', 'error', 'stale', 'partial', 'not_configured')),
  value double precision,
  period text NOT NULL DEFAULT '',
  evidence jsonb NOT NULL DEFAULT '{}',
  PRIMARY KEY (metric, dims, at),
  CHECK ((status = 'ok') = (value IS NOT NULL)),
  CHECK (value >= 0 AND value < 'Infinity')
);
COMMENT ON TABLE scaling.samples IS
    'What was measured, and what could not be: only a sample that is ok has a value, and only such moves a rule.';
COMMENT ON COLUMN scaling.samples.dims IS 'What the metric was measured of, like shard=main; empty: of everything.';
COMMENT ON COLUMN scaling.samples.period IS 'YYYY-MM of a figure that begins anew every month; empty for others.';

CREATE TABLE scaling.rule_states (
  rule text NOT NULL,
  dims text NOT NULL DEFAULT '',
  phase text NOT NULL CHECK (phase IN ('unknown', 'ok', 'pending', 'fired', 'clearing', 'latched')),
  episode_no integer NOT NULL CHECK (episode_no >= 0),
  state jsonb NOT NULL,
  changed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (rule, dims)
);
COMMENT ON TABLE scaling.rule_states IS 'Where the machine of each rule stands; its row lock keeps evaluations apart.';

CREATE TABLE scaling.episodes (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  rule text NOT NULL,
  dims text NOT NULL DEFAULT '',
  episode_no integer NOT NULL CHECK (episode_no >= 1),
  rule_version text NOT NULL,
  capability text,
  state text NOT NULL CHECK (state IN
    ('observed', 'proposed', 'approved', 'acting', 'acted', 'action_failed', 'needs_human', 'expired')),
  value double precision NOT NULL,
  threshold double precision NOT NULL,
  evidence jsonb NOT NULL DEFAULT '{}',
  fired_at timestamptz NOT NULL,
  recovered_at timestamptz,
  approved_by text,
  approved_at timestamptz,
  acknowledged_by text,
  acknowledged_at timestamptz,
  attempts integer NOT NULL DEFAULT 0 CHECK (attempts >= 0),
  fence bigint NOT NULL DEFAULT 0,
  run_id text,
  acting_until timestamptz,
  retry_at timestamptz,
  error text,
  outcome jsonb,
  acted_at timestamptz,
  effect jsonb,
  UNIQUE (rule, dims, episode_no),
  CHECK ((approved_at IS NULL) = (approved_by IS NULL)),
  CHECK (state <> 'acting' OR (run_id IS NOT NULL AND acting_until IS NOT NULL))
);
CREATE INDEX episodes_to_act_on ON scaling.episodes (capability) WHERE state IN ('approved', 'acting', 'action_failed');
CREATE INDEX episodes_by_time ON scaling.episodes (fired_at DESC);
COMMENT ON TABLE scaling.episodes IS
    'One crossing of one threshold, written in the transaction that moves its rule: the outbox of actions.';
COMMENT ON COLUMN scaling.episodes.fence IS
    'Raised by every claim; what an action writes proves it, so an action that was given up changes nothing.';
COMMENT ON COLUMN scaling.episodes.effect IS 'What the action changed, measured before and after it.';

CREATE TABLE scaling.capabilities (
  name text PRIMARY KEY,
  active boolean NOT NULL DEFAULT false,
  changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE scaling.capabilities IS
    'What thresholds have switched on. Whether it is in force is decided by this and the mode of the settings.';

CREATE TABLE scaling.capability_changes (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  capability text NOT NULL,
  active boolean NOT NULL,
  changed_by text NOT NULL,
  reason text NOT NULL,
  episode_id bigint REFERENCES scaling.episodes,
  changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE scaling.capability_changes IS 'Who switched what, when, and why.';

ALTER TABLE scaling.samples ENABLE ROW LEVEL SECURITY;
ALTER TABLE scaling.rule_states ENABLE ROW LEVEL SECURITY;
ALTER TABLE scaling.episodes ENABLE ROW LEVEL SECURITY;
ALTER TABLE scaling.capabilities ENABLE ROW LEVEL SECURITY;
ALTER TABLE scaling.capability_changes ENABLE ROW LEVEL SECURITY;
"""

DOWNGRADE = """
DROP TABLE scaling.capability_changes;
DROP TABLE scaling.capabilities;
DROP TABLE scaling.episodes;
DROP TABLE scaling.rule_states;
DROP TABLE scaling.samples;
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute(DOWNGRADE)
