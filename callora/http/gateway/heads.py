"""Message heads: the bytes up to the empty line, parsed strictly, on both sides of the gateway.

Owns what a head means: request line or status line, fields, framing. Takes only what every reader of HTTP/1.x reads
the same way and refuses the rest, so that no upstream can see another message than the one that was billed. Nothing
is normalised: target, field names and values go on byte for byte. No I/O and no state; body bytes are `bodies`.

Where this is stricter than RFC 9112: no empty line before a request line, no absolute-form, upper-case methods only,
Content-Length without leading zeros, Host a plain name (no percent-encoding, no sub-delims), no other expectation
than 100-continue, no `Content_Length` or `Transfer_Encoding` with an underscore. See docs/decisions/0003.
"""

import re
from functools import lru_cache
from ipaddress import AddressValueError, IPv6Address
from typing import Final

import attrs

MAX_HEAD_BYTES: Final = 32768
"""A head, final empty line included."""
MAX_HEADERS: Final = 100
"""Field lines in a head."""
MAX_TARGET_BYTES: Final = 8192
"""A request target."""
MAX_CONTENT_LENGTH: Final = 2**53
"""The largest length that every upstream, JavaScript's included, reads as the same number."""

HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
"""Lower-case names of the fields that belong to one connection and are never passed on."""

_MAX_METHOD = 32
_MAX_LINE = _MAX_METHOD + MAX_TARGET_BYTES + len(b"  HTTP/1.1\r")

_TCHAR = rb"!#$%&'*+.^_`|~0-9A-Za-z-"
_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Z-]{1,32}) (/[!\"$-~]*+|\*) HTTP/1\.([01])\r\n")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: ([\t -~\x80-\xff]*+))?\r\n")
# Nearly every line is of the first form; one whose value ends with a blank or is empty needs the second. Possessive and
# atomic: a long run of blanks in a line that fails must cost one pass, not one pass a blank.
_PLAIN_FIELD = re.compile(rb"^([" + _TCHAR + rb"]++):[ \t]*+([^\r]*+)(?<![ \t])\r\n", re.MULTILINE)
_FIELD = re.compile(rb"^([" + _TCHAR + rb"]++):[ \t]*+((?>.*[^ \t\r\n]|))[ \t]*+\r\n", re.MULTILINE)
_TOKEN = re.compile(rb"[" + _TCHAR + rb"]+")
_FORBIDDEN = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?=[^\n])")
_METHOD_BEGUN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Z-]{1,32}(?:\Z| )")
_HOST = re.compile(rb"(?:[0-9A-Za-z._~-]{1,255}|\[([0-9A-Fa-f:.]{2,45})\])(?::([0-9]{1,5}))?")

_FIELD_OCTETS = bytes(octet for octet in range(256) if octet == 0x09 or (octet >= 0x20 and octet != 0x7F))
_FIELD_COUNTS = {b"\r\n" * (count + 2): count for count in range(MAX_HEADERS + 1)}
_METHODS = {name.encode(): name for name in ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")}
_NO_TOKENS: frozenset[bytes] = frozenset()
_CONNECTIONS = {
    b"keep-alive": frozenset({b"keep-alive"}),
    b"Keep-Alive": frozenset({b"keep-alive"}),
    b"close": frozenset({b"close"}),
    b"upgrade": frozenset({b"upgrade"}),
    b"Upgrade": frozenset({b"upgrade"}),
}
_ONCE_IN_REQUEST = frozenset({b"host", b"content-length", b"transfer-encoding", b"expect"})
_ONCE_IN_RESPONSE = frozenset({b"content-length", b"transfer-encoding"})
_NOT_AN_OPTION = frozenset({b"host", b"content-length", b"transfer-encoding"})


class BadHead(ValueError):
    """A head that is refused; nothing of the message was used and the connection must be closed after the answer.

    For a head from an upstream the status means nothing: the caller answers 502.
    """

    def __init__(self, message: str, status: int = 400, code: str = "BAD_REQUEST") -> None:
        super().__init__(message)
        self.status = status
        """400, 414 or 431; never 5xx."""
        self.code = code
        """The code of the error document: BAD_REQUEST, URI_TOO_LONG or REQUEST_HEADER_TOO_LARGE."""


@attrs.define(eq=False, repr=False)  # a head holds keys, which must not reach a log
class _Head:
    """What requests and responses share. Cheap to build: set once by the parser, read by everyone."""

    minor: int
    """0 or 1, of HTTP/1.x as sent."""
    fields: list[tuple[bytes, bytes]]
    """(name as sent, value without surrounding blanks), in order, repeated ones kept."""
    index: dict[bytes, bytes]
    """Lower-case name → its first value; unless `repeated`, its keys run parallel to `fields`."""
    repeated: bool
    """Whether some name stands on more than one line."""
    content_length: int | None
    """Bytes of body announced, 0..2**53; None where the field is absent."""
    chunked: bool
    """Whether the body is chunked; never together with `content_length`."""
    keep_alive: bool
    """Whether the sender lets the connection live after this message, by version and Connection."""
    connection_tokens: frozenset[bytes]
    """Lower-case members of Connection; fields of these names are not passed on."""

    def first(self, name_lower: bytes) -> bytes | None:
        """Return the first value of a field, or None; the name is given in lower case."""
        return self.index.get(name_lower)

    def values(self, name_lower: bytes) -> list[bytes]:
        """Return every value of a field in order; the name is given in lower case."""
        value = self.index.get(name_lower)
        if value is None:
            return []
        if not self.repeated:
            return [value]
        return [value for name, value in self.fields if name.lower() == name_lower]


@attrs.define(eq=False, repr=False)  # a head holds keys, which must not reach a log
class RequestHead(_Head):
    """The head of a request that can be read in one way only."""

    method: str
    """Upper case, as sent, at most 32 characters; never CONNECT."""
    target: bytes
    """Origin-form as sent (`/…`), or `*` with OPTIONS; visible ASCII without `#`."""
    path: bytes
    """The target before its first `?`, raw: dot segments, `//` and percent-encoding are as sent."""
    query: bytes | None
    """The target after its first `?`, raw; None where there is no `?`."""
    host: bytes | None
    """The Host field, validated; None only with HTTP/1.0."""
    expect_continue: bool
    """Whether the client waits for a 100 before it sends the body it announced."""
    upgrade: bool
    """Whether Upgrade is present and named in Connection."""


@attrs.define(eq=False, repr=False)  # a head holds keys, which must not reach a log
class ResponseHead(_Head):
    """The head of an upstream's response that can be read in one way only."""

    status: int
    """100..599."""
    reason: bytes
    """The phrase as sent; empty where there is none."""

    def bodiless(self, method: str) -> bool:
        """Return whether no body follows, whatever the fields say. Source: RFC 9112 §6.3.

        Args:
            method: of the request answered.
        """
        return self.status < 200 or self.status == 204 or self.status == 304 or method == "HEAD"


def find_head_end(buffer: bytes | bytearray, start: int = 0) -> int:
    """Return the index after a request head's empty line, or -1 while there is none.

    Args:
        buffer: begins with the head's first byte.
        start: where the search resumes: 0 at first, then `max(0, size before the last read - 3)`, so that a head
            that trickles in is searched once.

    Raises:
        BadHead: the bytes can never become a head that is taken (another protocol, HTTP/0.9, a bare line end, a
            control character) or they are past a limit, so that nobody waits for the rest.
    """
    end = buffer.find(b"\r\n\r\n", start)
    if 0 <= end <= MAX_HEAD_BYTES - 4:
        return end + 4
    if buffer:
        _refuse_hopeless(buffer, start)
    if end >= 0 or len(buffer) > MAX_HEAD_BYTES:
        raise _head_too_large()
    return -1


def find_response_head_end(buffer: bytes | bytearray, start: int = 0) -> int:
    """Return the index after a response head's empty line, or -1 while there is none.

    Args:
        buffer: begins with the head's first byte.
        start: as for `find_head_end`.

    Raises:
        BadHead: the bytes can never become a response head, or are past MAX_HEAD_BYTES.
    """
    end = buffer.find(b"\r\n\r\n", start)
    if 0 <= end <= MAX_HEAD_BYTES - 4:
        return end + 4
    if not b"HTTP/1.".startswith(buffer[:7]):
        raise BadHead("The upstream did not answer with HTTP/1.x.")
    if _FORBIDDEN.search(buffer, start) is not None:
        raise BadHead("The upstream's head has a control character or a line that does not end with CRLF.")
    if end >= 0 or len(buffer) > MAX_HEAD_BYTES:
        raise _head_too_large()
    return -1


def parse_request(head: bytes) -> RequestHead:
    """Return the request that the head states.

    Args:
        head: everything up to and including the empty line, and nothing after it.

    Raises:
        BadHead: the head breaks the grammar, is over a limit, or could be read in two ways.
    """
    line = _REQUEST_LINE.match(head)
    if line is None:
        raise _explain_request_line(head)
    raw_method, target, version = line.groups()
    if len(target) > MAX_TARGET_BYTES:
        raise _target_too_long()
    method = _METHODS.get(raw_method) or _uncommon_method(raw_method)
    if target == b"*" and method != "OPTIONS":
        raise BadHead("The target * is for OPTIONS only; send the path.")
    fields, index = _parse_fields(head, line.end())
    repeated = len(index) != len(fields)
    if repeated:
        _refuse_repeated(fields, _ONCE_IN_REQUEST)

    minor = 1 if version == b"1" else 0
    host = index.get(b"host")
    if host is not None:
        _check_host(host)
    elif minor:
        raise BadHead("The Host header is missing; HTTP/1.1 requires exactly one.")
    content_length, chunked = _framing(index, minor)
    tokens = _connection_tokens(index[b"connection"], fields, repeated) if b"connection" in index else _NO_TOKENS
    keep_alive = b"close" not in tokens and (minor == 1 or b"keep-alive" in tokens)
    expect_continue = False
    if b"expect" in index:
        expect_continue = _expects_continue(index[b"expect"]) and minor == 1 and (chunked or bool(content_length))
    path, mark, query = target.partition(b"?")
    return RequestHead(
        minor,
        fields,
        index,
        repeated,
        content_length,
        chunked,
        keep_alive,
        tokens,
        method,
        target,
        path,
        query if mark else None,
        host,
        expect_continue,
        b"upgrade" in tokens and b"upgrade" in index,
    )


def parse_response(head: bytes) -> ResponseHead:
    """Return the response that the head states.

    `keep_alive` is also false after a 204 that announces a body: whether bytes follow is a matter of opinion then.

    Args:
        head: everything up to and including the empty line, and nothing after it.

    Raises:
        BadHead: the head breaks the grammar, is over a limit, or could be read in two ways.
    """
    line = _STATUS_LINE.match(head)
    if line is None:
        raise BadHead("The upstream's status line is not HTTP/1.0 or HTTP/1.1 with a status of 100 to 599.")
    version, code, reason = line.groups()
    status = int(code)
    fields, index = _parse_fields(head, line.end())
    repeated = len(index) != len(fields)
    if repeated:
        _refuse_repeated(fields, _ONCE_IN_RESPONSE)
    minor = 1 if version == b"1" else 0
    content_length, chunked = _framing(index, minor)
    tokens = _connection_tokens(index[b"connection"], fields, repeated) if b"connection" in index else _NO_TOKENS
    keep_alive = b"close" not in tokens and (minor == 1 or b"keep-alive" in tokens)
    if status == 204 and (chunked or content_length):
        keep_alive = False
    return ResponseHead(
        minor, fields, index, repeated, content_length, chunked, keep_alive, tokens, status, reason or b""
    )


def parse_field_line(line: bytes) -> tuple[bytes, bytes]:
    """Return name and value of one field line, its CRLF included; trailers use it.

    Raises:
        BadHead: the line is not `name: value`.
    """
    match = _FIELD.fullmatch(line)
    if match is None or len(line.translate(None, _FIELD_OCTETS)) != 2:
        raise BadHead("A field line must be `name: value` without control characters.")
    name, value = match.groups()
    return name, value


def _parse_fields(head: bytes, start: int) -> tuple[list[tuple[bytes, bytes]], dict[bytes, bytes]]:
    """Return the fields, and lower-case name → first value.

    One proof covers every line: with the octets a line may hold taken out, what is left must be CR LF for each line;
    as many field lines were found as there are line ends; so each CR and each LF is the end of a line, and every
    line is a field.
    """
    count = _FIELD_COUNTS.get(head.translate(None, _FIELD_OCTETS))
    if count is None or not head.endswith(b"\r\n\r\n"):
        raise _explain_fields(head)
    fields: list[tuple[bytes, bytes]] = _PLAIN_FIELD.findall(head, start)
    if len(fields) != count:
        fields = _FIELD.findall(head, start)
        if len(fields) != count:
            raise _explain_fields(head)
    index = {name.lower(): value for name, value in fields}
    if len(index) != len(fields):
        for name, value in reversed(fields):
            index[name.lower()] = value
    return fields, index


def _framing(index: dict[bytes, bytes], minor: int) -> tuple[int | None, bool]:
    """Return (content length, chunked) of a head whose framing fields stand once. Source: RFC 9112 §6."""
    if b"content_length" in index or b"transfer_encoding" in index:
        # Gateways of the CGI family read `_` as `-`.
        raise BadHead("Content_Length and Transfer_Encoding are refused; spell framing headers with a hyphen.")
    length = index.get(b"content-length")
    if b"transfer-encoding" in index:
        coding = index[b"transfer-encoding"]
        if length is not None:
            raise BadHead("Content-Length and Transfer-Encoding were both sent; send one of them.")
        if coding.lower() != b"chunked":
            raise BadHead("Transfer-Encoding must be exactly `chunked`.")
        if minor == 0:
            raise BadHead("Transfer-Encoding does not exist in HTTP/1.0; send Content-Length or use HTTP/1.1.")
        return None, True
    if length is None:
        return None, False
    if not length.isdigit() or len(length) > 16 or (length[0] == 0x30 and len(length) > 1):
        raise BadHead("Content-Length must be one decimal number of at most 2^53, without sign or leading zeros.")
    announced = int(length)
    if announced > MAX_CONTENT_LENGTH:
        raise BadHead("Content-Length must be at most 2^53.")
    return announced, False


def _connection_tokens(value: bytes, fields: list[tuple[bytes, bytes]], repeated: bool) -> frozenset[bytes]:
    """Return the lower-case members of every Connection line."""
    if repeated:
        value = b",".join(value for name, value in fields if name.lower() == b"connection")
    tokens = _CONNECTIONS.get(value)
    if tokens is not None:
        return tokens
    # Empty list members are allowed to every recipient: RFC 9110 §5.6.1.2.
    tokens = frozenset(stripped.lower() for member in value.split(b",") if (stripped := member.strip(b" \t")))
    for token in tokens:
        if _TOKEN.fullmatch(token) is None:
            raise BadHead("Connection must be a comma-separated list of tokens.")
    if tokens & _NOT_AN_OPTION:
        # A hop that strips what Connection names would lose the framing.
        raise BadHead("Connection must not name Host, Content-Length or Transfer-Encoding.")
    return tokens


def _refuse_repeated(fields: list[tuple[bytes, bytes]], once: frozenset[bytes]) -> None:
    seen = set()
    for name, _ in fields:
        lower = name.lower()
        if lower in once:
            if lower in seen:
                raise BadHead(f"{lower.decode().title()} was sent more than once; send it once, even if equal.")
            seen.add(lower)


@lru_cache(maxsize=1024)
def _check_host(host: bytes) -> None:
    """Refuse a Host that is not a name, an IPv4 or a bracketed IPv6 address with an optional port.

    A pure rule, cached for the few hosts that are asked for; a refusal raises and so is never cached.
    """
    match = _HOST.fullmatch(host)
    if match is None:
        raise BadHead("Host must be a name or an address with an optional port, and nothing else.")
    address, port = match.groups()
    if port is not None and int(port) > 65535:
        raise BadHead("Host names a port past 65535.")
    if address is not None:
        try:
            IPv6Address(address.decode())
        except AddressValueError:
            raise BadHead("Host has brackets around something that is not an IPv6 address.") from None


def _expects_continue(value: bytes) -> bool:
    if value.lower() != b"100-continue":
        raise BadHead("The only expectation that can be met is 100-continue; leave Expect out.")
    return True


def _uncommon_method(raw: bytes) -> str:
    if raw == b"CONNECT":
        raise BadHead("CONNECT is not offered here; this is not a forward proxy.")
    return raw.decode("ascii")


def _refuse_hopeless(buffer: bytes | bytearray, start: int) -> None:
    """Refuse an unfinished request head that no further byte can mend; only bytes from `start` on are searched."""
    if _METHOD_BEGUN.match(buffer) is None:
        raise BadHead("A request must begin with an upper-case method and a space; this is not HTTP/1.x.")
    forbidden = _FORBIDDEN.search(buffer, start)
    if forbidden is not None:
        raise _forbidden_octet(forbidden.group())
    line_end = buffer.find(b"\n", start, _MAX_LINE + 1)
    if line_end >= 0:
        if _REQUEST_LINE.match(buffer) is None:
            raise _explain_request_line(bytes(buffer))
    elif len(buffer) > _MAX_LINE and buffer.find(b"\n", 0, _MAX_LINE + 1) < 0:
        raise _target_too_long()


def _explain_request_line(head: bytes) -> BadHead:
    """Return why a complete first line is refused."""
    line, _, _ = head.partition(b"\n")
    if not line.endswith(b"\r"):
        return _forbidden_octet(b"\n")
    line = line[:-1]
    if line.translate(None, _FIELD_OCTETS):
        return _forbidden_octet(line.translate(None, _FIELD_OCTETS)[:1])
    method, _, rest = line.partition(b" ")
    if len(method) > _MAX_METHOD or _TOKEN.fullmatch(method) is None or method != method.upper():
        return BadHead("The request must begin with an upper-case method of at most 32 characters and one space.")
    if method == b"CONNECT":
        return BadHead("CONNECT is not offered here; this is not a forward proxy.")
    target, gap, version = rest.rpartition(b" ")
    if not gap or not version.startswith(b"HTTP/"):
        return BadHead("The request line must end with one space and HTTP/1.1; HTTP/0.9 is not spoken.")
    if version not in (b"HTTP/1.1", b"HTTP/1.0"):
        return BadHead("Only HTTP/1.1 and HTTP/1.0 are spoken on this port.")
    if len(target) > MAX_TARGET_BYTES:
        return _target_too_long()
    if not target.startswith((b"/", b"*")):
        return BadHead("The target must be a path that begins with `/`; send the host in Host, not here.")
    return BadHead("The target may hold visible ASCII without `#` only; percent-encode the rest.")


def _explain_fields(head: bytes) -> BadHead:
    """Return why the lines after the first are refused."""
    forbidden = _FORBIDDEN.search(head)
    if forbidden is not None:
        return _forbidden_octet(forbidden.group())
    if head.count(b"\n") > MAX_HEADERS + 2:
        return BadHead(f"More than {MAX_HEADERS} headers were sent; send fewer.", 431, "REQUEST_HEADER_TOO_LARGE")
    if b"\r\n " in head or b"\r\n\t" in head:
        return BadHead("A header was folded over two lines; send it on one.")
    if head.find(b"\r\n\r\n") != len(head) - 4:
        return BadHead("The head must end with its first empty line.")
    return BadHead("Every header must be `name: value`, the name a token with no blank before the colon.")


def _forbidden_octet(octet: bytes) -> BadHead:
    if octet in (b"\r", b"\n"):
        return BadHead("A carriage return or line feed stands alone; every line must end with CRLF.")
    return BadHead("The head has a control character; remove it.")


def _target_too_long() -> BadHead:
    return BadHead(f"The target is longer than {MAX_TARGET_BYTES} bytes; move data to the body.", 414, "URI_TOO_LONG")


def _head_too_large() -> BadHead:
    return BadHead(
        f"The head is longer than {MAX_HEAD_BYTES} bytes; send fewer or shorter headers.",
        431,
        "REQUEST_HEADER_TOO_LARGE",
    )
