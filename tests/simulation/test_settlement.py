"""Settlement on a sandbox whose nodes fail by a plan, in two processes that crash, on a real PostgreSQL.

The auditor counts what the ledger itself owes developers, and knows nothing of settlements.
"""

from collections.abc import AsyncIterator
from random import Random

import attrs
import pytest
import trio
from trio.testing import MockClock

from callora.actors.submitter import TIME_BOUND_SECONDS
from callora.ledger.money import Stroops
from callora.stellar.sandbox.faults import Fault, Kind, Stage
from callora.store.bridge import Database
from tests.support.passing_time import passing_time
from tests.support.payroll import CLOSE_SECONDS, OPENING, Payroll, payroll

USDC = 10_000_000
KINDS: tuple[Kind, ...] = ("delay", "drop", "status", "html", "rpc_error", "try_again_later", "lose")
PATIENCE_SECONDS = 4 * 3600.0
STUCK_SECONDS = TIME_BOUND_SECONDS + 2 * CLOSE_SECONDS
"""How long a transaction may be under way: its time bound and two ledgers."""


@attrs.define(eq=False)
class World:
    """A payroll under fire."""

    at: Payroll
    random: Random
    ledgers: int
    crashes: int = 0
    faults: int = 0

    async def spoil(self) -> None:
        """Let requests go wrong, until cancelled."""
        plan = self.at.town.sandbox.plan
        stages: tuple[Stage, ...] = ("before", "after")
        while True:
            kind = self.random.choice(KINDS)
            submission = kind in ("try_again_later", "lose")
            methods = ("sendTransaction",) if submission else ("*", "sendTransaction", "getTransaction")
            plan.add(
                Fault(
                    kind,
                    method=self.random.choice(methods),
                    times=self.random.randint(1, 4),
                    skip=self.random.randint(0, 3),
                    stage="before" if submission else self.random.choice(stages),
                    seconds=self.random.choice((0.0, 0.0, 3.0)),
                    status=self.random.choice((429, 500, 502, 503, 504)),
                )
            )
            self.faults += 1
            await trio.sleep(20 + 100 * self.random.random())

    async def earn(self) -> None:
        """Let developers earn at random, until cancelled."""
        while True:
            chosen = self.random.sample(list(self.at.wallets), self.random.randint(1, len(self.at.wallets)))
            await self.at.earn({each: self.random.randint(1, 9 * USDC) for each in chosen}, self.random.randint(1, 3))
            await trio.sleep(300 * self.random.random())

    async def pause(self) -> None:
        """Let the vault contract be paused now and then, until cancelled."""
        while True:
            await trio.sleep(self.random.uniform(50, 1000))
            await self.at.pause()
            try:
                await trio.sleep(self.random.uniform(1, 120))
            finally:
                with trio.CancelScope(shield=True):
                    await self.at.pause("unpause")

    async def live(self, cap: Stroops) -> None:
        """Run processes, one after another, each until it dies, until cancelled."""
        while True:
            with trio.move_on_after(self.random.uniform(5, 400)):
                async with self.at.process(
                    interval_seconds=self.random.choice((60.0, 200.0)), charging_cap=cap, fee_bps=250, sync_seconds=30.0
                ) as process:
                    await process.settlements.run()
            self.crashes += 1
            # A process that is killed gives no lease back; its lease ends on the database's own clock.
            await self.at.database.execute("UPDATE settlement_runners SET holder = NULL, held_until = NULL")
            await trio.sleep(self.random.uniform(0, 60))

    async def run(self) -> None:
        """Let so many ledgers close, then let the storm end and wait for everyone to be paid."""
        cap = Stroops(10**15)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.at.town.sandbox.ledger.run, CLOSE_SECONDS)
            async with trio.open_nursery() as storm:
                for task in (self.spoil, self.earn, self.pause):
                    storm.start_soon(task)
                for _ in range(2):
                    storm.start_soon(self.live, cap)
                await trio.sleep(self.ledgers * CLOSE_SECONDS)
                storm.cancel_scope.cancel()
            self.at.town.sandbox.plan.clear()
            await self.at.database.execute("UPDATE settlement_runners SET holder = NULL, held_until = NULL")
            async with self.at.process(interval_seconds=30.0, fee_bps=250) as process, trio.open_nursery() as last:
                await last.start(process.settlements.run)
                with trio.fail_after(PATIENCE_SECONDS):
                    while not await self.settled():  # noqa: ASYNC110 - rows set no event
                        await trio.sleep(10)
                last.cancel_scope.cancel()
                self.left = self.at.vault_has(process.chain)
            nursery.cancel_scope.cancel()

    left: int = 0
    """What the vault contract has in the end."""

    async def settled(self) -> bool:
        """Tell whether everything that was earned is paid."""
        unpaid = await self.at.database.fetch_value(
            "SELECT count(*) FROM revenue_accounts WHERE gross <> sealed_gross OR open_settlement IS NOT NULL"
        )
        indexed = await self.at.database.fetch_value("SELECT coalesce(sum(gross), 0)::bigint FROM revenue_accounts")
        return not unpaid and indexed == sum((await self.at.earned()).values())


@pytest.fixture
async def at(mock_clock: MockClock, database: Database) -> AsyncIterator[Payroll]:
    """A payroll beside which time passes."""
    async with passing_time(mock_clock, database) as watched, payroll(watched, Random(7)) as opened:
        yield opened


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("seed", "ledgers"),
    [(0, 100), *(pytest.param(seed, 2000, marks=pytest.mark.proof) for seed in range(1, 51))],
)
async def test_no_developer_is_paid_twice_or_left_unpaid_whatever_fails_and_whoever_crashes(
    mock_clock: MockClock, at: Payroll, seed: int, ledgers: int
) -> None:
    for _ in range(5):
        await at.developer()
    world = World(at, Random(seed), ledgers)
    await world.run()
    earned, paid = await at.earned(), await at.paid()
    rows = await at.database.fetch("SELECT developer_id, gross, fee FROM revenue_accounts")
    fees = {str(row["developer_id"]): row["fee"] for row in rows}
    assert paid == {developer: amount - fees.get(developer, 0) for developer, amount in earned.items()}
    assert world.left == OPENING - sum(earned.values())
    assert await at.findings() == []
    assert "settlement_crashed" not in at.log.events
    assert "settlement_late_success" not in at.log.events
    slowest = await at.database.fetch_value(
        "SELECT coalesce(max(extract(epoch FROM applied_at - stored_at)), 0)::float8 FROM chain_transactions"
        " WHERE state = 'succeeded' AND purpose LIKE 'c%'"
    )
    assert slowest <= STUCK_SECONDS
    states = await at.states()
    count = await at.database.fetch_value("SELECT count(*) FROM chain_transactions")
    print(
        f"\nseed {seed}: {ledgers} ledgers, {world.faults} faults, {world.crashes} crashes, {len(states)} settlements"
        f" ({states.count('failed')} failed), {count} transactions, slowest {slowest:.0f} s,"
        f" {sum(paid.values()) / USDC:.7f} USDC paid"
    )
