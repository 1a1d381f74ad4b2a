"""Audit logs: conversion to partitions, the signed chain's pin, pruning, legal holds, erasures."""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

UPGRADE = """
ALTER TABLE archive.months
  ADD COLUMN read_from text,
  ADD COLUMN late_rows bigint NOT NULL DEFAULT 0 CHECK (late_rows >= 0),
  ADD COLUMN erased_rows bigint NOT NULL DEFAULT 0 CHECK (erased_rows >= 0),
  ADD COLUMN pruned_at timestamptz,
  ADD COLUMN pruned_rows bigint CHECK (pruned_rows >= 0);
COMMENT ON COLUMN archive.months.read_from IS 'primary or replica: where the last export read.';
COMMENT ON COLUMN archive.months.late_rows IS 'Archived rows that came after the first generation.';
COMMENT ON COLUMN archive.months.erased_rows IS 'Rows removed from the archive on request.';
COMMENT ON COLUMN archive.months.pruned_at IS
    'When the month''s rows were dropped from Postgres; later rows of the month are late ones.';

CREATE TABLE archive.chain_heads (
  source_table text NOT NULL,
  shard text NOT NULL,
  sequence bigint NOT NULL CHECK (sequence >= 1),
  link_key text NOT NULL,
  link_sha256 text NOT NULL,
  signature text,
  pinned_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (source_table, shard)
);
COMMENT ON TABLE archive.chain_heads IS
    'The newest link of each chain of digests, kept outside the bucket: without it, cutting off the chain''s end would '
    'go unnoticed.';

CREATE TABLE archive.signing_keys (
  fingerprint text PRIMARY KEY,
  algorithm text NOT NULL,
  public_key bytea NOT NULL,
  source text NOT NULL CHECK (source IN ('kms', 'local')),
  first_used_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  last_used_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE archive.signing_keys IS
    'Public keys (SPKI, DER) that signed links, by fingerprint, and when; a signature by any other key is invalid.';

CREATE TABLE archive.conversions (
  source_table text NOT NULL,
  shard text NOT NULL,
  state text NOT NULL CHECK (state IN ('preparing', 'converted', 'aborted', 'rolled back')),
  bound timestamptz NOT NULL,
  check_name text NOT NULL,
  index_name text NOT NULL,
  legacy_schema text NOT NULL,
  legacy_name text NOT NULL,
  started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  finished_at timestamptz,
  error text,
  before jsonb,
  after jsonb,
  PRIMARY KEY (source_table, shard)
);
COMMENT ON TABLE archive.conversions IS
    'The conversion of a plain table to monthly partitions: what it adds on the way (so that an aborted one can be '
    'cleaned up), and every object of the table before and after.';
COMMENT ON COLUMN archive.conversions.bound IS
    'Rows at or after it are refused while the CHECK is in place, and go to monthly partitions afterwards.';

CREATE TABLE archive.prunes (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  source_table text NOT NULL,
  shard text NOT NULL,
  partition_oid oid NOT NULL,
  partition_schema text NOT NULL,
  partition_name text NOT NULL,
  from_at timestamptz,
  to_at timestamptz NOT NULL,
  state text NOT NULL
    CHECK (state IN ('proposed', 'approved', 'detaching', 'detached', 'replaced', 'dropping', 'dropped', 'refused')),
  reason text,
  rows bigint,
  bytes bigint,
  proposed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  approved_by text,
  approved_at timestamptz,
  changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE UNIQUE INDEX prunes_under_way ON archive.prunes (source_table, shard, partition_oid) WHERE state <> 'dropped';
COMMENT ON TABLE archive.prunes IS
    'How far each partition is on its way out of Postgres. Pinned to its oid: a table made later under its name is '
    'another one.';

CREATE TABLE archive.pruned_months (
  prune_id bigint NOT NULL REFERENCES archive.prunes,
  month date NOT NULL,
  rows bigint NOT NULL CHECK (rows >= 0),
  row_digest numeric(60, 0) NOT NULL,
  gone_rows bigint NOT NULL CHECK (gone_rows >= 0),
  gone_digest numeric(60, 0) NOT NULL,
  erased_rows bigint NOT NULL CHECK (erased_rows >= 0),
  manifest_key text NOT NULL,
  manifest_sha256 text NOT NULL,
  PRIMARY KEY (prune_id, month)
);
COMMENT ON TABLE archive.pruned_months IS
    'What a prune compared before it dropped a partition: its rows of each month, and the manifest that lists them.';
COMMENT ON COLUMN archive.pruned_months.gone_rows IS
    'Rows of the month that the archive held and Postgres no longer, this prune included.';
COMMENT ON COLUMN archive.pruned_months.erased_rows IS
    'Rows of the month erased from the archive until then.';

CREATE TABLE archive.legal_holds (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  source_table text NOT NULL,
  month date,
  tenant_id text,
  reason text NOT NULL,
  placed_by text NOT NULL,
  placed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  released_by text,
  released_at timestamptz
);
COMMENT ON TABLE archive.legal_holds IS
    'What must neither be erased nor pruned: a month, a tenant, or both; NULL means every one.';

CREATE TABLE archive.erasures (
  id uuid PRIMARY KEY,
  source_table text NOT NULL,
  shard text NOT NULL,
  column_name text NOT NULL,
  value_sha256 text NOT NULL,
  requested_by text NOT NULL,
  reason text NOT NULL,
  requested_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  finished_at timestamptz,
  months integer NOT NULL DEFAULT 0,
  rows bigint NOT NULL DEFAULT 0,
  generations jsonb NOT NULL DEFAULT '{}'
);
COMMENT ON TABLE archive.erasures IS
    'Requests to erase from the archive. Of the value a keyed hash is kept: a request must not keep what it erases.';
COMMENT ON COLUMN archive.erasures.value_sha256 IS
    'SHA-256 of id || '':'' || value, hexadecimal: it tells that a row was erased, and does not tell which rows were.';
COMMENT ON COLUMN archive.erasures.generations IS
    'By month, the generation and the rows of what was about to be published, noted before it was.';
"""

DOWNGRADE = """
DROP TABLE archive.erasures;
DROP TABLE archive.legal_holds;
DROP TABLE archive.pruned_months;
DROP TABLE archive.prunes;
DROP TABLE archive.conversions;
DROP TABLE archive.signing_keys;
DROP TABLE archive.chain_heads;
ALTER TABLE archive.months DROP COLUMN read_from, DROP COLUMN late_rows, DROP COLUMN erased_rows,
  DROP COLUMN pruned_at, DROP COLUMN pruned_rows;
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute(DOWNGRADE)
