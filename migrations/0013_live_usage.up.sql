-- Live usage: what closed, in an order that a client can go on from. A feed is one user's, over all of his vaults; it is
-- kept for whoever listens, or has an endpoint that wants his calls, by passes that lock its row. Calls pay nothing.
CREATE TABLE usage_feeds (
    user_id    uuid PRIMARY KEY REFERENCES users,
    -- The last that was given. An event gets the next one in the pass that finds it, once and for ever.
    position   bigint NOT NULL DEFAULT 0 CHECK (position >= 0),
    -- Nothing is missing between the events after it. One who knows an earlier one has missed some: the feed was left alone
    -- for longer than its events are kept.
    since      bigint NOT NULL DEFAULT 0 CHECK (since BETWEEN 0 AND position),
    -- Of the ids made before it every event is in the feed, but for those in usage_feed_open.
    done_until timestamptz NOT NULL,
    -- When the latest pass looked.
    as_of      timestamptz NOT NULL,
    -- Up to where the outbox has it; null: nobody has asked for that.
    told       bigint CHECK (told BETWEEN 0 AND position)
) WITH (fillfactor = 50);

CREATE INDEX usage_feeds_told ON usage_feeds (user_id) WHERE told IS NOT NULL;

CREATE TABLE usage_feed (
    user_id  uuid NOT NULL,
    position bigint NOT NULL CHECK (position > 0),
    vault_id uuid NOT NULL,
    event_id uuid NOT NULL,
    fed_at   timestamptz NOT NULL,
    PRIMARY KEY (user_id, position),
    UNIQUE (user_id, event_id)
);
CREATE INDEX usage_feed_fed ON usage_feed USING brin (fed_at) WITH (pages_per_range = 32, autosummarize = on);
CREATE TRIGGER usage_feed_never_rewritten BEFORE UPDATE ON usage_feed FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();

-- Events to look at by their ids in each pass until they have closed: what was seen open, and charges over REST that are
-- about to be placed under an id that is older than a pass looks back.
CREATE TABLE usage_feed_open (
    vault_id uuid NOT NULL,
    event_id uuid NOT NULL,
    noted_at timestamptz NOT NULL,
    PRIMARY KEY (vault_id, event_id)
);

-- Below which balance an owner wants to hear of it: once, when it falls below, and again once it has been above since.
CREATE TABLE balance_alerts (
    vault_id  uuid PRIMARY KEY REFERENCES vaults,
    threshold bigint NOT NULL CHECK (threshold BETWEEN 1 AND 10000000000000),
    set_by    uuid NOT NULL REFERENCES users,
    set_at    timestamptz NOT NULL,
    -- When it was found below; null while it is not.
    low_since timestamptz,
    -- How often that was. It names what is told, so a row stays when its threshold is removed.
    times     bigint NOT NULL DEFAULT 0 CHECK (times >= 0),
    removed_at timestamptz
);
-- Which process looks at them next, and when.
CREATE TABLE balance_watch (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    due_at   timestamptz NOT NULL
);
INSERT INTO balance_watch (due_at) VALUES ('-infinity');

-- A calendar month, UTC, of a vault: what it was charged, as the sums of its days say once nothing of the month is open
-- any more. Refunds made later are the later month's.
CREATE TABLE invoices (
    invoice_id    uuid PRIMARY KEY,
    vault_id      uuid NOT NULL REFERENCES vaults,
    month         date NOT NULL CHECK (extract(day FROM month) = 1),
    calls         bigint NOT NULL CHECK (calls >= 0),
    usage         bigint NOT NULL CHECK (usage >= 0),
    refunded      bigint NOT NULL CHECK (refunded >= 0),
    subscriptions bigint NOT NULL CHECK (subscriptions >= 0),
    total         bigint GENERATED ALWAYS AS (usage - refunded + subscriptions) STORED,
    issued_at     timestamptz NOT NULL,
    UNIQUE (vault_id, month)
);
CREATE INDEX invoices_of_vault ON invoices (vault_id, invoice_id);
CREATE TRIGGER invoices_never_rewritten BEFORE UPDATE OR DELETE ON invoices
    FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER invoices_never_emptied BEFORE TRUNCATE ON invoices
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite();

-- The last month that every vault has its invoice of; null before the first.
CREATE TABLE invoicing (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    closed   date CHECK (extract(day FROM closed) = 1)
);
INSERT INTO invoicing DEFAULT VALUES;
