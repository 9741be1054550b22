"""Money: two doors between stroops and text, exact in both directions, and rounding that says its name."""

from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from callora.ledger.money import (
    MAX_STROOPS,
    STROOPS_PER_USDC,
    Stroops,
    div_ceil,
    div_floor,
    format_usdc,
    parse_usdc,
)

quick = settings(max_examples=300, database=None)
amounts = st.integers(0, MAX_STROOPS).map(Stroops)


@quick
@given(amounts)
def test_every_amount_comes_back_from_its_text(amount: Stroops) -> None:
    assert parse_usdc(format_usdc(amount)) == amount


@quick
@given(amounts)
def test_the_text_names_the_same_number_as_decimal_arithmetic(amount: Stroops) -> None:
    assert Decimal(format_usdc(amount)) * STROOPS_PER_USDC == amount


@quick
@given(st.integers(0, 10**11), st.integers(0, 7), st.data())
def test_every_way_to_write_a_number_is_read_alike(whole: int, places: int, data: st.DataObject) -> None:
    digits = data.draw(st.integers(0, 10**places - 1))
    text = f"{whole}.{digits:0{places}d}" if places else str(whole)
    assert parse_usdc(text) == int(Decimal(text) * STROOPS_PER_USDC)


@quick
@given(st.text(alphabet="0123456789.-+e _,٣\n", max_size=24))
def test_a_text_is_read_as_decimal_reads_it_or_refused(text: str) -> None:
    try:
        amount = parse_usdc(text)
    except ValueError:
        return
    assert text.isascii()
    assert set(text) <= set("0123456789.")
    assert amount == Decimal(text) * STROOPS_PER_USDC
    assert 0 <= amount <= MAX_STROOPS


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "1 ", " 1", "+1", "-1", "-0", "01", "00", "1.", ".1", "1.12345678", "1e3", "0x1", "1_0", "1,0"),
        *("NaN", "inf", "1.0.0", "1\n", "\n1", "٣", "1.٣", "922337203685.4775808", "9999999999999"),
    ],
)
def test_what_is_not_a_plain_decimal_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        parse_usdc(text)


def test_the_largest_amount_is_the_largest_that_the_database_holds() -> None:
    assert parse_usdc("922337203685.4775807") == MAX_STROOPS == 2**63 - 1


@quick
@given(st.integers(-MAX_STROOPS, MAX_STROOPS))
def test_a_negative_entry_is_written_as_its_amount_with_a_sign(amount: int) -> None:
    assert Decimal(format_usdc(amount)) * STROOPS_PER_USDC == amount


@quick
@given(amounts, st.integers(1, 10**9))
def test_rounding_down_and_up_enclose_the_quotient_and_differ_by_one_at_most(amount: Stroops, divisor: int) -> None:
    down, up = div_floor(amount, divisor), div_ceil(amount, divisor)
    assert down * divisor <= amount <= up * divisor
    assert up - down == (1 if amount % divisor else 0)
