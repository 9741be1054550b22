"""Row 11: two worker processes beside one on the same database, nothing pinned."""

import attrs

from bench.lanes import Lane, Sample, Spread, measure, spread
from bench.machine import all_cores
from bench.plan import Plan, Progress
from bench.stack import Stack

_CONNECTIONS = 256


@attrs.frozen
class WorkerFigures:
    """The paid lane with one and with two worker processes."""

    one_calls_per_second: Spread
    two_calls_per_second: Spread
    one_cpu_us: Spread
    """CPU time of the gateway and PostgreSQL for one call, microseconds."""
    two_cpu_us: Spread
    complaints: tuple[str, ...]


async def run_workers(stack: Stack, plan: Plan, progress: Progress) -> WorkerFigures:
    """Return both, interleaved, each checked against its ledger.

    Load, upstream and PostgreSQL leave their core for these runs, and every core is everybody's: where the machine has
    only two, two workers have to share them with the load, and the ratio says what the machine still had to give.
    """
    tenants = [await stack.tenant(f"workers{count}", vaults=plan.vaults) for count in (1, 2)]
    cores = all_cores()
    samples: dict[int, list[Sample]] = {1: [], 2: []}
    complaints: list[str] = []
    async with (
        stack.gateway("workers1", tenants[0], workers=1, cores=cores) as one,
        stack.gateway("workers2", tenants[1], workers=2, cores=cores) as two,
    ):
        lanes = {
            1: Lane("d", "one worker", one.target, one.child, one),
            2: Lane("d", "two workers", two.target, two.child, two),
        }
        for lane in lanes.values():
            async with lane.awake(stack.postgres):
                pass  # stopped where they stand, they might have had a transaction open
        with stack.unpinned():
            for repetition in range(plan.repetitions):
                for count, lane in lanes.items():
                    async with lane.awake(stack.postgres):
                        sample, wrong = await measure(stack, lane, connections=_CONNECTIONS, plan=plan)
                    samples[count].append(sample)
                    complaints += wrong
                    progress.say(
                        f"{count} worker(s), repetition {repetition + 1}/{plan.repetitions}: "
                        f"{sample.load.calls_per_second:.0f} calls/s" + "".join(f"; {each}" for each in wrong)
                    )
    return WorkerFigures(
        one_calls_per_second=spread([each.load.calls_per_second for each in samples[1]]),
        two_calls_per_second=spread([each.load.calls_per_second for each in samples[2]]),
        one_cpu_us=spread([each.gateway_us + each.postgres_us for each in samples[1]]),
        two_cpu_us=spread([each.gateway_us + each.postgres_us for each in samples[2]]),
        complaints=tuple(complaints),
    )
