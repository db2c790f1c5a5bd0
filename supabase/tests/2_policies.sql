-- Of every policy: one's own organisation is visible, another one is not, who has not signed in sees nothing, writes are refused.
BEGIN;
CREATE EXTENSION IF NOT EXISTS pgtap WITH SCHEMA extensions;
SELECT plan(84);

-- Two organisations with a row of everything. In `a` Ada is an admin and Vic a viewer, in `b` is Bob; Eve is nowhere.
INSERT INTO members (user_id, org_id, role, email, created_at_ms) VALUES
    ('00000000-0000-4000-8000-00000000000a', 'a', 'admin', 'ada@example.com', 1),
    ('00000000-0000-4000-8000-00000000000f', 'a', 'viewer', NULL, 2),
    ('00000000-0000-4000-8000-00000000000b', 'b', 'developer', NULL, 3);
INSERT INTO jobs (id, id_tail, org_id, version, state, attempt, state_json, spec, created_at_ms, created_by, events)
    SELECT 'job_' || org, 1, org, 1, 'queued', 0, '{}', '{"shell":"make"}', 1700000000123, 'tok', 1 FROM unnest(ARRAY['a', 'b']) org;
INSERT INTO attempts (job_id, attempt, org_id, worker_id, assigned_at_ms, timings, seq)
    SELECT 'job_' || org, 1, org, 'w', 1, '{"vm_ms":7}', 0 FROM unnest(ARRAY['a', 'b']) org;
INSERT INTO events (job_id, seq, org_id, at_ms, attempt, kind, state)
    SELECT 'job_' || org, 1, org, 1, 0, 'submitted', 'queued' FROM unnest(ARRAY['a', 'b']) org;
INSERT INTO artifacts (job_id, attempt, path, org_id, size_bytes, sha256, mode)
    SELECT 'job_' || org, 1, 'app', org, 1, repeat('0', 64), 420 FROM unnest(ARRAY['a', 'b']) org;
INSERT INTO workers (id, org_id, name, public_key, labels, host_labels, version, epoch, boot, draining, enrolled_at_ms, revoked)
    SELECT 'wkr_' || org, org, 'mini', repeat(org, 64), '{}', '{}', '1', 0, '', FALSE, 1, FALSE FROM unnest(ARRAY['a', 'b']) org;
INSERT INTO images (org_id, name, want, pinned, workers, labels, generation, at_ms)
    SELECT org, 'xcode', 'present', FALSE, '[]', '{}', 1, 1 FROM unnest(ARRAY['a', 'b']) org;
INSERT INTO tokens (id, org_id, hash, kind, role, name, shown, labels, created_at_ms)
    SELECT 'tok_' || org, org, repeat(org, 64), 'ci', 'developer', 'ci', 'x', '{}', 1 FROM unnest(ARRAY['a', 'b']) org;
INSERT INTO idempotency (org_id, caller, key, body, job_id, created_at_ms) VALUES ('a', 'c', 'k', repeat('0', 64), 'job_a', 1);
INSERT INTO blobs (digest, kind, org_id, size_bytes, object, created_at_ms) VALUES (repeat('0', 64), 'chunk', 'a', 1, 'o', 1);
INSERT INTO meta (name, value) VALUES ('pgtap', 'secret');

-- Who asks, whom they are, and how many rows of `a` and of `b` each table shows them.
SET LOCAL ROLE authenticated;

SET LOCAL "request.jwt.claims" = '{"sub":"00000000-0000-4000-8000-00000000000f","role":"authenticated"}';
SELECT results_eq('SELECT org_id FROM jobs', ARRAY['a'], 'a viewer sees the jobs of their organisation');
SELECT results_eq('SELECT org_id FROM attempts', ARRAY['a'], 'a viewer sees its attempts');
SELECT results_eq('SELECT org_id FROM events', ARRAY['a'], 'a viewer sees its events');
SELECT results_eq('SELECT org_id FROM artifacts', ARRAY['a'], 'a viewer sees its artifacts');
SELECT results_eq('SELECT org_id FROM workers', ARRAY['a'], 'a viewer sees its workers');
SELECT results_eq('SELECT org_id FROM images', ARRAY['a'], 'a viewer sees its images');
SELECT is_empty('SELECT id FROM tokens', 'a viewer sees no tokens');
SELECT results_eq('SELECT role FROM members', ARRAY['viewer'], 'a viewer sees themself among the members');
SELECT results_eq('SELECT org_id FROM alloy_views.jobs', ARRAY['a'], 'a viewer sees the view of the jobs');
SELECT results_eq('SELECT org_id FROM alloy_views.attempts', ARRAY['a'], 'a viewer sees the view of the attempts');
SELECT results_eq('SELECT org_id FROM alloy_views.events', ARRAY['a'], 'a viewer sees the view of the events');
SELECT results_eq('SELECT org_id FROM alloy_views.artifacts', ARRAY['a'], 'a viewer sees the view of the artifacts');
SELECT results_eq('SELECT org_id FROM alloy_views.workers', ARRAY['a'], 'a viewer sees the view of the workers');
SELECT results_eq('SELECT org_id FROM alloy_views.images', ARRAY['a'], 'a viewer sees the view of the images');
SELECT results_eq('SELECT role FROM alloy_views.members', ARRAY['viewer'], 'a viewer sees themself in the view of the members');
SELECT is_empty('SELECT id FROM alloy_views.tokens', 'a viewer sees nothing in the view of the tokens');
SELECT results_eq(
    $$ SELECT spec ->> 'shell', created_at = '2023-11-14 22:13:20.123+00' FROM alloy_views.jobs $$,
    $$ VALUES ('make', TRUE) $$, 'a view has jsonb and times to the millisecond');

SET LOCAL "request.jwt.claims" = '{"sub":"00000000-0000-4000-8000-00000000000a","role":"authenticated"}';
SELECT results_eq('SELECT org_id FROM jobs', ARRAY['a'], 'an admin sees the jobs of their organisation');
SELECT results_eq('SELECT id FROM tokens', ARRAY['tok_a'], 'an admin sees its tokens');
SELECT results_eq('SELECT id FROM alloy_views.tokens', ARRAY['tok_a'], 'an admin sees the view of the tokens');
SELECT results_eq('SELECT role FROM members ORDER BY role', ARRAY['admin', 'viewer'], 'an admin sees its members');

SET LOCAL "request.jwt.claims" = '{"sub":"00000000-0000-4000-8000-00000000000b","role":"authenticated"}';
SELECT results_eq('SELECT org_id FROM jobs', ARRAY['b'], 'another organisation is another world: jobs');
SELECT results_eq('SELECT org_id FROM attempts', ARRAY['b'], 'another organisation is another world: attempts');
SELECT results_eq('SELECT org_id FROM events', ARRAY['b'], 'another organisation is another world: events');
SELECT results_eq('SELECT org_id FROM artifacts', ARRAY['b'], 'another organisation is another world: artifacts');
SELECT results_eq('SELECT org_id FROM workers', ARRAY['b'], 'another organisation is another world: workers');
SELECT results_eq('SELECT org_id FROM images', ARRAY['b'], 'another organisation is another world: images');
SELECT results_eq('SELECT org_id FROM members', ARRAY['b'], 'another organisation is another world: members');
SELECT is_empty('SELECT id FROM tokens', 'a developer sees no tokens');

-- What no member sees, not even an admin.
SET LOCAL "request.jwt.claims" = '{"sub":"00000000-0000-4000-8000-00000000000a","role":"authenticated"}';
SELECT throws_ok('SELECT hash FROM tokens', '42501', NULL, 'no hash of a token');
SELECT throws_ok('SELECT * FROM tokens', '42501', NULL, 'not as one column among all');
SELECT throws_ok('SELECT * FROM meta', '42501', NULL, 'no secret of the farm');
SELECT throws_ok('SELECT * FROM idempotency', '42501', NULL, 'no idempotency key');
SELECT throws_ok('SELECT * FROM blobs', '42501', NULL, 'no place of a blob');
SELECT throws_ok('SELECT * FROM _sqlx_migrations', '42501', NULL, 'no bookkeeping');

-- Writes, by an admin of the organisation.
SELECT throws_ok(format('DELETE FROM %I', t), '42501', NULL, 'no member deletes: ' || t)
    FROM unnest(ARRAY['jobs', 'attempts', 'events', 'artifacts', 'workers', 'images', 'tokens', 'members', 'meta', 'blobs', 'idempotency']) t;
SELECT throws_ok(format('UPDATE %I SET org_id = ''a''', t), '42501', NULL, 'no member updates: ' || t)
    FROM unnest(ARRAY['jobs', 'attempts', 'events', 'artifacts', 'workers', 'images', 'tokens', 'members']) t;
SELECT throws_ok(format('TRUNCATE %I CASCADE', t), '42501', NULL, 'no member truncates: ' || t)
    FROM unnest(ARRAY['jobs', 'members', 'tokens', 'meta']) t;
SELECT throws_ok(
    $$ INSERT INTO members (user_id, org_id, role, created_at_ms) VALUES ('00000000-0000-4000-8000-00000000000a', 'b', 'admin', 1) $$,
    '42501', NULL, 'no member makes themself one elsewhere');
SELECT throws_ok(
    $$ INSERT INTO events (job_id, seq, org_id, at_ms, attempt, kind, state) VALUES ('job_a', 2, 'a', 1, 0, 'phase', 'queued') $$,
    '42501', NULL, 'no member writes history');
SELECT throws_ok($$ UPDATE alloy_views.jobs SET state = 'canceled' $$, '42501', NULL, 'nor through a view');
SELECT throws_ok($$ DELETE FROM alloy_views.artifacts $$, '42501', NULL, 'nor deletes through one');

-- Signed in, and no member; signed in as nobody.
SET LOCAL "request.jwt.claims" = '{"sub":"00000000-0000-4000-8000-00000000000e","role":"authenticated"}';
SELECT is_empty(format('SELECT org_id FROM %I', t), 'who is no member sees no ' || t)
    FROM unnest(ARRAY['jobs', 'attempts', 'events', 'artifacts', 'workers', 'images', 'members']) t;
SET LOCAL "request.jwt.claims" = '{}';
SELECT is_empty('SELECT org_id FROM jobs', 'a token without a person sees no jobs');
SELECT is_empty('SELECT org_id FROM members', 'a token without a person sees no members');

SET LOCAL ROLE anon;
SELECT throws_ok(format('SELECT 1 FROM %I', t), '42501', NULL, 'who has not signed in may not ask for ' || t)
    FROM unnest(ARRAY['jobs', 'attempts', 'events', 'artifacts', 'workers', 'images', 'tokens', 'members', 'meta']) t;

SET LOCAL ROLE service_role;
SELECT is((SELECT count(*) FROM jobs), 2::bigint, 'the service''s own role sees everything');

RESET ROLE;
SELECT is((SELECT count(*) FROM jobs WHERE org_id IN ('a', 'b')), 2::bigint, 'and so does the owner');
SELECT set_eq(
    $$ SELECT tablename::text FROM pg_publication_tables WHERE pubname = 'supabase_realtime' AND schemaname = 'public' $$,
    ARRAY['jobs', 'events'], 'Realtime tells of jobs and events');
SELECT ok((SELECT NOT pubdelete FROM pg_publication WHERE pubname = 'supabase_realtime'), 'and not of those that go');

SELECT * FROM finish();
ROLLBACK;
