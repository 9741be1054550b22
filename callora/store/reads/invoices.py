"""Invoices as their owners see them."""

from collections.abc import Sequence
from typing import Final

from callora.ledger.ids import UserId
from callora.store.bridge import Database as Database  # HTTP names what it passes on
from callora.store.bridge import Row

_SELECT: Final = """
SELECT i.invoice_id, i.vault_id, v.network, i.month, i.calls, i.usage, i.refunded, i.subscriptions, i.total, i.issued_at
FROM vaults v JOIN invoices i ON i.vault_id = v.vault_id
WHERE v.user_id = $1
"""
_PAGE: Final = _SELECT + "AND i.invoice_id < $2 ORDER BY i.invoice_id DESC LIMIT $3"
_ONE: Final = _SELECT + "AND i.invoice_id = $2"


async def invoices_of(database: Database, user_id: UserId, before: str, limit: int) -> Sequence[Row]:
    """Return at most `limit` invoices of a user's vaults, the latest first.

    Args:
        before: only those with a lesser id.
    """
    return await database.fetch(_PAGE, user_id, before, limit)


async def find_invoice(database: Database, user_id: UserId, invoice_id: str) -> Row | None:
    """Return a user's invoice."""
    return await database.fetch_row(_ONE, user_id, invoice_id)
