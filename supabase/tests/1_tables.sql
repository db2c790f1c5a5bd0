-- Of every table: row-level security is on, nobody but the orchestrator writes, and strangers have no right at all.
BEGIN;
CREATE EXTENSION IF NOT EXISTS pgtap WITH SCHEMA extensions;
SELECT plan(9);

CREATE TEMP VIEW ours AS
    SELECT c.oid, c.relname, c.relkind, c.relrowsecurity, n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname IN ('public', 'alloy_views') AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
        AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = c.oid AND d.deptype = 'e');

SELECT cmp_ok((SELECT count(*) FROM ours WHERE relkind = 'r'), '>=', 12::bigint, 'there are tables to look at');
SELECT is_empty(
    $$ SELECT relname FROM ours WHERE relkind IN ('r', 'p') AND NOT relrowsecurity $$,
    'row-level security is on for every table');
SELECT is_empty($$ SELECT relname FROM ours WHERE relkind IN ('m', 'f') $$, 'nothing that row-level security cannot hold back');
SELECT is_empty(
    $$ SELECT relname FROM ours o JOIN pg_class c USING (oid, relname)
       WHERE o.relkind = 'v' AND NOT coalesce(c.reloptions, '{}') && ARRAY['security_invoker=on', 'security_invoker=true'] $$,
    'every view shows what its reader may see');
SELECT is_empty(
    $$ SELECT relname, what FROM ours, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']) what
       WHERE has_table_privilege('anon', oid, what) $$,
    'who has not signed in has no right to any table');
SELECT is_empty(
    $$ SELECT relname, what FROM ours, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'REFERENCES']) what
       WHERE relkind <> 'v' AND has_any_column_privilege('anon', oid, what) $$,
    'nor to any column');
SELECT is_empty(
    $$ SELECT relname, what FROM ours, unnest(ARRAY['INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']) what
       WHERE has_table_privilege('authenticated', oid, what) $$,
    'who has signed in may write nothing');
SELECT set_eq(
    $$ SELECT relname::text FROM ours WHERE nspname = 'public' AND has_any_column_privilege('authenticated', oid, 'SELECT') $$,
    ARRAY['jobs', 'attempts', 'events', 'artifacts', 'workers', 'images', 'members', 'tokens'],
    'and may ask these tables only');
SELECT set_eq(
    $$ SELECT tablename::text, policyname::text, cmd::text, roles::text FROM pg_policies WHERE schemaname = 'public' $$,
    $$ VALUES ('jobs', 'own_org', 'SELECT', '{authenticated}'), ('attempts', 'own_org', 'SELECT', '{authenticated}'),
        ('events', 'own_org', 'SELECT', '{authenticated}'), ('artifacts', 'own_org', 'SELECT', '{authenticated}'),
        ('workers', 'own_org', 'SELECT', '{authenticated}'), ('images', 'own_org', 'SELECT', '{authenticated}'),
        ('tokens', 'admins', 'SELECT', '{authenticated}'), ('members', 'admins', 'SELECT', '{authenticated}'),
        ('members', 'oneself', 'SELECT', '{authenticated}') $$,
    'each policy is known and has its test');

SELECT * FROM finish();
ROLLBACK;
