"""Commands to a vault, as plain values. How they travel is the actors' business.

PlaceHold, CaptureHold and ReleaseHold come once or more a call and are stored in group-committed rounds; the others are
rare and are stored one by one, with the vault locked.
"""

from datetime import datetime
from typing import Literal

import attrs

from callora.ledger.counters import AccountReadings, Metered, Rule
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
    """stroops, >= 0; 0 for a free call, which makes a usage event and sets nothing aside. Once decided: what is left of
    it after its credits."""
    ttl_seconds: int
    """1 to 86 400; an unclosed hold is released after it."""
    charged: Charged
    claim: IdempotencyClaim | None = None
    units: int = 1
    """What the amount is the price of, each of the same price: amount is a multiple of it; >= 1."""
    unit_credits: int = 0
    """What each unit costs where it is paid from a quota; 0 where money alone pays."""
    credits: int = 0
    """Set aside from the vault's quota, once decided; a unit is never split."""

    @property
    def uncovered(self) -> bool:
        """Whether, once decided, any of its units are paid in money though they have a price in credits."""
        return self.credits < self.units * self.unit_credits


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
    quantity: int | None = None
    """The units charged for, where the price is not per call."""


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
    held_credits: int = 0
    credits: int = 0
    """Credits captured, 0 <= credits <= held_credits; 0 unless captured."""


def capture(
    event_id: EventId,
    held_amount: Stroops,
    amount: Stroops,
    delivery: Delivery,
    answer: StoredAnswer | None = None,
    *,
    held_credits: int = 0,
    spent_credits: int = 0,
) -> CloseHold:
    """Return the command CaptureHold: spend an amount and credits of the hold and give the rest back."""
    return CloseHold(event_id, "captured", held_amount, amount, delivery, answer, held_credits, spent_credits)


def release(
    event_id: EventId,
    held_amount: Stroops,
    delivery: Delivery,
    answer: StoredAnswer | None = None,
    held_credits: int = 0,
) -> CloseHold:
    """Return the command ReleaseHold: give the whole hold back."""
    return CloseHold(event_id, "released", held_amount, Stroops(0), delivery, answer, held_credits)


def expire(event_id: EventId, held_amount: Stroops, held_credits: int = 0) -> CloseHold:
    """Return the close of a hold that outlived its time-out: given back whole."""
    return CloseHold(event_id, "expired", held_amount, Stroops(0), Delivery("expired"), None, held_credits)


@attrs.frozen(slots=True)
class ExtendHold:
    """Give an open hold more time and, optionally, more money."""

    event_id: EventId
    extra_seconds: int
    """Added to the expiry, which stays within a day of the hold's creation."""
    extra_amount: Stroops = Stroops(0)
    ref: str | None = None
    """Names this extension of this hold once and for ever: repeated, it changes nothing; 1 to 200 characters. Without
    one each repetition extends again, which is for time alone."""
    units: int = 1
    """What the extra amount is the price of, as of PlaceHold."""
    unit_credits: int = 0
    """What each of these units costs where it is paid from a quota."""


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
class GiveBack:
    """Credit a vault with a withdrawal that was debited and provably never paid; repeated it changes nothing."""

    amount: Stroops
    """stroops, > 0."""
    ref: str
    """That of the withdrawal."""


@attrs.frozen(slots=True)
class GrantQuota:
    """Give a vault credits that end; repeated under the same source and reference it changes nothing."""

    grant_id: str
    """UUIDv7."""
    source: Literal["promo", "purchase", "allocation"]
    amount: int
    """Credits, 1 to 10^12."""
    ref: str
    """Names the grant once and for ever; 1 to 200 characters."""
    expires_at: datetime


@attrs.frozen(slots=True)
class SetPlan:
    """Put a vault on a plan and take what that costs, once under its reference."""

    plan_id: str
    price: Stroops
    """stroops, >= 0; taken as a ledger entry `subscription`."""
    ref: str
    """Names the payment once and for ever; 1 to 200 characters. What costs nothing is set each time."""


@attrs.frozen(slots=True)
class SetStanding:
    """Set the vault's standing; anything but active refuses new holds. Who owes is in arrears at best."""

    standing: Literal["active", "arrears", "suspended"]


@attrs.frozen(slots=True)
class ReviewDebt:
    """Pay what the vault owes from what it has, and suspend it where it owes for too long."""

    owing_since: datetime
    """Suspended is who is in arrears since this moment or longer, by what he owes and not by an operator's word."""


@attrs.frozen(slots=True)
class RateDelta:
    """Rate what a source's counters say of accounts of this vault, and charge it whatever the balance is.

    Repeated, in whole or in part, it changes nothing: what each counter was rated up to decides.
    """

    metered: Metered
    accounts: tuple[AccountReadings, ...]
    """Each account once."""
    rule: Rule
    """By what accounts are rated that have no price or rule of their own."""


RoundCommand = PlaceHold | CloseHold
LockedCommand = (
    ExtendHold
    | Deposit
    | Withdraw
    | Refund
    | Grant
    | GiveBack
    | GrantQuota
    | SetPlan
    | SetStanding
    | ReviewDebt
    | RateDelta
)
Command = RoundCommand | LockedCommand
