"""Notices of usage: what a feed has and its owner's webhook endpoints want, put into the outbox in the feed's order.

How far that is stands in the feed's own row, and moves in the transaction that stores the notice: an event is in one
notice, whatever fails between.
"""

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Final

from callora.ledger.ids import UserId
from callora.store.bridge import Connection, Database, Row
from callora.store.outbox import Event, add_events
from callora.store.reads.feed import read_events

EVENT: Final = "usage_event_created"
NOTICE_EVENTS: Final = 100
"""Calls in one notice, at most."""
USERS_AT_ONCE: Final = 20
CURRENT: Final = timedelta(seconds=60)
"""A feed that was looked at within this time is at its end."""

_WANTING: Final = """
SELECT DISTINCT user_id FROM webhook_endpoints
WHERE deleted_at IS NULL AND disabled_at IS NULL AND 'usage_event_created' = ANY (events)
"""

# Who wants nothing any more is told nothing of this time, should he want it again.
_FORGET_OTHERS: Final = "UPDATE usage_feeds SET told = NULL WHERE told IS NOT NULL AND user_id <> ALL ($1::uuid[])"

_BEGIN: Final = """
UPDATE usage_feeds SET told = position WHERE told IS NULL AND user_id = ANY ($1::uuid[]) AND as_of >= $2
"""

_UNTOLD: Final = """
SELECT user_id, told FROM usage_feeds WHERE told < position AND user_id = ANY ($1::uuid[]) ORDER BY user_id LIMIT $2
FOR UPDATE SKIP LOCKED
"""

_TOLD: Final = """
UPDATE usage_feeds f SET told = w.position FROM unnest($1::uuid[], $2::bigint[]) AS w (user_id, position)
WHERE f.user_id = w.user_id
"""


async def wanting(database: Database) -> Sequence[UserId]:
    """Return the users who have an endpoint that wants their usage."""
    return [UserId(str(row["user_id"])) for row in await database.fetch(_WANTING)]


async def begin(database: Database, users: Sequence[UserId], now: datetime) -> None:
    """Let notices begin where feeds are now, for those of the users who had none; for all others they end.

    Raises:
        StoreUnavailable: nothing was changed. OutcomeUnknown: doing it again is safe.
    """
    await database.execute(_FORGET_OTHERS, list(users))
    if users:
        await database.execute(_BEGIN, list(users), now - CURRENT)


async def tell(
    connection: Connection,
    users: Sequence[UserId],
    now: datetime,
    new_id: Callable[[], str],
    shown: Callable[[Row], dict[str, object]],
) -> int:
    """Put what some users were not told of yet into the outbox, a notice each; call it in a transaction.

    Args:
        shown: makes of an event what is told of it.

    Returns:
        How many events; with none there is nothing left, or another process is at it.
    """
    rows = await connection.fetch(_UNTOLD, list(users), USERS_AT_ONCE)
    if not rows:
        return 0
    positions = {UserId(str(row["user_id"])): int(row["told"]) for row in rows}
    found: dict[UserId, list[Row]] = {user_id: [] for user_id in positions}
    for row in await read_events(connection, positions, NOTICE_EVENTS):
        found[UserId(str(row["user_id"]))].append(row)
    reached = {user_id: events[-1]["position"] for user_id, events in found.items() if events}
    notices = [
        Event(
            event_id=new_id(),
            type=EVENT,
            subject=f"{user_id}:{events[0]['position']}-{events[-1]['position']}",
            developer_id=None,
            payload={"events": [shown(row) for row in events]},
            user_id=user_id,
        )
        for user_id, events in found.items()
        if events
    ]
    await add_events(connection, notices, now)
    await connection.execute(_TOLD, list(reached), list(reached.values()))
    return sum(map(len, found.values()))
