DROP TABLE quarantined_samples;
DROP VIEW counter_minutes;
DROP TABLE counter_deltas;
DROP TABLE counter_checkpoints;
DROP FUNCTION refuse_checkpoint_back();
DROP TABLE counter_accounts;
-- Refused where a vault ever had less than nothing: there is no way back from that.
ALTER TABLE ledger_entries ADD CONSTRAINT ledger_entries_balance_after_check CHECK (balance_after >= 0);
DROP TRIGGER standing_changed ON vaults;
CREATE TRIGGER standing_changed AFTER UPDATE OF standing, plan_id ON vaults
    FOR EACH ROW EXECUTE FUNCTION note_catalogue_change('vault', 'vault_id');
DROP INDEX vaults_in_debt;
ALTER TABLE vaults
    DROP CONSTRAINT vaults_debtors, DROP CONSTRAINT vaults_owing,
    DROP COLUMN standing_for_debt, DROP COLUMN arrears_since, DROP COLUMN owed;
