"""What does not add up in a settlement, by what is stored and what the network told."""

from datetime import UTC, datetime
from typing import Any

import attrs
import pytest

from callora.ledger.chain import Applied, Head, NotSeen, Retained
from callora.ledger.discrepancies import (
    GRACE_SECONDS,
    STALE_SECONDS,
    BookedPart,
    BookedSettlement,
    KnownTransaction,
    Owed,
    of_address,
    of_settlement,
    of_vault,
)
from callora.ledger.money import Stroops

NOW = datetime(2026, 11, 22, tzinfo=UTC)
CHARGE, CREDIT = "a" * 64, "b" * 64
APPLIED = Applied(True, 7, NOW, "tx_success", None, None, None, 100)
FAILED = attrs.evolve(APPLIED, successful=False, result_code="tx_failed")
UNSEEN = NotSeen(Retained(1, Head(100, NOW)))
FORGOTTEN = NotSeen(Retained(50, Head(100, NOW)))
BEHIND = NotSeen(Retained(1, Head(6, NOW)))

GOOD = BookedSettlement(
    settlement_id="s",
    state="completed",
    age_seconds=60,
    moved_seconds=10,
    ended_at=NOW,
    charge_total=Stroops(10),
    credit_total=Stroops(9),
    items_gross=Stroops(10),
    items_credit=Stroops(9),
    charged_by="transaction",
    charge_hash=CHARGE,
    charges=(KnownTransaction(CHARGE, "charge:s", "succeeded", 7, Stroops(10)),),
    credits=(KnownTransaction(CREDIT, "credit:s:1.1", "succeeded", 7, None),),
    parts=(BookedPart(1, "credited", Stroops(9), "credit:s:1.1", CREDIT),),
)
UNPAID = attrs.evolve(
    GOOD,
    state="charge_sent",
    charged_by=None,
    charge_hash=None,
    ended_at=None,
    charges=(attrs.evolve(GOOD.charges[0], state="sent", ledger=5, deducted=None),),
    credits=(),
    parts=(),
)


def kinds(booked: BookedSettlement, **told: Any) -> list[str]:
    """Return the classes found, where the network tells this of the charge and the credit."""
    hashes = {"charge": CHARGE, "credit": CREDIT}
    return [each.kind for each in of_settlement(booked, {hashes[name]: said for name, said in told.items()})]


@pytest.mark.parametrize("told", [{}, {"charge": APPLIED, "credit": APPLIED}, {"charge": FORGOTTEN, "credit": BEHIND}])
def test_a_good_settlement_is_good_whoever_can_tell(told: dict[str, Any]) -> None:
    assert kinds(GOOD, **told) == []


@pytest.mark.parametrize("which", ["charge", "credit"])
@pytest.mark.parametrize("said", [FAILED, UNSEEN])
def test_what_is_booked_and_not_applied_is_missing(which: str, said: Any) -> None:
    assert kinds(GOOD, **{which: said}) == ["MISSING_TX"]


def test_a_transaction_that_no_node_knows_is_pending_and_no_discrepancy() -> None:
    assert kinds(UNPAID, charge=UNSEEN) == []


def test_what_is_applied_may_wait_to_be_booked_for_the_grace_and_no_longer() -> None:
    assert kinds(UNPAID, charge=APPLIED) == []
    late = attrs.evolve(UNPAID, moved_seconds=GRACE_SECONDS + 1)
    assert kinds(late, charge=APPLIED) == ["STALE_PENDING"]
    assert kinds(late, charge=UNSEEN) == []
    assert kinds(attrs.evolve(UNPAID, age_seconds=STALE_SECONDS + 1), charge=UNSEEN) == ["STALE_PENDING"]


@pytest.mark.parametrize("state", ["dead", "failed", "unresolved"])
def test_a_failed_settlement_whose_charge_the_network_has_is_a_false_failure(state: str) -> None:
    booked = attrs.evolve(UNPAID, state="failed", charges=(attrs.evolve(UNPAID.charges[0], state=state),))
    assert kinds(booked) == []
    assert kinds(booked, charge=UNSEEN) == []
    assert kinds(booked, charge=APPLIED) == ["FALSE_FAILURE"]
    seen = attrs.evolve(booked, charges=(attrs.evolve(booked.charges[0], deducted=Stroops(10)),))
    assert kinds(seen) == ["FALSE_FAILURE"], "its event says so"


def test_a_second_charge_is_a_drift_of_all_of_it() -> None:
    twice = attrs.evolve(GOOD, charges=(*GOOD.charges, KnownTransaction(CREDIT[::-1], "charge:s", "dead", 7, None)))
    assert kinds(twice) == []
    (found,) = of_settlement(twice, {CREDIT[::-1]: APPLIED})
    assert (found.kind, found.difference) == ("DRIFT", 10)


def test_what_stops_settlement_is_everything_but_what_merely_waits() -> None:
    late = attrs.evolve(UNPAID, moved_seconds=GRACE_SECONDS + 1)
    (waits,) = of_settlement(late, {CHARGE: APPLIED})
    assert not waits.stops
    (missing,) = of_settlement(GOOD, {CHARGE: FAILED})
    assert missing.stops
    assert missing.at == NOW


@pytest.mark.parametrize(("on_chain", "credited", "drift"), [(5, 5, None), (6, 5, 1), (4, 5, None)])
def test_an_address_may_be_owed_less_than_it_was_credited_and_not_a_stroop_more(
    on_chain: int, credited: int, drift: int | None
) -> None:
    found = [each.difference for each in of_address(Owed("G", on_chain, credited, NOW))]
    assert found == ([] if drift is None else [drift])


@pytest.mark.parametrize("drift", [-1, 0, 1])
def test_the_vault_contract_is_off_by_a_stroop_of_any_sign(drift: int) -> None:
    assert [each.difference for each in of_vault(drift, 7)] == ([drift] if drift else [])
