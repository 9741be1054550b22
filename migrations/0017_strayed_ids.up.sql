-- The time in a usage event's id is when the id was made, its date is when it was stored. Most lie within milliseconds; a
-- charge over REST keeps its id from try to try, and clocks differ. Where they are close, the events of one vault since a
-- moment are found by their ids, whatever everybody else calls meanwhile; where they are not, by this index.
CREATE FUNCTION has_strayed(event_id uuid, created_at timestamptz) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN abs(('x' || left(replace(event_id::text, '-', ''), 12))::bit(48)::bigint
               - (extract(epoch FROM created_at - timestamptz '1970-01-01 00:00:00+00') * 1000)::bigint) > 10000;

CREATE INDEX usage_events_strayed ON usage_events (vault_id, created_at) WHERE has_strayed(event_id, created_at);
