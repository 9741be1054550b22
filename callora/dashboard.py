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
from callora.actors.keyring import Keyring
from callora.actors.publisher import Publisher
from callora.actors.registry import VaultRegistry
from callora.actors.rollup import Rollup
from callora.actors.sessions import Sessions
from callora.actors.vaults import VaultOpening
from callora.config import Settings
from callora.http.gateway.addresses import Resolver
from callora.http.gateway.admission import Admission
from callora.http.rest.admin_keys import admin_keys_routes
from callora.http.rest.analytics import admin_usage_routes, analytics_routes
from callora.http.rest.api_admin import api_admin_routes
from callora.http.rest.api_import import import_routes
from callora.http.rest.apis import Shop, endpoint_routes, marketplace_routes, own_api_routes
from callora.http.rest.billing import billing_routes
from callora.http.rest.deps import RestDeps
from callora.http.rest.developers import developer_routes
from callora.http.rest.frame import Exchange
from callora.http.rest.health import Health, health_routes
from callora.http.rest.identity import Authenticator, Identity, People, TokenSettings
from callora.http.rest.key_desk import KeyDesk
from callora.http.rest.keys import keys_routes
from callora.http.rest.limits import PaceRule, RestLimiter
from callora.http.rest.login import login_routes, web_auth_routes
from callora.http.rest.operations import Audit, Doors, Operation, Routes
from callora.http.rest.operators import operator_routes
from callora.http.rest.pages import document_routes
from callora.http.rest.tokens import tokens_routes
from callora.http.rest.usage import usage_routes
from callora.http.rest.vaults import vaults_routes
from callora.ledger.clock import Clock
from callora.ledger.faults import StoreUnavailable
from callora.ledger.ids import Ids, UserId
from callora.ledger.tokens import Signing
from callora.logs import mask
from callora.metrics import Metrics
from callora.stellar.web_auth import WebAuth
from callora.store import accounts, operators
from callora.store.bridge import Database
from callora.store.reads import people
from callora.store.reads.keys import KeyReads
from callora.store.reads.vaults import VaultReads

Task = Callable[[], Awaitable[None]]

_LIMITED: Final = (
    "/api/billing",
    "/api/credits",
    "/api/usage",
    "/api/developers",
    "/api/vault",
    "/api/keys",
    "/api-keys",
    "/api/apis/{apiId}/keys",
    "/api/admin",
    "/api/auth",
    "/api/refresh-token",
)
NOTED_CHARS_MAX: Final = 1000
_MARKETPLACE: Final = ("/api/apis",)
"""Searching is open to everyone: it has a limit of its own, which browsing does not share with paying."""
TOKENS_SWEEP_SECONDS: Final = 3600.0
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
    limiter = _limiter(settings)
    intents = Intents(
        desk.database, desk.clock, desk.ids, desk.log, retention_seconds=settings.idempotency_retention_seconds
    )
    forget = partial(
        repeat, "rest intents", intents.drop_expired, settings.idempotency_sweep_interval_seconds, desk.log
    )
    parts = (
        _Part((health_routes(Health(deps), deps),), (("rest limiter", limiter.run), ("rest intents", forget))),
        _login(desk),
        _market(desk),
        _keys(desk),
        _usage(desk),
        _billing(desk),
    )
    operations: list[Operation] = []
    document = document_routes(lambda: operations, settings.app_version)
    for routes in (*(routes for part in parts for routes in part.routes), document):
        operations += routes.operations
    return Dashboard(
        operations=tuple(operations),
        doors=Doors(_authenticator(desk), limiter.admit, _audit(desk), intents),
        tasks=tuple(task for part in parts for task in part.tasks),
    )


def _limiter(settings: Settings) -> RestLimiter:
    pace = (settings.rest_rate_limit_max_requests, settings.rest_rate_limit_window_seconds)
    login_pace = (settings.login_rate_limit_max_requests, settings.login_rate_limit_window_seconds)
    return RestLimiter(
        (
            # Two counts, so that a wallet that asks and answers has as many logins as the setting says. Refreshing and
            # looking at sessions is ordinary use.
            PaceRule("challenge", _CHALLENGES, *login_pace, frozenset(("GET",))),
            PaceRule("login", _LOGINS, *login_pace, frozenset(("POST",))),
            PaceRule("rest", _LIMITED, *pace),
            PaceRule("marketplace", _MARKETPLACE, *pace),
        )
    )


@attrs.frozen
class _Part:
    """Nouns that are built together."""

    routes: tuple[Routes, ...]
    tasks: tuple[tuple[str, Task], ...] = ()


def _login(desk: Desk) -> _Part:
    """Sessions, and the ways to get one."""
    sessions = make_sessions(desk)
    tokens = token_settings(desk.settings)
    return _Part(
        (
            web_auth_routes(sessions, tokens, desk.clock, f"{_origin(desk)}/auth"),
            login_routes(sessions, tokens, desk.clock, people.SessionReads(desk.database)),
        ),
        (("sessions", partial(repeat, "sessions", sessions.purge, _PURGE_SECONDS, desk.log)),),
    )


def _market(desk: Desk) -> _Part:
    """Developers and what they offer."""
    publisher = Publisher(desk.database, desk.catalogue, desk.clock, desk.ids, desk.log)
    shop = Shop(publisher, desk.database, desk.resolver, desk.clock)
    return _Part(
        (
            developer_routes(publisher, desk.database),
            marketplace_routes(shop),
            own_api_routes(shop),
            endpoint_routes(shop),
            import_routes(shop),
            api_admin_routes(shop),
        )
    )


def _keys(desk: Desk) -> _Part:
    """Keys, their access tokens, and the vaults that they are paid from."""
    opening = VaultOpening(desk.database, desk.clock, desk.ids)
    keyring = Keyring(desk.database, desk.catalogue, desk.clock, desk.ids, os.urandom, signing(desk.settings), desk.log)
    vault_reads = VaultReads(desk.database)
    key_desk = KeyDesk(KeyReads(desk.database), keyring, desk.clock)
    routes = (
        keys_routes(key_desk, opening, vault_reads),
        tokens_routes(key_desk),
        vaults_routes(opening, vault_reads),
        admin_keys_routes(key_desk),
    )
    sweep = partial(repeat, "expired tokens", keyring.forget_expired_tokens, TOKENS_SWEEP_SECONDS, desk.log)
    return _Part(routes, (("expired tokens", sweep),))


def _usage(desk: Desk) -> _Part:
    """What was called, and the sums of it."""
    rollup = Rollup(
        desk.database,
        desk.clock,
        desk.metrics,
        desk.log,
        interval_seconds=desk.settings.usage_rollup_interval_seconds,
    )
    return _Part(
        (
            usage_routes(desk.database, desk.clock),
            analytics_routes(desk.database, desk.clock),
            admin_usage_routes(desk.database, desk.clock),
        ),
        (("rollup", rollup.run),),
    )


def _billing(desk: Desk) -> _Part:
    """Charges without a call, and what operators do."""
    billing = Billing(desk.database, desk.registry, desk.clock, desk.ids)
    return _Part(
        (
            billing_routes(billing, desk.database),
            operator_routes(desk.database, desk.registry, desk.catalogue, desk.admission, desk.clock),
        ),
        (("billing", billing.run),),
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


def signing(settings: Settings) -> Signing | None:
    """Return what access tokens for calls are signed with; None where JWT_SECRET is not set."""
    if settings.jwt_secret is None:
        return None
    return Signing(settings.jwt_secret.get_secret_value(), settings.jwt_issuer, settings.jwt_audience)
