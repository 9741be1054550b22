DROP TRIGGER plan_ends_quota ON vaults;
DROP FUNCTION end_quota_of_plan();
ALTER TABLE ledger_entries
    DROP CONSTRAINT ledger_entries_subscription_check,
    DROP CONSTRAINT ledger_entries_kind_check,
    ADD CONSTRAINT ledger_entries_kind_check CHECK (kind IN ('deposit', 'withdrawal', 'refund', 'grant', 'adjustment'));
DROP TRIGGER credit_caps_set ON api_keys;
DROP TRIGGER credit_caps_noted ON api_keys;
DROP TABLE quota_grants;
DROP FUNCTION refuse_grant_rewrite();
CREATE OR REPLACE FUNCTION note_spending_limits() RETURNS trigger LANGUAGE plpgsql AS $$
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
ALTER TABLE usage_days DROP COLUMN credits;
ALTER TABLE usage_minutes DROP COLUMN credits;
ALTER TABLE api_keys DROP COLUMN monthly_credit_cap;
ALTER TABLE usage_events DROP CONSTRAINT usage_events_credits, DROP CONSTRAINT usage_events_credits_told,
    DROP COLUMN held_credits;
UPDATE vaults SET limited = EXISTS (SELECT FROM spending_limits s WHERE s.vault_id = vaults.vault_id);
ALTER TABLE vaults DROP COLUMN quota_until, DROP COLUMN credits;
ALTER TABLE plans DROP COLUMN allowed_apis, DROP COLUMN features, DROP COLUMN overage, DROP COLUMN monthly_credits,
    DROP COLUMN price;
