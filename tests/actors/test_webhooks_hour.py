"""An hour of a dead endpoint beside a good one, in virtual time: nothing grows in memory, and nobody is late."""

import gc
from collections.abc import Mapping
from datetime import timedelta
from random import Random
from typing import Any, cast

import trio
from trio.testing import MockClock

from callora.actors.webhooks import BATCH, Teller, Webhooks
from callora.ledger.clock import Clock
from callora.ledger.webhooks import RetryPolicy
from callora.outbound.client import Outbound, OutboundFault, Reply
from callora.store.bridge import Database
from callora.store.webhooks import Delivery
from tests.simulation.ledgers import NOON
from tests.simulation.support import METRICS, QUIET
from tests.support.passing_time import passing_time
from tests.support.webhooks import SECRETS, Post, ShiftedClock, post_office

EVERY_SECONDS = 60
EVENTS = 3600 // EVERY_SECONDS
DEAD = "http://127.0.0.1:1/"
GOOD = "http://127.0.0.1:2/"


class TrioClock(ShiftedClock):
    """Noon, and what has passed on Trio's clock."""

    def __init__(self) -> None:
        super().__init__()
        self._began = trio.current_time()

    def now(self) -> Any:
        """Return the present instant."""
        return NOON + timedelta(seconds=trio.current_time() - self._began)


class Network:
    """Stands where the network begins: one receiver takes everything at once, the other never says a word."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.told = 0
        self.tried = 0
        self.most_in_memory = 0

    async def exchange(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes,
        *,
        seconds_max: float,
        reply_bytes_max: int,
    ) -> Reply:
        """Answer, or say nothing until the deadline."""
        if url == DEAD:
            alive = sum(isinstance(each, Delivery) for each in gc.get_objects())
            self.most_in_memory = max(self.most_in_memory, alive)
        if url == GOOD:
            await trio.lowlevel.checkpoint()
            self.told += 1
            return Reply(204, {}, b"", whole=True)
        self.tried += 1
        await trio.sleep(seconds_max)
        raise OutboundFault("timeout", "no reply", perhaps_done=True)


async def test_memory_is_flat_and_the_good_one_on_time_for_an_hour(database: Database, mock_clock: MockClock) -> None:
    async with post_office(database) as office, passing_time(mock_clock, database) as watched:
        clock = TrioClock()
        post = Post(watched, office.outbound, clock, office.ids)
        network = Network(clock)
        teller = Teller(cast(Outbound, network), SECRETS, clock, seconds_max=10)
        webhooks = Webhooks(
            watched,
            teller,
            clock,
            post.ids,
            Random(1),
            METRICS,
            QUIET,
            interval_seconds=20,
            retention_seconds=86_400,
        )
        ada, bob = await post.user(), await post.user()
        await post.endpoint(ada, DEAD, policy=RetryPolicy(10, 5000))
        await post.endpoint(bob, GOOD)
        async with trio.open_nursery() as nursery:
            await nursery.start(webhooks.run)
            for number in range(EVENTS):
                await post.happen(
                    post.event(ada, number, post.ids.uuid7()), post.event(bob, number, f"bob-{post.ids.uuid7()}")
                )
                await trio.sleep(EVERY_SECONDS)
            await trio.sleep(25)
            assert network.told == EVENTS
            late = await watched.fetch_value(
                "SELECT max(d.closed_at - d.created_at) FROM webhook_deliveries d WHERE d.state = 'delivered'"
            )
            assert late <= timedelta(seconds=25), "a pass after it happened, whatever the other does"
            waiting = (await post.states())["pending"]
            webhooks.drain()
            await webhooks.ended.wait()
        assert waiting > EVENTS * 0.9, "rows wait in the database"
        assert network.most_in_memory <= 2 * (2 * BATCH), "those of two turns, and what they read next"
        assert 10 <= network.tried <= 60, "an endpoint that does not answer is left alone, and not forgotten"
