ALTER TABLE endpoint_prices
    DROP CONSTRAINT endpoint_prices_charge, DROP CONSTRAINT endpoint_prices_measure,
    DROP CONSTRAINT endpoint_prices_held, DROP CONSTRAINT endpoint_prices_per_call,
    DROP COLUMN quantity_from, DROP COLUMN max_units, DROP COLUMN held_units, DROP COLUMN min_units,
    DROP COLUMN unit_credits, DROP COLUMN unit;
