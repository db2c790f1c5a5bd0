-- Postgres only: a new job takes who wrote it, and when, from its columns' defaults. Only a change needs the trigger.
ALTER TABLE jobs ALTER COLUMN changed_by SET DEFAULT current_setting('alloy.by', TRUE);
DROP TRIGGER jobs_note_change ON jobs;
CREATE TRIGGER jobs_note_change BEFORE UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION alloy_note_change();

-- An attempt that has not ended does not fade: it need not be in this index before.
DROP INDEX attempts_fading;
CREATE INDEX attempts_fading ON attempts (ended_at_ms, job_id, attempt)
    WHERE ended_at_ms IS NOT NULL AND (log_gone_at_ms IS NULL OR files_gone_at_ms IS NULL);
