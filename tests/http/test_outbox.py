"""The outbox: what was taken to be sent is sent, whole, in order and once, or its failure is told."""

import os
import socket
from contextlib import suppress

import pytest
import trio
import trio.testing

from callora.http.gateway.poller import Poller
from callora.http.gateway.wire import SOON_BYTES_MAX, PlainWire, WireBroken
from callora.ledger.money import parse_usdc
from tests.support.client import RawClient, call, request_bytes, reset_on_close
from tests.support.service import running_service
from tests.support.upstream import Exchange, echo, head_bytes, raw_upstream, respond
from tests.support.wires import Kind, drain, fill, socket_pair, wired

PATH = "/v1/call/echo/x"


def arrived(sock: socket.socket) -> bytes:
    """Return what can be read at once."""
    with suppress(BlockingIOError):
        return sock.recv(1_048_576)
    return b""


def reset(sock: socket.socket) -> None:
    """Close with RST, where there is such a thing."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


async def test_what_several_tasks_send_goes_out_when_all_of_them_have_had_their_turn(
    poller: Poller, kind: Kind
) -> None:
    with wired(poller, kind) as (one, of_one), wired(poller, kind) as (two, of_two):
        await trio.testing.wait_all_tasks_blocked()
        early: list[bytes] = []

        async def speak(wire: PlainWire) -> None:
            assert wire.send_soon(b"said")
            assert wire.sending
            early.extend([arrived(of_one), arrived(of_two)])
            await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(speak, one)
            nursery.start_soon(speak, two)
        assert early == [b""] * 4
        assert not one.sending
        assert not two.sending
        assert [arrived(of_one), arrived(of_two)] == [b"said", b"said"]


async def test_what_the_kernel_does_not_take_at_once_follows_as_it_does_and_nothing_overtakes_it(
    poller: Poller, kind: Kind
) -> None:
    with wired(poller, kind) as (wire, other):
        filled = fill(wire)
        message = bytes(range(256)) * (SOON_BYTES_MAX // 256)
        assert wire.send_soon(message)
        await trio.testing.wait_all_tasks_blocked()
        assert wire.sending
        assert not wire.send_soon(b"next"), "one message at a time"
        received = bytearray()

        async def receive(size: int) -> None:
            while len(received) < size:
                await trio.lowlevel.wait_readable(other)
                received.extend(other.recv(1000))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive, filled + len(message) + 6)
            await wire.send(b"behind")
        assert received[filled:] == message + b"behind"
        assert not wire.sending
        assert wire.send_soon(b"x"), "and again"


async def test_finishing_waits_for_the_last_byte(poller: Poller, kind: Kind) -> None:
    with wired(poller, kind) as (wire, other):
        assert wire.send_soon(b"short")
        await wire.finish_sending()
        assert arrived(other) == b"short"
        filled = fill(wire)
        assert wire.send_soon(b"long" * 1000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wire.finish_sending)
            await trio.testing.wait_all_tasks_blocked()
            assert wire.sending
            await drain(other, filled + 4000)
        assert not wire.sending


async def test_a_wire_that_is_closed_at_once_has_said_what_it_had_to_say(poller: Poller, kind: Kind) -> None:
    with wired(poller, kind) as (wire, other):
        assert wire.send_soon(b"farewell")
        wire.close()
        assert arrived(other) == b"farewell"
        with wired(poller, kind) as (_, innocent):  # perhaps with the same descriptor
            await trio.testing.wait_all_tasks_blocked()
            assert arrived(innocent) == b""


async def test_a_wire_that_fails_before_anything_is_taken_says_so_to_its_reader(poller: Poller, kind: Kind) -> None:
    with wired(poller, kind) as (wire, other):
        await trio.testing.wait_all_tasks_blocked()
        assert wire.send_soon(b"never heard")
        reset(other)
        with suppress(WireBroken):
            assert await wire.receive() == b""
        assert wire.took_nothing
        assert not wire.sending


async def test_a_wire_that_fails_in_the_middle_does_not_claim_that_nothing_was_taken(poller: Poller) -> None:
    with wired(poller, "unix") as (wire, other):  # TCP's windows take the whole of so little
        wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
        assert wire.send_soon(bytes(SOON_BYTES_MAX))
        await trio.testing.wait_all_tasks_blocked()
        assert wire.sending
        assert arrived(other)
        reset(other)
        with suppress(WireBroken):
            assert await wire.receive() == b""
        await wire.finish_sending()
        assert not wire.took_nothing


async def test_nothing_is_taken_that_is_long_or_that_nobody_would_send(poller: Poller, kind: Kind) -> None:
    with wired(poller, kind) as (wire, other):
        assert not wire.send_soon(bytes(SOON_BYTES_MAX + 1))
        assert wire.send_soon(bytes(SOON_BYTES_MAX))
        await wire.finish_sending()
        assert len(arrived(other)) == SOON_BYTES_MAX
    idle = Poller()
    sock, other = socket_pair(kind)
    with other:
        wire = PlainWire(sock, idle)
        assert not wire.send_soon(b"into the void")
        wire.close()
    idle.close()


async def test_after_a_push_that_crashed_nothing_more_is_taken(
    poller: Poller, kind: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    def crash() -> None:
        raise ValueError("a bug")

    with wired(poller, kind) as (wire, other):
        poller.outbox.put(crash)
        assert wire.send_soon(b"of the same turn")
        await trio.lowlevel.checkpoint()
        assert "a bug" in caplog.text
        assert arrived(other) == b"of the same turn"
        assert not wire.send_soon(b"into the void")
        await wire.send(b"at once")
        assert arrived(other) == b"at once"


async def test_what_was_taken_in_the_turn_in_which_the_poller_ends_is_sent(kind: Kind) -> None:
    taken = set[bool]()
    for _ in range(50):  # whether the poller comes first in that turn is left to chance
        poller = Poller()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(poller.run)
            await trio.testing.wait_all_tasks_blocked()
            sock, other = socket_pair(kind)
            with other:
                wire = PlainWire(sock, poller)
                nursery.cancel_scope.cancel()
                await trio.lowlevel.cancel_shielded_checkpoint()
                took = wire.send_soon(b"last words")
                await trio.lowlevel.cancel_shielded_checkpoint()
                assert arrived(other) == (b"last words" if took else b"")
                taken.add(took)
                wire.close()
        poller.close()
    assert taken == {True, False}


@pytest.mark.parametrize("says", [b"", head_bytes(408, [("Content-Length", "0")])], ids=["silent", "speaks"])
async def test_a_request_that_a_kept_connection_took_nothing_of_goes_to_another_one(
    database_url: str, monkeypatch: pytest.MonkeyPatch, says: bytes
) -> None:
    """The upstream ends a kept connection in the moment in which it is chosen, perhaps with a word nobody asked for."""

    async def once(exchange: Exchange) -> None:
        await echo()(exchange)
        if len(upstream.requests) == 1:
            await trio.sleep_forever()  # nobody reads when it is closed

    async with running_service(database_url) as service, raw_upstream(once) as upstream:
        await service.api("echo", upstream.url)
        consumer = await service.consumer("1")
        assert (await call(service.port, "POST", PATH, consumer.headers, b"first")).status == 200
        ends = upstream.connections[:]

        def is_quiet(_: PlainWire) -> bool:
            if ends:
                connection = ends.pop()
                reset_on_close(connection.socket)
                os.write(connection.socket.fileno(), says)
                connection.socket.close()
            return True

        monkeypatch.setattr(PlainWire, "is_quiet", is_quiet)
        response = await call(service.port, "POST", PATH, consumer.headers, b"second")
        assert (response.status, response.body) == (200, b"second")
        assert [request.body for request in upstream.requests] == [b"first", b"second"]
        assert len(upstream.connections) == 2
        assert await service.balance(consumer) == (parse_usdc("0.98"), 0)


async def test_a_drain_waits_for_an_answer_that_its_client_has_not_yet_taken(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = bytes(range(250)) * 60
    wires: list[PlainWire] = []
    construct = PlainWire.__init__

    def small(wire: PlainWire, sock: socket.socket, poller: Poller) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
        construct(wire, sock, poller)
        wires.append(wire)

    async with (
        running_service(database_url) as service,
        raw_upstream(respond(body=body)) as upstream,
    ):
        await service.api("echo", upstream.url)
        consumer = await service.consumer("1")
        monkeypatch.setattr(PlainWire, "__init__", small)
        sock = trio.socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        await sock.connect(("127.0.0.1", service.port))
        client = RawClient(trio.SocketStream(sock), sock, 10)
        await client.send(request_bytes("GET", PATH, consumer.headers))
        await upstream.wait_requests(1)
        while not (wires and wires[0].sending):
            await trio.testing.wait_all_tasks_blocked()
        service.stop.set()
        await trio.testing.wait_all_tasks_blocked()
        response = await client.read_response()
        assert response.body == body
        await client.stream.aclose()
    assert service.exit_code == 0
