"""Revenue: a row for each event and refund, once, whatever came in between; and the same rows again from nothing."""

from collections import defaultdict
from collections.abc import AsyncIterator
from datetime import timedelta
from random import Random

import attrs
import pytest
import trio

from callora.ledger.commands import Deposit, Refund
from callora.ledger.ids import EventId, VaultId
from callora.ledger.money import Stroops
from callora.ledger.settlement import platform_fee, refunded_fee
from callora.store import revenue
from callora.store.bridge import Database
from callora.store.revenue import FEE_NOTICE, Indexed, advance, look_again, set_fee
from callora.store.rollup import SETTLE
from tests.simulation.ledgers import RealLedger, TestClock, real_ledger
from tests.store.test_rollup import World, placed, taken
from tests.support.counters import metering, minute, rating_process, snapshot

BPS = 1234
Entries = dict[tuple[str, str, int], tuple[str, int, int]]
EMPTY = """
SET LOCAL session_replication_role = replica;
TRUNCATE revenue_entries, revenue_accounts, revenue_open;
UPDATE revenue_index SET done_until = 'epoch', as_of = 'epoch', pass = 0
"""


@pytest.fixture
async def ledger(database: Database) -> AsyncIterator[RealLedger]:
    """A ledger whose platform takes a share of odd size."""
    async with real_ledger(database, TestClock()) as opened:
        await set_fee(database, BPS, opened.clock.now())
        yield opened


async def stored(database: Database) -> Entries:
    """Return every entry: developer, what was paid, what of it is the platform's."""
    return {
        (str(row["vault_id"]), str(row["event_id"]), row["refund_seq"]): (
            str(row["developer_id"]),
            row["gross"],
            row["fee"],
        )
        for row in await database.fetch("SELECT * FROM revenue_entries")
    }


async def expected(database: Database) -> Entries:
    """Make every entry anew, in the plainest way."""
    fees = [(row["effective_from"], row["bps"]) for row in await database.fetch("SELECT * FROM platform_fees")]
    found: Entries = {}
    events = {row["event_id"]: row for row in await database.fetch("SELECT * FROM usage_events WHERE amount > 0")}
    bps = {each["event_id"]: max(fee for fee in fees if fee[0] <= each["created_at"])[1] for each in events.values()}
    for event_id, event in events.items():
        fee = platform_fee(event["amount"], bps[event_id])
        found[(str(event["vault_id"]), str(event_id), 0)] = (str(event["developer_id"]), event["amount"], fee)
    refunded: dict[object, int] = defaultdict(int)
    for entry in await database.fetch("SELECT * FROM ledger_entries WHERE kind = 'refund' ORDER BY seq"):
        event_id, amount = entry["event_id"], entry["amount"]
        fee = refunded_fee(events[event_id]["amount"], Stroops(refunded[event_id]), amount, bps[event_id])
        refunded[event_id] += amount
        key = (str(entry["vault_id"]), str(event_id), entry["seq"])
        found[key] = (str(events[event_id]["developer_id"]), -amount, -fee)
    return found


async def indexed(ledger: RealLedger, span: timedelta = revenue.SPAN) -> Indexed:
    """Index until nothing is left behind."""
    made = await advance(ledger.database, ledger.clock.now(), span=span)
    while made is not None and made.behind:
        made = await advance(ledger.database, ledger.clock.now(), span=span)
    assert made is not None
    return made


@attrs.define
class Earnings(World):
    """A world whose passes are the indexer's."""

    async def crash(self) -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def cut() -> None:
                    for _ in range(self.random.randrange(40)):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()

                nursery.start_soon(cut)
                await self.pass_lightly()

    async def pass_lightly(self) -> None:
        span = timedelta(seconds=self.random.choice((0.25, 5, 300)))
        newest_max = self.random.choice((None, 0, 3))
        await advance(self.ledger.database, self.ledger.clock.now(), span=span, newest_max=newest_max)

    async def pass_at_once(self) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(self.pass_lightly)
            nursery.start_soon(self.close)

    async def pass_alone(self) -> None:
        await indexed(self.ledger)
        assert await stored(self.ledger.database) == await expected(self.ledger.database)

    async def change_fee(self) -> None:
        await set_fee(self.ledger.database, self.random.choice((0, 1, 3333, 10_000)), self.ledger.clock.now())


@pytest.mark.parametrize("seed", [*range(2), *(pytest.param(seed, marks=pytest.mark.proof) for seed in range(2, 40))])
async def test_whatever_happens_each_event_and_refund_is_indexed_once_and_from_nothing_the_same(
    ledger: RealLedger, seed: int
) -> None:
    random = Random(seed)
    world = Earnings(ledger, random, [await ledger.vault(10_000) for _ in range(3)])
    steps = (
        *(world.place,) * 8,
        *(world.close,) * 7,
        *(world.refund,) * 2,
        *(world.wait,) * 4,
        world.crash,
        world.change_fee,
        world.pass_at_once,
        *(world.pass_lightly,) * 2,
        *(world.pass_alone,) * 2,
    )
    for _ in range(150):
        await random.choice(steps)()
    await world.pass_alone()
    while world.open:
        await world.close()
    await world.pass_alone()
    assert await ledger.count("revenue_open") == 0
    assert await ledger.findings() == []
    before = await stored(ledger.database)
    async with ledger.database.transaction() as connection:
        await connection.execute(EMPTY)
    await indexed(ledger, timedelta(minutes=random.randrange(1, 500)))
    assert await stored(ledger.database) == before
    assert await ledger.findings() == []


async def test_looking_at_everything_again_adds_what_is_missing_and_changes_nothing(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    await placed(ledger, vault_id)  # still open
    await taken(ledger, vault_id, await placed(ledger, vault_id))
    ledger.clock.advance(600)
    await indexed(ledger)
    before = await ledger.database.fetch("SELECT * FROM revenue_entries")
    await look_again(ledger.database)
    assert (await indexed(ledger)).entries == 0
    assert await ledger.database.fetch("SELECT * FROM revenue_entries") == before
    assert await ledger.count("revenue_open") == 1


async def test_what_closes_late_is_found_by_a_later_pass_and_by_none_that_was_sealed(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    late = await placed(ledger, vault_id, ttl_seconds=86_400)
    await taken(ledger, vault_id, await placed(ledger, vault_id))
    ledger.clock.advance(3600)
    await indexed(ledger)
    last = await ledger.database.fetch_value("SELECT pass FROM revenue_index")
    await taken(ledger, vault_id, late)
    await indexed(ledger)
    assert await ledger.database.fetch_value("SELECT pass FROM revenue_entries WHERE event_id = $1", late) > last
    assert await ledger.findings() == []


async def test_calls_of_this_very_moment_are_indexed_at_once(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    await taken(ledger, vault_id, await placed(ledger, vault_id))
    assert (await indexed(ledger)).entries == 1
    assert (await indexed(ledger)).entries == 0


async def test_what_is_not_final_waits_where_it_is_much(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)

    async def final(newest_max: int) -> tuple[int, timedelta]:
        made = await advance(ledger.database, ledger.clock.now(), newest_max=newest_max)
        assert made is not None
        return made.entries, ledger.clock.now() - made.as_of

    await taken(ledger, vault_id, await placed(ledger, vault_id))
    assert (await indexed(ledger)).entries == 1
    for _ in range(3):
        await taken(ledger, vault_id, await placed(ledger, vault_id))
    assert await final(3) == (0, timedelta()), "what was reached before is not taken back"
    ledger.clock.advance(90)
    for _ in range(2):
        await taken(ledger, vault_id, await placed(ledger, vault_id))
    assert await final(1) == (3, SETTLE)
    assert await final(2) == (2, timedelta())
    assert await ledger.findings() == []


async def test_what_a_vault_owes_is_earned_once_it_is_paid(ledger: RealLedger) -> None:
    at = await metering(ledger)
    vault_id = await at.payer(100)
    async with rating_process(ledger, ledger.database) as rater:
        await rater.rate(at.source, [snapshot(minute(0), {1: (60, 0)})])
        assert (await indexed(ledger)).entries == 1
        await rater.rate(at.source, [snapshot(minute(1), {1: (150, 0)})])
        ledger.clock.advance(3600)
        assert (await indexed(ledger)).entries == 0
        assert await ledger.count("revenue_open") == 1
        assert await ledger.findings() == []
        await ledger.locked(vault_id, Deposit(Stroops(49), "not enough"))
        assert (await indexed(ledger)).entries == 0
        await ledger.locked(vault_id, Deposit(Stroops(1), "enough"))
        assert (await indexed(ledger)).entries == 1
    assert await ledger.database.fetch_value("SELECT sum(gross)::bigint FROM revenue_entries") == 150
    assert await ledger.count("revenue_open") == 0
    assert await stored(ledger.database) == await expected(ledger.database)
    assert await ledger.findings() == []


async def refunded(ledger: RealLedger, vault_id: VaultId, event_id: EventId, amount: int, ref: str) -> None:
    await ledger.locked(vault_id, Refund(event_id, Stroops(amount), ref))
    await indexed(ledger)


async def test_refunds_of_a_whole_call_give_back_the_whole_share_however_they_are_cut(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    event_id = await placed(ledger, vault_id)
    await taken(ledger, vault_id, event_id)
    for number in range(10):
        await refunded(ledger, vault_id, event_id, 1, f"r{number}")
        sums = await ledger.database.fetch_row("SELECT gross, fee FROM revenue_accounts")
        assert sums is not None
        assert sums["fee"] == platform_fee(Stroops(10 - number - 1), BPS) <= sums["gross"]
    assert sums is not None
    assert sums["gross"] == sums["fee"] == 0


async def test_another_share_holds_for_calls_from_its_notice_on(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100_000)
    assert not await set_fee(ledger.database, BPS, ledger.clock.now())
    assert await set_fee(ledger.database, 10_000, ledger.clock.now())
    await taken(ledger, vault_id, await placed(ledger, vault_id))
    ledger.clock.advance(FEE_NOTICE.total_seconds())
    await taken(ledger, vault_id, await placed(ledger, vault_id))
    await indexed(ledger)
    rows = await ledger.database.fetch("SELECT fee FROM revenue_entries ORDER BY at")
    assert [row["fee"] for row in rows] == [10 * BPS // 10_000, 10]


async def test_while_another_process_indexes_one_returns_at_once(ledger: RealLedger) -> None:
    async with ledger.database.transaction() as other:
        await other.fetch("SELECT * FROM revenue_index FOR UPDATE")
        with trio.fail_after(60):
            assert await advance(ledger.database, ledger.clock.now()) is None


async def test_the_databases_share_is_the_rules(database: Database) -> None:
    """The two places that know the rule agree, at the bounds too."""
    random = Random(1)
    pairs = [(random.randrange(2 ** random.randrange(1, 63)), random.randrange(10_001)) for _ in range(500)]
    pairs += [(2**63 - 1, 10_000), (2**63 - 1, 1), (0, 10_000), (9_999, 1), (1, 9_999)]
    rows = await database.fetch(
        "SELECT platform_fee(a, b) AS fee FROM unnest($1::bigint[], $2::int[]) WITH ORDINALITY AS p (a, b, n)"
        " ORDER BY n",
        [amount for amount, _ in pairs],
        [bps for _, bps in pairs],
    )
    assert [row["fee"] for row in rows] == [platform_fee(Stroops(amount), bps) for amount, bps in pairs]
