-- The ledger core, the catalogue and the keys. Money is bigint stroops (1 USDC = 10 000 000), time is timestamptz in
-- UTC, ids on hot tables are UUIDv7 made by the service, and vault_id comes first in every hot key.

CREATE TYPE standing AS ENUM ('active', 'arrears', 'suspended');
CREATE TYPE usage_state AS ENUM ('held', 'captured', 'released', 'expired');

CREATE TABLE plans (
    plan_id               text PRIMARY KEY CHECK (plan_id ~ '^[a-z][a-z0-9_-]{0,62}$'),
    name                  text NOT NULL,
    rate_limit_per_minute integer CHECK (rate_limit_per_minute > 0),
    active                boolean NOT NULL DEFAULT true
);

INSERT INTO plans (plan_id, name, rate_limit_per_minute) VALUES
    ('free', 'Free', 10),
    ('pro', 'Pro', 100),
    ('enterprise', 'Enterprise', 1000);

CREATE TABLE users (
    user_id    uuid PRIMARY KEY,
    name       text NOT NULL CHECK (length(name) BETWEEN 1 AND 120),
    created_at timestamptz NOT NULL DEFAULT now()
);

-- One row a user and network. Every balance change rewrites it in place, so it keeps room on its page and carries no
-- index on a column that changes.
CREATE TABLE vaults (
    vault_id   uuid PRIMARY KEY,
    user_id    uuid NOT NULL REFERENCES users,
    network    text NOT NULL CHECK (network IN ('testnet', 'mainnet')),
    asset      text NOT NULL DEFAULT 'USDC',
    plan_id    text NOT NULL DEFAULT 'free' REFERENCES plans,
    available  bigint NOT NULL DEFAULT 0 CHECK (available >= 0),
    held       bigint NOT NULL DEFAULT 0 CHECK (held >= 0),
    version    bigint NOT NULL DEFAULT 0,
    entry_seq  bigint NOT NULL DEFAULT 0,
    standing   standing NOT NULL DEFAULT 'active',
    created_at timestamptz NOT NULL DEFAULT now(),
    UNIQUE (user_id, network)
) WITH (fillfactor = 50);

CREATE TABLE developers (
    developer_id uuid PRIMARY KEY,
    user_id      uuid NOT NULL UNIQUE REFERENCES users,
    name         text NOT NULL CHECK (length(name) BETWEEN 1 AND 120),
    created_at   timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE apis (
    api_id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    developer_id     uuid NOT NULL REFERENCES developers,
    slug             text NOT NULL UNIQUE CHECK (slug ~ '^[a-z][a-z0-9-]{0,62}$'),
    name             text NOT NULL CHECK (length(name) BETWEEN 1 AND 120),
    base_url         text NOT NULL CHECK (length(base_url) <= 2048),
    status           text NOT NULL DEFAULT 'active' CHECK (status IN ('draft', 'active', 'paused', 'archived')),
    upstream_headers jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(upstream_headers) = 'object'),
    created_at       timestamptz NOT NULL DEFAULT now()
);

-- An endpoint is one method (or * for any) and one pattern of whole path segments: literals, {name}, a trailing *.
CREATE TABLE api_endpoints (
    endpoint_id       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    api_id            bigint NOT NULL REFERENCES apis,
    method            text NOT NULL CHECK (method IN ('*', 'GET', 'POST', 'PUT', 'PATCH', 'DELETE', 'HEAD', 'OPTIONS')),
    path              text NOT NULL CHECK (path = '*' OR path ~ '^/' AND length(path) <= 512),
    billable_statuses text NOT NULL DEFAULT '2xx' CHECK (billable_statuses ~ '^([1-5]xx|[1-5][0-9]{2})(,([1-5]xx|[1-5][0-9]{2}))*$'),
    required_scope    text,
    UNIQUE (api_id, method, path)
);

-- A price is never edited: a new version takes effect at its date, and every usage event names the version it paid.
CREATE TABLE endpoint_prices (
    endpoint_id    bigint NOT NULL REFERENCES api_endpoints,
    version        integer NOT NULL CHECK (version > 0),
    amount         bigint NOT NULL CHECK (amount BETWEEN 0 AND 10000000000000),
    effective_from timestamptz NOT NULL,
    PRIMARY KEY (endpoint_id, version)
);

CREATE TABLE api_keys (
    api_key_id            uuid PRIMARY KEY,
    user_id               uuid NOT NULL REFERENCES users,
    vault_id              uuid NOT NULL REFERENCES vaults,
    name                  text NOT NULL DEFAULT '' CHECK (length(name) <= 120),
    prefix                text NOT NULL CHECK (prefix ~ '^ck_(live|test)_[0-9a-f]{8}$'),
    key_hash              bytea NOT NULL UNIQUE CHECK (length(key_hash) = 32),
    last4                 text NOT NULL CHECK (length(last4) = 4),
    scopes                text[] NOT NULL DEFAULT '{*}' CHECK (cardinality(scopes) BETWEEN 1 AND 20),
    allowed_apis          bigint[],
    allowed_endpoints     bigint[],
    allowed_cidrs         cidr[],
    rate_limit_per_minute integer CHECK (rate_limit_per_minute > 0),
    disabled              boolean NOT NULL DEFAULT false,
    expires_at            timestamptz,
    revoked_at            timestamptz,
    last_used_at          timestamptz,
    created_at            timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX api_keys_prefix ON api_keys (prefix);
CREATE INDEX api_keys_vault ON api_keys (vault_id);

-- One row a call: born held, closed once. Partitioned by the time inside the UUIDv7; the service makes the monthly
-- partitions ahead of need, and the default partition keeps a late start from losing a call. No index on a column that
-- closing changes and room on the page for the closed row, so the close is a rewrite in place (measured: all of them
-- are at fillfactor 45, six of ten at 60).
CREATE TABLE usage_events (
    vault_id       uuid NOT NULL,
    event_id       uuid NOT NULL,
    api_key_id     uuid NOT NULL,
    developer_id   uuid NOT NULL,
    api_id         bigint NOT NULL,
    endpoint_id    bigint NOT NULL,
    held_amount    bigint NOT NULL CHECK (held_amount >= 0),
    created_at     timestamptz NOT NULL,
    expires_at     timestamptz NOT NULL CHECK (expires_at > created_at AND expires_at <= created_at + interval '1 day'),
    price_version  integer NOT NULL,
    state          usage_state NOT NULL DEFAULT 'held',
    amount         bigint CHECK (amount BETWEEN 0 AND held_amount),
    credits        bigint,
    quantity       bigint,
    request_bytes  bigint,
    response_bytes bigint,
    closed_at      timestamptz,
    latency_us     integer,
    status         smallint,
    outcome        text CHECK (length(outcome) <= 40),
    PRIMARY KEY (vault_id, event_id),
    CHECK ((state = 'held') = (closed_at IS NULL)),
    CHECK ((state = 'captured') = (amount IS NOT NULL))
) PARTITION BY RANGE (event_id);

CREATE TABLE usage_events_default PARTITION OF usage_events DEFAULT WITH (fillfactor = 45);
CREATE INDEX usage_events_created ON usage_events USING brin (created_at) WITH (pages_per_range = 32, autosummarize = on);

CREATE FUNCTION refuse_rewrite() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '%: what is closed is never changed or deleted; write a correction', TG_TABLE_NAME
        USING ERRCODE = 'restrict_violation';
END $$;

CREATE TRIGGER closed_stays_closed BEFORE UPDATE ON usage_events
    FOR EACH ROW WHEN (OLD.state <> 'held') EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER never_deleted BEFORE DELETE ON usage_events
    FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER never_emptied BEFORE TRUNCATE ON usage_events
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite();

-- Every change of a balance that is not a captured usage event. A captured event is its own entry; vault_statement
-- unites both.
CREATE TABLE ledger_entries (
    vault_id      uuid NOT NULL REFERENCES vaults,
    seq           bigint NOT NULL CHECK (seq > 0),
    kind          text NOT NULL CHECK (kind IN ('deposit', 'withdrawal', 'refund', 'adjustment')),
    amount        bigint NOT NULL CHECK (amount <> 0 AND (kind <> 'deposit' OR amount > 0)
                                         AND (kind <> 'withdrawal' OR amount < 0) AND (kind <> 'refund' OR amount > 0)),
    balance_after bigint NOT NULL CHECK (balance_after >= 0),
    ref           text NOT NULL CHECK (length(ref) BETWEEN 1 AND 200),
    event_id      uuid CHECK ((kind = 'refund') = (event_id IS NOT NULL)),
    created_at    timestamptz NOT NULL,
    PRIMARY KEY (vault_id, seq),
    UNIQUE (vault_id, kind, ref)
);
CREATE INDEX ledger_entries_refunds ON ledger_entries (vault_id, event_id) WHERE kind = 'refund';

CREATE TRIGGER entries_never_rewritten BEFORE UPDATE OR DELETE ON ledger_entries
    FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER entries_never_emptied BEFORE TRUNCATE ON ledger_entries
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite();

-- Σ refunds of an event never exceeds what was captured. The vault's row is locked by every writer of its refunds, and
-- a volatile function reads what was committed before that lock was given.
CREATE FUNCTION refuse_over_refund() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    captured bigint;
    refunded bigint;
BEGIN
    SELECT amount INTO captured FROM usage_events
        WHERE vault_id = NEW.vault_id AND event_id = NEW.event_id AND state = 'captured';
    SELECT coalesce(sum(amount), 0) INTO refunded FROM ledger_entries
        WHERE vault_id = NEW.vault_id AND event_id = NEW.event_id AND kind = 'refund';
    IF captured IS NULL OR refunded + NEW.amount > captured THEN
        RAISE EXCEPTION 'refunds of usage event % would exceed its captured amount', NEW.event_id
            USING ERRCODE = 'check_violation', CONSTRAINT = 'refund_within_capture';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER refund_within_capture BEFORE INSERT ON ledger_entries
    FOR EACH ROW WHEN (NEW.kind = 'refund') EXECUTE FUNCTION refuse_over_refund();

CREATE VIEW vault_statement AS
    SELECT vault_id, created_at AS at, kind, amount, ref, seq, event_id FROM ledger_entries
    UNION ALL
    SELECT vault_id, closed_at, 'usage', -amount, event_id::text, NULL, event_id
        FROM usage_events WHERE state = 'captured' AND amount > 0;

-- A client's name for one intent, bound to the usage event that carries it out. Not partitioned by time, so a key is
-- unique; a row bound to an event that closed without an answer may be taken over by the next attempt.
CREATE TABLE idempotency_keys (
    vault_id    uuid NOT NULL,
    key         text NOT NULL CHECK (length(key) BETWEEN 1 AND 255),
    fingerprint bytea NOT NULL CHECK (length(fingerprint) = 32),
    event_id    uuid NOT NULL,
    replaces    uuid,
    state       text NOT NULL CHECK (state IN ('started', 'completed', 'not_replayable')),
    status      smallint,
    head        bytea,
    body        bytea,
    charge      bigint,
    created_at  timestamptz NOT NULL,
    expires_at  timestamptz NOT NULL,
    PRIMARY KEY (vault_id, key),
    CHECK ((state = 'completed') = (body IS NOT NULL AND head IS NOT NULL AND status IS NOT NULL)),
    CHECK ((state = 'started') = (charge IS NULL))
);
CREATE INDEX idempotency_keys_expiry ON idempotency_keys (expires_at);

-- What changed in keys, APIs, endpoints, prices and vault standings, in commit order: each writer holds the epoch's row
-- until it commits, so a reader that has seen version n has seen all before it. Processes poll the epoch.
CREATE TABLE catalogue_epoch (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    version  bigint NOT NULL
);
INSERT INTO catalogue_epoch (version) VALUES (0);

CREATE TABLE catalogue_changes (
    version bigint PRIMARY KEY,
    kind    text NOT NULL CHECK (kind IN ('key', 'api', 'vault', 'plan')),
    ref     text NOT NULL
);

CREATE FUNCTION note_catalogue_change() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    changed jsonb := CASE TG_OP WHEN 'DELETE' THEN to_jsonb(OLD) ELSE to_jsonb(NEW) END;
    next_version bigint;
BEGIN
    UPDATE catalogue_epoch SET version = version + 1 RETURNING version INTO next_version;
    INSERT INTO catalogue_changes (version, kind, ref) VALUES (next_version, TG_ARGV[0], CASE TG_TABLE_NAME
        WHEN 'endpoint_prices'
            THEN (SELECT api_id::text FROM api_endpoints WHERE endpoint_id = (changed ->> 'endpoint_id')::bigint)
        ELSE changed ->> TG_ARGV[1]
    END);
    RETURN NULL;
END $$;

CREATE TRIGGER keys_changed AFTER DELETE OR UPDATE OF
        vault_id, key_hash, scopes, allowed_apis, allowed_endpoints, allowed_cidrs, rate_limit_per_minute, disabled,
        expires_at, revoked_at ON api_keys
    FOR EACH ROW EXECUTE FUNCTION note_catalogue_change('key', 'api_key_id');
CREATE TRIGGER apis_changed AFTER INSERT OR DELETE OR UPDATE ON apis
    FOR EACH ROW EXECUTE FUNCTION note_catalogue_change('api', 'api_id');
CREATE TRIGGER endpoints_changed AFTER INSERT OR DELETE OR UPDATE ON api_endpoints
    FOR EACH ROW EXECUTE FUNCTION note_catalogue_change('api', 'api_id');
CREATE TRIGGER prices_changed AFTER INSERT OR DELETE OR UPDATE ON endpoint_prices
    FOR EACH ROW EXECUTE FUNCTION note_catalogue_change('api', 'api_id');
CREATE TRIGGER standing_changed AFTER UPDATE OF standing, plan_id ON vaults
    FOR EACH ROW EXECUTE FUNCTION note_catalogue_change('vault', 'vault_id');
CREATE TRIGGER plans_changed AFTER UPDATE ON plans
    FOR EACH ROW EXECUTE FUNCTION note_catalogue_change('plan', 'plan_id');
