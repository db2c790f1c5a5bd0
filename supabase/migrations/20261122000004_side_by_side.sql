-- Made from the orchestrator's migration 1000 (side_by_side); ALLOY_TEST_BLESS=1 makes it anew. It does nothing if the
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
IF EXISTS (SELECT FROM _sqlx_migrations WHERE version = 1000) THEN
    RETURN;
END IF;
EXECUTE $migration$
-- Postgres only: what several orchestrators of one farm share besides its rows.

-- Who reads what changed asks from the oldest transaction on that was still open when it last looked: a number that is given
-- out when a change begins says nothing of when it is seen.
ALTER TABLE jobs ADD COLUMN changed xid8 NOT NULL DEFAULT pg_current_xact_id();
-- The orchestrator that changed it: its own changes are no news to it.
ALTER TABLE jobs ADD COLUMN changed_by TEXT;
CREATE INDEX jobs_by_change ON jobs (changed);

CREATE FUNCTION alloy_note_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.changed := pg_current_xact_id();
    NEW.changed_by := current_setting('alloy.by', TRUE);
    RETURN NEW;
END
$$;
CREATE TRIGGER jobs_note_change BEFORE INSERT OR UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION alloy_note_change();

CREATE TABLE orchestrators (
    id TEXT NOT NULL PRIMARY KEY,
    version TEXT NOT NULL,
    started_at_ms BIGINT NOT NULL,
    seen_at_ms BIGINT NOT NULL
);

-- Which orchestrator a worker's newest session is with, and what the worker has to offer.
CREATE TABLE sessions (
    worker_id TEXT NOT NULL PRIMARY KEY REFERENCES workers (id),
    orchestrator_id TEXT NOT NULL,
    epoch BIGINT NOT NULL,
    offer TEXT NOT NULL
);

-- Logs: bytes that no object holds yet, the objects, and what a log was when it was finished.
CREATE TABLE log_chunks (
    job_id TEXT NOT NULL,
    attempt BIGINT NOT NULL,
    start_at BIGINT NOT NULL CHECK (start_at >= 0),
    bytes BYTEA NOT NULL CHECK (length(bytes) > 0),
    PRIMARY KEY (job_id, attempt, start_at)
);
-- Log bytes are compressed where they lie for long: here it would only cost time.
ALTER TABLE log_chunks ALTER COLUMN bytes SET STORAGE EXTERNAL;
CREATE TABLE log_parts (
    job_id TEXT NOT NULL,
    attempt BIGINT NOT NULL,
    start_at BIGINT NOT NULL CHECK (start_at >= 0),
    end_at BIGINT NOT NULL,
    object TEXT NOT NULL,
    PRIMARY KEY (job_id, attempt, start_at),
    CONSTRAINT log_parts_has_bytes CHECK (end_at > start_at)
);
CREATE TABLE log_seals (
    job_id TEXT NOT NULL,
    attempt BIGINT NOT NULL,
    len BIGINT NOT NULL CHECK (len >= 0),
    sha256 TEXT NOT NULL CHECK (length(sha256) = 64),
    PRIMARY KEY (job_id, attempt)
);
$migration$;
INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
    VALUES (1000, 'side_by_side', TRUE, '\x418953566f45ff9ca6d65506ab52589c0d31da0021ed93bf0d604be2d2fcb559f35cc854d731e39582ac02a24764496a', 0);
END
$alloy$;
