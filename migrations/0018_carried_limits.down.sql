ALTER TABLE vaults DROP COLUMN rounds, DROP COLUMN placed, DROP COLUMN placed_credits;
