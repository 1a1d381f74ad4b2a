"""The pipeline's own tables: Alembic migrations, applied or printed as plain SQL.

Belongs here: running the migrations of ``scaling/migrations`` (schemas ``scaling``, ``sync``, ``archive``).
Does not: any table's definition; each is in the migration that makes it.
"""

import io
from importlib.resources import files

from alembic import command
from alembic.config import Config
from psycopg import conninfo
from sqlalchemy.engine import URL


def upgrade(dsn: str, *, revision: str = "head") -> None:
    """Bring the pipeline's schemas to a revision; nothing happens when they are there already.

    Args:
        dsn: Postgres URL of a role that may create schemas in the database.
        revision: Alembic revision.
    """
    command.upgrade(_config(_sqlalchemy_url(dsn)), revision)


def downgrade(dsn: str, *, revision: str = "base") -> None:
    """Take migrations back, ``base`` removes the pipeline's schemas and all they hold.

    Args:
        dsn: Postgres URL of the role that owns the schemas.
        revision: Alembic revision.
    """
    command.downgrade(_config(_sqlalchemy_url(dsn)), revision)


def as_sql() -> str:
    """All migrations as one SQL script, for those who apply SQL by hand (for example Supabase's editor).

    Returns:
        The script.
    """
    script = io.StringIO()
    config = _config(URL.create("postgresql+psycopg"))
    config.output_buffer = script
    command.upgrade(config, "head", sql=True)
    return script.getvalue()


def _config(url: URL) -> Config:
    config = Config()
    config.set_main_option("script_location", str(files("scaling") / "migrations"))
    config.attributes["url"] = url
    return config


def _sqlalchemy_url(dsn: str) -> URL:
    parts = {key: str(value) for key, value in conninfo.conninfo_to_dict(dsn).items() if value is not None}
    return URL.create(
        "postgresql+psycopg",
        username=parts.pop("user", None),
        password=parts.pop("password", None),
        host=parts.pop("host", None),
        port=int(parts.pop("port", 5432)),
        database=parts.pop("dbname", None),
        query=parts,
    )
