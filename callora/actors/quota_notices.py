"""Notices of used-up credits: an owner hears once a month that 80, 95 and 100 percent of them are gone.

Calls pay nothing for it: one process at a time walks through the vaults that have a quota, by their ids, in batches.
"""

from datetime import timedelta
from typing import Final

from callora.ledger.clock import Clock
from callora.ledger.ids import FIRST_ID, Ids, VaultId
from callora.ledger.quota import month_of
from callora.store import quota_notices as store
from callora.store.bridge import Database
from callora.store.outbox import Event, add_events

BATCH: Final = 1000


class QuotaNotices:
    """Writes what is to be told into the outbox."""

    def __init__(self, database: Database, clock: Clock, ids: Ids, *, interval_seconds: float) -> None:
        self._database = database
        self._clock = clock
        self._ids = ids
        self._every = timedelta(seconds=interval_seconds)

    async def sweep(self) -> None:
        """Look at every vault that has a quota, unless another process has within the interval.

        Raises:
            CalloraFault: some were not looked at; the next sweep makes up for it.
        """
        now = self._clock.now()
        if not await store.take_turn(self._database, now, self._every):
            return
        month = f"{month_of(now)[0]:%Y-%m}"
        after: VaultId | None = VaultId(FIRST_ID)
        while after is not None:
            async with self._database.transaction() as connection:
                turn = await store.look(connection, after, BATCH, month, now)
                events = [self._event(each, month, percent) for each in turn.reached for percent in each.thresholds]
                if events:
                    await add_events(connection, events, now)
            after = turn.last

    def _event(self, reached: store.Reached, month: str, percent: int) -> Event:
        return Event(
            event_id=self._ids.uuid7(),
            type=store.EVENT,
            subject=f"{reached.vault_id}:{month}:{percent}",
            developer_id=None,
            payload={
                "vaultId": reached.vault_id,
                "planId": reached.plan_id,
                "period": month,
                "threshold": percent,
                "creditsGranted": reached.granted,
                "creditsRemaining": reached.remaining,
            },
            user_id=reached.user_id,
        )
