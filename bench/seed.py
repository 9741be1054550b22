"""What the lanes call: funded vaults with a key each, and one priced endpoint.

The API is made through the service's own doors; vaults go in by the ten thousand, as their deposits would leave them,
because the memory benchmark needs a hundred thousand of them.
"""

import os
from datetime import datetime
from typing import Final

import attrs

from callora.ledger.ids import DeveloperId, Ids, UserId
from callora.ledger.keys import PREFIX_CHARS, RANDOM_BYTES, hash_key, make_key
from callora.ledger.money import Stroops, parse_usdc
from callora.ledger.rating import RateCard
from callora.service import SystemClock
from callora.store import accounts
from callora.store.accounts import PricedEndpoint
from callora.store.bridge import Database, open_database

SLUG: Final = "bench"
UNLIMITED: Final = 2_000_000_000
"""Calls a minute: more than any lane reaches."""
_BATCH: Final = 10_000

_ADD: Final = """
WITH made AS (
    SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::text[], $5::bytea[], $6::text[])
        AS m (user_id, vault_id, api_key_id, prefix, key_hash, last4)
), user_rows AS (
    INSERT INTO users (user_id, name, created_at) SELECT user_id, 'Bench', $8 FROM made
), vault_rows AS (
    INSERT INTO vaults (vault_id, user_id, network, plan_id, available, version, entry_seq, created_at)
    SELECT vault_id, user_id, 'testnet', 'enterprise', $7, 1, 1, $8 FROM made
), entry_rows AS (
    INSERT INTO ledger_entries (vault_id, seq, kind, amount, balance_after, ref, created_at)
    SELECT vault_id, 1, 'deposit', $7, $7, 'bench', $8 FROM made
)
INSERT INTO api_keys (api_key_id, user_id, vault_id, name, prefix, key_hash, last4, rate_limit_per_minute, created_at)
SELECT api_key_id, user_id, vault_id, 'bench', prefix, key_hash, last4, $9, $8 FROM made
"""

_LIMIT: Final = """
INSERT INTO spending_limits (vault_id, api_key_id, period, amount, set_by, set_at)
SELECT k.vault_id, subject, period, 10000000000000000, k.user_id, now()
FROM api_keys k, unnest(ARRAY[NULL, k.api_key_id]) AS subject, unnest('{day,week,month,year}'::text[]) AS period
"""
"""All four limits of every key and vault, out of reach."""

_PLANS: Final = """
INSERT INTO plans (plan_id, name, monthly_credits, overage)
VALUES ('credits', 'Credits', 1000000000000, 'deny'), ('money', 'Money', 1, 'charge')
"""
_PLANNED: Final = "UPDATE vaults SET plan_id = CASE WHEN vault_id < $1 THEN 'credits' ELSE 'money' END"
"""Half of the vaults pay in credits; the others have one, and pay in money while a plan is asked each time."""


@attrs.frozen
class BenchSeed:
    """What was made."""

    path: str
    """The priced call."""
    api_keys: tuple[str, ...]
    """One for each vault."""
    vault_ids: tuple[str, ...]


async def seed_bench(
    database_url: str, *, upstream_url: str, vaults: int, balance_usdc: str, price_usdc: str, limited: bool = False
) -> BenchSeed:
    """Make `vaults` users with a funded vault and a key each, and an API `bench` before `upstream_url`.

    Args:
        database_url: a migrated database without an API of that name.
        upstream_url: base URL of the API.
        vaults: how many, > 0.
        balance_usdc: deposited in each.
        price_usdc: of any call.
        limited: give every key and vault all four spending limits, out of reach, and a plan whose credits pay calls.
    """
    clock = SystemClock()
    ids, now = Ids(clock, os.urandom), clock.now()
    api_keys: list[str] = []
    vault_ids: list[str] = []
    async with open_database(database_url, command_seconds=120) as database:
        owner = UserId(ids.uuid7())
        await accounts.add_user(database, owner, "Bench developer", now)
        developer = await accounts.ensure_developer(database, DeveloperId(ids.uuid7()), owner, "Bench", now)
        await accounts.ensure_api(
            database,
            developer_id=developer,
            slug=SLUG,
            name="Bench",
            base_url=upstream_url,
            endpoints=[PricedEndpoint("*", "*", parse_usdc(price_usdc), RateCard(unit_credits=1) if limited else None)],
            now=now,
        )
        while len(vault_ids) < vaults:
            count = min(_BATCH, vaults - len(vault_ids))
            made_ids, made_keys = await _add_vaults(database, ids, count, parse_usdc(balance_usdc), now)
            vault_ids += made_ids
            api_keys += made_keys
        if limited:
            await database.execute(_LIMIT)
            await database.execute(_PLANS)
            await database.execute(_PLANNED, sorted(vault_ids)[len(vault_ids) // 2])
        await database.execute("ANALYZE")  # or it would be done by the server in the middle of a run
    return BenchSeed(f"/v1/call/{SLUG}/hello", tuple(api_keys), tuple(vault_ids))


async def _add_vaults(
    database: Database, ids: Ids, count: int, balance: Stroops, now: datetime
) -> tuple[list[str], list[str]]:
    """Make `count` users with a vault and a key each; return the vaults' ids and the keys."""
    keys = [make_key("testnet", os.urandom(RANDOM_BYTES)) for _ in range(count)]
    users, vaults, key_ids = ([ids.uuid7() for _ in keys] for _ in range(3))
    await database.execute(
        _ADD,
        users,
        vaults,
        key_ids,
        [key[:PREFIX_CHARS] for key in keys],
        [hash_key(key.encode()) for key in keys],
        [key[-4:] for key in keys],
        balance,
        now,
        UNLIMITED,
    )
    return vaults, keys
