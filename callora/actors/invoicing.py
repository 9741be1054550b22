"""Invoicing: once a month each vault's charges of the month before are closed, and its owner is told."""

from typing import Final

from callora.ledger.clock import Clock
from callora.ledger.ids import FIRST_ID, Ids, VaultId
from callora.store import invoices as store
from callora.store.bridge import Database

BATCH: Final = 500


class Invoicing:
    """Makes invoices. Several processes may do this at once: a vault has one for a month."""

    def __init__(self, database: Database, clock: Clock, ids: Ids) -> None:
        self._database = database
        self._clock = clock
        self._ids = ids

    async def sweep(self) -> None:
        """Close every month that can be closed.

        Raises:
            CalloraFault: the next sweep goes on; what is closed stays so.
        """
        while (month := await store.next_month(self._database, self._clock.now())) is not None:
            after: VaultId | None = VaultId(FIRST_ID)
            while after is not None:
                async with self._database.transaction() as connection:
                    after = await store.close_vaults(
                        connection, month, after, BATCH, self._clock.now(), self._ids.uuid7
                    )
            await store.close_month(self._database, month)
