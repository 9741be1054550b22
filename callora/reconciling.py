"""`callora reconcile`: compares the books beside running services, with the chain where it is configured."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, Final

from callora.actors.bookkeeping import Bookkeeper, Compared
from callora.actors.chain import Chain
from callora.chain_part import make_bookkeeper, make_chain
from callora.ledger.money import format_usdc
from callora.service import Context
from callora.stellar.transport import open_transport
from callora.store.bridge import open_database

COMMAND_SECONDS: Final = 600.0
"""How long one question to the database may take."""


async def compare_books(context: Context, dsn: str, back: timedelta) -> Compared:
    """Compare once, and keep what is found.

    Args:
        back: how far to look back.

    Raises:
        ChainMismatch: the chain is not what was configured.
        StoreUnavailable, OutcomeUnknown: nothing may be kept; again is safe.
    """
    async with _bookkeeper(context, dsn) as bookkeeper:
        return await bookkeeper.compare(context.clock.now() - back)


async def clear_one(context: Context, dsn: str, discrepancy_id: str, reason: str) -> bool:
    """Clear a discrepancy on the word of whoever runs the command; False where none of this id waits for it."""
    async with _bookkeeper(context, dsn, ask=False) as bookkeeper:
        return await bookkeeper.clear(discrepancy_id, "command", reason)


def shown(compared: Compared) -> dict[str, Any]:
    """Return what a comparison came to, as JSON."""
    return {
        "discrepancies": [
            {
                "id": each.discrepancy_id,
                "class": each.found.kind,
                "network": each.network,
                "subject": each.found.subject,
                "difference_usdc": format_usdc(each.found.difference),
                "message": each.found.said,
                "stopsSettlement": each.found.stops,
                "foundAt": each.found_at.isoformat(),
            }
            for each in compared.open
        ],
        "asked": compared.asked,
        "untold": compared.untold,
    }


@asynccontextmanager
async def _bookkeeper(context: Context, dsn: str, *, ask: bool = True) -> AsyncIterator[Bookkeeper]:
    settings = context.settings

    async with (
        open_database(dsn, pool_max=2, command_seconds=COMMAND_SECONDS) as database,
        open_transport() as transport,
    ):
        chain: Chain | None = None
        if ask and settings.soroban_rpc_enabled:
            chain = make_chain(
                settings,
                transport,
                clock=context.clock,
                random=context.random,
                metrics=context.metrics,
                log=context.logs.logger("chain"),
            )
            await chain.check()
        yield make_bookkeeper(
            settings,
            database,
            chain,
            clock=context.clock,
            ids=context.ids,
            metrics=context.metrics,
            log=context.logs.logger("bookkeeping"),
        )
