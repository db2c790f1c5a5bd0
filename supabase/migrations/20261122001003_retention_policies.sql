-- What waits to be thrown away, and how long things are kept, is nobody's business but the farm's.
-- Supabase grants everything on every table to all roles by default. Written by hand.

REVOKE ALL ON trash, retention FROM PUBLIC, anon, authenticated;
GRANT ALL ON trash, retention TO service_role;
