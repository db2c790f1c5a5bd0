-- For a project on this machine (`supabase start`, `supabase db reset`): the first member, an admin. Nothing else is seeded:
-- jobs come from the farm. The person is made in Studio or by the Auth API, with this id.
INSERT INTO members (user_id, org_id, role, email, created_at_ms)
VALUES ('00000000-0000-4000-8000-000000000001', 'org_0004000000e008000000000001', 'admin', 'admin@example.com', 0)
ON CONFLICT DO NOTHING;
