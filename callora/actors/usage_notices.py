"""Notices of usage: whoever has a webhook endpoint that wants his calls is told of them, some at a time.

Nothing is looked for while nobody wants it. Several processes may do this: feeds are kept under their locks.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from callora.actors.live_usage import shown
from callora.ledger.clock import Clock
from callora.ledger.ids import Ids, UserId
from callora.store import feed
from callora.store import usage_notices as store
from callora.store.bridge import Database

TURNS_MAX: Final = 200
"""In one sweep; what is left waits for the next."""


class UsageNotices:
    """Writes what closed into the outbox."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        ids: Ids,
        *,
        interval_seconds: float,
        kept_seconds: float,
    ) -> None:
        """Args:
        kept_seconds: how long a feed's events are kept.
        """
        self._database = database
        self._clock = clock
        self._ids = ids
        self._fresh = timedelta(seconds=interval_seconds / 2)
        self._kept = timedelta(seconds=kept_seconds)

    async def sweep(self) -> None:
        """Bring the feeds of those who want it up to date, and tell them.

        Raises:
            CalloraFault: what was not told is told by the next sweep.
        """
        users = await store.wanting(self._database)
        if users:
            await feed.begin(self._database, users, self._clock.now(), self._kept)
            while (await feed.advance(self._database, users, self._clock.now(), fresh=self._fresh)).behind:
                await self._tell(users)
        await store.begin(self._database, users, self._clock.now())
        if users:
            await self._tell(users)

    async def _tell(self, users: Sequence[UserId]) -> None:
        for _ in range(TURNS_MAX):
            async with self._database.transaction() as connection:
                told = await store.tell(connection, users, self._clock.now(), self._ids.uuid7, shown)
            if not told:
                return
