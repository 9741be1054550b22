"""Upstream connections: bounded pools, newest idle first, each connection pinned to an address that was checked."""

import errno
import socket
import ssl
from collections import deque
from collections.abc import Sequence
from typing import Final

import attrs
import trio

from callora.http.gateway.poller import Poller
from callora.http.gateway.wire import PlainWire, TlsWire, Wire, WireBroken
from callora.outbound.addresses import Resolver, SocketAddress, Target

IDLE_SECONDS_MAX: Final = 30.0
"""Shorter than common servers keep an idle connection, so that one is seldom taken as it is being closed."""
SWEEP_SECONDS: Final = 5.0


class ConnectFailed(Exception):
    """No connection: refused, unreachable, TLS, or too slow. Nothing of the request was sent."""


class PoolExhausted(Exception):
    """Every connection that this upstream may have is in use, and none came free in time. Nothing was sent."""


@attrs.define(slots=True, eq=False)
class UpstreamConnection:
    """A connection to an upstream, in one call's hands or idle."""

    wire: Wire
    pool: "Pool"
    reused: bool = False
    idle_since: float = 0.0
    leftover: bytes = b""


class Pool:
    """The connections to one upstream origin."""

    __slots__ = ("_connect", "_idle", "_open", "_open_max", "_waiting")

    def __init__(self, connect: "Connector", open_max: int) -> None:
        self._connect = connect
        self._open_max = open_max
        self._open = 0
        self._idle: list[UpstreamConnection] = []
        self._waiting: deque[trio.Event] = deque()

    def take_idle(self) -> UpstreamConnection | None:
        """Return the connection that was used last and still lives, or None."""
        while self._idle:
            connection = self._idle.pop()
            if connection.wire.is_quiet():
                connection.reused = True
                return connection
            self.discard(connection)
        return None

    async def open(self, timeout_seconds: float) -> UpstreamConnection:
        """Return a connection nobody used before, within the pool's bound.

        Raises:
            PoolExhausted, ConnectFailed, TargetBlocked, TargetUnresolved: nothing was sent.
        """
        with trio.move_on_after(timeout_seconds) as scope:
            while self._open >= self._open_max:
                idle = self.take_idle()
                if idle is not None:
                    return idle
                turn = trio.Event()
                self._waiting.append(turn)
                try:
                    await turn.wait()
                finally:
                    if turn in self._waiting:
                        self._waiting.remove(turn)
            self._open += 1
            try:
                return UpstreamConnection(await self._connect.connect(), self)
            except BaseException:
                self._open -= 1
                self._wake_one()
                raise
        assert scope.cancelled_caught
        if self._open >= self._open_max:
            raise PoolExhausted("every connection to this upstream is in use")
        raise ConnectFailed("connecting took too long")

    def give_back(self, connection: UpstreamConnection) -> None:
        """Keep a connection whose last answer ended cleanly."""
        connection.idle_since = trio.current_time()
        self._idle.append(connection)
        self._wake_one()

    def discard(self, connection: UpstreamConnection) -> None:
        """Close a connection."""
        connection.wire.close()
        self._open -= 1
        self._wake_one()

    def _wake_one(self) -> None:
        if self._waiting:
            self._waiting.popleft().set()

    def close_idle(self, before: float) -> None:
        """Close what has been idle since `before`."""
        old = [connection for connection in self._idle if connection.idle_since < before]
        self._idle = [connection for connection in self._idle if connection.idle_since >= before]
        for connection in old:
            self.discard(connection)

    @property
    def empty(self) -> bool:
        """True when no connection is open."""
        return self._open == 0


class Connector:
    """Opens connections to one origin."""

    __slots__ = ("_poller", "_resolver", "_target", "_tls", "_unix_path")

    def __init__(
        self,
        poller: Poller,
        *,
        target: Target | None = None,
        resolver: Resolver | None = None,
        tls: ssl.SSLContext | None = None,
        unix_path: str | None = None,
    ) -> None:
        """Args:
        target, resolver, tls: an upstream; `tls` for https.
        unix_path: instead of these, the socket of the REST server beside us.
        """
        self._poller = poller
        self._target = target
        self._resolver = resolver
        self._tls = tls
        self._unix_path = unix_path

    async def connect(self) -> Wire:
        """Return a new connection to the first checked address that takes one.

        Raises:
            ConnectFailed, TargetBlocked, TargetUnresolved.
        """
        if self._unix_path is not None:
            return PlainWire(await _connect_socket(socket.AF_UNIX, self._unix_path), self._poller)
        assert self._target is not None
        assert self._resolver is not None
        sock = await self._connect_tcp(await self._resolver.resolve(self._target))
        if self._target.scheme == "http":
            return PlainWire(sock, self._poller)
        assert self._tls is not None
        wire = TlsWire(sock, self._poller, self._tls, self._target.host)
        try:
            await wire.handshake()
        except WireBroken as error:
            wire.close()
            raise ConnectFailed(str(error)) from error
        except BaseException:
            wire.close()
            raise
        return wire

    async def _connect_tcp(self, addresses: Sequence[SocketAddress]) -> socket.socket:
        failure = "no address"
        for address in addresses:
            try:
                return await _connect_socket(address.family, address.sockaddr)
            except ConnectFailed as error:
                failure = str(error)
        raise ConnectFailed(failure)


async def _connect_socket(family: socket.AddressFamily, address: str | tuple[str, int]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        code = sock.connect_ex(address)
        if code in (errno.EINPROGRESS, errno.EAGAIN):
            await trio.lowlevel.wait_writable(sock)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code != 0:
            raise ConnectFailed(errno.errorcode.get(code, str(code)))
    except OSError as error:
        sock.close()
        raise ConnectFailed(str(error)) from error
    except BaseException:
        sock.close()
        raise
    return sock


class Upstreams:
    """Every upstream's pool."""

    def __init__(self, poller: Poller, resolver: Resolver, tls: ssl.SSLContext, open_max: int) -> None:
        self._poller = poller
        self._resolver = resolver
        self._tls = tls
        self._open_max = open_max
        self._pools: dict[tuple[str, str, int], Pool] = {}

    def pool(self, target: Target) -> Pool:
        """Return the pool of a target's origin."""
        origin = (target.scheme, target.host, target.port)
        pool = self._pools.get(origin)
        if pool is None:
            connector = Connector(self._poller, target=target, resolver=self._resolver, tls=self._tls)
            pool = self._pools[origin] = Pool(connector, self._open_max)
        return pool

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Close idle connections until cancelled, then all of them."""
        task_status.started()
        try:
            while True:
                await trio.sleep(SWEEP_SECONDS)
                before = trio.current_time() - IDLE_SECONDS_MAX
                for origin, pool in tuple(self._pools.items()):
                    pool.close_idle(before)
                    if pool.empty:
                        del self._pools[origin]
        finally:
            for pool in self._pools.values():
                pool.close_idle(float("inf"))
