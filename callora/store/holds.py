"""External holds: what a service calls a hold, bound to the usage event that is the hold before that exists.

Nothing here says what became of a hold; its event does. A statement that finds a hold other than it was thought to be
changes nothing, and whoever sent it looks again.
"""

from datetime import datetime, timedelta
from typing import Final

import attrs

from callora.ledger.faults import StoreRefused
from callora.ledger.ids import ApiId, ApiKeyId, EndpointId, EventId, HoldId, VaultId
from callora.ledger.money import Stroops
from callora.store.bridge import Database

_MOVED_ON: Final = frozenset(("holds_move_forwards", "external_holds_transaction"))
"""What refuses a statement whose hold, or whose transaction, became something else while it ran."""
_NEVER: Final = EventId("00000000-0000-0000-0000-000000000000")
"""Whose claim on an event's name keeps it from being placed."""

_BIND: Final = """
INSERT INTO external_holds (vault_id, request_id, hold_id, api_key_id, api_id, endpoint_id, amount, ttl_seconds,
                            fingerprint, event_id, event_amount, created_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $3, $7, $10)
ON CONFLICT (vault_id, request_id) DO NOTHING
"""

_REMEMBER: Final = """
INSERT INTO external_holds (vault_id, request_id, hold_id, api_key_id, event_id, released_at, created_at)
VALUES ($1, $2, $3, $4, $3, $5, $5)
ON CONFLICT (vault_id, request_id) DO NOTHING
"""

_BAR: Final = """
UPDATE external_holds h SET released_at = $3
WHERE vault_id = $1 AND request_id = $2 AND released_at IS NULL
      AND NOT EXISTS (SELECT FROM usage_events u
                      WHERE u.vault_id = h.vault_id AND u.event_id = h.event_id AND u.state = 'captured')
"""

_CLAIM_FOR_NOBODY: Final = """
INSERT INTO idempotency_keys (vault_id, key, fingerprint, event_id, state, created_at, expires_at)
VALUES ($1, $2, $3, $4, 'started', $5, $6)
ON CONFLICT (vault_id, key) DO NOTHING
"""

_CLAIMED_BY: Final = "SELECT event_id FROM idempotency_keys WHERE vault_id = $1 AND key = $2"

_BIND_TRANSACTION: Final = """
UPDATE external_holds h SET transaction_id = $4, asked_amount = $5
WHERE vault_id = $1 AND request_id = $2 AND event_id = $3 AND transaction_id IS NULL AND released_at IS NULL
      AND EXISTS (SELECT FROM usage_events u
                  WHERE u.vault_id = h.vault_id AND u.event_id = h.event_id AND u.state = 'held')
"""

_UNBIND_TRANSACTION: Final = """
UPDATE external_holds SET transaction_id = NULL, asked_amount = NULL
WHERE vault_id = $1 AND request_id = $2 AND event_id = $3 AND transaction_id = $4
"""

_BIND_ANEW: Final = """
UPDATE external_holds SET event_id = $4, event_amount = $5, transaction_id = NULL, asked_amount = NULL
WHERE vault_id = $1 AND request_id = $2 AND event_id = $3 AND released_at IS NULL
"""


@attrs.frozen
class Placing:
    """What was asked for when a hold was placed."""

    api_id: ApiId
    endpoint_id: EndpointId
    amount: Stroops
    """stroops, > 0."""
    ttl_seconds: int
    """1 to 86 400."""
    fingerprint: bytes
    """SHA-256 of what was asked."""


@attrs.frozen
class ExternalHold:
    """A hold by the name that a service gave it."""

    vault_id: VaultId
    """Who pays."""
    request_id: str
    """1 to 255 characters, the service's."""
    hold_id: HoldId
    api_key_id: ApiKeyId
    placing: Placing | None
    """None where only a release was ever asked for under this name."""
    event_id: EventId
    """The usage event that is the hold."""
    event_amount: Stroops
    """What it is placed with; 0 where nothing is to be placed."""
    transaction_id: str | None
    """What it is captured for, or is about to be."""
    asked_amount: Stroops | None
    """How much was asked when it was captured; more than was charged where the rest was refused."""
    released_at: datetime | None
    """Nothing is placed under this name from then on."""
    created_at: datetime

    @property
    def rebound(self) -> bool:
        """Whether its first event expired and another took its place."""
        return str(self.event_id) != str(self.hold_id)


def claim_key(event_id: EventId) -> str:
    """Return the name under which an event is placed by whoever claims it first, and by nobody else.

    No Idempotency-Key of the gateway holds a blank.
    """
    return f"event {event_id}"


async def bind_hold(
    database: Database,
    vault_id: VaultId,
    request_id: str,
    hold_id: HoldId,
    api_key_id: ApiKeyId,
    placing: Placing,
    now: datetime,
) -> None:
    """Bind a name to a hold that is not placed yet; a name that is bound already is left as it is.

    Raises:
        StoreUnavailable: nothing was written. OutcomeUnknown: it may be bound.
    """
    await database.execute(
        _BIND,
        vault_id,
        request_id,
        hold_id,
        api_key_id,
        placing.api_id,
        placing.endpoint_id,
        placing.amount,
        placing.ttl_seconds,
        placing.fingerprint,
        now,
    )


async def remember_release(
    database: Database, vault_id: VaultId, request_id: str, hold_id: HoldId, api_key_id: ApiKeyId, now: datetime
) -> None:
    """Remember the release of a name that is not known; one that is bound meanwhile is left as it is."""
    await database.execute(_REMEMBER, vault_id, request_id, hold_id, api_key_id, now)


async def bar_hold(database: Database, hold: ExternalHold, now: datetime) -> None:
    """Let nothing be placed or captured under this name from now on, unless it is captured already."""
    await _unless_moved_on(database, _BAR, hold.vault_id, hold.request_id, now)


async def bar_event(
    database: Database, hold: ExternalHold, fingerprint: bytes, now: datetime, retention: timedelta
) -> bool:
    """Make sure that the hold's event, which is not there, is never placed; return whether that is sure.

    Its name is claimed for nobody. A round that would place it finds the name claimed; one that has placed it meanwhile
    has claimed the name with it, and then the event is there.

    Args:
        retention: longer than any round that was given up on may still be stored.
    """
    key = claim_key(hold.event_id)
    await database.execute(_CLAIM_FOR_NOBODY, hold.vault_id, key, fingerprint, _NEVER, now, now + retention)
    return str(await database.fetch_value(_CLAIMED_BY, hold.vault_id, key)) == _NEVER


async def bind_transaction(database: Database, hold: ExternalHold, transaction_id: str, asked: Stroops) -> None:
    """Bind a hold that is open to what it is captured for, unless another hold of the vault has it."""
    await _unless_moved_on(
        database, _BIND_TRANSACTION, hold.vault_id, hold.request_id, hold.event_id, transaction_id, asked
    )


async def unbind_transaction(database: Database, hold: ExternalHold) -> None:
    """Take its transaction from a hold that has ended uncharged."""
    await _unless_moved_on(
        database, _UNBIND_TRANSACTION, hold.vault_id, hold.request_id, hold.event_id, hold.transaction_id
    )


async def bind_anew(database: Database, hold: ExternalHold, event_id: EventId, amount: Stroops) -> None:
    """Bind a hold that expired to another event, unless it is released.

    Args:
        amount: what the event is to hold.
    """
    await _unless_moved_on(database, _BIND_ANEW, hold.vault_id, hold.request_id, hold.event_id, event_id, amount)


async def _unless_moved_on(database: Database, sql: str, *arguments: object) -> None:
    try:
        await database.execute(sql, *arguments)
    except StoreRefused as refused:
        if refused.constraint not in _MOVED_ON:
            raise
