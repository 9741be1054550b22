"""What a vault owes: charges of counters are known after the fact, and are booked whatever the balance is. Pure.

A vault's balance is available + held − owed. `available` is never negative (design rule 2): what a charge cannot take
from it is owed, and every credit pays what is owed first. Who owes is in arrears, and later suspended; once nothing is
owed both end, unless an operator said so.
"""

from datetime import datetime

import attrs

from callora.ledger.money import Stroops
from callora.ledger.values import value
from callora.ledger.vault import Standing


@value
class Purse:
    """A vault's money and standing, as its locked row says."""

    available: Stroops
    """stroops, >= 0."""
    owed: Stroops
    """stroops, >= 0."""
    arrears_since: datetime | None
    """Since when it owes without a break; None exactly where it owes nothing."""
    standing: Standing
    for_debt: bool
    """Whether it stands so for what it owes."""


def debited(purse: Purse, amount: Stroops) -> Purse | None:
    """Return the purse without an amount that must be there, or None where it is not; what is owed goes first.

    Args:
        amount: stroops, >= 0.
    """
    paid = credited(purse, Stroops(0))
    if amount > paid.available:
        return None
    return attrs.evolve(paid, available=Stroops(paid.available - amount))


def credited(purse: Purse, amount: Stroops) -> Purse:
    """Return the purse with an amount more, of which what is owed is paid first.

    Args:
        amount: stroops, >= 0; with 0, only what is available pays.
    """
    available = purse.available + amount
    paid = min(available, purse.owed)
    left = attrs.evolve(purse, available=Stroops(available - paid), owed=Stroops(purse.owed - paid))
    return _standing_well(left)


def charged(purse: Purse, amount: Stroops, now: datetime) -> Purse:
    """Return the purse after a charge that is booked whatever there is; what is owed already goes first.

    Args:
        amount: stroops, >= 0.
    """
    paid = credited(purse, Stroops(0))
    taken = min(paid.available, amount)
    owed = Stroops(paid.owed + amount - taken)
    left = attrs.evolve(paid, available=Stroops(paid.available - taken), owed=owed)
    if not owed:
        return left
    left = attrs.evolve(left, arrears_since=paid.arrears_since or now)
    if left.standing == "active":
        return attrs.evolve(left, standing="arrears", for_debt=True)
    return left


def stood(purse: Purse, standing: Standing) -> Purse:
    """Return the purse as an operator wants it to stand; who owes is in arrears at best."""
    paid = credited(purse, Stroops(0))
    if standing == "active" and paid.owed:
        return attrs.evolve(paid, standing="arrears", for_debt=True)
    return attrs.evolve(paid, standing=standing, for_debt=False)


def reviewed(purse: Purse, owing_since: datetime) -> Purse:
    """Return the purse with what it can pay paid, and suspended where it owes since this moment or longer."""
    paid = credited(purse, Stroops(0))
    if (
        paid.arrears_since is not None
        and paid.arrears_since <= owing_since
        and paid.for_debt
        and paid.standing == "arrears"
    ):
        return attrs.evolve(paid, standing="suspended")
    return paid


def _standing_well(purse: Purse) -> Purse:
    if purse.owed:
        return purse
    if purse.for_debt:
        return attrs.evolve(purse, arrears_since=None, standing="active", for_debt=False)
    return attrs.evolve(purse, arrears_since=None)
