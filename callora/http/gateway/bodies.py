"""Message bodies: bytes in, payload pieces out, for each of the three framings of HTTP/1.x; and chunked encoding.

Owns where a body ends. Every reader has the same face: `feed` what arrived, take the pieces, look at `done`; what came
after the body is `leftover`. No I/O; back-pressure is the caller's, who feeds no more than it can pass on. A reader
that has raised stays refused.

Chunked bodies are read strictly: a size of 1 to 16 hexadecimal digits, extensions of visible ASCII and spaces
(dropped), CRLF only. A flood of tiny chunks is bounded by one rule: what is not payload may be at most 64 KiB plus
16 bytes for each payload byte, so 1-byte chunks pass and 1-byte chunks with extensions of 250 bytes do not.
"""

import re
from collections.abc import Iterable
from typing import Final, Protocol

from callora.http.gateway.heads import HOP_BY_HOP, MAX_HEADERS, BadHead, parse_field_line

MAX_CHUNK_BYTES: Final = 2**53
MAX_EXTENSION_BYTES: Final = 256
"""Extensions of one chunk, the semicolon included."""
MAX_TRAILER_BYTES: Final = 8192
"""All trailer lines with their line ends."""
FREE_OVERHEAD_BYTES: Final = 65536
OVERHEAD_RATIO: Final = 16
"""Size lines and line ends may be FREE_OVERHEAD_BYTES + OVERHEAD_RATIO * payload bytes."""

FORBIDDEN_TRAILERS: Final = HOP_BY_HOP | {
    b"age",
    b"authorization",
    b"cache-control",
    b"content-encoding",
    b"content-length",
    b"content-range",
    b"content-type",
    b"cookie",
    b"date",
    b"expect",
    b"expires",
    b"forwarded",
    b"host",
    b"idempotency-key",
    b"if-match",
    b"if-modified-since",
    b"if-none-match",
    b"if-range",
    b"if-unmodified-since",
    b"location",
    b"max-forwards",
    b"pragma",
    b"range",
    b"retry-after",
    b"set-cookie",
    b"vary",
    b"www-authenticate",
    b"x-api-key",
    b"x-real-ip",
    b"x-request-id",
}
"""Framing, routing, authentication and the like, which are decided before the body. Source: RFC 9110 §6.5.1."""
_FORBIDDEN_TRAILER_PREFIXES: Final = (b"x-forwarded-", b"x-callora-")

_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(;[ -~]{0,255}+)?\r\n")
_SIZE_LINE_BEGUN = re.compile(rb"[0-9A-Fa-f]{1,16}(?:;[ -~]{0,255}+)?\r?")
_MAX_SIZE_LINE = 16 + MAX_EXTENSION_BYTES + 2

# The states of a ChunkedReader.
_SIZE, _DATA, _DATA_END, _TRAILER, _DONE = range(5)


class BadBody(ValueError):
    """A body that breaks its framing; pieces already taken were good, the connection is of no more use."""

    status = 400
    """For a client's body; for an upstream's the caller breaks off the answer."""
    code = "BAD_REQUEST"


class BodyTooLarge(BadBody):
    """A body past the limit given; no byte past the limit was handed out."""

    status = 413
    code = "REQUEST_BODY_TOO_LARGE"


class BodyCutShort(BadBody):
    """The stream ended inside the body."""


class BodyReader(Protocol):
    """What the three readers have in common."""

    @property
    def done(self) -> bool:
        """Whether the body is complete."""

    @property
    def leftover(self) -> bytes:
        """The bytes that came after the body: the beginning of the next message, or what must not be there."""

    @property
    def trailers(self) -> list[tuple[bytes, bytes]]:
        """The trailer fields of a complete chunked body, in order; empty otherwise."""

    def feed(self, data: bytes | memoryview) -> list[bytes]:
        """Return the payload in `data`, no piece empty; after `done` all goes to `leftover`.

        Raises:
            BadBody: the framing is broken, or the limit passed.
        """

    def end(self) -> None:
        """Tell that the stream has ended.

        Raises:
            BodyCutShort: the body was not complete.
        """


class LengthReader:
    """Reads a body of announced length."""

    __slots__ = ("_remaining", "done", "leftover", "trailers")

    def __init__(self, length: int, limit: int | None = None) -> None:
        """Args:
            length: bytes announced, >= 0; a body of 0 bytes is done at once.
            limit: bytes allowed, or None.

        Raises:
            BodyTooLarge: the length is past the limit.
        """
        if limit is not None and length > limit:
            raise _too_large(limit)
        self._remaining = length
        self.done = length == 0
        self.leftover = b""
        self.trailers: list[tuple[bytes, bytes]] = []

    @property
    def remaining(self) -> int:
        """Bytes that are still to come."""
        return self._remaining

    def finish(self) -> None:
        """Note that the rest was moved on without being fed."""
        self._remaining = 0
        self.done = True

    def feed(self, data: bytes | memoryview) -> list[bytes]:
        """Return the payload in `data`."""
        if self.done:
            self.leftover += data
            return []
        if len(data) < self._remaining:
            self._remaining -= len(data)
            return [_as_bytes(data)] if data else []
        piece = _as_bytes(data[: self._remaining])
        self.leftover = _as_bytes(data[self._remaining :])
        self._remaining = 0
        self.done = True
        return [piece]

    def end(self) -> None:
        """Tell that the stream has ended."""
        if not self.done:
            raise BodyCutShort(f"The body ended {self._remaining} bytes short of its Content-Length.")


class EofReader:
    """Reads a response body that lasts until the upstream closes; a request never has one."""

    __slots__ = ("_limit", "_received", "done", "leftover", "trailers")

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._received = 0
        self.done = False
        self.leftover = b""
        self.trailers: list[tuple[bytes, bytes]] = []

    def feed(self, data: bytes | memoryview) -> list[bytes]:
        """Return the payload in `data`, which is all of it."""
        if self.done:
            self.leftover += data
            return []
        self._received += len(data)
        if self._limit is not None and self._received > self._limit:
            raise _too_large(self._limit)
        return [_as_bytes(data)] if data else []

    def end(self) -> None:
        """Tell that the stream has ended, which completes the body."""
        self.done = True


class ChunkedReader:
    """Reads a chunked body. Source: RFC 9112 §7.1, without what two readers could see differently."""

    __slots__ = (
        "_held",
        "_limit",
        "_overhead",
        "_payload",
        "_refused",
        "_remaining",
        "_response",
        "_state",
        "_trailer_bytes",
        "leftover",
        "trailers",
    )

    def __init__(self, limit: int | None = None, response: bool = False) -> None:
        """Args:
        limit: decoded bytes allowed, or None.
        response: whether an upstream sends it; trailers that decide what is decided already are then dropped,
            where a request is refused for them.
        """
        self._limit = limit
        self._response = response
        self._state = _SIZE
        self._held = b""  # the beginning of a line whose end has not arrived
        self._remaining = 0
        self._payload = 0
        self._overhead = 0
        self._trailer_bytes = 0
        self._refused: BadBody | None = None
        self.leftover = b""
        self.trailers: list[tuple[bytes, bytes]] = []

    @property
    def done(self) -> bool:
        """Whether the last chunk and its trailers were read."""
        return self._state == _DONE

    def feed(self, data: bytes | memoryview) -> list[bytes]:
        """Return the payload in `data`, one piece for each chunk that it touches."""
        if self._refused is not None:
            raise self._refused
        try:
            return self._read(data)
        except BadBody as refusal:
            self._refused = refusal
            raise

    def end(self) -> None:
        """Tell that the stream has ended."""
        if self._state != _DONE:
            raise BodyCutShort("The body ended before its last chunk.")

    def _read(self, data: bytes | memoryview) -> list[bytes]:
        pieces: list[bytes] = []
        position = 0
        if self._held:  # at most one line's worth, so joining costs little unless the line trickles in
            data = self._held + data
            self._held = b""
        size = len(data)
        while position < size:
            if self._state == _DATA:
                stop = min(size, position + self._remaining)
                pieces.append(_as_bytes(data if stop - position == size else data[position:stop]))
                self._remaining -= stop - position
                position = stop
                if self._remaining == 0:
                    self._state = _DATA_END
            elif self._state == _SIZE:
                line = _SIZE_LINE.match(data, position)
                if line is None:
                    if _SIZE_LINE_BEGUN.fullmatch(data, position) is None:
                        raise BadBody("A chunk must begin with a hexadecimal size, extensions of 256 bytes, and CRLF.")
                    self._held = bytes(data[position:])
                    break
                self._begin_chunk(int(line[1], 16), line.end() - position)
                position = line.end()
            elif self._state == _DATA_END:
                stop = min(size, position + 2)
                line_end = bytes(data[position:stop])
                if not b"\r\n".startswith(line_end):
                    raise BadBody("A chunk's data must be followed by CRLF; its size is wrong.")
                if len(line_end) == 1:
                    self._held = line_end
                    break
                position = stop
                self._state = _SIZE
            elif self._state == _TRAILER:
                position = self._read_trailer(data, position)
                if self._held:
                    break
            else:
                self.leftover += data[position:]
                break
        return pieces

    def _begin_chunk(self, length: int, line_bytes: int) -> None:
        if length == 0:
            self._state = _TRAILER
            return
        if length > MAX_CHUNK_BYTES:
            raise BadBody("A chunk's size must be at most 2^53.")
        self._payload += length
        if self._limit is not None and self._payload > self._limit:
            raise _too_large(self._limit)
        # The payload is counted as announced: a chunk that never comes buys no further lines.
        self._overhead += line_bytes + 2
        if self._overhead > FREE_OVERHEAD_BYTES + OVERHEAD_RATIO * self._payload:
            raise BadBody("The body is nearly all chunk headers; send larger chunks without extensions.")
        self._remaining = length
        self._state = _DATA

    def _read_trailer(self, data: bytes | memoryview, position: int) -> int:
        """Return the index after the next trailer line; without one, hold what there is of it."""
        room = MAX_TRAILER_BYTES - self._trailer_bytes
        begun = bytes(data[position : position + room + 2])  # the empty line is not counted
        line_end = begun.find(b"\n")
        if begun[:2] == b"\r\n":
            self._state = _DONE
            return position + 2
        if line_end < 0 and len(begun) < room + 2:
            self._held = begun
            return position
        line = begun[: line_end + 1]
        if line_end < 0 or len(line) > room or len(self.trailers) >= MAX_HEADERS:
            raise BadBody(f"The trailers are longer than {MAX_TRAILER_BYTES} bytes or more than {MAX_HEADERS}.")
        self._trailer_bytes += len(line)
        try:
            name, value = parse_field_line(line)
        except BadHead as refusal:
            raise BadBody(f"A trailer is malformed. {refusal}") from None
        lower = name.lower().replace(b"_", b"-")
        if lower not in FORBIDDEN_TRAILERS and not lower.startswith(_FORBIDDEN_TRAILER_PREFIXES):
            self.trailers.append((name, value))
        elif not self._response:
            raise BadBody("A trailer must not carry framing, routing, authentication or caching; send it as a header.")
        return position + len(line)


def encode_chunk(pieces: Iterable[bytes]) -> bytes:
    """Return one chunk that carries all pieces; nothing for no payload, since an empty chunk would end the body."""
    payload = b"".join(pieces)
    return b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b""


def encode_last_chunk(trailers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the end of a chunked body with these trailers, which a reader has taken as good."""
    return b"".join((b"0\r\n", *(b"%b: %b\r\n" % trailer for trailer in trailers), b"\r\n"))


def _as_bytes(data: bytes | memoryview) -> bytes:
    return data if type(data) is bytes else bytes(data)


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body is longer than the {limit} bytes allowed; send less or split it.")
