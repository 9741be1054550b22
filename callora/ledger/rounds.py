"""A round: what many vaults decided, stored by one statement. Pure data, gathered in columns.

A round is all or nothing by vault: a vault whose guard fails has none of its share stored (it *lost*) and decides
again.
"""

from collections.abc import Sequence
from typing import Final

import attrs

from callora.ledger.commands import CloseHold, PlaceHold
from callora.ledger.ids import EventId, VaultId
from callora.ledger.vault import VaultState

UNGUARDED: Final = -1
NO_VERSION: Final = 2**63 - 1
"""A version that no vault ever has."""


@attrs.define(slots=True, eq=False)
class Share:
    """One vault's part of a round."""

    vault_id: VaultId
    decided_version: int
    """The version this share was decided on, shares before it counted."""
    guarded: bool
    """True: where it has holds, the stored version must be exactly the decided one. False: the balance guard alone
    decides."""
    need: int = 0
    """stroops that must be available before the round: what its holds set aside."""
    holds: list[PlaceHold] = attrs.field(factory=list)
    closes: list[CloseHold] = attrs.field(factory=list)
    available_change: int = 0
    held_change: int = 0

    def void(self) -> None:
        """Let a guarded share with holds lose: what they were decided on has not come to be.

        Its version alone would not tell: another process's round may have made the one that was to be ours.
        """
        if self.guarded:
            self.decided_version = NO_VERSION

    def place(self, hold: PlaceHold) -> None:
        """Add a hold."""
        self.holds.append(hold)
        self.need += hold.amount
        self.available_change -= hold.amount
        self.held_change += hold.amount

    def close(self, close: CloseHold) -> None:
        """Add the end of a hold that an earlier round placed."""
        self.closes.append(close)
        self.available_change += close.held_amount - close.amount
        self.held_change -= close.held_amount


@attrs.frozen(slots=True)
class RoundResult:
    """What a committed round did."""

    lost: Sequence[VaultState]
    """Vaults whose guard failed, as they stand; nothing of their share was stored."""
    drifted: Sequence[VaultState]
    """Vaults whose share was stored on another version than the one decided on, as they stand after it."""
    missed: frozenset[EventId]
    """Closes that found no open hold and holds whose idempotency key was taken; the rest of the share was stored."""


CLEAN: Final = RoundResult((), (), frozenset())
