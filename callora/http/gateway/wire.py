"""One TCP connection, plain or under TLS, with as few Trio operations a byte as there can be.

A plain wire is a raw non-blocking socket that the poller watches: it is tried first and waited for only when it is not
ready, which costs a fraction of a SocketStream. No operation has a cancel scope of its own; who watches the time calls
`abort`, which ends both directions at once and wakes whoever waits.
"""

import socket
import ssl
from typing import Final

import trio

from callora.http.gateway.poller import Poller

RECEIVE_BYTES: Final = 65536
SOON_BYTES_MAX: Final = 16_384
"""The most that is put into the outbox. What is longer costs far more than the waking that is saved."""
_YIELD_BYTES: Final = 1_048_576


class WireBroken(Exception):
    """The other side, or `abort`, ended the connection in the middle of something."""

    def __init__(self, message: str, *, sent_nothing: bool = False) -> None:
        super().__init__(message)
        self.sent_nothing = sent_nothing
        """True when not one byte of what was to be sent was taken by the kernel."""


class PlainWire:
    """A TCP or UNIX connection."""

    __slots__ = ("_outbox", "_since_yield", "_unsent", "socket", "took_nothing", "watch")

    def __init__(self, sock: socket.socket, poller: Poller) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = sock
        self.watch = poller.watch(sock.fileno())
        self._since_yield = 0
        self._outbox = poller.outbox
        self._unsent: bytes | memoryview = b""
        self.took_nothing = False
        """True once `send_soon` has failed, and the kernel took not one byte of what it was given."""

    async def receive(self) -> bytes:
        """Return what has arrived. Cancellation: nothing is lost; a ready wire is not a checkpoint each time."""
        watch = self.watch
        while True:
            if not watch.readable:
                await watch.wait_readable()
                self._since_yield = 0
            try:
                data = self.socket.recv(RECEIVE_BYTES)
            except (BlockingIOError, InterruptedError):
                watch.readable = False
                continue
            except OSError as error:
                raise WireBroken(str(error)) from error
            if len(data) < RECEIVE_BYTES:
                watch.drained()
            self._since_yield += len(data)
            if self._since_yield >= _YIELD_BYTES:
                self._since_yield = 0
                await trio.lowlevel.checkpoint()
            return data

    async def receive_later(self) -> bytes:
        """Like `receive`, and always a checkpoint: a client that is never silent takes turns with the others."""
        if self.watch.readable:
            await trio.lowlevel.checkpoint()
        return await self.receive()

    @property
    def sending(self) -> bool:
        """True while some of what `send_soon` took is still to be sent."""
        return len(self._unsent) > 0

    def send_soon(self, data: bytes) -> bool:
        """Take a whole message that is sent when all tasks have had their turn, and as the other side takes it.

        A failure ends the connection in both directions, which the next `receive` tells.

        Returns:
            False when it was not taken and `send` has to be used: it is long, the last one is still on its way, or
            there is something to read, which may be the connection's end and must not be read before this is sent.
        """
        if self._unsent or self.watch.readable or len(data) > SOON_BYTES_MAX or not self._outbox.opened:
            return False
        self._unsent = data
        self._outbox.put(self._push)
        return True

    def _push(self) -> None:
        unsent = self._unsent
        if not unsent:
            return
        try:
            sent = self.socket.send(unsent)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self.took_nothing = isinstance(unsent, bytes)
            self._unsent = b""
            self.watch.on_writable = None
            self.abort()
            return
        if sent == len(unsent):
            self._unsent = b""
            self.watch.on_writable = None
            return
        if sent:
            self._unsent = memoryview(unsent)[sent:]
        self.watch.on_writable = self._push

    async def finish_sending(self) -> None:
        """Wait until what `send_soon` took is sent, or its failure has ended the connection."""
        self._push()
        while self._unsent:
            await self.watch.wait_writable()

    async def send(self, data: bytes) -> None:
        """Send all of it, behind what `send_soon` took."""
        if self._unsent:
            await self.finish_sending()
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
            await self.watch.wait_writable()
            try:
                rest = rest[sock.send(rest) :]
            except (BlockingIOError, InterruptedError):
                continue
            except OSError as error:
                raise WireBroken(str(error), sent_nothing=len(rest) == len(data)) from error

    def is_quiet(self) -> bool:
        """Tell whether an idle connection is still open and has said nothing that nobody asked for.

        What reached this machine before the request in hand did has been told before it was.
        """
        return not self.watch.readable or _is_silent(self.socket)

    def stop_receiving(self) -> None:
        """End the other side's direction now; what we have to say can still be sent."""
        _shut(self.socket, socket.SHUT_RD)

    def abort(self) -> None:
        """End both directions now."""
        _shut(self.socket)

    def close(self) -> None:
        """Give the socket back; of what `send_soon` took, what the kernel does not take now is lost."""
        self._push()
        self._unsent = b""
        self.watch.close()
        self.socket.close()


class TlsWire:
    """A connection under TLS: Trio's own stream, of which the poller watches the end alone."""

    __slots__ = ("_stream", "socket", "watch")

    def __init__(
        self, sock: socket.socket, poller: Poller, context: ssl.SSLContext, server_hostname: str | None
    ) -> None:
        """Args:
        server_hostname: what the other side's certificate must name; None on the server's side.
        """
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = sock
        self.watch = poller.watch(sock.fileno(), end_only=True)
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

    @property
    def sending(self) -> bool:
        """False: nothing is sent behind anyone's back."""
        return False

    @property
    def took_nothing(self) -> bool:
        """False: what was encrypted is not told from what was sent."""
        return False

    def send_soon(self, data: bytes) -> bool:
        """Take nothing: `send` has to be used."""
        return False

    async def finish_sending(self) -> None:
        """Nothing to wait for."""

    async def send(self, data: bytes) -> None:
        """Send all of it."""
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError, ssl.SSLError) as error:
            raise WireBroken(str(error)) from error

    def is_quiet(self) -> bool:
        """Tell whether an idle connection is still open and silent; a TLS 1.3 ticket counts as speaking."""
        return _is_silent(self.socket)

    def stop_receiving(self) -> None:
        """The same as `abort`: TLS cannot go on in one direction."""
        self.abort()

    def abort(self) -> None:
        """End both directions now."""
        _shut(self.socket)

    def close(self) -> None:
        """Give the socket back, without a closing handshake: every message carries its own end."""
        self.watch.close()
        trio.lowlevel.notify_closing(self.socket)
        self.socket.close()


Wire = PlainWire | TlsWire


def _is_silent(sock: socket.socket) -> bool:
    try:
        sock.recv(1, socket.MSG_PEEK)
    except (BlockingIOError, InterruptedError):
        return True
    except OSError:
        return False
    return False


def _shut(sock: socket.socket, direction: int = socket.SHUT_RDWR) -> None:
    try:
        sock.shutdown(direction)
    except OSError:
        return  # it has ended already
