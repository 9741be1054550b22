"""Row 10: memory of a process, of a vault that is used and of one that is not; and the longest pause among many vaults.

An active vault has an actor, which is retired when nobody has called for some seconds and leaves its state behind; it
is measured by a burst that is over before that. A touched vault was called once within the hour: what its key, limiter
and counters leave behind.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import attrs
import trio

from bench.load import Target, run_wrk, write_keys
from bench.machine import resident_bytes
from bench.openloop import Latencies, open_loop
from bench.plan import Plan, Progress
from bench.stack import Gateway, Stack

_CONNECTIONS: Final = 64
_TOUCH_RATE: Final = 1e6
"""Out of reach on purpose: all connections are kept busy until every vault has been called once."""
_BACKGROUND_SHARE: Final = 0.25
"""Of the rate at which vaults were touched: enough to make garbage, too little to make queues."""
_PROBES_PER_SECOND: Final = 500
_NOISE_BYTES: Final = 2 * 2**20
"""How much two processes with the same work differ in resident memory."""
_BURST_VAULTS_MAX: Final = 5000
_BURST_STEP: Final = 500
_BURST_SECONDS: Final = 1.0
"""No step begins later, so that all are over within the 2 s after which an idle vault's actor is retired."""


@attrs.frozen
class MemoryFigures:
    """What vaults cost."""

    vaults: int
    """How many were touched."""
    base_mib: float
    """Resident memory after a few thousand calls of one vault, MiB."""
    active_vault_kib: float
    """Added by each vault of a burst that kept every one of its actors alive, KiB."""
    burst_vaults: int
    """How many vaults the burst called."""
    touched_mib: float
    """Resident memory after every vault was called once, MiB."""
    idle_vault_bytes: float
    """Added by each vault that exists and is not called, beyond what two processes differ by anyhow, bytes."""
    pause_ms: float
    """The longest a refusal that needs no I/O had to wait while all these vaults were active, milliseconds."""
    pause_p99_ms: float
    """The 99th percentile of the same."""
    pause_base_ms: float
    """The longest in a process with one vault at the same rate: what the machine adds by itself."""


async def run_memory(stack: Stack, plan: Plan, progress: Progress) -> MemoryFigures:
    """Return memory and pauses.

    Raises:
        BenchError: a call was refused or lost.
    """
    nobody = write_keys(stack.directory / "nobody.keys", [])
    few = await stack.tenant("memory_few", vaults=1)
    many = await stack.tenant("memory_many", vaults=plan.memory_vaults)
    async with stack.gateway("memory_few", few) as gateway:
        base = await _settled_bytes(stack, gateway)
        rate = await _rate_of(gateway, calls=5000)
        alone = await _pauses(gateway, nobody, few.keys, rate=rate * _BACKGROUND_SHARE, seconds=plan.pause_seconds)
    progress.say(f"memory: {base / 2**20:.1f} MiB with one vault; longest pause {alone.max_ms:.1f} ms")
    first = write_keys(stack.directory / "first.keys", many.api_keys[:1])
    async with stack.gateway("memory_many", many) as gateway:
        untouched = await _settled_bytes(stack, gateway, keys=first)
        progress.say(f"memory: {untouched / 2**20:.1f} MiB with {plan.memory_vaults} vaults, one of them called")
        burst = await _burst(stack, gateway, many.api_keys[1:])
        active = resident_bytes(gateway.child.pid)
        began = trio.current_time()
        await open_loop(gateway.target, rate=_TOUCH_RATE, calls=plan.memory_vaults, connections=_CONNECTIONS)
        rate = plan.memory_vaults / (trio.current_time() - began)
        touched = resident_bytes(gateway.child.pid)
        progress.say(f"memory: {touched / 2**20:.1f} MiB with all called once, at {rate:.0f}/s")
        among = await _pauses(gateway, nobody, many.keys, rate=rate * _BACKGROUND_SHARE, seconds=plan.pause_seconds)
        progress.say(f"longest pause among {plan.memory_vaults} vaults: {among.max_ms:.1f} ms")
    return MemoryFigures(
        vaults=plan.memory_vaults,
        base_mib=base / 2**20,
        active_vault_kib=(active - untouched) / burst / 1024,
        burst_vaults=burst,
        touched_mib=touched / 2**20,
        idle_vault_bytes=max(0, untouched - base - _NOISE_BYTES) / plan.memory_vaults,
        pause_ms=among.max_ms,
        pause_p99_ms=among.p99_ms,
        pause_base_ms=alone.max_ms,
    )


async def _settled_bytes(stack: Stack, gateway: Gateway, keys: Path | None = None) -> int:
    """Return the resident memory once calls over as many connections as the touching has have filled every buffer."""
    target = attrs.evolve(gateway.target, keys=keys or gateway.tenant.keys)
    wrk = stack.tools["wrk"]
    await run_wrk(wrk, target, connections=_CONNECTIONS, seconds=2, directory=stack.directory)
    return resident_bytes(gateway.child.pid)


async def _burst(stack: Stack, gateway: Gateway, api_keys: Sequence[str]) -> int:
    """Call as many vaults, once each, as can be active at the same time; return how many that were."""
    began, called = trio.current_time(), 0
    while called < min(_BURST_VAULTS_MAX, len(api_keys)) and trio.current_time() < began + _BURST_SECONDS:
        step = write_keys(stack.directory / "burst.keys", api_keys[called : called + _BURST_STEP])
        target = attrs.evolve(gateway.target, keys=step)
        await open_loop(target, rate=_TOUCH_RATE, calls=_BURST_STEP, connections=_CONNECTIONS)
        called += _BURST_STEP
    return called


async def _rate_of(gateway: Gateway, *, calls: int) -> float:
    began = trio.current_time()
    await open_loop(gateway.target, rate=_TOUCH_RATE, calls=calls, connections=_CONNECTIONS)
    return calls / (trio.current_time() - began)


async def _pauses(gateway: Gateway, nobody: Path, keys: Path, *, rate: float, seconds: int) -> Latencies:
    """Return how long refusals for want of a key took while calls of all vaults arrived at a constant rate."""
    seen: list[Latencies] = []
    probe = attrs.evolve(gateway.target, keys=nobody)
    calls = attrs.evolve(gateway.target, keys=keys)

    async def watch() -> None:
        probes = int(_PROBES_PER_SECOND * seconds)
        seen.append(await open_loop(probe, rate=_PROBES_PER_SECOND, calls=probes, connections=4, expected_status=401))

    async def work(target: Target) -> None:
        await open_loop(target, rate=rate, calls=int(rate * seconds), connections=_CONNECTIONS)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work, calls)
        nursery.start_soon(watch)
    return seen[0]
