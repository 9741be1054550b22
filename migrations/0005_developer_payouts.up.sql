-- What developers take out of the settlement contract; and what was found when the books were compared with the chain.

-- A withdrawal that a developer's wallet was asked to sign. Its hash is the transaction's own, so it is known before the
-- signature is. The same transaction may have been prepared for two who held the same wallet in turn.
CREATE TABLE developer_withdrawals (
    developer_id    uuid NOT NULL REFERENCES developers,
    tx_hash         bytea NOT NULL CHECK (length(tx_hash) = 32),
    network         text NOT NULL CHECK (network IN ('testnet', 'mainnet')),
    epoch           integer NOT NULL CHECK (epoch > 0),
    address         text NOT NULL CHECK (address ~ '^G[A-Z2-7]{55}$'),
    amount          bigint NOT NULL CHECK (amount > 0),
    envelope        text NOT NULL,
    fee             bigint NOT NULL CHECK (fee > 0),
    -- No ledger before this one can hold it.
    prepared_ledger bigint NOT NULL CHECK (prepared_ledger > 0),
    prepared_at     timestamptz NOT NULL,
    expires_at      timestamptz NOT NULL CHECK (expires_at > prepared_at),
    stage           text NOT NULL DEFAULT 'approving' CHECK (stage IN ('approving', 'pending', 'confirmed', 'failed')),
    failure         text CHECK (length(failure) <= 200),
    -- The ledger that holds it, and when that closed.
    ledger          bigint CHECK (ledger > 0),
    applied_at      timestamptz,
    updated_at      timestamptz NOT NULL,
    PRIMARY KEY (developer_id, tx_hash),
    CHECK ((stage = 'confirmed') = (ledger IS NOT NULL) AND (ledger IS NULL) = (applied_at IS NULL)),
    CHECK ((stage = 'failed') = (failure IS NOT NULL))
);
CREATE INDEX developer_withdrawals_listing ON developer_withdrawals (developer_id, network, prepared_at DESC, tx_hash);
CREATE INDEX developer_withdrawals_open ON developer_withdrawals (network, tx_hash)
    WHERE stage IN ('approving', 'pending');

CREATE FUNCTION refuse_payout_rewrite() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.stage IN ('confirmed', 'failed') OR (OLD.stage = 'pending' AND NEW.stage = 'approving')
       OR ROW (NEW.developer_id, NEW.tx_hash, NEW.network, NEW.epoch, NEW.address, NEW.amount, NEW.envelope, NEW.fee,
               NEW.prepared_ledger, NEW.prepared_at, NEW.expires_at)
          IS DISTINCT FROM ROW (OLD.developer_id, OLD.tx_hash, OLD.network, OLD.epoch, OLD.address, OLD.amount,
               OLD.envelope, OLD.fee, OLD.prepared_ledger, OLD.prepared_at, OLD.expires_at) THEN
        RAISE EXCEPTION 'developer_withdrawals: what was prepared is never changed, and what has ended has ended'
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'payouts_move_forwards';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER payouts_move_forwards BEFORE UPDATE ON developer_withdrawals
    FOR EACH ROW EXECUTE FUNCTION refuse_payout_rewrite();
CREATE TRIGGER payouts_never_deleted BEFORE DELETE ON developer_withdrawals
    FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER payouts_never_emptied BEFORE TRUNCATE ON developer_withdrawals
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite();

-- When the books of a network were last compared, by whichever process had its turn.
CREATE TABLE book_comparisons (
    network    text PRIMARY KEY CHECK (network IN ('testnet', 'mainnet')),
    began_at   timestamptz NOT NULL,
    ended_at   timestamptz,
    -- Transactions and addresses that the network was asked for, and those of which nobody could tell.
    asked      integer CHECK (asked >= 0),
    untold     integer CHECK (untold BETWEEN 0 AND asked),
    CHECK ((ended_at IS NULL) = (asked IS NULL) AND (asked IS NULL) = (untold IS NULL))
);

-- What was found: once for what it is about and by how much; found again, it is the same one. `gone_at`: it was not found
-- any more. An operator who has explained it clears it, and it stays so: another difference is another one.
CREATE TABLE discrepancies (
    discrepancy_id uuid PRIMARY KEY,
    network        text NOT NULL CHECK (network IN ('testnet', 'mainnet')),
    kind           text NOT NULL
                   CHECK (kind IN ('MISSING_TX', 'STALE_PENDING', 'FALSE_FAILURE', 'UNEXPECTED_STATUS', 'DRIFT')),
    subject        text NOT NULL CHECK (length(subject) BETWEEN 1 AND 200),
    -- By how many stroops, of any sign; 0 where it is no amount.
    difference     bigint NOT NULL,
    said           text NOT NULL CHECK (length(said) <= 500),
    -- When what it is about ended; what ended long ago is not looked at each time. Null for what always is.
    of_at          timestamptz,
    found_at       timestamptz NOT NULL,
    seen_at        timestamptz NOT NULL,
    gone_at        timestamptz,
    cleared_at     timestamptz,
    cleared_by     text CHECK (length(cleared_by) BETWEEN 1 AND 200),
    reason         text CHECK (length(reason) BETWEEN 1 AND 500),
    UNIQUE (network, kind, subject, difference),
    CHECK ((cleared_at IS NULL) = (cleared_by IS NULL) AND (cleared_by IS NULL) = (reason IS NULL))
);
CREATE INDEX discrepancies_listing ON discrepancies (network, found_at DESC, discrepancy_id);
CREATE TRIGGER discrepancies_never_deleted BEFORE DELETE ON discrepancies
    FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER discrepancies_never_emptied BEFORE TRUNCATE ON discrepancies
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite();

-- A statement is of a period; entries are made about in the order of their dates.
CREATE INDEX revenue_entries_at ON revenue_entries USING brin (at) WITH (pages_per_range = 32);
