-- Made from the orchestrator's migration 1002 (views); ALLOY_TEST_BLESS=1 makes it anew. It does nothing if the
-- orchestrator was there before, and leaves its bookkeeping for it if it was not.
CREATE TABLE IF NOT EXISTS _sqlx_migrations (
    version BIGINT PRIMARY KEY,
    description TEXT NOT NULL,
    installed_on TIMESTAMPTZ NOT NULL DEFAULT now(),
    success BOOLEAN NOT NULL,
    checksum BYTEA NOT NULL,
    execution_time BIGINT NOT NULL
);
DO $alloy$
BEGIN
IF EXISTS (SELECT FROM _sqlx_migrations WHERE version = 1002) THEN
    RETURN;
END IF;
EXECUTE $migration$
-- Postgres only: the farm's tables as people read them, with times as timestamptz and JSON as jsonb. No statement of the
-- orchestrator uses a view. Each runs with its reader's own rights, and shows what row-level security shows them. A migration
-- that changes a column drops the views on it before and makes them again after.

CREATE SCHEMA alloy_views;

CREATE VIEW alloy_views.jobs WITH (security_invoker = on) AS SELECT
    id, org_id, state, phase, reason, attempt, worker_id, created_by,
    to_timestamp(created_at_ms / 1000.0) AS created_at,
    to_timestamp(finished_at_ms / 1000.0) AS finished_at,
    spec::jsonb AS spec, source, events, version
FROM jobs;

CREATE VIEW alloy_views.attempts WITH (security_invoker = on) AS SELECT
    job_id, attempt, org_id, worker_id, outcome,
    to_timestamp(assigned_at_ms / 1000.0) AS assigned_at,
    to_timestamp(ended_at_ms / 1000.0) AS ended_at,
    end_json::jsonb AS ending, timings::jsonb AS timings, teardown_ms, facts::jsonb AS facts, log_len AS log_bytes
FROM attempts;

CREATE VIEW alloy_views.events WITH (security_invoker = on) AS SELECT
    job_id, seq, org_id, to_timestamp(at_ms / 1000.0) AS at,
    attempt, kind, state, phase, reason, worker_id, message, artifact
FROM events;

CREATE VIEW alloy_views.artifacts WITH (security_invoker = on) AS SELECT
    job_id, attempt, path, org_id, size_bytes, sha256, mode, link
FROM artifacts;

CREATE VIEW alloy_views.workers WITH (security_invoker = on) AS SELECT
    id, org_id, name, labels::jsonb AS labels, host_labels::jsonb AS host_labels, version, draining, drain_note,
    to_timestamp(enrolled_at_ms / 1000.0) AS enrolled_at,
    to_timestamp(seen_at_ms / 1000.0) AS seen_at,
    revoked
FROM workers;

CREATE VIEW alloy_views.images WITH (security_invoker = on) AS SELECT
    org_id, name, want, pinned, workers::jsonb AS workers, labels::jsonb AS labels, generation,
    to_timestamp(at_ms / 1000.0) AS at
FROM images;

CREATE VIEW alloy_views.members WITH (security_invoker = on) AS SELECT
    user_id, org_id, role, email, to_timestamp(created_at_ms / 1000.0) AS created_at
FROM members;

-- Without the hash.
CREATE VIEW alloy_views.tokens WITH (security_invoker = on) AS SELECT
    id, org_id, kind, role, name, shown, labels::jsonb AS labels,
    to_timestamp(created_at_ms / 1000.0) AS created_at,
    to_timestamp(expires_at_ms / 1000.0) AS expires_at,
    to_timestamp(revoked_at_ms / 1000.0) AS revoked_at,
    used_by
FROM tokens;
$migration$;
INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
    VALUES (1002, 'views', TRUE, '\x8c4cd15767690360253203e40a3ecc308aa5c077a6dc23dddcf701aef7858d9fbf3f4711445219ab828474de7c0b5768', 0);
END
$alloy$;
