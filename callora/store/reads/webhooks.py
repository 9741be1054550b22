"""Webhooks as their owners see them."""

from collections.abc import Sequence
from typing import Final

from callora.ledger.ids import UserId
from callora.store.bridge import Database as Database
from callora.store.bridge import Row

_COLUMNS: Final = """
endpoint_id, url, description, events, generation, previous_until, retries_max, base_delay_ms, disabled_at,
disabled_why, failing_since, created_at, updated_at
"""

_ENDPOINT: Final = f"""
SELECT {_COLUMNS} FROM webhook_endpoints WHERE endpoint_id = $1 AND user_id = $2 AND deleted_at IS NULL
"""  # noqa: S608 - columns of ours

_ENDPOINTS: Final = f"""
SELECT {_COLUMNS} FROM webhook_endpoints WHERE user_id = $1 AND deleted_at IS NULL ORDER BY endpoint_id
"""  # noqa: S608 - columns of ours

_DELIVERY: Final = """
d.delivery_id, d.endpoint_id, d.event_id, d.position, d.state, d.attempts, d.due_at, d.last_at, d.last_status,
d.last_error, d.last_ms, d.created_at, d.closed_at, o.type
"""

_DELIVERIES: Final = f"""
SELECT {_DELIVERY} FROM webhook_deliveries d JOIN outbox o ON o.event_id = d.event_id
WHERE d.endpoint_id = $1 AND d.position < $2 AND ($3::text IS NULL OR d.state = $3)
ORDER BY d.position DESC LIMIT $4
"""  # noqa: S608 - columns of ours

# Of each endpoint the latest, and of these the latest: an endpoint may have any number.
_DEAD: Final = f"""
SELECT {_DELIVERY} FROM webhook_endpoints w CROSS JOIN LATERAL (
    SELECT * FROM webhook_deliveries l
    WHERE l.endpoint_id = w.endpoint_id AND l.state = 'dead' AND l.position < $2 ORDER BY l.position DESC LIMIT $3) AS d
JOIN outbox o ON o.event_id = d.event_id
WHERE w.user_id = $1 AND w.deleted_at IS NULL ORDER BY d.position DESC LIMIT $3
"""  # noqa: S608 - columns of ours

_ONE: Final = f"""
SELECT {_DELIVERY} FROM webhook_deliveries d JOIN outbox o ON o.event_id = d.event_id
JOIN webhook_endpoints w ON w.endpoint_id = d.endpoint_id
WHERE d.delivery_id = $1 AND w.user_id = $2 AND w.deleted_at IS NULL
"""  # noqa: S608 - columns of ours

_DEVELOPER: Final = "SELECT developer_id FROM developers WHERE user_id = $1"


async def endpoint(database: Database, endpoint_id: str, user_id: UserId) -> Row | None:
    """Return a user's endpoint, or None."""
    return await database.fetch_row(_ENDPOINT, endpoint_id, user_id)


async def endpoints(database: Database, user_id: UserId) -> Sequence[Row]:
    """Return a user's endpoints, the oldest first."""
    return await database.fetch(_ENDPOINTS, user_id)


async def deliveries(
    database: Database, endpoint_id: str, state: str | None, *, before: int, limit: int
) -> Sequence[Row]:
    """Return at most `limit` deliveries to an endpoint below a position, the latest first."""
    return await database.fetch(_DELIVERIES, endpoint_id, before, state, limit)


async def dead_letters(database: Database, user_id: UserId, *, before: int, limit: int) -> Sequence[Row]:
    """Return at most `limit` deliveries to any of a user's endpoints that were given up, the latest first."""
    return await database.fetch(_DEAD, user_id, before, limit)


async def delivery(database: Database, delivery_id: str, user_id: UserId) -> Row | None:
    """Return a delivery to one of a user's endpoints, or None."""
    return await database.fetch_row(_ONE, delivery_id, user_id)


async def developer_of(database: Database, user_id: UserId) -> str | None:
    """Return the user's developer, None where there is none."""
    found = await database.fetch_value(_DEVELOPER, user_id)
    return None if found is None else str(found)
