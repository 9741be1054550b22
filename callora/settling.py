"""`callora settle`: asks the service that runs settlements for a run, or makes one where none does; and tells what came
of it.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Final

import attrs
import trio

from callora.chain_part import open_counter
from callora.config.settings import Settings
from callora.ledger.clock import Clock
from callora.ledger.faults import ChainMismatch
from callora.service import Budget, Context, chain_desk, open_ledger
from callora.store import settlements as store
from callora.store.bridge import Database, open_database
from callora.store.reads.settlements import Paid, paid_since

LOOK_SECONDS: Final = 0.2
TAKEN_SECONDS: Final = 3.0
"""How long a command waits for a service to take up its request before it runs alone: a lease that was lost is taken
by another process within about a second."""


@attrs.frozen
class Settled:
    """What a command's run came to."""

    said: str
    payments: Sequence[Paid]
    """To developers, by settlements of this run or under way before."""
    ended: bool
    """Whether all of them have ended."""


async def settle_now(context: Context, dsn: str, wait_seconds: float) -> Settled:
    """Have revenue settled up to now, by a running service or by this process, and wait for what comes of it.

    Args:
        wait_seconds: how long to wait for the run, and then for its settlements.

    Raises:
        ChainMismatch: no service runs settlements, and this process is not configured to.
        StoreUnavailable, ChainUnavailable: it may have been asked for.
    """
    settings, clock = context.settings, context.clock
    began = clock.now()
    async with open_database(dsn, pool_max=2) as database:
        wanted_at = await store.ask_for_run(database, settings.stellar_network)
        with trio.move_on_after(TAKEN_SECONDS) as waiting:
            while not (await store.runner(database, settings.stellar_network)).held:  # noqa: ASYNC110
                await trio.sleep(LOOK_SECONDS)
        if not waiting.cancelled_caught:
            return await _follow(database, settings, clock, wanted_at, began, wait_seconds)
        async with _alone(context, dsn):
            return await _follow(database, settings, clock, wanted_at, began, wait_seconds)


@asynccontextmanager
async def _alone(context: Context, dsn: str) -> AsyncIterator[None]:
    """Run settlements in this process for the length of the block."""
    settings = context.settings
    if settings.settlement_charging_seed is None:
        raise ChainMismatch(
            "no running service settles, and SETTLEMENT_CHARGING_SEED and SETTLEMENT_CREDITING_SEED are not set here"
        )
    async with (
        open_ledger(context, dsn, Budget(settings.drain_timeout_seconds)) as ledger,
        open_counter(chain_desk(context, ledger)) as part,
        trio.open_nursery() as nursery,
    ):
        assert part.settlements is not None, "the keys are set"
        await nursery.start(part.settlements.run)
        yield
        nursery.cancel_scope.cancel()


async def _follow(
    database: Database, settings: Settings, clock: Clock, wanted_at: datetime, began: datetime, wait_seconds: float
) -> Settled:
    network = settings.stellar_network
    runner = await store.runner(database, network)
    with trio.move_on_after(wait_seconds) as waiting:
        while runner.served_at is None or runner.served_at < wanted_at:
            await trio.sleep(LOOK_SECONDS)
            runner = await store.runner(database, network)
    if waiting.cancelled_caught:
        return Settled(f"nobody settled within {wait_seconds:g} s; the service's log says why", (), ended=False)
    with trio.move_on_after(wait_seconds):
        while await store.under_way(database, network):  # noqa: ASYNC110 - another process may carry them on
            await trio.sleep(LOOK_SECONDS)
    payments = await paid_since(database, network, began)
    return Settled(runner.said or "", payments, ended=not await store.under_way(database, network))
