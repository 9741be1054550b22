"""Booking what the chain said: each noted event gets its owner, once and for ever, and is then credited under its id.

Whose a deposit is, in this order: whoever had that very transaction prepared; whoever proved to hold the wallet it came
from; nobody yet, and then it waits in suspense until somebody proves that. The decision is stored before the money
moves, the money moves under the event's own reference, and only then the event is called booked: whoever dies in
between, and however often and in how many processes this runs, a deposit is credited once.
"""

from typing import Final, Literal

import attrs
from structlog.typing import FilteringBoundLogger

from callora.actors.onchain import OnChain
from callora.actors.registry import VaultRegistry
from callora.actors.treasury_answers import Claimed, Halted, NotInSuspense
from callora.actors.vaults import VaultOpening
from callora.ledger.clock import Clock
from callora.ledger.commands import Deposit
from callora.ledger.faults import CalloraFault, StoreUnavailable
from callora.ledger.ids import UserId, VaultId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import BalanceMoved, Draining, Overloaded
from callora.ledger.watching import event_ref, ledger_of
from callora.store import chain as store
from callora.store.bridge import Database
from callora.store.chain import NotedEvent

BATCH: Final = 200
FAULTS_MAX: Final = 3


class Booking:
    """Turns noted events into entries of the ledger."""

    def __init__(
        self,
        chain: OnChain,
        database: Database,
        registry: VaultRegistry,
        opening: VaultOpening,
        clock: Clock,
        log: FilteringBoundLogger,
    ) -> None:
        self._chain = chain
        self._database = database
        self._registry = registry
        self._opening = opening
        self._clock = clock
        self._log = log

    async def book_all(self, network: str) -> int:
        """Book what is noted; return how many events were booked now. One that cannot be waits for the next pass.

        Raises:
            StoreUnavailable, OutcomeUnknown: FAULTS_MAX events in a row could not be booked, so the rest is left.

        Cancellation: as a crash; the next pass goes on.
        """
        booked = faults = 0
        after = (0, "")
        while True:
            events = await store.open_events(self._database, network, after, BATCH)
            for event in events:
                try:
                    booked += await self.book(event)
                    faults = 0
                except CalloraFault as fault:  # one vault that fails does not keep the others waiting
                    faults += 1
                    if faults >= FAULTS_MAX:
                        raise
                    self._log.warning("booking_failed", event_id=event.event_id, error=str(fault))
            if len(events) < BATCH:
                return booked
            after = (events[-1].epoch, events[-1].event_id)

    async def book(self, event: NotedEvent) -> bool:
        """Book one event; True where it was done now, False where others did, or it went to suspense.

        Raises:
            ChainUnavailable, StoreUnavailable, OutcomeUnknown: it is booked by the next pass, or was.

        Cancellation: as `book_all`.
        """
        event = await self._as_prepared(event)
        if event.kind != "deposit":
            return await self._book_payment(event)
        vault_id = event.vault_id
        if vault_id is None:
            vault_id = await self._owner(event)
            if vault_id is None:
                if await store.suspend_event(self._database, event):
                    self._log.warning(
                        "deposit_in_suspense", event_id=event.event_id, address=event.address, stroops=event.amount
                    )
                return False
            if not await store.give_event(self._database, event.network, event.epoch, event.event_id, vault_id):
                return False  # another process decided first, and books it
        await self._credit(vault_id, event)
        if await store.book_deposit(self._database, event, self._clock.now()):
            self._log.info("deposit_credited", event_id=event.event_id, vault_id=vault_id, stroops=event.amount)
            return True
        return False

    async def claim(self, user_id: UserId, network: str, address: str) -> Claimed | Halted:
        """Credit a user with every deposit in suspense that came from the wallet he proved to hold.

        Raises:
            StoreUnavailable, OutcomeUnknown: what is not credited yet is credited by the next pass.
        """
        halted = await self._halted(network)
        if halted is not None:
            return halted
        vault_id = (await self._opening.ensure(user_id, network)).vault_id
        claimed = await store.claim_events(self._database, network, address, vault_id)
        for event in claimed:
            await self.book(event)
        return Claimed(len(claimed), Stroops(sum(event.amount for event in claimed)))

    async def assign(
        self, network: str, epoch: int, event_id: str, user_id: UserId
    ) -> Literal[True] | NotInSuspense | Halted:
        """Credit a user with a deposit in suspense, on an operator's word.

        Raises: as `claim`.
        """
        halted = await self._halted(network)
        if halted is not None:
            return halted
        vault_id = (await self._opening.ensure(user_id, network)).vault_id
        if not await store.give_event(self._database, network, epoch, event_id, vault_id, "suspense"):
            return NotInSuspense()
        await self.book_own(network, vault_id)
        return True

    async def book_own(self, network: str, vault_id: VaultId) -> None:
        """Book what was found to be a vault's."""
        for event in await store.own_open_deposits(self._database, network, vault_id):
            await self.book(event)

    async def _halted(self, network: str) -> Halted | None:
        watched = await store.find_network(self._database, network)
        return None if watched is None or watched.halted is None else Halted(watched.halted)

    async def _as_prepared(self, event: NotedEvent) -> NotedEvent:
        """Return the event under the hash of what was prepared: anybody may put a fee-bump around what is signed, and
        the event then goes by the fee-bump's hash.
        """
        if await store.is_ours(self._database, event.tx_hash):
            return event
        inner = await self._chain.wrapped_in(event.tx_hash, ledger_of(event.event_id))
        return event if inner is None else attrs.evolve(event, tx_hash=inner)

    async def _owner(self, event: NotedEvent) -> VaultId | None:
        prepared = await store.vault_of_intent(self._database, event.tx_hash)
        if prepared is not None:
            return prepared
        user_id = None if event.address is None else await store.user_of_wallet(self._database, event.address)
        return None if user_id is None else (await self._opening.ensure(user_id, event.network)).vault_id

    async def _credit(self, vault_id: VaultId, event: NotedEvent) -> None:
        ref = event_ref(event.network, event.epoch, event.event_id)
        outcome = await self._registry.ask(vault_id, Deposit(Stroops(event.amount), ref))
        if isinstance(outcome, Overloaded | Draining):
            raise StoreUnavailable("the vault takes no commands now")
        assert isinstance(outcome, BalanceMoved), outcome

    async def _book_payment(self, event: NotedEvent) -> bool:
        payment = await store.payment_of(self._database, event.tx_hash)
        booked, confirmed = await store.book_payment(self._database, event, payment, self._clock.now())
        if not booked:
            return False
        matches = payment is not None and (payment.address, payment.amount) == (event.address, event.amount)
        if not matches or not confirmed:
            # Reconciliation finds the sum missing; this says which payment it was.
            self._log.error(
                "payment_unexplained",
                event_id=event.event_id,
                kind=event.kind,
                address=event.address,
                stroops=event.amount,
                withdrawal_id=None if payment is None else payment.withdrawal_id,
            )
        return True
