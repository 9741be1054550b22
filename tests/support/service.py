"""A whole service in the test's own event loop, on a real database and real sockets; and the people who use it."""

import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import attrs
import trio

from callora.chain_part import ChainPart
from callora.config.loading import load_settings
from callora.http.gateway.calls import CallFlow
from callora.ledger.commands import Deposit
from callora.ledger.ids import ApiId, ApiKeyId, DeveloperId, UserId, VaultId
from callora.ledger.keys import RANDOM_BYTES, make_key
from callora.ledger.money import parse_usdc
from callora.ledger.outcomes import BalanceMoved
from callora.logs import Logs
from callora.service import Context, Ledger, Serving, SystemClock, serve
from callora.store import accounts
from callora.store.accounts import PricedEndpoint
from callora.store.bridge import Database
from callora.store.keys import add_key

GENEROUS: Mapping[str, str] = {
    "HOST": "127.0.0.1",
    "PORT": "0",
    "UPSTREAM_HOST_ALLOWLIST": "127.0.0.1/32",
    "GATEWAY_RATE_LIMIT_MAX_REQUESTS": "1000000",
    "KEY_MAX_CONCURRENCY_PER_KEY": "10000",
    "LOGIN_RATE_LIMIT_MAX_REQUESTS": "1000000",
    "LOG_LEVEL": "warning",
}
"""Limits out of the way of tests that are about something else."""


@attrs.frozen
class Consumer:
    """Someone who pays."""

    user_id: UserId
    vault_id: VaultId
    api_key_id: ApiKeyId
    api_key: str

    @property
    def headers(self) -> list[tuple[str, str]]:
        """The header that says who calls."""
        return [("X-Api-Key", self.api_key)]


@attrs.define
class RunningService:
    """A service that takes calls, and its exit code once it has ended."""

    url: str
    ledger: Ledger
    context: Context
    stop: trio.Event
    chain: ChainPart | None = None
    """None where the settings turn no chain on."""
    exit_code: int | None = None

    @property
    def port(self) -> int:
        """Where it listens, on 127.0.0.1."""
        port = urlsplit(self.url).port
        assert port is not None
        return port

    @property
    def database(self) -> Database:
        """The service's own pool."""
        return self.ledger.database

    async def consumer(
        self, balance_usdc: str, *, rate_limit_per_minute: int | None = 1_000_000, network: str = "testnet"
    ) -> Consumer:
        """Make a user with a vault that holds this much and a key."""
        ids, now = self.context.ids, self.context.clock.now()
        user_id = UserId(ids.uuid7())
        await accounts.add_user(self.database, user_id, "Consumer", now)
        vault_id = await accounts.ensure_vault(self.database, VaultId(ids.uuid7()), user_id, network, "enterprise", now)
        if parse_usdc(balance_usdc):
            outcome = await self.ledger.registry.ask(vault_id, Deposit(parse_usdc(balance_usdc), "first"))
            assert isinstance(outcome, BalanceMoved)
        return await self.another_key(user_id, vault_id, rate_limit_per_minute, network)

    async def top_up(self, consumer: Consumer, amount_usdc: str) -> None:
        """Deposit, once for each amount."""
        outcome = await self.ledger.registry.ask(consumer.vault_id, Deposit(parse_usdc(amount_usdc), amount_usdc))
        assert isinstance(outcome, BalanceMoved)

    async def another_key(
        self, user_id: UserId, vault_id: VaultId, rate_limit_per_minute: int | None = None, network: str = "testnet"
    ) -> Consumer:
        """Make one more key for a vault."""
        api_key_id = ApiKeyId(self.context.ids.uuid7())
        key = make_key(network, secrets.token_bytes(RANDOM_BYTES))
        assert await add_key(
            self.database,
            api_key_id=api_key_id,
            vault_id=vault_id,
            key=key,
            name="test",
            now=self.context.clock.now(),
            rate_limit_per_minute=rate_limit_per_minute,
        )
        return Consumer(user_id, vault_id, api_key_id, key)

    async def api(
        self,
        slug: str,
        base_url: str,
        endpoints: Sequence[PricedEndpoint] = (PricedEndpoint("*", "*", parse_usdc("0.01")),),
    ) -> ApiId:
        """Publish an API; by default every path costs 0.01."""
        ids, now = self.context.ids, self.context.clock.now()
        owner = UserId(ids.uuid7())
        await accounts.add_user(self.database, owner, "Developer", now)
        developer = await accounts.ensure_developer(self.database, DeveloperId(ids.uuid7()), owner, "Developer", now)
        return await accounts.ensure_api(
            self.database,
            developer_id=developer,
            slug=slug,
            name=slug,
            base_url=base_url,
            endpoints=endpoints,
            now=now,
        )

    async def balance(self, consumer: Consumer) -> tuple[int, int]:
        """Return what the store says is available and held, in stroops."""
        row = await self.database.fetch_row("SELECT available, held FROM vaults WHERE vault_id = $1", consumer.vault_id)
        assert row is not None
        return row["available"], row["held"]

    async def events(self, consumer: Consumer) -> list[tuple[str, str | None, int | None, int | None]]:
        """Return state, outcome, amount and status of the consumer's usage events, oldest first."""
        rows = await self.database.fetch(
            "SELECT state::text AS state, outcome, amount, status FROM usage_events WHERE vault_id = $1"
            " ORDER BY created_at, event_id",
            consumer.vault_id,
        )
        return [(row["state"], row["outcome"], row["amount"], row["status"]) for row in rows]

    async def until_no_hold(self, consumer: Consumer) -> None:
        """Return when none of the consumer's holds is open: releases are stored without anyone waiting."""
        with trio.fail_after(60):
            while (await self.balance(consumer))[1]:  # noqa: ASYNC110 - another process decides
                await trio.lowlevel.checkpoint()


@asynccontextmanager
async def running_service(
    database_url: str, environ: Mapping[str, str] | None = None, *, flow_class: type[CallFlow] = CallFlow
) -> AsyncIterator[RunningService]:
    """Run a service for the length of the block, then drain it.

    Args:
        environ: settings on top of GENEROUS.
    """
    settings = load_settings({**GENEROUS, "DATABASE_URL": database_url, **(environ or {})})
    clock = SystemClock()
    with Logs(clock, level=settings.log_level, as_json=False) as logs:
        context = Context.make(settings, logs, clock)
        stop = trio.Event()
        send, receive = trio.open_memory_channel[RunningService](1)

        async def ready(serving: Serving) -> None:
            await send.send(RunningService(serving.url, serving.ledger, context, stop, serving.chain))

        async with trio.open_nursery() as nursery:
            service: RunningService

            async def run() -> None:
                code = await serve(context, database_url, stop, on_ready=ready, flow_class=flow_class)
                service.exit_code = code

            nursery.start_soon(run)  # noqa: ASYNC113 - its readiness is waited for below
            service = await receive.receive()
            failure: Exception | None = None
            try:
                yield service
            except Exception as error:  # raised outside, where the nursery does not wrap it in an exception group
                failure = error
            stop.set()
        if failure is not None:
            raise failure
