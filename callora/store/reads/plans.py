"""Plans as people see them, and what the next call of a month would be granted."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

from callora.ledger.ids import VaultId
from callora.ledger.quota import month_of
from callora.store.bridge import Database as Database
from callora.store.bridge import Row

_LIST: Final = """
SELECT p.plan_id, p.name, p.price, p.monthly_credits, p.overage, p.rate_limit_per_minute, p.features, p.active,
       CASE WHEN p.allowed_apis IS NOT NULL THEN ARRAY(
           SELECT a.slug FROM apis a WHERE a.api_id = ANY (p.allowed_apis) AND a.deleted_at IS NULL ORDER BY a.slug)
       END AS apis
FROM plans p
WHERE (p.active OR $1) AND (p.price, p.plan_id) > ($2::bigint, $3::text)
ORDER BY p.price, p.plan_id LIMIT $4
"""

_FIND: Final = """
SELECT p.plan_id, p.name, p.price, p.monthly_credits, p.overage, p.rate_limit_per_minute, p.features, p.active,
       CASE WHEN p.allowed_apis IS NOT NULL THEN ARRAY(
           SELECT a.slug FROM apis a WHERE a.api_id = ANY (p.allowed_apis) AND a.deleted_at IS NULL ORDER BY a.slug)
       END AS apis
FROM plans p WHERE p.plan_id = $1
"""

_APIS: Final = "SELECT slug, api_id FROM apis WHERE slug = ANY ($1::text[]) AND deleted_at IS NULL"

_OF_MONTH: Final = """
SELECT g.grant_id, g.plan_id, g.amount, g.lapsed, g.lapsed_at FROM quota_grants g
WHERE g.vault_id = $1 AND g.source = 'plan' AND g.ref LIKE $2
"""


async def list_plans(database: Database, *, inactive: bool, after: tuple[int, str] | None, limit: int) -> Sequence[Row]:
    """Return at most `limit` plans, the cheapest first.

    Args:
        inactive: whether those that no vault may be put on are shown as well.
        after: price and id of the last one seen.
    """
    return await database.fetch(_LIST, inactive, *(after or (-1, "")), limit)


async def find_plan(database: Database, plan_id: str) -> Row | None:
    """Return a plan, active or not."""
    return await database.fetch_row(_FIND, plan_id)


async def apis_of(database: Database, slugs: Sequence[str]) -> Mapping[str, int]:
    """Return the numbers of those slugs that name an API, whatever its state."""
    return {row["slug"]: row["api_id"] for row in await database.fetch(_APIS, list(slugs))}


async def grants_of_plans(database: Database, vault_id: VaultId, now: datetime) -> Sequence[Row]:
    """Return what plans granted a vault in the calendar month of `now`."""
    return await database.fetch(_OF_MONTH, vault_id, f"{month_of(now)[0]:%Y-%m}/%")
