"""Channel accounts: each lends its sequence numbers to one transaction at a time, so that several can be under way."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Final, Protocol

import trio
from structlog.typing import FilteringBoundLogger

from callora.actors.follower import Store
from callora.ledger.chain import Envelope
from callora.metrics import Metrics

SET_ASIDE_SECONDS: Final = 300.0
"""How long a channel that could not pay is left alone: an operator may have topped it up by then."""
LOOK_SECONDS: Final = 1.0
"""How often to look whether another process has given a channel back."""


class Signer(Protocol):
    """A key that signs; see `stellar.envelopes.Signer`."""

    @property
    def address(self) -> str:
        """Its account."""

    def sign(self, envelope: Envelope) -> Envelope:
        """Return the envelope with this signature as well."""


class Channels:
    """The channel accounts. In this process a channel is leased until its envelope is stored; from then on, in every
    process, until that has ended: what is stored is the lease.
    """

    def __init__(
        self,
        network: str,
        signers: Sequence[Signer],
        store: Store,
        random: Random,
        metrics: Metrics,
        log: FilteringBoundLogger,
    ) -> None:
        """Args:
        signers: one a channel, each another account.
        """
        self._network = network
        self._signers = tuple(signers)
        self._store = store
        self._random = random
        self._metrics = metrics
        self._log = log
        self._leased: set[str] = set()
        self._aside: dict[str, float] = {}
        self._freed = trio.Event()
        self._turn = trio.Lock()

    def __bool__(self) -> bool:
        return bool(self._signers)

    @asynccontextmanager
    async def lease(self, epoch: int) -> AsyncIterator[Signer]:
        """Lend a free channel to one who builds on it; who came first goes first.

        Raises:
            StoreUnavailable: who uses which could not be read.

        Cancellation: while it waits nothing is leased.
        """
        async with self._turn:
            signer = await self._wait_for_one(epoch)
            self._leased.add(signer.address)
        try:
            yield signer
        finally:
            self._leased.discard(signer.address)
            self.look()

    def look(self) -> None:
        """Let who waits look again: a channel may be free."""
        self._freed.set()

    def set_aside(self, address: str, reason: str) -> None:
        """Leave a channel alone for a while, and tell an operator."""
        if any(signer.address == address for signer in self._signers):
            self._aside[address] = trio.current_time() + SET_ASIDE_SECONDS
            self._log.error("channel_set_aside", channel=address, reason=reason, seconds=SET_ASIDE_SECONDS)

    async def free(self, epoch: int) -> list[Signer]:
        """Return the channels that nobody uses, and show how many there are."""
        busy = await self._store.busy_channels(self._network, epoch) | self._leased
        now = trio.current_time()
        self._aside = {address: until for address, until in self._aside.items() if until > now}
        free = [signer for signer in self._signers if signer.address not in busy | self._aside.keys()]
        self._metrics.chain_channels_free.set(len(free))
        self._metrics.chain_channels_set_aside.set(len(self._aside))
        return free

    async def _wait_for_one(self, epoch: int) -> Signer:
        while True:
            self._freed = trio.Event()
            free = await self.free(epoch)
            if free:
                # Any of them, so that two processes seldom want the same one.
                return self._random.choice(free)
            with trio.move_on_after(LOOK_SECONDS):
                await self._freed.wait()
