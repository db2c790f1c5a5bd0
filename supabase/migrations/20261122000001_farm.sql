-- Made from the orchestrator's migration 1 (farm); ALLOY_TEST_BLESS=1 makes it anew. It does nothing if the
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
IF EXISTS (SELECT FROM _sqlx_migrations WHERE version = 1) THEN
    RETURN;
END IF;
EXECUTE $migration$
-- The farm's memory. One text for both engines: types are TEXT, BIGINT and BOOLEAN, times are epoch milliseconds,
-- JSON is TEXT that no statement looks into. Every row names its organisation; `meta` belongs to the farm itself.
-- Checks that every row meets compare word by word: for a list after IN, SQLite builds a table anew in each statement.

CREATE TABLE jobs (
    id TEXT NOT NULL PRIMARY KEY,
    -- The number that the id's last six characters stand for. It counts jobs: new ones share a page of its index.
    id_tail BIGINT NOT NULL,
    org_id TEXT NOT NULL,
    version BIGINT NOT NULL CHECK (version >= 1),
    state TEXT NOT NULL CHECK (state = 'queued' OR state = 'assigned' OR state = 'running' OR state = 'canceling' OR state = 'succeeded' OR state = 'failed' OR state = 'timed_out' OR state = 'canceled' OR state = 'expired' OR state = 'errored'),
    phase TEXT CHECK (phase = 'preparing' OR phase = 'executing' OR phase = 'collecting'),
    reason TEXT,
    -- The newest attempt, 0 before the first: the fence.
    attempt BIGINT NOT NULL CHECK (attempt >= 0),
    -- Who has the lease on it.
    worker_id TEXT,
    finished_at_ms BIGINT,
    -- The whole state; the columns above are what statements and people ask about.
    state_json TEXT NOT NULL,
    spec TEXT NOT NULL,
    source TEXT CHECK (length(source) = 64),
    created_at_ms BIGINT NOT NULL,
    created_by TEXT NOT NULL,
    -- The number of its newest event.
    events BIGINT NOT NULL CHECK (events >= 0),
    CONSTRAINT jobs_phase_iff_running CHECK ((state = 'running') = (phase IS NOT NULL)),
    CONSTRAINT jobs_worker_iff_leased CHECK ((state = 'assigned' OR state = 'running' OR state = 'canceling') = (worker_id IS NOT NULL)),
    CONSTRAINT jobs_lease_has_attempt CHECK (worker_id IS NULL OR attempt >= 1),
    CONSTRAINT jobs_finished_iff_ended CHECK ((state = 'queued' OR state = 'assigned' OR state = 'running' OR state = 'canceling') = (finished_at_ms IS NULL)),
    CONSTRAINT jobs_failed_has_reason CHECK (CASE WHEN reason IS NULL THEN state <> 'failed' ELSE (state = 'failed') = (reason IN ('script_failure', 'hook_failure', 'source_error', 'artifact_missing', 'artifact_changed')) END),
    CONSTRAINT jobs_timed_out_has_reason CHECK (CASE WHEN reason IS NULL THEN state <> 'timed_out' ELSE (state = 'timed_out') = (reason IN ('run_timeout', 'no_output_timeout')) END),
    CONSTRAINT jobs_canceled_has_reason CHECK (CASE WHEN reason IS NULL THEN state <> 'canceled' ELSE (state = 'canceled') = (reason IN ('user_canceled', 'superseded', 'parent_canceled')) END),
    CONSTRAINT jobs_expired_has_reason CHECK ((state = 'expired') = (COALESCE(reason, '') = 'queue_expired')),
    CONSTRAINT jobs_errored_has_reason CHECK (CASE WHEN reason IS NULL THEN state <> 'errored' ELSE (state = 'errored') = (reason IN ('vm_start_failure', 'vm_lost', 'worker_lost', 'worker_drained', 'out_of_disk', 'image_pull_failure', 'internal_error', 'config_error', 'signature_rejected')) END),
    CONSTRAINT jobs_reason_only_at_end CHECK (reason IS NULL OR state IN ('failed', 'timed_out', 'canceled', 'expired', 'errored'))
);
CREATE INDEX jobs_by_tail ON jobs (id_tail);
CREATE INDEX jobs_by_org ON jobs (org_id, id);
CREATE INDEX jobs_by_caller ON jobs (created_by, id);
CREATE INDEX jobs_live ON jobs (id) WHERE finished_at_ms IS NULL;
CREATE INDEX jobs_by_worker ON jobs (worker_id) WHERE worker_id IS NOT NULL;

CREATE TABLE attempts (
    job_id TEXT NOT NULL REFERENCES jobs (id),
    attempt BIGINT NOT NULL CHECK (attempt >= 1),
    org_id TEXT NOT NULL,
    worker_id TEXT NOT NULL,
    assigned_at_ms BIGINT NOT NULL,
    ended_at_ms BIGINT,
    outcome TEXT CHECK (outcome = 'succeeded' OR outcome = 'failed' OR outcome = 'timed_out' OR outcome = 'canceled' OR outcome = 'expired' OR outcome = 'errored'),
    end_json TEXT,
    timings TEXT NOT NULL,
    -- Told after the end, and by another report than the other timings.
    teardown_ms BIGINT CHECK (teardown_ms >= 0),
    -- The newest report that was applied.
    seq BIGINT NOT NULL CHECK (seq >= 0),
    log_len BIGINT CHECK (log_len >= 0),
    PRIMARY KEY (job_id, attempt),
    CONSTRAINT attempts_outcome_iff_end CHECK ((outcome IS NULL) = (end_json IS NULL)),
    CONSTRAINT attempts_end_has_time CHECK (end_json IS NULL OR ended_at_ms IS NOT NULL)
);

CREATE TABLE events (
    job_id TEXT NOT NULL REFERENCES jobs (id),
    seq BIGINT NOT NULL CHECK (seq >= 1),
    org_id TEXT NOT NULL,
    at_ms BIGINT NOT NULL,
    attempt BIGINT NOT NULL CHECK (attempt >= 0),
    kind TEXT NOT NULL CHECK (kind = 'submitted' OR kind = 'assigned' OR kind = 'accepted' OR kind = 'phase' OR kind = 'artifact' OR kind = 'cancel_requested' OR kind = 'requeued' OR kind = 'finished'),
    state TEXT NOT NULL CHECK (state = 'queued' OR state = 'assigned' OR state = 'running' OR state = 'canceling' OR state = 'succeeded' OR state = 'failed' OR state = 'timed_out' OR state = 'canceled' OR state = 'expired' OR state = 'errored'),
    phase TEXT CHECK (phase = 'preparing' OR phase = 'executing' OR phase = 'collecting'),
    reason TEXT,
    worker_id TEXT,
    message TEXT,
    artifact TEXT,
    PRIMARY KEY (job_id, seq)
);

CREATE TABLE artifacts (
    job_id TEXT NOT NULL,
    attempt BIGINT NOT NULL,
    path TEXT NOT NULL CHECK (path <> ''),
    org_id TEXT NOT NULL,
    size_bytes BIGINT NOT NULL CHECK (size_bytes >= 0),
    sha256 TEXT NOT NULL CHECK (length(sha256) = 64),
    mode BIGINT NOT NULL CHECK (mode >= 0),
    link TEXT,
    PRIMARY KEY (job_id, attempt, path),
    FOREIGN KEY (job_id, attempt) REFERENCES attempts (job_id, attempt)
);

-- No reference to the job: the key goes in first, because it decides whether there will be one.
CREATE TABLE idempotency (
    org_id TEXT NOT NULL,
    caller TEXT NOT NULL,
    key TEXT NOT NULL,
    body TEXT NOT NULL CHECK (length(body) = 64),
    job_id TEXT NOT NULL,
    created_at_ms BIGINT NOT NULL,
    PRIMARY KEY (key, caller, org_id)
);

CREATE TABLE workers (
    id TEXT NOT NULL PRIMARY KEY,
    org_id TEXT NOT NULL,
    name TEXT NOT NULL,
    public_key TEXT NOT NULL UNIQUE CHECK (length(public_key) = 64),
    labels TEXT NOT NULL,
    host_labels TEXT NOT NULL,
    version TEXT NOT NULL,
    -- Counts its sessions; the newest one alone may report.
    epoch BIGINT NOT NULL CHECK (epoch >= 0),
    boot TEXT NOT NULL,
    draining BOOLEAN NOT NULL,
    drain_note TEXT,
    enrolled_at_ms BIGINT NOT NULL,
    seen_at_ms BIGINT,
    revoked BOOLEAN NOT NULL
);
CREATE INDEX workers_by_org ON workers (org_id);

CREATE TABLE tokens (
    id TEXT NOT NULL PRIMARY KEY,
    org_id TEXT NOT NULL,
    hash TEXT NOT NULL UNIQUE CHECK (length(hash) = 64),
    kind TEXT NOT NULL CHECK (kind = 'personal' OR kind = 'ci' OR kind = 'join' OR kind = 'job'),
    role TEXT NOT NULL CHECK (role IN ('viewer', 'developer', 'admin')),
    name TEXT NOT NULL,
    shown TEXT NOT NULL,
    labels TEXT NOT NULL,
    created_at_ms BIGINT NOT NULL,
    expires_at_ms BIGINT,
    revoked_at_ms BIGINT,
    used_by TEXT,
    CONSTRAINT tokens_only_join_is_used CHECK (used_by IS NULL OR kind = 'join')
);
CREATE INDEX tokens_by_org ON tokens (org_id);

-- The same bytes in two organisations are two rows. The digest leads, so that "is it here" is one search.
CREATE TABLE blobs (
    digest TEXT NOT NULL CHECK (length(digest) = 64),
    kind TEXT NOT NULL CHECK (kind = 'chunk' OR kind = 'manifest' OR kind = 'artifact'),
    org_id TEXT NOT NULL,
    size_bytes BIGINT NOT NULL CHECK (size_bytes >= 0),
    object TEXT NOT NULL,
    -- Of a blob in a pack; all NULL for one that has an object of its own.
    frame_at BIGINT CHECK (frame_at >= 0),
    stored_bytes BIGINT CHECK (stored_bytes >= 0),
    zstd BOOLEAN,
    frame_bytes BIGINT CHECK (frame_bytes >= 0),
    raw_at BIGINT CHECK (raw_at >= 0),
    created_at_ms BIGINT NOT NULL,
    PRIMARY KEY (digest, kind, org_id),
    CONSTRAINT blobs_packed_or_alone CHECK ((frame_at IS NULL) = (stored_bytes IS NULL) AND (frame_at IS NULL) = (zstd IS NULL) AND (frame_at IS NULL) = (frame_bytes IS NULL) AND (frame_at IS NULL) = (raw_at IS NULL)),
    CONSTRAINT blobs_within_frame CHECK (raw_at IS NULL OR raw_at + size_bytes <= frame_bytes)
);

-- Named values of the farm itself.
CREATE TABLE meta (
    name TEXT NOT NULL PRIMARY KEY,
    value TEXT NOT NULL
);
$migration$;
INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
    VALUES (1, 'farm', TRUE, '\x10c0b2ce697dadb91eda02625d7d21065b365203596fc59f21b8d896f01c5a0505a85e5d86a8d47f77db6ac3d4f0df4a', 0);
END
$alloy$;
