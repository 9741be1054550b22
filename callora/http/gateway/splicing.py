"""Long bodies between two sockets inside the kernel: bytes that nobody here looks at are never copied up."""

import fcntl
import os
from typing import Final

import trio

from callora.http.gateway.client import ClientConnection, ClientGone, ClientTooSlow
from callora.http.gateway.wire import PlainWire

SPLICE_BYTES_MIN: Final = 65_536
"""From here on it pays."""
_PIPE_BYTES: Final = 262_144
_PIPES_KEPT_MAX: Final = 64
_YIELD_BYTES: Final = 4_194_304
_FLAGS: Final = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


class SourceEnded(Exception):
    """The upstream broke off before the body was complete."""


class _Pipes:
    """Empty pipes, kept for the next body."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, int]] = []

    def take(self) -> tuple[int, int]:
        """Return an empty pipe.

        Raises:
            OSError: the process has no more descriptors.
        """
        if self._kept:
            return self._kept.pop()
        read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        return read, write

    def give_back(self, pipe: tuple[int, int], *, empty: bool) -> None:
        """Keep an empty pipe; close one that still holds bytes of a body."""
        if empty and len(self._kept) < _PIPES_KEPT_MAX:
            self._kept.append(pipe)
        else:
            os.close(pipe[0])
            os.close(pipe[1])


_pipes = _Pipes()


async def splice_body(source: PlainWire, client: ClientConnection, length: int, idle_seconds: float) -> None:
    """Move `length` bytes from an upstream to a client.

    Args:
        length: bytes, > 0.
        idle_seconds: how long the upstream may be silent.

    Raises:
        SourceEnded: the upstream closed or was reset first. ClientGone: the client was.

    Cancellation: at any time; what was moved was moved.
    """
    target = client.wire
    assert isinstance(target, PlainWire)
    pipe = _pipes.take()
    read, write = pipe
    held = 0
    since_yield = 0
    try:
        while length or held:
            if not held:
                held = await _fill(source, client, write, min(length, _PIPE_BYTES), idle_seconds)
                length -= held
                since_yield += held
            try:
                held -= os.splice(read, target.socket.fileno(), held, flags=_FLAGS)
            except BlockingIOError:
                client.wait_for("client", client.limits.body_seconds)
                await target.watch.wait_writable()
                client.no_limit()
                since_yield = 0
            except OSError as error:
                raise (ClientTooSlow if client.timed_out else ClientGone) from error
            if since_yield >= _YIELD_BYTES:
                since_yield = 0
                await trio.lowlevel.checkpoint()
    finally:
        _pipes.give_back(pipe, empty=held == 0)


async def _fill(source: PlainWire, client: ClientConnection, write: int, wanted: int, idle_seconds: float) -> int:
    while True:
        try:
            taken = os.splice(source.socket.fileno(), write, wanted, flags=_FLAGS)
        except BlockingIOError:
            client.wait_for("upstream", idle_seconds)
            source.watch.drained()
            if not source.watch.readable:
                await source.watch.wait_readable()
            client.no_limit()
            continue
        except OSError as error:
            raise SourceEnded from error
        if taken == 0:
            raise SourceEnded
        return taken
