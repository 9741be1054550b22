-- Spending limits: what a key, or a whole vault, may spend in the last day, week, month and year. What was spent is
-- counted from usage_events and the sums behind them; no counter is kept here that could be wrong.

ALTER TABLE api_keys ADD CONSTRAINT api_keys_of_vault UNIQUE (vault_id, api_key_id);

CREATE TABLE spending_limits (
    vault_id   uuid NOT NULL REFERENCES vaults,
    api_key_id uuid,  -- NULL: of the whole vault
    period     text NOT NULL CHECK (period IN ('day', 'week', 'month', 'year')),
    amount     bigint NOT NULL CHECK (amount > 0),
    set_by     uuid NOT NULL REFERENCES users,
    set_at     timestamptz NOT NULL,
    UNIQUE NULLS NOT DISTINCT (vault_id, api_key_id, period),
    FOREIGN KEY (vault_id, api_key_id) REFERENCES api_keys (vault_id, api_key_id)
);

-- Whether a vault has any. A round that knows of none must not place a hold where there is one, so whatever changes a
-- limit changes the vault's version as well, and what was decided without it is decided again.
ALTER TABLE vaults ADD COLUMN limited boolean NOT NULL DEFAULT false;

CREATE FUNCTION note_spending_limits() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    changed uuid := coalesce(NEW.vault_id, OLD.vault_id);
BEGIN
    IF TG_OP = 'UPDATE' AND NEW.vault_id <> OLD.vault_id THEN
        RAISE EXCEPTION 'a limit stays with its vault' USING ERRCODE = 'restrict_violation';
    END IF;
    -- In a statement of its own: what is looked at afterwards was committed by whoever had the row before.
    PERFORM FROM vaults WHERE vault_id = changed FOR NO KEY UPDATE;
    UPDATE vaults SET limited = EXISTS (SELECT FROM spending_limits WHERE vault_id = changed), version = version + 1
    WHERE vault_id = changed;
    RETURN NULL;
END $$;
CREATE TRIGGER spending_limits_noted AFTER INSERT OR UPDATE OR DELETE ON spending_limits
    FOR EACH ROW EXECUTE FUNCTION note_spending_limits();

CREATE FUNCTION refuse_emptied_limits() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'limits are removed one by one' USING ERRCODE = 'restrict_violation';
END $$;
CREATE TRIGGER spending_limits_never_emptied BEFORE TRUNCATE ON spending_limits
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_emptied_limits();

-- What a key spent on a day, and what was given back to a vault since a moment, are looked up for each decision that is
-- made on a state read anew.
CREATE INDEX usage_days_of_key ON usage_days (vault_id, api_key_id, day);
CREATE INDEX ledger_entries_given_back ON ledger_entries (vault_id, created_at) WHERE kind = 'refund';
