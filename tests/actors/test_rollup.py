"""The rollup's task: it goes on whatever happens, and says how far the sums are."""

from typing import cast

import pytest
import trio

from callora.actors import rollup as actor
from callora.actors.rollup import Rollup
from callora.ledger.faults import StoreUnavailable
from callora.metrics import Metrics
from callora.store.breath import BREATH_SECONDS
from callora.store.bridge import Database, open_database
from callora.store.rollup import EPOCH, Pass
from tests.simulation.ledgers import TestClock, real_ledger
from tests.simulation.support import Log
from tests.store.test_rollup import placed, taken


def lag(metrics: Metrics) -> float:
    value: float = metrics.usage_rollup_lag_seconds._value.get()
    return value


async def test_the_lag_is_the_age_of_the_latest_pass_whoever_made_it(database: Database) -> None:
    clock, metrics, log = TestClock(), Metrics(), Log()
    rollups = [Rollup(database, clock, metrics, log.logger(), interval_seconds=60) for _ in range(2)]
    assert await rollups[0].make_pass() is not None
    rollups[0]._show_lag()
    assert lag(metrics) == 0
    clock.advance(50)
    rollups[0]._show_lag()
    assert lag(metrics) == 50
    async with database.transaction() as other:
        await other.fetch("SELECT * FROM usage_rollup FOR UPDATE")
        assert await rollups[1].make_pass() is None
    rollups[1]._show_lag()
    assert lag(metrics) == 50


async def test_a_database_without_the_tables_is_waited_for(empty_database_url: str) -> None:
    log = Log()
    async with open_database(empty_database_url) as database, trio.open_nursery() as nursery:
        rollup = Rollup(database, TestClock(), Metrics(), log.logger(), interval_seconds=0.001)
        await nursery.start(rollup.run)
        with trio.fail_after(60):
            while log.events.count("rollup_failed") < 2:  # noqa: ASYNC110 - the log sets no event
                await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert rollup._as_of == EPOCH


async def test_passes_are_light_while_calls_are_many(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor, "WHOLE_CALLS_MAX", 10)
    async with real_ledger(database, TestClock()) as ledger:
        rollup = Rollup(database, ledger.clock, Metrics(), Log().logger(), interval_seconds=60)
        vault_id = await ledger.vault(1000)

        async def counted() -> int:
            made = await rollup.make_pass()
            assert made is not None
            return made.calls

        assert await counted() == 0
        late = await placed(ledger, vault_id)
        for _ in range(3):
            await taken(ledger, vault_id, await placed(ledger, vault_id))
        ledger.clock.advance(1)
        assert await counted() == 3, "three a second would be 360 that are not final"
        ledger.clock.advance(89)
        await taken(ledger, vault_id, await placed(ledger, vault_id))
        assert await counted() == 0, "light: a minute becomes final, and nothing else is looked at"
        await taken(ledger, vault_id, late)
        assert await counted() == 1, "light: the minute of a minute ago is not looked at"
        assert await counted() == 1, "one call in 89 seconds is few: everything that is not final is looked at"


async def test_after_a_pass_that_failed_one_does_not_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float] = []
    done = trio.Event()

    async def advance(*_: object, rest_seconds: float, **__: object) -> Pass:
        rests.append(rest_seconds)
        await trio.lowlevel.checkpoint()
        if len(rests) == 2:
            raise StoreUnavailable("it took too long")
        if len(rests) == 4:
            done.set()
        return Pass(TestClock().now(), TestClock().now(), 0, behind=False)

    monkeypatch.setattr(actor, "advance", advance)
    rollup = Rollup(cast(Database, None), TestClock(), Metrics(), Log().logger(), interval_seconds=0.001)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await nursery.start(rollup.run)
            await done.wait()
            nursery.cancel_scope.cancel()
    assert rests == [BREATH_SECONDS, BREATH_SECONDS, 0.0, BREATH_SECONDS]
