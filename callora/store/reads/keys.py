"""API keys and their access tokens as their owners and operators see them: no row holds a secret or its hash."""

from collections.abc import Sequence
from typing import Final

from callora.ledger.ids import ApiId, ApiKeyId, UserId, VaultId
from callora.store.bridge import Database, Row

_SELECT: Final = """
SELECT k.api_key_id, k.user_id, k.vault_id, v.network, v.plan_id, k.name, k.description, k.prefix, k.last4, k.scopes,
       k.allowed_apis, k.allowed_endpoints, k.allowed_cidrs, k.rate_limit_per_minute, k.disabled, k.expires_at,
       k.revoked_at, k.last_used_at, k.created_at, k.previous_expires_at, k.monthly_credit_cap
FROM api_keys k JOIN vaults v ON v.vault_id = k.vault_id
"""

_ONE: Final = _SELECT + "WHERE k.api_key_id = $1 AND ($2::uuid IS NULL OR k.user_id = $2)"

_OF_USER: Final = (
    _SELECT
    + """
WHERE k.user_id = $1 AND k.api_key_id < $2 AND ($3::boolean IS NULL OR (k.revoked_at IS NULL AND NOT k.disabled) = $3)
      AND ($4::text IS NULL OR v.plan_id = $4)
ORDER BY k.api_key_id DESC LIMIT $5
"""
)

_OF_ALL: Final = (
    _SELECT
    + """
WHERE k.api_key_id < $1 AND ($2::boolean IS NULL OR (k.revoked_at IS NULL AND NOT k.disabled) = $2)
      AND ($3::text IS NULL OR v.plan_id = $3)
ORDER BY k.api_key_id DESC LIMIT $4
"""
)

_PLAN_RATE: Final = """
SELECT p.rate_limit_per_minute FROM vaults v JOIN plans p ON p.plan_id = v.plan_id WHERE v.vault_id = $1
"""

# Of the APIs asked for, and of those that the endpoints belong to, which the vault's plan does not have.
_OUTSIDE: Final = """
SELECT a.api_id FROM vaults v JOIN plans p ON p.plan_id = v.plan_id
JOIN apis a ON a.api_id = ANY ($2::bigint[])
    OR a.api_id IN (SELECT e.api_id FROM api_endpoints e WHERE e.endpoint_id = ANY ($3::bigint[]))
WHERE v.vault_id = $1 AND a.api_id <> ALL (p.allowed_apis)
ORDER BY a.api_id
"""

# What a person may name: what is published, and what is his own.
_APIS: Final = """
SELECT a.api_id FROM apis a JOIN developers d ON d.developer_id = a.developer_id
WHERE a.api_id = ANY ($1::bigint[]) AND a.deleted_at IS NULL AND (a.status = 'active' OR d.user_id = $2)
"""

_ENDPOINTS: Final = """
SELECT e.endpoint_id FROM api_endpoints e JOIN apis a ON a.api_id = e.api_id
JOIN developers d ON d.developer_id = a.developer_id
WHERE e.endpoint_id = ANY ($1::bigint[]) AND e.retired_at IS NULL AND a.deleted_at IS NULL
      AND (a.status = 'active' OR d.user_id = $2)
"""

_PUBLISHED: Final = "SELECT true FROM apis WHERE api_id = $1 AND status = 'active' AND deleted_at IS NULL"

_TOKENS: Final = """
SELECT token_id, scopes, allowed_apis, budget, spent, created_at, expires_at, revoked_at FROM access_tokens
WHERE api_key_id = $1 AND token_id < $2 ORDER BY token_id DESC LIMIT $3
"""


class KeyReads:
    """Queries over the pool. Every method raises StoreUnavailable, and then nothing was read."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def key(self, api_key_id: ApiKeyId, user_id: UserId | None) -> Row | None:
        """Return a key.

        Args:
            user_id: whose key it must be; None for anybody's.
        """
        return await self._database.fetch_row(_ONE, api_key_id, user_id)

    async def keys(
        self, user_id: UserId | None, *, before: str, active: bool | None, plan_id: str | None, limit: int
    ) -> Sequence[Row]:
        """Return keys, the newest first.

        Args:
            user_id: None for everybody's.
            before: only those with a smaller id.
            active: True for those neither disabled nor revoked, False for the others, None for both.
            plan_id: only those of vaults that have this plan; None for all.
        """
        if user_id is None:
            return await self._database.fetch(_OF_ALL, before, active, plan_id, limit)
        return await self._database.fetch(_OF_USER, user_id, before, active, plan_id, limit)

    async def plan_rate(self, vault_id: VaultId) -> int | None:
        """Return the calls a minute that a vault's plan allows each key; None where the plan says nothing."""
        rate: int | None = await self._database.fetch_value(_PLAN_RATE, vault_id)
        return rate

    async def outside_plan(
        self, vault_id: VaultId, api_ids: Sequence[int], endpoint_ids: Sequence[int]
    ) -> Sequence[int]:
        """Return the numbers of those APIs, and of those endpoints' APIs, that a vault's plan does not have."""
        rows = await self._database.fetch(_OUTSIDE, vault_id, list(api_ids), list(endpoint_ids))
        return [row["api_id"] for row in rows]

    async def usable_apis(self, api_ids: Sequence[int], user_id: UserId) -> frozenset[int]:
        """Return which of these numbers are APIs that a person may narrow a key to."""
        rows = await self._database.fetch(_APIS, list(api_ids), user_id)
        return frozenset(row["api_id"] for row in rows)

    async def usable_endpoints(self, endpoint_ids: Sequence[int], user_id: UserId) -> frozenset[int]:
        """Return which of these numbers are endpoints that a person may narrow a key to."""
        rows = await self._database.fetch(_ENDPOINTS, list(endpoint_ids), user_id)
        return frozenset(row["endpoint_id"] for row in rows)

    async def api_is_published(self, api_id: ApiId) -> bool:
        """Tell whether an API is offered to everybody."""
        return await self._database.fetch_value(_PUBLISHED, api_id) is not None

    async def tokens(self, api_key_id: ApiKeyId, *, before: str, limit: int) -> Sequence[Row]:
        """Return a key's access tokens, the newest first; those long expired are forgotten.

        Args:
            before: only those with a smaller id.
        """
        return await self._database.fetch(_TOKENS, api_key_id, before, limit)
