"""What a call is charged by: its quantity, read from the request before anything is held or from the answer before its
head is released, and the caller's own bound of what it may cost.
"""

from collections.abc import Callable
from typing import Final, TypeVar

import trio

from callora.http.gateway.admission import Offer, Refused
from callora.http.gateway.client import RequestBody
from callora.http.gateway.exchange import Exchange
from callora.http.gateway.heads import RequestHead
from callora.http.gateway.rated import Rated
from callora.ledger.money import Stroops, format_usdc, parse_usdc
from callora.ledger.rating import (
    QuantityUnreadable,
    RateCard,
    Source,
    Unit,
    affordable,
    find,
    quantity_in_field,
    quantity_of,
    read_document,
    units_of,
)

MAX_CHARGE: Final = b"x-callora-max-charge"
QUANTITY_BODY_BYTES_MAX: Final = 1_048_576
"""The largest body that a quantity is looked for in, and the largest that is held back to be measured."""
_THREAD_FROM_BYTES: Final = 65_536
"""A longer document is read in a thread: it takes milliseconds, in which nobody else's call should wait."""
_EVENT_STREAM: Final = b"text/event-stream"

T = TypeVar("T")


def is_event_stream(content_type: bytes | None) -> bool:
    """Tell whether an answer is one of server-sent events."""
    return (content_type or b"").lower().startswith(_EVENT_STREAM)


def max_charge(request: RequestHead) -> Stroops | None:
    """Return what the caller lets the call cost, None where he does not say.

    Raises:
        Refused: VALIDATION_ERROR.
    """
    values = request.values(MAX_CHARGE)
    if not values:
        return None
    try:
        if len(values) > 1:
            raise ValueError("must be sent once")
        return parse_usdc(values[0].decode("latin-1"))
    except ValueError as error:
        raise _wrong("header.X-Callora-Max-Charge", str(error), "INVALID_FORMAT") from None


def check_cap(cap: Stroops | None, required: int) -> None:
    """Return where the caller lets a call cost what it will cost at least.

    Raises:
        Refused: MAX_CHARGE_EXCEEDED.
    """
    if cap is not None and required > cap:
        details = {"required": format_usdc(required), "maxCharge": format_usdc(cap)}
        raise Refused("MAX_CHARGE_EXCEEDED", details=details)


def rate(offer: Offer, card: RateCard, cap: Stroops | None, units: int | None) -> Rated:
    """Return what is to be held for a call.

    Args:
        units: what the request says; None where only the answer does.

    Raises:
        Refused: MAX_CHARGE_EXCEEDED; VALIDATION_ERROR where one call may not come to so much.
    """
    price = offer.price.amount
    bound = card.units_max(price)
    if units is None:
        check_cap(cap, card.min_units * price)
        return Rated(card, price, cap, affordable(card, price, min(card.first_units, bound), cap))
    if units > bound:
        assert card.source is not None
        raise _wrong(field_of(card.source), f"must come to at most {bound} units in one call", "TOO_LARGE")
    check_cap(cap, units * price)
    return Rated(card, price, cap, units)


async def request_units(
    card: RateCard, request: RequestHead, body: RequestBody, whole_body: bytes, limit_bytes: int
) -> tuple[int | None, bytes]:
    """Return the units that a request says it is, None where only the answer tells, and its body as far as it was read.

    Args:
        whole_body: the body where it was read before.
        limit_bytes: the largest body that is read here.

    Raises:
        Refused: VALIDATION_ERROR, which names the field, or REQUEST_BODY_TOO_LARGE.
        BadBody, ClientGone: the request is not complete and will not be.
    """
    source = card.source
    if source is None:
        return 1, whole_body
    if source.side != "request":
        return None, whole_body
    try:
        if source.part == "header":
            quantity = quantity_in_field(request.values(source.name.lower().encode("ascii")))
        elif source.part == "bytes" and not request.chunked:
            quantity = request.content_length
        else:
            if not body.done:
                whole_body = await _read_whole(body, limit_bytes)
            elif source.part == "json" and len(whole_body) > limit_bytes:
                raise _too_large(limit_bytes)
            quantity = len(whole_body)
            if source.part == "json":
                quantity = await _found_in(card.unit, source, whole_body)
    except QuantityUnreadable as error:
        raise _wrong(field_of(source), str(error), "INVALID_VALUE") from None
    return units_of(card, quantity), whole_body


async def answer_units(card: RateCard, exchange: Exchange) -> int:
    """Return the units that an answer says the call is; what must be read of its body is kept for its release.

    Raises:
        QuantityUnreadable: it does not say.
        UpstreamFailed, UpstreamTimedOut, ClientGone, BadBody: nothing was released.
    """
    source, answer = card.source, exchange.answer
    assert source is not None
    if source.part == "header":
        return units_of(card, quantity_in_field(answer.values(source.name.lower().encode("ascii"))))
    if source.part == "bytes" and answer.content_length is not None:
        return units_of(card, 0 if exchange.bodiless else answer.content_length)
    if is_event_stream(answer.first(b"content-type")):
        raise QuantityUnreadable("must not be a stream")
    body = await exchange.read_body(QUANTITY_BODY_BYTES_MAX)
    if body is None:
        raise QuantityUnreadable(f"must be at most {QUANTITY_BODY_BYTES_MAX} bytes")
    if source.part == "bytes":
        return units_of(card, len(body))
    return units_of(card, await _found_in(card.unit, source, body))


async def _found_in(unit: Unit, source: Source, body: bytes) -> int | None:
    def read() -> int | None:
        return quantity_of(unit, find(read_document(body), source.name))

    return await _beside(read) if len(body) >= _THREAD_FROM_BYTES else read()


async def _beside(work: Callable[[], T]) -> T:
    return await trio.to_thread.run_sync(work)


async def _read_whole(body: RequestBody, limit_bytes: int) -> bytes:
    read = await body.read(limit_bytes)
    if read is None:
        raise _too_large(limit_bytes)
    return read


def field_of(source: Source) -> str:
    """Return the field of the request that a quantity is read from, as error documents name it: `body.urls[0]`."""
    if source.part == "header":
        return f"header.{source.name}"
    path = "body"
    for token in source.name.split("/")[1:]:
        name = token.replace("~1", "/").replace("~0", "~")
        path += f"[{name}]" if name.isdecimal() else f".{name}"
    return path


def _too_large(limit_bytes: int) -> Refused:
    message = f"This endpoint is charged by what its body says, of at most {limit_bytes} bytes; split the request"
    return Refused("REQUEST_BODY_TOO_LARGE", message, close=True)


def _wrong(field: str, message: str, code: str) -> Refused:
    return Refused(
        "VALIDATION_ERROR", details=[{"field": field, "message": message[:1].upper() + message[1:], "code": code}]
    )
