"""The dashboard's REST: everything behind its routes is built here and given to them, a noun at a time."""

import os
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Final

import attrs
import trio
from pydantic import SecretStr
from structlog.typing import FilteringBoundLogger

from callora.actors.arrears import Arrears
from callora.actors.balance_alerts import BalanceAlerts
from callora.actors.billing import Billing
from callora.actors.catalogue import Catalogue
from callora.actors.collector import Collector, CollectSettings
from callora.actors.counter_accounts import CounterAccounts
from callora.actors.disputes import Disputes
from callora.actors.expiry import Job, repeat
from callora.actors.exporter import Exporter
from callora.actors.holds import Holds
from callora.actors.intents import Intents
from callora.actors.invoicing import Invoicing
from callora.actors.keyring import Keyring
from callora.actors.live_usage import LiveUsage
from callora.actors.meter_sources import MeterSources
from callora.actors.plans import Plans
from callora.actors.publisher import Publisher
from callora.actors.quota_notices import QuotaNotices
from callora.actors.quota_requests import QuotaRequests
from callora.actors.rating import Rater
from callora.actors.registry import VaultRegistry
from callora.actors.rollup import Rollup
from callora.actors.sessions import Sessions
from callora.actors.spending import LimitSetting
from callora.actors.subscriptions import Subscriptions
from callora.actors.usage_notices import UsageNotices
from callora.actors.vaults import VaultOpening
from callora.actors.webhook_desk import WebhookDesk
from callora.actors.webhooks import Teller
from callora.config.settings import Settings
from callora.http.gateway.admission import Admission
from callora.http.rest.admin_keys import admin_keys_routes
from callora.http.rest.alerts import alert_routes
from callora.http.rest.analytics import admin_usage_routes, analytics_routes
from callora.http.rest.api_admin import api_admin_routes
from callora.http.rest.api_import import import_routes
from callora.http.rest.apis import Shop, endpoint_routes, marketplace_routes, own_api_routes
from callora.http.rest.billing import billing_routes
from callora.http.rest.chain_admin import chain_admin_routes
from callora.http.rest.chain_health import chain_health_routes
from callora.http.rest.counter_accounts import counter_account_routes
from callora.http.rest.counter_usage import counter_usage_routes
from callora.http.rest.deposits import deposit_routes
from callora.http.rest.deps import RestDeps
from callora.http.rest.developers import developer_routes
from callora.http.rest.disputes import dispute_admin_routes, dispute_routes
from callora.http.rest.frame import Exchange
from callora.http.rest.health import Health, health_routes
from callora.http.rest.holds import hold_routes
from callora.http.rest.identity import Authenticator, Identity, People, TokenSettings
from callora.http.rest.invoices import invoice_routes
from callora.http.rest.jobs import job_routes
from callora.http.rest.key_check import key_check_routes
from callora.http.rest.key_desk import KeyDesk
from callora.http.rest.keys import keys_routes
from callora.http.rest.limits import PaceRule, RestLimiter
from callora.http.rest.live_usage import encode_event, live_usage_routes
from callora.http.rest.login import login_routes, web_auth_routes
from callora.http.rest.meter_sources import meter_source_routes
from callora.http.rest.operations import Audit, Count, Doors, Operation, Routes
from callora.http.rest.operators import operator_routes
from callora.http.rest.pages import document_routes
from callora.http.rest.payouts import payout_routes
from callora.http.rest.plans import plan_routes, vault_plan_routes
from callora.http.rest.quotas import quota_admin_routes, quota_routes
from callora.http.rest.revenue import revenue_routes
from callora.http.rest.settlement_admin import settlement_admin_routes
from callora.http.rest.spending import LimitReads, spending_routes
from callora.http.rest.subscriptions import subscription_routes
from callora.http.rest.tokens import tokens_routes
from callora.http.rest.usage import usage_routes
from callora.http.rest.vaults import vaults_routes
from callora.http.rest.wallets import wallet_routes
from callora.http.rest.webhooks import webhook_routes
from callora.http.rest.withdrawals import withdrawal_routes
from callora.ledger.clock import Clock
from callora.ledger.counters import Rule
from callora.ledger.faults import StoreUnavailable
from callora.ledger.ids import Ids, UserId
from callora.ledger.images import parse_image
from callora.ledger.snapshots import MeterSource
from callora.ledger.tokens import Signing
from callora.ledger.webhooks import Secrets
from callora.logs import mask
from callora.metrics import Metrics
from callora.outbound.addresses import Resolver
from callora.outbound.client import Outbound
from callora.store import accounts, operators
from callora.store.bridge import Database
from callora.store.reads import chain as chain_reads
from callora.store.reads import people
from callora.store.reads.keys import KeyReads
from callora.store.reads.vaults import VaultReads

if TYPE_CHECKING:
    from callora.actors.bookkeeping import Bookkeeper
    from callora.actors.chain import Chain
    from callora.actors.payouts import Payouts
    from callora.actors.treasury import Treasury
    from callora.stellar.web_auth import WebAuth

Task = Callable[[], Awaitable[None]]

_LIMITED: Final = (
    "/api/billing",
    "/api/credits",
    "/api/refunds",
    "/api/usage",
    "/api/account",
    "/api/developers",
    "/api/vault",
    "/api/quotas",
    "/api/webhooks",
    "/api/subscriptions",
    "/api/invoices",
    "/api/deposits/build",
    "/api/wallets",
    "/api/keys",
    "/api-keys",
    "/api/apis/{apiId}/keys",
    "/api/admin",
    "/admin",
    "/api/auth",
    "/api/refresh-token",
)
NOTED_CHARS_MAX: Final = 1000
_MARKETPLACE: Final = ("/api/apis", "/api/plans")
"""Searching is open to everyone: it has a limit of its own, which browsing does not share with paying."""
TOKENS_SWEEP_SECONDS: Final = 3600.0
DISPUTES_SWEEP_SECONDS: Final = 60.0
FEED_SWEEP_SECONDS: Final = 600.0
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
    meters: Outbound
    """Asks meter sources."""
    chain: "Chain | None"
    """None where SOROBAN_RPC_ENABLED is false."""
    treasury: "Treasury | None"
    """None with it."""
    payouts: "Payouts | None"
    bookkeeper: "Bookkeeper | None"
    outbound: Outbound
    teller: Teller
    port: int
    """Where this process listens."""
    clock: Clock
    ids: Ids
    random: Random
    metrics: Metrics
    log: FilteringBoundLogger


@attrs.frozen
class Dashboard:
    """The routes, what stands before them, and what runs beside them."""

    operations: tuple[Operation, ...]
    doors: Doors
    tasks: tuple[tuple[str, Task], ...]
    live_usage: LiveUsage
    """Its streams are ended first when the service drains."""


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
    live_usage = _live_usage(desk)
    rater = _rater(desk)
    collector = _collector(desk, rater)
    parts = (
        _Part(
            (health_routes(Health(deps), deps, collector.health), chain_health_routes(desk.chain)),
            (("rest limiter", limiter.run), ("rest intents", forget)),
        ),
        _login(desk),
        _market(desk),
        _keys(desk),
        _usage(desk, live_usage),
        _notices(desk),
        _billing(desk),
        _plans(desk),
        _metering(desk, collector, rater),
        _webhooks(desk),
        _chain(desk),
    )
    operations: list[Operation] = []
    document = document_routes(lambda: operations, settings.app_version)
    for routes in (*(routes for part in parts for routes in part.routes), document):
        operations += routes.operations
    return Dashboard(
        operations=tuple(operations),
        doors=Doors(_authenticator(desk), limiter.admit, _audit(desk), _count(desk), intents),
        tasks=tuple(task for part in parts for task in part.tasks),
        live_usage=live_usage,
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
        spending_routes(
            key_desk, vault_reads, LimitReads(desk.database, desk.clock), LimitSetting(desk.database, desk.clock)
        ),
        vaults_routes(opening, vault_reads, partial(chain_reads.synced, desk.database)),
        admin_keys_routes(key_desk),
    )
    sweep = partial(repeat, "expired tokens", keyring.forget_expired_tokens, TOKENS_SWEEP_SECONDS, desk.log)
    return _Part(routes, (("expired tokens", sweep),))


def _live_usage(desk: Desk) -> LiveUsage:
    """Return the streams of live usage."""
    settings = desk.settings
    return LiveUsage(
        desk.database,
        desk.clock,
        desk.random,
        desk.metrics,
        desk.log,
        encode=encode_event,
        interval_seconds=settings.usage_stream_interval_seconds,
        heartbeat_seconds=settings.usage_stream_heartbeat_seconds,
        kept_seconds=settings.usage_feed_retention_seconds,
        streams_max=settings.usage_streams_max,
        streams_per_user_max=settings.usage_streams_per_user_max,
        buffer_events_max=settings.usage_stream_buffer_events_max,
    )


def _usage(desk: Desk, live_usage: LiveUsage) -> _Part:
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
            live_usage_routes(live_usage),
            analytics_routes(desk.database, desk.clock),
            revenue_routes(desk.settings, desk.database, desk.clock),
            admin_usage_routes(desk.database, desk.clock),
        ),
        (
            ("rollup", rollup.run),
            ("live usage", live_usage.run),
            ("old feeds", partial(repeat, "old feeds", live_usage.forget, FEED_SWEEP_SECONDS, desk.log)),
        ),
    )


def _notices(desk: Desk) -> _Part:
    """What owners are told of by webhooks without having asked for it in a request."""
    settings, database, clock, ids = desk.settings, desk.database, desk.clock, desk.ids
    alerts = BalanceAlerts(database, clock, ids, interval_seconds=settings.balance_alert_interval_seconds)
    notices = UsageNotices(
        database,
        clock,
        ids,
        interval_seconds=settings.usage_notice_interval_seconds,
        kept_seconds=settings.usage_feed_retention_seconds,
    )
    invoicing = Invoicing(database, clock, ids)
    jobs: tuple[tuple[str, Job, float], ...] = (
        ("balance alerts", alerts.sweep, settings.balance_alert_interval_seconds),
        ("usage notices", notices.sweep, settings.usage_notice_interval_seconds),
        ("invoicing", invoicing.sweep, settings.invoice_job_interval_seconds),
    )
    return _Part(
        (alert_routes(alerts, VaultReads(database), database), invoice_routes(database)),
        tuple((name, partial(repeat, name, job, seconds, desk.log)) for name, job, seconds in jobs),
    )


def _billing(desk: Desk) -> _Part:
    """Charges without a call, and what operators do."""
    billing = Billing(desk.database, desk.registry, desk.clock, desk.ids)
    holds = Holds(
        desk.database,
        desk.registry,
        billing,
        desk.clock,
        desk.ids,
        ttl_seconds_default=int(desk.settings.hold_ttl_seconds),
    )
    disputes = Disputes(desk.database, billing, desk.clock, desk.ids, desk.log)
    return _Part(
        (
            billing_routes(billing, desk.database),
            dispute_routes(disputes, desk.database),
            dispute_admin_routes(disputes, desk.database),
            hold_routes(holds, desk.database, LimitReads(desk.database, desk.clock)),
            key_check_routes(desk.catalogue),
            operator_routes(
                desk.database,
                desk.registry,
                desk.catalogue,
                desk.admission,
                {} if desk.chain is None else desk.chain.breakers,
                desk.clock,
            ),
        ),
        (
            ("billing", billing.run),
            ("holds", holds.run),
            ("disputes", partial(repeat, "disputes", disputes.sweep, DISPUTES_SWEEP_SECONDS, desk.log)),
        ),
    )


def _plans(desk: Desk) -> _Part:
    """Plans, what is paid for them, and the credits that come with them."""
    settings, database, clock, ids = desk.settings, desk.database, desk.clock, desk.ids
    plans = Plans(database, desk.catalogue, desk.log)
    subscriptions = Subscriptions(database, desk.registry, clock, ids, desk.log)
    requests = QuotaRequests(database, desk.registry, clock, ids, desk.log)
    notices = QuotaNotices(database, clock, ids, interval_seconds=settings.quota_notice_interval_seconds)
    vault_reads = VaultReads(database)
    sweep_seconds = settings.subscription_sweep_interval_seconds
    jobs = (
        ("subscriptions", subscriptions.sweep, sweep_seconds),
        ("quota requests", requests.sweep, sweep_seconds),
        ("quota notices", notices.sweep, settings.quota_notice_interval_seconds),
    )
    return _Part(
        (
            plan_routes(plans, database),
            subscription_routes(subscriptions, vault_reads, database, plans),
            quota_routes(requests, vault_reads, database, clock),
            vault_plan_routes(desk.registry, subscriptions, plans, clock, ids),
            quota_admin_routes(requests, database, clock),
        ),
        tuple((name, partial(repeat, name, job, seconds, desk.log)) for name, job, seconds in jobs),
    )


def _rater(desk: Desk) -> Rater:
    rule = Rule(desk.settings.price_per_byte, desk.settings.source_revision)
    return Rater(desk.database, desk.registry, desk.clock, desk.ids, desk.log, rule)


def _collector(desk: Desk, rater: Rater) -> Collector:
    settings = desk.settings

    def credential(source: MeterSource) -> SecretStr | None:
        if source.credential_env is None:
            return settings.internal_service_token
        return settings.exporter_tokens.get(source.credential_env)

    return Collector(
        desk.database,
        Exporter(desk.meters, credential, page_size=settings.collect_page_size),
        rater,
        settings.meter_sources,
        CollectSettings(
            interval_seconds=settings.collect_interval_seconds,
            overlap=timedelta(seconds=settings.collect_overlap_seconds),
            pages_max=settings.collect_max_pages,
            pushed=settings.billing_ingest_mode == "push",
        ),
        clock=desk.clock,
        ids=desk.ids,
        metrics=desk.metrics,
        log=desk.log,
    )


def _metering(desk: Desk, collector: Collector, rater: Rater) -> _Part:
    """What is billed by counters."""
    settings = desk.settings
    accounts = CounterAccounts(desk.database, rater, desk.clock, desk.ids)
    arrears = Arrears(
        desk.database, desk.registry, desk.clock, desk.log, suspend_seconds=settings.arrears_suspend_seconds
    )
    review = partial(repeat, "arrears", arrears.sweep, settings.arrears_sweep_seconds, desk.log)
    sources = MeterSources(desk.database, settings.exporter_tokens, desk.clock, desk.ids)
    return _Part(
        (
            job_routes(collector, parse_image(settings.image)),
            meter_source_routes(sources, desk.database),
            counter_account_routes(accounts, desk.database, settings.initial_included_quota_bytes),
            counter_usage_routes(desk.database, desk.clock),
        ),
        (("collector", collector.run), ("arrears", review)),
    )


def _webhooks(desk: Desk) -> _Part:
    """Where users hear of what happened. What delivers to them is the service's, which ends it with the calls."""
    settings = desk.settings
    webhooks = WebhookDesk(
        desk.database,
        desk.outbound,
        desk.teller,
        Secrets(settings.webhook_key),
        desk.clock,
        desk.ids,
        grace_seconds=settings.webhook_secret_grace_seconds,
    )
    return _Part((webhook_routes(webhooks, desk.database),))


def _chain(desk: Desk) -> _Part:
    """Deposits, withdrawals, and what operators do about them. What runs beside them runs with the chain."""
    network = desk.settings.stellar_network
    return _Part(
        (
            deposit_routes(desk.treasury, desk.database, network, desk.clock),
            withdrawal_routes(desk.treasury, desk.database, network),
            wallet_routes(desk.treasury, network),
            chain_admin_routes(desk.treasury, desk.database, network, desk.clock),
            payout_routes(desk.payouts, desk.settings, desk.database),
            settlement_admin_routes(desk.bookkeeper, desk.database, network),
        )
    )


def make_sessions(desk: Desk) -> Sessions:
    """Return the logins of a service."""
    domain = _domain(desk)
    return Sessions(
        database=desk.database,
        clock=desk.clock,
        ids=desk.ids,
        random_bytes=os.urandom,
        domain=domain,
        web_auth=_web_auth(desk.settings, domain),
        log=desk.log,
    )


def _web_auth(settings: Settings, domain: str) -> "WebAuth | None":
    """Return the server's side of SEP-10; only where it is configured is Stellar's SDK loaded for it."""
    if settings.auth_signing_seed is None:
        return None
    from callora.stellar.web_auth import WebAuth

    return WebAuth.make(settings.auth_signing_seed.get_secret_value(), domain, settings.network_passphrase)


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
        service_token=settings.internal_service_token,
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


def _count(desk: Desk) -> Count:
    def count(operation: str, status: int) -> None:
        desk.metrics.service_requests.of(operation, str(status)).inc()

    return count


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
