"""What each audit of the archive found, so that whoever cannot read the bucket knows it too."""

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

UPGRADE = """
CREATE TABLE archive.audits (
  source_table text NOT NULL,
  shard text NOT NULL,
  ended_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  deep boolean NOT NULL,
  links bigint NOT NULL CHECK (links >= 0),
  months bigint NOT NULL CHECK (months >= 0),
  findings bigint NOT NULL CHECK (findings >= 0),
  worst jsonb NOT NULL DEFAULT '[]' CHECK (jsonb_typeof(worst) = 'array'),
  PRIMARY KEY (source_table, shard, ended_at)
);
COMMENT ON TABLE archive.audits IS 'Every audit of a chain from the end that is pinned here, and what it found.';
COMMENT ON COLUMN archive.audits.deep IS 'Whether every row was read, and every digest and Merkle root computed again.';
COMMENT ON COLUMN archive.audits.findings IS 'How many; 0: the archive is what was published.';
COMMENT ON COLUMN archive.audits.worst IS 'The first of them, as objects with month, kind, key, text and remedy.';
"""

DOWNGRADE = "DROP TABLE archive.audits"


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute(DOWNGRADE)
