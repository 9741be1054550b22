"""Streaming: nothing waits for what follows it, nothing is kept, and who stops reading stalls only himself."""

import gc
import json
import os
import time
from pathlib import Path

import pytest
import trio

from callora.ledger.money import parse_usdc
from tests.support.client import RawClient, call, request_bytes, watchdog
from tests.support.service import Consumer, RunningService, running_service
from tests.support.upstream import (
    BLOCK,
    MIB,
    Exchange,
    RawUpstream,
    big,
    by_path,
    chunk_bytes,
    raw_upstream,
    respond,
    sink,
    sse,
)

GROWTH_MAX = 32 * MIB
PAGE = os.sysconf("SC_PAGE_SIZE")


async def ready(service: RunningService, upstream: RawUpstream) -> Consumer:
    await service.api("echo", upstream.url)
    return await service.consumer("1")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


async def test_every_event_of_a_stream_passes_before_the_next_is_made(database_url: str) -> None:
    gates = [trio.Event() for _ in range(20)]
    steps = [(gate, b"data: %d\n\n" % number) for number, gate in enumerate(gates)]
    async with running_service(database_url) as service, raw_upstream(sse(steps)) as upstream:
        consumer = await ready(service, upstream)
        async with RawClient.connect(port=service.port) as client:
            await client.send(request_bytes("GET", "/v1/call/echo/x", consumer.headers))
            head = await client.read_head()
            assert head.header("X-Callora-Charge") == "0.0100000"
            body = client.body(head)
            delays: list[float] = []
            for gate, data in steps:
                sent_at = time.monotonic()
                gate.set()
                piece = await client.read_piece(body)
                assert piece is not None
                assert piece.data == data
                delays.append(piece.at - sent_at)
            assert await client.read_piece(body) is None
        # Of a shared machine one pause is forgiven; a gateway that gathers would be late every time.
        assert sorted(delays)[-2] < 0.05, delays


async def test_the_head_of_a_stream_passes_before_its_first_event(database_url: str) -> None:
    never = trio.Event()
    async with running_service(database_url) as service, raw_upstream(sse([(never, b"data: 1\n\n")])) as upstream:
        consumer = await ready(service, upstream)
        async with RawClient.connect(port=service.port) as client:
            await client.send(request_bytes("GET", "/v1/call/echo/x", consumer.headers))
            assert (await client.read_head()).header("Content-Type") == "text/event-stream"


async def test_every_piece_of_a_request_passes_before_the_next_is_sent(database_url: str) -> None:
    async def converse(exchange: Exchange) -> None:
        await exchange.send_head(200, [("Transfer-Encoding", "chunked")])
        while piece := await exchange.read_piece():
            await exchange.send(chunk_bytes(piece))
        await exchange.send(b"0\r\n\r\n")

    async with running_service(database_url) as service, raw_upstream(converse) as upstream:
        consumer = await ready(service, upstream)
        async with RawClient.connect(port=service.port) as client:
            headers = [*consumer.headers, ("Transfer-Encoding", "chunked")]
            await client.send(request_bytes("POST", "/v1/call/echo/x", headers))
            body = client.body(await client.read_head())
            for number in range(20):
                await client.send(chunk_bytes(b"piece %d" % number))
                piece = await client.read_piece(body)
                assert piece is not None
                assert piece.data == b"piece %d" % number
            await client.send(b"0\r\n\r\n")
            assert await client.read_piece(body) is None
            await client.send(request_bytes("POST", "/v1/call/echo/x", consumer.headers))
            assert (await client.read_response()).status == 200


async def test_20_mib_echoed_in_full_duplex_come_back_whole(database_url: str) -> None:
    async def converse(exchange: Exchange) -> None:
        await exchange.send_head(200, [("Transfer-Encoding", "chunked")])
        while piece := await exchange.read_piece():
            await exchange.send(chunk_bytes(piece))
        await exchange.send(b"0\r\n\r\n")

    blocks = 20 * MIB // len(BLOCK)
    async with running_service(database_url) as service, raw_upstream(converse) as upstream:
        consumer = await ready(service, upstream)
        async with RawClient.connect(port=service.port) as client:
            headers = [*consumer.headers, ("Transfer-Encoding", "chunked")]
            await client.send(request_bytes("POST", "/v1/call/echo/x", headers))

            async def upload() -> None:
                for _ in range(blocks):
                    await client.send(chunk_bytes(BLOCK))
                await client.send(b"0\r\n\r\n")

            received = 0
            async with trio.open_nursery() as nursery:
                nursery.start_soon(upload)
                body = client.body(await client.read_head())
                while piece := await client.read_piece(body):
                    at = received % 256
                    assert piece.data == (BLOCK + BLOCK)[at : at + len(piece.data)]
                    received += len(piece.data)
            assert received == 20 * MIB


async def _download(service: RunningService, consumer: Consumer, mib: int) -> None:
    async with RawClient.connect(port=service.port) as client:
        await client.send(request_bytes("GET", "/v1/call/echo/down", consumer.headers))
        body = client.body(await client.read_head())
        received = 0
        while piece := await client.read_piece(body):
            received += len(piece.data)
        assert received == mib * MIB


async def _upload(service: RunningService, consumer: Consumer, mib: int) -> None:
    async with RawClient.connect(port=service.port) as client:
        headers = [*consumer.headers, ("Content-Length", str(mib * MIB))]
        await client.send(request_bytes("POST", "/v1/call/echo/up", headers))
        for _ in range(mib * MIB // len(BLOCK)):
            await client.send(BLOCK)
        assert json.loads((await client.read_response()).body)["bytes"] == mib * MIB


@pytest.mark.parametrize("mib", [64, pytest.param(200, marks=pytest.mark.proof)])
@pytest.mark.parametrize("direction", ["up", "down"])
async def test_a_large_body_is_passed_on_without_being_kept(database_url: str, direction: str, mib: int) -> None:
    handler = by_path({"/down": big(mib), "/up": sink()})
    async with running_service(database_url) as service, raw_upstream(handler) as upstream:
        consumer = await ready(service, upstream)
        # Once in small, so that what is made once is not counted.
        await call(service.port, "POST", "/v1/call/echo/up", consumer.headers, BLOCK)
        gc.collect()
        before = resident_bytes()
        peak = before

        async def look() -> None:
            nonlocal peak
            while True:
                peak = max(peak, resident_bytes())
                await trio.sleep(0.01)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            await (_upload if direction == "up" else _download)(service, consumer, mib)
            nursery.cancel_scope.cancel()
        assert peak - before < GROWTH_MAX


async def test_a_client_that_stops_reading_stalls_only_itself_and_is_given_up(database_url: str) -> None:
    handler = by_path({"/down": big(256)}, respond(body=b"quick"))
    async with (
        running_service(database_url, {"CLIENT_BODY_TIMEOUT_MS": "500"}) as service,
        raw_upstream(handler) as upstream,
    ):
        consumer = await ready(service, upstream)
        async with RawClient.connect(port=service.port) as client:
            await client.send(request_bytes("GET", "/v1/call/echo/down", consumer.headers))
            head = await client.read_head()
            assert head.header("Content-Length") == str(256 * MIB)
            for _ in range(5):
                assert (await call(service.port, "GET", "/v1/call/echo/x", consumer.headers)).body == b"quick"
            await upstream.wait_peer_gone(1)
            assert len(await client.read_eof()) < 256 * MIB
        await service.until_no_hold(consumer)
        assert await service.balance(consumer) == (parse_usdc("0.94"), 0)


async def test_a_client_that_reads_slowly_and_steadily_is_not_given_up(database_url: str) -> None:
    async with (
        running_service(database_url, {"CLIENT_BODY_TIMEOUT_MS": "3000"}) as service,
        raw_upstream(big(8)) as upstream,
    ):
        consumer = await ready(service, upstream)
        async with RawClient.connect(port=service.port) as client:
            await client.send(request_bytes("GET", "/v1/call/echo/x", consumer.headers))
            body = client.body(await client.read_head())
            received = pauses = 0
            while piece := await client.read_piece(body):
                received += len(piece.data)
                if received >= (pauses + 1) * MIB:
                    pauses += 1
                    await trio.sleep(0.5)  # the slowness itself is what is tested: longer than the bound in all
            assert received == 8 * MIB


async def test_an_upstream_is_not_read_faster_than_its_client_reads(database_url: str) -> None:
    sent = 0

    async def pour(exchange: Exchange) -> None:
        nonlocal sent
        await exchange.send_head(200, [("Transfer-Encoding", "chunked")])
        while True:
            await exchange.send(chunk_bytes(BLOCK))
            sent += len(BLOCK)

    async with running_service(database_url) as service, raw_upstream(pour) as upstream:
        consumer = await ready(service, upstream)
        async with RawClient.connect(port=service.port) as client:
            await client.send(request_bytes("GET", "/v1/call/echo/x", consumer.headers))
            await client.read_head()
            with watchdog("the upstream to be stalled"):
                before = -1
                while before != sent:
                    before = sent
                    await trio.sleep(0.1)  # long enough for a loop that is not stalled to pass on many blocks
            assert sent < 32 * MIB
        await upstream.wait_peer_gone()
