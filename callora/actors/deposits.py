"""Deposits: a transaction is prepared for a wallet to sign, taken back signed, passed on, and followed to its event.

What was prepared is known by its hash, which signatures do not change. So what comes back is exactly what was handed
out, or nothing; and a deposit is whose it was prepared for, whatever the wallet. It has failed only when it failed on
chain, or its time is over and no ledger can hold it any more.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

import attrs
import trio
from structlog.typing import FilteringBoundLogger

from callora.actors.depositors import Depositors
from callora.actors.onchain import OnChain, Sender
from callora.actors.treasury_answers import (
    Admitted,
    ChainHalted,
    DepositMissing,
    Expired,
    Prepared,
    PrepareRefusal,
    SignedWrong,
    SimulationFailed,
    SourceMissing,
    SourceUnclear,
    Waiting,
    WalletShort,
)
from callora.ledger.chain import Applied, ContractFault, Envelope, WalletBalances
from callora.ledger.clock import Clock
from callora.ledger.faults import CalloraFault, ChainUnavailable
from callora.ledger.ids import UserId, VaultId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import VaultMissing
from callora.ledger.submission import Alive, Dead
from callora.stellar.envelopes import Signer, Unreadable, bump, inclusion_fee, read, signed_same
from callora.store import deposits as store
from callora.store.bridge import Database
from callora.store.chain import WatchedNetwork, find_network, user_of_wallet
from callora.store.deposits import Intent, TooManyOpen
from callora.store.reads import chain as reads

OPEN_MAX: Final = 10
"""Deposits that one vault may have under way."""
SPONSORED_A_DAY_MAX: Final = 20
"""Deposits of one user in a day whose fee Callora pays."""
OTHER_BOUNDS_MAX: Final = 20
"""Time bounds that are tried, a second apart, where another user had the same transaction prepared."""
LOOK_SECONDS: Final = 5.0
BATCH: Final = 200


class Deposits:
    """Prepares, takes and follows deposits on one network. Run it in a nursery."""

    def __init__(
        self,
        chain: OnChain,
        sender: Sender,
        depositors: Depositors,
        database: Database,
        clock: Clock,
        log: FilteringBoundLogger,
        *,
        bid: int,
        timeout_seconds: int,
        sponsor: Signer | None,
    ) -> None:
        """Args:
        bid: what a deposit offers for its inclusion, stroops of XLM.
        timeout_seconds: how long it may be signed and sent.
        sponsor: who pays the fees of users' deposits; None: they do.
        """
        self._chain = chain
        self._sender = sender
        self._depositors = depositors
        self._database = database
        self._clock = clock
        self._log = log
        self._bid = bid
        self._timeout_seconds = timeout_seconds
        self._sponsor = sponsor

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look at deposits under way until cancelled; a look that fails is made up for by the next."""
        task_status.started()
        while True:
            try:
                await self.look()
            except CalloraFault as fault:
                self._log.warning("deposits_not_looked_at", error=str(fault))
            await trio.sleep(LOOK_SECONDS)

    async def prepare(self, user_id: UserId, amount: Stroops, address: str | None) -> Prepared | PrepareRefusal:
        """Return a deposit for the user's wallet to sign; it can be submitted as it is, but for the signature.

        Args:
            amount: stroops, > 0.
            address: from where, `G…`; None for the wallet that the user proved to hold.

        Raises:
            ChainUnavailable, StoreUnavailable: nothing was prepared.
            OutcomeUnknown: something may be prepared, and ends by itself.

        Cancellation: at any time; an admission under way is carried on.
        """
        asker = await reads.withdrawer(self._database, user_id, self._chain.network)
        if asker is None:
            return VaultMissing()
        watched = await self._watched()
        if watched.halted is not None:
            return ChainHalted()
        source = address or asker.wallet
        if source is None:
            return SourceUnclear(other_users=False)
        # Who signs sees the contract's call and not whose vault it is for: another's wallet may not be asked.
        if source != asker.wallet and await user_of_wallet(self._database, source) is not None:
            return SourceUnclear(other_users=True)
        crowded = await store.count_open(self._database, asker.vault_id, self._clock.now(), OPEN_MAX)
        if crowded is not None:
            return crowded
        wallet = await self._chain.wallet(source)
        if not wallet.exists:
            return SourceMissing()
        if wallet.usdc is None or wallet.usdc < amount:
            return WalletShort(wallet.usdc)
        admission = await self._depositors.admit(user_id, watched.epoch, source)
        if not isinstance(admission, Admitted):
            return admission
        for bound in range(OTHER_BOUNDS_MAX):
            built = await self._build(source, amount, later_seconds=bound)
            if isinstance(built, SimulationFailed) and built.rule in _NOT_LISTED:
                await self._depositors.ask_again(watched.epoch, source)  # the owner has cleared the contract's list
                return Waiting(automatic=self._depositors.owner_signs)
            if not isinstance(built, _Built):
                return built
            stored = await self._store(user_id, built, watched.epoch, asker.vault_id, source, amount)
            if isinstance(stored, TooManyOpen):
                return stored
            if stored.vault_id == asker.vault_id:
                return Prepared(stored, self._chain.vault.contract_id, self._chain.passphrase, self._timeout_seconds)
        raise ChainUnavailable("others keep preparing the same deposit")

    async def submit(
        self, user_id: UserId, signed: str
    ) -> Intent | DepositMissing | SignedWrong | Expired | ChainHalted:
        """Take a signed deposit back and pass it on; the same again is no error.

        Args:
            signed: base64 XDR.

        Raises:
            StoreUnavailable, OutcomeUnknown, ChainMismatch: the same again tells.

        Cancellation: it may be passed on.
        """
        envelope = read(signed, self._chain.passphrase)
        if isinstance(envelope, Unreadable):
            return SignedWrong(envelope.reason)
        intent = await store.find_own_intent(self._database, envelope.inner_hash or envelope.hash, user_id)
        if intent is None:
            return DepositMissing()
        prepared = read(intent.envelope, self._chain.passphrase)
        assert isinstance(prepared, Envelope), "what is stored was made here"
        envelope = signed_same(prepared, signed, self._chain.passphrase)
        if isinstance(envelope, Unreadable):
            return SignedWrong(envelope.reason)
        if intent.stage != "approving":
            return intent
        if intent.expires_at <= self._clock.now():
            return Expired()
        if (await self._watched()).halted is not None:
            return ChainHalted()
        passed = await self._sponsored(user_id, envelope)
        await self._sender.pass_on(f"deposit:{intent.tx_hash}", passed, intent.prepared_ledger)
        await store.note_submitted(self._database, intent.tx_hash, self._clock.now())
        found = await store.find_own_intent(self._database, intent.tx_hash, user_id)
        assert found is not None, "deposits are never deleted"
        return found

    async def wallet(self, address: str) -> WalletBalances:
        """Return what an address has. Raises ChainUnavailable."""
        return await self._chain.wallet(address)

    @property
    def contract_id(self) -> str:
        """The vault contract. Raises ChainUnavailable until it was reached."""
        return self._chain.vault.contract_id

    async def look(self) -> None:
        """Look at deposits that may have ended, and note which of them never arrive.

        Raises:
            ChainUnavailable, StoreUnavailable: some were not looked at.
        """
        watched = await find_network(self._database, self._chain.network)
        if watched is None:  # so nothing was prepared yet either
            return
        after = ""
        while True:
            found = await store.intents_to_look_at(self._database, self._chain.network, self._clock.now(), after, BATCH)
            for intent in found:
                await self._look_at(intent, watched.epoch)
            if len(found) < BATCH:
                return
            after = found[-1].tx_hash

    async def _look_at(self, intent: Intent, epoch: int) -> None:
        outcome = await self._chain.transaction(intent.tx_hash)
        if isinstance(outcome, Applied):
            if outcome.successful:
                # Its event confirms it. A wallet may have sent it by itself.
                await store.note_submitted(self._database, intent.tx_hash, self._clock.now())
                return
            name = None if outcome.fault is None else self._chain.vault.error_name(outcome.fault)
            failure = f"failed on chain: {name or outcome.operation_code or outcome.result_code}"
        elif outcome.proves_dead(int(intent.expires_at.timestamp()), intent.prepared_ledger):
            stored = await self._sender.outcome(intent.tx_hash)
            refusal = stored.refusal if isinstance(stored, Dead | Alive) else None
            failure = _EXPIRED.get(refusal or "", "expired")
        elif intent.epoch < epoch and outcome.retained.latest.closed_at > intent.expires_at:
            failure = "the network began anew"
        else:
            return
        if await store.fail_intent(self._database, intent.tx_hash, failure, self._clock.now()):
            self._log.info("deposit_failed", hash=intent.tx_hash, failure=failure)

    async def _build(
        self, source: str, amount: Stroops, *, later_seconds: int = 0
    ) -> "_Built | SourceMissing | SimulationFailed":
        """Return a deposit, simulated and assembled.

        Args:
            later_seconds: by how much its time bound is put off.
        """
        head = (await self._chain.retained()).latest
        used = await self._chain.sequence_of(source)
        if used is None:
            return SourceMissing()
        # The network's clock decides whether the bound is past, and ours when the user is told so.
        now = max(self._clock.timestamp(), head.closed_at.timestamp())
        drafted = self._chain.build(
            self._chain.vault.deposit(source, amount),
            source=source,
            sequence=used + 1,
            max_time=int(now) + self._timeout_seconds + later_seconds,
            fee=self._bid,
        )
        # It is signed and sent minutes later, and cannot be built anew then.
        prepared = await self._chain.prepare(drafted, leeway="some")
        if isinstance(prepared, ContractFault):
            return SimulationFailed(self._chain.vault.error_name(prepared))
        return _Built(prepared, head.sequence)

    async def _store(
        self, user_id: UserId, built: "_Built", epoch: int, vault_id: VaultId, source: str, amount: Stroops
    ) -> Intent | TooManyOpen:
        envelope = built.envelope
        intent = Intent(
            tx_hash=envelope.hash,
            network=self._chain.network,
            epoch=epoch,
            vault_id=vault_id,
            address=source,
            amount=amount,
            envelope=envelope.xdr,
            fee=envelope.fee,
            prepared_ledger=built.ledger,
            prepared_at=self._clock.now(),
            expires_at=datetime.fromtimestamp(envelope.max_time, UTC),
            stage="approving",
            failure=None,
            event_id=None,
        )
        return await store.add_intent(self._database, user_id, intent, OPEN_MAX)

    async def _sponsored(self, user_id: UserId, envelope: Envelope) -> Envelope:
        """Return the deposit as it is sent: its fee paid by the sponsor, as long as the user's share lasts."""
        if self._sponsor is None or not await store.take_sponsorship(
            self._database, envelope.hash, user_id, self._clock.now(), SPONSORED_A_DAY_MAX
        ):
            return envelope
        return bump(envelope, self._sponsor, max(self._bid, inclusion_fee(envelope, self._chain.passphrase)))

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


_EXPIRED: Final = {
    "tx_insufficient_balance": "expired: the wallet has too little XLM for the network's fee",
    "tx_bad_seq": "expired: the wallet has used its sequence number for another transaction",
}
"""What a deposit has failed for, by what a node last said against it."""
_NOT_LISTED: Final[Sequence[str]] = ("Unauthorized", "CallerNotInAllowlist")
"""What the contract calls a depositor whom it does not list, by its generations."""
