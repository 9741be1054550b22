-- Plans that include credits, and the grants that vaults burn. A credit is the unit of a grant, never a second money: a
-- call that is paid in credits moves no stroop.
ALTER TABLE plans
    ADD COLUMN price           bigint NOT NULL DEFAULT 0 CHECK (price BETWEEN 0 AND 10000000000000),
    ADD COLUMN monthly_credits bigint NOT NULL DEFAULT 0 CHECK (monthly_credits BETWEEN 0 AND 1000000000000),
    -- When the credits are burnt: refuse what is priced in credits, or take its price from the balance.
    ADD COLUMN overage         text NOT NULL DEFAULT 'deny' CHECK (overage IN ('deny', 'charge')),
    ADD COLUMN features        text[] NOT NULL DEFAULT '{}' CHECK (cardinality(features) <= 50),
    -- Null: all.
    ADD COLUMN allowed_apis    bigint[] CHECK (cardinality(allowed_apis) <= 1000);

UPDATE plans SET monthly_credits = 100 WHERE plan_id = 'free';
UPDATE plans SET monthly_credits = 5000, price = 190000000, features = '{priority_support}' WHERE plan_id = 'pro';
UPDATE plans SET monthly_credits = 50000, price = 990000000, features = '{priority_support,sla,dedicated_support}'
    WHERE plan_id = 'enterprise';

-- What a vault was given, each until its end. Which of them a burnt credit came from is settled when one is added or
-- ends: the earliest to end burns first. Until then the vault's `credits` alone say what is left of all.
CREATE TABLE quota_grants (
    vault_id   uuid NOT NULL REFERENCES vaults,
    grant_id   uuid NOT NULL,
    source     text NOT NULL CHECK (source IN ('plan', 'promo', 'purchase', 'allocation')),
    -- Names the grant once and for ever: for a plan the month and how often the plan changed in it.
    ref        text NOT NULL CHECK (length(ref) BETWEEN 1 AND 200),
    plan_id    text REFERENCES plans,
    amount     bigint NOT NULL CHECK (amount BETWEEN 0 AND 1000000000000),
    remaining  bigint NOT NULL CHECK (remaining >= 0),
    created_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    -- What was left when it ended, and when that was.
    lapsed     bigint NOT NULL DEFAULT 0 CHECK (lapsed >= 0),
    lapsed_at  timestamptz,
    PRIMARY KEY (vault_id, grant_id),
    UNIQUE (vault_id, source, ref),
    CHECK (expires_at > created_at),
    CHECK (remaining + lapsed <= amount),
    CHECK (amount > 0 OR source = 'plan'),
    CHECK ((source = 'plan') = (plan_id IS NOT NULL)),
    CHECK (lapsed_at IS NOT NULL OR lapsed = 0),
    CHECK (lapsed_at IS NULL OR remaining = 0)
);
CREATE INDEX quota_grants_live ON quota_grants (vault_id) WHERE lapsed_at IS NULL;

CREATE FUNCTION refuse_grant_rewrite() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF ROW (NEW.vault_id, NEW.grant_id, NEW.source, NEW.ref, NEW.plan_id, NEW.amount, NEW.created_at, NEW.expires_at)
       IS DISTINCT FROM
       ROW (OLD.vault_id, OLD.grant_id, OLD.source, OLD.ref, OLD.plan_id, OLD.amount, OLD.created_at, OLD.expires_at)
       OR OLD.lapsed_at IS NOT NULL AND ((NEW.lapsed_at, NEW.remaining) IS DISTINCT FROM (OLD.lapsed_at, OLD.remaining)
                                         OR NEW.lapsed < OLD.lapsed) THEN
        RAISE EXCEPTION 'quota_grants: what was given is never changed, and what has ended stays so'
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'grants_stay';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER grants_stay BEFORE UPDATE ON quota_grants FOR EACH ROW EXECUTE FUNCTION refuse_grant_rewrite();
CREATE TRIGGER grants_never_deleted BEFORE DELETE ON quota_grants FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER grants_never_emptied BEFORE TRUNCATE ON quota_grants
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite();

-- `credits`: what is left of all grants and not held. `quota_until`: when the next of them ends or a month begins; past
-- it no hold is placed before the grants are settled. A vault that never called what is priced in credits has neither.
ALTER TABLE vaults
    ADD COLUMN credits     bigint NOT NULL DEFAULT 0 CHECK (credits >= 0),
    ADD COLUMN quota_until timestamptz NOT NULL DEFAULT 'infinity';

ALTER TABLE usage_events
    ADD COLUMN held_credits bigint NOT NULL DEFAULT 0 CHECK (held_credits >= 0),
    ADD CONSTRAINT usage_events_credits CHECK (credits BETWEEN 0 AND held_credits),
    ADD CONSTRAINT usage_events_credits_told CHECK (held_credits = 0 OR (state = 'held') = (credits IS NULL));

-- How many credits a key may burn in a calendar month, UTC; null: what the vault has.
ALTER TABLE api_keys ADD COLUMN monthly_credit_cap bigint CHECK (monthly_credit_cap BETWEEN 0 AND 1000000000000);

ALTER TABLE usage_minutes ADD COLUMN credits bigint NOT NULL DEFAULT 0 CHECK (credits >= 0);
ALTER TABLE usage_days ADD COLUMN credits bigint NOT NULL DEFAULT 0;

ALTER TABLE ledger_entries
    DROP CONSTRAINT ledger_entries_kind_check,
    ADD CONSTRAINT ledger_entries_kind_check
        CHECK (kind IN ('deposit', 'withdrawal', 'refund', 'grant', 'adjustment', 'subscription')),
    ADD CONSTRAINT ledger_entries_subscription_check CHECK (kind <> 'subscription' OR amount < 0);

-- A vault is guarded by its version while anything beside its balance joins the decision on a hold: a limit, a grant, a
-- cap of one of its keys. Whatever changes one of these changes the version, so what was decided without it loses.
CREATE OR REPLACE FUNCTION note_spending_limits() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    changed uuid := coalesce(NEW.vault_id, OLD.vault_id);
BEGIN
    IF TG_OP = 'UPDATE' AND NEW.vault_id <> OLD.vault_id THEN
        RAISE EXCEPTION 'a limit stays with its vault' USING ERRCODE = 'restrict_violation';
    END IF;
    -- In a statement of its own: what is looked at afterwards was committed by whoever had the row before.
    PERFORM FROM vaults WHERE vault_id = changed FOR NO KEY UPDATE;
    UPDATE vaults
    SET limited = EXISTS (SELECT FROM spending_limits WHERE vault_id = changed)
                  OR EXISTS (SELECT FROM quota_grants WHERE vault_id = changed),
        version = version + 1
    WHERE vault_id = changed;
    RETURN NULL;
END $$;
CREATE TRIGGER quota_grants_noted AFTER INSERT OR UPDATE ON quota_grants
    FOR EACH ROW EXECUTE FUNCTION note_spending_limits();
CREATE TRIGGER credit_caps_set AFTER INSERT ON api_keys
    FOR EACH ROW WHEN (NEW.monthly_credit_cap IS NOT NULL) EXECUTE FUNCTION note_spending_limits();
CREATE TRIGGER credit_caps_noted AFTER UPDATE OF monthly_credit_cap ON api_keys
    FOR EACH ROW WHEN (NEW.monthly_credit_cap IS DISTINCT FROM OLD.monthly_credit_cap) EXECUTE FUNCTION note_spending_limits();

-- A vault on another plan has other credits from now on.
CREATE FUNCTION end_quota_of_plan() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM quota_grants WHERE vault_id = NEW.vault_id) THEN
        NEW.quota_until := '-infinity';
        NEW.version := OLD.version + 1;
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER plan_ends_quota BEFORE UPDATE OF plan_id ON vaults
    FOR EACH ROW WHEN (NEW.plan_id <> OLD.plan_id) EXECUTE FUNCTION end_quota_of_plan();
