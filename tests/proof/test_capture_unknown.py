"""A capture is stored and its acknowledgement never comes: whoever got no answer has not paid for one.

Between the service and the database stands a wire that goes dead in one direction at a chosen moment, for longer than
the service tries again.
"""

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import trio

from callora.ledger.money import parse_usdc
from tests.proof.books import API, PRICE, assert_audit_clean, books
from tests.support.client import call
from tests.support.service import Consumer, running_service
from tests.support.upstream import Exchange, raw_upstream, respond

SOCKET = ".s.PGSQL.5432"
LOOK_UP_SECONDS = 2.0
"""What the service is given to look an unknown outcome up; it tries every half second, and tells nobody when."""


class DeadWire:
    """Passes a PostgreSQL server's socket on, until told that nothing comes back any more."""

    def __init__(self, server: Path, dsn: str) -> None:
        """Args:
        server: its socket.
        dsn: leads to it through this.
        """
        self._server = server
        self._live: set[trio.SocketStream] = set()
        self.dsn = dsn
        self.dead = False
        """While True what clients send still arrives, and nothing that the server says; new connections fail."""

    async def run(self, listener: trio.socket.SocketType) -> None:
        """Pass on what comes to a listening socket, until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                client, _ = await listener.accept()
                if self.dead:
                    client.close()
                else:
                    nursery.start_soon(self._pass_on, trio.SocketStream(client))

    def heal(self) -> None:
        """Let new connections through; those that were dead stay so and end."""
        self.dead = False
        for stream in self._live:
            stream.socket.close()

    async def _pass_on(self, client: trio.SocketStream) -> None:
        server = await trio.open_unix_socket(str(self._server))
        self._live.add(client)
        async with client, server, trio.open_nursery() as nursery:
            nursery.start_soon(self._pump, client, server, False)
            nursery.start_soon(self._pump, server, client, True)
        self._live.discard(client)

    async def _pump(self, source: trio.SocketStream, sink: trio.SocketStream, dies: bool) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in source:
                if not (dies and self.dead):
                    await sink.send_all(data)
        await trio.aclose_forcefully(sink)


@asynccontextmanager
async def dead_wire(database_url: str) -> AsyncIterator[DeadWire]:
    """Stand between a database and who uses `dsn`."""
    parts = urlsplit(database_url)
    server = Path(parse_qs(parts.query)["host"][0]) / SOCKET
    with tempfile.TemporaryDirectory(prefix="wire-") as directory, trio.socket.socket(trio.socket.AF_UNIX) as listener:
        await listener.bind(f"{directory}/{SOCKET}")
        listener.listen(64)
        wire = DeadWire(server, f"postgresql://postgres@/{parts.path.removeprefix('/')}?host={directory}")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wire.run, listener)  # noqa: ASYNC113 - the socket listens already
            yield wire
            nursery.cancel_scope.cancel()


@pytest.mark.proof
@pytest.mark.parametrize("key", [None, "intent"], ids=["plain", "keyed"])
async def test_nobody_pays_for_an_answer_he_never_gets_nor_gets_one_unpaid(database_url: str, key: str | None) -> None:
    gate = trio.Event()

    async def gated(exchange: Exchange) -> None:
        await gate.wait()
        await respond(200, body=b"delivered")(exchange)

    async with (
        dead_wire(database_url) as wire,
        raw_upstream(gated) as upstream,
        running_service(wire.dsn, {"COMMIT_TIMEOUT_MS": "300", "LOG_LEVEL": "error"}) as service,
        books(database_url) as database,
    ):
        await service.api(API, upstream.url)
        consumer: Consumer = await service.consumer("1")
        headers = [*consumer.headers, *([("Idempotency-Key", key)] if key else [])]
        statuses: list[int] = []
        # Each statement is prepared once on its connection, which has to be over before the wire dies.
        gate.set()
        warm = [*consumer.headers, *([("Idempotency-Key", "warm")] if key else [])]
        assert (await call(service.port, "GET", f"/v1/call/{API}/warm", warm)).status == 200
        gate = trio.Event()

        async def first() -> None:
            response = await call(service.port, "GET", f"/v1/call/{API}/x", headers, watchdog_seconds=20)
            statuses.append(response.status)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(first)
            await upstream.wait_requests(2)
            wire.dead = True
            gate.set()
        assert statuses == [504], "the outcome is not known, and the answer not delivered"
        captured = await database.fetch_value("SELECT count(*) FROM usage_events WHERE state = 'captured'")
        assert captured == 2, "the capture was stored, unheard"
        wire.heal()
        await trio.sleep(LOOK_UP_SECONDS)
        delivered = False
        if key is not None:
            again = await call(service.port, "GET", f"/v1/call/{API}/x", headers)
            delivered = again.status == 200
        available, held = await service.balance(consumer)
        paid = parse_usdc("1") - available
        assert (paid, held) == (PRICE + (PRICE if delivered else 0), 0)
        assert len(upstream.requests) == 2
        await assert_audit_clean(database)
