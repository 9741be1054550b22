-- Counters: services that are billed by what their counters say, after the fact. What is rated is charged whatever the
-- balance is, so that a vault may owe: its balance is available + held − owed, and `available` stays >= 0 as ever. Calls
-- never write what is added here.
ALTER TABLE vaults
    ADD COLUMN owed              bigint NOT NULL DEFAULT 0 CHECK (owed >= 0),
    -- Since when it owes without a break.
    ADD COLUMN arrears_since     timestamptz,
    -- Whether it stands as it does for what it owes, and stands well again once that is paid; an operator's word stays.
    ADD COLUMN standing_for_debt boolean NOT NULL DEFAULT false,
    ADD CONSTRAINT vaults_owing CHECK ((owed = 0) = (arrears_since IS NULL)),
    ADD CONSTRAINT vaults_debtors CHECK (
        CASE WHEN standing_for_debt THEN owed > 0 AND standing <> 'active' ELSE owed = 0 OR standing <> 'active' END);
CREATE INDEX vaults_in_debt ON vaults (vault_id) WHERE owed > 0;

-- Written with each booking since then; only a change is news.
DROP TRIGGER standing_changed ON vaults;
CREATE TRIGGER standing_changed AFTER UPDATE OF standing, plan_id ON vaults
    FOR EACH ROW WHEN (OLD.standing <> NEW.standing OR OLD.plan_id <> NEW.plan_id)
    EXECUTE FUNCTION note_catalogue_change('vault', 'vault_id');

ALTER TABLE ledger_entries DROP CONSTRAINT ledger_entries_balance_after_check;

-- Whose counters are charged to which vault, and at what price. A subject is what a meter source calls its user. Every
-- change is made with the vault's row locked.
CREATE TABLE counter_accounts (
    vault_id          uuid NOT NULL REFERENCES vaults,
    account_id        uuid NOT NULL,
    subject           uuid NOT NULL,
    name              text NOT NULL CHECK (length(name) <= 120),
    -- Samples of one that is not are quarantined.
    active            boolean NOT NULL,
    -- USDC for a unit; null: the service's default. Fewer than a stroop is usual.
    unit_price        numeric(25, 18) CHECK (unit_price BETWEEN 0 AND 1000000),
    region_multiplier numeric(9, 6) NOT NULL DEFAULT 1 CHECK (region_multiplier > 0),
    line_multiplier   numeric(9, 6) NOT NULL DEFAULT 1 CHECK (line_multiplier > 0),
    -- Names the rule that facts were rated by; null: the service's default.
    rule_version      text CHECK (length(rule_version) BETWEEN 1 AND 80),
    -- Units that cost nothing, used before any is charged: all that were ever given, and what deltas used of them.
    included_granted  bigint NOT NULL CHECK (included_granted BETWEEN 0 AND 4611686018427387904),
    included_used     bigint NOT NULL DEFAULT 0 CHECK (included_used BETWEEN 0 AND included_granted),
    created_at        timestamptz NOT NULL,
    updated_at        timestamptz NOT NULL,
    PRIMARY KEY (vault_id, account_id)
);
CREATE UNIQUE INDEX counter_accounts_subject ON counter_accounts (subject);
CREATE UNIQUE INDEX counter_accounts_id ON counter_accounts (account_id);

-- What each counter of an account stood at when it was last rated. An epoch ends where a counter begins anew.
CREATE TABLE counter_checkpoints (
    vault_id   uuid NOT NULL,
    counter_id bigint GENERATED ALWAYS AS IDENTITY,
    account_id uuid NOT NULL,
    env        text NOT NULL CHECK (length(env) BETWEEN 1 AND 64),
    node_id    text NOT NULL CHECK (length(node_id) BETWEEN 1 AND 200),
    meter      text NOT NULL CHECK (length(meter) BETWEEN 1 AND 40),
    epoch      integer NOT NULL DEFAULT 0 CHECK (epoch >= 0),
    -- Null until the counter is first seen.
    up         bigint CHECK (up >= 0),
    down       bigint CHECK (down >= 0),
    seen_at    timestamptz,
    PRIMARY KEY (vault_id, counter_id),
    UNIQUE (vault_id, account_id, env, node_id, meter),
    FOREIGN KEY (vault_id, account_id) REFERENCES counter_accounts,
    CHECK (num_nulls(up, down, seen_at) IN (0, 3))
) WITH (fillfactor = 70);

CREATE FUNCTION refuse_checkpoint_back() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'counter_checkpoints: a counter is rated forwards only'
        USING ERRCODE = 'restrict_violation', CONSTRAINT = 'checkpoints_move_forwards';
END $$;
CREATE TRIGGER checkpoints_move_forwards BEFORE UPDATE ON counter_checkpoints
    FOR EACH ROW WHEN (NEW.seen_at IS NULL OR NEW.seen_at <= OLD.seen_at OR NEW.epoch < OLD.epoch
        OR NEW.epoch = OLD.epoch AND (NEW.up < OLD.up OR NEW.down < OLD.down)
        OR (NEW.vault_id, NEW.counter_id, NEW.account_id, NEW.env, NEW.node_id, NEW.meter)
            IS DISTINCT FROM (OLD.vault_id, OLD.counter_id, OLD.account_id, OLD.env, OLD.node_id, OLD.meter))
    EXECUTE FUNCTION refuse_checkpoint_back();
CREATE TRIGGER checkpoints_never_deleted BEFORE DELETE ON counter_checkpoints
    FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER checkpoints_never_emptied BEFORE TRUNCATE ON counter_checkpoints
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite();

-- What a counter grew by between two snapshots, and what that came to. An interval is a fact once and for ever; no
-- growth makes no row. What a command charged of one account is one usage event, which carries the money.
CREATE TABLE counter_deltas (
    vault_id     uuid NOT NULL,
    counter_id   bigint NOT NULL,
    epoch        integer NOT NULL,
    from_up      bigint NOT NULL CHECK (from_up >= 0),
    from_down    bigint NOT NULL CHECK (from_down >= 0),
    up           bigint NOT NULL CHECK (up >= 0),
    down         bigint NOT NULL CHECK (down >= 0),
    -- Units that were included; the others are charged.
    included     bigint NOT NULL CHECK (included BETWEEN 0 AND up + down),
    amount       bigint NOT NULL CHECK (amount >= 0),
    account_id   uuid NOT NULL,
    event_id     uuid NOT NULL,
    minute       timestamptz NOT NULL,
    collected_at timestamptz NOT NULL CHECK (collected_at >= minute AND collected_at < minute + interval '1 minute'),
    source_id    text NOT NULL,
    region       text NOT NULL,
    line         text NOT NULL,
    unit_price   numeric(25, 18) NOT NULL,
    multiplier   numeric(18, 12) NOT NULL,
    rule_version text NOT NULL,
    PRIMARY KEY (vault_id, counter_id, epoch, from_up, from_down),
    CHECK (up + down > 0)
);
CREATE INDEX counter_deltas_minutes ON counter_deltas (vault_id, account_id, minute);
CREATE TRIGGER deltas_never_rewritten BEFORE UPDATE OR DELETE ON counter_deltas
    FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER deltas_never_emptied BEFORE TRUNCATE ON counter_deltas
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite();

-- A minute's bucket is the sum of its deltas, and nothing that could differ from it.
CREATE VIEW counter_minutes AS
    SELECT d.vault_id, d.account_id, d.minute AS bucket_start, c.env, c.node_id, c.meter, d.region, d.line, d.multiplier,
           sum(d.up)::bigint AS up, sum(d.down)::bigint AS down, sum(d.up + d.down)::bigint AS total,
           sum(d.included)::bigint AS included, sum(d.up + d.down - d.included)::bigint AS rated,
           sum(d.amount)::bigint AS amount
    FROM counter_deltas d JOIN counter_checkpoints c ON c.vault_id = d.vault_id AND c.counter_id = d.counter_id
    GROUP BY d.vault_id, d.account_id, d.minute, c.env, c.node_id, c.meter, d.region, d.line, d.multiplier;

-- What could not be charged to anyone: rated when an operator says so, once there is an account for it. It carries by
-- what policies its source was read, as that may be gone by then.
CREATE TABLE quarantined_samples (
    subject      uuid NOT NULL,
    source_id    text NOT NULL,
    env          text NOT NULL,
    node_id      text NOT NULL,
    meter        text NOT NULL,
    collected_at timestamptz NOT NULL,
    reason       text NOT NULL CHECK (reason IN ('unknown_subject', 'charge_too_large')),
    up           bigint NOT NULL,
    down         bigint NOT NULL,
    line         text NOT NULL,
    region       text NOT NULL,
    api_id       bigint NOT NULL,
    endpoint_id  bigint NOT NULL,
    first_seen   text NOT NULL,
    reset        text NOT NULL,
    received_at  timestamptz NOT NULL,
    PRIMARY KEY (subject, source_id, env, node_id, meter, collected_at)
);
CREATE INDEX quarantined_samples_source ON quarantined_samples (source_id);
