"""What asking for a plan comes to, and what a month's end does."""

from datetime import UTC, datetime

import attrs
import pytest

from callora.ledger.ids import VaultId
from callora.ledger.money import Stroops
from callora.ledger.subscriptions import (
    AlreadySubscribed,
    Begin,
    Keep,
    Payment,
    PlanOffer,
    Schedule,
    Subscription,
    decide,
    renewal,
)

NOVEMBER, DECEMBER, JANUARY, FEBRUARY = (
    datetime(2026, 11, 1, tzinfo=UTC),
    datetime(2026, 12, 1, tzinfo=UTC),
    datetime(2027, 1, 1, tzinfo=UTC),
    datetime(2027, 2, 1, tzinfo=UTC),
)
PRO = Subscription(
    subscription_id="01a2020f-fb39-704c-9207-cc7578c86344",
    vault_id=VaultId("01a2020f-fb39-704c-9207-cc7578c86345"),
    plan_id="pro",
    price=Stroops(19),
    first_charge=Stroops(19),
    replaces=None,
    next_plan_id=None,
    next_price=None,
    state="active",
    period_start=NOVEMBER,
    paid_until=DECEMBER,
    created_at=NOVEMBER,
    cancelled_at=None,
    ended_at=None,
)
TO_SMALL = attrs.evolve(PRO, next_plan_id="small", next_price=Stroops(5))
CANCELLED = attrs.evolve(PRO, cancelled_at=NOVEMBER)


@pytest.mark.parametrize(
    ("active", "plan_id", "price", "decision"),
    [
        (None, "pro", 19, Begin(Stroops(19), None)),
        (PRO, "pro", 25, AlreadySubscribed()),
        (PRO, "large", 20, Begin(Stroops(1), PRO.subscription_id)),
        (PRO, "equal", 19, Schedule()),
        (PRO, "small", 5, Schedule()),
        (TO_SMALL, "small", 5, AlreadySubscribed()),
        (TO_SMALL, "smaller", 4, Schedule()),
        (TO_SMALL, "pro", 19, Keep()),
        (CANCELLED, "pro", 19, Keep()),
        (CANCELLED, "small", 5, Schedule()),
        (CANCELLED, "large", 99, Begin(Stroops(80), PRO.subscription_id)),
    ],
)
def test_what_asking_for_a_plan_comes_to(
    active: Subscription | None, plan_id: str, price: int, decision: object
) -> None:
    assert decide(active, PlanOffer(plan_id, Stroops(price))) == decision


def test_a_month_that_begins_is_charged_by_its_name_and_months_that_nobody_served_are_not() -> None:
    ref = f"subscription:{PRO.subscription_id}:"
    assert PRO.payment_ref == f"{ref}2026-11-01"
    assert renewal(PRO, DECEMBER) == Payment("pro", Stroops(19), f"{ref}2026-12-01", DECEMBER, JANUARY)
    assert renewal(PRO, JANUARY) == Payment("pro", Stroops(19), f"{ref}2027-01-01", JANUARY, FEBRUARY)
    assert renewal(TO_SMALL, DECEMBER) == Payment("small", Stroops(5), f"{ref}2026-12-01", DECEMBER, JANUARY)
    assert renewal(CANCELLED, DECEMBER) is None
