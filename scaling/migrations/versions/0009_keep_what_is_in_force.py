"""An installation that syncs incrementally and in parallel goes on so, now that thresholds decide it by default."""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

# Both were always on before runs recorded them (NULL).
UPGRADE = """
WITH newest AS (
    SELECT coalesce(incremental, true) AS incremental, coalesce(parallel, true) AS parallel
    FROM sync.runs ORDER BY started_at DESC LIMIT 1
), on_now AS (
    SELECT 'incremental_sync' AS name FROM newest WHERE incremental
    UNION ALL SELECT 'parallel_sync' FROM newest WHERE parallel
), switched AS (
    INSERT INTO scaling.capabilities (name, active) SELECT name, true FROM on_now ON CONFLICT DO NOTHING RETURNING name
)
INSERT INTO scaling.capability_changes (capability, active, changed_by, reason)
SELECT name, true, 'migration 0009', 'was in force before thresholds decided it' FROM switched;
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute("SELECT")
