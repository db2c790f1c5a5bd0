-- Made from the orchestrator's migration 1010 (swift_jobs); ALLOY_TEST_BLESS=1 makes it anew. It does nothing if the
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
IF EXISTS (SELECT FROM _sqlx_migrations WHERE version = 1010) THEN
    RETURN;
END IF;
EXECUTE $migration$
-- Postgres only: a new job takes who wrote it, and when, from its columns' defaults. Only a change needs the trigger.
ALTER TABLE jobs ALTER COLUMN changed_by SET DEFAULT current_setting('alloy.by', TRUE);
DROP TRIGGER jobs_note_change ON jobs;
CREATE TRIGGER jobs_note_change BEFORE UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION alloy_note_change();

-- An attempt that has not ended does not fade: it need not be in this index before.
DROP INDEX attempts_fading;
CREATE INDEX attempts_fading ON attempts (ended_at_ms, job_id, attempt)
    WHERE ended_at_ms IS NOT NULL AND (log_gone_at_ms IS NULL OR files_gone_at_ms IS NULL);
$migration$;
INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
    VALUES (1010, 'swift_jobs', TRUE, '\x80a7da53d37be902584fe7d3aa7fff694f3c949083158894b9be957bbc6ab53f0f7ce1555a43aae875f617eb5c9fda6c', 0);
END
$alloy$;
