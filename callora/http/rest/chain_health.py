"""How the breakers before the chain fare, for whoever is about to deposit."""

from typing import TYPE_CHECKING, Any, Final, Literal

import trio
from pydantic import Field

from callora.actors.sources import BreakerReport
from callora.http.problems import ProblemRaised
from callora.http.rest.forms import Form, microseconds
from callora.http.rest.operations import Access, Answer, Ask, Routes

if TYPE_CHECKING:
    from callora.actors.chain import Chain

_STATES: Final[dict[str, Literal["CLOSED", "OPEN", "HALF_OPEN"]]] = {
    "closed": "CLOSED",
    "open": "OPEN",
    "half_open": "HALF_OPEN",
}


class CircuitBreaker(Form):
    """What a breaker has seen since the process started; every process has its own."""

    state: Literal["CLOSED", "OPEN", "HALF_OPEN"]
    consecutiveFailures: int
    consecutiveSuccesses: int
    totalFailures: int = Field(description="Questions that nobody answered, each in all its attempts.")
    totalSuccesses: int
    lastFailureTime: int | None = Field(description="Milliseconds since 1970.")
    lastStateChange: int = Field(description="Milliseconds since 1970; of the start, where it never changed.")


class CircuitBreakers(Form):
    """All breakers before the chain."""

    rpc: CircuitBreaker
    horizon: CircuitBreaker | None = Field(description="Null where Horizon is not used.")


class DepositsHealth(Form):
    """Whether the chain can be reached."""

    success: Literal[True] = True
    circuitBreaker: CircuitBreaker = Field(description="Horizon's where it is used, else that of RPC.")
    circuitBreakers: CircuitBreakers


def chain_health_routes(chain: "Chain | None") -> Routes:
    """Return the route that shows the breakers before the chain."""
    routes = Routes("Operations")

    @routes.add(
        "GET",
        "/api/deposits/health",
        access=Access.PUBLIC,
        answers={200: DepositsHealth},
        problems=("COMPONENT_NOT_CONFIGURED",),
    )
    async def get_deposits_health(_: Ask[Any, Any, Any]) -> Answer:
        """Whether the chain can be reached: the circuit breakers before it, in the process that answers."""
        await trio.lowlevel.checkpoint()
        if chain is None:
            raise ProblemRaised("COMPONENT_NOT_CONFIGURED", "Deposits need SOROBAN_RPC_ENABLED")
        reports = chain.reports()
        rpc = _shown(reports["chain:rpc"])
        horizon = _shown(reports["chain:horizon"]) if "chain:horizon" in reports else None
        return Answer(
            DepositsHealth(circuitBreaker=horizon or rpc, circuitBreakers=CircuitBreakers(rpc=rpc, horizon=horizon))
        )

    return routes


def _shown(report: BreakerReport) -> CircuitBreaker:
    failed = report.last_failure_time
    return CircuitBreaker(
        state=_STATES[report.state],
        consecutiveFailures=report.consecutive_failures,
        consecutiveSuccesses=report.consecutive_successes,
        totalFailures=report.total_failures,
        totalSuccesses=report.total_successes,
        lastFailureTime=None if failed is None else microseconds(failed) // 1000,
        lastStateChange=microseconds(report.last_state_change) // 1000,
    )
