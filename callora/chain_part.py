"""The chain's part of the service: everything that speaks to Stellar, or waits for it, is built, run and ended here.

It stands beside the gateway and never above it. What crashes here again and again, or finds another network or contract
than was configured, halts this part and nothing else: prepaid calls need no chain. Where none is configured this module
is not loaded, nor what it needs: Stellar's SDK and the HTTP client.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from random import Random
from typing import Final

import attrs
import trio
from structlog.typing import FilteringBoundLogger

from callora.actors.bookkeeping import Bookkeeper
from callora.actors.breaker import BreakerSettings
from callora.actors.chain import Chain, Expected, same_network
from callora.actors.follower import Tools
from callora.actors.payouts import Payouts
from callora.actors.registry import VaultRegistry
from callora.actors.revenue import RevenueIndexer
from callora.actors.settlement import Settlements, SettlementSettings
from callora.actors.sources import RetrySettings, Source
from callora.actors.submitter import BID_MAX, Submitter
from callora.actors.supervisor import Supervisor
from callora.actors.treasury import Treasury, TreasurySettings, make_treasury
from callora.config.settings import Settings
from callora.ledger.chain import Envelope
from callora.ledger.clock import Clock
from callora.ledger.faults import ChainMismatch, leaves_of
from callora.ledger.ids import Ids
from callora.ledger.money import Stroops
from callora.logs import Logs
from callora.metrics import Metrics
from callora.stellar.envelopes import Signer, bump, inclusion_fee
from callora.stellar.horizon import HorizonNode
from callora.stellar.rpc import RpcNode
from callora.stellar.transport import Transport, open_transport
from callora.store.bridge import Database
from callora.store.transactions import TransactionStore

Task = Callable[[], Awaitable[None]]

SUCCESSES: Final = 1
"""Trials that close a breaker of the chain."""


@attrs.frozen
class ChainDesk:
    """What the chain's part works with."""

    settings: Settings
    database: Database
    registry: VaultRegistry
    indexer: RevenueIndexer
    clock: Clock
    ids: Ids
    random: Random
    metrics: Metrics
    logs: Logs


@attrs.frozen
class ChainPart:
    """What the rest of the service sees of it."""

    chain: Chain
    submitter: Submitter
    treasury: Treasury
    settlements: Settlements | None
    """None where the keys that settle are not configured."""
    payouts: Payouts
    bookkeeper: Bookkeeper


@asynccontextmanager
async def open_chain(desk: ChainDesk) -> AsyncIterator[ChainPart]:
    """Run the chain's part for the length of the block; for where SOROBAN_RPC_ENABLED.

    On leaving, its tasks are cancelled, which they bear at every step because each is stored before it is taken; then
    the connections to the nodes are closed. The database outlives the block.

    Raises:
        ChainMismatch: at the start: what answers is not what was configured. What does not answer keeps nobody waiting
            longer than a few seconds.
    """
    async with open_transport() as transport:
        chain = make_chain(
            desk.settings,
            transport,
            clock=desk.clock,
            random=desk.random,
            metrics=desk.metrics,
            log=desk.logs.logger("chain"),
        )
        await chain.check()
        part, tasks = _build(desk, chain)
        supervisor = Supervisor(desk.metrics, desk.logs.logger("supervisor"), desk.random)
        async with trio.open_nursery() as running:
            for name, task in tasks:
                await running.start(keep, supervisor, chain, name, task)
            yield part
            running.cancel_scope.cancel()


@asynccontextmanager
async def open_counter(desk: ChainDesk) -> AsyncIterator[ChainPart]:
    """Give a command the chain's part without what runs beside the calls: only what it passes on is sent and followed.

    Raises:
        ChainMismatch: the chain is not configured, or what answers is not what was configured.
        ChainUnavailable: nobody answers.
    """
    if not desk.settings.soroban_rpc_enabled:
        raise ChainMismatch("the chain is not configured: set SOROBAN_RPC_ENABLED and what it needs")
    async with open_transport() as transport:
        chain = make_chain(
            desk.settings,
            transport,
            clock=desk.clock,
            random=desk.random,
            metrics=desk.metrics,
            log=desk.logs.logger("chain"),
        )
        await chain.check()
        part, _ = _build(desk, chain)
        async with trio.open_nursery() as running:
            await running.start(part.submitter.run)
            yield part
            running.cancel_scope.cancel()


async def examine(desk: ChainDesk) -> str:
    """Return what is fit of the chain's part, having asked the contracts whether they know the keys.

    Raises:
        ChainMismatch: something is not; says what to do.
        ChainUnavailable: nobody answers.
    """
    async with open_transport() as transport:
        chain = make_chain(
            desk.settings,
            transport,
            clock=desk.clock,
            random=desk.random,
            metrics=desk.metrics,
            log=desk.logs.logger("chain"),
        )
        await chain.check()
        part, _ = _build(desk, chain)
        if part.settlements is None:
            return f"the vault contract is {chain.vault.generation}; the keys that settle are not set here"
        await part.settlements.check()
        return f"the vault contract is {chain.vault.generation}; the contracts know the keys that settle"


def _build(desk: ChainDesk, chain: Chain) -> tuple[ChainPart, tuple[tuple[str, Task], ...]]:
    """Return what the rest of the service sees, and the tasks in the order in which they start."""
    submitter = make_submitter(desk, chain)
    treasury = make_treasury(
        chain,
        submitter,
        desk.database,
        desk.registry,
        _treasury_settings(desk.settings),
        clock=desk.clock,
        ids=desk.ids,
        metrics=desk.metrics,
        log=desk.logs.logger("treasury"),
    )
    settlements = _settlements(desk, chain, submitter)
    settling = () if settlements is None else (("settlements", settlements.run),)
    payouts = Payouts(
        chain,
        submitter,
        desk.database,
        desk.clock,
        desk.metrics,
        desk.logs.logger("payouts"),
        bid=desk.settings.stellar_base_fee_stroops,
        timeout_seconds=int(desk.settings.stellar_transaction_timeout_seconds),
    )
    bookkeeper = make_bookkeeper(
        desk.settings,
        desk.database,
        chain,
        clock=desk.clock,
        ids=desk.ids,
        metrics=desk.metrics,
        log=desk.logs.logger("bookkeeping"),
    )
    following = (("payouts", payouts.run), ("bookkeeping", bookkeeper.run))
    tasks = (("chain", chain.run), ("submitter", submitter.run), *treasury.tasks, *settling, *following)
    return ChainPart(chain, submitter, treasury, settlements, payouts, bookkeeper), tasks


def make_bookkeeper(
    settings: Settings,
    database: Database,
    chain: Chain | None,
    *,
    clock: Clock,
    ids: Ids,
    metrics: Metrics,
    log: FilteringBoundLogger,
) -> Bookkeeper:
    """Return the bookkeeper that the settings describe.

    Args:
        chain: None where it is not configured.
    """
    return Bookkeeper(
        chain,
        database,
        network=settings.stellar_network,
        clock=clock,
        ids=ids,
        metrics=metrics,
        log=log,
        interval_seconds=settings.settlement_recon_interval_seconds,
        drift_max=settings.chain_drift_max_stroops,
    )


def _settlements(desk: ChainDesk, chain: Chain, submitter: Submitter) -> Settlements | None:
    settings = desk.settings
    charging, crediting = settings.settlement_charging_seed, settings.settlement_crediting_seed
    if charging is None or crediting is None:
        return None
    passphrase = settings.network_passphrase
    return Settlements(
        chain,
        submitter,
        desk.indexer,
        desk.database,
        SettlementSettings(
            charger=Signer.from_seed(charging.get_secret_value(), passphrase).address,
            crediter=Signer.from_seed(crediting.get_secret_value(), passphrase).address,
            charging_cap=Stroops(settings.settlement_charging_cap_stroops),
            crediting_cap=Stroops(settings.settlement_crediting_cap_stroops),
            payout_min=Stroops(settings.settlement_min_payout_stroops),
            platform=settings.platform_fee_address,
            interval_seconds=settings.settlement_interval_seconds,
            sync_seconds=settings.settlement_status_sync_interval_seconds,
            sync_timeout_seconds=settings.settlement_status_sync_timeout_seconds,
        ),
        clock=desk.clock,
        ids=desk.ids,
        metrics=desk.metrics,
        log=desk.logs.logger("settlement"),
    )


@attrs.frozen
class _Bumper:
    """Pays the fees of transactions that are stuck."""

    _signer: Signer

    def bump(self, envelope: Envelope, bid: int) -> Envelope:
        return bump(envelope, self._signer, bid)


def make_submitter(desk: ChainDesk, chain: Chain) -> Submitter:
    """Return the submitter that the settings describe; nothing is sent before it runs."""
    settings = desk.settings
    passphrase = settings.network_passphrase
    channels = [Signer.from_seed(seed.get_secret_value(), passphrase) for seed in settings.channel_seeds]
    sponsor = _sponsor(settings)
    # Each has a key of its own, and none of them lends sequence numbers.
    seeds = (settings.vault_owner_seed, settings.settlement_charging_seed, settings.settlement_crediting_seed)
    tools = Tools(
        network=settings.stellar_network,
        chain=chain,
        store=TransactionStore(desk.database),
        sponsor=None if sponsor is None else _Bumper(sponsor),
        has_witness=settings.horizon_enabled,
        bid_max=BID_MAX,
        clock=desk.clock,
        metrics=desk.metrics,
        log=desk.logs.logger("submitter"),
    )
    return Submitter(
        tools,
        channels=channels,
        authorities=[Signer.from_seed(seed.get_secret_value(), passphrase) for seed in seeds if seed is not None],
        bid_of=partial(inclusion_fee, passphrase=passphrase),
        random=desk.random,
        base_fee=settings.stellar_base_fee_stroops,
    )


def _treasury_settings(settings: Settings) -> TreasurySettings:
    return TreasurySettings(
        listen_seconds=settings.deposit_listener_interval_seconds,
        compare_seconds=settings.chain_reconciliation_interval_seconds,
        drift_max=settings.chain_drift_max_stroops,
        deposit_seconds=int(settings.stellar_transaction_timeout_seconds),
        bid=settings.stellar_base_fee_stroops,
        owner_signs=settings.vault_owner_seed is not None,
        sponsor=_sponsor(settings),
    )


def _sponsor(settings: Settings) -> Signer | None:
    seed = settings.fee_bumper_secret_key
    return None if seed is None else Signer.from_seed(seed.get_secret_value(), settings.network_passphrase)


async def keep(  # noqa: ASYNC128 - the supervisor calls it
    supervisor: Supervisor,
    chain: Chain,
    name: str,
    task: Task,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Keep a task running. Where it cannot be, or finds what was not configured, halt the chain's part."""

    async def until_mismatch() -> None:
        try:
            await task()
        except (ChainMismatch, ExceptionGroup) as raised:
            leaves = list(leaves_of(raised))
            if not all(isinstance(each, ChainMismatch) for each in leaves):
                raise
            chain.halt(str(leaves[0]))

    try:
        await supervisor.run(name, until_mismatch, task_status=task_status)
    except Exception:  # the supervisor has logged it, each time
        chain.halt(f"the task {name} crashed again and again")


def make_chain(
    settings: Settings,
    transport: Transport,
    *,
    clock: Clock,
    random: Random,
    metrics: Metrics,
    log: FilteringBoundLogger,
) -> Chain:
    """Return the chain that the settings describe; nothing is asked yet."""
    passphrase = settings.network_passphrase
    assert settings.vault_contract_id is not None, "checked with the settings"
    owner = settings.vault_owner_seed
    source = partial(
        Source,
        breaker_settings=BreakerSettings(
            settings.circuit_breaker_threshold, settings.circuit_breaker_cooldown_seconds, SUCCESSES
        ),
        retry=RetrySettings(settings.retry_max_attempts, settings.retry_base_delay_seconds),
        random=random,
        metrics=metrics,
        log=log,
    )

    async def verify_rpc(node: RpcNode) -> None:
        same_network(passphrase, (await node.network()).passphrase, node.name)

    async def verify_horizon(node: HorizonNode) -> None:
        same_network(passphrase, (await node.root())[0], node.name)

    nodes = [
        RpcNode(url, passphrase, transport, health_seconds_max=settings.soroban_rpc_timeout_seconds)
        for url in settings.rpc_urls
    ]
    horizon: Source[HorizonNode] | None = None
    if settings.horizon_enabled:
        assert settings.horizon_url_in_use is not None, "checked with the settings"
        horizon = source(
            "horizon",
            [HorizonNode(settings.horizon_url_in_use, transport, health_seconds_max=settings.horizon_timeout_seconds)],
            verify_horizon,
        )
    return Chain(
        Expected(
            network=settings.stellar_network,
            passphrase=passphrase,
            contract_id=settings.vault_contract_id,
            settlement_id=settings.settlement_contract_id,
            owner=None if owner is None else Signer.from_seed(owner.get_secret_value(), passphrase).address,
        ),
        source("rpc", nodes, verify_rpc),
        horizon,
        clock,
        metrics,
        log,
    )
