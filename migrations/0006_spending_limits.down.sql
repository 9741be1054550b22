DROP INDEX ledger_entries_given_back;
DROP INDEX usage_days_of_key;
DROP TABLE spending_limits;
DROP FUNCTION refuse_emptied_limits();
DROP FUNCTION note_spending_limits();
ALTER TABLE vaults DROP COLUMN limited;
ALTER TABLE api_keys DROP CONSTRAINT api_keys_of_vault;
