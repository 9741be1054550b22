"""Requests for more credits as their owners and operators see them."""

from collections.abc import Sequence
from typing import Final

from callora.ledger.ids import UserId
from callora.store.bridge import Database as Database
from callora.store.bridge import Row
from callora.store.quota_requests import QuotaRequest, request_of

_SELECT: Final = """
SELECT r.request_id, r.vault_id, r.user_id, r.credits, r.reason, r.state, r.created_at, r.decided_at, r.decided_by,
       r.answer, r.grant_id, r.granted, r.expires_at, r.granted_at, v.network
FROM quota_requests r JOIN vaults v ON v.vault_id = r.vault_id
"""

_FIND: Final = _SELECT + "WHERE r.request_id = $1"

_OF_USER: Final = _SELECT + "WHERE r.user_id = $1 AND r.request_id < $2 ORDER BY r.request_id DESC LIMIT $3"

_OF_ALL: Final = (
    _SELECT
    + """
WHERE ($1::text IS NULL OR r.state = $1) AND r.request_id < $2 ORDER BY r.request_id DESC LIMIT $3
"""
)


async def find_request(database: Database, request_id: str) -> QuotaRequest | None:
    """Return a request, whosever it is, or None."""
    row = await database.fetch_row(_FIND, request_id)
    return None if row is None else request_of(row)


async def show_request(database: Database, request_id: str) -> Row | None:
    """Return a request with its vault's network, or None."""
    return await database.fetch_row(_FIND, request_id)


async def list_of_user(database: Database, user_id: UserId, *, before: str, limit: int) -> Sequence[Row]:
    """Return at most `limit` of a user's requests, the latest first, each with its vault's network.

    Args:
        before: only those with a smaller id.
    """
    return await database.fetch(_OF_USER, user_id, before, limit)


async def list_of_all(database: Database, state: str | None, *, before: str, limit: int) -> Sequence[Row]:
    """Return at most `limit` of everybody's requests, the latest first.

    Args:
        state: open, approved or rejected; None for all.
        before: only those with a smaller id.
    """
    return await database.fetch(_OF_ALL, state, before, limit)
