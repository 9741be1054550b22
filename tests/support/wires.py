"""Wires that a poller watches, each with the socket at its other end."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

import trio

from callora.http.gateway.poller import Poller
from callora.http.gateway.wire import PlainWire

Kind = Literal["tcp", "unix"]


def socket_pair(kind: Kind) -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets that do not block."""
    if kind == "unix":
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            one = socket.create_connection(listener.getsockname())
            other, _ = listener.accept()
    one.setblocking(False)
    other.setblocking(False)
    return one, other


@contextmanager
def wired(poller: Poller, kind: Kind) -> Iterator[tuple[PlainWire, socket.socket]]:
    """Give a wire and the socket at its other end."""
    sock, other = socket_pair(kind)
    wire = PlainWire(sock, poller)
    with other:
        try:
            yield wire, other
        finally:
            wire.close()


async def until_told(wire: PlainWire) -> None:
    if not wire.watch.readable:
        await wire.watch.wait_readable()


def fill(wire: PlainWire) -> int:
    """Write until the socket takes no more; return how much it took."""
    taken = 0
    with suppress(BlockingIOError):
        while True:
            taken += wire.socket.send(bytes(65_536))
    return taken


async def drain(sock: socket.socket, size: int) -> None:
    while size:
        await trio.lowlevel.wait_readable(sock)
        size -= len(sock.recv(65_536))
