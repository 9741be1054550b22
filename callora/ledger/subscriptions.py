"""Subscriptions: what asking for a plan comes to, and what a month's end does. Pure rules.

What is paid is a calendar month, UTC, as a plan's credits are given: whole, and so it is not paid by the day. A dearer
plan begins at once and costs the difference; a cheaper one, or none, begins when what is paid has ended.
"""

from datetime import datetime
from typing import Final, Literal

import attrs

from callora.ledger.ids import VaultId
from callora.ledger.money import Stroops
from callora.ledger.quota import month_of

FALLBACK_PLAN: Final = "free"
"""The plan of a vault until somebody gives it another, and again when nobody pays for that."""

State = Literal["pending", "active", "ended", "lapsed", "replaced"]


@attrs.frozen
class Subscription:
    """A plan that a vault pays for."""

    subscription_id: str
    """UUIDv7."""
    vault_id: VaultId
    plan_id: str
    price: Stroops
    """A month's, > 0, as it was agreed to."""
    first_charge: Stroops
    """What the first month costs, > 0."""
    replaces: str | None
    """The subscription of a cheaper plan that this one takes the place of."""
    next_plan_id: str | None
    """From the end of what is paid on."""
    next_price: Stroops | None
    state: State
    period_start: datetime
    """The first instant of the month that is being paid, or was paid last."""
    paid_until: datetime
    """The first instant of the month after it."""
    created_at: datetime
    cancelled_at: datetime | None
    ended_at: datetime | None

    @property
    def payment_ref(self) -> str:
        """What names the payment of its first month, once and for ever."""
        return payment_ref(self.subscription_id, self.period_start)


@attrs.frozen
class PlanOffer:
    """A plan that can be subscribed to."""

    plan_id: str
    price: Stroops
    """stroops a month, > 0."""


@attrs.frozen
class Begin:
    """Charge the first month of a new subscription."""

    first_charge: Stroops
    replaces: str | None


@attrs.frozen
class Schedule:
    """Go on with another, cheaper plan when what is paid has ended."""


@attrs.frozen
class Keep:
    """Go on with the present plan: what was cancelled or was to change does not, and nothing is charged."""


@attrs.frozen
class AlreadySubscribed:
    """There is nothing to do: it goes on with this plan anyway."""


@attrs.frozen
class Payment:
    """What a month costs that begins."""

    plan_id: str
    price: Stroops
    ref: str
    period_start: datetime
    paid_until: datetime


def payment_ref(subscription_id: str, period_start: datetime) -> str:
    """Return what names the payment of a month, once and for ever."""
    return f"subscription:{subscription_id}:{period_start:%Y-%m-%d}"


def decide(active: Subscription | None, offer: PlanOffer) -> Begin | Schedule | Keep | AlreadySubscribed:
    """Return what asking for a plan comes to.

    Args:
        active: what is paid for now, until an instant that lies ahead; None where nothing is.
    """
    if active is None:
        return Begin(offer.price, None)
    if active.plan_id == offer.plan_id:
        changes = active.cancelled_at is not None or active.next_plan_id is not None
        return Keep() if changes else AlreadySubscribed()
    if offer.price > active.price:
        return Begin(Stroops(offer.price - active.price), active.subscription_id)
    if active.next_plan_id == offer.plan_id and active.cancelled_at is None:
        return AlreadySubscribed()
    return Schedule()


def renewal(subscription: Subscription, now: datetime) -> Payment | None:
    """Return what the month of `now` costs a subscription whose paid month has ended; None: it was cancelled.

    Months in which nobody looked are not paid for.
    """
    if subscription.cancelled_at is not None:
        return None
    start, end = month_of(now)
    plan_id, price = subscription.plan_id, subscription.price
    if subscription.next_plan_id is not None:
        assert subscription.next_price is not None
        plan_id, price = subscription.next_plan_id, subscription.next_price
    return Payment(plan_id, price, payment_ref(subscription.subscription_id, start), start, end)
