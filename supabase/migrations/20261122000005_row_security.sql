-- Made from the orchestrator's migration 1001 (row_security); ALLOY_TEST_BLESS=1 makes it anew. It does nothing if the
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
IF EXISTS (SELECT FROM _sqlx_migrations WHERE version = 1001) THEN
    RETURN;
END IF;
EXECUTE $migration$
-- Postgres only: row-level security on every table. The owner, which is the orchestrator, is not held back by it; any other role
-- sees and changes nothing, whatever was granted to it, until a policy says otherwise. A service that hands new tables to
-- everybody by default, as Supabase does, so never shows one that nobody thought of.

ALTER TABLE jobs ENABLE ROW LEVEL SECURITY;
ALTER TABLE attempts ENABLE ROW LEVEL SECURITY;
ALTER TABLE events ENABLE ROW LEVEL SECURITY;
ALTER TABLE artifacts ENABLE ROW LEVEL SECURITY;
ALTER TABLE idempotency ENABLE ROW LEVEL SECURITY;
ALTER TABLE workers ENABLE ROW LEVEL SECURITY;
ALTER TABLE tokens ENABLE ROW LEVEL SECURITY;
ALTER TABLE blobs ENABLE ROW LEVEL SECURITY;
ALTER TABLE meta ENABLE ROW LEVEL SECURITY;
ALTER TABLE images ENABLE ROW LEVEL SECURITY;
ALTER TABLE members ENABLE ROW LEVEL SECURITY;
ALTER TABLE orchestrators ENABLE ROW LEVEL SECURITY;
ALTER TABLE sessions ENABLE ROW LEVEL SECURITY;
ALTER TABLE log_chunks ENABLE ROW LEVEL SECURITY;
ALTER TABLE log_parts ENABLE ROW LEVEL SECURITY;
ALTER TABLE log_seals ENABLE ROW LEVEL SECURITY;
ALTER TABLE _sqlx_migrations ENABLE ROW LEVEL SECURITY;
$migration$;
INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
    VALUES (1001, 'row_security', TRUE, '\x8101a52303ed2111c5c826b43a66fbbad302090737db7141e07eb2057059d1021691ff57ecafc779e54ed9095d1f98e7', 0);
END
$alloy$;
