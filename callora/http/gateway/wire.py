"""One TCP connection, plain or under TLS, with as few Trio operations a byte as there can be.

A plain wire is a raw non-blocking socket: it is tried first and waited for only when it is not ready, which costs a
third of a SocketStream. No operation has a cancel scope of its own; who watches the time calls `abort`, which ends
both directions at once and wakes whoever waits.
"""

import socket
import ssl
from typing import Final

import trio

RECEIVE_BYTES: Final = 65536
_YIELD_BYTES: Final = 1_048_576


class WireBroken(Exception):
    """The other side, or `abort`, ended the connection in the middle of something."""

    def __init__(self, message: str, *, sent_nothing: bool = False) -> None:
        super().__init__(message)
        self.sent_nothing = sent_nothing
        """True when not one byte of what was to be sent was taken by the kernel."""


class PlainWire:
    """A TCP or UNIX connection."""

    __slots__ = ("_since_yield", "socket")

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = sock
        self._since_yield = 0

    async def receive(self) -> bytes:
        """Return what has arrived. Cancellation: nothing is lost; a ready wire is not a checkpoint each time."""
        sock = self.socket
        while True:
            try:
                data = sock.recv(RECEIVE_BYTES)
            except (BlockingIOError, InterruptedError):
                await trio.lowlevel.wait_readable(sock)
                self._since_yield = 0
                continue
            except OSError as error:
                raise WireBroken(str(error)) from error
            self._since_yield += len(data)
            if self._since_yield >= _YIELD_BYTES:
                self._since_yield = 0
                await trio.lowlevel.checkpoint()
            return data

    async def receive_later(self) -> bytes:
        """Like `receive`, for a wire that has just been given work: waits first, which saves a failing attempt."""
        await trio.lowlevel.wait_readable(self.socket)
        return await self.receive()

    async def send(self, data: bytes) -> None:
        """Send all of it."""
        sock = self.socket
        sent = 0
        try:
            sent = sock.send(data)
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            raise WireBroken(str(error), sent_nothing=True) from error
        if sent == len(data):
            return
        rest = memoryview(data)[sent:]
        while rest:
            await trio.lowlevel.wait_writable(sock)
            try:
                rest = rest[sock.send(rest) :]
            except (BlockingIOError, InterruptedError):
                continue
            except OSError as error:
                raise WireBroken(str(error), sent_nothing=len(rest) == len(data)) from error

    def is_quiet(self) -> bool:
        """Tell whether an idle connection is still open and has said nothing that nobody asked for."""
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            return False
        return False

    def stop_receiving(self) -> None:
        """End the other side's direction now; what we have to say can still be sent."""
        _shut(self.socket, socket.SHUT_RD)

    def abort(self) -> None:
        """End both directions now."""
        _shut(self.socket)

    def close(self) -> None:
        """Give the socket back."""
        self.socket.close()


class TlsWire:
    """A connection under TLS."""

    __slots__ = ("_stream", "socket")

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, server_hostname: str | None) -> None:
        """Args:
        server_hostname: what the other side's certificate must name; None on the server's side.
        """
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = sock
        self._stream = trio.SSLStream(
            trio.SocketStream(trio.socket.from_stdlib_socket(sock)),
            context,
            server_hostname=server_hostname,
            server_side=server_hostname is None,
            https_compatible=True,
        )

    async def handshake(self) -> None:
        """Agree on keys.

        Raises:
            WireBroken: the other side is not who it should be, or speaks no TLS.
        """
        try:
            await self._stream.do_handshake()
        except (
            trio.BrokenResourceError,
            trio.ClosedResourceError,
            OSError,
            ssl.SSLError,
            ssl.CertificateError,
        ) as error:
            raise WireBroken(f"TLS: {error.__cause__ or error}", sent_nothing=True) from error

    async def receive(self) -> bytes:
        """Return what has arrived."""
        try:
            return bytes(await self._stream.receive_some(RECEIVE_BYTES))
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError, ssl.SSLError) as error:
            raise WireBroken(str(error)) from error

    async def receive_later(self) -> bytes:
        """The same as `receive`."""
        return await self.receive()

    async def send(self, data: bytes) -> None:
        """Send all of it."""
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError, ssl.SSLError) as error:
            raise WireBroken(str(error)) from error

    def is_quiet(self) -> bool:
        """Tell whether an idle connection is still open and silent; a TLS 1.3 ticket counts as speaking."""
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            return False
        return False

    def stop_receiving(self) -> None:
        """The same as `abort`: TLS cannot go on in one direction."""
        self.abort()

    def abort(self) -> None:
        """End both directions now."""
        _shut(self.socket)

    def close(self) -> None:
        """Give the socket back, without a closing handshake: every message carries its own end."""
        trio.lowlevel.notify_closing(self.socket)
        self.socket.close()


Wire = PlainWire | TlsWire


def _shut(sock: socket.socket, direction: int = socket.SHUT_RDWR) -> None:
    try:
        sock.shutdown(direction)
    except OSError:
        return  # it has ended already
