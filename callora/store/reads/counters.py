"""Counters as operators see them: accounts, and what is in quarantine."""

from collections.abc import Sequence
from typing import Final

from callora.ledger.ids import ApiId, DeveloperId
from callora.store.bridge import Database as Database  # HTTP names what it passes on
from callora.store.bridge import Row

_DEVELOPER: Final = "SELECT developer_id FROM apis WHERE api_id = $1"

_SELECT: Final = """
SELECT account_id, vault_id, subject, name, active, unit_price, region_multiplier, line_multiplier, rule_version,
       included_granted, included_used, created_at, updated_at
FROM counter_accounts
"""
_FIND: Final = _SELECT + "WHERE account_id = $1"
_LIST: Final = (
    _SELECT
    + """
WHERE account_id < coalesce($1::uuid, 'ffffffff-ffff-ffff-ffff-ffffffffffff')
    AND ($2::uuid IS NULL OR vault_id = $2) AND ($3::uuid IS NULL OR subject = $3)
ORDER BY account_id DESC LIMIT $4
"""
)

_QUARANTINED: Final = """
SELECT subject, array_agg(DISTINCT source_id ORDER BY source_id) AS sources,
       array_agg(DISTINCT reason ORDER BY reason) AS reasons, count(*) AS samples, min(collected_at) AS first_at,
       max(collected_at) AS last_at
FROM quarantined_samples
WHERE subject > $1 AND ($2::uuid IS NULL OR subject = $2)
GROUP BY subject ORDER BY subject LIMIT $3
"""


async def developer_of_api(database: Database, api_id: ApiId) -> DeveloperId:
    """Return who earns by an API, whatever its state."""
    return DeveloperId(str(await database.fetch_value(_DEVELOPER, api_id)))


async def find_account(database: Database, account_id: str) -> Row | None:
    """Return an account, or None."""
    return await database.fetch_row(_FIND, account_id)


async def list_accounts(
    database: Database, *, before: str | None, vault_id: str | None, subject: str | None, limit: int
) -> Sequence[Row]:
    """Return at most `limit` accounts, the latest first.

    Args:
        before: the last one seen.
        vault_id, subject: only those of this vault or subject.
    """
    return await database.fetch(_LIST, before, vault_id, subject, limit)


async def list_quarantined(database: Database, *, after: str, subject: str | None, limit: int) -> Sequence[Row]:
    """Return at most `limit` subjects with a greater id than `after` that have samples in quarantine, by their ids."""
    return await database.fetch(_QUARANTINED, after, subject, limit)
