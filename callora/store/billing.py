"""Charges asked for over REST, each bound to its usage event before that event exists."""

from datetime import datetime
from typing import Final

import attrs

from callora.ledger.ids import ApiId, ApiKeyId, EndpointId, EventId, UserId, VaultId
from callora.ledger.money import Stroops
from callora.store.bridge import Database

_BIND: Final = """
INSERT INTO billing_requests (user_id, request_id, vault_id, event_id, api_key_id, api_id, endpoint_id, amount,
                              fingerprint, created_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
ON CONFLICT (user_id, request_id) DO NOTHING
"""

_BIND_ANEW: Final = """
UPDATE billing_requests SET event_id = $4 WHERE user_id = $1 AND request_id = $2 AND event_id = $3
"""


@attrs.frozen
class BillingRequest:
    """A charge that a user asked for under a name of his own."""

    user_id: UserId
    request_id: str
    """1 to 255 characters."""
    vault_id: VaultId
    """Who pays."""
    event_id: EventId
    """The usage event that carries it out."""
    api_key_id: ApiKeyId | None
    api_id: ApiId
    endpoint_id: EndpointId
    amount: Stroops
    fingerprint: bytes
    """SHA-256 of what was asked."""
    created_at: datetime


async def bind_request(database: Database, request: BillingRequest) -> None:
    """Bind a request to its usage event; one that is bound already is left as it is.

    Raises:
        StoreUnavailable: nothing was written. OutcomeUnknown: it may be bound.
    """
    await database.execute(
        _BIND,
        request.user_id,
        request.request_id,
        request.vault_id,
        request.event_id,
        request.api_key_id,
        request.api_id,
        request.endpoint_id,
        request.amount,
        request.fingerprint,
        request.created_at,
    )


async def bind_anew(database: Database, user_id: UserId, request_id: str, ended: EventId, event_id: EventId) -> None:
    """Bind a request to another usage event, if it is still bound to this one, which ended uncharged."""
    await database.execute(_BIND_ANEW, user_id, request_id, ended, event_id)
