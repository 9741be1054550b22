"""Leases: work that one process does at a time, and that another takes up when that one is gone.

A lease saves work that would be done twice and keeps runs apart; it is not what keeps money right.
"""

from collections.abc import Awaitable, Callable
from typing import Final

import trio
from structlog.typing import FilteringBoundLogger

from callora.ledger.faults import CalloraFault
from callora.store.bridge import Database, StatementRejected
from callora.store.meter_sources import Lease, give_lease, take_lease

LEASE_SECONDS: Final = 10.0
LOOK_SECONDS: Final = 1.0
"""How often a lease is renewed, or asked for by who waits for it."""
GIVE_SECONDS: Final = 2.0
"""How long giving it back may take when the process ends; then it ends by itself."""


class Leases:
    """Takes leases for one holder."""

    def __init__(self, database: Database, holder: str, log: FilteringBoundLogger) -> None:
        """Args:
        holder: a UUID that no other has.
        """
        self._database = database
        self._holder = holder
        self._log = log

    async def work(self, name: Lease, work: Callable[[], Awaitable[None]]) -> bool:
        """Take a lease if it is free, and work while it is held; return whether the work came to its end.

        Raises:
            StoreUnavailable, OutcomeUnknown: whether it is free could not be asked.
            StatementRejected: there is no such table yet.
            Exception: what the work raised.

        Cancellation: ends the work; the lease is given back.
        """
        if not await take_lease(self._database, name, self._holder, LEASE_SECONDS):
            return False
        done = False
        failure: Exception | None = None

        async def keep(working: trio.CancelScope) -> None:
            good_until = trio.current_time() + LEASE_SECONDS
            while trio.current_time() < good_until:
                await trio.sleep(LOOK_SECONDS)
                try:
                    if not await take_lease(self._database, name, self._holder, LEASE_SECONDS):
                        break
                except CalloraFault as fault:
                    self._log.warning("lease_not_renewed", lease=name, error=str(fault))
                else:
                    good_until = trio.current_time() + LEASE_SECONDS
            self._log.warning("lease_lost", lease=name)
            working.cancel()

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keep, nursery.cancel_scope)
                try:
                    await work()
                    done = True
                except Exception as error:  # raised below, where the nursery does not wrap it in an exception group
                    failure = error
                nursery.cancel_scope.cancel()
        finally:
            with trio.move_on_after(GIVE_SECONDS, shield=True):
                await self._give(name)
        if failure is not None:
            raise failure
        return done

    async def _give(self, name: Lease) -> None:
        try:
            await give_lease(self._database, name, self._holder)
        except (CalloraFault, StatementRejected) as fault:
            self._log.warning("lease_not_given", lease=name, error=str(fault))
