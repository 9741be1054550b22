"""Spending limits as they are stored. Whatever changes one makes rounds that were decided without it lose."""

from datetime import datetime
from typing import Final

from callora.ledger.ids import ApiKeyId, UserId, VaultId
from callora.ledger.money import Stroops
from callora.ledger.spending import Period
from callora.store.bridge import Database

_SET: Final = """
INSERT INTO spending_limits (vault_id, api_key_id, period, amount, set_by, set_at) VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (vault_id, api_key_id, period) DO UPDATE SET amount = excluded.amount, set_by = excluded.set_by,
    set_at = excluded.set_at
"""

_REMOVE: Final = """
DELETE FROM spending_limits WHERE vault_id = $1 AND api_key_id IS NOT DISTINCT FROM $2 AND period = $3
"""


async def set_limit(
    database: Database,
    vault_id: VaultId,
    api_key_id: ApiKeyId | None,
    period: Period,
    amount: Stroops,
    set_by: UserId,
    now: datetime,
) -> None:
    """Set a limit, or replace it; holds obey from the moment this returns, in every process.

    Args:
        api_key_id: a key of this vault; None for the vault itself.
        amount: stroops, > 0.

    Raises:
        StoreUnavailable: nothing was changed. OutcomeUnknown: setting it again is safe.
    """
    await database.execute(_SET, vault_id, api_key_id, period, amount, set_by, now)


async def remove_limit(database: Database, vault_id: VaultId, api_key_id: ApiKeyId | None, period: Period) -> None:
    """Remove a limit; one that was never set is removed as well. Raises as `set_limit`."""
    await database.execute(_REMOVE, vault_id, api_key_id, period)
