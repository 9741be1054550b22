"""Where a line of a vault's statement stands among the others, so that a page ends somewhere and the next begins there.

Usage is known by the date inside its event's id (UUIDv7, milliseconds), entries by the microsecond they were booked.
Within one millisecond entries come before usage, the newest first in each.
"""

from datetime import datetime, timedelta

import attrs

from callora.ledger.ids import EPOCH, LAST_ID, MILLISECOND, EventId, least_id_of, millis_of


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
    micros = (at - EPOCH) // timedelta(microseconds=1)
    return Position(micros // 1000, LAST_ID, micros, seq)


def usage_position(event_id: str) -> Position:
    """Return where the usage of an event stands."""
    return Position(millis_of(event_id), event_id, 0, 0)


def id_from(at: datetime) -> EventId:
    """Return what the ids of milliseconds that begin at a moment or later are at least."""
    return least_id_of(-((EPOCH - at) // MILLISECOND))


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
        at = EPOCH + timedelta(microseconds=position.micros)
        # The usage of the same millisecond is all still to come.
        return Bound(least_id_of(position.millis + 1), at, position.seq)
    return Bound(EventId(position.event_id), EPOCH + position.millis * MILLISECOND, 0)


def before_moment(at: datetime) -> Bound:
    """Return what is older than a moment."""
    return Bound(id_from(at), at, 0)


def earlier(one: Bound, other: Bound) -> Bound:
    """Return what lies within both bounds."""
    at, seq = min((one.at, one.seq), (other.at, other.seq))
    return Bound(min(one.event_id, other.event_id), at, seq)
