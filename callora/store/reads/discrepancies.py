"""What operators see of discrepancies."""

from collections.abc import Sequence
from datetime import datetime
from typing import Final

import attrs

from callora.ledger.discrepancies import Discrepancy
from callora.store.bridge import Database as Database  # HTTP names what it passes on
from callora.store.bridge import Row

COLUMNS: Final = """
discrepancy_id, network, kind, subject, difference, said, found_at, seen_at, gone_at, cleared_at, cleared_by, reason
"""

_LIST: Final = f"""
SELECT {COLUMNS} FROM discrepancies
WHERE network = $1 AND ($2 OR (gone_at IS NULL AND cleared_at IS NULL))
    AND ($3::timestamptz IS NULL OR (found_at, discrepancy_id) < ($3, $4::uuid))
ORDER BY found_at DESC, discrepancy_id DESC LIMIT $5
"""  # noqa: S608 - columns of ours


@attrs.frozen
class Noted:
    """A discrepancy as it is kept."""

    discrepancy_id: str
    network: str
    found: Discrepancy
    found_at: datetime
    seen_at: datetime
    gone_at: datetime | None
    cleared_at: datetime | None
    cleared_by: str | None
    reason: str | None


async def list_discrepancies(
    database: Database, network: str, before: tuple[datetime, str] | None, limit: int, *, everything: bool
) -> Sequence[Noted]:
    """Return discrepancies, the latest first; only those before a moment and an id.

    Args:
        everything: those too that are gone or cleared.
    """
    at, discrepancy_id = before or (None, None)
    return [noted(row) for row in await database.fetch(_LIST, network, everything, at, discrepancy_id, limit)]


def noted(row: Row) -> Noted:
    """Return a row as it is kept."""
    return Noted(
        discrepancy_id=str(row["discrepancy_id"]),
        network=row["network"],
        found=Discrepancy(row["kind"], row["subject"], row["difference"], row["said"]),
        found_at=row["found_at"],
        seen_at=row["seen_at"],
        gone_at=row["gone_at"],
        cleared_at=row["cleared_at"],
        cleared_by=row["cleared_by"],
        reason=row["reason"],
    )
