"""The drain: SIGTERM under load cuts nothing before the deadline, loses nothing that is captured, and always ends."""

import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path

import attrs
import psutil
import pytest
import trio

from callora.store.embedded import EmbeddedPostgres
from tests.proof.books import API, PRICE, assert_audit_clean, books, first_paid
from tests.support.client import ClosedEarly, RawClient, request_bytes
from tests.support.postgres import make_template
from tests.support.processes import Answer, Caller, CalloraProcess, callora, free_port, nothing_left_in
from tests.support.service import Consumer, running_service
from tests.support.upstream import (
    Exchange,
    RawUpstream,
    big,
    by_path,
    chunk_bytes,
    raw_upstream,
    respond,
    silent,
)

GONE_SECONDS = 10.0
"""So long after the drain's deadline no process is left, whatever happened and however busy the machine."""
TAIL_SECONDS = 0.3
"""Who is told that the last call has ended and who is turned away may learn it in either order, this far apart."""


@attrs.define
class Slow:
    """Upstream handlers that take `seconds`: one says nothing until then, one streams events all the while."""

    seconds: float

    async def long(self, exchange: Exchange) -> None:
        await exchange.read_body()
        await trio.sleep(self.seconds)
        await respond(200, body=b"late")(exchange)

    async def events(self, exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.send_head(200, [("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked")])
        for number in range(10):
            await exchange.send(chunk_bytes(b"data: %d\n\n" % number))
            await trio.sleep(self.seconds / 10)
        await exchange.send(b"0\r\n\r\n")


@attrs.define
class Stage:
    """A service about to be drained."""

    process: CalloraProcess
    port: int
    consumer: Consumer
    upstream: RawUpstream
    answers: list[Answer] = attrs.field(factory=list)
    kept: list[RawClient] = attrs.field(factory=list)
    """Idle connections that stay open, each after one served call."""

    async def call_until_ended(self, path: str, pause_seconds: float) -> None:
        """Call again and again, while the service lives."""
        async with Caller(self.port, self.consumer.api_key) as caller:
            while self.process.popen.poll() is None:
                number = len(self.answers)
                self.answers.append(await caller.call(f"/v1/call/{API}/{path}?call={path}-{number}-{id(caller)}"))
                await trio.sleep(pause_seconds)


@contextmanager
def serving(database_url: str, log_directory: Path, drain_ms: int) -> Iterator[tuple[CalloraProcess, int]]:
    """Run `callora serve`."""
    port = free_port()
    environ = {
        "DATABASE_URL": database_url,
        "PORT": str(port),
        "DRAIN_TIMEOUT_MS": str(drain_ms),
        "LOG_LEVEL": "info",
    }
    with callora("serve", environ=environ, log_directory=log_directory) as process:
        yield process, port


async def seeded(database_url: str, upstream: RawUpstream) -> Consumer:
    """Publish the API and make someone who pays."""
    async with running_service(database_url) as service:
        await service.api(API, upstream.url)
        return await service.consumer("10000")


@pytest.mark.parametrize(
    ("drains", "seconds"), [(3, 1.0), pytest.param(100, 5.0, marks=pytest.mark.proof)], ids=["slice", "proof"]
)
async def test_a_drain_under_load_cuts_no_accepted_call_and_loses_no_charge(
    database_url: str, tmp_path: Path, drains: int, seconds: float
) -> None:
    seed = random.randrange(2**32)
    print(f"\nseed {seed}")
    moments = random.Random(seed)
    slow = Slow(seconds)
    handlers = {"/short": respond(200, body=b"now"), "/long": slow.long, "/events": slow.events}
    told: Counter[str] = Counter()
    lasted: list[float] = []
    captured = 0
    async with raw_upstream(by_path(handlers)) as upstream, books(database_url) as database:
        consumer = await seeded(database_url, upstream)
        for number in range(drains):
            upstream.requests.clear()
            signals = [signal.SIGTERM] if number % 3 == 0 else moments.choices([signal.SIGTERM, signal.SIGINT], k=2)
            with serving(database_url, tmp_path, 30_000) as (process, port):
                stage = Stage(process, port, consumer, upstream)
                lasted.append(await drain_once(stage, signals, moments))
            assert lasted[-1] < seconds + GONE_SECONDS, process.stderr[-4000:]
            assert "Traceback" not in process.stderr, process.stderr[-4000:]
            captured += sum(answer.charge > 0 for answer in stage.answers) + 1 + len(stage.kept)
            told.update(classes(stage))
            # At once, with nobody left to store anything: what was told is stored, and no hold is open.
            row = await database.fetch_row(
                "SELECT count(*) FILTER (WHERE state = 'captured') AS captured,"
                " count(*) FILTER (WHERE state = 'held') AS held FROM usage_events"
            )
            assert row is not None
            assert (row["captured"], row["held"]) == (captured, 0)
            await assert_audit_clean(database)
    print(
        f"{drains} drains, {statistics.median(lasted):.2f} s (median), {max(lasted):.2f} s (worst) with calls of "
        f"{seconds:g} s in hand: {dict(told)}; {captured} charged and told"
    )
    assert told["503 while draining"] >= drains


async def drain_once(stage: Stage, signals: Sequence[signal.Signals], moments: random.Random) -> float:
    """Load the service, drain it, check every answer; return the seconds from the signal to the process's end."""
    process = stage.process
    await first_paid(process, stage.port, stage.consumer.api_key, f"/v1/call/{API}/short")
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        for _ in range(4):
            client = await stack.enter_async_context(RawClient.connect("127.0.0.1", stage.port))
            await client.send(request_bytes("GET", f"/v1/call/{API}/short", stage.consumer.headers))
            assert (await client.read_response()).status == 200
            stage.kept.append(client)
        for path, pause in (("short", 0.01),) * 4 + (("long", 0.02),) * 3 + (("events", 0.02),) * 3:
            nursery.start_soon(stage.call_until_ended, path, pause)
        await trio.sleep(moments.uniform(0.2, 0.6))
        signalled = time.monotonic()
        process.signal(signals[0])
        await process.until(lambda: "draining" in process.stderr, "the drain to begin")
        draining = time.monotonic()
        for again in signals[1:]:
            process.signal(again)
        # A request on a kept connection is refused, and the connection closed; an idle one delays nobody.
        for client in stage.kept[:2]:
            await client.send(request_bytes("GET", f"/v1/call/{API}/short", stage.consumer.headers))
            refused = await client.read_response()
            assert (refused.status, refused.header("Connection")) == (503, "close")
            assert int(refused.header("Retry-After") or 0) > 0
            assert await client.read_eof() == b""
        code = await process.ended(60)
        ended = time.monotonic()
        for client in stage.kept[2:]:
            assert await client.read_eof() == b""
    assert code == 0, process.stderr[-4000:]
    accepted = {request.target.partition("?call=")[2] for request in stage.upstream.requests}
    last_served = max(answer.ended for answer in stage.answers if answer.status == 200)
    for answer in stage.answers:
        if answer.whole:
            assert answer.status == (503 if answer.began > draining else answer.status), (answer, draining)
            assert answer.status in (200, 503), answer
            assert answer.charge == (PRICE if answer.status == 200 else 0)
            if answer.status == 503:
                assert answer.ended > signalled
                assert answer.header("Connection") == "close"
                assert int(answer.header("Retry-After") or 0) > 0
        else:
            assert answer.head is None, f"cut in the middle: {answer}"
            assert answer.target.partition("?call=")[2] not in accepted, f"an accepted call failed: {answer}"
            assert answer.ended > last_served - TAIL_SECONDS, f"turned away while calls were in hand: {answer}"
    return ended - signalled


def classes(stage: Stage) -> Counter[str]:
    """Return the answers by what they are, for the figures."""
    words = {200: "served", 503: "503 while draining", None: "no connection at the very end"}
    return Counter(words[answer.status] for answer in stage.answers)


async def test_a_client_that_never_reads_cannot_hold_the_process_past_the_deadline(
    database_url: str, tmp_path: Path
) -> None:
    async with raw_upstream(big(64)) as upstream, books(database_url) as database:
        consumer = await seeded(database_url, upstream)
        with serving(database_url, tmp_path, 500) as (process, port):
            await until_listening(process, port)
            async with RawClient.connect("127.0.0.1", port) as client:
                await client.send(request_bytes("GET", f"/v1/call/{API}/big", consumer.headers))
                await client.read_head()
                assert await drained(process, 0.5) == 1
        assert await states(database_url) == {"captured": 1}, "delivered in part and paid"
        await assert_audit_clean(database)


async def test_a_call_without_an_answer_at_the_deadline_is_cut_and_costs_nothing(
    database_url: str, tmp_path: Path
) -> None:
    async with raw_upstream(silent()) as upstream:
        consumer = await seeded(database_url, upstream)
        with serving(database_url, tmp_path, 500) as (process, port):
            await until_listening(process, port)
            async with RawClient.connect("127.0.0.1", port) as client:
                await client.send(request_bytes("GET", f"/v1/call/{API}/silent", consumer.headers))
                await upstream.wait_requests(1)
                assert await drained(process, 0.5) == 1
                with pytest.raises(ClosedEarly):
                    await client.read_response()
    assert await states(database_url) == {"released": 1}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_an_idle_service_ends_at_once_although_connections_are_open(
    database_url: str, tmp_path: Path, number: signal.Signals
) -> None:
    with serving(database_url, tmp_path, 30_000) as (process, port):
        await until_listening(process, port)
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(RawClient.connect("127.0.0.1", port)) for _ in range(20)]
            await clients[0].send(request_bytes("GET", "/livez"))
            assert (await clients[0].read_response()).status == 200
            await clients[1].send(b"GET /livez HTTP/1.1\r\nHo")  # half a head is no accepted call
            process.signal(number)
            assert await process.ended(10) == 0, "long before the deadline of 30 s"
            for client in clients:
                assert await client.read_eof() == b""


async def test_probes_are_told_of_the_drain_while_calls_end(database_url: str, tmp_path: Path) -> None:
    slow = Slow(1.0)
    async with raw_upstream(slow.long) as upstream:
        consumer = await seeded(database_url, upstream)
        with serving(database_url, tmp_path, 30_000) as (process, port):
            await until_listening(process, port)
            async with RawClient.connect("127.0.0.1", port) as client, Caller(port, consumer.api_key) as prober:
                await client.send(request_bytes("GET", f"/v1/call/{API}/long", consumer.headers))
                await upstream.wait_requests(1)
                process.signal()
                await process.until(lambda: "draining" in process.stderr, "the drain to begin")
                ready = await prober.call("/readyz")
                assert (ready.status, ready.header("Connection")) == (503, "close")
                assert (await prober.call("/livez")).status == 200
                assert (await client.read_response()).status == 200
            assert await process.ended(5) == 0


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    """A server that a test may freeze."""
    data_dir = tmp_path / "data"
    with nothing_left_in(data_dir):
        server = EmbeddedPostgres(data_dir, settings={"fsync": "off"})
        server.start()
        try:
            yield server
        finally:
            server.stop()


async def test_a_frozen_database_cannot_hold_the_process_past_the_deadline(
    own_server: EmbeddedPostgres, tmp_path: Path
) -> None:
    gate = trio.Event()

    async def gated(exchange: Exchange) -> None:
        await gate.wait()
        await respond(200)(exchange)

    dsn = await trio.to_thread.run_sync(own_server.dsn_for, await trio.to_thread.run_sync(make_template, own_server))
    async with raw_upstream(gated) as upstream:
        consumer = await seeded(dsn, upstream)
        with serving(dsn, tmp_path, 500) as (process, port), frozen_at_end(own_server) as freeze:
            await until_listening(process, port)
            async with RawClient.connect("127.0.0.1", port) as client:
                await client.send(request_bytes("GET", f"/v1/call/{API}/x", consumer.headers))
                await upstream.wait_requests(1)
                freeze()
                gate.set()
                assert await drained(process, 0.5) == 1
                with suppress(ClosedEarly):
                    assert (await client.read_response()).status != 200, "delivered without a stored charge"


@contextmanager
def frozen_at_end(server: EmbeddedPostgres) -> "Iterator[Freeze]":
    """Yield what freezes the server; it is thawed at the end of the block."""
    freeze = Freeze(server)
    try:
        yield freeze
    finally:
        for process in freeze.frozen:
            with suppress(psutil.Error):
                process.resume()


class Freeze:
    """Stops every process of a server, as a machine that has lost its disk does."""

    def __init__(self, server: EmbeddedPostgres) -> None:
        self._server = server
        self.frozen: list[psutil.Process] = []

    def __call__(self) -> None:
        """Stop them."""
        postmaster = psutil.Process(self._server.server_pid)
        self.frozen = [postmaster, *postmaster.children(recursive=True)]
        for process in self.frozen:
            process.suspend()


async def until_listening(process: CalloraProcess, port: int) -> None:
    """Wait until the service answers."""
    async with Caller(port, "none") as caller:
        with trio.move_on_after(20):
            while process.popen.poll() is None:
                if (await caller.call("/livez")).status == 200:
                    return
                await trio.sleep(0.01)
    raise process.never("it does not answer")


async def drained(process: CalloraProcess, deadline_seconds: float) -> int:
    """Send SIGTERM twice and return the exit code; fail when the process outlives the deadline for too long."""
    began = time.monotonic()
    process.signal()
    process.signal()
    code = await process.ended(deadline_seconds + GONE_SECONDS)
    took = time.monotonic() - began
    assert took >= deadline_seconds, "it did not wait for what was in hand"
    return code


async def states(database_url: str) -> dict[str, int]:
    """Return how many usage events are in each state."""
    async with books(database_url) as database:
        rows = await database.fetch("SELECT state::text AS state, count(*) AS count FROM usage_events GROUP BY 1")
    return {row["state"]: row["count"] for row in rows}
