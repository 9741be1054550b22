"""Alerts of low balances as their owners see them."""

from typing import Final

from callora.ledger.ids import VaultId
from callora.store.bridge import Database as Database  # HTTP names what it passes on
from callora.store.bridge import Row

_ALERT: Final = "SELECT threshold, low_since FROM balance_alerts WHERE vault_id = $1 AND removed_at IS NULL"


async def find_alert(database: Database, vault_id: VaultId) -> Row | None:
    """Return a vault's threshold, and since when its balance was found below."""
    return await database.fetch_row(_ALERT, vault_id)
