"""What a ledger command can come to: outcomes and refusals, as values.

A refusal is expected and says which rule refused (design rule 10). Faults are exceptions (`faults`).
"""

from typing import Literal

import attrs

from callora.ledger.counters import Reading
from callora.ledger.ids import EventId
from callora.ledger.money import Stroops
from callora.ledger.values import value

CloseState = Literal["captured", "released", "expired"]


@value
class HoldPlaced:
    """The hold is durable: its price is out of the available balance until the hold is closed."""

    available: Stroops
    """What is left to spend, after this hold."""
    credits: int = 0
    """What of its price is held in credits: their units cost no money."""


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
    repeated: bool = False
    """True when it was extended under this reference before and this command changed nothing."""
    held_credits: int = 0


@attrs.frozen(slots=True)
class ReferenceTaken:
    """The reference names another extension of this hold."""


@attrs.frozen(slots=True)
class QuotaGranted:
    """The credits are the vault's."""

    credits: int
    """What it has left of all its grants and does not hold."""
    repeated: bool
    """True when they were granted under this reference before and this command changed nothing."""


@attrs.frozen(slots=True)
class PlanSet:
    """The vault is on the plan."""

    available: Stroops
    repeated: bool
    """True when this was paid before and this command took nothing."""


@attrs.frozen(slots=True)
class PlanMissing:
    """No such plan is active."""


@attrs.frozen(slots=True)
class StandingSet:
    """The vault's standing is what was asked."""


@attrs.frozen(slots=True)
class DebtReviewed:
    """What could be paid of the vault's debt is paid."""

    owed: Stroops
    """Still; stroops, >= 0."""
    standing: str


@attrs.frozen(slots=True)
class DeltasRated:
    """The readings of counters are rated, and what they came to is charged."""

    charged: Stroops
    owed: Stroops
    """By the vault, after it."""
    processed: int
    """Readings that a checkpoint moved on with, whether anything had grown or not; without resets that were dropped."""
    written_minutes: int
    """Minutes of accounts that have new deltas."""
    replayed_minutes: int
    """Minutes of accounts with readings no later than what was rated before: they changed nothing."""
    resets: int
    too_large: tuple[tuple[str, Reading], ...]
    """Readings by account whose charge is beyond what can be meant; nothing was done for them."""


@attrs.frozen(slots=True)
class InsufficientFunds:
    """Refused by the balance: checked against the stored balance, never against a cached one alone."""

    required: Stroops
    available: Stroops


@attrs.frozen(slots=True)
class StandingRefused:
    """Refused by the vault's standing."""

    standing: str
    owed: Stroops = Stroops(0)
    """What the vault is to pay before it stands well again; 0 where an operator said so."""


@attrs.frozen(slots=True)
class PolicyRefused:
    """Refused by a quota or a spending limit that joined the decision (`vault.HoldPolicy`)."""

    code: str
    """The refusing rule's error code, such as SPENDING_LIMIT_EXCEEDED."""
    details: dict[str, object]
    message: str | None = None
    """What to say instead of the code's own sentence."""


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
