-- Holds that services place over REST for charges that do not go through the proxy. The money is a usage event in state
-- held, like any call's; a row here is the service's name for it, bound to the event before that exists, and the name
-- of what it was captured for. What became of the hold is the event's to tell.
CREATE TABLE external_holds (
    vault_id       uuid NOT NULL,
    request_id     text NOT NULL CHECK (length(request_id) BETWEEN 1 AND 255),
    hold_id        uuid NOT NULL,
    api_key_id     uuid NOT NULL,
    -- All null in what only remembers a release that came before its hold.
    api_id         bigint,
    endpoint_id    bigint,
    amount         bigint CHECK (amount > 0),
    ttl_seconds    integer CHECK (ttl_seconds BETWEEN 1 AND 86400),
    fingerprint    bytea CHECK (length(fingerprint) = 32),
    -- The event, the hold's own id at first; another once that one expired, and what it is to hold.
    event_id       uuid NOT NULL,
    event_amount   bigint CHECK (event_amount >= amount),
    -- What it is captured for, and how much was asked; more than the event holds where the rest was refused.
    transaction_id text CHECK (length(transaction_id) BETWEEN 1 AND 128),
    asked_amount   bigint CHECK (asked_amount > 0),
    -- Nothing is placed under this name from then on.
    released_at    timestamptz,
    created_at     timestamptz NOT NULL,
    PRIMARY KEY (vault_id, request_id),
    CONSTRAINT external_holds_key FOREIGN KEY (vault_id, api_key_id) REFERENCES api_keys (vault_id, api_key_id),
    CONSTRAINT external_holds_whole
        CHECK (num_nulls(api_id, endpoint_id, amount, ttl_seconds, fingerprint, event_amount) IN (0, 6)),
    CONSTRAINT external_holds_remembered CHECK (amount IS NOT NULL OR released_at IS NOT NULL AND transaction_id IS NULL),
    CONSTRAINT external_holds_asked CHECK ((transaction_id IS NULL) = (asked_amount IS NULL))
);
-- Services name these without their vault.
CREATE UNIQUE INDEX external_holds_hold ON external_holds (hold_id, vault_id);
CREATE UNIQUE INDEX external_holds_event ON external_holds (event_id, vault_id);
CREATE UNIQUE INDEX external_holds_transaction ON external_holds (transaction_id, vault_id);

-- What a hold may become, by what has become of its event. A transaction is bound to a hold that is open, stays with one
-- that is captured, and leaves only one that has ended uncharged; another event takes the place of one that expired.
CREATE FUNCTION refuse_hold_rewrite() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    became usage_state;
BEGIN
    IF ROW (NEW.vault_id, NEW.request_id, NEW.hold_id, NEW.api_key_id, NEW.api_id, NEW.endpoint_id, NEW.amount,
            NEW.ttl_seconds, NEW.fingerprint, NEW.created_at)
       IS DISTINCT FROM ROW (OLD.vault_id, OLD.request_id, OLD.hold_id, OLD.api_key_id, OLD.api_id, OLD.endpoint_id,
            OLD.amount, OLD.ttl_seconds, OLD.fingerprint, OLD.created_at)
       OR (OLD.released_at IS NOT NULL AND NEW.released_at IS DISTINCT FROM OLD.released_at) THEN
        RAISE EXCEPTION 'external_holds: what was asked is never changed, and what is released stays so'
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'holds_move_forwards';
    END IF;
    SELECT state INTO became FROM usage_events WHERE vault_id = OLD.vault_id AND event_id = OLD.event_id;
    IF (became IS NOT DISTINCT FROM 'captured')
       OR ((NEW.event_id, NEW.event_amount) IS DISTINCT FROM (OLD.event_id, OLD.event_amount)
           AND (became IS DISTINCT FROM 'expired' OR NEW.released_at IS NOT NULL OR NEW.transaction_id IS NOT NULL))
       OR ((NEW.transaction_id, NEW.asked_amount) IS DISTINCT FROM (OLD.transaction_id, OLD.asked_amount)
           AND NOT CASE WHEN OLD.transaction_id IS NULL THEN became IS NOT DISTINCT FROM 'held' AND NEW.released_at IS NULL
                   ELSE NEW.transaction_id IS NULL AND coalesce(became IN ('released', 'expired'), false) END) THEN
        RAISE EXCEPTION 'external_holds: hold % is %', OLD.hold_id, coalesce(became::text, 'not placed')
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'holds_move_forwards';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER holds_move_forwards BEFORE UPDATE ON external_holds
    FOR EACH ROW EXECUTE FUNCTION refuse_hold_rewrite();
CREATE TRIGGER holds_never_deleted BEFORE DELETE ON external_holds
    FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER holds_never_emptied BEFORE TRUNCATE ON external_holds
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite();

-- What a hold was extended by, once for each name of it; written with the extension.
CREATE TABLE hold_extensions (
    vault_id    uuid NOT NULL,
    event_id    uuid NOT NULL,
    ref         text NOT NULL CHECK (length(ref) BETWEEN 1 AND 200),
    seconds     integer NOT NULL CHECK (seconds >= 0),
    amount      bigint NOT NULL CHECK (amount >= 0),
    extended_at timestamptz NOT NULL,
    PRIMARY KEY (vault_id, event_id, ref)
);
CREATE TRIGGER extensions_never_rewritten BEFORE UPDATE OR DELETE ON hold_extensions
    FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER extensions_never_emptied BEFORE TRUNCATE ON hold_extensions
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite();
