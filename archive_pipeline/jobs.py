"""Jobs: what one click or one schedule tick runs.

Belongs here: selections and their descriptions. Does not: when they run. https://docs.dagster.io/guides/build/jobs
"""

import dagster as dg

audit_log_archive_job = dg.define_asset_job(
    "audit_log_archive_job",
    selection=dg.AssetSelection.assets("audit_log_archive", "audit_log_catalog"),
    description="Archive and verify one month of audit_logs, then refresh the Athena DDL.",
    tags={"pipeline": "archive"},
)
