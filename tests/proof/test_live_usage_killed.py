"""Followers of live usage whose service is killed at random moments see each call once, whoever told them of it."""

import random
from datetime import UTC, datetime
from pathlib import Path

import attrs
import pytest
import trio

from callora.store import feed
from callora.store.bridge import open_database
from tests.proof.books import assert_audit_clean, books
from tests.support.client import ClosedEarly, RawClient, request_bytes
from tests.support.events import follow
from tests.support.processes import callora, free_port
from tests.support.service import Consumer, running_service
from tests.support.upstream import raw_upstream, respond

FOLLOWERS = 3
CALLERS = 3
PAUSE_SECONDS = 0.05
"""Between attempts to reach a port that nobody listens on."""
TOLD = 30
"""At least so many calls are told in each life of the service."""


@attrs.define
class Reader:
    """A client that comes back after the call it saw last, whatever happens."""

    ports: tuple[int, int]
    consumer: Consumer
    moments: random.Random
    last: str | None = None
    seen: list[str] = attrs.field(factory=list)
    taken_up: int = 0

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            try:
                await self._follow(self.moments.choice(self.ports))
            except (OSError, trio.BrokenResourceError, ClosedEarly):
                await trio.sleep(PAUSE_SECONDS)

    async def _follow(self, port: int) -> None:
        async with follow(port, {"X-User-Id": self.consumer.user_id}, self.last) as stream:
            assert stream.status in (200, 503), await stream.problem()
            if stream.status == 503:
                return
            while (told := await stream.next()) is not None:
                assert told.kind in ("connected", "usage", "end"), told
                if told.kind == "connected":
                    assert told.data["resumed"] is (self.last is not None)
                    self.taken_up += self.last is not None
                elif told.kind == "usage":
                    self.seen.append(told.data["id"])
                self.last = stream.last_id


@pytest.mark.parametrize("kills", [3, pytest.param(60, marks=pytest.mark.proof)])
async def test_followers_of_a_service_that_is_killed_see_each_call_once(
    database_url: str, tmp_path: Path, kills: int
) -> None:
    seed = random.randrange(2**32)
    print(f"\nseed {seed}")
    moments = random.Random(seed)
    ports = free_port(), free_port()
    environ = {
        "DATABASE_URL": database_url,
        "REST_RATE_LIMIT_MAX_REQUESTS": "1000000",
        "PROXY_TIMEOUT_MS": "2000",
        "HOLD_TTL_SECONDS": "5",
        "HOLD_SWEEP_INTERVAL_SECONDS": "1",
        "USAGE_STREAM_INTERVAL_MS": "50",
    }
    async with raw_upstream(respond(200, body=b"paid")) as upstream:
        async with running_service(database_url) as service:
            await service.api("echo", upstream.url)
            consumer = await service.consumer("100000")
        readers = [Reader(ports, consumer, random.Random(seed + number)) for number in range(FOLLOWERS)]
        # In the feed from its beginning, so that what they miss before they are there is told as well
        for reader in readers:
            reader.last = "0"

        async def work(port: int) -> None:
            while True:
                try:
                    async with RawClient.connect("127.0.0.1", port) as client:
                        while True:
                            await client.send(request_bytes("GET", "/v1/call/echo/x", consumer.headers))
                            await client.read_response()
                            await trio.sleep(0.005)
                except (OSError, trio.BrokenResourceError, ClosedEarly):
                    await trio.sleep(PAUSE_SECONDS)

        with callora("serve", environ={**environ, "PORT": str(ports[1])}, log_directory=tmp_path) as steady:
            async with trio.open_nursery() as nursery:
                async with open_database(database_url) as database:
                    await feed.begin(database, [consumer.user_id], datetime.now(UTC), feed.OPEN_KEPT)
                for reader in readers:
                    nursery.start_soon(reader.run)
                working = trio.CancelScope()

                async def load() -> None:
                    with working:
                        async with trio.open_nursery() as callers:
                            for number in range(CALLERS):
                                callers.start_soon(work, ports[number % 2])

                nursery.start_soon(load)
                for _ in range(kills):
                    with callora(
                        "serve", environ={**environ, "PORT": str(ports[0])}, log_directory=tmp_path
                    ) as process:
                        until = min(len(reader.seen) for reader in readers) + TOLD
                        await process.until(
                            lambda until=until: min(len(reader.seen) for reader in readers) >= until,  # type: ignore[misc]
                            "calls to be told",
                            60,
                        )
                        await trio.sleep(moments.uniform(0, 0.3))
                        process.kill()
                        assert "Traceback" not in process.stderr, process.stderr
                working.cancel()
                async with open_database(database_url) as database:
                    closed = "SELECT count(*) FROM usage_events WHERE state <> 'held'"
                    opened = "SELECT count(*) FROM usage_events WHERE state = 'held'"
                    with trio.fail_after(60):
                        while await database.fetch_value(opened):  # noqa: ASYNC110 - holds end elsewhere
                            await trio.sleep(PAUSE_SECONDS)
                    count = await database.fetch_value(closed)
                await steady.until(lambda: all(len(reader.seen) >= count for reader in readers), "all to be told", 60)
                nursery.cancel_scope.cancel()
            steady.signal()
            assert await steady.ended() == 0
    async with books(database_url) as database:
        await assert_audit_clean(database)
        rows = await database.fetch("SELECT event_id FROM usage_feed ORDER BY position")
        events = {str(row["event_id"]) for row in await database.fetch("SELECT event_id FROM usage_events")}
    order = [str(row["event_id"]) for row in rows]
    assert set(order) == events
    for reader in readers:
        assert reader.seen == order
    print(f"{kills} kills, {len(order)} calls, taken up {sum(reader.taken_up for reader in readers)} times")
