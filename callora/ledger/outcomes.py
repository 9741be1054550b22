"""What a ledger command can come to: outcomes and refusals, as values.

A refusal is expected and says which rule refused (design rule 10). Faults are exceptions (`faults`).
"""

from typing import Literal

import attrs

from callora.ledger.ids import EventId
from callora.ledger.money import Stroops
from callora.ledger.values import value

CloseState = Literal["captured", "released", "expired"]


@value
class HoldPlaced:
    """The hold is durable: its price is out of the available balance until the hold is closed."""

    available: Stroops
    """What is left to spend, after this hold."""


@value
class HoldClosed:
    """The hold is closed, durably and for ever."""

    state: CloseState
    amount: Stroops
    """What was charged; 0 unless captured."""
    available: Stroops
    """What is left to spend, after this close."""


@attrs.frozen(slots=True)
class BalanceMoved:
    """A deposit, withdrawal, refund or grant is booked."""

    seq: int
    """The number of its ledger entry in the vault."""
    available: Stroops
    repeated: bool
    """True when an entry of this kind and reference was already booked and this command changed nothing."""


@attrs.frozen(slots=True)
class HoldExtended:
    """The hold now lasts longer and, where asked, holds more."""

    held_amount: Stroops


@attrs.frozen(slots=True)
class StandingSet:
    """The vault's standing is what was asked."""


@attrs.frozen(slots=True)
class InsufficientFunds:
    """Refused by the balance: checked against the stored balance, never against a cached one alone."""

    required: Stroops
    available: Stroops


@attrs.frozen(slots=True)
class StandingRefused:
    """Refused by the vault's standing."""

    standing: str


@attrs.frozen(slots=True)
class PolicyRefused:
    """Refused by a quota or a spending limit that joined the decision (`vault.HoldPolicy`)."""

    code: str
    """The refusing rule's error code, such as QUOTA_EXHAUSTED."""
    details: dict[str, object]


@attrs.frozen(slots=True)
class IdempotencyKeyTaken:
    """Another intent bound the idempotency key first; look the key up again."""


@attrs.frozen(slots=True)
class HoldNotOpen:
    """The hold cannot be closed as asked: it is closed otherwise already, was never placed, or is not due to expire."""

    state: CloseState | None
    """How it was closed; None when no such hold exists, or when it was to expire before its time."""


@attrs.frozen(slots=True)
class RefundRefused:
    """Nothing captured is left to refund under this event."""

    refundable: Stroops


@attrs.frozen(slots=True)
class VaultMissing:
    """No such vault."""


@attrs.frozen(slots=True)
class Overloaded:
    """The mailbox is full: refused now rather than queued longer. Nothing was done."""


@attrs.frozen(slots=True)
class Draining:
    """The service is stopping and takes no new commands. Nothing was done."""


@attrs.frozen(slots=True)
class EventFound:
    """A usage event as it stands in the store."""

    event_id: EventId
    state: Literal["held"] | CloseState
    held_amount: Stroops
    amount: Stroops
