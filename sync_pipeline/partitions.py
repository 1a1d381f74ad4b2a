"""Partitions: one per tenant workspace that has a Google connection.

Belongs here: the definition. Does not: which exist; `workspaces_sensor` keeps them in step with the database.
https://docs.dagster.io/guides/build/partitions-and-backfills
"""

import dagster as dg

workspaces = dg.DynamicPartitionsDefinition(name="workspaces")
"""Keys are `<tenant_id>:<workspace_id>`, see `sync_pipeline.workspaces`."""
