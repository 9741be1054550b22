"""The listener: follows the vault contract's events with a stored cursor, notes what moved money, and has it booked.

The cursor is moved in the database transaction that notes what lies before it, and only from where it was read. So two
listeners are harmless, a crash repeats at most the reading, and overlapping or repeated pages change nothing.

What no node has any more is a gap: stored, told, and passed over. What tells of another history (a test network that
began anew, another contract) halts everything: nothing is noted or credited until an operator begins a new epoch.
"""

from collections.abc import Sequence
from typing import Final, Literal

import attrs
import trio
from structlog.typing import FilteringBoundLogger

from callora.actors.booking import Booking
from callora.actors.onchain import OnChain
from callora.ledger.chain import ChainEvent, EventPage, Head, OutsideRange, VaultEvent
from callora.ledger.clock import Clock
from callora.ledger.faults import CalloraFault, ChainMismatch
from callora.ledger.watching import Seen, after_page, events_after, missing_before, opening_of, same_history
from callora.metrics import Metrics
from callora.store import chain as store
from callora.store.bridge import Database
from callora.store.chain import WatchedNetwork

PAGE_EVENTS: Final = 1000
"""More than any one transaction can have, so that the first page holds its first transaction whole."""


Step = Literal["moved", "more", "caught_up", "lost", "halted"]
"""What a look at the chain came to: the cursor moved; there is more at once; nothing new; another listener was first;
nothing is noted until an operator has looked."""


class Listener:
    """One task that follows one network."""

    def __init__(
        self,
        chain: OnChain,
        database: Database,
        booking: Booking,
        clock: Clock,
        metrics: Metrics,
        log: FilteringBoundLogger,
        *,
        interval_seconds: float,
        page_events: int = PAGE_EVENTS,
    ) -> None:
        self._chain = chain
        self._database = database
        self._booking = booking
        self._clock = clock
        self._metrics = metrics
        self._log = log
        self._interval_seconds = interval_seconds
        self._page_events = page_events
        self._moved = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look at the chain every interval until cancelled; a look that fails is made up for by the next."""
        task_status.started()
        while True:
            again = False
            try:
                again = await self.look() == "more"
            except CalloraFault as fault:
                self._log.warning("listening_failed", error=str(fault))
            try:
                await self._booking.book_all(self._chain.network)
            except CalloraFault as fault:
                self._log.warning("booking_failed", error=str(fault))
            if not again:
                await trio.sleep(self._interval_seconds)

    async def look(self) -> Step:
        """Note the next page of events.

        Raises:
            ChainUnavailable, StoreUnavailable: nothing was noted. OutcomeUnknown: the next look tells.

        Cancellation: at any time; the page is noted whole or not at all.
        """
        watched = await self._watched()
        if watched.halted is not None:
            self._metrics.listener_halted.set(1)
            return "halted"
        self._metrics.listener_halted.set(0)
        changed = _changed(watched, self._chain)
        if changed is not None:
            return await self._halt(watched, changed)
        seen = watched.seen
        start: int | None = None
        if seen.cursor is None:
            start = seen.ledger + 1 if seen.ledger else (await self._chain.retained()).oldest
        found = await self._chain.events(
            self._chain.vault.contract_id, cursor=seen.cursor, start_ledger=start, limit=self._page_events
        )
        if isinstance(found, OutsideRange):
            return await self._outside(watched)
        if not same_history(seen, found.retained.latest):
            return await self._halt(watched, _reset(seen, found.retained.latest))
        return await self._note(watched, found)

    async def until_noted(self, ledger: int) -> WatchedNetwork:
        """Return once every event up to a ledger is noted.

        Raises:
            ChainMismatch: the network is halted, so that this never comes. StoreUnavailable.

        Cancellation: at any time; give it a deadline.
        """
        while True:
            moved = self._moved
            watched = await self._watched()
            if watched.halted is not None:
                raise ChainMismatch(watched.halted)
            if watched.seen.ledger >= ledger:
                return watched
            with trio.move_on_after(self._interval_seconds):  # it may be another process's listener that moves on
                await moved.wait()

    async def begin_epoch(self, after_epoch: int) -> bool:
        """Follow the history that the nodes have now from its beginning; False where the epoch is not halted.

        Args:
            after_epoch: the epoch that ends.
        """
        chain = self._chain
        begun = await store.begin_epoch(
            self._database, chain.network, after_epoch, chain.passphrase, chain.vault.contract_id, self._clock.now()
        )
        if begun:
            chain.begin_again()
            self._log.warning("chain_epoch_begun", network=chain.network, epoch=after_epoch + 1)
        return begun

    async def _watched(self) -> WatchedNetwork:
        chain = self._chain
        watched = await store.find_network(self._database, chain.network)
        if watched is None:
            await store.add_network(
                self._database, chain.network, chain.passphrase, chain.vault.contract_id, self._clock.now()
            )
            watched = await store.find_network(self._database, chain.network)
            assert watched is not None, "networks are never deleted"
        return watched

    async def _note(self, watched: WatchedNetwork, page: EventPage) -> Step:
        seen, latest = watched.seen, page.retained.latest
        try:
            events = self._read(events_after(page.events, seen.cursor))
        except ChainMismatch as fault:
            return await self._halt(watched, str(fault))
        to = after_page(seen, page, self._page_events)
        self._metrics.chain_listener_lag_ledgers.set(max(0, latest.sequence - to.ledger))
        if to == seen:
            self._metrics.chain_listener_lag_ledgers.set(max(0, to.seen_ledger - to.ledger))
            return "caught_up"
        opening = opening_of(events) if watched.opening is None else None
        if not await store.note_page(self._database, watched, to, events, opening, self._clock.now()):
            return "lost"
        self._tell_moved()
        for event in events:
            self._metrics.chain_events.of(event.kind).inc()
        return "more" if to.ledger < latest.sequence else "moved"

    def _read(self, events: Sequence[ChainEvent]) -> list[VaultEvent]:
        read = (self._chain.vault.read_event(event) for event in events)
        return [event for event in read if event is not None]

    async def _outside(self, watched: WatchedNetwork) -> Step:
        """The place where the next page begins is not one that the nodes have: not yet, no longer, or never again."""
        seen, retained = watched.seen, await self._chain.retained()
        if not same_history(seen, retained.latest):
            return await self._halt(watched, _reset(seen, retained.latest))
        gap = missing_before(seen, retained.oldest)
        self._metrics.chain_listener_lag_ledgers.set(max(0, retained.latest.sequence - seen.ledger))
        if gap is None:
            return "caught_up"
        latest = retained.latest
        to = Seen(retained.oldest - 1, None, max(seen.seen_ledger, latest.sequence), latest.closed_at)
        if latest.sequence < seen.seen_ledger:
            to = attrs.evolve(to, closed_at=seen.closed_at)
        if not await store.note_page(self._database, watched, to, (), None, self._clock.now(), gap):
            return "lost"
        self._metrics.chain_gaps.inc()
        self._log.error("chain_gap", network=watched.network, first_ledger=gap[0], last_ledger=gap[1])
        return "more"

    async def _halt(self, watched: WatchedNetwork, reason: str) -> Step:
        if await store.halt(self._database, watched, reason, self._clock.now()):
            self._log.error("chain_halted", network=watched.network, epoch=watched.epoch, reason=reason)
        self._metrics.listener_halted.set(1)
        return "halted"

    def _tell_moved(self) -> None:
        self._moved.set()
        self._moved = trio.Event()


def _changed(watched: WatchedNetwork, chain: OnChain) -> str | None:
    if watched.passphrase != chain.passphrase:
        return "the network's passphrase is another than before"
    if watched.contract_id != chain.vault.contract_id:
        return f"the vault contract is another than before: {watched.contract_id}"
    return None


def _reset(seen: Seen, head: Head) -> str:
    assert seen.closed_at is not None
    return (
        f"reset suspected: ledger {seen.seen_ledger} was seen, closed {seen.closed_at:%Y-%m-%dT%H:%M:%SZ}, and now the"
        f" latest is {head.sequence}, closed {head.closed_at:%Y-%m-%dT%H:%M:%SZ}"
    )
