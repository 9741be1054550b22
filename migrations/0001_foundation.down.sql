DROP VIEW vault_statement;
DROP TABLE catalogue_changes, catalogue_epoch, idempotency_keys, ledger_entries, usage_events, api_keys, endpoint_prices,
    api_endpoints, apis, developers, vaults, users, plans;
DROP FUNCTION note_catalogue_change(), refuse_over_refund(), refuse_rewrite();
DROP TYPE usage_state, standing;
