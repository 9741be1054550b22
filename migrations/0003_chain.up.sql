-- The chain: transactions that Callora sends, deposits and withdrawals, and what the vault contract's events say.
-- A network here is testnet or mainnet; an epoch counts its histories, because a test network starts again at times and
-- ledger numbers and event ids then come a second time.

CREATE TABLE chain_networks (
    network     text PRIMARY KEY CHECK (network IN ('testnet', 'mainnet')),
    passphrase  text NOT NULL,
    epoch       integer NOT NULL DEFAULT 1 CHECK (epoch > 0),
    contract_id text NOT NULL CHECK (contract_id ~ '^C[A-Z2-7]{55}$'),
    -- Everything in ledgers up to this one is in chain_events; `cursor` is where the next page begins.
    ledger      bigint NOT NULL CHECK (ledger >= 0),
    cursor      text,
    halted      text,
    updated_at  timestamptz NOT NULL
);

-- Ledgers that no node could show any more when they were wanted. Closed by an operator who looked elsewhere.
CREATE TABLE chain_gaps (
    network      text NOT NULL REFERENCES chain_networks,
    epoch        integer NOT NULL,
    first_ledger bigint NOT NULL,
    last_ledger  bigint NOT NULL CHECK (last_ledger >= first_ledger),
    found_at     timestamptz NOT NULL,
    closed_at    timestamptz,
    closed_by    text,
    PRIMARY KEY (network, epoch, first_ledger)
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
    CHECK (state <> 'suspense' OR vault_id IS NULL)
);
CREATE INDEX chain_events_open ON chain_events (network, epoch, event_id) WHERE state = 'noted';
CREATE INDEX chain_events_suspense ON chain_events (network, address, event_id) WHERE state = 'suspense';
CREATE INDEX chain_events_transaction ON chain_events (tx_hash);

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

-- Every transaction that Callora sends, stored before it is first sent. One purpose has one transaction that may still be
-- applied; a second is built only when the first is provably dead or has failed on chain.
CREATE TABLE chain_transactions (
    hash              bytea PRIMARY KEY CHECK (length(hash) = 32),
    network           text NOT NULL,
    epoch             integer NOT NULL,
    purpose           text NOT NULL CHECK (length(purpose) BETWEEN 1 AND 120),
    envelope          text NOT NULL,
    source_account    text NOT NULL CHECK (source_account ~ '^G[A-Z2-7]{55}$'),
    sequence          bigint NOT NULL,
    max_time          timestamptz NOT NULL,
    channel           boolean NOT NULL,
    state             text NOT NULL CHECK (state IN ('stored', 'sent', 'succeeded', 'failed', 'dead')),
    first_sent_ledger bigint,
    ledger            bigint,
    result_code       text CHECK (length(result_code) <= 120),
    contract_error    integer,
    return_value      text,
    stored_at         timestamptz NOT NULL,
    sent_at           timestamptz,
    ended_at          timestamptz,
    CHECK ((state IN ('succeeded', 'failed', 'dead')) = (ended_at IS NOT NULL)),
    CHECK ((state IN ('succeeded', 'failed')) = (ledger IS NOT NULL)),
    CHECK (state = 'stored' OR state = 'dead' OR first_sent_ledger IS NOT NULL)
);
CREATE UNIQUE INDEX chain_transactions_one_alive ON chain_transactions (network, epoch, purpose)
    WHERE state IN ('stored', 'sent', 'succeeded');
-- A channel's sequence number belongs to one transaction until that has ended.
CREATE UNIQUE INDEX chain_transactions_one_a_channel ON chain_transactions (network, epoch, source_account)
    WHERE channel AND state IN ('stored', 'sent');
CREATE INDEX chain_transactions_alive ON chain_transactions (network, stored_at) WHERE state IN ('stored', 'sent');
CREATE INDEX chain_transactions_purpose ON chain_transactions (network, epoch, purpose);

-- Fee-bumps around a stored transaction: each has a hash of its own and the same inner transaction.
CREATE TABLE chain_bumps (
    hash       bytea PRIMARY KEY CHECK (length(hash) = 32),
    inner_hash bytea NOT NULL REFERENCES chain_transactions,
    envelope   text NOT NULL,
    fee        bigint NOT NULL CHECK (fee > 0),
    stored_at  timestamptz NOT NULL
);
CREATE INDEX chain_bumps_inner ON chain_bumps (inner_hash);

CREATE FUNCTION refuse_transaction_rewrite() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF ROW (NEW.hash, NEW.network, NEW.epoch, NEW.purpose, NEW.envelope, NEW.source_account, NEW.sequence, NEW.max_time,
            NEW.channel, NEW.stored_at)
       IS DISTINCT FROM ROW (OLD.hash, OLD.network, OLD.epoch, OLD.purpose, OLD.envelope, OLD.source_account,
            OLD.sequence, OLD.max_time, OLD.channel, OLD.stored_at)
       OR OLD.state IN ('succeeded', 'failed', 'dead') THEN
        RAISE EXCEPTION 'chain_transactions: an envelope is never changed, and what has ended has ended'
            USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER envelopes_never_change BEFORE UPDATE ON chain_transactions
    FOR EACH ROW EXECUTE FUNCTION refuse_transaction_rewrite();
CREATE TRIGGER transactions_never_deleted BEFORE DELETE ON chain_transactions
    FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();

-- Who may deposit: the contract takes deposits of listed addresses only, and its owner lists them.
CREATE TABLE depositors (
    network     text NOT NULL,
    epoch       integer NOT NULL,
    address     text NOT NULL CHECK (address ~ '^[GC][A-Z2-7]{55}$'),
    user_id     uuid NOT NULL REFERENCES users,
    state       text NOT NULL CHECK (state IN ('asked', 'admitted', 'refused')),
    reason      text CHECK (length(reason) <= 200),
    asked_at    timestamptz NOT NULL,
    answered_at timestamptz,
    PRIMARY KEY (network, epoch, address),
    CHECK ((state = 'asked') = (answered_at IS NULL))
);
CREATE INDEX depositors_asked ON depositors (network, asked_at) WHERE state = 'asked';

-- A deposit that a wallet was asked to sign. Its hash is the transaction's own, so it is known before the signature is.
CREATE TABLE deposit_intents (
    tx_hash     bytea PRIMARY KEY CHECK (length(tx_hash) = 32),
    network     text NOT NULL,
    epoch       integer NOT NULL,
    vault_id    uuid NOT NULL REFERENCES vaults,
    address     text NOT NULL CHECK (address ~ '^[GC][A-Z2-7]{55}$'),
    amount      bigint NOT NULL CHECK (amount > 0),
    envelope    text NOT NULL,
    prepared_at timestamptz NOT NULL,
    expires_at  timestamptz NOT NULL CHECK (expires_at > prepared_at),
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
    state         text NOT NULL CHECK (state IN ('asked', 'debited', 'sent', 'confirmed', 'failed')),
    failure       text CHECK (length(failure) <= 200),
    tx_hash       bytea CHECK (length(tx_hash) = 32),
    event_id      text,
    asked_at      timestamptz NOT NULL,
    updated_at    timestamptz NOT NULL,
    CHECK ((state = 'failed') = (failure IS NOT NULL)),
    CHECK (state <> 'confirmed' OR event_id IS NOT NULL)
);
CREATE INDEX withdrawals_vault ON withdrawals (vault_id, asked_at DESC);
CREATE INDEX withdrawals_open ON withdrawals (network, asked_at) WHERE state IN ('asked', 'debited', 'sent');

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
