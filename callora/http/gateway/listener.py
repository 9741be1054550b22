"""The listener: accepts connections, reads one request after the other, and gives each to its lane.

A gateway request stays in the fast lane. Any other is passed, request by request and by the same exchange that serves
upstreams, to the REST server's private socket: one parser stands in front of both, so a connection may mix lanes in any
order and no two parsers can disagree about where a request ends.
"""

import errno
import socket
import ssl
from collections.abc import Mapping, Sequence
from typing import Final
from urllib.parse import unquote_to_bytes

import attrs
import trio
from structlog.typing import FilteringBoundLogger

from callora.http.gateway.admission import CALL_PREFIX, Refused, asks_for_another_protocol, client_address
from callora.http.gateway.aliases import Aliases
from callora.http.gateway.bodies import BadBody
from callora.http.gateway.calls import CallFlow, clean_request_id
from callora.http.gateway.client import (
    FOREVER,
    ClientConnection,
    ClientGone,
    ClientTooSlow,
    RequestBody,
    Ticker,
    TimeLimits,
)
from callora.http.gateway.exchange import AnswerCut, Exchange, UpstreamFailed, UpstreamTimedOut
from callora.http.gateway.heads import BadHead, RequestHead
from callora.http.gateway.poller import Poller
from callora.http.gateway.rewriting import answer_head, end_to_end_lines, upstream_head
from callora.http.gateway.upstream import ConnectFailed, Connector, Pool, PoolExhausted
from callora.http.gateway.wire import PlainWire, TlsWire, WireBroken
from callora.http.problems import PROBLEMS, problem_body
from callora.ledger.ids import Ids
from callora.metrics import Metrics

SWEEP_SECONDS: Final = 0.2
BACKLOG: Final = 2048
ACCEPTS_A_TURN: Final = 64
REST_SECONDS: Final = 60.0
REST_CONNECTIONS_MAX: Final = 128
STREAM_DRAIN_SECONDS: Final = 3.0
TLS_SECONDS: Final = 10.0
_NO_MORE_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_PROBLEM_LINES: Final = b"Content-Type: application/json\r\n"


def open_listener(host: str, port: int, *, shared: bool) -> socket.socket:
    """Return a listening socket.

    Args:
        shared: whether several processes listen on this port, each taking a part of the connections.

    Raises:
        OSError: the address is taken or not ours.
    """
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        if family == socket.AF_INET and not host.replace(".", "").isdigit():
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            host = str(address[0])
        return _listening(family, host, port, shared=shared)
    except OSError as error:
        raise OSError(error.errno, f"cannot listen on {where}: {error.strerror}") from error


def _listening(family: socket.AddressFamily, host: str, port: int, *, shared: bool) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


@attrs.frozen
class RestStreams:
    """Routes of the REST server whose answers last for as long as their clients stay."""

    paths: frozenset[str]
    open_max: int
    """How many the REST server has at most; what is asked for beyond that it refuses."""


class Listener:
    """All client connections of this process."""

    def __init__(
        self,
        *,
        flow: CallFlow,
        poller: Poller,
        rest_path: str,
        tls: ssl.SSLContext | None,
        limits: TimeLimits,
        connections_max: int,
        rest_body_bytes_max: int,
        rest_larger_bodies: Mapping[str, int],
        rest_streams: RestStreams,
        trusted_proxies: int,
        aliases: Aliases,
        ids: Ids,
        metrics: Metrics,
        log: FilteringBoundLogger,
    ) -> None:
        """Args:
        rest_path: the UNIX socket of the REST server.
        rest_body_bytes_max: the largest request body of a REST route, refused here before the server sees its end.
        rest_larger_bodies: the paths that take more, each with its own limit in bytes.
        rest_streams: what has connections of its own, so that the other routes never wait for one.
        """
        self._flow = flow
        self._poller = poller
        self._rest = Pool(Connector(poller, unix_path=rest_path), REST_CONNECTIONS_MAX)
        self._rest_streams = Pool(Connector(poller, unix_path=rest_path), rest_streams.open_max + REST_CONNECTIONS_MAX)
        self._stream_paths = frozenset(path.encode("ascii") for path in rest_streams.paths)
        self._streaming: set[ClientConnection] = set()
        self._tls = tls
        self._limits = limits
        self._connections_max = connections_max
        self._rest_body_bytes_max = rest_body_bytes_max
        self._rest_larger_bodies = rest_larger_bodies
        self._trusted_proxies = trusted_proxies
        self._aliases = aliases
        self._ids = ids
        self._metrics = metrics
        self._log = log
        self._clients: set[ClientConnection] = set()
        self._ticker = Ticker(SWEEP_SECONDS)
        self._draining = False
        self.ended = trio.Event()
        """Set when a drain has served the last request in hand."""
        self._busy = 0

    async def run(
        self, listeners: Sequence[socket.socket], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve until cancelled; after `drain`, `ended` tells when nothing is in hand any more.

        Cancellation: requests in hand end at once, their clients' connections are closed.
        """
        try:
            async with trio.open_nursery() as nursery:
                self._ticker.tick()
                nursery.start_soon(self._sweep)
                for listener in listeners:
                    nursery.start_soon(self._accept, listener, nursery)
                task_status.started()
                await trio.sleep_forever()
        finally:
            for listener in listeners:
                listener.close()
            self._rest.close_idle(FOREVER)
            self._rest_streams.close_idle(FOREVER)

    def drain(self) -> None:
        """Serve what is in hand, answer what is new with 503, then end. Connections between requests end last.

        A stream's client that takes nothing is not waited for longer than STREAM_DRAIN_SECONDS.
        """
        self._draining = True
        for client in self._streaming:
            client.hurry(STREAM_DRAIN_SECONDS)
        self._end_when_quiet()

    @property
    def busy(self) -> int:
        """Requests in hand."""
        return self._busy

    def _end_when_quiet(self) -> None:
        if self._draining and self._busy == 0 and not any(client.wire.sending for client in self._clients):
            self.ended.set()

    async def _accept(self, listener: socket.socket, nursery: trio.Nursery) -> None:
        while True:
            await trio.lowlevel.wait_readable(listener)
            for _ in range(ACCEPTS_A_TURN):
                try:
                    sock, address = listener.accept()
                except (BlockingIOError, ConnectionAbortedError, InterruptedError):
                    break
                except OSError as error:
                    if error.errno not in _NO_MORE_DESCRIPTORS:
                        raise
                    self._log.error("accept_failed", error=str(error))
                    await trio.sleep(0.1)
                    break
                if len(self._clients) >= self._connections_max:
                    self._turn_away(sock)
                else:
                    nursery.start_soon(self._serve, sock, str(address[0]))

    def _turn_away(self, sock: socket.socket) -> None:
        self._metrics.refusals.of("SERVICE_UNAVAILABLE").inc()
        sock.setblocking(False)
        if self._tls is None:
            document = problem_body("SERVICE_UNAVAILABLE", "Too many connections", None)
            own = b"Retry-After: 1\r\n"
            head = answer_head(503, b"", _PROBLEM_LINES, length=len(document), chunked=False, own=own, close=True)
            try:
                sock.send(head + document)
            except OSError as error:
                self._log.debug("turned_away_unheard", error=str(error))
        sock.close()

    async def _serve(self, sock: socket.socket, peer: str) -> None:
        wire: PlainWire | TlsWire
        wire = PlainWire(sock, self._poller) if self._tls is None else TlsWire(sock, self._poller, self._tls, None)
        client = ClientConnection(wire, peer, self._limits, self._ticker)
        self._clients.add(client)
        try:
            if isinstance(wire, TlsWire):
                client.wait_for("client", TLS_SECONDS)
                await wire.handshake()
            while await self._serve_next(client):
                pass
            await client.finish_sending()
        except WireBroken as error:
            self._log.debug("client_lost", error=str(error))
        except Exception:
            self._log.exception("connection_crashed")
        finally:
            self._clients.discard(client)
            wire.close()

    async def _serve_next(self, client: ClientConnection) -> bool:
        """Serve the connection's next request; return whether there may be one more."""
        try:
            request = await client.next_head()
        except BadHead as error:
            await self._answer_malformed(client, error.code, str(error))
            return False
        except ClientTooSlow:
            await self._answer_malformed(client, "REQUEST_TIMEOUT", "The request's head did not arrive in time")
            return False
        if request is None:
            return False
        client.timed_out = False
        self._busy += 1
        try:
            if request.path.startswith(CALL_PREFIX):
                return await self._flow.serve(client, request)
            call_path = self._aliases.call_path(request.path)
            if call_path is not None:
                request.path = call_path
                return await self._flow.serve(client, request)
            return await self._pass_to_rest(client, request)
        finally:
            self._busy -= 1
            self._end_when_quiet()

    async def _answer_malformed(self, client: ClientConnection, code: str, message: str) -> None:
        """Answer a request that cannot be read; where the next would begin is unknown, so the connection ends."""
        self._metrics.refusals.of(code).inc()
        document = problem_body(code, message, self._ids.uuid7())
        head = answer_head(
            PROBLEMS[code].status, b"", _PROBLEM_LINES, length=len(document), chunked=False, own=b"", close=True
        )
        try:
            await client.send(head + document)
            await client.linger()
        except ClientGone:
            return

    async def _pass_to_rest(self, client: ClientConnection, request: RequestHead) -> bool:
        """Pass a request that is no call to the REST server."""
        request_id = clean_request_id(request.first(b"x-request-id")) or self._ids.uuid7()
        refused: Refused
        body: RequestBody | None = None
        exchange: Exchange | None = None
        # As the REST server will read the path
        streams = unquote_to_bytes(request.path).rstrip(b"/") in self._stream_paths
        pool = self._rest_streams if streams else self._rest
        if streams:
            self._streaming.add(client)
        try:
            if asks_for_another_protocol(request):
                raise Refused("UPGRADE_NOT_SUPPORTED", close=True)
            limit = self._rest_larger_bodies.get(request.path.decode("ascii"), self._rest_body_bytes_max)
            body = RequestBody(client, request, limit)
            exchange = Exchange(client, request, body, REST_SECONDS)
            head = upstream_head(
                request,
                path=request.path,
                authority=request.host or b"localhost",
                request_id=request_id.encode("ascii"),
                configured={"X-Forwarded-For": client_address(request, client.peer, self._trusted_proxies)},
                key_in_authorization=False,
                keep_cookies_and_keys=True,
            )
            await exchange.send(pool, head, b"", REST_SECONDS, REST_SECONDS)
            return await body.leave(reusable=await self._answer_from_rest(request, body, exchange))
        except Refused as error:
            refused = error
        except BadBody as error:
            refused = Refused(error.code, str(error), close=True)
        except (ConnectFailed, PoolExhausted, UpstreamFailed) as error:
            self._log.warning("rest_unreachable", error=repr(error))
            refused = Refused("SERVICE_UNAVAILABLE", retry_seconds=1)
        except UpstreamTimedOut:
            refused = Refused("GATEWAY_TIMEOUT")
        except (ClientGone, AnswerCut):
            return False
        finally:
            self._streaming.discard(client)
            if exchange is not None:
                exchange.drop()
        document = problem_body(refused.code, refused.message, request_id)
        own = b"X-Request-Id: %b\r\n" % request_id.encode("ascii")
        status = PROBLEMS[refused.code].status
        head = answer_head(status, b"", _PROBLEM_LINES, length=len(document), chunked=False, own=own, close=True)
        try:
            await client.send(head if request.method == "HEAD" else head + document)
            await client.linger()
        except ClientGone:
            return False
        return False

    async def _answer_from_rest(self, request: RequestHead, body: RequestBody, exchange: Exchange) -> bool:
        async def answer() -> bool:
            await exchange.read_head(REST_SECONDS)
            close = not request.keep_alive or self._draining or exchange.ends_by_close or body.too_long_to_drop
            head = answer_head(
                exchange.answer.status,
                exchange.answer.reason,
                end_to_end_lines(exchange.answer, keep_own=True),
                length=exchange.answer.content_length,
                chunked=exchange.chunks_answer,
                own=b"",
                close=close,
            )
            return await exchange.release(head, closing=close)

        if exchange.streams_request:
            return await exchange.while_sending(answer, REST_SECONDS, trio.sleep_forever)
        return await answer()

    async def _sweep(self) -> None:
        """One look at every connection's time limit, instead of a timer for every operation."""
        while True:
            await trio.sleep(SWEEP_SECONDS)
            now = self._ticker.tick()
            for client in tuple(self._clients):
                if client.deadline <= now:
                    client.expire()
            self._end_when_quiet()  # the last answer of a slow client may be on its way still
            self._rest.close_idle(now - REST_SECONDS / 2)
            self._rest_streams.close_idle(now - REST_SECONDS / 2)
            self._metrics.flush()
            self._metrics.connections.set(len(self._clients))
            self._metrics.inflight_calls.set(self._flow.running)
