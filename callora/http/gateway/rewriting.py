"""Heads on their way through: what is taken out, what is put in, everything else byte for byte.

Taken out of a request: what belongs to one connection, what names another client, Host, the API key, cookies. Taken out
of an answer: what belongs to one connection and what only Callora may say.
"""

from collections.abc import Mapping, Set
from typing import Final

from callora.http.gateway.heads import HOP_BY_HOP, RequestHead, ResponseHead

_NOT_FORWARDED: Final = HOP_BY_HOP | {
    b"host",
    b"x-api-key",
    b"cookie",
    b"forwarded",
    b"x-real-ip",
    b"x-request-id",
    b"x-callora-max-charge",  # what a caller would pay is not what he is to be charged
    b"content-length",
    b"expect",
}
_CREDENTIALS: Final = frozenset({b"x-api-key", b"cookie"})
_NOT_RETURNED: Final = HOP_BY_HOP | {
    b"content-length",
    b"x-request-id",
    b"x-ratelimit-limit",
    b"x-ratelimit-remaining",
    b"x-ratelimit-reset",
    b"ratelimit",
    b"ratelimit-policy",
    b"idempotent-replayed",
}
_BODY_LENGTH: Final = HOP_BY_HOP | {b"content-length"}
_OURS: Final = b"x-callora-"
_FORWARDED: Final = b"x-forwarded-"
_REASONS: Final[Mapping[int, bytes]] = {
    200: b"OK",
    400: b"Bad Request",
    401: b"Unauthorized",
    402: b"Payment Required",
    403: b"Forbidden",
    404: b"Not Found",
    408: b"Request Timeout",
    409: b"Conflict",
    413: b"Content Too Large",
    414: b"URI Too Long",
    429: b"Too Many Requests",
    431: b"Request Header Fields Too Large",
    500: b"Internal Server Error",
    502: b"Bad Gateway",
    503: b"Service Unavailable",
    504: b"Gateway Timeout",
}


def _lines(head: RequestHead | ResponseHead, dropped: Set[bytes], prefix: bytes) -> list[bytes]:
    if head.connection_tokens:
        dropped = dropped | head.connection_tokens
    names = head.index if not head.repeated else [name.lower() for name, _ in head.fields]
    return [
        b"%b: %b\r\n" % field
        for lower, field in zip(names, head.fields, strict=True)
        if lower not in dropped and not lower.startswith(prefix)
    ]


def upstream_head(
    request: RequestHead,
    *,
    path: bytes,
    authority: bytes,
    request_id: bytes,
    configured: Mapping[str, str],
    key_in_authorization: bool,
    keep_cookies_and_keys: bool = False,
) -> bytes:
    """Return the head that the upstream sees.

    Args:
        path: the target's path on the upstream, without the query, which goes on as it came.
        configured: the developer's header fields, which replace the client's of the same name.
        key_in_authorization: whether Authorization carried the API key; else it is the upstream's business.
        keep_cookies_and_keys: True towards Callora's own REST server, to which they are addressed.
    """
    dropped = _NOT_FORWARDED
    if keep_cookies_and_keys:
        dropped = _NOT_FORWARDED - _CREDENTIALS
    elif key_in_authorization:
        dropped = _NOT_FORWARDED | {b"authorization"}
    if configured:
        dropped |= {name.lower().encode("ascii") for name in configured}
    query = b"" if request.query is None else b"?" + request.query
    lines = [b"%b %b%b HTTP/1.1\r\nHost: %b\r\n" % (request.method.encode("ascii"), path, query, authority)]
    lines += _lines(request, dropped, _FORWARDED)
    if configured:
        lines += [f"{name}: {value}\r\n".encode("latin-1") for name, value in configured.items()]
    if request.chunked:
        lines.append(b"Transfer-Encoding: chunked\r\n")
    elif request.content_length is not None:
        lines.append(b"Content-Length: %d\r\n" % request.content_length)
    lines.append(b"X-Request-Id: %b\r\n\r\n" % request_id)
    return b"".join(lines)


def end_to_end_lines(answer: ResponseHead, *, keep_own: bool = False) -> bytes:
    """Return the answer's header lines that go on to the client, without those of the body's length.

    Args:
        keep_own: True for answers of Callora's own REST server, which may say what only Callora may say.
    """
    if keep_own:
        return b"".join(_lines(answer, _BODY_LENGTH, b"\0"))
    return b"".join(_lines(answer, _NOT_RETURNED, _OURS))


def answer_head(
    status: int, reason: bytes, lines: bytes, *, length: int | None, chunked: bool, own: bytes, close: bool
) -> bytes:
    """Return the head of an answer to the client.

    Args:
        lines: header lines that end with CRLF.
        length: of the body; None where it is chunked, absent, or ends with the connection.
        own: Callora's own header lines.
        close: whether the connection ends with this answer.
    """
    framing = (
        b"Transfer-Encoding: chunked\r\n"
        if chunked
        else b""
        if length is None or status == 204  # which never has a length: RFC 9110 §8.6
        else b"Content-Length: %d\r\n" % length
    )
    ending = b"Connection: close\r\n\r\n" if close else b"\r\n"
    return b"HTTP/1.1 %d %b\r\n%b%b%b%b" % (status, reason or _REASONS.get(status, b""), lines, framing, own, ending)


def interim_head(answer: ResponseHead) -> bytes:
    """Return a 1xx as it goes on to the client."""
    return b"HTTP/1.1 %d %b\r\n%b\r\n" % (answer.status, answer.reason, end_to_end_lines(answer))
