DROP INDEX usage_events_strayed;
DROP FUNCTION has_strayed(uuid, timestamptz);
