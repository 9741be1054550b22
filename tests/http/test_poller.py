"""The poller: no edge is lost, whoever waits is woken, and what is over is told."""

import random
import select
import socket
from contextlib import ExitStack, suppress

import pytest
import trio
import trio.testing

from callora.http.gateway.poller import EVENTS_A_TURN, Poller, Watch
from callora.http.gateway.wire import RECEIVE_BYTES, PlainWire, WireBroken
from tests.support.wires import Kind, drain, fill, socket_pair, until_told, wired


async def test_what_came_before_anyone_watched_is_read(poller: Poller, kind: Kind) -> None:
    sock, other = socket_pair(kind)
    other.send(b"early")
    wire = PlainWire(sock, poller)
    assert await wire.receive() == b"early"
    wire.close()
    other.close()


async def test_what_comes_before_during_and_after_a_wait_is_read(poller: Poller, kind: Kind) -> None:
    with wired(poller, kind) as (wire, other):
        other.send(b"before")
        await until_told(wire)
        assert await wire.receive() == b"before"
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                await trio.testing.wait_all_tasks_blocked()
                other.send(b"during")

            nursery.start_soon(send)
            assert await wire.receive() == b"during"
        assert not wire.watch.readable
        other.send(b"after")
        assert await wire.receive() == b"after"


async def test_bytes_between_a_short_read_and_the_wait_are_not_lost(poller: Poller, kind: Kind) -> None:
    with wired(poller, kind) as (wire, other):
        for number in range(200):
            other.send(b"a%d" % number)
            await until_told(wire)
            assert wire.socket.recv(RECEIVE_BYTES) == b"a%d" % number
            other.send(b"b%d" % number)  # after the read, before what it found is noted
            wire.watch.drained()
            assert await wire.receive() == b"b%d" % number


async def test_bytes_the_poller_has_told_of_after_they_were_read_cost_one_attempt(poller: Poller, kind: Kind) -> None:
    with wired(poller, kind) as (wire, other):
        other.send(b"read first")
        assert wire.socket.recv(RECEIVE_BYTES) == b"read first"
        await trio.testing.wait_all_tasks_blocked()  # the stale edge is told meanwhile
        async with trio.open_nursery() as nursery:
            received: list[bytes] = []

            async def receive() -> None:
                received.append(await wire.receive())

            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            assert received == []
            other.send(b"then")
        assert received == [b"then"]


async def test_a_message_of_exactly_one_read_leaves_nothing_behind(poller: Poller, kind: Kind) -> None:
    with wired(poller, kind) as (wire, other):
        other.send(bytes(RECEIVE_BYTES))
        received = 0
        while received < RECEIVE_BYTES:
            received += len(await wire.receive())
        assert wire.is_quiet()
        other.send(b"more")
        assert await wire.receive() == b"more"


async def test_every_byte_of_many_busy_wires_arrives_in_order(poller: Poller, kind: Kind) -> None:
    async def send(wire: PlainWire, data: bytes, seed: int) -> None:
        dice = random.Random(seed)
        view = memoryview(data)
        while view:
            size = dice.choice((1, 100, 5_000, 300_000))
            await wire.send(bytes(view[:size]))
            view = view[size:]
            if dice.random() < 0.3:
                await trio.lowlevel.checkpoint()

    async def receive(wire: PlainWire, data: bytes, seed: int) -> None:
        dice = random.Random(seed)
        received = bytearray()
        while len(received) < len(data):
            with trio.move_on_after(dice.choice((0.0, 0.0001, 1.0))):  # a cancelled wait loses nothing
                received += await wire.receive()
            if dice.random() < 0.2:
                await trio.lowlevel.checkpoint()
        assert received == data

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            wires = []
            for seed in range(30):
                sock, other = socket_pair(kind)
                one, two = PlainWire(sock, poller), PlainWire(other, poller)
                wires += [one, two]
                there = random.Random(seed).randbytes(400_000)
                for left, right in ((one, two), (two, one)):
                    nursery.start_soon(send, left, there, seed)
                    nursery.start_soon(receive, right, there, seed)
    for wire in wires:
        wire.close()


async def test_a_writer_goes_on_when_the_other_side_has_read(poller: Poller, kind: Kind) -> None:
    with wired(poller, kind) as (wire, other):
        full = fill(wire)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wire.send, bytes(1_000_000))
            await trio.testing.wait_all_tasks_blocked()
            await drain(other, full + 1_000_000)


async def test_a_cancelled_reader_loses_nothing_and_another_may_wait(poller: Poller, kind: Kind) -> None:
    with wired(poller, kind) as (wire, other):
        with trio.move_on_after(0.01):
            await wire.receive()
        other.send(b"for the next")
        assert await wire.receive() == b"for the next"


async def test_a_reader_cancelled_as_it_is_woken_loses_nothing(poller: Poller, kind: Kind) -> None:
    with wired(poller, kind) as (wire, other):
        received = b""
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def receive() -> None:
                    nonlocal received
                    received = await wire.receive()

                nursery.start_soon(receive)
                await trio.testing.wait_all_tasks_blocked()
                other.send(b"once")
                wire.watch.told(select.EPOLLIN)
                scope.cancel()
        assert received + (b"" if received else await wire.receive()) == b"once"


async def test_a_cancelled_writer_may_be_followed_by_another(poller: Poller, kind: Kind) -> None:
    with wired(poller, kind) as (wire, other):
        full = fill(wire)
        with trio.move_on_after(0.01) as scope:
            await wire.send(b"never")
        assert scope.cancelled_caught
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wire.send, b"last")
            await trio.testing.wait_all_tasks_blocked()
            await drain(other, full + 4)


async def test_closing_wakes_reader_and_writer(poller: Poller, kind: Kind) -> None:
    with wired(poller, kind) as (wire, _):
        fill(wire)
        broken = 0

        async def receive() -> None:
            nonlocal broken
            with pytest.raises(WireBroken):
                await wire.receive()
            broken += 1

        async def send() -> None:
            nonlocal broken
            with pytest.raises(WireBroken):
                await wire.send(b"more")
            broken += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            nursery.start_soon(send)
            await trio.testing.wait_all_tasks_blocked()
            wire.close()
        assert broken == 2
        wire.close()


async def test_abort_wakes_reader_and_writer(poller: Poller, kind: Kind) -> None:
    with wired(poller, kind) as (wire, _):
        fill(wire)

        async def receive() -> None:
            with suppress(WireBroken):
                assert await wire.receive() == b""

        async def send() -> None:
            with pytest.raises(WireBroken):
                await wire.send(b"more")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            nursery.start_soon(send)
            await trio.testing.wait_all_tasks_blocked()
            wire.abort()


async def test_who_stops_receiving_can_still_send(poller: Poller, kind: Kind) -> None:
    with wired(poller, kind) as (wire, other):
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                assert await wire.receive() == b""

            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            wire.stop_receiving()
        await wire.send(b"the refusal")
        await drain(other, len(b"the refusal"))


async def test_the_end_is_told_once_while_nobody_waits_and_stays_true(poller: Poller, kind: Kind) -> None:
    with wired(poller, kind) as (wire, other):
        told: list[trio.Event] = []
        ended = trio.Event()

        def on_end() -> None:
            told.append(ended)
            ended.set()

        wire.watch.on_end = on_end
        other.send(b"last words")
        other.shutdown(socket.SHUT_WR)
        await ended.wait()
        assert await wire.receive() == b"last words"
        assert [await wire.receive(), await wire.receive()] == [b"", b""]
        other.close()
        await trio.testing.wait_all_tasks_blocked()
        assert told == [ended]


async def test_a_reset_is_told(poller: Poller) -> None:
    with wired(poller, "tcp") as (wire, other):
        told = trio.Event()
        wire.watch.on_end = told.set
        other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        other.close()
        await told.wait()
        with pytest.raises(WireBroken):
            await wire.receive()


async def test_our_own_closing_is_not_told_as_the_other_sides_end(poller: Poller, kind: Kind) -> None:
    with wired(poller, kind) as (wire, _):
        told: list[str] = []
        wire.watch.on_end = lambda: told.append("end")
        wire.close()
        await trio.testing.wait_all_tasks_blocked()
        assert told == []


async def test_an_idle_wire_is_quiet_until_the_other_side_speaks_or_ends(poller: Poller, kind: Kind) -> None:
    with wired(poller, kind) as (wire, other):
        assert wire.is_quiet()
        other.send(b"unasked")
        await until_told(wire)
        assert not wire.is_quiet()
        assert await wire.receive() == b"unasked"
        assert wire.is_quiet()
        other.close()
        await until_told(wire)
        assert not wire.is_quiet()


async def test_what_reached_us_before_a_request_was_told_before_it(poller: Poller, kind: Kind) -> None:
    """A kept connection that was closed before a request arrived is never taken for it."""
    for _ in range(50):
        with wired(poller, kind) as (client, request), wired(poller, kind) as (kept, upstream):
            upstream.close()
            request.send(b"GET")
            assert await client.receive() == b"GET"
            assert not kept.is_quiet()


async def test_a_descriptor_used_again_hears_nothing_of_its_past(poller: Poller, kind: Kind) -> None:
    for _ in range(50):
        with wired(poller, kind) as (old, other):
            descriptor = old.socket.fileno()
            other.send(b"for the old one")
            other.shutdown(socket.SHUT_WR)
            old.close()
            with wired(poller, kind) as (new, writer):
                assert new.socket.fileno() == descriptor
                await trio.testing.wait_all_tasks_blocked()
                assert new.is_quiet()
                assert not new.watch.ended
                old.close()  # a second time, when somebody else has its descriptor
                writer.send(b"for the new one")
                assert await new.receive() == b"for the new one"


async def test_a_wire_that_is_never_silent_lets_others_run(poller: Poller, kind: Kind) -> None:
    with wired(poller, kind) as (wire, other):
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(count)
            for _ in range(100):
                other.send(b"again")
                wire.watch.readable = True
                assert await wire.receive_later() == b"again"
            assert turns >= 99
            nursery.cancel_scope.cancel()


class _Told(trio.abc.Instrument):
    """How many sockets are told of in one step of a task, from one checkpoint to the next."""

    def __init__(self) -> None:
        self.steps: list[int] = [0]

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Begin anew."""
        if self.steps[-1]:
            self.steps.append(0)


async def test_of_many_sockets_at_once_a_bounded_number_is_told_in_a_row_and_each_in_its_turn(
    poller: Poller, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, order, told = _Told(), list[int](), Watch.told

    def counted(watch: Watch, events: int) -> None:
        seen.steps[-1] += 1
        told(watch, events)

    async def read(number: int, wire: PlainWire) -> None:
        await until_told(wire)
        assert await wire.receive() == b"x"
        order.append(number // EVENTS_A_TURN)

    many = 3 * EVENTS_A_TURN
    with ExitStack() as stack:
        wires = [stack.enter_context(wired(poller, "unix")) for _ in range(many)]
        await trio.testing.wait_all_tasks_blocked()  # that they can be written has been told
        monkeypatch.setattr(Watch, "told", counted)
        trio.lowlevel.add_instrument(seen)
        async with trio.open_nursery() as nursery:
            for number, (wire, other) in enumerate(wires):
                nursery.start_soon(read, number, wire)
                other.send(b"x")
        trio.lowlevel.remove_instrument(seen)
        monkeypatch.undo()
    assert max(seen.steps) <= EVENTS_A_TURN
    assert sum(seen.steps) >= many
    assert order == sorted(order), "who came first is not overtaken by a later turn"
