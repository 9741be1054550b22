"""Vaults that owe, and what is to be done about them."""

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from callora.ledger.ids import VaultId
from callora.store.bridge import Database

_DUE: Final = """
SELECT vault_id FROM vaults
WHERE owed > 0 AND vault_id > $1
    AND (available > 0 OR standing = 'arrears' AND standing_for_debt AND arrears_since <= $2)
ORDER BY vault_id LIMIT $3
"""


async def due(database: Database, after: VaultId, owing_since: datetime, limit: int) -> Sequence[VaultId]:
    """Return at most `limit` vaults with a greater id that can pay some of what they owe, or owe for too long."""
    return [VaultId(str(row["vault_id"])) for row in await database.fetch(_DUE, after, owing_since, limit)]
