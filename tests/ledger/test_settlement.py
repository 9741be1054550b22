"""How developers are paid, as rules: every path through the states, who gets what, and who is settled together."""

from datetime import UTC, datetime

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from callora.ledger.chain import Applied, ContractFault
from callora.ledger.ids import DeveloperId
from callora.ledger.money import Stroops
from callora.ledger.settlement import (
    ENDED,
    ITEMS_MAX,
    TRANSITIONS,
    Again,
    AskContract,
    AskHalves,
    BeginCharge,
    BeginCredits,
    BookCharge,
    BookCredits,
    Candidate,
    Charge,
    Complete,
    Done,
    Fail,
    MakeCredits,
    Part,
    Settlement,
    Split,
    State,
    Wait,
    after_asking,
    after_charge,
    after_credits,
    after_halves,
    blamed,
    grouped,
    items_for,
    next_step,
    platform_fee,
    refunded_fee,
    request_id_of,
)

ID = "01a2006c-5426-72bf-b230-be8beb87b477"
PLATFORM = "G" + "P" * 55
NOON = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
DONE = Applied(True, 7, NOON, "tx_success", None, None, None, 100)
TRAPPED = Applied(False, 7, NOON, "tx_failed", "trapped", ContractFault(5, "Error(Contract, #5)"), None, 100)
FAULT = ContractFault(5, "Error(Contract, #5)")
KNOWN = ContractFault(29, "Error(Contract, #29)")


def candidate(number: int, gross: int = 100, fee: int = 0) -> Candidate:
    """Return a developer who has earned something."""
    return Candidate(DeveloperId(f"d{number}"), f"G{number:055d}", Stroops(gross), Stroops(fee))


def settlement(state: State = "sealed", count: int = 3, **changes: object) -> Settlement:
    """Return a settlement of so many developers."""
    items = items_for(ID, [candidate(number) for number in range(count)], None)
    return attrs.evolve(Settlement(ID, "testnet", 1, state, items), **changes)  # type: ignore[arg-type]


# --- the states -------------------------------------------------------------------------------------------------------


def test_every_state_is_reached_and_every_one_that_has_not_ended_leads_to_an_end() -> None:
    reached: set[State] = {"open"}
    for _ in TRANSITIONS:
        reached |= {after for before in reached for after in TRANSITIONS[before]}
    assert reached == set(TRANSITIONS)
    ending: set[State] = set(ENDED)
    for _ in TRANSITIONS:
        ending |= {before for before, after in TRANSITIONS.items() if after & ending}
    assert ending == set(TRANSITIONS)
    assert all(not TRANSITIONS[state] for state in ENDED)


def test_money_that_is_charged_is_never_released_by_itself_not_even_on_another_history() -> None:
    for state in ("charged", "credit_sent"):
        parts = (Part(1, 1, 3),) if state == "credit_sent" else ()
        standing = settlement(state, parts=parts)
        assert not isinstance(next_step(standing, 1), Fail)
        assert isinstance(next_step(standing, 2), Wait)
    assert isinstance(next_step(settlement("sealed"), 2), Fail)
    assert isinstance(next_step(settlement("charge_sent"), 2), Fail)


@pytest.mark.parametrize(
    ("state", "step"),
    [
        ("sealed", BeginCharge()),
        ("charge_sent", Charge()),
        ("charged", BeginCredits()),
        ("completed", Done()),
        ("failed", Done()),
    ],
)
def test_what_is_stored_says_what_comes_next(state: State, step: object) -> None:
    assert next_step(settlement(state), 1) == step
    if state in ENDED:
        assert next_step(settlement(state), 2) == Done()


def test_credits_are_made_part_by_part_and_a_split_part_is_made_by_its_halves() -> None:
    whole = Part(1, 1, 3, "split")
    first, second = whole.halves
    assert (first, second) == (Part(2, 1, 2), Part(3, 3, 3))
    standing = settlement("credit_sent", parts=(whole, first, second))
    assert next_step(standing, 1) == MakeCredits(first)
    assert next_step(standing, 1, tried=frozenset((2,))) == MakeCredits(second), "one that waits keeps no other"
    assert isinstance(next_step(standing, 1, tried=frozenset((2, 3))), Wait)
    first, second = attrs.evolve(first, state="credited"), attrs.evolve(second, state="credited")
    assert next_step(attrs.evolve(standing, parts=(whole, first, second)), 1) == Complete()


@given(st.integers(1, ITEMS_MAX))
def test_splitting_to_the_end_makes_each_item_a_part_of_its_own_within_127_parts(count: int) -> None:
    parts, single = [Part(1, 1, count)], []
    while parts:
        part = parts.pop()
        if part.first == part.last:
            single.append(part)
        else:
            parts += part.halves
    assert sorted(part.first for part in single) == list(range(1, count + 1))
    assert max(part.number for part in single) <= 127


# --- the answers ------------------------------------------------------------------------------------------------------


def test_a_charge_that_is_in_a_ledger_is_booked() -> None:
    assert after_charge(DONE, None) == BookCharge("transaction")


@pytest.mark.parametrize("outcome", [FAULT, TRAPPED])
def test_defect_16_a_charge_that_cannot_be_made_releases_its_revenue_once_the_contract_knows_no_id(
    outcome: Applied | ContractFault,
) -> None:
    asked = after_charge(outcome, "InsufficientBalance")
    assert asked == AskContract("InsufficientBalance", False)
    assert after_asking(asked, [False, False]) == Fail("not charged: InsufficientBalance")
    assert after_asking(asked, None) == Fail("not charged: InsufficientBalance")


def test_defect_12_a_fault_of_a_charge_that_the_contract_knows_is_no_failure() -> None:
    for outcome, name in ((KNOWN, "DuplicateRequestId"), (FAULT, "InsufficientBalance")):
        asked = after_charge(outcome, name)
        assert isinstance(asked, AskContract)
        assert after_asking(asked, [True, True]) == BookCharge("found")
        assert isinstance(after_asking(asked, [True, False]), Wait)


def test_an_id_that_is_refused_as_known_releases_nothing_while_nobody_can_say_by_whom() -> None:
    asked = after_charge(KNOWN, "DuplicateRequestId")
    assert asked == AskContract("DuplicateRequestId", True)
    assert isinstance(after_asking(asked, None), Wait)
    assert isinstance(after_asking(asked, [False, False]), Wait)


def test_fault_29_of_another_contract_says_nothing_about_ids() -> None:
    asked = after_charge(KNOWN, None)
    assert isinstance(asked, AskContract)
    assert not asked.known


def test_credits_that_fail_are_tried_again_or_in_halves_and_never_given_up() -> None:
    whole, single = Part(1, 1, 3), Part(1, 1, 1)
    assert after_credits(whole, DONE, None) == BookCredits(whole)
    assert isinstance(after_credits(single, FAULT, None), Wait)
    assert isinstance(after_credits(single, TRAPPED, None), Again)
    for outcome in (FAULT, TRAPPED):
        asked = after_credits(whole, outcome, "DeveloperOverflow")
        assert isinstance(asked, AskHalves)
        assert after_halves(asked, True, False) == Split(whole)
        assert after_halves(asked, False, True) == Split(whole)
        assert isinstance(after_halves(asked, False, False), Again if outcome is TRAPPED else Wait)


def test_who_fails_a_charge_alone_is_to_blame_and_nobody_where_all_would() -> None:
    assert blamed({1: True, 2: False, 3: True}) == (2,)
    assert blamed({1: False, 2: False}) == ()
    assert blamed({1: True}) == ()


def test_a_purpose_is_another_for_each_part_and_each_attempt() -> None:
    standing = settlement()
    parts = [Part(1, 1, 3), Part(2, 1, 2), Part(1, 1, 3, attempt=2)]
    purposes = [standing.charge_purpose, *(standing.credit_purpose(part) for part in parts)]
    assert len(set(purposes)) == len(purposes)
    assert all(len(purpose) <= 110 for purpose in purposes)


def test_request_ids_are_32_hex_digits_of_settlement_and_developer() -> None:
    ids = {request_id_of(one, other) for one in ("a", "b") for other in ("a", "b")}
    assert len(ids) == 4
    assert all(len(each) == 32 and set(each) <= set("0123456789abcdef") for each in ids)
    assert request_id_of("a", "b") == request_id_of("a", "b")


# --- the money --------------------------------------------------------------------------------------------------------

AMOUNTS = st.integers(0, 2**62)
SHARES = st.integers(0, 10_000)


@given(AMOUNTS, SHARES)
def test_the_share_is_rounded_down_so_that_the_developer_loses_no_stroop(amount: int, bps: int) -> None:
    fee = platform_fee(Stroops(amount), bps)
    assert 0 <= fee <= amount
    assert fee * 10_000 <= amount * bps < (fee + 1) * 10_000


@given(st.integers(1, 10**15), SHARES, st.lists(st.integers(1, 10**14), max_size=20))
def test_refunds_give_back_what_was_taken_and_never_more(captured: int, bps: int, refunds: list[int]) -> None:
    taken = platform_fee(Stroops(captured), bps)
    left, kept = captured, taken
    for wanted in [*refunds, captured]:
        refund = min(wanted, left)
        if not refund:
            continue
        back = refunded_fee(Stroops(captured), Stroops(captured - left), Stroops(refund), bps)
        assert 0 <= back <= refund
        left, kept = left - refund, Stroops(kept - back)
        assert 0 <= kept == platform_fee(Stroops(left), bps) <= left
    assert left == 0 == kept


CANDIDATES = st.lists(
    st.tuples(st.integers(1, 1000), st.floats(0, 0.99)).map(lambda each: (each[0], int(each[0] * each[1]))),
    max_size=200,
).map(lambda pairs: [candidate(number, gross, fee) for number, (gross, fee) in enumerate(pairs)])


@given(CANDIDATES, st.integers(1, 3000), st.integers(1, 3000))
def test_everyone_is_settled_once_in_batches_that_fit_contract_and_caps(
    candidates: list[Candidate], charge_max: int, credit_max: int
) -> None:
    groups, over = grouped(candidates, charge_max=Stroops(charge_max), credit_max=Stroops(credit_max))
    assert sorted([each.developer_id for group in groups for each in group] + [each.developer_id for each in over]) == (
        sorted(each.developer_id for each in candidates)
    )
    assert all(each.gross > min(charge_max, credit_max) for each in over)
    for group in groups:
        made = attrs.evolve(settlement(), items=items_for(ID, group, PLATFORM))
        assert len(made.items) <= ITEMS_MAX
        assert made.credit_total == made.charge_total <= min(charge_max, credit_max)
        assert [item.position for item in made.items] == list(range(1, len(made.items) + 1))
        assert sum(item.credit for item in made.items if item.developer_id is None) == sum(each.fee for each in group)


def test_without_fees_fifty_developers_share_a_charge_and_with_them_the_platform_takes_a_place() -> None:
    for fee, sizes in ((0, [50, 50, 1]), (1, [49, 49, 3])):
        groups, _ = grouped(
            [candidate(number, fee=fee) for number in range(101)], charge_max=Stroops(10**9), credit_max=Stroops(10**9)
        )
        assert [len(group) for group in groups] == sizes
