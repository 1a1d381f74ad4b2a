-- The SaaS's own tables, as a Supabase project would have them: row-level security everywhere, API roles with
-- grants by table and by column, helpers in schema auth. The pipeline reads them and writes none of them.

CREATE SCHEMA auth;
CREATE FUNCTION auth.jwt() RETURNS jsonb LANGUAGE sql STABLE
    RETURN coalesce(nullif(current_setting('request.jwt.claims', true), ''), '{}')::jsonb;
CREATE FUNCTION auth.uid() RETURNS uuid LANGUAGE sql STABLE
    RETURN (auth.jwt() ->> 'sub')::uuid;
CREATE FUNCTION auth.tenant_id() RETURNS uuid LANGUAGE sql STABLE
    RETURN (auth.jwt() ->> 'tenant_id')::uuid;
GRANT USAGE ON SCHEMA auth TO anon, authenticated, service_role;

CREATE TABLE public.tenants (
    id         uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    name       text NOT NULL,
    plan       text NOT NULL DEFAULT 'free' CHECK (plan IN ('free', 'team', 'enterprise')),
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE public.workspaces (
    id         uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    tenant_id  uuid NOT NULL REFERENCES public.tenants (id),
    name       text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX workspaces_tenant_id_idx ON public.workspaces (tenant_id);

CREATE TABLE public.users (
    id                 uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    tenant_id          uuid NOT NULL REFERENCES public.tenants (id),
    email              text NOT NULL UNIQUE,
    full_name          text,
    google_api_enabled boolean NOT NULL DEFAULT false,
    created_at         timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX users_tenant_id_idx ON public.users (tenant_id);

CREATE TABLE public.google_connections (
    id                      uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    tenant_id               uuid NOT NULL REFERENCES public.tenants (id),
    workspace_id            uuid NOT NULL REFERENCES public.workspaces (id),
    user_id                 uuid REFERENCES public.users (id) ON DELETE SET NULL,
    google_account          text NOT NULL,
    refresh_token_encrypted bytea NOT NULL,
    status                  text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'disconnected')),
    created_at              timestamptz NOT NULL DEFAULT now(),
    updated_at              timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX google_connections_workspace_id_idx ON public.google_connections (workspace_id);

CREATE TABLE public.audit_logs (
    id            uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    tenant_id     uuid NOT NULL REFERENCES public.tenants (id),
    workspace_id  uuid,
    user_id       uuid,
    action        text NOT NULL,
    resource_type text,
    resource_id   text,
    details       jsonb,
    ip_address    inet,
    user_agent    text,
    created_at    timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE public.audit_logs IS 'Who did what in which tenant. Appended to by the application, never changed.';
COMMENT ON COLUMN public.audit_logs.ip_address IS 'Personal data: visible to the service only.';
CREATE INDEX audit_logs_tenant_id_created_at_idx ON public.audit_logs (tenant_id, created_at DESC);
CREATE INDEX audit_logs_created_at_idx ON public.audit_logs (created_at);
CREATE INDEX audit_logs_resource_idx ON public.audit_logs (resource_type, resource_id) WHERE resource_id IS NOT NULL;

CREATE FUNCTION public.stamp_actor() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.user_id := coalesce(NEW.user_id, auth.uid());
    RETURN NEW;
END
$$;
CREATE TRIGGER audit_logs_stamp_actor BEFORE INSERT ON public.audit_logs
    FOR EACH ROW EXECUTE FUNCTION public.stamp_actor();

CREATE VIEW public.v_recent_audit_logs WITH (security_invoker = true) AS
SELECT a.id, a.tenant_id, t.name AS tenant_name, a.user_id, a.action, a.resource_type, a.resource_id, a.created_at
FROM public.audit_logs a JOIN public.tenants t ON t.id = a.tenant_id
WHERE a.created_at > now() - interval '30 days';

CREATE TABLE public.ai_usage (
    id            uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    tenant_id     uuid NOT NULL REFERENCES public.tenants (id),
    user_id       uuid REFERENCES public.users (id) ON DELETE SET NULL,
    model         text NOT NULL,
    feature       text NOT NULL,
    input_tokens  bigint NOT NULL CHECK (input_tokens >= 0),
    output_tokens bigint NOT NULL CHECK (output_tokens >= 0),
    cost_usd      numeric(12, 6) NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX ai_usage_tenant_id_created_at_idx ON public.ai_usage (tenant_id, created_at);

ALTER TABLE public.tenants ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.workspaces ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.users ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.google_connections ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.audit_logs ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.audit_logs FORCE ROW LEVEL SECURITY;
ALTER TABLE public.ai_usage ENABLE ROW LEVEL SECURITY;

CREATE POLICY own_tenant ON public.tenants FOR SELECT TO authenticated USING (id = (SELECT auth.tenant_id()));
CREATE POLICY own_tenant ON public.workspaces TO authenticated
    USING (tenant_id = (SELECT auth.tenant_id())) WITH CHECK (tenant_id = (SELECT auth.tenant_id()));
CREATE POLICY own_tenant ON public.users FOR SELECT TO authenticated USING (tenant_id = (SELECT auth.tenant_id()));
CREATE POLICY own_tenant ON public.google_connections FOR SELECT TO authenticated
    USING (tenant_id = (SELECT auth.tenant_id()));
CREATE POLICY own_tenant_reads ON public.audit_logs FOR SELECT TO authenticated
    USING (tenant_id = (SELECT auth.tenant_id()));
CREATE POLICY own_tenant_appends ON public.audit_logs FOR INSERT TO authenticated
    WITH CHECK (tenant_id = (SELECT auth.tenant_id()));
CREATE POLICY no_back_dating ON public.audit_logs AS RESTRICTIVE FOR INSERT TO authenticated
    WITH CHECK (created_at > now() - interval '1 day');
CREATE POLICY own_tenant ON public.ai_usage FOR SELECT TO authenticated USING (tenant_id = (SELECT auth.tenant_id()));

GRANT USAGE ON SCHEMA public TO anon, authenticated, service_role, pipeline;
GRANT ALL ON ALL TABLES IN SCHEMA public TO service_role;
GRANT SELECT ON public.tenants, public.users, public.ai_usage, public.v_recent_audit_logs TO authenticated;
GRANT SELECT, INSERT, UPDATE, DELETE ON public.workspaces TO authenticated;
GRANT SELECT (id, tenant_id, workspace_id, user_id, google_account, status, created_at)
    ON public.google_connections TO authenticated;
GRANT INSERT ON public.audit_logs TO authenticated;
GRANT SELECT (id, tenant_id, workspace_id, user_id, action, resource_type, resource_id, details, created_at)
    ON public.audit_logs TO authenticated;

GRANT SELECT ON public.tenants, public.workspaces, public.users, public.google_connections, public.audit_logs,
    public.ai_usage TO pipeline;

-- A sync worker that logs in with less than `pipeline`: it reads these four tables, of every tenant.
GRANT USAGE ON SCHEMA public TO pipeline_worker;
GRANT SELECT (id) ON public.tenants TO pipeline_worker;
GRANT SELECT (id, tenant_id) ON public.workspaces TO pipeline_worker;
GRANT SELECT (id, tenant_id, google_api_enabled) ON public.users TO pipeline_worker;
GRANT SELECT (id, tenant_id, workspace_id, user_id, google_account, refresh_token_encrypted, status)
    ON public.google_connections TO pipeline_worker;
CREATE POLICY sync_reads ON public.tenants FOR SELECT TO pipeline_worker USING (true);
CREATE POLICY sync_reads ON public.workspaces FOR SELECT TO pipeline_worker USING (true);
CREATE POLICY sync_reads ON public.users FOR SELECT TO pipeline_worker USING (true);
CREATE POLICY sync_reads ON public.google_connections FOR SELECT TO pipeline_worker USING (true);
