"""The SQL of the metrics, as `scaling.sources.sql` runs it: read-only, on every shard, one row with a column `value`.

Belongs here: statements, and what their columns mean. Does not: thresholds (`scaling.catalogue`).

Other columns are evidence. None of them is personal: tenants are counted, never named. Placeholders: `%(now)s`, and
what the catalogue passes.
"""

# pg_total_relation_size of a partitioned table is 0, and pg_partition_tree of a plain one has no rows. A partition
# that was detached and not dropped yet still takes its bytes.
AUDIT_LOGS_BYTES = """
SELECT sum(pg_total_relation_size(oid))::float8 AS value,
       sum(pg_indexes_size(oid))::float8 AS index_bytes,
       count(*) AS tables,
       bool_or(is_partitioned) AS partitioned
FROM (
    SELECT c.oid, false AS is_partitioned FROM pg_class c WHERE c.oid = to_regclass(%(table)s) AND c.relkind = 'r'
    UNION
    SELECT t.relid, true FROM pg_class c, pg_partition_tree(c.oid) t
    WHERE c.oid = to_regclass(%(table)s) AND c.relkind = 'p'
    UNION
    SELECT p.partition_oid, true FROM archive.prunes p JOIN pg_class c ON c.oid = p.partition_oid
    WHERE p.source_table = %(table)s AND p.shard = %(shard)s AND p.state IN ('detached', 'replaced', 'dropping')
      AND to_regclass(%(table)s) IS NOT NULL
      AND NOT EXISTS (SELECT FROM pg_inherits i WHERE i.inhrelid = c.oid)
) AS pieces
HAVING count(*) > 0
"""

# Partitions with rows that end before the oldest month that is kept, and that no legal hold covers. A plain table has
# no partitions, and no row.
AUDIT_DETACHABLE_BYTES = """
WITH parent AS (
    SELECT c.oid FROM pg_class c WHERE c.oid = to_regclass(%(table)s) AND c.relkind = 'p'
), kept AS (
    SELECT (date_trunc('month', (%(now)s::timestamptz - %(grace)s::interval) AT TIME ZONE %(zone)s)
            - make_interval(months => %(retention)s)) AT TIME ZONE %(zone)s AS since
), partitions AS (
    SELECT i.inhrelid AS oid,
           substring(pg_get_expr(c.relpartbound, c.oid) FROM $$TO \\('([^']+)'\\)$$)::timestamptz AS to_at,
           substring(pg_get_expr(c.relpartbound, c.oid) FROM $$FROM \\('([^']+)'\\)$$)::timestamptz AS from_at
    FROM parent JOIN pg_inherits i ON i.inhparent = parent.oid JOIN pg_class c ON c.oid = i.inhrelid
), gone AS (
    SELECT p.oid, p.to_at FROM partitions p, kept
    WHERE p.to_at <= kept.since AND pg_relation_size(p.oid) > 0
      AND NOT EXISTS (
        SELECT FROM archive.legal_holds h
        WHERE h.source_table = %(table)s AND h.released_at IS NULL
          AND (h.month IS NULL OR h.month < (p.to_at AT TIME ZONE %(zone)s)::date
               AND (p.from_at IS NULL OR h.month >= (p.from_at AT TIME ZONE %(zone)s)::date)))
)
SELECT coalesce((SELECT sum(pg_total_relation_size(oid)) FROM gone), 0)::float8 AS value,
       (SELECT count(*) FROM gone) AS partitions,
       (SELECT count(*) FROM partitions) AS of_partitions,
       (SELECT since FROM kept) AS oldest_kept
FROM parent
"""

GOOGLE_CALLS_MONTH = """
WITH month AS (SELECT date_trunc('month', %(now)s::timestamptz, 'UTC') AS start)
SELECT coalesce(sum(a.calls), 0)::float8 AS value,
       to_char(max(month.start) AT TIME ZONE 'UTC', 'YYYY-MM') AS period,
       count(DISTINCT a.tenant_id) AS tenants,
       coalesce(sum(a.calls) FILTER (WHERE a.outcome NOT LIKE '2%%'), 0) AS not_answered_with_2xx
FROM month LEFT JOIN sync.api_calls a
  ON a.day >= (month.start AT TIME ZONE 'UTC')::date AND a.day <= (%(now)s AT TIME ZONE 'UTC')::date
 AND a.method <> %(not_a_call)s
"""

GOOGLE_TENANTS = """
SELECT count(DISTINCT tenant_id)::float8 AS value, count(*) AS users
FROM public.users WHERE google_api_enabled
"""

# A run that was killed cannot say how long it took: it counts as its time budget. The mean of those that finished is
# too low by exactly the killed ones.
_ENDED_RUNS = """
    SELECT CASE WHEN finished_at IS NULL THEN %(budget)s::float8 ELSE duration_seconds END AS seconds,
           finished_at IS NULL AS killed,
           finished_at IS NULL OR duration_seconds >= %(budget)s AND workspaces_served < workspaces_due AS timed_out
    FROM sync.runs
    WHERE started_at > %(now)s::timestamptz - %(window)s::interval AND started_at <= %(now)s
      AND (finished_at IS NOT NULL OR heartbeat_at < %(now)s::timestamptz - interval '5 minutes')
"""

SYNC_MEAN_SECONDS = f"""
SELECT avg(seconds) AS value, count(*) AS n, count(*) FILTER (WHERE killed) AS killed,
       percentile_cont(0.95) WITHIN GROUP (ORDER BY seconds) AS p95_seconds, max(seconds) AS longest_seconds
FROM ({_ENDED_RUNS}) AS runs
"""  # noqa: S608

SYNC_TIMEOUTS = f"""
SELECT count(*) FILTER (WHERE timed_out)::float8 AS value, count(*) AS n, count(*) FILTER (WHERE killed) AS killed
FROM ({_ENDED_RUNS}) AS runs
"""  # noqa: S608

SYNCED_EVENTS_DAY = """
WITH day AS (SELECT date_trunc('day', %(now)s::timestamptz, 'UTC') AS ending)
SELECT coalesce(sum(r.events_upserted + r.events_deleted), 0)::float8 AS value,
       count(*) AS n, min(day.ending) - interval '1 day' AS since,
       coalesce(sum(r.events_upserted), 0) AS written, coalesce(sum(r.events_deleted), 0) AS deleted
FROM day JOIN sync.runs r ON r.started_at >= day.ending - interval '1 day' AND r.started_at < day.ending
"""

AI_CHATS_MONTH = """
WITH month AS (SELECT date_trunc('month', %(now)s::timestamptz, 'UTC') AS start)
SELECT count(u.created_at)::float8 AS value, to_char(max(month.start) AT TIME ZONE 'UTC', 'YYYY-MM') AS period,
       count(DISTINCT u.tenant_id) AS tenants, coalesce(sum(u.input_tokens), 0) AS input_tokens,
       coalesce(sum(u.output_tokens), 0) AS output_tokens
FROM month LEFT JOIN public.ai_usage u ON u.created_at >= month.start AND u.created_at <= %(now)s
"""

# What the app itself reckons: all of the month, and of the day that no bill has yet.
AI_COST_OWN = """
WITH month AS (SELECT date_trunc('month', %(now)s::timestamptz, 'UTC') AS start,
                      date_trunc('day', %(now)s::timestamptz, 'UTC') AS today)
SELECT coalesce(sum(u.cost_usd), 0)::float8 AS value, to_char(max(month.start) AT TIME ZONE 'UTC', 'YYYY-MM') AS period,
       coalesce(sum(u.cost_usd) FILTER (WHERE u.created_at >= month.today), 0)::float8 AS today_usd,
       count(u.created_at) AS chats
FROM month LEFT JOIN public.ai_usage u ON u.created_at >= month.start AND u.created_at <= %(now)s
"""

# Slots that only superusers and reserved roles get are not there for clients. The count needs no pg_monitor: a role
# without it sees that a backend exists, and not what it does.
DATABASE_CONNECTIONS = """
SELECT count(*)::float8 / greatest(current_setting('max_connections')::int
         - current_setting('superuser_reserved_connections')::int
         - coalesce(current_setting('reserved_connections', true), '0')::int, 1) AS value,
       count(*) AS connections,
       count(*) FILTER (WHERE a.state = 'active') AS active,
       count(*) FILTER (WHERE a.state LIKE 'idle in transaction%%') AS idle_in_transaction,
       current_setting('max_connections')::int AS max_connections
FROM pg_stat_activity a
WHERE coalesce(a.backend_type, 'client backend') = 'client backend' AND a.pid <> pg_backend_pid()
"""

USERS_TOTAL = """
SELECT coalesce(sum(users), 0)::float8 AS value, count(*) AS tenants, max(users) AS users_of_the_largest_tenant
FROM (SELECT tenant_id, count(*) AS users FROM public.users GROUP BY tenant_id) AS by_tenant
"""

# The SaaS of the plan has no such table; `sql` in SCALING_CATALOGUE_FILE names the one there is.
COMPLEX_INCIDENTS = """
SELECT count(*)::float8 AS value
FROM public.incidents
WHERE started_at > %(now)s::timestamptz - interval '30 days'
  AND (cardinality(services) >= 2 OR coalesce(resolved_at, %(now)s) - started_at > interval '60 minutes')
"""
