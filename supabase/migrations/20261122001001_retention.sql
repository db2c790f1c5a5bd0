-- Made from the orchestrator's migration 4 (retention); ALLOY_TEST_BLESS=1 makes it anew. It does nothing if the
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
IF EXISTS (SELECT FROM _sqlx_migrations WHERE version = 4) THEN
    RETURN;
END IF;
EXECUTE $migration$
-- Retention: when things were used last, what was removed from finished attempts, what waits to be thrown away.

-- When somebody last relied on it, to within a day. 0: since nobody knows when; the farm then counts from when it sees that.
ALTER TABLE blobs ADD COLUMN used_at_ms BIGINT NOT NULL DEFAULT 0 CHECK (used_at_ms >= 0);
CREATE INDEX blobs_by_use ON blobs (kind, used_at_ms, digest, org_id);
CREATE INDEX blobs_by_object ON blobs (object);

-- Since when the attempt's log and its artifacts are no longer there.
ALTER TABLE attempts ADD COLUMN log_gone_at_ms BIGINT;
ALTER TABLE attempts ADD COLUMN files_gone_at_ms BIGINT;
CREATE INDEX attempts_fading ON attempts (ended_at_ms, job_id, attempt) WHERE log_gone_at_ms IS NULL OR files_gone_at_ms IS NULL;

CREATE INDEX jobs_by_end ON jobs (finished_at_ms, id) WHERE finished_at_ms IS NOT NULL;
CREATE INDEX jobs_by_source ON jobs (source) WHERE source IS NOT NULL;
CREATE INDEX artifacts_by_digest ON artifacts (sha256);
CREATE INDEX idempotency_by_job ON idempotency (job_id);

-- Objects and logs that nothing names. Whoever registers a blob takes its object out again, until it is taken to be deleted:
-- from then on no blob may lie in it. What is deleted stays here for a while, so that its name is not used again.
CREATE TABLE trash (
    object TEXT NOT NULL PRIMARY KEY,
    -- The name that it has without what was put behind it to make it a new one.
    root TEXT NOT NULL,
    at_ms BIGINT NOT NULL,
    taken_at_ms BIGINT,
    gone BOOLEAN NOT NULL,
    CONSTRAINT trash_is_taken_before_it_is_gone CHECK (gone = FALSE OR taken_at_ms IS NOT NULL)
);
CREATE INDEX trash_by_root ON trash (root);
CREATE INDEX trash_by_time ON trash (gone, at_ms, object);

-- What an organisation wants to be kept otherwise than the farm keeps things. NULL: as the farm; 0: for ever.
CREATE TABLE retention (
    org_id TEXT NOT NULL PRIMARY KEY,
    jobs_days BIGINT CHECK (jobs_days >= 0),
    artifacts_days BIGINT CHECK (artifacts_days >= 0),
    logs_days BIGINT CHECK (logs_days >= 0),
    sources_days BIGINT CHECK (sources_days >= 0)
);
$migration$;
INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
    VALUES (4, 'retention', TRUE, '\x25bd45a3c5400c06ee82e046042c705c25b1eba7f7a96b953e0158ab933e9d5a590728ef1c6e7038589c8ae292c7c07c', 0);
END
$alloy$;
