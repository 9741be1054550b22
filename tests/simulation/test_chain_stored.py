"""The same hostile network over a real PostgreSQL: its constraints and locks in place of the model's."""

from collections.abc import AsyncIterator

import pytest
from trio.testing import MockClock

from callora.store.bridge import Database
from callora.store.transactions import Epoch, TransactionStore
from tests.simulation.chain_store import StoredRow
from tests.simulation.chain_world import ChainWorld
from tests.simulation.sky import GENESIS
from tests.support.chain_rows import set_network
from tests.support.passing_time import WatchedDatabase, passing_time

LEDGERS = 60


class StoredWorld(ChainWorld):
    """A world whose transactions are in PostgreSQL."""

    def __init__(self, seed: int, ledgers: int, database: Database) -> None:
        super().__init__(seed, ledgers)
        self._database = database
        self._store = TransactionStore(database)
        self.kept = self._store

    async def set_epoch(self, epoch: Epoch) -> None:
        """Do what an operator does."""
        await super().set_epoch(epoch)
        await set_network(self._database, epoch=epoch.number, halted=epoch.halted)

    async def load(self) -> None:
        """Read what is stored: all of it once all has ended."""
        found = [each.submission for each in await self._store.open_ones("testnet")]
        if not found:
            hashes = await self._database.fetch("SELECT encode(hash, 'hex') AS hash FROM chain_transactions")
            for row in hashes:
                submission = await self._store.find(row["hash"])
                assert submission is not None
                found.append(submission)
        self.tables.rows = {each.hash: StoredRow(each, GENESIS, GENESIS) for each in found}


@pytest.fixture
async def watched(mock_clock: MockClock, database: Database) -> AsyncIterator[WatchedDatabase]:
    """A database beside which time passes."""
    async with passing_time(mock_clock, database) as watching:
        yield watching


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.proof) for seed in (0, *range(2, 30)))])
async def test_nothing_is_submitted_twice_or_lost_on_a_real_database(
    mock_clock: MockClock, watched: WatchedDatabase, seed: int
) -> None:
    world = StoredWorld(seed, LEDGERS, watched)
    world.busy = 0.3
    await world.run()
    assert world.wrong == [], f"seed {seed}"
    assert world.tables.rows
