-- What developers, consumers and operators do outside the call: people and their sessions, the marketplace, keys with
-- their tokens, charges over REST, the rollup that every sum is read from, and the audit of operators.

-- A person is known by a wallet, or by the subject of an outside issuer's tokens, or by both.
ALTER TABLE users
    ADD COLUMN wallet_address text UNIQUE CHECK (wallet_address ~ '^G[A-Z2-7]{55}$'),
    ADD COLUMN subject text UNIQUE CHECK (length(subject) BETWEEN 1 AND 255);

-- A session is a family of refresh tokens, of which one is unused; using a used one again ends the family.
CREATE TABLE sessions (
    session_id     uuid PRIMARY KEY,
    user_id        uuid NOT NULL REFERENCES users,
    client_address text NOT NULL CHECK (length(client_address) <= 64),
    user_agent     text NOT NULL CHECK (length(user_agent) <= 256),
    created_at     timestamptz NOT NULL,
    last_used_at   timestamptz NOT NULL,
    expires_at     timestamptz NOT NULL,
    revoked_at     timestamptz,
    revoked_for    text CHECK (revoked_for IN ('logout', 'revoked_all', 'reuse'))
);
CREATE INDEX sessions_user ON sessions (user_id, session_id);
CREATE INDEX sessions_expiry ON sessions (expires_at);

CREATE TABLE refresh_tokens (
    token_hash bytea PRIMARY KEY CHECK (length(token_hash) = 32),
    session_id uuid NOT NULL REFERENCES sessions ON DELETE CASCADE,
    issued_at  timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    used_at    timestamptz
);
CREATE INDEX refresh_tokens_session ON refresh_tokens (session_id);
CREATE INDEX refresh_tokens_expiry ON refresh_tokens (expires_at);

-- What was given to a wallet to sign. It is used once; kept until it could not be used any more.
CREATE TABLE login_challenges (
    challenge_hash bytea PRIMARY KEY CHECK (length(challenge_hash) = 32),
    wallet_address text NOT NULL,
    expires_at     timestamptz NOT NULL,
    used_at        timestamptz
);
CREATE INDEX login_challenges_expiry ON login_challenges (expires_at);

ALTER TABLE developers
    ALTER COLUMN name DROP NOT NULL,
    ADD COLUMN website text CHECK (length(website) <= 2048),
    ADD COLUMN description text CHECK (length(description) <= 500),
    ADD COLUMN category text CHECK (length(category) <= 60),
    ADD COLUMN updated_at timestamptz NOT NULL DEFAULT now();

ALTER TABLE apis
    ADD COLUMN description text CHECK (length(description) BETWEEN 1 AND 4000),
    ADD COLUMN category text CHECK (length(category) BETWEEN 1 AND 60),
    ADD COLUMN tags text[] NOT NULL DEFAULT '{}' CHECK (cardinality(tags) <= 20),
    ADD COLUMN logo_url text CHECK (length(logo_url) <= 2048),
    ADD COLUMN updated_at timestamptz NOT NULL DEFAULT now(),
    ADD COLUMN deleted_at timestamptz;
CREATE INDEX apis_listing ON apis (created_at DESC, api_id DESC) WHERE status = 'active' AND deleted_at IS NULL;
CREATE INDEX apis_developer ON apis (developer_id);

-- A retired endpoint is offered no more; its row stays, because usage events name it.
ALTER TABLE api_endpoints
    ADD COLUMN description text CHECK (length(description) BETWEEN 1 AND 1000),
    ADD COLUMN retired_at timestamptz;

-- The price of a date is read from here alone, of one endpoint or of all.
CREATE INDEX endpoint_prices_in_effect ON endpoint_prices (endpoint_id, effective_from DESC, version DESC)
    INCLUDE (amount);

-- What the marketplace shows and sorts by: the last 30 days of an API, counted anew every few minutes, so that a public
-- list never sums the usage itself.
CREATE TABLE api_popularity (
    api_id       bigint PRIMARY KEY REFERENCES apis,
    calls        bigint NOT NULL CHECK (calls > 0),
    failed_calls bigint NOT NULL CHECK (failed_calls BETWEEN 0 AND calls),
    latency_us   bigint NOT NULL CHECK (latency_us >= 0)
);

-- A regenerated key's former secret may live on for a grace period.
ALTER TABLE api_keys
    ADD COLUMN description text CHECK (length(description) <= 500),
    ADD COLUMN previous_prefix text,
    ADD COLUMN previous_hash bytea UNIQUE CHECK (length(previous_hash) = 32),
    ADD COLUMN previous_expires_at timestamptz,
    ADD CHECK ((previous_hash IS NULL) = (previous_prefix IS NULL)
               AND (previous_hash IS NULL) = (previous_expires_at IS NULL));
CREATE INDEX api_keys_previous_prefix ON api_keys (previous_prefix) WHERE previous_prefix IS NOT NULL;
CREATE INDEX api_keys_user ON api_keys (user_id, api_key_id);

-- A short-lived token under a key. `spent` is taken before a call and given back when the call was not charged: what a
-- crash loses is budget, never money. A revoked token is told as a change of its key, which drops both from memory.
CREATE TABLE access_tokens (
    token_id     uuid PRIMARY KEY,
    api_key_id   uuid NOT NULL REFERENCES api_keys,
    scopes       text[] NOT NULL CHECK (cardinality(scopes) BETWEEN 1 AND 20),
    allowed_apis bigint[],
    budget       bigint CHECK (budget > 0),
    spent        bigint NOT NULL DEFAULT 0 CHECK (spent >= 0 AND spent <= coalesce(budget, spent)),
    created_at   timestamptz NOT NULL,
    expires_at   timestamptz NOT NULL,
    revoked_at   timestamptz
) WITH (fillfactor = 70);
CREATE INDEX access_tokens_key ON access_tokens (api_key_id, token_id);
CREATE INDEX access_tokens_expiry ON access_tokens (expires_at);
CREATE TRIGGER tokens_revoked AFTER UPDATE OF revoked_at ON access_tokens
    FOR EACH ROW EXECUTE FUNCTION note_catalogue_change('key', 'api_key_id');

ALTER TABLE ledger_entries
    DROP CONSTRAINT ledger_entries_kind_check,
    ADD CONSTRAINT ledger_entries_kind_check CHECK (kind IN ('deposit', 'withdrawal', 'refund', 'grant', 'adjustment')),
    ADD CONSTRAINT ledger_entries_grant_check CHECK (kind <> 'grant' OR amount > 0);
-- The statement of a vault reads its entries by date, and its usage by the date inside the event's id.
CREATE INDEX ledger_entries_statement ON ledger_entries (vault_id, created_at, seq);

-- A charge asked for over REST, bound to the usage event that carries it out before that event exists. What became of
-- it is the event's to tell; bound to another event only when the one before ended uncharged.
CREATE TABLE billing_requests (
    user_id     uuid NOT NULL REFERENCES users,
    request_id  text NOT NULL CHECK (length(request_id) BETWEEN 1 AND 255),
    vault_id    uuid NOT NULL REFERENCES vaults,
    event_id    uuid NOT NULL UNIQUE,
    api_key_id  uuid,
    api_id      bigint NOT NULL,
    endpoint_id bigint NOT NULL,
    amount      bigint NOT NULL CHECK (amount > 0),
    fingerprint bytea NOT NULL CHECK (length(fingerprint) = 32),
    created_at  timestamptz NOT NULL,
    PRIMARY KEY (user_id, request_id)
);
CREATE INDEX billing_requests_listing ON billing_requests (user_id, created_at DESC, request_id);

-- The first answer to a REST request with an Idempotency-Key, for who asked alone. `attempt` is whose work it is: one
-- that was taken over stores nothing.
CREATE TABLE rest_idempotency (
    actor       text NOT NULL CHECK (length(actor) BETWEEN 1 AND 255),
    key         text NOT NULL CHECK (length(key) BETWEEN 1 AND 255),
    fingerprint bytea NOT NULL CHECK (length(fingerprint) = 32),
    attempt     uuid NOT NULL,
    status      smallint,
    headers     jsonb CHECK (jsonb_typeof(headers) = 'object'),
    body        bytea,
    created_at  timestamptz NOT NULL,
    expires_at  timestamptz NOT NULL,
    PRIMARY KEY (actor, key),
    CHECK ((status IS NULL) = (body IS NULL) AND (status IS NULL) = (headers IS NULL))
);
CREATE INDEX rest_idempotency_expiry ON rest_idempotency (expires_at);

-- Calls and money by minute: the only source of sums. Derived from closed usage events and from refunds, each at its own
-- date, and rebuildable from nothing. Every minute before `done_until` is final but for the holds in usage_open; the
-- minutes after it are counted anew at each pass. A failed call is one that had no answer, or one of status 400 and up.
CREATE TABLE usage_minutes (
    vault_id       uuid NOT NULL,
    minute         timestamptz NOT NULL,
    api_key_id     uuid NOT NULL,
    endpoint_id    bigint NOT NULL,
    api_id         bigint NOT NULL,
    developer_id   uuid NOT NULL,
    calls          bigint NOT NULL CHECK (calls >= 0),
    charged_calls  bigint NOT NULL CHECK (charged_calls BETWEEN 0 AND calls),
    failed_calls   bigint NOT NULL CHECK (failed_calls BETWEEN 0 AND calls),
    timed_calls    bigint NOT NULL CHECK (timed_calls BETWEEN 0 AND calls),
    amount         bigint NOT NULL CHECK (amount >= 0),
    refunded       bigint NOT NULL CHECK (refunded >= 0),
    latency_us     bigint NOT NULL CHECK (latency_us >= 0),
    request_bytes  bigint NOT NULL CHECK (request_bytes >= 0),
    response_bytes bigint NOT NULL CHECK (response_bytes >= 0),
    PRIMARY KEY (vault_id, minute, api_key_id, endpoint_id)
) WITH (fillfactor = 80);
-- Where in a vault an endpoint was called with a key, newest first: how a list finds what matches seldom.
CREATE INDEX usage_minutes_lines ON usage_minutes (vault_id, api_key_id, endpoint_id, minute);
CREATE INDEX usage_minutes_failed ON usage_minutes (vault_id, api_key_id, endpoint_id, minute) WHERE failed_calls > 0;

-- The same by day in UTC, moved by what a pass changed in usage_minutes, in its transaction: for a vault in full, for a
-- developer by endpoint and by caller, a vault's whole, and everyone's. A month of a busy vault has too many minutes to
-- add up on every page.
CREATE TABLE usage_days (
    vault_id       uuid NOT NULL,
    day            timestamptz NOT NULL,
    api_key_id     uuid NOT NULL,
    endpoint_id    bigint NOT NULL,
    api_id         bigint NOT NULL,
    calls          bigint NOT NULL,
    charged_calls  bigint NOT NULL,
    failed_calls   bigint NOT NULL,
    timed_calls    bigint NOT NULL,
    amount         bigint NOT NULL,
    refunded       bigint NOT NULL,
    latency_us     bigint NOT NULL,
    request_bytes  bigint NOT NULL,
    response_bytes bigint NOT NULL,
    PRIMARY KEY (vault_id, day, api_key_id, endpoint_id)
) WITH (fillfactor = 70);

CREATE TABLE developer_days (
    developer_id uuid NOT NULL,
    day          timestamptz NOT NULL,
    endpoint_id  bigint NOT NULL,
    api_id       bigint NOT NULL,
    calls        bigint NOT NULL,
    failed_calls bigint NOT NULL,
    amount       bigint NOT NULL,
    refunded     bigint NOT NULL,
    PRIMARY KEY (developer_id, day, endpoint_id)
) WITH (fillfactor = 70);

CREATE TABLE developer_callers (
    developer_id uuid NOT NULL,
    day          timestamptz NOT NULL,
    api_id       bigint NOT NULL,
    vault_id     uuid NOT NULL,
    calls        bigint NOT NULL,
    amount       bigint NOT NULL,
    refunded     bigint NOT NULL,
    PRIMARY KEY (developer_id, day, api_id, vault_id)
) WITH (fillfactor = 70);

CREATE TABLE vault_days (
    day          timestamptz NOT NULL,
    vault_id     uuid NOT NULL,
    calls        bigint NOT NULL,
    failed_calls bigint NOT NULL,
    amount       bigint NOT NULL,
    refunded     bigint NOT NULL,
    PRIMARY KEY (day, vault_id)
) WITH (fillfactor = 70);

CREATE TABLE all_days (
    day          timestamptz PRIMARY KEY,
    calls        bigint NOT NULL,
    failed_calls bigint NOT NULL,
    amount       bigint NOT NULL,
    refunded     bigint NOT NULL
) WITH (fillfactor = 50);

-- Holds that were open when their minute became final. Each leaves in the transaction that counts it.
CREATE TABLE usage_open (
    vault_id uuid NOT NULL,
    event_id uuid NOT NULL,
    PRIMARY KEY (vault_id, event_id)
);

-- How far the rollup is. Its row is locked while a pass runs. `as_of`: what had ended by then is counted.
CREATE TABLE usage_rollup (
    only_row   boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    done_until timestamptz NOT NULL,
    as_of      timestamptz NOT NULL
);
INSERT INTO usage_rollup (done_until, as_of) VALUES ('epoch', 'epoch');
-- A pass finds refunds by their date; no other entry is in it.
CREATE INDEX ledger_entries_refunded ON ledger_entries (created_at) WHERE kind = 'refund';

-- Every access by an operator, whatever came of it. Append-only.
CREATE TABLE audit_events (
    audit_id       uuid PRIMARY KEY,
    at             timestamptz NOT NULL,
    actor          text NOT NULL CHECK (length(actor) BETWEEN 1 AND 255),
    action         text NOT NULL CHECK (length(action) BETWEEN 1 AND 120),
    target         text CHECK (length(target) <= 255),
    client_address text NOT NULL CHECK (length(client_address) <= 64),
    request_id     text NOT NULL CHECK (length(request_id) <= 128),
    status         smallint NOT NULL,
    details        jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(details) = 'object')
);
CREATE INDEX audit_events_at ON audit_events (at DESC, audit_id DESC);
CREATE TRIGGER audit_never_rewritten BEFORE UPDATE OR DELETE ON audit_events
    FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER audit_never_emptied BEFORE TRUNCATE ON audit_events
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite();
