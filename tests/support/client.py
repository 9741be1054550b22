"""A raw HTTP/1.1 client for tests, and the reading of HTTP/1.1 from a stream that it shares with the raw upstream.

It sends exactly the bytes it is given and shows exactly the bytes that came back. Every wait is bounded by a watchdog
on the machine's clock, because Trio's clock may be a frozen MockClock that only the test moves.
"""

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final, Literal, Self

import attrs
import trio

WATCHDOG_SECONDS: Final = 60.0
HEAD_LENGTH_MAX: Final = 1 << 20
RECONNECT_SECONDS: Final = 0.05
"""Between attempts to reach a port that nobody listens on."""
Headers = list[tuple[str, str]]


class TooSlow(AssertionError):
    """Nothing happened within the watchdog's time: the test would have hung."""


class ClosedEarly(Exception):
    """The peer closed or reset the connection before the message was complete."""

    def __init__(self, what: str, received: bytes, *, reset: bool) -> None:
        """Name what was awaited, what of it had come, and whether the end was a reset."""
        super().__init__(f"the peer {'reset' if reset else 'closed'} before {what}; received {received[-200:]!r}")
        self.received = received
        self.reset = reset


class Malformed(Exception):
    """The peer sent bytes that are not HTTP/1.1."""


@contextlib.contextmanager
def watchdog(waiting_for: str, seconds: float = WATCHDOG_SECONDS) -> Iterator[None]:
    """Bound what happens inside by the machine's clock, whatever Trio's clock does.

    Args:
        waiting_for: what the failure says was awaited.
        seconds: machine time.

    Raises:
        TooSlow: the time passed; what was inside has been cancelled.
    """
    scope = trio.CancelScope()
    token = trio.lowlevel.current_trio_token()

    def expire() -> None:
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(scope.cancel)

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        with scope:
            yield
    finally:
        timer.cancel()
    if scope.cancelled_caught:
        raise TooSlow(f"nothing within {seconds:g} s of machine time: {waiting_for}")


def reset_on_close(sock: trio.socket.SocketType) -> None:
    """Make closing this socket send RST in place of FIN."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@contextlib.contextmanager
def closed_port(host: str = "127.0.0.1") -> Iterator[int]:
    """Yield a port that refuses connections and that nobody else can take meanwhile."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.bind((host, 0))  # bound and not listening
        yield sock.getsockname()[1]


# ---------------------------------------------------------------------------------------------------------------------
# Reading HTTP/1.1


@attrs.frozen
class Head:
    """The start line and headers of one message, and the bytes they were."""

    start: tuple[str, str, str]
    """Method, target, version of a request; version, status, reason of a response."""
    headers: Headers
    """As they came: order, case and repetitions."""
    raw: bytes
    """Start line to the empty line, inclusive."""

    def all(self, name: str) -> list[str]:
        """Return every value of a header, in order."""
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def header(self, name: str) -> str | None:
        """Return the only value of a header, None without one; two are an assertion."""
        values = self.all(name)
        assert len(values) <= 1, f"{name} is repeated: {values}"
        return values[0] if values else None


def parse_head(raw: bytes) -> Head:
    """Return the head that the bytes up to the empty line are; lenient, since tests send and receive odd ones.

    Raises:
        Malformed: there is no start line of three parts (a reason may be missing).
    """
    lines = raw.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    parts = lines[0].split(" ", 2)
    if len(parts) == 2 and parts[0].startswith("HTTP/"):
        parts.append("")
    if len(parts) != 3:
        raise Malformed(f"not a start line: {lines[0]!r}")
    headers: Headers = []
    for line in lines[1:]:
        name, _, value = line.partition(":")
        headers.append((name, value.strip(" \t")))
    return Head((parts[0], parts[1], parts[2]), headers, raw)


class Wire:
    """A stream with a buffer in front; what is taken from it is also written on `tape` while there is one."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        """Read from a connected stream."""
        self.stream = stream
        self.tape: bytearray | None = bytearray()
        self.ended = False
        self.was_reset = False
        self._buffer = bytearray()

    async def fill(self) -> bool:
        """Wait for more bytes; return whether there were any, False once the peer has closed or reset."""
        if self.ended:
            await trio.lowlevel.checkpoint()
            return False
        try:
            data = await self.stream.receive_some(65536)
        except trio.BrokenResourceError:
            self.was_reset = True
            data = b""
        self._buffer += data
        self.ended = not data
        return bool(data)

    def _take(self, count: int) -> bytes:
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        if self.tape is not None:
            self.tape += data
        return data

    async def some(self, count_max: int = 65536) -> bytes:
        """Return the next bytes as they arrive, empty at the end."""
        if not self._buffer:
            await self.fill()
        return self._take(count_max)

    async def until(self, mark: bytes, what: str) -> bytes:
        """Return the bytes up to the mark, inclusive.

        Raises:
            ClosedEarly: the end came first.
        """
        start = 0
        while (found := self._buffer.find(mark, start)) < 0:
            start = max(0, len(self._buffer) - len(mark) + 1)
            if len(self._buffer) > HEAD_LENGTH_MAX:
                raise Malformed(f"no end of {what} within {HEAD_LENGTH_MAX} bytes")
            if not await self.fill():
                raise ClosedEarly(what, bytes(self._buffer), reset=self.was_reset)
        return self._take(found + len(mark))

    async def head(self) -> Head:
        """Return the next head; see `until` and `parse_head` for what it raises."""
        return parse_head(await self.until(b"\r\n\r\n", "a whole head"))

    async def rest(self) -> bytes:
        """Return everything up to the end, whether the peer closed or reset."""
        while await self.fill():
            pass
        return self._take(len(self._buffer))


class BodyReader:
    """One message body, piece by piece, its framing taken off."""

    def __init__(self, wire: Wire, kind: Literal["length", "chunked", "eof"], length: int = 0) -> None:
        """Read from the wire, which stands just behind the head."""
        self.trailers: Headers = []
        self.done = kind == "length" and length == 0
        self._wire = wire
        self._kind = kind
        self._left = length
        self._first = True

    @classmethod
    def of_request(cls, wire: Wire, head: Head) -> Self:
        """Return the reader of a request's body."""
        return cls._framed(wire, head) or cls(wire, "length", 0)

    @classmethod
    def of_response(cls, wire: Wire, head: Head, method: str) -> Self:
        """Return the reader of the body that answers a request of this method."""
        status = int(head.start[1])
        if method == "HEAD" or status < 200 or status in (204, 304):
            return cls(wire, "length", 0)
        return cls._framed(wire, head) or cls(wire, "eof")

    @classmethod
    def _framed(cls, wire: Wire, head: Head) -> Self | None:
        codings = head.all("Transfer-Encoding")
        if codings and codings[-1].lower().endswith("chunked"):
            return cls(wire, "chunked")
        length = head.header("Content-Length")
        return None if length is None else cls(wire, "length", int(length))

    async def read(self) -> bytes:
        """Return the next piece, empty when the body is complete; of a chunk, as much as has arrived.

        Raises:
            ClosedEarly: the end came first.
            Malformed: not chunked as declared.
        """
        if self.done:
            await trio.lowlevel.checkpoint()
            return b""
        if self._kind == "chunked" and self._left == 0:
            await self._next_chunk()
            if self.done:
                return b""
        data = await self._wire.some(65536 if self._kind == "eof" else min(self._left, 65536))
        if self._kind == "eof":
            if self._wire.was_reset:
                raise ClosedEarly("the end of the body", data, reset=True)
            self.done = not data
            return data
        if not data:
            raise ClosedEarly(f"the last {self._left} bytes", b"", reset=self._wire.was_reset)
        self._left -= len(data)
        self.done = self._kind == "length" and self._left == 0
        return data

    async def read_all(self) -> bytes:
        """Return all that is left of the body; when it ends early, ClosedEarly carries what had come."""
        body = bytearray()
        try:
            while piece := await self.read():
                body += piece
        except ClosedEarly as early:
            raise ClosedEarly("the end of the body", bytes(body) + early.received, reset=early.reset) from early
        return bytes(body)

    async def _next_chunk(self) -> None:
        if not self._first and await self._line("the end of a chunk") != b"":
            raise Malformed("a chunk is longer than its size")
        self._first = False
        size = (await self._line("a chunk size")).split(b";")[0].strip()
        try:
            self._left = int(size, 16)
        except ValueError:
            raise Malformed(f"not a chunk size: {size[:40]!r}") from None
        if self._left == 0:
            while line := await self._line("the trailers' end"):
                name, _, value = line.decode("latin-1").partition(":")
                self.trailers.append((name, value.strip(" \t")))
            self.done = True

    async def _line(self, what: str) -> bytes:
        try:
            return (await self._wire.until(b"\r\n", what))[:-2]
        except ClosedEarly as early:
            raise ClosedEarly(what, b"", reset=early.reset) from early


# ---------------------------------------------------------------------------------------------------------------------
# The client


@attrs.frozen
class RawResponse:
    """A whole final response."""

    status: int
    """100 to 999, as sent."""
    reason: str
    """Empty when there was none."""
    headers: Headers
    """As they came: order, case and repetitions."""
    body: bytes
    """Framing taken off; content coding left on."""
    trailers: Headers
    """Of a chunked body."""
    raw: bytes
    """Every byte, interim responses included."""
    interim: list[Head]
    """The 1xx responses before the final one."""

    def all(self, name: str) -> list[str]:
        """Return every value of a header, in order."""
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def header(self, name: str) -> str | None:
        """Return the only value of a header, None without one; two are an assertion."""
        values = self.all(name)
        assert len(values) <= 1, f"{name} is repeated: {values}"
        return values[0] if values else None

    def json(self) -> Any:
        """Return the body read as JSON."""
        return json.loads(self.body)


@attrs.frozen
class Piece:
    """Some bytes of a body, and when they came."""

    at: float
    """Seconds on the machine's monotonic clock."""
    data: bytes
    """Never empty."""


class RawClient:
    """One client connection."""

    def __init__(self, stream: trio.abc.Stream, sock: trio.socket.SocketType, seconds: float) -> None:
        """Take a connected stream and the socket under it; `connect` is the usual way."""
        self.stream = stream
        self.socket = sock
        self.wire = Wire(stream)
        self._seconds = seconds

    @classmethod
    @asynccontextmanager
    async def connect(
        cls, host: str = "127.0.0.1", port: int = 0, *, watchdog_seconds: float = WATCHDOG_SECONDS
    ) -> AsyncIterator[Self]:
        """Connect, and close at the end.

        Args:
            host: a name or an address.
            port: where the server listens.
            watchdog_seconds: how long any single wait may last, in machine time.
        """
        with watchdog(f"a connection to {host}:{port}", watchdog_seconds):
            stream = await trio.open_tcp_stream(host, port)
        try:
            yield cls(stream, stream.socket, watchdog_seconds)
        finally:
            with trio.CancelScope(shield=True), watchdog("closing the client", watchdog_seconds):
                await stream.aclose()

    async def send(self, data: bytes) -> None:
        """Send exactly these bytes; BrokenResourceError when the server has closed or reset."""
        with watchdog(f"the server to take {len(data)} bytes", self._seconds):
            await self.stream.send_all(data)

    async def read_head(self) -> Head:
        """Return the next response head, interim or final."""
        with watchdog("a response head", self._seconds):
            return await self.wire.head()

    async def read_response(self, method: str = "GET") -> RawResponse:
        """Return the next final response whole.

        Args:
            method: of the request that it answers: HEAD has no body.

        Raises:
            ClosedEarly: the server closed or reset first.
            Malformed: it did not send HTTP.
            TooSlow: the watchdog's time passed without the whole of it.
        """
        self.wire.tape = tape = bytearray()
        interim: list[Head] = []
        with watchdog("a whole response", self._seconds):
            head = await self.wire.head()
            while head.start[1].startswith("1") and head.start[1] != "101":
                interim.append(head)
                head = await self.wire.head()
            reader = BodyReader.of_response(self.wire, head, method)
            body = await reader.read_all()
        return RawResponse(int(head.start[1]), head.start[2], head.headers, body, reader.trailers, bytes(tape), interim)

    def body(self, head: Head, method: str = "GET") -> BodyReader:
        """Return the reader of the body behind a head, for `read_piece`; the bytes are not kept."""
        self.wire.tape = None
        return BodyReader.of_response(self.wire, head, method)

    async def read_piece(self, body: BodyReader) -> Piece | None:
        """Return the next piece of a body and when it came, None when the body is complete."""
        with watchdog("more of a body", self._seconds):
            data = await body.read()
        return Piece(time.monotonic(), data) if data else None

    async def read_eof(self) -> bytes:
        """Return what the server still sends up to its close or reset; `was_reset` tells which."""
        with watchdog("the server to close", self._seconds):
            return await self.wire.rest()

    @property
    def was_reset(self) -> bool:
        """Whether the server ended the connection with a reset."""
        return self.wire.was_reset

    async def shut_write(self) -> None:
        """Send FIN and go on reading."""
        await trio.lowlevel.checkpoint()
        self.socket.shutdown(socket.SHUT_WR)

    async def reset(self) -> None:
        """Leave with RST, as a killed client does."""
        reset_on_close(self.socket)
        await trio.aclose_forcefully(self.stream)


def request_bytes(
    method: str, path: str, headers: Iterable[tuple[str, str]] = (), body: bytes = b"", *, host: str = "127.0.0.1"
) -> bytes:
    """Return a request's bytes; Host and, for a body, Content-Length are added unless given."""
    lines = list(headers)
    names = {name.lower() for name, _ in lines}
    if "host" not in names:
        lines.insert(0, ("Host", host))
    if body and not names & {"content-length", "transfer-encoding"}:
        lines.append(("Content-Length", str(len(body))))
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines)
    return head.encode("latin-1") + b"\r\n" + body


async def call(
    port: int,
    method: str,
    path: str,
    headers: Iterable[tuple[str, str]] = (),
    body: bytes = b"",
    *,
    host: str = "127.0.0.1",
    watchdog_seconds: float = WATCHDOG_SECONDS,
) -> RawResponse:
    """Return the response to one request on a connection of its own; see `RawClient.read_response`."""
    async with RawClient.connect(host, port, watchdog_seconds=watchdog_seconds) as client:
        await client.send(request_bytes(method, path, headers, body, host=f"{host}:{port}"))
        return await client.read_response(method)


@attrs.define
class Insistent:
    """Posts JSON to a service that may be killed at any moment, until there is an answer."""

    port: int
    cut: int = 0
    """How many requests were sent and not answered."""

    async def post(self, path: str, headers: Headers, body: object) -> tuple[int, Any]:
        """Return the first answer's status and body."""
        lines = [*headers, ("Content-Type", "application/json")]
        request = request_bytes("POST", path, lines, json.dumps(body).encode())
        while True:
            sent = False
            try:
                async with RawClient.connect("127.0.0.1", self.port) as client:
                    sent = True
                    await client.send(request)
                    response = await client.read_response("POST")
            except (OSError, trio.BrokenResourceError, ClosedEarly):
                self.cut += sent
                await trio.sleep(0 if sent else RECONNECT_SECONDS)
                continue
            return response.status, json.loads(response.body)
