"""Disputes as those who paid and operators see them."""

from collections.abc import Sequence
from typing import Final

from callora.ledger.ids import UserId
from callora.store.bridge import Database as Database
from callora.store.bridge import Row as Row
from callora.store.disputes import Dispute as Dispute
from callora.store.disputes import Status as Status
from callora.store.disputes import dispute_of

_SELECT: Final = """
SELECT d.dispute_id, d.vault_id, d.event_id, d.user_id, d.reason, d.status, d.created_at, d.moved_at, d.decided_at,
       d.decided_by, d.notes, d.refunded, v.network, u.api_id, u.endpoint_id, u.developer_id, u.amount,
       u.amount - coalesce((
           SELECT sum(e.amount) FROM ledger_entries e
           WHERE e.vault_id = d.vault_id AND e.event_id = d.event_id AND e.kind = 'refund'
       ), 0)::bigint AS refundable
FROM disputes d
JOIN vaults v ON v.vault_id = d.vault_id
JOIN usage_events u ON u.vault_id = d.vault_id AND u.event_id = d.event_id
"""

_FIND: Final = _SELECT + "WHERE d.dispute_id = $1"

_LIST: Final = (
    _SELECT
    + """
WHERE ($1::uuid IS NULL OR d.user_id = $1) AND ($2::text IS NULL OR d.status = $2) AND d.dispute_id < $3
ORDER BY d.dispute_id DESC LIMIT $4
"""
)

_COUNT: Final = """
SELECT count(*) FROM disputes WHERE ($1::uuid IS NULL OR user_id = $1) AND ($2::text IS NULL OR status = $2)
"""

_EVENTS: Final = """
SELECT type, at, resolution, decided_by, notes, amount FROM dispute_events WHERE dispute_id = $1 ORDER BY number
"""


async def find_dispute(database: Database, dispute_id: str) -> Dispute | None:
    """Return a dispute, whosever it is, or None."""
    row = await database.fetch_row(_FIND, dispute_id)
    return None if row is None else dispute_of(row)


async def show_dispute(database: Database, dispute_id: str) -> Row | None:
    """Return a dispute with what it is about, whosever it is, or None."""
    return await database.fetch_row(_FIND, dispute_id)


async def list_disputes(
    database: Database, user_id: UserId | None, status: Status | None, *, before: str, limit: int
) -> Sequence[Row]:
    """Return at most `limit` disputes with what they are about, the latest first.

    Args:
        user_id: None for everybody's.
        status: None for all.
        before: only those with a smaller id.
    """
    return await database.fetch(_LIST, user_id, status, before, limit)


async def count_disputes(database: Database, user_id: UserId | None, status: Status | None) -> int:
    """Return how many disputes there are of this user and in this status."""
    count: int = await database.fetch_value(_COUNT, user_id, status)
    return count


async def events_of(database: Database, dispute_id: str) -> Sequence[Row]:
    """Return what became of a dispute, in order."""
    return await database.fetch(_EVENTS, dispute_id)
