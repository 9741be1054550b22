"""The dashboard's REST: everything behind its routes is built here and given to them, a noun at a time."""

import os
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Final

import attrs
import trio
from structlog.typing import FilteringBoundLogger

from callora.actors.billing import Billing
from callora.actors.catalogue import Catalogue
from callora.actors.expiry import repeat
from callora.actors.intents import Intents
from callora.actors.registry import VaultRegistry
from callora.actors.rollup import Rollup
from callora.actors.sessions import Sessions
from callora.config import Settings
from callora.http.gateway.addresses import Resolver
from callora.http.gateway.admission import Admission
from callora.http.rest.analytics import admin_usage_routes, analytics_routes
from callora.http.rest.billing import billing_routes
from callora.http.rest.deps import RestDeps
from callora.http.rest.frame import Exchange
from callora.http.rest.health import Health, health_routes
from callora.http.rest.identity import Authenticator, Identity, People, TokenSettings
from callora.http.rest.limits import PaceRule, RestLimiter
from callora.http.rest.login import login_routes, web_auth_routes
from callora.http.rest.operations import Audit, Doors, Operation, Routes
from callora.http.rest.operators import operator_routes
from callora.http.rest.pages import document_routes
from callora.http.rest.usage import usage_routes
from callora.ledger.clock import Clock
from callora.ledger.faults import StoreUnavailable
from callora.ledger.ids import Ids, UserId
from callora.logs import mask
from callora.metrics import Metrics
from callora.stellar.web_auth import WebAuth
from callora.store import accounts, operators
from callora.store.bridge import Database
from callora.store.reads import people

Task = Callable[[], Awaitable[None]]

_LIMITED: Final = (
    "/api/billing",
    "/api/credits",
    "/api/usage",
    "/api/developers",
    "/api/vault",
    "/api/keys",
    "/api-keys",
    "/api/admin",
    "/api/auth",
    "/api/refresh-token",
)
NOTED_CHARS_MAX: Final = 1000
_CHALLENGES: Final = ("/auth", "/api/auth/challenge")
_LOGINS: Final = ("/auth", "/api/auth/wallet")
_PURGE_SECONDS: Final = 600.0
AUDIT_SECONDS_MAX: Final = 5.0
"""An operator is answered when his access is noted; this is how long that may take."""


@attrs.frozen
class Desk:
    """What the nouns behind the routes work with."""

    settings: Settings
    database: Database
    registry: VaultRegistry
    catalogue: Catalogue
    admission: Admission
    resolver: Resolver
    port: int
    """Where this process listens."""
    clock: Clock
    ids: Ids
    metrics: Metrics
    log: FilteringBoundLogger


@attrs.frozen
class Dashboard:
    """The routes, what stands before them, and what runs beside them."""

    operations: tuple[Operation, ...]
    doors: Doors
    tasks: tuple[tuple[str, Task], ...]


def make_dashboard(desk: Desk, deps: RestDeps) -> Dashboard:
    """Return the REST surface of a service; nothing is started."""
    settings = desk.settings
    sweep_seconds = settings.idempotency_sweep_interval_seconds
    login_pace = (settings.login_rate_limit_max_requests, settings.login_rate_limit_window_seconds)
    limiter = RestLimiter(
        (
            # Two counts, so that a wallet that asks and answers has as many logins as the setting says. Refreshing and
            # looking at sessions is ordinary use.
            PaceRule("challenge", _CHALLENGES, *login_pace, frozenset(("GET",))),
            PaceRule("login", _LOGINS, *login_pace, frozenset(("POST",))),
            PaceRule("rest", _LIMITED, settings.rest_rate_limit_max_requests, settings.rest_rate_limit_window_seconds),
        )
    )
    intents = Intents(desk.database, desk.clock, desk.ids, retention_seconds=settings.idempotency_retention_seconds)
    billing = Billing(desk.database, desk.registry, desk.clock, desk.ids)
    doors = Doors(_authenticator(desk), limiter.admit, _audit(desk), intents)
    sessions = make_sessions(desk)
    tokens = token_settings(settings)
    nouns: list[Routes] = [
        health_routes(Health(deps), deps),
        billing_routes(billing, desk.database),
        operator_routes(desk.database, desk.registry, desk.catalogue, desk.admission, desk.clock),
        web_auth_routes(sessions, tokens, desk.clock, f"{_origin(desk)}/auth"),
        login_routes(sessions, tokens, desk.clock, people.SessionReads(desk.database)),
        usage_routes(desk.database, desk.clock),
        analytics_routes(desk.database, desk.clock),
        admin_usage_routes(desk.database, desk.clock),
    ]
    operations: list[Operation] = []
    nouns.append(document_routes(lambda: operations, settings.app_version))
    operations += (operation for noun in nouns for operation in noun.operations)
    rollup = Rollup(
        desk.database, desk.clock, desk.metrics, desk.log, interval_seconds=settings.usage_rollup_interval_seconds
    )
    return Dashboard(
        operations=tuple(operations),
        doors=doors,
        tasks=(
            ("rest limiter", limiter.run),
            ("rollup", rollup.run),
            ("billing", billing.run),
            ("rest intents", partial(repeat, "rest intents", intents.drop_expired, sweep_seconds, desk.log)),
            ("sessions", partial(repeat, "sessions", sessions.purge, _PURGE_SECONDS, desk.log)),
        ),
    )


def make_sessions(desk: Desk) -> Sessions:
    """Return the logins of a service."""
    settings = desk.settings
    seed = settings.auth_signing_seed
    domain = _domain(desk)
    return Sessions(
        database=desk.database,
        clock=desk.clock,
        ids=desk.ids,
        random_bytes=os.urandom,
        domain=domain,
        web_auth=WebAuth.make(seed.get_secret_value(), domain, settings.stellar_network) if seed is not None else None,
        log=desk.log,
    )


def _domain(desk: Desk) -> str:
    """Return the domain that wallets show. It is never what a request calls its Host: anyone may call it anything."""
    return desk.settings.auth_home_domain or f"localhost:{desk.port}"


def _origin(desk: Desk) -> str:
    """Return the origin under which wallets reach us: HTTPS, but for this machine."""
    domain = _domain(desk)
    local = domain.partition(":")[0] in ("localhost", "127.0.0.1") and not desk.settings.tls_enabled
    return f"{'http' if local else 'https'}://{domain}"


def _authenticator(desk: Desk) -> Authenticator:
    settings = desk.settings

    async def user_of_subject(subject: str) -> UserId:
        return await accounts.ensure_subject(desk.database, UserId(desk.ids.uuid7()), subject, desk.clock.now())

    async def session_alive(session_id: str, user_id: UserId) -> bool:
        return await people.session_alive(desk.database, session_id, user_id, desk.clock.now())

    return Authenticator(
        tokens=token_settings(settings),
        admin_key=settings.admin_api_key,
        admin_networks=settings.admin_ip_allowed_ranges,
        user_header_allowed=not settings.is_production,
        people=People(user_of_subject, session_alive),
        clock=desk.clock,
    )


def _audit(desk: Desk) -> Audit:
    async def audit(
        identity: Identity | None, operation: Operation, exchange: Exchange, status: int, parameters: Mapping[str, str]
    ) -> None:
        target = exchange.audit_target or next(iter(parameters.values()), None)
        details = {**parameters, **exchange.audit_details}
        with trio.move_on_after(AUDIT_SECONDS_MAX, shield=True) as scope:
            await operators.note_access(
                desk.database,
                operators.Access(
                    audit_id=desk.ids.uuid7(),
                    at=desk.clock.now(),
                    actor=identity.actor if identity is not None else "unknown",
                    action=operation.operation_id,
                    target=_noted(target) if target is not None else None,
                    client_address=exchange.client,
                    request_id=mask(exchange.request_id),
                    status=status,
                    details={name: _noted(text) for name, text in details.items()},
                ),
            )
        if scope.cancelled_caught:
            raise StoreUnavailable("the audit could not be written in time")

    return audit


def _noted(text: str) -> str:
    """Return a text as the audit may hold it for ever: without secrets that were pasted into it, and not long."""
    return mask(text).replace("\0", "�")[:NOTED_CHARS_MAX]


def token_settings(settings: Settings) -> TokenSettings | None:
    """Return what access tokens are signed with; None where JWT_SECRET is not set."""
    if settings.jwt_secret is None:
        return None
    return TokenSettings(settings.jwt_secret, settings.jwt_issuer, settings.jwt_audience)
