"""Probes: is the process alive, may it be given work, and how does each thing it depends on fare."""

from typing import Any, Literal

import trio

from callora.http.problems import ProblemRaised
from callora.http.rest.deps import RestDeps

State = Literal["ok", "degraded", "down"]

_SLOW_SECONDS = 1.0
_RETRY_AFTER_SECONDS = 1


class Health:
    """Answers probes. The database is asked once for all probes that wait at the same time."""

    def __init__(self, deps: RestDeps) -> None:
        self._deps = deps
        self._asking = trio.Lock()
        self._asked_count = 0
        self._last: State = "down"

    async def report(self) -> tuple[dict[str, Any], int]:
        """Return the document of `/api/health` and its status: 503 where something it cannot do without is down.

        Raises:
            ProblemRaised: GATEWAY_TIMEOUT, past HEALTH_REQUEST_TIMEOUT_MS.

        Cancellation: at any time.
        """
        with trio.move_on_after(self._deps.settings.health_request_timeout_seconds) as scope:
            database = await self.database()
        if scope.cancelled_caught:
            raise ProblemRaised("GATEWAY_TIMEOUT", "The health check did not finish in time")
        now = self._deps.clock.now()
        document = {
            "status": database,
            "version": self._deps.settings.app_version,
            "timestamp": now.strftime("%Y-%m-%dT%H:%M:%S.") + f"{now.microsecond // 1000:03d}Z",
            "checks": {"api": "ok", "database": database},
        }
        return document, 503 if database == "down" else 200

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
