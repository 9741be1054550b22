"""Row 9: what it costs to pass 1 MiB on, in bytes per second of CPU time, beside nginx with buffering on."""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Final

import attrs

from bench.lanes import Lane, Sample, Spread, measure, spread
from bench.machine import GATEWAY_CORE
from bench.nginx import LARGE_BODY_BYTES, peer
from bench.plan import Plan, Progress
from bench.stack import Stack

CONNECTIONS: Final = 16
_MIB: Final = 1024 * 1024


@attrs.frozen
class BodyFigures:
    """Bodies of 1 MiB through the paid lane and through nginx."""

    callora_mib_per_cpu_second: Spread
    nginx_mib_per_cpu_second: Spread
    callora_mib_per_second: Spread
    nginx_mib_per_second: Spread
    complaints: tuple[str, ...]


async def run_bodies(stack: Stack, plan: Plan, progress: Progress) -> BodyFigures:
    """Return what 1 MiB costs on both sides, interleaved; the paid lane's ledger is checked after each run."""
    async with AsyncExitStack() as up:
        tenant = await stack.tenant("bodies", vaults=plan.vaults, upstream_port=stack.upstream.large_port)
        gateway = await up.enter_async_context(stack.gateway("bodies", tenant))
        nginx = await up.enter_async_context(
            peer(
                stack.tools["nginx"],
                stack.directory / "peer-bodies",
                stack.upstream,
                tenant.api_keys,
                cores=[GATEWAY_CORE],
            )
        )
        target = attrs.evolve(gateway.target, port=nginx.large_port)
        lanes = [
            Lane("d", "callora, 1 MiB bodies", gateway.target, gateway.child, gateway),
            Lane("n", "nginx, 1 MiB bodies", target, nginx.child),
        ]
        samples: dict[str, list[Sample]] = {lane.letter: [] for lane in lanes}
        complaints: list[str] = []
        for repetition in range(plan.repetitions):
            for lane in lanes:
                async with lane.awake(stack.postgres):
                    sample, wrong = await measure(stack, lane, connections=CONNECTIONS, plan=plan)
                samples[lane.letter].append(sample)
                complaints += wrong
                progress.say(
                    f"1 MiB bodies, ({lane.letter}), repetition {repetition + 1}/{plan.repetitions}: "
                    f"{sample.load.calls_per_second:.0f} MiB/s"
                )
    return BodyFigures(
        callora_mib_per_cpu_second=_per_cpu_second(samples["d"]),
        nginx_mib_per_cpu_second=_per_cpu_second(samples["n"]),
        callora_mib_per_second=_per_second(samples["d"]),
        nginx_mib_per_second=_per_second(samples["n"]),
        complaints=tuple(complaints),
    )


def _per_cpu_second(samples: Sequence[Sample]) -> Spread:
    return spread([1e6 / each.gateway_us * LARGE_BODY_BYTES / _MIB for each in samples])


def _per_second(samples: Sequence[Sample]) -> Spread:
    return spread([each.load.calls_per_second * LARGE_BODY_BYTES / _MIB for each in samples])
