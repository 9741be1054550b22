"""Quotas: what credits pay, which grants they burn, and where credits go that come back."""

from datetime import UTC, datetime, timedelta

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from callora.ledger.commands import PlaceHold
from callora.ledger.money import Stroops
from callora.ledger.outcomes import PolicyRefused
from callora.ledger.quota import GrantLine, KeyCap, Overage, Quota, month_of, settle
from tests.simulation.support import CHARGED, event

NOON = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
DECEMBER = datetime(2026, 12, 1, tzinfo=UTC)


def quota(granted: int = 100, overage: Overage = "deny", **caps: KeyCap) -> Quota:
    """Return a quota; `cap` is the calling key's."""
    found = {CHARGED.api_key_id: caps["cap"]} if caps else {}
    return Quota(granted, 100, overage, DECEMBER, found, NOON)


def hold(units: int, unit_credits: int, price: int = 7) -> PlaceHold:
    """Return a hold of units that are priced in credits as well."""
    return PlaceHold(event(1), Stroops(units * price), 60, CHARGED, None, units, unit_credits)


@given(units=st.integers(1, 500), unit_credits=st.integers(1, 50), left=st.integers(0, 5000), price=st.integers(0, 9))
def test_a_unit_is_paid_whole_in_credits_or_whole_in_money(
    units: int, unit_credits: int, left: int, price: int
) -> None:
    decided = quota(5000, "charge").decide(hold(units, unit_credits, price), left)
    assert isinstance(decided, PlaceHold)
    covered, rest = divmod(decided.credits, unit_credits)
    assert rest == 0
    assert covered == min(units, left // unit_credits)
    assert decided.amount == (units - covered) * price


@given(units=st.integers(1, 50), unit_credits=st.integers(1, 50), left=st.integers(0, 3000))
def test_a_plan_that_charges_nothing_instead_refuses_what_its_credits_do_not_cover_whole(
    units: int, unit_credits: int, left: int
) -> None:
    decided = quota(3000).decide(hold(units, unit_credits), left)
    if units * unit_credits <= left:
        assert decided == attrs.evolve(hold(units, unit_credits), amount=Stroops(0), credits=units * unit_credits)
    else:
        assert isinstance(decided, PolicyRefused)
        assert decided.code == "QUOTA_EXHAUSTED"
        assert decided.details == {
            "limitedBy": "vault",
            "creditsRequired": units * unit_credits,
            "creditsRemaining": left,
            "creditsUsed": 3000 - left,
            "monthlyLimit": 3000,
            "resetAt": "2026-12-01T00:00:00Z",
        }


def test_a_keys_cap_is_named_where_it_is_what_refuses() -> None:
    at = quota(cap=KeyCap(10, 9))
    assert isinstance(at.decide(hold(1, 1), 50), PlaceHold)
    refused = at.decide(hold(2, 1), 50)
    assert isinstance(refused, PolicyRefused)
    assert (refused.details["limitedBy"], refused.details["creditsUsed"]) == ("key", 9)
    assert refused.details["creditsRemaining"] == 1


def test_credits_of_an_ended_grant_that_came_back_pay_nothing() -> None:
    assert isinstance(quota(granted=5).decide(hold(6, 1), left=50), PolicyRefused)


grants = st.lists(
    st.tuples(st.integers(0, 100), st.integers(0, 100)).map(lambda pair: (max(pair), min(pair))), max_size=6
)


@given(grants, st.integers(0, 700))
def test_settling_loses_no_credit_and_burns_the_earliest_to_end_first(made: list[tuple[int, int]], left: int) -> None:
    lines = [
        GrantLine(str(number), amount, remaining, NOON + timedelta(days=number))
        for number, (amount, remaining) in enumerate(made)
    ]
    settled, vanished = settle(lines, left)
    assert [each.grant_id for each in settled] == [each.grant_id for each in lines]
    assert all(0 <= each.remaining <= each.amount for each in settled)
    assert sum(each.remaining for each in settled) + vanished == left
    assert vanished >= 0
    for earlier, later, before in zip(settled, settled[1:], lines[1:], strict=False):
        if later.remaining < before.remaining:
            assert earlier.remaining == 0, "a later grant burnt before an earlier one"
    if vanished:
        assert all(each.remaining == each.amount for each in settled)
    assert settle(settled, left - vanished) == (settled, 0), "settling again changes nothing"


@pytest.mark.parametrize(
    ("at", "start", "following"),
    [
        ("2026-11-21T12:00:00+00:00", "2026-11-01T00:00:00+00:00", "2026-12-01T00:00:00+00:00"),
        ("2026-12-31T23:59:59.999999+00:00", "2026-12-01T00:00:00+00:00", "2027-01-01T00:00:00+00:00"),
        ("2027-01-01T00:00:00+00:00", "2027-01-01T00:00:00+00:00", "2027-02-01T00:00:00+00:00"),
        ("2028-03-01T00:30:00+02:00", "2028-02-01T00:00:00+00:00", "2028-03-01T00:00:00+00:00"),
    ],
)
def test_a_month_is_a_calendar_month_in_utc(at: str, start: str, following: str) -> None:
    assert month_of(datetime.fromisoformat(at)) == (datetime.fromisoformat(start), datetime.fromisoformat(following))
