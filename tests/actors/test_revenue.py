"""The revenue indexer: what is not final waits where it is much, unless a settlement asks for it."""

from datetime import timedelta
from typing import cast

import pytest
import trio
from trio.testing import MockClock

from callora.actors import revenue as actor
from callora.actors.revenue import RevenueIndexer
from callora.metrics import Metrics
from callora.store import revenue as store
from callora.store.bridge import Database
from callora.store.revenue import Indexed
from callora.store.rollup import EPOCH
from tests.simulation.ledgers import TestClock, real_ledger
from tests.simulation.support import Log
from tests.store.test_rollup import placed, taken


async def test_many_charges_wait_until_they_are_final_or_somebody_settles(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actor, "NEWEST_MAX", 2)
    async with real_ledger(database, TestClock()) as ledger:
        indexer = RevenueIndexer(
            database,
            ledger.clock,
            Metrics(),
            Log().logger(),
            network="testnet",
            fee_bps=0,
            interval_seconds=60,
        )
        vault_id = await ledger.vault(1000)

        async def charged(times: int) -> None:
            for _ in range(times):
                await taken(ledger, vault_id, await placed(ledger, vault_id))

        async def indexed() -> int:
            while (made := await indexer.make_pass()) is not None and made.behind:
                pass
            return await ledger.count("revenue_entries")

        await charged(2)
        assert await indexed() == 2, "few are indexed at once"
        await charged(1)
        assert await indexed() == 2, "three are many"
        await indexer.catch_up()
        assert await ledger.count("revenue_entries") == 3
        await charged(1)
        assert await indexed() == 3
        ledger.clock.advance(61)
        assert await indexed() == 4, "they are final"
        assert await ledger.findings() == []


async def test_passes_take_longer_spans_while_they_are_quick_or_find_little(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans: list[timedelta] = []
    passes = [(0.005, 5000), (0.02, 5000), (0.5, 3), (0.5, 0), (0.5, 5000), (0.05, 5000), (0.02, 5000)]

    async def advance(*_: object, span: timedelta, **__: object) -> Indexed:
        took, entries = passes[len(spans)]
        spans.append(span)
        await trio.sleep(took)
        return Indexed(EPOCH, EPOCH, entries, behind=len(spans) < len(passes))

    async def set_fee(*_: object) -> bool:
        await trio.lowlevel.checkpoint()
        return False

    monkeypatch.setattr(store, "advance", advance)
    monkeypatch.setattr(store, "set_fee", set_fee)
    indexer = RevenueIndexer(
        cast(Database, None),
        TestClock(),
        Metrics(),
        Log().logger(),
        network="testnet",
        fee_bps=0,
        interval_seconds=60,
    )
    await indexer.catch_up()
    assert [span.total_seconds() for span in spans] == [1, 2, 2, 4, 8, 4, 2]
