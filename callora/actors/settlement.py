"""Settlement: developers are paid what they earned, once, on chain; an actor a settlement, one process at a time.

The process that holds the lease seals revenue at intervals and on demand, and walks every settlement to its end by the
steps that `ledger.settlement` decides. Each step is stored before what it allows is done, and what is done on chain is
done under a purpose by the submitter; so whoever takes a settlement up goes on from there, and two that walk the same
one do no harm. The lease saves work, and is not what keeps money right.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final, Protocol, TypeGuard, TypeVar

import attrs
import trio
from structlog.typing import FilteringBoundLogger

from callora.actors.onchain import Sender
from callora.actors.revenue import RevenueIndexer
from callora.ledger.chain import Applied, ContractFault, Envelope, NotSeen, Simulated, WalletBalances
from callora.ledger.clock import Clock
from callora.ledger.faults import CalloraFault, ChainMismatch, ChainUnavailable, StoreRefused
from callora.ledger.ids import DeveloperId, Ids
from callora.ledger.money import Stroops, format_usdc
from callora.ledger.settlement import (
    Again,
    AskContract,
    AskHalves,
    BeginCharge,
    BeginCredits,
    BookCharge,
    BookCredits,
    Candidate,
    Charge,
    Complete,
    Done,
    Fail,
    HeldBack,
    Item,
    MakeCredits,
    Part,
    Settlement,
    Split,
    Step,
    Wait,
    after_asking,
    after_charge,
    after_credits,
    after_halves,
    blamed,
    grouped,
    items_for,
    next_step,
)
from callora.metrics import Metrics
from callora.stellar.contracts import ContractCall, DeductItem, VaultContract, question
from callora.stellar.settlement import SettlementContract, recognise_settlement
from callora.store import settlements as store
from callora.store.bridge import Database, StatementRejected
from callora.store.chain import WatchedNetwork, find_network, halt_settlement
from callora.store.settlements import Due, Lease

LEASE_SECONDS: Final = 6.0
LOOK_SECONDS: Final = 1.0
"""How often the lease is renewed, or asked for; and how soon a run that is asked for begins."""
GIVE_SECONDS: Final = 2.0
"""How long giving the lease back may take when the process ends."""
RETRY_SECONDS: Final = 5.0
"""After what went wrong elsewhere, before it is tried again."""
CRASH_SECONDS: Final = 30.0
PAGE: Final = 1000
"""Developers that are sealed in one database transaction."""
WALLETS_AT_ONCE: Final = 8
REFUSED_FOR: Final = timedelta(hours=24)
"""How long a developer is left out whose charge the contract refuses."""
LATE_LOOK: Final = timedelta(hours=1)
"""How long what was proven dead is looked for again: it cannot be found, and if it is, an operator must know."""
OWN_FAULTS: Final = frozenset(("ExceedsMaxDeduct", "Overflow"))
"""Faults of a charge that are this developer's alone."""

T = TypeVar("T")


class SettlementChain(Protocol):
    """What settlement asks of the network; see `actors.chain.Chain`. Raises ChainUnavailable or ChainMismatch."""

    @property
    def network(self) -> str:
        """testnet or mainnet."""
        ...

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

    async def wallet(self, address: str) -> WalletBalances:
        """Return what an address has."""
        ...

    async def transaction(self, tx_hash: str) -> Applied | NotSeen:
        """Return what became of a transaction."""
        ...

    async def balance(self) -> int:
        """Return the vault contract's balance, stroops."""
        ...

    async def is_paused(self) -> bool:
        """Tell whether the contract refuses charges for now."""
        ...

    async def is_request_processed(self, request_id: str) -> bool:
        """Tell whether a charge of this id was taken."""
        ...


@attrs.frozen
class SettlementSettings:
    """How developers are paid."""

    charger: str
    """The address of the charging key."""
    crediter: str
    """The address of the crediting key."""
    charging_cap: Stroops
    """What the charging key may move in an hour."""
    crediting_cap: Stroops
    payout_min: Stroops
    """What a developer gets at least."""
    platform: str | None
    """Who gets the platform's fees; None where there are none."""
    interval_seconds: float
    """How often developers are paid."""
    sync_seconds: float
    """How often settlements under way are looked at."""
    sync_timeout_seconds: float
    """How long one question of that may take."""


class Settlements:
    """Settles one network. Several processes may run one on the same database; one of them works at a time."""

    def __init__(
        self,
        chain: SettlementChain,
        sender: Sender,
        indexer: RevenueIndexer,
        database: Database,
        settings: SettlementSettings,
        *,
        clock: Clock,
        ids: Ids,
        metrics: Metrics,
        log: FilteringBoundLogger,
    ) -> None:
        """Args:
        indexer: brings revenue up to now before it is sealed.
        """
        self._chain = chain
        self._sender = sender
        self._indexer = indexer
        self._database = database
        self._settings = settings
        self._clock = clock
        self._new_id = ids.uuid7
        self._metrics = metrics
        self._log = log
        self._holder = ids.uuid7()
        self._nursery: trio.Nursery | None = None
        self._walked: set[str] = set()
        # One at a time: credits of new developers enlarge an entry of the contract, and two in one ledger are each
        # simulated without the other's.
        self._crediting = trio.Lock()
        self._nudge = trio.Event()
        self._asked = trio.Event()
        self._wanted_at: datetime | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Settle while this process holds the lease, until cancelled; what is under way is taken up by the next.

        Cancellation: at any time; each step is stored before what it allows is done.
        """
        task_status.started()
        try:
            while True:
                lease = await self._take_lease()
                if lease is not None:
                    await self._work(lease)
                await trio.sleep(LOOK_SECONDS)
        finally:
            with trio.move_on_after(GIVE_SECONDS, shield=True):
                await self._give_lease()

    # --- the lease ----------------------------------------------------------------------------------------------------

    async def _take_lease(self) -> Lease | None:
        try:
            return await store.take_lease(self._database, self._chain.network, self._holder, LEASE_SECONDS)
        except StatementRejected as error:
            if not error.of_older_schema:
                raise
            # The schema is an older one, and somebody may be about to migrate: /readyz says so.
            self._log.warning("settlement_lease_not_taken", error=str(error))
        except CalloraFault as fault:
            self._log.warning("settlement_lease_not_taken", error=str(fault))
        return None

    async def _give_lease(self) -> None:
        try:
            await store.give_lease(self._database, self._chain.network, self._holder)
        except (CalloraFault, StatementRejected) as fault:  # it ends by itself
            self._log.warning("settlement_lease_not_given", error=str(fault))

    async def _work(self, lease: Lease) -> None:
        """Settle until the lease is lost."""
        self._log.info("settlement_runner_begins")
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                nursery.start_soon(self._keep_lease, nursery.cancel_scope)
                nursery.start_soon(self._schedule, lease)
                nursery.start_soon(self._sync_forever)
                await trio.sleep_forever()
            finally:
                self._nursery = None
                self._walked.clear()
        self._log.warning("settlement_lease_lost")

    async def _keep_lease(self, working: trio.CancelScope) -> None:
        good_until = trio.current_time() + LEASE_SECONDS
        while trio.current_time() < good_until:
            try:
                lease = await store.take_lease(self._database, self._chain.network, self._holder, LEASE_SECONDS)
            except CalloraFault as fault:
                self._log.warning("settlement_lease_not_renewed", error=str(fault))
            else:
                if lease is None:
                    break
                good_until = trio.current_time() + LEASE_SECONDS
                if lease.wanted and lease.wanted_at != self._wanted_at:
                    self._wanted_at = lease.wanted_at
                    self._asked.set()
            await trio.sleep(LOOK_SECONDS)
        working.cancel()

    # --- when ---------------------------------------------------------------------------------------------------------

    async def _schedule(self, lease: Lease) -> None:
        """Seal what is due at intervals, and when somebody asks."""
        pause = 0.0
        if lease.age_seconds is not None:
            pause = max(0.0, self._settings.interval_seconds - lease.age_seconds)
        while True:
            with trio.move_on_after(pause):
                await self._asked.wait()
            self._asked = trio.Event()
            wanted_at = self._wanted_at
            try:
                said = await self.settle()
                await store.note_served(self._database, self._chain.network, wanted_at, said)
                self._log.info("settlement_run", said=said)
                pause = self._settings.interval_seconds
            except CalloraFault as fault:
                self._log.warning("settlement_run_failed", error=str(fault))
                pause = RETRY_SECONDS

    async def _sync_forever(self) -> None:
        while True:
            try:
                await self.sync()
            except CalloraFault as fault:
                self._log.warning("settlement_sync_failed", error=str(fault))
            await trio.sleep(self._settings.sync_seconds)

    async def sync(self) -> None:
        """Look at every settlement under way: take up what nobody carries on, try again what waits, show how many.

        Raises:
            StoreUnavailable, ChainUnavailable: some were not looked at.
        """
        found = await store.under_way(self._database, self._chain.network)
        for each in found:
            self._walk(each.settlement_id)
        self._nudge.set()
        self._nudge = trio.Event()
        now = self._clock.now()
        oldest = min((each.opened_at for each in found), default=now)
        self._metrics.settlements_open.set(len(found))
        self._metrics.settlement_oldest_seconds.set(max(0.0, (now - oldest).total_seconds()))
        await self._look_for_late(now)

    async def _look_for_late(self, now: datetime) -> None:
        """Look for what was proven dead and is applied all the same. That cannot be; money would be paid twice."""
        for dead in await store.lately_dead(self._database, self._chain.network, now - LATE_LOOK):
            found = await self._bounded(lambda tx_hash=dead.hash: self._chain.transaction(tx_hash))  # type: ignore[misc]
            if not isinstance(found, Applied) or not found.successful:
                continue
            watched = await self._watched()
            reason = f"{dead.purpose} was proven dead and is in ledger {found.ledger}"
            if await halt_settlement(self._database, watched.network, watched.epoch, reason):
                self._metrics.settlement_late_successes.inc()
                self._log.error("settlement_late_success", purpose=dead.purpose, hash=dead.hash, ledger=found.ledger)

    # --- sealing ------------------------------------------------------------------------------------------------------

    async def settle(self) -> str:
        """Seal what developers have earned up to now, and say what it came to.

        Raises:
            ChainUnavailable, StoreUnavailable, StoreConflict, OutcomeUnknown: some of it was not sealed; again is safe.
            ChainMismatch: keys and contracts do not fit, or the network is halted.

        Cancellation: at any time; what is sealed is carried on.
        """
        await self._indexer.catch_up()
        watched = await self._watched()
        halted = watched.halted or watched.settlement_halted
        if halted is not None:
            self._metrics.settlement_waits.of("halted").inc()
            return f"nothing is settled until an operator has looked: {halted}"
        await self._contract()
        if await self._chain.is_paused():
            self._metrics.settlement_waits.of("contract").inc()
            return "nothing is settled while the vault contract is paused"
        run = _Run(await self._room())
        after = store.NOBODY
        while True:
            page = await store.due(
                self._database, self._chain.network, self._settings.payout_min, self._clock.now(), after, PAGE
            )
            if page:
                await self._seal(watched, page, run)
            if len(page) < PAGE:
                break
            after = page[-1].developer_id
        if run.short:
            self._metrics.settlement_waits.of("underfunded").inc()
            self._log.error("vault_underfunded", short_usdc=format_usdc(run.short))
        return run.said

    async def _room(self) -> int:
        """Return what the vault contract has besides what it will be charged for settlements under way."""
        found = await store.under_way(self._database, self._chain.network)
        return await self._chain.balance() - sum(each.uncharged for each in found)

    async def _seal(self, watched: WatchedNetwork, page: Sequence[Due], run: "_Run") -> None:
        addresses, reasons = await self._receivers(page)
        over: list[Candidate] = []
        made: list[tuple[str, tuple[Item, ...]]] = []

        def group(candidates: Sequence[Candidate]) -> Sequence[tuple[str, Sequence[Item]]]:
            groups, too_much = grouped(
                candidates, charge_max=self._settings.charging_cap, credit_max=self._settings.crediting_cap
            )
            over.extend(too_much)
            room = run.room
            for each in groups:
                total = sum(candidate.gross for candidate in each)
                if total > room:
                    run.short += total
                    continue
                room -= total
                settlement_id = self._new_id()
                made.append((settlement_id, items_for(settlement_id, each, self._settings.platform)))
            return made

        sealed = await store.seal(
            self._database,
            watched.network,
            watched.epoch,
            addresses,
            self._settings.payout_min,
            group,
            self._clock.now(),
        )
        reasons |= {each.developer_id: "over_cap" for each in over}
        if reasons:
            now = self._clock.now()
            await store.hold_back(self._database, watched.network, reasons, now)
        run.add([items for settlement_id, items in made if settlement_id in sealed], reasons)
        for settlement_id in sealed:
            self._walk(settlement_id)

    async def _receivers(self, page: Sequence[Due]) -> tuple[dict[DeveloperId, str], dict[DeveloperId, HeldBack]]:
        """Return where developers are paid, and why some cannot be."""
        addresses: dict[DeveloperId, str] = {}
        reasons: dict[DeveloperId, HeldBack] = {}
        faults: list[CalloraFault] = []
        at_once = trio.CapacityLimiter(WALLETS_AT_ONCE)

        async def look(developer_id: DeveloperId, address: str) -> None:
            async with at_once:
                if faults:
                    return
                try:
                    wallet = await self._bounded(lambda: self._chain.wallet(address))
                except CalloraFault as fault:
                    faults.append(fault)
                    return
            if not wallet.exists:
                reasons[developer_id] = "no_account"
            elif wallet.usdc is None:
                reasons[developer_id] = "no_trustline"
            else:
                addresses[developer_id] = address

        async with trio.open_nursery() as nursery:
            for each in page:
                if each.wallet is None:
                    reasons[each.developer_id] = "no_wallet"
                elif each.wallet == self._settings.platform:
                    reasons[each.developer_id] = "refused"
                else:
                    nursery.start_soon(look, each.developer_id, each.wallet)
        if faults:
            raise faults[0]
        return addresses, reasons

    # --- one settlement -----------------------------------------------------------------------------------------------

    def _walk(self, settlement_id: str) -> None:
        """Have a settlement walked to its end, by one task of this process."""
        if self._nursery is not None and settlement_id not in self._walked:
            self._walked.add(settlement_id)
            self._nursery.start_soon(self._walk_to_end, settlement_id, name=f"settlement {settlement_id}")

    async def _walk_to_end(self, settlement_id: str) -> None:
        """Walk a settlement; a crash costs a pause and concerns no other."""
        while True:
            try:
                await self.walk(settlement_id)
                break
            except Exception:
                self._log.exception("settlement_crashed", settlement_id=settlement_id)
                self._metrics.actor_restarts.inc()
            await trio.sleep(CRASH_SECONDS)
        self._walked.discard(settlement_id)

    async def walk(self, settlement_id: str) -> None:
        """Take a settlement to its end, by as many steps as that takes, however long they take.

        Cancellation: at any time; whoever takes it up goes on from what is stored.
        """
        tried: frozenset[int] = frozenset()
        while True:
            nudge = self._nudge
            try:
                settlement = await store.find(self._database, settlement_id)
                assert settlement is not None, "settlements are never deleted"
                step = next_step(settlement, (await self._watched()).epoch, tried)
                if isinstance(step, Done):
                    return
                if isinstance(step, Wait):
                    self._wait(settlement, step.reason)
                elif await self._take(settlement, step):
                    continue
                if isinstance(step, MakeCredits):
                    tried |= {step.part.number}
                    continue
                pause = self._settings.sync_seconds
            except StoreRefused as refused:
                if refused.constraint != "settlement_step_due":
                    raise
                # It was halted, or another process has gone on.
                self._log.warning("settlement_not_due", settlement_id=settlement_id)
                self._metrics.settlement_waits.of("halted").inc()
                pause = self._settings.sync_seconds
            except CalloraFault as fault:
                self._log.warning("settlement_waits", settlement_id=settlement_id, error=str(fault))
                pause = RETRY_SECONDS
            tried = frozenset()
            with trio.move_on_after(pause):
                await nudge.wait()

    async def _take(self, settlement: Settlement, step: Step) -> bool:
        """Take one step; return whether the next may follow at once."""
        now = self._clock.now()
        match step:
            case BeginCharge():
                return await self._begin_charge(settlement)
            case Charge():
                return await self._charge(settlement)
            case BeginCredits():
                return await store.begin_credits(self._database, settlement, now)
            case MakeCredits(part):
                return await self._credit(settlement, part)
            case Complete():
                return await self._complete(settlement)
            case Fail(reason):
                return await self._fail(settlement, reason, ())
            case _:
                raise AssertionError(f"no step from what is stored: {step}")

    async def _begin_charge(self, settlement: Settlement) -> bool:
        contract = await self._contract()
        told = await self._simulate(_crediting(contract, settlement.items))
        if _cannot(told):
            # Who cannot be credited is found before anything is charged for him.
            name = contract.error_name(told) or told.reason
            culprits = await self._blamed(settlement.charged_items(), lambda item: _crediting(contract, (item,)))
            return await self._fail(settlement, f"not creditable: {name}", culprits)
        if not await self._reserve(
            settlement, "charging", settlement.charge_purpose, settlement.charge_total, self._settings.charging_cap
        ):
            return False
        if await store.begin_charge(self._database, settlement, self._clock.now()):
            return True
        self._metrics.settlement_waits.of("halted").inc()
        return False

    async def _charge(self, settlement: Settlement) -> bool:
        vault = self._chain.vault
        outcome = await self._sender.call(settlement.charge_purpose, self._charging(settlement.charged_items()))
        step = after_charge(outcome, _name(outcome, vault.error_name))
        if isinstance(step, AskContract):
            return await self._after_refusal(settlement, step)
        return await store.book_charge(self._database, settlement, step.by, self._clock.now())

    async def _after_refusal(self, settlement: Settlement, asked: AskContract) -> bool:
        """Find out whether a charge that is refused was made before, and if not, release its revenue."""
        processed: list[bool] | None = None
        if self._chain.vault.generation == "g1":
            processed = [
                await self._bounded(lambda each=item.request_id or "": self._chain.is_request_processed(each))  # type: ignore[misc]
                for item in settlement.charged_items()
            ]
        decided = after_asking(asked, processed)
        match decided:
            case BookCharge(by):
                self._log.error("charge_found", settlement_id=settlement.settlement_id, said=asked.fault)
                return await store.book_charge(self._database, settlement, by, self._clock.now())
            case Wait(reason):
                return self._wait(settlement, reason)
            case Fail(reason):
                return await self._fail(settlement, reason, await self._culprits(settlement, asked.fault))

    async def _culprits(self, settlement: Settlement, fault: str) -> tuple[DeveloperId, ...]:
        """Return the developers for whom a charge fails, so that the others are settled without them."""
        items = settlement.charged_items()
        if len(items) == 1:
            return tuple(item.developer_id for item in items if fault in OWN_FAULTS and item.developer_id is not None)
        return await self._blamed(items, lambda item: self._charging((item,)))

    async def _blamed(self, items: Sequence[Item], call_of: Callable[[Item], ContractCall]) -> tuple[DeveloperId, ...]:
        """Return the developers whose calls fail by themselves, where not all do."""
        could = {item.position: not _cannot(await self._simulate(call_of(item))) for item in items}
        wrong = blamed(could)
        return tuple(item.developer_id for item in items if item.position in wrong and item.developer_id is not None)

    async def _fail(self, settlement: Settlement, reason: str, culprits: tuple[DeveloperId, ...]) -> bool:
        now = self._clock.now()
        if not await store.fail(self._database, settlement, reason, self._new_id, now):
            return self._wait(settlement, f"{reason}; and it may be charged yet")
        self._metrics.settlements_ended.of("failed").inc()
        self._log.error("settlement_failed", settlement_id=settlement.settlement_id, reason=reason)
        if culprits:
            held: dict[DeveloperId, HeldBack] = dict.fromkeys(culprits, "refused")
            await store.hold_back(self._database, settlement.network, held, now + REFUSED_FOR)
            self._log.error("developers_held_back", developers=culprits, reason=reason)
            self._asked.set()  # the others need not wait
        return True

    async def _credit(self, settlement: Settlement, part: Part) -> bool:
        contract, items = await self._contract(), settlement.items_of(part)
        purpose, total = settlement.credit_purpose(part), Stroops(sum(item.credit for item in items))
        if not await self._reserve(settlement, "crediting", purpose, total, self._settings.crediting_cap):
            return False
        async with self._crediting:
            outcome = await self._sender.call(purpose, _crediting(contract, items))
        step: BookCredits | Split | Again | Wait
        decided = after_credits(part, outcome, _name(outcome, contract.error_name))
        if isinstance(decided, AskHalves):
            first, second = [
                not _cannot(await self._simulate(_crediting(contract, settlement.items_of(half))))
                for half in part.halves
            ]
            step = after_halves(decided, first, second)
        else:
            step = decided
        now = self._clock.now()
        match step:
            case BookCredits():
                return await store.book_credits(self._database, settlement, part, now)
            case Split():
                self._log.error("credits_split", settlement_id=settlement.settlement_id, part=part.number)
                return await store.split(self._database, settlement, part, now)
            case Again(fault=fault):
                await store.again(self._database, settlement, part, now)
                return self._wait(settlement, f"charged and not credited: {fault}")
            case Wait(reason):
                return self._wait(settlement, reason)

    async def _complete(self, settlement: Settlement) -> bool:
        if await store.complete(self._database, settlement, self._new_id, self._clock.now()):
            self._metrics.settlements_ended.of("completed").inc()
            self._metrics.settled_stroops.inc(settlement.credit_total)
            self._log.info(
                "settlement_completed",
                settlement_id=settlement.settlement_id,
                developers=len(settlement.charged_items()),
                usdc=format_usdc(settlement.credit_total),
            )
        return True

    async def _reserve(
        self, settlement: Settlement, signer: store.Signing, purpose: str, amount: Stroops, cap: Stroops
    ) -> bool:
        """Reserve what a key is to move; False, having told so, where it has moved enough for this hour."""
        now = self._clock.now()
        if await store.reserve(self._database, settlement.network, signer, purpose, amount, cap, now):
            return True
        self._metrics.settlement_waits.of("cap").inc()
        self._log.error(
            "signer_cap_reached", signer=signer, settlement_id=settlement.settlement_id, cap_usdc=format_usdc(cap)
        )
        return False

    def _wait(self, settlement: Settlement, reason: str) -> bool:
        """Tell an operator why a settlement does not go on."""
        self._metrics.settlement_waits.of("contract").inc()
        self._log.error("settlement_stuck", settlement_id=settlement.settlement_id, reason=reason)
        return False

    # --- the chain ----------------------------------------------------------------------------------------------------

    async def check(self) -> None:
        """Return where the keys are what the contracts expect.

        Raises:
            ChainMismatch: they are not; says what to do. ChainUnavailable: nobody answers.
        """
        await self._contract()

    async def _contract(self) -> SettlementContract:
        """Return the settlement contract, having checked that the keys are those it and the vault expect."""
        vault = self._chain.vault
        expected = vault.authorized_caller or vault.owner
        if self._settings.charger != expected:
            raise ChainMismatch(
                f"The vault contract {vault.contract_id} is charged by {expected}, and SETTLEMENT_CHARGING_SEED is the "
                f"key of {self._settings.charger}: have its owner call set_authorized_caller"
            )
        if vault.settlement is None:
            raise ChainMismatch(
                f"The vault contract {vault.contract_id} has no settlement contract: set_settlement first"
            )
        contract = await recognise_settlement(vault.settlement, self._simulate)
        if contract.vault != vault.contract_id:
            raise ChainMismatch(
                f"The settlement contract {contract.contract_id} takes payments of {contract.vault}, and the vault is "
                f"{vault.contract_id}"
            )
        if contract.admin != self._settings.crediter:
            raise ChainMismatch(
                f"The settlement contract {contract.contract_id} is administered by {contract.admin}, and "
                f"SETTLEMENT_CREDITING_SEED is the key of {self._settings.crediter}"
            )
        return contract

    async def _simulate(self, call: ContractCall) -> Simulated | ContractFault:
        """Return what a call would come to, were it consented to."""
        return await self._bounded(lambda: self._chain.simulate(question(call, self._chain.passphrase)))

    def _charging(self, items: Sequence[Item]) -> ContractCall:
        return self._chain.vault.batch_deduct([DeductItem(item.gross, item.request_id or "") for item in items])

    async def _watched(self) -> WatchedNetwork:
        watched = await find_network(self._database, self._chain.network)
        if watched is None:
            raise ChainUnavailable("the chain was not looked at yet", kind="unready")
        return watched

    async def _bounded(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Return the answer of the chain to one question, in the time that a look has for it."""
        with trio.move_on_after(self._settings.sync_timeout_seconds):
            return await ask()
        raise ChainUnavailable("no answer in time", kind="timeout")


@attrs.define
class _Run:
    """What a run has come to so far."""

    room: int
    """What the vault contract has left to be charged."""
    short: int = 0
    """What was earned and cannot be charged."""
    settlements: int = 0
    developers: int = 0
    total: int = 0
    held_back: dict[HeldBack, int] = attrs.field(factory=dict)

    def add(self, sealed: Sequence[Sequence[Item]], reasons: Mapping[DeveloperId, HeldBack]) -> None:
        """Count what was sealed, and who was left out."""
        for items in sealed:
            charged = [item for item in items if item.developer_id is not None]
            self.settlements += 1
            self.developers += len(charged)
            self.total += sum(item.credit for item in charged)
            self.room -= sum(item.gross for item in charged)
        for reason in reasons.values():
            self.held_back[reason] = self.held_back.get(reason, 0) + 1

    @property
    def said(self) -> str:
        """What it came to, for a person."""
        words = [
            f"{self.settlements} settlements pay {format_usdc(self.total)} USDC to {self.developers} developers"
            if self.settlements
            else "nobody has earned enough since the last settlement"
            if not self.held_back and not self.short
            else "nobody can be paid"
        ]
        words += [f"held back: {count} {reason}" for reason, count in sorted(self.held_back.items())]
        if self.short:
            words.append(f"the vault contract lacks funds for {format_usdc(self.short)} USDC")
        return "; ".join(words)


def _crediting(contract: SettlementContract, items: Sequence[Item]) -> ContractCall:
    return contract.batch_receive_payment([(item.address, item.credit) for item in items])


def _cannot(told: Simulated | ContractFault) -> TypeGuard[ContractFault]:
    """Tell whether a call cannot be made; what has only to be restored first can."""
    return isinstance(told, ContractFault) and told.archived is None


def _name(outcome: Applied | ContractFault, name_of: Callable[[ContractFault], str | None]) -> str | None:
    fault = outcome.fault if isinstance(outcome, Applied) else outcome
    return None if fault is None else name_of(fault)
