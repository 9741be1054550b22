"""A vault's row as the ledger knows it."""

from typing import Final, cast

from callora.ledger.ids import VaultId
from callora.ledger.money import Stroops
from callora.ledger.vault import Standing, VaultState
from callora.store.bridge import Row

GUARDING: Final = ("limited", "owed", "rounds", "placed", "placed_credits", "credits")
"""What else is read of a vault whose rules count."""


def state_of(row: Row) -> VaultState:
    """Return a vault without what its rules need."""
    return VaultState(
        VaultId(str(row["vault_id"])),
        Stroops(row["available"]),
        Stroops(row["held"]),
        row["version"],
        cast(Standing, row["standing"]),
    )


def whole_state_of(row: Row) -> VaultState:
    """Return a vault with what its rules need, of a row that has the columns `GUARDING`."""
    state = state_of(row)
    state.owed, state.limited, state.credits = Stroops(row["owed"]), row["limited"], row["credits"]
    state.rules = row["version"] - row["rounds"]
    state.placed, state.placed_credits = row["placed"], row["placed_credits"]
    return state
