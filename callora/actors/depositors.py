"""Depositors: the vault contract takes deposits of listed addresses only, and its owner lists them.

Where the owner's key is here an address is admitted when its user prepares his first deposit. Where it is not, the
address waits for an operator, who is given a transaction to sign offline and hands the signed one back. Admitting
twice is no harm, so what is remembered here is a cache of what the contract says.
"""

from datetime import UTC, datetime
from typing import Final

import trio
from structlog.typing import FilteringBoundLogger

from callora.actors.onchain import OnChain, Sender
from callora.actors.treasury_answers import (
    Admitted,
    ContractRefuses,
    NotAsked,
    NotTaken,
    Offered,
    Refused,
    Taken,
    TooManyAddresses,
    Waiting,
)
from callora.ledger.chain import Applied, ContractFault, Envelope
from callora.ledger.clock import Clock
from callora.ledger.faults import CalloraFault, ChainMismatch, ChainUnavailable
from callora.ledger.ids import UserId
from callora.stellar.contracts import ContractCall
from callora.stellar.envelopes import Unreadable, read, signed_same
from callora.store import depositors as store
from callora.store.bridge import Database
from callora.store.chain import find_network
from callora.store.depositors import Depositor, State

ADDRESSES_MAX: Final = 5
"""Addresses that one user may ask for: each makes every call of the contract a little dearer, for everyone."""
OFFER_SECONDS: Final = 3600
"""How long an operator has to sign offline and to hand the signed transaction back."""
LOOK_SECONDS: Final = 30.0
"""How often addresses that wait are looked at, besides when they are asked for."""
WAIT_SECONDS: Final = 20.0
"""How long a user waits for his address to be admitted: about three ledgers."""
BATCH: Final = 200
_FIRST: Final = (datetime(1970, 1, 1, tzinfo=UTC), "")


class Depositors:
    """Admits addresses on one network. Run it in a nursery."""

    def __init__(
        self,
        chain: OnChain,
        sender: Sender,
        database: Database,
        clock: Clock,
        log: FilteringBoundLogger,
        *,
        owner_signs: bool,
        bid: int,
        wait_seconds: float = WAIT_SECONDS,
    ) -> None:
        """Args:
        owner_signs: whether the sender has the owner's key.
        bid: what a transaction to be signed offline offers for its inclusion, stroops of XLM.
        wait_seconds: how long `admit` waits for an admission under way.
        """
        self._chain = chain
        self._sender = sender
        self._database = database
        self._clock = clock
        self._log = log
        self.owner_signs = owner_signs
        """Whether admission is a matter of seconds, or of an operator."""
        self._bid = bid
        self._wait_seconds = wait_seconds
        self._flights: dict[str, trio.Event] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Admit what waits, until cancelled; an admission under way is followed up at the next start."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                while True:
                    try:
                        await self.look()
                    except CalloraFault as fault:
                        self._log.warning("depositors_not_looked_at", error=str(fault))
                    await trio.sleep(LOOK_SECONDS)
            finally:
                self._nursery = None

    async def look(self) -> None:
        """Look at every address that waits: whether it is admitted by now, and else, with the owner's key, admit it.

        Raises:
            ChainUnavailable, StoreUnavailable: some were not looked at.
        """
        watched = await find_network(self._database, self._chain.network)
        if watched is None:  # so nobody was asked for yet either
            return
        after = _FIRST
        while True:
            found = await store.list_depositors(
                self._database, self._chain.network, watched.epoch, state="asked", after=after, limit=BATCH
            )
            for depositor in found:
                if not await self._is_listed(depositor) and self.owner_signs:
                    self._fly(depositor)
            if len(found) < BATCH:
                return
            after = (found[-1].asked_at, found[-1].address)

    async def admit(self, user_id: UserId, epoch: int, address: str) -> Admitted | Waiting | Refused | TooManyAddresses:
        """Return whether an address may deposit, asking its admission where nobody has.

        Raises:
            ChainUnavailable, StoreUnavailable: nothing was asked, or it will be found asked.

        Cancellation: the waiting ends; an admission under way is carried on.
        """
        network = self._chain.network
        depositor = await store.find_depositor(self._database, network, epoch, address)
        if depositor is None:
            if await self._chain.is_allowed(address):
                return Admitted()
            now = self._clock.now()
            depositor = await store.ask_depositor(self._database, network, epoch, address, user_id, now, ADDRESSES_MAX)
            if depositor is None:
                return TooManyAddresses()
        if depositor.state == "refused":
            return Refused(depositor.reason)
        if depositor.state == "admitted" or await self._is_listed(depositor):
            return Admitted()
        if not self.owner_signs:
            return Waiting(automatic=False)
        with trio.move_on_after(self._wait_seconds):
            await self._fly(depositor).wait()
        depositor = await store.find_depositor(self._database, network, epoch, address)
        assert depositor is not None, "depositors are never deleted"
        return Admitted() if depositor.state == "admitted" else Waiting(automatic=True)

    async def ask_again(self, epoch: int, address: str) -> None:
        """Ask anew for an address that was admitted and that the contract refuses: its owner may have cleared the list.

        Raises:
            StoreUnavailable, OutcomeUnknown.
        """
        depositor = await store.find_depositor(self._database, self._chain.network, epoch, address)
        if depositor is not None:
            await store.ask_again(self._database, depositor, self._clock.now())

    async def waiting(self, state: State | None, after: tuple[datetime, str], limit: int) -> list[Depositor]:
        """Return addresses in this state, or in any, in the order in which they were asked for."""
        epoch = await self._epoch()
        found = await store.list_depositors(
            self._database, self._chain.network, epoch, state=state, after=after, limit=limit
        )
        return list(found)

    async def offer(self, address: str) -> Offered | Admitted | NotAsked | ContractRefuses:
        """Return the transaction that admits an address, for the owner to sign; the same one until it has expired.

        Raises:
            ChainUnavailable, StoreUnavailable: nothing was offered. ChainMismatch: the owner is no account.
        """
        epoch = await self._epoch()
        depositor = await store.find_depositor(self._database, self._chain.network, epoch, address)
        if depositor is None:
            return NotAsked()
        if depositor.state == "admitted" or await self._is_listed(depositor):
            return Admitted()
        if depositor.envelope is not None and depositor.prepared_ledger is not None:
            kept = read(depositor.envelope, self._chain.passphrase)
            assert isinstance(kept, Envelope), "what is stored was made here"
            if kept.max_time > self._clock.timestamp():
                return Offered(kept, datetime.fromtimestamp(kept.max_time, UTC), depositor.prepared_ledger)
        offered = await offline(self._chain, self._clock, self._chain.vault.set_allowed_depositor(address), self._bid)
        if isinstance(offered, Offered):
            await store.offer_envelope(self._database, depositor, offered.envelope.xdr, offered.prepared_ledger)
        return offered

    async def take(self, address: str, signed: str) -> Taken | Admitted | NotAsked | NotTaken:
        """Pass on what the owner signed.

        Args:
            signed: base64 XDR of what `offer` gave.

        Raises:
            StoreUnavailable, OutcomeUnknown: the same again tells.
        """
        epoch = await self._epoch()
        depositor = await store.find_depositor(self._database, self._chain.network, epoch, address)
        if depositor is None:
            return NotAsked()
        if depositor.envelope is None or depositor.prepared_ledger is None:
            return Admitted() if depositor.state == "admitted" else NotTaken("Nothing was given to sign")
        offered = read(depositor.envelope, self._chain.passphrase)
        assert isinstance(offered, Envelope), "what is stored was made here"
        envelope = signed_same(offered, signed, self._chain.passphrase)
        if isinstance(envelope, Unreadable):
            return NotTaken(envelope.reason)
        await self._sender.pass_on(_purpose(depositor), envelope, depositor.prepared_ledger)
        return Taken(envelope.hash)

    async def refuse(self, address: str, reason: str) -> bool:
        """Refuse an address; False where nobody has asked for it, or it is refused already."""
        epoch = await self._epoch()
        return await store.answer_depositor(
            self._database, self._chain.network, epoch, address, "refused", reason, self._clock.now()
        )

    async def _epoch(self) -> int:
        watched = await find_network(self._database, self._chain.network)
        if watched is None:
            raise ChainUnavailable("the chain was not looked at yet", kind="unready")
        return watched.epoch

    async def _is_listed(self, depositor: Depositor) -> bool:
        """Tell whether the contract lists an address by now, and remember it."""
        if not await self._chain.is_allowed(depositor.address):
            return False
        await self._answer(depositor)
        return True

    async def _answer(self, depositor: Depositor) -> None:
        await store.answer_depositor(
            self._database, depositor.network, depositor.epoch, depositor.address, "admitted", None, self._clock.now()
        )

    def _fly(self, depositor: Depositor) -> trio.Event:
        """Have an address admitted, once at a time; return what is set when that has ended, well or not."""
        done = self._flights.get(depositor.address)
        if done is None:
            done = trio.Event()
            if self._nursery is None:
                done.set()
                return done
            self._flights[depositor.address] = done
            self._nursery.start_soon(self._admit, depositor, done, name=f"admit {depositor.address}")
        return done

    async def _admit(self, depositor: Depositor, done: trio.Event) -> None:
        try:
            call = self._chain.vault.set_allowed_depositor(depositor.address)
            outcome = await self._sender.call(_purpose(depositor), call)
            if isinstance(outcome, Applied) and outcome.successful:
                await self._answer(depositor)
                self._log.info("depositor_admitted", address=depositor.address)
            else:
                self._log.error("depositor_not_admitted", address=depositor.address, outcome=str(outcome))
        except CalloraFault as fault:  # the next look goes on with it
            self._log.warning("depositor_not_admitted_yet", address=depositor.address, error=str(fault))
        finally:
            del self._flights[depositor.address]
            done.set()


def _purpose(depositor: Depositor) -> str:
    """Return the name of an admission: another one for each time that it was asked for."""
    return f"admit:{depositor.address}:{int(depositor.asked_at.timestamp() * 1000)}"


async def offline(chain: OnChain, clock: Clock, call: ContractCall, bid: int) -> Offered | ContractRefuses:
    """Return a call as a transaction that its authority signs alone, somewhere else.

    Args:
        bid: stroops of XLM for its inclusion.

    Raises:
        ChainUnavailable: nothing was made. ChainMismatch: it cannot be made, and an operator can tell why.
    """
    if not call.authority.startswith("G"):
        raise ChainMismatch(f"{call.authority} is no account: its signature cannot be asked for by a transaction")
    sequence = await chain.sequence_of(call.authority)
    if sequence is None:
        raise ChainMismatch(f"The account {call.authority} does not exist on {chain.network}")
    retained = await chain.retained()
    max_time = int(max(clock.timestamp(), retained.latest.closed_at.timestamp())) + OFFER_SECONDS
    built = chain.build(call, source=call.authority, sequence=sequence + 1, max_time=max_time, fee=bid)
    envelope = await chain.prepare(built, leeway="some")
    if isinstance(envelope, ContractFault):
        return ContractRefuses(chain.vault.error_name(envelope) or envelope.reason)
    return Offered(envelope, datetime.fromtimestamp(max_time, UTC), retained.latest.sequence)
