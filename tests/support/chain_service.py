"""A whole service with a sandbox ledger in place of a Stellar network, in the test's own event loop."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import attrs
import httpx
import trio
from stellar_sdk import CreateAccount, Keypair, Payment, TransactionEnvelope

from callora.sandbox import SandboxFacts
from callora.stellar.sandbox.genesis import Cast, keypair_of
from callora.stellar.sandbox.network import Sandbox
from tests.support.rest import ADMIN_KEY, Told, rest_client
from tests.support.sandbox import MovedClock, Person, Town, served
from tests.support.service import RunningService, running_service
from tests.support.wallets import LOGIN, Session, Wallet

CLOSE_SECONDS = 0.1
OWNER = keypair_of("vault owner")
CHANNELS = tuple(keypair_of(f"channel {number}") for number in range(3))
BUMPER = keypair_of("bumper")
CHARGER = keypair_of("charger")
CREDITER = keypair_of("settlement admin")
OPENING = 1000 * 10_000_000
"""What the vault contract has from the start where a service settles, stroops."""
SETTLING = {
    "SETTLEMENT_CHARGING_SEED": CHARGER.secret,
    "SETTLEMENT_CREDITING_SEED": CREDITER.secret,
    "SETTLEMENT_STATUS_SYNC_INTERVAL_MS": "200",
    "REVENUE_LEDGER_INDEXER_INTERVAL_MS": "100",
}
SECONDS_MAX = 60.0
"""How long a test waits for what the chain shall bring."""


class LiveClock(MovedClock):
    """The wall clock, for a sandbox whose ledgers close by themselves."""

    def now(self) -> datetime:
        """Return the present instant."""
        return datetime.now(UTC)

    def timestamp(self) -> float:
        """Return it in seconds since 1970."""
        return time.time()


@attrs.frozen
class ChainService:
    """A service, its chain, and a client."""

    service: RunningService
    client: httpx.AsyncClient
    town: Town
    url: str
    """The sandbox's."""

    async def funded(self, usdc: str = "100") -> "Depositor":
        """Return someone with a wallet, USDC in it, a login and a vault."""
        wallet = Wallet()
        self.fund(wallet, usdc)
        session = await wallet.log_in(self.client)
        told = await session.person.ask("POST", "/api/vault", {"network": "testnet"})
        assert told.status == 201, told.body
        return Depositor(self, wallet, session)

    def fund(self, wallet: Wallet, usdc: str = "100") -> None:
        """Give a wallet an account with XLM and USDC."""
        town, person = self.town, Person(self.town, wallet.keypair)
        friendbot = Person(town, town.sandbox.places.friendbot)
        town.applied(friendbot.transaction([CreateAccount(wallet.address, "1000")]))
        person.trust(town.usdc)
        town.applied(town.issuer.transaction([Payment(wallet.address, town.usdc, usdc)]))

    async def until(self, look: Callable[[], Any], wanted: Callable[[Any], bool]) -> Any:
        """Return what a look gives once it is what is wanted; the chain and the service are on their own clocks."""
        with trio.fail_after(SECONDS_MAX):
            while True:
                found = await look()
                if wanted(found):
                    return found
                await trio.sleep(CLOSE_SECONDS)


@attrs.frozen
class Depositor:
    """Someone who deposits."""

    at: ChainService
    wallet: Wallet
    session: Session

    async def ask(self, method: str, path: str, body: object = None, **more: Any) -> Told:
        """Return the answer to a request."""
        return await self.session.person.ask(method, path, body, **more)

    async def prepare(self, amount: str = "25", **body: object) -> Told:
        """Return the answer to a deposit that is asked for, once the address is admitted."""
        asked = {"amount_usdc": amount, **body}

        async def look() -> Told:
            return await self.ask("POST", "/api/vault/deposit/prepare", asked)

        told: Told = await self.at.until(
            look, lambda told: told.status != 503 or told.code != "DEPOSITOR_BEING_ADMITTED"
        )
        return told

    def sign(self, prepared: Told, keypair: Keypair | None = None) -> str:
        """Return a prepared deposit, signed."""
        envelope = TransactionEnvelope.from_xdr(prepared.body["xdr"], prepared.body["networkPassphrase"])
        envelope.sign(keypair or self.wallet.keypair)
        return envelope.to_xdr()

    async def submit(self, signed: str) -> Told:
        """Return the answer to a signed deposit."""
        return await self.ask("POST", "/api/vault/deposit/submit", {"signed_xdr": signed})

    async def stage(self, tx_hash: str, wanted: str) -> Any:
        """Return a deposit once it is at a stage."""

        async def look() -> Told:
            return await self.ask("GET", f"/api/vault/deposits/{tx_hash}")

        return (await self.at.until(look, lambda told: told.body["stage"] == wanted)).body

    async def deposit(self, amount: str = "25") -> Any:
        """Deposit, and return it confirmed."""
        prepared = await self.prepare(amount)
        assert prepared.status == 200, prepared.body
        submitted = await self.submit(self.sign(prepared))
        assert submitted.status == 200, submitted.body
        return await self.stage(prepared.body["hash"], "confirmed")

    async def balance(self) -> str:
        """Return what the vault has."""
        return str((await self.ask("GET", "/api/vault/balance")).body["balance_usdc"])

    async def on_chain(self) -> int | None:
        """Return what the wallet has, stroops of USDC."""
        await trio.lowlevel.checkpoint()
        return Person(self.at.town, self.wallet.keypair).has(self.at.town.usdc)


@asynccontextmanager
async def sandbox_settings() -> AsyncIterator[dict[str, str]]:
    """Run a sandbox, and yield the settings of a service on it that has no keys and compares once."""
    clock = LiveClock()
    town = Town(Sandbox.make(clock, cast=Cast(owner=OWNER)), clock)
    async with served(town, 1.0) as url:
        yield {**SandboxFacts.at(url).settings(), "CHAIN_RECONCILIATION_INTERVAL_MS": "86400000"}


@asynccontextmanager
async def chain_service(
    database_url: str, *, owner: bool = True, sponsor: bool = True, settles: bool = False, **environ: str
) -> AsyncIterator[ChainService]:
    """Run a service on a sandbox whose ledgers close by themselves.

    Args:
        owner: whether the service has the key of the vault contract's owner.
        sponsor: whether it pays the fees of deposits.
        settles: whether it has the keys that settle, and the vault contract something to be charged.
    """
    funded = tuple(each.public_key for each in (*CHANNELS, BUMPER, CHARGER))
    clock = LiveClock()
    cast = Cast(owner=OWNER, settlement_admin=CREDITER, funded=funded)
    if settles:
        cast = attrs.evolve(cast, authorized_caller=CHARGER.public_key, opening=OPENING)
    town = Town(Sandbox.make(clock, cast=cast), clock)
    async with served(town, CLOSE_SECONDS) as url:
        settings = {
            **LOGIN,
            **SandboxFacts.at(url).settings(),
            "CHANNEL_SEEDS": ",".join(each.secret for each in CHANNELS),
            "ADMIN_API_KEY": ADMIN_KEY,
            "DEPOSIT_LISTENER_INTERVAL_MS": "50",
            "RETRY_BASE_DELAY_MS": "50",
            "REST_RATE_LIMIT_MAX_REQUESTS": "1000000",
            **({"VAULT_OWNER_SEED": OWNER.secret} if owner else {}),
            **({"FEE_BUMPER_SECRET_KEY": BUMPER.secret} if sponsor else {}),
            **(SETTLING if settles else {}),
            **environ,
        }
        async with running_service(database_url, settings) as service, rest_client(service) as client:
            yield ChainService(service, client, town, url)
