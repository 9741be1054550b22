"""Withdrawals: from a vault back to the wallet that its user proved to hold.

The vault is debited first. Then the contract's owner pays, by his key where it is here, else by an operator who signs
offline; the withdrawal is confirmed when the payment's event comes. It is given back, once, only when it provably was
not paid: no transaction of it can be applied any more, and the database lets no other be stored.
"""

from datetime import UTC, datetime
from typing import Final

import trio
from structlog.typing import FilteringBoundLogger

from callora.actors.depositors import offline
from callora.actors.onchain import OnChain, Sender
from callora.actors.registry import VaultRegistry
from callora.actors.treasury_answers import (
    ChainHalted,
    ContractRefuses,
    MayBePaid,
    Mismatch,
    NotOpen,
    NotTaken,
    Offered,
    Taken,
    TooManyWithdrawals,
    TrustlineMissing,
    WalletNotProved,
    WithdrawalRefusal,
)
from callora.ledger.chain import Applied, Envelope
from callora.ledger.clock import Clock
from callora.ledger.commands import GiveBack, Withdraw
from callora.ledger.faults import CalloraFault, ChainUnavailable, StoreUnavailable
from callora.ledger.ids import UserId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import BalanceMoved, Draining, InsufficientFunds, Overloaded, StandingRefused, VaultMissing
from callora.ledger.watching import ref_prefix
from callora.stellar.envelopes import Unreadable, read, signed_same
from callora.store import withdrawals as store
from callora.store.bridge import Database
from callora.store.chain import WatchedNetwork, find_network
from callora.store.reads import chain as reads
from callora.store.withdrawals import NEVER_DEBITED, Withdrawal

OPEN_MAX: Final = 10
"""Withdrawals that one vault may have under way."""
LOOK_SECONDS: Final = 5.0
BATCH: Final = 200
_FIRST: Final = (datetime(1970, 1, 1, tzinfo=UTC), "00000000-0000-0000-0000-000000000000")


class Withdrawals:
    """Pays users out on one network. Run it in a nursery."""

    def __init__(
        self,
        chain: OnChain,
        sender: Sender,
        database: Database,
        registry: VaultRegistry,
        clock: Clock,
        log: FilteringBoundLogger,
        *,
        owner_signs: bool,
        bid: int,
    ) -> None:
        """Args:
        owner_signs: whether the sender has the owner's key.
        bid: what a transaction to be signed offline offers for its inclusion, stroops of XLM.
        """
        self._chain = chain
        self._sender = sender
        self._database = database
        self._registry = registry
        self._clock = clock
        self._log = log
        self._owner_signs = owner_signs
        self._bid = bid
        self._flights: set[str] = set()
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry on whatever is open, until cancelled; what is under way then is found again at the next start."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                while True:
                    try:
                        await self.look()
                    except CalloraFault as fault:
                        self._log.warning("withdrawals_not_looked_at", error=str(fault))
                    await trio.sleep(LOOK_SECONDS)
            finally:
                self._nursery = None

    async def look(self) -> None:
        """Carry on every open withdrawal.

        Raises:
            StoreUnavailable: some were not looked at.
        """
        after = _FIRST
        while True:
            found = await store.open_withdrawals(self._database, self._chain.network, after, BATCH)
            for withdrawal in found:
                self._fly(withdrawal.withdrawal_id)
            if len(found) < BATCH:
                return
            after = (found[-1].asked_at, found[-1].withdrawal_id)

    async def request(
        self, user_id: UserId, withdrawal_id: str, amount: Stroops, address: str | None
    ) -> Withdrawal | WithdrawalRefusal:
        """Debit a user's vault and have him paid, once for this id.

        Args:
            withdrawal_id: a UUID that names the intent.
            amount: stroops, > 0.
            address: where to, which must be the wallet he proved to hold; None for that one.

        Raises:
            ChainUnavailable, StoreUnavailable: nothing was debited, or the same again carries it on.
            ChainMismatch: nothing was debited: the contract pays nobody out.
            OutcomeUnknown: the same again tells.

        Cancellation: the waiting ends; what is stored as asked is carried on.
        """
        network = self._chain.network
        asker = await reads.withdrawer(self._database, user_id, network)
        if asker is None:
            return VaultMissing()
        if asker.wallet is None or address not in (None, asker.wallet):
            return WalletNotProved(asker.wallet)
        if asker.standing == "suspended":
            return StandingRefused(asker.standing)
        watched = await self._watched()
        if watched.halted is not None:
            return ChainHalted()
        self._chain.vault.withdraw_to(asker.wallet, amount)  # raises before anything is debited
        if (await self._chain.wallet(asker.wallet)).usdc is None:
            return TrustlineMissing()
        now = self._clock.now()
        asked = Withdrawal(
            withdrawal_id=withdrawal_id,
            network=network,
            epoch=watched.epoch,
            vault_id=asker.vault_id,
            address=asker.wallet,
            amount=amount,
            state="asked",
            failure=None,
            tx_hash=None,
            envelope=None,
            prepared_ledger=None,
            expires_at=None,
            event_id=None,
            asked_at=now,
            updated_at=now,
        )
        stored = await store.add_withdrawal(self._database, user_id, asked, OPEN_MAX)
        if stored is None:
            return TooManyWithdrawals()
        if (stored.vault_id, stored.amount, stored.address) != (asked.vault_id, amount, asker.wallet):
            return Mismatch()
        refused = await self._debit(stored) if stored.state == "asked" else None
        if refused is not None:
            return refused
        self._fly(withdrawal_id)
        found = await store.find_withdrawal(self._database, withdrawal_id)
        assert found is not None, "withdrawals are never deleted"
        return found

    async def offer(self, withdrawal_id: str) -> Offered | NotOpen | MayBePaid | ContractRefuses:
        """Return the payment of a withdrawal, for the owner to sign; the same one until it is provably dead.

        Raises:
            ChainUnavailable, StoreUnavailable: nothing was offered. ChainMismatch: the owner is no account.
        """
        withdrawal = await store.find_withdrawal(self._database, withdrawal_id)
        if withdrawal is None or withdrawal.state not in ("debited", "sent"):
            return NotOpen()
        if withdrawal.envelope is not None and not await self._offered_is_dead(withdrawal):
            assert withdrawal.expires_at is not None
            assert withdrawal.prepared_ledger is not None
            if withdrawal.expires_at <= self._clock.now():
                return MayBePaid()
            kept = self._stored(withdrawal.envelope)
            return Offered(kept, withdrawal.expires_at, withdrawal.prepared_ledger)
        call = self._chain.vault.withdraw_to(withdrawal.address, withdrawal.amount)
        offered = await offline(self._chain, self._clock, call, self._bid)
        if isinstance(offered, ContractRefuses):
            return offered
        if not await store.offer_payment(
            self._database,
            withdrawal,
            offered.envelope.hash,
            offered.envelope.xdr,
            offered.prepared_ledger,
            offered.expires_at,
            self._clock.now(),
        ):
            return MayBePaid()
        return offered

    async def take(self, withdrawal_id: str, signed: str) -> Taken | NotOpen | NotTaken:
        """Pass on what the owner signed.

        Args:
            signed: base64 XDR of what `offer` gave.

        Raises:
            StoreUnavailable, OutcomeUnknown: the same again tells.
        """
        withdrawal = await store.find_withdrawal(self._database, withdrawal_id)
        if withdrawal is None or withdrawal.state not in ("debited", "sent"):
            return NotOpen()
        if withdrawal.envelope is None or withdrawal.prepared_ledger is None:
            return NotTaken("Nothing was given to sign")
        envelope = signed_same(self._stored(withdrawal.envelope), signed, self._chain.passphrase)
        if isinstance(envelope, Unreadable):
            return NotTaken(envelope.reason)
        await self._sender.pass_on(withdrawal.purpose, envelope, withdrawal.prepared_ledger)
        return Taken(envelope.hash)

    async def refuse(self, withdrawal_id: str, reason: str) -> Withdrawal | NotOpen | MayBePaid:
        """Give a withdrawal back to its vault instead of paying it, on an operator's word.

        Raises:
            ChainUnavailable, StoreUnavailable: nothing was changed. OutcomeUnknown: the same again tells.
        """
        withdrawal = await store.find_withdrawal(self._database, withdrawal_id)
        if withdrawal is None or withdrawal.state not in ("debited", "sent"):
            return NotOpen()
        if withdrawal.envelope is not None and not await self._offered_is_dead(withdrawal):
            return MayBePaid()
        if not await store.begin_return(self._database, withdrawal, reason, self._clock.now()):
            return MayBePaid()
        await self._give_back(withdrawal)
        found = await store.find_withdrawal(self._database, withdrawal_id)
        assert found is not None, "withdrawals are never deleted"
        return found

    async def carry_on(self, withdrawal_id: str) -> None:
        """Take a withdrawal as far as it goes now: debit, pay, give back.

        Raises:
            CalloraFault: it is carried on by the next look.

        Cancellation: as a crash; the next look goes on.
        """
        withdrawal = await store.find_withdrawal(self._database, withdrawal_id)
        if withdrawal is not None and withdrawal.state == "asked":
            await self._debit(withdrawal)
            withdrawal = await store.find_withdrawal(self._database, withdrawal_id)
        if withdrawal is None:
            return
        if withdrawal.state == "returning":
            await self._give_back(withdrawal)
        elif withdrawal.state in ("debited", "sent") and self._owner_signs and withdrawal.envelope is None:
            await self._pay(withdrawal)

    async def _debit(self, withdrawal: Withdrawal) -> InsufficientFunds | Overloaded | Draining | None:
        moved = await self._registry.ask(withdrawal.vault_id, Withdraw(withdrawal.amount, _ref(withdrawal)))
        if isinstance(moved, Overloaded | Draining):
            return moved
        now = self._clock.now()
        if isinstance(moved, InsufficientFunds):
            await store.move_withdrawal(self._database, withdrawal.withdrawal_id, "asked", "failed", now, NEVER_DEBITED)
            return moved
        assert isinstance(moved, BalanceMoved), moved
        await store.move_withdrawal(self._database, withdrawal.withdrawal_id, "asked", "debited", now)
        return None

    async def _pay(self, withdrawal: Withdrawal) -> None:
        await store.move_withdrawal(self._database, withdrawal.withdrawal_id, "debited", "sent", self._clock.now())
        call = self._chain.vault.withdraw_to(withdrawal.address, withdrawal.amount)
        outcome = await self._sender.call(withdrawal.purpose, call)
        if isinstance(outcome, Applied) and outcome.successful:
            return  # its event confirms it
        fault = outcome.fault if isinstance(outcome, Applied) else outcome
        name = None if fault is None else self._chain.vault.error_name(fault)
        told = name or (outcome.result_code if isinstance(outcome, Applied) else outcome.reason)
        if await store.begin_return(self._database, withdrawal, f"not paid: {told}", self._clock.now()):
            self._log.error("withdrawal_not_paid", withdrawal_id=withdrawal.withdrawal_id, reason=told)
            await self._give_back(withdrawal)

    async def _give_back(self, withdrawal: Withdrawal) -> None:
        moved = await self._registry.ask(withdrawal.vault_id, GiveBack(withdrawal.amount, _ref(withdrawal)))
        if isinstance(moved, Overloaded | Draining):
            raise StoreUnavailable("the vault takes no commands now")
        assert isinstance(moved, BalanceMoved), moved
        failed = await store.end_return(self._database, withdrawal.withdrawal_id, self._clock.now())
        if failed:
            self._log.warning("withdrawal_given_back", withdrawal_id=withdrawal.withdrawal_id)

    async def _offered_is_dead(self, withdrawal: Withdrawal) -> bool:
        """Tell whether what the owner was given to sign can never be applied any more."""
        assert withdrawal.envelope is not None
        assert withdrawal.prepared_ledger is not None
        offered = self._stored(withdrawal.envelope)
        outcome = await self._chain.transaction(offered.hash)
        if isinstance(outcome, Applied):
            return not outcome.successful
        return outcome.proves_dead(offered.max_time, withdrawal.prepared_ledger)

    def _stored(self, xdr: str) -> Envelope:
        envelope = read(xdr, self._chain.passphrase)
        assert isinstance(envelope, Envelope), "what is stored was made here"
        return envelope

    async def _watched(self) -> WatchedNetwork:
        watched = await find_network(self._database, self._chain.network)
        if watched is None:
            raise ChainUnavailable("the chain was not looked at yet", kind="unready")
        return watched

    def _fly(self, withdrawal_id: str) -> None:
        """Carry a withdrawal on, once at a time."""
        if self._nursery is not None and withdrawal_id not in self._flights:
            self._flights.add(withdrawal_id)
            self._nursery.start_soon(self._carry, withdrawal_id, name=f"withdrawal {withdrawal_id}")

    async def _carry(self, withdrawal_id: str) -> None:
        try:
            await self.carry_on(withdrawal_id)
        except CalloraFault as fault:  # the next look goes on with it
            self._log.warning("withdrawal_waits", withdrawal_id=withdrawal_id, error=str(fault))
        finally:
            self._flights.discard(withdrawal_id)


def _ref(withdrawal: Withdrawal) -> str:
    """Return the name of a withdrawal's entries: its debit, and what gives it back."""
    return f"{ref_prefix(withdrawal.network, withdrawal.epoch)}withdrawal:{withdrawal.withdrawal_id}"
