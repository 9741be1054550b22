-- Subscriptions: a plan that a vault pays for by the calendar month, UTC, as its credits are given. A row is the intent:
-- it stands before its vault is charged, and says so after. Who works on one has claimed it, so that of several
-- processes, or of a request and the job behind it, one at a time does.
CREATE TABLE subscriptions (
    subscription_id uuid PRIMARY KEY,
    vault_id        uuid NOT NULL REFERENCES vaults,
    plan_id         text NOT NULL REFERENCES plans,
    -- A month's, as it was agreed to: a plan that becomes dearer does so for those who come later.
    price           bigint NOT NULL CHECK (price BETWEEN 1 AND 10000000000000),
    -- What the first month costs: the price, less what was paid for it by the subscription that this one replaces.
    first_charge    bigint NOT NULL CHECK (first_charge BETWEEN 1 AND 10000000000000),
    replaces        uuid REFERENCES subscriptions,
    -- From the end of what is paid on, in place of the plan and the price above.
    next_plan_id    text REFERENCES plans,
    next_price      bigint CHECK (next_price BETWEEN 1 AND 10000000000000),
    state           text NOT NULL DEFAULT 'pending'
                    CHECK (state IN ('pending', 'active', 'ended', 'lapsed', 'replaced')),
    -- The first instant of the month that is being paid, or was paid last, and of the month after it.
    period_start    timestamptz NOT NULL,
    paid_until      timestamptz NOT NULL CHECK (paid_until > period_start),
    created_at      timestamptz NOT NULL,
    cancelled_at    timestamptz,
    ended_at        timestamptz,
    -- Until when whoever works on it has it for himself; null: nobody does.
    claimed_until   timestamptz,
    CHECK ((next_plan_id IS NULL) = (next_price IS NULL)),
    CHECK ((state IN ('pending', 'active')) = (ended_at IS NULL))
);
CREATE UNIQUE INDEX subscriptions_one_active ON subscriptions (vault_id) WHERE state = 'active';
CREATE UNIQUE INDEX subscriptions_one_pending ON subscriptions (vault_id) WHERE state = 'pending';
CREATE INDEX subscriptions_of_vault ON subscriptions (vault_id, subscription_id);
CREATE INDEX subscriptions_due ON subscriptions (paid_until) WHERE state = 'active';

-- More credits, asked for by a vault's owner and decided by an operator. What an approval gives is fixed before it is
-- given: `granted_at` says that it was.
CREATE TABLE quota_requests (
    request_id uuid PRIMARY KEY,
    vault_id   uuid NOT NULL REFERENCES vaults,
    user_id    uuid NOT NULL REFERENCES users,
    credits    bigint NOT NULL CHECK (credits BETWEEN 1 AND 1000000000000),
    reason     text NOT NULL CHECK (length(reason) BETWEEN 10 AND 1000),
    state      text NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'approved', 'rejected')),
    created_at timestamptz NOT NULL,
    decided_at timestamptz,
    decided_by text CHECK (length(decided_by) <= 255),
    answer     text CHECK (length(answer) BETWEEN 1 AND 1000),
    grant_id   uuid,
    granted    bigint CHECK (granted BETWEEN 1 AND 1000000000000),
    expires_at timestamptz,
    granted_at timestamptz,
    CHECK ((state = 'open') = (decided_at IS NULL) AND (state = 'open') = (decided_by IS NULL)),
    CHECK ((state = 'approved') = (granted IS NOT NULL) AND (granted IS NULL) = (grant_id IS NULL)
           AND (granted IS NULL) = (expires_at IS NULL)),
    CHECK (granted_at IS NULL OR state = 'approved')
);
CREATE INDEX quota_requests_of_user ON quota_requests (user_id, request_id);
CREATE INDEX quota_requests_by_state ON quota_requests (state, request_id);
CREATE INDEX quota_requests_ungranted ON quota_requests (decided_at) WHERE state = 'approved' AND granted_at IS NULL;

-- Calls never change what this index is about, and most vaults are not in it.
CREATE INDEX vaults_with_quota ON vaults (vault_id) WHERE quota_until <> 'infinity';
-- Which process looks at the quotas next, and when.
CREATE TABLE quota_watch (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    due_at   timestamptz NOT NULL
);
INSERT INTO quota_watch (due_at) VALUES ('-infinity');
