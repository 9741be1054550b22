"""The service: everything is built here, in nested blocks; leaving them in reverse order is the drain.

Order of the drain: no new calls, no new attempts at webhooks, and streams are told to come back → calls and attempts in
hand end → the chain's tasks, at a step that is stored → the connections to its nodes → commands in mailboxes are stored
→ the writer → the connections to PostgreSQL → the asyncio loop. One budget for all of it; at its end everything is
cancelled, and a watchdog outside the event loop ends a process that does not end by itself.
"""

import gc
import os
import random
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs
import trio
from structlog.typing import FilteringBoundLogger

from callora.actors.breaker import BreakerSettings
from callora.actors.budgets import Budgets
from callora.actors.catalogue import Catalogue
from callora.actors.compensation import Compensator
from callora.actors.dates import Dates
from callora.actors.expiry import ExpirySweep, repeat
from callora.actors.limiter import Limiter
from callora.actors.registry import VaultRegistry
from callora.actors.revenue import RevenueIndexer
from callora.actors.shared_limiter import SharedLimiter
from callora.actors.supervisor import Supervisor
from callora.actors.webhooks import SLOW_TURNS_MAX, TURNS_MAX, Teller, Webhooks
from callora.actors.writer import Writer
from callora.config.settings import Settings
from callora.dashboard import Desk, make_dashboard, signing
from callora.http.gateway.admission import Admission
from callora.http.gateway.aliases import Aliases
from callora.http.gateway.calls import CallFlow, CallSettings
from callora.http.gateway.client import TimeLimits
from callora.http.gateway.listener import Listener, RestStreams, open_listener
from callora.http.gateway.poller import Poller
from callora.http.gateway.tokens import AccessTokens
from callora.http.gateway.upstream import Upstreams
from callora.http.rest.app import create_app, larger_bodies, serve_rest, stream_paths
from callora.http.rest.deps import RestDeps
from callora.ledger.faults import CalloraFault
from callora.ledger.ids import Ids
from callora.ledger.webhooks import Secrets
from callora.logs import Logs
from callora.metrics import BREAKER_STATES, Metrics
from callora.outbound.addresses import AddressPolicy, Resolver
from callora.outbound.client import EVERYWHERE, Outbound, OutboundPolicy, open_outbound
from callora.store import usage
from callora.store.bridge import Database, StatementRejected, open_database
from callora.store.keys import note_use
from callora.store.migrate import pending
from callora.store.reads.claims import CLAIMS_SETTINGS, Claims
from callora.store.reads.gateway import Reads
from callora.store.rounds import LINE_SETTINGS
from callora.store.vaults import VaultStore
from callora.trust import system_trust

if TYPE_CHECKING:
    from callora.chain_part import ChainDesk, ChainPart
    from callora.store.pace import SharedPace

KEYED_BODY_BYTES_MAX: Final = 1_048_576
"""The largest request body with an Idempotency-Key: it is held in memory while its intent is looked up."""
UPSTREAM_IDLE_SECONDS: Final = 300.0
"""How long an upstream may be silent inside an answer's body: longer than any heartbeat of an event stream."""
REST_KEEP_ALIVE_SECONDS: Final = 120.0
"""Longer than the listener keeps an idle connection to the REST server."""
SETTLE_SECONDS: Final = 1.0
"""After the drain's deadline: what cut calls left behind is stored."""
LAST_RESORT_SECONDS: Final = 1.7
"""After the drain's deadline: the process is ended whatever it is doing."""
MAINTENANCE_SECONDS: Final = 3600.0
PARTITIONS_SECONDS: Final = 2.0
"""How long a start waits for this month's partition, which the first call needs."""
SUMS_SECONDS: Final = 15.0
DRIFT_SECONDS: Final = 300.0
KEY_USE_SECONDS: Final = 60.0
DATES_SECONDS: Final = 2.0
MIGRATIONS_SECONDS: Final = 5.0
RATE_STORE_SECONDS: Final = 2.0
"""How long the start waits to hear whether the store of shared rate limits answers; then it goes on all the same."""
METER_POLICY: Final = OutboundPolicy(EVERYWHERE, plain="localhost")
"""Meter sources stand in private networks, and only operators name them."""
METER_CONNECTIONS_MAX: Final = 1024
"""More than there may be sources: one that hangs keeps no other from its connection."""
CHANGES_KEPT: Final = 100_000
CLAIMS_BATCH: Final = 10_000


Task = Callable[[], Awaitable[None]]


class SystemClock:
    """The wall clock, as UTC."""

    def now(self) -> datetime:
        """Return the present instant."""
        return datetime.now(UTC)

    def timestamp(self) -> float:
        """Return it in seconds since 1970."""
        return time.time()


@attrs.frozen
class Ledger:
    """The part of the service that moves money, without anything that listens."""

    database: Database
    store: VaultStore
    claims: Claims
    registry: VaultRegistry
    indexer: RevenueIndexer


@attrs.frozen
class Context:
    """What every part is given."""

    settings: Settings
    metrics: Metrics
    logs: Logs
    clock: SystemClock
    ids: Ids
    random: random.Random

    @classmethod
    def make(cls, settings: Settings, logs: Logs, clock: SystemClock) -> "Context":
        """Return the context of a process."""
        return cls(settings, Metrics(), logs, clock, Ids(clock, os.urandom), random.Random())  # noqa: S311 - jitter


def _indexer(context: Context, database: Database) -> RevenueIndexer:
    settings, logs = context.settings, context.logs
    return RevenueIndexer(
        database,
        context.clock,
        context.metrics,
        logs.logger("revenue"),
        network=settings.stellar_network,
        fee_bps=settings.platform_fee_bps,
        interval_seconds=settings.revenue_indexer_interval_seconds,
    )


@asynccontextmanager
async def open_ledger(context: Context, dsn: str, budget: "Budget") -> AsyncIterator[Ledger]:
    """Open the database and the actors; on leaving, every decision is stored before anything closes.

    Cancellation: waited for until the drain's budget is spent.
    """
    settings, metrics, logs = context.settings, context.metrics, context.logs
    supervisor = Supervisor(metrics, logs.logger("supervisor"), context.random)
    async with (
        open_database(
            dsn,
            pool_max=settings.db_pool_max,
            idle_seconds=settings.db_idle_timeout_seconds,
            connect_seconds=settings.db_conn_timeout_seconds,
            beside_calls=True,
        ) as database,
        database.line(LINE_SETTINGS) as line,
        database.line(CLAIMS_SETTINGS) as claims_line,
    ):
        store = VaultStore(database, line, context.clock, context.ids.uuid7, settings.commit_timeout_seconds)
        claims = Claims(claims_line, database, settings.commit_timeout_seconds)
        writer = Writer(store, metrics, logs.logger("writer"), settings.writer_round_max)
        registry = VaultRegistry(
            store, writer, metrics, logs.logger("registry"), context.random, settings.actor_mailbox_max
        )
        async with trio.open_nursery() as writing:
            await writing.start(supervisor.run, "writer", writer.run)
            async with trio.open_nursery() as acting:
                await acting.start(registry.run)
                try:
                    yield Ledger(database, store, claims, registry, _indexer(context, database))
                finally:
                    registry.close()
                    writing.cancel_scope.shield = True
                    acting.cancel_scope.shield = True
                    acting.cancel_scope.deadline = budget.settle_at()
            if acting.cancel_scope.cancelled_caught:
                budget.exceeded = True
            writing.cancel_scope.cancel()


class Budget:
    """The drain's time: one deadline for all of its steps, and whether it was kept."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._started_at: float | None = None
        self.exceeded = False
        """True when something was cut: the exit code tells."""

    def start(self) -> None:
        """Start counting; the first start counts."""
        if self._started_at is None:
            self._started_at = trio.current_time()

    @property
    def draining(self) -> bool:
        """True from the start on."""
        return self._started_at is not None

    @property
    def deadline(self) -> float:
        """When calls in hand are cut, on Trio's clock."""
        assert self._started_at is not None
        return self._started_at + self._seconds

    def settle_at(self) -> float:
        """Return when what is still undecided is given up."""
        self.start()
        return self.deadline + SETTLE_SECONDS


@attrs.frozen
class Serving:
    """A service that takes calls."""

    url: str
    ledger: Ledger
    context: Context
    chain: "ChainPart | None"
    """None where SOROBAN_RPC_ENABLED is false."""


async def serve(
    context: Context,
    dsn: str,
    stop: trio.Event,
    *,
    shared_port: bool = False,
    flow_class: type[CallFlow] = CallFlow,
    prepare: Callable[[Ledger], Awaitable[None]] | None = None,
    on_ready: Callable[[Serving], Awaitable[None]] | None = None,
) -> int:
    """Serve until `stop` is set, then drain.

    Args:
        dsn: the database; it need not be up.
        shared_port: whether other processes listen on the same port.
        flow_class: the call flow; the benchmark measures shorter ones.
        prepare: called before any call is taken.
        on_ready: called once calls are taken.

    Returns:
        The exit code: 0 when everything ended in time, 1 when something had to be cut.

    Raises:
        OSError: the port is taken.
        ChainMismatch: what answers for the chain is not what was configured.
    """
    settings, log = context.settings, context.logs.logger("service")
    listener_socket = open_listener(settings.host, settings.port, shared=shared_port)
    poller = Poller()
    last_resort = threading.Timer(settings.drain_timeout_seconds + LAST_RESORT_SECONDS, os._exit, (1,))
    last_resort.daemon = True
    try:
        budget = Budget(settings.drain_timeout_seconds)
        async with (
            open_ledger(context, dsn, budget) as ledger,
            _open_chain(context, ledger) as chain,
            open_outbound(METER_POLICY, connections_max=METER_CONNECTIONS_MAX) as meters,
            open_outbound(_webhook_policy(settings), connections_max=TURNS_MAX + SLOW_TURNS_MAX) as outbound,
            trio.open_nursery() as jobs,
        ):
            if prepare is not None:
                await prepare(ledger)
            port: int = listener_socket.getsockname()[1]
            parts = await _start_parts(context, ledger, chain, meters, outbound, poller, jobs, flow_class, budget, port)
            async with trio.open_nursery() as serving:
                await serving.start(parts.rest.run)
                await serving.start(parts.listener.run, [listener_socket])
                gc.freeze()
                url = _url(settings, listener_socket)
                log.info("serving", url=url)
                if on_ready is not None:
                    await on_ready(Serving(url, ledger, context, chain))
                await stop.wait()
                last_resort.start()
                await _drain(parts, budget, serving, log)
            jobs.cancel_scope.cancel()
        log.info("stopped", clean=not budget.exceeded)
        return 1 if budget.exceeded else 0
    finally:
        gc.unfreeze()
        last_resort.cancel()
        listener_socket.close()
        poller.close()


async def _drain(parts: "_Parts", budget: Budget, serving: trio.Nursery, log: FilteringBoundLogger) -> None:
    budget.start()
    log.info("draining", calls=parts.listener.busy)
    parts.context.metrics.draining.set(1)
    parts.admission.draining = True
    parts.rest.dashboard.live_usage.close()
    parts.listener.drain()
    parts.webhooks.drain()
    with trio.move_on_at(budget.deadline):
        await parts.listener.ended.wait()
        await parts.webhooks.ended.wait()
    if not parts.listener.ended.is_set() or not parts.webhooks.ended.is_set():
        budget.exceeded = True
        log.warning("drain_deadline", calls_cut=parts.listener.busy, webhooks_cut=not parts.webhooks.ended.is_set())
    serving.cancel_scope.cancel()


@attrs.frozen
class _Parts:
    """What the service serves with."""

    context: Context
    admission: Admission
    listener: Listener
    webhooks: Webhooks
    rest: "_Rest"


@asynccontextmanager
async def _open_chain(context: Context, ledger: Ledger) -> "AsyncIterator[ChainPart | None]":
    """Run the chain's part for the length of the block, where SOROBAN_RPC_ENABLED.

    Only there is it loaded, before anything is served: Stellar's SDK takes 20 MiB and half a second.
    """
    if not context.settings.soroban_rpc_enabled:
        yield None
        return
    from callora.chain_part import open_chain

    async with open_chain(chain_desk(context, ledger)) as part:
        yield part


def chain_desk(context: Context, ledger: Ledger) -> "ChainDesk":
    """Return what the chain's part of a process works with; it is loaded with that."""
    from callora.chain_part import ChainDesk

    return ChainDesk(
        settings=context.settings,
        database=ledger.database,
        registry=ledger.registry,
        indexer=ledger.indexer,
        clock=context.clock,
        ids=context.ids,
        random=context.random,
        metrics=context.metrics,
        logs=context.logs,
    )


async def _start_parts(
    context: Context,
    ledger: Ledger,
    chain: "ChainPart | None",
    meters: Outbound,
    outbound: Outbound,
    poller: Poller,
    jobs: trio.Nursery,
    flow_class: type[CallFlow],
    budget: Budget,
    port: int,
) -> _Parts:
    """Make the parts, and start those that run beside the calls."""
    settings, metrics, logs = context.settings, context.metrics, context.logs
    reads = Reads(ledger.database)
    limiter = Limiter(
        user_limit=settings.gateway_rate_limit_max_requests,
        user_window_seconds=settings.gateway_rate_limit_window_seconds,
        key_limit_default=settings.rate_limit_max_requests,
        key_window_seconds=settings.rate_limit_window_seconds,
        running_max=settings.key_max_concurrency,
    )
    pace = _shared_pace(context)
    closed = settings.rate_limit_on_failure == "closed"
    shared_limiter = None if pace is None else SharedLimiter(limiter, pace, metrics, opens=not closed)
    catalogue = Catalogue(
        reads,
        metrics,
        logs.logger("catalogue"),
        settings.catalogue_refresh_seconds,
        lambda used: note_use(ledger.database, used, context.clock.now()),
        context.clock,
    )
    jobs.start_soon(poller.run)
    policy = AddressPolicy(settings.upstream_allowed_hosts, settings.upstream_allowed_networks)
    resolver = Resolver(policy, jobs, deadline_seconds=settings.proxy_connect_timeout_seconds)
    upstreams = Upstreams(poller, resolver, system_trust(), settings.upstream_pool_max)
    compensator = Compensator(ledger.registry, context.clock, context.ids, logs.logger("compensation"))
    budgets = Budgets(ledger.database, logs.logger("budgets"))
    admission = Admission(
        catalogue=catalogue,
        limiter=limiter,
        shared_limiter=shared_limiter,
        resolver=resolver,
        breaker_settings=BreakerSettings(
            settings.proxy_breaker_failure_threshold,
            settings.proxy_breaker_cooldown_seconds,
            settings.proxy_breaker_success_threshold,
        ),
        trusted_proxies=settings.trusted_proxy_count,
        metrics=metrics,
        tokens=AccessTokens(signing(settings), catalogue, context.clock),
    )
    flow = flow_class(
        admission=admission,
        registry=ledger.registry,
        upstreams=upstreams,
        claims=ledger.claims,
        compensator=compensator,
        budgets=budgets,
        settings=_call_settings(settings),
        clock=context.clock,
        ids=context.ids,
        metrics=metrics,
        log=logs.logger("gateway"),
    )
    housekeeping = _Housekeeping(context, ledger.database, reads)
    secrets = Secrets(settings.webhook_key)
    teller = Teller(outbound, secrets, context.clock, seconds_max=settings.webhook_timeout_seconds)
    webhooks = Webhooks(
        ledger.database,
        teller,
        context.clock,
        context.ids,
        context.random,
        metrics,
        logs.logger("webhooks"),
        interval_seconds=settings.webhook_poll_interval_seconds,
        retention_seconds=settings.webhook_retention_seconds,
    )
    desk = Desk(
        settings=settings,
        database=ledger.database,
        registry=ledger.registry,
        catalogue=catalogue,
        admission=admission,
        resolver=resolver,
        meters=meters,
        chain=None if chain is None else chain.chain,
        treasury=None if chain is None else chain.treasury,
        payouts=None if chain is None else chain.payouts,
        bookkeeper=None if chain is None else chain.bookkeeper,
        outbound=outbound,
        teller=teller,
        port=port,
        clock=context.clock,
        ids=context.ids,
        random=context.random,
        metrics=metrics,
        log=logs.logger("dashboard"),
    )
    rest = _Rest(context, desk, housekeeping, budget)
    listener = Listener(
        flow=flow,
        poller=poller,
        rest_path=rest.path,
        tls=_server_tls(settings),
        limits=TimeLimits(
            head_seconds=settings.client_head_timeout_seconds,
            idle_seconds=settings.client_idle_timeout_seconds,
            body_seconds=settings.client_body_timeout_seconds,
        ),
        connections_max=settings.client_max_connections,
        rest_body_bytes_max=settings.request_body_limit_bytes,
        rest_larger_bodies=rest.larger_bodies,
        rest_streams=RestStreams(rest.stream_paths, settings.usage_streams_max),
        trusted_proxies=settings.trusted_proxy_count,
        aliases=Aliases(settings.call_alias_targets),
        ids=context.ids,
        metrics=metrics,
        log=logs.logger("listener"),
    )
    expiry = ExpirySweep(
        ledger.database,
        ledger.registry,
        context.clock,
        metrics,
        logs.logger("expiry"),
        interval_seconds=settings.hold_sweep_interval_seconds,
        commit_seconds_max=settings.commit_timeout_seconds,
    )
    dates = Dates(ledger.database, logs.logger("dates"))
    supervisor = Supervisor(metrics, logs.logger("supervisor"), context.random)
    tasks: tuple[tuple[str, Task], ...] = (
        ("catalogue", catalogue.run),
        ("key use", partial(repeat, "key use", catalogue.note_used, KEY_USE_SECONDS, logs.logger("catalogue"))),
        ("limiter", limiter.run),
        *(() if pace is None else (("shared pace", pace.run),)),
        ("upstreams", upstreams.run),
        ("compensation", compensator.run),
        ("budgets", budgets.run),
        ("dates", partial(repeat, "dates", dates.extend, DATES_SECONDS, logs.logger("dates"))),
        ("expiry", expiry.run),
        ("revenue", ledger.indexer.run),
        ("webhooks", webhooks.run),
        ("webhook log", partial(repeat, "webhook log", webhooks.forget, MAINTENANCE_SECONDS, logs.logger("webhooks"))),
        *housekeeping.tasks(),
        *rest.dashboard.tasks,
    )
    await housekeeping.begin()
    for name, task in tasks:
        await jobs.start(supervisor.run, name, task)
    if pace is not None:
        with trio.move_on_after(RATE_STORE_SECONDS):
            await pace.tried.wait()
    return _Parts(context, admission, listener, webhooks, rest)


class _Rest:
    """The REST server, on a UNIX socket that only the listener knows."""

    def __init__(self, context: Context, desk: Desk, housekeeping: "_Housekeeping", budget: Budget) -> None:
        self._context = context
        self._desk = desk
        self._directory = Path(tempfile.mkdtemp(prefix="callora-"))
        self.path = str(self._directory / "rest.sock")
        deps = RestDeps(
            settings=context.settings,
            metrics=context.metrics,
            logger=context.logs.logger("rest"),
            clock=context.clock,
            new_request_id=context.ids.uuid7,
            database_check=desk.database.check,
            draining=lambda: budget.draining,
            pending_migrations=lambda: housekeeping.migrations_pending,
            refresh_metrics=self._refresh_metrics,
            chain_health=None if desk.chain is None else desk.chain.health,
        )
        self.dashboard = make_dashboard(desk, deps)
        self.larger_bodies = larger_bodies(self.dashboard.operations, context.settings.request_body_limit_bytes)
        self.stream_paths = stream_paths(self.dashboard.operations)
        self._app = create_app(deps, self.dashboard.operations, self.dashboard.doors)

    async def run(self, *, task_status: trio.TaskStatus[list[str]]) -> None:  # noqa: ASYNC128 - the server it runs calls it
        """Serve until cancelled."""
        logger = self._context.logs.stdlib_logger("hypercorn")
        logger.setLevel("WARNING")  # its greeting names a private socket
        try:
            await serve_rest(
                self._app,
                binds=[f"unix:{self.path}"],
                logger=logger,
                shutdown=trio.sleep_forever,
                graceful_timeout_seconds=1.0,
                keep_alive_seconds=REST_KEEP_ALIVE_SECONDS,
                task_status=task_status,
            )
        finally:
            self._directory.rmdir()

    def _refresh_metrics(self) -> None:
        metrics = self._context.metrics
        metrics.flush()
        metrics.active_vaults.set(self._desk.registry.active)
        for api_id, breaker in self._desk.admission.breaker_states().items():
            metrics.upstream_breaker_state.of(str(api_id)).set(BREAKER_STATES[breaker.state])
        if self._desk.admission.shared_limiter is not None:
            metrics.rate_limit_store_up.set(self._desk.admission.shared_limiter.answers)
        if self._desk.chain is not None:
            self._desk.chain.refresh_metrics()


def _shared_pace(context: Context) -> "SharedPace | None":
    """Return what limits are shared through, where REDIS_URL is set; only there is its client loaded."""
    address = context.settings.redis_address
    if address is None:
        return None
    from callora.store.pace import SharedPace

    takes_back = context.settings.rate_limit_on_failure == "closed"
    return SharedPace(address, context.random, context.logs.logger("rate limits"), takes_back=takes_back)


def _call_settings(settings: Settings) -> CallSettings:
    return CallSettings(
        body_bytes_max=settings.gateway_body_limit_bytes,
        keyed_body_bytes_max=min(KEYED_BODY_BYTES_MAX, settings.gateway_body_limit_bytes),
        stored_answer_bytes_max=settings.idempotency_max_body_bytes,
        connect_seconds=settings.proxy_connect_timeout_seconds,
        answer_seconds=settings.proxy_timeout_seconds,
        idle_seconds=UPSTREAM_IDLE_SECONDS,
        hold_ttl_seconds=int(settings.hold_ttl_seconds),
        claim_retention_seconds=int(settings.idempotency_retention_seconds),
        profile_upstreams=settings.gateway_profiling_enabled,
    )


def _webhook_policy(settings: Settings) -> OutboundPolicy:
    """Return where webhooks may go: where upstreams may be, in production under TLS alone."""
    addresses = AddressPolicy(settings.upstream_allowed_hosts, settings.upstream_allowed_networks)
    return OutboundPolicy(addresses, plain="never" if settings.is_production else "anywhere")


def _server_tls(settings: Settings) -> ssl.SSLContext | None:
    if settings.tls_cert_file is None or settings.tls_key_file is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    context.load_cert_chain(settings.tls_cert_file, settings.tls_key_file)
    return context


def _url(settings: Settings, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # noqa: S104 - read, not bound
        host = "127.0.0.1"
    scheme = "https" if settings.tls_enabled else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


class _Housekeeping:
    """What keeps tables small and gauges true."""

    def __init__(self, context: Context, database: Database, reads: Reads) -> None:
        self._context = context
        self._log = context.logs.logger("jobs")
        self._database = database
        self._reads = reads
        self.migrations_pending = 1
        """Migrations that the database lacks; until it was asked, one."""

    def tasks(self) -> Iterator[tuple[str, Task]]:
        """Yield the jobs with their names."""
        claims_seconds = self._context.settings.idempotency_sweep_interval_seconds
        for name, job, seconds in (
            ("migrations", self.look_at_migrations, MIGRATIONS_SECONDS),
            ("maintenance", self.maintain, MAINTENANCE_SECONDS),
            ("claims", self.drop_claims, claims_seconds),
            ("drift", self.read_drift, DRIFT_SECONDS),
            ("sums", self.read_sums, SUMS_SECONDS),
        ):
            yield name, partial(repeat, name, job, seconds, self._log)

    async def begin(self) -> None:
        """Make the partitions before the first call needs one; where that cannot be done now, the job does it later."""
        with trio.move_on_after(PARTITIONS_SECONDS):
            try:
                await self.maintain()
            except (CalloraFault, StatementRejected) as fault:
                self._log.warning("partitions_not_made", error=str(fault))

    async def look_at_migrations(self) -> None:
        """Ask what the database lacks, until it lacks nothing."""
        if self.migrations_pending:
            self.migrations_pending = len(await pending(self._database))

    async def maintain(self) -> None:
        """Make the partitions of the months to come and drop what every process has seen."""
        for name in await usage.ensure_partitions(self._database, self._context.clock.now()):
            self._log.info("partition_made", name=name)
        await usage.drop_old_changes(self._database, CHANGES_KEPT)

    async def drop_claims(self) -> None:
        """Forget idempotency keys past their retention."""
        while await usage.drop_expired_claims(self._database, self._context.clock.now(), CLAIMS_BATCH) == CLAIMS_BATCH:
            pass

    async def read_drift(self) -> None:
        """Add up the whole ledger: balances, entries and captures."""
        drift = await self._reads.ledger_drift()
        self._context.metrics.ledger_drift_stroops.set(drift)
        if drift:
            self._log.error("ledger_drift", stroops=drift)

    async def read_sums(self) -> None:
        """Read Σ available, Σ held and Σ owed."""
        available, held, owed = await self._reads.balance_sums()
        self._context.metrics.available_stroops.set(available)
        self._context.metrics.held_stroops.set(held)
        self._context.metrics.owed_stroops.set(owed)
