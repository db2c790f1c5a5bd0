-- Made from the orchestrator's migration 1003 (retention_security); ALLOY_TEST_BLESS=1 makes it anew. It does nothing if the
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
IF EXISTS (SELECT FROM _sqlx_migrations WHERE version = 1003) THEN
    RETURN;
END IF;
EXECUTE $migration$
-- Postgres only: row-level security on the tables of retention, for the reasons of 1001.

ALTER TABLE trash ENABLE ROW LEVEL SECURITY;
ALTER TABLE retention ENABLE ROW LEVEL SECURITY;
$migration$;
INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
    VALUES (1003, 'retention_security', TRUE, '\xb31dd9c5ca91b98e2739a77cad8ef56c47a62869ac9feab8ce012d4ac480d3bca118eb482bc8f28922d288aaff31dbd6', 0);
END
$alloy$;
