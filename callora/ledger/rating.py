"""Rating: how many units a call is, what is held for them before they are known, and what of that is charged.

Quantities are whole and never pass through a float: what is read is rounded up once, to a whole number, and then to
whole units, which gives the same as rounding once would. A unit is paid in credits or in money, never in both.
"""

import json
import math
import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, Final, Literal, NoReturn, cast

import attrs

from callora.ledger.money import Stroops
from callora.ledger.values import value

Unit = Literal["call", "unit", "url", "started_minute", "started_1000_chars", "byte"]
Side = Literal["request", "response", "stream"]
Part = Literal["json", "header", "bytes", "events"]

UNIT_SIZES: Final[Mapping[Unit, int]] = {
    "call": 1,
    "unit": 1,
    "url": 1,
    "started_minute": 60,
    "started_1000_chars": 1000,
    "byte": 1,
}
"""How much of a quantity one unit is: seconds, characters, or what is counted itself."""
UNIT_CREDITS_MAX: Final = 1_000_000
UNITS_MAX: Final = 10**12
"""Units of one call."""
CHARGE_MAX: Final = Stroops(10**13)
"""What one call may cost: a million USDC."""
CREDITS_MAX: Final = 10**12
"""What one call may cost in credits."""
QUANTITY_MAX: Final = 10**15
SOURCE_CHARS_MAX: Final = 200

_SOURCE: Final = re.compile(
    r"(?P<side>request|response)\.(?:(?P<bytes>bytes)|json:(?P<pointer>(?:/(?:[^~/]|~[01])*)*)"
    r"|header:(?P<header>[!#$%&'*+.^_`|~0-9A-Za-z-]+))|stream\.(?P<flow>bytes|events)",
    re.ASCII,
)
_NUMBER: Final = re.compile(rb"[0-9]{1,15}(?:\.[0-9]{1,9})?")


class QuantityUnreadable(ValueError):
    """What stands where a quantity is to be read is none; the message ends a sentence that begins with its place."""


@attrs.frozen(slots=True)
class Source:
    """Where a quantity is read."""

    side: Side
    part: Part
    name: str = ""
    """The JSON pointer (RFC 6901), or the field's name as written."""

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Return the source that a text such as `request.json:/urls` names.

        Raises:
            ValueError: none does; the message ends a sentence.
        """
        match = _SOURCE.fullmatch(text) if len(text) <= SOURCE_CHARS_MAX and text.isprintable() else None
        if match is None:
            raise ValueError(
                "must be request.json:/pointer, request.header:Name, request.bytes, the same of response, stream.bytes"
                f" or stream.events, of at most {SOURCE_CHARS_MAX} characters"
            )
        if match["flow"] is not None:
            return cls("stream", cast(Part, match["flow"]))
        side = cast(Side, match["side"])
        if match["bytes"] is not None:
            return cls(side, "bytes")
        if match["header"] is not None:
            return cls(side, "header", match["header"])
        return cls(side, "json", match["pointer"])

    def __str__(self) -> str:
        return f"{self.side}.{self.part}:{self.name}" if self.part in ("json", "header") else f"{self.side}.{self.part}"


@attrs.frozen(slots=True)
class RateCard:
    """What a price is the price of. The plain one, a call at no credits, is written None."""

    unit: Unit = "call"
    unit_credits: int = 0
    """What a unit costs where a quota pays; 0: money alone pays."""
    min_units: int = 1
    """What a call comes to at least."""
    held_units: int | None = None
    """What is held before the answer tells the quantity; None where the request tells it."""
    max_units: int | None = None
    """What one call may come to."""
    source: Source | None = None
    """Where the quantity is read; None for the unit `call`."""

    @property
    def first_units(self) -> int:
        """What is held at first where the request does not say more."""
        return self.min_units if self.held_units is None else self.held_units

    def units_max(self, price: Stroops) -> int:
        """Return what one call may come to at this price: bounded by the card, and by what a call may cost."""
        bound = UNITS_MAX if self.max_units is None else self.max_units
        if price:
            bound = min(bound, CHARGE_MAX // price)
        if self.unit_credits:
            bound = min(bound, CREDITS_MAX // self.unit_credits)
        return bound

    def wrong(self, price: Stroops) -> list[str]:
        """Return what does not fit together, each as a sentence's end; the database refuses the same."""
        wrong = []
        source, held = self.source, self.held_units
        if (self.unit == "call") != (source is None):
            wrong.append("must have quantity_from, unless its unit is call")
        if self.unit == "call" and (self.min_units != 1 or self.max_units is not None):
            wrong.append("must not have min_units or max_units where its unit is call")
        told_late = source is not None and source.side != "request"
        if told_late and held is None:
            wrong.append("must have held_units where the answer tells the quantity")
        elif not told_late and held is not None:
            wrong.append("must not have held_units unless the answer tells the quantity")
        if held is not None and held < self.min_units:
            wrong.append("must have held_units of at least min_units")
        if self.max_units is not None and self.max_units < self.first_units:
            wrong.append("must have max_units of at least min_units and held_units")
        if source is not None and source.part == "bytes" and self.unit not in ("byte", "started_1000_chars"):
            wrong.append("must count bytes as byte or started_1000_chars")
        if source is not None and source.part == "events" and self.unit != "unit":
            wrong.append("must count events as unit")
        if price * self.first_units > CHARGE_MAX or self.unit_credits * self.first_units > CREDITS_MAX:
            wrong.append("must hold at most 1000000 USDC and 1000000000000 credits at first")
        return wrong


def make_card(
    unit: str,
    unit_credits: int,
    min_units: int,
    held_units: int | None,
    max_units: int | None,
    quantity_from: str | None,
) -> RateCard | None:
    """Return the card of these columns, None for the plain one.

    Raises:
        ValueError: `quantity_from` names no source.
    """
    if unit == "call" and not unit_credits and quantity_from is None and (min_units, held_units, max_units) == _PLAIN:
        return None
    source = None if quantity_from is None else Source.parse(quantity_from)
    return RateCard(cast(Unit, unit), unit_credits, min_units, held_units, max_units, source)


_PLAIN: Final = (1, None, None)
CARD_COLUMNS: Final = ("unit", "unit_credits", "min_units", "held_units", "max_units", "quantity_from")


def card_values(card: RateCard | None) -> tuple[str, int, int, int | None, int | None, str | None]:
    """Return what CARD_COLUMNS hold of a card."""
    if card is None:
        return ("call", 0, *_PLAIN, None)
    source = None if card.source is None else str(card.source)
    return card.unit, card.unit_credits, card.min_units, card.held_units, card.max_units, source


# --- quantities -------------------------------------------------------------------------------------------------------


def _decimal(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation:
        raise QuantityUnreadable("must be JSON whose numbers can be counted with") from None


def _constant(_: str) -> NoReturn:
    raise QuantityUnreadable("must be JSON, which has neither NaN nor Infinity")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise QuantityUnreadable("must be JSON that names each member once: what it says must be read in one way")
    return found


def read_document(body: bytes) -> object:
    """Return a JSON document, its numbers as Decimal.

    A document that two readers could read as two quantities is refused: it would be charged as one and served as the
    other.

    Raises:
        QuantityUnreadable.
    """
    try:
        return json.loads(
            body.decode("utf-8"),
            parse_int=_decimal,
            parse_float=_decimal,
            parse_constant=_constant,
            object_pairs_hook=_object,
        )
    except QuantityUnreadable:
        raise
    except (ValueError, RecursionError):
        raise QuantityUnreadable("must be JSON in UTF-8") from None


def find(document: object, pointer: str) -> object:
    """Return what a JSON pointer leads to; None where there is nothing, as for null. Source: RFC 6901 §4."""
    found = document
    for token in pointer.split("/")[1:]:
        name = token.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict):
            found = found.get(name)
        elif isinstance(found, list) and re.fullmatch(r"0|[1-9][0-9]{0,8}", name, re.ASCII):
            found = found[int(name)] if int(name) < len(found) else None
        else:
            return None
    return found


def quantity_of(unit: Unit, found: object) -> int | None:
    """Return the quantity that something in a document is: an array's length, a number itself, rounded up, a text's
    characters where those are counted; None for nothing.

    Raises:
        QuantityUnreadable.
    """
    if found is None:
        return None
    if isinstance(found, list):
        return len(found)
    if isinstance(found, str) and unit == "started_1000_chars":
        return len(found)
    if not isinstance(found, Decimal):
        what = "an array, a number or a text" if unit == "started_1000_chars" else "an array or a number"
        raise QuantityUnreadable(f"must be {what}")
    if not 0 <= found <= QUANTITY_MAX:
        raise QuantityUnreadable(f"must be a number from 0 to {QUANTITY_MAX}")
    return math.ceil(found)


def quantity_in_field(values: list[bytes]) -> int | None:
    """Return the quantity that a header field says, rounded up; None where it is absent.

    Raises:
        QuantityUnreadable: it is no plain decimal number, or stands there twice.
    """
    if not values:
        return None
    if len(values) > 1 or _NUMBER.fullmatch(values[0]) is None:
        raise QuantityUnreadable("must be one decimal number, such as 61.5")
    return math.ceil(Decimal(values[0].decode("ascii")))


def units_of(card: RateCard, quantity: int | None) -> int:
    """Return the units that a quantity is: every unit begun is whole, and there are `min_units` at least.

    Args:
        quantity: >= 0; None where nothing tells it.
    """
    return max(card.min_units, -(-(quantity or 0) // UNIT_SIZES[card.unit]))


# --- what they cost ---------------------------------------------------------------------------------------------------


@value
class Charge:
    """What units cost."""

    units: int
    amount: Stroops
    """stroops, >= 0."""
    credits: int


def charge(card: RateCard, price: Stroops, units: int, held_credits: int) -> Charge:
    """Return what units cost, those first that the credits held for the call cover: they cost no money.

    Of the units held it is what is held; of fewer it is what is captured, which is never more of either.

    Args:
        price: of a unit.
        held_credits: a multiple of the card's `unit_credits`, 0 where money alone pays.
    """
    covered = min(units, held_credits // card.unit_credits) if card.unit_credits else 0
    return Charge(units, Stroops((units - covered) * price), covered * card.unit_credits)


def affordable(card: RateCard, price: Stroops, units: int, cap: Stroops | None) -> int:
    """Return how many of these units a caller's cap lets be held, as if money paid for all of them."""
    return units if cap is None or not price else min(units, cap // price)
