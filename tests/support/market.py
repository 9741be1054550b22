"""A service with developers and APIs, for the tests of the marketplace."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import attrs

from tests.support.rest import ADMIN_KEY, Person, Told, admin, anonymous, person, rest_client
from tests.support.service import Consumer, RunningService, running_service

BASE_URL = "http://127.0.0.1:9"
"""Allow-listed by the tests' settings; nobody listens there."""


def endpoint(path: str = "/now", price: str = "0.01", method: str = "GET", **more: object) -> dict[str, object]:
    """Return an endpoint to be sent."""
    return {"path": path, "method": method, "price_per_call_usdc": price, **more}


def api_body(name: str = "Weather", **more: object) -> dict[str, object]:
    """Return an API to be sent."""
    return {"name": name, "base_url": BASE_URL, "endpoints": [endpoint()], **more}


@attrs.frozen
class Market:
    """Who there is."""

    service: RunningService
    ada: Person
    """A developer."""
    eve: Person
    """Another."""
    anyone: Person
    operator: Person

    async def register(self, developer: Person | None = None, **fields: object) -> Mapping[str, Any]:
        """Register an API and return it as its developer sees it."""
        told = await (developer or self.ada).ask("POST", "/api/apis", api_body(**fields))  # type: ignore[arg-type]
        assert told.status == 201, told.body
        body: Mapping[str, Any] = told.body
        return body

    async def call(self, consumer: Consumer, path: str, method: str = "GET") -> Told:
        """Call an API through the gateway."""
        return await Person(self.ada.client, {"X-Api-Key": consumer.api_key}).ask(method, f"/v1/call/{path}")


@asynccontextmanager
async def market(database_url: str, environ: Mapping[str, str] | None = None) -> AsyncIterator[Market]:
    """Run a service with two developers, a stranger and an operator."""
    settings = {
        "ADMIN_API_KEY": ADMIN_KEY,
        "REST_RATE_LIMIT_MAX_REQUESTS": "100000",
        "DB_CONN_TIMEOUT_MS": "30000",  # a machine that is busy is not what these tests are about
        **(environ or {}),
    }
    async with running_service(database_url, settings) as service, rest_client(service) as client:
        ada, eve = await person(service, client, "Ada"), await person(service, client, "Eve")
        yield Market(service, ada, eve, anonymous(client), admin(client))


async def counts(made: Market) -> list[int]:
    """Return how many APIs, endpoints and prices are stored."""
    tables = ("apis", "api_endpoints", "endpoint_prices")
    return [await made.service.database.fetch_value(f"SELECT count(*) FROM {table}") for table in tables]
