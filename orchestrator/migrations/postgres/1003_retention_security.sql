-- Postgres only: row-level security on the tables of retention, for the reasons of 1001.

ALTER TABLE trash ENABLE ROW LEVEL SECURITY;
ALTER TABLE retention ENABLE ROW LEVEL SECURITY;
