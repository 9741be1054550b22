"""What a feed says: its events in their order, and where one goes on from."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final
from uuid import UUID

import attrs

from callora.ledger.ids import EventId, UserId
from callora.store.bridge import Connection, Row
from callora.store.bridge import Database as Database  # HTTP names what it passes on
from callora.store.reads.usage import reading
from callora.store.rollup import SUCCEEDED

START: Final = "0"
"""The place before the first event of a feed, as far as nothing is missing in it."""

_FEEDS: Final = "SELECT user_id, position, since, as_of FROM usage_feeds WHERE user_id = ANY ($1::uuid[])"

_PLACE: Final = """
SELECT f.position FROM usage_feed f JOIN usage_feeds s ON s.user_id = f.user_id
WHERE f.user_id = $1 AND f.event_id = $2 AND f.position > s.since
"""

_START: Final = """
SELECT s.since FROM usage_feeds s WHERE s.user_id = $1
    AND (s.position = s.since
         OR EXISTS (SELECT FROM usage_feed f WHERE f.user_id = s.user_id AND f.position = s.since + 1))
"""

_AT: Final = """
SELECT f.event_id FROM usage_feed f JOIN usage_feeds s ON s.user_id = f.user_id
WHERE f.user_id = $1 AND f.position <= $2 AND f.position > s.since ORDER BY f.position DESC LIMIT 1
"""

_EVENTS: Final = f"""
SELECT f.user_id, f.position, u.vault_id, u.event_id, u.api_key_id, u.api_id, u.endpoint_id, u.created_at, u.closed_at,
       u.state::text AS state, u.amount, u.request_bytes, u.response_bytes, u.latency_us, u.status, u.outcome,
       {SUCCEEDED} AS succeeded, e.method, e.path,
       (SELECT coalesce(sum(r.amount), 0)::bigint FROM ledger_entries r
        WHERE r.vault_id = u.vault_id AND r.event_id = u.event_id AND r.kind = 'refund') AS refunded
FROM unnest($1::uuid[], $2::bigint[]) AS w (user_id, position)
CROSS JOIN LATERAL (
    SELECT user_id, position, vault_id, event_id FROM usage_feed
    WHERE user_id = w.user_id AND position > w.position ORDER BY position LIMIT $3
) AS f
JOIN usage_events u ON u.vault_id = f.vault_id AND u.event_id = f.event_id
LEFT JOIN api_endpoints e ON e.endpoint_id = u.endpoint_id
ORDER BY f.user_id, f.position
"""  # noqa: S608 - names of ours

_SESSIONS: Final = """
SELECT session_id FROM sessions WHERE session_id = ANY ($1::uuid[]) AND revoked_at IS NULL AND expires_at > $2
"""


@attrs.frozen
class FeedState:
    """How far a feed is."""

    position: int
    """The last that was given."""
    since: int
    """Nothing is missing between the events after it."""
    as_of: datetime
    """What had ended by then is in it, as a rule."""


async def feeds(database: Database, user_ids: Sequence[UserId]) -> dict[UserId, FeedState]:
    """Return how far the feeds are; who has none is not in it."""
    rows = await database.fetch(_FEEDS, list(user_ids))
    return {UserId(str(row["user_id"])): FeedState(row["position"], row["since"], row["as_of"]) for row in rows}


async def place_of(database: Database, user_id: UserId, last: str) -> int | None:
    """Return the position that a client goes on from, None where the feed does not go back so far, or never had it.

    Args:
        last: what the client was told last, in its own words: an event's id, or START.
    """
    position: int | None
    if last == START:
        position = await database.fetch_value(_START, user_id)
        return position
    try:
        event_id = str(UUID(last))
    except ValueError:
        return None
    position = await database.fetch_value(_PLACE, user_id, event_id)
    return position


async def event_at(database: Database, user_id: UserId, position: int) -> EventId | None:
    """Return the latest event up to a position; None before the first, as far as nothing is missing."""
    found = await database.fetch_value(_AT, user_id, position)
    return None if found is None else EventId(str(found))


async def events_after(database: Database, positions: Mapping[UserId, int], limit: int) -> Sequence[Row]:
    """Return at most `limit` events of each user after his position, in order, with what usage shows of a call."""
    async with reading(database) as connection:
        return await read_events(connection, positions, limit)


async def read_events(connection: Connection, positions: Mapping[UserId, int], limit: int) -> Sequence[Row]:
    """As `events_after`, in a transaction."""
    return await connection.fetch(_EVENTS, list(positions), list(positions.values()), limit)


async def living_sessions(database: Database, session_ids: Sequence[str], now: datetime) -> set[str]:
    """Return which of these sessions are neither ended nor expired; all of them are UUIDs."""
    return {str(row["session_id"]) for row in await database.fetch(_SESSIONS, list(session_ids), now)}
