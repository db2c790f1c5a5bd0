-- Every text that the version before migration 4 sent, as it was. The schema of today must understand it.
-- OBJECTS
SELECT DISTINCT object FROM blobs
-- ENDED_LOGS
SELECT job_id, attempt, log_len FROM attempts WHERE log_len > 0
-- SAVEPOINT
SAVEPOINT alloy
-- ROLLBACK
ROLLBACK TO SAVEPOINT alloy
-- RELEASE
RELEASE SAVEPOINT alloy
-- INSERT_BLOB
INSERT INTO blobs (digest, kind, org_id, size_bytes, object, frame_at, stored_bytes, zstd, frame_bytes, raw_at, created_at_ms) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) ON CONFLICT (digest, kind, org_id) DO NOTHING
-- BLOBS
WITH asked (digest, kind, org_id) AS (VALUES (CAST($1 AS TEXT), CAST($2 AS TEXT), CAST($3 AS TEXT))) SELECT blobs.digest, blobs.kind, blobs.org_id, blobs.size_bytes, blobs.object, blobs.frame_at, blobs.stored_bytes, blobs.zstd, blobs.frame_bytes, blobs.raw_at, blobs.created_at_ms FROM asked JOIN blobs ON blobs.digest = CAST(asked.digest AS TEXT) AND blobs.kind = CAST(asked.kind AS TEXT) AND (blobs.org_id = asked.org_id OR asked.org_id IS NULL)
-- INSERT_META
INSERT INTO meta (name, value) VALUES ($1, $2) ON CONFLICT (name) DO NOTHING
-- META
SELECT name, value FROM meta WHERE name = $1
-- USE_JOIN_TOKEN
UPDATE tokens SET used_by = $1 WHERE hash = $2 AND org_id = $3 AND kind = 'join' AND used_by IS NULL AND revoked_at_ms IS NULL AND (expires_at_ms IS NULL OR expires_at_ms > $4)
-- INSERT_WORKER
INSERT INTO workers (id, org_id, name, public_key, labels, host_labels, version, epoch, boot, draining, drain_note, enrolled_at_ms, seen_at_ms, revoked) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)
-- SET_WORKER
UPDATE workers SET draining = $1, drain_note = $2 WHERE id = $3 AND org_id = $4
-- REVOKE_WORKER
UPDATE workers SET revoked = TRUE WHERE id = $1 AND org_id = $2
-- OPEN_SESSION
UPDATE workers SET epoch = epoch + 1, boot = $1, host_labels = $2, version = $3, seen_at_ms = $4 WHERE id = $5 AND revoked = FALSE RETURNING epoch
-- SEEN
UPDATE workers SET seen_at_ms = CASE WHEN seen_at_ms > $1 THEN seen_at_ms ELSE $1 END WHERE id = $2
-- LEFT
UPDATE workers SET seen_at_ms = CASE WHEN seen_at_ms > $1 THEN seen_at_ms ELSE $1 END, boot = '' WHERE id = $2
-- INSERT_TOKEN
INSERT INTO tokens (id, org_id, hash, kind, role, name, shown, labels, created_at_ms, expires_at_ms, revoked_at_ms, used_by) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12) ON CONFLICT DO NOTHING
-- REVOKE_TOKEN
UPDATE tokens SET revoked_at_ms = COALESCE(revoked_at_ms, $1) WHERE id = $2 AND org_id = $3
-- WORKER
SELECT id, org_id, name, public_key, labels, host_labels, version, epoch, boot, draining, drain_note, enrolled_at_ms, seen_at_ms, revoked FROM workers WHERE id = $1 AND (org_id = $2 OR $2 IS NULL)
-- WORKER_BY_KEY
SELECT id, org_id, name, public_key, labels, host_labels, version, epoch, boot, draining, drain_note, enrolled_at_ms, seen_at_ms, revoked FROM workers WHERE public_key = $1
-- WORKERS
SELECT id, org_id, name, public_key, labels, host_labels, version, epoch, boot, draining, drain_note, enrolled_at_ms, seen_at_ms, revoked FROM workers WHERE org_id BETWEEN $1 AND $2
-- TOKEN
SELECT id, org_id, hash, kind, role, name, shown, labels, created_at_ms, expires_at_ms, revoked_at_ms, used_by FROM tokens WHERE hash = $1
-- TOKENS
SELECT id, org_id, hash, kind, role, name, shown, labels, created_at_ms, expires_at_ms, revoked_at_ms, used_by FROM tokens WHERE org_id BETWEEN $1 AND $2 AND kind <> 'join'
-- SET_IMAGE
INSERT INTO images (org_id, name, want, pinned, workers, labels, generation, at_ms) VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (org_id, name) DO UPDATE SET want = excluded.want, pinned = excluded.pinned, workers = excluded.workers, labels = excluded.labels, generation = excluded.generation, at_ms = excluded.at_ms WHERE images.generation <= excluded.generation
-- DROP_IMAGE
DELETE FROM images WHERE org_id = $1 AND name = $2
-- IMAGES
SELECT org_id, name, want, pinned, workers, labels, generation, at_ms FROM images WHERE org_id BETWEEN $1 AND $2
-- INSERT_KEY
INSERT INTO idempotency (caller, key, org_id, body, job_id, created_at_ms) VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (caller, key, org_id) DO NOTHING
-- KEY
SELECT job_id, body FROM idempotency WHERE caller = $1 AND key = $2 AND org_id = $3
-- INSERT_JOB
INSERT INTO jobs (id, id_tail, org_id, version, state, phase, reason, attempt, worker_id, finished_at_ms, state_json, events, spec, source, created_at_ms, created_by) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16) ON CONFLICT (id) DO NOTHING
-- ADVANCE_JOB
WITH new (id, version, state, phase, reason, attempt, worker_id, finished_at_ms, state_json, events, held_attempt, held_by, held_epoch, held_unseen) AS (VALUES (CAST($1 AS TEXT), CAST($2 AS BIGINT), CAST($3 AS TEXT), CAST($4 AS TEXT), CAST($5 AS TEXT), CAST($6 AS BIGINT), CAST($7 AS TEXT), CAST($8 AS BIGINT), CAST($9 AS TEXT), CAST($10 AS BIGINT), CAST($11 AS BIGINT), CAST($12 AS TEXT), CAST($13 AS BIGINT), CAST($14 AS BIGINT))) UPDATE jobs SET version = new.version, state = new.state, phase = new.phase, reason = new.reason, attempt = new.attempt, worker_id = new.worker_id, finished_at_ms = new.finished_at_ms, state_json = new.state_json, events = new.events FROM new WHERE jobs.id = CAST(new.id AS TEXT) AND jobs.version = new.version - 1 AND (new.held_by IS NULL OR jobs.worker_id = new.held_by) AND (new.held_attempt IS NULL OR (jobs.attempt = new.held_attempt AND EXISTS (SELECT 1 FROM workers WHERE workers.id = new.held_by AND workers.epoch = new.held_epoch))) AND (new.held_unseen IS NULL OR EXISTS (SELECT 1 FROM workers WHERE workers.id = new.held_by AND (workers.seen_at_ms IS NULL OR workers.seen_at_ms < new.held_unseen)))
-- PUT_ATTEMPT
INSERT INTO attempts (job_id, attempt, org_id, worker_id, assigned_at_ms, ended_at_ms, outcome, end_json, timings, teardown_ms, seq, log_len, facts) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13) ON CONFLICT (job_id, attempt) DO UPDATE SET ended_at_ms = excluded.ended_at_ms, outcome = excluded.outcome, end_json = excluded.end_json, timings = excluded.timings, seq = excluded.seq, facts = excluded.facts, teardown_ms = COALESCE(excluded.teardown_ms, attempts.teardown_ms), log_len = COALESCE(excluded.log_len, attempts.log_len)
-- CLOSE_ATTEMPT
WITH closed (job_id, attempt, worker_id, teardown_ms, log_len) AS (VALUES (CAST($1 AS TEXT), CAST($2 AS BIGINT), CAST($3 AS TEXT), CAST($4 AS BIGINT), CAST($5 AS BIGINT))) UPDATE attempts SET teardown_ms = closed.teardown_ms, log_len = closed.log_len FROM closed WHERE attempts.job_id = CAST(closed.job_id AS TEXT) AND attempts.attempt = CAST(closed.attempt AS BIGINT) AND attempts.worker_id = CAST(closed.worker_id AS TEXT)
-- INSERT_EVENT
INSERT INTO events (job_id, seq, org_id, at_ms, attempt, kind, state, phase, reason, worker_id, message, artifact) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
-- INSERT_ARTIFACT
INSERT INTO artifacts (job_id, attempt, path, org_id, size_bytes, sha256, mode, link) VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (job_id, attempt, path) DO NOTHING
-- JOB
SELECT id, org_id, version, state, state_json, spec, source, created_at_ms, created_by, events FROM jobs WHERE id = $1 AND (org_id = $2 OR $2 IS NULL)
-- JOBS_ENDING
SELECT id FROM jobs WHERE id_tail = $1 AND (org_id = $2 OR $2 IS NULL) AND substr(id, length(id) - length($3) + 1) = $3 ORDER BY id LIMIT 2
-- JOBS_OF_ORG
SELECT id, org_id, version, state, state_json, spec, source, created_at_ms, created_by, events FROM jobs WHERE org_id = $1 AND id < $2 AND state IN ($3, $4, $5, $6, $7, $8, $9, $10, $11, $12) ORDER BY id DESC LIMIT $13
-- JOBS_OF_CALLER
SELECT id, org_id, version, state, state_json, spec, source, created_at_ms, created_by, events FROM jobs WHERE created_by = $1 AND id < $2 AND state IN ($3, $4, $5, $6, $7, $8, $9, $10, $11, $12) AND (org_id = $14 OR $14 IS NULL) ORDER BY id DESC LIMIT $13
-- JOBS_OF_FARM
SELECT id, org_id, version, state, state_json, spec, source, created_at_ms, created_by, events FROM jobs WHERE id < $1 AND state IN ($2, $3, $4, $5, $6, $7, $8, $9, $10, $11) ORDER BY id DESC LIMIT $12
-- LIVE_JOBS
SELECT id, org_id, version, state, state_json, spec, source, created_at_ms, created_by, events FROM jobs WHERE finished_at_ms IS NULL AND id > $1 ORDER BY id LIMIT $2
-- HELD_JOBS
SELECT id, org_id, version, state, state_json, spec, source, created_at_ms, created_by, events FROM jobs WHERE worker_id = $1 ORDER BY id
-- ATTEMPTS
SELECT job_id, attempt, org_id, worker_id, assigned_at_ms, ended_at_ms, end_json, timings, teardown_ms, seq, log_len, facts FROM attempts WHERE job_id = $1 AND (org_id = $2 OR $2 IS NULL) ORDER BY attempt
-- ATTEMPT
SELECT job_id, attempt, org_id, worker_id, assigned_at_ms, ended_at_ms, end_json, timings, teardown_ms, seq, log_len, facts FROM attempts WHERE job_id = $1 AND attempt = $3 AND (org_id = $2 OR $2 IS NULL)
-- EVENTS
SELECT job_id, seq, at_ms, attempt, kind, state, phase, reason, worker_id, message, artifact FROM events WHERE job_id = $1 AND seq > $3 AND (org_id = $2 OR $2 IS NULL) ORDER BY seq LIMIT $4
-- ARTIFACTS
SELECT job_id, attempt, path, org_id, size_bytes, sha256, mode, link FROM artifacts WHERE job_id = $1 AND (org_id = $2 OR $2 IS NULL)
-- ARTIFACT
SELECT job_id, attempt, path, org_id, size_bytes, sha256, mode, link FROM artifacts WHERE job_id = $1 AND attempt = $3 AND path = $4 AND (org_id = $2 OR $2 IS NULL)
-- SET_MEMBER
INSERT INTO members (user_id, org_id, role, email, created_at_ms) VALUES ($1, $2, $3, $4, $5) ON CONFLICT (user_id, org_id) DO UPDATE SET role = excluded.role, email = COALESCE(excluded.email, members.email)
-- DROP_MEMBER
DELETE FROM members WHERE user_id = $1 AND org_id = $2
-- MEMBERSHIPS
SELECT user_id, org_id, role, email, created_at_ms FROM members WHERE user_id = $1
-- MEMBERS
SELECT user_id, org_id, role, email, created_at_ms FROM members WHERE org_id BETWEEN $1 AND $2
-- ADD_CHUNKS (Postgres)
INSERT INTO log_chunks (job_id, attempt, start_at, bytes) SELECT * FROM UNNEST($1::TEXT[], $2::BIGINT[], $3::BIGINT[], $4::BYTEA[])
-- LOG_END (Postgres)
SELECT GREATEST(COALESCE((SELECT start_at + length(bytes) FROM log_chunks WHERE job_id = $1 AND attempt = $2 ORDER BY start_at DESC LIMIT 1), 0), COALESCE((SELECT end_at FROM log_parts WHERE job_id = $1 AND attempt = $2 ORDER BY start_at DESC LIMIT 1), 0)) AS len
-- LOG_ENDS (Postgres)
SELECT jobs.id AS job_id, jobs.attempt, GREATEST(COALESCE((SELECT start_at + length(bytes) FROM log_chunks AS c WHERE c.job_id = jobs.id AND c.attempt = jobs.attempt ORDER BY start_at DESC LIMIT 1), 0), COALESCE((SELECT end_at FROM log_parts AS p WHERE p.job_id = jobs.id AND p.attempt = jobs.attempt ORDER BY start_at DESC LIMIT 1), 0)) AS len FROM UNNEST($1::TEXT[]) AS asked (job_id) JOIN jobs ON jobs.id = asked.job_id WHERE jobs.attempt >= 1
-- READ_CHUNKS (Postgres)
SELECT start_at, bytes FROM log_chunks WHERE job_id = $1 AND attempt = $2 AND start_at > $3::BIGINT - $5::BIGINT AND start_at < $4 ORDER BY start_at
-- LOG_PART (Postgres)
SELECT start_at, end_at, object FROM log_parts WHERE job_id = $1 AND attempt = $2 AND start_at <= $3 AND end_at > $3 ORDER BY start_at DESC LIMIT 1
-- LOG_SEAL (Postgres)
SELECT len, sha256 FROM log_seals WHERE job_id = $1 AND attempt = $2
-- ADD_SEAL (Postgres)
INSERT INTO log_seals (job_id, attempt, len, sha256) VALUES ($1, $2, $3, $4) ON CONFLICT (job_id, attempt) DO NOTHING
-- ADD_PART (Postgres)
INSERT INTO log_parts (job_id, attempt, start_at, end_at, object) VALUES ($1, $2, $3, $4, $5) ON CONFLICT (job_id, attempt, start_at) DO NOTHING
-- DROP_CHUNKS (Postgres)
DELETE FROM log_chunks WHERE job_id = $1 AND attempt = $2 AND start_at >= $3 AND start_at < $4
-- LOGS_TO_MOVE (Postgres)
SELECT c.job_id, c.attempt, MIN(c.start_at) AS start_at, SUM(length(c.bytes))::BIGINT AS bytes FROM log_chunks AS c GROUP BY c.job_id, c.attempt HAVING SUM(length(c.bytes)) >= $1 OR EXISTS (SELECT 1 FROM log_seals AS s WHERE s.job_id = c.job_id AND s.attempt = c.attempt) LIMIT $2
-- BEAT (Postgres)
INSERT INTO orchestrators (id, version, started_at_ms, seen_at_ms) VALUES ($1, $2, (EXTRACT(EPOCH FROM clock_timestamp()) * 1000)::BIGINT, (EXTRACT(EPOCH FROM clock_timestamp()) * 1000)::BIGINT) ON CONFLICT (id) DO UPDATE SET seen_at_ms = excluded.seen_at_ms
-- HEARD (Postgres)
WITH heard AS (SELECT workers.id, now.age_ms FROM workers JOIN UNNEST($1::TEXT[], $2::BIGINT[], $3::BIGINT[]) AS now (worker_id, epoch, age_ms) ON workers.id = now.worker_id AND workers.epoch = now.epoch ORDER BY workers.id FOR UPDATE OF workers) UPDATE workers SET seen_at_ms = GREATEST(seen_at_ms, (EXTRACT(EPOCH FROM clock_timestamp()) * 1000)::BIGINT - heard.age_ms) FROM heard WHERE workers.id = heard.id RETURNING workers.id
-- OFFERED (Postgres)
INSERT INTO sessions (worker_id, orchestrator_id, epoch, offer) SELECT new.worker_id, $1, new.epoch, new.offer FROM UNNEST($2::TEXT[], $3::BIGINT[], $4::TEXT[]) AS new (worker_id, epoch, offer) JOIN workers ON workers.id = new.worker_id AND workers.epoch = new.epoch ORDER BY new.worker_id ON CONFLICT (worker_id) DO UPDATE SET orchestrator_id = excluded.orchestrator_id, epoch = excluded.epoch, offer = excluded.offer WHERE sessions.epoch <= excluded.epoch
-- FORGET (Postgres)
DELETE FROM orchestrators WHERE id = $1
-- OWN (Postgres)
SELECT id, epoch, boot, draining, revoked FROM workers WHERE id = ANY($1)
-- WISHES (Postgres)
SELECT COALESCE(md5(string_agg(concat_ws(' ', org_id, name, want, pinned, generation, workers, labels), ',' ORDER BY org_id, name)), '') AS wishes FROM images
-- ELSEWHERE (Postgres)
SELECT workers.id, workers.name, workers.labels, workers.host_labels, workers.draining, workers.boot, sessions.offer, (EXTRACT(EPOCH FROM clock_timestamp()) * 1000)::BIGINT - workers.seen_at_ms AS silent_ms, COALESCE(orchestrators.seen_at_ms > (EXTRACT(EPOCH FROM clock_timestamp()) * 1000)::BIGINT - $2, FALSE) AS lives FROM sessions JOIN workers ON workers.id = sessions.worker_id AND workers.epoch = sessions.epoch LEFT JOIN orchestrators ON orchestrators.id = sessions.orchestrator_id WHERE sessions.orchestrator_id <> $1 AND workers.revoked = FALSE
-- SILENT (Postgres)
WITH clock AS (SELECT (EXTRACT(EPOCH FROM clock_timestamp()) * 1000)::BIGINT AS now) SELECT workers.id, clock.now - (CASE WHEN orchestrators.seen_at_ms > clock.now - $1 THEN $2::BIGINT ELSE $3::BIGINT END) AS unseen_since FROM clock CROSS JOIN workers LEFT JOIN sessions ON sessions.worker_id = workers.id LEFT JOIN orchestrators ON orchestrators.id = sessions.orchestrator_id WHERE workers.id IN (SELECT jobs.worker_id FROM jobs WHERE jobs.worker_id IS NOT NULL) AND (workers.seen_at_ms IS NULL OR workers.seen_at_ms < clock.now - (CASE WHEN orchestrators.seen_at_ms > clock.now - $1 THEN $2::BIGINT ELSE $3::BIGINT END))
-- SET (Postgres)
SELECT set_config($1, $2, FALSE)
-- BACKEND (Postgres)
SELECT pg_backend_pid()
-- CLOCK (Postgres)
SELECT (EXTRACT(EPOCH FROM clock_timestamp()) * 1000)::BIGINT AS now
-- HORIZON (Postgres)
SELECT pg_snapshot_xmin(pg_current_snapshot())::TEXT AS horizon
-- CHANGED (Postgres)
SELECT jobs.id, jobs.org_id, version, state, state_json, spec, source, created_at_ms, created_by, events, attempts.job_id, attempts.attempt, attempts.worker_id, assigned_at_ms, ended_at_ms, end_json, timings, teardown_ms, seq, log_len, facts, jobs.changed::TEXT AS changed FROM jobs LEFT JOIN attempts ON attempts.job_id = jobs.id AND attempts.attempt = jobs.attempt WHERE jobs.changed >= $1::xid8 AND jobs.changed_by IS DISTINCT FROM $2 ORDER BY jobs.changed LIMIT $3
-- NOTIFY (Postgres)
SELECT pg_notify('alloy', $1)
-- LOCK_DUTIES (Postgres)
SELECT pg_try_advisory_lock(72617265, 1) AS mine
