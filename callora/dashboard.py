"""The dashboard's REST: everything behind its routes is built here and given to them, a noun at a time."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import attrs
import trio
from structlog.typing import FilteringBoundLogger

from callora.actors.catalogue import Catalogue
from callora.actors.publisher import Publisher
from callora.actors.registry import VaultRegistry
from callora.config import Settings
from callora.http.gateway.addresses import Resolver
from callora.http.gateway.admission import Admission
from callora.http.rest.api_admin import api_admin_routes
from callora.http.rest.api_import import import_routes
from callora.http.rest.apis import Shop, endpoint_routes, marketplace_routes, own_api_routes
from callora.http.rest.deps import RestDeps
from callora.http.rest.developers import developer_routes
from callora.http.rest.frame import Exchange
from callora.http.rest.health import Health, health_routes
from callora.http.rest.identity import Authenticator, Identity, People, TokenSettings
from callora.http.rest.limits import PaceRule, RestLimiter
from callora.http.rest.operations import Audit, Doors, Operation, Routes
from callora.http.rest.pages import document_routes
from callora.ledger.clock import Clock
from callora.ledger.faults import StoreUnavailable
from callora.ledger.ids import Ids, UserId
from callora.metrics import Metrics
from callora.store import accounts, operators
from callora.store.bridge import Database
from callora.store.reads import people

Task = Callable[[], Awaitable[None]]

_LIMITED: Final = (
    "/api/billing",
    "/api/usage",
    "/api/developers",
    "/api/vault",
    "/api/keys",
    "/api-keys",
    "/api/admin",
)
_MARKETPLACE: Final = ("/api/apis",)
"""Searching is open to everyone: it has a limit of its own, which browsing does not share with paying."""
_LOGIN: Final = ("/api/auth", "/auth")
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
            PaceRule(
                "marketplace",
                _MARKETPLACE,
                settings.rest_rate_limit_max_requests,
                settings.rest_rate_limit_window_seconds,
            ),
            PaceRule("rest", _LIMITED, settings.rest_rate_limit_max_requests, settings.rest_rate_limit_window_seconds),
        )
    )
    doors = Doors(_authenticator(desk), limiter.admit, _audit(desk))
    nouns: list[Routes] = [health_routes(Health(deps), deps)]
    publisher = Publisher(desk.database, desk.catalogue, desk.clock, desk.ids, desk.log)
    shop = Shop(publisher, desk.database, desk.resolver, desk.clock)
    nouns += (
        developer_routes(publisher, desk.database),
        marketplace_routes(shop),
        own_api_routes(shop),
        endpoint_routes(shop),
        import_routes(shop),
        api_admin_routes(shop),
    )
    operations: list[Operation] = []
    nouns.append(document_routes(lambda: operations, settings.app_version))
    operations += (operation for noun in nouns for operation in noun.operations)
    return Dashboard(
        operations=tuple(operations),
        doors=doors,
        tasks=(("rest limiter", limiter.run), ("popularity", publisher.run)),
    )


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
