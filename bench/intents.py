"""Calls with an Idempotency-Key beside calls without: what it costs that a retry is charged once."""

from contextlib import AsyncExitStack

import attrs

from bench.lanes import HOT_CONNECTIONS, Lane, LaneFigure, interleave, settle_in
from bench.plan import Plan, Progress
from bench.stack import Stack


@attrs.frozen
class IntentFigures:
    """Paid calls at 64 connections, in turns, each kind on a gateway and a database of its own."""

    plain: LaneFigure
    keyed: LaneFigure

    @property
    def complaints(self) -> tuple[str, ...]:
        """Why there is no figure; empty when every call was answered and every ledger check was exact."""
        return (*self.plain.complaints, *self.keyed.complaints)


async def run_intents(stack: Stack, plan: Plan, progress: Progress) -> IntentFigures:
    """Measure both.

    Raises:
        BenchError: a gateway could not be started, or a tool failed.
    """
    async with AsyncExitStack() as up:
        lanes = []
        for letter, title, keyed in (("d", "paid", False), ("dk", "paid, an Idempotency-Key a call", True)):
            tenant = await stack.tenant(f"intents_{letter}", vaults=plan.vaults)
            gateway = await up.enter_async_context(stack.gateway(f"intents_{letter}", tenant))
            target = attrs.evolve(gateway.target, keyed=keyed)
            lanes.append(Lane(letter, title, target, gateway.child, gateway, connections=(HOT_CONNECTIONS,)))
        await settle_in(stack, lanes)
        plain, keyed_figure = await interleave(stack, plan, progress, lanes)
        return IntentFigures(plain, keyed_figure)
