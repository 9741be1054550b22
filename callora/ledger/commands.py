"""Commands to a vault, as plain values. How they travel is the actors' business.

PlaceHold, CaptureHold and ReleaseHold come once or more a call and are stored in group-committed rounds; the others are
rare and are stored one by one, with the vault locked.
"""

from typing import Literal

import attrs

from callora.ledger.ids import ApiId, ApiKeyId, DeveloperId, EndpointId, EventId
from callora.ledger.money import Stroops
from callora.ledger.values import value


@value
class Charged:
    """What a usage event is charged for: fixed when the hold is placed."""

    api_key_id: ApiKeyId
    developer_id: DeveloperId
    api_id: ApiId
    endpoint_id: EndpointId
    price_version: int


@attrs.frozen(slots=True)
class IdempotencyClaim:
    """The client's name for the intent behind a hold, claimed in the hold's own round."""

    key: str
    """1 to 255 characters."""
    fingerprint: bytes
    """SHA-256 of what makes the request this request."""
    replaces: EventId | None
    """An earlier attempt under this key, seen closed without an answer, whose claim may be taken over."""
    retention_seconds: int


@attrs.frozen(slots=True)
class StoredAnswer:
    """The answer to an idempotent call, stored in the round that closes its hold."""

    key: str
    status: int
    head: bytes | None
    """The upstream's end-to-end header lines; None when the answer is not replayable."""
    body: bytes | None
    charge: Stroops


@value
class PlaceHold:
    """Set money aside for one call."""

    event_id: EventId
    """Made by the caller before anything is sent, so that the outcome can be looked up."""
    amount: Stroops
    """stroops, >= 0; 0 for a free call, which makes a usage event and sets nothing aside."""
    ttl_seconds: int
    """1 to 86 400; an unclosed hold is released after it."""
    charged: Charged
    claim: IdempotencyClaim | None = None


@value
class Delivery:
    """What happened to the call, recorded on its usage event."""

    outcome: str
    """One word of the who-pays table: delivered, upstream_status, client_gone …"""
    status: int | None = None
    """The upstream's status code."""
    latency_us: int | None = None
    request_bytes: int | None = None
    response_bytes: int | None = None


@value
class CloseHold:
    """End a hold: capture all or part of it, release it, or let it expire. Repeating a close changes nothing."""

    event_id: EventId
    state: Literal["captured", "released", "expired"]
    held_amount: Stroops
    amount: Stroops
    """stroops captured, 0 <= amount <= held_amount; 0 unless captured."""
    delivery: Delivery
    answer: StoredAnswer | None = None


def capture(
    event_id: EventId, held_amount: Stroops, amount: Stroops, delivery: Delivery, answer: StoredAnswer | None = None
) -> CloseHold:
    """Return the command CaptureHold: spend `amount` of the hold and give the rest back."""
    return CloseHold(event_id, "captured", held_amount, amount, delivery, answer)


def release(
    event_id: EventId, held_amount: Stroops, delivery: Delivery, answer: StoredAnswer | None = None
) -> CloseHold:
    """Return the command ReleaseHold: give the whole hold back."""
    return CloseHold(event_id, "released", held_amount, Stroops(0), delivery, answer)


def expire(event_id: EventId, held_amount: Stroops) -> CloseHold:
    """Return the close of a hold that outlived its time-out: given back whole."""
    return CloseHold(event_id, "expired", held_amount, Stroops(0), Delivery("expired"))


@attrs.frozen(slots=True)
class ExtendHold:
    """Give an open hold more time and, optionally, more money."""

    event_id: EventId
    extra_seconds: int
    """Added to the expiry, which stays within a day of the hold's creation."""
    extra_amount: Stroops = Stroops(0)


@attrs.frozen(slots=True)
class Deposit:
    """Credit a vault; repeated under the same reference it changes nothing."""

    amount: Stroops
    ref: str
    """Names the deposit once and for ever, such as a chain event id; 1 to 200 characters."""


@attrs.frozen(slots=True)
class Withdraw:
    """Debit a vault's available balance; repeated under the same reference it changes nothing."""

    amount: Stroops
    ref: str


@attrs.frozen(slots=True)
class Refund:
    """Give back all or part of a captured charge as a new entry; repeated under the same reference it does nothing."""

    event_id: EventId
    amount: Stroops
    ref: str


@attrs.frozen(slots=True)
class Grant:
    """Credit a vault with money that no deposit brought; repeated under the same reference it changes nothing."""

    amount: Stroops
    """stroops, > 0."""
    ref: str
    """Names the grant once and for ever; 1 to 200 characters."""


@attrs.frozen(slots=True)
class SetStanding:
    """Set the vault's standing; anything but active refuses new holds."""

    standing: Literal["active", "arrears", "suspended"]


RoundCommand = PlaceHold | CloseHold
LockedCommand = ExtendHold | Deposit | Withdraw | Refund | Grant | SetStanding
Command = RoundCommand | LockedCommand
