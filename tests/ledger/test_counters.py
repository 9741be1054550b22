"""Counters: what a counter grew by, whatever is delivered, in whatever order, however often; and what that costs."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from callora.ledger.counters import CHARGE_MAX, Checkpoint, Delta, Price, Reading, advance
from callora.ledger.money import Stroops
from callora.ledger.snapshots import FirstSeen, ResetPolicy

NOON: Final = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
NEVER: Final = Checkpoint(0, 0, 0, None)
UNIT: Final = Price.of(Decimal("0.0000001"), Decimal(1))
"""A stroop a unit."""

totals = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), max_size=12)
firsts = st.sampled_from(["full", "baseline"])
resets = st.sampled_from(["drop", "count_new_total"])


def readings(*stood: tuple[int, int], first: int = 0) -> tuple[Reading, ...]:
    """Return what a counter stood at, a minute apart."""
    return tuple(
        Reading(NOON + timedelta(minutes=number), up, down, "") for number, (up, down) in enumerate(stood, first)
    )


def truth(stood: Sequence[tuple[int, int]], first_seen: FirstSeen, reset: ResetPolicy) -> tuple[int, int]:
    """Return what was used, and the resets, by the plainest count there is."""
    used = anew = 0
    before: tuple[int, int] | None = None
    for up, down in stood:
        if before is None:
            used += up + down if first_seen == "full" else 0
        elif up < before[0] or down < before[1]:
            used += up + down if reset == "count_new_total" else 0
            anew += 1
        else:
            used += up - before[0] + down - before[1]
        before = up, down
    return used, anew


@given(stood=totals, first_seen=firsts, reset=resets, price=st.integers(0, 9), included=st.integers(0, 900))
def test_what_is_charged_is_what_was_used_less_what_is_included(
    stood: list[tuple[int, int]], first_seen: FirstSeen, reset: ResetPolicy, price: int, included: int
) -> None:
    used, anew = truth(stood, first_seen, reset)
    unit = Price.of(Decimal(price) / 10**7, Decimal(1))
    went = advance(NEVER, readings(*stood), unit, included, first_seen, reset)
    assert sum(each.up + each.down for each in went.deltas) == used
    assert sum(each.included for each in went.deltas) == min(used, included)
    assert sum(each.amount for each in went.deltas) == max(0, used - included) * price
    assert (went.resets, went.replayed, went.too_large) == (anew, (), ())
    assert all(each.up + each.down > 0 for each in went.deltas), "what did not grow is no fact"
    places = [(each.epoch, each.from_up, each.from_down) for each in went.deltas]
    assert len(set(places)) == len(places), "an interval is told by where it begins, in its epoch"


@given(stood=totals, cuts=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=6), reset=resets)
def test_pages_that_overlap_and_repeat_come_to_what_one_page_comes_to(
    stood: list[tuple[int, int]], cuts: list[tuple[int, int]], reset: ResetPolicy
) -> None:
    """Every page begins at or before where the last one ended, as overlapping windows do."""
    whole = readings(*stood)
    once = advance(NEVER, whole, UNIT, 100, "full", reset)
    checkpoint, left, reached = NEVER, 100, 0
    deltas: list[Delta] = []
    for back, length in [*cuts, (0, len(whole))]:
        start = max(0, reached - back)
        page = whole[start : start + length]
        went = advance(checkpoint, page, UNIT, left, "full", reset)
        assert len(went.replayed) == min(len(page), reached - start)
        reached = max(reached, min(len(whole), start + length))
        checkpoint, deltas = went.checkpoint, [*deltas, *went.deltas]
        left -= sum(each.included for each in went.deltas)
    assert deltas == list(once.deltas)
    assert checkpoint == once.checkpoint
    again = advance(checkpoint, whole, UNIT, left, "full", reset)
    assert (again.deltas, again.processed, again.checkpoint) == ((), 0, checkpoint)
    assert len(again.replayed) == len(whole)


def test_a_total_that_is_lower_but_not_later_is_a_replay_and_no_reset() -> None:
    went = advance(Checkpoint(3, 100, 100, NOON + timedelta(minutes=5)), readings((1, 1)), UNIT, 0, "full", "drop")
    assert (went.resets, len(went.replayed), went.checkpoint.epoch) == (0, 1, 3)


@given(
    units=st.integers(0, 2**62), price=st.decimals("0", "1000", places=9), multiplier=st.decimals("0.1", "9", places=3)
)
def test_a_charge_is_exact_and_rounded_once_half_up(units: int, price: Decimal, multiplier: Decimal) -> None:
    exact = Decimal(units) * price * multiplier * 10**7
    with_all_digits = exact.quantize(Decimal(1), ROUND_HALF_UP) if exact.adjusted() < 20 else None
    charge = Price.of(price, multiplier).charge(units)
    if with_all_digits is not None and len(exact.as_tuple().digits) < 28:
        assert charge == with_all_digits


@pytest.mark.parametrize(("units", "charge"), [(1, 0), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2)])
def test_half_a_stroop_is_rounded_up(units: int, charge: int) -> None:
    assert Price.of(Decimal("0.00000003"), Decimal("1")).charge(units) == Stroops(charge)


def test_a_charge_that_cannot_be_meant_moves_nothing_and_what_follows_it_is_looked_at() -> None:
    dear = Price.of(Decimal(1), Decimal(1))
    too_much = CHARGE_MAX // 10**7 + 1
    went = advance(NEVER, readings((1, 0), (too_much + 1, 0), (2, 0)), dear, 0, "full", "drop")
    assert [each.amount for each in went.deltas] == [10**7, 10**7]
    assert [each.up for each in went.too_large] == [too_much + 1]
    assert went.checkpoint.up == 2
