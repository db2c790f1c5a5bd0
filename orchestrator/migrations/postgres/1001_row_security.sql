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
