"""A process that takes calls from shared limits as fast as it is told to: `python -m tests.support.pacer URL NAME`.

It reads one phase a line and answers each with one line of what became of its calls.
"""

import json
import random
import sys
from collections.abc import Callable
from typing import Any, Final

import attrs
import structlog
import trio

from callora.config.loading import load_settings
from callora.ledger.faults import RateStoreUnavailable
from callora.ledger.ids import ApiKeyId, UserId
from callora.ledger.limits import Limit
from callora.store.pace import SharedPace

BURST_FACTOR: Final = 3
"""A burst asks for so many times what a window admits, of all processes together, and all of them at once."""
STEADY_FACTOR: Final = 2
"""A steady load asks for so many times what a window admits, of all processes together."""


@attrs.frozen
class Phase:
    """What a process is to do."""

    mode: str
    """burst or steady."""
    windows: int
    window_seconds: float
    user_calls: int
    key_calls: int
    processes: int
    user_id: str


@attrs.define
class Outcome:
    """What became of the calls."""

    admitted: list[str] = attrs.field(factory=list)
    refused: int = 0
    undecided: list[str] = attrs.field(factory=list)


async def run_phase(pace: SharedPace, phase: Phase, name: str) -> Outcome:
    """Make the phase's calls, for two keys of one user."""
    outcome = Outcome()
    user, key = Limit(phase.user_calls, phase.window_seconds), Limit(phase.key_calls, phase.window_seconds)
    made = 0

    async def take() -> None:
        nonlocal made
        made += 1
        call = f"{name}-{phase.mode}-{made}"
        try:
            standing = await pace.take(call, UserId(phase.user_id), user, ApiKeyId(f"key-{made % 2}"), key)
        except RateStoreUnavailable:
            outcome.undecided.append(call)
        else:
            if standing.refused:
                outcome.refused += 1
            else:
                outcome.admitted.append(call)

    async def at(seconds: float, count: Callable[[], int]) -> None:
        began = trio.current_time()
        for number in range(round(phase.windows * phase.window_seconds / seconds)):
            await trio.sleep_until(began + number * seconds)
            for _ in range(count()):
                nursery.start_soon(take)

    async with trio.open_nursery() as nursery:
        if phase.mode == "burst":
            await at(phase.window_seconds, lambda: -(-BURST_FACTOR * phase.user_calls // phase.processes))
        else:
            await at(phase.window_seconds * phase.processes / phase.user_calls / STEADY_FACTOR, lambda: 1)
    return outcome


async def main(url: str, name: str) -> None:
    """Answer phases until standard input ends."""
    address = load_settings({"REDIS_URL": url}).redis_address
    assert address is not None
    pace = SharedPace(address, random.Random(name), structlog.wrap_logger(structlog.PrintLogger(sys.stderr)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pace.run)
        await pace.tried.wait()
        print("ready", flush=True)
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            told: dict[str, Any] = json.loads(line)
            outcome = await run_phase(pace, Phase(**told), name)
            print(json.dumps(attrs.asdict(outcome)), flush=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, sys.argv[1], sys.argv[2])
