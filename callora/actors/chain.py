"""The chain: one network as the rest of the service sees it, whichever node answers.

It checks that what answers is what was configured, recognises the vault contract, and asks RPC, with Horizon as the
second source. What does not fit stops this part, not the gateway: prepaid calls need no chain.
"""

from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timedelta
from typing import Final, Literal, TypeVar

import attrs
import trio
from structlog.typing import FilteringBoundLogger

from callora.actors.breaker import Breaker
from callora.actors.sources import BreakerReport, Health, Node, Source
from callora.ledger.chain import (
    Applied,
    Archived,
    ContractFault,
    Envelope,
    EventPage,
    FeeStats,
    Head,
    NetworkFacts,
    NotSeen,
    OutsideRange,
    Retained,
    Sent,
    Simulated,
    WalletBalances,
)
from callora.ledger.clock import Clock
from callora.ledger.faults import ChainMismatch, ChainUnavailable
from callora.metrics import BREAKER_STATES, Metrics
from callora.stellar import contracts
from callora.stellar.contracts import ContractCall, Reading, VaultContract
from callora.stellar.envelopes import unwrap
from callora.stellar.horizon import HorizonNode
from callora.stellar.rpc import Leeway, RpcNode

T = TypeVar("T")

HEAD_SECONDS: Final = 5.0
"""How often the newest ledger is asked for: about as often as there is one."""
CHECK_SECONDS_MAX: Final = 5.0
"""How long a start waits for the chain."""
SLOW_SECONDS: Final = 2.0
"""An answer that takes this long is a degraded one."""
PROBE_KEPT_SECONDS: Final = 1.0
"""A probe's result serves everyone who asks within this time: anyone may ask, and providers count."""
_WORSE: Final[Mapping[Health, int]] = {"ok": 0, "degraded": 1, "down": 2}


@attrs.frozen
class Expected:
    """What should answer."""

    network: Literal["testnet", "mainnet"]
    passphrase: str
    contract_id: str
    """The vault contract."""
    settlement_id: str | None
    """The settlement contract; None: whatever the vault says."""
    owner: str | None
    """Whose key admits depositors; None where that key is not configured."""


class Chain:
    """One network. Every question raises ChainUnavailable where nobody answers it, and ChainMismatch once the part is
    halted; each may be cancelled at any time.
    """

    def __init__(
        self,
        expected: Expected,
        rpc: Source[RpcNode],
        horizon: Source[HorizonNode] | None,
        clock: Clock,
        metrics: Metrics,
        log: FilteringBoundLogger,
    ) -> None:
        """Describe the chain; nothing is asked yet."""
        self.expected = expected
        self.halted: str | None = None
        """Why this part has stopped for good; None while it has not."""
        self.head: Head | None = None
        """The newest ledger known; None before the first answer."""
        self._rpc = rpc
        self._horizon = horizon
        self._clock = clock
        self._metrics = metrics
        self._log = log
        self._vault: VaultContract | None = None
        self._settled = trio.Event()
        self._checked = False
        """Whether `check` is over: a mismatch then refuses no start any more, but halts."""
        self._began_at = clock.now()
        self._probes: dict[str, _Probe] = {"rpc": _Probe(rpc)}
        if horizon is not None:
            self._probes["horizon"] = _Probe(horizon)

    # What is configured and known

    @property
    def network(self) -> Literal["testnet", "mainnet"]:
        """Its name."""
        return self.expected.network

    @property
    def passphrase(self) -> str:
        """Its passphrase, which is part of every hash."""
        return self.expected.passphrase

    @property
    def vault(self) -> VaultContract:
        """The vault contract.

        Raises:
            ChainUnavailable: it was not reached since the start; `ready` waits for it.
            ChainMismatch: the part is halted.
        """
        self._require_running()
        if self._vault is None:
            raise ChainUnavailable("the vault contract was not reached yet", kind="unready")
        return self._vault

    async def ready(self) -> VaultContract:
        """Return the vault contract once it is known.

        Raises:
            ChainMismatch: the part is halted.

        Cancellation: at any time.
        """
        await self._settled.wait()
        return self.vault

    def build(self, call: ContractCall, *, source: str, sequence: int, max_time: int, fee: int) -> Envelope:
        """Return the unsigned transaction of a call; see `contracts.build`."""
        return contracts.build(
            call, source=source, sequence=sequence, max_time=max_time, fee=fee, passphrase=self.passphrase
        )

    def build_restore(self, archived: Archived, *, source: str, sequence: int, max_time: int, fee: int) -> Envelope:
        """Return the unsigned transaction that restores what a call needs; see `contracts.build_restore`."""
        return contracts.build_restore(
            archived, source=source, sequence=sequence, max_time=max_time, fee=fee, passphrase=self.passphrase
        )

    def unwrap(self, envelope: Envelope) -> Envelope:
        """Return the transaction inside a fee-bump; see `envelopes.unwrap`."""
        return unwrap(envelope, self.passphrase)

    # Questions

    async def network_facts(self) -> NetworkFacts:
        """Return which network answers."""
        return await self._ask("network", RpcNode.network, stale_allowed=True)

    async def retained(self) -> Retained:
        """Return what a node can tell of the past, and its newest ledger."""
        retained = await self._ask("retained", RpcNode.retained, stale_allowed=True)
        if self.head is None or retained.latest.sequence > self.head.sequence:
            self.head = retained.latest
        return retained

    async def sequence_of(self, address: str) -> int | None:
        """Return the last sequence number that an account used; None where there is no such account."""
        try:
            return await self._ask("sequence_of", lambda node: node.sequence_of(address))
        except ChainUnavailable:
            if self._horizon is None:
                raise
        return await self._horizon.ask("sequence_of", lambda node: node.sequence_of(address))

    async def simulate(self, envelope: Envelope) -> Simulated | ContractFault:
        """Return what a contract call would return now, or why it cannot succeed."""
        return await self._ask("simulate", lambda node: node.simulate(envelope))

    async def prepare(self, envelope: Envelope, *, leeway: Leeway = "none") -> Envelope | ContractFault:
        """Return the transaction with the resources, fee and consents that its call needs, unsigned."""
        return await self._ask("prepare", lambda node: node.prepare(envelope, leeway=leeway))

    async def send(self, envelope: Envelope) -> Sent:
        """Send a signed transaction. It goes to another node, or again, only where provably nothing was sent.

        Raises:
            ChainUnavailable: provably nothing was sent to anyone.
            ChainOutcomeUnknown: somebody may have taken it.
        """
        try:
            return await self._ask("send", lambda node: node.send(envelope), stale_allowed=True)
        except ChainUnavailable as fault:
            if self._horizon is None or fault.kind == "refused":
                raise
        return await self._horizon.ask("submit", lambda node: node.submit(envelope))

    async def transaction(self, tx_hash: str) -> Applied | NotSeen:
        """Return what became of a transaction; where RPC does not answer, what Horizon knows to be applied."""
        try:
            return await self._ask("transaction", lambda node: node.transaction(tx_hash), stale_allowed=True)
        except ChainUnavailable as unanswered:
            fault = unanswered
        found = await self.recorded(tx_hash)
        if found is None:
            raise fault
        return found

    async def wrapped_in(self, tx_hash: str, ledger: int) -> str | None:
        """Return the hash of the transaction inside a fee-bump that is applied; see `RpcNode.wrapped_in`."""
        return await self._ask("wrapped_in", lambda node: node.wrapped_in(tx_hash, ledger))

    async def recorded(self, tx_hash: str) -> Applied | None:
        """Return what Horizon, which may keep more of the past than RPC, has of a transaction.

        Returns:
            None where it has nothing, does not answer or is not configured: that proves nothing.
        """
        if self._horizon is None:
            return None
        try:
            return await self._horizon.ask("transaction", lambda node: node.transaction(tx_hash))
        except ChainUnavailable:
            return None

    async def events(
        self, contract_id: str, *, cursor: str | None, start_ledger: int | None, limit: int
    ) -> EventPage | OutsideRange:
        """Return a contract's next events; see `RpcNode.events`."""
        return await self._ask(
            "events",
            lambda node: node.events(contract_id, cursor=cursor, start_ledger=start_ledger, limit=limit),
            stale_allowed=True,
        )

    async def fee_stats(self) -> FeeStats:
        """Return what contract calls bid lately."""
        return await self._ask("fee_stats", RpcNode.fee_stats)

    async def wallet(self, address: str) -> WalletBalances:
        """Return what an address has of XLM and of the vault contract's USDC."""
        usdc = self.vault.usdc
        return await self._ask("wallet", lambda node: node.wallet(address, usdc))

    async def balance(self) -> int:
        """Return the vault contract's tracked balance, in stroops.

        Raises:
            ChainMismatch: the contract does not answer what a vault answers.
        """
        return await self._read(self.vault.balance())

    async def is_allowed(self, address: str) -> bool:
        """Tell whether an address may deposit. Raises as `balance`."""
        return await self._read(self.vault.is_allowed(address))

    async def is_paused(self) -> bool:
        """Tell whether the contract refuses deposits and charges for now. Raises as `balance`."""
        return await self._read(self.vault.is_paused())

    async def is_request_processed(self, request_id: str) -> bool:
        """Tell whether a charge of this id was taken. Raises as `balance`."""
        return await self._read(self.vault.is_request_processed(request_id))

    async def held(self) -> int:
        """Return how much USDC the vault contract has in the token, in stroops, >= `balance`. Raises as that."""
        return await self._read(self.vault.token_balance(self.vault.contract_id))

    # Supervision

    async def check(self) -> None:
        """Look at what answers, before the service takes calls; give up waiting after CHECK_SECONDS_MAX.

        Raises:
            ChainMismatch: it is not what was configured. What does not answer is looked at by `run`.

        Cancellation: at any time.
        """
        with trio.move_on_after(CHECK_SECONDS_MAX) as scope:
            try:
                await self._rpc.verify_all()
                if self._horizon is not None:
                    await self._horizon.verify_all()
                await self._recognise()
            except ChainUnavailable as fault:
                self._log.warning("chain_unreachable_at_start", fault=str(fault))
        if scope.cancelled_caught:
            self._log.warning("chain_unreachable_at_start", fault=f"no answer within {CHECK_SECONDS_MAX:g} s")
        self._checked = True

    async def run(self) -> None:
        """Follow the newest ledger, and look at what could not be looked at before, until halted.

        Cancellation: at any time.
        """
        while self.halted is None:
            try:
                if self._vault is None:
                    await self._recognise()
                await self.retained()
            except ChainMismatch as mismatch:
                self.halt(str(mismatch))
            except ChainUnavailable:
                pass  # the source has noted it, and asks again
            await trio.sleep(HEAD_SECONDS)

    def halt(self, reason: str) -> None:
        """Stop this part for good, for an operator to look at; the first reason stays."""
        if self.halted is None:
            self.halted = reason
            self._metrics.chain_halted.set(1)
            self._log.error("chain_halted", reason=reason)
            self._settled.set()

    def begin_again(self) -> None:
        """Forget which ledger was the newest: an operator says that the network has begun another history."""
        self._rpc.forget_newest()
        self.head = None

    # Health

    @property
    def breakers(self) -> Mapping[str, Breaker]:
        """The breakers by the names that operators use."""
        found = {"chain:rpc": self._rpc.breaker}
        if self._horizon is not None:
            found["chain:horizon"] = self._horizon.breaker
        return found

    def reports(self) -> Mapping[str, BreakerReport]:
        """Return what the breakers have seen, by the same names."""
        now, instant = self._clock.now(), trio.current_time()

        def at(when: float) -> datetime:
            return now - timedelta(seconds=instant - when)

        found: dict[str, BreakerReport] = {}
        for name, breaker in self.breakers.items():
            figures = breaker.figures
            found[name] = BreakerReport(
                state=figures.state,
                consecutive_failures=figures.consecutive_failures,
                consecutive_successes=figures.consecutive_successes,
                total_failures=figures.total_failures,
                total_successes=figures.total_successes,
                last_failure_time=None if figures.last_failure_at is None else at(figures.last_failure_at),
                last_state_change=self._began_at if figures.last_change_at is None else at(figures.last_change_at),
            )
        return found

    async def health(self) -> Mapping[Literal["rpc", "horizon"], Health]:
        """Return how each source fares now: the best of its nodes, `degraded` at best while its breaker is not closed.

        Cancellation: at any time.
        """
        found: dict[Literal["rpc", "horizon"], Health] = {}

        async def probe(name: Literal["rpc", "horizon"]) -> None:
            found[name] = "down" if self.halted is not None else await self._probes[name].state()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(probe, "rpc")
            if self._horizon is not None:
                nursery.start_soon(probe, "horizon")
        return found

    def refresh_metrics(self) -> None:
        """Set the gauges that are read rather than kept."""
        for name, breaker in self.breakers.items():
            self._metrics.chain_breaker_state.of(name).set(BREAKER_STATES[breaker.state])
        since = self._began_at
        if self.head is not None:
            self._metrics.chain_head_ledger.set(self.head.sequence)
            since = self.head.closed_at
        self._metrics.chain_lag_seconds.set((self._clock.now() - since).total_seconds())

    # Inside

    async def _ask(self, method: str, asking: Callable[[RpcNode], Awaitable[T]], *, stale_allowed: bool = False) -> T:
        self._require_running()
        try:
            return await self._rpc.ask(method, asking, stale_allowed=stale_allowed)
        except ChainMismatch as mismatch:
            if self._checked:
                self.halt(str(mismatch))
            raise

    async def _read(self, reading: Reading[T]) -> T:
        told = await self.simulate(contracts.question(reading.call, self.passphrase))
        if isinstance(told, ContractFault):
            raise ChainMismatch(
                f"The contract {reading.call.contract_id} refuses {reading.call.function}: {told.reason}"
            )
        return reading.answer(told)

    async def _recognise(self) -> None:
        expected = self.expected

        async def ask(call: ContractCall) -> Simulated | ContractFault:
            return await self.simulate(contracts.question(call, self.passphrase))

        vault = await contracts.recognise(expected.contract_id, ask)
        if expected.settlement_id is not None and vault.settlement not in (None, expected.settlement_id):
            raise ChainMismatch(
                f"The vault contract {vault.contract_id} settles to {vault.settlement}, and "
                f"STELLAR_{self.network.upper()}_SETTLEMENT_CONTRACT_ID is {expected.settlement_id}"
            )
        if expected.owner is not None and vault.owner != expected.owner:
            raise ChainMismatch(
                f"The vault contract {vault.contract_id} belongs to {vault.owner}, and VAULT_OWNER_SEED is the key of "
                f"{expected.owner}"
            )
        self._vault = vault
        self._settled.set()
        self._log.info("vault_contract_recognised", contract=vault.contract_id, generation=vault.generation)

    def _require_running(self) -> None:
        if self.halted is not None:
            raise ChainMismatch(self.halted)


def same_network(expected: str, told: str, name: str) -> None:
    """Return where a node is on the network that was configured.

    Raises:
        ChainMismatch: it is not; says what to do.
    """
    if told != expected:
        raise ChainMismatch(
            f"The node {name} is on the network {told!r}, and {expected!r} is configured: check STELLAR_NETWORK, "
            "STELLAR_NETWORK_PASSPHRASE and the node's URL"
        )


class _Probe:
    """Looks at a source's nodes, once for all who ask at the same time or shortly after."""

    def __init__(self, source: Source[RpcNode] | Source[HorizonNode]) -> None:
        self._source = source
        self._asking = trio.Lock()
        self._looked_at: float | None = None
        self._found: Health = "down"

    async def state(self) -> Health:
        async with self._asking:
            if self._looked_at is None or trio.current_time() - self._looked_at >= PROBE_KEPT_SECONDS:
                self._found = await self._look()
                self._looked_at = trio.current_time()
        if self._source.breaker.state != "closed" and self._found == "ok":
            return "degraded"
        return self._found

    async def _look(self) -> Health:
        found: list[Health] = []

        async def look(node: Node) -> None:
            found.append(await _fares(node))

        async with trio.open_nursery() as nursery:
            for node in self._source.nodes:
                nursery.start_soon(look, node)
        return min(found, key=_WORSE.__getitem__)


async def _fares(node: Node) -> Health:
    """Return how one node fares."""
    began = trio.current_time()
    try:
        await node.healthy()
    except ChainUnavailable as fault:
        return "down" if fault.kind in ("unreachable", "timeout") else "degraded"
    return "degraded" if trio.current_time() - began >= SLOW_SECONDS else "ok"
