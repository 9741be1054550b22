"""Bookkeeping: usage with revenue, revenue with settlements, settlements with the chain, compared at intervals.

What does not add up is kept until an operator has explained it, and stops new settlements. Several processes may run
this on one database; one of them compares at a time.
"""

from collections.abc import Awaitable, Callable, Collection, Sequence
from datetime import datetime, timedelta
from typing import Final, Protocol, TypeVar

import attrs
import trio
from structlog.typing import FilteringBoundLogger

from callora.ledger.chain import Applied, ContractFault, Envelope, NotSeen, Simulated
from callora.ledger.clock import Clock
from callora.ledger.discrepancies import (
    KINDS,
    BookedSettlement,
    Discrepancy,
    KnownTransaction,
    Owed,
    of_address,
    of_charge,
    of_revenue,
    of_settlement,
    of_vault,
    should_have,
)
from callora.ledger.faults import CalloraFault, ChainMismatch, ChainUnavailable
from callora.ledger.ids import Ids
from callora.metrics import Metrics
from callora.stellar.contracts import ContractCall, VaultContract, question
from callora.stellar.settlement import SettlementContract, recognise_settlement
from callora.store import discrepancies as store
from callora.store.bridge import Database
from callora.store.chain import halt_settlement
from callora.store.reads import reconciliation as reads
from callora.store.reads.discrepancies import Noted

LOOK_SECONDS: Final = 60.0
"""How often a process asks whether it is its turn, at most."""
ASKED_AT_ONCE: Final = 8
ASK_SECONDS: Final = 15.0
"""How long one question to the network may take."""
PAGE: Final = 500
RETRY: Final = timedelta(minutes=10)
"""After a comparison that the database did not bear, before anybody tries again."""
GIVE_SECONDS: Final = 2.0
"""How long giving a turn back may take when the process ends."""

K = TypeVar("K")
V = TypeVar("V")


class BookChain(Protocol):
    """What bookkeeping asks of the network; see `actors.chain.Chain`. Raises ChainUnavailable or ChainMismatch."""

    @property
    def passphrase(self) -> str:
        """The network's."""
        ...

    @property
    def vault(self) -> VaultContract:
        """The vault contract."""
        ...

    async def simulate(self, envelope: Envelope) -> Simulated | ContractFault:
        """Return what a contract call would return now."""
        ...

    async def transaction(self, tx_hash: str) -> Applied | NotSeen:
        """Return what became of a transaction."""
        ...

    async def recorded(self, tx_hash: str) -> Applied | None:
        """Return what the second witness has of a transaction."""
        ...


@attrs.frozen
class Compared:
    """What one comparison came to."""

    open: Sequence[Noted]
    """What nobody has cleared."""
    asked: int
    """Of how many transactions and addresses the network was asked."""
    untold: int
    """Of how many of them nobody could tell."""


class Bookkeeper:
    """Compares the books of one network."""

    def __init__(
        self,
        chain: BookChain | None,
        database: Database,
        *,
        network: str,
        clock: Clock,
        ids: Ids,
        metrics: Metrics,
        log: FilteringBoundLogger,
        interval_seconds: float,
        drift_max: int,
    ) -> None:
        """Args:
        chain: None where it is not configured: what is stored is compared, and nobody is asked.
        drift_max: stroops of any sign by which the vault contract may differ.
        """
        self._chain = chain
        self._database = database
        self._network = network
        self._clock = clock
        self._new_id = ids.uuid7
        self._metrics = metrics
        self._log = log
        self._interval = timedelta(seconds=interval_seconds)
        self._drift_max = drift_max

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Compare every interval, in this process or another, until cancelled; the first time at once.

        Cancellation: at any time; the turn is another's then, or this process's after its next start.
        """
        task_status.started()
        while True:
            try:
                await self._take_turn()
            except CalloraFault as fault:
                self._log.warning("books_not_compared", error=str(fault))
            await trio.sleep(min(LOOK_SECONDS, self._interval.total_seconds()))

    async def _take_turn(self) -> None:
        now = self._clock.now()
        if not await store.take_turn(self._database, self._network, now, now - self._interval):
            return
        compared, began_at = None, now - self._interval
        try:
            # Twice as far back as the last turn began: a turn may be late, and nothing is left out.
            compared = await self.compare(now - 2 * self._interval)
        except CalloraFault:
            began_at += min(RETRY, self._interval)
            raise
        finally:
            if compared is None:
                with trio.move_on_after(GIVE_SECONDS, shield=True):
                    await self._give_turn(began_at)
        await store.end_turn(self._database, self._network, self._clock.now(), compared.asked, compared.untold)

    async def _give_turn(self, began_at: datetime) -> None:
        try:
            await store.give_turn(self._database, self._network, began_at)
        except CalloraFault as fault:  # it is anybody's in an hour
            self._log.warning("turn_not_given", error=str(fault))

    async def compare(self, since: datetime) -> Compared:
        """Compare once, keep what is found, and stop settlement where something does not add up.

        Args:
            since: calls, refunds and settlements that ended before are not looked at; what is under way always is.

        Raises:
            StoreUnavailable, OutcomeUnknown: nothing may be kept; again is safe.

        Cancellation: at any time.
        """
        now = self._clock.now()
        asked = _Asked()
        found = [*await self._owed(since, asked)]
        booked: list[BookedSettlement] = []
        async with reads.moment(self._database, self._network) as moment:
            epoch = await moment.epoch()
            found += [of_revenue(each) for each in await moment.revenue_gaps(since)]
            found += [of_charge(each) for each in await moment.strange_charges(since)]
            drift, ledger = await moment.vault_drift() or (0, 0)
            found += of_vault(drift if abs(drift) > self._drift_max else 0, ledger)
            after = None
            while True:
                page, after = await moment.settlements(since, now, after, PAGE)
                booked += page
                if after is None:
                    break
        told = await self._told(booked, asked)
        for each in booked:
            found += of_settlement(each, told)
        noted = await store.note(
            self._database, self._network, found, self._new_id, now, None if asked.untold else since
        )
        self._tell(noted, asked)
        stopping = [each for each in noted if each.found.stops]
        if stopping and epoch is not None:
            first = stopping[0].found
            reason = f"{first.kind} of {first.subject}: {first.said}"
            if await halt_settlement(self._database, self._network, epoch, reason):
                self._log.error("settlement_halted", reason=reason)
        return Compared(noted, asked.count, asked.untold)

    async def clear(self, discrepancy_id: str, by: str, reason: str) -> bool:
        """Note that an operator has explained one; False where there is none that is not cleared. Settlement goes on
        when it is resumed.

        Args:
            by: who says so, 1 to 200 characters.
            reason: why, 1 to 500 characters.
        """
        return await store.clear(self._database, self._network, discrepancy_id, by, reason, self._clock.now())

    def _tell(self, noted: Sequence[Noted], asked: "_Asked") -> None:
        for kind in KINDS:
            self._metrics.discrepancies_open.of(kind).set(sum(each.found.kind == kind for each in noted))
        self._metrics.books_untold.set(asked.untold)
        self._metrics.books_compared_at.set(self._clock.timestamp())
        for each in noted:
            self._log.error(
                "discrepancy",
                discrepancy_id=each.discrepancy_id,
                kind=each.found.kind,
                subject=each.found.subject,
                stroops=each.found.difference,
                said=each.found.said,
            )

    # --- the chain ----------------------------------------------------------------------------------------------------

    async def _owed(self, since: datetime, asked: "_Asked") -> list[Discrepancy]:
        """Return which addresses the settlement contract owes more than was credited to them."""
        lately = await reads.credited_addresses(self._database, self._network, since)
        if self._chain is None or not lately:
            return []
        try:
            contract = await self._contract()
        except CalloraFault as fault:
            self._log.warning("settlement_contract_not_asked", error=str(fault))
            asked.count += len(lately)
            asked.untold += len(lately)
            return []
        # Credits may be made and withdrawals seen meanwhile: neither before nor after may explain it.
        before = await reads.credited_max(self._database, self._network, lately)
        on_chain = await self._each(lately, lambda address: self._balance(contract, address), asked)
        after = await reads.credited_max(self._database, self._network, lately)
        return [
            found
            for address, balance in on_chain.items()
            for found in of_address(
                Owed(address, balance, max(before.get(address, 0), after.get(address, 0)), lately[address])
            )
        ]

    async def _told(self, booked: Sequence[BookedSettlement], asked: "_Asked") -> dict[str, Applied | NotSeen]:
        if self._chain is None:
            return {}
        known = {
            each.hash: each
            for settlement in booked
            for each in (*settlement.charges, *settlement.credits)
            if each.ledger is not None
        }
        return await self._each(known, lambda tx_hash: self._transaction(known[tx_hash]), asked)

    async def _transaction(self, known: KnownTransaction) -> Applied | NotSeen:
        """Return what became of a transaction.

        Raises:
            ChainUnavailable: nobody can tell, or whoever could has forgotten.
        """
        assert self._chain is not None
        found = await self._chain.transaction(known.hash)
        if isinstance(found, Applied) or should_have(found, known.ledger):
            return found
        recorded = await self._chain.recorded(known.hash)
        if recorded is None:
            raise ChainUnavailable("no node remembers it")
        return recorded

    async def _balance(self, contract: SettlementContract, address: str) -> int:
        reading = contract.developer_balance(address)
        told = await self._simulate(reading.call)
        if isinstance(told, ContractFault):
            raise ChainUnavailable(f"the settlement contract does not say what it owes: {told.reason}")
        return reading.answer(told)

    async def _contract(self) -> SettlementContract:
        assert self._chain is not None
        settlement = self._chain.vault.settlement
        if settlement is None:
            raise ChainMismatch("the vault contract has no settlement contract")
        return await recognise_settlement(settlement, self._simulate)

    async def _simulate(self, call: ContractCall) -> Simulated | ContractFault:
        assert self._chain is not None
        with trio.move_on_after(ASK_SECONDS):
            return await self._chain.simulate(question(call, self._chain.passphrase))
        raise ChainUnavailable("no answer in time", kind="timeout")

    async def _each(self, keys: Collection[K], ask: Callable[[K], Awaitable[V]], asked: "_Asked") -> dict[K, V]:
        """Return what the network says of each; without those of which nobody could tell."""
        told: dict[K, V] = {}
        at_once = trio.CapacityLimiter(ASKED_AT_ONCE)

        async def one(key: K) -> None:
            async with at_once:
                try:
                    with trio.fail_after(ASK_SECONDS):
                        told[key] = await ask(key)
                except (ChainUnavailable, ChainMismatch, trio.TooSlowError) as fault:
                    asked.untold += 1
                    self._log.warning("network_could_not_tell", of=str(key), error=str(fault))

        async with trio.open_nursery() as nursery:
            for key in keys:
                nursery.start_soon(one, key)
        asked.count += len(keys)
        return told


@attrs.define
class _Asked:
    count: int = 0
    untold: int = 0
