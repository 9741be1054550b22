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

NO_VERSION: Final = 2**63 - 1
"""A version that no vault ever has."""
NO_CEILING: Final = 2**63 - 1


@attrs.define(slots=True, eq=False)
class Share:
    """One vault's part of a round."""

    vault_id: VaultId
    decided_version: int
    """The version this share was decided on, shares before it counted."""
    guarded: bool
    """True: where it has holds, the stored version must be exactly the decided one, or what is left of it be within
    `rules` and the ceilings. False: the balance guard alone decides."""
    rules: int | None = None
    """None: the version must be exact. Else nothing but holds and closes may have changed the vault since its rules
    were read, and those only as far as the ceilings let them."""
    placed: int = 0
    placed_credits: int = 0
    """Stroops and credits that were ever set aside for the vault before this share, as far as its actor knows."""
    ceiling: int = NO_CEILING
    credits_ceiling: int = NO_CEILING
    """How much may have been set aside by then without any of these holds being one too many."""
    need: int = 0
    """stroops that must be available before the round: what its holds set aside."""
    credits_need: int = 0
    """The same in credits."""
    credits_most: int = NO_CEILING
    """How many there may be by then without credits paying what was decided to be paid in money."""
    holds: list[PlaceHold] = attrs.field(factory=list)
    closes: list[CloseHold] = attrs.field(factory=list)
    available_change: int = 0
    held_change: int = 0
    credits_change: int = 0

    def void(self) -> None:
        """Let a guarded share with holds lose: what they were decided on has not come to be.

        Its version alone would not tell: another process's round may have made the one that was to be ours.
        """
        if self.guarded:
            self.decided_version, self.rules = NO_VERSION, None

    def place(self, hold: PlaceHold) -> None:
        """Add a hold."""
        self.holds.append(hold)
        self.need += hold.amount
        self.available_change -= hold.amount
        self.held_change += hold.amount
        self.credits_need += hold.credits
        self.credits_change -= hold.credits

    def bound(self, state: VaultState, hold: PlaceHold) -> None:
        """Let others have as much as leaves room for a hold that was placed last, and is applied to the state."""
        if self.rules is None:
            return
        for policy in state.policies:
            room = policy.room(hold)
            if room is None:
                self.rules = None
                return
            self.ceiling = min(self.ceiling, self.placed + room)
        if state.quota is not None:
            room = state.quota.room(hold, state.credits)
            if room is None:
                self.rules = None
                return
            self.credits_ceiling = min(self.credits_ceiling, self.placed_credits + room)
            if hold.uncovered:
                self.credits_most = min(self.credits_most, state.credits + self.credits_need)

    def close(self, close: CloseHold) -> None:
        """Add the end of a hold that an earlier round placed."""
        self.closes.append(close)
        self.available_change += close.held_amount - close.amount
        self.held_change -= close.held_amount
        self.credits_change += close.held_credits - close.credits


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
