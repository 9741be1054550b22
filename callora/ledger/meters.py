"""Meters: count what of a stream passes, and stop it where the units held for it are used up.

Nothing is kept of what passes but where in a line it stands.
"""

import re
from typing import Final, Protocol

from callora.ledger.rating import UNIT_SIZES, RateCard

_LINE_END: Final = re.compile(rb"\r\n|\r|\n")
_DATA: Final = b"data:"
_NEARLY: Final = (4, 5)
"""Of what is held, what is used when more is to be asked for."""


class Meter(Protocol):
    """Counts one stream."""

    quantity: int
    """What has passed."""

    def take(self, data: bytes, units: int) -> int:
        """Return how many of these bytes pass where so many units are held, and count them."""
        ...

    def wants(self, waiting_bytes: int) -> int:
        """Return the units that what has passed and what waits would come to, as far as that is known; >= 0."""
        ...


def make_meter(card: RateCard) -> Meter:
    """Return the meter of a card whose quantity is a stream's."""
    assert card.source is not None
    return EventMeter() if card.source.part == "events" else ByteMeter(UNIT_SIZES[card.unit])


def is_nearly_used(used_units: int, held_units: int) -> bool:
    """Tell whether four fifths of what is held are used."""
    return used_units * _NEARLY[1] >= held_units * _NEARLY[0]


class ByteMeter:
    """Counts bytes."""

    __slots__ = ("_size", "quantity")

    def __init__(self, size: int) -> None:
        """Args:
        size: bytes of a unit.
        """
        self._size = size
        self.quantity = 0

    def take(self, data: bytes, units: int) -> int:
        """Return how many of these bytes pass where so many units are held, and count them."""
        taken = min(len(data), units * self._size - self.quantity)
        self.quantity += taken
        return taken

    def wants(self, waiting_bytes: int) -> int:
        """Return the units that all of it comes to."""
        return -(-(self.quantity + waiting_bytes) // self._size)


class EventMeter:
    """Counts server-sent events: those that a reader is told of. Comments and empty blocks are free.

    Source: HTML Living Standard §9.2.6. An event ends with an empty line, and passes whole or, once nothing is left for
    it, not at all.
    """

    __slots__ = ("_after_return", "_has_data", "_line", "quantity")

    def __init__(self) -> None:
        self.quantity = 0
        self._line = b""  # the beginning of the present line, as far as it tells its field
        self._has_data = False
        self._after_return = False

    def take(self, data: bytes, units: int) -> int:
        """Return how many of these bytes pass where so many units are held, and count the events that end in them."""
        if self.quantity >= units or not data:
            return 0
        position = 0
        if self._after_return and data[:1] == b"\n":
            position = 1  # the second half of a line's end that was counted
        self._after_return = False
        for match in _LINE_END.finditer(data, position):
            line = self._line + data[position : min(match.start(), position + len(_DATA))]
            position = match.end()
            self._after_return = match[0] == b"\r" and position == len(data)
            empty, self._line = not line, b""
            if not empty:
                self._has_data = self._has_data or line[: len(_DATA)] == _DATA or line == _DATA[:-1]
            elif self._has_data:
                self._has_data = False
                self.quantity += 1
                if self.quantity == units:
                    return position
        if position < len(data):
            self._line = (self._line + data[position : position + len(_DATA) + 1])[: len(_DATA) + 1]
        return len(data)

    def wants(self, waiting_bytes: int) -> int:
        """Return the events that have passed, and one more where something waits."""
        return self.quantity + (waiting_bytes > 0)
