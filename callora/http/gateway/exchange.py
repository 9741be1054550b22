"""One request passed on to an upstream and its answer passed back, step by step, with back-pressure both ways.

The steps are separate so that the call flow can stand between them: the answer's head is read, the call is captured,
and only then is anything of the answer released. Nothing here knows of money.
"""

from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import Final

import trio

from callora.http.gateway.bodies import (
    BadBody,
    BodyReader,
    ChunkedReader,
    EofReader,
    LengthReader,
    encode_chunk,
    encode_last_chunk,
)
from callora.http.gateway.client import NO_BODY, ClientConnection, ClientGone, ClientTooSlow, RequestBody
from callora.http.gateway.heads import BadHead, RequestHead, ResponseHead, find_response_head_end, parse_response
from callora.http.gateway.rewriting import end_to_end_lines, interim_head
from callora.http.gateway.splicing import SPLICE_BYTES_MIN, SourceEnded, splice_body
from callora.http.gateway.tolls import Toll
from callora.http.gateway.upstream import Pool, UpstreamConnection
from callora.http.gateway.wire import PlainWire, WireBroken

SMALL_BODY_BYTES: Final = 65_536
"""A request body of announced length up to this is read whole and sent together with its head."""


REMEMBERED_HEAD_BYTES_MAX: Final = 1024


@lru_cache(maxsize=512)
def _remembered(head: bytes) -> tuple[ResponseHead, bytes]:
    """Parse an answer's head and what of it goes on; within a second most answers of an upstream begin alike."""
    answer = parse_response(head)
    return answer, end_to_end_lines(answer)


def _parsed(head: bytes) -> tuple[ResponseHead, bytes]:
    # A cookie is somebody's secret, and not likely to come twice.
    if len(head) > REMEMBERED_HEAD_BYTES_MAX or b"ookie" in head:
        return _remembered.__wrapped__(head)
    return _remembered(head)


class UpstreamFailed(Exception):
    """The upstream broke off, or answered what is not HTTP, before its answer's head was complete."""


class UpstreamTimedOut(Exception):
    """The upstream was silent for too long before its answer's head was complete."""


class AnswerCut(Exception):
    """The answer broke off after its head was released: only closing the connection tells the client."""


class Exchange:
    """One request and its answer."""

    __slots__ = (
        "_bodiless",
        "_body",
        "_client",
        "_connect_seconds",
        "_connection",
        "_idle_seconds",
        "_message",
        "_pieces",
        "_pool",
        "_reader",
        "_request",
        "_request_sent",
        "_sending_fault",
        "_sending_seconds",
        "answer",
        "lines",
        "response_bytes",
    )

    answer: ResponseHead
    """The answer's head, once `read_head` has returned."""
    lines: bytes
    """Its header lines that go on to the client."""

    def __init__(self, client: ClientConnection, request: RequestHead, body: RequestBody, idle_seconds: float) -> None:
        """Args:
        idle_seconds: how long the upstream may be silent inside its answer's body.
        """
        self._client = client
        self._request = request
        self._body = body
        self._idle_seconds = idle_seconds
        self._connection: UpstreamConnection | None = None
        self._reader: BodyReader = NO_BODY
        self._pieces: list[bytes] = []
        self._request_sent = False
        self._sending_fault: Exception | None = None
        self.response_bytes = 0

    @property
    def streams_request(self) -> bool:
        """True when the request's body is passed on as it arrives, beside the answer."""
        return not self._body.done and (self._request.chunked or (self._request.content_length or 0) > SMALL_BODY_BYTES)

    async def send(
        self, pool: Pool, head: bytes, whole_body: bytes, connect_seconds: float, sending_seconds: float
    ) -> None:
        """Send the request's head with what there is of its body; where that is all of it, together with others' soon.

        It is sent a second time, from here or from `read_head`, only when a kept connection took not one byte of it.

        Args:
            whole_body: the body where it was read before; a small one that was not is read here.

        Raises:
            ConnectFailed, PoolExhausted, TargetBlocked, TargetUnresolved: nothing was sent.
            UpstreamFailed, UpstreamTimedOut: something may have been sent.
            ClientGone, BadBody: the request is not complete and will not be.
        """
        if not self._body.done and not self.streams_request:
            pieces = [whole_body]
            while more := await self._body.pieces():
                pieces += more
            whole_body = b"".join(pieces)
        if self._request.chunked and not self.streams_request:
            # It was read whole before, and is announced to the upstream as it was announced to us.
            whole_body = encode_chunk([whole_body]) + encode_last_chunk(self._body.trailers)
        self._pool, self._connect_seconds, self._sending_seconds = pool, connect_seconds, sending_seconds
        self._message = head + whole_body if whole_body else head
        await self._send_message()
        self._request_sent = not self.streams_request

    async def _send_message(self) -> None:
        pool, message = self._pool, self._message
        while True:
            connection = pool.take_idle() or await pool.open(self._connect_seconds)
            self._connection = self._client.upstream = connection
            if self._client.gone:
                raise ClientGone
            self._client.wait_for("upstream", self._sending_seconds)
            if not self.streams_request and connection.wire.send_soon(message):
                return
            try:
                await connection.wire.send(message)
                return
            except WireBroken as error:
                if not (connection.reused and error.sent_nothing and not self._client.gone):
                    raise self._fault(error) from error
                self.drop()

    async def read_head(self, answer_seconds: float) -> None:
        """Read the answer's head, passing interim answers on.

        Raises:
            UpstreamFailed, UpstreamTimedOut, ClientGone, BadBody.
            ConnectFailed, PoolExhausted, TargetBlocked, TargetUnresolved: a kept connection took nothing, and there is
                no other.
        """
        connection = self._connection
        assert connection is not None
        if self._request_sent:
            self._client.wait_for("upstream", answer_seconds)
        buffer = b""
        start = 0
        while True:
            broken: WireBroken | None = None
            try:
                data = await connection.wire.receive()
            except WireBroken as error:
                data, broken = b"", error
            if not data or connection.wire.took_nothing:  # with which whatever it says is no answer
                connection = await self._send_again(connection, broken)
                self._client.wait_for("upstream", answer_seconds)
                continue
            buffer += data
            try:
                while buffer and (end := find_response_head_end(buffer, start)) >= 0:
                    answer, lines = _parsed(buffer[:end])
                    buffer = buffer[end:]
                    start = 0
                    if answer.status >= 200:
                        self._client.no_limit()
                        self.lines = lines
                        self._accept(answer, buffer)
                        return
                    await self._pass_interim(answer)
            except (BadHead, BadBody) as error:
                raise UpstreamFailed(str(error)) from error
            start = max(0, len(buffer) - 3)

    async def _send_again(self, connection: UpstreamConnection, broken: WireBroken | None) -> UpstreamConnection:
        """Send the request anew where a kept connection took nothing of it; else raise whose fault it is."""
        client = self._client
        if not (connection.reused and connection.wire.took_nothing) or client.gone or client.timed_out:
            raise self._fault(broken) from broken
        self.drop()
        client.no_limit()
        await self._send_message()
        assert self._connection is not None
        return self._connection

    async def read_body(self, limit_bytes: int) -> bytes | None:
        """Read the answer's whole body before anything is released; None when it is longer than `limit_bytes`.

        What was read is kept for `release`.

        Raises:
            UpstreamFailed, UpstreamTimedOut, ClientGone, BadBody: nothing was released.
        """
        while not self._reader.done and self.response_bytes <= limit_bytes:
            try:
                self._pieces += await self._next_pieces()
            except AnswerCut as error:
                raise self._fault(None) from error
        return b"".join(self._pieces) if self.response_bytes <= limit_bytes else None

    async def release(self, head: bytes, *, closing: bool) -> bool:
        """Send the answer's head, then its body as it arrives.

        Args:
            closing: the head says that the connection ends with this answer.

        Returns:
            Whether the client's connection may carry another request.

        Raises:
            ClientGone: the client left.
            AnswerCut: the upstream broke off; the client's connection must be closed.
        """
        client, reader = self._client, self._reader
        chunked = self.chunks_answer
        pieces, self._pieces = self._pieces, []
        block = head + self._framed(pieces, chunked) if pieces else head
        while not reader.done:
            if block:
                await client.send(block)
            if isinstance(reader, LengthReader) and await self._splice(reader):
                block = b""
                break
            pieces = await self._next_pieces()
            block = self._framed(pieces, chunked)
        if chunked:
            block += encode_last_chunk(reader.trailers)
        reusable = not closing and self._reusable
        if block:
            if reusable:
                await client.send_last(block)
            else:
                await client.send(block)
        self._finish()
        return reusable and not client.gone

    async def release_metered(self, head: bytes, toll: Toll) -> bool:
        """Send the answer's head, then of its body what its toll lets pass; what has passed is charged before the end.

        Returns:
            Whether the client's connection may carry another request.

        Raises:
            ClientGone: the client left.
            AnswerCut: the upstream broke off, or the toll ended what has no other end to be told by; the client's
                connection must be closed.
            StoreUnavailable, OutcomeUnknown: the same, by the toll.
        """
        client, reader, answer = self._client, self._reader, self.answer
        chunked = self.chunks_answer
        pieces, self._pieces = self._pieces, []
        block = head
        while True:
            passed = await toll.pass_on(b"".join(pieces))
            if passed:
                block += self._framed([passed], chunked)
            if reader.done or toll.ended is not None:
                break
            if block:
                await client.send(block)
                toll.sent()
                block = b""
            pieces = await self._next_pieces()
        trailers = await toll.close()
        if toll.ended is None:
            if chunked:
                block += encode_last_chunk([*reader.trailers, *trailers])
            if block:
                await client.send(block)
            self._finish()
            return self._reusable and not client.gone
        told = toll.event_stream and answer.content_length is None
        if told:
            block += self._framed([toll.last_words()], chunked)
            if chunked:
                block += encode_last_chunk(trailers)
        if block:
            await client.send(block)
        self.drop()
        if not told:
            raise AnswerCut
        return self._request.keep_alive and chunked and not client.gone

    @property
    def _reusable(self) -> bool:
        """True when the client can tell where this answer ends; it may have something of its request left to send."""
        return self._request.keep_alive and (
            self._request.minor == 1 or self.answer.content_length is not None or self._bodiless
        )

    @property
    def bodiless(self) -> bool:
        """True when the answer has no body, whatever length its head announces."""
        return self._bodiless

    @property
    def chunks_answer(self) -> bool:
        """True when the answer's body goes to the client in chunks."""
        return self._request.minor == 1 and not self._bodiless and self.answer.content_length is None

    @property
    def ends_by_close(self) -> bool:
        """True when only closing the connection tells an HTTP/1.0 client where the answer ends."""
        return self._request.minor == 0 and not self._bodiless and self.answer.content_length is None

    async def while_sending(
        self, flow: Callable[[], Awaitable[bool]], answer_seconds: float, beside: Callable[[], Awaitable[None]]
    ) -> bool:
        """Run the rest of the call while the request's body is passed on; its result is the result.

        An upstream may answer before it has read everything, and may need its answer read before it reads on.
        """
        fault: Exception | None = None
        result = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_body, answer_seconds)
            nursery.start_soon(beside)
            try:
                result = await flow()
            except Exception as error:  # taken out of the nursery as it is, not in a group
                fault = error
            nursery.cancel_scope.cancel()
        if fault is not None:
            raise fault
        return result

    def drop(self) -> None:
        """Close the upstream connection, whatever it is in the middle of. Idempotent."""
        connection, self._connection = self._connection, None
        self._client.upstream = None
        if connection is not None:
            connection.pool.discard(connection)

    def _accept(self, answer: ResponseHead, rest: bytes) -> None:
        self.answer = answer
        self._bodiless = answer.bodiless(self._request.method)
        if self._bodiless:
            self._reader = LengthReader(0)
        elif answer.chunked:
            self._reader = ChunkedReader(response=True)
        elif answer.content_length is not None:
            self._reader = LengthReader(answer.content_length)
        else:
            self._reader = EofReader()
        if rest:
            self._pieces = self._reader.feed(rest)
            self.response_bytes = sum(map(len, self._pieces))

    async def _pass_interim(self, answer: ResponseHead) -> None:
        """Pass a 1xx on. 100 is ours to give, and 101 answers an upgrade nobody asked for."""
        if answer.status == 101:
            raise UpstreamFailed("the upstream switched protocols unasked")
        if answer.status != 100 and self._request.minor == 1:
            client = self._client
            side, deadline = client.waiting_for, client.deadline
            await client.send(interim_head(answer))
            client.waiting_for, client.deadline = side, deadline  # an interim answer buys no time for the final one

    async def _next_pieces(self) -> list[bytes]:
        """Return the next pieces of the answer's body, perhaps none.

        Raises:
            AnswerCut: the upstream broke off or broke its framing. ClientGone: the client did.
        """
        connection, client = self._connection, self._client
        assert connection is not None
        client.wait_for("upstream", self._idle_seconds)
        try:
            data = await connection.wire.receive()
            client.no_limit()
            if data:
                pieces = self._reader.feed(data)
            else:
                if client.gone or client.timed_out:
                    raise AnswerCut
                self._reader.end()
                pieces = []
        except (WireBroken, BadBody) as error:
            raise AnswerCut from error
        self.response_bytes += sum(map(len, pieces))
        return pieces

    async def _splice(self, reader: LengthReader) -> bool:
        """Move a long rest of the answer's body inside the kernel, where both sides are plain sockets."""
        connection, length = self._connection, reader.remaining
        assert connection is not None
        source = connection.wire
        if length < SPLICE_BYTES_MIN or not (
            isinstance(source, PlainWire) and isinstance(self._client.wire, PlainWire)
        ):
            return False
        try:
            await splice_body(source, self._client, length, self._idle_seconds)
        except SourceEnded as error:
            raise (ClientGone if self._client.gone else AnswerCut) from error
        self.response_bytes += length
        reader.finish()
        return True

    def _framed(self, pieces: list[bytes], chunked: bool) -> bytes:
        if chunked:
            return encode_chunk(pieces)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _finish(self) -> None:
        """Keep the upstream connection when it is between messages, else close it."""
        connection = self._connection
        assert connection is not None
        clean = (
            self._request_sent
            and self.answer.keep_alive
            and not connection.wire.sending
            and not self._reader.leftover
            and not isinstance(self._reader, EofReader)
        )
        if not clean:
            self.drop()
            return
        self._connection = self._client.upstream = None
        connection.pool.give_back(connection)

    async def _send_body(self, answer_seconds: float) -> None:
        connection = self._connection
        assert connection is not None
        client, chunked = self._client, self._request.chunked
        try:
            while pieces := await self._body.pieces():
                client.wait_for("upstream", answer_seconds)
                await connection.wire.send(self._framed(pieces, chunked))
                client.no_limit()
            if chunked:
                await connection.wire.send(encode_last_chunk(self._body.trailers))
        except (ClientGone, BadBody) as error:
            self._sending_fault = error
            connection.wire.abort()
        except WireBroken:
            return  # the upstream takes no more; what it answers, if anything, is read elsewhere
        else:
            self._request_sent = True
            client.wait_for("upstream", answer_seconds)

    def _fault(self, error: Exception | None) -> Exception:
        """Return whose fault it is that the upstream connection ended."""
        if self._sending_fault is not None:
            return self._sending_fault
        if self._client.gone:
            return ClientTooSlow() if self._client.timed_out else ClientGone()
        if self._client.timed_out:
            return UpstreamTimedOut()
        return UpstreamFailed(str(error) if error is not None else "the upstream closed without an answer")
