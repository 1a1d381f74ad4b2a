"""What was in force in each run of the sync, and who may read and switch it.

`sync.grant_roles()` stays the one call that gives the roles their rights; it now covers schema scaling as well.
"""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

UPGRADE = """
ALTER TABLE sync.runs ADD COLUMN incremental boolean, ADD COLUMN parallel boolean;
COMMENT ON COLUMN sync.runs.incremental IS
    'Sync tokens, push and adaptive polling were in force; NULL in runs older than the column.';
COMMENT ON COLUMN sync.runs.parallel IS 'The pool of workers was in force; NULL in runs older than the column.';

ALTER PROCEDURE sync.grant_roles() RENAME TO grant_roles_in_sync;
COMMENT ON PROCEDURE sync.grant_roles_in_sync() IS 'The part of sync.grant_roles() that is about schema sync.';
"""

# A run reads what is in force, and switches what a threshold asks for. The receiver of notifications and the SaaS's
# readers have no business here.
GRANT_ROLES = """
CREATE PROCEDURE sync.grant_roles() LANGUAGE plpgsql SET search_path = '' AS $procedure$
DECLARE
    present text[] := ARRAY(SELECT rolname FROM pg_catalog.pg_roles
                            WHERE rolname IN ('pipeline_worker', 'pipeline_operator'));
    one record;
BEGIN
    CALL sync.grant_roles_in_sync();
    FOR one IN
        SELECT c.relname, p.polname FROM pg_catalog.pg_policy p JOIN pg_catalog.pg_class c ON c.oid = p.polrelid
        WHERE c.relnamespace = 'scaling'::pg_catalog.regnamespace AND p.polname IN ('worker', 'operator')
    LOOP
        EXECUTE pg_catalog.format('DROP POLICY %I ON scaling.%I', one.polname, one.relname);
    END LOOP;
    FOR one IN
        SELECT relname FROM pg_catalog.pg_class
        WHERE relnamespace = 'scaling'::pg_catalog.regnamespace AND relkind = 'r' AND relrowsecurity
    LOOP
        IF 'pipeline_worker' = ANY (present) THEN
            EXECUTE pg_catalog.format('CREATE POLICY worker ON scaling.%I TO pipeline_worker USING (true)',
                                      one.relname);
        END IF;
        IF 'pipeline_operator' = ANY (present) THEN
            EXECUTE pg_catalog.format('GRANT SELECT ON scaling.%I TO pipeline_operator', one.relname);
            EXECUTE pg_catalog.format(
                'CREATE POLICY operator ON scaling.%I FOR SELECT TO pipeline_operator USING (true)', one.relname);
        END IF;
    END LOOP;
    IF 'pipeline_worker' = ANY (present) THEN
        GRANT USAGE ON SCHEMA scaling TO pipeline_worker;
        GRANT SELECT, UPDATE ON scaling.episodes TO pipeline_worker;
        GRANT SELECT, INSERT, UPDATE ON scaling.capabilities TO pipeline_worker;
        GRANT INSERT ON scaling.capability_changes TO pipeline_worker;
    END IF;
    IF 'pipeline_operator' = ANY (present) THEN
        GRANT USAGE ON SCHEMA scaling TO pipeline_operator;
    END IF;
END
$procedure$;
COMMENT ON PROCEDURE sync.grant_roles() IS
    'Gives the roles pipeline_worker, pipeline_webhook, pipeline_reader and pipeline_operator, as far as they exist, '
    'exactly their rights in the schemas sync and scaling, and forces row-level security on every table of sync. Safe '
    'to call again.';
"""

DOWNGRADE = """
DO $$
DECLARE
    one record;
BEGIN
    FOR one IN
        SELECT c.relname, p.polname FROM pg_catalog.pg_policy p JOIN pg_catalog.pg_class c ON c.oid = p.polrelid
        WHERE c.relnamespace = 'scaling'::pg_catalog.regnamespace AND p.polname IN ('worker', 'operator')
    LOOP
        EXECUTE pg_catalog.format('DROP POLICY %I ON scaling.%I', one.polname, one.relname);
    END LOOP;
    FOR one IN SELECT rolname FROM pg_catalog.pg_roles WHERE rolname IN ('pipeline_worker', 'pipeline_operator') LOOP
        EXECUTE pg_catalog.format('REVOKE ALL ON ALL TABLES IN SCHEMA scaling FROM %I', one.rolname);
        EXECUTE pg_catalog.format('REVOKE ALL ON SCHEMA scaling FROM %I', one.rolname);
    END LOOP;
END
$$;
DROP PROCEDURE sync.grant_roles();
ALTER PROCEDURE sync.grant_roles_in_sync() RENAME TO grant_roles;
ALTER TABLE sync.runs DROP COLUMN incremental, DROP COLUMN parallel;
"""


def upgrade() -> None:
    op.execute(UPGRADE)
    op.execute(GRANT_ROLES)
    op.execute("CALL sync.grant_roles()")


def downgrade() -> None:
    op.execute(DOWNGRADE)
