"""A service that tells webhooks is killed at random moments, or drained: each event is told, in order, by one id."""

import os
import random
import signal
from collections import defaultdict
from pathlib import Path
from typing import Final

import pytest
import trio

from callora.actors.webhooks import BATCH
from callora.ledger.ids import Ids, UserId
from callora.ledger.webhooks import RetryPolicy
from callora.service import SystemClock
from callora.store import accounts
from callora.store import webhooks as store
from callora.store.bridge import Database, open_database
from callora.store.outbox import Event, add_events
from callora.store.webhooks import NewEndpoint
from tests.support.processes import callora, free_port
from tests.support.service import GENEROUS
from tests.support.upstream import Exchange, RawUpstream, gated, raw_upstream, respond
from tests.support.webhooks import number_of

ENDPOINTS: Final = 6
LANES: Final = 3
PER_LIFE: Final = 30
"""Events of each life of the service that are told before it is killed."""


async def endpoints(database: Database, ids: Ids, url: str, count: int) -> list[UserId]:
    """Make users with an endpoint each, and return them."""
    users = []
    for number in range(count):
        user_id, now = UserId(ids.uuid7()), SystemClock().now()
        await accounts.add_user(database, user_id, "Someone", now)
        new = NewEndpoint(ids.uuid7(), user_id, f"{url}/{number}", None, ["settlement_completed"], RetryPolicy(10, 100))
        assert await store.add_endpoint(database, new, now)
        users.append(user_id)
    return users


async def free_claims(database: Database) -> None:
    """End the leases of who was killed, for which a machine would wait."""
    # Locked in the order in which a pass locks them: the last statement of who was killed may still be running.
    await database.execute(
        "UPDATE webhook_endpoints SET claimed_until = now() WHERE endpoint_id IN ("
        "SELECT endpoint_id FROM webhook_endpoints WHERE claimed_until IS NOT NULL"
        " ORDER BY endpoint_id FOR NO KEY UPDATE)"
    )


def environ(database_url: str) -> dict[str, str]:
    """Return the settings of a service that tells at once."""
    return {
        **GENEROUS,
        "DATABASE_URL": database_url,
        "PORT": str(free_port()),
        "WEBHOOK_POLL_INTERVAL_MS": "10",
        "LOG_LEVEL": "info",
    }


@pytest.mark.parametrize("kills", [2, pytest.param(200, marks=pytest.mark.proof)])
async def test_nothing_is_lost_where_the_teller_is_killed(database_url: str, tmp_path: Path, kills: int) -> None:
    seed = random.randrange(2**32)
    print(f"\nseed {seed}")
    moments = random.Random(seed)
    ids = Ids(SystemClock(), os.urandom)
    taken: dict[str, set[str]] = defaultdict(set)
    """By event: the deliveries it was told under."""
    order: dict[tuple[str, int], list[int]] = defaultdict(list)
    """By endpoint and lane: the numbers of the events, as they were first taken."""
    repeated = 0

    async def receive(exchange: Exchange) -> None:
        nonlocal repeated
        await exchange.read_body()
        request = exchange.request
        if moments.random() < 0.1:
            await respond(500)(exchange)
            return
        event_id, number = request.header("webhook-id"), number_of(request)
        assert event_id is not None
        if event_id in taken:
            repeated += 1
        else:
            order[request.target, number % LANES].append(number)
        taken[event_id].add(str(request.header("X-Callora-Delivery")))
        await respond(204)(exchange)

    async with raw_upstream(receive) as receiver, open_database(database_url) as database:
        users = await endpoints(database, ids, receiver.url, ENDPOINTS)
        lanes = [[ids.uuid7() for _ in range(LANES)] for _ in users]
        happened: list[Event] = []
        stopping = trio.Event()

        async def happen() -> None:
            """Have events happen all the while, some of them in transactions that come to nothing."""
            number = 0
            while not stopping.is_set():
                events = [
                    Event(
                        ids.uuid7(),
                        "settlement_completed",
                        f"{lanes[at][number % LANES]}:{number}",
                        None,
                        {"number": number},
                        user,
                    )
                    for at, user in enumerate(users)
                ]
                number += 1
                try:
                    async with database.transaction() as connection:
                        await add_events(connection, events, SystemClock().now())
                        if moments.random() < 0.1:
                            raise RuntimeError
                except RuntimeError:
                    continue
                happened.extend(events)
                # Another process tells, and after the last kill there is none for a while.
                while len(happened) > len(taken) + 300 and not stopping.is_set():  # noqa: ASYNC110
                    await trio.sleep(0.02)
                await trio.sleep(0.005)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(happen)
            for _ in range(kills):
                await free_claims(database)
                with callora("serve", environ=environ(database_url), log_directory=tmp_path) as process:
                    until = len(taken) + PER_LIFE
                    await process.until(lambda until=until: len(taken) >= until, "more events to be told", 60)  # type: ignore[misc]
                    await trio.sleep(moments.uniform(0, 0.1))
                    process.kill()
                    assert "Traceback" not in process.stderr, process.stderr
            stopping.set()
        await free_claims(database)
        with callora("serve", environ=environ(database_url), log_directory=tmp_path) as process:
            await process.until(lambda: len(taken) >= len(happened), "every event to be told", 120)
            process.signal()
            assert await process.ended() == 0
        left = await database.fetch_value("SELECT count(*) FROM webhook_deliveries WHERE state <> 'delivered'")
    assert set(taken) == {event.event_id for event in happened}
    assert {len(deliveries) for deliveries in taken.values()} == {1}, "one id an event, whatever happened"
    for numbers in order.values():
        assert numbers == sorted(numbers)
    assert repeated <= kills * ENDPOINTS * BATCH
    assert left == 0
    print(f"{kills} kills, {len(happened)} events told, {repeated} of them more than once")


async def test_a_drain_waits_for_attempts_and_leaves_the_rest(database_url: str, tmp_path: Path) -> None:
    gate = trio.Event()
    ids = Ids(SystemClock(), os.urandom)
    async with (
        raw_upstream(gated(gate, respond(204))) as receiver,
        open_database(database_url) as database,
    ):
        (user_id,) = await endpoints(database, ids, receiver.url, 1)
        with callora("serve", environ=environ(database_url), log_directory=tmp_path) as process:
            await happen_to(database, ids, user_id, 5)
            await receiver.wait_requests(1)
            process.signal(signal.SIGTERM)
            await process.until(lambda: "draining" in process.stderr, "the drain to begin")
            gate.set()
            assert await process.ended() == 0
        await assert_told(database, receiver, 1)
        with callora("serve", environ=environ(database_url), log_directory=tmp_path) as process:
            await receiver.wait_requests(5)
            process.signal(signal.SIGTERM)
            assert await process.ended() == 0
        assert [number_of(request) for request in receiver.requests] == list(range(5))
        await assert_told(database, receiver, 5)


async def happen_to(database: Database, ids: Ids, user_id: UserId, count: int) -> None:
    """Have events happen to someone, all about one thing."""
    about = ids.uuid7()
    async with database.transaction() as connection:
        events = [
            Event(ids.uuid7(), "settlement_completed", f"{about}:{number}", None, {"number": number}, user_id)
            for number in range(count)
        ]
        await add_events(connection, events, SystemClock().now())


async def assert_told(database: Database, receiver: RawUpstream, count: int) -> None:
    """Fail unless so many are noted as delivered, and as many requests were made."""
    noted = await database.fetch_value("SELECT count(*) FROM webhook_deliveries WHERE state = 'delivered'")
    assert (noted, len(receiver.requests)) == (count, count)
