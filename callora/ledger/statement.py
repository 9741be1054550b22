"""Where a line of a vault's statement stands among the others, so that a page ends somewhere and the next begins there.

Usage is known by the date inside its event's id (UUIDv7, milliseconds), entries by the microsecond they were booked.
Within one millisecond entries come before usage, the newest first in each.
"""

from datetime import UTC, datetime, timedelta
from typing import Final

import attrs

from callora.ledger.ids import EventId

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)
_ID_MILLIS_MAX: Final = 2**48 - 1
FIRST_ID: Final = EventId("00000000-0000-0000-0000-000000000000")
LAST_ID: Final = EventId("ffffffff-ffff-ffff-ffff-ffffffffffff")


@attrs.frozen(order=True)
class Position:
    """A place in a statement; of two, the newer is the greater."""

    millis: int
    """Since 1970."""
    event_id: str
    """Of usage; LAST_ID for an entry, which stands before the usage of its millisecond."""
    micros: int
    """Of an entry, since 1970; 0 for usage."""
    seq: int
    """Of an entry; 0 for usage."""


def entry_position(at: datetime, seq: int) -> Position:
    """Return where a ledger entry stands."""
    micros = (at - _EPOCH) // timedelta(microseconds=1)
    return Position(micros // 1000, LAST_ID, micros, seq)


def usage_position(event_id: str) -> Position:
    """Return where the usage of an event stands."""
    return Position(int(event_id[:8] + event_id[9:13], 16), event_id, 0, 0)


def usage_at(event_id: str) -> datetime:
    """Return when an event's call began: the date inside its id."""
    return _EPOCH + usage_position(event_id).millis * _MILLISECOND


def least_id(at: datetime) -> EventId:
    """Return what every id made at this millisecond or later is at least."""
    millis = min(max(0, -((_EPOCH - at) // _MILLISECOND)), _ID_MILLIS_MAX)
    digits = f"{millis:012x}"
    return EventId(f"{digits[:8]}-{digits[8:]}-0000-0000-000000000000")


@attrs.frozen
class Bound:
    """What is left to show after a position: usage below an id, entries before a date and number."""

    event_id: EventId
    at: datetime
    seq: int
    """Of the entries booked at exactly `at`, only those with a smaller number."""


def after(position: Position) -> Bound:
    """Return what comes after this line in a list that shows the newest first.

    Raises:
        OverflowError: the position is of no date.
    """
    if position.micros or position.seq:
        at = _EPOCH + timedelta(microseconds=position.micros)
        # The usage of the same millisecond is all still to come.
        return Bound(least_id(_EPOCH + (position.millis + 1) * _MILLISECOND), at, position.seq)
    return Bound(EventId(position.event_id), _EPOCH + position.millis * _MILLISECOND, 0)


def before_moment(at: datetime) -> Bound:
    """Return what is older than a moment."""
    return Bound(least_id(at), at, 0)


def earlier(one: Bound, other: Bound) -> Bound:
    """Return what lies within both bounds."""
    at, seq = min((one.at, one.seq), (other.at, other.seq))
    return Bound(min(one.event_id, other.event_id), at, seq)
