-- Who of a Supabase project's people sees what. Written by hand; the migrations before it are the orchestrator's own.
--
-- Row-level security is on for every table since the migrations before. Here the roles of PostgREST and Realtime get what they
-- may see: somebody who has signed in sees the rows of the organisations they are a member of, nobody else sees anything, and
-- nobody writes: what changes a farm goes through its orchestrator. `service_role` and the owner are not held back.

-- In a schema of its own, which PostgREST does not show.
CREATE SCHEMA IF NOT EXISTS alloy_private;
REVOKE ALL ON SCHEMA alloy_private FROM PUBLIC;
GRANT USAGE ON SCHEMA alloy_private TO authenticated, service_role;

-- The organisations of who has signed in; with `admin`, those where they are one. It reads `members` as its owner: a policy
-- on that table that asked the table itself would ask for ever.
CREATE OR REPLACE FUNCTION alloy_private.own_orgs(need text DEFAULT 'viewer') RETURNS SETOF text
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = ''
AS $$
    SELECT org_id FROM public.members
    WHERE user_id = (SELECT auth.uid())::text AND (need = 'viewer' OR role = need)
$$;
REVOKE ALL ON FUNCTION alloy_private.own_orgs(text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION alloy_private.own_orgs(text) TO authenticated, service_role;

-- Supabase grants everything on every table to all roles by default.
REVOKE ALL ON jobs, attempts, events, artifacts, idempotency, workers, tokens, blobs, meta, images, members, orchestrators,
    sessions, log_chunks, log_parts, log_seals, _sqlx_migrations FROM PUBLIC, anon, authenticated;
GRANT SELECT ON jobs, attempts, events, artifacts, workers, images, members TO authenticated;
-- All but the hash.
GRANT SELECT (id, org_id, kind, role, name, shown, labels, created_at_ms, expires_at_ms, revoked_at_ms, used_by)
    ON tokens TO authenticated;
GRANT ALL ON jobs, attempts, events, artifacts, idempotency, workers, tokens, blobs, meta, images, members, orchestrators,
    sessions, log_chunks, log_parts, log_seals, _sqlx_migrations TO service_role;

GRANT USAGE ON SCHEMA alloy_views TO authenticated, service_role;
REVOKE ALL ON ALL TABLES IN SCHEMA alloy_views FROM PUBLIC, anon, authenticated;
GRANT SELECT ON ALL TABLES IN SCHEMA alloy_views TO authenticated, service_role;

CREATE POLICY own_org ON jobs FOR SELECT TO authenticated USING (org_id IN (SELECT alloy_private.own_orgs()));
CREATE POLICY own_org ON attempts FOR SELECT TO authenticated USING (org_id IN (SELECT alloy_private.own_orgs()));
CREATE POLICY own_org ON events FOR SELECT TO authenticated USING (org_id IN (SELECT alloy_private.own_orgs()));
CREATE POLICY own_org ON artifacts FOR SELECT TO authenticated USING (org_id IN (SELECT alloy_private.own_orgs()));
CREATE POLICY own_org ON workers FOR SELECT TO authenticated USING (org_id IN (SELECT alloy_private.own_orgs()));
CREATE POLICY own_org ON images FOR SELECT TO authenticated USING (org_id IN (SELECT alloy_private.own_orgs()));
-- As in the API: tokens and the other members are an admin's business.
CREATE POLICY admins ON tokens FOR SELECT TO authenticated USING (org_id IN (SELECT alloy_private.own_orgs('admin')));
CREATE POLICY admins ON members FOR SELECT TO authenticated USING (org_id IN (SELECT alloy_private.own_orgs('admin')));
CREATE POLICY oneself ON members FOR SELECT TO authenticated USING (user_id = (SELECT auth.uid())::text);

-- Realtime tells of what these two get, to whom the policies above show it.
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_publication WHERE pubname = 'supabase_realtime') THEN
        CREATE PUBLICATION supabase_realtime;
    END IF;
END
$$;
ALTER PUBLICATION supabase_realtime ADD TABLE jobs, events;
-- Row-level security is not asked about what is deleted: everybody would be sent the keys of what retention removes.
ALTER PUBLICATION supabase_realtime SET (publish = 'insert, update');
