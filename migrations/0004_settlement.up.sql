-- Settlement: what developers earned, and how they are paid for it, once, on chain. Revenue is derived from captured usage
-- and refunds; a settlement seals revenue of at most 50 developers, charges the vault contract for it and credits them.

-- The platform's share of a call, by the date of the call: a new share never changes what was earned before it.
CREATE TABLE platform_fees (
    effective_from timestamptz PRIMARY KEY,
    bps            integer NOT NULL CHECK (bps BETWEEN 0 AND 10000)
);
CREATE TRIGGER fees_never_rewritten BEFORE UPDATE OR DELETE ON platform_fees
    FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();

-- Rounded down: the developer loses no stroop to rounding. In two parts, so that no amount overflows.
CREATE FUNCTION platform_fee(amount bigint, bps integer) RETURNS bigint LANGUAGE sql IMMUTABLE AS $$
    SELECT (amount / 10000) * bps + (amount % 10000) * bps / 10000
$$;

-- How far the indexer is; its row is locked while a pass runs and while revenue is sealed. Passes are numbered: every entry
-- up to a number that can be read here is there, and none is ever added to it.
CREATE TABLE revenue_index (
    only_row   boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    done_until timestamptz NOT NULL,
    as_of      timestamptz NOT NULL,
    pass       bigint NOT NULL CHECK (pass >= 0)
);
INSERT INTO revenue_index (done_until, as_of, pass) VALUES ('epoch', 'epoch', 0);

-- Holds that were open when their time became final. Each leaves in the transaction that indexes it.
CREATE TABLE revenue_open (
    vault_id uuid NOT NULL,
    event_id uuid NOT NULL,
    PRIMARY KEY (vault_id, event_id)
);

-- One row a captured usage event (refund_seq 0), one a refund of it (the seq of its ledger entry, amounts below 0).
CREATE TABLE revenue_entries (
    vault_id     uuid NOT NULL,
    event_id     uuid NOT NULL,
    refund_seq   bigint NOT NULL CHECK (refund_seq >= 0),
    network      text NOT NULL CHECK (network IN ('testnet', 'mainnet')),
    developer_id uuid NOT NULL,
    api_id       bigint NOT NULL,
    -- What the caller paid or got back, what of it is the platform's, what the developer's.
    gross        bigint NOT NULL CHECK (gross <> 0 AND (gross > 0) = (refund_seq = 0)),
    fee          bigint NOT NULL CHECK (abs(fee) <= abs(gross) AND sign(fee) * sign(gross) >= 0),
    net          bigint NOT NULL GENERATED ALWAYS AS (gross - fee) STORED,
    -- Of the call, or of the refund.
    at           timestamptz NOT NULL,
    -- Which pass of the indexer found it: what was sealed before that pass is without it.
    pass         bigint NOT NULL CHECK (pass > 0),
    PRIMARY KEY (vault_id, event_id, refund_seq)
);
CREATE INDEX revenue_entries_developer ON revenue_entries (network, developer_id, pass);
CREATE TRIGGER revenue_never_rewritten BEFORE UPDATE OR DELETE ON revenue_entries
    FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER revenue_never_emptied BEFORE TRUNCATE ON revenue_entries
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite();

-- A developer's revenue on a network: all of it, moved by the passes; and how much of it is sealed, moved by triggers of
-- settlement_items and settlements alone. An entry is in a live settlement when its pass is in the range of one of its
-- developer's items there; ranges follow each other without gaps, so none is in two.
CREATE TABLE revenue_accounts (
    network         text NOT NULL CHECK (network IN ('testnet', 'mainnet')),
    developer_id    uuid NOT NULL,
    entries         bigint NOT NULL CHECK (entries > 0),
    gross           bigint NOT NULL,
    fee             bigint NOT NULL,
    sealed_pass     bigint NOT NULL DEFAULT 0 CHECK (sealed_pass >= 0),
    sealed_gross    bigint NOT NULL DEFAULT 0 CHECK (sealed_gross >= 0),
    sealed_fee      bigint NOT NULL DEFAULT 0 CHECK (sealed_fee BETWEEN 0 AND sealed_gross),
    -- The settlement that is under way; there is one at a time.
    open_settlement uuid,
    -- Why this developer is not paid for now, as last found, and until when nobody looks again.
    held_back       text CHECK (held_back IN ('no_wallet', 'no_account', 'no_trustline', 'refused', 'over_cap')),
    held_back_until timestamptz,
    PRIMARY KEY (network, developer_id),
    CHECK ((held_back IS NULL) = (held_back_until IS NULL))
) WITH (fillfactor = 70);

-- One batch on chain: one charge of the vault contract, then the credits of it.
CREATE TABLE settlements (
    settlement_id uuid PRIMARY KEY,
    network       text NOT NULL CHECK (network IN ('testnet', 'mainnet')),
    epoch         integer NOT NULL CHECK (epoch > 0),
    state         text NOT NULL
                  CHECK (state IN ('open', 'sealed', 'charge_sent', 'charged', 'credit_sent', 'completed', 'failed')),
    items         integer NOT NULL CHECK (items BETWEEN 1 AND 50),
    charge_total  bigint NOT NULL CHECK (charge_total > 0),
    credit_total  bigint NOT NULL CHECK (credit_total > 0 AND credit_total <= charge_total),
    -- How it is known that the charge is made: its transaction, or the contract that knows its ids already (error 29).
    charged_by    text CHECK (charged_by IN ('transaction', 'found')),
    charge_hash   bytea CHECK (length(charge_hash) = 32),
    failure       text CHECK (length(failure) <= 200),
    opened_at     timestamptz NOT NULL,
    moved_at      timestamptz NOT NULL,
    charged_at    timestamptz,
    ended_at      timestamptz,
    CHECK ((state = 'failed') = (failure IS NOT NULL)),
    CHECK ((state IN ('completed', 'failed')) = (ended_at IS NOT NULL)),
    CHECK ((charged_by IS NULL) = (charged_at IS NULL)),
    CHECK ((charge_hash IS NOT NULL) = coalesce(charged_by = 'transaction', false)),
    CHECK (state NOT IN ('charged', 'credit_sent', 'completed') OR charged_by IS NOT NULL),
    CHECK (state NOT IN ('open', 'sealed', 'charge_sent') OR charged_by IS NULL)
);
CREATE INDEX settlements_open ON settlements (network, opened_at) WHERE state NOT IN ('completed', 'failed');
CREATE INDEX settlements_listing ON settlements (network, opened_at DESC, settlement_id);

-- What one developer gets by a settlement; without a developer, the platform's fees of all of them. Never changed.
CREATE TABLE settlement_items (
    settlement_id uuid NOT NULL REFERENCES settlements,
    position      integer NOT NULL CHECK (position BETWEEN 1 AND 50),
    network       text NOT NULL,
    developer_id  uuid,
    address       text NOT NULL CHECK (address ~ '^[GC][A-Z2-7]{55}$'),
    -- Entries of its developer found by the passes after the first number, up to the second.
    from_pass     bigint,
    to_pass       bigint,
    gross         bigint NOT NULL CHECK (gross >= 0),
    fee           bigint NOT NULL CHECK (fee >= 0),
    credit        bigint NOT NULL CHECK (credit > 0),
    -- What the vault contract knows the charge by: 32 hex of settlement and developer.
    request_id    text UNIQUE CHECK (request_id ~ '^[0-9a-f]{32}$'),
    PRIMARY KEY (settlement_id, position),
    UNIQUE (settlement_id, developer_id),
    UNIQUE (settlement_id, address),
    CHECK (num_nulls(developer_id, from_pass, to_pass, request_id) IN (0, 4)),
    CHECK (developer_id IS NULL OR (gross > 0 AND credit = gross - fee AND from_pass < to_pass)),
    CHECK (developer_id IS NOT NULL OR (gross = 0 AND fee = 0))
);
CREATE INDEX settlement_items_developer ON settlement_items (network, developer_id, to_pass);
CREATE UNIQUE INDEX settlement_items_platform ON settlement_items (settlement_id) WHERE developer_id IS NULL;

CREATE FUNCTION seal_revenue() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    settlement settlements%ROWTYPE;
    account    revenue_accounts%ROWTYPE;
    last_pass  bigint;
BEGIN
    SELECT * INTO settlement FROM settlements WHERE settlement_id = NEW.settlement_id FOR SHARE;
    IF settlement.state IS DISTINCT FROM 'open' OR settlement.network <> NEW.network THEN
        RAISE EXCEPTION 'settlement_items: what is sealed is not added to'
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'items_of_open_settlement';
    END IF;
    IF NEW.developer_id IS NULL THEN
        RETURN NEW;
    END IF;
    SELECT pass INTO last_pass FROM revenue_index FOR SHARE;
    SELECT * INTO account FROM revenue_accounts
        WHERE network = NEW.network AND developer_id = NEW.developer_id FOR UPDATE;
    IF account.open_settlement IS NOT NULL THEN
        RAISE EXCEPTION 'settlement_items: developer % is being settled', NEW.developer_id
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'one_settlement_a_developer';
    END IF;
    IF ROW (NEW.from_pass, NEW.to_pass, NEW.gross, NEW.fee) IS DISTINCT FROM ROW (account.sealed_pass, last_pass,
            account.gross - account.sealed_gross, greatest(account.fee - account.sealed_fee, 0)) THEN
        RAISE EXCEPTION 'settlement_items: this is not what developer % has earned since the last one', NEW.developer_id
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'items_of_unsealed_revenue';
    END IF;
    UPDATE revenue_accounts
    SET sealed_pass = NEW.to_pass, sealed_gross = sealed_gross + NEW.gross, sealed_fee = sealed_fee + NEW.fee,
        open_settlement = NEW.settlement_id, held_back = NULL, held_back_until = NULL
    WHERE network = NEW.network AND developer_id = NEW.developer_id;
    RETURN NEW;
END $$;
CREATE TRIGGER items_seal_revenue BEFORE INSERT ON settlement_items FOR EACH ROW EXECUTE FUNCTION seal_revenue();
CREATE TRIGGER items_never_rewritten BEFORE UPDATE OR DELETE ON settlement_items
    FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER items_never_emptied BEFORE TRUNCATE ON settlement_items
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite();

-- The credits of a charged settlement: part 1 is all of it. A part that cannot be made as a whole is split in two halves,
-- 2n and 2n + 1, so that no position is in two parts that may be made. `attempt` counts transactions that failed on chain.
CREATE TABLE settlement_credits (
    settlement_id  uuid NOT NULL REFERENCES settlements,
    part           integer NOT NULL CHECK (part BETWEEN 1 AND 127),
    first_position integer NOT NULL,
    last_position  integer NOT NULL CHECK (last_position >= first_position),
    amount         bigint NOT NULL CHECK (amount > 0),
    state          text NOT NULL CHECK (state IN ('sent', 'credited', 'split')),
    attempt        integer NOT NULL DEFAULT 1 CHECK (attempt > 0),
    hash           bytea CHECK (length(hash) = 32),
    moved_at       timestamptz NOT NULL,
    PRIMARY KEY (settlement_id, part),
    CHECK ((state = 'credited') = (hash IS NOT NULL)),
    CHECK (state <> 'split' OR last_position > first_position)
);

-- What the charging and the crediting key were allowed to move, reserved before anything is sent; by hour there is a cap.
CREATE TABLE signer_spending (
    network  text NOT NULL,
    purpose  text NOT NULL CHECK (length(purpose) BETWEEN 1 AND 120),
    signer   text NOT NULL CHECK (signer IN ('charging', 'crediting')),
    amount   bigint NOT NULL CHECK (amount > 0),
    -- Stroops an hour, as the process that reserved was told.
    cap      bigint NOT NULL CHECK (cap > 0),
    at       timestamptz NOT NULL,
    released boolean NOT NULL DEFAULT false,
    PRIMARY KEY (network, purpose)
);
CREATE INDEX signer_spending_lately ON signer_spending (network, signer, at) WHERE NOT released;

-- Who runs settlements of a network: a lease that is renewed. Not what keeps money right, which are the rules below, but
-- what keeps processes from doing the same work. `wanted_at`: somebody asks for a run now; `served_at`: what was asked for
-- until then is done.
CREATE TABLE settlement_runners (
    network    text PRIMARY KEY CHECK (network IN ('testnet', 'mainnet')),
    holder     uuid,
    held_until timestamptz,
    wanted_at  timestamptz,
    served_at  timestamptz,
    ran_at     timestamptz,
    -- What the last run came to, for whoever asked for it.
    said       text CHECK (length(said) <= 500),
    CHECK ((holder IS NULL) = (held_until IS NULL))
);
INSERT INTO settlement_runners (network) VALUES ('testnet'), ('mainnet');

CREATE FUNCTION refuse_overspending() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    spent bigint;
BEGIN
    -- One at a time, whichever process asks.
    PERFORM FROM settlement_runners WHERE network = NEW.network FOR UPDATE;
    SELECT coalesce(sum(amount), 0) INTO spent FROM signer_spending
        WHERE network = NEW.network AND signer = NEW.signer AND at > NEW.at - interval '1 hour' AND NOT released;
    IF spent + NEW.amount > NEW.cap THEN
        RAISE EXCEPTION 'signer_spending: the % key has spent % of % this hour', NEW.signer, spent, NEW.cap
            USING ERRCODE = 'check_violation', CONSTRAINT = 'spending_within_cap';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER spending_within_cap BEFORE INSERT ON signer_spending
    FOR EACH ROW EXECUTE FUNCTION refuse_overspending();
CREATE TRIGGER spending_never_rewritten BEFORE DELETE OR UPDATE OF network, purpose, signer, amount, cap, at
    ON signer_spending FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER spending_never_emptied BEFORE TRUNCATE ON signer_spending
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite();

-- Settlements walk their states forwards, and each step has to be true.
CREATE FUNCTION guard_settlement() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    present chain_networks%ROWTYPE;
    gone    boolean;
    totals  record;
BEGIN
    SELECT * INTO present FROM chain_networks WHERE network = OLD.network FOR SHARE;
    gone := coalesce(present.epoch > OLD.epoch, false);
    IF ROW (NEW.settlement_id, NEW.network, NEW.epoch, NEW.items, NEW.charge_total, NEW.credit_total, NEW.opened_at)
       IS DISTINCT FROM ROW (OLD.settlement_id, OLD.network, OLD.epoch, OLD.items, OLD.charge_total, OLD.credit_total,
            OLD.opened_at)
       OR (OLD.charged_by IS NOT NULL AND ROW (NEW.charged_by, NEW.charge_hash, NEW.charged_at)
            IS DISTINCT FROM ROW (OLD.charged_by, OLD.charge_hash, OLD.charged_at))
       OR (OLD.state, NEW.state) NOT IN (('open', 'sealed'), ('sealed', 'charge_sent'), ('sealed', 'failed'),
            ('charge_sent', 'charged'), ('charge_sent', 'failed'), ('charged', 'credit_sent'), ('charged', 'failed'),
            ('credit_sent', 'completed'), ('credit_sent', 'failed')) THEN
        RAISE EXCEPTION 'settlements: % does not become %, and what is sealed is not changed', OLD.state, NEW.state
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'settlements_move_forwards';
    END IF;
    IF NEW.state = 'sealed' THEN
        SELECT count(*) AS items, sum(gross) AS gross, sum(credit) AS credit INTO totals FROM settlement_items
            WHERE settlement_id = NEW.settlement_id;
        IF ROW (totals.items, totals.gross, totals.credit)
           IS DISTINCT FROM ROW (NEW.items::bigint, NEW.charge_total::numeric, NEW.credit_total::numeric) THEN
            RAISE EXCEPTION 'settlements: its items are not its totals'
                USING ERRCODE = 'check_violation', CONSTRAINT = 'sealed_as_items_say';
        END IF;
    ELSIF NEW.state = 'charge_sent' THEN
        IF gone OR present.halted IS NOT NULL OR present.settlement_halted IS NOT NULL THEN
            RAISE EXCEPTION 'settlements: nothing is charged until an operator has looked'
                USING ERRCODE = 'restrict_violation', CONSTRAINT = 'settlement_not_halted';
        END IF;
    ELSIF NEW.state = 'charged' THEN
        IF NEW.charged_by = 'transaction' AND NOT EXISTS (
            SELECT FROM chain_transactions WHERE hash = NEW.charge_hash AND network = NEW.network AND epoch = NEW.epoch
                AND purpose = 'charge:' || NEW.settlement_id AND state = 'succeeded') THEN
            RAISE EXCEPTION 'settlements: no transaction of ours has charged this'
                USING ERRCODE = 'restrict_violation', CONSTRAINT = 'charged_on_chain';
        END IF;
        IF NEW.charged_by = 'found' AND EXISTS (
            SELECT FROM chain_transactions WHERE network = NEW.network AND epoch = NEW.epoch
                AND purpose = 'charge:' || NEW.settlement_id AND state IN ('stored', 'sent', 'unresolved')) THEN
            RAISE EXCEPTION 'settlements: a charge of this may be applied yet'
                USING ERRCODE = 'restrict_violation', CONSTRAINT = 'charged_on_chain';
        END IF;
    ELSIF NEW.state = 'completed' THEN
        SELECT sum(amount) FILTER (WHERE state = 'credited') AS credited, count(*) FILTER (WHERE state = 'sent') AS open
            INTO totals FROM settlement_credits WHERE settlement_id = NEW.settlement_id;
        IF totals.open <> 0 OR totals.credited IS DISTINCT FROM NEW.credit_total::numeric THEN
            RAISE EXCEPTION 'settlements: not everyone is credited'
                USING ERRCODE = 'restrict_violation', CONSTRAINT = 'completed_as_credited';
        END IF;
    ELSIF NEW.state = 'failed' AND NOT gone THEN
        -- Its revenue is paid by another one then: nothing of this one may come to be.
        IF OLD.state IN ('charged', 'credit_sent') OR EXISTS (
            SELECT FROM chain_transactions WHERE network = NEW.network AND purpose = 'charge:' || NEW.settlement_id
                AND state IN ('stored', 'sent', 'unresolved', 'succeeded')) THEN
            RAISE EXCEPTION 'settlements: what is charged, or may be, does not fail'
                USING ERRCODE = 'restrict_violation', CONSTRAINT = 'failed_uncharged';
        END IF;
    END IF;
    IF NEW.state = 'failed' THEN
        UPDATE revenue_accounts a
        SET sealed_pass = i.from_pass, sealed_gross = a.sealed_gross - i.gross, sealed_fee = a.sealed_fee - i.fee,
            open_settlement = NULL
        FROM settlement_items i
        WHERE i.settlement_id = NEW.settlement_id AND a.network = i.network AND a.developer_id = i.developer_id
            AND a.open_settlement = NEW.settlement_id AND a.sealed_pass = i.to_pass;
        UPDATE signer_spending SET released = true
        WHERE network = NEW.network AND purpose = 'charge:' || NEW.settlement_id;
    ELSIF NEW.state = 'completed' THEN
        UPDATE revenue_accounts a SET open_settlement = NULL
        FROM settlement_items i
        WHERE i.settlement_id = NEW.settlement_id AND a.network = i.network AND a.developer_id = i.developer_id
            AND a.open_settlement = NEW.settlement_id;
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER settlements_move_forwards BEFORE UPDATE ON settlements
    FOR EACH ROW EXECUTE FUNCTION guard_settlement();

CREATE FUNCTION refuse_unopened_settlement() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.state <> 'open' THEN
        RAISE EXCEPTION 'settlements: one begins open'
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'settlements_move_forwards';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER settlements_begin_open BEFORE INSERT ON settlements
    FOR EACH ROW EXECUTE FUNCTION refuse_unopened_settlement();
CREATE TRIGGER settlements_never_deleted BEFORE DELETE ON settlements
    FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER settlements_never_emptied BEFORE TRUNCATE ON settlements
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite();

-- What was opened is sealed in the same transaction: a crash leaves no half of it.
CREATE FUNCTION refuse_unsealed_settlement() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM settlements WHERE settlement_id = NEW.settlement_id AND state = 'open') THEN
        RAISE EXCEPTION 'settlements: what is opened is sealed at once'
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'settlements_sealed_at_once';
    END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER settlements_sealed_at_once AFTER INSERT ON settlements DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION refuse_unsealed_settlement();

CREATE FUNCTION guard_credit() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    settlement settlements%ROWTYPE;
    parent     settlement_credits%ROWTYPE;
    middle     integer;
    credits    bigint;
BEGIN
    SELECT * INTO settlement FROM settlements WHERE settlement_id = NEW.settlement_id FOR SHARE;
    IF settlement.state <> 'credit_sent' THEN
        RAISE EXCEPTION 'settlement_credits: only what is charged is credited'
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'credits_after_charge';
    END IF;
    IF TG_OP = 'INSERT' THEN
        IF NEW.part = 1 THEN
            IF (NEW.first_position, NEW.last_position) <> (1, settlement.items) THEN
                RAISE EXCEPTION 'settlement_credits: the first part is all of it'
                    USING ERRCODE = 'restrict_violation', CONSTRAINT = 'credits_in_halves';
            END IF;
        ELSE
            SELECT * INTO parent FROM settlement_credits
                WHERE settlement_id = NEW.settlement_id AND part = NEW.part / 2;
            middle := (parent.first_position + parent.last_position) / 2;
            IF parent.state IS DISTINCT FROM 'split' OR (NEW.first_position, NEW.last_position) <>
               (CASE WHEN NEW.part % 2 = 0 THEN parent.first_position ELSE middle + 1 END,
                CASE WHEN NEW.part % 2 = 0 THEN middle ELSE parent.last_position END) THEN
                RAISE EXCEPTION 'settlement_credits: a part is half of one that was split'
                    USING ERRCODE = 'restrict_violation', CONSTRAINT = 'credits_in_halves';
            END IF;
        END IF;
        SELECT sum(credit) INTO credits FROM settlement_items WHERE settlement_id = NEW.settlement_id
            AND position BETWEEN NEW.first_position AND NEW.last_position;
        IF NEW.state <> 'sent' OR NEW.attempt <> 1 OR NEW.amount IS DISTINCT FROM credits THEN
            RAISE EXCEPTION 'settlement_credits: its items are not its amount'
                USING ERRCODE = 'check_violation', CONSTRAINT = 'credits_as_items_say';
        END IF;
        RETURN NEW;
    END IF;
    IF OLD.state <> 'sent'
       OR ROW (NEW.settlement_id, NEW.part, NEW.first_position, NEW.last_position, NEW.amount)
          IS DISTINCT FROM ROW (OLD.settlement_id, OLD.part, OLD.first_position, OLD.last_position, OLD.amount)
       OR NOT ((NEW.state IN ('credited', 'split') AND NEW.attempt = OLD.attempt)
               OR (NEW.state = 'sent' AND NEW.attempt = OLD.attempt + 1)) THEN
        RAISE EXCEPTION 'settlement_credits: what is credited or split stays so'
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'credits_move_forwards';
    END IF;
    IF NEW.state = 'credited' THEN
        IF NOT EXISTS (SELECT FROM chain_transactions
                       WHERE hash = NEW.hash AND network = settlement.network AND epoch = settlement.epoch
                           AND state = 'succeeded'
                           AND purpose = 'credit:' || NEW.settlement_id || ':' || NEW.part || '.' || NEW.attempt) THEN
            RAISE EXCEPTION 'settlement_credits: no transaction of ours has credited this'
                USING ERRCODE = 'restrict_violation', CONSTRAINT = 'credited_on_chain';
        END IF;
    ELSIF EXISTS (SELECT FROM chain_transactions
                  WHERE network = settlement.network AND state IN ('stored', 'sent', 'unresolved', 'succeeded')
                      AND purpose = 'credit:' || NEW.settlement_id || ':' || NEW.part || '.' || OLD.attempt) THEN
        RAISE EXCEPTION 'settlement_credits: what is credited, or may be, is not tried in another way'
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'credited_once';
    ELSE
        UPDATE signer_spending SET released = true
        WHERE network = settlement.network
            AND purpose = 'credit:' || NEW.settlement_id || ':' || NEW.part || '.' || OLD.attempt;
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER credits_move_forwards BEFORE INSERT OR UPDATE ON settlement_credits
    FOR EACH ROW EXECUTE FUNCTION guard_credit();
CREATE TRIGGER credits_never_deleted BEFORE DELETE ON settlement_credits
    FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER credits_never_emptied BEFORE TRUNCATE ON settlement_credits
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite();

-- A charge or a credit is stored, and so sent, only for a step that is under way and within the cap of its key. The rows'
-- locks make this or the end of the step come first.
CREATE FUNCTION refuse_unsettled_transaction() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    settled uuid := split_part(NEW.purpose, ':', 2)::uuid;
    due     boolean;
BEGIN
    IF NEW.purpose LIKE 'charge:%' THEN
        SELECT s.state = 'charge_sent' AND s.epoch = NEW.epoch AND n.settlement_halted IS NULL INTO due
            FROM settlements s JOIN chain_networks n USING (network)
            WHERE s.settlement_id = settled AND s.network = NEW.network FOR SHARE;
    ELSE
        SELECT c.state = 'sent' AND s.state = 'credit_sent' AND s.epoch = NEW.epoch INTO due
            FROM settlement_credits c JOIN settlements s USING (settlement_id)
            WHERE s.settlement_id = settled AND s.network = NEW.network
                AND c.part || '.' || c.attempt = split_part(NEW.purpose, ':', 3) FOR SHARE;
    END IF;
    IF NOT coalesce(due, false)
       OR NOT EXISTS (SELECT FROM signer_spending WHERE network = NEW.network AND purpose = NEW.purpose) THEN
        RAISE EXCEPTION 'chain_transactions: % is not due', NEW.purpose
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'settlement_step_due';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER settlement_step_due BEFORE INSERT ON chain_transactions
    FOR EACH ROW WHEN (NEW.purpose LIKE 'charge:%' OR NEW.purpose LIKE 'credit:%')
    EXECUTE FUNCTION refuse_unsettled_transaction();

-- What happened and others want to hear of, written with what happened. Delivered by whoever is asked to.
CREATE TABLE outbox (
    event_id   uuid PRIMARY KEY,
    type       text NOT NULL CHECK (type ~ '^[a-z][a-z_]{0,62}$'),
    subject    text NOT NULL CHECK (length(subject) BETWEEN 1 AND 200),
    -- Whom it concerns; null for operators alone.
    user_id    uuid REFERENCES users,
    payload    jsonb NOT NULL CHECK (jsonb_typeof(payload) = 'object'),
    created_at timestamptz NOT NULL,
    UNIQUE (type, subject)
);
CREATE INDEX outbox_created ON outbox (created_at, event_id);
CREATE TRIGGER outbox_never_rewritten BEFORE UPDATE ON outbox FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();
