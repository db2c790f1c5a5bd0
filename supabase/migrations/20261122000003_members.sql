-- Made from the orchestrator's migration 3 (members); ALLOY_TEST_BLESS=1 makes it anew. It does nothing if the
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
IF EXISTS (SELECT FROM _sqlx_migrations WHERE version = 3) THEN
    RETURN;
END IF;
EXECUTE $migration$
-- Members: people who sign in with a service of their own (Supabase Auth), and what they may do in which organisation.

CREATE TABLE members (
    -- A UUID in lower case, as the sign-in service's `sub` has it.
    user_id TEXT NOT NULL CHECK (length(user_id) = 36),
    org_id TEXT NOT NULL,
    role TEXT NOT NULL CHECK (role IN ('viewer', 'developer', 'admin')),
    -- For people to recognise each other by; nothing is decided on it.
    email TEXT CHECK (email <> ''),
    created_at_ms BIGINT NOT NULL,
    PRIMARY KEY (user_id, org_id)
);
CREATE INDEX members_by_org ON members (org_id);
$migration$;
INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
    VALUES (3, 'members', TRUE, '\x40c7332427d7453ae1beff49053270fa6210fd66e7958af57eebb0970fe4e46370e6acd3fffc141098149f84ac4a7a82', 0);
END
$alloy$;
