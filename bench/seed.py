"""What the lanes call: funded vaults with a key each, and one priced endpoint."""

import secrets

import attrs

from callora.config import load_settings
from callora.ledger.commands import Deposit
from callora.ledger.ids import ApiKeyId, DeveloperId, UserId, VaultId
from callora.ledger.keys import RANDOM_BYTES, make_key
from callora.ledger.money import parse_usdc
from callora.logs import Logs
from callora.service import Budget, Context, SystemClock, open_ledger
from callora.store import accounts
from callora.store.accounts import PricedEndpoint
from callora.store.keys import add_key

SLUG = "bench"
UNLIMITED = 2_000_000_000
"""Calls a minute: more than any lane reaches."""


@attrs.frozen
class BenchSeed:
    """What was made."""

    path: str
    api_keys: tuple[str, ...]
    """One for each vault."""
    vault_ids: tuple[str, ...]


async def seed_bench(
    database_url: str, *, upstream_url: str, vaults: int, balance_usdc: str, price_usdc: str
) -> BenchSeed:
    """Make `vaults` users with a funded vault and a key each, and an API `bench` before `upstream_url`."""
    settings = load_settings({"DATABASE_URL": database_url})
    clock = SystemClock()
    keys: list[str] = []
    vault_ids: list[str] = []
    with Logs(clock, level="warning", as_json=False) as logs:
        context = Context.make(settings, logs, clock)
        async with open_ledger(context, database_url, Budget(30)) as ledger:
            ids, now, database = context.ids, clock.now(), ledger.database
            owner = UserId(ids.uuid7())
            await accounts.add_user(database, owner, "Bench developer", now)
            developer = await accounts.ensure_developer(database, DeveloperId(ids.uuid7()), owner, "Bench", now)
            await accounts.ensure_api(
                database,
                developer_id=developer,
                slug=SLUG,
                name="Bench",
                base_url=upstream_url,
                endpoints=[PricedEndpoint("*", "*", parse_usdc(price_usdc))],
                now=now,
            )
            for number in range(vaults):
                user = UserId(ids.uuid7())
                await accounts.add_user(database, user, f"Bench {number}", now)
                vault = await accounts.ensure_vault(database, VaultId(ids.uuid7()), user, "testnet", "enterprise", now)
                await ledger.registry.ask(vault, Deposit(parse_usdc(balance_usdc), "bench"))
                key = make_key("testnet", secrets.token_bytes(RANDOM_BYTES))
                await add_key(
                    database,
                    api_key_id=ApiKeyId(ids.uuid7()),
                    vault_id=vault,
                    key=key,
                    name="bench",
                    now=now,
                    rate_limit_per_minute=UNLIMITED,
                )
                keys.append(key)
                vault_ids.append(vault)
    return BenchSeed(f"/v1/call/{SLUG}/hello", tuple(keys), tuple(vault_ids))
