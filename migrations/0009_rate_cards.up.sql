-- A price version is a line of a rate card: `amount` is the price of one unit. What it says of units is never edited
-- either; the versions there are stay prices of a call.
ALTER TABLE endpoint_prices
    ADD COLUMN unit          text NOT NULL DEFAULT 'call'
        CHECK (unit IN ('call', 'unit', 'url', 'started_minute', 'started_1000_chars', 'byte')),
    -- What a unit costs where a quota pays; 0: money alone pays.
    ADD COLUMN unit_credits  bigint NOT NULL DEFAULT 0 CHECK (unit_credits BETWEEN 0 AND 1000000),
    ADD COLUMN min_units     bigint NOT NULL DEFAULT 1 CHECK (min_units BETWEEN 1 AND 1000000000000),
    -- What is held before a quantity that only the answer tells is known.
    ADD COLUMN held_units    bigint CHECK (held_units >= min_units),
    -- What one call may come to.
    ADD COLUMN max_units     bigint CHECK (max_units BETWEEN greatest(min_units, held_units) AND 1000000000000),
    ADD COLUMN quantity_from text CHECK (length(quantity_from) <= 200 AND quantity_from ~
        '^((request|response)\.(bytes|json:(/.*)?|header:[!#$%&''*+.^_`|~0-9A-Za-z-]+)|stream\.(bytes|events))$'),
    ADD CONSTRAINT endpoint_prices_per_call CHECK (
        (unit = 'call') = (quantity_from IS NULL)
        AND (unit <> 'call' OR (min_units = 1 AND max_units IS NULL))),
    ADD CONSTRAINT endpoint_prices_held CHECK (
        (held_units IS NOT NULL) = (coalesce(quantity_from, '') ~ '^(response|stream)\.')),
    ADD CONSTRAINT endpoint_prices_measure CHECK (CASE
        WHEN quantity_from IN ('request.bytes', 'response.bytes', 'stream.bytes')
            THEN unit IN ('byte', 'started_1000_chars')
        WHEN quantity_from = 'stream.events' THEN unit = 'unit'
        ELSE true END),
    -- What is held at first must fit what a call may cost.
    ADD CONSTRAINT endpoint_prices_charge CHECK (
        amount::numeric * coalesce(held_units, min_units) <= 10000000000000
        AND unit_credits::numeric * coalesce(held_units, min_units) <= 1000000000000);
