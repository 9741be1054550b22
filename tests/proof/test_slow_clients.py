"""Thousands of clients that are slow on purpose: the service closes them, and everybody else is served as before."""

import random
import socket
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import attrs
import pytest
import trio

from tests.proof.books import API, assert_audit_clean, books, first_paid, until_no_hold
from tests.support.client import request_bytes
from tests.support.processes import Caller, callora, free_port
from tests.support.service import Consumer, running_service
from tests.support.upstream import Exchange, raw_upstream, respond

ANSWER_BYTES = 4 << 20
"""More than the buffers between a service and a client that does not read."""
DRIBBLE_SECONDS = 1.0
"""Every slow client that still sends has one more byte in each of these."""


async def big_answer(exchange: Exchange) -> None:
    """Answer with ANSWER_BYTES, to whoever reads them."""
    await exchange.read_body()
    await exchange.send_head(200, [("Content-Length", str(ANSWER_BYTES))])
    with suppress(trio.BrokenResourceError):
        await exchange.send(b"x" * ANSWER_BYTES)


@attrs.define(eq=False)
class SlowClients:
    """Connections of three kinds: a head that never ends, a body that never ends, an answer that is never read."""

    port: int
    consumer: Consumer
    dribbling: list[socket.socket] = attrs.field(factory=list)
    stalled: list[socket.socket] = attrs.field(factory=list)

    async def open(self, count: int) -> None:
        """Open `count` connections: half of them heads, a tenth unread answers, since each of those is megabytes."""
        who = self.consumer.headers
        unfinished_head = request_bytes("GET", f"/v1/call/{API}/slow", who)[:-2] + b"X-Slow: "
        unfinished_body = request_bytes("POST", "/v1/call/slow/body", [*who, ("Content-Length", "1000000")], b"b" * 10)
        unread = request_bytes("GET", "/v1/call/slow/answer", who)
        for number in range(count):
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", self.port))
            kind = number % 10
            sock.send(unfinished_head if kind < 5 else unread if kind == 9 else unfinished_body)
            sock.setblocking(False)
            (self.dribbling if kind < 5 else self.stalled).append(sock)
            if number % 20 == 0:
                await trio.sleep(0.005)  # the callers beside us are measured in this very event loop

    async def dribble(self) -> None:
        """Send one byte of each unfinished head every second, a few of them at a time, until cancelled."""
        slices = 20
        turn = 0
        while True:
            for sock in self.dribbling[turn::slices]:
                with suppress(OSError):
                    sock.send(b"s")
            turn = (turn + 1) % slices
            await trio.sleep(DRIBBLE_SECONDS / slices)

    async def connections(self) -> int:
        """Return how many connections the service has, but for the one that asks. Slow clients see no close."""
        async with Caller(self.port, self.consumer.api_key) as caller:
            text = (await caller.call("/metrics")).body.decode()
        lines = [line.split() for line in text.splitlines()]
        (connections,) = [float(line[1]) for line in lines if line[0] == "callora_connections"]
        return int(connections) - 1

    async def until_closed(self, seconds: float) -> None:
        """Return when the service has none of them left."""
        with trio.fail_after(seconds):
            while await self.connections() > 0:  # noqa: ASYNC110 - another process cannot set an event
                await trio.sleep(0.1)

    def close(self) -> None:
        """Leave."""
        for sock in (*self.dribbling, *self.stalled):
            sock.close()
        self.dribbling.clear()
        self.stalled.clear()


@asynccontextmanager
async def slow_clients(port: int, consumer: Consumer, count: int) -> AsyncIterator[SlowClients]:
    """Have slow clients for the length of the block."""
    clients = SlowClients(port, consumer)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(clients.dribble)
            await clients.open(count)
            yield clients
            nursery.cancel_scope.cancel()
    finally:
        clients.close()


async def measure(port: int, consumer: Consumer, seconds: float) -> list[float]:
    """Return the latencies, in seconds, of eight callers that call one after the other with short pauses."""
    latencies: list[float] = []
    until = time.monotonic() + seconds
    pause = random.Random(1)

    async def one() -> None:
        async with Caller(port, consumer.api_key) as caller:
            while time.monotonic() < until:
                answer = await caller.call(f"/v1/call/{API}/fast")
                assert answer.status == 200, answer
                latencies.append(answer.ended - answer.began)
                await trio.sleep(pause.uniform(0.02, 0.06))

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(one)
    return latencies


def p99(latencies: list[float]) -> float:
    """Return the 99th percentile in milliseconds."""
    return statistics.quantiles(latencies, n=100)[98] * 1000


@pytest.mark.parametrize(
    ("count", "repetitions", "seconds"),
    [(200, 1, 0.5), pytest.param(2000, 5, 6.0, marks=pytest.mark.proof)],
    ids=["slice", "proof"],
)
async def test_slow_clients_are_closed_and_slow_down_nobody_else(
    database_url: str, tmp_path: Path, count: int, repetitions: int, seconds: float
) -> None:
    port = free_port()
    settling = seconds / 3
    patience = seconds + 2 * settling + 1.0
    environ = {
        "DATABASE_URL": database_url,
        "PORT": str(port),
        "CLIENT_HEAD_TIMEOUT_MS": str(int(patience * 1000)),
        "CLIENT_BODY_TIMEOUT_MS": str(int(patience * 1000)),
        "UPSTREAM_POOL_MAX": "5000",
    }
    without: list[float] = []
    with_them: list[float] = []
    async with raw_upstream(respond(200, body=b"quick")) as fast, raw_upstream(big_answer) as slow:
        async with running_service(database_url) as service:
            await service.api(API, fast.url)
            await service.api("slow", slow.url)
            consumer, attacker = await service.consumer("10000"), await service.consumer("10000")
        with callora("serve", environ=environ, log_directory=tmp_path) as process:
            await first_paid(process, port, consumer.api_key)
            await measure(port, consumer, min(1.0, seconds))
            for _ in range(repetitions):
                without.append(p99(await measure(port, consumer, seconds)))
                async with slow_clients(port, attacker, count) as clients:
                    await trio.sleep(settling)  # what opening them costs is another question
                    with_them.append(p99(await measure(port, consumer, seconds)))
                    assert await clients.connections() >= count, "they were there all the while"
                    await clients.until_closed(patience + 15)
            async with books(database_url) as database:
                await until_no_hold(database, 5)
                await assert_audit_clean(database)
            process.signal()
            assert await process.ended() == 0
        assert "Traceback" not in process.stderr, process.stderr[-4000:]
    before, beside = statistics.median(without), statistics.median(with_them)
    print(
        f"\n{count} slow clients: p99 of the others {before:.1f} ms without ({min(without):.1f}…{max(without):.1f}), "
        f"{beside:.1f} ms beside them ({min(with_them):.1f}…{max(with_them):.1f}): {beside / before:.2f} times"
    )
    if repetitions > 1:
        assert beside < 2 * before
