"""Payouts: developers take what they were credited out of the settlement contract, by a transaction they sign.

What was prepared is known by its hash, which signatures do not change: what comes back is exactly what was handed out,
or nothing. It has failed only when it failed on chain, or its time is over and no ledger can hold it any more.
"""

from datetime import UTC, datetime
from typing import Final

import attrs
import trio
from structlog.typing import FilteringBoundLogger

from callora.actors.onchain import OnChain, Sender
from callora.actors.payout_answers import (
    Balance,
    BalanceShort,
    ChainHalted,
    ContractRefuses,
    Expired,
    NoAccount,
    NoDeveloper,
    NoTrustline,
    NoWallet,
    PayoutMissing,
    Prepared,
    PrepareRefusal,
    SignedWrong,
    SubmitRefusal,
    TooManyOpen,
)
from callora.ledger.chain import Applied, ContractFault, Envelope, Simulated
from callora.ledger.clock import Clock
from callora.ledger.faults import CalloraFault, ChainMismatch, ChainUnavailable
from callora.ledger.ids import DeveloperId, UserId
from callora.ledger.money import Stroops
from callora.metrics import Metrics
from callora.stellar.contracts import ContractCall, question
from callora.stellar.envelopes import Unreadable, read, signed_same
from callora.stellar.settlement import SettlementContract, recognise_settlement
from callora.store import payouts as store
from callora.store.bridge import Database
from callora.store.chain import WatchedNetwork, find_network
from callora.store.payouts import Payout

OPEN_MAX: Final = 10
"""Withdrawals that one developer may have under way."""
LOOK_SECONDS: Final = 5.0
BATCH: Final = 200


class Payouts:
    """Prepares, takes and follows developers' withdrawals on one network. Run it in a nursery."""

    def __init__(
        self,
        chain: OnChain,
        sender: Sender,
        database: Database,
        clock: Clock,
        metrics: Metrics,
        log: FilteringBoundLogger,
        *,
        bid: int,
        timeout_seconds: int,
    ) -> None:
        """Args:
        bid: what a withdrawal offers for its inclusion, stroops of XLM, which the developer pays.
        timeout_seconds: how long it may be signed and sent.
        """
        self._chain = chain
        self._sender = sender
        self._database = database
        self._clock = clock
        self._metrics = metrics
        self._log = log
        self._bid = bid
        self._timeout_seconds = timeout_seconds

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look at withdrawals under way until cancelled; a look that fails is made up for by the next."""
        task_status.started()
        while True:
            try:
                await self.look()
            except CalloraFault as fault:
                self._log.warning("payouts_not_looked_at", error=str(fault))
            await trio.sleep(LOOK_SECONDS)

    async def balance(self, user_id: UserId) -> Balance | NoDeveloper | NoWallet:
        """Return what the settlement contract owes a developer's wallet now.

        Raises:
            ChainUnavailable, ChainMismatch, StoreUnavailable: nobody can tell.
        """
        taker = await store.taker(self._database, user_id)
        if taker is None:
            return NoDeveloper()
        if taker.wallet is None:
            return NoWallet()
        return Balance(taker.wallet, await self._owed(await self._contract(), taker.wallet))

    async def prepare(self, user_id: UserId, amount: Stroops | None) -> Prepared | PrepareRefusal:
        """Return a withdrawal for the developer's wallet to sign; it can be submitted as it is, but for the signature.

        Args:
            amount: stroops, > 0; None for all that the contract owes him.

        Raises:
            ChainUnavailable, ChainMismatch, StoreUnavailable: nothing was prepared.
            OutcomeUnknown: something may be prepared, and ends by itself.

        Cancellation: at any time.
        """
        taker = await store.taker(self._database, user_id)
        if taker is None:
            return NoDeveloper()
        if taker.wallet is None:
            return NoWallet()
        watched = await self._watched()
        if watched.halted is not None:
            return ChainHalted()
        if not await store.has_room(
            self._database, taker.developer_id, self._chain.network, self._clock.now(), OPEN_MAX
        ):
            return TooManyOpen()
        wallet = await self._chain.wallet(taker.wallet)
        if not wallet.exists:
            return NoAccount()
        if wallet.usdc is None:
            return NoTrustline()
        contract = await self._contract()
        owed = await self._owed(contract, taker.wallet)
        wanted = owed if amount is None else amount
        if not 0 < wanted <= owed:
            return BalanceShort(amount, owed)
        built = await self._build(contract, taker.wallet, wanted)
        if not isinstance(built, _Built):
            return built
        stored = await store.add_payout(
            self._database, self._payout(taker.developer_id, taker.wallet, wanted, built, watched.epoch), OPEN_MAX
        )
        if stored is None:
            return TooManyOpen()
        self._metrics.developer_withdrawals.of("approving").inc()
        return Prepared(stored, contract.contract_id, self._chain.passphrase, self._timeout_seconds)

    async def submit(self, user_id: UserId, signed: str) -> Payout | SubmitRefusal:
        """Take a signed withdrawal back and pass it on; the same again is no error.

        Args:
            signed: base64 XDR.

        Raises:
            StoreUnavailable, OutcomeUnknown, ChainMismatch: the same again tells.

        Cancellation: it may be passed on.
        """
        taker = await store.taker(self._database, user_id)
        if taker is None:
            return NoDeveloper()
        envelope = read(signed, self._chain.passphrase)
        if isinstance(envelope, Unreadable):
            return SignedWrong(envelope.reason)
        payout = await store.find_payout(self._database, taker.developer_id, envelope.inner_hash or envelope.hash)
        if payout is None:
            return PayoutMissing()
        prepared = read(payout.envelope, self._chain.passphrase)
        assert isinstance(prepared, Envelope), "what is stored was made here"
        envelope = signed_same(prepared, signed, self._chain.passphrase)
        if isinstance(envelope, Unreadable):
            return SignedWrong(envelope.reason)
        if payout.stage != "approving":
            return payout
        if payout.expires_at <= self._clock.now():
            return Expired()
        if (await self._watched()).halted is not None:
            return ChainHalted()
        await self._sender.pass_on(payout.purpose, envelope, payout.prepared_ledger)
        if await store.note_submitted(self._database, payout, self._clock.now()):
            self._metrics.developer_withdrawals.of("pending").inc()
        found = await store.find_payout(self._database, taker.developer_id, payout.tx_hash)
        assert found is not None, "withdrawals are never deleted"
        return found

    async def look(self) -> None:
        """Look at withdrawals that may have ended, and note what became of them.

        Raises:
            ChainUnavailable, StoreUnavailable: some were not looked at.
        """
        watched = await find_network(self._database, self._chain.network)
        if watched is None:  # so nothing was prepared yet either
            return
        after: Payout | None = None
        while True:
            found = await store.payouts_to_look_at(self._database, self._chain.network, self._clock.now(), after, BATCH)
            for payout in found:
                await self._look_at(payout, watched.epoch)
            if len(found) < BATCH:
                return
            after = found[-1]

    async def _look_at(self, payout: Payout, epoch: int) -> None:
        outcome = await self._chain.transaction(payout.tx_hash)
        now = self._clock.now()
        if isinstance(outcome, Applied):
            if outcome.successful:
                if await store.confirm(self._database, payout, outcome.ledger, outcome.closed_at, now):
                    self._metrics.developer_withdrawals.of("confirmed").inc()
                return
            fault = outcome.fault
            name = None if fault is None else (await self._contract()).error_name(fault)
            failure = f"failed on chain: {name or outcome.operation_code or outcome.result_code}"
        elif outcome.proves_dead(int(payout.expires_at.timestamp()), payout.prepared_ledger):
            failure = "expired"
        elif payout.epoch < epoch and outcome.retained.latest.closed_at > payout.expires_at:
            failure = "the network began anew"
        else:
            return
        if await store.fail(self._database, payout, failure, now):
            self._metrics.developer_withdrawals.of("failed").inc()
            self._log.info("payout_failed", hash=payout.tx_hash, failure=failure)

    # --- the chain ----------------------------------------------------------------------------------------------------

    async def _build(
        self, contract: SettlementContract, address: str, amount: Stroops
    ) -> "_Built | NoAccount | ContractRefuses":
        """Return a withdrawal, simulated and assembled."""
        head = (await self._chain.retained()).latest
        used = await self._chain.sequence_of(address)
        if used is None:
            return NoAccount()
        # The network's clock decides whether the bound is past, and ours when the developer is told so.
        now = max(self._clock.timestamp(), head.closed_at.timestamp())
        drafted = self._chain.build(
            contract.withdraw_developer_balance(address, amount),
            source=address,
            sequence=used + 1,
            max_time=int(now) + self._timeout_seconds,
            fee=self._bid,
        )
        # It is signed and sent minutes later, and cannot be built anew then.
        prepared = await self._chain.prepare(drafted, leeway="some")
        if isinstance(prepared, ContractFault):
            return ContractRefuses(contract.error_name(prepared))
        return _Built(prepared, head.sequence)

    def _payout(self, developer_id: DeveloperId, address: str, amount: Stroops, built: "_Built", epoch: int) -> Payout:
        envelope, now = built.envelope, self._clock.now()
        return Payout(
            developer_id=developer_id,
            tx_hash=envelope.hash,
            network=self._chain.network,
            epoch=epoch,
            address=address,
            amount=amount,
            envelope=envelope.xdr,
            fee=envelope.fee,
            prepared_ledger=built.ledger,
            prepared_at=now,
            expires_at=datetime.fromtimestamp(envelope.max_time, UTC),
            stage="approving",
            failure=None,
            ledger=None,
            applied_at=None,
            updated_at=now,
        )

    async def _owed(self, contract: SettlementContract, address: str) -> Stroops:
        reading = contract.developer_balance(address)
        told = await self._simulate(reading.call)
        if isinstance(told, ContractFault):
            raise ChainMismatch(f"the settlement contract does not say what it owes: {told.reason}")
        return Stroops(reading.answer(told))

    async def _contract(self) -> SettlementContract:
        settlement = self._chain.vault.settlement
        if settlement is None:
            raise ChainMismatch("the vault contract has no settlement contract")
        return await recognise_settlement(settlement, self._simulate)

    async def _simulate(self, call: ContractCall) -> Simulated | ContractFault:
        return await self._chain.simulate(question(call, self._chain.passphrase))

    async def _watched(self) -> WatchedNetwork:
        watched = await find_network(self._database, self._chain.network)
        if watched is None:
            raise ChainUnavailable("the chain was not looked at yet", kind="unready")
        return watched


@attrs.frozen
class _Built:
    envelope: Envelope
    ledger: int
    """The latest when it was built."""
