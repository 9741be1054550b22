"""A vault's rules against a naive model: a list of what happened, added up anew each time."""

from collections.abc import Sequence

import attrs
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from callora.ledger.commands import CloseHold, PlaceHold
from callora.ledger.ids import VaultId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import InsufficientFunds, PolicyRefused, StandingRefused
from callora.ledger.rounds import NO_VERSION, Share
from callora.ledger.vault import HoldPolicy, Standing, VaultState, apply_close, apply_hold, decide_hold
from tests.simulation.support import captured, place, released

VAULT = VaultId("vault")
amounts = st.integers(0, 1000)


def state(available: int, held: int = 0, standing: Standing = "active") -> VaultState:
    """Return a vault."""
    return VaultState(VAULT, Stroops(available), Stroops(held), 0, standing)


@attrs.frozen
class Never:
    """A policy that refuses everything."""

    code: str

    def refuse(self, command: PlaceHold) -> PolicyRefused | None:
        """Refuse."""
        return PolicyRefused(self.code, {})

    def place(self, command: PlaceHold) -> None:
        """Count nothing."""

    def room(self, command: PlaceHold) -> None:
        """Leave others none."""

    def close(self, command: CloseHold) -> None:
        """Count nothing."""

    def carried(self, placed: int) -> "Never":
        """Return the same."""
        return self


@attrs.frozen
class Always:
    """A policy that refuses nothing."""

    def refuse(self, command: PlaceHold) -> PolicyRefused | None:
        """Allow."""
        return None

    def place(self, command: PlaceHold) -> None:
        """Count nothing."""

    def room(self, command: PlaceHold) -> None:
        """Leave others none."""

    def close(self, command: CloseHold) -> None:
        """Count nothing."""

    def carried(self, placed: int) -> "Always":
        """Return the same."""
        return self


@given(amounts, amounts)
def test_a_hold_is_refused_exactly_when_it_costs_more_than_is_available(available: int, amount: int) -> None:
    decided = decide_hold(state(available), place(1, amount))
    told = InsufficientFunds(Stroops(amount), Stroops(available)) if amount > available else place(1, amount)
    assert decided == told


def test_standing_refuses_before_the_balance_and_the_balance_before_policies() -> None:
    hold = place(1, 100)

    def told(available: int, standing: Standing, *policies: HoldPolicy) -> object:
        vault = state(available, 0, standing)
        vault.policies = policies
        return decide_hold(vault, hold)

    assert told(0, "arrears", Never("A")) == StandingRefused("arrears")
    assert told(0, "suspended", Never("A")) == StandingRefused("suspended")
    assert told(99, "active", Never("A")) == InsufficientFunds(Stroops(100), Stroops(99))
    assert told(100, "active", Always(), Never("A"), Never("B")) == PolicyRefused("A", {})
    assert told(100, "active", Always()) == hold


def test_a_free_call_needs_a_standing_and_no_balance() -> None:
    assert decide_hold(state(0), place(1, 0)) == place(1, 0)
    assert decide_hold(state(0, 0, "suspended"), place(1, 0)) == StandingRefused("suspended")


@attrs.frozen
class Held:
    """What the model remembers of a hold."""

    number: int
    amount: int


class VaultAgainstItsModel(RuleBasedStateMachine):
    """Any order of holds, captures and releases; the model keeps a history and no balance."""

    def __init__(self) -> None:
        super().__init__()
        self.deposit = 5000
        self.state = state(self.deposit)
        self.open: list[Held] = []
        self.spent: list[int] = []
        self.numbers = 0

    def model_held(self) -> int:
        """Add up what is set aside."""
        return sum(each.amount for each in self.open)

    def model_available(self) -> int:
        """Add up what is left."""
        return self.deposit - sum(self.spent) - self.model_held()

    @rule(amount=amounts)
    def hold(self, amount: int) -> None:
        """Place a hold, if the rules allow."""
        self.numbers += 1
        decided = decide_hold(self.state, place(self.numbers, amount))
        assert isinstance(decided, PlaceHold) == (amount <= self.model_available())
        if isinstance(decided, PlaceHold):
            apply_hold(self.state, decided)
            self.open.append(Held(self.numbers, amount))

    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        """End an open hold by any amount of it: 0 is a release."""
        if self.open:
            held = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
            amount = data.draw(st.integers(0, held.amount))
            apply_close(self.state, captured(held.number, held.amount, amount))
            self.spent.append(amount)

    @invariant()
    def balances_are_what_the_history_adds_up_to(self) -> None:
        """Compare with the model."""
        assert self.state.available == self.model_available() >= 0
        assert self.state.held == self.model_held() >= 0
        assert self.state.posted == self.deposit - sum(self.spent)


TestVaultAgainstItsModel = VaultAgainstItsModel.TestCase


@given(st.lists(st.tuples(amounts, amounts), max_size=20))
def test_a_share_adds_up_what_its_commands_move(pairs: Sequence[tuple[int, int]]) -> None:
    share = Share(VAULT, 0, guarded=False)
    for number, (hold, other) in enumerate(pairs):
        share.place(place(2 * number, hold))
        share.close(captured(2 * number + 1, hold + other, other))
    assert share.need == sum(hold for hold, _ in pairs)
    assert share.available_change == 0, "each close gives back what its pair's hold takes"
    assert share.held_change == -sum(other for _, other in pairs)


def test_a_close_never_lowers_what_a_share_needs() -> None:
    share = Share(VAULT, 0, guarded=False)
    share.place(place(1, 10))
    share.close(released(2, 10))
    assert share.need == 10, "the release may find nothing"


def test_voiding_a_share_makes_it_lose_by_its_version_where_it_has_a_guard() -> None:
    guarded, unguarded = Share(VAULT, 3, guarded=True), Share(VAULT, 3, guarded=False)
    guarded.void()
    unguarded.void()
    assert (guarded.decided_version, unguarded.decided_version) == (NO_VERSION, 3)
