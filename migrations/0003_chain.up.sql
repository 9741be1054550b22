-- The chain: transactions that Callora sends, deposits and withdrawals, and what the vault contract's events say.
-- A network here is testnet or mainnet; an epoch counts its histories, because a test network starts again at times and
-- ledger numbers and event ids then come a second time.

CREATE TABLE chain_networks (
    network     text PRIMARY KEY CHECK (network IN ('testnet', 'mainnet')),
    passphrase  text NOT NULL,
    epoch       integer NOT NULL DEFAULT 1 CHECK (epoch > 0),
    contract_id text NOT NULL CHECK (contract_id ~ '^C[A-Z2-7]{55}$'),
    -- Everything in ledgers up to this one is in chain_events; `cursor` is where the next page begins. `closed_at` is when
    -- the newest ledger that was seen closed: an older number with a later date is another history.
    ledger      bigint NOT NULL CHECK (ledger >= 0),
    seen_ledger bigint NOT NULL CHECK (seen_ledger >= ledger),
    closed_at   timestamptz,
    cursor      text,
    -- What the contract had before the first event that was seen; null until one was.
    opening     bigint,
    -- Why nothing is noted or credited, and why nothing is settled; both until an operator has looked.
    halted            text CHECK (length(halted) <= 200),
    settlement_halted text CHECK (length(settlement_halted) <= 200),
    updated_at  timestamptz NOT NULL,
    CHECK ((seen_ledger = 0) = (closed_at IS NULL))
);

-- Ledgers that no node could show any more when they were wanted. Closed by an operator who looked elsewhere and says
-- by how much they moved the contract's balance.
CREATE TABLE chain_gaps (
    network      text NOT NULL REFERENCES chain_networks,
    epoch        integer NOT NULL,
    first_ledger bigint NOT NULL,
    last_ledger  bigint NOT NULL CHECK (last_ledger >= first_ledger),
    found_at     timestamptz NOT NULL,
    closed_at    timestamptz,
    closed_by    text,
    moved        bigint,
    PRIMARY KEY (network, epoch, first_ledger),
    CHECK ((closed_at IS NULL) = (moved IS NULL) AND (closed_at IS NULL) = (closed_by IS NULL))
);

-- What moved the vault contract's balance, once each. `noted` in the transaction that moves the cursor past it; then
-- booked in the ledger under its id, or kept in suspense until somebody proves to be the depositor.
CREATE TABLE chain_events (
    network       text NOT NULL REFERENCES chain_networks,
    epoch         integer NOT NULL,
    event_id      text NOT NULL CHECK (event_id ~ '^[0-9]{19}-[0-9]{10}$'),
    kind          text NOT NULL CHECK (kind IN ('deposit', 'withdraw', 'withdraw_to', 'deduct', 'distribute')),
    ledger        bigint NOT NULL,
    closed_at     timestamptz NOT NULL,
    tx_hash       bytea NOT NULL CHECK (length(tx_hash) = 32),
    address       text CHECK (address ~ '^[GC][A-Z2-7]{55}$'),
    amount        bigint NOT NULL CHECK (amount > 0),
    balance_after bigint,
    state         text NOT NULL CHECK (state IN ('noted', 'booked', 'suspense')),
    vault_id      uuid REFERENCES vaults,
    noted_at      timestamptz NOT NULL,
    booked_at     timestamptz,
    PRIMARY KEY (network, epoch, event_id),
    CHECK ((state = 'booked') = (booked_at IS NOT NULL)),
    CHECK (state <> 'suspense' OR vault_id IS NULL),
    CHECK (kind <> 'deposit' OR state <> 'booked' OR vault_id IS NOT NULL)
);
CREATE INDEX chain_events_open ON chain_events (network, epoch, event_id) WHERE state = 'noted';
CREATE INDEX chain_events_suspense ON chain_events (network, address, event_id) WHERE state = 'suspense';
CREATE INDEX chain_events_transaction ON chain_events (tx_hash);
CREATE INDEX chain_events_vault ON chain_events (vault_id, closed_at DESC) WHERE kind = 'deposit';

-- An event says what happened: only what was done about it may change, and only forwards.
CREATE FUNCTION refuse_event_rewrite() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF ROW (NEW.network, NEW.epoch, NEW.event_id, NEW.kind, NEW.ledger, NEW.closed_at, NEW.tx_hash, NEW.address,
            NEW.amount, NEW.balance_after, NEW.noted_at)
       IS DISTINCT FROM ROW (OLD.network, OLD.epoch, OLD.event_id, OLD.kind, OLD.ledger, OLD.closed_at, OLD.tx_hash,
            OLD.address, OLD.amount, OLD.balance_after, OLD.noted_at)
       OR OLD.state = 'booked' OR (OLD.vault_id IS NOT NULL AND NEW.vault_id IS DISTINCT FROM OLD.vault_id) THEN
        RAISE EXCEPTION 'chain_events: what the chain said is never changed, and what is booked stays booked'
            USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER events_say_what_happened BEFORE UPDATE ON chain_events
    FOR EACH ROW EXECUTE FUNCTION refuse_event_rewrite();
CREATE TRIGGER events_never_deleted BEFORE DELETE ON chain_events
    FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER events_never_emptied BEFORE TRUNCATE ON chain_events
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite();

-- Every transaction that Callora sends, stored before it is first sent. One purpose has one transaction that may still
-- be applied; a second is built only when the first is provably dead, or has failed on chain for a reason that goes away.
CREATE TABLE chain_transactions (
    -- Of the transaction itself: of a fee-bump that was passed on, the inner one's.
    hash              bytea PRIMARY KEY CHECK (length(hash) = 32),
    outer_hash        bytea UNIQUE CHECK (length(outer_hash) = 32),
    network           text NOT NULL CHECK (network IN ('testnet', 'mainnet')),
    epoch             integer NOT NULL CHECK (epoch > 0),
    purpose           text NOT NULL CHECK (length(purpose) BETWEEN 1 AND 120),
    envelope          text NOT NULL,
    source_account    text NOT NULL CHECK (source_account ~ '^G[A-Z2-7]{55}$'),
    sequence          bigint NOT NULL,
    max_time          timestamptz NOT NULL,
    fee               bigint NOT NULL CHECK (fee > 0),
    -- Closed before anybody could have sent it: it is in no ledger up to this one.
    prepared_ledger   bigint NOT NULL CHECK (prepared_ledger > 0),
    -- What it offers for its inclusion, stroops of XLM an operation.
    bid               bigint NOT NULL CHECK (bid >= 0),
    -- Built on a channel account of Callora's: nobody but Callora has the envelope, and nobody else sends it.
    channel           boolean NOT NULL,
    -- Whether a fee-bump at Callora's cost may help it.
    sponsored         boolean NOT NULL,
    -- How many of its purpose failed on chain before it.
    failed_before     integer NOT NULL CHECK (failed_before >= 0),
    -- unresolved: its time is past and no node that was asked can tell what became of it; an operator looks elsewhere.
    state             text NOT NULL CHECK (state IN ('stored', 'sent', 'unresolved', 'succeeded', 'failed', 'dead')),
    -- Counted before each send; `untaken` after one that provably came to nothing: unsent, or refused by the node.
    sends             integer NOT NULL DEFAULT 0 CHECK (sends >= 0),
    untaken           integer NOT NULL DEFAULT 0 CHECK (untaken BETWEEN 0 AND sends),
    sent_at           timestamptz,
    refusal           text CHECK (length(refusal) <= 120),
    ledger            bigint,
    applied_at        timestamptz,
    result_code       text CHECK (length(result_code) <= 120),
    operation_code    text CHECK (length(operation_code) <= 120),
    contract_error    integer,
    reason            text CHECK (length(reason) <= 500),
    return_value      text,
    fee_charged       bigint,
    -- True of the one whose outcome is its purpose's, a success or a failure that trying again would repeat.
    closes_purpose    boolean NOT NULL DEFAULT false,
    -- What a node had when it knew nothing of it: a ledger past the time bound, and all of them since it was prepared.
    proof_closed_at   timestamptz,
    proof_oldest      bigint,
    proof_latest      bigint,
    stored_at         timestamptz NOT NULL,
    ended_at          timestamptz,
    CHECK ((state IN ('succeeded', 'failed', 'dead')) = (ended_at IS NOT NULL)),
    CHECK ((state IN ('succeeded', 'failed')) = (ledger IS NOT NULL AND applied_at IS NOT NULL
                                                 AND result_code IS NOT NULL AND fee_charged IS NOT NULL)),
    CHECK (state <> 'succeeded' OR closes_purpose),
    CHECK (NOT closes_purpose OR state IN ('succeeded', 'failed')),
    CHECK (state <> 'stored' OR sends = 0),
    CHECK (state NOT IN ('sent', 'unresolved') OR sends > 0),
    CHECK ((sends > 0) = (sent_at IS NOT NULL))
);
CREATE UNIQUE INDEX chain_transactions_one_open ON chain_transactions (network, purpose)
    WHERE state IN ('stored', 'sent', 'unresolved');
CREATE UNIQUE INDEX chain_transactions_one_outcome ON chain_transactions (network, epoch, purpose)
    WHERE state IN ('stored', 'sent', 'unresolved') OR closes_purpose;
-- A channel's sequence number belongs to one transaction until that can no longer be applied.
CREATE UNIQUE INDEX chain_transactions_one_a_channel ON chain_transactions (network, epoch, source_account)
    WHERE channel AND state IN ('stored', 'sent');
CREATE UNIQUE INDEX chain_transactions_one_a_sequence ON chain_transactions (network, epoch, source_account, sequence)
    WHERE channel AND state IN ('succeeded', 'failed');
CREATE INDEX chain_transactions_open ON chain_transactions (network, stored_at)
    WHERE state IN ('stored', 'sent', 'unresolved');
CREATE INDEX chain_transactions_purpose ON chain_transactions (network, purpose, stored_at);

-- Fee-bumps around a stored transaction: each has a hash of its own and the same inner transaction.
CREATE TABLE chain_bumps (
    hash       bytea PRIMARY KEY CHECK (length(hash) = 32),
    inner_hash bytea NOT NULL REFERENCES chain_transactions,
    envelope   text NOT NULL,
    fee        bigint NOT NULL CHECK (fee > 0),
    bid        bigint NOT NULL CHECK (bid > 0),
    stored_at  timestamptz NOT NULL
);
CREATE INDEX chain_bumps_inner ON chain_bumps (inner_hash);

CREATE FUNCTION refuse_unstored_transaction() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.state <> 'stored' THEN
        RAISE EXCEPTION 'chain_transactions: a transaction is stored before it is sent'
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'stored_before_sent';
    END IF;
    IF EXISTS (SELECT FROM chain_networks WHERE network = NEW.network AND (epoch <> NEW.epoch OR halted IS NOT NULL))
    THEN
        RAISE EXCEPTION 'chain_transactions: the network is halted or on another history'
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'network_not_halted';
    END IF;
    -- Not an index over the open ones as well: of a number that an unresolved one may have used, the next one shows it.
    IF NEW.channel AND EXISTS (
        SELECT FROM chain_transactions WHERE network = NEW.network AND epoch = NEW.epoch AND channel
            AND source_account = NEW.source_account AND sequence = NEW.sequence AND state IN ('succeeded', 'failed'))
    THEN
        RAISE EXCEPTION 'chain_transactions: the sequence number is used'
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'chain_transactions_one_a_sequence';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER stored_before_sent BEFORE INSERT ON chain_transactions
    FOR EACH ROW EXECUTE FUNCTION refuse_unstored_transaction();

CREATE FUNCTION refuse_transaction_rewrite() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF ROW (NEW.hash, NEW.outer_hash, NEW.network, NEW.epoch, NEW.purpose, NEW.envelope, NEW.source_account,
            NEW.sequence, NEW.max_time, NEW.fee, NEW.prepared_ledger, NEW.bid, NEW.channel, NEW.sponsored,
            NEW.failed_before, NEW.stored_at)
       IS DISTINCT FROM ROW (OLD.hash, OLD.outer_hash, OLD.network, OLD.epoch, OLD.purpose, OLD.envelope,
            OLD.source_account, OLD.sequence, OLD.max_time, OLD.fee, OLD.prepared_ledger, OLD.bid, OLD.channel,
            OLD.sponsored, OLD.failed_before, OLD.stored_at)
       OR OLD.state IN ('succeeded', 'failed', 'dead')
       OR NEW.sends < OLD.sends OR NEW.untaken < OLD.untaken
       OR (OLD.state <> 'stored' AND NEW.state = 'stored') OR (OLD.state = 'unresolved' AND NEW.state = 'sent') THEN
        RAISE EXCEPTION 'chain_transactions: an envelope is never changed, and what has ended has ended'
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'envelopes_never_change';
    END IF;
    IF NEW.state IN ('unresolved', 'dead') AND NEW.sends <> OLD.sends THEN
        RAISE EXCEPTION 'chain_transactions: what is sent once more has not ended'
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'dead_only_with_proof';
    END IF;
    IF NEW.state = 'unresolved' AND NOT coalesce(NEW.proof_closed_at > NEW.max_time, false) THEN
        RAISE EXCEPTION 'chain_transactions: until its time bound is past its channel waits for it'
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'unresolved_only_past_its_time';
    END IF;
    -- Dead is what no send of can have reached the network, as nobody else has it; or what a ledger past its time bound
    -- found unapplied, as told by a node that has every ledger since it was prepared; or what was meant for a history that is gone.
    IF NEW.state = 'dead'
       AND NOT (NEW.channel AND NEW.sends = NEW.untaken)
       AND NOT coalesce(NEW.proof_closed_at > NEW.max_time
                        AND NEW.prepared_ledger BETWEEN NEW.proof_oldest AND NEW.proof_latest, false)
       AND NOT (NEW.proof_closed_at > NEW.max_time
                AND EXISTS (SELECT FROM chain_networks WHERE network = NEW.network AND epoch > NEW.epoch)) THEN
        RAISE EXCEPTION 'chain_transactions: nothing is called dead without proof'
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'dead_only_with_proof';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER envelopes_never_change BEFORE UPDATE ON chain_transactions
    FOR EACH ROW EXECUTE FUNCTION refuse_transaction_rewrite();
CREATE TRIGGER transactions_never_deleted BEFORE DELETE ON chain_transactions
    FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER transactions_never_emptied BEFORE TRUNCATE ON chain_transactions
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite();

-- A network takes another bid for a queued transaction only when it is ten times the one before.
CREATE FUNCTION refuse_low_bump() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    inner_state text;
    bid_before  bigint;
BEGIN
    SELECT state, bid INTO inner_state, bid_before FROM chain_transactions
        WHERE hash = NEW.inner_hash AND sponsored FOR UPDATE;
    IF inner_state IS DISTINCT FROM 'stored' AND inner_state IS DISTINCT FROM 'sent' THEN
        RAISE EXCEPTION 'chain_bumps: only what is open and sponsored is helped'
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'bumps_of_the_open';
    END IF;
    SELECT greatest(bid_before, max(bid)) INTO bid_before FROM chain_bumps WHERE inner_hash = NEW.inner_hash;
    IF NEW.bid < 10 * bid_before AND NOT EXISTS (SELECT FROM chain_bumps WHERE hash = NEW.hash) THEN
        RAISE EXCEPTION 'chain_bumps: a bid replaces another only when it is ten times as high'
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'bumps_tenfold';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER bumps_tenfold BEFORE INSERT ON chain_bumps FOR EACH ROW EXECUTE FUNCTION refuse_low_bump();
CREATE TRIGGER bumps_never_change BEFORE UPDATE OR DELETE ON chain_bumps
    FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER bumps_never_emptied BEFORE TRUNCATE ON chain_bumps
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite();

-- Who may deposit: the contract takes deposits of listed addresses only, and its owner lists them.
CREATE TABLE depositors (
    network     text NOT NULL,
    epoch       integer NOT NULL,
    address     text NOT NULL CHECK (address ~ '^[GC][A-Z2-7]{55}$'),
    user_id     uuid NOT NULL REFERENCES users,
    state       text NOT NULL CHECK (state IN ('asked', 'admitted', 'refused')),
    reason      text CHECK (length(reason) <= 200),
    -- What the owner was given to sign, where his key is not here.
    envelope    text,
    prepared_ledger bigint CHECK (prepared_ledger > 0),
    asked_at    timestamptz NOT NULL,
    answered_at timestamptz,
    PRIMARY KEY (network, epoch, address),
    CHECK ((envelope IS NULL) = (prepared_ledger IS NULL)),
    CHECK ((state = 'asked') = (answered_at IS NULL))
);
CREATE INDEX depositors_asked ON depositors (network, asked_at) WHERE state = 'asked';
CREATE INDEX depositors_user ON depositors (user_id, network, epoch);

-- A deposit that a wallet was asked to sign. Its hash is the transaction's own, so it is known before the signature is.
CREATE TABLE deposit_intents (
    tx_hash     bytea PRIMARY KEY CHECK (length(tx_hash) = 32),
    network     text NOT NULL,
    epoch       integer NOT NULL,
    vault_id    uuid NOT NULL REFERENCES vaults,
    address     text NOT NULL CHECK (address ~ '^[GC][A-Z2-7]{55}$'),
    amount      bigint NOT NULL CHECK (amount > 0),
    envelope    text NOT NULL,
    fee         bigint NOT NULL CHECK (fee > 0),
    -- No ledger before this one can hold it.
    prepared_ledger bigint NOT NULL,
    prepared_at timestamptz NOT NULL,
    expires_at  timestamptz NOT NULL CHECK (expires_at > prepared_at),
    sponsored_at timestamptz,
    stage       text NOT NULL DEFAULT 'approving' CHECK (stage IN ('approving', 'pending', 'confirmed', 'failed')),
    failure     text CHECK (length(failure) <= 200),
    event_id    text,
    updated_at  timestamptz NOT NULL,
    CHECK ((stage = 'confirmed') = (event_id IS NOT NULL)),
    CHECK ((stage = 'failed') = (failure IS NOT NULL))
);
CREATE INDEX deposit_intents_vault ON deposit_intents (vault_id, prepared_at DESC);
CREATE INDEX deposit_intents_open ON deposit_intents (network, expires_at) WHERE stage IN ('approving', 'pending');

-- Money on its way back to its owner. The vault is debited first; what provably was not paid is given back.
CREATE TABLE withdrawals (
    withdrawal_id uuid PRIMARY KEY,
    network       text NOT NULL,
    epoch         integer NOT NULL,
    vault_id      uuid NOT NULL REFERENCES vaults,
    address       text NOT NULL CHECK (address ~ '^G[A-Z2-7]{55}$'),
    amount        bigint NOT NULL CHECK (amount > 0),
    state         text NOT NULL
                  CHECK (state IN ('asked', 'debited', 'sent', 'returning', 'confirmed', 'failed')),
    failure       text CHECK (length(failure) <= 200),
    -- What the owner was given to sign, where his key is not here, and the ledger that was the latest then.
    tx_hash       bytea CHECK (length(tx_hash) = 32),
    envelope      text,
    prepared_ledger bigint,
    expires_at    timestamptz,
    event_id      text,
    asked_at      timestamptz NOT NULL,
    updated_at    timestamptz NOT NULL,
    CHECK ((state IN ('returning', 'failed')) = (failure IS NOT NULL)),
    CHECK ((state = 'confirmed') = (event_id IS NOT NULL)),
    CHECK (num_nulls(tx_hash, envelope, prepared_ledger, expires_at) IN (0, 4))
);
CREATE INDEX withdrawals_vault ON withdrawals (vault_id, asked_at DESC);
CREATE INDEX withdrawals_open ON withdrawals (network, asked_at) WHERE state IN ('asked', 'debited', 'sent', 'returning');
CREATE INDEX withdrawals_envelope ON withdrawals (tx_hash) WHERE tx_hash IS NOT NULL;

-- Where money is being given back, no transaction that pays it is stored any more, whoever thought of it before; and
-- what is not stored is not sent. Where the owner was given one to sign, no other is. The row's lock makes one of the
-- two come first.
CREATE FUNCTION refuse_payment_of_returned() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    present text;
    offered bytea;
BEGIN
    SELECT state, tx_hash INTO present, offered FROM withdrawals
        WHERE withdrawal_id = substr(NEW.purpose, length('withdraw:') + 1)::uuid FOR SHARE;
    IF present IS NULL OR present NOT IN ('debited', 'sent') OR offered <> NEW.hash THEN
        RAISE EXCEPTION '%: % is not paid by this', NEW.purpose, coalesce(present, 'unknown')
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'payment_of_open_withdrawal';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER payment_of_open_withdrawal BEFORE INSERT ON chain_transactions
    FOR EACH ROW WHEN (NEW.purpose LIKE 'withdraw:%') EXECUTE FUNCTION refuse_payment_of_returned();

-- What the contract had and what the ledger says it should have had, each time they were compared.
CREATE TABLE chain_reconciliations (
    network     text NOT NULL,
    epoch       integer NOT NULL,
    ledger      bigint NOT NULL,
    at          timestamptz NOT NULL,
    on_chain    bigint NOT NULL,
    expected    bigint NOT NULL,
    drift       bigint GENERATED ALWAYS AS (on_chain - expected) STORED,
    parts       jsonb NOT NULL CHECK (jsonb_typeof(parts) = 'object'),
    PRIMARY KEY (network, epoch, at)
);
