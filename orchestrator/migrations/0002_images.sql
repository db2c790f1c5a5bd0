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
