"""Following a contract's events: which ledgers a page covers, and whether a node still tells the same history. Pure.

An event's id begins with the number of its ledger (SEP-35: ledger, transaction and operation in one 64-bit number), and
so does the cursor behind a page.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Final, Literal

import attrs

from callora.ledger.chain import ChainEvent, EventPage, Head, VaultEvent

BEHIND_LEDGERS_MAX: Final = 17_280
"""A day of ledgers at five seconds. A node that is further behind what was seen is no stale node: it has another
history, whose clock was set back."""
_LEDGER_SHIFT: Final = 32


def ledger_of(position: str) -> int:
    """Return the ledger that an event's id or a page's cursor lies in.

    Raises:
        ValueError: it is neither.
    """
    number, dash, _ = position.partition("-")
    if not dash or not number.isascii() or not number.isdecimal():
        raise ValueError(f"not a position among events: {position[:40]!r}")
    return int(number) >> _LEDGER_SHIFT


def event_ref(network: str, epoch: int, event_id: str) -> str:
    """Return the reference under which a deposit event is credited, once and for ever."""
    return f"{ref_prefix(network, epoch)}{event_id}"


def ref_prefix(network: str, epoch: int) -> str:
    """Return what every reference of a network's history begins with."""
    return f"{network}:{epoch}:"


@attrs.frozen
class Seen:
    """How far the events of a network's history were followed."""

    ledger: int
    """Every ledger up to this one was looked at; 0 before the first."""
    cursor: str | None
    """Where the next page begins; None: at the ledger after `ledger`."""
    seen_ledger: int
    """The newest ledger that any node told of; 0 before the first."""
    closed_at: datetime | None
    """When that one closed; None before the first."""


def same_history(seen: Seen, head: Head) -> bool:
    """Tell whether a node's latest ledger can belong to the history that was followed so far.

    Closing times never fall as ledger numbers grow. So a node that is behind shows an earlier time, and is merely
    stale; one with an earlier number and a later time, or the other way round, tells of another history.
    """
    if seen.closed_at is None:
        return True
    if head.sequence == seen.seen_ledger:
        return head.closed_at == seen.closed_at
    if head.sequence < seen.seen_ledger:
        return head.closed_at <= seen.closed_at and seen.seen_ledger - head.sequence <= BEHIND_LEDGERS_MAX
    return head.closed_at >= seen.closed_at


def after_page(seen: Seen, page: EventPage, limit: int) -> Seen:
    """Return how far a page leads; never back.

    Args:
        limit: how many events were asked for; a page with as many may end in the middle of a ledger.
    """
    head = page.retained.latest
    if head.sequence > seen.seen_ledger:
        seen = attrs.evolve(seen, seen_ledger=head.sequence, closed_at=head.closed_at)
    reached = min(ledger_of(page.cursor) - (len(page.events) >= limit), seen.seen_ledger)
    if reached < seen.ledger or (seen.cursor is not None and page.cursor <= seen.cursor):
        return seen
    return attrs.evolve(seen, ledger=reached, cursor=page.cursor)


def missing_before(seen: Seen, oldest: int) -> tuple[int, int] | None:
    """Return the first and the last ledger that no node has any more and that were not looked at; None for none.

    Before anything was seen nothing is missing: what came before is not this service's.
    """
    if seen.ledger == 0 or seen.ledger + 1 >= oldest:
        return None
    return seen.ledger + 1, oldest - 1


def events_after(events: Sequence[ChainEvent], cursor: str | None) -> Sequence[ChainEvent]:
    """Return the events behind a cursor, each once, in order: pages may overlap and repeat."""
    by_id = {event.event_id: event for event in events if cursor is None or event.event_id > cursor}
    return [by_id[event_id] for event_id in sorted(by_id)]


MOVES: Final[dict[str, Literal[-1, 0, 1]]] = {
    "deposit": 1,
    "withdraw": -1,
    "withdraw_to": -1,
    "deduct": -1,
    "distribute": 0,
}
"""How an event moves the balance that the contract keeps count of. `distribute` pays out tokens past that count."""


def opening_of(events: Sequence[VaultEvent]) -> int | None:
    """Return what the contract had before the first of these events; None where none of them says.

    Every event of one transaction may carry the balance that its last one left (`batch_deduct` does).
    """
    moving = [event for event in events if MOVES[event.kind]]
    if not moving or moving[0].balance_after is None:
        return None
    first = [event for event in moving if event.tx_hash == moving[0].tx_hash]
    left = first[-1].balance_after
    assert left is not None, "events of one transaction are alike"
    return left - sum(MOVES[event.kind] * event.amount for event in first)
