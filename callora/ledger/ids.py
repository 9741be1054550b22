"""Ids: UUIDv7 made by the service, so that a row's id exists before its commit and can be looked up after it."""

from collections.abc import Callable
from typing import Final, NewType

from callora.ledger.clock import Clock

VaultId = NewType("VaultId", str)
UserId = NewType("UserId", str)
DeveloperId = NewType("DeveloperId", str)
ApiKeyId = NewType("ApiKeyId", str)
EventId = NewType("EventId", str)
ApiId = NewType("ApiId", int)
EndpointId = NewType("EndpointId", int)

_POOL_BYTES: Final = 4096
_ID_BYTES: Final = 10


class Ids:
    """Makes UUIDv7 strings (RFC 9562 §5.7): 48 bits of milliseconds, then 74 random bits.

    Random bytes are drawn in blocks, because a system call for each id is a third of its cost.
    """

    __slots__ = ("_clock", "_offset", "_pool", "_random_bytes")

    def __init__(self, clock: Clock, random_bytes: Callable[[int], bytes]) -> None:
        self._clock = clock
        self._random_bytes = random_bytes
        self._pool = ""
        self._offset = 0

    def uuid7(self) -> str:
        """Return a new id in canonical form; ids made in different milliseconds sort by time."""
        offset = self._offset
        if offset >= len(self._pool):
            self._pool = self._random_bytes(_POOL_BYTES // _ID_BYTES * _ID_BYTES).hex()
            offset = 0
        self._offset = offset + 2 * _ID_BYTES
        noise = self._pool[offset : offset + 2 * _ID_BYTES]
        millis = int(self._clock.now().timestamp() * 1000)
        variant = "89ab"[int(noise[3], 16) & 3]
        stamp = f"{millis:012x}"
        return f"{stamp[:8]}-{stamp[8:]}-7{noise[:3]}-{variant}{noise[4:7]}-{noise[8:20]}"
