"""Spending limits against the plainest way of keeping them: a number for each period of each of them."""

from datetime import UTC, datetime
from typing import Final

import attrs
from hypothesis import given
from hypothesis import strategies as st

from callora.ledger.commands import PlaceHold, capture
from callora.ledger.ids import ApiKeyId
from callora.ledger.money import Stroops, format_usdc
from callora.ledger.spending import PERIODS, Period, Spending, SpendingLimits, allowance
from tests.simulation.support import CHARGED, DELIVERED, event

NOON: Final = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
KEYS: Final = tuple(ApiKeyId(f"00000000-0000-7000-8000-00000000000{number}") for number in range(3))
"""The last has no limits."""

Plain = dict[Period, list[int]]
"""Limit and what was spent, for each period that has one."""

small = st.integers(0, 30)
plain = st.dictionaries(st.sampled_from(PERIODS), st.tuples(st.integers(1, 60), small).map(list), max_size=4)
holds = st.tuples(st.sampled_from(KEYS), small)
steps = st.lists(st.one_of(holds, st.tuples(st.integers(0, 10), small), small), max_size=20)
"""A hold, the end of one that was placed with what it cost, or what others placed meanwhile."""


def first_exceeded(of: Plain, amount: int) -> tuple[Period, int, int] | None:
    """Return the first limit that does not let an amount pass: its period, limit and what was spent."""
    for period in PERIODS:
        if period in of and of[period][1] + amount > of[period][0]:
            return period, of[period][0], of[period][1]
    return None


def read(of: Plain) -> list[Spending]:
    """Return limits as the store reads them, in no order."""
    return [Spending(period, Stroops(limit), Stroops(spent)) for period, (limit, spent) in of.items()]


@given(plain, plain, plain, steps)
def test_what_is_refused_and_what_is_told_is_what_each_periods_own_number_says(
    of_vault: Plain, of_one: Plain, of_other: Plain, asked: list[tuple[ApiKeyId | int, int] | int]
) -> None:
    of_keys = dict(zip(KEYS, (of_one, of_other), strict=False))
    limits = SpendingLimits(
        allowance(read(of_vault)), {key: allowance(read(each)) for key, each in of_keys.items()}, NOON, 100
    )
    everybodys = (of_vault, *of_keys.values())
    counted = [{period: spent for period, (_, spent) in each.items()} for each in everybodys]
    placed: list[PlaceHold] = []
    ever_placed = 100
    for number, step in enumerate(asked):
        match step:
            case (str(key), amount):
                hold = PlaceHold(event(number), Stroops(amount), 60, attrs.evolve(CHARGED, api_key_id=ApiKeyId(key)))
                of_key = of_keys.get(ApiKeyId(key), {})
                by_vault, by_key = first_exceeded(of_vault, amount), first_exceeded(of_key, amount)
                refusal = limits.refuse(hold)
                if amount and (by_vault or by_key):
                    period, limit, spent = by_vault or by_key or ("day", 0, 0)
                    assert refusal is not None
                    assert refusal.details == {
                        "limitedBy": "vault" if by_vault else "key",
                        "window": period,
                        "limit": format_usdc(Stroops(limit)),
                        "spent": format_usdc(Stroops(spent)),
                        "requested": format_usdc(Stroops(amount)),
                        "remaining": format_usdc(Stroops(max(0, limit - spent))),
                    }
                    continue
                assert refusal is None
                limits.place(hold)
                placed.append(hold)
                ever_placed += amount
                for each in (of_vault, of_key):
                    for line in each.values():
                        line[1] += amount
                room = limits.room(hold)
                if amount:  # so much more would have been let pass before it, and nothing beyond
                    for beyond in (0, 1):
                        exceeded = first_exceeded(of_vault, room + beyond) or first_exceeded(of_key, room + beyond)
                        assert bool(exceeded) == bool(beyond and (of_vault or of_key))
            case (int(which), cost) if placed:
                hold = placed.pop(which % len(placed))
                spent = min(cost, hold.amount)
                limits.close(capture(hold.event_id, hold.amount, Stroops(spent), DELIVERED))
                for each in (of_vault, of_keys.get(hold.charged.api_key_id, {})):
                    for line in each.values():
                        line[1] -= hold.amount - spent
            case int(others):
                ever_placed += others
                limits = limits.carried(ever_placed)
                placed.clear()  # whose they were is not known any more, and what comes back of them counts on
                for each, at_first in zip(everybodys, counted, strict=True):
                    for period, line in each.items():
                        line[1] = at_first[period] + ever_placed - 100
