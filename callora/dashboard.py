"""The dashboard's REST: everything behind its routes is built here and given to them, a noun at a time."""

import os
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Final

import attrs
import trio
from structlog.typing import FilteringBoundLogger

from callora.actors.catalogue import Catalogue
from callora.actors.expiry import repeat
from callora.actors.keyring import Keyring
from callora.actors.registry import VaultRegistry
from callora.actors.vaults import VaultOpening
from callora.config import Settings
from callora.http.gateway.addresses import Resolver
from callora.http.gateway.admission import Admission
from callora.http.rest.admin_keys import admin_keys_routes
from callora.http.rest.deps import RestDeps
from callora.http.rest.frame import Exchange
from callora.http.rest.health import Health, health_routes
from callora.http.rest.identity import Authenticator, Identity, People, TokenSettings
from callora.http.rest.key_desk import KeyDesk
from callora.http.rest.keys import keys_routes
from callora.http.rest.limits import PaceRule, RestLimiter
from callora.http.rest.operations import Audit, Doors, Operation, Routes
from callora.http.rest.pages import document_routes
from callora.http.rest.tokens import tokens_routes
from callora.http.rest.vaults import vaults_routes
from callora.ledger.clock import Clock
from callora.ledger.faults import StoreUnavailable
from callora.ledger.ids import Ids, UserId
from callora.ledger.tokens import Signing
from callora.metrics import Metrics
from callora.store import accounts, operators
from callora.store.bridge import Database
from callora.store.reads import people
from callora.store.reads.keys import KeyReads
from callora.store.reads.vaults import VaultReads

Task = Callable[[], Awaitable[None]]

_LIMITED: Final = (
    "/api/billing",
    "/api/usage",
    "/api/developers",
    "/api/vault",
    "/api/keys",
    "/api-keys",
    "/api/apis/{apiId}/keys",
    "/api/admin",
)
_LOGIN: Final = ("/api/auth", "/auth")
TOKENS_SWEEP_SECONDS: Final = 3600.0
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
    limiter = RestLimiter(
        (
            PaceRule("login", _LOGIN, settings.login_rate_limit_max_requests, settings.login_rate_limit_window_seconds),
            PaceRule("rest", _LIMITED, settings.rest_rate_limit_max_requests, settings.rest_rate_limit_window_seconds),
        )
    )
    doors = Doors(_authenticator(desk), limiter.admit, _audit(desk))
    keys = _keys(desk)
    nouns: list[Routes] = [health_routes(Health(deps), deps), *keys.routes]
    operations: list[Operation] = []
    nouns.append(document_routes(lambda: operations, settings.app_version))
    operations += (operation for noun in nouns for operation in noun.operations)
    return Dashboard(
        operations=tuple(operations),
        doors=doors,
        tasks=(("rest limiter", limiter.run), *keys.tasks),
    )


@attrs.frozen
class _Part:
    """Nouns that are built together."""

    routes: tuple[Routes, ...]
    tasks: tuple[tuple[str, Task], ...]


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
        with trio.move_on_after(AUDIT_SECONDS_MAX, shield=True) as scope:
            await operators.note_access(
                desk.database,
                operators.Access(
                    audit_id=desk.ids.uuid7(),
                    at=desk.clock.now(),
                    actor=identity.actor if identity is not None else "unknown",
                    action=operation.operation_id,
                    target=next(iter(parameters.values()), None),
                    client_address=exchange.client,
                    request_id=exchange.request_id,
                    status=status,
                    details=parameters,
                ),
            )
        if scope.cancelled_caught:
            raise StoreUnavailable("the audit could not be written in time")

    return audit


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
