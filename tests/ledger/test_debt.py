"""Debt: nothing is lost between what a vault has and what it owes, and who owes never stands well."""

from datetime import UTC, datetime, timedelta
from typing import Final

import attrs
from hypothesis import given
from hypothesis import strategies as st

from callora.ledger.debt import Purse, charged, credited, debited, reviewed, stood
from callora.ledger.money import Stroops
from callora.ledger.vault import Standing

NOON: Final = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
NEW: Final = Purse(Stroops(0), Stroops(0), None, "active", False)
WEEKS: Final = timedelta(days=14)

steps = st.lists(
    st.tuples(
        st.sampled_from(["charge", "credit", "debit", "review", "active", "arrears", "suspended"]), st.integers(0, 90)
    ),
    max_size=30,
)


@given(steps=steps)
def test_a_balance_is_all_credits_less_all_debits_and_who_owes_never_stands_well(steps: list[tuple[str, int]]) -> None:
    purse, balance, said = NEW, 0, False
    for number, (what, amount) in enumerate(steps):
        now = NOON + timedelta(days=number)
        owed_since = purse.arrears_since
        match what:
            case "charge":
                purse, balance = charged(purse, Stroops(amount), now), balance - amount
            case "credit":
                purse, balance = credited(purse, Stroops(amount)), balance + amount
            case "debit":
                after = debited(purse, Stroops(amount))
                assert (after is None) == (amount > max(0, balance))
                purse, balance = (purse, balance) if after is None else (after, balance - amount)
            case "review":
                purse = reviewed(purse, now - WEEKS)
            case "active" | "arrears" | "suspended" as standing:
                said = standing != "active"
                purse = stood(purse, standing)
        assert purse.available - purse.owed == balance
        assert purse.available == 0 or purse.owed == 0
        assert (purse.owed > 0) == (purse.arrears_since is not None)
        if purse.owed:
            assert purse.standing != "active"
            assert purse.arrears_since == (owed_since or now)
        else:
            assert not purse.for_debt
            assert (purse.standing == "active") != said
        if said:
            assert not purse.for_debt, "an operator's word stays"


def test_money_that_comes_back_of_a_hold_pays_when_the_vault_is_next_looked_at() -> None:
    owing = charged(NEW, Stroops(50), NOON)
    back = attrs.evolve(owing, available=Stroops(20))
    assert reviewed(back, NOON - WEEKS) == attrs.evolve(owing, owed=Stroops(30))
    assert debited(back, Stroops(1)) is None
    assert charged(attrs.evolve(owing, available=Stroops(60)), Stroops(5), NOON) == attrs.evolve(
        NEW, available=Stroops(5)
    )


def test_c26_who_owes_for_a_fortnight_is_suspended_and_nobody_else() -> None:
    def after(days: int, purse: Purse) -> Standing:
        return reviewed(purse, NOON + timedelta(days=days) - WEEKS).standing

    owing = charged(NEW, Stroops(50), NOON)
    assert [after(days, owing) for days in (3, 13, 14, 20)] == ["arrears", "arrears", "suspended", "suspended"]
    without_start = stood(NEW, "arrears")
    assert without_start.arrears_since is None
    assert after(90, without_start) == "arrears"
    suspended = reviewed(owing, NOON)
    assert reviewed(suspended, NOON) == suspended
    cleared = credited(suspended, Stroops(50))
    assert (cleared.standing, cleared.arrears_since) == ("active", None)
    assert after(90, cleared) == "active"
    assert after(90, stood(owing, "arrears")) == "arrears", "an operator has looked at it"
