"""Row 12: from starting `callora serve` on a warm database to the end of the first paid call."""

import http.client

import attrs
import trio

from bench.lanes import Spread, spread
from bench.machine import BenchError, fetch
from bench.plan import Plan, Progress
from bench.stack import Stack

_GIVE_UP_SECONDS = 30.0


@attrs.frozen
class StartFigures:
    """How long a start takes."""

    seconds: Spread
    """From the start of the process to the last byte of the first paid answer."""


async def run_start(stack: Stack, plan: Plan, progress: Progress) -> StartFigures:
    """Return how long starts took; the database is migrated and seeded, the interpreter's byte code is cached.

    Raises:
        BenchError: a process ended before it answered, or never did.
    """
    tenant = await stack.tenant("start", vaults=1)
    took: list[float] = []
    for repetition in range(plan.repetitions + 1):
        began = trio.current_time()
        async with stack.gateway("start", tenant, wait=False) as gateway:
            headers = {"X-Api-Key": tenant.api_keys[0]}
            status = 0
            with trio.move_on_after(_GIVE_UP_SECONDS):
                while status != 200 and gateway.child.process.poll() is None:
                    try:
                        status, _ = await fetch(gateway.port, tenant.path, headers)
                    except (OSError, http.client.HTTPException):
                        status = 0  # not listening yet
                    if status != 200:
                        await trio.sleep(0.002)
            if status != 200:
                raise BenchError(f"no paid call after a start:\n{gateway.child.tail()}")
            seconds = trio.current_time() - began
        if repetition:  # the first fills the caches
            took.append(seconds)
            progress.say(f"start, repetition {repetition}/{plan.repetitions}: first paid call after {seconds:.2f} s")
    return StartFigures(seconds=spread(took))
