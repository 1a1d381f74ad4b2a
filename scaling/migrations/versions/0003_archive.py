"""Audit logs to S3: which months are archived, who is at work on one, what an attempt may have left in the bucket."""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

UPGRADE = """
CREATE TABLE archive.months (
  source_table text NOT NULL,
  shard text NOT NULL,
  month date NOT NULL,
  time_zone text NOT NULL,
  from_at timestamptz NOT NULL,
  to_at timestamptz NOT NULL,
  state text NOT NULL CHECK (state IN ('archiving', 'archived', 'failed')),
  epoch bigint NOT NULL,
  owner text NOT NULL,
  started_at timestamptz NOT NULL,
  finished_at timestamptz,
  error text,
  generation integer CHECK (generation >= 1),
  rows bigint CHECK (rows >= 0),
  row_digest numeric(60, 0),
  parts integer CHECK (parts >= 0),
  bytes bigint CHECK (bytes >= 0),
  snapshot_lsn pg_lsn,
  manifest_key text,
  manifest_sha256 text,
  archived_at timestamptz,
  verified_at timestamptz,
  source_rows bigint,
  PRIMARY KEY (source_table, shard, month),
  CHECK (from_at < to_at),
  CHECK (state <> 'archived' OR (generation, rows, row_digest, parts, bytes, manifest_key, manifest_sha256, archived_at)
         IS NOT NULL)
);
COMMENT ON TABLE archive.months IS
    'One row for each month of an archived table and shard. The manifest in the bucket is the truth, this leads to it.';
COMMENT ON COLUMN archive.months.month IS
    'First day of the calendar month in time_zone.';
COMMENT ON COLUMN archive.months.epoch IS
    'Counts the attempts. A run whose epoch is no longer here was replaced and must not write.';
COMMENT ON COLUMN archive.months.owner IS
    'Who holds or held the lease, for people.';
COMMENT ON COLUMN archive.months.error IS
    'One sentence about the last failure; never row content.';
COMMENT ON COLUMN archive.months.rows IS
    'Rows in the archive, all generations together.';
COMMENT ON COLUMN archive.months.row_digest IS
    'Order-free digest of these rows, as Postgres and DuckDB computed it.';
COMMENT ON COLUMN archive.months.snapshot_lsn IS
    'Write-ahead log position of the snapshot the rows were read from.';
COMMENT ON COLUMN archive.months.verified_at IS
    'When the objects in the bucket were last found to be what the manifest says.';
COMMENT ON COLUMN archive.months.source_rows IS
    'Rows of the month in Postgres when it was last compared; more than rows means late rows.';

CREATE TABLE archive.uploads (
  key text PRIMARY KEY,
  source_table text NOT NULL,
  shard text NOT NULL,
  month date NOT NULL,
  epoch bigint NOT NULL,
  sha256 text NOT NULL,
  bytes bigint NOT NULL CHECK (bytes >= 0),
  recorded_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  FOREIGN KEY (source_table, shard, month) REFERENCES archive.months
);
COMMENT ON TABLE archive.uploads IS
    'Objects an attempt was about to put under the data prefix: written before the upload, removed when a manifest '
    'lists them. What is left here after a crash is what may lie in the bucket unlisted.';
CREATE INDEX uploads_by_month ON archive.uploads (source_table, shard, month);
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute("DROP TABLE archive.uploads; DROP TABLE archive.months")
