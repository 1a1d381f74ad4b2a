"""Schemas of the two pipelines; `scaling` itself is made before the first migration."""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("CREATE SCHEMA sync")
    op.execute("CREATE SCHEMA archive")


def downgrade() -> None:
    op.execute("DROP SCHEMA archive")
    op.execute("DROP SCHEMA sync")
