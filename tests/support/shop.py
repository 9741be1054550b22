"""A service that sells something, the people who pay for it over REST, and many of them asking at once."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import attrs
import httpx
import trio

from callora.ledger.ids import ApiId
from tests.proof.books import assert_audit_clean
from tests.support.rest import ADMIN_KEY, SERVICE_TOKEN, Person, Told, admin, biller, rest_client
from tests.support.service import Consumer, RunningService, running_service

UNLIMITED = {
    "REST_RATE_LIMIT_MAX_REQUESTS": "1000000",
    "ADMIN_API_KEY": ADMIN_KEY,
    "INTERNAL_SERVICE_TOKEN": SERVICE_TOKEN,
}


@attrs.frozen
class Shop:
    """A service, an API with one endpoint, and who uses it."""

    service: RunningService
    client: httpx.AsyncClient
    api_id: ApiId
    endpoint_id: int

    def body(self, request_id: str, amount: str = "0.01", **more: Any) -> dict[str, Any]:
        """Return a deduct."""
        named = {"requestId": request_id, "apiId": self.api_id, "endpointId": self.endpoint_id}
        return {**named, "amountUsdc": amount, **more}

    def person(self, consumer: Consumer) -> Person:
        """Return a consumer as he asks over REST."""
        return Person(self.client, {"X-User-Id": consumer.user_id}, consumer.user_id)

    async def payer(self, balance: str) -> tuple[Consumer, Person]:
        """Return a new consumer with a vault on testnet."""
        consumer = await self.service.consumer(balance)
        return consumer, self.person(consumer)

    @property
    def admin(self) -> Person:
        """An operator."""
        return admin(self.client)

    @property
    def biller(self) -> Person:
        """A service that charges outside the proxy."""
        return biller(self.client)


async def endpoint_of(service: RunningService, api_id: ApiId) -> int:
    """Return the number of an API's only endpoint."""
    number = await service.database.fetch_value("SELECT endpoint_id FROM api_endpoints WHERE api_id = $1", api_id)
    assert isinstance(number, int)
    return number


@asynccontextmanager
async def shop(database_url: str, **settings: str) -> AsyncIterator[Shop]:
    """Run a service with a published API; at the end the ledger must be clean."""
    async with running_service(database_url, {**UNLIMITED, **settings}) as service, rest_client(service) as client:
        api_id = await service.api("sold", "http://127.0.0.1:9")
        yield Shop(service, client, api_id, await endpoint_of(service, api_id))
        await assert_audit_clean(service.database)


async def together(count: int, ask: Callable[[int], Awaitable[Told]]) -> list[Told]:
    """Ask `count` times at once, from a barrier."""
    told: list[Told] = []
    waiting, all_there = 0, trio.Event()

    async def one(number: int) -> None:
        nonlocal waiting
        waiting += 1
        if waiting == count:
            all_there.set()
        await all_there.wait()
        told.append(await ask(number))

    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(one, number)
    return told
