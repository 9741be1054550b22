"""Who asks over REST: what a request presents, and whom it is taken for.

A person comes with an access token: one of ours, bound to a session that can be ended at once, or one of an outside
issuer that shares the secret. An operator comes with the admin key, or with a token whose role is admin. A service
comes with the service token, which opens what is for services and nothing else. API keys, their tokens and refresh
tokens open nothing here.
"""

import hashlib
import hmac
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Any, Final, Literal, TypeGuard

import attrs
import jwt
from pydantic import SecretStr
from werkzeug.datastructures import Headers

from callora.http.problems import ProblemRaised
from callora.ledger.clock import Clock
from callora.ledger.ids import UserId

ALGORITHM: Final = "HS256"
ACCESS_SECONDS: Final = 900
SUBJECT_CHARS_MAX: Final = 255
_CHALLENGE: Final = {"WWW-Authenticate": "Bearer"}
_SCHEME: Final = "bearer"
_TIME_MAX: Final = 1e12
"""About 30 000 years."""
_SHOWN_TIME_MAX: Final = 253_402_300_799
"""The last second that has a date."""


@attrs.frozen
class Identity:
    """Whom a request is taken for."""

    kind: Literal["user", "admin", "service"]
    user_id: UserId | None
    """None for the admin key and the service token, which are nobody in particular."""
    session_id: str | None = None
    """The session of a token of ours."""
    wallet_address: str | None = None
    expires_at: datetime | None = None
    """When its token ends; None where there is none."""

    @property
    def actor(self) -> str:
        """How the audit names him."""
        if self.user_id is not None:
            return f"user:{self.user_id}"
        return "service-token" if self.kind == "service" else "admin-key"


@attrs.frozen
class TokenSettings:
    """What tokens are signed and checked with."""

    secret: SecretStr
    issuer: str | None
    """`iss` of our tokens; where set, the only one that is taken."""
    audience: str | None


@attrs.frozen
class People:
    """What the authenticator asks of those who know people. Each raises StoreUnavailable."""

    user_of_subject: Callable[[str], Awaitable[UserId]]
    """The user of an outside issuer's subject, or with that id; made on first sight."""
    session_alive: Callable[[str, UserId], Awaitable[bool]]
    """Whether a session of this user is neither ended nor expired."""


def bearer_token(header: str | None) -> str | None:
    """Return the token of an Authorization header, None where there is none of the scheme Bearer."""
    scheme, _, token = (header or "").partition(" ")
    return token.strip() or None if scheme.lower() == _SCHEME else None


def same_secret(given: str, expected: SecretStr | None) -> bool:
    """Tell whether a text is the secret, in the same time for every wrong one, its length included.

    Args:
        expected: None is never given.
    """
    told = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
    wanted = hashlib.sha256((expected.get_secret_value() if expected else "").encode()).digest()
    return hmac.compare_digest(told, wanted) and expected is not None


def require_token(header: str | None, expected: SecretStr | None) -> None:
    """Return when the Authorization header carries the expected Bearer token.

    Args:
        expected: the token; None lets nobody in.

    Raises:
        ProblemRaised: UNAUTHORIZED, with WWW-Authenticate.
    """
    if not same_secret(bearer_token(header) or "", expected):
        raise ProblemRaised("UNAUTHORIZED", headers=_CHALLENGE)


def mint_access_token(
    settings: TokenSettings,
    clock: Clock,
    user_id: UserId,
    session_id: str,
    wallet_address: str | None,
    seconds: int = ACCESS_SECONDS,
) -> str:
    """Return an access token of ours for a session, good for this long or until the session ends."""
    now = clock.now()
    claims: dict[str, Any] = {
        "sub": user_id,
        "userId": user_id,
        "sid": session_id,
        "type": "access",
        "iat": int(now.timestamp()),
        "exp": int((now + timedelta(seconds=seconds)).timestamp()),
    }
    if wallet_address is not None:
        claims["walletAddress"] = wallet_address
    if settings.issuer is not None:
        claims["iss"] = settings.issuer
    if settings.audience is not None:
        claims["aud"] = settings.audience
    return jwt.encode(claims, settings.secret.get_secret_value(), ALGORITHM)


class Authenticator:
    """Answers who asks."""

    def __init__(
        self,
        *,
        tokens: TokenSettings | None,
        admin_key: SecretStr | None,
        admin_networks: tuple[IPv4Network | IPv6Network, ...],
        service_token: SecretStr | None,
        user_header_allowed: bool,
        people: People,
        clock: Clock,
    ) -> None:
        """Args:
        tokens: None: no token is taken.
        admin_networks: where operators may come from; empty is anywhere.
        service_token: None: no service is let in.
        user_header_allowed: whether X-User-Id names a user, which it must not in production.
        """
        self._tokens = tokens
        self._admin_key = admin_key
        self._admin_networks = admin_networks
        self._service_token = service_token
        self._user_header_allowed = user_header_allowed
        self._people = people
        self._clock = clock

    async def user(self, headers: Headers) -> Identity:
        """Return the person who asks.

        Raises:
            ProblemRaised: 401, with the code of what is wrong with the credentials.
            StoreUnavailable.
        """
        identity = await self.optional(headers)
        if identity is None:
            raise ProblemRaised("UNAUTHORIZED", "Log in and send the access token", headers=_CHALLENGE)
        return identity

    async def optional(self, headers: Headers) -> Identity | None:
        """Return the person who asks, None where no credentials were sent; wrong ones are refused all the same."""
        authorizations = headers.getlist("Authorization")
        if not authorizations:
            return await self._named(headers.get("X-User-Id"))
        if len(authorizations) > 1:
            raise _unauthorized("INVALID_AUTH_HEADER", "Authorization was sent more than once")
        return await self._bearer(authorizations[0])

    async def admin(self, headers: Headers, client: str) -> Identity:
        """Return the operator who asks: from an allowed address, with the admin key, else with an admin's token.

        Raises:
            ProblemRaised: 403 IP_NOT_ALLOWED, 401, or 403 FORBIDDEN for a person who is no operator.
            StoreUnavailable.
        """
        if self._admin_networks and not self._from_allowed(client):
            raise ProblemRaised("IP_NOT_ALLOWED", "Operators may not come from this address")
        key = headers.get("X-Admin-Api-Key")
        if key is not None:
            if not same_secret(key, self._admin_key):
                raise ProblemRaised("UNAUTHORIZED", "The admin key is not valid", headers=_CHALLENGE)
            return Identity("admin", None)
        identity = await self.user(headers)
        if identity.kind != "admin":
            raise ProblemRaised("FORBIDDEN", "Operators only")
        return identity

    def service(self, headers: Headers) -> Identity:
        """Return the service that asks: with the service token, sent once.

        Raises:
            ProblemRaised: UNAUTHORIZED, the same whether the token is wrong or none is taken here.
        """
        authorizations = headers.getlist("Authorization")
        require_token(authorizations[0] if len(authorizations) == 1 else None, self._service_token)
        return Identity("service", None)

    def _from_allowed(self, client: str) -> bool:
        try:
            address = ip_address(client)
        except ValueError:
            return False
        # How a socket for both families shows an IPv4 client
        address = getattr(address, "ipv4_mapped", None) or address
        return any(address in network for network in self._admin_networks)

    async def _named(self, subject: str | None) -> Identity | None:
        subject = (subject or "").strip()
        if not subject or not self._user_header_allowed:
            return None
        if len(subject) > SUBJECT_CHARS_MAX or not subject.isprintable():
            raise _unauthorized("INVALID_TOKEN", "X-User-Id is not valid")
        return Identity("user", await self._people.user_of_subject(subject))

    async def _bearer(self, authorization: str) -> Identity:
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != _SCHEME:
            raise _unauthorized("INVALID_AUTH_HEADER", "Authorization must be `Bearer` and an access token")
        token = token.strip()
        if not token:
            raise _unauthorized("MISSING_TOKEN", "Authorization carries no token")
        claims = self._claims(token)
        if claims.get("type", "access") != "access":
            raise _unauthorized("INVALID_TOKEN", "This is no access token")
        subject = claims.get("userId", claims.get("sub"))
        if not _is_subject(subject):
            raise _unauthorized("MISSING_CLAIMS", "The token names no user: `userId` or `sub`")
        session_id = claims.get("sid")
        if session_id is None:
            user_id = await self._people.user_of_subject(subject.strip())
        else:
            user_id = UserId(subject)
            if not isinstance(session_id, str) or not await self._people.session_alive(session_id, user_id):
                raise _unauthorized("REVOKED_TOKEN", "The session has ended; log in again")
        wallet = claims.get("walletAddress")
        return Identity(
            "admin" if claims.get("role") == "admin" else "user",
            user_id,
            session_id,
            wallet if isinstance(wallet, str) else None,
            datetime.fromtimestamp(min(claims["exp"], _SHOWN_TIME_MAX), UTC),
        )

    def _claims(self, token: str) -> dict[str, Any]:
        if self._tokens is None:
            raise _unauthorized("INVALID_TOKEN", "No tokens are taken here: JWT_SECRET is not set")
        settings = self._tokens
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                settings.secret.get_secret_value(),
                algorithms=[ALGORITHM],
                issuer=settings.issuer,
                audience=settings.audience,
                options={
                    "require": ["exp"],
                    "verify_exp": False,  # by our clock, below
                    "verify_nbf": False,
                    "verify_iat": False,
                    "verify_sub": False,
                    "verify_aud": settings.audience is not None,
                },
            )
        except jwt.MissingRequiredClaimError as error:
            raise _unauthorized("MISSING_CLAIMS", f"The token has no `{error.claim}`") from None
        except jwt.InvalidTokenError:
            raise _unauthorized("INVALID_TOKEN", "The access token is not valid") from None
        now = self._clock.now().timestamp()
        expires, not_before = claims["exp"], claims.get("nbf", 0)
        if not _is_time(expires) or not _is_time(not_before):
            raise _unauthorized("INVALID_TOKEN", "The access token's times are not seconds since 1970")
        if expires <= now:
            raise _unauthorized("TOKEN_EXPIRED", "The access token has expired; refresh it")
        if not_before > now:
            raise _unauthorized("TOKEN_NOT_ACTIVE", "The access token is not active yet")
        return claims


def _is_time(value: object) -> TypeGuard[int | float]:
    """Tell whether a claim is a moment. NaN, infinity and what no clock will show are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _TIME_MAX


def _is_subject(value: object) -> TypeGuard[str]:
    """Tell whether a claim names someone: a text that PostgreSQL can hold."""
    if not isinstance(value, str) or not value.strip() or len(value) > SUBJECT_CHARS_MAX:
        return False
    return "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _unauthorized(code: str, message: str) -> ProblemRaised:
    return ProblemRaised(code, message, headers={"WWW-Authenticate": 'Bearer error="invalid_token"'})
