"""Developers' profiles: one for a user, made at first sight."""

from collections.abc import Mapping
from datetime import datetime
from typing import Final

from callora.ledger.ids import DeveloperId, UserId
from callora.store.bridge import Database

FIELDS: Final = ("name", "website", "description", "category")

_ENSURE: Final = """
INSERT INTO developers (developer_id, user_id, created_at, updated_at) VALUES ($1, $2, $3, $3)
ON CONFLICT (user_id) DO NOTHING
"""

_FIND: Final = "SELECT developer_id FROM developers WHERE user_id = $1"

_CHANGE: Final = """
UPDATE developers SET
    name = CASE WHEN 'name' = ANY ($2::text[]) THEN $3 ELSE name END,
    website = CASE WHEN 'website' = ANY ($2::text[]) THEN $4 ELSE website END,
    description = CASE WHEN 'description' = ANY ($2::text[]) THEN $5 ELSE description END,
    category = CASE WHEN 'category' = ANY ($2::text[]) THEN $6 ELSE category END,
    updated_at = $7
WHERE user_id = $1
"""


async def ensure_profile(database: Database, developer_id: DeveloperId, user_id: UserId, now: datetime) -> DeveloperId:
    """Return the user's developer, made blank under `developer_id` where there is none; once, whoever else asks."""
    found = await database.fetch_value(_FIND, user_id)
    if found is None:
        await database.execute(_ENSURE, developer_id, user_id, now)
        found = await database.fetch_value(_FIND, user_id)
    return DeveloperId(str(found))


async def change_profile(database: Database, user_id: UserId, changes: Mapping[str, str | None], now: datetime) -> None:
    """Set the fields named, None clears; those not named stay."""
    values = (changes.get(name) for name in FIELDS)
    await database.execute(_CHANGE, user_id, list(changes), *values, now)
