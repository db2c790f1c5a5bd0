-- Made from the orchestrator's migration 2 (images); ALLOY_TEST_BLESS=1 makes it anew. It does nothing if the
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
IF EXISTS (SELECT FROM _sqlx_migrations WHERE version = 2) THEN
    RETURN;
END IF;
EXECUTE $migration$
-- Images: what each attempt's VM was made of, and which images the workers shall have.

ALTER TABLE attempts ADD COLUMN facts TEXT NOT NULL DEFAULT '{}';

CREATE TABLE images (
    org_id TEXT NOT NULL,
    name TEXT NOT NULL CHECK (name <> ''),
    -- `none`: brought and evicted as jobs need it.
    want TEXT NOT NULL CHECK (want IN ('present', 'absent', 'none')),
    pinned BOOLEAN NOT NULL,
    -- Which workers: all that are named and have the labels; both empty means all.
    workers TEXT NOT NULL,
    labels TEXT NOT NULL,
    -- Raised with every wish: each worker fulfils each once.
    generation BIGINT NOT NULL CHECK (generation >= 1),
    at_ms BIGINT NOT NULL,
    PRIMARY KEY (org_id, name),
    CONSTRAINT images_absent_is_not_pinned CHECK (want <> 'absent' OR pinned = FALSE)
);
$migration$;
INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
    VALUES (2, 'images', TRUE, '\x0a6276267d4de590a8afe9b2ab65f1f43c057ca73db6a809e91065d29c72153007abfdaf52186e44da1f6937d3de5771', 0);
END
$alloy$;
