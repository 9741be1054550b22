-- What was spent by hour in UTC, for the periods of spending limits: between whole days and single minutes there would
-- else be a day of minutes to add up, each by key and endpoint. Kept as the days are; an hour without charges has no row.
CREATE TABLE key_hours (
    vault_id   uuid NOT NULL,
    hour       timestamptz NOT NULL,
    api_key_id uuid NOT NULL,
    amount     bigint NOT NULL,
    PRIMARY KEY (vault_id, hour, api_key_id)
) WITH (fillfactor = 70);

-- A pass under way is waited for, and the next waits.
LOCK TABLE usage_minutes IN SHARE MODE;
INSERT INTO key_hours (vault_id, hour, api_key_id, amount)
    SELECT vault_id, date_trunc('hour', minute, 'UTC'), api_key_id, sum(amount)::bigint FROM usage_minutes
    WHERE amount <> 0 GROUP BY 1, 2, 3 ORDER BY 2, 1, 3;
ANALYZE key_hours;
