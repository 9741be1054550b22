"""The frame around the app: what holds for every answer, whoever made it, down at ASGI.

Request id, client address, security headers, CORS, the body's limit, counting and the access record live here rather
than in the web framework's hooks, because answers that never reach those hooks need them as well.
"""

import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Any, Final

import attrs
import trio

from callora.config.settings import Settings
from callora.http.problems import CONTENT_TYPE, PROBLEMS, problem_body
from callora.http.rest.deps import RestDeps

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

EXCHANGE: Final = "callora.exchange"
"""The key of the `Exchange` in a request's ASGI scope."""

UNKNOWN_ROUTE: Final = "_unknown"
_ANY_ORIGIN: Final = frozenset(("/.well-known/stellar.toml", "/auth"))
"""Paths that every site's wallet must be able to use, errors included: SEP-1 and SEP-10. They take no credentials."""

_LAST_SEND_SECONDS_MAX: Final = 2
_REFUSAL_SECONDS_MAX: Final = 5
_REQUEST_ID: Final = re.compile(rb"[\x21-\x7e]{1,128}")
_METHODS: Final = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
_PROBES: Final = frozenset(("health", "metrics"))
_SECURITY_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
)
_HSTS: Final = (b"strict-transport-security", b"max-age=31536000")
_PREFLIGHT_HEADERS: Final = (
    (b"access-control-allow-methods", b"GET, HEAD, POST, PUT, PATCH, DELETE"),
    (
        b"access-control-allow-headers",
        b"Authorization, Content-Type, Idempotency-Key, Last-Event-ID, X-Api-Key, X-Request-Id",
    ),
    (b"access-control-max-age", b"600"),
)
_EXPOSED_HEADERS: Final = (
    b"access-control-expose-headers",
    b"Idempotent-Replayed, Retry-After, X-Callora-Balance, X-Callora-Charge, X-RateLimit-Limit, X-RateLimit-Remaining, "
    b"X-RateLimit-Reset, X-Request-Id",
)


@attrs.define
class Exchange:
    """One request and what is known of its answer."""

    request_id: str
    """What X-Request-Id of the answer says."""
    method: str
    """The method as sent."""
    client: str
    """The client's address, "" where it is not known."""
    origin: bytes | None
    """The Origin header."""
    body_bytes_max: int
    """The largest request body taken."""
    any_origin: bool = False
    """Whether browsers of every origin may read the answer."""
    route: str = UNKNOWN_ROUTE
    """The template of the route that matched."""
    status: int = 0
    """The status sent, 0 before."""
    body_bytes: int = 0
    """Request body bytes received."""
    audit_target: str | None = None
    """What an operator's request is about, where the path does not say it."""
    audit_details: dict[str, str] = attrs.field(factory=dict)
    """What the audit notes besides the path's parameters; never a secret."""
    body_exceeded: bool = False
    """Whether the body went past its limit; the app was then told that the client had left."""

    @property
    def caller(self) -> str:
        """Whom a limit counts where nobody is logged in: the address; of IPv6 the /64, which is one household's."""
        try:
            address = ip_address(self.client)
        except ValueError:
            return f"ip:{self.client}"
        if isinstance(address, IPv6Address):
            mapped = address.ipv4_mapped
            return f"ip:{mapped if mapped is not None else ip_network((address, 64), strict=False)}"
        return f"ip:{address}"


def route_group(route: str) -> str:
    """Return the group that a route template belongs to in metrics."""
    if route in ("/livez", "/readyz", "/healthz", "/api/health", "/health"):
        return "health"
    return "metrics" if route in ("/metrics", "/api/metrics") else "other"


def shielded(app: AsgiApp) -> AsgiApp:
    """Return the app with the last send of each answer kept from cancellation, for two seconds at most.

    The server announces the client's leave before it closes a connection that must close; the framework then cancels
    the request, and with it that very close. The socket would stay open until the client left, and a shutdown would
    always take its whole grace period.
    """

    async def asgi(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return

        async def shielded_send(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body"):
                with trio.move_on_after(_LAST_SEND_SECONDS_MAX, shield=True):
                    await send(message)
            else:
                await send(message)

        await app(scope, receive, shielded_send)

    return asgi


def _header(scope: Scope, name: bytes) -> bytes | None:
    """Return the header's value, None where it is missing or sent more than once."""
    values = [value for key, value in scope["headers"] if key.lower() == name]
    return values[0] if len(values) == 1 else None


class Frame:
    """An ASGI application around another."""

    def __init__(self, app: AsgiApp, deps: RestDeps, larger_bodies: Mapping[str, int]) -> None:
        """Args:
        larger_bodies: paths whose body may be larger than REQUEST_BODY_LIMIT, in bytes.
        """
        self._app = app
        self._deps = deps
        settings: Settings = deps.settings
        self._body_limit = settings.request_body_limit_bytes
        self._larger_bodies = larger_bodies
        self._origins = frozenset(origin.encode("ascii", "ignore") for origin in settings.cors_allowed_origins)
        self._headers = (*_SECURITY_HEADERS, *((_HSTS,) if settings.tls_enabled else ()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request through the app.

        Cancellation: passed on at once; the request is still counted.
        """
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})  # the handshake is refused with 403
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_seconds = trio.current_time()
        exchange = self._open(scope)
        framed_send = self._framed(exchange, send)
        try:
            await self._run(exchange, scope, receive, framed_send)
        finally:
            self._record(exchange, scope, trio.current_time() - started_seconds)

    def _open(self, scope: Scope) -> Exchange:
        sent_id = _header(scope, b"x-request-id")
        usable = sent_id is not None and _REQUEST_ID.fullmatch(sent_id) is not None
        peer = scope.get("client")
        client = str(peer[0]) if peer else ""
        if self._deps.behind_listener:
            client = (_header(scope, b"x-forwarded-for") or b"").decode("latin-1")
            scope["client"] = (client, 0)
        exchange = Exchange(
            request_id=sent_id.decode("ascii") if usable and sent_id is not None else self._deps.new_request_id(),
            method=scope["method"],
            client=client,
            origin=_header(scope, b"origin"),
            body_bytes_max=self._larger_bodies.get(scope["path"], self._body_limit),
            any_origin=scope["path"] in _ANY_ORIGIN,
        )
        scope[EXCHANGE] = exchange
        return exchange

    async def _run(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        if exchange.method == "OPTIONS" and _header(scope, b"access-control-request-method") is not None:
            allowed = exchange.any_origin or self._allowed(exchange)
            await self._answer(receive, send, 204, _PREFLIGHT_HEADERS if allowed else (), b"")
            return
        length = _header(scope, b"content-length")
        if length is not None and length.isdigit() and int(length) > exchange.body_bytes_max:
            await self._refuse(exchange, receive, send, "REQUEST_BODY_TOO_LARGE")
            return
        try:
            await self._app(scope, self._counted(exchange, receive), send)
        except Exception:
            self._deps.logger.exception("request failed", request_id=exchange.request_id, method=exchange.method)
            if exchange.status:
                raise  # the head is out: only cutting the connection tells the client
            await self._refuse(exchange, receive, send, "INTERNAL_SERVER_ERROR")
            return
        if exchange.body_exceeded and not exchange.status:
            await self._refuse(exchange, receive, send, "REQUEST_BODY_TOO_LARGE")

    def _counted(self, exchange: Exchange, receive: Receive) -> Receive:
        """Return a receive that ends the request once its body exceeds the limit.

        The framework takes body bytes as fast as they come, whether or not a route reads them, and does not check
        the length of chunked bodies: without this a client could fill the memory.
        """

        async def counted() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                exchange.body_bytes += len(message.get("body", b""))
                if exchange.body_bytes > exchange.body_bytes_max:
                    exchange.body_exceeded = True
                    return {"type": "http.disconnect"}
            return message

        return counted

    def _framed(self, exchange: Exchange, send: Send) -> Send:
        async def framed(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message = {**message, "headers": self._completed(exchange, message.get("headers", ()))}
            await send(message)

        return framed

    def _completed(self, exchange: Exchange, headers: Any) -> list[tuple[bytes, bytes]]:
        """Return the answer's headers with those that every answer has; what the app set itself stays."""
        kept = [(bytes(name), bytes(value)) for name, value in headers]
        names = {name.lower() for name, _ in kept}
        made = [(b"x-request-id", exchange.request_id.encode("ascii")), *self._headers]
        if exchange.any_origin:
            made += ((b"access-control-allow-origin", b"*"), _EXPOSED_HEADERS)
            return [*kept, *((name, value) for name, value in made if name not in names)]
        if self._origins:
            made.append((b"vary", b"Origin"))
        if self._allowed(exchange):
            assert exchange.origin is not None
            made += ((b"access-control-allow-origin", exchange.origin), _EXPOSED_HEADERS)
        return [*kept, *((name, value) for name, value in made if name not in names)]

    def _allowed(self, exchange: Exchange) -> bool:
        return exchange.origin is not None and exchange.origin in self._origins

    async def _refuse(self, exchange: Exchange, receive: Receive, send: Send, code: str) -> None:
        body = problem_body(code, None, exchange.request_id)
        headers = (
            (b"content-type", CONTENT_TYPE.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        )
        await self._answer(receive, send, PROBLEMS[code].status, headers, body)

    async def _answer(
        self, receive: Receive, send: Send, status: int, headers: tuple[tuple[bytes, bytes], ...], body: bytes
    ) -> None:
        """Answer without the app, taking in and dropping what still arrives of the body.

        The server's queue of body parts is bounded and nobody else empties it: left full, it would block the very
        message that closes the connection.
        """
        with trio.move_on_after(_REFUSAL_SECONDS_MAX):
            async with trio.open_nursery() as nursery:

                async def discard() -> None:
                    while (await receive())["type"] != "http.disconnect":
                        pass

                nursery.start_soon(discard)
                await send({"type": "http.response.start", "status": status, "headers": headers})
                await send({"type": "http.response.body", "body": body})
                nursery.cancel_scope.cancel()

    def _record(self, exchange: Exchange, scope: Scope, seconds: float) -> None:
        group = route_group(exchange.route)
        method = exchange.method if exchange.method in _METHODS else "OTHER"
        # 499, as is customary: the client left before it was answered
        status = exchange.status or 499
        labels = (method, exchange.route, str(status), group)
        self._deps.metrics.http_requests.of(*labels).inc()
        self._deps.metrics.http_request_seconds.of(*labels).observe(seconds)
        write = self._deps.logger.debug if group in _PROBES and status < 500 else self._deps.logger.info
        write(
            "request",
            request_id=exchange.request_id,
            method=exchange.method,
            path=scope["path"],
            status=status,
            milliseconds=round(seconds * 1000, 3),
            client=exchange.client,
        )
