"""A scriptable upstream for tests: real sockets, exact bytes, and every way an upstream can misbehave.

A handler is an async function of one `Exchange`; the functions at the end of this module return handlers. Whatever a
request brought is recorded before the handler sees it, and its body as the handler reads it.
"""

import hashlib
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from http import HTTPStatus
from typing import Final

import attrs
import trio

from tests.support.client import (
    BodyReader,
    ClosedEarly,
    Head,
    Headers,
    Wire,
    reset_on_close,
    watchdog,
)

MIB: Final = 1 << 20
BLOCK: Final = bytes(range(256)) * 256
"""64 KiB; `big` sends it again and again."""

PairsOfHeaders = Iterable[tuple[str, str]]


@attrs.define
class RecordedRequest:
    """One request as it arrived."""

    connection: int
    """Number of the connection that brought it; the first is 1."""
    method: str
    target: str
    """As in the request line."""
    version: str
    headers: Headers
    """As they came: order, case and repetitions."""
    raw_head: bytes
    """Request line to the empty line, inclusive."""
    body: bytes = b""
    """What the handler has read of the body, framing taken off; empty where it reads without keeping."""
    raw_body: bytes = b""
    """The same with its framing, once the body has been read whole."""
    body_length: int = 0
    """Bytes of body read, kept or not."""
    trailers: Headers = attrs.field(factory=list)
    """Of a chunked body, once it has been read whole."""
    complete: bool = False
    """Whether the whole body has been read."""

    def all(self, name: str) -> list[str]:
        """Return every value of a header, in order."""
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def header(self, name: str) -> str | None:
        """Return the only value of a header, None without one; two are an assertion."""
        values = self.all(name)
        assert len(values) <= 1, f"{name} is repeated: {values}"
        return values[0] if values else None


@attrs.define
class Connection:
    """One accepted connection."""

    number: int
    """The first is 1."""
    stream: trio.abc.Stream
    """TLS, when the upstream speaks it."""
    socket: trio.socket.SocketType
    """The socket under the stream."""
    wire: Wire
    peer_gone: trio.Event = attrs.field(factory=trio.Event)
    """Set when the peer's close or reset has been read, or met while sending."""
    closed: bool = False
    """Whether our side has closed or reset it."""

    async def close(self) -> None:
        """Close: FIN, or whatever TLS does."""
        self.closed = True
        await trio.aclose_forcefully(self.stream)

    async def reset(self) -> None:
        """Close with RST."""
        reset_on_close(self.socket)
        await self.close()

    async def wait_peer_gone(self) -> None:
        """Read and drop what comes until the peer closes or resets."""
        self.wire.tape = None
        while await self.wire.some():
            pass
        self.peer_gone.set()


class Exchange:
    """One request and the means to answer it."""

    def __init__(self, connection: Connection, request: RecordedRequest, body: BodyReader) -> None:
        """Made by the upstream for each request."""
        self.connection = connection
        self.request = request
        self._body = body

    async def read_body(self) -> bytes:
        """Return the whole body, recorded; called again it returns the same.

        Raises:
            ClosedEarly: the peer closed or reset first; what had come is recorded.
        """
        pieces = [self.request.body]
        self.connection.wire.tape = tape = bytearray()
        try:
            while piece := await self.read_piece():
                pieces.append(piece)
        finally:
            self.request.body = b"".join(pieces)
            self.request.raw_body += bytes(tape)
            self.connection.wire.tape = None
        return self.request.body

    async def read_piece(self) -> bytes:
        """Return the next bytes of the body, counted and not kept; empty when it is complete."""
        piece = await self._body.read()
        self.request.body_length += len(piece)
        if not piece:
            self.request.trailers = self._body.trailers
            self.request.complete = True
        return piece

    async def send(self, data: bytes) -> None:
        """Send exactly these bytes; BrokenResourceError when the peer has gone."""
        await self.connection.stream.send_all(data)

    async def send_head(self, status: int, headers: PairsOfHeaders = (), reason: str | None = None) -> None:
        """Send a response head with these headers and no others."""
        await self.send(head_bytes(status, headers, reason))


Handler = Callable[[Exchange], Awaitable[None]]


def head_bytes(status: int, headers: PairsOfHeaders = (), reason: str | None = None) -> bytes:
    """Return a response head; the reason is the usual one unless given."""
    if reason is None:
        reason = HTTPStatus(status).phrase if status in set(HTTPStatus) else "Odd"
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
    return f"HTTP/1.1 {status} {reason}\r\n{lines}\r\n".encode("latin-1")


class RawUpstream:
    """A listening upstream and the record of what reached it."""

    def __init__(self, handler: Handler, url: str, port: int) -> None:
        """Made by `raw_upstream`."""
        self.handler = handler
        """Answers every request from the next one on; a test may exchange it."""
        self.url = url
        """Without a path: `http://127.0.0.1:49152`."""
        self.port = port
        self.requests: list[RecordedRequest] = []
        """In order of their heads' arrival."""
        self.connections: list[Connection] = []
        """In order of their acceptance, closed ones included."""
        self._changed = trio.Event()

    async def wait_requests(self, count: int) -> RecordedRequest:
        """Wait until `count` requests have come and return the count-th; bounded by the watchdog."""
        with watchdog(f"request {count} to reach the upstream, which has {len(self.requests)}"):
            while len(self.requests) < count:
                await self._changed.wait()
        return self.requests[count - 1]

    async def wait_connections(self, count: int) -> Connection:
        """Wait until `count` connections were accepted and return the count-th; bounded by the watchdog."""
        with watchdog(f"connection {count} to reach the upstream, which has {len(self.connections)}"):
            while len(self.connections) < count:
                await self._changed.wait()
        return self.connections[count - 1]

    async def wait_peer_gone(self, number: int = 1) -> None:
        """Wait until the peer of connection `number` has gone; bounded by the watchdog.

        It is noticed by a handler that waits for it (`silent`), by one whose send fails, and between requests.
        """
        connection = await self.wait_connections(number)
        with watchdog(f"the peer of connection {number} to close"):
            await connection.peer_gone.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _serve(self, context: ssl.SSLContext | None, tcp: trio.SocketStream) -> None:
        stream: trio.abc.Stream = tcp
        if context is not None:
            stream = trio.SSLStream(tcp, context, server_side=True, https_compatible=True)
        connection = Connection(len(self.connections) + 1, stream, tcp.socket, Wire(stream))
        self.connections.append(connection)
        self._tell()
        try:
            while not connection.closed and await self._serve_one(connection):
                pass
        except (trio.BrokenResourceError, ClosedEarly):
            connection.peer_gone.set()
        finally:
            await trio.aclose_forcefully(stream)

    async def _serve_one(self, connection: Connection) -> bool:
        """Serve one request; return whether there may be another."""
        connection.wire.tape = None
        try:
            head = await connection.wire.head()
        except ClosedEarly:
            connection.peer_gone.set()
            return False
        request = RecordedRequest(connection.number, *head.start, head.headers, head.raw)
        self.requests.append(request)
        self._tell()
        exchange = Exchange(connection, request, BodyReader.of_request(connection.wire, head))
        await self.handler(exchange)
        if connection.closed:
            return False
        while not request.complete:  # what the handler left, so that the next head is found
            await exchange.read_piece()
        return not _says_close(head)


def _says_close(head: Head) -> bool:
    return any("close" in value.lower() for value in head.all("Connection"))


@asynccontextmanager
async def raw_upstream(
    handler: Handler, *, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[RawUpstream]:
    """Listen, and at the end close everything; a handler's own error fails the test through an exception group.

    Args:
        handler: answers each request; connections are kept alive unless it closes or the request says close.
        host: the address to listen on.
        port: 0 takes a free one.
        tls: a server's context, to speak TLS.
    """
    listeners = await trio.open_tcp_listeners(port, host=host)
    bound: int = listeners[0].socket.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    upstream = RawUpstream(handler, f"{'http' if tls is None else 'https'}://{shown}:{bound}", bound)
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(trio.serve_listeners, partial(upstream._serve, tls), listeners))
        try:
            yield upstream
        finally:
            nursery.cancel_scope.cancel()


# ---------------------------------------------------------------------------------------------------------------------
# Handlers: sound answers


def respond(
    status: int = 200, headers: PairsOfHeaders = (), body: bytes = b"", *, reason: str | None = None
) -> Handler:
    """Read the body, then answer; Content-Length is added where the status allows one and none is given."""
    sent = list(headers)
    if not (status < 200 or status in (204, 304)) and not any(name.lower() == "content-length" for name, _ in sent):
        sent.append(("Content-Length", str(len(body))))
    answer = head_bytes(status, sent, reason)

    async def handle(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.send(answer if exchange.request.method == "HEAD" else answer + body)

    return handle


def echo(headers: PairsOfHeaders = ()) -> Handler:
    """Answer 200 with exactly the bytes of the request's body."""

    async def handle(exchange: Exchange) -> None:
        body = await exchange.read_body()
        await exchange.send_head(200, [*headers, ("Content-Length", str(len(body)))])
        if exchange.request.method != "HEAD":
            await exchange.send(body)

    return handle


def chunk_bytes(data: bytes, extension: bytes = b"") -> bytes:
    """Return one chunk, or the last one for no data (without the end of the trailers)."""
    if not data:
        return b"0\r\n"
    return b"%x%b\r\n%b\r\n" % (len(data), extension, data)


def chunked(
    chunks: Sequence[bytes], headers: PairsOfHeaders = (), trailers: PairsOfHeaders = (), *, status: int = 200
) -> Handler:
    """Answer chunked, each chunk sent by itself."""

    async def handle(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.send_head(status, [*headers, ("Transfer-Encoding", "chunked")])
        for chunk in chunks:
            await exchange.send(chunk_bytes(chunk))
        last = "".join(f"{name}: {value}\r\n" for name, value in trailers)
        await exchange.send(chunk_bytes(b"") + last.encode("latin-1") + b"\r\n")

    return handle


def sse(steps: Sequence[tuple[trio.Event, bytes]], *, finish: bool = True) -> Handler:
    """Answer with an event stream whose pace the test sets: each step is one chunk, sent once its event is set.

    Args:
        steps: what to wait for, and the bytes to send then, such as `b"data: 1\\n\\n"`.
        finish: end the body after the last step; else the connection is reset there.
    """

    async def handle(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.send_head(200, [("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked")])
        for event, data in steps:
            await event.wait()
            await exchange.send(chunk_bytes(data))
        if finish:
            await exchange.send(b"0\r\n\r\n")
        else:
            await exchange.connection.reset()

    return handle


def interim(statuses: Sequence[int], final: Handler, headers: PairsOfHeaders = ()) -> Handler:
    """Send these 1xx heads, then answer as `final` does."""

    async def handle(exchange: Exchange) -> None:
        for status in statuses:
            await exchange.send_head(status, headers)
        await final(exchange)

    return handle


def big(mib: int, headers: PairsOfHeaders = ()) -> Handler:
    """Answer with `mib` MiB of BLOCKs, never held whole."""

    async def handle(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.send_head(200, [*headers, ("Content-Length", str(mib * MIB))])
        for _ in range(mib * MIB // len(BLOCK)):
            await exchange.send(BLOCK)

    return handle


def sink() -> Handler:
    """Read the body without keeping it and answer `{"bytes": …, "sha256": …}`."""

    async def handle(exchange: Exchange) -> None:
        digest = hashlib.sha256()
        while piece := await exchange.read_piece():
            digest.update(piece)
        count = exchange.request.body_length
        await respond(200, body=json.dumps({"bytes": count, "sha256": digest.hexdigest()}).encode())(exchange)

    return handle


# ---------------------------------------------------------------------------------------------------------------------
# Handlers: faults


def silent() -> Handler:
    """Never answer; wait for the peer to go."""

    async def handle(exchange: Exchange) -> None:
        await exchange.connection.wait_peer_gone()
        await exchange.connection.close()

    return handle


def close_silently() -> Handler:
    """Read the request and close without an answer."""

    async def handle(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.connection.close()

    return handle


def reset_before_head() -> Handler:
    """Read the request and reset without an answer."""

    async def handle(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.connection.reset()

    return handle


def reset_amid_body(sent: int, claimed: int, gate: trio.Event | None = None) -> Handler:
    """Answer 200 with `sent` of `claimed` bytes, wait for the gate if there is one, and reset.

    A reset may overtake what was sent before it; a test that wants the bytes seen first sets the gate afterwards.
    """

    async def handle(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.send(head_bytes(200, [("Content-Length", str(claimed))]) + b"x" * sent)
        if gate is not None:
            await gate.wait()
        await exchange.connection.reset()

    return handle


def endless_headers(line: bytes = b"X-More: " + b"m" * 100 + b"\r\n") -> Handler:
    """Answer with a status line and headers that never end, until the peer goes."""

    async def handle(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.send(b"HTTP/1.1 200 OK\r\n")
        while True:
            await exchange.send(line * 100)

    return handle


def raw(data: bytes, *, close: bool = True) -> Handler:
    """Read the request and send exactly these bytes; then close, or keep the connection."""

    async def handle(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.send(data)
        if close:
            await exchange.connection.close()

    return handle


def dribble(data: bytes, *, close: bool = False) -> Handler:
    """Read the request and send these bytes one at a time, each in a segment of its own as far as TCP allows."""

    async def handle(exchange: Exchange) -> None:
        await exchange.read_body()
        for byte in data:
            await exchange.send(bytes([byte]))
            await trio.lowlevel.checkpoint()
        if close:
            await exchange.connection.close()

    return handle


def wrong_length(claimed: int, sent: int) -> Handler:
    """Answer 200 with a Content-Length of `claimed` and a body of `sent` bytes; a short one is closed after."""

    async def handle(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.send(head_bytes(200, [("Content-Length", str(claimed))]) + b"x" * sent)
        if sent < claimed:
            await exchange.connection.close()

    return handle


def garbage(data: bytes = b"\x00\xff SSH-2.0-not-http\r\n\r\n") -> Handler:
    """Answer with bytes that are not HTTP and close."""
    return raw(data)


# ---------------------------------------------------------------------------------------------------------------------
# Handlers: scripts


def sequence(*handlers: Handler) -> Handler:
    """Answer the n-th request, over all connections, as the n-th handler does; the last one answers all that follow."""
    count = 0

    async def handle(exchange: Exchange) -> None:
        nonlocal count
        count += 1
        await handlers[min(count, len(handlers)) - 1](exchange)

    return handle


def by_path(handlers: Mapping[str, Handler], otherwise: Handler | None = None) -> Handler:
    """Answer as the handler of the target's path does; others get 404 unless `otherwise` is given."""

    async def handle(exchange: Exchange) -> None:
        path = exchange.request.target.partition("?")[0]
        await handlers.get(path, otherwise or respond(404))(exchange)

    return handle


def gated(gate: trio.Event, handler: Handler) -> Handler:
    """Wait for the gate, then answer as the handler does."""

    async def handle(exchange: Exchange) -> None:
        await gate.wait()
        await handler(exchange)

    return handle
