"""Tolls: a stream that is priced by what of it passes. More is held while it flows; it ends where nothing more can be.

Whatever has passed fits what is held at that moment, so what a stream comes to is never more than its hold.
"""

import json
from collections.abc import Awaitable, Callable
from typing import Final, Literal

from callora.http.gateway.rated import Rated
from callora.ledger.meters import Meter, is_nearly_used, make_meter
from callora.ledger.rating import affordable

EndReason = Literal["hold_exhausted", "max_charge"]
HoldMore = Callable[[int, str], Awaitable[bool]]
"""Holds as many units as this under a reference, and tells whether they are held."""
Capture = Callable[[], Awaitable[list[tuple[bytes, bytes]]]]
"""Captures what has passed, and returns the trailer fields that tell of it."""

_GROWTH_MAX: Final = 1_000_000
"""By how many times `held_units` a hold grows at once, at most."""


class Toll:
    """One stream on its way to the client."""

    __slots__ = (
        "_asked",
        "_capture",
        "_hold_more",
        "_meter",
        "_rated",
        "_refused",
        "delivered",
        "ended",
        "event_stream",
    )

    def __init__(self, rated: Rated, *, event_stream: bool, hold_more: HoldMore, capture: Capture) -> None:
        """Args:
        event_stream: whether the end can be told by an event.
        """
        self._rated = rated
        self._meter: Meter = make_meter(rated.card)
        self._hold_more = hold_more
        self._capture = capture
        self._asked = 0
        self._refused = False
        self.event_stream = event_stream
        self.ended: EndReason | None = None
        """Why nothing more passes."""
        self.delivered = 0
        """The quantity that was sent."""

    @property
    def quantity(self) -> int:
        """The quantity that has passed: sent, or about to be."""
        return self._meter.quantity

    async def pass_on(self, data: bytes) -> bytes:
        """Return what of these bytes may be sent now. All of them, or `ended` says why.

        Raises:
            StoreUnavailable, OutcomeUnknown: it is not known whether more is held.
        """
        rated, meter = self._rated, self._meter
        passed = meter.take(data, rated.units)
        while passed < len(data) or (not self._refused and is_nearly_used(meter.wants(0), rated.units)):
            if not await self._grow(meter.wants(len(data) - passed)):
                self._refused = True
                if passed < len(data):
                    self.ended = self._reason()
                break
            passed += meter.take(data[passed:], rated.units)
        return data if passed == len(data) else data[:passed]

    def sent(self) -> None:
        """Note that all that has passed was sent."""
        self.delivered = self._meter.quantity

    async def close(self) -> list[tuple[bytes, bytes]]:
        """Capture what has passed, before its end is released; return the trailer fields that tell of it."""
        return await self._capture()

    def last_words(self) -> bytes:
        """Return the event that tells why a stream of events ends before its end."""
        data = json.dumps({"reason": self.ended}, separators=(",", ":"))
        return f"\n\nevent: callora.end\ndata: {data}\n\n".encode()

    async def _grow(self, wanted_units: int) -> bool:
        """Hold more: as much as is wanted and a quarter of it more, in steps of what was held at first."""
        rated = self._rated
        step = rated.card.first_units
        steps = min(_GROWTH_MAX, max(1, -(-(wanted_units * 5 // 4 + 1 - rated.units) // step)))
        for count in dict.fromkeys((steps, 1)):
            units = min(rated.units + count * step, self._bound())
            self._asked += 1
            if units > rated.units and await self._hold_more(units, f"stream:{self._asked}"):
                return True
        return False

    def _bound(self) -> int:
        rated = self._rated
        return affordable(rated.card, rated.price, rated.card.units_max(rated.price), rated.cap)

    def _reason(self) -> EndReason:
        return "max_charge" if self._rated.cap is not None and self._rated.units >= self._bound() else "hold_exhausted"
