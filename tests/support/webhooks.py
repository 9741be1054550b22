"""Webhooks for tests: users with endpoints, events that happen, and what delivers them, on real parts."""

import json
import os
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from random import Random
from typing import Any, Final

import attrs
import trio

from callora.actors.webhooks import Teller, Webhooks
from callora.ledger.ids import Ids, UserId
from callora.ledger.webhooks import RetryPolicy, Secrets
from callora.outbound.addresses import AddressPolicy
from callora.outbound.client import Outbound, OutboundPolicy, open_outbound
from callora.store import accounts
from callora.store import webhooks as store
from callora.store.bridge import Database
from callora.store.outbox import Event, add_events
from callora.store.webhooks import NewEndpoint
from tests.simulation.support import METRICS, QUIET
from tests.support.upstream import Exchange, Handler, RecordedRequest

LOCAL: Final = OutboundPolicy(AddressPolicy(networks=(ip_network("127.0.0.0/8"),)), plain="anywhere")
SECRETS: Final = Secrets(b"tests")
POLL_SECONDS: Final = 0.01
WAIT_SECONDS: Final = 60.0


class ShiftedClock:
    """The wall clock, which a test may put forward."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def now(self) -> datetime:
        """Return the present instant, as it is told here."""
        return datetime.now(UTC) + self.ahead

    def timestamp(self) -> float:
        """Return it in seconds since 1970."""
        return self.now().timestamp()

    def pass_by(self, seconds: float) -> None:
        """Put it forward."""
        self.ahead += timedelta(seconds=seconds)


@attrs.define
class Post:
    """A user's events and endpoints."""

    database: Database
    outbound: Outbound
    clock: ShiftedClock
    ids: Ids
    random: Random = attrs.field(factory=lambda: Random(1))

    async def user(self) -> UserId:
        """Make a user."""
        user_id = UserId(self.ids.uuid7())
        await accounts.add_user(self.database, user_id, "Someone", self.clock.now())
        return user_id

    async def endpoint(
        self,
        user_id: UserId,
        url: str,
        events: Sequence[str] = ("settlement_completed", "settlement_failed", "quota_threshold"),
        policy: RetryPolicy = RetryPolicy(10, 1000),  # noqa: B008 - frozen
    ) -> str:
        """Store an endpoint."""
        endpoint_id = self.ids.uuid7()
        new = NewEndpoint(endpoint_id, user_id, url, None, events, policy)
        assert await store.add_endpoint(self.database, new, self.clock.now())
        return endpoint_id

    def event(self, user_id: UserId, number: int, about: str = "thing", kind: str = "settlement_completed") -> Event:
        """Return an event; events about the same are told in order."""
        return Event(
            self.ids.uuid7(), kind, f"{about}:{number}" if about else str(number), None, {"number": number}, user_id
        )

    async def happen(self, *events: Event) -> None:
        """Have them happen, in one transaction."""
        async with self.database.transaction() as connection:
            await add_events(connection, events, self.clock.now())

    def webhooks(self, *, seconds_max: float = 30.0) -> Webhooks:
        """Return what delivers."""
        teller = Teller(self.outbound, SECRETS, self.clock, seconds_max=seconds_max)
        return Webhooks(
            self.database,
            teller,
            self.clock,
            self.ids,
            self.random,
            METRICS,
            QUIET,
            interval_seconds=POLL_SECONDS,
            retention_seconds=86_400,
        )

    async def states(self) -> dict[str, int]:
        """Return how many deliveries there are in each state."""
        rows = await self.database.fetch("SELECT state, count(*) AS number FROM webhook_deliveries GROUP BY state")
        return {row["state"]: row["number"] for row in rows}

    async def until(self, states: Mapping[str, int]) -> None:
        """Return once the deliveries are in these states, and nothing is claimed or queued."""
        seen: dict[str, Any] = {}
        with trio.move_on_after(WAIT_SECONDS):
            while True:
                seen = await self.states()
                busy = await self.database.fetch_value(
                    "SELECT (SELECT count(*) FROM webhook_endpoints WHERE claimed_by IS NOT NULL)"
                    " + (SELECT count(*) FROM outbox_queue)"
                )
                if seen == states and not busy:
                    return
                await trio.sleep(POLL_SECONDS)
        raise AssertionError(f"{states} never came, but {seen}")

    async def pass_until(self, states: Mapping[str, int], step_seconds: float = 3600.0) -> None:
        """The same, while the clock is put forward whenever nothing is due."""
        with trio.move_on_after(WAIT_SECONDS):
            while await self.states() != states:
                row = await self.database.fetch_row(
                    "SELECT (SELECT count(*) FROM webhook_endpoints WHERE claimed_by IS NOT NULL"
                    " OR due_at <= $1) AS now,"
                    " (SELECT count(*) FROM outbox_queue) AS queued",
                    self.clock.now(),
                )
                assert row is not None
                if not row["now"] and not row["queued"]:
                    self.clock.pass_by(step_seconds)
                await trio.sleep(POLL_SECONDS)
        await self.until(states)


@asynccontextmanager
async def post_office(database: Database, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[Post]:
    """Yield users' events and endpoints; nothing is delivered yet."""
    clock = ShiftedClock()
    async with open_outbound(LOCAL, tls=tls) as outbound:
        yield Post(database, outbound, clock, Ids(clock, os.urandom))


@asynccontextmanager
async def delivering(webhooks: Webhooks) -> AsyncIterator[Webhooks]:
    """Deliver for the length of the block, then drain."""
    async with trio.open_nursery() as nursery:
        await nursery.start(webhooks.run)
        yield webhooks
        webhooks.drain()
        with trio.fail_after(WAIT_SECONDS):
            await webhooks.ended.wait()


def number_of(request: RecordedRequest) -> int:
    """Return the number of the event that a request tells of."""
    return int(json.loads(request.body)["data"]["number"])


def choosing(handler_of: Callable[[int], Handler]) -> Handler:
    """Answer each request as the handler for its event's number does."""

    async def handle(exchange: Exchange) -> None:
        await exchange.read_body()
        await handler_of(number_of(exchange.request))(exchange)

    return handle
