"""Partitions: one per tenant workspace that has a Google connection; one per day.

Belongs here: the definitions. Does not: which exist; `workspaces_sensor` keeps them in step with the database.
https://docs.dagster.io/guides/build/partitions-and-backfills
"""

import dagster as dg

workspaces = dg.DynamicPartitionsDefinition(name="workspaces")
"""Keys are `<tenant_id>:<workspace_id>`, see `sync_pipeline.workspaces`."""

days = dg.DailyPartitionsDefinition(start_date="2026-01-01", timezone="UTC")
"""Days that have ended. Whether the sync ran on them, the database knows."""
