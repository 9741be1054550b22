-- What a process knows of a limited vault it may go on with while nothing but rounds of holds and closes changed the vault:
-- `version` grows with every change, `rounds` with those alone. `placed` and `placed_credits` are all that such rounds ever
-- set aside in stroops and in credits, whatever came back of it: by how much they grew, no key and no vault spent more.
-- Kept for vaults that are limited; where they are not kept, `version` grows alone, and limits are counted anew.
ALTER TABLE vaults
    ADD COLUMN rounds         bigint NOT NULL DEFAULT 0,
    ADD COLUMN placed         bigint NOT NULL DEFAULT 0,
    ADD COLUMN placed_credits bigint NOT NULL DEFAULT 0;
