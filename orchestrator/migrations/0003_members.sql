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
