"""Reconciliation: what the vault contract has, against what the ledger says it should have, at one ledger.

A difference is told, stored with its parts, and past a bound stops settlement until an operator lets it go on: whoever
settles asks `settlement_halted` of the network first.
"""

from typing import Final

import attrs
import trio
from structlog.typing import FilteringBoundLogger

from callora.actors.listener import Listener
from callora.actors.onchain import OnChain
from callora.ledger.chain import ContractFault
from callora.ledger.clock import Clock
from callora.ledger.faults import CalloraFault, ChainMismatch
from callora.ledger.money import Stroops, format_usdc
from callora.ledger.reconciliation import Parts
from callora.metrics import Metrics
from callora.stellar.contracts import question
from callora.store import chain as store
from callora.store.bridge import Database
from callora.store.reads.chain import parts_at

NOTED_SECONDS_MAX: Final = 60.0
"""How long a comparison waits for the listener to come to its ledger."""


@attrs.frozen
class Compared:
    """One comparison."""

    ledger: int
    on_chain: int
    parts: Parts

    @property
    def drift(self) -> int:
        """What the contract has more than it should; stroops, of any sign."""
        return self.on_chain - self.parts.expected


class Reconciliation:
    """Compares one network at intervals."""

    def __init__(
        self,
        chain: OnChain,
        listener: Listener,
        database: Database,
        clock: Clock,
        metrics: Metrics,
        log: FilteringBoundLogger,
        *,
        interval_seconds: float,
        drift_max: int,
    ) -> None:
        """Args:
        drift_max: stroops of any sign by which both may differ before settlement stops.
        """
        self._chain = chain
        self._listener = listener
        self._database = database
        self._clock = clock
        self._metrics = metrics
        self._log = log
        self._interval_seconds = interval_seconds
        self._drift_max = drift_max

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Compare every interval until cancelled; a comparison that fails is made up for by the next."""
        task_status.started()
        while True:
            try:
                await self.compare()
            except CalloraFault as fault:
                self._log.warning("comparison_failed", error=str(fault))
            await trio.sleep(self._interval_seconds)

    async def compare(self) -> Compared | None:
        """Compare once, and store what it came to; None where the listener did not get so far in time.

        Raises:
            ChainUnavailable, StoreUnavailable: nothing was compared. ChainMismatch: the network is halted.
            OutcomeUnknown: it may not be stored.

        Cancellation: at any time.
        """
        on_chain, ledger = await self._balance()
        with trio.move_on_after(NOTED_SECONDS_MAX) as scope:
            watched = await self._listener.until_noted(ledger)
        if scope.cancelled_caught:
            self._log.warning("comparison_waited_in_vain", ledger=ledger)
            return None
        parts = await parts_at(self._database, self._chain.network, watched.epoch, ledger)
        if parts is None:  # it was halted, or began anew, in between
            return None
        if watched.opening is None and parts.opening == 0:
            # No event up to this ledger has moved the balance: this is what the contract was opened with. Kept, so that
            # whatever moves it without an event from now on is drift.
            if not await store.note_opening(self._database, watched, on_chain):
                return None  # the listener was first, with an event of a later ledger; the next comparison has both
            self._log.info("chain_opening_noted", usdc=format_usdc(Stroops(on_chain)), ledger=ledger)
            parts = attrs.evolve(parts, opening=on_chain)
        compared = Compared(ledger, on_chain, parts)
        await store.note_reconciliation(
            self._database, watched, ledger, on_chain, parts.expected, attrs.asdict(parts), self._clock.now()
        )
        self._metrics.chain_drift_stroops.set(compared.drift)
        self._metrics.chain_suspense_stroops.set(parts.suspense)
        self._metrics.chain_unbooked_stroops.set(parts.noted)
        if compared.drift:
            self._log.error("chain_drift", usdc=format_usdc(compared.drift), ledger=ledger, **attrs.asdict(parts))
        if abs(compared.drift) > self._drift_max:
            reason = f"the vault contract has {format_usdc(compared.drift)} USDC more than it should at ledger {ledger}"
            if await store.halt_settlement(self._database, watched.network, watched.epoch, reason):
                self._log.error("settlement_halted", reason=reason)
        return compared

    async def _balance(self) -> tuple[int, int]:
        """Return what the contract has, and the ledger on which that was asked."""
        reading = self._chain.vault.balance()
        told = await self._chain.simulate(question(reading.call, self._chain.passphrase))
        if isinstance(told, ContractFault):
            raise ChainMismatch(f"The vault contract refuses to say its balance: {told.reason}")
        return reading.answer(told), told.latest
