"""Who may do what in schema sync: roles, grants, row-level security that binds the owner too.

`sync.grant_roles()` holds all of it and may be called again: after a missing role was created, and at the end of a
later migration that adds a table.
"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# Roles belong to the whole server. Another database may be migrated at the same moment, and a role that owns the
# schema need not be one that may create roles: neither fails the migration. `python -m scaling check` names what is
# missing.
ROLES = """
DO $$
DECLARE
    wanted text;
BEGIN
    FOREACH wanted IN ARRAY ARRAY['pipeline_worker', 'pipeline_webhook', 'pipeline_reader', 'pipeline_operator'] LOOP
        CONTINUE WHEN EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = wanted);
        BEGIN
            EXECUTE pg_catalog.format('CREATE ROLE %I NOLOGIN', wanted);
        EXCEPTION
            WHEN duplicate_object OR unique_violation THEN
                NULL;
            WHEN insufficient_privilege THEN
                RAISE NOTICE 'role % does not exist and % may not create it; create it, then CALL sync.grant_roles()',
                    wanted, current_user;
        END;
    END LOOP;
END
$$;
"""

# A body in SQL-standard form is bound to its functions here, so no search_path of a caller changes what it means.
CURRENT_TENANT = """
CREATE FUNCTION sync.current_tenant() RETURNS uuid LANGUAGE sql STABLE PARALLEL SAFE
    RETURN CASE WHEN nullif(current_setting('request.jwt.claims', true), '') IS NOT NULL
                THEN (current_setting('request.jwt.claims', true)::jsonb ->> 'tenant_id')::uuid
                ELSE nullif(current_setting('app.tenant_id', true), '')::uuid END;
COMMENT ON FUNCTION sync.current_tenant() IS
    'Whose rows pipeline_reader sees: the claim tenant_id of the request''s JWT where there is one (Supabase), '
    'else the setting app.tenant_id; NULL, and no rows, without either.';
"""

GRANT_ROLES = """
CREATE PROCEDURE sync.grant_roles() LANGUAGE plpgsql SET search_path = '' AS $procedure$
DECLARE
    present text[] := ARRAY(SELECT rolname FROM pg_catalog.pg_roles
                            WHERE rolname IN ('pipeline_worker', 'pipeline_webhook', 'pipeline_reader',
                                              'pipeline_operator'));
    one record;
BEGIN
    REVOKE ALL ON SCHEMA sync FROM PUBLIC;
    REVOKE ALL ON ALL TABLES IN SCHEMA sync FROM PUBLIC;
    REVOKE ALL ON ALL SEQUENCES IN SCHEMA sync FROM PUBLIC;
    REVOKE ALL ON ALL ROUTINES IN SCHEMA sync FROM PUBLIC;
    FOR one IN SELECT unnest AS role FROM pg_catalog.unnest(present) LOOP
        EXECUTE pg_catalog.format('REVOKE ALL ON ALL TABLES IN SCHEMA sync FROM %I', one.role);
        EXECUTE pg_catalog.format('GRANT USAGE ON SCHEMA sync TO %I', one.role);
    END LOOP;
    FOR one IN
        SELECT c.relname, p.polname FROM pg_catalog.pg_policy p JOIN pg_catalog.pg_class c ON c.oid = p.polrelid
        WHERE c.relnamespace = 'sync'::pg_catalog.regnamespace
          AND p.polname IN ('worker', 'webhook', 'reader', 'operator')
    LOOP
        EXECUTE pg_catalog.format('DROP POLICY %I ON sync.%I', one.polname, one.relname);
    END LOOP;
    FOR one IN
        SELECT relname FROM pg_catalog.pg_class
        WHERE relnamespace = 'sync'::pg_catalog.regnamespace AND relkind IN ('r', 'p')
    LOOP
        EXECUTE pg_catalog.format('ALTER TABLE sync.%I ENABLE ROW LEVEL SECURITY', one.relname);
        EXECUTE pg_catalog.format('ALTER TABLE sync.%I FORCE ROW LEVEL SECURITY', one.relname);
        IF 'pipeline_worker' = ANY (present) THEN
            EXECUTE pg_catalog.format('CREATE POLICY worker ON sync.%I TO pipeline_worker USING (true)', one.relname);
        END IF;
    END LOOP;

    -- A run of the sync: exactly the verbs it uses.
    IF 'pipeline_worker' = ANY (present) THEN
        GRANT SELECT, INSERT, UPDATE, DELETE ON sync.workspace_state, sync.connection_state, sync.calendar_state,
            sync.event_rows, sync.quarantine, sync.channels, sync.runs, sync.api_calls, sync.call_buckets,
            sync.call_days, sync.freshness TO pipeline_worker;
        GRANT SELECT, DELETE ON sync.webhook_messages TO pipeline_worker;
        GRANT SELECT ON sync.calendar_events, sync.calendar_event_changes, sync.calendar_status
            TO pipeline_worker;
    END IF;

    -- The receiver of notifications: finds a channel, says that something changed, counts. It faces the internet, so it
    -- reads no event, no token and no grant.
    IF 'pipeline_webhook' = ANY (present) THEN
        GRANT SELECT (channel_id, tenant_id, workspace_id, connection_id, calendar_id, token_hash, resource_id,
                      messages),
            UPDATE (resource_id, messages, last_message_at) ON sync.channels TO pipeline_webhook;
        GRANT SELECT (tenant_id, workspace_id, calendar_id, deleted_at, due_at, notified_at, last_started_at,
                      consecutive_failures, breaker_until),
            UPDATE (due_at, notified_at) ON sync.calendar_state TO pipeline_webhook;
        GRANT SELECT (tenant_id, workspace_id, connection_id, list_due_at, list_notified_at, list_started_at,
                      consecutive_failures),
            UPDATE (list_due_at, list_notified_at) ON sync.connection_state TO pipeline_webhook;
        GRANT SELECT, INSERT, UPDATE (messages) ON sync.webhook_messages TO pipeline_webhook;
        CREATE POLICY webhook ON sync.channels TO pipeline_webhook USING (true);
        CREATE POLICY webhook ON sync.calendar_state TO pipeline_webhook USING (true);
        CREATE POLICY webhook ON sync.connection_state TO pipeline_webhook USING (true);
        CREATE POLICY webhook ON sync.webhook_messages TO pipeline_webhook USING (true);
    END IF;

    -- The SaaS, on behalf of one tenant: its events and how fresh they are. The views run with the reader's rights, so
    -- the columns they read are granted too.
    IF 'pipeline_reader' = ANY (present) THEN
        GRANT EXECUTE ON FUNCTION sync.current_tenant() TO pipeline_reader;
        GRANT SELECT ON sync.calendar_events, sync.calendar_event_changes, sync.calendar_status TO pipeline_reader;
        GRANT SELECT (tenant_id, workspace_id, calendar_id, generation, event_id, status, event_type, summary,
                      description, location, start_at, start_date, start_zone, end_at, end_date, end_zone, recurrence,
                      recurring_event_id, original_start_at, original_start_date, ical_uid, organizer_email, visibility,
                      transparency, attendees_omitted, sequence, created_at, updated_at, deleted_at, changed_at, flaws,
                      raw) ON sync.event_rows TO pipeline_reader;
        GRANT SELECT (tenant_id, workspace_id, calendar_id, connection_id, summary, time_zone, access_role, is_primary,
                      discovered_at, deleted_at, live_generation, lease_until, due_at, last_started_at,
                      last_finished_at, last_succeeded_at, last_full_sync_at, last_outcome, last_error,
                      consecutive_failures, breaker_until) ON sync.calendar_state TO pipeline_reader;
        GRANT SELECT (tenant_id, workspace_id, connection_id, status, parked_until) ON sync.connection_state
            TO pipeline_reader;
        CREATE POLICY reader ON sync.event_rows FOR SELECT TO pipeline_reader
            USING (tenant_id = (SELECT sync.current_tenant()));
        CREATE POLICY reader ON sync.calendar_state FOR SELECT TO pipeline_reader
            USING (tenant_id = (SELECT sync.current_tenant()));
        CREATE POLICY reader ON sync.connection_state FOR SELECT TO pipeline_reader
            USING (tenant_id = (SELECT sync.current_tenant()));
    END IF;

    -- People who look after the sync: how every run, calendar and connection is; no event, no name, no token.
    IF 'pipeline_operator' = ANY (present) THEN
        GRANT SELECT ON sync.workspace_state, sync.runs, sync.api_calls, sync.webhook_messages, sync.call_days,
            sync.freshness, sync.calendar_status TO pipeline_operator;
        GRANT SELECT (tenant_id, workspace_id, connection_id, status, access_token_expires_at, parked_until,
                      lease_owner, lease_epoch, lease_until, list_due_at, list_started_at, list_finished_at,
                      list_notified_at, list_watch_retry_at, last_error, consecutive_failures, failed_visits)
            ON sync.connection_state TO pipeline_operator;
        GRANT SELECT (tenant_id, workspace_id, calendar_id, connection_id, time_zone, access_role, is_primary,
                      discovered_at, missing_from_lists, deleted_at, live_generation, next_generation, lease_epoch,
                      lease_owner, lease_until, due_at, last_started_at, last_finished_at, last_succeeded_at,
                      last_full_sync_at, last_outcome, last_error, consecutive_failures, gone_count, breaker_until,
                      notified_at, push_unsupported_at, watch_retry_at, change_count, observed_days)
            ON sync.calendar_state TO pipeline_operator;
        GRANT SELECT (tenant_id, workspace_id, calendar_id, fingerprint, event_id, reason, generation, first_seen_at,
                      last_seen_at) ON sync.quarantine TO pipeline_operator;
        GRANT SELECT (channel_id, tenant_id, workspace_id, connection_id, calendar_id, state, created_at, expires_at,
                      messages, last_message_at) ON sync.channels TO pipeline_operator;
        GRANT SELECT (scope, tokens, refilled_at, factor, factor_at) ON sync.call_buckets TO pipeline_operator;
        FOR one IN
            SELECT relname FROM pg_catalog.pg_class
            WHERE relnamespace = 'sync'::pg_catalog.regnamespace AND relkind IN ('r', 'p') AND relname <> 'event_rows'
        LOOP
            EXECUTE pg_catalog.format(
                'CREATE POLICY operator ON sync.%I FOR SELECT TO pipeline_operator USING (true)', one.relname);
        END LOOP;
    END IF;
END
$procedure$;
COMMENT ON PROCEDURE sync.grant_roles() IS
    'Gives the roles pipeline_worker, pipeline_webhook, pipeline_reader and pipeline_operator, as far as they exist, '
    'exactly their rights in this schema, and forces row-level security on every table. Safe to call again.';
"""

DOWNGRADE = """
DO $$
DECLARE
    one record;
BEGIN
    FOR one IN
        SELECT c.relname, p.polname FROM pg_catalog.pg_policy p JOIN pg_catalog.pg_class c ON c.oid = p.polrelid
        WHERE c.relnamespace = 'sync'::pg_catalog.regnamespace
          AND p.polname IN ('worker', 'webhook', 'reader', 'operator')
    LOOP
        EXECUTE pg_catalog.format('DROP POLICY %I ON sync.%I', one.polname, one.relname);
    END LOOP;
    FOR one IN
        SELECT relname FROM pg_catalog.pg_class
        WHERE relnamespace = 'sync'::pg_catalog.regnamespace AND relkind IN ('r', 'p')
    LOOP
        EXECUTE pg_catalog.format('ALTER TABLE sync.%I NO FORCE ROW LEVEL SECURITY', one.relname);
    END LOOP;
    FOR one IN
        SELECT rolname FROM pg_catalog.pg_roles
        WHERE rolname IN ('pipeline_worker', 'pipeline_webhook', 'pipeline_reader', 'pipeline_operator')
    LOOP
        EXECUTE pg_catalog.format('REVOKE ALL ON ALL TABLES IN SCHEMA sync FROM %I', one.rolname);
        EXECUTE pg_catalog.format('REVOKE ALL ON SCHEMA sync FROM %I', one.rolname);
    END LOOP;
END
$$;
DROP PROCEDURE sync.grant_roles();
DROP FUNCTION sync.current_tenant();
"""


def upgrade() -> None:
    op.execute(ROLES)
    op.execute(CURRENT_TENANT)
    op.execute(GRANT_ROLES)
    op.execute("CALL sync.grant_roles()")


def downgrade() -> None:
    op.execute(DOWNGRADE)
