"""Alerts of low balances: an owner hears once that his balance fell below what he set, and again after it was above.

Calls pay nothing for it: one process at a time walks through the vaults that have a threshold, by their ids, in
batches. A balance that falls and rises between two looks is not told of.
"""

from datetime import timedelta
from typing import Final

from callora.ledger.clock import Clock
from callora.ledger.ids import FIRST_ID, Ids, UserId, VaultId
from callora.ledger.money import Stroops
from callora.store import balance_alerts as store
from callora.store.bridge import Database

BATCH: Final = 1000


class BalanceAlerts:
    """Sets thresholds, and writes what is to be told into the outbox."""

    def __init__(self, database: Database, clock: Clock, ids: Ids, *, interval_seconds: float) -> None:
        self._database = database
        self._clock = clock
        self._ids = ids
        self._every = timedelta(seconds=interval_seconds)

    async def set(self, vault_id: VaultId, threshold: Stroops, user_id: UserId) -> None:
        """Set a threshold, or replace it.

        Args:
            threshold: stroops, > 0.
            user_id: who sets it; the vault must be his.

        Raises:
            StoreUnavailable: nothing was changed. OutcomeUnknown: setting it again is safe.
        """
        await store.set_alert(self._database, vault_id, threshold, user_id, self._clock.now())

    async def remove(self, vault_id: VaultId) -> None:
        """Remove a threshold; one that was never set is removed as well. Raises as `set`."""
        await store.remove_alert(self._database, vault_id, self._clock.now())

    async def sweep(self) -> None:
        """Look at every vault that has a threshold, unless another process has within the interval.

        Raises:
            CalloraFault: some were not looked at; the next sweep makes up for it.
        """
        now = self._clock.now()
        if not await store.take_turn(self._database, now, self._every):
            return
        after: VaultId | None = VaultId(FIRST_ID)
        while after is not None:
            async with self._database.transaction() as connection:
                after = await store.look(connection, after, BATCH, now, self._ids.uuid7)
