"""API keys: make, change, regenerate, revoke, list, note their use."""

from collections.abc import Callable, Sequence
from datetime import datetime
from ipaddress import IPv4Network, IPv6Network
from typing import Final

import attrs

from callora.ledger.ids import ApiId, ApiKeyId, EndpointId, UserId, VaultId
from callora.ledger.keys import PREFIX_CHARS, hash_key
from callora.store.bridge import Connection, Database, Row
from callora.store.outbox import Event, add_events, iso

Network = IPv4Network | IPv6Network

_ADD: Final = """
INSERT INTO api_keys (api_key_id, user_id, vault_id, name, prefix, key_hash, last4, scopes, rate_limit_per_minute,
                      expires_at, created_at, description, allowed_apis, allowed_endpoints, allowed_cidrs,
                      monthly_credit_cap)
SELECT $1, user_id, vault_id, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15 FROM vaults
WHERE vault_id = $2 AND network = CASE WHEN $4 LIKE 'ck_live_%' THEN 'mainnet' ELSE 'testnet' END
RETURNING api_key_id
"""

_CHANGE: Final = """
UPDATE api_keys SET
    name = CASE WHEN 'name' = ANY ($3::text[]) THEN $4 ELSE name END,
    description = CASE WHEN 'description' = ANY ($3) THEN $5 ELSE description END,
    scopes = CASE WHEN 'scopes' = ANY ($3) THEN $6::text[] ELSE scopes END,
    allowed_apis = CASE WHEN 'allowed_apis' = ANY ($3) THEN $7::bigint[] ELSE allowed_apis END,
    allowed_endpoints = CASE WHEN 'allowed_endpoints' = ANY ($3) THEN $8::bigint[] ELSE allowed_endpoints END,
    allowed_cidrs = CASE WHEN 'allowed_networks' = ANY ($3) THEN $9::cidr[] ELSE allowed_cidrs END,
    rate_limit_per_minute = CASE WHEN 'rate_limit_per_minute' = ANY ($3) THEN $10 ELSE rate_limit_per_minute END,
    disabled = CASE WHEN 'disabled' = ANY ($3) THEN $11 ELSE disabled END,
    expires_at = CASE WHEN 'expires_at' = ANY ($3) THEN $12::timestamptz ELSE expires_at END,
    monthly_credit_cap = CASE WHEN 'monthly_credit_cap' = ANY ($3) THEN $13 ELSE monthly_credit_cap END
WHERE api_key_id = $1 AND ($2::uuid IS NULL OR user_id = $2) AND revoked_at IS NULL
RETURNING api_key_id
"""

# The former secret lives on in the row until the grace ends. While one does, another regeneration with a grace is not
# carried out: it would end that secret before its time.
_REGENERATE: Final = """
WITH renewed AS (
    UPDATE api_keys SET
        prefix = $3, key_hash = $4, last4 = $5,
        previous_prefix = CASE WHEN $6::timestamptz > $7 THEN prefix END,
        previous_hash = CASE WHEN $6::timestamptz > $7 THEN key_hash END,
        previous_expires_at = CASE WHEN $6::timestamptz > $7 THEN $6::timestamptz END
    WHERE api_key_id = $1 AND user_id = $2 AND revoked_at IS NULL
          AND ($6::timestamptz <= $7 OR previous_expires_at IS NULL OR previous_expires_at <= $7)
    RETURNING api_key_id
), cut AS (
    UPDATE access_tokens t SET expires_at = $6 FROM renewed r WHERE t.api_key_id = r.api_key_id AND t.expires_at > $6
)
SELECT api_key_id FROM renewed
"""

_REVOKE_ONE: Final = """
UPDATE api_keys SET revoked_at = $3
WHERE api_key_id = $1 AND ($2::uuid IS NULL OR user_id = $2) AND revoked_at IS NULL
RETURNING api_key_id, user_id, vault_id, name, prefix
"""

_REVOKE: Final = """
UPDATE api_keys SET revoked_at = $2
WHERE (api_key_id::text = $1 OR prefix = $1 OR previous_prefix = $1) AND revoked_at IS NULL
RETURNING api_key_id, user_id, vault_id, name, prefix
"""

_EXISTS: Final = "SELECT true FROM api_keys WHERE api_key_id = $1 AND ($2::uuid IS NULL OR user_id = $2)"

_NAMED: Final = """
SELECT api_key_id, prefix FROM api_keys WHERE api_key_id::text = $1 OR prefix = $1 OR previous_prefix = $1
ORDER BY api_key_id
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


@attrs.frozen
class KeyChange:
    """What shall be changed of a key; what is not in `fields` stays as it is."""

    fields: frozenset[str]
    """Names of the fields below."""
    name: str | None = None
    description: str | None = None
    scopes: Sequence[str] | None = None
    allowed_apis: Sequence[ApiId] | None = None
    allowed_endpoints: Sequence[EndpointId] | None = None
    allowed_networks: Sequence[Network] | None = None
    rate_limit_per_minute: int | None = None
    disabled: bool | None = None
    expires_at: datetime | None = None
    monthly_credit_cap: int | None = None


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
    description: str | None = None,
    allowed_apis: Sequence[ApiId] | None = None,
    allowed_endpoints: Sequence[EndpointId] | None = None,
    allowed_networks: Sequence[Network] | None = None,
    monthly_credit_cap: int | None = None,
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
        description,
        allowed_apis,
        allowed_endpoints,
        allowed_networks,
        monthly_credit_cap,
    )
    return added is not None


async def change_key(database: Database, api_key_id: ApiKeyId, user_id: UserId | None, change: KeyChange) -> bool:
    """Change some fields of a key that is not revoked; False when there is none.

    Args:
        user_id: whose key it must be; None for anybody's.
    """
    changed = await database.fetch_value(
        _CHANGE,
        api_key_id,
        user_id,
        sorted(change.fields),
        change.name,
        change.description,
        change.scopes,
        change.allowed_apis,
        change.allowed_endpoints,
        change.allowed_networks,
        change.rate_limit_per_minute,
        change.disabled,
        change.expires_at,
        change.monthly_credit_cap,
    )
    return changed is not None


async def regenerate_key(
    database: Database, api_key_id: ApiKeyId, user_id: UserId, key: str, former_until: datetime, now: datetime
) -> bool:
    """Give a key a new secret; the former one, and the access tokens made so far, last until `former_until`.

    Returns:
        False when the user has no such key, when it is revoked, or when a former secret still lives and this one's
        successor is to leave another; nothing was written.
    """
    renewed = await database.fetch_value(
        _REGENERATE, api_key_id, user_id, key[:PREFIX_CHARS], hash_key(key.encode()), key[-4:], former_until, now
    )
    return renewed is not None


async def revoke_key(
    database: Database, api_key_id: ApiKeyId, user_id: UserId | None, now: datetime, new_id: Callable[[], str]
) -> bool:
    """Revoke a key, for good, and tell its owner; False when there is none. Repeated, it changes and tells nothing.

    Args:
        user_id: whose key it must be; None for anybody's.
        new_id: makes the id of what is told.
    """
    async with database.transaction() as connection:
        await _tell(connection, await connection.fetch(_REVOKE_ONE, api_key_id, user_id, now), now, new_id)
        return await connection.fetch_value(_EXISTS, api_key_id, user_id) is not None


async def revoke_keys(database: Database, id_or_prefix: str, now: datetime, new_id: Callable[[], str]) -> Sequence[Row]:
    """Revoke the key with this id, or every key with this 16-character prefix, and tell; return the revoked.

    Args:
        new_id: as in `revoke_key`.
    """
    async with database.transaction() as connection:
        await _tell(connection, await connection.fetch(_REVOKE, id_or_prefix, now), now, new_id)
        return await connection.fetch(_NAMED, id_or_prefix)


async def _tell(connection: Connection, revoked: Sequence[Row], now: datetime, new_id: Callable[[], str]) -> None:
    events = [
        Event(
            event_id=new_id(),
            type="key_revoked",
            subject=str(row["api_key_id"]),
            developer_id=None,
            payload={
                "keyId": str(row["api_key_id"]),
                "vaultId": str(row["vault_id"]),
                "name": row["name"],
                "prefix": row["prefix"],
                "revokedAt": iso(now),
            },
            user_id=UserId(str(row["user_id"])),
        )
        for row in revoked
    ]
    if events:
        await add_events(connection, events, now)


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
