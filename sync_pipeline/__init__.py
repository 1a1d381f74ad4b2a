"""Google Calendar to Postgres: one partition per tenant workspace, one lease per calendar.

`definitions` and the modules it wires (assets, checks, jobs, partitions, resources, schedules, sensors,
dagster_events) are the Dagster layer. All others are the domain and never import dagster.
"""
