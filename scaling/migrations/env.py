"""Alembic's entry: online with the URL that `scaling.migrate` passes, offline as plain SQL."""

from alembic import context
from sqlalchemy import create_engine, inspect, pool, text

CREATE_SCHEMA = "CREATE SCHEMA IF NOT EXISTS scaling"  # holds Alembic's version table, so it comes first
VERSIONS_SCHEMA = "scaling"

url = context.config.attributes["url"]

if context.is_offline_mode():
    context.configure(
        dialect_name="postgresql",
        dialect_opts={"paramstyle": "named"},  # any other style doubles the percent signs of the script
        output_buffer=context.config.output_buffer,
        version_table_schema=VERSIONS_SCHEMA,
    )
    with context.begin_transaction():
        context.execute(CREATE_SCHEMA)
        context.run_migrations()
else:
    engine = create_engine(url, poolclass=pool.NullPool)
    with engine.begin() as connection:
        # Two starting processes may migrate at once; the second waits here and then finds nothing to do.
        connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('scaling.migrate'))"))
        # IF NOT EXISTS asks for the right to create schemas even when there is nothing to create.
        if not inspect(connection).has_schema("scaling"):
            connection.execute(text(CREATE_SCHEMA))
        context.configure(connection=connection, version_table_schema=VERSIONS_SCHEMA)
        context.run_migrations()
