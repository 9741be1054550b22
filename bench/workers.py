"""Row 11: two worker processes beside one on a database, nothing pinned; and beside two whose vaults are limited."""

import attrs

from bench.lanes import Lane, Sample, Spread, measure, spread
from bench.machine import all_cores
from bench.plan import Plan, Progress
from bench.stack import Stack

_CONNECTIONS = 256


@attrs.frozen
class WorkerFigures:
    """The paid lane with one and with two worker processes, and with two where all limits and a plan are asked."""

    one_calls_per_second: Spread
    two_calls_per_second: Spread
    limited_calls_per_second: Spread
    one_cpu_us: Spread
    """CPU time of the gateway and PostgreSQL for one call, microseconds."""
    two_cpu_us: Spread
    complaints: tuple[str, ...]


async def run_workers(stack: Stack, plan: Plan, progress: Progress) -> WorkerFigures:
    """Return all three, interleaved, each checked against its ledger.

    Load, upstream and PostgreSQL leave their core for these runs, and every core is everybody's: where the machine has
    only two, two workers have to share them with the load, and the ratio says what the machine still had to give.
    """
    tenants = [await stack.tenant(f"workers{count}", vaults=plan.vaults, limited=count == 3) for count in (1, 2, 3)]
    cores = all_cores()
    samples: dict[str, list[Sample]] = {"one worker": [], "two workers": [], "two workers, limited": []}
    complaints: list[str] = []
    async with (
        stack.gateway("workers1", tenants[0], workers=1, cores=cores) as one,
        stack.gateway("workers2", tenants[1], workers=2, cores=cores) as two,
        stack.gateway("workers3", tenants[2], workers=2, cores=cores) as limited,
    ):
        gateways = (("d", one), ("d", two), ("dl", limited))
        lanes = [
            Lane(letter, title, each.target, each.child, each)
            for title, (letter, each) in zip(samples, gateways, strict=True)
        ]
        for lane in lanes:
            async with lane.awake(stack.postgres):
                pass  # stopped where they stand, they might have had a transaction open
        with stack.unpinned():
            for repetition in range(plan.repetitions):
                for lane in lanes:
                    async with lane.awake(stack.postgres):
                        sample, wrong = await measure(stack, lane, connections=_CONNECTIONS, plan=plan)
                    samples[lane.title].append(sample)
                    complaints += wrong
                    progress.say(
                        f"{lane.title}, repetition {repetition + 1}/{plan.repetitions}: "
                        f"{sample.load.calls_per_second:.0f} calls/s" + "".join(f"; {each}" for each in wrong)
                    )
    of_one, of_two, of_limited = samples.values()
    return WorkerFigures(
        one_calls_per_second=spread([each.load.calls_per_second for each in of_one]),
        two_calls_per_second=spread([each.load.calls_per_second for each in of_two]),
        limited_calls_per_second=spread([each.load.calls_per_second for each in of_limited]),
        one_cpu_us=spread([each.gateway_us + each.postgres_us for each in of_one]),
        two_cpu_us=spread([each.gateway_us + each.postgres_us for each in of_two]),
        complaints=tuple(complaints),
    )
