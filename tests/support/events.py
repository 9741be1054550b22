"""A client of server-sent events that reads them as they come, over a real socket."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import attrs
import trio

from tests.support.client import BodyReader, ClosedEarly, Head, Wire, request_bytes

EVENT_SECONDS = 60.0
"""How long an event is waited for."""
PATH = "/api/usage/sse"


@attrs.frozen
class Told:
    """One event."""

    kind: str
    event_id: str | None
    data: dict[str, Any]


@attrs.define
class EventStream:
    """An open stream, as a browser's EventSource keeps it."""

    head: Head
    wire: Wire
    _body: BodyReader
    last_id: str | None = None
    retry: int | None = None
    """Milliseconds, as last told."""
    comments: int = 0
    _text: bytes = b""

    @property
    def status(self) -> int:
        """The answer's status."""
        return int(self.head.start[1])

    async def next(self) -> Told | None:
        """Return the next event, None at the stream's proper end.

        Raises:
            ClosedEarly: it was cut.
        """
        with trio.fail_after(EVENT_SECONDS):
            while True:
                while b"\n\n" not in self._text:
                    piece = await self._body.read()
                    if not piece:
                        return None
                    self._text += piece
                block, _, self._text = self._text.partition(b"\n\n")
                told = self._take(block.decode())
                if told is not None:
                    return told

    def _take(self, block: str) -> Told | None:
        kind, data = "message", ""
        for line in block.splitlines():
            name, _, text = line.partition(": ")
            if name == "id":
                self.last_id = text
            elif name == "event":
                kind = text
            elif name == "data":
                data += text
            elif name == "retry":
                self.retry = int(text)
            elif not name:
                self.comments += 1
        return Told(kind, self.last_id, json.loads(data)) if data else None

    async def expect(self, kind: str) -> Told:
        """Return the next event, which is of this kind."""
        told = await self.next()
        assert told is not None, f"the stream ended before {kind}"
        assert told.kind == kind, told
        return told

    async def usage(self, count: int) -> list[str]:
        """Return the ids of the next `count` calls."""
        found = []
        for _ in range(count):
            told = await self.expect("usage")
            assert told.event_id == told.data["id"]
            found.append(told.data["id"])
        return found

    async def problem(self) -> dict[str, Any]:
        """Return what was answered instead of a stream."""
        document: dict[str, Any] = json.loads(await self._body.read_all())
        return document


@asynccontextmanager
async def follow(
    port: int,
    headers: Mapping[str, str],
    last: str | None = None,
    path: str = PATH,
    method: str = "GET",
    receive_bytes: int | None = None,
) -> AsyncIterator[EventStream]:
    """Ask for a stream, for the length of the block.

    Args:
        receive_bytes: how much the system takes for a client that does not read, about.

    Raises:
        OSError, ClosedEarly: the service does not answer.
    """
    sent = [*headers.items(), *([] if last is None else [("Last-Event-ID", last)])]
    sock = trio.socket.socket()
    if receive_bytes is not None:
        sock.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, receive_bytes)
    async with trio.SocketStream(sock) as stream:
        await sock.connect(("127.0.0.1", port))
        wire = Wire(stream)
        try:
            await stream.send_all(request_bytes(method, path, sent))
        except trio.BrokenResourceError as error:
            raise ClosedEarly("the request was sent", b"", reset=True) from error
        with trio.fail_after(EVENT_SECONDS):
            head = await wire.head()
        yield EventStream(head, wire, BodyReader.of_response(wire, head, method), last)
