"""What a guarded share lets others do: what it admits would have been decided on what is really there as well."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

import attrs
from hypothesis import given
from hypothesis import strategies as st

from callora.ledger.commands import PlaceHold
from callora.ledger.ids import ApiKeyId
from callora.ledger.money import Stroops
from callora.ledger.quota import KeyCap, Overage, Quota
from callora.ledger.rounds import Share
from callora.ledger.spending import Spending, SpendingLimits, allowance
from callora.ledger.vault import VaultState, apply_hold, decide_hold
from tests.simulation.support import CHARGED, VAULT, event

NOON: Final = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
KEYS: Final = tuple(ApiKeyId(f"00000000-0000-7000-8000-00000000000{number}") for number in range(2))

small = st.integers(0, 12)


@attrs.frozen
class Call:
    """A hold that is asked for, by us or by another process."""

    key: int
    amount: int
    units: int
    unit_credits: int

    def command(self, number: int) -> PlaceHold:
        """Return the command."""
        charged = attrs.evolve(CHARGED, api_key_id=KEYS[self.key])
        return PlaceHold(
            event(number), Stroops(self.amount * self.units), 60, charged, None, self.units, self.unit_credits
        )


calls = st.lists(st.builds(Call, st.integers(0, 1), small, st.integers(1, 3), st.integers(0, 3)), max_size=5)


def vault(limits: Sequence[int], caps: Sequence[int], credits_left: int, overage: Overage) -> VaultState:
    """Return a vault of two keys: limits of the vault and of each key, and caps of each key."""
    state = VaultState(VAULT, Stroops(10**6), Stroops(0), 7, "active", credits=credits_left, rules=3)
    of_vault, *of_keys = (allowance([Spending("day", Stroops(limit), Stroops(0))]) for limit in limits)
    state.policies = (SpendingLimits(of_vault, dict(zip(KEYS, of_keys, strict=True)), NOON, 0),)
    found = {key: KeyCap(cap, 0) for key, cap in zip(KEYS, caps, strict=True)}
    state.quota = Quota(10**6, 0, overage, NOON, found, NOON)
    return state


def decided(state: VaultState, asked: Sequence[Call], first: int) -> tuple[list[PlaceHold], bool]:
    """Return what of these is allowed, and whether all of it was."""
    found: list[PlaceHold] = []
    for number, call in enumerate(asked, first):
        hold = decide_hold(state, call.command(number))
        if isinstance(hold, PlaceHold):
            apply_hold(state, hold)
            found.append(hold)
    return found, len(found) == len(asked)


def admitted(share: Share, state: VaultState) -> bool:
    """Tell whether a round would store a share on the state that is there."""
    if share.rules is None:
        return state.version == share.decided_version
    return (
        state.placed <= share.ceiling
        and state.placed_credits <= share.credits_ceiling
        and share.credits_need <= state.credits <= share.credits_most
    )


@given(
    limits=st.lists(st.integers(1, 60), min_size=3, max_size=3),
    caps=st.lists(small, min_size=2, max_size=2),
    credits_left=st.integers(0, 20),
    given_back=st.integers(0, 4),
    overage=st.sampled_from(["deny", "charge"]),
    before=calls,
    ours=calls,
    others=calls,
)
def test_what_a_share_admits_is_what_would_have_been_decided(
    limits: list[int],
    caps: list[int],
    credits_left: int,
    given_back: int,
    overage: Overage,
    before: list[Call],
    ours: list[Call],
    others: list[Call],
) -> None:
    known, there = (vault(limits, caps, credits_left, overage) for _ in range(2))
    decided(known, before, 0)
    decided(there, before, 0)
    share = Share(VAULT, known.version, True, known.rules, known.placed, known.placed_credits)
    commands: list[tuple[Call, PlaceHold]] = []
    for number, call in enumerate(ours, 100):
        hold = decide_hold(known, call.command(number))
        if isinstance(hold, PlaceHold):
            share.place(hold)
            apply_hold(known, hold)
            share.bound(known, hold)
            commands.append((call, hold))
    done, _ = decided(there, others, 200)
    there.version += len(done)
    # Of a hold that ended: to the vault, and to the cap of its key.
    assert there.quota is not None
    cap = there.quota.caps[KEYS[0]]
    given_back = min(given_back, cap.used)
    there.credits += given_back
    cap.used -= given_back
    there.version += given_back > 0
    if admitted(share, there):
        again, all_of_them = decided(there, [call for call, _ in commands], 100)
        assert all_of_them, "what was allowed is allowed"
        paid = [(hold.amount, hold.credits) for hold in again]
        assert paid == [(hold.amount, hold.credits) for _, hold in commands], "and paid in the same way"


@given(before=calls, ours=calls)
def test_a_share_that_nobody_came_before_is_admitted(before: list[Call], ours: list[Call]) -> None:
    state = vault([10**6] * 3, [10**6] * 2, 10, "charge")
    decided(state, before, 0)
    there = attrs.evolve(state)
    share = Share(VAULT, state.version, True, state.rules, state.placed, state.placed_credits)
    for number, call in enumerate(ours, 100):
        hold = decide_hold(state, call.command(number))
        assert isinstance(hold, PlaceHold)
        share.place(hold)
        apply_hold(state, hold)
        share.bound(state, hold)
    assert admitted(share, there)


def test_what_others_may_place_is_what_each_hold_of_a_share_leaves() -> None:
    state = vault([50, 30, 10**6], [9, 10**6], 100, "deny")
    decided(state, [Call(1, 20, 1, 0), Call(0, 0, 1, 2)], 0)
    share = Share(VAULT, state.version, True, state.rules, state.placed, state.placed_credits)
    ceilings = []
    for number, call in enumerate((Call(1, 0, 1, 0), Call(1, 5, 1, 0), Call(0, 10, 1, 0), Call(0, 0, 1, 3)), 100):
        hold = decide_hold(state, call.command(number))
        assert isinstance(hold, PlaceHold)
        share.place(hold)
        apply_hold(state, hold)
        share.bound(state, hold)
        ceilings.append((share.ceiling - 20, share.credits_ceiling - 2))
    free, of_vault, of_key, of_cap = ceilings
    assert free[0] > 10**9, "what costs nothing is always allowed"
    assert (of_vault[0], of_key[0], of_cap[1]) == (25, 15, 4)
