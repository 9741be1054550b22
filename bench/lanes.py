"""The lanes, side by side: what a call costs without a gateway, with each layer of ours, with nginx, and made naively.

All gateways run from the start. While one is measured the others are stopped where they stand (SIGSTOP), so a lane
shares its core with nobody; repetitions are interleaved, and each goes through the lanes from another start.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from statistics import median
from typing import Final

import attrs
import trio

from bench.load import Load, Target, run_wrk, write_keys
from bench.machine import GATEWAY_CORE, BenchError, Child, cpu_seconds
from bench.nginx import peer
from bench.plan import Plan, Progress
from bench.postgres import Postgres
from bench.stack import Gateway, GatewayLane, LedgerCheck, Stack

DIRECT: Final = "a"
_WAKE_SECONDS: Final = 0.5
"""After a process was stopped it trusts none of its caches until it has asked the database once, every 0.3 s."""
_FREEZE_SECONDS: Final = 20
_REST_SECONDS: Final = 0.02
HOT_CONNECTIONS: Final = 64
"""Where lane (d1) is measured, and where the ratios are taken."""

_OURS: Final[dict[str, tuple[GatewayLane, str]]] = {
    "b": ("proxy", "callora, proxy only"),
    "c": ("limits", "callora, + key and limits"),
    "d": ("paid", "callora, + durable hold and capture"),
}


@attrs.frozen
class Lane:
    """One way for a call to reach the upstream."""

    letter: str
    title: str
    target: Target
    child: Child
    """The process tree whose CPU time is the lane's cost."""
    paid: Gateway | None = None
    """Set where the ledger check ends each run."""
    connections: tuple[int, ...] | None = None
    """Set where the lane is not measured at all of the plan's."""

    @asynccontextmanager
    async def awake(self, postgres: Postgres) -> AsyncIterator[None]:
        """Let the lane's processes run for the block and stop them where they stand after it, outside of transactions.

        One that is left open keeps every version of a row that is made meanwhile, in all databases of the server: each
        round of another lane has more of them to look through, and a third of the calls is left after some seconds.
        """
        self.child.thaw()
        await trio.sleep(_WAKE_SECONDS)
        yield
        if self.letter == DIRECT:  # every lane needs the upstream
            return
        with trio.move_on_after(_FREEZE_SECONDS):
            while True:
                self.child.freeze()
                if not await postgres.transactions():
                    return
                self.child.thaw()
                await trio.sleep(_REST_SECONDS)
        raise BenchError(f"lane ({self.letter}) has had a transaction open for {_FREEZE_SECONDS} s")


@attrs.frozen
class Spread:
    """A figure over all repetitions."""

    median: float
    least: float
    most: float


@attrs.frozen
class Sample:
    """One repetition."""

    load: Load
    gateway_us: float
    """CPU time of the gateway for one call, microseconds."""
    postgres_us: float
    """CPU time of PostgreSQL for one call, microseconds."""


@attrs.frozen
class LaneFigure:
    """A lane at one number of connections."""

    letter: str
    title: str
    connections: int
    calls_per_second: Spread
    p50_ms: Spread
    p99_ms: Spread
    gateway_us: Spread
    postgres_us: Spread
    complaints: tuple[str, ...]
    """Why this lane has no figure; empty when every call was answered and every ledger check was exact."""


def spread(values: Sequence[float]) -> Spread:
    """Return median, least and most of at least one value."""
    return Spread(median(values), min(values), max(values))


async def measure(stack: Stack, lane: Lane, *, connections: int, plan: Plan) -> tuple[Sample, list[str]]:
    """Return one repetition of a lane and what is wrong with it."""
    check = None if lane.paid is None else LedgerCheck(stack, lane.paid)
    loads = []
    if check is not None:
        await check.begin()

    async def load(seconds: int) -> Load:
        seen = await run_wrk(
            stack.tools["wrk"], lane.target, connections=connections, seconds=seconds, directory=stack.directory
        )
        loads.append(seen)
        return seen

    if plan.warm_up_seconds:
        await load(plan.warm_up_seconds)
    gateway, database = cpu_seconds(lane.child.pid), cpu_seconds(stack.postgres.pid)
    seen = await load(plan.seconds)
    calls = max(1, seen.answered)
    sample = Sample(
        load=seen,
        gateway_us=(cpu_seconds(lane.child.pid) - gateway) / calls * 1e6,
        postgres_us=(cpu_seconds(stack.postgres.pid) - database) / calls * 1e6,
    )
    complaints = [each.complaint for each in loads if each.complaint is not None]
    if check is not None:
        answered = sum(each.answered for each in loads)
        complaints += await check.end(answered=answered, cut_off=connections * len(loads))
    return sample, complaints


def figure(lane: Lane, connections: int, samples: Sequence[Sample], complaints: Sequence[str]) -> LaneFigure:
    """Return a lane's figure at one number of connections."""
    return LaneFigure(
        letter=lane.letter,
        title=lane.title,
        connections=connections,
        calls_per_second=spread([each.load.calls_per_second for each in samples]),
        p50_ms=spread([each.load.p50_ms for each in samples]),
        p99_ms=spread([each.load.p99_ms for each in samples]),
        gateway_us=spread([each.gateway_us for each in samples]),
        postgres_us=spread([each.postgres_us for each in samples]),
        complaints=tuple(complaints),
    )


async def run_lanes(stack: Stack, plan: Plan, progress: Progress) -> list[LaneFigure]:
    """Return every lane at each number of connections.

    Raises:
        BenchError: a lane could not be started, or a tool failed.
    """
    async with AsyncExitStack() as up:
        lanes = await _start(stack, plan, up)
        await settle_in(stack, lanes)
        return await interleave(stack, plan, progress, lanes)


async def settle_in(stack: Stack, lanes: Sequence[Lane]) -> None:
    """Have each lane serve a second of calls that are not counted, and then stand still until it is measured."""
    for lane in lanes:
        async with lane.awake(stack.postgres):
            await run_wrk(stack.tools["wrk"], lane.target, connections=64, seconds=1, directory=stack.directory)


async def _start(stack: Stack, plan: Plan, up: AsyncExitStack) -> list[Lane]:
    ours = []
    for letter, (mode, title) in _OURS.items():
        tenant = await stack.tenant(mode, vaults=plan.vaults)
        gateway = await up.enter_async_context(stack.gateway(mode, tenant, lane=mode))
        ours.append(Lane(letter, title, gateway.target, gateway.child, gateway if mode == "paid" else None))
        if mode == "paid":
            limited = await stack.tenant("limited", vaults=plan.vaults, limited=True)
            under = await up.enter_async_context(stack.gateway("limited", limited))
            title = "the same, all spending limits and a plan"
            ours.append(Lane("dl", title, under.target, under.child, under, connections=(HOT_CONNECTIONS,)))
            hot = attrs.evolve(gateway.target, keys=write_keys(stack.directory / "hot.keys", tenant.api_keys[:1]))
            title = "the same, one vault for all calls"
            ours.append(Lane("d1", title, hot, gateway.child, gateway, connections=(HOT_CONNECTIONS,)))
    target = ours[-1].target
    nginx = await up.enter_async_context(
        peer(stack.tools["nginx"], stack.directory / "peer", stack.upstream, tenant.api_keys, cores=[GATEWAY_CORE])
    )
    naive, naive_target = await up.enter_async_context(stack.naive(plan.vaults))
    direct = Target(stack.upstream.port, target.path, tenant.keys)
    return [
        Lane(DIRECT, "upstream direct", direct, stack.upstream.child),
        *ours,
        Lane("n", "nginx proxy_pass, key map", attrs.evolve(direct, port=nginx.port), nginx.child),
        Lane("x", "the packages used naively", naive_target, naive),
    ]


async def interleave(stack: Stack, plan: Plan, progress: Progress, lanes: Sequence[Lane]) -> list[LaneFigure]:
    """Return each lane's figures at each of its numbers of connections, measured in turns."""
    rows = [(lane, count) for count in plan.connections for lane in lanes if count in (lane.connections or (count,))]
    samples: list[list[Sample]] = [[] for _ in rows]
    complaints: list[list[str]] = [[] for _ in rows]
    for repetition in range(plan.repetitions):
        offset = repetition * len(rows) // plan.repetitions
        for position in [*range(offset, len(rows)), *range(offset)]:
            lane, connections = rows[position]
            async with lane.awake(stack.postgres):
                sample, wrong = await measure(stack, lane, connections=connections, plan=plan)
            samples[position].append(sample)
            complaints[position] += wrong
            progress.say(
                f"({lane.letter}) at {connections}, repetition {repetition + 1}/{plan.repetitions}: "
                f"{sample.load.calls_per_second:.0f} calls/s" + "".join(f"; {each}" for each in wrong)
            )
    return [figure(lane, count, samples[i], complaints[i]) for i, (lane, count) in enumerate(rows)]
