"""A vault's rules: what may be held, and what each command does to the balance. Pure; no clock, no I/O.

Invariant (design rule 2): `available` is never negative. What is decided here on a cached state is decided again by the
guards of the round that stores it, so a stale state can lose a round but never money.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import attrs

from callora.ledger.commands import PlaceHold
from callora.ledger.ids import VaultId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import InsufficientFunds, PolicyRefused, StandingRefused

Standing = Literal["active", "arrears", "suspended"]


@attrs.define(slots=True)
class VaultState:
    """One vault's balance as its actor knows it."""

    vault_id: VaultId
    available: Stroops
    """Spendable: posted balance less what is held; stroops, >= 0."""
    held: Stroops
    """Set aside by open holds; stroops, >= 0."""
    version: int
    """Grows by one with each round that changes the vault."""
    standing: Standing

    @property
    def posted(self) -> Stroops:
        """The balance the ledger's entries add up to."""
        return Stroops(self.available + self.held)


class HoldPolicy(Protocol):
    """A rule beside the balance that joins the decision on a hold: plan quotas, spending limits.

    A vault with any policy is guarded: its round demands that the stored version is the one decided on, so a policy may
    rely on what it read with that version.
    """

    def refuse(self, state: VaultState, command: PlaceHold) -> PolicyRefused | None:
        """Return why the hold may not be placed, or None."""
        ...


def refuse_hold(
    state: VaultState, command: PlaceHold, policies: Sequence[HoldPolicy] = ()
) -> InsufficientFunds | StandingRefused | PolicyRefused | None:
    """Return why a hold may not be placed on this state, or None; standing first, then policies, then balance."""
    if state.standing != "active":
        return StandingRefused(state.standing)
    for policy in policies:
        refusal = policy.refuse(state, command)
        if refusal is not None:
            return refusal
    if command.amount > state.available:
        return InsufficientFunds(command.amount, state.available)
    return None


def apply_hold(state: VaultState, amount: Stroops) -> None:
    """Move `amount` from available to held; 0 <= amount <= state.available."""
    state.available = Stroops(state.available - amount)
    state.held = Stroops(state.held + amount)


def apply_close(state: VaultState, held_amount: Stroops, amount: Stroops) -> None:
    """End a hold of `held_amount`, spending `amount` of it and giving the rest back; 0 <= amount <= held_amount."""
    state.available = Stroops(state.available + held_amount - amount)
    state.held = Stroops(state.held - held_amount)
