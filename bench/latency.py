"""Row 8: latency of paid calls that arrive at a constant rate: 60 % of what this generator reached in a closed loop.

It costs several times what wrk does, on the core that PostgreSQL has too: 60 % of what wrk reaches would be more than
this generator and PostgreSQL together can do, and a queue without end is what would be measured.
"""

from typing import Final

import attrs

from bench.lanes import Spread, spread
from bench.openloop import open_loop
from bench.plan import Plan, Progress
from bench.stack import LedgerCheck, Stack

SHARE_OF_HIGHEST: Final = 0.6
_CONNECTIONS: Final = 256
_OUT_OF_REACH: Final = 1e6
"""Calls a second: every connection is kept busy, which makes the generator's a closed loop."""
_WARM_UP_CALLS: Final = 5000


@attrs.frozen
class LatencyFigures:
    """The paid lane at a constant rate of arrival."""

    highest_calls_per_second: float
    """What the generator reached in a closed loop."""
    rate: float
    """Arrivals a second."""
    p50_ms: Spread
    p99_ms: Spread
    p99_over_p50: Spread
    generator_lateness_p99_ms: Spread
    """How late the generator itself was: near p50, it was the generator that was measured."""
    complaints: tuple[str, ...]


async def run_latency(stack: Stack, plan: Plan, progress: Progress) -> LatencyFigures:
    """Return open-loop latencies; the ledger is checked after each run.

    Raises:
        BenchError: calls were refused or lost, or the generator failed.
    """
    tenant = await stack.tenant("latency", vaults=plan.vaults)
    async with stack.gateway("latency", tenant) as gateway:
        seconds = max(2, plan.seconds)
        closed = await open_loop(gateway.target, rate=_OUT_OF_REACH, calls=_WARM_UP_CALLS, connections=_CONNECTIONS)
        calls = int(closed.calls_per_second * seconds)
        closed = await open_loop(gateway.target, rate=_OUT_OF_REACH, calls=calls, connections=_CONNECTIONS)
        highest = closed.calls_per_second
        rate = highest * SHARE_OF_HIGHEST
        runs, complaints = [], []
        for repetition in range(plan.repetitions):
            check = LedgerCheck(stack, gateway)
            await check.begin()
            seen = await open_loop(gateway.target, rate=rate, calls=int(rate * seconds), connections=_CONNECTIONS)
            complaints += await check.end(answered=seen.answered, cut_off=0)
            runs.append(seen)
            progress.say(
                f"open loop at {rate:.0f}/s, repetition {repetition + 1}/{plan.repetitions}: "
                f"p50 {seen.p50_ms:.2f} ms, p99 {seen.p99_ms:.2f} ms"
            )
    return LatencyFigures(
        highest_calls_per_second=highest,
        rate=rate,
        p50_ms=spread([each.p50_ms for each in runs]),
        p99_ms=spread([each.p99_ms for each in runs]),
        p99_over_p50=spread([each.p99_ms / each.p50_ms for each in runs]),
        generator_lateness_p99_ms=spread([each.lateness_p99_ms for each in runs]),
        complaints=tuple(complaints),
    )
