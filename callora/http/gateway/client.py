"""A client's connection: requests one after the other, answers, time limits, and noticing that it has gone."""

from typing import Final, Literal

import trio

from callora.http.gateway.bodies import BadBody, BodyReader, ChunkedReader, LengthReader
from callora.http.gateway.heads import RequestHead, find_head_end, parse_request
from callora.http.gateway.upstream import UpstreamConnection
from callora.http.gateway.wire import Wire, WireBroken

LINGER_BYTES_MAX: Final = 4_194_304
LINGER_SECONDS_MAX: Final = 1.0
DISCARD_BYTES_MAX: Final = 65_536
DISCARD_SECONDS_MAX: Final = 5.0
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"

FOREVER: Final = float("inf")
NO_BODY: Final[BodyReader] = LengthReader(0)
"""The reader of every request without a body: done from the start, never fed."""

Waiting = Literal["request", "client", "upstream"]
"""Bytes of the request, the client's taking of the answer, or the upstream."""


class ClientGone(Exception):
    """The client has closed its connection, or was too slow and has been given up."""


class ClientTooSlow(ClientGone):
    """The client made no progress for too long."""


class TimeLimits:
    """How long a client may take."""

    __slots__ = ("body_seconds", "head_seconds", "idle_seconds")

    def __init__(self, *, head_seconds: float, idle_seconds: float, body_seconds: float) -> None:
        self.head_seconds = head_seconds
        self.idle_seconds = idle_seconds
        self.body_seconds = body_seconds


class Ticker:
    """Trio's clock, read a few times a second: good enough for time limits of seconds, and free to look at."""

    __slots__ = ("now", "step_seconds")

    def __init__(self, step_seconds: float) -> None:
        self.step_seconds = step_seconds
        self.now = 0.0

    def tick(self) -> float:
        """Read the clock; whoever owns the ticker does so every `step_seconds`."""
        self.now = trio.current_time()
        return self.now


class ClientConnection:
    """One accepted connection. The listener's sweeper and the poller touch only `expire` and `hung_up`."""

    __slots__ = (
        "_ticker",
        "buffer",
        "deadline",
        "gone",
        "limits",
        "peer",
        "timed_out",
        "upstream",
        "waiting_for",
        "wire",
    )

    def __init__(self, wire: Wire, peer: str, limits: TimeLimits, ticker: Ticker) -> None:
        self._ticker = ticker
        self.wire = wire
        wire.watch.on_end = self.hung_up
        self.peer = peer
        """The address the connection came from."""
        self.limits = limits
        self.buffer = b""
        """What has arrived and belongs to the next message."""
        self.deadline = FOREVER
        """On Trio's clock; past it whoever is waited for is given up."""
        self.waiting_for: Waiting = "client"
        self.timed_out = False
        self.gone = False
        self.upstream: UpstreamConnection | None = None
        """The upstream connection of the request in hand."""

    # Told by the listener and the poller, between checkpoints.

    def expire(self) -> None:
        """Give up whoever is waited for."""
        self.timed_out = True
        self.deadline = FOREVER
        if self.waiting_for == "request":
            self.gone = True
            self.wire.stop_receiving()  # the refusal can still be sent
        elif self.waiting_for == "client":
            self.gone = True
            self.wire.abort()
        if self.upstream is not None:
            self.upstream.wire.abort()

    def hung_up(self) -> None:
        """Note that the client has ended its direction: a call in hand is pointless from here on.

        A client that goes on listening counts as gone: it cannot be told from one that has closed until something is
        sent.
        """
        self.gone = True
        if self.upstream is not None:
            self.upstream.wire.abort()

    def wait_for(self, side: Waiting, seconds: float) -> None:
        """Start a time limit; it ends with the next one or with `no_limit`."""
        self.waiting_for = side
        self.deadline = self._ticker.now + self._ticker.step_seconds + seconds

    def no_limit(self) -> None:
        """End the time limit."""
        self.deadline = FOREVER

    def hurry(self, seconds: float) -> None:
        """Give the client less time than its limits say to take something of the answer in hand."""
        self.limits = TimeLimits(
            head_seconds=self.limits.head_seconds, idle_seconds=self.limits.idle_seconds, body_seconds=seconds
        )
        if self.waiting_for == "client" and self.deadline < FOREVER:
            self.deadline = min(self.deadline, self._ticker.now + self._ticker.step_seconds + seconds)

    # The connection's own task.

    async def next_head(self) -> RequestHead | None:
        """Return the next request's head; None when the client has none and has closed, or was idle too long.

        Raises:
            BadHead: the connection can only be answered and closed.
            ClientTooSlow: the head was begun and did not arrive in time.
        """
        buffer = self.buffer
        start = 0
        if not buffer:
            self.wait_for("client", self.limits.idle_seconds)
            try:
                buffer = await self.wire.receive_later()
            except WireBroken:
                return None
            if not buffer:
                return None
        self.wait_for("request", self.limits.head_seconds)
        while (end := find_head_end(buffer, start)) < 0:
            start = max(0, len(buffer) - 3)
            try:
                data = await self.wire.receive()
            except WireBroken:
                data = b""
            if not data:
                if self.timed_out:
                    raise ClientTooSlow
                return None
            buffer += data
        self.no_limit()
        self.buffer = buffer[end:]
        return parse_request(buffer[:end])

    async def send(self, data: bytes) -> None:
        """Send bytes of an answer; no progress for too long gives the client up.

        Raises:
            ClientGone.
        """
        self.wait_for("client", self.limits.body_seconds)
        try:
            await self.wire.send(data)
        except WireBroken as error:
            raise (ClientTooSlow if self.timed_out else ClientGone) from error
        self.no_limit()

    async def send_last(self, data: bytes) -> None:
        """Send the last bytes of an answer on a connection that goes on: perhaps together with others' answers.

        Raises:
            ClientGone.
        """
        if not self.wire.send_soon(data):
            await self.send(data)

    async def finish_sending(self) -> None:
        """Wait until the last answer is sent, before the connection ends. No progress for too long ends it."""
        if self.wire.sending:
            self.wait_for("client", self.limits.body_seconds)
            await self.wire.finish_sending()
            self.no_limit()

    async def linger(self) -> None:
        """After a last answer whose request was not read to its end: take a little more, so that the answer arrives.

        Closing with unread input resets the connection, and a reset overtakes what was sent.
        """
        taken = 0
        await self.finish_sending()
        self.wait_for("client", LINGER_SECONDS_MAX)
        try:
            self.wire.socket.shutdown(1)
            while taken < LINGER_BYTES_MAX:
                data = await self.wire.receive()
                if not data:
                    return
                taken += len(data)
        except (OSError, WireBroken):
            return


class RequestBody:
    """The body of the request in hand, read as it is asked for and no faster."""

    __slots__ = ("_client", "_continue_due", "_limits", "_reader", "_started", "received_bytes")

    def __init__(self, client: ClientConnection, head: RequestHead, limit_bytes: int) -> None:
        """Args:
        limit_bytes: the largest body taken.

        Raises:
            BodyTooLarge: more was announced.
        """
        self._client = client
        self._limits = client.limits
        self._reader: BodyReader = NO_BODY
        if head.chunked:
            self._reader = ChunkedReader(limit_bytes)
        elif head.content_length:
            self._reader = LengthReader(head.content_length, limit_bytes)
        self._continue_due = head.expect_continue
        self._started = False
        self.received_bytes = 0

    @property
    def done(self) -> bool:
        """True when the body has been read to its end."""
        return self._reader.done

    @property
    def awaits_continue(self) -> bool:
        """True while the client waits to be told that its body is wanted."""
        return self._continue_due

    @property
    def trailers(self) -> list[tuple[bytes, bytes]]:
        """The trailer fields of a chunked body that is done."""
        return self._reader.trailers

    async def pieces(self) -> list[bytes]:
        """Return the next payload pieces, at least one; none at the end.

        Raises:
            BadBody: the framing is broken or the body too large.
            ClientGone: the connection ended inside the body.
        """
        reader, client = self._reader, self._client
        while not reader.done:
            if self._started or not client.buffer:
                if self._continue_due:
                    self._continue_due = False
                    await client.send(CONTINUE)
                data = await self._receive()
            else:
                data, client.buffer = client.buffer, b""
                self._continue_due = False
            self._started = True
            pieces = reader.feed(data)
            if reader.done:
                client.buffer = reader.leftover
            if pieces:
                self.received_bytes += sum(map(len, pieces))
                return pieces
        return []

    async def read(self, limit_bytes: int) -> bytes | None:
        """Return the whole body, or None when it is longer than `limit_bytes`."""
        taken: list[bytes] = []
        while pieces := await self.pieces():
            taken += pieces
            if self.received_bytes > limit_bytes:
                return None
        return b"".join(taken)

    @property
    def too_long_to_drop(self) -> bool:
        """True where it is known that more is to come than is read behind an answer that did not wait for it."""
        return isinstance(self._reader, LengthReader) and self._reader.remaining > DISCARD_BYTES_MAX

    async def leave(self, *, reusable: bool) -> bool:
        """After the answer: drop what is left, so that the next request can be found, or that the answer arrives.

        Args:
            reusable: whether the connection goes on but for this body.

        Returns:
            Whether it does.
        """
        if self.done:
            return reusable
        if reusable and await self._drop_rest():
            return True
        await self._client.linger()
        return False

    async def _drop_rest(self) -> bool:
        if self._continue_due or self._client.gone:
            return False
        before = self.received_bytes
        with trio.move_on_after(DISCARD_SECONDS_MAX):  # a drain waits for it
            try:
                while await self.pieces():
                    if self.received_bytes - before > DISCARD_BYTES_MAX:
                        return False
            except (BadBody, ClientGone):
                return False
        return self.done

    async def _receive(self) -> bytes:
        client = self._client
        client.wait_for("request", self._limits.body_seconds)
        try:
            data = await client.wire.receive()
        except WireBroken as error:
            raise (ClientTooSlow if client.timed_out else ClientGone) from error
        if not data:
            raise ClientTooSlow if client.timed_out else ClientGone
        client.no_limit()
        return data
