"""A vault's money and standing, read from its locked row and written back whole.

Calls move `available` and `held` alone, in rounds; what is written here is for the rare commands, which hold the row's
lock from the reading to the commit.
"""

from typing import Final, cast

from callora.ledger.debt import Purse
from callora.ledger.money import Stroops
from callora.ledger.vault import Standing
from callora.store.bridge import Row

COLUMNS: Final = "available, owed, arrears_since, standing::text AS standing, standing_for_debt"


def setting(first: int) -> str:
    """Return what an UPDATE of vaults sets for the values of a purse, which are its parameters from this number on."""
    return (
        f"available = ${first}, owed = ${first + 1}, arrears_since = ${first + 2},"
        f" standing = ${first + 3}::text::standing, standing_for_debt = ${first + 4}, version = version + 1"
    )


def purse_of(row: Row) -> Purse:
    """Return the purse of a row that has COLUMNS."""
    return Purse(
        Stroops(row["available"]),
        Stroops(row["owed"]),
        row["arrears_since"],
        cast(Standing, row["standing"]),
        row["standing_for_debt"],
    )


def values_of(purse: Purse) -> tuple[object, ...]:
    """Return the parameters of `setting`."""
    return purse.available, purse.owed, purse.arrears_since, purse.standing, purse.for_debt
