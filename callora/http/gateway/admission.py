"""Admission: the checks before a call costs anything, cheapest and most private first, each with its own refusal.

The order is part of the contract (docs/architecture.md): nothing is charged before the last check, a 401 or 403 uses no
rate slot, and who has no key learns nothing about which APIs exist.
"""

import math
import re
from collections.abc import Mapping
from datetime import datetime
from ipaddress import IPv6Address, ip_address
from typing import Final, Protocol, get_args

import attrs
import trio

from callora.actors.breaker import BREAKERS_MAX, Breaker, BreakerSettings, Ticket
from callora.actors.catalogue import Catalogue, Ended
from callora.actors.limiter import KeyPace, Limiter
from callora.actors.shared_limiter import SharedLimiter
from callora.http.gateway.heads import RequestHead
from callora.http.problems import Details
from callora.ledger.faults import RateStoreUnavailable
from callora.ledger.ids import ApiId
from callora.ledger.keys import KEY_CHARS, KeyRecord, is_well_formed
from callora.ledger.limits import Standing
from callora.ledger.pricing import AmbiguousPath, ApiRecord, Endpoint, Price
from callora.ledger.tokens import is_token_shaped
from callora.ledger.values import value
from callora.metrics import Metrics
from callora.outbound.addresses import Resolver, Target, TargetBlocked, TargetUnresolved, parse_base_url

CALL_PREFIX: Final = b"/v1/call/"
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_IDEMPOTENCY_KEY: Final = re.compile(rb"[\x21-\x7e]{1,255}")
_DRAIN_RETRY_SECONDS: Final = 5
_PACE_RETRY_SECONDS: Final = 1
_UPSTREAMS_MAX: Final = 20_000
_CHECKED_SECONDS: Final = 5.0
"""How long an upstream's check is remembered here; the resolver remembers, and the connection is pinned, by itself."""


class Refused(Exception):
    """A call that ends with a problem document. Nothing was charged unless `charge` says so."""

    def __init__(
        self,
        code: str,
        message: str | None = None,
        *,
        details: Details | None = None,
        retry_seconds: float | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(code)
        self.code = code
        self.message = message
        self.details = details
        self.retry_seconds = retry_seconds
        """Becomes Retry-After, rounded up; at least 1."""
        self.close = close
        """True: the connection ends with the answer."""


@value(eq=False)
class Caller:
    """Who calls."""

    key: KeyRecord
    pace: KeyPace
    key_in_authorization: bool


@value(eq=False)
class Offer:
    """What is called, and what it costs now."""

    api: ApiRecord
    endpoint: Endpoint
    price: Price
    path: bytes
    """The path below the API, as sent."""


@attrs.frozen(slots=True, eq=False)
class Upstream:
    """Where an API's calls go."""

    target: Target
    authority: bytes
    """Its Host header."""
    base_path: bytes
    """What every call's path is appended to."""
    good_until: float
    """On Trio's clock, when the target is checked again."""


class TokenKeys(Protocol):
    """Who knows access tokens."""

    async def key(self, text: bytes) -> KeyRecord:
        """Return the key of a token, narrowed to what the token may do.

        Raises:
            Refused: INVALID_TOKEN, TOKEN_EXPIRED or REVOKED_TOKEN.
            StoreUnavailable: the token is not known here and cannot be read now.
        """
        ...


class Admission:
    """Answers whether a call may go on."""

    def __init__(
        self,
        *,
        catalogue: Catalogue,
        limiter: Limiter,
        shared_limiter: SharedLimiter | None,
        resolver: Resolver,
        breaker_settings: BreakerSettings,
        trusted_proxies: int,
        metrics: Metrics,
        tokens: TokenKeys,
    ) -> None:
        self._catalogue = catalogue
        self._tokens = tokens
        self._limiter = limiter
        self.shared_limiter: Final = shared_limiter
        """None where each process has its own rate limits, and no call waits for a store of them."""
        self._resolver = resolver
        self._breaker_settings = breaker_settings
        self._trusted_proxies = trusted_proxies
        self._found, self._missed = (metrics.tally(metrics.api_key_lookups, found) for found in ("hit", "miss"))
        self._ended = {ended: metrics.tally(metrics.api_key_lookups, ended) for ended in get_args(Ended)}
        self._breakers: dict[ApiId, Breaker] = {}
        self._upstreams: dict[str, Upstream] = {}
        self.draining = False

    async def identify(self, request: RequestHead, now: float) -> tuple[KeyRecord, bool]:
        """Return the caller's key and whether it came in Authorization; checks its form, that it lives, nothing else.

        Args:
            now: on Trio's clock, here and below.

        Raises:
            Refused: SERVICE_UNAVAILABLE, UNAUTHORIZED, API_KEY_DISABLED, API_KEY_EXPIRED or API_KEY_REVOKED; for an
                access token INVALID_TOKEN, TOKEN_EXPIRED or REVOKED_TOKEN as well.
            StoreUnavailable: the key is not known here and cannot be read now.
        """
        if self.draining:
            raise Refused(
                "SERVICE_UNAVAILABLE", "The service is restarting", retry_seconds=_DRAIN_RETRY_SECONDS, close=True
            )
        if asks_for_another_protocol(request):
            raise Refused("UPGRADE_NOT_SUPPORTED", close=True)
        text, in_authorization = _presented_key(request)
        # What is kept was well-formed when it was loaded; the length bounds what is hashed.
        key = self._catalogue.key_now(text, now) if len(text) == KEY_CHARS else None
        if key is None:
            if is_well_formed(text):
                key = await self._catalogue.key(text)
            elif in_authorization and is_token_shaped(text):
                key = await self._tokens.key(text)
            else:
                raise Refused("UNAUTHORIZED", "The API key does not have the form of a key, or is mistyped")
        if key is None:
            self._missed.value += 1
            raise Refused("UNAUTHORIZED", "The API key is not known")
        ended = self._catalogue.end_of(key)
        if ended is not None:
            self._ended[ended].value += 1
            raise Refused(f"API_KEY_{ended.upper()}")
        self._found.value += 1
        return key, in_authorization

    async def resolve(self, request: RequestHead, now: float, at: datetime) -> Offer:
        """Return what is called, at its price of the instant `at`.

        Raises:
            Refused: NOT_FOUND, or BAD_REQUEST for a path that could be charged two ways.
            StoreUnavailable: the API is not known here and cannot be read now.
        """
        name, slash, below = request.path.removeprefix(CALL_PREFIX).partition(b"/")
        text = name.decode("ascii")
        api = self._catalogue.api_now(text, now)
        if api is None and _NAME.fullmatch(text) is not None:
            api = await self._catalogue.api(text)
        if api is None or not api.active:
            raise Refused("NOT_FOUND", "No such API")
        path = slash + below
        try:
            endpoint = api.endpoints.match(request.method, path)
        except AmbiguousPath as error:
            raise Refused("BAD_REQUEST", str(error)) from error
        price = endpoint.price_at(at) if endpoint is not None else None
        if endpoint is None or price is None:
            raise Refused("NOT_FOUND", "The API offers no such endpoint")
        return Offer(api, endpoint, price, path)

    def authorize(self, key: KeyRecord, offer: Offer, request: RequestHead, peer: str) -> None:
        """Check that the key may be used for this, from here.

        Raises:
            Refused: API_ACCESS_FORBIDDEN, PLAN_ENDPOINT_NOT_ALLOWED, ENDPOINT_FORBIDDEN, SCOPE_REQUIRED, IP_NOT_ALLOWED
                or VAULT_SUSPENDED.
        """
        if key.allowed_apis is not None and offer.api.api_id not in key.allowed_apis:
            raise Refused("API_ACCESS_FORBIDDEN")
        if key.plan_apis is not None and offer.api.api_id not in key.plan_apis:
            raise Refused("PLAN_ENDPOINT_NOT_ALLOWED", details={"apis": [offer.api.api_id]})
        if key.allowed_endpoints is not None and offer.endpoint.endpoint_id not in key.allowed_endpoints:
            raise Refused("ENDPOINT_FORBIDDEN")
        scope = offer.endpoint.required_scope
        if scope is not None and scope not in key.scopes and "*" not in key.scopes:
            raise Refused("SCOPE_REQUIRED", details={"scope": scope})
        if key.allowed_networks is not None:
            try:
                address = ip_address(client_address(request, peer, self._trusted_proxies))
            except ValueError:
                raise Refused("IP_NOT_ALLOWED") from None
            if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
                address = address.ipv4_mapped  # how a socket for both families shows an IPv4 client
            if not any(address in network for network in key.allowed_networks):
                raise Refused("IP_NOT_ALLOWED")
        if key.standing == "suspended":
            raise Refused("VAULT_SUSPENDED")

    def enter(self, key: KeyRecord) -> KeyPace:
        """Count the call as running; whoever enters leaves.

        Raises:
            Refused: CONCURRENCY_LIMIT_EXCEEDED.
        """
        pace = self._limiter.enter(key)
        if pace is None:
            raise Refused("CONCURRENCY_LIMIT_EXCEEDED", retry_seconds=1)
        return pace

    def leave(self, pace: KeyPace) -> None:
        """Count the call as ended."""
        self._limiter.leave(pace)

    def take_pace(self, key: KeyRecord, pace: KeyPace, now: float) -> None:
        """Take the call from the key's and the user's rate limit.

        Raises:
            Refused: TOO_MANY_REQUESTS, which takes nothing.
        """
        refused = self._limiter.admit(key, pace, now)
        if refused is not None:
            raise _too_many(refused.which, refused.pace.limit, refused.pace.reset_seconds)

    async def take_shared_pace(self, key: KeyRecord, pace: KeyPace, call_id: str) -> Standing | None:
        """Take the call from the key's and the user's rate limit, shared by all processes; return where they stand.

        Args:
            call_id: no other call has the same.

        Returns:
            None where the store did not decide and this process's own limits are to.

        Raises:
            Refused: SERVICE_UNAVAILABLE; the store did not decide, and no call passes without it.
        """
        assert self.shared_limiter is not None
        try:
            return await self.shared_limiter.take(key, pace, call_id)
        except RateStoreUnavailable:
            if self.shared_limiter.opens:
                return None
            raise Refused(
                "SERVICE_UNAVAILABLE", "Rate limits cannot be told now", retry_seconds=_PACE_RETRY_SECONDS
            ) from None

    def check_standing(self, standing: Standing) -> None:
        """Refuse the call where its shared limits did.

        Raises:
            Refused: TOO_MANY_REQUESTS, which took nothing.
        """
        if standing.refused:
            raise _too_many(standing.which, standing.limit.calls, standing.reset_at - trio.current_time())

    def idempotency_key(self, request: RequestHead) -> str | None:
        """Return the request's idempotency key, or None where it has none.

        Raises:
            Refused: INVALID_IDEMPOTENCY_KEY.
        """
        values = request.values(b"idempotency-key")
        if not values:
            return None
        if len(values) > 1 or _IDEMPOTENCY_KEY.fullmatch(values[0]) is None:
            raise Refused("INVALID_IDEMPOTENCY_KEY")
        return values[0].decode("ascii")

    def admit_upstream(self, api_id: ApiId, now: float) -> Ticket:
        """Return the right to call the API's upstream once; whoever has it ends it.

        Raises:
            Refused: UPSTREAM_UNAVAILABLE.
        """
        ticket = (self._breakers.get(api_id) or self.breaker(api_id)).admit(now)
        if isinstance(ticket, Ticket):
            return ticket
        raise Refused("UPSTREAM_UNAVAILABLE", retry_seconds=ticket)

    def breaker(self, api_id: ApiId) -> Breaker:
        """Return the API's breaker in this process, made where there is none."""
        breaker = self._breakers.get(api_id)
        if breaker is None:
            if len(self._breakers) >= BREAKERS_MAX:
                self._breakers = {known: each for known, each in self._breakers.items() if each.state != "closed"}
            breaker = self._breakers[api_id] = Breaker(self._breaker_settings)
        return breaker

    def breaker_states(self) -> Mapping[ApiId, Breaker]:
        """Return every breaker that has been asked, for the metrics."""
        return self._breakers

    async def upstream(self, api: ApiRecord, now: float) -> Upstream:
        """Return where the API's upstream is, resolved and allowed a moment ago; connecting checks again.

        Raises:
            Refused: UPSTREAM_TARGET_BLOCKED or BAD_GATEWAY; no socket was opened.
        """
        upstream = self._upstreams.get(api.base_url)
        if upstream is not None and now < upstream.good_until:
            return upstream
        try:
            target = upstream.target if upstream is not None else parse_base_url(api.base_url)
            if self._resolver.known(target) is None:
                await self._resolver.resolve(target)
        except (TargetBlocked, ValueError) as error:
            raise Refused("UPSTREAM_TARGET_BLOCKED") from error
        except TargetUnresolved as error:
            raise Refused("BAD_GATEWAY") from error
        if len(self._upstreams) >= _UPSTREAMS_MAX:
            self._upstreams.clear()
        upstream = self._upstreams[api.base_url] = Upstream(
            target, target.authority.encode("ascii"), target.base_path.encode("ascii"), now + _CHECKED_SECONDS
        )
        return upstream


def _too_many(which: str, limit: int, reset_seconds: float) -> Refused:
    seconds = max(1, math.ceil(reset_seconds))
    details: Details = {"limitedBy": which, "limit": limit, "remaining": 0, "retryAfter": seconds}
    return Refused("TOO_MANY_REQUESTS", details=details, retry_seconds=seconds)


def client_address(request: RequestHead, peer: str, trusted_proxies: int) -> str:
    """Return who asks: the peer, or the entry of X-Forwarded-For that the outermost of our own proxies wrote.

    Args:
        trusted_proxies: how many proxies in front of Callora are ours; with 0 the header is ignored.
    """
    if trusted_proxies:
        entries = b",".join(request.values(b"x-forwarded-for")).decode("latin-1").split(",")
        if len(entries) >= trusted_proxies:
            return entries[-trusted_proxies].strip()
    return peer


def asks_for_another_protocol(request: RequestHead) -> bool:
    """Tell whether a request is of no use in HTTP/1.1. An offer of h2c may be ignored: RFC 9110 §7.8."""
    return request.upgrade and b"h2c" not in (request.first(b"upgrade") or b"").lower()


def _presented_key(request: RequestHead) -> tuple[bytes, bool]:
    key = request.first(b"x-api-key")
    if key is not None:
        if len(request.values(b"x-api-key")) > 1:
            raise Refused("UNAUTHORIZED", "X-Api-Key was sent more than once")
        return key, False
    authorization = request.first(b"authorization")
    if authorization is None:
        raise Refused("UNAUTHORIZED", "Send an API key in X-Api-Key, or in Authorization: Bearer")
    scheme, _, token = authorization.partition(b" ")
    if scheme.lower() != b"bearer" or len(request.values(b"authorization")) > 1:
        raise Refused("UNAUTHORIZED", "Authorization must be `Bearer` and an API key")
    return token.strip(), True
