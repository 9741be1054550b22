"""Users, vaults, developers, APIs and prices: made here, for the demo, the bench and the tests.

Every function repeats safely: what exists under the same name is left as it is.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Final

import attrs

from callora.ledger.ids import ApiId, DeveloperId, UserId, VaultId
from callora.ledger.money import Stroops
from callora.ledger.offers import DatedPrice, EndpointOffer
from callora.ledger.rating import RateCard
from callora.store import apis
from callora.store.bridge import Database

_ADD_USER: Final = """
INSERT INTO users (user_id, name, created_at) VALUES ($1, $2, $3) ON CONFLICT (user_id) DO NOTHING
"""

_GIVE_WALLET: Final = """
UPDATE users SET wallet_address = $2 WHERE user_id = $1 AND wallet_address IS NULL
    AND NOT EXISTS (SELECT FROM users WHERE wallet_address = $2)
"""

_FIND_USER: Final = "SELECT user_id FROM users WHERE name = $1 ORDER BY created_at, user_id LIMIT 1"

_FIND_SUBJECT: Final = (
    "SELECT user_id FROM users WHERE user_id = $2 OR subject = $1 ORDER BY subject = $1 NULLS FIRST LIMIT 1"
)
_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", re.ASCII)

_ADD_SUBJECT: Final = """
INSERT INTO users (user_id, name, subject, created_at) VALUES ($1, left($2, 120), $2, $3)
ON CONFLICT (subject) DO NOTHING
"""

_ADD_VAULT: Final = """
INSERT INTO vaults (vault_id, user_id, network, plan_id, created_at) VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (user_id, network) DO NOTHING
"""

_FIND_VAULT: Final = "SELECT vault_id FROM vaults WHERE user_id = $1 AND network = $2"

_ADD_DEVELOPER: Final = """
INSERT INTO developers (developer_id, user_id, name, created_at) VALUES ($1, $2, $3, $4)
ON CONFLICT (user_id) DO NOTHING
"""

_FIND_DEVELOPER: Final = "SELECT developer_id FROM developers WHERE user_id = $1"

_ADD_API: Final = """
INSERT INTO apis (developer_id, slug, name, base_url, created_at) VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (slug) DO UPDATE SET base_url = excluded.base_url WHERE apis.base_url <> excluded.base_url
"""

_LOCK_API: Final = "SELECT api_id FROM apis WHERE slug = $1 FOR NO KEY UPDATE"


@attrs.frozen
class PricedEndpoint:
    """An endpoint to be offered."""

    method: str
    path: str
    amount: Stroops
    """Of one unit."""
    card: RateCard | None = None


async def add_user(database: Database, user_id: UserId, name: str, now: datetime) -> None:
    """Store a user."""
    await database.execute(_ADD_USER, user_id, name, now)


async def give_wallet(database: Database, user_id: UserId, address: str) -> None:
    """Let a user be known by a wallet, unless he is known by one."""
    await database.execute(_GIVE_WALLET, user_id, address)


async def find_user(database: Database, name: str) -> UserId | None:
    """Return the oldest user of this name."""
    found = await database.fetch_value(_FIND_USER, name)
    return None if found is None else UserId(str(found))


async def ensure_subject(database: Database, user_id: UserId, subject: str, now: datetime) -> UserId:
    """Return the user whom an outside issuer calls `subject`, or whose id it is; made under `user_id` where new.

    Args:
        subject: 1 to 255 characters.
    """
    own_id = subject if _UUID.fullmatch(subject) else None
    found = await database.fetch_value(_FIND_SUBJECT, subject, own_id)
    if found is None:
        await database.execute(_ADD_SUBJECT, user_id, subject, now)
        found = await database.fetch_value(_FIND_SUBJECT, subject, own_id)
    return UserId(str(found))


async def ensure_vault(
    database: Database, vault_id: VaultId, user_id: UserId, network: str, plan_id: str, now: datetime
) -> VaultId:
    """Return the user's vault on a network, made under `vault_id` where there is none."""
    await database.execute(_ADD_VAULT, vault_id, user_id, network, plan_id, now)
    return VaultId(str(await database.fetch_value(_FIND_VAULT, user_id, network)))


async def ensure_developer(
    database: Database, developer_id: DeveloperId, user_id: UserId, name: str, now: datetime
) -> DeveloperId:
    """Return the user's developer profile, made under `developer_id` where there is none."""
    await database.execute(_ADD_DEVELOPER, developer_id, user_id, name, now)
    return DeveloperId(str(await database.fetch_value(_FIND_DEVELOPER, user_id)))


async def ensure_api(
    database: Database,
    *,
    developer_id: DeveloperId,
    slug: str,
    name: str,
    base_url: str,
    endpoints: Sequence[PricedEndpoint],
    now: datetime,
) -> ApiId:
    """Return the API of this slug, with this base URL, these endpoints and these prices."""
    offers = [EndpointOffer(each.method, each.path, (DatedPrice(each.amount, None, each.card),)) for each in endpoints]
    async with database.transaction() as connection:
        await connection.execute(_ADD_API, developer_id, slug, name, base_url, now)
        api_id = ApiId(await connection.fetch_value(_LOCK_API, slug))
        present = await apis.present_endpoints(connection, api_id, now)
        await apis.put_endpoints(connection, api_id, offers, present, now)
    return api_id
