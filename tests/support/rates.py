"""A service whose endpoints are priced by units, an upstream whose answers a test sets, and someone who pays."""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import count

import attrs

from callora.ledger.money import Stroops, parse_usdc
from callora.ledger.rating import RateCard, Source, Unit
from callora.store.accounts import PricedEndpoint
from tests.proof.books import assert_audit_clean
from tests.support.client import RawResponse, call, watchdog
from tests.support.service import Consumer, RunningService, running_service
from tests.support.upstream import Handler, RawUpstream, raw_upstream, respond

Headers = Sequence[tuple[str, str]]


def card(
    unit: Unit, source: str, *, held: int | None = None, least: int = 1, most: int | None = None, unit_credits: int = 0
) -> RateCard:
    """Return a rate card whose quantity is read from a source such as `request.json:/urls`."""
    return RateCard(unit, unit_credits, least, held, most, Source.parse(source))


def answer(document: object, headers: Headers = (), status: int = 200) -> Handler:
    """Answer with a JSON document."""
    return respond(status, [("Content-Type", "application/json"), *headers], json.dumps(document).encode())


@attrs.define
class Meter:
    """Everything that a call priced by units needs."""

    service: RunningService
    upstream: RawUpstream
    consumer: Consumer
    _names: "count[int]" = attrs.field(factory=count)

    async def sell(self, rate_card: RateCard | None, price: str = "0.001") -> str:
        """Publish an API with one endpoint, and return where it is called."""
        slug = f"sold-{next(self._names)}"
        await self.service.api(slug, self.upstream.url, [PricedEndpoint("*", "*", parse_usdc(price), rate_card)])
        return f"/v1/call/{slug}/x"

    async def ask(self, path: str, body: bytes = b"", *headers: tuple[str, str]) -> RawResponse:
        """Call with a body."""
        return await call(self.service.port, "POST", path, [*self.consumer.headers, *headers], body)

    async def ask_json(self, path: str, document: object, *headers: tuple[str, str]) -> RawResponse:
        """Call with a JSON document."""
        return await self.ask(path, json.dumps(document).encode(), *headers)

    async def last(self) -> tuple[str, str | None, int | None, int | None, int]:
        """Return state, outcome, amount, quantity and held amount of the newest usage event, once it is closed."""
        with watchdog("the newest usage event to be closed"):
            while True:
                row = await self.service.database.fetch_row(
                    "SELECT state::text AS state, outcome, amount, quantity, held_amount FROM usage_events"
                    " WHERE vault_id = $1 ORDER BY created_at DESC, event_id DESC LIMIT 1",
                    self.consumer.vault_id,
                )
                assert row is not None
                if row["state"] != "held":
                    return row["state"], row["outcome"], row["amount"], row["quantity"], row["held_amount"]

    async def spent(self, first: str = "1") -> int:
        """Return what is gone of the first deposit, nothing being held."""
        available, held = await self.service.balance(self.consumer)
        assert held == 0
        return Stroops(parse_usdc(first) - available)


def told(response: RawResponse) -> tuple[int, str | None, str | None]:
    """Return an answer's status, charge and units."""
    return response.status, response.header("X-Callora-Charge"), response.header("X-Callora-Units")


@asynccontextmanager
async def meter(database_url: str, balance: str = "1", **settings: str) -> AsyncIterator[Meter]:
    """Run it; at the end the ledger must be clean."""
    async with running_service(database_url, settings) as service, raw_upstream(respond()) as upstream:
        yield Meter(service, upstream, await service.consumer(balance))
        await assert_audit_clean(service.database)
