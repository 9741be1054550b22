"""Access tokens: make, revoke, take from their budgets, forget."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

import attrs

from callora.ledger.ids import ApiId, ApiKeyId, TokenId, UserId
from callora.ledger.money import Stroops
from callora.ledger.tokens import BudgetGone, BudgetOutcome, grant
from callora.store.bridge import Database

_ADD: Final = """
INSERT INTO access_tokens (token_id, api_key_id, scopes, allowed_apis, budget, created_at, expires_at)
SELECT $1, api_key_id, $4, $5, $6, $7, least($8, expires_at) FROM api_keys
WHERE api_key_id = $2 AND user_id = $3 AND revoked_at IS NULL AND NOT disabled
      AND (expires_at IS NULL OR expires_at > $7)
RETURNING expires_at
"""

_REVOKE: Final = """
UPDATE access_tokens t SET revoked_at = coalesce(t.revoked_at, $4)
FROM api_keys k WHERE t.token_id = $1 AND t.api_key_id = $2 AND k.api_key_id = t.api_key_id AND k.user_id = $3
RETURNING t.token_id
"""

_LOCK: Final = """
SELECT token_id, budget, spent FROM access_tokens WHERE token_id = ANY ($1::uuid[]) AND budget IS NOT NULL
ORDER BY token_id FOR UPDATE
"""

_SPEND: Final = """
UPDATE access_tokens t SET spent = w.spent
FROM unnest($1::uuid[], $2::bigint[]) AS w (token_id, spent) WHERE t.token_id = w.token_id
"""

_DROP: Final = """
DELETE FROM access_tokens WHERE token_id IN (
    SELECT token_id FROM access_tokens WHERE expires_at <= $1 ORDER BY expires_at LIMIT $2
)
"""


@attrs.frozen
class NewToken:
    """A token to be stored."""

    token_id: TokenId
    api_key_id: ApiKeyId
    scopes: Sequence[str]
    allowed_apis: Sequence[ApiId] | None
    budget: Stroops | None
    created_at: datetime
    expires_at: datetime


async def add_token(database: Database, user_id: UserId, token: NewToken) -> datetime | None:
    """Store a token under a living key of this user; return when it expires, which is no later than its key.

    None: there is no such key of his, or it is revoked, disabled or expired; nothing was stored.
    """
    expires_at: datetime | None = await database.fetch_value(
        _ADD,
        token.token_id,
        token.api_key_id,
        user_id,
        list(token.scopes),
        None if token.allowed_apis is None else list(token.allowed_apis),
        token.budget,
        token.created_at,
        token.expires_at,
    )
    return expires_at


async def revoke_token(
    database: Database, token_id: TokenId, api_key_id: ApiKeyId, user_id: UserId, now: datetime
) -> bool:
    """Revoke a token under a key of this user; False when there is none. Repeated, it keeps its first date."""
    return await database.fetch_value(_REVOKE, token_id, api_key_id, user_id, now) is not None


async def settle_budgets(
    database: Database, asked: Mapping[TokenId, Sequence[Stroops]], returned: Mapping[TokenId, Stroops]
) -> dict[TokenId, Sequence[BudgetOutcome]]:
    """Give back to budgets, then take from them; return the outcome of everything asked, in its order.

    The rows are locked in the order of their ids, so processes that settle at the same time wait and never deadlock.

    Raises:
        StoreUnavailable, StoreConflict: nothing was written.
        OutcomeUnknown: all of it was written, or nothing.
    """
    outcomes: dict[TokenId, Sequence[BudgetOutcome]] = {
        token_id: [BudgetGone()] * len(amounts) for token_id, amounts in asked.items()
    }
    spent_after: dict[TokenId, Stroops] = {}
    async with database.transaction() as connection:
        for row in await connection.fetch(_LOCK, sorted({*asked, *returned})):
            token_id = TokenId(str(row["token_id"]))
            spent = max(0, row["spent"] - returned.get(token_id, 0))
            spent_after[token_id], outcomes[token_id] = grant(row["budget"], Stroops(spent), asked.get(token_id, ()))
        if spent_after:
            await connection.execute(_SPEND, list(spent_after), list(spent_after.values()))
    return outcomes


async def drop_expired_tokens(database: Database, before: datetime, limit: int) -> int:
    """Delete at most `limit` tokens that expired by `before`; return how many. No key changes by it."""
    return int((await database.execute(_DROP, before, limit)).rpartition(" ")[2])
