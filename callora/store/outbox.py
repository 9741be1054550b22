"""The outbox: what happened and others want to hear of, stored in the database transaction in which it happened."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

import attrs

from callora.ledger.ids import DeveloperId, UserId
from callora.store.bridge import Connection

_ADD: Final = """
INSERT INTO outbox (event_id, type, subject, user_id, payload, created_at)
SELECT e.event_id, e.type, e.subject, coalesce(e.user_id, d.user_id), e.payload, $6
FROM unnest($1::uuid[], $2::text[], $3::text[], $4::uuid[], $5::jsonb[], $7::uuid[]) WITH ORDINALITY
         AS e (event_id, type, subject, developer_id, payload, user_id, number)
LEFT JOIN developers d ON d.developer_id = e.developer_id
ORDER BY e.number
ON CONFLICT (type, subject) DO NOTHING
"""


@attrs.frozen
class Event:
    """Something that happened, once for its type and subject."""

    event_id: str
    """UUIDv7."""
    type: str
    """Such as settlement_completed."""
    subject: str
    """What it happened to, 1 to 200 characters."""
    developer_id: DeveloperId | None
    """The developer whom it concerns."""
    payload: Mapping[str, object]
    """As it is told, but for what every event has."""
    user_id: UserId | None = None
    """Whom it concerns who is no developer, or not as one. With neither: operators alone."""


def iso(moment: datetime) -> str:
    """Return a moment as it is told: UTC, milliseconds, `Z`."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


async def add_events(connection: Connection, events: Sequence[Event], now: datetime) -> None:
    """Store events with what made them happen; those that are stored already are left as they are.

    Args:
        events: in the order in which they happened, which is that in which they are told.
    """
    await connection.execute(
        _ADD,
        [each.event_id for each in events],
        [each.type for each in events],
        [each.subject for each in events],
        [each.developer_id for each in events],
        [json.dumps(dict(each.payload)) for each in events],
        now,
        [each.user_id for each in events],
    )
