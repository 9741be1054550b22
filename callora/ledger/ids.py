"""Ids: UUIDv7 made by the service, so that a row's id exists before its commit and can be looked up after it."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final, NewType

from callora.ledger.clock import Clock

VaultId = NewType("VaultId", str)
UserId = NewType("UserId", str)
DeveloperId = NewType("DeveloperId", str)
ApiKeyId = NewType("ApiKeyId", str)
TokenId = NewType("TokenId", str)
EventId = NewType("EventId", str)
HoldId = NewType("HoldId", str)
ApiId = NewType("ApiId", int)
EndpointId = NewType("EndpointId", int)

FIRST_ID: Final = EventId("00000000-0000-0000-0000-000000000000")
LAST_ID: Final = EventId("ffffffff-ffff-ffff-ffff-ffffffffffff")
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
MILLISECOND: Final = timedelta(milliseconds=1)
_MILLIS_MAX: Final = 2**48 - 1
_DATE_MILLIS_MAX: Final = (datetime.max.replace(tzinfo=UTC) - EPOCH) // MILLISECOND

_POOL_BYTES: Final = 4096
_ID_BYTES: Final = 10
_VARIANT: Final = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}


class Ids:
    """Makes UUIDv7 strings (RFC 9562 §5.7): 48 bits of milliseconds, then 74 random bits.

    Random bytes are drawn in blocks, because a system call for each id is a third of its cost.
    """

    __slots__ = ("_clock", "_millis", "_offset", "_pool", "_random_bytes", "_stamp")

    def __init__(self, clock: Clock, random_bytes: Callable[[int], bytes]) -> None:
        self._clock = clock
        self._random_bytes = random_bytes
        self._pool = ""
        self._offset = 0
        self._millis = -1
        self._stamp = ""

    def uuid7(self) -> str:
        """Return a new id in canonical form; ids made in different milliseconds sort by time."""
        offset = self._offset
        if offset >= len(self._pool):
            self._pool = self._random_bytes(_POOL_BYTES // _ID_BYTES * _ID_BYTES).hex()
            offset = 0
        self._offset = offset + 2 * _ID_BYTES
        noise = self._pool[offset : offset + 2 * _ID_BYTES]
        # Half a microsecond more, as a float of seconds may lie that much below its millisecond.
        millis = int(self._clock.timestamp() * 1000 + 0.0005)
        if millis != self._millis:
            digits = f"{millis:012x}"
            self._millis = millis
            self._stamp = f"{digits[:8]}-{digits[8:]}-7"
        return f"{self._stamp}{noise[:3]}-{_VARIANT[noise[3]]}{noise[4:7]}-{noise[8:]}"


def least_id_of(millis: int) -> EventId:
    """Return the least id of a millisecond since 1970; the first or the last id of all for what no id can tell."""
    digits = f"{min(max(0, millis), _MILLIS_MAX):012x}"
    return EventId(f"{digits[:8]}-{digits[8:]}-0000-0000-000000000000")


def least_id(moment: datetime) -> EventId:
    """Return the least id that can be made at a moment."""
    return least_id_of((moment - EPOCH) // MILLISECOND)


def millis_of(event_id: str) -> int:
    """Return when an id was made, in milliseconds since 1970."""
    return int(event_id[:8] + event_id[9:13], 16)


def made_at(event_id: str) -> datetime:
    """Return when an id was made, whole milliseconds; the last possible moment for what lies past it."""
    return EPOCH + min(millis_of(event_id), _DATE_MILLIS_MAX) * MILLISECOND
