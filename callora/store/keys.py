"""API keys: make, revoke, list, note their use."""

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from callora.ledger.ids import ApiKeyId, VaultId
from callora.ledger.keys import PREFIX_CHARS, hash_key
from callora.store.bridge import Database, Row

_ADD: Final = """
INSERT INTO api_keys (api_key_id, user_id, vault_id, name, prefix, key_hash, last4, scopes, rate_limit_per_minute,
                      expires_at, created_at)
SELECT $1, user_id, vault_id, $3, $4, $5, $6, $7, $8, $9, $10 FROM vaults
WHERE vault_id = $2 AND network = CASE WHEN $4 LIKE 'ck_live_%' THEN 'mainnet' ELSE 'testnet' END
RETURNING api_key_id
"""

_REVOKE: Final = """
UPDATE api_keys SET revoked_at = coalesce(revoked_at, $2) WHERE api_key_id::text = $1 OR prefix = $1
RETURNING api_key_id, prefix
"""

_LIST: Final = """
SELECT k.api_key_id, k.prefix, k.last4, k.name, k.vault_id, v.network, k.scopes, k.disabled, k.expires_at, k.revoked_at,
       k.last_used_at, k.created_at
FROM api_keys k JOIN vaults v ON v.vault_id = k.vault_id
WHERE $1::uuid IS NULL OR k.vault_id = $1
ORDER BY k.created_at, k.api_key_id LIMIT $2
"""

_USED: Final = "UPDATE api_keys SET last_used_at = $2 WHERE api_key_id = ANY ($1::uuid[])"

_NETWORK: Final = "SELECT network FROM vaults WHERE vault_id = $1"


async def add_key(
    database: Database,
    *,
    api_key_id: ApiKeyId,
    vault_id: VaultId,
    key: str,
    name: str,
    now: datetime,
    scopes: Sequence[str] = ("*",),
    rate_limit_per_minute: int | None = None,
    expires_at: datetime | None = None,
) -> bool:
    """Store a key's prefix and hash; return False when the vault does not exist or is on the other network."""
    added = await database.fetch_value(
        _ADD,
        api_key_id,
        vault_id,
        name,
        key[:PREFIX_CHARS],
        hash_key(key.encode()),
        key[-4:],
        list(scopes),
        rate_limit_per_minute,
        expires_at,
        now,
    )
    return added is not None


async def revoke_keys(database: Database, id_or_prefix: str, now: datetime) -> Sequence[Row]:
    """Revoke the key with this id, or every key with this 16-character prefix; return the revoked."""
    return await database.fetch(_REVOKE, id_or_prefix, now)


async def list_keys(database: Database, vault_id: VaultId | None, limit: int) -> Sequence[Row]:
    """Return at most `limit` keys, of one vault or of all, oldest first; no row holds a secret."""
    return await database.fetch(_LIST, vault_id, limit)


async def note_use(database: Database, api_key_ids: Sequence[ApiKeyId], now: datetime) -> None:
    """Set when these keys were last used."""
    await database.execute(_USED, list(api_key_ids), now)


async def network_of(database: Database, vault_id: VaultId) -> str | None:
    """Return the network of a vault, or None where there is no such vault."""
    network: str | None = await database.fetch_value(_NETWORK, vault_id)
    return network
