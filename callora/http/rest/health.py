"""Probes: is the process alive, may it be given work, how does each thing it depends on fare; and the metrics."""

from collections.abc import Awaitable, Callable
from typing import Any, Final, Literal

import trio
from pydantic import Field

from callora.actors.collector import CollectorHealth
from callora.http.problems import ProblemRaised
from callora.http.rest.deps import RestDeps
from callora.http.rest.forms import Form, InstantOut, iso
from callora.http.rest.identity import require_token
from callora.http.rest.operations import Access, Answer, Ask, Routes, Text
from callora.metrics import CONTENT_TYPE as METRICS_CONTENT_TYPE

State = Literal["ok", "degraded", "down"]


def _absent(state: object) -> bool:
    return state is None


class Checks(Form):
    """How each thing that the service depends on fares."""

    api: State
    database: State
    soroban_rpc: State | None = Field(
        default=None, exclude_if=_absent, description="Only where SOROBAN_RPC_ENABLED is true."
    )
    horizon: State | None = Field(default=None, exclude_if=_absent, description="Only where HORIZON_ENABLED is true.")


class HealthReport(Form):
    """How the service fares."""

    status: State
    version: str
    timestamp: InstantOut
    checks: Checks


class CollectorReport(Form):
    """How the last collection run went."""

    status: Literal["ok", "degraded"]
    message: str = Field(description="Empty where it is ok.")


class Alive(Form):
    """The process answers."""

    status: Literal["ok"] = "ok"


_SLOW_SECONDS = 1.0
_RETRY_AFTER_SECONDS = 1
_CHAIN_SHARE: Final = 0.9
"""Of the time that the whole check has: a chain that hangs must not hide how the rest fares."""


class Health:
    """Answers probes. The database is asked once for all probes that wait at the same time."""

    def __init__(self, deps: RestDeps) -> None:
        self._deps = deps
        self._asking = trio.Lock()
        self._asked_count = 0
        self._last: State = "down"

    async def report(self) -> HealthReport:
        """Return the document of `/api/health`.

        Raises:
            ProblemRaised: GATEWAY_TIMEOUT, past HEALTH_REQUEST_TIMEOUT_MS.

        Cancellation: at any time.
        """
        with trio.move_on_after(self._deps.settings.health_request_timeout_seconds) as scope:
            checks = await self._checks()
        if scope.cancelled_caught:
            raise ProblemRaised("GATEWAY_TIMEOUT", "The health check did not finish in time")
        return HealthReport(
            status=_overall(checks),
            version=self._deps.settings.app_version,
            timestamp=iso(self._deps.clock.now()),
            checks=checks,
        )

    async def _checks(self) -> Checks:
        """Ask everything at the same time; the chain is down where it does not answer in its share of it."""
        ask_chain = self._deps.chain_health
        if ask_chain is None:
            return Checks(api="ok", database=await self.database())
        found: dict[str, State] = {"soroban_rpc": "down"}
        if self._deps.settings.horizon_enabled:
            found["horizon"] = "down"

        async def look_at_chain() -> None:
            with trio.move_on_after(self._deps.settings.health_request_timeout_seconds * _CHAIN_SHARE):
                told = await ask_chain()
                found["soroban_rpc"] = told["rpc"]
                if "horizon" in told:
                    found["horizon"] = told["horizon"]

        async with trio.open_nursery() as asking:
            asking.start_soon(look_at_chain)
            database = await self.database()
        return Checks(api="ok", database=database, **found)

    async def require_ready(self) -> None:
        """Return when the process may be given work.

        Raises:
            ProblemRaised: SERVICE_UNAVAILABLE with what is missing: it drains, migrations are pending, or the
                database is down.

        Cancellation: at any time.
        """
        draining = self._deps.draining()
        pending = self._deps.pending_migrations()
        # A draining process is not ready whatever the database says: it is not asked
        database: State = "ok" if draining else await self.database()
        if draining or pending or database == "down":
            details = {"draining": draining, "pendingMigrations": pending, "database": database}
            raise ProblemRaised(
                "SERVICE_UNAVAILABLE",
                "The service is not ready",
                details=details,
                headers={"Retry-After": str(_RETRY_AFTER_SECONDS)},
            )

    async def database(self) -> State:
        """Return how the database fares: ok, degraded when it takes a second or more, down when it does not answer.

        Cancellation: at any time; another waiting probe then asks anew.
        """
        seen = self._asked_count
        async with self._asking:
            if self._asked_count == seen:
                self._last = await self._ask()
                self._asked_count += 1
            return self._last

    async def _ask(self) -> State:
        started = trio.current_time()
        state: State = "down"
        try:
            with trio.move_on_after(self._deps.settings.health_check_db_timeout_seconds):
                await self._deps.database_check()
                state = "degraded" if trio.current_time() - started >= _SLOW_SECONDS else "ok"
        except Exception:
            # Why it is down is for the log alone: a health document is read by strangers
            self._deps.logger.warning("the database does not answer", exc_info=True)
        return state


def _overall(checks: Checks) -> State:
    """Return how the service fares: it cannot do without its database, and prepaid calls need no chain."""
    if "down" in (checks.api, checks.database):
        return "down"
    states = {checks.api, checks.database, checks.soroban_rpc or "ok", checks.horizon or "ok"}
    return "ok" if states == {"ok"} else "degraded"


Collected = Callable[[], Awaitable[CollectorHealth]]


async def nothing_collected() -> CollectorHealth:
    """Return how a service without meter sources fares."""
    await trio.lowlevel.checkpoint()
    return CollectorHealth(ok=True, message="")


def health_routes(health: Health, deps: RestDeps, collected: Collected = nothing_collected) -> Routes:
    """Return the probes and the metrics.

    Args:
        collected: tells how the last collection run went, without waiting for one.
    """
    routes = Routes("Operations")
    # One scrape at a time: rendering is work for the interpreter, and two would only slow each other and the calls
    rendering = trio.CapacityLimiter(1)

    @routes.add(
        "GET",
        "/api/health",
        access=Access.PUBLIC,
        answers={200: HealthReport, 503: HealthReport},
        problems=("GATEWAY_TIMEOUT",),
        aliases=("/health",),
    )
    async def get_health(_: Ask[Any, Any, Any]) -> Answer:
        """How the service and what it depends on fare; 503 where it cannot do without what is down."""
        report = await health.report()
        return Answer(report, 503 if report.status == "down" else 200)

    @routes.add("GET", "/livez", access=Access.PUBLIC, answers={200: Alive})
    async def get_livez(_: Ask[Any, Any, Any]) -> Answer:
        """Whether the process answers."""
        await trio.lowlevel.checkpoint()
        return Answer(Alive())

    @routes.add("GET", "/readyz", access=Access.PUBLIC, answers={200: Alive})
    async def get_readyz(_: Ask[Any, Any, Any]) -> Answer:
        """Whether the process may be given work; 503 while it drains, lacks migrations or has no database."""
        await health.require_ready()
        return Answer(Alive())

    @routes.add("GET", "/healthz", access=Access.PUBLIC, answers={200: CollectorReport, 503: CollectorReport})
    async def get_healthz(_: Ask[Any, Any, Any]) -> Answer:
        """How the last collection run went, where there are meter sources; 503 where it failed, or none ended yet."""
        told = await collected()
        report = CollectorReport(status="ok" if told.ok else "degraded", message=told.message)
        return Answer(report, 200 if told.ok else 503)

    @routes.add(
        "GET",
        "/api/metrics",
        access=Access.PUBLIC,
        answers={200: Text(METRICS_CONTENT_TYPE, "Prometheus text")},
        problems=("UNAUTHORIZED",),
        aliases=("/metrics",),
    )
    async def get_metrics(ask: Ask[Any, Any, Any]) -> Answer:
        """What Prometheus scrapes; in production with METRICS_API_KEY as a Bearer token."""
        if deps.settings.is_production:
            require_token(ask.headers.get("Authorization"), deps.settings.metrics_api_key)
        deps.refresh_metrics()
        return Answer(await trio.to_thread.run_sync(deps.metrics.render, limiter=rendering))

    return routes
