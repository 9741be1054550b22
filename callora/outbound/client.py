"""Requests of Callora's own to addresses that users and operators chose: webhooks' receivers, meters' sources.

One exchange is one request and what came back: the name is resolved once, every address it has is checked, and the
connection is opened to an address that was checked, never to the name, which stays in SNI and in the Host header. No
redirect is followed, nothing is read from the environment, no cookie is kept, a reply is read up to a bound, and one
deadline covers all of it. The one module that imports httpcore: its pool takes the network that it is given.
"""

import socket
import ssl
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import partial
from ipaddress import ip_address, ip_network
from typing import Any, Final, Literal

import attrs
import httpcore
import trio

from callora.ledger.faults import CalloraFault
from callora.outbound.addresses import (
    AddressPolicy,
    OutboundUrl,
    Resolver,
    SocketAddress,
    Target,
    TargetBlocked,
    TargetUnresolved,
    parse_outbound_url,
)
from callora.trust import system_trust

CONNECTIONS_MAX: Final = 64
IDLE_CONNECTIONS_MAX: Final = 32
IDLE_CONNECTION_SECONDS: Final = 15.0
"""Shorter than common servers keep one, and than a checked address is used."""
ADDRESS_SECONDS_MAX: Final = 2.0
"""For a connection to one of several addresses of a name."""
LOOKUP_SECONDS_MAX: Final = 10.0
LOOKUP_THREADS_MAX: Final = 16
"""Threads of lookups under way: of their own, so that a name server that hangs takes no thread of anybody else's."""
LOOKUPS_MAX: Final = 512
"""Lookups under way or waiting for a thread; more are refused."""
CLOSE_SECONDS: Final = 2.0
_BROKEN: Final = (trio.BrokenResourceError, trio.ClosedResourceError, OSError)

OutboundFaultKind = Literal["blocked", "unresolved", "unreachable", "timeout", "malformed"]
"""Why there is no reply: the address may not be called; the name has none; no connection or TLS, or it broke; no reply
in time; what came is no HTTP."""

Plain = Literal["anywhere", "localhost", "never"]
"""Where http without TLS may go."""

EVERYWHERE: Final = AddressPolicy(networks=(ip_network("0.0.0.0/0"), ip_network("::/0")))
"""Every address: for what only an operator can name."""


class OutboundFault(CalloraFault):
    """An exchange had no reply."""

    def __init__(self, kind: OutboundFaultKind, message: str, *, perhaps_done: bool) -> None:
        """Say what happened.

        Args:
            message: for logs and for whoever chose the address; it names no address of a private network.
            perhaps_done: whether the other side may have acted upon the request; False only where that is certain.
        """
        super().__init__(message)
        self.kind: OutboundFaultKind = kind
        self.perhaps_done = perhaps_done


@attrs.frozen
class Reply:
    """What came back, whatever its status."""

    status: int
    """200 to 599; a redirect is a status like any other."""
    headers: Mapping[str, str]
    """By their names in lower case; values of a repeated one are joined by a comma."""
    body: bytes
    """As it came, undecoded: no coding was asked for. At most as long as was asked."""
    whole: bool
    """False where the body was longer than asked, broke off, or had not ended at the deadline: its head came all the
    same, so the request was taken up."""

    def retry_after_seconds(self, now: datetime) -> float | None:
        """Return how long the other side wants to be left alone; None where it says nothing that can be read."""
        told = self.headers.get("retry-after", "").strip()
        if told.isascii() and told.isdigit() and len(told) < 10:
            return float(told)
        try:
            moment = parsedate_to_datetime(told)
            return max((moment - now).total_seconds(), 0.0)
        except (ValueError, TypeError):  # none, or one without a zone
            return None


@attrs.frozen
class OutboundPolicy:
    """Where requests may go."""

    addresses: AddressPolicy
    """What is allowed beside public addresses; EVERYWHERE for all."""
    plain: Plain
    """Where http without TLS may go."""

    def read(self, text: str) -> OutboundUrl:
        """Return a URL that requests may be sent to, as far as its text tells.

        Raises:
            ValueError: the text is no such URL; the message says why and may be shown to whoever wrote it.
        """
        url = parse_outbound_url(text)
        if url.target.scheme == "http" and self.plain != "anywhere":
            if self.plain == "never":
                raise ValueError("must start with https://")
            if not _is_local(url.target.host):
                raise ValueError("must start with https:// unless its host is localhost")
        return url


def _is_local(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Outbound:
    """Requests under one policy; `open_outbound` makes it."""

    def __init__(self, policy: OutboundPolicy, resolver: Resolver, pool: httpcore.AsyncConnectionPool) -> None:
        self._policy = policy
        self._resolver = resolver
        self._pool = pool

    async def check(self, text: str) -> OutboundUrl:
        """Return a URL whose text and addresses are allowed at present. Nothing is sent.

        Raises:
            ValueError: the text is no such URL, or its addresses may not be called, or it has none; the message says
                why and may be shown to whoever wrote it.

        Cancellation: leaves a lookup to end by itself.
        """
        url = self._policy.read(text)
        try:
            await self._resolver.resolve(url.target)
        except TargetBlocked:
            raise ValueError("must not lead to a private, local or reserved address") from None
        except TargetUnresolved:
            raise ValueError("must have a host that can be resolved") from None
        return url

    async def exchange(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes = b"",
        *,
        seconds_max: float,
        reply_bytes_max: int,
    ) -> Reply:
        """Send one request, once, and return what came back.

        A connection that another exchange left open may be used; a request is never sent a second time.

        Args:
            method: GET, POST and so on.
            url: absolute; read anew under the policy.
            headers: sent as they are, beside Host, Content-Length and Connection, which are set here.
            body: sent with its length; without one, GET and HEAD have no Content-Length.
            seconds_max: from now to the reply's last byte, waiting for a connection's turn included.
            reply_bytes_max: how much of the reply's body is read; then the connection is closed.

        Raises:
            OutboundFault: no head of a reply came.
            ValueError: `url` is not allowed by its text.

        Cancellation: the connection is closed; the other side may have acted upon the request.
        """
        outbound_url = self._policy.read(url)
        begun = False
        status: int | None = None
        reply_headers: dict[str, str] = {}
        received = bytearray()
        whole = False

        async def trace(event: str, _: Mapping[str, Any]) -> None:  # noqa: ASYNC124 - httpcore wants a coroutine
            # Connecting, and TLS, come before: until then not a byte of the request has left.
            nonlocal begun
            begun = begun or event.endswith("send_request_headers.started")

        try:
            with trio.move_on_after(seconds_max):
                request = _request(method, outbound_url, headers, body, trace)
                response = await self._pool.handle_async_request(request)
                try:
                    status = response.status
                    reply_headers = _joined(response.headers)
                    whole = await _read(response, received, reply_bytes_max)
                finally:
                    with trio.move_on_after(CLOSE_SECONDS, shield=True):
                        await response.aclose()
        except TargetBlocked as fault:
            raise OutboundFault("blocked", "the host's address may not be called", perhaps_done=False) from fault
        except TargetUnresolved as fault:
            raise OutboundFault("unresolved", "the host has no address", perhaps_done=False) from fault
        except _FAULTS as fault:
            if status is None:
                kind: OutboundFaultKind = "malformed" if isinstance(fault, httpcore.ProtocolError) else "unreachable"
                raise OutboundFault(kind, f"{type(fault).__name__}: {fault}"[:200], perhaps_done=begun) from fault
        if status is None:
            raise OutboundFault("timeout", f"no reply within {seconds_max:g} s", perhaps_done=begun)
        return Reply(status, reply_headers, bytes(received[:reply_bytes_max]), whole)


_FAULTS: Final = (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError)


def _request(method: str, url: OutboundUrl, headers: Mapping[str, str], body: bytes, trace: object) -> httpcore.Request:
    sent = [(b"Host", url.target.authority.encode("ascii"))]
    sent += [(name.encode("ascii"), value.encode("latin-1")) for name, value in headers.items()]
    if body or method not in ("GET", "HEAD"):
        sent.append((b"Content-Length", str(len(body)).encode("ascii")))
    target = url.target
    where = httpcore.URL(
        scheme=target.scheme.encode("ascii"),
        host=target.host.encode("ascii"),
        port=target.port,
        target=url.path.encode("ascii"),
    )
    content = _WholeBody(body) if body else None
    return httpcore.Request(method, where, headers=sent, content=content, extensions={"trace": trace})


def _joined(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    joined: dict[str, str] = {}
    for raw_name, raw_value in headers:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        joined[name] = f"{joined[name]}, {value}" if name in joined else value
    return joined


async def _read(response: httpcore.Response, received: bytearray, bytes_max: int) -> bool:
    """Read a body's start into `received`; return whether that is all of it."""
    try:
        async for chunk in response.aiter_stream():
            if len(received) <= bytes_max:
                received += chunk
            if len(received) > bytes_max:
                # What was read already comes to its end, and then reading fails: no generator is left half read.
                await response.aclose()
    except _FAULTS:
        return False
    return len(received) <= bytes_max


class _WholeBody:
    """A body, gone through once. An iterator: a generator is left half read where its reader is cancelled."""

    def __init__(self, body: bytes) -> None:
        self._left = [body]

    def __aiter__(self) -> "_WholeBody":
        return self

    async def __anext__(self) -> bytes:
        if not self._left:
            raise StopAsyncIteration
        return self._left.pop()


class _GuardedNetwork(httpcore.AsyncNetworkBackend):
    """Connects to nothing but addresses that were checked."""

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Return a connection to the first checked address that takes one.

        Raises:
            TargetBlocked, TargetUnresolved: no socket was opened.
            httpcore.ConnectError: no address took a connection.
        """
        failure: OSError | None = None
        addresses = await self._resolver.resolve(Target("http", host, port, ""))
        for number, address in enumerate(addresses, 1):
            # An address that nothing comes back from, such as IPv6 without a way out, leaves time for the next one.
            seconds_max = float("inf") if number == len(addresses) else ADDRESS_SECONDS_MAX
            with trio.move_on_after(seconds_max):
                try:
                    return _Connection(await _connected(address))
                except OSError as error:
                    failure = error
        raise httpcore.ConnectError("no address takes a connection") from failure

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await trio.sleep(seconds)


async def _connected(address: SocketAddress) -> trio.SocketStream:
    sock = trio.socket.socket(address.family, socket.SOCK_STREAM)
    try:
        await sock.connect(address.sockaddr)
    except BaseException:
        sock.close()
        raise
    return trio.SocketStream(sock)


class _Connection(httpcore.AsyncNetworkStream):
    """A connection, plain or under TLS. Time-outs play no part: who exchanges has one deadline.

    It is closed without a word: a farewell of TLS can wait for ever for a peer that reads nothing.
    """

    def __init__(self, tcp: trio.SocketStream, tls: "trio.SSLStream[trio.SocketStream] | None" = None) -> None:
        self._tcp = tcp
        self._stream: trio.abc.Stream = tcp if tls is None else tls

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 - httpcore's
        """Return what has arrived."""
        try:
            return bytes(await self._stream.receive_some(max_bytes))
        except _BROKEN as error:
            raise httpcore.ReadError(str(error)) from error

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109 - httpcore's
        """Send all of it."""
        try:
            if buffer:
                await self._stream.send_all(buffer)
        except _BROKEN as error:
            raise httpcore.WriteError(str(error)) from error

    async def aclose(self) -> None:
        """Close, at once."""
        self._tcp.socket.close()
        await trio.lowlevel.checkpoint()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's
    ) -> httpcore.AsyncNetworkStream:
        """Agree on keys; the certificate must name the host.

        Raises:
            httpcore.ConnectError: the other side is not who it should be, or speaks no TLS. It is closed.
        """
        tls = trio.SSLStream(self._tcp, ssl_context, server_hostname=server_hostname, https_compatible=True)
        try:
            await tls.do_handshake()
        except _BROKEN as error:
            self._tcp.socket.close()
            raise httpcore.ConnectError(f"TLS: {error.__cause__ or error}") from error
        except BaseException:
            self._tcp.socket.close()
            raise
        return _Connection(self._tcp, tls)

    def get_extra_info(self, info: str) -> Any:
        """Return whether something has arrived, which on an idle connection is its end; nothing else is asked."""
        return self._tcp.socket.is_readable() if info == "is_readable" else None


@asynccontextmanager
async def open_outbound(
    policy: OutboundPolicy,
    *,
    connections_max: int = CONNECTIONS_MAX,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[Outbound]:
    """Yield what sends requests under a policy; on leaving, its connections are closed and its lookups given up.

    Args:
        connections_max: connections at once; an exchange beyond them waits for its turn, inside its deadline.
        tls: whose certificates are trusted; None: those that the system trusts.

    Cancellation: closes as leaving does.
    """
    threads = trio.CapacityLimiter(LOOKUP_THREADS_MAX)

    async def getaddrinfo(host: str, port: None, *, type: socket.SocketKind) -> list[Any]:  # noqa: A002 - as it is called
        look_up = partial(socket.getaddrinfo, host, port, type=type)
        return await trio.to_thread.run_sync(look_up, limiter=threads, abandon_on_cancel=True)

    async with trio.open_nursery() as lookups:
        resolver = Resolver(
            policy.addresses,
            lookups,
            getaddrinfo=getaddrinfo,
            deadline_seconds=LOOKUP_SECONDS_MAX,
            lookup_seconds_max=LOOKUP_SECONDS_MAX,
            lookups_max=LOOKUPS_MAX,
        )
        pool = httpcore.AsyncConnectionPool(
            ssl_context=tls or system_trust(),
            max_connections=connections_max,
            max_keepalive_connections=min(connections_max, IDLE_CONNECTIONS_MAX),
            keepalive_expiry=IDLE_CONNECTION_SECONDS,
            network_backend=_GuardedNetwork(resolver),
        )
        try:
            yield Outbound(policy, resolver, pool)
        finally:
            with trio.move_on_after(CLOSE_SECONDS, shield=True):
                await pool.aclose()
            lookups.cancel_scope.cancel()
