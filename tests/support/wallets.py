"""Wallets: real key pairs that log in over real sockets."""

import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import attrs
import httpx
import trio
from stellar_sdk import Keypair, TransactionEnvelope

from callora.ledger.ids import UserId
from callora.ledger.wallets import make_seed
from tests.support.rest import Person, Told, anonymous, rest_client
from tests.support.service import RunningService, running_service


@attrs.frozen
class Session:
    """Someone who is logged in."""

    person: Person
    access_token: str
    refresh_token: str
    user_id: UserId

    @property
    def client(self) -> httpx.AsyncClient:
        """What he asks with."""
        return self.person.client


@attrs.frozen
class Wallet:
    """Someone with a key of his own."""

    keypair: Keypair = attrs.field(factory=Keypair.random)

    @property
    def address(self) -> str:
        """`G…`."""
        return self.keypair.public_key

    def sign(self, message: str) -> str:
        """Return the signature of a message by SEP-53, in base64."""
        return base64.b64encode(self.keypair.sign_message(message)).decode()

    def sign_transaction(self, transaction: str, passphrase: str) -> str:
        """Return a challenge with the wallet's signature added."""
        envelope = TransactionEnvelope.from_xdr(transaction, passphrase)
        envelope.sign(self.keypair)
        return envelope.to_xdr()

    async def message(self, client: httpx.AsyncClient) -> str:
        """Return a message to sign."""
        told = await anonymous(client).ask("GET", "/api/auth/challenge", query={"walletAddress": self.address})
        assert told.status == 200, told.body
        return str(told.body["message"])

    async def answer(self, client: httpx.AsyncClient, message: str, /, **other: str) -> Told:
        """Return the answer to a login with this message, signed; `other` replaces fields of the body."""
        body = {"walletAddress": self.address, "signature": self.sign(message), "message": message, **other}
        return await anonymous(client).ask("POST", "/api/auth/wallet", body)

    async def log_in(self, client: httpx.AsyncClient) -> Session:
        """Log in by a signed message."""
        told = await self.answer(client, await self.message(client))
        assert told.status == 200, told.body
        return session(client, told.body)


def session(client: httpx.AsyncClient, body: Mapping[str, Any]) -> Session:
    """Return the session that a login's or a refresh's answer gives."""
    user_id = UserId(body["user"]["id"])
    return Session(bearer(client, body["accessToken"], user_id), body["accessToken"], body["refreshToken"], user_id)


def bearer(client: httpx.AsyncClient, token: str, user_id: UserId | None = None) -> Person:
    """Return someone who presents a token."""
    return Person(client, {"Authorization": f"Bearer {token}"}, user_id)


# --- a service that takes logins --------------------------------------------------------------------------------------

SECRET = "a secret of thirty-two bytes, at least"
SEED = make_seed(bytes(range(32)))
SIGNING_KEY = Keypair.from_secret(SEED).public_key
LOGIN = {"JWT_SECRET": SECRET, "AUTH_SIGNING_SEED": SEED, "AUTH_HOME_DOMAIN": "callora.test"}


@asynccontextmanager
async def login_service(database_url: str, **environ: str) -> AsyncIterator[tuple[RunningService, httpx.AsyncClient]]:
    """Run a service that takes both kinds of logins, and yield it with a client."""
    async with running_service(database_url, {**LOGIN, **environ}) as service, rest_client(service) as client:
        yield service, client


async def at_once(count: int, ask: Callable[[int], Awaitable[Told]]) -> list[Told]:
    """Return the answers to requests that start together."""
    answers: list[Told] = []
    barrier = trio.Event()
    ready = trio.Semaphore(0)

    async def one(number: int) -> None:
        ready.release()
        await barrier.wait()
        answers.append(await ask(number))

    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(one, number)
        for _ in range(count):
            await ready.acquire()
        barrier.set()
    return answers


async def refresh(client: httpx.AsyncClient, token: str, path: str = "/api/auth/refresh") -> Told:
    """Return the answer to a refresh token that is used."""
    return await anonymous(client).ask("POST", path, {"refreshToken": token})


async def alive(who: Person) -> bool:
    """Tell whether someone's access token still opens something."""
    told = await who.ask("GET", "/api/auth/sessions")
    if told.status == 401:
        assert told.code == "REVOKED_TOKEN"
    return told.status == 200


async def count(service: RunningService, table: str) -> int:
    """Return how many rows a table has."""
    return int(await service.database.fetch_value(f"SELECT count(*) FROM {table}"))


async def ask_challenge(client: httpx.AsyncClient, wallet: Wallet, **query: str) -> Told:
    """Return the answer to a request for a SEP-10 challenge."""
    return await anonymous(client).ask("GET", "/auth", query={"account": wallet.address, **query})


async def signed_challenge(client: httpx.AsyncClient, wallet: Wallet) -> str:
    """Return a SEP-10 challenge, signed by its wallet."""
    told = await ask_challenge(client, wallet)
    assert told.status == 200, told.body
    return wallet.sign_transaction(told.body["transaction"], told.body["network_passphrase"])


async def post_challenge(client: httpx.AsyncClient, transaction: str) -> Told:
    """Return the answer to a signed SEP-10 challenge."""
    return await anonymous(client).ask("POST", "/auth", {"transaction": transaction})
