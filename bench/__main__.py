"""`python -m bench`: measure, print the table, write the JSON file."""

import argparse
import sys
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import trio

from bench.bodies import run_bodies
from bench.history import run_history
from bench.intents import run_intents
from bench.lanes import run_lanes
from bench.latency import run_latency
from bench.ledger import run_ledger
from bench.machine import BenchError, describe, require_tools
from bench.memory import run_memory
from bench.plan import FULL, QUICK, Plan, Progress
from bench.rating import run_rating
from bench.report import Results, render, save
from bench.settlement import run_settlement
from bench.stack import Stack, standing
from bench.start import run_start
from bench.usage import run_usage
from bench.webhooks import run_webhooks
from bench.workers import run_workers

OUT: Final = Path(__file__).resolve().parent / "out"

Section = Callable[[Stack, Plan, Progress, Results], Awaitable[None]]


async def _lanes(stack: Stack, plan: Plan, progress: Progress, results: Results) -> None:
    results.commit_ms = await stack.postgres.commit_ms(max(2, plan.seconds))
    progress.say(f"one commit: {results.commit_ms:.2f} ms (pgbench -N, 1 client)")
    results.lanes = await run_lanes(stack, plan, progress)


async def _ledger(stack: Stack, plan: Plan, progress: Progress, results: Results) -> None:
    results.ledger = await run_ledger(stack, plan, progress)


async def _memory(stack: Stack, plan: Plan, progress: Progress, results: Results) -> None:
    results.memory = await run_memory(stack, plan, progress)


async def _latency(stack: Stack, plan: Plan, progress: Progress, results: Results) -> None:
    results.latency = await run_latency(stack, plan, progress)


async def _bodies(stack: Stack, plan: Plan, progress: Progress, results: Results) -> None:
    results.bodies = await run_bodies(stack, plan, progress)


async def _workers(stack: Stack, plan: Plan, progress: Progress, results: Results) -> None:
    results.workers = await run_workers(stack, plan, progress)


async def _intents(stack: Stack, plan: Plan, progress: Progress, results: Results) -> None:
    results.intents = await run_intents(stack, plan, progress)


async def _start(stack: Stack, plan: Plan, progress: Progress, results: Results) -> None:
    results.start = await run_start(stack, plan, progress)


async def _usage(stack: Stack, plan: Plan, progress: Progress, results: Results) -> None:
    results.usage = await run_usage(stack, plan, progress)


async def _settlement(stack: Stack, plan: Plan, progress: Progress, results: Results) -> None:
    results.settlement = await run_settlement(stack, plan, progress)


async def _history(stack: Stack, plan: Plan, progress: Progress, results: Results) -> None:
    results.history = await run_history(stack, plan, progress)


async def _rating(stack: Stack, plan: Plan, progress: Progress, results: Results) -> None:
    results.rating = await run_rating(stack, plan, progress)


async def _webhooks(stack: Stack, plan: Plan, progress: Progress, results: Results) -> None:
    results.webhooks = await run_webhooks(stack, plan, progress)


SECTIONS: Final[dict[str, Section]] = {
    "lanes": _lanes,
    "ledger": _ledger,
    "open-loop": _latency,
    "bodies": _bodies,
    "workers": _workers,
    "intents": _intents,
    "start": _start,
    "memory": _memory,
    "usage": _usage,
    "settlement": _settlement,
    "history": _history,
    "rating": _rating,
    "webhooks": _webhooks,
}
LONG: Final = ("usage", "settlement", "history", "rating", "webhooks")
"""Not part of a quick run unless it is asked for."""


async def run(plan: Plan, sections: list[str], path: Path) -> bool:
    """Measure the sections, print and save what was found; return whether every figure could be given."""
    tools = require_tools()
    machine = describe(tools)
    progress, results = Progress(), Results()
    async with standing(tools) as stack:
        machine.versions["postgresql"] = stack.postgres.version
        for section in sections:
            try:
                await SECTIONS[section](stack, plan, progress, results)
            except* BenchError as failed:
                # The others still have figures, and twenty minutes are not thrown away.
                results.failures += [f"{section}: {each}" for each in _leaves(failed)]
                progress.say(f"{section} failed")
    print(render(machine, plan, results))
    save(path, machine, plan, results)
    print(f"written to {path}", file=sys.stderr)
    return not results.complaints()


def main() -> None:
    """Run the benchmark; exit with 1 when a figure could not be given, with 2 when nothing could be measured."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two short repetitions instead of five, in two minutes")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="measure this only; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures (bench/out by default)")
    asked = parser.parse_args()
    plan = QUICK if asked.quick else FULL
    sections = [name for name in SECTIONS if not (asked.quick and name in LONG)]
    path = asked.json or OUT / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{plan.name}.json"
    sys.exit(_guarded(plan, asked.only or sections, path))


def _guarded(plan: Plan, sections: list[str], path: Path) -> int:
    code = 2
    try:
        code = 0 if trio.run(run, plan, sections, path) else 1
    except* BenchError as failed:
        for each in _leaves(failed):
            print(f"bench: {each}", file=sys.stderr)
    return code


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for each in group.exceptions:
        if isinstance(each, BaseExceptionGroup):
            yield from _leaves(each)
        else:
            yield each


if __name__ == "__main__":
    main()
