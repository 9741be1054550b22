"""Subscriptions as their owners see them."""

from collections.abc import Sequence
from typing import Final

from callora.ledger.ids import UserId
from callora.ledger.subscriptions import Subscription
from callora.store.bridge import Database as Database
from callora.store.bridge import Row
from callora.store.subscriptions import subscription_of

_SELECT: Final = """
SELECT s.subscription_id, s.vault_id, s.plan_id, s.price, s.first_charge, s.replaces, s.next_plan_id, s.next_price,
       s.state, s.period_start, s.paid_until, s.created_at, s.cancelled_at, s.ended_at, v.network
FROM subscriptions s JOIN vaults v ON v.vault_id = s.vault_id
"""

_FIND: Final = _SELECT + "WHERE s.subscription_id = $1 AND v.user_id = $2"

_LIST: Final = _SELECT + "WHERE v.user_id = $1 AND s.subscription_id < $2 ORDER BY s.subscription_id DESC LIMIT $3"


async def find_subscription(database: Database, subscription_id: str, user_id: UserId) -> Subscription | None:
    """Return a subscription of one of a user's vaults, or None."""
    row = await database.fetch_row(_FIND, subscription_id, user_id)
    return None if row is None else subscription_of(row)


async def show_subscription(database: Database, subscription_id: str, user_id: UserId) -> Row | None:
    """Return a subscription of one of a user's vaults with its network, or None."""
    return await database.fetch_row(_FIND, subscription_id, user_id)


async def list_subscriptions(database: Database, user_id: UserId, *, before: str, limit: int) -> Sequence[Row]:
    """Return at most `limit` subscriptions of a user's vaults, the latest first, each with its vault's network.

    Args:
        before: only those with a smaller id.
    """
    return await database.fetch(_LIST, user_id, before, limit)
