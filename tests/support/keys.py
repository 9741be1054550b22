"""People with keys and with tokens, and an API that they call."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import attrs
import trio
import trio.testing

from callora.ledger.commands import Deposit
from callora.ledger.ids import ApiId, VaultId
from callora.ledger.money import parse_usdc
from callora.ledger.outcomes import BalanceMoved
from tests.support.client import RawClient, RawResponse, call, request_bytes, watchdog
from tests.support.rest import ADMIN_KEY, Person, Told, anonymous, person, rest_client
from tests.support.service import Consumer, RunningService, running_service
from tests.support.upstream import Handler, raw_upstream, respond

PATH = "/v1/call/echo/x"
SECRET = "s" * 64
KEY_SETTINGS = {"ADMIN_API_KEY": ADMIN_KEY, "JWT_SECRET": SECRET, "REST_RATE_LIMIT_MAX_REQUESTS": "10000"}
TOKEN_SETTINGS = {"JWT_SECRET": SECRET, "REST_RATE_LIMIT_MAX_REQUESTS": "10000"}
PRICE = parse_usdc("0.01")
NOBODYS = "01a1ff0e-0fb6-7396-aa6d-6df1fb066d39"
"""An id that nothing has."""


@attrs.frozen
class KeyShop:
    """A service with one API, and two people who know nothing of each other."""

    service: RunningService
    stranger: Person
    ada: Person
    bob: Person
    api_id: ApiId

    async def key(self, who: Person | None = None, balance: str = "1", **fields: object) -> Told:
        """Make a key, and put this much into its vault."""
        made = await (who or self.ada).ask("POST", "/api/keys", {"name": "mine", **fields})
        assert made.status == 201, made.body
        vault_id = VaultId(made.body["apiKey"]["vaultId"])
        moved = await self.service.ledger.registry.ask(vault_id, Deposit(parse_usdc(balance), "first"))
        assert isinstance(moved, BalanceMoved)
        return made

    async def call(self, key: str, path: str = PATH) -> RawResponse:
        """Make a call with a key."""
        return await call(self.service.port, "GET", path, [("X-Api-Key", key)])

    async def outcome(self, key: str, path: str = PATH) -> str:
        """Make a call; return the refusal's code, or the status."""
        response = await self.call(key, path)
        return "200" if response.status == 200 else str(response.json()["code"])


@asynccontextmanager
async def key_shop(database_url: str, **settings: str) -> AsyncIterator[KeyShop]:
    async with (
        running_service(database_url, {**KEY_SETTINGS, **settings}) as service,
        rest_client(service) as client,
        raw_upstream(respond()) as upstream,
    ):
        api_id = await service.api("echo", upstream.url)
        yield KeyShop(service, anonymous(client), await person(service, client), await person(service, client), api_id)


def id_of(made: Told) -> str:
    return str(made.body["apiKey"]["id"])


@attrs.frozen
class TokenShop:
    """A service, one API, and a consumer whose key pays for tokens."""

    service: RunningService
    stranger: Person
    consumer: Consumer
    owner: Person
    api_id: ApiId

    @property
    def path(self) -> str:
        """The key's."""
        return f"/api/keys/{self.consumer.api_key_id}"

    async def mint(self, **fields: object) -> Told:
        """Make a token."""
        made = await self.owner.ask("POST", f"{self.path}/tokens", {"ttl": 60, **fields})
        assert made.status == 201, made.body
        return made

    async def token(self, **fields: object) -> str:
        """Make a token and return it."""
        return str((await self.mint(**fields)).body["token"])

    async def outcome(self, token: str, path: str = PATH) -> str:
        """Make a call with a token."""
        return code(await call(self.service.port, "GET", path, bearer(token)))

    async def spent(self) -> list[tuple[int | None, int]]:
        """Return every token's budget and what is out of it."""
        rows = await self.service.database.fetch("SELECT budget, spent FROM access_tokens ORDER BY token_id")
        return [(row["budget"], row["spent"]) for row in rows]

    async def until_spent(self, amount: int) -> None:
        """Return when this much is out of the only token's budget: giving back is not waited for by a call."""
        with watchdog(f"{amount} to be spent"):
            while [spent for _, spent in await self.spent()] != [amount]:
                pass


@asynccontextmanager
async def token_shop(
    database_url: str, *, balance: str = "1", handler: Handler | None = None, **settings: str
) -> AsyncIterator[TokenShop]:
    async with (
        running_service(database_url, {**TOKEN_SETTINGS, **settings}) as service,
        rest_client(service) as client,
        raw_upstream(handler or respond()) as upstream,
    ):
        api_id = await service.api("echo", upstream.url)
        consumer = await service.consumer(balance)
        stranger = anonymous(client)
        yield TokenShop(service, stranger, consumer, person_of(stranger, consumer), api_id)


def person_of(stranger: Person, consumer: Consumer) -> Person:
    """The consumer on the dashboard."""
    return Person(stranger.client, {"X-User-Id": consumer.user_id}, consumer.user_id)


def bearer(token: str) -> list[tuple[str, str]]:
    return [("Authorization", f"Bearer {token}")]


def code(response: RawResponse) -> str:
    return "200" if response.status == 200 else str(response.json()["code"])


async def barrage(port: int, count: int, headers: Sequence[tuple[str, str]]) -> list[str]:
    """Make calls on connections that stand already; return what each came to."""
    outcomes: list[str] = []
    start = trio.Event()

    async def one() -> None:
        async with RawClient.connect(port=port) as client:
            await start.wait()
            await client.send(request_bytes("GET", PATH, headers))
            outcomes.append(code(await client.read_response()))

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(one)
        await trio.testing.wait_all_tasks_blocked(0.05)
        start.set()
    return outcomes
