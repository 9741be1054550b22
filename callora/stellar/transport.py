"""How nodes of the chain are spoken to: stellar-sdk's client interface on httpx, natively on Trio.

The one module of the service that imports httpx. It keeps what the SDK would lose (the HTTP status of a JSON-RPC call,
Retry-After), reads no more than a bound, takes no longer than a deadline for the whole exchange, turns every reply that
makes no sense into the same fault, and knows whether anything of a request can have reached the node.
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from email.utils import parsedate_to_datetime
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Final

import httpx
import trio
from stellar_sdk.client.base_async_client import BaseAsyncClient
from stellar_sdk.client.response import Response

from callora.ledger.faults import ChainFaultKind
from callora.trust import system_trust

REPLY_BYTES_MAX: Final = 16 * 1024 * 1024
"""A page of events is the largest reply that is asked for, and far smaller."""
CONNECTIONS_MAX: Final = 32
IDLE_CONNECTION_SECONDS: Final = 30.0
CONNECT_SECONDS_MAX: Final = 5.0
"""For a connection, and again for its TLS: less than any exchange may take, so that what never began is told apart."""
CLOSE_SECONDS: Final = 2.0
RETRY_AFTER_SECONDS_MAX: Final = 3600.0
_SHOWN_CHARS_MAX: Final = 500
_NOTHING_DONE: Final = frozenset((400, 401, 403, 404, 405, 406, 410, 411, 413, 414, 415, 422, 429, 431))
"""Statuses of a server, or of a limiter before it, that did not take the request up."""
_PASSING: Final = frozenset((408, 425, 429))
_NOT_TAKEN_UP: Final = frozenset((-32700, -32600, -32601, -32602))
"""JSON-RPC's own codes for a request that was refused as such."""


class ReplyFault(Exception):
    """A request got no usable reply. Known inside this room alone."""

    def __init__(
        self,
        message: str,
        kind: ChainFaultKind,
        *,
        passing: bool,
        perhaps_done: bool,
        status: int | None = None,
        retry_after_seconds: float | None = None,
        document: Mapping[str, Any] | None = None,
    ) -> None:
        """Say what happened.

        Args:
            passing: whether the same request may succeed later.
            perhaps_done: whether the node may have acted upon the request; False only where that is certain.
            status: the HTTP status, where one came.
            document: the reply's body, where it is a JSON object.
        """
        super().__init__(message)
        self.kind: ChainFaultKind = kind
        self.passing = passing
        self.perhaps_done = perhaps_done
        self.status = status
        self.retry_after_seconds = retry_after_seconds
        self.document = document or {}


class Transport:
    """The connections to all nodes; `open_transport` makes it."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    def client(self, seconds_max: float) -> "NodeClient":
        """Return a client for stellar-sdk whose exchanges take this long at most, from connecting to the last byte."""
        return NodeClient(self._http, seconds_max)


@asynccontextmanager
async def open_transport() -> AsyncIterator[Transport]:
    """Yield a transport; on leaving, its connections are closed, in CLOSE_SECONDS at most.

    Neither proxies nor certificates are taken from the environment, no redirect is followed and no cookie kept: a node
    is what was configured.
    """
    http = httpx.AsyncClient(
        verify=system_trust(),
        trust_env=False,
        follow_redirects=False,
        timeout=None,  # noqa: S113 - every exchange has one deadline of its own
        limits=httpx.Limits(max_connections=CONNECTIONS_MAX, keepalive_expiry=IDLE_CONNECTION_SECONDS),
        headers={"User-Agent": "Callora", "Accept-Encoding": "identity"},
    )
    http.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=()))
    try:
        yield Transport(http)
    finally:
        with trio.move_on_after(CLOSE_SECONDS, shield=True):
            await http.aclose()


class WholeBody(httpx.AsyncByteStream):
    """A body, gone through once. An iterator: httpx's own generator is left half read where its reader is cancelled."""

    def __init__(self, body: bytes) -> None:
        self._left = [body]

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if not self._left:
            raise StopAsyncIteration
        return self._left.pop()


class NodeClient(BaseAsyncClient):
    """What stellar-sdk sends its requests through. It raises `ReplyFault` where the SDK would stumble.

    Replies of Horizon with a problem document keep their status, so that the SDK tells what it can tell of them.
    """

    def __init__(self, http: httpx.AsyncClient, seconds_max: float) -> None:
        self._http = http
        self._seconds_max = seconds_max
        self._timeout = httpx.Timeout(None, connect=min(CONNECT_SECONDS_MAX, 0.9 * seconds_max))

    async def get(
        self, url: str, params: dict[str, str] | None = None, max_content_size: int | None = None
    ) -> Response:
        """Return the reply to a GET.

        Raises:
            ReplyFault: there is none that can be used.
        """
        bytes_max = REPLY_BYTES_MAX if max_content_size is None else min(max_content_size, REPLY_BYTES_MAX)
        return _horizon_reply(await self._exchange("GET", url, bytes_max, params=params))

    async def post(
        self, url: str, data: dict[str, str] | None = None, json_data: dict[str, Any] | None = None
    ) -> Response:
        """Return the reply to a form (Horizon) or to a JSON-RPC call.

        Raises:
            ReplyFault: there is none that can be used.
        """
        if json_data is None:
            return _horizon_reply(await self._exchange("POST", url, REPLY_BYTES_MAX, data=data))
        reply = await self._exchange("POST", url, REPLY_BYTES_MAX, json=json_data)
        if reply.status_code != httpx.codes.OK:
            raise _status_fault(reply)
        return Response(reply.status_code, _rpc_text(reply.text, json_data["id"]), reply.headers, reply.url)

    def stream(self, url: str, params: dict[str, str] | None = None) -> AsyncGenerator[dict[str, Any], None]:
        """Refuse: Callora reads the chain by asking for pages, which a lost connection does not interrupt."""
        raise NotImplementedError("streams of Horizon are not read")

    async def close(self) -> None:
        """Leave the connections open: they are the transport's."""
        await trio.lowlevel.checkpoint()

    async def _exchange(self, method: str, url: str, bytes_max: int, **content: Any) -> Response:
        """Return whatever came within the deadline, whatever its status."""
        begun = False

        async def trace(event: str, _: Mapping[str, Any]) -> None:  # noqa: ASYNC124 - httpx wants a coroutine
            # Connecting, and TLS, come before: until then not a byte of the request has left.
            nonlocal begun
            begun = begun or event.endswith("send_request_headers.started")

        try:
            with trio.move_on_after(self._seconds_max):
                request = self._http.build_request(
                    method, url, extensions={"trace": trace}, timeout=self._timeout, **content
                )
                request.stream = WholeBody(request.content)
                async with aclosing(await self._http.send(request, stream=True)) as reply:
                    text = await _read(reply, bytes_max)
                    headers = {name.lower(): value for name, value in reply.headers.items()}
                    return Response(reply.status_code, text, headers, url)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            text = f"{type(error).__name__}: {error}"[:_SHOWN_CHARS_MAX]
            raise ReplyFault(text, "unreachable", passing=True, perhaps_done=begun) from error
        raise ReplyFault(f"no answer within {self._seconds_max:g} s", "timeout", passing=True, perhaps_done=begun)


async def _read(reply: httpx.Response, bytes_max: int) -> str:
    encoding = reply.headers.get("content-encoding", "identity")
    if encoding != "identity":
        # A few bytes could become any number of them: nobody asked for a coded body.
        raise _malformed(f"a body in {encoding[:40]}, which was not asked for")
    body = bytearray()
    try:
        async for chunk in reply.aiter_raw():
            if len(body) <= bytes_max:
                body += chunk
            if len(body) > bytes_max:
                # What was read already comes to its end, and then reading fails: nothing is left half read.
                await reply.aclose()
    except httpx.HTTPError:
        if len(body) <= bytes_max:
            raise
    if len(body) > bytes_max:
        raise _malformed(f"a body of more than {bytes_max} bytes")
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        if reply.is_success:
            raise _malformed("a body that is no UTF-8") from error
        return ""


def _malformed(what: str, *, status: int | None = None) -> ReplyFault:
    return ReplyFault(
        f"a reply that makes no sense: {what}", "malformed", passing=True, perhaps_done=True, status=status
    )


def _object(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _status_fault(reply: Response) -> ReplyFault:
    status = reply.status_code
    return ReplyFault(
        f"HTTP status {status}",
        "rate_limited" if status == httpx.codes.TOO_MANY_REQUESTS else "status",
        passing=status >= 500 or status in _PASSING,
        perhaps_done=status not in _NOTHING_DONE,
        status=status,
        retry_after_seconds=_retry_after(reply.headers),
        document=_object(reply.text),
    )


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return what Retry-After says, in seconds from when the reply was made; None where it says nothing usable."""
    told = headers.get("retry-after", "").strip()
    if told.isascii() and told.isdigit() and len(told) < 10:
        return min(float(told), RETRY_AFTER_SECONDS_MAX)
    try:
        seconds = (parsedate_to_datetime(told) - parsedate_to_datetime(headers.get("date", ""))).total_seconds()
    except (ValueError, TypeError):
        return None
    return min(max(seconds, 0.0), RETRY_AFTER_SECONDS_MAX)


def _horizon_reply(reply: Response) -> Response:
    """Return a reply that the SDK can read: a JSON object, of success or of a problem that is the client's."""
    found = _object(reply.text)
    if 200 <= reply.status_code < 300:
        if found is None:
            raise _malformed("no JSON object", status=reply.status_code)
        return reply
    if found is None or reply.status_code not in _NOTHING_DONE | {409} or reply.status_code in _PASSING:
        raise _status_fault(reply)
    if not isinstance(found.get("extras", {}), dict):
        del found["extras"]  # the SDK's exception would not survive it
    return Response(reply.status_code, json.dumps(found), reply.headers, reply.url)


def _rpc_text(text: str, request_id: object) -> str:
    """Return a reply to this very call with either a result or an error, both in a form that the SDK can read."""
    reply = _object(text)
    if reply is None or reply.get("jsonrpc") != "2.0":
        raise _malformed("no JSON-RPC", status=200)
    error, result = reply.get("error"), reply.get("result")
    if reply.get("id") != request_id and not (error is not None and reply.get("id") is None):
        raise _malformed("the reply to another request", status=200)
    if error is None:
        if result is None:
            raise _malformed("neither a result nor an error", status=200)
        return text
    if not isinstance(error, dict) or not isinstance(error.get("code"), int):
        raise _malformed("an error without a code", status=200)
    code, data = error["code"], error.get("data")
    if data is not None and not isinstance(data, str):
        data = json.dumps(data)
    readable = {
        "code": code,
        "message": str(error.get("message", ""))[:_SHOWN_CHARS_MAX],
        "data": None if data is None else data[:_SHOWN_CHARS_MAX],
    }
    return json.dumps({"jsonrpc": "2.0", "id": request_id, "error": readable})


def rpc_fault(code: int, message: str) -> ReplyFault:
    """Return what a JSON-RPC error means.

    Source: JSON-RPC 2.0 §5.1; stellar-rpc answers −32603 where it is unhealthy or cannot reach its core, −32001 where a
    call took too long.
    """
    refused = code in _NOT_TAKEN_UP
    return ReplyFault(
        f"error {code}: {message}",
        "refused" if refused else "error",
        passing=not refused,
        perhaps_done=not refused,
        status=200,
    )
