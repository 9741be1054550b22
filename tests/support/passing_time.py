"""Time that passes only while nobody works: for tests whose tasks sleep for minutes beside a real PostgreSQL.

An autojumping clock would jump while a task waits for the database, and fire its deadlines. Here the clock jumps to the
next deadline when every task sleeps and no statement is under way.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
import trio.testing

from callora.store.bridge import Connection, Database


class WatchedDatabase(Database):
    """A database that knows how many statements are under way."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.running = 0
        self.idle = trio.Event()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Run the block in one database transaction, all of which counts as one statement."""
        self.running += 1
        try:
            async with self._database.transaction() as connection:
                yield connection
        finally:
            self._ended()

    def _ended(self) -> None:
        self.running -= 1
        if not self.running:
            self.idle.set()
            self.idle = trio.Event()

    async def _call(self, verb: str, sql: str, args: tuple[object, ...], lost: object = None) -> object:
        self.running += 1
        try:
            return await self._database._call(verb, sql, args, lost)  # type: ignore[arg-type]
        finally:
            self._ended()


@asynccontextmanager
async def passing_time(clock: trio.testing.MockClock, database: Database) -> AsyncIterator[WatchedDatabase]:
    """Let time pass while the block runs, as long as no statement of the database that is given is under way."""
    watched = WatchedDatabase(database)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_pass, clock, watched)
        yield watched
        nursery.cancel_scope.cancel()


async def _pass(clock: trio.testing.MockClock, watched: WatchedDatabase) -> None:
    while True:
        await trio.testing.wait_all_tasks_blocked()
        if watched.running:
            await watched.idle.wait()
            continue
        seconds = trio.lowlevel.current_statistics().seconds_to_next_deadline
        # With no deadline at all a task waits for something outside: let it come.
        clock.jump(min(max(seconds, 0.0), 1.0))
