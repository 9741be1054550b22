-- Grants and people without a name would not fit the tables as they were: this fails while there are any.
DROP INDEX ledger_entries_refunded;
DROP TABLE audit_events, usage_rollup, usage_open, all_days, vault_days, developer_callers, developer_days,
    usage_days, usage_minutes, rest_idempotency, billing_requests, access_tokens, login_challenges, refresh_tokens, sessions;
ALTER TABLE ledger_entries
    DROP CONSTRAINT ledger_entries_grant_check,
    DROP CONSTRAINT ledger_entries_kind_check,
    ADD CONSTRAINT ledger_entries_kind_check CHECK (kind IN ('deposit', 'withdrawal', 'refund', 'adjustment'));
DROP INDEX ledger_entries_statement;
DROP INDEX api_keys_user;
ALTER TABLE api_keys
    DROP COLUMN description, DROP COLUMN previous_prefix, DROP COLUMN previous_hash, DROP COLUMN previous_expires_at;
DROP TABLE api_popularity;
DROP INDEX endpoint_prices_in_effect;
ALTER TABLE api_endpoints DROP COLUMN description, DROP COLUMN retired_at;
DROP INDEX apis_developer, apis_listing;
ALTER TABLE apis
    DROP COLUMN description, DROP COLUMN category, DROP COLUMN tags, DROP COLUMN logo_url, DROP COLUMN updated_at,
    DROP COLUMN deleted_at;
ALTER TABLE developers
    DROP COLUMN website, DROP COLUMN description, DROP COLUMN category, DROP COLUMN updated_at,
    ALTER COLUMN name SET NOT NULL;
ALTER TABLE users DROP COLUMN wallet_address, DROP COLUMN subject;
