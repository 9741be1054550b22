"""Rating: quantities as they are read, the units they are, and what those cost of what is held."""

import json
from decimal import Decimal
from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from callora.ledger.money import Stroops
from callora.ledger.rating import (
    CARD_COLUMNS,
    CHARGE_MAX,
    CREDITS_MAX,
    QUANTITY_MAX,
    QuantityUnreadable,
    RateCard,
    Source,
    affordable,
    card_values,
    charge,
    find,
    make_card,
    quantity_in_field,
    quantity_of,
    read_document,
    units_of,
)

quick = settings(max_examples=300, database=None)
CALL = RateCard(unit_credits=1)
CHARS = RateCard("started_1000_chars", 1, source=Source("request", "json", "/text"))
MINUTES = RateCard("started_minute", 10, held_units=2, source=Source("response", "json", "/duration"))


def read(text: str, pointer: str, card: RateCard = MINUTES) -> int:
    """Return the units that a document says."""
    return units_of(card, quantity_of(card.unit, find(read_document(text.encode()), pointer)))


@pytest.mark.parametrize(("length", "units"), [(0, 1), (1, 1), (1000, 1), (1001, 2), (2000, 2), (2001, 3)])
def test_a24_started_thousands_of_characters_count_whole_and_none_counts_as_one(length: int, units: int) -> None:
    assert read(json.dumps({"text": "ü" * length}), "/text", CHARS) == units


@pytest.mark.parametrize(
    ("seconds", "minutes"),
    [
        ("60", 1),
        ("61", 2),
        ("60.0", 1),
        ("60.000000000000000000000000000000000001", 2),
        ("6e1", 1),
        ("0", 1),
        ("0.1", 1),
    ],
)
def test_a24_started_minutes_count_whole_to_the_last_digit(seconds: str, minutes: int) -> None:
    assert read(f'{{"duration": {seconds}}}', "/duration") == minutes


@pytest.mark.parametrize("text", ["{}", '{"duration": null}', "[]", '"text"', "7"])
def test_a24_a_duration_that_is_absent_is_the_least(text: str) -> None:
    assert read(text, "/duration") == 1


@pytest.mark.parametrize(
    "value",
    [
        "-1",
        "-0.001",
        "true",
        '"61"',
        "{}",
        "1e16",
        "1e999999999999999999999",
        "9" * 5000,
        "NaN",
        "Infinity",
        "-Infinity",
    ],
)
def test_what_is_no_quantity_is_refused_and_never_guessed(value: str) -> None:
    with pytest.raises(QuantityUnreadable):
        read(f'{{"duration": {value}}}', "/duration")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no",
        b'{"urls": [1]',
        b'{"urls": [1, 2, 3], "urls": [1]}',
        b'{"a": {"b": 1, "b": 2}}',
        '{"urls": []}'.encode("utf-16"),
        b"\xef\xbb\xbf{}",
        b'{"urls": "\xff"}',
        b"[" * 100_000,
    ],
)
def test_a_document_that_can_be_read_in_no_way_or_in_two_is_refused(body: bytes) -> None:
    with pytest.raises(QuantityUnreadable):
        read_document(body)


def test_a_pointer_leads_where_rfc_6901_says() -> None:
    text = '{"a": {"b/c": [10, {"~": 3}]}, "": 4, "list": [1, 2], "1": 5}'
    document = read_document(text.encode())
    assert find(document, "") is document
    assert [find(document, at) for at in ("/a/b~1c/0", "/a/b~1c/1/~0", "/", "/1")] == list(
        map(Decimal, ["10", "3", "4", "5"])
    )
    assert quantity_of("url", find(document, "/list")) == 2
    for nowhere in ("/a/x", "/list/2", "/list/01", "/list/-", "/1/2", "/a/b~1c/x"):
        assert find(document, nowhere) is None


@pytest.mark.parametrize(("value", "quantity"), [(b"61", 61), (b"61.5", 62), (b"0", 0), (b"007", 7)])
def test_a_header_field_is_a_plain_decimal_number(value: bytes, quantity: int) -> None:
    assert quantity_in_field([value]) == quantity


@pytest.mark.parametrize("values", [[b"1", b"2"], [b""], [b"-1"], [b"1e3"], [b"1,5"], [b"0x10"], [b"9" * 16], [b"nan"]])
def test_a_header_field_that_is_another_is_refused(values: list[bytes]) -> None:
    with pytest.raises(QuantityUnreadable):
        quantity_in_field(values)


def test_a_header_field_that_is_absent_says_nothing() -> None:
    assert quantity_in_field([]) is None


@quick
@given(st.decimals(0, QUANTITY_MAX, allow_nan=False), st.sampled_from([CHARS, MINUTES]))
def test_units_are_the_quantity_divided_exactly_and_rounded_up_once(quantity: Decimal, card: RateCard) -> None:
    size = 60 if card is MINUTES else 1000
    assert units_of(card, quantity_of(card.unit, quantity)) == max(1, ceil(Fraction(quantity) / size))


@quick
@given(
    st.text().filter(lambda text: text.isprintable()),
    st.sampled_from(["request.json:/", "response.json:/", "request.header:", "response.header:", "", "stream."]),
)
def test_a_source_is_written_as_it_is_read(text: str, start: str) -> None:
    try:
        source = Source.parse(start + text)
    except ValueError:
        return
    assert str(source) == start + text
    assert Source.parse(str(source)) == source


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "request",
            "request.json",
            "request.json:urls",
            "request.json:/a~2",
            "request.header:",
            "request.header:a b",
        ),
        *("request.events", "stream.json:/a", "stream.bytes2", "answer.bytes", "request.json:/" + "a" * 200),
        "request.json:/a\n",
    ],
)
def test_what_names_no_source_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        Source.parse(text)


JSON = Source("request", "json", "/urls")


@pytest.mark.parametrize(
    "card",
    [
        RateCard("url"),
        RateCard(source=JSON),
        RateCard(min_units=2),
        RateCard(max_units=1),
        RateCard("url", held_units=1, source=JSON),
        RateCard("started_minute", source=MINUTES.source),
        RateCard("started_minute", min_units=3, held_units=2, source=MINUTES.source),
        RateCard("url", min_units=3, max_units=2, source=JSON),
        RateCard("started_minute", held_units=3, max_units=2, source=MINUTES.source),
        RateCard("url", source=Source("request", "bytes")),
        RateCard("byte", held_units=1, source=Source("stream", "events")),
        RateCard("byte", held_units=10**9, source=Source("stream", "bytes")),
        RateCard("byte", 10**6, held_units=10**9, source=Source("stream", "bytes")),
    ],
)
def test_what_does_not_fit_together_is_told(card: RateCard) -> None:
    assert card.wrong(Stroops(100_000))


@pytest.mark.parametrize(
    "card",
    [
        CALL,
        CHARS,
        MINUTES,
        RateCard("url", min_units=2, max_units=2, source=JSON),
        RateCard("byte", held_units=10**8, source=Source("stream", "bytes")),
        RateCard("unit", held_units=10, source=Source("stream", "events")),
        RateCard("started_1000_chars", source=Source("request", "bytes")),
    ],
)
def test_what_fits_together_is_written_and_read_back(card: RateCard) -> None:
    assert card.wrong(Stroops(100_000)) == []
    assert make_card(*card_values(card)) == card
    assert len(card_values(card)) == len(CARD_COLUMNS)


def test_a_call_at_no_credits_is_the_plain_price() -> None:
    assert make_card(*card_values(None)) is None
    assert make_card("call", 0, 1, None, None, None) is None


prices = st.integers(0, 10**7).map(Stroops)
credited = st.sampled_from([0, 1, 3, 10])


@quick
@given(prices, credited, st.integers(1, 10**4), st.integers(0, 10**4), st.data())
def test_what_is_captured_is_never_more_than_is_held_and_every_unit_is_paid_once(
    price: Stroops, unit_credits: int, held_units: int, units: int, data: st.DataObject
) -> None:
    card = RateCard("url", unit_credits, source=JSON)
    held_credits = data.draw(st.integers(0, held_units)) * unit_credits
    held = charge(card, price, held_units, held_credits)
    taken = charge(card, price, min(units, held_units), held_credits)
    assert held.credits == held_credits
    assert 0 <= taken.amount <= held.amount
    assert 0 <= taken.credits <= held.credits
    in_credits = taken.credits // unit_credits if unit_credits else 0
    assert taken.amount == (taken.units - in_credits) * price
    assert taken.credits == in_credits * unit_credits
    # Credits first: money moves only for what they do not cover.
    assert taken.amount == 0 or price == 0 or taken.credits == held.credits


@quick
@given(prices, st.integers(1, 10**4), st.one_of(st.none(), st.integers(0, 10**9).map(Stroops)))
def test_a_caller_s_cap_is_never_held_past(price: Stroops, units: int, cap: Stroops | None) -> None:
    bounded = affordable(CHARS, price, units, cap)
    assert 0 <= bounded <= units
    if cap is None or not price:
        assert bounded == units
    else:
        assert bounded * price <= cap
        assert bounded == units or (bounded + 1) * price > cap


@quick
@given(prices, credited, st.one_of(st.none(), st.integers(1, 10**12)))
def test_a_call_never_costs_more_than_a_call_may(price: Stroops, unit_credits: int, max_units: int | None) -> None:
    card = RateCard("url", unit_credits, max_units=max_units, source=JSON)
    most = card.units_max(price)
    assert max_units is None or most <= max_units
    assert most * price <= CHARGE_MAX
    assert most * unit_credits <= CREDITS_MAX
