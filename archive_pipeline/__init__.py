"""Audit logs to Parquet on S3: closed months leave Postgres as verified, immutable, queryable parts."""
