"""A vault's rules: what may be held, and what each command does to the balance. Pure; no clock, no I/O.

Invariant (design rule 2): `available` is never negative. What is decided here on a cached state is decided again by the
guards of the round that stores it, so a stale state can lose a round but never money.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import attrs

from callora.ledger.commands import CloseHold, PlaceHold
from callora.ledger.ids import VaultId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import InsufficientFunds, PolicyRefused, StandingRefused
from callora.ledger.quota import Quota

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
    owed: Stroops = Stroops(0)
    """What counters charged beyond the balance; stroops, >= 0. Never part of a decision: right where the vault was read
    for one that is told."""
    limited: bool = False
    """Whether rules beside the balance are stored for the vault: they are to be read before a hold is decided."""
    policies: "Sequence[HoldPolicy]" = ()
    """Those rules, with what they counted when they were read and since."""
    credits: int = 0
    """Left of its quota grants and not held, >= 0; right where `quota` is known."""
    quota: Quota | None = None
    """None until something is asked for that is priced in credits, or a grant is stored."""
    rules: int = 0
    """Of a limited vault, which of its rules were read: another number once anything but holds and closes changed
    it."""
    placed: int = 0
    placed_credits: int = 0
    """Stroops and credits that were ever set aside while it was limited, as its actor knows."""

    @property
    def posted(self) -> Stroops:
        """The balance the ledger's entries and charges add up to; below 0 where the vault owes more than it holds."""
        return Stroops(self.available + self.held - self.owed)

    @property
    def guarded(self) -> bool:
        """Whether a round with holds must find what was decided on, or what leaves room for it."""
        return bool(self.policies) or self.quota is not None


class HoldPolicy(Protocol):
    """A rule beside the balance that joins the decision on a hold, such as spending limits.

    A vault with any policy is guarded: a round with a hold demands that the stored version is the one decided on, or
    that others have not placed more since than there is room for. It is read with the vault, or carried on from what
    was read before, where nothing but holds and closes changed the vault.
    """

    def refuse(self, command: PlaceHold) -> PolicyRefused | None:
        """Return why the hold may not be placed, or None."""
        ...

    def place(self, command: PlaceHold) -> None:
        """Count a hold that is decided."""
        ...

    def room(self, command: PlaceHold) -> int | None:
        """Return how much others may place, stroops, before a hold that is counted would have been refused.

        None where the vault must be just as it was.
        """
        ...

    def close(self, command: CloseHold) -> None:
        """Count the end of a hold, which is stored."""
        ...

    def carried(self, placed: int) -> "HoldPolicy":
        """Return the policy for a state read later: never less strict than one read with it.

        Args:
            placed: stroops that were ever set aside for the vault when that state was read, by whomever and whatever
                came back.
        """
        ...


Refusal = InsufficientFunds | StandingRefused | PolicyRefused


def decide_hold(state: VaultState, command: PlaceHold) -> PlaceHold | Refusal:
    """Return the hold as it may be placed on this state, or why it may not.

    Standing first, then the quota, which pays in credits what it can, then the balance for the rest, then policies.

    Args:
        state: its quota is known where the command is priced in credits.
    """
    if state.standing != "active":
        return StandingRefused(state.standing, state.owed)
    if command.unit_credits:
        assert state.quota is not None, "what is priced in credits is decided with the quota"
        decided = state.quota.decide(command, state.credits)
        if not isinstance(decided, PlaceHold):
            return decided
        command = decided
    if command.amount > state.available:
        return InsufficientFunds(command.amount, state.available)
    for policy in state.policies:
        refusal = policy.refuse(command)
        if refusal is not None:
            return refusal
    return command


def apply_hold(state: VaultState, command: PlaceHold) -> None:
    """Move what a decided hold takes from available to held; 0 <= amount <= state.available."""
    state.available = Stroops(state.available - command.amount)
    state.held = Stroops(state.held + command.amount)
    state.placed += command.amount
    state.placed_credits += command.credits
    if state.quota is not None:
        state.credits -= command.credits
        state.quota.place(command)
    for policy in state.policies:
        policy.place(command)


def apply_close(state: VaultState, command: CloseHold) -> None:
    """End a hold, spending some of it and giving the rest back; 0 <= amount <= held_amount."""
    state.available = Stroops(state.available + command.held_amount - command.amount)
    state.held = Stroops(state.held - command.held_amount)
    if state.quota is not None:
        state.credits += command.held_credits - command.credits
        state.quota.close(command)
    for policy in state.policies:
        policy.close(command)


def carry(known: VaultState, present: VaultState) -> None:
    """Give a vault as it is read now its rules as they were known before; only holds and closes came between."""
    present.policies = tuple([each.carried(present.placed) for each in known.policies])
    present.quota = None if known.quota is None else known.quota.carried(present.placed_credits)
